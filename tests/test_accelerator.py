"""The accelerator benchmark runs from end to end within its time limit, in an image with only jax and torch."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FILE = ROOT / "benchmarks" / "accelerator.py"
# Such an image may lack the packages of MISSING. Those of WITH_TRANSFORMERS are installed with transformers.
MISSING = ["tensorflow_datasets", "array_record", "grain", "tyro", "sentencepiece", "pyarrow", "seqeval", "sacrebleu"]
MISSING += ["rouge_score", "sklearn", "matplotlib", "tensorboardX", "jinja2"]
WITH_TRANSFORMERS = ["tokenizers", "safetensors", "huggingface_hub", "torch", "transformers"]
# Python runs sitecustomize.py when it starts, also in the processes of the benchmark.
WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without:
    find_distributions = PathFinder.find_distributions

    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in {missing} else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture
def environment_without(tmp_path):
    """Return `environment_without(names)`, which returns an environment without these packages."""

    def environment(names: list[str]) -> dict[str, str]:
        (tmp_path / "sitecustomize.py").write_text(WITHOUT.format(missing=set(names)))
        return os.environ | {"PYTHONPATH": str(tmp_path), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}

    return environment


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("accelerator", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(environment: dict[str, str], *arguments: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FILE), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, cwd="/")


def test_the_library_trains_and_generates_with_jax_flax_and_optax_alone(environment_without):
    names = [
        "run.assembly",
        "tasks",
        "tasks.pretraining",
        "inference.generate",
        "families",
        "nn.flops",
        "devices.chips",
        "run.measure",
        "run.fit",
        "planning.plan",
    ]
    code = "import jaxlm; " + "; ".join(f"import jaxlm.{name}" for name in names)
    environment = environment_without(MISSING + WITH_TRANSFORMERS)
    environment["PYTHONPATH"] += os.pathsep + str(ROOT)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert not result.returncode, result.stderr
    result = subprocess.run([sys.executable, "-c", "import tyro"], env=environment, capture_output=True, text=True)
    assert "No module named 'tyro'" in result.stderr  # the packages are really missing


@pytest.mark.long
@pytest.mark.parity
def test_the_whole_benchmark_runs_at_a_tiny_size(environment_without, tmp_path):
    out = tmp_path / "out.json"
    result = run(environment_without(MISSING), "--tiny", "--out", str(out), "--minutes", "20", seconds=1300)
    assert not result.returncode, result.stderr
    results = json.loads(out.read_text())
    assert not results["ended"], result.stdout
    for name in ("gpt2", "bert", "llama"):
        found = results["summary"][name]
        assert found["ratio"] == found["jaxlm"]["tokens_per_second"] / found["torch"]["tokens_per_second"]
        assert found["jaxlm"]["parameters"] == found["torch"]["parameters"]
        # The loss of random tokens and weights is the logarithm of the vocabulary. Then the batch is memorised.
        assert all(2 < found[implementation]["loss"] < math.log(256) + 0.2 for implementation in ("jaxlm", "torch"))
        assert len(results["parts"][name]) == 2 and {"jaxlm", "torch"} <= found.keys()
    assert [row["prompts"] for row in results["summary"]["decode"]] == [1, 16]
    assert all(row["times_bound"] > 0 for row in results["summary"]["decode"])
    rows = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 6 + 2 + 2
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {10, 6}


@pytest.mark.long
def test_a_profile_needs_a_device_that_reports_its_kernels(environment_without, tmp_path):
    out = tmp_path / "out.json"
    result = run(environment_without(MISSING), "--tiny", "--profile", "--only", "gpt2", "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert "no device trace can be made here" in result.stdout
    assert json.loads(out.read_text())["parts"]["gpt2"][-1]["kernels"] == []


def test_a_part_without_time_left_is_stopped_and_reported(environment_without, tmp_path):
    out = tmp_path / "out.json"
    result = run(environment_without(MISSING), "--tiny", "--only", "gpt2", "--out", str(out), "--minutes", "0.02")
    assert result.returncode == 1  # there are no results
    ended = json.loads(out.read_text())["ended"]
    assert ended["gpt2"].startswith("cut off after")
    assert f"gpt2: {ended['gpt2']}" in result.stdout.splitlines()[-4:]


def test_a_machine_without_an_accelerator_raises_an_error(environment_without):
    result = run(environment_without([*MISSING, "torch"]), "--only", "gpt2")
    assert result.returncode == 2 and "there is no accelerator here; --tiny" in result.stderr


def test_an_unknown_part_raises_an_error(environment_without):
    result = run(environment_without(MISSING), "--only", "gpt3")
    assert result.returncode == 2 and "give some of gpt2,bert,llama,decode" in result.stderr


def test_the_summary_contains_ratios_utilisation_and_bounds(benchmark):
    jaxlm_rows = [
        {"batch": 8, "length": 4, "remat": "none", "attention": "auto", "unroll": 1, **more}
        for more in (
            {"tokens_per_second": 50.0, "flops_per_token": 6.0},
            {"tokens_per_second": 80.0, "flops_per_token": 6.0, "step_ms_p50": 1.0, "step_ms_p99": 2.0},
            {"refused": "out of memory"},
        )
    ]
    results = {
        "date": "today",
        "versions": {"jax": "0.11"},
        "driver": "570",
        "ended": {"llama": "cut off after 9 s"},
        "parts": {
            "device": [
                {"kind": "a chip", "platform": "gpu", "peak_flops": 1200.0, "peak_bandwidth": 400.0},
                {"products": 600.0, "size": 1},
                {"products": 960.0, "size": 2},
                {"copies": 200.0, "size": 3},
            ],
            "gpt2": jaxlm_rows,
            "gpt2 torch": [{"batch": 4, "length": 4, "attention": "sdpa", "tokens_per_second": 64.0}],
            "bert": [{"kernels": [["fusion", 0.625], ["gemm", 0.375]], "of": "8 x 4"}],
            "decode": [{"prompts": 1, "tokens_per_second": 1.0, "step_seconds": 1.0, "step_bytes": 50.0}],
        },
    }
    found = benchmark.summarize(results)
    assert found["gpt2"]["ratio"] == 1.25
    assert found["gpt2"]["jaxlm"]["mfu"] == 0.4 and found["gpt2"]["jaxlm"]["of_products"] == 0.5
    assert found["gpt2"]["torch"]["mfu"] == 0.32
    assert found["decode"][0]["bound_seconds"] == 0.25 and found["decode"][0]["times_bound"] == 4
    text = benchmark.page(results)
    assert "| gpt2 | jaxlm | 8 x 4, remat none, attention auto, unroll 1 | 80 | 1.0 to 2.0 ms | 40.0% | 50.0% |" in text
    assert "bert, 8 x 4: the kernels" in text and "| fusion | 62.5% |" in text
    assert "one a chip, driver 570; jax 0.11" in text and "80% of the known peak" in text
    assert text.endswith("llama: cut off after 9 s")
