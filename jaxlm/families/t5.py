"""T5 (Raffel et al. 2020), T5 v1.1, Flan-T5 and mT5 (Xue et al. 2021), also without the decoder."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError, suggestion
from jaxlm.hub.convert import ACTIVATIONS, Family, Key, Rule, attention, key_conversion, linear, norm, projection

_FIXED: dict[str, Any] = {
    "structure": "encoder_decoder",
    "types": 0,
    "norm": "rmsnorm",
    "norm_place": "pre",
    "positions": "none",
    "relative": "buckets",
    "attention_scale": 1.0,
    "biases": (),
    "initial_std": 1.0,
    "initial_by_inputs": True,
    "mlp_dropout": None,
    "final_dropout": None,
}

_FROM_HF, _TO_HF = key_conversion(
    keys=(
        Key("vocab_size", "vocabulary"),
        Key("n_positions", "max_length", 512),
        Key("d_model", "width"),
        Key("num_layers", "layers"),
        Key("num_decoder_layers", "decoder_layers", None),
        Key("num_heads", "heads"),
        Key("d_kv", "head_width"),
        Key("d_ff", "mlp_width"),
        Key("relative_attention_num_buckets", "relative_buckets", 32),
        Key("relative_attention_max_distance", "relative_distance", 128),
        Key("layer_norm_epsilon", "norm_epsilon", 1e-6),
        Key("dropout_rate", "attention_dropout", 0.1),
        Key("dropout_rate", "dropout", 0.1),
        Key("decoder_start_token_id", "start_token", 0),
    ),
    fixed=_FIXED,
    only={},
)


def _from_hf(hf: dict[str, Any], mlp: str) -> ModelConfig:
    config = _FROM_HF(hf)
    gate, _, activation = hf.get("feed_forward_proj", mlp).rpartition("-")
    if gate not in ("", "gated") or activation not in ACTIVATIONS:
        raise UserError(
            f"config.json has feed_forward_proj {hf['feed_forward_proj']!r}{suggestion(activation, ACTIVATIONS)}"
        )
    # "gated-gelu" is the approximation with tanh.
    activation = "gelu_new" if (gate, activation) == ("gated", "gelu") else activation
    encoder_only = "T5EncoderModel" in str(hf.get("architectures"))
    values: dict[str, Any] = {"feed_forward": gate or "dense", "activation": ACTIVATIONS[activation]}
    return dataclasses.replace(config, structure="encoder" if encoder_only else "encoder_decoder", **values)


def _t5_from_hf(hf: dict[str, Any]) -> ModelConfig:
    # v1.1 does not scale; its files define untied embeddings.
    scaled = hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings", True))
    return dataclasses.replace(_from_hf(hf, "relu"), scale_logits=scaled)


def _mt5_from_hf(hf: dict[str, Any]) -> ModelConfig:
    return _from_hf(hf, "gated-gelu")


def _mt5_to_hf(config: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    activation = names[config.activation]
    if config.feed_forward == "gated":
        activation = "gated-gelu" if config.activation == "gelu_tanh" else f"gated-{activation}"
    start = 0 if config.start_token is None else config.start_token
    values = {"feed_forward_proj": activation, "is_encoder_decoder": True, "decoder_start_token_id": start}
    if config.decoder_layers is None:
        values["num_decoder_layers"] = config.layers
    return _TO_HF(config) | values | {"tie_word_embeddings": config.tied_embeddings}


def _t5_to_hf(config: ModelConfig) -> dict[str, Any]:
    # Older readers derive both the scale and the tying from one key.
    return _mt5_to_hf(config) | {
        "tie_word_embeddings": config.scale_logits,
        "scale_decoder_outputs": config.scale_logits,
    }


def _t5(layers: int, width: int, mlp_width: int, heads: int, **fields: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"layers": layers, "width": width, "mlp_width": mlp_width, "heads": heads, "head_width": 64}
    first: dict[str, Any] = {"vocabulary": 32128, "max_length": 512, "activation": "relu", "scale_logits": True}
    first |= {"norm_epsilon": 1e-6, "dropout": 0.1, "attention_dropout": 0.1, "start_token": 0}
    return ModelConfig(**_FIXED | first | sizes | fields)


_V1_1: dict[str, Any] = {"feed_forward": "gated", "activation": "gelu_tanh"}
_V1_1 |= {"tied_embeddings": False, "scale_logits": False}


def _stack(name: str, mlp: int) -> tuple[Rule, ...]:
    hf, ours = f"{name}.block.{{i}}.layer.", f"{name}/layers/"
    return (
        *attention(hf + "0.SelfAttention.", ours + "attention", "q", "k", "v", "o"),
        *norm(hf + "0.layer_norm", ours + "attention_norm"),
        Rule(f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", f"{name}/relative/buckets"),
        *norm(hf + f"{mlp}.layer_norm", ours + "mlp_norm"),
        Rule(hf + f"{mlp}.DenseReluDense.wi.weight", ours + "mlp/up/kernel", linear, unless=ours + "mlp/gate/kernel"),
        Rule(hf + f"{mlp}.DenseReluDense.wi_0.weight", ours + "mlp/gate/kernel", linear),
        Rule(hf + f"{mlp}.DenseReluDense.wi_1.weight", ours + "mlp/up/kernel", linear, where=ours + "mlp/gate/kernel"),
        *projection(hf + f"{mlp}.DenseReluDense.wo", ours + "mlp/down"),
        *norm(f"{name}.final_layer_norm", f"{name}/norm"),
    )


FAMILY = Family(
    presets={
        "t5-small": _t5(6, 512, 2048, 8),
        "t5-base": _t5(12, 768, 3072, 12),
        "t5-large": _t5(24, 1024, 4096, 16),
        "t5-v1.1-small": _t5(8, 512, 1024, 6, **_V1_1),
        "t5-v1.1-base": _t5(12, 768, 2048, 12, **_V1_1),
        "t5-v1.1-large": _t5(24, 1024, 2816, 16, **_V1_1),
        "t5-v1.1-xl": _t5(24, 2048, 5120, 32, **_V1_1),
        "t5-v1.1-xxl": _t5(24, 4096, 10240, 64, **_V1_1),
    },
    rules=(
        Rule("shared.weight", "embeddings/tokens"),
        *_stack("encoder", 1),
        *_stack("decoder", 2),
        *attention("decoder.block.{i}.layer.1.EncDecAttention.", "decoder/layers/cross_attention", "q", "k", "v", "o"),
        *norm("decoder.block.{i}.layer.1.layer_norm", "decoder/layers/cross_attention_norm"),
        Rule("lm_head.weight", "lm_head/kernel"),
    ),
    heads={("lm",): "T5ForConditionalGeneration", (): "T5Model"},
    prefix="",
    config_from_hf=_t5_from_hf,
    config_to_hf=_t5_to_hf,
    # Published files contain this tensor by mistake: cross-attention has no positions.
    buffers=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    copies={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    },
    encoder="T5EncoderModel",
    ties=False,
)
MT5 = FAMILY._replace(
    presets={
        "mt5-small": _t5(8, 512, 1024, 6, **_V1_1 | {"vocabulary": 250112}),
        "mt5-base": _t5(12, 768, 2048, 12, **_V1_1 | {"vocabulary": 250112}),
    },
    heads={heads: f"M{name}" for heads, name in FAMILY.heads.items()},
    config_from_hf=_mt5_from_hf,
    config_to_hf=_mt5_to_hf,
    encoder="MT5EncoderModel",
)
