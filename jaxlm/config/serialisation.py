"""Configs as plain JSON values, and back."""

from __future__ import annotations

import dataclasses
import json
from types import UnionType
from typing import Any, Union, get_args, get_origin

from jaxlm.config.ranges import Config, hints
from jaxlm.config.task import TASK_CONFIGS
from jaxlm.errors import UserError, perhaps


def to_json(config: Any) -> dict[str, Any]:
    """Returns a config as plain JSON values; that of a task in it has its kind under `kind`.

    `from_json` is the inverse.
    """
    return json.loads(json.dumps(_values(config)))


def task_to_json(task: Any) -> dict[str, Any]:
    """Returns the config of a task as plain JSON values, with its kind.  `task_from_json` is the inverse."""
    return {"kind": type(task).__name__, **to_json(task)}


def _values(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _values(inner) for name, inner in value.items()}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    made = {field.name: _values(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Config) and hints(type(value)).get("task") is Any:
        made["task"] = {"kind": type(value.task).__name__, **made["task"]}  # type: ignore[attr-defined]
    return made


def task_from_json(values: dict[str, Any]) -> Any:
    """Returns the config of a task from `task_to_json`'s values.  Raises UserError for a kind that is not known."""
    own = {name: value for name, value in values.items() if name != "kind"}
    if values["kind"] not in TASK_CONFIGS:
        raise UserError(f"the task is {values['kind']}, which is not one of jaxlm's; give its config by --config")
    return from_json(TASK_CONFIGS[values["kind"]], own)


def from_json(kind: type, values: dict[str, Any]) -> Any:
    """Returns the dataclass `kind` from `to_json`'s values.

    Raises:
      UserError: for a field that `kind` does not have.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}
    types = hints(kind) if issubclass(kind, Config) else {}
    made = {}
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"{kind.__name__} has no field {name!r}{perhaps(name, fields)}")
        made[name] = _of_type(types.get(name), value)
    return kind(**made)


def _of_type(hint: Any, value: Any) -> Any:
    """Returns the value of a field as its type has it."""
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, dict):
        return value
    if hint is Any:
        return task_from_json(value)
    if get_origin(hint) is dict:
        return {name: _of_type(get_args(hint)[1], inner) for name, inner in value.items()}
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [choice for choice in choices if isinstance(choice, type) and issubclass(choice, Config)]
    return from_json(kinds[0], value) if kinds else value


def difference(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    """Dotted fields in which two `to_json` values differ, as lines `field: ours | theirs`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = sorted(ours.keys() | theirs.keys())
        return [line for n in names for line in difference(ours.get(n), theirs.get(n), f"{prefix}.{n}".lstrip("."))]
    return [] if ours == theirs else [f"{prefix}: {ours!r} | {theirs!r}"]
