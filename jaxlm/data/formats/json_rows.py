"""Reads JSON: one object per line, or one value that is a table: a list of objects or an object that contains one.

A file is read line by line if its first line is an object. Otherwise it contains one or more JSON values, which may
span several lines, and the whole file is read at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from jaxlm.config import DataConfig
from jaxlm.data.formats import class_names, squad
from jaxlm.data.formats.lines import BLANKS, Place, Row, note, read_lines, read_text, suffix_of
from jaxlm.data.formats.literals import skip_space
from jaxlm.errors import UserError

_CONVERSATIONS = ("messages", "conversations", "conversation", "dialog", "turns", "chosen")  # lists within a row
_SQUAD = re.compile(r'"data"\s*:\s*\[\s*\{.*?"paragraphs"\s*:\s*\[', re.DOTALL)
_SQUAD_HEAD = 4096  # characters at the beginning of a file in which `_SQUAD` is searched
_PER_LINE = "each line must contain one, as written by `jq -c`"
_decoder = json.JSONDecoder()


def loads(text: str, place: Place) -> Any:
    """Returns the JSON value in a line.

    Raises:
      UserError: with the place, for invalid JSON, a number with thousands of digits, or thousands of nested lists.
    """
    value, end = _value(text, len(text) - len(text.lstrip()), place)
    if text[end:].strip(BLANKS):
        raise UserError(f"{place}: not a JSON object (Extra data, column {end + 1}); {_PER_LINE}")
    return value


def _value(text: str, at: int, place: Place) -> tuple[Any, int]:
    """Returns the JSON value that begins at a position, and the position of its end."""
    try:
        return _decoder.raw_decode(text, at)
    except json.JSONDecodeError as error:
        line = place.line + text.count("\n", at, min(error.pos, len(text.rstrip())))
        place = place._replace(line=line)
        raise UserError(f"{place}: not a JSON object ({error.msg}, column {error.colno}); {_PER_LINE}") from None
    except RecursionError:
        raise UserError(f"{place}: the JSON has too many nested lists or objects; correct the row") from None
    except ValueError:  # int() limits the number of digits
        raise UserError(f"{place}: the JSON has a number of more than 4,300 digits; write it as a string") from None


def rows(file: Path, stream: IO[bytes], data: DataConfig, needed: tuple[str, ...]) -> Iterator[tuple[Place, Row]]:
    """Yields each row with the place where it begins.

    Args:
      file: the name of the file.
      stream: the contents of the file.
      data: options for reading it.
      needed: columns that the task reads, () if unknown; they show whether an object that contains lists is a row.

    Raises:
      UserError: with the place, for a value that is not an object or cannot be parsed.
    """
    source = enumerate(read_lines(file, stream, data), start=1)
    number, first = next(((n, line) for n, line in source if line.strip(BLANKS)), (0, ""))
    if not number:
        return
    place = Place(str(file), number)
    begins = first.lstrip(BLANKS)[0]
    if begins not in "[{":
        raise UserError(f"{place}: not a JSON object ({_kind(loads(first, place))}); {_PER_LINE}")
    if begins == "[" or not _is_complete(first):
        text = first + "".join(line for _, line in source)
        if _SQUAD.search(text[:_SQUAD_HEAD]):
            yield from _questions(file, text, data, number)
        else:
            yield from _value_rows(file, text, number, data, needed)
        return
    second = next(((n, line) for n, line in source if line.strip(BLANKS)), None)
    row = loads(first, place)
    if second is None and data.format == "suffix":
        yield from _table(file, place, row, data, needed)
        return
    yield place, row
    for number, line in chain([second] if second else (), source):
        if line.strip(BLANKS):
            place = Place(str(file), number)
            row = loads(line, place)
            if not isinstance(row, dict):
                raise UserError(f"{place}: not a JSON object ({_kind(row)}); {_PER_LINE}")
            yield place, row


def squad_rows(file: Path, stream: IO[bytes], data: DataConfig) -> Iterator[tuple[Place, Row]]:
    """Yields each question of a SQuAD file with its number as the place."""
    yield from _questions(file, read_text(file, stream, data), data, 1)


def _questions(file: Path, text: str, data: DataConfig, first: int) -> Iterator[tuple[Place, Row]]:
    """Yields the questions of a SQuAD file. The largest one has 42 MB, so the whole text is parsed at once."""
    if data.format not in ("suffix", "squad"):
        place = Place(str(file), first)
        raise UserError(f"{place}: the file is a list of articles with questions; set --data.format squad")
    try:
        value = _decoder.decode(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{Place(str(file), error.lineno + first - 1)}: invalid JSON at column {error.colno}, character "
            f"{error.pos:,} of {len(text):,} ({error.msg}); copy the complete file again, or set --data.format to its "
            f"format"
        ) from None
    except (ValueError, RecursionError):
        value = loads(text, Place(str(file), first))
    yield from squad.rows(file, value)


def _is_complete(line: str) -> bool:
    """Returns whether a line is one JSON value, valid or not, rather than the first line of a longer one."""
    try:
        _decoder.raw_decode(line.lstrip(BLANKS))
    except json.JSONDecodeError as error:
        return bool(line[error.pos + len(line) - len(line.lstrip(BLANKS)) :].strip(BLANKS))
    except (ValueError, RecursionError):
        pass
    return True


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def _value_rows(
    file: Path, text: str, first: int, data: DataConfig, needed: tuple[str, ...]
) -> Iterator[tuple[Place, Row]]:
    """Yields the rows of a file with one or more JSON values; `first` is the number of the line with the first one."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    at, counted, line, number = skip_space(text, 0), 0, first, 0
    is_list = text[at] == "["  # the items are parsed one by one, to find their lines
    at = skip_space(text, at + 1) if is_list else at
    while at < len(text) and not (is_list and text[at] == "]"):
        line += text.count("\n", counted, at)
        place, counted = Place(str(file), line), at
        value, at = _value(text, at, place)
        at, number = skip_space(text, at), number + 1
        if not is_list and number == 1 and at == len(text) and data.format == "suffix":
            yield from _table(file, place, value, data, needed)
            return
        if isinstance(value, str) and is_list:
            value = {data.text: value}
        if not isinstance(value, dict):
            raise UserError(f"{place}: not a JSON object ({_kind(value)}); {_PER_LINE}")
        yield place, value
    if is_list and at >= len(text):
        raise UserError(f"{Place(str(file), line)}: the list that begins in line {first} does not end; copy it again")
    if is_list and text[at + 1 :].strip():
        raise UserError(f"{Place(str(file), line)}: there is more text after the list; correct the file")


def _table(
    file: Path, place: Place, value: Any, data: DataConfig, needed: tuple[str, ...]
) -> Iterator[tuple[Place, Row]]:
    """Yields the rows of a file that is one object: the object itself, or the rows that it contains."""
    if squad.is_squad(value):
        yield from squad.rows(file, value)
        return
    if not isinstance(value, dict):
        raise UserError(f"{place}: not a JSON object ({_kind(value)}); {_PER_LINE}")
    is_row = any(name.partition(".")[0] in value for name in needed) and not _is_columns(value, needed)
    if is_row or suffix_of(file) != ".json" or any(name in value for name in _CONVERSATIONS):
        yield place, value
        return
    found = _in_object(file, value, data, needed)
    names = class_names.of_object(value) if found else {}
    for number, row in enumerate([value] if found is None else found, start=1):
        place = place if found is None else Place(str(file), number)
        yield place, class_names.substitute(row, names, place)


def _in_object(file: Path, value: dict[str, Any], data: DataConfig, needed: tuple[str, ...]) -> Iterable[Row] | None:
    """Returns the rows in an object that is a table, by rows or by columns; None if the object itself is a row."""
    columns, cells = value.get("columns", ()), value.get("data", ())
    if _is_list_of(columns, str) and _is_list_of(cells, list):  # DataFrame.to_json(orient="split")
        note(f"{file}: the rows are the list 'data', and their columns are the list 'columns'")
        return (dict(zip(columns, row)) for row in cells)
    tables = {name: member for name, member in value.items() if _is_list_of(member, dict)}
    if len(tables) > 1 and data.split in tables:  # {"train": [...], "test": [...]}
        tables = {data.split: tables[data.split]}
    if len(tables) > 1:
        matching = {name: table for name, table in tables.items() if _has(table[0], needed)}
        tables = matching if len(matching) == 1 else tables
    if len(tables) == 1:
        [(name, found)] = tables.items()
        note(f"{file}: the rows are the list {name!r}")
        return found
    if len(tables) > 1:
        raise UserError(
            f"{file} contains several lists of rows, {', '.join(tables)}; choose one with --data.split, or write each "
            f"to its own file"
        )
    members = list(value.values())
    if all(isinstance(member, dict) for member in members) and members and _has(members[0], needed):
        note(f"{file}: the rows are the members of one object")
        return members
    if _is_columns(value, needed):
        note(f"{file}: the table is stored by columns")
        return _transpose(value)
    return None


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kind) for item in value)


def _has(row: Row, needed: tuple[str, ...]) -> bool:
    """Returns whether the columns that the task reads are known and the row has them."""
    return bool(needed) and all(name in row or name.partition(".")[0] in row for name in needed)


def _is_columns(value: Any, needed: tuple[str, ...]) -> bool:
    """Returns whether an object is a table by columns, as in `DataFrame.to_json` or (lists) `Dataset.to_dict`."""
    columns = list(value.values())
    if not columns:
        return False
    if all(isinstance(column, dict) for column in columns):
        names = list(columns[0])
        numbered = names == [str(n) for n in range(len(names))]
        return bool(names) and (numbered or len(columns) > 1) and all(list(column) == names for column in columns)
    if not all(isinstance(column, list) for column in columns) or len({len(column) for column in columns}) > 1:
        return False
    # A single row with a list of tokens and a list of tags looks like two columns.
    is_row = all(name in value for name in ("tokens", "tags")) or "options" in value
    return not (is_row and all(isinstance(item, (str, int)) for column in columns for item in column))


def _transpose(columns: dict[str, Any]) -> Iterator[Row]:
    lists = {name: list(column.values()) if isinstance(column, dict) else column for name, column in columns.items()}
    return (dict(zip(lists, cells)) for cells in zip(*lists.values()))
