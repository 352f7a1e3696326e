"""The words of a text, counted and numbered from the most frequent one."""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from jaxlm.config.vectors import VectorsConfig
from jaxlm.data import source
from jaxlm.errors import UserError


class WordCorpus(NamedTuple):
    """A text as the numbers of its words, without the words that are not in the vocabulary."""

    words: tuple[str, ...]  # V
    counts_V: np.ndarray  # int64, in decreasing order
    tokens_N: np.ndarray  # int32
    documents_N: np.ndarray  # int32, the number of the document of each token
    read: int  # number of words of the text, with those that are not in the vocabulary

    @property
    def summary(self) -> str:
        """The numbers of words, for printing."""
        kept = len(self.tokens_N) / self.read
        return f"{self.read:,} words; {len(self.words):,} different ones, {kept:.1%} of the text, have a vector"


def read_corpus(run: VectorsConfig) -> WordCorpus:
    """Reads the words of the data of a run.

    Args:
      run: its data, and which words have a vector.

    Raises:
      UserError: for invalid data, and where fewer than two words are left.
    """
    texts = source.documents(run.data.path, run.data, run.data.split, Counter())
    find: Callable[[str], list[str]] = str.split
    if run.pattern:
        find = lambda text: [match[0] for match in matches(text)]
        matches = re.compile(run.pattern).finditer
    if run.lowercase:
        return number_words((find(text.lower()) for text in texts), run.min_count, run.max_words)
    return number_words(map(find, texts), run.min_count, run.max_words)


def number_words(texts: Iterable[list[str]], min_count: int, max_words: int = 0) -> WordCorpus:
    """Counts the words of texts and numbers the frequent ones.

    Args:
      texts: the words of each text.
      min_count: rarer words are dropped.
      max_words: number of words to keep, the most frequent ones; 0: all.

    Raises:
      UserError: where fewer than two words are left.
    """
    # One pass: words are numbered in the order in which they occur, and renumbered at the end.
    first_ids: defaultdict[str, int] = defaultdict()
    first_ids.default_factory = first_ids.__len__
    tokens, sizes = array("i"), array("q")
    for text in texts:
        before = len(tokens)
        tokens.extend(map(first_ids.__getitem__, filter(None, text)))
        sizes.append(len(tokens) - before)
    all_N = np.frombuffer(tokens, np.int32) if tokens else np.zeros(0, np.int32)
    counts = np.bincount(all_N, minlength=len(first_ids))
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] >= min_count][: max_words or None]
    if len(order) < 2:
        most = int(counts.max(initial=0))
        raise UserError(
            f"{len(order)} of {len(counts):,} words occur {min_count:,} times or more (the most frequent one: "
            f"{most:,}), and training needs two; lower --min-count, or give more text"
        )
    ids = np.full(len(counts), -1, np.int32)
    ids[order] = np.arange(len(order), dtype=np.int32)
    tokens_N = ids[all_N]
    documents_N = np.repeat(np.arange(len(sizes), dtype=np.int32), np.frombuffer(sizes, np.int64))
    names = list(first_ids)
    kept_N = tokens_N >= 0
    return WordCorpus(
        tuple(names[i] for i in order), counts[order], tokens_N[kept_N], documents_N[kept_N], read=len(all_N)
    )
