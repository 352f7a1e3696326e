"""Phi-3 and Phi-4 (Abdin et al. 2024): a Llama with one tensor of queries, keys and values, and one of gate and up.

Their longrope scaling rotates by the length of the sequence. Phi-4-mini rotates a part of each head."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.families import decoder, llama
from jaxlm.hub.convert import (
    Family,
    Key,
    Rule,
    key_conversion,
    linear,
    linear_gate_up,
    linear_grouped_query_key_value,
    linear_heads_in,
    norm,
    projection,
)

_FIXED = llama.FIXED | {"embedding_dropout": 0.0, "classes_dropout": 0.0}
_KEYS = (
    *llama.KEYS,
    llama.ACTIVATION,
    llama.TIED,
    Key("resid_pdrop", "dropout", 0.0),
    Key("classifier_dropout", "tokens_dropout", 0.1),
)
_FROM_HF, _TO_HF = key_conversion(_KEYS, _FIXED, {})
_DEFAULTS = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}


def _config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    hf = _DEFAULTS | hf
    config = _FROM_HF(hf)
    rotary = llama.one_rotary_from_hf(hf, head_width=config.C)
    return dataclasses.replace(config, **rotary, **llama.window_from_hf(hf))


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    values = _TO_HF(config) | llama.one_rotary_to_hf(config, partial=True) | llama.window_to_hf(config)
    trained = config.rotary_length if config.rotary_scaling == "longrope" else config.max_length
    return values | {"original_max_position_embeddings": trained}


_LAYER, _OURS = "model.layers.{i}.", "decoder/layers/"
_INPUTS = tuple(f"{_OURS}attention/{name}/kernel" for name in ("query", "key", "value"))
_PHI_3: dict[str, Any] = {"max_length": 4096, "vocabulary": 32064, "layer_kinds": ("local",), "window": 2047}
_PHI_4: dict[str, Any] = {"max_length": 16384, "vocabulary": 100352, "rotary_base": 250000.0}

FAMILY = Family(
    presets={
        "phi-3-mini": llama.preset(32, 3072, 8192, 32, **_PHI_3),
        "phi-3-medium": llama.preset(40, 5120, 17920, 40, 10, **_PHI_3),
        "phi-4": llama.preset(40, 5120, 17920, 40, 10, **_PHI_4),
    },
    rules=(
        Rule("model.embed_tokens.weight", "embeddings/tokens"),
        *norm(_LAYER + "input_layernorm", _OURS + "attention_norm"),
        Rule(_LAYER + "self_attn.qkv_proj.weight", _INPUTS, linear_grouped_query_key_value),
        *projection(_LAYER + "self_attn.o_proj", _OURS + "attention/out", linear_heads_in),
        *norm(_LAYER + "post_attention_layernorm", _OURS + "mlp_norm"),
        Rule(_LAYER + "mlp.gate_up_proj.weight", (_OURS + "mlp/gate/kernel", _OURS + "mlp/up/kernel"), linear_gate_up),
        *projection(_LAYER + "mlp.down_proj", _OURS + "mlp/down"),
        *norm("model.norm", "decoder/norm"),
        Rule("lm_head.weight", "lm_head/kernel"),
        Rule("score.weight", "classes_head/out/kernel", linear),
        *projection("score", "tokens_head/out"),
    ),
    heads=decoder.heads("Phi3", "lm", "classes", "tokens"),
    prefix="model.",
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    buffers=llama.FAMILY.buffers,
    copies=llama.FAMILY.copies,
)
