"""Gaps between groups in the errors of a classifier: demographic parity and equalised odds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config import Classification
from jaxlm.data.formats.lines import Place, Row
from jaxlm.errors import UserError, suggestion
from jaxlm.lm import LM
from jaxlm.reports.pages import Chapter
from jaxlm.reports.tables import Table
from jaxlm.run.evaluate import predict
from jaxlm.run.trained_model import task_for
from jaxlm.trust.audit import Audit, Estimate, bootstrap, estimate_bars, wilson
from jaxlm.trust.rows import read_rows

MIN_MEMBERS = 2  # groups with fewer members have no rates and do not count for the gaps
FEW = 50  # members; groups with fewer are marked, because their rates vary by chance
MAX_GROUPS = 50  # a column with more values is probably not one of groups


class GroupRates(NamedTuple):
    """The rates of one group, each with its interval; undefined where the group has no such examples."""

    members: int
    positives: int
    predicted_positive: Estimate
    true_positive: Estimate
    false_positive: Estimate
    false_negative: Estimate
    accuracy: Estimate


class Gaps(NamedTuple):
    """The largest differences between two groups, with bootstrap intervals."""

    demographic_parity: Estimate
    equalised_odds: Estimate
    true_positive: Estimate
    false_positive: Estimate
    accuracy: Estimate


def group_rates(is_positive_N: np.ndarray, predicted_N: np.ndarray, right_N: np.ndarray) -> GroupRates:
    """Returns the rates of the members of one group.

    Args:
      is_positive_N: whether the label is a positive class.
      predicted_N: whether the prediction is a positive class.
      right_N: whether the prediction is the label.
    """
    count = lambda mask_N: int(mask_N.sum())
    positives, negatives = count(is_positive_N), count(~is_positive_N)
    return GroupRates(
        len(right_N),
        positives,
        wilson(count(predicted_N), len(right_N)),
        wilson(count(predicted_N & is_positive_N), positives),
        wilson(count(predicted_N & ~is_positive_N), negatives),
        wilson(count(~predicted_N & is_positive_N), positives),
        wilson(count(right_N), len(right_N)),
    )


def group_gaps(
    groups: Sequence[str], is_positive_N: np.ndarray, predicted_N: np.ndarray, right_N: np.ndarray, seed: int = 0
) -> Gaps:
    """Returns the gaps between groups.

    The demographic parity difference is the largest difference of the rates of positive predictions, the equalised
    odds difference the larger one of the differences of true-positive and false-positive rates (Hardt et al. 2016).
    A rate that a group lacks, because it has no positive or no negative example, does not count.

    Args:
      groups: the group of each example.
      is_positive_N: as for `group_rates`, and so are the other arrays.
      predicted_N: whether the prediction is a positive class.
      right_N: whether the prediction is the label.
      seed: of the bootstrap, which draws examples.
    """
    names, group_N = np.unique(np.array(groups), return_inverse=True)
    masks: Any = (predicted_N, np.ones_like(predicted_N)), (predicted_N, is_positive_N), (predicted_N, ~is_positive_N)
    masks += ((right_N, np.ones_like(right_N)),)

    def statistic(rows: np.ndarray) -> np.ndarray:
        parity, true_positive, false_positive, accuracy = (
            _spread(group_N[rows], of_N[rows] & among_N[rows], among_N[rows], len(names)) for of_N, among_N in masks
        )
        both = [gap for gap in (true_positive, false_positive) if not math.isnan(gap)]
        return np.array([parity, max(both, default=math.nan), true_positive, false_positive, accuracy])

    return Gaps(*bootstrap(statistic, len(group_N), seed))


def _spread(group_N: np.ndarray, counted_N: np.ndarray, among_N: np.ndarray, groups: int) -> float:
    """Returns the largest minus the smallest rate of the groups that have one; NaN for fewer than two."""
    totals = np.bincount(group_N[among_N], minlength=groups)
    counts = np.bincount(group_N[counted_N], minlength=groups)
    rates = counts[totals > 0] / totals[totals > 0]
    return float(np.ptp(rates)) if len(rates) > 1 else math.nan


def audit_groups(
    lm: LM,
    file: str,
    column: str,
    positive: Sequence[str] = (),
    *,
    length: int | None = None,
    sample: int = 0,
    seed: int = 0,
) -> Audit:
    """Returns the audit of the gaps between groups.

    Args:
      lm: a model fine-tuned for classification with one label per text.
      file: rows with the columns of the task, its label included, and the column of the groups.
      column: name of the column of the groups; rows without a group are left out.
      positive: names of the positive classes; empty: the second of two classes.
      length: tokens in a row; None: as in training.
      sample: number of rows to draw; 0: all.
      seed: of the draw and the bootstrap.

    Raises:
      UserError: for another model, a missing column, unknown classes, and fewer than two groups with members.
    """
    task = check_classifier(lm, "--groups")
    if not column:
        raise UserError("--groups requires --group-column, the name of the column with the group of each row")
    classes = positive_classes(lm, positive)
    found = read_rows(file, (*task.text, task.label), "--groups", sample, seed)
    kept, members, counts = _by_group(found, file, column)
    usable = [name for name, count in counts.items() if count >= MIN_MEMBERS]
    labels = [_label(row[task.label], place, lm.config.labels) for place, row in kept]
    predictions = predict(lm, [{name: row[name] for name in task.text} for _, row in kept], task=task, length=length)
    predicted = [str(prediction["prediction"]) for prediction in predictions]
    is_positive_N, predicted_N = (np.isin(np.array(names), classes) for names in (labels, predicted))
    right_N = np.array(labels) == np.array(predicted)
    rates = {
        name: group_rates(*(array[np.array(members) == name] for array in (is_positive_N, predicted_N, right_N)))
        for name in usable
    }
    in_use = np.isin(np.array(members), usable)
    positive_M, predicted_M, right_M = [array[in_use] for array in (is_positive_N, predicted_N, right_N)]
    gaps = group_gaps(np.array(members)[in_use].tolist(), positive_M, predicted_M, right_M, seed)
    dropped = [name for name in counts if name not in usable]
    numbers: dict[str, float] = {"groups": float(len(usable))}
    numbers |= {f"groups/gap/{name}": estimate.value for name, estimate in gaps._asdict().items()}
    for name, of_group in rates.items():
        for field, value in of_group._asdict().items():
            numbers[f"groups/{name}/{field}"] = value.value if isinstance(value, Estimate) else float(value)
    chapter = _chapter(column, classes, rates, gaps, dropped, len(found) - len(kept))
    return Audit("Gaps between groups", numbers, [chapter])


def _by_group(
    found: Sequence[tuple[Place, Row]], file: str, column: str
) -> tuple[list[tuple[Place, Row]], list[str], dict[str, int]]:
    """Returns the rows with a group, the group of each, and the number of members of each group.

    Raises:
      UserError: for a missing column, too many groups, and fewer than two groups with enough members.
    """
    if all(column not in row for _, row in found):
        raise UserError(f"{file} has no column {column!r}{suggestion(column, [str(k) for k in found[0][1] if k])}")
    kept = [(place, row) for place, row in found if str(row.get(column) or "").strip()]
    members = [str(row[column]).strip() for _, row in kept]
    counts = {name: members.count(name) for name in sorted(set(members))}
    if len(counts) > MAX_GROUPS:
        raise UserError(
            f"column {column!r} has {len(counts):,} different values, more than {MAX_GROUPS}; choose a column of "
            f"groups, or merge some of them"
        )
    if sum(count >= MIN_MEMBERS for count in counts.values()) < 2:
        listed = ", ".join(f"{name!r} {count}" for name, count in counts.items()) or "none"
        raise UserError(
            f"column {column!r} has the groups: {listed}; gaps require two groups with at least {MIN_MEMBERS} members"
        )
    return kept, members, counts


def check_classifier(lm: LM, flag: str) -> Classification:
    """Returns the task of a classifier with one label per text. Raises UserError for another model."""
    task = task_for(lm) if "classes" in lm.config.heads_on_top or lm.trained else None
    if not isinstance(task, Classification) or task.problem != "single_label":
        raise UserError(
            f"{flag} requires a model fine-tuned for Classification with one label per text, the model has the heads: "
            f"{', '.join(lm.config.heads_on_top) or 'none'}; audit a language model with --pairs, an encoder with "
            f"--associations"
        )
    return task


def positive_classes(lm: LM, positive: Sequence[str]) -> list[str]:
    """Returns the names of the positive classes. Raises UserError for unknown names, and where none is obvious."""
    names = list(lm.config.labels)
    if not positive and len(names) != 2:
        raise UserError(
            f"the model has {len(names)} classes; name the positive ones with --positive: {', '.join(names)}"
        )
    for name in positive:
        if name not in names:
            raise UserError(f"--positive names {name!r}, which is not a class of the model{suggestion(name, names)}")
    if len(set(positive)) >= len(names):
        raise UserError(f"--positive names all {len(names)} classes of the model; leave at least one out")
    return list(positive) or names[1:]


def _label(value: Any, place: Any, names: Sequence[str]) -> str:
    label = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
    if label in names:
        return label
    if label.isdigit() and int(label) < len(names):
        return names[int(label)]
    raise UserError(f"{place}: the label {label!r:.40} is not a class of the model{suggestion(label, names)}")


def _chapter(
    column: str,
    classes: Sequence[str],
    rates: dict[str, GroupRates],
    gaps: Gaps,
    dropped: Sequence[str],
    without: int,
) -> Chapter:
    fields = "predicted_positive", "true_positive", "false_positive", "false_negative", "accuracy"
    head = (column, "examples", "positive labels", *(f"{field.replace('_', ' ')}, %" for field in fields))
    rows = [
        [
            f"{name} *" if group.members < FEW else name,
            f"{group.members:,}",
            f"{group.positives:,}",
            *(getattr(group, field).percent() for field in fields),
        ]
        for name, group in rates.items()
    ]
    note = "Intervals are Wilson's. –: the group has no such example."
    if any(group.members < FEW for group in rates.values()):
        note += f" *: fewer than {FEW} members, so that the rates vary by chance."
    if dropped:
        note += f" Left out, with fewer than {MIN_MEMBERS} members: {', '.join(dropped)}."
    if without:
        note += f" {without:,} rows without a group are left out."
    gap_rows = [
        [f"{name.replace('_', ' ')} difference", estimate.text(100, 1)] for name, estimate in gaps._asdict().items()
    ]
    gap_note = "The largest rate minus the smallest, in points of per cent. Intervals are a bootstrap's over examples."
    bars = [
        estimate_bars(title, {name: getattr(group, field) for name, group in rates.items()}, "% of examples")
        for title, field in (("False-positive rates", "false_positive"), ("Rates of positive predictions", fields[0]))
    ]
    tables = [
        Table("Gaps", ("measure", "points of per cent (95 %)"), gap_rows, gap_note),
        Table("Rates by group", head, rows, note),
    ]
    text = [
        f"The positive prediction is {' or '.join(classes)}. Demographic parity compares how often it is predicted. "
        "Equalised odds compares how often it is predicted among examples with the same label (Hardt et al. 2016). A "
        "false-positive rate that differs means that texts of one group are flagged wrongly more often.",
        "Known limits: the measures exclude one another. If the groups have different proportions of positive labels, "
        "a classifier cannot equalise all of them (Kleinberg et al. 2017; Chouldechova 2017). The labels can be biased "
        "themselves: Sap et al. (2019) show that annotators label tweets in African American English as offensive more "
        "often. Gaps to such labels measure agreement with the annotators. A largest difference is positive even if "
        "the groups differ by chance only, and grows with the number of groups. A group that is defined by terms in "
        "the text is not a group of people.",
    ]
    return Chapter("Gaps between groups", text, [*bars, *tables])
