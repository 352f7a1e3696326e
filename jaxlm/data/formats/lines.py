"""Reads files as text: decompresses and decodes them, and splits them into lines by one rule for all readers.

A line ends at a line feed, a carriage return followed by a line feed, or a single carriage return. No other character
ends a line: form feeds, U+0085 and U+2028 are text. A byte-order mark is not part of the text.

Text is decoded with `data.encoding`, unless the file begins with the byte-order mark of UTF-16 or UTF-32. Bytes that
are not UTF-8 become lone surrogates (PEP 383). `source.rows` handles them for complete rows, so the rule
`cleaning.encoding` is the same for all formats.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from jaxlm.config import DataConfig
from jaxlm.errors import UserError

Row = dict[str, Any]

BLANKS = " \t\r\n\v\f"  # spaces outside ASCII are text, because a token may consist of one
HEAD = 1 << 20  # characters at the beginning of a file that are used to detect its dialect
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_FIRST_BYTES = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BINARY = {
    b"PK\x03\x04": "a zip archive (or an office document, which is one); unpack it, or save the table as csv",
    b"%PDF-": "a PDF document; save its text as a text file",
    b"PAR1\x15": "a parquet file; set --data.format parquet",
    b"ARROW1\0\0": "an Arrow file; save it as parquet",
    b"\xff\xff\xff\xff": "an Arrow file or another binary file; if it was written by save_to_disk, save the data set "
    "with to_parquet",
    b"version https://git-lfs": "a Git LFS pointer instead of the data; download the data with `git lfs pull`",
    b"\xd0\xcf\x11\xe0": "an office document; save the table as csv",
    b"\x04\x22\x4d\x18": "an lz4 file; decompress it",
    b"\x1f\x9d": "a file compressed by compress; decompress it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"SQLite format 3\0": "a database; save the table as csv",
    **{bytes([0x80, n]): "a pickle, which can run code when loaded; save the table as parquet" for n in range(2, 6)},
    b"\x93NUMPY": "a NumPy array; save the table as parquet or csv",
    b"\x89HDF\r\n": "an HDF5 file; save the table as parquet",
}
_BLOCK = 512  # bytes of a tar header
_ESCAPED = re.compile("[\udc80-\udcff]")  # represents a byte that cannot be decoded (PEP 383)


class Place(NamedTuple):
    """The position of a row.

    Attributes:
      file: path of the file, or name of the data set.
      line: number of the row's first line in text files, number of the row in parquet, SQuAD and tfds; from 1.
    """

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@cache
def note(message: str) -> None:
    """Prints a message about a file to the standard error, once per process."""
    print(message, file=sys.stderr, flush=True)


def suffix_of(file: Path) -> str:
    """Returns the suffix of a file in lower case, ignoring the suffix of its compression."""
    name = file.name.lower()
    for compressed in _COMPRESSED:
        name = name.removesuffix(compressed)
    return Path(name).suffix


@contextmanager
def open_file(file: Path) -> Iterator[IO[bytes]]:
    """Yields the decompressed bytes of a file as a stream with `peek`.

    The compression is detected from the suffix or the first bytes.

    Raises:
      UserError: the file cannot be read or decompressed.
    """
    kind = _COMPRESSED.get(file.suffix.lower(), "")
    try:
        with open(file, "rb") as raw:
            first = raw.peek(8)
            kind = next((name for mark, name in _FIRST_BYTES.items() if first.startswith(mark)), kind)
            with _decompress(kind, raw) as stream:
                yield stream
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise UserError(f"{file} is not a whole {kind} file ({error}); decompress or copy it again") from None
    except OSError as error:
        if kind and error.errno is None:  # raised by bz2 and pyarrow
            raise UserError(f"{file} is not a whole {kind} file ({error}); decompress or copy it again") from None
        raise UserError(f"{file} cannot be read: {error.strerror or error}; check its permissions") from None


def _decompress(kind: str, raw: IO[bytes]) -> Any:
    """Returns a stream of the decompressed bytes, which is a context manager."""
    if kind == "zstd":
        import pyarrow

        return io.BufferedReader(cast("io.RawIOBase", _Readable(pyarrow.CompressedInputStream(raw, "zstd"))))
    openers: dict[str, Any] = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}
    return openers[kind](raw) if kind else raw


class _Readable(io.RawIOBase):
    """Adapts a stream of pyarrow to `io.RawIOBase`."""

    def __init__(self, stream: Any):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._stream.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)


def encoding_of(file: Path, stream: IO[bytes], data: DataConfig) -> str:
    """Returns the codec of a text file, from its byte-order mark or `data.encoding`.

    Raises:
      UserError: Python has no such encoding, or the file is not text.
    """
    name = data.encoding
    try:
        codec = codecs.lookup(name).name
        "a".encode(codec, "surrogateescape")
    except (LookupError, ValueError):
        raise UserError(
            f"data.encoding {name!r} is not an encoding that Python supports; "
            f"set --data.encoding to one, such as utf-8, cp1252, iso-8859-1 or utf-16"
        ) from None
    first = cast("Any", stream).peek(_BLOCK)[:_BLOCK]
    if found := binary_format(first):
        raise UserError(f"{file} is {found}")
    if codec in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        for mark, found in _MARKS:
            if first.startswith(mark):
                return found
    if codec == "utf-8" and len(first) >= 16:
        zeros = [first[side:64:2].count(0) / len(first[side:64:2]) for side in (0, 1)]
        if max(zeros) > 0.4 and min(zeros) < 0.1:
            which = "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
            raise UserError(
                f"every second byte of {file} is zero, as in {which}, but data.encoding is {name!r}; "
                f"set --data.encoding {which}"
            )
    return codec


def binary_format(first: bytes) -> str:
    """Returns the name of the binary format that begins with these bytes, and the remedy; "" if none is recognised."""
    for mark, found in _BINARY.items():
        if first.startswith(mark) and (mark != b"PK\x03\x04" or b"\0" in first):
            return found
    return "a tar archive; unpack it" if first[257:262] == b"ustar" else ""


def read_lines(file: Path, stream: IO[bytes], data: DataConfig) -> Iterator[str]:
    """Yields the lines of a text file with their line ends, without a byte-order mark.

    Raises:
      UserError: the file is not text, or not in the encoding.
    """
    encoding = encoding_of(file, stream, data)
    text = io.TextIOWrapper(stream, encoding=encoding, errors="surrogateescape", newline="")
    number = 0
    try:
        for number, line in enumerate(text, start=1):
            if number == 1:
                line = line.removeprefix("\ufeff")
            _check_encoding(line, encoding, Place(str(file), number))
            yield line
    except UnicodeError as error:  # also raised for UTF-16 without a byte-order mark
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{Place(str(file), number + 1)}: the text after line {number} is not {encoding} ({reason}); "
            f"correct the data, or set --data.encoding to its encoding"
        ) from None
    finally:
        if not stream.closed:
            text.close()  # and with it the stream, which is read only once


def read_text(file: Path, stream: IO[bytes], data: DataConfig) -> str:
    """Returns the text of a file with its line ends, without a byte-order mark."""
    return "".join(read_lines(file, stream, data))


def _check_encoding(text: str, encoding: str, place: Place) -> None:
    """Raises UserError for a line that is not in the encoding; UTF-8 is checked later, for complete rows."""
    if encoding not in ("utf-8", "utf-8-sig") and (broken := _ESCAPED.search(text)):
        byte = bytes([ord(broken[0]) - 0xDC00])
        try:
            reason = ""
            text.encode(encoding, "surrogateescape").decode(encoding)
        except UnicodeError as error:
            reason = f" ({getattr(error, 'reason', error)})"
        raise UserError(
            f"{place}: byte {byte.hex()} is not {encoding}{reason}; "
            f"correct the data, or set --data.encoding to its encoding"
        )


def strip_line_end(line: str) -> str:
    """Returns a line without its line end."""
    return line.removesuffix("\n").removesuffix("\r")


def quote(line: str) -> str:
    """Returns the beginning of a line, quoted for a message."""
    line = strip_line_end(line)
    return repr(line if len(line) <= 80 else line[:77] + "...")


def head_of(source: Iterator[str]) -> tuple[list[str], Iterator[str]]:
    """Returns the first lines, about HEAD characters in total, and an iterator over all lines."""
    from itertools import chain

    first: list[str] = []
    size = 0
    for line in source:
        first.append(line)
        size += len(line)
        if size >= HEAD:
            break
    return first, chain(first, source)
