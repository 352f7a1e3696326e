"""TREC: the class of the answer to a question (Li & Roth 2002), by a BiLSTM or a CNN.

    python train.py configs/lstm_trec.py --data.path TREC.train --data.eval-path TREC.test

The files are the original ones.  For the CNN of Kim (2014), whose published accuracy without pre-trained embeddings is
91.2, add --model.mixer convolution --model.conv-activation relu --model.embedding-dropout 0 --model.vocabulary 8000
--optimizer.rate 1e-3 --epochs 8.  Embeddings start from word vectors with --embeddings FILE --model.vocabulary 7000
--model.embedding-dropout 0.5; those below are of configs/word2vec.py with --width 300 --epochs 10 --min-count 3 on
3.4 million words of several texts, including the training questions.

Measured in November 2026 with seed 0:

Hardware         2 CPU cores, shared with other processes (load 10)
Time             2 min (BiLSTM) and 3 min (CNN)
BiLSTM           accuracy 0.866 on the 500 test questions after the last epoch
with vectors     accuracy 0.890 after the last epoch (BiLSTM)
CNN              accuracy 0.904 after the last epoch
"""

from dataclasses import replace

from jaxlm import Classification, DataConfig, OptimizerConfig, RunConfig, TokenizerConfig
from jaxlm.families import PRESETS


def config() -> RunConfig:
    return RunConfig(
        model=replace(
            PRESETS["lstm-classifier"], vocabulary=3000, dropout=0.0, embedding_dropout=0.2, classes_dropout=0.5
        ),
        task=Classification(),
        tokenizer=TokenizerConfig(train="wordpiece", lowercase=True),
        data=DataConfig(
            format="text",
            pattern=r"(?P<label>[A-Z]+):(?P<fine>\S+) (?P<text>.*)",
            encoding="iso-8859-1",
            length=40,
        ),
        optimizer=OptimizerConfig(rate=2e-3, schedule="linear", warmup=0.1, final=0.0, weight_decay=0.01, beta2=0.999),
        examples=50,
        epochs=6,
        log_every=50,
    )
