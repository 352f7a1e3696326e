"""XLNet (Yang et al. 2019): an encoder with Transformer-XL's relative positions and a query stream."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError
from jaxlm.families import bert
from jaxlm.hub.convert import ACTIVATIONS, Family, Key, Layout, Rule, key_conversion, norm, projection

_FIXED: dict[str, Any] = {
    "structure": "encoder",
    "max_length": 512,  # of pre-training; the format has no limit
    "types": 3,  # first text, second text, <cls>
    "types_in": "attention",
    "norm": "layernorm",
    "norm_place": "post",
    "positions": "none",
    "relative": "transformer_xl",
    "query_stream": True,
    "biases": ("mlp", "norm", "classes", "lm"),
    "mlp_dropout": None,
    "final_dropout": None,
    "tokens_dropout": 0.0,
    "scale_residual_init": False,
}
_KEYS = (
    Key("vocab_size", "vocabulary"),
    Key("d_model", "width"),
    Key("n_layer", "layers"),
    Key("n_head", "heads"),
    Key("d_inner", "mlp_width"),
    Key("ff_activation", "activation", "gelu", ACTIVATIONS),
    Key("layer_norm_eps", "norm_epsilon", 1e-12),
    Key("tie_word_embeddings", "tied_embeddings", True),
    Key("dropout", "dropout", 0.1),
    Key("summary_type", "classes_from", "last", {"last": "last", "first": "first"}),
    Key("summary_last_dropout", "classes_dropout", 0.1),
    Key("initializer_range", "initial_std", 0.02),
)
_FROM_HF, _TO_HF = key_conversion(
    _KEYS,
    _FIXED,
    # `same_length` and the lengths of memories have no effect without memories.
    only={"attn_type": "bi", "bi_data": False, "summary_use_proj": True, "summary_activation": "tanh"},
)


def _config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    # Old files and other writers use these names, which transformers also reads.
    for name, other in (("n_token", "vocab_size"), ("hidden_size", "d_model")):
        if name in hf and other not in hf:
            hf = hf | {other: hf[name]}
    config, limit = _FROM_HF(hf), hf.get("clamp_len", -1)
    if hf.get("d_head") not in (None, config.C) or config.C * config.heads != config.width:
        raise UserError(
            f"config.json has d_head {hf.get('d_head')}, d_model {config.width} and n_head {config.heads}; d_head must "
            f"be d_model / n_head: choose another model"
        )
    fields: dict[str, Any] = {"attention_dropout": config.dropout, "relative_distance": max(0, limit)}
    return dataclasses.replace(config, **fields)


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return _TO_HF(config) | {"d_head": config.C, "clamp_len": config.relative_distance or -1}


def _xlnet(layers: int, width: int, heads: int) -> ModelConfig:
    return ModelConfig(
        **_FIXED,
        heads_on_top=("lm",),
        vocabulary=32000,
        width=width,
        layers=layers,
        heads=heads,
        activation="gelu",
        norm_epsilon=1e-12,
        relative_distance=0,
        classes_from="last",
        dropout=0.1,
        attention_dropout=0.1,
    )


_out = Layout(  # [H, C, D] <-> [D, H, C]
    lambda config, x: x.transpose(1, 2, 0),
    lambda config, x: x.transpose(2, 0, 1),
)
_query = Layout(lambda config, x: x[0, 0], lambda config, x: x[None, None])  # [D] <-> [1, 1, D]
_LAYER, _OURS = "transformer.layer.{i}", "encoder/layers"
_NAMES = {"q": "query/kernel", "k": "key/kernel", "v": "value/kernel", "r": "relative_key/kernel"}
_NAMES |= {"r_w_bias": "content_bias", "r_r_bias": "position_bias", "r_s_bias": "type_bias", "seg_embed": "types"}

FAMILY = Family(
    presets={"xlnet-base": _xlnet(12, 768, 12), "xlnet-large": _xlnet(24, 1024, 16)},
    rules=(
        Rule("transformer.word_embedding.weight", "embeddings/tokens"),
        Rule("transformer.mask_emb", "embeddings/query", _query),
        *(Rule(f"{_LAYER}.rel_attn.{theirs}", f"{_OURS}/attention/{ours}") for theirs, ours in _NAMES.items()),
        Rule(f"{_LAYER}.rel_attn.o", f"{_OURS}/attention/out/kernel", _out),
        *norm(f"{_LAYER}.rel_attn.layer_norm", f"{_OURS}/attention_norm"),
        *projection(f"{_LAYER}.ff.layer_1", f"{_OURS}/mlp/up"),
        *projection(f"{_LAYER}.ff.layer_2", f"{_OURS}/mlp/down"),
        *norm(f"{_LAYER}.ff.layer_norm", f"{_OURS}/mlp_norm"),
        Rule("lm_loss.weight", "lm_head/kernel"),
        Rule("lm_loss.bias", "lm_head/bias"),
        *projection("sequence_summary.summary", "classes_head/dense"),
        *projection("logits_proj", "classes_head/out"),
        *bert.TOKENS,
        *bert.SPAN,
    ),
    heads={
        ("lm",): "XLNetLMHeadModel",
        ("classes",): "XLNetForSequenceClassification",
        ("tokens",): "XLNetForTokenClassification",
        ("span",): "XLNetForQuestionAnsweringSimple",
        (): "XLNetModel",
    },
    prefix="transformer.",
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    copies={"lm_loss.weight": "transformer.word_embedding.weight"},
)
