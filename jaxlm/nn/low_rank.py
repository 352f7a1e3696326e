"""Low-rank updates of matrices (LoRA; Hu et al. 2022): W + scale A B, with trained A and B."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn import nodes


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
        """Returns the product of x with the updated matrix, without computing the matrix A B."""
        low = jnp.tensordot(x.astype(dtype), self.a.astype(dtype), axes=contract)
        update = jnp.tensordot(low, self.b.astype(dtype), axes=1)
        return nodes.dot(x, self.base, contract, dtype) + jnp.asarray(self.scale, dtype) * update

    def axes(self, axes: nodes.Axes, inputs: int) -> dict[str, tuple[nodes.Axes, int]]:
        """Returns the axes of base, a and b: a has the input axes, b the output axes."""
        inner = nodes.input_axes(axes, inputs)
        return {
            "base": (axes, inputs),
            "a": ((*axes[: inner.stop], None), inputs),
            "b": ((*axes[: inner.start], None, *axes[inner.stop :]), int(inputs > 0)),
        }
