"""What a report draws: curves, confusion matrices, bars, histograms, attention and meshes, each as one PNG with a
caption in words.

All have one width, one font and few colours, and are drawn once, on white.  The page multiplies them onto light paper
and inverts them onto dark.  A notebook shows one that ends a cell, with its caption inside.  They go through
matplotlib's objects: pyplot would keep global state and choose a backend.
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
"""(training, held-out) of one metric of a picture."""
_BLUE, _RUST = COLORS[0]
_FONT = "STIXGeneral"  # comes with matplotlib: the same picture on every machine
_WIDTH = 4.6  # inches
_MOST_CLASSES, _MOST_BARS = 20, 30
_DPI = 240  # 2 pixels per CSS pixel
_drawing = threading.Lock()  # a live picture is drawn beside the run, whose report may be drawn at the same time


Bundle = tuple[dict[str, Any], dict[str, Any]]  # what a notebook asks of an object: data and metadata by MIME type


def _in_notebooks(picture: Any) -> Any:
    """A kind of picture that a notebook shows, and of which plain text has the title."""
    # A NamedTuple takes no base class that would have them.
    picture._repr_mimebundle_ = lambda self, **_: shown(self)
    picture._repr_pretty_ = lambda self, printer, _: printer.text(self.title)
    return picture


class Series(NamedTuple):
    """One metric over the steps: `steps` ascending, `values` finite."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    held_out: bool
    color: str


@_in_notebooks
class Chart(NamedTuple):
    """Curves of one picture."""

    name: str  # of the PNG
    title: str
    unit: str  # label of the vertical axis
    series: tuple[Series, ...]
    last: float = 1.0  # step at which the horizontal axis ends, the same in all pictures of a run
    scale: float = 1.0  # ticks show the value times this
    percent: bool = False  # the values are shares: ticks and captions show them in %
    better: Literal["high", "low"] | None = None
    log: bool = False
    smooth: bool = True  # whether training is noisy enough to need a smoothed line
    zero: bool = False  # whether the axis begins at zero
    peak: float | None = None  # of a learning rate, the configured one, which no logged step need have


@_in_notebooks
class Heatmap(NamedTuple):
    """A confusion matrix.  Above 20 classes those with the most examples are drawn and the rest is merged."""

    title: str
    counts: np.ndarray  # [n, n], row: true class, column: predicted class
    names: tuple[str, ...]


@_in_notebooks
class Bars(NamedTuple):
    """Horizontal bars, such as F1 by type.  Values are in `unit`; an axis in `%` reaches to 100.  NaN: no value."""

    title: str
    names: tuple[str, ...]
    values: tuple[float, ...]
    unit: str


@_in_notebooks
class Histogram(NamedTuple):
    """How often each value occurs, such as tokens per example; `limit` draws a line, such as the length of a row."""

    title: str
    values: np.ndarray  # [n]
    unit: str
    limit: float | None


@_in_notebooks
class Attention(NamedTuple):
    """How much each token that is written looks at each that is read."""

    title: str
    weights_TS: np.ndarray  # rows sum to 1
    written: tuple[str, ...]  # T pieces
    read: tuple[str, ...]  # S pieces


@_in_notebooks
class Devices(NamedTuple):
    """The devices of a mesh, what part of a weight each holds, and which rows of a batch."""

    title: str
    grid: tuple[int, int]  # devices down and across
    sides: tuple[str, str]  # what differs down and across, in words
    held: tuple[tuple[slice, slice], ...]  # of the weight, by each device
    shape: tuple[int, int]  # of the weight
    axes: tuple[str, str]  # of the weight, in words
    rows: tuple[slice, ...]  # of the batch, by each device


Picture = Chart | Heatmap | Bars | Histogram | Attention | Devices


def draw(picture: Picture, path: Path) -> str | None:
    """Draws `picture` as a PNG at `path`; returns its caption, or None and no file where there is nothing to draw.

    Raises ValueError where the names and the numbers of a picture are not equally many.
    """
    png, caption = _png(picture, captioned=False)
    if caption is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write(path, png)
    return caption


def shown(picture: Picture) -> Bundle:
    """The picture for a notebook, with its caption below it; {} where there is nothing to show."""
    png, caption = _png(picture, captioned=True)
    if caption is None:
        return {}, {}
    width = int.from_bytes(png[16:20], "big") // 2
    return {"image/png": png}, {"image/png": {"width": width, "alt": f"{picture.title}: {caption}"}}


def _png(picture: Picture, captioned: bool) -> tuple[bytes, str | None]:
    """The picture and its caption, which stands in it too where `captioned`; None where there is nothing to draw."""
    from matplotlib.figure import Figure

    # `Any`: each function takes the kind that stands beside it.
    kinds: dict[type, Callable[[Any, Any], str | None]] = {
        Chart: _chart,
        Heatmap: _heatmap,
        Bars: _bars,
        Histogram: _histogram,
        Attention: _attention,
        Devices: _devices,
    }
    with _drawing:
        figure = Figure(figsize=(_WIDTH, 3.1), dpi=_DPI, facecolor="white", layout="constrained")
        caption = kinds[type(picture)](figure, picture)
        if caption is None:
            return b"", None
        # Bold letters are wide: more than these would leave the picture.
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
    """Returns the moving mean over a twentieth of the curve [n] -> [n], narrower at both ends.

    It is centred, so that it does not lag as a decaying mean does; the first and the last point stay what they are.
    """
    i = np.arange(len(values))
    beside = np.minimum(len(values) // 40, np.minimum(i, i[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means = (sums[i + beside + 1] - sums[i - beside]) / (2 * beside + 1)
    return np.where(beside, means, values)  # sums of many values are not exact


def best(better: Literal["high", "low"] | None, values: np.ndarray) -> float | None:
    """Returns the best of values [n] of a metric that is known to be better high or low; None where all are equal."""
    if not better or len(values) < 2 or values.min() == values.max():
        return None
    return values.max() if better == "high" else values.min()


def readable(values: Sequence[float]) -> list[str]:
    """The ticks of an axis in one unit and with the same decimals: `0 0.5 1.0`, `5,000 10,000`, `1.25 M 1.50 M`."""
    unit, sign = (1e6, " M") if max(map(abs, values)) >= 1e6 else (1, "")
    decimals = max(len(f"{value / unit:.9f}".rstrip("0").partition(".")[2]) for value in values)
    return [f"{value / unit:,.{decimals}f}{sign}" if value else "0" for value in values]


def _chart(figure: Any, chart: Chart) -> str | None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    if not any(len(series.values) for series in chart.series):
        return None
    axes = figure.add_subplot(facecolor="none")
    for series in chart.series:
        label = _cut(_drawable(series.label), 24)  # two of them stand side by side
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

    if chart.log:
        values = np.concatenate([series.values for series in chart.series])
        axes.set_yscale("log")
        spread = values.max() / values.min()
        logarithmic = LogLocator(subs=(1, 2, 5) if spread < 1e3 else (1,), numticks=8)
        # Within a decade the round numbers of a log axis may be one or none.
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5) if spread < 10 else logarithmic)
        axes.yaxis.set_minor_locator(NullLocator())
        _ticks(axes.yaxis, alone=True)
    else:
        _round_ticks(axes.yaxis, 100.0 if chart.percent else chart.scale)
        axes.set_ylim(bottom=0 if chart.zero else None)
    axes.set_xlim(0, 1.02 * chart.last)
    _round_ticks(axes.xaxis, integer=True)
    _frame(axes, "step (optimizer updates)", chart.unit, grid="y")
    if len(chart.series) > 1 or chart.series[0].held_out:
        _legend(axes)
    return _chart_caption(chart)


def _chart_caption(chart: Chart) -> str:
    """The last and the best values."""

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
    said = []
    for series in chart.series:
        if not series.held_out:
            if len(chart.series) <= 2:  # more would be a paragraph
                said.append(f"{series.label} {number(series.values[-1])}")
            continue
        text = f"{series.label} {number(series.values[-1])}"
        if (top := best(chart.better, series.values)) is not None:
            at = series.steps[series.values == top][0]
            text += ", its best" if top == series.values[-1] else f" (best {number(top)} at step {at:,.0f})"
        said.append(text)
    return "; ".join(said)


# A confusion matrix


def _heatmap(figure: Any, picture: Heatmap) -> str | None:
    counts, n = np.asarray(picture.counts), len(picture.names)
    if counts.shape != (n, n):
        raise ValueError(f"{picture.title!r} has counts {list(counts.shape)} of {n} names; give [{n}, {n}]")
    total = counts.sum()
    if not total:
        return None
    said = [
        f"{100 * np.trace(counts) / total:.1f} % of {total:,} are right.",
        _mistake(counts, picture.names),
        "The stronger its colour, the larger a cell's share of the row; blue is right.",
    ]
    kept = np.sort(np.argsort(-counts.sum(1), kind="stable")[:_MOST_CLASSES])
    labels, meanings = _labels(picture.names, kept, most=24)
    if n > len(kept):
        counts = _merged(counts, kept)
        labels.append(f"other ({n - len(kept):,})")
        said += [
            f"The {len(kept)} classes with the most examples are shown and the {n - len(kept):,} others merged; "
            "among these right and wrong are not told apart (grey)."
        ]
    said += [meanings]

    size = 11 if len(labels) <= 6 else 9.5 if len(labels) <= 12 else 8
    beside = _inches(labels, size)
    cell = (_WIDTH - beside - 0.45) / len(labels)
    upright = beside + 0.08 > cell
    high = min(max(cell, 0.18), 0.5)
    figure.set_size_inches(_WIDTH, high * len(labels) + 0.8 + (beside if upright else 0.2))
    axes = figure.add_subplot(facecolor="none")
    depth = (counts / np.maximum(counts.sum(1, keepdims=True), 1)) ** 0.6  # so that small shares are seen at all
    axes.imshow(_shades(depth, merged=n > len(kept)), aspect="auto", interpolation="nearest")
    edges = np.arange(len(labels) + 1) - 0.5
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    if len(labels) <= 12:
        for (row, column), count in np.ndenumerate(counts):
            text = f"{count:,}" if _inches([f"{count:,}"], size) < cell - 0.06 else _short(count)
            # Above this depth white stands out more than ink does.
            color = "white" if depth[row, column] > 0.75 else _INK if count else _SOFT
            fitting = size * min(1, (cell - 0.04) / _inches([text], size))
            axes.text(column, row, text, ha="center", va="center", fontsize=fitting, family=_FONT, color=color)
    _frame(axes, "predicted class", "true class")
    upward: dict[str, Any] = {"rotation": 90} if upright else {}
    axes.set_xticks(range(len(labels)), labels, parse_math=False, **upward)
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    axes.grid(which="minor", color=_RULE, linewidth=0.6)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(which="both", length=0)
    axes.tick_params(labelsize=size, pad=2)
    return " ".join(filter(None, said))


def _merged(counts: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Counts [n, n] with all classes but `kept` [k] as one more: [k + 1, k + 1]."""
    group = np.full(len(counts), len(kept))
    group[kept] = np.arange(len(kept))
    merged = np.zeros((len(kept) + 1, len(kept) + 1), counts.dtype)
    np.add.at(merged, (group[:, None], group[None, :]), counts)
    return merged


def _shades(depth: np.ndarray, merged: bool) -> np.ndarray:
    """Depths from 0 to 1 [n, n] as colours [n, n, 3]: white to blue on the diagonal, to rust beside it.

    merged: whether the last class is several, of which the cell that is theirs alone cannot say right from wrong.
    """
    from matplotlib.colors import to_rgb

    full = np.where(np.eye(len(depth), dtype=bool)[..., None], to_rgb(_BLUE), to_rgb(_RUST))
    if merged:
        full[-1, -1] = to_rgb(_SOFT)
    return 1 + depth[..., None] * (full - 1)


def _mistake(counts: np.ndarray, names: Sequence[str]) -> str:
    wrong = counts - np.diag(np.diag(counts))
    true, predicted = np.unravel_index(wrong.argmax(), wrong.shape)
    if not (count := wrong[true, predicted]):
        return ""
    of = counts[true].sum()
    return (
        f"The most frequent mistake: {_aside(names[true])} taken for {_aside(names[predicted])}, "
        f"{count:,} of {of:,} ({100 * count / of:.1f} %)."
    )


def _short(count: float) -> str:
    """For a narrow cell: 12,345 -> `12k`."""
    for power, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= power:
            return f"{count / power:.{1 if count < 10 * power else 0}f}{sign}"
    return f"{count:.3g}"


# Bars


def _bars(figure: Any, picture: Bars) -> str | None:
    values = np.asarray(picture.values, float)
    if len(values) != len(picture.names):
        raise ValueError(f"{picture.title!r} has {len(values)} values of {len(picture.names)} names; give one for each")
    finite = np.isfinite(values)
    if not finite.any():
        return None
    number = _numbers(values[finite])
    if len(values) <= 3:
        said = [
            "; ".join(f"{_aside(name)} {number(v)}" for name, v in zip(picture.names, values) if np.isfinite(v)) + "."
        ]
    else:
        extremes = {"highest": np.nanargmax(values), "lowest": np.nanargmin(values)}
        told = (f"{end} {number(values[i])} ({_aside(picture.names[i])})" for end, i in extremes.items())
        said = [f"Mean {number(values[finite].mean())}; {', '.join(told)}."]
    shown = np.arange(len(values))[:_MOST_BARS]
    if len(values) > len(shown):
        said += [f"The first {len(shown)} of {len(values):,} are shown."]
    if not finite[shown].all():
        said += ["–: no value."]
    labels, meanings = _labels(picture.names, shown, most=28)
    values = values[shown]

    size = 11 if len(labels) <= 12 else 9.5
    figure.set_size_inches(_WIDTH, 1.05 + max(len(labels), 2) * (0.28 if len(labels) <= 12 else 0.2))
    axes = figure.add_subplot(facecolor="none")
    drawn = np.where(np.isfinite(values), values, 0.0)
    axes.barh(range(len(labels)), drawn, height=0.62, color=_BLUE)
    low, high = min(drawn.min(), 0.0), max(drawn.max(), 0.0)
    high = max(high, 100.0) if "%" in picture.unit else high if high > low else 1.0
    numbers = [number(value) if np.isfinite(value) else "–" for value in values]
    ends = _inches(numbers, size) / (_WIDTH - _inches(labels, size) - 0.2) + 0.03  # what the numbers take of the axis
    room = (high - low) * ends / (1 - ends * (2 if low < 0 else 1))
    axes.set_xlim(low - room * (low < 0), high + room)
    for at, (value, text) in enumerate(zip(values, numbers)):
        left = value < 0
        place: dict[str, Any] = {"ha": "right" if left else "left", "va": "center", "textcoords": "offset points"}
        axes.annotate(text, (drawn[at], at), (-3 if left else 3, 0), fontsize=size, **place, **_text())
    _round_ticks(axes.xaxis)
    _frame(axes, picture.unit, "", grid="x")
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    axes.set_ylim(max(len(labels), 2) - 0.5, -0.5)  # the first on top; one bar is no thicker than two
    axes.tick_params(axis="y", labelsize=size)
    return " ".join(filter(None, [*said, meanings]))


# A histogram


def _histogram(figure: Any, picture: Histogram) -> str | None:
    values = np.asarray(picture.values, float).ravel()
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    whole = bool((values == np.round(values)).all())
    number = _numbers(values)
    limit = picture.limit
    said = [
        f"{len(values):,} in all: median {number(np.median(values))}, smallest {number(values.min())}, "
        f"largest {number(values.max())}."
    ]
    if limit is not None:
        beyond = int((values > limit).sum())
        share = f"{beyond:,} ({100 * beyond / len(values):.2g} %)" if beyond else "none"
        said += [f"Beyond the limit of {number(limit)}: {share}."]

    low, high = values.min(), values.max()
    low = 0.0 if 0 <= low <= high / 2 else low
    # A few values far away would press all the others into one bar.
    reach = np.quantile(values, 0.99)
    if high - low > 2 * (reach - low) > 0:
        high = low + 1.25 * (reach - low)
        high = math.floor(high) if whole else high
        said += [f"The {int((values > high).sum()):,} above {number(high)} are not drawn."]
    line = None  # where the limit is drawn: what equals it is within it
    if limit is not None and low <= limit <= 3 * high:
        line = math.floor(limit) + 0.5 if whole else limit
        high = max(high, limit)
    elif limit is not None:
        said += ["The limit lies outside the picture."]

    edges = _edges(low, high, line) if whole else np.linspace(low, high, 41)
    if high == low:
        edges = np.array([low - 0.5, low + 0.5])
    counts, _ = np.histogram(values, edges)
    axes = figure.add_subplot(facecolor="none")
    apart: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.4}
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=_BLUE, **apart)
    if limit is not None and line is not None:
        dashed: dict[str, Any] = {"linewidth": 1.5, "linestyle": (0, (4, 2))}
        axes.axvline(line, color=_RUST, label=f"limit {number(limit)}", **dashed)
        _legend(axes)
    begin, end = max(edges[0], low - 0.5), edges[-1]
    axes.set_xlim(begin - 0.01 * (end - begin), end + 0.01 * (end - begin))
    _round_ticks(axes.xaxis, integer=whole)
    _round_ticks(axes.yaxis, integer=True)
    _frame(axes, picture.unit, "count", grid="y")
    return " ".join(said)


def _edges(low: float, high: float, line: float | None) -> np.ndarray:
    """Edges of at most 41 bars from `low` to `high`, each of equally many whole numbers, one edge at `line`."""
    width = math.ceil((math.floor(high) - low + 1) / 40)
    begin = low - 0.5
    if line is not None:
        begin = line - math.ceil((line - begin) / width) * width
    return np.arange(begin, math.floor(high) + width + 0.5, width)


# Attention


def _attention(figure: Any, picture: Attention) -> str | None:
    weights_TS = np.asarray(picture.weights_TS, float)
    sizes = (len(picture.written), len(picture.read))
    if weights_TS.shape != sizes:
        raise ValueError(f"{picture.title!r} has weights {list(weights_TS.shape)} of {sizes} tokens; give as many")
    if not weights_TS.size:
        return None
    size = 11 if max(sizes) <= 14 else 9 if max(sizes) <= 26 else 7
    written, read = ([_drawable(_cut(name, 16)) or "?" for name in names] for names in (picture.written, picture.read))
    beside, above = _inches(written, size), _inches(read, size)
    cell = min((_WIDTH - beside - 0.5) / sizes[1], 0.36)
    figure.set_size_inches(_WIDTH, cell * sizes[0] + above + 0.95)
    axes = figure.add_subplot(facecolor="none")
    axes.imshow(_tint(np.clip(weights_TS, 0, 1)), aspect="auto", interpolation="nearest")
    axes.set_xticks(np.arange(sizes[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(sizes[0] + 1) - 0.5, minor=True)
    _frame(axes, "tokens that are read", "tokens that are written")
    axes.set_xticks(range(sizes[1]), read, parse_math=False, rotation=90)
    axes.set_yticks(range(sizes[0]), written, parse_math=False)
    axes.grid(which="minor", color=_RULE, linewidth=0.5)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(which="both", length=0)
    axes.tick_params(labelsize=size, pad=2)
    t, s = np.unravel_index(weights_TS.argmax(), sizes)
    return (
        "Each row sums to 100 %; white is 0 %, the darkest blue 100 %. "
        f"The strongest: {_aside(picture.written[t])} looks at {_aside(picture.read[s])}, {weights_TS[t, s]:.0%}."
    )


def _tint(depth: np.ndarray) -> np.ndarray:
    """Depths from 0 to 1 [...] as colours [..., 3] from white to blue."""
    from matplotlib.colors import to_rgb

    return 1 + depth[..., None] * (np.array(to_rgb(_BLUE)) * 0.8 - 1)


# A mesh


def _devices(figure: Any, picture: Devices) -> str | None:
    from matplotlib.patches import Rectangle

    (down, across), count = picture.grid, len(picture.held)
    if down * across != count or len(picture.rows) != count:
        raise ValueError(f"{picture.title!r} has a grid {picture.grid} and {count} devices; give as many")
    parts = list(dict.fromkeys((cut[0].start, cut[1].start) for cut in picture.held))
    ends = {(cut[0].start, cut[1].start): (cut[0].stop, cut[1].stop) for cut in picture.held}
    shades = dict(zip(parts, _of_parts(len(parts))))
    spoken = count <= 16 and across <= 8  # whether there is room for words in a device
    high = 0.5 if spoken else min(0.3, 4.0 / down)
    figure.set_size_inches(_WIDTH, high * down + 2.6)
    top, bottom = figure.subplots(2, 1, height_ratios=(high * down, 1.15))
    for n, (cut, rows) in enumerate(zip(picture.held, picture.rows)):
        y, x = divmod(n, across)
        color = shades[cut[0].start, cut[1].start]
        top.add_patch(Rectangle((x, y), 1, 1, facecolor=color, edgecolor="white", linewidth=2 if spoken else 0.5))
        if spoken:
            narrow = across > 4
            words = f"device {n}\nrows{chr(10) if narrow else ' '}{rows.start}–{rows.stop - 1}"
            size = 8.5 if narrow else 9.5
            centred: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": size, "linespacing": 1.1}
            top.text(x + 0.5, y + 0.5, words, **centred, **_text())
    top.set_xlim(0, across)
    top.set_ylim(down, 0)
    height, width = picture.shape
    for start in parts:
        stop = ends[start]
        box = Rectangle((start[1], start[0]), stop[1] - start[1], stop[0] - start[0], facecolor=shades[start])
        box.set(edgecolor="white", linewidth=2 if len(parts) <= 16 else 0.5)
        bottom.add_patch(box)
    bottom.set_xlim(0, width)
    bottom.set_ylim(height, 0)
    of_weight = [f"{name} {size:,}" for name, size in zip(picture.axes, picture.shape)]
    for axes, (down_side, across_side) in zip((top, bottom), (picture.sides, of_weight)):
        _frame(axes, across_side, down_side)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines["bottom"].set_visible(False)
    on = count // len(parts)
    each = f"{on} devices hold" if on > 1 else "one device holds"
    what = f"each of its {len(parts)} parts" if len(parts) > 1 else "all of it"
    return f"Above the devices, below the weight, in the colours of those that hold its parts: {each} {what}."


def _of_parts(count: int) -> list[Any]:
    """Light colours that ink is legible on, one for each part: hues of the palette, then shades of them."""
    from matplotlib.colors import to_rgb

    hues = [np.array(to_rgb(color)) for pair in COLORS for color in pair]
    rounds = math.ceil(count / len(hues))
    depth = lambda n: 0.45 - 0.3 * (n // len(hues)) / max(rounds, 1)
    return [tuple(1 + depth(n) * (hues[n % len(hues)] - 1)) for n in range(count)]


# What they share


def _text() -> dict[str, Any]:
    return {"family": _FONT, "color": _INK}


def _frame(axes: Any, x: str, y: str, grid: str = "") -> None:
    """Labels, rules and the look of the ticks."""
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
    above: dict[str, Any] = {
        "loc": "lower left",
        "bbox_to_anchor": (0, 1),
        "borderaxespad": 0.2,
        "ncols": 2,
        "frameon": False,
    }
    axes.legend(**above, prop={"family": _FONT, "size": 11}, labelcolor=_INK, handlelength=1.2, borderpad=0)


def _round_ticks(axis: Any, scale: float = 1.0, integer: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(
        MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=integer, min_n_ticks=1 if integer else 2)
    )
    _ticks(axis, scale)


def _ticks(axis: Any, scale: float = 1.0, alone: bool = False) -> None:
    """alone: each tick has its own decimals, as on a log axis."""
    from matplotlib.ticker import FuncFormatter

    def tick(value: float, _: int) -> str:
        beside = [] if alone else axis.get_majorticklocs()
        return readable([value * scale, *(other * scale for other in beside)])[0]

    axis.set_major_formatter(FuncFormatter(tick))


def _numbers(values: np.ndarray) -> Callable[[float], str]:
    """How to write finite numbers that stand beside each other."""
    whole, largest = bool((values == np.round(values)).all()), np.abs(values).max()
    decimals = 0 if whole or largest >= 1000 else 1 if largest >= 10 else 3

    def number(value: float) -> str:
        return (
            f"{value:,.{decimals or int(whole and value != round(value))}f}"  # a mean of whole numbers may not be one
        )

    return number


@functools.cache
def _known() -> frozenset[int]:
    """The code points that the font has; matplotlib warns of any other and draws a box."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = (get_font(findfont(FontProperties(family=_FONT, weight=weight))) for weight in ("normal", "bold"))
    return frozenset.intersection(*(frozenset(font.get_charmap()) for font in fonts))


def _drawable(text: str) -> str:
    """One line, without what the font lacks."""
    return "".join(c if ord(c) in _known() else "?" for c in " ".join(text.split()))


def _labels(names: Sequence[str], shown: np.ndarray, most: int) -> tuple[list[str], str]:
    """Labels of the names at the indices `shown`, of at most `most` characters, and what the caption has to add.

    A long name is cut in the middle.  A name that the font cannot draw, or that would look like another one, is drawn
    as its number, and the caption says its name: there the reader's own fonts and writing directions are at work.
    """
    cut = {i: _cut(" ".join(names[i].split()), most) for i in shown.tolist()}
    times = Counter(cut.values())
    labels, meanings = [], []
    for i, name in cut.items():
        if name and _drawable(name) == name and times[name] == 1:
            labels.append(name)
        else:
            labels.append(f"#{i}")
            meanings.append(f"#{i}: {_aside(names[i])}")
    return labels, "; ".join(meanings) + "." * bool(meanings)


def _cut(name: str, most: int) -> str:
    """A name of at most `most` characters: classes differ at their beginnings and ends more than in the middle."""
    return name if len(name) <= most else f"{name[: most - most // 3 - 1]}…{name[-(most // 3) :]}"


def _aside(name: str) -> str:
    """A name inside a sentence, whose order it must not turn where it is written from right to left."""
    name = " ".join(name.split()) or "an empty name"
    return name if _drawable(name) == name else f"\u2068{name}\u2069"


def _inches(texts: Sequence[str], size: float) -> float:
    """The width of the widest text, at a size in points."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family=_FONT)))
    font.set_size(size, 72)  # a pixel is a point
    widths = []
    for text in texts:
        font.set_text(text)
        widths.append(font.get_width_height()[0] / 64)  # it counts in 26.6 fixed point
    return max(widths) / 72
