"""Tasks over records: rows of a table, each with a text and what is to be told of it.

A task says what differs from one to the next, each in a method of a few lines:

    read       a row of a file as a record, or an error that says what is wrong with it
    names      what the outputs of the head mean, found in the training records
    features   a record as packed examples: tokens, and labels under names that say their axes
    losses_of  sums over a batch, and what is kept of its examples; of a `HeadTask`, which reads the logits of one head:
                   head     which head of the model gives them
                   loss     the sum over a batch, and its weight
                   outputs  what is kept of each example or token of a batch
    predict    a record's outputs as its prediction
    score      predictions against records: the scores of the field

Packing, epochs, accumulation, sharding, resuming, evaluation in input order and files are not its business.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.data.batches import Batch, Epoch, Features
from jaxlm.data.lines import Place, Row
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.lm import LM
from jaxlm.losses import Losses, Sum
from jaxlm.nn.transformer import Transformer, apply
from jaxlm.tasks.reading import Record, Records, check_labels, column
from jaxlm.tasks.states import hidden
from jaxlm.tasks.task import Seen, Task

Outputs = list[list[dict[str, np.ndarray]]]  # of one record: of each unit, of each example in it
WINDOW = 1024  # records that are tokenized at once


class RecordTask(Task):
    """Base of the tasks over records; the module's text says what is to be given."""

    scores: tuple[str, ...] = ("accuracy",)
    fields: Mapping[str, type] = {}  # of features, beside tokens_BT and types_BT
    kept: tuple[str, ...] = ()  # further features, per token, that `predict` wants back

    def __init__(self, task: Any, length: int, seed: int, tokenizer: Tokenizer, labels: tuple[str, ...] = ()):
        self.task, self.length, self.seed, self.tokenizer, self.labels = task, length, seed, tokenizer, labels
        self.most = max(2, length // 4)  # examples in a row E

    @classmethod
    @abstractmethod
    def read(cls, task: Any, row: Row, place: Place) -> Record | None:
        """The record of a row, without its label where the row has none; None: it is dropped.

        Raises UserError for a column that is not there, or a value that is not what it should be.
        """

    @classmethod
    def labelled(cls, task: Any, row: Row, record: Record, place: Place) -> None:
        """Raises UserError where a record has no label to learn from, or to be scored by."""
        if record.get("label") is None:
            column(row, task.label, place, "--task.label")
            raise UserError(f"{place}: the row has no label in column {task.label!r}; give one, or leave the row out")

    @classmethod
    def settle(cls, task: Any, part: Records, names: Sequence[str]) -> None:
        """Changes labels that only all rows of a part together tell how to read; `names` are the model's, if known."""

    @classmethod
    def labels_of(cls, record: Record) -> Iterable[str]:
        """Those of a record that must be among the `names`."""
        return ()

    @classmethod
    def texts(cls, record: Record) -> Iterable[str]:
        """What a tokenizer is trained on."""
        return [value for value in record.values() if isinstance(value, str)]

    @classmethod
    def target_texts(cls, record: Record) -> Iterable[str]:
        """What a tokenizer is trained on besides, or another one: the texts that are to be written."""
        return ()

    @classmethod
    def names(cls, task: Any, part: Records) -> tuple[str, ...]:
        """Names of the outputs of the head, in order, from the training part; () where they have none."""
        return ()

    @classmethod
    def stratum(cls, task: Any, record: Record) -> Hashable:
        """Records of one stratum are divided alike when a validation part is split off."""
        return None

    @classmethod
    def group(cls, task: Any, record: Record) -> Hashable:
        """Records of one group go to one side, unless this is None."""
        return None

    @abstractmethod
    def features(self, records: Sequence[Record], training: bool) -> Iterator[list[list[Features]]]:
        """For each record its units, for each unit its examples.  A record without a label gives none."""

    @abstractmethod
    def predict(self, record: Record, outputs: Outputs) -> Row:
        """Columns of a prediction; those that begin with an underscore are for `score` alone."""

    @abstractmethod
    def score(self, records: Sequence[Record], predictions: Sequence[Row]) -> dict[str, float]:
        """The scores of the field, each a number."""

    @classmethod
    def beside(cls, task: Any, records: Sequence[Record]) -> list[str]:
        """Lines that belong beside the scores of these records, such as how a library says that it computes them."""
        return []

    @classmethod
    def fitted(
        cls,
        task: Any,
        parts: Sequence[Records],
        names: tuple[str, ...],
        remedy: str = "mend it, or leave the row out",
    ) -> list[Records]:
        """Returns the parts with the labels of their records as the outputs of the head are named.

        Raises UserError, with the remedy, for a label that is the name of no output.
        """
        for part in parts:
            check_labels(cls, part, names, remedy)
        return list(parts)

    # The rest is the same for all: the face of a task that a run sees.

    def configured(self, model: ModelConfig) -> ModelConfig:
        self.refuse_tokens_beyond(model)
        on_top = (self.head,) if self.head else ()
        return replace(model, heads_on_top=on_top, labels=self.labels or model.labels)

    def refuse_tokens_beyond(self, model: ModelConfig) -> None:
        """Makes the tokenizer refuse tokens that the model has no row for."""
        if isinstance(self.tokenizer, Tokenizer):  # of a plan it is a stand-in
            self.tokenizer = self.tokenizer.for_model(model.vocabulary, model.V)

    def examples(self, part: Records, training: bool) -> RecordExamples:
        return RecordExamples(self, part.records, training)

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        return {"loss": batch["weights_BT" if "weights_BT" in batch else "weights_BE"].sum()}

    def losses(self, module: Transformer, params: Any, batch: Batch, key: jax.Array | None) -> Losses:
        """The loss, and in evaluation (`key` is None) the outputs."""
        return self.losses_of(module, params, hidden(module, params, batch, key), batch, key)

    @abstractmethod
    def losses_of(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> Losses:
        """`losses`, from the hidden states of the batch."""

    def predictions(self, records: Sequence[Record], batches: Any, outputs: Sequence[Any]) -> list[Row]:
        """The prediction for each record, in order, from the outputs of each unit."""
        examples = batches.examples
        found: list[Outputs] = [[] for _ in records]
        for unit, of_unit in enumerate(outputs):
            kept = examples.of(unit, examples.kept)
            found[examples.record_of[unit]].append([a | b for a, b in zip(of_unit, kept)])
        return [self.predict(record, outputs) for record, outputs in zip(records, found)]

    def tell(
        self, lm: LM, see: Callable[[Any], Seen], batches: Any, records: Sequence[Record]
    ) -> tuple[list[Row], dict[str, float]]:
        """The prediction for each record, in order, and the means of what `losses` sums."""
        seen = see(batches)
        return self.predictions(records, batches, seen.outputs), seen.means

    def measure(
        self, lm: LM, see: Callable[[Any], Seen], batches: Any, part: Records
    ) -> tuple[dict[str, float], list[Row]]:
        found, means = self.tell(lm, see, batches, part.records)
        return {"loss": means["loss"], **self.score(part.records, found)}, found


class HeadTask(RecordTask):
    """Base of the tasks whose predictions are read off the logits of one head."""

    method: Any = None  # of the module, that applies the head; None: the one that is called like it

    def logits(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> jax.Array:
        """What the head says of each token."""
        return self.read_off(module, params, x_BTD, key)

    def read_off(self, module: Transformer, params: Any, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """The head on some hidden states."""
        return apply(module, params, x, method=self.method or self.head, key=key)

    @abstractmethod
    def loss(self, logits: jax.Array, batch: Batch, training: bool) -> Sum:
        """Its sum over a batch, and the weight to divide it by."""

    @abstractmethod
    def outputs(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Arrays [B, E, ...] or [B, T, ...], under names that say so."""

    def losses_of(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> Losses:
        """`losses`, from the hidden states of the batch."""
        logits = self.logits(module, params, x_BTD, batch, key)
        return {"loss": self.loss(logits, batch, key is not None)}, self.outputs(logits, batch) if key is None else {}


class RecordExamples:
    """The units of some records, made once and kept in flat arrays: the same in every epoch."""

    def __init__(self, task: RecordTask, records: Sequence[Record], training: bool):
        self.fields: Mapping[str, type] = {"types_BT": np.int32, **task.fields}
        self.labels, self.kept = len(task.labels), task.kept
        columns: dict[str, list[Any]] = {"tokens_BT": []}
        record_of, counts = [], []
        windows = (records[first : first + WINDOW] for first in range(0, len(records), WINDOW))
        made = chain.from_iterable(task.features(some, training) for some in windows)
        for n, units in enumerate(made):
            for unit in units:
                record_of.append(n)
                counts.append(len(unit))
                for features in unit:
                    for name, value in features.items():
                        columns.setdefault(name, []).append(value)
        self.record_of, self.counts = np.array(record_of, np.int64), np.array(counts, np.int64)
        ends = lambda name: np.cumsum([0, *map(len, columns.get(name, ()))], dtype=np.int64)
        # Where each example's tokens begin, on both sides; and of each unit its examples.
        self._starts = {"T": ends("tokens_BT"), "S": ends("source_tokens_BS")}
        self._examples = np.concatenate([[0], np.cumsum(self.counts)])
        self._columns = {name: _flat(name, column) for name, column in columns.items()}

    def epoch(self, n: int | None) -> Epoch:
        lengths = lambda side: np.diff(self._starts[side][self._examples])
        sources = lengths("S") if "source_tokens_BS" in self._columns else None
        return Epoch(lengths("T"), self._features, self.counts, sources)

    def of(self, i: int, names: Iterable[str]) -> list[Features]:
        """Some features of each example of unit i."""

        def one(name: str, e: int) -> Any:
            starts = self._starts.get(name.rpartition("_")[2][1])
            return self._columns[name][e if starts is None else slice(starts[e], starts[e + 1])]

        return [{name: one(name, e) for name in names} for e in range(self._examples[i], self._examples[i + 1])]

    def _features(self, i: int) -> list[Features]:
        return self.of(i, [name for name in self._columns if name not in self.kept])


def _flat(name: str, column: list[Any]) -> np.ndarray:
    """One array of what many examples have, laid end to end where it is per token."""
    if not name.endswith(("_BT", "_BS")):
        return np.array(column)
    if column and isinstance(column[0], np.ndarray):
        return np.concatenate(column)
    size = sum(map(len, column))
    return np.fromiter(chain.from_iterable(column), np.float32 if name.startswith("weights") else np.int32, size)


def framed(
    tokenizer: Tokenizer, texts: list[str], pairs: list[str] | None, length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """`Tokenizer.frame`, with a token in place of nothing: a row has no place for a text without any."""
    for ids, types in tokenizer.frame(texts, pairs, length):
        yield (ids, types) if ids else ([stand_in(tokenizer)], [0])


def stand_in(tokenizer: Tokenizer) -> int:
    """The token of a text without tokens."""
    roles = (tokenizer.eos, tokenizer.pad, tokenizer.unk, tokenizer.bos)
    return next((token for token in roles if token is not None), 0)
