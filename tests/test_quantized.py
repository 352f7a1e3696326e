"""Quantised weights: bounds of the rounding errors, and equality with the dequantised model in every structure."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params
from test_nodes import MODELS, TOKENS_BT, hidden, merge, projections

import jaxlm
from jaxlm import MeshConfig
from jaxlm.devices import sharding
from jaxlm.nn import nodes, parameters
from jaxlm.nn.low_rank import LowRank
from jaxlm.nn.quantized import NF4, FakeQuantized, Quantized, numbers, quantize
from jaxlm.nn.transformer import Transformer, apply, unstack_layers
from jaxlm.run.assembly import with_shardings
from jaxlm.run.step import TrainState

WEIGHTS = {
    "int8": {"weights": "int8"},
    "int8 groups": {"weights": "int8", "group": 4},
    "int4": {"weights": "int4", "group": 8},
    "int4 asymmetric": {"weights": "int4", "group": 8, "symmetric": False},
    "int8 asymmetric": {"weights": "int8", "symmetric": False},
    "nf4": {"weights": "nf4", "group": 8},
    "fp8": {"weights": "fp8"},
}
RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_rounding_errors_have_a_bound(kind):
    array = RANDOM.standard_normal((3, 8, 2, 4)).astype(np.float32)
    array[1, :, 0, 1] = 0
    node = quantize(jnp.asarray(array), **WEIGHTS[kind])
    error = np.abs(merge({"x": node})["x"] - array)
    group = WEIGHTS[kind].get("group", 8)
    scales = np.repeat(np.asarray(node.scales), group, axis=1)
    # Half a step; NF4's largest gap is 0.304, and an 8-bit float has a step of 2**-3 of its power of two.
    bound = {"nf4": 0.5 * 0.3039 * scales, "fp8": np.abs(array) * 2**-4 + scales * 2**-10}
    assert np.all(error <= bound.get(WEIGHTS[kind]["weights"], 0.5 * scales) + 1e-6)
    assert not np.any(np.asarray(merge({"x": node})["x"])[1, :, 0, 1])
    again = quantize(merge({"x": node})["x"], **WEIGHTS[kind])
    if WEIGHTS[kind]["weights"] in ("nf4", "fp8") or kind == "int8":  # the largest weight is a value itself
        np.testing.assert_allclose(merge({"x": again})["x"], merge({"x": node})["x"], atol=1e-6)


def test_nf4_rounds_to_the_nearest_level():
    x = np.linspace(-1, 1, 4001, dtype=np.float32)[:, None]
    node = quantize(x, stacked=False, weights="nf4")
    levels = np.array(NF4, np.float32)
    np.testing.assert_allclose(np.abs(numbers(node.values) - x)[:, 0], np.abs(x - levels).min(1), atol=1e-6)


def with_nodes(params, **how):
    return projections(params, lambda leaf, row, n: quantize(leaf, row.inputs, **how))


@pytest.mark.parametrize(
    ("name", "kind"), [*(("decoder", kind) for kind in WEIGHTS), ("encoder", "int4"), ("encoder-decoder", "nf4")]
)
def test_a_quantised_model_equals_the_dequantised_one(name, kind):
    model = MODELS[name]
    params = with_nodes(random_params(model), **WEIGHTS[kind])
    expected = hidden(model, merge(params))
    np.testing.assert_allclose(hidden(model, params), expected, atol=3e-5)
    np.testing.assert_allclose(hidden(model, unstack_layers(model, params)), expected, atol=3e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_heads_may_be_quantised(tied):
    model = dataclasses.replace(MODELS["decoder"], tied_embeddings=tied)
    params = random_params(model)
    table = lambda leaf: quantize(leaf, stacked=False, weights="int4", group=8, first=1)
    params["embeddings"]["tokens"] = table(params["embeddings"]["tokens"])
    assert params["embeddings"]["tokens"].scales.shape == (48, 2)
    if not tied:
        params["lm_head"]["kernel"] = table(params["lm_head"]["kernel"])
    dense = jax.tree.map(nodes.dense, params, is_leaf=nodes.is_node)
    logits = lambda params: apply(Transformer(model), params, hidden(model, params), method="lm")
    np.testing.assert_allclose(logits(params), logits(dense), atol=2e-5)
    node, ids = params["embeddings"]["tokens"], jnp.array([[3, 40], [0, 3]])
    np.testing.assert_array_equal(node.rows(ids), node.materialize()[ids])
    row = parameters.rows_by_path(params)["embeddings/tokens/scales"]
    assert row.axes == ("vocabulary", None)


@pytest.mark.parametrize("kind", ["int8", "int8 groups", "int4", "int4 asymmetric"])
def test_integer_products_equal_products_of_the_rounded_inputs(kind):
    x = RANDOM.standard_normal((2, 3, 4, 2)).astype(np.float32)
    node = quantize(RANDOM.standard_normal((4, 2, 5)).astype(np.float32), 2, stacked=False, **WEIGHTS[kind])
    node = dataclasses.replace(node, input_format="int8")
    step = np.abs(x).max((2, 3), keepdims=True) / 127
    rounded = np.round(x / step) * step
    expected = np.tensordot(rounded, node.materialize(), 2)
    np.testing.assert_allclose(node.dot(x, 2, jnp.float32), expected, atol=1e-5)
    fixed = dataclasses.replace(node, input_scale=jnp.float32(0.02))
    clipped = np.clip(np.round(x / 0.02), -128, 127) * 0.02
    np.testing.assert_allclose(fixed.dot(x, 2, jnp.float32), np.tensordot(clipped, node.materialize(), 2), atol=1e-5)
    # The derivative is that of the dense matrix: rounding is ignored.
    gradient = jax.grad(lambda x: node.dot(x, 2, jnp.float32).sum())(x)
    np.testing.assert_allclose(gradient[0, 0], node.materialize().sum(-1), atol=1e-5)


def test_a_product_in_bfloat16_rounds_the_inputs_only():
    x = RANDOM.standard_normal((4, 32)).astype(np.float32)
    node = quantize(RANDOM.standard_normal((32, 16)).astype(np.float32), stacked=False)
    exact = np.asarray(x.astype(jnp.bfloat16), np.float32) @ np.asarray(node.materialize())
    np.testing.assert_allclose(node.dot(x, 1, jnp.bfloat16).astype(np.float32), exact, atol=1e-6, rtol=2**-8)


@pytest.mark.parametrize("input_format", ["float", "int8"])
def test_fake_quantised_weights_compute_as_the_quantised_ones_and_are_trained(input_format):
    model = MODELS["decoder"]
    how = {"weights": "int4", "group": 8, "input_format": input_format}
    fake = projections(random_params(model), lambda leaf, row, n: FakeQuantized(leaf, 0, row.inputs, **how))
    final = jax.tree.map(lambda leaf: leaf.quantize() if nodes.is_node(leaf) else leaf, fake, is_leaf=nodes.is_node)
    kinds = {type(leaf) for leaf in jax.tree.leaves(final, is_leaf=nodes.is_node) if nodes.is_node(leaf)}
    assert kinds == {Quantized}
    np.testing.assert_allclose(hidden(model, fake), hidden(model, final), atol=2e-5)
    chosen = parameters.by_path(parameters.trained_in_nodes(fake, others=False))
    assert {path.rpartition("/")[2] for path, is_trained in chosen.items() if is_trained} == {"array"}
    # The gradient of an array is that of the rounded matrix.
    loss = lambda params: jnp.square(hidden(model, params)).sum()
    of_fake, of_dense = jax.grad(loss)(fake), jax.grad(loss)(merge(final))
    if input_format == "float":
        plain = jax.tree.map(lambda leaf: getattr(leaf, "array", leaf), of_fake, is_leaf=nodes.is_node)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-3, rtol=1e-3), plain, of_dense)


@pytest.mark.parametrize("kind", ["int4 asymmetric", "nf4"])
def test_a_sharded_quantised_model_equals_the_unsharded_one(kind):
    model = dataclasses.replace(MODELS["decoder"], width=32, vocabulary=64)
    params = with_nodes(random_params(model), **WEIGHTS[kind])
    expected = hidden(model, params)
    mesh = sharding.make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    like = with_shardings(jax.eval_shape(lambda p: TrainState(0, p, (), 0), params), mesh).params
    placed = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), params, like)
    specs = {path: leaf.sharding.spec for path, leaf in parameters.by_path(placed).items()}
    P = jax.sharding.PartitionSpec
    assert specs["decoder/layers/mlp/up/kernel/values"] == P(None, "fsdp", "tensor")
    assert specs["decoder/layers/mlp/up/kernel/scales"] == P(None, None, "tensor")
    module = Transformer(model, sharding.Placement(mesh))
    np.testing.assert_allclose(jax.jit(partial(apply, module))(placed, TOKENS_BT), expected, atol=2e-5)


def test_gradients_of_adapters_over_quantised_weights_are_those_over_dense_weights():
    node = quantize(RANDOM.standard_normal((8, 6)).astype(np.float32), stacked=False, weights="nf4", group=4)
    a, b = (RANDOM.standard_normal(shape).astype(np.float32) for shape in ((8, 2), (2, 6)))
    x = RANDOM.standard_normal((3, 8)).astype(np.float32)
    loss = lambda a, b, base: jnp.square(LowRank(base, a, b, 0.5).dot(x, 1, jnp.float32)).sum()
    found = jax.grad(loss, (0, 1))(a, b, node)
    expected = jax.grad(loss, (0, 1))(a, b, node.materialize())
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected)


def test_groups_must_divide_the_inputs():
    with pytest.raises(jaxlm.UserError, match=r"group is 5, which does not divide the 8 inputs .* one of 2, 4, 8"):
        quantize(jnp.ones((8, 4)), stacked=False, group=5)
    with pytest.raises(jaxlm.UserError, match="nf4 has no zero points"):
        quantize(jnp.ones((8, 4)), stacked=False, weights="nf4", symmetric=False)
