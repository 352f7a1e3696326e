"""Standard streams and signals of the process of a command."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from jaxlm.errors import RunError

_PIPE_CLOSED = 141  # 128 + SIGPIPE, as in shells


class Signals:
    """The SIGTERM and SIGINT signals that a command received.

    Before the first call of `stop` there is nothing to save, and a signal ends the command at once with a
    KeyboardInterrupt. Afterwards the command saves after its current step and then ends. A second signal of the same
    kind always ends the process at once.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._saving = False

    def stop(self) -> bool:
        """Returns whether the command received a signal. A training loop calls this after each step."""
        self._saving = True
        return bool(self.received)

    @property
    def code(self) -> int:
        """The exit code of a command that a signal ended: 128 plus the number of the signal, as in shells."""
        return 128 + (self.received[0] if self.received else signal.SIGINT)

    @property
    def name(self) -> str:
        """SIGTERM or SIGINT."""
        return signal.Signals(self.received[0] if self.received else signal.SIGINT).name

    def handle(self, number: int, _: object) -> None:
        """Handles a signal."""
        signal.signal(number, signal.SIG_DFL)
        # Before the exception, which a callback of JAX may swallow: the exit code depends only on `received`.
        self.received.append(number)
        if not self._saving:
            raise KeyboardInterrupt
        # A signal may interrupt print(), so a handler must not call it.
        os.write(2, b"\nsaving after this step; a second signal ends the run at once, without saving\n")


@contextmanager
def delay_interrupts() -> Iterator[None]:
    """Delays a keyboard interrupt until the end of the block.

    Imports use this: a callback of JAX in the garbage collector swallows a KeyboardInterrupt, and the import of an
    extension module turns it into another exception.
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
def catch_signals() -> Iterator[Signals]:
    """Collects the signals that arrive while the block runs. Outside of the main thread there are none."""
    received = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, received.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    hook = sys.unraisablehook

    def hide_interrupts(unraisable: sys.UnraisableHookArgs) -> None:
        """Does not print an interrupt that a callback of the garbage collector swallowed, since `received` has it."""
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            hook(unraisable)

    sys.unraisablehook = hide_interrupts
    try:
        yield received
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def open_streams() -> None:
    """Opens standard input, output and error if they are closed, so that no other file gets their descriptors."""
    while True:
        number = os.open(os.devnull, os.O_RDWR)
        if number > 2:
            os.close(number)
            break
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            _discard(name)


def flush_output(code: int) -> int:
    """Flushes the standard streams and returns `code`, or the exit code for lost output if that fails."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError as error:
            _discard(name)
            code = code or report_lost_output(error)
    return code


def report_lost_output(error: OSError) -> int:
    """Returns the exit code for a standard stream that cannot be written, after a message unless the pipe is closed."""
    if error.errno == errno.EPIPE:
        return _PIPE_CLOSED
    print_error(f"error: the output cannot be written: {error.strerror}; free some space, then run the command again")
    return RunError.exit_code


def print_error(message: str) -> None:
    """Prints a line to standard error, unless its pipe is closed."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:
        _discard("stderr")


def _discard(name: str) -> None:
    """Discards all further output of a stream; otherwise the interpreter raises an error when it exits."""
    setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
