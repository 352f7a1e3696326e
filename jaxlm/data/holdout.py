"""Splits documents into training and held-out data, by a sample of content hashes or by position."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

PIECE = 1 << 16  # characters of a document that are sampled together
Texts = Callable[[], Iterator[str]]  # each call reads the documents from the first one


class Holdout(NamedTuple):
    """A rule that splits documents into training and held-out data.

    Attributes:
      hashes: hashes of the held-out documents. None: everything after the first `cut` bytes is held out.
      cut: number of bytes of training data.
      divide: whether the document that crosses the cut is divided there. Otherwise it is training data.
      seed: seed of the hashes.
    """

    hashes: frozenset[int] | None
    cut: int
    divide: bool
    seed: int

    def train(self, texts: Iterable[str]) -> Iterator[str]:
        """Yields the documents to train on, in order."""
        if self.hashes is not None:
            yield from (text for text in texts if content_hash(text, self.seed) not in self.hashes)
            return
        for text, start, end in _spans(texts):
            if end <= self.cut or (start < self.cut and not self.divide):
                yield text
            elif start < self.cut:
                yield _divide(text, self.cut - start)[0]

    def held_out(self, texts: Iterable[str]) -> Iterator[str]:
        """Yields the held-out documents, in order."""
        if self.hashes is not None:
            yield from (text for text in texts if content_hash(text, self.seed) in self.hashes)
            return
        for text, start, end in _spans(texts):
            if start >= self.cut:
                yield text
            elif end > self.cut and self.divide:
                yield _divide(text, self.cut - start)[1]


def content_hash(content: str | bytes, seed: int) -> int:
    """Returns a hash of 63 bits that depends only on the document and the seed."""
    content = content.encode() if isinstance(content, str) else content
    digest = hashlib.blake2b(content, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") >> 1


def choose(texts: Iterable[str], fraction: float, seed: int, *, sampled: bool, divide: bool) -> Holdout:
    """Returns a rule that holds out about `fraction` of the bytes of the documents.

    Documents are chosen in the order of their hashes, so equal documents are in the same part. A document is skipped if
    it would make the held-out part more than twice as large as requested. If every document is skipped, the end of the
    text is held out or, if documents must not be divided, the smallest document.

    Args:
      texts: the documents.
      fraction: fraction of the bytes to hold out, above 0 and below 1.
      seed: seed of the hashes.
      sampled: whether to sample documents. Otherwise the last ones are held out, which suits a text in sequence.
      divide: whether a document may be divided when the last ones are held out.
    """
    hashes, sizes = [], []
    for text in texts:
        hashes.append(content_hash(text, seed))
        sizes.append(len(text.encode()))
    total = sum(sizes)
    last = Holdout(None, round(total * (1 - fraction)), divide, seed)
    if not sampled:
        return last
    chosen = choose_hashes(hashes, sizes, fraction)
    if not chosen and not divide and len(set(hashes)) > 1:
        chosen = {smallest(hashes, sizes)}  # too few documents to come near `fraction`
    return Holdout(frozenset(chosen), 0, False, seed) if chosen else last


def choose_hashes(hashes: Sequence[int], sizes: Sequence[int], fraction: float) -> set[int]:
    """Returns the hashes of documents with about `fraction` of the total size, in the order of their hashes.

    Args:
      hashes: the hash of each document.
      sizes: its size.
      fraction: the fraction to choose; a document is skipped if the result would be more than twice as large.
    """
    ordered, sizes_of = _by_hash(hashes, sizes)
    total = sum(sizes)
    chosen: set[int] = set()
    held_out = 0.0
    for content, size in zip(ordered.tolist(), sizes_of.tolist()):
        if held_out >= fraction * total or len(chosen) == len(ordered) - 1:
            break
        if held_out + size <= 2 * fraction * total:
            chosen.add(content)
            held_out += size
    return chosen


def smallest(hashes: Sequence[int], sizes: Sequence[int]) -> int:
    """Returns the hash whose documents are the smallest together."""
    ordered, sizes_of = _by_hash(hashes, sizes)
    return int(ordered[sizes_of.argmin()])


def _by_hash(hashes: Sequence[int], sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the different hashes in ascending order, and the total size of the documents of each."""
    ordered, index = np.unique(np.array(hashes, np.int64), return_inverse=True)
    weights = np.array(sizes, np.float64)
    return ordered, np.bincount(index, weights, len(ordered)) if len(sizes) else np.zeros(0)


def sample(texts: Texts, characters: int, seed: int = 0) -> Iterator[str]:
    """Yields all documents if they have at most `characters` characters in total, otherwise a sample of pieces.

    Pieces are chosen by their hashes, so they come from all parts of the text. They are yielded in order.
    """
    total = sum(len(text) for text in texts())
    if total <= characters:
        yield from texts()
        return
    size = max(1, min(PIECE, characters // 16))
    limit = round(characters / total * 2**63)
    for text in texts():
        for start in range(0, len(text), size):
            piece = text[start : start + size]
            if content_hash(piece, seed) < limit and characters > 0:
                yield piece[:characters]
                characters -= len(piece)


def _spans(texts: Iterable[str]) -> Iterator[tuple[str, int, int]]:
    end = 0
    for text in texts:
        start, end = end, end + len(text.encode())
        yield text, start, end


def _divide(text: str, cut: int) -> tuple[str, str]:
    """Divides a text at byte `cut` or, if that is inside a character, before the character."""
    head = text.encode()[:cut].decode(errors="ignore")
    return head, text[len(head) :]
