"""Latent attention and the routers of DeepSeek-V2 and V3."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm import UserError, families
from jaxlm.families import FAMILIES, PRESETS
from jaxlm.hub import safetensors
from jaxlm.nn import flops
from jaxlm.nn.experts import route
from jaxlm.nn.stack import CacheSpec
from jaxlm.nn.transformer import Transformer, apply, init

SMALL = dataclasses.replace(
    PRESETS["deepseek-v2-lite"], layers=2, width=16, mlp_width=20, heads=2, vocabulary=24, head_width=10,
    value_width=6, rotary_width=4, key_value_rank=12, experts=4, experts_per_token=2, expert_width=8,
    shared_expert_width=8, feed_forwards=("gated", "experts"), attention_scale=None,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 24, (2, 9))


def cached_states(format: str) -> tuple[Any, jax.Array]:
    """Returns the caches after 8 tokens, and the hidden states of the ninth, computed from them."""
    module = Transformer(SMALL)
    spec = CacheSpec(jnp.full(2, 8), 12, format=format)
    fill = jax.jit(lambda params: apply(module, params, TOKENS[:, :8], spec, method="prefill")[1])
    last = lambda *inputs: apply(module, params, TOKENS[:, 8:], np.full((2, 1), 8), *inputs, method="decode_cached")
    params = random_params(SMALL)
    caches = fill(params)
    return caches, jax.jit(last)(caches)[0]


def test_the_cache_is_one_latent_vector_and_one_key_for_all_heads():
    caches, states = cached_states("compute")
    for cache in caches.own:
        assert cache.k_BKSC.shape == (2, 1, 12, 4) and cache.v_BKSC.shape == (2, 1, 12, 12)
    whole = jax.jit(partial(apply, Transformer(SMALL)))(random_params(SMALL), TOKENS)
    np.testing.assert_allclose(states[:, 0], whole[:, 8], atol=2e-5)


@pytest.mark.long
def test_an_8_bit_cache_has_small_errors():
    _, exact = cached_states("compute")
    caches, rounded = cached_states("int8")
    assert caches.own[0].v_BKSC.dtype == jnp.int8
    assert 0 < np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()


def test_flops_are_those_of_the_traced_products():
    dense = dataclasses.replace(SMALL, feed_forward="gated", feed_forwards=(), experts=0, expert_width=None,
                                shared_expert_width=0, query_rank=8)  # fmt: skip
    shapes = jax.eval_shape(lambda: init(Transformer(dense), jax.random.key(0)))
    traced = flops.count(jax.make_jaxpr(partial(apply, Transformer(dense)))(shapes, TOKENS))
    assert traced == flops.model_flops(dense, 2, 9, heads={}).total


def choose(logits: np.ndarray, **fields: Any) -> tuple[np.ndarray, np.ndarray]:
    model = dataclasses.replace(SMALL, experts=8, experts_per_token=3, expert_groups=4, **fields)
    correction = None if not model.router_correction else jnp.asarray(np.linspace(0.5, -0.5, 8))
    routing = route(jnp.asarray(logits), np.ones(logits.shape[:2], bool), model, correction)
    return np.asarray(routing.ids_BTk), np.asarray(routing.weights_BTk)


@pytest.mark.parametrize("groups", [2, 4])
def test_experts_are_chosen_from_the_best_groups(groups):
    logits = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    ids, weights = choose(logits, expert_groups_per_token=groups, expert_scale=3.0)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    corrected, corrected_weights = choose(
        logits, expert_groups_per_token=groups, router_scores="sigmoid", router_correction=True, normalize_experts=True
    )
    sigmoids = 1 / (1 + np.exp(-logits))
    for b, t in np.ndindex(2, 5):
        best = np.argsort(-probabilities[b, t].reshape(4, 2).max(-1))[:groups]
        allowed = [n for n in range(8) if n // 2 in best]
        expected = sorted(allowed, key=lambda n: -probabilities[b, t, n])[:3]
        assert list(ids[b, t]) == expected
        np.testing.assert_allclose(weights[b, t], 3 * probabilities[b, t, expected], rtol=1e-5)
        compared = sigmoids[b, t] + np.linspace(0.5, -0.5, 8)
        best = np.argsort(-compared.reshape(4, 2).sum(-1))[:groups]
        expected = sorted([n for n in range(8) if n // 2 in best], key=lambda n: -compared[n])[:3]
        assert list(corrected[b, t]) == expected
        own = sigmoids[b, t, expected]
        np.testing.assert_allclose(corrected_weights[b, t], own / own.sum(), rtol=1e-5)


def test_the_predictor_of_further_tokens_is_kept_but_not_used(tmp_path):
    config = dataclasses.replace(
        SMALL, router_scores="sigmoid", router_correction=True, normalize_experts=True, query_rank=8, expert_groups=2
    )
    families.save(config, random_params(config), tmp_path / "model")
    tensors = {name: np.asarray(x) for name, x in safetensors.read(tmp_path / "model").items()}
    more = {"model.layers.61.eh_proj.weight": np.ones((2, 3), np.float32)}
    safetensors.write(tensors | more, tmp_path / "model" / safetensors.WEIGHTS)
    messages: list[str] = []
    lm = jaxlm.load(tmp_path / "model", log=messages.append)
    assert any("multi-token prediction" in message for message in messages), messages
    assert lm.config.router_correction and lm.config.feed_forwards == ("gated", "experts")
    jaxlm.save(lm, tmp_path / "again")
    assert safetensors.read(tmp_path / "again").keys() == {*tensors, *more}


BAD = {
    "key_value_rank": {"key_value_rank": 0},
    "kv_heads": {"kv_heads": 1},
    "rotary_width": {"rotary_width": 10},
    "relative": {"relative": "alibi"},
    "query_key_norm": {"query_key_norm": True},
    "attention_sinks": {"attention_sinks": True},
    "rotary_scaling": {"rotary_scaling": "dynamic"},
    "expert_groups": {"expert_groups": 3},
    "expert_groups_per_token": {"expert_groups": 2, "expert_groups_per_token": 3},
    "experts_per_token": {"expert_groups": 2, "experts_per_token": 3},
}


@pytest.mark.parametrize("name", BAD)
def test_impossible_models_are_errors(name):
    with pytest.raises(UserError, match=f"model.{name}"):
        dataclasses.replace(SMALL, **BAD[name]).check()


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("deepseek_v2", {"topk_method": "noaux_tc"}),
        ("deepseek_v2", {"scoring_func": "sigmoid"}),
        ("deepseek_v2", {"norm_topk_prob": True}),
        ("deepseek_v3", {"scoring_func": "softmax"}),
        ("deepseek_v3", {"rope_interleave": False}),
        ("deepseek_v3", {"moe_layer_freq": 2}),
        ("deepseek_v3", {"first_k_dense_replace": -1}),
        ("deepseek_v3", {"n_shared_experts": "one"}),
        ("deepseek_v3", {"attention_bias": True}),
    ],
    ids=str,
)
def test_other_settings_are_errors(kind, change):
    family = FAMILIES[kind]
    hf = family.config_to_hf(next(iter(family.presets.values()))) | change
    with pytest.raises(UserError, match=next(iter(change))):
        family.config_from_hf(hf).check()
