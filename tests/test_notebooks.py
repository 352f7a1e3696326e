"""The notebooks: their stored outputs are complete, and each notebook runs from top to bottom at its tiny size."""

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
TITLES = {  # the plots and tables of each notebook, by their titles
    "quickstart": ("Loss", "Learning rate"),
    "sentiment": ("The first reviews", "Loss", "Confusion matrix", "The most confident mistakes"),
    "pretrain_bert": ("Cleaning", "Loss", "A quarter of the tokens", "Blanks", "Accuracy, held-out", "Loss, training"),
    "translate": ("Loss", "Greedy and beam search", "Cross-attention (layer 1", "Cross-attention (layer 0"),
    "scale": ("A mesh of 8 devices: data 2, fsdp 2, tensor 2", "Where the parameters lie", "Loss, training", "Plan of"),
}


def cells(name: str, kind: str = "code") -> list[dict]:
    all_cells = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in all_cells if cell["cell_type"] == kind]


def outputs(name: str) -> list[dict]:
    return [output for cell in cells(name) for output in cell["outputs"]]


def text_of(output: dict) -> str:
    """Returns the text of an output without plots and without the warning that the tiny run from scratch must print."""
    found = [output.get("text", "")] + [value for mime, value in output.get("data", {}).items() if mime != "image/png"]
    return re.sub(" *warning +all [0-9]+ predictions are .*", "", "\n".join("".join(part) for part in found))


def has_title(outputs: list[dict], title: str) -> bool:
    """Returns whether an output is a plot or a table whose text begins with the title."""
    return any("".join(output.get("data", {}).get("text/plain", "")).startswith(title) for output in outputs)


def test_every_notebook_has_a_test():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


def test_all_notebooks_have_the_same_first_cell():
    assert len({cells(name)[0]["source"] for name in NAMES}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_are_complete(name):
    badge = f"https://colab.research.google.com/github/jaxlm/jaxlm/blob/main/notebooks/{name}.ipynb"
    assert badge in cells(name, "markdown")[0]["source"]
    stored = outputs(name)
    assert [output for output in stored if output["output_type"] == "error" or output.get("name") == "stderr"] == []
    text = "\n".join(map(text_of, stored))
    assert re.findall(r".*(?:/tmp/|/work/|/home/|/root/|/Users/|[Ww]arning|Traceback).*", text) == []
    for title in TITLES[name]:
        assert has_title(stored, title), title
    for output in stored:
        if "image/png" in output.get("data", {}):
            metadata = output["metadata"]["image/png"]
            assert metadata["width"] <= 640 and len(metadata["alt"]) > 10  # CSS pixels and the alternative text


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_define_no_functions_or_classes(name):
    for cell in cells(name):
        if cell["source"].startswith("%%writefile"):
            continue  # a config is a file with a function
        tree = ast.parse(re.sub(r"^(\s*)%.*", r"\1pass", cell["source"], flags=re.MULTILINE))
        definitions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda))]
        assert not definitions, ast.unparse(definitions[0])


def test_stored_cells_have_no_execution_counts_or_metadata():
    for name in NAMES:
        for cell in cells(name):
            assert cell["execution_count"] is None and cell["metadata"] == {}
            assert all(output.get("execution_count") is None for output in cell["outputs"])


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_notebooks_run_from_top_to_bottom(name, tmp_path):
    for package in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(package, reason=f"{package} is missing; install it with pip install 'jaxlm[test]'")
    start = time.monotonic()
    notebook = runpy.run_path(str(FOLDER / "execute.py"))["execute"](name, tmp_path)
    print(f"{name}: {time.monotonic() - start:.0f} s")
    new_outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output for output in new_outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
    assert "warning" not in "\n".join(map(text_of, new_outputs)).lower()
    titles = [title for title in TITLES[name] if title != "Plan of"]  # the plan needs libtpu
    assert [title for title in titles if not has_title(new_outputs, title)] == []
