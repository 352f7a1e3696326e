"""The result of an audit, and the confidence intervals of its scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.reports.pages import Chapter
from jaxlm.reports.pictures import Bars

Z = 1.959964  # quantile of the normal distribution for intervals of 95 %
RESAMPLES = 1000  # of a bootstrap


class Audit(NamedTuple):
    """The result of one audit of a model.

    Attributes:
      title: the name of the measure.
      scores: name -> number, which the verb prints and writes as JSON; NaN where a score is undefined.
      chapters: the chapters of the page.
    """

    title: str
    scores: Mapping[str, float]
    chapters: Sequence[Chapter]


class Estimate(NamedTuple):
    """A number with the bounds of its confidence interval of 95 %."""

    value: float
    low: float
    high: float

    def percent(self) -> str:
        """Returns the estimate in per cent, such as "60.5 (57.1 to 63.8)"."""
        return self.text(100, 1)

    def text(self, scale: float = 1.0, decimals: int = 3) -> str:
        """Returns the estimate and its bounds, multiplied by `scale`; "–" if it is undefined."""
        if math.isnan(self.value):
            return "–"
        value, low, high = (f"{scale * number:.{decimals}f}" for number in self)
        return f"{value} ({low} to {high})"


def estimate_bars(title: str, estimates: Mapping[str, Estimate], unit: str, reference: float | None = None) -> Bars:
    """Returns bars of estimates by name, in per cent, with their intervals, and a line at the reference."""
    percent = [tuple(100 * number for number in one) for one in estimates.values()]
    values, intervals = tuple(p[0] for p in percent), tuple((p[1], p[2]) for p in percent)
    return Bars(title, tuple(estimates), values, unit, intervals, reference)


UNDEFINED = Estimate(math.nan, math.nan, math.nan)


def wilson(count: int, total: int) -> Estimate:
    """Returns the proportion count / total with its interval (Wilson 1927); undefined for a total of 0.

    Args:
      count: number of successes.
      total: number of trials.
    """
    if not total:
        return UNDEFINED
    p = count / total
    centre = (p + Z**2 / (2 * total)) / (1 + Z**2 / total)
    half = Z / (1 + Z**2 / total) * math.sqrt(p * (1 - p) / total + Z**2 / (4 * total**2))
    return Estimate(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)))


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], rows: int, seed: int) -> list[Estimate]:
    """Returns statistics of N rows with percentile intervals (Efron 1979).

    Args:
      statistic: a function from row numbers [N] to K numbers; NaN where a number is undefined for these rows.
      rows: number of rows N.
      seed: of the resampling.

    Returns:
      K estimates. Resamples for which a statistic is undefined do not count.
    """
    value_K = np.asarray(statistic(np.arange(rows)), float)
    random = np.random.default_rng(seed)
    sampled_RK = np.array([statistic(random.integers(0, rows, rows)) for _ in range(RESAMPLES)], float)
    estimates = []
    for value, sampled_R in zip(value_K, sampled_RK.T):
        defined = sampled_R[np.isfinite(sampled_R)]
        if math.isnan(value) or not len(defined):
            estimates.append(UNDEFINED)
            continue
        estimates.append(Estimate(float(value), *map(float, np.quantile(defined, (0.025, 0.975)))))
    return estimates
