"""Baselines of tasks over records: the most frequent label, and linear models of TF-IDF features by scikit-learn.

Each baseline learns from the training records of a run and predicts its held-out records, and the task scores these
predictions as it scores those of its model.  The features of a text are the TF-IDF weights of its words, marks and
pairs of adjacent words.  The features of a pair of texts are those of both.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from jaxlm import config
from jaxlm.baselines.result import Baseline
from jaxlm.data.formats.lines import Row
from jaxlm.tasks import metrics
from jaxlm.tasks.cells import Record, Records
from jaxlm.tasks.records import RecordTask

MAX_WEIGHTS = 10_000_000  # of a linear model; more features than this allows are left out, the rarest first
MAX_LOGITS = 5_000_000  # of a linear model for all its training examples; more examples are left out, evenly spaced
_TOKEN = r"\w+|[^\w\s]"  # words, and marks such as "?"
_CHUNK = 1024  # texts that are compared with all others at once
_LOGISTIC, _COSINE = "TF-IDF + logistic regression", "TF-IDF cosine"


class Split(NamedTuple):
    """The records that a baseline learns from, those that it predicts, and its limit."""

    train: Sequence[Record]
    held_out: Sequence[Record]
    examples: int  # maximum number of training records for TF-IDF; 0: no TF-IDF

    @property
    def sample(self) -> Sequence[Record]:
        """The training records for TF-IDF, evenly spaced if there are too many."""
        if len(self.train) <= self.examples:
            return self.train
        return [self.train[i] for i in np.linspace(0, len(self.train) - 1, self.examples).astype(int)]


def baselines_of(task: RecordTask, train: Records, held_out: Records, examples: int) -> Iterator[Baseline]:
    """Yields the baselines of a task; none for a task that has no usual ones, such as translation.

    Args:
      task: the task, with the names of its labels.
      train: the training records.
      held_out: the records to predict.
      examples: the maximum number of training records for TF-IDF; 0: no TF-IDF.
    """
    make = BASELINES.get(type(task.task))
    if make is not None:
        examples = min(examples, MAX_LOGITS // max(1, len(task.labels)))
        yield from make(task, Split(train.records, held_out.records, examples))


def _scored(task: Any, name: str, parts: Split, predict: Callable[[], list[Row]]) -> Baseline:
    """Returns the scores of predictions; a baseline without predictions has a note with the reason."""
    return _baseline(name, parts, lambda: task.score(parts.held_out, predict()))


def _baseline(name: str, parts: Split, score: Callable[[], dict[str, float]]) -> Baseline:
    try:
        scores = score()
    except _NoResultError as error:
        return Baseline(name, {}, f"There is no {name}: {error}.")
    count, used = len(parts.train), len(parts.sample)
    is_sample = name.startswith("TF-IDF") and used < count
    return Baseline(name, scores, f"TF-IDF uses {used:,} of {count:,} training examples." if is_sample else "")


class _NoResultError(Exception):
    """The training records are not enough for a baseline; the message is the reason."""


def most_frequent(labels: Sequence[Any], names: Sequence[Any] = ()) -> Any:
    """Returns the most frequent label; if several are, the first of them in `names`, else in the data."""
    counts = Counter(dict.fromkeys(names, 0))
    counts.update(labels)
    return max(counts, key=counts.__getitem__)


# Classes and numbers


def _classification(task: Any, parts: Split) -> Iterator[Baseline]:
    problem, labels = task.task.problem, [record["label"] for record in parts.train]
    if problem == "regression":
        mean = float(np.mean(labels))
        yield _scored(task, "mean", parts, lambda: [{"prediction": mean}] * len(parts.held_out))
        if parts.examples:
            name = _COSINE if len(task.task.text) == 2 else "TF-IDF + ridge regression"
            yield _scored(task, name, parts, lambda: _predict_numbers(parts, len(task.task.text) == 2))
        return
    if problem == "multi_label":
        counts = Counter(label for several in labels for label in several)
        majority: Any = [name for name in task.labels if 2 * counts[name] > len(labels)]
    else:
        majority = most_frequent(labels, task.labels)
    yield _scored(task, "majority", parts, lambda: [{"prediction": majority}] * len(parts.held_out))
    if parts.examples:
        yield _scored(task, _LOGISTIC, parts, lambda: _predict_classes(task, parts))


def _predict_classes(task: Any, parts: Split) -> list[Row]:
    """Returns the predictions of a logistic regression, for several labels of one for each label."""
    from sklearn.multiclass import OneVsRestClassifier

    several = task.task.problem == "multi_label"
    labels = [record["label"] for record in parts.sample]
    if several:
        targets: Any = np.array([np.isin(task.labels, label) for label in labels], int)
    else:
        targets = labels
        if len(set(labels)) < 2:
            raise _NoResultError(f"all {len(labels):,} training examples have the label {labels[0]!r}")
    model = logistic_regression(task.task.class_weights == "balanced")
    pipeline = text_pipeline(len(task.task.text), len(task.labels), OneVsRestClassifier(model) if several else model)
    predicted = _fit_predict(pipeline, parts, targets)
    if several:
        return [{"prediction": [name for name, applies in zip(task.labels, row) if applies]} for row in predicted]
    return [{"prediction": str(label)} for label in predicted]


def logistic_regression(balanced: bool = False) -> Any:
    """Returns scikit-learn's logistic regression, with balanced class weights or without."""
    from sklearn.linear_model import LogisticRegression

    # TF-IDF vectors have the length 1, for which the default C of 1 is too strong: TREC's accuracy is 3 points lower.
    return LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced" if balanced else None)


def text_pipeline(columns: int, outputs: int, model: Any) -> Any:
    """Returns the scikit-learn pipeline of a baseline, which reads an array of texts [N, columns].

    Args:
      columns: number of texts of an example.
      outputs: number of outputs of the model, which limits the number of features.
      model: the model of the features.
    """
    from sklearn.compose import ColumnTransformer
    from sklearn.pipeline import make_pipeline

    vectorizers = [(str(n), vectorizer(max_features=MAX_WEIGHTS // (outputs * columns)), n) for n in range(columns)]
    return make_pipeline(ColumnTransformer(vectorizers), model)


def vectorizer(longest: int = 2, max_features: int = MAX_WEIGHTS) -> Any:
    """Returns scikit-learn's TF-IDF of words and, if `longest` is 2, pairs of words; at most this many features."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, longest), token_pattern=_TOKEN, max_features=max(1000, max_features))


def _fit_predict(pipeline: Any, parts: Split, targets: Any) -> Any:
    texts = lambda records: np.array([record["texts"] for record in records], object)
    with _scikit_learn():
        return pipeline.fit(texts(parts.sample), targets).predict(texts(parts.held_out))


@contextmanager
def _scikit_learn() -> Iterator[None]:
    """Converts scikit-learn's error for texts without words, hides its warnings, and uses one thread.

    A class that all or none of the examples have is predicted as such, and a model that has not converged is still a
    baseline.  One thread is faster for these small matrices than several, which wait for each other.
    """
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")
        try:
            yield
        except ValueError as error:
            if "empty vocabulary" not in str(error):
                raise
            raise _NoResultError("the training texts contain no words") from None


def _predict_numbers(parts: Split, is_pair: bool) -> list[Row]:
    """Returns numbers from a ridge regression, or for pairs of texts from the line that fits their cosine best."""
    from sklearn.linear_model import Ridge

    labels = np.array([record["label"] for record in parts.sample])
    if not is_pair:
        return [{"prediction": float(x)} for x in _fit_predict(text_pipeline(1, 1, Ridge()), parts, labels)]
    cosines, predicted = (_cosines(parts, records) for records in (parts.sample, parts.held_out))
    slope, constant = np.polyfit(cosines, labels, 1) if np.ptp(cosines) else (0.0, labels.mean())
    return [{"prediction": float(slope * cosine + constant)} for cosine in predicted]


# Similarity


def _cosines(parts: Split, records: Sequence[Record]) -> np.ndarray:
    """Returns the cosine of the TF-IDF vectors of each pair of texts."""
    first, second = _vectors(parts, [[record["texts"][side] for record in records] for side in (0, 1)])
    return np.asarray(first.multiply(second).sum(axis=1)).ravel()


def _vectors(parts: Split, sides: Sequence[Sequence[str]]) -> list[Any]:
    """Returns the TF-IDF vectors of texts, with the document frequencies of the training texts."""
    with _scikit_learn():
        # Pairs of words are too rare for a cosine: with them, Spearman on STS-B is 0.58 instead of 0.64.
        fitted = vectorizer(longest=1).fit(text for record in parts.sample for text in record["texts"])
        return [fitted.transform(texts) for texts in sides]


def _similarity(task: Any, parts: Split) -> Iterator[Baseline]:
    if not parts.examples:
        return
    if task.task.objective == "cosine":
        predict = lambda: [{"_cosine": float(cosine)} for cosine in _cosines(parts, parts.held_out)]
        yield _scored(task, _COSINE, parts, predict)
        return
    yield _baseline(_COSINE, parts, lambda: metrics.retrieval_scores(_ranks(parts)))


def _ranks(parts: Split) -> np.ndarray:
    """Returns the rank of the right second text for each first text, among all different second texts."""
    texts, of_query_N = np.unique([record["texts"][1] for record in parts.held_out], return_inverse=True)
    queries, documents = _vectors(parts, [[record["texts"][0] for record in parts.held_out], texts.tolist()])
    chunks = (slice(start, start + _CHUNK) for start in range(0, len(of_query_N), _CHUNK))
    ranks = [metrics.ranks((queries[chunk] @ documents.T).toarray(), of_query_N[chunk]) for chunk in chunks]
    return np.concatenate(ranks)


# Tags, choices and answers


def _tagging(task: Any, parts: Split) -> Iterator[Baseline]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in parts.train:
        for word, tag in zip(record["tokens"], record["label"]):
            counts[word][tag] += 1
    majority = most_frequent([tag for record in parts.train for tag in record["label"]], task.labels)
    predict = lambda choose: [{"prediction": [*map(choose, record["tokens"])]} for record in parts.held_out]
    yield _scored(task, "majority", parts, lambda: predict(lambda word: majority))
    tag_of = {word: max(tags, key=lambda tag: (tags[tag], tag == majority)) for word, tags in counts.items()}
    name = "most frequent tag of each word"
    yield _scored(task, name, parts, lambda: predict(lambda word: tag_of.get(word, majority)))


def _multiple_choice(task: Any, parts: Split) -> Iterator[Baseline]:
    counts = Counter(record["label"] for record in parts.train)
    best = lambda record: max(range(len(record["options"])), key=counts.__getitem__)
    yield _scored(task, "most frequent place", parts, lambda: [{"_index": best(record)} for record in parts.held_out])


def _question_answering(task: Any, parts: Split) -> Iterator[Baseline]:
    if all(record["label"] for record in parts.train):
        return
    silent = {"prediction": "", "_answer": "", "_margin": 0.0}
    yield _scored(task, "no answer", parts, lambda: [silent] * len(parts.held_out))


BASELINES: dict[type, Callable[[Any, Split], Iterator[Baseline]]] = {
    config.Classification: _classification,
    config.Similarity: _similarity,
    config.Tagging: _tagging,
    config.MultipleChoice: _multiple_choice,
    config.QuestionAnswering: _question_answering,
}
