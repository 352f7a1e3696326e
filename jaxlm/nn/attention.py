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
from jaxlm.nn import windows
from jaxlm.nn.cache import Cache, create
from jaxlm.nn.kernels import backend_of, choose, fused
from jaxlm.nn.layers import Dropout, Linear, Norm, drop, float32_einsum, query_std, residual_std
from jaxlm.nn.nodes import array
from jaxlm.nn.positions import Distances, Offsets, RotaryAngles, rotate
from jaxlm.nn.windows import Heads

BLOCK = 64  # minimum number of queries in a block of causal attention
MASKED = -1e30  # finite, so that a row without visible keys gives numbers instead of NaN


class AttentionInputs(NamedTuple):
    """Masks and positions of attention, shared by all layers of a kind.

    Attributes:
      mask_BTS: True where query t attends to key s; B may be 1.
      causal: whether the mask hides later positions of the row.
      segments: segments of queries and keys, if they, `causal` and `window` fully define the mask; else None. Segments
        that are None themselves mean that each row is one example.
      window: the width of local attention; None for global attention.
      rotary: rotary angles of the queries and keys; B may be 1.
      bias_BHTS: T5's relative positions, or ALiBi; B may be 1, and so may T.
      distances: DeBERTa's relative positions.
      offsets: Transformer-XL's relative positions.
      slot_positions_BS: the position to store in each slot of a new cache; B may be 1. None: no cache is created.
      cache_rotary: rotary angles of the slots of the cache, if the angles depend on the length of the sequence. The
        cache then stores keys before rotation, and they are rotated when they are read.
      cache_format: how a new cache stores keys and values, a value of `Decoding.cache`.
      global_BT: True for tokens with global attention, as in `mask_BTS`; B may be 1. None: there are none.
    """

    mask_BTS: jax.Array
    causal: bool = False
    segments: tuple[jax.Array | None, jax.Array | None] | None = None
    window: int | None = None
    rotary: RotaryAngles | None = None
    bias_BHTS: jax.Array | None = None
    distances: Distances | None = None
    offsets: Offsets | None = None
    slot_positions_BS: jax.Array | None = None
    cache_rotary: RotaryAngles | None = None
    cache_format: str = "compute"
    global_BT: jax.Array | None = None


def self_mask(
    segments_BT: jax.Array,
    causal: bool,
    window: int | None = None,
    prefix_BT: jax.Array | None = None,
    global_BT: jax.Array | None = None,
) -> jax.Array:
    """Returns the mask of self-attention [B, T, T]: True where query t attends to key s.

    Both must be in the same example, and less than `window` positions apart, unless one of them has global attention.
    If `causal`, key s must not be after query t, unless it is in the prefix (`prefix_BT` > 0).
    """
    mask_BTS = cross_mask(segments_BT, segments_BT)
    T = jnp.arange(segments_BT.shape[1])
    if causal:
        visible_BTS = (T[:, None] >= T)[None]
        mask_BTS &= visible_BTS if prefix_BT is None else visible_BTS | (prefix_BT[:, None] > 0)
    if window is not None:
        near_BTS = (jnp.abs(T[:, None] - T) < window)[None]
        mask_BTS &= near_BTS if global_BT is None else near_BTS | global_BT[:, :, None] | global_BT[:, None, :]
    return mask_BTS


def cross_mask(segments_BT: jax.Array, segments_BS: jax.Array) -> jax.Array:
    """Returns the mask of cross-attention [B, T, S]: True where query t and key s are in the same example.

    No query attends to padding (segment 0). Queries in padding attend to all other keys, as in transformers; their
    outputs are never read.
    """
    q_BT1, k_B1S = segments_BT[:, :, None], segments_BS[:, None, :]
    return ((q_BT1 == k_B1S) | (q_BT1 == 0)) & (k_B1S > 0)


def permutation_masks(order_BT: jax.Array, segments_BT: jax.Array, places_BQ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the masks of the content stream [B, T, T] and the query stream [B, Q, T] (Yang et al. 2019, section 2.3).

    A token attends to the tokens whose number is not larger than its own. A target attends only to those whose number
    is smaller, so that it does not read itself. Only the second mask hides other examples, as `self_mask` does for the
    first.

    Args:
      order_BT: the number of each token in the order of prediction, from 1; 0 for tokens that are given, and -1 for
        those of an earlier segment, which do not read this one.
      segments_BT: number of each token's example, from 1; 0 for padding.
      places_BQ: the place of each target in its row.
    """
    take = lambda x_BT: jnp.take_along_axis(x_BT, places_BQ, 1)
    content_BTS = order_BT[:, :, None] >= order_BT[:, None, :]
    query_BQS = take(order_BT)[:, :, None] > order_BT[:, None, :]
    return content_BTS, query_BQS & cross_mask(take(segments_BT), segments_BT)


class Scores(NamedTuple):
    """Operations on the products of queries and keys before the softmax: scale, bias, then a soft cap.

    A sink is one more score of each head, of a key without a value, so that the weights sum to less than 1.
    """

    scale: float
    cap: float = 0.0
    bias_BHTS: jax.Array | None = None
    sinks_H: jax.Array | None = None


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
    """Returns `softmax(q k scale) v` [B, T, H, C]; each of the K key-value heads serves H / K query heads.

    Scores and softmax are float32 for every dtype of the products.

    Args:
      q_BTHC: queries.
      k_BSKC: keys.
      v_BSKC: values.
      mask_BTS: True where query t attends to key s.
      scores: scale, cap and bias of the scores; None: the scale 1 / sqrt(C).
      dropout: applied to the exponentials of the scores.
      causal: whether the mask hides all keys s > t. Blocks of queries then read only the keys up to their end, which
        saves up to half of the work.
    """
    scores = scores or Scores(1 / math.sqrt(q_BTHC.shape[-1]))
    T, block = q_BTHC.shape[1], max(BLOCK, -(-q_BTHC.shape[1] // 8))
    if not causal or block >= T:
        return attend(q_BTHC, create(k_BSKC, v_BSKC), mask_BTS, scores, dropout)[0]
    out = []
    for start in range(0, T, block):
        q, s = slice(start, min(start + block, T)), slice(start + block)
        bias = scores.bias_BHTS
        if bias is not None:
            bias = bias[:, :, q if bias.shape[2] > 1 else slice(None), s]
        block_scores = scores._replace(bias_BHTS=bias)
        kv = create(k_BSKC[:, s], v_BSKC[:, s])
        out.append(attend(q_BTHC[:, q], kv, mask_BTS[:, q, s], block_scores, dropout)[0])
    return jnp.concatenate(out, axis=1)


def attend(
    q_BTHC: jax.Array, kv: Cache, mask_BTS: jax.Array, scores: Scores, dropout: Callable
) -> tuple[jax.Array, jax.Array]:
    """Returns the attended values [B, T, H, C] and the weights [B, H, T, S]."""
    B, T, H = q_BTHC.shape[:3]
    K, S = kv.k_BKSC.shape[1:3]
    dtype = kv.v_BKSC.dtype if kv.v_scales_BKS is None else q_BTHC.dtype
    q_BKGTC = (q_BTHC * scores.scale).reshape(B, T, K, H // K, -1).transpose(0, 2, 3, 1, 4)
    scores_BKGTS = float32_einsum("BKGTC,BKSC->BKGTS", q_BKGTC, kv.k_BKSC)
    if kv.k_scales_BKS is not None:
        scores_BKGTS *= kv.k_scales_BKS[:, :, None, None]
    if scores.bias_BHTS is not None:
        scores_BKGTS += scores.bias_BHTS.reshape(-1, K, H // K, scores.bias_BHTS.shape[2], S)
    if scores.cap:
        scores_BKGTS = scores.cap * jnp.tanh(scores_BKGTS / scores.cap)
    scores_BKGTS += jnp.where(mask_BTS, 0.0, MASKED)[:, None, None]
    # The softmax's division comes last, on [T, C] instead of [T, S].
    largest_BKGT1 = scores_BKGTS.max(-1, keepdims=True)
    if scores.sinks_H is None:
        exps_BKGTS = jnp.exp(scores_BKGTS - jax.lax.stop_gradient(largest_BKGT1))
        sums_BKGT1 = exps_BKGTS.sum(-1, keepdims=True)
    else:
        sinks_KG11 = scores.sinks_H.astype(jnp.float32).reshape(K, H // K, 1, 1)
        largest_BKGT1 = jax.lax.stop_gradient(jnp.maximum(largest_BKGT1, sinks_KG11))
        exps_BKGTS = jnp.exp(scores_BKGTS - largest_BKGT1)
        sums_BKGT1 = exps_BKGTS.sum(-1, keepdims=True) + jnp.exp(sinks_KG11 - largest_BKGT1)
    weights_BKGTS = dropout(exps_BKGTS)
    if kv.v_scales_BKS is not None:
        weights_BKGTS *= kv.v_scales_BKS[:, :, None, None]
    out_BKGTC = float32_einsum("BKGTS,BKSC->BKGTC", weights_BKGTS.astype(dtype), kv.v_BKSC) / sums_BKGT1
    out_BTHC = out_BKGTC.transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1).astype(dtype)
    return out_BTHC, (exps_BKGTS / sums_BKGT1).reshape(B, H, T, S)


class WeightDropout(NamedTuple):
    """Dropout of attention weights by the number of a call; without a key there is none.

    Attributes:
      key: the key of the layer.
      dropped: how many of 256 entries become 0.
    """

    key: jax.Array | None = None
    dropped: int = 0

    def __call__(self, n: Any) -> Callable[[jax.Array], jax.Array]:
        """Returns the dropout of call n."""
        if self.key is None:
            return lambda weights: weights
        return partial(drop, key=jax.random.fold_in(self.key, n), dropped=self.dropped)


def windowed_attention(
    heads: Heads,
    of_global: Heads | None,
    segments_BT: jax.Array,
    window: int,
    global_BT: jax.Array | None,
    scores: Scores,
    dropout: WeightDropout,
    slots: int,
) -> jax.Array:
    """Returns bidirectional local attention [B, T, H, C] with memory in proportion to T times `window`.

    Queries attend to tokens of their example that are less than `window` positions away, and to its global tokens.
    Global tokens attend to their whole example.

    Args:
      heads: queries, keys and values.
      of_global: queries of global tokens, and keys and values for them; None: there are no global tokens.
      segments_BT: number of each token's example in the row, from 1; 0 for padding. B may be 1.
      window: the width of local attention.
      global_BT: True for global tokens; B may be 1.
      scores: scale and cap of the scores.
      dropout: dropout of the weights.
      slots: number of global tokens of a row for which this is fast; with more, the scores take the time of global
        attention.
    """
    B, T = heads.q_BTHC.shape[:2]
    segments_BT = jnp.broadcast_to(segments_BT, (B, T))

    def in_blocks(keys: windows.GlobalKeys | None = None) -> jax.Array:
        (q, k, v), mask_BTS = windows.split(heads, segments_BT, window, global_BT, keys)
        return windows.join(attend(q, create(k, v), mask_BTS, scores, dropout(0))[0], B, T)

    if of_global is None or global_BT is None:
        return in_blocks()
    global_BT = jnp.broadcast_to(global_BT, (B, T))
    keys, q_BTHC = windows.find_global_keys(global_BT, slots), of_global.q_BTHC
    kv = create(of_global.k_BTKC, of_global.v_BTKC)

    def few() -> jax.Array:
        mask_BgS = cross_mask(keys.take(segments_BT), segments_BT)
        out_BgHC = attend(keys.take(q_BTHC), kv, mask_BgS, scores, dropout(1))[0]
        return windows.put(in_blocks(keys), keys, out_BgHC)

    many = partial(_attend_in_turn, heads, of_global, segments_BT, window, global_BT, scores, dropout)
    return jax.lax.cond(global_BT.sum(1).max() <= slots, few, many)


def _attend_in_turn(
    heads: Heads,
    of_global: Heads,
    segments_BT: jax.Array,
    window: int,
    global_BT: jax.Array,
    scores: Scores,
    dropout: WeightDropout,
) -> jax.Array:
    """Returns `windowed_attention` for any number of global tokens, one block of queries after the other.

    The backward pass computes the blocks again. It is defined here, because the one of JAX would save the masks of all
    blocks.
    """
    B, T = segments_BT.shape
    split = lambda x_BT: windows.own(x_BT, windows.block_size(window)).swapaxes(0, 1)
    join = lambda x_nBT: windows.join(x_nBT.swapaxes(0, 1), B, T)

    def of_block(q: Any, kv: Any, places: Any, of_row: Any) -> jax.Array:
        own_BT, is_global_BT, places_T, n = places
        segments_BT, global_BT, key = of_row
        near_TS = jnp.abs(places_T[:, None] - jnp.arange(T)) < window
        near_BTS = near_TS | is_global_BT[:, :, None] | global_BT[:, None, :]
        mask_BTS, drop_n = cross_mask(own_BT, segments_BT) & near_BTS, WeightDropout(key, dropout.dropped)
        out_BTHC, of_global_BTHC = (
            attend(q[i], create(*kv[i]), mask_BTS, scores, drop_n(2 * n + i))[0] for i in range(2)
        )
        return jnp.where(is_global_BT[..., None, None], of_global_BTHC, out_BTHC)

    def blocks(q: Any, of_row: Any) -> Any:
        places_nT = split(jnp.arange(T)[None])[:, 0]
        return *map(split, q), (*map(split, of_row[:2]), places_nT, jnp.arange(len(places_nT)))

    @jax.custom_vjp
    def attend_in_turn(q: Any, kv: Any, of_row: Any) -> jax.Array:
        return join(jax.lax.map(lambda xs: of_block(xs[:2], kv, xs[2], of_row), blocks(q, of_row)))

    def backward(inputs: Any, gradient_BTHC: jax.Array) -> Any:
        q, kv, of_row = inputs

        def step(sums: Any, xs: Any) -> Any:
            *q, places, gradient = xs
            _, pull_back = jax.vjp(lambda q, kv: of_block(q, kv, places, of_row), tuple(q), kv)
            of_q, of_kv = pull_back(gradient)
            return jax.tree.map(jnp.add, sums, of_kv), of_q

        xs = *blocks(q, of_row), split(gradient_BTHC)
        of_kv, of_q = jax.lax.scan(step, jax.tree.map(jnp.zeros_like, kv), xs)
        return jax.tree.map(join, of_q), of_kv, None

    attend_in_turn.defvjp(lambda *inputs: (attend_in_turn(*inputs), inputs), backward)
    both = heads, of_global
    of_row = segments_BT, global_BT, dropout.key
    return attend_in_turn(tuple(some.q_BTHC for some in both), tuple(some[1:] for some in both), of_row)


def _rotate_cache(cache: Cache, inputs: AttentionInputs, dtype: Any) -> Cache:
    """Returns the cache with rotated keys, in this dtype if it has scales, which rotation does not change."""
    if inputs.cache_rotary is None:
        return cache
    k_BKSC = cache.k_BKSC if cache.k_scales_BKS is None else cache.k_BKSC.astype(dtype)
    k_BSKC = rotate(k_BKSC.transpose(0, 2, 1, 3), inputs.cache_rotary)
    return cache._replace(k_BKSC=k_BSKC.transpose(0, 2, 1, 3))


class Attention(nn.Module):
    """Multi-head self-attention, or cross-attention over `context`."""

    config: ModelConfig
    constrain: Placement
    dtype: Any = jnp.float32
    kernel: str = "auto"  # auto, xla, splash, cudnn or triton: see `kernels`

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
    ) -> tuple[jax.Array, Cache | None, jax.Array | None]:
        """Returns the output of attention, the cache, and the attention weights.

        Args:
          x_BTD: hidden states.
          layer: index of the layer, from 0.
          inputs: masks and positions.
          positions_BT: position of each token in its example.
          context: for cross-attention, hidden states of the context [B, S, D], or their cached keys and values.
          cache: keys and values of earlier tokens; those of this call are written before attention reads it.
          weights: whether to return the attention weights.

        Returns:
          The output [B, T, D]; the updated or new cache, or None; the weights [B, H, T, S], or None.
        """
        config = self.config
        biased = "query_key_value" in config.biases
        into = lambda name, n, std: Linear((n, config.C), std, biased, dtype=self.dtype, name=name)
        heads = partial(into, std=config.matrix_std)
        query = into("query", config.heads, query_std(config))
        key, value = heads("key", config.K), heads("value", config.K)
        q_BTHC = query(x_BTD)
        if config.query_key_norm:
            q_BTHC = self._normalise(q_BTHC, "query_norm")
        if inputs.rotary is not None:
            q_BTHC = rotate(q_BTHC, inputs.rotary)
        if config.scale_by_layer:
            q_BTHC = (q_BTHC / (jnp.asarray(layer, jnp.float32) + 1)).astype(q_BTHC.dtype)
        q_BTHC = self.constrain(q_BTHC, ("batch", "length", "heads", "head_width"))
        if isinstance(context, Cache):
            cache = context
            if context.k_scales_BKS is not None:
                # Without a dependency on the queries, XLA converts the cache to floats before a loop, and stores these.
                cache, q_BTHC = jax.lax.optimization_barrier((context, q_BTHC))
        else:
            context_BSD = x_BTD if context is None else context
            if inputs.offsets is not None:
                context_BSD = inputs.offsets.context(context_BSD)
            k_BSKC, v_BSKC = key(context_BSD), value(context_BSD)
            if config.query_key_norm:
                k_BSKC = self._normalise(k_BSKC, "key_norm")
            unrotated_BSKC = k_BSKC
            if inputs.rotary is not None:
                k_BSKC = rotate(k_BSKC, inputs.rotary)
            k_BSKC = self.constrain(k_BSKC, ("batch", "keys", "kv_heads", "head_width"))
            v_BSKC = self.constrain(v_BSKC, ("batch", "keys", "kv_heads", "head_width"))
            if cache is not None:
                rotate_late = inputs.cache_rotary is not None
                cache = cache.write(unrotated_BSKC if rotate_late else k_BSKC, v_BSKC, positions_BT)
        scale = 1 / math.sqrt(config.C) if config.attention_scale is None else config.attention_scale
        bias_BHTS = inputs.bias_BHTS
        if inputs.distances is not None and config.relative_terms:
            scale = 1 / math.sqrt(config.C * (1 + len(config.relative_terms)))
            if not config.relative_shared:
                query = heads("relative_query", config.heads) if "p2c" in config.relative_terms else query
                key = heads("relative_key", config.K) if "c2p" in config.relative_terms else key
            bias_BHTS = scale * self._disentangled(q_BTHC, k_BSKC, inputs.distances, query, key)
        if inputs.offsets is not None:
            q_BTHC, bias_BHTS = self._with_offsets(q_BTHC, inputs.offsets, heads("relative_key", config.heads))
            bias_BHTS *= scale
        sinks_H = None
        if config.attention_sinks:
            sinks_H = array(self, "sinks", nn.initializers.normal(config.initial_std), (config.heads,))
        scores = Scores(scale, config.attention_cap, bias_BHTS, sinks_H)
        dropout = Dropout(config.attention_dropout, name="dropout")
        weights_BHTS = None
        if cache is not None:
            kv = _rotate_cache(cache, inputs, q_BTHC.dtype)
            out_BTHC, weights_BHTS = attend(q_BTHC, kv, inputs.mask_BTS, scores, dropout)
        else:
            rows = Heads(q_BTHC, k_BSKC, v_BSKC)
            of_global = self._global_heads(x_BTD, inputs, heads) if config.global_attention else None
            if weights:
                out_BTHC, weights_BHTS = self._attend_with_weights(rows, of_global, inputs, scores, dropout)
            else:
                out_BTHC = self._attend_rows(rows, of_global, inputs, scores, dropout)
        if inputs.slot_positions_BS is not None:
            select = lambda x_BSKC: jnp.take_along_axis(x_BSKC, inputs.slot_positions_BS[..., None, None], 1)
            keys_BSKC = k_BSKC if inputs.cache_rotary is None else unrotated_BSKC
            cache = create(select(keys_BSKC), select(v_BSKC), inputs.cache_format)
        biased = "out" in config.biases
        out = Linear((config.width,), residual_std(config), biased, contract=2, dtype=self.dtype, name="out")
        return out(out_BTHC), cache, weights_BHTS if weights else None

    def _normalise(self, x_BTHC: jax.Array, name: str) -> jax.Array:
        """Returns normalised queries or keys, each head separately or all together."""
        whole = self.config.query_key_norm_whole
        x = x_BTHC.reshape(*x_BTHC.shape[:2], -1) if whole else x_BTHC
        return Norm(self.config, self.dtype, name=name)(x).reshape(x_BTHC.shape)

    def _global_heads(self, x_BTD: jax.Array, inputs: AttentionInputs, heads: Callable) -> Heads | None:
        """Returns the queries of global tokens, and the keys and values for them; None if there are no such tokens."""
        if inputs.global_BT is None and not self.is_initializing():
            return None
        counts = {"query": self.config.heads, "key": self.config.K, "value": self.config.K}
        projected = {name: heads(f"global_{name}", count)(x_BTD) for name, count in counts.items()}
        if inputs.rotary is not None:
            projected |= {name: rotate(projected[name], inputs.rotary) for name in ("query", "key")}
        axes = ("length", "heads"), ("keys", "kv_heads"), ("keys", "kv_heads")
        places = (("batch", *some, "head_width") for some in axes)
        of_global = Heads(*(self.constrain(x, where) for x, where in zip(projected.values(), places)))
        return None if inputs.global_BT is None else of_global

    def _attend_with_weights(
        self, rows: Heads, of_global: Heads | None, inputs: AttentionInputs, scores: Scores, dropout: Dropout
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the attended values of rows without a cache, and the weights [B, H, T, S]."""
        attend_all = lambda some: attend(some[0], create(*some[1:]), inputs.mask_BTS, scores, dropout)
        out_BTHC, weights_BHTS = attend_all(rows)
        if of_global is None or inputs.global_BT is None:
            return out_BTHC, weights_BHTS
        out_of_global_BTHC, of_global_BHTS = attend_all(of_global)
        weights_BHTS = jnp.where(inputs.global_BT[:, None, :, None], of_global_BHTS, weights_BHTS)
        return jnp.where(inputs.global_BT[..., None, None], out_of_global_BTHC, out_BTHC), weights_BHTS

    def _attend_rows(
        self, rows: Heads, of_global: Heads | None, inputs: AttentionInputs, scores: Scores, dropout: Dropout
    ) -> jax.Array:
        """Returns the attended values of rows without a cache, from the fastest kernel that supports them."""
        mesh, (q_BTHC, k_BSKC, v_BSKC) = self.constrain.mesh, rows
        features = {"cap": scores.cap, "bias": scores.bias_BHTS is not None, "prefix": inputs.segments is None}
        features |= {"window": inputs.window is not None, "global_tokens": of_global is not None}
        features["sinks"] = scores.sinks_H is not None
        drops = bool(dropout.bytes and self.has_rng("dropout"))
        kernel = choose(backend_of(mesh), mesh, q_BTHC, k_BSKC, wanted=self.kernel, dropout=drops, **features)
        if kernel == "xla" and self._has_blocks(rows, inputs, scores):
            return self._attend_windows(rows, of_global, inputs, scores, dropout)
        if kernel == "xla":
            # With a sharded length, each block of queries would be on only some of the devices.
            blocks = inputs.causal and self.constrain.ways("length") == 1
            attend_all = partial(dot_product_attention, scores=scores, dropout=dropout, causal=blocks)
            out_BTHC = attend_all(*rows, inputs.mask_BTS)
            if of_global is None or inputs.global_BT is None:
                return out_BTHC
            return jnp.where(inputs.global_BT[..., None, None], attend_all(*of_global, inputs.mask_BTS), out_BTHC)
        assert inputs.segments is not None
        width = v_BSKC.shape[-1]
        if width < q_BTHC.shape[-1]:  # the kernels require values as wide as keys
            v_BSKC = jnp.pad(v_BSKC, [(0, 0)] * 3 + [(0, q_BTHC.shape[-1] - width)])
        qkv_and_segments = q_BTHC, k_BSKC, v_BSKC, *inputs.segments
        return fused(
            kernel,
            mesh,
            *qkv_and_segments,
            causal=inputs.causal,
            window=inputs.window,
            scale=scores.scale,
            cap=scores.cap,
        )[..., :width]

    def _has_blocks(self, rows: Heads, inputs: AttentionInputs, scores: Scores) -> bool:
        """Returns whether local attention in blocks supports the rows and saves memory."""
        if inputs.window is None or inputs.segments is None or inputs.causal or scores.bias_BHTS is not None:
            return False
        if scores.sinks_H is not None or rows.v_BTKC.shape[-1] != rows.q_BTHC.shape[-1]:
            return False
        return self.constrain.ways("length") == 1 and windows.saves_memory(rows.q_BTHC.shape[1], inputs.window)

    def _attend_windows(
        self, rows: Heads, of_global: Heads | None, inputs: AttentionInputs, scores: Scores, dropout: Dropout
    ) -> jax.Array:
        """Returns the values of local attention in blocks."""
        of_weights = WeightDropout()
        if dropout.bytes and self.has_rng("dropout"):
            of_weights = WeightDropout(self.make_rng("dropout"), dropout.bytes)
        assert inputs.segments is not None and inputs.window is not None
        segments_BT = inputs.segments[0]
        if segments_BT is None:
            segments_BT = jnp.ones(rows.q_BTHC.shape[:2], jnp.int32)
        places = segments_BT, inputs.window, inputs.global_BT
        return windowed_attention(rows, of_global, *places, scores, of_weights, windows.slots_of(self.config))

    def _with_offsets(self, q_BTHC: jax.Array, offsets: Offsets, key: Callable) -> tuple[jax.Array, jax.Array]:
        """Returns the queries for the keys, and the bias for relative positions and types [B, H, T, S], unscaled.

        Source: Dai et al. 2019, section 3.3; for types, Yang et al. 2019, section 2.5.
        """
        config, init = self.config, nn.initializers.normal(self.config.initial_std)
        shape = config.heads, config.C
        with_bias = lambda name: q_BTHC + array(self, f"{name}_bias", init, shape).astype(q_BTHC.dtype)
        key_RHC = key(offsets.embeddings_RD)
        bias_BHTS = offsets.select(float32_einsum("BTHC,RHC->BHTR", with_bias("position"), key_RHC))
        if config.types_in == "attention":
            types_NHC = array(self, "types", init, (2, *shape))  # for equal and for different types
            scores_BHTN = float32_einsum("BTHC,NHC->BHTN", with_bias("type"), types_NHC.astype(q_BTHC.dtype))
            if offsets.differs_BTS is not None:  # else all keys have the same score, which softmax ignores
                same, different = scores_BHTN[..., :1], scores_BHTN[..., 1:]
                bias_BHTS += jnp.where(offsets.differs_BTS[:, None], different, same)
        return with_bias("content"), bias_BHTS

    def _disentangled(
        self, q_BTHC: jax.Array, k_BSHC: jax.Array, distances: Distances, query: Callable, key: Callable
    ) -> jax.Array:
        """Returns DeBERTa's bias for relative positions [B, H, T, S], unscaled (He et al. 2021, equation 4)."""
        embeddings_RD = Dropout(self.config.dropout, name="relative_dropout")(distances.embeddings_RD)
        terms: Any = 0.0
        if "c2p" in self.config.relative_terms:
            scores_BHTR = float32_einsum("BTHC,RHC->BHTR", q_BTHC, key(embeddings_RD))
            terms += jnp.take_along_axis(scores_BHTR, distances.rows_TS[None, None], -1)
        if "p2c" in self.config.relative_terms:
            scores_BHSR = float32_einsum("BSHC,RHC->BHSR", k_BSHC, query(embeddings_RD))
            terms += jnp.take_along_axis(scores_BHSR, distances.rows_TS.T[None, None], -1).swapaxes(-1, -2)
        return terms
