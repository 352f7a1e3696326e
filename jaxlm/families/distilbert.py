"""DistilBERT (Sanh et al. 2019): half of BERT's layers, no types, no pooler."""

from __future__ import annotations

from jaxlm.config import ModelConfig
from jaxlm.families import bert
from jaxlm.hub.convert import ACTIVATIONS, Family, Key, attention, key_conversion, norm, projection

_FIXED = bert.FIXED | {"types": 0, "norm_epsilon": 1e-12, "classes_activation": "relu"}
_FIXED |= {"attention_out_dropout": 0.0}

_FROM_HF, _TO_HF = key_conversion(
    keys=(
        Key("vocab_size", "vocabulary"),
        Key("max_position_embeddings", "max_length", 512),
        Key("dim", "width"),
        Key("n_layers", "layers"),
        Key("n_heads", "heads"),
        Key("hidden_dim", "mlp_width"),
        Key("activation", "activation", "gelu", ACTIVATIONS),
        Key("tie_word_embeddings", "tied_embeddings", True),
        Key("dropout", "dropout", 0.1),
        Key("attention_dropout", "attention_dropout", 0.1),
        Key("seq_classif_dropout", "classes_dropout", 0.2),
        Key("qa_dropout", "span_dropout", 0.1),
        Key("initializer_range", "initial_std", 0.02),
    ),
    fixed=_FIXED,
    only={},  # sinusoidal positions are stored like learned ones
)

_LAYER, _OURS = "distilbert.transformer.layer.{i}.", "encoder/layers/"

FAMILY = Family(
    presets={
        "distilbert-base": ModelConfig(
            **_FIXED,
            heads_on_top=("masked_lm",),
            vocabulary=30522,
            max_length=512,
            width=768,
            layers=6,
            heads=12,
            activation="gelu",
            dropout=0.1,
            attention_dropout=0.1,
            classes_dropout=0.2,
            span_dropout=None,
        )
    },
    rules=(
        *bert.embeddings("distilbert.embeddings"),
        *attention(_LAYER + "attention.", _OURS + "attention", "q_lin", "k_lin", "v_lin", "out_lin"),
        *norm(_LAYER + "sa_layer_norm", _OURS + "attention_norm"),
        *projection(_LAYER + "ffn.lin1", _OURS + "mlp/up"),
        *projection(_LAYER + "ffn.lin2", _OURS + "mlp/down"),
        *norm(_LAYER + "output_layer_norm", _OURS + "mlp_norm"),
        *bert.vocabulary("vocab_transform", "vocab_layer_norm", "vocab_projector", "vocab_projector.bias"),
        *projection("pre_classifier", "classes_head/dense"),
        *projection("classifier", "classes_head/out"),
        *bert.TOKENS,
        *bert.SPAN,
    ),
    heads={
        ("masked_lm",): "DistilBertForMaskedLM",
        ("classes",): "DistilBertForSequenceClassification",
        ("tokens",): "DistilBertForTokenClassification",
        ("span",): "DistilBertForQuestionAnswering",
        (): "DistilBertModel",
    },
    prefix="distilbert.",
    config_from_hf=_FROM_HF,
    config_to_hf=_TO_HF,
    buffers=("distilbert.embeddings.position_ids",),
    copies={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    renames=bert.RENAMES,
)
