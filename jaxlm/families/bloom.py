"""BLOOM (BigScience Workshop 2022): ALiBi in place of positions, and a norm of the embeddings."""

from __future__ import annotations

from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.families import decoder
from jaxlm.hub.convert import Family, Key, Rule, key_conversion, norm

_FIXED: dict[str, Any] = decoder.FIXED | {
    "activation": "gelu_tanh",
    "norm_place": "pre",
    "embedding_norm": True,
    "positions": "none",
    "relative": "alibi",
    "biases": ("query_key_value", "out", "mlp", "norm"),
    "embedding_dropout": 0.0,
}
_FROM_HF, _TO_HF = key_conversion(
    keys=(
        Key("vocab_size", "vocabulary"),
        Key("seq_length", "max_length", 2048),
        Key("hidden_size", "width"),
        Key("n_layer", "layers"),
        Key("n_head", "heads"),
        Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Key("tie_word_embeddings", "tied_embeddings", True),
        Key("hidden_dropout", "dropout", 0.0),
        Key("attention_dropout", "attention_dropout", 0.0),
        Key("classifier_dropout", "tokens_dropout", None),
        Key("initializer_range", "initial_std", 0.02),
    ),
    fixed=_FIXED,
    # Without tensor parallelism, slow_but_exact has no effect.
    only={"apply_residual_connection_post_layernorm": False},
)
_OLDER = {"hidden_size": "n_embed", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}


def _config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    return _FROM_HF({name: hf[older] for name, older in _OLDER.items() if older in hf} | hf)


def _bloom(layers: int, width: int, heads: int) -> ModelConfig:
    return ModelConfig(**_FIXED, vocabulary=250880, max_length=2048, layers=layers, width=width, heads=heads)


FAMILY = Family(
    presets={
        "bloom-560m": _bloom(24, 1024, 16),
        "bloom-1b1": _bloom(24, 1536, 16),
        "bloom-1b7": _bloom(24, 2048, 16),
        "bloom-3b": _bloom(30, 2560, 32),
        "bloom-7b1": _bloom(30, 4096, 32),
        "bloom": _bloom(70, 14336, 112),
    },
    rules=(
        Rule("transformer.word_embeddings.weight", "embeddings/tokens"),
        *norm("transformer.word_embeddings_layernorm", "embeddings/norm"),
        *decoder.neox_layer("transformer.h.{i}.", "self_attention"),
        *norm("transformer.ln_f", "decoder/norm"),
        *decoder.HEADS,
    ),
    heads=decoder.heads("Bloom", "lm", "classes", "tokens", "span"),
    prefix="transformer.",
    config_from_hf=_config_from_hf,
    config_to_hf=_TO_HF,
    copies={"lm_head.weight": "transformer.word_embeddings.weight"},
)
