"""RoBERTa (Liu et al. 2019), XLM-RoBERTa (Conneau et al. 2020) and CamemBERT (Martin et al. 2020): BERT with positions
that skip padding, and a classifier with a separate projection."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.families import bert
from jaxlm.hub.convert import Family, Key, key_conversion, projection

FIXED = bert.FIXED | {"transform_activation": "gelu"}
TWICE = Key("classifier_dropout", "classes_input_dropout", None)  # also before the classifier's projection
_FROM_HF, _TO_HF = key_conversion((TWICE, *bert.KEYS), FIXED, bert.ONLY)


def with_padding(config: ModelConfig, hf: dict[str, Any]) -> ModelConfig:
    """Returns the config with positions that skip padding; `config` counts all rows of the table as positions."""
    # Positions of tokens start at 1 + padding_token; padding has the position padding_token.
    padding = hf.get("pad_token_id", 1)
    return dataclasses.replace(
        config, padding_token=padding, position_offset=padding + 1, max_length=config.max_length - padding - 1
    )


def _config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    return with_padding(_FROM_HF(hf), hf)


def positions_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the keys of config.json for positions that skip padding."""
    return {
        "max_position_embeddings": config.max_length + config.position_offset,
        "pad_token_id": max(0, config.position_offset - 1),
    }


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return bert.with_types(_TO_HF(config)) | positions_to_hf(config)


def _roberta(layers: int, width: int, vocabulary: int = 50265) -> ModelConfig:
    return ModelConfig(
        **FIXED,
        heads_on_top=("masked_lm",),
        vocabulary=vocabulary,
        max_length=512,
        types=1,
        width=width,
        layers=layers,
        heads=width // 64,
        activation="gelu",
        norm_epsilon=1e-5,
        position_offset=2,
        padding_token=1,
        classes_input_dropout=None,
        dropout=0.1,
        attention_dropout=0.1,
    )


FAMILY = Family(
    presets={"roberta-base": _roberta(12, 768), "roberta-large": _roberta(24, 1024)},
    rules=(
        *bert.embeddings("roberta.embeddings"),
        *bert.layers("roberta.encoder.layer.{i}"),
        *projection("roberta.pooler.dense", "pooled_head/dense"),
        *bert.vocabulary("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"),
        *projection("classifier.dense", "classes_head/dense"),
        *projection("classifier.out_proj", "classes_head/out"),
        *bert.TOKENS,
        *bert.SPAN,
    ),
    heads={
        ("masked_lm",): "RobertaForMaskedLM",
        ("masked_lm", "pooled"): "RobertaForMaskedLM",
        ("classes",): "RobertaForSequenceClassification",
        ("tokens",): "RobertaForTokenClassification",
        ("span",): "RobertaForQuestionAnswering",
        ("pooled",): "RobertaModel",
        (): "RobertaModel",
    },
    prefix="roberta.",
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    buffers=("roberta.embeddings.position_ids",),
    copies={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    renames=bert.RENAMES,
)

XLM_ROBERTA = FAMILY._replace(
    presets={"xlm-roberta-base": _roberta(12, 768, 250002), "xlm-roberta-large": _roberta(24, 1024, 250002)},
    heads={heads: f"XLM{name}" for heads, name in FAMILY.heads.items()},
)
CAMEMBERT = FAMILY._replace(
    presets={"camembert-base": _roberta(12, 768, 32005), "camembert-large": _roberta(24, 1024, 32005)},
    heads={heads: name.replace("Roberta", "Camembert") for heads, name in FAMILY.heads.items()},
)
