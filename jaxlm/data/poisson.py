"""Batches for private training: each unit is in each batch with the same probability, independently of the others."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jaxlm.data.batches import Batches, Epoch, write_units
from jaxlm.data.joined import Features
from jaxlm.data.pack import Rows

_STREAM = 5  # part of the seed, so that the sampling and the masks of a run draw different numbers


class PoissonBatches(Batches):
    """Poisson samples of the units, one unit in a row, with a fixed number of rows.

    The batch of a step is a function of (units, sizes, seed, step). A batch of more units than rows is cut at random:
    `run/privacy.py` chooses the number of rows so that this does not happen in practice.

    Attributes:
      expected: mean number of units in a batch; the sampling probability is `expected` / `units`.
    """

    def __init__(self, batches: Batches, expected: int):
        """Samples from the units of other batches.

        Args:
          batches: batches for training; their packing is not used.
          expected: mean number of units in a batch.
        """
        first = batches.examples.epoch(0)
        self.units = len(first.lengths)
        most = 1 if first.counts is None else int(first.counts.max(initial=1))
        examples, seed = batches.examples, batches.seed
        super().__init__(examples, expected, batches.length, most, seed, batches.source_length)
        self.expected = expected

    def units_of(self, step: int) -> np.ndarray:
        """Returns the indices of the units in the batch of a step, in ascending order."""
        random = np.random.default_rng((self.seed or 0, step, 0, _STREAM))
        # A binomial number of distinct units is the same distribution as one draw for each unit.
        size = random.binomial(self.units, min(1.0, self.expected / self.units))
        return np.sort(random.choice(self.units, min(size, self.rows), replace=False, shuffle=False))

    def batch_at(self, step: int, rows: Iterable[int] | None = None) -> Features:
        """Returns the batch of a step, whose first rows hold one unit each; the arguments are as in `Batches`."""
        batch, chosen = self.empty_batch(), self.units_of(step)
        places = [b for b in (range(self.rows) if rows is None else rows) if b < len(chosen)]
        if places:
            # Each pass over the data has its own masks.
            epoch = self._epoch(step * self.expected // max(1, self.units))[0]
            write_units(batch, epoch, [chosen[b : b + 1] for b in places], places)
        return batch

    def _make_epoch(self, n: int) -> tuple[Epoch, Rows]:
        """Returns the units of epoch n, each in a row of its own."""
        epoch = self.examples.epoch(n)
        assert len(epoch.lengths) == self.units, "the units of all epochs are the same"
        return epoch, Rows(np.arange(self.units), np.arange(self.units + 1))
