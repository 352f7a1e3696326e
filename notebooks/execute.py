"""Runs the notebooks of this folder from top to bottom at their tiny size, and keeps what they show.

    python notebooks/execute.py [NAME ...]

Each runs in an empty folder of its own, without a network, and is then written back with its outputs: without times,
without counts of executions, and without what differs from one machine to the next.  Needs the extra [test].
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
MOST = 600  # seconds that a cell may take
LANGUAGE = {"name": "python"}
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def executed(name: str, folder: Path) -> Any:
    """The notebook with its outputs, run afresh in `folder`, which it may fill.  An error in a cell is raised."""
    import matplotlib.font_manager  # noqa: F401  the first import of a machine finds its fonts, and says so
    import nbclient
    import nbformat

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    set_here = {"JAXLM_TINY": "1", "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    set_here["JAXLM_CACHE"] = str(folder / "cache")
    set_here["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    before = dict(os.environ)
    os.environ.update(set_here)
    for unwanted in ("XLA_FLAGS", "COLUMNS"):  # of the tests, or of the terminal
        os.environ.pop(unwanted, None)
    try:
        client = nbclient.NotebookClient(
            notebook,
            timeout=MOST,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            extra_arguments=["--IPKernelApp.log_level=ERROR"],  # not that other users of the machine may listen
        )
        return client.execute()
    finally:
        os.environ.clear()
        os.environ.update(before)


def tidied(notebook: Any) -> Any:
    """The notebook without what changes from one run to the next for no reason."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = _tidied(cell.outputs)
    kept = {name: notebook.metadata[name] for name in ("accelerator", "colab") if name in notebook.metadata}
    notebook.metadata = {**kept, "kernelspec": KERNEL, "language_info": LANGUAGE}
    return notebook


def _tidied(outputs: list[Any]) -> list[Any]:
    """What a stream said in pieces is joined: where they are cut depends on the clock."""
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
    """Runs the named notebooks, or all, and writes them back; returns the exit code."""
    import nbformat

    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"there is no notebook {', '.join(unknown)}; known: {', '.join(NAMES)}", file=sys.stderr)
        return 2
    for name in names or NAMES:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            notebook = tidied(executed(name, Path(folder)))
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
