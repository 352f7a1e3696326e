"""The export of a run: its model in Hugging Face's format, for several tasks one for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxlm import families
from jaxlm.devices import hosts
from jaxlm.lm import LM, save, with_params
from jaxlm.run.folder import write_json
from jaxlm.storage import disk
from jaxlm.tasks.task import Task


def export(lm: LM, task: Task, folder: Path) -> tuple[LM, str]:
    """Writes the model, for several tasks one for each, and returns the first of them and the name of the format."""

    def write(params: Any) -> str:
        exported = task.exports(with_params(lm, params))
        with disk.atomic_folder(folder, overwrite=True) as new:
            for name, (one, alone) in exported.items():
                assert alone.origin is not None  # as `origin` has it
                alone = replace(alone, origin=_with_keys(alone.origin, one.config_keys))
                kind = save(alone, new / name)
                _name_class(new / name, one)
        return kind

    kind = hosts.first_reads(lm.params, write)
    return next(iter(task.exports(lm).values()))[1], kind


def _with_keys(origin: families.Origin, keys: Mapping[str, Any]) -> families.Origin:
    return origin._replace(config={**origin.config, **keys})


def _name_class(folder: Path, task: Task) -> None:
    """Names the class of transformers that does the task, where another has the same tensors."""
    if task.exported_as:
        values = families.read_config(folder / "config.json")
        named = [task.exported_as.get(name, name) for name in values.get("architectures", [])]
        write_json(folder / "config.json", values | {"architectures": named})
