"""What a model is made of: its parameters as a table, and the tensors of the file that they are read from."""

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
from jaxlm.reports.report import Table


class TensorRow(NamedTuple):
    """A parameter: its place in the tree, what it is, and where in the file it lies."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    tensor: str

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


def of_folder(found: Opened) -> list[TensorRow]:
    """The parameters of a folder, in the dtypes in which they are stored."""
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
    """The parameters that a config makes, and the format in which they would be saved."""
    kind = next((kind for kind, family in FAMILIES.items() if convert.says(family, config)), OWN)
    sources = {} if kind == OWN else convert.sources(FAMILIES[kind], config)
    shapes = convert.tree_shapes(config)
    return kind, [_row(path, shape, "float32", sources.get(path, path)) for path, shape in shapes.items()]


def of_model(config: ModelConfig, mesh: Mapping[str, int] | None = None) -> str:
    """What `jaxlm inspect` says of a config, and where a mesh of these sizes would put it."""
    config.check()
    kind, rows = of_config(config)
    return f"{summary(config, kind)}\n\n{table(rows, mesh)}"


def placed(config: ModelConfig, mesh: Mapping[str, int]) -> Table:
    """Where a mesh of these sizes puts the parameters of a config, as a table for a report or a notebook.

    Raises UserError where such a mesh does not divide a parameter, or leaves a large one whole.
    """
    config.check()
    rows = of_config(config)[1]
    lines = []
    for row in rows:
        sharding.check(mesh, row.axes, row.shape, row.path)
        shape = " x ".join(f"{size:,}" for size in row.shape)
        lines.append([row.path, shape, _over(row), f"{row.size * _bytes(row.dtype) // _ways(row, mesh):,}"])
    head = ("parameter", "shape", "axes of the mesh", "bytes on each device")
    return Table("Where the parameters lie", head, lines, "; ".join([*_sums(rows), *_on_each(rows, mesh)]) + ".")


def _over(row: TensorRow) -> str:
    """The axes of the mesh that each axis of a parameter is split over."""
    over = ("+".join(part if isinstance(part, tuple) else (part or "-",)) for part in sharding.spec(row.axes))
    return ", ".join(over)


def _row(path: str, shape: tuple[int, ...], dtype: str, tensor: str) -> TensorRow:
    row = parameters.find(path)
    return TensorRow(path, shape, dtype, row.axes if row else (None,) * len(shape), tensor)


def table(rows: Iterable[TensorRow], mesh: Mapping[str, int] | None = None) -> str:
    """Columns: path, shape, dtype, logical axes, entries, tensor of the file; then the sums.

    mesh: sizes of its axes; beside the logical axes then stand those of the mesh, and the bytes on each device.  Raises
    UserError where such a mesh does not divide a parameter, or leaves a large one whole.
    """
    rows = list(rows)
    head = ["parameter", "shape", "dtype", "axes", "entries", "tensor of the file"]
    lines = [head[:4] + ["mesh", "bytes on each"] * bool(mesh) + head[4:]]
    for row in rows:
        axes = ", ".join(axis or "-" for axis in row.axes)
        where = []
        if mesh:
            sharding.check(mesh, row.axes, row.shape, row.path)
            where = [_over(row), f"{row.size * _bytes(row.dtype) // _ways(row, mesh):,}"]
        shape = " x ".join(map(str, row.shape))
        lines.append([row.path, shape, row.dtype, axes, *where, f"{row.size:,}", row.tensor])
    numbers = {lines[0].index(name) for name in ("entries", "bytes on each") if name in lines[0]}
    widths = [max(len(line[column]) for line in lines) for column in range(len(head) - 1 + 2 * bool(mesh))]
    text = []
    for line in lines:
        cells = [
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ]
        text.append("  ".join([*cells, line[-1]]).rstrip())
    return "\n".join([*text, "", *_sums(rows), *_on_each(rows, mesh)])


def _ways(row: TensorRow, mesh: Mapping[str, int]) -> int:
    """Parts that the mesh splits a parameter into."""
    return math.prod(sharding.ways_of(mesh, axis) for axis in row.axes)


def _on_each(rows: list[TensorRow], mesh: Mapping[str, int] | None) -> list[str]:
    if not mesh:
        return []
    each = sum(row.size * _bytes(row.dtype) // _ways(row, mesh) for row in rows)
    said = ", ".join(f"{name} {size}" for name, size in mesh.items() if size > 1)
    return [f"on each of {math.prod(mesh.values()):,} devices ({said}): {each / 1e6:,.1f} MB as stored"]


def _sums(rows: list[TensorRow]) -> list[str]:
    sums: dict[str, int] = {}
    for row in rows:
        found = parameters.find(row.path)
        depth = found.depth if found else "head"
        sums[depth] = sums.get(depth, 0) + row.size
    total = sum(sums.values())
    bytes_ = sum(row.size * _bytes(row.dtype) for row in rows)
    parts = ", ".join(f"{depth} {size:,}" for depth, size in sums.items())
    return [f"{total:,} parameters ({parts}), {bytes_ / 1e6:,.1f} MB as stored, {4 * total / 1e6:,.1f} MB in float32"]


def _bytes(dtypes: str) -> int:
    """Of an entry, in the widest of a leaf's dtypes."""
    import ml_dtypes  # noqa: F401  numpy learns bfloat16 by this import

    return max(np.dtype(dtype).itemsize for dtype in dtypes.split())


def summary(config: ModelConfig, kind: str) -> str:
    """One line: the format, the stacks and their sizes, and the heads."""
    family = FAMILIES.get(kind)
    name = (family and convert.heads(family, config)) or "no class of transformers"
    return (
        f"{kind} ({name}): {config.structure}, {config.layers} layers of width {config.width}, {config.heads} heads of "
        f"{config.C}, {config.K} key-value heads, MLP {config.F}, vocabulary {config.vocabulary:,}, "
        f"heads on top: {', '.join(config.heads_on_top) or 'none'}"
    )


def target(
    name: str, head: str | None = None, revision: str | None = None, mesh: Mapping[str, int] | None = None
) -> str:
    """What `jaxlm inspect` says of a folder, a run or a hub name.  Raises UserError as `jaxlm.load` does."""
    from jaxlm.lm import find

    run = Path(name) / "config.json"
    if run.is_file() and "run" in (said := families.read_config(run)) and not (run.parent / "export").exists():
        return of_model(from_json(RunConfig, said["run"]).model, mesh)  # nothing is exported yet
    found = families.look(find(name, revision=revision), head=head)
    aside = sorted(found.origin.buffers)
    more = [f"not needed by the model, kept for saving: {', '.join(aside)}"] if aside else []
    return "\n".join([summary(found.config, found.kind), "", table(of_folder(found), mesh), *more])
