"""Weights of 8 or 4 bits with scales: integers, levels of a normal distribution (QLoRA) or 8-bit floats.

The inputs of each output are divided into groups of consecutive inputs. Each group has a scale. With one group, there
is one scale for each output.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxlm.errors import UserError
from jaxlm.nn import nodes

Weights = Literal["int8", "int4", "nf4", "fp8"]
FORMATS: tuple[str, ...] = get_args(Weights)
DTYPES = {"int8": jnp.int8, "int4": jnp.int4, "nf4": jnp.uint4, "fp8": jnp.float8_e4m3fn}  # of the stored values
_BITS = {"int8": 8, "int4": 4}
_FP8_MAX = 448.0
InputFormat = Literal["float", "int8", "fp8"]  # float: inputs are not rounded
_LARGEST_INPUT = {"int8": 127.0, "fp8": _FP8_MAX}  # the value of the largest input; half the range of int8 is 127.5
# The 16 levels of NF4: quantiles of a normal distribution, scaled to [-1, 1] (Dettmers et al. 2023, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@nodes.node
class Quantized(nodes.Node):
    """`(values - zeros) * scales`; for NF4, values are the numbers of levels.

    The contracted axes I of the array are `inputs` axes from axis `first` on. In `scales` and `zeros` one axis of G
    groups replaces them: an array [I..., O...] has scales [G, O...], and a table [V, D] of embeddings (`first` = 1) has
    scales [V, G].
    """

    values: jax.Array  # int8, int4, uint4 (NF4) or float8_e4m3fn; the shape of the array
    scales: jax.Array  # float32
    zeros: Any = None  # the value that represents 0, in the dtype of the values; None: 0
    input_scale: Any = None  # float32 scalar, the calibrated scale of rounded inputs; None: computed for each token
    first: int = nodes.static(0)
    inputs: int = nodes.static(1)
    input_format: InputFormat = nodes.static("float")  # the values to which inputs are rounded before the product

    @property
    def weights(self) -> str:
        """The format, an entry of `FORMATS`."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.values.dtype)

    def materialize(self) -> jax.Array:
        """Returns the dequantised array, float32."""
        return _dequantize(self.values, self.scales, self.zeros, self.first, self.inputs)

    def rows(self, ids: jax.Array) -> jax.Array:
        """Returns the dequantised rows of a table, [..., D]."""
        if self.first == 0:
            return self.materialize()[ids]
        zeros = None if self.zeros is None else self.zeros[ids]
        return _dequantize(self.values[ids], self.scales[ids], zeros, self.first - 1 + ids.ndim, self.inputs)

    def product(self, x: jax.Array, contract: int, dtype: Any) -> jax.Array:
        """Returns the product of x with the matrix; scales of outputs multiply the result."""
        if self.input_format != "float":
            return self._rounded_product(x, contract).astype(dtype)
        if len(self.scales) > 1 or self.zeros is not None or self.weights == "nf4":
            return super().product(x, contract, dtype)
        matrix = self.values.astype(jnp.float32).astype(dtype)
        y = jnp.tensordot(x.astype(dtype), matrix, axes=contract, preferred_element_type=jnp.float32)
        return (y * self.scales[0]).astype(dtype)

    def _rounded_product(self, x: jax.Array, contract: int) -> jax.Array:
        """Returns the float32 product of 8-bit inputs and values.

        Integers are multiplied with 32-bit sums (Dettmers et al. 2022). Products of 8-bit floats are exact in float32.
        """
        groups, outputs = len(self.scales), self.values.shape[contract:]
        x_BI = x.astype(jnp.float32).reshape(-1, math.prod(x.shape[x.ndim - contract :]))
        x_BI, scale = round_inputs(x_BI, self.input_format, self.input_scale)
        kind, sums = (jnp.int8, jnp.int32) if self.input_format == "int8" else (jnp.float32, jnp.float32)
        x_GBg = x_BI.astype(kind).reshape(len(x_BI), groups, -1).swapaxes(0, 1)
        values_GgO = self.values.astype(kind).reshape(*x_GBg.shape[::2], -1)
        y_GBO = jnp.einsum("GBg,GgO->GBO", x_GBg, values_GgO, preferred_element_type=sums)
        if self.zeros is not None:
            sums_GB = x_GBg.astype(sums).sum(-1)
            y_GBO -= sums_GB[..., None] * self.zeros.astype(sums).reshape(groups, 1, -1)
        y_BO = (y_GBO.astype(jnp.float32) * self.scales.reshape(groups, 1, -1)).sum(0) * scale
        return y_BO.reshape(*x.shape[: x.ndim - contract], *outputs)

    def axes(self, axes: nodes.Axes, inputs: int) -> dict[str, tuple[nodes.Axes, int]]:
        """Returns the axes of the dense array for values; scales and zeros are not sharded along groups."""
        layers = nodes.stacked_axes(axes)
        start = layers + self.first
        groups = (*axes[:start], None, *axes[start + self.inputs :])
        return {"values": (axes, 0), "scales": (groups, 0), "zeros": (groups, 0), "input_scale": (axes[:layers], 0)}


def is_quantized(value: Any) -> bool:
    """Returns whether a parameter is quantised, also as the base of another node."""
    inner = (getattr(value, name) for name in value.arrays) if nodes.is_node(value) else ()
    return isinstance(value, Quantized) or any(map(is_quantized, inner))


@nodes.node
class FakeQuantized(nodes.Node):
    """Trained weights that are rounded to a quantised format in the forward pass (Jacob et al. 2018, section 3).

    The gradient of the rounded weights is applied to the weights (straight-through; Bengio et al. 2013).
    """

    array: jax.Array  # [I..., O...], float
    first: int = nodes.static(0)
    inputs: int = nodes.static(1)
    weights: str = nodes.static("int8")
    group: int = nodes.static(0)
    symmetric: bool = nodes.static(True)
    input_format: InputFormat = nodes.static("float")

    trained = ("array",)

    def materialize(self) -> jax.Array:
        """Returns the rounded weights."""
        rounded = self.quantize(stacked=False).materialize().astype(self.array.dtype)
        return self.array + jax.lax.stop_gradient(rounded - self.array)

    def product(self, x: jax.Array, contract: int, dtype: Any) -> jax.Array:
        """Returns the product of x, which is rounded like the inputs of the quantised node, with the matrix."""
        if self.input_format == "float":
            return super().product(x, contract, dtype)
        return self.quantize(stacked=False).product(x, contract, dtype)

    def quantize(self, stacked: bool = True) -> Quantized:
        """Returns the quantised node with the same outputs.

        Args:
          stacked: whether the first axis of the array is that of layers.
        """
        how = {name: getattr(self, name) for name in ("weights", "group", "symmetric", "first")}
        node = quantize(self.array, self.inputs, stacked, **how)
        return dataclasses.replace(node, input_format=self.input_format)

    def axes(self, axes: nodes.Axes, inputs: int) -> dict[str, tuple[nodes.Axes, int]]:
        """Returns the axes of the dense array."""
        return {"array": (axes, inputs)}


def quantize(
    array: Any,
    inputs: int = 1,
    stacked: bool = True,
    *,
    weights: str = "int8",
    group: int = 0,
    symmetric: bool = True,
    first: int = 0,
) -> Quantized:
    """Returns an array with each entry rounded to the nearest value of its group.

    The scale of a group depends on its largest weight (absmax; Dettmers et al. 2022, section 2.1), or on its range.

    Args:
      array: [L, I..., O...], or [I..., O...] if it is not stacked.
      inputs: number of axes I.
      stacked: whether the first axis is that of layers.
      weights: the format, an entry of `FORMATS`.
      group: number of inputs in a group; 0: all.
      symmetric: whether the value 0 represents 0; if not, each group of integers has a zero point.
      first: number of axes before I in addition to the layers: 1 for a table [V, D] of embeddings.

    Raises:
      UserError: if the group does not divide the number of inputs.
    """
    axis = int(stacked) + first
    grouped = split_groups(array, axis, inputs, group)
    scales, zeros = find_scales(grouped, axis + 1, weights, symmetric)
    values = round_to_values(grouped, scales, zeros, weights)
    zeros = None if zeros is None else jnp.squeeze(zeros, axis + 1)
    return Quantized(values.reshape(array.shape), jnp.squeeze(scales, axis + 1), zeros, None, first, inputs)


def split_groups(array: Any, axis: int, inputs: int, group: int) -> Any:
    """Returns the array with its `inputs` axes from `axis` on reshaped to [G, g], where g is the size of a group."""
    size = math.prod(array.shape[axis : axis + inputs])
    group = group or size
    if size % group:
        divisors = [str(n) for n in range(2, size + 1) if size % n == 0]
        raise UserError(
            f"group is {group}, which does not divide the {size} inputs of a projection; "
            f"choose one of {', '.join(divisors[-12:])}"
        )
    return array.reshape(*array.shape[:axis], size // group, group, *array.shape[axis + inputs :])


def find_scales(grouped: Any, axis: int, weights: str, symmetric: bool = True) -> tuple[jax.Array, jax.Array | None]:
    """Returns the scales and zero points of groups, with size 1 along `axis`, the axis of the inputs of a group."""
    grouped = jnp.asarray(grouped, jnp.float32)
    if not symmetric:
        if weights not in _BITS:
            raise UserError(f"symmetric is False, but {weights} has no zero points; use int8 or int4")
        steps = 2 ** _BITS[weights] - 1
        low = jnp.minimum(grouped.min(axis, keepdims=True), 0)
        high = jnp.maximum(grouped.max(axis, keepdims=True), 0)
        scales = jnp.where(high > low, (high - low) / steps, 1)
        return scales, (jnp.round(-low / scales) - (steps + 1) // 2).astype(DTYPES[weights])
    largest = jnp.abs(grouped).max(axis, keepdims=True)
    # The largest integer of 4 bits is 7, and the smallest is -8: a step of 1/7.5 divides the range evenly.
    limit = {"int8": 127, "int4": 7.5, "nf4": 1.0, "fp8": _FP8_MAX}[weights]
    return jnp.where(largest > 0, largest / limit, 1), None


def round_to_values(grouped: Any, scales: Any, zeros: Any, weights: str) -> jax.Array:
    """Returns the values nearest to `grouped`, in the dtype of the format."""
    scaled = jnp.asarray(grouped, jnp.float32) / scales
    if weights == "fp8":
        return jnp.clip(scaled, -_FP8_MAX, _FP8_MAX).astype(jnp.float8_e4m3fn)
    if weights == "nf4":
        levels = jnp.array(NF4, jnp.float32)
        return jnp.searchsorted((levels[1:] + levels[:-1]) / 2, scaled).astype(jnp.int32).astype(jnp.uint4)
    half = 2 ** (_BITS[weights] - 1)
    lowest = -half if weights == "int4" or zeros is not None else 1 - half
    shifted = jnp.round(scaled) + (0 if zeros is None else zeros.astype(jnp.float32))
    return jnp.clip(shifted, lowest, half - 1).astype(DTYPES[weights])


def numbers(values: jax.Array) -> jax.Array:
    """Returns stored values as float32; for NF4, the levels."""
    if values.dtype == DTYPES["nf4"]:
        return jnp.array(NF4, jnp.float32)[values.astype(jnp.int32)]
    return values.astype(jnp.float32)


def round_inputs(x_BI: jax.Array, kind: InputFormat, scale: Any = None) -> tuple[jax.Array, jax.Array]:
    """Returns inputs divided by their scale and rounded to 8 bits, and the scale: the given one, or those of rows.

    Rows are along the last axis and may have several axes B; their scales are [B, 1]. The largest input of a row is 127
    steps of int8. compressed-tensors uses 127.5, which rounds it up or down by chance. With a given scale, larger
    inputs are clipped, at -128 and 127 as in compressed-tensors.
    """
    if scale is None:
        tiny = jnp.finfo(jnp.float32).tiny
        scale = jnp.maximum(jnp.abs(x_BI).max(-1, keepdims=True) / _LARGEST_INPUT[kind], tiny)
    if kind == "fp8":
        return jnp.clip(x_BI / scale, -_FP8_MAX, _FP8_MAX).astype(jnp.float8_e4m3fn), scale
    return jnp.clip(jnp.round(x_BI / scale), -128, 127).astype(jnp.int8), scale


def _dequantize(values: jax.Array, scales: jax.Array, zeros: Any, axis: int, inputs: int) -> jax.Array:
    """Returns the dense array; the inputs begin at `axis`, which is the axis of groups in `scales`."""
    grouped = numbers(values).reshape(*scales.shape[: axis + 1], -1, *values.shape[axis + inputs :])
    if zeros is not None:
        grouped -= jnp.expand_dims(zeros.astype(jnp.float32), axis + 1)
    return (grouped * jnp.expand_dims(scales, axis + 1)).reshape(values.shape)
