"""The mesh, and the one table from logical axes to mesh axes.

Knows no model: it is handed logical axes and says where they lie.
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

# Neighbours on the last axis are neighbours on the chips' network: what is split there is exchanged most often.
# `expert` and `stage` are reserved, for mixtures of experts and pipelines.
AXES = ("data", "fsdp", "context", "tensor")
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "between": ("context", "tensor"),  # length of the residual stream: norms and residuals are split over both
    "keys": (),  # length of keys and values, which every query may want
    "width": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_width": (),
    "mlp": ("tensor",),
    "vocabulary": ("tensor",),
    "layers": (),
}
LETTERS = {"B": "batch", "T": "length", "S": "length"}  # axes of a batch's fields, by the letters of their names
# Entries of one layer; a parameter above this must not lie whole on every device of a mesh that could split it.
LARGE = 1 << 20


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices, the axis -1 being what is left.

    Of several slices (TPU pods, each with a network of its own), the first axis above 1, of `data` and `fsdp`, goes
    over the slices.  Raises UserError where the sizes do not multiply to the number of devices.
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
    over = next((name for name in RULES["batch"] if sizes[name] > 1), "data")
    if sizes[over] % slices:
        raise UserError(
            f"mesh axis {over} {sizes[over]} is not divided by the {slices} slices, between which it must go; "
            f"set --mesh.{over} to a multiple of {slices}"
        )
    between = tuple(slices if name == over else 1 for name in AXES)
    within = tuple(size // ways for size, ways in zip(shape, between))
    return Mesh(
        mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True),
        AXES,
    )


def axis_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """The size of each mesh axis.  Raises UserError where they do not multiply to the number of devices."""
    given = dataclasses.asdict(config)
    sizes = {name: given[name] for name in AXES}
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1:
        raise UserError(f"mesh sizes {given} leave {len(free)} axes to infer; at most one may be -1")
    if known < 1 or devices % known or (not free and known != devices):
        divisors = [n for n in range(1, devices + 1) if devices % n == 0]
        raise UserError(
            f"mesh sizes {given} do not multiply to the {devices} devices found; "
            f"let one of them be -1, or choose them of the divisors {divisors} of {devices}"
        )
    return sizes | ({free[0]: devices // known} if free else {})


def spec(axes: tuple[str | None, ...], names: Sequence[str] = AXES) -> PartitionSpec:
    """The mesh axes of each logical axis, as far as a mesh with axes of these names has them; None is not split."""
    over = lambda axis: tuple(name for name in RULES[axis] if name in names)
    return PartitionSpec(*[(over(axis) or None) if axis else None for axis in axes])


def check(sizes: Mapping[str, int], axes: tuple[str | None, ...], shape: tuple[int, ...], name: str) -> None:
    """Raises UserError where a mesh of these sizes does not divide a parameter, or leaves a large one whole."""
    split = 1
    for axis, size in zip(axes, shape, strict=True):
        if axis is None:
            continue
        ways = ways_of(sizes, axis)
        split *= ways
        if size % ways:
            below = size - size % ways
            near = f"{below}, {below + ways}" if below else f"{ways}"
            raise UserError(
                f"{name} has {axis} {size}, which the mesh splits {ways} ways over {RULES[axis]}; "
                f"the nearest sizes that do divide: {near}"
            )
    of_layer = math.prod(size for axis, size in zip(axes, shape) if axis != "layers")
    if split == 1 and of_layer > LARGE and sizes.get("fsdp", 1) * sizes.get("tensor", 1) > 1:
        largest = max((size, n) for n, size in enumerate(shape) if axes[n] != "layers")[1]
        raise UserError(
            f"{name} {shape} would lie whole on each of {math.prod(sizes.values())} devices; give one of its axes "
            f"{axes} a mesh axis in jaxlm.devices.sharding.RULES, or in its row of jaxlm.nn.parameters.TABLE the "
            f"logical axis 'width' (fsdp) to axis {largest}, its largest"
        )


def sharding(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...], name: str) -> NamedSharding:
    """Where a parameter lies.  Raises UserError as `check` does."""
    check(mesh.shape, axes, shape, name)
    return NamedSharding(mesh, spec(axes, mesh.axis_names))


def batch_sharding(mesh: Mesh, field: str, shape: tuple[int, ...] | None = None) -> NamedSharding:
    """Of a batch's field [k, B / k, ...], which its name says the axes of: rows and length are split, micro-batches
    are not; nor is, where the shape is given, a length that the mesh does not divide."""
    letters = field.rpartition("_")[2]
    axes = [LETTERS.get(letter) for letter in letters]
    for place, size in enumerate(() if shape is None else shape[1:]):
        if axes[place] == "length" and size % ways(mesh, "length"):
            axes[place] = None
    return NamedSharding(mesh, PartitionSpec(None, *spec(tuple(axes), mesh.axis_names)))


def mesh_of(tree: Any) -> Mesh | None:
    """Returns the mesh that the arrays of a tree lie on, by the first of them; of one device where it lies on one.

    None: the tree has no arrays of JAX, or they lie on several devices without a mesh.
    """
    leaf = next(iter(jax.tree.leaves(tree)), None)
    layout = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    if isinstance(layout, NamedSharding):
        return layout.mesh if isinstance(layout.mesh, Mesh) else None
    if layout is None or len(layout.device_set) > 1:
        return None
    return Mesh(np.array([*layout.device_set]).reshape([1] * len(AXES)), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def ways(mesh: Mesh, axis: str) -> int:
    """Number of parts that a logical axis is split into."""
    return ways_of(mesh.shape, axis)


def ways_of(sizes: Mapping[str, int], axis: str | None) -> int:
    """The same, by the sizes of a mesh's axes; None is not split."""
    return math.prod(sizes.get(over, 1) for over in RULES[axis]) if axis else 1


@dataclass(frozen=True)
class Placement:
    """Pins activations to a mesh; models carry it.  Without a mesh it leaves them where they are.

    mesh: of one device, where a model lies on one; None: it is not known on which devices the model lies.
    """

    mesh: Mesh | None = None

    def __call__(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """`x`, whose dimensions are these logical axes, as the table says."""
        if self.mesh is None or self.mesh.size == 1:
            return x
        axes = tuple(self._fitting(axis, size) for axis, size in zip(axes, x.shape, strict=True))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec(axes, self.mesh.axis_names)))

    def _fitting(self, axis: str | None, size: int) -> str | None:
        """The axis, or where the mesh does not divide the size, as of one token or a few rows, what does divide it."""
        wider = {"between": "length", "length": None, "batch": None}
        while axis in wider and size % self.ways(axis):
            axis = wider[axis]
        return axis

    def ways(self, axis: str) -> int:
        """Number of parts that a logical axis is split into."""
        return 1 if self.mesh is None else ways(self.mesh, axis)
