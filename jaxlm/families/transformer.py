"""The encoder-decoder of Vaswani et al. (2017), table 3.  No other format has it: it is saved in jaxlm's own."""

from __future__ import annotations

from jaxlm.config import ModelConfig


def _transformer(width: int, heads: int, dropout: float) -> ModelConfig:
    return ModelConfig(
        structure="encoder_decoder",
        heads_on_top=("lm",),
        vocabulary=37000,  # of English-German
        width=width,
        layers=6,
        heads=heads,
        activation="relu",
        norm_place="post",
        positions="sinusoidal",
        scale_embeddings=True,
        dropout=dropout,
        initial_std=width**-0.5,  # so that scaled embeddings have unit variance
        scale_residual_init=False,
    )


PRESETS = {"transformer-base": _transformer(512, 8, 0.1), "transformer-big": _transformer(1024, 16, 0.3)}
