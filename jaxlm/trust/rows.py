"""Rows of the files that audits read, with checks of their columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxlm.config import DataConfig
from jaxlm.data import source
from jaxlm.data.formats.lines import Place, Row
from jaxlm.errors import UserError, suggestion


def read_rows(file: str, columns: Sequence[str], flag: str, sample: int = 0, seed: int = 0) -> list[tuple[Place, Row]]:
    """Returns the rows of a file, each with its place.

    Args:
      file: a .csv, .tsv, .jsonl or .parquet file, which may be compressed.
      columns: the columns that each row must have.
      flag: the flag that names the file, for messages.
      sample: number of rows to draw without replacement, in the order of the file; 0: all.
      seed: of the draw.

    Raises:
      UserError: for a missing or empty file, and for a missing column.
    """
    rows = list(source.rows(file, DataConfig(), "train"))
    if not rows:
        raise UserError(f"{file} has no rows; {flag} requires a file with at least one")
    for place, row in rows:
        missing = [name for name in columns if row.get(name) is None]
        if missing:
            names = [str(name) for name in row if name]
            raise UserError(
                f"{place}: there is no value in column {missing[0]!r}{suggestion(missing[0], names)}; {flag} requires "
                f"the columns {', '.join(columns)}"
            )
    if 0 < sample < len(rows):
        chosen = np.sort(np.random.default_rng(seed).choice(len(rows), sample, replace=False))
        rows = [rows[n] for n in chosen]
    return rows


def read_text(row: Row, place: Place, column: str) -> str:
    """Returns the text of a column. Raises UserError if it is empty or not a text."""
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: column {column!r} holds {value!r:.40}, which is not a text; fix the row")
    return value
