"""Settings of the whole process for JAX: CPU devices, memory, messages, the compilation cache."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxlm.config import RunConfig
from jaxlm.storage import disk

MAX_CPU_DEVICES = 256

# A model with at least this many parameters runs on one CPU device that uses all cores.
LARGE_ON_CPU = 50_000_000

# So does a model with this many per token of an update: MiniLM on SST-2 takes 206 ms per update instead of 325.
LARGE_PER_TOKEN = 5_000


def one_device_per_core(runs: list[RunConfig], processes: int = 1) -> None:
    """Sets the number of CPU devices and threads of XLA in the environment, before JAX looks for devices.

    The devices are as many as the cores, reduced until they divide the rows of all runs: XLA parallelises a small model
    badly within one device. Other platforms ignore the setting.

    Args:
      runs: the runs that this process will train.
      processes: number of processes that share this machine.
    """
    options = os.environ.get("XLA_FLAGS", "")
    preset = re.search(r"host_platform_device_count=(\d+)", options)
    devices = int(preset[1]) if preset else max(1, math.gcd(*map(_devices, runs)) // processes)
    if not preset and devices > MAX_CPU_DEVICES:  # XLA crashes with thousands of devices; `fit` refuses the mesh
        devices = _cores()
    if not preset:
        os.environ["XLA_FLAGS"] = f"{options} --xla_force_host_platform_device_count={devices}".strip()
    if any(sum(size != 1 for size in dataclasses.astuple(run.mesh)) > 1 for run in runs):
        # With one thread per device, two independent collectives over two mesh axes can deadlock: one device starts the
        # first, another the second. XLA reads the number of its threads from NPROC.
        os.environ.setdefault("NPROC", str(max(_cores(), 2 * devices)))


def _cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices(run: RunConfig) -> int:
    """Returns the best number of CPU devices for a run.

    A large model, or one with few tokens per update, uses one device for all cores: each further device would store and
    update another copy of the parameters.
    """
    if run.model is not None:
        parameters = run.model.vocabulary * run.model.width + 12 * run.model.layers * run.model.width**2
    else:  # most files have 4 bytes per parameter; a hub name is not downloaded for this
        init = Path(run.init)
        files = [init] if init.is_file() else init.glob("**/*.safetensors")  # a GGUF file
        parameters = sum(file.stat().st_size for file in files) // 4
    sizes = dataclasses.astuple(run.mesh)
    if -1 not in sizes:
        return math.prod(sizes)
    fixed = -math.prod(sizes)
    rows = 0 if run.examples else run.batch // run.accumulate  # a batch size that is computed later fits the devices
    # `examples` are packed into an unknown number of rows; they are assumed to be short.
    tokens = run.examples * min(64, run.data.length) or run.batch * run.data.length
    max_devices = _cores() if parameters < min(LARGE_ON_CPU, LARGE_PER_TOKEN * tokens) else max(1, fixed)
    fits = [n for n in range(1, max_devices + 1) if n % max(1, fixed) == 0 and rows % n == 0]
    return max(fits, default=1)


def configure_process() -> None:
    """Sets memory, logging and compilation cache for every verb that computes."""
    keep_memory()
    import jax

    for name in ("absl", "orbax", "jax", "asyncio"):
        # Their errors are also raised, and are reported once, by `main`.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _report_unraisable
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = disk.cache_folder()
        settings: dict[str, Any] = {
            "jax_compilation_cache_dir": str(folder / "xla"),
            "jax_persistent_cache_min_compile_time_secs": 0.5,
        }
        for name, value in settings.items():
            jax.config.update(name, value)


def keep_memory() -> None:
    """Makes the C library keep freed memory, on machines without an accelerator; call it before JAX starts threads.

    XLA allocates the buffers of each step again. By default glibc returns large ones to the kernel, which clears every
    page in the next step; this takes a fifth of the time of a small model on two cores. Threads that exist already have
    their own heaps, which this does not change.
    """
    accelerators = ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*", "kfd")
    if os.environ.get("JAX_PLATFORMS") != "cpu" and any(True for d in accelerators for _ in Path("/dev").glob(d)):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        arena_max, mmap_max, trim_threshold, top_pad = -8, -4, -1, -2  # of <malloc.h>
        for option, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 1 << 26)):
            libc.mallopt(option, value)


def _report_unraisable(unraisable: Any, report: Callable[[Any], Any] = sys.unraisablehook) -> None:
    """Hides two messages that Orbax causes when several arrays of a checkpoint fail: the first failure is raised."""
    error = unraisable.exc_value
    hidden = str(error).startswith(("Event loop is closed", "Encountered error while reading array index"))
    if not hidden and not isinstance(error, KeyboardInterrupt):  # `process.signals` reports interrupts
        report(unraisable)
