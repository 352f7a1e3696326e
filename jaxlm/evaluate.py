"""Evaluation: every example of a corpus exactly once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxlm.data.batches import Batches, prefetch
from jaxlm.data.corpus import Corpus
from jaxlm.tasks import Task


def evaluate(
    task: Task, eval_step: Callable[[Any, Any], Any], params: Any, batches: Batches, corpus: Corpus, put: Callable
) -> dict[str, float]:
    """The task's scores over all batches.  `put` lays a batch on the mesh.

    Sums and weights are added over batches in float64 and divided once, so that the size of a batch does not show.
    """
    totals: dict[str, list[float]] = {}
    for batch in prefetch(batches.batch_at, 0, len(batches)):
        for name, (value, weight) in jax.device_get(eval_step(params, put(batch, 1))).items():
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += float(value)
            total[1] += float(weight)
    means = {name: value / max(weight, 1.0) for name, (value, weight) in totals.items()}
    return task.score(means, {name: value for name, (value, _) in totals.items()}, corpus)
