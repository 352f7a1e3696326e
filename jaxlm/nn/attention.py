"""Scaled dot-product attention (Vaswani et al. 2017): self and cross, grouped queries, local, relative, cached."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.devices.sharding import Placement
from jaxlm.nn.kernels import chip_of, choose, fused
from jaxlm.nn.layers import Dropout, Linear, Norm, query_std, residual_std
from jaxlm.nn.positions import Distances, RotaryAngles, rotate

BLOCK = 64  # queries, at the least, in a block of causal attention
MASKED = -1e30  # finite, so that a padding row with nothing to attend to gives numbers, not NaN


class Cache(NamedTuple):
    """Keys and values of one layer's earlier tokens, or of its context.

    Of S slots, s holds the latest position p with p mod S = s, so that slots need no labels: a cache as long as the
    text holds all of it, a shorter one its end, as far back as a local layer sees.
    """

    k_BKSC: jax.Array
    v_BKSC: jax.Array


class AttentionInputs(NamedTuple):
    """What a layer's queries may see, and how far away it is: the same for all layers of a kind.

    mask_BTS: True where query t may see key s.  causal: the mask hides later positions of the row.
    segments: of queries and keys, where these, `causal` and `window` say all that the mask says.
    turns, bias_BHTS, distances: rotary, T5's and DeBERTa's positions, where the model has them; B may be 1.
    kept_BS: of keys that are to be cached, the position for each slot; B may be 1.
    slot_turns: where turns depend on the length of the sequence, those of the slots of the cache: it keeps keys that
    are not turned, and they are turned when they are read.
    """

    mask_BTS: jax.Array
    causal: bool = False
    segments: tuple[jax.Array, jax.Array] | None = None
    window: int | None = None
    turns: RotaryAngles | None = None
    bias_BHTS: jax.Array | None = None
    distances: Distances | None = None
    kept_BS: jax.Array | None = None
    slot_turns: RotaryAngles | None = None


def cache_positions(positions_BT: jax.Array, S: int) -> jax.Array:
    """[B, T, S], the position that each slot of a cache holds for a query at `positions_BT`; below 0: none yet.

    With 4 slots, and the token at position 5 just written: 4, 5, 2, 3.
    """
    return positions_BT[..., None] - (positions_BT[..., None] - jnp.arange(S)) % S


def self_mask(
    segments_BT: jax.Array, causal: bool, window: int | None = None, prefix_BT: jax.Array | None = None
) -> jax.Array:
    """[B, T, T], True where query t may see key s: the same example of the row, if causal not later unless key s is of
    the prefix, and less than `window` places away."""
    mask_BTS = cross_mask(segments_BT, segments_BT)
    T = jnp.arange(segments_BT.shape[1])
    if causal:
        seen_BTS = (T[:, None] >= T)[None]
        mask_BTS &= seen_BTS if prefix_BT is None else seen_BTS | (prefix_BT[:, None] > 0)
    if window is not None:
        mask_BTS &= jnp.abs(T[:, None] - T) < window
    return mask_BTS


def cross_mask(segments_BT: jax.Array, segments_BS: jax.Array) -> jax.Array:
    """[B, T, S], True where query t and key s belong to the same example.

    Padding (segment 0) is seen by nobody.  What it sees itself is read nowhere; as in transformers, it sees all others.
    """
    q_BT1, k_B1S = segments_BT[:, :, None], segments_BS[:, None, :]
    return ((q_BT1 == k_B1S) | (q_BT1 == 0)) & (k_B1S > 0)


class Scores(NamedTuple):
    """What is done to the products of queries and keys before the softmax."""

    scale: float
    cap: float = 0.0
    bias_BHTS: jax.Array | None = None


def dot_product_attention(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    mask_BTS: jax.Array,
    scores: Scores | None = None,
    dropout: Callable[[jax.Array], jax.Array] = lambda weights: weights,
    *,
    causal: bool = False,
) -> jax.Array:
    """`softmax(q k scale) v` [B, T, H, C]: each of the K key-value heads serves H / K query heads.

    Scores and softmax are float32, whatever the dtype of the products.  `causal` promises that key s is masked from
    query t < s; blocks of queries then read only the keys up to their end, which saves up to half of the work.
    """
    scores = scores or Scores(1 / math.sqrt(q_BTHC.shape[-1]))
    T, block = q_BTHC.shape[1], max(BLOCK, -(-q_BTHC.shape[1] // 8))
    if not causal or block >= T:
        return _attend(q_BTHC, *_heads_first(k_BSKC, v_BSKC), mask_BTS, scores, dropout)[0]
    out = []
    for start in range(0, T, block):
        q, s = slice(start, min(start + block, T)), slice(start + block)
        bias = None if scores.bias_BHTS is None else scores.bias_BHTS[:, :, q, s]
        these = scores._replace(bias_BHTS=bias)
        seen = _heads_first(k_BSKC[:, s], v_BSKC[:, s])
        out.append(_attend(q_BTHC[:, q], *seen, mask_BTS[:, q, s], these, dropout)[0])
    return jnp.concatenate(out, axis=1)


def _heads_first(k_BSKC: jax.Array, v_BSKC: jax.Array) -> tuple[jax.Array, jax.Array]:
    return k_BSKC.transpose(0, 2, 1, 3), v_BSKC.transpose(0, 2, 1, 3)


def _attend(
    q_BTHC: jax.Array, k_BKSC: jax.Array, v_BKSC: jax.Array, mask_BTS: jax.Array, how: Scores, dropout: Callable
) -> tuple[jax.Array, jax.Array]:
    """The attended values [B, T, H, C], and the weights [B, H, T, S]."""
    B, T, H, C = q_BTHC.shape
    K, S = k_BKSC.shape[1], k_BKSC.shape[2]
    q_BKGTC = (q_BTHC * how.scale).reshape(B, T, K, H // K, C).transpose(0, 2, 3, 1, 4)
    scores_BKGTS = jnp.einsum("BKGTC,BKSC->BKGTS", q_BKGTC, k_BKSC, preferred_element_type=jnp.float32)
    if how.bias_BHTS is not None:
        scores_BKGTS += how.bias_BHTS.reshape(-1, K, H // K, T, S)
    if how.cap:
        scores_BKGTS = how.cap * jnp.tanh(scores_BKGTS / how.cap)
    scores_BKGTS += jnp.where(mask_BTS, 0.0, MASKED)[:, None, None]
    # The softmax's division comes last, on [T, C] instead of [T, S].
    exps_BKGTS = jnp.exp(scores_BKGTS - jax.lax.stop_gradient(scores_BKGTS.max(-1, keepdims=True)))
    sums_BKGT1 = exps_BKGTS.sum(-1, keepdims=True)
    weights_BKGTS = dropout(exps_BKGTS).astype(v_BKSC.dtype)
    out_BKGTC = jnp.einsum("BKGTS,BKSC->BKGTC", weights_BKGTS, v_BKSC, preferred_element_type=jnp.float32) / sums_BKGT1
    out_BTHC = out_BKGTC.transpose(0, 3, 1, 2, 4).reshape(B, T, H, C).astype(v_BKSC.dtype)
    return out_BTHC, (exps_BKGTS / sums_BKGT1).reshape(B, H, T, S)


def _written(cache: Cache, k_BTKC: jax.Array, v_BTKC: jax.Array, positions_BT: jax.Array) -> Cache:
    """The cache with the keys and values of the tokens at these positions."""
    rows_B1, slots_BT = jnp.arange(len(positions_BT))[:, None], positions_BT % cache.k_BKSC.shape[2]
    return Cache(
        cache.k_BKSC.at[rows_B1, :, slots_BT].set(k_BTKC),
        cache.v_BKSC.at[rows_B1, :, slots_BT].set(v_BTKC),
    )


def _turned(cache: Cache, sight: AttentionInputs) -> Cache:
    """The cache with the keys as queries read them."""
    if sight.slot_turns is None:
        return cache
    k_BSKC = rotate(cache.k_BKSC.transpose(0, 2, 1, 3), sight.slot_turns)
    return cache._replace(k_BKSC=k_BSKC.transpose(0, 2, 1, 3))


class Attention(nn.Module):
    """Multi-head attention of `x` over itself, or over `context` in cross-attention."""

    config: ModelConfig
    constrain: Placement
    dtype: Any = jnp.float32
    kernel: str = "auto"  # or xla, splash, cudnn: see `kernels`

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        layer: jax.Array | int,
        sight: AttentionInputs,
        positions_BT: jax.Array,
        context: jax.Array | Cache | None = None,
        cache: Cache | None = None,
        weights: bool = False,
    ) -> tuple[jax.Array, Cache | None, jax.Array | None]:
        """The attended values [B, T, D]; the cache, where one was given or is kept; where asked for, the attention
        weights [B, H, T, S].

        layer: the layer's number, from 0.
        context: what cross-attention reads [B, S, D], or the keys and values that were kept of it.
        cache: of the earlier tokens; this call's are added before it is read.
        """
        config = self.config
        biased = "query_key_value" in config.biases
        into = lambda name, n, std: Linear((n, config.C), std, biased, dtype=self.dtype, name=name)
        heads = partial(into, std=config.matrix_std)
        query = into("query", config.heads, query_std(config))
        key, value = heads("key", config.K), heads("value", config.K)
        q_BTHC = query(x_BTD)
        if config.query_key_norm:
            q_BTHC = Norm(config, self.dtype, name="query_norm")(q_BTHC)
        if sight.turns is not None:
            q_BTHC = rotate(q_BTHC, sight.turns)
        if config.scale_by_layer:
            q_BTHC = (q_BTHC / (jnp.asarray(layer, jnp.float32) + 1)).astype(q_BTHC.dtype)
        q_BTHC = self.constrain(q_BTHC, ("batch", "length", "heads", "head_width"))
        if isinstance(context, Cache):
            cache = context
        else:
            source = x_BTD if context is None else context
            k_BSKC, v_BSKC = key(source), value(source)
            if config.query_key_norm:
                k_BSKC = Norm(config, self.dtype, name="key_norm")(k_BSKC)
            unturned_BSKC = k_BSKC
            if sight.turns is not None:
                k_BSKC = rotate(k_BSKC, sight.turns)
            k_BSKC = self.constrain(k_BSKC, ("batch", "keys", "kv_heads", "head_width"))
            v_BSKC = self.constrain(v_BSKC, ("batch", "keys", "kv_heads", "head_width"))
            if cache is not None:
                late = sight.slot_turns is not None
                cache = _written(cache, unturned_BSKC if late else k_BSKC, v_BSKC, positions_BT)
        scale = 1 / math.sqrt(config.C) if config.attention_scale is None else config.attention_scale
        bias_BHTS = sight.bias_BHTS
        if sight.distances is not None and config.relative_terms:
            scale = 1 / math.sqrt(config.C * (1 + len(config.relative_terms)))
            if not config.relative_shared:
                query = heads("relative_query", config.heads) if "p2c" in config.relative_terms else query
                key = heads("relative_key", config.K) if "c2p" in config.relative_terms else key
            bias_BHTS = scale * self._disentangled(q_BTHC, k_BSKC, sight.distances, query, key)
        scores = Scores(scale, config.attention_cap, bias_BHTS)
        dropout = Dropout(config.attention_dropout, name="dropout")
        weights_BHTS = None
        if cache is not None:
            out_BTHC, weights_BHTS = _attend(q_BTHC, *_turned(cache, sight), sight.mask_BTS, scores, dropout)
        elif weights:
            out_BTHC, weights_BHTS = _attend(q_BTHC, *_heads_first(k_BSKC, v_BSKC), sight.mask_BTS, scores, dropout)
        else:
            out_BTHC = self._whole(q_BTHC, k_BSKC, v_BSKC, sight, scores, dropout)
        if sight.kept_BS is not None:
            kept = lambda x_BSKC: jnp.take_along_axis(x_BSKC, sight.kept_BS[..., None, None], 1)
            keys_BSKC = k_BSKC if sight.slot_turns is None else unturned_BSKC
            cache = Cache(*_heads_first(kept(keys_BSKC), kept(v_BSKC)))
        biased = "out" in config.biases
        out = Linear((config.width,), residual_std(config), biased, contract=2, dtype=self.dtype, name="out")
        return out(out_BTHC), cache, weights_BHTS if weights else None

    def _whole(
        self,
        q_BTHC: jax.Array,
        k_BSKC: jax.Array,
        v_BSKC: jax.Array,
        sight: AttentionInputs,
        scores: Scores,
        dropout: Dropout,
    ) -> jax.Array:
        """The attended values of whole rows, by the fastest kernel that can."""
        mesh = self.constrain.mesh
        asked = {"cap": scores.cap, "bias": scores.bias_BHTS is not None, "prefix": sight.segments is None}
        dropped = dropout.bytes and self.has_rng("dropout")
        kernel = choose(chip_of(mesh), mesh, q_BTHC, k_BSKC, wanted=self.kernel, dropout=bool(dropped), **asked)
        if kernel == "xla":
            # Blocks of a length that is split would lie on some of the devices alone.
            blocks = sight.causal and self.constrain.ways("length") == 1
            return dot_product_attention(q_BTHC, k_BSKC, v_BSKC, sight.mask_BTS, scores, dropout, causal=blocks)
        assert sight.segments is not None
        inputs = q_BTHC, k_BSKC, v_BSKC, *sight.segments
        return fused(
            kernel, mesh, *inputs, causal=sight.causal, window=sight.window, scale=scores.scale, cap=scores.cap
        )

    def _disentangled(
        self, q_BTHC: jax.Array, k_BSHC: jax.Array, distances: Distances, query: Callable, key: Callable
    ) -> jax.Array:
        """DeBERTa's terms of content and relative position [B, H, T, S], unscaled (He et al. 2021, equation 4)."""
        embeddings_RD = Dropout(self.config.dropout, name="relative_dropout")(distances.embeddings_RD)
        terms: Any = 0.0
        if "c2p" in self.config.relative_terms:
            scores_BHTR = jnp.einsum("BTHC,RHC->BHTR", q_BTHC, key(embeddings_RD), preferred_element_type=jnp.float32)
            terms += jnp.take_along_axis(scores_BHTR, distances.rows_TS[None, None], -1)
        if "p2c" in self.config.relative_terms:
            scores_BHSR = jnp.einsum("BSHC,RHC->BHSR", k_BSHC, query(embeddings_RD), preferred_element_type=jnp.float32)
            terms += jnp.take_along_axis(scores_BHSR, distances.rows_TS.T[None, None], -1).swapaxes(-1, -2)
        return terms


MIXERS: dict[str, Any] = {"attention": Attention}  # by `ModelConfig.mixer`; the signature is Attention's
