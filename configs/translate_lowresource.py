"""MENYO-20k: English to Yoruba, from ten thousand sentence pairs alone (Adelani et al. 2021).

    python train.py configs/translate_lowresource.py --data.path train.tsv --data.eval-path dev.tsv
    python -m jaxlm evaluate runs/translate_lowresource test.tsv

The files are the original ones: columns English and Yoruba divided by tabs, with quotes; gz as it is.  Yoruba is
written with its diacritics, and scored with them.
"""

from dataclasses import replace

from jaxlm import DataConfig, Decoding, OptimizerConfig, RunConfig, Seq2Seq, TokenizerConfig
from jaxlm.families import PRESETS


def config() -> RunConfig:
    return RunConfig(
        model=replace(PRESETS["transformer-tiny"], vocabulary=4000, dropout=0.3),
        task=Seq2Seq(
            source="English",
            target="Yoruba",
            empty="drop",
            label_smoothing=0.1,
            generated=200,
            decoding=Decoding(max_new_tokens=120, temperature=0.0, beams=5),
        ),
        data=DataConfig(format="quoted_tsv", length=256),
        tokenizer=TokenizerConfig(train="bpe"),
        optimizer=OptimizerConfig(rate=4e-3, schedule="cosine", warmup=0.1, final=0.01, weight_decay=0.0, beta2=0.98),
        batch=16,
        epochs=30,
        log_every=50,
    )
