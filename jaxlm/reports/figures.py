"""What the pages show in addition to text: pictures as figures, and tables."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from jaxlm.reports.pictures import Chart, Heatmap, Picture, draw
from jaxlm.reports.tables import ScoredText, Table

Section = Picture | Table | ScoredText

_MAX_NAMES = 12  # a heatmap with more classes scrolls on a narrow page
_MAX_PIXELS = 1400  # a wider figure has a row of the page to itself, and scrolls on a narrow page


class Figure(NamedTuple):
    """A picture on the page. Without a source there was nothing to draw."""

    title: str
    source: str = ""  # a data URL
    width: int = 0  # pixels
    height: int = 0
    alt: str = ""
    caption: str = ""
    is_wide: bool = False
    fills_row: bool = False


class Detail(NamedTuple):
    """A part of the section "Details": a table, a text with scores, or figures that share a grid."""

    table: Table | None = None
    figures: Sequence[Figure] = ()
    scored: ScoredText | None = None


def figure_of(picture: Picture, path: Path) -> Figure:
    """Draws a picture at `path` and returns it as a figure of the page."""
    caption = draw(picture, path)
    if caption is None:
        return Figure(picture.title)
    png = path.read_bytes()
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))  # fixed positions in every PNG
    alt = f"{picture.title} by step, up to step {picture.last:,.0f}" if isinstance(picture, Chart) else picture.title
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    fills_row = width > _MAX_PIXELS
    is_wide = fills_row or (isinstance(picture, Heatmap) and len(picture.names) > _MAX_NAMES)
    return Figure(picture.title, source, width, height, alt, caption, is_wide, fills_row)


def details_of(sections: Sequence[Section], figures: Iterator[Figure]) -> list[Detail]:
    """Returns the tables and texts, and the figures of all other sections: those between two of them share a grid."""
    details: list[Detail] = []
    for is_text, group in groupby(sections, lambda section: isinstance(section, (Table, ScoredText))):
        if is_text:
            details += [_text_detail(one) for one in group]
        else:
            details.append(Detail(figures=[next(figures) for _ in group]))
    return details


def _text_detail(section: Section) -> Detail:
    if isinstance(section, Table):
        return Detail(section)
    assert isinstance(section, ScoredText)
    return Detail(scored=section)
