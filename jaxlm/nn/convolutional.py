"""Convolutions over neighbouring tokens as a mixer, for the classifier of Kim (2014)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.devices.sharding import Placement
from jaxlm.errors import UserError
from jaxlm.nn.attention import AttentionInputs
from jaxlm.nn.cache import Cache
from jaxlm.nn.layers import ACTIVATIONS, Linear


class Convolutions(nn.Module):
    """Convolutions with each of the widths `config.conv_windows`, joined and activated; an entry of `MIXERS`.

    A window contains the tokens around its position in an encoder, and up to its position in a decoder. Tokens of other
    examples of the row count as zeros.
    """

    config: ModelConfig
    constrain: Placement
    dtype: Any = jnp.float32
    kernel: str = "auto"

    @classmethod
    def entries(cls, config: ModelConfig, causal: bool) -> int:
        """Returns the number of entries of the matrices that multiply each token."""
        return sum(size * config.width * features for size, features in zip(config.conv_windows, features_of(config)))

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        layer: jax.Array | int,
        inputs: AttentionInputs,
        positions_BT: jax.Array,
        context: jax.Array | Cache | None = None,
        cache: Cache | None = None,
        weights: bool = False,
    ) -> tuple[jax.Array, None, None]:
        """Returns the outputs [B, T, D]; the arguments are those of `Attention`. There is no cache."""
        config, (_, T, _) = self.config, x_BTD.shape
        if inputs.segments is None:
            raise UserError(f"model.mixer is {config.mixer!r}, which supports no mask and no prefix; leave them out")
        segments_BT = inputs.segments[0]
        if segments_BT is None:  # each row is one example
            segments_BT = jnp.ones((1, T), jnp.int32)
        outputs = []
        for size, features in zip(config.conv_windows, features_of(config)):
            before = size - 1 if inputs.causal else (size - 1) // 2
            linear = Linear((features,), config.matrix_std, contract=2, dtype=self.dtype, name=f"window_{size}")
            outputs.append(linear(_windows(x_BTD, segments_BT, before, size - 1 - before)))
        return ACTIVATIONS[config.conv_activation](jnp.concatenate(outputs, -1)), None, None


def _windows(x_BTD: jax.Array, segments_BT: jax.Array, before: int, after: int) -> jax.Array:
    """Returns the tokens of the same example around each position, [B, T, before + 1 + after, D]; zeros elsewhere."""
    T = x_BTD.shape[1]
    pad = lambda x: jnp.pad(x, [(0, 0), (before, after), *[(0, 0)] * (x.ndim - 2)])
    x, segments, shifted = pad(x_BTD), pad(segments_BT), []
    for n in range(before + 1 + after):
        same_BT = segments[:, n : n + T] == segments_BT
        shifted.append(jnp.where(same_BT[..., None], x[:, n : n + T], 0))
    return jnp.stack(shifted, 2)


def features_of(config: ModelConfig) -> list[int]:
    """Returns the number of features of each window; together they have the width of the model."""
    part, rest = divmod(config.width, len(config.conv_windows))
    return [part + (n < rest) for n in range(len(config.conv_windows))]
