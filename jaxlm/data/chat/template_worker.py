"""The process that renders chat templates, which come from strangers, within limits.

It reads jobs from its standard input and writes results to its standard output: lines of JSON, first the number of jobs
in a line of its own. It ends with its input, so it does not outlive the process that started it. The time of a
rendering is bounded by a timer of the kernel that ends the process, as nothing in Python stops a long operation in C;
memory, files and processes are bounded by limits of the kernel. It imports nothing heavy.
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

_KINDS = {"Text": "str", "Integer": "int", "Real": "float"}  # as the author of a template knows them
_MARK = re.compile(f"[{ANSWER_BEGINS}{ANSWER_ENDS}]")
READY = b"ready\n"  # the first line of the output
# The names that templates read in messages are no text of a user.
_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "thinking", "reasoning")


class _TooLongError(Exception):
    """The text of a template has more characters than it may."""


def limit(memory: int) -> None:
    """Limits what this process may have, where the system knows how to."""
    try:
        import resource
    except ImportError:
        return
    limits = {"RLIMIT_AS": memory, "RLIMIT_NOFILE": 3, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0, "RLIMIT_NPROC": 0}
    for name, most in limits.items():
        try:
            kind = getattr(resource, name)
            _, hard = resource.getrlimit(kind)
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (most, most))
        except (AttributeError, OSError, ValueError):  # not on this system
            continue


def _time(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the process


@lru_cache(maxsize=32)
def _compiled(source: str) -> tuple[Sandbox, jinja2.Template]:
    sandbox = Sandbox()
    return sandbox, sandbox.from_string(source)


def _message(message: dict[str, Any], roles: Sequence[str]) -> dict[str, Any]:
    made = {(name if name in _FIELDS else from_user(name)): user_data(value) for name, value in message.items()}
    if message["role"] in roles:
        made["role"] = Text(message["role"], message["role"])
    return made


def _rendered(template: jinja2.Template, names: dict[str, Any], characters: int) -> list[Any]:
    """Returns the plain text, the bounds of what users wrote in it, and the bounds of answers, each in one list."""
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
    """Returns data and plain string without the marks of answers, and the bounds of the answers."""
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
    """Returns the renderings of a job, or the problem with it: its kind and a detail.

    Args:
        job: `source` of the template, `messages`, `roles` (those that are no text of a user), `special`
            (names of the tokenizer's special tokens), `given` (other
            variables), `seconds` (of processor time that one rendering may take), `characters` (that it may write), and
            `renderings`: pairs of the number of messages and add_generation_prompt.
    """
    try:
        _time(job["seconds"])
        sandbox, template = _compiled(job["source"])
        sandbox.now = datetime.now()
        messages = [_message(message, job["roles"]) for message in job["messages"]]
        names: dict[str, Any] = {name: Text(token, token) for name, token in job["special"].items()}
        names |= {name: user_data(value) for name, value in job["given"].items()}
        found = []
        for count, prompt in job["renderings"]:
            _time(job["seconds"])
            names |= {"messages": messages[:count], "add_generation_prompt": prompt}
            found.append(_rendered(template, names, job["characters"]))
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
    except Exception as error:  # it is a stranger's program, and may fail in any way
        told = re.sub("'(Text|Integer|Real)'", lambda kind: repr(_KINDS[kind[1]]), str.__str__(str(error)))
        return _problem("fails", f"{type(error).__name__}: {told}")
    finally:
        _time(0)


def _problem(kind: str, detail: str) -> dict[str, Any]:
    return {"problem": [kind, str.__str__(detail)[:300]]}


def main(memory: int) -> None:
    """Serves until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt from the keyboard is for the parent
    warnings.simplefilter("ignore")  # nobody reads the error stream while the process lives
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
    # Filters and methods import these when they are used, and then no file can be opened any more.
    import html  # noqa: F401
    import pprint  # noqa: F401
    import textwrap  # noqa: F401

    limit(memory)
    sys.set_int_max_str_digits(4300)
    read, out = sys.stdin.buffer, sys.stdout.fileno()
    _write(out, READY)
    while count := read.readline():
        jobs = [read.readline() for _ in range(int(count))]  # all of them, so that the parent need not read yet
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
