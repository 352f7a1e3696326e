"""Which documents of a text are held out: a sample by a hash of their content, or the last."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

PIECE = 1 << 16  # characters of a document that are sampled together
Texts = Callable[[], Iterator[str]]  # reads the documents from the first one on, each time that it is called


class Holdout(NamedTuple):
    """What divides documents into two parts.

    hashes: of the documents that are held out; None: all behind the first `cut` bytes are.
    divide: whether the document that crosses the cut is divided there; else it belongs to the first part.
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
        """Yields the documents that `train` leaves, in order."""
        if self.hashes is not None:
            yield from (text for text in texts if content_hash(text, self.seed) in self.hashes)
            return
        for text, start, end in _spans(texts):
            if start >= self.cut:
                yield text
            elif end > self.cut and self.divide:
                yield _divide(text, self.cut - start)[1]


def content_hash(text: str, seed: int) -> int:
    """Returns 63 bits that depend on a document and a seed alone, whatever stands around it."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") >> 1


def choose(texts: Iterable[str], fraction: float, seed: int, *, sampled: bool, divide: bool) -> Holdout:
    """Returns how documents are divided so that about `fraction` of their bytes is held out.

    Documents are taken in the order of their hashes, so that equal ones come into the same part.  One that would hold
    out twice as much as asked for is passed over.  Where that
    leaves none, the end of the text is held out or, where documents stay whole, the smallest one.

    Args:
      texts: the documents.
      fraction: share of the bytes, above 0 and below 1.
      seed: of the hashes.
      sampled: whether documents are sampled; else the last ones are held out, as befits a text in order.
      divide: whether a document may be divided, where the last ones are held out.
    """
    hashes, sizes = [], []
    for text in texts:
        hashes.append(content_hash(text, seed))
        sizes.append(len(text.encode()))
    total = sum(sizes)
    last = Holdout(None, round(total * (1 - fraction)), divide, seed)
    if not sampled:
        return last
    ordered, index = np.unique(np.array(hashes, np.int64), return_inverse=True)
    bytes_of = np.bincount(index, np.array(sizes, np.float64), len(ordered)) if sizes else np.zeros(0)
    chosen: list[int] = []
    held = 0.0
    for content, size in zip(ordered.tolist(), bytes_of.tolist()):
        if held >= fraction * total or len(chosen) == len(ordered) - 1:
            break
        if held + size <= 2 * fraction * total:
            chosen.append(content)
            held += size
    if not chosen and not divide and len(ordered) > 1:
        chosen = [int(ordered[bytes_of.argmin()])]  # too few for a share near the one asked for
    return Holdout(frozenset(chosen), 0, False, seed) if chosen else last


def sample(texts: Texts, characters: int, seed: int = 0) -> Iterator[str]:
    """Yields all documents where they have at most so many characters together; else a sample of their pieces.

    Pieces are chosen by their hashes, so that they come from all over the text, and are yielded in order.
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
    """Two parts of a text, divided at byte `cut` or, inside a character, before that character."""
    head = text.encode()[:cut].decode(errors="ignore")
    return head, text[len(head) :]
