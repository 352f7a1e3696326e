"""Arrays of several examples one after another, so that a whole batch takes few operations of NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Features = dict[str, Any]  # NumPy arrays of one example, of several joined examples, or of a batch


class Joined(NamedTuple):
    """The features of several examples.

    The arrays of a feature with a value per token are concatenated: `labels_BT` is [sum of the lengths].  The values of
    other features are stacked: `labels_BE` is [number of examples], and `labels_BEN` is [number of examples, N].
    """

    lengths: np.ndarray  # [number of examples], length in tokens
    features: Features
    source_lengths: np.ndarray | None = None  # [number of examples], length of the sources in tokens, if any

    def split(self) -> list[Features]:
        """Returns the features of each example."""
        starts = {"T": offsets(self.lengths)}
        if self.source_lengths is not None:
            starts["S"] = offsets(self.source_lengths)

        def feature(name: str, x: int) -> Any:
            bounds = starts.get(axes_of(name)[1])
            return self.features[name][x if bounds is None else slice(bounds[x], bounds[x + 1])]

        return [{name: feature(name, x) for name in self.features} for x in range(len(self.lengths))]


def join(examples: Sequence[Features], lengths_of: str = "tokens_BT") -> Joined:
    """Joins the features of examples.

    Args:
      examples: the features of each example, at least one; all have the same names.
      lengths_of: the feature whose length is that of its example.
    """
    sizes = lambda name: np.array([len(features[name]) for features in examples])
    combine = lambda name: np.concatenate if is_per_token(name) else np.stack
    features = {name: combine(name)([features[name] for features in examples]) for name in examples[0]}
    source_lengths = sizes("source_tokens_BS") if "source_tokens_BS" in features else None
    return Joined(sizes(lengths_of), features, source_lengths)


def is_per_token(name: str) -> bool:
    """Returns whether a feature, such as `labels_BT`, has a value for each token of a text or of a source."""
    return axes_of(name)[1] in "TS"


def axes_of(name: str) -> str:
    """Returns the axes of a feature in a batch: "BT" for `labels_BT`."""
    return name.rpartition("_")[2]


def offsets(lengths: np.ndarray) -> np.ndarray:
    """Returns where each of several parts starts, and where the last one ends.

    >>> offsets(np.array([3, 2])).tolist()
    [0, 3, 5]
    """
    ends = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    return ends


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns the numbers from each start, as many as each length.

    >>> ranges(np.array([10, 5]), np.array([3, 2])).tolist()
    [10, 11, 12, 5, 6]
    """
    bounds = offsets(lengths)
    return np.repeat(starts - bounds[:-1], lengths) + np.arange(bounds[-1])


def number_within(groups: np.ndarray) -> np.ndarray:
    """Returns the number of each entry within its group, from 0.

    Args:
      groups: the group of each entry; entries of one group are consecutive.

    >>> number_within(np.array([4, 4, 4, 9, 9])).tolist()
    [0, 1, 2, 0, 1]
    """
    index = np.arange(len(groups))
    is_first = np.ones(len(groups), bool)
    is_first[1:] = groups[1:] != groups[:-1]
    return index - np.maximum.accumulate(np.where(is_first, index, 0))


def bounds_inside(bounds: np.ndarray, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bounds that divide spans.

    Args:
      bounds: in ascending order; several may be equal.
      spans: rows (start, end) [n, 2].

    Returns:
      The bounds inside the spans, each once, without the starts and ends of the spans; and their number in each span.

    >>> inside, counts = bounds_inside(np.array([0, 2, 5, 5, 7]), np.array([[0, 5], [5, 6], [4, 5], [3, 9]]))
    >>> inside.tolist(), counts.tolist()
    ([2, 5, 7], [1, 0, 0, 2])
    """
    first, last = np.searchsorted(bounds, spans[:, 0], side="right"), np.searchsorted(bounds, spans[:, 1], side="left")
    counts = np.maximum(last - first, 0)
    span, inside = np.repeat(np.arange(len(spans)), counts), bounds[ranges(first, counts)]
    is_new = np.ones(len(inside), bool)
    is_new[1:] = (inside[1:] != inside[:-1]) | (span[1:] != span[:-1])
    return inside[is_new], np.bincount(span[is_new], minlength=len(spans))
