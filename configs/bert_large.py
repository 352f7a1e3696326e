"""BERT-large from scratch: masked language modelling and next-sentence prediction (Devlin et al. 2019).

    python train.py configs/bert_large.py --data.path 'corpus/*.txt.gz' --tokenizer.path bert-large-uncased

The text has one sentence per line and a blank line between documents.  The vocabulary is padded from 30,522 to a
multiple of 128.  The published run used 256 sequences of 512 tokens, rate 1e-4 and a million steps.

Hardware         TPU v5e, planned in benchmarks/PLANS.md
Time, score      not measured: this config has not been trained yet
"""

from dataclasses import replace

from jaxlm import DataConfig, MaskedLM, MeshConfig, OptimizerConfig, RunConfig, TokenizerConfig
from jaxlm.families import PRESETS


def config() -> RunConfig:
    return RunConfig(
        model=replace(PRESETS["bert-large"], vocabulary=30592),
        task=MaskedLM(next_sentence=True),
        data=DataConfig(documents="blank_line", length=512),
        tokenizer=TokenizerConfig(path="bert-large-uncased"),
        optimizer=OptimizerConfig(
            rate=1e-4, schedule="linear", warmup=10_000, final=0.0, weight_decay=0.01, beta2=0.999
        ),
        mesh=MeshConfig(),
        batch=256,
        steps=1_000_000,
        compute_dtype="bfloat16",
        remat="dots",
        eval_every=10_000,
    )
