"""A run from beginning to end: resolve, set up, loop, finish."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxlm.config import RunConfig
from jaxlm.config.ranges import check_argument, short_repr
from jaxlm.data.corpus import Prepared
from jaxlm.devices import hosts, sharding
from jaxlm.errors import Interrupted, Stopped, UserError
from jaxlm.lm import LM, load
from jaxlm.nn.transformer import Transformer
from jaxlm.run.finish import finish
from jaxlm.run.folder import finished_at, labels_of, open_run_dir
from jaxlm.run.resolve import ResolvedRun, resolve, with_model
from jaxlm.run.training import Training, log, set_up
from jaxlm.storage import buckets

Result = TypeVar("Result")
LAG = {"cpu": 0}  # platform -> steps that are dispatched before the line of a step is written; 1 for accelerators


def interruptible(body: Callable[..., Result]) -> Callable[..., Result]:
    """Makes a training function treat an interrupt (Ctrl-C, the stop button of a notebook) like `stop`.

    It saves after a whole step.

    An exception in the middle of a step would leave a state that is half updated. Before the first step there is
    nothing to save, and an interrupt raises KeyboardInterrupt as usual; so does a second interrupt. Nothing changes
    where the program has its own handler of SIGINT, as `jaxlm train` has, nor in threads other than the main one, which
    receive no signals.
    """

    @functools.wraps(body)
    def run(*args: Any, stop: Callable[[], bool] = lambda: False, **named: Any) -> Result:
        if not callable(stop):
            raise UserError(f"stop is {short_repr(stop)}; it must be a function without arguments that returns a bool")
        previous = signal.getsignal(signal.SIGINT)
        is_default = previous is signal.default_int_handler and threading.current_thread() is threading.main_thread()
        received: list[int] = []

        def handle(number: int, _: Any) -> None:
            signal.signal(number, previous)
            received.append(number)
            # The signal may have interrupted print(), which must not be called again then.
            os.write(2, b"\nsaving after this step; interrupt again to stop without saving\n")

        def is_stopping() -> bool:
            if is_default and not received and signal.getsignal(signal.SIGINT) is previous:
                signal.signal(signal.SIGINT, handle)
            return bool(received) or stop()

        try:
            result = body(*args, stop=is_stopping, **named)
        except Stopped as end:
            if received:
                raise Interrupted(end) from None
            raise
        finally:
            if is_default:
                signal.signal(signal.SIGINT, previous)
        if received:
            raise Interrupted("the run ended before it could stop; make the same call again to get its model")
        return result

    return run


@hosts.detect_lost_hosts
@interruptible
def fit(
    run: RunConfig,
    *,
    model: LM | None = None,
    data: Prepared | None = None,
    stop: Callable[[], bool] = lambda: False,
    summary: bool = True,
) -> LM:
    """Trains, evaluates, exports and reports a run, or resumes it from the last checkpoint in its folder.

    Each of several hosts calls this with the same arguments. The parameters of the returned model are sharded over the
    devices of all hosts, so that all hosts must call its functions together.

    Args:
      run: the config of the run.
      model: a model whose weights the run starts from, instead of `run.init`, and whose module it trains, which may be
        of a user-defined class.
      data: prepared data, instead of `run.data`.
      stop: called after each step. Where it returns True on any host, all hosts save the state and raise Stopped. An
        interrupt from the keyboard does the same, but raises Interrupted, a KeyboardInterrupt.
      summary: whether to print the summary of the finished run; summary.txt in its folder always contains it.

    Returns:
      The model with the best held-out score; for several tasks, the model of the first task.

    Raises:
      UserError: for a mistake in the config or the data, before anything is compiled.
      RunError: for a fault of the run: a loss that is not finite, a full disk, a lost host.
      Stopped: where `stop` ended the run early, after its state was saved.
      Interrupted: where an interrupt did.
    """
    check_argument("run", run, RunConfig)
    check_argument("model", model, LM | None)
    check_argument("data", data, Prepared | None)
    check_argument("summary", summary, bool)
    start = time.monotonic()
    if model is not None:
        run = with_model(run, model)
    run.check()
    hosts.check_same_run(run)
    buckets.forget_downloads()
    with buckets.RunFolder(run.workdir or "runs/unnamed").opened() as run_folder:
        mesh = sharding.make_mesh(run.mesh)
        resuming = hosts.run_on_first(lambda: open_run_dir(run, run_folder.folder))
        resolved = resolve(
            run,
            mesh=mesh,
            model=model,
            data=data,
            resumed_labels=labels_of(run_folder.folder) if resuming else None,
            resuming=resuming,
            log=log,
        )
        training = set_up(resolved, run_folder, model is not None, resuming)
        if training is None:
            return _finished(resolved, run_folder.folder)
        del resolved  # its weights keep the files of a checkpoint open
        with training:
            ended = loop(training, hosts.agree_on_stop(stop))
            lm, kind = training.end(ended)
        return finish(training, lm, kind, start, summary)


def loop(training: Training, stop: Callable[[], bool]) -> bool:
    """Trains from the current step to the last one, or until patience runs out or `stop` returns True.

    Args:
      training: the run, set up.
      stop: called after each step.

    Returns:
      Whether the run has ended; False where `stop` returned True before.
    """
    run, t = training.run, training
    platform = t.resolved.mesh.devices.flat[0].platform
    lag = LAG.get(platform, 1)
    unwritten: list[int] = []  # steps whose line is due
    for step, batch in t.batches():
        t.trace.before(step, t.state.step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            t.state, metrics = t.parts.train_step(t.state, batch)
        t.journal.add(metrics)
        if platform == "cpu":
            # Queued steps on several CPU devices can deadlock: each waits for the threads of another.
            jax.block_until_ready(metrics)
        t.trace.after(step, metrics)
        ending, stopping = step == run.steps, stop()
        evaluating = ending or bool(run.eval_every and step % run.eval_every == 0)
        saving = evaluating or stopping or step % t.checkpoint_every == 0
        if ending or step % run.log_every == 0:
            unwritten.append(step)
        # Only these steps wait for the device: to read the metrics of an earlier step, or the state.
        while unwritten and (saving or unwritten[0] + lag <= step):
            due = unwritten.pop(0)
            t.check(due, state_too=False, later=step - due)
            t.journal.write_line(due, later=step - due)
        if saving:
            t.check(step, state_too=True)
        if evaluating:
            ending = t.evaluate(step) or ending
        if saving:
            t.save(evaluating)
        if stopping or ending:
            return ending
    return True  # no step was left


def _finished(resolved: ResolvedRun, folder: Path) -> LM:
    """Returns the model of a run that was finished by an earlier call."""
    last = hosts.run_on_first(lambda: finished_at(folder))
    log(f"the run in {folder} is already finished, at step {last:,}; nothing is left to do")
    task, kind = resolved.task, resolved.kind
    module = None if kind is Transformer or task.folders != ("",) else kind
    mesh = resolved.mesh if jax.process_count() == 1 else None
    return load(folder / "export" / task.folders[0], compute_dtype=resolved.run.compute_dtype, module=module, mesh=mesh)
