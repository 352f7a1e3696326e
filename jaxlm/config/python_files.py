"""Config files: Python files that define a function `config()`, which returns the config of a run."""

from __future__ import annotations

import dataclasses
import runpy
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from jaxlm.config import RunConfig, VectorsConfig, check_task
from jaxlm.config.ranges import check_fields, short_repr
from jaxlm.errors import UserError, suggestion

_ROOT = Path(__file__).parents[1]
# The configs that come with jaxlm: inside an installed wheel, or at the top of the repository.
_BUILT_IN = _ROOT / "configs" if (_ROOT / "configs").is_dir() else _ROOT.parent / "configs"


def built_in_names() -> list[str]:
    """Returns the names of the configs that come with jaxlm, such as `quickstart`."""
    return sorted(file.stem for file in _BUILT_IN.glob("*.py"))


def read(file: Path, words: list[str] | None = None) -> RunConfig:
    """Returns the RunConfig of a config file; see `read_any`.

    Args:
      file: a Python file, or the name of a config that comes with jaxlm.
      words: arguments of the function `config`.

    Raises:
      UserError: as `read_any` does, and for a run that trains word vectors.
    """
    run = read_any(file, words)
    if isinstance(run, VectorsConfig):
        raise UserError(f"{file} trains word vectors, which only the verb train does; give the config of a model")
    return run


def read_any(file: Path, words: list[str] | None = None) -> RunConfig | VectorsConfig:
    """Calls the function `config` of a config file.

    Args:
      file: a Python file, or the name of a config that comes with jaxlm.
      words: arguments of the function `config`.

    Returns:
      The config; if its `workdir` is empty, it is set to `runs/` and the name of the file and the words.

    Raises:
      UserError: if there is no such file, it fails, or it returns anything but a RunConfig or a
        VectorsConfig with valid fields.
    """
    words, file = words or [], _find(file)
    with _user_errors(file):
        config = runpy.run_path(str(file)).get("config")
    if not callable(config):
        raise UserError(f"{file} has no function config(); define one that returns a RunConfig")
    try:
        signature(config).bind(*words)
    except ValueError:  # a built-in class has no signature
        raise UserError(f"{file} has no function config(); define one that returns a RunConfig") from None
    except TypeError:
        raise UserError(
            f"{file} defines config{signature(config)}, which does not accept the arguments {words}; correct them"
        ) from None
    with _user_errors(file):
        run: Any = config(*words)
    if not isinstance(run, RunConfig | VectorsConfig):
        raise UserError(f"{file}: config() returns {short_repr(run)}; it must return a RunConfig")
    try:
        check_fields(run)
        if isinstance(run, RunConfig):
            check_task(run.task)
    except UserError as error:
        raise UserError(f"{file}: {error}; correct the config") from None
    return run if run.workdir else dataclasses.replace(run, workdir="runs/" + "-".join([file.stem, *words]))


def _find(file: Path) -> Path:
    """Returns the file itself, or the built-in config of that name."""
    built_in = _BUILT_IN / f"{file}.py"
    if not file.is_file() and built_in.parent == _BUILT_IN and built_in.is_file():
        return built_in
    if not file.is_file():
        files = file.parent.glob("*.py") if file.suffix == ".py" else _BUILT_IN.glob("*.py")
        known = [path.name if file.suffix == ".py" else path.stem for path in files]
        raise UserError(f"there is no config {file}" + (suggestion(file.name, known) if known else ""))
    return file


@contextmanager
def _user_errors(file: Path) -> Iterator[None]:
    """Converts any exception that a config file raises to a UserError that names the line."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except SyntaxError as error:
        where = error.filename if error.filename and Path(error.filename) != file else file
        line = "" if error.lineno is None else f", line {error.lineno}"  # there is none for a null byte
        raise UserError(f"{where}{line}: {error.msg}; correct the syntax") from None
    except BaseException as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f"{file}, line {lines[-1]}" if lines else f"{file}"
        what = f"{type(error).__name__}: {_message(error)}".rstrip(": ")
        remedy = "install the module" if isinstance(error, ModuleNotFoundError) else "correct the config"
        raise UserError(f"{where} raises {what}; {remedy}") from None


def _message(error: BaseException) -> str:
    """Returns the message of an exception in one line of at most 300 characters, or "" if `str` fails."""
    try:
        return " ".join(str(error).split())[:300]
    except Exception:
        return ""
