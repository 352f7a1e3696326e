"""Scores, computed by scikit-learn, scipy, seqeval, sacrebleu and rouge-score.

The functions import these libraries when they are called.  Each score is a fraction and a plain float, except BLEU and
chrF, which papers report from 0 to 100.  A score that is undefined (no examples, no positive class, a correlation with
a constant) is 0.0, never NaN.  Values that no score can be computed from raise UserError.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxlm.errors import UserError, suggestion

SCHEMES = {"IOB1": "BI", "IOB2": "BI", "IOBES": "BIES"}  # scheme -> prefixes that an entity type may have
TOKENIZERS = ("13a", "intl", "zh", "char", "none", "ja-mecab", "ko-mecab")  # of sacreBLEU, without those that download

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ROUNDING = 1e-11  # relative spread below which numbers differ by rounding only; scipy warns from 1.8e-12


# Classes and numbers.


def classification_scores(labels_N: ArrayLike, predictions_N: ArrayLike, names: Sequence[str]) -> dict[str, float]:
    """Returns the scores of single-label classification.

    Args:
      labels_N, predictions_N: the true and the predicted class of each example, as indices into `names`.
      names: of the classes.

    Returns:
      accuracy; macro_f1, the mean F1 of the classes that occur in the labels or the predictions; matthews, the
      correlation coefficient (Gorodkin 2004 for more than two classes), 0 if the labels or the predictions are
      constant; and, for two classes, f1 of class 1.

    Raises:
      UserError: for values that are not classes, and for lengths that differ.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    labels_N, predictions_N = _class_pairs(labels_N, predictions_N, len(names))
    scores = {"accuracy": 0.0, "f1": 0.0, "macro_f1": 0.0, "matthews": 0.0}
    if len(labels_N):
        scores["accuracy"] = float(accuracy_score(labels_N, predictions_N))
        # The arguments labels and average allow that class 1 does not occur.
        scores["f1"] = float(f1_score(labels_N, predictions_N, labels=[1], average="macro", zero_division=0.0))
        scores["macro_f1"] = float(f1_score(labels_N, predictions_N, average="macro", zero_division=0.0))
        if np.ptp(labels_N) and np.ptp(predictions_N):
            scores["matthews"] = float(matthews_corrcoef(labels_N, predictions_N))
    if len(names) != 2:
        del scores["f1"]
    return scores


def confusion(labels_N: ArrayLike, predictions_N: ArrayLike, count: int) -> np.ndarray:
    """Returns the confusion matrix [count, count], int64, with a row per true class and a column per predicted class.

    Raises UserError for values that are not classes from 0 to count - 1, and for lengths that differ.
    """
    from sklearn.metrics import confusion_matrix

    labels_N, predictions_N = _class_pairs(labels_N, predictions_N, count)
    if count < 2 or not len(labels_N):  # scikit-learn warns about a single class, and refuses empty input
        return np.full((count, count), len(labels_N), np.int64)
    return confusion_matrix(labels_N, predictions_N, labels=range(count))


def per_class_scores(labels: ArrayLike, predictions: ArrayLike, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Returns the precision, recall, F1 and support (number of examples) of each class.

    Args:
      labels, predictions: the class of each example, int [N]; or whether each class applies to it, bool [N, C].
      names: of the C classes.
    """
    from sklearn.metrics import precision_recall_fscore_support

    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if not labels.size:
        return {name: {"f1": 0.0, "precision": 0.0, "recall": 0.0, "support": 0} for name in names}
    if labels.ndim == 2:
        labels, predictions = _with_empty_class(labels), _with_empty_class(predictions)
    columns = precision_recall_fscore_support(
        labels, predictions, labels=range(len(names)), average=None, zero_division=0.0
    )
    return _by_class(names, columns)


def flatten_per_class(classes: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns the scores of classes under flat names: precision/NAME, recall/NAME and f1/NAME."""
    return {
        f"{score}/{name}": scores[score] for name, scores in classes.items() for score in ("precision", "recall", "f1")
    }


def multi_label_scores(labels_NC: ArrayLike, predictions_NC: ArrayLike) -> dict[str, float]:
    """Returns the scores of multi-label classification.

    Args:
      labels_NC, predictions_NC: 1 if a class applies to an example, else 0.

    Returns:
      accuracy, the fraction of examples with every class right; micro_f1, F1 over all cells; macro_f1, the mean F1 of
      all C classes, where a class without any 1 counts 0.

    Raises:
      UserError: for values other than 0 and 1, and for shapes that differ.
    """
    from sklearn.metrics import accuracy_score, f1_score

    labels_NC = _numbers(labels_NC, "labels", "correct them")
    predictions_NC = _numbers(predictions_NC, "predictions", "give 1 for a class that is predicted, else 0")
    if not labels_NC.size and not predictions_NC.size:
        return {"accuracy": 0.0, "micro_f1": 0.0, "macro_f1": 0.0}
    if labels_NC.shape != predictions_NC.shape or labels_NC.ndim != 2:
        raise UserError(
            f"labels have the shape {labels_NC.shape}, predictions {predictions_NC.shape}; "
            f"both need the same one, [examples, classes]"
        )
    for cells, what in ((labels_NC, "labels"), (predictions_NC, "predictions")):
        if not np.isin(cells, (0, 1)).all():
            odd = cells[~np.isin(cells, (0, 1))][0]
            raise UserError(f"{what} hold {odd:g}; a class applies (1) or does not (0); compare with a threshold first")
    count = labels_NC.shape[1]
    labels_NC, predictions_NC = _with_empty_class(labels_NC), _with_empty_class(predictions_NC)
    f1_C = f1_score(labels_NC, predictions_NC, average=None, zero_division=0.0)[:count]
    return {
        "accuracy": float(accuracy_score(labels_NC, predictions_NC)),
        "micro_f1": float(f1_score(labels_NC, predictions_NC, average="micro", zero_division=0.0)),
        "macro_f1": float(f1_C.mean()),
    }


def regression_scores(labels_N: ArrayLike, predictions_N: ArrayLike) -> dict[str, float]:
    """Returns the scores of regression: pearson, spearman (which averages the ranks of ties) and mse.

    A correlation is 0 for fewer than two examples, and if the labels or the predictions are constant.

    Raises UserError for values that are not finite numbers of float32, and for lengths that differ.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_squared_error

    labels_N = _numbers(labels_N, "labels", "correct or remove them")
    predictions_N = _numbers(predictions_N, "predictions", "take an earlier checkpoint, or lower the learning rate")
    _check_shapes(labels_N, predictions_N)
    scores = {"pearson": 0.0, "spearman": 0.0, "mse": 0.0}
    if len(labels_N):
        scores["mse"] = float(mean_squared_error(labels_N, predictions_N))
        # scipy returns NaN for constants, and a correlation of rounding errors for numbers that are nearly constant.
        if np.ptp(labels_N) and np.ptp(predictions_N):
            scores["spearman"] = float(spearmanr(labels_N, predictions_N).statistic)
        if all(np.linalg.norm(x_N - x_N.mean()) > _ROUNDING * abs(x_N.mean()) for x_N in (labels_N, predictions_N)):
            scores["pearson"] = float(pearsonr(labels_N, predictions_N).statistic)
    return scores


def _with_empty_class(cells_NC: np.ndarray) -> np.ndarray:
    """Adds a class that applies to no example, because scikit-learn reads a single column as two classes, 0 and 1."""
    return np.pad(cells_NC.astype(np.int64), ((0, 0), (0, 1)))


def _by_class(names: Iterable[str], columns: Sequence[np.ndarray]) -> dict[str, dict[str, float]]:
    """Returns the scores of each class, from the arrays of `precision_recall_fscore_support`."""
    return {
        name: {"f1": float(f1), "precision": float(precision), "recall": float(recall), "support": int(support)}
        for name, precision, recall, f1, support in zip(names, *columns)
    }


def _numbers(values: ArrayLike, what: str, remedy: str) -> np.ndarray:
    """Returns the values in float64.  Raises UserError for values beyond float32, so that no square overflows."""
    try:
        numbers = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} hold a value that is not a number ({error}); {remedy}") from None
    bad = int((~(np.abs(numbers) <= np.finfo(np.float32).max)).sum())
    if bad:
        raise UserError(f"{bad} of {numbers.size} {what} are not finite numbers, and a score needs them; {remedy}")
    return numbers


def _check_shapes(labels_N: np.ndarray, predictions_N: np.ndarray) -> None:
    if labels_N.shape != predictions_N.shape or labels_N.ndim != 1:
        raise UserError(
            f"labels have the shape {labels_N.shape}, predictions {predictions_N.shape}; "
            f"give one label and one prediction for each example"
        )


def _class_pairs(labels_N: ArrayLike, predictions_N: ArrayLike, count: int) -> tuple[np.ndarray, np.ndarray]:
    labels_N = _numbers(labels_N, "labels", "correct them")
    predictions_N = _numbers(predictions_N, "predictions", "give the index of the predicted class")
    _check_shapes(labels_N, predictions_N)
    for classes_N, what in ((labels_N, "labels"), (predictions_N, "predictions")):
        if (odd := _odd_class(classes_N, count)) is not None:
            raise UserError(f"{what} hold {odd:g}; classes are integers from 0 to {count - 1}; correct them")
    return labels_N.astype(np.int64), predictions_N.astype(np.int64)


def _odd_class(classes_N: np.ndarray, count: int) -> float | None:
    """Returns the first value that is not an integer from 0 to count - 1, or None."""
    odd = classes_N[(classes_N < 0) | (classes_N >= count) | (classes_N % 1 != 0)]
    return float(odd[0]) if len(odd) else None


# Entities.


def span_scores(
    tags: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]], scheme: str
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Returns the scores of the entities that tags mark.

    seqeval reads the tags as conlleval.pl does (Tjong Kim Sang 2000): every sequence of tags is valid, and an I- after
    O or after another type begins an entity.  An entity is right if its type, its first and its last token are.

    Args:
      tags, predictions: for each sentence, a tag per token.
      scheme: a key of SCHEMES.

    Returns:
      f1, precision and recall over the entities of all types, and accuracy, the fraction of tokens with the right tag;
      and a mapping from each type, sorted, to its f1, precision, recall and support (number of entities in `tags`).

    Raises:
      UserError: for tags that are not in the scheme, and for sentences of different lengths.
    """
    from seqeval.metrics import accuracy_score
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    if len(tags) != len(predictions):
        raise UserError(f"there are {len(tags)} sentences with tags, {len(predictions)} with predictions; give as many")
    for place, (a, b) in enumerate(zip(tags, predictions)):
        if len(a) != len(b):
            raise UserError(
                f"sentence {place} has {len(a)} tags, {len(b)} predictions; give one prediction for each tag"
            )
    both = [list(map(list, sentences)) for sentences in (tags, predictions)]  # seqeval accepts lists only
    found = {tag for sentences in both for sentence in sentences for tag in sentence}
    _check_tags(found, scheme)
    if not any(both[0]):
        return dict.fromkeys(("f1", "precision", "recall", "accuracy"), 0.0), {}
    types = sorted({tag[2:] for tag in found if tag != "O"})  # every other tag is part of an entity
    by_type = _by_class(types, precision_recall_fscore_support(*both, average=None, zero_division=0))
    precision, recall, f1, _ = precision_recall_fscore_support(*both, average="micro", zero_division=0)
    scores = {"f1": f1, "precision": precision, "recall": recall, "accuracy": accuracy_score(*both)}
    return {name: float(score) for name, score in scores.items()}, by_type


def _check_tags(tags: Iterable[str], scheme: str) -> None:
    if scheme not in SCHEMES:
        raise UserError(f"there is no scheme of tags {scheme!r}{suggestion(str(scheme), SCHEMES)}")
    for tag in tags:
        marked = isinstance(tag, str) and len(tag) > 2 and tag[0] in SCHEMES[scheme] and tag[1] == "-"
        if not marked and tag != "O":
            known = ", ".join(f"{letter}-TYPE" for letter in SCHEMES[scheme])
            raise UserError(
                f"the tag {tag!r} is not one of {scheme}, which are O, {known}; "
                f"correct it, or name the scheme of the tags ({', '.join(SCHEMES)})"
            )


# Answers.


def normalised(text: str) -> str:
    """Returns an answer in lower case, without ASCII punctuation and articles, with single spaces between words.

    The order of the steps is that of SQuAD's evaluation (Rajpurkar et al. 2016), so "a-n" is the article "an".

    >>> normalised("The  U.S. Army!")
    'us army'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_f1(answers: Sequence[str], prediction: str) -> tuple[float, float]:
    """Returns the exact match and the F1 of the prediction for one question, each the best over the true answers.

    As in the evaluation of SQuAD 2.0 (Rajpurkar et al. 2018), which no library of scores contains, both compare
    `normalised` words, and F1 compares multisets of them.  Without words in the answer or the prediction, F1 is the
    exact match.  True answers without words are ignored; if there are no others, the right prediction is "".

    Raises UserError if `answers` is a string.
    """
    if isinstance(answers, str):  # the loop would read its letters as answers
        raise UserError(f"the answers {answers!r} are one string; give a list of strings, empty for no answer")
    predicted = normalised(prediction).split()
    true = [words for words in (normalised(answer).split() for answer in answers) if words] or [[]]
    exact = float(predicted in true)
    if not predicted or not true[0]:
        return exact, exact
    shared = [(Counter(words) & Counter(predicted)).total() for words in true]
    return exact, max(2 * n / (len(words) + len(predicted)) for n, words in zip(shared, true))


def squad_scores(answers: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the mean exact match and F1 of N questions, by `exact_f1`.

    Args:
      answers: the true answers to each question, an empty list if it has no answer.
      predictions: the answer to each question, "" for no answer.

    Returns:
      exact and f1; and, if some questions have an answer and some have none, has_answer_exact, has_answer_f1 and
      no_answer_exact, which equals the F1 of these questions.

    Raises:
      UserError: for lengths that differ, and for answers that are a string.
    """
    if len(answers) != len(predictions):
        raise UserError(f"there are {len(answers)} questions, {len(predictions)} predictions; give one for each")
    if not len(answers):
        return {"exact": 0.0, "f1": 0.0}
    scores_N2 = np.array([exact_f1(*question) for question in zip(answers, predictions)])
    has_answer_N = np.array([len(true) > 0 for true in answers])
    scores = dict(zip(("exact", "f1"), scores_N2.mean(0).tolist()))
    if has_answer_N.any() and not has_answer_N.all():
        scores["has_answer_exact"], scores["has_answer_f1"] = scores_N2[has_answer_N].mean(0).tolist()
        scores["no_answer_exact"] = float(scores_N2[~has_answer_N, 0].mean())
    return scores


def best_threshold(margins_N: ArrayLike, f1_answered_N: ArrayLike, f1_silent_N: ArrayLike) -> tuple[float, float]:
    """Returns the threshold on the margin that maximises the mean F1 of N questions, and that mean.

    A question whose margin reaches the threshold is answered.  As in best_f1 of SQuAD 2.0's evaluation (Rajpurkar et
    al. 2018), the best threshold is the one that answers the fewest questions.  SQuAD's script may separate questions
    with equal margins, which no threshold can do; this function does not.

    Args:
      margins_N: the score of the best answer minus the score of no answer.
      f1_answered_N, f1_silent_N: the F1 (or exact match) of a question if it is answered, and if it is not.

    Returns:
      The threshold is one of the margins, or 1 more than the largest margin if it is best to answer no question.
      Without questions, both values are 0.0.

    Raises:
      UserError: for values that are not finite numbers, and for lengths that differ.
    """
    margins_N = _numbers(margins_N, "margins", "take an earlier checkpoint, or lower the learning rate")
    answered_N = _numbers(f1_answered_N, "scores of answers", "correct them")
    silent_N = _numbers(f1_silent_N, "scores of silence", "correct them")
    if not margins_N.shape == answered_N.shape == silent_N.shape == (margins_N.size,):
        raise UserError(
            f"margins have the shape {margins_N.shape}, scores {answered_N.shape} and {silent_N.shape}; "
            f"give one of each for a question"
        )
    if not margins_N.size:
        return 0.0, 0.0
    order_N = np.argsort(-margins_N, kind="stable")
    sorted_N = margins_N[order_N]
    gain_N = np.cumsum((answered_N - silent_N)[order_N])
    gain_N[:-1][sorted_N[:-1] == sorted_N[1:]] = -np.inf  # a threshold cannot separate equal margins
    best = int(np.argmax(gain_N))
    if gain_N[best] <= 0:
        threshold = max(sorted_N[0] + 1, np.nextafter(sorted_N[0], np.inf))  # adding 1 to 1e30 changes nothing
    else:
        threshold = sorted_N[best]
    return float(threshold), float(np.where(margins_N >= threshold, answered_N, silent_N).mean())


# Generated texts.


def translation_scores(
    references: Sequence[str | Sequence[str]], texts: Sequence[str], tokenize: str = "13a"
) -> dict[str, float]:
    """Returns sacreBLEU's corpus BLEU (Papineni et al. 2002) and chrF (Popović 2015) of N texts, from 0 to 100.

    `translation_signatures` returns the settings that a paper reports with the scores.

    Args:
      references: for each text its reference, or a list of references, whose number may differ between texts.
      texts: the generated texts.
      tokenize: the tokenizer of BLEU (Post 2018), one of TOKENIZERS: "13a" as in WMT, "intl", "zh", "char", "none",
        "ja-mecab" or "ko-mecab".  The last two need further packages.  chrF compares characters and has no tokenizer.

    Raises:
      UserError: for lengths that differ, a text without references, and a tokenizer that is not available.
    """
    columns = _columns(references, texts)
    if not columns:
        return {"bleu": 0.0, "chrf": 0.0}
    # sacreBLEU may return 100.00000000000004 for texts that equal their references.
    return {n: min(float(m.corpus_score(texts, columns).score), 100.0) for n, m in _sacrebleu(tokenize).items()}


def translation_signatures(references: Sequence[str | Sequence[str]], tokenize: str = "13a") -> dict[str, str]:
    """Returns sacreBLEU's signature of each score of `translation_scores`.

    >>> translation_signatures(["The cat."])["chrf"]  # doctest: +ELLIPSIS
    'nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:...'

    Raises UserError as `translation_scores` does.
    """
    texts = [""] * len(references)
    columns = _columns(references, texts)
    if not columns:
        raise UserError("there are no references, and their number is part of a signature; give those of the texts")
    signatures = {}
    for name, metric in _sacrebleu(tokenize).items():
        metric.corpus_score(texts, columns)  # counts the references
        signatures[name] = str(metric.get_signature())
    return signatures


def _sacrebleu(tokenize: str) -> dict[str, Any]:
    from sacrebleu.metrics import BLEU, CHRF

    if tokenize not in TOKENIZERS:
        raise UserError(f"BLEU has no tokenizer {tokenize!r}{suggestion(tokenize, TOKENIZERS)}")
    try:
        return {"bleu": BLEU(tokenize=tokenize), "chrf": CHRF()}
    except RuntimeError as error:
        raise UserError(f"the tokenizer {tokenize!r} is not available: {' '.join(str(error).split())}") from None


def summary_scores(references: Sequence[str | Sequence[str]], texts: Sequence[str]) -> dict[str, float]:
    """Returns the ROUGE scores (Lin 2004) of N texts: the mean over the texts of the F1 with the best reference.

    rouge-score computes rouge1 (words), rouge2 (pairs of words), rougeL (the longest common subsequence) and rougeLsum
    (the same for sentences, one per line), with stemmed words (Porter 1980), as papers do.

    Args:
      references: for each text its reference, or a list of references.
      texts: the generated texts.

    Raises:
      UserError: for lengths that differ, a text without references, and references without the letters a to z and
        digits, which are all that ROUGE reads.
    """
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    by_text = _references(references, texts)
    if not by_text:
        return dict.fromkeys(kinds, 0.0)
    joined = "".join(chain.from_iterable(by_text)).strip()
    if joined and not re.search("[a-zA-Z0-9]", joined):
        raise UserError(
            f"the references have no letter from a to z and no digit ({joined[:40]!r} ...), and ROUGE reads no other "
            f"characters; score them by the chrF of `translation_scores`"
        )
    scorer = RougeScorer(kinds, use_stemmer=True)
    each = [scorer.score_multi(own, text) for own, text in zip(by_text, texts)]
    return {kind: float(np.mean([scores[kind].fmeasure for scores in each])) for kind in kinds}


def answer_scores(references: Sequence[str | Sequence[str]], texts: Sequence[str]) -> dict[str, float]:
    """Returns the mean exact match and F1 of N short generated answers, by `exact_f1`.

    Args:
      references: for each text its reference, or a list of references.
      texts: the generated answers.

    Raises:
      UserError: for lengths that differ, and for a text without references.
    """
    return squad_scores(_references(references, texts), texts)


def _references(references: Sequence[str | Sequence[str]], texts: Sequence[str]) -> list[list[str]]:
    """Returns the references of each text as a list, which has at least one."""
    if isinstance(references, str) or isinstance(texts, str):
        raise UserError("references or texts are one string; give a list of strings")
    if len(references) != len(texts):
        raise UserError(f"there are references of {len(references)} texts, and {len(texts)} texts; give as many")
    by_text = [[own] if isinstance(own, str) else list(own) for own in references]
    for place, (own, text) in enumerate(zip(by_text, texts)):
        if not own:
            raise UserError(f"text {place} has no reference; give at least one, or leave the text out")
        for value in (text, *own):
            if not isinstance(value, str):
                raise UserError(f"text {place} or its reference is {value!r:.40}; give strings")
    return by_text


def _columns(references: Sequence[str | Sequence[str]], texts: Sequence[str]) -> list[list[str | None]]:
    """Returns the first reference of each text, then the second of each, and so on; None where a text has fewer."""
    return [list(column) for column in zip_longest(*_references(references, texts))]


# Retrieval.


def ranks(similarities_NM: ArrayLike, of_query_N: ArrayLike) -> np.ndarray:
    """Returns the rank [N] of each query's right document among M documents, int64, from 1.

    The rank is 1 plus the number of other documents that are as similar or more similar.  A tie counts against the
    right document; otherwise a model that returns constants would be perfect.  scipy's `rankdata` computes the same
    ranks, but sorts each row, which is about 100 times slower for 20,000 documents.

    Args:
      similarities_NM: of each query and document.  The queries can be ranked in parts.
      of_query_N: the column of each query's right document.

    Raises:
      UserError: for similarities that are NaN, and for columns that do not exist.
    """
    similarities_NM = np.asarray(similarities_NM)
    columns_N = _numbers(of_query_N, "columns of the right documents", "correct them")
    if not columns_N.size and not similarities_NM.size:
        return np.zeros(0, np.int64)
    if similarities_NM.ndim != 2 or columns_N.shape != similarities_NM.shape[:1]:
        raise UserError(
            f"similarities have the shape {similarities_NM.shape}, columns of the right documents {columns_N.shape}; "
            f"give [queries, documents] and one column for each query"
        )
    if (odd := _odd_class(columns_N, similarities_NM.shape[1])) is not None:
        raise UserError(f"a right document is in column {odd:g} of {similarities_NM.shape[1]}; count them from 0")
    bad = int(np.isnan(similarities_NM).sum())
    if bad:
        raise UserError(
            f"{bad} of {similarities_NM.size} similarities are not numbers, and a rank needs them; "
            f"take an earlier checkpoint, or lower the learning rate"
        )
    right_N1 = np.take_along_axis(similarities_NM, columns_N.astype(np.int64)[:, None], 1)
    return (similarities_NM >= right_N1).sum(1, dtype=np.int64)


def retrieval_scores(ranks_N: ArrayLike) -> dict[str, float]:
    """Returns the retrieval scores of N queries.

    scikit-learn has these scores only for a whole matrix of similarities, which may not fit in memory.

    Args:
      ranks_N: the ranks of the right documents, from 1, as `ranks` returns them.

    Returns:
      mrr, the mean reciprocal rank (Voorhees 1999), and recall@1, @5 and @10, the fraction of ranks up to that number.

    Raises:
      UserError: for ranks below 1.
    """
    ranks_N = _numbers(ranks_N, "ranks", "give those of `ranks`")
    if (ranks_N < 1).any():
        raise UserError(f"there is a rank {ranks_N.min():g}; the best rank is 1; give those of `ranks`")
    scores = {"mrr": float((1 / ranks_N).mean()) if ranks_N.size else 0.0}
    return scores | {f"recall@{k}": float((ranks_N <= k).mean()) if ranks_N.size else 0.0 for k in (1, 5, 10)}
