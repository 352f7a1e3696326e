"""Stacks whose layers have different parts: equal to single layers in turn, with one row per layer that has a part."""

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
from jaxlm import AdapterConfig, ModelConfig, OptimizerConfig, UserError
from jaxlm.devices.sharding import Placement
from jaxlm.nn import flops, layer_parts, parameters
from jaxlm.nn.attention import AttentionInputs
from jaxlm.nn.block import Block
from jaxlm.nn.layer_parts import layers_of_rows, parts_of
from jaxlm.nn.layers import Norm
from jaxlm.nn.masks import self_mask
from jaxlm.nn.transformer import Transformer, apply, init, unstack_layers
from jaxlm.run.optimizer import make_optimizer, rates
from jaxlm.transforms import adapters
from jaxlm.transforms.layers import keep_layers

MIXED = ModelConfig(
    vocabulary=32,
    width=16,
    layers=5,
    heads=2,
    mlp_width=24,
    max_length=32,
    feed_forward="experts",
    feed_forwards=("gated", "experts", "experts", "dense", "experts"),
    mixers=("attention", "gru", "attention"),
    experts=4,
    expert_width=12,
    initial_std=0.3,
)
PREFIX = dataclasses.replace(MIXED, mixers=(), feed_forwards=("gated", *["experts"] * 4))
TOKENS = np.random.default_rng(0).integers(0, 32, (3, 9))


def lm_of(config: ModelConfig) -> jaxlm.LM:
    return jaxlm.LM(config, Transformer(config), random_params(config))


def test_a_parameter_has_a_row_for_each_layer_that_has_it():
    layers = random_params(MIXED)["decoder"]["layers"]
    assert {name: len(jax.tree.leaves(part)[0]) for name, part in layers.items()} == {
        "attention": 3, "gru_attention": 2, "attention_norm": 5, "mlp_norm": 5,
        "mlp": 3, "gated_mlp": 1, "dense_mlp": 1,
    }  # fmt: skip
    assert layers_of_rows(MIXED, "decoder/layers/mlp/experts/up", 3) == [1, 2, 4]
    assert layers_of_rows(MIXED, "decoder/layers/gru_attention/bias", 2) == [1, 4]
    assert layers["mlp"]["experts"]["up"].shape == (3, 4, 16, 12)


def layer_by_layer(config: ModelConfig, params: Any, tokens_BT: np.ndarray) -> jax.Array:
    """Applies single layers, whose mixer and feed-forward layer have the names of models with equal layers."""
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
    inputs = AttentionInputs(self_mask(jnp.ones((1, tokens_BT.shape[1]), int), True), True, (None, None))
    x_BTD = params["embeddings"]["tokens"][tokens_BT] + params["embeddings"]["positions"][positions_BT]
    rows = dict.fromkeys(params["decoder"]["layers"], 0)
    plain = {"mixers": (), "feed_forwards": ()}
    for n, own in enumerate(parts_of(config)):
        one = dataclasses.replace(config, mixer=own.mixer, feed_forward=own.feed_forward, **plain)
        mixer = {"gru": "gru_attention"}.get(own.mixer, "attention")
        mlp = {"gated": "gated_mlp", "dense": "dense_mlp"}.get(own.feed_forward, "mlp")
        names = {mixer: "attention", mlp: "mlp", "attention_norm": "attention_norm", "mlp_norm": "mlp_norm"}
        layer = {}
        for name, short in names.items():
            layer[short] = jax.tree.map(lambda leaf, row=rows[name]: leaf[row], params["decoder"]["layers"][name])
            rows[name] += 1
        x_BTD, _, _ = Block(one, Placement(), kernel="xla").apply({"params": layer}, x_BTD, n, inputs, positions_BT)
    return Norm(config).apply({"params": params["decoder"]["norm"]}, x_BTD)


@pytest.mark.parametrize("config", [MIXED, PREFIX], ids=["mixed", "prefix"])
def test_a_stack_equals_its_layers_in_turn(config):
    params = random_params(config)
    run = jax.jit(partial(apply, Transformer(config)))
    expected = jax.jit(partial(layer_by_layer, config))(params, TOKENS)
    np.testing.assert_allclose(run(params, TOKENS), expected, atol=2e-5)
    np.testing.assert_allclose(run(unstack_layers(config, params), TOKENS), expected, atol=2e-5)


@pytest.mark.long
def test_gradients_do_not_depend_on_remat_and_unrolling():
    params = random_params(MIXED)

    def slopes(**how: Any) -> Any:
        objective = lambda params: jnp.sin(apply(Transformer(MIXED, **how), params, TOKENS)).sum()
        return jax.jit(jax.grad(objective))(params)

    check = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(check, slopes(), slopes(remat="full", unroll=5))


def test_all_layers_return_hidden_states_and_those_with_attention_their_weights():
    params = random_params(MIXED)
    run = partial(apply, Transformer(MIXED), mutable=["states", "weights", "losses"])
    _, found = jax.jit(run)(params, TOKENS)
    assert found["states"]["decoder"]["states"][0].shape == (6, 3, 9, 16)
    outputs = found["weights"]["decoder"]["weights"][0]
    assert outputs.attention_BHTS.shape == (3, 3, 2, 9, 9)
    assert outputs.losses["balance"].shape == (3,)


def test_compilation_does_not_grow_with_depth():
    def layers(count: int) -> int:
        config = dataclasses.replace(PREFIX, layers=count, feed_forwards=("gated", *["experts"] * (count - 1)))
        shapes = jax.eval_shape(lambda: random_params(config))
        return str(jax.make_jaxpr(partial(apply, Transformer(config)))(shapes, TOKENS)).count("argsort")

    assert layers(3) == layers(30) > 0


PATTERNS = {
    "abab": ("aaaa", [(0, 1, 4)]),
    "prefix": ("abbbb", [(0, 1, 1), (1, 1, 4)]),
    "period": ("abababa", [(0, 1, 1), (1, 2, 3)]),
    "both": ("caabaabaab", [(0, 1, 1), (1, 3, 3)]),
    "none": ("abc", [(0, 3, 1)]),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_segments_compile_few_layers(name):
    letters, expected = PATTERNS[name]
    names = {"a": "experts", "b": "gated", "c": "dense"}
    pattern = tuple(names[letter] for letter in letters)
    mixed = dataclasses.replace(MIXED, mixers=(), layers=len(letters), feed_forwards=pattern)
    found = layer_parts._shortest(parts_of(mixed), 0)
    assert [segment[:3] for segment in found] == expected
    assert [segment.start for segment in found[1:]] == [segment.stop for segment in found[:-1]]
    assert found[-1].stop == len(letters)


def test_learning_rates_count_the_layers_of_each_row():
    shapes = jax.eval_shape(lambda: random_params(MIXED))
    found = parameters.by_path(rates(OptimizerConfig(layer_decay=0.5, freeze_layers=2), shapes, MIXED))
    rate = lambda name: found[f"decoder/layers/{name}"].ravel().tolist()
    assert rate("attention_norm/scale") == [0, 0, 0.125, 0.25, 0.5]
    assert rate("attention/query/kernel") == [0, 0.125, 0.25]
    assert rate("mlp/router") == [0, 0.125, 0.5]
    assert rate("gated_mlp/up/kernel") == [0] and rate("dense_mlp/up/kernel") == [0.25]
    make_optimizer(OptimizerConfig(name="muon", layer_decay=0.5), 3, shapes, model=MIXED).init(random_params(MIXED))


def test_kept_layers_compute_what_they_computed():
    config, kept = MIXED, (0, 2, 3)
    lm = lm_of(config)
    small = keep_layers(lm, kept)
    assert [parts_of(small.config)[n] for n in range(3)] == [parts_of(config)[n] for n in kept]
    shapes = jax.eval_shape(lambda: init(small.module, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, small.params) == jax.tree.map(jnp.shape, shapes)
    first = keep_layers(lm, (0,))  # without experts
    assert set(first.params["decoder"]["layers"]) == {"attention", "attention_norm", "mlp_norm", "gated_mlp"}
    expected = jax.jit(partial(layer_by_layer, first.config))(first.params, TOKENS)
    np.testing.assert_allclose(first(TOKENS).hidden_BTD, expected, atol=2e-5)
    with pytest.raises(UserError, match="feed-forward layer"):
        jaxlm.shrink(lm, mlp=8)


@pytest.mark.long
def test_files_adapters_and_quantisation_of_mixed_layers(tmp_path):
    lm = lm_of(MIXED)
    expected = lm(TOKENS).logits
    jaxlm.save(lm, tmp_path / "model")
    back = jaxlm.load(tmp_path / "model")
    assert back.config == MIXED
    np.testing.assert_array_equal(back(TOKENS).logits, expected)
    config = AdapterConfig(rank=2, targets="query,gated_mlp")
    params = jax.tree.map(jnp.asarray, lm.params)
    params = adapters.add(params, config, jax.random.key(0))
    kernel = params["decoder"]["layers"]["gated_mlp"]["up"]["kernel"]
    assert kernel.a.shape == (1, 16, 2) and kernel.b.shape == (1, 2, 24)
    np.testing.assert_allclose(dataclasses.replace(lm, params=params)(TOKENS).logits, expected, atol=1e-5)
    quantised = jaxlm.quantize(lm, weights="int8")
    assert np.abs(quantised(TOKENS).logits - expected).max() < 0.3


def test_flops_are_those_of_the_layers():
    of = lambda config: flops.model_flops(config, 1, 8).projections
    plain = lambda **fields: dataclasses.replace(PREFIX, layers=1, feed_forwards=(), **fields)
    dense = plain(feed_forward="gated", experts=0, expert_width=None)
    assert of(PREFIX) == of(dense) + 4 * of(plain())


BAD = {
    "encoder_decoder": {"structure": "encoder_decoder"},
    "conv_width": {"structure": "encoder", "conv_width": 3},
    "distinct_layers": {"distinct_layers": 2},
    "cross": {"mixers": ("attention", "cross")},
    "relative": {"mixers": ("attention", "gru"), "relative": "alibi"},
    "unknown": {"feed_forwards": ("gated", "gatted")},
    "no experts": {"feed_forward": "gated", "feed_forwards": ("gated", "dense")},
}


@pytest.mark.parametrize("name", BAD)
def test_impossible_stacks_are_errors(name):
    config = dataclasses.replace(PREFIX, **BAD[name])
    with pytest.raises(UserError):
        config.check()
        jax.eval_shape(lambda: init(Transformer(config), jax.random.key(0)))
