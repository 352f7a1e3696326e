"""Layers by themselves: activations, norms and positions in low precision against their definitions in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxlm.nn.layers import ACTIVATIONS

PHI = lambda x: scipy.special.erfc(-x / np.sqrt(2)) / 2
TANH = lambda x: np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
DEFINITIONS = {
    "gelu": lambda x: x * PHI(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + TANH(x)),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * scipy.special.expit(x),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("dtype, epsilon", [("bfloat16", 2**-8), ("float16", 2**-11), ("float32", 2**-17)])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_gradients_are_rounded_once(name, dtype, epsilon):
    x = jnp.linspace(-4.03, 4.03, 403).astype(dtype)
    exact = np.asarray(x, np.float64)
    y, slope = jax.jit(jax.vmap(jax.value_and_grad(ACTIVATIONS[name])))(x)
    assert y.dtype == slope.dtype == x.dtype
    # Relative where the function is small, since terms that cancel would show there.
    np.testing.assert_allclose(np.asarray(y, np.float64), DEFINITIONS[name](exact), rtol=max(epsilon, 2e-3), atol=0)
    h = 1e-6
    slopes = (DEFINITIONS[name](exact + h) - DEFINITIONS[name](exact - h)) / (2 * h)
    np.testing.assert_allclose(
        np.asarray(slope, np.float64), slopes, rtol=2 * epsilon, atol=max(2 * epsilon, 1e-4) / 16
    )


def test_activations_can_be_derived_twice_and_forward():
    for function in ACTIVATIONS.values():
        twice = jax.grad(jax.grad(function))(0.7)
        forward = jax.jvp(jax.grad(function), (0.7,), (1.0,))[1]
        np.testing.assert_allclose(twice, forward, rtol=1e-6)
