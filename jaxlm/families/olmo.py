"""OLMo 2 (OLMo Team 2025): a Llama with norms after the sub-layers, and normalised queries and keys."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.families import llama
from jaxlm.hub.convert import key_conversion, norm

_CHANGES: dict[str, Any] = {"norm_place": "out", "query_key_norm": True, "query_key_norm_whole": True}
_FROM_HF, _TO_HF = key_conversion((*llama.KEYS, llama.ACTIVATION, llama.TIED), llama.FIXED | _CHANGES, {})


def _config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    hf = {"rms_norm_eps": 1e-5} | hf
    return dataclasses.replace(_FROM_HF(hf), **llama.one_rotary_from_hf(hf), **llama.attention_biases(hf))


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return _TO_HF(config) | llama.one_rotary_to_hf(config) | {"attention_bias": "out" in config.biases}


_LAYER, _OURS = "model.layers.{i}.", "decoder/layers/"
_PUBLISHED = _CHANGES | {"vocabulary": 100352, "rotary_base": 500000.0, "norm_epsilon": 1e-6}

FAMILY = llama.variant(
    "Olmo2",
    {
        "olmo-2-1b": llama.preset(16, 2048, 8192, 16, **_PUBLISHED),
        "olmo-2-7b": llama.preset(32, 4096, 11008, 32, **_PUBLISHED),
        "olmo-2-13b": llama.preset(40, 5120, 13824, 40, **_PUBLISHED),
        "olmo-2-32b": llama.preset(64, 5120, 27648, 40, 8, **_PUBLISHED),
    },
    _config_from_hf,
    _config_to_hf,
)._replace(
    rules=(
        *llama.BODY,
        *norm(_LAYER + "post_attention_layernorm", _OURS + "attention_out_norm"),
        *norm(_LAYER + "post_feedforward_layernorm", _OURS + "mlp_out_norm"),
    )
)
