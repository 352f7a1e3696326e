"""Counterfactuals: whether predictions change if words for one group are replaced by those for another."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice, product
from typing import NamedTuple

import numpy as np

from jaxlm.errors import UserError
from jaxlm.lm import LM
from jaxlm.reports.pages import Chapter
from jaxlm.reports.pictures import Histogram
from jaxlm.reports.tables import Table
from jaxlm.run.evaluate import predict
from jaxlm.trust.audit import Audit, bootstrap, wilson
from jaxlm.trust.group_gaps import check_classifier
from jaxlm.trust.rows import read_rows, read_text

PRONOUNS = (
    ("he", "she"),
    ("him", "her"),
    ("his", "her"),
    ("his", "hers"),
    ("himself", "herself"),
)
"""The default pairs. "her" has two counterparts, and so has "his": both readings of a text are made."""
MAX_READINGS = 8  # of one text
MAX_EXAMPLES = 12  # in the table of the page
_WORD = re.compile(r"\w+(?:['’]\w+)*")


class Counterfactuals(NamedTuple):
    """The predictions for N texts with a replaced word, and for their counterfactuals.

    flips_N: whether the prediction differs for at least one reading. certain_N: whether it differs for all readings.
    difference_N: half the sum of the absolute differences of the probabilities of all classes, averaged over readings;
    for two classes this is the absolute difference of the probability of one of them.
    readings_N: number of readings of each text.
    """

    flips_N: np.ndarray
    certain_N: np.ndarray
    difference_N: np.ndarray
    readings_N: np.ndarray


def counterparts(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """Returns for each word, in lower case, the words that replace it, in the order of the pairs.

    Args:
      pairs: pairs of words, which replace each other.

    Raises:
      UserError: for no pairs, a pair of equal words, and an entry that is not one word.
    """
    found: dict[str, list[str]] = {}
    for pair in pairs:
        words = [str(word).strip().lower() for word in pair]
        for word in words:
            if not _WORD.fullmatch(word):
                raise UserError(f"the pair {pair} has {word!r}, which is not one word; give pairs of single words")
        if words[0] == words[1]:
            raise UserError(f"the pair {pair} has twice the same word; give two different ones")
        for word, other in (words, words[::-1]):
            others = found.setdefault(word, [])
            if other not in others:
                others.append(other)
    if not found:
        raise UserError("there are no pairs of words; give at least one")
    return found


def swap(text: str, words: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns the counterfactuals of a text, one for each reading; none if no word is replaced.

    All words with counterparts are replaced at the same time, with the same use of capitals. A word with several
    counterparts has several readings, each used for all its occurrences. At most 8 readings are returned.

    Args:
      text: the text.
      words: as `counterparts` returns them.

    >>> swap("He gave it to her.", counterparts(PRONOUNS))
    ['She gave it to him.', 'She gave it to his.']
    """
    present = list(dict.fromkeys(word for word in map(str.lower, _WORD.findall(text)) if word in words))
    if not present:
        return []
    readings = []
    for chosen in islice(product(*(words[word] for word in present)), MAX_READINGS):
        reading = dict(zip(present, chosen))
        readings.append(_WORD.sub(partial(_replace, reading), text))
    return readings


def _replace(reading: Mapping[str, str], match: re.Match[str]) -> str:
    """Returns the word that replaces a matched one, with its capitals."""
    word, replacement = match[0], reading.get(match[0].lower())
    if replacement is None:
        return word
    if word.isupper() and len(word) > 1:
        return replacement.upper()
    return replacement[0].upper() + replacement[1:] if word[0].isupper() else replacement


def compare(probabilities_NC: np.ndarray, readings: Sequence[np.ndarray]) -> Counterfactuals:
    """Returns how predictions change.

    Args:
      probabilities_NC: the probabilities of C classes for N texts.
      readings: for each text, those of its readings, [R, C].
    """
    best_N = probabilities_NC.argmax(1)
    flips = [reading_RC.argmax(1) != best for best, reading_RC in zip(best_N, readings)]
    difference_N = np.array(
        [np.abs(reading_RC - p_C).sum(1).mean() / 2 for p_C, reading_RC in zip(probabilities_NC, readings)]
    )
    return Counterfactuals(
        np.array([flip_R.any() for flip_R in flips]),
        np.array([flip_R.all() for flip_R in flips]),
        difference_N,
        np.array([len(flip_R) for flip_R in flips]),
    )


def audit_counterfactuals(
    lm: LM,
    file: str,
    swaps: str = "",
    *,
    length: int | None = None,
    sample: int = 0,
    seed: int = 0,
) -> Audit:
    """Returns the audit of counterfactuals.

    Args:
      lm: a model fine-tuned for classification with one label per text.
      file: rows with the text columns of the task.
      swaps: a file with pairs of words in two columns named a and b; empty: pronouns of English.
      length: tokens in a row; None: as in training.
      sample: number of rows to draw; 0: all.
      seed: of the draw and the bootstrap.

    Raises:
      UserError: for another model, missing columns, and a file in which no row has a word of the pairs.
    """
    task = check_classifier(lm, "--counterfactuals")
    pairs: Sequence[tuple[str, str]] = PRONOUNS
    if swaps:
        pairs = [(str(row["a"]), str(row["b"])) for _, row in read_rows(swaps, ("a", "b"), "--swaps")]
    words = counterparts(pairs)
    rows = read_rows(file, task.text, "--counterfactuals", sample, seed)
    originals: list[list[str]] = []
    changed: list[list[str]] = []
    owners: list[int] = []
    for place, row in rows:
        texts = [read_text(row, place, name) for name in task.text]
        # The columns of a pair are swapped together, so that one reading holds for the whole row.
        readings = [reading.split("\0") for reading in swap("\0".join(texts), words)]
        owners += [len(originals)] * len(readings)
        originals += [texts] if readings else []
        changed += readings
    if not originals:
        raise UserError(
            f"none of the {len(rows):,} rows of {file} has a word of the {len(pairs)} pairs, such as "
            f"{next(iter(words))!r}; give other pairs with --swaps"
        )
    inputs = [dict(zip(task.text, texts)) for texts in originals + changed]
    predictions = predict(lm, inputs, task=task, length=length, probabilities=True)
    p_MC = np.array([list(prediction["probabilities"].values()) for prediction in predictions])
    p_NC, q_RC = np.split(p_MC, [len(originals)])
    found = compare(p_NC, [q_RC[np.array(owners) == n] for n in range(len(originals))])
    flips, certain = (wilson(int(array.sum()), len(array)) for array in (found.flips_N, found.certain_N))
    [mean] = bootstrap(lambda some: np.array([found.difference_N[some].mean()]), len(originals), seed)
    numbers = {
        "counterfactuals": float(len(originals)),
        "counterfactuals/flips": flips.value,
        "counterfactuals/flips_in_all_readings": certain.value,
        "counterfactuals/mean_difference": mean.value,
    }
    labels = list(predictions[0]["probabilities"])
    table = Table(
        "Scores",
        ("measure", "value (95 %)"),
        [
            ["rows with a word of the pairs", f"{len(originals):,} of {len(rows):,}"],
            ["rows with several readings", f"{int((found.readings_N > 1).sum()):,}"],
            ["predictions that flip in at least one reading, %", flips.percent()],
            ["predictions that flip in all readings, %", certain.percent()],
            ["mean absolute difference of probabilities, points of per cent", mean.percent()],
        ],
        "Intervals are Wilson's for proportions and a bootstrap's over rows for the mean.",
    )
    histogram = Histogram("Difference of probabilities", 100 * found.difference_N, "points of per cent", None)
    examples = _examples(found, originals, changed, np.array(owners), p_NC, q_RC, labels)
    chapter = Chapter("Counterfactuals", _text(pairs), [histogram, table, examples])
    return Audit("Counterfactuals", numbers, [chapter])


def _examples(
    found: Counterfactuals,
    originals: Sequence[Sequence[str]],
    changed: Sequence[Sequence[str]],
    owners_R: np.ndarray,
    p_NC: np.ndarray,
    q_RC: np.ndarray,
    labels: Sequence[str],
) -> Table:
    """Returns the table of the texts with the largest differences, those that flip first."""
    rows = []
    for n in np.lexsort((-found.difference_N, ~found.flips_N))[:MAX_EXAMPLES]:
        readings = np.flatnonzero(owners_R == n)
        r = readings[np.abs(q_RC[readings] - p_NC[n]).sum(1).argmax()]
        before, after = labels[int(p_NC[n].argmax())], labels[int(q_RC[r].argmax())]
        change = f"{before} {p_NC[n].max():.1%} → {after} {q_RC[r].max():.1%}"
        rows.append([" | ".join(originals[n]), " | ".join(changed[r]), change])
    head = ("text", "counterfactual", "prediction")
    return Table("Examples", head, rows, "The largest differences. Texts with a flip are first.")


def _text(pairs: Sequence[tuple[str, str]]) -> list[str]:
    listed = ", ".join(f"{a}/{b}" for a, b in pairs[:12]) + (f" and {len(pairs) - 12} more" if len(pairs) > 12 else "")
    return [
        f"Words of the pairs {listed} are replaced by each other in the rows of the file, all at the same time. A "
        "model that does not use the group has the same prediction before and after (counterfactual token fairness, "
        'Garg et al. 2019). A word with several counterparts, such as "her" for "him" and "his", has several readings. '
        "Each is predicted, and one of them is not grammatical. Flips in all readings do not depend on the choice. "
        "With one reading per word and text, a text that uses both senses has no fully correct reading.",
        "Known limits: the replacement does not understand the text. It changes the facts of texts in which the group "
        "matters (a name, a pregnancy) and leaves other signs of the group unchanged, so that a difference can be "
        "right and no difference can hide bias. Only rows with a word of the pairs count. The default pairs cover two "
        "genders in English.",
    ]
