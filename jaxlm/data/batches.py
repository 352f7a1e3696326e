"""Random access to packed batches by step, so a run can resume from the step alone.

A batch is a pure function of (examples, sizes, seed, step): it depends neither on prefetching nor on the number of
hosts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxlm.data.pack import Rows, pack

Features = dict[str, Any]  # NumPy arrays of one example, or of a batch
Batch = dict[str, Any]  # fields of a batch, as NumPy or JAX arrays


class Epoch(NamedTuple):
    """The units of one pass over the data.

    A unit is never split across rows.  It consists of one example, or of several related ones that do not attend to
    each other, such as the texts of a pair.  `features(i)` returns the features of each example of unit i.

    The name of a feature ends in its axes in a batch: for an example of n tokens, `labels_BT` is an array [n];
    `labels_BE` is one value per example, and `labels_BEN` an array [N].  For an encoder-decoder, axis T belongs to the
    decoder, and `source_tokens_BS` are the input tokens of the encoder.
    """

    lengths: np.ndarray  # [number of units], length in tokens
    features: Callable[[int], list[Features]]
    counts: np.ndarray | None = None  # [number of units], number of examples; None: one per unit
    source_lengths: np.ndarray | None = None  # [number of units], length of the sources in tokens, if any


class Examples(Protocol):
    """The examples of a task."""

    fields: Mapping[str, type]  # name in a batch -> dtype
    labels: int  # size of the axis N of several labels
    # Optional attributes, for inputs other than text:
    # inputs: Mapping[str, type], fields that a front end reads; the first one determines the length of an example.
    # axes: Mapping[str, int], sizes of additional axes by their letters.

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
        self._epoch_starts = [0]  # index of the first row of each epoch so far
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    @property
    def _inputs(self) -> Mapping[str, type]:
        """Fields that a front end reads: name in a batch -> dtype."""
        return getattr(self.examples, "inputs", {"tokens_BT": np.int32})

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
        return self._epoch(0)[0].lengths

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
        batch = self.empty_batch()
        for b in range(self.rows) if rows is None else rows:
            row = self._row(step * self.rows + b)
            if row is not None:
                epoch, units = row
                _fill(batch, b, [epoch.features(i) for i in units], next(iter(self._inputs)))
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
        shape = lambda name: tuple(sizes[axis] for axis in name.rpartition("_")[2])
        return {name: np.zeros(shape(name), dtype) for name, dtype in fields.items()}

    def units_at(self, step: int) -> list[list[tuple[int, int]]]:
        """Returns, for each row of an evaluation batch, the index of each unit and its number of examples."""
        rows = []
        for index in range(step * self.rows, (step + 1) * self.rows):
            epoch, units = self._row(index) or (None, [])
            rows.append([(i, 1 if epoch is None or epoch.counts is None else int(epoch.counts[i])) for i in units])
        return rows

    def _row(self, index: int) -> tuple[Epoch, list[int]] | None:
        """Returns the units of a row, counted over all epochs; None beyond the end of an evaluation."""
        n = 0
        while True:
            if n + 1 == len(self._epoch_starts):
                self._epoch_starts.append(self._epoch_starts[n] + len(self._epoch(n)[1].starts) - 1)
            if index < self._epoch_starts[n + 1]:
                break
            if self.seed is None:
                return None
            n = max(n + 1, int(np.searchsorted(self._epoch_starts, index, side="right")) - 1)
        epoch, rows = self._epoch(n)
        r = index - self._epoch_starts[n]
        return epoch, rows.examples[rows.starts[r] : rows.starts[r + 1]].tolist()

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
        starts = np.concatenate([[0], np.cumsum(sizes)])
        # Row r of the new order has the units of row shuffled[r] of the old order.
        index = np.repeat(packed.starts[:-1][shuffled] - starts[:-1], sizes) + np.arange(starts[-1])
        return epoch, Rows(order[packed.examples[index]], starts)

    def _pack(self, epoch: Epoch, order: np.ndarray) -> Rows:
        """Packs the units in this order into rows, which contain indices into `order`."""
        counts = None if epoch.counts is None else epoch.counts[order]
        sources = None
        if self.source_length is not None:
            assert epoch.source_lengths is not None
            sources = epoch.source_lengths[order], self.source_length
        return pack(epoch.lengths[order], self.length, self.max_examples, counts=counts, sources=sources)


def _fill(batch: Features, b: int, units: list[list[Features]], inputs: str) -> None:
    """Writes the examples of row b one after another; the length of each is that of its feature `inputs`."""
    start, source_start, e = 0, 0, 0
    for group, examples in enumerate(units, start=1):
        for features in examples:
            end = start + len(features[inputs])
            source_end = source_start + len(features.get("source_tokens_BS", ()))
            places = {"T": np.s_[b, start:end], "S": np.s_[b, source_start:source_end]}
            batch["segments_BT"][places["T"]] = e + 1
            batch["positions_BT"][places["T"]] = np.arange(end - start)
            if "source_tokens_BS" in batch:
                batch["source_segments_BS"][places["S"]] = e + 1
                batch["source_positions_BS"][places["S"]] = np.arange(source_end - source_start)
            if "starts_BE" in batch:
                batch["starts_BE"][b, e], batch["weights_BE"][b, e] = start, 1
            if "groups_BE" in batch:
                batch["groups_BE"][b, e] = group
            for name, value in features.items():
                batch[name][places.get(name.rpartition("_")[2][1], (b, e))] = value
            start, source_start, e = end, source_end, e + 1


class BatchSource(Protocol):
    """Source of the batches of a run: `Batches`, or any object with the same methods."""

    reads_state: bool  # whether batches depend on the training state, such as texts that the model generates

    def batch(self, step: int, state: Any, rows: Iterable[int] | None = None) -> Features:
        """Returns the batch of a step.

        Args:
          step: number of the step, from 0.
          state: the training state before the step; None if `reads_state` is False.
          rows: indices of the rows to fill; the others are padding.  None: all.
        """


def iterate_batches(
    source: BatchSource, start: int, stop: int, state: Callable[[], Any], rows: Iterable[int] | None = None
) -> Iterator[Features]:
    """Returns an iterator over the batches of steps `start` to `stop - 1`.

    Args:
      source: the source of the batches.
      start: the first step.
      stop: the step after the last one.
      state: returns the current training state; only called if the source reads it.  Otherwise batches are prefetched.
      rows: indices of the rows to fill; None: all.
    """
    if source.reads_state:
        return (source.batch(step, state(), rows) for step in range(start, stop))
    return prefetch(lambda step: source.batch(step, None, rows), start, stop)


def prefetch(batch_at: Callable[[int], Features], start: int, stop: int, ahead: int = 4) -> Iterator[Features]:
    """Yields `batch_at(start)` to `batch_at(stop - 1)`, computed up to `ahead` steps in advance by another thread."""
    with ThreadPoolExecutor(1) as pool:
        pending: deque[Future[Features]] = deque()
        for step in range(start, stop):
            pending.append(pool.submit(batch_at, step))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
