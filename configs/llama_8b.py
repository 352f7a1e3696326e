"""Llama 3.1 8B at a context length of 8,192, from scratch or from its published weights.

    python train.py configs/llama_8b.py --data.path 'corpus/*.txt.gz' --tokenizer.path MODEL

MODEL is a folder or hub name; `--init MODEL` starts from its weights.

Hardware         16 chips of TPU v6e; `jaxlm plan configs/llama_8b.py --topology v6e:4x4` reports the memory on each
                 (benchmarks/PLANS.md)
Time, score      not measured: this config has not been trained yet
"""

from dataclasses import replace

from jaxlm import CausalLM, DataConfig, MeshConfig, OptimizerConfig, RunConfig, TokenizerConfig
from jaxlm.families import PRESETS


def config() -> RunConfig:
    return RunConfig(
        model=replace(PRESETS["llama-3.1-8b"], max_length=8192),
        task=CausalLM(),
        data=DataConfig(length=8192),
        tokenizer=TokenizerConfig(path="meta-llama/Llama-3.1-8B"),
        optimizer=OptimizerConfig(rate=3e-4, warmup=2000, weight_decay=0.1, beta2=0.95),
        mesh=MeshConfig(data=1, fsdp=-1),
        batch=32,
        steps=100_000,
        compute_dtype="bfloat16",
        remat="full",
    )
