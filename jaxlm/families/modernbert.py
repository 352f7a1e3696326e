"""ModernBERT (Warner et al. 2024): rotary positions, alternating global and local layers, gated MLPs, no biases."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import Bias, ModelConfig
from jaxlm.errors import UserError
from jaxlm.families import llama
from jaxlm.hub.convert import (
    ACTIVATIONS,
    Family,
    Key,
    Rule,
    bias_query_key_value,
    halves,
    key_conversion,
    linear_gate_up,
    linear_heads_in,
    linear_query_key_value,
    norm,
    projection,
)
from jaxlm.hub.model_files import JsonObject

_FIXED: dict[str, Any] = {
    "structure": "encoder",
    "types": 0,
    "feed_forward": "gated",
    "norm": "layernorm",
    "norm_place": "pre",
    "first_norm": False,
    "embedding_norm": True,
    "positions": "rotary",
    "shared_transform": True,
    "classes_activation": None,
    "mlp_out_dropout": 0.0,
}

_FROM_HF, _TO_HF = key_conversion(
    keys=(
        Key("vocab_size", "vocabulary"),
        Key("max_position_embeddings", "max_length", 8192),
        Key("hidden_size", "width"),
        Key("num_hidden_layers", "layers"),
        Key("num_attention_heads", "heads"),
        Key("intermediate_size", "mlp_width"),
        Key("hidden_activation", "activation", "gelu", ACTIVATIONS),
        Key("classifier_activation", "transform_activation", "gelu", ACTIVATIONS),
        Key("classifier_pooling", "classes_from", "cls", {"cls": "first", "mean": "mean"}),
        Key("norm_eps", "norm_epsilon", 1e-5),
        Key("tie_word_embeddings", "tied_embeddings", True),
        Key("decoder_bias", "masked_lm_bias", True),
        Key("mlp_dropout", "mlp_dropout", 0.0),
        Key("embedding_dropout", "embedding_dropout", 0.0),
        Key("attention_dropout", "attention_dropout", 0.0),
        Key("attention_dropout", "attention_out_dropout", 0.0),
        Key("classifier_dropout", "classes_dropout", 0.0),
        Key("classifier_dropout", "tokens_dropout", 0.0),
        Key("initializer_range", "initial_std", 0.02),
    ),
    fixed=_FIXED,
    only={},
)
_BIASES: dict[str, tuple[Bias, ...]] = {  # key of config.json -> our biases
    "norm_bias": ("norm",),
    "attention_bias": ("query_key_value", "out"),
    "mlp_bias": ("mlp",),
    "classifier_bias": ("transform",),
}


def _config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    config = _FROM_HF(hf)
    scaling = JsonObject(hf, "config.json").object("rope_scaling").values
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":  # it would also apply to local layers
        raise UserError(
            f"config.json scales the rotary positions of all layers, by rope_scaling {scaling}; only those of global "
            f"layers can be scaled, by rope_parameters: choose another model"
        )
    period = hf.get("global_attn_every_n_layers", 3)
    kinds = ["local" if i % period else "global" for i in range(config.layers)]
    return dataclasses.replace(
        config,
        biases=(*(bias for key, biases in _BIASES.items() if hf.get(key, False) for bias in biases), "classes"),
        window=hf.get("local_attention", 128) // 2 + 1,
        **llama.kinds_from_hf(hf, kinds),
        **llama.two_rotaries_from_hf(hf, ("global_rope_theta", 160000.0), ("local_rope_theta", 10000.0)),
    )


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    values = _TO_HF(config) | {key: set(biases) <= set(config.biases) for key, biases in _BIASES.items()}
    rotary = llama.two_rotaries_to_hf(config, "global_rope_theta", "local_rope_theta")
    # rope_scaling would also apply to local layers; rope_parameters contains the scaling of global layers.
    rotary |= {"local_attention": 2 * (config.window - 1), "rope_scaling": None}
    return values | llama.kinds_to_hf(config) | rotary


def _modernbert(layers: int, width: int, mlp_width: int) -> ModelConfig:
    return ModelConfig(
        **_FIXED,
        heads_on_top=("masked_lm",),
        vocabulary=50368,
        max_length=8192,
        width=width,
        layers=layers,
        heads=width // 64,
        mlp_width=mlp_width,
        activation="gelu",
        biases=("classes",),
        layer_kinds=("global", "local", "local"),
        window=65,
        rotary_base=160000.0,
        local_rotary_base=10000.0,
    )


_LAYER, _OURS = "model.layers.{i}.", "encoder/layers/"
_INPUTS = tuple(_OURS + f"attention/{name}" for name in ("query", "key", "value"))

FAMILY = Family(
    presets={"modernbert-base": _modernbert(22, 768, 1152), "modernbert-large": _modernbert(28, 1024, 2624)},
    rules=(
        Rule("model.embeddings.tok_embeddings.weight", "embeddings/tokens"),
        *norm("model.embeddings.norm", "embeddings/norm"),
        *(rule._replace(first=1) for rule in norm(_LAYER + "attn_norm", _OURS + "attention_norm")),
        Rule(_LAYER + "attn.Wqkv.weight", tuple(f"{name}/kernel" for name in _INPUTS), linear_query_key_value),
        Rule(_LAYER + "attn.Wqkv.bias", tuple(f"{name}/bias" for name in _INPUTS), bias_query_key_value),
        *projection(_LAYER + "attn.Wo", _OURS + "attention/out", linear_heads_in),
        *norm(_LAYER + "mlp_norm", _OURS + "mlp_norm"),
        Rule(_LAYER + "mlp.Wi.weight", (_OURS + "mlp/gate/kernel", _OURS + "mlp/up/kernel"), linear_gate_up),
        Rule(_LAYER + "mlp.Wi.bias", (_OURS + "mlp/gate/bias", _OURS + "mlp/up/bias"), halves),
        *projection(_LAYER + "mlp.Wo", _OURS + "mlp/down"),
        *norm("model.final_norm", "encoder/norm"),
        *projection("head.dense", "transform_head/transform"),
        *norm("head.norm", "transform_head/norm"),
        Rule("decoder.weight", "masked_lm_head/vocabulary/kernel"),
        Rule("decoder.bias", "masked_lm_head/vocabulary/bias"),
        *projection("classifier", "classes_head/out"),
        *projection("classifier", "tokens_head/out"),
    ),
    heads={
        ("masked_lm",): "ModernBertForMaskedLM",
        ("classes",): "ModernBertForSequenceClassification",
        ("tokens",): "ModernBertForTokenClassification",
        (): "ModernBertModel",
    },
    prefix="model.",
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    copies={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
)
