"""LED, the Longformer-Encoder-Decoder (Beltagy et al. 2020): BART with the attention of Longformer in its encoder."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.families import bart, longformer
from jaxlm.hub.convert import Family, Key, Rule, key_conversion

FIXED = bart.FIXED | {
    "position_offset": 0,
    "layer_kinds": ("local",),
    "decoder_layer_kinds": ("global",),
    "global_attention": True,
}
_OWN_KEYS = ("max_position_embeddings", "scale_embedding")
_KEYS = (
    *(key for key in bart.KEYS if key.hf not in _OWN_KEYS),
    Key("max_encoder_position_embeddings", "max_length", 16384),
    Key("max_decoder_position_embeddings", "decoder_max_length", 1024),
    Key("decoder_start_token_id", "start_token", 2),
)
_FROM_HF, _TO_HF = key_conversion(_KEYS, FIXED, bart.ONLY)


def _config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    config = _FROM_HF(hf)
    return dataclasses.replace(config, **longformer.attention_from_hf(hf, config.layers))


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return _TO_HF(config) | longformer.attention_to_hf(config)


_ENCODER = "led.encoder.layers.{i}.self_attn."
_PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}


def _name(of_bart: str) -> str:
    """Returns LED's name of a tensor of BART."""
    name = "led." + of_bart.removeprefix("model.") if of_bart.startswith("model.") else of_bart
    for old, new in _PROJECTIONS.items():
        name = name.replace(f"{_ENCODER}{old}", f"{_ENCODER}longformer_self_attn.{new}")
    return name.replace(f"{_ENCODER}out_proj", f"{_ENCODER}output")


def _rules() -> tuple[Rule, ...]:
    of_bart = (rule for rule in bart.FAMILY.rules if not rule.hf.startswith("classification_head."))
    own = f"{_ENCODER}longformer_self_attn."
    projections = longformer.global_projections(own, {name: f"{own}{name}" for name in _PROJECTIONS.values()})
    return (*(rule._replace(hf=_name(rule.hf)) for rule in of_bart), *projections)


def _led(layers: int, width: int, heads: int) -> ModelConfig:
    return ModelConfig(
        **FIXED,
        vocabulary=50265,
        max_length=16384,
        decoder_max_length=1024,
        window=513,  # 1,024 tokens of both sides
        layers=layers,
        width=width,
        heads=heads,
        activation="gelu",
        dropout=0.1,
        classes_dropout=0.0,
        start_token=2,
    )


FAMILY = Family(
    presets={"led-base-16384": _led(6, 768, 12), "led-large-16384": _led(12, 1024, 16)},
    rules=_rules(),
    heads={("lm",): "LEDForConditionalGeneration", (): "LEDModel"},
    prefix="led.",
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    copies={_name(copy): _name(original) for copy, original in bart.FAMILY.copies.items()},
)
