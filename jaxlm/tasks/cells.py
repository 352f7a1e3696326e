"""Values of the columns of a row, and the records that tasks make of rows."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxlm.config import DataConfig
from jaxlm.config.ranges import short_repr
from jaxlm.data import source
from jaxlm.data.formats import literals
from jaxlm.data.formats.lines import Place, Row
from jaxlm.errors import UserError

Record = dict[str, Any]  # what a task's `read` returns for a row


class Records(NamedTuple):
    """The records of one part of the data, and the place of each in its file."""

    records: list[Record]
    places: list[Place]

    @property
    def summary(self) -> str:
        """The number of examples, for a message."""
        return f"{len(self.records):,} examples"


def column(row: Row, name: str, place: Place, option: str) -> Any:
    """Returns the value of a column, or of an entry of one, such as `translation.de`.

    Args:
      row: the row.
      name: the name of the column.
      place: the place of the row, for the error.
      option: the command-line option that names the column, for the error.

    Raises:
      UserError: if the column does not exist; the message lists the columns of the row.
    """
    values = row if name in row else entries(row)
    if name not in values:
        raise UserError(
            f"{place}: there is no column {name!r}; the columns are {', '.join(map(repr, values))}; choose with "
            f"{option}{source.column_hint(place, DataConfig())}"
        )
    return values[name]


def listed(value: Any, name: str, place: Place, brackets: str = "[({") -> Any:
    """Returns the list or object that the text in a cell contains, as pandas writes it, or any other value unchanged.

    Args:
      value: the value of the cell.
      name: the column.
      place: the place of the row.
      brackets: the brackets that a list or object may start with.

    Raises:
      UserError: for a text that starts like a list and is not one.
    """
    if not isinstance(value, str):
        return value
    if value.startswith('"[') and literals.looks_listed(value.strip('"').replace('""', '"'), "["):
        raise UserError(
            f"{place}: column {name!r} holds {short_repr(value)}, a list in quotes; read the file with "
            f"--data.format quoted_tsv"
        )
    if not literals.looks_listed(value, brackets):
        return value
    try:
        return literals.parse(value)
    except literals.NotALiteralError as error:
        raise UserError(
            f"{place}: column {name!r} holds {short_repr(value)}, a list that cannot be read: {error}; correct the row"
        ) from None


def cell(row: Row, name: str) -> Any:
    """Returns the value of a column, or of an entry of one, such as `translation.de`; None if it does not exist."""
    return row[name] if name in row else entries(row).get(name)


def entries(row: Row) -> Row:
    """Returns the row with nested mappings flattened, so that `translation` becomes `translation.de` and so on."""
    flat: Row = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in entries(value).items()}
        else:
            flat[name] = value
    return flat


def text_of(row: Row, name: str, place: Place, option: str = "--task.text") -> str:
    """Returns the text in a column, "" if it is empty; the arguments and errors are those of `column`.

    Raises UserError also for a value that is not text.
    """
    value = column(row, name, place, option)
    if value is not None and not isinstance(value, str):
        raise UserError(
            f"{place}: column {name!r} holds {type(value).__name__} {short_repr(value)}, not text; choose with {option}"
        )
    return value or ""
