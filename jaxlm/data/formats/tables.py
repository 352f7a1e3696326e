"""Reads tables of text: csv, tsv and quoted_tsv (RFC 4180), and common deviations from them.

The dialect of a csv file is detected from its first rows. Fields are separated by commas, semicolons, tabs or bars.
Quotes inside a quoted field are doubled or escaped with a backslash. Spaces after a delimiter are removed if the header
has them too. A first line such as `sep=;`, which spreadsheets write, sets the delimiter. Deviations are printed.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from jaxlm.config import DataConfig
from jaxlm.data.formats.lines import BLANKS, Place, Row, head_of, note, read_lines
from jaxlm.errors import UserError

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_ESCAPED: dict[str, Any] = {"escapechar": "\\", "doublequote": False}
_SAMPLE = 50  # number of rows from which the dialect is detected
_QUOTED = re.compile(r'"(?:[^"]|"")*"')  # a quoted field of csv
_SEPARATOR = re.compile(r'"?sep=([^\s"\w]|\t)"?\s*', re.IGNORECASE)
_MAX_FIELD = 1 << 30  # characters; documents can be longer than the default limit of the module csv, 128 KiB


def rows(
    file: Path, stream: IO[bytes], data: DataConfig, kind: str, needed: tuple[str, ...] = ()
) -> Iterator[tuple[Place, Row]]:
    """Yields each row of a csv, tsv or quoted_tsv file with the place of its first line.

    Args:
      file: the name of the file.
      stream: the contents of the file.
      data: options for reading it.
      kind: csv, tsv or quoted_tsv.
      needed: columns that the task reads; they identify a header if the numbers of fields differ between rows.

    Raises:
      UserError: with the place, for a row with another number of fields than the header, or with broken quotes.
    """
    csv.field_size_limit(_MAX_FIELD)
    first, source = head_of(read_lines(file, stream, data))
    if kind == "tsv" and data.format == "suffix" and _are_quoted(first):
        note(f"{file}: fields are quoted as in csv (to read quotes as text, set --data.format tsv)")
        kind = "quoted_tsv"
    separator = _SEPARATOR.fullmatch(first[0]) if first and kind == "csv" else None
    skipped = 1 if separator else 0
    if separator:
        first = first[1:]
        next(source)
    dialect = dialect_of(file, first, len(data.columns), kind, needed, separator[1] if separator else "")
    reader = csv.reader(source, strict=True, **dialect)  # `strict` detects a quote that is never closed
    names: Sequence[str] = data.columns
    line = 1 + skipped
    try:
        for fields in reader:
            place, line = Place(str(file), line), reader.line_num + 1 + skipped
            if not fields or fields == [""]:  # a blank line
                continue
            if not names:
                names = _header(place, fields)
                continue
            if len(fields) < len(names) or (len(fields) > len(names) and not data.columns):
                raise UserError(
                    f"{place}: the row has {len(fields)} fields, "
                    f"{'data.columns' if data.columns else 'the header'} has {len(names)} ({', '.join(names)}); "
                    f"correct the row, quote fields that contain a separator, or set --data.format"
                    f"{' quoted_tsv, if fields are quoted,' if kind == 'tsv' else ''} or --data.columns"
                )
            yield place, dict(zip(names, fields, strict=False))
    except csv.Error as error:
        place = Place(str(file), line)
        raise UserError(f"{place}: {error}; correct the quotes of this row, or set --data.format") from None


def dialect_of(
    file: Path, first: list[str], columns: int, kind: str, needed: tuple[str, ...] = (), delimiter: str = ""
) -> dict[str, Any]:
    """Returns the dialect of a file as arguments of `csv.reader`.

    Args:
      file: the name of the file; printed if a csv file deviates from RFC 4180.
      first: the first lines of the file.
      columns: number of columns in `data.columns`; 0: the first row contains their names.
      kind: csv, tsv or quoted_tsv.
      needed: columns that the task reads; () if unknown.
      delimiter: the delimiter that the file declares; "" if it declares none.
    """
    if kind == "tsv":
        return {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    found = None
    escaping: dict[str, Any] = _ESCAPED if any('\\"' in line for line in first) else {}
    delimiters = delimiter or ("\t" if kind == "quoted_tsv" else "".join(_DELIMITERS))
    for delimiter in delimiters:
        standard = {"delimiter": delimiter, **_leading_spaces(first, delimiter)}
        escaped = standard | escaping
        order = (escaped, standard) if _is_escaped(first, standard) else (standard, escaped)
        found = next((dialect for dialect in order if _fits(first, columns, dialect)), None)
        if found:
            break
    if found is None:  # one column, or different numbers of fields
        of_header = (one for one in delimiters if first and not columns and _is_header(first[0], one, needed))
        delimiter = next(of_header, delimiters[0])
        standard = {"delimiter": delimiter, **_leading_spaces(first, delimiter)}
        escaped = standard | escaping
        found = escaped if _sample(first, standard) is None and _sample(first, escaped) is not None else standard
    if found["delimiter"] not in (",", "\t"[: kind == "quoted_tsv"]):
        name = _DELIMITERS.get(found["delimiter"], repr(found["delimiter"]))
        note(f"{file}: the columns are separated by {name}")
    if "escapechar" in found:
        note(f"{file}: quotes inside a field are escaped with backslashes")
    return found


def _are_quoted(first: list[str]) -> bool:
    """Returns whether all tsv fields that contain a quote are quoted as in csv, and some have doubled quotes inside."""
    fields = [field for line in first if '"' in line for field in line.rstrip("\r\n").split("\t") if '"' in field]
    return any('""' in field[1:-1] for field in fields) and all(map(_QUOTED.fullmatch, fields))


def _is_escaped(first: list[str], dialect: dict[str, Any]) -> bool:
    """Returns whether fields read as in RFC 4180 contain quotes after backslashes that are not doubled."""
    escaped = sum(field.count('\\"') for fields in _sample(first, dialect) or () for field in fields)
    return escaped > sum(line.count('\\""') for line in first)


def _leading_spaces(first: list[str], delimiter: str) -> dict[str, Any]:
    """Returns arguments of `csv.reader` that drop spaces after a delimiter if all names in the header have them."""
    _, *names = first[0].split(delimiter) if first else [""]
    return {"skipinitialspace": True} if names and all(name.startswith(" ") for name in names) else {}


def _is_header(line: str, delimiter: str, needed: tuple[str, ...]) -> bool:
    """Returns whether a line with this delimiter contains the names of all columns that the task reads."""
    names = {name.strip(BLANKS + '"') for name in line.split(delimiter)}
    return bool(needed) and set(needed) <= names


def _sample(first: list[str], dialect: dict[str, Any]) -> list[list[str]] | None:
    """Returns the first rows, without blank lines; None if they cannot be read in this dialect."""
    found: list[list[str]] = []
    reader = csv.reader(first, strict=True, **dialect)
    try:
        for fields in reader:
            found += [fields] if fields else []
            if len(found) == _SAMPLE:
                break
    except csv.Error as error:
        if "unexpected end" not in str(error):  # the sample may end inside a row
            return None
    return found


def _fits(first: list[str], columns: int, dialect: dict[str, Any]) -> bool:
    """Returns whether the first rows have several columns, and as many as the header or `data.columns`."""
    found = _sample(first, dialect)
    if not found or len(found[0]) < 2:
        return False
    counts = set(map(len, found))
    return min(counts) >= columns if columns else len(counts) == 1


def _header(place: Place, fields: list[str]) -> list[str]:
    names = [name.strip(BLANKS) for name in fields]
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise UserError(
            f"{place}: the header has the column {twice[0]!r} twice; rename one of them or, if the first line is not a "
            f"header, name the columns with --data.columns"
        )
    return names
