"""Projections, norms, MLPs, dropout and convolution: the parts of a layer.

Parameters are float32. Products are computed in `dtype`, norms in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.devices.sharding import Placement
from jaxlm.nn.fusion import keep_apart, keep_for_derivative
from jaxlm.nn.nodes import array, dot, is_node, parameter


def _elementwise(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Returns the function computed in float32, and rounded once to the dtype of its argument, like its derivative.

    In bfloat16 the terms of most activations cancel: gelu would have an error of 45% at -3. The backward pass keeps one
    array, the derivative, in the dtype of the argument. On a GPU the derivative is computed from the argument alone:
    XLA would otherwise store what the function and the derivative have in common, in float32.
    """

    @jax.custom_jvp
    def rounded(x: jax.Array) -> jax.Array:
        return function(x.astype(jnp.float32)).astype(x.dtype)

    @rounded.defjvp
    def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
        (x,), (tangent,) = primals, tangents
        wide = keep_apart(x).astype(jnp.float32)
        _, slope = jax.jvp(function, (wide,), (jnp.ones_like(wide),))
        y = function(x.astype(jnp.float32)).astype(x.dtype)
        return y, slope.astype(x.dtype) * tangent

    return rounded


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _elementwise(lambda x: x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))),  # faster on CPU than with erfc
    "gelu_tanh": _elementwise(lambda x: jax.nn.gelu(x, approximate=True)),
    "gelu_quick": _elementwise(lambda x: x * jax.nn.sigmoid(1.702 * x)),
    "relu": jax.nn.relu,
    "silu": _elementwise(jax.nn.silu),
    "tanh": _elementwise(jnp.tanh),
}


def float32_einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns `jnp.einsum(spec, a, b)` in float32, for products whose operands are in the dtype of `a`.

    The backward pass also multiplies in the dtype of `a`, with float32 sums. By default JAX multiplies the float32
    gradient, for which accelerators need at least twice the time and the memory. Forward-mode derivatives exist only if
    `a` is float32.

    Args:
      spec: two operands and a result without "..."; each index of an operand is in the other operand or the result.
      a: the first operand.
      b: the second operand; if it is float32, so is its gradient, unrounded.
    """
    if a.dtype == jnp.float32:
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
    return _rounded_einsum(spec, a, b)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded_einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b.astype(a.dtype), preferred_element_type=jnp.float32)


def _rounded_einsum_forward(spec: str, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rounded_einsum(spec, a, b), (a, b)


def _rounded_einsum_backward(spec: str, operands: tuple[jax.Array, jax.Array], gradient: jax.Array) -> Any:
    (a, b), (inputs, output) = operands, spec.split("->")
    of_a, of_b = inputs.split(",")
    gradient = gradient.astype(a.dtype)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    by_a = product(f"{output},{of_b}->{of_a}", gradient, b.astype(a.dtype))
    by_b = product(f"{output},{of_a}->{of_b}", gradient, a)
    return by_a.astype(a.dtype), by_b.astype(b.dtype)


_rounded_einsum.defvjp(_rounded_einsum_forward, _rounded_einsum_backward)


class Linear(nn.Module):
    """`x[..., I...] @ kernel[I..., O...] + bias[O...]`; I are the last `contract` axes of x, O is `features`.

    `std` is the standard deviation of the initial kernel; None: 1 / sqrt(number of inputs).
    """

    features: tuple[int, ...]
    std: float | None
    bias: bool = True
    contract: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs = x.shape[x.ndim - self.contract :]
        init = nn.initializers.normal(1 / math.sqrt(math.prod(inputs)) if self.std is None else self.std)
        kernel = parameter(self, "kernel", init, (*inputs, *self.features))
        rate = kernel.dropout if is_node(kernel) else 0.0
        dropped = Dropout(rate, name="kernel_dropout")(x) if rate else None
        x = dot(x, kernel, self.contract, self.dtype, dropped)
        if self.bias:
            x += array(self, "bias", nn.initializers.zeros, self.features).astype(self.dtype)
        return x


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last axis, in float32."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config, D = self.config, x_BTD.shape[-1]
        centred, plus_one = config.norm == "layernorm", config.norm == "rmsnorm_plus_one"
        x = x_BTD.astype(jnp.float32)
        # The backward pass on a GPU reads these two numbers of each position. If each of its kernels computed them
        # again, one of the kernels would store a float32 array.
        if centred:
            x -= keep_for_derivative(x.mean(-1, keepdims=True))
        x *= keep_for_derivative(jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.norm_epsilon))
        init = nn.initializers.zeros if plus_one else nn.initializers.ones
        x *= plus_one + array(self, "scale", init, (D,))
        if centred and "norm" in config.biases:
            x += array(self, "bias", nn.initializers.zeros, (D,))
        return x.astype(self.dtype)


class Dropout(nn.Module):
    """Sets a fraction `rate` of the entries to 0 and scales the others, if there is a `dropout` key.

    Each entry uses one random byte, a quarter of the random bits of `jax.random.bernoulli`, which take a measurable
    part of a small model's step on CPU and TPU. The rate is therefore rounded to a multiple of 1/256.
    """

    rate: float

    @property
    def bytes(self) -> int:
        """The number of the 256 values of a byte that drop an entry."""
        return round(self.rate * 256)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.bytes or not self.has_rng("dropout"):
            return x
        return drop(x, self.make_rng("dropout"), self.bytes)


def drop(x: jax.Array, key: jax.Array, dropped: int) -> jax.Array:
    """Returns x with each entry set to 0 with the probability `dropped` / 256, and the others scaled."""
    words = jax.random.bits(key, (*x.shape[:-1], -(-x.shape[-1] // 4)), jnp.uint32)
    bytes_ = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    return jnp.where(bytes_ >= dropped, x * (256 / (256 - dropped)), 0).astype(x.dtype)


class MLP(nn.Module):
    """A position-wise feed-forward layer (Vaswani et al. 2017, section 3.3).

    All entries of `jaxlm.nn.block.FEED_FORWARDS` have the same fields and signature.
    """

    config: ModelConfig
    constrain: Placement
    dtype: Any = jnp.float32

    gated: ClassVar[bool] = False

    @classmethod
    def entries(cls, config: ModelConfig) -> int:
        """Returns the number of entries of the matrices that multiply each token."""
        return (3 if cls.gated else 2) * config.width * config.F

    @nn.compact
    def __call__(self, x_BTD: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the output [B, T, D] and auxiliary losses by name, each summed over the tokens.

        `tokens_BT` is False for padding.
        """
        config = self.config
        activation = ACTIVATIONS[config.activation]
        biased = lambda name: "mlp" in config.biases or name in config.biases
        linear = lambda name, features, std: Linear((features,), std, biased(name), dtype=self.dtype, name=name)
        x_BTF = linear("up", config.F, config.matrix_std)(x_BTD)
        if self.gated:
            x_BTF *= activation(linear("gate", config.F, config.matrix_std)(x_BTD))
        else:
            x_BTF = activation(x_BTF)
        x_BTF = Dropout(config.rate("mlp_dropout"), name="dropout")(x_BTF)
        x_BTF = self.constrain(x_BTF, ("batch", "length", "mlp"))
        return linear("down", config.width, residual_std(config))(x_BTF), {}


class GatedMLP(MLP):
    """A feed-forward layer with a gate: the activation multiplies a second projection (GLU; Shazeer 2020)."""

    gated: ClassVar[bool] = True


class Convolution(nn.Module):
    """A convolution over neighbouring tokens of an example, added to `y_BTD` and normalised (DeBERTa v2)."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array, y_BTD: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        config, (_, T, D) = self.config, x_BTD.shape
        if segments_BT is None:  # each row is one example
            segments_BT = jnp.ones((1, T), jnp.int32)
        size, padding = config.conv_width, config.conv_width // 2
        kernel = array(self, "kernel", initial(config, size * D), (size, D, D))
        bias_D = array(self, "bias", nn.initializers.zeros, (D,))
        pad = lambda x: jnp.pad(x, [(0, 0), (padding, padding)] + [(0, 0)] * (x.ndim - 2))
        x, segments = pad(x_BTD.astype(self.dtype)), pad(segments_BT)
        out_BTD = jnp.broadcast_to(bias_D.astype(self.dtype), x_BTD.shape)
        for n in range(size):
            same_BT = (segments[:, n : n + T] == segments_BT) & (segments_BT > 0)
            out_BTD += jnp.where(same_BT[..., None], x[:, n : n + T], 0) @ kernel[n].astype(self.dtype)
        out_BTD = ACTIVATIONS[config.conv_activation](Dropout(config.dropout, name="dropout")(out_BTD))
        return Norm(config, self.dtype, name="norm")(y_BTD + out_BTD)


def initial(config: ModelConfig, inputs: int) -> nn.initializers.Initializer:
    """Returns the initial distribution of a matrix or a table with `inputs` terms in each output."""
    return nn.initializers.normal(1 / math.sqrt(inputs) if config.matrix_std is None else config.matrix_std)


def query_std(config: ModelConfig) -> float | None:
    """Returns the initial standard deviation of query projections.

    Initial scores have unit variance even if they are not divided by sqrt(head width) (Raffel et al. 2020).
    """
    if config.matrix_std is not None or config.attention_scale is None:
        return config.matrix_std
    return 1 / (config.attention_scale * math.sqrt(config.width * config.C))


def residual_std(config: ModelConfig) -> float | None:
    """Returns the initial standard deviation of projections to the residual stream (Radford et al. 2019, 2.3)."""
    if config.matrix_std is None or not config.scale_residual_init:
        return config.matrix_std
    return config.matrix_std / math.sqrt(2 * config.layers)
