"""Generation equals what the model says without a cache, draws and stops as it should; LM round trips."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import lru_cache, partial

import jax
import numpy as np
import pytest
from compiled import jit, random_params

import jaxlm
from jaxlm.config import ModelConfig, TokenizerConfig
from jaxlm.data import tokenizer as tokenizers
from jaxlm.decode import Rules, choose, draw
from jaxlm.errors import UserError
from jaxlm.families import PRESETS
from jaxlm.generate import generate
from jaxlm.hub import convert
from jaxlm.lm import LM, load, save
from jaxlm.nn.transformer import Transformer, apply

TINY = {"vocabulary": 48, "width": 16, "layers": 2, "heads": 2, "max_length": 32}
MODELS = {
    "gpt2": ModelConfig(**TINY),  # fewer positions than the rounded lengths of prompt and cache
    "rotary": ModelConfig(
        **TINY, positions="rotary", kv_heads=1, norm="rmsnorm", gated=True, biases=(), tied_embeddings=False
    ),
}
TEXT = "the quick brown fox jumps over a lazy dog\n"
NEW = 12


@pytest.fixture(autouse=True)
def fast_compiles(monkeypatch):
    monkeypatch.setattr(jax, "jit", jit)


@lru_cache
def tokenizer():
    return tokenizers.train([TEXT], TokenizerConfig(train="characters"), 48)


@lru_cache
def lm_of(name: str) -> LM:
    return LM(MODELS[name], Transformer(MODELS[name]), random_params(MODELS[name], std=0.5), tokenizer())


def prompts() -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(0, tokenizer().size, n).tolist() for n in (3, 9, 32 - NEW)]


@lru_cache
def forward(name: str):
    module = Transformer(MODELS[name])
    return jit(lambda params, tokens: apply(module, params, apply(module, params, tokens), method="lm"))


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


def continued(name: str, given, **choices):
    choices = {"max_new_tokens": NEW, "stop_tokens": (), "return_tokens": True} | choices
    return generate(lm_of(name), given, **choices)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_the_likeliest_token_of_a_full_forward_pass(name):
    """Also where prompt and continuation fill the last position that there is."""
    expected = uncached_greedy(name)
    assert len({tuple(row) for row in expected}) == 3
    assert max(len(set(row)) for row in expected) > 3
    assert continued(name, prompts(), temperature=0) == expected
    for prompt, row in zip(prompts(), expected):  # alone as among others
        assert continued(name, [prompt], temperature=0) == [row]
    assert continued(name, prompts(), temperature=0, max_new_tokens=5) == [row[:5] for row in expected]


def test_the_likeliest_alone_are_greedy():
    expected = uncached_greedy("gpt2")
    assert continued("gpt2", prompts(), top_k=1) == expected
    assert continued("gpt2", prompts(), top_p=1e-6) == expected
    assert continued("gpt2", prompts(), temperature=1e-4) == expected


def test_a_seed_gives_the_same_again_and_mates_do_not_matter():
    a, b, c = prompts()
    first = continued("gpt2", [a, b, c], seed=1)
    assert continued("gpt2", [a, b, c], seed=1) == first
    assert continued("gpt2", [a, b, c], seed=2) != first
    assert continued("gpt2", [a, c, b], seed=1)[0] == first[0]
    assert continued("gpt2", [a], seed=1) == first[:1]
    same = continued("gpt2", [a, a, a], seed=1)
    assert same[0] == first[0]
    assert len({tuple(row) for row in same}) == 3  # the same prompt twice is continued in two ways


def test_ids_beyond_the_tokenizer_are_never_drawn():
    assert tokenizer().size < 48
    for seed in range(3):
        rows = continued("gpt2", prompts(), temperature=100.0, seed=seed)
        assert max(max(row) for row in rows) < tokenizer().size
    rows = continued("gpt2", prompts(), temperature=100.0, top_k=48)
    assert max(max(row) for row in rows) < tokenizer().size


LOGITS = np.log(np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04]))
PICKS = {  # choices -> the probabilities that they leave
    "plain": ({}, [0.4, 0.25, 0.15, 0.1, 0.06, 0.04]),
    "hot": ({"temperature": 2.0}, np.sqrt([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])),
    "cold": ({"temperature": 0.5}, np.square([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])),
    "top 3": ({"top_k": 3}, [0.4, 0.25, 0.15, 0, 0, 0]),
    "top 9 is all": ({"top_k": 9}, [0.4, 0.25, 0.15, 0.1, 0.06, 0.04]),
    "0.7 needs three": ({"top_p": 0.7}, [0.4, 0.25, 0.15, 0, 0, 0]),
    "0.64 needs two": ({"top_p": 0.64}, [0.4, 0.25, 0, 0, 0, 0]),
    "all but rounding": ({"top_p": 1.0}, [0.4, 0.25, 0.15, 0.1, 0.06, 0.04]),
    "a fifth of the likeliest": ({"min_p": 0.2}, [0.4, 0.25, 0.15, 0.1, 0, 0]),
    "no filter": ({"top_k": None, "top_p": None, "min_p": None}, [0.4, 0.25, 0.15, 0.1, 0.06, 0.04]),
    # Of the two likeliest (8/13, 5/13) the first reaches 0.6.
    "both": ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0, 0, 0]),
    # Squared and normalised the first two have 0.6 and 0.23: 0.7 needs both.
    # The two that top-p leaves have 0.4 and 0.25: both are at least half as likely as the first.
    "all three": ({"top_k": 4, "top_p": 0.7, "min_p": 0.5}, [0.4, 0.25, 0, 0, 0, 0]),
    "cold and 0.7": ({"temperature": 0.5, "top_p": 0.7}, [0.16, 0.0625, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("name", PICKS)
def test_draws_follow_the_probabilities(name):
    choices, left = PICKS[name]
    rules = Rules(6, np.array([], np.int32), **{"temperature": 1.0, "top_k": 6, "top_p": 1.0, "min_p": 0.0} | choices)
    order = np.array([3, 0, 5, 1, 4, 2])  # the likeliest is not the first
    n = 20_000

    def draw(key):
        logits_BV = jax.numpy.broadcast_to(jax.numpy.asarray(LOGITS[order], np.float32), (n, 6))
        return choose(logits_BV, jax.random.uniform(key, n), rules)

    counts = np.bincount(np.asarray(jit(draw)(jax.random.key(0))), minlength=6)
    expected = n * (np.array(left) / np.sum(left))[order]
    kept = expected > 0
    assert not counts[~kept].any()
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert chi_square < kept.sum() + 5 * np.sqrt(2 * kept.sum())


def test_draws_from_a_large_vocabulary_follow_the_probabilities():
    """Also from several blocks of tokens, some of which have no weight."""
    random = np.random.default_rng(0)
    p = random.exponential(size=1000) * (np.arange(1000) % 384 < 200)
    n = 200_000
    one = jit(lambda u: jax.vmap(lambda u: draw(jax.numpy.asarray(p, np.float32)[None], u[None])[0])(u))
    counts = np.bincount(np.asarray(one(random.random(n, np.float32))), minlength=1000)
    expected = n * p / p.sum()
    assert not counts[p == 0].any()
    chi_square = ((counts - expected)[p > 0] ** 2 / expected[p > 0]).sum()
    free = (p > 0).sum() - 1
    assert abs(chi_square - free) < 5 * np.sqrt(2 * free)


def test_a_continuation_ends_before_the_first_stop_token():
    expected = uncached_greedy("gpt2")
    before = lambda row, stops: row[: next((n for n, token in enumerate(row) if token in stops), NEW)]
    late = next(token for token in expected[1] if token != expected[1][0])
    for stops in ([late], [late, expected[0][0]], {expected[2][-1]}):
        found = continued("gpt2", prompts(), temperature=0, stop_tokens=stops)
        assert found == [before(row, stops) for row in expected]
    # None is the tokenizer's end token, () is none at all.
    lm = replace(lm_of("gpt2"), tokenizer=copy.copy(tokenizer()))
    lm.tokenizer.eos = late
    greedy = partial(generate, lm, prompts(), max_new_tokens=NEW, temperature=0, return_tokens=True)
    assert greedy() == [before(row, [late]) for row in expected]
    assert len(greedy()[1]) < NEW
    assert greedy(stop_tokens=()) == expected
    lm.tokenizer.eos = None
    assert greedy() == expected


def test_strings_begin_with_bos_and_ids_are_used_as_given():
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


MISTAKES = {
    "one string": (lambda lm: generate(lm, "the", max_new_tokens=1), "prompts is one string; give a list"),
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
        "prompt of 21 tokens and 12 new ones exceed the model's 32 positions; .* at most 11, or .* 'truncate'",
    ),
    "too long": (lambda lm: generate(lm, [[1] * 40], max_new_tokens=1), "exceed .* at most 0"),
    "no room": (lambda lm: generate(lm, [[1]], max_new_tokens=32), "max_new_tokens is 32; .* at most 31"),
    "unknown": (lambda lm: generate(lm, [[1]], max_tokens=3), "'max_tokens' is no choice .* 'max_new_tokens'"),
    "kind": (lambda lm: generate(lm, [[1]], top_k="5"), "top_k is '5'; it must be int"),
    "min_p": (lambda lm: generate(lm, [[1]], min_p=1.0), "min_p is 1.0; it must be at least 0 and below 1"),
    "least": (lambda lm: generate(lm, [[1]], min_new_tokens=9, max_new_tokens=8), "min_new_tokens is 9; .* from 0"),
    "beams": (lambda lm: generate(lm, [[1]], beams=33), "beams is 33, more than the 32 tokens"),
    "no beams": (lambda lm: generate(lm, [[1]], beams=0), "beams is 0; it must be at least 1"),
    "beams that draw": (lambda lm: generate(lm, [[1]], beams=2, top_p=0.5), "top_p is 0.5, but a beam search draws"),
    "n_best of beams": (lambda lm: generate(lm, [[1]], beams=2, n_best=3), "n_best is 3, of 2 beams"),
    "n_best of one": (lambda lm: generate(lm, [[1]], temperature=0.0, n_best=3), "n_best is 3, but greedy texts"),
    "empty stop": (lambda lm: generate(lm, [[1]], stop=("",)), "stop or forbidden has an empty text"),
    "no head": (
        lambda lm: generate(replace(lm, config=replace(lm.config, heads_on_top=())), [[1]]),
        "cannot generate; it takes .* the head 'lm'",
    ),
    "stop without a tokenizer": (
        lambda lm: generate(replace(lm, tokenizer=None), [[1]], stop=("a",), return_tokens=True),
        "no tokenizer, which stop and forbidden are read by; give stop_tokens",
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
        "encoder with heads .* cannot generate; it takes a decoder or an encoder-decoder",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_said(name):
    call, message = MISTAKES[name]
    with pytest.raises(UserError, match=message):
        call(lm_of("gpt2"))


def test_without_a_tokenizer_ids_give_ids():
    found = generate(
        replace(lm_of("gpt2"), tokenizer=None), prompts(), max_new_tokens=NEW, temperature=0, return_tokens=True
    )
    assert [len(row) for row in found] == [NEW] * 3


# LM: from a folder, to a folder.

SAVED = {
    "gpt2": replace(MODELS["gpt2"], mlp_width=64),
    "llama": replace(MODELS["rotary"], mlp_width=32, head_width=8, activation="silu"),
    "jaxlm": replace(MODELS["rotary"], norm="layernorm"),
    "bert": replace(PRESETS["bert-tiny"], vocabulary=48, max_length=32, width=16, heads=2, mlp_width=64),
}


@pytest.mark.parametrize("kind", SAVED)
def test_a_saved_model_is_loaded_as_it_was(tmp_path, kind):
    model = SAVED[kind]
    lm = LM(model, Transformer(model), random_params(model), tokenizer())
    assert save(lm, tmp_path / "model") == kind
    again = load(tmp_path / "model")
    assert convert.seen(again.config) == convert.seen(model)
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)
    tokens = np.array(prompts()[1])[None] % 48
    a, b = lm(tokens), again(tokens)
    np.testing.assert_array_equal(a.logits, b.logits)
    np.testing.assert_array_equal(a.hidden_BTD, b.hidden_BTD)
    assert again.tokenizer.encode(TEXT) == tokenizer().encode(TEXT)
    assert (again.tokenizer.bos, again.tokenizer.eos) == (tokenizer().bos, tokenizer().eos)
    assert again.vocabulary == lm.vocabulary == tokenizer().size
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model"]  # nothing half made is left beside it
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


def test_bfloat16_is_a_choice_when_loading(tmp_path):
    save(lm_of("gpt2"), tmp_path / "model")
    lm = load(tmp_path / "model", compute_dtype="bfloat16")
    output = lm(np.array(prompts()[0])[None])
    assert output.hidden_BTD.dtype == jax.numpy.bfloat16
    assert output.logits.dtype == np.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(lm.params)} == {np.dtype("float32")}


ODD = {
    "missing": (lambda folder: folder / "nowhere", "is no folder, and cannot be the name of a model of the hub"),
    "a file": (lambda folder: folder / "file", "is a file; give the folder that holds it"),
    "empty": (lambda folder: folder / "empty", "has no config.json"),
    "no JSON": (lambda folder: folder / "no_json", "config.json is not JSON"),
    "a list": (lambda folder: folder / "list", "config.json holds a list, not an object"),
    "unknown": (lambda folder: folder / "unknown", "model_type 'gtp2', unknown; perhaps you meant 'gpt2'"),
    "no weights": (lambda folder: folder / "no_weights", "safetensors"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_folders_are_refused(tmp_path, name):
    (tmp_path / "file").touch()
    gpt2 = json.dumps({"model_type": "gpt2"})
    (tmp_path / "empty").mkdir()
    texts = {"no_json": "{", "list": "[1]", "unknown": '{"model_type": "gtp2"}', "no_weights": gpt2}
    for folder, text in texts.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(text)
    (tmp_path / "unknown" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    path, message = ODD[name]
    with pytest.raises(UserError, match=message):
        load(path(tmp_path))


def test_the_public_face():
    assert set(jaxlm.__all__) <= set(dir(jaxlm))
    assert jaxlm.load is load
    assert jaxlm.generate is generate
