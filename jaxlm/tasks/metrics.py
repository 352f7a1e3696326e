"""Scores, over scikit-learn, scipy, seqeval, sacrebleu and rouge-score, which are imported where they are needed.

Every score is a fraction and a plain float, but for BLEU and chrF: the field gives them from 0 to 100, and so do the
functions here, to be compared with papers.  One that is undefined (no examples, no positive class, a correlation with
a constant) is 0.0, never NaN.  Values that no score can be computed from raise UserError.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxlm.errors import UserError, perhaps

SCHEMES = {"IOB1": "BI", "IOB2": "BI", "IOBES": "BIES"}  # -> what may stand before the type of an entity

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SAME = 1e-11  # spread over mean, below which numbers differ by rounding alone; scipy warns from 1.8e-12


# Classes and numbers.


def classes(labels_N: ArrayLike, predictions_N: ArrayLike, names: Sequence[str]) -> dict[str, float]:
    """Scores of one class per example; both arrays hold places in `names`.

    accuracy; macro_f1: the mean F1 of the classes that occur in either; matthews: the correlation of both (Gorodkin
    2004 for more than two classes), 0 where one is constant; and, of two classes, f1: that of class 1.

    Raises UserError for values that are no classes, and for lengths that differ.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    labels_N, predictions_N = _both_classes(labels_N, predictions_N, len(names))
    scores = {"accuracy": 0.0, "f1": 0.0, "macro_f1": 0.0, "matthews": 0.0}
    if len(labels_N):
        scores["accuracy"] = float(accuracy_score(labels_N, predictions_N))
        # Asked for like this, class 1 need not occur.
        scores["f1"] = float(f1_score(labels_N, predictions_N, labels=[1], average="macro", zero_division=0.0))
        scores["macro_f1"] = float(f1_score(labels_N, predictions_N, average="macro", zero_division=0.0))
        if np.ptp(labels_N) and np.ptp(predictions_N):
            scores["matthews"] = float(matthews_corrcoef(labels_N, predictions_N))
    if len(names) != 2:
        del scores["f1"]
    return scores


def confusion(labels_N: ArrayLike, predictions_N: ArrayLike, count: int) -> np.ndarray:
    """Numbers of examples [count, count], int64: the row is the true class, the column the predicted one.

    Raises UserError for values that are no classes from 0 to count - 1, and for lengths that differ.
    """
    labels_N, predictions_N = _both_classes(labels_N, predictions_N, count)
    pairs_N = labels_N * count + predictions_N
    return np.bincount(pairs_N, minlength=count * count).astype(np.int64).reshape(count, count)


def of_classes(labels_NC: ArrayLike, predictions_NC: ArrayLike, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Returns the precision, recall and F1 of each class, and its support, the number of examples of it.

    Args:
      labels_NC, predictions_NC: whether each class applies to each example, bool [N, C].
      names: of the classes.
    """
    labels_NC, predictions_NC = np.asarray(labels_NC, bool), np.asarray(predictions_NC, bool)
    both_C, found_C, true_C = ((x_NC).sum(0) for x_NC in (labels_NC & predictions_NC, predictions_NC, labels_NC))
    return {
        name: _f1(int(both), int(found), int(true)) | {"support": int(true)}
        for name, both, found, true in zip(names, both_C, found_C, true_C)
    }


def by_name(classes: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns the scores of classes under flat names: precision/NAME, recall/NAME and f1/NAME."""
    return {
        f"{score}/{name}": scores[score] for name, scores in classes.items() for score in ("precision", "recall", "f1")
    }


def several(labels_NC: ArrayLike, predictions_NC: ArrayLike) -> dict[str, float]:
    """Scores of any number of classes per example; both arrays hold 1 for a class that applies, else 0.

    accuracy: the fraction of examples with every class right; micro_f1: F1 over all cells; macro_f1: the mean over all
    C classes, one without any 1 counting 0.

    Raises UserError for values other than 0 and 1, and for shapes that differ.
    """
    from sklearn.metrics import f1_score

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
    labels_NC, predictions_NC = labels_NC.astype(np.int64), predictions_NC.astype(np.int64)
    micro = f1_score(labels_NC.ravel(), predictions_NC.ravel(), labels=[1], average="macro", zero_division=0.0)
    # scikit-learn takes a single column for two classes, 0 and 1, and would average over both.
    one = labels_NC.shape[1] == 1
    macro = micro if one else f1_score(labels_NC, predictions_NC, average="macro", zero_division=0.0)
    right_N = (labels_NC == predictions_NC).all(1)
    return {"accuracy": float(right_N.mean()), "micro_f1": float(micro), "macro_f1": float(macro)}


def number(labels_N: ArrayLike, predictions_N: ArrayLike) -> dict[str, float]:
    """Scores of one number per example: pearson, spearman (Pearson's of the ranks, ties averaged) and mse.

    A correlation is 0 where a side is constant, up to rounding in float64, and for fewer than two examples.

    Raises UserError for values that are no finite numbers of float32, and for lengths that differ.
    """
    from scipy.stats import rankdata

    labels_N = _numbers(labels_N, "labels", "correct or remove them")
    predictions_N = _numbers(predictions_N, "predictions", "take an earlier checkpoint, or lower the learning rate")
    _same_length(labels_N, predictions_N)
    if not len(labels_N):
        return {"pearson": 0.0, "spearman": 0.0, "mse": 0.0}
    return {
        "pearson": _pearson(labels_N, predictions_N),
        "spearman": _pearson(rankdata(labels_N), rankdata(predictions_N)),
        "mse": float(np.mean((labels_N - predictions_N) ** 2)),
    }


def _pearson(x_N: np.ndarray, y_N: np.ndarray) -> float:
    from scipy.stats import pearsonr

    if any(np.linalg.norm(z_N - z_N.mean()) <= _SAME * abs(z_N.mean()) for z_N in (x_N, y_N)):
        return 0.0
    return float(pearsonr(x_N, y_N).statistic)


def _numbers(values: ArrayLike, what: str, remedy: str) -> np.ndarray:
    """The values in float64.  Raises UserError for what float32 cannot hold: there a square never overflows either."""
    try:
        numbers = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} hold what is no number ({error}); {remedy}") from None
    bad = int((~(np.abs(numbers) <= np.finfo(np.float32).max)).sum())
    if bad:
        raise UserError(f"{bad} of {numbers.size} {what} are no finite numbers, and a score needs them; {remedy}")
    return numbers


def _same_length(labels_N: np.ndarray, predictions_N: np.ndarray) -> None:
    if labels_N.shape != predictions_N.shape or labels_N.ndim != 1:
        raise UserError(
            f"labels have the shape {labels_N.shape}, predictions {predictions_N.shape}; "
            f"give one label and one prediction for each example"
        )


def _both_classes(labels_N: ArrayLike, predictions_N: ArrayLike, count: int) -> tuple[np.ndarray, np.ndarray]:
    labels_N = _numbers(labels_N, "labels", "correct them")
    predictions_N = _numbers(predictions_N, "predictions", "give the place of the class that is predicted")
    _same_length(labels_N, predictions_N)
    for classes_N, what in ((labels_N, "labels"), (predictions_N, "predictions")):
        odd = classes_N[(classes_N < 0) | (classes_N >= count) | (classes_N % 1 != 0)]
        if len(odd):
            raise UserError(f"{what} hold {odd[0]:g}; classes are whole numbers from 0 to {count - 1}; correct them")
    return labels_N.astype(np.int64), predictions_N.astype(np.int64)


# Entities.


def spans(
    tags: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]], scheme: str
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Scores of the entities that tags mark: over all, and type -> those of one type, types in order.

    tags, predictions: a tag for each token, of each sentence.  Tags are read as conlleval.pl (Tjong Kim Sang 2000) and
    seqeval read them: any order of tags means something, and an I- after O or after another type begins an entity.
    An entity is right where its type, first and last token are.

    The first are f1, precision, recall (over the entities of all types) and accuracy (the fraction of tokens with the
    right tag); those of a type f1, precision, recall and support (its entities in `tags`).

    Raises UserError for tags that the scheme, a key of SCHEMES, does not have, and for sentences of different lengths.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    if len(tags) != len(predictions):
        raise UserError(f"there are {len(tags)} sentences with tags, {len(predictions)} with predictions; give as many")
    for place, (a, b) in enumerate(zip(tags, predictions)):
        if len(a) != len(b):
            raise UserError(
                f"sentence {place} has {len(a)} tags, {len(b)} predictions; give one prediction for each tag"
            )
    for sentences in (tags, predictions):
        _check({tag for sentence in sentences for tag in sentence}, scheme)
    # (type, first, last); only a list is a sentence to seqeval.
    true = set(get_entities([list(sentence) for sentence in tags]))
    found = set(get_entities([list(sentence) for sentence in predictions]))
    both_of, found_of, true_of = (Counter(kind for kind, _, _ in some) for some in (true & found, found, true))
    by_type = {
        kind: _f1(both_of[kind], found_of[kind], true_of[kind]) | {"support": true_of[kind]}
        for kind in sorted(found_of | true_of)
    }
    right = sum(x == y for a, b in zip(tags, predictions) for x, y in zip(a, b))
    accuracy = _ratio(right, sum(map(len, tags)))
    return _f1(len(true & found), len(found), len(true)) | {"accuracy": accuracy}, by_type


def iob2(tags: Sequence[str], scheme: str) -> list[str]:
    """The tags of a sentence in IOB2: B- where an entity begins, I- inside; its entities stay as `spans` reads them.

    >>> iob2(["I-PER", "I-PER", "B-PER", "I-LOC", "O"], "IOB1")
    ['B-PER', 'I-PER', 'B-PER', 'B-LOC', 'O']

    Raises UserError for tags that the scheme, a key of SCHEMES, does not have.
    """
    _check(set(tags), scheme)
    return [
        tag if tag == "O" else f"{'B' if begins(before, tag) else 'I'}-{tag[2:]}"
        for before, tag in zip(["O", *tags], tags)
    ]


def repaired(tags: Sequence[str]) -> int:
    """How many tags of a sentence begin an entity though they say that they continue one: those `iob2` changes to B-.

    In IOB2 an I- after O or another type; in IOBES also an E- there, and both after E- and S-.  (IOB1 writes so.)
    """
    _check(set(tags), "IOBES")  # its tags are those of all schemes
    return sum(tag[0] in "IE" and begins(before, tag) for before, tag in zip(["O", *tags], tags))


def begins(before: str, tag: str) -> bool:
    """Returns whether a tag other than O begins an entity, by the tag before it (conlleval.pl)."""
    return tag[0] in "BS" or before[0] in "OES" or before[2:] != tag[2:]


def _check(tags: Iterable[str], scheme: str) -> None:
    if scheme not in SCHEMES:
        raise UserError(f"there is no scheme of tags {scheme!r}{perhaps(str(scheme), SCHEMES)}")
    for tag in tags:
        marked = isinstance(tag, str) and len(tag) > 2 and tag[0] in SCHEMES[scheme] and tag[1] == "-"
        if not marked and tag != "O":
            known = ", ".join(f"{letter}-TYPE" for letter in SCHEMES[scheme])
            raise UserError(
                f"the tag {tag!r} is not one of {scheme}, which are O, {known}; "
                f"correct it, or name the scheme of the tags ({', '.join(SCHEMES)})"
            )


def _f1(both: int, found: int, true: int) -> dict[str, float]:
    return {"f1": _ratio(2 * both, found + true), "precision": _ratio(both, found), "recall": _ratio(both, true)}


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


# Answers.


def normalised(text: str) -> str:
    """An answer as SQuAD compares it: lower case, without ASCII punctuation and articles, words a space apart.

    In this order, that of SQuAD's evaluation (Rajpurkar et al. 2016): "a-n" is the article "an".

    >>> normalised("The  U.S. Army!")
    'us army'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_f1(answers: Sequence[str], prediction: str) -> tuple[float, float]:
    """Exact match and F1 of one question's prediction, each the best over the true answers.

    As in the evaluation of SQuAD 2.0 (Rajpurkar et al. 2018): both compare `normalised` words, F1 their multisets; of
    an answer or prediction without words F1 is exact match.  True answers without words are left out; where none is
    left the right prediction is "".

    Raises UserError for answers that are one string.
    """
    if isinstance(answers, str):  # its letters would count as answers
        raise UserError(f"the answers {answers!r} are one string; give a list of strings, empty for no answer")
    said = normalised(prediction).split()
    wanted = [words for words in (normalised(answer).split() for answer in answers) if words] or [[]]
    exact = float(said in wanted)
    if not said or not wanted[0]:
        return exact, exact
    shared = [(Counter(words) & Counter(said)).total() for words in wanted]
    return exact, max(_ratio(2 * n, len(words) + len(said)) for n, words in zip(shared, wanted))


def squad(answers: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """Mean exact match and F1 of N questions, by `exact_f1`; a question without true answers is unanswerable.

    answers: the true answers of each question, none where it has no answer.  predictions: one for each, "" for none.
    Where both kinds of question occur also has_answer_exact, has_answer_f1 and no_answer_exact, which is its F1, too.

    Raises UserError for lengths that differ, and for answers to a question that are one string.
    """
    if len(answers) != len(predictions):
        raise UserError(f"there are {len(answers)} questions, {len(predictions)} predictions; give one for each")
    if not len(answers):
        return {"exact": 0.0, "f1": 0.0}
    scores_N2 = np.array([exact_f1(true, said) for true, said in zip(answers, predictions)])
    has_N = np.array([len(true) > 0 for true in answers])
    exact, f1 = scores_N2.mean(0).tolist()
    scores = {"exact": exact, "f1": f1}
    if has_N.any() and not has_N.all():
        scores["has_answer_exact"], scores["has_answer_f1"] = scores_N2[has_N].mean(0).tolist()
        scores["no_answer_exact"] = float(scores_N2[~has_N, 0].mean())
    return scores


def best_threshold(margins_N: ArrayLike, f1_answered_N: ArrayLike, f1_silent_N: ArrayLike) -> tuple[float, float]:
    """The threshold that maximises F1 over N questions if those with a margin of at least it are answered; that mean.

    margins_N: the score of the best answer less that of no answer.  f1_answered_N, f1_silent_N: the F1 (or exact match)
    of a question that is answered, or is not.

    As best_f1 of SQuAD 2.0's evaluation (Rajpurkar et al. 2018): from no answer to all, and of several best thresholds
    the one that answers least.  There questions of equal margin may part; here they do not, as no threshold parts them.
    The threshold is a margin, or one more than the largest where silence is best; no question: (0.0, 0.0).

    Raises UserError for values that are no finite numbers, and for lengths that differ.
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
    gain_N[:-1][sorted_N[:-1] == sorted_N[1:]] = -np.inf  # within equal margins nothing can end
    best = int(np.argmax(gain_N))
    if gain_N[best] <= 0:
        threshold = max(sorted_N[0] + 1, np.nextafter(sorted_N[0], np.inf))  # adding 1 to 1e30 changes nothing
    else:
        threshold = sorted_N[best]
    return float(threshold), float(np.where(margins_N >= threshold, answered_N, silent_N).mean())


# Generated texts.


def translation(
    references: Sequence[str | Sequence[str]], texts: Sequence[str], tokenize: str = "13a"
) -> dict[str, float]:
    """Corpus BLEU (Papineni et al. 2002) and chrF (Popović 2015) of N texts, from 0 to 100, as sacreBLEU has them.

    references: for each text the right one, or a list of right ones; texts may have different numbers of them.
    tokenize: how BLEU finds words, one of sacreBLEU's (Post 2018): "13a" as WMT does; "zh"; "intl"; "char"; "none";
    "ja-mecab" and "ko-mecab", which need packages of their own.  chrF reads characters and needs no words.

    `translation_signatures` says how they are computed, as a paper has to.  No text: 0.0.

    Raises UserError for lengths that differ, a text without references, and words that cannot be found so.
    """
    columns = _columns(references, texts)
    if not columns:
        return {"bleu": 0.0, "chrf": 0.0}
    # One way of summing gives 100.00000000000004 for texts that are right.
    return {n: min(float(m.corpus_score(texts, columns).score), 100.0) for n, m in _sacrebleu(tokenize).items()}


def translation_signatures(references: Sequence[str | Sequence[str]], tokenize: str = "13a") -> dict[str, str]:
    """sacreBLEU's signature of each score of `translation`, to stand beside it.

    >>> translation_signatures(["The cat."])["chrf"]  # doctest: +ELLIPSIS
    'nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:...'

    Raises UserError as `translation` does.
    """
    texts = [""] * len(references)
    columns = _columns(references, texts)
    if not columns:
        raise UserError("there are no references, and their number is part of a signature; give those of the texts")
    said = {}
    for name, metric in _sacrebleu(tokenize).items():
        metric.corpus_score(texts, columns)  # which counts the references
        said[name] = str(metric.get_signature())
    return said


WORDS = ("13a", "intl", "zh", "char", "none", "ja-mecab", "ko-mecab")  # sacreBLEU's ways to find them


def _sacrebleu(tokenize: str) -> dict[str, Any]:
    from sacrebleu.metrics import BLEU, CHRF

    if tokenize not in WORDS:
        raise UserError(f"there is no way {tokenize!r} to find words{perhaps(tokenize, WORDS)}")
    try:
        return {"bleu": BLEU(tokenize=tokenize), "chrf": CHRF()}
    except RuntimeError as error:
        raise UserError(f"{tokenize!r} cannot find words: {' '.join(str(error).split())}") from None


def summaries(references: Sequence[str | Sequence[str]], texts: Sequence[str]) -> dict[str, float]:
    """ROUGE (Lin 2004) of N texts, as rouge-score has it: the mean over texts of F1, the best over their references.

    rouge1, rouge2: of words and of pairs of words; rougeL: of the longest common subsequence; rougeLsum: of those of
    sentences, which stand on lines (without lines it is rougeL).  Words are stemmed (Porter 1980), as papers do.

    references: for each text the right one, or a list of right ones.  No text: 0.0.

    Raises UserError for lengths that differ, a text without references, and references without any word that ROUGE
    knows: it reads the letters a to z and digits alone.
    """
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    each = _references(references, texts)
    if not each:
        return dict.fromkeys(kinds, 0.0)
    everything = "".join(text for right in each for text in right)
    if everything.strip() and not re.search("[a-zA-Z0-9]", everything):
        raise UserError(
            f"the references have no letter from a to z and no digit ({everything.strip()[:40]!r} ...), and ROUGE "
            f"knows no others; score them by the chrF of `translation`"
        )
    scorer = RougeScorer(kinds, use_stemmer=True)
    found = [scorer.score_multi(right, text) for right, text in zip(each, texts)]
    return {kind: float(np.mean([scores[kind].fmeasure for scores in found])) for kind in kinds}


def answers(references: Sequence[str | Sequence[str]], texts: Sequence[str]) -> dict[str, float]:
    """Mean exact match and F1 of words of N short texts that answer, by `exact_f1`.

    references: for each text the right one, or a list of right ones.

    Raises UserError for lengths that differ, and for a text without references.
    """
    return squad(_references(references, texts), texts)


def _references(references: Sequence[str | Sequence[str]], texts: Sequence[str]) -> list[list[str]]:
    """The references of each text as a list, at least one."""
    if isinstance(references, str) or isinstance(texts, str):
        raise UserError("references or texts are one string; give a list of strings")
    if len(references) != len(texts):
        raise UserError(f"there are references of {len(references)} texts, and {len(texts)} texts; give as many")
    each = [[right] if isinstance(right, str) else list(right) for right in references]
    for place, (right, text) in enumerate(zip(each, texts)):
        if not right:
            raise UserError(f"text {place} has no reference; give at least one, or leave the text out")
        for what in (text, *right):
            if not isinstance(what, str):
                raise UserError(f"text {place} or its reference is {what!r:.40}; give strings")
    return each


def _columns(references: Sequence[str | Sequence[str]], texts: Sequence[str]) -> list[list[str | None]]:
    """The first reference of each text, the second of each ...; None where a text has fewer."""
    return [list(column) for column in zip_longest(*_references(references, texts))]


# Retrieval.


def ranks(similarities_NM: ArrayLike, of_query_N: ArrayLike) -> np.ndarray:
    """Rank [N] of each query's right document among M, int64, 1 the best: 1 + the others that are as similar or more.

    of_query_N: the column of the right document.  A tie counts against it, or a model of constants would be perfect.
    Rows do not depend on each other: for many queries give some at a time, and join the ranks.

    Raises UserError for similarities that are NaN, and for columns that do not exist.
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
    odd = columns_N[(columns_N < 0) | (columns_N >= similarities_NM.shape[1]) | (columns_N % 1 != 0)]
    if len(odd):
        raise UserError(f"a right document is in column {odd[0]:g} of {similarities_NM.shape[1]}; count them from 0")
    bad = int(np.isnan(similarities_NM).sum())
    if bad:
        raise UserError(
            f"{bad} of {similarities_NM.size} similarities are no numbers, and a rank needs them; "
            f"take an earlier checkpoint, or lower the learning rate"
        )
    right_N1 = np.take_along_axis(similarities_NM, columns_N.astype(np.int64)[:, None], 1)
    return (similarities_NM >= right_N1).sum(1, dtype=np.int64)


def retrieval(ranks_N: ArrayLike) -> dict[str, float]:
    """Scores of the ranks, from 1, of N queries' right documents, as `ranks` gives them.

    mrr: the mean reciprocal rank (Voorhees 1999); recall@1, @5, @10: the fraction of ranks up to that one.

    Raises UserError for ranks below 1.
    """
    ranks_N = _numbers(ranks_N, "ranks", "give those of `ranks`")
    if (ranks_N < 1).any():
        raise UserError(f"there is a rank {ranks_N.min():g}; the best rank is 1; give those of `ranks`")
    scores = {"mrr": float((1 / ranks_N).mean()) if ranks_N.size else 0.0}
    return scores | {f"recall@{k}": float((ranks_N <= k).mean()) if ranks_N.size else 0.0 for k in (1, 5, 10)}
