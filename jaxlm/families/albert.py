"""ALBERT (Lan et al. 2020): one set of parameters for all layers, and narrow embeddings."""

from __future__ import annotations

from jaxlm.config import ModelConfig
from jaxlm.families import bert
from jaxlm.hub.convert import ACTIVATIONS, Family, Key, attention, key_conversion, norm, projection

_FIXED = bert.FIXED | {"mlp_out_dropout": 0.0}
_OWN = ("hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
_FROM_HF, _TO_HF = key_conversion(
    keys=(
        *(key for key in bert.KEYS if key.hf not in _OWN),
        Key("hidden_act", "activation", "gelu_new", ACTIVATIONS),
        Key("hidden_dropout_prob", "dropout", 0.0),
        Key("attention_probs_dropout_prob", "attention_dropout", 0.0),
        Key("classifier_dropout_prob", "classes_dropout", 0.1),
        Key("classifier_dropout_prob", "tokens_dropout", 0.1),
        Key("embedding_size", "embedding_width", 128),
        Key("num_hidden_groups", "distinct_layers", 1),
    ),
    fixed=_FIXED,
    only={"inner_group_num": 1, "position_embedding_type": "absolute"},
)


def _albert(layers: int, width: int, heads: int) -> ModelConfig:
    return ModelConfig(
        **_FIXED,
        heads_on_top=("masked_lm", "next_sentence"),
        vocabulary=30000,
        max_length=512,
        types=2,
        width=width,
        layers=layers,
        distinct_layers=1,
        heads=heads,
        mlp_width=4 * width,
        activation="gelu_tanh",
        norm_epsilon=1e-12,
        embedding_width=128,
        classes_dropout=0.1,
        tokens_dropout=0.1,
    )


_LAYER, _OURS = "albert.encoder.albert_layer_groups.{i}.albert_layers.0.", "encoder/layers/"

FAMILY = Family(
    presets={
        "albert-base": _albert(12, 768, 12),
        "albert-large": _albert(24, 1024, 16),
        "albert-xlarge": _albert(24, 2048, 16),
        "albert-xxlarge": _albert(12, 4096, 64),
    },
    rules=(
        *bert.embeddings("albert.embeddings"),
        *projection("albert.encoder.embedding_hidden_mapping_in", "embeddings/project"),
        *attention(_LAYER + "attention.", _OURS + "attention", "query", "key", "value", "dense"),
        *norm(_LAYER + "attention.LayerNorm", _OURS + "attention_norm"),
        *projection(_LAYER + "ffn", _OURS + "mlp/up"),
        *projection(_LAYER + "ffn_output", _OURS + "mlp/down"),
        *norm(_LAYER + "full_layer_layer_norm", _OURS + "mlp_norm"),
        *projection("albert.pooler", "pooled_head/dense"),
        *bert.vocabulary("predictions.dense", "predictions.LayerNorm", "predictions.decoder", "predictions.bias"),
        *projection("sop_classifier.classifier", "next_sentence_head"),  # sentence order: 1 means swapped
        *projection("albert.pooler", "classes_head/dense"),
        *projection("classifier", "classes_head/out"),
        *bert.TOKENS,
        *bert.SPAN,
    ),
    heads={
        ("masked_lm", "next_sentence"): "AlbertForPreTraining",
        ("masked_lm",): "AlbertForMaskedLM",
        ("masked_lm", "pooled"): "AlbertForMaskedLM",
        ("classes",): "AlbertForSequenceClassification",
        ("tokens",): "AlbertForTokenClassification",
        ("span",): "AlbertForQuestionAnswering",
        ("pooled",): "AlbertModel",
        (): "AlbertModel",
    },
    prefix="albert.",
    config_from_hf=_FROM_HF,
    config_to_hf=lambda config: bert.with_types(_TO_HF(config)) | {"embedding_size": config.W},
    buffers=("albert.embeddings.position_ids",),
    copies={
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    },
    renames=bert.RENAMES,
)
