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
