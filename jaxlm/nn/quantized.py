"""8-bit arrays with a scale for each output."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn import nodes


@nodes.node
class Quantized(nodes.Node):
    """`values * scales`: integers from -127 to 127 and a scale for each output."""

    values: jax.Array  # int8
    scales: jax.Array  # float32, the shape of the array with size 1 for the contracted axes

    def materialize(self) -> jax.Array:
        """Returns the dequantised array, float32."""
        return self.values.astype(jnp.float32) * self.scales

    def axes(self, axes: nodes.Axes, inputs: int) -> dict[str, tuple[nodes.Axes, int]]:
        """Returns the axes of the dense array; scales are not sharded along contracted axes."""
        inner = nodes.input_axes(axes, inputs)
        outputs = (None if inner.start <= n < inner.stop else axis for n, axis in enumerate(axes))
        return {"values": (axes, 0), "scales": (tuple(outputs), 0)}


def quantize(array: Any, inputs: int = 1, stacked: bool = True) -> Quantized:
    """Returns an 8-bit matrix, with each output scaled by its largest weight (absmax).

    Source: Dettmers et al. 2022, section 2.1.

    Args:
      array: [L, I..., O...], or [I..., O...] if it is not stacked.
      inputs: number of axes I.
      stacked: whether the first axis is that of layers.
    """
    axes = tuple(range(int(stacked), int(stacked) + inputs))
    largest = jnp.abs(array).max(axes, keepdims=True)
    scales = jnp.where(largest > 0, largest / 127, 1).astype(jnp.float32)
    return Quantized(jnp.round(array / scales).astype(jnp.int8), scales)
