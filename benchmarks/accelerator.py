"""Measures training and decoding on one GPU or TPU, and compares with torch + transformers on the same GPU.

    python benchmarks/accelerator.py [--out FILE] [--minutes M] [--only gpt2,bert,llama,decode] [--profile] [--tiny]

Requires only jax, flax, optax and orbax.  If torch with CUDA and transformers are installed, they are measured too.

1. The rates of the device: matrix products in bfloat16 (the best of several sizes) and copies.
2. Training of GPT-2 124M (rows of 1,024 tokens), BERT-large (512, masked language modelling) and Llama-3.2-1B (2,048),
on random tokens in bfloat16 without dropout.  jaxlm uses the step of `assembly.assemble`, as `fit` does, with a short
search over rows, remat, attention and unroll, and a few dozen steps for each setting.  Settings that need too much
memory are skipped.  The torch implementation is the same model of transformers with torch.compile, float32 weights
under autocast, SDPA (or FlashAttention 2, if it is installed), fused AdamW and the same clipping, with a search over
rows.
3. Decoding: Llama-3.2-1B in bfloat16 continues 1 and 16 prompts of 32 tokens; the time includes reading the prompts.
The memory bound is the time to read the bytes that each new token requires, at the rate of the copies.

MFU follows the convention of PaLM (`flops.closed`) with the same count for both implementations.  In BERT's head it
counts only the masked positions, as jaxlm computes them; transformers computes the logits of all positions.

Every part runs in a separate process with exclusive use of the device, for its share of the --minutes; later parts get
the remaining time.  A part that exceeds its time keeps its results so far.  --out is rewritten after each result.
--profile traces three steps of the best setting of each implementation, and lists the 20 kernels with the largest share
of the device's time.  --tiny makes everything very small to test the script on any machine; its numbers are
meaningless.  The script prints a line for each result, and at the end, or when it is stopped:

    DATE, one DEVICE, driver D; jax A, jaxlib B, flax C, torch D, transformers E
    products in bfloat16 X TFLOP/s (N x N), P % of the known peak; copies Y GB/s, P % of the known bandwidth

    | model | side | rows x length, settings | tokens/s | step, p50 to p99 | MFU | of products | memory | ratio |
    | --- | --- | --- | --- | --- | --- | --- | --- | --- |
    | gpt2 | jaxlm | 32 x 1024, remat none, attention auto, unroll 12 | ... | ... ms | ... % | ... % | ... GiB | ... |
    | gpt2 | torch | 32 x 1024, sdpa | ... | ... ms | ... % | ... % | ... GiB | |

    | prompts | new tokens/s | a token's step | bound by memory | times the bound |
    | --- | --- | --- | --- | --- |
    | 1 | ... | ... ms | ... ms (... MB) | ... |
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import queue
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
STEPS, WARM_UP = 24, 3  # timed steps of a setting, and warmup steps
TRACED, PROFILED = 3, 0.75  # steps in a profile, and the share of a part's time before it
MAX_SECONDS = 6.0  # maximum seconds of the timed steps; slow settings run fewer steps
PROMPTS, PROMPT, NEW = (1, 16), 32, 128
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers")
GIB = 2**30


class Case(NamedTuple):
    """A model to train; rows: a number that fits in 80 GB without remat and keeps the device busy."""

    preset: str
    kind: str  # model_type of transformers
    length: int
    rows: int
    fields: dict[str, Any]


CASES = {
    "gpt2": Case("gpt2", "gpt2", 1024, 32, {"vocabulary": 50304}),
    "bert": Case("bert-large", "bert", 512, 32, {"vocabulary": 30592, "heads_on_top": ("masked_lm",)}),
    "llama": Case("llama-3.2-1b", "llama", 2048, 4, {}),
}
TINY = {"vocabulary": 256, "width": 64, "layers": 2, "heads": 4, "mlp_width": 128}
# Seconds of each part, out of 500.
SHARES = {"device": 30, "gpt2": 70, "gpt2 torch": 70, "bert": 70, "bert torch": 70, "llama": 70, "llama torch": 70}
SHARES |= {"decode": 50}


# ---- the parts, each in a separate process


def case_of(name: str, tiny: bool) -> tuple[Case, Any]:
    """Returns the case and its ModelConfig; `tiny` makes them small."""
    from jaxlm.families import PRESETS

    case = CASES[name]
    config = replace(PRESETS[case.preset], dropout=0.0, attention_dropout=0.0, **case.fields)
    if tiny:
        case = case._replace(length=32, rows=2)
        grouped = {"kv_heads": 2} if config.kv_heads else {}
        config = replace(config, **TINY, **grouped, head_width=None, max_length=64)
    return case, config


def random_batch(case: Case, config: Any, rows: int) -> dict[str, Any]:
    """Returns rows of random tokens without padding, [rows, length] in each field."""
    import numpy as np

    random = np.random.default_rng(0)
    tokens = random.integers(0, config.vocabulary, (rows, case.length), dtype=np.int32)
    masked = config.structure == "encoder"
    weights = random.random(tokens.shape) < 0.15 if masked else np.ones(tokens.shape)
    batch = {
        "tokens_BT": tokens,
        "labels_BT": tokens if masked else np.roll(tokens, -1, axis=1),
        "weights_BT": weights.astype(np.float32),
        "segments_BT": np.ones_like(tokens),
        "positions_BT": np.broadcast_to(np.arange(case.length, dtype=np.int32), tokens.shape),
    }
    return batch | ({"types_BT": np.zeros_like(tokens)} if config.types else {})


def device_side(report: Callable[..., None], tiny: bool, seconds: float) -> None:
    """Reports the device and its rates."""
    import jax
    import jax.numpy as jnp

    from jaxlm.devices import chips

    device = jax.devices()[0]
    chip = chips.find(device.device_kind)
    facts: dict[str, Any] = {"kind": device.device_kind, "platform": device.platform, "here": len(jax.devices())}
    if chip is not None:
        facts |= {"peak_flops": chip.flops.value, "peak_bandwidth": chip.bandwidth.value}
    report(**facts)
    if device.platform == "cpu" and not tiny:
        return

    def rate(step: Callable[[Any], Any], x: Any, work: float) -> float:
        """Returns the work per second of repeated x -> step(x), as the best of three rounds."""
        x = jax.block_until_ready(step(step(x)))
        start = time.perf_counter()
        x = jax.block_until_ready(step(x))
        times = max(2, min(100, int(0.3 / (time.perf_counter() - start))))
        best = 0.0
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(times):
                x = step(x)
            jax.block_until_ready(x)
            best = max(best, times * work / (time.perf_counter() - start))
        return best

    product = jax.jit(jnp.matmul)
    for n in (128, 256) if tiny else (8192, 4096, 12288, 16384):
        # With this scale, repeated products neither grow nor vanish.
        draw = jax.jit(lambda key, n=n: (jax.random.normal(key, (2, n, n)) / math.sqrt(n)).astype(jnp.bfloat16))
        a, b = draw(jax.random.key(0))
        report(products=rate(lambda x, a=a: product(a, x), b, 2.0 * n**3), size=n)
    more = jax.jit(lambda x: x + 1, donate_argnums=0)  # reads and writes the whole array, as a copy does
    for n in (1 << 20,) if tiny else (1 << 28, 1 << 30):
        report(copies=rate(more, jnp.zeros(n // 4, jnp.float32), 2.0 * n), size=n)


def train_side(name: str, report: Callable[..., None], tiny: bool, seconds: float, profile: bool) -> None:
    """Trains with jaxlm and searches for faster settings until the time is over; then profiles the best one."""
    import jax
    import numpy as np

    from jaxlm import CausalLM, DataConfig, MaskedLM, MeshConfig, OptimizerConfig, RunConfig
    from jaxlm.devices import sharding
    from jaxlm.nn.transformer import Transformer
    from jaxlm.run.assembly import assemble, closed_flops, shard_batch
    from jaxlm.run.measure import Meter
    from jaxlm.run.resolve import ResolvedModel
    from jaxlm.tasks import make_task

    end = time.monotonic() + seconds * (PROFILED if profile else 1)
    case, config = case_of(name, tiny)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    run = RunConfig(
        model=config,
        task=MaskedLM() if config.structure == "encoder" else CausalLM(),
        data=DataConfig(length=case.length),
        optimizer=OptimizerConfig(rate=1e-4, schedule="constant", warmup=0),
        mesh=MeshConfig(),
        compute_dtype="bfloat16",
    )
    special: Any = type("Special", (), {"cls": 1, "sep": 2, "mask": 3, "bos": 4, "eos": 5})
    task = make_task(run, special)
    state: Any = None

    def attempt(setting: dict[str, Any], traced: str | None = None) -> dict[str, Any]:
        """Measures a setting, or writes a trace of it; `refused` is the reason if it does not run."""
        nonlocal state
        start = time.monotonic()
        given = random_batch(case, config, setting["batch"])
        assembly = assemble(ResolvedModel(replace(run, **setting), mesh, task, config, Transformer))
        batch = shard_batch(mesh, given, 1)
        compiled = assembly.train_step.trace(assembly.like, batch).lower().compile()
        memory = compiled.memory_analysis()
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
        compiling = time.monotonic() - start
        if needed > limit:
            return {"refused": f"it needs {needed / GIB:.1f} GiB", "compile_seconds": compiling}
        if state is None:
            state = assembly.first_state(jax.random.key_data(jax.random.key(0)))
        for _ in range(WARM_UP):
            warm = time.monotonic()
            state, metrics = compiled(state, None, batch)  # no frozen parameters
            jax.block_until_ready(metrics)
        if traced is not None:
            with jax.profiler.trace(traced):
                for _ in range(TRACED):
                    state, metrics = compiled(state, None, batch)
                jax.block_until_ready(metrics)
            return {}
        steps = max(4, min(STEPS, int((0.5 if tiny else MAX_SECONDS) / (time.monotonic() - warm))))
        meter = Meter(mesh)
        started = time.monotonic()
        for same in meter.fed(iter([batch] * steps)):
            state, metrics = compiled(state, None, same)
            meter.record_step(metrics["loss"])
        loss = float(metrics["loss"])
        step_seconds = (time.monotonic() - started) / steps
        _, line = meter.line(steps)
        meter.close()
        assert np.isfinite(loss), f"the loss is {loss}"
        tokens = setting["batch"] * case.length
        return {
            "tokens_per_second": tokens / step_seconds,
            "flops_per_token": closed_flops(task, config, setting["batch"], given) / tokens,
            **{field: value for field, value in line.items() if field.startswith("step_ms")},
            "memory_bytes": needed,  # from the compiler, because the device's peak includes earlier settings
            "loss": loss,
            "compile_seconds": compiling,
        }

    longest = 0.0

    def measure(setting: dict[str, Any]) -> dict[str, Any] | None:
        """Measures and reports a setting; returns None if it does not run or the time is over."""
        nonlocal state, longest
        start = time.monotonic()
        if start + longest > end:
            return None
        costs: dict[str, Any] = {}
        try:
            costs = attempt(setting)
        except Exception as error:
            costs = {"refused": reason(error)}
            state = None  # the failed step may have donated it
        gc.collect()
        longest = max(longest, time.monotonic() - start)
        result = {"length": case.length, "parameters": _entries(state), **setting, **costs}
        report(**result)
        return None if "refused" in costs else costs

    # First what `fit` would choose.
    best: dict[str, Any] = {"batch": case.rows, "remat": "auto", "attention": "auto", "unroll": 0}
    cost = None
    for smaller in ({}, {"remat": "dots"}, {"remat": "full"}, {"batch": max(1, case.rows // 4)}, {"batch": 1}):
        best |= smaller
        if cost := measure(best):
            break
    # Then try one change after another, the most promising first, and keep the better setting.
    moves: list[Callable[[], dict[str, Any]]] = [
        # For packed rows, the kernel that reads segments instead of a mask.
        *(
            [lambda: {"attention": "triton"}]
            if config.structure == "encoder" and jax.default_backend() == "gpu"
            else []
        ),
        lambda: {"batch": 2 * best["batch"]},
        lambda: {"batch": 2 * best["batch"]},
        lambda: {"remat": "dots", "batch": 2 * best["batch"]},
        lambda: {"attention": "xla"},  # auto selects cuDNN or splash if they support the model
        lambda: {"batch": max(1, best["batch"] // 2)},
        lambda: {"remat": "full", "batch": 4 * best["batch"]},
    ]
    tested = [dict(best)]
    for move in moves[:1] if tiny else moves:
        setting = best | move()
        if cost is None or setting in tested:
            continue
        tested.append(setting)
        new = measure(setting)
        if new and new["tokens_per_second"] > cost["tokens_per_second"]:
            best, cost = setting, new
    if profile and cost:
        with tempfile.TemporaryDirectory() as folder:
            try:
                attempt(best, folder)
                report(kernels=traced_kernels(Path(folder)), of=setting_of(case._asdict() | best))
            except Exception as error:
                report(kernels=[], of=reason(error))


def traced_kernels(folder: Path) -> list[tuple[str, float]]:
    """Returns the kernels in a trace of JAX and the share of each in the time of all, the largest first.

    The trace of a CPU has none: only GPUs and TPUs report what they run.
    """
    import jax

    times: dict[str, float] = {}
    for file in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if plane.name.startswith("/device:"):
                for line in plane.lines:
                    if line.name.startswith("Stream") or line.name == "XLA Ops":
                        for event in line.events:
                            times[event.name] = times.get(event.name, 0.0) + event.duration_ns
    return largest_shares(times)


def largest_shares(times: dict[str, float]) -> list[tuple[str, float]]:
    """Returns the 20 largest entries, as shares of the sum of all."""
    total = sum(times.values())
    ordered = sorted(times.items(), key=lambda item: -item[1])[:20]
    return [(name, value / total) for name, value in ordered]


def _entries(state: Any) -> int | None:
    import jax

    return None if state is None else sum(leaf.size for leaf in jax.tree.leaves(state.model))


def torch_side(name: str, report: Callable[..., None], tiny: bool, seconds: float, profile: bool) -> None:
    """Trains the same model with torch and transformers; then profiles the best setting."""
    import torch
    import transformers

    from jaxlm.families import FAMILIES

    on = "cuda" if torch.cuda.is_available() else "cpu"
    if on == "cpu" and not tiny:
        return report(refused="torch sees no CUDA device")
    end = time.monotonic() + seconds * (PROFILED if profile else 1)
    case, ours = case_of(name, tiny)
    masked = ours.structure == "encoder"
    transformers.logging.set_verbosity_error()
    torch.set_float32_matmul_precision("high")
    if tiny:
        torch.set_num_threads(1)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # valid in any vocabulary
    fields = {**FAMILIES[case.kind].config_to_hf(ours), **special}
    kind = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM

    def attempt(rows: int, attention: str, traced: bool = False) -> dict[str, Any]:
        torch._dynamo.reset()
        gc.collect()
        if on == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        config = transformers.AutoConfig.for_model(case.kind, **fields)
        with torch.device(on):
            plain = kind.from_config(config, attn_implementation=attention).train()
        model = torch.compile(plain, dynamic=False) if on == "cuda" else plain
        optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4, weight_decay=0.1, fused=on == "cuda")
        batch = random_batch(case, ours, rows)
        tokens = torch.tensor(batch["tokens_BT"], dtype=torch.long, device=on)
        labels = tokens.clone()  # transformers shifts the labels of causal models itself
        if masked:
            labels[torch.tensor(batch["weights_BT"], device=on) == 0] = -100

        def step() -> Any:
            with torch.autocast(on, dtype=torch.bfloat16):
                loss = model(input_ids=tokens, labels=labels, **({} if masked else {"use_cache": False})).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        start = time.monotonic()
        step().item()
        compiling = time.monotonic() - start
        for _ in range(WARM_UP):
            start = time.monotonic()
            step().item()
        if traced:
            with torch.profiler.profile() as found:
                for _ in range(TRACED):
                    step().item()
            kernels = (event for event in found.key_averages() if "CUDA" in str(event.device_type))
            times = {event.key: float(event.self_device_time_total) for event in kernels}
            return {"kernels": largest_shares(times), "of": f"{rows} x {case.length}, {attention}"}
        steps = max(4, min(STEPS, int((0.5 if tiny else MAX_SECONDS) / (time.monotonic() - start))))
        # The device records the end of each step, so that no step waits for the host.
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)] if on == "cuda" else []
        start = time.monotonic()
        for n in range(steps):
            if events:
                events[n].record()
            loss = step()
        if events:
            events[steps].record()
        value = loss.item()
        if on == "cuda":
            torch.cuda.synchronize()
        step_seconds = (time.monotonic() - start) / steps
        assert math.isfinite(value), f"the loss is {value}"
        costs = {
            "tokens_per_second": rows * case.length / step_seconds,
            "parameters": sum(p.numel() for p in plain.parameters()),
            "loss": value,
            "compile_seconds": compiling,
        }
        if events:
            from jaxlm.run.measure import percentiles

            costs |= percentiles([a.elapsed_time(b) / 1000 for a, b in zip(events, events[1:])])
            costs["memory_bytes"] = torch.cuda.max_memory_allocated()
        return costs

    longest, best = 0.0, 0.0
    fastest: tuple[int, str] | None = None

    def measure(rows: int, attention: str) -> float:
        """Measures and reports a setting; returns its tokens per second, or 0 if it does not run."""
        nonlocal longest, best, fastest
        start = time.monotonic()
        if start + longest > end:
            return 0.0
        try:
            costs = attempt(rows, attention)
        except Exception as error:
            costs = {"refused": reason(error)}
        gc.collect()
        longest = max(longest, time.monotonic() - start)
        report(batch=rows, length=case.length, attention=attention, **costs)
        speed = costs.get("tokens_per_second", 0.0)
        if speed > best:
            best, fastest = speed, (rows, attention)
        return speed

    rows = case.rows
    while rows > 1 and not measure(rows, "sdpa") and time.monotonic() + longest < end:
        rows //= 2
    if not tiny:
        if find_spec("flash_attn"):
            measure(rows, "flash_attention_2")
        larger = rows
        while (before := best) and measure(larger := 2 * larger, "sdpa") > before:
            pass
        if larger == 2 * rows and rows > 1:
            measure(rows // 2, "sdpa")
    if profile and fastest:
        try:
            report(**attempt(*fastest, traced=True))
        except Exception as error:
            report(kernels=[], of=reason(error))


def decode_side(report: Callable[..., None], tiny: bool, seconds: float) -> None:
    """Continues prompts greedily with `jaxlm.generate`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxlm
    from jaxlm.nn.transformer import Transformer, init

    end = time.monotonic() + seconds
    _, config = case_of("llama", tiny)
    new = 16 if tiny else NEW
    module = Transformer(config, dtype=jnp.dtype("bfloat16"))
    narrow = lambda key: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), init(module, key))
    lm = jaxlm.LM(config, module, jax.jit(narrow)(jax.random.key(0)))
    weights = sum(
        leaf.nbytes for leaf in jax.tree.leaves(lm.params)
    )  # including the embeddings, which are also the head
    assert config.tied_embeddings
    for rows in PROMPTS:
        prompts = np.random.default_rng(0).integers(0, config.vocabulary, (rows, PROMPT)).tolist()
        times: list[float] = []
        for turn in range(1 + (1 if tiny else 7)):
            start = time.monotonic()
            outputs = jaxlm.generate(
                lm, prompts, max_new_tokens=new, temperature=0.0, return_tokens=True, stop_tokens=()
            )
            assert [len(row) for row in outputs] == [new] * rows
            times += [time.monotonic() - start] if turn else []  # the first round compiles
            if turn and time.monotonic() + times[-1] > end:
                break
        # Keys and values of the previous tokens, on average over the new tokens.
        cache = rows * (PROMPT + new / 2) * 2 * config.layers * config.K * config.C * 2
        duration = statistics.median(times)
        report(
            prompts=rows,
            tokens_per_second=rows * new / duration,
            step_seconds=duration / new,
            step_bytes=weights + cache,
        )


def reason(error: Exception) -> str:
    """Returns one line with the reason why a setting does not run."""
    message = str(error).strip() or type(error).__name__
    lowered = message.lower()
    if any(sign in lowered for sign in ("resource_exhausted", "out of memory", "out_of_memory")):
        return "out of memory"
    return f"{type(error).__name__}: {message.splitlines()[0][:300]}"


def work(part: str, tiny: bool, seconds: float, profile: bool) -> None:
    """Runs a part in its own process; prints a line of JSON for each result."""

    def report(**result: Any) -> None:
        print("found " + json.dumps(result), flush=True)

    name, _, side = part.partition(" ")
    if side:
        torch_side(name, report, tiny, seconds, profile)
    elif name in CASES:
        train_side(name, report, tiny, seconds, profile)
    else:
        {"device": device_side, "decode": decode_side}[name](report, tiny, seconds)


# ---- the main process


def findings(part: str, tiny: bool, seconds: float, profile: bool, ended: list[str]) -> Iterator[dict[str, Any]]:
    """Yields the results of a part as they arrive; appends a line to `ended` if it fails or exceeds its time."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    if part.endswith("torch"):  # jaxlm only provides the model's config there
        environment |= {"JAX_PLATFORMS": "cpu", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    else:  # this process has the device exclusively
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    command = [sys.executable, str(Path(__file__)), "--work", part, "--seconds", str(seconds), *["--tiny"] * tiny]
    command += ["--profile"] * profile
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=complaints, text=True, start_new_session=True
        )
        lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            for line in process.stdout or ():
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        end = time.monotonic() + seconds
        try:
            while (line := lines.get(timeout=max(0.0, end - time.monotonic()))) is not None:
                if line.startswith("found "):
                    yield json.loads(line.removeprefix("found "))
            if process.wait(timeout=10):
                complaints.seek(0)
                messages = [line.strip() for line in complaints if line.strip()]
                ended.append(f"ended with {process.returncode}: {messages[-1][:300] if messages else ''}")
        except (queue.Empty, subprocess.TimeoutExpired):
            ended.append(f"cut off after {seconds:.0f} s")
        finally:
            # The part and all processes that it has started, such as torch's compilers.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def driver() -> str:
    """The driver version of NVIDIA GPUs; empty if there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.split("\n")[0].strip() if not done.returncode else ""


def versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def best_of(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The result with the most tokens per second."""
    return max(
        (one for one in results if "tokens_per_second" in one), key=lambda one: one["tokens_per_second"], default=None
    )


def measured(results: dict[str, Any], what: str) -> dict[str, Any] | None:
    """The result with the highest rate of `what`, products or copies."""
    return max(
        (one for one in results["parts"].get("device", ()) if what in one), key=lambda one: one[what], default=None
    )


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """Returns the best result of each part, with utilisations and ratios."""
    parts = results["parts"]
    device = parts.get("device") or [{}]
    peak, products, copies = device[0].get("peak_flops"), measured(results, "products"), measured(results, "copies")
    summary: dict[str, Any] = {}
    for name in CASES:
        sides = {"jaxlm": best_of(parts.get(name, [])), "torch": best_of(parts.get(f"{name} torch", []))}
        per_token = (sides["jaxlm"] or {}).get("flops_per_token")
        for side, best in sides.items():
            if best is not None:
                done = per_token and per_token * best["tokens_per_second"]
                mfu = done / peak if done and peak else None
                of_products = done / products["products"] if done and products else None
                summary.setdefault(name, {})[side] = best | {"mfu": mfu, "of_products": of_products}
        if all(sides.values()):
            summary[name]["ratio"] = sides["jaxlm"]["tokens_per_second"] / sides["torch"]["tokens_per_second"]
    for one in parts.get("decode", []):
        bound = one["step_bytes"] / copies["copies"] if copies else None
        times = one["step_seconds"] / bound if bound else None
        summary.setdefault("decode", []).append(one | {"bound_seconds": bound, "times_bound": times})
    return summary


def page(results: dict[str, Any]) -> str:
    """Returns the results in Markdown."""
    summary, device = summarize(results), (results["parts"].get("device") or [{}])[0]
    share = lambda value: "" if value is None else f"{value:.1%}"
    packages = ", ".join(f"{package} {number}" for package, number in results["versions"].items())
    by = f", driver {results['driver']}" if results["driver"] else ""
    lines = [f"{results['date']}, one {device.get('kind', 'unknown device')}{by}; {packages}"]
    rates = []
    if products := measured(results, "products"):
        peak = device.get("peak_flops")
        rates.append(
            f"products in bfloat16 {products['products'] / 1e12:,.4g} TFLOP/s ({products['size']} x {products['size']})"
            + (f", {products['products'] / peak:.0%} of the known peak of {peak / 1e12:,.4g}" if peak else "")
        )
    if copies := measured(results, "copies"):
        bandwidth = device.get("peak_bandwidth")
        rates.append(
            f"copies {copies['copies'] / 1e9:,.4g} GB/s"
            + (
                f", {copies['copies'] / bandwidth:.0%} of the known bandwidth of {bandwidth / 1e9:,.4g}"
                if bandwidth
                else ""
            )
        )
    lines += ["; ".join(rates)] * bool(rates)
    if any(name in summary for name in CASES):
        lines += ["", *_head("model", "side", "rows x length, settings", "tokens/s", "step, p50 to p99", "MFU",
                             "of products", "memory", "ratio")]  # fmt: skip
    for name in CASES:
        for side in ("jaxlm", "torch"):
            if one := summary.get(name, {}).get(side):
                ratio = summary[name].get("ratio") if side == "jaxlm" else None
                times = f"{one['step_ms_p50']:,.1f} to {one['step_ms_p99']:,.1f} ms" if "step_ms_p50" in one else ""
                memory = f"{one['memory_bytes'] / GIB:,.1f} GiB" if "memory_bytes" in one else ""
                cells = (name, side, setting_of(one), f"{one['tokens_per_second']:,.0f}", times, share(one["mfu"]))
                more = (share(one["of_products"]), memory, "" if ratio is None else f"{ratio:.2f}")
                lines.append(f"| {' | '.join(cells + more)} |")
    if "decode" in summary:
        lines += ["", *_head("prompts", "new tokens/s", "a token's step", "bound by memory", "times the bound")]
    for one in summary.get("decode", []):
        bound = f"{1000 * one['bound_seconds']:.3f} ms" if one["bound_seconds"] else "unknown"
        bound += f" ({one['step_bytes'] / 1e6:,.0f} MB)"
        times = f"{one['times_bound']:.2f}" if one["times_bound"] else ""
        cells = (str(one["prompts"]), f"{one['tokens_per_second']:,.0f}", f"{1000 * one['step_seconds']:.3f} ms")
        lines.append(f"| {' | '.join((*cells, bound, times))} |")
    for part, found in results["parts"].items():
        for one in found:
            if one.get("kernels"):
                lines += ["", f"{part}, {one['of']}: the kernels with the largest share of the device's time", ""]
                lines += [*_head("kernel", "share"), *(f"| {name} | {share(part)} |" for name, part in one["kernels"])]
    return "\n".join([*lines, "", *(f"{part}: {why}" for part, why in results["ended"].items())]).rstrip()


def _head(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", f"| {' | '.join('---' for _ in names)} |"]


def setting_of(result: dict[str, Any]) -> str:
    """`32 x 1024, remat none, attention auto, unroll 12`, or `32 x 1024, sdpa`."""
    shape = f"{result['batch']} x {result['length']}"
    if "remat" not in result:
        return f"{shape}, {result['attention']}"
    return f"{shape}, remat {result['remat']}, attention {result['attention']}, unroll {result['unroll']}"


def line_of(part: str, result: dict[str, Any]) -> str:
    """Returns the printed line of a result."""
    if part == "device":
        return "  ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{value}" for name, value in result.items()
        )
    if "kernels" in result:
        kernels = len(result["kernels"])
        return f"profile of {result['of']}: " + (
            f"{kernels} kernels" if kernels else "no device trace can be made here"
        )
    if "batch" in result:
        speed = result.get("refused") or f"{result['tokens_per_second']:,.0f} tokens/s"
        compiling = f", compiled in {result['compile_seconds']:.0f} s" if "compile_seconds" in result else ""
        return f"{setting_of(result)}: {speed}{compiling}"
    return result.get("refused") or f"{result['prompts']} prompts: {result['tokens_per_second']:,.0f} tokens/s"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    parser.add_argument("--minutes", type=float, default=9.0, help="maximum time of all parts together")
    parser.add_argument("--only", default="", help="some of gpt2,bert,llama,decode")
    parser.add_argument("--profile", action="store_true", help="also lists the kernels that take most of a step")
    parser.add_argument(
        "--tiny", action="store_true", help="makes everything very small, to test this script on any machine"
    )
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.tiny, arguments.seconds, arguments.profile)
        return 0
    known = [*CASES, "decode"]
    wanted = arguments.only.split(",") if arguments.only else known
    if set(wanted) - set(known):
        parser.error(f"--only is {arguments.only!r}; give some of {','.join(known)}")

    end = time.monotonic() + 60 * arguments.minutes
    results: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(sys.argv),
        "versions": versions(),
        "driver": driver(),
        "parts": {},
        "ended": {},
    }
    torch_installed = all(find_spec(package) for package in ("torch", "transformers"))
    parts = [part for part in SHARES if part == "device" or part.split()[0] in wanted]
    if not torch_installed:
        parts = [part for part in parts if not part.endswith("torch")]
        results["ended"]["torch"] = "not measured: torch and transformers are not both installed"

    def write_results() -> None:
        """Writes the results so far, atomically."""
        if arguments.out:
            temporary = arguments.out.with_name(arguments.out.name + ".part")
            temporary.write_text(json.dumps(results | {"summary": summarize(results)}, indent=1) + "\n")
            os.replace(temporary, arguments.out)

    def stop(*_: Any) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, stop)
    try:
        for n, part in enumerate(parts):
            left = end - time.monotonic()
            seconds = left * SHARES[part] / sum(SHARES[later] for later in parts[n:])
            ended: list[str] = []
            part_results = results["parts"].setdefault(part, [])
            for one in findings(part, arguments.tiny, seconds, arguments.profile, ended):
                part_results.append(one)
                print(f"{part}: {line_of(part, one)}", flush=True)
                write_results()
            if part == "device" and part_results and part_results[0]["platform"] == "cpu" and not arguments.tiny:
                print("error: there is no accelerator here; --tiny tests this file without one", file=sys.stderr)
                return 2
            if part_results and "refused" in part_results[-1] and "batch" not in part_results[-1]:
                ended.append(part_results.pop()["refused"])
            if ended:
                results["ended"][part] = ended[0]
                print(f"{part}: {ended[0]}", flush=True)
            write_results()
    finally:
        write_results()
        print(f"\n{page(results)}", flush=True)
    return 0 if any(results["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
