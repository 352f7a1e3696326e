"""What tasks read of a row: the values of its columns; and the records that they make of rows."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxlm.config import DataConfig
from jaxlm.config.ranges import shown
from jaxlm.data import source
from jaxlm.data.formats import literals
from jaxlm.data.formats.lines import Place, Row
from jaxlm.errors import UserError

Record = dict[str, Any]  # what a task's `read` made of a row


class Records(NamedTuple):
    """The records of one part of the data, and where each stands."""

    records: list[Record]
    places: list[Place]

    @property
    def said(self) -> str:
        """How much there is."""
        return f"{len(self.records):,} examples"


def column(row: Row, name: str, place: Place, option: str) -> Any:
    """The value that `cell` finds.  Raises UserError, with the columns that there are, where there is none."""
    known = row if name in row else entries(row)
    if name not in known:
        raise UserError(
            f"{place}: there is no column {name!r}; the columns are {', '.join(map(repr, known))}; choose with "
            f"{option}{source.other_columns(place, DataConfig())}"
        )
    return known[name]


def listed(value: Any, name: str, place: Place, brackets: str = "[({") -> Any:
    """Returns the list or object that a text of a table holds, as pandas writes it; any other value as it is.

    Args:
      value: what a cell holds.
      name: the column.
      place: where the row stands.
      brackets: those that a list or object may begin with.

    Raises:
      UserError: for a text that begins as a list and is none.
    """
    if not isinstance(value, str):
        return value
    if value.startswith('"[') and literals.looks_listed(value.strip('"').replace('""', '"'), "["):
        raise UserError(
            f"{place}: column {name!r} holds {shown(value)}, a list in quotes; read the file with "
            f"--data.format quoted_tsv"
        )
    if not literals.looks_listed(value, brackets):
        return value
    try:
        return literals.parse(value)
    except literals.NotALiteralError as error:
        raise UserError(
            f"{place}: column {name!r} holds {shown(value)}, a list that cannot be read: {error}; correct the row"
        ) from None


def cell(row: Row, name: str) -> Any:
    """The value of a column, or of an entry of one, such as `translation.de`; None where there is none."""
    return row[name] if name in row else entries(row).get(name)


def entries(row: Row) -> Row:
    """The row with a column `translation.de` for each entry of a column that holds several under names."""
    held: Row = {}
    for name, value in row.items():
        inner = entries(value) if isinstance(value, dict) else None
        held |= {name: value} if inner is None else {f"{name}.{key}": one for key, one in inner.items()}
    return held


def text_of(row: Row, name: str, place: Place, option: str = "--task.text") -> str:
    """The text in a column; "" for none."""
    value = column(row, name, place, option)
    if value is not None and not isinstance(value, str):
        raise UserError(
            f"{place}: column {name!r} holds {type(value).__name__} {shown(value)}, not text; choose with {option}"
        )
    return value or ""
