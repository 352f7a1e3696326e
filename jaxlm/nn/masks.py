"""Masks of attention: which keys a query attends to."""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
