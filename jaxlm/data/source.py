"""Rows of text from anywhere, as a stream: files, folders, globs and tfds data sets.

`rows` yields every column of every row together with the place it stands at; `documents` yields the cleaned text that a
language model learns from.  The format of a file follows from its suffix, each also with `.gz` behind it:

    .csv          comma-separated, quoted as in RFC 4180, with a header
    .tsv          tab-separated with a header; quotes mean nothing, as in GLUE's files
    .jsonl .json  one JSON object on each line
    .parquet      read in batches
    .txt, other   plain text, divided by `data.documents`

Bytes that are not UTF-8 travel as lone surrogates (PEP 383) until `rows` sees the whole row: so every format has one
rule for them, `cleaning.encoding`.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from jaxlm.config import CleaningConfig, DataConfig
from jaxlm.data.clean import clean
from jaxlm.errors import RunError, UserError, perhaps

Row = dict[str, Any]

_SURROGATES = re.compile("[\ud800-\udfff]")
_BOM = b"\xef\xbb\xbf"
_MIB = 1 << 20
_PREPARE = (
    "prepare it on a machine with TensorFlow, tfds.builder(NAME, file_format='array_record').download_and_prepare(), "
    "copy the folder that holds its dataset_info.json, and give that folder as --data.path"
)


class Place(NamedTuple):
    """Where a row stands: `line` counts from 1, in lines of a text file and in rows of a table without lines."""

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
    """Every row with its place: all columns of a table; of plain text one column, named `data.text`.

    bytes are decoded as UTF-8.  `report` counts "rows" and what `cleaning.encoding` changed or dropped.
    Raises UserError for a missing path, a broken file, and a row that is not UTF-8 when cleaning.encoding is "refuse".
    """
    report = Counter() if report is None else report
    if path.startswith("tfds:") or _is_tfds_folder(path):
        sources = iter([_tfds_rows(path, split)])
    else:
        sources = (_file_rows(file, data) for file in files(path))
    for source in sources:
        for place, row in source:
            report["rows"] += 1
            valid = _utf8(place, row, data.cleaning, report)
            if valid is not None:
                yield place, valid


def files(path: str) -> list[Path]:
    """The files that `path` (file, folder or glob) stands for, sorted.

    Of a folder: those below it with a suffix of the table above, or all when none has one; hidden ones never.
    Raises UserError when there is none.
    """
    if os.path.isfile(path):
        return [Path(path)]
    if os.path.isdir(path):
        found = sorted(f for f in Path(path).rglob("*") if f.is_file())
        found = [f for f in found if not any(part.startswith(".") for part in f.relative_to(path).parts)]
        if not found:
            raise UserError(f"the folder {path} holds no files; give one with txt, csv, tsv, jsonl or parquet files")
        return [f for f in found if _suffix(f) in {".txt", *_READERS}] or found
    found = sorted(Path(f) for f in glob.glob(path, recursive=True) if os.path.isfile(f))
    if not found:
        raise UserError(f"there is no file, folder or glob {path!r}{_near(Path(path))}; set --data.path")
    return found


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


def _utf8(place: Place, row: Row, cleaning: CleaningConfig, report: Counter) -> Row | None:
    """The row with its strings in valid Unicode, or None where cleaning.encoding drops it."""
    for name, value in row.items():
        if isinstance(value, bytes):
            row[name] = value = value.decode(errors="surrogateescape")
        if not isinstance(value, str):
            continue
        try:
            value.encode()
        except UnicodeEncodeError as error:
            if cleaning.encoding == "drop":
                report["dropped: encoding"] += 1
                return None
            if cleaning.encoding == "refuse":
                if _suffix(Path(place.file)) not in _READERS:  # plain text: the row's own line ends count on
                    place = Place(place.file, place.line + value.count("\n", 0, error.start))
                raise UserError(
                    f"{place}: column {name!r} is not UTF-8; convert the data, or set --data.cleaning.encoding "
                    f"to 'replace' or 'drop'"
                ) from None
            row[name] = _SURROGATES.sub("\ufffd", value)
            report["changed: encoding"] += 1
    return row


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
        reader = _READERS.get(_suffix(file))
        if reader:
            yield from reader(file, stream)
        else:
            for line, block in _blocks(stream, data):
                yield Place(str(file), line), {data.text: block.decode(errors="surrogateescape")}


def _blocks(stream: IO[bytes], data: DataConfig) -> Iterator[tuple[int, bytes]]:
    """(first line, bytes) of each document of a plain text file."""
    if data.documents == "file":
        yield 1, stream.read()
        return
    begins = _boundary(data.boundary) if data.documents == "boundary" else None
    first, block = 1, b""
    for number, line in enumerate(_lines(stream), start=1):
        blank = not line.strip()
        if data.documents == "line":
            ends = not blank
        elif data.documents == "blank_line":
            ends = blank
        else:
            ends = bool(not blank and begins and begins.match(line.decode(errors="replace").rstrip("\r\n")))
        if data.documents == "line":
            if ends:
                yield number, _without_end(line)
            continue
        if ends and block:
            yield first, _without_end(block)
            block = b""
        if not blank:
            first = first if block else number
            block += line
    if block:
        yield first, _without_end(block)


def _boundary(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"data.boundary {pattern!r} is no regular expression: {error}; set --data.boundary") from None


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Lines with their ends (line feeds alone divide), without a byte-order mark."""
    for number, line in enumerate(stream):
        yield line if number else line.removeprefix(_BOM)


def _without_end(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r")


def _csv_rows(file: Path, stream: IO[bytes]) -> Iterator[tuple[Place, Row]]:
    import csv

    # The module's limit of 128 KiB for a field is its only guard against a quote that never closes; `strict` finds that
    # at the end of the file, and documents are longer.
    csv.field_size_limit(_MIB << 10)
    text = (line.decode(errors="surrogateescape") for line in _lines(stream))
    tabs: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(text, strict=True, **(tabs if _suffix(file) == ".tsv" else {}))
    header, line = None, 1
    try:
        for fields in reader:
            place, line = Place(str(file), line), reader.line_num + 1
            if header is None:
                header = fields
            elif fields:  # a blank line has none
                if len(fields) != len(header):
                    raise UserError(
                        f"{place}: the row has {len(fields)} fields, the header {len(header)} "
                        f"({', '.join(header)}); correct the row, quote what holds a separator"
                    )
                yield place, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise UserError(f"{Place(str(file), line)}: {error}; correct the quotes of this row") from None


def _json_rows(file: Path, stream: IO[bytes]) -> Iterator[tuple[Place, Row]]:
    for number, line in enumerate(_lines(stream), start=1):
        if not line.strip():
            continue
        place = Place(str(file), number)
        try:
            row = json.loads(line.decode(errors="surrogateescape"))
        except json.JSONDecodeError as error:
            reason = f"{error.msg}, column {error.colno}"
        else:
            if isinstance(row, dict):
                yield place, row
                continue
            reason = f"a {type(row).__name__}"
        raise UserError(f"{place}: not a JSON object ({reason}); each line must hold one, as `jq -c` writes them")


def _parquet_rows(file: Path, stream: IO[bytes]) -> Iterator[tuple[Place, Row]]:
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


_READERS = {".csv": _csv_rows, ".tsv": _csv_rows, ".json": _json_rows, ".jsonl": _json_rows, ".parquet": _parquet_rows}


def _is_tfds_folder(path: str) -> bool:
    return all(os.path.isfile(os.path.join(path, name)) for name in ("dataset_info.json", "features.json"))


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
