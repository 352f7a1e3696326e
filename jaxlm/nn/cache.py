"""Keys and values of earlier tokens, in the dtype of the arithmetic or as integers of 8 bits."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.nn.quantized import round_inputs


class Cache(NamedTuple):
    """Keys and values of the earlier tokens of one layer, or of its context.

    Slot s of S holds the latest position p with p mod S = s, so that slots need no labels. A cache as long as the text
    holds the whole text; a shorter cache, for the window of a local layer, holds its end.

    In the format "int8" each key and each value of a head is int8 with a scale, its largest entry / 127. Attention
    multiplies scores and weights by the scales, which equals a product with the dequantised keys and values.

    Attributes:
      k_BKSC: keys.
      v_BKSC: values.
      k_scales_BKS: float32 scales of the keys; None in the format "compute".
      v_scales_BKS: float32 scales of the values; None in the format "compute".
    """

    k_BKSC: jax.Array
    v_BKSC: jax.Array
    k_scales_BKS: jax.Array | None = None
    v_scales_BKS: jax.Array | None = None

    @property
    def slots(self) -> int:
        """The number of slots S."""
        return self.k_BKSC.shape[2]

    @property
    def format(self) -> str:
        """How keys and values are stored, a value of `Decoding.cache`."""
        return "compute" if self.k_scales_BKS is None else "int8"

    def write(self, k_BTKC: jax.Array, v_BTKC: jax.Array, positions_BT: jax.Array) -> Cache:
        """Returns the cache after writing the keys and values of the tokens at these positions."""
        rows_B1, slots_BT = jnp.arange(len(positions_BT))[:, None], positions_BT % self.slots
        put = lambda old, new: old.at[rows_B1, :, slots_BT].set(new)
        return jax.tree.map(put, self, _slots_first(k_BTKC, v_BTKC, self.format))

    def extend(self, slots: int) -> Cache:
        """Returns the cache with empty slots after its own, `slots` in total."""
        pad = lambda x: jnp.pad(x, [(0, slots - self.slots if axis == 2 else 0) for axis in range(x.ndim)])
        return jax.tree.map(pad, self)


def create(k_BSKC: jax.Array, v_BSKC: jax.Array, format: str = "compute") -> Cache:
    """Returns a cache of the given keys and values.

    Args:
      k_BSKC: the keys of the slots.
      v_BSKC: the values of the slots.
      format: a value of `Decoding.cache`: "compute" keeps the dtype, "int8" rounds.
    """
    return jax.tree.map(lambda x: x.swapaxes(1, 2), _slots_first(k_BSKC, v_BSKC, format))


def _slots_first(k_BSKC: jax.Array, v_BSKC: jax.Array, format: str) -> Any:
    """Returns the fields of a cache with the axes [B, S, K, ...]."""
    if format == "compute":
        return Cache(k_BSKC, v_BSKC)
    (k_BSKC, k_scales_BSK1), (v_BSKC, v_scales_BSK1) = (
        round_inputs(x.astype(jnp.float32), "int8") for x in (k_BSKC, v_BSKC)
    )
    return Cache(k_BSKC, v_BSKC, k_scales_BSK1[..., 0], v_scales_BSK1[..., 0])


def cache_positions(positions_BT: jax.Array, S: int) -> jax.Array:
    """Returns the position in each of S slots of a cache for queries at `positions_BT`, [B, T, S]; below 0: empty.

    For example, with 4 slots and a query at position 5: 4, 5, 2, 3.
    """
    return positions_BT[..., None] - (positions_BT[..., None] - jnp.arange(S)) % S
