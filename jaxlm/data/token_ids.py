"""Corpora of token ids that another program wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxlm.config import DataConfig
from jaxlm.data import holdout, source
from jaxlm.data.formats import tokens
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.data.tokenizing import CHUNK, TOKENS, dtype_of, write_index
from jaxlm.errors import UserError


def documents(path: str, tokenizer: Tokenizer, vocabulary: int) -> list[np.ndarray]:
    """Returns the documents in files of token ids, without copying them.

    A document begins with the tokenizer's BOS token, or ends with its EOS token if it has no BOS. Without such tokens,
    each file is a document.

    Args:
      path: the files.
      tokenizer: the tokenizer that wrote them.
      vocabulary: the size of the model's vocabulary.

    Raises:
      UserError: for a file that does not hold token ids of the tokenizer.
    """
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


def hold_out(documents: list[np.ndarray], data: DataConfig) -> tuple[list[np.ndarray], list[np.ndarray]]:
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


def write(folder: Path, documents: list[np.ndarray], tokenizer: Tokenizer, sized: bool) -> None:
    """Writes documents as a corpus.

    Args:
      folder: the folder of the corpus.
      documents: the token ids of each.
      tokenizer: the tokenizer that wrote them.
      sized: whether the corpus has the size of each document in bytes, which only a score needs; otherwise 0.
    """
    folder.mkdir(parents=True)
    dtype = dtype_of(tokenizer)
    with open(folder / TOKENS, "wb") as file:
        for document in documents:
            file.write(document.astype(dtype).tobytes())
    size = lambda document: len(tokenizer.decode(document).encode()) if sized else 0
    lengths, sizes = (np.array([*map(measure, documents)], np.int64) for measure in (len, size))
    write_index(folder, dtype, lengths, np.ones(len(documents), np.int64), sizes)
