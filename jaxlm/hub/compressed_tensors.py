"""Quantised models in the format compressed-tensors: nodes -> tensors and config.json, and tensors -> nodes.

Integers are stored packed ("pack-quantized"), or with rounded inputs as they are ("int-quantized"), and 8-bit floats as
they are ("float-quantized"): https://github.com/neuralmagic/compressed-tensors. Transformers loads them with that
package.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.hub.packed import Packed, Parts, pack
from jaxlm.hub.safetensors import Pending
from jaxlm.nn import parameters
from jaxlm.nn.quantized import DTYPES, Quantized

BITS = {"int4": 4, "int8": 8, "fp8": 8}  # of the formats that compressed-tensors has


@dataclasses.dataclass(frozen=True)
class PendingParts:
    """A quantised matrix that is computed when it is written."""

    weights: str
    shape: tuple[int, int]  # [O, I]
    groups: int
    symmetric: bool
    input_format: str
    input_scale: np.ndarray | None  # float32 [1]
    make: Callable[[], Parts]

    def tensors(self, name: str) -> dict[str, Pending]:
        """Returns the tensors for the weight with a name such as `model.layers.0.mlp.up_proj.weight`."""
        (outputs, _), groups, bits = self.shape, self.groups, BITS[self.weights]
        value_dtype = np.dtype(ml_dtypes.float8_e4m3fn if self.weights == "fp8" else np.int8)
        float32 = np.dtype(np.float32)
        tensors = {f"{name}_scale": Pending((outputs, groups), float32, lambda: self.make().scales)}
        if (scale := self.input_scale) is not None:
            tensors[f"{name.removesuffix('weight')}input_scale"] = Pending(scale.shape, float32, lambda: scale)
        if self.format != "pack-quantized":
            tensors[name] = Pending(self.shape, value_dtype, lambda: self.make().values)
            if not self.symmetric:
                tensors[f"{name}_zero_point"] = Pending((outputs, groups), np.dtype(np.int8), lambda: self.make().zeros)
            return tensors
        offset = 2 ** (bits - 1)
        unsigned = lambda x: (x.astype(np.int16) + offset).astype(np.uint8)
        words = lambda n: -(-n * bits // 32)
        int32 = np.dtype(np.int32)
        tensors[f"{name}_packed"] = Pending(
            (outputs, words(self.shape[1])), int32, lambda: pack(unsigned(self.make().values), bits)
        )
        tensors[f"{name}_shape"] = Pending((2,), np.dtype(np.int64), lambda: np.array(self.shape))
        if not self.symmetric:
            packed_zeros = lambda: pack(unsigned(self.make().zeros).T, bits).T
            tensors[f"{name}_zero_point"] = Pending((words(outputs), groups), int32, packed_zeros)
        return tensors

    @property
    def format(self) -> str:
        """The name of the format of these tensors."""
        if self.weights == "fp8":
            return "float-quantized"
        return "pack-quantized" if self.input_format == "float" else "int-quantized"

    @property
    def scheme(self) -> dict[str, Any]:
        """The values of `config_groups` for modules with these settings."""
        weights: dict[str, Any] = {"num_bits": BITS[self.weights], "type": "float" if self.weights == "fp8" else "int"}
        strategy = {"strategy": "group", "group_size": self.shape[1] // self.groups}
        if self.groups == 1:
            strategy = {"strategy": "channel", "group_size": None}
        is_dynamic = self.input_scale is None
        inputs = {
            "num_bits": 8,
            "type": "float" if self.input_format == "fp8" else "int",
            "symmetric": True,
            "strategy": "token" if is_dynamic else "tensor",
            "dynamic": is_dynamic,
        }
        return {
            "weights": weights | strategy | {"symmetric": self.symmetric, "dynamic": False},
            "input_activations": None if self.input_format == "float" else inputs,
            "output_activations": None,
            "format": self.format,
        }


def to_parts(
    to_hf: Callable[..., np.ndarray], leaves: list[Any], stacked: int
) -> Callable[[tuple[int, ...]], PendingParts] | None:
    """Returns a function from the index of a matrix to the tensor of a file for nodes with the same settings.

    It returns None for other parameters, and for tensors that the format cannot represent.

    Args:
      to_hf: arrays of one layer -> the tensor of the file; it only moves entries.
      leaves: the parameters that the tensor contains.
      stacked: number of their leading axes with one matrix for each index, those of layers and experts.
    """
    if not all(isinstance(leaf, Quantized) and leaf.weights in BITS for leaf in leaves):
        return None
    groups = {leaf.scales.shape[stacked + leaf.first] for leaf in leaves}
    kinds = {(leaf.weights, leaf.zeros is None, leaf.input_format, leaf.input_scale is None) for leaf in leaves}
    # A tensor [O, I] whose entries are the numbers of their inputs shows that the file has the inputs in our order.
    order = to_hf(*[_input_numbers(leaf, stacked) for leaf in leaves])
    if len(groups) > 1 or len(kinds) > 1 or order.ndim != 2 or order.shape[1] % min(groups):
        return None
    # Projections that one tensor contains have the same inputs, and thus usually the same scale.
    input_scales = [np.asarray(leaf.input_scale, np.float32) for leaf in leaves if leaf.input_scale is not None]
    if any(not np.array_equal(one, input_scales[0]) for one in input_scales):
        return None
    if not np.array_equal(order, np.broadcast_to(np.arange(order.shape[1]), order.shape)):
        return None
    shape, (group_count,), ((weights, symmetric, input_format, _),) = order.shape, groups, kinds
    group = shape[1] // group_count

    def make(index: tuple[int, ...]) -> Parts:
        of_layer = lambda x: np.asarray(x[index])
        store = ml_dtypes.float8_e4m3fn if weights == "fp8" else np.int8
        values = to_hf(*[of_layer(leaf.values).astype(store) for leaf in leaves])

        def per_group(name: str, dtype: Any) -> np.ndarray:
            repeated = [_repeat(of_layer(getattr(leaf, name)).astype(dtype), leaf, group) for leaf in leaves]
            return np.ascontiguousarray(to_hf(*repeated)[:, ::group])

        zeros = None if symmetric else per_group("zeros", np.int8)
        return Parts(np.ascontiguousarray(values), per_group("scales", np.float32), zeros)

    def pending(index: tuple[int, ...]) -> PendingParts:
        input_scale = input_scales[0][index].reshape(1) if input_scales else None
        return PendingParts(weights, shape, group_count, symmetric, input_format, input_scale, partial(make, index))

    return pending


def _input_numbers(leaf: Quantized, stacked: int) -> np.ndarray:
    """Returns an array with the shape of one layer whose entries are the numbers of their inputs."""
    shape, axis = leaf.values.shape[stacked:], leaf.first
    inputs = math.prod(shape[axis : axis + leaf.inputs])
    numbers = np.arange(inputs, dtype=np.int32).reshape(inputs, *[1] * len(shape[axis + leaf.inputs :]))
    merged = (*shape[:axis], inputs, *shape[axis + leaf.inputs :])
    return np.broadcast_to(numbers, merged).reshape(shape)


def _repeat(x: np.ndarray, leaf: Quantized, group: int) -> np.ndarray:
    """Returns scales or zero points of one layer, repeated for every entry."""
    values = leaf.values.shape[-(x.ndim + leaf.inputs - 1) :]
    return np.repeat(x, group, axis=leaf.first).reshape(values)


def expand(tensors: Mapping[str, Pending], prefix: str) -> tuple[dict[str, Pending], dict[str, Any] | None]:
    """Returns the tensors with the parts of quantised ones, and `quantization_config`, None without quantised ones.

    Args:
      tensors: tensors by name; the quantised ones have `parts`.
      prefix: prefix of the names that a model without a head omits.
    """
    written: dict[str, Pending] = {}
    targets: dict[str, tuple[dict[str, Any], set[str]]] = {}
    for name, tensor in tensors.items():
        if tensor.parts is None:
            written[name] = tensor
            continue
        written |= tensor.parts.tensors(name)
        scheme = tensor.parts.scheme
        module = re.escape(name.removesuffix(".weight").removeprefix(prefix))
        module = re.sub(r"\d+", r"\\d+", module)  # every layer
        targets.setdefault(str(scheme), (scheme, set()))[1].add(rf"re:(.*\.)?{module}$")
    if not targets:
        return written, None
    formats = {scheme["format"] for scheme, _ in targets.values()}
    # In the order of the names, which does not depend on the order of the tensors.
    ordered = sorted(((sorted(names), scheme) for scheme, names in targets.values()), key=lambda pair: pair[0])
    groups = {f"group_{n}": {"targets": names, **scheme} for n, (names, scheme) in enumerate(ordered)}
    return written, {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": [],
        "kv_cache_scheme": None,
    }


def read_node(
    reader: Any, config: ModelConfig, tensors: Mapping[str, Any], path: str, place: Callable[..., jax.Array]
) -> Quantized | None:
    """Returns the node of a leaf whose tensors are all quantised with the same settings; None for other leaves.

    Args:
      reader: the reader of the leaf, a `convert.Reader`.
      config: the model's config.
      tensors: the tensors of the file by the names in the rules.
      path: the path of the leaf.
      place: read(index, dtype), axes, shape, dtype -> a JAX array.
    """
    packed, row = [tensors[name] for name in reader.names.values()], parameters.find(path)
    if row is None or not all(isinstance(one, Packed) for one in packed) or len({one.settings for one in packed}) != 1:
        return None
    one, stacked = packed[0], parameters.stacked_axes(path)
    is_table = row.axes == ("vocabulary", "width")
    is_projection = row.inputs or stacked > 1 or is_table
    if one.parts is None or not is_projection or len(packed) != math.prod(reader.shape[:stacked]):
        return None
    inputs, first = row.inputs or 1, int(is_table)
    axis = stacked + first
    shape = (*reader.shape[:axis], one.groups, *reader.shape[axis + inputs :])
    group_axes = (*row.axes[:axis], None, *row.axes[axis + inputs :])
    part = lambda name: {n: _Part(tensors[n], name) for n in reader.names.values()}
    values = partial(reader.read, config, part("values"))

    def per_group(name: str, index: Any = (), dtype: Any = None) -> np.ndarray:
        spans = (*index, *[slice(None)] * (len(shape) - len(index)))
        layers = [slice(n, n + 1) for n in range(reader.shape[0])[spans[0]]] if stacked else [slice(None)]
        whole = [reader.read(config, part(name), (layer,), dtype) for layer in layers]
        grouped = [x.reshape(*x.shape[:axis], one.groups, -1, *x.shape[axis + inputs :]) for x in whole]
        return np.concatenate([x.take(0, axis + 1) for x in grouped])[(slice(None), *spans[1:]) if stacked else spans]

    def input_scales(index: Any = (), dtype: Any = None) -> np.ndarray:
        found = [x.input_scale() for x in packed if x.input_scale is not None]
        return np.stack(found)[index] if stacked else found[0]

    value_dtype, float32 = np.dtype(DTYPES[one.weights]), np.dtype(np.float32)
    is_static = one.input_scale is not None and not is_table
    return Quantized(
        place(values, row.axes, reader.shape, value_dtype),
        place(partial(per_group, "scales"), group_axes, shape, float32),
        None if one.symmetric else place(partial(per_group, "zeros"), group_axes, shape, value_dtype),
        place(input_scales, (), (len(packed),) * stacked, float32) if is_static else None,
        first,
        inputs,
        "float" if is_table else one.inputs.format,
    )


class _Part:
    """The values of a quantised matrix, or its scales or zero points for every entry, as a tensor of a file."""

    def __init__(self, packed: Packed, name: str) -> None:
        self._packed, self._name = packed, name
        self.shape = packed.shape
        self.dtype = np.dtype(np.float32 if name == "scales" else DTYPES[packed.weights])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        assert self._packed.parts is not None  # `read_node` has checked it
        parts = self._packed.parts()
        if self._name == "values":
            return parts.values
        return np.repeat(getattr(parts, self._name), self.shape[1] // self._packed.groups, axis=1)
