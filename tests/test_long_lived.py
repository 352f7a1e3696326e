"""Processes that load, use and drop many models keep none of their compiled functions.

Each kernel requires memory mappings. Linux limits a process to 65,530 of them, and XLA crashes beyond this limit.
"""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from random_params import random_params

import jaxlm
from jaxlm import Classification, DataConfig, Decoding, ModelConfig, OptimizerConfig, RunConfig, TokenizerConfig
from jaxlm.lm import LM
from jaxlm.nn.transformer import Transformer
from jaxlm.run import sweep
from jaxlm.run.fit import fit

ROWS = [
    {"text": text, "label": label} for text, label in (("a cab", "x"), ("bad", "y"), ("dab", "x"), ("ace", "y")) * 5
]
MAX_MAPPINGS = 10  # per model; a model that keeps its functions leaves 200 to 600 mappings

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists the mappings")


def mappings() -> int:
    gc.collect()
    with open("/proc/self/maps") as file:
        return sum(1 for _ in file)


def mappings_per_use(use: Callable[[int], Any], count: int, first: int = 3) -> float:
    """Returns the mean number of mappings that a use leaves after the first uses, and prints the totals."""
    for n in range(first):
        use(n)
    before = mappings()
    for n in range(first, count):
        use(n)
    after = mappings()
    print(f"{before:,} mappings after {first}, {after:,} after {count}")
    return (after - before) / (count - first)


def run_config(folder: Path, workdir: Path, seed: int = 0) -> RunConfig:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    model = ModelConfig(
        structure="encoder", heads_on_top=(), vocabulary=32, max_length=16, width=8, layers=1, heads=2, dropout=0.0
    )
    return RunConfig(
        model,
        Classification(),
        DataConfig(path=str(folder / "rows.jsonl"), length=16, cache=str(folder / "cache")),
        tokenizer=TokenizerConfig(train="characters"),
        optimizer=OptimizerConfig(rate=1e-3),
        batch=4,
        steps=1,
        seed=seed,
        workdir=str(workdir),
    )


@pytest.mark.long
def test_decoders_that_are_dropped_leave_no_functions(tmp_path):
    config = ModelConfig(vocabulary=32, max_length=32, width=8, layers=1, heads=2)
    jaxlm.save(LM(config, Transformer(config), random_params(config), None), tmp_path / "model")
    references: list[Any] = []

    def use(n: int) -> None:
        lm = jaxlm.load(tmp_path / "model")
        jaxlm.generate(lm, [[1, 2, 3]], Decoding(max_new_tokens=2, temperature=0.0), return_tokens=True)
        references.append(weakref.ref(lm.programs))

    assert mappings_per_use(use, 8) < MAX_MAPPINGS
    gc.collect()
    assert not any(one() for one in references)


@pytest.mark.long
@pytest.mark.parametrize("count", [24])
def test_runs_that_are_evaluated_leave_no_functions(tmp_path, devices, count):
    fit(run_config(tmp_path, tmp_path / "run"), summary=False)

    def use(n: int) -> None:
        lm = jaxlm.load(tmp_path / "run")
        jaxlm.evaluate(lm, ROWS)
        jaxlm.predict(lm, ROWS)
        jaxlm.encode(lm, ["bad"])

    assert mappings_per_use(use, count) < MAX_MAPPINGS


@pytest.mark.long
@pytest.mark.parametrize("count", [12])
def test_runs_of_a_sweep_leave_no_functions(tmp_path, devices, count):
    fields = [{"seed": str(n)} for n in range(count)]
    left = mappings_per_use(
        lambda n: sweep.sweep(
            [fields[n]],
            tmp_path / "sweep",
            lambda _, folder: fit(run_config(tmp_path, folder, n), summary=False),
            "accuracy",
        ),
        count,
    )
    assert left < MAX_MAPPINGS
