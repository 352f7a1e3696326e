"""Low-rank updates of frozen matrices (Hu et al. 2022): W + scale A B, with A and B trained."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.errors import UserError
from jaxlm.nn import nodes, parameters


@nodes.node
class LowRank(nodes.Node):
    """`base[I..., O...] + scale a[I..., r] b[r, O...]`."""

    base: Any  # array or node; frozen
    a: jax.Array
    b: jax.Array
    scale: float = nodes.static(1.0)

    trained = ("a", "b")

    def materialize(self) -> jax.Array:
        """Returns the updated matrix."""
        base = nodes.dense(self.base)
        return base + (self.scale * jnp.tensordot(self.a, self.b, 1)).astype(base.dtype)

    def dot(self, x: jax.Array, contract: int, dtype: Any) -> jax.Array:
        """Returns the product by base and by the update, which is never made as a matrix."""
        low = jnp.tensordot(x.astype(dtype), self.a.astype(dtype), axes=contract)
        update = jnp.tensordot(low, self.b.astype(dtype), axes=1)
        return nodes.dot(x, self.base, contract, dtype) + jnp.asarray(self.scale, dtype) * update

    def axes(self, axes: nodes.Axes, inputs: int) -> dict[str, tuple[nodes.Axes, int]]:
        """Returns the axes of base, a and b; a has those of the inputs, b those of the outputs."""
        inner = nodes.input_axes(axes, inputs)
        return {
            "base": (axes, inputs),
            "a": ((*axes[: inner.stop], None), inputs),
            "b": ((*axes[: inner.start], None, *axes[inner.stop :]), int(inputs > 0)),
        }


def add_low_rank(params: Any, pattern: str, rank: int, key: jax.Array, scale: float = 1.0) -> Any:
    """Returns parameters with a `LowRank` node in the place of each projection whose path matches.

    Args:
      params: of a `Transformer`, stacked.
      pattern: regular expression of whole paths, such as `decoder/layers/attention/(query|value)/kernel`.
      rank: r.
      key: draws A, with the deviation 1 / sqrt(inputs); B is zero, so that the model computes what it did.
      scale: of the update.

    Raises:
      UserError: where no projection matches.
    """
    rows = parameters.rows_by_path(params)
    chosen = [path for path, row in rows.items() if row.inputs and re.fullmatch(pattern, path)]
    if not chosen:
        raise UserError(f"no projection matches {pattern!r}; the paths are such as {', '.join(list(rows)[:3])}")

    def with_node(key_path: tuple[Any, ...], leaf: Any) -> Any:
        path = parameters.path_of(key_path)
        if path not in chosen:
            return leaf
        inner = nodes.input_axes(rows[path].axes, rows[path].inputs)
        own_key = jax.random.fold_in(key, chosen.index(path))
        a = jax.random.normal(own_key, (*leaf.shape[: inner.stop], rank), jnp.float32)
        b = jnp.zeros((*leaf.shape[: inner.start], rank, *leaf.shape[inner.stop :]), jnp.float32)
        return LowRank(leaf, a / math.sqrt(math.prod(leaf.shape[inner])), b, scale)

    return jax.tree_util.tree_map_with_path(with_node, params)
