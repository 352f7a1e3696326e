"""GPT-2 124M from scratch (Radford et al. 2019), with half a million tokens per batch.

    python train.py configs/gpt2_124m.py --data.path 'corpus/*.txt.gz' --tokenizer.path gpt2

The tokenizer is a folder or hub name with GPT-2's files.  The vocabulary is padded from 50,257 to a multiple of 128,
which is efficient on matrix units and divisible by meshes.

Hardware         TPU v5e, planned in benchmarks/PLANS.md
Time, score      not measured: this config has not been trained yet
"""

from dataclasses import replace

from jaxlm import CausalLM, DataConfig, MeshConfig, OptimizerConfig, RunConfig, TokenizerConfig
from jaxlm.families import PRESETS


def config() -> RunConfig:
    return RunConfig(
        model=replace(PRESETS["gpt2"], vocabulary=50304, dropout=0.0, attention_dropout=0.0),
        task=CausalLM(stride=512),
        data=DataConfig(length=1024),
        tokenizer=TokenizerConfig(path="gpt2"),
        optimizer=OptimizerConfig(rate=6e-4, warmup=700, weight_decay=0.1, beta2=0.95),
        mesh=MeshConfig(),
        batch=512,
        steps=18_000,
        compute_dtype="bfloat16",
        remat="dots",
        eval_every=1000,
    )
