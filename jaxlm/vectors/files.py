"""Files of word vectors: the text and the binary format of word2vec, and the text format of GloVe.

word2vec         a line "WORDS WIDTH", then a line "WORD NUMBER ... NUMBER" per word
word2vec_binary  a line "WORDS WIDTH", then for each word its bytes, a space and the numbers as little-endian float32;
                 a line end may follow
glove            as word2vec, without the first line
"""

from __future__ import annotations

import gzip
import mmap
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from jaxlm.config.ranges import check_argument, short_repr
from jaxlm.errors import UserError
from jaxlm.storage import disk
from jaxlm.vectors.word_vectors import WordVectors

VectorFormat = Literal["word2vec", "word2vec_binary", "glove"]
EXPORT = "vectors"  # stem of the file with the vectors of a run, in its folder export/
SUFFIXES: dict[str, str] = {"word2vec": ".txt", "word2vec_binary": ".bin", "glove": ".glove.txt"}
MAX_WORD_BYTES = 10_000  # a longer word means that the file is damaged
MAX_WIDTH = 100_000
_HEADER = re.compile(rb"[ \t]*(\d{1,12})[ \t]+(\d{1,12})[ \t]*\r?(?:\n|\Z)")


def load_vectors(path: str | os.PathLike[str], encoding: str = "utf-8") -> WordVectors:
    """Reads word vectors from a file of word2vec (text or binary) or GloVe, or from the folder of a run.

    The content decides the format: the files of word2vec begin with the number of words and the width.

    Args:
      path: a file, which may end in .gz, or the folder of a run that trained vectors.
      encoding: encoding of the words.

    Returns:
      The vectors, in the order of the file.

    Raises:
      UserError: for a missing, empty or cut-off file; for another number of words or width than the first line states;
        for a word that is repeated or has another encoding; and for a number that is not finite.
    """
    check_argument("path", path, str | os.PathLike)
    check_argument("encoding", encoding, str)
    try:
        "".encode(encoding)
    except (LookupError, UnicodeError):
        raise UserError(f"encoding is {encoding!r}, which Python does not have; use one such as utf-8") from None
    file = _find(Path(path))
    content = _read(file)
    words, vectors = _parse(content, file, encoding)
    _check_words(words, file)
    if not (finite_V := np.isfinite(vectors).all(1)).all():
        word = words[int(finite_V.argmin())]
        raise UserError(f"{file}: the vector of {word!r} has a number that is not a finite float32; remove the word")
    return WordVectors(words, vectors)


def _find(path: Path) -> Path:
    """Returns the file at a path, or the exported file of a run's folder."""
    if path.is_dir():
        exported = [path / folder / f"{EXPORT}{end}" for folder in ("export", "") for end in SUFFIXES.values()]
        file = next((file for file in exported if file.is_file()), None)
        if file is None:
            raise UserError(f"{path} contains no export/{EXPORT}.*; give the folder of a finished run, or a file")
        return file
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r} of word vectors; give the path of one")
    return path


def _read(file: Path) -> Any:
    """Returns the bytes of a file, mapped into memory unless they are compressed."""
    try:
        if file.suffix == ".gz":
            with gzip.open(file) as stream:
                content: Any = stream.read()
        else:
            with open(file, "rb") as stream:
                content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if file.stat().st_size else b""
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file} is not a complete gzip file ({error}); copy it again") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; fix its permissions") from None
    if not content[:MAX_WORD_BYTES].strip():
        raise UserError(f"{file} contains no word vectors; give a file with vectors")
    return content


def _parse(content: Any, file: Path, encoding: str) -> tuple[list[str], np.ndarray]:
    """Returns the words and the vectors of a file in any of the formats."""
    header = _HEADER.match(content)
    if header is None:
        return _parse_text(content, 0, None, None, file, encoding)
    count, width = int(header[1]), int(header[2])
    size = len(content) - header.end()
    # The shortest text of a vector has two bytes per number, so that the first line limits the memory.
    if not 0 < width <= MAX_WIDTH or not count > 0 or count * (2 * width + 1) > size + 2:
        raise UserError(
            f"{file}: the first line states {count:,} words of width {width:,}, but {size:,} bytes follow, which is "
            f"too little; copy the file again, or correct its first line"
        )
    if _is_text(content, header.end(), width):
        return _parse_text(content, header.end(), count, width, file, encoding)
    return _parse_binary(content, header.end(), count, width, file, encoding)


def _is_text(content: Any, start: int, width: int) -> bool:
    """Returns whether the first vector after the first line is text."""
    end = content.find(b"\n", start)
    line = content[start : end if end >= 0 else len(content)]
    try:
        line.decode("latin-1")
        return len(list(map(float, line.split()[1:]))) >= min(width, 1)
    except ValueError:
        return False


def _parse_text(
    content: Any, start: int, count: int | None, width: int | None, file: Path, encoding: str
) -> tuple[list[str], np.ndarray]:
    """Returns the words and vectors of lines of text; without a first line, the first vector decides the width."""
    words: list[str] = []
    rows: list[np.ndarray] = []
    for number, line in _lines(content, start):
        fields = line.split(b" ")
        if width is None:
            width = len(fields) - 1
        place = f"{file}, line {number}"
        if not 0 < width < len(fields):
            raise UserError(
                f"{place}: there are {len(fields) - 1:,} numbers, but the width is {width or 1:,}; correct the line"
            )
        word = b" ".join(fields[:-width])  # the words of some files contain spaces
        words.append(_decode(word, place, encoding))
        try:
            row = np.fromiter(map(float, fields[-width:]), np.float64, width)
        except ValueError:
            raise UserError(f"{place}: {line[:80]!r} is not a word and {width:,} numbers; correct the line") from None
        if b" " in word and _is_number(fields[-width - 1]):
            raise UserError(f"{place}: there are more than {width:,} numbers, the width; correct the line")
        with np.errstate(over="ignore"):  # reported as not finite
            rows.append(row.astype(np.float32))
    if count is not None and count != len(words):
        raise UserError(
            f"{file}: the first line states {count:,} words, but {len(words):,} follow; copy the file again, or "
            f"correct its first line"
        )
    return words, np.stack(rows)


def _lines(content: Any, start: int) -> Iterator[tuple[int, bytes]]:
    """Yields the lines that are not blank, without white space at the end, and their numbers in the file, from 1."""
    number = 2 if start else 1
    while start < len(content):
        end = content.find(b"\n", start)
        end = len(content) if end < 0 else end
        if line := content[start:end].rstrip(b" \t\r"):
            yield number, line
        start, number = end + 1, number + 1


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _parse_binary(
    content: Any, start: int, count: int, width: int, file: Path, encoding: str
) -> tuple[list[str], np.ndarray]:
    words: list[str] = []
    if count * (4 * width + 2) > len(content) - start:
        raise UserError(
            f"{file} is cut off: {count:,} words of width {width:,} need at least {count * (4 * width + 2):,} bytes "
            f"after the first line, and {len(content) - start:,} follow; copy it again"
        )
    vectors = np.empty((count, width), np.float32)
    for i in range(count):
        space = content.find(b" ", start, start + MAX_WORD_BYTES)
        if space < 0 or space + 1 + 4 * width > len(content):
            why = "is cut off" if space >= 0 or len(content) - start < MAX_WORD_BYTES else "is damaged"
            raise UserError(f"{file} {why}: it has no word {i + 1:,} of {count:,}; copy it again")
        words.append(_decode(content[start:space].lstrip(b"\n"), f"{file}, word {i + 1:,}", encoding))
        start = space + 1 + 4 * width
        vectors[i] = np.frombuffer(content[space + 1 : start], "<f4")
    if rest := len(content[start:].strip(b"\n")):
        raise UserError(
            f"{file}: {rest:,} bytes follow the last of {count:,} words of width {width:,}; copy the file again, or "
            f"correct its first line"
        )
    return words, vectors


def _decode(word: bytes, place: str, encoding: str) -> str:
    try:
        text = word.decode(encoding)
    except UnicodeDecodeError:
        raise UserError(
            f"{place}: the word {word[:80]!r} is not {encoding}; give its encoding to load_vectors"
        ) from None
    if not text:
        raise UserError(f"{place}: the word is empty; remove it")
    return text


def _check_words(words: list[str], file: Path) -> None:
    """Raises UserError for a repeated word."""
    if len(set(words)) == len(words):
        return
    first: dict[str, int] = {}
    for i, word in enumerate(words):
        if first.setdefault(word, i) != i:
            raise UserError(
                f"{file}: the word {word!r} has two vectors, number {first[word] + 1:,} and number {i + 1:,}; "
                f"remove one"
            )


def save_vectors(
    vectors: WordVectors, path: str | os.PathLike[str], format: VectorFormat = "word2vec", *, overwrite: bool = False
) -> Path:
    """Writes word vectors to a file that word2vec, GloVe, gensim and `load_vectors` read.

    Args:
      vectors: the vectors.
      path: the file.
      format: "word2vec" (text), "word2vec_binary" or "glove" (text).  Nine digits in text restore every float32.
      overwrite: whether to replace an existing file.

    Returns:
      The path of the file.

    Raises:
      UserError: for a word with white space, which these formats cannot store; for a file that exists; and for a path
        that cannot be written.
    """
    check_argument("vectors", vectors, WordVectors)
    if format not in get_args(VectorFormat):
        raise UserError(f"format is {short_repr(format)}; it must be one of {', '.join(get_args(VectorFormat))}")
    file = disk.local(path, "path")
    if file.is_dir() or (file.exists() and not overwrite):
        raise UserError(f"{file} exists; choose another path, or set overwrite=True")
    if (bad := next((word for word in vectors.words if not word or re.search(r"[ \t\r\n]", word)), None)) is not None:
        raise UserError(f"the word {bad!r} is empty or contains white space, which the format cannot store; remove it")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with disk.atomic_file(file) as temporary, open(temporary, "wb") as stream:
            stream.writelines(_encode(vectors, format))
    except UnicodeEncodeError as error:
        raise UserError(f"the word {error.object!r} is not valid Unicode; remove it") from None
    except OSError as error:
        raise disk.write_error(file, error, "path") from None
    return file


def _encode(vectors: WordVectors, format: str) -> Iterator[bytes]:
    if format != "glove":
        yield f"{len(vectors)} {vectors.width}\n".encode()
    line = " ".join(["%.9g"] * vectors.width) + "\n"
    for word, vector in zip(vectors.words, vectors.vectors):
        if format == "word2vec_binary":
            yield word.encode() + b" " + vector.astype("<f4").tobytes() + b"\n"
        else:
            yield f"{word} {line % tuple(vector.tolist())}".encode()
