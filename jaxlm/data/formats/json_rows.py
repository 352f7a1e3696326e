"""JSON: an object on each line, or one value that is a table: a list of objects, or an object that holds one.

A file is read line by line while each line is an object.  Where its first line is none, the file is one JSON value, or
several, over any number of lines, and is read whole.
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
from jaxlm.data.formats.lines import BLANKS, Place, Row, lines, note, suffix_of, whole
from jaxlm.errors import UserError

_CONVERSATIONS = ("messages", "conversations", "conversation", "dialog", "turns", "chosen")  # lists inside of a row
_SQUAD = re.compile(r'"data"\s*:\s*\[\s*\{.*?"paragraphs"\s*:\s*\[', re.DOTALL)
_SQUAD_HEAD = 4096  # characters in which `_SQUAD` looks for how such a file begins
_SPACE = re.compile(r"[\s,]*")
_decoder = json.JSONDecoder()


def loads(text: str, place: Place) -> Any:
    """Returns the JSON value that a line holds.

    Raises:
      UserError: with the place, for what is no JSON, a number of thousands of digits, or thousands of nested lists.
    """
    value, end = _value(text, len(text) - len(text.lstrip()), place)
    if text[end:].strip(BLANKS):
        raise UserError(f"{place}: not a JSON object (Extra data, column {end + 1}); {_EACH}")
    return value


_EACH = "each line must hold one, as `jq -c` writes them"


def _value(text: str, at: int, place: Place) -> tuple[Any, int]:
    """The JSON value that begins at a character, and where it ends."""
    try:
        return _decoder.raw_decode(text, at)
    except json.JSONDecodeError as error:
        line = place.line + text.count("\n", at, min(error.pos, len(text.rstrip())))
        place = place._replace(line=line)
        raise UserError(f"{place}: not a JSON object ({error.msg}, column {error.colno}); {_EACH}") from None
    except RecursionError:
        raise UserError(f"{place}: the JSON nests too many lists or objects in each other; correct the row") from None
    except ValueError:  # int() refuses what takes quadratic time
        raise UserError(f"{place}: the JSON has a number of more than 4,300 digits; write it as a text") from None


def rows(file: Path, stream: IO[bytes], data: DataConfig, needed: tuple[str, ...]) -> Iterator[tuple[Place, Row]]:
    """Yields each row with the place where it begins.

    Args:
      file: the file's name.
      stream: its bytes.
      data: how it is read.
      needed: columns that a task reads, by which an object with lists in it is known to be a row; () for unknown.
    """
    source = enumerate(lines(file, stream, data), start=1)
    number, first = next(((n, line) for n, line in source if line.strip(BLANKS)), (0, ""))
    if not number:
        return
    place = Place(str(file), number)
    begins = first.lstrip(BLANKS)[0]
    if begins not in "[{":
        raise UserError(f"{place}: not a JSON object ({_kind(loads(first, place))}); {_EACH}")
    if begins == "[" or not _is_whole(first):
        text = first + "".join(line for _, line in source)
        if _SQUAD.search(text[:_SQUAD_HEAD]):
            yield from _questions(file, text, data, number)
        else:
            yield from _whole_rows(file, text, number, data, needed)
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
                raise UserError(f"{place}: not a JSON object ({_kind(row)}); {_EACH}")
            yield place, row


def squad_rows(file: Path, stream: IO[bytes], data: DataConfig) -> Iterator[tuple[Place, Row]]:
    """Yields each question of a SQuAD file with its number."""
    yield from _questions(file, whole(file, stream, data), data, 1)


def _questions(file: Path, text: str, data: DataConfig, first: int) -> Iterator[tuple[Place, Row]]:
    """The questions of a SQuAD file, which is read whole: the largest one has 42 MB."""
    if data.format not in ("suffix", "squad"):
        place = Place(str(file), first)
        raise UserError(f"{place}: not a row but a whole file of questions; set --data.format squad")
    try:
        value = _decoder.decode(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{Place(str(file), error.lineno + first - 1)}: the JSON breaks at column {error.colno}, character "
            f"{error.pos:,} of {len(text):,} ({error.msg}); copy the file again, whole, or set --data.format to what "
            f"it is"
        ) from None
    except (ValueError, RecursionError):
        value = loads(text, Place(str(file), first))
    yield from squad.rows_of(file, value)


def _is_whole(line: str) -> bool:
    """Whether a line is one JSON value, well or badly written: not the beginning of one that continues below."""
    try:
        _decoder.raw_decode(line.lstrip(BLANKS))
    except json.JSONDecodeError as error:
        return bool(line[error.pos + len(line) - len(line.lstrip(BLANKS)) :].strip(BLANKS))
    except (ValueError, RecursionError):
        pass
    return True


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def _whole_rows(
    file: Path, text: str, first: int, data: DataConfig, needed: tuple[str, ...]
) -> Iterator[tuple[Place, Row]]:
    """The rows of a file that is one JSON value or several; `first` is the line that the text begins with."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    at, counted, line, number = _skipped(text, 0), 0, first, 0
    inside = text[at] == "["  # a list is read item by item, for the lines of its items
    at = _skipped(text, at + 1) if inside else at
    while at < len(text) and not (inside and text[at] == "]"):
        line += text.count("\n", counted, at)
        place, counted = Place(str(file), line), at
        value, at = _value(text, at, place)
        at, number = _skipped(text, at), number + 1
        if not inside and number == 1 and at == len(text) and data.format == "suffix":
            yield from _table(file, place, value, data, needed)
            return
        if isinstance(value, str) and inside:
            value = {data.text: value}
        if not isinstance(value, dict):
            raise UserError(f"{place}: not a JSON object ({_kind(value)}); {_EACH}")
        yield place, value
    if inside and at >= len(text):
        raise UserError(f"{Place(str(file), line)}: the list that begins in line {first} does not end; copy it again")
    if inside and text[at + 1 :].strip():
        raise UserError(f"{Place(str(file), line)}: there is more text behind the list; correct the file")


def _skipped(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _table(
    file: Path, place: Place, value: Any, data: DataConfig, needed: tuple[str, ...]
) -> Iterator[tuple[Place, Row]]:
    """The rows of a file that is one object: the object, or what is in it."""
    if squad.is_squad(value):
        yield from squad.rows_of(file, value)
        return
    if not isinstance(value, dict):
        raise UserError(f"{place}: not a JSON object ({_kind(value)}); {_EACH}")
    is_row = any(name.partition(".")[0] in value for name in needed) and not _is_columns(value, needed)
    if is_row or suffix_of(file) != ".json" or any(name in value for name in _CONVERSATIONS):
        yield place, value
        return
    found = _in_object(file, value, data, needed)
    names = class_names.of_object(value) if found else {}
    for number, row in enumerate([value] if found is None else found, start=1):
        place = place if found is None else Place(str(file), number)
        yield place, class_names.named(row, names, place)


def _in_object(file: Path, value: dict[str, Any], data: DataConfig, needed: tuple[str, ...]) -> Iterable[Row] | None:
    """The rows that an object holds: a list, a table by columns or by rows; None where it is a row itself."""
    columns, cells = value.get("columns", ()), value.get("data", ())
    if _is_list_of(columns, str) and _is_list_of(cells, list):  # DataFrame.to_json(orient="split")
        note(f"{file}: the rows are the list 'data', their columns the list 'columns'")
        return (dict(zip(columns, row)) for row in cells)
    tables = {name: member for name, member in value.items() if _is_list_of(member, dict)}
    if len(tables) > 1 and data.split in tables:  # {"train": [...], "test": [...]}
        tables = {data.split: tables[data.split]}
    if len(tables) > 1:
        have = {name: table for name, table in tables.items() if _has(table[0], needed)}
        tables = have if len(have) == 1 else tables
    if len(tables) == 1:
        [(name, found)] = tables.items()
        note(f"{file}: the rows are the list {name!r}")
        return found
    if len(tables) > 1:
        raise UserError(
            f"{file} holds several lists of rows, {', '.join(tables)}; choose one with --data.split, or write one alone"
        )
    members = list(value.values())
    if all(isinstance(member, dict) for member in members) and members and _has(members[0], needed):
        note(f"{file}: the rows are the members of one object")
        return members
    if _is_columns(value, needed):
        note(f"{file}: the table is written column by column")
        return _transposed(value)
    return None


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kind) for item in value)


def _has(row: Row, needed: tuple[str, ...]) -> bool:
    """Whether a row has the columns that a task reads, where they are known."""
    return bool(needed) and all(name in row or name.partition(".")[0] in row for name in needed)


def _is_columns(value: Any, needed: tuple[str, ...]) -> bool:
    """Whether an object is a table by columns: `DataFrame.to_json` or, of lists, `Dataset.to_dict`."""
    columns = list(value.values())
    if not columns:
        return False
    if all(isinstance(column, dict) for column in columns):
        names = list(columns[0])
        numbered = names == [str(n) for n in range(len(names))]
        return bool(names) and (numbered or len(columns) > 1) and all(list(column) == names for column in columns)
    if not all(isinstance(column, list) for column in columns) or len({len(column) for column in columns}) > 1:
        return False
    # One row with two lists, of tokens and of tags, looks like two columns.
    named = all(name in value for name in ("tokens", "tags")) or "options" in value
    return not (named and all(isinstance(item, (str, int)) for column in columns for item in column))


def _transposed(columns: dict[str, Any]) -> Iterator[Row]:
    lists = {name: list(column.values()) if isinstance(column, dict) else column for name, column in columns.items()}
    return (dict(zip(lists, cells)) for cells in zip(*lists.values()))
