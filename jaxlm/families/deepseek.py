"""DeepSeek-V2 and DeepSeek-V3 (DeepSeek-AI 2024): latent attention, and experts after the first layers.

V2 chooses experts by a softmax over all of them, V3 by sigmoids with a correction of the choice. The module that V3
has after its last layer, which predicts further tokens, is kept when a model is saved, but not used.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxlm.config import MAX_LAYERS, ModelConfig
from jaxlm.config.ranges import MAX_INT
from jaxlm.errors import UserError, suggestion
from jaxlm.families import decoder, llama, mixtral
from jaxlm.hub.convert import (
    Key,
    Rule,
    check_only,
    key_conversion,
    latent_key_value,
    latent_key_value_down,
    latent_out,
    latent_query,
    linear,
    norm,
    projection,
    resolved,
)
from jaxlm.hub.model_files import JsonObject
from jaxlm.nn.layer_parts import parts_of

_FIXED = llama.FIXED | {"mixer": "latent", "feed_forward": "experts"}
_V2_FIXED = _FIXED | {"normalize_experts": False}
_V3_FIXED = _FIXED | {"router_scores": "sigmoid", "router_correction": True}
_KEYS = (
    *(key for key in llama.KEYS if key.ours != "head_width"),
    llama.ACTIVATION,
    llama.TIED,
    Key("kv_lora_rank", "key_value_rank", 512),
    Key("q_lora_rank", "query_rank", 1536),
    Key("qk_rope_head_dim", "rotary_width", 64),
    Key("v_head_dim", "value_width", 128),
    Key("moe_intermediate_size", "expert_width"),
    Key("n_routed_experts", "experts"),
    Key("num_experts_per_tok", "experts_per_token"),
    Key("routed_scaling_factor", "expert_scale", 1.0),
)
_V2_FROM_HF, _V2_TO_HF = key_conversion(
    _KEYS, _V2_FIXED, {"attention_bias": False, "mlp_bias": False, "norm_topk_prob": False}
)
_V3_FROM_HF, _V3_TO_HF = key_conversion(
    (*_KEYS, Key("norm_topk_prob", "normalize_experts", True)),
    _V3_FIXED,
    {"attention_bias": False, "rope_interleave": True},
)
_V2_DEFAULTS = {"intermediate_size": 11008, "moe_intermediate_size": 1407, "n_routed_experts": 64}
_V2_DEFAULTS |= {"n_shared_experts": 2, "first_k_dense_replace": 0}
_V3_DEFAULTS: dict[str, Any] = {"intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256}
_V3_DEFAULTS |= {"n_shared_experts": 1, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5}
_V3_DEFAULTS |= {"num_experts_per_tok": 8, "max_position_embeddings": 4096, "n_group": 8, "topk_group": 4}
_METHODS = ("greedy", "group_limited_greedy")  # of V2; the second one chooses groups of experts first


def _defaults(hf: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Returns the values with defaults, and with the number of experts under the key of the published files."""
    check_only(hf, {"moe_layer_freq": 1})
    other = next((hf[key] for key in ("num_local_experts", "num_experts") if key in hf), None)
    return defaults | ({} if other is None else {"n_routed_experts": other}) | hf


def _fields_from_hf(config: ModelConfig, hf: dict[str, Any]) -> dict[str, Any]:
    """Returns the config fields that do not correspond to one key each."""
    values = JsonObject(hf, "config.json")
    head_width = values.integer("qk_nope_head_dim", 128, 1, MAX_INT) + config.R
    shared = values.integer("n_shared_experts", 0, 0, MAX_INT) * config.expert_F
    dense = min(values.integer("first_k_dense_replace", 0, 0, MAX_LAYERS), config.layers)
    layers = ("gated",) * dense + ("experts",) * (config.layers - dense)
    rotary = llama.one_rotary_from_hf(hf)
    fields: dict[str, Any] = {
        "head_width": head_width,
        "shared_expert_width": shared,
        "feed_forwards": layers if dense else (),
    }
    rope = values.object("rope_scaling" if values.object("rope_scaling").values else "rope_parameters")
    scale, factor = rope.number("mscale_all_dim", 0.0, -1e9, 1e9), rotary.get("rotary_factor", 1.0)
    if scale and factor > 1:
        fields["attention_scale"] = head_width**-0.5 * _growth(scale, factor) ** 2
    return fields | rotary


def _growth(scale: float, factor: float) -> float:
    """Returns the factor of queries and keys for a context that is `factor` times longer (Peng et al. 2023)."""
    return 0.1 * scale * math.log(factor) + 1.0


def _groups(hf: dict[str, Any]) -> dict[str, Any]:
    values = JsonObject(hf, "config.json")
    names = {"expert_groups": "n_group", "expert_groups_per_token": "topk_group"}
    return {ours: values.integer(theirs, 1, 1, MAX_INT) for ours, theirs in names.items()}


def _fields_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `_fields_from_hf` and `_groups`."""
    layers = [parts.feed_forward for parts in parts_of(config)]
    own = {"qk_nope_head_dim": config.C - config.R, "head_dim": config.R, "qk_head_dim": config.C}
    own["first_k_dense_replace"] = [*layers, "experts"].index("experts")
    own["n_shared_experts"] = config.shared_expert_width // config.expert_F
    own |= {"n_group": config.expert_groups, "topk_group": config.expert_groups_per_token}
    rotary = llama.one_rotary_to_hf(config)
    growth, factor = (resolved(config).attention_scale or 0) * config.C**0.5, config.rotary_factor
    if rotary["rope_scaling"] and factor > 1 and abs(growth - 1) > 1e-9:
        # Published values have few digits.
        scale = round((math.sqrt(abs(growth)) - 1) / (0.1 * math.log(factor)), 9)
        for key in ("rope_scaling", "rope_parameters"):
            rotary[key] = rotary[key] | {"mscale_all_dim": scale}
    return own | rotary


def _v2_from_hf(hf: dict[str, Any]) -> ModelConfig:
    hf = _defaults(hf, _V2_DEFAULTS)
    check_only(hf, {"scoring_func": "softmax"})
    method = hf.get("topk_method") or "greedy"
    if method not in _METHODS:
        raise UserError(f"config.json has topk_method {method!r}{suggestion(str(method), _METHODS)}")
    config = _V2_FROM_HF(hf)
    groups = _groups(hf) if method == "group_limited_greedy" else {}
    return dataclasses.replace(config, **_fields_from_hf(config, hf), **groups)


def _v2_to_hf(config: ModelConfig) -> dict[str, Any]:
    method = _METHODS[config.expert_groups > 1]
    return _V2_TO_HF(config) | _fields_to_hf(config) | {"topk_method": method}


def _v3_from_hf(hf: dict[str, Any]) -> ModelConfig:
    hf = _defaults(hf, _V3_DEFAULTS)
    check_only(hf, {"scoring_func": "sigmoid", "topk_method": "noaux_tc"})
    config = _V3_FROM_HF(hf)
    return dataclasses.replace(config, **_fields_from_hf(config, hf), **_groups(hf))


def _v3_to_hf(config: ModelConfig) -> dict[str, Any]:
    return _V3_TO_HF(config) | _fields_to_hf(config)


_LAYER, _OURS = "model.layers.{i}.", "decoder/layers/"
_HF, _ATTENTION = _LAYER + "self_attn.", _OURS + "attention/"
_FACTORISED = _ATTENTION + "query_down/kernel"
_RULES = (
    *(rule for rule in llama.BODY if "/mlp/" not in rule.leaves[0] and "/attention/" not in rule.leaves[0]),
    *norm(_LAYER + "post_attention_layernorm", _OURS + "mlp_norm"),
    Rule(_HF + "q_proj.weight", _ATTENTION + "query/kernel", latent_query, unless=_FACTORISED),
    Rule(_HF + "q_a_proj.weight", _FACTORISED, linear),
    Rule(_HF + "q_a_layernorm.weight", _ATTENTION + "query_norm/scale"),
    Rule(_HF + "q_b_proj.weight", _ATTENTION + "query/kernel", latent_query, where=_FACTORISED),
    Rule(
        _HF + "kv_a_proj_with_mqa.weight",
        (_ATTENTION + "key_value_down/kernel", _ATTENTION + "rotary_key/kernel"),
        latent_key_value_down,
    ),
    Rule(_HF + "kv_a_layernorm.weight", _ATTENTION + "key_norm/scale"),
    Rule(_HF + "kv_b_proj.weight", (_ATTENTION + "key/kernel", _ATTENTION + "value/kernel"), latent_key_value),
    Rule(_HF + "o_proj.weight", _ATTENTION + "out/kernel", latent_out),
    *mixtral.DENSE,
    *mixtral.experts("mlp.", "gate_proj", "up_proj", "down_proj"),
    Rule(_LAYER + "mlp.gate.e_score_correction_bias", _OURS + "mlp/router_correction"),
    *(
        rule
        for name in ("gate", "up", "down")
        for rule in projection(f"{_LAYER}mlp.shared_experts.{name}_proj", f"{_OURS}mlp/shared/{name}")
    ),
    *projection("score", "tokens_head/out"),
)
_MODEL: dict[str, Any] = {"norm_epsilon": 1e-6, "head_width": 192, "rotary_width": 64, "value_width": 128}
_MODEL |= {"key_value_rank": 512, "max_length": 163840, "rotary_scaling": "yarn", "rotary_factor": 40.0}
_MODEL |= {"rotary_length": 4096, "rotary_high": 32.0, "balance_loss": 0.001}
_LITE: dict[str, Any] = _V2_FIXED | _MODEL | {"vocabulary": 102400, "expert_width": 1408, "experts": 64}
_LITE |= {"experts_per_token": 6, "shared_expert_width": 2816, "feed_forwards": ("gated", *["experts"] * 26)}
_LITE["attention_scale"] = 192**-0.5 * _growth(0.707, 40.0) ** 2
_LARGE: dict[str, Any] = _V3_FIXED | _MODEL | {"vocabulary": 129280, "expert_width": 2048, "experts": 256}
_LARGE |= {"experts_per_token": 8, "shared_expert_width": 2048, "expert_groups": 8, "expert_groups_per_token": 4}
_LARGE |= {"feed_forwards": ("gated",) * 3 + ("experts",) * 58, "query_rank": 1536, "expert_scale": 2.5}
_LARGE["attention_scale"] = 192**-0.5 * _growth(1.0, 40.0) ** 2
V2 = llama.variant(
    "DeepseekV2",
    {"deepseek-v2-lite": llama.preset(27, 2048, 10944, 16, **_LITE)},
    _v2_from_hf,
    _v2_to_hf,
)._replace(rules=_RULES)
V3 = llama.variant(
    "DeepseekV3",
    {"deepseek-v3": llama.preset(61, 7168, 18432, 128, **_LARGE)},
    _v3_from_hf,
    _v3_to_hf,
)._replace(
    rules=_RULES,
    heads=decoder.heads("DeepseekV3", "lm", "classes", "tokens"),
    unused={"model.layers.61.*": "multi-token prediction"},
)
