"""The mesh, and the table that maps logical axes to mesh axes.

This module does not depend on a model: it maps the logical axes of any array to a sharding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.config import MeshConfig
from jaxlm.errors import UserError

# Devices that are neighbours on the last axis are neighbours in the network of chips, and communicate most.
# `stage` is reserved for pipelines.
AXES = ("data", "fsdp", "expert", "context", "tensor")
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),
    "between": ("context", "tensor"),  # length of the residual stream, between the blocks
    "keys": (),  # length of keys and values; any query may attend to them
    "width": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_width": (),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "vocabulary": ("tensor",),
    "layers": (),
}
LETTERS = {"B": "batch", "T": "length", "S": "length"}  # logical axes by the letters in the names of a batch's fields
# Entries of one layer. A larger parameter must not be replicated on a mesh that could split it.
LARGE = 1 << 20


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh over all devices.

    With several slices (TPU pods with separate networks), the first of the axes `data` and `fsdp` with a size above 1
    goes across the slices.

    Args:
      config: sizes of the axes. At most one is -1, which is inferred from the number of devices.
      devices: the devices, or None for all devices of JAX.

    Raises:
      UserError: if the product of the sizes is not the number of devices, or if the slices do not divide the axis.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = axis_sizes(config, len(devices))
    shape = tuple(sizes.values())
    if devices[0].platform != "tpu":
        return Mesh(np.array(devices).reshape(shape), AXES)
    from jax.experimental import mesh_utils

    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES)
    outer = next((name for name in RULES["batch"] if sizes[name] > 1), "data")
    if sizes[outer] % slices:
        raise UserError(
            f"mesh axis {outer} {sizes[outer]} is not a multiple of the {slices} slices that it is split across; "
            f"set --mesh.{outer} to a multiple of {slices}"
        )
    between = tuple(slices if name == outer else 1 for name in AXES)
    within = tuple(size // ways for size, ways in zip(shape, between))
    return Mesh(
        mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True),
        AXES,
    )


def axis_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Returns the size of each mesh axis for a number of devices.

    Raises:
      UserError: if the product of the sizes is not the number of devices.
    """
    configured = dataclasses.asdict(config)
    sizes = {name: configured[name] for name in AXES}
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1:
        raise UserError(f"mesh sizes {configured} leave {len(free)} axes to infer; at most one may be -1")
    if known < 1 or devices % known or (not free and known != devices):
        divisors = [n for n in range(1, devices + 1) if devices % n == 0]
        raise UserError(
            f"mesh sizes {configured} do not multiply to the {devices} devices found; "
            f"let one of them be -1, or choose them of the divisors {divisors} of {devices}"
        )
    return sizes | ({free[0]: devices // known} if free else {})


def spec(axes: tuple[str | None, ...], names: Sequence[str] = AXES) -> PartitionSpec:
    """Returns the partition of an array.

    Args:
      axes: the logical axis of each dimension, or None for a dimension that is not split.
      names: the axes of the mesh; other axes in the rules are ignored.
    """
    mesh_axes = lambda axis: tuple(name for name in RULES[axis] if name in names)
    return PartitionSpec(*[(mesh_axes(axis) or None) if axis else None for axis in axes])


def split_layers(mesh: Mesh, x_L: jax.Array) -> jax.Array:
    """Shards the layers of a stacked array [L, ...] over the axes of the mesh that divide their number."""
    names: tuple[str, ...] = ()
    for name, size in mesh.shape.items():
        if size > 1 and x_L.shape[0] % (size * math.prod(mesh.shape[other] for other in names)) == 0:
            names += (name,)
    return jax.lax.with_sharding_constraint(x_L, NamedSharding(mesh, PartitionSpec(names))) if names else x_L


def check(sizes: Mapping[str, int], axes: tuple[str | None, ...], shape: tuple[int, ...], name: str) -> None:
    """Checks that a mesh divides a parameter.

    Args:
      sizes: sizes of the axes of the mesh, by name.
      axes: the logical axis of each dimension of the parameter.
      shape: the shape of the parameter.
      name: its name in error messages.

    Raises:
      UserError: if the mesh does not divide a dimension, or if a large parameter would be replicated.
    """
    parts = 1
    for axis, size in zip(axes, shape, strict=True):
        if axis is None:
            continue
        ways = ways_of(sizes, axis)
        parts *= ways
        if size % ways:
            below = size - size % ways
            nearest = f"{below}, {below + ways}" if below else f"{ways}"
            raise UserError(
                f"{name} has {axis} {size}, which the mesh splits {ways} ways over {RULES[axis]}; "
                f"the nearest sizes that do divide: {nearest}"
            )
    layer_entries = math.prod(size for axis, size in zip(axes, shape) if axis != "layers")
    if parts == 1 and layer_entries > LARGE and sizes.get("fsdp", 1) * sizes.get("tensor", 1) > 1:
        largest = max((size, n) for n, size in enumerate(shape) if axes[n] != "layers")[1]
        raise UserError(
            f"{name} {shape} would be replicated on each of {math.prod(sizes.values())} devices; map one of its axes "
            f"{axes} to a mesh axis in jaxlm.devices.sharding.RULES, or give its largest axis, {largest}, the "
            f"logical axis 'width' (fsdp) in its row of jaxlm.nn.parameters.TABLE"
        )


def sharding(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...], name: str) -> NamedSharding:
    """Returns the sharding of a parameter. Raises UserError as `check` does."""
    check(mesh.shape, axes, shape, name)
    return NamedSharding(mesh, spec(axes, mesh.axis_names))


def batch_sharding(mesh: Mesh, field: str, shape: tuple[int, ...] | None = None) -> NamedSharding:
    """Returns the sharding of a field of a batch: rows and length are split, micro-batches are not.

    Args:
      mesh: the mesh.
      field: the name of the field, which ends in the letters of its axes, such as `tokens_BT`.
      shape: [k, B / k, ...] with k micro-batches. If set, a length that the mesh does not divide is not split.
    """
    letters = field.rpartition("_")[2]
    axes = [LETTERS.get(letter) for letter in letters]
    for dimension, size in enumerate(() if shape is None else shape[1:]):
        if axes[dimension] == "length" and size % ways(mesh, "length"):
            axes[dimension] = None
    return NamedSharding(mesh, PartitionSpec(None, *spec(tuple(axes), mesh.axis_names)))


def mesh_of(tree: Any) -> Mesh | None:
    """Returns the mesh of the first array of a tree, which has one device for an array on one device.

    Returns None if the tree has no JAX arrays, or if they are on several devices without a mesh.
    """
    leaf = next(iter(jax.tree.leaves(tree)), None)
    found = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    if isinstance(found, NamedSharding):
        return found.mesh if isinstance(found.mesh, Mesh) else None
    if found is None or len(found.device_set) > 1:
        return None
    return Mesh(np.array([*found.device_set]).reshape([1] * len(AXES)), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that is replicated on each device."""
    return NamedSharding(mesh, PartitionSpec())


def ways(mesh: Mesh, axis: str) -> int:
    """Returns the number of parts that a logical axis is split into."""
    return ways_of(mesh.shape, axis)


def ways_of(sizes: Mapping[str, int], axis: str | None) -> int:
    """Returns the number of parts for a mesh with these sizes; the axis None is not split."""
    return math.prod(sizes.get(name, 1) for name in RULES[axis]) if axis else 1


@dataclass(frozen=True)
class Placement:
    """Constrains the sharding of a model's activations."""

    mesh: Mesh | None = None  # the mesh of the model, which can have one device; None: unknown, nothing is constrained
    whole: tuple[str, ...] = ()  # logical axes that are not split: those of a function of one group (`nn/groups.py`)

    def __call__(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """Returns `x` with the sharding of these logical axes."""
        if self.mesh is None or self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(axes, x.shape)))

    def spec(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """Returns the partition of an array of this shape; an axis that the mesh does not divide is not split."""
        assert self.mesh is not None
        axes = tuple(self._divided(axis, size) for axis, size in zip(axes, shape, strict=True))
        return spec(axes, self.mesh.axis_names)

    def _divided(self, axis: str | None, size: int) -> str | None:
        """Returns the axis, or one with fewer parts if the mesh does not divide the size (one token, row or head)."""
        fewer_parts = {"between": "length", "length": None, "batch": None, "kv_heads": None}
        while axis in fewer_parts and size % self.ways(axis):
            axis = fewer_parts[axis]
        return None if axis in self.whole else axis

    def ways(self, axis: str) -> int:
        """Returns the number of parts that a logical axis is split into."""
        return 1 if self.mesh is None or axis in self.whole else ways(self.mesh, axis)
