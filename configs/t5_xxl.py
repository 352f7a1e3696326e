"""T5 v1.1 XXL, 11 billion parameters: spans of a text are written in order (Raffel et al. 2020).

    python train.py configs/t5_xxl.py --data.path 'corpus/*.txt.gz' --tokenizer.path MODEL

MODEL is a folder or hub name with T5's sentencepiece.  The published run: 2,048 sequences of 512 tokens, Adafactor,
inverse square root from 0.01, a million steps.  Not trained here; its plan is in benchmarks/PLANS.md.
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
