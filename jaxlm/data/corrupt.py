"""Corruption of texts for denoising objectives: pure functions of tokens and random numbers.

The random numbers of an example depend only on a seed and on the number of the example, so each example is corrupted in
the same way in any batch.  `Draws` returns those of many examples at once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from jaxlm.data.joined import number_within, offsets, ranges

_STEP = np.uint64(0x9E3779B97F4A7C15)  # the constants of SplitMix64
_MIX = ((30, np.uint64(0xBF58476D1CE4E5B9)), (27, np.uint64(0x94D049BB133111EB)))


class Texts(NamedTuple):
    """Several texts, one after another."""

    tokens: np.ndarray  # token ids of all texts
    lengths: np.ndarray  # length of each text


class Draws:
    """Random 64-bit words of several examples, each with its own sequence.

    The sequence of an example is that of SplitMix64 (Steele et al. 2014), whose words can be computed in any order. It
    starts from a hash of the seed and the number of the example.
    """

    def __init__(self, seed: tuple[int, ...], examples_X: np.ndarray):
        """Defines the sequences.

        Args:
          seed: the seed that all examples share.
          examples_X: the number of each example.
        """
        key = np.random.SeedSequence(seed).generate_state(1, np.uint64)
        self._states_X = _mix(_mix(examples_X.astype(np.uint64) * _STEP + key) ^ key)

    def words(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Returns a random word for each entry of `x`.

        Args:
          x: which of the examples, an index into `examples_X`.
          index: the number of the word in the sequence of the example.
        """
        return _mix(self._states_X[x] + _STEP * (index.astype(np.uint64) + np.uint64(1)))


def _mix(words: np.ndarray) -> np.ndarray:
    for shift, factor in _MIX:
        words = (words ^ (words >> np.uint64(shift))) * factor
    return words ^ (words >> np.uint64(31))


class Order(NamedTuple):
    """Items of several examples in a random order within each example."""

    items: np.ndarray  # index of each item
    examples: np.ndarray  # the example of each item, in ascending order
    ranks: np.ndarray  # the number of the item within its example, from 0


def shuffle(words: np.ndarray, counts_X: np.ndarray) -> Order:
    """Returns the items of each example in the order of their random words.

    Args:
      words: a random word for each item; the items of an example are consecutive.
      counts_X: number of items of each example.
    """
    example = np.repeat(np.arange(len(counts_X)), counts_X)
    within = number_within(example)
    # The example, half of its random word and the number of the item in one word: sorting these is fast, and the order
    # of an example does not depend on the others.
    low, high = int(counts_X.max(initial=1)).bit_length(), len(counts_X).bit_length()
    if low + high > 32:
        in_example = within[np.lexsort((within, words >> np.uint64(32), example))]
    else:
        keys = (example << (32 + low)).astype(np.uint64) | (words >> np.uint64(32) << np.uint64(low))
        in_example = (np.sort(keys | within.astype(np.uint64)) & np.uint64((1 << low) - 1)).astype(np.int64)
    return Order(in_example + np.repeat(offsets(counts_X)[:-1], counts_X), example, within)


def mask_tokens(
    tokens_N: np.ndarray,
    groups_N: np.ndarray,
    lengths_X: np.ndarray,
    draws: Draws,
    *,
    rate: float,
    mask: int,
    vocabulary: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Masks tokens of several texts as in BERT (Devlin et al. 2019, section 3.1).

    In each text, random groups are selected until a fraction `rate` of the maskable tokens, at least one token, is
    reached; a group that would exceed this number is skipped.  Of the selected tokens, 80% become `mask`, 10% become a
    random token, and 10% stay unchanged.

    Args:
      tokens_N: token ids of all texts.
      groups_N: group of each token, from 0 and in ascending order; a group, such as a word, belongs to one text and is
        masked as a whole.  -1: never masked.
      lengths_X: length of each text.
      draws: random numbers of the texts.
      rate: fraction of the maskable tokens to select.
      mask: id of the mask token.
      vocabulary: random tokens are below this id.

    Returns:
      The corrupted tokens [N], and which tokens are to be predicted [N], bool.
    """
    text_N = np.repeat(np.arange(len(lengths_X)), lengths_X)
    place_N = number_within(text_N)
    maskable = np.flatnonzero(groups_N >= 0)
    group_M = groups_N[maskable]
    first_G = maskable[np.flatnonzero(np.diff(group_M, prepend=-1))]  # the first token of each group
    sizes_G, text_G = np.bincount(group_M), text_N[first_G]
    count = lambda text: np.bincount(text, minlength=len(lengths_X))
    left_X = np.maximum(1, np.rint(rate * count(text_N[maskable]))).astype(np.int64)
    # Two words belong to each token: one for the order of the groups, one for what becomes of the token.
    order = shuffle(draws.words(text_G, 2 * place_N[first_G]), count(text_G))
    is_chosen_G = np.zeros(len(sizes_G) + 1, bool)  # the last entry is for the group -1
    if sizes_G.max(initial=0) <= 1:
        is_chosen_G[order.items[order.ranks < left_X[order.examples]]] = True
    else:
        for items in _fill_up(sizes_G[order.items], order, left_X):
            is_chosen_G[items] = True
    predicted_N = is_chosen_G[groups_N]
    chosen = np.flatnonzero(predicted_N)
    words = draws.words(text_N[chosen], 2 * place_N[chosen] + 1)
    fate, corrupted_N = (words >> np.uint64(32)) / 2.0**32, tokens_N.copy()
    corrupted_N[chosen[fate < 0.8]] = mask
    is_random = fate >= 0.9
    # The lower half of a word, as a fraction of 2^32, selects a random token.
    fraction = words[is_random] & np.uint64(0xFFFFFFFF)
    corrupted_N[chosen[is_random]] = (fraction * np.uint64(vocabulary)) >> np.uint64(32)
    return corrupted_N, predicted_N


def _fill_up(sizes: np.ndarray, order: Order, left_X: np.ndarray) -> list[np.ndarray]:
    """Selects items of each example, in their order, that still fit into what is left; others are skipped.

    Args:
      sizes: size of each item of `order`.
      order: the items.
      left_X: the total size that fits for each example.

    Returns:
      Arrays of selected items.
    """
    selected: list[np.ndarray] = []
    items, example, left_X = order.items, order.examples, left_X.copy()
    while True:
        fits = sizes <= left_X[example]  # what is too large now stays too large
        sizes, items, example = sizes[fits], items[fits], example[fits]
        if not len(items):
            return selected
        # Items up to the first that does not fit after the others.
        taken = _sums_before(sizes, example) + sizes <= left_X[example]
        selected.append(items[taken])
        left_X -= np.bincount(example[taken], sizes[taken], len(left_X)).astype(np.int64)
        sizes, items, example = sizes[~taken], items[~taken], example[~taken]


def prediction_order(lengths_X: np.ndarray, draws: Draws, *, rate: float, longest: int) -> np.ndarray:
    """Selects spans of several texts as targets, and orders the targets of each text randomly.

    A text is divided into contexts.  Each has one span of 1 to `longest` targets at a random place, and is 1 / `rate`
    times as long as its span (Yang et al. 2019, section 3.1).  The end of the text may be a shorter context with fewer
    targets, but at least one.  A text has at most `rate` times its tokens plus 1 targets.

    Args:
      lengths_X: length of each text, at least 1.
      draws: random numbers of the texts.
      rate: fraction of the tokens to predict.
      longest: maximum length of a span in tokens.

    Returns:
      The number of each token in the order of prediction [sum of the lengths], from 1 in each text; 0 for tokens that
      are not targets.
    """
    context_sizes = np.ceil(np.arange(1, longest + 1) / rate - 1e-9).astype(np.int64)
    x = np.repeat(np.arange(len(lengths_X)), -(-lengths_X // context_sizes[0]))
    words = draws.words(x, 2 * number_within(x))
    fraction = lambda words, of: (((words & np.uint64(0xFFFFFFFF)) * of.astype(np.uint64)) >> np.uint64(32)).astype(int)
    sizes = 1 + fraction(words >> np.uint64(32), np.full(len(x), longest))
    contexts = context_sizes[sizes - 1]
    starts = _sums_before(contexts, x)
    inside = starts < lengths_X[x]
    x, words, sizes, contexts, starts = (array[inside] for array in (x, words, sizes, contexts, starts))
    left = np.minimum(contexts, lengths_X[x] - starts)
    sizes = np.where(left < contexts, np.maximum(1, np.rint(left * rate)).astype(np.int64), sizes)
    starts += fraction(words, left - sizes + 1)
    places = ranges(starts, sizes)
    x = np.repeat(x, sizes)
    order = shuffle(draws.words(x, 2 * places + 1), np.bincount(x, minlength=len(lengths_X)))
    order_N = np.zeros(int(lengths_X.sum()), np.int32)
    order_N[(offsets(lengths_X)[x] + places)[order.items]] = order.ranks + 1
    return order_N


def word_groups(continues_N: np.ndarray, choosable_N: np.ndarray) -> np.ndarray:
    """Returns the groups of `mask_tokens` for whole words: a token that continues a word joins the preceding group.

    Args:
      continues_N: whether each token continues the word of the preceding one, bool; False for the first of a text.
      choosable_N: whether each token may be masked, bool.

    Returns:
      The group of each token [N]; -1 for tokens that may not be masked.

    >>> word_groups(np.array([0, 0, 1, 0], bool), np.array([0, 1, 1, 1], bool)).tolist()
    [-1, 0, 0, 1]
    """
    starts_N = choosable_N & ~(continues_N & np.concatenate([[False], choosable_N[:-1]]))
    return np.where(choosable_N, np.cumsum(starts_N) - 1, -1)


def corrupted_lengths(length: int, rate: float, span: float) -> tuple[int, int]:
    """Returns the lengths of the source and the target that `corrupt_spans` returns, including the end token.

    Args:
      length: length of the text in tokens, at least 2.
      rate: fraction of the tokens to remove.
      span: mean span length in tokens.

    >>> corrupted_lengths(9, rate=0.3, span=1.5)
    (9, 6)
    """
    noise, spans = _noise(length, rate, span)
    return length - noise + spans + 1, noise + spans + 1


def _noise(length: int, rate: float, span: float) -> tuple[int, int]:
    """Returns the number of tokens that `corrupt_spans` removes from a text, and the number of spans."""
    noise = min(max(round(length * rate), 1), length - 1)
    return noise, min(max(round(noise / span), 1), noise, length - noise)


def corrupt_spans(
    tokens_N: np.ndarray,
    lengths_X: np.ndarray,
    draws: Draws,
    *,
    rate: float,
    span: float,
    sentinels: np.ndarray,
    end: int,
) -> tuple[Texts, Texts]:
    """Removes random spans from several texts, as in T5's pre-training (Raffel et al. 2020, section 3.1.4).

    In a source, each removed span is replaced by a different sentinel.  A target consists of the sentinels, each
    followed by its span.  A text always begins with a kept span and ends with a removed one.

    Args:
      tokens_N: token ids of all texts.
      lengths_X: length of each text, at least 2.
      draws: random numbers of the texts.
      rate: fraction of the tokens to remove.
      span: mean span length in tokens.
      sentinels: ids of the sentinels, in the order of use.
      end: id appended to each source and target.

    Returns:
      The sources and the targets; their lengths are `corrupted_lengths`.

    >>> how = {"rate": 0.4, "span": 2, "sentinels": np.array([90]), "end": 99}
    >>> sources, targets = corrupt_spans(np.arange(1, 6), np.array([5]), Draws((0,), np.array([0])), **how)
    >>> sources.tokens.tolist(), targets.tokens.tolist()
    ([1, 2, 3, 90, 99], [90, 4, 5, 99])
    """
    sizes, inverse = np.unique(lengths_X, return_inverse=True)
    noise = np.array([_noise(size, rate, span) for size in sizes.tolist()], np.int64).reshape(-1, 2)
    noise_X, spans_X = noise[inverse].T
    kept = _random_sizes(lengths_X - noise_X, spans_X, draws, 0)
    removed = _random_sizes(noise_X, spans_X, draws, 1)
    # The spans of all texts: kept and removed ones alternate.
    sizes_P = np.stack([kept, removed], 1).ravel()
    is_removed_N = np.repeat(np.arange(len(sizes_P)) % 2 == 1, sizes_P)
    number_N = np.repeat(np.repeat(number_within(np.repeat(np.arange(len(spans_X)), spans_X)), 2), sizes_P)
    is_first_N = np.zeros(len(tokens_N), bool)
    is_first_N[offsets(sizes_P)[:-1]] = True
    sides = []
    for is_copied_N, lengths in (
        (~is_removed_N, lengths_X - noise_X + spans_X + 1),
        (is_removed_N, noise_X + spans_X + 1),
    ):
        # The first token of a span becomes a sentinel on the side that does not contain the span.  A kept span and the
        # removed span after it have the same number.
        side = np.full(lengths.sum(), end, tokens_N.dtype)
        is_text = np.ones(len(side), bool)
        is_text[np.cumsum(lengths) - 1] = False
        inside = is_copied_N | is_first_N
        side[is_text] = np.where(is_copied_N, tokens_N, sentinels[number_N])[inside]
        sides.append(Texts(side, lengths))
    return sides[0], sides[1]


def _random_sizes(totals_X: np.ndarray, parts_X: np.ndarray, draws: Draws, sequence: int) -> np.ndarray:
    """Splits each total into random sizes of at least 1, uniformly.

    Args:
      totals_X: the totals.
      parts_X: number of sizes of each total.
      draws: random numbers.
      sequence: which words of each sequence to use, 0 or 1.

    Returns:
      The sizes of all totals [sum of the parts].
    """
    gaps_X = totals_X - 1
    x = np.repeat(np.arange(len(gaps_X)), gaps_X)
    order = shuffle(draws.words(x, 2 * number_within(x) + sequence), gaps_X)
    chosen = order.items[order.ranks < (parts_X - 1)[order.examples]]
    # Gap g of a total is the one before its entry g + 1.
    starts_part = np.zeros(int(totals_X.sum()) + 1, bool)
    starts_part[chosen + x[chosen] + 1] = True
    starts_part[offsets(totals_X)] = True
    return np.diff(np.flatnonzero(starts_part))


def infill(tokens_N: np.ndarray, lengths_X: np.ndarray, draws: Draws, *, rate: float, span: float, mask: int) -> Texts:
    """Replaces random spans by one mask token each, as in BART's text infilling (Lewis et al. 2020, section 2.2).

    Spans of length 0 insert a mask token; those that would make a result longer than its text are omitted.

    Args:
      tokens_N: token ids of all texts.
      lengths_X: length of each text.
      draws: random numbers of the texts; the words 4 n + 3 are not used.
      rate: fraction of the tokens to remove.
      span: mean of the Poisson distribution of span lengths.
      mask: id of the mask token.

    Returns:
      The corrupted texts; none is longer than it was.
    """
    removed_X = np.rint(rate * lengths_X).astype(np.int64)
    text, sizes = _span_sizes(removed_X, span, draws)
    kept_X = lengths_X - removed_X
    count = lambda which: np.bincount(text[which], minlength=len(lengths_X))
    spans_X = count(sizes > 0)
    inserted_X = np.minimum(count(sizes == 0), removed_X - spans_X)
    text, sizes = text[sizes > 0], sizes[sizes > 0]
    # Each span is placed before one of the kept tokens or at the end, in order, so spans do not overlap.
    number = number_within(text)
    places = _random_places(kept_X + 1, spans_X, draws, 1)
    starts = offsets(lengths_X)[text] + places + _sums_before(sizes, text)
    is_kept_N = np.ones(len(tokens_N), bool)
    is_kept_N[ranges(starts, sizes)] = False
    # With the masks of these spans.
    with_masks_X = kept_X + spans_X
    is_token = np.ones(int(with_masks_X.sum()), bool)
    is_token[offsets(with_masks_X)[text] + places + number] = False
    # With the masks of the spans of length 0.
    results_X = with_masks_X + inserted_X
    text = np.repeat(np.arange(len(inserted_X)), inserted_X)
    places = _random_places(with_masks_X + 1, inserted_X, draws, 2)
    results, is_old = np.full(int(results_X.sum()), mask, tokens_N.dtype), np.ones(int(results_X.sum()), bool)
    is_old[offsets(results_X)[text] + places + number_within(text)] = False
    results[np.flatnonzero(is_old)[is_token]] = tokens_N[is_kept_N]
    return Texts(results, results_X)


def _span_sizes(totals_X: np.ndarray, mean: float, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Returns the text and the size of each span: sizes from a Poisson distribution until their sum is the total.

    The last span of a text is cut to what is left of the total.
    """
    texts, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    text, left_X, n = np.flatnonzero(totals_X), totals_X.copy(), 0
    limits = _poisson_limits(mean)
    while len(text):
        words = draws.words(text, np.full(len(text), 4 * n))
        size = np.minimum(np.searchsorted(limits, words, side="right"), left_X[text])
        left_X[text] -= size
        texts, sizes, n = [*texts, text], [*sizes, size], n + 1
        text = text[left_X[text] > 0]
    of_all = np.concatenate(texts)
    order = np.argsort(of_all, kind="stable")
    return of_all[order], np.concatenate(sizes)[order]


def _poisson_limits(mean: float) -> np.ndarray:
    """Returns the random words from which on a draw of a Poisson distribution is larger than 0, 1, 2 and so on."""
    limits: list[int] = []
    probability, total = math.exp(-mean), 0.0
    while total < 1 - 2.0**-40 and (probability > 0 or len(limits) < mean):
        total += probability
        limits.append(min(int(total * 2.0**64), 2**64 - 1))
        probability *= mean / len(limits)
    return np.array(limits, np.uint64)


def _random_places(sizes_X: np.ndarray, counts_X: np.ndarray, draws: Draws, sequence: int) -> np.ndarray:
    """Returns sorted random places below the size of each text, as many as its count; they may be equal."""
    x = np.repeat(np.arange(len(counts_X)), counts_X)
    words = draws.words(x, 4 * number_within(x) + sequence)
    places = ((words >> np.uint64(32)) * sizes_X[x].astype(np.uint64)) >> np.uint64(32)
    return np.sort((x.astype(np.uint64) << np.uint64(32)) | places).astype(np.int64) & 0xFFFFFFFF


def _sums_before(sizes: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Returns for each entry the sum of the earlier sizes of the same text; entries of a text are consecutive."""
    before = np.cumsum(sizes) - sizes
    return before - np.maximum.accumulate(np.where(np.diff(text, prepend=-1) != 0, before, 0))
