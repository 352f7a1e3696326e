"""Curves and tables of a run, as PNG and as one HTML page.

`write` is the whole of it: `metrics.jsonl` -> `curves` (PNGs in RUN/report/) -> RUN/report.html, which holds its
pictures inside, asks nothing of the network and runs no script, so that it can be mailed as it is.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.errors import RunError

# The pictures are drawn once, on white.  The page multiplies them onto light paper and inverts them onto dark.
_INK, _RULE = "#2b2b2b", "#d9d9d9"
_COLORS = (("#33658a", "#c1502e"), ("#4f7a5b", "#b8860b"), ("#6b7a8f", "#8e4a7c"))  # (training, held-out) of a metric
_FONT = "STIXGeneral"  # comes with matplotlib: the same picture on every machine


class Series(NamedTuple):
    """One metric over the steps: `steps` ascending, `values` finite."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    held_out: bool
    color: str


class Chart(NamedTuple):
    """What one picture shows."""

    name: str  # of the PNG
    title: str
    unit: str  # label of the vertical axis
    series: tuple[Series, ...]
    last: float = 1.0  # step at which the horizontal axis ends, the same in all pictures of a run
    scale: float = 1.0  # ticks and captions show the value times this
    log: bool = False
    smooth: bool = True  # whether training is noisy enough to need a smoothed line
    zero: bool = False  # whether the axis begins at zero


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `folder/metrics.jsonl`, in file order; none if there is no such file.

    A torn last line is what a killed process leaves and is ignored; RunError where any other line is broken.
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


def curves(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Draws one PNG into `folder` for each thing that was measured; a picture without a finite value is left out."""
    return [_draw(chart, Path(folder)) for chart in _charts(rows)]


def write(folder: Path, config: dict[str, Any], facts: dict[str, str], sample: str | None) -> Path:
    """Writes `folder/report.html` and the PNGs in `folder/report/` from `folder/metrics.jsonl`; returns the page.

    config: the resolved config, as `config.to_json` gives it.  facts: what a reader wants first, in order, such as
    `{"held-out bits per byte": "1.62"}`.  sample: generated text, or None.
    """
    folder = Path(folder)
    rows = read_metrics(folder)
    charts = _charts(rows)
    pictures = [_figure(chart, _draw(chart, folder / "report")) for chart in charts]
    page = _page(folder.resolve().name, facts, pictures, _evaluations(rows), sample, config)
    path, unfinished = folder / "report.html", folder / "report.html.tmp"
    unfinished.write_bytes(page.encode(errors="replace"))  # a byte-level model may generate half a character
    os.replace(unfinished, path)
    return path


# What is drawn


def _charts(rows: list[dict[str, Any]]) -> list[Chart]:
    """Results first (loss, then each family of held-out metrics), then how the run went."""
    families: dict[str, list[str]] = {"loss": ["loss"]}
    for key in _held_out_keys(rows):
        name = key.removeprefix("eval/")
        members = families.setdefault(_family(name), [])
        members.extend([name] if name not in members else [])
    charts = []
    for family, names in families.items():
        series = []
        for i, name in enumerate(names):
            which = "" if len(names) == 1 else f"{_words(name).removesuffix(' accuracy').removesuffix(' loss')}, "
            for held_out in (False, True):
                label = which + ("held-out" if held_out else "training")
                color = _COLORS[i % len(_COLORS)][held_out]
                series.append(Series(label, *_points(rows, "eval/" * held_out + name), held_out, color))
        title = {"loss": "Loss", "part_loss": "Parts of the loss"}.get(family, _title(family))
        units = {"loss": "loss (nats)", "part_loss": "loss (nats)", "accuracy": "correct predictions (%)"}
        units |= {"bits_per_byte": "bits per byte of text", "perplexity": "perplexity (log scale)"}
        scale, log = 100.0 if family == "accuracy" else 1.0, family == "perplexity"
        charts.append(Chart(family, title, units.get(family, _words(family)), tuple(series), scale=scale, log=log))

    def one(key: str) -> tuple[Series]:
        return (Series("training", *_points(rows, key), False, _COLORS[0][0]),)

    rate = one("learning_rate")
    peak = rate[0].values.max(initial=0.0)
    power = math.floor(math.log10(peak)) if peak > 0 else 0
    unit = rf"learning rate ($\times 10^{{{power}}}$)"
    charts += [
        Chart("learning_rate", "Learning rate", unit, rate, scale=10.0**-power, smooth=False, zero=True),
        Chart("grad_norm", "Gradient norm", "global norm (log scale)", one("grad_norm"), log=True),
        Chart("tokens_per_second", "Throughput", "tokens per second", one("tokens_per_second"), zero=True),
    ]
    charts = [c._replace(series=tuple(map(_above_zero, c.series))) if c.log else c for c in charts]
    charts = [c._replace(series=tuple(series for series in c.series if len(series.values))) for c in charts]
    # One evaluation makes no curve: the table has it.
    charts = [c for c in charts if c.name == "loss" or any(len(series.values) > 1 for series in c.series)]
    last = max((series.steps[-1] for chart in charts for series in chart.series), default=1.0)
    return [chart._replace(last=max(last, 1.0)) for chart in charts if chart.series]


def _above_zero(series: Series) -> Series:
    """What a log axis can show: the gradient of a frozen or finished model may be zero."""
    keep = series.values > 0
    return series._replace(steps=series.steps[keep], values=series.values[keep])


def _held_out_keys(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row if key.startswith("eval/")))


def _points(rows: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of `key`, ascending; of a step that was logged twice, the later line."""
    points = {
        row["step"]: row[key] for row in rows if isinstance(row.get(key), int | float) and math.isfinite(row[key])
    }
    steps = sorted(points)
    return np.array(steps, float), np.array([points[step] for step in steps], float)


def _family(name: str) -> str:
    """The picture that a metric belongs to: all accuracies share one, and all parts of the loss."""
    return "accuracy" if name.endswith("accuracy") else "part_loss" if name.endswith("_loss") else name


def _words(name: str) -> str:
    return name.replace("_", " ").replace("masked lm", "masked LM")


def _title(name: str) -> str:
    return _words(name)[:1].upper() + _words(name)[1:]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Moving mean over a twentieth of the curve, narrower at both ends.

    It is centred, so that it does not lag as a decaying mean does, but for the end, where what lies ahead is not there.
    """
    i = np.arange(len(values))
    before = np.minimum(len(values) // 40, i)
    after = np.minimum(before, i[::-1])
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[i + after + 1] - sums[i - before]) / (before + after + 1)


def _readable(values: Sequence[float]) -> list[str]:
    """The ticks of an axis in one unit and with the same decimals: `0 0.5 1.0`, `5,000 10,000`, `1.25 M 1.50 M`."""
    unit, sign = (1e6, " M") if max(map(abs, values)) >= 1e6 else (1, "")
    decimals = max(len(f"{value / unit:.9f}".rstrip("0").partition(".")[2]) for value in values)
    return [f"{value / unit:,.{decimals}f}{sign}" if value else "0" for value in values]


def _draw(chart: Chart, folder: Path) -> Path:
    """One picture, through matplotlib's objects: pyplot would keep global state and choose a backend."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    figure = Figure(figsize=(4.6, 3.1), dpi=240, facecolor="white", layout="constrained")  # 2 pixels per CSS pixel
    axes = figure.add_subplot(facecolor="none")
    for series in chart.series:
        few = "o" if len(series.values) < 40 else ""
        if series.held_out:
            style: dict[str, Any] = {
                "marker": few,
                "markersize": 4,
                "markeredgecolor": "white",
                "markeredgewidth": 0.6,
                "zorder": 3,
            }
            axes.plot(series.steps, series.values, color=series.color, linewidth=1.5, label=series.label, **style)
        elif chart.smooth and len(series.values) >= 40:
            smooth = np.exp(_smooth(np.log(series.values))) if chart.log else _smooth(series.values)
            axes.plot(series.steps, series.values, color=series.color, linewidth=0.6, alpha=0.35)
            axes.plot(series.steps, smooth, color=series.color, linewidth=1.5, label=series.label)
        else:
            marker = "o" if len(series.values) == 1 else ""
            axes.plot(series.steps, series.values, color=series.color, linewidth=1.5, marker=marker, label=series.label)

    if chart.log:
        values = np.concatenate([series.values for series in chart.series])
        axes.set_yscale("log")
        spread = values.max() / values.min()
        logarithmic = LogLocator(subs=(1, 2, 5) if spread < 1e3 else (1,), numticks=8)
        # Within a decade the round numbers of a log axis may be one or none.
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5) if spread < 10 else logarithmic)
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        axes.set_ylim(bottom=0 if chart.zero else None)
    axes.set_xlim(0, 1.02 * chart.last)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=True))
    for axis, scale in ((axes.xaxis, 1.0), (axes.yaxis, chart.scale)):

        def tick(value: float, _: int, axis=axis, scale=scale) -> str:
            beside = [] if axis is axes.yaxis and chart.log else axis.get_majorticklocs()
            return _readable([value * scale, *(other * scale for other in beside)])[0]

        axis.set_major_formatter(FuncFormatter(tick))

    text: dict[str, Any] = {"family": _FONT, "color": _INK}
    figure.suptitle(chart.title, x=0.008, ha="left", fontsize=14, fontweight="bold", **text)
    axes.set_xlabel("step (optimizer updates)", fontsize=11, **text)
    axes.set_ylabel(chart.unit, fontsize=11, math_fontfamily="stix", **text)
    axes.grid(axis="y", color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_INK)
    axes.tick_params(length=0, labelsize=11, labelcolor=_INK, labelfontfamily=_FONT)
    axes.tick_params(axis="x", length=3, color=_INK)
    if len(chart.series) > 1 or chart.series[0].held_out:
        above: dict[str, Any] = {
            "loc": "lower left",
            "bbox_to_anchor": (0, 1),
            "borderaxespad": 0.2,
            "ncols": 2,
            "frameon": False,
        }
        axes.legend(**above, prop={"family": _FONT, "size": 11}, labelcolor=_INK, handlelength=1.2, borderpad=0)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (re.sub(r"[^\w-]+", "_", chart.name) + ".png")
    figure.savefig(path, format="png")
    return path


# How the page is set


def _text(value: Any) -> str:
    """Escaped; control characters, which HTML forbids and a byte-level model may generate, become U+FFFD."""
    return escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", str(value).replace("\r\n", "\n")))


def _number(name: str, value: Any) -> str:
    """A cell of the table of evaluations."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–" if value is None else str(value)
    if name.endswith("accuracy"):
        return f"{100 * value:.2f} %"
    if name == "perplexity":
        return f"{value:,.2f}"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2e}"


def _figure(chart: Chart, png: Path) -> str:
    """The picture inside the page, with its last and best values in words."""
    data = base64.b64encode(png.read_bytes()).decode()
    alt = f"{chart.title} by step, up to step {chart.last:,.0f}"
    return (
        f'<figure><img src="data:image/png;base64,{data}" width="1104" height="744" alt="{_text(alt)}">\n'
        f"<figcaption>{_text(_caption(chart))}</figcaption></figure>"
    )


def _caption(chart: Chart) -> str:
    def number(value: float) -> str:
        return f"{100 * value:.1f} %" if chart.name == "accuracy" else _readable([float(f"{value:.4g}")])[0]

    first = chart.series[0].values
    if chart.name == "learning_rate":
        return f"peak {first.max():.3g}, last {first[-1]:.3g}".replace("e-0", "e-")
    if chart.name in ("tokens_per_second", "grad_norm"):
        return f"median {number(np.median(first))}"
    said = []
    for series in chart.series:
        if not series.held_out:
            if len(chart.series) <= 2:  # more would be a paragraph
                said.append(f"{series.label} {number(_smooth(series.values)[-1])}")
            continue
        text = f"{series.label} {number(series.values[-1])}"
        if (best := _best(chart.name, series.values)) is not None and len(series.values) > 1:
            at = series.steps[series.values == best][0]
            text += ", its best" if best == series.values[-1] else f" (best {number(best)} at step {at:,.0f})"
        said.append(text)
    return "; ".join(said)


def _best(family: str, values: np.ndarray) -> float | None:
    """The best value, of the metrics that are known to be better low or high."""
    if family in ("loss", "part_loss", "perplexity", "bits_per_byte"):
        return values.min()
    return values.max() if family == "accuracy" else None


def _table(head: Sequence[str], rows: list[list[str]]) -> str:
    """A table whose first column heads its rows; cells are HTML already."""
    lines = "\n".join(f'<tr><th scope="row">{row[0]}</th><td>{"</td><td>".join(row[1:])}</td></tr>' for row in rows)
    top = "".join(f'<th scope="col">{_text(name)}</th>' for name in head)
    return f"<table>{f'<thead><tr>{top}</tr></thead>' if head else ''}<tbody>\n{lines}\n</tbody></table>"


def _evaluations(rows: list[dict[str, Any]]) -> str:
    """The held-out metrics by step, the best of each known column set bold."""
    names = [key.removeprefix("eval/") for key in _held_out_keys(rows)]
    by_step = {row["step"]: row for row in rows if any(key.startswith("eval/") for key in row)}
    columns = {name: _points(list(by_step.values()), f"eval/{name}")[1] for name in names}
    best = {name: _best(_family(name), values) for name, values in columns.items() if len(values) > 1}

    def cell(name: str, value: Any) -> str:
        number = _text(_number(name, value))
        return f"<strong>{number}</strong>" if value is not None and best.get(name) == value else number

    body = [[f"{step:,}"] + [cell(n, by_step[step].get(f"eval/{n}")) for n in names] for step in sorted(by_step)]
    return _table(["step", *map(_words, names)], body) if body else ""


def _page(
    name: str, facts: dict[str, str], pictures: list[str], table: str, sample: str | None, config: dict[str, Any]
) -> str:
    sections = []
    if facts:
        summary = _table((), [[_text(key), _text(value)] for key, value in facts.items()])
        sections.append(f'<section class="facts" aria-label="Key facts">{summary}</section>')
    shown = "\n".join(pictures) or "<p>Nothing has been measured yet.</p>"
    sections.append(f'<section><h2>Curves</h2>\n<div class="grid">\n{shown}\n</div></section>')
    if table:
        region = (
            'class="scroll" role="region" aria-label="Evaluations by step" tabindex="0"'  # the keyboard can scroll it
        )
        note = '<p class="note">The best of each column is bold.</p>' if "<strong>" in table else ""
        sections.append(f"<section><h2>Held-out evaluations</h2>\n{note}\n<div {region}>{table}</div></section>")
    if sample:
        text = f'<pre class="sample" dir="auto">\n{_text(sample)}</pre>'  # HTML drops the first newline of a pre
        sections.append(f"<section><h2>Sample</h2>\n{text}</section>")
    values = _text(json.dumps(config, indent=2, ensure_ascii=False, default=str))
    sections.append(f"<details><summary>Resolved config</summary>\n<pre>\n{values}</pre></details>")
    body = "\n".join(sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(name)} – jaxlm run</title>
<style>{_STYLE}</style>
</head>
<body>
<header><p class="kicker">jaxlm run</p><h1>{_text(name)}</h1></header>
<main>
{body}
</main>
</body>
</html>
"""


_STYLE = """
:root { --paper: #fbfaf6; --ink: #26241f; --soft: #6a665c; --rule: #d8d4c8; --wash: #f3f1ea; --accent: #33658a; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #171819; --ink: #dedbd3; --soft: #a19d93; --rule: #3a3b3c; --wash: #1f2021; --accent: #8db9d8; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 72rem; padding: 3rem 2rem 4rem; background: var(--paper); color: var(--ink);
  font: 1.0625rem/1.5 "Iowan Old Style", "Palatino Linotype", Palatino, "Source Serif 4", Georgia, serif;
}
header { border-bottom: 2px solid var(--ink); padding-bottom: .75rem; }
.kicker { margin: 0; color: var(--soft); font-variant: all-small-caps; letter-spacing: .08em; font-size: 1.1rem; }
h1 { margin: 0; font-size: clamp(1.6rem, 5vw, 2.4rem); line-height: 1.15; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 .75rem; font-size: 1.3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums lining-nums; }
th, td { padding: .3rem 0 .3rem 1.75rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
th:first-child { padding-left: 0; }
thead th { color: var(--soft); font-weight: normal; font-style: italic; border-bottom: 1px solid var(--ink); }
tbody th { font-weight: normal; }
.facts { columns: 2; column-gap: 2.5rem; margin-top: 1.25rem; }
.facts table { width: 100%; table-layout: fixed; border-collapse: separate; border-spacing: 0; }
.facts tr { break-inside: avoid; }
.facts th, .facts td { padding: .3rem 0; white-space: normal; vertical-align: baseline; }
.facts th { text-align: left; color: var(--soft); }
.facts td { padding-left: 1.5rem; overflow-wrap: anywhere; }
.note { margin: -.5rem 0 .75rem; color: var(--soft); font-style: italic; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 2rem 2.5rem; }
figure { margin: 0; min-width: 0; }
img { display: block; width: 100%; height: auto; mix-blend-mode: multiply; }
figcaption { margin-top: .35rem; padding-left: .1rem; color: var(--soft); font-size: .95rem; font-style: italic; }
.scroll { max-height: 32rem; overflow: auto; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
.scroll thead th { position: sticky; top: 0; background: var(--paper); }
pre {
  margin: 0; padding: 1rem 1.25rem; background: var(--wash); border-left: 3px solid var(--rule);
  white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.55 ui-monospace, Menlo, Consolas, monospace;
}
.sample { border-left-color: var(--accent); font: inherit; }
details { margin-top: 3rem; }
summary { cursor: pointer; color: var(--accent); margin-bottom: .75rem; }
@media (max-width: 40rem) {
  body { padding: 1.5rem 1rem 3rem; font-size: 1rem; }
  .facts { columns: 1; }
  th, td { padding-left: 1.1rem; }
  .grid { gap: 1.75rem; }
}
@media (prefers-color-scheme: dark) { img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; } }
@media print { .scroll { max-height: none; } figure, tr { break-inside: avoid; } }
"""
