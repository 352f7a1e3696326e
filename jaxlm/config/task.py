"""The base of the configs of tasks, and their table.

A config class has two checks: `check` for its fields, and `check_model` for the model of the run.  The config of a
user's own task may derive from `TaskConfig`, but any dataclass works.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from jaxlm.config.choices import Head
from jaxlm.config.model import ModelConfig
from jaxlm.config.ranges import Config, check_fields, short_repr
from jaxlm.errors import UserError

if TYPE_CHECKING:
    from jaxlm.config.run import RunConfig

Used = tuple[str, str, tuple[Any, ...]]  # a field, another field, and the values of that one which use the first


class TaskConfig(Config):
    """Base class of task configs."""

    heads: ClassVar[tuple[Head, ...] | None] = None  # required output heads; None: one that depends on the labels
    structure: ClassVar[str] = ""  # required model structure, for a task with `heads`; empty: any
    has_label_head: ClassVar[bool] = True  # whether the task has a head with outputs named by the data
    used: ClassVar[tuple[Used, ...]] = ()  # fields that only have an effect for some values of another field

    def check(self) -> None:
        """Raises UserError if fields are out of range or contradict each other."""
        check_fields(self, "task.")
        for name, other, values in self.used:
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default  # type: ignore[attr-defined]
            if getattr(self, other) not in values and value != default:
                raise UserError(
                    f"task.{name} is {value!r}, which has no effect if task.{other} is {getattr(self, other)}; "
                    f"leave it out, or set task.{other} to {' or '.join(map(str, values))}"
                )

    def check_model(self, run: RunConfig, model: ModelConfig) -> None:
        """Raises UserError if the model cannot be trained on the task."""
        check_reader(self, model)


def check_reader(task: Any, model: ModelConfig) -> None:
    """Raises UserError if the model is an encoder-decoder, for tasks that read the hidden states of a single stack."""
    if model.structure == "encoder_decoder":
        raise UserError(
            f"{type(task).__name__} reads the hidden states of an encoder or a decoder, but the model is an "
            f"encoder-decoder; start from another model"
        )


def check_task(task: Any) -> None:
    """Raises UserError if a value is not the config of a task, or its fields are invalid."""
    if not dataclasses.is_dataclass(task) or isinstance(task, type):
        known = ", ".join(sorted(TASK_CONFIGS))
        raise UserError(
            f"task is {short_repr(task)}; it must be the config of a task, such as CausalLM(); known: {known}, "
            f"or your own"
        )
    if isinstance(task, TaskConfig):
        task.check()
    elif isinstance(task, Config):  # the config of a user's own task may be any dataclass
        check_fields(task, "task.")


TASK_CONFIGS: dict[str, type] = {}  # name in config.json -> dataclass; filled by `jaxlm.tasks.register`
