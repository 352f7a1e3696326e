"""SparseGPT: removal of weights by their effect on the output, with updates of the others (Frantar and Alistarh 2023).

Inputs are removed in order, in blocks. The error of each removal is compensated by later inputs, for which the inverse
of the Gram matrix gives the optimal update.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.transforms.calibration import inverse_factor
from jaxlm.transforms.masks import Grouping, lowest

BLOCK = 128  # inputs whose removed weights are selected together (section 3.3)


def sparsegpt(weight: jax.Array, gram_LJJ: jax.Array, groups: Grouping) -> jax.Array:
    """Returns the pruned and updated weights of all layers, float32.

    Args:
      weight: [L, I..., O...].
      gram_LJJ: sums of the products of the J inputs, the axes I flattened.
      groups: the grouping; without a pattern, its sparsity holds for each block of inputs.
    """
    L, J, _ = gram_LJJ.shape
    run = jax.jit(lambda *stacked: jax.lax.map(lambda layer: _prune_layer(layer[0], layer[1], groups), stacked))
    return run(weight.astype(jnp.float32).reshape(L, J, -1), gram_LJJ).reshape(weight.shape)


def _prune_layer(W_JO: jax.Array, gram_JJ: jax.Array, groups: Grouping) -> jax.Array:
    """Returns the pruned weights of one matrix."""
    (J, outputs), group = W_JO.shape, groups.pattern[1] if groups.pattern else 1
    size = group * max(1, BLOCK // group)
    blocks = -(-J // size)
    padding = (0, blocks * size - J)
    W_JO = jnp.where(jnp.diagonal(gram_JJ)[:, None] == 0, 0, W_JO)
    R_JJ = jnp.pad(inverse_factor(gram_JJ / jnp.maximum(jnp.diagonal(gram_JJ).mean(), 1e-30)), (padding, padding))
    counts = jnp.asarray(_counts(J, outputs, size, groups))
    row_J1 = jnp.arange(blocks * size)[:, None]

    def prune_block(b: jax.Array, W_JO: jax.Array) -> jax.Array:
        start = b * size
        R_BJ = jax.lax.dynamic_slice_in_dim(R_JJ, start, size)
        W_BO = jax.lax.dynamic_slice_in_dim(W_JO, start, size)
        is_padding_B = jnp.arange(size) + start >= J
        R_BB = jax.lax.dynamic_slice_in_dim(R_BJ, start, size, 1) + jnp.diag(is_padding_B.astype(R_BJ.dtype))
        W_BO, error_BO = _prune_block(W_BO, R_BB, is_padding_B, counts[b], groups)
        later_JO = jnp.dot(R_BJ.T, error_BO, precision="highest")
        W_JO = W_JO - jnp.where(row_J1 >= start + size, later_JO, 0)
        return jax.lax.dynamic_update_slice_in_dim(W_JO, W_BO, start, 0)

    return jax.lax.fori_loop(0, blocks, prune_block, jnp.pad(W_JO, (padding, (0, 0))))[:J]


def _counts(J: int, outputs: int, size: int, groups: Grouping) -> np.ndarray:
    """Returns the number of removed weights in each group of each block of inputs; their sum is exact."""
    if groups.pattern:
        return np.full(-(-J // size), groups.pattern[1] - groups.pattern[0], np.int32)
    ends = np.minimum(np.arange(0, J + size, size), J)
    return np.diff([round(groups.sparsity * int(end) * (outputs if groups.scope == "layer" else 1)) for end in ends])


def _prune_block(
    W_BO: jax.Array, R_BB: jax.Array, is_padding_B: jax.Array, count: jax.Array, groups: Grouping
) -> tuple[jax.Array, jax.Array]:
    """Returns the pruned weights of a block of inputs, and the errors divided by the diagonal of R."""
    diagonal_B1 = jnp.diagonal(R_BB)[:, None]

    def select(W_BO: jax.Array, diagonal_B1: jax.Array, is_padding_B: jax.Array) -> jax.Array:
        scores_BO = jnp.where(is_padding_B[:, None], jnp.inf, jnp.square(W_BO / diagonal_B1))
        return lowest({"": scores_BO[None]}, {"": 1}, groups, {"": count})[""][0]

    def prune_input(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        W_BO, error_BO, removed_BO = state
        error_O = jnp.where(removed_BO[j], W_BO[j], 0) / diagonal_B1[j]
        return W_BO - R_BB[j][:, None] * error_O, error_BO.at[j].set(error_O), removed_BO

    if groups.pattern is None:
        state = W_BO, jnp.zeros_like(W_BO), select(W_BO, diagonal_B1, is_padding_B)
        W_BO, error_BO, removed_BO = jax.lax.fori_loop(0, len(W_BO), prune_input, state)
        return jnp.where(removed_BO, 0, W_BO), error_BO
    size = groups.pattern[1]

    def prune_group(g: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Selects in one group after the updates by all earlier groups."""
        W_BO, error_BO, removed_BO = state
        part = partial(jax.lax.dynamic_slice_in_dim, start_index=g * size, slice_size=size)
        removed = select(*map(part, (W_BO, diagonal_B1, is_padding_B)))
        removed_BO = jax.lax.dynamic_update_slice_in_dim(removed_BO, removed, g * size, 0)
        return jax.lax.fori_loop(g * size, (g + 1) * size, prune_input, (W_BO, error_BO, removed_BO))

    state = W_BO, jnp.zeros_like(W_BO), jnp.zeros(W_BO.shape, bool)
    W_BO, error_BO, removed_BO = jax.lax.fori_loop(0, len(W_BO) // size, prune_group, state)
    return jnp.where(removed_BO, 0, W_BO), error_BO
