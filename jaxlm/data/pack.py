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
    most: int,
    window: int = 1 << 16,
    counts: np.ndarray | None = None,
    beside: tuple[np.ndarray, int] | None = None,
) -> Rows:
    """Puts examples of `lengths` into rows of `length` tokens and at most `most` examples.

    counts: for how many examples each one counts, where it is a unit of several; None: for one.
    beside: lengths on a second side, an encoder-decoder's sources, and how many tokens a row has there.

    Best-fit decreasing (Johnson 1973) inside windows of consecutive examples, so that memory stays bounded and
    examples far apart in the shuffled order are not brought together.  Each example is in exactly one row.

    >>> rows = pack(np.array([5, 3, 4, 2]), length=8, most=3)
    >>> [rows.examples[a:b].tolist() for a, b in zip(rows.starts, rows.starts[1:])]
    [[0, 1], [2, 3]]

    Raises ValueError for an example that is empty or longer than a row, and for a unit of too many examples.
    """
    counts = np.ones(len(lengths), np.int64) if counts is None else counts
    for sizes, places in ((lengths, length), beside or (lengths, length)):
        if len(sizes) and not (sizes.min() > 0 and sizes.max() <= places):
            raise ValueError(f"example lengths from {sizes.min()} to {sizes.max()} do not fit rows of {places}")
    if len(counts) and counts.max() > most:
        raise ValueError(f"a unit has {counts.max()} examples, a row at most {most}")
    order, starts = [], [0]
    for first in range(0, len(lengths), window):
        some = slice(first, first + window)
        if beside is None:
            rows = _pack_window(lengths[some], counts[some], length, most)
        else:
            both = np.stack([lengths[some], beside[0][some]], 1)
            rows = _pack_two_sides(both, counts[some], np.array([length, beside[1]]), most)
        for row in rows:
            order += [first + i for i in row]
            starts.append(len(order))
    return Rows(np.array(order, np.int64), np.array(starts, np.int64))


def _pack_window(lengths: np.ndarray, counts: np.ndarray, length: int, most: int) -> list[list[int]]:
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
        if space and held[row] + largest <= most:
            with_space[space].append(row)
            spaces[space] += 1
            if spaces[space] == 1:
                insort(open_spaces, space)
    return rows


def _pack_two_sides(sizes: np.ndarray, counts: np.ndarray, length: np.ndarray, most: int) -> list[list[int]]:
    """As `_pack_window`, for examples of `sizes` [n, 2] in rows of `length` [2]: largest first by their larger share of
    a row, each into the open row that has the least space left by the share of both sides together."""
    rows: list[list[int]] = []
    spaces = np.zeros((0, 2), np.int64)  # of the open rows
    held = np.zeros(0, np.int64)  # examples in them
    index = np.zeros(0, np.int64)  # of them in `rows`
    least, largest = sizes.min(0, initial=1 << 30), int(counts.max(initial=1))
    for i in np.argsort(-(sizes / length).max(1), kind="stable").tolist():
        fits = np.flatnonzero((spaces >= sizes[i]).all(1))
        if len(fits):
            at = fits[(spaces[fits] / length).sum(1).argmin()]
        else:
            rows.append([])
            at = len(spaces)
            spaces, held = np.concatenate([spaces, length[None]]), np.append(held, 0)
            index = np.append(index, len(rows) - 1)
        rows[index[at]].append(i)
        spaces[at] -= sizes[i]
        held[at] += counts[i]
        if (spaces[at] < least).any() or held[at] + largest > most:
            spaces, held, index = np.delete(spaces, at, 0), np.delete(held, at), np.delete(index, at)
    return rows
