"""Renders chat templates in a separate process, which is started on first use and then reused.

`template_worker` is the code of the process; it sets the limits.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.errors import RunError

SECONDS = 5.0  # maximum processor time of one rendering
MEMORY = 512 << 20  # maximum size of the address space of the process, in bytes
CHARACTERS = 10_000_000  # maximum length of one rendering
SILENCE = 60.0  # maximum seconds without output of the process
BATCH = 256  # number of jobs that are sent together
# The process needs only three modules of jaxlm. It replaces jaxlm/__init__.py, which imports JAX, by an empty module.
_START = """
import json, sys, types
sys.path[:], folder, memory = json.loads(sys.argv[1])
package = types.ModuleType("jaxlm")
package.__path__ = [folder]
sys.modules["jaxlm"] = package
from jaxlm.data.chat import template_worker
template_worker.main(memory)
"""


class Problem(NamedTuple):
    """A problem with a template or with its messages."""

    kind: str  # syntax, refused, recursion, memory, characters, fails, time, silent, stopped
    detail: str


class _Ended(Exception):  # noqa: N818 - caught in this module
    """The process has ended."""


class _Process:
    """A process that renders templates."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        paths = json.dumps([[os.path.abspath(path) for path in sys.path], str(Path(__file__).parents[2]), MEMORY])
        try:
            self.process = subprocess.Popen(
                [sys.executable or "python3", "-c", _START, paths],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env={name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TZ") if name in os.environ},
            )
        except OSError as error:
            raise RunError(f"the process for chat templates does not start ({error}); check sys.executable") from None
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.input, self.output, self.rest = self.process.stdin, self.process.stdout, b""
        self.waiting = selectors.DefaultSelector()
        self.waiting.register(self.output, selectors.EVENT_READ)
        with self.process.stderr as errors:  # the error stream is read only at the start
            try:
                self.line()
            except _Ended:
                self.end()
                reason = (errors.read() or b"").decode(errors="replace").strip().rpartition("\n")[2]
                raise RunError(
                    f"the process for chat templates does not start ({reason[:300]}); reinstall jinja2"
                ) from None

    def send(self, lines: Sequence[bytes]) -> None:
        """Sends jobs. Raises _Ended if the process has ended."""
        try:
            rest = memoryview(b"\n".join((str(len(lines)).encode(), *lines)) + b"\n")
            while rest:
                rest = rest[self.input.write(rest) :]
        except BrokenPipeError:
            raise _Ended from None

    def line(self) -> bytes:
        """Returns the next line of the output. Raises _Ended if the process ends or produces no output in time."""
        while True:
            line, end, rest = self.rest.partition(b"\n")
            if end:
                self.rest = rest
                return line
            parts = [self.rest]
            while b"\n" not in parts[-1]:
                if not self.waiting.select(SILENCE):
                    self.process.kill()
                    raise _Ended
                if not (part := os.read(self.output.fileno(), 1 << 20)):
                    raise _Ended
                parts.append(part)
            self.rest = b"".join(parts)

    def end(self) -> int:
        """Ends the process and returns its exit code."""
        for resource in (self.waiting, self.input, self.output):
            resource.close()
        if self.owner != os.getpid():  # this is a fork, and the process belongs to the parent
            self.process.returncode = 0
            return 0
        self.process.kill()
        return self.process.wait()


_lock = threading.Lock()
_current: list[_Process] = []


def _process() -> _Process:
    if _current and _current[0].owner != os.getpid():  # a fork cannot use the process of its parent
        _end()
    if not _current:
        _current.append(_Process())
    return _current[0]


@atexit.register
def _end() -> None:
    while _current:
        _current.pop().end()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def render(jobs: Sequence[dict[str, Any]]) -> Iterator[list[Any] | Problem]:
    """Yields the renderings of each job, or the problem with it; see `template_worker.render`."""
    limits = {"seconds": SECONDS, "characters": CHARACTERS}
    for first in range(0, len(jobs), BATCH):
        with _lock:
            lines = [json.dumps(job | limits).encode() for job in jobs[first : first + BATCH]]
            results = list(_results(lines))
        yield from results


def _results(lines: list[bytes]) -> Iterator[list[Any] | Problem]:
    """Yields the results of jobs. If a job ends the process, the jobs after it run in a new one."""
    pending = lines
    while pending:
        process = _process()
        count = 0
        try:
            process.send(pending)
            for _ in pending:
                result = json.loads(process.line())
                count += 1
                yield result["rendered"] if "rendered" in result else Problem(*result["problem"])
            return
        except _Ended:
            _current.clear()
            code = process.end()
            if code == -getattr(signal, "SIGPROF", 0):
                yield Problem("time", "")
            elif code == -signal.SIGKILL:
                yield Problem("silent", "")
            else:
                yield Problem("stopped", f"exit code {code}")
            pending = pending[count + 1 :]
        except BaseException:  # after an interrupt, the rest of the results would be read as those of the next jobs
            _current.clear()
            process.end()
            raise
