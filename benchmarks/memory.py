"""Compares the memory that a plan predicts with the memory that the run uses.

    python benchmarks/memory.py

The run is a GPT 6 x 384 with a vocabulary of 8,192 and batches of 16 x 256 on one device.  An accelerator reports its
peak memory.  On CPU the script uses the peak of the process minus its value before the state was created.  This is an
estimate, because it includes the work space of XLA and free memory that the C library keeps.
"""

from __future__ import annotations

import resource
import sys

BATCH, LENGTH = 16, 256


def peak(device) -> int:
    """Peak memory so far, in bytes."""
    stats = device.memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    import jax
    import numpy as np

    from jaxlm import CausalLM, DataConfig, MeshConfig, ModelConfig, RunConfig
    from jaxlm.devices import sharding
    from jaxlm.planning import plan
    from jaxlm.run.assembly import assemble, shard_batch
    from jaxlm.run.config_only import resolve_config

    device = jax.devices()[0]
    model = ModelConfig(vocabulary=8192, max_length=LENGTH, width=384, layers=6, heads=6)
    data, mesh_config = DataConfig(path="-", length=LENGTH), MeshConfig(1)
    for remat in ("none", "full"):
        run = RunConfig(model=model, task=CausalLM(), data=data, batch=BATCH, mesh=mesh_config, remat=remat)
        planned = plan.plan(run)
        mesh = sharding.make_mesh(run.mesh, [device])
        assembly = assemble(resolve_config(run, mesh))
        before = peak(device) if device.platform == "cpu" else 0
        state = assembly.first_state(jax.random.key_data(jax.random.key(0)))
        tokens = np.random.default_rng(0).integers(0, 8192, (BATCH, LENGTH), dtype=np.int32)
        batch = {"tokens_BT": tokens, "labels_BT": tokens, "weights_BT": np.ones(tokens.shape, np.float32)}
        batch |= {
            "segments_BT": np.ones_like(tokens),
            "positions_BT": np.tile(np.arange(LENGTH, dtype=np.int32), (16, 1)),
        }
        for _ in range(3):
            state, metrics = assembly.train_step(state, shard_batch(mesh, batch, 1))
            jax.block_until_ready(metrics)
        used = peak(device) - before
        ratio = planned.used_bytes / used
        print(
            f"remat {remat}: planned {planned.used_bytes / 1e6:,.0f} MB, used {used / 1e6:,.0f} MB, ratio {ratio:.2f}"
        )
        del state, metrics
        if device.platform == "cpu":
            break  # the peak of the process never decreases


if __name__ == "__main__":
    main()
