"""What a command needs of its process: standard streams that can be written, and signals that end it in order."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from jaxlm.errors import RunError

_PIPE_CLOSED = 141  # as shells have it: 128 + SIGPIPE


class Signals:
    """The SIGTERM and SIGINT that came to a command.

    Before `stop` is called for the first time there is nothing to save, and a signal ends the command at once, by a
    KeyboardInterrupt.  From then on the command saves after its step and ends by itself.  A second signal of the same
    kind ends the process at once, at any time.
    """

    def __init__(self) -> None:
        self.came: list[int] = []
        self._saving = False

    def stop(self) -> bool:
        """Returns whether a signal came; a step loop calls this after each step."""
        self._saving = True
        return bool(self.came)

    @property
    def code(self) -> int:
        """The exit code of a command that a signal ended: 128 and the number of the signal, as shells have it."""
        return 128 + (self.came[0] if self.came else signal.SIGINT)

    @property
    def name(self) -> str:
        """SIGTERM or SIGINT."""
        return signal.Signals(self.came[0] if self.came else signal.SIGINT).name

    def handle(self, number: int, _: object) -> None:
        """Takes a signal."""
        signal.signal(number, signal.SIG_DFL)
        # First, since a callback of JAX may swallow the exception: the command still ends with the code of the signal.
        self.came.append(number)
        if not self._saving:
            raise KeyboardInterrupt
        # print() must not be called where it may have been interrupted.
        os.write(2, b"\nsaving after this step; a second signal ends the run at once, without saving\n")


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Lets an interrupt from the keyboard wait until the block ends.

    For imports: a callback of JAX in the garbage collector would swallow its exception, and an extension module that
    is being loaded would turn it into another one.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def signals() -> Iterator[Signals]:
    """Yields the signals that come while the block runs; outside of the main thread, which gets none, always none."""
    found = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = {number: signal.signal(number, found.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    hook = sys.unraisablehook

    def quiet(what: sys.UnraisableHookArgs) -> None:
        """Prints nothing of an interrupt that a callback of the garbage collector swallowed: `came` has it."""
        if not isinstance(what.exc_value, KeyboardInterrupt):
            hook(what)

    sys.unraisablehook = quiet
    try:
        yield found
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def open_streams() -> None:
    """Opens what is closed of standard input, output and error, so that no file gets their numbers."""
    while True:
        number = os.open(os.devnull, os.O_RDWR)
        if number > 2:
            os.close(number)
            break
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            _discard(name)


def flushed(code: int) -> int:
    """Returns the exit code of a command whose output was written to its end; another where it cannot be written."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError as error:
            _discard(name)
            code = code or output_lost(error)
    return code


def output_lost(error: OSError) -> int:
    """Returns the exit code for a standard stream that cannot be written: the reader is gone, or the disk is full."""
    if error.errno == errno.EPIPE:
        return _PIPE_CLOSED
    report(f"error: the output cannot be written: {error.strerror}; make room, then give the command again")
    return RunError.exit_code


def report(message: str) -> None:
    """Prints a line to standard error, where somebody still reads it."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:
        _discard("stderr")


def _discard(name: str) -> None:
    """Sends what is printed from now on to nowhere: the interpreter would raise when it flushes a stream at its end."""
    setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
