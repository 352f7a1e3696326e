"""Examples to rows without padding waste."""

from __future__ import annotations

from bisect import bisect_right, insort
from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Row r holds the examples `examples[starts[r]:starts[r + 1]]`, in this order."""

    examples: np.ndarray  # [number of examples] int64
    starts: np.ndarray  # [number of rows + 1] int64


def pack(
    lengths: np.ndarray,
    length: int,
    max_examples: int,
    window: int = 1 << 16,
    counts: np.ndarray | None = None,
    beside: tuple[np.ndarray, int] | None = None,
) -> Rows:
    """Puts examples of `lengths` into rows of `length` tokens and at most `max_examples` examples.

    counts: for how many examples each one counts, where it is a unit of several; None: for one.
    beside: lengths on a second side, an encoder-decoder's sources, and how many tokens a row has there.

    Best-fit decreasing (Johnson 1973) inside windows of consecutive examples, so that memory stays bounded and
    examples far apart in the shuffled order are not brought together.  Each example is in exactly one row.

    >>> rows = pack(np.array([5, 3, 4, 2]), length=8, max_examples=3)
    >>> [rows.examples[a:b].tolist() for a, b in zip(rows.starts, rows.starts[1:])]
    [[0, 1], [2, 3]]

    Raises ValueError for an example that is empty or longer than a row, and for a unit of too many examples.
    """
    counts = np.ones(len(lengths), np.int64) if counts is None else counts
    for sizes, places in ((lengths, length), beside or (lengths, length)):
        if len(sizes) and not (sizes.min() > 0 and sizes.max() <= places):
            raise ValueError(f"example lengths from {sizes.min()} to {sizes.max()} do not fit rows of {places}")
    if len(counts) and counts.max() > max_examples:
        raise ValueError(f"a unit has {counts.max()} examples, a row at most {max_examples}")
    order, starts = [], [0]
    for first in range(0, len(lengths), window):
        some = slice(first, first + window)
        if beside is None:
            rows = _pack_window(lengths[some], counts[some], length, max_examples)
        else:
            both = np.stack([lengths[some], beside[0][some]], 1)
            rows = _pack_two_sides(both, counts[some], np.array([length, beside[1]]), max_examples)
        for row in rows:
            order += [first + i for i in row]
            starts.append(len(order))
    return Rows(np.array(order, np.int64), np.array(starts, np.int64))


def _pack_window(lengths: np.ndarray, counts: np.ndarray, length: int, max_examples: int) -> list[list[int]]:
    rows: list[list[int]] = []
    held: list[int] = []  # examples in each row
    largest = int(counts.max(initial=1))  # a row without room for so many more is closed
    spaces = [0] * (length + 1)  # how many open rows have each space left
    with_space: list[list[int]] = [[] for _ in range(length + 1)]
    open_spaces: list[int] = []  # sorted, the spaces that some open row has
    for i in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[i])
        at = bisect_right(open_spaces, size - 1)
        if at == len(open_spaces):
            rows.append([i])
            held.append(0)
            row, space = len(rows) - 1, length - size
        else:
            space = open_spaces[at]
            row = with_space[space].pop()
            spaces[space] -= 1
            if not spaces[space]:
                del open_spaces[at]
            rows[row].append(i)
            space -= size
        held[row] += int(counts[i])
        if space and held[row] + largest <= max_examples:
            with_space[space].append(row)
            spaces[space] += 1
            if spaces[space] == 1:
                insort(open_spaces, space)
    return rows


def _pack_two_sides(sizes: np.ndarray, counts: np.ndarray, length: np.ndarray, max_examples: int) -> list[list[int]]:
    """As `_pack_window`, for examples of `sizes` [n, 2] in rows of `length` [2]: largest first by their larger share of
    a row, each into the open row that has the least space left by the share of both sides together."""
    rows: list[list[int]] = []
    held: list[int] = []  # examples in each row
    largest, least = int(counts.max(initial=1)), sizes.min(0, initial=1 << 30).tolist()
    # The first `n` of these are the open rows: the space left on each side, its share of a row, and which row it is.
    left, right = np.zeros(len(sizes), np.int64), np.zeros(len(sizes), np.int64)
    shares, index, n = np.zeros(len(sizes)), np.zeros(len(sizes), np.int64), 0
    for i in np.argsort(-(sizes / length).max(1), kind="stable").tolist():
        one, other = sizes[i].tolist()
        fits = np.flatnonzero((left[:n] >= one) & (right[:n] >= other))
        if len(fits):
            at = int(fits[shares[fits].argmin()])
        else:
            at, n = n, n + 1
            left[at], right[at], index[at] = *length, len(rows)
            rows.append([])
            held.append(0)
        row = index[at]
        rows[row].append(i)
        held[row] += int(counts[i])
        left[at] -= one
        right[at] -= other
        shares[at] = left[at] / length[0] + right[at] / length[1]
        if left[at] < least[0] or right[at] < least[1] or held[row] + largest > max_examples:
            n -= 1  # the row is closed, and the last of the open ones takes its place
            for of_open in (left, right, shares, index):
                of_open[at] = of_open[n]
    return rows
