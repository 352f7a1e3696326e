"""Parameter nodes: what may stand in the place of a dense array in a tree of parameters.

A node is a dataclass of arrays that makes the dense array, or multiplies by it.  `Linear` multiplies by nodes, other
modules read them by `dense`; so at most one matrix of one layer exists densely, also in the backward pass.  Nodes
compose: an array of a node may be a node itself.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar, dataclass_transform

import flax.linen as nn
import jax
import jax.numpy as jnp

Axes = tuple[str | None, ...]  # the logical axis of each dimension


class Node(ABC):
    """Base of parameter nodes; a subclass is declared by `@node`.

    In a stack of layers each array of a node has the leading layer axis, and `materialize` is called without it.
    """

    trained: ClassVar[tuple[str, ...]] = ()  # names of the arrays that are trained

    arrays: ClassVar[tuple[str, ...]] = ()  # names of all arrays; `node` fills it in

    @abstractmethod
    def materialize(self) -> jax.Array:
        """Returns the dense array that the node represents."""

    def dot(self, x: jax.Array, contract: int, dtype: Any) -> jax.Array:
        """Returns `x @ self.materialize()` over the last `contract` axes of x, computed in `dtype`."""
        return _dot(contract, dtype, self, x)

    @abstractmethod
    def axes(self, axes: Axes, inputs: int) -> dict[str, tuple[Axes, int]]:
        """Returns for each array its logical axes, and how many of them, after "layers", a projection contracts.

        Args:
          axes: those of the dense array.
          inputs: the same of the dense array; 0 for what is not a projection.
        """


def input_axes(axes: Axes, inputs: int) -> slice:
    """Returns where the contracted axes of a projection are among its axes; the first one of what is no projection."""
    first = int(axes[0] == "layers")
    return slice(first, first + max(inputs, 1))


@dataclass_transform(frozen_default=True)
def node(kind: Any) -> Any:
    """Declares a class of nodes: a frozen dataclass whose fields are arrays, or nodes, or `static` values.

    In the paths of parameters the name of an array follows that of the node, as in `mlp/up/kernel/base`.
    """
    kind = dataclasses.dataclass(frozen=True, eq=False)(kind)
    static = [field.name for field in dataclasses.fields(kind) if field.metadata.get("static")]
    arrays = kind.arrays = tuple(field.name for field in dataclasses.fields(kind) if field.name not in static)
    values = lambda value, names: tuple(getattr(value, name) for name in names)
    keys = [jax.tree_util.DictKey(name) for name in arrays]
    jax.tree_util.register_pytree_with_keys(
        kind,
        lambda value: (list(zip(keys, values(value, arrays))), values(value, static)),
        lambda kept, children: kind(**dict(zip(arrays, children)), **dict(zip(static, kept))),
        lambda value: (values(value, arrays), values(value, static)),
    )
    return kind


def static(default: Any = dataclasses.MISSING) -> Any:
    """Returns a field of a node that is no array but a Python value, for each of which programs are compiled."""
    return dataclasses.field(default=default, metadata={"static": True})


def is_node(value: Any) -> bool:
    """Returns whether a value is a parameter node."""
    return isinstance(value, Node)


def dense(value: Any) -> jax.Array:
    """Returns an array as it is, and the dense array of a node."""
    return value.materialize() if isinstance(value, Node) else value


def dot(x: jax.Array, kernel: Any, contract: int, dtype: Any) -> jax.Array:
    """Returns `x[..., I...] @ kernel[I..., O...]`, computed in `dtype`; I are the last `contract` axes of x."""
    if isinstance(kernel, Node):
        return kernel.dot(x, contract, dtype)
    return jnp.tensordot(x.astype(dtype), kernel.astype(dtype), axes=contract)


def parameter(module: nn.Module, name: str, init: Any, shape: tuple[int, ...]) -> Any:
    """Returns a float32 parameter of a module, or the node in its place."""
    found: Any = module.get_variable("params", name)
    return found if is_node(found) else module.param(name, init, shape, jnp.float32)


def array(module: nn.Module, name: str, init: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns a float32 parameter of a module as a dense array."""
    return dense(parameter(module, name, init, shape))


def _product(contract: int, dtype: Any, kernel: Any, x: jax.Array) -> jax.Array:
    return jnp.tensordot(x.astype(dtype), kernel.materialize().astype(dtype), axes=contract)


# The backward pass computes the dense array again, so that none is kept for each layer from the forward pass.
_dot = jax.custom_vjp(_product, nondiff_argnums=(0, 1))


def _dot_forward(contract: int, dtype: Any, kernel: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    return _product(contract, dtype, kernel, x), (kernel, x)


def _dot_backward(contract: int, dtype: Any, kept: Any, gradient: jax.Array) -> Any:
    return jax.vjp(lambda kernel, x: _product(contract, dtype, kernel, x), *kept)[1](gradient)


_dot.defvjp(_dot_forward, _dot_backward)
