"""Runs the notebooks of this folder from top to bottom at their tiny size and stores their outputs.

    python notebooks/execute.py [NAME ...]

Each notebook runs in its own empty folder without a network and is written back with its outputs, but without times,
execution counts and other values that differ between machines.  Requires the extra [test].
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.ipynb")))
MAX_SECONDS = 600  # per cell
LANGUAGE = {"name": "python"}
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def execute(name: str, folder: Path) -> Any:
    """Runs a notebook in `folder` and returns it with its outputs.  Raises the error of a failed cell."""
    import matplotlib.font_manager  # noqa: F401  the first import on a machine prints that it searches for fonts
    import nbclient
    import nbformat

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    settings = {"JAXLM_TINY": "1", "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    settings["JAXLM_CACHE"] = str(folder / "cache")
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    before = dict(os.environ)
    os.environ.update(settings)
    for variable in ("XLA_FLAGS", "COLUMNS"):  # set by the tests or the terminal
        os.environ.pop(variable, None)
    try:
        client = nbclient.NotebookClient(
            notebook,
            timeout=MAX_SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            extra_arguments=["--IPKernelApp.log_level=ERROR"],  # hides a warning about other users of the machine
        )
        return client.execute()
    finally:
        os.environ.clear()
        os.environ.update(before)


def clean(notebook: Any) -> Any:
    """Removes everything from the notebook that changes between runs without reason."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = _join_streams(cell.outputs)
    kept = {name: notebook.metadata[name] for name in ("accelerator", "colab") if name in notebook.metadata}
    notebook.metadata = {**kept, "kernelspec": KERNEL, "language_info": LANGUAGE}
    return notebook


def _join_streams(outputs: list[Any]) -> list[Any]:
    """Joins the pieces of a stream, because their boundaries depend on timing."""
    kept: list[Any] = []
    for output in outputs:
        output.pop("transient", None)
        if "execution_count" in output:
            output.execution_count = None
        if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def main(names: list[str]) -> int:
    """Runs the named notebooks, or all of them, and writes them back; returns the exit code."""
    import nbformat

    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"there is no notebook {', '.join(unknown)}; known: {', '.join(NAMES)}", file=sys.stderr)
        return 2
    for name in names or NAMES:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            notebook = clean(execute(name, Path(folder)))
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
