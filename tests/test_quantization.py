"""Quantisation of models: GPTQ reduces the error of outputs, and invalid arguments are errors."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params
from test_nodes import MODELS, hidden, masked, projections

import jaxlm
from jaxlm.lm import LM
from jaxlm.nn import nodes, parameters
from jaxlm.nn.quantized import Quantized
from jaxlm.nn.quantized import quantize as quantize_array
from jaxlm.nn.transformer import Transformer
from jaxlm.transforms.calibration import Moments, input_moments
from jaxlm.transforms.quantization import gptq, nearest

RANDOM = np.random.default_rng(0)
TEXTS = [RANDOM.integers(1, 48, 32).tolist() for _ in range(12)]


def make(name: str = "decoder") -> LM:
    model = dataclasses.replace(MODELS[name], start_token=0)
    return LM(model, Transformer(model), jax.tree.map(jnp.asarray, random_params(model)))


def quantized_paths(params) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=nodes.is_node)
    return [parameters.path_of(path) for path, leaf in leaves if isinstance(leaf, Quantized)]


def output_error(array, node, sums) -> np.ndarray:
    """Returns the mean squared error of the outputs on the calibration data for each layer."""
    error_LIO = np.asarray(jax.vmap(lambda n: n.materialize())(node) - array).reshape(*sums.shape[:2], -1)
    return np.einsum("lio,lij,ljo->l", error_LIO, sums, error_LIO)


@pytest.mark.parametrize(
    "how",
    [
        {"weights": "int4", "group": 8},
        {"weights": "int4", "group": 16, "symmetric": False},
        {"weights": "nf4", "group": 8},
        {"weights": "int8"},
        {"weights": "fp8"},
    ],
    ids=lambda how: how["weights"],
)
def test_gptq_reduces_the_error_of_the_outputs(how):
    x_LNI = RANDOM.standard_normal((2, 256, 16)) @ RANDOM.standard_normal((16, 16))
    x_LNI[:, :, 3] = 0  # an input that is never used
    sums = np.einsum("lni,lnj->lij", x_LNI, x_LNI).astype(np.float32)
    array = jnp.asarray(RANDOM.standard_normal((2, 4, 4, 10)), jnp.float32)
    node = gptq(array, 2, Moments(sums, np.full(2, 256.0)), **how)
    plain = nearest(array, 2, **how)
    shapes = lambda node: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(node)]
    assert shapes(node) == shapes(plain)
    np.testing.assert_array_equal(node.scales, plain.scales)
    assert np.all(output_error(array, node, sums) < 0.8 * output_error(array, plain, sums))


def test_gptq_rounds_to_the_nearest_values_if_the_inputs_are_uncorrelated():
    array = jnp.asarray(RANDOM.standard_normal((1, 16, 8)), jnp.float32)
    moments = Moments(jnp.diag(jnp.arange(1.0, 17))[None], jnp.ones(1))
    found, expected = (
        gptq(array, 1, moments, weights="int4", group=8),
        quantize_array(array, weights="int4", group=8),
    )
    np.testing.assert_array_equal(found.values, expected.values)


@pytest.mark.parametrize("name", MODELS)
def test_gptq_changes_the_outputs_of_a_model_less(name):
    lm = make(name)
    texts = [(text, text[::-1]) for text in TEXTS] if name == "encoder-decoder" else TEXTS
    error = lambda lm: float(jnp.square(hidden(lm.config, lm.params) - reference).mean())
    reference = hidden(lm.config, lm.params)
    how = {"weights": "int4", "group": 16, "calibration": texts}
    found = jaxlm.quantize(lm, method="gptq", **how)
    assert quantized_paths(found.params) == parameters.projections(lm.params)
    assert error(found) < error(jaxlm.quantize(lm, "int4", group=16))
    assert error(jaxlm.quantize(lm)) < error(found) / 20


def test_targets_and_embeddings_select_what_is_quantised():
    lm = make()
    found = jaxlm.quantize(lm, "nf4", targets="query,mlp/up", embeddings=True)
    paths = [f"decoder/layers/{part}/kernel" for part in ("attention/query", "mlp/up")]
    assert quantized_paths(found.params) == [*paths, "embeddings/tokens"]
    assert found.params["embeddings"]["tokens"].scales.shape == (48, 1)  # groups of 16, which divide the width
    layers = jax.tree.map(nodes.dense_layers, found.params["decoder"], is_leaf=nodes.is_node)
    dense = {"embeddings": {"tokens": found.params["embeddings"]["tokens"].materialize()}, "decoder": layers}
    np.testing.assert_allclose(hidden(lm.config, found.params), hidden(lm.config, dense), atol=2e-5)
    assert not quantized_paths(lm.params)


def test_pruned_weights_stay_zero():
    lm = make()
    lm = dataclasses.replace(lm, params=projections(lm.params, masked))
    found = jaxlm.quantize(lm, "int4")
    before, after = lm.params["decoder"]["layers"]["mlp"], found.params["decoder"]["layers"]["mlp"]
    assert not np.any(np.asarray(nodes.dense_layers(after["up"]["kernel"]))[~np.asarray(before["up"]["kernel"].mask)])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"weights": "int3"}, "weights is 'int3'"),
        ({"method": "awg"}, "method is 'awg'"),
        ({"targets": "querry"}, "no projection matches 'querry'; known: all, attention"),
        (
            {"group": 5},
            r"group is 5, which does not divide the 16 inputs of .*; choose 0 \(one group\) or one of 8, 16",
        ),
        ({"group": -1}, "group is -1"),
        ({"method": "gptq"}, "requires calibration data"),
        ({"method": "gptq", "calibration": []}, "calibration"),
        ({"method": "gptq", "calibration": [[1, 2, 3]]}, "the calibration data has 3 tokens, but .* at least 128"),
        ({"calibration": TEXTS}, "the method 'nearest' does not use it"),
        ({"weights": "nf4", "symmetric": False}, "nf4 has no zero points"),
        ({"weights": "nf4", "inputs": "int8"}, "products of integers require integer weights, not nf4"),
        ({"weights": "fp8", "inputs": "int4"}, "inputs is 'int4'"),
    ],
)
def test_invalid_arguments_are_errors(how, message):
    with pytest.raises(jaxlm.UserError, match=message):
        jaxlm.quantize(make(), **how)


def test_a_model_is_not_quantised_twice():
    lm = jaxlm.quantize(make(), targets="mlp")
    with pytest.raises(jaxlm.UserError, match=r"mlp/\w+/kernel is quantised already; quantise the original model"):
        jaxlm.quantize(lm)
    both = jaxlm.quantize(lm, "int4", targets="attention")
    assert len(quantized_paths(both.params)) == 7


def test_a_model_without_projections_is_an_error():
    lm = make()
    with pytest.raises(jaxlm.UserError, match="the model has no projections"):
        jaxlm.quantize(dataclasses.replace(lm, params={"embeddings": lm.params["embeddings"]}))


def test_the_moments_of_a_quantised_model_can_be_measured():
    lm = jaxlm.quantize(make(), "int8")
    found, expected = input_moments(lm, TEXTS), input_moments(make(), TEXTS)
    path = "decoder/layers/mlp/down/kernel"
    np.testing.assert_allclose(found[path].sums, expected[path].sums, rtol=0.1, atol=0.1 * expected[path].sums.max())
