"""Matrices in the formats of quantised checkpoints: GPTQ, AWQ, bitsandbytes, compressed-tensors, FP8 and MXFP4.

A `Packed` matrix replaces the tensors that a file has for it. It is dequantised when it is read.

Sources: the packing of AutoGPTQ and AutoAWQ (https://github.com/AutoGPTQ/AutoGPTQ, https://github.com/casper-hansen/
AutoAWQ), of bitsandbytes, and of compressed-tensors (https://github.com/neuralmagic/compressed-tensors).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxlm.errors import UserError

FLOATS = ("float32", "bfloat16", "float16", "float64")  # supported dtypes of weights


class Parts(NamedTuple):
    """Arrays of a quantised matrix [O, I] whose inputs are divided into G groups of consecutive inputs.

    Attributes:
      values: int8 or float8_e4m3fn [O, I].
      scales: float [O, G].
      zeros: int8 [O, G]; None: 0.
    """

    values: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None

    def dequantize(self) -> np.ndarray:
        """Returns the matrix, float32."""
        outputs, groups = self.scales.shape
        grouped = self.values.astype(np.float32).reshape(outputs, groups, -1)
        if self.zeros is not None:
            grouped -= self.zeros.astype(np.float32)[..., None]
        return (grouped * self.scales.astype(np.float32)[..., None]).reshape(self.values.shape)


class Inputs(NamedTuple):
    """How a checkpoint rounds the inputs of a matrix.

    Attributes:
      format: the values to which they are rounded, an entry of `jaxlm.nn.quantized.InputFormat`; "float": they are not
        rounded, or in a way that has no node.
      is_static: whether one scale of all inputs is stored; otherwise each token has its own.
      description: the words for a message; an empty string: they are not rounded.
    """

    format: str = "float"
    is_static: bool = False
    description: str = ""


FLOAT_INPUTS = Inputs()


@dataclass(frozen=True)
class Packed:
    """A quantised matrix of a file, which is dequantised on access."""

    shape: tuple[int, ...]
    dtype: np.dtype  # of the dequantised matrix
    dequantize: Callable[[], np.ndarray]
    parts: Callable[[], Parts] | None = None  # None: the format has no `Quantized` node
    weights: str = ""  # the format of that node, an entry of `jaxlm.nn.quantized.FORMATS`
    groups: int = 1
    symmetric: bool = True
    inputs: Inputs = FLOAT_INPUTS
    input_scale: Callable[[], np.ndarray] | None = None  # returns the calibrated scale of the inputs, float32 []

    @property
    def settings(self) -> tuple[Any, ...]:
        """What the layers of a stacked node must have in common."""
        return self.weights, self.groups, self.symmetric, self.inputs, self.parts is not None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.dequantize().astype(dtype or self.dtype, copy=False)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self)[index]


Tensors = Mapping[str, Any]
_OFFSET = {4: 8, 8: 128}  # added to signed integers before packing


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Returns the unsigned integers [R, N], uint8, of a packed int32 array [R, N * bits / 32], lowest bits first."""
    bytes_ = np.ascontiguousarray(packed).astype("<i4", copy=False).view(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((bytes_[..., None] >> shifts) & np.uint8(2**bits - 1)).reshape(len(packed), -1)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Returns unsigned integers [R, N] as int32 [R, ceil(N * bits / 32)]; the inverse of `unpack`."""
    padded = np.pad(np.ascontiguousarray(values, np.uint8), ((0, 0), (0, -values.shape[1] % (32 // bits))))
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = padded.reshape(len(values), -1, 8 // bits) << shifts
    return np.ascontiguousarray(np.bitwise_or.reduce(parts, axis=-1)).view("<i4").astype(np.int32)


def gptq(tensors: Tensors, settings: Mapping[str, Any]) -> dict[str, Packed]:
    """Returns the matrices of a GPTQ checkpoint by the names of their weights.

    Values [I, O] are packed along the inputs, zero points [G, O] along the outputs. `g_idx` is the group of each input.
    """
    bits = _bits(settings, (2, 4, 8))
    # The first version of the format stores zero points minus 1.
    offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    found = {}
    for module in _modules(tensors, ".qweight"):
        names = ("qweight", "qzeros", "scales")
        qweight, qzeros, scales = _require(tensors, module, names, ("int32", "int32", None))
        inputs, outputs = qweight.shape[0] * 32 // bits, qweight.shape[1]
        groups = _groups(settings, inputs)
        _check(module, "scales", scales, (groups, outputs))
        _check(module, "qzeros", qzeros, (groups, outputs * bits // 32))
        order = tensors.get(f"{module}.g_idx")
        if order is not None:
            _check(module, "g_idx", order, (inputs,))

        def dense(qweight=qweight, qzeros=qzeros, scales=scales, order=order, module=module, g=inputs // groups):
            values_OI = unpack(np.asarray(qweight).T, bits)
            zeros_GO = (unpack(np.asarray(qzeros), bits) + np.uint8(offset)) & np.uint8(2**bits - 1)
            group_I = np.arange(values_OI.shape[1]) // g if order is None else np.asarray(order)
            if group_I.min() < 0 or group_I.max() >= len(zeros_GO):
                raise UserError(f"{module}.g_idx has a group outside 0 to {len(zeros_GO) - 1}; download the file again")
            scales_GO = np.asarray(scales, np.float32)
            return (values_OI.astype(np.float32) - zeros_GO.T[:, group_I]) * scales_GO.T[:, group_I]

        found[f"{module}.weight"] = Packed((outputs, inputs), _float(module, scales), dense)
    return found


_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the position in an int32 of each of 8 consecutive outputs


def awq(tensors: Tensors, settings: Mapping[str, Any]) -> dict[str, Packed]:
    """Returns the matrices of an AWQ checkpoint: values [I, O] and zero points [G, O], packed along the outputs."""
    _bits(settings, (4,))
    version = str(settings.get("version", "gemm")).lower()
    if version != "gemm":
        raise UserError(f"config.json has the AWQ version {version!r}; only 'gemm' is supported: choose another model")
    found = {}
    for module in _modules(tensors, ".qweight"):
        names = ("qweight", "qzeros", "scales")
        qweight, qzeros, scales = _require(tensors, module, names, ("int32", "int32", None))
        inputs, outputs = qweight.shape[0], qweight.shape[1] * 8
        groups = _groups(settings, inputs)
        _check(module, "scales", scales, (groups, outputs))
        _check(module, "qzeros", qzeros, (groups, outputs // 8))

        def dense(qweight=qweight, qzeros=qzeros, scales=scales):
            unordered = lambda x: unpack(np.asarray(x), 4).reshape(len(x), -1, 8)[..., _AWQ_ORDER].reshape(len(x), -1)
            values_OI, zeros_OG = unordered(np.asarray(qweight)).T, unordered(np.asarray(qzeros)).T
            return Parts(values_OI.astype(np.int8), np.asarray(scales).T, zeros_OG.astype(np.int8)).dequantize()

        found[f"{module}.weight"] = Packed((outputs, inputs), _float(module, scales), dense)
    return found


_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_BLOCK = 32  # entries with the same scale in MXFP4


def mxfp4(tensors: Tensors, settings: Mapping[str, Any]) -> dict[str, Packed]:
    """Returns the matrices [X, I, O] of experts in MXFP4, which are stored as [X, O, I] in blocks of inputs.

    A byte has two entries of 4 bits, the first in the lowest bits. A scale is a power of two, stored as its exponent
    plus 127.

    Source: Open Compute Project, Microscaling Formats (MX) v1.0, sections 5.3 and 5.4.
    """
    dtype = _named_dtype(str(settings.get("dtype") or "bfloat16"))
    found = {}
    for name in tensors:
        stem = name.removesuffix("_blocks")
        if stem == name:
            continue
        blocks, scales = tensors[name], tensors.get(f"{stem}_scales")
        for part, tensor in (("blocks", blocks), ("scales", scales)):
            if tensor is None or np.dtype(tensor.dtype) != np.uint8:
                raise UserError(f"{stem}_{part} is missing, or not uint8, as MXFP4 requires; download the file again")
        shape, of_scales = tuple(blocks.shape), tuple(getattr(scales, "shape", ()))
        if len(shape) != 4 or shape[3] != _BLOCK // 2 or of_scales != shape[:3]:
            raise UserError(
                f"{name} has the shape {list(shape)} and its scales {list(of_scales)}; MXFP4 has {_BLOCK // 2} bytes "
                f"for each scale: download the file again"
            )
        X, outputs, groups, _ = shape

        def dense(blocks=blocks, scales=scales, shape=(X, outputs, groups * _BLOCK)):
            bytes_XOGb = np.asarray(blocks)
            values_XOGbn = _FP4[np.stack([bytes_XOGb & 15, bytes_XOGb >> 4], -1)]
            factors_XOG = np.ldexp(np.float32(1), np.asarray(scales).astype(np.int32) - 127)
            return (values_XOGbn * factors_XOG[..., None, None]).reshape(shape).swapaxes(1, 2)

        found[stem] = Packed((X, groups * _BLOCK, outputs), dtype, dense)
    return found


_STATE = ".weight.quant_state.bitsandbytes__"


def bitsandbytes(tensors: Tensors, settings: Mapping[str, Any]) -> dict[str, Packed]:
    """Returns the matrices of a checkpoint of bitsandbytes: int8 with a scale per output, or blocks of 4-bit levels."""
    dtype = _named_dtype(str(settings.get("dtype") or "float16"))
    found = {}
    for module in _modules(tensors, ".SCB"):
        weight, largest = _require(tensors, module, ("weight", "SCB"), ("int8", None))
        _check(module, "SCB", largest, (weight.shape[0],))

        def dense(weight=weight, largest=largest):
            return np.asarray(weight, np.float32) * (np.asarray(largest, np.float32) / 127)[:, None]

        found[f"{module}.weight"] = Packed(tuple(weight.shape), dtype, dense)
    for name in tensors:
        module, separator, _ = name.partition(_STATE)
        if separator:
            found[f"{module}.weight"] = _four_bits(tensors, module, name)
    return found


def _four_bits(tensors: Tensors, module: str, name: str) -> Packed:
    """Returns a matrix whose entries, in C order, are divided into blocks of 4-bit levels with the same scale."""
    try:
        state = json.loads(bytes(np.asarray(tensors[name]).tobytes()))
        shape, block = tuple(int(n) for n in state["shape"]), int(state["blocksize"])
        dtype = _named_dtype(str(state["dtype"]))
        nested, offset = int(state.get("nested_blocksize") or 0), float(state.get("nested_offset") or 0.0)
        if block < 1 or nested < 0 or min(shape, default=0) < 1:
            raise ValueError(f"blocks of {block} entries")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name} is not as bitsandbytes writes it ({error}); download the file again") from None
    names = ("weight", "weight.absmax", "weight.quant_map")
    weight, largest, levels = _require(tensors, module, names, ("uint8", None, None))
    size = math.prod(shape)
    blocks = -(-size // block)
    if math.prod(weight.shape) != -(-size // 2):
        raise UserError(f"{module}.weight has shape {list(weight.shape)}, not the {size} entries of {list(shape)}")
    _check(module, "weight.absmax", largest, (blocks,))
    _check(module, "weight.quant_map", levels, (16,))
    seconds: list[Any] = []
    if nested:  # the scales are quantised too (Dettmers et al. 2023, section 3)
        seconds = _require(tensors, module, ("weight.nested_absmax", "weight.nested_quant_map"), (None, None))
        _check(module, "weight.nested_absmax", seconds[0], (-(-blocks // nested),))

    def dense() -> np.ndarray:
        bytes_ = np.asarray(weight).reshape(-1)
        numbers = np.asarray(levels)[np.stack([bytes_ >> 4, bytes_ & 15], -1).reshape(-1)[:size]]
        scales = np.asarray(largest)
        if nested:
            nested_largest, nested_levels = (np.asarray(x) for x in seconds)
            scales = nested_levels[scales] * np.repeat(nested_largest, nested)[:blocks] + np.float32(offset)
        return (numbers * np.repeat(scales, block)[:size]).reshape(shape)

    return Packed(shape, dtype, dense)


def compressed_tensors(tensors: Tensors, settings: Mapping[str, Any]) -> dict[str, Packed]:
    """Returns the matrices of a checkpoint of compressed-tensors: packed integers, integers, or 8-bit floats."""
    schemes = _schemes(settings)
    found = {}
    for module in _modules(tensors, ".weight_packed"):
        packed, scales, shape = _require(
            tensors, module, ("weight_packed", "weight_scale", "weight_shape"), ("int32", None, None)
        )
        outputs, inputs = (int(n) for n in np.asarray(shape).reshape(-1)[:2])
        bits = next((n for n in (4, 8) if tuple(packed.shape) == (outputs, -(-inputs * n // 32))), None)
        if bits is None or bits not in {scheme.bits for scheme in schemes}:
            given = sorted({scheme.bits for scheme in schemes})
            raise UserError(
                f"{module}.weight_packed has shape {list(packed.shape)} for a matrix {[outputs, inputs]}, which "
                f"contradicts the bits in config.json, {given}; supported are 4 and 8: choose another model"
            )
        matrix = _grouped(tensors, module, (outputs, inputs), bits, packed, scales)
        found[f"{module}.weight"] = _with_inputs(matrix, tensors, module, _scheme_of(module, schemes).inputs)
    for module in _modules(tensors, ".weight_scale"):
        weight = tensors.get(f"{module}.weight")
        if weight is not None and np.dtype(weight.dtype).name in ("int8", "float8_e4m3fn"):
            (scales,) = _require(tensors, module, ("weight_scale",), (None,))
            matrix, scheme = _grouped(tensors, module, weight.shape, 0, weight, scales), _scheme_of(module, schemes)
            if scheme.bits == 4 and matrix.weights == "int8":  # one value per byte
                matrix = replace(matrix, weights="int4")
            found[f"{module}.weight"] = _with_inputs(matrix, tensors, module, scheme.inputs)
    return found


def fp8(tensors: Tensors, settings: Mapping[str, Any]) -> dict[str, Packed]:
    """Returns the matrices of a checkpoint of 8-bit floats with one scale for each, or for each block of entries.

    AutoFP8 names the scales `weight_scale` and `input_scale`, transformers `weight_scale_inv` and `activation_scale`;
    both multiply. Blocks have the sizes `weight_block_size` (DeepSeek-AI 2024, DeepSeek-V3, section 3.3.2).
    """
    is_static = settings.get("activation_scheme") == "static"
    block = settings.get("weight_block_size")
    inputs = _inputs({"type": "float", "strategy": "block" if block else "tensor", "dynamic": not is_static})
    found = {}
    for names in (("weight_scale", "input_scale"), ("weight_scale_inv", "activation_scale")):
        for module in _modules(tensors, f".{names[0]}"):
            weight, scale = _require(tensors, module, ("weight", names[0]), ("float8_e4m3fn", None))
            if block:
                found[f"{module}.weight"] = replace(_in_blocks(module, weight, names[0], scale, block), inputs=inputs)
            elif math.prod(scale.shape) == 1:
                matrix = _grouped(tensors, module, weight.shape, 0, weight, scale)
                found[f"{module}.weight"] = _with_inputs(matrix, tensors, module, inputs, names[1])
    return found


def _in_blocks(module: str, weight: Any, name: str, scales: Any, block: Any) -> Packed:
    """Returns a matrix [O, I] whose scales [ceil(O / o), ceil(I / i)] belong to blocks of [o, i] entries."""
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise UserError(f"config.json has the weight_block_size {block!r}; it must be two sizes such as [128, 128]")
    if len(weight.shape) != 2:
        raise UserError(f"{module}.weight has shape {list(weight.shape)}, which is not a matrix: choose another model")
    (outputs, columns), (rows, width) = weight.shape, block
    _check(module, name, scales, (-(-outputs // rows), -(-columns // width)))
    dtype = _float(module, scales)
    of_outputs = lambda: np.repeat(np.asarray(scales, np.float32), rows, axis=0)[:outputs]

    def dense() -> np.ndarray:
        return np.asarray(weight).astype(np.float32) * np.repeat(of_outputs(), width, axis=1)[:, :columns]

    if columns % width:  # the groups of a node have equal sizes
        return Packed((outputs, columns), dtype, dense)
    parts = lambda: Parts(np.asarray(weight), of_outputs(), None)
    return Packed((outputs, columns), dtype, dense, parts, "fp8", columns // width)


def _with_inputs(matrix: Packed, tensors: Tensors, module: str, inputs: Inputs, name: str = "input_scale") -> Packed:
    """Returns a matrix with the rounding of its inputs, whose scale is in the tensor with this name if it is static."""
    if inputs.format == "int8" and matrix.weights == "fp8":  # a product of integers requires integers
        inputs = inputs._replace(format="float")
    if inputs.format == "float" or not inputs.is_static:
        return replace(matrix, inputs=inputs)
    (scale,) = _require(tensors, module, (name,), (None,))
    _float(module, scale)
    if math.prod(scale.shape) != 1:
        raise UserError(
            f"{module}.{name} has shape {list(scale.shape)}, but config.json has one scale of all inputs; use the "
            f"config.json that belongs to the weights"
        )

    def read() -> np.ndarray:
        number = np.asarray(scale, np.float32).reshape(())
        if not (np.isfinite(number) and number > 0):
            raise UserError(f"{module}.{name} is {number}, which is not a scale; download the file again")
        return number

    return replace(matrix, inputs=inputs, input_scale=read)


def _grouped(tensors: Tensors, module: str, shape: Any, bits: int, stored: Any, scales: Any) -> Packed:
    """Returns a matrix of compressed-tensors; `bits` are those of packed integers, 0 if they are not packed."""
    if len(shape) != 2:
        raise UserError(f"{module}.weight has shape {list(shape)}, which is not a matrix: choose another model")
    outputs, inputs = (int(n) for n in shape)
    rows, groups = scales.shape if len(scales.shape) == 2 else (math.prod(scales.shape), 1)
    if rows not in (1, outputs) or not groups or inputs % groups or (bits and rows != outputs):
        raise UserError(
            f"{module}.weight_scale has shape {list(scales.shape)}, which does not divide {[outputs, inputs]}; "
            f"supported are scales of tensors, outputs and groups: choose another model"
        )
    zeros, order = tensors.get(f"{module}.weight_zero_point"), tensors.get(f"{module}.weight_g_idx")
    if zeros is not None:
        _check(module, "weight_zero_point", zeros, (-(-outputs * bits // 32), groups) if bits else scales.shape)
    if order is not None:
        _check(module, "weight_g_idx", order, (inputs,))

    def parts() -> Parts:
        of_outputs = lambda x: np.broadcast_to(np.asarray(x).reshape(rows, groups), (outputs, groups))
        signed = lambda x, count: (unpack(x, bits)[:, :count].astype(np.int16) - _OFFSET[bits]).astype(np.int8)
        values = signed(np.asarray(stored), inputs) if bits else np.asarray(stored)
        if zeros is None:
            return Parts(values, of_outputs(scales), None)
        points = signed(np.asarray(zeros).T, outputs).T if bits else of_outputs(zeros)
        return Parts(values, of_outputs(scales), points)

    def dense() -> np.ndarray:
        if order is None:
            return parts().dequantize()
        values, scales_OG, zeros_OG = parts()
        group_I = np.asarray(order)
        if group_I.min() < 0 or group_I.max() >= groups:
            raise UserError(f"{module}.weight_g_idx has a group outside 0 to {groups - 1}; download the file again")
        numbers = values.astype(np.float32) - (0 if zeros_OG is None else zeros_OG.astype(np.float32)[:, group_I])
        return numbers * scales_OG.astype(np.float32)[:, group_I]

    weights = "fp8" if np.dtype(stored.dtype) == ml_dtypes.float8_e4m3fn else "int4" if bits == 4 else "int8"
    dtype = _float(module, scales)
    if order is not None:
        return Packed((outputs, inputs), dtype, dense)
    return Packed((outputs, inputs), dtype, dense, parts, weights, groups, zeros is None)


class _Scheme(NamedTuple):
    """The settings of a group of modules: the modules, the number of bits, and the rounding of inputs."""

    targets: tuple[str, ...]
    bits: Any
    inputs: Inputs


def _schemes(settings: Mapping[str, Any]) -> list[_Scheme]:
    """Returns the settings of each group of modules in config.json."""
    groups = settings.get("config_groups")
    schemes = []
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            continue
        targets = group.get("targets")
        names = tuple(str(target) for target in targets) if isinstance(targets, list) else ()
        schemes.append(_Scheme(names, weights.get("num_bits"), _inputs(group.get("input_activations"))))
    if not schemes:
        raise UserError("config.json has no config_groups with weights in its quantization_config; download it again")
    return schemes


def _inputs(arguments: Any) -> Inputs:
    """Returns the rounding of inputs that the `input_activations` of a group of modules describe."""
    if not isinstance(arguments, dict):
        return FLOAT_INPUTS
    bits, kind = arguments.get("num_bits", 8), arguments.get("type", "int")
    size, is_dynamic = arguments.get("group_size"), arguments.get("dynamic", False)
    strategy = arguments.get("strategy") or ("group" if size else "tensor")
    is_symmetric = arguments.get("symmetric", True)
    how = f"{bits}-bit {kind}, {'dynamic' if is_dynamic else 'static'}, per {strategy}"
    description = how if is_symmetric else f"{how}, with zero points"
    formats = {("int", 8): "int8", ("float", 8): "fp8"}
    is_known = is_symmetric and strategy == ("token" if is_dynamic else "tensor") and is_dynamic in (True, False)
    return Inputs(formats.get((kind, bits), "float") if is_known else "float", not is_dynamic, description)


def _scheme_of(module: str, schemes: list[_Scheme]) -> _Scheme:
    """Returns the settings of a module: those that name it, else those of all linear layers, else the first ones."""

    def is_named(target: str) -> bool:
        if not target.startswith("re:"):
            return target == module
        try:
            return bool(re.match(target[3:], module))
        except re.error:
            raise UserError(
                f"config.json has the target {target!r}, which is not a regular expression; download it again"
            ) from None

    named = [scheme for scheme in schemes if any(map(is_named, scheme.targets))]
    return next(iter(named or [scheme for scheme in schemes if "Linear" in scheme.targets] or schemes))


def _bits(settings: Mapping[str, Any], known: tuple[int, ...]) -> int:
    bits = settings.get("bits", settings.get("w_bit"))
    if bits not in known or type(bits) is not int:
        raise UserError(
            f"config.json has a quantization with bits {bits!r}; supported are {', '.join(map(str, known))}: "
            f"choose another model"
        )
    return bits


def _groups(settings: Mapping[str, Any], inputs: int) -> int:
    """Returns the number of groups of a matrix."""
    size = settings.get("group_size", settings.get("q_group_size", -1))
    if type(size) is not int or (size != -1 and size < 1) or (size > 0 and inputs % size and inputs > size):
        raise UserError(
            f"config.json has a quantization with group_size {size!r}, which does not divide {inputs} inputs; "
            f"use the config.json that belongs to the weights"
        )
    return 1 if size == -1 else max(1, inputs // size)


def _modules(tensors: Tensors, suffix: str) -> list[str]:
    return [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]


def _require(tensors: Tensors, module: str, names: tuple[str, ...], dtypes: tuple[str | None, ...]) -> list[Any]:
    """Returns tensors of a module. Raises UserError for a missing one, and for another dtype (None: a float)."""
    for name, dtype in zip(names, dtypes):
        full = f"{module}.{name}"
        if full not in tensors:
            raise UserError(f"the file has {module}.{names[0]}, but no {full}; download the file again")
        found = tensors[full]
        if dtype is not None and np.dtype(found.dtype).name != dtype:
            raise UserError(f"{full} has the dtype {found.dtype}, not {dtype}; use the config.json of the weights")
        if (dtype is not None and not found.shape) or (dtype == "int32" and len(found.shape) != 2):
            raise UserError(f"{full} has shape {list(found.shape)}; download the file again")
    return [tensors[f"{module}.{name}"] for name in names]


def _check(module: str, name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise UserError(
            f"{module}.{name} has shape {list(tensor.shape)}, but the weights and config.json require {list(shape)}; "
            f"use the config.json that belongs to the weights"
        )


def _float(module: str, scales: Any) -> np.dtype:
    dtype = np.dtype(scales.dtype)
    if dtype.name not in FLOATS:
        raise UserError(f"the scales of {module} have the dtype {dtype}; supported are {', '.join(FLOATS)}")
    return dtype


def _named_dtype(name: str) -> np.dtype:
    name = name.removeprefix("torch.")
    if name not in FLOATS:
        raise UserError(f"the weights are quantised from the dtype {name!r}; supported are {', '.join(FLOATS)}")
    return np.dtype(getattr(ml_dtypes, name, name) if name == "bfloat16" else name)
