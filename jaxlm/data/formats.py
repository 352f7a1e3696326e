"""The formats of files, each read as a stream of rows with their places:

    csv      .csv               comma-separated, quoted as in RFC 4180, with a header or the names `data.columns`
    tsv      .tsv               tab-separated, else the same; quotes mean nothing, as in GLUE's files
    quoted_tsv  (data.format)   tab-separated, quoted like csv
    jsonl    .jsonl .json       one JSON object on each line
    parquet  .parquet           read in batches
    conll    .conll .iob .bio   a token and its tag on each line, blank lines between texts: columns tokens and tags
    squad    (data.format)      JSON of SQuAD 1.1 and 2.0, a row for each question; the file is read whole
    text     .txt, other        plain text, divided by `data.documents`; `data.pattern` divides a line into columns

Text files are in `data.charset`.  Bytes that are not UTF-8 where they should be travel as lone surrogates (PEP 383)
until `source.rows` sees the whole row: so every format has one rule for them, `cleaning.encoding`.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from jaxlm.config import DataConfig
from jaxlm.errors import UserError

Row = dict[str, Any]

_BOM = b"\xef\xbb\xbf"
_MIB = 1 << 20
_BLANKS = " \t\r\n\v\f"  # a space outside ASCII is text: it may be all of a token
_SQUAD = re.compile(r'"data"\s*:\s*\[\s*\{.*?"paragraphs"\s*:\s*\[', re.DOTALL)
_SQUAD_HEAD = 4096  # characters in which `_SQUAD` looks for how such a file begins
_SQUAD_SHAPE = "correct it: data[].paragraphs[].{context, qas[].{id, question, answers[].{text, answer_start}}}"
_JSON_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


class Place(NamedTuple):
    """Where a row begins: `line` counts from 1, in lines of a text file and in rows of parquet, SQuAD and tfds."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def format_of(file: Path, data: DataConfig) -> str:
    """The format that a file is read in."""
    return SUFFIXES.get(suffix_of(file), "text") if data.format == "suffix" else data.format


def suffix_of(file: Path) -> str:
    """The suffix of a file, without `.gz`."""
    return Path(file.name.removesuffix(".gz")).suffix.lower()


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked; a file that cannot be read is a UserError."""
    try:
        with cast("IO[bytes]", gzip.open(file)) if file.suffix == ".gz" else open(file, "rb") as stream:
            yield stream
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{file} is not a whole gzip file ({error}); unpack or copy it again") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}); check the file and its rights") from None


def file_rows(file: Path, data: DataConfig) -> Iterator[tuple[Place, Row]]:
    """Every row of a file with its place, its strings not yet checked to be Unicode."""
    with _opened(file) as stream:
        yield from READERS[format_of(file, data)](file, stream, data)


def text_lines(file: Path, data: DataConfig) -> Iterator[tuple[Place, str]]:
    """Every line of a plain text file with its place, blank ones too, without its end."""
    with _opened(file) as stream:
        for number, line in enumerate(_lines(file, stream, data), start=1):
            yield Place(str(file), number), _without_end(line)


def _charset(name: str) -> str:
    """The codec of text files, "utf-8" under all its names."""
    try:
        line_feed = "\n".encode(name)
        codec = codecs.lookup(name).name
    except (LookupError, ValueError):
        raise UserError(
            f"data.charset {name!r} is no character set that Python has a codec for; "
            f"set --data.charset to one, such as utf-8, iso-8859-1 or cp1252"
        ) from None
    if codec in ("utf-8", "utf-8-sig"):  # a byte-order mark is no part of the text under either name
        return "utf-8"
    if line_feed != b"\n":
        raise UserError(
            f"data.charset {name!r} writes a line feed as {line_feed.hex(' ')}, and files are divided at byte 0a; "
            f"convert the data to UTF-8, and leave --data.charset out"
        )
    return codec


def _decoded(text: bytes, charset: str, file: Path, line: int) -> str:
    """Text that begins at a line of a file.  UTF-8 never fails: `_utf8` finds the surrogates."""
    if charset == "utf-8":
        return text.decode(errors="surrogateescape")
    try:
        return text.decode(charset)
    except UnicodeDecodeError as error:
        place = Place(str(file), line + text.count(b"\n", 0, error.start))
        raise UserError(
            f"{place}: byte {text[error.start]:02x} is not {charset} ({error.reason}); "
            f"correct the data, or set --data.charset to its encoding"
        ) from None


def _lines(file: Path, stream: IO[bytes], data: DataConfig) -> Iterator[str]:
    """Lines with their ends (line feeds alone divide), without a byte-order mark."""
    charset = _charset(data.charset)
    for number, line in enumerate(stream, start=1):
        if number == 1 and charset == "utf-8":
            line = line.removeprefix(_BOM)
        yield _decoded(line, charset, file, number)


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _shown(line: str) -> str:
    return repr(line if len(line) <= 80 else line[:77] + "...")


def _text_rows(file: Path, stream: IO[bytes], data: DataConfig) -> Iterator[tuple[Place, Row]]:
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
                f"{place}: the line {_shown(block)} does not match data.pattern {data.pattern!r}; "
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
        yield 1, _decoded(stream.read(), _charset(data.charset), file, 1)
        return
    begins = _regex(data.boundary, "boundary") if data.documents == "boundary" else None
    first, block = 1, ""
    for number, line in enumerate(_lines(file, stream, data), start=1):
        blank = not line.strip(_BLANKS)
        if data.documents == "line":
            ends = not blank
        elif data.documents == "blank_line":
            ends = blank
        else:
            ends = bool(not blank and begins and begins.match(line.rstrip("\r\n")))
        if data.documents == "line":
            if ends:
                yield number, _without_end(line)
            continue
        if ends and block:
            yield first, _without_end(block)
            block = ""
        if not blank:
            first = first if block else number
            block += line
    if block:
        yield first, _without_end(block)


def _csv_rows(file: Path, stream: IO[bytes], data: DataConfig) -> Iterator[tuple[Place, Row]]:
    import csv

    # The module's limit of 128 KiB for a field is its only guard against a quote that never closes; `strict` finds that
    # at the end of the file, and documents are longer.
    csv.field_size_limit(_MIB << 10)
    kind = format_of(file, data)
    marks: dict[str, Any] = {} if kind == "csv" else {"delimiter": "\t"}
    marks |= {"quoting": csv.QUOTE_NONE} if kind == "tsv" else {}
    reader = csv.reader(_lines(file, stream, data), strict=True, **marks)
    names: Sequence[str] = data.columns
    line = 1
    try:
        for fields in reader:
            place, line = Place(str(file), line), reader.line_num + 1
            if not names:
                names = fields
                twice = [name for name in names if name and names.count(name) > 1]
                if twice:
                    raise UserError(f"{place}: the header has the column {twice[0]!r} twice; rename one of them")
            elif fields:  # a blank line has none
                if len(fields) < len(names) or (len(fields) > len(names) and not data.columns):
                    raise UserError(
                        f"{place}: the row has {len(fields)} fields, "
                        f"{'data.columns' if data.columns else 'the header'} {len(names)} ({', '.join(names)}); "
                        f"correct the row, quote what holds a separator, or set --data.format or --data.columns"
                    )
                yield place, dict(zip(names, fields, strict=False))
    except csv.Error as error:
        place = Place(str(file), line)
        raise UserError(f"{place}: {error}; correct the quotes of this row, or set --data.format") from None


def _json_rows(file: Path, stream: IO[bytes], data: DataConfig) -> Iterator[tuple[Place, Row]]:
    first = True
    for number, line in enumerate(_lines(file, stream, data), start=1):
        if not line.strip(_BLANKS):
            continue
        place, row = Place(str(file), number), None
        try:
            row = json.loads(line)
            reason = f"a {type(row).__name__}"
        except json.JSONDecodeError as error:
            reason = f"{error.msg}, column {error.colno}"
        if first and (data.format == "suffix" or not isinstance(row, dict)):
            head = line[:_SQUAD_HEAD]
            if row is None:  # the object may go on in the next lines
                head += stream.read(_SQUAD_HEAD).decode(errors="replace")
            if _SQUAD.search(head):
                raise UserError(f"{place}: not a row but a whole file of questions; set --data.format squad")
        if not isinstance(row, dict):
            raise UserError(f"{place}: not a JSON object ({reason}); each line must hold one, as `jq -c` writes them")
        first = False
        yield place, row


def _conll_rows(file: Path, stream: IO[bytes], data: DataConfig) -> Iterator[tuple[Place, Row]]:
    begin = columns = 0  # number of the first line with columns, and how many it has
    block: list[list[str]] = []

    def row() -> Row:
        texts = {"tokens": [fields[0] for fields in block]}
        return texts | {"tags": [fields[-1] for fields in block]} if columns > 1 else texts

    number = 0
    for number, line in enumerate(_lines(file, stream, data), start=1):
        if not line.strip(_BLANKS) or line.startswith("-DOCSTART-"):
            if block:
                yield Place(str(file), number - len(block)), row()
            block = []
            continue
        place = Place(str(file), number)
        if "\t" in line:
            fields = [field.strip(_BLANKS) for field in line.split("\t")]
        else:
            fields = re.split(" +", line.strip(_BLANKS))
        if not columns:
            begin, columns = number, len(fields)
        if len(fields) != columns:
            raise UserError(
                f"{place}: the line {_shown(_without_end(line))} has {len(fields)} columns, line {begin} {columns}; "
                f"correct it: a token, its tag last, tabs or spaces between, and blank lines between texts"
            )
        if not fields[0] or not fields[-1]:
            raise UserError(
                f"{place}: the {'tag' if fields[0] else 'token'} of the line {_shown(_without_end(line))} is empty; "
                f"give both, divided by a tab or spaces"
            )
        block.append(fields)
    if block:
        yield Place(str(file), number + 1 - len(block)), row()


def _squad_rows(file: Path, stream: IO[bytes], data: DataConfig) -> Iterator[tuple[Place, Row]]:
    # One JSON value cannot be read in parts with the standard library; the largest SQuAD file has 42 MB.
    text = _decoded(stream.read(), _charset(data.charset), file, 1).removeprefix("\ufeff")
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{Place(str(file), error.lineno)}: the JSON breaks at column {error.colno}, character {error.pos:,} of "
            f"{len(text):,} ({error.msg}); copy the file again, whole, or set --data.format to what it is"
        ) from None
    number = 0
    for articles, article in _members(file, "the file", whole, "data"):
        title = _member(file, articles, article, "title", str, "")
        for paragraphs, paragraph in _members(file, articles, article, "paragraphs"):
            context = _member(file, paragraphs, paragraph, "context", str)
            for path, question in _members(file, paragraphs, paragraph, "qas"):
                number += 1
                asked = _member(file, path, question, "question", str)
                name = question.get("id")  # a number in some files
                row = {
                    "id": str(number if name is None else name),
                    "title": title,
                    "context": context,
                    "question": asked,
                }
                if "answers" in question:
                    answers = list(_members(file, path, question, "answers"))
                    row["answers"] = {
                        "text": [_member(file, *answer, "text", str) for answer in answers],
                        "answer_start": [_member(file, *answer, "answer_start", int) for answer in answers],
                    }
                row["is_impossible"] = _member(file, path, question, "is_impossible", bool, False)
                yield Place(str(file), number), row


def _member(file: Path, path: str, value: Any, name: str, kind: type, default: Any = None) -> Any:
    """The member `name` of the JSON object `value`, which stands at `path` of a SQuAD file."""
    if not isinstance(value, dict):
        raise UserError(f"{file}: {path} is {_JSON_NAMES[type(value)]}, not an object; {_SQUAD_SHAPE}")
    if name not in value:
        if default is None:
            raise UserError(f"{file}: {path} has no {name!r}; {_SQUAD_SHAPE}")
        return default
    found = type(value[name])
    if found is not kind:  # and not isinstance: true is no number
        raise UserError(f"{file}: {name!r} of {path} is {_JSON_NAMES[found]}, not {_JSON_NAMES[kind]}; {_SQUAD_SHAPE}")
    return value[name]


def _members(file: Path, path: str, value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(path, item) of each item of the list `name`."""
    for i, item in enumerate(_member(file, path, value, name, list)):
        yield f"{name}[{i}]" if path == "the file" else f"{path}.{name}[{i}]", item


def _parquet_rows(file: Path, stream: IO[bytes], data: DataConfig) -> Iterator[tuple[Place, Row]]:
    import pyarrow
    import pyarrow.parquet

    if file.suffix == ".gz":  # the table of contents stands at the end, so a packed file is unpacked in memory
        stream = io.BytesIO(stream.read())
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=1024):
            for number, row in enumerate(batch.to_pylist(), start=number + 1):  # noqa: B020
                yield Place(str(file), number), row
    except pyarrow.ArrowException as error:
        raise UserError(f"{file} is no readable parquet file ({error}); write it again") from None


READERS = {
    "text": _text_rows,
    "csv": _csv_rows,
    "tsv": _csv_rows,
    "quoted_tsv": _csv_rows,
    "jsonl": _json_rows,
    "parquet": _parquet_rows,
    "conll": _conll_rows,
    "squad": _squad_rows,
}
SUFFIXES = {
    ".txt": "text",
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "jsonl",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".conll": "conll",
    ".iob": "conll",
    ".bio": "conll",
}
