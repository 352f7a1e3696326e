"""BERT from scratch: masked language modelling and next-sentence prediction on any text with document boundaries.

    python train.py configs/bert_pretrain.py --data.path TEXT

TEXT is plain text, gz too: one sentence or paragraph a line, documents apart by a blank line.  Where documents begin
with a heading instead, say so, as for WikiText:

    --data.documents boundary --data.boundary '^ = [^=]+ = $'

HEADER
"""

from dataclasses import replace

from jaxlm import DataConfig, MaskedLM, OptimizerConfig, RunConfig, TokenizerConfig
from jaxlm.families import PRESETS


def config() -> RunConfig:
    return RunConfig(
        model=replace(PRESETS["bert-tiny"], vocabulary=4096, max_length=128, layers=4, heads=4, initial_std=0.05),
        task=MaskedLM(next_sentence=True, sentences="punctuation"),
        data=DataConfig(documents="blank_line", length=128),
        tokenizer=TokenizerConfig(train="wordpiece", lowercase=True),
        optimizer=OptimizerConfig(
            name="muon", rate=5e-3, beta1=0.95, schedule="linear", warmup=0.1, final=0.0, weight_decay=0.1
        ),
        batch=32,
        steps=1200,
        unroll=4,
        eval_every=200,
    )
