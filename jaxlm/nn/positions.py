"""How order enters: learned, sinusoidal, rotary or relative positions.

Positions are those inside the example, not in the row, so that packed examples see what they would see alone.  Two
tokens of one example are as far apart in the row as in the example, so that distances can be taken in the row.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.nn.layers import Norm, initial
from jaxlm.nn.nodes import array


class RotaryAngles(NamedTuple):
    """By how much rotary positions turn each pair of a head: sines and cosines [B, T, 1, C / 2], float32."""

    sin_BT1c: jax.Array
    cos_BT1c: jax.Array


class Distances(NamedTuple):
    """DeBERTa's relative positions: an embedding for each distance, and which one lies between query t and key s.

    rows_TS: row R / 2 + d of the embeddings is that of the distance d = t - s, or of its bucket.
    """

    embeddings_RD: jax.Array
    rows_TS: jax.Array


def sinusoidal(positions_BT: jax.Array, width: int, base: float) -> jax.Array:
    """Fixed embeddings [B, T, width]: sines, then cosines of `positions / base^(2i / width)` (Vaswani et al. 2017,
    section 3.5, in the order of its own code and of Marian: the two halves are not interleaved)."""
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(_frequencies(width, base))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


BY_LENGTH = ("dynamic", "longrope")  # scalings by which turns depend on the length of the sequence


def turns(positions_BT: jax.Array, config: ModelConfig, kind: str, lengths_BT: jax.Array | None = None) -> RotaryAngles:
    """The turns of rotary positions (Su et al. 2021) in the layers of a kind, global or local.

    lengths_BT: [B, T or 1], the length of each token's sequence, which the scalings of `BY_LENGTH` depend on.
    """
    own = kind == "local" and config.local_rotary_base is not None
    frequencies: Any = _frequencies(config.C, config.local_rotary_base if own else config.rotary_base)  # type: ignore[arg-type]
    if not own and config.rotary_scaling in BY_LENGTH:
        assert lengths_BT is not None
        frequencies = _stretched_by_length(frequencies, config, lengths_BT[..., None, None])
    elif not own:
        frequencies = _stretched(frequencies, config)
    angles = positions_BT[..., None, None].astype(jnp.float32) * jnp.asarray(frequencies)
    factor = 1.0 if own else config.rotary_attention
    return RotaryAngles(jnp.sin(angles) * factor, jnp.cos(angles) * factor)


def rotate(x_BTHC: jax.Array, turns: RotaryAngles) -> jax.Array:
    """Turns the pairs (i, i + C/2) of each head.

    The halves convention is that of Hugging Face's Llama files, so that no weights need permuting.
    """
    a, b = jnp.split(x_BTHC.astype(jnp.float32), 2, -1)
    sin, cos = turns
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTHC.dtype)


def _frequencies(width: int, base: float) -> np.ndarray:
    """`base^(-2i / width)` for i in [0, width / 2), float32."""
    return (1.0 / np.float32(base) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))).astype(np.float32)


def _stretched(frequencies: Any, config: ModelConfig) -> Any:
    """Frequencies for sequences longer than those of the training.

    linear: all divided by the factor (Chen et al. 2023).  llama3, yarn: what turns rarely over the trained length is
    divided, what turns often is left, with a ramp between: over the turns (Llama 3.1), or over the index of the pair
    (Peng et al. 2023, "NTK by parts").
    """
    if config.rotary_scaling == "none":
        return frequencies
    if config.rotary_scaling == "linear":
        return frequencies / np.float32(config.rotary_factor)
    if config.rotary_scaling == "llama3":
        turned = config.rotary_length * frequencies / (2 * math.pi)
        kept = (turned - config.rotary_low) / (config.rotary_high - config.rotary_low)
    else:
        pair = lambda n: len(frequencies) * math.log(config.rotary_length / (n * 2 * math.pi), config.rotary_base)
        last = 2 * len(frequencies) - 1
        first, end = pair(config.rotary_high), pair(config.rotary_low)
        if config.rotary_truncate:
            first, end = math.floor(first), math.ceil(end)
        first, end = max(first, 0), min(end, last)
        kept = 1 - (np.arange(len(frequencies)) - first) / (end - first or 0.001)
    kept = np.clip(kept, 0, 1).astype(np.float32)
    return kept * frequencies + (1 - kept) * frequencies / np.float32(config.rotary_factor)


def _stretched_by_length(frequencies: np.ndarray, config: ModelConfig, lengths_BT11: jax.Array) -> jax.Array:
    """Frequencies [B, T, 1, c] for the lengths of sequences.

    dynamic: beyond the trained length the base grows with the length, so that the slowest pair turns as far as it did
    over the trained one ("NTK-aware", Peng et al. 2023, appendix B.1).  longrope: each pair has a divisor of its own,
    and another one in sequences beyond the trained length (Ding et al. 2024).
    """
    if config.rotary_scaling == "longrope":
        divisors = (np.asarray(given, np.float32) for given in (config.rotary_short, config.rotary_long))
        short, long = (frequencies / divisor for divisor in divisors)
        return jnp.where(lengths_BT11 > config.rotary_length, long, short)
    share = jnp.maximum(lengths_BT11, config.rotary_length).astype(jnp.float32) / config.rotary_length
    growth = config.rotary_factor * share - (config.rotary_factor - 1)
    # base^(-2i / C) with the base times growth^(C / (C - 2)).
    i = jnp.arange(len(frequencies), dtype=jnp.float32)
    return jnp.asarray(frequencies) * growth ** -(2 * i / max(config.C - 2, 1))


class Buckets(nn.Module):
    """T5's relative positions: a bias for each head and bucket of distances, the same in all layers of a stack
    (Raffel et al. 2020, section 2.1): near distances have a bucket each, farther ones share them."""

    config: ModelConfig
    causal: bool

    @nn.compact
    def __call__(self, positions_BT: jax.Array, positions_BS: jax.Array) -> jax.Array:
        """What is added to the scores [B, H, T, S]."""
        config = self.config
        shape = (config.relative_buckets, config.heads)
        table_RH = array(self, "buckets", initial(config, config.width), shape)
        distances_BTS = positions_BS[:, None, :] - positions_BT[:, :, None]
        far = config.relative_distance
        # By a table of NumPy's, since a logarithm at the edge of a bucket must round alike on every backend.
        bucket_of = jnp.asarray(self._bucket(np.arange(-far, far + 1)))
        return table_RH[bucket_of[jnp.clip(distances_BTS, -far, far) + far]].transpose(0, 3, 1, 2)

    def _bucket(self, distances: np.ndarray) -> np.ndarray:
        count, offset = self.config.relative_buckets, np.zeros_like(distances)
        if self.causal:
            distances = np.maximum(-distances, 0)
        else:
            count //= 2
            offset, distances = (distances > 0) * count, np.abs(distances)
        near = count // 2
        far = np.log(np.maximum(distances, 1).astype(np.float32) / near)
        far = near + (far / np.float32(math.log(self.config.relative_distance / near)) * (count - near)).astype(int)
        return offset + np.where(distances < near, distances, np.minimum(far, count - 1))


class Disentangled(nn.Module):
    """DeBERTa's embeddings of distances, one table for all layers (He et al. 2021)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, T: int) -> Distances:
        config = self.config
        middle = config.relative_buckets or config.relative_distance
        init = nn.initializers.normal(config.initial_std)
        embeddings_RD = array(self, "distances", init, (2 * middle, config.width))
        if config.relative_norm:
            embeddings_RD = Norm(config, name="norm")(embeddings_RD)
        distances_TS = np.arange(T)[:, None] - np.arange(T)[None, :]
        if config.relative_buckets:
            distances_TS = self._bucket(distances_TS)
        return Distances(embeddings_RD, jnp.asarray(np.clip(middle + distances_TS, 0, 2 * middle - 1)))

    def _bucket(self, distances: np.ndarray) -> np.ndarray:
        """Distances up to half of the buckets are told apart, farther ones on a logarithmic scale."""
        half, size = self.config.relative_buckets // 2, np.abs(distances)
        far = np.log(np.maximum(size, half).astype(np.float32) / np.float32(half))
        far /= np.log(np.float32((self.config.relative_distance - 1) / half))
        far = np.ceil(far * (half - 1)) + half
        return np.where(size <= half, distances, np.sign(distances) * far).astype(np.int32)
