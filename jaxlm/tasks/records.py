"""Tasks over records: rows of a table, each with a text and what is to be predicted.

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
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.data.batches import Batch, Epoch, Features
from jaxlm.data.formats.lines import Place, Row
from jaxlm.data.formats.rows import Columns
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.errors import UserError, perhaps
from jaxlm.hub.pooling import Pooling
from jaxlm.lm import LM, with_task
from jaxlm.nn.losses import Losses, Sum
from jaxlm.nn.transformer import Transformer, apply
from jaxlm.tasks.cells import Record, Records, column
from jaxlm.tasks.states import hidden
from jaxlm.tasks.task import EvalResult, Task

Outputs = list[list[dict[str, np.ndarray]]]  # of one record: of each unit, of each example in it
WINDOW = 1024  # records that are tokenized at once


class RecordTask(Task):
    """Base of the tasks over records; the module's text says what is to be given."""

    scores: tuple[str, ...] = ("accuracy",)
    fields: Mapping[str, type] = {}  # of features, beside tokens_BT and types_BT
    kept: tuple[str, ...] = ()  # further features, per token, that `predict` wants back
    classes = False  # whether `predict` gives as `_probabilities` those of `class_names`
    # What is cut, on the side T of a row or of the sources S, and what to do about it.
    cut: Mapping[str, tuple[str, str]] = {"T": ("texts", "raise --data.length")}

    def __init__(self, task: Any, length: int, seed: int, tokenizer: Tokenizer, labels: tuple[str, ...] = ()):
        self.task, self.length, self.seed, self.tokenizer, self.labels = task, length, seed, tokenizer, labels
        self.max_examples = max(2, length // 4)  # examples in a row E

    @classmethod
    @abstractmethod
    def read(cls, task: Any, row: Row, place: Place) -> Record | None:
        """The record of a row, without its label where the row has none; None: it is dropped.

        Raises UserError for a column that is not there, or a value that is not what it should be.
        """

    @classmethod
    def columns(cls, task: Any, labelled: bool) -> Columns | None:
        """Returns the columns that are read, of rows whose labels are read too or not; None: any may be."""
        return None

    @classmethod
    def labelled(cls, task: Any, row: Row, record: Record, place: Place) -> None:
        """Raises UserError where a record has no label to learn from, or to be scored by."""
        if record.get("label") is None:
            column(row, task.label, place, "--task.label")
            raise UserError(f"{place}: the row has no label in column {task.label!r}; give one, or leave the row out")

    @classmethod
    def settle(cls, task: Any, part: Records, names: Sequence[str]) -> None:
        """Changes labels that only all rows of a part together tell how to read.

        names: of the outputs of the head, where it is known; `task.names` comes before them.
        """

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

    def class_names(self, record: Record) -> Sequence[Any]:
        """Returns the classes, or the numbers of the options, whose probabilities `predict` gives."""
        return self.labels

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
        remedy: str = "fix it, or leave the row out",
    ) -> list[Records]:
        """Returns the parts with the labels of their records as the outputs of the head are named.

        Raises UserError, with the remedy, for a label that is the name of no output.
        """
        for part in parts:
            _check_labels(cls, part, names, remedy)
        return list(parts)

    # The rest is the same for all: the face of a task that a run sees.

    def bound(self, model: ModelConfig, pooling: Pooling | None = None, part: Any = None) -> Self:
        """As `Task.bound`; the tokenizer then refuses tokens that the model has no row for."""
        task = super().bound(model, pooling, part)
        if not isinstance(self.tokenizer, Tokenizer):  # of a plan it is a stand-in
            return task
        return task.replaced(tokenizer=self.tokenizer.for_model(model.vocabulary, model.V))

    def configured(self, model: ModelConfig) -> ModelConfig:
        on_top = (self.head,) if self.head else ()
        return replace(model, heads_on_top=on_top, labels=self.labels or model.labels)

    def exports(self, lm: LM) -> dict[str, tuple[Task, LM]]:
        return {"": (self, with_task(lm, self.task, self.length))}

    def examples(self, part: Records, training: bool) -> RecordExamples:
        return RecordExamples(self, part.records, training)

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        return {"loss": batch["weights_BT" if "weights_BT" in batch else "weights_BE"].sum()}

    def losses(self, module: Transformer, params: Any, batch: Batch, key: jax.Array | None) -> Losses:
        """The loss, and in evaluation (`key` is None) the outputs."""
        x_BTD, auxiliary = hidden(module, params, batch, key)
        losses, outputs = self.losses_of(module, params, x_BTD, batch, key)
        return losses | auxiliary, outputs

    @abstractmethod
    def losses_of(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> Losses:
        """`losses`, from the hidden states of the batch."""

    def truncation(
        self, examples: RecordExamples, lm: LM | None = None, records: Sequence[Record] = ()
    ) -> dict[str, Truncation]:
        """Returns for each side of `cut` what was cut of some records.

        lm, records: the model that predicts and what it reads; None: the examples are to be learned from.
        """
        return {side: examples.truncation(side) for side in self.cut if side in ("T", "S")}

    def cut_lines(self, found: Mapping[str, Truncation]) -> list[str]:
        """Returns a line for each side on which something was cut, with what to do about it."""
        return [found[side].line(*self.cut[side]) for side in self.cut if side in found and found[side].cut]

    def truncated(self, batches: Any) -> list[str]:
        return self.cut_lines(self.truncation(batches.examples))

    def predictions(self, records: Sequence[Record], batches: Any, outputs: Sequence[Any]) -> list[Row]:
        """The prediction for each record, in order, from the outputs of each unit."""
        examples = batches.examples
        found: list[Outputs] = [[] for _ in records]
        for unit, of_unit in enumerate(outputs):
            kept = examples.of(unit, examples.kept)
            found[examples.record_of[unit]].append([a | b for a, b in zip(of_unit, kept)])
        return [self.predict(record, outputs) for record, outputs in zip(records, found)]

    def tell(
        self, lm: LM, run_eval: Callable[[Any], EvalResult], batches: Any, records: Sequence[Record]
    ) -> tuple[list[Row], dict[str, float]]:
        """The prediction for each record, in order, and the means of what `losses` sums."""
        seen = run_eval(batches)
        return self.predictions(records, batches, seen.outputs), seen.means

    def measure(
        self, lm: LM, run_eval: Callable[[Any], EvalResult], batches: Any, part: Records
    ) -> tuple[dict[str, float], list[Row]]:
        found, means = self.tell(lm, run_eval, batches, part.records)
        return {"loss": means["loss"], **self.score(part.records, found)}, found


def _check_labels(
    kind: type[RecordTask], part: Records, names: tuple[str, ...], remedy: str = "fix it, or leave the row out"
) -> None:
    """Raises UserError for a label that is not among the names."""
    for record, place in zip(part.records, part.places):
        for label in kind.labels_of(record):
            if label not in names:
                raise UserError(
                    f"{place}: the label {label!r} is not among those that are learned{perhaps(label, names)}; {remedy}"
                )


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


class Truncation(NamedTuple):
    """How many of some records were longer than their limit, and lost tokens."""

    cut: int  # records that lost some
    of: int  # records
    limit: int  # tokens that were kept, at most
    longest: int  # tokens that the longest had

    def __add__(self, other: Truncation) -> Truncation:  # type: ignore[override]
        limit, longest = max(self.limit, other.limit), max(self.longest, other.longest)
        return Truncation(self.cut + other.cut, self.of + other.of, limit, longest)

    def line(self, what: str, remedy: str) -> str:
        """Returns what is said of it."""
        are, were = ("is", "was") if self.cut == 1 else ("are", "were")
        return (
            f"{self.cut:,} of {self.of:,} {what} {are} longer than {self.limit:,} tokens and {were} cut (the longest "
            f"has {self.longest:,}); {remedy}"
        )


class RecordExamples:
    """The units of some records, made once and kept in flat arrays: the same in every epoch."""

    def __init__(self, task: RecordTask, records: Sequence[Record], training: bool):
        self.fields: Mapping[str, type] = {"types_BT": np.int32, **task.fields}
        self.labels, self.kept = len(task.labels), task.kept
        columns: dict[str, list[Any]] = {"tokens_BT": []}
        record_of, counts = [], []
        whole: dict[str, list[tuple[int, int, int]]] = {"T": [], "S": []}  # of each side: record, tokens kept, and had
        windows = (records[first : first + WINDOW] for first in range(0, len(records), WINDOW))
        made = chain.from_iterable(task.features(some, training) for some in windows)
        for n, units in enumerate(made):
            for unit in units:
                record_of.append(n)
                counts.append(len(unit))
                for features in unit:
                    for side, name in (("T", "cut"), ("S", "source_cut")):
                        tokens = features.get("tokens_BT" if side == "T" else "source_tokens_BS", ())
                        whole[side].append((n, len(tokens), len(tokens) + features.pop(name, 0)))
                    for name, value in features.items():
                        columns.setdefault(name, []).append(value)
        self.records = len(records)
        self._whole = {side: np.array(rows, np.int64).reshape(-1, 3) for side, rows in whole.items()}
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

    @property
    def true_lengths(self) -> np.ndarray:
        """Tokens of each example before any was cut, those of both sides of an encoder-decoder one after the other."""
        sides = [self._whole["T"]] + [self._whole["S"]] * ("source_tokens_BS" in self._columns)
        return np.concatenate([rows[:, 2] for rows in sides])

    @property
    def most_cut(self) -> int:
        """Tokens that the example lost which lost most."""
        return int(np.diff(self._whole["T"][:, 1:], axis=1).max(initial=0))

    def truncation(self, side: str) -> Truncation:
        """Returns what was cut on a side, T or the sources S."""
        cut = self._whole[side][self._whole[side][:, 2] > self._whole[side][:, 1]]
        kept, had = cut[:, 1:].max(axis=0, initial=0).tolist()
        return Truncation(len(np.unique(cut[:, 0])), self.records, kept, had)

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


def add_special_tokens(
    tokenizer: Tokenizer, texts: list[str], pairs: list[str] | None, length: int
) -> Iterator[Features]:
    """Yields the features `tokens_BT` and `types_BT` of each text, or text and pair, as `Tokenizer.frame` has them; and
    as `cut` how many tokens it lost, so that it is at most `length` long.

    A text without tokens has one in place of nothing: a row has no place for an example without any.
    """
    whole = tokenizer.frame(texts, pairs)
    long = [n for n, (ids, _) in enumerate(whole) if len(ids) > length]
    tokenizer.room(length, pairs is not None)  # which refuses a length without room
    some = ([texts[n] for n in long], None if pairs is None else [pairs[n] for n in long])
    short = dict(zip(long, tokenizer.frame(*some, length) if long else ()))
    for n, (ids, types) in enumerate(whole):
        kept, kinds = short.get(n, (ids, types))
        if not kept:
            kept, kinds = [stand_in(tokenizer)], [0]
        yield {"tokens_BT": kept, "types_BT": kinds, "cut": max(0, len(ids) - len(kept))}


def stand_in(tokenizer: Tokenizer) -> int:
    """The token of a text without tokens."""
    roles = (tokenizer.eos, tokenizer.pad, tokenizer.unk, tokenizer.bos)
    return next((token for token in roles if token is not None), 0)
