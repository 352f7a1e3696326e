"""The whole story of a run, read downward."""

from __future__ import annotations

import functools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm import families
from jaxlm.config import CausalLM, Decoding, ModelConfig, RunConfig, to_json
from jaxlm.config.ranges import argument, shown
from jaxlm.data.batches import prefetch
from jaxlm.data.corpus import Corpus, Prepared, capped
from jaxlm.devices import chips, hosts, sharding
from jaxlm.errors import Interrupted, RunError, Stopped, UserError, perhaps
from jaxlm.inference.generate import generate
from jaxlm.lm import LM, find, load, save, with_params
from jaxlm.nn import parameters
from jaxlm.nn.transformer import Transformer
from jaxlm.reports import report
from jaxlm.run.assembly import assemble, closed_flops, lay, rows_here
from jaxlm.run.checkpoint import Checkpoints, OfFirstHost, checksums_of, finite
from jaxlm.run.evaluate import see
from jaxlm.run.folder import (
    SUMMARY,
    NoLog,
    RunLog,
    begin,
    claim,
    drop_steps,
    duration,
    finished_at,
    labels_of,
    write_json,
)
from jaxlm.run.measure import Meter, Trace
from jaxlm.run.start import (
    check_fits,
    check_frozen,
    check_model,
    configured,
    known_labels,
    origin,
    sized,
    start_from,
    weights_of,
    with_model,
    with_tokenizer,
)
from jaxlm.run.step import make_eval_step
from jaxlm.storage import buckets, disk
from jaxlm.tasks import make_task, prepare, with_labels
from jaxlm.tasks.metrics import by_name
from jaxlm.tasks.task import Task


def say(message: str) -> None:
    """One line for the person who watches the run, from its first host."""
    if hosts.is_first():
        # On a terminal the line of progress, which is rewritten in place, makes room.
        print(f"\r\x1b[K{message}" if sys.stderr.isatty() else message, file=sys.stderr, flush=True)


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
    """Trains, evaluates, exports and reports `run`, or goes on where its folder says that it was left.

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
        return _fit_in(place, run, model, data, stop, begun, summary)


def _fit_in(
    place: buckets.RunFolder,
    run: RunConfig,
    model: LM | None,
    data: Prepared | None,
    stop: Callable[[], bool],
    begun: float,
    summary: bool,
) -> LM:
    """Does what `fit` says in a folder that this run holds.  begun: when, by the monotonic clock."""
    folder = place.folder
    mesh = sharding.make_mesh(run.mesh)
    resuming, as_given = hosts.first(lambda: claim(run, folder)), run

    # Data: tokenized once, then batch_at(step) is all there is.
    if model is None and not resuming:
        check_model(run)
    run = with_tokenizer(with_model(run, model), model)
    run.check()
    own_tokenizer = model.tokenizer if model and not run.tokenizer.path else None
    known = labels_of(folder) if resuming else known_labels(run, model)
    if data is None:
        data = hosts.after_first(lambda: prepare(run, own_tokenizer, say, known))
    else:
        data = with_labels(run, data, known, say)
    held_out_tokens = len(data.held_out.tokens) if isinstance(data.held_out, Corpus) else 0
    if held_out_tokens:
        data = data._replace(held_out=capped(data.held_out, run.eval_tokens, data.tokenizer))
    task = make_task(run, data.tokenizer, data.labels)
    if run.best and run.best not in (*task.scores, "loss"):
        raise UserError(f"best is {run.best!r}{perhaps(run.best, [*task.scores, 'loss'])}")
    weights = weights_of(as_given, model, task, data.labels, resuming)
    config = configured(run, weights, task)
    batches = task.batches(data.train, run.batch, run.data.length, run.seed)
    run = sized(run, config, batches)
    batches.rows = run.batch
    held_out = task.batches(data.held_out, run.batch // run.accumulate, run.data.length, None)
    put = partial(lay, mesh)
    batch_at = partial(batches.batch_at, rows=rows_here(mesh, run.batch, run.accumulate))
    held_out_rows = rows_here(mesh, run.batch // run.accumulate, 1)
    for part, some in (("training", batches), ("held-out", held_out)):
        if not len(some):
            raise UserError(f"no example can be made of the {part} data, which are too few for the task; give more")

    # Model, optimizer, state: shapes first, so that everything is made where it will lie.
    kind = task.module(Transformer if model is None else type(model.module))
    parts = assemble(run, task, config, mesh, kind)
    module, like = parts.module, parts.like
    if weights is not None:
        check_fits(weights.shapes, {path: leaf.shape for path, leaf in parameters.by_path(like.model).items()})

    # All that the user could have got wrong is looked at; the folder is this run's from here on.
    of_init = find(run.init) if run.init and model is None and weights is not None else None
    hosts.first(lambda: begin(as_given, folder, data.fingerprint, data.labels, of_init))
    if resuming and (last := hosts.first(lambda: finished_at(folder))) is not None:
        say(f"the run in {folder} is finished, at step {last:,}; nothing is left to do")
        own = None if kind is Transformer or task.folders != ("",) else kind
        on = mesh if jax.process_count() == 1 else None
        return load(folder / "export" / task.folders[0], compute_dtype=run.compute_dtype, module=own, mesh=on)
    # The copies of a folder at an address are each host's own.
    keeps: type[Checkpoints | OfFirstHost] = Checkpoints
    if place.address and jax.process_count() > 1:
        keeps = OfFirstHost
    checkpoints = keeps(folder / "checkpoints", run.keep, say)
    state, notes = checkpoints.restore(like) or (None, {})
    key = jax.random.key_data(jax.random.key(run.seed))
    if state is None or like.frozen is not None:
        weights = weights or weights_of(as_given, None, task, data.labels, False)
    if state is None and weights is None:
        state = parts.first_state(key)
    elif state is None:
        state = parts.state_of(start_from(weights, like.model, partial(parts.draw, key), say), key)
    elif like.frozen is not None:  # which checkpoints leave where it came from
        state = state._replace(frozen=start_from(weights, like.frozen, partial(parts.draw, key), lambda _: None))
        check_frozen(state.frozen, notes["frozen"], run.init)
    started = int(state.step)
    hosts.first(lambda: (folder / "report.html").unlink(missing_ok=True))  # its presence says: finished
    _say_start(run, folder, data, batches, _size(like.model), mesh, started)
    if held_out_tokens and len(data.held_out.tokens) < held_out_tokens:
        say(f"eval      on {len(data.held_out.tokens):,} of {held_out_tokens:,} held-out tokens (--eval-tokens 0: all)")
    if balance := task.balance(data.train):
        say(f"labels    {balance}")
    for line in task.truncated(batches):
        say(f"length    {line}")

    eval_step = jax.jit(make_eval_step(task, module))
    files: dict[str, Any] = {"files": weights.files, "pooling": weights.pooling} if weights else {}
    own_module = module.clone(remat="none", unroll=1)  # what training alone needs
    made = LM(config, own_module, None, data.tokenizer, origin(run, weights), **files)
    starts_from_weights = weights is not None and not started
    del weights  # which keep the files of a checkpoint open

    def score(params: Any) -> tuple[dict[str, float], Any]:
        run_over = lambda batches: see(eval_step, params, batches, put, held_out_rows)
        return task.measure(with_params(made, params), run_over, held_out, data.held_out)

    best = run.best or task.best
    worth = lambda scores: -scores["loss"] if best == "loss" else scores[best]

    log = RunLog(folder, started, run.steps) if hosts.is_first() else NoLog()
    # What each evaluation was worth, and what the weights were that the run started from.
    history, before = notes.get("history", []), notes.get("before", -math.inf)
    if starts_from_weights and run.eval_every:
        given = score(state.model)[0]
        before = worth(given)
        log.write(0, {f"eval/{name}": value for name, value in given.items()})
        say(_score_line(0, run.steps, given))
    frozen_sums = None if state.frozen is None else checksums_of(state.frozen)
    stop = hosts.agreed(stop)
    checkpoint_every = run.checkpoint_every or max(1, run.steps // 10)
    # Metrics of the steps since the last line of the log, still on the device, and what they cost: a checkpoint between
    # two lines carries both along, so that the next line is the same after it.
    unlogged: list[Any] = notes.get("unlogged", [])
    logged: list[dict[str, float]] = notes.get("logged", [])  # of the steps of the last line
    meter = Meter(mesh, _flops(run, task, config, batches), notes)
    trace = Trace(folder / "profile", run.profile, started, run.steps)
    scores: dict[str, float] = {}
    found: Any = None
    ending = started == run.steps or _stale(history, run.patience)
    try:
        for step, batch in enumerate(
            meter.fed(prefetch(batch_at, started, started if ending else run.steps)), started + 1
        ):
            trace.before(step, state.step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = parts.train_step(state, put(batch, run.accumulate))
            meter.stepped(metrics["loss"])
            unlogged.append(metrics)
            if mesh.devices.flat[0].platform == "cpu":
                # Steps that queue up on several CPU devices wait for each other's threads for ever.
                jax.block_until_ready(metrics)
            trace.after(step, metrics)
            ending, stopping = step == run.steps, stop()
            logging = ending or step % run.log_every == 0
            evaluating = ending or bool(run.eval_every and step % run.eval_every == 0)
            saving = evaluating or stopping or step % checkpoint_every == 0

            # Once in a while the device is waited for, and what it counted is looked at.
            if logging or saving:
                unlogged = _finite(jax.device_get(unlogged), step, checkpoints)
                if saving and not finite(state):
                    raise _diverged("a weight is not finite", step, unlogged[-1], checkpoints)
            if logging:
                # The last line may have few steps of its own, and is a mean over as many as the others.
                window = (logged + unlogged)[-max(run.log_every, len(unlogged)) :]
                values = _averaged(window, unlogged, meter.seconds) | meter.line(len(unlogged))
                log.write(step, values)
                log.progress(step, values)
                unlogged, logged = [], unlogged
            # Once in a while: the held-out data, and a checkpoint.
            if evaluating:
                paused, (scores, found) = time.monotonic(), score(state.model)
                log.write(step, {f"eval/{name}": value for name, value in scores.items()})
                meter.paused(time.monotonic() - paused)
                if not np.isfinite(scores["loss"]):
                    raise _diverged(f"the held-out loss is {scores['loss']:.4g}", step, metrics, checkpoints)
                is_best = worth(scores) > max([before, *history])
                history = [*history, worth(scores)]
                say(_score_line(step, run.steps, scores, is_best))
                if _stale(history, run.patience) and not ending:
                    say(f"no better {best} in {run.patience} evaluations: the run ends at step {step:,}")
                    ending = True
            if saving:
                notes = {"unlogged": unlogged, "logged": logged, "history": history, **meter.carried()}
                notes |= {} if math.isinf(before) else {"before": before}
                notes |= {} if frozen_sums is None else {"frozen": frozen_sums}
                checkpoints.save(state, scores | {"best": history[-1]} if evaluating else None, notes)
                place.send()  # of what is whole by now
            if stopping or ending:
                break
        checkpoints.wait()

        # The end, or where the run was asked to stop: the best weights are exported.
        best_step = checkpoints.best()
        if best_step is not None and best_step != int(state.step):
            # What the optimizer keeps is not needed any more, and makes room for the other parameters.
            jax.tree.map(lambda leaf: leaf.delete(), state.opt_state)
            state = state._replace(opt_state=None)
            if (params := checkpoints.restore_params(like.params, best_step)) is not None:
                state, scores = state._replace(step=jax.numpy.int32(best_step), params=params), {}
        export, lm = _export(with_params(made, state.model), task, folder / "export")
        if not ending:
            raise Stopped(f"stopped at step {step:,} of {run.steps:,} and saved; the same command goes on from here")
        if not scores:
            scores, found = score(state.model)
    finally:
        meter.close()
        trace.close()
        log.close()
        checkpoints.close()
        place.send()

    by_class = {} if found is None else by_name(task.by_class(data.held_out, found))
    if found is not None and (warning := task.warning(data.held_out, found)):
        say(f"warning   {warning}")
    written = {"step": int(state.step), **scores, **by_class}
    hosts.first(lambda: write_json(folder / "scores.json", written))
    if history and max(history) < before:
        say(f"warning   no {best} was as good as that of the weights that the run started from, which --init names")
    sections = _sections(task, data, batches, found)
    facts = {
        "time": duration(time.monotonic() - begun) + (f" since step {started:,}" if started else ""),
        "data": f"{data.train.said} to train on; {data.held_out.said} held out",
    }
    facts |= {"started from": run.init} if run.init else {}
    facts |= _packing(run, batches) | _cut(task, batches)
    sample = _sample(lm, run)
    text = hosts.first(lambda: _report(run, folder, lm, scores, export, int(state.step), facts, mesh, sections, sample))
    if summary:
        say(text)
    if not run.keep_checkpoints:
        hosts.first(lambda: drop_steps(folder / "checkpoints"))
    place.send()
    return lm


def _score_line(step: int, steps: int, scores: Mapping[str, float], is_best: bool = False) -> str:
    """Returns a line of the console with the held-out scores of a step; those of a run stand below each other.

    is_best: whether no evaluation before was as good.
    """
    values = "  ".join(f"{report.words(name)} {report.fact(name, value):>8}" for name, value in scores.items())
    width = len(f"{steps:,}")
    return f"scores    step {step:>{width},}/{steps:,}  {values}{'  best so far' if is_best else ''}"


def _stale(history: list[float], patience: int) -> bool:
    """Whether the last `patience` evaluations were no better than one before them."""
    return bool(patience) and len(history) > patience and max(history[-patience:]) <= max(history[:-patience])


def _sections(task: Task, data: Prepared, batches: Any, found: Any) -> list[report.Section]:
    """What the report shows beside curves."""
    if found is None:
        return []
    lengths = report.Histogram("Tokens of an example", batches.true_lengths, "tokens", float(batches.length))
    return [*task.sections(data.held_out, found), lengths]


def _report(
    run: RunConfig,
    folder: Path,
    lm: LM,
    scores: dict[str, float],
    export: str,
    step: int,
    further: dict[str, str],
    mesh: Any,
    sections: list[report.Section],
    sample: str | None,
) -> str:
    """Writes report.html and summary.txt; returns the summary: the figures, a sample and where the files are."""
    facts = {f"held-out {report.words(name)}": report.fact(name, value) for name, value in scores.items()}
    facts |= {
        "of step": f"{step:,}, the best of the run" if run.eval_every else f"{step:,}",
        "parameters": f"{_size(lm.params):,}",
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        **further,
    }
    width = max(24, *map(len, facts))
    lines = [f"{name:>{width}}  {value}" for name, value in facts.items()]
    if sample is not None:
        lines.append(f"\n{'a sample':-^60}\n{sample}\n{'':-^60}")
    lines.append(f"\nmodel ({export} format)  {folder / 'export'}\nreport  {folder / 'report.html'}")
    text = "\n".join(lines)
    disk.write(folder / SUMMARY, text + "\n")
    report.write(folder, to_json(run), facts, sample, sections)
    return text


def _packing(run: RunConfig, batches: Any) -> dict[str, str]:
    """How full the rows are, of a run over examples."""
    if not run.examples and not run.epochs:
        return {}
    units, rows = len(batches.lengths), batches.rows_in_epoch
    filled = batches.lengths.sum() / (rows * run.data.length)
    said = {"packing": f"{units / rows * run.batch:.1f} examples in an update; {filled:.0%} of the places hold tokens"}
    return said


def _cut(task: Task, batches: Any) -> dict[str, str]:
    """What was cut of the examples to train on."""
    lines = task.truncated(batches)
    return {"length": "; ".join(lines)} if lines else {}


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


def _flops(run: RunConfig, task: Task, config: ModelConfig, batches: Any) -> int:
    """Model FLOPs of a step, where its share of the chips' peak can be told: their peak is that of products in
    bfloat16, and the formula has all parameters trained."""
    frozen = run.optimizer.freeze != "none" or run.optimizer.freeze_layers
    if run.compute_dtype != "bfloat16" or frozen:
        return 0
    return closed_flops(task, config, run.batch, batches.nothing())


def _averaged(window: list[dict[str, float]], steps: list[dict[str, float]], seconds: float) -> dict[str, float]:
    """A line of the log: means over a window, and tokens and examples a second, padding not counted.

    steps: those since the last line, which took so many seconds.
    """
    means = {name: sum(values[name] for values in window) / len(window) for name in window[0]}
    speed = {f"{name}_per_second": sum(values[name] for values in steps) / seconds for name in ("tokens", "examples")}
    means = {name: value for name, value in means.items() if name not in ("tokens", "examples")}
    return {"loss": means["loss"]} | means | {"learning_rate": steps[-1]["learning_rate"]} | speed


def _export(lm: LM, task: Task, folder: Path) -> tuple[str, LM]:
    """Writes the model, for several tasks one for each, and returns the name of the format and the first of them."""

    def write(params: Any) -> str:
        exported = task.exports(with_params(lm, params))
        with disk.atomic_folder(folder, overwrite=True) as new:
            for name, (one, alone) in exported.items():
                assert alone.origin is not None  # as `origin` has it
                alone = replace(alone, origin=_with_keys(alone.origin, one.config_keys))
                kind = save(alone, new / name)
                _name_class(new / name, one)
        return kind

    return hosts.first_reads(lm.params, write), next(iter(task.exports(lm).values()))[1]


def _with_keys(origin: families.Origin, keys: Mapping[str, Any]) -> families.Origin:
    return origin._replace(config={**origin.config, **keys})


def _name_class(folder: Path, task: Task) -> None:
    """Names the class of transformers that does the task, where another has the same tensors."""
    if task.exported_as:
        values = families.read_config(folder / "config.json")
        named = [task.exported_as.get(name, name) for name in values.get("architectures", [])]
        write_json(folder / "config.json", values | {"architectures": named})


def _sample(lm: LM, run: RunConfig) -> str | None:
    """What a decoder goes on to say after the run's prompt, prompt included."""
    if not isinstance(run.task, CausalLM) or not run.sample_tokens:
        return None
    if lm.tokenizer is None:
        return None
    room = lm.config.max_length - len(lm.tokenizer.encode(run.sample_prompt)) - 1
    new = min(run.sample_tokens, room) if lm.config.positions in ("learned", "rotary") else run.sample_tokens
    if new < 1 or (lm.tokenizer.bos is None and not run.sample_prompt):
        return None
    decoding = Decoding(max_new_tokens=new, temperature=0.7, top_p=0.95, seed=run.seed)
    return run.sample_prompt + generate(lm, [run.sample_prompt], decoding)[0]


def _size(shapes: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _say_start(run: RunConfig, folder: Path, data: Prepared, batches: Any, size: int, mesh: Any, started: int) -> None:
    rows = ", ".join(f"{count:,} {name}" for name, count in data.rows.items())
    say(f"data      {rows}; {data.train.said} to train on, {data.held_out.said} held out")
    split = ", ".join(f"{name} {ways}" for name, ways in mesh.shape.items() if ways > 1)
    on = f"{mesh.size} {mesh.devices.flat[0].platform} device(s)" + (f", mesh: {split}" if split else "")
    say(f"model     {size:,} parameters on {on}")
    device = mesh.devices.flat[0]
    if unknown := chips.without_rates(device.device_kind, device.platform):
        say(f"chip      {unknown}")
    if products := chips.precision_of(run.compute_dtype, run.matmul_precision, device.platform):
        say(f"precision {products}")
    say(f"run       {run.steps:,} steps of {run.batch} x {run.data.length} tokens, in {folder}")
    for name, value in _packing(run, batches).items():
        say(f"{name:9} {value}")
    if started:
        say(f"resuming  at step {started:,}")
