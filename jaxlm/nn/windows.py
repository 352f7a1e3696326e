"""Local attention in blocks: each block of queries reads the keys of its neighbouring blocks and the global tokens.

The scores need memory in proportion to the length of a row times the window, instead of the square of the length.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.nn.cache import create
from jaxlm.nn.dot_product import Scores, WeightDropout, attend
from jaxlm.nn.masks import cross_mask

MULTIPLE = 64  # the size of a block is a multiple of this
MIN_BLOCKS = 4  # rows with fewer blocks of queries are faster as a whole
# Number of keys for global tokens in each block, by `ModelConfig.global_rule`: those of many short examples, or of a
# few questions. Rows with more global tokens are computed differently.
_SLOTS = {"first": 64}
_DEFAULT_SLOTS = 256


class Heads(NamedTuple):
    """Queries, keys and values of self-attention.

    Attributes:
      q_BTHC: queries.
      k_BTKC: keys.
      v_BTKC: values.
    """

    q_BTHC: jax.Array
    k_BTKC: jax.Array
    v_BTKC: jax.Array


class GlobalKeys(NamedTuple):
    """The places of the global tokens of each row.

    Attributes:
      places_Bg: places in the row; those of global tokens come first.
      exists_Bg: whether a place is that of a global token.
    """

    places_Bg: jax.Array
    exists_Bg: jax.Array

    def take(self, x_BT: jax.Array) -> jax.Array:
        """Returns the entries of x [B, T, ...] at the places, [B, g, ...]."""
        return jnp.take_along_axis(x_BT, self.places_Bg.reshape(*self.places_Bg.shape, *[1] * (x_BT.ndim - 2)), 1)


class Blocks(NamedTuple):
    """The blocks of all rows, each as a row with T queries and S keys.

    Attributes:
      heads: queries, keys and values.
      mask_BTS: True where query t attends to key s.
    """

    heads: Heads
    mask_BTS: jax.Array


def block_size(window: int) -> int:
    """Returns the number of queries in a block, so that the keys of a window are in this block and its neighbours."""
    return -(-max(1, window - 1) // MULTIPLE) * MULTIPLE


def saves_memory(length: int, window: int) -> bool:
    """Returns whether rows of this length are long enough for blocks."""
    return length >= MIN_BLOCKS * block_size(window)


def slots_of(config: ModelConfig) -> int:
    """Returns the number of global tokens of a row for which attention in blocks is fast."""
    return _SLOTS.get(config.global_rule, _DEFAULT_SLOTS)


def find_global_keys(global_BT: jax.Array, slots: int) -> GlobalKeys:
    """Returns the places of the first global tokens of each row, `slots` at most."""
    places_Bg = jnp.argsort(~global_BT, axis=1, stable=True)[:, :slots]
    return GlobalKeys(places_Bg, jnp.take_along_axis(global_BT, places_Bg, 1))


def split(
    heads: Heads, segments_BT: jax.Array, window: int, global_BT: jax.Array | None, keys: GlobalKeys | None
) -> Blocks:
    """Returns the blocks of rows for attention to tokens less than `window` positions away and to global tokens.

    Args:
      heads: queries, keys and values of the rows.
      segments_BT: number of each token's example in the row, from 1; 0 for padding.
      window: the width of local attention.
      global_BT: True for global tokens; None: there are none.
      keys: the places of the global tokens; None: there are none.
    """
    b = block_size(window)
    own_BnT, near_BnS = blocks_of(segments_BT, b), _neighbours(segments_BT, b)
    is_near_TS = jnp.abs(jnp.arange(b)[:, None] + b - jnp.arange(3 * b)) < window
    mask_BnTS = (own_BnT[..., None] == near_BnS[:, :, None]) & (near_BnS[:, :, None] > 0) & is_near_TS
    k_BnSKC, v_BnSKC = _neighbours(heads.k_BTKC, b), _neighbours(heads.v_BTKC, b)
    if keys is not None and global_BT is not None:
        n, segments_Bg = own_BnT.shape[1], keys.take(segments_BT)
        same_BnTg = own_BnT[..., None] == segments_Bg[:, None, None]
        reads_BnTg = same_BnTg & (segments_Bg > 0)[:, None, None] & keys.exists_Bg[:, None, None]
        # A global token in the window is only one key.
        mask_BnTS &= ~_neighbours(global_BT, b)[:, :, None]
        mask_BnTS = jnp.concatenate([mask_BnTS, reads_BnTg], axis=3)
        of_global = lambda x_BT: jnp.broadcast_to(keys.take(x_BT)[:, None], (len(x_BT), n, *keys.take(x_BT).shape[1:]))
        k_BnSKC = jnp.concatenate([k_BnSKC, of_global(heads.k_BTKC)], axis=2)
        v_BnSKC = jnp.concatenate([v_BnSKC, of_global(heads.v_BTKC)], axis=2)
    flatten = lambda x_Bn: x_Bn.reshape(-1, *x_Bn.shape[2:])
    blocks = Heads(flatten(blocks_of(heads.q_BTHC, b)), flatten(k_BnSKC), flatten(v_BnSKC))
    return Blocks(blocks, flatten(mask_BnTS))


def blocks_of(x_BT: jax.Array, b: int) -> jax.Array:
    """Returns the entries of the blocks of rows, [B, n, b, ...]; the last block is padded with zeros."""
    return _pad(x_BT, 0, -x_BT.shape[1] % b).reshape(len(x_BT), -1, b, *x_BT.shape[2:])


def join(out_BTHC: jax.Array, B: int, T: int) -> jax.Array:
    """Returns the outputs of blocks as B rows of T positions."""
    return out_BTHC.reshape(B, -1, *out_BTHC.shape[-2:])[:, :T]


def put(out_BTHC: jax.Array, keys: GlobalKeys, out_BgHC: jax.Array) -> jax.Array:
    """Returns the outputs of rows with those of their global tokens."""
    out_BgHC = jnp.where(keys.exists_Bg[..., None, None], out_BgHC, keys.take(out_BTHC))
    return out_BTHC.at[jnp.arange(len(out_BTHC))[:, None], keys.places_Bg].set(out_BgHC, unique_indices=True)


def _neighbours(x_BT: jax.Array, b: int) -> jax.Array:
    """Returns the entries of each block and of the blocks before and after it, [B, n, 3b, ...]."""
    n = -(-x_BT.shape[1] // b)
    blocks: Any = _pad(x_BT, b, (n + 1) * b - x_BT.shape[1]).reshape(len(x_BT), n + 2, b, *x_BT.shape[2:])
    return jnp.concatenate([blocks[:, :-2], blocks[:, 1:-1], blocks[:, 2:]], axis=2)


def _pad(x_BT: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(x_BT, ((0, 0), (before, after)) + ((0, 0),) * (x_BT.ndim - 2))


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

    def in_blocks(keys: GlobalKeys | None = None) -> jax.Array:
        (q, k, v), mask_BTS = split(heads, segments_BT, window, global_BT, keys)
        return join(attend(q, create(k, v), mask_BTS, scores, dropout(0))[0], B, T)

    if of_global is None or global_BT is None:
        return in_blocks()
    global_BT = jnp.broadcast_to(global_BT, (B, T))
    keys, q_BTHC = find_global_keys(global_BT, slots), of_global.q_BTHC
    kv = create(of_global.k_BTKC, of_global.v_BTKC)

    def few() -> jax.Array:
        mask_BgS = cross_mask(keys.take(segments_BT), segments_BT)
        out_BgHC = attend(keys.take(q_BTHC), kv, mask_BgS, scores, dropout(1))[0]
        return put(in_blocks(keys), keys, out_BgHC)

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
    to_blocks = lambda x_BT: blocks_of(x_BT, block_size(window)).swapaxes(0, 1)
    to_rows = lambda x_nBT: join(x_nBT.swapaxes(0, 1), B, T)

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
        places_nT = to_blocks(jnp.arange(T)[None])[:, 0]
        return *map(to_blocks, q), (*map(to_blocks, of_row[:2]), places_nT, jnp.arange(len(places_nT)))

    @jax.custom_vjp
    def attend_blocks(q: Any, kv: Any, of_row: Any) -> jax.Array:
        return to_rows(jax.lax.map(lambda xs: of_block(xs[:2], kv, xs[2], of_row), blocks(q, of_row)))

    def backward(inputs: Any, gradient_BTHC: jax.Array) -> Any:
        q, kv, of_row = inputs

        def step(sums: Any, xs: Any) -> Any:
            *q, places, gradient = xs
            _, pull_back = jax.vjp(lambda q, kv: of_block(q, kv, places, of_row), tuple(q), kv)
            of_q, of_kv = pull_back(gradient)
            return jax.tree.map(jnp.add, sums, of_kv), of_q

        xs = *blocks(q, of_row), to_blocks(gradient_BTHC)
        of_kv, of_q = jax.lax.scan(step, jax.tree.map(jnp.zeros_like, kv), xs)
        return jax.tree.map(to_rows, of_q), of_kv, None

    attend_blocks.defvjp(lambda *inputs: (attend_blocks(*inputs), inputs), backward)
    both = heads, of_global
    of_row = segments_BT, global_BT, dropout.key
    return attend_blocks(tuple(some.q_BTHC for some in both), tuple(some[1:] for some in both), of_row)
