"""What the formats of several decoders share: fixed fields, tensors of heads and layers, and names of classes."""

from __future__ import annotations

from typing import Any

from jaxlm.families import bert
from jaxlm.hub.convert import (
    Rule,
    bias_query_key_value_by_group,
    linear,
    linear_heads_in,
    linear_query_key_value_by_group,
    norm,
    projection,
)

# Of decoders with LayerNorm.
FIXED: dict[str, Any] = {
    "structure": "decoder",
    "types": 0,
    "norm": "layernorm",
    "classes_from": "last",
    "classes_activation": None,
    "classes_dropout": 0.0,
}
LAYERS = "decoder/layers/"
HEADS = (
    Rule("lm_head.weight", "lm_head/kernel"),
    Rule("lm_head.bias", "lm_head/bias"),
    Rule("score.weight", "classes_head/out/kernel", linear),
    *bert.TOKENS,
    *bert.SPAN,
)
_CLASSES = {
    "lm": "ForCausalLM",
    "classes": "ForSequenceClassification",
    "tokens": "ForTokenClassification",
    "span": "ForQuestionAnswering",
}


def heads(name: str, *supported: Any) -> dict[Any, str]:
    """Returns the heads of a family -> the class of transformers.

    Args:
      name: the first part of the names of the classes, such as GPTJ.
      supported: the heads.
    """
    return {(head,): name + _CLASSES[head] for head in supported} | {(): f"{name}Model"}


def fused_query_key_value(hf: str) -> tuple[Rule, Rule]:
    """Returns the rules for queries, keys and values in one tensor, sorted by head."""
    inputs = [f"{LAYERS}attention/{name}" for name in ("query", "key", "value")]
    return (
        Rule(f"{hf}.weight", tuple(f"{name}/kernel" for name in inputs), linear_query_key_value_by_group),
        Rule(f"{hf}.bias", tuple(f"{name}/bias" for name in inputs), bias_query_key_value_by_group),
    )


def neox_layer(layer: str, attention: str, norms: bool = True) -> tuple[Rule, ...]:
    """Returns the rules for a layer with the names of GPT-NeoX.

    Args:
      layer: the prefix of the names, with `{i}`.
      attention: the name of the attention.
      norms: whether the norms have these names too.
    """
    return (
        *(norm(layer + "input_layernorm", LAYERS + "attention_norm") if norms else ()),
        *fused_query_key_value(f"{layer}{attention}.query_key_value"),
        *projection(f"{layer}{attention}.dense", LAYERS + "attention/out", linear_heads_in),
        *(norm(layer + "post_attention_layernorm", LAYERS + "mlp_norm") if norms else ()),
        *projection(layer + "mlp.dense_h_to_4h", LAYERS + "mlp/up"),
        *projection(layer + "mlp.dense_4h_to_h", LAYERS + "mlp/down"),
    )
