"""The whole story of a run, read downward: resolve, set up, loop, finish."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxlm.config import RunConfig
from jaxlm.config.ranges import argument, shown
from jaxlm.data.corpus import Prepared
from jaxlm.devices import hosts, sharding
from jaxlm.errors import Interrupted, Stopped, UserError
from jaxlm.lm import LM, load
from jaxlm.nn.transformer import Transformer
from jaxlm.run.finish import finish
from jaxlm.run.folder import finished_at, labels_of, open_run_dir
from jaxlm.run.resolve import ResolvedRun, resolve, with_model
from jaxlm.run.training import Training, say, set_up
from jaxlm.storage import buckets


def _interruptible(body: Callable[..., LM]) -> Callable[..., LM]:
    """`fit`, ended by an interrupt (Ctrl-C, the stop button of a notebook) as by `stop`: after a whole step, and saved.

    An exception in the middle of a step would leave half of one.  Until the first step is done there is nothing to
    save, and an interrupt is what it always is; as is a second one.  Where the program has its own way with SIGINT, as
    `jaxlm train` has, and in other threads than the main one, which do not hear of it, nothing changes.
    """

    @functools.wraps(body)
    def run(*args: Any, stop: Callable[[], bool] = lambda: False, **named: Any) -> LM:
        if not callable(stop):
            raise UserError(f"stop is {shown(stop)}; it must be a function without arguments that returns a bool")
        before = signal.getsignal(signal.SIGINT)
        ours = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
        came: list[int] = []

        def handle(number: int, _: Any) -> None:
            signal.signal(number, before)
            came.append(number)
            # print() must not be called where it may have been interrupted.
            os.write(2, b"\nsaving after this step; a second interrupt does not wait for it\n")

        def asked() -> bool:
            if ours and not came and signal.getsignal(signal.SIGINT) is before:
                signal.signal(signal.SIGINT, handle)
            return bool(came) or stop()

        try:
            lm = body(*args, stop=asked, **named)
        except Stopped as end:
            if came:
                raise Interrupted(end) from None
            raise
        finally:
            if ours:
                signal.signal(signal.SIGINT, before)
        if came:
            raise Interrupted("the run ended before it heard of the interrupt; the same call gives its model")
        return lm

    return run


@hosts.watched
@_interruptible
def fit(
    run: RunConfig,
    *,
    model: LM | None = None,
    data: Prepared | None = None,
    stop: Callable[[], bool] = lambda: False,
    summary: bool = True,
) -> LM:
    """Trains, evaluates, exports and reports `run`, or resumes where its folder says that it stopped.

    model: weights to start from, instead of `run.init`, and the class of the module, which may be your own.
    data: what to read, instead of `run.data`.
    stop: asked after each step; True, on any host, saves the state and raises Stopped on all.  So does an interrupt
    from the keyboard, which raises Interrupted, a KeyboardInterrupt.
    summary: whether the figures of the finished run are printed; summary.txt in its folder has them in any case.

    Returns the model with the best held-out score; of several tasks, that of the first.  Raises UserError for a mistake
    in the config or the data, before anything is compiled, and RunError for a fault of the run: a loss that is not
    finite, a disk that is full, a host that is gone.  Each of many hosts calls this with the same arguments.  The
    parameters of the returned model are sharded over the devices of all hosts, so all call its functions together.
    """
    argument("run", run, RunConfig)
    argument("model", model, LM | None)
    argument("data", data, Prepared | None)
    argument("summary", summary, bool)
    begun = time.monotonic()
    if model is not None:
        run = with_model(run, model)
    run.check()
    hosts.agree(run)
    buckets.forget()
    with buckets.RunFolder(run.workdir or "runs/unnamed").opened() as place:
        mesh = sharding.make_mesh(run.mesh)
        resuming = hosts.first(lambda: open_run_dir(run, place.folder))
        resolved = resolve(
            run,
            mesh=mesh,
            model=model,
            data=data,
            resumed_labels=labels_of(place.folder) if resuming else None,
            resuming=resuming,
            say=say,
        )
        training = set_up(resolved, place, model is not None, resuming)
        if training is None:
            return _finished(resolved, place.folder)
        del resolved  # whose weights keep the files of a checkpoint open
        with training:
            ended = loop(training, hosts.agreed(stop))
            lm, kind = training.end(ended)
        return finish(training, lm, kind, begun, summary)


def loop(training: Training, stop: Callable[[], bool]) -> bool:
    """Trains from the step that the run is at, until the last one, until patience ends, or until it is asked to stop.

    Args:
      training: the run, set up.
      stop: asked after each step.

    Returns:
      Whether the run has ended; False where it was asked to stop before.
    """
    run, t = training.run, training
    on_cpu = t.resolved.mesh.devices.flat[0].platform == "cpu"
    for step, batch in t.batches():
        t.trace.before(step, t.state.step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            t.state, metrics = t.parts.train_step(t.state, batch)
        t.journal.add(metrics)
        if on_cpu:
            # Steps that queue up on several CPU devices wait for each other's threads for ever.
            jax.block_until_ready(metrics)
        t.trace.after(step, metrics)
        ending, stopping = step == run.steps, stop()
        logging = ending or step % run.log_every == 0
        evaluating = ending or bool(run.eval_every and step % run.eval_every == 0)
        saving = evaluating or stopping or step % t.checkpoint_every == 0
        # Once in a while the device is waited for, and what it counted is looked at.
        if logging or saving:
            t.check(step, state_too=saving)
        if logging:
            t.journal.write_line(step)
        if evaluating:
            ending = t.evaluate(step) or ending
        if saving:
            t.save(evaluating)
        if stopping or ending:
            return ending
    return True  # it was at its end before


def _finished(resolved: ResolvedRun, folder: Path) -> LM:
    """Returns the model of a run that was finished before."""
    last = hosts.first(lambda: finished_at(folder))
    say(f"the run in {folder} is finished, at step {last:,}; nothing is left to do")
    task, kind = resolved.task, resolved.kind
    own = None if kind is Transformer or task.folders != ("",) else kind
    mesh = resolved.mesh if jax.process_count() == 1 else None
    return load(folder / "export" / task.folders[0], compute_dtype=resolved.run.compute_dtype, module=own, mesh=mesh)
