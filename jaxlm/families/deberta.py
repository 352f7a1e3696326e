"""DeBERTa v2 and v3 (He et al. 2021): an encoder whose attention has terms for content and relative position."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError, suggestion
from jaxlm.families import bert
from jaxlm.hub.convert import (
    ACTIVATIONS,
    Family,
    Key,
    Rule,
    bias_heads_out,
    conv_width_last,
    key_conversion,
    linear_heads_out,
    norm,
    projection,
)

_FIXED = bert.FIXED | {"classes_activation": "gelu"}
_DEFAULTS = {"type_vocab_size": 0, "layer_norm_eps": 1e-7}  # defaults that differ from BERT's
_FROM_HF, _TO_HF = key_conversion(
    keys=(
        *(
            key._replace(default=_DEFAULTS.get(key.hf, key.default))
            for key in bert.KEYS
            if key.hf != "classifier_dropout"
        ),
        Key("pooler_dropout", "classes_input_dropout", 0.0),
        Key("cls_dropout", "classes_dropout", None),
        Key("conv_kernel_size", "conv_width", 0),
        Key("conv_act", "conv_activation", "tanh", ACTIVATIONS),
    ),
    fixed=_FIXED,
    only={"conv_groups": 1},
)


def _config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    for name in ("embedding_size", "pooler_hidden_size"):
        if hf.get(name, hf.get("hidden_size")) != hf.get("hidden_size"):
            raise UserError(
                f"config.json has {name} {hf[name]}; only the value of hidden_size is supported: choose another model"
            )
    config, pooler = _FROM_HF(hf), hf.get("pooler_hidden_act", "gelu")
    if pooler not in ACTIVATIONS:
        raise UserError(f"config.json has pooler_hidden_act {pooler!r}{suggestion(str(pooler), ACTIVATIONS)}")
    relative, length = hf.get("relative_attention", False), hf.get("max_relative_positions", -1)
    terms = hf.get("pos_att_type") or ()
    terms = tuple(terms.lower().split("|") if isinstance(terms, str) else terms)
    terms = tuple(term.strip() for term in terms if term.strip() not in ("", "none"))
    fields: dict[str, Any] = {
        "positions": "learned" if hf.get("position_biased_input", True) else "none",
        "relative": "disentangled" if relative else "none",
        "relative_buckets": max(0, hf.get("position_buckets", -1)),
        "relative_distance": length if length >= 1 else config.max_length,
        "relative_terms": tuple(sorted(terms)),
        "relative_shared": hf.get("share_att_key", False),
        "relative_norm": "layer_norm" in hf.get("norm_rel_ebd", "none"),
        "classes_activation": ACTIVATIONS[pooler],
    }
    if terms and not relative:  # their number still scales the scores
        fields["attention_scale"] = (config.C * (1 + len(terms))) ** -0.5
    return dataclasses.replace(config, **fields)


def _idle_terms(config: ModelConfig) -> int:
    """Returns the number of terms in the scale of the scores if the terms themselves are not computed."""
    return 0 if config.attention_scale is None else round(config.attention_scale**-2 / config.C) - 1


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    relative = config.relative == "disentangled"
    activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return _TO_HF(config) | {
        "position_biased_input": config.positions == "learned",
        "relative_attention": relative,
        "position_buckets": config.relative_buckets if relative else -1,
        "max_relative_positions": config.relative_distance if relative else -1,
        "pos_att_type": list(config.relative_terms) if relative else ["c2p", "p2c"][: _idle_terms(config)],
        "share_att_key": relative and config.relative_shared,
        "norm_rel_ebd": "layer_norm" if relative and config.relative_norm else "none",
        "pooler_hidden_act": activations.get(config.classes_activation or "gelu", "gelu"),
        "pooler_hidden_size": config.width,
    }


def _deberta(layers: int, width: int, heads: int, vocabulary: int = 128100) -> ModelConfig:
    return ModelConfig(
        **_FIXED | {"positions": "none"},
        heads_on_top=("masked_lm",),
        vocabulary=vocabulary,
        max_length=512,
        width=width,
        layers=layers,
        heads=heads,
        activation="gelu",
        norm_epsilon=1e-7,
        relative="disentangled",
        relative_buckets=256,
        relative_distance=512,
        dropout=0.1,
        attention_dropout=0.1,
    )


_LAYER, _OURS = "deberta.encoder.layer.{i}", "encoder/layers/attention"

FAMILY = Family(
    presets={
        "deberta-v2-xlarge": dataclasses.replace(_deberta(24, 1536, 24), conv_width=3),
        "deberta-v2-xxlarge": dataclasses.replace(_deberta(48, 1536, 24), conv_width=3),
        "deberta-v3-xsmall": _deberta(12, 384, 6),
        "deberta-v3-small": _deberta(6, 768, 12),
        "deberta-v3-base": _deberta(12, 768, 12),
        "deberta-v3-large": _deberta(24, 1024, 16),
    },
    rules=(
        *bert.embeddings("deberta.embeddings"),
        Rule("deberta.encoder.rel_embeddings.weight", "encoder/relative/distances"),
        *norm("deberta.encoder.LayerNorm", "encoder/relative/norm"),
        *projection("deberta.encoder.conv.conv", "encoder/conv", conv_width_last),
        *norm("deberta.encoder.conv.LayerNorm", "encoder/conv/norm"),
        *bert.layers(_LAYER, ("query_proj", "key_proj", "value_proj")),
        *projection(
            _LAYER + ".attention.self.pos_query_proj", _OURS + "/relative_query", linear_heads_out, bias_heads_out
        ),
        *projection(_LAYER + ".attention.self.pos_key_proj", _OURS + "/relative_key", linear_heads_out, bias_heads_out),
        *bert.vocabulary(
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.decoder",
            "cls.predictions.bias",
        ),
        *projection("pooler.dense", "classes_head/dense"),
        *projection("classifier", "classes_head/out"),
        *bert.TOKENS,
        *bert.SPAN,
    ),
    heads={
        ("masked_lm",): "DebertaV2ForMaskedLM",
        ("classes",): "DebertaV2ForSequenceClassification",
        ("tokens",): "DebertaV2ForTokenClassification",
        ("span",): "DebertaV2ForQuestionAnswering",
        (): "DebertaV2Model",
    },
    prefix="deberta.",
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    # The second one has no effect without relative attention.
    buffers=("deberta.embeddings.position_ids", "deberta.encoder.LayerNorm.*", "mask_predictions.*"),
    copies={
        "cls.predictions.decoder.weight": "deberta.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    # With `legacy` false, the head computes the same but has other names.
    naming={"legacy": True},
    renames=bert.RENAMES
    | {
        "lm_predictions.lm_head.dense.weight": "cls.predictions.transform.dense.weight",
        "lm_predictions.lm_head.dense.bias": "cls.predictions.transform.dense.bias",
        "lm_predictions.lm_head.LayerNorm.weight": "cls.predictions.transform.LayerNorm.weight",
        "lm_predictions.lm_head.LayerNorm.bias": "cls.predictions.transform.LayerNorm.bias",
        "lm_predictions.lm_head.bias": "cls.predictions.bias",
    },
)
