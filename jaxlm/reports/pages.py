"""A page of chapters: text, pictures and tables, for explanations and audits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxlm.reports.charts import png_paths
from jaxlm.reports.figures import Detail, Section, details_of, figure_of
from jaxlm.reports.rendering import render
from jaxlm.reports.tables import ScoredText, Table
from jaxlm.storage import disk


class Chapter(NamedTuple):
    """A chapter of a page.

    Attributes:
      title: the heading.
      text: paragraphs of plain text, such as what a score measures and where it fails.
      sections: pictures and tables, in order.
    """

    title: str
    text: Sequence[str] = ()
    sections: Sequence[Section] = ()


class _ChapterOfPage(NamedTuple):
    title: str
    text: Sequence[str]
    details: list[Detail]


def write_page(
    path: Path, title: str, kicker: str, facts: Mapping[str, str], chapters: Sequence[Chapter], config: str = ""
) -> Path:
    """Writes an HTML page, which contains its pictures, and the pictures as PNGs in a folder next to it.

    Args:
      path: the page. The PNGs are written to the folder of the same name without a suffix.
      title: the heading, such as the name of a model.
      kicker: the line above the heading, such as "jaxlm audit".
      facts: the key facts in order, such as `{"model": "bert-base", "pairs": "1,508"}`.
      chapters: the chapters in order.
      config: text at the end that a reader unfolds, such as the arguments as JSON; empty: none.

    Returns:
      The path of the page.
    """
    sections = [section for chapter in chapters for section in chapter.sections]
    pictures = [section for section in sections if not isinstance(section, (Table, ScoredText))]
    figures = map(figure_of, pictures, png_paths(pictures, path.with_suffix("")))
    page = [_ChapterOfPage(title, text, details_of(sections, figures)) for title, text, sections in chapters]
    disk.write(path, render("chapters.html.j2", title=title, kicker=kicker, facts=facts, chapters=page, config=config))
    return path
