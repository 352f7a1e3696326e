"""The architecture of a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from jaxlm.config.ranges import (
    AboveZero,
    Config,
    Count,
    Name,
    NotNegative,
    Number,
    Positive,
    Range,
    ShareBelowOne,
    check_fields,
)
from jaxlm.errors import UserError

Head = Literal["lm", "masked_lm", "next_sentence", "replaced", "pooled", "classes", "tokens", "span"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "tanh"]  # gelu is the exact one, by erf
Bias = Literal["query_key_value", "out", "mlp", "norm", "transform", "classes", "lm"]
ENCODER_BIASES: tuple[Bias, ...] = ("query_key_value", "out", "mlp", "norm", "transform", "classes")
RotaryScaling = Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"]
MOST_LAYERS = 10_000  # of a model that a foreign config.json may ask for
_FARTHEST = 1_000_000  # relative distance that has a row in a table
Layers = Annotated[int, Range(1, MOST_LAYERS)]
Distance = Annotated[int, Range(0, _FARTHEST)]


@dataclass(frozen=True)
class ModelConfig(Config):
    """The architecture, through a few closed choices; presets of known models stand in `jaxlm.families`."""

    structure: Literal["encoder", "decoder", "encoder_decoder"] = "decoder"  # which stacks there are
    heads_on_top: tuple[Head, ...] = ("lm",)  # what is read off the last hidden states
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")  # names of the outputs of the heads classes and tokens

    vocabulary: Positive = 50257  # rows of the embedding; at least the size of the tokenizer
    max_length: Positive = 1024  # longest sequence that has positions
    types: Count = 0  # token types (BERT: 2), 0 for none
    width: Positive = 768  # model width D
    layers: Layers = 12  # layers of the stack; of the encoder, where there are two
    decoder_layers: Layers | None = None  # layers of an encoder-decoder's decoder; None: as many as the encoder's
    decoder_heads: Positive | None = None  # its attention heads; None: as many as the encoder's
    decoder_mlp_width: Positive | None = None  # its MLP width; None: as the encoder's
    distinct_layers: Layers | None = None  # layers with parameters of their own, each repeated (ALBERT: 1); None: all

    mixer: Name = "attention"  # what mixes the positions of a row: attention, or a class of your own
    heads: Positive = 12  # attention heads H
    kv_heads: Positive | None = None  # key-value heads K of grouped queries; None: as many as heads
    head_width: Positive | None = None  # head width C; None: width / heads
    query_key_norm: bool = False  # normalise each head's queries and keys (Qwen3, Gemma 3)
    attention_scale: Number | None = None  # factor of the scores; None: 1 / sqrt(head width)
    scale_by_layer: bool = False  # divide the scores of layer n, counted from 1, by n (a choice of GPT-2's)
    attention_cap: NotNegative = 0.0  # scores are squashed to within this by tanh (Gemma 2); 0: not
    layer_kinds: tuple[Literal["global", "local"], ...] = ("global",)  # of each layer in turn, over and over
    prefix_lm: bool = False  # tokens of a decoder's prompt see all of it, also what comes later (Raffel et al. 2020)
    window: Count = 0  # a local layer sees tokens that are less than this many places away

    mlp_width: Positive | None = None  # MLP width F; None: 4 x width
    feed_forward: Name = "dense"  # dense, gated by a second projection (GLU, Shazeer 2020), or a class of your own
    activation: Activation = "gelu_tanh"  # of the MLP
    biases: tuple[Bias, ...] = ENCODER_BIASES  # which projections and norms have biases
    norm: Literal["layernorm", "rmsnorm", "rmsnorm_plus_one"] = "layernorm"  # over the width; the last scales by 1 + s
    norm_place: Literal["pre", "post", "sandwich"] = "pre"  # before each sub-layer, after its residual sum, around it
    norm_epsilon: NotNegative = 1e-5  # added to the variance
    first_norm: bool = True  # whether the first layer has a norm before its attention (ModernBERT: no)

    front_end: Name = "tokens"  # what makes the first hidden states: embeddings of tokens, or a class of your own
    embedding_width: Positive | None = None  # width of the embeddings, then projected (ALBERT); None: as width
    embedding_norm: bool = False  # normalise the sum of the embeddings (BERT)
    scale_embeddings: bool = False  # multiply token embeddings by sqrt(width) (Vaswani et al. 2017)
    tied_embeddings: bool = True  # the output projection is the token embedding
    decoder_tokens: bool = False  # an encoder-decoder's decoder has token embeddings of its own
    decoder_vocabulary: Positive | None = None  # rows of these, for another vocabulary; None: as vocabulary
    positions: Literal["learned", "sinusoidal", "rotary", "none"] = "learned"  # how absolute order enters
    position_offset: Count = 0  # rows of learned positions before that of the first token (RoBERTa, BART: 2)
    padding_token: Count | None = None  # a token that unsaid positions do not count (RoBERTa); None: all count
    rotary_base: AboveZero = 10000.0  # wavelength base of rotary and sinusoidal positions
    local_rotary_base: AboveZero | None = None  # of local layers, never scaled; None: as in global ones
    rotary_scaling: RotaryScaling = "none"  # how trained wavelengths are stretched
    rotary_factor: AboveZero = 1.0  # by how much, for each scaling but longrope
    rotary_length: Positive = 8192  # longest sequence before the stretching (all scalings but linear)
    rotary_low: Number = 1.0  # turns over rotary_length up to which wavelengths are stretched wholly (llama3, yarn)
    rotary_high: Number = 4.0  # turns from which they are not stretched at all; between the two, in part
    rotary_truncate: bool = True  # the ends of yarn's ramp are rounded to whole pairs
    rotary_attention: Number = 1.0  # factor of rotated queries and keys (yarn, longrope)
    rotary_short: tuple[AboveZero, ...] = ()  # divisors of each pair's frequency up to rotary_length (longrope)
    rotary_long: tuple[AboveZero, ...] = ()  # and in sequences that are longer (longrope)
    relative: Literal["none", "buckets", "disentangled"] = "none"  # relative order: T5's bias, DeBERTa's attention
    relative_buckets: Distance = 32  # distances that are distinguished; 0: all (disentangled only)
    relative_distance: Distance = 128  # from here on, all distances are one
    relative_terms: tuple[Literal["c2p", "p2c"], ...] = ("c2p", "p2c")  # content to position, position to content
    relative_shared: bool = True  # relative embeddings go through the projections of queries and keys
    relative_norm: bool = True  # relative embeddings are normalised

    conv_width: Distance = 0  # tokens that a convolution beside the first layer sees (DeBERTa v2), odd; 0: none
    conv_activation: Activation = "gelu"  # of the convolution

    scale_logits: bool = False  # divide hidden states by sqrt(width) before the vocabulary (T5)
    logit_cap: NotNegative = 0.0  # logits of lm are squashed to within this by tanh (Gemma 2); 0: not
    transform_activation: Activation | None = None  # of masked_lm's transform; None: as activation
    shared_transform: bool = False  # one transform before masked_lm, classes and tokens (ModernBERT)
    classes_from: Literal["first", "last", "mean"] = "first"  # the state that stands for an example
    classes_activation: Activation | None = "tanh"  # of the projection before the classes; None: no projection
    start_token: Count | None = None  # what a decoder reads first, for an encoder-decoder (generation, classes)

    dropout: ShareBelowOne = 0.0  # share of entries that are zeroed while training, at each site that says None
    attention_dropout: ShareBelowOne = 0.0  # of attention weights
    embedding_dropout: ShareBelowOne | None = None  # of the sum of the embeddings; None: as dropout, here and below
    attention_out_dropout: ShareBelowOne | None = None  # of what attention adds to the residual
    mlp_dropout: ShareBelowOne | None = 0.0  # of the MLP's activations
    mlp_out_dropout: ShareBelowOne | None = None  # of what the MLP adds to the residual
    final_dropout: ShareBelowOne | None = 0.0  # of a stack's last hidden states (T5)
    classes_input_dropout: ShareBelowOne | None = 0.0  # before the projection of the head classes (RoBERTa)
    classes_dropout: ShareBelowOne | None = None  # before the output of the head classes
    tokens_dropout: ShareBelowOne | None = None  # before the head tokens
    span_dropout: ShareBelowOne | None = 0.0  # before the head span (DistilBERT)
    initial_std: NotNegative = 0.02  # standard deviation of initial weights
    initial_by_inputs: bool = False  # of embeddings alone: a matrix has 1 / sqrt(inputs) in place of it (T5)
    scale_residual_init: bool = True  # divide it by sqrt(2 x layers) where a sub-layer writes to the residual (GPT-2)

    def rate(self, site: str) -> float:
        """Returns the dropout rate of a site, the name of one of `DROPOUT_SITES`."""
        own = getattr(self, site)
        return self.dropout if own is None else own

    @property
    def of_decoder(self) -> ModelConfig:
        """The config as the decoder of an encoder-decoder has it: with its own heads and MLP width."""
        if self.decoder_heads is None and self.decoder_mlp_width is None:
            return self
        heads, mlp_width = self.decoder_heads or self.heads, self.decoder_mlp_width or self.F
        return dataclasses.replace(self, heads=heads, mlp_width=mlp_width, decoder_heads=None, decoder_mlp_width=None)

    @property
    def matrix_std(self) -> float | None:
        """Standard deviation of initial matrices; None: of each 1 / sqrt(inputs)."""
        return None if self.initial_by_inputs else self.initial_std

    @property
    def K(self) -> int:
        """Key-value heads."""
        return self.kv_heads or self.heads

    @property
    def C(self) -> int:
        """Head width."""
        return self.head_width or self.width // self.heads

    @property
    def F(self) -> int:
        """MLP width."""
        return self.mlp_width or 4 * self.width

    @property
    def V(self) -> int:
        """Tokens that the head lm distinguishes."""
        return self.decoder_vocabulary or self.vocabulary

    @property
    def W(self) -> int:
        """Width of the embeddings."""
        return self.embedding_width or self.width

    @property
    def position_limit(self) -> int | None:
        """Tokens of the longest sequence that the model has positions for; None: any length."""
        return self.max_length if self.positions == "learned" else None

    @property
    def text_limit(self) -> int | None:
        """Tokens of the longest text that is generated; None: any length.

        Rotary positions have no end, but the lengths that a model was trained on do.
        """
        return self.max_length if self.positions in ("learned", "rotary") else None

    def check_length(self, length: int) -> None:
        """Raises UserError where a row is longer than the positions of the model."""
        if self.position_limit is not None and length > self.position_limit:
            raise UserError(
                f"length is {length}, longer than the {self.position_limit} positions of the model; lower it"
            )

    def check(self) -> None:
        """Raises UserError where a value is of the wrong kind, or sizes contradict each other."""
        check_fields(self, "model.")
        if self.head_width is None and self.width % self.heads:
            raise UserError(
                f"model.heads is {self.heads}, which does not divide model.width {self.width}; "
                f"choose heads from {divisors(self.width)} or set model.head_width"
            )
        if (self.decoder_heads or self.decoder_mlp_width) and self.structure != "encoder_decoder":
            raise UserError(
                f"model.decoder_heads is {self.decoder_heads} and model.decoder_mlp_width {self.decoder_mlp_width}, "
                f"but the model is a(n) {self.structure}; they go with an encoder-decoder: leave them out"
            )
        if self.of_decoder is not self:
            dataclasses.replace(self.of_decoder, structure="decoder", decoder_vocabulary=None).check()
        pairs = self.C // 2
        if self.rotary_scaling == "longrope" and not len(self.rotary_short) == len(self.rotary_long) == pairs:
            raise UserError(
                f"model.rotary_short and rotary_long have {len(self.rotary_short)} and {len(self.rotary_long)} "
                f"numbers; the head width is {self.C}: give {pairs} of each"
            )
        if self.heads % self.K:
            raise UserError(
                f"model.kv_heads is {self.K}, which does not divide model.heads {self.heads}; "
                f"choose kv_heads from {divisors(self.heads)}"
            )
        if self.positions == "rotary" and self.C % 2:
            raise UserError(f"the head width is {self.C}, odd; rotary positions turn pairs: make it even")
        if self.positions == "sinusoidal" and self.width % 2:
            raise UserError(f"model.width is {self.width}, odd; sinusoidal positions come in pairs: make it even")
        if "lm" in self.heads_on_top and self.width != self.W and self.tied_embeddings:
            raise UserError(
                f"model.embedding_width is {self.W}, but the head lm reads a width of {self.width} by the embeddings; "
                f"leave it out, or set model.tied_embeddings to false"
            )
        if self.conv_width and (self.conv_width % 2 == 0 or self.structure != "encoder" or len(self.layer_kinds) > 1):
            raise UserError(
                f"model.conv_width is {self.conv_width}; it must be odd, and goes with an encoder of one kind of layer"
            )
        if self.decoder_vocabulary and not (self.structure == "encoder_decoder" and self.decoder_tokens):
            raise UserError(
                f"model.decoder_vocabulary is {self.decoder_vocabulary}; it goes with an encoder-decoder whose decoder "
                f"has tokens of its own: set --model.decoder-tokens"
            )
        if self.prefix_lm and self.structure != "decoder":
            raise UserError(f"model.prefix_lm is set, and the model is a(n) {self.structure}; it is for decoders alone")
        if "local" in self.layer_kinds and self.window < 1:
            raise UserError(f"model.window is {self.window}; local layers need at least 1")
        if not self.layer_kinds or not self.labels:
            raise UserError("model.layer_kinds or model.labels is empty; give at least one kind, and one label")
        if (self.distinct_layers or 1) > self.layers:
            raise UserError(f"model.distinct_layers is {self.distinct_layers}; there are {self.layers} layers")
        if self.relative == "buckets" and not 4 <= self.relative_buckets < 2 * self.relative_distance:
            raise UserError(
                f"model.relative_buckets is {self.relative_buckets}; it must be at least 4 and less than twice "
                f"model.relative_distance {self.relative_distance}"
            )


# The fields of ModelConfig that are the dropout rate of one site; None in them is the rate of `dropout`.
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


def divisors(n: int) -> str:
    """Returns the divisors of a number up to 100,000, as a message lists them."""
    return ", ".join(str(d) for d in range(1, min(n, 100_000) + 1) if n % d == 0)
