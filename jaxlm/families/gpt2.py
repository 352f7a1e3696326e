"""GPT-2 (Radford et al. 2019) and GPT-3 (Brown et al. 2020), which has the same architecture."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.hub.convert import (
    ACTIVATIONS,
    Family,
    Key,
    Rule,
    conv_heads_in,
    conv_query_key_value,
    key_conversion,
    linear,
)

_FIXED: dict[str, Any] = {
    "structure": "decoder",
    "types": 0,
    "norm": "layernorm",
    "norm_place": "pre",
    "positions": "learned",
    "biases": ("query_key_value", "out", "mlp", "norm"),
    "classes_from": "last",
    "classes_activation": None,
    "classes_dropout": 0.0,
    "scale_residual_init": True,
}


def _gpt2(layers: int, width: int, heads: int) -> ModelConfig:
    published = _FIXED | {"vocabulary": 50257, "max_length": 1024, "dropout": 0.1, "attention_dropout": 0.1}
    return ModelConfig(**published, layers=layers, width=width, heads=heads, activation="gelu_tanh")


def _gpt3(layers: int, width: int, heads: int, head_width: int) -> ModelConfig:
    """Returns a row of table 2.1. Attention is dense; the alternating sparse pattern of the paper has no parameters."""
    published = _FIXED | {"vocabulary": 50257, "max_length": 2048, "activation": "gelu_tanh"}
    return ModelConfig(**published, layers=layers, width=width, heads=heads, head_width=head_width)


PRESETS = {
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "gpt3-small": _gpt3(12, 768, 12, 64),
    "gpt3-medium": _gpt3(24, 1024, 16, 64),
    "gpt3-large": _gpt3(24, 1536, 16, 96),
    "gpt3-xl": _gpt3(24, 2048, 24, 128),  # in the paper, the heads together are wider than the model
    "gpt3-2.7b": _gpt3(32, 2560, 32, 80),
    "gpt3-6.7b": _gpt3(32, 4096, 32, 128),
    "gpt3-13b": _gpt3(40, 5140, 40, 128),  # 5140 as printed
    "gpt3-175b": _gpt3(96, 12288, 96, 128),
}

_FROM_HF, _TO_HF = key_conversion(
    keys=(
        Key("vocab_size", "vocabulary"),
        Key("n_positions", "max_length"),
        Key("n_embd", "width"),
        Key("n_layer", "layers"),
        Key("n_head", "heads"),
        Key("n_inner", "mlp_width", None),
        Key("activation_function", "activation", "gelu_new", ACTIVATIONS),
        Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Key("tie_word_embeddings", "tied_embeddings", True),
        Key("resid_pdrop", "dropout", 0.1),
        Key("embd_pdrop", "embedding_dropout", 0.1),
        Key("attn_pdrop", "attention_dropout", 0.1),
        Key("initializer_range", "initial_std", 0.02),
        Key("scale_attn_by_inverse_layer_idx", "scale_by_layer", False),
    ),
    fixed=_FIXED,
    # Scores are always float32, so that reorder_and_upcast_attn has no effect.
    only={"add_cross_attention": False},
)


def _config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    scaled = hf.get("scale_attn_weights", True)
    return dataclasses.replace(_FROM_HF(hf), attention_scale=None if scaled else 1.0)


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return _TO_HF(config) | {"scale_attn_weights": config.attention_scale != 1.0}


_LAYER, _OURS = "transformer.h.{i}.", "decoder/layers/"
_ATTENTION = _OURS + "attention/"

FAMILY = Family(
    presets=PRESETS,
    rules=(
        Rule("transformer.wte.weight", "embeddings/tokens"),
        Rule("transformer.wpe.weight", "embeddings/positions"),
        Rule(_LAYER + "ln_1.weight", _OURS + "attention_norm/scale"),
        Rule(_LAYER + "ln_1.bias", _OURS + "attention_norm/bias"),
        *(
            Rule(
                _LAYER + f"attn.c_attn.{theirs}",
                tuple(_ATTENTION + f"{part}/{ours}" for part in ("query", "key", "value")),
                conv_query_key_value,
            )
            for theirs, ours in (("weight", "kernel"), ("bias", "bias"))
        ),
        Rule(_LAYER + "attn.c_proj.weight", _ATTENTION + "out/kernel", conv_heads_in),
        Rule(_LAYER + "attn.c_proj.bias", _ATTENTION + "out/bias"),
        Rule(_LAYER + "ln_2.weight", _OURS + "mlp_norm/scale"),
        Rule(_LAYER + "ln_2.bias", _OURS + "mlp_norm/bias"),
        Rule(_LAYER + "mlp.c_fc.weight", _OURS + "mlp/up/kernel"),
        Rule(_LAYER + "mlp.c_fc.bias", _OURS + "mlp/up/bias"),
        Rule(_LAYER + "mlp.c_proj.weight", _OURS + "mlp/down/kernel"),
        Rule(_LAYER + "mlp.c_proj.bias", _OURS + "mlp/down/bias"),
        Rule("transformer.ln_f.weight", "decoder/norm/scale"),
        Rule("transformer.ln_f.bias", "decoder/norm/bias"),
        Rule("lm_head.weight", "lm_head/kernel"),
        Rule("score.weight", "classes_head/out/kernel", linear),
    ),
    heads={("lm",): "GPT2LMHeadModel", ("classes",): "GPT2ForSequenceClassification", (): "GPT2Model"},
    prefix="transformer.",
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    buffers=(_LAYER + "attn.bias", _LAYER + "attn.masked_bias"),  # the causal mask
    copies={"lm_head.weight": "transformer.wte.weight"},
)
