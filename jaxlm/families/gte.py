"""GTE (Zhang et al. 2024), the long encoders of Alibaba for embeddings and reranking: a BERT with rotary positions and
gated MLPs.

Files have the `model_type` "gte" of transformers, or "new" of the original code, with other names and scaling.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError
from jaxlm.families import bert, llama
from jaxlm.hub.convert import (
    Family,
    Rule,
    bias_query_key_value,
    check_only,
    key_conversion,
    linear_gate_up,
    linear_heads_in,
    linear_query_key_value,
    norm,
    projection,
)
from jaxlm.hub.model_files import JsonObject

_FIXED: dict[str, Any] = bert.FIXED | {
    "feed_forward": "gated",
    "positions": "rotary",
    "biases": ("query_key_value", "out", "down", "norm", "transform", "classes"),
    "transform_activation": "gelu",
    "mlp_dropout": None,
}
_DEFAULTS = {"attention_probs_dropout_prob": 0.0, "type_vocab_size": 1}
_FROM_HF, _TO_HF = key_conversion(bert.KEYS, _FIXED, {})
_NEW_ONLY: dict[str, Any] = {
    "position_embedding_type": "rope",
    "layer_norm_type": "layer_norm",
    "pack_qkv": True,
    "logn_attention_scale": False,
    "logn_attention_clip1": False,
}
_NEW_FROM_HF, _NEW_TO_HF = key_conversion(bert.KEYS, _FIXED, _NEW_ONLY)


def _config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    return dataclasses.replace(_FROM_HF(_DEFAULTS | hf), **llama.one_rotary_from_hf(hf, 160000.0))


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    values = _TO_HF(config) | llama.one_rotary_to_hf(config)
    if config.rotary_scaling == "dynamic":  # scaled beyond this length
        values["max_position_embeddings"] = config.rotary_length
    return values


def _new_from_hf(hf: dict[str, Any]) -> ModelConfig:
    config, file = _NEW_FROM_HF(_DEFAULTS | hf), JsonObject(hf, "config.json")
    base, rope = file.number("rope_theta", 10000.0, 1e-6, 1e14), file.object("rope_scaling")
    if not rope.values:
        return dataclasses.replace(config, rotary_base=base)
    rope.text("type", "ntk", ("ntk",))
    check_only(rope.values, {"mixed_b": None})
    # The factor s multiplies the base, and s^(2/C) divides all frequencies, so that the slowest pair rotates s times
    # slower (https://kexue.fm/archives/9706, equation 6).
    factor = rope.number("factor", 1.0, 1e-6, 1e9)
    scaling: dict[str, Any] = {"rotary_scaling": "linear", "rotary_factor": factor ** (2 / config.C)}
    return dataclasses.replace(config, rotary_base=base * factor, **scaling if factor > 1 else {})


def _new_to_hf(config: ModelConfig) -> dict[str, Any]:
    base, scaling = config.rotary_base, None
    if config.rotary_scaling == "linear":
        factor = round(config.rotary_factor ** (config.C / 2), 6)
        base, scaling = base / factor, {"type": "ntk", "factor": factor}
    elif config.rotary_scaling != "none":
        raise UserError(f"the format does not support rotary_scaling {config.rotary_scaling!r}")
    return _NEW_TO_HF(config) | {"rope_theta": base, "rope_scaling": scaling}


def _rules(prefix: str) -> tuple[Rule, ...]:
    layer, ours = prefix + "encoder.layer.{i}.", "encoder/layers/"
    inputs = tuple(ours + f"attention/{name}" for name in ("query", "key", "value"))
    return (
        *bert.embeddings(f"{prefix}embeddings"),
        Rule(layer + "attention.qkv_proj.weight", tuple(f"{name}/kernel" for name in inputs), linear_query_key_value),
        Rule(layer + "attention.qkv_proj.bias", tuple(f"{name}/bias" for name in inputs), bias_query_key_value),
        *projection(layer + "attention.o_proj", ours + "attention/out", linear_heads_in),
        *norm(layer + "attn_ln", ours + "attention_norm"),
        Rule(layer + "mlp.up_gate_proj.weight", (ours + "mlp/up/kernel", ours + "mlp/gate/kernel"), linear_gate_up),
        *projection(layer + "mlp.down_proj", ours + "mlp/down"),
        *norm(layer + "mlp_ln", ours + "mlp_norm"),
        *bert.vocabulary("lm_head.dense", "lm_head.norm", "lm_head.decoder", "lm_head.decoder.bias"),
        *projection(f"{prefix}pooler.dense", "classes_head/dense"),
        *projection("classifier", "classes_head/out"),
        *bert.TOKENS,
    )


def _gte(layers: int, width: int, **fields: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"layers": layers, "width": width, "heads": width // 64}
    published: dict[str, Any] = {"vocabulary": 30528, "max_length": 8192, "activation": "gelu"}
    published |= {"norm_epsilon": 1e-12, "dropout": 0.1, "rotary_base": 1e6, "rotary_scaling": "linear"}
    published |= {"rotary_factor": 2 ** (1 / 32)}
    return ModelConfig(**_FIXED | {"heads_on_top": ("masked_lm",)} | published | sizes | fields)


FAMILY = Family(
    presets={
        "gte-base-en-v1.5": _gte(12, 768),
        "gte-large-en-v1.5": _gte(24, 1024, types=2, rotary_base=320000.0),
        "gte-multilingual-base": _gte(
            12, 768, types=1, vocabulary=250048, rotary_base=160000.0, rotary_factor=8 ** (1 / 32)
        ),
    },
    rules=_rules("gte."),
    heads={
        ("masked_lm",): "GteForMaskedLM",
        ("classes",): "GteForSequenceClassification",
        ("tokens",): "GteForTokenClassification",
        (): "GteModel",
    },
    prefix="gte.",
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    copies={"lm_head.decoder.weight": "gte.embeddings.word_embeddings.weight"},
    old_prefixes=("new.",),
)
NEW = FAMILY._replace(
    presets={
        "gte-multilingual-mlm-base": _gte(
            12, 768, types=1, vocabulary=250048, rotary_base=160000.0, rotary_scaling="none", rotary_factor=1.0
        )
    },
    rules=_rules("new."),
    heads={heads: name.replace("Gte", "New") for heads, name in FAMILY.heads.items()},
    prefix="new.",
    config_from_hf=_new_from_hf,
    config_to_hf=_new_to_hf,
    copies={"lm_head.decoder.weight": "new.embeddings.word_embeddings.weight"},
    old_prefixes=("gte.",),
)
