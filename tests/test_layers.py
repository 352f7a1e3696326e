"""Single layers: activations, norms and positions in low precision, compared with their definitions in float64."""

from __future__ import annotations

import re
from functools import partial
from types import SimpleNamespace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from random_params import random_params

from jaxlm.config import ModelConfig, Remat, RunConfig
from jaxlm.errors import UserError
from jaxlm.nn.fusion import keep_apart
from jaxlm.nn.layers import ACTIVATIONS, Norm, float32_einsum
from jaxlm.nn.positions import Buckets
from jaxlm.nn.stack import REMAT, CacheSpec
from jaxlm.nn.transformer import Transformer, apply, init
from jaxlm.run import assembly

PHI = lambda x: scipy.special.erfc(-x / np.sqrt(2)) / 2
TANH = lambda x: np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
DEFINITIONS = {
    "gelu": lambda x: x * PHI(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + TANH(x)),
    "gelu_quick": lambda x: x * scipy.special.expit(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * scipy.special.expit(x),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("dtype, epsilon", [("bfloat16", 2**-8), ("float16", 2**-11), ("float32", 2**-17)])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_gradients_are_rounded_once(name, dtype, epsilon):
    positive = np.linspace(0.01, 3.5, 200)
    x = jnp.asarray(np.concatenate([-positive, positive])).astype(dtype)
    exact = np.asarray(x, np.float64)
    y, slope = jax.jit(jax.vmap(jax.value_and_grad(ACTIVATIONS[name])))(x)
    assert y.dtype == slope.dtype == x.dtype
    # The error is relative for small values, where cancellation would show.
    np.testing.assert_allclose(np.asarray(y, np.float64), DEFINITIONS[name](exact), rtol=max(epsilon, 2e-3), atol=0)
    h = 1e-6
    slopes = (DEFINITIONS[name](exact + h) - DEFINITIONS[name](exact - h)) / (2 * h)
    np.testing.assert_allclose(
        np.asarray(slope, np.float64), slopes, rtol=2 * epsilon, atol=max(2 * epsilon, 1e-4) / 16
    )


def test_activations_have_second_and_forward_derivatives():
    for function in ACTIVATIONS.values():
        twice = jax.grad(jax.grad(function))(0.7)
        forward = jax.jvp(jax.grad(function), (0.7,), (1.0,))[1]
        np.testing.assert_allclose(twice, forward, rtol=1e-6)


ROTARY = {
    "dynamic": {"rotary_factor": 4.0},
    "longrope": {"rotary_short": (1.0, 1.2), "rotary_long": (2.0, 5.0), "rotary_attention": 1.2},
}


@pytest.mark.parametrize("scaling", ROTARY)
def test_rotary_angles_that_depend_on_the_length_are_equal_with_caches_and_packing(scaling):
    """The model has one layer, because caches of further layers depend on the length at the time of writing."""
    config = ModelConfig(
        vocabulary=11, max_length=32, width=8, heads=2, layers=1, mlp_width=8, positions="rotary", rotary_length=6,
        rotary_base=30.0, rotary_scaling=scaling, **ROTARY[scaling],
    )  # fmt: skip
    module = Transformer(config)
    params = jax.tree.map(jnp.asarray, random_params(config, std=0.3))
    tokens_BT = np.random.default_rng(2).integers(0, 11, (2, 12))
    alone = jax.jit(partial(apply, module))
    whole = lambda row, length: np.asarray(alone(params, tokens_BT[row : row + 1, :length]))[0, -1]
    lengths_B = np.array([3, 5])
    prefill = lambda params, tokens: apply(
        module, params, tokens, CacheSpec(jnp.asarray(lengths_B), 12), method="prefill"
    )
    x_BTD, caches = jax.jit(prefill)(params, tokens_BT[:, :5])
    for row, length in enumerate((3, 5)):
        np.testing.assert_allclose(np.asarray(x_BTD)[row, length - 1], whole(row, length), atol=1e-5)
    step = jax.jit(
        lambda tokens_B1, at_B1, caches: apply(module, params, tokens_B1, at_B1, caches, method="decode_cached")
    )
    for n in range(7):  # the trained length is within this range
        at_B = lengths_B + n
        x_B1D, caches = step(tokens_BT[np.arange(2), at_B][:, None], at_B[:, None], caches)
        for row in range(2):
            np.testing.assert_allclose(np.asarray(x_B1D)[row, 0], whole(row, int(at_B[row]) + 1), atol=1e-5)
    packed_1T = np.concatenate([tokens_BT[:1, :9], tokens_BT[1:, :4]], 1)
    segments_1T, positions_1T = np.array([[1] * 9 + [2] * 4]), np.array([[*range(9), *range(4)]])
    x_1TD = np.asarray(alone(params, packed_1T, segments_1T, positions_1T))
    np.testing.assert_allclose(x_1TD[0, 8], whole(0, 9), atol=1e-5)
    np.testing.assert_allclose(x_1TD[0, 12], whole(1, 4), atol=1e-5)


@pytest.mark.parametrize("spec", ["BTD,VD->BTV", "BKGTC,BKSC->BKGTS", "BKGTS,BKSC->BKGTC", "BTHC,RHC->BHTR"])
def test_products_with_float32_results_have_the_gradients_of_float32_products(spec):
    random, sizes = np.random.default_rng(0), dict(zip("BTDVKGCSHR", (2, 3, 8, 5, 2, 2, 4, 6, 2, 7)))
    inputs, output = spec.split("->")
    draw = lambda axes: random.standard_normal([sizes[axis] for axis in axes], np.float32)
    a, b, g = map(draw, (*inputs.split(","), output))
    rounded = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    exact = lambda a, b: jnp.einsum(spec, a, b, precision="highest")
    expected, pull = jax.vjp(exact, *(x.astype(np.float32) for x in rounded))
    found, pull_rounded = jax.vjp(partial(float32_einsum, spec), *rounded)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(pull_rounded(g), pull(g)):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(np.float32), other, rtol=0.03, atol=0.05)
    # The gradient of a float32 parameter is the sum of products of rounded operands, and is not rounded itself.
    by_b = jax.vjp(partial(float32_einsum, spec), rounded[0], b)[1](g)[1]
    expected = jax.vjp(exact, rounded[0].astype(np.float32), b)[1](g.astype(jnp.bfloat16).astype(np.float32))[1]
    assert by_b.dtype == jnp.float32
    np.testing.assert_allclose(by_b, expected, rtol=1e-5, atol=1e-5)


def test_invalid_configs_are_refused():
    for fields, message in (
        ({"rotary_scaling": "longrope", "positions": "rotary"}, "rotary_short and rotary_long have 0 and 0 numbers"),
        ({"decoder_heads": 4}, "decoder_heads is 4, .* is for encoder-decoders"),
        ({"decoder_heads": 5, "structure": "encoder_decoder"}, "heads is 5, which does not divide"),
    ):
        with pytest.raises(UserError, match=message):
            ModelConfig(**fields).check()


def test_products_have_the_precision_of_the_module():
    config = ModelConfig(vocabulary=11, max_length=8, width=8, heads=2, layers=1)
    params = jax.eval_shape(lambda: init(Transformer(config), jax.random.key(0)))
    for precision, name in (
        ("highest", "(Precision.HIGHEST, Precision.HIGHEST)"),
        ("high", "(Precision.HIGH, Precision.HIGH)"),
        ("default", None),
    ):
        module = Transformer(config, precision=precision)
        loss = lambda params, module=module: apply(module, params, jnp.zeros((1, 4), int)).sum()
        text = str(jax.make_jaxpr(jax.grad(loss))(params))
        assert set(re.findall("precision=(.*)", text)) == ({name} if name else set())


def kept_bytes(remat: str) -> int:
    """Returns the bytes per token that a layer keeps for the backward pass."""
    tokens_BT = jnp.zeros((3, 64), int)

    def total(layers: int) -> int:
        config = ModelConfig(vocabulary=11, max_length=64, width=128, heads=2, layers=layers, dropout=0.1)
        module = Transformer(config, dtype=jnp.bfloat16, remat=remat)
        params = jax.eval_shape(lambda: init(module, jax.random.key(0)))
        backward = lambda params, key: jax.vjp(lambda params: apply(module, params, tokens_BT, key=key), params)[1]
        leaves = jax.tree.leaves(jax.eval_shape(backward, params, jax.random.key(0)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.shape[:3] == (layers, 3, 64))

    return total(5) // 5 // tokens_BT.size


def test_each_kind_of_remat_in_the_config_has_a_policy():
    assert REMAT.keys() == set(get_args(Remat)) - {"auto"}


def test_by_default_accelerators_keep_only_products_and_random_bits():
    D = 128  # scores have their heads before the length, and are not counted
    kept = {remat: kept_bytes(remat) for remat in ("none", "elementwise", "full")}
    # In bfloat16: the layer's input, queries, keys, values, attended values, two outputs, four of the MLP; masks.
    assert kept["full"] == 2 * D
    assert kept["elementwise"] <= 2 * D * (1 + 3 + 1 + 2 + 4) + 2 * D + 16
    assert kept["none"] > 2 * kept["elementwise"]


def test_remat_and_unrolling_depend_on_the_device():
    mesh = lambda platform: SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    run, deep = RunConfig(), ModelConfig(layers=36)
    assert [assembly.remat_of(run, mesh(on)) for on in ("cpu", "gpu", "tpu")] == ["none", "elementwise", "elementwise"]
    assert assembly.remat_of(RunConfig(remat="full"), mesh("gpu")) == "full"
    found = [
        assembly.unroll_of(run, config, mesh(on)) for on in ("cpu", "gpu", "tpu") for config in (ModelConfig(), deep)
    ]
    assert found == [1, 1, 12, 4, 1, 1]
    assert assembly.unroll_of(RunConfig(unroll=2), deep, mesh("gpu")) == 2


@pytest.mark.parametrize("norm, numbers", [("layernorm", 2), ("rmsnorm", 1)])
def test_the_derivative_of_a_norm_reads_its_numbers_on_a_gpu(norm, numbers):
    """The mean and the scale of each position; the forward pass alone keeps nothing apart."""
    layer, x_BTD = Norm(ModelConfig(norm=norm)), jnp.ones((2, 3, 8))
    params = layer.init(jax.random.key(0), x_BTD)
    lowered = lambda function: jax.jit(function).trace(params).lower(lowering_platforms=("cuda",)).as_text()
    forward = lambda params: layer.apply(params, x_BTD).sum()
    backward = jax.grad(lambda params, x: layer.apply(params, x).sum(), (0, 1))
    assert lowered(forward).count("optimization_barrier") == 0
    assert lowered(lambda params: backward(params, x_BTD)).count("optimization_barrier") == numbers


@pytest.mark.parametrize("causal", [True, False])
def test_buckets_of_consecutive_positions_are_those_of_given_positions(causal):
    """In values and gradients; the gradient of the former scatters one value per distance, not per pair."""
    config = ModelConfig(heads=3, relative="buckets", relative_buckets=8, relative_distance=12)
    buckets, T = Buckets(config, causal), 29
    params = buckets.init(jax.random.key(0), T)
    positions_BT = jnp.broadcast_to(jnp.arange(T), (2, T))
    weights_HTS = np.random.default_rng(0).standard_normal((3, T, T), np.float32)
    loss = lambda params, *more: (buckets.apply(params, T, *more)[0] * weights_HTS).sum()
    np.testing.assert_array_equal(buckets.apply(params, T)[0], buckets.apply(params, T, positions_BT)[1])
    ours, theirs = (jax.tree.leaves(jax.grad(loss)(params, *more))[0] for more in ((), (positions_BT,)))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    scatters = lambda *more: re.findall(
        r"\(tensor<[0-9x]+xf32>, tensor<[0-9x]+xi32>, tensor<([0-9x]+)xf32>\)",
        jax.jit(jax.grad(loss)).lower(params, *more).as_text(),
    )
    assert scatters() == [f"{2 * T - 1}x3"] and scatters(positions_BT) != scatters()


# What XLA computes together

PLATFORMS = ("cpu", "tpu", "cuda")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_keeping_values_apart_changes_no_derivative_and_needs_a_gpu(name):
    x_BF = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8)), jnp.float32)
    double = lambda x: 2 * keep_apart(x) ** 2
    np.testing.assert_array_equal(jax.jacfwd(double)(x_BF), jax.jacrev(double)(x_BF))
    np.testing.assert_array_equal(jax.vmap(jax.grad(lambda x: double(x).sum()))(x_BF), 4 * x_BF)
    step = jax.jit(jax.value_and_grad(lambda x: ACTIVATIONS[name](x).sum()))
    barriers = {on: step.trace(x_BF).lower(lowering_platforms=(on,)).as_text().count("barrier") for on in PLATFORMS}
    assert barriers == {"cpu": 0, "tpu": 0, "cuda": 0 if name == "relu" else 1}
