"""Config of the model architecture."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

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

    mixer: Name = (
        "attention"  # layer that mixes positions: attention, latent, lstm, gru, convolution, or a custom class
    )
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
        for name in _OF_DECODER:
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
        check_fields(self, "model.")
        if self.head_width is None and self.width % self.heads:
            raise UserError(
                f"model.heads is {self.heads}, which does not divide model.width {self.width}; "
                f"choose heads from {divisors(self.width)} or set model.head_width"
            )
        for name in (f"decoder_{name}" for name in _OF_DECODER):
            if getattr(self, name) is not None and self.structure != "encoder_decoder":
                raise UserError(
                    f"model.{name} is {getattr(self, name)}, but the model is a(n) {self.structure}; it is for "
                    f"encoder-decoders: leave it out"
                )
        if self.decoder_config is not self:
            dataclasses.replace(self.decoder_config, structure="decoder", decoder_vocabulary=None).check()
        pairs = self.R // 2
        if self.rotary_scaling == "longrope" and not len(self.rotary_short) == len(self.rotary_long) == pairs:
            raise UserError(
                f"model.rotary_short and rotary_long have {len(self.rotary_short)} and {len(self.rotary_long)} "
                f"numbers; {self.R} entries of each head are rotated: give {pairs} numbers in each"
            )
        if self.heads % self.K:
            raise UserError(
                f"model.kv_heads is {self.K}, which does not divide model.heads {self.heads}; "
                f"choose kv_heads from {divisors(self.heads)}"
            )
        if self.positions == "rotary" and (self.R % 2 or self.R > self.C):
            raise UserError(
                f"model.rotary_width is {self.rotary_width}, and the head width is {self.C}; rotary positions rotate "
                f"pairs: rotate an even number of entries, at most the head width"
            )
        if self.positions == "sinusoidal" and self.width % 2:
            raise UserError(f"model.width is {self.width}; sinusoidal positions come in pairs: make it even")
        if "lm" in self.heads_on_top and self.hidden_width != self.W and self.tied_embeddings:
            raise UserError(
                f"model.embedding_width is {self.W}, but the head lm shares the embeddings and reads a width of "
                f"{self.width}; leave it out, or set model.tied_embeddings to false"
            )
        if self.conv_width and (self.conv_width % 2 == 0 or self.structure != "encoder" or len(self.layer_kinds) > 1):
            raise UserError(
                f"model.conv_width is {self.conv_width}; it must be odd, and the model an encoder with one layer kind"
            )
        if self.decoder_vocabulary and not (self.structure == "encoder_decoder" and self.decoder_tokens):
            raise UserError(
                f"model.decoder_vocabulary is {self.decoder_vocabulary}; it is for encoder-decoders with separate "
                f"embeddings: set --model.decoder-tokens"
            )
        self._check_experts()
        self._check_mixed_layers()
        if self.prefix_lm and self.structure != "decoder":
            raise UserError(f"model.prefix_lm is set, but the model is a(n) {self.structure}; it is for decoders only")
        self._check_windows()
        self._check_global_attention()
        self._check_mixer()
        if self.residual != "sequential" and (self.norm_place == "post" or self.structure == "encoder_decoder"):
            raise UserError(
                f"model.residual is {self.residual!r}, which is for models without cross-attention whose norms are not "
                f"after the residual; set model.residual to sequential"
            )
        if self.residual != "sequential" and not (self.mixer_residual and "none" not in self.feed_forward_pattern):
            raise UserError(
                f"model.residual is {self.residual!r}, but model.mixer_residual is {self.mixer_residual} and the "
                f"feed-forward layers are {', '.join(self.feed_forward_pattern)}; set model.residual to sequential"
            )
        if self.project_tokens and (self.embedding_width is None or self.structure != "decoder"):
            raise UserError(
                f"model.project_tokens is set, but model.embedding_width is {self.embedding_width} and the model a(n) "
                f"{self.structure}; it is for decoders with an embedding_width"
            )
        if self.relative == "alibi" and self.structure != "decoder":
            raise UserError(
                f"model.relative is 'alibi', but the model is a(n) {self.structure}; it is for decoders only"
            )
        if not self.layer_kinds or not self.labels:
            raise UserError("model.layer_kinds or model.labels is empty; give at least one kind and one label")
        if (self.distinct_layers or 1) > self.layers:
            raise UserError(f"model.distinct_layers is {self.distinct_layers}; the model has only {self.layers}")
        if self.relative == "buckets" and not 4 <= self.relative_buckets < 2 * self.relative_distance:
            raise UserError(
                f"model.relative_buckets is {self.relative_buckets}; it must be at least 4 and less than twice "
                f"model.relative_distance {self.relative_distance}"
            )
        self._check_transformer_xl()

    def _check_windows(self) -> None:
        """Raises UserError if local layers have no window, or if the windows of layers do not match the layers."""
        kinds = self.layer_kinds if not self.layer_windows else self.decoder_layer_kinds or ()
        if any(map(is_local, kinds)) and self.window < 1:
            raise UserError(f"model.window is {self.window}; local layers need at least 1")
        if not self.layer_windows:
            return
        if len(self.layer_windows) > self.layers:
            raise UserError(
                f"model.layer_windows has {len(self.layer_windows)} windows, but the model has {self.layers} layers; "
                f"give at most one for each layer"
            )
        if not any(map(is_local, self.layer_kinds)):
            raise UserError(
                f"model.layer_windows is {self.layer_windows}, but no layer has local attention; leave it out, or set "
                f"--model.layer-kinds local"
            )

    def _check_global_attention(self) -> None:
        """Raises UserError for global tokens without their projections, and where these cannot be used."""
        if not self.global_attention:
            if self.global_tokens not in ("head", "none"):
                raise UserError(
                    f"model.global_tokens is {self.global_tokens!r}, but the model has no projections for tokens with "
                    f"global attention; set model.global_tokens to none, or use a Longformer (--model.global-attention)"
                )
            return
        others = self.relative != "none" or self.query_key_norm or self.attention_sinks
        if self.structure == "decoder" or set(self.mixer_pattern) != {"attention"} or others:
            raise UserError(
                f"model.global_attention is set, but the structure is {self.structure}, the mixer "
                f"{' or '.join(self.mixer_pattern)}, relative {self.relative!r}, query_key_norm {self.query_key_norm} "
                f"and attention_sinks {self.attention_sinks}; it is for encoders with attention without relative "
                f"positions, norms of queries and sinks: leave it out"
            )
        if self.global_tokens == "head" and {"classes", "span"} <= set(self.heads_on_top):
            raise UserError(
                "model.global_tokens is 'head', but the heads classes and span have different global tokens; set "
                "--model.global-tokens first"
            )
        if self.global_rule == "question" and self.separator_token is None:
            raise UserError(NO_SEPARATOR)

    def _check_transformer_xl(self) -> None:
        if self.relative != "transformer_xl":
            if self.query_stream or self.types_in == "attention":
                name = "query_stream" if self.query_stream else "types_in"
                raise UserError(
                    f"model.{name} is {getattr(self, name)!r}, but model.relative is {self.relative!r}; set "
                    f"model.relative to 'transformer_xl', or leave model.{name} out"
                )
            return
        if self.structure != "encoder":
            raise UserError(
                f"model.relative is 'transformer_xl', but the model is a(n) {self.structure}; it is for encoders only: "
                f"set model.structure to encoder, or model.relative to 'buckets'"
            )
        if self.heads != self.K:
            raise UserError(f"model.kv_heads is {self.K}; transformer_xl requires model.heads, which is {self.heads}")
        if self.width % 2:
            raise UserError(f"model.width is {self.width}; the sinusoids of transformer_xl come in pairs: make it even")
        if self.query_stream and (
            self.conv_width or self.front_end != "tokens" or set(self.mixer_pattern) != {"attention"}
        ):
            raise UserError(
                f"model.query_stream is set, but conv_width is {self.conv_width}, front_end {self.front_end!r} and "
                f"mixer {self.mixer!r}; the query stream requires 0, 'tokens' and 'attention'"
            )

    def _check_mixer(self) -> None:
        """Raises UserError for options that a mixer does not have, and sizes that it cannot divide."""
        for mixer in set(self.mixer_pattern):
            dataclasses.replace(self, mixer=mixer, mixers=())._check_one_mixer()

    def _check_latent(self) -> None:
        """Raises UserError for options and sizes that latent attention does not have."""
        plain = {"relative": "none", "query_key_norm": False, "attention_sinks": False, "scale_by_layer": False}
        plain |= {"global_attention": False}
        for name, value in plain.items():
            if getattr(self, name) != value:
                raise UserError(
                    f"model.{name} is {getattr(self, name)!r}, which the mixer 'latent' does not support; leave it out"
                )
        if self.rotary_scaling in ("dynamic", "longrope"):
            raise UserError(
                f"model.rotary_scaling is {self.rotary_scaling!r}, but the mixer 'latent' caches rotated keys; choose "
                f"linear, llama3 or yarn"
            )
        if not self.key_value_rank or self.heads != self.K or self.R >= self.C or self.R % 2:
            raise UserError(
                f"model.key_value_rank is {self.key_value_rank}, model.kv_heads {self.K} and model.rotary_width "
                f"{self.R}; the mixer 'latent' requires at least 1, as many key-value heads as model.heads "
                f"{self.heads}, and an even number below the head width {self.C}"
            )

    def _check_one_mixer(self) -> None:
        if self.mixer == "latent":
            self._check_latent()
        if self.mixer not in (*RECURRENT, "convolution"):
            return
        for name, plain in (("relative", "none"), ("prefix_lm", False), ("layer_kinds", ("global",))):
            if getattr(self, name) != plain:
                raise UserError(
                    f"model.{name} is {getattr(self, name)!r}, but model.mixer is {self.mixer!r}, which has no "
                    f"attention; leave it out"
                )
        if self.mixer in RECURRENT and self.structure != "decoder" and self.width % 2:
            raise UserError(
                f"model.width is {self.width}; an encoder with the mixer {self.mixer!r} divides it between two "
                f"directions: make it even"
            )
        windows = self.conv_windows
        if self.mixer == "convolution" and not 1 <= len(set(windows)) == len(windows) <= self.width:
            raise UserError(
                f"model.conv_windows is {windows}; give at least one and at most model.width {self.width} different "
                f"widths"
            )

    def _check_experts(self) -> None:
        """Raises UserError if there are experts without a layer for them, or a layer without enough experts."""
        if "experts" not in (self.feed_forward, *self.feed_forwards):
            if self.experts or self.shared_expert_width or self.expert_width:
                raise UserError(
                    f"model.experts is {self.experts} with model.expert_width {self.expert_width} and "
                    f"model.shared_expert_width {self.shared_expert_width}, but model.feed_forward is "
                    f"{self.feed_forward!r}; set --model.feed-forward experts"
                )
            return
        if self.experts < self.experts_per_token:
            raise UserError(
                f"model.experts is {self.experts}, and model.experts_per_token {self.experts_per_token}; there must "
                f"be at least as many experts as a token uses: set --model.experts"
            )
        if self.rate("mlp_dropout"):
            raise UserError(
                f"model.mlp_dropout is {self.rate('mlp_dropout')}, but experts have no dropout of activations; set it "
                f"to 0, and use --model.mlp-out-dropout"
            )
        groups, chosen = self.expert_groups, self.expert_groups_per_token
        size = self.experts // groups
        if self.experts % groups or chosen > groups or self.experts_per_token > chosen * size or (size < 2 <= groups):
            raise UserError(
                f"model.expert_groups is {groups} and model.expert_groups_per_token {chosen}; the groups must divide "
                f"model.experts {self.experts}, have at least 2 experts each, and together have "
                f"model.experts_per_token {self.experts_per_token}"
            )
        if self.shared_expert_gate and not self.shared_expert_width:
            raise UserError("model.shared_expert_gate is set without a shared expert; set --model.shared-expert-width")

    def _check_mixed_layers(self) -> None:
        """Raises UserError for layers with different parts in a model that cannot have them."""
        if not self.has_mixed_layers:
            return
        given = f"model.mixers is {self.mixers} and model.feed_forwards {self.feed_forwards}"
        if "cross" in self.mixers:
            raise UserError(f"{given}; the name 'cross' is that of cross-attention: choose another name")
        shares = self.distinct_layers not in (None, self.layers)
        if self.structure == "encoder_decoder" or self.conv_width or shares:
            raise UserError(
                f"{given}, but model.structure is {self.structure!r}, model.conv_width {self.conv_width} and "
                f"model.distinct_layers {self.distinct_layers}; layers with different parts require a decoder or an "
                f"encoder, 0, and None: leave them out"
            )
        if len(set(self.mixer_pattern)) > 1 and self.relative != "none":
            raise UserError(
                f"{given}, but model.relative is {self.relative!r}, which is for models with attention in all layers; "
                f"set model.relative to none"
            )


NO_SEPARATOR = (
    "model.global_tokens is 'question', but model.separator_token is None; set it to the token after the question, or "
    "set --model.global-tokens first"
)
# Fields that the decoder of an encoder-decoder may have other values of, in the fields `decoder_...`.
_OF_DECODER = ("heads", "mlp_width", "layer_kinds", "max_length")

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


def divisors(n: int) -> str:
    """Returns the divisors of a number, up to 100,000, separated by commas."""
    return ", ".join(str(d) for d in range(1, min(n, 100_000) + 1) if n % d == 0)
