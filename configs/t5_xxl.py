"""T5 v1.1 XXL, 11 billion parameters: pre-training by span corruption (Raffel et al. 2020).

    python train.py configs/t5_xxl.py --data.path 'corpus/*.txt.gz' --tokenizer.path MODEL

MODEL is a folder or hub name with T5's sentencepiece model.  The published run used 2,048 sequences of 512 tokens,
Adafactor, an inverse square root schedule from 0.01 and a million steps.

Hardware         64 chips of TPU v5p, planned in benchmarks/PLANS.md
Time, score      not measured: this config has not been trained yet
"""

from dataclasses import replace

from jaxlm import DataConfig, MeshConfig, OptimizerConfig, RunConfig, SpanCorruption, TokenizerConfig
from jaxlm.families import PRESETS


def config() -> RunConfig:
    return RunConfig(
        model=replace(PRESETS["t5-v1.1-xxl"], dropout=0.0, attention_dropout=0.0),
        task=SpanCorruption(),
        data=DataConfig(length=512),
        tokenizer=TokenizerConfig(path="google/t5-v1_1-xxl"),
        optimizer=OptimizerConfig(
            name="adafactor", rate=1e-2, relative=True, schedule="inverse_sqrt", warmup=10_000, weight_decay=0.0
        ),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=4),
        batch=2048,
        steps=1_000_000,
        compute_dtype="bfloat16",
        remat="full",
    )
