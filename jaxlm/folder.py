"""A run folder explains itself: whose run it is, what was logged, and how far it has come."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import jaxlm
from jaxlm.config import RunConfig, difference, to_json
from jaxlm.errors import RunError, UserError

# What may change between two starts of the same run.
FREE = ("mesh", "remat", "unroll", "log_every", "eval_every", "checkpoint_every", "keep", "workdir")
FREE += ("sample_prompt", "sample_tokens")
FREE_DATA = ("path", "eval_path", "cache")  # the content is compared, not the place


def claim(run: RunConfig, folder: Path) -> None:
    """Makes `folder` this run's, or finds that it is.

    Raises UserError for a folder that holds another run (model, task, data, tokenizer, optimizer, batch, seed or steps
    differ; both sides shown), or files that no run made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run folder {folder} cannot be made: {error.strerror}; choose another --workdir") from None
    file = folder / "config.json"
    ours = to_json(run)
    if file.exists():
        theirs = json.loads(file.read_text())["run"]
        differ = difference(_identity(ours), _identity(theirs))
        if differ:
            lines = "\n".join(f"  {line}" for line in differ)
            raise UserError(
                f"{folder} holds another run; they differ in (this run | the run there):\n{lines}\n"
                f"choose another --workdir, or give the fields that it was started with"
            )
    elif any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no run; choose another --workdir")
    write_json(file, {"run": ours, "jaxlm": jaxlm.__version__})


def claim_data(folder: Path, fingerprint: str) -> None:
    """Notes the fingerprint of the run's data, or raises UserError where the run was begun on other data."""
    file = folder / "config.json"
    known = json.loads(file.read_text())
    if known.setdefault("data", fingerprint) != fingerprint:
        raise UserError(
            f"{folder} holds a run on other data: {known['data']} there, {fingerprint} now; "
            f"give the data it was started with, or another --workdir"
        )
    write_json(file, known)


def write_json(file: Path, values: Any) -> None:
    """Writes a JSON file whole or not at all."""
    part = file.with_suffix(".part")
    try:
        part.write_text(json.dumps(values, indent=2) + "\n")
        os.replace(part, file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}; choose another --workdir") from None


def _identity(run: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in run.items() if name not in FREE}
    kept["data"] = {name: value for name, value in run["data"].items() if name not in FREE_DATA}
    return kept


class RunLog:
    """Writes metrics.jsonl, TensorBoard events and the progress line.  Resuming cuts what came after `step`."""

    def __init__(self, folder: Path, step: int, steps: int):
        from tensorboardX import SummaryWriter

        self._file, self._steps = folder / "metrics.jsonl", steps
        kept = []
        if self._file.exists():
            for line in self._file.read_text().splitlines(keepends=True):
                # A line that a kill left torn is after every checkpoint.
                if line.endswith("}\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
        part = self._file.with_suffix(".part")
        part.write_text("".join(kept))
        os.replace(part, self._file)
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1, write_to_disk=True)
        self._started, self._first = time.monotonic(), step

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl and one point of each TensorBoard curve."""
        try:
            with open(self._file, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        except OSError as error:
            raise RunError(
                f"{self._file} cannot be written: {error.strerror}; make room, then give the same command again"
            ) from error

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Where the run stands: rewritten in place on a terminal, a line of its own elsewhere."""
        seconds = (time.monotonic() - self._started) / max(1, step - self._first) * (self._steps - step)
        line = (
            f"step {step:,}/{self._steps:,}  loss {values['loss']:.4f}  rate {values['learning_rate']:.2e}  "
            f"{values['tokens_per_second']:,.0f} tokens/s  {duration(seconds)} left"
        )
        print(f"\r\x1b[K{line}" if sys.stderr.isatty() else line, end="", file=sys.stderr, flush=True)
        if not sys.stderr.isatty() or step == self._steps:
            print(file=sys.stderr, flush=True)

    def close(self) -> None:
        self._events.close()


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
