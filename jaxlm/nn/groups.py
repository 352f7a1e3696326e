"""The positions of a batch in groups, one for each part that the mesh splits them into.

A loop over positions that reads a sharded parameter gathers it in each iteration, and sums its gradient over the
devices in each iteration. With a copy of the parameters for each group, such a loop communicates nothing: the
parameters are gathered once before it, and the gradients of the copies are summed once after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.devices.sharding import RULES, Placement, spec
from jaxlm.nn import parameters
from jaxlm.nn.nodes import is_matrix, is_node


class Groups:
    """The positions [B, T] of a batch in M groups: each has the rows and the length of one part of the mesh.

    Attributes:
      size: number of groups, M.
      inside: the placement of the activations of one group, whose rows and length are not split.
    """

    def __init__(self, placement: Placement, B: int, T: int):
        """Groups a batch of these sizes. An axis that the mesh does not divide is not split."""
        sizes = {"batch": B, "length": T}
        ways = {axis: placement.ways(axis) for axis, size in sizes.items() if size % placement.ways(axis) == 0}
        self._rows, self._lengths = ways.get("batch", 1), ways.get("length", 1)
        self.size = self._rows * self._lengths
        self._mesh = placement.mesh
        split = (name for axis in ways for name in RULES[axis])
        self._names = tuple(name for name in split if self._mesh and self._mesh.shape.get(name, 1) > 1)
        whole = tuple(axis for axis, names in RULES.items() if set(names) & set(self._names))
        self.inside = dataclasses.replace(placement, whole=whole)

    def map(self, function: Callable[..., Any], params: Any, x_BTD: jax.Array, *arrays_BT: jax.Array) -> Any:
        """Returns the results [M, ...] of `function(params, x_BTD, *arrays_BT)` for the positions of each group.

        Each group has a copy of the parameters. The devices exchange matrices in the dtype of `x_BTD`, and their
        gradients in the dtype of the parameters.

        Args:
          function: a function whose arrays have the placement `inside`.
          params: parameters at the paths of a model.
          x_BTD: hidden states of the batch.
          arrays_BT: other arrays of the batch.
        """
        if self.size == 1:
            return jax.tree.map(lambda x: x[None], function(params, x_BTD, *arrays_BT))

        def copy(value: Any, rows: Any) -> Any:
            dtype = x_BTD.dtype if is_matrix(value) else None
            return jax.tree.map(lambda leaf, row: self._copy(leaf, row.axes, dtype), value, rows)

        copies = jax.tree.map(copy, params, parameters.rows(params), is_leaf=is_node)
        arrays = map(self._split, (x_BTD, *arrays_BT))
        return jax.vmap(function, spmd_axis_name=self._names)(copies, *arrays)

    def merge(self, x_MBT: jax.Array) -> jax.Array:
        """Returns an array [B, T, ...] from the parts of the groups [M, B / rows, T / lengths, ...]."""
        _, b, t, *rest = x_MBT.shape
        x = jnp.moveaxis(x_MBT.reshape(self._rows, self._lengths, b, t, *rest), 1, 2)
        return x.reshape(self._rows * b, self._lengths * t, *rest)

    def _split(self, x_BT: jax.Array) -> jax.Array:
        B, T, *rest = x_BT.shape
        b, t = B // self._rows, T // self._lengths
        x = jnp.moveaxis(x_BT.reshape(self._rows, b, self._lengths, t, *rest), 2, 1)
        return x.reshape(self.size, b, t, *rest)

    def _copy(self, leaf: jax.Array, axes: tuple[str | None, ...], dtype: Any) -> jax.Array:
        """Returns the copies [M, ...] of a parameter with these logical axes, rounded to `dtype` if there is one."""
        assert self._mesh is not None
        others = [name for name in self._mesh.axis_names if name not in self._names]
        gathered = spec(axes, others)
        place = lambda x, spec: jax.lax.with_sharding_constraint(x, NamedSharding(self._mesh, spec))

        def copy(leaf: jax.Array) -> jax.Array:
            whole = place(leaf if dtype is None else leaf.astype(dtype), gathered)
            copies = jnp.broadcast_to(whole, (self.size, *leaf.shape))
            return place(copies, PartitionSpec(self._names, *gathered)).astype(leaf.dtype)

        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return copy(leaf)
        add = lambda gradients: place(gradients.sum(0), spec(axes, self._mesh.axis_names))
        with_gradient = jax.custom_vjp(copy)
        with_gradient.defvjp(lambda leaf: (copy(leaf), None), lambda _, gradients: (add(gradients),))
        return with_gradient(leaf)
