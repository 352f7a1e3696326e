"""GPT-NeoX (Black et al. 2022) and Pythia (Biderman et al. 2023): attention and MLP read the same hidden states.

A quarter of each head is rotated."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import Bias, ModelConfig
from jaxlm.families import decoder, llama
from jaxlm.hub.convert import ACTIVATIONS, Family, Key, Rule, key_conversion, norm

_FIXED = decoder.FIXED | {"norm_place": "pre", "positions": "rotary"}
_FROM_HF, _TO_HF = key_conversion(
    keys=(
        Key("vocab_size", "vocabulary"),
        Key("max_position_embeddings", "max_length", 2048),
        Key("hidden_size", "width"),
        Key("num_hidden_layers", "layers"),
        Key("num_attention_heads", "heads"),
        Key("intermediate_size", "mlp_width"),
        Key("hidden_act", "activation", "gelu", ACTIVATIONS),
        Key("layer_norm_eps", "norm_epsilon", 1e-5),
        Key("use_parallel_residual", "residual", True, {True: "parallel", False: "sequential"}),
        Key("tie_word_embeddings", "tied_embeddings", False),
        Key("hidden_dropout", "dropout", 0.0),
        Key("attention_dropout", "attention_dropout", 0.0),
        Key("classifier_dropout", "tokens_dropout", 0.1),
        Key("initializer_range", "initial_std", 0.02),
    ),
    fixed=_FIXED,
    only={},
)


def _config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    config = _FROM_HF(hf)
    biases: tuple[Bias, ...] = ("mlp", "norm", *(("query_key_value", "out") if hf.get("attention_bias", True) else ()))
    older = {"rope_theta": hf.get("rotary_emb_base", 10000), "partial_rotary_factor": hf.get("rotary_pct", 0.25)}
    return dataclasses.replace(config, biases=biases, **llama.one_rotary_from_hf(hf | older, head_width=config.C))


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    rotary = llama.one_rotary_to_hf(config, partial=True)
    base, fraction = rotary.pop("rope_theta"), rotary.pop("partial_rotary_factor")
    values = {"attention_bias": "out" in config.biases, "rotary_emb_base": base, "rotary_pct": fraction}
    return _TO_HF(config) | rotary | values


def _neox(layers: int, width: int, heads: int, vocabulary: int = 50304, **fields: Any) -> ModelConfig:
    published: dict[str, Any] = {"max_length": 2048, "activation": "gelu", "residual": "parallel"}
    published |= {"tied_embeddings": False, "biases": ("mlp", "norm", "query_key_value", "out")}
    sizes = {"layers": layers, "width": width, "heads": heads, "vocabulary": vocabulary}
    return ModelConfig(**_FIXED | published | sizes | {"rotary_width": width // heads // 4} | fields)


_LAYER = "gpt_neox.layers.{i}."

FAMILY = Family(
    presets={
        "pythia-70m": _neox(6, 512, 8),
        "pythia-160m": _neox(12, 768, 12),
        "pythia-410m": _neox(24, 1024, 16),
        "pythia-1b": _neox(16, 2048, 8),
        "pythia-1.4b": _neox(24, 2048, 16),
        "pythia-2.8b": _neox(32, 2560, 32),
        "pythia-6.9b": _neox(32, 4096, 32, 50432),
        "pythia-12b": _neox(36, 5120, 40, 50688),
        "gpt-neox-20b": _neox(44, 6144, 64, 50432, activation="gelu_tanh"),
    },
    rules=(
        Rule("gpt_neox.embed_in.weight", "embeddings/tokens"),
        *decoder.neox_layer(_LAYER, "attention"),
        *norm("gpt_neox.final_layer_norm", "decoder/norm"),
        Rule("embed_out.weight", "lm_head/kernel"),
        *decoder.HEADS[1:],
    ),
    heads=decoder.heads("GPTNeoX", "lm", "classes", "tokens", "span"),
    prefix="gpt_neox.",
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    buffers=tuple(_LAYER + f"attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")),
    copies={"embed_out.weight": "gpt_neox.embed_in.weight"},
    renames={"lm_head.weight": "embed_out.weight"},
)
