"""The layout: the imports between modules, the modules that `import jaxlm` loads, and one definition of each value."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import jaxlm
from jaxlm.config import from_json, to_json

ROOT = Path(__file__).parent.parent
FILES = {f: f.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for f in (ROOT / "jaxlm").rglob("*.py")}
MODULES = {name.removesuffix(".__init__"): file for file, name in FILES.items()}

# The order of the packages and of the modules outside them. Each imports only from itself and from those before it.
ORDER = (
    "errors",
    "config",
    "devices",
    "storage",
    "reports",
    "nn",
    "hub",
    "families",
    "data",
    "vectors",
    "lm",
    "transforms",
    "inference",
    "tasks",
    "baselines",
    "run",
    "planning",
    "explain",
    "trust",
    "samples",
    "verbs",
    "__main__",
)
PLACE = {part: place for place, part in enumerate(ORDER)}


def imported_modules(file: Path) -> set[str]:
    """Return the modules of jaxlm that a file imports at run time, also inside functions, but not for annotations."""
    tree = ast.parse(file.read_text())
    skipped = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for part in block.body
        for node in ast.walk(part)
    }
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports by a relative name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name.split(".")[0] == "jaxlm"}


def test_imports_go_in_one_direction():
    for module, file in MODULES.items():
        if module == "jaxlm":
            continue
        own = module.split(".")[1]
        for other in imported_modules(file) - {"jaxlm"}:
            part = other.split(".")[1]
            assert PLACE[part] <= PLACE[own], f"{module} imports {other}, which comes later in ORDER"


def test_imports_have_no_cycle():
    waiting = {module: imported_modules(file) - {"jaxlm", module} for module, file in MODULES.items()}
    while waiting:
        free = [module for module, needs in waiting.items() if not needs & waiting.keys()]
        assert free, f"these import each other in a circle: {sorted(waiting)}"
        for module in free:
            del waiting[module]


def test_the_order_contains_every_part():
    assert {module.split(".")[1] for module in MODULES if module != "jaxlm"} == set(PLACE)


def test_few_modules_are_outside_the_packages():
    assert len([module for module, file in MODULES.items() if file.parent == ROOT / "jaxlm"]) <= 5


def test_each_package_lists_its_modules():
    for package, file in MODULES.items():
        if file.name != "__init__.py" or package in ("jaxlm", "jaxlm.families", "jaxlm.tasks"):
            continue
        contents = ast.get_docstring(ast.parse(file.read_text())) or ""
        for module in file.parent.iterdir():
            if (module.suffix == ".py" and module != file) or (module / "__init__.py").exists():
                assert re.search(rf"^[\w, ]*\b{module.stem}\b[\w, ]*  ", contents, re.MULTILINE), (
                    f"{package}: {module.stem}"
                )


def test_no_public_name_hides_a_module():
    for name in jaxlm.__all__:
        assert f"jaxlm.{name}" not in MODULES
    for package, file in MODULES.items():
        if file.name == "__init__.py":
            assigned = {
                alias.asname or alias.name
                for node in ast.parse(file.read_text()).body
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
                if f"{node.module}.{alias.name}" not in MODULES
            }
            hidden = [name for name in assigned if f"{package}.{name}" in MODULES]
            assert not hidden, f"{package}: {hidden}"


FORBIDDEN = ["torch", "tensorflow", "transformers", "tensorflow_datasets", "grain", "matplotlib", "sklearn"]
FORBIDDEN += [
    "sentencepiece",
    "tyro",
    "orbax",
    "tensorboardX",
    "pyarrow",
    "seqeval",
    "sacrebleu",
    "rouge_score",
    "jinja2",
]
PLAIN = "import jax, flax.linen, optax"


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_loads_no_heavy_packages():
    code = f"import sys, jaxlm; print([name for name in {FORBIDDEN} if name in sys.modules])"
    assert python(code).strip() == "[]"


def test_import_loads_nothing_beyond_jax_flax_and_optax():
    """The cost of the import is then that of its own modules. benchmarks/startup.py measures the seconds."""
    code = f"import sys; {PLAIN}; plain = set(sys.modules); import jaxlm; print(*(set(sys.modules) - plain))"
    packages = {module.split(".")[0] for module in python(code).split()}
    plain = set(python(f"import sys; {PLAIN}; print(*sys.modules)").split())
    assert packages - plain - sys.stdlib_module_names == {"jaxlm"}


def test_a_run_does_not_import_torch(tmp_path):
    """TensorBoard's writer would import it where it is installed. A program may still import it afterwards."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch is imported')")
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(tmp_path)!r})
from jaxlm.run.folder import RunLog
log = RunLog(pathlib.Path({str(tmp_path)!r}), 0, 1)
log.write(1, {{"loss": 2.0}})
log.close()
try:
    import torch
except RuntimeError as error:
    print(error)
"""
    assert "torch is imported" in python(code)


def test_no_module_has_a_meaningless_name():
    pattern = re.compile(r"(^|[._])(utils?|helpers?|common|misc|tools?|base)$")
    assert not [module for module in MODULES if pattern.search(module)]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


def test_the_documents_state_the_number_of_lines_of_each_family():
    page = (ROOT / "docs" / "families.md").read_text()
    shared = ("__init__", "transformer", "recurrent", "decoder", "table", "configs", "reading", "writing")
    documented = dict(re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", page, re.MULTILINE))
    files = {file.stem: file for file in (ROOT / "jaxlm" / "families").glob("*.py")}
    lines = {name: str(len(file.read_text().splitlines())) for name, file in files.items()}
    assert documented == {name: lines[name] for name in lines if name not in shared}


def test_the_version_is_defined_once():
    version = re.escape(jaxlm.__version__)
    files = [f for f in [*FILES, ROOT / "pyproject.toml"] if re.search(rf"""["']{version}["']""", f.read_text())]
    assert files == [ROOT / "jaxlm" / "__init__.py"]


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda f: f.stem)
def test_every_config_is_valid(file, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path))
    run = runpy.run_path(str(file))["config"]()
    assert isinstance(run, jaxlm.RunConfig | jaxlm.VectorsConfig)
    if not run.data.path:
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, path="text.txt"))
    if isinstance(run, jaxlm.RunConfig) and run.model is None:
        run = dataclasses.replace(run, init="model")
    run.check()
    assert from_json(type(run), to_json(run)) == run
    assert f"python train.py configs/{file.name}" in ast.get_docstring(ast.parse(file.read_text()))


def code_of(file: Path) -> str:
    """Return the Python code of a script, or of the cells of a notebook without their magic lines."""
    if file.suffix == ".py":
        return file.read_text()
    cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    code = "\n".join(text for text in map("".join, (cell["source"] for cell in cells)) if not text.startswith("%%"))
    return re.sub(r"^(\s*)%.*$", r"\1pass", code, flags=re.MULTILINE)


@pytest.mark.parametrize(
    "file", [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")], ids=lambda file: file.name
)
def test_all_imports_of_benchmarks_and_notebooks_exist(file):
    for node in ast.walk(ast.parse(code_of(file))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "jaxlm":
            module = importlib.import_module(node.module)
            missing = [a.name for a in node.names if not hasattr(module, a.name)]
            assert not [name for name in missing if f"{node.module}.{name}" not in MODULES], missing


@pytest.mark.parametrize("name", [name for name in jaxlm.__all__ if inspect.isfunction(getattr(jaxlm, name))])
def test_public_functions_document_arguments_results_and_errors(name):
    function = getattr(jaxlm, name)
    text = inspect.getdoc(function)
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"^ +(\w+, )*(\*\*)?{parameter}(, \w+)*: ", text, re.MULTILINE), parameter
    assert re.search("^(Returns|Yields)", text, re.MULTILINE) and "\nRaises:\n" in text


# Words that must not occur. Programs print, report and return, arrays are sharded or stored, and runs resume.
WORDS = (
    "tell(?:s|ing)?",
    "told",
    "sa(?:y|ys|id)",
    "mend(?:s|ed|ing)?",
    "goes on",
    "gone on",
    "made new",
    "anew",
    "la(?:y|id|ys)",
    "lies",
    "sees",
    "sights?",
    "wants",
    "knows",
    "at the (?:most|least)",
    "so many (?:bytes|rows|seconds|steps|tokens)",
    "of which",
    "unsaid",
    "claim(?:s|ed)?",
    "framed",
)
TEXTS = [
    *(file for file in FILES if file.name != "samples.py"),  # generated sentences
    *(ROOT / "docs").glob("*.md"),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "configs").glob("*.py"),
]


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_rejected_words_do_not_occur(file):
    found = re.findall(rf"^.*\b(?:{'|'.join(WORDS)})\b.*$", file.read_text(), re.MULTILINE | re.IGNORECASE)
    assert not found, found
