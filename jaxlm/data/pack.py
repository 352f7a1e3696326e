"""Examples to rows without padding waste."""

from __future__ import annotations

from bisect import bisect_right, insort
from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Row r holds the examples `examples[starts[r]:starts[r + 1]]`, in this order."""

    examples: np.ndarray  # [number of examples] int64
    starts: np.ndarray  # [number of rows + 1] int64


def pack(lengths: np.ndarray, length: int, most: int, window: int = 1 << 16) -> Rows:
    """Puts examples of `lengths` into rows of `length` tokens and at most `most` examples.

    Best-fit decreasing (Johnson 1973) inside windows of consecutive examples, so that memory stays bounded and
    examples far apart in the shuffled order are not brought together.  Each example is in exactly one row.

    >>> rows = pack(np.array([5, 3, 4, 2]), length=8, most=3)
    >>> [rows.examples[a:b].tolist() for a, b in zip(rows.starts, rows.starts[1:])]
    [[0, 1], [2, 3]]

    Raises ValueError for an example that is empty or longer than a row.
    """
    if len(lengths) and not (lengths.min() > 0 and lengths.max() <= length):
        raise ValueError(f"example lengths from {lengths.min()} to {lengths.max()} do not fit rows of {length}")
    order, starts = [], [0]
    for first in range(0, len(lengths), window):
        for row in _pack_window(lengths[first : first + window], length, most):
            order += [first + i for i in row]
            starts.append(len(order))
    return Rows(np.array(order, np.int64), np.array(starts, np.int64))


def _pack_window(lengths: np.ndarray, length: int, most: int) -> list[list[int]]:
    rows: list[list[int]] = []
    spaces = [0] * (length + 1)  # how many open rows have each space left
    with_space: list[list[int]] = [[] for _ in range(length + 1)]
    open_spaces: list[int] = []  # sorted, the spaces that some open row has
    for i in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[i])
        at = bisect_right(open_spaces, size - 1)
        if at == len(open_spaces):
            rows.append([i])
            row, space = len(rows) - 1, length - size
        else:
            space = open_spaces[at]
            row = with_space[space].pop()
            spaces[space] -= 1
            if not spaces[space]:
                del open_spaces[at]
            rows[row].append(i)
            space -= size
        if space and len(rows[row]) < most:
            with_space[space].append(row)
            spaces[space] += 1
            if spaces[space] == 1:
                insort(open_spaces, space)
    return rows
