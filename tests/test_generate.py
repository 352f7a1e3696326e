"""Cached generation equals uncached generation, samples follow their distribution, and saved models load unchanged."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm.__main__ import main
from jaxlm.config import ModelConfig, TokenizerConfig
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.errors import UserError
from jaxlm.families import PRESETS
from jaxlm.hub import convert
from jaxlm.inference import decode
from jaxlm.inference import generate as generation
from jaxlm.inference.decode import Rules, choose, draw
from jaxlm.inference.generate import generate
from jaxlm.lm import LM, load, save
from jaxlm.nn.transformer import Transformer, apply
from jaxlm.storage import disk

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260k"
TINY = {"vocabulary": 48, "width": 16, "layers": 2, "heads": 2, "max_length": 32}
MODELS = {
    "gpt2": ModelConfig(**TINY),  # fewer positions than the rounded lengths of prompt and cache
    "rotary": ModelConfig(
        **TINY, positions="rotary", kv_heads=1, norm="rmsnorm", feed_forward="gated", biases=(), tied_embeddings=False
    ),
    "lstm": replace(PRESETS["lstm-lm"], **TINY),
}
LOCAL = {"layer_kinds": ("local", "global"), "window": 40}
TEXT = "the quick brown fox jumps over a lazy dog\n"
NEW = 12


@lru_cache
def tokenizer():
    return tokenizers.train([TEXT], TokenizerConfig(train="characters"), 48, add_bos=True)


SIZES = {"vocabulary": 32, "width": 16, "layers": 2, "heads": 2, "start_token": 1, "mlp_width": 32}
SEQ2SEQ = {
    "t5": replace(PRESETS["t5-small"], **SIZES, head_width=8, relative_buckets=8, relative_distance=12),
    "bart": replace(PRESETS["bart-base"], **SIZES, max_length=40, tied_embeddings=False),
    "gru": replace(PRESETS["gru-seq2seq"], **SIZES | {"layers": 1}, tied_embeddings=False),
}


@lru_cache
def lm_of(name: str) -> LM:
    return LM(MODELS[name], Transformer(MODELS[name]), random_params(MODELS[name], std=0.5), tokenizer())


def prompts() -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(0, tokenizer().size, n).tolist() for n in (3, 9, 32 - NEW)]


def cut_at_stop(row: list[int], stops) -> list[int]:
    return row[: next((n for n, token in enumerate(row) if token in stops), NEW)]


@lru_cache
def forward(name: str):
    module = Transformer(MODELS[name])
    return jax.jit(lambda params, tokens: apply(module, params, apply(module, params, tokens), method="lm"))


@lru_cache
def uncached_greedy(name: str) -> list[list[int]]:
    lm, size = lm_of(name), tokenizer().size
    rows = [list(prompt) for prompt in prompts()]
    for _ in range(NEW):
        padded = np.array([row + [0] * (32 - len(row)) for row in rows], np.int32)
        logits = np.asarray(forward(name)(lm.params, padded))
        for row, row_logits in zip(rows, logits):
            row.append(int(row_logits[len(row) - 1, :size].argmax()))
    return [row[-NEW:] for row in rows]


def generate_tokens(name: str, inputs, lm=None, **choices):
    choices = {"max_new_tokens": NEW, "stop_tokens": (), "return_tokens": True} | choices
    return generate(lm or lm_of(name), inputs, **choices)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_search_equals_the_argmax_of_a_full_forward_pass(name):
    """This also holds if prompt and continuation fill all positions."""
    expected = uncached_greedy(name)
    assert len({tuple(row) for row in expected}) == 3
    assert max(len(set(row)) for row in expected) > 3
    assert generate_tokens(name, prompts(), temperature=0) == expected
    for prompt, row in zip(prompts(), expected):  # a prompt alone equals the prompt in a batch
        assert generate_tokens(name, [prompt], temperature=0) == [row]
    assert generate_tokens(name, prompts(), temperature=0, max_new_tokens=5) == [row[:5] for row in expected]


def test_sampling_from_one_token_is_greedy():
    expected = uncached_greedy("gpt2")
    assert generate_tokens("gpt2", prompts(), top_k=1) == expected
    assert generate_tokens("gpt2", prompts(), top_p=1e-6) == expected
    assert generate_tokens("gpt2", prompts(), temperature=1e-4) == expected


def test_a_seed_is_reproducible_and_other_prompts_have_no_effect():
    a, b, c = prompts()
    first = generate_tokens("gpt2", [a, b, c], seed=1)
    assert generate_tokens("gpt2", [a, b, c], seed=1) == first
    assert generate_tokens("gpt2", [a, b, c], seed=2) != first
    assert generate_tokens("gpt2", [a, c, b], seed=1)[0] == first[0]
    assert generate_tokens("gpt2", [a], seed=1) == first[:1]
    same = generate_tokens("gpt2", [a, a, a], seed=1)
    assert same[0] == first[0]
    assert len({tuple(row) for row in same}) == 3  # equal prompts have different continuations


def test_ids_beyond_the_tokenizer_are_never_sampled():
    assert tokenizer().size < 48
    for seed in range(3):
        rows = generate_tokens("gpt2", prompts(), temperature=100.0, seed=seed)
        assert max(max(row) for row in rows) < tokenizer().size
    rows = generate_tokens("gpt2", prompts(), temperature=100.0, top_k=48)
    assert max(max(row) for row in rows) < tokenizer().size


LOGITS = np.log(np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04]))
PICKS = {  # settings -> the probabilities that remain
    "plain": ({}, [0.4, 0.25, 0.15, 0.1, 0.06, 0.04]),
    "hot": ({"temperature": 2.0}, np.sqrt([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])),
    "cold": ({"temperature": 0.5}, np.square([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])),
    "top 3": ({"top_k": 3}, [0.4, 0.25, 0.15, 0, 0, 0]),
    "top 9 keeps all": ({"top_k": 9}, [0.4, 0.25, 0.15, 0.1, 0.06, 0.04]),
    "top p 0.7 keeps three": ({"top_p": 0.7}, [0.4, 0.25, 0.15, 0, 0, 0]),
    "top p 0.64 keeps two": ({"top_p": 0.64}, [0.4, 0.25, 0, 0, 0, 0]),
    "top p 1 keeps all": ({"top_p": 1.0}, [0.4, 0.25, 0.15, 0.1, 0.06, 0.04]),
    "min p 0.2": ({"min_p": 0.2}, [0.4, 0.25, 0.15, 0.1, 0, 0]),
    "no filter": ({"top_k": None, "top_p": None, "min_p": None}, [0.4, 0.25, 0.15, 0.1, 0.06, 0.04]),
    # The first of the two most likely tokens (8/13, 5/13) reaches 0.6.
    "top k and top p": ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0, 0, 0]),
    # Top-p keeps two tokens, 0.4 and 0.25. Both are at least half as likely as the first.
    "top k, top p and min p": ({"top_k": 4, "top_p": 0.7, "min_p": 0.5}, [0.4, 0.25, 0, 0, 0, 0]),
    # Squared and normalised, the first two have 0.61 and 0.24: top-p 0.7 keeps both.
    "cold and top p 0.7": ({"temperature": 0.5, "top_p": 0.7}, [0.16, 0.0625, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("name", PICKS)
def test_draws_follow_the_probabilities(name):
    choices, remaining = PICKS[name]
    rules = Rules(6, np.array([], np.int32), **{"temperature": 1.0, "top_k": 6, "top_p": 1.0, "min_p": 0.0} | choices)
    order = np.array([3, 0, 5, 1, 4, 2])  # the most likely one is not the first
    n = 20_000

    def draw(key):
        logits_BV = jax.numpy.broadcast_to(jax.numpy.asarray(LOGITS[order], np.float32), (n, 6))
        return choose(logits_BV, jax.random.uniform(key, n), rules)

    counts = np.bincount(np.asarray(jax.jit(draw)(jax.random.key(0))), minlength=6)
    expected = n * (np.array(remaining) / np.sum(remaining))[order]
    allowed = expected > 0
    assert not counts[~allowed].any()
    chi_square = ((counts[allowed] - expected[allowed]) ** 2 / expected[allowed]).sum()
    assert chi_square < allowed.sum() + 5 * np.sqrt(2 * allowed.sum())


def test_draws_from_a_large_vocabulary_follow_the_probabilities():
    """The vocabulary has several blocks of tokens, and some tokens have probability 0."""
    random = np.random.default_rng(0)
    p = random.exponential(size=1000) * (np.arange(1000) % 384 < 200)
    n = 200_000
    sample = jax.jit(lambda u: jax.vmap(lambda u: draw(jax.numpy.asarray(p, np.float32)[None], u[None])[0])(u))
    counts = np.bincount(np.asarray(sample(random.random(n, np.float32))), minlength=1000)
    expected = n * p / p.sum()
    assert not counts[p == 0].any()
    chi_square = ((counts - expected)[p > 0] ** 2 / expected[p > 0]).sum()
    free = (p > 0).sum() - 1
    assert abs(chi_square - free) < 5 * np.sqrt(2 * free)


def test_a_continuation_ends_before_the_first_stop_token():
    expected = uncached_greedy("gpt2")
    late = next(token for token in expected[1] if token != expected[1][0])
    for stops in ([late], [late, expected[0][0]], {expected[2][-1]}):
        found = generate_tokens("gpt2", prompts(), temperature=0, stop_tokens=stops)
        assert found == [cut_at_stop(row, stops) for row in expected]
    # None stands for the tokenizer's end token, and () for no stop token.
    lm = replace(lm_of("gpt2"), tokenizer=copy.copy(tokenizer()))
    lm.tokenizer.eos = late
    greedy = partial(generate, lm, prompts(), max_new_tokens=NEW, temperature=0, return_tokens=True)
    assert greedy() == [cut_at_stop(row, [late]) for row in expected]
    assert len(greedy()[1]) < NEW
    assert greedy(stop_tokens=()) == expected
    lm.tokenizer.eos = None
    assert greedy() == expected


def test_strings_begin_with_bos_and_ids_are_used_unchanged():
    lm, tokens = lm_of("gpt2"), tokenizer()
    ids = tokens.encode("the fox")
    choices = {"max_new_tokens": NEW, "temperature": 0, "stop_tokens": ()}
    (text,) = generate(lm, ["the fox"], **choices)
    (with_bos,) = generate(lm, [[tokens.bos, *ids]], return_tokens=True, **choices)
    (without,) = generate(lm, [np.array(ids)], return_tokens=True, **choices)
    assert text == tokens.decode(with_bos)
    assert with_bos != without
    assert generate(lm, [""], **choices) == generate(lm, [[tokens.bos]], **choices)
    assert generate(lm, [], **choices) == []
    assert generate(lm, ["the"], max_new_tokens=0) == [""]
    assert generate(lm, ["the"], max_new_tokens=0, return_tokens=True) == [[]]


def test_prompts_of_any_length_share_few_programs(monkeypatch):
    """A new program is compiled only if a length exceeds a power of two."""
    lm = LM(model := replace(MODELS["rotary"], max_length=1024, layers=1), Transformer(model), random_params(model))
    run = lm.programs.get(generation.programs, lm.module)
    greedy = partial(generate, lm, max_new_tokens=12, temperature=0, return_tokens=True)
    for n in (1, 2, 20, 33, 40, 52, 100, 116, 120, 200, 244, 300, 500):
        assert len(greedy([[5] * n])[0]) == 12
    assert run.advance._cache_size() == 4  # caches of 64, 128, 256, 512 slots
    assert run.prefill._cache_size() == 5
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (0.7, 0.9), (0.8, 0.5)):
        generate(lm, [[5]], max_new_tokens=12, temperature=temperature, top_p=top_p, return_tokens=True)
    assert run.advance._cache_size() == 6  # one for sampling, one for sampling from some tokens


@pytest.mark.long
def test_the_cache_grows_with_the_text(monkeypatch):
    lm = replace(
        lm_of("rotary"), config=(model := replace(MODELS["rotary"], **LOCAL, max_length=64)), module=Transformer(model)
    )
    expected = generate_tokens("rotary", prompts(), temperature=0, max_new_tokens=44, lm=lm)
    monkeypatch.setattr(generation, "MIN_ROOM", 32)
    for rows in (1, 2, 8):
        monkeypatch.setattr(generation, "MAX_ROWS", rows)
        assert generate_tokens("rotary", prompts(), temperature=0, max_new_tokens=44, lm=lm) == expected


def test_many_prompts_are_decoded_continuously(monkeypatch):
    """If a text ends, the next prompt takes its row. Texts are in the order of their prompts."""
    monkeypatch.setattr(generation, "MAX_ROWS", 3)
    monkeypatch.setattr(generation, "CHECK_EVERY", 2)
    lm, end = lm_of("rotary"), uncached_greedy("rotary")[0][3]
    expected = [cut_at_stop(row, [end]) for row in uncached_greedy("rotary")]
    assert len({len(row) for row in expected}) > 1
    found = generate_tokens("rotary", prompts() * 5, temperature=0, stop_tokens=[end])
    assert found == expected * 5
    many = [*prompts(), *prompts()]
    draws = generate_tokens("rotary", many, seed=3, stop_tokens=[end])
    monkeypatch.setattr(generation, "MAX_ROWS", 8)
    assert generate_tokens("rotary", many, seed=3, stop_tokens=[end]) == draws
    monkeypatch.setattr(generation, "MAX_ROWS", 2)
    texts = generate_tokens("rotary", prompts(), seed=3, stop_tokens=[end], n_best=3)
    assert [len({tuple(row) for row in several}) for several in texts] == [3, 3, 3]
    assert [several[0] for several in texts] == draws[:3]
    assert lm.vocabulary > max(max(row, default=0) for several in texts for row in several)


def test_added_rows_have_ended():
    """Otherwise a program would run to their end where only the given rows are stopped."""
    field = jnp.arange(4).reshape(2, 2)
    state = decode.State(field, None, *jnp.zeros((3, 2), int), jnp.array([False, False]), field, {"cache": field})
    more = decode.repeat(state, rows=5)
    assert more.done_B.tolist() == [False, False, True, True, True]
    assert more.caches["cache"].tolist() == [[0, 1], [2, 3], [2, 3], [2, 3], [2, 3]]


@pytest.mark.parametrize("name", [*MODELS, *SEQ2SEQ])
@pytest.mark.long
def test_a_program_of_more_rows_than_prompts_generates_the_same_texts(name, monkeypatch):
    """On a GPU, one prompt is decoded in two rows."""
    model = SEQ2SEQ.get(name)
    lm = lm_of(name) if model is None else LM(model, Transformer(model), random_params(model, 0.3))
    choices = {"max_new_tokens": NEW, "return_tokens": True, "stop_tokens": (), "details": True}
    texts = lambda: [
        [(text.tokens, text.log_probs) for text in generate(lm, given, **choices, **more)]
        for given in (prompts()[:1], prompts()[:2])
        for more in ({"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"temperature": 0, "beams": 2})
    ]
    expected = texts()
    monkeypatch.setattr(generation, "MIN_DECODED_ROWS", {"cpu": 3})
    found = texts()
    for ours, theirs in zip(found, expected):
        assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
        np.testing.assert_allclose([p for _, p in ours], [p for _, p in theirs], rtol=1e-5)


def test_a_text_ends_before_a_stop_text():
    lm, choices = lm_of("gpt2"), {"max_new_tokens": NEW, "temperature": 0, "stop_tokens": ()}
    whole = generate(lm, prompts(), **choices)
    stop = whole[1][4:6]
    cut = lambda text: text[: text.index(stop)] if stop in text else text
    assert generate(lm, prompts(), stop=(stop,), **choices) == [cut(text) for text in whole]
    assert generate(lm, prompts(), stop=["never", stop], **choices) == [cut(text) for text in whole]
    assert generate(lm, prompts(), stop=("no such text",), **choices) == whole
    generations = generate(lm, prompts(), stop=(stop,), details=True, **choices)
    for one, text in zip(generations, whole):
        assert one.text == cut(text) == tokenizer().decode(one.tokens)
        assert len(one.log_probs) == len(one.tokens)


def test_forbidden_texts_are_never_generated():
    lm, choices = lm_of("gpt2"), {"max_new_tokens": NEW, "temperature": 0}
    whole = generate(lm, prompts(), **choices)
    letter, pair = whole[0][2], whole[0][2:4]
    assert pair in whole[0] and len(pair) == 2
    for forbidden in ((letter,), (pair,), (pair, "th", whole[1][0])):
        found = generate(lm, prompts(), forbidden=forbidden, **choices)
        assert found != whole
        assert not any(text in one for text in forbidden for one in found)
    without_pair = generate(lm, prompts(), forbidden=(pair,), **choices)[0]
    assert without_pair[:3] == whole[0][:3]  # the first of two letters alone is not forbidden


def test_no_stop_token_is_generated_before_the_minimum_length():
    expected = uncached_greedy("gpt2")
    stops = [expected[0][0]]
    assert generate_tokens("gpt2", prompts(), temperature=0, stop_tokens=stops)[0] == []
    found = generate_tokens("gpt2", prompts(), temperature=0, stop_tokens=stops, min_new_tokens=5)
    assert all(len(row) >= 5 and stops[0] not in row for row in found)


def test_the_repetition_penalty_changes_the_logits_of_earlier_tokens():
    """Keskar et al. 2019: positive logits are divided, negative ones multiplied."""
    lm = lm_of("gpt2")
    rows = [list(prompt) for prompt in prompts()]
    for _ in range(NEW):
        for row in rows:
            padded = np.array([row + [0] * (32 - len(row))], np.int32)
            logits = np.array(forward("gpt2")(lm.params, padded))[0, len(row) - 1, : tokenizer().size]
            earlier = np.array(sorted(set(row)))
            logits[earlier] = np.where(logits[earlier] < 0, logits[earlier] * 1.5, logits[earlier] / 1.5)
            row.append(int(logits.argmax()))
    expected = [row[-NEW:] for row in rows]
    assert expected != uncached_greedy("gpt2")
    assert generate_tokens("gpt2", prompts(), temperature=0, repetition_penalty=1.5) == expected


@pytest.mark.parametrize("beams", [1, 3])
def test_details_contain_the_log_probabilities_of_the_model(beams):
    lm = lm_of("gpt2")
    choices = {"temperature": 2.0, "top_k": 5} if beams == 1 else {"beams": 3, "n_best": 2}
    generations = generate_tokens("gpt2", prompts(), details=True, **choices)
    for prompt, several in zip(prompts(), generations if beams > 1 else [[one] for one in generations]):
        for one in several:
            logits = np.asarray(lm(np.array([prompt + one.tokens])).logits)[0, len(prompt) - 1 : -1, : lm.vocabulary]
            expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(NEW), one.tokens]
            np.testing.assert_allclose(one.log_probs, expected, atol=2e-5)
            np.testing.assert_allclose(one.score, sum(expected) / (1 if beams == 1 else NEW), atol=1e-5)
            assert one.text == tokenizer().decode(one.tokens)
    if beams > 1:
        assert all(first.score >= second.score for first, second in generations)


def test_a_wide_beam_search_finds_the_most_probable_text():
    """A beam for each prefix makes the search exhaustive."""
    lm = small(0)
    all_texts = probabilities(lm, [1, 3], 3, lambda p: p)
    best = sorted(all_texts, key=lambda text: -all_texts[text])[:4]
    rows = generate(lm, [[1, 3]], max_new_tokens=3, beams=5, n_best=4, return_tokens=True, stop_tokens=())
    generations = generate(lm, [[1, 3]], max_new_tokens=3, beams=5, length_penalty=0.0, details=True, stop_tokens=())
    assert rows[0][:1] == [list(best[0])] or all_texts[tuple(rows[0][0])] > 0.9 * all_texts[best[0]]
    np.testing.assert_allclose(np.exp(generations[0].score), all_texts[tuple(generations[0].tokens)], rtol=1e-4)


def test_a_stream_yields_the_text_in_pieces():
    lm, choices = lm_of("gpt2"), {"max_new_tokens": NEW, "temperature": 0, "stop_tokens": ()}
    (whole,) = generate(lm, ["the"], **choices)
    pieces = list(jaxlm.stream(lm, "the", **choices))
    assert len(pieces) == NEW / generation.STREAM_EVERY and "".join(pieces) == whole
    stop = whole[5:8]
    (cut,) = generate(lm, ["the"], stop=(stop,), **choices)
    assert len(cut) < len(whole)
    assert "".join(jaxlm.stream(lm, "the", stop=(stop,), **choices)) == cut
    with pytest.raises(UserError, match="n_best is 2, but stream generates one text"):
        next(jaxlm.stream(lm, "the", n_best=2))
    (found,) = generate(lm, ["the"], beams=3, max_new_tokens=5)
    assert list(jaxlm.stream(lm, "the", beams=3, max_new_tokens=5)) == [found]


def test_a_long_prompt_is_truncated_at_its_beginning(capsys):
    long = [1, 2, 3, *prompts()[2]]
    found = generate_tokens("gpt2", [long, prompts()[0]], temperature=0, too_long="truncate")
    assert found == [uncached_greedy("gpt2")[n] for n in (2, 0)]
    assert "1 of 2 prompts, of up to 23 tokens, are truncated to 20" in capsys.readouterr().err


# Encoder-decoders.


@pytest.mark.parametrize("name", SEQ2SEQ)
@pytest.mark.parametrize(
    "drafted", [pytest.param(False, id="plain"), pytest.param(True, id="drafted", marks=pytest.mark.long)]
)
def test_a_cached_encoder_decoder_equals_an_uncached_one(name, drafted):
    model = SEQ2SEQ[name]
    std = {"t5": 0.5, "bart": 0.1, "gru": 0.3}[name]  # with these standard deviations texts differ
    lm = LM(model, Transformer(model), random_params(model, std))
    expected = []
    for source in prompts():
        row = [1]
        for _ in range(NEW):
            padded = np.array([row + [0] * (NEW - len(row))])
            logits = lm(np.array([source + [0] * (20 - len(source))]), (np.arange(20) < len(source))[None] * 1,
                        target_tokens_BT=padded).logits  # fmt: skip
            row.append(int(np.asarray(logits)[0, len(row) - 1].argmax()))
        expected.append(row[1:])
    assert len({tuple(row) for row in expected}) > 1
    choices = {"max_new_tokens": NEW, "temperature": 0, "return_tokens": True, "stop_tokens": ()}
    draft = LM(model, lm.module, random_params(model, 0.9 * std)) if drafted else None
    assert generate(lm, prompts(), draft=draft, **choices) == expected
    assert generate(lm, prompts()[:1], draft=draft, **choices) == expected[:1]
    if not drafted:
        assert generate(lm, prompts() * 20, **choices) == expected * 20
        assert generate(lm, prompts(), beams=1, **choices) == expected


def test_sources_are_encoded_with_special_tokens():
    model = SEQ2SEQ["t5"]
    lm = LM(model, Transformer(model), random_params(model, std=0.5), tokenizer())
    ids = tokenizer().encode_with_special_tokens(["the fox"])[0][0]
    choices = {"max_new_tokens": NEW, "temperature": 0}
    (text,) = generate(lm, ["the fox"], **choices)
    (tokens,) = generate(lm, [ids], return_tokens=True, **choices)
    assert text == tokenizer().decode(tokens)
    assert generate(lm, ["the fox"], beams=2, n_best=2, **choices)[0] != [text]


@pytest.mark.long
@pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared/models/stories260k")
def test_a_trained_llama_generates_its_story_in_a_batch(monkeypatch):
    lm, story = load(STORIES), STORIES.with_suffix(".txt").read_text().removesuffix("\n")
    greedy = partial(generate, lm, max_new_tokens=256, temperature=0)
    found = greedy(["", "Once upon a time, there was a dog", "", "Tim"])
    assert [found[0], found[2]] == [story] * 2
    monkeypatch.setattr(generation, "MAX_ROWS", 2)
    assert greedy(["Tim", "", "One day", ""])[1::2] == [story] * 2
    assert greedy(["", "Lily"], draft=lm)[0] == story
    assert "".join(jaxlm.stream(lm, "", max_new_tokens=256, temperature=0)) == story


# Exact distributions: the vocabulary is so small that all texts can be enumerated.

SMALL = {"vocabulary": 5, "width": 8, "layers": 1, "heads": 2, "max_length": 16}


@lru_cache
def small(seed: int, **fields) -> LM:
    model = ModelConfig(**SMALL | fields)
    params = jax.tree.map(lambda leaf: leaf * (1 + seed), random_params(model, std=0.5))
    return LM(model, Transformer(model), params)


def probabilities(lm: LM, prompt: list[int], new: int, filter_p) -> dict[tuple[int, ...], float]:
    """Returns the probability of each text of `new` tokens. `filter_p` filters the probabilities of one token."""
    texts = {(): 1.0}
    for _ in range(new):
        rows = np.array([[*prompt, *text] for text in texts], np.int32)
        p = np.float64(jax.nn.softmax(np.asarray(lm(rows).logits)[:, -1].astype(np.float64)))
        texts = {
            (*text, token): text_p * token_p
            for (text, text_p), row in zip(texts.items(), p)
            for token, token_p in enumerate(filter_p(row / row.sum()))
            if token_p > 0
        }
    return texts


def top_2(p):
    allowed = np.where(p >= np.sort(p)[-2], p, 0)
    return allowed / allowed.sum()


def nucleus(p):
    order = np.argsort(-p)
    needed = int((np.cumsum(p[order]) < 0.8).sum()) + 1
    allowed = np.where(np.isin(np.arange(len(p)), order[:needed]), p, 0)
    return allowed / allowed.sum()


def warm(p):
    return p**0.5 / (p**0.5).sum()


def min_p(p):
    allowed = np.where(p >= 0.5 * p.max(), p, 0)
    return allowed / allowed.sum()


DISTRIBUTIONS = {
    "plain": ({}, lambda p: p),
    "top_k": ({"top_k": 2}, top_2),
    "top_p": ({"top_p": 0.8}, nucleus),
    "min_p": ({"min_p": 0.5}, min_p),
    "temperature": ({"temperature": 2.0}, warm),
    "temperature and top_k": ({"temperature": 2.0, "top_k": 2}, lambda p: top_2(warm(p))),
}


@pytest.mark.parametrize(
    "drafted", [pytest.param(False, id="plain"), pytest.param(True, id="drafted", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_texts_have_their_exact_probabilities(monkeypatch, name, drafted):
    monkeypatch.setattr(generation, "MAX_ROWS", 1000)
    choices, filter_p = DISTRIBUTIONS[name]
    lm, draft = small(0), small(1) if drafted else None
    expected = probabilities(lm, [1, 3], 3, filter_p)
    assert abs(sum(expected.values()) - 1) < 1e-5
    n = 4000
    sample = partial(generate, lm, [[1, 3]] * 4, max_new_tokens=3, n_best=n // 4, return_tokens=True, draft=draft)
    rows = [row for samples in sample(**choices) for row in samples]
    counts: dict = {}
    for row in rows:
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    assert counts.keys() <= expected.keys()
    chi_square = sum((counts.get(text, 0) - n * p) ** 2 / (n * p) for text, p in expected.items() if n * p >= 1)
    free = sum(n * p >= 1 for p in expected.values()) - 1
    assert chi_square < free + 5 * np.sqrt(2 * free) + 1


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_a_draft_changes_no_greedy_text(name):
    lm = lm_of(name)
    other = LM(MODELS["gpt2"], Transformer(MODELS["gpt2"]), random_params(MODELS["gpt2"], std=0.4), tokenizer())
    for draft in (lm, other):  # the first draft is always right, and the second one mostly wrong
        assert generate_tokens(name, prompts(), temperature=0, draft=draft) == uncached_greedy(name)
        assert generate_tokens(name, prompts(), temperature=0, max_new_tokens=1, draft=draft) == [
            row[:1] for row in uncached_greedy(name)
        ]
    many = generate_tokens(name, prompts() * 14, temperature=0, draft=other)
    assert many == uncached_greedy(name) * 14


MISTAKES = {
    "one string": (lambda lm: generate(lm, "the", max_new_tokens=1), "prompts is one string, 'the'; give a list"),
    "tokens": (lambda lm: generate(lm, ["the"], max_new_tokens=-1), "max_new_tokens is -1; it must be at least 0"),
    "temperature": (
        lambda lm: generate(lm, ["the"], max_new_tokens=1, temperature=-0.5),
        "temperature is -0.5; it must be at least 0",
    ),
    "top_k": (
        lambda lm: generate(lm, ["the"], max_new_tokens=1, top_k=-1),
        "top_k is -1; it must be at least 1, or 0 for all",
    ),
    "top_p": (lambda lm: generate(lm, ["the"], max_new_tokens=1, top_p=0.0), "top_p is 0.0; it must be above 0"),
    "top_p above": (lambda lm: generate(lm, ["the"], max_new_tokens=1, top_p=1.5), "top_p is 1.5; it .* at most 1"),
    "positions": (
        lambda lm: generate(lm, [[1] * 21], max_new_tokens=12),
        "prompt of 21 tokens and 12 new ones exceed the model's 32 positions; .* to 20, .* at most 11, or .*'trun",
    ),
    "too long": (lambda lm: generate(lm, [[1] * 40], max_new_tokens=1), "exceed .* shorten it to 31, or"),
    "no room": (lambda lm: generate(lm, [[1]], max_new_tokens=32), "max_new_tokens is 32; .* at most 31"),
    "unknown setting": (
        lambda lm: generate(lm, [[1]], max_tokens=3),
        "'max_tokens' is not a choice .* 'max_new_tokens'",
    ),
    "wrong type": (lambda lm: generate(lm, [[1]], top_k="5"), "top_k is '5'; it must be an integer"),
    "min_p": (lambda lm: generate(lm, [[1]], min_p=1.0), "min_p is 1.0; it must be at least 0 and below 1"),
    "min_new_tokens": (
        lambda lm: generate(lm, [[1]], min_new_tokens=9, max_new_tokens=8),
        "min_new_tokens is 9; .* from 0",
    ),
    "beams": (lambda lm: generate(lm, [[1]], beams=33), "beams is 33, more than the 32 tokens"),
    "no beams": (lambda lm: generate(lm, [[1]], beams=0), "beams is 0; it must be at least 1"),
    "beams with sampling": (
        lambda lm: generate(lm, [[1]], beams=2, top_p=0.5),
        "top_p is 0.5, but beam search does not sample",
    ),
    "n_best of beams": (lambda lm: generate(lm, [[1]], beams=2, n_best=3), "n_best is 3, but there are 2 beams"),
    "n_best of one": (lambda lm: generate(lm, [[1]], temperature=0.0, n_best=3), "n_best is 3, but greedy search"),
    "empty stop": (lambda lm: generate(lm, [[1]], stop=("",)), "stop is "),
    "no head": (
        lambda lm: generate(replace(lm, config=replace(lm.config, heads_on_top=())), [[1]]),
        "cannot generate; use .* the head 'lm'",
    ),
    "stop without a tokenizer": (
        lambda lm: generate(replace(lm, tokenizer=None), [[1]], stop=("a",), return_tokens=True),
        "no tokenizer, which stop and forbidden require; .* set stop_tokens",
    ),
    "large id": (lambda lm: generate(lm, [[1, 48]], max_new_tokens=1), "a prompt has token 48; ids go from 0 to 47"),
    "negative id": (lambda lm: generate(lm, [[5, -2]], max_new_tokens=1), "a prompt has token -2; ids go from 0"),
    "empty": (lambda lm: generate(lm, [[1], []], max_new_tokens=1), "a prompt is empty"),
    "no tokenizer": (
        lambda lm: generate(replace(lm, tokenizer=None), ["the"], max_new_tokens=1, return_tokens=True),
        "the model has no tokenizer; give prompts as lists of token ids",
    ),
    "no tokenizer to decode with": (
        lambda lm: generate(replace(lm, tokenizer=None), [[1]], max_new_tokens=1),
        "the model has no tokenizer; .*return_tokens=True",
    ),
    "encoder": (
        lambda lm: generate(replace(lm, config=PRESETS["bert-tiny"]), ["the"], max_new_tokens=1),
        "encoder with heads .* cannot generate; use a decoder or an encoder-decoder",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused(name):
    call, message = MISTAKES[name]
    with pytest.raises(UserError, match=message):
        call(lm_of("gpt2"))


def test_ids_are_generated_without_a_tokenizer():
    found = generate(
        replace(lm_of("gpt2"), tokenizer=None), prompts(), max_new_tokens=NEW, temperature=0, return_tokens=True
    )
    assert [len(row) for row in found] == [NEW] * 3


# The command `generate`.


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(lm_of("gpt2"), "model")
    (tmp_path / "prompts.txt").write_text("".join(f"the {word}\n" for word in TEXT.split()))
    return tmp_path


OPTIONS = ["--max-new-tokens", "6", "--top-k", "4"]


def test_the_command_continues_prompts(folder, capsys):
    choices = {"max_new_tokens": 6, "top_k": 4}
    assert main(["generate", "model", "--prompt", "the", "quick", *OPTIONS]) == 0
    texts = generate(lm_of("gpt2"), ["the", "quick"], **choices)
    assert capsys.readouterr().out == f"the{texts[0]}\nquick{texts[1]}\n"
    assert main(["generate", "model", "--prompt", "the", "--n-best", "2", *OPTIONS]) == 0
    ((a, b),) = generate(lm_of("gpt2"), ["the"], n_best=2, **choices)
    assert capsys.readouterr().out == f"the{a}\nthe{b}\n"
    assert main(["generate", "model", *OPTIONS]) == 0
    assert capsys.readouterr().out == generate(lm_of("gpt2"), [""], **choices)[0] + "\n"


@pytest.mark.long
def test_the_command_accepts_a_draft(folder, capsys):
    assert main(["generate", "model", "--draft", "model", "--prompt", "the", *OPTIONS[:2], "--temperature", "0"]) == 0
    (text,) = generate(lm_of("gpt2"), ["the"], max_new_tokens=6, temperature=0)
    assert capsys.readouterr().out == f"the{text}\n"


def test_a_terminal_receives_the_text_in_pieces(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["generate", "model", "--prompt", "the", *OPTIONS]) == 0
    (text,) = generate(lm_of("gpt2"), ["the"], max_new_tokens=6, top_k=4)
    assert capsys.readouterr().out == f"the{text}\n"


def test_an_interrupted_file_of_prompts_is_resumed(folder, capsys, monkeypatch):
    monkeypatch.setattr(generation, "MAX_ROWS", 2)
    command = ["generate", "model", "--file", "prompts.txt", *OPTIONS]
    assert main([*command, "--output", "out.jsonl"]) == 0
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    prompt_lines = (folder / "prompts.txt").read_text().splitlines()
    assert [row["prompt"] for row in rows] == prompt_lines
    assert [row["text"] for row in rows] == generate(lm_of("gpt2"), prompt_lines, max_new_tokens=6, top_k=4)
    whole = (folder / "out.jsonl").read_bytes()
    assert main(command) == 0
    assert capsys.readouterr().out.encode() == whole

    # The command was stopped while it wrote the fourth row.
    lines = whole.splitlines(keepends=True)
    (folder / "out.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:5])
    assert main([*command, "--output", "out.jsonl"]) == 0
    assert (folder / "out.jsonl").read_bytes() == whole
    assert "out.jsonl already has 3 of 9 rows" in capsys.readouterr().err
    monkeypatch.setattr(jaxlm, "load", lambda *_: pytest.fail("no row is left to generate"))
    assert main([*command, "--output", "out.jsonl"]) == 0
    monkeypatch.undo()
    monkeypatch.chdir(folder)

    def assert_refused(arguments, *words):
        capsys.readouterr()
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and all(word in error for word in words), error
        assert (folder / "out.jsonl").read_bytes() == whole

    assert_refused(
        [*command, "--output", "out.jsonl", "--seed", "5"],
        "was written with other settings",
        "seed: 5 | 0",
        "choose another --output",
    )
    save(replace(lm_of("gpt2"), params=random_params(lm_of("gpt2").config, std=0.3)), "model", overwrite=True)
    assert_refused(
        [*command, "--output", "out.jsonl"],
        "was written with other settings",
        "model_hash: ",
        "choose another --output",
    )
    save(lm_of("gpt2"), "model", overwrite=True)
    (folder / "model").rename(folder / "moved")
    assert main(["generate", "moved", *command[2:], "--output", "out.jsonl"]) == 0  # its content identifies the model
    (folder / "moved").rename(folder / "model")
    with disk.lock(disk.lock_path(folder / "out.jsonl"), "it", "wait"):
        assert_refused([*command, "--output", "out.jsonl"], "out.jsonl is held by process", "choose another --output")
    choices = (folder / "out.jsonl.choices.json").read_text()
    for damaged in ("[]", "{", "[" * 9000, "3" * 9000, ""):
        (folder / "out.jsonl.choices.json").write_text(damaged)
        assert_refused([*command, "--output", "out.jsonl"], "out.jsonl.choices.json was not written by generate")
    (folder / "out.jsonl.choices.json").write_text(choices)
    (folder / "prompts.txt").write_text("\n".join(["of another", *prompt_lines[1:]]))
    assert_refused(
        [*command, "--output", "out.jsonl"], "out.jsonl:1", "'the the'", "'of another'", "choose another --output"
    )
    (folder / "prompts.txt").write_text("\n".join(prompt_lines[:2]))
    assert_refused([*command, "--output", "out.jsonl"], "out.jsonl:3", "has none there")
    for content in (b'{"prompt": ' + b"[" * 9000 + b"\n", b"[1]\n", b"9" * 9000 + b"\n", b"\xff\n", b"\r\n"):
        (folder / "out.jsonl").write_bytes(whole := content)
        assert_refused([*command, "--output", "out.jsonl"], "out.jsonl:1 is not a row of generate")
    (folder / "out.jsonl.choices.json").unlink()
    assert_refused([*command, "--output", "out.jsonl"], "'out.jsonl', which exists and was not written by generate")


def test_an_output_without_rows_accepts_other_settings(folder, capsys):
    """A refused command leaves a settings file but no rows."""
    command = ["generate", "model", "--file", "prompts.txt", "--output", "out.jsonl"]
    assert main([*command, "--max-new-tokens", "40"]) == 2
    assert "set at most 31" in capsys.readouterr().err
    assert main([*command, *OPTIONS]) == 0
    assert len((folder / "out.jsonl").read_text().splitlines()) == len(
        (folder / "prompts.txt").read_text().splitlines()
    )


COMMAND_MISTAKES = {
    "temperature": (["--temperature", "-1"], "temperature is -1.0; it must be at least 0"),
    "both": (["--prompt", "a", "--file", "prompts.txt"], "--file replaces --prompt"),
    "no file": (["--file", "gone.txt"], "gone.txt cannot be read: No such file"),
    "empty": (["--file", "empty.txt"], "empty.txt is empty"),
    "not UTF-8": (["--file", "latin.txt"], "latin.txt:1 is not UTF-8"),
    "suffix": (["--file", "prompts.txt", "--output", "out.csv"], "output is 'out.csv'; it must end in .jsonl"),
    "output alone": (["--output", "out.jsonl"], "--output requires --file"),
    "length": (["--max-new-tokens", "40"], "max_new_tokens is 40; the model has 32 positions: set at most 31"),
    "long": (["--prompt", "a" * 30, "--max-new-tokens", "6"], "a prompt of 31 tokens and 6 new ones exceed"),
    "beams": (["--beams", "99"], "beams is 99, more than the 32 tokens"),
    "draft": (["--draft", "gone"], "gone is not a folder"),
}


@pytest.mark.parametrize("name", COMMAND_MISTAKES)
def test_mistakes_of_the_command_are_refused(folder, capsys, name):
    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes(b"na\xefve\n")
    arguments, message = COMMAND_MISTAKES[name]
    assert main(["generate", "model", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    assert message in printed.err[printed.err.index("error: ") :]


# Loading and saving models.

SAVED = {
    "gpt2": replace(MODELS["gpt2"], mlp_width=64),
    "llama": replace(MODELS["rotary"], mlp_width=32, head_width=8, activation="silu"),
    "jaxlm": replace(MODELS["rotary"], norm="layernorm"),
    "bert": replace(PRESETS["bert-tiny"], vocabulary=48, max_length=32, width=16, heads=2, mlp_width=64),
}


@pytest.mark.parametrize("kind", SAVED)
def test_a_saved_model_is_loaded_unchanged(tmp_path, kind):
    model = SAVED[kind]
    lm = LM(model, Transformer(model), random_params(model), tokenizer())
    assert save(lm, tmp_path / "model") == kind
    again = load(tmp_path / "model")
    assert convert.inference_config(again.config) == convert.inference_config(model)
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)
    tokens = np.array(prompts()[1])[None] % 48
    a, b = lm(tokens), again(tokens)
    np.testing.assert_array_equal(a.logits, b.logits)
    np.testing.assert_array_equal(a.hidden_BTD, b.hidden_BTD)
    assert again.tokenizer.encode(TEXT) == tokenizer().encode(TEXT)
    assert (again.tokenizer.bos, again.tokenizer.eos) == (tokenizer().bos, tokenizer().eos)
    assert again.vocabulary == lm.vocabulary == tokenizer().size
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model"]  # no incomplete file is left
    with pytest.raises(UserError, match="exists and is not empty; choose another folder"):
        save(lm, tmp_path / "model")
    save(again, tmp_path / "again")
    for file in (tmp_path / "model").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_a_model_without_tokenizer_and_a_run_folder_are_loaded(tmp_path):
    lm = replace(lm_of("gpt2"), tokenizer=None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"run": {}}')
    with pytest.raises(UserError, match="no export yet"):
        load(tmp_path / "run")
    save(lm, tmp_path / "run" / "export")
    again = load(tmp_path / "run")
    assert again.tokenizer is None
    assert again.vocabulary == 48


def test_the_compute_dtype_is_set_when_loading(tmp_path):
    save(lm_of("gpt2"), tmp_path / "model")
    lm = load(tmp_path / "model", compute_dtype="bfloat16")
    output = lm(np.array(prompts()[0])[None])
    assert output.hidden_BTD.dtype == jax.numpy.bfloat16
    assert output.logits.dtype == np.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(lm.params)} == {np.dtype("float32")}


INVALID_FOLDERS = {
    "missing": (lambda folder: folder / "nowhere", "is not a folder and not a valid name of a model on the hub"),
    "a file": (lambda folder: folder / "file", "is a file; give its folder"),
    "empty": (lambda folder: folder / "empty", "has no config.json"),
    "no JSON": (lambda folder: folder / "no_json", "config.json is not JSON"),
    "a list": (lambda folder: folder / "list", "config.json contains a list, not an object"),
    "unknown": (lambda folder: folder / "unknown", "model_type 'gtp2', unknown; perhaps you meant 'gpt2'"),
    "no weights": (lambda folder: folder / "no_weights", "safetensors"),
}


@pytest.mark.parametrize("name", INVALID_FOLDERS)
def test_invalid_folders_are_refused(tmp_path, name):
    (tmp_path / "file").touch()
    gpt2 = json.dumps({"model_type": "gpt2"})
    (tmp_path / "empty").mkdir()
    texts = {"no_json": "{", "list": "[1]", "unknown": '{"model_type": "gtp2"}', "no_weights": gpt2}
    for folder, text in texts.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(text)
    (tmp_path / "unknown" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    path, message = INVALID_FOLDERS[name]
    with pytest.raises(UserError, match=message):
        load(path(tmp_path))


def test_the_public_names_exist():
    assert set(jaxlm.__all__) <= set(dir(jaxlm))
    assert jaxlm.load is load
    assert jaxlm.generate is generate


def test_a_translation_begins_with_the_target_language_of_the_tokenizer(tmp_path):
    """The model's files may force another first token. Without a target language none is forced."""
    from test_tokenizer import checkpoint

    config = replace(PRESETS["m2m100-418m"], vocabulary=704, width=8, layers=1, heads=2, mlp_width=8)
    forced = lambda files, **languages: (
        generation.rules_of(
            LM(
                config,
                Transformer(config),
                None,
                tokenizers.load(checkpoint("nllb", tmp_path, src_lang="deu_Latn", **languages)),
                files={"generation_config.json": json.dumps(files).encode()},
            ),
            jaxlm.Decoding(),
            [2],
        ).first
    )
    romanian = tokenizers.load(checkpoint("nllb", tmp_path)).backend.token_to_id("ron_Latn")
    assert forced({}, tgt_lang="ron_Latn") == romanian
    assert forced({"forced_bos_token_id": 7}, tgt_lang="ron_Latn") == 7
    assert forced({}) is None
