"""Measures the steps of a run: time, FLOPs utilisation, memory and waiting for data; traces some of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Condition, Thread
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from jaxlm.devices import chips

Batch = TypeVar("Batch")

PERCENTILES = (50, 90, 99)
# Fields of a line of the log that depend on the clock and the machine, and so differ between two equal runs.
SPEEDS = ("tokens_per_second", "examples_per_second", "mfu")
TIMES = tuple(f"step_ms_p{n}" for n in PERCENTILES)
MEASURED = (*SPEEDS, *TIMES, "data_share", "memory_bytes", "process_memory_bytes")
UNTRACED = 3  # steps before a trace starts: the first compiles, the next fill caches


class _Step(NamedTuple):
    requested: float  # when the loop began to wait for the batch
    received: float  # when the loop had the batch
    resumed: float  # end of the last pause
    result: Any  # an array that is ready when the step is done


class _Times(NamedTuple):
    seconds: float | None  # time of the step; None: it compiled
    waited: float  # seconds that the device waited for data
    end: float  # when the step was done


class Meter:
    """Measures the steps since the last line of the log.

    On accelerators the loop dispatches steps long before they are done, and must not wait for them. A thread therefore
    waits for the result of each step and records the time. The time of a step is the time between its end and the end
    of the step before it. Waiting for data is the time that the loop waited for a batch while the device had nothing
    left to do; waiting while the device is busy costs nothing.
    """

    def __init__(self, mesh: jax.sharding.Mesh, flops: int = 0, state: dict[str, Any] | None = None):
        """Starts the thread.

        Args:
          mesh: the devices of the run.
          flops: model FLOPs of a step over all devices; 0: no utilisation is reported.
          state: `state()` of an earlier process of the run, which the next line continues.
        """
        state = state or {}
        self._mesh, self._flops = mesh, flops
        self._start = time.monotonic() - state.get("seconds", 0.0)
        self._carried: dict[str, Any] = state
        self._dispatched, self._done = 0, list[_Times]()  # steps of this process since the last line
        self._resumed = time.monotonic()
        self._requested = self._received = self._resumed
        self._first, self._pending, self._changed = True, 0, Condition()
        self._steps: SimpleQueue[_Step | None] = SimpleQueue()
        Thread(target=self._watch, daemon=True).start()

    def fed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields the batches, and records how long the loop waits for each."""
        while True:
            self._requested = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._received = time.monotonic()
            yield batch

    def record_step(self, result: Any) -> None:
        """Records that a step was dispatched.

        Args:
          result: an array that is ready when the step is done, and whose buffer no later step is given.
        """
        with self._changed:
            self._pending += 1
            self._dispatched += 1
        self._steps.put(_Step(self._requested, self._received, self._resumed, result))

    def record_pause(self, seconds: float) -> None:
        """Records a pause of the loop, in seconds, during which no step was in flight."""
        self._start += seconds
        self._resumed = time.monotonic()

    def line(self, steps: int, later: int = 0) -> tuple[float, dict[str, float]]:
        """Returns the seconds and the measurements since the last line of the log, and begins the next line.

        Args:
          steps: number of steps since the last line; waits until they are done.
          later: number of steps that were dispatched after them.
        """
        self._wait(later)
        with self._changed:
            count = self._dispatched - later
            line, self._done, self._dispatched = self._done[:count], self._done[count:], later
        end = line[-1].end
        measured, start = self._measured(line, end), self._start
        self._start, self._carried = end, {}
        values, seconds = {}, end - start
        chip = chips.find(self._mesh.devices.flat[0].device_kind)
        if self._flops and chip is not None:
            values["mfu"] = self._flops * steps / (seconds * self._mesh.size * chip.flops.value)
        values |= percentiles(measured["took"])
        values["data_share"] = measured["lost"] / seconds
        values |= memory(self._mesh.local_devices)
        return seconds, values

    def state(self) -> dict[str, Any]:
        """Returns the measurements since the last line as JSON values, for a checkpoint; all steps are done."""
        self._wait()
        return self._measured(self._done, time.monotonic())

    def _measured(self, line: list[_Times], end: float) -> dict[str, Any]:
        """Returns the seconds until `end`, those that the device waited for data, and the time of each step."""
        lost = self._carried.get("lost", 0.0) + sum(times.waited for times in line)
        took = [*self._carried.get("took", ()), *(times.seconds for times in line if times.seconds is not None)]
        return {"seconds": end - self._start, "lost": lost, "took": took}

    def close(self) -> None:
        """Ends the thread."""
        self._steps.put(None)

    def _watch(self) -> None:
        previous_end = 0.0
        while (step := self._steps.get()) is not None:
            with suppress(Exception):  # the loop raises it too, when it reads the result
                jax.block_until_ready(step.result)
            end = time.monotonic()
            with self._changed:
                seconds = None if self._first else end - max(previous_end, step.resumed)  # the first step compiles
                waited = max(0.0, step.received - max(step.requested, previous_end))
                self._done.append(_Times(seconds, waited, end))
                self._first, previous_end = False, end
                self._pending -= 1
                self._changed.notify_all()

    def _wait(self, later: int = 0) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._pending <= later)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Returns the percentiles of step times, in milliseconds, by their name in the log; empty without times.

    Args:
      seconds: the time of each step.
    """
    if not len(seconds):
        return {}
    return dict(zip(TIMES, (1000 * np.percentile(seconds, PERCENTILES)).tolist()))


def memory(devices: Sequence[Any]) -> dict[str, int]:
    """Returns the peak memory since the process started, in bytes.

    Returns:
      `memory_bytes`, the largest peak of a device, where the platform reports it; else `process_memory_bytes`, the peak
      of the process in the memory of the host; else nothing.
    """
    all_stats = [device.memory_stats() or {} for device in devices]
    peaks = [stats["peak_bytes_in_use"] for stats in all_stats if "peak_bytes_in_use" in stats]
    if peaks:
        return {"memory_bytes": max(peaks)}
    try:
        import resource
    except ImportError:  # on Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"process_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


class Trace:
    """Traces some steps of a run into a folder that TensorBoard, with the plugin of xprof, can open.

    The trace starts after the first steps of this process, which compile, unless too few steps would be left.
    """

    def __init__(self, folder: Path, count: int, started: int, steps: int):
        """Chooses the steps.

        Args:
          folder: where the trace is written.
          count: number of steps to trace; 0: none.
          started: number of steps made before this process.
          steps: number of steps of the run.
        """
        count = min(count, steps - started)
        self._folder, self._running = folder, False
        self._first = started + 1 + min(UNTRACED, steps - started - count)
        self._last = self._first + count - 1

    def before(self, step: int, state: Any) -> None:
        """Starts the trace before its first step, once `state` is ready, so that the trace contains whole steps."""
        if step == self._first <= self._last:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """Ends the trace after its last step, once `result` is ready."""
        if self._running and step >= self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes the trace so far, where a run ends early."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
