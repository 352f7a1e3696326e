"""MENYO-20k: English to Yoruba, from ten thousand sentence pairs alone (Adelani et al. 2021).

    python train.py configs/translate_lowresource.py --data.path train.tsv --data.eval-path dev.tsv
    python -m jaxlm evaluate runs/translate_lowresource test.tsv

The files are the original ones: columns English and Yoruba divided by tabs, with quotes; gz as it is.  Yoruba is
written with its diacritics, and scored with them.
"""

from jaxlm import DataConfig, Decoding, ModelConfig, OptimizerConfig, RunConfig, Seq2Seq, TokenizerConfig


def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            structure="encoder_decoder",
            vocabulary=4000,
            max_length=256,
            width=128,
            layers=4,
            heads=4,
            mlp_width=256,
            activation="relu",
            norm_place="post",
            positions="sinusoidal",
            scale_embeddings=True,
            start_token=0,  # <pad>, as Marian's models have it
            biases=("query_key_value", "out", "mlp", "norm", "lm"),
            dropout=0.3,
            initial_std=0.08,  # about 1 / sqrt(width)
            scale_residual_init=False,
        ),
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
        optimizer=OptimizerConfig(rate=4e-3, schedule="inverse_sqrt", warmup=400, weight_decay=0.0, beta2=0.98),
        batch=16,
        epochs=30,
        log_every=50,
    )
