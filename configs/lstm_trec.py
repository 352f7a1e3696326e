"""TREC: the class of the answer to a question (Li & Roth 2002), by a BiLSTM with random initial embeddings.

    python train.py configs/lstm_trec.py --data.path TREC.train --data.eval-path TREC.test

The files are the original ones.  For the CNN of Kim (2014) add --model.mixer convolution --model.conv-activation relu
--model.dropout 0 --model.classes-dropout 0.5.
"""

from jaxlm import Classification, DataConfig, OptimizerConfig, RunConfig, TokenizerConfig
from jaxlm.families import PRESETS


def config() -> RunConfig:
    return RunConfig(
        model=PRESETS["lstm-classifier"],
        task=Classification(),
        tokenizer=TokenizerConfig(train="wordpiece", lowercase=True),
        data=DataConfig(
            format="text",
            pattern=r"(?P<label>[A-Z]+):(?P<fine>\S+) (?P<text>.*)",
            encoding="iso-8859-1",
            length=64,
        ),
        optimizer=OptimizerConfig(rate=2e-3, schedule="linear", warmup=0.1, final=0.0, weight_decay=0.01, beta2=0.999),
        examples=32,
        epochs=10,
        log_every=50,
    )
