"""The measured costs of a run: each number is logged, is correct, and does not change the training."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import CausalLM, DataConfig, ModelConfig, OptimizerConfig, RunConfig, TokenizerConfig
from jaxlm.devices import chips
from jaxlm.devices.sharding import make_mesh
from jaxlm.errors import Stopped, UserError
from jaxlm.nn import flops
from jaxlm.run import measure
from jaxlm.run import training as training_module
from jaxlm.run.fit import fit
from jaxlm.run.measure import MEASURED, Meter, Trace

MODEL = ModelConfig(vocabulary=64, max_length=32, width=32, layers=2, heads=2)
PEAK = 1e12


@pytest.fixture(autouse=True)
def private_cache(monkeypatch, devices, no_plots, tmp_path):
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def known_chip(monkeypatch):
    """The devices are chips whose peak is `PEAK`."""
    chip = chips.CHIPS[0]._replace(flops=chips.Constant(PEAK, "FLOP/s", "this test"))
    monkeypatch.setattr(chips, "find", lambda kind: chip)


def make_run(folder: Path, **more: Any) -> RunConfig:
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 120)
    values = {
        "model": MODEL,
        "task": CausalLM(),
        "data": DataConfig(path=str(text), length=32),
        "tokenizer": TokenizerConfig(train="characters"),
        "batch": 8,
        "steps": 8,
        "log_every": 4,
        "sample_tokens": 0,
        "compute_dtype": "bfloat16",
        "workdir": str(folder / "run"),
    }
    return RunConfig(**values | more)


def log_rows(run: RunConfig) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (Path(run.workdir) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def test_each_row_has_the_costs_of_its_steps(tmp_path):
    run = make_run(tmp_path)
    start = time.monotonic()
    fit(run)
    elapsed = 1000 * (time.monotonic() - start)
    for row in log_rows(run):
        assert set(MEASURED) - row.keys() == {"mfu", "memory_bytes"}  # unknown for a CPU
        assert 0 < row["step_ms_p50"] <= row["step_ms_p90"] <= row["step_ms_p99"] < elapsed
        assert 0 <= row["data_share"] <= 1
        assert 1 << 26 < row["process_memory_bytes"] < 1 << 40
        assert row["examples_per_second"] > 0


def test_the_utilisation_is_model_flops_over_time_and_peak(tmp_path, known_chip):
    run = make_run(tmp_path)
    fit(run)
    D, L, V, T, rows = 32, 2, 64, 32, 8
    weights = L * 12 * D * D + D * V  # per layer: 4 D x D around attention, 2 D x 4 D in the MLP
    step = rows * T * (6 * weights + 12 * L * D * T)  # Chowdhery et al. 2022, appendix B
    assert step == flops.model_flops(MODEL, rows, T).step
    for row in log_rows(run):
        # Almost all rows are full, so the number of tokens is proportional to the time.
        per_second = row["mfu"] * PEAK / step * rows * T
        assert per_second == pytest.approx(row["tokens_per_second"], rel=0.3)


@pytest.mark.parametrize(
    "more",
    [
        {"compute_dtype": "float32"},
        pytest.param({"optimizer": OptimizerConfig(freeze="embeddings")}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_no_utilisation_is_logged_for_another_dtype_or_frozen_parameters(tmp_path, known_chip, more):
    run = make_run(tmp_path, steps=4, **more)
    fit(run)
    assert all("mfu" not in row for row in log_rows(run))


@pytest.mark.long
def test_a_row_continues_after_a_checkpoint_in_its_middle(tmp_path, monkeypatch):
    run = make_run(tmp_path, steps=8, log_every=8)
    left = iter(range(3))
    with pytest.raises(Stopped):
        fit(run, stop=lambda: next(left, None) is None)
    carried = []
    monkeypatch.setattr(training_module, "Meter", lambda *arguments: carried.append(arguments[2]) or Meter(*arguments))
    fit(run)
    (notes,) = carried
    assert len(notes["took"]) == 3 and notes["seconds"] > sum(notes["took"]) > 0  # the first step compiled
    (row,) = log_rows(run)
    assert row["tokens_per_second"] < 8 * 8 * 32 / notes["seconds"]  # includes the time before the checkpoint


def test_a_row_includes_the_carried_measurements():
    meter = Meter(make_mesh(RunConfig().mesh), 0, {"seconds": 1000.0, "lost": 250.0, "took": [0.5] * 9})
    record_step(meter, jax.numpy.ones(3))
    seconds, line = meter.line(10)
    meter.close()
    assert line["step_ms_p50"] == 500 and line["data_share"] == pytest.approx(0.25, rel=1e-2)
    assert seconds == pytest.approx(1000, rel=1e-2)


def record_step(meter: Meter, result: Any) -> None:
    next(meter.fed(iter([0])))
    meter.record_step(result)


class PendingResult:
    """A result that is ready when the test sets its event."""

    def __init__(self):
        self.event = threading.Event()

    def block_until_ready(self):
        assert self.event.wait(10)
        return self


def test_the_loop_never_waits_and_data_time_is_idle_time_of_the_device(monkeypatch):
    """With a fake clock: steps take 2 s, batches take 1 s, and one takes 5 s."""
    now = [0.0]
    monkeypatch.setattr(measure, "time", SimpleNamespace(monotonic=lambda: now[0]))
    meter = Meter(make_mesh(RunConfig().mesh))

    def batch(seconds: float):
        now[0] += seconds
        yield 0

    def done(result: PendingResult, at: float) -> None:
        now[0] = at
        before = meter._pending
        result.event.set()
        while meter._pending == before:
            time.sleep(0.001)

    results = [PendingResult() for _ in range(4)]
    next(meter.fed(batch(1)))  # 0 to 1: the device is idle
    meter.record_step(results[0])
    next(meter.fed(batch(1)))  # 1 to 2: the device is busy until 3
    meter.record_step(results[1])
    assert meter._pending == 2  # both are queued, neither is done
    done(results[0], 3)
    done(results[1], 5)
    now[0] = 4
    next(meter.fed(batch(5)))  # 4 to 9: the device was busy until 5
    meter.record_step(results[2])
    done(results[2], 11)
    assert [times.seconds for times in meter._done] == [None, 2, 6]  # the first step compiles
    seconds, line = meter.line(3)
    assert seconds == 11 and line["step_ms_p50"] == 4000 and line["data_share"] == pytest.approx((1 + 4) / 11)
    now[0] = 21
    meter.record_pause(10)  # an evaluation
    next(meter.fed(batch(1)))
    meter.record_step(results[3])
    done(results[3], 24)
    assert meter.state() == {"seconds": 3, "lost": 1, "took": [3]}
    meter.close()


def test_a_failed_step_does_not_end_the_thread():
    class Failing:
        def block_until_ready(self):
            raise RuntimeError("out of memory")

    meter = Meter(make_mesh(RunConfig().mesh))
    record_step(meter, Failing())
    record_step(meter, jax.numpy.ones(3))
    assert len(meter.state()["took"]) == 1
    meter.close()


def test_memory_is_the_maximum_over_devices_if_known():
    device = lambda **stats: SimpleNamespace(memory_stats=lambda: stats)
    assert measure.memory([device(peak_bytes_in_use=3), device(peak_bytes_in_use=5), device()]) == {"memory_bytes": 5}
    assert measure.memory([SimpleNamespace(memory_stats=lambda: None)]).keys() == {"process_memory_bytes"}


def test_percentiles_are_in_milliseconds():
    assert measure.percentiles(np.arange(101) / 1000) == {"step_ms_p50": 50, "step_ms_p90": 90, "step_ms_p99": 99}
    assert measure.percentiles([]) == {}


@pytest.mark.long
def test_a_trace_is_written_for_tensorboard(tmp_path):
    run = make_run(tmp_path, profile=2)
    fit(run)
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    data = trace.read_bytes()
    assert b"train" in data and b"step_num" in data


@pytest.mark.parametrize(
    ("count", "started", "steps", "traced"),
    [
        (2, 0, 9, [4, 5]),
        (2, 5, 12, [9, 10]),
        (3, 0, 4, [2, 3, 4]),
        (9, 0, 2, [1, 2]),
        (0, 0, 9, []),
        (2, 9, 9, []),
    ],
)
def test_the_middle_steps_are_traced(monkeypatch, tmp_path, count, started, steps, traced):
    active: list[bool] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: active.append(True))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: active.pop())
    trace, traced_steps = Trace(tmp_path, count, started, steps), []
    for step in range(started + 1, steps + 1):
        trace.before(step, ())
        traced_steps += [step] * len(active)
        trace.after(step, ())
    assert traced_steps == traced and not active


def test_a_trace_is_written_if_the_run_ends_early(monkeypatch, tmp_path):
    ended = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: ended.append(True))
    trace = Trace(tmp_path, 5, 0, 100)
    trace.before(4, ())
    trace.close()
    trace.close()
    assert ended == [True]


def test_a_negative_profile_raises_an_error(tmp_path):
    with pytest.raises(UserError, match="profile is -1; it must be at least 0"):
        make_run(tmp_path, profile=-1).check()
