"""The charts of a run, from the rows of its log."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.reports.metrics import (
    SCORE_FAMILIES,
    ScoreFamily,
    held_out_keys,
    parse_name,
    plain,
    points,
    rank,
    read_baselines,
    read_metrics,
)
from jaxlm.reports.pictures import COLORS, Chart, Picture, Series, draw

Baselines = Mapping[str, Mapping[str, float]]  # the scores of each baseline by its name


def curves(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Draws one PNG into `folder` for each quantity that has finite values.

    Args:
      rows: the rows of the log, as `read_metrics` returns them.
      folder: where the PNGs are written.

    Returns:
      The paths of the PNGs.
    """
    charts = charts_of_rows(rows)
    paths = png_paths(charts, Path(folder))
    for chart, path in zip(charts, paths):
        draw(chart, path)
    return paths


def charts_of_run(folder: Path) -> list[Chart]:
    """Returns the charts of the run in `folder`."""
    try:
        config = json.loads((folder / "config.json").read_text())["run"]
    except (OSError, ValueError, LookupError, TypeError):  # the folder has only a copy of the log
        config = {}
    return charts_of_rows(read_metrics(folder), config, read_baselines(folder))


def charts_of_rows(
    rows: list[dict[str, Any]], config: Mapping[str, Any] | None = None, baselines: Baselines | None = None
) -> list[Chart]:
    """Returns the charts of the results (loss, then each family of held-out metrics), then those of the machine.

    Args:
      rows: the rows of the log.
      config: the config of the run as JSON values. Its learning rate is the peak in the caption.
      baselines: the scores of each baseline by its name. The best one is a line in the chart of a single score.
    """
    families: dict[str, list[str]] = {"loss": ["loss"]}
    for key in held_out_keys(rows):
        name = key.removeprefix("eval/")
        members = families.setdefault(parse_name(name).family, [])
        members.extend([name] if name not in members else [])
    charts = []
    for family, names in families.items():
        charts += _results(rows, family, names, baselines or {})

    def training(key: str, label: str = "training", color: int = 0) -> tuple[Series]:
        return (Series(label, *points(rows, key), False, COLORS[color][0]),)

    percentiles = (("step_ms_p50", "median"), ("step_ms_p90", "90 % are faster"), ("step_ms_p99", "99 % are faster"))
    step_times = [training(key, label, n)[0] for n, (key, label) in enumerate(percentiles)]

    rate = training("learning_rate")
    configured = ((config or {}).get("optimizer") or {}).get("rate")
    peak = configured or rate[0].values.max(initial=0.0)
    power = math.floor(math.log10(peak)) if peak > 0 else 0
    unit = rf"learning rate ($\times 10^{{{power}}}$)"
    charts += [
        Chart(
            "learning_rate", "Learning rate", unit, rate, scale=10.0**-power, smooth=False, zero=True, peak=configured
        ),
        Chart("grad_norm", "Gradient norm", "global norm (log scale)", training("grad_norm"), log=True),
        Chart("tokens_per_second", "Throughput", "tokens per second", training("tokens_per_second"), zero=True),
        Chart(
            "mfu", "Model FLOPs utilisation", "share of the chips' peak (%)", training("mfu"), percent=True, zero=True
        ),
        Chart("step_ms", "Time of a step", "milliseconds (log scale)", tuple(step_times), smooth=False, log=True),
        Chart(
            "data_share", "Waiting for data", "share of the time (%)", training("data_share"), percent=True, zero=True
        ),
        *(
            Chart(key, title, "peak since the start (GB)", training(key), scale=1e-9, smooth=False, zero=True)
            for key, title in (
                ("memory_bytes", "Memory of a device"),
                ("process_memory_bytes", "Memory of the process, on its host"),
            )
        ),
    ]
    charts = [c._replace(series=tuple(map(_above_zero, c.series))) if c.log else c for c in charts]
    charts = [c._replace(series=tuple(series for series in c.series if len(series.values))) for c in charts]
    # A single evaluation is no curve. The table of evaluations shows it.
    charts = [c for c in charts if c.name == "loss" or any(len(series.values) > 1 for series in c.series)]
    last = max((series.steps[-1] for chart in charts for series in chart.series), default=1.0)
    return [chart._replace(last=max(last, 1.0)) for chart in charts if chart.series]


def _results(rows: list[dict[str, Any]], family: str, names: list[str], baselines: Baselines) -> list[Chart]:
    """Returns training and held-out curves of a family: one chart, or several if there are not enough colours."""
    metrics = [parse_name(name) for name in names]
    tasks, labels = (list(dict.fromkeys(parts)) for parts in zip(*((metric.task, metric.label) for metric in metrics)))
    style = family_style(family)
    title = chart_title(style.title or ", ".join(labels))
    title += f" ({plain(tasks[0])})" if tasks[0] and len(tasks) == 1 else ""
    has_training = any(name in row for row in rows for name in names)
    count = math.ceil(len(names) / len(COLORS))
    per_chart = math.ceil(len(names) / count)
    charts = []
    for number in range(count):
        series = []
        part = slice(number * per_chart, (number + 1) * per_chart)
        for metric, name, colors in zip(metrics[part], names[part], COLORS):
            parts = [metric.task] * (len(tasks) > 1) + [metric.qualifier]
            parts += [metric.label] * (len(labels) > 1 or not any(parts))
            what = [plain(" ".join(filter(None, parts)))] if len(names) > 1 else []
            for held_out, color in enumerate(colors):
                split = ["held-out" if held_out else "training"] if has_training or not what else []
                curve = points(rows, "eval/" * held_out + name)
                series.append(Series(", ".join(what + split), *curve, bool(held_out), color))
        suffix = f" ({number + 1} of {count})" if count > 1 else ""
        unit = style.unit + (", held-out" if len(names) > 1 and not has_training else "")
        chart_name = family + f"_{number + 1}" * (count > 1)
        line = _best_baseline(names[0], baselines) if len(names) == 1 else None
        charts.append(Chart(chart_name, title + suffix, unit, tuple(series), **chart_options(style), baseline=line))
    return charts


def _best_baseline(name: str, baselines: Baselines) -> tuple[str, float] | None:
    """Returns the name of the baseline with the best value of a score and this value; None if none has a value."""
    values = {baseline: scores.get(name) for baseline, scores in baselines.items()}
    finite = {key: value for key, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}
    return max(finite.items(), key=lambda item: rank(name, item[1]), default=None)


def family_style(family: str) -> ScoreFamily:
    """Returns how a family is drawn. An unknown metric is a family with its own name as the unit."""
    return SCORE_FAMILIES.get(family) or ScoreFamily("", plain(family), None)


def chart_options(style: ScoreFamily) -> dict[str, Any]:
    """Returns the fields of a `Chart` that follow from the family of its metrics."""
    return {"percent": style.percent, "better": style.better, "log": style.log}


def chart_title(name: str) -> str:
    """Returns a metric's name with spaces and a capital letter."""
    return plain(name)[:1].upper() + plain(name)[1:]


def _above_zero(series: Series) -> Series:
    """Drops what a log axis cannot show: the gradient of a frozen or finished model may be zero."""
    keep = series.values > 0
    return series._replace(steps=series.steps[keep], values=series.values[keep])


def png_paths(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """Returns a path of a PNG in `folder` for each picture; no two paths differ only in case."""
    paths: list[Path] = []
    for picture in pictures:
        name = picture.name if isinstance(picture, Chart) else picture.title
        stem = re.sub(r"[^\w-]+", "_", name.lower()).strip("_")[:60] or "picture"
        number = 1
        while (path := folder / (f"{stem}_{number}.png" if number > 1 else f"{stem}.png")) in paths:
            number += 1
        paths.append(path)
    return paths
