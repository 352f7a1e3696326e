"""Tokenized text on disk, memory-mapped; it is written once for each combination of data and tokenizer, and cached."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config import DataConfig, RunConfig
from jaxlm.data import holdout, source, spool
from jaxlm.data.formats import tokens
from jaxlm.data.joined import offsets
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.hub import model_files
from jaxlm.storage import disk

_PARTIAL = ".partial"  # suffix of the folder of an unfinished entry
_FILES = ("tokens.bin", "sentence_sizes.bin", "document_sizes.bin", "document_bytes.bin")  # of an unfinished corpus
_PROGRESS = "progress.json"  # how much of each of them is valid
CHUNK = 1 << 20  # characters that are tokenized at once
THREADS = 3  # chunks of text that are tokenized at once
SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_SAVES = 15, 15  # of the progress of a long text
_CHECKSUMS = "checksums.json"  # size and hash of every other file of a cache entry
_FORMAT = 5  # version of the file formats; a new number invalidates all cache entries
# How documents are split into sentences; the sentences contain all of the document, including white space.
_SENTENCES: dict[str, Callable[[str], list[str]]] = {
    "line": lambda text: text.splitlines(keepends=True),
    "punctuation": re.compile(r"(?<=[.!?])(?=\s)").split,
    "whole": lambda text: [text],
}


class Corpus(NamedTuple):
    """Tokens of documents, which consist of sentences.

    Sentence s is `tokens[sentences[s]:sentences[s + 1]]`; document d consists of the sentences `documents[d]` to
    `documents[d + 1] - 1`.
    """

    tokens: np.ndarray  # [N] unsigned
    sentences: np.ndarray  # [number of sentences + 1] int64
    documents: np.ndarray  # [number of documents + 1] int64
    bytes: int  # size of the text in UTF-8
    document_bytes: np.ndarray | None = None  # [number of documents] int64; their sum is `bytes`

    @property
    def summary(self) -> str:
        """The number of tokens, for printing."""
        return f"{len(self.tokens):,} tokens"

    @property
    def bounds(self) -> np.ndarray:
        """Offsets of the documents in `tokens` [number of documents + 1]."""
        return self.sentences[self.documents]


class Prepared(NamedTuple):
    """The data of a run."""

    tokenizer: Tokenizer
    train: Any  # training data: a Corpus, or the Records of a task with labels
    held_out: Any  # held-out data, of the same type
    rows: dict[str, int]  # number of rows, and of the changes of each cleaning step
    fingerprint: str  # hash of the contents of data and tokenizer
    labels: Any = ()  # names of the head's outputs; for several tasks, by name of the task


def prepare(run: RunConfig, log: Callable[[str], None] = print, tokenizer: Tokenizer | None = None) -> Prepared:
    """Reads, cleans and tokenizes the data of a run, or loads the result from the cache.

    Args:
      run: the config of the run.
      log: prints a message about the progress.
      tokenizer: replaces the tokenizer of the run.

    Raises:
      UserError: for invalid data.
    """
    data, sentences = run.data, getattr(run.task, "sentences", None)
    assert run.model is not None
    fingerprint = source.fingerprint(data.path) + (source.fingerprint(data.eval_path) if data.eval_path else "")
    options = dataclasses.replace(data, path="", eval_path="", length=0, cache="")
    content: dict[str, Any] = {
        "format": _FORMAT,
        "data": [fingerprint, dataclasses.asdict(options), sentences],
        "tokenizer": dataclasses.asdict(run.tokenizer),
        "vocabulary": run.model.vocabulary,
        "structure": run.model.structure,  # determines the special tokens of a trained tokenizer
    }
    config = run.tokenizer
    existing = tokenizer or (tokenizers.load(config.path, config.split_special_tokens) if config.path else None)
    if existing is not None:
        content["tokenizer"] |= {"path": tokenizers.fingerprint(existing)}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    folder = disk.cache_folder(data.cache) / key
    damage = _find_damage(folder)
    if damage and os.path.lexists(folder):
        log(f"the cached tokens in {folder} are damaged ({damage}); tokenizing again")
    if damage:
        _build(run, existing, sentences, folder, log)
    rows = json.loads((folder / "rows.json").read_text())
    tokenizer = tokenizer or tokenizers.load(str(folder / "tokenizer"))
    return Prepared(tokenizer, _open(folder / "train"), _open(folder / "held_out"), rows, key)


def _build(
    run: RunConfig, tokenizer: Tokenizer | None, sentences: str | None, folder: Path, log: Callable[[str], None]
) -> None:
    """Writes the cache entry `folder` atomically; replaces a damaged one.

    The work is done in a folder next to it, in which a later call continues after a crash. Another process that needs
    the same entry at the same time works in a temporary folder; either result can be used.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        folder.unlink()
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(f"{folder.name}{_PARTIAL}")
    with ExitStack() as stack:
        new = stack.enter_context(disk.atomic_folder(folder, overwrite=True))
        try:
            stack.enter_context(disk.lock(disk.lock_path(work), str(work), "wait for the other process"))
        except UserError:
            work = new / "work"
        try:
            if run.data.format == "tokens":
                _build_from_tokens(run, tokenizer, sentences, new, log)
            else:
                _build_in(run, tokenizer, sentences, work, new, log)
        except UserError:  # another call would need other data or settings
            shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
        checksums = {file.relative_to(new).as_posix(): _checksum(file) for file in _entry_files(new)}
        (new / _CHECKSUMS).write_text(json.dumps(checksums))


def _build_from_tokens(
    run: RunConfig, tokenizer: Tokenizer | None, sentences: str | None, folder: Path, log: Callable[[str], None]
) -> None:
    """Writes the files of an entry from token ids that another program wrote.

    A document begins with the tokenizer's BOS token, or ends with its EOS token if that is another one. Without such
    tokens, each file is a document.
    """
    assert run.model is not None
    data = run.data
    if tokenizer is None or sentences is not None:
        raise UserError(
            "data.format is 'tokens', which requires the tokenizer that wrote the ids: give --tokenizer.path"
            if tokenizer is None
            else f"data.format is 'tokens', and {type(run.task).__name__} splits text into sentences; give text"
        )
    parts = {"train": _token_documents(data.path, tokenizer, run.model.vocabulary)}
    if separate := source.held_out_paths(data):
        parts["held_out"] = _token_documents(separate[0], tokenizer, run.model.vocabulary)
    else:
        parts = dict(zip(("train", "held_out"), _hold_out_tokens(parts["train"], data)))
    dtype = _dtype(tokenizer)
    for name, documents in parts.items():
        log(f"copying the {name.replace('_', '-')} tokens")
        if not documents:
            raise UserError(f"there are no {name.replace('_', '-')} tokens in {data.eval_path or data.path}; give more")
        (folder / name).mkdir(parents=True)
        with open(folder / name / "tokens.bin", "wb") as file:
            for document in documents:
                file.write(document.astype(dtype).tobytes())
        contents = np.zeros(len(documents), np.int64)
        if name == "held_out":  # only the score of held-out text needs its size in bytes
            contents[:] = [len(tokenizer.decode(document).encode()) for document in documents]
        np.save(folder / name / "sentences.npy", offsets(np.array([len(document) for document in documents])))
        np.save(folder / name / "documents.npy", np.arange(len(documents) + 1))
        np.save(folder / name / "document_bytes.npy", contents)
        (folder / name / "facts.json").write_text(json.dumps({"bytes": int(contents.sum()), "dtype": dtype.name}))
    tokenizer.save(str(folder / "tokenizer"))
    (folder / "rows.json").write_text(json.dumps({"documents": sum(map(len, parts.values()))}))


def _hold_out_tokens(documents: list[np.ndarray], data: DataConfig) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns the documents to train on and those to hold out; a single document is divided."""
    sizes, fraction = [len(document) for document in documents], data.eval_fraction
    if len(documents) == 1:
        parts = np.split(documents[0], [round(sizes[0] * (1 - fraction))])
        return [part for part in parts[:1] if len(part)], [part for part in parts[1:] if len(part)]
    hashes = [holdout.content_hash(document.tobytes(), data.eval_seed) for document in documents]
    chosen = holdout.choose_hashes(hashes, sizes, fraction) if data.eval_choice == "sampled" else set()
    if chosen:
        is_held_out = [content in chosen for content in hashes]
    else:  # the last documents, at least one
        is_held_out = (np.cumsum(sizes) > sum(sizes) * (1 - fraction)).tolist()
        is_held_out[:1] = [False]
    choose = lambda held: [document for document, is_held in zip(documents, is_held_out) if is_held == held]
    return choose(False), choose(True)


def _token_documents(path: str, tokenizer: Tokenizer, vocabulary: int) -> list[np.ndarray]:
    """Returns the documents in files of token ids, without copying them."""
    found: list[np.ndarray] = []
    for file in source.list_files(path):
        ids = tokens.read(file)
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK]
            if not 0 <= chunk.min() <= chunk.max() < min(vocabulary, tokenizer.size):
                wrong = chunk.min() if chunk.min() < 0 else chunk.max()
                raise UserError(
                    f"{file} holds the token id {wrong:,}; the tokenizer has {tokenizer.size:,} tokens, and "
                    f"model.vocabulary is {vocabulary:,}: give the tokenizer that wrote the file"
                )
        begins = tokenizer.bos is not None
        mark = tokenizer.bos if begins else tokenizer.eos
        cuts = np.zeros(0, np.int64) if mark is None else np.flatnonzero(ids == mark) + (not begins)
        found += [part for part in np.split(ids, cuts) if len(part)]
    return found


def _find_damage(folder: Path) -> str:
    """Returns a description of a missing or changed file of a cache entry; "" if the entry is intact."""
    try:
        if not (folder / _CHECKSUMS).exists():
            return f"{_CHECKSUMS} is missing"
        checksums = model_files.read_object(folder / _CHECKSUMS)
        if not checksums:
            return f"{_CHECKSUMS} lists no files"
        files = {file.relative_to(folder).as_posix(): file for file in _entry_files(folder)}
        if unmatched := sorted(checksums.keys() ^ files.keys()):
            return f"{unmatched[0]} is {'missing' if unmatched[0] in checksums else 'not one of its files'}"
        return next((f"{name} has changed" for name, file in files.items() if _checksum(file) != checksums[name]), "")
    except (OSError, UserError) as error:
        return getattr(error, "strerror", None) or f"{_CHECKSUMS} cannot be read"


def _entry_files(folder: Path) -> list[Path]:
    """Returns everything in a cache entry except the checksums and folders."""
    return [file for file in sorted(folder.rglob("*")) if file.name != _CHECKSUMS and not file.is_dir()]


def _checksum(file: Path) -> list[int | str]:
    return [file.stat().st_size, disk.content_hash(file)]


def _build_in(
    run: RunConfig,
    tokenizer: Tokenizer | None,
    sentences: str | None,
    work: Path,
    folder: Path,
    log: Callable[[str], None],
) -> None:
    """Writes tokenizer/, train/, held_out/ and rows.json into `folder`; unfinished files are in `work`."""
    assert run.model is not None
    data = run.data
    # Several passes read the documents; the data itself is read once.
    documents = spool.write(work / "texts", lambda rows: source.documents(data.path, data, data.split, rows))
    if separate := source.held_out_paths(data):
        train: Callable[[], Iterator[str]] = lambda: iter(documents)
        held_out = lambda: source.documents(separate[0], data, separate[2], Counter())
    else:
        options: dict[str, Any] = {"sampled": data.eval_choice == "sampled", "divide": data.documents == "file"}
        chosen = holdout.choose(documents, data.eval_fraction, data.eval_seed, **options)
        if options["sampled"] and chosen.hashes is None:
            log("there are too few documents for a sample; the end of the text is held out")
        train = lambda: chosen.train(documents)
        held_out = lambda: chosen.held_out(documents)
    if (work / "tokenizer").exists():  # of an earlier call
        tokenizer = tokenizers.load(str(work / "tokenizer"))
    if tokenizer is None:
        log(f"training a {run.tokenizer.train} tokenizer of {run.model.vocabulary:,} tokens")
        texts = holdout.sample(train, run.tokenizer.max_training_characters)
        tokenizer = tokenizers.train(
            texts,
            run.tokenizer,
            run.model.vocabulary,
            add_bos=run.model.structure == "decoder",
            add_eos=run.model.structure == "encoder_decoder",
        )
    if tokenizer.size > run.model.vocabulary:
        size = tokenizer.size
        remedy = f"set --model.vocabulary {size}"
        if run.init:
            remedy = (
                f"resize the model in Python with jaxlm.save(jaxlm.resize(jaxlm.load({run.init!r}), {size}), FOLDER), "
                f"and start from it with --init FOLDER"
            )
        raise UserError(f"the tokenizer has {size} tokens, but model.vocabulary is {run.model.vocabulary}; {remedy}")
    if not (work / "tokenizer").exists():
        with disk.atomic_folder(work / "tokenizer") as new:
            tokenizer.save(str(new))
    split = None if sentences is None else _SENTENCES[sentences]
    for name, texts in {"train": train(), "held_out": held_out()}.items():
        what = f"tokenizing the {name.replace('_', '-')} text"
        log(what)
        progress = _Progress(what, documents.bytes if name == "train" else 0, log)
        unsplit = run.tokenizer.split_special_tokens is not False
        if not _tokenize(texts, tokenizer, split, work / name, unsplit, progress).tokens:
            raise UserError(
                f"there is no {name.replace('_', '-')} text in {data.eval_path or data.path}; "
                f"give more text, --data.eval-path, or another --data.eval-fraction than {data.eval_fraction}"
            )
    for name in ("train", "held_out"):
        _finish(work / name, folder / name, _dtype(tokenizer))
    shutil.copytree(work / "tokenizer", folder / "tokenizer")
    (folder / "rows.json").write_text(json.dumps(documents.rows))


class _Progress:
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


class _Sizes(NamedTuple):
    """What the files of an unfinished corpus contain, in entries."""

    tokens: int = 0
    sentences: int = 0
    documents: int = 0
    bytes: int = 0  # of the text
    texts: int = 0  # documents read, including those without tokens


def _tokenize(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    split: Callable[[str], list[str]] | None,
    folder: Path,
    split_special_tokens: bool,
    progress: _Progress,
) -> _Sizes:
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
    dtype = _dtype(tokenizer)
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
    done = _Sizes(**json.loads(facts.read_text())) if facts.exists() else _Sizes()
    bytes_of = lambda done: [done.tokens * dtype.itemsize, 8 * done.sentences, 8 * done.documents, 8 * done.documents]
    paths = [folder / name for name in _FILES]
    if not all(path.exists() and path.stat().st_size >= size for path, size in zip(paths, bytes_of(done))):
        done = _Sizes()
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
        for chunk, arrays in _map_ahead(encode, _chunks(islice(texts, done.texts, None), CHUNK)):
            for file, array in zip(files, arrays):
                file.write(array.tobytes())
            added = len(arrays[0]), len(arrays[1]), len(arrays[2]), int(arrays[3].sum()), len(chunk)
            done = _Sizes(*map(sum, zip(done, added)))
            progress.report(done.bytes, done.tokens)
            if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                save()
                saved = time.monotonic()
        save()
    return done


def _finish(work: Path, folder: Path, dtype: np.dtype) -> None:
    """Moves the files of a tokenized corpus into its folder, in their final form."""
    folder.mkdir(parents=True)
    shutil.move(work / _FILES[0], folder / _FILES[0])
    sentence_sizes, document_sizes, document_bytes = (np.fromfile(work / name, np.int64) for name in _FILES[1:])
    np.save(folder / "sentences.npy", offsets(sentence_sizes))
    np.save(folder / "documents.npy", offsets(document_sizes))
    np.save(folder / "document_bytes.npy", document_bytes)
    (folder / "facts.json").write_text(json.dumps({"bytes": int(document_bytes.sum()), "dtype": dtype.name}))


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    """Returns the smallest dtype of its tokens."""
    return np.dtype(np.uint16 if tokenizer.size <= 1 << 16 else np.uint32)


def _map_ahead(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Yields `function(item)` for each item in order, computed by a few threads for the next items.

    The tokenizer itself uses all cores; meanwhile another thread converts the previous result.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        pending: deque[Any] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _open(folder: Path) -> Corpus:
    facts = json.loads((folder / "facts.json").read_text())
    file = folder / "tokens.bin"
    # An empty file cannot be memory-mapped.
    tokens = np.memmap(file, facts["dtype"], "r") if file.stat().st_size else np.zeros(0, facts["dtype"])
    arrays = {name: _map(folder / f"{name}.npy") for name in ("sentences", "documents", "document_bytes")}
    return Corpus(tokens=tokens, bytes=facts["bytes"], **arrays)


def _map(file: Path) -> np.ndarray:
    """Returns an array that is read from its file where it is used."""
    found = np.load(file, mmap_mode="r")
    return found if found.size else np.array(found)


def sample_documents(corpus: Corpus, tokens: int, tokenizer: Tokenizer) -> Corpus:
    """Returns a random sample of the documents of a corpus.

    Args:
      corpus: the corpus.
      tokens: maximum number of tokens of the sample; 0: the whole corpus.
      tokenizer: the tokenizer, to determine the size of a truncated document.

    Returns:
      The sample in the original order; if no document is short enough, the first tokens of one document.
    """
    total = len(corpus.tokens)
    if not tokens or total <= tokens or corpus.document_bytes is None:
        return corpus
    bounds = corpus.bounds
    order = np.random.default_rng(0).permutation(len(bounds) - 1)
    ends = np.cumsum(np.diff(bounds)[order])
    chosen = np.sort(order[: np.searchsorted(ends, tokens, side="right")])
    if not len(chosen):
        return _truncate_document(corpus, int(order[0]), tokens, tokenizer)
    parts = [corpus.tokens[bounds[d] : bounds[d + 1]] for d in chosen]
    starts = [corpus.sentences[corpus.documents[d] : corpus.documents[d + 1]] for d in chosen]
    sizes = [np.diff(corpus.sentences[corpus.documents[d] : corpus.documents[d + 1] + 1]) for d in chosen]
    sentences = np.cumsum([0, *np.concatenate(sizes).tolist()])
    documents = np.cumsum([0, *map(len, starts)])
    document_bytes = corpus.document_bytes[chosen]
    return Corpus(np.concatenate(parts), sentences, documents, int(document_bytes.sum()), document_bytes)


def _truncate_document(corpus: Corpus, document: int, tokens: int, tokenizer: Tokenizer) -> Corpus:
    """Returns the first tokens of a document as a corpus."""
    start = corpus.bounds[document]
    tokens_N = np.asarray(corpus.tokens[start : start + tokens])
    inside = (corpus.sentences > start) & (corpus.sentences < start + tokens)
    sentences = np.array([0, *(corpus.sentences[inside] - start), tokens], np.int64)
    size = len(tokenizer.decode(tokens_N).encode())
    return Corpus(tokens_N, sentences, np.array([0, len(sentences) - 1]), size, np.array([size]))


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
