"""MPNet (Song et al. 2020), the base of many sentence encoders: a RoBERTa without types, with T5's relative positions
in addition to learned ones."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.families import bert, roberta
from jaxlm.hub.convert import Family, Rule, attention, key_conversion, norm, projection

_FIXED = roberta.FIXED | {
    "types": 0,
    "position_offset": 2,
    "padding_token": 1,  # for positions; pad_token_id does not change it
    "relative": "buckets",
    "relative_buckets": 32,
    "relative_distance": 128,
    "classes_input_dropout": None,
}
_KEYS = tuple(key for key in bert.KEYS if key.hf not in ("type_vocab_size", "classifier_dropout"))
# transformers computes with 32 buckets for every value of this key.
_FROM_HF, _TO_HF = key_conversion(_KEYS, _FIXED, {"relative_attention_num_buckets": 32})


def _config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    config = _FROM_HF(hf)
    return dataclasses.replace(config, max_length=config.max_length - config.position_offset)


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return _TO_HF(config) | {"max_position_embeddings": config.max_length + config.position_offset, "pad_token_id": 1}


_LAYER, _OURS = "mpnet.encoder.layer.{i}.", "encoder/layers/"

FAMILY = Family(
    presets={
        "mpnet-base": ModelConfig(
            **_FIXED,
            heads_on_top=("masked_lm",),
            vocabulary=30527,
            max_length=512,
            width=768,
            layers=12,
            heads=12,
            activation="gelu",
            norm_epsilon=1e-5,
            dropout=0.1,
            attention_dropout=0.1,
        )
    },
    rules=(
        *bert.embeddings("mpnet.embeddings"),
        Rule("mpnet.encoder.relative_attention_bias.weight", "encoder/relative/buckets"),
        *attention(_LAYER + "attention.attn.", _OURS + "attention", "q", "k", "v", "o"),
        *norm(_LAYER + "attention.LayerNorm", _OURS + "attention_norm"),
        *projection(_LAYER + "intermediate.dense", _OURS + "mlp/up"),
        *projection(_LAYER + "output.dense", _OURS + "mlp/down"),
        *norm(_LAYER + "output.LayerNorm", _OURS + "mlp_norm"),
        *projection("mpnet.pooler.dense", "pooled_head/dense"),
        *bert.vocabulary("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"),
        *projection("classifier.dense", "classes_head/dense"),
        *projection("classifier.out_proj", "classes_head/out"),
        *bert.TOKENS,
        *bert.SPAN,
    ),
    heads={heads: name.replace("Roberta", "MPNet") for heads, name in roberta.FAMILY.heads.items()},
    prefix="mpnet.",
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    buffers=("mpnet.embeddings.position_ids",),
    copies={
        "lm_head.decoder.weight": "mpnet.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
)
