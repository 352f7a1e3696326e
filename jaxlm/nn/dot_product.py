"""Scaled dot-product attention (Vaswani et al. 2017) in plain XLA, with grouped queries, from rows or from a cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.nn.cache import Cache, create
from jaxlm.nn.layers import drop, float32_einsum

BLOCK = 64  # minimum number of queries in a block of causal attention
MASKED = -1e30  # finite, so that a row without visible keys gives numbers instead of NaN


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
