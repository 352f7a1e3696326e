"""Tasks: what examples are made of the data, what is minimised, what is scored.  One small class each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import jax

from jaxlm import config
from jaxlm.config import RunConfig
from jaxlm.data import corpus
from jaxlm.data.batches import Batch, Batches, Examples
from jaxlm.data.corpus import Prepared
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.losses import Losses
from jaxlm.nn.transformer import Transformer
from jaxlm.tasks import records, several
from jaxlm.tasks.classification import ClassificationTask
from jaxlm.tasks.multiple_choice import MultipleChoiceTask
from jaxlm.tasks.pretraining import CausalLMTask, MaskedLMTask
from jaxlm.tasks.question_answering import QuestionAnsweringTask
from jaxlm.tasks.records import RecordTask
from jaxlm.tasks.several import SeveralTask
from jaxlm.tasks.similarity import SimilarityTask
from jaxlm.tasks.tagging import TaggingTask


class Task(Protocol):
    """All that a step, an evaluation and `fit` ask of a task."""

    head: Any  # of the model, that it reads; None: hidden states
    best: Any  # the score by which the best checkpoint is chosen: higher is better, but for "loss"
    scores: Any  # those that it may be chosen by
    most: int  # examples in a row E

    def examples(self, part: Any, training: bool) -> Examples:
        """The examples of a part of the data."""

    def losses(self, module: Transformer, params: Any, batch: Batch, key: jax.Array | None) -> Losses:
        """Sums and weights over one micro-batch [B, ...], and what is kept of its examples; `key` is for dropout, None
        in evaluation."""

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Those of the `losses` that are minimised, and what each is divided by: its weight in all micro-batches."""

    def score(self, means: Mapping[str, float], totals: Mapping[str, float], part: Any) -> dict[str, float]:
        """Evaluation figures from each loss's mean, and from its sum over the whole part."""


TASKS: dict[type, Any] = {
    config.CausalLM: CausalLMTask,
    config.MaskedLM: MaskedLMTask,
    config.Classification: ClassificationTask,
    config.Tagging: TaggingTask,
    config.QuestionAnswering: QuestionAnsweringTask,
    config.Similarity: SimilarityTask,
    config.MultipleChoice: MultipleChoiceTask,
    config.Several: SeveralTask,
}


def register(kind: type, task: type[RecordTask]) -> None:
    """Makes a task of your own known: `kind` is the dataclass of its fields, `task` what it does."""
    TASKS[kind] = task
    config.TASKS[kind.__name__] = kind


def prepare(run: RunConfig, tokenizer: Tokenizer | None, say: Callable[[str], None]) -> Prepared:
    """What a run reads.  `tokenizer`: in place of the run's.  Raises UserError for bad data."""
    kind = TASKS[type(run.task)]
    if kind is SeveralTask:
        return several.prepare(run, TASKS, tokenizer, say)
    if issubclass(kind, RecordTask):
        return records.prepare(run, kind, tokenizer, say)
    return corpus.prepare(run, say)


def best_of(run: RunConfig) -> str:
    """The score by which the run's best checkpoint is chosen."""
    best = TASKS[type(run.task)].best
    return run.best or (best if isinstance(best, str) else make_task(run, None).best)


def make_task(run: RunConfig, tokenizer: Tokenizer | None, labels: Any = ()) -> Any:
    """The task of a run.  labels: names of the outputs of its head; of several tasks, those of each.

    Raises UserError where the tokenizer lacks a token that the task needs.
    """
    if isinstance(run.task, config.Several):
        make = lambda name, part: make_task(replace(run, task=part.task), tokenizer, labels.get(name, ()))
        return SeveralTask(run.task, {name: make(name, part) for name, part in run.task.parts.items()})
    return TASKS[type(run.task)](run.task, run.data.length, run.seed, tokenizer, tuple(labels))


def make_batches(task: Any, part: Any, rows: int, length: int, seed: int | None) -> Any:
    """Batches of a part of the data: for training; or, where there is no seed, for evaluation."""
    if isinstance(task, SeveralTask):
        return task.held_out(part, rows, length) if seed is None else task.batches(part, rows, length, seed)
    return Batches(task.examples(part, seed is not None), rows, length, task.most, seed)
