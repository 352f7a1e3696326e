"""Training and decoding on one GPU or TPU, beside torch + transformers on the same GPU in the same run.

    python benchmarks/accelerator.py [--out FILE] [--minutes M] [--only gpt2,bert,llama,decode] [--tiny]

Needs jax, flax, optax and orbax alone; where torch with CUDA and transformers are there too, they are measured as well.

First the rates of the device: products in bfloat16, the best of a few sizes, and copies.  Then GPT-2 124M (rows of
1,024 tokens), BERT-large (512, masked language modelling) and Llama-3.2-1B (2,048) are trained on random tokens in
bfloat16, without dropout, by the step of `assembly.assemble`, which is `fit`'s: a short search over rows, remat,
attention and unroll, each for a few dozen steps; what needs too much memory is passed over.  The other side is the
same model of transformers by torch.compile, with weights in float32 under autocast, SDPA (or FlashAttention 2, where it
is installed), fused AdamW and the same clipping, with a search over rows.  Last Llama-3.2-1B in bfloat16 continues 1
and 16 prompts of 32 tokens, which are read in the same time, beside the time in which the memory, at the rate of the
copies, gives what each new token must read.

MFU is by the convention of PaLM (`flops.closed`), the same count for both sides: of BERT's head it counts the masked
places alone, as jaxlm computes it, where transformers takes all places through the vocabulary.

Every part runs in a process of its own, which has the device for itself, and has its share of the --minutes; what is
left over goes to those behind it.  A part whose time is up leaves what it has found.  --out is written anew after each
finding.  --tiny makes everything very small, for a test on any machine; its numbers say nothing.  Printed are a line
for each finding, and at the end, or where the run is stopped:

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
STEPS, WARM = 24, 3  # of a setting: those that are timed, and those before them
LONGEST = 6.0  # seconds that the timed steps may take; they are fewer where that is little
PROMPTS, PROMPT, NEW = (1, 16), 32, 128
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers")
GIB = 2**30


class Case(NamedTuple):
    """A model to train; rows: that fit on 80 GB without remat, and keep the device busy."""

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
# Seconds that a part has of 500.
SHARES = {"device": 30, "gpt2": 70, "gpt2 torch": 70, "bert": 70, "bert torch": 70, "llama": 70, "llama torch": 70}
SHARES |= {"decode": 50}


# ---- the sides, each in a process of its own


def case_of(name: str, tiny: bool) -> tuple[Case, Any]:
    """The case and its ModelConfig, made small where that is asked for."""
    from jaxlm.families import PRESETS

    case = CASES[name]
    config = replace(PRESETS[case.preset], dropout=0.0, attention_dropout=0.0, **case.fields)
    if tiny:
        case = case._replace(length=32, rows=2)
        grouped = {"kv_heads": 2} if config.kv_heads else {}
        config = replace(config, **TINY, **grouped, head_width=None, max_length=64)
    return case, config


def random_batch(case: Case, config: Any, rows: int) -> dict[str, Any]:
    """Rows of random tokens without padding, [rows, length] in each field."""
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


def device_side(tell: Callable[..., None], tiny: bool, seconds: float) -> None:
    """What the device is, and its rates."""
    import jax
    import jax.numpy as jnp

    from jaxlm.devices import chips

    device = jax.devices()[0]
    chip = chips.find(device.device_kind)
    told: dict[str, Any] = {"kind": device.device_kind, "platform": device.platform, "here": len(jax.devices())}
    if chip is not None:
        told |= {"peak_flops": chip.flops.value, "peak_bandwidth": chip.bandwidth.value}
    tell(**told)
    if device.platform == "cpu" and not tiny:
        return

    def rate(step: Callable[[Any], Any], x: Any, work: float) -> float:
        """Work a second of x -> step(x), over and over; the best of three rounds."""
        x = jax.block_until_ready(step(step(x)))
        begun = time.perf_counter()
        x = jax.block_until_ready(step(x))
        times = max(2, min(100, int(0.3 / (time.perf_counter() - begun))))
        best = 0.0
        for _ in range(3):
            begun = time.perf_counter()
            for _ in range(times):
                x = step(x)
            jax.block_until_ready(x)
            best = max(best, times * work / (time.perf_counter() - begun))
        return best

    product = jax.jit(jnp.matmul)
    for n in (128, 256) if tiny else (8192, 4096, 12288, 16384):
        # So scaled, products neither grow nor vanish.
        draw = jax.jit(lambda key, n=n: (jax.random.normal(key, (2, n, n)) / math.sqrt(n)).astype(jnp.bfloat16))
        a, b = draw(jax.random.key(0))
        tell(products=rate(lambda x, a=a: product(a, x), b, 2.0 * n**3), size=n)
    more = jax.jit(lambda x: x + 1, donate_argnums=0)  # reads and writes all of it, as a copy does
    for n in (1 << 20,) if tiny else (1 << 28, 1 << 30):
        tell(copies=rate(more, jnp.zeros(n // 4, jnp.float32), 2.0 * n), size=n)


def train_side(name: str, tell: Callable[..., None], tiny: bool, seconds: float) -> None:
    """Trains by jaxlm, with ever better settings as long as there is time."""
    import jax
    import numpy as np

    from jaxlm import CausalLM, DataConfig, MaskedLM, MeshConfig, OptimizerConfig, RunConfig
    from jaxlm.devices import sharding
    from jaxlm.nn.transformer import Transformer
    from jaxlm.run.assembly import assemble, closed_flops, shard_batch
    from jaxlm.run.measure import Meter
    from jaxlm.run.resolve import ResolvedModel
    from jaxlm.tasks import make_task

    end = time.monotonic() + seconds
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

    def attempt(setting: dict[str, Any]) -> dict[str, Any]:
        """What a setting costs; `refused` says why it does not run."""
        nonlocal state
        begun = time.monotonic()
        given = random_batch(case, config, setting["batch"])
        made = assemble(ResolvedModel(replace(run, **setting), mesh, task, config, Transformer))
        batch = shard_batch(mesh, given, 1)
        compiled = made.train_step.trace(made.like, batch).lower().compile()
        memory = compiled.memory_analysis()
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
        compiling = time.monotonic() - begun
        if needed > limit:
            return {"refused": f"it needs {needed / GIB:.1f} GiB", "compile_seconds": compiling}
        if state is None:
            state = made.first_state(jax.random.key_data(jax.random.key(0)))
        for _ in range(WARM):
            warm = time.monotonic()
            state, metrics = compiled(state, None, batch)  # nothing is frozen
            jax.block_until_ready(metrics)
        steps = max(4, min(STEPS, int((0.5 if tiny else LONGEST) / (time.monotonic() - warm))))
        meter = Meter(mesh)
        started = time.monotonic()
        for same in meter.fed(iter([batch] * steps)):
            state, metrics = compiled(state, None, same)
            meter.stepped(metrics["loss"])
        loss = float(metrics["loss"])
        took = (time.monotonic() - started) / steps
        line = meter.line(steps)
        meter.close()
        assert np.isfinite(loss), f"the loss is {loss}"
        tokens = setting["batch"] * case.length
        return {
            "tokens_per_second": tokens / took,
            "flops_per_token": closed_flops(task, config, setting["batch"], given) / tokens,
            **{field: value for field, value in line.items() if field.startswith("step_ms")},
            "memory_bytes": needed,  # as the compiler says; the device's own peak is that of all settings so far
            "loss": loss,
            "compile_seconds": compiling,
        }

    longest = 0.0

    def tried(setting: dict[str, Any]) -> dict[str, Any] | None:
        """The cost of a setting, which is told; None where it does not run or there is no time for it."""
        nonlocal state, longest
        begun = time.monotonic()
        if begun + longest > end:
            return None
        found: dict[str, Any] = {}
        try:
            found = attempt(setting)
        except Exception as error:
            found = {"refused": reason(error)}
            state = None  # it may have been used up
        gc.collect()
        longest = max(longest, time.monotonic() - begun)
        shown = {"length": case.length, "parameters": _entries(state), **setting, **found}
        tell(**shown)
        return None if "refused" in found else found

    best: dict[str, Any] = {"batch": case.rows, "remat": "none", "attention": "auto", "unroll": 1}
    cost = None
    for smaller in ({}, {"remat": "dots"}, {"remat": "full"}, {"batch": max(1, case.rows // 4)}, {"batch": 1}):
        best |= smaller
        if cost := tried(best):
            break
    # From there one change after the other, what promises most first; the better of two is kept.
    unrolled = config.layers if config.layers <= 12 else 4
    moves: list[Callable[[], dict[str, Any]]] = [
        lambda: {"unroll": unrolled},
        lambda: {"batch": 2 * best["batch"]},
        lambda: {"batch": 2 * best["batch"]},
        lambda: {"remat": "dots", "batch": 2 * best["batch"]},
        lambda: {"attention": "xla"},  # auto takes cuDNN's or splash wherever they can be taken
        lambda: {"batch": max(1, best["batch"] // 2)},
        lambda: {"remat": "full", "batch": 4 * best["batch"]},
    ]
    seen = [dict(best)]
    for move in moves[:1] if tiny else moves:
        setting = best | move()
        if cost is None or setting in seen:
            continue
        seen.append(setting)
        new = tried(setting)
        if new and new["tokens_per_second"] > cost["tokens_per_second"]:
            best, cost = setting, new


def _entries(state: Any) -> int | None:
    import jax

    return None if state is None else sum(leaf.size for leaf in jax.tree.leaves(state.model))


def torch_side(name: str, tell: Callable[..., None], tiny: bool, seconds: float) -> None:
    """The same by torch and transformers."""
    import torch
    import transformers

    from jaxlm.families import FAMILIES

    on = "cuda" if torch.cuda.is_available() else "cpu"
    if on == "cpu" and not tiny:
        return tell(refused="torch sees no CUDA device")
    end = time.monotonic() + seconds
    case, ours = case_of(name, tiny)
    masked = ours.structure == "encoder"
    transformers.logging.set_verbosity_error()
    torch.set_float32_matmul_precision("high")
    if tiny:
        torch.set_num_threads(1)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # in any vocabulary
    said = {**FAMILIES[case.kind].config_to_hf(ours), **special}
    kind = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM

    def attempt(rows: int, attention: str) -> dict[str, Any]:
        torch._dynamo.reset()
        gc.collect()
        if on == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        config = transformers.AutoConfig.for_model(case.kind, **said)
        with torch.device(on):
            plain = kind.from_config(config, attn_implementation=attention).train()
        model = torch.compile(plain, dynamic=False) if on == "cuda" else plain
        optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4, weight_decay=0.1, fused=on == "cuda")
        batch = random_batch(case, ours, rows)
        tokens = torch.tensor(batch["tokens_BT"], dtype=torch.long, device=on)
        labels = tokens.clone()  # moved by transformers itself, where they are of the next token
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

        begun = time.monotonic()
        step().item()
        compiling = time.monotonic() - begun
        for _ in range(WARM):
            begun = time.monotonic()
            step().item()
        steps = max(4, min(STEPS, int((0.5 if tiny else LONGEST) / (time.monotonic() - begun))))
        # The ends of steps are noted by the device itself, so that nothing waits for them.
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)] if on == "cuda" else []
        begun = time.monotonic()
        for n in range(steps):
            if events:
                events[n].record()
            loss = step()
        if events:
            events[steps].record()
        value = loss.item()
        if on == "cuda":
            torch.cuda.synchronize()
        took = (time.monotonic() - begun) / steps
        assert math.isfinite(value), f"the loss is {value}"
        told = {
            "tokens_per_second": rows * case.length / took,
            "parameters": sum(p.numel() for p in plain.parameters()),
            "loss": value,
            "compile_seconds": compiling,
        }
        if events:
            from jaxlm.run.measure import percentiles

            told |= percentiles([a.elapsed_time(b) / 1000 for a, b in zip(events, events[1:])])
            told["memory_bytes"] = torch.cuda.max_memory_allocated()
        return told

    longest, best = 0.0, 0.0

    def tried(rows: int, attention: str) -> float:
        """Tokens a second, which are told; 0 where it does not run."""
        nonlocal longest, best
        begun = time.monotonic()
        if begun + longest > end:
            return 0.0
        try:
            found = attempt(rows, attention)
        except Exception as error:
            found = {"refused": reason(error)}
        gc.collect()
        longest = max(longest, time.monotonic() - begun)
        tell(batch=rows, length=case.length, attention=attention, **found)
        best = max(best, found.get("tokens_per_second", 0.0))
        return found.get("tokens_per_second", 0.0)

    rows = case.rows
    while rows > 1 and not tried(rows, "sdpa") and time.monotonic() + longest < end:
        rows //= 2
    if tiny:
        return
    if find_spec("flash_attn"):
        tried(rows, "flash_attention_2")
    larger = rows
    while (before := best) and tried(larger := 2 * larger, "sdpa") > before:
        pass
    if larger == 2 * rows and rows > 1:
        tried(rows // 2, "sdpa")


def decode_side(tell: Callable[..., None], tiny: bool, seconds: float) -> None:
    """Continues prompts greedily by `jaxlm.generate`."""
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
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))  # the embeddings too: they are the head
    assert config.tied_embeddings
    for rows in PROMPTS:
        prompts = np.random.default_rng(0).integers(0, config.vocabulary, (rows, PROMPT)).tolist()
        times: list[float] = []
        for turn in range(1 + (1 if tiny else 7)):
            begun = time.monotonic()
            found = jaxlm.generate(lm, prompts, max_new_tokens=new, temperature=0.0, return_tokens=True, stop_tokens=())
            assert [len(row) for row in found] == [new] * rows
            times += [time.monotonic() - begun] if turn else []  # the first compiles
            if turn and time.monotonic() + times[-1] > end:
                break
        # Keys and values of the text so far, on average over the new tokens.
        cache = rows * (PROMPT + new / 2) * 2 * config.layers * config.K * config.C * 2
        took = statistics.median(times)
        tell(prompts=rows, tokens_per_second=rows * new / took, step_seconds=took / new, step_bytes=weights + cache)


def reason(error: Exception) -> str:
    """Why a setting does not run, in a line."""
    said = str(error).strip() or type(error).__name__
    lowered = said.lower()
    if any(sign in lowered for sign in ("resource_exhausted", "out of memory", "out_of_memory")):
        return "out of memory"
    return f"{type(error).__name__}: {said.splitlines()[0][:300]}"


def work(part: str, tiny: bool, seconds: float) -> None:
    """A part, in its own process: a line of JSON for each finding."""

    def tell(**found: Any) -> None:
        print("found " + json.dumps(found), flush=True)

    name, _, side = part.partition(" ")
    if side:
        torch_side(name, tell, tiny, seconds)
    elif name in CASES:
        train_side(name, tell, tiny, seconds)
    else:
        {"device": device_side, "decode": decode_side}[name](tell, tiny, seconds)


# ---- the parts, one after the other


def findings(part: str, tiny: bool, seconds: float, ended: list[str]) -> Iterator[dict[str, Any]]:
    """What a part finds, as it comes; `ended` gets a line where it does not end by itself and well."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    if part.endswith("torch"):  # jaxlm only says there what the model is
        environment |= {"JAX_PLATFORMS": "cpu", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    else:  # it has the device for itself
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    command = [sys.executable, str(Path(__file__)), "--work", part, "--seconds", str(seconds), *["--tiny"] * tiny]
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
                said = [line.strip() for line in complaints if line.strip()]
                ended.append(f"ended with {process.returncode}: {said[-1][:300] if said else ''}")
        except (queue.Empty, subprocess.TimeoutExpired):
            ended.append(f"cut off after {seconds:.0f} s")
        finally:
            # The part with all that it has started, such as the compilers of torch.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def driver() -> str:
    """Of NVIDIA's GPUs; empty where there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.split("\n")[0].strip() if not done.returncode else ""


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def best_of(found: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The finding with the most tokens a second."""
    return max(
        (one for one in found if "tokens_per_second" in one), key=lambda one: one["tokens_per_second"], default=None
    )


def measured(results: dict[str, Any], what: str) -> dict[str, Any] | None:
    """The finding with the highest rate: of products or of copies."""
    return max(
        (one for one in results["parts"].get("device", ()) if what in one), key=lambda one: one[what], default=None
    )


def summed_up(results: dict[str, Any]) -> dict[str, Any]:
    """The best of each part, with utilisations and ratios."""
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
    """The results in Markdown."""
    summary, device = summed_up(results), (results["parts"].get("device") or [{}])[0]
    share = lambda value: "" if value is None else f"{value:.1%}"
    stands = ", ".join(f"{package} {number}" for package, number in results["versions"].items())
    by = f", driver {results['driver']}" if results["driver"] else ""
    lines = [f"{results['date']}, one {device.get('kind', 'unknown device')}{by}; {stands}"]
    told = []
    if products := measured(results, "products"):
        peak = device.get("peak_flops")
        told.append(
            f"products in bfloat16 {products['products'] / 1e12:,.4g} TFLOP/s ({products['size']} x {products['size']})"
            + (f", {products['products'] / peak:.0%} of the known peak of {peak / 1e12:,.4g}" if peak else "")
        )
    if copies := measured(results, "copies"):
        most = device.get("peak_bandwidth")
        told.append(
            f"copies {copies['copies'] / 1e9:,.4g} GB/s"
            + (f", {copies['copies'] / most:.0%} of the known bandwidth of {most / 1e9:,.4g}" if most else "")
        )
    lines += ["; ".join(told)] * bool(told)
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
    return "\n".join([*lines, "", *(f"{part}: {why}" for part, why in results["ended"].items())]).rstrip()


def _head(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", f"| {' | '.join('---' for _ in names)} |"]


def setting_of(found: dict[str, Any]) -> str:
    """`32 x 1024, remat none, attention auto, unroll 12`, or `32 x 1024, sdpa`."""
    shape = f"{found['batch']} x {found['length']}"
    if "remat" not in found:
        return f"{shape}, {found['attention']}"
    return f"{shape}, remat {found['remat']}, attention {found['attention']}, unroll {found['unroll']}"


def line_of(part: str, found: dict[str, Any]) -> str:
    """A finding as a line, said when it comes."""
    if part == "device":
        return "  ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{value}" for name, value in found.items()
        )
    if "batch" in found:
        told = found.get("refused") or f"{found['tokens_per_second']:,.0f} tokens/s"
        compiling = f", compiled in {found['compile_seconds']:.0f} s" if "compile_seconds" in found else ""
        return f"{setting_of(found)}: {told}{compiling}"
    return found.get("refused") or f"{found['prompts']} prompts: {found['tokens_per_second']:,.0f} tokens/s"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the results are written, as JSON")
    parser.add_argument("--minutes", type=float, default=9.0, help="that all may take together")
    parser.add_argument("--only", default="", help="some of gpt2,bert,llama,decode")
    parser.add_argument("--tiny", action="store_true", help="everything very small, to test this file on any machine")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        work(asked.work, asked.tiny, asked.seconds)
        return 0
    known = [*CASES, "decode"]
    wanted = asked.only.split(",") if asked.only else known
    if set(wanted) - set(known):
        parser.error(f"--only is {asked.only!r}; give some of {','.join(known)}")

    end = time.monotonic() + 60 * asked.minutes
    results: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(sys.argv),
        "versions": versions(),
        "driver": driver(),
        "parts": {},
        "ended": {},
    }
    there = all(find_spec(package) for package in ("torch", "transformers"))
    parts = [part for part in SHARES if part == "device" or part.split()[0] in wanted]
    if not there:
        parts = [part for part in parts if not part.endswith("torch")]
        results["ended"]["torch"] = "not measured: torch and transformers are not both installed"

    def keep() -> None:
        """Writes what there is, whole or not at all."""
        if asked.out:
            beside = asked.out.with_name(asked.out.name + ".part")
            beside.write_text(json.dumps(results | {"summary": summed_up(results)}, indent=1) + "\n")
            os.replace(beside, asked.out)

    def stop(*_: Any) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, stop)
    try:
        for n, part in enumerate(parts):
            left = end - time.monotonic()
            seconds = left * SHARES[part] / sum(SHARES[later] for later in parts[n:])
            ended: list[str] = []
            found = results["parts"].setdefault(part, [])
            for one in findings(part, asked.tiny, seconds, ended):
                found.append(one)
                print(f"{part}: {line_of(part, one)}", flush=True)
                keep()
            if part == "device" and found and found[0]["platform"] == "cpu" and not asked.tiny:
                print("error: there is no accelerator here; --tiny tests this file without one", file=sys.stderr)
                return 2
            if found and "refused" in found[-1] and "batch" not in found[-1]:
                ended.append(found.pop()["refused"])
            if ended:
                results["ended"][part] = ended[0]
                print(f"{part}: {ended[0]}", flush=True)
            keep()
    finally:
        keep()
        print(f"\n{page(results)}", flush=True)
    return 0 if any(results["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
