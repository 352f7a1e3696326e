"""Tasks: what examples are made of the data, what is minimised, what is scored.  One small class each."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from jaxlm import config
from jaxlm.config import RunConfig
from jaxlm.data import corpus
from jaxlm.data.corpus import Prepared
from jaxlm.data.formats.rows import Columns
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.tasks import labels, multi_task, reading
from jaxlm.tasks.labels import Labels
from jaxlm.tasks.multi_task import TaskMixture
from jaxlm.tasks.records import RecordTask
from jaxlm.tasks.task import TASKS, Task, register

__all__ = ["TASKS", "best_of", "columns_of", "make_task", "prepare", "register", "with_labels"]

for _module in pkgutil.iter_modules(__path__):  # each task registers itself, as a user's does
    importlib.import_module(f"{__name__}.{_module.name}")


def prepare(
    run: RunConfig,
    tokenizer: Tokenizer | None,
    say: Callable[[str], None],
    known: Labels | None = None,
) -> Prepared:
    """Returns what a run reads.

    Args:
      tokenizer: in place of the run's.
      say: takes lines for the person who watches the run.
      known: names of the outputs of the head that the run starts from, of several tasks by the part's name; None: the
        head is new, and the data has them.

    Raises:
      UserError: for bad data, and for labels that the head does not have.
    """
    kind = TASKS[type(run.task)]
    if kind is TaskMixture:
        return with_labels(run, multi_task.prepare(run, TASKS, tokenizer, say), known, say)
    if issubclass(kind, RecordTask):
        return reading.prepare(run, kind, tokenizer, say, known if isinstance(known, tuple) else None)
    return corpus.prepare(run, say, tokenizer)


def with_labels(run: RunConfig, data: Prepared, known: Labels | None, say: Callable[[str], None]) -> Prepared:
    """Returns data that was prepared without a head with its labels as the head that the run starts from names them."""
    kind = TASKS[type(run.task)]
    if kind is TaskMixture and isinstance(known, Mapping):
        return multi_task.with_labels(run, data, TASKS, known, say)
    if not isinstance(known, tuple) or not issubclass(kind, RecordTask):
        return data
    names, train, held_out = labels.agreed(kind, run.task, data.train, data.train, data.held_out, known, say)
    return data._replace(train=train, held_out=held_out, labels=names)


def columns_of(task: Any, labelled: bool) -> Columns | None:
    """Returns the columns that a task reads, of rows whose labels are read too or not; None: any may be read."""
    kind = TASKS.get(type(task))
    return kind.columns(task, labelled) if kind is not None and issubclass(kind, RecordTask) else None


def best_of(run: RunConfig) -> str:
    """The score by which the run's best checkpoint is chosen."""
    kind = TASKS[type(run.task)]
    return run.best or (make_task(run, None).best if issubclass(kind, (RecordTask, TaskMixture)) else kind.scores[0])


def make_task(run: RunConfig, tokenizer: Tokenizer | None, outputs: Any = ()) -> Task:
    """Returns the task of a run.  outputs: names of those of its head; of several tasks, of each task's head.

    Raises UserError where the tokenizer lacks a token that the task needs.
    """
    if isinstance(run.task, config.MultiTask):
        make = lambda name, part: make_task(replace(run, task=part.task), tokenizer, outputs.get(name, ()))
        return TaskMixture(run.task, {name: make(name, part) for name, part in run.task.parts.items()})
    return TASKS[type(run.task)](run.task, run.data.length, run.seed, tokenizer, tuple(outputs))
