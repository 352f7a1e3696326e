"""Mixtral 8x7B at a context length of 8,192: each token uses 2 of the 8 experts of a layer.

    python train.py configs/mixtral_8x7b.py --data.path 'corpus/*.txt.gz' --tokenizer.path MODEL

MODEL is a folder or hub name; `--init MODEL` starts from its weights. The experts are sharded over the mesh axis
`expert`, and the width of all matrices over `fsdp`.

Hardware         128 chips of TPU v5p; `jaxlm plan configs/mixtral_8x7b.py --topology v5p:4x4x8` reports the memory on
                 each (benchmarks/PLANS.md)
Time, score      not measured: this config has not been trained yet
"""

from dataclasses import replace

from jaxlm import CausalLM, DataConfig, MeshConfig, OptimizerConfig, RunConfig, TokenizerConfig
from jaxlm.families import PRESETS


def config() -> RunConfig:
    return RunConfig(
        model=replace(PRESETS["mixtral-8x7b"], max_length=8192, balance_loss=0.01, router_z_loss=1e-3),
        task=CausalLM(),
        data=DataConfig(length=8192),
        tokenizer=TokenizerConfig(path="mistralai/Mixtral-8x7B-v0.1"),
        optimizer=OptimizerConfig(rate=3e-4, warmup=2000, weight_decay=0.1, beta2=0.95),
        mesh=MeshConfig(data=1, fsdp=-1, expert=8),
        batch=128,
        steps=100_000,
        compute_dtype="bfloat16",
        remat="full",
    )
