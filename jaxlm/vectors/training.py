"""What the two methods have in common: the state of a run, its batches, and a loop over the blocks of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

Batch = dict[str, Any]  # NumPy or JAX arrays
Arrays = dict[str, jax.Array]  # the tables of a method by name: vectors [V, D], and one number per word [V]


class VectorState(NamedTuple):
    """The arrays that a step reads and replaces."""

    step: jax.Array  # int32, number of steps made
    params: Arrays
    frozen: None = None  # as in `TrainState`, which has the same checkpoints


class Trainer(Protocol):
    """Skip-gram or GloVe on the words of a text."""

    steps: int  # of the whole run
    unit: str  # what `batch` counts, for printing

    def first_state(self) -> VectorState:
        """Returns the state before the first step."""

    def batch(self, step: int) -> Batch:
        """Returns the batch of a step, a pure function of the seed and the number of the step, from 0."""

    def update(self, state: VectorState, batch: Batch) -> tuple[VectorState, Arrays]:
        """Returns the next state, and the metrics loss and learning_rate; compiled, and donates the state."""

    def vectors(self, state: VectorState) -> np.ndarray:
        """Returns the vectors of the words [V, D]."""


def for_each_block(body: Callable[[Any, jax.Array], Any], arrays: Any, blocks: jax.Array) -> Any:
    """Applies `body(arrays, i)` to the tables for each block i of a batch, in order.

    XLA updates the tables of the loop in place, so that an update costs the rows that it changes, not a copy.
    """
    return jax.lax.fori_loop(0, blocks, lambda i, arrays: body(arrays, i), arrays)


def add_rows(table: jax.Array, ids_N: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns the table with `rows` [N, ...] added to the rows `ids_N`; rows of the same id are summed."""
    return table.at[ids_N].add(rows, mode="promise_in_bounds")


def take_rows(table: jax.Array, ids_N: jax.Array) -> jax.Array:
    """Returns the rows of a table; every id exists."""
    return table.at[ids_N].get(mode="promise_in_bounds")
