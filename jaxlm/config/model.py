"""Config of the model architecture."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from jaxlm.config import model_checks
from jaxlm.config.choices import (
    ENCODER_BIASES,
    MAX_WINDOW,
    OF_DECODER,
    Activation,
    Bias,
    Distance,
    GlobalTokens,
    Head,
    LayerKind,
    Layers,
    NormPlace,
    Relative,
    Residual,
    RotaryScaling,
    is_local,
)
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
)
from jaxlm.errors import UserError


@dataclass(frozen=True)
class ModelConfig(Config):
    """The model architecture; `jaxlm.families` has presets of known models."""

    structure: Literal["encoder", "decoder", "encoder_decoder"] = "decoder"  # which stacks the model has
    heads_on_top: tuple[Head, ...] = ("lm",)  # output heads on the last hidden states
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")  # names of the outputs of the heads classes and tokens

    vocabulary: Positive = 50257  # rows of the token embedding; at least the size of the tokenizer
    max_length: Positive = 1024  # maximum sequence length in tokens; of the encoder in an encoder-decoder
    decoder_max_length: Positive | None = None  # of the decoder in an encoder-decoder; None: as max_length
    types: Count = 0  # number of token types (BERT: 2); 0: none
    types_in: Literal["embeddings", "attention"] = "embeddings"  # added, or compared (XLNet; transformer_xl only)
    width: Positive = 768  # model width D
    layers: Layers = 12  # number of layers; of the encoder in an encoder-decoder
    decoder_layers: Layers | None = None  # layers of the decoder in an encoder-decoder; None: as in the encoder
    decoder_heads: Positive | None = None  # attention heads of the decoder in an encoder-decoder; None: as heads
    decoder_mlp_width: Positive | None = None  # MLP width of the decoder in an encoder-decoder; None: as mlp_width
    distinct_layers: Layers | None = None  # layers with separate parameters, cycled (ALBERT: 1); None: all

    mixer: Name = "attention"  # attention, latent, gated_delta, lstm, gru, convolution, or the name of a custom class
    mixers: tuple[Name, ...] = ()  # mixer of each layer, cycled; empty: mixer in all layers
    mixer_residual: bool = True  # norm of the mixer, and addition of its input to its output; false: the output alone
    heads: Positive = 12  # attention heads H
    kv_heads: Positive | None = None  # key-value heads K for grouped-query attention; None: as heads
    head_width: Positive | None = None  # head width C; None: width / heads
    query_key_norm: bool = False  # normalise the queries and keys of each head (Qwen3, Gemma 3)
    query_key_norm_whole: bool = False  # normalise them over all heads together (OLMo 2)
    key_value_rank: Count = 0  # width of what the mixer latent caches in place of keys and values (DeepSeek-V2)
    query_rank: Positive | None = None  # inner width of the query projection of the mixer latent; None: one matrix
    value_width: Positive | None = None  # width of the values of each head of the mixer latent; None: as keys
    attention_gate: bool = False  # multiply the output of attention by the sigmoid of a projection (Qwen3-Next)
    attention_scale: Number | None = None  # scale of the attention scores; None: 1 / sqrt(head width)
    scale_by_layer: bool = False  # divide the attention scores of layer n, counted from 1, by n (option of GPT-2)
    attention_cap: NotNegative = 0.0  # soft cap of the attention scores, by tanh (Gemma 2); 0: none
    attention_sinks: bool = False  # a learned score of each head, of a key without a value (gpt-oss)
    layer_kinds: tuple[LayerKind, ...] = ("global",)  # attention of each layer, cycled; nope: no rotary positions
    prefix_lm: bool = False  # bidirectional attention within the prompt of a decoder (Raffel et al. 2020)
    decoder_layer_kinds: tuple[LayerKind, ...] | None = None  # of an encoder-decoder's decoder; None: as layer_kinds
    window: Count = 0  # attention window of local layers: tokens less than this many positions away are visible
    layer_windows: tuple[Positive, ...] = ()  # window of each layer of the model's first stack, cycled; empty: window
    global_attention: bool = False  # separate projections for tokens that attend to all tokens (Longformer)
    global_tokens: GlobalTokens = "head"  # these tokens; head: first for classes, question for span, otherwise none
    separator_token: Count | None = None  # token after the question of an example (global_tokens question)

    mlp_width: Positive | None = None  # MLP width F; None: 4 x width
    feed_forward: Name = "dense"  # dense, gated (GLU, Shazeer 2020), experts, none, or the name of a custom class
    feed_forwards: tuple[Name, ...] = ()  # feed-forward of each layer, cycled; empty: feed_forward in all layers
    experts: Count = 0  # number of experts of a layer, if feed_forward is experts; they have gates
    expert_width: Positive | None = None  # width of each expert; None: as mlp_width
    experts_per_token: Positive = 2  # number of experts that the router chooses for each token
    normalize_experts: bool = True  # divide the router's scores of the chosen experts by their sum
    router_scores: Literal["softmax", "sigmoid"] = "softmax"  # from the router's logits (sigmoid: DeepSeek-V3)
    router_correction: bool = False  # a term for each expert in the choice of experts, but not in their weights
    expert_groups: Positive = 1  # groups of experts; a token can use only expert_groups_per_token of them
    expert_groups_per_token: Positive = 1  # groups with the largest score, or sum of two scores if they are sigmoids
    expert_scale: Number = 1.0  # factor of the weights of the chosen experts (DeepSeek-V2)
    shared_expert_width: Count = 0  # width of an MLP that all tokens use in addition to their experts; 0: none
    shared_expert_gate: bool = False  # multiply its output by the sigmoid of a projection (Qwen2-MoE)
    expert_limit: NotNegative = 0.0  # upper limit of experts' gates, and limit of their inputs (gpt-oss: 7); 0: none
    expert_offset: Number = 0.0  # added to experts' inputs, which the gates then multiply (gpt-oss: 1)
    expert_capacity: AboveZero | None = None  # maximum tokens of an expert in training, in equal shares; None: no limit
    balance_loss: NotNegative = 0.01  # factor of the loss that balances the experts' loads (Fedus et al. 2021)
    router_z_loss: NotNegative = 0.0  # factor of the loss of the router's squared log-sums (Zoph et al. 2022)
    activation: Activation = "gelu_tanh"  # activation function of the MLP
    biases: tuple[Bias, ...] = ENCODER_BIASES  # projections and norms that have biases
    norm: Literal["layernorm", "rmsnorm", "rmsnorm_plus_one"] = "layernorm"  # norm; rmsnorm_plus_one scales by 1 + s
    norm_place: NormPlace = "pre"  # norms before sub-layers, after the residual, around sub-layers, or after them (out)
    norm_epsilon: NotNegative = 1e-5  # added to the variance in norms
    first_norm: bool = True  # norm before the attention of the first layer (ModernBERT: none)
    residual: Residual = "sequential"  # parallel: attention and MLP read the same states, or the same norm of them
    residual_scale: Number = 1.0  # factor of the output of each sub-layer (Granite)

    front_end: Name = "tokens"  # layer that makes the first hidden states: tokens, or the name of a custom class
    embedding_width: Positive | None = None  # width of factorised embeddings (ALBERT); None: as width
    project_tokens: bool = False  # project only token embeddings to the width, and the last hidden states back (OPT)
    embedding_norm: bool = False  # normalise the sum of the embeddings (BERT)
    scale_embeddings: bool = False  # multiply token embeddings by sqrt(width) (Vaswani et al. 2017)
    embedding_scale: Number = 1.0  # factor of token embeddings (Granite)
    tied_embeddings: bool = True  # share the token embedding with the output projection
    decoder_tokens: bool = False  # separate token embeddings for the decoder of an encoder-decoder
    decoder_vocabulary: Positive | None = None  # rows of the decoder's separate token embedding; None: as vocabulary
    positions: Literal["learned", "sinusoidal", "rotary", "none"] = "learned"  # absolute position encoding
    position_offset: Count = 0  # absolute position of the first token (RoBERTa, BART, M2M-100: 2)
    padding_token: Count | None = None  # token that default positions do not count (RoBERTa); None: count all tokens
    count_padding: bool = True  # whether default positions count what the mask hides (OPT: no)
    rotary_base: AboveZero = 10000.0  # wavelength base of rotary and sinusoidal positions
    sinusoidal_to_base: bool = False  # the slowest sinusoid has the wavelength 2 pi rotary_base, not less (M2M-100)
    local_rotary_base: AboveZero | None = None  # unscaled rotary base of local layers; None: as in global layers
    rotary_width: Positive | None = None  # number of entries of each head, from the first, that are rotated; None: all
    rotary_scaling: RotaryScaling = "none"  # context-extension method for rotary positions
    rotary_factor: AboveZero = 1.0  # factor of rotary scaling, except longrope
    rotary_length: Positive = 8192  # sequence length before rotary scaling (except linear)
    rotary_low: Number = 1.0  # pairs with at most this many rotations in rotary_length are fully scaled (llama3, yarn)
    rotary_high: Number = 4.0  # pairs with at least this many rotations are not scaled; between the two, partly
    rotary_truncate: bool = True  # round the ends of yarn's ramp to whole pairs
    rotary_attention: Number = 1.0  # factor of rotated queries and keys (yarn, longrope)
    rotary_short: tuple[AboveZero, ...] = ()  # frequency divisor of each pair, for lengths to rotary_length (longrope)
    rotary_long: tuple[AboveZero, ...] = ()  # frequency divisor of each pair, for longer sequences (longrope)
    # T5's bias, DeBERTa's attention, ALiBi (Press et al. 2022), Transformer-XL (Dai et al. 2019)
    relative: Relative = "none"  # relative positions
    alibi_scaled: bool = False  # scale the biases of ALiBi like the scores, and round them to bfloat16 (Falcon)
    relative_buckets: Distance = 32  # number of distance buckets; 0: one per distance (disentangled only)
    relative_distance: Distance = 128  # larger distances count as this one; 0: no limit (transformer_xl only)
    relative_terms: tuple[Literal["c2p", "p2c"], ...] = ("c2p", "p2c")  # content-to-position, position-to-content
    relative_shared: bool = True  # project relative embeddings with the query and key projections
    relative_norm: bool = True  # normalise relative embeddings
    query_stream: bool = False  # a second stream that predicts tokens without reading them (XLNet); transformer_xl only

    linear_key_heads: Positive | None = None  # key heads of gated_delta (Yang et al. 2024); None: as heads
    linear_value_heads: Positive | None = None  # heads of its values, a multiple of those; None: as many
    linear_key_width: Positive | None = None  # width of its queries and keys; None: the head width
    linear_value_width: Positive | None = None  # width of its values; None: as its keys
    linear_conv_width: Annotated[int, Range(2, MAX_WINDOW)] = 4  # tokens that its causal convolution reads

    conv_width: Distance = 0  # kernel width of the convolution next to the first layer (DeBERTa v2), odd; 0: none
    conv_windows: tuple[Annotated[int, Range(1, MAX_WINDOW)], ...] = (3, 4, 5)  # widths of the mixer convolution
    conv_activation: Activation = "gelu"  # activation function of the convolution

    scale_logits: bool = False  # divide hidden states by sqrt(width) before the output projection (T5)
    logit_divisor: AboveZero = 1.0  # divisor of the lm logits (Granite)
    logit_cap: NotNegative = 0.0  # soft cap of the lm logits, by tanh (Gemma 2); 0: none
    transform_activation: Activation | None = None  # activation of masked_lm's transform; None: as activation
    masked_lm_bias: bool = True  # bias of the logits of masked_lm
    shared_transform: bool = False  # one transform for the heads masked_lm, classes and tokens (ModernBERT)
    classes_from: Literal["first", "last", "mean", "max"] = "first"  # pooling of the hidden states for the head classes
    classes_activation: Activation | None = "tanh"  # activation of the projection before classes; None: no projection
    crf: bool = False  # scores of neighbouring tags, in addition to the head tokens (Lafferty et al. 2001)
    start_token: Count | None = None  # first token of the decoder in an encoder-decoder (generation, classes)

    dropout: ShareBelowOne = 0.0  # dropout rate of each site below that is None
    attention_dropout: ShareBelowOne = 0.0  # dropout rate of attention weights
    embedding_dropout: ShareBelowOne | None = None  # dropout rate of the sum of the embeddings; None: as dropout
    attention_out_dropout: ShareBelowOne | None = None  # dropout rate of the attention output; None: as dropout
    mlp_dropout: ShareBelowOne | None = 0.0  # dropout rate of the MLP activations; None: as dropout
    mlp_out_dropout: ShareBelowOne | None = None  # dropout rate of the MLP output; None: as dropout
    final_dropout: ShareBelowOne | None = 0.0  # dropout rate of the last hidden states (T5); None: as dropout
    classes_input_dropout: ShareBelowOne | None = 0.0  # dropout rate before classes' projection (RoBERTa)
    classes_dropout: ShareBelowOne | None = None  # dropout rate before the output of classes; None: as dropout
    tokens_dropout: ShareBelowOne | None = None  # dropout rate before the head tokens; None: as dropout
    span_dropout: ShareBelowOne | None = 0.0  # dropout rate before the head span (DistilBERT); None: as dropout
    initial_std: NotNegative = 0.02  # standard deviation of initial weights
    initial_by_inputs: bool = False  # 1 / sqrt(inputs) in place of initial_std, except for embeddings (T5)
    scale_residual_init: bool = True  # divide by sqrt(2 x layers) in output projections of sub-layers (GPT-2)

    def rate(self, site: str) -> float:
        """Returns the dropout rate of a site, one of `DROPOUT_SITES`."""
        own = getattr(self, site)
        return self.dropout if own is None else own

    @property
    def decoder_config(self) -> ModelConfig:
        """The config with the sizes and the attention of the decoder of an encoder-decoder."""
        changes: dict[str, Any] = {}
        for name in OF_DECODER:
            if (value := getattr(self, f"decoder_{name}")) is not None:
                changes |= {name: value, f"decoder_{name}": None}
        if self.structure == "encoder_decoder":
            plain = {"layer_windows": (), "global_attention": False, "global_tokens": "head"}
            changes |= {name: value for name, value in plain.items() if getattr(self, name) != value}
        return dataclasses.replace(self, **changes) if changes else self

    @property
    def global_rule(self) -> Literal["none", "first", "question"]:
        """Which tokens have global attention, as `global_tokens` or else the heads determine."""
        if not self.global_attention:
            return "none"
        if self.global_tokens != "head":
            return self.global_tokens
        return "question" if "span" in self.heads_on_top else "first" if "classes" in self.heads_on_top else "none"

    @property
    def matrix_std(self) -> float | None:
        """Standard deviation of initial matrices; None: 1 / sqrt(inputs) of each."""
        return None if self.initial_by_inputs else self.initial_std

    @property
    def K(self) -> int:
        """Number of key-value heads."""
        return self.kv_heads or self.heads

    @property
    def C(self) -> int:
        """Head width."""
        return self.head_width or self.width // self.heads

    @property
    def value_C(self) -> int:
        """Width of the values of a head of the mixer latent."""
        return self.value_width or self.C

    @property
    def R(self) -> int:
        """Number of rotated entries of each head."""
        return self.rotary_width or self.C

    @property
    def linear_sizes(self) -> tuple[int, int, int, int]:
        """Values of the fields `LINEAR_SIZES`: the heads and the widths of the mixer gated_delta."""
        K, C = self.linear_key_heads or self.heads, self.linear_key_width or self.C
        return K, self.linear_value_heads or K, C, self.linear_value_width or C

    @property
    def F(self) -> int:
        """MLP width."""
        return self.mlp_width or 4 * self.width

    @property
    def expert_F(self) -> int:
        """Width of each expert."""
        return self.expert_width or self.F

    @property
    def mixer_pattern(self) -> tuple[str, ...]:
        """The mixer of each layer, cycled."""
        return self.mixers or (self.mixer,)

    @property
    def feed_forward_pattern(self) -> tuple[str, ...]:
        """The feed-forward layer of each layer, cycled."""
        return self.feed_forwards or (self.feed_forward,)

    @property
    def has_mixed_layers(self) -> bool:
        """Whether layers have different mixers or feed-forward layers."""
        return max(len(set(self.mixer_pattern)), len(set(self.feed_forward_pattern))) > 1

    @property
    def V(self) -> int:
        """Number of outputs of the head lm."""
        return self.decoder_vocabulary or self.vocabulary

    @property
    def W(self) -> int:
        """Width of the embeddings."""
        return self.embedding_width or self.width

    @property
    def hidden_width(self) -> int:
        """Width of the last hidden states, which heads read."""
        return self.W if self.project_tokens else self.width

    @property
    def has_local_layers(self) -> bool:
        """Whether a layer has local attention."""
        of_decoder = self.decoder_layer_kinds or () if self.structure == "encoder_decoder" else ()
        return any(is_local(kind) for kind in (*self.layer_kinds, *of_decoder))

    @property
    def position_limit(self) -> int | None:
        """Maximum length of a sequence that the first stack has position embeddings for; None: no limit."""
        return self.max_length if self.positions == "learned" else None

    @property
    def text_limit(self) -> int | None:
        """Maximum length of a text of the decoder in tokens; None: no limit.

        Rotary positions extend to any length, but models are unreliable beyond the length they were trained on.
        """
        return self.decoder_config.max_length if self.positions in ("learned", "rotary") else None

    def check_length(self, length: int, name: str = "length", remedy: str = "lower it") -> None:
        """Raises UserError if a row of `length` tokens is longer than the positions of the model.

        Args:
          length: tokens per row.
          name: name of the argument or field, for the message.
          remedy: what to change, for the message.
        """
        if self.position_limit is not None and length > self.position_limit:
            raise UserError(
                f"{name} is {length}, longer than the {self.position_limit} positions of the model; {remedy}"
            )

    def check(self) -> None:
        """Raises UserError if a value is of the wrong type or out of range, or sizes contradict each other."""
        model_checks.check(self)
