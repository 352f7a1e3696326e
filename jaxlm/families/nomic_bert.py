"""Nomic BERT (Nussbaum et al. 2024), the base of nomic-embed-text: a BERT with rotary positions and gated MLPs.

Files have the keys of transformers 5 or those of the original code, which extends the config of GPT-2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError, suggestion
from jaxlm.families import bert, llama
from jaxlm.hub.convert import (
    Family,
    Key,
    Rule,
    bias_query_key_value,
    check_only,
    key_conversion,
    linear_heads_in,
    linear_query_key_value,
    norm,
    projection,
)
from jaxlm.hub.model_files import JsonObject

_FIXED: dict[str, Any] = bert.FIXED | {
    "feed_forward": "gated",
    "positions": "rotary",
    "biases": ("norm", "transform", "classes"),
}
_DEFAULTS = {"hidden_act": "silu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_KEYS = (*bert.KEYS, Key("head_dim", "head_width", None))
_FROM_HF, _TO_HF = key_conversion(_KEYS, _FIXED, {})

_ORIGINAL = {  # key of the original code -> key of transformers
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "resid_pdrop": "hidden_dropout_prob",
    "attn_pdrop": "attention_probs_dropout_prob",
    "rotary_emb_base": "rope_theta",
}
_ORIGINAL_ONLY: dict[str, Any] = {
    **dict.fromkeys(("prenorm", "parallel_block", "use_rms_norm", "causal", "rotary_emb_interleaved"), False),
    "rotary_emb_fraction": 1.0,
    "rotary_emb_scale_base": None,
    "moe_every_n_layers": 0,
}
_GATED = {"swiglu": "silu", "geglu": "gelu"}


def _original_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Returns the config for the keys of the original code; missing keys have the defaults of its config class."""
    config = JsonObject(hf, "config.json")
    check_only({"rotary_emb_fraction": 0.0} | hf, _ORIGINAL_ONLY)
    gate = config.text("activation_function", "gelu_new")
    if gate not in _GATED:
        raise UserError(f"config.json has activation_function {gate!r}{suggestion(gate, _GATED)}")
    known = {"rope_theta": 10000.0, "layer_norm_eps": 1e-5, "hidden_dropout_prob": 0.1}
    known |= {"attention_probs_dropout_prob": 0.1, "classifier_dropout": hf.get("embd_pdrop", 0.1)}
    known |= {new: hf[old] for old, new in _ORIGINAL.items() if hf.get(old) is not None} | {"hidden_act": _GATED[gate]}
    width = config.integer("n_inner", 8 * config.integer("n_embd", 768, 1) // 3, 1)
    known["intermediate_size"] = -(-width // 256) * 256
    multiple = config.integer("pad_vocab_size_multiple", 1, 1)
    known["vocab_size"] = -(-config.integer("vocab_size", 50257, 1) // multiple) * multiple
    found = dataclasses.replace(_FROM_HF(hf | known), **llama.one_rotary_from_hf(known))
    factor = config.number("rotary_scaling_factor", 0.0, 0, 1e9)
    if factor:
        length = config.integer("max_trained_positions", 2048, 1)
        found = dataclasses.replace(found, rotary_scaling="dynamic", rotary_factor=factor, rotary_length=length)
    up, down, inputs = (config.boolean(f"{name}_bias", True) for name in ("mlp_fc1", "mlp_fc2", "qkv_proj"))
    if up and not down:
        raise UserError("config.json has mlp_fc1_bias but not mlp_fc2_bias, which is unsupported: choose another model")
    biases: Any = ("norm", "classes") + (("mlp", "transform") if up else ("down",) if down else ())
    return dataclasses.replace(found, biases=biases + ("query_key_value", "out") * inputs, masked_lm_bias=up)


def _config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    if "n_embd" in hf and "hidden_size" not in hf:
        return _original_from_hf(hf)
    return dataclasses.replace(_FROM_HF(_DEFAULTS | hf), **llama.one_rotary_from_hf(hf, 1000.0))


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    values = bert.with_types(_TO_HF(config)) | llama.one_rotary_to_hf(config)
    if config.rotary_scaling == "dynamic":  # scaled beyond this length
        values["max_position_embeddings"] = config.rotary_length
    return values


_LAYER, _OURS = "nomic_bert.encoder.layers.{i}.", "encoder/layers/"
_INPUTS = tuple(_OURS + f"attention/{name}" for name in ("query", "key", "value"))

FAMILY = Family(
    presets={
        "nomic-bert": ModelConfig(
            **_FIXED,
            heads_on_top=("masked_lm",),
            vocabulary=30528,
            max_length=2048,
            types=2,
            width=768,
            layers=12,
            heads=12,
            activation="silu",
            norm_epsilon=1e-12,
            rotary_base=1000.0,
        )
    },
    rules=(
        Rule("nomic_bert.embeddings.word_embeddings.weight", "embeddings/tokens"),
        Rule("nomic_bert.embeddings.token_type_embeddings.weight", "embeddings/types"),
        *norm("nomic_bert.emb_ln", "embeddings/norm"),
        Rule(_LAYER + "attn.Wqkv.weight", tuple(f"{name}/kernel" for name in _INPUTS), linear_query_key_value),
        Rule(_LAYER + "attn.Wqkv.bias", tuple(f"{name}/bias" for name in _INPUTS), bias_query_key_value),
        *projection(_LAYER + "attn.out_proj", _OURS + "attention/out", linear_heads_in),
        *norm(_LAYER + "norm1", _OURS + "attention_norm"),
        *projection(_LAYER + "mlp.fc11", _OURS + "mlp/up"),
        *projection(_LAYER + "mlp.fc12", _OURS + "mlp/gate"),
        *projection(_LAYER + "mlp.fc2", _OURS + "mlp/down"),
        *norm(_LAYER + "norm2", _OURS + "mlp_norm"),
        *bert.vocabulary(
            "cls.predictions.transform.dense",
            "cls.predictions.transform.layer_norm",
            "cls.predictions.decoder",
            "cls.predictions.bias",
        ),
        *projection("nomic_bert.pooler.dense", "classes_head/dense"),
        *projection("classifier", "classes_head/out"),
        *bert.TOKENS,
    ),
    heads={
        ("masked_lm",): "NomicBertForMaskedLM",
        ("classes",): "NomicBertForSequenceClassification",
        ("tokens",): "NomicBertForTokenClassification",
        (): "NomicBertModel",
    },
    prefix="nomic_bert.",
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    copies={
        "cls.predictions.decoder.weight": "nomic_bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    old_prefixes=("bert.",),
)
