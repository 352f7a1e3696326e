"""Config files: Python files with a function `config()` that returns a RunConfig."""

from __future__ import annotations

import dataclasses
import runpy
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from jaxlm.config import RunConfig, check_task
from jaxlm.config.ranges import check_fields, shown
from jaxlm.errors import UserError, perhaps

_ROOT = Path(__file__).parents[1]
# The project's own configs: of a wheel, or of the repository.
_OWN = _ROOT / "configs" if (_ROOT / "configs").is_dir() else _ROOT.parent / "configs"


def own() -> list[str]:
    """Returns the names of the project's own configs, such as `quickstart`."""
    return sorted(file.stem for file in _OWN.glob("*.py"))


def read(file: Path, words: list[str] | None = None) -> RunConfig:
    """Returns what the `config(*words)` of a file returns, with a run folder named after the file and the words.

    Args:
      file: a Python file, or the name of one of the project's own configs.
      words: the arguments of its function `config`.

    Raises:
      UserError: where there is no such file, where it does not run to its end, or where it returns something else than
        a RunConfig whose fields are of their types and in their ranges.
    """
    words, file = words or [], _found(file)
    with _faults_of(file):
        config = runpy.run_path(str(file)).get("config")
    if not callable(config):
        raise UserError(f"{file} has no function config(); define one that returns a RunConfig")
    try:
        signature(config).bind(*words)
    except ValueError:  # of a built-in class
        raise UserError(f"{file} has no function config(); define one that returns a RunConfig") from None
    except TypeError:
        takes = str(signature(config))
        raise UserError(f"{file} has config{takes}, which does not take {words}; give what it takes") from None
    with _faults_of(file):
        run: Any = config(*words)
    if not isinstance(run, RunConfig):
        raise UserError(f"{file}: config() returns {shown(run)}; it must return a RunConfig")
    try:
        check_fields(run)
        check_task(run.task)
    except UserError as error:
        raise UserError(f"{file}: {error}; correct the config") from None
    return run if run.workdir else dataclasses.replace(run, workdir="runs/" + "-".join([file.stem, *words]))


def _found(file: Path) -> Path:
    """The file itself, or the project's own config of that name."""
    named = _OWN / f"{file}.py"
    if not file.is_file() and named.parent == _OWN and named.is_file():
        return named
    if not file.is_file():
        files = file.parent.glob("*.py") if file.suffix == ".py" else _OWN.glob("*.py")
        known = [path.name if file.suffix == ".py" else path.stem for path in files]
        raise UserError(f"there is no config {file}" + (perhaps(file.name, known) if known else ""))
    return file


@contextmanager
def _faults_of(file: Path) -> Iterator[None]:
    """Raises a UserError, with the line of the file, in place of whatever a config file raises."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except SyntaxError as error:
        where = error.filename if error.filename and Path(error.filename) != file else file
        line = "" if error.lineno is None else f", line {error.lineno}"  # a null byte has none
        raise UserError(f"{where}{line}: {error.msg}; correct the syntax") from None
    except BaseException as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f"{file}, line {lines[-1]}" if lines else f"{file}"
        what = f"{type(error).__name__}: {_text_of(error)}".rstrip(": ")
        remedy = "install the module" if isinstance(error, ModuleNotFoundError) else "correct the config"
        raise UserError(f"{where} raises {what}; {remedy}") from None


def _text_of(error: BaseException) -> str:
    """The text of an exception in one line of at most 300 characters; none where it has none, or cannot be asked."""
    try:
        return " ".join(str(error).split())[:300]
    except Exception:
        return ""
