"""Tokenizes documents into the files of a corpus, with progress, and continues after a crash."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxlm.data.ahead import prefetch
from jaxlm.data.joined import offsets
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.storage import disk

TOKENS = "tokens.bin"  # the tokens of a corpus
_FILES = (TOKENS, "sentence_sizes.bin", "document_sizes.bin", "document_bytes.bin")  # of an unfinished corpus
_PROGRESS = "progress.json"  # how much of each of them is valid
CHUNK = 1 << 20  # characters that are tokenized at once
THREADS = 3  # chunks of text that are tokenized at once
SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_SAVES = 15, 15  # of the progress of a long text


class Progress:
    """Prints the speed and the remaining time of a long text, a few times per minute."""

    def __init__(self, what: str, size: int, log: Callable[[str], None]):
        self._what, self._size, self._log = what, size, log
        self._start = self._printed = time.monotonic()
        self._done_before: int | None = None

    def report(self, done: int, tokens: int) -> None:
        """Prints a line, unless the last one is recent.

        Args:
          done: bytes of the text that are tokenized.
          tokens: their tokens.
        """
        now = time.monotonic()
        if self._done_before is None:
            self._done_before = done  # an earlier call made these
        if now - self._printed < SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        speed = (done - self._done_before) / (now - self._start)
        left = max(0, self._size - done) / speed if speed and self._size else 0
        of = f" of {self._size / 1e6:,.0f}" if self._size else ""
        remaining = f", {int(left // 60)}:{int(left % 60):02} left" if left else ""
        self._log(f"{self._what}: {done / 1e6:,.0f}{of} MB, {tokens:,} tokens, {speed / 1e6:.1f} MB/s{remaining}")


class Sizes(NamedTuple):
    """What the files of an unfinished corpus contain, in entries."""

    tokens: int = 0
    sentences: int = 0
    documents: int = 0
    bytes: int = 0  # of the text
    texts: int = 0  # documents read, including those without tokens


def tokenize(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    split: Callable[[str], list[str]] | None,
    folder: Path,
    split_special_tokens: bool,
    progress: Progress,
) -> Sizes:
    """Tokenizes documents in chunks, several at once, and writes the files of an unfinished corpus.

    Documents that are not split into sentences get the tokenizer's BOS and EOS, so that models learn where texts begin
    and end.  Sentences get no special tokens; the task adds them.

    Args:
      texts: the documents.
      tokenizer: the tokenizer.
      split: splits a document into sentences; None: each is one.
      folder: folder of the files, which a call after a crash continues.
      split_special_tokens: as in `Tokenizer.encode`.
      progress: prints the progress.

    Returns:
      What the files contain.
    """
    dtype = dtype_of(tokenizer)
    before = [] if tokenizer.bos is None else [tokenizer.bos]
    after = [] if tokenizer.eos in (None, tokenizer.bos) else [tokenizer.eos]

    def encode(chunk: list[str]) -> tuple[list[str], list[np.ndarray]]:
        documents = [[text] if split is None else [s for s in split(text) if s.strip()] for text in chunk]
        sentences = [sentence for document in documents for sentence in document]
        encoded = tokenizer.encode_batch(sentences, split_special_tokens)
        if split is None:
            encoded = [before + ids + after for ids in encoded]
        sizes = np.fromiter(map(len, encoded), np.int64, len(encoded))
        tokens = np.fromiter(chain.from_iterable(encoded), dtype, int(sizes.sum()))
        lengths = np.array([len(document) for document in documents if document], np.int64)
        contents = [len(text.encode()) for text, document in zip(chunk, documents) if document]
        return chunk, [tokens, sizes, lengths, np.array(contents, np.int64)]

    folder.mkdir(parents=True, exist_ok=True)
    facts = folder / _PROGRESS
    done = Sizes(**json.loads(facts.read_text())) if facts.exists() else Sizes()
    bytes_of = lambda done: [done.tokens * dtype.itemsize, 8 * done.sentences, 8 * done.documents, 8 * done.documents]
    paths = [folder / name for name in _FILES]
    if not all(path.exists() and path.stat().st_size >= size for path, size in zip(paths, bytes_of(done))):
        done = Sizes()
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "ab")) for path in paths]
        for file, size in zip(files, bytes_of(done)):
            file.truncate(size)  # what was written after the progress was saved

        def save() -> None:
            for file in files:
                file.flush()
                os.fsync(file.fileno())
            disk.write(facts, json.dumps(done._asdict()))

        saved = time.monotonic()
        # The tokenizer uses all cores; meanwhile another thread converts the previous result.
        for chunk, arrays in prefetch(encode, _chunks(islice(texts, done.texts, None), CHUNK), THREADS, THREADS):
            for file, array in zip(files, arrays):
                file.write(array.tobytes())
            added = len(arrays[0]), len(arrays[1]), len(arrays[2]), int(arrays[3].sum()), len(chunk)
            done = Sizes(*map(sum, zip(done, added)))
            progress.report(done.bytes, done.tokens)
            if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                save()
                saved = time.monotonic()
        save()
    return done


def finish(work: Path, folder: Path, dtype: np.dtype) -> None:
    """Moves the files of a tokenized corpus into its folder, in their final form."""
    folder.mkdir(parents=True)
    shutil.move(work / _FILES[0], folder / TOKENS)
    write_index(folder, dtype, *(np.fromfile(work / name, np.int64) for name in _FILES[1:]))


def write_index(
    folder: Path,
    dtype: np.dtype,
    sentence_sizes: np.ndarray,
    document_sizes: np.ndarray,
    document_bytes: np.ndarray,
) -> None:
    """Writes the files of a corpus besides its tokens.

    Args:
      folder: the folder of the corpus.
      dtype: of the tokens.
      sentence_sizes: number of tokens of each sentence.
      document_sizes: number of sentences of each document.
      document_bytes: size of each document in UTF-8.
    """
    np.save(folder / "sentences.npy", offsets(sentence_sizes))
    np.save(folder / "documents.npy", offsets(document_sizes))
    np.save(folder / "document_bytes.npy", document_bytes)
    (folder / "facts.json").write_text(json.dumps({"bytes": int(document_bytes.sum()), "dtype": dtype.name}))


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """Returns the smallest dtype of its tokens."""
    return np.dtype(np.uint16 if tokenizer.size <= 1 << 16 else np.uint32)


def _chunks(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Yields lists of consecutive texts with at least this many characters in total."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= characters:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
