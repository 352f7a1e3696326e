"""BERT (Devlin et al. 2019) and the smaller ones of Turc et al. (2019)."""

from __future__ import annotations

from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.hub.convert import (
    ACTIVATIONS,
    Family,
    Key,
    Rule,
    bias_heads_out,
    keyed,
    linear,
    linear_heads_in,
    linear_heads_out,
)

_FIXED: dict[str, Any] = {
    "structure": "encoder",
    "gated": False,
    "norm": "layernorm",
    "norm_place": "post",
    "embedding_norm": True,
    "positions": "learned",
    "biases": True,
    "scale_embeddings": False,
    "scale_residual_init": False,
}


def _bert(layers: int, width: int) -> ModelConfig:
    return ModelConfig(
        **_FIXED,
        heads_on_top=("masked_lm", "next_sentence"),
        vocabulary=30522,
        max_length=512,
        types=2,
        width=width,
        layers=layers,
        heads=width // 64,
        activation="gelu",
        norm_epsilon=1e-12,
        dropout=0.1,
        attention_dropout=0.1,
    )


PRESETS = {
    "bert-tiny": _bert(2, 128),
    "bert-mini": _bert(4, 256),
    "bert-small": _bert(4, 512),
    "bert-medium": _bert(8, 512),
    "bert-base": _bert(12, 768),
    "bert-large": _bert(24, 1024),
}

_FROM_HF, _TO_HF = keyed(
    keys=(
        Key("vocab_size", "vocabulary"),
        Key("max_position_embeddings", "max_length"),
        Key("type_vocab_size", "types", 2),
        Key("hidden_size", "width"),
        Key("num_hidden_layers", "layers"),
        Key("num_attention_heads", "heads"),
        Key("intermediate_size", "mlp_width"),
        Key("hidden_act", "activation", "gelu", ACTIVATIONS),
        Key("layer_norm_eps", "norm_epsilon", 1e-12),
        Key("tie_word_embeddings", "tied_embeddings", True),
        Key("hidden_dropout_prob", "dropout", 0.1),
        Key("attention_probs_dropout_prob", "attention_dropout", 0.1),
        Key("initializer_range", "initial_std", 0.02),
    ),
    fixed=_FIXED,
    only={"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"},
)


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    return _TO_HF(config) | {"type_vocab_size": max(1, config.types)}  # never 0, so that a model without is not said


def _linear(hf: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{hf}.weight", f"{ours}/kernel", linear), Rule(f"{hf}.bias", f"{ours}/bias")


def _norm(hf: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{hf}.LayerNorm.weight", f"{ours}/scale"), Rule(f"{hf}.LayerNorm.bias", f"{ours}/bias")


_LAYER, _OURS = "bert.encoder.layer.{i}.", "encoder/layers/"
_ATTENTION = _OURS + "attention/"
_VOCABULARY = "masked_lm_head/vocabulary/"

FAMILY = Family(
    presets=PRESETS,
    rules=(
        Rule("bert.embeddings.word_embeddings.weight", "embeddings/tokens"),
        Rule("bert.embeddings.position_embeddings.weight", "embeddings/positions"),
        Rule("bert.embeddings.token_type_embeddings.weight", "embeddings/types"),
        *_norm("bert.embeddings", "embeddings/norm"),
        *(
            rule
            for part in ("query", "key", "value")
            for rule in (
                Rule(_LAYER + f"attention.self.{part}.weight", _ATTENTION + f"{part}/kernel", linear_heads_out),
                Rule(_LAYER + f"attention.self.{part}.bias", _ATTENTION + f"{part}/bias", bias_heads_out),
            )
        ),
        Rule(_LAYER + "attention.output.dense.weight", _ATTENTION + "out/kernel", linear_heads_in),
        Rule(_LAYER + "attention.output.dense.bias", _ATTENTION + "out/bias"),
        *_norm(_LAYER + "attention.output", _OURS + "attention_norm"),
        *_linear(_LAYER + "intermediate.dense", _OURS + "mlp/up"),
        *_linear(_LAYER + "output.dense", _OURS + "mlp/down"),
        *_norm(_LAYER + "output", _OURS + "mlp_norm"),
        *_linear("bert.pooler.dense", "pooled_head/dense"),
        *_linear("cls.predictions.transform.dense", "masked_lm_head/transform"),
        *_norm("cls.predictions.transform", "masked_lm_head/norm"),
        Rule("cls.predictions.decoder.weight", _VOCABULARY + "kernel"),
        Rule("cls.predictions.bias", _VOCABULARY + "bias"),
        # transformers computes with this one, and keeps it apart from the other where the kernel is not tied.
        Rule("cls.predictions.decoder.bias", _VOCABULARY + "bias", where=_VOCABULARY + "kernel"),
        *_linear("cls.seq_relationship", "next_sentence_head"),
    ),
    heads={
        ("masked_lm", "next_sentence"): "BertForPreTraining",
        ("masked_lm",): "BertForMaskedLM",
        ("masked_lm", "pooled"): "BertForMaskedLM",  # has no pooler of its own, leaves one in the file alone
        ("next_sentence",): "BertForNextSentencePrediction",
        ("pooled",): "BertModel",
        (): "BertModel",
    },
    prefix="bert.",
    config_from_hf=_FROM_HF,
    config_to_hf=_to_hf,
    buffers=("bert.embeddings.position_ids",),
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    renames={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
)
