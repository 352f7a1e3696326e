"""Qwen3-Next and the text models of Qwen3.5: three layers of linear attention, then one of attention with a gate.

Qwen3-Next and Qwen3.5-MoE have experts, Qwen3.5 has dense MLPs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.config.ranges import MAX_INT, short_repr
from jaxlm.errors import UserError
from jaxlm.families import decoder, llama, mixtral
from jaxlm.hub.convert import (
    Family,
    Key,
    Layout,
    Rule,
    key_conversion,
    linear,
    linear_heads_in,
    linear_heads_out,
    projection,
    shortest,
)
from jaxlm.hub.model_files import JsonObject
from jaxlm.nn.layer_parts import parts_of

_FIXED = llama.FIXED | {"norm": "rmsnorm_plus_one", "query_key_norm": True, "attention_gate": True}
_ONLY = {"attn_output_gate": True}
_KEYS = (
    *(key for key in llama.KEYS if key.ours != "mlp_width"),
    llama.ACTIVATION,
    llama.TIED,
    Key("linear_num_key_heads", "linear_key_heads", 16),
    Key("linear_num_value_heads", "linear_value_heads", 32),
    Key("linear_key_head_dim", "linear_key_width", 128),
    Key("linear_value_head_dim", "linear_value_width", 128),
    Key("linear_conv_kernel_dim", "linear_conv_width", 4),
)
_EXPERTS = (
    Key("router_aux_loss_coef", "balance_loss", 0.001),
    Key("shared_expert_intermediate_size", "shared_expert_width", 512),
    Key("num_experts", "experts"),
    Key("num_experts_per_tok", "experts_per_token"),
)
_WITH_EXPERTS = _FIXED | {"feed_forward": "experts", "shared_expert_gate": True}
_CONVERSION = key_conversion((*_KEYS, Key("intermediate_size", "mlp_width")), _FIXED, _ONLY)
_MOE_CONVERSION = key_conversion(
    (*_KEYS, *_EXPERTS, Key("moe_intermediate_size", "mlp_width", 512)), _WITH_EXPERTS, _ONLY
)
_NEXT_CONVERSION = key_conversion(
    (
        *(*_KEYS, *_EXPERTS),
        Key("intermediate_size", "mlp_width", 5632),
        Key("moe_intermediate_size", "expert_width", 512),
        Key("norm_topk_prob", "normalize_experts", True),
    ),
    _WITH_EXPERTS,
    _ONLY,
)
_MIXERS = {"linear_attention": "gated_delta", "full_attention": "attention"}


def _mixers_from_hf(hf: dict[str, Any], layers: int) -> dict[str, Any]:
    """Returns the config fields for `layer_types`, or for the distance between the layers with full attention."""
    kinds = hf.get("layer_types")
    if kinds is None:
        interval = JsonObject(hf, "config.json").integer("full_attention_interval", 4, 1, MAX_INT)
        kinds = ["linear_attention" if (n + 1) % interval else "full_attention" for n in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in _MIXERS for kind in kinds):
        raise UserError(f"config.json has layer_types {short_repr(kinds)}; it must have {layers} of {list(_MIXERS)}")
    mixers = shortest([_MIXERS[kind] for kind in kinds])
    return {"mixers": () if mixers == ("attention",) else mixers}


def _mixers_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `_mixers_from_hf`."""
    names = {ours: theirs for theirs, ours in _MIXERS.items()}
    mixers = [parts.mixer for parts in parts_of(config)]
    if unknown := set(mixers) - names.keys():
        raise UserError(f"the format does not support the mixer {unknown.pop()!r}; use one of {', '.join(names)}")
    return {"layer_types": [names[mixer] for mixer in mixers]}


def _from_hf(convert: Callable[[dict[str, Any]], ModelConfig], hf: dict[str, Any]) -> ModelConfig:
    defaults = {"num_attention_heads": 16, "head_dim": 256, "partial_rotary_factor": 0.25}
    config = convert(defaults | hf)
    rotary = llama.one_rotary_from_hf(defaults | hf, head_width=config.C)
    return dataclasses.replace(config, **rotary, **llama.attention_biases(hf), **_mixers_from_hf(hf, config.layers))


def _to_hf(convert: Callable[[ModelConfig], dict[str, Any]], config: ModelConfig) -> dict[str, Any]:
    own = {"attention_bias": "out" in config.biases} | _mixers_to_hf(config)
    return convert(config) | llama.one_rotary_to_hf(config, partial=True) | own


def _qwen3_5_from_hf(hf: dict[str, Any]) -> ModelConfig:
    return _from_hf(_CONVERSION[0], {"num_key_value_heads": 4} | hf)


def _moe_from_hf(hf: dict[str, Any]) -> ModelConfig:
    return _from_hf(_MOE_CONVERSION[0], {"num_key_value_heads": 2} | mixtral.with_experts(hf))


def _next_from_hf(hf: dict[str, Any]) -> ModelConfig:
    config = _from_hf(_NEXT_CONVERSION[0], {"num_key_value_heads": 2} | mixtral.with_experts(hf))
    return dataclasses.replace(config, **mixtral.layers_from_hf(config, hf))


def _next_to_hf(config: ModelConfig) -> dict[str, Any]:
    return _to_hf(_NEXT_CONVERSION[1], config) | mixtral.layers_to_hf(config)


def _by_group(parts_of: Callable[[ModelConfig], tuple[int, list[tuple[int, ...]]]]) -> Layout:
    """Returns the layout of a tensor whose rows are those of several leaves.

    `parts_of(config)` returns the number of groups, each with rows of all leaves, and the shapes of the leaves without
    the axis of the inputs: parts of [O, I] <-> [I, O...].
    """

    def to_ours(config: ModelConfig, x: np.ndarray) -> tuple[np.ndarray, ...]:
        groups, shapes = parts_of(config)
        ends = np.cumsum([math.prod(shape) // groups for shape in shapes])[:-1]
        parts = np.split(x.reshape(groups, -1, *x.shape[1:]), ends, axis=1)
        parts = [part.reshape(*shape, *x.shape[1:]) for part, shape in zip(parts, shapes, strict=True)]
        return tuple(part if x.ndim == 1 else np.moveaxis(part, -1, 0) for part in parts)

    def to_hf(config: ModelConfig, *leaves: np.ndarray) -> np.ndarray:
        groups, shapes = parts_of(config)
        is_bias = leaves[0].ndim == len(shapes[0])
        rows = [leaf if is_bias else np.moveaxis(leaf, 0, -1) for leaf in leaves]
        last = () if is_bias else rows[0].shape[-1:]
        return np.concatenate([row.reshape(groups, -1, *last) for row in rows], axis=1).reshape(-1, *last)

    return Layout(to_ours, to_hf)


def _key_query_value(config: ModelConfig) -> tuple[int, list[tuple[int, ...]]]:
    K, H, C, U = config.linear_sizes
    return 1, [(K, C), (K, C), (H, U)]


def _with_gate(config: ModelConfig) -> tuple[int, list[tuple[int, ...]]]:
    K, H, C, U = config.linear_sizes
    return K, [(K, C), (K, C), (H, U), (H, U)]


_mixed = _by_group(_key_query_value)
_conv = Layout(  # three of [W, .., ..] <-> [O, 1, W]
    lambda config, x: _mixed.to_ours(config, x[:, 0]),
    lambda config, *leaves: _mixed.to_hf(config, *leaves)[:, None],
)
_query_gate = _by_group(lambda config: (config.heads, [(config.heads, config.C)] * 2))
_values = Layout(  # [D, H, U] <-> [HU, D]
    lambda config, x: x.T.reshape(config.width, config.linear_sizes[1], -1), linear_heads_out.to_hf
)
_values_in = Layout(  # [H, U, D] <-> [D, HU]
    lambda config, x: x.T.reshape(config.linear_sizes[1], -1, config.width), linear_heads_in.to_hf
)
_LAYER, _OURS = "model.layers.{i}.", "decoder/layers/"
_HF, _LINEAR = _LAYER + "linear_attn.", _OURS + "gated_delta_attention/"
_kernels = lambda *names: tuple(f"{_LINEAR}{name}/kernel" for name in names)
_COMMON = (
    *(
        Rule(
            f"{_LAYER}self_attn.q_proj.{theirs}",
            (f"{_OURS}attention/query/{ours}", f"{_OURS}attention/gate/{ours}"),
            _query_gate,
        )
        for theirs, ours in (("weight", "kernel"), ("bias", "bias"))
    ),
    Rule(_HF + "conv1d.weight", tuple(f"{_LINEAR}{name}_conv" for name in ("query", "key", "value")), _conv),
    Rule(_HF + "A_log", _LINEAR + "log_rate"),
    Rule(_HF + "dt_bias", _LINEAR + "decay_bias"),
    Rule(_HF + "norm.weight", _LINEAR + "out_norm/scale"),
    Rule(_HF + "out_proj.weight", _LINEAR + "out/kernel", _values_in),
    *projection("score", "tokens_head/out"),
)
_QWEN3_5 = (
    *_COMMON,
    Rule(_HF + "in_proj_qkv.weight", _kernels("query", "key", "value"), _mixed),
    Rule(_HF + "in_proj_z.weight", _LINEAR + "gate/kernel", _values),
    Rule(_HF + "in_proj_b.weight", _LINEAR + "beta/kernel", linear),
    Rule(_HF + "in_proj_a.weight", _LINEAR + "decay/kernel", linear),
)
_QWEN3_NEXT = (
    *_COMMON,
    Rule(_HF + "in_proj_qkvz.weight", _kernels("query", "key", "value", "gate"), _by_group(_with_gate)),
    Rule(
        _HF + "in_proj_ba.weight",
        _kernels("beta", "decay"),
        _by_group(lambda config: (config.linear_sizes[0], [config.linear_sizes[1:2]] * 2)),
    ),
)

_HYBRID: dict[str, Any] = {
    "mixers": ("gated_delta", "gated_delta", "gated_delta", "attention"),
    "attention_gate": True,
    "query_key_norm": True,
    "norm": "rmsnorm_plus_one",
    "norm_epsilon": 1e-6,
    "head_width": 256,
    "rotary_width": 64,
    "rotary_base": 1e7,
    "max_length": 262144,
    "vocabulary": 248320,
    "linear_key_heads": 16,
    "linear_value_heads": 32,
    "linear_key_width": 128,
    "linear_value_width": 128,
}
_SPARSE = _HYBRID | {"feed_forward": "experts", "shared_expert_width": 512, "shared_expert_gate": True}
_SPARSE |= {"balance_loss": 0.001}
_NEXT = _SPARSE | {"vocabulary": 151936, "experts": 512, "experts_per_token": 10}


def _family(base: Family, own: tuple[Rule, ...], **fields: Any) -> Family:
    """Returns a family with the tensors of `base`, except those of the queries, and its own ones."""
    rules = tuple(rule for rule in base.rules if not rule.leaves[0].startswith(_OURS + "attention/query/"))
    return base._replace(rules=(*rules, *own), unused={"mtp.*": "multi-token prediction"}, **fields)


QWEN_3_5 = _family(
    llama.QWEN_3,
    _QWEN3_5,
    presets={
        "qwen3.5-9b": llama.preset(32, 4096, 12288, 16, 4, **_HYBRID),
        "qwen3.5-27b": llama.preset(64, 5120, 17408, 24, 4, **_HYBRID | {"linear_value_heads": 48}),
    },
    heads={
        ("lm",): "Qwen3_5ForCausalLM",
        ("classes",): "Qwen3_5TextForSequenceClassification",
        (): "Qwen3_5TextModel",
    },
    config_from_hf=_qwen3_5_from_hf,
    config_to_hf=partial(_to_hf, _CONVERSION[1]),
)
QWEN_3_5_MOE = _family(
    mixtral.QWEN_3,
    _QWEN3_5,
    presets={"qwen3.5-35b-a3b": llama.preset(40, 2048, 512, 16, 2, **_SPARSE, experts=256, experts_per_token=8)},
    heads={("lm",): "Qwen3_5MoeForCausalLM", (): "Qwen3_5MoeTextModel"},
    config_from_hf=_moe_from_hf,
    config_to_hf=partial(_to_hf, _MOE_CONVERSION[1]),
)
QWEN_3_NEXT = _family(
    mixtral.QWEN_3,
    _QWEN3_NEXT,
    presets={"qwen3-next-80b-a3b": llama.preset(48, 2048, 512, 16, 2, **_NEXT)},
    heads=decoder.heads("Qwen3Next", "lm", "classes", "tokens"),
    config_from_hf=_next_from_hf,
    config_to_hf=_next_to_hf,
)
