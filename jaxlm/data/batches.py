"""`batch_at(step)`: random access to packed batches, so that resuming needs the step alone.

Everything here is a pure function of (examples, sizes, seed, step): prefetching and the number of hosts cannot change
what a step sees.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
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
    `labels_BE` is one value for the whole example, `labels_BEN` an array [N].
    """

    lengths: np.ndarray  # [number of units], tokens
    features: Callable[[int], list[Features]]
    counts: np.ndarray | None = None  # [number of units], examples in each; None: one


class Examples(Protocol):
    """What a task makes of its data: epoch n's units, a pure function of n.  None asks for evaluation."""

    fields: Mapping[str, type]  # name in a batch -> dtype
    labels: int  # size of the axis N of several labels

    def epoch(self, n: int | None) -> Epoch:
        """The units of epoch n, or those of evaluation."""


class Batches:
    """Batches of `rows` packed rows: in training endless and shuffled anew in each epoch, in evaluation one pass.

    An epoch's rows follow those of the one before it, so that no row is dropped where a batch does not divide an epoch.
    """

    def __init__(self, examples: Examples, rows: int, length: int, most: int, seed: int | None):
        """`most`: examples in a row E.  `seed`: of the shuffling; None: evaluation, each unit once."""
        self.examples, self.rows, self.length, self.most, self.seed = examples, rows, length, most, seed
        self._epoch_starts = [0]  # index of each epoch's first row, as far as it is known
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

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

    def batch_at(self, step: int) -> Features:
        """The fields of batch `step`: [B, T] for tokens, [B, E] for examples; `segments_BT` 0 is padding."""
        batch = self.nothing()
        for b in range(self.rows):
            found = self._row(step * self.rows + b)
            if found is not None:
                epoch, units = found
                _fill(batch, b, [epoch.features(i) for i in units])
        return batch

    def nothing(self) -> Features:
        """A batch of padding."""
        fields = {"tokens_BT": np.int32, "segments_BT": np.int32, "positions_BT": np.int32, **self.examples.fields}
        if any("_BE" in name for name in fields):
            fields |= {"starts_BE": np.int32, "weights_BE": np.float32}
        sizes = {"B": self.rows, "T": self.length, "E": self.most, "N": self.examples.labels}
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
            return epoch, pack(epoch.lengths, self.length, self.most, counts=epoch.counts)
        epoch = self.examples.epoch(n)
        random = np.random.default_rng((self.seed, n, 0))
        order = random.permutation(len(epoch.lengths))
        counts = None if epoch.counts is None else epoch.counts[order]
        packed = pack(epoch.lengths[order], self.length, self.most, counts=counts)
        shuffled = random.permutation(len(packed.starts) - 1)
        sizes = np.diff(packed.starts)[shuffled]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        # The units of row r of the new order: those of row shuffled[r] of the old one.
        index = np.repeat(packed.starts[:-1][shuffled] - starts[:-1], sizes) + np.arange(starts[-1])
        return epoch, Rows(order[packed.examples[index]], starts)


def _fill(batch: Features, b: int, units: list[list[Features]]) -> None:
    """Writes the examples of row b one after the other."""
    start, e = 0, 0
    for group, examples in enumerate(units, start=1):
        for features in examples:
            end = start + len(features["tokens_BT"])
            batch["segments_BT"][b, start:end] = e + 1
            batch["positions_BT"][b, start:end] = np.arange(end - start)
            if "starts_BE" in batch:
                batch["starts_BE"][b, e], batch["weights_BE"][b, e] = start, 1
            if "groups_BE" in batch:
                batch["groups_BE"][b, e] = group
            for name, value in features.items():
                if name.endswith("_BT"):
                    batch[name][b, start:end] = value
                else:
                    batch[name][b, e] = value
            start, e = end, e + 1


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
