"""Scores compared with scikit-learn, scipy, seqeval, sacrebleu and rouge-score, or with independent definitions."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import sacrebleu
import scipy.stats
import seqeval.metrics
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from seqeval.metrics.sequence_labeling import get_entities

from jaxlm.errors import UserError
from jaxlm.tasks import metrics, tagging
from jaxlm.tasks import tags as schemes


def check_close(scores: dict[str, float], expected: dict[str, float]) -> None:
    assert scores.keys() == expected.keys()
    assert scores == pytest.approx(expected, rel=1e-12, abs=1e-12)
    check_finite(scores)


def check_finite(scores: dict[str, float]) -> None:
    assert all(type(value) is float and math.isfinite(value) for value in scores.values())
    json.dumps(scores, allow_nan=False)


def call_quietly(reference: Callable, *arguments, **options):
    """Returns the result of a library function and ignores its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return reference(*arguments, **options)


# Classification.


@st.composite
def two_columns(draw, values):
    n = draw(st.integers(1, 30))
    return [draw(st.lists(values, min_size=n, max_size=n)) for _ in range(2)]


@settings(deadline=None)
@given(st.data(), st.integers(1, 5))
def test_classification_scores_equal_those_of_sklearn(data, count):
    labels, predictions = data.draw(two_columns(st.integers(0, count - 1)))
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(labels, predictions),
        "macro_f1": sklearn.metrics.f1_score(labels, predictions, average="macro", zero_division=0.0),
        "matthews": call_quietly(sklearn.metrics.matthews_corrcoef, labels, predictions),
    }
    if count == 2:
        expected["f1"] = sklearn.metrics.f1_score(labels, predictions, zero_division=0.0)
    check_close(metrics.classification_scores(labels, predictions, [str(c) for c in range(count)]), expected)
    table = metrics.confusion(labels, predictions, count)
    assert (table == call_quietly(sklearn.metrics.confusion_matrix, labels, predictions, labels=range(count))).all()
    assert table.dtype == np.int64


def test_scores_of_classes_have_known_values():
    scores = metrics.classification_scores([0, 0, 1, 1, 1], [0, 1, 1, 1, 0], ["no", "yes"])
    check_close(scores, {"accuracy": 0.6, "f1": 2 / 3, "macro_f1": (1 / 2 + 2 / 3) / 2, "matthews": 1 / 6})
    assert metrics.confusion([0, 0, 1, 1, 1], [0, 1, 1, 1, 0], 2).tolist() == [[1, 1], [1, 2]]


@pytest.mark.parametrize(
    ("labels", "predictions", "accuracy", "f1", "macro_f1"),
    [
        ([], [], 0, 0, 0),
        ([0], [0], 1, 0, 1),
        ([1], [1], 1, 1, 1),
        ([0], [1], 0, 0, 0),
        ([0, 0, 0], [0, 0, 0], 1, 0, 1),  # no positive class
        ([0, 1], [1, 1], 0.5, 2 / 3, 1 / 3),  # a constant prediction
        ([0, 1], [0, 0], 0.5, 0, 1 / 3),
    ],
)
def test_undefined_scores_are_zero(labels, predictions, accuracy, f1, macro_f1):
    expected = {"accuracy": accuracy, "f1": f1, "macro_f1": macro_f1, "matthews": 0.0}
    check_close(metrics.classification_scores(labels, predictions, ["a", "b"]), expected)


def test_macro_f1_averages_classes_that_occur():
    assert metrics.classification_scores([0, 1], [0, 1], list("abcde"))["macro_f1"] == 1.0
    assert metrics.classification_scores([0, 1], [0, 4], list("abcde"))["macro_f1"] == pytest.approx(1 / 3)


def test_there_may_be_one_class_per_example():
    check_close(
        metrics.classification_scores(range(99), range(99), [""] * 99), {"accuracy": 1, "macro_f1": 1, "matthews": 1}
    )


def test_confusion_counts_missing_classes_as_zero():
    assert metrics.confusion([], [], 3).tolist() == [[0] * 3] * 3
    assert metrics.confusion([2], [0], 3).tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert metrics.confusion([0, 0], [0, 0], 1).tolist() == [[2]]  # scikit-learn warns of a single class


def test_per_class_scores_have_known_values():
    """Tests both forms of labels, a class that does not occur, a single class, and no examples."""
    expected = {
        "a": {"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "support": 2},
        "b": {"precision": 1 / 2, "recall": 1.0, "f1": 2 / 3, "support": 1},
        "c": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1},
        "d": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0},
    }
    labels, predictions = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0])
    one_hot = [column[:, None] == np.arange(4) for column in (labels, predictions)]
    for arguments in ((labels, predictions), one_hot):
        scores = metrics.per_class_scores(*arguments, list("abcd"))
        assert {name: pytest.approx(values) for name, values in expected.items()} == scores
        assert all(type(values["support"]) is int for values in scores.values())
        json.dumps(scores)
    single = metrics.per_class_scores([[True], [False]], [[True], [True]], ["a"])
    assert single == {"a": {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "support": 1}}
    for empty in ([], np.zeros((0, 1))):
        assert metrics.per_class_scores(empty, empty, ["a"])["a"] == expected["d"]


@settings(deadline=None)
@given(st.data(), st.integers(1, 12), st.integers(1, 5))
def test_multi_label_scores_equal_those_of_sklearn(data, n, count):
    cells = st.lists(st.lists(st.integers(0, 1), min_size=count, max_size=count), min_size=n, max_size=n)
    labels, predictions = np.array(data.draw(cells)), np.array(data.draw(cells))
    # sklearn needs two columns for a multi-label problem. The second column has no 1 and adds a class with an F1 of 0.
    wide = [np.pad(x, ((0, 0), (0, int(count == 1)))) for x in (labels, predictions)]
    expected = {
        "accuracy": np.mean([(a == b).all() for a, b in zip(labels, predictions)]),
        "micro_f1": sklearn.metrics.f1_score(*wide, average="micro", zero_division=0.0),
        "macro_f1": sklearn.metrics.f1_score(*wide, average="macro", zero_division=0.0) * (1 + (count == 1)),
    }
    check_close(metrics.multi_label_scores(labels, predictions), expected)
    check_close(metrics.multi_label_scores(labels.astype(bool), predictions.astype(np.float32)), expected)


def test_multi_label_scores_of_empty_labels_are_defined():
    zeros = {"accuracy": 0.0, "micro_f1": 0.0, "macro_f1": 0.0}
    check_close(metrics.multi_label_scores([], []), zeros)
    check_close(metrics.multi_label_scores(np.zeros((0, 3)), []), zeros)
    check_close(metrics.multi_label_scores([[0, 0]], [[0, 0]]), {**zeros, "accuracy": 1.0})
    check_close(metrics.multi_label_scores([[1, 0]], [[1, 0]]), {"accuracy": 1.0, "micro_f1": 1.0, "macro_f1": 0.5})


# Regression.

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=100)
@given(two_columns(st.floats(-100, 100, width=16) | st.integers(0, 3)))
def test_regression_scores_equal_those_of_scipy(columns):
    labels, predictions = columns
    pearson = call_quietly(lambda: scipy.stats.pearsonr(*columns).statistic) if len(labels) > 1 else math.nan
    spearman = call_quietly(lambda: scipy.stats.spearmanr(*columns).statistic) if len(labels) > 1 else math.nan
    expected = {
        "pearson": 0.0 if math.isnan(pearson) else pearson,
        "spearman": 0.0 if math.isnan(spearman) else spearman,
        "mse": sklearn.metrics.mean_squared_error(labels, predictions),
    }
    scores = metrics.regression_scores(labels, predictions)
    assert scores == pytest.approx(expected, abs=1e-9)
    check_finite(scores)


@settings(deadline=None, max_examples=100)
@given(two_columns(FLOATS | st.sampled_from([0.0, -0.0, 1.0, 1.0000001, 1e-45, -3.4e38])))
def test_no_float32_value_causes_a_warning_or_nan(columns):
    scores = metrics.regression_scores(np.array(columns[0], np.float32), columns[1])
    check_finite(scores)
    assert -1 <= scores["pearson"] <= 1 and -1 <= scores["spearman"] <= 1 and scores["mse"] >= 0


@pytest.mark.parametrize(
    ("labels", "predictions", "mse"),
    [
        ([], [], 0),
        ([2], [1], 1),
        ([1, 2, 3], [2, 2, 2], 2 / 3),  # a constant prediction
        ([2, 2, 2], [1, 2, 3], 2 / 3),
        ([0.1] * 10, [0.1] * 10, 0),  # the mean is not exactly 0.1
        ([1, 2], [1e15, 1e15], (1e15 - 1.5) ** 2 + 0.25),
    ],
)
def test_correlation_with_a_constant_is_zero(labels, predictions, mse):
    check_close(metrics.regression_scores(labels, predictions), {"pearson": 0.0, "spearman": 0.0, "mse": mse})


def test_numbers_that_differ_only_by_rounding_are_constant():
    assert metrics.regression_scores([1, 2, 3], [1, 1 + 2**-52, 1])["pearson"] == 0.0


def test_spearman_of_a_monotone_function_is_1():
    scores = metrics.regression_scores([1, 2, 3, 4], [1, 10, 100, 1000])
    assert scores["spearman"] == pytest.approx(1.0) and scores["pearson"] < 0.9


# Entities.

LETTERS = {"IOB1": "BI", "IOB2": "BI", "IOBES": "BIES"}
TYPES = ("PER", "LOC", "B-I", "_", "-")


@st.composite
def taggings(draw, scheme):
    """Draws two taggings of the same tokens, with the tags of the scheme in any order."""
    tags = ["O", *(f"{letter}-{kind}" for letter in LETTERS[scheme] for kind in TYPES)]
    lengths = draw(st.lists(st.integers(0, 8), min_size=1, max_size=5))
    some = st.sampled_from(tags[: draw(st.integers(1, len(tags)))])
    return [[draw(st.lists(some, min_size=n, max_size=n)) for n in lengths] for _ in range(2)]


def seqeval_scores(tags, predictions):
    score = {name: getattr(seqeval.metrics, f"{name}_score") for name in ("f1", "precision", "recall")}
    scores = {name: call_quietly(f, tags, predictions, zero_division=0) for name, f in score.items()}
    scores["accuracy"] = seqeval.metrics.accuracy_score(tags, predictions) if any(map(len, tags)) else 0.0
    report = call_quietly(seqeval.metrics.classification_report, tags, predictions, output_dict=True, zero_division=0)
    names = {"precision": "precision", "recall": "recall", "f1-score": "f1", "support": "support"}
    by_type = {
        kind: {names[name]: value for name, value in values.items()}
        for kind, values in report.items()
        if not kind.endswith(" avg")
    }
    return scores, by_type


def check_span_scores(tags, predictions, scheme):
    scores, by_type = metrics.span_scores(tags, predictions, scheme)
    expected, expected_by_type = seqeval_scores(tags, predictions)
    check_close(scores, expected)
    assert list(by_type) == sorted(expected_by_type)
    for kind, values in by_type.items():
        assert values == pytest.approx(expected_by_type[kind], abs=1e-12)
    json.dumps(by_type, allow_nan=False)


@settings(deadline=None, max_examples=80)
@given(st.data(), st.sampled_from(sorted(LETTERS)))
def test_span_scores_equal_those_of_seqeval(data, scheme):
    check_span_scores(*data.draw(taggings(scheme)), scheme)


@pytest.mark.parametrize("scheme", sorted(LETTERS))
def test_span_scores_of_random_sentences_equal_those_of_seqeval(scheme):
    rng = np.random.default_rng(len(scheme))
    tags = np.array(["O", *(f"{letter}-{kind}" for letter in LETTERS[scheme] for kind in ("X", "Y"))])
    for _ in range(20):
        lengths = rng.integers(0, 9, 150)
        true = [rng.choice(tags, n).tolist() for n in lengths]
        found = [[t if rng.random() < 0.7 else str(rng.choice(tags)) for t in sentence] for sentence in true]
        check_span_scores(true, found, scheme)
        for sentence in true:
            assert get_entities(schemes.iob2(sentence, "spans")) == get_entities(sentence)


@settings(deadline=None, max_examples=100)
@given(st.data(), st.sampled_from(sorted(LETTERS)))
def test_iob2_keeps_the_entities(data, scheme):
    tags, predictions = data.draw(taggings(scheme))
    converted = [[schemes.iob2(sentence, "spans") for sentence in column] for column in (tags, predictions)]
    for sentence, new in zip(tags, converted[0]):
        assert get_entities(new) == get_entities(sentence)
        assert tagging._count_repaired(new, "spans") == 0 and schemes.iob2(new, "spans") == new
        changed = sum(a[0] == "I" and b[0] == "B" for a, b in zip(sentence, new))
        assert tagging._count_repaired(sentence, "spans") == changed
        starts = {first for _, first, _ in get_entities(sentence)}
        assert starts == {i for i, tag in enumerate(new) if tag[0] == "B"}
    scores, by_type = metrics.span_scores(tags, predictions, scheme)
    new_scores, new_by_type = metrics.span_scores(*converted, "IOB2")
    assert by_type == new_by_type
    assert {**scores, "accuracy": 0} == {**new_scores, "accuracy": 0}


@pytest.mark.parametrize(
    ("tags", "new", "repaired"),
    [
        ("I-A I-A B-A I-B O I-B", "B-A I-A B-A B-B O B-B", 3),
        ("O I-A I-A B-A I-B", "O B-A I-A B-A B-B", 2),
        ("S-A B-A E-A B-B I-B E-B O", "B-A B-A I-A B-B I-B I-B O", 0),
        ("E-A E-A I-A S-A I-A B-A E-B", "B-A B-A B-A B-A B-A B-A B-B", 2),  # only I- tags are counted
        ("", "", 0),
    ],
)
def test_iob2_converts_every_scheme(tags, new, repaired):
    assert schemes.iob2(tags.split(), "spans") == new.split()
    assert tagging._count_repaired(tags.split(), "spans") == repaired


def test_span_scores_have_known_values():
    tags = [["B-PER", "I-PER", "O", "B-LOC"], ["O"], []]
    predictions = [["B-PER", "I-PER", "O", "B-PER"], ["I-LOC"], []]
    scores, by_type = metrics.span_scores(tags, predictions, "IOB2")
    check_close(scores, {"f1": 2 / 5, "precision": 1 / 3, "recall": 1 / 2, "accuracy": 3 / 5})
    assert by_type == {
        "LOC": {"f1": 0.0, "precision": 0.0, "recall": 0.0, "support": 1},
        "PER": {"f1": pytest.approx(2 / 3), "precision": 0.5, "recall": 1.0, "support": 1},
    }


def test_an_entity_ends_with_its_sentence():
    scores, by_type = metrics.span_scores([["B-X"], ["I-X"]], [["B-X"], ["I-X"]], "IOB2")
    assert by_type["X"]["support"] == 2 and scores["f1"] == 1.0


@pytest.mark.parametrize("tags", [[], [[]], [["O", "O"]]])
def test_scores_without_entities_are_zero(tags):
    scores, by_type = metrics.span_scores(tags, tags, "IOB2")
    check_close(scores, {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": float(tags == [["O", "O"]])})
    assert by_type == {}


def test_sentences_may_be_tuples_or_arrays():
    tags = [("B-X", "O"), np.array(["I-X", "B-X"])]
    assert metrics.span_scores(tags, tags, "IOB1")[1]["X"]["support"] == 3


@pytest.mark.parametrize("tag", ["PER", "B", "I-", "-PER", "X-PER", "BPER", "o", "O-PER", "", "L-PER", "b-PER"])
@pytest.mark.parametrize("scheme", sorted(LETTERS))
def test_other_tags_are_refused(tag, scheme):
    expected = rf"the tag '{tag}' is not one of {scheme}, which are O, B-TYPE, .*; correct it, or name the scheme"
    with pytest.raises(UserError, match=expected):
        metrics.span_scores([["O", tag]], [["O", "O"]], scheme)
    with pytest.raises(UserError, match=expected):
        metrics.span_scores([["O", "O"]], [["O", tag]], scheme)


def test_tags_of_another_scheme_are_refused():
    with pytest.raises(UserError, match=r"the tag 'E-X' is not one of IOB2, which are O, B-TYPE, I-TYPE; .*IOBES"):
        metrics.span_scores([["B-X", "E-X"]], [["O", "O"]], "IOB2")
    with pytest.raises(UserError, match=r"no scheme of tags 'IOB'; perhaps you meant"):
        metrics.span_scores([["O"]], [["O"]], "IOB")
    with pytest.raises(UserError, match="the tag 3 is not one of IOB2"):
        metrics.span_scores([[3]], [["O"]], "IOB2")


def test_sentences_of_different_lengths_are_refused():
    with pytest.raises(UserError, match=r"1 sentences with tags, 2 with predictions; give as many"):
        metrics.span_scores([["O"]], [["O"], ["O"]], "IOB2")
    with pytest.raises(UserError, match=r"sentence 1 has 1 tags, 2 predictions; give one"):
        metrics.span_scores([[], ["O"]], [[], ["O", "O"]], "IOB2")


# Answers.


def words(text: str) -> list[str]:
    """Returns the words of an answer as SQuAD defines them, without regular expressions."""
    characters = [c for c in text.lower() if not (c.isascii() and unicodedata.category(c)[0] in "PS")]
    found, run = [], ""
    for c in [*characters, " "]:
        if c.isalnum():  # \w matches the underscore too, but it is punctuation
            run += c
        else:
            found.append(" " if run in ("a", "an", "the") else run)
            found.append(c)
            run = ""
    return "".join(found).split()


def f1_of(gold: list[str], prediction: list[str]) -> float:
    if not gold or not prediction:
        return float(gold == prediction)
    left, shared = list(gold), 0
    for word in prediction:
        if word in left:
            left.remove(word)
            shared += 1
    if not shared:
        return 0.0
    precision, recall = shared / len(prediction), shared / len(gold)
    return 2 * precision * recall / (precision + recall)


def squad_reference(answers: list[str], prediction: str) -> tuple[float, float]:
    gold = [words(answer) for answer in answers]
    gold = [answer for answer in gold if answer] or [[]]
    predicted = words(prediction)
    return max(float(answer == predicted) for answer in gold), max(f1_of(answer, predicted) for answer in gold)


PIECES = [
    "a",
    "An",
    "THE",
    "the",
    "cat",
    "Cat",
    "cats",
    "3.5",
    "'s",
    "-",
    "_",
    "!?",
    "…",
    "«",
    "—",
    "É",
    "e\u0301",
    "İ",
]
PIECES += [
    "\u00a0",
    "\u200b",
    "\u2028",
    "\t",
    " ",
    " ",
    " ",
    "ß",
    "猫",
    "the猫",
    "२",
    "²",
    "a\u0301",
    "$",
    "`",
    "＄",
    "\x1c",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join) | st.text(max_size=12)


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_texts_are_normalised_as_in_squad(text):
    assert metrics.normalised(text) == " ".join(words(text))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.lists(TEXTS, max_size=3), TEXTS), max_size=6))
def test_answers_are_scored_as_in_squad(questions):
    answers, predictions = [a for a, _ in questions], [p for _, p in questions]
    each = [squad_reference(*question) for question in questions]
    np.testing.assert_allclose([metrics.exact_f1(*question) for question in questions], each, rtol=1e-12)
    expected = {"exact": 0.0, "f1": 0.0}
    if each:
        expected = dict(zip(("exact", "f1"), np.mean(each, 0)))
    answerable = [scores for scores, a in zip(each, answers) if a]
    unanswerable = [scores for scores, a in zip(each, answers) if not a]
    if answerable and unanswerable:
        expected["has_answer_exact"], expected["has_answer_f1"] = np.mean(answerable, 0)
        expected["no_answer_exact"], no_answer_f1 = np.mean(unanswerable, 0)
        assert expected["no_answer_exact"] == no_answer_f1
    check_close(metrics.squad_scores(answers, predictions), expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat's\tA-Team.", "cats ateam"),  # punctuation is removed before articles
        ("a-n", ""),
        ("a.", ""),
        ("theatre an", "theatre"),
        ("the the a", ""),
        ("?!", ""),
        ("“a”", "“ ”"),  # these quotes are not ASCII: they remain and end a word
        ("l'été à Nîmes", "lété à nîmes"),
        ("x\u00a0y\u3000z", "x y z"),
        ("A_N", ""),
        ("", ""),
    ],
)
def test_normalised_texts_have_known_values(text, expected):
    assert metrics.normalised(text) == expected == " ".join(words(text))


@pytest.mark.parametrize(
    ("answers", "prediction", "exact", "f1"),
    [
        (["the cat"], "Cat.", 1, 1),
        (["cat cat dog"], "cat cat cat", 0, 2 / 3),  # a word counts as often as it occurs in both
        (["cat dog"], "dog cat", 0, 1),
        (["cat", "cat dog mouse"], "dog mouse", 0, 0.8),
        (["cat"], "", 0, 0),
        ([], "", 1, 1),
        ([], "cat", 0, 0),
        ([], "the", 1, 1),
        (["the"], "", 1, 1),  # no true answer is left
        (["the", "cat"], "", 0, 0),  # "the" is ignored
        (["the", "cat"], "a", 0, 0),
        (["!", "a"], "cat", 0, 0),
    ],
)
def test_exact_and_f1_have_known_values(answers, prediction, exact, f1):
    assert metrics.exact_f1(answers, prediction) == pytest.approx((exact, f1))
    assert squad_reference(answers, prediction) == pytest.approx((exact, f1))


def test_squad_scores_have_known_values():
    scores = metrics.squad_scores([["cat"], ["cat dog"], []], ["cat", "dog", "mouse"])
    parts = {"has_answer_exact": 1 / 2, "has_answer_f1": 5 / 6, "no_answer_exact": 0.0}
    check_close(scores, {"exact": 1 / 3, "f1": 5 / 9, **parts})
    check_close(metrics.squad_scores([[]], [""]), {"exact": 1.0, "f1": 1.0})
    check_close(metrics.squad_scores([["the"], []], ["", ""]), {"exact": 1.0, "f1": 1.0, **dict.fromkeys(parts, 1.0)})
    check_close(metrics.squad_scores([], []), {"exact": 0.0, "f1": 0.0})


def test_answers_of_wrong_shapes_are_refused():
    with pytest.raises(UserError, match=r"2 questions, 1 predictions; give one for each"):
        metrics.squad_scores([["a"], []], ["a"])
    with pytest.raises(UserError, match=r"the answers 'cat' are one string; give a list"):
        metrics.squad_scores(["cat"], ["cat"])


# The threshold.

FRACTIONS = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(-3, 3) | FLOATS, FRACTIONS, st.sampled_from([0.0, 1.0])), min_size=1))
def test_the_best_threshold_maximises_the_score(questions):
    margins, answered, unanswered = (np.array(column) for column in zip(*questions))

    def mean(threshold: float) -> float:
        return float(np.where(margins >= threshold, answered, unanswered).mean())

    threshold, best = metrics.best_threshold(margins, answered, unanswered)
    check_finite({"threshold": threshold, "best": best})
    assert best == mean(threshold) == max(map(mean, [*margins, math.inf]))  # every possible threshold
    larger = margins[margins > threshold]
    assert all(mean(margin) < best for margin in larger)  # the highest of the best thresholds
    assert threshold in margins or ((margins < threshold).all() and mean(math.inf) == best)


def test_the_threshold_equals_that_of_the_official_sweep():
    """Computes the sweep of SQuAD 2.0 question by question, with distinct margins."""
    rng = np.random.default_rng(0)
    for n in (1, 2, 50):
        margins = rng.normal(size=n)
        has = rng.random(n) < 0.5
        answered, unanswered = np.where(has, rng.integers(0, 5, n) / 4, 0.0), np.where(has, 0.0, 1.0)
        score = best = unanswered.sum()
        threshold = None
        for i in sorted(range(n), key=lambda i: -margins[i]):
            score += answered[i] if has[i] else -1
            if score > best:
                best, threshold = score, margins[i]
        found = metrics.best_threshold(margins, answered, unanswered)
        assert found[1] == pytest.approx(best / n)
        assert found[0] == (margins.max() + 1 if threshold is None else threshold)


def test_thresholds_have_known_values():
    assert metrics.best_threshold([3, 2, 1], [1, 0, 1], [0, 1, 0]) == (3.0, pytest.approx(2 / 3))
    assert metrics.best_threshold([3, 2, 1], [1, 1, 1], [0, 0, 0]) == (1.0, 1.0)
    assert metrics.best_threshold([3, 2, 1], [0, 0, 0], [1, 1, 1]) == (4.0, 1.0)
    assert metrics.best_threshold([1e30], [0], [1]) == (np.nextafter(1e30, np.inf), 1.0)
    assert metrics.best_threshold([1, 1], [1, 0], [0, 1]) == (2.0, 0.5)  # no threshold separates them
    assert metrics.best_threshold([], [], []) == (0.0, 0.0)


# Generated texts.

WORDS = ["the", "a", "cat", "cats", "sat", "sitting", "on", "mats", ".", ",", "Mat", "é", "猫", "\n"]
LINES = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)


@settings(deadline=None)
@given(st.lists(st.tuples(st.lists(LINES, min_size=2, max_size=2), LINES), min_size=1, max_size=6))
def test_text_scores_equal_those_of_sacrebleu_and_rouge_score(examples):
    references, texts = [list(r) for r, _ in examples], [t for _, t in examples]
    streams = [list(column) for column in zip(*references)]
    bleu, chrf = sacrebleu.corpus_bleu(texts, streams), sacrebleu.corpus_chrf(texts, streams)
    check_close(metrics.translation_scores(references, texts), {"bleu": min(bleu.score, 100.0), "chrf": chrf.score})
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    each = [
        [{k: s.fmeasure for k, s in scorer.score(right, text).items()} for right in some]
        for some, text in zip(references, texts)
    ]
    expected = {k: float(np.mean([max(s[k] for s in scores) for scores in each])) for k in scorer.rouge_types}
    if any(c.isascii() and c.isalnum() for right in streams for text in right for c in text):
        check_close(metrics.summary_scores(references, texts), expected)


def test_a_single_reference_needs_no_list():
    references, texts = ["the cat sat on a mat", "hello there"], ["a cat sat on the mat", "hello world"]
    for score in (metrics.translation_scores, metrics.summary_scores, metrics.answer_scores):
        check_close(score(references, texts), score([[right] for right in references], texts))
    assert metrics.translation_signatures(references) == metrics.translation_signatures([[r] for r in references])


def test_texts_may_have_different_numbers_of_references():
    references, texts = [["x y z w", "the cat sat on the mat"], ["hello there world"]], ["the cat sat on the mat", "hi"]
    streams = [["x y z w", "hello there world"], ["the cat sat on the mat", None]]
    expected = {
        "bleu": sacrebleu.corpus_bleu(texts, streams).score,
        "chrf": sacrebleu.corpus_chrf(texts, streams).score,
    }
    check_close(metrics.translation_scores(references, texts), expected)
    assert metrics.summary_scores(references, texts)["rouge1"] == 0.5
    check_close(metrics.answer_scores(references, texts), {"exact": 0.5, "f1": 0.5})


def test_translation_scores_have_known_values():
    """By definition, 4/5, 3/4, 2/3 and 1/2 of the n-grams of "a b c d e" are correct for "a b c d f"."""
    scores = metrics.translation_scores(["a b c d f"], ["a b c d e"])
    assert scores["bleu"] == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    rates = [4 / 5, 3 / 4, 2 / 3, 1 / 2, 0]  # of the characters abcde, without spaces; both texts have the same length
    assert scores["chrf"] == pytest.approx(100 * np.mean(rates))
    short = metrics.translation_scores(["a b c d e f g h"], ["a b c d"])["bleu"]
    assert short == pytest.approx(100 * math.exp(1 - 8 / 4))  # every n-gram is correct, but the text is short


def test_summary_scores_have_known_values():
    scores = metrics.summary_scores(["the cats sat quietly"], ["a cat sat quietly there"])
    check_close(scores, {"rouge1": 2 * 3 / 9, "rouge2": 2 * 2 / 7, "rougeL": 2 * 3 / 9, "rougeLsum": 2 * 3 / 9})
    reordered = metrics.summary_scores(["one two three\nfour five six"], ["four five six\none two three"])
    assert reordered["rougeL"] == 0.5 and reordered["rougeLsum"] == 1.0  # sentences in another order


def test_answer_scores_have_known_values():
    references = [["the cat"], ["cat dog mouse", "a mouse"], ["five"]]
    check_close(
        metrics.answer_scores(references, ["Cat.", "mouse dog", ""]), {"exact": 1 / 3, "f1": (1 + 4 / 5 + 0) / 3}
    )


@pytest.mark.parametrize("text", ["the quick brown fox jumps", "word"])
def test_the_reference_has_a_perfect_score_and_another_text_scores_zero(text):
    assert metrics.translation_scores([text], [text])["chrf"] == 100.0
    if " " in text:
        assert metrics.translation_scores([text], [text])["bleu"] == 100.0
        assert metrics.translation_scores([text] * 3, [text] * 3) == {"bleu": 100.0, "chrf": 100.0}
    assert metrics.summary_scores([text], [text])["rougeLsum"] == 1.0
    for other in ("zzz zz", "", " \n"):
        assert metrics.translation_scores([text], [other]) == {"bleu": 0.0, "chrf": 0.0}
        assert set(metrics.summary_scores([text], [other]).values()) == {0.0}
        assert set(metrics.answer_scores([text], [other]).values()) == {0.0}
    assert metrics.translation_scores([""], [text]) == {"bleu": 0.0, "chrf": 0.0}


def test_scores_of_no_texts_are_zero():
    check_close(metrics.translation_scores([], []), {"bleu": 0.0, "chrf": 0.0})
    check_close(metrics.summary_scores([], []), dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), 0.0))
    check_close(metrics.answer_scores([], []), {"exact": 0.0, "f1": 0.0})
    check_close(metrics.translation_scores([""], [""]), {"bleu": 0.0, "chrf": 0.0})
    assert metrics.summary_scores([""], [""])["rouge1"] == 0.0


def test_chinese_has_a_tokenizer_of_its_own():
    references, texts = ["猫坐在垫子上。"], ["猫坐在垫子里。"]
    assert metrics.translation_scores(references, texts, tokenize="zh")["bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(texts, [references], tokenize="zh").score
    )
    assert metrics.translation_signatures(references, "zh")["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:zh|")


def test_signatures_name_the_settings_of_sacrebleu():
    version = f"version:{sacrebleu.__version__}"
    assert metrics.translation_signatures(["a", ["b", "c"]]) == {
        "bleu": f"nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|{version}",
        "chrf": f"nrefs:var|case:mixed|eff:yes|nc:6|nw:0|space:no|{version}",
    }
    assert metrics.translation_signatures([["b", "c"]])["bleu"].startswith("nrefs:2|")


@pytest.mark.parametrize("score", [metrics.translation_scores, metrics.summary_scores, metrics.answer_scores])
@pytest.mark.parametrize(
    ("references", "texts", "message"),
    [
        (["a", "b"], ["a"], "references of 2 texts, and 1 texts; give as many"),
        (["a", []], ["a", "b"], "text 1 has no reference; give at least one"),
        ("ab", ["a", "b"], "one string; give a list"),
        (["a", "b"], "ab", "one string; give a list"),
        (["a"], [None], "text 0 or its reference is None; give strings"),
        ([["a", 3]], ["a"], "text 0 or its reference is 3; give strings"),
    ],
)
def test_references_that_do_not_match_the_texts_are_refused(score, references, texts, message):
    with pytest.raises(UserError, match=message):
        score(references, texts)


def test_unknown_tokenizers_and_unscorable_references_are_refused():
    with pytest.raises(UserError, match="BLEU has no tokenizer '13b'; perhaps you meant '13a'"):
        metrics.translation_scores(["a"], ["a"], tokenize="13b")
    with pytest.raises(UserError, match=r"no letter from a to z and no digit \('猫坐在.*chrF"):
        metrics.summary_scores(["猫坐在", "猫"], ["猫", "cat"])
    with pytest.raises(UserError, match="no references"):
        metrics.translation_signatures([])


# Retrieval.


@settings(deadline=None)
@given(st.data(), st.integers(1, 8), st.integers(1, 12))
def test_ranks_equal_those_of_scipy(data, n, m):
    row = st.lists(st.integers(0, 4), min_size=m, max_size=m)
    similarities = np.array(data.draw(st.lists(row, min_size=n, max_size=n)), np.float32) / 4
    right = data.draw(st.lists(st.integers(0, m - 1), min_size=n, max_size=n))
    found = metrics.ranks(similarities, right)
    worst = scipy.stats.rankdata(-similarities, method="max", axis=1)
    assert found.tolist() == worst[np.arange(n), right].tolist() and found.dtype == np.int64
    cut = n // 2  # compute some of the queries
    parts = [metrics.ranks(similarities[:cut], right[:cut]), metrics.ranks(similarities[cut:], right[cut:])]
    assert np.concatenate(parts).tolist() == found.tolist()
    expected = {f"recall@{k}": np.mean([r <= k for r in found.tolist()]) for k in (1, 5, 10)}
    check_close(metrics.retrieval_scores(found), {"mrr": np.mean([1 / r for r in found.tolist()]), **expected})


def test_the_mean_reciprocal_rank_equals_that_of_sklearn():
    rng = np.random.default_rng(0)
    similarities, right = rng.normal(size=(40, 15)), rng.integers(0, 15, 40)
    mrr = sklearn.metrics.label_ranking_average_precision_score(np.eye(15, dtype=int)[right], similarities)
    scores = metrics.retrieval_scores(metrics.ranks(similarities, right))
    assert scores["mrr"] == pytest.approx(mrr)
    for k in (1, 5, 10):
        top = sklearn.metrics.top_k_accuracy_score(right, similarities, k=k, labels=range(15))
        assert scores[f"recall@{k}"] == pytest.approx(top)


def test_constant_similarities_have_the_worst_rank():
    assert metrics.ranks(np.ones((3, 7)), [0, 3, 6]).tolist() == [7, 7, 7]
    assert metrics.ranks([[0.0, -0.0, -math.inf]], [2]).tolist() == [3]


def test_ranks_have_known_values():
    assert metrics.ranks([[0.9, 0.5, 0.5], [0.1, 0.2, 0.3]], [1, 2]).tolist() == [3, 1]
    check_close(
        metrics.retrieval_scores([1, 2, 6, 20]),
        {"mrr": 103 / 240, "recall@1": 0.25, "recall@5": 0.5, "recall@10": 0.75},
    )


def test_retrieval_scores_without_queries_are_zero():
    assert metrics.ranks([], []).tolist() == metrics.ranks(np.zeros((0, 4)), []).tolist() == []
    check_close(metrics.retrieval_scores([]), {"mrr": 0.0, "recall@1": 0.0, "recall@5": 0.0, "recall@10": 0.0})


# Invalid input.

NAN = [0.0, math.nan, math.inf, 1.0]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (
            lambda: metrics.regression_scores([1, 2, 3, 4], NAN),
            r"2 of 4 predictions are not finite numbers.*earlier checkpoint",
        ),
        (
            lambda: metrics.regression_scores(NAN, [1, 2, 3, 4]),
            r"2 of 4 labels are not finite numbers.*correct or remove",
        ),
        (lambda: metrics.regression_scores([1.0], [1e39]), r"1 of 1 predictions are not finite numbers"),
        (
            lambda: metrics.classification_scores([0, 0, 1, 1], NAN, ["a", "b"]),
            r"2 of 4 predictions are not finite numbers",
        ),
        (lambda: metrics.multi_label_scores([[1, 0]], [[math.nan, 0]]), r"1 of 2 predictions are not finite numbers"),
        (lambda: metrics.best_threshold(NAN, NAN, NAN), r"2 of 4 margins are not finite numbers"),
        (lambda: metrics.ranks([[math.nan, 1.0]], [0]), r"1 of 2 similarities are not numbers.*earlier checkpoint"),
        (
            lambda: metrics.classification_scores(["a"], [0], ["a", "b"]),
            r"labels hold a value that is not a number .*correct them",
        ),
        (lambda: metrics.regression_scores([[1], [1, 2]], [0, 1]), r"labels hold a value that is not a number"),
        (
            lambda: metrics.classification_scores([0], [2], ["a", "b"]),
            r"predictions hold 2; classes are integers from 0 to 1",
        ),
        (lambda: metrics.classification_scores([-1], [0], ["a", "b"]), r"labels hold -1; classes are integers"),
        (lambda: metrics.confusion([0.5], [0], 2), r"labels hold 0.5; classes are integers from 0 to 1; correct"),
        (lambda: metrics.multi_label_scores([[1, 0]], [[0.3, 0]]), r"predictions hold 0.3; .*compare with a threshold"),
        (lambda: metrics.multi_label_scores([[2]], [[1]]), r"labels hold 2"),
        (
            lambda: metrics.classification_scores([0], [0, 1], ["a", "b"]),
            r"labels have the shape \(1,\), predictions \(2,\)",
        ),
        (lambda: metrics.regression_scores([0], []), r"labels have the shape \(1,\), predictions \(0,\)"),
        (lambda: metrics.regression_scores([[0]], [[0]]), r"labels have the shape \(1, 1\).*give one label and one"),
        (lambda: metrics.multi_label_scores([[1, 0]], [[1]]), r"shape \(1, 2\), predictions \(1, 1\)"),
        (lambda: metrics.multi_label_scores([1, 0], [1, 0]), r"need the same one, \[examples, classes\]"),
        (lambda: metrics.best_threshold([1], [1, 1], [1]), r"margins have the shape \(1,\), scores \(2,\) and \(1,\)"),
        (lambda: metrics.ranks([[1, 2]], [2]), r"a right document is in column 2 of 2; count them from 0"),
        (lambda: metrics.ranks([[1, 2]], [-1]), r"column -1 of 2"),
        (lambda: metrics.ranks([[1, 2]], [0, 1]), r"shape \(1, 2\), columns of the right documents \(2,\)"),
        (lambda: metrics.retrieval_scores([1, 0]), r"there is a rank 0; the best rank is 1"),
    ],
)
def test_invalid_input_is_refused(score, message):
    with pytest.raises(UserError, match=message):
        score()


def test_libraries_of_scores_are_imported_only_for_scores():
    libraries = {"sklearn", "scipy.stats", "seqeval", "sacrebleu", "rouge_score"}
    code = f"import sys, jaxlm.tasks.metrics; assert not {libraries} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.long
@pytest.mark.parametrize(
    "score",
    [
        "classification_scores([0, 1], [0, 0], 'ab')",
        "span_scores([['O']], [['B-X']], 'IOB2')",
        "regression_scores([1, 2], [2, 1])",
        "translation_scores(['a'], ['b'])",
        "summary_scores(['a'], ['b'])",
    ],
)
def test_the_libraries_print_no_warnings(score):
    code = f"import jaxlm.tasks.metrics; jaxlm.tasks.metrics.{score}"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
