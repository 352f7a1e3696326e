"""Multi30k: captions of pictures, English to German (Elliott et al. 2016), by a Transformer-Tiny from scratch.

    python train.py configs/translate_multi30k.py --data.path train.en --data.target-path train.de \
        --data.eval-path val.en --data.eval-target-path val.de
    python -m jaxlm evaluate runs/translate_multi30k test.en --data.target-path test.de

Line n of one file goes with line n of the other; gz as it is.  Sizes are those of Wu et al. (2021), "Good for
misconceived reasons": 4 + 4 layers of width 128; one vocabulary for both languages.
"""

from jaxlm import DataConfig, Decoding, ModelConfig, OptimizerConfig, RunConfig, Seq2Seq, TokenizerConfig


def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            structure="encoder_decoder",
            vocabulary=6000,
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
            dropout=0.1,
            initial_std=0.08,  # about 1 / sqrt(width)
            scale_residual_init=False,
        ),
        task=Seq2Seq(
            label_smoothing=0.1,
            generated=200,
            decoding=Decoding(max_new_tokens=60, temperature=0.0, beams=5),
        ),
        data=DataConfig(text="source", length=256),
        tokenizer=TokenizerConfig(train="bpe"),
        optimizer=OptimizerConfig(rate=4e-3, schedule="inverse_sqrt", warmup=500, weight_decay=0.0, beta2=0.98),
        batch=16,
        epochs=25,
        log_every=50,
    )
