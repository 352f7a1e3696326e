"""Tokenized text on disk, memory-mapped; it is written once for each combination of data and tokenizer, and cached."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config import RunConfig
from jaxlm.data import holdout, source
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.hub import model_files
from jaxlm.storage import disk

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
    """Writes the cache entry `folder` atomically; replaces a damaged one."""
    if os.path.lexists(folder) and not folder.is_dir():
        folder.unlink()
    # If another process writes the same entry at the same time, either result can be used.
    with disk.atomic_folder(folder, overwrite=True) as new:
        _build_in(run, tokenizer, sentences, new, log)
        checksums = {file.relative_to(new).as_posix(): _checksum(file) for file in _entry_files(new)}
        (new / _CHECKSUMS).write_text(json.dumps(checksums))


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
    run: RunConfig, tokenizer: Tokenizer | None, sentences: str | None, folder: Path, log: Callable[[str], None]
) -> None:
    """Writes tokenizer/, train/, held_out/ and rows.json."""
    assert run.model is not None
    data, rows = run.data, Counter[str]()
    read = lambda report=None: source.documents(data.path, data, data.split, Counter() if report is None else report)
    if separate := source.held_out_paths(data):
        train = read
        held_out = lambda: source.documents(separate[0], data, separate[2], Counter())
    else:
        options: dict[str, Any] = {"sampled": data.eval_choice == "sampled", "divide": data.documents == "file"}
        chosen = holdout.choose(read(), data.eval_fraction, data.eval_seed, **options)
        if options["sampled"] and chosen.hashes is None:
            log("there are too few documents for a sample; the end of the text is held out")
        train = lambda report=None: chosen.train(read(report))
        held_out = lambda: chosen.held_out(read())
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
    split = None if sentences is None else _SENTENCES[sentences]
    for name, texts in {"train": train(rows), "held_out": held_out()}.items():
        log(f"tokenizing the {name.replace('_', '-')} text")
        corpus = _write(texts, tokenizer, split, folder / name, run.tokenizer.split_special_tokens is not False)
        if not len(corpus.tokens):
            raise UserError(
                f"there is no {name.replace('_', '-')} text in {data.eval_path or data.path}; "
                f"give more text, --data.eval-path, or another --data.eval-fraction than {data.eval_fraction}"
            )
    tokenizer.save(str(folder / "tokenizer"))
    (folder / "rows.json").write_text(json.dumps(rows))


def _write(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    split: Callable[[str], list[str]] | None,
    folder: Path,
    split_special_tokens: bool,
) -> Corpus:
    """Tokenizes documents in chunks and writes the files of a corpus.

    Documents that are not split into sentences get the tokenizer's BOS and EOS, so that models learn where texts begin
    and end.  Sentences get no special tokens; the task adds them.
    """
    folder.mkdir(parents=True)
    dtype = np.uint16 if tokenizer.size <= 1 << 16 else np.uint32
    sentence_sizes: list[int] = []
    document_sizes: list[int] = []
    document_bytes: list[int] = []
    before = [] if tokenizer.bos is None else [tokenizer.bos]
    after = [] if tokenizer.eos in (None, tokenizer.bos) else [tokenizer.eos]
    with open(folder / "tokens.bin", "wb") as file:
        for chunk in _chunks(texts, characters=1 << 20):
            documents = [[text] if split is None else [s for s in split(text) if s.strip()] for text in chunk]
            sentences = [sentence for document in documents for sentence in document]
            encoded = tokenizer.encode_batch(sentences, split_special_tokens)
            if split is None:
                encoded = [before + ids + after for ids in encoded]
            sentence_sizes += map(len, encoded)
            document_sizes += [len(document) for document in documents if document]
            document_bytes += [len(text.encode()) for text, document in zip(chunk, documents) if document]
            file.write(np.array([i for ids in encoded for i in ids], dtype).tobytes())
    np.save(folder / "sentences.npy", np.cumsum([0, *sentence_sizes]))
    np.save(folder / "documents.npy", np.cumsum([0, *document_sizes]))
    np.save(folder / "document_bytes.npy", np.array(document_bytes, np.int64))
    (folder / "facts.json").write_text(json.dumps({"bytes": sum(document_bytes), "dtype": np.dtype(dtype).name}))
    return _open(folder)


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
