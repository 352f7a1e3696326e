"""Text once tokenized lies on disk, memory-mapped; it is made once for each (data, tokenizer) and found again."""

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

from jaxlm.config import DataConfig, RunConfig
from jaxlm.data import holdout, source
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.hub import model_files
from jaxlm.storage import disk

_CHECKSUMS = "checksums.json"  # of every other file of an entry: size and hash
_FORMAT = 5  # of the files below; a new number makes everything anew
# How a document is divided into sentences; together they are the document, white space included.
_SENTENCES: dict[str, Callable[[str], list[str]]] = {
    "line": lambda text: text.splitlines(keepends=True),
    "punctuation": re.compile(r"(?<=[.!?])(?=\s)").split,
    "whole": lambda text: [text],
}


class Corpus(NamedTuple):
    """Tokens of documents, each made of sentences.  Sentence s is `tokens[sentences[s]:sentences[s + 1]]`, and
    document d has the sentences `documents[d]` to `documents[d + 1]`."""

    tokens: np.ndarray  # [N] unsigned
    sentences: np.ndarray  # [number of sentences + 1] int64
    documents: np.ndarray  # [number of documents + 1] int64
    bytes: int  # of the text, UTF-8
    document_bytes: np.ndarray | None = None  # [number of documents] int64, of which `bytes` is the sum

    @property
    def said(self) -> str:
        """How much there is."""
        return f"{len(self.tokens):,} tokens"

    @property
    def bounds(self) -> np.ndarray:
        """Offsets of the documents in `tokens` [number of documents + 1]."""
        return self.sentences[self.documents]


class Prepared(NamedTuple):
    """What a run reads, and what is known of it."""

    tokenizer: Tokenizer
    train: Any  # a Corpus, or the Records of a task over records
    held_out: Any
    rows: dict[str, int]  # how many rows were read, and what cleaning did to them
    fingerprint: str  # of the content of data and tokenizer, wherever they lie
    labels: Any = ()  # names of the outputs of the head that the task reads; of several tasks, by their names


def prepare(run: RunConfig, say: Callable[[str], None] = print, tokenizer: Tokenizer | None = None) -> Prepared:
    """Reads, cleans and tokenizes the data of a run, or finds it in the cache.

    tokenizer: to be used in place of the run's.

    Raises UserError for bad data.
    """
    data, sentences = run.data, getattr(run.task, "sentences", None)
    assert run.model is not None
    fingerprint = source.fingerprint(data.path) + (source.fingerprint(data.eval_path) if data.eval_path else "")
    told = dataclasses.replace(data, path="", eval_path="", length=0, cache="")
    made_of: dict[str, Any] = {
        "format": _FORMAT,
        "data": [fingerprint, dataclasses.asdict(told), sentences],
        "tokenizer": dataclasses.asdict(run.tokenizer),
        "vocabulary": run.model.vocabulary,
        "structure": run.model.structure,  # what stands around a text of a tokenizer that is trained
    }
    how = run.tokenizer
    given = tokenizer or (tokenizers.load(how.path, how.split_special_tokens) if how.path else None)
    if given is not None:
        made_of["tokenizer"] |= {"path": tokenizers.fingerprint(given)}
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder(data) / key
    damage = _damage(folder)
    if damage and os.path.lexists(folder):
        say(f"the cached tokens in {folder} are damaged ({damage}); they are made again")
    if damage:
        _build(run, given, sentences, folder, say)
    rows = json.loads((folder / "rows.json").read_text())
    tokenizer = tokenizer or tokenizers.load(str(folder / "tokenizer"))
    return Prepared(tokenizer, _open(folder / "train"), _open(folder / "held_out"), rows, key)


def cache_folder(data: DataConfig) -> Path:
    """Where tokenized data is kept: `data.cache`, else $JAXLM_CACHE, else ~/.cache/jaxlm."""
    return disk.local(data.cache, "data.cache") if data.cache else disk.cache_folder()


def _build(
    run: RunConfig, given: Tokenizer | None, sentences: str | None, folder: Path, say: Callable[[str], None]
) -> None:
    """Makes the cache entry `folder`, in place of a damaged one; half of an entry is never read."""
    if os.path.lexists(folder) and not folder.is_dir():
        folder.unlink()
    # Another process may make the same entry at the same time: either serves.
    with disk.atomic_folder(folder, overwrite=True) as made:
        _build_in(run, given, sentences, made, say)
        whole = {file.relative_to(made).as_posix(): _checksum(file) for file in _files(made)}
        (made / _CHECKSUMS).write_text(json.dumps(whole))


def _damage(folder: Path) -> str:
    """Returns what is wrong with a cache entry: which file is not what was written; "" where nothing is."""
    try:
        if not (folder / _CHECKSUMS).exists():
            return f"{_CHECKSUMS} is missing"
        whole = model_files.read_object(folder / _CHECKSUMS)
        if not whole:
            return f"{_CHECKSUMS} lists no files"
        there = {file.relative_to(folder).as_posix(): file for file in _files(folder)}
        if other := sorted(whole.keys() ^ there.keys()):
            return f"{other[0]} is {'missing' if other[0] in whole else 'not one of its files'}"
        return next((f"{name} has changed" for name, file in there.items() if _checksum(file) != whole[name]), "")
    except (OSError, UserError) as error:
        return getattr(error, "strerror", None) or f"{_CHECKSUMS} cannot be read"


def _files(folder: Path) -> list[Path]:
    """Returns all that an entry holds but its checksums and folders: a link or a pipe has no checksum."""
    return [file for file in sorted(folder.rglob("*")) if file.name != _CHECKSUMS and not file.is_dir()]


def _checksum(file: Path) -> list[int | str]:
    return [file.stat().st_size, disk.content_hash(file)]


def _build_in(
    run: RunConfig, given: Tokenizer | None, sentences: str | None, folder: Path, say: Callable[[str], None]
) -> None:
    """Writes tokenizer/, train/, held_out/ and rows.json."""
    assert run.model is not None
    data, rows = run.data, Counter[str]()
    read = lambda path, split, count: source.documents(path, data, split, count)
    if apart := source.held_out(data):
        train = lambda count=None: read(data.path, data.split, Counter() if count is None else count)
        held_out = lambda: read(apart[0], apart[2], Counter())
    else:
        everything = lambda count=None: read(data.path, data.split, Counter() if count is None else count)
        how: dict[str, Any] = {"sampled": data.eval_choice == "sampled", "divide": data.documents == "file"}
        chosen = holdout.choose(everything(), data.eval_fraction, data.eval_seed, **how)
        if how["sampled"] and chosen.hashes is None:
            say("the documents are too few for a sample; the end of the text is held out")
        train = lambda count=None: chosen.train(everything(count))
        held_out = lambda: chosen.held_out(everything())
    if given is not None:
        tokenizer = given
    else:
        say(f"training a {run.tokenizer.train} tokenizer of {run.model.vocabulary:,} tokens")
        texts = holdout.sample(train, run.tokenizer.max_training_characters)
        tokenizer = tokenizers.train(
            texts,
            run.tokenizer,
            run.model.vocabulary,
            begun=run.model.structure == "decoder",
            ended=run.model.structure == "encoder_decoder",
        )
    if tokenizer.size > run.model.vocabulary:
        size = tokenizer.size
        remedy = f"raise it with --model.vocabulary {size}"
        if run.init:
            remedy = (
                f"give the weights as many rows in Python, "
                f"jaxlm.save(jaxlm.resize(jaxlm.load({run.init!r}), {size}), FOLDER), and begin with --init FOLDER"
            )
        raise UserError(
            f"the tokenizer has {size} tokens, the model's vocabulary {run.model.vocabulary} rows for tokens; {remedy}"
        )
    split = None if sentences is None else _SENTENCES[sentences]
    for name, texts in {"train": train(rows), "held_out": held_out()}.items():
        say(f"tokenizing the {name.replace('_', '-')} text")
        corpus = _write(texts, tokenizer, split, folder / name, run.tokenizer.split_special_tokens is not False)
        if not len(corpus.tokens):
            raise UserError(
                f"no {name.replace('_', '-')} text is left of {data.eval_path or data.path}; "
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
    """Tokenizes documents, some thousand at a time, into the files of a corpus.

    Undivided documents are wrapped in the tokenizer's BOS and EOS, so that a model learns where text begins and ends;
    sentences are kept bare, for the task to wrap.
    """
    folder.mkdir(parents=True)
    dtype = np.uint16 if tokenizer.size <= 1 << 16 else np.uint32
    sentence_sizes: list[int] = []
    document_sizes: list[int] = []
    document_bytes: list[int] = []
    before = [] if tokenizer.bos is None else [tokenizer.bos]
    after = [] if tokenizer.eos in (None, tokenizer.bos) else [tokenizer.eos]
    with open(folder / "tokens.bin", "wb") as file:
        for some in _batches(texts, characters=1 << 20):
            divided = [[text] if split is None else [s for s in split(text) if s.strip()] for text in some]
            sentences = [sentence for document in divided for sentence in document]
            encoded = tokenizer.encode_batch(sentences, split_special_tokens)
            if split is None:
                encoded = [before + ids + after for ids in encoded]
            sentence_sizes += map(len, encoded)
            document_sizes += [len(document) for document in divided if document]
            document_bytes += [len(text.encode()) for text, document in zip(some, divided) if document]
            file.write(np.array([i for ids in encoded for i in ids], dtype).tobytes())
    np.save(folder / "sentences.npy", np.cumsum([0, *sentence_sizes]))
    np.save(folder / "documents.npy", np.cumsum([0, *document_sizes]))
    np.save(folder / "document_bytes.npy", np.array(document_bytes, np.int64))
    (folder / "facts.json").write_text(json.dumps({"bytes": sum(document_bytes), "dtype": np.dtype(dtype).name}))
    return _open(folder)


def _open(folder: Path) -> Corpus:
    facts = json.loads((folder / "facts.json").read_text())
    file = folder / "tokens.bin"
    # An empty file cannot be mapped.
    tokens = np.memmap(file, facts["dtype"], "r") if file.stat().st_size else np.zeros(0, facts["dtype"])
    arrays = {name: np.load(folder / f"{name}.npy") for name in ("sentences", "documents", "document_bytes")}
    return Corpus(tokens=tokens, bytes=facts["bytes"], **arrays)


def capped(corpus: Corpus, tokens: int, tokenizer: Tokenizer) -> Corpus:
    """Returns documents of a corpus from all over it, of at most so many tokens together; 0: the corpus.

    Of a document that is longer, its beginning.
    """
    total = len(corpus.tokens)
    if not tokens or total <= tokens or corpus.document_bytes is None:
        return corpus
    bounds = corpus.bounds
    order = np.random.default_rng(0).permutation(len(bounds) - 1)
    ends = np.cumsum(np.diff(bounds)[order])
    chosen = np.sort(order[: np.searchsorted(ends, tokens, side="right")])
    if not len(chosen):
        return _beginning(corpus, int(order[0]), tokens, tokenizer)
    parts = [corpus.tokens[bounds[d] : bounds[d + 1]] for d in chosen]
    starts = [corpus.sentences[corpus.documents[d] : corpus.documents[d + 1]] for d in chosen]
    sizes = [np.diff(corpus.sentences[corpus.documents[d] : corpus.documents[d + 1] + 1]) for d in chosen]
    sentences = np.cumsum([0, *np.concatenate(sizes).tolist()])
    documents = np.cumsum([0, *map(len, starts)])
    document_bytes = corpus.document_bytes[chosen]
    return Corpus(np.concatenate(parts), sentences, documents, int(document_bytes.sum()), document_bytes)


def _beginning(corpus: Corpus, document: int, tokens: int, tokenizer: Tokenizer) -> Corpus:
    """Returns the first tokens of a document as a corpus."""
    start = corpus.bounds[document]
    some = np.asarray(corpus.tokens[start : start + tokens])
    inside = (corpus.sentences > start) & (corpus.sentences < start + tokens)
    sentences = np.array([0, *(corpus.sentences[inside] - start), tokens], np.int64)
    size = len(tokenizer.decode(some).encode())
    return Corpus(some, sentences, np.array([0, len(sentences) - 1]), size, np.array([size]))


def _batches(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    some, held = [], 0
    for text in texts:
        some.append(text)
        held += len(text)
        if held >= characters:
            yield some
            some, held = [], 0
    if some:
        yield some
