"""The page of a run: its curves, its evaluations and whatever else a task has to show.

`write` is the whole of it: `metrics.jsonl` -> `curves` (PNGs in RUN/report/) -> RUN/report.html, which holds its
pictures inside, asks nothing of the network and runs no script, so that it can be mailed as it is.

Single pictures are for notebooks, which show one that ends a cell, and for scripts, which `save` it:

    with live("runs/mine"): jaxlm.fit(run)                 the loss while it falls
    curve("runs/mine"), compared({"a": "runs/a", ...})     curves of one run, or of several in one picture
    confusion(labels, told), told_wrong(texts, ...)        what `jaxlm.predict` told, against the labels
    masked(tokenizer, before, after, predicted)            what masking makes of a text, in colour
    attention(lm, source, target)                          where a translation looks in its source
    mesh(sizes)                                            the devices of a mesh, and what each holds
"""

from __future__ import annotations

import base64
import contextvars
import io
import json
import math
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlm.devices import sharding
from jaxlm.errors import RunError, UserError, perhaps
from jaxlm.reports.pictures import (
    COLORS,
    Attention,
    Bars,
    Bundle,
    Chart,
    Devices,
    Heatmap,
    Histogram,
    Picture,
    Series,
    best,
    draw,
    shown,
)
from jaxlm.storage import disk

MISTAKES, LONGEST = 20, 600  # most rows of mistakes that are shown, most characters of a cell


class Table(NamedTuple):
    """Rows of plain text, such as the most confident mistakes; long texts wrap."""

    title: str
    head: tuple[str, ...]
    rows: list[list[str]]
    note: str  # what the rows are, in words

    def _repr_mimebundle_(self, **_: Any) -> Bundle:
        return {"text/html": _alone(_texts(self))}, {}

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in (self.head, *self.rows))
        printer.text("\n".join(line.rstrip() for line in (self.title, *lines, self.note)))


class Masked(NamedTuple):
    """A text before and after masking, piece by piece, and which pieces are to be predicted."""

    title: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    predicted: tuple[bool, ...]
    mask: str  # the piece that masks

    @property
    def fates(self) -> list[str]:
        """What became of each piece: masked, random, kept, or nothing, of those that are not predicted."""
        which = lambda old, new: "masked" if new == self.mask else "kept" if new == old else "random"
        return [which(old, new) if p else "" for old, new, p in zip(self.before, self.after, self.predicted)]

    def _repr_mimebundle_(self, **_: Any) -> Bundle:
        return {"text/html": _alone(_coloured(self))}, {}

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        told = (f"{new} ({old}, {fate})" if fate else new for old, new, fate in zip(*self[1:3], self.fates))
        printer.text(f"{self.title}: {' '.join(told)}")


Section = Heatmap | Bars | Histogram | Table


class Kind(NamedTuple):
    """A kind of metric, as the last word of a metric's name tells it: `f1` of `ner/macro_f1`."""

    family: str  # the metrics of one picture
    words: str


class ScoreFamily(NamedTuple):
    """What a picture of metrics needs to know."""

    title: str  # empty: the words of its metrics
    unit: str
    better: Literal["high", "low"] | None
    percent: bool = False  # a share, told in %
    log: bool = False


KINDS = {
    "loss": Kind("loss", "loss"),
    "perplexity": Kind("perplexity", "perplexity"),
    "bits_per_byte": Kind("bits_per_byte", "bits per byte"),
    "accuracy": Kind("accuracy", "accuracy"),
    "f1": Kind("f1", "F1"),
    "precision": Kind("f1", "precision"),
    "recall": Kind("f1", "recall"),
    "exact": Kind("f1", "exact match"),
    "recall@": Kind("recall@", "recall@"),
    "mrr": Kind("mrr", "mean reciprocal rank"),
    "matthews": Kind("correlation", "Matthews"),
    "pearson": Kind("correlation", "Pearson"),
    "spearman": Kind("correlation", "Spearman"),
    "mse": Kind("mse", "mean squared error"),
    "bleu": Kind("translation", "BLEU"),
    "chrf": Kind("translation", "chrF"),
    "rouge1": Kind("rouge", "ROUGE-1"),
    "rouge2": Kind("rouge", "ROUGE-2"),
    "rougeL": Kind("rouge", "ROUGE-L"),
    "rougeLsum": Kind("rouge", "ROUGE-Lsum"),
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
    """The parts of a metric's name: `ner/macro_f1` is of the task `ner`, qualified as `macro` and of kind `f1`."""

    task: str
    qualifier: str
    words: str  # of its kind; of an unknown metric, all of its name
    family: str


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
    charts = _charts(rows)
    paths = _paths(charts, Path(folder))
    for chart, path in zip(charts, paths):
        draw(chart, path)
    return paths


def write(
    folder: Path, config: dict[str, Any], facts: dict[str, str], sample: str | None, sections: Sequence[Section] = ()
) -> Path:
    """Writes `folder/report.html` and the PNGs in `folder/report/` from `folder/metrics.jsonl`; returns the page.

    config: the resolved config, as `config.to_json` gives it.  facts: what a reader wants first, in order, such as
    `{"held-out bits per byte": "1.62"}`.  sample: generated text, or None.  sections: what a task has to show, in
    order, such as its confusion matrix.
    """
    folder = Path(folder)
    rows = read_metrics(folder)
    charts = _charts(rows, config)
    drawn = [*charts, *(section for section in sections if not isinstance(section, Table))]
    figures = [_figure(picture, path) for picture, path in zip(drawn, _paths(drawn, folder / "report"))]
    details = _details(sections, iter(figures[len(charts) :]))
    curves = {chart.name: figure for chart, figure in zip(charts, figures)}
    page = _page(folder.resolve().name, facts, curves, _evaluations(rows), details, sample, config)
    path = folder / "report.html"
    disk.write(path, page)  # a byte-level model may generate half a character
    return path


# Single pictures, for notebooks and scripts


def save(picture: Picture | Table | Masked, path: Path | str) -> Path:
    """Writes a picture as a .png, a table or masked text as an .html page; raises UserError for another suffix."""
    path, of_words = disk.local(path, "path"), isinstance(picture, (Table, Masked))
    suffix = ".html" if of_words else ".png"
    if path.suffix != suffix:
        raise UserError(f"{path} would hold a {type(picture).__name__.lower()}; give a name that ends in {suffix}")
    if isinstance(picture, (Table, Masked)):
        page = _html(picture.title, picture._repr_mimebundle_()[0]["text/html"])
        disk.write(path, page)
    else:
        png = shown(picture)[0].get("image/png")
        if png is None:
            raise UserError(f"{picture.title!r} has nothing to show; no picture is written to {path}")
        disk.write(path, png)
    return path


def curve(folder: Path | str, name: str = "loss") -> Chart:
    """A picture of the report of the run in `folder`, such as `loss`, `accuracy` or `learning_rate`.

    Raises UserError where the run has no such picture, with those that it has.
    """
    charts = {chart.name: chart for chart in _charts_of(Path(folder))}
    if name not in charts:
        what = perhaps(name, charts) if charts else "; nothing is measured there yet"
        raise UserError(f"the run in {folder} has no picture {name!r}{what}")
    return charts[name]


def compared(runs: Mapping[str, Path | str], name: str = "loss") -> Chart:
    """One metric of several runs in one picture.  runs: label -> folder, at most 8.

    name: as in `metrics.jsonl`: `loss` in training, `eval/loss` or `eval/accuracy` held out.  Raises UserError where a
    run has not measured it.
    """
    colors = [color for pair in COLORS for color in pair]
    if not 0 < len(runs) <= len(colors):
        raise UserError(f"{len(runs)} runs cannot be compared in one picture; give 1 to {len(colors)}")
    held_out, series = name.startswith("eval/"), []
    for (label, folder), color in zip(runs.items(), colors):
        rows = read_metrics(Path(folder))
        points = _points(rows, name)
        if not len(points[0]):
            known = {key for row in rows for key in row} - {"step"}
            raise UserError(f"the run in {folder} has no metric {name!r}{perhaps(name, known)}")
        series.append(Series(label, *points, held_out, color))
    metric = _metric(name.removeprefix("eval/"))
    said = SCORE_FAMILIES.get(metric.family) or ScoreFamily("", _plain(metric.words), None)
    title = f"{_title(words(name.removeprefix('eval/')))}, {'held-out' if held_out else 'training'}"
    last = max(float(one.steps[-1]) for one in series)
    look: dict[str, Any] = {"percent": said.percent, "better": said.better, "log": said.log}
    return Chart("compared", title, said.unit or title, tuple(series), last=max(last, 1.0), **look)


def confusion(labels: Sequence[str], told: Sequence[Mapping[str, Any]]) -> Heatmap:
    """The confusion matrix of what `jaxlm.predict` told of examples, against their labels."""
    found = [str(row["prediction"]) for row in told]
    names = tuple(sorted({*labels, *found}))
    counts = np.zeros((len(names), len(names)), int)
    for (label, prediction), count in Counter(zip(labels, found, strict=True)).items():
        counts[names.index(label), names.index(prediction)] = count
    return Heatmap("Confusion matrix", counts, names)


def told_wrong(texts: Sequence[str], labels: Sequence[str], told: Sequence[Mapping[str, Any]], most: int = 10) -> Table:
    """The most confident mistakes in what `jaxlm.predict` told of texts, against their labels."""
    rows = zip(texts, labels, told, strict=True)
    wrong = [
        (row["confidence"], [text, label, row["prediction"]]) for text, label, row in rows if label != row["prediction"]
    ]
    return mistakes(("text", "true", "predicted"), wrong, len(texts), "examples are predicted wrong", most)


def mistakes(
    head: tuple[str, ...], wrong: list[tuple[float, list[str]]], count: int, what: str, most: int = MISTAKES
) -> Table:
    """The table of the most confident of the (confidence, cells) that are wrong among `count`."""
    ordered = sorted(wrong, key=lambda row: -row[0])[:most]
    cut = lambda text: text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    rows = [[*map(cut, cells), f"{confidence:.1%}"] for confidence, cells in ordered]
    return Table("The most confident mistakes", (*head, "confidence"), rows, f"{len(wrong):,} of {count:,} {what}.")


def masked(
    tokenizer: Any, before_T: Sequence[int], after_T: Sequence[int], predicted_T: Sequence[bool], title: str = "Masking"
) -> Masked:
    """What masking made of a text, in colour: token ids before and after, and which of them are to be predicted."""
    before, after = (tuple(tokenizer.pieces(ids)) for ids in (before_T, after_T))
    return Masked(title, before, after, tuple(map(bool, predicted_T)), tokenizer.pieces([tokenizer.mask])[0])


def attention(lm: Any, source: str, target: str, layer: int = -1, head: int | None = None) -> Attention:
    """Where an encoder-decoder looks in `source` while it writes `target`: its cross-attention.

    layer: of the decoder, counted from 0, or from the last by -1.  head: one of its heads; None: their mean.  Raises
    UserError for another kind of model, and for a layer or a head that it does not have.
    """
    if lm.config.structure != "encoder_decoder" or lm.config.start_token is None or lm.tokenizer is None:
        raise UserError(
            f"cross-attention is of an encoder-decoder with a tokenizer and a start token; the model is a(n) "
            f"{lm.config.structure} with {'a' if lm.tokenizer else 'no'} tokenizer: take another"
        )
    ((read, _),), ((written, _),) = lm.tokenizer.frame([source]), lm.tokenizer.target.frame([target])
    out = lm([read], target_tokens_BT=np.array([[lm.config.start_token, *written[:-1]]], np.int32), attentions=True)
    weights_LHTS = np.asarray(out.decoder.cross_attention_LBHTS[:, 0], np.float32)
    for name, asked, size in (("layer", layer, weights_LHTS.shape[0]), ("head", head or 0, weights_LHTS.shape[1])):
        if not -size <= asked < size:
            raise UserError(f"{name} is {asked}; the decoder has {size}, counted from 0")
    weights_HTS = weights_LHTS[layer]
    weights_TS = weights_HTS.mean(0) if head is None else weights_HTS[head]
    which = f"layer {layer % len(weights_LHTS)}, " + ("mean of the heads" if head is None else f"head {head}")
    spell = lambda words, ids: tuple(piece.replace("\u2581", "_").replace(" ", "_") for piece in words.pieces(ids))
    sides = spell(lm.tokenizer.target, written), spell(lm.tokenizer, read)
    return Attention(f"Cross-attention ({which})", weights_TS, *sides)


def mesh(
    sizes: Mapping[str, int],
    *,
    axes: tuple[str, str] = ("width", "mlp"),
    shape: tuple[int, int] = (512, 2048),
    rows: int = 32,
) -> Devices:
    """The devices of a mesh, which part of a weight each holds, and which rows of a batch.

    sizes: of the mesh's axes (`jaxlm.devices.sharding.AXES`); 1 where unsaid.  axes, shape: of the weight, the logical
    axes by which `jaxlm.devices.sharding.RULES` places it; of each layer's MLP, where unsaid.  Raises UserError where
    the mesh does not divide the weight or the rows.
    """
    sizes = {name: sizes.get(name, 1) for name in sharding.AXES}
    sharding.check(sizes, axes, shape, "the weight")
    sharding.check(sizes, ("batch",), (rows,), "the batch")
    held, of_batch = [], []
    for place in np.ndindex(*sizes.values()):
        at = dict(zip(sizes, place))
        held.append(tuple(_part(at, sizes, axis, size) for axis, size in zip(axes, shape)))
        of_batch.append(_part(at, sizes, "batch", rows))
    split = [name for name, size in sizes.items() if size > 1] or ["data"]
    across = sizes[split[-1]]  # the last of the axes changes fastest
    down = " × ".join(f"{name} {sizes[name]}" for name in split[:-1])
    what = ", ".join(f"{name} {sizes[name]}" for name in split)
    return Devices(
        f"A mesh of {math.prod(sizes.values()):,} devices: {what}",
        (math.prod(sizes.values()) // across, across),
        (down, f"{split[-1]} {across}"),
        tuple(held),  # type: ignore[arg-type]
        shape,
        axes,
        tuple(of_batch),
    )


def _part(at: Mapping[str, int], sizes: Mapping[str, int], axis: str, size: int) -> slice:
    """Of a dimension with this logical axis, what the device at these places of the mesh holds."""
    index, ways = 0, 1
    for name in sharding.RULES[axis]:
        index, ways = index * sizes[name] + at[name], ways * sizes[name]
    return slice(index * size // ways, (index + 1) * size // ways)


def hardware() -> str:
    """What JAX computes on here, in words; where there is no accelerator, that it will be slow."""
    import jax

    devices = jax.devices()
    if devices[0].platform == "cpu":
        return (
            "JAX found no accelerator: everything runs on the CPU, slowly.\n"
            "In Colab, Runtime > Change runtime type offers a TPU or a GPU."
        )
    return f"JAX runs on {len(devices)} x {devices[0].device_kind}."


@contextmanager
def live(folder: Path | str, name: str = "loss") -> Iterator[None]:
    """While the block trains the run in `folder`, a notebook shows this curve of it, redrawn in place, and below it
    what the run says.  In a script, whose run speaks for itself, nothing is done.

        with live("runs/mine"):
            lm = jaxlm.fit(run)

    It reads what the run logs, so it also shows what was there before a run resumes.  The last picture stays, also
    where the block ends by an error, which is passed on.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if not hasattr(shell, "kernel"):
        yield
        return
    watched = _Watched(Path(folder), name)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(watched.pause):
            watched.redraw()

    # A notebook knows by its context which cell an output belongs to.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(watch,), daemon=True)
    try:
        with redirect_stderr(watched.said):
            thread.start()
            yield
    finally:
        over.set()
        thread.join()
        watched.redraw()


class _Watched:
    """The two outputs of `live`: the curve, and what the run said."""

    def __init__(self, folder: Path, name: str):
        from IPython.display import display

        self.folder, self.name, self.said = folder, name, _Screen()
        self.pause = 1.0  # seconds until it is looked at again
        self._seen = self._told = ""
        waiting = {"text/plain": "The picture comes with the first line of the log."}
        self._picture = display(waiting, raw=True, display_id=True)
        self._text = display({"text/plain": ""}, raw=True, display_id=True)

    def redraw(self) -> None:
        """Shows what has changed since the last time."""
        begun = time.monotonic()
        if (text := self.said.text()) != self._told:
            self._told = text
            self._text.update({"text/plain": text}, raw=True)
        log = self.folder / "metrics.jsonl"
        now = str(log.stat().st_size) if log.exists() else ""
        if now != self._seen:
            charts = {chart.name: chart for chart in _charts_of(self.folder)}
            if self.name in charts:
                self._seen = now
                self._picture.update(charts[self.name])
        self.pause = max(1.0, 10 * (time.monotonic() - begun))  # at most a tenth of the time is spent on looks


class _Screen(io.StringIO):
    """What a terminal would show of what is written to it, of lines that are rewritten in place the last."""

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        """The lines, as they stand."""
        lines = (line.rpartition("\r\x1b[K")[2] for line in self.getvalue().split("\n"))
        return "\n".join(lines).strip("\n")


# What is drawn


def _charts_of(folder: Path) -> list[Chart]:
    """Returns the charts of the run in a folder."""
    try:
        config = json.loads((folder / "config.json").read_text())["run"]
    except (OSError, ValueError, LookupError, TypeError):  # the log alone was copied
        config = {}
    return _charts(read_metrics(folder), config)


def _charts(rows: list[dict[str, Any]], config: Mapping[str, Any] | None = None) -> list[Chart]:
    """Returns the results first (loss, then each family of held-out metrics), then how the run went.

    config: of the run, as JSON values, whose learning rate is the peak.
    """
    families: dict[str, list[str]] = {"loss": ["loss"]}
    for key in _held_out_keys(rows):
        name = key.removeprefix("eval/")
        members = families.setdefault(_metric(name).family, [])
        members.extend([name] if name not in members else [])
    charts = []
    for family, names in families.items():
        charts += _results(rows, family, names)

    def one(key: str, label: str = "training", color: int = 0) -> tuple[Series]:
        return (Series(label, *_points(rows, key), False, COLORS[color][0]),)

    times = (("step_ms_p50", "median"), ("step_ms_p90", "90 % are faster"), ("step_ms_p99", "99 % are faster"))
    took = [one(key, label, n)[0] for n, (key, label) in enumerate(times)]

    rate = one("learning_rate")
    configured = ((config or {}).get("optimizer") or {}).get("rate")
    peak = configured or rate[0].values.max(initial=0.0)
    power = math.floor(math.log10(peak)) if peak > 0 else 0
    unit = rf"learning rate ($\times 10^{{{power}}}$)"
    charts += [
        Chart(
            "learning_rate", "Learning rate", unit, rate, scale=10.0**-power, smooth=False, zero=True, peak=configured
        ),
        Chart("grad_norm", "Gradient norm", "global norm (log scale)", one("grad_norm"), log=True),
        Chart("tokens_per_second", "Throughput", "tokens per second", one("tokens_per_second"), zero=True),
        Chart("mfu", "Model FLOPs utilisation", "share of the chips' peak (%)", one("mfu"), percent=True, zero=True),
        Chart("step_ms", "Time of a step", "milliseconds (log scale)", tuple(took), smooth=False, log=True),
        Chart("data_share", "Waiting for data", "share of the time (%)", one("data_share"), percent=True, zero=True),
        *(
            Chart(key, title, "most held since the start (GB)", one(key), scale=1e-9, smooth=False, zero=True)
            for key, title in (
                ("memory_bytes", "Memory of a device"),
                ("process_memory_bytes", "Memory of the process, on its host"),
            )
        ),
    ]
    charts = [c._replace(series=tuple(map(_above_zero, c.series))) if c.log else c for c in charts]
    charts = [c._replace(series=tuple(series for series in c.series if len(series.values))) for c in charts]
    # One evaluation makes no curve: the table has it.
    charts = [c for c in charts if c.name == "loss" or any(len(series.values) > 1 for series in c.series)]
    last = max((series.steps[-1] for chart in charts for series in chart.series), default=1.0)
    return [chart._replace(last=max(last, 1.0)) for chart in charts if chart.series]


def _results(rows: list[dict[str, Any]], family: str, names: list[str]) -> list[Chart]:
    """The curves of a family's metrics, in training and held out: one picture, or more where colours do not suffice."""
    metrics = [_metric(name) for name in names]
    tasks, words = (list(dict.fromkeys(parts)) for parts in zip(*((metric.task, metric.words) for metric in metrics)))
    said = SCORE_FAMILIES.get(family) or ScoreFamily("", _plain(family), None)
    title = _title(said.title or ", ".join(words)) + (f" ({_plain(tasks[0])})" if tasks[0] and len(tasks) == 1 else "")
    look: dict[str, Any] = {"percent": said.percent, "better": said.better, "log": said.log}
    trained = any(name in row for row in rows for name in names)
    count = math.ceil(len(names) / len(COLORS))
    most = math.ceil(len(names) / count)
    charts = []
    for number in range(count):
        series = []
        these = slice(number * most, (number + 1) * most)
        for metric, name, colors in zip(metrics[these], names[these], COLORS):
            parts = [metric.task] * (len(tasks) > 1) + [metric.qualifier]
            parts += [metric.words] * (len(words) > 1 or not any(parts))
            which = [_plain(" ".join(filter(None, parts)))] if len(names) > 1 else []
            for held_out, color in enumerate(colors):
                when = ["held-out" if held_out else "training"] if trained or not which else []
                points = _points(rows, "eval/" * held_out + name)
                series.append(Series(", ".join(which + when), *points, bool(held_out), color))
        part = f" ({number + 1} of {count})" if count > 1 else ""
        unit = said.unit + (", held-out" if len(names) > 1 and not trained else "")
        charts.append(Chart(family + f"_{number + 1}" * (count > 1), title + part, unit, tuple(series), **look))
    return charts


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


def _metric(name: str) -> Metric:
    """The parts of a metric's name without `eval/`: `ner/macro_f1`, `masked_lm_loss`, `recall@5`."""
    task, _, last = name.rpartition("/")
    stem, at, _ = last.partition("@")
    qualifier, _, word = ("", "", stem) if stem in KINDS else stem.rpartition("_")
    kind = KINDS.get(word + at) or KINDS.get(word)
    if kind is None:
        return Metric("", "", name, name)
    words = kind.words.removesuffix("@") + last[len(stem) :]
    return Metric(task, qualifier, words, "part_loss" if kind.family == "loss" and name != "loss" else kind.family)


def words(name: str) -> str:
    """A metric in words: `names/macro_f1` is `names macro F1`."""
    metric = _metric(name)
    return _plain(" ".join(filter(None, (metric.task, metric.qualifier, metric.words))))


def _plain(name: str) -> str:
    return name.replace("_", " ").replace("/", " ").replace("masked lm", "masked LM")


def _title(name: str) -> str:
    return _plain(name)[:1].upper() + _plain(name)[1:]


def _paths(pictures: Sequence[Chart | Heatmap | Bars | Histogram], folder: Path) -> list[Path]:
    """A PNG in `folder` for each picture, also where the file system does not tell `F1` from `f1`."""
    paths: list[Path] = []
    for picture in pictures:
        name = picture.name if isinstance(picture, Chart) else picture.title
        stem = re.sub(r"[^\w-]+", "_", name.lower()).strip("_")[:60] or "picture"
        times = 1
        while (path := folder / (f"{stem}_{times}.png" if times > 1 else f"{stem}.png")) in paths:
            times += 1
        paths.append(path)
    return paths


# How the page is set

_NUMBER = re.compile(r"[-−+]?\d[\d,.]*( ?%)?|–")


def _text(value: Any) -> str:
    """Escaped; control characters, which HTML forbids and a byte-level model may generate, become U+FFFD."""
    return escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", str(value).replace("\r\n", "\n")))


def number(name: str, value: Any) -> str:
    """A cell of the table of evaluations."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–" if value is None else str(value)
    family = SCORE_FAMILIES.get(_metric(name).family)
    if family and family.percent:
        return f"{100 * value:.2f} %"
    if family and family.log:
        return f"{value:,.2f}"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2e}"


def _figure(picture: Chart | Heatmap | Bars | Histogram, path: Path) -> str:
    """Draws the picture at `path` and sets it inside the page, with its caption."""
    caption = draw(picture, path)
    if caption is None:
        return f'<p class="note">{_text(picture.title)}: nothing to show.</p>'
    png = path.read_bytes()
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))  # where every PNG has them
    alt = f"{picture.title} by step, up to step {picture.last:,.0f}" if isinstance(picture, Chart) else picture.title
    data = base64.b64encode(png).decode()
    # The names of many classes would be too small on a phone: there the picture keeps its width and scrolls.
    many = ' class="many" tabindex="0"' if isinstance(picture, Heatmap) and len(picture.names) > 12 else ""
    return (
        f'<figure{many}><img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{_text(alt)}">\n'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


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
    families = {name: SCORE_FAMILIES.get(_metric(name).family) for name in names}
    top = {name: best(family.better, values) for name, values in columns.items() if (family := families[name])}

    def cell(name: str, value: Any) -> str:
        shown = _text(number(name, value))
        return f"<strong>{shown}</strong>" if value is not None and top.get(name) == value else shown

    body = [[f"{step:,}"] + [cell(n, by_step[step].get(f"eval/{n}")) for n in names] for step in sorted(by_step)]
    return _table(["step", *map(words, names)], body) if body else ""


def fact(name: str, value: float) -> str:
    """A metric to four digits: shares as percentages."""
    text = number(name, value)
    return text if "%" in text else f"{value:.4f}"


def _details(sections: Sequence[Section], figures: Iterator[str]) -> str:
    """Tables, and the figures of all other sections: those between two tables share a grid."""
    blocks = []
    for of_tables, group in groupby(sections, lambda section: isinstance(section, Table)):
        if of_tables:
            blocks += [_texts(table) for table in group if isinstance(table, Table)]
        else:
            blocks.append(_grid([next(figures) for _ in group]))
    return "\n".join(blocks)


def _grid(figures: list[str]) -> str:
    return f'<div class="grid">\n{chr(10).join(figures)}\n</div>'


def _texts(table: Table) -> str:
    """A table of plain text.  Its columns are as wide as their texts are long, within limits, and never leave the page.

    Raises ValueError where a row has not one cell for each column.
    """
    wrong = next((row for row in table.rows if len(row) != len(table.head)), None)
    if wrong is not None:
        raise ValueError(
            f"a row of {table.title!r} has {len(wrong)} cells; give {len(table.head)}, one for each column"
        )
    title = f"<h3>{_text(table.title)}</h3>\n" + (f'<p class="note">{_text(table.note)}</p>\n' if table.note else "")
    if not table.rows:
        return f"{title}<p>None.</p>"
    columns = list(zip(*table.rows))
    # In characters, of which the page has about 120 and the space between two columns takes 4.  Short columns keep
    # their width, long ones share what is left.
    longest = [max(map(len, column)) for column in columns]
    wanted = [max(12, len(name) + 4, min(100, most + 4)) for name, most in zip(table.head, longest)]
    wide = sum(width for width in wanted if width > 20)
    room = max(120 - sum(wanted) + wide, 40)
    widths = [width * min(1.0, room / wide) if width > 20 else width for width in wanted]
    kinds = [' class="number"' if all(map(_NUMBER.fullmatch, column)) else "" for column in columns]
    top = "".join(f'<th scope="col"{kind}>{_text(name)}</th>' for name, kind in zip(table.head, kinds))
    lines = []
    for row in table.rows:
        # On a narrow page each cell has a line of its own, and `data-name` heads it.
        cells = (
            f'<td data-name="{_text(name)}" dir="auto"{kind}>{_text(cell)}</td>'
            for name, kind, cell in zip(table.head, kinds, row)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    cols = "".join(f'<col style="width: {100 * width / sum(widths):.1f}%">' for width in widths)
    body = "\n".join(lines)
    return (
        f'{title}<table class="texts" style="width: {sum(widths):.0f}ch"><colgroup>{cols}</colgroup>'
        f"<thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table>"
    )


def _coloured(text: Masked) -> str:
    """The pieces in a line that wraps, each changed one with what it was above it; the legend says how many of each."""
    meanings = {"masked": "masked", "random": "replaced at random", "kept": "kept, and predicted all the same"}
    counts = Counter(text.fates)
    legend = " ".join(
        f'<span class="chip {fate}">{meaning}: {counts[fate]}</span>' for fate, meaning in meanings.items()
    )
    chips = []
    for old, new, fate in zip(text.before, text.after, text.fates):
        above = f"<rt>{_text(old)}</rt>" if fate in ("masked", "random") else ""
        inside = f"<ruby>{_text(new)}{above}</ruby>" if above else _text(new)
        chips.append(f'<span class="chip {fate}">{inside}</span>' if fate else f"<span>{inside}</span>")
    return (
        f'<h3>{_text(text.title)}</h3>\n<p class="note">{sum(text.predicted)} of {len(text.before)} tokens are to be '
        f"predicted; above those that were changed stands what they were.</p>\n<p>{legend}</p>\n"
        f'<p class="pieces" dir="auto">{" ".join(chips)}</p>'
    )


def _alone(inner: str) -> str:
    """A part of the page as an output of a notebook, whose paper and ink it takes, light or dark."""
    return f'<div class="jaxlm"><style>{_STYLE_ALONE}</style>\n{inner}\n</div>'


def _html(title: str, body: str, style: str = "") -> str:
    """A whole page."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(title)}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


# Curves that say how a run went, not what it reached.
_OF_THE_RUN = {"learning_rate", "grad_norm", "tokens_per_second", "mfu", "step_ms", "data_share"}
_OF_THE_RUN |= {"memory_bytes", "process_memory_bytes"}


def _page(
    name: str,
    facts: dict[str, str],
    curves: dict[str, str],
    table: str,
    details: str,
    sample: str | None,
    config: dict[str, Any],
) -> str:
    sections = []
    if facts:
        summary = _table((), [[_text(key), _text(value)] for key, value in facts.items()])
        sections.append(f'<section class="facts" aria-label="Key facts">{summary}</section>')
    results = [figure for name, figure in curves.items() if name not in _OF_THE_RUN]
    shown = _grid(results) if results else "<p>Nothing has been measured yet.</p>"
    sections.append(f"<section><h2>Curves</h2>\n{shown}</section>")
    if table:
        region = (
            'class="scroll" role="region" aria-label="Evaluations by step" tabindex="0"'  # the keyboard can scroll it
        )
        note = '<p class="note">The best of each column is bold.</p>' if "<strong>" in table else ""
        sections.append(f"<section><h2>Held-out evaluations</h2>\n{note}\n<div {region}>{table}</div></section>")
    if details:
        sections.append(f"<section><h2>Details</h2>\n{details}</section>")
    if sample:
        text = f'<pre class="sample" dir="auto">\n{_text(sample)}</pre>'  # HTML drops the first newline of a pre
        sections.append(f"<section><h2>Sample</h2>\n{text}</section>")
    if further := [figure for name, figure in curves.items() if name in _OF_THE_RUN]:
        sections.append(f"<section><h2>Optimizer and machine</h2>\n{_grid(further)}</section>")
    values = _text(json.dumps(config, indent=2, ensure_ascii=False, default=str))
    sections.append(f"<details><summary>Resolved config</summary>\n<pre>\n{values}</pre></details>")
    header = f'<header><p class="kicker">jaxlm run</p><h1>{_text(name)}</h1></header>'
    main = "\n".join(["<main>", *sections, "</main>"])
    return _html(f"{name} – jaxlm run", f"{header}\n{main}", _STYLE)


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
h3 { margin: 2.25rem 0 .75rem; font-size: 1.1rem; overflow-wrap: anywhere; }
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
table + .grid { margin-top: 2.25rem; }
figure { margin: 0; min-width: 0; }
img { display: block; width: 100%; height: auto; mix-blend-mode: multiply; }
figcaption {
  margin-top: .35rem; padding-left: .1rem; color: var(--soft); font-size: .95rem; font-style: italic;
  overflow-wrap: anywhere;
}
.grid .note { margin: 0; }
.texts { table-layout: fixed; max-width: 100%; }
.texts th, .texts td { white-space: normal; overflow-wrap: anywhere; vertical-align: baseline; text-align: start; }
.texts .number { text-align: right; white-space: nowrap; }
.texts td:first-child { padding-left: 0; }
.scroll { max-height: 32rem; overflow: auto; }
.scroll:focus-visible, .many:focus-visible, summary:focus-visible {
  outline: 2px solid var(--accent); outline-offset: 3px;
}
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
  .many { overflow-x: auto; }
  .many img { width: 34rem; max-width: none; }
  .texts, .texts tbody, .texts tr, .texts td { display: block; width: auto !important; }
  .texts thead { display: none; }
  .texts tr { padding: .6rem 0; border-bottom: 1px solid var(--rule); }
  .texts td, .texts .number { padding: 0; border: 0; text-align: start; white-space: normal; }
  .texts td::before { content: attr(data-name); display: block; color: var(--soft); font-style: italic; }
}
@media (prefers-color-scheme: dark) { img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; } }
@media print { .grid .note { margin: 0; }
.texts { table-layout: fixed; max-width: 100%; }
.texts th, .texts td { white-space: normal; overflow-wrap: anywhere; vertical-align: baseline; text-align: start; }
.texts .number { text-align: right; white-space: nowrap; }
.texts td:first-child { padding-left: 0; }
.scroll { max-height: none; } figure, tr { break-inside: avoid; } }
"""
_STYLE_ALONE = """
.jaxlm { --rule: rgba(128, 128, 128, .4); max-width: 60rem; font-family: Georgia, "Times New Roman", serif; }
.jaxlm h3 { margin: .25rem 0; font-size: 1.1rem; font-weight: bold; }
.jaxlm .note { margin: 0 0 .5rem; opacity: .75; font-style: italic; }
.jaxlm table.texts { table-layout: fixed; max-width: 100%; margin: 0; border-collapse: collapse; font-size: .95rem; }
.jaxlm .texts th, .jaxlm .texts td {
  padding: .3rem 0 .3rem 1.25rem; border-bottom: 1px solid var(--rule); white-space: normal; overflow-wrap: anywhere;
  vertical-align: baseline; text-align: start; max-width: none;
}
.jaxlm .texts th { font-weight: normal; font-style: italic; opacity: .75; }
.jaxlm .texts th:first-child, .jaxlm .texts td:first-child { padding-left: 0; }
.jaxlm .texts .number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.jaxlm .pieces { line-height: 2.6; overflow-wrap: anywhere; margin: .5rem 0; }
.jaxlm .chip { padding: .1em .3em; border-radius: .25em; white-space: nowrap; }
.jaxlm .chip rt { font-size: .7em; font-style: italic; }
.jaxlm .masked { background: rgba(64, 132, 184, .28); box-shadow: inset 0 -2px #4084b8; }
.jaxlm .random { background: rgba(212, 100, 64, .28); box-shadow: inset 0 -2px #d46440; }
.jaxlm .kept { background: rgba(96, 152, 112, .28); box-shadow: inset 0 -2px #609870; }
@media (max-width: 40rem) {
  .jaxlm .texts, .jaxlm .texts tbody, .jaxlm .texts tr, .jaxlm .texts td { display: block; width: auto !important; }
  .jaxlm .texts thead, .jaxlm .texts colgroup { display: none; }
  .jaxlm .texts tr { padding: .5rem 0; border-bottom: 1px solid var(--rule); }
  .jaxlm .texts td, .jaxlm .texts .number { padding: 0; border: 0; text-align: start; white-space: normal; }
  .jaxlm .texts td::before { content: attr(data-name) " "; opacity: .75; font-style: italic; }
}
"""
