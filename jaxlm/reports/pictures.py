"""The plots of a report: curves, confusion matrices, bars, histograms, attention and meshes.

Each plot is one PNG with a caption. All plots have the same width and font and few colours, on a white background,
which the page blends with its own and inverts in dark mode. A notebook shows a plot that is the last value of a cell,
with the caption inside. The plots use matplotlib's objects, because pyplot keeps global state and chooses a backend.
"""

from __future__ import annotations

import functools
import io
import math
import textwrap
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlm.storage import disk

_INK, _SOFT, _RULE = "#2b2b2b", "#8a8a8a", "#d9d9d9"
COLORS = (("#33658a", "#c1502e"), ("#4f7a5b", "#b8860b"), ("#6b7a8f", "#8e4a7c"), ("#a08060", "#2f8f83"))
"""(training, held-out) colours of each metric of a chart."""
_BLUE, _RUST = COLORS[0]
_FONT = "STIXGeneral"  # part of matplotlib, so plots look the same on every machine
_WIDTH = 4.6  # inches
_MAX_CLASSES, _MAX_BARS = 20, 30
_MAX_TOKENS, _MIN_CELL = 40, 0.085  # an attention map of more tokens is wider than other plots, with cells in inches
_DPI = 240  # 2 pixels per CSS pixel
_lock = threading.Lock()  # a live curve and the report of the same run may be drawn at the same time


Bundle = tuple[dict[str, Any], dict[str, Any]]  # data and metadata by MIME type, as notebooks expect them


def _add_notebook_output(picture: Any) -> Any:
    """Class decorator: notebooks show the picture, plain text shows its title."""
    # A NamedTuple cannot inherit these methods from another class.
    picture._repr_mimebundle_ = lambda self, **_: notebook_bundle(self)
    picture._repr_pretty_ = lambda self, printer, _: printer.text(self.title)
    return picture


class Series(NamedTuple):
    """One metric over the steps [n], which ascend. The values [n] are finite."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    held_out: bool
    color: str


@_add_notebook_output
class Chart(NamedTuple):
    """Curves that share their axes."""

    name: str  # file name of the PNG
    title: str
    unit: str  # label of the vertical axis
    series: tuple[Series, ...]
    last: float = 1.0  # last step of the horizontal axis, the same in all charts of a run
    scale: float = 1.0  # factor of the values in ticks
    percent: bool = False  # whether the values are fractions that are shown in %
    better: Literal["high", "low"] | None = None
    log: bool = False
    smooth: bool = True  # whether a smoothed line is added to the training curve
    zero: bool = False  # whether the vertical axis starts at zero
    peak: float | None = None  # the configured learning rate, which may not be the rate of any logged step
    baseline: tuple[str, float] | None = None  # the name and the value of the best baseline, drawn as a line


@_add_notebook_output
class Heatmap(NamedTuple):
    """A confusion matrix. Of more than 20 classes, the 20 with the most examples are drawn and the rest is merged."""

    title: str
    counts: np.ndarray  # [n, n], row: true class, column: predicted class
    names: tuple[str, ...]


@_add_notebook_output
class Bars(NamedTuple):
    """Horizontal bars, such as F1 by type. An axis with the unit `%` ends at 100. NaN means that there is no value.

    A line through the end of a bar marks its interval. A vertical line marks the reference, such as chance.
    """

    title: str
    names: tuple[str, ...]
    values: tuple[float, ...]
    unit: str
    intervals: tuple[tuple[float, float], ...] = ()  # (low, high) of each value; empty: none
    reference: float | None = None


@_add_notebook_output
class Histogram(NamedTuple):
    """A histogram, such as tokens per example. A line marks the limit, such as the length of a row."""

    title: str
    values: np.ndarray  # [n]
    unit: str
    limit: float | None


@_add_notebook_output
class AttentionMap(NamedTuple):
    """Attention weights from each written token to each token that is read."""

    title: str
    weights_TS: np.ndarray  # rows sum to 1
    written: tuple[str, ...]  # T pieces
    read: tuple[str, ...]  # S pieces
    sides: tuple[str, str] = ("tokens that are written", "tokens that are read")  # labels of the rows and columns


@_add_notebook_output
class HeadGrid(NamedTuple):
    """A small map of the attention weights of every layer and head."""

    title: str
    weights_LHTS: np.ndarray  # rows sum to 1
    layers: tuple[int, ...]  # L numbers


@_add_notebook_output
class ValueMap(NamedTuple):
    """A value for each pair of a row and a column, such as a layer and a token. Blue is positive, red negative."""

    title: str
    values: np.ndarray  # [n, m]
    rows: tuple[str, ...]  # n names
    columns: tuple[str, ...]  # m names
    sides: tuple[str, str]  # labels of the rows and of the columns
    unit: str  # what a value is, for the caption
    words: list[tuple[str, ...]] | None = None  # text of the cells [n][m]; None: no text


@_add_notebook_output
class DeviceMesh(NamedTuple):
    """The devices of a mesh, the part of a weight that each holds, and its rows of a batch."""

    title: str
    grid: tuple[int, int]  # devices down and across
    sides: tuple[str, str]  # labels of the mesh axes down and across
    parts: tuple[tuple[slice, slice], ...]  # of the weight, for each device
    shape: tuple[int, int]  # of the weight
    axes: tuple[str, str]  # labels of the weight's axes
    rows: tuple[slice, ...]  # of the batch, for each device


Picture = Chart | Heatmap | Bars | Histogram | AttentionMap | HeadGrid | ValueMap | DeviceMesh


def draw(picture: Picture, path: Path) -> str | None:
    """Draws a picture as a PNG.

    Args:
      picture: what is drawn.
      path: the file. Its folder is created.

    Returns:
      The caption, or None if there is nothing to draw; then no file is written.

    Raises:
      ValueError: if the names and the numbers of the picture do not have the same length.
    """
    png, caption = _png(picture, captioned=False)
    if caption is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write(path, png)
    return caption


def notebook_bundle(picture: Picture) -> Bundle:
    """Returns the picture for a notebook, with the caption inside, or empty dicts if there is nothing to show."""
    png, caption = _png(picture, captioned=True)
    if caption is None:
        return {}, {}
    width = int.from_bytes(png[16:20], "big") // 2
    return {"image/png": png}, {"image/png": {"width": width, "alt": f"{picture.title}: {caption}"}}


def _png(picture: Picture, captioned: bool) -> tuple[bytes, str | None]:
    """Returns the PNG, with the caption inside if `captioned`, and the caption, or None if there is nothing to draw."""
    from matplotlib.figure import Figure

    # `Any`, since each function accepts only the class that it is listed with.
    draw_functions: dict[type, Callable[[Any, Any], str | None]] = {
        Chart: _chart,
        Heatmap: _heatmap,
        Bars: _bars,
        Histogram: _histogram,
        AttentionMap: _attention,
        HeadGrid: _head_grid,
        ValueMap: _value_map,
        DeviceMesh: _device_mesh,
    }
    with _lock:
        figure = Figure(figsize=(_WIDTH, 3.1), dpi=_DPI, facecolor="white", layout="constrained")
        caption = draw_functions[type(picture)](figure, picture)
        if caption is None:
            return b"", None
        # The title is bold, so a line has space for fewer characters than one of the caption.
        lines = textwrap.wrap(_drawable(picture.title), 52, max_lines=3, placeholder=" …")
        bold: dict[str, Any] = {"fontsize": 14, "fontweight": "bold", "parse_math": False}
        figure.suptitle("\n".join(lines), x=0.008, ha="left", **_text(), **bold)
        if captioned:
            below = textwrap.wrap(_drawable(caption), 82)
            width, height = figure.get_size_inches()
            figure.set_size_inches(width, height + 0.1 + 0.16 * len(below))
            plain: dict[str, Any] = {"fontsize": 10, "family": _FONT, "color": "#5c5c5c", "parse_math": False}
            figure.supxlabel("\n".join(below), x=0.008, ha="left", **plain)
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue(), caption


# Curves


def smooth(values: np.ndarray) -> np.ndarray:
    """Returns the centred moving mean [n] of the values [n], over a twentieth of the curve.

    The window is narrower at both ends, so the first and the last value do not change. Unlike an exponential moving
    average, the mean does not lag.
    """
    i = np.arange(len(values))
    reach = np.minimum(len(values) // 40, np.minimum(i, i[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means = (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)
    return np.where(reach, means, values)  # differences of large sums are not exact


def best(better: Literal["high", "low"] | None, values: np.ndarray) -> float | None:
    """Returns the best of the values [n], or None if all are equal or `better` is None."""
    if not better or len(values) < 2 or values.min() == values.max():
        return None
    return values.max() if better == "high" else values.min()


def readable(values: Sequence[float]) -> list[str]:
    """Formats ticks in one unit with the same decimals: `0 0.5 1.0`, `5,000 10,000`, `1.25 M 1.50 M`."""
    unit, suffix = (1e6, " M") if max(map(abs, values)) >= 1e6 else (1, "")
    decimals = max(len(f"{value / unit:.9f}".rstrip("0").partition(".")[2]) for value in values)
    return [f"{value / unit:,.{decimals}f}{suffix}" if value else "0" for value in values]


def _chart(figure: Any, chart: Chart) -> str | None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    if not any(len(series.values) for series in chart.series):
        return None
    axes = figure.add_subplot(facecolor="none")
    for series in chart.series:
        label = _cut(_drawable(series.label), 24)  # the legend has two columns
        few = "o" if len(series.values) < 40 else ""
        if series.held_out:
            style: dict[str, Any] = {
                "marker": few,
                "markersize": 4,
                "markeredgecolor": "white",
                "markeredgewidth": 0.6,
                "zorder": 3,
            }
            axes.plot(series.steps, series.values, color=series.color, linewidth=1.5, label=label, **style)
        elif chart.smooth and len(series.values) >= 40:
            line = np.exp(smooth(np.log(series.values))) if chart.log else smooth(series.values)
            axes.plot(series.steps, series.values, color=series.color, linewidth=0.6, alpha=0.35)
            axes.plot(series.steps, line, color=series.color, linewidth=1.5, label=label)
        else:
            marker = "o" if len(series.values) == 1 else ""
            axes.plot(series.steps, series.values, color=series.color, linewidth=1.5, marker=marker, label=label)

    if chart.baseline:
        label, value = chart.baseline
        axes.axhline(value, color=_SOFT, linewidth=1.2, linestyle=(0, (4, 3)), label=_cut(_drawable(label), 24))
    if chart.log:
        values = np.concatenate([series.values for series in chart.series])
        axes.set_yscale("log")
        spread = values.max() / values.min()
        logarithmic = LogLocator(subs=(1, 2, 5) if spread < 1e3 else (1,), numticks=8)
        # Within a decade, a log axis may have only one round number, or none.
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5) if spread < 10 else logarithmic)
        axes.yaxis.set_minor_locator(NullLocator())
        _ticks(axes.yaxis, own_decimals=True)
    else:
        _round_ticks(axes.yaxis, 100.0 if chart.percent else chart.scale)
        axes.set_ylim(bottom=0 if chart.zero else None)
    axes.set_xlim(0, 1.02 * chart.last)
    _round_ticks(axes.xaxis, integer=True)
    _frame(axes, "step (optimizer updates)", chart.unit, grid="y")
    if len(chart.series) > 1 or chart.series[0].held_out or chart.baseline:
        _legend(axes)
    return _chart_caption(chart)


def _chart_caption(chart: Chart) -> str:
    """Returns the last and the best value of each curve."""

    def number(value: float) -> str:
        return f"{100 * value:.1f} %" if chart.percent else readable([float(f"{value:.4g}")])[0]

    first = chart.series[0].values
    if chart.name == "learning_rate":
        peak = first.max() if chart.peak is None else chart.peak
        return f"peak {peak:.3g}, last {first[-1]:.3g}".replace("e-0", "e-")
    if chart.name in ("tokens_per_second", "grad_norm", "mfu", "data_share"):
        return f"median {number(np.median(first))}"
    if chart.name == "step_ms":
        return f"median {number(np.median(first))} ms"
    if chart.name.endswith("memory_bytes"):
        return f"{chart.scale * first.max():.3g} GB"
    parts = []
    for series in chart.series:
        if not series.held_out:
            if len(chart.series) <= 2:  # otherwise the caption would be too long
                parts.append(f"{series.label} {number(series.values[-1])}")
            continue
        text = f"{series.label} {number(series.values[-1])}"
        if (top := best(chart.better, series.values)) is not None:
            at = series.steps[series.values == top][0]
            text += ", its best" if top == series.values[-1] else f" (best {number(top)} at step {at:,.0f})"
        parts.append(text)
    if chart.baseline:
        parts.append(f"baseline {chart.baseline[0]} {number(chart.baseline[1])}")
    return "; ".join(parts)


# A confusion matrix


def _heatmap(figure: Any, picture: Heatmap) -> str | None:
    counts, n = np.asarray(picture.counts), len(picture.names)
    if counts.shape != (n, n):
        raise ValueError(f"{picture.title!r} has {n} names and counts of shape {list(counts.shape)}; give [{n}, {n}]")
    total = counts.sum()
    if not total:
        return None
    sentences = [
        f"{100 * np.trace(counts) / total:.1f} % of {total:,} are correct.",
        _most_frequent_mistake(counts, picture.names),
        "A darker cell is a larger share of its row; blue cells are correct.",
    ]
    largest = np.sort(np.argsort(-counts.sum(1), kind="stable")[:_MAX_CLASSES])
    labels, meanings = _labels(picture.names, largest, max_length=24)
    if n > len(largest):
        counts = _merge_classes(counts, largest)
        labels.append(f"other ({n - len(largest):,})")
        sentences += [
            f"The {len(largest)} classes with the most examples are shown, and the {n - len(largest):,} others are "
            "merged; the grey cell has both correct and wrong predictions."
        ]
    sentences += [meanings]

    size = 11 if len(labels) <= 6 else 9.5 if len(labels) <= 12 else 8
    label_width = _inches(labels, size)
    cell = (_WIDTH - label_width - 0.45) / len(labels)
    vertical = label_width + 0.08 > cell
    height = min(max(cell, 0.18), 0.5)
    figure.set_size_inches(_WIDTH, height * len(labels) + 0.8 + (label_width if vertical else 0.2))
    axes = figure.add_subplot(facecolor="none")
    depth = (counts / np.maximum(counts.sum(1, keepdims=True), 1)) ** 0.6  # makes small shares visible
    axes.imshow(_shades(depth, merged=n > len(largest)), aspect="auto", interpolation="nearest")
    edges = np.arange(len(labels) + 1) - 0.5
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    if len(labels) <= 12:
        for (row, column), count in np.ndenumerate(counts):
            text = f"{count:,}" if _inches([f"{count:,}"], size) < cell - 0.06 else _short(count)
            # On a cell darker than this, white text has more contrast than dark text.
            color = "white" if depth[row, column] > 0.75 else _INK if count else _SOFT
            font_size = size * min(1, (cell - 0.04) / _inches([text], size))
            axes.text(column, row, text, ha="center", va="center", fontsize=font_size, family=_FONT, color=color)
    _frame(axes, "predicted class", "true class")
    rotation: dict[str, Any] = {"rotation": 90} if vertical else {}
    axes.set_xticks(range(len(labels)), labels, parse_math=False, **rotation)
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    axes.grid(which="minor", color=_RULE, linewidth=0.6)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(which="both", length=0)
    axes.tick_params(labelsize=size, pad=2)
    return " ".join(filter(None, sentences))


def _merge_classes(counts: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Merges all classes of counts [n, n] but `kept` [k] into one more class: [k + 1, k + 1]."""
    group = np.full(len(counts), len(kept))
    group[kept] = np.arange(len(kept))
    merged = np.zeros((len(kept) + 1, len(kept) + 1), counts.dtype)
    np.add.at(merged, (group[:, None], group[None, :]), counts)
    return merged


def _shades(depth: np.ndarray, merged: bool) -> np.ndarray:
    """Returns depths from 0 to 1 [n, n] as colours [n, n, 3]: blue on the diagonal, rust elsewhere.

    If the last class is `merged` from several, its diagonal cell is grey: it has correct and wrong predictions.
    """
    from matplotlib.colors import to_rgb

    full = np.where(np.eye(len(depth), dtype=bool)[..., None], to_rgb(_BLUE), to_rgb(_RUST))
    if merged:
        full[-1, -1] = to_rgb(_SOFT)
    return 1 + depth[..., None] * (full - 1)


def _most_frequent_mistake(counts: np.ndarray, names: Sequence[str]) -> str:
    wrong = counts - np.diag(np.diag(counts))
    true, predicted = np.unravel_index(wrong.argmax(), wrong.shape)
    if not (count := wrong[true, predicted]):
        return ""
    total = counts[true].sum()
    return (
        f"The most frequent mistake: {_quoted(names[true])} predicted as {_quoted(names[predicted])}, "
        f"{count:,} of {total:,} ({100 * count / total:.1f} %)."
    )


def _short(count: float) -> str:
    """Formats a count for a narrow cell: 12,345 becomes `12k`."""
    for power, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= power:
            return f"{count / power:.{1 if count < 10 * power else 0}f}{suffix}"
    return f"{count:.3g}"


# Bars


def _bars(figure: Any, picture: Bars) -> str | None:
    values = np.asarray(picture.values, float)
    if len(values) != len(picture.names):
        raise ValueError(
            f"{picture.title!r} has {len(picture.names)} names and {len(values)} values; give one value for each name"
        )
    ends_N2 = np.asarray(picture.intervals or np.stack([values, values], 1), float)
    if ends_N2.shape != (len(values), 2):
        raise ValueError(f"{picture.title!r} has {len(values)} values and intervals {ends_N2.shape}; give one for each")
    finite = np.isfinite(values)
    if not finite.any():
        return None
    number = _numbers(values[finite])
    if len(values) <= 3:
        pairs = zip(picture.names, values)
        sentences = ["; ".join(f"{_quoted(name)} {number(v)}" for name, v in pairs if np.isfinite(v)) + "."]
    else:
        extremes = {"highest": np.nanargmax(values), "lowest": np.nanargmin(values)}
        ends = (f"{end} {number(values[i])} ({_quoted(picture.names[i])})" for end, i in extremes.items())
        sentences = [f"Mean {number(values[finite].mean())}; {', '.join(ends)}."]
    visible = np.arange(len(values))[:_MAX_BARS]
    if len(values) > len(visible):
        sentences += [f"The first {len(visible)} of {len(values):,} are shown."]
    if not finite[visible].all():
        sentences += ["–: no value."]
    labels, meanings = _labels(picture.names, visible, max_length=28)
    values, ends_N2 = values[visible], np.nan_to_num(ends_N2[visible])
    sentences += ["Lines show the intervals of 95 %."] if picture.intervals else []

    size = 11 if len(labels) <= 12 else 9.5
    figure.set_size_inches(_WIDTH, 1.05 + max(len(labels), 2) * (0.28 if len(labels) <= 12 else 0.2))
    axes = figure.add_subplot(facecolor="none")
    drawn = np.where(np.isfinite(values), values, 0.0)
    axes.barh(range(len(labels)), drawn, height=0.62, color=_BLUE)
    low, high = min(drawn.min(), ends_N2.min(), 0.0), max(drawn.max(), ends_N2.max(), 0.0)
    high = max(high, 100.0) if "%" in picture.unit else high if high > low else 1.0
    numbers = [number(value) if np.isfinite(value) else "–" for value in values]
    share = _inches(numbers, size) / (_WIDTH - _inches(labels, size) - 0.2) + 0.03  # of the axis, for the numbers
    margin = (high - low) * share / (1 - share * (2 if low < 0 else 1))
    axes.set_xlim(low - margin * (low < 0), high + margin)
    for at, (value, text) in enumerate(zip(values, numbers)):
        left = value < 0
        place: dict[str, Any] = {"ha": "right" if left else "left", "va": "center", "textcoords": "offset points"}
        end = min(drawn[at], ends_N2[at, 0]) if left else max(drawn[at], ends_N2[at, 1])
        axes.annotate(text, (end, at), (-3 if left else 3, 0), fontsize=size, **place, **_text())
    if picture.intervals:
        axes.hlines(range(len(labels)), ends_N2[:, 0], ends_N2[:, 1], color=_INK, linewidth=1.4)
    if picture.reference is not None:
        axes.axvline(picture.reference, color=_RUST, linewidth=1, linestyle=(0, (4, 3)))
    _round_ticks(axes.xaxis)
    _frame(axes, picture.unit, "", grid="x")
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    axes.set_ylim(max(len(labels), 2) - 0.5, -0.5)  # the first bar is at the top; a single bar is not thicker than two
    axes.tick_params(axis="y", labelsize=size)
    return " ".join(filter(None, [*sentences, meanings]))


# A histogram


def _histogram(figure: Any, picture: Histogram) -> str | None:
    values = np.asarray(picture.values, float).ravel()
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    whole = bool((values == np.round(values)).all())
    number = _numbers(values)
    limit = picture.limit
    sentences = [
        f"{len(values):,} values: median {number(np.median(values))}, minimum {number(values.min())}, "
        f"maximum {number(values.max())}."
    ]
    if limit is not None:
        above = int((values > limit).sum())
        share = f"{above:,} ({100 * above / len(values):.2g} %)" if above else "none"
        sentences += [f"Above the limit of {number(limit)}: {share}."]

    low, high = values.min(), values.max()
    low = 0.0 if 0 <= low <= high / 2 else low
    # A few outliers would squeeze all other values into one bar.
    reach = np.quantile(values, 0.99)
    if high - low > 2 * (reach - low) > 0:
        high = low + 1.25 * (reach - low)
        high = math.floor(high) if whole else high
        sentences += [f"The {int((values > high).sum()):,} above {number(high)} are not drawn."]
    line = None  # where the limit is drawn: values that equal it are below the line
    if limit is not None and low <= limit <= 3 * high:
        line = math.floor(limit) + 0.5 if whole else limit
        high = max(high, limit)
    elif limit is not None:
        sentences += ["The limit is outside the picture."]

    edges = _edges(low, high, line) if whole else np.linspace(low, high, 41)
    if high == low:
        edges = np.array([low - 0.5, low + 0.5])
    counts, _ = np.histogram(values, edges)
    axes = figure.add_subplot(facecolor="none")
    border: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.4}
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=_BLUE, **border)
    if limit is not None and line is not None:
        dashed: dict[str, Any] = {"linewidth": 1.5, "linestyle": (0, (4, 2))}
        axes.axvline(line, color=_RUST, label=f"limit {number(limit)}", **dashed)
        _legend(axes)
    start, end = max(edges[0], low - 0.5), edges[-1]
    axes.set_xlim(start - 0.01 * (end - start), end + 0.01 * (end - start))
    _round_ticks(axes.xaxis, integer=whole)
    _round_ticks(axes.yaxis, integer=True)
    _frame(axes, picture.unit, "count", grid="y")
    return " ".join(sentences)


def _edges(low: float, high: float, line: float | None) -> np.ndarray:
    """Returns the edges of at most 41 bars of equal integer width from `low` to `high`, with an edge at `line`."""
    width = math.ceil((math.floor(high) - low + 1) / 40)
    start = low - 0.5
    if line is not None:
        start = line - math.ceil((line - start) / width) * width
    return np.arange(start, math.floor(high) + width + 0.5, width)


# Attention


def _attention(figure: Any, picture: AttentionMap) -> str | None:
    weights_TS = np.asarray(picture.weights_TS, float)
    sizes = (len(picture.written), len(picture.read))
    if weights_TS.shape != sizes:
        raise ValueError(
            f"{picture.title!r} has {sizes[0]} written and {sizes[1]} read tokens and weights of shape "
            f"{list(weights_TS.shape)}; give {list(sizes)}"
        )
    if not weights_TS.size:
        return None
    is_large = max(sizes) > _MAX_TOKENS
    size = 11 if max(sizes) <= 14 else 9 if max(sizes) <= 26 else 7
    written, read = ([_drawable(_cut(name, 16)) or "?" for name in names] for names in (picture.written, picture.read))
    row_label, column_label = _inches(written, size), _inches(read, size)
    cell = (_WIDTH - row_label - 0.5) / sizes[1]
    cell = min(max(cell, _MIN_CELL if is_large else 0), 0.36)  # each label needs the height of its font
    width = max(_WIDTH, row_label + 0.5 + cell * sizes[1])
    figure.set_size_inches(width, cell * sizes[0] + column_label + 0.95)
    axes = figure.add_subplot(facecolor="none")
    depth_TS = np.clip(weights_TS, 0, 1)
    depth_TS = np.sqrt(depth_TS / (depth_TS.max() or 1)) if is_large else depth_TS
    axes.imshow(_tint(depth_TS), aspect="auto", interpolation="nearest")
    axes.set_xticks(np.arange(sizes[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(sizes[0] + 1) - 0.5, minor=True)
    _frame(axes, *picture.sides[::-1])
    axes.set_xticks(range(sizes[1]), read, parse_math=False, rotation=90)
    axes.set_yticks(range(sizes[0]), written, parse_math=False)
    axes.grid(which="minor", color=_RULE, linewidth=0.1 if is_large else 0.5)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(which="both", length=0)
    axes.tick_params(labelsize=size, pad=2)
    darkest = "the largest weight, on a scale of square roots" if is_large else "100 %"
    t, s = np.unravel_index(weights_TS.argmax(), sizes)
    return (
        f"Each row sums to 100 %; white is 0 %, the darkest blue {darkest}. "
        f"The largest weight: {_quoted(picture.written[t])} attends to {_quoted(picture.read[s])}, "
        f"{weights_TS[t, s]:.0%}."
    )


def _head_grid(figure: Any, picture: HeadGrid) -> str | None:
    weights_LHTS = np.asarray(picture.weights_LHTS, float)
    if weights_LHTS.ndim != 4 or len(weights_LHTS) != len(picture.layers):
        raise ValueError(
            f"{picture.title!r} has {len(picture.layers)} layers and weights of shape {list(weights_LHTS.shape)}; give "
            f"[{len(picture.layers)}, H, T, S]"
        )
    if not weights_LHTS.size:
        return None
    L, H, T, S = weights_LHTS.shape
    width = _WIDTH if H <= 4 else 2 * _WIDTH
    label = 0.45
    cell = min((width - label - 0.2) / H, 1.6)
    pixels = max(8, int(cell * _DPI) - 6)
    maps_LHTS = np.stack([[_pool(_pool(head_TS, pixels).T, pixels).T for head_TS in layer] for layer in weights_LHTS])
    t, s = maps_LHTS.shape[2:]
    gap_t, gap_s = max(1, t // 24), max(1, s // 24)
    mosaic = np.full((L * (t + gap_t), H * (s + gap_s)), np.nan)
    for layer, head in np.ndindex(L, H):
        top, left = layer * (t + gap_t), head * (s + gap_s)
        mosaic[top : top + t, left : left + s] = np.sqrt(np.clip(maps_LHTS[layer, head], 0, 1))
    figure.set_size_inches(width, cell * L + 0.95)
    axes = figure.add_subplot(facecolor="none")
    colors = np.where(np.isnan(mosaic)[..., None], 0.8, _tint(np.nan_to_num(mosaic)))
    axes.imshow(colors, aspect="auto", interpolation="nearest")
    _frame(axes, "head", "layer")
    axes.set_xticks(np.arange(H) * (s + gap_s) + s / 2, [str(head) for head in range(H)])
    axes.set_yticks(np.arange(L) * (t + gap_t) + t / 2, [str(layer) for layer in picture.layers])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(which="both", length=0, labelsize=11 if cell > 0.3 else 7)
    return (
        f"Each map has the {T} tokens that attend as rows and the {S} tokens that they attend to as columns, from the "
        f"top left. A darker point is a larger weight; the depth is its square root, so that small weights are visible."
    )


def _value_map(figure: Any, picture: ValueMap) -> str | None:
    values = np.asarray(picture.values, float)
    sizes = (len(picture.rows), len(picture.columns))
    if values.shape != sizes:
        raise ValueError(f"{picture.title!r} has values of shape {list(values.shape)}; give {list(sizes)}")
    if not values.size:
        return None
    rows, columns = ([_drawable(_cut(name, 16)) or "?" for name in names] for names in (picture.rows, picture.columns))
    size = 10 if max(sizes) <= 20 else 7
    row_label, column_label = _inches(rows, size), _inches(columns, size)
    smallest = 0.62 if picture.words else 0.16
    cell = max(smallest, min(0.5, (_WIDTH - row_label - 0.5) / sizes[1]))
    height = 0.24 if picture.words else min(cell, 0.3)
    figure.set_size_inches(max(_WIDTH, row_label + 0.5 + cell * sizes[1]), height * sizes[0] + column_label + 1.0)
    axes = figure.add_subplot(facecolor="none")
    largest = np.abs(values).max() or 1.0
    axes.imshow(_signed_tint(values / largest), aspect="auto", interpolation="nearest")
    _frame(axes, *picture.sides[::-1])
    axes.set_xticks(range(sizes[1]), columns, parse_math=False, rotation=90)
    axes.set_yticks(range(sizes[0]), rows, parse_math=False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(which="both", length=0, labelsize=size, pad=2)
    for n, m in np.ndindex(*sizes) if picture.words else ():
        text = _drawable(_cut(picture.words[n][m].strip(), 8)) or "?"  # type: ignore[index]
        color = "white" if abs(values[n, m]) > 0.6 * largest else _INK
        axes.text(m, n, text, ha="center", va="center", fontsize=7, color=color, parse_math=False, family=_FONT)
    n, m = np.unravel_index(np.abs(values).argmax(), sizes)
    signs = "blue is positive, red negative, and white 0" if values.min() < 0 else "white is 0"
    return (
        f"{picture.unit}: {signs}. The largest: {values[n, m]:.3g} at {_quoted(picture.rows[n])}, "
        f"{_quoted(picture.columns[m])}."
    )


def _signed_tint(depth: np.ndarray) -> np.ndarray:
    """Returns depths from -1 to 1 [...] as colours [..., 3] from red over white to blue."""
    from matplotlib.colors import to_rgb

    red = 1 + np.abs(depth)[..., None] * (np.array(to_rgb(_RUST)) - 1)
    return np.where(depth[..., None] < 0, red, _tint(np.abs(depth)))


def _pool(map_TS: np.ndarray, pixels: int) -> np.ndarray:
    """Returns the maxima over neighbouring rows, so that at most `pixels` rows are left."""
    step = -(-len(map_TS) // pixels)
    return np.maximum.reduceat(map_TS, np.arange(0, len(map_TS), step), 0)


def _tint(depth: np.ndarray) -> np.ndarray:
    """Returns depths from 0 to 1 [...] as colours [..., 3] from white to blue."""
    from matplotlib.colors import to_rgb

    return 1 + depth[..., None] * (np.array(to_rgb(_BLUE)) * 0.8 - 1)


# A mesh


def _device_mesh(figure: Any, picture: DeviceMesh) -> str | None:
    from matplotlib.patches import Rectangle

    (down, across), count = picture.grid, len(picture.parts)
    if down * across != count or len(picture.rows) != count:
        raise ValueError(
            f"{picture.title!r} has a grid {picture.grid}, {count} parts and {len(picture.rows)} row ranges; "
            f"give one part and one range for each device"
        )
    starts = list(dict.fromkeys((part[0].start, part[1].start) for part in picture.parts))
    ends = {(part[0].start, part[1].start): (part[0].stop, part[1].stop) for part in picture.parts}
    colors = dict(zip(starts, _part_colors(len(starts))))
    has_labels = count <= 16 and across <= 8  # whether a cell has space for text
    height = 0.5 if has_labels else min(0.3, 4.0 / down)
    figure.set_size_inches(_WIDTH, height * down + 2.6)
    top, bottom = figure.subplots(2, 1, height_ratios=(height * down, 1.15))
    for n, (part, rows) in enumerate(zip(picture.parts, picture.rows)):
        y, x = divmod(n, across)
        color = colors[part[0].start, part[1].start]
        top.add_patch(Rectangle((x, y), 1, 1, facecolor=color, edgecolor="white", linewidth=2 if has_labels else 0.5))
        if has_labels:
            narrow = across > 4
            label = f"device {n}\nrows{chr(10) if narrow else ' '}{rows.start}–{rows.stop - 1}"
            size = 8.5 if narrow else 9.5
            centred: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": size, "linespacing": 1.1}
            top.text(x + 0.5, y + 0.5, label, **centred, **_text())
    top.set_xlim(0, across)
    top.set_ylim(down, 0)
    rows_of_weight, columns_of_weight = picture.shape
    for start in starts:
        stop = ends[start]
        box = Rectangle((start[1], start[0]), stop[1] - start[1], stop[0] - start[0], facecolor=colors[start])
        box.set(edgecolor="white", linewidth=2 if len(starts) <= 16 else 0.5)
        bottom.add_patch(box)
    bottom.set_xlim(0, columns_of_weight)
    bottom.set_ylim(rows_of_weight, 0)
    weight_sides = [f"{name} {size:,}" for name, size in zip(picture.axes, picture.shape)]
    for axes, (down_side, across_side) in zip((top, bottom), (picture.sides, weight_sides)):
        _frame(axes, across_side, down_side)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines["bottom"].set_visible(False)
    copies = count // len(starts)
    each = f"{copies} devices hold" if copies > 1 else "one device holds"
    what = f"each of its {len(starts)} parts" if len(starts) > 1 else "all of it"
    return f"Top: the devices. Bottom: the weight, each part in the colour of its devices; {each} {what}."


def _part_colors(count: int) -> list[Any]:
    """Returns `count` light colours with legible text: hues of the palette, then lighter shades of them."""
    from matplotlib.colors import to_rgb

    hues = [np.array(to_rgb(color)) for pair in COLORS for color in pair]
    rounds = math.ceil(count / len(hues))
    depth = lambda n: 0.45 - 0.3 * (n // len(hues)) / max(rounds, 1)
    return [tuple(1 + depth(n) * (hues[n % len(hues)] - 1)) for n in range(count)]


# Text and axes


def _text() -> dict[str, Any]:
    return {"family": _FONT, "color": _INK}


def _frame(axes: Any, x: str, y: str, grid: str = "") -> None:
    """Sets the labels, the grid and the style of the ticks."""
    for setter, label in ((axes.set_xlabel, x), (axes.set_ylabel, y)):
        setter(_drawable(label), fontsize=11, math_fontfamily="stix", **_text())
    if grid:
        axes.grid(axis=grid, color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_INK)
    axes.tick_params(length=0, labelsize=11, labelcolor=_INK, labelfontfamily=_FONT)
    axes.tick_params(axis="x", length=3, color=_INK)


def _legend(axes: Any) -> None:
    position: dict[str, Any] = {
        "loc": "lower left",
        "bbox_to_anchor": (0, 1),
        "borderaxespad": 0.2,
        "ncols": 2,
        "frameon": False,
    }
    axes.legend(**position, prop={"family": _FONT, "size": 11}, labelcolor=_INK, handlelength=1.2, borderpad=0)


def _round_ticks(axis: Any, scale: float = 1.0, integer: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(
        MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=integer, min_n_ticks=1 if integer else 2)
    )
    _ticks(axis, scale)


def _ticks(axis: Any, scale: float = 1.0, own_decimals: bool = False) -> None:
    """Formats ticks. With `own_decimals`, each tick has its own number of decimals, as on a log axis."""
    from matplotlib.ticker import FuncFormatter

    def tick(value: float, _: int) -> str:
        others = [] if own_decimals else axis.get_majorticklocs()
        return readable([value * scale, *(other * scale for other in others)])[0]

    axis.set_major_formatter(FuncFormatter(tick))


def _numbers(values: np.ndarray) -> Callable[[float], str]:
    """Returns a function that formats finite numbers with the same decimals."""
    whole, largest = bool((values == np.round(values)).all()), np.abs(values).max()
    decimals = 0 if whole or largest >= 1000 else 1 if largest >= 10 else 3

    def number(value: float) -> str:
        return (
            f"{value:,.{decimals or int(whole and value != round(value))}f}"  # a mean of whole numbers may not be one
        )

    return number


@functools.cache
def _known() -> frozenset[int]:
    """Returns the code points of the font. For any other, matplotlib warns and draws a box."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = (get_font(findfont(FontProperties(family=_FONT, weight=weight))) for weight in ("normal", "bold"))
    return frozenset.intersection(*(frozenset(font.get_charmap()) for font in fonts))


def _drawable(text: str) -> str:
    """Returns the text in one line, with `?` for characters that the font does not have."""
    return "".join(c if ord(c) in _known() else "?" for c in " ".join(text.split()))


def _labels(names: Sequence[str], visible: np.ndarray, max_length: int) -> tuple[list[str], str]:
    """Returns labels of the names at the indices `visible`, and an addition to the caption.

    A name longer than `max_length` is cut in the middle. A name that the font cannot draw, or that would look like
    another one, is drawn as its number, and the caption has the name, which a browser shows in the right font and
    direction.
    """
    cut = {i: _cut(" ".join(names[i].split()), max_length) for i in visible.tolist()}
    counts = Counter(cut.values())
    labels, meanings = [], []
    for i, name in cut.items():
        if name and _drawable(name) == name and counts[name] == 1:
            labels.append(name)
        else:
            labels.append(f"#{i}")
            meanings.append(f"#{i}: {_quoted(names[i])}")
    return labels, "; ".join(meanings) + "." * bool(meanings)


def _cut(name: str, length: int) -> str:
    """Cuts a name to this length in the middle, since classes often differ at the start or at the end."""
    return name if len(name) <= length else f"{name[: length - length // 3 - 1]}…{name[-(length // 3) :]}"


def _quoted(name: str) -> str:
    """Returns a name for use in a sentence; a right-to-left name must not reorder the sentence."""
    name = " ".join(name.split()) or "an empty name"
    return name if _drawable(name) == name else f"\u2068{name}\u2069"


def _inches(texts: Sequence[str], size: float) -> float:
    """Returns the width of the widest text in inches, at a font size in points."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family=_FONT)))
    font.set_size(size, 72)  # a pixel is a point
    widths = []
    for text in texts:
        font.set_text(text)
        widths.append(font.get_width_height()[0] / 64)  # 26.6 fixed point
    return max(widths) / 72
