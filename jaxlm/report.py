"""The page of a run: its curves, its evaluations and whatever else a task has to show.

`write` is the whole of it: `metrics.jsonl` -> `curves` (PNGs in RUN/report/) -> RUN/report.html, which holds its
pictures inside, asks nothing of the network and runs no script, so that it can be mailed as it is.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlm.errors import RunError
from jaxlm.pictures import COLORS, Bars, Chart, Heatmap, Histogram, Series, best, draw


class Table(NamedTuple):
    """Rows of plain text, such as the most confident mistakes; long texts wrap."""

    title: str
    head: tuple[str, ...]
    rows: list[list[str]]
    note: str  # what the rows are, in words


Section = Heatmap | Bars | Histogram | Table


class Kind(NamedTuple):
    """A kind of metric, as the last word of a metric's name tells it: `f1` of `ner/macro_f1`."""

    family: str  # the metrics of one picture
    words: str


class Family(NamedTuple):
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
FAMILIES = {
    "loss": Family("Loss", "loss (nats)", "low"),
    "part_loss": Family("Parts of the loss", "loss (nats)", "low"),
    "perplexity": Family("Perplexity", "perplexity (log scale)", "low", log=True),
    "bits_per_byte": Family("Bits per byte", "bits per byte of text", "low"),
    "accuracy": Family("Accuracy", "correct predictions (%)", "high", percent=True),
    "f1": Family("", "score (%)", "high", percent=True),
    "recall@": Family("Recall among the first k", "found among the first k (%)", "high", percent=True),
    "mrr": Family("Mean reciprocal rank", "mean reciprocal rank (0 to 1)", "high"),
    "correlation": Family("Correlation", "correlation (−1 to 1)", "high"),
    "mse": Family("Mean squared error", "mean squared error (label units²)", "low"),
    "translation": Family("", "score (0 to 100)", "high"),
    "rouge": Family("ROUGE", "F1 of words (%)", "high", percent=True),
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
    charts = _charts(rows)
    drawn = [*charts, *(section for section in sections if not isinstance(section, Table))]
    figures = [_figure(picture, path) for picture, path in zip(drawn, _paths(drawn, folder / "report"))]
    details = _details(sections, iter(figures[len(charts) :]))
    page = _page(folder.resolve().name, facts, figures[: len(charts)], _evaluations(rows), details, sample, config)
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
    peak = rate[0].values.max(initial=0.0)
    power = math.floor(math.log10(peak)) if peak > 0 else 0
    unit = rf"learning rate ($\times 10^{{{power}}}$)"
    charts += [
        Chart("learning_rate", "Learning rate", unit, rate, scale=10.0**-power, smooth=False, zero=True),
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
    said = FAMILIES.get(family) or Family("", _plain(family), None)
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
    family = FAMILIES.get(_metric(name).family)
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
    families = {name: FAMILIES.get(_metric(name).family) for name in names}
    top = {
        name: best(family.better, values)
        for name, values in columns.items()
        if (family := families[name]) and len(values) > 1
    }

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


def _page(
    name: str,
    facts: dict[str, str],
    figures: list[str],
    table: str,
    details: str,
    sample: str | None,
    config: dict[str, Any],
) -> str:
    sections = []
    if facts:
        summary = _table((), [[_text(key), _text(value)] for key, value in facts.items()])
        sections.append(f'<section class="facts" aria-label="Key facts">{summary}</section>')
    shown = _grid(figures) if figures else "<p>Nothing has been measured yet.</p>"
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
