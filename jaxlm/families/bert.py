"""BERT (Devlin et al. 2019) and the smaller models of Turc et al. (2019)."""

from __future__ import annotations

from typing import Any

from jaxlm.config import ENCODER_BIASES, ModelConfig
from jaxlm.hub.convert import ACTIVATIONS, Family, Key, Rule, attention, key_conversion, norm, projection

FIXED: dict[str, Any] = {
    "structure": "encoder",
    "norm": "layernorm",
    "norm_place": "post",
    "embedding_norm": True,
    "positions": "learned",
    "biases": ENCODER_BIASES,
    "scale_residual_init": False,
}


def _bert(layers: int, width: int) -> ModelConfig:
    return ModelConfig(
        **FIXED,
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

KEYS = (
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
    Key("classifier_dropout", "classes_dropout", None),
    Key("classifier_dropout", "tokens_dropout", None),
    Key("initializer_range", "initial_std", 0.02),
)
ONLY = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}
_FROM_HF, _TO_HF = key_conversion(KEYS, FIXED, ONLY)


def with_types(hf: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys with at least 1 type, since the format does not support 0 types."""
    return hf | {"type_vocab_size": max(1, hf["type_vocab_size"])}


def embeddings(hf: str) -> tuple[Rule, ...]:
    """Returns the rules for the embeddings with the prefix `hf`."""
    return (
        Rule(f"{hf}.word_embeddings.weight", "embeddings/tokens"),
        Rule(f"{hf}.position_embeddings.weight", "embeddings/positions"),
        Rule(f"{hf}.token_type_embeddings.weight", "embeddings/types"),
        *norm(f"{hf}.LayerNorm", "embeddings/norm"),
    )


def layers(hf: str, projections: tuple[str, str, str] = ("query", "key", "value")) -> tuple[Rule, ...]:
    """Returns the rules for the layers of the encoder with the prefix `hf`."""
    query, key, value = (f"self.{name}" for name in projections)
    return (
        *attention(f"{hf}.attention.", "encoder/layers/attention", query, key, value, "output.dense"),
        *norm(f"{hf}.attention.output.LayerNorm", "encoder/layers/attention_norm"),
        *projection(f"{hf}.intermediate.dense", "encoder/layers/mlp/up"),
        *projection(f"{hf}.output.dense", "encoder/layers/mlp/down"),
        *norm(f"{hf}.output.LayerNorm", "encoder/layers/mlp_norm"),
    )


def vocabulary(transform: str, transform_norm: str, decoder: str, bias: str) -> tuple[Rule, ...]:
    """Returns the rules for the masked LM head with these names."""
    kernel, ours = "masked_lm_head/vocabulary/kernel", "masked_lm_head/vocabulary/bias"
    rules = (
        *projection(transform, "masked_lm_head/transform"),
        *norm(transform_norm, "masked_lm_head/norm"),
        Rule(f"{decoder}.weight", kernel),
    )
    if bias == f"{decoder}.bias":
        return (*rules, Rule(bias, ours))
    # In an untied model, transformers computes with the decoder's bias, but stores both.
    untied = (Rule(f"{decoder}.bias", ours, where=kernel), Rule(bias, ours, where=kernel, idle=True))
    return (*rules, Rule(bias, ours, unless=kernel), *untied)


# Heads with one linear layer have the same names in all families of this kind.
TOKENS = projection("classifier", "tokens_head/out")
SPAN = projection("qa_outputs", "span_head/out")
RENAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

FAMILY = Family(
    presets=PRESETS,
    rules=(
        *embeddings("bert.embeddings"),
        *layers("bert.encoder.layer.{i}"),
        *projection("bert.pooler.dense", "pooled_head/dense"),
        *vocabulary(
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.decoder",
            "cls.predictions.bias",
        ),
        *projection("cls.seq_relationship", "next_sentence_head"),
        *projection("bert.pooler.dense", "classes_head/dense"),
        *projection("classifier", "classes_head/out"),
        *TOKENS,
        *SPAN,
    ),
    heads={
        ("masked_lm", "next_sentence"): "BertForPreTraining",
        ("masked_lm",): "BertForMaskedLM",
        ("masked_lm", "pooled"): "BertForMaskedLM",  # this class has no pooler, but ignores one in the file
        ("next_sentence",): "BertForNextSentencePrediction",
        ("classes",): "BertForSequenceClassification",
        ("tokens",): "BertForTokenClassification",
        ("span",): "BertForQuestionAnswering",
        ("pooled",): "BertModel",
        (): "BertModel",
    },
    prefix="bert.",
    config_from_hf=_FROM_HF,
    config_to_hf=lambda config: with_types(_TO_HF(config)),
    buffers=("bert.embeddings.position_ids",),
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    renames=RENAMES,
)
