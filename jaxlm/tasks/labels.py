"""Which output of a head each label of the data means.

A head that is read from weights has outputs with names, in an order that its parameters depend on.  So the names of the
head win, and the labels of the data are found among them; where they cannot be, that is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

from jaxlm.config.ranges import shown
from jaxlm.errors import UserError
from jaxlm.tasks.cells import Records
from jaxlm.tasks.records import RecordTask

# Names of the outputs of a head, in order; of several tasks, of each part's head, by the part's name.
Labels: TypeAlias = tuple[str, ...] | Mapping[str, tuple[str, ...]]

_SHOWN = 12  # labels that a message lists
_NUMBERED = re.compile(r"(?:LABEL_)?(\d{1,6})", re.IGNORECASE)
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_TRUTH = {"false": 0, "true": 1}


def matched(labels: Iterable[str], names: Sequence[str]) -> dict[str, str] | None:
    """Returns the name of the output that each label means, or None where some label means none.

    Labels are names as they are; or names in other letters (case, blanks, hyphens and underscores do not count); or
    the numbers of the outputs, from 0, as numbers, `LABEL_0` or `false` and `true`.  Numbers that the names themselves
    contain must not contradict them: 1 does not mean the second of the names "1 star" and "2 stars".

    >>> matched(["Neutral", "ENTAILMENT"], ["entailment", "neutral", "contradiction"])
    {'Neutral': 'neutral', 'ENTAILMENT': 'entailment'}
    >>> matched(["0", "2"], ["entailment", "neutral", "contradiction"])
    {'0': 'entailment', '2': 'contradiction'}
    """
    labels = list(dict.fromkeys(labels))
    if set(labels) <= set(names):
        return {label: label for label in labels}
    by_letters = {_letters(name): name for name in names}
    found = {label: by_letters[_letters(label)] for label in labels if _letters(label) in by_letters}
    if len(found) == len(labels) == len(set(found.values())) and len(by_letters) == len(names):
        return found
    if any(re.findall(r"\d+", name) not in ([], [str(i)]) for i, name in enumerate(names)):
        return None
    numbers = {label: _number(label, len(names)) for label in labels}
    if len(set(numbers.values())) < len(labels) or not all(i is not None and i < len(names) for i in numbers.values()):
        return None
    return {label: names[i] for label, i in numbers.items() if i is not None}


def unnamed(names: Sequence[str]) -> bool:
    """Returns whether these are the names that outputs have before anyone names them: LABEL_0, LABEL_1 ..."""
    return all(name == f"LABEL_{i}" for i, name in enumerate(names))


def named_outputs(task: Any, outputs: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names of the outputs of a head: its own, or `task.names` where it has none of its own."""
    given = tuple(getattr(task, "names", ()))
    return given if unnamed(outputs) and len(given) == len(outputs) else outputs


def to_outputs(kind: type[RecordTask], task: Any, part: Records, outputs: tuple[str, ...]) -> Records:
    """Returns a part of other data than a head was trained on, with its labels as the outputs of the head are named.

    As in training, `task.names` says first what numbers mean; labels that it does not have may be names of outputs.

    Raises UserError for a label that is the name of no output.
    """
    kind.settle(task, part, outputs)
    if given := tuple(getattr(task, "names", ())):
        with suppress(UserError):
            [part] = kind.fitted(task, [part], given)
    [part] = kind.fitted(task, [part], outputs)
    return part


def agreed(
    kind: type[RecordTask],
    task: Any,
    whole: Records,
    train: Records,
    held_out: Records,
    known: tuple[str, ...] | None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[tuple[str, ...], Records, Records]:
    """Returns the names of the outputs of the head, and both parts of the data with their labels under these names.

    whole: the training data before a held-out part was split off.  known: names of the outputs of a head that is read
    from weights, in order; None: the head is new, and its names are those found in `whole`.

    Raises UserError for labels that are no names of outputs, with both sets.
    """
    parts = [train, held_out]
    records = [record for part in parts for record in part.records]
    before = [label for record in records for label in kind.labels_of(record)]
    if known is None or not before:  # without labels of its own a task has outputs whose number alone matters
        names = kind.names(task, whole)
        if known is not None and len(known) != len(names):
            raise _differ(known, names)
        other = "name all labels with --task.names" if hasattr(task, "names") else "give training rows with it"
        parts = kind.fitted(task, parts, known or names, f"fix it, or {other}")
        return (known or names, parts[0], parts[1])
    both = type(train)([*train.records, *held_out.records], [*train.places, *held_out.places])
    kind.settle(task, both, known)
    given = tuple(getattr(task, "names", ()))
    if given:
        parts = kind.fitted(task, parts, given)
        known = named_outputs(task, known)
    try:
        parts = kind.fitted(task, parts, known)
    except UserError:
        raise _differ(known, given or sorted(set(before))) from None
    after = [label for part in parts for record in part.records for label in kind.labels_of(record)]
    if renamed := {old: new for old, new in zip(before, after) if old != new}:
        shown = ", ".join(f"{old} is {new}" for old, new in list(renamed.items())[:_SHOWN])
        say(f"labels    by the names that the weights have: {shown}")
    return known, parts[0], parts[1]


def number_of(value: Any, place: Any, column: str) -> float:
    """Returns the number in a column of labels.  Raises UserError, with the place of the row, where there is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        comma = isinstance(value, str) and _DECIMAL_COMMA.fullmatch(value.strip())
        remedy = f"write it as {value.strip().replace(',', '.')}" if comma else "correct it"
        raise UserError(
            f"{place}: column {column!r} holds {shown(value)}, which is not a number; {remedy}, or choose the "
            f"column with --task.label"
        ) from None


def _differ(known: Sequence[str], labels: Sequence[str]) -> UserError:
    listed = lambda names: ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN))
    named = ", name them with --task.names in the order of the outputs" * (len(known) == len(labels) and unnamed(known))
    return UserError(
        f"the head of the weights to start from has {len(known)} outputs, {listed(known)}, and the task needs "
        f"{len(labels)}: {listed(labels)}; correct the labels{named}, or draw a new head with --new-head"
    )


def _letters(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip()).casefold()


def _number(label: str, count: int) -> int | None:
    """The number that a label is, of so many outputs."""
    if count == 2 and label.lower() in _TRUTH:
        return _TRUTH[label.lower()]
    digits = _NUMBERED.fullmatch(label)
    return int(digits[1]) if digits else None
