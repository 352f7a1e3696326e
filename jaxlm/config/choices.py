"""The closed choices of `ModelConfig`, and the limits of its sizes."""

from __future__ import annotations

from typing import Annotated, Literal

from jaxlm.config.ranges import Range

Head = Literal["lm", "masked_lm", "next_sentence", "replaced", "pooled", "classes", "tokens", "span"]
# gelu is exact (erf), gelu_tanh approximate; gelu_quick is x sigmoid(1.702 x)
Activation = Literal["gelu", "gelu_tanh", "gelu_quick", "relu", "silu", "tanh"]
# "mlp" is all projections of the MLP, "down" only the last one; "experts" is the experts and their router.
Bias = Literal["query_key_value", "out", "mlp", "down", "experts", "norm", "transform", "classes", "lm"]
ENCODER_BIASES: tuple[Bias, ...] = ("query_key_value", "out", "mlp", "norm", "transform", "classes")
RotaryScaling = Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"]
LayerKind = Literal["global", "local", "global_nope", "local_nope"]  # nope: no positions (Kazemnejad et al. 2023)
Relative = Literal["none", "buckets", "disentangled", "alibi", "transformer_xl"]
GlobalTokens = Literal["head", "none", "first", "question"]
NormPlace = Literal["pre", "post", "sandwich", "out", "none"]
Residual = Literal["sequential", "parallel", "parallel_one_norm"]
MAX_LAYERS = 10_000  # upper limit, so that a corrupt config.json cannot request an absurd model
_MAX_DISTANCE = 1_000_000  # upper limit of the rows of a table of relative distances
MAX_WINDOW = 1000  # upper limit of the width of a convolution
RECURRENT = ("lstm", "gru")  # mixers that carry a state from token to token
Layers = Annotated[int, Range(1, MAX_LAYERS)]
Distance = Annotated[int, Range(0, _MAX_DISTANCE)]
# Fields that the decoder of an encoder-decoder may have other values of, in the fields `decoder_...`.
OF_DECODER = ("heads", "mlp_width", "layer_kinds", "max_length")
LINEAR_SIZES = ("linear_key_heads", "linear_value_heads", "linear_key_width", "linear_value_width")
# Fields of ModelConfig with the dropout rate of one site; None stands for the value of `dropout`.
DROPOUT_SITES = (
    "embedding_dropout",
    "attention_out_dropout",
    "mlp_dropout",
    "mlp_out_dropout",
    "final_dropout",
    "classes_input_dropout",
    "classes_dropout",
    "tokens_dropout",
    "span_dropout",
)


def is_local(kind: str) -> bool:
    """Returns whether a kind of layer has local attention."""
    return kind.startswith("local")


def is_rotated(kind: str) -> bool:
    """Returns whether the layers of a kind have the rotary positions of the model."""
    return not kind.endswith("_nope")
