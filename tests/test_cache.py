"""Keys and values that generation stores as int8: error bounds, every kind of cache, memory, and mistakes."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm import Decoding, MeshConfig, ModelConfig
from jaxlm.__main__ import main
from jaxlm.config import Seq2Seq, TokenizerConfig
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.devices import sharding
from jaxlm.errors import UserError
from jaxlm.families import PRESETS
from jaxlm.inference import decode
from jaxlm.lm import LM, with_params
from jaxlm.nn import cache as caches
from jaxlm.nn import parameters
from jaxlm.nn.attention import Attention, AttentionInputs
from jaxlm.nn.block import MIXERS
from jaxlm.nn.cache import Cache
from jaxlm.nn.dot_product import Scores, dot_product_attention
from jaxlm.nn.dot_product import attend as attend_to_cache
from jaxlm.nn.positions import RotaryAngles
from jaxlm.nn.stack import CacheSpec
from jaxlm.nn.transformer import Transformer, apply, unstack_layers

TINY = {"vocabulary": 32, "width": 16, "layers": 2, "heads": 4, "max_length": 64, "mlp_width": 24}
ROTARY = TINY | {"positions": "rotary", "kv_heads": 2, "norm": "rmsnorm", "feed_forward": "gated", "biases": ()}
SEQ2SEQ = TINY | {"heads": 2, "start_token": 1}
LONG = {"rotary_length": 6, "rotary_short": (1.0, 1.2), "rotary_long": (2.0, 5.0), "rotary_attention": 1.2}
MODELS = {
    "grouped": ModelConfig(**ROTARY),
    "ring": ModelConfig(**ROTARY, layer_kinds=("local", "global"), window=5),
    "longrope": ModelConfig(**ROTARY, rotary_scaling="longrope", **LONG),
    "normed keys": ModelConfig(**ROTARY, query_key_norm=True),
    "prefix": ModelConfig(**TINY, prefix_lm=True),
    "t5": replace(PRESETS["t5-small"], **SEQ2SEQ, head_width=8, relative_buckets=8, relative_distance=12),
    "bart": replace(PRESETS["bart-base"], **SEQ2SEQ, tied_embeddings=False),
}
LONG_ONLY = ("normed keys", "prefix", "bart")  # tests of these models are marked long
NAMES = [pytest.param(name, marks=pytest.mark.long if name in LONG_ONLY else ()) for name in MODELS]
PROMPTS = [[5, 6, 7], [9] * 11, [8, 3, 2, 30, 31]]
NEW = 14


STD = {"t5": 0.6, "bart": 0.1, "normed keys": 0.25}  # of the parameters; 0.4 for the others. Texts differ


@lru_cache
def lm_of(name: str, std: float | None = None) -> LM:
    return LM(MODELS[name], Transformer(MODELS[name]), random_params(MODELS[name], std or STD.get(name, 0.4)))


def generate(name: str, lm: LM | None = None, prompts=PROMPTS, **choices):
    choices = {"max_new_tokens": NEW, "temperature": 0, "stop_tokens": (), "return_tokens": True} | choices
    return jaxlm.generate(lm or lm_of(name), prompts, **choices)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def dequantize(cache: Cache) -> Cache:
    """Returns the same cache in float32."""
    return Cache(cache.k_BKSC * cache.k_scales_BKS[..., None], cache.v_BKSC * cache.v_scales_BKS[..., None])


# The stored values.


def test_each_entry_has_an_error_of_at_most_half_a_step():
    k_BSKC = normal(0, 2, 5, 3, 8) * np.exp(3 * normal(1, 2, 5, 3, 1))
    k_BSKC[0, 0] = 0
    cache = caches.create(k_BSKC, -k_BSKC, "int8")
    assert cache.k_BKSC.dtype == cache.v_BKSC.dtype == jnp.int8
    assert cache.k_scales_BKS.shape == cache.v_scales_BKS.shape == (2, 3, 5)
    largest = np.abs(k_BSKC).max(-1, keepdims=True)
    for stored_BKSC, x_BSKC in zip(dequantize(cache), (k_BSKC, -k_BSKC)):
        errors = np.abs(np.asarray(stored_BKSC).swapaxes(1, 2) - x_BSKC)
        assert (errors <= largest * (1 + 1e-5) / 254).all()
    assert np.abs(cache.k_BKSC).max(-1)[1:].min() == 127  # every head uses the whole range


@pytest.mark.parametrize("format", ["compute", "int8"])
def test_writing_equals_creating_and_replaces_only_its_slots(format):
    """Slot p mod S of each row gets position p."""
    k_BTKC, v_BTKC = jnp.array(normal(0, 2, 6, 3, 8)), jnp.array(normal(1, 2, 6, 3, 8))
    cache = caches.create(k_BTKC[:, :4], v_BTKC[:, :4], format)
    written = cache.write(k_BTKC[:, 4:], v_BTKC[:, 4:], np.array([[4, 5], [5, 6]]))
    order = np.array([[4, 5, 2, 3], [0, 4, 5, 3]])[..., None, None]
    expected = caches.create(*(np.take_along_axis(x, order, 1) for x in (k_BTKC, v_BTKC)), format)
    jax.tree.map(np.testing.assert_array_equal, written, expected)
    assert cache.slots == written.slots == 4 and written.format == format
    longer = cache.extend(7)
    assert longer.slots == 7 and longer.format == format
    assert all((np.asarray(leaf)[:, :, 4:] == 0).all() for leaf in longer if leaf is not None)
    np.testing.assert_array_equal(longer.k_BKSC[:, :, :4], cache.k_BKSC)


# Attention.


def attend(cache: Cache, q_BTHC, scores=None, dtype=np.float32):
    mask_BTS = np.ones((1, q_BTHC.shape[1], cache.slots), bool)
    return np.asarray(
        attend_to_cache(jnp.asarray(q_BTHC, dtype), cache, mask_BTS, scores or Scores(0.3), lambda x: x)[0]
    )


def test_scales_outside_the_products_equal_dequantised_keys_and_values():
    """The scales of keys multiply the scores, also before a soft cap, and those of values multiply the weights."""
    q_BTHC, k_BSKC, v_BSKC = normal(0, 2, 3, 4, 8), normal(1, 2, 9, 2, 8), 5 * normal(2, 2, 9, 2, 8)
    cache = caches.create(k_BSKC, v_BSKC, "int8")
    for scores in (Scores(0.3), Scores(1.0, cap=2.0), Scores(0.3, bias_BHTS=normal(3, 1, 4, 3, 9))):
        found = attend(cache, q_BTHC, scores)
        np.testing.assert_allclose(found, attend(dequantize(cache), q_BTHC, scores), atol=1e-5)
    rounded = attend(cache, q_BTHC, dtype=jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(np.float32), attend(cache, q_BTHC), atol=0.2)


@pytest.mark.parametrize("size", [0.3, 1.0, 4.0])
def test_the_error_of_attention_is_within_the_bound_of_the_rounding(size):
    """A score changes by at most e = scale |q|_1 max|k| / 254, so a weight by a factor of at most exp(2 e)."""
    scale, q_BTHC = 0.3, size * normal(0, 2, 3, 4, 8)
    k_BSKC, v_BSKC = normal(1, 2, 9, 2, 8), normal(2, 2, 9, 2, 8)
    mask_BTS = np.ones((1, 3, 9), bool)
    exact = np.asarray(dot_product_attention(q_BTHC, k_BSKC, v_BSKC, mask_BTS, Scores(scale)))
    error = np.abs(attend(caches.create(k_BSKC, v_BSKC, "int8"), q_BTHC) - exact).max()
    score_error = scale * np.abs(q_BTHC).sum(-1).max() * np.abs(k_BSKC).max() / 254
    bound = (np.exp(2 * score_error) - 1) * np.abs(v_BSKC).max() + np.abs(v_BSKC).max() / 254
    assert 1e-5 < error < bound


def test_keys_that_are_rotated_when_they_are_read_keep_their_scales():
    k_BSKC, angles_S = normal(1, 2, 9, 2, 8), normal(2, 1, 9, 1, 4)
    inputs = AttentionInputs(np.ones(1), cache_rotary=RotaryAngles(np.sin(angles_S), np.cos(angles_S)))
    cache = caches.create(k_BSKC, k_BSKC, "int8")
    rotate = jaxlm.nn.attention._rotate_cache
    found, expected = rotate(cache, inputs, jnp.float32), rotate(dequantize(cache), inputs, jnp.float32)
    np.testing.assert_allclose(found.k_BKSC * found.k_scales_BKS[..., None], expected.k_BKSC, atol=1e-5)
    np.testing.assert_array_equal(found.v_BKSC, cache.v_BKSC)


# Models.


@lru_cache
def last_states(name: str, format: str, at_once: int = 1) -> tuple[np.ndarray, object]:
    """Returns the hidden states of tokens after a prompt of 4 tokens [B, T, D], and the caches."""
    model, params = MODELS[name], lm_of(name, 0.2).params
    module = Transformer(model)
    tokens_BT = np.random.default_rng(0).integers(1, 32, (2, 16))
    context = ()
    if model.structure == "encoder_decoder":
        context = (jax.jit(partial(apply, module, method="encode"))(params, tokens_BT),)
    spec = CacheSpec(jnp.array([4, 4]), 16, at_once, format)
    fill = lambda params, tokens_BT, *context: apply(module, params, tokens_BT, spec, *context, method="prefill")
    _, state = jax.jit(fill)(params, tokens_BT[:, :4], *context)
    read = jax.jit(partial(apply, module, method="decode_cached"))
    states = []
    for n in range(4, 16, at_once):
        at_BT = np.broadcast_to(np.arange(n, n + at_once), (2, at_once))
        x_BTD, state = read(params, tokens_BT[:, n : n + at_once], at_BT, state)
        states.append(np.asarray(x_BTD))
    return np.concatenate(states, 1), state


@pytest.mark.parametrize("name", NAMES)
def test_states_differ_from_those_of_a_float_cache_by_little_but_not_nothing(name):
    """Each entry has a relative error of at most 1 / 254, and rounding errors of entries are independent."""
    exact, state = last_states(name, "compute")
    found, rounded = last_states(name, "int8")
    assert 1e-6 < np.sqrt(np.square(found - exact).mean() / np.square(exact).mean()) < 2 / 254
    own = [cache.slots for cache in rounded.own]
    assert own == [cache.slots for cache in state.own] == ([5, 16] if name == "ring" else [16, 16])
    for cache in (*rounded.own, *(rounded.cross or ())):
        assert cache.format == "int8" and cache.k_BKSC.dtype == cache.v_BKSC.dtype == jnp.int8
    assert (rounded.cross is None) == (MODELS[name].structure == "decoder")


@pytest.mark.parametrize("name", ["ring", pytest.param("t5", marks=pytest.mark.long)])
def test_several_tokens_at_once_have_the_same_int8_cache_as_one_at_a_time(name):
    one, _ = last_states(name, "int8")
    three, _ = last_states(name, "int8", 3)
    np.testing.assert_allclose(three, one, atol=2e-3 * np.abs(one).max())  # a state near a tie rounds up or down


@pytest.mark.parametrize("name", NAMES)
def test_greedy_texts_equal_those_of_the_float_cache(name):
    """The weights are large, so that the most likely tokens are well separated."""
    expected = generate(name)
    assert len({tuple(row) for row in expected}) > 1
    assert generate(name, cache="int8") == expected
    assert generate(name, decoding=Decoding(cache="int8")) == expected


@pytest.mark.parametrize(("name", "n_best"), [("ring", 3), pytest.param("t5", 1, marks=pytest.mark.long)])
def test_beams_equal_those_of_the_float_cache(name, n_best):
    """A step moves the scales of a beam together with its integers. Later beams of T5 have near ties."""
    expected = generate(name, beams=3, n_best=n_best)
    assert generate(name, beams=3, n_best=n_best, cache="int8") == expected


def test_a_sample_depends_only_on_its_prompt_and_a_draft_changes_no_greedy_text():
    sample = partial(generate, "ring", temperature=0.7, top_k=3, seed=2, cache="int8")
    assert sample(prompts=PROMPTS[:1]) == sample()[:1]
    assert generate("ring", top_k=1, temperature=1.0, cache="int8") == generate("ring", cache="int8")
    assert generate("ring", cache="int8", draft=lm_of("ring", 0.3)) == generate("ring", cache="int8")


@pytest.mark.long
def test_rows_are_replaced_and_caches_grow(monkeypatch):
    monkeypatch.setattr(jaxlm.inference.generate, "MAX_ROWS", 2)
    monkeypatch.setattr(jaxlm.inference.generate, "MIN_ROOM", 32)
    expected = generate("ring", max_new_tokens=40)
    assert generate("ring", max_new_tokens=40, cache="int8") == expected


def test_a_mesh_shards_scales_like_their_heads():
    lm = lm_of("grouped")
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])

    def put(key_path, leaf):
        path = parameters.path_of(key_path)
        return jax.device_put(leaf, sharding.sharding(mesh, parameters.find(path).axes, leaf.shape, path))

    split = with_params(lm, jax.tree_util.tree_map_with_path(put, lm.params))
    assert generate("grouped", split, cache="int8") == generate("grouped", cache="int8")


# Memory.


def test_an_int8_cache_has_half_the_memory_of_bfloat16_and_the_loop_keeps_it():
    """With heads of 64 entries: 64 bytes and a scale of 4, instead of 128."""
    model = ModelConfig(**TINY | {"layers": 1, "heads": 1, "head_width": 64, "max_length": 2048})
    module = Transformer(model, dtype=jnp.bfloat16)
    params = jax.eval_shape(lambda: random_params(model))
    prompts = decode.Prompts(*(jax.ShapeDtypeStruct((4, *s), jnp.int32) for s in ((8,), (), ())), 0, np.zeros((4, 2)))
    rules = decode.Rules(np.int32(32), np.array([2], np.int32))
    run, sizes = decode.programs(module), {}
    for format in ("compute", "int8"):
        state = jax.eval_shape(partial(decode.prefill, module, length=2048, cache=format), params, prompts)
        sizes[format] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.caches))
    assert sizes["compute"] == 2 * 4 * 2048 * 128 and sizes["int8"] == 2 * 4 * 2048 * (64 + 4)
    compiled = run.advance.lower(params, state, rules, np.int32(3)).compile().memory_analysis()
    assert compiled.alias_size_in_bytes >= sizes["int8"]  # written in place


@pytest.mark.long
def test_the_loop_does_not_convert_the_cache_of_a_context_before_it_starts():
    """Otherwise the floats, which are larger than the cache, are in memory during the whole loop."""
    model = MODELS["t5"]
    module, row = Transformer(model), lambda *shape: jax.ShapeDtypeStruct((3, *shape), jnp.int32)
    params = jax.eval_shape(lambda: unstack_layers(model, jax.tree.map(jnp.asarray, random_params(model))))
    prompts = decode.Prompts(row(1), row(), row(), np.uint32(0), row(2), row(80), row(80))
    state = jax.eval_shape(partial(decode.prefill, module, length=16, cache="int8"), params, prompts)
    rules = decode.Rules(np.int32(32), np.array([2], np.int32))
    text = decode.programs(module).advance.lower(params, state, rules, np.int32(9)).compile().as_text()
    assert "s8[3,2,80,8]" in text and "f32[3,2,80,8]" in text
    assert "f32[3,2,80,8]" not in text[text.index("\nENTRY") :]


# Interfaces and mistakes.


def test_tasks_refuse_other_formats():
    Seq2Seq(decoding=Decoding(cache="int8")).check()
    with pytest.raises(UserError, match=r"task.decoding.cache is 'int4'; it must be"):
        Seq2Seq(decoding=Decoding(cache="int4")).check()  # type: ignore[arg-type]


def test_the_command_accepts_the_format(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = tokenizers.train(["abcdefgh "], TokenizerConfig(train="characters"), 32, add_bos=True)
    jaxlm.save(replace(lm_of("grouped"), tokenizer=tokenizer), "model")
    words = ["generate", "model", "--prompt", "abc", "--max-new-tokens", "5", "--temperature", "0"]
    assert main([*words]) == 0
    expected = capsys.readouterr().out
    assert main([*words, "--cache", "int8"]) == 0
    assert capsys.readouterr().out == expected
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--cache", "int4"])
    assert "int8" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["int4", "Int8", "", None, 8, True, "float32"])
def test_other_formats_are_refused(value):
    with pytest.raises(UserError, match=r"cache is .*; it must be"):
        generate("grouped", cache=value)


class Sum(nn.Module):
    """A mixer without a cache."""

    config: ModelConfig
    constrain: object
    dtype: object = jnp.float32
    kernel: str = "auto"

    @nn.compact
    def __call__(self, x_BTD, layer, inputs, positions_BT, context=None, cache=None, weights=False):
        return jnp.einsum("BTS,BSD->BTD", inputs.mask_BTS / 4.0, x_BTD), None, None


class Floats(Attention):
    """A mixer that stores floats, whatever format is requested."""

    def __call__(self, x_BTD, layer, inputs, *others, **named):
        return super().__call__(x_BTD, layer, inputs._replace(cache_format="compute"), *others, **named)


class Same(Attention):
    """A mixer that supports all formats."""


@pytest.mark.parametrize(
    ("mixer", "choices", "message"),
    [
        (Sum, {}, "model.mixer is 'own', which returns no cache"),
        (Sum, {"cache": "int8"}, "model.mixer is 'own', which returns no cache"),
        (Floats, {"cache": "int8"}, "cache is 'int8', but model.mixer is 'own', which stores .* 'compute'"),
    ],
)
def test_a_mixer_without_a_cache_of_the_format_is_refused(monkeypatch, mixer, choices, message):
    monkeypatch.setitem(MIXERS, "own", mixer)
    lm = lm_of("grouped")
    model = replace(lm.config, mixer="own")
    with pytest.raises(UserError, match=message):
        generate("grouped", LM(model, Transformer(model), lm.params), **choices)


def test_a_mixer_that_derives_from_attention_has_both_formats(monkeypatch):
    monkeypatch.setitem(MIXERS, "own", Same)
    lm = lm_of("grouped")
    model = replace(lm.config, mixer="own")
    assert generate("grouped", LM(model, Transformer(model), lm.params), cache="int8") == generate("grouped")
