"""The protocol of tasks.  Each task is a subclass of `Task` that defines what differs."""

from __future__ import annotations

import copy
import math
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
from jaxlm.tasks.states import HeadLogits, VocabularyStates, hidden_states


class EvalResult(NamedTuple):
    """The result of an evaluation: the sum and weight of each loss over all batches, and the outputs in input order.

    `outputs` holds for each unit the outputs of each of its examples.
    """

    losses: dict[str, tuple[float, float]]
    outputs: list[list[dict[str, np.ndarray]]]

    @property
    def means(self) -> dict[str, float]:
        """The sums divided by the weights; 0 if the weight is 0."""
        return {name: total / weight if weight else 0.0 for name, (total, weight) in self.losses.items()}


def perplexity(loss: float) -> float:
    """Returns exp(loss), without overflow."""
    return math.exp(min(loss, 700))


class _Immutable(ABCMeta):
    """The metaclass of classes whose objects cannot be changed after `__init__`."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        instance = super().__call__(*args, **kwargs)
        instance.__dict__["_initialised"] = True
        return instance


class Task(metaclass=_Immutable):
    """Turns a part of the data into batches, losses and scores.

    A task is immutable: `bind` and `replace_fields` return a new one.
    """

    head: Any = None  # name of the head of the model that the task reads; None: it reads hidden states
    scores: tuple[str, ...] = ("loss",)  # the first selects the best checkpoint; higher is better, except for "loss"
    one_example: bool = False  # whether each row holds one example from its start; a decoder then omits that mask
    max_examples: int  # maximum number of examples in a row E; if it is 1, a decoder may omit the mask of segments
    source_length: int | None = None  # tokens of the sources in a row S; None: the task has no sources
    teacher: ModelConfig | None = None  # another model that the losses run without a gradient
    has_reference: bool = False  # whether the losses also run the model that the run starts from, the reference
    config_keys: Mapping[str, Any] = {}  # entries of the exported config.json that describe the task
    exported_as: Mapping[str, str] = {}  # class of transformers -> the class with the same tensors for this task
    pooling = Pooling()  # how vectors are computed, if the task reads them

    @property
    def best(self) -> str:
        """The name of the score that selects the best checkpoint."""
        return self.scores[0]

    @abstractmethod
    def examples(self, part: Any, training: bool) -> Examples:
        """Returns the examples of a part of the data."""

    def batches(self, part: Any, rows: int, length: int, seed: int | None) -> Any:
        """Returns the batches of a part of the data, for training, or for evaluation if `seed` is None."""
        return Batches(self.examples(part, seed is not None), rows, length, self.max_examples, seed, self.source_length)

    def losses(self, module: Transformer, params: Any, batch: Batch, key: jax.Array | None) -> Losses:
        """Returns sums and weights over one micro-batch [B, ...], and in evaluation the outputs of its examples.

        A task defines this method, or `losses_from_states`. The hidden states are those with `more_inputs`.

        Args:
          module: the model.
          params: its parameters.
          batch: the micro-batch.
          key: for dropout; None in evaluation.
        """
        x_BTD, auxiliary = hidden_states(module, params, batch, key, self.one_example, self.more_inputs(batch))
        losses, outputs = self.losses_from_states(module, params, x_BTD, batch, key)
        return losses | auxiliary, outputs

    def more_inputs(self, batch: Batch) -> dict[str, Any]:
        """Returns inputs of the model by name, such as a mask, in addition to tokens, segments, positions and types."""
        return {}

    def losses_from_states(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> Losses:
        """Returns `losses` from the hidden states of the batch."""
        raise NotImplementedError(f"{type(self).__name__} defines neither losses nor losses_from_states")

    def predicted(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> dict[str, HeadLogits | VocabularyStates]:
        """Returns what the heads predict, by the name of the loss in `weights`; the arguments are as in `losses`.

        Distillation compares these logits of two models. Their weights have the sum that `weights` returns.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no logits that two models can be compared by")

    def example_logits(self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Returns the logits of each example or token that `predicted` reads, except those of a vocabulary.

        They do not depend on the other examples of the batch, so that a cache can store them by example.

        Returns:
          Arrays [B, E] or [B, T] with at most one more axis, under names that end in their axes. A third axis has a
          letter that no other field of the task has.
        """
        return {}

    def predicted_from(self, logits: Mapping[str, jax.Array], batch: Batch) -> dict[str, HeadLogits]:
        """Returns what `predicted` does, except `VocabularyStates`, from `example_logits`."""
        return {}

    def more_params(self, module: Transformer, key: jax.Array) -> dict[str, Any]:
        """Returns initial parameters that the losses read in addition to those of the model; they are not exported."""
        return {}

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Returns the weights of the `losses` that are minimised, by default of "loss".

        The step divides each of these losses by the sum of its weights over all micro-batches.
        """
        return {"loss": batch["weights_BT" if "weights_BT" in batch else "weights_BE"].sum()}

    @abstractmethod
    def measure(
        self, lm: LM, run_eval: Callable[[Any], EvalResult], batches: Any, part: Any
    ) -> tuple[dict[str, float], Any]:
        """Returns the scores of a part of the data, and the predictions, or None if the task has none.

        Args:
          lm: the model.
          run_eval: runs the model on all batches.
          batches: the batches of the part.
          part: the part of the data.
        """

    def __setattr__(self, name: str, value: Any) -> None:
        if "_initialised" in self.__dict__:
            raise AttributeError(
                f"a task does not change: set {name} in `__init__`, or return self.replace_fields({name}=...)"
            )
        super().__setattr__(name, value)

    def replace_fields(self, **changes: Any) -> Self:
        """Returns a copy of the task with new values of some attributes."""
        task = copy.copy(self)
        task.__dict__.update(changes)
        return task

    def bind(self, model: ModelConfig, pooling: Pooling | None = None, part: Any = None) -> Self:
        """Returns the task with everything that its features and losses take from the model and the data.

        Args:
          model: the config of the model, before `configure`.
          pooling: how the model computes vectors, if it declares that.
          part: the training part of the data; None if the task is not trained.

        Raises:
          UserError: if the task cannot be used with the model.
        """
        return self if pooling is None else self.replace_fields(pooling=pooling)

    def configure(self, model: ModelConfig) -> ModelConfig:
        """Returns the config of the model with the head that the task reads."""
        return model

    def module(self, kind: type[Transformer]) -> type[Transformer]:
        """Returns the class of the model."""
        return kind

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders below `export/` that `exports` fills; a run returns the model in the first."""
        return ("",)

    def exports(self, lm: LM) -> dict[str, tuple[Task, LM]]:
        """Returns for each folder below `export/` the model to write, and its task."""
        return {"": (self, lm)}

    def describe_labels(self, part: Any) -> str | None:
        """Returns a line that describes the labels of the training part."""
        return None

    def truncation_warnings(self, batches: Any) -> list[str]:
        """Returns a line for each kind of text that was truncated to fit the rows of the batches."""
        return []

    def by_class(self, part: Any, predictions: Any) -> dict[str, dict[str, float]]:
        """Returns the precision, recall, F1 and support (number of examples) of each class, if there are classes."""
        return {}

    def warning(self, part: Any, predictions: Any) -> str | None:
        """Returns a warning if all predictions are the same and the labels are not."""
        return None

    def sections(self, part: Any, predictions: Any) -> list[Section]:
        """Returns plots and tables for the report."""
        return []


TASKS: dict[type, Any] = {}  # config of a task -> its class


def register(kind: type, task: type[Task]) -> None:
    """Makes a task available to configs, run folders and the command line.

    Args:
      kind: the dataclass of the task's fields.
      task: the task, which is constructed with these fields.
    """
    TASKS[kind] = task
    TASK_CONFIGS[kind.__name__] = kind
