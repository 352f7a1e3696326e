"""Maps the labels of the data to the outputs of a head.

The outputs of a head from a checkpoint have names, and its parameters depend on their order.  So the names of the head
take precedence, and a label of the data that matches none of them is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

from jaxlm.config.ranges import short_repr
from jaxlm.errors import UserError
from jaxlm.tasks.cells import Records
from jaxlm.tasks.records import RecordTask

# The names of the outputs of a head, in order; for several tasks, of each part's head by the name of the part.
Labels: TypeAlias = tuple[str, ...] | Mapping[str, tuple[str, ...]]

_SHOWN = 12  # labels in a message
_NUMBERED = re.compile(r"(?:LABEL_)?(\d{1,6})", re.IGNORECASE)
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_TRUTH = {"false": 0, "true": 1}


def match_labels(labels: Iterable[str], names: Sequence[str]) -> dict[str, str] | None:
    """Returns a mapping from each label to the name of an output, or None if a label matches no output.

    The labels may be the names themselves; the names in another spelling (case, spaces, hyphens and underscores are
    ignored); or the indices of the outputs, as numbers, `LABEL_0`, or `false` and `true`.  Indices must not contradict
    numbers in the names: 1 is not the second of the names "1 star" and "2 stars".

    >>> match_labels(["Neutral", "ENTAILMENT"], ["entailment", "neutral", "contradiction"])
    {'Neutral': 'neutral', 'ENTAILMENT': 'entailment'}
    >>> match_labels(["0", "2"], ["entailment", "neutral", "contradiction"])
    {'0': 'entailment', '2': 'contradiction'}
    """
    labels = list(dict.fromkeys(labels))
    if set(labels) <= set(names):
        return {label: label for label in labels}
    by_spelling = {_normalise(name): name for name in names}
    matches = {label: by_spelling[_normalise(label)] for label in labels if _normalise(label) in by_spelling}
    if len(matches) == len(labels) == len(set(matches.values())) and len(by_spelling) == len(names):
        return matches
    if any(re.findall(r"\d+", name) not in ([], [str(i)]) for i, name in enumerate(names)):
        return None
    indices = {label: _index(label, len(names)) for label in labels}
    if len(set(indices.values())) < len(labels) or not all(i is not None and i < len(names) for i in indices.values()):
        return None
    return {label: names[i] for label, i in indices.items() if i is not None}


def check_unique(names: Sequence[str]) -> None:
    """Raises UserError if `task.names` contains a name twice."""
    if len(set(names)) < len(names):
        raise UserError(f"--task.names has a name twice: {', '.join(names)}; give each once")


def are_default_names(names: Sequence[str]) -> bool:
    """Returns whether these are the default names of outputs: LABEL_0, LABEL_1 and so on."""
    return all(name == f"LABEL_{i}" for i, name in enumerate(names))


def output_names(task: Any, outputs: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names of the outputs of a head, or `task.names` if the head has default names."""
    names = tuple(getattr(task, "names", ()))
    return names if are_default_names(outputs) and len(names) == len(outputs) else outputs


def to_outputs(kind: type[RecordTask], task: Any, part: Records, outputs: tuple[str, ...]) -> Records:
    """Returns a part of new data with the names of the head's outputs as labels.

    As in training, numbers are indices into `task.names`; other labels may be names of outputs.

    Args:
      kind: the class of the task.
      task: its config.
      part: the records.
      outputs: the names of the outputs of the head.

    Raises:
      UserError: for a label that matches no output.
    """
    kind.finalize_labels(task, part, outputs)
    if names := tuple(getattr(task, "names", ())):
        with suppress(UserError):
            [part] = kind.map_labels(task, [part], names)
    [part] = kind.map_labels(task, [part], outputs)
    return part


def align_labels(
    kind: type[RecordTask],
    task: Any,
    whole: Records,
    train: Records,
    held_out: Records,
    known: tuple[str, ...] | None,
    log: Callable[[str], None] = lambda _: None,
) -> tuple[tuple[str, ...], Records, Records]:
    """Returns the names of the outputs of the head, and both parts of the data with these names as labels.

    Args:
      kind: the class of the task.
      task: its config.
      whole: the training data before a held-out part was split off.
      train, held_out: the parts.
      known: the names of the outputs of a head from a checkpoint, in order; None if the head is randomly initialised,
        which then has the names found in `whole`.
      log: prints a line about labels that were renamed.

    Raises:
      UserError: for labels that match no output; the message lists both.
    """
    parts = [train, held_out]
    records = [record for part in parts for record in part.records]
    before = [label for record in records for label in kind.labels_of(record)]
    if known is None or not before:  # without labels, only the number of outputs matters
        names = kind.names(task, whole)
        if known is not None and len(known) != len(names):
            raise _differ(known, names)
        remedy = "name all labels with --task.names" if hasattr(task, "names") else "give training rows with it"
        parts = kind.map_labels(task, parts, known or names, f"fix it, or {remedy}")
        return (known or names, parts[0], parts[1])
    both = type(train)([*train.records, *held_out.records], [*train.places, *held_out.places])
    kind.finalize_labels(task, both, known)
    task_names = tuple(getattr(task, "names", ()))
    if task_names:
        parts = kind.map_labels(task, parts, task_names)
        known = output_names(task, known)
    try:
        parts = kind.map_labels(task, parts, known)
    except UserError:
        raise _differ(known, task_names or sorted(set(before))) from None
    after = [label for part in parts for record in part.records for label in kind.labels_of(record)]
    if renamed := {old: new for old, new in zip(before, after) if old != new}:
        pairs = ", ".join(f"{old} is {new}" for old, new in list(renamed.items())[:_SHOWN])
        log(f"labels    as the head of the weights names them: {pairs}")
    return known, parts[0], parts[1]


def parse_number(value: Any, place: Any, column: str) -> float:
    """Returns the number in a column of labels.  Raises UserError, with the place of the row, for other values."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        comma = isinstance(value, str) and _DECIMAL_COMMA.fullmatch(value.strip())
        remedy = f"write it as {value.strip().replace(',', '.')}" if comma else "correct it"
        raise UserError(
            f"{place}: column {column!r} holds {short_repr(value)}, which is not a number; {remedy}, or choose the "
            f"column with --task.label"
        ) from None


def _differ(known: Sequence[str], labels: Sequence[str]) -> UserError:
    listed = lambda names: ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN))
    remedy = ", name them with --task.names in the order of the outputs" * (
        len(known) == len(labels) and are_default_names(known)
    )
    return UserError(
        f"the head of the weights to start from has {len(known)} outputs, {listed(known)}, and the task needs "
        f"{len(labels)}: {listed(labels)}; correct the labels{remedy}, or initialise a new head with --new-head"
    )


def _normalise(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip()).casefold()


def _index(label: str, count: int) -> int | None:
    """Returns the index that a label is, with `count` outputs; None if it is not an index."""
    if count == 2 and label.lower() in _TRUTH:
        return _TRUTH[label.lower()]
    digits = _NUMBERED.fullmatch(label)
    return int(digits[1]) if digits else None
