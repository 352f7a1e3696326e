"""The updates of an adapter's file as `LowRank` nodes, and the reverse.

The names of the modules follow from the rules of a family, and so does the order of the entries of a matrix: a tensor
of the file may contain several of our kernels, such as query, key and value.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError
from jaxlm.hub import convert, peft
from jaxlm.hub.convert import Family, Rule
from jaxlm.hub.model_files import JsonObject
from jaxlm.hub.peft import Adapter, Factors
from jaxlm.nn import nodes, parameters
from jaxlm.nn.low_rank import LowRank, column_norms
from jaxlm.nn.quantized import FORMATS, Quantized, quantize

BASE_FORMAT = "jaxlm_base"  # key of config.json beside an adapter that was trained on a base in another format


def has_updates(params: Any) -> bool:
    """Returns whether parameters have low-rank updates."""
    return any(isinstance(leaf, LowRank) for leaf in parameters.by_path(params, whole_nodes=True).values())


def read_base_format(hf: Mapping[str, Any], source: Path) -> dict[str, Any] | None:
    """Returns the format of the base in the config.json of an adapter, as `base_format` returns it."""
    if hf.get(BASE_FORMAT) is None:
        return None
    values = JsonObject(dict(hf), str(source)).object(BASE_FORMAT)
    return {"weights": values.text("weights", "nf4", (*FORMATS, "bfloat16")), "group": values.integer("group", 0, 0)}


class Merged:
    """A tensor of the base with the update of an adapter, computed on access.

    Attributes:
      shape: the shape of the tensor.
      dtype: the dtype of the tensor.
    """

    def __init__(self, tensor: Any, factors: Factors, transposed: bool):
        self.shape, self.dtype = tuple(tensor.shape), np.dtype(tensor.dtype)
        self._tensor, self._factors, self._transposed = tensor, factors, transposed

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # the array is always a new one
        factors = self._factors
        weight_OI = np.asarray(self._tensor).astype(np.float32)
        weight_OI = weight_OI.T if self._transposed else weight_OI
        weight_OI = weight_OI + factors.scale * (factors.b_OR.astype(np.float32) @ factors.a_RI.astype(np.float32))
        if factors.magnitude_O is not None:
            norms_O = np.linalg.norm(weight_OI, axis=1)
            weight_OI *= (factors.magnitude_O.astype(np.float32) / norms_O)[:, None]
        return (weight_OI.T if self._transposed else weight_OI).astype(dtype or self.dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self)[index]


def with_saved(family: Family, adapter: Adapter, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tensors of the base, by their names in its file, with the tensors that the adapter replaces."""
    tensors = dict(stored)
    for name, tensor in adapter.saved.items():
        bare = name.removeprefix(family.prefix)
        known = next((other for other in (name, bare, family.prefix + name) if other in tensors), name)
        if known in stored and tuple(stored[known].shape) != tuple(tensor.shape) and not _in_new_head(family, known):
            raise UserError(
                f"the adapter in {adapter.folder} replaces {name} with the shape {list(tensor.shape)}, but the base "
                f"has {list(stored[known].shape)}; give the model that it was trained on: {adapter.base or 'unknown'}"
            )
        tensors[known] = tensor
    return tensors


def _in_new_head(family: Family, name: str) -> bool:
    """Returns whether a tensor belongs to the last layer of a head, whose labels an adapter may change."""
    return any(
        rule.hf == name and rule.leaves[0].endswith(("_head/out/kernel", "_head/out/bias")) for rule in family.rules
    )


def canonical_updates(
    family: Family, config: ModelConfig, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Factors]:
    """Returns the updates of an adapter by the names of the tensors in the family's rules.

    Args:
      family: the conversion table.
      config: the config of the base.
      adapter: the adapter.
      shapes: shapes of the tensors of the base by their names in the rules.

    Raises:
      UserError: if the base has no such tensors, or has other shapes.
    """
    updates: dict[str, Factors] = {}
    strange: list[str] = []
    for module, factors in adapter.updates.items():
        stacked = module.rpartition(".")[0]  # jaxlm's own format stores all layers in one tensor
        names = [f"{prefix}{module}.weight" for prefix in ("", family.prefix)]
        name = next((name for name in names if name in shapes), module if stacked in shapes else None)
        inputs, outputs = factors.a_RI.shape[1], factors.b_OR.shape[0]
        expected = (inputs, outputs) if adapter.transposed else (outputs, inputs)
        if name is None:
            strange.append(f"{module} [{outputs}, {inputs}], which the base does not have")
        elif name in shapes and shapes[name] != expected:
            strange.append(f"{module} {list(expected)}, where the base has {list(shapes[name])}")
        else:
            updates[name] = factors
    if strange:
        raise UserError(
            f"the adapter in {adapter.folder} does not fit the base; it updates {'; '.join(strange[:3])}"
            f"{f' and {len(strange) - 3} more' if len(strange) > 3 else ''}; give the model that it was trained on: "
            f"{adapter.base or 'unknown'}"
        )
    return updates


class MatrixOrder(NamedTuple):
    """How a tensor of the file contains the entries of one or several kernels [I..., O...] of one layer.

    Attributes:
      inputs: for each input of the tensor, its index in the flattened input axes of a kernel.
      outputs: for each output of the tensor, its index in the flattened output axes of all kernels together.
      sizes: number of outputs of each kernel.
      transposed: whether the tensor is [I, O] instead of [O, I].
    """

    inputs: np.ndarray
    outputs: np.ndarray
    sizes: tuple[int, ...]
    transposed: bool


def _order(rule: Rule, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> MatrixOrder:
    """Returns the order of entries by converting kernels that contain the indices of their inputs and outputs."""
    kernels_of_inputs, kernels_of_outputs = [], []
    sizes: list[int] = []
    for path in rule.leaves:
        row, shape = parameters.find(path), shapes[path][1:]
        assert row is not None
        inputs, outputs = shape[: row.inputs], shape[row.inputs :]
        index_I, index_O = np.arange(math.prod(inputs)), sum(sizes) + np.arange(math.prod(outputs))
        kernels_of_inputs.append(np.broadcast_to(index_I.reshape(*inputs, *[1] * len(outputs)), shape))
        kernels_of_outputs.append(np.broadcast_to(index_O.reshape(outputs), shape))
        sizes.append(len(index_O))
    to_hf = partial(rule.layout.to_hf, rule.config(config))
    by_input, by_output = to_hf(*kernels_of_inputs), to_hf(*kernels_of_outputs)
    if by_input.ndim != 2:  # jaxlm's own format stores kernels as they are
        return MatrixOrder(index_I, index_O, tuple(sizes), False)
    transposed = bool((by_input == by_input[:, :1]).all() and (by_output == by_output[:1]).all())
    if transposed:
        by_input, by_output = by_input.T, by_output.T
    return MatrixOrder(by_input[0], by_output[:, 0], tuple(sizes), transposed)


def _modules(rule: Rule, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[int, str]:
    """Returns the name of the tensor of each row; in jaxlm's own format, which stacks layers, with a number."""
    if "{i}" in rule.hf:
        return {index[0]: name for index, name in rule.names(config, shapes).items()}
    return {i: f"{rule.hf}.{i}" for i in range(shapes[rule.leaves[0]][0])}


def base_format(params: Any) -> dict[str, Any] | None:
    """Returns how the matrices below low-rank updates are stored; None if that is the dtype of the updates.

    The result has the format under `weights`, an entry of `FORMATS` or bfloat16, and the size of its groups, `group`.
    """
    for leaf in parameters.by_path(params, whole_nodes=True).values():
        base = leaf
        while isinstance(base, LowRank):
            base = base.base
        if not isinstance(leaf, LowRank):
            continue
        if isinstance(base, Quantized):
            inputs = math.prod(base.values.shape[1 : 1 + base.inputs])
            return {"weights": base.weights, "group": inputs // base.scales.shape[1]}
        if not nodes.is_node(base) and base.dtype == jnp.bfloat16 != leaf.a.dtype:
            return {"weights": "bfloat16", "group": 0}
    return None


def add_updates(
    family: Family,
    config: ModelConfig,
    params: Any,
    updates: Mapping[str, Factors],
    weight: float = 1.0,
    stored_as: Mapping[str, Any] | None = None,
) -> Any:
    """Returns parameters with a `LowRank` node in place of each kernel with an update.

    Args:
      family: the conversion table.
      config: the model's config.
      params: the parameters, arrays or nodes.
      updates: updates by the names of tensors in the rules, as `canonical_updates` returns them.
      weight: factor of all updates.
      stored_as: how arrays below updates are stored, as `base_format` returns it; None: as they are.
    """
    shapes, leaves = convert.tree_shapes(config, family.module), convert.flat(params)
    used: set[str] = set()
    for path, reader in convert.readers(family, config).items():
        row = parameters.find(path)
        if row is None or not row.inputs:
            continue
        names = _modules(reader.rule, config, shapes)
        found = {i: updates[name] for i, name in names.items() if name in updates}
        used |= {names[i] for i in found}
        if found:
            order = _order(reader.rule, config, shapes)
            node = _node(leaves[path], row.inputs, shapes[path], found, order, reader.which, weight)
            if len(order.sizes) > 1 and _has_no_effect(node):
                continue  # another kernel in the same tensor has the update
            if stored_as and not nodes.is_node(node.base):
                node = replace(node, base=store_base(node.base, row.inputs, **stored_as))
            leaves[path] = node
    if unused := sorted(updates.keys() - used):
        raise UserError(
            f"the adapter updates {unused[0]}, which is not a projection of a layer; merge it with PEFT "
            f"(merge_and_unload), and give the merged model"
        )
    return convert.nested(leaves)


def store_base(kernel: Any, inputs: int, weights: str, group: int) -> Any:
    """Returns a stacked kernel in a format of `AdapterConfig.base`; `group` inputs share a scale."""
    if weights in FORMATS:
        return quantize(kernel, inputs, weights=weights, group=group)
    return kernel.astype(weights)


def _node(
    base: Any,
    inputs: int,
    shape: tuple[int, ...],
    found: dict[int, Factors],
    order: MatrixOrder,
    which: int,
    weight: float,
) -> LowRank:
    """Returns the node of a stacked kernel; layers without an update have zeros."""
    (L, *matrix), rank = shape, max(len(factors.a_RI) for factors in found.values())
    scales = {factors.scale for factors in found.values()}
    scale = scales.pop() if len(scales) == 1 else None
    start = sum(order.sizes[:which])
    a_LIR = np.zeros((L, math.prod(matrix[:inputs]), rank), np.float32)
    b_LRO = np.zeros((L, rank, order.sizes[which]), np.float32)
    dora = any(factors.magnitude_O is not None for factors in found.values())
    magnitude_LO = np.zeros((L, order.sizes[which]), np.float32)
    for i, factors in found.items():
        r = len(factors.a_RI)
        a_LIR[i, order.inputs, :r] = factors.a_RI.T
        b_OR = np.empty((sum(order.sizes), r), np.float32)
        b_OR[order.outputs] = factors.b_OR
        b_LRO[i, :r] = b_OR[start : start + order.sizes[which]].T * (factors.scale if scale is None else 1)
        if factors.magnitude_O is not None:
            magnitude_O = np.empty(sum(order.sizes), np.float32)
            magnitude_O[order.outputs] = factors.magnitude_O
            magnitude_LO[i] = magnitude_O[start : start + order.sizes[which]]
    if dora and len(found) < L:
        norms = lambda i: column_norms(nodes.of_layer(base, i), inputs).reshape(-1)
        magnitude_LO[[i for i in range(L) if i not in found]] = [norms(i) for i in range(L) if i not in found]
    a, b = a_LIR.reshape(L, *matrix[:inputs], rank), b_LRO.reshape(L, rank, *matrix[inputs:])
    magnitude = jnp.asarray(magnitude_LO.reshape(L, *matrix[inputs:])) if dora else None
    return LowRank(base, jnp.asarray(a), jnp.asarray(b), magnitude, weight * (1.0 if scale is None else scale))


def _has_no_effect(node: LowRank) -> bool:
    """Returns whether an update is zero and its magnitudes are the norms of the base."""
    if jnp.any(node.b):
        return False
    norms = lambda i: column_norms(nodes.of_layer(node.base, i), node.a.ndim - 2)
    return node.magnitude is None or all(
        np.allclose(norms(i), magnitude, rtol=1e-5) for i, magnitude in enumerate(node.magnitude)
    )


def write(
    folder: Path,
    family: Family,
    config: ModelConfig,
    params: Mapping[str, Any],
    adapted: Collection[str],
    base: str,
    dtype: Any = None,
) -> None:
    """Writes the low-rank updates of a model, and further parameters, as an adapter that PEFT loads.

    Args:
      folder: the folder.
      family: the conversion table.
      config: the model's config.
      params: the parameters with `LowRank` nodes.
      adapted: paths of parameters that replace those of the base, such as heads.
      base: the folder or hub name of the base.
      dtype: dtype of the tensors; None: as they are.
    """
    # Files of a model without a head omit the prefix.
    bare = family.prefix if convert.heads(family, config) == family.heads.get(()) else ""
    shapes, leaves = convert.tree_shapes(config, family.module), convert.flat(params)
    whole = convert.to_hf(family, config, params)
    updates: dict[str, Factors] = {}
    saved: dict[str, np.ndarray] = {}
    transposed = False
    for rule in convert.applying(family.rules, config, shapes):
        if set(rule.leaves) & set(adapted):
            names = rule.names(config, shapes).values()
            saved |= {name.removeprefix(bare): np.asarray(whole[name].make()) for name in names}
        if not rule.idle and any(isinstance(leaves[path], LowRank) for path in rule.leaves):
            order = _order(rule, config, shapes)
            transposed |= order.transposed
            for i, name in _modules(rule, config, shapes).items():
                module = name.removesuffix(".weight").removeprefix(bare)
                updates[module] = _layer_factors([leaves[path] for path in rule.leaves], i, order)
    if dtype is not None:
        saved = {name: tensor.astype(dtype) for name, tensor in saved.items()}
        updates = {module: factors.astype(dtype) for module, factors in updates.items()}
    known = [name.removesuffix(".weight").removeprefix(bare) for name in convert.hf_shapes(family, config)]
    peft.write(folder, config, updates, saved, known, base, transposed)


def _layer_factors(leaves: list[Any], layer: int, order: MatrixOrder) -> Factors:
    """Returns the update of one layer of a tensor of the file, which may contain several kernels."""
    parts = [_flatten(leaf, layer) if isinstance(leaf, LowRank) else None for leaf in leaves]
    real = [part for part in parts if part is not None]
    scale = real[0].scale
    if all(part.scale == scale and np.array_equal(part.a_RI, real[0].a_RI) for part in real):
        a_RI = real[0].a_RI
        columns = [slice(None)] * len(parts)
    else:  # a block of A for each kernel
        a_RI = np.concatenate([part.a_RI for part in real])
        stops = np.cumsum([0 if part is None else len(part.a_RI) for part in parts])
        columns = [slice(stop - (0 if part is None else len(part.a_RI)), stop) for part, stop in zip(parts, stops)]
    b_OR = np.zeros((sum(order.sizes), len(a_RI)), a_RI.dtype)
    magnitude_O = np.zeros(sum(order.sizes), np.float32)
    dora = any(part.magnitude_O is not None for part in real)
    for n, (part, leaf) in enumerate(zip(parts, leaves)):
        rows = slice(sum(order.sizes[:n]), sum(order.sizes[: n + 1]))
        if part is not None:
            b_OR[rows, columns[n]] = part.b_OR * (part.scale / scale)
        if part is not None and part.magnitude_O is not None:
            magnitude_O[rows] = part.magnitude_O
        elif dora:
            matrix = np.asarray(nodes.of_layer(leaf, layer), np.float32)
            magnitude_O[rows] = np.linalg.norm(matrix.reshape(-1, order.sizes[n]), axis=0)
    return Factors(
        np.ascontiguousarray(a_RI[:, order.inputs]),
        np.ascontiguousarray(b_OR[order.outputs]),
        scale,
        magnitude_O[order.outputs] if dora else None,
    )


def _flatten(node: LowRank, layer: int) -> Factors:
    """Returns the sum of nested updates of one layer as one update, in the order of our kernels."""
    chain = [node]
    while isinstance(chain[-1].base, LowRank):
        chain.append(chain[-1].base)
    if len(chain) > 1 and any(link.magnitude is not None for link in chain):
        raise UserError("one adapter cannot represent several with magnitudes (DoRA); save jaxlm.merge(lm) instead")
    a = [np.asarray(link.a[layer]).reshape(-1, link.a.shape[-1]).T for link in chain]
    b = [np.asarray(link.b[layer]).reshape(link.b.shape[1], -1).T for link in chain]
    scale = chain[0].scale
    magnitude = None if node.magnitude is None else np.asarray(node.magnitude[layer]).reshape(-1)
    columns = [part * (link.scale / scale) if link.scale != scale else part for part, link in zip(b, chain)]
    return Factors(np.concatenate(a), np.concatenate(columns, axis=1), scale, magnitude)
