"""GPT-3 175B (Brown et al. 2020): 96 layers of width 12,288, 3.1 million tokens per batch.

    python train.py configs/gpt3_175b.py --data.path 'corpus/*.txt.gz'

The published run used a batch of 1,536 x 2,048 tokens, Adam with beta2 0.95, rate 0.6e-4 and 300 billion tokens.

Hardware         512 chips of TPU v5p; `jaxlm plan configs/gpt3_175b.py --topology v5p:8x8x8` reports the memory on each
                 (benchmarks/PLANS.md)
Time, score      not measured: this config has not been trained yet
"""

from dataclasses import replace

from jaxlm import CausalLM, DataConfig, MeshConfig, OptimizerConfig, RunConfig, TokenizerConfig
from jaxlm.families import PRESETS


def config() -> RunConfig:
    return RunConfig(
        model=replace(PRESETS["gpt3-175b"], vocabulary=50304, dropout=0.0, attention_dropout=0.0),
        task=CausalLM(),
        data=DataConfig(length=2048),
        tokenizer=TokenizerConfig(path="gpt2"),
        optimizer=OptimizerConfig(rate=6e-5, warmup=120, weight_decay=0.1, beta2=0.95),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=8),
        batch=1536,
        steps=95_000,
        compute_dtype="bfloat16",
        remat="full",
    )
