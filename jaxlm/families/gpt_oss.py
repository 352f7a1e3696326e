"""gpt-oss (OpenAI 2025): a decoder with experts that have biases, clamped gates, and attention sinks.

Every second layer has local attention. The published files store the experts in MXFP4.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.families import decoder, llama
from jaxlm.hub.convert import Key, Rule, interleaved, key_conversion, linear, norm, projection

_FIXED = llama.FIXED | {"feed_forward": "experts", "activation": "gelu_quick", "attention_sinks": True}
_FIXED |= {"expert_offset": 1.0}
_DEFAULTS = {"num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}
_ROTARY = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
_ROTARY |= {"original_max_position_embeddings": 4096}
_FROM_HF, _TO_HF = key_conversion(
    (
        *llama.KEYS,
        llama.TIED,
        Key("num_local_experts", "experts", 128),
        Key("num_experts_per_tok", "experts_per_token", 4),
        Key("swiglu_limit", "expert_limit", 7.0),
        Key("router_aux_loss_coef", "balance_loss", 0.001),
    ),
    _FIXED,
    {"swiglu_alpha": 1.702, "hidden_act": "silu"},
)


def _config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    hf = _DEFAULTS | hf
    if "num_experts" in hf:
        hf = {"num_local_experts": hf["num_experts"]} | hf
    if not (hf.get("rope_parameters") or hf.get("rope_scaling")):
        hf["rope_parameters"] = _ROTARY
    config = _FROM_HF(hf)
    default = ["global" if i % 2 else "local" for i in range(config.layers)]
    fields = llama.one_rotary_from_hf(hf, 150000.0) | llama.kinds_from_hf(hf, default)
    fields["window"] = hf.get("sliding_window", 128) or 0
    biases = llama.attention_biases({"attention_bias": True} | hf)["biases"]
    return dataclasses.replace(config, **fields, biases=(*biases, "experts"))


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    own = {"attention_bias": "out" in config.biases, "sliding_window": config.window or None}
    return _TO_HF(config) | llama.one_rotary_to_hf(config) | llama.kinds_to_hf(config) | own


_LAYER, _OURS = "model.layers.{i}.", "decoder/layers/"
_EXPERTS, _OUR_EXPERTS = _LAYER + "mlp.experts.", _OURS + "mlp/experts/"
_PRESET: dict[str, Any] = _FIXED | {"vocabulary": 201088, "max_length": 131072, "head_width": 64, "window": 128}
_PRESET |= {"layer_kinds": ("local", "global"), "biases": ("query_key_value", "out", "experts"), "expert_limit": 7.0}
_PRESET |= {"experts_per_token": 4, "balance_loss": 0.001, "rotary_base": 150000.0, "rotary_scaling": "yarn"}
_PRESET |= {"rotary_factor": 32.0, "rotary_length": 4096, "rotary_low": 1.0, "rotary_high": 32.0}
_PRESET |= {"rotary_truncate": False, "rotary_attention": 1.3465735902799727}

FAMILY = llama.variant(
    "GptOss",
    {
        "gpt-oss-20b": llama.preset(24, 2880, 2880, 64, 8, **_PRESET, experts=32),
        "gpt-oss-120b": llama.preset(36, 2880, 2880, 64, 8, **_PRESET, experts=128),
    },
    _config_from_hf,
    _config_to_hf,
)._replace(
    heads=decoder.heads("GptOss", "lm", "classes", "tokens"),
    rules=(
        *(rule for rule in llama.BODY if "/mlp/" not in rule.leaves[0]),
        *norm(_LAYER + "post_attention_layernorm", _OURS + "mlp_norm"),
        Rule(_LAYER + "self_attn.sinks", _OURS + "attention/sinks"),
        Rule(_LAYER + "mlp.router.weight", _OURS + "mlp/router", linear),
        Rule(_LAYER + "mlp.router.bias", _OURS + "mlp/router_bias"),
        Rule(_EXPERTS + "gate_up_proj", (_OUR_EXPERTS + "gate", _OUR_EXPERTS + "up"), interleaved),
        Rule(_EXPERTS + "gate_up_proj_bias", (_OUR_EXPERTS + "gate_bias", _OUR_EXPERTS + "up_bias"), interleaved),
        Rule(_EXPERTS + "down_proj", _OUR_EXPERTS + "down"),
        Rule(_EXPERTS + "down_proj_bias", _OUR_EXPERTS + "down_bias"),
        *projection("score", "tokens_head/out"),
    ),
)
