"""Tasks: what examples are made of the data, what is minimised, what is scored.  One small class each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from jaxlm import config
from jaxlm.config import RunConfig
from jaxlm.data import corpus
from jaxlm.data.batches import Batch, Examples
from jaxlm.data.corpus import Prepared
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.losses import Losses
from jaxlm.nn.transformer import Transformer
from jaxlm.tasks import records
from jaxlm.tasks.classification import ClassificationTask
from jaxlm.tasks.multiple_choice import MultipleChoiceTask
from jaxlm.tasks.pretraining import CausalLMTask, MaskedLMTask
from jaxlm.tasks.question_answering import QuestionAnsweringTask
from jaxlm.tasks.records import RecordTask
from jaxlm.tasks.similarity import SimilarityTask
from jaxlm.tasks.tagging import TaggingTask


class Task(Protocol):
    """All that a step, an evaluation and `fit` ask of a task."""

    head: Any  # of the model, that it reads; None: hidden states
    best: Any  # the score by which the best checkpoint is chosen: higher is better, but for "loss"
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
}


def register(kind: type, task: type[RecordTask]) -> None:
    """Makes a task of your own known: `kind` is the dataclass of its fields, `task` what it does."""
    TASKS[kind] = task
    config.TASKS[kind.__name__] = kind


def prepare(run: RunConfig, tokenizer: Tokenizer | None, say: Callable[[str], None]) -> Prepared:
    """What a run reads.  `tokenizer`: in place of the run's.  Raises UserError for bad data."""
    kind = TASKS[type(run.task)]
    if issubclass(kind, RecordTask):
        return records.prepare(run, kind, tokenizer, say)
    return corpus.prepare(run, say)


def make_task(run: RunConfig, tokenizer: Tokenizer, labels: tuple[str, ...] = ()) -> Any:
    """The task of a run.  Raises UserError where the tokenizer lacks a token that the task needs."""
    return TASKS[type(run.task)](run.task, run.data.length, run.seed, tokenizer, labels)
