"""Scaled dot-product attention (Vaswani et al. 2017): self and cross, grouped queries, cached."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.nn.layers import Dropout, Linear, residual_std
from jaxlm.nn.positions import rotary

BLOCK = 64  # queries, at the least, in a block of causal attention
MASKED = -1e30  # finite, so that a padding row with nothing to attend to gives numbers, not NaN


class Cache(NamedTuple):
    """Keys and values of one layer.  Slot s holds position s of its row, so slots need no labels."""

    k_BSKC: jax.Array
    v_BSKC: jax.Array


def self_mask(segments_BT: jax.Array, causal: bool) -> jax.Array:
    """[B, T, T], True where query t may see key s: the same example of the row and, if causal, not later."""
    mask_BTS = cross_mask(segments_BT, segments_BT)
    if causal:
        T = segments_BT.shape[1]
        mask_BTS &= jnp.tril(jnp.ones((T, T), bool))
    return mask_BTS


def cross_mask(segments_BT: jax.Array, segments_BS: jax.Array) -> jax.Array:
    """[B, T, S], True where query t and key s belong to the same example; padding (segment 0) sees nothing."""
    return (segments_BT[:, :, None] == segments_BS[:, None, :]) & (segments_BT[:, :, None] > 0)


def dot_product_attention(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    mask_BTS: jax.Array,
    dropout: Callable[[jax.Array], jax.Array] = lambda weights: weights,
    *,
    causal: bool = False,
) -> jax.Array:
    """`softmax(q k / sqrt(C)) v` [B, T, H, C]: each of the K key-value heads serves H / K query heads.

    Scores and softmax are float32, whatever the dtype of the products.  `causal` promises that key s is masked from
    query t < s; blocks of queries then read only the keys up to their end, which saves up to half of the work.
    """
    T, block = q_BTHC.shape[1], max(BLOCK, -(-q_BTHC.shape[1] // 8))
    starts = range(0, T, block) if causal else [0]
    out = []
    for start in starts:
        q, s = slice(start, min(start + block, T)) if causal else slice(None), slice(start + block if causal else None)
        out.append(_attend(q_BTHC[:, q], k_BSKC[:, s], v_BSKC[:, s], mask_BTS[:, q, s], dropout))
    return jnp.concatenate(out, axis=1)


def _attend(
    q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, mask_BTS: jax.Array, dropout: Callable
) -> jax.Array:
    B, T, H, C = q_BTHC.shape
    K = k_BSKC.shape[2]
    q_BKGTC = (q_BTHC / math.sqrt(C)).reshape(B, T, K, H // K, C).transpose(0, 2, 3, 1, 4)
    k_BKSC, v_BKSC = k_BSKC.transpose(0, 2, 1, 3), v_BSKC.transpose(0, 2, 1, 3)
    scores_BKGTS = jnp.einsum("BKGTC,BKSC->BKGTS", q_BKGTC, k_BKSC, preferred_element_type=jnp.float32)
    scores_BKGTS += jnp.where(mask_BTS, 0.0, MASKED)[:, None, None]
    # The softmax's division comes last, on [T, C] instead of [T, S].
    exps_BKGTS = jnp.exp(scores_BKGTS - jax.lax.stop_gradient(scores_BKGTS.max(-1, keepdims=True)))
    sums_BKGT1 = exps_BKGTS.sum(-1, keepdims=True)
    weights_BKGTS = dropout(exps_BKGTS).astype(v_BSKC.dtype)
    out_BKGTC = jnp.einsum("BKGTS,BKSC->BKGTC", weights_BKGTS, v_BKSC, preferred_element_type=jnp.float32) / sums_BKGT1
    return out_BKGTC.transpose(0, 3, 1, 2, 4).reshape(B, T, H, C).astype(v_BSKC.dtype)


class Attention(nn.Module):
    """Multi-head attention of `x` over itself, or over `context` in cross-attention."""

    config: ModelConfig
    constrain: Callable
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        mask_BTS: jax.Array,
        positions_BT: jax.Array,
        context_BSD: jax.Array | None = None,
        cache: Cache | None = None,
        causal: bool = False,
    ) -> tuple[jax.Array, Cache | None]:
        """The attended values [B, T, D] and, where a cache was given, the cache with this call's keys and values.

        `causal` says that the mask hides later positions of the row; it adds nothing to the mask.
        """
        config = self.config
        heads = lambda name, n: Linear((n, config.C), config.initial_std, config.biases, dtype=self.dtype, name=name)
        source = x_BTD if context_BSD is None else context_BSD
        q_BTHC = heads("query", config.heads)(x_BTD)
        k_BSKC = heads("key", config.K)(source)
        v_BSKC = heads("value", config.K)(source)
        if config.positions == "rotary" and context_BSD is None:
            q_BTHC = rotary(q_BTHC, positions_BT, config.rotary_base)
            k_BSKC = rotary(k_BSKC, positions_BT, config.rotary_base)
        if cache is not None:
            rows_B1 = jnp.arange(x_BTD.shape[0])[:, None]
            cache = Cache(
                cache.k_BSKC.at[rows_B1, positions_BT].set(k_BSKC),
                cache.v_BSKC.at[rows_B1, positions_BT].set(v_BSKC),
            )
            k_BSKC, v_BSKC = cache
        q_BTHC = self.constrain(q_BTHC, ("batch", "length", "heads", "head_width"))
        k_BSKC = self.constrain(k_BSKC, ("batch", "length", "kv_heads", "head_width"))
        v_BSKC = self.constrain(v_BSKC, ("batch", "length", "kv_heads", "head_width"))
        dropout = Dropout(config.attention_dropout, name="dropout")
        out_BTHC = dot_product_attention(q_BTHC, k_BSKC, v_BSKC, mask_BTS, dropout, causal=causal)
        out = Linear((config.width,), residual_std(config), config.biases, contract=2, dtype=self.dtype, name="out")
        return out(out_BTHC), cache
