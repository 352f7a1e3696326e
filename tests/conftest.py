"""Eight virtual devices for every test, and one compile cache for all test runs, so that the second is fast."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from flags import xla_flags

# JAX reads these when it starts, in the subprocesses of tests too.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(devices=8)}".strip()
# Two threads a device: with one, collectives over two axes can wait for each other until XLA aborts.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "jaxlm" / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no name of a folder that is missing is looked for on the hub
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Tracing makes many objects and few cycles, so that frequent collections take a tenth of the time of tests.
gc.set_threshold(100_000, 20, 50)


@pytest.fixture(autouse=True, scope="module")
def _programs_are_forgotten():
    """Each kernel of a compiled program takes three of the 65,530 mappings that Linux lets a process have, and XLA
    crashes when they are used up; so no module of tests leaves its programs behind."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()


@pytest.fixture
def devices(monkeypatch):
    """`devices(n)`: runs that begin from now on see n devices; 1 until it is called."""
    import jax

    from jaxlm.devices import sharding

    made = sharding.make_mesh
    some = lambda n: monkeypatch.setattr(
        sharding, "make_mesh", lambda config, given=None: made(config, given or jax.devices()[:n])
    )
    some(1)
    return some


@pytest.fixture
def no_pictures(monkeypatch):
    """The reports of runs in this process are empty pages: drawing takes longer than the runs."""
    from jaxlm.reports import report

    def write(folder, *_):
        (folder / "report.html").touch()
        return folder / "report.html"

    monkeypatch.setattr(report, "write", write)
