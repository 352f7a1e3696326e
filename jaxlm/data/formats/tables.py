"""Tables of text: csv, tsv and quoted_tsv (RFC 4180), and what their writers do otherwise.

The fields of a csv file are divided by commas, or by semicolons, tabs or bars where the first rows say so; quotes
inside a quoted field are doubled, or stand behind a backslash where the first rows say so; blanks behind a divider are
no part of a field where the header has them too.  A first line `sep=;`, which spreadsheets write, names the divider.
What was found is printed.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from jaxlm.config import DataConfig
from jaxlm.data.formats.lines import BLANKS, Place, Row, head_of, lines, note
from jaxlm.errors import UserError

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_ESCAPED: dict[str, Any] = {"escapechar": "\\", "doublequote": False}
_SAMPLE = 50  # rows from which the shape of a file is found
_QUOTED = re.compile(r'"(?:[^"]|"")*"')  # a field as csv quotes it
_SEPARATOR = re.compile(r'"?sep=([^\s"\w]|\t)"?\s*', re.IGNORECASE)
_LARGEST_FIELD = 1 << 30  # characters; the module's own limit of 128 KiB is shorter than a document


def rows(
    file: Path, stream: IO[bytes], data: DataConfig, kind: str, needed: tuple[str, ...] = ()
) -> Iterator[tuple[Place, Row]]:
    """Yields each row of a csv, tsv or quoted_tsv file with the place of its first line.

    needed: columns that a task reads, by which a header is known whose rows do not agree with it.
    """
    # `strict` finds a quote that never closes.
    csv.field_size_limit(_LARGEST_FIELD)
    first, source = head_of(lines(file, stream, data))
    if kind == "tsv" and data.format == "suffix" and _are_quoted(first):
        note(f"{file}: fields stand in quotes, as in csv (--data.format tsv takes quotes for text)")
        kind = "quoted_tsv"
    named = _SEPARATOR.fullmatch(first[0]) if first and kind == "csv" else None
    skipped = 1 if named else 0
    if named:
        first = first[1:]
        next(source)
    marks = dialect_of(file, first, len(data.columns), kind, needed, named[1] if named else "")
    reader = csv.reader(source, strict=True, **marks)
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
                    f"{'data.columns' if data.columns else 'the header'} {len(names)} ({', '.join(names)}); "
                    f"correct the row, quote what holds a separator, or set --data.format"
                    f"{' quoted_tsv, if fields stand in quotes,' if kind == 'tsv' else ''} or --data.columns"
                )
            yield place, dict(zip(names, fields, strict=False))
    except csv.Error as error:
        place = Place(str(file), line)
        raise UserError(f"{place}: {error}; correct the quotes of this row, or set --data.format") from None


def dialect_of(
    file: Path, first: list[str], columns: int, kind: str, needed: tuple[str, ...] = (), divider: str = ""
) -> dict[str, Any]:
    """Returns how a file that begins with these lines is divided, as arguments of `csv.reader`.

    Args:
      file: its name, for the line that is printed where a csv file is another than RFC 4180 says.
      first: its first lines.
      columns: how many columns `data.columns` names; 0: the first row names them.
      kind: csv, tsv or quoted_tsv.
      needed: columns that a task reads; () for unknown.
      divider: what the file itself says that its fields are divided by; "" where it does not.
    """
    if kind == "tsv":
        return {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    found = None
    shapes: tuple[dict[str, Any], ...] = ({}, _ESCAPED) if any('\\"' in line for line in first) else ({},)
    delimiters = divider or ("\t" if kind == "quoted_tsv" else "".join(_DELIMITERS))
    blanks = {delimiter: _blanks(first, delimiter) for delimiter in delimiters}
    for delimiter in delimiters:
        standard = {"delimiter": delimiter, **blanks[delimiter]}
        escaped = standard | shapes[-1]
        order = (escaped, standard) if _is_escaped(first, standard) else (standard, escaped)
        found = found or next((marks for marks in order if _fits(first, columns, marks)), None)
    if found is None:  # one column, or rows that do not agree
        of_header = (one for one in delimiters if first and not columns and _is_header(first[0], one, needed))
        delimiter = next(of_header, delimiters[0])
        standard = {"delimiter": delimiter, **blanks[delimiter]}
        escaped = standard | shapes[-1]
        found = escaped if _sample(first, standard) is None and _sample(first, escaped) is not None else standard
    if found["delimiter"] not in (",", "\t"[: kind == "quoted_tsv"]):
        name = _DELIMITERS.get(found["delimiter"], repr(found["delimiter"]))
        note(f"{file}: the columns are divided by {name}")
    if "escapechar" in found:
        note(f"{file}: quotes inside a field stand behind backslashes")
    return found


def _are_quoted(first: list[str]) -> bool:
    """Whether all fields of tsv lines with a quote are quoted as in csv, and some have doubled quotes inside."""
    fields = [field for line in first if '"' in line for field in line.rstrip("\r\n").split("\t") if '"' in field]
    return any('""' in field[1:-1] for field in fields) and all(map(_QUOTED.fullmatch, fields))


def _is_escaped(first: list[str], marks: dict[str, Any]) -> bool:
    """Whether fields have quotes behind backslashes that no writer has doubled, read as RFC 4180 has it."""
    held = sum(field.count('\\"') for fields in _sample(first, marks) or () for field in fields)
    return held > sum(line.count('\\""') for line in first)


def _blanks(first: list[str], delimiter: str) -> dict[str, Any]:
    """The argument of `csv.reader` that drops blanks behind a delimiter, where every name of the header has one."""
    _, *names = first[0].split(delimiter) if first else [""]
    return {"skipinitialspace": True} if names and all(name.startswith(" ") for name in names) else {}


def _is_header(line: str, delimiter: str, needed: tuple[str, ...]) -> bool:
    """Whether a line divided so has the names of all columns that a task reads."""
    names = {name.strip(BLANKS + '"') for name in line.split(delimiter)}
    return bool(needed) and set(needed) <= names


def _sample(first: list[str], marks: dict[str, Any]) -> list[list[str]] | None:
    """The first rows, without blank lines; None where they cannot be read so."""
    found: list[list[str]] = []
    reader = csv.reader(first, strict=True, **marks)
    try:
        for fields in reader:
            found += [fields] if fields else []
            if len(found) == _SAMPLE:
                break
    except csv.Error as error:
        if "unexpected end" not in str(error):  # of the sample, not of the file
            return None
    return found


def _fits(first: list[str], columns: int, marks: dict[str, Any]) -> bool:
    """Whether the first rows have several columns, and all as many as the header, or as `data.columns` names."""
    found = _sample(first, marks)
    if not found or len(found[0]) < 2:
        return False
    counts = set(map(len, found))
    return min(counts) >= columns if columns else len(counts) == 1


def _header(place: Place, fields: list[str]) -> list[str]:
    names = [name.strip(BLANKS) for name in fields]
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise UserError(
            f"{place}: the header has the column {twice[0]!r} twice; rename one of them, or, if the first line is no "
            f"header, name the columns with --data.columns"
        )
    return names
