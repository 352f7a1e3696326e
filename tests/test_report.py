"""The report: the page and all plots are written for every content of a run folder."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from jaxlm.errors import RunError, UserError
from jaxlm.reports import charts, metrics, pages, pictures, report
from jaxlm.reports.report import Bars, Heatmap, Histogram, Table

PNG = b"\x89PNG\r\n\x1a\n"
ALWAYS = {"loss", "learning_rate", "grad_norm", "tokens_per_second"}


def training_row(step: int, **values: float) -> dict[str, float]:
    row = {"step": step, "loss": 9 / step**0.2, "learning_rate": 1e-3 / step, "grad_norm": 1 / step}
    return row | {"tokens_per_second": 1.25e6, "examples_per_second": 2000.0} | values


def write_metrics(folder: Path, rows: list[dict], tail: str = "") -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


class Outline(HTMLParser):
    """Collects tags with their attributes. Fails if an end tag does not close the last open tag."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "col"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.parametrize(
    ("evaluation", "more"),
    [
        ({}, set()),
        ({"eval/loss": 3.0, "eval/perplexity": 20.1, "eval/bits_per_byte": 1.6}, {"perplexity", "bits_per_byte"}),
        (
            {"eval/masked_lm_loss": 2.0, "eval/accuracy": 0.4, "eval/next_sentence_accuracy": 0.9},
            {"part_loss", "accuracy"},
        ),
        ({"eval/something/new": 7}, {"something_new"}),
        ({"eval/ner/f1": 0.5, "eval/ner/precision": 0.4, "eval/pos/accuracy": 0.9}, {"f1", "accuracy"}),
        ({"eval/pearson": 0.5, "eval/spearman": 0.4, "eval/mse": 2.0, "eval/matthews": -0.1}, {"correlation", "mse"}),
        ({f"eval/task{i}/accuracy": i / 9 for i in range(9)}, {"accuracy_1", "accuracy_2", "accuracy_3"}),
        ({"eval/recall@1": 0.1, "eval/recall@5": 0.3, "eval/mrr": 0.2}, {"recall", "mrr"}),
    ],
)
def test_every_metric_has_a_plot(tmp_path, evaluation, more):
    rows = [training_row(step, accuracy=0.3, masked_lm_loss=2.5) for step in range(1, 61)]
    rows += [{"step": step, **evaluation} for step in (30, 60)]
    paths = report.curves(rows, tmp_path)
    assert {path.stem for path in paths} == ALWAYS | more == {path.stem for path in tmp_path.iterdir()}
    assert all(path.read_bytes().startswith(PNG) for path in paths)


def test_costs_of_a_run_have_plots(tmp_path):
    times = {"step_ms_p50": 10.0, "step_ms_p90": 11.0, "step_ms_p99": 20.0}
    cost = {**times, "mfu": 0.4, "data_share": 0.01, "memory_bytes": 6 * 10**10}
    rows = [training_row(step, **cost) for step in range(1, 61)]
    paths = report.curves(rows, tmp_path)
    assert {path.stem for path in paths} == ALWAYS | {"mfu", "step_ms", "data_share", "memory_bytes"}
    page = report.write(write_metrics(tmp_path, rows), {}, {}, None).read_text()
    assert "median 40.0 %" in page and "median 10 ms" in page and "60 GB" in page
    rows = [training_row(step, process_memory_bytes=step) for step in (1, 2)]
    assert {path.stem for path in report.curves(rows, tmp_path)} == ALWAYS | {"process_memory_bytes"}


def test_the_page_is_complete(tmp_path):
    rows = [training_row(step) for step in range(1, 50)]
    rows += [{"step": step, "eval/loss": 4 - step / 50, "eval/accuracy": step / 100} for step in (20, 40)]
    folder = write_metrics(tmp_path, rows)
    path = report.write(folder, {"steps": 49}, {"held-out loss": "3.2", "a & b": "<1"}, "once upon\na time")
    page = path.read_text()
    outline = Outline(page)
    assert path == folder / "report.html" and not list(folder.glob("*.tmp"))
    assert outline.all("html") == [{"lang": "en"}] and len(outline.all("title")) == len(outline.all("h1")) == 1
    images = outline.all("img")
    assert len(images) == len(list((folder / "report").glob("*.png"))) == 5
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in images)
    assert not outline.all("script") and not outline.all("link") and "http" not in page and "@import" not in page
    assert {attributes["scope"] for attributes in outline.all("th")} == {"row", "col"}
    assert "<strong>3.200</strong>" in page and "<strong>40.00 %</strong>" in page and "<strong>3.600" not in page
    assert "a &amp; b" in page and "&lt;1" in page and "&#34;steps&#34;: 49" in page
    assert report.write(folder, {}, {}, None).read_text() != page  # overwritten


def test_html_in_a_sample_is_escaped(tmp_path):
    sample = "</pre><script>alert(1)</script> & \x00\x1b[31m \ud800 end"
    page = report.write(write_metrics(tmp_path, []), {"x": "<script>"}, {"<b>": "<script>"}, sample).read_text()
    assert not Outline(page).all("script") and "&lt;/pre&gt;&lt;script&gt;alert(1)" in page
    assert "\x00" not in page and "\x1b" not in page


def test_an_incomplete_last_line_is_ignored_and_any_other_raises_an_error(tmp_path):
    rows = [training_row(1), training_row(2)]
    assert report.read_metrics(write_metrics(tmp_path, rows)) == rows
    assert report.read_metrics(write_metrics(tmp_path, rows, '{"step": 3, "lo')) == rows
    with pytest.raises(RunError, match=r"line 3 .*remove that line"):
        report.read_metrics(write_metrics(tmp_path, rows, '{"step": 3, "lo\n{"step": 4}\n'))


@pytest.mark.parametrize("exists", [True, False])
def test_a_run_without_metrics_has_a_page(tmp_path, exists):
    if exists:
        write_metrics(tmp_path, [])
    page = report.write(tmp_path, {}, {}, None).read_text()
    assert report.curves([], tmp_path) == [] and "Nothing has been measured" in page
    Outline(page)


def test_metrics_with_one_point_are_in_the_table(tmp_path):
    rows = [training_row(1), {"step": 1, "eval/loss": 3.0, "eval/perplexity": 20.0}]
    page = report.write(write_metrics(tmp_path, rows), {}, {}, None).read_text()
    assert len(Outline(page).all("img")) == 1  # the loss; the table has the rest


def test_a_log_axis_omits_zeros():
    rows = [training_row(1), training_row(2, grad_norm=0.0), training_row(3)]
    chart = next(c for c in charts.charts_of_rows(rows) if c.name == "grad_norm")
    assert chart.series[0].steps.tolist() == [1, 3]


def test_values_that_are_not_finite_are_skipped(tmp_path):
    rows = [
        training_row(step, loss=math.nan if step % 2 else 3.0, grad_norm=step % 2 and math.inf) for step in range(1, 9)
    ]
    rows += [{"step": 8, "eval/loss": math.nan, "eval/perplexity": math.inf}]
    folder = write_metrics(tmp_path, rows)
    page = report.write(folder, {}, {}, None).read_text()
    assert {path.stem for path in (folder / "report").iterdir()} == ALWAYS - {"grad_norm"}
    steps, values = metrics.points(rows, "loss")
    assert steps.tolist() == [2, 4, 6, 8] and values.tolist() == [3.0] * 4
    assert ">nan<" in page  # the table shows it


def test_smoothing_keeps_a_constant_and_does_not_lag():
    line = np.arange(400.0)
    np.testing.assert_allclose(pictures.smooth(np.full(400, 2.5)), 2.5)
    np.testing.assert_allclose(pictures.smooth(line), line)
    noisy = np.random.default_rng(0).normal(size=400)
    assert pictures.smooth(noisy)[-1] == noisy[-1]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0, 0.5, 1], ["0", "0.5", "1.0"]),
        ([5000, 12500], ["5,000", "12,500"]),
        ([1e6, 1.25e6], ["1.00 M", "1.25 M"]),
        ([0.0001], ["0.0001"]),
    ],
)
def test_ticks_are_readable(values, texts):
    assert pictures.readable(values) == texts


def test_matplotlib_is_imported_only_to_draw_and_pyplot_never(tmp_path):
    code = """
import sys, pathlib, jaxlm.reports.report
assert "matplotlib" not in sys.modules
from jaxlm.reports import report
report.curves([{"step": 1, "loss": 2.0}], pathlib.Path(sys.argv[1]))
report.write(pathlib.Path(sys.argv[1]), {}, {}, None, [report.Bars("F1", ("a",), (1.0,), "F1")])
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[1], check=True)


@pytest.mark.parametrize(
    ("name", "metric", "cell"),
    [
        ("accuracy", ("", "", "accuracy", "accuracy"), "50.00 %"),
        ("masked_lm_accuracy", ("", "masked_lm", "accuracy", "accuracy"), "50.00 %"),
        ("ner/f1", ("ner", "", "F1", "f1"), "50.00 %"),
        ("my/ner/macro_f1", ("my/ner", "macro", "F1", "f1"), "50.00 %"),
        ("exact", ("", "", "exact match", "f1"), "50.00 %"),
        ("recall", ("", "", "recall", "f1"), "50.00 %"),
        ("recall@10", ("", "", "recall@10", "recall@"), "50.00 %"),
        ("mrr@10", ("", "", "mean reciprocal rank@10", "mrr"), "0.500"),
        ("loss", ("", "", "loss", "loss"), "0.500"),
        ("ner/loss", ("ner", "", "loss", "part_loss"), "0.500"),
        ("bits_per_byte", ("", "", "bits per byte", "bits_per_byte"), "0.500"),
        ("cola/matthews", ("cola", "", "Matthews", "correlation"), "0.500"),
        ("my/unknown_metric", ("", "", "my/unknown_metric", "my/unknown_metric"), "0.500"),
    ],
)
def test_a_name_is_parsed_into_its_metric(name, metric, cell):
    assert metrics.parse_name(name) == metric and metrics.number(name, 0.5) == cell


def test_every_kind_of_metric_has_a_family():
    assert {kind.family for kind in metrics.METRIC_KINDS.values()} | {"part_loss"} == set(metrics.SCORE_FAMILIES)


def test_labels_of_curves_do_not_repeat_the_title():
    def title_and_labels(*names: str) -> tuple[str, list[str]]:
        rows = [{"step": step, **{f"eval/{name}": 0.5 for name in names}} for step in (1, 2)]
        chart = charts.charts_of_rows(rows)[0]
        return chart.title, [series.label for series in chart.series]

    assert title_and_labels("f1") == ("F1", ["held-out"])
    assert title_and_labels("ner/f1") == ("F1 (ner)", ["held-out"])
    assert title_and_labels("ner/f1", "pos/f1") == ("F1", ["ner", "pos"])
    assert title_and_labels("ner/f1", "ner/recall") == ("F1, recall (ner)", ["F1", "recall"])
    assert title_and_labels("ner/macro_f1", "squad/exact") == ("F1, exact match", ["ner macro F1", "squad exact match"])
    assert title_and_labels("accuracy", "next_sentence_accuracy") == ("Accuracy", ["accuracy", "next sentence"])


def test_the_best_error_is_the_lowest(tmp_path):
    rows = [{"step": step, "eval/mse": value, "eval/pearson": value} for step, value in ((1, 0.25), (2, 0.75))]
    page = report.write(write_metrics(tmp_path, rows), {}, {}, None).read_text()
    assert page.count("<strong>") == 2
    assert "<td><strong>0.250</strong></td><td>0.250</td>" in page
    assert "held-out 0.75 (best 0.25 at step 1)" in page and "held-out 0.75, its best" in page


def test_captions_give_the_configured_peak_and_the_last_value(tmp_path):
    rows = [training_row(step, learning_rate=4e-5 / step, loss=float(step)) for step in range(1, 101)]
    rows += [{"step": step, "eval/accuracy": 0.5} for step in (50, 100)]
    page = report.write(write_metrics(tmp_path, rows), {"optimizer": {"rate": 5e-5}}, {}, None).read_text()
    assert "peak 5e-5, last 4e-7" in page  # the warm-up reached the peak between two rows of the log
    assert "<figcaption>training 100</figcaption>" in page
    assert "<figcaption>held-out 50.0 %</figcaption>" in page and "<strong>" not in page  # all are equal


def test_the_best_baseline_is_a_line_in_the_chart_of_its_score(tmp_path):
    rows = [{"step": step, "eval/mse": 1 / step, "eval/f1": 0.5, "eval/macro_f1": 0.4} for step in (1, 2)]
    scores = ({"mse": 0.7, "f1": 0.9}, {"mse": 0.6}, {"mse": math.nan}, {})
    baselines = [{"name": f"baseline {n}", "scores": part, "note": ""} for n, part in enumerate(scores)]
    write_metrics(tmp_path, rows)
    (tmp_path / "baseline.json").write_text(json.dumps(baselines))
    assert "held-out 0.5, its best; baseline baseline 1 0.6" in report.write(tmp_path, {}, {}, None).read_text()
    lines = {chart.name: chart.baseline for chart in charts.charts_of_run(tmp_path)}
    assert lines["mse"] == ("baseline 1", 0.6) and lines["f1"] is None  # a chart of two scores has no line
    for content in ("", "{}", "[1]", '[{"name": "a", "scores": {"mse": "x"}}]'):
        (tmp_path / "baseline.json").write_text(content)
        assert all(chart.baseline is None for chart in charts.charts_of_run(tmp_path))


# Sections

STRANGE = ("体育", "شعر", "a" * 90 + "1" + "z" * 30, "a" * 90 + "2" + "z" * 30, "$5 or $10", "", "line\nbreak")


def confusion(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 9, (n, n)) + np.diag(np.full(n, 50))


@pytest.mark.parametrize(
    ("picture", "parts"),
    [
        (Heatmap("One", np.array([[7]]), ("only",)), ["100.0 % of 7 are correct", "blue cells are correct"]),
        (
            Heatmap("Two", np.array([[8, 2], [1, 9]]), ("no", "yes")),
            ["85.0 % of 20", "no predicted as yes, 2 of 10 (20.0 %)"],
        ),
        (Heatmap("Unseen", np.array([[3, 0], [0, 0]]), ("a", "b")), ["100.0 % of 3"]),
        (Heatmap("Large", 10**7 * confusion(12), tuple("abcdefghijkl")), ["are correct"]),
        (Heatmap("Many", confusion(150), tuple(f"class {i}" for i in range(150))), ["130 others are merged"]),
        (Heatmap("Strange", confusion(7), STRANGE), ["#0: \u2068体育\u2069; #1: ", "#2: aaa", "#5: an empty name"]),
        (Bars("F1", ("PER", "LOC"), (91.25, 88.0), "F1 (%)"), ["PER 91.2; LOC 88.0."]),
        (Bars("F1", tuple("abcd"), (1, 2, math.nan, 6), "n"), ["Mean 3; highest 6 (d), lowest 1 (a). –: no value."]),
        (Bars("Signs", STRANGE, (-0.5, 0.5, 0, 1, 2, 3, 4), "score"), ["lowest -0.500 (\u2068体育\u2069)", "#3: aaa"]),
        (Bars("Zeros", ("a",), (0.0,), "score"), ["a 0."]),
        (Bars("Many", tuple(map(str, range(99))), tuple(map(float, range(99))), "n"), ["first 30 of 99"]),
        (Histogram("Some", np.array([1, 2, 3, 9]), "tokens", 3), ["4 values: median 2.5", "limit of 3: 1 (25 %)."]),
        (Histogram("All", np.arange(500), "tokens", 499.0), ["limit of 499: none."]),
        (Histogram("Far", np.array([1, 2, 3]), "tokens", 512.0), ["none. The limit is outside"]),
        (Histogram("Equal", np.full(5, 0.25), "score", None), ["5 values: median 0.250"]),
        (Histogram("One", np.array([7]), "tokens", 7), ["none."]),
        (Histogram("Zeros", np.zeros(3), "tokens", None), ["maximum 0."]),
        (Histogram("Tail", np.r_[np.arange(1, 400), 10**6], "tokens", 64), ["The 1 above 495 are not drawn"]),
        (Histogram("Holes", np.array([1.5, math.nan, math.inf, 2.5]), "score", None), ["2 values"]),
    ],
    ids=lambda value: value.title if hasattr(value, "title") else "",
)
def test_a_plot_has_a_fixed_width_and_a_caption(tmp_path, picture, parts):
    caption = pictures.draw(picture, tmp_path / "x.png")
    assert all(part in caption for part in parts), caption
    png = (tmp_path / "x.png").read_bytes()
    assert png.startswith(PNG) and int.from_bytes(png[16:20], "big") == 1104  # 4.6 inches, as wide as the curves


@pytest.mark.parametrize(
    "picture",
    [
        Heatmap("Nothing", np.zeros((0, 0), int), ()),
        Heatmap("Nothing", np.zeros((2, 2), int), ("a", "b")),
        Bars("Nothing", (), (), "%"),
        Bars("Nothing", ("a",), (math.nan,), "%"),
        Histogram("Nothing", np.zeros(0), "tokens", 128),
        Histogram("Nothing", np.array([math.nan]), "tokens", None),
    ],
)
def test_an_empty_plot_is_reported(tmp_path, picture):
    assert pictures.draw(picture, tmp_path / "x.png") is None and not list(tmp_path.iterdir())
    page = report.write(tmp_path, {}, {}, None, [picture]).read_text()
    assert "Nothing: nothing to show." in page and not Outline(page).all("img")


def test_merging_keeps_every_example_and_the_large_classes():
    counts = np.diag([5, 0, 9, 1, 7]) + 1
    merged = pictures._merge_classes(counts, np.array([0, 2, 4]))
    assert merged.sum() == counts.sum() and merged.tolist() == [[6, 1, 1, 2], [1, 10, 1, 2], [1, 1, 8, 2], [2, 2, 2, 5]]


def test_the_largest_fraction_of_a_row_has_the_darkest_colour():
    shades = pictures._shades(np.array([[0.9, 0.1], [0.0, 1.0]]), merged=False)
    assert shades.min() >= 0 and shades[1, 0].tolist() == [1, 1, 1]
    assert shades.sum(-1).argmin(1).tolist() == [0, 1]
    assert shades[0, 0, 2] > shades[0, 0, 0] and shades[0, 1, 0] > shades[0, 1, 2]  # blue is correct, rust is wrong


def test_the_limit_is_an_edge_of_a_bar():
    for low, high, limit in ((0, 384, 384), (0, 1000, 128), (17, 90, 55), (3, 3, 3)):
        edges = pictures._edges(low, high, limit + 0.5)
        assert limit + 0.5 in edges and edges[0] <= low - 0.5 and edges[-1] >= high + 0.5 and len(edges) <= 43


def test_sections_follow_the_curves_in_order(tmp_path):
    note = "a note on the rows"
    sections = [
        Heatmap("Confusion", confusion(3), ("a", "b", "c")),
        Bars("Loss", ("x",), (1.0,), "n"),  # its file must not overwrite that of the curve
        Table("Mistakes", ("text", "true", "confidence"), [["<b>شعر</b> & co", "a\nb", "99.1 %"]], note),
        Histogram("Lengths", np.arange(9), "tokens", 8),
        Table("No mistakes", ("text", "true"), [], ""),
    ]
    rows = [training_row(step) for step in range(1, 5)]
    page = report.write(write_metrics(tmp_path, rows), {}, {}, "a sample", sections).read_text()
    outline = Outline(page)
    alts = [image["alt"] for image in outline.all("img")]
    assert [alt.split(" by step")[0] for alt in alts][:4] == ["Loss", "Confusion", "Loss", "Lengths"]
    assert len(alts) == 7 and alts[4].startswith("Learning rate")  # charts of the machine come last
    assert len(list((tmp_path / "report").glob("*.png"))) == 7
    marks = [">Curves<", ">Details<", 'alt="Confusion"', 'alt="Loss"', ">Mistakes<", 'alt="Lengths"', ">No mistakes<"]
    marks += [">Sample<", ">Optimizer and machine<", 'alt="Gradient norm']
    positions = [
        page.index(mark, page.index(">Curves<") if "Loss" not in mark else page.index(">Details<")) for mark in marks
    ]
    assert positions == sorted(positions)
    assert "&lt;b&gt;شعر&lt;/b&gt; &amp; co" in page and "<b>" not in page and note in page and "<p>None.</p>" in page
    cells = outline.all("td")
    assert [cell["data-name"] for cell in cells] == ["text", "true", "confidence"]
    assert all(cell["dir"] == "auto" for cell in cells) and cells[2]["class"] == "number"
    assert not outline.all("script") and "http" not in page


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (Heatmap("M", np.ones((2, 3)), ("a", "b")), r"2 names and counts of shape \[2, 3\]; give \[2, 2\]"),
        (Bars("M", ("a", "b"), (1.0,), "n"), "2 names and 1 values; give one value for each name"),
        (Table("M", ("a", "b"), [["1"]], ""), "has 1 cells; give 2"),
    ],
)
def test_sections_with_inconsistent_lengths_raise_an_error(tmp_path, section, message):
    with pytest.raises(ValueError, match=message):
        report.write(tmp_path, {}, {}, None, [section])


# Single plots, for notebooks and scripts


def write_run(folder: Path, steps: int, **values: float) -> Path:
    folder.mkdir()
    return write_metrics(
        folder, [training_row(step, **values) for step in range(1, steps + 1)] + [{"step": steps, "eval/f1": 0.5}]
    )


def test_a_curve_shows_one_run_and_a_comparison_several(tmp_path):
    runs = {name: write_run(tmp_path / name, steps) for name, steps in (("one", 50), ("two", 20))}
    assert report.curve(runs["one"]).title == "Loss"
    both = report.comparison(runs, "loss")
    assert [series.label for series in both.series] == ["one", "two"] and both.last == 50
    assert both.title == "Loss, training" and len({series.color for series in both.series}) == 2
    held_out = report.comparison(runs, "eval/f1")
    assert held_out.title == "F1, held-out" and held_out.percent and all(series.held_out for series in held_out.series)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: report.curve(folder, "los"), "no picture 'los'; perhaps you meant 'loss'"),
        (lambda folder: report.curve(folder / "none"), "no picture 'loss'; nothing has been logged there yet"),
        (
            lambda folder: report.comparison({"a": folder}, "eval/f2"),
            "no metric 'eval/f2'; perhaps you meant 'eval/f1'",
        ),
        (lambda folder: report.comparison({}), "0 runs cannot be compared in one picture; give 1 to 8"),
        (lambda folder: report.save(Table("T", ("a",), [["b"]], ""), folder / "t.png"), "ends in .html"),
        (lambda folder: report.save(Histogram("H", np.zeros(0), "u", None), folder / "h.png"), "nothing to show"),
        (lambda folder: report.mesh({"tensor": 3}), "mlp 2048, which the mesh splits 3 ways"),
    ],
)
def test_errors_name_the_remedy(tmp_path, call, message):
    with pytest.raises(UserError, match=message):
        call(write_run(tmp_path / "run", 5))


def test_a_notebook_displays_plots_and_tables(tmp_path):
    predictions = {"prediction": "yes", "confidence": 0.9}, {"prediction": "no", "confidence": 0.6}
    matrix = report.confusion(["yes", "yes"], predictions)
    assert matrix.names == ("no", "yes") and matrix.counts.tolist() == [[0, 0], [1, 1]]
    data, metadata = matrix._repr_mimebundle_()
    assert data["image/png"].startswith(PNG) and metadata["image/png"]["alt"].startswith(
        "Confusion matrix: 50.0 % of 2"
    )
    assert report.save(matrix, tmp_path / "matrix.png").read_bytes().startswith(PNG)
    table = report.misclassified(["a <b>", "c"], ["yes", "yes"], predictions)
    assert table.rows == [["c", "yes", "no", "60.0%"]]
    html = table._repr_mimebundle_()[0]["text/html"]
    assert Outline(html).all("table") and report.save(table, tmp_path / "t.html").read_text().count(html) == 1


def test_masked_text_shows_the_change_of_each_token():
    class Words:
        mask = 4

        def pieces(self, ids):
            return [("[CLS]", "the", "fox", "<den>", "[MASK]")[i] for i in ids]

    text = report.masked_text(Words(), [0, 1, 2, 3], [0, 1, 4, 1], [False, True, True, True])
    assert text.fates == ["", "kept", "masked", "random"]
    page = Outline(html := text._repr_mimebundle_()[0]["text/html"])
    assert [tag["class"] for tag in page.all("span") if "class" in tag][-3:] == [
        "chip kept",
        "chip masked",
        "chip random",
    ]
    assert "<rt>&lt;den&gt;</rt>" in html and "<rt>the</rt>" not in html


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}, {"data": 4, "context": 2}], ids=str
)
def test_a_mesh_shows_the_parts_of_its_devices(sizes):
    import jax

    from jaxlm.config import MeshConfig
    from jaxlm.devices import sharding

    shape, rows = (32, 64), 16
    plot = report.mesh(sizes, shape=shape, rows=rows)
    mesh = sharding.make_mesh(MeshConfig(**{"data": 1, **sizes}))
    positions = {device.id: n for n, device in enumerate(mesh.devices.flat)}
    full = lambda cut, size: slice(*cut.indices(size)[:2])
    for axes, of, parts in (
        (("width", "mlp"), shape, plot.parts),
        (("batch",), (rows,), [(cut,) for cut in plot.rows]),
    ):
        expected = jax.sharding.NamedSharding(mesh, sharding.spec(axes)).devices_indices_map(of)
        for device, cuts in expected.items():
            assert tuple(full(cut, size) for cut, size in zip(cuts, of)) == parts[positions[device.id]]
    assert plot.grid[0] * plot.grid[1] == 8 and plot._repr_mimebundle_()[0]["image/png"].startswith(PNG)


def test_attention_is_drawn_and_its_shape_is_checked():
    weights = np.full((2, 3), 1 / 3)
    picture = pictures.AttentionMap("Cross-attention", weights, ("Ein", "Hund"), ("a", "dog", "."))
    assert "Ein attends to a, 33%" in picture._repr_mimebundle_()[1]["image/png"]["alt"]
    with pytest.raises(ValueError, match="weights"):
        picture._replace(read=("a",))._repr_mimebundle_()


def test_cross_attention_of_a_translation_is_computed(tmp_path):
    import jax

    from jaxlm.config import ModelConfig, TokenizerConfig
    from jaxlm.data.tokenizers import tokenizer
    from jaxlm.lm import LM
    from jaxlm.nn.transformer import Transformer, init

    words = tokenizer.train(["a dog and a cat"] * 9, TokenizerConfig(train="characters"), 40, add_eos=True)
    sizes = {"vocabulary": 40, "width": 16, "layers": 2, "heads": 2, "max_length": 32}
    config = ModelConfig(**sizes, structure="encoder_decoder", start_token=0)
    module = Transformer(config)
    lm = LM(config, module, jax.jit(partial(init, module))(jax.random.key(0)), words)
    picture = report.attention(lm, "a dog", "a cat", layer=0)
    assert picture.read == ("a", "_", "d", "o", "g", "</s>") and picture.written[-1] == "</s>"
    heads = [report.attention(lm, "a dog", "a cat", layer=-2, head=n).weights_TS for n in (0, 1)]
    np.testing.assert_allclose(picture.weights_TS, np.mean(heads, 0), rtol=1e-5)
    np.testing.assert_allclose(picture.weights_TS.sum(1), 1, rtol=1e-5)
    with pytest.raises(UserError, match="layer is 2; the decoder has 2"):
        report.attention(lm, "a dog", "a cat", layer=2)
    with pytest.raises(UserError, match="requires an encoder-decoder"):
        report.attention(LM(ModelConfig(**sizes), module, None, words), "a", "b")


def test_a_live_curve_does_nothing_in_a_script(tmp_path, capsys):
    with report.live(tmp_path):
        print("output", file=sys.stderr)
    assert capsys.readouterr().err == "output\n"


def test_a_live_curve_keeps_its_last_state_after_an_error(tmp_path, monkeypatch):
    outputs = []

    class Handle:
        def __init__(self, first):
            self.n = len(outputs)
            outputs.append(first)

        def update(self, new, raw=False):
            outputs[self.n] = new

    display = lambda first, raw, display_id: Handle(first)
    shell = type("Shell", (), {"kernel": True})()
    fake = {"IPython": {"get_ipython": lambda: shell}, "IPython.display": {"display": display}}
    for name, content in fake.items():
        module = type(sys)(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(RunError, match="gone"), report.live(tmp_path / "run"):
        print("data  a few rows", file=sys.stderr)
        for step in (1, 2):
            print(f"\r\x1b[Kstep {step}", end="", file=sys.stderr)
        write_run(tmp_path / "run", 7)
        raise RunError("gone")
    chart, text = outputs
    assert chart.title == "Loss" and chart.last == 7 and text == {"text/plain": "data  a few rows\nstep 2"}


def test_hardware_is_described():
    assert "no accelerator" in report.hardware() and "slowly" in report.hardware()


def test_a_page_of_chapters_contains_its_text_pictures_and_tables(tmp_path):
    chapters = [
        pages.Chapter("First <one>", ["A paragraph & more."], [Bars("Gap", ("a", "b"), (0.2, 0.4), "points")]),
        pages.Chapter("Second", [], [Table("Rows", ("text", "score"), [["a text", "0.5"]], "One row.")]),
        pages.Chapter("Third"),
    ]
    page = pages.write_page(tmp_path / "audit.html", "m", "jaxlm audit", {"model": "a/b"}, chapters, '{"a": 1}')
    text = page.read_text()
    assert [path.name for path in (tmp_path / "audit").iterdir()] == ["gap.png"]
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["First &lt;one&gt;", "Second", "Third"]
    assert '<p class="prose">A paragraph &amp; more.</p>' in text and text.count("data:image/png;base64,") == 1
    assert "a text" in text and "jaxlm audit" in text and "a/b" in text and "<script" not in text
