"""Conversion of configs to plain JSON values and back."""

from __future__ import annotations

import dataclasses
import json
from types import UnionType
from typing import Any, Union, get_args, get_origin

from jaxlm.config.ranges import Config, field_types
from jaxlm.config.task import TASK_CONFIGS
from jaxlm.errors import UserError, suggestion


def to_json(config: Any) -> dict[str, Any]:
    """Converts a config to plain JSON values; `from_json` is the inverse.

    Returns:
      A dict with the fields of the config; the dict of a nested task names its class under "kind".
    """
    return json.loads(json.dumps(_values(config)))


def task_to_json(task: Any) -> dict[str, Any]:
    """Converts the config of a task to plain JSON values with its class under "kind"; see `task_from_json`."""
    return {"kind": type(task).__name__, **to_json(task)}


def _values(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _values(inner) for name, inner in value.items()}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    values = {field.name: _values(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Config) and field_types(type(value)).get("task") is Any:
        values["task"] = {"kind": type(value.task).__name__, **values["task"]}  # type: ignore[attr-defined]
    return values


def task_from_json(values: dict[str, Any]) -> Any:
    """Restores the config of a task from the values of `task_to_json`.

    Raises:
      UserError: if no task of that name is registered, or a field is unknown.
    """
    fields = {name: value for name, value in values.items() if name != "kind"}
    if values["kind"] not in TASK_CONFIGS:
        raise UserError(f"the task is {values['kind']}, which is not a built-in task; give its config with --config")
    return from_json(TASK_CONFIGS[values["kind"]], fields)


def from_json(kind: type, values: dict[str, Any]) -> Any:
    """Restores a config of the class `kind` from the values of `to_json`.

    Raises:
      UserError: for a field that `kind` does not have.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}
    types = field_types(kind) if issubclass(kind, Config) else {}
    restored = {}
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"{kind.__name__} has no field {name!r}{suggestion(name, fields)}")
        restored[name] = _restore(types.get(name), value)
    return kind(**restored)


def _restore(hint: Any, value: Any) -> Any:
    """Converts the JSON value of a field to the type of the field."""
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, dict):
        return value
    if hint is Any:
        return task_from_json(value)
    if get_origin(hint) is dict:
        return {name: _restore(get_args(hint)[1], inner) for name, inner in value.items()}
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [choice for choice in choices if isinstance(choice, type) and issubclass(choice, Config)]
    return from_json(kinds[0], value) if kinds else value


def difference(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    """Returns the dotted fields in which two `to_json` values differ, as lines `field: ours | theirs`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = sorted(ours.keys() | theirs.keys())
        return [line for n in names for line in difference(ours.get(n), theirs.get(n), f"{prefix}.{n}".lstrip("."))]
    return [] if ours == theirs else [f"{prefix}: {ours!r} | {theirs!r}"]
