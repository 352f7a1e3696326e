"""BART (Lewis et al. 2020) and mBART (Liu et al. 2020), in which the norms come first."""

from __future__ import annotations

from typing import Any

from jaxlm.config import ENCODER_BIASES, ModelConfig
from jaxlm.hub.convert import ACTIVATIONS, Family, Key, Rule, attention, key_conversion, norm, one_row, projection

FIXED: dict[str, Any] = {
    "structure": "encoder_decoder",
    "types": 0,
    "norm": "layernorm",
    "norm_place": "post",
    "norm_epsilon": 1e-5,
    "embedding_norm": True,
    "positions": "learned",
    "position_offset": 2,
    "biases": (*ENCODER_BIASES, "lm"),
    "classes_from": "last",  # the end token of the decoder's input
    "scale_residual_init": False,
}
KEYS = (
    Key("vocab_size", "vocabulary"),
    Key("max_position_embeddings", "max_length", 1024),
    Key("d_model", "width"),
    Key("encoder_layers", "layers"),
    Key("decoder_layers", "decoder_layers"),
    Key("encoder_attention_heads", "heads"),
    Key("decoder_attention_heads", "decoder_heads"),
    Key("encoder_ffn_dim", "mlp_width"),
    Key("decoder_ffn_dim", "decoder_mlp_width"),
    Key("activation_function", "activation", "gelu", ACTIVATIONS),
    Key("scale_embedding", "scale_embeddings", False),
    Key("tie_word_embeddings", "tied_embeddings", True),
    Key("dropout", "dropout", 0.1),
    Key("attention_dropout", "attention_dropout", 0.0),
    Key("activation_dropout", "mlp_dropout", 0.0),
    Key("classifier_dropout", "classes_input_dropout", 0.0),
    Key("classifier_dropout", "classes_dropout", 0.0),
    Key("init_std", "initial_std", 0.02),
)
ONLY = {"is_encoder_decoder": True}
_START = Key("decoder_start_token_id", "start_token", 2)
_FROM_HF, _TO_HF = key_conversion((*KEYS, _START), FIXED, ONLY)
# A decoder of mBART starts with the token of the language, so there is no fixed start token.
_MBART_FROM_HF, _MBART_TO_HF = key_conversion(KEYS, FIXED | {"norm_place": "pre"}, ONLY)


_OWN = "decoder_embeddings/tokens"
# An untied model has three token embeddings, but uses only two of them.
TOKENS = (
    Rule("model.shared.weight", "embeddings/tokens", unless=_OWN),
    Rule("model.shared.weight", "embeddings/tokens", where=_OWN, idle=True),
    Rule("model.encoder.embed_tokens.weight", "embeddings/tokens", where=_OWN),
    Rule("model.decoder.embed_tokens.weight", _OWN),
)


def _stack(name: str, embeddings: str) -> tuple[Rule, ...]:
    hf, ours = f"model.{name}.layers.{{i}}.", f"{name}/layers/"
    return (
        Rule(f"model.{name}.embed_positions.weight", f"{embeddings}/positions"),
        *norm(f"model.{name}.layernorm_embedding", f"{embeddings}/norm"),
        *attention(hf + "self_attn.", ours + "attention", "q_proj", "k_proj", "v_proj", "out_proj"),
        *norm(hf + "self_attn_layer_norm", ours + "attention_norm"),
        *attention(hf + "encoder_attn.", ours + "cross_attention", "q_proj", "k_proj", "v_proj", "out_proj"),
        *norm(hf + "encoder_attn_layer_norm", ours + "cross_attention_norm"),
        *projection(hf + "fc1", ours + "mlp/up"),
        *projection(hf + "fc2", ours + "mlp/down"),
        *norm(hf + "final_layer_norm", ours + "mlp_norm"),
        *norm(f"model.{name}.layer_norm", f"{name}/norm"),
    )


def _bart(layers: int, width: int, heads: int, **fields: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"layers": layers, "width": width, "heads": heads}
    published: dict[str, Any] = {"vocabulary": 50265, "max_length": 1024, "activation": "gelu", "dropout": 0.1}
    published |= {"classes_dropout": 0.0}
    return ModelConfig(**FIXED | published | sizes | {"start_token": 2} | fields)


FAMILY = Family(
    presets={"bart-base": _bart(6, 768, 12), "bart-large": _bart(12, 1024, 16)},
    rules=(
        *TOKENS,
        *_stack("encoder", "embeddings"),
        *_stack("decoder", "decoder_embeddings"),
        Rule("lm_head.weight", "lm_head/kernel"),
        Rule("final_logits_bias", "lm_head/bias", one_row),
        *projection("classification_head.dense", "classes_head/dense"),
        *projection("classification_head.out_proj", "classes_head/out"),
    ),
    heads={
        ("lm",): "BartForConditionalGeneration",
        ("classes",): "BartForSequenceClassification",
        (): "BartModel",
    },
    prefix="model.",
    config_from_hf=_FROM_HF,
    config_to_hf=_TO_HF,
    copies={
        "model.encoder.embed_tokens.weight": "model.shared.weight",
        "model.decoder.embed_tokens.weight": "model.shared.weight",
        "lm_head.weight": "model.shared.weight",
    },
    buffers=("model.encoder.version", "model.decoder.version"),
)
MBART = FAMILY._replace(
    presets={
        "mbart-large": _bart(12, 1024, 16, norm_place="pre", vocabulary=250027, scale_embeddings=True, start_token=None)
    },
    heads={heads: f"M{name}" for heads, name in FAMILY.heads.items()},
    config_from_hf=_MBART_FROM_HF,
    config_to_hf=_MBART_TO_HF,
)
