"""Tokenized text on disk, memory-mapped; it is written once for each combination of data and tokenizer, and cached."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config import RunConfig
from jaxlm.data import holdout, source, spool, token_ids, tokenizing
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.hub import model_files
from jaxlm.storage import disk

_PARTIAL = ".partial"  # suffix of the folder of an unfinished entry
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
                _build_from_token_ids(run, tokenizer, sentences, new, log)
            else:
                _build_in(run, tokenizer, sentences, work, new, log)
        except UserError:  # another call would need other data or settings
            shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
        checksums = {file.relative_to(new).as_posix(): _checksum(file) for file in _entry_files(new)}
        (new / _CHECKSUMS).write_text(json.dumps(checksums))


def _build_from_token_ids(
    run: RunConfig, tokenizer: Tokenizer | None, sentences: str | None, folder: Path, log: Callable[[str], None]
) -> None:
    """Writes tokenizer/, train/, held_out/ and rows.json from token ids that another program wrote."""
    assert run.model is not None
    data, vocabulary = run.data, run.model.vocabulary
    if tokenizer is None:
        raise UserError(
            "data.format is 'tokens', which requires the tokenizer that wrote the ids: give --tokenizer.path"
        )
    if sentences is not None:
        raise UserError(f"data.format is 'tokens', and {type(run.task).__name__} splits text into sentences; give text")
    train = token_ids.documents(data.path, tokenizer, vocabulary)
    if separate := source.held_out_paths(data):
        held_out = token_ids.documents(separate[0], tokenizer, vocabulary)
    else:
        train, held_out = token_ids.hold_out(train, data)
    for name, documents in {"train": train, "held_out": held_out}.items():
        log(f"copying the {name.replace('_', '-')} tokens")
        if not documents:
            raise UserError(f"there are no {name.replace('_', '-')} tokens in {data.eval_path or data.path}; give more")
        token_ids.write(folder / name, documents, tokenizer, sized=name == "held_out")
    tokenizer.save(str(folder / "tokenizer"))
    (folder / "rows.json").write_text(json.dumps({"documents": len(train) + len(held_out)}))


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
        progress = tokenizing.Progress(what, documents.bytes if name == "train" else 0, log)
        unsplit = run.tokenizer.split_special_tokens is not False
        if not tokenizing.tokenize(texts, tokenizer, split, work / name, unsplit, progress).tokens:
            raise UserError(
                f"there is no {name.replace('_', '-')} text in {data.eval_path or data.path}; "
                f"give more text, --data.eval-path, or another --data.eval-fraction than {data.eval_fraction}"
            )
    for name in ("train", "held_out"):
        tokenizing.finish(work / name, folder / name, tokenizing.dtype_of(tokenizer))
    shutil.copytree(work / "tokenizer", folder / "tokenizer")
    (folder / "rows.json").write_text(json.dumps(documents.rows))


def _open(folder: Path) -> Corpus:
    facts = json.loads((folder / "facts.json").read_text())
    file = folder / tokenizing.TOKENS
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
