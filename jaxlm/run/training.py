"""A run that is set up: its state, its compiled steps, its log, its checkpoints; and what is done between steps."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

from jaxlm.config import RunConfig
from jaxlm.data.batches import Batch, fed
from jaxlm.devices import chips, hosts
from jaxlm.errors import RunError, Stopped
from jaxlm.lm import LM, find, with_params
from jaxlm.nn import parameters
from jaxlm.reports import report
from jaxlm.run.assembly import Assembly, assemble, closed_flops, local_rows, shard_batch
from jaxlm.run.checkpoint import Checkpoints, OfFirstHost, checksums_of, finite
from jaxlm.run.evaluate import run_eval
from jaxlm.run.export import export
from jaxlm.run.folder import NoLog, RunLog, begin, finished_at
from jaxlm.run.measure import Meter, Trace
from jaxlm.run.resolve import ResolvedRun
from jaxlm.run.step import TrainState, make_eval_step
from jaxlm.run.weights import check_fits, check_frozen, origin, start_from, weights_of
from jaxlm.storage import buckets


def say(message: str) -> None:
    """Prints one line for the person who watches the run, from its first host."""
    if hosts.is_first():
        # On a terminal the line of progress, which is rewritten in place, makes room.
        print(f"\r\x1b[K{message}" if sys.stderr.isatty() else message, file=sys.stderr, flush=True)


class Journal:
    """The lines of the log: metrics of steps, which stay on the device until a line is written or a state saved.

    A checkpoint between two lines carries along what is not yet in one, so that the next line is the same after it.
    """

    def __init__(self, log: RunLog | NoLog, meter: Meter, log_every: int, notes: dict[str, Any]):
        self.log, self.meter, self._log_every = log, meter, log_every
        self.unlogged: list[Any] = notes.get("unlogged", [])
        self.logged: list[dict[str, float]] = notes.get("logged", [])  # of the steps of the last line

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that was handed over to the device."""
        self.meter.stepped(metrics["loss"])
        self.unlogged.append(metrics)

    def write_line(self, step: int) -> None:
        """Writes the line of a step."""
        # The last line may have few steps of its own, and is a mean over as many as the others.
        window = (self.logged + self.unlogged)[-max(self._log_every, len(self.unlogged)) :]
        values = _averaged(window, self.unlogged, self.meter.seconds) | self.meter.line(len(self.unlogged))
        self.log.write(step, values)
        self.log.progress(step, values)
        self.unlogged, self.logged = [], self.unlogged

    def write_scores(self, step: int, scores: dict[str, float]) -> None:
        """Writes the line of an evaluation."""
        self.log.write(step, {f"eval/{name}": value for name, value in scores.items()})

    def carried(self) -> dict[str, Any]:
        """Returns what a checkpoint carries along, as JSON values."""
        return {"unlogged": self.unlogged, "logged": self.logged, **self.meter.carried()}


class Training:
    """A run that is set up; closed as a context.

    state: the newest.  model: without parameters.  history: what each evaluation was worth, the larger the better.
    before: what the weights were worth that the run started from.  scores, found: those of the last evaluation, and
    what the task found in it.
    """

    def __init__(
        self,
        resolved: ResolvedRun,
        place: buckets.RunFolder,
        parts: Assembly,
        checkpoints: Checkpoints | OfFirstHost,
        state: TrainState,
        notes: dict[str, Any],
        model: LM,
    ):
        run, mesh = resolved.run, resolved.mesh
        self.resolved, self.run, self.place, self.parts, self.checkpoints = resolved, run, place, parts, checkpoints
        self.state, self.model, self.started = state, model, int(state.step)
        self.history: list[float] = notes.get("history", [])
        self.before: float = notes.get("before", -math.inf)
        self.frozen_sums = None if state.frozen is None else checksums_of(state.frozen)
        self.checkpoint_every = run.checkpoint_every or max(1, run.steps // 10)
        self.scores: dict[str, float] = {}
        self.found: Any = None
        self._put = partial(shard_batch, mesh)
        self._rows = local_rows(mesh, run.batch, run.accumulate)
        self._held_out_rows = local_rows(mesh, run.batch // run.accumulate, 1)
        self._eval_step = jax.jit(make_eval_step(resolved.task, parts.module))
        self.trace = Trace(place.folder / "profile", run.profile, self.started, run.steps)
        log = RunLog(place.folder, self.started, run.steps) if hosts.is_first() else NoLog()
        self.journal = Journal(log, Meter(mesh, _flops(resolved), notes), run.log_every, notes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.journal.meter.close()
            self.trace.close()
            self.journal.log.close()
        finally:
            self.checkpoints.close()
            self.place.send()

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """Yields each step that is left, from 1, and its batch on the mesh."""
        end = self.started if self.is_stale else self.run.steps
        batches = fed(self.resolved.train, self.started, end, lambda: self.state, self._rows)
        for step, batch in enumerate(self.journal.meter.fed(batches), self.started + 1):
            yield step, self._put(batch, self.run.accumulate)

    def check(self, step: int, state_too: bool) -> None:
        """Raises RunError where a loss, or an entry of the state, is not finite."""
        self.journal.unlogged = _finite(jax.device_get(self.journal.unlogged), step, self.checkpoints)
        if state_too and not finite(self.state):
            raise _diverged("a weight is not finite", step, self.journal.unlogged[-1], self.checkpoints)

    def score(self, params: Any) -> tuple[dict[str, float], Any]:
        """Returns the scores of parameters on the held-out data, and what the task found."""
        resolved = self.resolved
        run_over = lambda batches: run_eval(self._eval_step, params, batches, self._put, self._held_out_rows)
        model = with_params(self.model, params)
        return resolved.task.measure(model, run_over, resolved.held_out, resolved.data.held_out)

    def worth(self, scores: dict[str, float]) -> float:
        """Returns the score by which checkpoints are compared: the larger the better."""
        return -scores["loss"] if self.resolved.best == "loss" else scores[self.resolved.best]

    def score_start(self) -> None:
        """Scores the weights that the run starts from."""
        scores = self.score(self.state.model)[0]
        self.before = self.worth(scores)
        self.journal.write_scores(0, scores)
        say(_score_line(0, self.run.steps, scores))

    def evaluate(self, step: int) -> bool:
        """Scores the state, and returns whether the run ends, since its patience does."""
        began = time.monotonic()
        self.scores, self.found = self.score(self.state.model)
        self.journal.write_scores(step, self.scores)
        self.journal.meter.paused(time.monotonic() - began)
        if not np.isfinite(self.scores["loss"]):
            what = f"the held-out loss is {self.scores['loss']:.4g}"
            raise _diverged(what, step, self.last_metrics, self.checkpoints)
        worth = self.worth(self.scores)
        is_best = worth > max([self.before, *self.history])
        self.history.append(worth)
        say(_score_line(step, self.run.steps, self.scores, is_best))
        if self.is_stale and step < self.run.steps:
            patience = self.run.patience
            say(f"no better {self.resolved.best} in {patience} evaluations: the run ends at step {step:,}")
        return self.is_stale

    @property
    def last_metrics(self) -> dict[str, float]:
        """The metrics of the newest step that was looked at."""
        return (self.journal.logged + self.journal.unlogged)[-1]

    @property
    def is_stale(self) -> bool:
        """Whether the last `patience` evaluations were no better than one before them."""
        patience, history = self.run.patience, self.history
        return bool(patience) and len(history) > patience and max(history[-patience:]) <= max(history[:-patience])

    def save(self, evaluated: bool) -> None:
        """Starts to write a checkpoint, with the scores where the state was evaluated."""
        notes: dict[str, Any] = {"history": self.history, **self.journal.carried()}
        notes |= {} if math.isinf(self.before) else {"before": self.before}
        notes |= {} if self.frozen_sums is None else {"frozen": self.frozen_sums}
        self.checkpoints.save(self.state, self.scores | {"best": self.history[-1]} if evaluated else None, notes)
        self.place.send()  # of what is whole by now

    def end(self, ended: bool) -> tuple[LM, str]:
        """Exports the best weights, and returns their model and the name of the format.

        Args:
          ended: whether the run has ended.

        Raises:
          Stopped: where it has not.
        """
        self.checkpoints.wait()
        step, best_step = int(self.state.step), self.checkpoints.best()
        if best_step is not None and best_step != step:
            # What the optimizer keeps is not needed any more, and makes room for the other parameters.
            jax.tree.map(lambda leaf: leaf.delete(), self.state.opt_state)
            self.state = self.state._replace(opt_state=None)
            params = self.checkpoints.restore_params(self.parts.like.params, best_step)
            if params is not None:
                self.state = self.state._replace(step=jax.numpy.int32(best_step), params=params)
                self.scores = {}
        lm, kind = export(with_params(self.model, self.state.model), self.resolved.task, self.place.folder / "export")
        if not ended:
            raise Stopped(
                f"stopped at step {step:,} of {self.run.steps:,} and saved; the same command resumes from here"
            )
        if not self.scores:
            self.scores, self.found = self.score(self.state.model)
        return lm, kind


def set_up(resolved: ResolvedRun, place: buckets.RunFolder, model_given: bool, resuming: bool) -> Training | None:
    """Returns the run with its state on the devices, at the step of its newest checkpoint; None where it is finished.

    Args:
      resolved: the run.
      place: its folder, which becomes that of this run.
      model_given: whether the weights are those of a model, not of `run.init`.
      resuming: whether the folder holds a state of this run.
    """
    run, data, weights, folder = resolved.run, resolved.data, resolved.weights, place.folder
    # Shapes first, so that every array is created on its devices.
    parts = assemble(resolved)
    if weights is not None:
        shapes = {path: leaf.shape for path, leaf in parameters.by_path(parts.like.model).items()}
        check_fits(weights.shapes, shapes)
    # All that the user could have got wrong is looked at; the folder is this run's from here on.
    of_init = find(run.init) if run.init and not model_given and weights is not None else None
    hosts.first(lambda: begin(resolved.given, folder, data.fingerprint, data.labels, of_init))
    if resuming and hosts.first(lambda: finished_at(folder)) is not None:
        return None
    # The copies of a folder at an address are each host's own.
    keeps: type[Checkpoints | OfFirstHost] = Checkpoints
    if place.address and jax.process_count() > 1:
        keeps = OfFirstHost
    checkpoints = keeps(folder / "checkpoints", run.keep, say)
    restored, notes = checkpoints.restore(parts.like) or (None, {})
    state = _state(resolved, parts, restored, notes)
    hosts.first(lambda: (folder / "report.html").unlink(missing_ok=True))  # it exists in finished runs alone
    files: dict[str, Any] = {"files": weights.files, "pooling": weights.pooling} if weights else {}
    own_module = parts.module.clone(remat="none", unroll=1)  # what training alone needs
    model = LM(resolved.model, own_module, None, data.tokenizer, origin(run, weights), **files)
    # The weights keep the files of a checkpoint open.
    training = Training(dataclasses.replace(resolved, weights=None), place, parts, checkpoints, state, notes, model)
    _say_start(training)
    if weights is not None and not training.started and run.eval_every:
        training.score_start()
    return training


def _state(resolved: ResolvedRun, parts: Assembly, restored: TrainState | None, notes: dict[str, Any]) -> TrainState:
    """Returns the state that a run begins with: the one restored, or one of its weights, or of its seed."""
    key = jax.random.key_data(jax.random.key(resolved.run.seed))
    like, draw, weights = parts.like, partial(parts.draw, key), resolved.weights
    if weights is None and (restored is None or like.frozen is not None):
        weights = weights_of(resolved.given, None, resolved.task, resolved.data.labels, False)
    if restored is not None and like.frozen is None:
        return restored
    if restored is not None:  # checkpoints leave what is frozen where it came from
        frozen = start_from(weights, like.frozen, draw, lambda _: None)
        check_frozen(frozen, notes["frozen"], resolved.run.init)
        return restored._replace(frozen=frozen)
    if weights is None:
        return parts.first_state(key)
    return parts.state_of(start_from(weights, like.model, draw, say), key)


def _score_line(step: int, steps: int, scores: Mapping[str, float], is_best: bool = False) -> str:
    """Returns a line of the console with the held-out scores of a step; those of a run stand below each other.

    is_best: whether no evaluation before was as good.
    """
    values = "  ".join(f"{report.words(name)} {report.fact(name, value):>8}" for name, value in scores.items())
    width = len(f"{steps:,}")
    return f"scores    step {step:>{width},}/{steps:,}  {values}{'  best so far' if is_best else ''}"


def _finite(metrics: list[dict[str, Any]], step: int, checkpoints: Checkpoints | OfFirstHost) -> list[dict[str, float]]:
    """The metrics of the last steps, up to `step`, as numbers.  Raises RunError where a loss is not finite."""
    for n, values in enumerate(metrics, start=step - len(metrics) + 1):
        if not (np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])):
            raise _diverged(f"the loss is {values['loss']:.4g}", n, values, checkpoints)
    return [{name: float(value) for name, value in values.items()} for values in metrics]


def _diverged(what: str, step: int, values: dict[str, Any], checkpoints: Checkpoints | OfFirstHost) -> RunError:
    checkpoints.wait()
    good = checkpoints.last()
    return RunError(
        f"{what} at step {step:,}; learning rate {values['learning_rate']:.3g}, "
        f"gradient norm {values['grad_norm']:.4g}; all must be finite; "
        + ("no checkpoint was saved yet" if good is None else f"the last good checkpoint is step {good:,}")
        + "; lower --optimizer.rate, raise --optimizer.warmup or lower --optimizer.clip, in a new --workdir"
    )


def _averaged(window: list[dict[str, float]], steps: list[dict[str, float]], seconds: float) -> dict[str, float]:
    """A line of the log: means over a window, and tokens and examples a second, padding not counted.

    steps: those since the last line, which took so many seconds.
    """
    means = {name: sum(values[name] for values in window) / len(window) for name in window[0]}
    speed = {f"{name}_per_second": sum(values[name] for values in steps) / seconds for name in ("tokens", "examples")}
    means = {name: value for name, value in means.items() if name not in ("tokens", "examples")}
    return {"loss": means["loss"]} | means | {"learning_rate": steps[-1]["learning_rate"]} | speed


def _flops(resolved: ResolvedRun) -> int:
    """Returns the model FLOPs of a step; 0 where no utilisation follows from them: the peak of a chip is that of
    products in bfloat16, and the formula assumes that all parameters are trained."""
    run = resolved.run
    frozen = run.optimizer.freeze != "none" or run.optimizer.freeze_layers
    if run.compute_dtype != "bfloat16" or frozen:
        return 0
    return closed_flops(resolved.task, resolved.model, run.batch, resolved.train.nothing())


def _say_start(training: Training) -> None:
    """Prints what the run is about to do."""
    resolved, run, mesh = training.resolved, training.run, training.resolved.mesh
    data, task, device = resolved.data, resolved.task, mesh.devices.flat[0]
    rows = ", ".join(f"{count:,} {name}" for name, count in data.rows.items())
    say(f"data      {rows}; {data.train.said} to train on, {data.held_out.said} held out")
    split = ", ".join(f"{name} {ways}" for name, ways in mesh.shape.items() if ways > 1)
    on = f"{mesh.size} {device.platform} device(s)" + (f", mesh: {split}" if split else "")
    say(f"model     {size(training.parts.like.model):,} parameters on {on}")
    if unknown := chips.without_rates(device.device_kind, device.platform):
        say(f"chip      {unknown}")
    if products := chips.precision_of(run.compute_dtype, run.matmul_precision, device.platform):
        say(f"precision {products}")
    say(f"run       {run.steps:,} steps of {run.batch} x {run.data.length} tokens, in {training.place.folder}")
    for name, value in packing(run, resolved.train).items():
        say(f"{name:9} {value}")
    if training.started:
        say(f"resuming  at step {training.started:,}")
    if resolved.uncapped and len(data.held_out.tokens) < resolved.uncapped:
        shown = f"{len(data.held_out.tokens):,} of {resolved.uncapped:,}"
        say(f"eval      on {shown} held-out tokens (--eval-tokens 0: all)")
    if balance := task.balance(data.train):
        say(f"labels    {balance}")
    for line in task.truncated(resolved.train):
        say(f"length    {line}")


def packing(run: RunConfig, batches: Any) -> dict[str, str]:
    """How full the rows are, of a run over examples."""
    if not run.examples and not run.epochs:
        return {}
    units, rows = len(batches.lengths), batches.rows_in_epoch
    filled = batches.lengths.sum() / (rows * run.data.length)
    return {"packing": f"{units / rows * run.batch:.1f} examples in an update; {filled:.0%} of the places hold tokens"}


def size(shapes: Any) -> int:
    """Returns the number of entries of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
