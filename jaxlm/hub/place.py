"""Loads tensors from files onto devices: each shard is read from the slices of tensors that it consists of."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxlm.config import ModelConfig
from jaxlm.devices import sharding
from jaxlm.hub.convert import Family, flat, nested, readers, tree_shapes
from jaxlm.nn import parameters
from jaxlm.nn.transformer import Transformer, init

CHUNK = 1 << 25  # bytes of a shard that are read before they are copied to its device


def place(
    family: Family,
    config: ModelConfig,
    tensors: Mapping[str, Any],
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    fresh: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Returns the parameter tree as JAX arrays on their devices.

    In addition to the shards, the host memory holds at most one tensor, or `CHUNK` bytes.

    Args:
      family: the conversion table.
      config: the model's config.
      tensors: the tensors of the file by the names in the table.
      dtype: dtype of the parameters; None: as stored.
      mesh: the mesh for the shardings of the table of parameters; None: the first device.
      fresh: paths of leaves to initialise randomly.
    """
    shardings = {path: _sharding(path, shape, mesh) for path, shape in tree_shapes(config, family.module).items()}
    stored = {path: target for path, target in shardings.items() if path not in fresh}
    leaves = read_leaves(family, config, tensors, dtype, stored)
    if fresh:
        leaves |= _init_leaves(family, config, {path: shardings[path] for path in fresh}, dtype)
    return nested(leaves)


def put(params: Any, dtype: Any = None, mesh: jax.sharding.Mesh | None = None) -> Any:
    """Returns parameters with the trained arrays of their nodes on their devices, in `dtype`; see `place`."""
    rows, trained = parameters.rows(params), parameters.trained_in_nodes(params, others=False)

    def put_leaf(leaf: Any, row: parameters.Parameter, in_node: bool) -> Any:
        if not in_node:
            return leaf
        one = SingleDeviceSharding(jax.local_devices()[0])
        target = one if mesh is None else sharding.sharding(mesh, row.axes, leaf.shape, row.path)
        return jax.device_put(leaf.astype(dtype or leaf.dtype), target)

    return jax.tree.map(put_leaf, params, rows, trained)


def read_leaves(
    family: Family,
    config: ModelConfig,
    tensors: Mapping[str, Any],
    dtype: Any,
    shardings: Mapping[str, jax.sharding.Sharding],
) -> dict[str, jax.Array]:
    """Returns the leaves with the paths in `shardings` as JAX arrays with these shardings; see `place`."""
    leaves: dict[str, jax.Array] = {}
    for path, reader in readers(family, config).items():
        if path in shardings:
            kind = np.dtype(dtype or next((tensors[name].dtype for name in reader.names.values()), np.float32))
            read = partial(reader.read, config, tensors, dtype=kind)
            leaves[path] = _array(read, reader.shape, kind, shardings[path])
    return leaves


def _trim_memory() -> None:
    """Returns freed memory from the C library to the kernel; glibc would keep up to 300 MB between the shards."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def _sharding(path: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh | None) -> jax.sharding.Sharding:
    row = parameters.find(path)
    if mesh is None or row is None:
        return SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else sharding.replicated(mesh)
    return sharding.sharding(mesh, row.axes, shape, path)


def _array(
    read: Callable[..., np.ndarray], shape: tuple[int, ...], dtype: np.dtype, target: jax.sharding.Sharding
) -> jax.Array:
    parts: dict[Any, list[jax.Device]] = {}
    for device, index in target.addressable_devices_indices_map(shape).items():
        spans = tuple(slice(*part.indices(n)) for part, n in zip(index or (), shape))
        parts.setdefault(tuple((span.start, span.stop) for span in spans), []).append(device)
    arrays = []
    for bounds, devices in parts.items():
        for device in devices:
            arrays.append(_shard(read, bounds, dtype, device))
            _trim_memory()
    return jax.make_array_from_single_device_arrays(shape, target, arrays)


def _shard(
    read: Callable[..., np.ndarray], bounds: tuple[tuple[int, int], ...], dtype: np.dtype, device: jax.Device
) -> jax.Array:
    """Returns a shard on its device, read in chunks of rows."""
    spans = tuple(slice(*bound) for bound in bounds)
    size = [stop - start for start, stop in bounds]
    row = math.prod(size[1:]) * dtype.itemsize
    if not size or size[0] * row <= CHUNK:
        # Wait, as below, because each pending transfer would keep its host memory.
        return jax.device_put(read(index=spans), device).block_until_ready()
    rows = max(1, CHUNK // row)
    with jax.default_device(device):
        shard = jax.numpy.zeros(size, dtype)
    for start in range(0, size[0], rows):
        stop = min(start + rows, size[0])
        part = read(index=(slice(spans[0].start + start, spans[0].start + stop), *spans[1:]))
        shard = _put(shard, jax.device_put(part, device), start)
        shard.block_until_ready()
    return shard


@partial(jax.jit, donate_argnums=0)
def _put(shard: jax.Array, part: jax.Array, start: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(shard, part, start, 0)


def _init_leaves(
    family: Family, config: ModelConfig, shardings: dict[str, jax.sharding.Sharding], dtype: Any
) -> dict[str, jax.Array]:
    def draw(key: jax.Array) -> dict[str, jax.Array]:
        drawn = flat(init((family.module or Transformer)(config), key))
        return {path: drawn[path].astype(dtype or drawn[path].dtype) for path in shardings}

    return jax.jit(draw, out_shardings=shardings)(jax.random.key(0))
