"""Runs that are killed, moved to other devices or damaged have the same result, or report the reason.

Every run in this file is tiny. The weights, the optimizer state, the export and the losses in the log are equal in
each byte.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flags import xla_flags

from jaxlm import CausalLM, DataConfig, ModelConfig, OptimizerConfig, RunConfig, TokenizerConfig
from jaxlm.__main__ import main
from jaxlm.config import MeshConfig
from jaxlm.data.batches import Batches
from jaxlm.devices import sharding
from jaxlm.errors import RunError, Stopped, UserError
from jaxlm.hub import safetensors
from jaxlm.nn.transformer import Transformer, init
from jaxlm.run import fit as fit_module
from jaxlm.run.checkpoint import Checkpoints
from jaxlm.run.fit import fit
from jaxlm.run.folder import begin, open_run_dir
from jaxlm.run.measure import MEASURED
from jaxlm.run.optimizer import make_optimizer
from jaxlm.run.step import TrainState
from jaxlm.run.training import Journal
from jaxlm.verbs.machine import one_device_per_core

# TensorStore prints a message if one array of a checkpoint fails. `jaxlm.verbs.machine` hides this message.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def collect_garbage():
    """Collects garbage, so that no later test file prints this message."""
    yield
    gc.collect()


TRAIN = Path(__file__).parent.parent / "train.py"
MODEL = ModelConfig(vocabulary=64, max_length=32, width=32, layers=2, heads=2, dropout=0.1)


def write_text(folder: Path, seed: int = 0) -> Path:
    draw = random.Random(seed)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps"]
    text = "".join(" ".join(draw.choices(words, k=12)) + "\n" for _ in range(120))
    (folder / "text.txt").write_text(text)
    return folder / "text.txt"


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Returns a folder with text.txt and the cache of all runs of this file."""
    folder = tmp_path_factory.mktemp("runs")
    write_text(folder)
    return folder


@pytest.fixture(autouse=True)
def private_cache(data_dir, monkeypatch, no_plots):
    monkeypatch.setenv("JAXLM_CACHE", str(data_dir / "cache"))


def run_config(data_dir: Path, workdir: Path, **more: Any) -> RunConfig:
    """Returns the config of 12 steps, with different intervals of log lines, evaluations and checkpoints."""
    values = {
        "model": MODEL,
        "task": CausalLM(),
        "data": DataConfig(path=str(data_dir / "text.txt"), length=32),
        "tokenizer": TokenizerConfig(train="characters"),
        "optimizer": OptimizerConfig(rate=1e-2, beta2=0.99),
        "mesh": MeshConfig(),
        "batch": 8,
        "steps": 12,
        "log_every": 4,
        "checkpoint_every": 3,
        "keep_checkpoints": True,  # the tests compare them
        "eval_every": 6,
        "sample_tokens": 0,
        "workdir": str(workdir),
    }
    return RunConfig(**values | more)


def stop_after(steps: int):
    """Returns a `stop` function that ends a run after this number of steps."""
    left = iter(range(steps - 1))
    return lambda: next(left, None) is None


def losses(folder: Path) -> list[dict[str, float]]:
    """Returns the log without values that depend on the clock and the machine."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if name not in MEASURED} for row in rows]


def tensors(folder: Path) -> dict[str, bytes]:
    """Returns the last checkpoint and the export, as bytes."""
    import orbax.checkpoint as ocp

    manager = ocp.CheckpointManager((folder / "checkpoints").absolute())
    state = manager.restore(manager.latest_step(), args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    manager.close()
    found = {jax.tree_util.keystr(p): np.asarray(x).tobytes() for p, x in jax.tree_util.tree_leaves_with_path(state)}
    return found | {f.name: f.read_bytes() for f in (folder / "export").iterdir()}


def assert_same(ours: Path, theirs: Path) -> None:
    assert losses(ours) == losses(theirs)
    a, b = tensors(ours), tensors(theirs)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == []


@pytest.fixture(scope="module")
def reference(data_dir, tmp_path_factory) -> Path:
    """Returns the folder of an uninterrupted run on one device."""
    with pytest.MonkeyPatch.context() as patch:
        make_mesh = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda c, some=None: make_mesh(c, some or jax.devices()[:1]))
        patch.setenv("JAXLM_CACHE", str(data_dir / "cache"))
        folder = tmp_path_factory.mktemp("reference") / "run"
        fit(run_config(data_dir, folder))
    return folder


# Stopped and resumed


@pytest.mark.parametrize("stops", [pytest.param((1,), marks=pytest.mark.long), (5, 2, 3)], ids=str)
def test_a_resumed_run_has_the_same_result(data_dir, reference, tmp_path, devices, stops):
    run = run_config(data_dir, tmp_path / "run")
    for steps in stops:
        with pytest.raises(Stopped, match=f"stopped at step .* of {run.steps}"):
            fit(run, stop=stop_after(steps))
    fit(run)
    assert_same(tmp_path / "run", reference)


def test_a_resumed_run_knows_where_its_epochs_start(data_dir, tmp_path, devices, monkeypatch):
    """So it builds no earlier epoch; an epoch of this run has about 25 batches, and this one continues in the third."""
    run = run_config(data_dir, tmp_path / "run", steps=60, eval_every=60, checkpoint_every=60)
    with pytest.raises(Stopped):
        fit(run, stop=stop_after(55))
    built, make = [], Batches._make_epoch
    monkeypatch.setattr(Batches, "_make_epoch", lambda self, n: built.append((self.seed, n)) or make(self, n))
    fit(run)
    epochs = [n for seed, n in built if seed is not None]
    assert epochs and min(epochs) >= 1


@pytest.mark.parametrize("source", [pytest.param("the seed", marks=pytest.mark.long), "weights"])
def test_a_resumed_run_with_frozen_parameters_has_the_same_result(data_dir, reference, tmp_path, devices, source):
    """Checkpoints omit frozen parameters. A resumed run reads them from their source, and they must be equal."""
    frozen = {"optimizer": OptimizerConfig(rate=1e-2, beta2=0.99, freeze="all_but_heads")}
    given = tmp_path / "given"
    if source == "weights":
        shutil.copytree(reference / "export", given)
        frozen |= {"init": str(given), "model": None}
    run = run_config(data_dir, tmp_path / "run", **frozen)
    with pytest.raises(Stopped):
        fit(run, stop=stop_after(5))
    fit(dataclasses.replace(run, workdir=str(tmp_path / "whole")))
    if source == "weights":
        shutil.move(given, tmp_path / "away")
        with pytest.raises(UserError, match="given"):
            fit(run)
        shutil.copytree(tmp_path / "away", given)
        given_tensors = safetensors.read(given)
        changed = {name: np.asarray(x) + np.float32("wte" in name) for name, x in given_tensors.items()}
        safetensors.write(changed, given / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=f"frozen parameters differ .* --init {re.escape(str(given))}, or"):
            fit(run)
        shutil.rmtree(given)
        shutil.move(tmp_path / "away", given)
    lm = fit(run)
    assert_same(tmp_path / "run", tmp_path / "whole")
    size = lambda folder: sum(f.stat().st_size for f in (folder / "checkpoints" / "12" / "state").rglob("*"))
    assert size(tmp_path / "run") < 0.25 * size(reference)
    assert lm.config.layers == 2


@pytest.mark.parametrize("every", [{}, {"log_every": 1}, {"log_every": 5, "checkpoint_every": 4}], ids=str)
@pytest.mark.long
def test_lines_are_the_same_if_written_during_the_next_step(data_dir, reference, tmp_path, monkeypatch, devices, every):
    """On an accelerator, the line of a step is written after the next step was dispatched. The run is stopped once."""
    monkeypatch.setitem(fit_module.LAG, "cpu", 1)
    written, order = [], []
    write, dispatch = Journal.write_line, Journal.add
    monkeypatch.setattr(
        Journal, "write_line", lambda self, step, later=0: written.append(later) or write(self, step, later)
    )
    monkeypatch.setattr(Journal, "add", lambda self, metrics: order.append(len(written)) or dispatch(self, metrics))
    run = run_config(data_dir, tmp_path / "run", **every)
    with pytest.raises(Stopped):
        fit(run, stop=stop_after(5))
    fit(run)
    assert set(written) == {0, 1} and order == sorted(order)
    steps = [row["step"] for row in losses(tmp_path / "run") if "loss" in row]
    assert steps == sorted({*range(run.log_every, 13, run.log_every), 12})
    if not every:
        assert_same(tmp_path / "run", reference)


def test_an_interrupt_waits_for_the_step_and_the_same_call_resumes(data_dir, reference, tmp_path, devices):
    run, steps = run_config(data_dir, tmp_path / "run"), iter(range(4))

    def stop() -> bool:
        if next(steps, None) == 3:
            signal.raise_signal(signal.SIGINT)
        return False

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 5 of 12 and saved"):
        fit(run, stop=stop)
    assert signal.getsignal(signal.SIGINT) is before
    fit(run)
    assert_same(tmp_path / "run", reference)


def test_the_interrupt_handler_of_a_program_is_kept(data_dir, tmp_path, monkeypatch, devices):
    signals = []
    before = signal.signal(signal.SIGINT, lambda number, _: signals.append(number))
    try:
        fit(run_config(data_dir, tmp_path / "run", steps=2), stop=lambda: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert signals == [signal.SIGINT] * 2


def test_a_finished_run_has_its_files(reference):
    rows = losses(reference)
    assert [row["step"] for row in rows] == [4, 6, 8, 12, 12]
    speed = {"tokens_per_second", "examples_per_second"}
    for line in (reference / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "loss" in row:
            assert row.keys() >= {"step", "loss", "learning_rate", "grad_norm"} | speed
            assert list(row)[:2] == ["step", "loss"]
        else:
            assert row.keys() == {"step", "eval/loss", "eval/perplexity", "eval/bits_per_byte", "eval/accuracy"}
    assert (reference / "report.html").stat().st_size > 1000
    assert {"config.json", "model.safetensors"} <= {f.name for f in (reference / "export").iterdir()}
    kept = {path.name for path in (reference / "checkpoints").iterdir()}
    assert {"9", "12"} <= kept <= {"6", "9", "12"}
    assert sorted(path.name for path in reference.iterdir()) == [
        "baseline.json", "checkpoints", "config.json", "export", "metrics.jsonl", "report", "report.html",
        "scores.json", "summary.txt", "tensorboard",
    ]  # fmt: skip


def read_events(folder: Path) -> list[Any]:
    """Returns the events of all files of a folder. A TFRecord consists of length, checksum, data and checksum."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return events


def test_tensorboard_has_the_values_of_the_log(reference):
    points = {}
    for event in read_events(reference / "tensorboard"):
        for value in event.summary.value:
            points[event.step, value.tag] = value.simple_value
    rows = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    logged = {(row["step"], name): x for row in rows for name, x in row.items() if name != "step"}
    assert points == pytest.approx(logged, rel=1e-6)


def test_a_finished_run_is_reported(data_dir, reference, devices, capsys):
    before = {f: f.stat().st_mtime_ns for f in reference.rglob("*") if f.is_file() and f.name != "config.json"}
    lm = fit(run_config(data_dir, reference))
    assert "is already finished, at step 12; nothing is left to do" in capsys.readouterr().err
    assert before == {f: f.stat().st_mtime_ns for f in reference.rglob("*") if f.is_file() and f.name != "config.json"}
    assert lm.config.width == MODEL.width


def test_a_finished_run_keeps_its_export(data_dir, reference, tmp_path, devices, no_plots, capsys):
    """A finished run requires no checkpoints, even if its report was removed."""
    run = run_config(data_dir, tmp_path / "run", keep_checkpoints=False)
    fit(run)
    kept = {path.name for path in (tmp_path / "run").iterdir()}
    assert kept == {path.name for path in reference.iterdir()} - {"checkpoints", "report"}  # no plots
    for file in (reference / "export").iterdir():
        assert (tmp_path / "run" / "export" / file.name).read_bytes() == file.read_bytes()
    (tmp_path / "run" / "report.html").unlink()
    capsys.readouterr()
    fit(run)
    assert "is already finished, at step 12; nothing is left to do" in capsys.readouterr().err


@pytest.mark.long
def test_all_log_lines_are_means_over_the_same_number_of_steps(data_dir, tmp_path, devices):
    by_step = run_config(data_dir, tmp_path / "each", log_every=1, eval_every=0)
    fit(by_step)
    each = [row["loss"] for row in losses(tmp_path / "each") if "loss" in row]
    run = run_config(data_dir, tmp_path / "run", log_every=5, eval_every=0)
    with pytest.raises(Stopped):
        fit(run, stop=stop_after(11))  # the state has what the last line needs of the previous line
    fit(run)
    lines = [row["loss"] for row in losses(tmp_path / "run") if "loss" in row]
    assert lines == pytest.approx([np.mean(each[0:5]), np.mean(each[5:10]), np.mean(each[7:12])])


def test_the_log_is_truncated_at_the_restored_step(data_dir, reference, tmp_path, devices):
    run = run_config(data_dir, tmp_path / "run")
    with pytest.raises(Stopped):
        fit(run, stop=stop_after(5))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "loss": 1.0}\n{"step": 12, "lo')
    fit(run)
    assert losses(tmp_path / "run") == losses(reference)


def test_weights_of_a_given_model_are_not_donated(data_dir, reference, tmp_path, devices):
    import jaxlm

    lm = jaxlm.load(reference)
    before = jax.tree.map(np.array, lm.params)
    with pytest.raises(Stopped):
        fit(run_config(data_dir, tmp_path / "run"), model=lm, stop=stop_after(1))
    jax.tree.map(np.testing.assert_array_equal, lm.params, before)


# Other devices


MESHES = {
    "8 data": (8, MeshConfig()),
    "8 fsdp": (8, MeshConfig(data=1, fsdp=8)),
    "4 data": (4, MeshConfig()),
    "4 mixed": (4, MeshConfig(data=2, fsdp=2)),
    "2 fsdp": (2, MeshConfig(data=1, fsdp=-1)),
    "2 data": (2, MeshConfig()),
    "1": (1, MeshConfig()),
}
# Each mesh writes the checkpoint of one run, and reads that of another.
CYCLE = ("8 data", "1", "8 fsdp", "4 data", "2 fsdp", "4 mixed", "2 data", "8 data")


@pytest.mark.long
@pytest.mark.parametrize(("before", "after"), list(zip(CYCLE, CYCLE[1:])))
def test_a_run_resumes_on_other_devices(data_dir, reference, tmp_path, devices, before, after):
    for name, stop in ((before, stop_after(6)), (after, lambda: False)):
        n, mesh = MESHES[name]
        devices(n)
        run = run_config(data_dir, tmp_path / "run", mesh=mesh)
        if name == before:
            with pytest.raises(Stopped):
                fit(run, stop=stop)
        else:
            fit(run)
    ours, theirs = losses(tmp_path / "run"), losses(reference)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


# Damage


def run_and_stop(data_dir: Path, folder: Path, steps: int = 7) -> RunConfig:
    """Stops a run with checkpoints 6 (the best) and 7, and returns its config. The other checkpoints were removed."""
    run = run_config(data_dir, folder)
    with pytest.raises(Stopped):
        fit(run, stop=stop_after(steps))
    return run


@pytest.fixture(scope="module")
def stopped_run(data_dir, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        make_mesh = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda c, some=None: make_mesh(c, some or jax.devices()[:1]))
        patch.setenv("JAXLM_CACHE", str(data_dir / "cache"))
        folder = tmp_path_factory.mktemp("stopped") / "run"
        run_and_stop(data_dir, folder)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["6", "7"]
    return folder


def flip_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


DAMAGE = {
    "flipped": flip_bit,
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "deleted": Path.unlink,
}


def restore_newest(folder: Path, log=print) -> tuple[int, Any] | None:
    """Returns the step of the newest valid checkpoint of a run folder, and its leaves as bytes."""
    checkpoints = Checkpoints(folder / "checkpoints", 2, log)
    found = checkpoints.restore(state_shapes())
    checkpoints.close()
    if found is None:
        return None
    return int(found[0].step), (found[1], [np.asarray(x).tobytes() for x in jax.tree.leaves(found[0])])


def state_shapes() -> TrainState:
    """Returns the shapes of the state of `run_config`, on one device."""
    run = run_config(Path(), Path())
    shapes = jax.eval_shape(partial(init, Transformer(run.model)), jax.random.key(0))
    opt_state = jax.eval_shape(make_optimizer(run.optimizer, run.steps, shapes).init, shapes)
    state = TrainState(jax.ShapeDtypeStruct((), "int32"), shapes, opt_state, jax.ShapeDtypeStruct((2,), "uint32"))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), state)


@pytest.mark.long
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_never_restored(stopped_run, tmp_path, damage):
    """For each damaged file, the same state or, with a message, the previous checkpoint is restored."""
    whole = restore_newest(stopped_run)
    shutil.copytree(stopped_run, tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "7")
    before = restore_newest(tmp_path / "whole")
    assert whole[0] == 7 and before[0] == 6
    top = stopped_run / "checkpoints" / "7"
    files = [f.relative_to(top) for f in sorted(top.rglob("*")) if f.is_file() and f.stat().st_size]
    fallbacks = []
    for n, file in enumerate(files):
        folder = tmp_path / str(n)
        shutil.copytree(stopped_run, folder)
        DAMAGE[damage](folder / "checkpoints" / "7" / file)
        messages = []
        found = restore_newest(folder, messages.append)
        assert found in (whole, before), file
        assert bool(messages) == (found == before), (file, messages)
        if messages:
            fallbacks.append(file.parts[:2])
            assert "checkpoint 7 is corrupt" in messages[0] and "checkpoint 6" in messages[1]
            assert (folder / "corrupt" / "7").is_dir()
    assert ("state", "d") in fallbacks  # this folder contains the tensors


def test_a_best_checkpoint_with_a_damaged_score_is_corrupt(stopped_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stopped_run, folder)
    for file in (folder / "checkpoints" / "6" / "metrics").iterdir():
        file.write_text("{")
    messages = []
    assert restore_newest(folder, messages.append)[0] == 7
    assert "checkpoint 6 is corrupt" in messages[0]


def test_a_run_resumes_from_the_checkpoint_before_a_corrupt_one(
    data_dir, reference, stopped_run, tmp_path, devices, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(stopped_run, folder)
    for file in (folder / "checkpoints" / "7" / "state" / "d").iterdir():
        flip_bit(file)
    fit(run_config(data_dir, folder))
    output = capsys.readouterr().err
    assert "checkpoint 7 is corrupt" in output and "resuming  at step 6" in output
    assert " since step 6\n" in output  # the report contains the time since this step
    assert_same(folder, reference)


def test_a_run_with_only_corrupt_checkpoints_starts_again(data_dir, reference, stopped_run, tmp_path, devices, capsys):
    folder = tmp_path / "run"
    shutil.copytree(stopped_run, folder)
    for step in ("6", "7"):
        for file in (folder / "checkpoints" / step / "state" / "d").iterdir():
            flip_bit(file)
    fit(run_config(data_dir, folder))
    output = capsys.readouterr().err
    assert "checkpoint 7 is corrupt" in output and "checkpoint 6 is corrupt" in output
    assert "no valid checkpoint is left" in output and "resuming" not in output
    assert_same(folder, reference)


@pytest.mark.parametrize("n", [1, 8])
def test_a_checkpoint_has_the_saved_state_although_its_buffers_are_donated(tmp_path, n):
    """Checkpoints are written while the next steps overwrite the state in place. All checkpoints are valid."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:n])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    layout = TrainState(sharding.replicated(mesh), {"a": rows, "b": sharding.replicated(mesh)}, (), None)

    def update(state: TrainState) -> TrainState:
        return state._replace(step=state.step + 1, params=jax.tree.map(lambda x: x * 1.5 + 1, state.params))

    first = TrainState(jnp.int32(0), {"a": jnp.ones((1024, 256)), "b": jnp.ones(3)}, (), None)
    state = jax.device_put(first, layout)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    step = jax.jit(update, donate_argnums=0, out_shardings=layout)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 100)
    expected = {}
    for i in range(1, 13):
        state = step(state)
        expected[i] = float(state.params["b"][0])
        checkpoints.save(state, None, {"step": i})
        for _ in range(3):
            state = step(state)
        state = state._replace(step=jax.device_put(jnp.int32(i), sharding.replicated(mesh)))
    checkpoints.wait()
    for i, value in expected.items():
        found, notes = checkpoints.restore(like, i)
        assert notes == {"step": i}
        np.testing.assert_array_equal(found.params["a"], np.float32(value))
    checkpoints.close()
    assert not (tmp_path / "corrupt").exists()


def test_a_checkpoint_without_read_permission_is_not_corrupt(stopped_run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(stopped_run, folder)
    checkpoints = Checkpoints(folder / "checkpoints", 2)

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("PERMISSION_DENIED: Error opening file")

    monkeypatch.setattr(checkpoints._manager, "restore", refuse)
    with pytest.raises(RunError, match=r"7 cannot be read: PERMISSION_DENIED"):
        checkpoints.restore(state_shapes())
    assert not (folder / "corrupt").exists()


def test_parameters_are_restored_without_the_optimizer_state(tmp_path):
    messages = []
    state = TrainState(jnp.int32(3), {"a": {"b": jnp.arange(6.0)}}, {"m": jnp.ones(6)}, jnp.zeros(2, jnp.uint32))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, messages.append)
    checkpoints.save(state, {"best": 1.0})
    checkpoints.wait()
    found = checkpoints.restore_params(like.params, 3)
    assert found is not None, messages
    np.testing.assert_array_equal(found["a"]["b"], state.params["a"]["b"])
    notes = tmp_path / "checkpoints" / "3" / "notes" / "metadata"
    values = json.loads(notes.read_text())
    values["checksums"][1] += 1
    notes.write_text(json.dumps(values))
    assert checkpoints.restore_params(like.params, 3) is None
    assert "the best checkpoint, " in messages[0]
    checkpoints.close()


# Divergence


@pytest.mark.parametrize("rate", [1e14])
def test_a_loss_that_is_not_finite_ends_the_run(data_dir, tmp_path, devices, rate):
    optimizer = OptimizerConfig(rate=rate, warmup=0)
    run = run_config(data_dir, tmp_path / "run", checkpoint_every=1, optimizer=optimizer, log_every=100)
    with pytest.raises(RunError, match=r"at step \d+; learning rate \S+e\+\d+, gradient norm .*finite") as raised:
        fit(run)
    message = str(raised.value)
    assert "--optimizer.rate" in message and "--workdir" in message
    found = restore_newest(tmp_path / "run")
    if found is None:
        assert "no checkpoint was saved yet" in message
    else:
        assert f"the last good checkpoint is step {found[0]}" in message
        floats = [np.frombuffer(data, np.float32) for data in found[1][1][1:-1]]  # between step and key
        assert all(np.isfinite(x).all() for x in floats)


# Folders of other runs

OTHERS = {
    "model": {"model": dataclasses.replace(MODEL, width=16)},
    "task": {"task": CausalLM(stream=False)},
    "data": {"data": {"length": 16}},
    "data.text": {"data": {"text": "words"}},
    "tokenizer": {"tokenizer": TokenizerConfig(train="byte_bpe")},
    "optimizer": {"optimizer": OptimizerConfig(name="lion")},
    "schedule": {"optimizer": OptimizerConfig(rate=1e-2, beta2=0.99, schedule="linear")},
    "batch": {"batch": 16},
    "steps": {"steps": 24},
    "seed": {"seed": 1},
    "compute_dtype": {"compute_dtype": "bfloat16"},
}
SAME = {
    "mesh": {"mesh": MeshConfig(data=1, fsdp=-1)},
    "remat": {"remat": "full"},
    "unroll": {"unroll": 2},
    "intervals": {"log_every": 5, "eval_every": 1, "checkpoint_every": 2, "keep": 5},
    "sample": {"sample_prompt": "the", "sample_tokens": 3},
    "profile": {"profile": 5},
}


def change_fields(run: RunConfig, change: dict[str, Any]) -> RunConfig:
    parts = {n: dataclasses.replace(getattr(run, n), **v) if isinstance(v, dict) else v for n, v in change.items()}
    return dataclasses.replace(run, **parts)


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_of_another_run_is_refused(data_dir, stopped_run, name):
    run = change_fields(run_config(data_dir, stopped_run), OTHERS[name])
    before = (stopped_run / "config.json").read_bytes()
    with pytest.raises(UserError, match=rf"contains another run(.|\n)*{name.split('.')[0]}.* \| ") as raised:
        open_run_dir(run, stopped_run)
    assert "--workdir" in str(raised.value)
    assert (stopped_run / "config.json").read_bytes() == before


@pytest.mark.parametrize("name", SAME)
def test_some_fields_may_differ(data_dir, stopped_run, name):
    assert open_run_dir(change_fields(run_config(data_dir, stopped_run), SAME[name]), stopped_run)


def test_data_may_move_but_not_change(data_dir, reference, stopped_run, tmp_path, devices):
    folder = tmp_path / "run"
    shutil.copytree(stopped_run, folder)
    new_folder = tmp_path / "elsewhere"
    new_folder.mkdir()
    write_text(new_folder, seed=1)
    run = run_config(data_dir, folder, data=DataConfig(path=str(new_folder / "text.txt"), length=32))
    with pytest.raises(UserError, match=r"data with other content.*[0-9a-f]{16}, but now it is [0-9a-f]{16};"):
        fit(run)
    write_text(new_folder)
    fit(run)
    assert_same(folder, reference)


def test_a_run_without_steps_is_replaced(data_dir, tmp_path):
    run = run_config(data_dir, tmp_path / "run")
    assert not open_run_dir(run, tmp_path / "run")
    begin(run, tmp_path / "run", "0" * 16)
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    other = change_fields(run, OTHERS["model"])
    assert not open_run_dir(other, tmp_path / "run")
    begin(other, tmp_path / "run", "1" * 16)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["run"]["model"]["width"] == 16


# From the command line

CONFIG = """
from pathlib import Path
from jaxlm import CausalLM, DataConfig, ModelConfig, OptimizerConfig, RunConfig, TokenizerConfig

def config():
    return RunConfig(
        model=ModelConfig(vocabulary=64, max_length=32, width=32, layers=2, heads=2, dropout=0.1),
        task=CausalLM(),
        data=DataConfig(path=str(Path(__file__).parent / "text.txt"), length=32),
        tokenizer=TokenizerConfig(train="characters"),
        optimizer=OptimizerConfig(rate=1e-2, beta2=0.99),
        batch=8, steps=12, log_every=4, checkpoint_every=3, eval_every=6, sample_tokens=0, keep_checkpoints=True,
    )
"""


@pytest.fixture(scope="session")
def config(data_dir) -> Path:
    (data_dir / "tiny.py").write_text(CONFIG)
    return data_dir / "tiny.py"


def start(config: Path, workdir: Path, *arguments: str, **options: Any) -> subprocess.Popen:
    """Starts train.py on one device, with its output as text."""
    environment = os.environ | {
        "XLA_FLAGS": xla_flags(1),
        "JAXLM_CACHE": str(config.parent / "cache"),
    }
    command = [sys.executable, str(TRAIN), str(config), "--workdir", str(workdir), *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **options)


def wait_for(process: subprocess.Popen, text: str) -> str:
    """Returns the output of the process up to and including the line with `text`."""
    output = ""
    for line in process.stderr:
        output += line
        if text in line:
            return output
    raise AssertionError(f"ended with {process.wait()} before it printed {text!r}:\n{output}")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_saves_and_the_same_command_resumes(config, data_dir, tmp_path, number):
    steps = ("--steps", "400", "--checkpoint-every", "1000")
    process = start(config, tmp_path / "run", *steps)
    wait_for(process, "step 8/")
    process.send_signal(number)
    output = process.communicate(timeout=60)[1]
    assert process.returncode == 143, output
    assert "saving after this step" in output and "of 400 and saved; the same command resumes from here" in output
    assert "Traceback" not in output
    (step,) = (int(path.name) for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*") if int(path.name) % 6)
    process = start(config, tmp_path / "run", *steps)
    assert f"resuming  at step {step}\n" in wait_for(process, "resuming")
    process.kill()
    process.communicate()


@pytest.mark.long
def test_a_signal_before_the_first_step_ends_the_run_at_once(config, tmp_path):
    for text in ("data  ", "run  "):
        process = start(config, tmp_path / "run")
        wait_for(process, text)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[1]
        assert process.returncode == 143 and "Traceback" not in output, output


@pytest.mark.long
def test_a_run_that_is_killed_ten_times_has_the_same_result(config, data_dir, tmp_path):
    """SIGKILL during compilation, training, checkpointing, evaluation or export does not change the result."""
    steps = ("--steps", "120", "--checkpoint-every", "5", "--eval-every", "12", "--log-every", "7")
    process = start(config, tmp_path / "reference", *steps)
    start_time = time.monotonic()
    output = process.communicate(timeout=300)[1]
    duration = time.monotonic() - start_time
    assert process.returncode == 0, output
    draw, kills, reached = random.Random(1), 0, []
    # Each kill waits for a number of lines with a text, and then for a random time. The kills are at any time, before
    # the first step, mostly between steps and checkpoints, and during the export after the last step.
    train = lambda: ("step ", draw.randint(1, 5), 0.4)
    moments = [lambda: ("", 0, duration), train, train, train, lambda: ("run  ", 1, 2.0)]
    moments += [train, train, train, lambda: ("step 120/", 1, 2.0), train]
    while kills < len(moments):
        process = start(config, tmp_path / "run", *steps)
        text, lines, max_delay = moments[kills % len(moments)]()
        while lines and (line := process.stderr.readline()):
            assert "corrupt" not in line and "Traceback" not in line, line
            lines -= text in line
        time.sleep(draw.uniform(0, max_delay))
        process.kill()
        output = process.communicate()[1]
        assert "corrupt" not in output and "Traceback" not in output, output
        if process.returncode != -signal.SIGKILL:  # the run ended before the kill: start again
            assert process.returncode == 0
            assert_same(tmp_path / "run", tmp_path / "reference")
            shutil.rmtree(tmp_path / "run")
            continue
        kills += 1
        names = [path.name for path in (tmp_path / "run" / "checkpoints").glob("*")]
        reached.append((max((int(name) for name in names if name.isdigit()), default=0), len(names)))
    process = start(config, tmp_path / "run", *steps)
    output = process.communicate(timeout=300)[1]
    assert process.returncode == 0 and "corrupt" not in output, output
    print("newest checkpoint, and number of complete and incomplete checkpoints, after each kill:", reached)
    assert_same(tmp_path / "run", tmp_path / "reference")


# Full and read-only disks


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a separate disk of 4 MiB on a folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.long
@pytest.mark.parametrize("free_bytes", [0, 1 << 16, 1 << 18])
def test_a_full_disk_ends_the_run_and_the_last_checkpoint_stays(
    config, data_dir, reference, stopped_run, small_disk, tmp_path, devices, free_bytes
):
    folder, filler = small_disk / "run", small_disk / "ballast"
    shutil.copytree(stopped_run, folder)
    filler.write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - free_bytes))
    process = start(config, folder)
    output = process.communicate(timeout=120)[1]
    assert process.returncode == 1, output
    assert "Traceback" not in output and output.count("error: ") == 1, output
    assert ("the disk is full" in output or "No space left" in output) and "free disk space" in output
    assert {path.name for path in (folder / "checkpoints").iterdir()} >= {"6", "7"}
    filler.unlink()
    fit(run_config(data_dir, folder))
    assert_same(folder, reference)


def test_a_workdir_below_a_file_is_refused(config, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["train", str(config), "--workdir", str(tmp_path / "file" / "run")]) == 2
    output = capsys.readouterr().err
    assert "cannot be written: Not a directory; choose another --workdir" in output and output.count("\n") == 1


def test_a_read_only_disk_is_refused(config, small_disk, capsys):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert main(["train", str(config), "--workdir", str(small_disk / "run")]) == 2
    output = capsys.readouterr().err
    assert "Read-only file system; choose another --workdir" in output and output.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "mesh", "cores", "threads"),
    [
        ("", MeshConfig(8), 2, None),
        ("", MeshConfig(2, 4), 2, "16"),
        ("", MeshConfig(2, 4), 64, "64"),
        ("--xla_force_host_platform_device_count=4", MeshConfig(-1, 2), 2, "8"),
    ],
)
def test_a_mesh_with_several_axes_has_two_threads_per_device(monkeypatch, flags, mesh, cores, threads):
    """With one thread, collectives over two axes can deadlock. There are at least as many threads as cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("NPROC", "")  # monkeypatch restores the variable after the test
    monkeypatch.delenv("NPROC")
    one_device_per_core([RunConfig(MODEL, batch=8, mesh=mesh)])
    assert os.environ.get("NPROC") == threads
    assert os.environ["XLA_FLAGS"] == (flags or "--xla_force_host_platform_device_count=8")


def test_the_remaining_time_excludes_the_compilation_of_the_first_steps(tmp_path, monkeypatch, capsys):
    from jaxlm.run import folder

    clock = [0.0]
    monkeypatch.setattr(folder.time, "monotonic", lambda: clock[0])
    log = folder.RunLog(tmp_path, 0, 100)
    values = {"loss": 1.0, "learning_rate": 0.1, "tokens_per_second": 5.0}
    for now, step, more in ((30, 10, {"step_ms_p50": 1000.0}), (50, 20, {"step_ms_p50": 1000.0})):
        clock[0] = float(now)
        log.progress(step, values | more)
    log.close()
    lines = capsys.readouterr().err.splitlines()
    # At first the median step of 1 s counts, then 2 s per step with evaluations, but without the first 30 s.
    assert lines[0].endswith("1:30 left") and lines[1].endswith("2:40 left")
