"""M2M-100 (Fan et al. 2021) and NLLB (NLLB Team 2022) for translation: a BART whose norms come first, with sinusoidal
positions that skip padding."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import ENCODER_BIASES, ModelConfig
from jaxlm.families import bart, marian
from jaxlm.hub.convert import Key, key_conversion

_FIXED: dict[str, Any] = marian.FIXED | {"norm_place": "pre", "sinusoidal_to_base": True, "biases": ENCODER_BIASES}
_DEFAULTS = {"activation_function": "relu", "scale_embedding": True, "attention_dropout": 0.1}
_START = Key("decoder_start_token_id", "start_token", 2)
_FROM_HF, _TO_HF = key_conversion((*bart.KEYS, _START), _FIXED, bart.ONLY)


def _config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    # Positions of tokens start at 1 + padding_token; padding has the position padding_token.
    padding = 1 if hf.get("pad_token_id") is None else hf["pad_token_id"]
    return dataclasses.replace(_FROM_HF(_DEFAULTS | hf), padding_token=padding, position_offset=padding + 1)


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return _TO_HF(config) | {"pad_token_id": max(0, config.position_offset - 1)}


def _m2m_100(layers: int, width: int, mlp_width: int, **fields: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"layers": layers, "width": width, "mlp_width": mlp_width, "heads": 16}
    published: dict[str, Any] = {"vocabulary": 128112, "max_length": 1024, "activation": "relu", "start_token": 2}
    published |= {"scale_embeddings": True, "dropout": 0.1, "attention_dropout": 0.1, "classes_dropout": 0.0}
    published |= {"position_offset": 2, "padding_token": 1}
    return ModelConfig(**_FIXED | published | sizes | fields)


FAMILY = marian.FAMILY._replace(
    presets={
        "m2m100-418m": _m2m_100(12, 1024, 4096),
        "nllb-200-distilled-600m": _m2m_100(12, 1024, 4096, vocabulary=256206),
        "nllb-200-1.3b": _m2m_100(24, 1024, 8192, vocabulary=256206),
    },
    heads={("lm",): "M2M100ForConditionalGeneration", (): "M2M100Model"},
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    buffers=("model.encoder.embed_positions.weights", "model.decoder.embed_positions.weights"),
)
