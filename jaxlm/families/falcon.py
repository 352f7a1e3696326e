"""Falcon (Almazrouei et al. 2023): few key-value heads, and attention and MLP that read the same hidden states.

The 7B model has one norm in each layer, and the 40B model two. The RW models have sequential layers and ALiBi."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import Bias, ModelConfig, Residual
from jaxlm.errors import UserError
from jaxlm.families import decoder, llama
from jaxlm.hub.convert import ACTIVATIONS, Family, Key, Rule, key_conversion, norm

_FIXED = decoder.FIXED | {"norm_place": "pre", "embedding_dropout": 0.0}
_FROM_HF, _TO_HF = key_conversion(
    keys=(
        Key("vocab_size", "vocabulary"),
        Key("max_position_embeddings", "max_length", 2048),
        Key("hidden_size", "width"),
        Key("num_hidden_layers", "layers"),
        Key("num_attention_heads", "heads"),
        Key("ffn_hidden_size", "mlp_width", None),
        Key("activation", "activation", "gelu", ACTIVATIONS),
        Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Key("tie_word_embeddings", "tied_embeddings", True),
        Key("hidden_dropout", "dropout", 0.0),
        Key("attention_dropout", "attention_dropout", 0.0),
        Key("classifier_dropout", "tokens_dropout", None),
        Key("initializer_range", "initial_std", 0.02),
    ),
    fixed=_FIXED,
    only={},
)
_BIASES: tuple[Bias, ...] = ("query_key_value", "out", "mlp")
_ALIBI: dict[str, Any] = {"positions": "none", "relative": "alibi", "alibi_scaled": True}


def _config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    config = _FROM_HF(hf)
    new, several = hf.get("new_decoder_architecture", False), not hf.get("multi_query", True)
    kv_heads = (hf.get("num_kv_heads") or config.heads) if new else config.heads if several else 1
    positions = _ALIBI if hf.get("alibi") else {"positions": "rotary", **llama.one_rotary_from_hf(hf)}
    biases: tuple[Bias, ...] = (*(_BIASES if hf.get("bias") else ()), "norm")
    return dataclasses.replace(config, kv_heads=kv_heads, residual=_residual(hf), biases=biases, **positions)


def _residual(hf: dict[str, Any]) -> Residual:
    new, parallel = bool(hf.get("new_decoder_architecture")), hf.get("parallel_attn", True)
    norms = hf.get("num_ln_in_parallel_attn") or (2 if new else 1)
    if (new and not parallel) or norms not in (1, 2) or (norms == 2 and parallel and not new):
        raise UserError(
            f"config.json has new_decoder_architecture {new}, parallel_attn {parallel} and num_ln_in_parallel_attn "
            f"{norms}, which transformers cannot compute either: choose another model"
        )
    if not parallel:
        return "sequential"
    return "parallel" if norms == 2 else "parallel_one_norm"


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    new = config.residual == "parallel" or (config.residual != "sequential" and config.K not in (1, config.heads))
    values = {
        "new_decoder_architecture": new,
        "multi_query": config.K == 1,
        "num_kv_heads": config.K if new else config.heads,
        "parallel_attn": config.residual != "sequential",
        "num_ln_in_parallel_attn": (2 if config.residual == "parallel" else 1) if new else None,
        "alibi": config.relative == "alibi",
        "bias": set(_BIASES) <= set(config.biases),
    }
    return _TO_HF(config) | llama.one_rotary_to_hf(config) | values


def _falcon(layers: int, width: int, heads: int, kv_heads: int, residual: Residual, **fields: Any) -> ModelConfig:
    published: dict[str, Any] = {"vocabulary": 65024, "max_length": 2048, "activation": "gelu", "biases": ("norm",)}
    published |= {"layers": layers, "width": width, "heads": heads, "kv_heads": kv_heads, "residual": residual}
    return ModelConfig(**_FIXED | {"positions": "rotary"} | published | fields)


_RW: dict[str, Any] = _ALIBI | {"vocabulary": 50304, "biases": (*_BIASES, "norm")}
_LAYER = "transformer.h.{i}."
_NORMS = decoder.LAYERS + "attention_norm", decoder.LAYERS + "mlp_norm"


def _norms(names: tuple[str, str], parallel: bool) -> list[Rule]:
    """Returns the rules for the norms of a layer, which have these names in models with or without two norms."""
    rules = (rule for theirs, ours in zip(names, _NORMS) for rule in norm(_LAYER + theirs, ours))
    return [rule._replace(when=lambda config: (config.residual == "parallel") == parallel) for rule in rules]


FAMILY = Family(
    presets={
        "falcon-7b": _falcon(32, 4544, 71, 1, "parallel_one_norm"),
        "falcon-40b": _falcon(60, 8192, 128, 8, "parallel"),
        "falcon-180b": _falcon(80, 14848, 232, 8, "parallel"),
        "falcon-rw-1b": _falcon(24, 2048, 32, 32, "sequential", **_RW),
        "falcon-rw-7b": _falcon(36, 4096, 64, 64, "sequential", **_RW | {"vocabulary": 65024}),
    },
    rules=(
        Rule("transformer.word_embeddings.weight", "embeddings/tokens"),
        *_norms(("input_layernorm", "post_attention_layernorm"), parallel=False),
        *_norms(("ln_attn", "ln_mlp"), parallel=True),
        *decoder.neox_layer(_LAYER, "self_attention", norms=False),
        *norm("transformer.ln_f", "decoder/norm"),
        *decoder.HEADS,
    ),
    heads=decoder.heads("Falcon", "lm", "classes", "tokens", "span"),
    prefix="transformer.",
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    copies={"lm_head.weight": "transformer.word_embeddings.weight"},
)
