"""Adapters: low-rank updates of the projections of a model, added, trained, merged and removed."""

from __future__ import annotations

import dataclasses
import math
import os
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import families
from jaxlm.config import AdapterConfig
from jaxlm.config.ranges import Number, check_argument
from jaxlm.devices import sharding
from jaxlm.errors import UserError
from jaxlm.hub import convert, peft, updates
from jaxlm.hub.place import put
from jaxlm.lm import LM, find, with_params
from jaxlm.nn import nodes, parameters
from jaxlm.nn.low_rank import LowRank, column_norms
from jaxlm.nn.quantized import is_quantized


def add(params: Any, config: AdapterConfig, key: jax.Array) -> Any:
    """Returns parameters with a `LowRank` node in place of each selected projection; the outputs do not change.

    Args:
      params: stacked parameters of a `Transformer`, arrays.
      config: the adapter; with rank 0, the parameters are returned unchanged.
      key: random key of the new arrays.

    Raises:
      UserError: no projection matches the targets, or the rank is larger than a matrix.
    """
    rows = select(params, config)

    def update(key_path: tuple[Any, ...], leaf: jax.Array) -> Any:
        row = rows.get(parameters.path_of(key_path))
        return leaf if row is None else low_rank(config, row, leaf, key)

    return jax.tree_util.tree_map_with_path(update, params)


def select(params: Any, config: AdapterConfig) -> dict[str, parameters.Parameter]:
    """Returns the rows of the projections that get an update, by path; raises UserError as `add` does."""
    if not config.rank:
        return {}
    rows, leaves = parameters.rows_by_path(params), parameters.by_path(params)
    paths = parameters.projections(params, config.targets)
    for path in paths:
        shape, inputs = leaves[path].shape[1:], rows[path].inputs
        largest = min(math.prod(shape[:inputs]), math.prod(shape[inputs:]))
        if config.rank > largest:
            raise UserError(
                f"adapter.rank is {config.rank}, but {path} has the rank {largest}; choose at most {largest}, or other "
                f"--adapter.targets"
            )
    return {path: rows[path]._replace(path=path) for path in paths}


def low_rank(config: AdapterConfig, row: parameters.Parameter, leaf: jax.Array, key: jax.Array) -> LowRank:
    """Returns the node for a stacked projection [L, I..., O...].

    A has the standard deviation 1 / sqrt(inputs), and B is zero, so that the node represents the same matrix.

    Args:
      config: the adapter.
      row: the row of the projection, with its own path.
      leaf: the projection.
      key: random key, the same for all projections.
    """
    stop = 1 + row.inputs
    base = updates.store_base(leaf, row.inputs, config.base, config.group)
    draw = jax.random.normal(jax.random.fold_in(key, zlib.crc32(row.path.encode())), (*leaf.shape[:stop], config.rank))
    a = draw / math.sqrt(math.prod(leaf.shape[1:stop]))
    b = jnp.zeros((leaf.shape[0], config.rank, *leaf.shape[stop:]))
    norms = None
    if config.kind == "dora":
        norms = jax.lax.map(lambda base: column_norms(nodes.dense(base), row.inputs), base)
    scale = config.alpha / (math.sqrt(config.rank) if config.kind == "rslora" else config.rank)
    return LowRank(base, a, b, norms, scale, config.dropout)


def trained(config: AdapterConfig, params: Any) -> Any:
    """Returns for each leaf whether an adapter trains it: low-rank updates, heads for labels, and chosen biases.

    Args:
      config: the adapter; with rank 0, all leaves are trained except the frozen arrays of nodes.
      params: parameters with nodes, arrays or shapes.

    Returns:
      A tree of bools.
    """
    if not config.rank:
        return parameters.trained_in_nodes(params)
    own = set(parameters.label_heads(params))
    if config.biases != "none":
        biases = {path for path in parameters.by_path(params) if path.endswith("/bias")}
        adapted = {path.replace("/kernel", "/bias") for path in select_nodes(params)}
        own |= biases if config.biases == "all" else biases & adapted
    in_nodes = parameters.trained_in_nodes(params, others=False)
    is_trained = lambda key_path, in_node: in_node or parameters.path_of(key_path) in own
    return jax.tree_util.tree_map_with_path(is_trained, in_nodes)


def select_nodes(params: Any) -> dict[str, LowRank]:
    """Returns the low-rank updates of a parameter tree by path."""
    leaves = parameters.by_path(params, whole_nodes=True)
    return {path: leaf for path, leaf in leaves.items() if isinstance(leaf, LowRank)}


def merge(lm: LM, *, dequantize: bool = False) -> LM:
    """Returns the model with each node, such as the update of an adapter, replaced by its dense matrix.

    Args:
      lm: the model; it is unchanged.
      dequantize: whether to merge also into a quantised base, whose matrices then need as much memory as others.

    Returns:
      A model that `save` writes as a whole.

    Raises:
      UserError: if the base is quantised and `dequantize` is False.
    """
    check_argument("lm", lm, LM)
    quantized = next((path for path, leaf in parameters.by_path(lm.params, True).items() if is_quantized(leaf)), None)
    if quantized is not None and not check_argument("dequantize", dequantize, bool):
        raise UserError(f"{quantized} is quantised, and merged matrices are dense; call merge(lm, dequantize=True)")

    def merged(key_path: tuple[Any, ...], leaf: Any) -> Any:
        if not nodes.is_node(leaf):
            return leaf
        stacked = parameters.stacked_axes(parameters.path_of(key_path))
        return jax.jit(nodes.dense_layers, static_argnames="stacked")(leaf, stacked=stacked)

    params = jax.tree_util.tree_map_with_path(merged, lm.params, is_leaf=nodes.is_node)
    return dataclasses.replace(with_params(lm, params), adapted=())


def add_adapter(lm: LM, adapter: str | os.PathLike[str], weight: float = 1.0) -> LM:
    """Returns the model with the updates of a stored adapter, in addition to those that it has.

    The arrays of the base are shared with `lm`, not copied, so that several adapters of one base take little memory.

    Args:
      lm: the model; it is unchanged.
      adapter: the folder or hub name of an adapter in the format of PEFT.
      weight: factor of the updates.

    Returns:
      The model with the updates; `remove_adapters` removes them.

    Raises:
      UserError: if the adapter does not fit the model, if it has a head (give it to `load` then), or if it has
        magnitudes and the weight is not 1.
    """
    check_argument("lm", lm, LM)
    weight = check_argument("weight", weight, Number)
    found = peft.read(find(check_argument("adapter", adapter, str)))
    if found.saved:
        raise UserError(
            f"{found.folder} also replaces {next(iter(found.saved))}; load it with jaxlm.load(base, adapter=...)"
        )
    if weight != 1 and any(factors.magnitude_O is not None for factors in found.updates.values()):
        raise UserError(f"weight is {weight:g}, but {found.folder} has magnitudes (DoRA), which have no weight; use 1")
    _, family = families.format_of(lm.config, lm.origin)
    factors = updates.canonical_updates(family, lm.config, found, convert.hf_shapes(family, lm.config))
    params = updates.add_updates(family, lm.config, lm.params, factors, weight)
    return with_params(lm, put(params, mesh=sharding.mesh_of(lm.params)))


def remove_adapters(lm: LM) -> LM:
    """Returns the model without its low-rank updates; the arrays of the base are shared with `lm`, not copied.

    Args:
      lm: the model; it is unchanged.

    Returns:
      The base. Heads and biases that were trained with an adapter remain as they are.

    Raises:
      UserError: if `lm` is not a model.
    """
    check_argument("lm", lm, LM)

    def base(leaf: Any) -> Any:
        while isinstance(leaf, LowRank):
            leaf = leaf.base
        return leaf

    return with_params(lm, jax.tree.map(base, lm.params, is_leaf=nodes.is_node))
