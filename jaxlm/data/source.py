"""Rows of text from anywhere, as a stream: files, folders, globs and tfds data sets.

`rows` yields every column of every row together with the place it stands at; `documents` yields the cleaned text that a
language model learns from.  The format of a file is `data.format`, or follows from its suffix, each also with `.gz`
behind it:

    csv      .csv               comma-separated, quoted as in RFC 4180, with a header or the names `data.columns`
    tsv      .tsv               tab-separated, else the same; quotes mean nothing, as in GLUE's files
    jsonl    .jsonl .json       one JSON object on each line
    parquet  .parquet           read in batches
    conll    .conll .iob .bio   a token and its tag on each line, blank lines between texts: columns tokens and tags
    squad    (data.format)      JSON of SQuAD 1.1 and 2.0, a row for each question; the file is read whole
    text     .txt, other        plain text, divided by `data.documents`; `data.pattern` divides a line into columns

Text files are in `data.charset`.  Bytes that are not UTF-8 where they should be travel as lone surrogates (PEP 383)
until `rows` sees the whole row: so every format has one rule for them, `cleaning.encoding`.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np

from jaxlm.config import DataConfig
from jaxlm.data.clean import clean
from jaxlm.errors import RunError, UserError, perhaps

Row = dict[str, Any]

_SURROGATES = re.compile("[\ud800-\udfff]")
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
_PREPARE = (
    "prepare it on a machine with TensorFlow, tfds.builder(NAME, file_format='array_record').download_and_prepare(), "
    "copy the folder that holds its dataset_info.json, and give that folder as --data.path"
)


class Place(NamedTuple):
    """Where a row begins: `line` counts from 1, in lines of a text file and in rows of parquet, SQuAD and tfds."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def documents(path: str, data: DataConfig, split: str, report: Counter) -> Iterator[str]:
    """The text of each document after cleaning, in the order of the files and of their rows.

    A document is a row's column `data.text`; in plain text it is what `data.documents` says:

        line        a line; blank lines are dropped, line ends are no part of it
        blank_line  lines up to the next blank line; the line ends inside are kept
        boundary    lines from one that `data.boundary` matches at its beginning up to the next such line; lines before
                    the first are a document too; blank lines are dropped
        file        the whole file, unchanged

    `split` is of a tfds data set.  `report` counts "rows", "documents" and what each cleaning choice changed or
    dropped.  Raises UserError for what cannot be read, for a missing column, and at the end when there was no document.
    """
    seen: set[bytes] = set()
    for place, row in rows(path, data, split, report):
        if data.text not in row:
            raise UserError(
                f"{place}: there is no column {data.text!r}; the columns are {', '.join(map(repr, row))}; "
                f"choose one with --data.text"
            )
        text = "" if row[data.text] is None else row[data.text]
        if not isinstance(text, str):
            raise UserError(
                f"{place}: column {data.text!r} holds {type(text).__name__} {text!r}, not text; "
                f"choose a column of text with --data.text"
            )
        text = clean(text, data.cleaning, seen, report)
        if text is not None:
            report["documents"] += 1
            yield text
    if not report["documents"]:
        counts = ", ".join(f"{what} {n}" for what, n in report.items() if n) or "rows 0"
        raise UserError(f"{path} holds no document ({counts}); give data with text, or drop less with --data.cleaning")


def rows(path: str, data: DataConfig, split: str, report: Counter | None = None) -> Iterator[tuple[Place, Row]]:
    """Every row with its place, one at a time.

    Its columns are, by format:

        csv, tsv        those of the header; or those of `data.columns`, then the first line is a row too and fields
                        beyond the names are dropped
        jsonl, parquet  those of the row; lists and objects stay what they are
        conll           tokens and tags (the first and the last column), lists of str of one length; of files with one
                        column tokens alone; `-DOCSTART-` lines are skipped
        squad           id, title, context, question, answers {"text": [str], "answer_start": [characters]} and
                        is_impossible; no answers where the file has none
        text            `data.text`; or the named groups of `data.pattern`

    bytes are decoded as UTF-8.  `report` counts "rows" and what `cleaning.encoding` changed or dropped.
    Raises UserError for a missing path, a broken file, and a row that is not UTF-8 when cleaning.encoding is "refuse".
    """
    report = Counter() if report is None else report
    if is_tfds(path):
        sources = iter([_tfds_rows(path, split)])
    else:
        sources = (_file_rows(file, data) for file in files(path))
    for source in sources:
        for place, row in source:
            report["rows"] += 1
            valid = _utf8(place, row, data, report)
            if valid is not None:
                yield place, valid


def files(path: str) -> list[Path]:
    """The files that `path` (file, folder or glob) stands for, sorted.

    Of a folder: those below it with a suffix of the table above, or all when none has one; hidden ones never.  This is
    so whatever `data.format` is: of a folder with other files beside the data, give a glob.
    Raises UserError when there is none.
    """
    if os.path.isfile(path):
        return [Path(path)]
    if os.path.isdir(path):
        found = sorted(f for f in Path(path).rglob("*") if f.is_file())
        found = [f for f in found if not any(part.startswith(".") for part in f.relative_to(path).parts)]
        if not found:
            raise UserError(f"the folder {path} holds no files; give one with txt, csv, tsv, jsonl or parquet files")
        return [f for f in found if _suffix(f) in _SUFFIXES] or found
    found = sorted(Path(f) for f in glob.glob(path, recursive=True) if os.path.isfile(f))
    if not found:
        raise UserError(f"there is no file, folder or glob {path!r}{_near(Path(path))}; give one that there is")
    return found


def alike(path: str, data: DataConfig) -> DataConfig:
    """How `path` is read, where `data` is of another path: in the same way, unless its suffix says another format."""
    file, known = Path(path), Path(data.path)
    if _SUFFIXES.get(_suffix(file)) in (None, _format(known, data)) or _suffix(file) == _suffix(known):
        return data
    return replace(data, format="suffix", columns=(), pattern="", charset="utf-8")


def fingerprint(path: str) -> str:
    """16 hexadecimal digits that change with the data and not with where it lies.

    Of files: relative names, sizes, and the first and last MiB of each.  Of tfds:NAME: its full name, with version.
    """
    digest = hashlib.sha256()
    if path.startswith("tfds:"):
        digest.update(_tfds_builder(path).info.full_name.encode())
        return digest.hexdigest()[:16]
    found = files(path)
    top = path if os.path.isdir(path) else os.path.commonpath([f.parent for f in found])
    for file in found:
        size = file.stat().st_size
        digest.update(f"{os.path.relpath(file, top)}\0{size}\0".encode(errors="surrogateescape"))
        with open(file, "rb") as stream:
            digest.update(hashlib.sha256(stream.read(_MIB)).digest())
            stream.seek(max(0, size - _MIB))
            digest.update(hashlib.sha256(stream.read(_MIB)).digest())
    return digest.hexdigest()[:16]


def _near(path: Path) -> str:
    """What lies where `path` was looked for."""
    if not path.parent.is_dir():
        return f" (nor a folder {str(path.parent)!r})"
    names = os.listdir(path.parent)
    hint = perhaps(path.name, names) if names else ""
    return hint if "perhaps" in hint or len(names) <= 10 else ""  # a long list of other names helps nobody


def _utf8(place: Place, row: Row, data: DataConfig, report: Counter) -> Row | None:
    """The row with its strings in valid Unicode, or None where cleaning.encoding drops it."""
    for name, value in row.items():
        broken: list[str] = []
        row[name] = _unicode(value, broken)
        if not broken:
            continue
        if data.cleaning.encoding == "drop":
            report["dropped: encoding"] += 1
            return None
        if data.cleaning.encoding == "refuse":
            if os.path.isfile(place.file) and _format(Path(place.file), data) == "text":  # its own line ends count on
                before = _SURROGATES.split(broken[0], maxsplit=1)[0]
                place = Place(place.file, place.line + before.count("\n"))
            raise UserError(
                f"{place}: column {name!r} is not UTF-8; convert the data, name its encoding with --data.charset, "
                f"or set --data.cleaning.encoding to 'replace' or 'drop'"
            )
        report["changed: encoding"] += 1
    return row


def _unicode(value: Any, broken: list[str]) -> Any:
    """The value with bytes decoded and with U+FFFD for each surrogate in its strings, also those in lists and dicts.

    Strings that had surrogates are added to `broken`, as they were.
    """
    if isinstance(value, (np.generic, np.ndarray)):  # of tfds
        value = value.tolist()
    if isinstance(value, bytes):
        value = value.decode(errors="surrogateescape")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            broken.append(value)
            value = _SURROGATES.sub("\ufffd", value)
    elif isinstance(value, list):
        value = [_unicode(item, broken) for item in value]
    elif isinstance(value, dict):
        value = {_unicode(key, broken): _unicode(item, broken) for key, item in value.items()}
    elif isinstance(value, tuple):  # an entry of a parquet map
        value = tuple(_unicode(item, broken) for item in value)
    return value


def _format(file: Path, data: DataConfig) -> str:
    return _SUFFIXES.get(_suffix(file), "text") if data.format == "suffix" else data.format


def _suffix(file: Path) -> str:
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


def _file_rows(file: Path, data: DataConfig) -> Iterator[tuple[Place, Row]]:
    with _opened(file) as stream:
        yield from _READERS[_format(file, data)](file, stream, data)


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
    tabs: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(_lines(file, stream, data), strict=True, **(tabs if _format(file, data) == "tsv" else {}))
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


_READERS = {
    "text": _text_rows,
    "csv": _csv_rows,
    "tsv": _csv_rows,
    "jsonl": _json_rows,
    "parquet": _parquet_rows,
    "conll": _conll_rows,
    "squad": _squad_rows,
}
_SUFFIXES = {
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


def is_tfds(path: str) -> bool:
    """Whether a path is a tfds data set: a name, or the folder of a prepared one, which has splits."""
    return path.startswith("tfds:") or all(
        os.path.isfile(os.path.join(path, name)) for name in ("dataset_info.json", "features.json")
    )


@contextmanager
def _without_tensorflow(path: str) -> Iterator[None]:
    """tfds imports TensorFlow where it cannot do without; the user is told that, not the name of a module."""
    try:
        yield
    except ImportError as error:
        if not (error.name or "").startswith("tensorflow"):
            raise
        raise UserError(f"{path} needs TensorFlow, which jaxlm does without; {_PREPARE}") from None


def _tfds_rows(path: str, split: str) -> Iterator[tuple[Place, Row]]:
    builder = _tfds_builder(path)
    with _without_tensorflow(path):
        if path.startswith("tfds:") and not builder.is_prepared():
            try:
                builder.download_and_prepare()
            except (OSError, RuntimeError) as error:
                raise RunError(f"{path} could not be downloaded ({error}); try again, or {_PREPARE}") from error
        names = re.findall(r"[A-Za-z_][\w.-]*(?=\[|\+|$)", split)  # of "train[:10%]+test": train, test
        for name in names or [split]:
            if name not in builder.info.splits and name != "all":
                raise UserError(f"{path} has no split {name!r}{perhaps(name, builder.info.splits)}; set --data.split")
        try:
            source = builder.as_data_source(split)
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"split {split!r} of {path} cannot be read ({_first_line(error)}); {_PREPARE}") from None
        for number in range(len(source)):
            yield Place(path, number + 1), dict(source[number])


def _tfds_builder(path: str) -> Any:
    import tensorflow_datasets as tfds

    with _without_tensorflow(path):
        if not path.startswith("tfds:"):
            return tfds.builder_from_directory(path)
        name = path.removeprefix("tfds:")
        base = re.split("[/:]", name)[0]
        try:
            return tfds.builder(name, file_format="array_record")
        except tfds.core.DatasetNotFoundError:
            if _tfds_defines(base):
                raise UserError(f"{path} needs TensorFlow, which jaxlm does without; {_PREPARE}") from None
            hint = perhaps(base, tfds.list_builders(with_community_datasets=False))
            raise UserError(f"tfds has no data set {base!r}{hint}") from None
        except (ValueError, AssertionError) as error:  # of a config or version that there is not
            raise UserError(f"{path} cannot be opened: {_first_line(error)}; set --data.path") from None


def _tfds_defines(name: str) -> bool:
    """Whether tfds has a module with this data set: one that needs TensorFlow is left out of its own list."""
    import tensorflow_datasets as tfds

    definition = re.compile(rf"^class {''.join(word.capitalize() for word in name.split('_'))}\(", re.MULTILINE)
    modules: Iterable[Path] = Path(tfds.__file__).parent.rglob("*.py")
    return any(definition.search(module.read_text(encoding="utf-8", errors="replace")) for module in modules)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
