"""Tables of a model's parameters, with the tensors of the file that they are read from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxlm import families
from jaxlm.config import ModelConfig, RunConfig, from_json
from jaxlm.devices import sharding
from jaxlm.families import FAMILIES, OWN, Opened
from jaxlm.hub import convert
from jaxlm.nn import parameters
from jaxlm.reports.tables import Table


class TensorRow(NamedTuple):
    """A parameter: its path in the tree, its shape, dtype and logical axes, and its tensor in the file."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    tensor: str

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


def rows_of_folder(found: Opened) -> list[TensorRow]:
    """Returns the parameters of a folder, with the dtypes of the file."""
    readers = convert.readers(found.family, found.config)
    prefix = found.family.prefix
    bare = not any(name.startswith(prefix) for name in found.origin.names)
    rows = []
    for path, reader in readers.items():
        stored = {np.dtype(found.tensors[name].dtype).name for name in reader.names.values() if name in found.tensors}
        tensor = (
            "(randomly initialised)" if path in found.fresh else reader.rule.hf.removeprefix(prefix if bare else "")
        )
        rows.append(_row(path, reader.shape, " ".join(sorted(stored)) or "float32", tensor))
    return rows


def of_config(config: ModelConfig) -> tuple[str, list[TensorRow]]:
    """Returns the format in which a model with this config is saved, and its parameters."""
    kind = next((kind for kind, family in FAMILIES.items() if convert.can_represent(family, config)), OWN)
    sources = {} if kind == OWN else convert.sources(FAMILIES[kind], config)
    shapes = convert.tree_shapes(config)
    return kind, [_row(path, shape, "float32", sources.get(path, path)) for path, shape in shapes.items()]


def describe_config(config: ModelConfig, mesh: Mapping[str, int] | None = None) -> str:
    """Returns the output of `jaxlm inspect` for a config.

    Args:
      config: the config of a model.
      mesh: sizes of the axes of a mesh, by name. If set, the table has the sharding of each parameter.

    Raises:
      UserError: if the config is invalid, or if the mesh does not divide a parameter or replicates a large one.
    """
    config.check()
    kind, rows = of_config(config)
    return f"{summary(config, kind)}\n\n{table(rows, mesh)}"


def sharding_table(config: ModelConfig, mesh: Mapping[str, int]) -> Table:
    """Returns how a mesh shards the parameters of a config, as a table for a report or a notebook.

    Args:
      config: the config of a model.
      mesh: sizes of the axes of the mesh, by name.

    Raises:
      UserError: if the config is invalid, or if the mesh does not divide a parameter or replicates a large one.
    """
    config.check()
    rows = of_config(config)[1]
    lines = []
    for row in rows:
        sharding.check(mesh, row.axes, row.shape, row.path)
        shape = " x ".join(f"{size:,}" for size in row.shape)
        lines.append([row.path, shape, _mesh_axes(row), f"{row.size * _entry_bytes(row.dtype) // _parts(row, mesh):,}"])
    head = ("parameter", "shape", "axes of the mesh", "bytes on each device")
    return Table("Where the parameters lie", head, lines, "; ".join([*_totals(rows), *_per_device(rows, mesh)]) + ".")


def _mesh_axes(row: TensorRow) -> str:
    """Returns the axes of the mesh that split each axis of a parameter."""
    axes = ("+".join(part if isinstance(part, tuple) else (part or "-",)) for part in sharding.spec(row.axes))
    return ", ".join(axes)


def _row(path: str, shape: tuple[int, ...], dtype: str, tensor: str) -> TensorRow:
    row = parameters.find(path)
    return TensorRow(path, shape, dtype, row.axes if row else (None,) * len(shape), tensor)


def table(rows: Iterable[TensorRow], mesh: Mapping[str, int] | None = None) -> str:
    """Returns a table as text: path, shape, dtype, logical axes, entries and tensor of each parameter, then totals.

    Args:
      rows: the parameters.
      mesh: sizes of the axes of a mesh, by name. If set, there are two more columns, with the axes of the mesh and
        the bytes on each device.

    Raises:
      UserError: if the mesh does not divide a parameter, or replicates a large one.
    """
    rows = list(rows)
    head = ["parameter", "shape", "dtype", "axes", "entries", "tensor of the file"]
    lines = [head[:4] + ["mesh", "bytes on each"] * bool(mesh) + head[4:]]
    for row in rows:
        axes = ", ".join(axis or "-" for axis in row.axes)
        placement = []
        if mesh:
            sharding.check(mesh, row.axes, row.shape, row.path)
            placement = [_mesh_axes(row), f"{row.size * _entry_bytes(row.dtype) // _parts(row, mesh):,}"]
        shape = " x ".join(map(str, row.shape))
        lines.append([row.path, shape, row.dtype, axes, *placement, f"{row.size:,}", row.tensor])
    numbers = {lines[0].index(name) for name in ("entries", "bytes on each") if name in lines[0]}
    widths = [max(len(line[column]) for line in lines) for column in range(len(head) - 1 + 2 * bool(mesh))]
    text = []
    for line in lines:
        cells = [
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ]
        text.append("  ".join([*cells, line[-1]]).rstrip())
    return "\n".join([*text, "", *_totals(rows), *_per_device(rows, mesh)])


def _parts(row: TensorRow, mesh: Mapping[str, int]) -> int:
    """Returns the number of parts that the mesh splits a parameter into."""
    return math.prod(sharding.ways_of(mesh, axis) for axis in row.axes)


def _per_device(rows: list[TensorRow], mesh: Mapping[str, int] | None) -> list[str]:
    if not mesh:
        return []
    size = sum(row.size * _entry_bytes(row.dtype) // _parts(row, mesh) for row in rows)
    axes = ", ".join(f"{name} {ways}" for name, ways in mesh.items() if ways > 1)
    return [f"on each of {math.prod(mesh.values()):,} devices ({axes}): {size / 1e6:,.1f} MB as stored"]


def _totals(rows: list[TensorRow]) -> list[str]:
    sizes: dict[str, int] = {}
    for row in rows:
        entry = parameters.find(row.path)
        depth = entry.depth if entry else "head"
        sizes[depth] = sizes.get(depth, 0) + row.size
    total = sum(sizes.values())
    stored = sum(row.size * _entry_bytes(row.dtype) for row in rows)
    parts = ", ".join(f"{depth} {size:,}" for depth, size in sizes.items())
    return [f"{total:,} parameters ({parts}), {stored / 1e6:,.1f} MB as stored, {4 * total / 1e6:,.1f} MB in float32"]


def _entry_bytes(dtypes: str) -> int:
    """Returns the bytes of an entry in the widest of a parameter's dtypes."""
    import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy

    return max(np.dtype(dtype).itemsize for dtype in dtypes.split())


def summary(config: ModelConfig, kind: str) -> str:
    """Returns one line with the format, the structure and sizes of a model, and its heads."""
    family = FAMILIES.get(kind)
    name = (family and convert.heads(family, config)) or "no class of transformers"
    return (
        f"{kind} ({name}): {config.structure}, {config.layers} layers of width {config.width}, {config.heads} heads of "
        f"{config.C}, {config.K} key-value heads, MLP {config.F}, vocabulary {config.vocabulary:,}, "
        f"heads on top: {', '.join(config.heads_on_top) or 'none'}"
    )


def describe(
    name: str, head: str | None = None, revision: str | None = None, mesh: Mapping[str, int] | None = None
) -> str:
    """Returns the output of `jaxlm inspect` for a folder, a run or a hub name.

    Args:
      name: a folder in Hugging Face format, the folder of a run, or a name on the Hugging Face Hub.
      head: the head on top, as for `jaxlm.load`.
      revision: the revision of a hub name.
      mesh: sizes of the axes of a mesh, by name. If set, the table has the sharding of each parameter.

    Raises:
      UserError: as `jaxlm.load`, and if the mesh does not divide a parameter or replicates a large one.
    """
    from jaxlm.lm import find

    run = Path(name) / "config.json"
    if run.is_file() and "run" in (content := families.read_config(run)) and not (run.parent / "export").exists():
        return describe_config(from_json(RunConfig, content["run"]).model, mesh)  # the run has no export yet
    found = families.open_folder(find(name, revision=revision), head=head)
    unused = sorted(found.origin.buffers)
    more = [f"not used by the model, kept for saving: {', '.join(unused)}"] if unused else []
    return "\n".join([summary(found.config, found.kind), "", table(rows_of_folder(found), mesh), *more])
