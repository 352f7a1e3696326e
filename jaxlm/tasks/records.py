"""Tasks over records: rows of a table, each with a text and a label.

A task defines what differs between tasks, in methods of a few lines:

    read       converts a row of a file to a record, or raises an error that describes what is wrong with the row
    names      finds the names of the outputs of the head in the training records
    features   converts a record to examples: tokens, and labels under names that include their axes
    losses_from_states  sums over a batch, and the outputs of its examples; a `HeadTask` reads the logits of one head:
                   head     the name of the head
                   loss     the sum over a batch, and its weight
                   outputs  arrays to keep for each example or token of a batch
    predict    converts the outputs of a record to its prediction
    score      compares predictions with records

The library does the rest: packing, epochs, accumulation, sharding, resuming, evaluation in input order, and files.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.data.batches import Batch, Epoch
from jaxlm.data.formats.lines import Place, Row
from jaxlm.data.formats.rows import Columns
from jaxlm.data.joined import Features, Joined, axes_of, offsets, ranges
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.errors import UserError, suggestion
from jaxlm.hub.pooling import Pooling
from jaxlm.lm import LM, with_task
from jaxlm.nn.losses import Losses, Sum
from jaxlm.nn.transformer import Transformer, apply
from jaxlm.reports.report import Table
from jaxlm.tasks.cells import Record, Records, column
from jaxlm.tasks.states import HeadLogits, VocabularyStates
from jaxlm.tasks.task import EvalResult, Task

Outputs = list[list[dict[str, np.ndarray]]]  # of one record: for each unit, for each of its examples
CHUNK = 1024  # records that are tokenized at once


class RecordTask(Task):
    """Base of tasks over records; the docstring of the module lists the methods to define."""

    scores: tuple[str, ...] = ("accuracy",)
    fields: Mapping[str, type] = {}  # features -> dtype, in addition to tokens_BT and types_BT
    predict_fields: tuple[str, ...] = ()  # features, one value per token, that only `predict` reads
    classes = False  # whether `predict` returns the probabilities of `class_names` as `_probabilities`
    # For the tokens T of a row and S of the sources: what may be truncated, and the remedy.
    remedies: Mapping[str, tuple[str, str]] = {"T": ("texts", "raise --data.length")}

    def __init__(self, task: Any, length: int, seed: int, tokenizer: Tokenizer, labels: tuple[str, ...] = ()):
        self.task, self.length, self.seed, self.tokenizer, self.labels = task, length, seed, tokenizer, labels
        self.max_examples = max(2, length // 4)  # examples in a row E

    @classmethod
    @abstractmethod
    def read(cls, task: Any, row: Row, place: Place) -> Record | None:
        """Returns the record of a row, or None to drop the row.

        A row without a label gives a record without a label.

        Args:
          task: the config of the task.
          row: the row.
          place: its place in the file, for errors.

        Raises:
          UserError: for a missing column, or an invalid value.
        """

    @classmethod
    def columns(cls, task: Any, labelled: bool) -> Columns | None:
        """Returns the columns that the task reads, with its labels if `labelled`; None if it may read any column."""
        return None

    @classmethod
    def require_label(cls, task: Any, row: Row, record: Record, place: Place) -> None:
        """Raises UserError if a record has no label, which training and scores require."""
        if record.get("label") is None:
            column(row, task.label, place, "--task.label")
            raise UserError(f"{place}: the row has no label in column {task.label!r}; give one, or leave the row out")

    @classmethod
    def finalize_labels(cls, task: Any, part: Records, names: Sequence[str]) -> None:
        """Changes, in place, labels whose meaning depends on all rows of the part.

        Args:
          task: the config of the task; its `names`, if it has them, take precedence over the argument.
          part: the records.
          names: the names of the outputs of the head, if they are known.
        """

    @classmethod
    def labels_of(cls, record: Record) -> Iterable[str]:
        """Returns the labels of a record that must be among the `names`."""
        return ()

    @classmethod
    def texts(cls, record: Record) -> Iterable[str]:
        """Returns the texts that a tokenizer is trained on."""
        return [value for value in record.values() if isinstance(value, str)]

    @classmethod
    def target_texts(cls, record: Record) -> Iterable[str]:
        """Returns the texts to generate, on which the tokenizer, or a separate one, is trained too."""
        return ()

    @classmethod
    def names(cls, task: Any, part: Records) -> tuple[str, ...]:
        """Returns the names of the outputs of the head, in order, from the training part; () if they have none."""
        return ()

    @classmethod
    def stratum(cls, task: Any, record: Record) -> Hashable:
        """Returns the stratum of a record; the same share of each stratum becomes the validation part."""
        return None

    @classmethod
    def group(cls, task: Any, record: Record) -> Hashable:
        """Returns the group of a record, which is not split between training and validation; None if it has none."""
        return None

    @abstractmethod
    def features(self, records: Sequence[Record], training: bool) -> Iterator[list[list[Features]]]:
        """Yields for each record its units, each a list of examples.

        The examples of a unit share a row.  If records have no label, as in prediction, the label features may have any
        value.

        Args:
          records: the records.
          training: whether the examples are for training.
        """

    @abstractmethod
    def predict(self, record: Record, outputs: Outputs) -> Row:
        """Returns the columns of a prediction; columns that start with an underscore are internal, for `score`.

        Args:
          record: the record.
          outputs: for each of its units, for each example, the arrays that `outputs` and `predict_fields` name.
        """

    def class_names(self, record: Record) -> Sequence[Any]:
        """Returns the classes, or the numbers of the options, in the order of `_probabilities`."""
        return self.labels

    @abstractmethod
    def score(self, records: Sequence[Record], predictions: Sequence[Row]) -> dict[str, float]:
        """Returns the scores, each a number."""

    @classmethod
    def score_notes(cls, task: Any, records: Sequence[Record]) -> list[str]:
        """Returns lines to report with the scores of these records, such as the signature of a library of scores."""
        return []

    @classmethod
    def map_labels(
        cls,
        task: Any,
        parts: Sequence[Records],
        names: tuple[str, ...],
        remedy: str = "fix it, or leave the row out",
    ) -> list[Records]:
        """Returns the parts with the labels replaced by names of outputs.

        Args:
          task: the config of the task.
          parts: the parts of the data.
          names: the names of the outputs of the head.
          remedy: the end of the error message.

        Raises:
          UserError: for a label that matches no output.
        """
        for part in parts:
            check_labels(cls, part, names, remedy)
        return list(parts)

    # The methods below are the same for all tasks.

    def bind(self, model: ModelConfig, pooling: Pooling | None = None, part: Any = None) -> Self:
        """As `Task.bind`; the tokenizer then refuses tokens that the model has no embedding for."""
        task = super().bind(model, pooling, part)
        if not isinstance(self.tokenizer, Tokenizer):  # a plan has a placeholder
            return task
        return task.replace_fields(tokenizer=self.tokenizer.for_model(model.vocabulary, model.V))

    def configure(self, model: ModelConfig) -> ModelConfig:
        on_top = (self.head,) if self.head else ()
        return replace(model, heads_on_top=on_top, labels=self.labels or model.labels)

    def exports(self, lm: LM) -> dict[str, tuple[Task, LM]]:
        return {"": (self, with_task(lm, self.task, self.length))}

    def examples(self, part: Records, training: bool) -> RecordExamples:
        return RecordExamples(self, part.records, training)

    def truncation(
        self, examples: RecordExamples, lm: LM | None = None, records: Sequence[Record] = ()
    ) -> dict[str, Truncation]:
        """Returns for each side, a key of `remedies`, the number of records that were truncated.

        Args:
          examples: the examples of the records.
          lm, records: the model that predicts and the records that it reads; None if the examples are for training.
        """
        return {side: examples.truncation(side) for side in self.remedies if side in ("T", "S")}

    def truncation_lines(self, found: Mapping[str, Truncation]) -> list[str]:
        """Returns a line with the remedy for each side on which records were truncated."""
        return [
            found[side].line(*remedy) for side, remedy in self.remedies.items() if side in found and found[side].cut
        ]

    def truncation_warnings(self, batches: Any) -> list[str]:
        return self.truncation_lines(self.truncation(batches.examples))

    def predictions(self, records: Sequence[Record], batches: Any, outputs: Sequence[Any]) -> list[Row]:
        """Returns the prediction for each record, in order, from the outputs of each unit."""
        if not records:
            return []
        examples = batches.examples
        by_record: list[Outputs] = [[] for _ in records]
        features = iter(examples.joined(np.arange(len(outputs)), examples.predict_fields).split())
        for n, unit_outputs in zip(examples.record_of, outputs):
            by_record[n].append([arrays | next(features) for arrays in unit_outputs])
        return [self.predict(record, outputs) for record, outputs in zip(records, by_record)]

    def predict_records(
        self, lm: LM, run_eval: Callable[[Any], EvalResult], batches: Any, records: Sequence[Record]
    ) -> tuple[list[Row], dict[str, float]]:
        """Returns the prediction for each record, in order, and the mean losses; the arguments are as in `measure`."""
        result = run_eval(batches)
        return self.predictions(records, batches, result.outputs), result.means

    def measure(
        self, lm: LM, run_eval: Callable[[Any], EvalResult], batches: Any, part: Records
    ) -> tuple[dict[str, float], list[Row]]:
        predictions, means = self.predict_records(lm, run_eval, batches, part.records)
        return {"loss": means["loss"], **self.score(part.records, predictions)}, predictions


def check_labels(kind: type[RecordTask], part: Records, names: Sequence[str], remedy: str) -> None:
    """Raises UserError for a label that is not among the names."""
    for record, place in zip(part.records, part.places):
        for label in kind.labels_of(record):
            if label not in names:
                raise unknown_label(place, label, names, remedy)


def unknown_label(place: Place, label: str, names: Sequence[str], remedy: str) -> UserError:
    """Returns the error for a label that is not among the names."""
    return UserError(f"{place}: the label {label!r} is not among the learned ones{suggestion(label, names)}; {remedy}")


def table_by_class(what: str, counted: str, by_class: Mapping[str, Mapping[str, float]]) -> Table:
    """Returns the report's table of the scores of each class.

    Args:
      what: "class", "tag" or "type".
      counted: what the support counts, such as "words".
      by_class: as `Task.by_class` returns it.
    """
    rows = [
        [name, *(f"{scores[key]:.1%}" for key in ("precision", "recall", "f1")), f"{scores['support']:,.0f}"]
        for name, scores in by_class.items()
    ]
    return Table(f"Scores by {what}", (what, "precision", "recall", "F1", counted), rows, "")


class HeadTask(RecordTask):
    """Base of tasks whose predictions come from the logits of one head."""

    method: Any = None  # the method of the module that applies the head; None: the method with the name of the head

    def logits(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> jax.Array:
        """Returns the logits of the head, from the hidden states of the batch."""
        return self.apply_head(module, params, x_BTD, key)

    def apply_head(self, module: Transformer, params: Any, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Returns the logits of the head for any hidden states [..., D]."""
        return apply(module, params, x, method=self.method or self.head, key=key)

    @abstractmethod
    def loss(self, logits: jax.Array, batch: Batch, training: bool) -> Sum:
        """Returns the sum of the loss over a batch, and the weight to divide it by."""

    @abstractmethod
    def outputs(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Returns arrays [B, E, ...] or [B, T, ...], under names that end in their axes."""

    def losses_from_states(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> Losses:
        logits = self.logits(module, params, x_BTD, batch, key)
        return {"loss": self.loss(logits, batch, key is not None)}, self.outputs(logits, batch) if key is None else {}

    def predicted(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> dict[str, HeadLogits | VocabularyStates]:
        return {"loss": self.compared(self.logits(module, params, x_BTD, batch, key), batch)}

    def example_logits(self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        logits = self.logits(module, params, x_BTD, batch, None)
        axes = axes_of(next(iter(self.outputs(logits, batch))))[:2]
        return {f"logits_{axes}{'K' * (logits.ndim - 2)}": logits}

    def predicted_from(self, logits: Mapping[str, jax.Array], batch: Batch) -> dict[str, HeadLogits]:
        [of_head] = logits.values()
        return {"loss": self.compared(of_head, batch)}

    def compared(self, logits: jax.Array, batch: Batch) -> HeadLogits:
        """Returns the logits with the weights of the positions, for distillation."""
        return HeadLogits(logits, batch["weights_BT" if "weights_BT" in batch else "weights_BE"])


class Truncation(NamedTuple):
    """The number of records that were truncated because they exceeded a limit."""

    cut: int  # truncated records
    of: int  # all records
    limit: int  # largest number of tokens that a truncated record keeps
    longest: int  # tokens of the longest record before truncation

    def __add__(self, other: Truncation) -> Truncation:  # type: ignore[override]
        limit, longest = max(self.limit, other.limit), max(self.longest, other.longest)
        return Truncation(self.cut + other.cut, self.of + other.of, limit, longest)

    def line(self, what: str, remedy: str) -> str:
        """Returns the warning, for records that are called `what`."""
        are, were = ("is", "was") if self.cut == 1 else ("are", "were")
        return (
            f"{self.cut:,} of {self.of:,} {what} {are} longer than {self.limit:,} tokens and {were} cut (the longest "
            f"has {self.longest:,}); {remedy}"
        )


class RecordExamples:
    """The units of records, stored in flat arrays; they are the same in every epoch."""

    repeats = True

    def __init__(self, task: RecordTask, records: Sequence[Record], training: bool):
        self.fields: Mapping[str, type] = {"types_BT": np.int32, **task.fields}
        self.labels, self.predict_fields = len(task.labels), task.predict_fields
        columns: dict[str, list[Any]] = {"tokens_BT": []}
        record_of, counts = [], []
        lengths: dict[str, list[tuple[int, int, int]]] = {"T": [], "S": []}  # record, tokens, tokens before truncation
        chunks = (records[first : first + CHUNK] for first in range(0, len(records), CHUNK))
        for n, units in enumerate(chain.from_iterable(task.features(chunk, training) for chunk in chunks)):
            for unit in units:
                record_of.append(n)
                counts.append(len(unit))
                for features in unit:
                    for side, name in (("T", "cut"), ("S", "source_cut")):
                        tokens = features.get("tokens_BT" if side == "T" else "source_tokens_BS", ())
                        lengths[side].append((n, len(tokens), len(tokens) + features.pop(name, 0)))
                    for name, value in features.items():
                        columns.setdefault(name, []).append(value)
        self.records = len(records)
        self._lengths = {side: np.array(rows, np.int64).reshape(-1, 3) for side, rows in lengths.items()}
        self.record_of, self.counts = np.array(record_of, np.int64), np.array(counts, np.int64)
        ends = lambda name: np.cumsum([0, *map(len, columns.get(name, ()))], dtype=np.int64)
        # The offset of each example's tokens, on each side, and of each unit's examples.
        self._starts = {"T": ends("tokens_BT")}
        if "source_tokens_BS" in columns:
            self._starts["S"] = ends("source_tokens_BS")
        self._examples = offsets(self.counts)
        self._columns = {name: _flat(name, column) for name, column in columns.items()}

    def epoch(self, n: int | None) -> Epoch:
        lengths = lambda side: np.diff(self._starts[side][self._examples])
        sources = lengths("S") if "S" in self._starts else None
        names = [name for name in self._columns if name not in self.predict_fields]
        return Epoch(lengths("T"), partial(self.joined, names=names), self.counts, sources)

    @property
    def true_lengths(self) -> np.ndarray:
        """The length of each example before truncation; for an encoder-decoder, targets and then sources."""
        return np.concatenate([self._lengths[side][:, 2] for side in self._starts])

    @property
    def max_cut(self) -> int:
        """The largest number of tokens that an example lost by truncation."""
        return int(np.diff(self._lengths["T"][:, 1:], axis=1).max(initial=0))

    def truncation(self, side: str) -> Truncation:
        """Returns the truncation of a side: "T", or "S" for the sources."""
        cut = self._lengths[side][self._lengths[side][:, 2] > self._lengths[side][:, 1]]
        limit, longest = cut[:, 1:].max(axis=0, initial=0).tolist()
        return Truncation(len(np.unique(cut[:, 0])), self.records, limit, longest)

    def joined(self, units: np.ndarray, names: Iterable[str]) -> Joined:
        """Returns the named features of the examples of several units."""
        examples = ranges(self._examples[units], self.counts[units])
        lengths = {side: self._lengths[side][examples, 1] for side in self._starts}
        places = {side: ranges(starts[examples], lengths[side]) for side, starts in self._starts.items()}
        features = {name: self._columns[name][places.get(axes_of(name)[1], examples)] for name in names}
        return Joined(lengths["T"], features, lengths.get("S"))


def _flat(name: str, column: list[Any]) -> np.ndarray:
    """Returns one array of a feature of all examples, concatenated if it has a value per token."""
    if not name.endswith(("_BT", "_BS")):
        return np.array(column)
    if column and isinstance(column[0], np.ndarray):
        return np.concatenate(column)
    size = sum(map(len, column))
    return np.fromiter(chain.from_iterable(column), np.float32 if name.startswith("weights") else np.int32, size)


def add_special_tokens(
    tokenizer: Tokenizer, texts: list[str], pairs: list[str] | None, length: int
) -> Iterator[Features]:
    """Yields the features of each text, or of each text and its pair, with special tokens.

    A text without tokens gets a placeholder, because a row cannot contain an example without tokens.

    Args:
      tokenizer: the tokenizer.
      texts: the texts.
      pairs: the second text of each example, or None.
      length: the maximum number of tokens of an example; longer ones are truncated.

    Yields:
      `tokens_BT` and `types_BT`, lists of int, and `cut`, the number of tokens that truncation removed.
    """
    full = tokenizer.encode_with_special_tokens(texts, pairs)
    long = [n for n, (ids, _) in enumerate(full) if len(ids) > length]
    tokenizer.max_text_tokens(length, pairs is not None)  # raises UserError for a length without room
    long_texts, long_pairs = ([side[n] for n in long] if side is not None else None for side in (texts, pairs))
    truncated = dict(
        zip(long, tokenizer.encode_with_special_tokens(long_texts or [], long_pairs, length) if long else ())
    )
    for n, (ids, types) in enumerate(full):
        tokens, token_types = truncated.get(n, (ids, types))
        if not tokens:
            tokens, token_types = [placeholder_token(tokenizer)], [0]
        yield {"tokens_BT": tokens, "types_BT": token_types, "cut": max(0, len(ids) - len(tokens))}


def placeholder_token(tokenizer: Tokenizer) -> int:
    """Returns the token that replaces a text without tokens."""
    roles = (tokenizer.eos, tokenizer.pad, tokenizer.unk, tokenizer.bos)
    return next((token for token in roles if token is not None), 0)
