"""What a run asks of a task.  Every task is a class below this one, and says what differs."""

from __future__ import annotations

import copy
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from jaxlm.config import TASK_CONFIGS, ModelConfig
from jaxlm.data.batches import Batch, Batches, Examples
from jaxlm.hub.pooling import Pooling
from jaxlm.lm import LM
from jaxlm.nn.losses import Losses
from jaxlm.nn.transformer import Transformer
from jaxlm.reports.report import Section


class EvalResult(NamedTuple):
    """What an evaluation saw: sums and weights over all batches, and the outputs of each unit's examples, in order."""

    losses: dict[str, tuple[float, float]]
    outputs: list[list[dict[str, np.ndarray]]]

    @property
    def means(self) -> dict[str, float]:
        """Sums by weights; 0 where there was nothing to weigh."""
        return {name: total / weight if weight else 0.0 for name, (total, weight) in self.losses.items()}


class _Immutable(ABCMeta):
    """The class of classes whose objects do not change once they are made."""

    def __call__(cls, *args: Any, **named: Any) -> Any:
        made = super().__call__(*args, **named)
        made.__dict__["_made"] = True
        return made


class Task(metaclass=_Immutable):
    """From a part of the data to batches, losses and scores.

    A task never changes: `bound` and `replaced` return another.
    """

    head: Any = None  # of the model, that it reads; None: hidden states
    scores: tuple[str, ...] = ("loss",)  # by the first the best checkpoint is chosen; higher is better, but for "loss"
    max_examples: int  # examples in a row E
    source_length: int | None = None  # tokens of the sources in a row S; None: there are no sources
    config_keys: Mapping[str, Any] = {}  # what the exported config.json says of the task
    exported_as: Mapping[str, str] = {}  # class of transformers -> one for the same tensors that does this task
    pooling = Pooling()  # of vectors, where the task reads them

    @property
    def best(self) -> str:
        """The score by which the best checkpoint is chosen."""
        return self.scores[0]

    @abstractmethod
    def examples(self, part: Any, training: bool) -> Examples:
        """The examples of a part of the data."""

    def batches(self, part: Any, rows: int, length: int, seed: int | None) -> Any:
        """Batches of a part of the data: for training; or, where there is no seed, for evaluation."""
        return Batches(self.examples(part, seed is not None), rows, length, self.max_examples, seed, self.source_length)

    @abstractmethod
    def losses(self, module: Transformer, params: Any, batch: Batch, key: jax.Array | None) -> Losses:
        """Sums and weights over one micro-batch [B, ...]; and, in evaluation, what is kept of its examples.

        key: for dropout; None in evaluation.
        """

    @abstractmethod
    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Those of the `losses` that are minimised, and what each is divided by: its weight in all micro-batches."""

    @abstractmethod
    def measure(
        self, lm: LM, run_eval: Callable[[Any], EvalResult], batches: Any, part: Any
    ) -> tuple[dict[str, float], Any]:
        """The scores of a part of the data, and the predictions that they are of, where there are some.

        lm: the model that is measured.  see: runs it over all batches.
        """

    def __setattr__(self, name: str, value: Any) -> None:
        if "_made" in self.__dict__:
            raise AttributeError(
                f"a task does not change: set {name} in `__init__`, or return self.replaced({name}=...)"
            )
        super().__setattr__(name, value)

    def replaced(self, **changes: Any) -> Self:
        """Returns the task with other values of some attributes."""
        made = copy.copy(self)
        made.__dict__.update(changes)
        return made

    def bound(self, model: ModelConfig, pooling: Pooling | None = None, part: Any = None) -> Self:
        """Returns the task as it reads a model and data: with all that its features and losses depend on.

        Args:
          model: before `configured`.
          pooling: how the model makes vectors, where it declares that.
          part: the training part of the data; None: the task is not trained.

        Raises:
          UserError: where the task does not go with the model.
        """
        return self if pooling is None else self.replaced(pooling=pooling)

    def configured(self, model: ModelConfig) -> ModelConfig:
        """Returns the model with the head that the task reads."""
        return model

    def module(self, kind: type[Transformer]) -> type[Transformer]:
        """The class of the model."""
        return kind

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders below `export/` that `exports` fills, the first being that of the model that a run returns."""
        return ("",)

    def exports(self, lm: LM) -> dict[str, tuple[Task, LM]]:
        """What is exported, by the folder below `export/`, and the task that it is for."""
        return {"": (self, lm)}

    def balance(self, part: Any) -> str | None:
        """What the labels of the training part are, in a line."""
        return None

    def truncated(self, batches: Any) -> list[str]:
        """Returns a line for each kind of text that was cut to fit the rows of some batches."""
        return []

    def by_class(self, part: Any, predictions: Any) -> dict[str, dict[str, float]]:
        """Returns for each class, where there are some, its precision, recall, F1 and support (examples of it)."""
        return {}

    def warning(self, part: Any, predictions: Any) -> str | None:
        """Returns a line about predictions that are all the same, where they should not be."""
        return None

    def sections(self, part: Any, predictions: Any) -> list[Section]:
        """Pictures and tables of the report."""
        return []


TASKS: dict[type, Any] = {}  # the dataclass of a task's fields -> its class


def register(kind: type, task: type[Task]) -> None:
    """Makes a task known to configs, run folders and the command line.

    Args:
      kind: the dataclass of the task's fields.
      task: what the task does.
    """
    TASKS[kind] = task
    TASK_CONFIGS[kind.__name__] = kind
