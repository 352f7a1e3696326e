"""WNUT-17: rare and emerging names (Derczynski et al. 2017), by a BiLSTM-CRF with random initial embeddings.

python train.py configs/lstm_crf_wnut17.py --data.path wnut17train.conll --data.eval-path emerging.dev.conll

The files are in CoNLL format.

Measured in November 2026 with seed 0:

Hardware         2 CPU cores, shared with other processes (load 10)
Time             7 min 44 s for eight epochs
Score            span F1 12.45 on emerging.test, with the best epoch on emerging.dev (F1 20.71)
"""

from jaxlm import DataConfig, OptimizerConfig, RunConfig, Tagging, TokenizerConfig
from jaxlm.families import PRESETS


def config() -> RunConfig:
    return RunConfig(
        model=PRESETS["lstm-tagger"],
        task=Tagging(crf=True),
        tokenizer=TokenizerConfig(train="wordpiece"),
        data=DataConfig(format="conll", length=128),
        optimizer=OptimizerConfig(rate=2e-3, schedule="linear", warmup=0.1, final=0.0, weight_decay=0.01, beta2=0.999),
        examples=32,
        epochs=8,
        log_every=50,
    )
