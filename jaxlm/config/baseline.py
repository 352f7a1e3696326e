"""The config of the baselines that a report shows next to the scores of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from jaxlm.config.ranges import Config, Count, Range

MAX_ORDER = 10  # of an n-gram model

Order = Annotated[int, Range(1, MAX_ORDER)]


@dataclass(frozen=True)
class BaselineConfig(Config):
    """Baselines of the report: an n-gram model for causal language modelling, majority and TF-IDF for labels."""

    order: Order = 5  # order of the n-gram model, in tokens
    tokens: Count = 10_000_000  # first training tokens that the n-gram model counts; 0: no n-gram model
    # If there are more, the examples are evenly spaced. Without TF-IDF, baselines only count labels.
    examples: Count = 100_000  # maximum number of training examples for TF-IDF; 0: no TF-IDF
