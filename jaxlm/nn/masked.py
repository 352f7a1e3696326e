"""Arrays with some entries fixed at zero, as after pruning."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.nn import nodes


@nodes.node
class Masked(nodes.Node):
    """`values * mask`: entries where the mask is False are zero and stay zero in training."""

    values: jax.Array
    mask: jax.Array  # bool, the same shape

    trained = ("values",)

    def materialize(self) -> jax.Array:
        """Returns the values, with zeros where the mask is False."""
        return jnp.where(self.mask, nodes.dense(self.values), 0)

    def axes(self, axes: nodes.Axes, inputs: int) -> dict[str, tuple[nodes.Axes, int]]:
        """Returns the axes of the dense array for values and mask."""
        return {"values": (axes, inputs), "mask": (axes, 0)}
