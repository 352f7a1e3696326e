"""BERT from scratch: masked language modelling and next-sentence prediction on any text with document boundaries.

    python train.py configs/bert_pretrain.py --data.path TEXT

TEXT is plain text, gz too: one sentence or paragraph a line, documents apart by a blank line.  Where documents begin
with a heading instead, say so, as for WikiText:

    --data.documents boundary --data.boundary '^ = [^=]+ = $'

The model is BERT-mini; --model.layers, --model.width and --model.heads make it any other.
"""

from dataclasses import replace

from jaxlm import DataConfig, MaskedLM, OptimizerConfig, RunConfig, TokenizerConfig
from jaxlm.families import PRESETS


def config() -> RunConfig:
    return RunConfig(
        model=replace(PRESETS["bert-mini"], vocabulary=4096, max_length=128),
        task=MaskedLM(next_sentence=True, sentences="punctuation"),
        data=DataConfig(documents="blank_line", length=128),
        tokenizer=TokenizerConfig(train="wordpiece", lowercase=True),
        optimizer=OptimizerConfig(rate=1e-3, schedule="linear", warmup=0.1, final=0.0, weight_decay=0.01, beta2=0.999),
        batch=32,
        steps=3000,
        unroll=4,
        eval_every=500,
    )
