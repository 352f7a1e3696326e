"""Marian and the translation models of OPUS-MT (Junczys-Dowmunt et al. 2018): a BART with sinusoidal positions and
without a norm of the embeddings."""

from __future__ import annotations

import dataclasses

from jaxlm.families import bart
from jaxlm.hub.convert import Key, key_conversion

FIXED = bart.FIXED | {"positions": "sinusoidal", "position_offset": 0, "embedding_norm": False}
_START = Key("decoder_start_token_id", "start_token", 58100)
_FROM_HF, _TO_HF = key_conversion(
    keys=(*bart.KEYS, _START),
    fixed=FIXED,
    only=bart.ONLY | {"share_encoder_decoder_embeddings": True},
)

FAMILY = bart.FAMILY._replace(
    presets={
        "opus-mt": dataclasses.replace(
            bart.FAMILY.presets["bart-base"],
            positions="sinusoidal",
            position_offset=0,
            embedding_norm=False,
            vocabulary=58101,
            max_length=512,
            width=512,
            heads=8,
            activation="silu",
            scale_embeddings=True,
            start_token=58100,
        )
    },
    heads={("lm",): "MarianMTModel", (): "MarianModel"},
    config_from_hf=_FROM_HF,
    config_to_hf=_TO_HF,
    buffers=("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"),
)
