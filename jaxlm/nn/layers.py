"""Projections, norms, the MLP, dropout: what blocks are made of.

Parameters are float32; products run in the compute dtype `dtype`; norms run in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.devices.sharding import Placement
from jaxlm.nn.nodes import array, dot, parameter


def _elementwise(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Returns the function, computed in float32 and rounded once to the dtype of its argument, with its derivative.

    In bfloat16 the terms of most activations cancel: gelu would be wrong by 45% at -3.  The backward pass keeps one
    array, the derivative, in the dtype of the argument.
    """

    @jax.custom_jvp
    def rounded(x: jax.Array) -> jax.Array:
        return function(x.astype(jnp.float32)).astype(x.dtype)

    @rounded.defjvp
    def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
        (x,), (tangent,) = primals, tangents
        wide = x.astype(jnp.float32)
        y, slope = jax.jvp(function, (wide,), (jnp.ones_like(wide),))
        return y.astype(x.dtype), slope.astype(x.dtype) * tangent

    return rounded


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _elementwise(lambda x: x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))),  # on CPU faster than by erfc
    "gelu_tanh": _elementwise(lambda x: jax.nn.gelu(x, approximate=True)),
    "relu": jax.nn.relu,
    "silu": _elementwise(jax.nn.silu),
    "tanh": _elementwise(jnp.tanh),
}


class Linear(nn.Module):
    """`x[..., I...] @ kernel[I..., O...] + bias[O...]`, where I are x's last `contract` axes, O is `features`.

    std: of the initial kernel; None: 1 / sqrt(inputs).
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
        x = dot(x, kernel, self.contract, self.dtype)
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
        if centred:
            x -= x.mean(-1, keepdims=True)
        x *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.norm_epsilon)
        init = nn.initializers.zeros if plus_one else nn.initializers.ones
        x *= plus_one + array(self, "scale", init, (D,))
        if centred and "norm" in config.biases:
            x += array(self, "bias", nn.initializers.zeros, (D,))
        return x.astype(self.dtype)


class Dropout(nn.Module):
    """Zeroes a share `rate` of the entries, where the caller gives a `dropout` key; scales up the others.

    One random byte decides an entry, a quarter of the random bits that `jax.random.bernoulli` draws: on CPU and TPU
    these are a visible part of a small model's step.  The rate is thereby rounded to 1/256, the scale follows it.
    """

    rate: float

    @property
    def bytes(self) -> int:
        """Of 256, those that drop an entry."""
        return round(self.rate * 256)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dropped = self.bytes
        if not dropped or not self.has_rng("dropout"):
            return x
        words = jax.random.bits(self.make_rng("dropout"), (*x.shape[:-1], -(-x.shape[-1] // 4)), jnp.uint32)
        bytes_ = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
        return jnp.where(bytes_ >= dropped, x * (256 / (256 - dropped)), 0).astype(x.dtype)


class MLP(nn.Module):
    """Position-wise feed-forward layer (Vaswani et al. 2017, section 3.3): an entry of `FEED_FORWARDS`.

    Every entry has these fields and this signature.
    """

    config: ModelConfig
    constrain: Placement
    dtype: Any = jnp.float32

    matrices: ClassVar[int] = 2  # that a token passes, each of D x F
    gated: ClassVar[bool] = False

    @nn.compact
    def __call__(self, x_BTD: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the output [B, T, D], and auxiliary losses: of each, by its name, the sum over the tokens.

        tokens_BT: False for padding.
        """
        config = self.config
        activation = ACTIVATIONS[config.activation]
        bias = "mlp" in config.biases
        linear = lambda name, features, std: Linear((features,), std, bias, dtype=self.dtype, name=name)
        x_BTF = linear("up", config.F, config.matrix_std)(x_BTD)
        if self.gated:
            x_BTF *= activation(linear("gate", config.F, config.matrix_std)(x_BTD))
        else:
            x_BTF = activation(x_BTF)
        x_BTF = Dropout(config.rate("mlp_dropout"), name="dropout")(x_BTF)
        x_BTF = self.constrain(x_BTF, ("batch", "length", "mlp"))
        return linear("down", config.width, residual_std(config))(x_BTF), {}


class GatedMLP(MLP):
    """A feed-forward layer whose activation multiplies a second projection (GLU; Shazeer 2020)."""

    matrices: ClassVar[int] = 3
    gated: ClassVar[bool] = True


FEED_FORWARDS: dict[str, Any] = {"dense": MLP, "gated": GatedMLP}  # by `ModelConfig.feed_forward`


class Convolution(nn.Module):
    """A convolution over the neighbours of each token in its example, added to `y` and normalised (DeBERTa v2)."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array, y_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
        config, (_, T, D) = self.config, x_BTD.shape
        size, reach = config.conv_width, config.conv_width // 2
        kernel = array(self, "kernel", initial(config, size * D), (size, D, D))
        bias_D = array(self, "bias", nn.initializers.zeros, (D,))
        around = lambda x: jnp.pad(x, [(0, 0), (reach, reach)] + [(0, 0)] * (x.ndim - 2))
        x, segments = around(x_BTD.astype(self.dtype)), around(segments_BT)
        out_BTD = jnp.broadcast_to(bias_D.astype(self.dtype), x_BTD.shape)
        for n in range(size):
            same_BT = (segments[:, n : n + T] == segments_BT) & (segments_BT > 0)
            out_BTD += jnp.where(same_BT[..., None], x[:, n : n + T], 0) @ kernel[n].astype(self.dtype)
        out_BTD = ACTIVATIONS[config.conv_activation](Dropout(config.dropout, name="dropout")(out_BTD))
        return Norm(config, self.dtype, name="norm")(y_BTD + out_BTD)


def initial(config: ModelConfig, inputs: int) -> nn.initializers.Initializer:
    """The initial distribution of a matrix, or a table, whose outputs sum over so many inputs."""
    return nn.initializers.normal(1 / math.sqrt(inputs) if config.matrix_std is None else config.matrix_std)


def query_std(config: ModelConfig) -> float | None:
    """Initial deviation of projections to queries, by which scores have unit variance at first also where nothing
    divides them by sqrt(head width) (Raffel et al. 2020)."""
    if config.matrix_std is not None or config.attention_scale is None:
        return config.matrix_std
    return 1 / (config.attention_scale * math.sqrt(config.width * config.C))


def residual_std(config: ModelConfig) -> float | None:
    """Initial deviation of projections that write to the residual stream (Radford et al. 2019, section 2.3)."""
    if config.matrix_std is None or not config.scale_residual_init:
        return config.matrix_std
    return config.matrix_std / math.sqrt(2 * config.layers)
