"""N-gram language models with interpolated modified Kneser-Ney smoothing.

A model of order n predicts a token from the n - 1 tokens before it (Chen & Goodman 1998, section 3; the formulas are
those of Heafield et al. 2013, sections 2 and 3, which KenLM's lmplz implements).  Counting and scoring consist of sorts
and binary searches of integers: an n-gram is the integer `c * vocabulary + w`, in which c is the index of its first
n - 1 tokens among the n-grams of the order below, and w its last token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxlm.config.baseline import Order
from jaxlm.config.ranges import Range, check_argument, short_repr
from jaxlm.errors import UserError

MAX_VOCABULARY = 2**31 - 1
FALLBACK = (0.5, 1.0, 1.5)  # KenLM's discounts for orders whose counts define none
NEVER = -99.0  # log10 of the probability of a token that is never predicted, as ARPA files write it

Vocabulary = Annotated[int, Range(1, MAX_VOCABULARY)]
Discounts = tuple[float, float, float]  # subtracted from the adjusted counts 1, 2, and 3 or more


@dataclass(frozen=True, eq=False)
class NGrams:
    """An n-gram model of token ids.

    The arrays of order k have one entry for each n-gram of k tokens.  A unigram has the index of its token, and there
    is one for each token of the vocabulary.  Probabilities and backoff weights are logarithms to base 10 in float32, as
    in ARPA files.

    vocabulary: number of token ids V.
    keys: for the orders 2 to n, `c * V + w` of each n-gram [G] int64, in ascending order.
    log10_probs: for the orders 1 to n, log p(w | c) of each n-gram [G].
    log10_backoffs: for the orders 1 to n - 1, the weight of the order below after each n-gram [G]; 0 if no n-gram
      continues it.
    fallbacks: the orders whose counts define no discounts, so that `fallback` replaces them.
    """

    vocabulary: int
    keys: tuple[np.ndarray, ...]
    log10_probs: tuple[np.ndarray, ...]
    log10_backoffs: tuple[np.ndarray, ...]
    fallbacks: tuple[int, ...] = ()

    @property
    def order(self) -> int:
        """The order n: the tokens of the longest n-grams."""
        return len(self.log10_probs)

    def tokens(self, order: int) -> np.ndarray:
        """Returns the tokens of the n-grams of an order [G, order], in the order of the arrays."""
        if order == 1:
            return np.arange(self.vocabulary)[:, None]
        contexts_G, last_G = np.divmod(self.keys[order - 2], self.vocabulary)
        return np.concatenate([self.tokens(order - 1)[contexts_G], last_G[:, None]], axis=1)


class _Counts(NamedTuple):
    """The distinct n-grams of an order.

    keys_G: as in `NGrams`; for unigrams the tokens.
    suffixes_G: the index of each n-gram without its first token, among those of the order below; for unigrams 0.
    counts_G: how often each n-gram occurs, without its occurrence as the first token of a text.
    starts_G: how often it starts a text.
    """

    keys_G: np.ndarray
    suffixes_G: np.ndarray
    counts_G: np.ndarray
    starts_G: np.ndarray


def fit(
    tokens_N: ArrayLike,
    bounds: ArrayLike,
    order: int = 5,
    *,
    vocabulary: int | None = None,
    start: int | None = None,
    fallback: Discounts | None = None,
) -> NGrams:
    """Returns the n-gram model of a corpus.

    The first token of each text is not predicted; it is a context only, such as `<s>`.  No n-gram crosses the end of a
    text.  The adjusted count of an n-gram below the highest order is the number of different tokens before it, plus the
    number of texts that it starts.

    Args:
      tokens_N: the token ids of all texts [N], one text after another.
      bounds: where each text starts, and where the last one ends [number of texts + 1].
      order: the number of tokens of the longest n-grams.
      vocabulary: the number of token ids V, which all have a probability above 0; None: the largest id and 1.
      start: the id of a token that occurs only at the start of texts, which has no probability; None: all ids have one.
      fallback: the discounts of an order whose counts define none, such as `FALLBACK`; None: such an order is an error.

    Raises:
      UserError: for a corpus without predictions, for ids outside the vocabulary, and for a corpus whose counts define
        no discounts, unless there is a fallback.
    """
    tokens_N, bounds = _corpus(tokens_N, bounds)
    order = check_argument("order", order, Order)
    largest = int(tokens_N.max(initial=0))
    vocabulary = check_argument("vocabulary", largest + 1 if vocabulary is None else vocabulary, Vocabulary)
    _check_ids(tokens_N, vocabulary)
    _check_fallback(fallback)
    if not (np.diff(bounds) > 1).any():
        raise UserError(f"a corpus of {len(bounds) - 1:,} texts has no token to predict; give texts of several tokens")
    place_N = np.arange(len(tokens_N)) - np.repeat(bounds[:-1], np.diff(bounds))
    if start is not None and (found_N := (tokens_N == start) & (place_N > 0)).any():
        raise UserError(
            f"token {int(found_N.argmax()):,} of the corpus is the start token {start} and is not the first of its "
            f"text; split the text there, or leave the token out"
        )
    keys, log10_probs, log10_backoffs, fallbacks = [], [], [], []
    can_occur = np.arange(vocabulary) != (-1 if start is None else start)
    probs_G = can_occur / max(1, can_occur.sum())  # of the order below: first the uniform distribution
    log10 = lambda x: np.log10(np.maximum(x, 10.0**NEVER)).astype(np.float32)
    for k, (counted, counts_G) in enumerate(_adjusted_counts(_counts(tokens_N, place_N, order, vocabulary)), start=1):
        discounts_D, is_fallback = _discounts(counts_G, k, fallback)
        contexts_G = counted.keys_G // vocabulary  # of unigrams: the empty context, 0
        contexts = len(probs_G) if k > 1 else 1
        probs_G, backoffs_C = _interpolate(counts_G, discounts_D, contexts_G, contexts, probs_G, counted.suffixes_G, k)
        log10_probs.append(log10(probs_G))
        keys += [counted.keys_G] * (k > 1)
        log10_backoffs += [log10(backoffs_C)] * (k > 1)
        fallbacks += [k] * is_fallback
    return NGrams(vocabulary, tuple(keys), tuple(log10_probs), tuple(log10_backoffs), tuple(fallbacks))


def log_probs(model: NGrams, tokens_N: ArrayLike, bounds: ArrayLike) -> np.ndarray:
    """Returns the natural logarithm of the probability of each token, after the tokens before it in its text.

    Args:
      model: the model.
      tokens_N: the token ids of all texts [N].
      bounds: where each text starts, and where the last one ends [number of texts + 1].

    Returns:
      The logarithms [N] float64; 0 for the first token of each text, which is not predicted.

    Raises:
      UserError: for ids outside the vocabulary.
    """
    tokens_N, bounds = _corpus(tokens_N, bounds)
    _check_ids(tokens_N, model.vocabulary)
    place_N = np.arange(len(tokens_N)) - np.repeat(bounds[:-1], np.diff(bounds))
    index_N = tokens_N  # of the n-gram of the order that ends at each token; -1 if the model does not have it
    result_N = model.log10_probs[0][tokens_N].astype(np.float64)
    for k in range(2, model.order + 1):
        at = np.flatnonzero(place_N >= k - 1)
        at = at[index_N[at - 1] >= 0]  # after an unknown context, the order below decides
        contexts = index_N[at - 1]
        index_N = np.full(len(tokens_N), -1)
        index_N[at] = _find(model.keys[k - 2], contexts * model.vocabulary + tokens_N[at])
        is_known = index_N[at] >= 0
        result_N[at] += np.where(is_known, 0, model.log10_backoffs[k - 2][contexts])
        result_N[at[is_known]] = model.log10_probs[k - 1][index_N[at[is_known]]]
    result_N[place_N == 0] = 0
    return result_N * np.log(10)


def _find(keys_G: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the index of each wanted key among the sorted keys; -1 if it is not there."""
    if not len(keys_G):
        return np.full(len(wanted), -1)
    order = np.argsort(wanted)  # sorted searches read neighbouring memory, which is several times faster
    index = np.empty(len(wanted), np.int64)
    index[order] = np.minimum(np.searchsorted(keys_G, wanted[order]), len(keys_G) - 1)
    return np.where(keys_G[index] == wanted, index, -1)


def _counts(tokens_N: np.ndarray, place_N: np.ndarray, order: int, vocabulary: int) -> Iterator[_Counts]:
    """Yields the n-grams of each order, from 1.

    Args:
      tokens_N: the token ids.
      place_N: the place of each token in its text, from 0.
      order: the highest order.
      vocabulary: the number of token ids.
    """
    counts_G = np.bincount(tokens_N[place_N > 0], minlength=vocabulary)
    zeros_G = np.zeros(vocabulary, np.int64)
    yield _Counts(np.arange(vocabulary), zeros_G, counts_G, zeros_G)
    index_N = tokens_N  # of the n-gram of the order that ends at each token
    for k in range(2, order + 1):
        at = np.flatnonzero(place_N >= k - 1)
        suffixes = index_N[at]
        keys_G, inverse, counts_G = np.unique(
            index_N[at - 1] * vocabulary + tokens_N[at], return_inverse=True, return_counts=True
        )
        suffixes_G = np.zeros(len(keys_G), np.int64)
        suffixes_G[inverse] = suffixes  # all occurrences of an n-gram have the same
        starts_G = np.bincount(inverse[place_N[at] == k - 1], minlength=len(keys_G))
        index_N = np.zeros(len(tokens_N), np.int64)
        index_N[at] = inverse
        yield _Counts(keys_G, suffixes_G, counts_G, starts_G)


def _adjusted_counts(orders: Iterator[_Counts]) -> Iterator[tuple[_Counts, np.ndarray]]:
    """Yields the n-grams of each order with their adjusted counts [G]."""
    below = next(orders)
    for counted in orders:
        yield below, np.bincount(counted.suffixes_G, minlength=len(below.keys_G)) + below.starts_G
        below = counted
    yield below, below.counts_G


def _interpolate(
    counts_G: np.ndarray,
    discounts_D: np.ndarray,
    contexts_G: np.ndarray,
    contexts: int,
    lower_G: np.ndarray,
    suffixes_G: np.ndarray,
    order: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the probability of each n-gram [G], and the weight of the order below after each context [C].

    Args:
      counts_G: adjusted counts.
      discounts_D: the discounts.
      contexts_G: the index of the context of each n-gram.
      contexts: the number of contexts C.
      lower_G: the probabilities of the order below.
      suffixes_G: the index of each n-gram without its first token.
      order: the order; the order below unigrams is the uniform distribution over the tokens.
    """
    discounts_G = discounts_D[np.minimum(counts_G, 3)]
    totals_C = np.bincount(contexts_G, weights=counts_G, minlength=contexts)
    removed_C = np.bincount(contexts_G, weights=discounts_G, minlength=contexts)
    # A context that no n-gram continues has no weight of its own: the order below has all.
    backoffs_C = np.divide(removed_C, totals_C, out=np.ones(contexts), where=totals_C > 0)
    lower_G = lower_G if order == 1 else lower_G[suffixes_G]
    probs_G = (counts_G - discounts_G) / np.maximum(totals_C, 1)[contexts_G] + backoffs_C[contexts_G] * lower_G
    return probs_G, backoffs_C


def _discounts(counts_G: np.ndarray, order: int, fallback: Discounts | None) -> tuple[np.ndarray, bool]:
    """Returns the discount of the adjusted counts 0, 1, 2, and 3 or more [D], and whether it is the fallback.

    Chen & Goodman (1998), equation 26.
    """
    t_4 = np.bincount(counts_G[counts_G < 5], minlength=5)  # number of n-grams with the adjusted counts 0 to 4
    absent = [c for c in (1, 2, 3) if not t_4[c]]
    values = [0.0]
    if not absent:
        y = t_4[1] / (t_4[1] + 2 * t_4[2])
        values += [c - (c + 1) * y * t_4[c + 1] / t_4[c] for c in (1, 2, 3)]
    wrong = [c for c, value in enumerate(values) if not 0 <= value <= c]
    if not absent and not wrong:
        return np.array(values), False
    if fallback is not None:
        return np.array([0.0, *fallback]), True
    problem = (
        f"no {order}-gram has the adjusted count {absent[0]}"
        if absent
        else f"the discount of {order}-grams with the adjusted count {wrong[0]} is {values[wrong[0]]:.3g}, and it must "
        f"be from 0 to {wrong[0]}"
    )
    raise UserError(
        f"{problem}, so modified Kneser-Ney smoothing is undefined; the corpus is too small, repeats its lines, or has "
        f"few different tokens: give more text without repeated lines, a lower order, or discounts for such orders, "
        f"fallback={FALLBACK}"
    )


def _corpus(tokens_N: ArrayLike, bounds: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Returns the arrays of a corpus as int64, and raises UserError if they are not those of a corpus."""
    tokens_N, bounds = _integers(tokens_N, "tokens"), _integers(bounds, "bounds")
    if not len(bounds) or bounds[0] != 0 or bounds[-1] != len(tokens_N) or (np.diff(bounds) < 0).any():
        raise UserError(
            f"the bounds {short_repr(bounds.tolist())} do not divide {len(tokens_N):,} tokens into texts; give 0, the "
            f"end of each text in ascending order, and {len(tokens_N)} last"
        )
    return tokens_N, bounds


def _integers(values: ArrayLike, what: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise UserError(f"{what} have the shape {array.shape} and the dtype {array.dtype}; give integers in one list")
    return array.astype(np.int64)


def _check_ids(tokens_N: np.ndarray, vocabulary: int) -> None:
    """Raises UserError if a token id is not one of the vocabulary."""
    wrong_N = (tokens_N < 0) | (tokens_N >= vocabulary)
    if wrong_N.any():
        at = int(wrong_N.argmax())
        raise UserError(
            f"token {at:,} of the corpus is {tokens_N[at]}, and the vocabulary has the ids 0 to {vocabulary - 1:,}; "
            f"give the tokenizer's ids, or a larger vocabulary"
        )


def _check_fallback(fallback: Sequence[Any] | None) -> None:
    """Raises UserError if discounts are not those of the counts 1, 2, and 3 or more."""
    if fallback is None:
        return
    fallback = check_argument("fallback", fallback, Discounts)
    if not all(0 < value <= count for count, value in enumerate(fallback, start=1)):
        raise UserError(
            f"fallback is {fallback}; the discounts of the counts 1, 2, and 3 or more must be above 0 and at most 1, 2 "
            f"and 3, such as {FALLBACK}"
        )
