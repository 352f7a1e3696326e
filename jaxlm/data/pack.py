"""Packing of examples into rows with little padding."""

from __future__ import annotations

from bisect import bisect_right, insort
from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Row r has the examples `examples[starts[r]:starts[r + 1]]`, in this order."""

    examples: np.ndarray  # [number of examples] int64
    starts: np.ndarray  # [number of rows + 1] int64


def pack(
    lengths: np.ndarray,
    length: int,
    max_examples: int,
    window: int = 1 << 16,
    counts: np.ndarray | None = None,
    sources: tuple[np.ndarray, int] | None = None,
) -> Rows:
    """Packs units of `lengths` tokens into rows of `length` tokens and at most `max_examples` examples.

    Best-fit decreasing (Johnson 1973) within windows of consecutive units, so that memory is bounded and units that are
    far apart in a shuffled order do not share a row. Each unit is in exactly one row.

    Args:
      lengths: tokens of each unit, [N].
      length: tokens in a row.
      max_examples: maximum number of examples in a row.
      window: number of units that are packed together.
      counts: number of examples in each unit, [N]; None: one.
      sources: lengths on a second side, such as the sources of an encoder-decoder, [N], and the tokens that a row has
        there.

    >>> rows = pack(np.array([5, 3, 4, 2]), length=8, max_examples=3)
    >>> [rows.examples[a:b].tolist() for a, b in zip(rows.starts, rows.starts[1:])]
    [[0, 1], [2, 3]]

    Raises:
      ValueError: a unit is empty, is longer than a row, or has too many examples.
    """
    counts = np.ones(len(lengths), np.int64) if counts is None else counts
    for sizes, row_length in ((lengths, length), sources or (lengths, length)):
        if len(sizes) and not (sizes.min() > 0 and sizes.max() <= row_length):
            raise ValueError(f"example lengths from {sizes.min()} to {sizes.max()} do not fit rows of {row_length}")
    if len(counts) and counts.max() > max_examples:
        raise ValueError(f"a unit has {counts.max()} examples, a row at most {max_examples}")
    if max_examples == 1:
        return Rows(np.arange(len(lengths)), np.arange(len(lengths) + 1))
    order, starts = [], [0]
    for first in range(0, len(lengths), window):
        part = slice(first, first + window)
        if sources is None:
            rows = _pack_window(lengths[part], counts[part], length, max_examples)
        else:
            both = np.stack([lengths[part], sources[0][part]], 1)
            rows = _pack_two_sides(both, counts[part], np.array([length, sources[1]]), max_examples)
        for row in rows:
            order += [first + i for i in row]
            starts.append(len(order))
    return Rows(np.array(order, np.int64), np.array(starts, np.int64))


def _pack_window(lengths: np.ndarray, counts: np.ndarray, length: int, max_examples: int) -> list[list[int]]:
    rows: list[list[int]] = []
    n_examples: list[int] = []  # in each row
    largest = int(counts.max(initial=1))  # a row without room for this many more examples is closed
    spaces = [0] * (length + 1)  # number of open rows with each space left
    with_space: list[list[int]] = [[] for _ in range(length + 1)]
    open_spaces: list[int] = []  # the spaces left in open rows, sorted
    for i in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[i])
        at = bisect_right(open_spaces, size - 1)
        if at == len(open_spaces):
            rows.append([i])
            n_examples.append(0)
            row, space = len(rows) - 1, length - size
        else:
            space = open_spaces[at]
            row = with_space[space].pop()
            spaces[space] -= 1
            if not spaces[space]:
                del open_spaces[at]
            rows[row].append(i)
            space -= size
        n_examples[row] += int(counts[i])
        if space and n_examples[row] + largest <= max_examples:
            with_space[space].append(row)
            spaces[space] += 1
            if spaces[space] == 1:
                insort(open_spaces, space)
    return rows


def _pack_two_sides(sizes: np.ndarray, counts: np.ndarray, length: np.ndarray, max_examples: int) -> list[list[int]]:
    """Packs like `_pack_window` units of `sizes` [N, 2] into rows of `length` [2].

    The units with the largest share of a row, on either side, come first. Each goes into the open row with the smallest
    sum of the shares of space left on both sides.
    """
    rows: list[list[int]] = []
    n_examples: list[int] = []  # in each row
    largest, smallest = int(counts.max(initial=1)), sizes.min(0, initial=1 << 30).tolist()
    # The first `n` entries are the open rows: space left on each side, its share of a row, and the row's index.
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
            n_examples.append(0)
        row = index[at]
        rows[row].append(i)
        n_examples[row] += int(counts[i])
        left[at] -= one
        right[at] -= other
        shares[at] = left[at] / length[0] + right[at] / length[1]
        if left[at] < smallest[0] or right[at] < smallest[1] or n_examples[row] + largest > max_examples:
            n -= 1  # the row is closed, and the last open one replaces it
            for values in (left, right, shares, index):
                values[at] = values[n]
    return rows
