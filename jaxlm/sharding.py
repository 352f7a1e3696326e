"""The mesh, and the one table from logical axes to mesh axes.

Knows no model: it is handed logical axes and says where they lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.config import MeshConfig
from jaxlm.errors import UserError

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "width": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocabulary": ("tensor",),
    "layers": (),
    "length": (),
    "head_width": (),
}
LARGE = 1 << 20  # entries; a parameter above this must not lie whole on every device of a mesh that could split it


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """The mesh over all devices.  Raises UserError where the sizes do not multiply to their number."""
    devices = jax.devices() if devices is None else devices
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1:
        raise UserError(f"mesh sizes {sizes} leave {len(free)} axes to infer; at most one may be -1")
    if known < 1 or len(devices) % known or (not free and known != len(devices)):
        raise UserError(
            f"mesh sizes {sizes} do not multiply to the {len(devices)} devices found; "
            f"let one of them be -1 or choose divisors of {len(devices)}"
        )
    if free:
        sizes[free[0]] = len(devices) // known
    return Mesh(np.array(devices).reshape(tuple(sizes.values())), tuple(sizes))


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of each logical axis; None is not split."""
    return PartitionSpec(*[(RULES[axis] or None) if axis else None for axis in axes])


def sharding(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...], name: str) -> NamedSharding:
    """Where an array of `shape` lies.  Raises UserError where a mesh axis does not divide it or leaves it whole."""
    split = 1
    for axis, size in zip(axes, shape, strict=True):
        over = RULES[axis] if axis else ()
        ways = math.prod(mesh.shape[m] for m in over)
        split *= ways
        if size % ways:
            raise UserError(
                f"{name} has {axis} {size}, which the mesh splits {ways} ways over {over}; "
                f"the nearest sizes that do divide: {size - size % ways}, {size - size % ways + ways}"
            )
    if split == 1 and math.prod(shape) > LARGE and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
        raise UserError(
            f"{name} {shape} would lie whole on each of {mesh.size} devices; give one of its axes {axes} "
            f"a mesh axis in jaxlm.sharding.RULES"
        )
    return NamedSharding(mesh, spec(axes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch's arrays [k, B / k, ...]: rows are split, micro-batches are not."""
    return NamedSharding(mesh, PartitionSpec(None, RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def row_ways(mesh: Mesh) -> int:
    """Number of parts that the rows of a micro-batch are split into."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def constrainer(mesh: Mesh) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """The function that pins an activation to the mesh; models are handed it."""
    if mesh.size == 1:
        return lambda x, axes: x
    return lambda x, axes: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes)))
