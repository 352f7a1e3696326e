"""Quantisation of a trained model: rounding to the nearest values, or GPTQ with calibration data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.config.arguments import check_model
from jaxlm.config.ranges import Count, check_argument
from jaxlm.devices import sharding
from jaxlm.errors import UserError
from jaxlm.lm import LM
from jaxlm.nn import nodes, parameters
from jaxlm.nn.quantized import FakeQuantized, Quantized, Weights, find_scales, round_to_values, split_groups
from jaxlm.nn.quantized import quantize as quantize_array
from jaxlm.transforms.calibration import Moments, input_moments, inverse_factor
from jaxlm.transforms.input_scales import input_scales

Method = Literal["nearest", "gptq"]
Inputs = Literal["float", "int8", "int8_static"]
GROUP = 64  # inputs in a group of 4-bit weights, unless the caller chooses
MIN_GROUP = 8  # with fewer inputs, the scales have as many bits as the weights
BLOCK = 128  # inputs of a matrix that GPTQ rounds before it updates the others
MAX_MOMENTS = 2 << 30  # bytes of Gram matrices that are in memory at the same time


def quantize(
    lm: LM,
    weights: Weights = "int8",
    *,
    group: int | None = None,
    symmetric: bool = True,
    targets: str = "all",
    embeddings: bool = False,
    inputs: Inputs = "float",
    method: Method = "nearest",
    calibration: Iterable[Any] | None = None,
) -> LM:
    """Returns the model with quantised projections, which `save` writes in the format compressed-tensors.

    Biases, norms and heads are unchanged. Masked weights stay zero, and low-rank updates are merged first. The matrices
    of routed experts are rounded to the nearest values by every method, and their inputs are not rounded.

    Args:
      lm: the model.
      weights: int8, int4, nf4 (levels of a normal distribution) or fp8 (8-bit floats, e4m3).
      group: number of consecutive inputs that share a scale, which must divide the inputs of each projection; 0: all
        inputs of an output; None: 0 for 8 bits, and 64 for 4 bits, or the largest divisor of it that is possible.
      symmetric: whether the integer 0 represents 0; if not, each group has a zero point.
      targets: parts of the paths of projections, separated by commas, such as `query,value` or `mlp`; all.
      embeddings: whether to also quantise the embeddings of tokens and the heads over tokens.
      inputs: float; or int8: inputs of projections are rounded to 8 bits, with a scale for each token, and products
        are products of integers; or int8_static: each projection has one scale, from calibration data.
      method: nearest rounds each weight to the nearest value. gptq rounds the inputs of a matrix sequentially and
        corrects the others for the error, which requires calibration data.
      calibration: texts, or lists of token ids, for gptq and int8_static.

    Returns:
      A new model; `lm` is unchanged.

    Raises:
      UserError: for an unknown format, method or target, a group that does not divide the inputs, a model that is
        quantised already or has no projections, and calibration data with too few tokens.

    Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022.
    """
    check_model("lm", lm)
    settings: dict[str, Any] = {"weights": check_argument("weights", weights, Weights)}
    settings["symmetric"] = check_argument("symmetric", symmetric, bool)
    is_static = check_argument("inputs", inputs, Inputs) == "int8_static"
    _check_calibration(check_argument("method", method, Method), is_static, calibration)
    if inputs != "float" and weights not in ("int8", "int4"):
        raise UserError(
            f"inputs is {inputs!r}, but products of integers require integer weights, not {weights}; use int8"
        )
    calibration = calibration if calibration is None or isinstance(calibration, str) else list(calibration)
    paths = parameters.projections(lm.params, check_argument("targets", targets, str), experts=True)
    tables = _tables(lm.params) if check_argument("embeddings", embeddings, bool) else []
    leaves = {path: _dense(path, leaf) for path, leaf in _leaves(lm.params).items() if path in (*paths, *tables)}
    experts = [path for path in paths if parameters.stacked_axes(path) > 1]
    shapes = {path: leaves[path].shape[:2] for path in experts}
    leaves |= {path: leaves[path].reshape(-1, *leaves[path].shape[2:]) for path in experts}  # one layer per expert
    settings["group"] = choose_group(check_argument("group", group, Count | None), weights, paths, leaves)

    done = {path: nearest(leaves.pop(path)[None], 1, first=1, **settings) for path in tables}
    done = {path: jax.tree.map(lambda leaf: leaf[0], node) for path, node in done.items()}
    for path in experts:
        unfold = lambda leaf, shape=shapes[path]: leaf.reshape(*shape, *leaf.shape[1:])
        done[path] = jax.tree.map(unfold, nearest(leaves.pop(path), 1, **settings))
    paths = [path for path in paths if path not in experts]
    scales = input_scales(lm, calibration, paths) if is_static else {}
    for some in _portions(paths, leaves) if method == "gptq" else [paths]:
        moments = input_moments(lm, calibration, paths=some) if method == "gptq" else {}
        for path in some:
            row, array = parameters.find(path), leaves.pop(path)
            assert row is not None  # it is a projection
            if method == "gptq":
                node = gptq(array, row.inputs, moments[path], **settings)
            else:
                node = nearest(array, row.inputs, **settings)
            done[path] = dataclasses.replace(
                node, input_format="float" if inputs == "float" else "int8", input_scale=scales.get(path)
            )
    return dataclasses.replace(lm, params=_replace(lm.params, done))


def _check_calibration(method: str, is_static: bool, calibration: Any) -> None:
    if calibration is None and (is_static or method == "gptq"):
        use = "inputs is 'int8_static'" if is_static else f"method is {method!r}"
        raise UserError(f"{use}, which requires calibration data; give texts as calibration (--calibration)")
    if calibration is not None and not is_static and method == "nearest":
        raise UserError(
            "calibration is given, but the method 'nearest' does not use it; set method to gptq, or inputs to "
            "int8_static"
        )


def _leaves(params: Any) -> dict[str, Any]:
    """Returns the arrays and nodes of a parameter tree by path."""
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=nodes.is_node)
    return {parameters.path_of(key_path): leaf for key_path, leaf in found}


def _tables(params: Any) -> list[str]:
    """Returns the paths of embeddings of tokens and of heads over tokens, [V, D]."""
    rows = ((path, parameters.find(path)) for path in _leaves(params))
    return [path for path, row in rows if row is not None and row.axes == ("vocabulary", "width")]


def _dense(path: str, leaf: Any) -> Any:
    """Returns the dense array of a parameter. Raises UserError if it is quantised."""
    inner = [leaf]
    while inner:
        value = inner.pop()
        if isinstance(value, (Quantized, FakeQuantized)):
            raise UserError(f"{path} is quantised already; quantise the original model instead")
        inner += [getattr(value, name) for name in value.arrays] if nodes.is_node(value) else []
    return nodes.dense_layers(leaf, parameters.stacked_axes(path))


def choose_group(group: int | None, weights: str, paths: list[str], leaves: Mapping[str, Any]) -> int:
    """Returns the size of groups.

    Args:
      group: the size that the user gave; None: the largest possible one up to `GROUP` for 4 bits, else 0.
      weights: the format.
      paths: the projections.
      leaves: arrays or shapes of the projections, and of tables of embeddings, by path.

    Raises:
      UserError: if the group does not divide the inputs of a projection.
    """
    sizes = {path: leaves[path].shape[-1] for path in leaves if path not in paths}
    sizes |= {path: _inputs(path, leaves[path]) for path in paths}
    if group is None:
        common = math.gcd(GROUP, *sizes.values())
        return common if weights in ("int4", "nf4") and common >= MIN_GROUP else 0
    for path, size in sizes.items():
        if group and size % group:
            common = math.gcd(*sizes.values())
            known = [str(n) for n in range(MIN_GROUP, common + 1) if common % n == 0]
            raise UserError(
                f"group is {group}, which does not divide the {size} inputs of {path}; choose 0 (one group)"
                f"{' or one of ' + ', '.join(known) if known else ''}"
            )
    return group


def _inputs(path: str, array: Any) -> int:
    """Returns the number of inputs of a stacked projection."""
    row = parameters.find(path)
    assert row is not None  # it is a projection
    return math.prod(array.shape[1 : 1 + (row.inputs or 1)])


def _portions(paths: list[str], leaves: dict[str, Any]) -> list[list[str]]:
    """Returns the paths in lists for which the Gram matrices fit into `MAX_MOMENTS`, where possible."""
    portions: list[list[str]] = [[]]
    size = 0
    for path in paths:
        own = 4 * len(leaves[path]) * _inputs(path, leaves[path]) ** 2
        if portions[-1] and size + own > MAX_MOMENTS:
            portions, size = [*portions, []], 0
        portions[-1].append(path)
        size += own
    return portions


def _replace(params: Any, done: dict[str, Quantized]) -> Any:
    """Returns the parameters with nodes at some paths, on the mesh of the parameters."""
    mesh = sharding.mesh_of(params)
    replace = lambda key_path, leaf: done.get(parameters.path_of(key_path), leaf)
    replaced = jax.tree_util.tree_map_with_path(replace, params, is_leaf=nodes.is_node)
    if mesh is None or mesh.size == 1:
        return replaced

    def place(leaf: Any, row: Any) -> Any:
        return jax.device_put(leaf, sharding.sharding(mesh, row.axes, leaf.shape, row.path))

    return jax.tree.map(place, replaced, parameters.rows(replaced))


@partial(jax.jit, static_argnames=("inputs", "weights", "group", "symmetric", "first"))
def nearest(array: jax.Array, inputs: int, **how: Any) -> Quantized:
    """Returns a stacked array quantised by `jaxlm.nn.quantized.quantize`, layer by layer.

    Args:
      array: [L, I..., O...].
      inputs: number of axes I.
      **how: further arguments of `quantize`.
    """
    return jax.lax.map(lambda layer: quantize_array(layer, inputs, False, **how), array)


def gptq(
    array: Any, inputs: int, moments: Moments, *, weights: str, group: int = 0, symmetric: bool = True
) -> Quantized:
    """Returns a stacked projection that is rounded so that its outputs on the calibration data change little.

    The inputs are rounded sequentially, those with the largest moments first. After each input, the rest is updated to
    correct the outputs for the error (Frantar et al. 2022, algorithm 1). Scales are those of the original groups.

    Args:
      array: [L, I..., O...].
      inputs: number of axes I.
      moments: the second moments of the inputs of each layer.
      weights: the format, an entry of `FORMATS`.
      group: number of inputs in a group; 0: all.
      symmetric: whether the value 0 represents 0.
    """
    how = {"inputs": inputs, "weights": weights, "group": group, "symmetric": symmetric}
    layers = [_gptq_layer(array[n], moments.sums[n], **how) for n in range(len(array))]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


@partial(jax.jit, static_argnames=("inputs", "weights", "group", "symmetric"))
def _gptq_layer(array: jax.Array, gram_II: jax.Array, inputs: int, weights: str, group: int, symmetric: bool) -> Any:
    """Returns one layer, [I..., O...], quantised; `gram_II` is X^T X."""
    grouped = split_groups(array, 0, inputs, group)  # [G, g, O...]
    scales, zeros = find_scales(grouped, 1, weights, symmetric)
    size, group = math.prod(array.shape[:inputs]), grouped.shape[1]
    order_I = jnp.argsort(-jnp.diag(gram_II), stable=True)
    of_rows = lambda x: None if x is None else x.reshape(len(x), -1)[order_I // group]  # [I, O]
    values_IO = _round_rows(
        array.astype(jnp.float32).reshape(size, -1)[order_I],
        inverse_factor(gram_II[order_I][:, order_I]),
        of_rows(scales),
        of_rows(zeros),
        weights,
    )
    values_IO = jnp.zeros_like(values_IO).at[order_I].set(values_IO)
    zeros = None if zeros is None else zeros[:, 0]
    return Quantized(values_IO.reshape(array.shape), scales[:, 0], zeros, None, 0, inputs)


def _round_rows(matrix_IO: Any, factor_II: Any, scales_IO: Any, zeros_IO: Any, weights: str) -> jax.Array:
    """Returns the values of rows that are rounded sequentially."""
    size = len(matrix_IO)
    block = max(n for n in range(1, BLOCK + 1) if size % n == 0)

    def round_row(matrix_BO: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
        """Rounds row k of a block, and updates the rows after it."""
        k, factor_B, scales_O, zeros_O = inputs
        row_O = matrix_BO[k]
        values_O = round_to_values(row_O, scales_O, zeros_O, weights)
        rounded_O = Quantized(values_O[None], scales_O[None], None if zeros_O is None else zeros_O[None]).materialize()
        error_O = (row_O - rounded_O[0]) / factor_B[k]
        return matrix_BO - factor_B[:, None] * error_O, (values_O, error_O)

    def round_block(matrix_IO: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        start, scales_BO, zeros_BO = inputs
        of_block = lambda x: jax.lax.dynamic_slice_in_dim(x, start, block)
        factor_BI = of_block(factor_II)
        factor_BB = jax.lax.dynamic_slice_in_dim(factor_BI, start, block, 1)
        rows = (jnp.arange(block), factor_BB, scales_BO, zeros_BO)
        _, (values_BO, error_BO) = jax.lax.scan(round_row, of_block(matrix_IO), rows)
        # The factor is zero for rows before the block, and the rows of the block are not read again.
        return matrix_IO - jnp.dot(factor_BI.T, error_BO, precision="highest"), values_BO

    blocks = lambda x: None if x is None else x.reshape(size // block, block, -1)
    starts = jnp.arange(0, size, block)
    _, values = jax.lax.scan(round_block, matrix_IO, (starts, blocks(scales_IO), blocks(zeros_IO)))
    return values.reshape(matrix_IO.shape)
