"""The nodes that replace projections in a run: low-rank updates of an adapter, or weights that are rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxlm.config import RunConfig
from jaxlm.nn import nodes, parameters
from jaxlm.nn.quantized import FakeQuantized
from jaxlm.transforms import adapters, quantization


class Nodes(NamedTuple):
    """The nodes of a run.

    Attributes:
      rows: the rows of the projections that they replace, by path.
      make: (row, array [L, I..., O...], key) -> the node with the array.
    """

    rows: dict[str, parameters.Parameter]
    make: Callable[[parameters.Parameter, jax.Array, jax.Array], Any]

    def add(self, params: Any, key: jax.Array) -> Any:
        """Returns the parameters with the nodes."""

        def replace(key_path: tuple[Any, ...], leaf: jax.Array) -> Any:
            row = self.rows.get(parameters.path_of(key_path))
            return leaf if row is None else self.make(row, leaf, key)

        return jax.tree_util.tree_map_with_path(replace, params)


def nodes_of(run: RunConfig, params: Any) -> Nodes:
    """Returns the nodes of a run.

    Args:
      run: its `adapter` and `quantize`; at most one of them is set.
      params: shapes of the parameters as arrays.

    Raises:
      UserError: if no projection matches the targets, the rank is larger than a matrix, or a group does not divide the
        inputs.
    """
    if run.quantize.weights == "float":
        return Nodes(adapters.select(params, run.adapter), lambda *leaf: adapters.low_rank(run.adapter, *leaf))
    config, leaves = run.quantize, parameters.by_path(params)
    paths = parameters.projections(params, config.targets)
    given = None if config.group < 0 else config.group
    group = quantization.choose_group(given, config.weights, paths, {path: leaves[path] for path in paths})
    how: dict[str, Any] = {"weights": config.weights, "group": group, "symmetric": config.symmetric}
    how |= {"input_format": config.inputs}
    rows = {path: row._replace(path=path) for path in paths if (row := parameters.find(path))}
    return Nodes(rows, lambda row, leaf, key: FakeQuantized(leaf, inputs=row.inputs, **how))


def finish(params: Any) -> Any:
    """Returns the parameters that a run exports: rounded weights are quantised."""
    quantize = lambda leaf: leaf.quantize() if isinstance(leaf, FakeQuantized) else leaf
    return jax.tree.map(quantize, params, is_leaf=nodes.is_node)
