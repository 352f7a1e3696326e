"""A run folder explains itself: whose run it is, what was logged, and how far it has come."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TextIO

import jaxlm
from jaxlm.config import RunConfig, check_task, difference, from_json, to_json
from jaxlm.config.ranges import check_fields
from jaxlm.errors import RunError, UserError
from jaxlm.hub import model_files
from jaxlm.storage import disk

# What may change between two starts of the same run.
FREE = {"mesh", "remat", "attention", "unroll", "log_every", "eval_every", "checkpoint_every", "keep", "workdir"}
FREE |= {"keep_checkpoints", "sample_prompt", "sample_tokens", "profile"}
FREE_DATA = ("path", "eval_path", "cache")  # the content is compared, not the place
SUMMARY = "summary.txt"  # what a finished run printed at the end


def open_run_dir(run: RunConfig, folder: Path) -> bool:
    """Makes the folder, and finds whether this run has begun in it: whether there is a log or a checkpoint.

    Raises UserError for a folder that cannot be written, or that holds another run (model, task, data, tokenizer,
    optimizer, batch, seed or steps differ; both sides shown), or files that no run made.  A run that never took a step
    is in nobody's way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _cannot_be_written(folder, error) from None
    theirs = _read(folder)
    ours = lambda name: name == disk.LOCK or disk.is_temporary(name)
    if theirs is None and not all(ours(path.name) for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no run; choose another --workdir")
    if theirs is None or not _has_begun(folder):
        return False
    differ = difference(_identity(to_json(run)), _identity(theirs["run"]))
    if differ:
        lines = "\n".join(f"  {line}" for line in differ)
        raise UserError(
            f"{folder} holds another run; they differ in (this run | the run there):\n{lines}\n"
            f"choose another --workdir, or give the fields that it was started with"
        )
    return True


def begin(run: RunConfig, folder: Path, fingerprint: str, labels: Any = (), weights: Path | None = None) -> None:
    """Writes config.json.

    labels: names of the outputs of the head.  weights: the folder that `run.init` names, where it is there.  Raises
    UserError where the run in a claimed folder has begun on data of other content, or is finished and began from other
    weights.
    """
    theirs = _read(folder) if _has_begun(folder) else None
    if theirs is not None and theirs["data"] != fingerprint:
        raise UserError(
            f"{folder} holds a run on data of other content: its fingerprint is {theirs['data']} there, {fingerprint} "
            f"now; give the data it was started with, or another --workdir"
        )
    if theirs is None:
        content = model_files.fingerprint(weights) if weights else None
    else:
        content = theirs.get("weights")
        # An unfinished run resumes from its checkpoint and does not read these weights.
        finished = finished_at(folder) is not None
        if finished and content and weights and model_files.fingerprint(weights) != content:
            raise UserError(
                f"{folder} holds a finished run that began from other weights: those in {weights} have changed since; "
                f"choose another --workdir, or give the weights it was started with"
            )
    known = {"data": fingerprint, "labels": labels, "weights": content, "jaxlm": jaxlm.__version__}
    write_json(folder / "config.json", {"run": to_json(run), **known})


def _read(folder: Path) -> dict[str, Any] | None:
    """What `begin` wrote, or None."""
    try:
        values = model_files.read_object(folder / "config.json")
    except UserError:
        return None
    run = values.get("run")
    return values if isinstance(run, dict) and isinstance(run.get("data"), dict) and "data" in values else None


def run_of(folder: str | Path) -> RunConfig | None:
    """Returns the config of the run in a folder, as it was given; None where there is no run.

    Raises:
        UserError: where it is not as this version writes it.
    """
    if (values := _read(Path(folder))) is None:
        return None
    try:
        run = from_json(RunConfig, values["run"])
        check_fields(run)
        check_task(run.task)
    except (UserError, TypeError, AttributeError, KeyError) as error:
        why = str(error) if isinstance(error, UserError) else "a value is of another type"
        raise UserError(
            f"{folder}/config.json is not the config of a run ({why}); correct it, or give the export"
        ) from None
    return run


def labels_of(folder: Path) -> tuple[str, ...] | dict[str, tuple[str, ...]] | None:
    """Returns the names of the outputs of the head of the run in a folder, of several tasks by the part's name; None
    where they are not known."""
    labels = (_read(folder) or {}).get("labels")
    if isinstance(labels, dict):
        return {name: found for name, part in labels.items() if (found := _names(part))} or None
    return _names(labels)


def _names(labels: Any) -> tuple[str, ...] | None:
    names = isinstance(labels, list) and all(isinstance(name, str) for name in labels)
    return tuple(labels) if labels and names else None


def _has_begun(folder: Path) -> bool:
    log = folder / "metrics.jsonl"
    return any((folder / "checkpoints").glob("[0-9]*")) or (log.exists() and log.stat().st_size > 0)


def finished_at(folder: Path) -> int | None:
    """Returns the last step of a run that has begun in a folder, where the run is finished; None where it is not.

    A finished run has a report.  Should someone have removed that, it has scores and, usually, no checkpoints.
    """
    scores = folder / "scores.json"
    if not scores.exists() or not ((folder / "report.html").exists() or not _steps(folder / "checkpoints")):
        return None
    steps = [step for _, step in _whole_lines(folder / "metrics.jsonl")]
    return max(steps, default=0)


def drop_steps(checkpoints: Path) -> None:
    """Removes the checkpoints of a run, and their folder where nothing else is in it."""
    for step in _steps(checkpoints):
        shutil.rmtree(step)
    with suppress(OSError):
        checkpoints.rmdir()


def _steps(checkpoints: Path) -> list[Path]:
    return [path for path in checkpoints.glob("[0-9]*") if path.name.isdigit()]


def _whole_lines(log: Path) -> list[tuple[str, int]]:
    """The lines of a log and their steps, without those that a kill or a full disk left torn."""
    lines = log.read_text(errors="replace").splitlines(keepends=True) if log.exists() else []
    return [(line, step) for line in lines if (step := _step_of(line)) is not None]


def write_json(file: Path, values: Any) -> None:
    """Writes a JSON file whole or not at all."""
    try:
        disk.write(file, json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise _cannot_be_written(file, error) from None


def _cannot_be_written(path: Path, error: OSError) -> UserError | RunError:
    if error.errno in disk.FULL:
        return RunError(f"{path} cannot be written: {error.strerror}; make room, then give the same command again")
    return UserError(f"{path} cannot be written: {error.strerror}; choose another --workdir, or free this one")


def _identity(run: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in run.items() if name not in FREE}
    kept["data"] = {name: value for name, value in run["data"].items() if name not in FREE_DATA}
    return kept


class RunLog:
    """Writes metrics.jsonl, TensorBoard events and the progress line.  Resuming cuts what came after `step`.

    Raises RunError where the disk is full.
    """

    def __init__(self, folder: Path, step: int, steps: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._file, self._steps, self._rewriting = folder / "metrics.jsonl", steps, False
        self._started, self._first = time.monotonic(), step
        # A torn line is after every checkpoint.  A run that starts anew evaluates its first weights anew, as step 0.
        kept = [line for line, logged in _whole_lines(self._file) if step and logged <= step]
        with self._faults():
            disk.write(self._file, "".join(kept))
            (folder / "tensorboard").mkdir(exist_ok=True)
            # SummaryWriter would write from a thread, where a full disk ends nothing but the thread.
            self._events = EventsWriter(str(folder / "tensorboard" / "events"))
            # Tells TensorBoard to forget what an earlier start wrote of the steps that come again.
            self._event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl and one point of each TensorBoard curve."""
        from tensorboardX.summary import scalar

        with self._faults():
            with open(self._file, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                self._event(step, summary=scalar(name, value))
            self._events.flush()

    def _event(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(wall_time=time.time(), step=step, **content))

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"the log in {self._file.parent} cannot be written: {error.strerror}; make room, then give the same "
                f"command again"
            ) from error

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Where the run stands: rewritten in place on a terminal, a line of its own elsewhere."""
        seconds = (time.monotonic() - self._started) / max(1, step - self._first) * (self._steps - step)
        line = (
            f"step {step:,}/{self._steps:,}  loss {values['loss']:.4f}  rate {values['learning_rate']:.2e}  "
            f"{values['tokens_per_second']:,.0f} tokens/s  "
            f"{'{:.1%} MFU  '.format(values['mfu']) if 'mfu' in values else ''}{duration(seconds)} left"
        )
        self._rewriting = sys.stderr.isatty()
        print(f"\r\x1b[K{line}" if self._rewriting else line + "\n", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the progress line and the files."""
        if self._rewriting:
            print(file=sys.stderr, flush=True)
        with self._faults():
            self._events.close()


def _step_of(line: str) -> int | None:
    """Returns the step of a line of metrics.jsonl; None for a line that is torn or damaged."""
    with suppress(UserError):
        values = model_files.parse_object(line.encode(), "metrics.jsonl") if line.endswith("}\n") else {}
        return values["step"] if isinstance(values.get("step"), int) else None
    return None


class NoLog:
    """The log of the hosts beside the first: none."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Nothing."""

    progress = write

    def close(self) -> None:
        """Nothing."""


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class RowWriter:
    """Writes rows with what was predicted of them to a csv or jsonl file, which appears when it is whole; or to the
    standard output, as csv.  In csv a list of names is one cell, divided by `separator`, and probabilities and the
    likeliest classes have columns of their own.

    Raises UserError for a file of another kind, or one that exists; for a row with other columns than the first in a
    csv file; and at the end where there was no row.
    """

    def __init__(self, file: str, separator: str = " "):
        self._separator = separator
        self._path = disk.local(file, "output") if file else None
        if self._path and self._path.suffix not in (".csv", ".jsonl"):
            raise UserError(f"output is {file!r}; it must end in .csv or .jsonl")
        self._check_new()
        self._columns: list[str] = []
        self._count = 0

    def _check_new(self) -> None:
        if self._path and self._path.exists():  # it may be what is read
            raise UserError(f"output is '{self._path}', which exists; move it away, or choose another --output")

    def __enter__(self) -> RowWriter:
        self._file: TextIO = sys.stdout
        self._open = ExitStack()
        if self._path:
            with ExitStack() as opened, self._faults():
                lock = disk.lock_beside(self._path)
                opened.enter_context(disk.lock(lock, str(self._path), "choose another --output"))
                self._check_new()  # once more: the process that held the lock may have written it
                temporary = opened.enter_context(disk.atomic_file(self._path, overwrite=False))
                self._file = opened.enter_context(open(temporary, "w", newline="", encoding="utf-8"))
                self._open = opened.pop_all()
        self._csv = csv.writer(self._file, lineterminator="\n")
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._path is None:
            self._file.flush()  # here, not when the interpreter ends: the reader may have gone
        empty = UserError("there is no row to tell something of; give at least one")
        failure = empty if error is None and not self._count else error
        try:
            with self._faults():
                self._open.__exit__(type(failure) if failure else None, failure, trace)
        except (UserError, RunError):
            if failure is None:  # otherwise the first failure is the one to report
                raise
        if failure is empty:
            raise empty

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._path is None:
                raise
            raise disk.cannot_be_written(self._path, error, "--output") from None

    def write(self, row: dict[str, Any], told: dict[str, Any]) -> None:
        """Writes a row; a new column whose name the file has already gets the suffix `_new`."""
        self._count += 1
        whole = dict(row)
        as_json = self._path is not None and self._path.suffix == ".jsonl"
        for name, value in (told if as_json else _flat(told, self._separator)).items():
            while name in whole:
                name += "_new"
            whole[name] = value
        with self._faults():
            self._write(whole, len(row))

    def _write(self, whole: dict[str, Any], given: int) -> None:
        """A row, of which the first columns were given and the others told."""
        if self._path and self._path.suffix == ".jsonl":
            self._file.write(json.dumps(whole, ensure_ascii=False, default=_plain) + "\n")
            return
        if self._count == 1:
            self._columns = list(whole)
            self._csv.writerow(self._columns)
        if whole.keys() != set(self._columns):
            raise UserError(
                f"row {self._count:,} has the columns {', '.join(whole)}, the first one {', '.join(self._columns)}; "
                f"in csv all have the same: give --output FILE.jsonl"
            )
        cells = {
            name: f"{value:.6g}" if n >= given and isinstance(value, float) else _cell(value)
            for n, (name, value) in enumerate(whole.items())
        }
        self._csv.writerow([cells[name] for name in self._columns])


def _flat(told: dict[str, Any], separator: str) -> dict[str, Any]:
    """A prediction with a plain value for each column, where there is a way."""
    flat: dict[str, Any] = {}
    for name, value in told.items():
        if name == "probabilities":
            flat |= {f"probability_{label}": p for label, p in value.items()}
        elif name == "top":
            for n, one in enumerate(value, start=1):
                flat |= {f"top_{n}": one["label"], f"top_{n}_probability": one["probability"]}
        elif isinstance(value, list) and all(isinstance(one, str) and one and separator not in one for one in value):
            flat[name] = separator.join(value)
        else:
            flat[name] = value
    return flat


def _cell(value: Any) -> Any:
    if isinstance(value, (list, tuple, dict)) or hasattr(value, "tolist"):
        return json.dumps(value, ensure_ascii=False, default=_plain)
    return value


def _plain(value: Any) -> Any:
    """What JSON has no form for: arrays and numbers of NumPy, and the rest as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
