"""Longformer (Beltagy et al. 2020): RoBERTa with local attention, and separate projections for global tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.config.ranges import MAX_INT
from jaxlm.errors import UserError
from jaxlm.families import bert, roberta
from jaxlm.hub.convert import (
    Family,
    Key,
    Rule,
    bias_heads_out,
    key_conversion,
    linear_heads_out,
    projection,
    shortest,
)
from jaxlm.hub.model_files import JsonObject

FIXED = roberta.FIXED | {"layer_kinds": ("local",), "global_attention": True}
# The classifier has the rate of all other layers.
_KEYS = (*(key for key in bert.KEYS if key.hf != "classifier_dropout"), Key("sep_token_id", "separator_token", 2))
_FROM_HF, _TO_HF = key_conversion(_KEYS, FIXED | {"classes_input_dropout": None}, bert.ONLY)
_SELF = "longformer.encoder.layer.{i}.attention.self."
RULES = ("none", "first", "question")  # values of our key `global_tokens` of config.json, which transformers ignores


def attention_from_hf(hf: dict[str, Any], layers: int) -> dict[str, Any]:
    """Returns the fields of a config for `attention_window`, a number or a list, and for the global tokens."""
    windows, values = hf.get("attention_window", 512), JsonObject(hf, "config.json")
    windows = windows if isinstance(windows, list) else [windows] * layers
    if len(windows) != layers:
        raise UserError(
            f"config.json has an attention_window of {len(windows)} entries, and the model {layers} layers; give one "
            f"even number, or one for each layer"
        )
    for window in windows:
        if type(window) is not int or not 0 < window <= MAX_INT or window % 2:
            raise UserError(
                f"config.json has attention_window {window!r}; it counts both sides of a token: give an even number "
                f"of at least 2"
            )
    rule = hf.get("global_tokens", "head")
    if rule not in (None, "head", *RULES):
        raise values.wrong("global_tokens", f"one of {', '.join(RULES)}")
    ours = [window // 2 + 1 for window in windows]
    one = len(set(ours)) == 1
    fields = {"window": ours[0]} if one else {"layer_windows": shortest(ours)}
    return fields | {"global_tokens": rule or "head"}


def attention_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the keys of config.json for the windows and the global tokens."""
    windows = config.layer_windows or (config.window,)
    rule = {} if config.global_tokens == "head" else {"global_tokens": config.global_tokens}
    return {"attention_window": [2 * (windows[n % len(windows)] - 1) for n in range(config.layers)], **rule}


def global_projections(hf: str, of_local: Mapping[str, str]) -> tuple[Rule, ...]:
    """Returns the rules for the projections of global tokens.

    A file without them is read with copies of the other projections, from which the authors started.

    Args:
      hf: the prefix of the names in the file.
      of_local: the names of the other projections "query", "key" and "value" in the file.
    """
    rules = []
    for name, other in of_local.items():
        ours = f"encoder/layers/attention/global_{name}"
        weight, bias = projection(f"{hf}{name}_global", ours, linear_heads_out, bias_heads_out)
        rules += [weight._replace(stand_in=f"{other}.weight"), bias._replace(stand_in=f"{other}.bias")]
    return tuple(rules)


def _config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    config = roberta.with_padding(_FROM_HF(hf), hf)
    return dataclasses.replace(config, **attention_from_hf(hf, config.layers))


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    values = bert.with_types(_TO_HF(config))
    return values | roberta.positions_to_hf(config) | attention_to_hf(config)


def _longformer(layers: int, width: int) -> ModelConfig:
    return ModelConfig(
        **FIXED,
        heads_on_top=("masked_lm",),
        vocabulary=50265,
        max_length=4096,
        types=1,
        width=width,
        layers=layers,
        heads=width // 64,
        window=257,  # 512 tokens of both sides
        activation="gelu",
        norm_epsilon=1e-5,
        position_offset=2,
        padding_token=1,
        separator_token=2,
        classes_input_dropout=None,
        dropout=0.1,
        attention_dropout=0.1,
    )


FAMILY = Family(
    presets={"longformer-base-4096": _longformer(12, 768), "longformer-large-4096": _longformer(24, 1024)},
    rules=(
        *bert.embeddings("longformer.embeddings"),
        *bert.layers("longformer.encoder.layer.{i}"),
        *global_projections(_SELF, {name: f"{_SELF}{name}" for name in ("query", "key", "value")}),
        *projection("longformer.pooler.dense", "pooled_head/dense"),
        *bert.vocabulary("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"),
        *projection("classifier.dense", "classes_head/dense"),
        *projection("classifier.out_proj", "classes_head/out"),
        *bert.TOKENS,
        *bert.SPAN,
    ),
    heads={
        ("masked_lm",): "LongformerForMaskedLM",
        ("masked_lm", "pooled"): "LongformerForMaskedLM",
        ("classes",): "LongformerForSequenceClassification",
        ("tokens",): "LongformerForTokenClassification",
        ("span",): "LongformerForQuestionAnswering",
        ("pooled",): "LongformerModel",
        (): "LongformerModel",
    },
    prefix="longformer.",
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    buffers=("longformer.embeddings.position_ids",),
    copies={
        "lm_head.decoder.weight": "longformer.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    renames=bert.RENAMES,
)
