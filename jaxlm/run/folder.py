"""The folder of a run: its config, its log and its progress; and files of predicted rows."""

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
from jaxlm.config import RunConfig, VectorsConfig, check_task, difference, from_json, to_json
from jaxlm.config.ranges import check_fields
from jaxlm.errors import RunError, UserError
from jaxlm.hub import model_files
from jaxlm.reports.metrics import BASELINE
from jaxlm.storage import disk

# Fields that may differ when the same run is resumed.
FREE = {"mesh", "remat", "attention", "unroll", "log_every", "eval_every", "checkpoint_every", "keep", "workdir"}
FREE |= {"keep_checkpoints", "sample_prompt", "sample_tokens", "profile", "baseline"}
FREE_DATA = ("path", "eval_path", "cache")  # the content of the data is compared instead of the path
SUMMARY = "summary.txt"  # the summary that a finished run printed


def open_run_dir(run: RunConfig | VectorsConfig, folder: Path) -> bool:
    """Creates the folder of a run where it does not exist.

    Args:
      run: the config.
      folder: the folder of the run.

    Returns:
      Whether this run has started in the folder, which then contains a log or a checkpoint.

    Raises:
      UserError: where the folder cannot be written, contains files that are not from a run, or contains another run
        (its model, task, data, tokenizer, optimizer, batch, seed or steps differ) that has made a step.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _cannot_be_written(folder, error) from None
    stored = _read(folder)
    is_own = lambda name: name in (disk.LOCK, BASELINE) or disk.is_temporary(name)
    if stored is None and not all(is_own(path.name) for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and contains no run; choose another --workdir")
    if stored is None or not _has_started(folder):
        return False
    differences = difference(_identity(to_json(run)), _identity(stored["run"]))
    if differences:
        lines = "\n".join(f"  {line}" for line in differences)
        raise UserError(
            f"{folder} contains another run, with other fields (this run | the run in the folder):\n{lines}\n"
            f"choose another --workdir, or use the fields that it was started with"
        )
    return True


def begin(
    run: RunConfig | VectorsConfig, folder: Path, fingerprint: str, labels: Any = (), weights: Path | None = None
) -> None:
    """Writes config.json.

    Args:
      run: the config as the user gave it.
      folder: the folder of the run, checked by `open_run_dir`.
      fingerprint: of the content of the data.
      labels: names of the outputs of the head.
      weights: the folder of `run.init`, where it exists.

    Raises:
      UserError: where the run in the folder was started with other data, or is finished and was started from other
        weights.
    """
    stored = _read(folder) if _has_started(folder) else None
    if stored is not None and stored["data"] != fingerprint:
        raise UserError(
            f"{folder} contains a run on data with other content: its fingerprint is {stored['data']}, but now it is "
            f"{fingerprint}; use the data that the run was started with, or choose another --workdir"
        )
    if stored is None:
        content = model_files.fingerprint(weights) if weights else None
    else:
        content = stored.get("weights")
        # An unfinished run resumes from its checkpoint and does not read these weights.
        finished = finished_at(folder) is not None
        if finished and content and weights and model_files.fingerprint(weights) != content:
            raise UserError(
                f"{folder} contains a finished run that started from other weights: those in {weights} have changed "
                f"since; choose another --workdir, or restore the weights"
            )
    known = {"data": fingerprint, "labels": labels, "weights": content, "jaxlm": jaxlm.__version__}
    write_json(folder / "config.json", {"run": to_json(run), **known})


def _read(folder: Path) -> dict[str, Any] | None:
    """Returns the content of config.json, as `begin` writes it; None where it is missing or damaged."""
    try:
        values = model_files.read_object(folder / "config.json")
    except UserError:
        return None
    run = values.get("run")
    return values if isinstance(run, dict) and isinstance(run.get("data"), dict) and "data" in values else None


def run_of(folder: str | Path) -> RunConfig | None:
    """Returns the config of the run in a folder, as the user gave it; None where the folder contains no run.

    Raises:
      UserError: where the config is not one that this version reads.
    """
    if (values := _read(Path(folder))) is None:
        return None
    try:
        run = from_json(RunConfig, values["run"])
        check_fields(run)
        check_task(run.task)
    except (UserError, TypeError, AttributeError, KeyError) as error:
        why = str(error) if isinstance(error, UserError) else "a value has the wrong type"
        raise UserError(
            f"{folder}/config.json is not a config of a run ({why}); correct it, or use the run's export instead"
        ) from None
    return run


def labels_of(folder: Path) -> tuple[str, ...] | dict[str, tuple[str, ...]] | None:
    """Returns the names of the outputs of the head of a run, or of the head of each of its tasks; None if unknown."""
    labels = (_read(folder) or {}).get("labels")
    if isinstance(labels, dict):
        return {task: names for task, part in labels.items() if (names := _names(part))} or None
    return _names(labels)


def _names(labels: Any) -> tuple[str, ...] | None:
    is_valid = isinstance(labels, list) and all(isinstance(name, str) for name in labels)
    return tuple(labels) if labels and is_valid else None


def _has_started(folder: Path) -> bool:
    log = folder / "metrics.jsonl"
    return any((folder / "checkpoints").glob("[0-9]*")) or (log.exists() and log.stat().st_size > 0)


def finished_at(folder: Path) -> int | None:
    """Returns the last step of the finished run in a folder; None where it is not finished.

    A finished run has a report. Where the report was deleted, it has scores and usually no checkpoints.
    """
    scores = folder / "scores.json"
    if not scores.exists() or not ((folder / "report.html").exists() or not _steps(folder / "checkpoints")):
        return None
    steps = [step for _, step in _whole_lines(folder / "metrics.jsonl")]
    return max(steps, default=0)


def drop_steps(checkpoints: Path) -> None:
    """Removes the checkpoints of a run, and their folder if nothing else is in it."""
    for step in _steps(checkpoints):
        shutil.rmtree(step)
    with suppress(OSError):
        checkpoints.rmdir()


def _steps(checkpoints: Path) -> list[Path]:
    return [path for path in checkpoints.glob("[0-9]*") if path.name.isdigit()]


def _whole_lines(log: Path) -> list[tuple[str, int]]:
    """Returns the lines of a log and their steps, without lines that were only partly written."""
    lines = log.read_text(errors="replace").splitlines(keepends=True) if log.exists() else []
    return [(line, step) for line in lines if (step := _step_of(line)) is not None]


def write_json(file: Path, values: Any) -> None:
    """Writes a JSON file whole or not at all."""
    try:
        disk.write(file, json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise _cannot_be_written(file, error) from None


def _cannot_be_written(path: Path, error: OSError) -> UserError | RunError:
    if error.errno in disk.DISK_FULL:
        return RunError(f"{path} cannot be written: {error.strerror}; free disk space, then run the command again")
    return UserError(f"{path} cannot be written: {error.strerror}; choose another --workdir, or fix its permissions")


def _identity(run: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields that must not change when a run is resumed."""
    fixed = {name: value for name, value in run.items() if name not in FREE}
    fixed["data"] = {name: value for name, value in run["data"].items() if name not in FREE_DATA}
    return fixed


@contextmanager
def _without_torch() -> Iterator[None]:
    """Hides torch from an import: where it is installed, tensorboardX loads it, which takes seconds, without need."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


class RunLog:
    """Writes metrics.jsonl, TensorBoard events and the progress line; raises RunError where the disk is full."""

    def __init__(self, folder: Path, step: int, steps: int):
        """Opens the log, and removes the lines after `step`.

        Args:
          folder: the folder of the run.
          step: the step from which the run starts or resumes.
          steps: number of steps of the run.
        """
        with _without_torch():
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import SessionLog

        self._file, self._steps, self._rewriting = folder / "metrics.jsonl", steps, False
        self._start, self._first, self._has_progress = time.monotonic(), step, False  # of the estimate of time
        # A run that starts again also evaluates its first weights again, as step 0. An incomplete line can be dropped:
        # it was written after every checkpoint.
        lines = [line for line, logged in _whole_lines(self._file) if step and logged <= step]
        with self._faults():
            disk.write(self._file, "".join(lines))
            (folder / "tensorboard").mkdir(exist_ok=True)
            # SummaryWriter writes in a thread, where the error of a full disk would be lost.
            self._events = EventsWriter(str(folder / "tensorboard" / "events"))
            # This makes TensorBoard discard the events of steps that are repeated.
            self._event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes a line of metrics.jsonl and a point of each TensorBoard curve."""
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
                f"the log in {self._file.parent} cannot be written: {error.strerror}; free disk space, then run the "
                f"same command again"
            ) from error

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Prints the progress: rewrites the line on a terminal, and prints a new line elsewhere."""
        now = time.monotonic()
        step_seconds = (now - self._start) / max(1, step - self._first)
        if not self._has_progress:  # the first steps include compilation, the others do not
            step_seconds = values.get("step_ms_p50", 1000 * step_seconds) / 1000
            self._start, self._first, self._has_progress = now, step, True
        seconds = step_seconds * (self._steps - step)
        line = (
            f"step {step:,}/{self._steps:,}  loss {values['loss']:.4f}  rate {values['learning_rate']:.2e}  "
            f"{values['tokens_per_second']:,.0f} tokens/s  "
            f"{'{:.1%} MFU  '.format(values['mfu']) if 'mfu' in values else ''}"
            f"{'epsilon {:.3f}  '.format(values['epsilon']) if 'epsilon' in values else ''}{duration(seconds)} left"
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
    """Returns the step of a line of metrics.jsonl; None for a line that is incomplete or damaged."""
    with suppress(UserError):
        values = model_files.parse_object(line.encode(), "metrics.jsonl") if line.endswith("}\n") else {}
        return values["step"] if isinstance(values.get("step"), int) else None
    return None


class NoLog:
    """The log of all hosts except the first, which writes nothing."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Does nothing."""

    progress = write

    def close(self) -> None:
        """Does nothing."""


def duration(seconds: float) -> str:
    """Returns a time as `1:02:03` or `2:03`, rounded up to seconds."""
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class RowWriter:
    """Writes rows and their predictions to a csv or jsonl file, or as csv to standard output; a context.

    The file appears under its name when it is complete. In csv, a list of names is one cell; probabilities and the most
    probable classes have their own columns.

    Raises:
      UserError: for a file with another suffix, a file that exists, a row of a csv file with other columns than the
        first row, and at the end where no row was written.
    """

    def __init__(self, file: str, separator: str = " "):
        """Checks the file.

        Args:
          file: a path that ends in .csv or .jsonl; empty: standard output.
          separator: between the names of a list, in csv.
        """
        self._separator = separator
        self._path = disk.local(file, "output") if file else None
        if self._path and self._path.suffix not in (".csv", ".jsonl"):
            raise UserError(f"output is {file!r}; it must end in .csv or .jsonl")
        self._check_new()
        self._columns: list[str] = []
        self._count = 0

    def _check_new(self) -> None:
        if self._path and self._path.exists():  # it may be the input
            raise UserError(f"output is '{self._path}', which exists; move it away, or choose another --output")

    def __enter__(self) -> RowWriter:
        self._file: TextIO = sys.stdout
        self._open = ExitStack()
        if self._path:
            with ExitStack() as stack, self._faults():
                lock = disk.lock_path(self._path)
                stack.enter_context(disk.lock(lock, str(self._path), "choose another --output"))
                self._check_new()  # again, because the process that had the lock may have written it
                temporary = stack.enter_context(disk.atomic_file(self._path, overwrite=False))
                self._file = stack.enter_context(open(temporary, "w", newline="", encoding="utf-8"))
                self._open = stack.pop_all()
        self._csv = csv.writer(self._file, lineterminator="\n")
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._path is None:
            self._file.flush()  # raises here, rather than at exit, where the reader has closed the output
        empty = UserError("the file has no row; give at least one")
        failure = empty if error is None and not self._count else error
        try:
            with self._faults():
                self._open.__exit__(type(failure) if failure else None, failure, trace)
        except (UserError, RunError):
            if failure is None:  # otherwise the first failure is reported
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
            raise disk.write_error(self._path, error, "--output") from None

    def write(self, row: dict[str, Any], prediction: dict[str, Any]) -> None:
        """Writes a row.

        Args:
          row: the columns of the input.
          prediction: further columns; a name that the row already has gets the suffix `_new`.
        """
        self._count += 1
        values = dict(row)
        as_json = self._path is not None and self._path.suffix == ".jsonl"
        for name, value in (prediction if as_json else _flatten(prediction, self._separator)).items():
            while name in values:
                name += "_new"
            values[name] = value
        with self._faults():
            self._write(values, len(row))

    def _write(self, values: dict[str, Any], inputs: int) -> None:
        """Writes a row whose first `inputs` columns are from the input."""
        if self._path and self._path.suffix == ".jsonl":
            self._file.write(json.dumps(values, ensure_ascii=False, default=_plain) + "\n")
            return
        if self._count == 1:
            self._columns = list(values)
            self._csv.writerow(self._columns)
        if values.keys() != set(self._columns):
            columns = ", ".join(self._columns)
            raise UserError(
                f"row {self._count:,} has the columns {', '.join(values)}, but the first row has {columns}; "
                f"all rows of a csv file need the same columns; use --output FILE.jsonl"
            )
        cells = {
            name: f"{value:.6g}" if n >= inputs and isinstance(value, float) else _cell(value)
            for n, (name, value) in enumerate(values.items())
        }
        self._csv.writerow([cells[name] for name in self._columns])


def _flatten(prediction: dict[str, Any], separator: str) -> dict[str, Any]:
    """Returns a prediction with one value per column, as far as possible."""
    flat: dict[str, Any] = {}
    for name, value in prediction.items():
        if name == "probabilities":
            flat |= {f"probability_{label}": p for label, p in value.items()}
        elif name == "top":
            for n, item in enumerate(value, start=1):
                flat |= {f"top_{n}": item["label"], f"top_{n}_probability": item["probability"]}
        elif isinstance(value, list) and all(isinstance(x, str) and x and separator not in x for x in value):
            flat[name] = separator.join(value)
        else:
            flat[name] = value
    return flat


def _cell(value: Any) -> Any:
    if isinstance(value, (list, tuple, dict)) or hasattr(value, "tolist"):
        return json.dumps(value, ensure_ascii=False, default=_plain)
    return value


def _plain(value: Any) -> Any:
    """Returns a value that JSON has no form for as lists and numbers, or as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
