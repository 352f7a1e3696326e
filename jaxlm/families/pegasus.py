"""Pegasus (Zhang et al. 2020) for summaries: a Marian whose norms come first."""

from __future__ import annotations

from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.families import bart, marian
from jaxlm.hub.convert import Key, key_conversion

_FIXED: dict[str, Any] = marian.FIXED | {"norm_place": "pre"}
_START = Key("decoder_start_token_id", "start_token", 0)
_FROM_HF, _TO_HF = key_conversion((*bart.KEYS, _START), _FIXED, bart.ONLY)

_LARGE: dict[str, Any] = {"layers": 16, "width": 1024, "heads": 16, "vocabulary": 96103, "max_length": 1024}
_LARGE |= {"activation": "relu", "scale_embeddings": True, "dropout": 0.1, "attention_dropout": 0.1, "start_token": 0}

FAMILY = marian.FAMILY._replace(
    presets={"pegasus-large": ModelConfig(**_FIXED | _LARGE | {"mlp_dropout": 0.1, "classes_dropout": 0.0})},
    heads={("lm",): "PegasusForConditionalGeneration", (): "PegasusModel"},
    config_from_hf=_FROM_HF,
    config_to_hf=_TO_HF,
)
