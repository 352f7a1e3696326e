"""Signals and standard streams: each verb ends with the right code, one message, and no traceback."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxlm.__main__ import VERBS, main
from jaxlm.devices import process
from jaxlm.errors import Stopped

ROOT = Path(__file__).parent.parent


@pytest.fixture
def verb(monkeypatch):
    """Returns `verb(body)`, which defines a verb `try` that runs the body."""

    def add(body):
        monkeypatch.setitem(VERBS, "try", lambda argv, signals: body(signals) or 0)
        monkeypatch.setitem(VERBS, "train", lambda argv, signals: body(signals) or 0)

    return add


def raise_and_swallow(number: int) -> None:
    """Raise a signal whose exception is lost, as in a callback of C++ code."""
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("body", [signal.raise_signal, raise_and_swallow])
def test_a_signal_ends_a_verb_with_its_code(verb, capsys, body, number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    verb(lambda signals: body(number))
    assert main(["try"]) == 128 + number
    assert f"stopped by {signal.Signals(number).name}" in capsys.readouterr().err
    assert main(["train", "x"]) == 143
    assert "stopped before there was anything to save" in capsys.readouterr().err
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_step_loop_saves_before_it_ends(verb, capfd, number):
    def loop(signals: process.Signals) -> None:
        assert not signals.stop()
        signal.raise_signal(number)
        assert signals.stop()
        raise Stopped("stopped at step 1 of 2 and saved")

    verb(loop)
    assert main(["train", "x"]) == 143
    output = capfd.readouterr().err
    assert "saving after this step" in output and "stopped at step 1 of 2 and saved" in output


def test_an_interrupt_that_became_another_error_has_the_code_of_the_signal(verb, capsys):
    def raise_other_error(signals: process.Signals) -> None:
        raise_and_swallow(signal.SIGTERM)
        raise RuntimeError("INTERNAL: CpuCallback error: KeyboardInterrupt")

    verb(raise_other_error)
    assert main(["try"]) == 143 and "Traceback" not in capsys.readouterr().err


def run(arguments: str, shell: str, **options) -> subprocess.CompletedProcess:
    command = f"{sys.executable} -m jaxlm {arguments} {shell}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, **options)


# The arguments, the redirection in the shell, the exit code, and the expected words on stderr.
STREAMS = {
    "a full output": ("--help", ">/dev/full", 1, "No space left"),
    "a closed output": ("--help", ">&-", 0, ""),
    "full errors": ("train nothing", "2>/dev/full", 2, ""),
    "closed errors": ("train nothing", "2>&-", 2, ""),
    "closed input and output": ("train nothing", "<&- >&-", 2, "there is no config nothing"),
    "a closed pipe": ("train quickstart --help", "| true; exit ${PIPESTATUS[0]}", 141, ""),
}


FAST = ("a full output", "closed input and output")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.long) for name in STREAMS]
)
def test_unwritable_streams_cause_no_traceback(tmp_path, name):
    arguments, shell, code, message = STREAMS[name]
    result = run(arguments, shell, cwd=tmp_path)
    assert result.returncode == code and "Traceback" not in result.stderr, result.stderr
    assert message in result.stderr and "Exception ignored" not in result.stderr, result.stderr


CONFIG = """
from jaxlm import CausalLM, DataConfig, ModelConfig, RunConfig, TokenizerConfig

def config():
    return RunConfig(
        model=ModelConfig(vocabulary=64, max_length=16, width=16, layers=1, heads=2), task=CausalLM(),
        data=DataConfig(path="text.txt", length=16, cache="cache"), tokenizer=TokenizerConfig(train="characters"),
        batch=8, steps=100_000, sample_tokens=0, checkpoint_every=20_000, workdir="run",
    )
"""


@pytest.mark.long
@pytest.mark.parametrize("seconds", [5, 8, 12])
def test_a_stopped_run_ends_with_143_at_any_moment(tmp_path, seconds):
    (tmp_path / "mine.py").write_text(CONFIG)
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 2000)
    command = [sys.executable, "-m", "jaxlm", "train", "mine.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment)
    time.sleep(seconds)
    running.send_signal(signal.SIGTERM)
    output = running.communicate(timeout=300)[1]
    assert running.returncode == 143 and "\nstopped " in f"\n{output}" and "Traceback" not in output, output
