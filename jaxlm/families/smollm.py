"""SmolLM3 (Bakouch et al. 2025): a Llama with layers without rotary positions. Its predecessors are Llamas."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import ModelConfig, is_local, is_rotated
from jaxlm.errors import UserError
from jaxlm.families import decoder, llama
from jaxlm.hub.convert import Key, key_conversion, projection, resolved, shortest

_KEYS = (*llama.KEYS, llama.ACTIVATION, llama.TIED, Key("classifier_dropout", "tokens_dropout", 0.1))
_FROM_HF, _TO_HF = key_conversion(_KEYS, llama.FIXED, {})
_DEFAULTS = {"num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True}


def _config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    hf = _DEFAULTS | hf
    config = _FROM_HF(hf)
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    rotated = _rotated_layers(hf, config.layers)
    default = ["local" if window is not None and not one else "global" for one in rotated]
    config = dataclasses.replace(config, **llama.kinds_from_hf(hf, default))
    kinds = [kind if one else f"{kind}_nope" for kind, one in zip(resolved(config).layer_kinds, rotated)]
    biases = llama.attention_biases(hf)["biases"] + (("mlp",) if hf.get("mlp_bias") else ())
    rotary = llama.one_rotary_from_hf(hf, base=2e6)
    return dataclasses.replace(config, layer_kinds=shortest(kinds), window=window or 0, biases=biases, **rotary)


def _rotated_layers(hf: dict[str, Any], layers: int) -> list[int]:
    """Returns for each layer 1 if it has rotary positions, else 0."""
    rotated, interval = hf.get("no_rope_layers"), hf.get("no_rope_layer_interval", 4)
    if rotated is None:
        return [int((i + 1) % interval != 0) for i in range(layers)]
    if not isinstance(rotated, list) or len(rotated) < layers or not set(rotated) <= {0, 1}:
        raise UserError(f"config.json has no_rope_layers {rotated}; it must be a list of {layers} numbers, 0 or 1")
    return rotated[:layers]


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    kinds = resolved(config).layer_kinds
    local = any(map(is_local, kinds))
    values = {
        "no_rope_layers": [int(is_rotated(kind)) for kind in kinds],
        "use_sliding_window": local,
        "sliding_window": config.window if local else None,
        "attention_bias": "out" in config.biases,
        "mlp_bias": "mlp" in config.biases,
    }
    return _TO_HF(config) | llama.one_rotary_to_hf(config) | llama.kinds_to_hf(config) | values


_3B: dict[str, Any] = {"vocabulary": 128256, "max_length": 65536, "tied_embeddings": True, "rotary_base": 5e6}
_3B |= {"norm_epsilon": 1e-6, "layer_kinds": ("global", "global", "global", "global_nope")}
_BASE = llama.variant(
    "SmolLM3", {"smollm3-3b": llama.preset(36, 2048, 11008, 16, 4, **_3B)}, _config_from_hf, _config_to_hf
)
_SPAN = "span_head/out/kernel"
# The class of transformers for this head has another prefix.
_OF_SPAN = (rule._replace(hf=rule.hf.replace("model.", "transformer.", 1), where=_SPAN) for rule in _BASE.rules)

FAMILY = _BASE._replace(
    rules=(
        *(rule._replace(unless=_SPAN) for rule in _BASE.rules),
        *_OF_SPAN,
        *projection("score", "tokens_head/out"),
        *projection("qa_outputs", "span_head/out"),
    ),
    heads=decoder.heads("SmolLM3", "lm", "classes", "tokens", "span"),
)
