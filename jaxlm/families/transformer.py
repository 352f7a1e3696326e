"""The encoder-decoder of Vaswani et al. (2017), table 3, and a tiny model of the same kind.

No family supports the first two, which are saved in jaxlm's own format. The tiny model has a start token and a bias of
the logits like Marian's models, and is saved as one of them.
"""

from __future__ import annotations

from typing import Any

from jaxlm.config import ENCODER_BIASES, ModelConfig


def _transformer(width: int, heads: int, dropout: float, **fields: Any) -> ModelConfig:
    shared: dict[str, Any] = {
        "structure": "encoder_decoder",
        "heads_on_top": ("lm",),
        "vocabulary": 37000,  # for English-German
        "layers": 6,
        "activation": "relu",
        "norm_place": "post",
        "positions": "sinusoidal",
        "scale_embeddings": True,
        "initial_std": width**-0.5,  # so that scaled embeddings have unit variance
        "scale_residual_init": False,
    }
    return ModelConfig(**shared | {"width": width, "heads": heads, "dropout": dropout} | fields)


PRESETS = {
    "transformer-base": _transformer(512, 8, 0.1),
    "transformer-big": _transformer(1024, 16, 0.3),
    # From Wu et al. (2021), "Good for misconceived reasons", for Multi30k.
    "transformer-tiny": _transformer(
        128, 4, 0.3, layers=4, mlp_width=256, vocabulary=10000, start_token=0, biases=(*ENCODER_BIASES, "lm")
    ),
}
