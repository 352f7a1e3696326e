"""Tasks: how examples are built from data, which loss is minimised, how predictions are scored.

task             the protocol `Task`, and `register`
records          `RecordTask` and `HeadTask`, the bases of tasks over rows of a table
classification, tagging, question_answering, multiple_choice, similarity    tasks that read the logits of a head
generation, seq2seq, chat    tasks whose prediction is a text
answer_pairs, preference, reward    pairs of a chosen and a rejected answer
pretraining, permuted, denoising    tasks over running text
multi_task       several tasks with one body
distillation     a task whose model also learns from a teacher
reading, given, cells        records from files, examples from Python, values of columns
labels, tags     which output of a head a label is, and how tags mark spans
states           hidden states and losses of packed batches
metrics          scores
"""

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

for _module in pkgutil.iter_modules(__path__):  # each module registers its tasks, as a user's module does
    importlib.import_module(f"{__name__}.{_module.name}")


def prepare(
    run: RunConfig,
    tokenizer: Tokenizer | None,
    log: Callable[[str], None],
    known: Labels | None = None,
) -> Prepared:
    """Returns the data of a run.

    Args:
      run: the run.
      tokenizer: replaces the tokenizer of the run.
      log: prints a line of progress.
      known: the names of the outputs of the head that the run starts from, for several tasks by the name of the part;
        None if the head is randomly initialised and the data define its outputs.

    Raises:
      UserError: for invalid data, and for labels that the head does not have.
    """
    kind = TASKS[type(run.task)]
    if kind is TaskMixture:
        return with_labels(run, multi_task.prepare(run, TASKS, tokenizer, log), known, log)
    if issubclass(kind, RecordTask):
        return reading.prepare(run, kind, tokenizer, log, known if isinstance(known, tuple) else None)
    return corpus.prepare(run, log, tokenizer)


def with_labels(run: RunConfig, data: Prepared, known: Labels | None, log: Callable[[str], None]) -> Prepared:
    """Returns data that was prepared without a head, with the label names of the head that the run starts from."""
    kind = TASKS[type(run.task)]
    if kind is TaskMixture and isinstance(known, Mapping):
        return multi_task.with_labels(run, data, TASKS, known, log)
    if not isinstance(known, tuple) or not issubclass(kind, RecordTask):
        return data
    names, train, held_out = labels.align_labels(kind, run.task, data.train, data.train, data.held_out, known, log)
    return data._replace(train=train, held_out=held_out, labels=names)


def columns_of(task: Any, labelled: bool) -> Columns | None:
    """Returns the columns that a task reads, or None if it may read any column.

    Args:
      task: the config of the task.
      labelled: whether the labels are read too.
    """
    kind = TASKS.get(type(task))
    return kind.columns(task, labelled) if kind is not None and issubclass(kind, RecordTask) else None


def best_score_of(run: RunConfig) -> str:
    """Returns the name of the score that selects the best checkpoint of the run."""
    kind = TASKS[type(run.task)]
    return run.best or (make_task(run, None).best if issubclass(kind, (RecordTask, TaskMixture)) else kind.scores[0])


def make_task(run: RunConfig, tokenizer: Tokenizer | None, outputs: Any = ()) -> Task:
    """Returns the task of a run.

    Args:
      run: the run.
      tokenizer: the tokenizer of the run.
      outputs: the names of the outputs of the head, for several tasks by the name of the part.

    Raises:
      UserError: if the tokenizer lacks a token that the task needs.
    """
    if isinstance(run.task, config.MultiTask):
        make = lambda name, part: make_task(replace(run, task=part.task), tokenizer, outputs.get(name, ()))
        return TaskMixture(run.task, {name: make(name, part) for name, part in run.task.parts.items()})
    return TASKS[type(run.task)](run.task, run.data.length, run.seed, tokenizer, tuple(outputs))
