"""What the steps of a run cost: time, the share of the chips' peak, memory, waiting for data; and a trace of some."""

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
# Fields of a line of the log that depend on the clock and the machine: two runs that are the same differ in these.
SPEEDS = ("tokens_per_second", "examples_per_second", "mfu")
TIMES = tuple(f"step_ms_p{n}" for n in PERCENTILES)
MEASURED = (*SPEEDS, *TIMES, "data_share", "memory_bytes", "process_memory_bytes")
UNTRACED = 3  # steps of a start before its trace begins: the first compiles, the next fill caches


class _Step(NamedTuple):
    asked: float  # when the loop began to wait for the batch
    given: float  # when it had it
    since: float  # beyond which its time does not reach back
    made: Any  # what is there once the step is done


class Meter:
    """The cost of the steps since the last line of a log.

    On accelerators the loop hands steps over long before they are done, and must not wait for them.  So a thread of its
    own waits for the result of each step in turn, which takes no time of the loop's, and notes when it was there.  A
    step's time is that between its end and the end of the one before it.  Data cost what the loop waited for a batch
    after the device had finished all steps before it; while the device is busy, waiting costs nothing.

    carried: what `carried` of an earlier process of the run returned, so that a checkpoint may cut a line.
    """

    def __init__(self, mesh: jax.sharding.Mesh, flops: int = 0, carried: dict[str, Any] | None = None):
        """flops: of the model in a step, over all devices; 0: no utilisation is told."""
        carried = carried or {}
        self._mesh, self._flops = mesh, flops
        self._begun = time.monotonic() - carried.get("seconds", 0.0)
        self._lost: float = carried.get("lost", 0.0)
        self._took: list[float] = [*carried.get("took", ())]
        self._since = time.monotonic()  # of the last pause
        self._asked = self._given = self._since
        self._first, self._unseen, self._seen = True, 0, Condition()
        self._steps: SimpleQueue[_Step | None] = SimpleQueue()
        Thread(target=self._watch, daemon=True).start()

    @property
    def seconds(self) -> float:
        """Since the last line, pauses left out."""
        return time.monotonic() - self._begun

    def fed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; how long each lets the loop wait is noted."""
        while True:
            self._asked = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._given = time.monotonic()
            yield batch

    def stepped(self, made: Any) -> None:
        """A step was handed over; `made` is an array that is there when it is done, and that no later step takes."""
        with self._seen:
            self._unseen += 1
        self._steps.put(_Step(self._asked, self._given, self._since, made))

    def paused(self, seconds: float) -> None:
        """The loop has done something else for so long, up to now, after all steps were done."""
        self._begun += seconds
        self._since = time.monotonic()

    def line(self, steps: int) -> dict[str, float]:
        """What the log says of the steps since its last line, so many, of which all are done; the next line begins."""
        self._wait()
        seconds = self.seconds
        values = {}
        chip = chips.find(self._mesh.devices.flat[0].device_kind)
        if self._flops and chip is not None:
            values["mfu"] = self._flops * steps / (seconds * self._mesh.size * chip.flops.value)
        values |= percentiles(self._took)
        values["data_share"] = self._lost / seconds
        values |= memory(self._mesh.local_devices)
        self._begun, self._lost, self._took = time.monotonic(), 0.0, []
        return values

    def carried(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values; all steps are done."""
        self._wait()
        return {"seconds": self.seconds, "lost": self._lost, "took": list(self._took)}

    def close(self) -> None:
        """Ends the thread."""
        self._steps.put(None)

    def _watch(self) -> None:
        before = 0.0  # when the step before this was done
        while (step := self._steps.get()) is not None:
            with suppress(Exception):  # the loop hears of it too, when it looks at the result
                jax.block_until_ready(step.made)
            done = time.monotonic()
            with self._seen:
                if not self._first:  # which compiles
                    self._took.append(done - max(before, step.since))
                self._lost += max(0.0, step.given - max(step.asked, before))
                self._first, before = False, done
                self._unseen -= 1
                self._seen.notify_all()

    def _wait(self) -> None:
        with self._seen:
            self._seen.wait_for(lambda: not self._unseen)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Of the times of steps, in milliseconds; none where there are no times."""
    if not len(seconds):
        return {}
    return dict(zip(TIMES, (1000 * np.percentile(seconds, PERCENTILES)).tolist()))


def memory(devices: Sequence[Any]) -> dict[str, int]:
    """The most that any of these devices held since the process began, where the platform knows; else, which is no
    measure of a device, the most that the process held in the memory of the host."""
    stats = [device.memory_stats() or {} for device in devices]
    peaks = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    if peaks:
        return {"memory_bytes": max(peaks)}
    try:
        import resource
    except ImportError:  # Windows has none
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"process_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


class Trace:
    """Traces some steps of a run into a folder that TensorBoard (with xprof's plugin) opens.

    It begins after the first steps of a start, which compile, unless too few would be left.
    """

    def __init__(self, folder: Path, count: int, started: int, steps: int):
        """count: how many steps; 0: none.  started, steps: made before this start, and the run's last."""
        count = min(count, steps - started)
        self._folder, self._on = folder, False
        self._first = started + 1 + min(UNTRACED, steps - started - count)
        self._last = self._first + count - 1

    def before(self, step: int, waiting_for: Any) -> None:
        """Begins before the first step of the trace, once `waiting_for` is there, so that it holds whole steps."""
        if step == self._first <= self._last:
            jax.block_until_ready(waiting_for)
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, waiting_for: Any) -> None:
        """Ends where this was the last step of the trace, once it is done."""
        if self._on and step >= self._last:
            jax.block_until_ready(waiting_for)
            self.close()

    def close(self) -> None:
        """Writes what there is, where a run ends early."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
