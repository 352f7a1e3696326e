"""Granite 3 (Granite Team, IBM, 2024): a Llama with multipliers of embeddings, sub-layers, scores and logits."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.families import llama
from jaxlm.hub.convert import Key, key_conversion

_KEYS = (
    *llama.KEYS,
    llama.ACTIVATION,
    llama.TIED,
    Key("embedding_multiplier", "embedding_scale", 1.0),
    Key("residual_multiplier", "residual_scale", 1.0),
    Key("attention_multiplier", "attention_scale", 1.0),
    Key("logits_scaling", "logit_divisor", 1.0),
)
_FROM_HF, _TO_HF = key_conversion(_KEYS, llama.FIXED, {})


def _config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    biases = llama.attention_biases(hf)["biases"] + (("mlp",) if hf.get("mlp_bias") else ())
    return dataclasses.replace(_FROM_HF(hf), biases=biases, **llama.one_rotary_from_hf(hf))


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    biases = {"attention_bias": "out" in config.biases, "mlp_bias": "mlp" in config.biases}
    return _TO_HF(config) | llama.one_rotary_to_hf(config) | biases


_3_1: dict[str, Any] = {"vocabulary": 49155, "max_length": 131072, "tied_embeddings": True, "embedding_scale": 12.0}
_3_1 |= {"residual_scale": 0.22, "rotary_base": 5e6}

FAMILY = llama.variant(
    "Granite",
    {
        "granite-3.1-2b": llama.preset(40, 2048, 8192, 32, 8, **_3_1, attention_scale=0.015625, logit_divisor=8.0),
        "granite-3.1-8b": llama.preset(40, 4096, 12800, 32, 8, **_3_1, attention_scale=0.0078125, logit_divisor=16.0),
    },
    _config_from_hf,
    _config_to_hf,
)._replace(heads={("lm",): "GraniteForCausalLM", (): "GraniteModel"})
