"""GPT-Neo (Black et al. 2021): a GPT-2 with alternating global and local layers, and unscaled attention."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError
from jaxlm.families import decoder
from jaxlm.hub.convert import (
    ACTIVATIONS,
    Family,
    Key,
    Rule,
    attention,
    key_conversion,
    norm,
    projection,
    resolved,
    shortest,
)

_FIXED: dict[str, Any] = decoder.FIXED | {
    "norm_place": "pre",
    "positions": "learned",
    "attention_scale": 1.0,
    "biases": ("out", "mlp", "norm"),
}
_FROM_HF, _TO_HF = key_conversion(
    keys=(
        Key("vocab_size", "vocabulary"),
        Key("max_position_embeddings", "max_length", 2048),
        Key("hidden_size", "width"),
        Key("num_layers", "layers"),
        Key("num_heads", "heads"),
        Key("intermediate_size", "mlp_width", None),
        Key("window_size", "window", 256),
        Key("activation_function", "activation", "gelu_new", ACTIVATIONS),
        Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Key("tie_word_embeddings", "tied_embeddings", True),
        Key("resid_dropout", "dropout", 0.0),
        Key("embed_dropout", "embedding_dropout", 0.0),
        Key("attention_dropout", "attention_dropout", 0.0),
        Key("classifier_dropout", "tokens_dropout", 0.1),
        Key("initializer_range", "initial_std", 0.02),
    ),
    fixed=_FIXED,
    only={},
)


def _config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    config, kinds = _FROM_HF(hf), list[Any]()
    for names, times in hf.get("attention_types") or [[["global", "local"], 12]]:
        if not isinstance(times, int) or not 0 < len(names) * times <= config.layers:
            break
        kinds += [*names] * times
    if len(kinds) != config.layers or not set(kinds) <= {"global", "local"}:
        raise UserError(
            f"config.json has attention_types {hf.get('attention_types')}; it must have lists of 'global' and 'local' "
            f"with the number of times that each is repeated, {config.layers} layers in all: correct it"
        )
    return dataclasses.replace(config, layer_kinds=shortest(kinds))


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    kinds = list(resolved(config).layer_kinds)
    cycle = list(shortest(kinds))
    whole = len(kinds) % len(cycle) == 0
    types = [[cycle, len(kinds) // len(cycle)]] if whole else [[kinds, 1]]
    return _TO_HF(config) | {"attention_types": types, "attention_layers": kinds}


def _gptneo(layers: int, width: int, heads: int) -> ModelConfig:
    published = _FIXED | {"vocabulary": 50257, "max_length": 2048, "layer_kinds": ("global", "local"), "window": 256}
    return ModelConfig(**published, layers=layers, width=width, heads=heads, activation="gelu_tanh")


_LAYER, _OURS = "transformer.h.{i}.", decoder.LAYERS

FAMILY = Family(
    presets={
        "gpt-neo-125m": _gptneo(12, 768, 12),
        "gpt-neo-1.3b": _gptneo(24, 2048, 16),
        "gpt-neo-2.7b": _gptneo(32, 2560, 20),
    },
    rules=(
        Rule("transformer.wte.weight", "embeddings/tokens"),
        Rule("transformer.wpe.weight", "embeddings/positions"),
        *norm(_LAYER + "ln_1", _OURS + "attention_norm"),
        *attention(_LAYER + "attn.attention.", _OURS + "attention", "q_proj", "k_proj", "v_proj", "out_proj"),
        *norm(_LAYER + "ln_2", _OURS + "mlp_norm"),
        *projection(_LAYER + "mlp.c_fc", _OURS + "mlp/up"),
        *projection(_LAYER + "mlp.c_proj", _OURS + "mlp/down"),
        *norm("transformer.ln_f", "decoder/norm"),
        *decoder.HEADS,
    ),
    heads=decoder.heads("GPTNeo", "lm", "classes", "tokens", "span"),
    prefix="transformer.",
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    buffers=tuple(_LAYER + f"attn.attention.{name}" for name in ("bias", "masked_bias")),  # the causal mask
    copies={"lm_head.weight": "transformer.wte.weight"},
)
