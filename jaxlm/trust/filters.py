"""Filters of texts: each returns whether a text is allowed, with a score and a reason.

A filter is any function from texts to verdicts, so that a list of filters may also contain your own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jaxlm
from jaxlm.config import Classification
from jaxlm.config.safety import SafetyConfig
from jaxlm.data import personal_data
from jaxlm.errors import UserError, suggestion
from jaxlm.lm import LM
from jaxlm.run.evaluate import predict
from jaxlm.run.trained_model import task_for
from jaxlm.trust.word_lists import compile_patterns, find_word, normalize, read_lines, word_pattern


class Verdict(NamedTuple):
    """The result of a filter for a text.

    Attributes:
      allowed: whether the text may be returned.
      filter: the name of the filter.
      reason: why it is rejected, without its words; empty if it is allowed.
      score: how harmful the text is, from 0 to 1; 1 or 0 for a filter without probabilities.
    """

    allowed: bool
    filter: str
    reason: str = ""
    score: float = 0.0


Filter = Callable[[Sequence[str]], list[Verdict]]


@dataclass(frozen=True)
class WordFilter:
    """Rejects texts with a word or phrase of a list, whatever its case, accents and invisible characters."""

    words: tuple[str, ...]

    def __call__(self, texts: Sequence[str]) -> list[Verdict]:
        """Returns the verdict for each text."""
        pattern = word_pattern(self.words)
        found = [find_word(pattern, text) for text in texts]
        return [
            Verdict(word is None, "words", "" if word is None else "a listed word", float(word is not None))
            for word in found
        ]


@dataclass(frozen=True)
class PatternFilter:
    """Rejects texts that match a regular expression of a list.

    Attributes:
      patterns: (number of the line, compiled expression).
    """

    patterns: tuple[tuple[int, Any], ...]

    def __call__(self, texts: Sequence[str]) -> list[Verdict]:
        """Returns the verdict for each text."""

        def verdict(text: str) -> Verdict:
            line = next((number for number, pattern in self.patterns if pattern.search(text)), None)
            if line is None:
                return Verdict(True, "patterns")
            return Verdict(False, "patterns", f"the pattern in line {line}", 1.0)

        return [verdict(text) for text in texts]


@dataclass(frozen=True)
class PersonalDataFilter:
    """Rejects texts with personal data; see `jaxlm.data.personal_data`."""

    kinds: tuple[str, ...] = tuple(personal_data.KINDS)

    def __call__(self, texts: Sequence[str]) -> list[Verdict]:
        """Returns the verdict for each text."""
        found = [sorted({finding.kind for finding in personal_data.find(text, self.kinds)}) for text in texts]
        return [
            Verdict(
                not kinds, "personal_data", f"personal data: {', '.join(kinds)}" if kinds else "", float(bool(kinds))
            )
            for kinds in found
        ]


@dataclass(frozen=True)
class CopyFilter:
    """Rejects texts that repeat a part of a secret text, such as a system prompt.

    Attributes:
      secret: the text.
      size: number of consecutive words, compared without case and punctuation, that may not be repeated.
    """

    secret: str
    size: int = 6

    def __call__(self, texts: Sequence[str]) -> list[Verdict]:
        """Returns the verdict for each text."""
        secret = self._parts(self.secret)
        shared = [bool(secret & self._parts(text)) for text in texts]
        reason = f"{self.size} consecutive words of the system prompt"
        return [Verdict(not copied, "copy", reason if copied else "", float(copied)) for copied in shared]

    def _parts(self, text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", normalize(text))
        size = min(self.size, len(re.findall(r"\w+", normalize(self.secret))))
        return {tuple(words[n : n + size]) for n in range(len(words) - size + 1)} if size else set()


@dataclass(frozen=True)
class ClassifierFilter:
    """Rejects texts for which a classifier predicts harmful labels.

    A text that is longer than the rows of the classifier is read in windows; the most harmful one counts.

    Attributes:
      lm: the classifier.
      labels: its harmful labels.
      threshold: largest allowed sum of their probabilities.
    """

    lm: LM
    labels: tuple[str, ...]
    threshold: float = 0.5

    def __post_init__(self) -> None:
        """Raises UserError for a model that is no classifier of single texts, and for labels that it does not have."""
        task = task_for(self.lm) if self.lm.config.heads_on_top == ("classes",) and self.lm.tokenizer else None
        if not isinstance(task, Classification) or task.problem == "regression" or len(task.text) != 1:
            heads = ", ".join(self.lm.config.heads_on_top) or "none"
            raise UserError(
                f"the filter is a model with the heads {heads}; give a classifier of single texts, such as a run of "
                f"configs/davidson.py"
            )
        for label in self.labels:
            if label not in self.lm.config.labels:
                raise UserError(
                    f"the filter has no label {label!r}{suggestion(label, self.lm.config.labels)}; its labels are "
                    f"{', '.join(self.lm.config.labels)}"
                )
        if not self.labels or not 0 <= self.threshold <= 1:
            raise UserError(
                f"the filter has the labels {self.labels} and the threshold {self.threshold}; give at least one label, "
                f"and a threshold from 0 to 1"
            )

    def __call__(self, texts: Sequence[str]) -> list[Verdict]:
        """Returns the verdict for each text."""
        if not texts:
            return []
        task = task_for(self.lm)
        windows = [self._windows(text) for text in texts]
        rows = iter(
            predict(
                self.lm, [{task.text[0]: part} for parts in windows for part in parts], task=task, probabilities=True
            )
        )
        harm = lambda row: min(1.0, sum(row["probabilities"][label] for label in self.labels))
        harms = [max(harm(next(rows)) for _ in parts) for parts in windows]
        reason = f"{' or '.join(self.labels)} above {self.threshold:g}"
        return [
            Verdict(harm <= self.threshold, "classifier", "" if harm <= self.threshold else reason, harm)
            for harm in harms
        ]

    def _windows(self, text: str) -> list[str]:
        """Returns the text, or windows of it that fit the rows of the classifier and overlap by a half.

        Each window has its own probabilities: harmless windows could hide a harmful one if their logits were pooled.
        """
        lm, tokenizer = self.lm, self.lm.tokenizer
        assert tokenizer is not None  # `__post_init__` has checked it
        length = lm.trained.length if lm.trained else min(512, lm.config.position_limit or 512)
        size = max(2, tokenizer.max_text_tokens(length, False))
        ids = tokenizer.encode(text)
        if len(ids) <= size:
            return [text]
        return [tokenizer.decode(ids[start : start + size]) for start in range(0, len(ids) - size // 2, size // 2)]


def filters_of(safety: SafetyConfig, system: str = "") -> list[Filter]:
    """Returns the filters of a config, with files and the classifier loaded.

    Args:
      safety: the config.
      system: a system prompt that may not be repeated; empty: none.

    Raises:
      UserError: for files or models that cannot be read, invalid patterns, and labels that the classifier lacks.
    """
    safety.check()
    filters: list[Filter] = []
    if safety.words:
        filters.append(WordFilter(tuple(word for _, word in read_lines(safety.words, "word or phrase"))))
    if safety.patterns:
        lines = read_lines(safety.patterns, "regular expression")
        compiled = compile_patterns(lines, safety.patterns)
        filters.append(PatternFilter(tuple(zip((number for number, _ in lines), compiled))))
    if safety.personal_data == "refuse":
        filters.append(PersonalDataFilter())
    if system:
        filters.append(CopyFilter(system))
    if safety.classifier:
        filters.append(ClassifierFilter(jaxlm.load(safety.classifier), safety.labels, safety.threshold))
    return filters


def judge(texts: Sequence[str], filters: Sequence[Filter]) -> list[list[Verdict]]:
    """Returns the verdicts of all filters for each text."""
    by_filter = [check(texts) for check in filters]
    return [list(verdicts) for verdicts in zip(*by_filter)] if by_filter else [[] for _ in texts]
