"""Every test has eight virtual devices, and all test runs share one compile cache, so that the second is fast."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from flags import xla_flags

# JAX reads these variables when it starts, also in the subprocesses of tests.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(devices=8)}".strip()
# Two threads per device: with one, collectives over two axes can wait for each other until XLA aborts.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "jaxlm" / "tests"))
os.environ.setdefault("MKL_NUM_THREADS", "1")  # the threads of torch in several workers would wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the name of a missing folder is not requested from the hub
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Tracing creates many objects and few cycles. Frequent garbage collections take a tenth of the time of the tests.
gc.set_threshold(100_000, 20, 50)


@pytest.fixture(autouse=True, scope="module")
def _clear_programs():
    """Removes the compiled programs of each module of tests.

    Each kernel of a program requires three memory mappings. Linux limits a process to 65,530 of them, and XLA crashes
    beyond this limit.
    """
    yield
    import jax

    jax.clear_caches()
    gc.collect()


@pytest.fixture
def devices(monkeypatch):
    """`devices(n)` sets the number of devices of later runs. Before the first call, it is 1."""
    import jax

    from jaxlm.devices import sharding

    make_mesh = sharding.make_mesh
    set_devices = lambda n: monkeypatch.setattr(
        sharding, "make_mesh", lambda config, given=None: make_mesh(config, given or jax.devices()[:n])
    )
    set_devices(1)
    return set_devices


@pytest.fixture
def no_plots(monkeypatch):
    """The reports of runs in this process are empty pages, because plots take longer than the runs."""
    from jaxlm.reports import report

    def write(folder, *_):
        (folder / "report.html").touch()
        return folder / "report.html"

    monkeypatch.setattr(report, "write", write)
