"""Tables of text, masked text and text with scores, for the page of a run and for notebooks."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any, NamedTuple

from jaxlm.reports.pictures import Bundle
from jaxlm.reports.rendering import render

MAX_MISTAKES = 20  # rows of a table of mistakes
MAX_CELL_CHARACTERS = 600  # characters of a cell
MAX_OPACITY = 0.6  # of the colour of the token with the largest score, so that its text stays legible

# The page has space for about 120 characters. The space between two columns takes 4.
_PAGE, _GAP, _SHORT_COLUMN, _LONG_COLUMN = 120, 4, 20, 100
_NUMBER = re.compile(r"[-−+]?\d[\d,.]*( ?%)?|–")


class Column(NamedTuple):
    """A column of a `Table` as it is set on the page."""

    name: str
    width: float  # in characters
    is_number: bool


class Table(NamedTuple):
    """Rows of plain text, such as the most confident mistakes. Long texts wrap."""

    title: str
    head: tuple[str, ...]
    rows: list[list[str]]
    note: str  # a sentence about the rows

    @property
    def columns(self) -> list[Column]:
        """The columns: short ones keep their width, long ones share the rest of the page.

        Raises:
          ValueError: if a row does not have one cell for each column.
        """
        wrong = next((row for row in self.rows if len(row) != len(self.head)), None)
        if wrong is not None:
            raise ValueError(
                f"a row of {self.title!r} has {len(wrong)} cells; give {len(self.head)}, one for each column"
            )
        columns = list(zip(*self.rows))
        longest = [max(map(len, column)) for column in columns]
        widths = [
            max(12, len(name) + _GAP, min(_LONG_COLUMN, length + _GAP)) for name, length in zip(self.head, longest)
        ]
        long = sum(width for width in widths if width > _SHORT_COLUMN)
        available = max(_PAGE - sum(widths) + long, 40)
        fitted = [width * min(1.0, available / long) if width > _SHORT_COLUMN else width for width in widths]
        are_numbers = [all(map(_NUMBER.fullmatch, column)) for column in columns]
        return list(map(Column, self.head, fitted, are_numbers))

    def _repr_mimebundle_(self, **_: Any) -> Bundle:
        return {"text/html": render("notebook.html.j2", table=self)}, {}

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in (self.head, *self.rows))
        printer.text("\n".join(line.rstrip() for line in (self.title, *lines, self.note)))


class MaskedText(NamedTuple):
    """A text before and after masking, token by token, and which tokens are to be predicted."""

    title: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    predicted: tuple[bool, ...]
    mask: str  # the mask token

    @property
    def fates(self) -> list[str]:
        """For each token `masked`, `random` or `kept`, or an empty string if it is not to be predicted."""
        fate = lambda old, new: "masked" if new == self.mask else "kept" if new == old else "random"
        return [fate(old, new) if p else "" for old, new, p in zip(self.before, self.after, self.predicted)]

    @property
    def tokens(self) -> list[tuple[str, str, str]]:
        """(before, after, fate) of each token."""
        return list(zip(self.before, self.after, self.fates))

    @property
    def counts(self) -> Counter[str]:
        """Number of tokens with each fate."""
        return Counter(self.fates)

    def _repr_mimebundle_(self, **_: Any) -> Bundle:
        return {"text/html": render("notebook.html.j2", text=self)}, {}

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        tokens = (f"{new} ({old}, {fate})" if fate else new for old, new, fate in self.tokens)
        printer.text(f"{self.title}: {' '.join(tokens)}")


class ScoredText(NamedTuple):
    """The tokens of a text, each coloured by its score: blue raises a number, orange lowers it."""

    title: str
    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    note: str = ""  # a sentence about the scores

    @property
    def chips(self) -> list[tuple[str, str, str, str]]:
        """(token, score, colour class, opacity) of each token; the opacity is relative to the largest score."""
        if len(self.tokens) != len(self.scores):
            raise ValueError(
                f"{self.title!r} has {len(self.tokens)} tokens and {len(self.scores)} scores; give one for each token"
            )
        largest = max(map(abs, self.scores), default=0.0) or 1.0
        share = lambda score: abs(score) / largest if math.isfinite(score) else 0.0
        color = lambda score: "raises" if score > 0 else "lowers" if score < 0 else "neutral"
        return [
            (token.strip() or "\u2423", f"{score:+.4g}", color(score), f"{MAX_OPACITY * share(score):.2f}")
            for token, score in zip(self.tokens, self.scores)
        ]

    def _repr_mimebundle_(self, **_: Any) -> Bundle:
        return {"text/html": render("notebook.html.j2", scored=self)}, {}

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        printer.text(f"{self.title}: {' '.join(f'{token} ({score})' for token, score, _, _ in self.chips)}")


def mistakes(
    head: tuple[str, ...], wrong: list[tuple[float, list[str]]], count: int, what: str, max_rows: int = MAX_MISTAKES
) -> Table:
    """Returns the table of the most confident mistakes.

    Args:
      head: names of the columns except the last one, which is the confidence.
      wrong: (confidence, cells) of each mistake.
      count: number of all predictions.
      what: how the note ends, after "3 of 20": "examples are predicted wrong".
      max_rows: number of rows at most.
    """
    ordered = sorted(wrong, key=lambda row: -row[0])[:max_rows]
    cut = lambda text: text if len(text) <= MAX_CELL_CHARACTERS else f"{text[:MAX_CELL_CHARACTERS]} ..."
    rows = [[*map(cut, cells), f"{confidence:.1%}"] for confidence, cells in ordered]
    return Table("The most confident mistakes", (*head, "confidence"), rows, f"{len(wrong):,} of {count:,} {what}.")
