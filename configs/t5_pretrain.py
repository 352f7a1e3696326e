"""T5's pre-training: spans taken out of a text are written in order (Raffel et al. 2020); a T5 v1.1 of 8 million
parameters and its tokenizer, from a text of your own.

    python train.py configs/t5_pretrain.py --data.path corpus.txt.gz --workdir runs/my-t5

A line is a document; --data.documents blank_line reads paragraphs.  `--model.width` and its neighbours make it larger.

Measured so on 2 CPU cores (November 2026, seed 0) on WikiText-2's test part and the abstracts of SciTLDR's training
part, 3.4 MB together, with WikiText-2's validation part held out: 26 min 6 s, held-out loss 3.83 nats a token of the
targets, accuracy 0.358.  A rate in proportion to each tensor makes a difference, since T5's embeddings begin at 1 and
its matrices at 1/16 and less: at 2e-3 for all alike AdamW comes to 4.26 and 0.312 in as many steps.
"""

from dataclasses import replace

from jaxlm import DataConfig, OptimizerConfig, RunConfig, SpanCorruption, TokenizerConfig
from jaxlm.families import PRESETS


def config() -> RunConfig:
    model = replace(
        PRESETS["t5-v1.1-small"],
        vocabulary=4100,
        width=256,
        layers=4,
        decoder_layers=4,
        heads=4,
        head_width=64,
        mlp_width=512,
    )
    return RunConfig(
        model=model,
        task=SpanCorruption(),
        data=DataConfig(length=256),
        tokenizer=TokenizerConfig(sentinels=100),
        optimizer=OptimizerConfig(rate=2e-2, relative=True, schedule="linear", warmup=0.1, final=0.0, weight_decay=0.0),
        batch=16,
        steps=1000,
        log_every=50,
    )
