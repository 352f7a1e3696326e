"""Decoders with routed experts: Mixtral (Jiang et al. 2024), Qwen2-MoE (with an expert of all tokens) and Qwen3-MoE."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError
from jaxlm.families import llama
from jaxlm.hub.convert import Key, Rule, key_conversion, linear, norm, projection

_FIXED = llama.FIXED | {"feed_forward": "experts"}
_COMMON = (
    *(key for key in llama.KEYS if key.ours != "mlp_width"),
    llama.ACTIVATION,
    llama.TIED,
    Key("router_aux_loss_coef", "balance_loss", 0.001),
)
_MIXTRAL_FROM_HF, _MIXTRAL_TO_HF = key_conversion(
    (
        *_COMMON,
        Key("intermediate_size", "mlp_width", 14336),
        Key("num_local_experts", "experts", 8),
        Key("num_experts_per_tok", "experts_per_token", 2),
    ),
    _FIXED,
    {},
)
_QWEN_KEYS = (
    *_COMMON,
    Key("moe_intermediate_size", "mlp_width"),
    Key("num_experts", "experts"),
    Key("num_experts_per_tok", "experts_per_token"),
    Key("norm_topk_prob", "normalize_experts", False),
)
_QWEN_2_FROM_HF, _QWEN_2_TO_HF = key_conversion(
    (*_QWEN_KEYS, Key("shared_expert_intermediate_size", "shared_expert_width", 5632)),
    _FIXED | {"shared_expert_gate": True},
    {"decoder_sparse_step": 1},
)
_QWEN_3_FROM_HF, _QWEN_3_TO_HF = key_conversion(
    _QWEN_KEYS, _FIXED | {"query_key_norm": True}, {"decoder_sparse_step": 1}
)


def _mixtral_from_hf(hf: dict[str, Any]) -> ModelConfig:
    config = _MIXTRAL_FROM_HF({"num_key_value_heads": 8} | hf)
    return dataclasses.replace(config, **llama.one_rotary_from_hf(hf, 1e6), **llama.window_from_hf(hf))


def _mixtral_to_hf(config: ModelConfig) -> dict[str, Any]:
    return _MIXTRAL_TO_HF(config) | llama.one_rotary_to_hf(config) | llama.window_to_hf(config)


def _with_experts(hf: dict[str, Any]) -> dict[str, Any]:
    """Returns the values with the number of experts under the key of the published files.

    transformers 5 writes it under the key of Mixtral.

    Raises:
      UserError: if some layers have no experts.
    """
    if hf.get("mlp_only_layers"):
        raise UserError(
            f"config.json has mlp_only_layers {hf['mlp_only_layers']}, layers without experts; only models with "
            f"experts in every layer are supported: choose another model"
        )
    return ({"num_experts": hf["num_local_experts"]} if "num_local_experts" in hf else {}) | hf


def _qwen2_from_hf(hf: dict[str, Any]) -> ModelConfig:
    hf = _with_experts(hf)
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
    config = _QWEN_2_FROM_HF({"num_key_value_heads": 16} | hf)
    # Of the layers below max_window_layers, every second one is local, from the first.
    last = hf.get("max_window_layers", 28)
    default = ["local" if window is not None and i % 2 == 0 and i < last else "global" for i in range(config.layers)]
    fields = llama.kinds_from_hf(hf, default) | {"window": window or 0}
    fields["biases"] = ("query_key_value",) if hf.get("qkv_bias", True) else ()
    return dataclasses.replace(config, **llama.one_rotary_from_hf(hf), **fields)


def _qwen2_to_hf(config: ModelConfig) -> dict[str, Any]:
    local = "local" in config.layer_kinds
    windows = {"use_sliding_window": local, "sliding_window": config.window if local else None}
    biases = {"qkv_bias": "query_key_value" in config.biases}
    sizes = {"intermediate_size": config.shared_expert_width, "mlp_only_layers": []}
    return _QWEN_2_TO_HF(config) | llama.one_rotary_to_hf(config) | llama.kinds_to_hf(config) | windows | biases | sizes


def _qwen3_from_hf(hf: dict[str, Any]) -> ModelConfig:
    hf = _with_experts(hf)
    config = _QWEN_3_FROM_HF({"num_key_value_heads": 4} | hf)
    window = llama.window_from_hf(hf, 4096) if hf.get("use_sliding_window") else {}
    return dataclasses.replace(config, **llama.one_rotary_from_hf(hf), **llama.attention_biases(hf), **window)


def _qwen3_to_hf(config: ModelConfig) -> dict[str, Any]:
    window = llama.window_to_hf(config)
    own: dict[str, Any] = {"use_sliding_window": window["sliding_window"] is not None, "mlp_only_layers": []}
    own |= {"attention_bias": "out" in config.biases, "intermediate_size": config.F}
    return _QWEN_3_TO_HF(config) | llama.one_rotary_to_hf(config) | window | own


_LAYER, _OURS = "model.layers.{i}.", "decoder/layers/"
_BODY = (
    *(rule for rule in llama.BODY if "/mlp/" not in rule.leaves[0]),
    *norm(_LAYER + "post_attention_layernorm", _OURS + "mlp_norm"),
)


def _experts(hf: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Returns the rules for the router and the experts, whose names in the file follow the prefix `hf`."""
    names = {gate: "gate", up: "up", down: "down"}
    return (
        Rule(f"{_LAYER}{hf}gate.weight", _OURS + "mlp/router", linear),
        *(
            Rule(f"{_LAYER}{hf}experts.{{e}}.{theirs}.weight", f"{_OURS}mlp/experts/{ours}", linear)
            for theirs, ours in names.items()
        ),
    )


_QWEN_RULES = (
    *_BODY,
    *_experts("mlp.", "gate_proj", "up_proj", "down_proj"),
    *(
        rule
        for name in ("gate", "up", "down")
        for rule in projection(f"{_LAYER}mlp.shared_expert.{name}_proj", f"{_OURS}mlp/shared/{name}")
    ),
    Rule(_LAYER + "mlp.shared_expert_gate.weight", _OURS + "mlp/shared_gate/kernel", linear),
)


_SPARSE: dict[str, Any] = {"feed_forward": "experts", "balance_loss": 0.001, "max_length": 32768, "rotary_base": 1e6}


FAMILY = llama.variant(
    "Mixtral",
    {
        "mixtral-8x7b": llama.preset(32, 4096, 14336, 32, 8, **_SPARSE, experts=8),
        "mixtral-8x22b": llama.preset(56, 6144, 16384, 48, 8, **_SPARSE | {"max_length": 65536}, experts=8),
    },
    _mixtral_from_hf,
    _mixtral_to_hf,
)._replace(rules=(*_BODY, *_experts("block_sparse_moe.", "w1", "w3", "w2")))
_QWEN = _SPARSE | {"vocabulary": 151936, "norm_epsilon": 1e-6}
_QWEN_2 = _QWEN | {"biases": ("query_key_value",), "experts": 60, "experts_per_token": 4, "normalize_experts": False}
_QWEN_2 |= {"shared_expert_width": 5632, "shared_expert_gate": True, "max_length": 8192}
_QWEN_3 = _QWEN | {"query_key_norm": True, "head_width": 128, "experts": 128, "experts_per_token": 8}
_QWEN_3 |= {"max_length": 40960}
QWEN_2 = llama.variant(
    "Qwen2Moe",
    {"qwen1.5-moe-a2.7b": llama.preset(24, 2048, 1408, 16, 16, **_QWEN_2)},
    _qwen2_from_hf,
    _qwen2_to_hf,
)._replace(rules=_QWEN_RULES)
QWEN_3 = llama.variant(
    "Qwen3Moe",
    {
        "qwen3-30b-a3b": llama.preset(48, 2048, 768, 32, 4, **_QWEN_3),
        "qwen3-235b-a22b": llama.preset(94, 4096, 1536, 64, 4, **_QWEN_3),
    },
    _qwen3_from_hf,
    _qwen3_to_hf,
)._replace(rules=_QWEN_RULES)
