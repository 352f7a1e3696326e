"""`batch_at(step)`: random access to packed batches, so that resuming needs the step alone.

Everything here is a pure function of (examples, sizes, seed, step): prefetching and the number of hosts cannot change
what a step sees.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxlm.data.pack import Rows, pack

Features = dict[str, Any]  # arrays of one example, or of a batch
Batch = dict[str, Any]  # the same fields as arrays of NumPy or JAX


class Epoch(NamedTuple):
    """The units of one pass over the data: how long each is, and what it holds.

    A unit is what rows never divide: one example, or several that belong together, such as the texts of a pair, which
    do not see each other.  `features(i)` are the features of each example of unit i.

    A feature's name ends in the axes that it has in a batch.  `labels_BT` of an example of n tokens is an array [n];
    `labels_BE` is one value for the whole example, `labels_BEN` an array [N].  Of an encoder-decoder, what ends in T is
    of the decoder, and `source_tokens_BS` are the tokens that the encoder reads.
    """

    lengths: np.ndarray  # [number of units], tokens
    features: Callable[[int], list[Features]]
    counts: np.ndarray | None = None  # [number of units], examples in each; None: one
    source_lengths: np.ndarray | None = None  # [number of units], tokens of the sources, where there are some


class Examples(Protocol):
    """What a task makes of its data: epoch n's units, a pure function of n.  None asks for evaluation."""

    fields: Mapping[str, type]  # name in a batch -> dtype
    labels: int  # size of the axis N of several labels
    # Where they differ from those of text, also:
    # inputs: Mapping[str, type], what a front end reads of each position; the first gives the length of an example.
    # axes: Mapping[str, int], sizes of further axes, by their letters.

    def epoch(self, n: int | None) -> Epoch:
        """The units of epoch n, or those of evaluation."""


class Batches:
    """Batches of `rows` packed rows: in training endless and shuffled anew in each epoch, in evaluation one pass.

    An epoch's rows follow those of the one before it, so that no row is dropped where a batch does not divide an epoch.
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
        """`max_examples`: the most examples in a row E.  `seed`: of the shuffling; None: evaluation, each unit once.
        `source_length`: tokens of sources in a row, where there are some."""
        self.examples, self.rows, self.length, self.max_examples, self.seed = examples, rows, length, max_examples, seed
        self.source_length = source_length
        self._epoch_starts = [0]  # index of each epoch's first row, as far as it is known
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    @property
    def _inputs(self) -> Mapping[str, type]:
        """What a front end reads of each position: name in a batch -> dtype."""
        return getattr(self.examples, "inputs", {"tokens_BT": np.int32})

    def __len__(self) -> int:
        """Number of batches in one epoch, the last one filled up with padding."""
        return -(-self.rows_in_epoch // self.rows)

    @property
    def rows_in_epoch(self) -> int:
        """Number of rows that the first epoch fills; later ones fill as many, or one or two more or less."""
        return len(self._epoch(0)[1].starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each unit of the first epoch."""
        return self._epoch(0)[0].lengths

    @property
    def true_lengths(self) -> np.ndarray:
        """Tokens of each example before any was cut, where the examples know them; else those of each unit."""
        return getattr(self.examples, "true_lengths", self.lengths)

    def batch_at(self, step: int, rows: Iterable[int] | None = None) -> Features:
        """The fields of batch `step`: [B, T] for tokens, [B, E] for examples; `segments_BT` 0 is padding.

        rows: those that are made, the others being left as padding; None: all.
        """
        batch = self.nothing()
        for b in range(self.rows) if rows is None else rows:
            found = self._row(step * self.rows + b)
            if found is not None:
                epoch, units = found
                _fill(batch, b, [epoch.features(i) for i in units], next(iter(self._inputs)))
        return batch

    def batch(self, step: int, state: Any, rows: Iterable[int] | None = None) -> Features:
        """`batch_at(step, rows)`, whatever the training state."""
        return self.batch_at(step, rows)

    def nothing(self) -> Features:
        """A batch of padding."""
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
        """For each row of an evaluation's batch the units in it, and how many examples each has."""
        rows = []
        for index in range(step * self.rows, (step + 1) * self.rows):
            epoch, units = self._row(index) or (None, [])
            rows.append([(i, 1 if epoch is None or epoch.counts is None else int(epoch.counts[i])) for i in units])
        return rows

    def _row(self, index: int) -> tuple[Epoch, list[int]] | None:
        """The units of the row with this index, counted over all epochs; None past the end of an evaluation."""
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
        """The units of epoch n and their rows: units are shuffled, packed, and the rows shuffled."""
        if self.seed is None:
            epoch = self.examples.epoch(None)
            return epoch, self._packed(epoch, np.arange(len(epoch.lengths)))
        epoch = self.examples.epoch(n)
        random = np.random.default_rng((self.seed, n, 0))
        order = random.permutation(len(epoch.lengths))
        packed = self._packed(epoch, order)
        shuffled = random.permutation(len(packed.starts) - 1)
        sizes = np.diff(packed.starts)[shuffled]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        # The units of row r of the new order: those of row shuffled[r] of the old one.
        index = np.repeat(packed.starts[:-1][shuffled] - starts[:-1], sizes) + np.arange(starts[-1])
        return epoch, Rows(order[packed.examples[index]], starts)

    def _packed(self, epoch: Epoch, order: np.ndarray) -> Rows:
        """Rows of the units in this order, which they are numbered by."""
        counts = None if epoch.counts is None else epoch.counts[order]
        beside = None
        if self.source_length is not None:
            assert epoch.source_lengths is not None
            beside = epoch.source_lengths[order], self.source_length
        return pack(epoch.lengths[order], self.length, self.max_examples, counts=counts, beside=beside)


def _fill(batch: Features, b: int, units: list[list[Features]], inputs: str) -> None:
    """Writes the examples of row b one after the other; each is as long as its feature `inputs`."""
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
    """Where the batches of a run come from: `Batches`, or another with the same methods."""

    reads_state: bool  # whether a batch depends on the training state, as what a model has just written does

    def batch(self, step: int, state: Any, rows: Iterable[int] | None = None) -> Features:
        """Returns the batch of a step.

        Args:
          step: from 0.
          state: the training state before the step; None where the source does not read it.
          rows: those that are made, the others being left as padding; None: all.
        """


def fed(
    source: BatchSource, start: int, stop: int, state: Callable[[], Any], rows: Iterable[int] | None = None
) -> Iterator[Features]:
    """Yields the batches of the steps from `start` to `stop - 1`: ahead of time, unless they depend on the state."""
    if source.reads_state:
        return (source.batch(step, state(), rows) for step in range(start, stop))
    return prefetch(lambda step: source.batch(step, None, rows), start, stop)


def prefetch(batch_at: Callable[[int], Features], start: int, stop: int, ahead: int = 4) -> Iterator[Features]:
    """`batch_at(start)` to `batch_at(stop - 1)`, made ahead of time by another thread."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[Features]] = deque()
        for step in range(start, stop):
            waiting.append(pool.submit(batch_at, step))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
