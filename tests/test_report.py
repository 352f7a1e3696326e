"""The report: every picture and the page are there, whatever a run left behind."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from jaxlm import report
from jaxlm.errors import RunError

PNG = b"\x89PNG\r\n\x1a\n"
ALWAYS = {"loss", "learning_rate", "grad_norm", "tokens_per_second"}


def training(step: int, **more: float) -> dict[str, float]:
    row = {"step": step, "loss": 9 / step**0.2, "learning_rate": 1e-3 / step, "grad_norm": 1 / step}
    return row | {"tokens_per_second": 1.25e6, "examples_per_second": 2000.0} | more


def write_metrics(folder: Path, rows: list[dict], tail: str = "") -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


class Outline(HTMLParser):
    """Tags with their attributes; fails where an end tag does not close the last open one."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
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
    ],
)
def test_every_metric_has_its_picture(tmp_path, evaluation, more):
    rows = [training(step, accuracy=0.3, masked_lm_loss=2.5) for step in range(1, 61)]
    rows += [{"step": step, **evaluation} for step in (30, 60)]
    paths = report.curves(rows, tmp_path)
    assert {path.stem for path in paths} == ALWAYS | more == {path.stem for path in tmp_path.iterdir()}
    assert all(path.read_bytes().startswith(PNG) for path in paths)


def test_the_page_is_whole(tmp_path):
    rows = [training(step) for step in range(1, 50)]
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
    assert "a &amp; b" in page and "&lt;1" in page and "&quot;steps&quot;: 49" in page
    assert report.write(folder, {}, {}, None).read_text() != page  # written over


def test_a_nasty_sample_stays_text(tmp_path):
    sample = "</pre><script>alert(1)</script> & \x00\x1b[31m \ud800 end"
    page = report.write(write_metrics(tmp_path, []), {"x": "<script>"}, {"<b>": "<script>"}, sample).read_text()
    assert not Outline(page).all("script") and "&lt;/pre&gt;&lt;script&gt;alert(1)" in page
    assert "\x00" not in page and "\x1b" not in page


def test_a_torn_last_line_is_ignored_and_any_other_refused(tmp_path):
    rows = [training(1), training(2)]
    assert report.read_metrics(write_metrics(tmp_path, rows)) == rows
    assert report.read_metrics(write_metrics(tmp_path, rows, '{"step": 3, "lo')) == rows
    with pytest.raises(RunError, match=r"line 3 .*remove that line"):
        report.read_metrics(write_metrics(tmp_path, rows, '{"step": 3, "lo\n{"step": 4}\n'))


@pytest.mark.parametrize("exists", [True, False])
def test_nothing_measured(tmp_path, exists):
    if exists:
        write_metrics(tmp_path, [])
    page = report.write(tmp_path, {}, {}, None).read_text()
    assert report.curves([], tmp_path) == [] and "Nothing has been measured" in page
    Outline(page)


def test_one_point(tmp_path):
    rows = [training(1), {"step": 1, "eval/loss": 3.0, "eval/perplexity": 20.0}]
    page = report.write(write_metrics(tmp_path, rows), {}, {}, None).read_text()
    assert len(Outline(page).all("img")) == 1  # the loss; the rest stands in the table


def test_a_log_axis_leaves_out_zeros():
    rows = [training(1), training(2, grad_norm=0.0), training(3)]
    chart = next(c for c in report._charts(rows) if c.name == "grad_norm")
    assert chart.series[0].steps.tolist() == [1, 3]


def test_what_is_not_finite_is_skipped(tmp_path):
    rows = [training(step, loss=math.nan if step % 2 else 3.0, grad_norm=step % 2 and math.inf) for step in range(1, 9)]
    rows += [{"step": 8, "eval/loss": math.nan, "eval/perplexity": math.inf}]
    folder = write_metrics(tmp_path, rows)
    page = report.write(folder, {}, {}, None).read_text()
    assert {path.stem for path in (folder / "report").iterdir()} == ALWAYS - {"grad_norm"}
    steps, values = report._points(rows, "loss")
    assert steps.tolist() == [2, 4, 6, 8] and values.tolist() == [3.0] * 4
    assert ">nan<" in page  # the table tells it


def test_smoothing_keeps_a_constant_and_does_not_lag():
    line = np.arange(400.0)
    np.testing.assert_allclose(report._smooth(np.full(400, 2.5)), 2.5)
    np.testing.assert_allclose(report._smooth(line)[:390], line[:390])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0, 0.5, 1], ["0", "0.5", "1.0"]),
        ([5000, 12500], ["5,000", "12,500"]),
        ([1e6, 1.25e6], ["1.00 M", "1.25 M"]),
        ([0.0001], ["0.0001"]),
    ],
)
def test_ticks_are_readable(values, said):
    assert report._readable(values) == said


def test_matplotlib_is_imported_only_to_draw_and_pyplot_never(tmp_path):
    code = """
import sys, pathlib, jaxlm.report
assert "matplotlib" not in sys.modules
jaxlm.report.curves([{"step": 1, "loss": 2.0}], pathlib.Path(sys.argv[1]))
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[1], check=True)
