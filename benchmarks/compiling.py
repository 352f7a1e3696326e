"""Measures the compilation time of the training step, by depth and from the persistent cache.

    python benchmarks/compiling.py

A GPT of width 256 with 8 x 128 tokens and 12 or 96 layers is traced and compiled in a separate process, and again in a
new process from the persistent compilation cache.  Layers are scanned, so the time should not depend on the depth.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time

DEPTHS = (12, 96)


def work(layers: int, cache: str) -> None:
    """Compiles the step once and prints the seconds, including tracing."""
    import jax

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    from jaxlm import CausalLM, DataConfig, ModelConfig, RunConfig
    from jaxlm.devices import sharding
    from jaxlm.run.assembly import assemble
    from jaxlm.run.config_only import batch_shapes, resolve_config

    model = ModelConfig(vocabulary=8192, max_length=128, width=256, layers=layers, heads=4)
    run = RunConfig(model=model, task=CausalLM(), data=DataConfig(path="-", length=128), batch=8)
    resolved = resolve_config(run, sharding.make_mesh(run.mesh))
    assembly, batch = assemble(resolved), batch_shapes(resolved)
    start = time.perf_counter()
    assembly.train_step.trace(assembly.like, batch).lower().compile()
    print(time.perf_counter() - start)


def seconds(layers: int, cache: str) -> float:
    process = subprocess.run([sys.executable, __file__, "--work", str(layers), cache], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return float(process.stdout.split()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        return work(int(sys.argv[2]), sys.argv[3])
    first = {}
    for layers in DEPTHS:
        with tempfile.TemporaryDirectory() as cache:
            first[layers], again = (seconds(layers, cache) for _ in range(2))
        faster = first[layers] / again
        print(f"{layers} layers: {first[layers]:.2f} s, from the cache {again:.2f} s, {faster:.1f} times faster")
    print(f"{DEPTHS[1]} layers take {first[DEPTHS[1]] / first[DEPTHS[0]]:.2f} times as long as {DEPTHS[0]}")


if __name__ == "__main__":
    main()
