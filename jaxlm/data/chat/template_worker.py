"""The process that renders untrusted chat templates within limits.

It reads the number of jobs and then the jobs, as lines of JSON, from its standard input, and writes a line of JSON per
job to its standard output. It ends when its input ends, so it does not outlive the process that started it. A timer of
the kernel ends the process if a rendering takes too long, because Python cannot interrupt a long operation in C. Limits
of the kernel apply to memory, files and processes. The process imports only light modules.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.constants
import jinja2.debug

from jaxlm.data.chat.template_sandbox import RefusedError, Sandbox, concat
from jaxlm.data.chat.template_text import ANSWER_BEGINS, ANSWER_ENDS, HIDDEN_RUN, Text, from_user, user_data

_KINDS = {"Text": "str", "Integer": "int", "Real": "float"}  # names of types for error messages
_MARK = re.compile(f"[{ANSWER_BEGINS}{ANSWER_ENDS}]")
READY = b"ready\n"  # the first line of the output
# Names of fields in messages; all other names are text of a user.
_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "thinking", "reasoning")


class _TooLongError(Exception):
    """The text of a rendering exceeds the maximum number of characters."""


def limit(memory: int) -> None:
    """Limits the resources of this process, as far as the system supports it; `memory` is in bytes."""
    try:
        import resource
    except ImportError:
        return
    limits = {"RLIMIT_AS": memory, "RLIMIT_NOFILE": 3, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0, "RLIMIT_NPROC": 0}
    for name, maximum in limits.items():
        try:
            kind = getattr(resource, name)
            _, hard = resource.getrlimit(kind)
            maximum = maximum if hard == resource.RLIM_INFINITY else min(maximum, hard)
            resource.setrlimit(kind, (maximum, maximum))
        except (AttributeError, OSError, ValueError):  # not supported by the system
            continue


def _set_timer(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the process


@lru_cache(maxsize=32)
def _compile(source: str) -> tuple[Sandbox, jinja2.Template]:
    sandbox = Sandbox()
    return sandbox, sandbox.from_string(source)


def _message(message: dict[str, Any], roles: Sequence[str]) -> dict[str, Any]:
    marked = {(name if name in _FIELDS else from_user(name)): user_data(value) for name, value in message.items()}
    if message["role"] in roles:
        marked["role"] = Text(message["role"], message["role"])
    return marked


def _render(template: jinja2.Template, names: dict[str, Any], characters: int) -> list[Any]:
    """Returns the plain text, a list of the bounds of text written by users, and a list of the bounds of answers."""
    pieces, size = [], 0
    for piece in template.generate(names):
        pieces.append(piece)
        size += len(piece)
        if size > characters:
            raise _TooLongError
    whole = concat(pieces)
    data, plain, answers = _without_marks(str.__str__(whole), whole._plain)
    return [plain, [bound for run in HIDDEN_RUN.finditer(data) for bound in run.span()], answers]


def _without_marks(data: str, plain: str) -> tuple[str, str, list[int]]:
    """Returns data and plain string without the marks around answers, and the bounds of the answers."""
    marks = list(_MARK.finditer(data))
    if not marks:
        return data, plain, []
    bounds = [0, *(bound for mark in marks for bound in mark.span()), len(data)]
    parts = [slice(a, b) for a, b in zip(bounds[::2], bounds[1::2])]
    answers: list[int] = []
    for n, mark in enumerate(marks):
        if (mark[0] == ANSWER_ENDS) == len(answers) % 2:
            answers.append(mark.start() - n)
    size = len(data) - len(marks)
    return "".join(data[p] for p in parts), "".join(plain[p] for p in parts), answers + [size] * (len(answers) % 2)


def render(job: dict[str, Any]) -> dict[str, Any]:
    """Returns {"rendered": renderings} of a job, or {"problem": [kind, detail]}.

    Args:
      job: a dict with `source` (the template), `messages`, `roles` (role names that are not text of a user),
        `special` (special tokens by variable name), `given` (other variables), `seconds` (maximum processor time of
        one rendering), `characters` (maximum length of one rendering), and `renderings` (pairs of the number of
        messages and add_generation_prompt).
    """
    try:
        _set_timer(job["seconds"])
        sandbox, template = _compile(job["source"])
        sandbox.now = datetime.now()
        messages = [_message(message, job["roles"]) for message in job["messages"]]
        names: dict[str, Any] = {name: Text(token, token) for name, token in job["special"].items()}
        names |= {name: user_data(value) for name, value in job["given"].items()}
        found = []
        for count, prompt in job["renderings"]:
            _set_timer(job["seconds"])
            names |= {"messages": messages[:count], "add_generation_prompt": prompt}
            found.append(_render(template, names, job["characters"]))
        return {"rendered": found}
    except jinja2.TemplateSyntaxError as error:
        return _problem("syntax", f"line {error.lineno}: {error}")
    except RefusedError as error:
        return _problem("refused", str(error))
    except RecursionError:
        return _problem("recursion", "")
    except MemoryError:
        return _problem("memory", "")
    except _TooLongError:
        return _problem("characters", "")
    except Exception as error:  # an untrusted program can fail in any way
        message = re.sub("'(Text|Integer|Real)'", lambda kind: repr(_KINDS[kind[1]]), str.__str__(str(error)))
        return _problem("fails", f"{type(error).__name__}: {message}")
    finally:
        _set_timer(0)


def _problem(kind: str, detail: str) -> dict[str, Any]:
    return {"problem": [kind, str.__str__(detail)[:300]]}


def main(memory: int) -> None:
    """Processes jobs until the input ends; `memory` is the limit of the address space in bytes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles interrupts from the keyboard
    warnings.simplefilter("ignore")  # the error stream is closed while jobs run
    example = "{{ '\\n' ~ messages | tojson }}{{ strftime_now('%Y') }}{{ missing.part }}"
    warm = {
        "source": example,
        "messages": [],
        "roles": [],
        "special": {},
        "given": {"a": "a"},
        "seconds": 9.0,
        "characters": 99,
    }
    render({**warm, "renderings": [[0, True]]})
    # Filters and methods import these modules on first use, when the process can no longer open files.
    import html  # noqa: F401
    import pprint  # noqa: F401
    import textwrap  # noqa: F401

    limit(memory)
    sys.set_int_max_str_digits(4300)
    read, out = sys.stdin.buffer, sys.stdout.fileno()
    _write(out, READY)
    while count := read.readline():
        jobs = [read.readline() for _ in range(int(count))]  # read all first: the parent sends all before it reads
        for job in jobs:
            try:
                line = json.dumps(render(json.loads(job)))
            except MemoryError:
                line = json.dumps(_problem("memory", ""))
            _write(out, line.encode() + b"\n")


def _write(out: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(out, rest) :]
