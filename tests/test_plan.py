"""Plans: any config without its data, the reported memory and FLOPs, and the verb."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

from jaxlm import UserError
from jaxlm.__main__ import main
from jaxlm.config import CausalLM, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from jaxlm.devices import chips, sharding
from jaxlm.nn import parameters
from jaxlm.planning import plan
from jaxlm.run.assembly import assemble
from jaxlm.run.config_only import batch_shapes, resolve_config

ROOT = Path(__file__).parent.parent
VECTORS = {"word2vec", "glove"}  # these train no model
CONFIGS = sorted({path.stem for path in (ROOT / "configs").glob("*.py")} - VECTORS)
STARTS = {
    "chat_sft": "gpt2",
    "finetune_t5": "t5-small",
    "preferences": "gpt2",
    "reward": "gpt2",
    "summarize_scitldr": "bart-base",
}  # other configs start from an encoder
QUICK = {"t5_pretrain", "distill_sst2", "translate_multi30k", "multi_task", "shakespeare_char", "trec"}
needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, of the [plan] extra, is not installed")


def config_of(name: str) -> RunConfig:
    words = {"glue": ["sst2"], "distill_sst2": ["bert-tiny"]}.get(name, [])
    run = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["config"](*words)
    return run if run.model else replace(run, init=STARTS.get(name, "bert-tiny"))


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in CONFIGS])
def test_every_config_has_a_plan_without_its_data(name):
    """The counted FLOPs of its step equal those of the formula, except in poolings and optimizers."""
    run = replace(config_of(name), batch=8, accumulate=1, mesh=MeshConfig())
    resolved = resolve_config(run, sharding.make_mesh(run.mesh, jax.devices()[:8]))
    found = plan._model_flops(resolved, batch_shapes(resolved))
    counted, formula, by_convention = found["counted_flops"], found["formula_flops"], found["model_flops"]
    is_muon = run.optimizer.name == "muon"  # its matrix products orthogonalise the updates
    has_experts = run.model is not None and run.model.experts  # the count includes rows without tokens
    assert formula <= counted < formula * (1.5 if is_muon or has_experts else 1.05)
    assert by_convention >= formula
    if not is_muon and not has_experts and type(run.task).__name__ in ("CausalLM", "SpanCorruption", "Seq2Seq", "Chat"):
        assert counted == formula


TINY = RunConfig(
    model=ModelConfig(vocabulary=64, max_length=32, width=32, layers=2, heads=4),
    task=CausalLM(),
    data=DataConfig(length=32),
    optimizer=OptimizerConfig(schedule="constant"),
    batch=16,
)


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        pytest.param(MeshConfig(8), 1, marks=pytest.mark.long),
        (MeshConfig(1, 4, 2), 8),
        pytest.param(MeshConfig(2, 2, 1, 2), 2, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_memory_is_that_of_the_shards(mesh, parts):
    result = plan.plan(replace(TINY, mesh=mesh), name="tiny")
    assert result.devices == 8 and result.fits and result.roofline is None
    assert result.optimizer_bytes >= 2 * result.parameter_bytes
    leaves = parameters.by_path(assemble(resolve_config(TINY, one_device())).like.params)
    whole = sum(4 * leaf.size for leaf in leaves.values())
    vectors = sum(4 * leaf.size for path, leaf in leaves.items() if "norm" in path or "bias" in path)
    assert whole / parts <= result.parameter_bytes <= whole / parts + vectors
    state = result.parameter_bytes + result.optimizer_bytes
    assert state < result.arguments_bytes < state + 50_000
    assert result.temporary_bytes > 0 and result.hbm_bytes > state
    assert result.collectives and result.purposes
    assert result.counted_flops == result.formula_flops == result.flops
    output = json.loads(json.dumps(plan.as_json(result)))
    facts, memory, *_ = plan.as_pictures(output)
    assert dict(facts.rows)["parameters"] == f"{result.parameters:,}"
    parts = dict(zip(memory.names, memory.values))
    assert parts["parameters"] * 2**20 == result.parameter_bytes and memory.unit == "MiB"
    page = plan.as_text(result)
    assert "the rates of cpu are unknown" in page and f"{result.parameters:,} parameters" in page


def one_device() -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshConfig(1), jax.devices()[:1])


@pytest.mark.long
def test_recomputation_adds_to_flops_but_not_to_model_flops():
    plans = {remat: plan.plan(replace(TINY, remat=remat)) for remat in ("none", "full")}
    assert plans["full"].flops > plans["none"].flops
    assert plans["full"].model_flops == plans["none"].model_flops
    assert plans["full"].counted_flops == plans["none"].flops


def test_a_plan_without_a_topology_is_for_the_local_devices(monkeypatch):
    """If the rates of the chip are known, the roofline equals its manual computation."""
    chip = chips.TPUS["v5e"]._replace(dimensions=0)
    monkeypatch.setattr(chips, "find", lambda kind: chip)
    result = plan.plan(TINY)
    assert result.roofline is not None
    assert result.roofline.compute == pytest.approx(result.flops / 8 / 197e12)
    assert result.roofline.memory == pytest.approx(result.hbm_bytes / 819e9)
    assert result.roofline.network == pytest.approx(sum(one.sent_bytes for one in result.collectives.values()) / 45e9)
    assert result.roofline.overlapped == max(result.roofline) and result.roofline.sequential == pytest.approx(
        sum(result.roofline)
    )
    seconds = result.roofline.sequential
    assert result.utilisation(seconds, 197e12) == pytest.approx(result.model_flops / 8 / 197e12 / seconds)
    page = plan.as_text(result)
    assert "MFU" in page and "Google Cloud TPU documentation" in page


@pytest.mark.long
def test_a_plan_that_does_not_fit_has_a_remedy(monkeypatch):
    small = chips.TPUS["v5e"]._replace(usable=chips.Constant(100_000, "bytes", "this test"), dimensions=0)
    monkeypatch.setattr(chips, "find", lambda kind: small)
    result = plan.plan(TINY)
    assert not result.fits
    page = plan.as_text(result)
    assert "does not fit, by" in page and "--remat full" in page
    assert plan.fitting(TINY, "") == []


@pytest.mark.long
def test_the_largest_batch_that_fits_is_found(monkeypatch):
    messages = []
    limit = plan.plan(replace(TINY, batch=64, remat="full")).used_bytes
    chip = chips.TPUS["v5e"]._replace(usable=chips.Constant(limit, "bytes", "this test"), dimensions=0)
    monkeypatch.setattr(chips, "find", lambda kind: chip)
    found = plan.fitting(TINY, "", "tiny", messages.append)
    assert found and all(one.fits for one in found)
    assert max(one.batch for one in found if one.remat == "full") >= 64
    assert any("does not fit" in line for line in messages)


REFUSAL = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used \
929.12G of 95.74G hbm. Exceeded hbm capacity by 833.38G.

  Largest program allocations in hbm:

  1. Size: 3.50G
     Operator: op_name="jit(train_step)/transpose(jvp(Transformer))/decoder/while/body/Block/mlp/up/dot_general"
     Shape: bf16[24,2048,49152]{2,1,0:T(8,128)(2,1)}
     Unpadded size: 3.50G
     ==========================
"""


def test_a_refusal_of_the_compiler_is_summarised():
    refused, largest = plan._refusal(REFUSAL)
    assert refused == "it needs 929.12G of 95.74G"
    assert largest == ("3.50G bf16[24,2048,49152] gradients of decoder/layers mlp/up",)


def run_verb(*words: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "jaxlm", "plan", *words]
    environment = os.environ | {"XLA_FLAGS": ""} | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_missing_compiler_names_the_extra(monkeypatch):
    monkeypatch.setattr(chips, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UserError, match=r"pip install 'jaxlm\[plan\]'"):
        plan.plan(TINY, "v5e:2x2")


@pytest.mark.long
@needs_libtpu
def test_the_verb_plans_for_a_tpu():
    small = ("--model.width", "128", "--model.layers", "2", "--batch", "8", "--data.length", "64")
    process = run_verb(
        "configs/shakespeare_char.py", "--topology", "v5e:2x2", *small, "--json", "--compute-dtype", "bfloat16"
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["kind"] == "TPU v5 lite" and result["devices"] == 4 and result["fits"]
    assert result["roofline"]["overlapped"]["mfu"] >= result["roofline"]["sequential"]["mfu"] > 0
    assert result["collectives"]["all-reduce"]["times"] > 0
    assert process.stderr == ""


@pytest.mark.long
@needs_libtpu
def test_the_verb_reports_what_does_not_fit():
    process = run_verb("configs/gpt2_124m.py", "--topology", "v5e:1x1", "--remat", "none", "--batch", "256")
    assert process.returncode == 1, process.stderr
    for part in ("does not fit: it needs", "over all devices, bfloat16[12,256,1024,3072]", "remedy: --remat full"):
        assert part in process.stdout


def gpu_environment() -> dict[str, str]:
    """Returns the environment with JAX's plugin for CUDA, from the folder in JAXLM_GPU_COMPILER or installed."""
    folder = os.environ.get("JAXLM_GPU_COMPILER", "")
    if not folder and not find_spec("jax_cuda12_plugin") and not find_spec("jax_cuda13_plugin"):
        pytest.skip("JAX's plugin for CUDA, of the [plan-gpu] extra, is not installed")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH", "")]))}


@pytest.mark.long
@pytest.mark.parametrize("kernel", ["auto", "triton"])
@pytest.mark.parametrize("chip", ["H100:2", "A100-80:1", "B200:1", "L4:1"])
def test_the_verb_plans_for_a_gpu(chip, kernel):
    """The plan needs neither a GPU nor cuDNN; attention is that of a fused kernel."""
    small = ("--model.width", "128", "--model.layers", "2", "--model.heads", "2", "--batch", "8")
    options = ("--topology", chip, *small, "--json", "--compute-dtype", "bfloat16", "--attention", kernel)
    options += ("--data.length", "128", "--model.max-length", "128")
    process = run_verb("configs/shakespeare_char.py", *options, **gpu_environment())
    assert process.returncode == 0, process.stderr
    assert "attention uses XLA" not in process.stderr
    result = json.loads(process.stdout)
    assert result["kind"].startswith("NVIDIA") and result["devices"] == int(chip[-1]) and result["fits"]
    assert result["roofline"]["sequential"]["mfu"] > 0
    assert 0 < result["flops"] < 1.5 * result["counted_flops"]
    assert sum(result["traffic"].values()) == result["hbm_bytes"] > 0
    assert (result["collectives"].get("all-reduce", {"times": 0})["times"] > 0) == (chip == "H100:2")


def run_with_gpu_compiler(program: str) -> str:
    """Returns the output of a Python program that can compile for GPUs."""
    environment = os.environ | {"XLA_FLAGS": ""} | gpu_environment()
    command = [sys.executable, "-c", program]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


TRAFFIC = """
import math, runpy
from dataclasses import replace
import jax
from jaxlm.devices import chips
from jaxlm.planning import hlo, plan

for name, value in chips.PLANNING_SETTINGS.items():
    jax.config.update(name, value)
run = runpy.run_path("configs/gpt2_124m.py")["config"]()
run = replace(run, batch=8, remat="auto", model=replace(run.model, layers=4))
texts, compiled = [], plan._compiled
def keep(lowered, for_tpu):
    program, text = compiled(lowered, for_tpu)
    texts.append(text)
    return program, text
plan._compiled = keep
plan.plan(run, "H100:1")
program = hlo.parse(texts[0])
shapes = {move.name: computation[move.name].shape for move in hlo.moves(program)
          for computation in program.computations.values() if move.name in computation}
float32 = [shape for shape in shapes.values() if shape.startswith("f32[")]
entries = [math.prod(map(int, shape[4:shape.index("]")].split(",") if shape[4] != "]" else ())) for shape in float32]
tokens, hidden, head = 8 * 1024, 4 * 768, 50304 * 768
parts = next(loop.trips for loop in program.loops if loop.trips)
print(parts, tokens * hidden in entries, tokens * 768 in entries)
# Logits are written once and read twice, and their gradient is written and read twice, in half of the bytes.
logits = 4 * tokens * 50304
loss = sum(size for what, size in hlo.traffic(program).items() if "loss" in what or "lm_head" in what)
print(loss / logits)
"""


@pytest.mark.long
def test_a_step_on_a_gpu_stores_no_large_float32_array_and_reads_the_logits_twice():
    first, second = run_with_gpu_compiler(TRAFFIC).splitlines()
    assert first == "2 False False"  # parts of the loss, float32 arrays [B, T, F] and [B, T, D]
    assert 4 < float(second) < 6.5


DECODING = """
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.sharding import SingleDeviceSharding
from jaxlm.config import ModelConfig
from jaxlm.devices import chips
from jaxlm.inference import decode, generate
from jaxlm.nn.transformer import Transformer, init, unstack_layers
from jaxlm.planning import hlo

for name, value in chips.PLANNING_SETTINGS.items():
    jax.config.update(name, value)
place = SingleDeviceSharding(chips.topology_devices("H100:1")[0])
model = ModelConfig(vocabulary=32000, width=1024, layers=3, heads=16, kv_heads=4, mlp_width=4096, feed_forward="gated",
                    norm="rmsnorm", positions="rotary", biases=(), activation="silu", max_length=512)
module = Transformer(model, dtype=jnp.bfloat16)
put = lambda leaf, dtype=None: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=place)
shapes = jax.eval_shape(lambda key: unstack_layers(model, init(module, key)), jax.random.key(0))
params = jax.tree.map(lambda leaf: put(leaf, jnp.bfloat16), shapes)
B = generate.MIN_DECODED_ROWS["cuda"]
row = lambda *shape: jax.ShapeDtypeStruct((B, *shape), jnp.int32, sharding=place)
prompts = decode.Prompts(row(32), row(), row(), np.uint32(0), row(2))
state = jax.tree.map(put, jax.eval_shape(partial(decode.prefill, module, length=512), params, prompts))
rules = decode.Rules(np.int32(32000), np.array([2], np.int32))
program = hlo.parse(decode.programs(module).advance.lower(params, state, rules, np.int32(9)).compile().as_text())
body = max((program.computations[loop.body] for loop in program.loops), key=len)
cache = 2 * state.caches.own[0].k_BKSC.size
copies = [one for one in body.values() if one.opcode in ("copy", "transpose") and one.buffers[0].bytes >= cache]
kernels = sum(one.opcode in ("fusion", "copy", "custom-call") for one in body.values())
read = sum(move.read for move in hlo.moves(program) if move.name in body)
weights = sum(leaf.size * 2 for leaf in jax.tree.leaves(params))
print(len(copies), kernels, read / weights)
"""


@pytest.mark.long
def test_a_decoding_step_on_a_gpu_copies_no_cache_and_reads_each_weight_once():
    copies, kernels, read = run_with_gpu_compiler(DECODING).split()
    assert copies == "0" and int(kernels) < 3 * 18 + 30  # 16 of each layer
    assert float(read) < 1.2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "plan requires a config: jaxlm plan CONFIG"),
        (("configs/quickstart.py", "--topology", "v5x:2x2"), "unknown chip"),
        (("configs/quickstart.py", "--topology", "v5e:3x3"), "a shape that does not exist; choose from v5e: 1x1 2x2"),
        (("configs/quickstart.py", "--topology"), "does not have the form CHIP:SHAPE"),
        (("configs/gpt2_124m.py", "--mesh.data", "3"), "do not multiply to the 8 devices"),
        (("configs/trec.py",), "--init"),
    ],
    ids=str,
)
def test_mistakes_are_reported(words, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error, error


SLICES = """
import jax
from jax.experimental import topologies
from jaxlm.devices import chips, sharding
from jaxlm.config import MeshConfig
from jaxlm.errors import UserError

for name, value in chips.PLANNING_SETTINGS.items():
    jax.config.update(name, value)
with chips._loading():
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
for sizes in (MeshConfig(2, 2, 2), MeshConfig(1, 4, 2)):
    mesh = sharding.make_mesh(sizes, devices)
    rows = mesh.devices.reshape(2, -1)
    assert [{device.slice_index for device in row} for row in rows] == [{0}, {1}], rows
try:
    sharding.make_mesh(MeshConfig(1, 1, 8), devices)
except UserError as error:
    print(error)
"""


@pytest.mark.long
@needs_libtpu
def test_the_batch_is_split_across_the_slices():
    """The largest exchanges stay on the fast network within a slice."""
    process = subprocess.run(
        [sys.executable, "-c", SLICES], cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert "is not a multiple of the 2 slices that it is split across" in process.stdout
