"""Counts of words that occur near each other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxlm.vectors.words import WordCorpus

CHUNK = 1 << 19  # tokens that are counted at once


class Cooccurrences(NamedTuple):
    """The pairs of words (row, column) with a count above 0; every pair also occurs in the other order."""

    rows_E: np.ndarray  # int32
    columns_E: np.ndarray  # int32
    counts_E: np.ndarray  # float32


def count_pairs(corpus: WordCorpus, window: int) -> Cooccurrences:
    """Counts pairs of words of one document.

    Args:
      corpus: the words.
      window: maximum distance of two words; a pair at distance d counts 1 / d.

    Source: Pennington et al., "GloVe: Global Vectors for Word Representation", 2014, section 4.2.
    """
    from scipy import sparse

    V, tokens_N, documents_N = len(corpus.words), corpus.tokens_N, corpus.documents_N
    total = sparse.csr_matrix((V, V), dtype=np.float64)
    for start in range(0, len(tokens_N), CHUNK):
        pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for distance in range(1, window + 1):
            end = max(start, min(start + CHUNK, len(tokens_N) - distance))
            first, second = slice(start, end), slice(start + distance, end + distance)
            is_pair = documents_N[first] == documents_N[second]
            a, b = tokens_N[first][is_pair], tokens_N[second][is_pair]
            pairs.append((a, b, np.full(len(a), 1 / distance)))
        rows, columns, weights = (np.concatenate(parts) for parts in zip(*pairs))
        total += sparse.csr_matrix((weights, (rows, columns)), shape=(V, V))
    both = (total + total.T).tocoo()
    return Cooccurrences(both.row.astype(np.int32), both.col.astype(np.int32), both.data.astype(np.float32))
