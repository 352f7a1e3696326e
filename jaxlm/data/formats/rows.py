"""The formats of files, each read as a stream of rows with their places.

    csv      .csv                      divided by commas, or as `tables` finds; with a header, or `data.columns`
    tsv      .tsv .tab                 divided by tabs; quotes mean nothing, as in GLUE's files
    quoted_tsv  (data.format)          divided by tabs, quoted like csv
    jsonl    .jsonl .ndjson .json      one JSON object on each line, or one list of objects
    parquet  .parquet .pq              read in batches
    conll    .conll .conllu .iob .bio  a token and its columns on each line, blank lines between sentences
    squad    (data.format)             JSON of SQuAD 1.1 and 2.0, a row for each question; the file is read whole
    text     .txt, other               plain text, divided by `data.documents`, its lines by `data.pattern`

Suffixes count in small and capital letters, and below .gz, .bz2, .xz and .zst.  A file whose suffix is text's, or none,
is read in another format if its beginning has that format and a task needs columns that plain text does not have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from jaxlm.config import DataConfig
from jaxlm.data.formats import class_names, columnar, conll, json_rows, tables
from jaxlm.data.formats.lines import (
    BLANKS,
    Place,
    Row,
    encoding_of,
    lines,
    note,
    opened,
    shown,
    suffix_of,
    whole,
    without_end,
)
from jaxlm.errors import UserError

_HEAD = 1 << 16  # bytes from which the format of a file without a suffix is found
SUFFIXES = {
    ".txt": "text",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".json": "jsonl",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".conll": "conll",
    ".conllu": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".bio": "conll",
}
_WITH_METADATA = ("jsonl", "csv", "tsv", "quoted_tsv")  # formats whose names of classes stand beside the file
METADATA = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
)  # of datasets, beside the data


class Columns(NamedTuple):
    """The columns of a row that a task reads: names, or entries of columns such as `translation.de`."""

    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()  # read where they are
    class_names: bool = True  # whether integers become the names that the data set's metadata gives them
    alone: bool = True  # whether no other column is of use

    def has(self, name: str) -> bool:
        """Whether a column, or an entry of it, is read."""
        return any(one == name or one.startswith(f"{name}.") for one in (*self.needed, *self.optional))


def format_of(file: Path, data: DataConfig) -> str:
    """Returns the format that a file is read in, as its suffix or `data.format` says."""
    return SUFFIXES.get(suffix_of(file), "text") if data.format == "suffix" else data.format


def file_rows(file: Path, data: DataConfig, columns: Columns | None = None) -> Iterator[tuple[Place, Row]]:
    """Yields every row of a file with its place, its strings not yet checked to be Unicode.

    Args:
      file: where it is.
      data: how it is read.
      columns: those that a task reads; None: all.
    """
    kind = format_of(file, data)
    if kind in ("text", "tsv") and data.format == "suffix":
        kind = _found_format(file, data, columns, kind)
    needed = columns.needed if columns else ()
    with_names = columns is None or columns.class_names
    with opened(file) as stream:
        if kind == "parquet":
            asked = (needed, columns.optional) if columns and columns.alone else ((), ())
            yield from columnar.rows(file, stream, *asked, with_names)
            return
        found = _READERS[kind](file, stream, data, needed)
        names = class_names.beside(file) if with_names and kind in _WITH_METADATA else {}
        yield from ((place, class_names.named(row, names, place)) for place, row in found) if names else found


def text_lines(file: Path, data: DataConfig) -> Iterator[tuple[Place, str]]:
    """Yields every line of a plain text file with its place, blank ones too, without its end."""
    with opened(file) as stream:
        for number, line in enumerate(lines(file, stream, data), start=1):
            yield Place(str(file), number), without_end(line)


def _found_format(file: Path, data: DataConfig, columns: Columns | None, suffix: str) -> str:
    """The format of a file whose suffix is that of plain text or tsv; where plain text serves, text."""
    with opened(file) as stream:
        head = stream.read(_HEAD)
        if head.startswith(b"PAR1\x15"):
            return "parquet"
    if columns is None or data.pattern or set(columns.needed) <= {data.text}:
        return suffix
    if suffix == "tsv" and "tokens" not in columns.needed:
        return suffix
    with opened(file) as stream:
        text = head.decode(encoding_of(file, stream, data), "replace").removeprefix("\ufeff")
    first = re.split(r"(?<=\n)|(?<=\r)(?!\n)", text)
    first = first[:-1] if len(first) > 1 and len(head) == _HEAD else first  # the last line may be cut
    kind = suffix
    if suffix == "tsv":  # sentences have blank lines between them, and rows have none
        text = "".join(line for line in first if not line.startswith("#"))  # a comment may be running text
        divided = re.search(r"\S(\r\n|\r|\n)[ \t]*\1\s*\S", text) and not re.search(r"[^\s] [^\s]", text)
        if divided and not _header_delimiter(first[0], columns) and conll.looks_tagged(first, certain=False):
            kind = "conll"
    elif re.match(r'\s*(\{\s*"|\[\s*[{"])', text):
        kind = "jsonl"
    elif "tokens" in columns.needed and conll.looks_tagged(first):
        kind = "conll"
    elif first and (delimiter := _header_delimiter(first[0], columns)):
        kind = "tsv" if delimiter == "\t" else "csv"
    elif conll.looks_tagged(first) or ("tokens" in columns.needed and conll.looks_tagged(first, certain=False)):
        kind = "conll"
    if kind != suffix:
        note(f"{file}: read as {kind}, which its beginning looks like (--data.format says otherwise)")
    return kind


def _header_delimiter(line: str, columns: Columns) -> str:
    """What divides the names of a header, if the columns that are needed are among them."""
    for delimiter in "\t,;|":
        names = {name.strip(BLANKS + '"') for name in line.split(delimiter)}
        if len(names) > 1 and all(one.partition(".")[0] in names or one in names for one in columns.needed):
            return delimiter
    return ""


def _text_rows(file: Path, stream: IO[bytes], data: DataConfig, needed: tuple[str, ...]) -> Iterator[tuple[Place, Row]]:
    if data.pattern and data.documents != "line":
        raise UserError(
            f"data.pattern is of lines, data.documents is {data.documents!r}; leave one of the two out, "
            f"--data.pattern or --data.documents"
        )
    columns = _regex(data.pattern, "pattern")
    if data.pattern and not columns.groupindex:
        raise UserError(
            f"data.pattern {data.pattern!r} has no named group, and those are the columns; "
            f"set --data.pattern to one with groups such as (?P<{data.text}>.*)"
        )
    for number, block in _blocks(file, stream, data):
        place = Place(str(file), number)
        if not data.pattern:
            yield place, {data.text: block}
            continue
        found = columns.fullmatch(block)
        if not found:
            raise UserError(
                f"{place}: the line {shown(block)} does not match data.pattern {data.pattern!r}; "
                f"correct the line or --data.pattern"
            )
        yield place, found.groupdict()


def _regex(pattern: str, option: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"data.{option} {pattern!r} is no regular expression: {error}; set --data.{option}") from None


def _blocks(file: Path, stream: IO[bytes], data: DataConfig) -> Iterator[tuple[int, str]]:
    """(first line, text) of each document of a plain text file."""
    if data.documents == "file":
        yield 1, whole(file, stream, data)
        return
    begins = _regex(data.boundary, "boundary") if data.documents == "boundary" else None
    first, block = 1, ""
    for number, line in enumerate(lines(file, stream, data), start=1):
        blank = not line.strip(BLANKS)
        if data.documents == "line":
            ends = not blank
        elif data.documents == "blank_line":
            ends = blank
        else:
            ends = bool(not blank and begins and begins.match(line.rstrip("\r\n")))
        if data.documents == "line":
            if ends:
                yield number, without_end(line)
            continue
        if ends and block:
            yield first, without_end(block)
            block = ""
        if not blank:
            first = first if block else number
            block += line
    if block:
        yield first, without_end(block)


_Reader = Callable[[Path, IO[bytes], DataConfig, tuple[str, ...]], Iterator[tuple[Place, Row]]]
_READERS: dict[str, _Reader] = {
    "text": _text_rows,
    "csv": lambda file, stream, data, needed: tables.rows(file, stream, data, "csv", needed),
    "tsv": lambda file, stream, data, needed: tables.rows(file, stream, data, "tsv", needed),
    "quoted_tsv": lambda file, stream, data, needed: tables.rows(file, stream, data, "quoted_tsv", needed),
    "jsonl": json_rows.rows,
    "conll": lambda file, stream, data, needed: conll.rows(file, stream, data),
    "squad": lambda file, stream, data, needed: json_rows.squad_rows(file, stream, data),
}
