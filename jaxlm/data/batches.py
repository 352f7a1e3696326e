"""Random access to packed batches by step, so a run can resume from the step alone.

A batch is a pure function of (examples, sizes, seed, step): it depends neither on prefetching nor on the number of
hosts.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxlm.data.ahead import prefetch
from jaxlm.data.joined import Features, Joined, axes_of, number_within, offsets, ranges
from jaxlm.data.pack import Rows, pack

Batch = dict[str, Any]  # fields of a batch, as NumPy or JAX arrays


class Epoch(NamedTuple):
    """The units of one pass over the data.

    A unit is never split across rows.  It consists of one example, or of several related ones that do not attend to
    each other, such as the texts of a pair.  `features(units)` returns the joined features of the examples of several
    units [U] in this order.

    The name of a feature ends in its axes in a batch: for an example of n tokens, `labels_BT` is an array [n];
    `labels_BE` is one value per example, and `labels_BEN` an array [N].  For an encoder-decoder, axis T belongs to the
    decoder, and `source_tokens_BS` are the input tokens of the encoder.
    """

    lengths: np.ndarray  # [number of units], length in tokens
    features: Callable[[np.ndarray], Joined]
    counts: np.ndarray | None = None  # [number of units], number of examples; None: one per unit
    source_lengths: np.ndarray | None = None  # [number of units], length of the sources in tokens, if any


class Examples(Protocol):
    """The examples of a task."""

    fields: Mapping[str, type]  # name in a batch -> dtype
    labels: int  # size of the axis N of several labels
    # Optional attributes, for inputs other than text:
    # inputs: Mapping[str, type], fields that a front end reads.
    # axes: Mapping[str, int], sizes of additional axes by their letters.
    # repeats: bool, whether all epochs have the same examples.

    def epoch(self, n: int | None) -> Epoch:
        """Returns the units of epoch n, a pure function of n; None: the units of evaluation."""


class Batches:
    """Batches of packed rows: an endless sequence, shuffled in each epoch, for training; one pass for evaluation.

    A batch may contain the last rows of an epoch and the first of the next one, so no row is dropped.
    """

    reads_state = False

    def __init__(
        self,
        examples: Examples,
        rows: int,
        length: int,
        max_examples: int,
        seed: int | None,
        source_length: int | None = None,
    ):
        """Defines the batches.

        Args:
          examples: the examples of a task.
          rows: rows per batch B.
          length: tokens per row T.
          max_examples: maximum number of examples per row E.
          seed: seed of the shuffling; None: evaluation, each unit once.
          source_length: tokens of the sources per row S, for an encoder-decoder.
        """
        self.examples, self.rows, self.length, self.max_examples, self.seed = examples, rows, length, max_examples, seed
        self.source_length = source_length
        self.epoch_starts = [0]  # index of the first row of each epoch so far
        self._epochs: dict[int, Future[tuple[Epoch, Rows]]] = {}  # at most two
        self._lock = threading.Lock()

    @property
    def _inputs(self) -> Mapping[str, type]:
        """Fields that a front end reads: name in a batch -> dtype."""
        return getattr(self.examples, "inputs", {"tokens_BT": np.int32})

    def __bool__(self) -> bool:
        """Returns whether there is an example."""
        return len(self.lengths) > 0

    def __len__(self) -> int:
        """Returns the number of batches in one epoch; the last one may have rows of padding."""
        return -(-self.rows_in_epoch // self.rows)

    @property
    def rows_in_epoch(self) -> int:
        """Number of rows of the first epoch; later epochs may have slightly more or fewer."""
        return len(self._epoch(0)[1].starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Length of each unit of the first epoch, in tokens."""
        return self.examples.epoch(None if self.seed is None else 0).lengths

    @property
    def true_lengths(self) -> np.ndarray:
        """Length of each example before truncation, if the examples have this attribute; else of each unit."""
        return getattr(self.examples, "true_lengths", self.lengths)

    def batch_at(self, step: int, rows: Iterable[int] | None = None) -> Features:
        """Returns a batch.

        Args:
          step: number of the batch, from 0.
          rows: indices of the rows to fill; the others are padding.  None: all.

        Returns:
          The fields: [B, T] for tokens, [B, E] for examples; `segments_BT` is 0 for padding.
        """
        return self.fill((step * self.rows + b, b) for b in (range(self.rows) if rows is None else rows))

    def fill(self, rows: Iterable[tuple[int, int]]) -> Features:
        """Returns a batch in which some rows are filled.

        Args:
          rows: the index of each row, counted over all epochs, and its place in the batch.
        """
        batch = self.empty_batch()
        for epoch, found in groupby(((*self._find(index), b) for index, b in rows), lambda row: row[0]):
            if epoch is not None:
                units, places = zip(*((units, b) for _, units, b in found))
                write_units(batch, self._epoch(epoch)[0], units, places)
        return batch

    def batch(self, step: int, state: Any, rows: Iterable[int] | None = None) -> Features:
        """Returns `batch_at(step, rows)`; the training state is not used."""
        return self.batch_at(step, rows)

    def empty_batch(self) -> Features:
        """Returns a batch of padding."""
        sides = ("{}_BT", "source_{}_BS") if self.source_length is not None else ("{}_BT",)
        names = [side.format(name) for side in sides for name in ("segments", "positions")]
        names += ["source_tokens_BS"] * (len(sides) - 1)
        fields = {**self._inputs, **dict.fromkeys(names, np.int32), **self.examples.fields}
        if any("_BE" in name for name in fields):
            fields |= {"starts_BE": np.int32, "weights_BE": np.float32}
        sizes = {"B": self.rows, "T": self.length, "E": self.max_examples, "N": self.examples.labels}
        sizes |= getattr(self.examples, "axes", {})
        sizes["S"] = self.source_length or 0
        shape = lambda name: tuple(sizes[axis] for axis in axes_of(name))
        return {name: np.zeros(shape(name), dtype) for name, dtype in fields.items()}

    def units_at(self, step: int) -> list[list[tuple[int, int]]]:
        """Returns, for each row of an evaluation batch, the index of each unit and its number of examples."""
        rows = []
        for index in range(step * self.rows, (step + 1) * self.rows):
            n, units = self._find(index)
            counts = None if n is None else self._epoch(n)[0].counts
            rows.append([(i, 1 if counts is None else int(counts[i])) for i in units.tolist()])
        return rows

    def progress(self) -> Any:
        """Returns what `resume` needs so that it does not build earlier epochs again, as a JSON value."""
        return self.epoch_starts

    def resume(self, progress: Any) -> None:
        """Continues from the `progress` of equal batches."""
        self.epoch_starts = progress

    def _find(self, index: int) -> tuple[int | None, np.ndarray]:
        """Returns the epoch and the units of a row, counted over all epochs; (None, []) beyond an evaluation."""
        starts = self.epoch_starts
        while index >= starts[-1]:
            if self.seed is None and len(starts) == 2:
                return None, np.zeros(0, np.int64)
            n = len(starts) - 1
            rows_in_epoch = len(self._epoch(n)[1].starts) - 1
            with self._lock:
                if len(starts) == n + 1:  # no other thread was faster
                    starts.append(starts[n] + rows_in_epoch)
        n = bisect_right(starts, index) - 1
        rows, r = self._epoch(n)[1], index - starts[n]
        if self.seed is not None and 4 * r > 3 * len(rows.starts) and n + 1 not in self._epochs:
            # The thread does not delay the end of the program, which may not need the next epoch.
            threading.Thread(target=self._start_epoch, args=(n + 1,), daemon=True).start()
        return n, rows.examples[rows.starts[r] : rows.starts[r + 1]]

    def _epoch(self, n: int) -> tuple[Epoch, Rows]:
        """Returns the units of epoch n and their rows; builds them unless another thread does."""
        return self._start_epoch(n).result()

    def _start_epoch(self, n: int) -> Future[tuple[Epoch, Rows]]:
        """Builds epoch n unless it exists or another thread builds it; an error is raised by the result."""
        with self._lock:
            existing = self._epochs.pop(n, None)
            self._epochs[n] = future = existing or Future()
            for other in list(self._epochs)[:-2]:  # the last two that were used are kept
                del self._epochs[other]
        if existing is None:
            try:
                future.set_result(self._make_epoch(n))
            except BaseException as error:
                with self._lock:
                    self._epochs.pop(n, None)  # a later call builds it again
                future.set_exception(error)
        return future

    def _make_epoch(self, n: int) -> tuple[Epoch, Rows]:
        """Shuffles the units of epoch n, packs them, and shuffles the rows."""
        if self.seed is None:
            epoch = self.examples.epoch(None)
            return epoch, self._pack(epoch, np.arange(len(epoch.lengths)))
        epoch = self.examples.epoch(n)
        random = np.random.default_rng((self.seed, n, 0))
        order = random.permutation(len(epoch.lengths))
        packed = self._pack(epoch, order)
        shuffled = random.permutation(len(packed.starts) - 1)
        sizes = np.diff(packed.starts)[shuffled]
        # Row r of the new order has the units of row shuffled[r] of the old order.
        index = ranges(packed.starts[:-1][shuffled], sizes)
        return epoch, Rows(order[packed.examples[index]], offsets(sizes))

    def _pack(self, epoch: Epoch, order: np.ndarray) -> Rows:
        """Packs the units in this order into rows, which contain indices into `order`."""
        counts = None if epoch.counts is None else epoch.counts[order]
        sources = None
        if self.source_length is not None:
            assert epoch.source_lengths is not None
            sources = epoch.source_lengths[order], self.source_length
        return pack(epoch.lengths[order], self.length, self.max_examples, counts=counts, sources=sources)


def write_units(batch: Features, epoch: Epoch, units: Sequence[np.ndarray], places: Sequence[int]) -> None:
    """Writes the examples of several units into each of several rows of a batch, one after another.

    Args:
      batch: the batch, changed in place.
      epoch: the units.
      units: indices of the units of each row.
      places: the row in the batch of each entry of `units`.
    """
    unit_U = np.concatenate(units)
    row_U = np.repeat(np.array(places, np.int64), [len(of_row) for of_row in units])
    joined = epoch.features(unit_U)
    counts_U = np.ones(len(unit_U), np.int64) if epoch.counts is None else epoch.counts[unit_U]
    row_X = np.repeat(row_U, counts_U)  # X: the examples of all rows
    number_X = number_within(row_X)
    tokens, starts_X = _write_positions(batch, "segments_BT", "positions_BT", row_X, number_X, joined.lengths)
    sources: Any = None
    if joined.source_lengths is not None:
        names = "source_segments_BS", "source_positions_BS"
        sources, _ = _write_positions(batch, *names, row_X, number_X, joined.source_lengths)
    if "starts_BE" in batch:
        batch["starts_BE"][row_X, number_X], batch["weights_BE"][row_X, number_X] = starts_X, 1
    if "groups_BE" in batch:
        batch["groups_BE"][row_X, number_X] = np.repeat(number_within(row_U) + 1, counts_U)
    for name, values in joined.features.items():
        field, side = batch[name], {"T": tokens, "S": sources}.get(axes_of(name)[1])
        if side is None:
            field[row_X, number_X] = values
        else:
            field.reshape(-1, *field.shape[2:])[side] = values


def _write_positions(
    batch: Features, segments: str, positions: str, row_X: np.ndarray, number_X: np.ndarray, lengths_X: np.ndarray
) -> tuple[np.ndarray | slice, np.ndarray]:
    """Writes the segments and positions of examples of some rows.

    Args:
      batch: the batch, changed in place.
      segments: the name of the field of segments.
      positions: the name of the field of positions.
      row_X: the row of each example.
      number_X: its number in the row, from 0.
      lengths_X: its length.

    Returns:
      The place of each token in the fields, with rows and positions as one axis, and the start of each example in its
      row.
    """
    bounds = offsets(lengths_X)
    total, size = int(bounds[-1]), batch[segments].shape[1]
    first_X = np.maximum.accumulate(np.where(number_X == 0, bounds[:-1], 0))  # the first token of the example's row
    starts_X = bounds[:-1] - first_X
    within = np.arange(total) - np.repeat(bounds[:-1], lengths_X)
    tokens: np.ndarray | slice = np.repeat(row_X * size + starts_X, lengths_X) + within
    if total == batch[segments].size and (np.diff(row_X) >= 0).all():
        tokens = slice(None)  # all rows are full, in order
    batch[segments].reshape(-1)[tokens] = np.repeat(number_X + 1, lengths_X)
    batch[positions].reshape(-1)[tokens] = within
    return tokens, starts_X


class BatchSource(Protocol):
    """Source of the batches of a run: `Batches`, or any object with the same methods."""

    reads_state: bool  # whether batches depend on the training state, such as texts that the model generates
    # Optional methods: `progress()` returns a JSON value, which each checkpoint stores, and `resume(progress)` receives
    # the value of the checkpoint from which a run resumes.

    def batch(self, step: int, state: Any, rows: Iterable[int] | None = None) -> Features:
        """Returns the batch of a step.

        Args:
          step: number of the step, from 0.
          state: the training state before the step; None if `reads_state` is False.
          rows: indices of the rows to fill; the others are padding.  None: all.
        """


def iterate_batches(
    source: BatchSource,
    start: int,
    stop: int,
    state: Callable[[], Any],
    rows: Iterable[int] | None = None,
    place: Callable[[int, Features], Any] = lambda step, batch: batch,
) -> Iterator[Any]:
    """Returns an iterator over the batches of steps `start` to `stop - 1`.

    Args:
      source: the source of the batches.
      start: the first step.
      stop: the step after the last one.
      state: returns the current training state; only called if the source reads it.  Otherwise batches are prefetched.
      rows: indices of the rows to fill; None: all.
      place: returns what is yielded for a step and its batch, such as the batch on the devices; also prefetched.
    """
    if source.reads_state:
        return (place(step, source.batch(step, state(), rows)) for step in range(start, stop))
    return prefetch(lambda step: place(step, source.batch(step, None, rows)), range(start, stop))
