"""Membership inference: whether an example was in the training data, and the privacy loss that an attack proves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxlm.config.ranges import ShareAboveZero, ShareBelowOne, check_argument
from jaxlm.errors import UserError
from jaxlm.run.privacy import package

RATES = (0.001, 0.01, 0.1)  # false positive rates at which an attack is reported


class Attack(NamedTuple):
    """How well a score separates members of the training data from other examples.

    auc: area under the ROC curve; 0.5 for an attack at random.
    auc_interval: its 95 % interval (Hanley and McNeil 1982).
    rates: false positive rates.
    found: the fraction of members that is found at each rate.
    intervals: its 95 % interval (Clopper and Pearson 1934) at each rate.
    members, others: number of examples.
    """

    auc: float
    auc_interval: tuple[float, float]
    rates: tuple[float, ...]
    found: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]
    members: int
    others: int


def attack(members_N: ArrayLike, others_M: ArrayLike, rates: Sequence[float] = RATES) -> Attack:
    """Returns how well scores separate members from other examples.

    The threshold of a rate is the smallest with at most this fraction of the others above it. A rate below 1 / M cannot
    be measured with M others: its threshold is then their maximum.

    Args:
      members_N: scores of training examples, such as the negative losses (Yeom et al. 2018).
      others_M: scores of examples that were not in the training data.
      rates: false positive rates (Carlini et al. 2022).

    Raises:
      UserError: if one of the two is empty, or a score is not finite.
    """
    from scipy.stats import rankdata

    own, other = _scores(members_N, "members"), _scores(others_M, "others")
    N, M = len(own), len(other)
    auc = float((rankdata(np.concatenate([own, other]))[:N].sum() - N * (N + 1) / 2) / (N * M))
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = (auc * (1 - auc) + (N - 1) * (q1 - auc**2) + (M - 1) * (q2 - auc**2)) / (N * M)
    half = 1.96 * float(np.sqrt(max(0.0, variance)))
    descending = np.sort(other)[::-1]
    counts = [int((own > descending[int(rate * M)]).sum()) if rate < 1 else N for rate in rates]
    intervals = tuple(_interval(count, N) for count in counts)
    limits = max(0.0, auc - half), min(1.0, auc + half)
    return Attack(auc, limits, tuple(rates), tuple(count / N for count in counts), intervals, N, M)


def reference_scores(losses_N: ArrayLike, references_KN: ArrayLike) -> np.ndarray:
    """Returns scores that compare the loss of each example with models that were not trained on it.

    The score is the number of standard deviations by which the loss is below the mean of the reference models, with one
    standard deviation for all examples (the offline attack of Carlini et al. 2022, section VI.A, with few models).

    Args:
      losses_N: losses under the attacked model.
      references_KN: losses under K reference models.

    Raises:
      UserError: if the numbers of examples differ.
    """
    losses, references = np.asarray(losses_N, np.float64), np.asarray(references_KN, np.float64)
    if references.ndim != 2 or references.shape[1:] != losses.shape or not len(references):
        raise UserError(
            f"references have the shape {references.shape}, and there are {losses.shape} losses; give a row of losses "
            f"for each reference model"
        )
    spread = references.std(0).mean() if len(references) > 1 else 0.0
    scores: np.ndarray = (references.mean(0) - losses) / max(spread, 1e-12 if spread else 1.0)
    return scores


def audited_epsilon(members_N: ArrayLike, others_M: ArrayLike, delta: float, significance: float = 0.05) -> float:
    """Returns a lower bound of the privacy loss of a training run, from the scores of canaries.

    Each canary must have been a training example with the probability 1/2, independently of the others.

    Args:
      members_N: scores of the canaries in the training data; larger for members.
      others_M: scores of the other canaries.
      delta: probability of a larger privacy loss.
      significance: probability that the bound is wrong.

    Raises:
      UserError: if jax-privacy is not installed, or a group is empty.

    Source: Steinke et al. 2023, "Privacy Auditing with One (1) Training Run", computed by jax-privacy.
    """
    check_argument("delta", delta, ShareAboveZero)
    check_argument("significance", significance, ShareBelowOne)
    own, other = _scores(members_N, "members"), _scores(others_M, "others")
    auditor = package("jax_privacy.auditing").CanaryScoreAuditor(own, other)
    return max(0.0, float(auditor.epsilon_one_run(significance, delta)))


def _scores(values: ArrayLike, name: str) -> np.ndarray:
    scores = np.asarray(values, np.float64).reshape(-1)
    if not len(scores) or not np.isfinite(scores).all():
        raise UserError(f"{name} has {len(scores)} scores; give at least one, and all of them must be finite")
    return scores


def _interval(count: int, of: int) -> tuple[float, float]:
    """Returns the 95 % interval of a proportion."""
    from scipy.stats import beta

    low = float(beta.ppf(0.025, count, of - count + 1)) if count else 0.0
    return low, float(beta.ppf(0.975, count + 1, of - count)) if count < of else 1.0
