"""Likelihoods equal those of one pass over each example, as in transformers, and windows cover each text once."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import jax
import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm.__main__ import main
from jaxlm.config import CausalLM, ModelConfig, TokenizerConfig
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.devices.programs import Programs
from jaxlm.errors import UserError
from jaxlm.inference import likelihood
from jaxlm.inference.likelihood import _windows, fill, log_likelihoods, perplexity
from jaxlm.lm import LM
from jaxlm.nn.transformer import Transformer, apply

TINY = {"vocabulary": 48, "width": 16, "layers": 2, "heads": 2, "max_length": 80}
ENCODER_DECODER = {**TINY, "structure": "encoder_decoder", "start_token": 0}
MODELS = {
    "gpt2": ModelConfig(**TINY),
    "rotary": ModelConfig(
        **TINY, positions="rotary", kv_heads=1, norm="rmsnorm", feed_forward="gated", tied_embeddings=False
    ),
    "window": ModelConfig(**TINY, positions="rotary", layer_kinds=("local", "global"), window=4),
    "encoder-decoder": ModelConfig(
        **ENCODER_DECODER, positions="none", relative="buckets", norm="rmsnorm", biases=(), scale_logits=True
    ),
}
DECODERS = ("gpt2", "rotary", "window")
TEXT = "the quick brown fox jumps over a lazy dog\n"


@lru_cache
def tokenizer():
    return tokenizers.train([TEXT], TokenizerConfig(train="characters"), 48, add_bos=True)


@lru_cache
def lm_of(name: str) -> LM:
    return LM(MODELS[name], Transformer(MODELS[name]), random_params(MODELS[name], std=0.3), tokenizer())


@lru_cache
def forward(name: str):
    module = Transformer(MODELS[name])

    def logits(params, *tokens):
        return apply(module, params, apply(module, params, *tokens), method="lm")

    return jax.jit(logits)


def reference(name: str, context: list[int], continuation: list[int]) -> likelihood.Likelihood:
    """Returns the likelihood from one pass over one pair, with log-probabilities in NumPy."""
    padded = lambda ids: np.array([[*ids, *[0] * (80 - len(ids))]], np.int32)  # so that one program is compiled
    mask = lambda ids: padded([1] * len(ids))
    if name == "encoder-decoder":
        tokens = [0, *continuation[:-1]]
        inputs = (padded(context), mask(context), None, None, padded(tokens), mask(tokens))
        logits = np.asarray(forward(name)(lm_of(name).params, *inputs)[0], np.float64)[: len(continuation)]
    else:
        tokens = [*context, *continuation[:-1]]
        logits = np.asarray(forward(name)(lm_of(name).params, padded(tokens))[0], np.float64)
        logits = logits[len(context) - 1 : len(tokens)]
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = log[np.arange(len(continuation)), continuation].sum()
    return likelihood.Likelihood(total, (log.argmax(-1) == continuation).all(), len(continuation))


def pairs(count: int = 30) -> list[tuple[list[int], list[int]]]:
    random = np.random.default_rng(0)
    draw = lambda max_length: random.integers(4, tokenizer().size, random.integers(1, max_length)).tolist()
    return [(draw(60), draw(20)) for _ in range(count)]


def assert_same(found, expected) -> None:
    assert [(f.tokens, f.is_greedy) for f in found] == [(e.tokens, e.is_greedy) for e in expected]
    np.testing.assert_allclose(
        [f.log_probability for f in found], [e.log_probability for e in expected], rtol=1e-5, atol=1e-4
    )


# Continuations.


@pytest.mark.parametrize("name", MODELS)
def test_a_likelihood_is_that_of_one_pass_over_the_pair(name):
    assert_same(log_likelihoods(lm_of(name), pairs()), [reference(name, *pair) for pair in pairs()])


@pytest.mark.parametrize("name", MODELS)
def test_a_greedy_continuation_is_reported_as_greedy(name):
    context, continuation = pairs()[0][0], []
    for _ in range(4):
        best = max(range(48), key=lambda token: reference(name, context, [*continuation, token]).log_probability)
        continuation.append(best)
    other = [*continuation[:-1], (continuation[-1] + 1) % 48]
    assert [f.is_greedy for f in log_likelihoods(lm_of(name), [(context, continuation), (context, other)])] == [
        True,
        False,
    ]


@pytest.mark.parametrize("name", ["gpt2", "encoder-decoder"])
def test_batches_do_not_change_likelihoods(name):
    expected = log_likelihoods(lm_of(name), pairs())
    for batch_tokens in (1, 200, 1 << 12):
        assert_same(log_likelihoods(lm_of(name), pairs(), batch_tokens=batch_tokens), expected)
    order = np.random.default_rng(1).permutation(30)
    assert_same(log_likelihoods(lm_of(name), [pairs()[i] for i in order]), [expected[i] for i in order])
    assert_same(log_likelihoods(lm_of(name), iter(pairs()[:7])), expected[:7])


def test_windows_do_not_change_likelihoods(monkeypatch):
    expected = log_likelihoods(lm_of("gpt2"), pairs())
    monkeypatch.setattr(likelihood, "WINDOW", 7)
    monkeypatch.setattr(likelihood, "STATES", 3)
    assert_same(log_likelihoods(replace(lm_of("gpt2"), programs=Programs()), pairs()), expected)


def test_few_programs_are_compiled():
    lm = replace(lm_of("gpt2"), programs=Programs())
    log_likelihoods(lm, pairs(200), batch_tokens=256)
    assert lm.programs.get(likelihood._program, lm.module)._cache_size() <= 5  # 1 to 4 rows of 64 and of 128 tokens


def test_a_mesh_does_not_change_likelihoods(devices):
    lm = lm_of("gpt2")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2, 1), ("data", "fsdp", "tensor"))
    from jaxlm.devices import sharding

    params = jax.device_put(lm.params, sharding.replicated(mesh))
    split = LM(lm.config, Transformer(lm.config, sharding.Placement(mesh)), params, lm.tokenizer)
    assert_same(log_likelihoods(split, pairs()), log_likelihoods(lm, pairs()))


def test_texts_begin_with_bos_and_are_tokenized_together():
    lm, token = lm_of("gpt2"), tokenizer()
    assert token.bos is not None
    expected = [reference("gpt2", [token.bos, *token.encode("the quick")], token.encode(" brown"))]
    for context, continuation in (("the quick", " brown"), ("the quick ", "brown")):  # the space belongs to the word
        assert_same(log_likelihoods(lm, [(context, continuation)]), expected)
    assert_same(log_likelihoods(lm, [("", "fox")]), [reference("gpt2", [token.bos], token.encode("fox"))])
    ids = ([token.bos, *token.encode("the quick")], token.encode(" brown"))
    assert_same(log_likelihoods(lm, [ids, (np.array(ids[0]), np.array(ids[1]))]), expected * 2)
    assert_same(log_likelihoods(lm, [("the quick", ids[1])]), expected)


def test_joined_tokens_are_those_of_the_whole_text():
    bpe = tokenizers.train([TEXT * 9], TokenizerConfig(train="byte_bpe"), 290, add_bos=True)
    config = replace(MODELS["gpt2"], vocabulary=290)
    lm = LM(config, Transformer(config), random_params(config), bpe)
    before, whole = bpe.encode("the qui"), bpe.encode("the quick brown")
    found = log_likelihoods(lm, [("the qui", "ck brown"), ([bpe.bos, *before], whole[len(before) :])])
    assert found[0] == found[1]


def test_an_encoder_decoder_reads_the_context_in_its_encoder():
    characters = tokenizers.train([TEXT], TokenizerConfig(train="characters"), 48)
    lm = replace(lm_of("encoder-decoder"), tokenizer=characters)
    expected = reference(
        "encoder-decoder", characters.encode_with_special_tokens(["the quick"])[0][0], characters.encode("brown")
    )
    assert_same(log_likelihoods(lm, [("the quick", "brown")]), [expected])


def test_a_long_context_is_truncated_at_its_beginning():
    random = np.random.default_rng(0).integers(4, 30, 100).tolist()
    with pytest.raises(UserError, match=r"pair 0 requires 99 tokens in a row, more than 80; .*too_long='truncate'"):
        log_likelihoods(lm_of("gpt2"), [(random[:90], random[90:])])
    for length in (None, 40):
        cut = random[90 - ((length or 80) + 1 - 10) : 90]
        found = log_likelihoods(lm_of("gpt2"), [(random[:90], random[90:])], length=length, too_long="truncate")
        assert_same(found, [reference("gpt2", cut, random[90:])])
    source, target = random[:90], random[90:]
    found = log_likelihoods(lm_of("encoder-decoder"), [(source, target)], too_long="truncate")
    assert_same(found, [reference("encoder-decoder", source[-80:], target)])
    assert log_likelihoods(lm_of("rotary"), [(source, target)], length=128)[0].tokens == 10  # without limit


# Texts.


def test_perplexity_is_that_of_one_pass_if_the_text_fits():
    lm, ids = lm_of("gpt2"), tokenizer().encode(TEXT)
    expected = reference("gpt2", [tokenizer().bos], ids)
    found = perplexity(lm, TEXT)
    assert found["tokens"] == len(ids) and found["bytes"] == len(TEXT.encode())
    assert found["loss"] == pytest.approx(-expected.log_probability / len(ids), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(-expected.log_probability / math.log(2) / len(TEXT.encode()))
    assert perplexity(lm, [TEXT]) == found
    for length, stride in ((80, 1), (len(ids), 3)):  # one window
        assert perplexity(lm, TEXT, length=length, stride=stride)["loss"] == pytest.approx(found["loss"], rel=1e-5)


def test_bytes_of_a_token_that_is_not_predicted_are_not_counted():
    bare = tokenizer().with_bos(bos=False)
    lm, texts = replace(lm_of("gpt2"), tokenizer=bare), [TEXT, "the quick", "the"]
    found = perplexity(lm, texts)
    encodings = [bare.encode_offsets([text])[0] for text in texts]
    nats = [-reference("gpt2", ids[:1], ids[1:]).log_probability for ids, _ in encodings if len(ids) > 1]
    size = sum(len(text[offsets[0][1] :].encode()) for text, (_, offsets) in zip(texts, encodings))
    assert found["tokens"] == sum(len(ids) - 1 for ids, _ in encodings) and found["bytes"] == size
    assert 0 < size < sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / size, rel=1e-5)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(("length", "stride"), [(None, None), (40, None), (40, 20), (40, 1), (7, 3)])
def test_perplexity_is_the_sum_over_windows(name, length, stride):
    text = TEXT * 3
    ids = [tokenizer().bos, *tokenizer().encode(text)]
    total, T = 0.0, length or 80
    end, counted = min(T, len(ids) - 1), 0
    while counted < len(ids) - 1:
        start = counted if stride in (None, T) else max(0, end - T)
        total += reference(name, ids[start : counted + 1], ids[counted + 1 : end + 1]).log_probability
        counted, end = end, min(end + (stride or T), len(ids) - 1)
    found = perplexity(lm_of(name), text, length=length, stride=stride)
    assert found["tokens"] == len(ids) - 1
    assert found["loss"] == pytest.approx(-total / (len(ids) - 1), rel=1e-5)


def test_windows_are_those_of_a_causal_task():
    from jaxlm.tasks.pretraining import _spans

    for count in range(1, 20):
        for length in range(1, 8):
            for stride in range(1, length + 1):
                windows = list(_windows(count, length, stride))
                assert windows == list(map(tuple, _spans(np.array([0]), np.array([count]), length, stride, 0).tolist()))
                covered = [n for _, counted, end in windows for n in range(counted, end)]
                assert covered == list(range(count))
                assert all(0 <= start <= counted < end <= start + length for start, counted, end in windows)


def test_the_losses_of_texts_add_up_for_each_batch_size():
    lm, texts = lm_of("rotary"), [TEXT * n for n in (1, 3, 2)] + ["fox", "dog jumps"]
    each = [perplexity(lm, text) for text in texts]
    whole = perplexity(lm, texts)
    assert whole["tokens"] == sum(one["tokens"] for one in each) and whole["bytes"] == sum(o["bytes"] for o in each)
    assert whole["loss"] * whole["tokens"] == pytest.approx(sum(o["loss"] * o["tokens"] for o in each), rel=1e-6)
    for batch_tokens in (1, 300, 1 << 12):
        found = perplexity(lm, iter(texts), batch_tokens=batch_tokens)
        assert found == pytest.approx(whole, rel=1e-6)


def test_without_bos_the_first_token_is_not_predicted():
    bare = tokenizers.Tokenizer(tokenizers.train([TEXT], TokenizerConfig(train="characters"), 48).backend, {}, {})
    assert bare.bos is None
    lm, ids = replace(lm_of("gpt2"), tokenizer=bare), bare.encode(TEXT)
    found = perplexity(lm, TEXT)
    assert found["tokens"] == found["bytes"] == len(ids) - 1  # a character is a token
    expected = reference("gpt2", ids[:1], ids[1:])
    assert found["loss"] == pytest.approx(-expected.log_probability / (len(ids) - 1), rel=1e-5)
    assert perplexity(lm, ["f", TEXT])["loss"] == pytest.approx(found["loss"])
    with pytest.raises(UserError, match="no token that could be predicted"):
        perplexity(lm, "f")
    with pytest.raises(UserError, match="pair 0: the context has no tokens and the tokenizer has no BOS"):
        log_likelihoods(lm, [("", "fox")])


# Errors.


@pytest.mark.parametrize(
    ("given", "more", "message"),
    [
        ([("a", "")], {}, "pair 0: the continuation '' has no token"),
        ([("a", "b"), ("a", [])], {}, "pair 1: the continuation"),
        ([([], [5])], {}, "pair 0: the context has no token"),
        (["abc"], {}, "pair 0 is 'abc'; give .context, continuation."),
        ([3], {}, "pair 0 is 3; give .context, continuation."),
        ([([5], [48])], {}, "pair 0 has token 48; ids go from 0 to 47"),
        ([([-1], [4])], {}, "pair 0 has token -1"),
        ([([5], [6])], {"length": 0}, "length is 0; it must be at least 1"),
        ([([5], [6])], {"length": 81}, "length is 81, longer than the 80 positions"),
        ([([5], [6])], {"batch_tokens": 0}, "batch_tokens is 0"),
        ([([5], [6] * 81)], {"too_long": "truncate"}, "pair 0 requires 81 tokens in a row, more than 80; shorten it$"),
    ],
)
def test_pairs_that_have_no_likelihood_are_refused(given, more, message):
    with pytest.raises(UserError, match=message):
        log_likelihoods(lm_of("gpt2"), given, **more)


@pytest.mark.parametrize(
    ("given", "more", "message"),
    [
        ("", {}, "text 0 is ''; give non-empty strings"),
        (["a", ""], {}, "text 1 is ''"),
        (["a", 3], {}, "text 1 is 3"),
        ([], {}, "no token that could be predicted"),
        ("abc", {"stride": 0}, "stride is 0; it must be from 1 to the 80 tokens"),
        ("abc", {"length": 9, "stride": 10}, "stride is 10; it must be from 1 to the 9 tokens"),
    ],
)
def test_texts_that_have_no_perplexity_are_refused(given, more, message):
    with pytest.raises(UserError, match=message):
        perplexity(lm_of("gpt2"), given, **more)


def test_models_that_have_no_likelihood_are_refused():
    config = replace(MODELS["gpt2"], structure="encoder", heads_on_top=("masked_lm",))
    lm = LM(config, Transformer(config), {}, tokenizer())
    with pytest.raises(UserError, match=r"the model is a.n. encoder with the heads: masked_lm;.* require the head lm"):
        log_likelihoods(lm, [("a", "b")])
    with pytest.raises(UserError, match="perplexity requires a decoder"):
        perplexity(lm, "a")
    with pytest.raises(UserError, match=r"perplexity requires a decoder.*see log_likelihoods"):
        perplexity(lm_of("encoder-decoder"), "a")
    with pytest.raises(UserError, match="no tokenizer"):
        perplexity(replace(lm_of("gpt2"), tokenizer=None), "a")
    with pytest.raises(UserError, match="names no start token of its decoder"):
        log_likelihoods(
            replace(lm_of("encoder-decoder"), config=replace(MODELS["encoder-decoder"], start_token=None)), [("a", "b")]
        )
    assert_same(
        log_likelihoods(replace(lm_of("gpt2"), tokenizer=None), pairs(3)), log_likelihoods(lm_of("gpt2"), pairs(3))
    )


# The command line.


def printed_values(capsys) -> dict[str, float]:
    lines = [line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    return {name.strip().replace(" ", "_"): float(value.replace(",", "")) for name, value in lines}


def test_the_command_evaluate_prints_the_perplexity_of_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jaxlm.verbs.machine.configure_process", lambda: None)
    jaxlm.save(lm_of("gpt2"), tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT * 3)
    assert main(["evaluate", str(tmp_path / "model"), str(tmp_path / "text.txt")]) == 0
    lines = [TEXT.rstrip("\n")] * 3  # each line is a document
    assert printed_values(capsys) == pytest.approx(perplexity(lm_of("gpt2"), lines), abs=1e-4)
    more = ["--length", "20", "--task.stride", "5", "--data.documents", "file"]
    assert main(["evaluate", str(tmp_path / "model"), str(tmp_path / "text.txt"), *more]) == 0
    assert printed_values(capsys) == pytest.approx(perplexity(lm_of("gpt2"), TEXT * 3, length=20, stride=5), abs=1e-4)
    assert main(["predict", str(tmp_path / "model"), str(tmp_path / "text.txt")]) == 2
    assert "classes, tokens or span" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("\n")
    assert main(["evaluate", str(tmp_path / "model"), str(tmp_path / "empty.txt")]) == 2
    assert CausalLM().stride == 0  # 0 stands for the whole length


# Equality with transformers.


@pytest.mark.parity
@pytest.mark.parametrize("family", ["GPT2", "Llama", "T5", "Bart"])
def test_likelihoods_are_those_of_transformers(family, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from test_parity import DECODER, FAMILIES, SEQ2SEQ

    base = {"GPT2": FAMILIES["GPT2"][0], "Llama": DECODER, "Bart": SEQ2SEQ}.get(family, FAMILIES[family][0])
    head = {"GPT2": "LMHeadModel", "Llama": "ForCausalLM"}.get(family, "ForConditionalGeneration")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**base)
    model = getattr(transformers, family + head)(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(tmp_path)
    lm = jaxlm.load(tmp_path, compute_dtype="float32")
    random = np.random.default_rng(0)
    given = [(random.integers(3, 41, 7).tolist(), random.integers(3, 41, n).tolist()) for n in (1, 4, 6)]
    for (context, continuation), found in zip(given, log_likelihoods(lm, given)):
        with torch.no_grad():
            if config.is_encoder_decoder:
                tokens = torch.tensor([[model.generation_config.decoder_start_token_id or 0, *continuation[:-1]]])
                logits = model(torch.tensor([context]), decoder_input_ids=tokens).logits[0]
            else:
                logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        log = logits.log_softmax(-1)
        total = log[torch.arange(len(continuation)), torch.tensor(continuation)].sum().item()
        assert found.log_probability == pytest.approx(total, rel=1e-4, abs=1e-4)
        assert found.is_greedy == (log.argmax(-1).tolist() == continuation)


@lru_cache
def masked_lm() -> LM:
    words = tokenizers.train([TEXT * 9], TokenizerConfig(train="wordpiece"), 56)
    config = ModelConfig(**TINY | {"vocabulary": 64}, structure="encoder", heads_on_top=("masked_lm",), types=2)
    return LM(config, Transformer(config), random_params(config), words)


def test_blanks_are_filled_with_the_most_likely_tokens():
    lm = masked_lm()
    found = fill(lm, "the [MASK] fox jumps over a [MASK]", top_k=3)
    ids = [lm.tokenizer.encode(part) for part in ("the", "fox jumps over a")]
    tokens = [lm.tokenizer.cls, *ids[0], lm.tokenizer.mask, *ids[1], lm.tokenizer.mask, lm.tokenizer.sep]
    p_TV = np.asarray(jax.nn.softmax(lm(np.array([tokens])).logits[0, :, : lm.vocabulary]))
    for blank, position in zip(found, (len(ids[0]) + 1, len(tokens) - 2), strict=True):
        best = np.argsort(-p_TV[position])[:3]
        assert [piece for piece, _ in blank] == lm.tokenizer.pieces(best)
        np.testing.assert_allclose([p for _, p in blank], p_TV[position][best], rtol=1e-4)


def test_a_text_without_a_blank_and_a_model_without_a_mask_are_refused():
    with pytest.raises(UserError, match=r"has no \[MASK\]; put one where a word is missing"):
        fill(masked_lm(), "the fox")
    lm = replace(masked_lm(), config=replace(masked_lm().config, heads_on_top=("classes",)))
    with pytest.raises(UserError, match="fill requires the head masked_lm, the model has classes"):
        fill(lm, "the [MASK]")
