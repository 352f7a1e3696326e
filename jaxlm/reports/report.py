"""The page of a run: its curves, its evaluations and what its task adds, such as a confusion matrix.

`write` turns `metrics.jsonl` into PNGs in RUN/report/ and RUN/report.html. The page contains its pictures, loads
nothing from the network and runs no script, so it can be sent by mail as it is.

Notebooks and scripts use the functions of `jaxlm.reports.notebook` and `jaxlm.reports.live` from here too:

    with live("runs/mine"): jaxlm.fit(run)                 the loss while the run trains
    curve("runs/mine"), comparison({"a": "runs/a", ...})     a curve of one run, or of several runs
    confusion(labels, predictions), misclassified(...)     predictions of `jaxlm.predict` against the labels
    masked_text(tokenizer, before, after, predicted)       a text before and after masking, in colour
    attention(lm, source, target)                          the cross-attention of a translation
    mesh(sizes)                                            the devices of a mesh, and the part that each holds
    save(picture, "picture.png")                           any of them as a file
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.reports.charts import charts_of_rows, curves, png_paths
from jaxlm.reports.figures import Detail, Figure, Section, details_of, figure_of
from jaxlm.reports.live import live
from jaxlm.reports.metrics import (
    SCORE_FAMILIES,
    Metric,
    format_score,
    held_out_keys,
    metric_label,
    number,
    parse_name,
    points,
    read_baselines,
    read_metrics,
)
from jaxlm.reports.notebook import (
    attention,
    comparison,
    confusion,
    curve,
    hardware,
    masked_text,
    mesh,
    misclassified,
    save,
)
from jaxlm.reports.pictures import Bars, Chart, Heatmap, Histogram, best
from jaxlm.reports.rendering import render
from jaxlm.reports.tables import MAX_CELL_CHARACTERS, MaskedText, ScoredText, Table, mistakes
from jaxlm.storage import disk

__all__ = [
    "MAX_CELL_CHARACTERS",
    "Bars",
    "Chart",
    "Heatmap",
    "Histogram",
    "MaskedText",
    "Metric",
    "ScoredText",
    "Section",
    "Table",
    "attention",
    "comparison",
    "confusion",
    "curve",
    "curves",
    "format_score",
    "hardware",
    "live",
    "masked_text",
    "mesh",
    "metric_label",
    "misclassified",
    "mistakes",
    "read_metrics",
    "save",
    "write",
]

# Charts of how a run went, not of its results.
_MACHINE = {"learning_rate", "grad_norm", "tokens_per_second", "mfu", "step_ms", "data_share"}
_MACHINE |= {"memory_bytes", "process_memory_bytes"}


class Cell(NamedTuple):
    """A value in the table of evaluations."""

    text: str
    is_best: bool


class Evaluation(NamedTuple):
    """A row of the table of evaluations."""

    step: str
    cells: list[Cell]


class RunPage(NamedTuple):
    """The values of the template `page.html.j2`."""

    name: str
    facts: dict[str, str]
    results: list[Figure]
    machine: list[Figure]
    metrics: list[str]  # heads of the table of evaluations
    evaluations: list[Evaluation]
    has_best: bool
    details: list[Detail]
    sample: str | None
    config: str  # JSON


def write(
    folder: Path, config: dict[str, Any], facts: dict[str, str], sample: str | None, sections: Sequence[Section] = ()
) -> Path:
    """Writes `folder/report.html` and the PNGs in `folder/report/` from `folder/metrics.jsonl`.

    Args:
      folder: the folder of the run.
      config: the resolved config, as `config.to_json` returns it.
      facts: the key facts in order, such as `{"held-out bits per byte": "1.62"}`.
      sample: generated text, or None.
      sections: what the task adds in order, such as its confusion matrix.

    Returns:
      The path of the page.

    Raises:
      ValueError: if the names and the numbers of a section do not have the same length.
    """
    folder = Path(folder)
    rows = read_metrics(folder)
    charts = charts_of_rows(rows, config, read_baselines(folder))
    pictures = [*charts, *(section for section in sections if not isinstance(section, (Table, ScoredText)))]
    figures = [figure_of(picture, path) for picture, path in zip(pictures, png_paths(pictures, folder / "report"))]
    curves = {chart.name: figure for chart, figure in zip(charts, figures)}
    names = [key.removeprefix("eval/") for key in held_out_keys(rows)]
    evaluations = _evaluations(rows, names)
    page = RunPage(
        name=folder.resolve().name,
        facts=facts,
        results=[figure for name, figure in curves.items() if name not in _MACHINE],
        machine=[figure for name, figure in curves.items() if name in _MACHINE],
        metrics=["step", *map(metric_label, names)],
        evaluations=evaluations,
        has_best=any(cell.is_best for row in evaluations for cell in row.cells),
        details=details_of(sections, iter(figures[len(charts) :])),
        sample=sample,
        config=json.dumps(config, indent=2, ensure_ascii=False, default=str),
    )
    path = folder / "report.html"
    disk.write(path, render("page.html.j2", page=page))
    return path


def _evaluations(rows: list[dict[str, Any]], names: list[str]) -> list[Evaluation]:
    """Returns the held-out metrics by step, with the best value of each known metric marked."""
    by_step = {row["step"]: row for row in rows if any(key.startswith("eval/") for key in row)}
    best_values: dict[str, float | None] = {}
    for name in names:
        if family := SCORE_FAMILIES.get(parse_name(name).family):
            best_values[name] = best(family.better, points(list(by_step.values()), f"eval/{name}")[1])

    def cell(name: str, value: Any) -> Cell:
        return Cell(number(name, value), value is not None and best_values.get(name) == value)

    return [
        Evaluation(f"{step:,}", [cell(name, by_step[step].get(f"eval/{name}")) for name in names])
        for step in sorted(by_step)
    ]
