"""ELECTRA (Clark et al. 2020): BERT with narrower embeddings, trained to detect replaced tokens; the generator of the
replacements is a masked LM."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.families import bert, roberta
from jaxlm.hub.convert import Family, Key, Rule, key_conversion, norm, projection

_FIXED = bert.FIXED | {"transform_activation": "gelu", "classes_activation": "gelu"}
_FROM_HF, _TO_HF = key_conversion(
    (roberta.TWICE, *bert.KEYS, Key("embedding_size", "embedding_width", 128)), _FIXED, bert.ONLY
)


def _config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    config = _FROM_HF(hf)
    # Embeddings with the width of the model have no projection.
    return dataclasses.replace(config, embedding_width=None) if config.width == config.W else config


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return bert.with_types(_TO_HF(config)) | {"embedding_size": config.W}


def _electra(layers: int, width: int, heads: int, embedding: int | None, head: Any = "replaced") -> ModelConfig:
    return ModelConfig(
        **_FIXED,
        heads_on_top=(head,),
        vocabulary=30522,
        max_length=512,
        types=2,
        width=width,
        layers=layers,
        heads=heads,
        activation="gelu",
        norm_epsilon=1e-12,
        embedding_width=embedding,
        classes_input_dropout=None,
        dropout=0.1,
        attention_dropout=0.1,
    )


FAMILY = Family(
    presets={
        "electra-small": _electra(12, 256, 4, 128),
        "electra-base": _electra(12, 768, 12, None),
        "electra-large": _electra(24, 1024, 16, None),
        "electra-small-generator": _electra(12, 256, 4, 128, "masked_lm"),
        "electra-base-generator": _electra(12, 256, 4, 768, "masked_lm"),
    },
    rules=(
        *bert.embeddings("electra.embeddings"),
        *projection("electra.embeddings_project", "embeddings/project"),
        *bert.layers("electra.encoder.layer.{i}"),
        *projection("discriminator_predictions.dense", "replaced_head/dense"),
        *projection("discriminator_predictions.dense_prediction", "replaced_head/out"),
        *projection("generator_predictions.dense", "masked_lm_head/transform"),
        *norm("generator_predictions.LayerNorm", "masked_lm_head/norm"),
        Rule("generator_lm_head.weight", "masked_lm_head/vocabulary/kernel"),
        Rule("generator_lm_head.bias", "masked_lm_head/vocabulary/bias"),
        *projection("classifier.dense", "classes_head/dense"),
        *projection("classifier.out_proj", "classes_head/out"),
        *bert.TOKENS,
        *bert.SPAN,
    ),
    heads={
        ("replaced",): "ElectraForPreTraining",
        ("masked_lm",): "ElectraForMaskedLM",
        ("classes",): "ElectraForSequenceClassification",
        ("tokens",): "ElectraForTokenClassification",
        ("span",): "ElectraForQuestionAnswering",
        (): "ElectraModel",
    },
    prefix="electra.",
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    buffers=("electra.embeddings.position_ids",),
    copies={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    renames=bert.RENAMES,
)
