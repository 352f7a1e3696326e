"""OPT (Zhang et al. 2022): learned positions and ReLU.

The 350M model has norms after the residual, and narrow embeddings."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import Bias, ModelConfig
from jaxlm.families import decoder
from jaxlm.hub.convert import (
    ACTIVATIONS,
    Family,
    Key,
    Rule,
    attention,
    key_conversion,
    linear,
    norm,
    projection,
)

_FIXED: dict[str, Any] = decoder.FIXED | {
    "norm_epsilon": 1e-5,
    "positions": "learned",
    "position_offset": 2,
    "count_padding": False,
    "embedding_dropout": 0.0,
}
_FROM_HF, _TO_HF = key_conversion(
    keys=(
        Key("vocab_size", "vocabulary"),
        Key("max_position_embeddings", "max_length", 2048),
        Key("hidden_size", "width"),
        Key("word_embed_proj_dim", "embedding_width", None),
        Key("num_hidden_layers", "layers"),
        Key("num_attention_heads", "heads"),
        Key("ffn_dim", "mlp_width", 3072),
        Key("activation_function", "activation", "relu", ACTIVATIONS),
        Key("do_layer_norm_before", "norm_place", True, {True: "pre", False: "post"}),
        Key("tie_word_embeddings", "tied_embeddings", True),
        Key("dropout", "dropout", 0.1),
        Key("attention_dropout", "attention_dropout", 0.0),
        Key("init_std", "initial_std", 0.02),
    ),
    fixed=_FIXED,
    only={"_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True},
)
_BIASES: tuple[Bias, ...] = ("query_key_value", "out", "mlp")


def _config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    config = _FROM_HF(hf)
    biases: tuple[Bias, ...] = (*(_BIASES if hf.get("enable_bias", True) else ()), "norm")
    width = None if config.embedding_width == config.width else config.embedding_width
    return dataclasses.replace(config, biases=biases, embedding_width=width, project_tokens=width is not None)


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return _TO_HF(config) | {"word_embed_proj_dim": config.W, "enable_bias": set(_BIASES) <= set(config.biases)}


def _opt(layers: int, width: int, heads: int, **fields: Any) -> ModelConfig:
    published: dict[str, Any] = {"vocabulary": 50272, "max_length": 2048, "dropout": 0.1, "activation": "relu"}
    published |= {"biases": (*_BIASES, "norm")}
    return ModelConfig(**_FIXED | published | {"layers": layers, "width": width, "heads": heads} | fields)


_LAYER, _OURS = "model.decoder.layers.{i}.", decoder.LAYERS

FAMILY = Family(
    presets={
        "opt-125m": _opt(12, 768, 12),
        "opt-350m": _opt(24, 1024, 16, norm_place="post", embedding_width=512, project_tokens=True),
        "opt-1.3b": _opt(24, 2048, 32),
        "opt-2.7b": _opt(32, 2560, 32),
        "opt-6.7b": _opt(32, 4096, 32),
        "opt-13b": _opt(40, 5120, 40),
        "opt-30b": _opt(48, 7168, 56),
        "opt-66b": _opt(64, 9216, 72),
    },
    rules=(
        Rule("model.decoder.embed_tokens.weight", "embeddings/tokens"),
        Rule("model.decoder.embed_positions.weight", "embeddings/positions"),
        Rule("model.decoder.project_in.weight", "embeddings/project/kernel", linear),
        *attention(_LAYER + "self_attn.", _OURS + "attention", "q_proj", "k_proj", "v_proj", "out_proj"),
        *norm(_LAYER + "self_attn_layer_norm", _OURS + "attention_norm"),
        *projection(_LAYER + "fc1", _OURS + "mlp/up"),
        *projection(_LAYER + "fc2", _OURS + "mlp/down"),
        *norm(_LAYER + "final_layer_norm", _OURS + "mlp_norm"),
        *norm("model.decoder.final_layer_norm", "decoder/norm"),
        Rule("model.decoder.project_out.weight", "decoder/project/kernel", linear),
        *decoder.HEADS,
    ),
    heads=decoder.heads("OPT", "lm", "classes", "span"),
    prefix="model.",
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    copies={"lm_head.weight": "model.decoder.embed_tokens.weight"},
)
