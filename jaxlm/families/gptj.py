"""GPT-J (Wang and Komatsuzaki 2021): attention and MLP read the same norm of the hidden states.

The rotated pairs of a head are neighbours in its files. The conversion moves the rows of the projections instead."""

from __future__ import annotations

from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.families import decoder
from jaxlm.hub.convert import (
    ACTIVATIONS,
    Family,
    Key,
    Rule,
    attention,
    key_conversion,
    linear_heads_out_in_pairs,
    norm,
    projection,
)

_FIXED: dict[str, Any] = decoder.FIXED | {
    "norm_place": "pre",
    "residual": "parallel_one_norm",
    "positions": "rotary",
    "biases": ("mlp", "norm", "lm"),
}
_FROM_HF, _TO_HF = key_conversion(
    keys=(
        Key("vocab_size", "vocabulary"),
        Key("n_positions", "max_length", 2048),
        Key("n_embd", "width"),
        Key("n_layer", "layers"),
        Key("n_head", "heads"),
        Key("rotary_dim", "rotary_width", 64),
        Key("n_inner", "mlp_width", None),
        Key("activation_function", "activation", "gelu_new", ACTIVATIONS),
        Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Key("tie_word_embeddings", "tied_embeddings", False),
        Key("resid_pdrop", "dropout", 0.0),
        Key("embd_pdrop", "embedding_dropout", 0.0),
        Key("attn_pdrop", "attention_dropout", 0.0),
        Key("initializer_range", "initial_std", 0.02),
    ),
    fixed=_FIXED,
    only={},
)

_LAYER, _OURS = "transformer.h.{i}.", decoder.LAYERS
_PAIRS = tuple(f"{_OURS}attention/{name}/kernel" for name in ("query", "key"))
_ATTENTION = attention(_LAYER + "attn.", _OURS + "attention", "q_proj", "k_proj", "v_proj", "out_proj")

FAMILY = Family(
    presets={
        "gpt-j-6b": ModelConfig(
            **_FIXED,
            vocabulary=50400,
            max_length=2048,
            width=4096,
            layers=28,
            heads=16,
            rotary_width=64,
            activation="gelu_tanh",
            tied_embeddings=False,
        )
    },
    rules=(
        Rule("transformer.wte.weight", "embeddings/tokens"),
        *norm(_LAYER + "ln_1", _OURS + "attention_norm"),
        *(rule._replace(layout=linear_heads_out_in_pairs) if rule.ours in _PAIRS else rule for rule in _ATTENTION),
        *projection(_LAYER + "mlp.fc_in", _OURS + "mlp/up"),
        *projection(_LAYER + "mlp.fc_out", _OURS + "mlp/down"),
        *norm("transformer.ln_f", "decoder/norm"),
        *decoder.HEADS,
    ),
    heads=decoder.heads("GPTJ", "lm", "classes", "span"),
    prefix="transformer.",
    config_from_hf=_FROM_HF,
    config_to_hf=_TO_HF,
    buffers=(_LAYER + "attn.bias", _LAYER + "attn.masked_bias"),  # the causal mask
    copies={"lm_head.weight": "transformer.wte.weight"},
)
