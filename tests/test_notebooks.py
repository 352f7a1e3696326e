"""The notebooks: what is kept of them is whole, and each runs from top to bottom at its tiny size."""

from __future__ import annotations

import ast
import json
import re
import runpy
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = ["pretrain_bert", "quickstart", "scale", "sentiment", "translate"]
TITLES = {  # pictures and tables that each shows, by what stands for them in words
    "quickstart": ("Loss", "Learning rate"),
    "sentiment": ("The first reviews", "Loss", "Confusion matrix", "The most confident mistakes"),
    "pretrain_bert": ("Cleaning", "Loss", "A quarter of the tokens", "Blanks", "Accuracy, held-out", "Loss, training"),
    "translate": ("Loss", "Greedy and beam search", "Cross-attention (layer 1", "Cross-attention (layer 0"),
    "scale": ("A mesh of 8 devices: data 2, fsdp 2, tensor 2", "Where the parameters lie", "Loss, training", "Plan of"),
}


def cells(name: str, kind: str = "code") -> list[dict]:
    read = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in read if cell["cell_type"] == kind]


def outputs(name: str) -> list[dict]:
    return [output for cell in cells(name) for output in cell["outputs"]]


def text_of(output: dict) -> str:
    """All text of an output, but for pictures, and for the warning that the tiny run from scratch is meant to print."""
    found = [output.get("text", "")] + [value for mime, value in output.get("data", {}).items() if mime != "image/png"]
    return re.sub(" *warning +all [0-9]+ predictions are .*", "", "\n".join("".join(part) for part in found))


def shows(some: list[dict], title: str) -> bool:
    """Whether an output is a picture or a table of this title, which stands for it where only text is shown."""
    return any("".join(output.get("data", {}).get("text/plain", "")).startswith(title) for output in some)


def test_these_are_all():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


def test_the_first_cell_is_the_same_in_all():
    assert len({cells(name)[0]["source"] for name in NAMES}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept(name):
    badge = f"https://colab.research.google.com/github/jaxlm/jaxlm/blob/main/notebooks/{name}.ipynb"
    assert badge in cells(name, "markdown")[0]["source"]
    kept = outputs(name)
    assert [output for output in kept if output["output_type"] == "error" or output.get("name") == "stderr"] == []
    said = "\n".join(map(text_of, kept))
    assert re.findall(r".*(?:/tmp/|/work/|/home/|/root/|/Users/|[Ww]arning|Traceback).*", said) == []
    for title in TITLES[name]:
        assert shows(kept, title), title
    for output in kept:
        if "image/png" in output.get("data", {}):
            look = output["metadata"]["image/png"]
            assert look["width"] <= 640 and len(look["alt"]) > 10  # CSS pixels; what a reader who cannot see it hears


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_defined_in_a_notebook(name):
    for cell in cells(name):
        if cell["source"].startswith("%%writefile"):
            continue  # a config is a file with a function
        tree = ast.parse(re.sub(r"^(\s*)%.*", r"\1pass", cell["source"], flags=re.MULTILINE))
        made = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda))]
        assert not made, ast.unparse(made[0])


def test_what_is_kept_is_tidy():
    for name in NAMES:
        for cell in cells(name):
            assert cell["execution_count"] is None and cell["metadata"] == {}
            assert all(output.get("execution_count") is None for output in cell["outputs"])


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_top_to_bottom(name, tmp_path):
    for needed in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(needed, reason=f"{needed} is missing; install it with pip install 'jaxlm[test]'")
    begun = time.monotonic()
    notebook = runpy.run_path(str(FOLDER / "execute.py"))["execute"](name, tmp_path)
    print(f"{name}: {time.monotonic() - begun:.0f} s")
    afresh = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output for output in afresh if output.output_type == "error" or output.get("name") == "stderr"] == []
    assert "warning" not in "\n".join(map(text_of, afresh)).lower()
    titles = [title for title in TITLES[name] if title != "Plan of"]  # which needs libtpu
    assert [title for title in titles if not shows(afresh, title)] == []
