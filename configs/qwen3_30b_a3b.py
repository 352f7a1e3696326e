"""Qwen3-30B-A3B at a context length of 4,096: each token uses 8 of the 128 experts of a layer.

    python train.py configs/qwen3_30b_a3b.py --data.path 'corpus/*.txt.gz' --tokenizer.path MODEL

MODEL is a folder or hub name; `--init MODEL` starts from its weights. The experts are sharded over the mesh axis
`expert`, and the width of all matrices over `fsdp`.

Hardware         64 chips of TPU v6e; `jaxlm plan configs/qwen3_30b_a3b.py --topology v6e:8x8` reports the memory on
                 each (benchmarks/PLANS.md)
Time, score      not measured: this config has not been trained yet
"""

from dataclasses import replace

from jaxlm import CausalLM, DataConfig, MeshConfig, OptimizerConfig, RunConfig, TokenizerConfig
from jaxlm.families import PRESETS


def config() -> RunConfig:
    return RunConfig(
        model=replace(PRESETS["qwen3-30b-a3b"], max_length=4096, balance_loss=0.01, router_z_loss=1e-3),
        task=CausalLM(),
        data=DataConfig(length=4096),
        tokenizer=TokenizerConfig(path="Qwen/Qwen3-30B-A3B"),
        optimizer=OptimizerConfig(rate=3e-4, warmup=2000, weight_decay=0.1, beta2=0.95),
        mesh=MeshConfig(data=1, fsdp=-1, expert=8),
        batch=128,
        steps=100_000,
        compute_dtype="bfloat16",
        remat="full",
    )
