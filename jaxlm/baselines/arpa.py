r"""N-gram models of words as ARPA files, the text format of SRILM, KenLM and others.

    \data\
    ngram 1=4
    ngram 2=2

    \1-grams:
    -1.2	</s>	0
    -99	<s>	-0.3
    ...
    \end\

A line has the logarithm to base 10 of a probability, the words, and the logarithm of the backoff weight if there is
one.  A file whose name ends in .gz, .bz2, .xz or .zst is read decompressed; .gz is written compressed.
"""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from jaxlm.baselines.ngrams import NEVER, NGrams
from jaxlm.config.baseline import MAX_ORDER
from jaxlm.config.ranges import short_repr
from jaxlm.data.formats.lines import open_file
from jaxlm.errors import UserError
from jaxlm.storage import disk

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
_COUNT = re.compile(rb"ngram\s+(\d{1,3})\s*=\s*(\d{1,15})")
_WORD = re.compile(r"[^ \t\n\r\0]+")  # as in lmplz
_LINES = 100_000  # that are formatted at once


class EncodedTexts(NamedTuple):
    """Texts as ids of words, with `<s>` before and `</s>` after each text."""

    tokens_N: np.ndarray
    bounds: np.ndarray  # where each text starts, and where the last one ends
    words: tuple[str, ...]  # the word of each id


def encode(texts: Iterable[str], words: Sequence[str] | None = None) -> EncodedTexts:
    """Returns texts as ids of words for `ngrams.fit` and `ngrams.log_probs`, as lmplz reads the lines of a file.

    Args:
      texts: the texts; spaces, tabs and newlines separate words.
      words: the words of a model, whose `<unk>` replaces all others; None: the words of the texts, after `<unk>`, `<s>`
        and `</s>`.

    Raises:
      UserError: for a text that contains `<s>` or `</s>`, or without `words` `<unk>`, and for a word that is not among
        the words of a model without `<unk>`.
    """
    index = {word: i for i, word in enumerate(words or (UNKNOWN, START, END))}
    if missing := [word for word in (START, END) if word not in index]:
        raise UserError(f"the words of the model have no {' and no '.join(missing)}; add them to the ARPA file")
    reserved = {START, END} if words else {START, END, UNKNOWN}
    tokens: list[int] = []
    bounds = [0]
    for number, text in enumerate(texts, start=1):
        found = _WORD.findall(text)
        if special := reserved.intersection(found):
            raise UserError(
                f"text {number:,} contains {min(special)}, which marks the ends of texts or unknown words; replace it "
                f"by another word"
            )
        ids = [index.get(word, -1) if words else index.setdefault(word, len(index)) for word in found]
        if -1 in ids and UNKNOWN not in index:
            raise UserError(
                f"text {number:,} contains {found[ids.index(-1)]!r}, which is not a word of the model, and the model "
                f"has no {UNKNOWN}; add {UNKNOWN} to the ARPA file, or leave the text out"
            )
        tokens += [index[START], *(index[UNKNOWN] if i < 0 else i for i in ids), index[END]]
        bounds.append(len(tokens))
    return EncodedTexts(np.array(tokens, np.int64), np.array(bounds, np.int64), tuple(index))


# Writing


def write(path: str | os.PathLike[str], model: NGrams, words: Sequence[str]) -> None:
    """Writes a model as an ARPA file.

    KenLM requires `<s>` and `</s>`.  If the words have no `<s>`, `</s>` or `<unk>`, the file has them with a
    probability of 10^-99.

    Args:
      path: the file to write.
      model: the model.
      words: the word of each token id, without white space, each once.

    Raises:
      UserError: for words that a file cannot contain.
      OSError: if the file system fails.
    """
    if len(words) != model.vocabulary:
        raise UserError(
            f"there are {len(words):,} words, and the model has {model.vocabulary:,} ids; give one for each"
        )
    odd = next((word for word in words if not _WORD.fullmatch(word)), None)
    if odd is not None or len(set(words)) < len(words):
        what = "a word occurs twice" if odd is None else f"the word {odd!r} is empty or contains white space"
        raise UserError(f"{what}; an ARPA file needs a different name without white space for each id")
    added = [word for word in (START, END, UNKNOWN) if word not in words]
    counts = [len(x) for x in model.log10_probs]
    counts[0] += len(added)
    with disk.atomic_file(path) as temporary, _create(temporary, str(path).endswith(".gz")) as file:
        header = [f"ngram {k}={count}\n" for k, count in enumerate(counts, start=1)]
        file.write("".join(["\\data\\\n", *header]).encode())
        for k in range(1, model.order + 1):
            file.write(f"\n\\{k}-grams:\n".encode())
            for word in added if k == 1 else ():
                file.write(f"{NEVER:g}\t{word}\n".encode())
            for lines in _lines(model, np.array(words, object), k):
                file.write(lines.encode())
        file.write(b"\n\\end\\\n")


@contextmanager
def _create(path: Path, compress: bool) -> Iterator[IO[bytes]]:
    with open(path, "wb") as file:
        if not compress:
            yield file
            return
        # Without a name and a time in its header, the same model gives the same file.
        with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as compressed:
            yield compressed  # type: ignore[misc]


def _lines(model: NGrams, words: np.ndarray, order: int) -> Iterator[str]:
    """Yields the lines of an order, several at once."""
    tokens, probs_G = model.tokens(order), model.log10_probs[order - 1]
    for first in range(0, len(tokens), _LINES):
        part = slice(first, first + _LINES)
        columns = [_digits(probs_G[part]), map(" ".join, words[tokens[part]].tolist())]
        if order < model.order:
            columns.append(_digits(model.log10_backoffs[order - 1][part]))
        yield "".join(["\t".join(line) + "\n" for line in zip(*columns)])


def _digits(values: np.ndarray) -> list[str]:
    """Returns each number in float32 with the fewest digits that give the same number again."""
    return [np.format_float_positional(x, trim="-") for x in values]


# Reading


def read(path: str | os.PathLike[str]) -> tuple[NGrams, tuple[str, ...]]:
    """Returns the model of an ARPA file, and the word of each token id.

    Raises:
      UserError: for a file that is not a whole ARPA file: other counts than its header has, orders in another sequence,
        values that are no logarithms of probabilities, n-grams whose words or first words are not in the file.
    """
    file = disk.local(path, "the ARPA file")
    if not file.is_file():
        raise UserError(f"there is no ARPA file {file}; give the path of an existing file")
    with open_file(file) as stream:
        reader = _Reader(file, stream)
        counts = reader.counts()
        words: dict[bytes, int] = {}
        keys, log10_probs, log10_backoffs = [], [], []
        sorting_G = np.zeros(0, np.int64)  # the index of each n-gram of the order below after sorting
        places: dict[tuple[bytes, ...], int] = {}  # the n-grams of the order below, by their words
        for k, count in enumerate(counts, start=1):
            section = reader.section(k, count, is_last=k == len(counts))
            if k == 1:
                words = {ngram[0]: i for i, ngram in enumerate(section.places)}
                sorting_G = np.arange(count)
            else:
                contexts = reader.contexts(section, places)
                keys_G = sorting_G[contexts] * len(words) + reader.last_words(section, words)
                order_G = np.argsort(keys_G)
                sorting_G = np.empty(count, np.int64)
                sorting_G[order_G] = np.arange(count)
                section = section._replace(probs=section.probs[order_G], backoffs=section.backoffs[order_G])
                keys.append(keys_G[order_G])
            log10_probs.append(section.probs)
            log10_backoffs += [section.backoffs] * (k < len(counts))
            places = section.places
        reader.end()
    model = NGrams(len(words), tuple(keys), tuple(log10_probs), tuple(log10_backoffs))
    return model, tuple(word.decode() for word in words)


class _Section(NamedTuple):
    """The n-grams of an order, as their lines are in the file."""

    order: int
    places: dict[tuple[bytes, ...], int]  # n-gram -> its place among the lines
    probs: np.ndarray
    backoffs: np.ndarray


class _Reader:
    """Reads the parts of an ARPA file, and raises UserError with the line of a mistake."""

    def __init__(self, file: Path, stream: IO[bytes]):
        self._file, self._lines, self.number = file, iter(stream), 0

    def error(self, problem: str) -> UserError:
        """Returns the error for a problem at the current line."""
        return UserError(f"{self._file}, line {self.number:,}: {problem}; write or copy the ARPA file again")

    def _next(self) -> bytes | None:
        """Returns the next line without white space at its ends; None at the end of the file."""
        for line in self._lines:
            self.number += 1
            return line.strip(b" \t\r\n")
        return None

    def _next_filled(self) -> bytes:
        while (line := self._next()) == b"":
            pass
        if line is None:
            raise self.error("the file ends here, before its last line \\end\\")
        return line

    def counts(self) -> list[int]:
        """Returns the number of n-grams of each order that the header declares."""
        line = self._next_filled()
        while line != b"\\data\\":  # text before the header is a comment
            following = self._next()
            if following is None:
                raise self.error("the file has no line \\data\\, with which an ARPA file begins")
            line = following
        counts: list[int] = []
        line = self._next_filled()
        while not line.startswith(b"\\"):
            found = _COUNT.fullmatch(line)
            if found is None or int(found[1]) != len(counts) + 1:
                raise self.error(f"the header has {_shown(line)}, and 'ngram {len(counts) + 1}=COUNT' is due")
            counts.append(int(found[2]))
            line = self._next_filled()
        if not counts or not counts[0]:
            raise self.error("the header declares no unigrams")
        if len(counts) > MAX_ORDER:
            raise self.error(f"the header declares {len(counts)} orders, and the limit is {MAX_ORDER}")
        self._heading = line
        return counts

    def section(self, order: int, count: int, is_last: bool) -> _Section:
        """Returns the n-grams of an order, as many as the header declares."""
        expected = f"\\{order}-grams:".encode()
        if self._heading != expected:
            raise self.error(f"here is {_shown(self._heading)}, and {expected.decode()} is due")
        places: dict[tuple[bytes, ...], int] = {}
        probs, backoffs = list[float](), list[float]()
        while not (line := self._next_filled()).startswith(b"\\"):
            fields = [field for field in line.replace(b"\t", b" ").split(b" ") if field]
            if len(fields) - order not in (1, 2) or (is_last and len(fields) != order + 1):
                fields = self._without_zero(fields, order, is_last)
            if len(places) == count:
                raise self.error(f"there are more {order}-grams than the {count:,} of the header")
            ngram = tuple(fields[1 : order + 1])
            if places.setdefault(ngram, len(places)) < len(probs):
                raise self.error(f"the {order}-gram {_shown(b' '.join(ngram))} is there twice")
            probs.append(self._number(fields[0], is_probability=True))
            backoffs.append(self._number(fields[-1], False) if len(fields) > order + 1 else 0.0)
        if len(places) < count:
            raise self.error(f"there are {len(places):,} {order}-grams, and the header declares {count:,}")
        if order == 1:
            self._check_words(places)
        self._heading = line
        return _Section(order, places, np.array(probs, np.float32), np.array(backoffs, np.float32))

    def _without_zero(self, fields: list[bytes], order: int, is_last: bool) -> list[bytes]:
        """Returns the fields of a line of the highest order, whose backoff weight may only be 0."""
        if is_last and len(fields) == order + 2 and self._number(fields[-1], False) == 0:
            return fields[:-1]
        raise self.error(
            f"the line has {len(fields)} fields; it must have a logarithm and the words of a {order}-gram, "
            f"{'without' if is_last else 'with or without'} a backoff weight"
        )

    def _number(self, field: bytes, is_probability: bool) -> float:
        what = "log probability" if is_probability else "backoff weight"
        try:
            value = float(field)
        except ValueError:
            raise self.error(f"the {what} is {_shown(field)}, not a number") from None
        if is_probability and value == -np.inf:
            return NEVER
        if not np.isfinite(value):
            raise self.error(f"the {what} is {value}, which is not finite")
        if is_probability and value > 0:
            raise self.error(f"the {what} is {value:g}; a logarithm of a probability is at most 0")
        return value

    def _check_words(self, places: dict[tuple[bytes, ...], int]) -> None:
        for [word] in places:
            try:
                word.decode()
            except UnicodeDecodeError:
                raise self.error(f"the word {_shown(word)} is not UTF-8") from None

    def contexts(self, section: _Section, places: dict[tuple[bytes, ...], int]) -> np.ndarray:
        """Returns the place of the first words of each n-gram among the n-grams of the order below [G]."""
        contexts = [places.get(ngram[:-1], -1) for ngram in section.places]
        if -1 in contexts:
            ngram = list(section.places)[contexts.index(-1)]
            shown, missing = _shown(b" ".join(ngram)), _shown(b" ".join(ngram[:-1]))
            raise self.error(f"the {section.order}-gram {shown} is in the file, and its first words {missing} are not")
        return np.array(contexts, np.int64)

    def last_words(self, section: _Section, words: dict[bytes, int]) -> np.ndarray:
        """Returns the token id of the last word of each n-gram [G]."""
        ids = [words.get(ngram[-1], -1) for ngram in section.places]
        if -1 in ids:
            ngram = list(section.places)[ids.index(-1)]
            raise self.error(f"{_shown(ngram[-1])} of {_shown(b' '.join(ngram))} is not among the unigrams")
        return np.array(ids, np.int64)

    def end(self) -> None:
        """Raises UserError if the last section is not followed by the end of the file."""
        if self._heading != b"\\end\\":
            raise self.error(f"here is {_shown(self._heading)}, and \\end\\ is due")


def _shown(text: bytes) -> str:
    return short_repr(text.decode(errors="replace"))
