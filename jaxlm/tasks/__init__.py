"""Tasks: what examples are made of a corpus, what is minimised, what is scored.  One small class each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax

from jaxlm.config import CausalLM, MaskedLM, RunConfig
from jaxlm.data.batches import Batch, Examples
from jaxlm.data.corpus import Corpus
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.losses import Sum
from jaxlm.nn.transformer import Transformer
from jaxlm.tasks.pretraining import CausalLMTask, MaskedLMTask


class Task(Protocol):
    """All that a step, an evaluation and `fit` ask of a task."""

    most: int  # examples in a row E

    def examples(self, corpus: Corpus, training: bool) -> Examples:
        """The examples of a corpus."""

    def losses(self, module: Transformer, params: Any, batch: Batch, key: jax.Array | None) -> dict[str, Sum]:
        """Sums and weights over one micro-batch [B, ...]; `key` is for dropout, None in evaluation."""

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Those of the `losses` that are minimised, and what each is divided by: its weight in all micro-batches."""

    def score(self, means: Mapping[str, float], totals: Mapping[str, float], corpus: Corpus) -> dict[str, float]:
        """Evaluation figures from each loss's mean, and from its sum over the whole corpus."""


TASKS = {CausalLM: CausalLMTask, MaskedLM: MaskedLMTask}


def make_task(run: RunConfig, tokenizer: Tokenizer) -> Task:
    """The task of a run.  Raises UserError where the tokenizer lacks a token that the task needs."""
    return TASKS[type(run.task)](run.task, run.data.length, run.seed, tokenizer)
