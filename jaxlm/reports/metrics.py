"""The log of a run: its rows, and the name, family and format of each metric."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlm.errors import RunError

BASELINE = "baseline.json"  # the scores of the baselines, of a run or of the verb `baseline`


class MetricKind(NamedTuple):
    """The kind of a metric, which is the last word of its name: `f1` in `ner/macro_f1`."""

    family: str  # metrics of one family share a chart
    label: str


class ScoreFamily(NamedTuple):
    """How the metrics of a family are drawn and formatted."""

    title: str  # if empty, the labels of the metrics
    unit: str
    better: Literal["high", "low"] | None
    percent: bool = False  # whether a fraction is shown in %
    log: bool = False


METRIC_KINDS = {
    "loss": MetricKind("loss", "loss"),
    "perplexity": MetricKind("perplexity", "perplexity"),
    "bits_per_byte": MetricKind("bits_per_byte", "bits per byte"),
    "accuracy": MetricKind("accuracy", "accuracy"),
    "f1": MetricKind("f1", "F1"),
    "precision": MetricKind("f1", "precision"),
    "recall": MetricKind("f1", "recall"),
    "exact": MetricKind("f1", "exact match"),
    "recall@": MetricKind("recall@", "recall@"),
    "mrr": MetricKind("mrr", "mean reciprocal rank"),
    "matthews": MetricKind("correlation", "Matthews"),
    "pearson": MetricKind("correlation", "Pearson"),
    "spearman": MetricKind("correlation", "Spearman"),
    "mse": MetricKind("mse", "mean squared error"),
    "bleu": MetricKind("translation", "BLEU"),
    "chrf": MetricKind("translation", "chrF"),
    "rouge1": MetricKind("rouge", "ROUGE-1"),
    "rouge2": MetricKind("rouge", "ROUGE-2"),
    "rougeL": MetricKind("rouge", "ROUGE-L"),
    "rougeLsum": MetricKind("rouge", "ROUGE-Lsum"),
}
SCORE_FAMILIES = {
    "loss": ScoreFamily("Loss", "loss (nats)", "low"),
    "part_loss": ScoreFamily("Parts of the loss", "loss (nats)", "low"),
    "perplexity": ScoreFamily("Perplexity", "perplexity (log scale)", "low", log=True),
    "bits_per_byte": ScoreFamily("Bits per byte", "bits per byte of text", "low"),
    "accuracy": ScoreFamily("Accuracy", "correct predictions (%)", "high", percent=True),
    "f1": ScoreFamily("", "score (%)", "high", percent=True),
    "recall@": ScoreFamily("Recall among the first k", "found among the first k (%)", "high", percent=True),
    "mrr": ScoreFamily("Mean reciprocal rank", "mean reciprocal rank (0 to 1)", "high"),
    "correlation": ScoreFamily("Correlation", "correlation (−1 to 1)", "high"),
    "mse": ScoreFamily("Mean squared error", "mean squared error (label units²)", "low"),
    "translation": ScoreFamily("", "score (0 to 100)", "high"),
    "rouge": ScoreFamily("ROUGE", "F1 of words (%)", "high", percent=True),
}


class Metric(NamedTuple):
    """The parts of a metric's name: `ner/macro_f1` has the task `ner`, the qualifier `macro` and the kind `f1`."""

    task: str
    qualifier: str
    label: str  # of its kind; for an unknown metric, the whole name
    family: str


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of `folder/metrics.jsonl` in file order, or an empty list if the file does not exist.

    An incomplete last line, which a killed process leaves behind, is ignored.

    Raises:
      RunError: if any other line is not JSON.
    """
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise RunError(f"{path}, line {number} is {line[:60]!r}, not JSON; remove that line") from error
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def read_baselines(folder: Path) -> dict[str, dict[str, float]]:
    """Returns the scores of each baseline in `folder/baseline.json` by its name; empty if there is no valid file."""
    try:
        baselines = json.loads((Path(folder) / BASELINE).read_text())
        return {baseline["name"]: dict(baseline["scores"]) for baseline in baselines}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def rank(name: str, value: float) -> float:
    """Returns the value of a score, negated if lower is better."""
    family = SCORE_FAMILIES.get(parse_name(name).family)
    return -value if family is not None and family.better == "low" else value


def held_out_keys(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the keys of all held-out metrics, such as `eval/loss`, in order of appearance."""
    return list(dict.fromkeys(key for row in rows for key in row if key.startswith("eval/")))


def points(rows: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps [n] in ascending order and the finite values [n] of `key`.

    If a step was logged twice, the later row counts.
    """
    values = {
        row["step"]: row[key] for row in rows if isinstance(row.get(key), int | float) and math.isfinite(row[key])
    }
    steps = sorted(values)
    return np.array(steps, float), np.array([values[step] for step in steps], float)


def parse_name(name: str) -> Metric:
    """Parses the name of a metric without `eval/`, such as `ner/macro_f1`, `masked_lm_loss` or `recall@5`."""
    task, _, last = name.rpartition("/")
    stem, at, _ = last.partition("@")
    qualifier, _, word = ("", "", stem) if stem in METRIC_KINDS else stem.rpartition("_")
    kind = METRIC_KINDS.get(word + at) or METRIC_KINDS.get(word)
    if kind is None:
        return Metric("", "", name, name)
    label = kind.label.removesuffix("@") + last[len(stem) :]
    return Metric(task, qualifier, label, "part_loss" if kind.family == "loss" and name != "loss" else kind.family)


def metric_label(name: str) -> str:
    """Returns the label of a metric for readers: `names/macro_f1` becomes `names macro F1`."""
    metric = parse_name(name)
    return plain(" ".join(filter(None, (metric.task, metric.qualifier, metric.label))))


def plain(name: str) -> str:
    """Returns a name with spaces in place of underscores and slashes."""
    return name.replace("_", " ").replace("/", " ").replace("masked lm", "masked LM")


def number(name: str, value: Any) -> str:
    """Formats a value of the metric `name` for the table of evaluations."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–" if value is None else str(value)
    family = SCORE_FAMILIES.get(parse_name(name).family)
    if family and family.percent:
        return f"{100 * value:.2f} %"
    if family and family.log:
        return f"{value:,.2f}"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2e}"


def format_score(name: str, value: float) -> str:
    """Formats a value of the metric `name` for a log line: a percentage, or four decimals."""
    text = number(name, value)
    return text if "%" in text else f"{value:.4f}"
