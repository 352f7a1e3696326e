"""The chapter about training examples behind a prediction."""

from __future__ import annotations

from typing import Any

from jaxlm.config import Classification
from jaxlm.errors import UserError
from jaxlm.explain.examples import head_of
from jaxlm.explain.nearest import influential_examples, nearest_examples
from jaxlm.explain.request import Request, Result
from jaxlm.reports.pages import Chapter
from jaxlm.reports.tables import Table
from jaxlm.run.trained_model import task_for

_TEXT = (
    "The nearest examples have the embeddings with the largest cosine similarity. Influence is the increase of the "
    "loss of the prediction, to first order, if the last layer was trained without the example (Koh & Liang 2017): "
    "helpful examples have a positive, harmful ones a negative influence. The lower layers do not count."
)


def _columns(request: Request) -> tuple[tuple[str, ...], str]:
    """Returns the columns of the texts and of the label."""
    task = task_for(request.lm, request.task) if head_of(request.lm) == "classes" else Classification()
    if not isinstance(task, Classification):
        raise UserError(f"the task of the model is {type(task).__name__}; nearest examples require texts with labels")
    return task.text, task.label


def check(request: Request) -> None:
    """Raises UserError without training examples that have the columns of the task."""
    if request.training is None:
        raise UserError("nearest requires the training examples; give their file with --training FILE")
    if not isinstance(request.text, str):
        raise UserError("the text has several parts; the nearest examples require one string")
    texts, label = _columns(request)
    if not request.training:
        raise UserError("the file with the training examples has no rows; give at least one")
    needed = {texts[0]} | ({label} if head_of(request.lm) == "classes" else set())
    for n, row in enumerate(request.training, 1):
        missing = next((name for name in needed if row.get(name) is None), None)
        if missing is not None:
            raise UserError(f"row {n} of the training examples has no column {missing!r}; it has {', '.join(row)}")


def run(request: Request) -> Result:
    """Returns a table of the nearest examples and, for classifiers, tables of the influential ones."""
    assert request.training is not None
    (column, *_), label = _columns(request)
    rows = [str(row[column]) for row in request.training]
    found: dict[str, tuple[Any, Any]] = {}
    if request.lm.config.structure != "decoder" or request.lm.pooling is not None:
        near = nearest_examples(request.lm, request.text, rows)
        found["Nearest examples"] = near, near.nearest
    if head_of(request.lm) == "classes":
        pairs = [(text, str(row[label])) for text, row in zip(rows, request.training)]
        influence = influential_examples(request.lm, request.text, pairs, request.target)
        found["Helpful examples"] = influence, influence.nearest
        found["Harmful examples"] = influence, influence.farthest
    names = [str(row.get(label, "")) for row in request.training]
    tables = [_table(title, rows, names, some.scores, order) for title, (some, order) in found.items()]
    numbers = {
        title: [{"row": int(n), "score": float(some.scores[n])} for n in order]
        for title, (some, order) in found.items()
    }
    lines = [f"nearest    {title.lower()}: rows {', '.join(str(n + 1) for n in o)}" for title, (_, o) in found.items()]
    return Result([Chapter("Training examples", [_TEXT], tables)], numbers, lines)


def _table(title: str, texts: list[str], labels: list[str], scores: Any, order: Any) -> Table:
    rows = [[str(n + 1), f"{scores[n]:.4g}", labels[n], texts[n]] for n in order]
    return Table(title, ("row", "score", "label", "text"), rows, "The number of the row is that in the file, from 1.")
