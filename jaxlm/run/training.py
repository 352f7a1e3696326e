"""A run in progress: its state, compiled steps, log and checkpoints, and the work between steps."""

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
from jaxlm.data.batches import Batch, iterate_batches
from jaxlm.data.corpus import Prepared
from jaxlm.devices import chips, hosts
from jaxlm.errors import RunError, Stopped, UserError
from jaxlm.hub.convert import nested
from jaxlm.lm import LM, find, with_params
from jaxlm.nn import parameters
from jaxlm.reports import report
from jaxlm.run import nodes
from jaxlm.run.assembly import Assembly, assemble, closed_flops, local_rows, shard_batch
from jaxlm.run.checkpoint import Checkpoints, OfFirstHost, checksums_of, finite
from jaxlm.run.evaluate import run_eval
from jaxlm.run.export import export
from jaxlm.run.folder import NoLog, RunLog, begin, finished_at
from jaxlm.run.measure import Meter, Trace
from jaxlm.run.privacy import Budget
from jaxlm.run.resolve import ResolvedRun
from jaxlm.run.step import TrainState, make_eval_step
from jaxlm.run.teacher import sources_of, with_teacher
from jaxlm.run.teacher_cache import fill
from jaxlm.run.weights import check_fits, check_frozen, origin, start_from, weights_of
from jaxlm.storage import buckets


def log(message: str) -> None:
    """Prints a line to standard error, on the first host only."""
    if hosts.is_first():
        # On a terminal this replaces the progress line, which is rewritten in place.
        print(f"\r\x1b[K{message}" if sys.stderr.isatty() else message, file=sys.stderr, flush=True)


class Journal:
    """Collects the metrics of steps, and writes them to the log.

    Metrics stay on the device until a line is written or a state is saved. A checkpoint stores the metrics that are not
    yet in a line, so that a resumed run writes the same next line.
    """

    def __init__(
        self, log: RunLog | NoLog, meter: Meter, log_every: int, notes: dict[str, Any], budget: Budget | None = None
    ):
        self.log, self.meter, self._log_every, self._budget = log, meter, log_every, budget
        self.unlogged: list[Any] = notes.get("unlogged", [])
        self.logged: list[dict[str, float]] = notes.get("logged", [])  # metrics of the steps of the last line

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Adds the metrics of a step that was dispatched."""
        self.meter.record_step(metrics["loss"])
        self.unlogged.append(metrics)

    def write_line(self, step: int, later: int = 0) -> None:
        """Writes the line of a step.

        Args:
          step: the step.
          later: number of steps that were added after it.
        """
        end = len(self.unlogged) - later
        steps, rest = self.unlogged[:end], self.unlogged[end:]
        # The last line of a run may follow after few steps; its window is as long as that of the other lines.
        window = (self.logged + steps)[-max(self._log_every, len(steps)) :]
        seconds, measurements = self.meter.line(len(steps), later)
        values = _averaged(window, steps, seconds) | measurements
        if self._budget is not None:
            values["epsilon"] = self._budget.epsilon(step)
        self.log.write(step, values)
        self.log.progress(step, values)
        self.unlogged, self.logged = rest, steps

    def write_scores(self, step: int, scores: dict[str, float]) -> None:
        """Writes the line of an evaluation."""
        self.log.write(step, {f"eval/{name}": value for name, value in scores.items()})

    def state(self) -> dict[str, Any]:
        """Returns the metrics that a checkpoint stores, as JSON values."""
        return {"unlogged": self.unlogged, "logged": self.logged, **self.meter.state()}


class Training:
    """A run in progress; a context that closes its log and its checkpoints.

    state: after the last step, and at the end with the best weights.  model: the model without parameters.
    last_step: the last step of the run, set at its end.
    history: the score of each evaluation that selects checkpoints; larger is better.
    before: the same score of the weights that the run started from.
    scores, result: all scores of the last evaluation, and the outputs that the task kept.
    """

    def __init__(
        self,
        resolved: ResolvedRun,
        run_folder: buckets.RunFolder,
        parts: Assembly,
        checkpoints: Checkpoints | OfFirstHost,
        state: TrainState,
        notes: dict[str, Any],
        model: LM,
    ):
        run, mesh = resolved.run, resolved.mesh
        self.resolved, self.run, self.run_folder, self.parts = resolved, run, run_folder, parts
        self.checkpoints, self.state, self.model, self.started = checkpoints, state, model, int(state.step)
        self.last_step = self.started
        self.history: list[float] = notes.get("history", [])
        self.before: float = notes.get("before", -math.inf)
        self.frozen_sums = None if state.frozen is None else checksums_of(state.frozen)
        self.first_sparse = run.prune.window(run.steps)[1]  # no checkpoint before this step has the final sparsity
        self.checkpoint_every = run.checkpoint_every or max(1, run.steps // 10)
        if "batches" in notes:
            resolved.train.resume(notes["batches"])
        self.scores: dict[str, float] = {}
        self.result: Any = None
        self._shard = partial(shard_batch, mesh)
        self._rows = local_rows(mesh, resolved.train.rows, run.accumulate)
        self._held_out_rows = local_rows(mesh, run.batch // run.accumulate, 1)
        self._eval_step = jax.jit(make_eval_step(resolved.task, parts.module))
        self.trace = Trace(run_folder.folder / "profile", run.profile, self.started, run.steps)
        run_log = RunLog(run_folder.folder, self.started, run.steps) if hosts.is_first() else NoLog()
        self.journal = Journal(run_log, Meter(mesh, _flops(resolved), notes), run.log_every, notes, resolved.budget)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.journal.meter.close()
            self.trace.close()
            self.journal.log.close()
        finally:
            self.checkpoints.close()
            self.run_folder.send()

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """Yields the number of each step that is left, counted from 1, and its batch on the mesh.

        Raises:
          UserError: if a batch has more examples in a row than the task declares.
        """
        end = self.started if self.is_stale else self.run.steps
        read_state = lambda: self.state
        batches = iterate_batches(self.resolved.train, self.started, end, read_state, self._rows, self._place)
        yield from enumerate(self.journal.meter.fed(batches), self.started + 1)

    def _place(self, index: int, batch: Batch) -> Batch:
        """Returns a batch on the mesh, as micro-batches."""
        max_examples = self.resolved.task.max_examples
        # A task whose rows hold one example uses no mask of segments.
        if (count := int(batch["segments_BT"].max())) > max_examples:
            raise UserError(
                f"the batch of step {index + 1:,} has a row with {count} examples, and the task has max_examples "
                f"{max_examples}; return fewer examples in a row, or raise max_examples of the task"
            )
        return self._shard(batch, self.run.accumulate)

    def check(self, step: int, state_too: bool, later: int = 0) -> None:
        """Fetches the metrics of the steps up to a step.

        Args:
          step: the step.
          state_too: whether to check the state as well.
          later: number of steps that were dispatched after it, whose metrics are not fetched.

        Raises:
          RunError: where a loss, a gradient norm or an entry of the state is not finite.
        """
        end = len(self.journal.unlogged) - later
        fetched = jax.device_get(self.journal.unlogged[:end])
        self.journal.unlogged[:end] = _finite_metrics(fetched, step, self.checkpoints)
        if state_too and not finite(self.state):
            raise _divergence("a weight is not finite", step, self.journal.unlogged[-1], self.checkpoints)

    def score(self, params: Any) -> tuple[dict[str, float], Any]:
        """Returns the scores of all parameters on the held-out data, and the outputs that the task keeps."""
        resolved = self.resolved
        run_over = lambda batches: run_eval(self._eval_step, params, batches, self._shard, self._held_out_rows)
        model = with_params(self.model, parameters.of_model(params))
        return resolved.task.measure(model, run_over, resolved.held_out, resolved.data.held_out)

    def worth(self, scores: dict[str, float]) -> float:
        """Returns the score that selects checkpoints; larger is better."""
        return -scores["loss"] if self.resolved.best == "loss" else scores[self.resolved.best]

    def score_start(self) -> None:
        """Evaluates the weights that the run starts from."""
        scores = self.score(self.state.parameters)[0]
        self.before = self.worth(scores)
        self.journal.write_scores(0, scores)
        log(_score_line(0, self.run.steps, scores))

    def evaluate(self, step: int) -> bool:
        """Evaluates the state, and returns whether the run ends early because its patience has run out."""
        began = time.monotonic()
        self.scores, self.result = self.score(self.state.parameters)
        self.journal.write_scores(step, self.scores)
        self.journal.meter.record_pause(time.monotonic() - began)
        if not np.isfinite(self.scores["loss"]):
            fault = f"the held-out loss is {self.scores['loss']:.4g}"
            raise _divergence(fault, step, self.last_metrics, self.checkpoints)
        if step < self.first_sparse:
            log(_score_line(step, self.run.steps, self.scores))
            return False
        worth = self.worth(self.scores)
        is_best = worth > max([self.before, *self.history])
        self.history.append(worth)
        log(_score_line(step, self.run.steps, self.scores, is_best))
        if self.is_stale and step < self.run.steps:
            patience = self.run.patience
            log(f"no better {self.resolved.best} in {patience} evaluations; the run ends at step {step:,}")
        return self.is_stale

    @property
    def last_metrics(self) -> dict[str, float]:
        """The metrics of the last step that was fetched."""
        return (self.journal.logged + self.journal.unlogged)[-1]

    @property
    def is_stale(self) -> bool:
        """Whether none of the last `patience` evaluations was better than the best before them."""
        patience, history = self.run.patience, self.history
        return bool(patience) and len(history) > patience and max(history[-patience:]) <= max(history[:-patience])

    def save(self, evaluated: bool) -> None:
        """Starts to write a checkpoint.

        Args:
          evaluated: whether `scores` are those of this state.
        """
        evaluated = evaluated and int(self.state.step) >= self.first_sparse
        notes: dict[str, Any] = {"history": self.history, **self.journal.state()}
        notes |= {} if math.isinf(self.before) else {"before": self.before}
        notes |= {} if self.frozen_sums is None else {"frozen": self.frozen_sums}
        source = self.resolved.train
        notes |= {"batches": source.progress()} if hasattr(source, "progress") else {}
        self.checkpoints.save(self.state, self.scores | {"best": self.history[-1]} if evaluated else None, notes)
        self.run_folder.send()  # earlier checkpoints, which are complete by now

    def end(self, ended: bool) -> tuple[LM, str]:
        """Exports the best weights.

        Args:
          ended: whether the run has ended, rather than been stopped.

        Returns:
          The model with the best weights, and the name of the format of the export.

        Raises:
          Stopped: where the run has not ended.
        """
        self.checkpoints.wait()
        step, best_step = int(self.state.step), self.checkpoints.best()
        self.last_step = step
        if best_step is not None and best_step != step:
            # The optimizer's state is no longer needed; deleting it makes room for the other parameters.
            jax.tree.map(lambda leaf: leaf.delete(), self.state.opt_state)
            self.state = self.state._replace(opt_state=None)
            params = self.checkpoints.restore_params(self.parts.like.params, best_step)
            if params is not None:
                self.state = self.state._replace(step=jax.numpy.int32(best_step), params=params)
                self.scores = {}
        adapted = parameters.outside_nodes(self.state.params) if self.run.adapter.rank else ()
        best = dataclasses.replace(with_params(self.model, nodes.finish(self.state.model)), adapted=adapted)
        budget = self.resolved.budget
        privacy = None if budget is None else budget.facts(step)
        lm, kind = export(best, self.resolved.task, self.run_folder.folder / "export", privacy)
        if not ended:
            raise Stopped(
                f"stopped at step {step:,} of {self.run.steps:,} and saved; the same command resumes from here"
            )
        if not self.scores:
            self.scores, self.result = self.score(self.state.parameters)
        return lm, kind


def set_up(resolved: ResolvedRun, run_folder: buckets.RunFolder, model_given: bool, resuming: bool) -> Training | None:
    """Creates or restores the state of a run on the devices.

    Args:
      resolved: the run.
      run_folder: its folder.
      model_given: whether the run starts from the weights of a model rather than those of `run.init`.
      resuming: whether the folder contains a state of this run.

    Returns:
      The run at the step of its newest checkpoint; None where it is finished.

    Raises:
      UserError: where the weights do not fit the model, or the folder contains another run.
    """
    run, data, weights, folder = resolved.run, resolved.data, resolved.weights, run_folder.folder
    # Shapes and shardings come first, so that every array is created on its own devices.
    parts = assemble(resolved)
    if weights is not None:
        paths = parameters.by_path(parts.like.model, whole_nodes=True)
        check_fits(weights.shapes, {path: parts.dense[path].shape for path in paths})
    # All of the user's input is valid, so the folder belongs to this run from here on.
    init_folder = find(run.init) if run.init and not model_given and weights is not None else None
    hosts.run_on_first(lambda: begin(resolved.given, folder, data.fingerprint, data.labels, init_folder))
    if resuming and hosts.run_on_first(lambda: finished_at(folder)) is not None:
        return None
    # Each host has its own copy of a folder at an address, so only the first one writes checkpoints.
    is_copy = run_folder.address and jax.process_count() > 1
    checkpoints: Checkpoints | OfFirstHost = (OfFirstHost if is_copy else Checkpoints)(
        folder / "checkpoints", run.keep, log
    )
    if run.distill.cache:
        fill(resolved, parts.module, log)
    restored, notes = checkpoints.restore(parts.like) or (None, {})
    state = _state(resolved, parts, restored, notes)
    hosts.run_on_first(lambda: (folder / "report.html").unlink(missing_ok=True))  # only finished runs have one
    files: dict[str, Any] = {"files": weights.files, "pooling": weights.pooling} if weights else {}
    own_module = parts.module.clone(remat="none", unroll=1)  # these only serve training
    model = LM(resolved.model, own_module, None, data.tokenizer, origin(run, weights), **files)
    resolved = dataclasses.replace(resolved, weights=None, teacher=None)  # they keep the files of a checkpoint open
    training = Training(resolved, run_folder, parts, checkpoints, state, notes, model)
    _print_start(training)
    if weights is not None and weights.origin is not None and weights.origin.unused:
        log(f"unused    not trained, and not part of the export: {', '.join(weights.origin.unused)}")
    if weights is not None and not training.started and run.eval_every:
        training.score_start()
    return training


def _state(resolved: ResolvedRun, parts: Assembly, restored: TrainState | None, notes: dict[str, Any]) -> TrainState:
    """Returns the state that a run starts from: restored, with given weights, or randomly initialised."""
    key = jax.random.key_data(jax.random.key(resolved.run.seed))
    frozen, weights = parts.like.frozen, resolved.weights
    if weights is None and (restored is None or frozen is not None):
        weights = weights_of(resolved.given, None, resolved.task, resolved.data.labels, False)
    weights = with_teacher(weights, None if resolved.run.distill.cache else resolved.teacher)
    vectors = resolved.token_vectors
    into: dict[str, Any] = {
        "draw": partial(parts.draw, key),
        "adapt": partial(parts.adapt, key),
        "token_vectors": vectors,
    }
    start = partial(start_from, weights, **into)
    if restored is not None and frozen is None:
        return restored
    if restored is not None:  # checkpoints do not contain frozen parameters
        paths = parameters.by_path(frozen, whole_nodes=True)
        leaves = start(like={path: parts.dense[path] for path in paths}, log=lambda _: None)
        frozen = parameters.fill(frozen, leaves)
        check_frozen(frozen, notes["frozen"], sources_of(resolved.run))
        return restored._replace(frozen=frozen)
    if vectors is not None:
        log(f"vectors   {vectors.summary}")
    elif weights is None:
        return parts.first_state(key)
    return parts.state_of(nested(start(like=parts.dense, log=log)), key)


def _score_line(step: int, steps: int, scores: Mapping[str, float], is_best: bool = False) -> str:
    """Returns the printed line with the held-out scores of a step; the columns of a run's lines are aligned.

    Args:
      step: the step.
      steps: number of steps of the run.
      scores: by name.
      is_best: whether no earlier evaluation was as good.
    """
    values = "  ".join(
        f"{report.metric_label(name)} {report.format_score(name, value):>8}" for name, value in scores.items()
    )
    width = len(f"{steps:,}")
    return f"scores    step {step:>{width},}/{steps:,}  {values}{'  best so far' if is_best else ''}"


def _finite_metrics(
    metrics: list[dict[str, Any]], step: int, checkpoints: Checkpoints | OfFirstHost
) -> list[dict[str, float]]:
    """Returns the metrics of the last steps, up to `step`, as floats; raises RunError where a loss is not finite."""
    for n, values in enumerate(metrics, start=step - len(metrics) + 1):
        if not (np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])):
            raise _divergence(f"the loss is {values['loss']:.4g}", n, values, checkpoints)
    return [{name: float(value) for name, value in values.items()} for values in metrics]


def _divergence(fault: str, step: int, values: dict[str, Any], checkpoints: Checkpoints | OfFirstHost) -> RunError:
    """Returns the error of a run with a value that is not finite."""
    checkpoints.wait()
    last = checkpoints.last()
    return RunError(
        f"{fault} at step {step:,}; learning rate {values['learning_rate']:.3g}, "
        f"gradient norm {values['grad_norm']:.4g}; all must be finite; "
        + ("no checkpoint was saved yet" if last is None else f"the last good checkpoint is step {last:,}")
        + "; lower --optimizer.rate, raise --optimizer.warmup or lower --optimizer.clip, in a new --workdir"
    )


def _averaged(window: list[dict[str, float]], steps: list[dict[str, float]], seconds: float) -> dict[str, float]:
    """Returns the values of a line of the log: means, and tokens and examples per second without padding.

    Args:
      window: metrics of the steps of the means.
      steps: metrics of the steps since the last line.
      seconds: time of these steps.
    """
    means = {name: sum(values[name] for values in window) / len(window) for name in window[0]}
    speed = {f"{name}_per_second": sum(values[name] for values in steps) / seconds for name in ("tokens", "examples")}
    means = {name: value for name, value in means.items() if name not in ("tokens", "examples")}
    return {"loss": means["loss"]} | means | {"learning_rate": steps[-1]["learning_rate"]} | speed


def _flops(resolved: ResolvedRun) -> int:
    """Returns the model FLOPs of a step; 0 where the utilisation is undefined.

    The peak of a chip is for products in bfloat16, and the formula assumes that all parameters are trained.
    """
    run = resolved.run
    frozen = run.optimizer.freeze != "none" or run.optimizer.freeze_layers or run.adapter.rank
    if run.compute_dtype != "bfloat16" or frozen:
        return 0
    return closed_flops(resolved.task, resolved.model, run.batch, resolved.train.empty_batch())


def data_line(data: Prepared) -> str:
    """Returns the sizes of the training and the held-out data, for printing."""
    return f"{data.train.summary} to train on, {data.held_out.summary} held out"


def _print_start(training: Training) -> None:
    """Prints the data, the model, the devices and the settings of a run before its first step."""
    resolved, run, mesh = training.resolved, training.run, training.resolved.mesh
    data, task, device = resolved.data, resolved.task, mesh.devices.flat[0]
    rows = ", ".join(f"{count:,} {name}" for name, count in data.rows.items())
    log(f"data      {rows}; {data_line(data)}")
    split = ", ".join(f"{name} {ways}" for name, ways in mesh.shape.items() if ways > 1)
    on = f"{mesh.size} {device.platform} device(s)" + (f", mesh: {split}" if split else "")
    log(f"model     {parameter_count(training.parts.like, ' parameters')} on {on}")
    if unknown := chips.unknown_chip_warning(device.device_kind, device.platform):
        log(f"chip      {unknown}")
    if products := chips.float32_warning(run.compute_dtype, run.matmul_precision, device.platform):
        log(f"precision {products}")
    log(f"run       {run.steps:,} steps of {run.batch} x {run.data.length} tokens, in {training.run_folder.folder}")
    for name, value in packing(run, resolved.train).items():
        log(f"{name:9} {value}")
    if training.started:
        log(f"resuming  at step {training.started:,}")
    if resolved.uncapped and len(data.held_out.tokens) < resolved.uncapped:
        shown = f"{len(data.held_out.tokens):,} of {resolved.uncapped:,}"
        log(f"eval      on {shown} held-out tokens (--eval-tokens 0: all)")
    if balance := task.describe_labels(data.train):
        log(f"labels    {balance}")
    for line in task.truncation_warnings(resolved.train):
        log(f"length    {line}")


def packing(run: RunConfig, batches: Any) -> dict[str, str]:
    """Returns how well examples fill the rows of a batch, for printing; empty for a run that counts in steps."""
    if not run.examples and not run.epochs:
        return {}
    units, rows = len(batches.lengths), batches.rows_in_epoch
    filled = batches.lengths.sum() / (rows * run.data.length)
    return {"packing": f"{units / rows * run.batch:.1f} examples per update; {filled:.0%} of the positions hold tokens"}


def parameter_count(like: TrainState, unit: str = "") -> str:
    """Returns the number of parameters of a state and, if some are frozen, of trained ones, for printing."""
    count, trained = size(like.model), size(like.params)
    return f"{count:,}{unit}" + (f" ({trained:,} trained, {trained / count:.2%})" if trained < count else "")


def size(shapes: Any) -> int:
    """Returns the number of entries of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
