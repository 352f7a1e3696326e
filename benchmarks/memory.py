"""What a plan says of memory, beside what the run then takes.

    python benchmarks/memory.py

A GPT 6 x 384 with a vocabulary of 8,192, batches of 16 x 256, on one device.  An accelerator tells its high-water mark;
on CPU the peak of the process stands for it, less what the process had before there was a state: an estimate, since the
work space of XLA and what the C library keeps are in it.
"""

from __future__ import annotations

import resource
import sys

BATCH, LENGTH = 16, 256


def peak(device) -> int:
    """Bytes, so far."""
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
    data, mesh_of = DataConfig(path="-", length=LENGTH), MeshConfig(1)
    for remat in ("none", "full"):
        run = RunConfig(model=model, task=CausalLM(), data=data, batch=BATCH, mesh=mesh_of, remat=remat)
        told = plan.plan(run)
        mesh = sharding.make_mesh(run.mesh, [device])
        made = assemble(resolve_config(run, mesh))
        before = peak(device) if device.platform == "cpu" else 0
        state = made.first_state(jax.random.key_data(jax.random.key(0)))
        tokens = np.random.default_rng(0).integers(0, 8192, (BATCH, LENGTH), dtype=np.int32)
        batch = {"tokens_BT": tokens, "labels_BT": tokens, "weights_BT": np.ones(tokens.shape, np.float32)}
        batch |= {
            "segments_BT": np.ones_like(tokens),
            "positions_BT": np.tile(np.arange(LENGTH, dtype=np.int32), (16, 1)),
        }
        for _ in range(3):
            state, metrics = made.train_step(state, shard_batch(mesh, batch, 1))
            jax.block_until_ready(metrics)
        taken = peak(device) - before
        ratio = told.used_bytes / taken
        print(f"remat {remat}: planned {told.used_bytes / 1e6:,.0f} MB, taken {taken / 1e6:,.0f} MB, ratio {ratio:.2f}")
        del state, metrics
        if device.platform == "cpu":
            break  # a peak does not fall again


if __name__ == "__main__":
    main()
