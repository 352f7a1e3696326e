"""Low-rank updates of matrices, with trained factors A and B (LoRA) and, if wanted, trained magnitudes (DoRA)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn import nodes


@nodes.node
class LowRank(nodes.Node):
    """`base[I..., O...] + scale a[I..., r] b[r, O...]`; with magnitudes, each output is scaled to its magnitude.

    Source: Hu et al. 2022 (LoRA), equation 3; Liu et al. 2024 (DoRA), equation 5.

    Attributes:
      base: an array or a node; frozen.
      a: [I..., r].
      b: [r, O...].
      magnitude: the norm of each output's column, [O...]; None: the columns keep the norms of the sum.
      scale: factor of the update.
      dropout: dropout rate of the inputs of `a`.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    magnitude: jax.Array | None = None
    scale: float = nodes.static(1.0)
    dropout: float = nodes.static(0.0)

    trained = ("a", "b", "magnitude")

    def materialize(self) -> jax.Array:
        """Returns the updated matrix."""
        updated = self._sum()
        if self.magnitude is None:
            return updated
        return (updated * self._factors(self.magnitude, updated)).astype(updated.dtype)

    def dot(self, x: jax.Array, contract: int, dtype: Any, dropped: jax.Array | None = None) -> jax.Array:
        """Returns the product of x with the updated matrix, without computing the matrix A B, except for magnitudes."""
        low = jnp.tensordot((x if dropped is None else dropped).astype(dtype), self.a.astype(dtype), axes=contract)
        update = jnp.tensordot(low, self.b.astype(dtype), axes=1)
        y = nodes.dot(x, self.base, contract, dtype) + jnp.asarray(self.scale, dtype) * update
        return y if self.magnitude is None else y * self._factors(self.magnitude, self._sum()).astype(dtype)

    def _sum(self) -> jax.Array:
        base = nodes.dense(self.base)
        return base + (self.scale * jnp.tensordot(self.a, self.b, 1)).astype(base.dtype)

    def _factors(self, magnitude: jax.Array, updated: jax.Array) -> jax.Array:
        """Returns the factor of each output. Its norm is a constant for the gradient (Liu et al. 2024, section 4.3)."""
        return magnitude / jax.lax.stop_gradient(column_norms(updated, self.a.ndim - 1))

    def axes(self, axes: nodes.Axes, inputs: int) -> dict[str, tuple[nodes.Axes, int]]:
        """Returns the axes of the arrays: a has the input axes, b and magnitude the output axes."""
        inner = nodes.input_axes(axes, inputs)
        return {
            "base": (axes, inputs),
            "a": ((*axes[: inner.stop], None), inputs),
            "b": ((*axes[: inner.start], None, *axes[inner.stop :]), int(inputs > 0)),
            "magnitude": ((*axes[: inner.start], *axes[inner.stop :]), 0),
        }


def column_norms(kernel: jax.Array, inputs: int) -> jax.Array:
    """Returns the norm of the weights of each output, [O...] float32, of a kernel [I..., O...] with `inputs` axes I."""
    return jnp.sqrt(jnp.square(kernel.astype(jnp.float32)).sum(range(inputs)))


def without_updates(params: Any) -> Any:
    """Returns a parameter tree with the base of each low-rank update in its place."""
    is_update = lambda value: isinstance(value, LowRank)
    return jax.tree.map(lambda leaf: leaf.base if is_update(leaf) else leaf, params, is_leaf=is_update)
