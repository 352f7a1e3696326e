"""Parameter nodes: parameters in another form than a dense array, such as a low-rank update or quantised values.

A node is a dataclass of arrays that can compute the dense array, or multiply by it. `Linear` multiplies by nodes; other
modules convert them with `dense`. At most one dense matrix of one layer exists at a time, also in the backward pass.
Nodes can be nested: an array of a node may itself be a node.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from functools import partial
from itertools import takewhile
from typing import Any, ClassVar, dataclass_transform

import flax.linen as nn
import jax
import jax.numpy as jnp

Axes = tuple[str | None, ...]  # the logical axis of each dimension


class Node(ABC):
    """Base class of parameter nodes; subclasses use the decorator `@node`.

    In a stack of layers each array of a node has a leading layer axis, and that of experts an axis after it. But
    `materialize` receives the arrays of one matrix, without these axes.

    Attributes:
      trained: names of the arrays that are trained.
      arrays: names of all arrays, set by `@node`.
      dropout: dropout rate of the inputs of the trained part, in a projection.
    """

    trained: ClassVar[tuple[str, ...]] = ()
    arrays: ClassVar[tuple[str, ...]] = ()
    dropout: float = 0.0

    @abstractmethod
    def materialize(self) -> jax.Array:
        """Returns the dense array that the node represents."""

    def dot(self, x: jax.Array, contract: int, dtype: Any, dropped: jax.Array | None = None) -> jax.Array:
        """Returns `x @ self.materialize()` over the last `contract` axes of x, computed in `dtype`.

        The backward pass is that of the dense array, which it computes again.

        Args:
          x: the inputs.
          contract: number of contracted axes.
          dtype: dtype of the product.
          dropped: the inputs after dropout with the rate `dropout`; None: without dropout.
        """
        return _dot(contract, dtype, self, x)

    def product(self, x: jax.Array, contract: int, dtype: Any) -> jax.Array:
        """Returns the forward pass of `dot`."""
        return _product(contract, dtype, self, x)

    def rows(self, ids: jax.Array) -> jax.Array:
        """Returns `self.materialize()[ids]`."""
        return self.materialize()[ids]

    @abstractmethod
    def axes(self, axes: Axes, inputs: int) -> dict[str, tuple[Axes, int]]:
        """Returns for each array its logical axes, and the number of axes after "layers" that a projection contracts.

        Args:
          axes: logical axes of the dense array.
          inputs: number of contracted axes of the dense array; 0 if it is not a projection.
        """


def input_axes(axes: Axes, inputs: int) -> slice:
    """Returns the slice of the contracted axes of a projection; for other parameters, the first axis."""
    first = stacked_axes(axes)
    return slice(first, first + max(inputs, 1))


def stacked_axes(axes: Axes) -> int:
    """Returns the number of leading axes with one matrix for each index: those of layers and of experts."""
    return sum(1 for _ in takewhile(lambda axis: axis in ("layers", "experts"), axes))


@dataclass_transform(frozen_default=True)
def node(kind: Any) -> Any:
    """Turns a class into a parameter node: a frozen dataclass with fields that are arrays, nodes or `static` values.

    The path of an array is the path of the node and the name of its field, such as `mlp/up/kernel/base`.
    """
    kind = dataclasses.dataclass(frozen=True, eq=False)(kind)
    static = [field.name for field in dataclasses.fields(kind) if field.metadata.get("static")]
    arrays = kind.arrays = tuple(field.name for field in dataclasses.fields(kind) if field.name not in static)
    values = lambda value, names: tuple(getattr(value, name) for name in names)
    keys = [jax.tree_util.DictKey(name) for name in arrays]
    jax.tree_util.register_pytree_with_keys(
        kind,
        lambda value: (list(zip(keys, values(value, arrays))), values(value, static)),
        lambda static_values, children: kind(**dict(zip(arrays, children)), **dict(zip(static, static_values))),
        lambda value: (values(value, arrays), values(value, static)),
    )
    return kind


def static(default: Any = dataclasses.MISSING) -> Any:
    """Returns a field for a Python value instead of an array; a program is compiled for each value."""
    return dataclasses.field(default=default, metadata={"static": True})


def is_node(value: Any) -> bool:
    """Returns whether a value is a parameter node."""
    return isinstance(value, Node)


def dense(value: Any) -> jax.Array:
    """Returns the dense array of a node; an array is returned unchanged."""
    return value.materialize() if isinstance(value, Node) else value


def of_layer(value: Any, layer: int | tuple[int, ...], stacked: int = 0) -> jax.Array:
    """Returns the dense array of one layer of a stacked array or node, or of one index along several axes.

    Args:
      value: the array or node.
      layer: the index.
      stacked: number of axes after the index that also have one matrix for each index.
    """
    return dense_layers(jax.tree.map(lambda leaf: leaf[layer], value), stacked)


def dense_layers(value: Any, stacked: int = 1) -> jax.Array:
    """Returns the dense array of an array or node with `stacked` leading axes, [L, ...], computed matrix by matrix."""
    if not stacked or not is_node(value):
        return dense(value)
    return jax.lax.map(partial(dense_layers, stacked=stacked - 1), value)


def dense_like(value: Any, stacked: int) -> Any:
    """Returns an object with the shape and the dtype of the dense array, which has `stacked` leading axes."""
    return jax.eval_shape(partial(dense_layers, stacked=stacked), value) if is_node(value) else value


def is_matrix(value: Any) -> bool:
    """Returns whether a parameter is an array that products round to their dtype, unlike biases and scales."""
    return not is_node(value) and value.ndim > 1


def dot(x: jax.Array, kernel: Any, contract: int, dtype: Any, dropped: jax.Array | None = None) -> jax.Array:
    """Returns `x[..., I...] @ kernel[I..., O...]`, computed in `dtype`; I are the last `contract` axes of x.

    `dropped` are the inputs after the dropout of a node; None: without dropout.
    """
    if isinstance(kernel, Node):
        return kernel.dot(x, contract, dtype, dropped)
    return jnp.tensordot(x.astype(dtype), kernel.astype(dtype), axes=contract)


def rows(table: Any, ids: jax.Array) -> jax.Array:
    """Returns `table[ids]` of an array or node [V, ...], dense; a node may compute only these rows."""
    return table.rows(ids) if isinstance(table, Node) else table[ids]


def parameter(module: nn.Module, name: str, init: Any, shape: tuple[int, ...]) -> Any:
    """Returns a float32 parameter of a module, or the node that replaces it."""
    value: Any = module.get_variable("params", name)
    return value if is_node(value) else module.param(name, init, shape, jnp.float32)


def array(module: nn.Module, name: str, init: Any, shape: tuple[int, ...], stacked: int = 0) -> jax.Array:
    """Returns a float32 parameter of a module, with `stacked` axes of matrices, as a dense array."""
    value = parameter(module, name, init, shape)
    return jax.vmap(dense)(value) if stacked else dense(value)


def _product(contract: int, dtype: Any, kernel: Any, x: jax.Array) -> jax.Array:
    return jnp.tensordot(x.astype(dtype), kernel.materialize().astype(dtype), axes=contract)


# The backward pass recomputes the dense array, so that the forward pass keeps none of them.
@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dot(contract: int, dtype: Any, kernel: Any, x: jax.Array) -> jax.Array:
    return kernel.product(x, contract, dtype)


def _dot_forward(contract: int, dtype: Any, kernel: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    return kernel.product(x, contract, dtype), (kernel, x)


def _dot_backward(contract: int, dtype: Any, residuals: Any, gradient: jax.Array) -> Any:
    return jax.vjp(lambda kernel, x: _product(contract, dtype, kernel, x), *residuals)[1](gradient)


_dot.defvjp(_dot_forward, _dot_backward)
