"""Records from files: reads them, splits off a validation part, and finds the labels and the tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import asdict, replace
from itertools import chain
from typing import Any

import numpy as np

from jaxlm.config import RunConfig
from jaxlm.data import source
from jaxlm.data.corpus import Prepared
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.tasks import labels
from jaxlm.tasks.cells import Records
from jaxlm.tasks.records import RecordTask


def prepare(
    run: RunConfig,
    kind: type[RecordTask],
    tokenizer: Tokenizer | None,
    log: Callable[[str], None],
    known: tuple[str, ...] | None = None,
) -> Prepared:
    """Reads the records of a run, splits off a validation part if the run has none, and finds the labels.

    Args:
      run: the run.
      kind: the class of its task.
      tokenizer: replaces the tokenizer of the run.
      log: prints a line of progress.
      known: the names of the outputs of the head that the run starts from, if it has one.

    Raises:
      UserError: for invalid data, with file and line.
    """
    data = run.data
    train, held_out, names, counts = read_parts(run, kind, log, known)
    fingerprint = hashlib.sha256()
    for path in (data.path, data.target_path, data.eval_path, data.eval_target_path):
        fingerprint.update(source.fingerprint(path).encode() if path else b"")
    options = asdict(replace(data, path="", target_path="", eval_path="", eval_target_path="", cache=""))
    fingerprint.update(json.dumps(options, sort_keys=True).encode())
    if tokenizer is None and run.tokenizer.path:
        tokenizer = tokenizers.load(run.tokenizer.path, run.tokenizer.split_special_tokens)
    if tokenizer is None:
        tokenizer = _train_tokenizer(run, kind, train, log)  # follows from the data and the config
    else:
        fingerprint.update(tokenizers.fingerprint(tokenizer).encode())
    return Prepared(tokenizer, train, held_out, counts, fingerprint.hexdigest()[:16], names)


def read_parts(
    run: RunConfig, kind: type[RecordTask], log: Callable[[str], None], known: tuple[str, ...] | None = None
) -> tuple[Records, Records, tuple[str, ...], dict[str, int]]:
    """Returns the training and the held-out records of a run, the names of the labels, and the counts of the rows.

    The arguments and errors are those of `prepare`; nothing is tokenized.
    """
    data, counts = run.data, Counter[str]()
    read = lambda path, target, split: load(kind, run, path, target, split, counts)
    train = whole = read(data.path, data.target_path, data.split)
    if files := source.held_out_paths(data):
        held_out = read(*files)
    else:
        train, held_out = split(kind, run.task, train, data.eval_fraction, data.eval_seed)
    for part, name, path in ((train, "training", data.path), (held_out, "held-out", data.eval_path or data.path)):
        if not part.records:
            found = ", ".join(f"{count:,} {what}" for what, count in counts.items()) or "0 rows"
            raise UserError(f"no {name} example is left of {path} ({found}); give more, or set --data.eval-path")
    # The labels are those of `whole`, because the only rows with a label may have been split off.
    names, train, held_out = labels.align_labels(kind, run.task, whole, train, held_out, known, log)
    return train, held_out, names, dict(counts)


def load(kind: type[RecordTask], run: RunConfig, path: str, target_path: str, split: str, counts: Counter) -> Records:
    """Returns all records of a path, each with its label; `counts` counts the rows and the dropped records."""
    part = Records([], [])
    columns = kind.columns(run.task, run.data.label_from == "column")
    for place, row in source.rows(path, run.data, split, counts, target_path, columns):
        record = kind.read(run.task, row, place)
        if record is None:
            counts["dropped"] += 1
            continue
        kind.require_label(run.task, row, record, place)
        part.records.append(record)
        part.places.append(place)
    kind.finalize_labels(run.task, part, ())
    return part


def split(kind: type[RecordTask], task: Any, part: Records, share: float, seed: int) -> tuple[Records, Records]:
    """Returns a training part and a validation part, both in the order of the data.

    Args:
      kind: the class of the task.
      task: its config.
      part: the records.
      share: the fraction of each stratum, or of the groups if there are several, that is chosen for validation.
      seed: of the random choice.
    """
    random = np.random.default_rng((seed, 1))
    chosen = np.zeros(len(part.records), bool)
    groups = [kind.group(task, record) for record in part.records]
    if len(set(groups)) > 1:
        names = sorted(set(groups), key=str)
        count = min(max(1, round(share * len(names))), len(names) - 1)
        selected = {names[i] for i in random.permutation(len(names))[:count]}
        chosen[:] = [group in selected for group in groups]
    else:
        strata: dict[Hashable, list[int]] = {}
        for i, record in enumerate(part.records):
            strata.setdefault(kind.stratum(task, record), []).append(i)
        for _, members in sorted(strata.items(), key=lambda item: str(item[0])):
            # Random rounding gives rare classes together their share; one record of each remains for training.
            count = min(int(share * len(members) + random.random()), len(members) - 1)
            chosen[random.permutation(members)[:count]] = True
        if not chosen.any() and len(chosen) > 1:
            chosen[random.integers(len(chosen))] = True
    sides = []
    for side in (~chosen, chosen):
        index = np.flatnonzero(side)
        sides.append(Records([part.records[i] for i in index], [part.places[i] for i in index]))
    return sides[0], sides[1]


def _train_tokenizer(run: RunConfig, kind: type[RecordTask], part: Records, log: Callable[[str], None]) -> Tokenizer:
    assert run.model is not None
    log(f"training a {run.tokenizer.train} tokenizer of {run.model.vocabulary:,} tokens")
    texts, targets = (chain.from_iterable(map(get, part.records)) for get in (kind.texts, kind.target_texts))
    if run.tokenizer.separate:
        if run.model.structure != "encoder_decoder" or not run.model.decoder_tokens:
            raise UserError(
                "tokenizer.separate is set, but the model has one table of tokens; set --model.decoder-tokens of an "
                "encoder-decoder"
            )
        return tokenizers.train_both(texts, targets, run.tokenizer, (run.model.vocabulary, run.model.V))
    add_bos, add_eos = (run.model.structure == structure for structure in ("decoder", "encoder_decoder"))
    return tokenizers.train(
        chain(texts, targets), run.tokenizer, run.model.vocabulary, add_bos=add_bos, add_eos=add_eos
    )
