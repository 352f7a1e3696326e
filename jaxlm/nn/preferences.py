"""Losses of pairs of a chosen and a rejected answer, from the log-probabilities of their tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Pairs(NamedTuple):
    """Log-probabilities of the answers of pairs; the last axis has the chosen and the rejected answer.

    Attributes:
      policy_P2: the sum over the tokens of an answer by the trained model, float32, in nats.
      reference_P2: the same by the reference, without a gradient; None: there is no reference.
      lengths_P2: number of tokens of the answers.
    """

    policy_P2: jax.Array
    reference_P2: jax.Array | None
    lengths_P2: jax.Array

    @property
    def ratios_P2(self) -> jax.Array:
        """The log-probabilities relative to the reference, if there is one."""
        return self.policy_P2 if self.reference_P2 is None else self.policy_P2 - self.reference_P2

    @property
    def means_P2(self) -> jax.Array:
        """The mean over the tokens of the log-probabilities relative to the reference, if there is one."""
        return self.ratios_P2 / jnp.maximum(self.lengths_P2, 1)


class PairLosses(NamedTuple):
    """The loss of each pair [P], and the implicit rewards of its answers [P, 2]."""

    loss_P: jax.Array
    rewards_P2: jax.Array


def dpo(pairs: Pairs, beta: float, margin: float, smoothing: float) -> PairLosses:
    """Returns direct preference optimisation (Rafailov et al. 2023, equation 7).

    With smoothing it is conservative DPO (Mitchell 2023, equation 3).
    """
    rewards_P2 = beta * pairs.ratios_P2
    return PairLosses(_logistic(_difference(rewards_P2), smoothing), rewards_P2)


def ipo(pairs: Pairs, beta: float, margin: float, smoothing: float) -> PairLosses:
    """Returns identity preference optimisation (Azar et al. 2023, equation 17), of means over tokens."""
    loss_P = jnp.square(_difference(pairs.means_P2) - 1 / (2 * beta))
    return PairLosses(loss_P, beta * pairs.means_P2)


def simpo(pairs: Pairs, beta: float, margin: float, smoothing: float) -> PairLosses:
    """Returns simple preference optimisation (Meng et al. 2024, equation 6)."""
    rewards_P2 = beta * pairs.means_P2
    return PairLosses(_logistic(_difference(rewards_P2) - margin, smoothing), rewards_P2)


def orpo(pairs: Pairs, beta: float, margin: float, smoothing: float) -> PairLosses:
    """Returns odds-ratio preference optimisation (Hong et al. 2024, equations 4 to 7).

    It is the mean negative log-likelihood of the chosen answer, and beta times the loss of the ratio of the odds.
    """
    means_P2 = pairs.means_P2
    # log(1 - p) is not finite for p = 1.
    log_odds_P2 = means_P2 - jnp.log(-jnp.expm1(jnp.minimum(means_P2, -1e-7)))
    loss_P = -means_P2[..., 0] - beta * jax.nn.log_sigmoid(_difference(log_odds_P2))
    return PairLosses(loss_P, beta * means_P2)


Objective = Callable[[Pairs, float, float, float], PairLosses]
OBJECTIVES: dict[str, Objective] = {"dpo": dpo, "ipo": ipo, "simpo": simpo, "orpo": orpo}


def _difference(values_P2: jax.Array) -> jax.Array:
    """Returns the value of the chosen answer minus that of the rejected one."""
    return values_P2[..., 0] - values_P2[..., 1]


def _logistic(logits_P: jax.Array, smoothing: float) -> jax.Array:
    """Returns the negative log-likelihood of pairs, if a fraction `smoothing` of them has the wrong order."""
    return -(1 - smoothing) * jax.nn.log_sigmoid(logits_P) - smoothing * jax.nn.log_sigmoid(-logits_P)
