"""Position encodings: sinusoidal, rotary and relative. Learned ones are in `transformer.Embeddings`.

Positions count within the example, not within the row, so that packed examples compute the same as single ones. The
distance between two tokens of one example is the same in the row, so relative positions can use row positions.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig, is_local
from jaxlm.nn.layers import Dropout, Norm, initial
from jaxlm.nn.nodes import array


class RotaryAngles(NamedTuple):
    """Sines and cosines of the rotation of each pair in a head [B, T, 1, C / 2], float32."""

    sin_BT1c: jax.Array
    cos_BT1c: jax.Array


class Distances(NamedTuple):
    """DeBERTa's relative positions: embeddings of distances, and the row of the embedding for query t and key s.

    Row R / 2 + d belongs to the distance d = t - s, or to its bucket.
    """

    embeddings_RD: jax.Array
    rows_TS: jax.Array


class Offsets(NamedTuple):
    """Transformer-XL's relative positions, and the token types that attention compares.

    Attributes:
      embeddings_RD: embeddings of the distances S - 1, S - 2, ..., 1 - S from key to query, for S keys.
      places_BQ: the place in the row of each target; their queries follow those of the row. None: no targets.
      differs_BTS: True where the types of query and key differ; None: all types are equal.
      memory_BS: True for the keys of an earlier segment, whose hidden states have no gradient; None: no such keys.
    """

    embeddings_RD: jax.Array
    places_BQ: jax.Array | None = None
    differs_BTS: jax.Array | None = None
    memory_BS: jax.Array | None = None

    @property
    def keys(self) -> int:
        """The number of keys, which are the first positions of the hidden states."""
        return (len(self.embeddings_RD) + 1) // 2

    def context(self, x_BND: jax.Array) -> jax.Array:
        """Returns the hidden states that keys and values are computed from: those of the row, without targets."""
        x_BSD = x_BND[:, : self.keys]
        if self.memory_BS is None:
            return x_BSD
        return jnp.where(self.memory_BS[..., None], jax.lax.stop_gradient(x_BSD), x_BSD)

    def select(self, scores_BHTR: jax.Array) -> jax.Array:
        """Returns the scores [B, H, T, S] of query t and key s from the scores of query t and all distances."""
        S, places_BQ = self.keys, self.places_BQ
        row_BHSS = _from_distances(scores_BHTR[:, :, :S])
        if places_BQ is None:
            return row_BHSS
        distance_BQS = (S - 1 - places_BQ)[..., None] + jnp.arange(S)
        targets_BHQS = jnp.take_along_axis(scores_BHTR[:, :, S:], distance_BQS[:, None], -1)
        return jnp.concatenate([row_BHSS, targets_BHQS], 2)


def sinusoidal(positions_BT: jax.Array, config: ModelConfig, W: int) -> jax.Array:
    """Returns fixed embeddings [B, T, W]: sines, then cosines of `(offset + positions) / base^(2i / W)`.

    Vaswani et al. 2017, section 3.5, in the order of its own code and of Marian: the two halves are not interleaved.
    With `sinusoidal_to_base` the exponent is `2i / (W - 2)`, as in that code and in fairseq.
    """
    frequencies = _frequencies(W, config.rotary_base)
    if config.sinusoidal_to_base:
        i = np.arange(W // 2, dtype=np.float32)
        frequencies = np.float32(config.rotary_base) ** (-2 * i / np.float32(max(W - 2, 1)))
    angles = (config.position_offset + positions_BT)[..., None].astype(jnp.float32) * jnp.asarray(frequencies)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


BY_LENGTH = ("dynamic", "longrope")  # scalings with angles that depend on the length of the sequence


def rotary_angles(
    positions_BT: jax.Array, config: ModelConfig, kind: str, lengths_BT: jax.Array | None = None
) -> RotaryAngles:
    """Returns the angles of rotary positions (Su et al. 2021).

    Args:
      positions_BT: positions in the example.
      config: the model's config.
      kind: the kind of layer, an entry of `config.layer_kinds`.
      lengths_BT: length of the sequence of each token, [B, T] or [B, 1]; required for the scalings in `BY_LENGTH`.
    """
    own = is_local(kind) and config.local_rotary_base is not None
    frequencies: Any = _frequencies(config.R, config.local_rotary_base if own else config.rotary_base)  # type: ignore[arg-type]
    if not own and config.rotary_scaling in BY_LENGTH:
        assert lengths_BT is not None
        frequencies = _scale_frequencies_by_length(frequencies, config, lengths_BT[..., None, None])
    elif not own:
        frequencies = _scale_frequencies(frequencies, config)
    angles = positions_BT[..., None, None].astype(jnp.float32) * jnp.asarray(frequencies)
    factor = 1.0 if own else config.rotary_attention
    return RotaryAngles(jnp.sin(angles) * factor, jnp.cos(angles) * factor)


def rotate(x_BTHC: jax.Array, angles: RotaryAngles) -> jax.Array:
    """Rotates the pairs (i, i + R/2) of the first R entries of each head, the order of Hugging Face's Llama files.

    R is twice the number of angles.
    """
    R = 2 * angles.sin_BT1c.shape[-1]
    a, b = jnp.split(x_BTHC[..., :R].astype(jnp.float32), 2, -1)
    sin, cos = angles
    rotated_BTHR = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTHC.dtype)
    return rotated_BTHR if x_BTHC.shape[-1] == R else jnp.concatenate([rotated_BTHR, x_BTHC[..., R:]], -1)


def _frequencies(width: int, base: float) -> np.ndarray:
    """Returns `base^(-2i / width)` for i in [0, width / 2), float32."""
    return (1.0 / np.float32(base) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))).astype(np.float32)


def _scale_frequencies(frequencies: Any, config: ModelConfig) -> Any:
    """Returns frequencies for sequences longer than the training sequences.

    linear: all frequencies are divided by the factor (Chen et al. 2023). llama3, yarn: low frequencies are divided,
    high frequencies are unchanged, with a linear ramp between them, over the number of rotations in the trained length
    (Llama 3.1) or over the index of the pair (Peng et al. 2023, "NTK by parts").
    """
    if config.rotary_scaling == "none":
        return frequencies
    if config.rotary_scaling == "linear":
        return frequencies / np.float32(config.rotary_factor)
    if config.rotary_scaling == "llama3":
        rotations = config.rotary_length * frequencies / (2 * math.pi)
        share = (rotations - config.rotary_low) / (config.rotary_high - config.rotary_low)
    else:
        pair = lambda n: len(frequencies) * math.log(config.rotary_length / (n * 2 * math.pi), config.rotary_base)
        last = 2 * len(frequencies) - 1
        first, end = pair(config.rotary_high), pair(config.rotary_low)
        if config.rotary_truncate:
            first, end = math.floor(first), math.ceil(end)
        first, end = max(first, 0), min(end, last)
        share = 1 - (np.arange(len(frequencies)) - first) / (end - first or 0.001)
    share = np.clip(share, 0, 1).astype(np.float32)
    return share * frequencies + (1 - share) * frequencies / np.float32(config.rotary_factor)


def _scale_frequencies_by_length(frequencies: np.ndarray, config: ModelConfig, lengths_BT11: jax.Array) -> jax.Array:
    """Returns frequencies [B, T, 1, c] that depend on the lengths of the sequences.

    dynamic: beyond the trained length the base grows with the length, so that the slowest pair rotates by the same
    angle as over the trained length ("NTK-aware", Peng et al. 2023, appendix B.1). longrope: each pair has one divisor
    up to the trained length and another one beyond it (Ding et al. 2024).
    """
    if config.rotary_scaling == "longrope":
        divisors = (np.asarray(given, np.float32) for given in (config.rotary_short, config.rotary_long))
        short, long = (frequencies / divisor for divisor in divisors)
        return jnp.where(lengths_BT11 > config.rotary_length, long, short)
    share = jnp.maximum(lengths_BT11, config.rotary_length).astype(jnp.float32) / config.rotary_length
    growth = config.rotary_factor * share - (config.rotary_factor - 1)
    # This is base^(-2i / R) with the base multiplied by growth^(R / (R - 2)).
    i = jnp.arange(len(frequencies), dtype=jnp.float32)
    return jnp.asarray(frequencies) * growth ** -(2 * i / max(config.R - 2, 1))


def alibi(positions_BS: jax.Array, config: ModelConfig) -> jax.Array:
    """Returns the bias of the scores for keys at these positions, [B, H, 1, S] (ALiBi, Press et al. 2022).

    The bias is linear in the position of the key. In the softmax it equals the bias of the paper, which is linear in
    the distance of query and key, as the difference is the same for all keys of a query. With `config.alibi_scaled` it
    is rounded to bfloat16, and scaled like the scores.
    """
    slopes_H11 = jnp.asarray(_slopes(config.heads))[:, None, None]
    positions_B11S = positions_BS[:, None, None]
    if not config.alibi_scaled:
        return slopes_H11 * positions_B11S
    scale = config.C**-0.5 if config.attention_scale is None else config.attention_scale
    # A compiler may omit conversions to bfloat16 and back, but not this operation.
    rounded = lambda x: jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return scale * rounded(rounded(slopes_H11) * rounded(positions_B11S.astype(jnp.float32)))


def _slopes(heads: int) -> np.ndarray:
    """Returns the slope of each head: powers of 2^(-8 / heads), for a number of heads that is a power of two.

    Other numbers of heads have the slopes for the power of two below, then every second one for the power above.
    """
    below = 1 << heads.bit_length() - 1
    powers = lambda n: 2.0 ** (-8 / n * np.arange(1, n + 1))
    return np.concatenate([powers(below), powers(2 * below)[::2]])[:heads].astype(np.float32)


class Buckets(nn.Module):
    """T5's relative positions: a bias for each head and bucket of distances, shared by all layers of a stack.

    Each near distance has its own bucket; farther distances share buckets (Raffel et al. 2020, section 2.1).
    """

    config: ModelConfig
    causal: bool

    @nn.compact
    def __call__(self, S: int, positions_BT: jax.Array | None = None) -> jax.Array:
        """Returns the bias of the scores [B, H, T, S].

        Args:
          S: number of keys, at positions 0 to S - 1.
          positions_BT: positions of the queries; None: those of the keys, and B is 1.
        """
        config = self.config
        shape = (config.relative_buckets, config.heads)
        table_RH = array(self, "buckets", initial(config, config.width), shape)
        far = config.relative_distance
        # The table is computed in NumPy, because a logarithm at a bucket's edge must round alike on every backend.
        bucket_of = self._bucket(np.arange(-far, far + 1))
        clip = lambda distances: distances.clip(-far, far) + far
        if positions_BT is None:
            return _along_diagonals(table_RH[bucket_of[clip(np.arange(1 - S, S))]].T, S)[None]
        distances_BTS = jnp.arange(S) - positions_BT[:, :, None]
        return table_RH[jnp.asarray(bucket_of)[clip(distances_BTS)]].transpose(0, 3, 1, 2)

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


def _along_diagonals(values_HR: jax.Array, S: int) -> jax.Array:
    """Returns a matrix [H, S, S] whose entry (t, s) is that of the distance s - t.

    The rows are shifted by reshaping, so that the gradient is a sum along the diagonals rather than a scatter of S * S
    values for each head.

    Args:
      values_HR: the values of the distances 1 - S to S - 1.
      S: number of positions.
    """
    H, R = values_HR.shape
    rows_HN = jnp.broadcast_to(values_HR[:, None], (H, S, R)).reshape(H, S * R)
    # Rows of R values, read as rows of R + 1, start one value later each: row n starts at distance 1 - S + n.
    rows_HSR = jnp.pad(rows_HN, ((0, 0), (0, S))).reshape(H, S, R + 1)
    return rows_HSR[:, ::-1, :S]


class Sinusoids(nn.Module):
    """Embeddings [R, D] of the distances S - 1 to 1 - S, without parameters (Dai et al. 2019, section 3.3)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, S: int) -> jax.Array:
        config, distances = self.config, np.arange(S - 1, -S, -1)
        if config.relative_distance:
            distances = distances.clip(-config.relative_distance, config.relative_distance)
        plain = dataclasses.replace(config, position_offset=0, sinusoidal_to_base=False)
        embeddings_RD = sinusoidal(jnp.asarray(distances), plain, config.width)
        return Dropout(config.dropout, name="dropout")(embeddings_RD)


def _from_distances(scores_BHSR: jax.Array) -> jax.Array:
    """Returns [B, H, S, S], whose entry (t, s) is that of the distance t - s in row t.

    The rows are shifted by reshaping, as in the paper's appendix B, so that the gradient needs no scatter.

    Args:
      scores_BHSR: the scores of each query and the distances S - 1 to 1 - S.
    """
    B, H, S, R = scores_BHSR.shape
    rows_BHN = jnp.pad(scores_BHSR, ((0, 0), (0, 0), (0, 0), (0, 1))).reshape(B, H, S * (R + 1))
    # Rows of R + 1 values, read as rows of R, start one value earlier each: row t starts at the distance t.
    return rows_BHN[..., S - 1 : S - 1 + S * R].reshape(B, H, S, R)[..., :S]


class Disentangled(nn.Module):
    """DeBERTa's embeddings of distances, one table shared by all layers (He et al. 2021)."""

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
        """Returns distances up to half of the buckets unchanged, and farther ones on a logarithmic scale."""
        half, size = self.config.relative_buckets // 2, np.abs(distances)
        far = np.log(np.maximum(size, half).astype(np.float32) / np.float32(half))
        far /= np.log(np.float32((self.config.relative_distance - 1) / half))
        far = np.ceil(far * (half - 1)) + half
        return np.where(size <= half, distances, np.sign(distances) * far).astype(np.int32)
