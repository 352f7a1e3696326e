"""Exceptions that end a run early, and the exit code of each.

Every message gives the value, the limit and the remedy, in this order.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


class _MessageOnly:
    """Makes notebooks show only the message, without a traceback, as the command line does."""

    def _render_traceback_(self) -> list[str]:  # called by IPython
        return [f"{type(self).__name__}: {self}"]


class UserError(_MessageOnly, ValueError):
    """A mistake in the user's input (config, data, folder), raised before anything is compiled: exit code 2."""

    exit_code = 2


class RunError(_MessageOnly, RuntimeError):
    """A failure of the run itself (full disk, non-finite loss, out of memory): exit code 1."""

    exit_code = 1


class Stopped(_MessageOnly, Exception):  # noqa: N818 - not an error: the run was asked to stop and saved its state
    """The run was asked to stop and has saved its state: exit code 143, as after SIGTERM."""

    exit_code = 143


class Interrupted(_MessageOnly, KeyboardInterrupt):
    """The run was interrupted from the keyboard and has saved its state.

    It is a KeyboardInterrupt, so a script that does not catch it ends as after any other interrupt.
    """


def to_python_names(message: str) -> str:
    """Returns a message with command-line flags replaced by the names of the Python arguments and fields.

    >>> in_python("choose with --task.text, or set --task.wrong-offsets drop")
    'choose with task.text, or set task.wrong_offsets drop'
    """
    return re.sub(r"(?<![\w-])--([a-z][a-z0-9.-]*[a-z0-9])", lambda flag: flag[1].replace("-", "_"), message)


def with_python_names(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates a function for Python users: its UserErrors name arguments instead of flags."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            raise type(error)(to_python_names(str(error))) from None

    return call


def suggestion(name: str, known: Iterable[str]) -> str:
    """Returns a suggestion to append to a message about an unknown name.

    Returns:
      `"; perhaps you meant 'x'"` for the known name most similar to `name`, or the sorted list of known names if
      none is similar.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; perhaps you meant {near[0]!r}" if near else f"; known: {', '.join(known)}"
