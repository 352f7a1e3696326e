"""Gemma 1, 2 and 3 for text (Gemma Team 2024, 2025): a Llama with scaled embeddings and norms that scale by 1 + s.

Gemma 2 adds norms around each sublayer, soft caps and local layers, Gemma 3 normalised queries and keys."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.families import llama
from jaxlm.hub.convert import ACTIVATIONS, Family, Key, key_conversion, norm

_FIXED = llama.FIXED | {"norm": "rmsnorm_plus_one", "scale_embeddings": True}
_KEYS = (*llama.KEYS, Key("tie_word_embeddings", "tied_embeddings", True))
_LAYER, _OURS = "model.layers.{i}.", "decoder/layers/"
# Files of the first Gemma contain "gelu" for the approximation with tanh.
_FIRST = Key("hidden_act", "activation", "gelu_pytorch_tanh", {**ACTIVATIONS, "gelu": "gelu_tanh"})
_NEXT = Key("hidden_activation", "activation", "gelu_pytorch_tanh", ACTIVATIONS)
_ONLY = {"use_bidirectional_attention": False}
_FIRST_FROM_HF, _FIRST_TO_HF = key_conversion((*_KEYS, _FIRST), _FIXED, _ONLY)
_NEXT_FROM_HF, _NEXT_TO_HF = key_conversion((*_KEYS, _NEXT), _FIXED | {"norm_place": "sandwich"}, _ONLY)


def _gemma_from_hf(hf: dict[str, Any]) -> ModelConfig:
    hf = {"head_dim": 256} | hf
    return dataclasses.replace(_FIRST_FROM_HF(hf), **llama.one_rotary_from_hf(hf), **llama.attention_biases(hf))


def _gemma_to_hf(config: ModelConfig) -> dict[str, Any]:
    values = _FIRST_TO_HF(config) | llama.one_rotary_to_hf(config) | {"attention_bias": "out" in config.biases}
    return values | {"hidden_act": "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else values["hidden_act"]}


def _next_from_hf(hf: dict[str, Any], kinds: list[str], cap: float | None, logit_cap: float | None) -> ModelConfig:
    hf = {"head_dim": 256, "num_key_value_heads": 4} | hf
    return dataclasses.replace(
        _NEXT_FROM_HF(hf),
        attention_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_cap=hf.get("attn_logit_softcapping", cap) or 0.0,
        logit_cap=hf.get("final_logit_softcapping", logit_cap) or 0.0,
        window=hf.get("sliding_window", 4096),
        **llama.kinds_from_hf(hf, kinds),
        **llama.attention_biases(hf),
    )


def _next_to_hf(config: ModelConfig) -> dict[str, Any]:
    scale = config.C**-0.5 if config.attention_scale is None else config.attention_scale
    values = {
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": config.attention_cap or None,
        "final_logit_softcapping": config.logit_cap or None,
        "sliding_window": config.window,
        "attention_bias": "out" in config.biases,
    }
    return _NEXT_TO_HF(config) | llama.kinds_to_hf(config) | values


def _gemma2_from_hf(hf: dict[str, Any]) -> ModelConfig:
    kinds = ["global" if i % 2 else "local" for i in range(hf.get("num_hidden_layers", 26))]
    return dataclasses.replace(_next_from_hf(hf, kinds, 50.0, 30.0), **llama.one_rotary_from_hf(hf))


def _gemma3_from_hf(hf: dict[str, Any]) -> ModelConfig:
    period = hf.get("sliding_window_pattern", 6)
    kinds = ["local" if (i + 1) % period else "global" for i in range(hf.get("num_hidden_layers", 26))]
    rotary = llama.two_rotaries_from_hf(hf, ("rope_theta", 1e6), ("rope_local_base_freq", 10000.0))
    config = _next_from_hf(hf, kinds, None, None)
    # Its files contain a cap of the scores, which no implementation uses.
    return dataclasses.replace(config, attention_cap=0.0, query_key_norm=True, **rotary)


def _gemma3_to_hf(config: ModelConfig) -> dict[str, Any]:
    return _next_to_hf(config) | llama.two_rotaries_to_hf(config, "rope_theta", "rope_local_base_freq")


def _gemma(layers: int, width: int, mlp_width: int, heads: int, kv_heads: int, **fields: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"layers": layers, "width": width, "mlp_width": mlp_width}
    sizes |= {"heads": heads, "kv_heads": kv_heads, "head_width": 256}
    published: dict[str, Any] = {"vocabulary": 256000, "max_length": 8192, "norm_epsilon": 1e-6}
    return ModelConfig(**_FIXED | published | sizes | {"activation": "gelu_tanh"} | fields)


_GEMMA_2: dict[str, Any] = {"norm_place": "sandwich", "attention_cap": 50.0, "logit_cap": 30.0}
_GEMMA_2 |= {"layer_kinds": ("local", "global"), "window": 4096}
_GEMMA_3: dict[str, Any] = {"norm_place": "sandwich", "query_key_norm": True, "vocabulary": 262144}
_GEMMA_3 |= {"layer_kinds": ("local",) * 5 + ("global",), "rotary_base": 1e6, "local_rotary_base": 10000.0}

FAMILY = Family(
    presets={"gemma-2b": _gemma(18, 2048, 16384, 8, 1), "gemma-7b": _gemma(28, 3072, 24576, 16, 16)},
    rules=(*llama.BODY, *norm(_LAYER + "post_attention_layernorm", _OURS + "mlp_norm")),
    heads={("lm",): "GemmaForCausalLM", ("classes",): "GemmaForSequenceClassification", (): "GemmaModel"},
    prefix="model.",
    config_from_hf=_gemma_from_hf,
    config_to_hf=_gemma_to_hf,
    buffers=llama.FAMILY.buffers,
    copies=llama.FAMILY.copies,
)
GEMMA_2 = FAMILY._replace(
    presets={
        "gemma-2-2b": _gemma(26, 2304, 9216, 8, 4, **_GEMMA_2),
        "gemma-2-9b": _gemma(42, 3584, 14336, 16, 8, **_GEMMA_2),
    },
    rules=(
        *llama.BODY,
        *norm(_LAYER + "post_attention_layernorm", _OURS + "attention_out_norm"),
        *norm(_LAYER + "pre_feedforward_layernorm", _OURS + "mlp_norm"),
        *norm(_LAYER + "post_feedforward_layernorm", _OURS + "mlp_out_norm"),
    ),
    heads={("lm",): "Gemma2ForCausalLM", ("classes",): "Gemma2ForSequenceClassification", (): "Gemma2Model"},
    config_from_hf=_gemma2_from_hf,
    config_to_hf=lambda config: _next_to_hf(config) | llama.one_rotary_to_hf(config),
)
GEMMA_3 = GEMMA_2._replace(
    presets={"gemma-3-1b": _gemma(26, 1152, 6912, 4, 1, **_GEMMA_3 | {"window": 512, "max_length": 32768})},
    heads={("lm",): "Gemma3ForCausalLM", ("classes",): "Gemma3TextForSequenceClassification", (): "Gemma3TextModel"},
    config_from_hf=_gemma3_from_hf,
    config_to_hf=_gemma3_to_hf,
)
