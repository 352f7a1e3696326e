"""How a run ends before its end, and the exit code of each way.

Every message names the value, the limit and the remedy, in that order.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


class _Told:
    """What says all in its message: a notebook shows that alone, as the command line does, and not where it arose."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return [f"{type(self).__name__}: {self}"]


class UserError(_Told, ValueError):
    """A mistake in what the user gave (config, data, folder): found before any compile, exit code 2."""

    exit_code = 2


class RunError(_Told, RuntimeError):
    """A fault of the run itself (full disk, non-finite loss, out of memory): exit code 1."""

    exit_code = 1


class Stopped(_Told, Exception):  # noqa: N818 - not an error: the run was asked to leave, and saved
    """The run was asked to stop and has saved its state: exit code 143, as after SIGTERM."""

    exit_code = 143


class Interrupted(_Told, KeyboardInterrupt):
    """The same, by an interrupt from the keyboard: a script that does not expect it ends, as after any other."""


def in_python(message: str) -> str:
    """Returns a message with the flags of the command line as the arguments and fields that they are in Python.

    >>> in_python("choose with --task.text, or set --task.wrong-offsets drop")
    'choose with task.text, or set task.wrong_offsets drop'
    """
    return re.sub(r"(?<![\w-])--([a-z][a-z0-9.-]*[a-z0-9])", lambda flag: flag[1].replace("-", "_"), message)


def python_names(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates a function for Python users: its UserErrors name arguments in place of flags."""

    @functools.wraps(function)
    def call(*args: _P.args, **named: _P.kwargs) -> _R:
        try:
            return function(*args, **named)
        except UserError as error:
            raise type(error)(in_python(str(error))) from None

    return call


def perhaps(name: str, known: Iterable[str]) -> str:
    """`"; perhaps you meant 'x'"` for the known name nearest to `name`, else the sorted list of known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; perhaps you meant {near[0]!r}" if near else f"; known: {', '.join(known)}"
