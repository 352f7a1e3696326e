"""Corruption of text for denoising objectives: pure functions of (tokens, random generator)."""

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
    """BERT's masking (Devlin et al. 2019, section 3.1): the corrupted tokens [T] and which are predicted [T] bool.

    `groups_T` numbers the groups that are chosen as a whole, from 0: single tokens, or words; -1 is never chosen.
    Groups are drawn until `rate` of the choosable tokens, rounded, at least one, are chosen; a group that would exceed
    this is passed over, so that the number is a bound.  Of the chosen, 80% become `mask`, 10% a random token below
    `vocabulary`, 10% stay.
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
    predicted_T = np.isin(groups_T, chosen)
    fate_T = random.random(len(tokens_T))
    noise_T = random.integers(0, vocabulary, len(tokens_T))
    corrupted_T = np.where(predicted_T & (fate_T < 0.8), mask, tokens_T)
    corrupted_T = np.where(predicted_T & (fate_T >= 0.9), noise_T, corrupted_T)
    return corrupted_T, predicted_T


def words(continues_T: np.ndarray, choosable_T: np.ndarray) -> np.ndarray:
    """Groups [T] of whole words: a token that continues a word belongs to the group of the one before it.

    >>> words(np.array([0, 0, 1, 0], bool), np.array([0, 1, 1, 1], bool)).tolist()
    [-1, 0, 0, 1]
    """
    starts_T = choosable_T & ~(continues_T & np.concatenate([[False], choosable_T[:-1]]))
    return np.where(choosable_T, np.cumsum(starts_T) - 1, -1)


def corrupted_lengths(length: int, rate: float, span: float) -> tuple[int, int]:
    """Tokens of the source and of the target that `corrupt_spans` makes of `length` tokens, at least 2, end included.

    >>> corrupted_lengths(9, rate=0.3, span=1.5)
    (9, 6)
    """
    noise = min(max(round(length * rate), 1), length - 1)
    spans = min(max(round(noise / span), 1), noise, length - noise)
    return length - noise + spans + 1, noise + spans + 1


def corrupt_spans(
    tokens_T: np.ndarray, random: np.random.Generator, *, rate: float, span: float, sentinels: np.ndarray, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """T5's objective (Raffel et al. 2020, section 3.1.4): (source, target) of a text of at least 2 tokens.

    In the source each span taken out is replaced by a sentinel of its own; the target is each sentinel and what stood
    there.  The text begins with what is kept and ends with what is taken out; both are divided at random.

    >>> random, how = np.random.default_rng(0), {"rate": 0.4, "span": 2, "sentinels": np.array([90]), "end": 99}
    >>> a, b = corrupt_spans(np.arange(1, 6), random, **how)
    >>> a.tolist(), b.tolist()
    ([1, 2, 3, 90, 99], [90, 4, 5, 99])
    """
    n = len(tokens_T)
    source, target = corrupted_lengths(n, rate, span)
    spans = (source + target - 2 - n) // 2
    kept, taken = (_divided(size, spans, random) for size in (source - 1 - spans, target - 1 - spans))
    is_taken_T = np.repeat(np.tile([False, True], spans), np.stack([kept, taken], 1).ravel())
    # A span that begins is a sentinel, for the side that does not hold it.
    begins_T = np.diff(is_taken_T, prepend=True)
    number_T = np.cumsum(begins_T & is_taken_T)
    sides = []
    for held_T, sentinel_T in (
        (~is_taken_T, sentinels[np.maximum(number_T - 1, 0)]),
        (is_taken_T, sentinels[np.minimum(number_T, spans - 1)]),
    ):
        there_T = held_T | begins_T
        sides.append(np.append(np.where(held_T, tokens_T, sentinel_T)[there_T], end))
    return sides[0], sides[1]


def _divided(size: int, parts: int, random: np.random.Generator) -> np.ndarray:
    """`size` in `parts` of at least 1, each way as likely."""
    cuts = np.sort(random.permutation(size - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [size]]))


def infill(tokens_T: np.ndarray, random: np.random.Generator, *, rate: float, span: float, mask: int) -> np.ndarray:
    """BART's text infilling (Lewis et al. 2020, section 2.2): gaps of a Poisson number of tokens become one mask.

    Gaps of no tokens insert a mask; those that would make the text longer than it was are left out.
    """
    n, left = len(tokens_T), round(rate * len(tokens_T))
    gaps: list[int] = []
    while left > 0:
        gap = min(int(random.poisson(span)), left)
        gaps.append(gap)
        left -= gap
    inserted = min(gaps.count(0), sum(gaps) - sum(gap > 0 for gap in gaps))
    longer = [gap for gap in gaps if gap]
    kept = n - sum(longer)
    # Gaps lie between kept tokens: places 0 to kept, in order, so that they do not overlap.
    places = np.sort(random.integers(0, kept + 1, len(longer)))
    out: list[np.ndarray] = []
    start = taken = 0
    for place, gap in zip(places.tolist(), longer):
        out += [tokens_T[start : place + taken], np.array([mask])]
        taken += gap
        start = place + taken
    corrupted = np.concatenate([*out, tokens_T[start:]]).astype(tokens_T.dtype)
    return np.insert(corrupted, np.sort(random.integers(0, len(corrupted) + 1, inserted)), mask)
