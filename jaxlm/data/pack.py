"""Packing of examples into rows with little padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

from jaxlm.data.joined import offsets


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
    units, units_in_row = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for first in range(0, len(lengths), window):
        part = slice(first, first + window)
        if sources is None:
            packed = _pack_window(lengths[part], counts[part], length, max_examples)
        else:
            both = np.stack([lengths[part], sources[0][part]], 1)
            packed = _pack_two_sides(both, counts[part], np.array([length, sources[1]]), max_examples)
        units.append(first + packed[0])
        units_in_row.append(packed[1])
    return Rows(np.concatenate(units), offsets(np.concatenate(units_in_row)))


def _pack_window(
    lengths: np.ndarray, counts: np.ndarray, length: int, max_examples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the units in the order of their rows, and the number of units in each row.

    Units of the same length and number of examples are placed together, and so are rows with the same space left, so
    that the time depends on the number of different lengths rather than that of units.
    """
    largest = int(counts.max(initial=1))  # a row without room for this many more examples is closed
    open_rows: dict[int, dict[int, np.ndarray]] = {}  # rows by space left and number of examples
    spaces: list[int] = []  # the keys of `open_rows`, sorted
    n_rows = 0
    order = np.lexsort((-counts, -lengths))
    row_of = np.empty(len(order), np.int64)  # of each unit, in this order
    is_new = np.diff(lengths[order], prepend=0) != 0
    is_new[1:] |= np.diff(counts[order]) != 0
    bounds = [*np.flatnonzero(is_new).tolist(), len(order)]
    for first, last in zip(bounds, bounds[1:]):
        size, count = int(lengths[order[first]]), int(counts[order[first]])
        while first < last:
            at = bisect_left(spaces, size)
            is_open = at < len(spaces)
            space = spaces[at] if is_open else length
            # Of the rows with the least space that suffices, those with the fewest examples have room for most others.
            examples = min(open_rows[space]) if is_open else 0
            rows = open_rows[space].pop(examples) if is_open else np.zeros(0, np.int64)
            # A row with room for several of the units is the best one for each of them.
            per_row = min(space // size, (max_examples - largest - examples) // count + 1)
            needed = -(-(last - first) // per_row)
            if not is_open:
                rows, n_rows = np.arange(n_rows, n_rows + needed), n_rows + needed
            elif needed < len(rows):
                open_rows[space][examples] = rows[needed:]
            elif not open_rows[space]:
                del open_rows[space], spaces[at]
            end = min(last, first + per_row * len(rows))
            row_of[first:end] = np.repeat(rows[:needed], per_row)[: end - first]
            filled, rest = divmod(end - first, per_row)
            for n_units, group in ((per_row, rows[:filled]), (rest, rows[filled:needed])):
                space_left, n_examples = space - n_units * size, examples + n_units * count
                if n_units and len(group) and space_left and n_examples + largest <= max_examples:
                    if space_left not in open_rows:
                        insort(spaces, space_left)
                    groups = open_rows.setdefault(space_left, {})
                    groups[n_examples] = np.concatenate([groups[n_examples], group]) if n_examples in groups else group
            first = end
    return order[np.argsort(row_of, kind="stable")], np.bincount(row_of, minlength=n_rows)


def _pack_two_sides(
    sizes: np.ndarray, counts: np.ndarray, length: np.ndarray, max_examples: int
) -> tuple[np.ndarray, np.ndarray]:
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
    return np.array([i for row in rows for i in row], np.int64), np.array([len(row) for row in rows], np.int64)
