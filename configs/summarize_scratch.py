"""Summarisation with a randomly initialised encoder-decoder that learns from the pairs only.

    python train.py configs/summarize_scratch.py --data.path train.jsonl --data.eval-path dev.jsonl
    python -m jaxlm evaluate runs/summarize_scratch test.jsonl

The files are json lines, csv or parquet with the columns `source` and `target`.  --task.source and --task.target select
other columns, and --task.references adds columns with further reference summaries.  A tokenizer is trained on the
training part.

Hardware, time, score   not measured yet

Without pre-training, a model learns fluent summaries from several hundred thousand pairs (Rush et al. 2015 used 4
million).  For a few thousand pairs, as in SciTLDR, start from a pretrained model: `summarize_scitldr.py`.
"""

from dataclasses import replace

from jaxlm import DataConfig, Decoding, OptimizerConfig, RunConfig, Seq2Seq, TokenizerConfig
from jaxlm.families import PRESETS


def config() -> RunConfig:
    return RunConfig(
        model=replace(PRESETS["transformer-tiny"], vocabulary=8000, max_length=512, dropout=0.1),
        task=Seq2Seq(
            source_length=512,
            scored_as="summary",
            empty="drop",
            label_smoothing=0.1,
            generated=200,
            decoding=Decoding(max_new_tokens=60, min_new_tokens=5, temperature=0.0, beams=4),
        ),
        data=DataConfig(length=128),
        tokenizer=TokenizerConfig(train="bpe"),
        optimizer=OptimizerConfig(rate=1e-3, schedule="cosine", warmup=0.05, final=0.01, weight_decay=0.0, beta2=0.98),
        batch=32,
        epochs=10,
        log_every=50,
    )
