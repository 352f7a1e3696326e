"""Decoders with routed experts: Mixtral (Jiang et al. 2024), Qwen2-MoE (with an expert of all tokens) and Qwen3-MoE."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.config.ranges import MAX_INT
from jaxlm.errors import UserError
from jaxlm.families import llama
from jaxlm.hub.convert import Key, Rule, key_conversion, linear, norm, projection, shortest
from jaxlm.hub.model_files import JsonObject
from jaxlm.nn.layer_parts import parts_of

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
    Key("intermediate_size", "mlp_width"),
    Key("moe_intermediate_size", "expert_width"),
    Key("num_experts", "experts"),
    Key("num_experts_per_tok", "experts_per_token"),
    Key("norm_topk_prob", "normalize_experts", False),
)
_QWEN_2_FROM_HF, _QWEN_2_TO_HF = key_conversion(
    (*_QWEN_KEYS, Key("shared_expert_intermediate_size", "shared_expert_width", 5632)),
    _FIXED | {"shared_expert_gate": True},
    {},
)
_QWEN_3_FROM_HF, _QWEN_3_TO_HF = key_conversion(_QWEN_KEYS, _FIXED | {"query_key_norm": True}, {})


def _mixtral_from_hf(hf: dict[str, Any]) -> ModelConfig:
    config = _MIXTRAL_FROM_HF({"num_key_value_heads": 8} | hf)
    return dataclasses.replace(config, **llama.one_rotary_from_hf(hf, 1e6), **llama.window_from_hf(hf))


def _mixtral_to_hf(config: ModelConfig) -> dict[str, Any]:
    return _MIXTRAL_TO_HF(config) | llama.one_rotary_to_hf(config) | llama.window_to_hf(config)


def with_experts(hf: dict[str, Any]) -> dict[str, Any]:
    """Returns the values with the number of experts under the key of the published files.

    transformers 5 writes it under the key of Mixtral.
    """
    return ({"num_experts": hf["num_local_experts"]} if "num_local_experts" in hf else {}) | hf


def layers_from_hf(config: ModelConfig, hf: dict[str, Any]) -> dict[str, Any]:
    """Returns the config fields for the feed-forward layers: every n-th layer has experts, except those in a list."""
    values = JsonObject(hf, "config.json")
    step, dense = values.integer("decoder_sparse_step", 1, 1, MAX_INT), hf.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not set(dense) <= set(range(config.layers)):
        raise UserError(f"config.json has mlp_only_layers {dense}; it must be a list of layers below {config.layers}")
    layers = ["gated" if n in dense or (n + 1) % step else "experts" for n in range(config.layers)]
    if "gated" in layers:
        return {"feed_forwards": shortest(layers)}
    return {"mlp_width": config.expert_F, "expert_width": None}


def layers_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `layers_from_hf`."""
    layers = [parts.feed_forward for parts in parts_of(config)]
    step = layers.index("experts") + 1 if "experts" in layers else 1
    if any((n + 1) % step and name == "experts" for n, name in enumerate(layers)):
        step = 1
    dense = [n for n, name in enumerate(layers) if name == "gated" and (n + 1) % step == 0]
    return {"decoder_sparse_step": step, "mlp_only_layers": dense}


def _qwen2_from_hf(hf: dict[str, Any]) -> ModelConfig:
    hf = with_experts(hf)
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
    config = _QWEN_2_FROM_HF({"num_key_value_heads": 16, "intermediate_size": 5632} | hf)
    # Of the layers below max_window_layers, every second one is local, from the first.
    last = hf.get("max_window_layers", 28)
    default = ["local" if window is not None and i % 2 == 0 and i < last else "global" for i in range(config.layers)]
    fields = llama.kinds_from_hf(hf, default) | {"window": window or 0}
    fields["biases"] = ("query_key_value",) if hf.get("qkv_bias", True) else ()
    fields |= layers_from_hf(config, hf)
    return dataclasses.replace(config, **llama.one_rotary_from_hf(hf), **fields)


def _qwen2_to_hf(config: ModelConfig) -> dict[str, Any]:
    local = "local" in config.layer_kinds
    windows = {"use_sliding_window": local, "sliding_window": config.window if local else None}
    biases = {"qkv_bias": "query_key_value" in config.biases}
    own = windows | biases | layers_to_hf(config)
    if not config.has_mixed_layers:  # the key has no effect
        own["intermediate_size"] = config.shared_expert_width
    return _QWEN_2_TO_HF(config) | llama.one_rotary_to_hf(config) | llama.kinds_to_hf(config) | own


def _qwen3_from_hf(hf: dict[str, Any]) -> ModelConfig:
    hf = with_experts(hf)
    config = _QWEN_3_FROM_HF({"num_key_value_heads": 4, "intermediate_size": 6144} | hf)
    window = llama.window_from_hf(hf, 4096) if hf.get("use_sliding_window") else {}
    fields = llama.one_rotary_from_hf(hf) | llama.attention_biases(hf) | window | layers_from_hf(config, hf)
    return dataclasses.replace(config, **fields)


def _qwen3_to_hf(config: ModelConfig) -> dict[str, Any]:
    window = llama.window_to_hf(config)
    own: dict[str, Any] = {"use_sliding_window": window["sliding_window"] is not None}
    own |= {"attention_bias": "out" in config.biases} | layers_to_hf(config)
    return _QWEN_3_TO_HF(config) | llama.one_rotary_to_hf(config) | window | own


_LAYER, _OURS = "model.layers.{i}.", "decoder/layers/"
_BODY = (
    *(rule for rule in llama.BODY if "/mlp/" not in rule.leaves[0]),
    *norm(_LAYER + "post_attention_layernorm", _OURS + "mlp_norm"),
)


def experts(hf: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Returns the rules for the router and the experts, whose names in the file follow the prefix `hf`."""
    names = {gate: "gate", up: "up", down: "down"}
    return (
        Rule(f"{_LAYER}{hf}gate.weight", _OURS + "mlp/router", linear),
        *(
            Rule(f"{_LAYER}{hf}experts.{{e}}.{theirs}.weight", f"{_OURS}mlp/experts/{ours}", linear)
            for theirs, ours in names.items()
        ),
    )


# The layers without experts in a model with experts.
DENSE = tuple(
    rule
    for name in ("gate", "up", "down")
    for rule in projection(f"{_LAYER}mlp.{name}_proj", f"{_OURS}gated_mlp/{name}")
)
_QWEN_RULES = (
    *_BODY,
    *DENSE,
    *experts("mlp.", "gate_proj", "up_proj", "down_proj"),
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
)._replace(rules=(*_BODY, *experts("block_sparse_moe.", "w1", "w3", "w2")))
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
