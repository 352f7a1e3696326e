"""Words and their vectors; neighbours and analogies."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from jaxlm.config.ranges import short_repr
from jaxlm.errors import UserError

MAX_SUGGESTIONS = 20_000  # words that an unknown word is compared with


@dataclass(frozen=True, eq=False)
class WordVectors:
    """Words and their vectors.

    Raises:
      UserError: for words that are repeated or not strings, and for vectors of another shape or that are not finite.
    """

    words: Sequence[str]
    vectors: np.ndarray  # [V, D] float32
    _ids: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        words, vectors = tuple(self.words), np.asarray(self.vectors, np.float32)
        if vectors.ndim != 2 or len(words) != len(vectors) or not vectors.size:
            raise UserError(
                f"there are {len(words):,} words, and vectors of the shape {vectors.shape}; give one vector per word, "
                f"as an array [words, width] of at least one word"
            )
        ids: dict[str, int] = {}
        for i, word in enumerate(words):
            if not isinstance(word, str):
                raise UserError(f"word {i} is {short_repr(word)}; it must be a string")
            if ids.setdefault(word, i) != i:
                raise UserError(f"the word {word!r} has two vectors, {ids[word]} and {i}; remove one of them")
        if not (finite_V := np.isfinite(vectors).all(1)).all():
            word = words[int(finite_V.argmin())]
            raise UserError(f"the vector of {word!r} is not finite; remove the word")
        for name, value in {"words": words, "vectors": vectors, "_ids": ids}.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self._ids

    def __getitem__(self, word: str) -> np.ndarray:
        return self.vectors[self.index(word)]

    @property
    def width(self) -> int:
        """Number of entries of a vector D."""
        return self.vectors.shape[1]

    def index(self, word: str) -> int:
        """Returns the number of a word.

        Args:
          word: the word.

        Raises:
          UserError: if it has no vector.
        """
        if not isinstance(word, str) or word not in self._ids:
            frequent = self.words[:MAX_SUGGESTIONS]
            near = difflib.get_close_matches(word, frequent, n=1) if isinstance(word, str) else []
            remedy = f"perhaps you meant {near[0]!r}" if near else "use one of `words`"
            raise UserError(f"{short_repr(word)} is not one of the {len(self):,} words with a vector; {remedy}")
        return self._ids[word]

    @cached_property
    def _units(self) -> np.ndarray:
        """The vectors divided by their norms [V, D]; a vector of zeros is unchanged."""
        norms = np.linalg.norm(self.vectors, axis=1, keepdims=True)
        return self.vectors / np.where(norms > 0, norms, 1)

    def similarity(self, first: str, second: str) -> float:
        """Returns the cosine of the vectors of two words.

        Args:
          first: a word.
          second: another word.

        Raises:
          UserError: if one of them has no vector.
        """
        return float(self._units[self.index(first)] @ self._units[self.index(second)])

    def most_similar(self, word: str, count: int = 10) -> list[tuple[str, float]]:
        """Returns the words whose vectors have the largest cosine with that of a word.

        Args:
          word: the word, which is not in the result.
          count: maximum number of words.

        Returns:
          Words and cosines, the largest first.

        Raises:
          UserError: if the word has no vector, or count is below 1.
        """
        i = self.index(word)
        return self._nearest(self._units[i], [i], count)

    def analogy(self, first: str, second: str, third: str, count: int = 10) -> list[tuple[str, float]]:
        """Returns the words that are to `third` as `second` is to `first`.

        Args:
          first: such as "man".
          second: such as "king".
          third: such as "woman".
          count: maximum number of words.

        Returns:
          Words and the cosine of their vector and second - first + third, of vectors of norm 1; the largest first.
          The three words are not in the result.

        Raises:
          UserError: if a word has no vector, or count is below 1.

        Source: Mikolov, Yih & Zweig, "Linguistic Regularities in Continuous Space Word Representations", 2013.
        """
        a, b, c = (self.index(word) for word in (first, second, third))
        target_D = self._units[b] - self._units[a] + self._units[c]
        return self._nearest(target_D / max(float(np.linalg.norm(target_D)), 1e-30), [a, b, c], count)

    def _nearest(self, unit_D: np.ndarray, without: list[int], count: int) -> list[tuple[str, float]]:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UserError(f"count is {short_repr(count)}; it must be an integer, at least 1")
        cosines_V = self._units @ unit_D
        cosines_V[without] = -np.inf
        count = min(count, len(cosines_V) - len(set(without)))
        top = np.argpartition(-cosines_V, count - 1)[:count] if count else np.zeros(0, int)
        return [(self.words[i], float(cosines_V[i])) for i in top[np.argsort(-cosines_V[top], kind="stable")]]
