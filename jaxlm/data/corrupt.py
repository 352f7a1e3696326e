"""Corruption of token sequences for denoising objectives: pure functions of (tokens, random generator)."""

from __future__ import annotations

import numpy as np


def mask_tokens(
    tokens_T: np.ndarray,
    groups_T: np.ndarray,
    random: np.random.Generator,
    *,
    rate: float,
    mask: int,
    vocabulary: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Masks tokens as in BERT (Devlin et al. 2019, section 3.1).

    Random groups are selected until a fraction `rate` of the maskable tokens, at least one token, is reached; a group
    that would exceed this number is skipped.  Of the selected tokens, 80% become `mask`, 10% become a random token, and
    10% stay unchanged.

    Args:
      tokens_T: token ids.
      groups_T: group of each token, from 0; a group, such as a word, is masked as a whole.  -1: never masked.
      random: the random generator.
      rate: fraction of the maskable tokens to select.
      mask: id of the mask token.
      vocabulary: random tokens are below this id.

    Returns:
      The corrupted tokens [T], and which tokens are to be predicted [T], bool.
    """
    budget = max(1, round(rate * int((groups_T >= 0).sum())))
    sizes = np.bincount(groups_T[groups_T >= 0])
    order = random.permutation(len(sizes))
    if sizes.max(initial=0) <= 1:
        chosen = order[:budget].tolist()
    else:
        chosen, left = [], budget
        for group in order.tolist():
            if sizes[group] <= left:
                chosen.append(group)
                left -= int(sizes[group])
            if not left:
                break
    is_chosen = np.zeros(len(sizes) + 1, bool)  # the last entry is for the group -1
    is_chosen[chosen] = True
    predicted_T = is_chosen[groups_T]
    fate_T = random.random(len(tokens_T))
    noise_T = random.integers(0, vocabulary, len(tokens_T))
    corrupted_T = np.where(predicted_T & (fate_T < 0.8), mask, tokens_T)
    corrupted_T = np.where(predicted_T & (fate_T >= 0.9), noise_T, corrupted_T)
    return corrupted_T, predicted_T


def word_groups(continues_T: np.ndarray, choosable_T: np.ndarray) -> np.ndarray:
    """Returns the groups of `mask_tokens` for whole words: a token that continues a word joins the preceding group.

    Args:
      continues_T: whether each token continues the word of the preceding one, bool.
      choosable_T: whether each token may be masked, bool.

    Returns:
      The group of each token [T]; -1 for tokens that may not be masked.

    >>> word_groups(np.array([0, 0, 1, 0], bool), np.array([0, 1, 1, 1], bool)).tolist()
    [-1, 0, 0, 1]
    """
    starts_T = choosable_T & ~(continues_T & np.concatenate([[False], choosable_T[:-1]]))
    return np.where(choosable_T, np.cumsum(starts_T) - 1, -1)


def corrupted_lengths(length: int, rate: float, span: float) -> tuple[int, int]:
    """Returns the lengths of the source and the target that `corrupt_spans` returns, including the end token.

    Args:
      length: length of the text in tokens, at least 2.
      rate: fraction of the tokens to remove.
      span: mean span length in tokens.

    >>> corrupted_lengths(9, rate=0.3, span=1.5)
    (9, 6)
    """
    noise = min(max(round(length * rate), 1), length - 1)
    spans = min(max(round(noise / span), 1), noise, length - noise)
    return length - noise + spans + 1, noise + spans + 1


def corrupt_spans(
    tokens_T: np.ndarray, random: np.random.Generator, *, rate: float, span: float, sentinels: np.ndarray, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Removes random spans from a text, as in T5's pre-training (Raffel et al. 2020, section 3.1.4).

    In the source, each removed span is replaced by a different sentinel.  The target consists of the sentinels, each
    followed by its span.  The text always begins with a kept span and ends with a removed one.

    Args:
      tokens_T: token ids, at least 2.
      random: the random generator.
      rate: fraction of the tokens to remove.
      span: mean span length in tokens.
      sentinels: ids of the sentinels, in the order of use.
      end: id appended to both source and target.

    Returns:
      The source and the target, whose lengths are `corrupted_lengths`.

    >>> random, how = np.random.default_rng(0), {"rate": 0.4, "span": 2, "sentinels": np.array([90]), "end": 99}
    >>> a, b = corrupt_spans(np.arange(1, 6), random, **how)
    >>> a.tolist(), b.tolist()
    ([1, 2, 3, 90, 99], [90, 4, 5, 99])
    """
    n = len(tokens_T)
    source, target = corrupted_lengths(n, rate, span)
    spans = (source + target - 2 - n) // 2
    kept, removed = (_random_sizes(size, spans, random) for size in (source - 1 - spans, target - 1 - spans))
    is_removed_T = np.repeat(np.tile([False, True], spans), np.stack([kept, removed], 1).ravel())
    # The first token of a span becomes a sentinel on the side that does not contain the span.
    is_first_T = np.diff(is_removed_T, prepend=True)
    number_T = np.cumsum(is_first_T & is_removed_T)
    sides = []
    for is_copied_T, sentinel_T in (
        (~is_removed_T, sentinels[np.maximum(number_T - 1, 0)]),
        (is_removed_T, sentinels[np.minimum(number_T, spans - 1)]),
    ):
        sides.append(np.append(np.where(is_copied_T, tokens_T, sentinel_T)[is_copied_T | is_first_T], end))
    return sides[0], sides[1]


def _random_sizes(size: int, parts: int, random: np.random.Generator) -> np.ndarray:
    """Splits `size` into `parts` sizes of at least 1, uniformly at random."""
    cuts = np.sort(random.permutation(size - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [size]]))


def infill(tokens_T: np.ndarray, random: np.random.Generator, *, rate: float, span: float, mask: int) -> np.ndarray:
    """Replaces random spans by one mask token each, as in BART's text infilling (Lewis et al. 2020, section 2.2).

    Spans of length 0 insert a mask token; those that would make the result longer than the text are omitted.

    Args:
      tokens_T: token ids.
      random: the random generator.
      rate: fraction of the tokens to remove.
      span: mean of the Poisson distribution of span lengths.
      mask: id of the mask token.

    Returns:
      The corrupted tokens, at most T.
    """
    n, left = len(tokens_T), round(rate * len(tokens_T))
    spans: list[int] = []
    while left > 0:
        size = min(int(random.poisson(span)), left)
        spans.append(size)
        left -= size
    inserted = min(spans.count(0), sum(spans) - sum(size > 0 for size in spans))
    removing = [size for size in spans if size]
    kept = n - sum(removing)
    # Each span is placed before one of the kept tokens or at the end, in order, so spans do not overlap.
    places = np.sort(random.integers(0, kept + 1, len(removing)))
    out: list[np.ndarray] = []
    start = removed = 0
    for place, size in zip(places.tolist(), removing):
        out += [tokens_T[start : place + removed], np.array([mask])]
        removed += size
        start = place + removed
    corrupted = np.concatenate([*out, tokens_T[start:]]).astype(tokens_T.dtype)
    return np.insert(corrupted, np.sort(random.integers(0, len(corrupted) + 1, inserted)), mask)
