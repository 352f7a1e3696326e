"""Runs that are killed, moved to other devices, damaged or out of disk space end the same, or report the reason.

Every run here is tiny.  "The same" means byte for byte: weights, optimizer state, export, and the losses of the log.
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
from jaxlm.__main__ import main, one_device_per_core
from jaxlm.config import MeshConfig
from jaxlm.devices import sharding
from jaxlm.errors import RunError, Stopped, UserError
from jaxlm.hub import safetensors
from jaxlm.nn.transformer import Transformer, init
from jaxlm.run.checkpoint import Checkpoints
from jaxlm.run.fit import fit
from jaxlm.run.folder import begin, open_run_dir
from jaxlm.run.measure import MEASURED
from jaxlm.run.optimizer import make_optimizer
from jaxlm.run.step import TrainState

# The message of TensorStore when one array of a checkpoint fails, which `jaxlm.__main__` hides.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def swept_up():
    """Raises none of them in a later test file either."""
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
def place(tmp_path_factory) -> Path:
    """A folder with text.txt and the cache of all runs of this file."""
    folder = tmp_path_factory.mktemp("runs")
    write_text(folder)
    return folder


@pytest.fixture(autouse=True)
def private_cache(place, monkeypatch, no_pictures):
    monkeypatch.setenv("JAXLM_CACHE", str(place / "cache"))


def a_run(place: Path, workdir: Path, **more: Any) -> RunConfig:
    """12 steps, with different intervals of log lines, evaluations and checkpoints."""
    values = {
        "model": MODEL,
        "task": CausalLM(),
        "data": DataConfig(path=str(place / "text.txt"), length=32),
        "tokenizer": TokenizerConfig(train="characters"),
        "optimizer": OptimizerConfig(rate=1e-2, beta2=0.99),
        "mesh": MeshConfig(),
        "batch": 8,
        "steps": 12,
        "log_every": 4,
        "checkpoint_every": 3,
        "keep_checkpoints": True,  # they are compared
        "eval_every": 6,
        "sample_tokens": 0,
        "workdir": str(workdir),
    }
    return RunConfig(**values | more)


def stop_after(steps: int):
    """Returns a `stop` that ends a run after so many steps."""
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
def alone(place, tmp_path_factory) -> Path:
    """An uninterrupted run on one device."""
    with pytest.MonkeyPatch.context() as patch:
        made = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda c, some=None: made(c, some or jax.devices()[:1]))
        patch.setenv("JAXLM_CACHE", str(place / "cache"))
        folder = tmp_path_factory.mktemp("alone") / "run"
        fit(a_run(place, folder))
    return folder


# Stopped and resumed


@pytest.mark.parametrize("after", [pytest.param((1,), marks=pytest.mark.long), (5, 2, 3)], ids=str)
def test_a_stopped_run_resumes_to_the_same_end(place, alone, tmp_path, devices, after):
    run = a_run(place, tmp_path / "run")
    for steps in after:
        with pytest.raises(Stopped, match=f"stopped at step .* of {run.steps}"):
            fit(run, stop=stop_after(steps))
    fit(run)
    assert_same(tmp_path / "run", alone)


@pytest.mark.parametrize("source", [pytest.param("the seed", marks=pytest.mark.long), "weights"])
def test_a_run_with_frozen_parameters_resumes_to_the_same_end(place, alone, tmp_path, devices, source):
    """Checkpoints omit frozen parameters: they are read from their source again, and must be the same."""
    frozen = {"optimizer": OptimizerConfig(rate=1e-2, beta2=0.99, freeze="all_but_heads")}
    given = tmp_path / "given"
    if source == "weights":
        shutil.copytree(alone / "export", given)
        frozen |= {"init": str(given), "model": None}
    run = a_run(place, tmp_path / "run", **frozen)
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
    assert size(tmp_path / "run") < 0.25 * size(alone)
    assert lm.config.layers == 2


def test_an_interrupt_waits_for_the_step_and_the_same_call_resumes(place, alone, tmp_path, devices):
    run, steps = a_run(place, tmp_path / "run"), iter(range(4))

    def stop() -> bool:
        if next(steps, None) == 3:
            signal.raise_signal(signal.SIGINT)
        return False

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 5 of 12 and saved"):
        fit(run, stop=stop)
    assert signal.getsignal(signal.SIGINT) is before
    fit(run)
    assert_same(tmp_path / "run", alone)


def test_the_interrupt_handler_of_a_program_is_kept(place, tmp_path, monkeypatch, devices):
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        fit(a_run(place, tmp_path / "run", steps=2), stop=lambda: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT] * 2


def test_the_files_of_a_finished_run(alone):
    rows = losses(alone)
    assert [row["step"] for row in rows] == [4, 6, 8, 12, 12]
    speed = {"tokens_per_second", "examples_per_second"}
    for line in (alone / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "loss" in row:
            assert row.keys() >= {"step", "loss", "learning_rate", "grad_norm"} | speed
            assert list(row)[:2] == ["step", "loss"]
        else:
            assert row.keys() == {"step", "eval/loss", "eval/perplexity", "eval/bits_per_byte", "eval/accuracy"}
    assert (alone / "report.html").stat().st_size > 1000
    assert {"config.json", "model.safetensors"} <= {f.name for f in (alone / "export").iterdir()}
    kept = {path.name for path in (alone / "checkpoints").iterdir()}
    assert {"9", "12"} <= kept <= {"6", "9", "12"}
    assert sorted(path.name for path in alone.iterdir()) == [
        "checkpoints", "config.json", "export", "metrics.jsonl", "report", "report.html", "scores.json", "summary.txt",
        "tensorboard",
    ]  # fmt: skip


def read_events(folder: Path) -> list[Any]:
    """Returns the events of all files of a folder; a record is length, checksum, data, checksum (TFRecord)."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return events


def test_tensorboard_has_the_values_of_the_log(alone):
    points = {}
    for event in read_events(alone / "tensorboard"):
        for value in event.summary.value:
            points[event.step, value.tag] = value.simple_value
    rows = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    logged = {(row["step"], name): x for row in rows for name, x in row.items() if name != "step"}
    assert points == pytest.approx(logged, rel=1e-6)


def test_a_finished_run_is_reported(place, alone, devices, capsys):
    before = {f: f.stat().st_mtime_ns for f in alone.rglob("*") if f.is_file() and f.name != "config.json"}
    lm = fit(a_run(place, alone))
    assert "is already finished, at step 12; nothing is left to do" in capsys.readouterr().err
    assert before == {f: f.stat().st_mtime_ns for f in alone.rglob("*") if f.is_file() and f.name != "config.json"}
    assert lm.config.width == MODEL.width


def test_a_finished_run_keeps_its_export(place, alone, tmp_path, devices, no_pictures, capsys):
    """It needs no checkpoints, and is finished without them, even where its report was removed."""
    run = a_run(place, tmp_path / "run", keep_checkpoints=False)
    fit(run)
    kept = {path.name for path in (tmp_path / "run").iterdir()}
    assert kept == {path.name for path in alone.iterdir()} - {"checkpoints", "report"}  # no pictures
    for file in (alone / "export").iterdir():
        assert (tmp_path / "run" / "export" / file.name).read_bytes() == file.read_bytes()
    (tmp_path / "run" / "report.html").unlink()
    capsys.readouterr()
    fit(run)
    assert "is already finished, at step 12; nothing is left to do" in capsys.readouterr().err


def test_the_last_line_is_a_mean_over_as_many_steps_as_the_others(place, tmp_path, devices):
    by_step = a_run(place, tmp_path / "each", log_every=1, eval_every=0)
    fit(by_step)
    each = [row["loss"] for row in losses(tmp_path / "each") if "loss" in row]
    run = a_run(place, tmp_path / "run", log_every=5, eval_every=0)
    with pytest.raises(Stopped):
        fit(run, stop=stop_after(11))  # what the last line needs of the line before it comes back with the state
    fit(run)
    lines = [row["loss"] for row in losses(tmp_path / "run") if "loss" in row]
    assert lines == pytest.approx([np.mean(each[0:5]), np.mean(each[5:10]), np.mean(each[7:12])])


def test_the_log_is_cut_to_the_restored_step(place, alone, tmp_path, devices):
    run = a_run(place, tmp_path / "run")
    with pytest.raises(Stopped):
        fit(run, stop=stop_after(5))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "loss": 1.0}\n{"step": 12, "lo')
    fit(run)
    assert losses(tmp_path / "run") == losses(alone)


def test_given_weights_are_not_donated(place, alone, tmp_path, devices):
    import jaxlm

    lm = jaxlm.load(alone)
    before = jax.tree.map(np.array, lm.params)
    with pytest.raises(Stopped):
        fit(a_run(place, tmp_path / "run"), model=lm, stop=stop_after(1))
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
PAIRS = [pytest.param(*pair, marks=pytest.mark.long if n else ()) for n, pair in enumerate(zip(CYCLE, CYCLE[1:]))]


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_run_resumes_on_other_devices(place, alone, tmp_path, devices, before, after):
    for name, stop in ((before, stop_after(6)), (after, lambda: False)):
        n, mesh = MESHES[name]
        devices(n)
        run = a_run(place, tmp_path / "run", mesh=mesh)
        if name == before:
            with pytest.raises(Stopped):
                fit(run, stop=stop)
        else:
            fit(run)
    ours, theirs = losses(tmp_path / "run"), losses(alone)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


# Damage


def stopped_copy(place: Path, folder: Path, steps: int = 7) -> RunConfig:
    """A run with checkpoints 6 (the best) and 7; the others were removed."""
    run = a_run(place, folder)
    with pytest.raises(Stopped):
        fit(run, stop=stop_after(steps))
    return run


@pytest.fixture(scope="module")
def stopped(place, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        made = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda c, some=None: made(c, some or jax.devices()[:1]))
        patch.setenv("JAXLM_CACHE", str(place / "cache"))
        folder = tmp_path_factory.mktemp("stopped") / "run"
        stopped_copy(place, folder)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["6", "7"]
    return folder


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


DAMAGE = {
    "flipped": flip,
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "deleted": Path.unlink,
}


def restored(folder: Path, log=print) -> tuple[int, Any] | None:
    """Returns the step of the newest valid checkpoint of a run folder, and its leaves as bytes."""
    checkpoints = Checkpoints(folder / "checkpoints", 2, log)
    found = checkpoints.restore(shapes_of_a_run())
    checkpoints.close()
    if found is None:
        return None
    return int(found[0].step), (found[1], [np.asarray(x).tobytes() for x in jax.tree.leaves(found[0])])


def shapes_of_a_run() -> TrainState:
    """Returns the shapes of the state of `a_run`, on one device."""
    run = a_run(Path(), Path())
    shapes = jax.eval_shape(partial(init, Transformer(run.model)), jax.random.key(0))
    opt_state = jax.eval_shape(make_optimizer(run.optimizer, run.steps, shapes).init, shapes)
    state = TrainState(jax.ShapeDtypeStruct((), "int32"), shapes, opt_state, jax.ShapeDtypeStruct((2,), "uint32"))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), state)


@pytest.mark.parametrize("damage", ["flipped", *(pytest.param(d, marks=pytest.mark.long) for d in list(DAMAGE)[1:])])
def test_a_damaged_checkpoint_is_never_restored(stopped, tmp_path, damage):
    """Each file in turn: the run resumes from the same state or, with a message, from the checkpoint before."""
    whole = restored(stopped)
    shutil.copytree(stopped, tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "7")
    before = restored(tmp_path / "whole")
    assert whole[0] == 7 and before[0] == 6
    top = stopped / "checkpoints" / "7"
    files = [f.relative_to(top) for f in sorted(top.rglob("*")) if f.is_file() and f.stat().st_size]
    fallen = []
    for n, file in enumerate(files):
        folder = tmp_path / str(n)
        shutil.copytree(stopped, folder)
        DAMAGE[damage](folder / "checkpoints" / "7" / file)
        said = []
        found = restored(folder, said.append)
        assert found in (whole, before), file
        assert bool(said) == (found == before), (file, said)
        if said:
            fallen.append(file.parts[:2])
            assert "checkpoint 7 is corrupt" in said[0] and "checkpoint 6" in said[1]
            assert (folder / "corrupt" / "7").is_dir()
    assert ("state", "d") in fallen  # where the tensors are


def test_a_best_checkpoint_whose_score_is_damaged(stopped, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    for file in (folder / "checkpoints" / "6" / "metrics").iterdir():
        file.write_text("{")
    said = []
    assert restored(folder, said.append)[0] == 7
    assert "checkpoint 6 is corrupt" in said[0]


def test_a_run_resumes_from_the_checkpoint_before_a_corrupt_one(place, alone, stopped, tmp_path, devices, capsys):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    for file in (folder / "checkpoints" / "7" / "state" / "d").iterdir():
        flip(file)
    fit(a_run(place, folder))
    said = capsys.readouterr().err
    assert "checkpoint 7 is corrupt" in said and "resuming  at step 6" in said
    assert " since step 6\n" in said  # the time of the report
    assert_same(folder, alone)


def test_a_run_with_only_corrupt_checkpoints_starts_again(place, alone, stopped, tmp_path, devices, capsys):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    for step in ("6", "7"):
        for file in (folder / "checkpoints" / step / "state" / "d").iterdir():
            flip(file)
    fit(a_run(place, folder))
    said = capsys.readouterr().err
    assert "checkpoint 7 is corrupt" in said and "checkpoint 6 is corrupt" in said
    assert "no valid checkpoint is left" in said and "resuming" not in said
    assert_same(folder, alone)


@pytest.mark.parametrize("n", [1, 8])
def test_a_checkpoint_has_the_saved_state_although_its_buffers_are_donated(tmp_path, n):
    """Checkpoints are written while the next steps overwrite the state in place; all of them are valid."""
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


def test_a_checkpoint_without_read_permission_is_not_corrupt(stopped, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    checkpoints = Checkpoints(folder / "checkpoints", 2)

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("PERMISSION_DENIED: Error opening file")

    monkeypatch.setattr(checkpoints._manager, "restore", refuse)
    with pytest.raises(RunError, match=r"7 cannot be read: PERMISSION_DENIED"):
        checkpoints.restore(shapes_of_a_run())
    assert not (folder / "corrupt").exists()


def test_parameters_are_restored_without_the_optimizer_state(tmp_path):
    said = []
    state = TrainState(jnp.int32(3), {"a": {"b": jnp.arange(6.0)}}, {"m": jnp.ones(6)}, jnp.zeros(2, jnp.uint32))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, said.append)
    checkpoints.save(state, {"best": 1.0})
    checkpoints.wait()
    found = checkpoints.restore_params(like.params, 3)
    assert found is not None, said
    np.testing.assert_array_equal(found["a"]["b"], state.params["a"]["b"])
    notes = tmp_path / "checkpoints" / "3" / "notes" / "metadata"
    values = json.loads(notes.read_text())
    values["checksums"][1] += 1
    notes.write_text(json.dumps(values))
    assert checkpoints.restore_params(like.params, 3) is None
    assert "the best checkpoint, " in said[0]
    checkpoints.close()


# Divergence


@pytest.mark.parametrize("rate", [1e14])
def test_a_loss_that_is_not_finite_ends_the_run(place, tmp_path, devices, rate):
    optimizer = OptimizerConfig(rate=rate, warmup=0)
    run = a_run(place, tmp_path / "run", checkpoint_every=1, optimizer=optimizer, log_every=100)
    with pytest.raises(RunError, match=r"at step \d+; learning rate \S+e\+\d+, gradient norm .*finite") as raised:
        fit(run)
    message = str(raised.value)
    assert "--optimizer.rate" in message and "--workdir" in message
    found = restored(tmp_path / "run")
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


def changed(run: RunConfig, change: dict[str, Any]) -> RunConfig:
    parts = {n: dataclasses.replace(getattr(run, n), **v) if isinstance(v, dict) else v for n, v in change.items()}
    return dataclasses.replace(run, **parts)


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_of_another_run_is_refused(place, stopped, name):
    run = changed(a_run(place, stopped), OTHERS[name])
    before = (stopped / "config.json").read_bytes()
    with pytest.raises(UserError, match=rf"contains another run(.|\n)*{name.split('.')[0]}.* \| ") as raised:
        open_run_dir(run, stopped)
    assert "--workdir" in str(raised.value)
    assert (stopped / "config.json").read_bytes() == before


@pytest.mark.parametrize("name", SAME)
def test_fields_that_may_differ(place, stopped, name):
    assert open_run_dir(changed(a_run(place, stopped), SAME[name]), stopped)


def test_data_may_move_but_not_change(place, alone, stopped, tmp_path, devices):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    write_text(moved, seed=1)
    run = a_run(place, folder, data=DataConfig(path=str(moved / "text.txt"), length=32))
    with pytest.raises(UserError, match=r"data with other content.*[0-9a-f]{16}, but now it is [0-9a-f]{16};"):
        fit(run)
    write_text(moved)
    fit(run)
    assert_same(folder, alone)


def test_a_run_without_steps_is_replaced(place, tmp_path):
    run = a_run(place, tmp_path / "run")
    assert not open_run_dir(run, tmp_path / "run")
    begin(run, tmp_path / "run", "0" * 16)
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    other = changed(run, OTHERS["model"])
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
def config(place) -> Path:
    (place / "tiny.py").write_text(CONFIG)
    return place / "tiny.py"


def start(config: Path, workdir: Path, *arguments: str, **options: Any) -> subprocess.Popen:
    """train.py on one device, with its output as text."""
    environment = os.environ | {
        "XLA_FLAGS": xla_flags(1),
        "JAXLM_CACHE": str(config.parent / "cache"),
    }
    command = [sys.executable, str(TRAIN), str(config), "--workdir", str(workdir), *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **options)


def wait_for(process: subprocess.Popen, sign: str) -> str:
    """Returns the output of the process up to and including the line with `sign`."""
    said = ""
    for line in process.stderr:
        said += line
        if sign in line:
            return said
    raise AssertionError(f"ended with {process.wait()} before it said {sign!r}:\n{said}")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_saves_and_the_same_command_resumes(config, place, tmp_path, number):
    steps = ("--steps", "400", "--checkpoint-every", "1000")
    process = start(config, tmp_path / "run", *steps)
    wait_for(process, "step 8/")
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143, said
    assert "saving after this step" in said and "of 400 and saved; the same command resumes from here" in said
    assert "Traceback" not in said
    (step,) = (int(path.name) for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*") if int(path.name) % 6)
    process = start(config, tmp_path / "run", *steps)
    assert f"resuming  at step {step}\n" in wait_for(process, "resuming")
    process.kill()
    process.communicate()


@pytest.mark.long
def test_a_signal_before_the_first_step_ends_the_run_at_once(config, tmp_path):
    for sign in ("data  ", "run  "):
        process = start(config, tmp_path / "run")
        wait_for(process, sign)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 143 and "Traceback" not in said, said


@pytest.mark.long
def test_killed_at_ten_moments(config, place, tmp_path):
    """SIGKILL while it compiles, trains, writes checkpoints, evaluates or exports does not change the result."""
    steps = ("--steps", "120", "--checkpoint-every", "5", "--eval-every", "12", "--log-every", "7")
    process = start(config, tmp_path / "alone", *steps)
    begun = time.monotonic()
    said = process.communicate(timeout=300)[1]
    whole = time.monotonic() - begun
    assert process.returncode == 0, said
    draw, kills, reached = random.Random(1), 0, []
    # Delays after a number of lines with a text: by the clock, before the first step, mostly between steps and
    # checkpoints, and after the last step, during the export.
    train = lambda: ("step ", draw.randint(1, 5), 0.4)
    moments = [lambda: ("", 0, whole), train, train, train, lambda: ("run  ", 1, 2.0)]
    moments += [train, train, train, lambda: ("step 120/", 1, 2.0), train]
    while kills < len(moments):
        process = start(config, tmp_path / "run", *steps)
        sign, lines, most = moments[kills % len(moments)]()
        while lines and (line := process.stderr.readline()):
            assert "corrupt" not in line and "Traceback" not in line, line
            lines -= sign in line
        time.sleep(draw.uniform(0, most))
        process.kill()
        said = process.communicate()[1]
        assert "corrupt" not in said and "Traceback" not in said, said
        if process.returncode != -signal.SIGKILL:  # it was at its end: again from the beginning
            assert process.returncode == 0
            assert_same(tmp_path / "run", tmp_path / "alone")
            shutil.rmtree(tmp_path / "run")
            continue
        kills += 1
        names = [path.name for path in (tmp_path / "run" / "checkpoints").glob("*")]
        reached.append((max((int(name) for name in names if name.isdigit()), default=0), len(names)))
    process = start(config, tmp_path / "run", *steps)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0 and "corrupt" not in said, said
    print("newest checkpoint, and number of them with half ones, after each kill:", reached)
    assert_same(tmp_path / "run", tmp_path / "alone")


# Full and read-only disks


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a separate disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    "left", [pytest.param(0, marks=pytest.mark.long), 1 << 16, pytest.param(1 << 18, marks=pytest.mark.long)]
)
def test_a_full_disk_ends_the_run_and_the_last_checkpoint_stays(
    config, place, alone, stopped, small_disk, tmp_path, devices, left
):
    folder, ballast = small_disk / "run", small_disk / "ballast"
    shutil.copytree(stopped, folder)
    ballast.write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - left))
    process = start(config, folder)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1, said
    assert "Traceback" not in said and said.count("error: ") == 1, said
    assert ("the disk is full" in said or "No space left" in said) and "free disk space" in said
    assert {path.name for path in (folder / "checkpoints").iterdir()} >= {"6", "7"}
    ballast.unlink()
    fit(a_run(place, folder))
    assert_same(folder, alone)


def test_a_folder_that_cannot_be_written(config, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["train", str(config), "--workdir", str(tmp_path / "file" / "run")]) == 2
    said = capsys.readouterr().err
    assert "cannot be written: Not a directory; choose another --workdir" in said and said.count("\n") == 1


def test_a_disk_that_cannot_be_written(config, small_disk, capsys):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert main(["train", str(config), "--workdir", str(small_disk / "run")]) == 2
    said = capsys.readouterr().err
    assert "Read-only file system; choose another --workdir" in said and said.count("\n") == 1


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
    """With one, collectives over two axes can deadlock. There are at least as many threads as cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("NPROC", "")  # so that it is put back
    monkeypatch.delenv("NPROC")
    one_device_per_core([RunConfig(MODEL, batch=8, mesh=mesh)])
    assert os.environ.get("NPROC") == threads
    assert os.environ["XLA_FLAGS"] == (flags or "--xla_force_host_platform_device_count=8")
