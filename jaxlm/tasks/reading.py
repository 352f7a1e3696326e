"""Records from files: read, split, their labels found, and what a task needs to read a row."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import asdict, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxlm import config
from jaxlm.config import DataConfig, RunConfig
from jaxlm.config.ranges import shown
from jaxlm.data import source
from jaxlm.data.corpus import Prepared
from jaxlm.data.formats import literals
from jaxlm.data.formats.lines import Place, Row
from jaxlm.data.formats.rows import Columns
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.errors import UserError, perhaps
from jaxlm.tasks import labels

if TYPE_CHECKING:
    from jaxlm.tasks.records import RecordTask

Record = dict[str, Any]  # what a task's `read` made of a row


class Records(NamedTuple):
    """The records of one part of the data, and where each stands."""

    records: list[Record]
    places: list[Place]

    @property
    def said(self) -> str:
        """How much there is."""
        return f"{len(self.records):,} examples"


def prepare(
    run: RunConfig,
    kind: type[RecordTask],
    tokenizer: Tokenizer | None,
    say: Callable[[str], None],
    known: tuple[str, ...] | None = None,
) -> Prepared:
    """Reads the records of a run, splits off a validation part where none is given, and finds the labels.

    known: names of the outputs of the head that the run starts from, where it has one.

    Raises UserError for bad data, with file and line.
    """
    data, counts = run.data, Counter[str]()
    read = lambda path, target, split: load(kind, run, path, target, split, counts)
    train = whole = read(data.path, data.target_path, data.split)
    if given := source.held_out(data):
        held_out = read(*given)
    else:
        train, held_out = split(kind, run.task, train, data.eval_fraction, data.eval_seed)
    for part, name, path in ((train, "training", data.path), (held_out, "held-out", data.eval_path or data.path)):
        if not part.records:
            found = ", ".join(f"{count:,} {what}" for what, count in counts.items()) or "0 rows"
            raise UserError(f"no {name} example is left of {path} ({found}); give more, or set --data.eval-path")
    # A part that is split off by lot may have the only rows with a label.
    names, train, held_out = labels.agreed(kind, run.task, whole, train, held_out, known, say)
    fingerprint = hashlib.sha256()
    for path in (data.path, data.target_path, data.eval_path, data.eval_target_path):
        fingerprint.update(source.fingerprint(path).encode() if path else b"")
    told = asdict(replace(data, path="", target_path="", eval_path="", eval_target_path="", cache=""))
    fingerprint.update(json.dumps(told, sort_keys=True).encode())
    if tokenizer is None and run.tokenizer.path:
        tokenizer = tokenizers.load(run.tokenizer.path, run.tokenizer.split_special_tokens)
    if tokenizer is None:
        tokenizer = _trained(run, kind, train, say)  # which follows from the data and the config
    else:
        fingerprint.update(tokenizers.fingerprint(tokenizer).encode())
    return Prepared(tokenizer, train, held_out, dict(counts), fingerprint.hexdigest()[:16], names)


def load(kind: type[RecordTask], run: RunConfig, path: str, target_path: str, split: str, counts: Counter) -> Records:
    """All records of a path, each with its label."""
    part = Records([], [])
    columns = columns_of(run.task, run.data.label_from == "column")
    for place, row in source.rows(path, run.data, split, counts, target_path, columns):
        record = kind.read(run.task, row, place)
        if record is None:
            counts["dropped"] += 1
            continue
        kind.labelled(run.task, row, record, place)
        part.records.append(record)
        part.places.append(place)
    kind.settle(run.task, part, ())
    return part


def split(kind: type[RecordTask], task: Any, part: Records, share: float, seed: int) -> tuple[Records, Records]:
    """Training and validation parts: `share` of each stratum, or of the groups, chosen at random, in their order."""
    random = np.random.default_rng((seed, 1))
    chosen = np.zeros(len(part.records), bool)
    groups = [kind.group(task, record) for record in part.records]
    if len(set(groups)) > 1:
        names = sorted(set(groups), key=str)
        count = min(max(1, round(share * len(names))), len(names) - 1)
        held = {names[i] for i in random.permutation(len(names))[:count]}
        chosen[:] = [group in held for group in groups]
    else:
        strata: dict[Hashable, list[int]] = {}
        for i, record in enumerate(part.records):
            strata.setdefault(kind.stratum(task, record), []).append(i)
        for _, members in sorted(strata.items(), key=lambda item: str(item[0])):
            # The rounding is by lot, so that rare classes together have their share; one of each stays to be learned.
            count = min(int(share * len(members) + random.random()), len(members) - 1)
            chosen[random.permutation(members)[:count]] = True
        if not chosen.any() and len(chosen) > 1:
            chosen[random.integers(len(chosen))] = True
    sides = []
    for side in (~chosen, chosen):
        index = np.flatnonzero(side)
        sides.append(Records([part.records[i] for i in index], [part.places[i] for i in index]))
    return sides[0], sides[1]


def check_labels(
    kind: type[RecordTask], part: Records, names: tuple[str, ...], remedy: str = "mend it, or leave the row out"
) -> None:
    """Raises UserError for a label that is not among the names."""
    for record, place in zip(part.records, part.places):
        for label in kind.labels_of(record):
            if label not in names:
                raise UserError(
                    f"{place}: the label {label!r} is not among those that are learned{perhaps(label, names)}; {remedy}"
                )


def _trained(run: RunConfig, kind: type[RecordTask], part: Records, say: Callable[[str], None]) -> Tokenizer:
    assert run.model is not None
    say(f"training a {run.tokenizer.train} tokenizer of {run.model.vocabulary:,} tokens")
    texts, targets = (chain.from_iterable(map(some, part.records)) for some in (kind.texts, kind.target_texts))
    if run.tokenizer.separate:
        if run.model.structure != "encoder_decoder" or not run.model.decoder_tokens:
            raise UserError(
                "tokenizer.separate is set, but the model has one table of tokens; set --model.decoder-tokens of an "
                "encoder-decoder"
            )
        return tokenizers.train_both(texts, targets, run.tokenizer, (run.model.vocabulary, run.model.V))
    begun, ended = run.model.structure == "decoder", run.model.structure == "encoder_decoder"
    return tokenizers.train(chain(texts, targets), run.tokenizer, run.model.vocabulary, begun=begun, ended=ended)


# Columns of rows


def columns_of(task: Any, labelled: bool) -> Columns | None:
    """Returns the columns that a task reads, of rows whose labels are read too or not; None: any may be read."""
    label: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    if isinstance(task, config.Classification):
        needed, label = task.text, (task.label,)
    elif isinstance(task, config.Tagging):
        needed, label = (task.tokens,), (task.tags,)
    elif isinstance(task, config.QuestionAnswering):
        needed, label, optional = ("context", "question"), ("answers",), ("id", "title", "is_impossible")
    elif isinstance(task, config.Similarity):
        needed, label = task.text, (task.label,) if task.objective == "cosine" else ()
    elif isinstance(task, config.MultipleChoice):
        needed, label = (task.question, *task.options), (task.label,)
    elif isinstance(task, config.Seq2Seq):
        needed, label, optional = (task.source,), (task.target,), task.references
    else:
        return None
    # Numbers stay what they are where they count or measure.
    numbers = isinstance(task, (config.Similarity, config.MultipleChoice))
    names = not numbers and getattr(task, "problem", "") != "regression"
    return Columns((*needed, *(label if labelled else ())), (*optional, *label), names)


def column(row: Row, name: str, place: Place, option: str) -> Any:
    """The value that `cell` finds.  Raises UserError, with the columns that there are, where there is none."""
    known = row if name in row else entries(row)
    if name not in known:
        raise UserError(
            f"{place}: there is no column {name!r}; the columns are {', '.join(map(repr, known))}; choose with "
            f"{option}{source.other_columns(place, DataConfig())}"
        )
    return known[name]


def listed(value: Any, name: str, place: Place, brackets: str = "[({") -> Any:
    """Returns the list or object that a text of a table holds, as pandas writes it; any other value as it is.

    Args:
      value: what a cell holds.
      name: the column.
      place: where the row stands.
      brackets: those that a list or object may begin with.

    Raises:
      UserError: for a text that begins as a list and is none.
    """
    if not isinstance(value, str):
        return value
    if value.startswith('"[') and literals.looks_listed(value.strip('"').replace('""', '"'), "["):
        raise UserError(
            f"{place}: column {name!r} holds {shown(value)}, a list in quotes; read the file with "
            f"--data.format quoted_tsv"
        )
    if not literals.looks_listed(value, brackets):
        return value
    try:
        return literals.parse(value)
    except literals.NotALiteralError as error:
        raise UserError(
            f"{place}: column {name!r} holds {shown(value)}, a list that cannot be read: {error}; correct the row"
        ) from None


def cell(row: Row, name: str) -> Any:
    """The value of a column, or of an entry of one, such as `translation.de`; None where there is none."""
    return row[name] if name in row else entries(row).get(name)


def entries(row: Row) -> Row:
    """The row with a column `translation.de` for each entry of a column that holds several under names."""
    held: Row = {}
    for name, value in row.items():
        inner = entries(value) if isinstance(value, dict) else None
        held |= {name: value} if inner is None else {f"{name}.{key}": one for key, one in inner.items()}
    return held


def text_of(row: Row, name: str, place: Place, option: str = "--task.text") -> str:
    """The text in a column; "" for none."""
    value = column(row, name, place, option)
    if value is not None and not isinstance(value, str):
        raise UserError(
            f"{place}: column {name!r} holds {type(value).__name__} {shown(value)}, not text; choose with {option}"
        )
    return value or ""
