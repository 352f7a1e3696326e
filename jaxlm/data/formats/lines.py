"""Files as text: unpacked, decoded, and divided into lines by one rule for every reader.

A line ends at a line feed, at a carriage return with a line feed behind it, or at a carriage return alone, wherever it
stands; nothing else ends one: a form feed, U+0085 and U+2028 are text.  A byte-order mark is no part of the text.

Text is decoded by `data.encoding`, unless a file begins with the byte-order mark of UTF-16 or UTF-32.  Bytes that are
not UTF-8 become lone surrogates (PEP 383) until `source.rows` sees the whole row: so every format has one rule for
them, `cleaning.encoding`.
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

BLANKS = " \t\r\n\v\f"  # a space outside ASCII is text: it may be all of a token
HEAD = 1 << 20  # characters at the beginning of a file from which its shape is found
_PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_FIRST_BYTES = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_NO_TEXT = {
    b"PK\x03\x04": "a zip archive (or a workbook or document of an office program, which are zip archives); unpack it, "
    "or save the table as csv",
    b"%PDF-": "a PDF document; save its text as a text file",
    b"PAR1\x15": "a parquet file; set --data.format parquet",
    b"ARROW1\0\0": "an Arrow file; write it as parquet",
    b"\xff\xff\xff\xff": "an Arrow file, or no text; write a data set that was saved to disk with its to_parquet",
    b"version https://git-lfs": "a pointer of Git LFS, and not the data; fetch the data with `git lfs pull`",
    b"\xd0\xcf\x11\xe0": "a workbook or document of an office program; save the table as csv",
    b"\x04\x22\x4d\x18": "an lz4 file; unpack it",
    b"\x1f\x9d": "a file packed by compress; unpack it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"SQLite format 3\0": "a database; write the table as csv",
    **{
        bytes([0x80, n]): "a pickle, which may run code when it is read; write the table as parquet"
        for n in range(2, 6)
    },
    b"\x93NUMPY": "an array of NumPy; write the table as parquet or csv",
    b"\x89HDF\r\n": "an HDF5 file; write the table as parquet",
}
_BLOCK = 512  # bytes of the head of an archive by tar
_ESCAPED = re.compile("[\udc80-\udcff]")  # how PEP 383 writes a byte that cannot be decoded


class Place(NamedTuple):
    """Where a row begins: `line` counts from 1, in lines of a text file and in rows of parquet, SQuAD and tfds."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@cache
def note(sentence: str) -> None:
    """Prints what was found out about a file to the standard error, once in a process."""
    print(sentence, file=sys.stderr, flush=True)


def suffix_of(file: Path) -> str:
    """Returns the suffix of a file in small letters, without that of its compression."""
    name = file.name.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


@contextmanager
def opened(file: Path) -> Iterator[IO[bytes]]:
    """Yields the bytes of a file, decompressed, as a stream with `peek`.

    A file is decompressed where its name or its first bytes say so.

    Raises:
      UserError: for a file that cannot be read or decompressed.
    """
    kind = _PACKED.get(file.suffix.lower(), "")
    try:
        with open(file, "rb") as raw:
            first = raw.peek(8)
            kind = next((name for mark, name in _FIRST_BYTES.items() if first.startswith(mark)), kind)
            with _decompressed(kind, raw) as stream:
                yield stream
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise UserError(f"{file} is not a whole {kind} file ({error}); unpack or copy it again") from None
    except OSError as error:
        if kind and error.errno is None:  # of bz2 and pyarrow
            raise UserError(f"{file} is not a whole {kind} file ({error}); unpack or copy it again") from None
        raise UserError(f"{file} cannot be read: {error.strerror or error}; check the file and its rights") from None


def _decompressed(kind: str, raw: IO[bytes]) -> Any:
    """A stream of the decompressed bytes, as a context manager."""
    if kind == "zstd":
        import pyarrow

        return io.BufferedReader(cast("io.RawIOBase", _Readable(pyarrow.CompressedInputStream(raw, "zstd"))))
    openers: dict[str, Any] = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}
    return openers[kind](raw) if kind else raw


class _Readable(io.RawIOBase):
    """A stream of pyarrow as one of the standard library."""

    def __init__(self, stream: Any):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._stream.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)


def encoding_of(file: Path, stream: IO[bytes], data: DataConfig) -> str:
    """Returns the codec of a text file: that of its byte-order mark, or `data.encoding`.

    Raises:
      UserError: for an encoding that Python does not have, and for a file that is no text.
    """
    name = data.encoding
    try:
        codec = codecs.lookup(name).name
        "a".encode(codec, "surrogateescape")
    except (LookupError, ValueError):
        raise UserError(
            f"data.encoding {name!r} is no encoding that Python has a codec for; "
            f"set --data.encoding to one, such as utf-8, cp1252, iso-8859-1 or utf-16"
        ) from None
    first = cast("Any", stream).peek(_BLOCK)[:_BLOCK]
    if found := other_kind(first):
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
                f"{file} has a zero byte in every second place, as {which} has, and data.encoding is {name!r}; "
                f"set --data.encoding {which}"
            )
    return codec


def other_kind(first: bytes) -> str:
    """Returns what a file that begins with these bytes is, and the remedy, where it is no text; else ""."""
    for mark, found in _NO_TEXT.items():
        if first.startswith(mark) and (mark != b"PK\x03\x04" or b"\0" in first):
            return found
    return "a tar archive; unpack it" if first[257:262] == b"ustar" else ""


def lines(file: Path, stream: IO[bytes], data: DataConfig) -> Iterator[str]:
    """Yields the lines of a text file with their ends, without a byte-order mark."""
    encoding = encoding_of(file, stream, data)
    text = io.TextIOWrapper(stream, encoding=encoding, errors="surrogateescape", newline="")
    number = 0
    try:
        for number, line in enumerate(text, start=1):
            if number == 1:
                line = line.removeprefix("\ufeff")
            yield checked(line, encoding, Place(str(file), number))
    except UnicodeError as error:  # also where UTF-16 has no byte-order mark
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{Place(str(file), number + 1)}: the text behind line {number} is not {encoding} ({reason}); "
            f"correct the data, or set --data.encoding to its encoding"
        ) from None
    finally:
        if not stream.closed:
            text.close()  # and the stream: it is read once


def whole(file: Path, stream: IO[bytes], data: DataConfig) -> str:
    """Returns the text of a file with its line ends, without a byte-order mark."""
    return "".join(lines(file, stream, data))


def checked(text: str, encoding: str, place: Place) -> str:
    """Returns a line as it is.  Raises UserError where it is not in an encoding; that of UTF-8 is found out later."""
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
    return text


def without_end(line: str) -> str:
    """Returns a line without its line end."""
    return line.removesuffix("\n").removesuffix("\r")


def shown(line: str) -> str:
    """Returns the beginning of a line as a message shows it."""
    line = without_end(line)
    return repr(line if len(line) <= 80 else line[:77] + "...")


def head_of(source: Iterator[str]) -> tuple[list[str], Iterator[str]]:
    """Returns the first lines, about HEAD characters, and an iterator over all lines."""
    from itertools import chain

    first: list[str] = []
    size = 0
    for line in source:
        first.append(line)
        size += len(line)
        if size >= HEAD:
            break
    return first, chain(first, source)
