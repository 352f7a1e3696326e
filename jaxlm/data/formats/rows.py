"""The file formats; each is read as a stream of rows with their places.

    csv      .csv                      separated by commas, or as detected by `tables`; with a header or `data.columns`
    tsv      .tsv .tab                 separated by tabs; quotes have no meaning, as in the files of GLUE
    quoted_tsv  (data.format)          separated by tabs, quoted like csv
    jsonl    .jsonl .ndjson .json      one JSON object per line, or one list of objects
    parquet  .parquet .pq              read in batches
    conll    .conll .conllu .iob .bio  a token and its columns on each line, blank lines between sentences
    squad    (data.format)             JSON of SQuAD 1.1 and 2.0, one row per question; the whole file is read at once
    tokens   (data.format)             token ids, which have no rows: see `tokens`
    text     .txt, other               plain text, split by `data.documents`, its lines parsed by `data.pattern`

Suffixes are not case-sensitive and may be followed by .gz, .bz2, .xz or .zst. A file with the suffix of plain text or
an unknown one is read in another format if its beginning has this format and the task requires columns that plain text
does not have.
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
    note,
    open_file,
    quote,
    read_lines,
    read_text,
    strip_line_end,
    suffix_of,
)
from jaxlm.errors import UserError

_HEAD = 1 << 16  # bytes at the beginning of a file that are used to detect its format
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
_WITH_METADATA = ("jsonl", "csv", "tsv", "quoted_tsv")  # formats with class names in a metadata file
METADATA = (  # files that the library datasets writes next to the data
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
)


class Columns(NamedTuple):
    """The columns that a task reads: names, or entries of columns such as `translation.de`.

    Attributes:
      needed: the required columns.
      optional: columns that are read if they exist.
      class_names: whether integers are replaced by the class names in the metadata of the data set.
      alone: whether all other columns can be skipped.
    """

    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    class_names: bool = True
    alone: bool = True

    def has(self, name: str) -> bool:
        """Returns whether a column, or an entry of it, is read."""
        return any(one == name or one.startswith(f"{name}.") for one in (*self.needed, *self.optional))


def format_of(file: Path, data: DataConfig) -> str:
    """Returns the format of a file, from its suffix or `data.format`."""
    return SUFFIXES.get(suffix_of(file), "text") if data.format == "suffix" else data.format


def file_rows(file: Path, data: DataConfig, columns: Columns | None = None) -> Iterator[tuple[Place, Row]]:
    """Yields every row of a file with its place. The strings are not checked for valid Unicode.

    Args:
      file: the path of the file.
      data: options for reading it.
      columns: the columns that a task reads. None: all.

    Raises:
      UserError: the file cannot be read.
    """
    kind = format_of(file, data)
    if kind in ("text", "tsv") and data.format == "suffix":
        kind = _detect_format(file, data, columns, kind)
    needed = columns.needed if columns else ()
    with_names = columns is None or columns.class_names
    with open_file(file) as stream:
        if kind == "parquet":
            selected = (needed, columns.optional) if columns and columns.alone else ((), ())
            yield from columnar.rows(file, stream, *selected, with_names)
            return
        found = _READERS[kind](file, stream, data, needed)
        names = class_names.of_file(file) if with_names and kind in _WITH_METADATA else {}
        yield from ((place, class_names.substitute(row, names, place)) for place, row in found) if names else found


def text_lines(file: Path, data: DataConfig) -> Iterator[tuple[Place, str]]:
    """Yields every line of a plain text file, including blank ones, with its place and without its line end."""
    with open_file(file) as stream:
        for number, line in enumerate(read_lines(file, stream, data), start=1):
            yield Place(str(file), number), strip_line_end(line)


def _detect_format(file: Path, data: DataConfig, columns: Columns | None, suffix: str) -> str:
    """Returns the format of a file with the suffix of plain text or tsv; text if the task can use plain text."""
    with open_file(file) as stream:
        head = stream.read(_HEAD)
        if head.startswith(b"PAR1\x15"):
            return "parquet"
    if columns is None or data.pattern or set(columns.needed) <= {data.text}:
        return suffix
    if suffix == "tsv" and "tokens" not in columns.needed:
        return suffix
    with open_file(file) as stream:
        text = head.decode(encoding_of(file, stream, data), "replace").removeprefix("\ufeff")
    first = re.split(r"(?<=\n)|(?<=\r)(?!\n)", text)
    first = first[:-1] if len(first) > 1 and len(head) == _HEAD else first  # the last line may be incomplete
    kind = suffix
    if suffix == "tsv":  # blank lines separate sentences, but not rows
        text = "".join(line for line in first if not line.startswith("#"))  # a comment may contain sentences
        has_blocks = re.search(r"\S(\r\n|\r|\n)[ \t]*\1\s*\S", text) and not re.search(r"[^\s] [^\s]", text)
        if has_blocks and not _header_delimiter(first[0], columns) and conll.looks_tagged(first, certain=False):
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
        note(f"{file}: read as {kind}, as detected from its beginning (change it with --data.format)")
    return kind


def _header_delimiter(line: str, columns: Columns) -> str:
    """Returns the delimiter of a header that has all required columns, or ""."""
    for delimiter in "\t,;|":
        names = {name.strip(BLANKS + '"') for name in line.split(delimiter)}
        if len(names) > 1 and all(one.partition(".")[0] in names or one in names for one in columns.needed):
            return delimiter
    return ""


def _text_rows(file: Path, stream: IO[bytes], data: DataConfig, needed: tuple[str, ...]) -> Iterator[tuple[Place, Row]]:
    if data.pattern and data.documents != "line":
        raise UserError(
            f"data.pattern applies to lines, but data.documents is {data.documents!r}; remove either "
            f"--data.pattern or --data.documents"
        )
    columns = _regex(data.pattern, "pattern")
    if data.pattern and not columns.groupindex:
        raise UserError(
            f"data.pattern {data.pattern!r} has no named groups, which define the columns; "
            f"set --data.pattern to a pattern with groups such as (?P<{data.text}>.*)"
        )
    for number, block in _blocks(file, stream, data):
        place = Place(str(file), number)
        if not data.pattern:
            yield place, {data.text: block}
            continue
        found = columns.fullmatch(block)
        if not found:
            raise UserError(
                f"{place}: the line {quote(block)} does not match data.pattern {data.pattern!r}; "
                f"correct the line or --data.pattern"
            )
        yield place, found.groupdict()


def _regex(pattern: str, option: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"data.{option} {pattern!r} is not a regular expression: {error}; set --data.{option}"
        ) from None


def _blocks(file: Path, stream: IO[bytes], data: DataConfig) -> Iterator[tuple[int, str]]:
    """Yields (number of the first line, text) of each document of a plain text file."""
    if data.documents == "file":
        yield 1, read_text(file, stream, data)
        return
    begins = _regex(data.boundary, "boundary") if data.documents == "boundary" else None
    first, block = 1, ""
    for number, line in enumerate(read_lines(file, stream, data), start=1):
        blank = not line.strip(BLANKS)
        if data.documents == "line":
            if not blank:
                yield number, strip_line_end(line)
            continue
        ends = blank if begins is None else not blank and begins.match(line.rstrip("\r\n"))
        if ends and block:
            yield first, strip_line_end(block)
            block = ""
        if not blank:
            first = first if block else number
            block += line
    if block:
        yield first, strip_line_end(block)


_Reader = Callable[[Path, IO[bytes], DataConfig, tuple[str, ...]], Iterator[tuple[Place, Row]]]


def _refuse_tokens(file: Path) -> Iterator[tuple[Place, Row]]:
    raise UserError(
        f"{file} is a file of token ids, because data.format is 'tokens'; this task reads text: give text, or another "
        f"--data.format"
    )


_READERS: dict[str, _Reader] = {
    "text": _text_rows,
    "csv": lambda file, stream, data, needed: tables.rows(file, stream, data, "csv", needed),
    "tsv": lambda file, stream, data, needed: tables.rows(file, stream, data, "tsv", needed),
    "tokens": lambda file, *_: _refuse_tokens(file),
    "quoted_tsv": lambda file, stream, data, needed: tables.rows(file, stream, data, "quoted_tsv", needed),
    "jsonl": json_rows.rows,
    "conll": lambda file, stream, data, needed: conll.rows(file, stream, data),
    "squad": lambda file, stream, data, needed: json_rows.squad_rows(file, stream, data),
}
