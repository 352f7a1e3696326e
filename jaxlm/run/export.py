"""Exports the model of a run in Hugging Face format; a run of several tasks exports one model per task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxlm import families
from jaxlm.devices import hosts
from jaxlm.lm import LM, save, with_params
from jaxlm.run.folder import write_json
from jaxlm.storage import disk
from jaxlm.tasks.task import Task


def export(lm: LM, task: Task, folder: Path, privacy: dict[str, Any] | None = None) -> tuple[LM, str]:
    """Writes the model of a run, or one model per task.

    Args:
      lm: the model of the run.
      task: decides which models are exported, and into which subfolders.
      folder: is replaced as a whole.
      privacy: the guarantee of a private run, which is written to privacy.json.

    Returns:
      The first exported model, and the name of its format.
    """

    def write(params: Any) -> str:
        exported = task.exports(with_params(lm, params))
        with disk.atomic_folder(folder, overwrite=True) as new:
            for name, (own_task, own_lm) in exported.items():
                assert own_lm.origin is not None  # set by `weights.origin`
                origin = own_lm.origin._replace(config={**own_lm.origin.config, **own_task.config_keys})
                kind = save(replace(own_lm, origin=origin), new / name)
                _rename_class(new / name, own_task)
                if privacy is not None:
                    write_json(new / name / "privacy.json", privacy)
        return kind

    kind = hosts.read_on_first(lm.params, write)
    return next(iter(task.exports(lm).values()))[1], kind


def _rename_class(folder: Path, task: Task) -> None:
    """Writes the class of transformers for the task into config.json, where several classes have the same tensors."""
    if task.exported_as:
        values = families.read_config(folder / "config.json")
        architectures = [task.exported_as.get(name, name) for name in values.get("architectures", [])]
        write_json(folder / "config.json", values | {"architectures": architectures})
