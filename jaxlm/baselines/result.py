"""The result of a baseline."""

from __future__ import annotations

from typing import NamedTuple


class Baseline(NamedTuple):
    """The result of a baseline.

    name: what the baseline is.
    scores: its scores on the held-out data, by the names of the task's scores; empty if it has none.
    note: a sentence about the result; empty if there is nothing to add.
    """

    name: str
    scores: dict[str, float]
    note: str = ""
