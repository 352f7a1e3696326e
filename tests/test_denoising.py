"""Span corruption and infilling: the text can be restored, the lengths can be computed, and runs learn."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxlm
from jaxlm import DataConfig, Infilling, RunConfig, SpanCorruption, TokenizerConfig, UserError
from jaxlm.data.corpus import Corpus
from jaxlm.data.corrupt import Draws, corrupt_spans, corrupted_lengths, infill
from jaxlm.families import PRESETS
from jaxlm.tasks import make_task, prepare
from jaxlm.tasks.denoising import NoisyExamples

MASK, END = -5, -1000
SENTINELS = -1 - np.arange(200)


@settings(deadline=None)
@given(st.integers(2, 400), st.floats(0.01, 0.95), st.floats(1, 12), st.integers(0, 2**32 - 1))
def test_the_text_can_be_restored_from_source_and_target(n, rate, span, seed):
    tokens = 1000 + np.arange(n)
    draws, options = Draws((seed,), np.array([0])), {"sentinels": SENTINELS, "end": END}
    texts = corrupt_spans(tokens, np.array([n]), draws, rate=rate, span=span, **options)
    source, target = (text.tokens for text in texts)
    assert (len(source), len(target)) == corrupted_lengths(n, rate, span)
    assert source[-1] == target[-1] == END
    spans: dict[int, list[int]] = {}
    for token in target[:-1].tolist():
        if token < 0:
            spans[token] = span_tokens = []
        else:
            span_tokens.append(token)
    restored = [t for token in source[:-1].tolist() for t in (spans[token] if token < 0 else [token])]
    assert restored == tokens.tolist()
    assert list(spans) == SENTINELS[: len(spans)].tolist() and all(spans.values())


@settings(deadline=None)
@given(st.integers(1, 400), st.floats(0.01, 0.9), st.floats(1, 12), st.integers(0, 2**32 - 1))
def test_infilling_masks_its_fraction_and_lengthens_no_text(n, rate, span, seed):
    tokens = 1000 + np.arange(n)
    draws = Draws((seed,), np.array([0]))
    source = infill(tokens, np.array([n]), draws, rate=rate, span=span, mask=MASK).tokens
    remaining = source[source != MASK]
    assert len(source) <= n
    assert len(remaining) == n - round(rate * n) and (np.diff(remaining) > 0).all()


@settings(deadline=None)
@given(st.lists(st.integers(2, 60), min_size=1, max_size=9), st.floats(0.05, 0.9), st.floats(1, 6))
def test_texts_are_corrupted_alike_alone_and_together(lengths, rate, span):
    """The draws of a text depend on its number alone."""
    lengths = np.array(lengths)
    starts = np.cumsum(lengths) - lengths
    corruptions = (
        lambda *texts: corrupt_spans(*texts, rate=rate, span=span, sentinels=SENTINELS, end=END),
        lambda *texts: (infill(*texts, rate=rate, span=span, mask=MASK),),
    )
    for corrupt in corruptions:
        together = corrupt(np.arange(lengths.sum()), lengths, Draws((7,), 100 + np.arange(len(lengths))))
        for n, (start, length) in enumerate(zip(starts, lengths)):
            alone = corrupt(np.arange(start, start + length), lengths[n : n + 1], Draws((7,), np.array([100 + n])))
            for one, all_texts in zip(alone, together):
                end = all_texts.lengths[: n + 1].sum()
                assert one.tokens.tolist() == all_texts.tokens[end - all_texts.lengths[n] : end].tolist()


def test_documents_of_any_length_become_pieces_without_single_tokens():
    class Longest5(SimpleNamespace):
        longest = 5

    for sizes in ([5, 1, 6, 1, 11, 2], [1], [16], [6, 6, 1, 1], [0, 5, 0, 1, 7]):
        offsets = np.cumsum([0, *sizes])
        corpus = Corpus(np.zeros(sum(sizes), np.uint16), offsets, np.arange(len(offsets)), 1)
        spans = NoisyExamples(Longest5(), corpus, True).spans.tolist()
        assert all(2 <= end - start <= 5 for start, end in spans)
        covered = [n for start, end in spans for n in range(start, end)]
        expected = [n for a, b in zip(offsets, offsets[1:]) if b - a > 1 for n in range(a, b)]
        assert covered == expected


def test_rates_are_those_of_the_papers():
    """T5 corrupts 15% in spans of 3: 568 tokens become 512 and 114. BART masks 30% in gaps of 3 on average."""
    assert corrupted_lengths(568, 0.15, 3.0) == (512, 114)
    lengths, draws = np.full(50, 1000), Draws((0,), np.arange(50))
    gaps = (infill(np.arange(50_000), lengths, draws, rate=0.3, span=3.0, mask=MASK).tokens == MASK).sum() / 50
    assert 90 < gaps < 110


TEXT = [f"Line {n} is here. It speaks of {n * n} things! Does it? Yes, the {n % 7} of them." for n in range(300)]
SMALL = {"max_length": 64, "width": 16, "layers": 1, "decoder_layers": 1, "heads": 2, "head_width": None}
T5 = replace(PRESETS["t5-small"], **SMALL, vocabulary=320, mlp_width=32, dropout=0.0)
BART = replace(PRESETS["bart-base"], **SMALL, vocabulary=300, mlp_width=32, dropout=0.0)
RUNS = {
    "t5": (T5, SpanCorruption(), TokenizerConfig(train="bpe", sentinels=20)),
    "bart": (BART, Infilling(), TokenizerConfig(train="bpe", sentinels=1)),
}


def run_of(name: str, folder, **fields) -> RunConfig:
    model, task, tokenizer = RUNS[name]
    (folder / "text.txt").write_text("\n".join(TEXT))
    data = DataConfig(path=str(folder / "text.txt"), length=40, cache=str(folder / "cache"))
    settings_of_run = {
        "model": model,
        "task": task,
        "data": data,
        "tokenizer": tokenizer,
        "batch": 8,
        "steps": 4,
    }
    return RunConfig(**settings_of_run | {"workdir": str(folder / "run")} | fields)


@pytest.mark.parametrize("name", RUNS)
def test_batches_hold_sources_and_targets_of_one_text(name, tmp_path):
    run = run_of(name, tmp_path)
    data = prepare(run, None, lambda _: None)
    task = make_task(run, data.tokenizer).bind(run.model)
    batches = task.batches(data.train, 4, run.data.length, 0)
    first, again, later = batches.batch_at(0), batches.batch_at(0), batches.batch_at(len(batches) + 1)
    assert all((first[field] == again[field]).all() for field in first)
    assert first["source_tokens_BS"].shape == (4, 40)
    assert (first["source_segments_BS"].max(1) == first["segments_BT"].max(1)).all()
    assert not (first["source_tokens_BS"] == later["source_tokens_BS"]).all()
    for b in range(4):
        for e in range(1, first["segments_BT"][b].max() + 1):
            source = first["source_tokens_BS"][b][first["source_segments_BS"][b] == e]
            target = first["labels_BT"][b][first["segments_BT"][b] == e]
            text = data.tokenizer.decode(target) if name == "bart" else _restore(source, target, data.tokenizer)
            assert any(text in line for line in TEXT), text
    count = sum(int(batches.batch_at(n)["segments_BT"].max(1).sum()) for n in range(len(batches)))
    assert count >= len(task.examples(data.train, True).spans)


def _restore(source, target, tokenizer) -> str:
    from jaxlm.tasks.denoising import sentinels

    sentinel_ids, spans = set(sentinels(tokenizer).tolist()), {}
    for token in target.tolist()[:-1]:
        if token in sentinel_ids:
            spans[token] = span_tokens = []
        else:
            span_tokens.append(token)
    return tokenizer.decode([t for token in source.tolist()[:-1] for t in spans.get(token, [token])])


@pytest.mark.long
@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.usefixtures("devices", "no_plots")
def test_a_run_learns_and_exports(name, tmp_path):
    lm = jaxlm.fit(run_of(name, tmp_path))
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert np.isfinite(scores["loss"]) and 0 <= scores["accuracy"] <= 1
    again = jaxlm.load(tmp_path / "run")
    assert again.config.start_token == lm.config.start_token
    assert again.tokenizer.encode_with_special_tokens(["Line 1"]) == lm.tokenizer.encode_with_special_tokens(["Line 1"])
    assert again.tokenizer.encode_with_special_tokens(["Line 1"])[0][0][-1] == lm.tokenizer.eos
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("t5", {"tokenizer": TokenizerConfig(train="bpe")}, "0 sentinels <extra_id_0> ..., and a text of 44 tokens"),
        ("bart", {"tokenizer": TokenizerConfig(train="bpe")}, "no token for a gap, <mask> or <extra_id_0>"),
        ("t5", {"model": PRESETS["gpt2"]}, "SpanCorruption needs an encoder-decoder"),
        ("bart", {"model": PRESETS["mbart-large"]}, "start_token None"),
        ("t5", {"task": SpanCorruption(rate=0.0)}, "task.rate is 0.0"),
        ("bart", {"task": Infilling(span=0.5)}, "task.span is 0.5"),
        ("t5", {"tokenizer": TokenizerConfig(sentinels=400)}, "tokenizer.sentinels is 400"),
    ],
)
def test_bad_input_is_refused(name, fields, message, tmp_path):
    with pytest.raises(UserError) as error:
        jaxlm.fit(run_of(name, tmp_path, **fields))
    assert message in str(error.value)
