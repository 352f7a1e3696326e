"""Adds low-rank updates to the projections of a model (LoRA; Hu et al. 2022)."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.errors import UserError
from jaxlm.nn import nodes, parameters
from jaxlm.nn.low_rank import LowRank


def add_low_rank(params: Any, pattern: str, rank: int, key: jax.Array, scale: float = 1.0) -> Any:
    """Returns parameters with a `LowRank` node in place of each projection with a matching path.

    Args:
      params: stacked parameters of a `Transformer`.
      pattern: regular expression for whole paths, such as `decoder/layers/attention/(query|value)/kernel`.
      rank: the rank r of the update.
      key: random key for A, which has the standard deviation 1 / sqrt(inputs). B is zero, so that the outputs of the
        model do not change.
      scale: factor of the update.

    Raises:
      UserError: no projection matches.
    """
    rows = parameters.rows_by_path(params)
    matching = [path for path, row in rows.items() if row.inputs and re.fullmatch(pattern, path)]
    if not matching:
        raise UserError(f"no projection matches {pattern!r}; examples of paths: {', '.join(list(rows)[:3])}")

    def with_node(key_path: tuple[Any, ...], leaf: Any) -> Any:
        path = parameters.path_of(key_path)
        if path not in matching:
            return leaf
        inner = nodes.input_axes(rows[path].axes, rows[path].inputs)
        leaf_key = jax.random.fold_in(key, matching.index(path))
        a = jax.random.normal(leaf_key, (*leaf.shape[: inner.stop], rank), jnp.float32)
        b = jnp.zeros((*leaf.shape[: inner.start], rank, *leaf.shape[inner.stop :]), jnp.float32)
        return LowRank(leaf, a / math.sqrt(math.prod(leaf.shape[inner])), b, scale)

    return jax.tree_util.tree_map_with_path(with_node, params)
