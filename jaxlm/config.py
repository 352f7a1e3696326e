"""A run is data: frozen dataclasses, checked before anything is compiled.

`RunConfig` is all that `fit` needs to know.  Its parts say what the model is (`ModelConfig`), what it learns (a task:
`CausalLM`, `MaskedLM`, `Classification` ...), from what (`DataConfig`, `TokenizerConfig`), how (`OptimizerConfig`) and
on which devices (`MeshConfig`).  The comment behind a field is its `--help`.  Nothing here imports JAX, so that a
command line can be refused within a second.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from jaxlm.errors import UserError, perhaps
from jaxlm.ranges import (
    MOST,
    AboveZero,
    Config,
    Count,
    Name,
    NotEmpty,
    NotNegative,
    Number,
    Pattern,
    Positive,
    Range,
    Seed,
    Share,
    ShareBelowOne,
    check_fields,
    shown,
)

Head = Literal["lm", "masked_lm", "next_sentence", "replaced", "pooled", "classes", "tokens", "span"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "tanh"]  # gelu is the exact one, by erf
TagScheme = Literal["auto", "IOB1", "IOB2", "IOBES", "BILOU", "IO", "none"]
Bias = Literal["query_key_value", "out", "mlp", "norm", "transform", "classes", "lm"]
ENCODER_BIASES: tuple[Bias, ...] = ("query_key_value", "out", "mlp", "norm", "transform", "classes")
Format = Literal["suffix", "text", "csv", "tsv", "quoted_tsv", "jsonl", "parquet", "conll", "squad"]
MOST_TEXTS = 10_000  # texts of one prompt, and beams
MOST_LAYERS = 10_000  # of a model that a foreign config.json may ask for
_FARTHEST = 1_000_000  # relative distance that has a row in a table
Layers = Annotated[int, Range(1, MOST_LAYERS)]
Distance = Annotated[int, Range(0, _FARTHEST)]
Texts = Annotated[int, Range(1, MOST_TEXTS)]
TopK = Annotated[int, Range(1, MOST, special=(0, "all"))]
Integer = Annotated[int, Range(-MOST, MOST)]
Characters = Annotated[int, Range(1, 10**15)]
AtLeastOne = Annotated[float, Range(1, MOST)]
OpenShare = Annotated[float, Range(1e-6, 1, below=True)]
ShareAboveZero = Annotated[float, Range(0, 1, above=True)]
Names = Annotated[tuple[Name, ...], NotEmpty()]
Remat = Literal["auto", "none", "elementwise", "dots", "full", "offload"]
Unroll = Annotated[int, Range(1, MOST_LAYERS, special=(0, "by device"))]
AxisSize = Annotated[int, Range(1, 1_000_000, special=(-1, "all that are left"))]


RotaryScaling = Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"]


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
    gated: bool = False  # multiply the MLP's activation by a second projection (GLU, Shazeer 2020)
    activation: Activation = "gelu_tanh"  # of the MLP
    biases: tuple[Bias, ...] = ENCODER_BIASES  # which projections and norms have biases
    norm: Literal["layernorm", "rmsnorm", "rmsnorm_plus_one"] = "layernorm"  # over the width; the last scales by 1 + s
    norm_place: Literal["pre", "post", "sandwich"] = "pre"  # before each sub-layer, after its residual sum, around it
    norm_epsilon: NotNegative = 1e-5  # added to the variance
    first_norm: bool = True  # whether the first layer has a norm before its attention (ModernBERT: no)

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
    relative_buckets: Distance = 32  # distances that are told apart; 0: all (disentangled only)
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
        """Tokens that the head lm tells apart."""
        return self.decoder_vocabulary or self.vocabulary

    @property
    def W(self) -> int:
        """Width of the embeddings."""
        return self.embedding_width or self.width

    def check(self) -> None:
        """Raises UserError where a value is of the wrong kind, or sizes contradict each other."""
        check_fields(self, "model.")
        if self.head_width is None and self.width % self.heads:
            raise UserError(
                f"model.heads is {self.heads}, which does not divide model.width {self.width}; "
                f"choose heads from {_divisors(self.width)} or set model.head_width"
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
                f"choose kv_heads from {_divisors(self.heads)}"
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


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, min(n, 100_000) + 1) if n % d == 0)


@dataclass(frozen=True)
class Decoding(Config):
    """How texts are generated, token by token: by sampling, greedily (temperature 0), or by beam search.

    A beam search ends when no open beam can beat the worst of its hypotheses.  What a beam can become is judged by its
    length so far (early_stopping False) or by the length that suits it best ("never").
    """

    max_new_tokens: Count = 128  # most tokens of a text
    min_new_tokens: Count = 0  # tokens before which no stop token comes
    max_length: Count = 0  # most tokens of a text and its prompt together, in place of max_new_tokens; 0: not used
    min_length: Count = 0  # tokens of a text and its prompt together before which no stop token comes
    temperature: NotNegative = 1.0  # divides the logits; 0: always the likeliest token
    top_k: TopK = 0  # sample among the k likeliest tokens; 0: among all
    top_p: ShareAboveZero = 1.0  # sample among the fewest tokens whose probabilities reach p (Holtzman et al. 2020)
    min_p: ShareBelowOne = 0.0  # sample among tokens at least p times as likely as the likeliest (Nguyen et al. 2024)
    repetition_penalty: AboveZero = 1.0  # makes tokens that were there before less likely (Keskar et al. 2019); 1: not
    no_repeat_ngram_size: Count = 0  # no sequence of so many tokens comes twice (Paulus et al. 2018); 0: any may
    beams: Texts = 1  # hypotheses that a beam search keeps; 1: no beam search
    length_penalty: Number = 1.0  # a hypothesis is worth its log-probability divided by its length to this power
    early_stopping: Literal[True, False, "never"] = False  # end a beam search with the first hypotheses, one per beam
    n_best: Texts = 1  # texts of each prompt; of a beam search the best hypotheses, else draws
    stop: tuple[Name, ...] = ()  # texts before which a generated text ends
    forbidden: tuple[Name, ...] = ()  # words or texts that are never generated
    too_long: Literal["refuse", "truncate"] = "refuse"  # a prompt that leaves too few positions; or its beginning goes
    seed: Seed = 0  # of the sampling; text n of prompt i draws from a key of (seed, i, n)

    def check(self, prefix: str = "") -> None:
        """Raises UserError where a choice is of the wrong kind or out of its range, or two contradict each other.

        Args:
          prefix: what stands before the names of the fields in a message.
        """
        check_fields(self, prefix)
        if self.max_length and self.min_length > self.max_length:
            raise UserError(
                f"{prefix}min_length is {self.min_length}; it must be from 0 to max_length, {self.max_length}"
            )
        if self.min_new_tokens > self.max_new_tokens and not self.max_length:
            raise UserError(
                f"{prefix}min_new_tokens is {self.min_new_tokens}; it must be from 0 to max_new_tokens, "
                f"{self.max_new_tokens}"
            )
        if self.beams > 1:
            drawn = ("temperature", "top_k", "top_p", "min_p")
            plain = Decoding(temperature=0.0)
            for name in drawn:
                # A temperature of 1, which is the default, is no wish.
                if getattr(self, name) not in (getattr(plain, name), *((1.0,) * (name == "temperature"))):
                    raise UserError(
                        f"{name} is {getattr(self, name)}, but a beam search draws nothing; leave it out, or set "
                        f"beams to 1"
                    )
            if self.n_best > self.beams:
                raise UserError(f"n_best is {self.n_best}, of {self.beams} beams; ask for more beams, or fewer texts")
        elif self.n_best > 1 and self.temperature == 0:
            raise UserError(f"n_best is {self.n_best}, but greedy texts are all the same; give a temperature, or beams")


@dataclass(frozen=True)
class CausalLM(Config):
    """Predict each token from those before it."""

    heads: ClassVar[tuple[Head, ...]] = ("lm",)  # that the model must have

    label_smoothing: ShareBelowOne = 0.0  # share of the target spread evenly over the vocabulary
    stream: bool = True  # rows are cut from the documents laid end to end (GPT-2); else documents are packed whole
    stride: Count = 0  # evaluation windows advance by this many tokens, each counted once; 0: by the whole length


@dataclass(frozen=True)
class MaskedLM(Config):
    """Predict tokens that were masked (Devlin et al. 2019), anew in every epoch."""

    label_smoothing: ShareBelowOne = 0.0  # share of the target spread evenly over the vocabulary
    mask_rate: OpenShare = 0.15  # share of the tokens that are predicted: 80% masked, 10% random, 10% kept
    whole_words: bool = False  # choose whole words, not single tokens
    full_sentences: bool = True  # fill a row with the sentences that follow (Liu et al. 2019); False: of one document
    next_sentence: bool = False  # pair each text with its continuation or, half of the time, another; tell which
    sentences: Literal["line", "punctuation"] = "line"  # what a sentence is, for pairs
    short_rate: Share = 0.1  # share of the pairs aimed at a random shorter length

    @property
    def heads(self) -> tuple[Head, ...]:
        """The heads that the model must have."""
        return ("masked_lm", "next_sentence") if self.next_sentence else ("masked_lm",)


@dataclass(frozen=True)
class SpanCorruption(Config):
    """Write what was taken out of a text, span by span, as T5 was pre-trained (Raffel et al. 2020, section 3.1.4).

    `data.length` is of the source; a row of targets is as long as such a source needs.
    """

    rate: OpenShare = 0.15  # share of the tokens that is taken out
    span: AtLeastOne = 3.0  # mean length of what is taken out at a place
    sentences: ClassVar[str] = "whole"  # a document is not divided
    heads: ClassVar[tuple[Head, ...]] = ("lm",)  # that the model must have


@dataclass(frozen=True)
class Infilling(Config):
    """Restore a text from one with gaps, and with its sentences in another order, as BART was pre-trained (Lewis et al.
    2020, section 2.2)."""

    rate: OpenShare = 0.3  # share of the tokens that is taken out
    span: AtLeastOne = 3.0  # mean of the gaps' lengths, Poisson's; a gap of any length, also of none, is one mask token
    sentences: Literal["line", "punctuation"] = "punctuation"  # what a sentence is
    permute: bool = True  # shuffle the sentences
    heads: ClassVar[tuple[Head, ...]] = ("lm",)  # that the model must have


@dataclass(frozen=True)
class Classification(Config):
    """Tell what a text, or a pair of texts, is: one class, any number of them, or a number."""

    problem: Literal["single_label", "multi_label", "regression"] = "single_label"  # one class, any of them, a number
    text: Names = ("text",)  # column of the text, or the two columns of a pair
    label: Name = "label"  # column of what is to be told; several classes stand in a list, or divided by separator
    separator: Name = ","  # between several classes in a column of text
    names: tuple[Name, ...] = ()  # of the classes, in the order of the outputs; empty: those found in the training part
    most_classes: Annotated[int, Range(2, MOST)] = 1000  # more are taken for a column of numbers or texts, and refused
    class_weights: Literal["none", "balanced"] = "none"  # balanced: a rare class weighs as much as a frequent one
    label_smoothing: ShareBelowOne = 0.0  # share of the target spread evenly over the classes
    windows: Literal["none", "mean", "max"] = "none"  # cut long texts, or read them by windows: mean or max of logits
    stride: Count = 0  # tokens that two windows have in common; 0: a quarter of what a window holds


@dataclass(frozen=True)
class Tagging(Config):
    """Tell what each word is a part of, such as a name (Tjong Kim Sang & De Meulder 2003)."""

    tokens: Name = "tokens"  # column of the words, a list
    tags: Name = "tags"  # column of their tags, a list
    scheme: TagScheme = "auto"  # how tags mark spans; auto: as they show; IO: by the type alone; none: tags are classes
    names: tuple[Name, ...] = ()  # of the tags, in the order of the outputs; for tags that are numbers, from 0


@dataclass(frozen=True)
class QuestionAnswering(Config):
    """Find the answer to a question in a text, or that there is none (Rajpurkar et al. 2016, 2018)."""

    stride: Count = 128  # tokens that two windows over a long text have in common
    most_question: Positive = 64  # tokens of a question that are kept
    longest_answer: Positive = 30  # tokens of an answer that is given
    unanswerable: bool = True  # whether a question may have no answer (SQuAD 2.0)
    wrong_offsets: Literal["refuse", "drop"] = "refuse"  # questions whose answer does not stand where they say


@dataclass(frozen=True)
class Similarity(Config):
    """Vectors of texts that lie as near as the texts are alike (Reimers & Gurevych 2019)."""

    objective: Literal["cosine", "contrastive"] = "cosine"  # match scores of pairs, or tell a pair from other texts
    text: tuple[Name, Name] = ("text_a", "text_b")  # columns of a pair
    label: Name = "label"  # column of its score, for objective=cosine
    lowest: Number = 0.0  # score that means a cosine of 0
    highest: Number = 1.0  # score that means a cosine of 1
    temperature: Annotated[float, Range(1e-6, MOST)] = 0.05  # divides the cosines, for objective=contrastive


@dataclass(frozen=True)
class MultipleChoice(Config):
    """Choose the answer to a question among several (Zellers et al. 2018)."""

    question: Name = "question"  # column of the question
    options: Names = ("options",)  # columns of the options, or one with a list of them
    label: Name = "label"  # column of the right one: its number, counted from `first`, its letter A, B ..., or its text
    first: Integer = 0  # number of the first option


@dataclass(frozen=True)
class Seq2Seq(Config):
    """Write a text for a text (Sutskever et al. 2014): a translation, a summary, an answer.

    An encoder-decoder reads the source in its encoder.  A decoder reads it first and learns what comes after it alone.
    """

    source: Name = "source"  # column of the text that is read, or an entry of one, such as "translation.en"
    target: Name = "target"  # column of the text, or a list of texts as good as each other, that is to be written
    references: tuple[str, ...] = ()  # columns of further texts as good as the target, which count in the scores
    prefix: str = ""  # put before each source, such as "translate English to German: "
    suffix: str = ""  # put after each source, such as " TL;DR:"
    source_length: Count = 0  # tokens of the sources in a row of an encoder-decoder; 0: as many as data.length
    scored_as: Literal["translation", "summary", "answer"] = "translation"  # BLEU and chrF, ROUGE, or exact match
    empty: Literal["refuse", "drop"] = "refuse"  # rows with an empty source or target
    label_smoothing: ShareBelowOne = 0.0  # share of the target spread evenly over the vocabulary
    generated: Count = 0  # held-out texts that are generated for scores, the first of them; 0: all
    decoding: Decoding = field(default_factory=lambda: Decoding(temperature=0.0))  # how texts are generated


@dataclass(frozen=True)
class Chat(Config):
    """Answer in a conversation: what the assistant says is learned, and nothing else (instruction tuning; Ouyang et al.
    2022, section 3.5)."""

    messages: str = "messages"  # column of lists of {"role": ..., "content": ...} or {"from": ..., "value": ...}
    question: str = ""  # in place of messages, the column of what the user says
    answer: str = ""  # and that of what the assistant answers
    system: str = ""  # said before each conversation
    template: str = ""  # Jinja source of the chat template; empty: the tokenizer's own
    last_alone: bool = False  # of several answers only the last one is learned
    compared: Pattern = ""  # regular expression of the part of an answer that scores compare; empty: the whole
    label_smoothing: ShareBelowOne = 0.0  # share of the target spread evenly over the vocabulary
    generated: Count = 100  # held-out answers that are generated for scores, the first of them; 0: all
    decoding: Decoding = field(default_factory=lambda: Decoding(temperature=0.0))  # how answers are generated


@dataclass(frozen=True)
class Part(Config):
    """One of several tasks, with data of its own."""

    task: Any  # Classification, Tagging, QuestionAnswering, Similarity or MultipleChoice
    data: DataConfig  # its length is that of the run
    weight: NotNegative = 0.0  # its share of the rows is this by the sum of all; 0 for all: by how many rows each has


@dataclass(frozen=True)
class MultiTask(Config):
    """Several tasks at once, on one body with a head for each (Liu et al. 2019)."""

    parts: dict[str, Part]  # by name, which scores and exports bear


@dataclass(frozen=True)
class CleaningConfig(Config):
    """What is done to each row before it is used; the run says how many rows each choice changed or dropped."""

    unicode: Literal["none", "NFC", "NFKC"] = "none"  # Unicode normal form
    encoding: Literal["refuse", "drop", "replace"] = "refuse"  # rows that are not UTF-8
    control: bool = False  # remove control characters other than tab and line ends
    whitespace: bool = False  # runs of white space become one space, ends are stripped
    min_characters: Count = 0  # shorter rows are dropped
    max_characters: Count = 0  # longer rows are dropped; 0: no limit
    duplicates: bool = False  # rows seen before are dropped


@dataclass(frozen=True)
class DataConfig(Config):
    """Where text comes from, and the shape that it is packed to."""

    path: str = ""  # file, folder, glob, or tfds:NAME; txt, csv, tsv, json, jsonl, parquet, conll, each also as .gz
    eval_path: str = ""  # held-out data; empty: eval_fraction of the documents or examples
    eval_fraction: Share = 0.1  # share of the documents or examples held out when there is no eval_path
    eval_choice: Literal["sampled", "last"] = "sampled"  # documents held out: any, by a hash; or the last of a text
    eval_seed: Seed = 0  # of the choice of the examples held out; the run's own seed does not change it
    format: Format = "suffix"  # of the files; suffix: what the end of a file's name says
    target_path: str = ""  # plain text whose line n goes with line n of `path`: a translation; its column is "target"
    eval_target_path: str = ""  # the same beside eval_path
    columns: tuple[str, ...] = ()  # names of the columns of csv and tsv files without a header, and of conll files
    pattern: Pattern = ""  # of plain text, a regular expression whose named groups are the columns of a line
    encoding: Name = "utf-8"  # of text files, such as cp1252; a byte-order mark of UTF-16 or UTF-32 counts first
    label_from: Literal["column", "folder", "file"] = "column"  # column "label" is the name of a file, or of its folder
    limit: Count = 0  # rows that are read, the first ones, for training and for evaluation; 0: all
    text: Name = "text"  # the column that holds the text that a language model learns from, or a line of plain text
    split: str = "train"  # of a tfds data set
    eval_split: str = ""  # of the same tfds data set, held out
    documents: Literal["line", "blank_line", "file", "boundary"] = "line"  # what a document is, in plain text
    boundary: Pattern = ""  # regular expression of the line that begins a document, for documents=boundary
    length: Annotated[int, Range(2, MOST)] = 512  # tokens in a row T
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)
    cache: str = ""  # folder of tokenized data; empty: $JAXLM_CACHE or ~/.cache/jaxlm


@dataclass(frozen=True)
class TokenizerConfig(Config):
    """A tokenizer to load, or the kind to train on the training part; its size is the model's vocabulary."""

    path: str = ""  # folder, hub name, tokenizer.json, vocab.txt, .model, or vocab.json with merges.txt beside it
    train: Literal["unigram", "bpe", "byte_bpe", "wordpiece", "characters"] = "unigram"  # when there is no path
    lowercase: bool = False  # fold case (wordpiece only: the others are lossless)
    separate: bool = False  # one of the sources, another of the targets (Seq2Seq), saved in a folder `target` below it
    sentinels: Count = 0  # of the vocabulary, tokens <extra_id_0> ... that mark gaps: SpanCorruption needs them
    split_special_tokens: bool | None = None  # spell [SEP] in a text like other text; None: in pre-training alone
    max_training_characters: Characters = 50_000_000  # the trainer sees a sample of this much text


@dataclass(frozen=True)
class OptimizerConfig(Config):
    """The optax chain: clip, precondition, decay, layer-wise rates, schedule."""

    name: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"  # how a gradient becomes a direction
    rate: NotNegative = 1e-3  # peak learning rate
    relative: bool = False  # an update is in proportion to the size of its tensor, as Adafactor's authors have it
    schedule: Literal["linear", "cosine", "inverse_sqrt", "constant", "warmup_stable_decay"] = "cosine"  # after warm-up
    warmup: NotNegative = 0.05  # steps of linear warm-up; below 1: share of all steps
    final: Share = 0.1  # share of the peak that the learning rate has fallen to when the run ends
    decay_share: Share = 0.2  # share of the steps in which warmup_stable_decay falls
    weight_decay: NotNegative = 0.1  # decoupled; biases and norms are left out
    clip: NotNegative = 1.0  # global norm to which gradients are clipped; 0: never
    beta1: ShareBelowOne = 0.9  # of adamw, lion and muon's momentum
    beta2: ShareBelowOne = 0.95  # of adamw and lion
    epsilon: ShareAboveZero = 1e-8  # of adamw
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"  # of the first moment; the second's changes are too fine
    layer_decay: ShareAboveZero = 1.0  # each layer's rate is this times that of the layer above (ELECTRA's recipe)
    freeze: Literal["none", "embeddings", "all_but_heads"] = "none"  # what is not trained
    freeze_layers: Count = 0  # the first n layers (and the embeddings) are not trained


@dataclass(frozen=True)
class MeshConfig(Config):
    """How many devices each axis of the mesh has; at most one may be -1: all that are left."""

    data: AxisSize = -1  # copies of the model, each with its rows of the batch
    fsdp: AxisSize = 1  # rows of the batch and the parameters' model width, split
    tensor: AxisSize = 1  # heads, MLP width and vocabulary, split; between layers the length of rows
    context: AxisSize = 1  # the length of rows, split; every query still sees all keys


MatmulPrecision = Literal["default", "high", "highest"]


@dataclass(frozen=True)
class RunConfig(Config):
    """One run, from data to exported model."""

    model: ModelConfig | None = field(default_factory=ModelConfig)  # None: that of `init`
    task: Any = field(default_factory=CausalLM)  # what is learned
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    batch: Positive = 32  # rows in one update, over all devices and micro-batches
    accumulate: Positive = 1  # micro-batches that an update is computed in, to save memory
    examples: Count = 0  # mean number of examples in one update; above 0 it decides over batch
    steps: Positive = 1000  # optimizer updates
    eval_tokens: Count = 1 << 22  # of held-out text, that a language model is evaluated on, from all over it; 0: all
    epochs: Annotated[float, Range(0, 1_000_000)] = 0.0  # passes over the training part; above 0 they decide over steps
    seed: Seed = 0  # of parameters, data order, masking and dropout
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products; the rest stays float32
    # On TPU the default multiplies float32 in one pass of bfloat16, on GPU in TensorFloat32; highest is float32.
    matmul_precision: MatmulPrecision = "default"  # of products of float32 matrices
    # Offload is full, with the inputs of the layers, from which all is recomputed, in the memory of the host.
    # Auto is elementwise (norms, activations, softmax, masks), which costs no product, and on CPU none.
    remat: Remat = "auto"  # what backward recomputes: nothing; elementwise operations; all but products; all
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"  # kernel; auto: splash on TPU, cudnn on GPU, or XLA
    # By device: on GPU all of up to 12 layers, else 4; on TPU and CPU 1.
    unroll: Unroll = 0  # layers that one turn of the layer loop holds; more is faster and compiles longer
    log_every: Positive = 10  # steps between lines of metrics.jsonl
    eval_every: Count = 0  # steps between evaluations; 0: after each epoch, where there are epochs, and at the end
    best: str = ""  # the score that the best checkpoint has most of; empty: the task's own
    patience: Count = 0  # evaluations without a better score after which the run ends; 0: it goes on
    checkpoint_every: Count = 0  # steps between checkpoints; 0: a tenth of the run
    keep: Positive = 2  # last checkpoints that an unfinished run keeps, beside the best
    keep_checkpoints: bool = False  # also of a finished run, which otherwise keeps its export: the best weights
    dropout: ShareBelowOne | None = None  # of a model that comes from `init`; None: as it says
    init: str = ""  # run, folder in Hugging Face's format, or hub name to start the weights from
    new_head: bool = False  # draw the outputs of the task's head anew, where the weights of init have such a head
    workdir: str = ""  # run folder; empty: runs/CONFIG_NAME
    sample_prompt: str = ""  # what the sample at the end of a decoder's run goes on from
    sample_tokens: Count = 120  # its length; 0: no sample
    profile: Count = 0  # steps, after the first few, whose trace is written to WORKDIR/profile for TensorBoard; 0: none

    def check(self) -> None:
        """Raises UserError for what can be known to fail before data or devices are looked at."""
        check_fields(self)
        check_task(self.task)
        if not self.data.path and not isinstance(self.task, MultiTask):
            raise UserError("data.path is empty; give a file, a folder, a glob or tfds:NAME with --data.path")
        if self.batch % self.accumulate:
            raise UserError(
                f"accumulate is {self.accumulate}, which does not divide batch {self.batch}; "
                f"choose accumulate from {_divisors(self.batch)}"
            )
        if not self.data.eval_path and not self.data.eval_split and not 0 < self.data.eval_fraction < 1:
            raise UserError(
                f"data.eval_fraction is {self.data.eval_fraction}; it must lie between 0 and 1, "
                f"or give held-out data with --data.eval-path"
            )
        if self.data.documents == "boundary" and not self.data.boundary:
            raise UserError("data.documents is 'boundary' but data.boundary is empty; give the regular expression")
        if self.model is None and not self.init:
            raise UserError("there is no model; give the weights to start from with --init FOLDER_OR_HUB_NAME")
        if self.model is not None:
            self._check_model(self.model)
        if self.optimizer.name == "adafactor" and self.optimizer.momentum_dtype != "float32":
            raise UserError("adafactor has no first moment; leave out --optimizer.momentum-dtype")
        if self.new_head and isinstance(self.task, _NO_LABELS):
            raise UserError(
                f"new_head is set, and {type(self.task).__name__} has no head of labels to draw anew; leave it out"
            )
        if self.dropout is not None and self.model is not None:
            raise UserError(f"dropout is {self.dropout}, but the config names the model; set --model.dropout instead")

    def _check_model(self, model: ModelConfig) -> None:
        model.check()
        if self.data.length > model.max_length and model.positions == "learned":
            raise UserError(
                f"data.length is {self.data.length}, longer than the {model.max_length} positions of the model; "
                f"lower --data.length, or take a model with more positions (--model.max-length)"
            )
        if isinstance(self.task, CausalLM):
            if model.structure != "decoder" or "lm" not in model.heads_on_top:
                raise UserError(
                    f"CausalLM needs a decoder with the 'lm' head, not a(n) {model.structure} with "
                    f"{model.heads_on_top}; change model.structure and model.heads_on_top"
                )
            if not 0 <= self.task.stride <= self.data.length:
                raise UserError(f"task.stride is {self.task.stride}; it must lie between 0 and {self.data.length}")
        elif isinstance(self.task, MaskedLM):
            if model.structure != "encoder" or not set(self.task.heads) <= set(model.heads_on_top):
                raise UserError(
                    f"MaskedLM needs an encoder with the heads {self.task.heads}, not a(n) {model.structure} with "
                    f"{model.heads_on_top}; change model.structure and model.heads_on_top"
                )
            if self.task.next_sentence and model.types < 2:
                raise UserError(f"model.types is {model.types}; next_sentence tells a pair apart by 2 types")
        elif isinstance(self.task, (SpanCorruption, Infilling)):
            if model.structure != "encoder_decoder" or model.heads_on_top != ("lm",) or model.start_token is None:
                raise UserError(
                    f"{type(self.task).__name__} needs an encoder-decoder with the head lm and a start token, not a(n) "
                    f"{model.structure} with {model.heads_on_top} and start_token {model.start_token}"
                )
        elif model.structure == "encoder_decoder" and not isinstance(self.task, Seq2Seq):
            raise UserError(
                f"{type(self.task).__name__} reads the states of an encoder or a decoder; the model is an "
                f"encoder-decoder: start from another"
            )
        if not 0 <= self.optimizer.freeze_layers <= model.layers:
            raise UserError(
                f"optimizer.freeze_layers is {self.optimizer.freeze_layers}; the model has {model.layers} layers"
            )


def _check_kind(task: Any) -> None:
    """Raises UserError where a task is not the config of one."""
    if not dataclasses.is_dataclass(task) or isinstance(task, type):
        known = ", ".join(TASKS)
        raise UserError(
            f"task is {shown(task)}; it must be the config of a task, such as CausalLM(): {known}, or your own"
        )


def check_task(task: Any) -> None:
    """Raises UserError where a task is no task's config, or its fields are out of range or contradict each other."""
    _check_kind(task)
    if isinstance(task, Config):  # the class of a user's own task may be any dataclass
        check_fields(task, "task.")
    if isinstance(task, MultiTask):
        for name, part in task.parts.items():
            _check_part(name, part)
        if not task.parts or len({part.weight > 0 for part in task.parts.values()}) > 1:
            raise UserError("task.parts is empty, or some parts have a weight and some none; give all one, or none")
    if isinstance(task, (Seq2Seq, Chat)):
        task.decoding.check("task.decoding.")
        if task.decoding.n_best > 1:
            raise UserError(f"task.decoding.n_best is {task.decoding.n_best}; a task writes one text for each: set 1")
    _check_used(task)
    if isinstance(task, Classification) and len(task.text) not in (1, 2):
        raise UserError(f"task.text names {len(task.text)} columns; give one, or the two of a pair")
    if isinstance(task, Classification) and task.windows != "none" and len(task.text) == 2:
        raise UserError(f"task.windows is {task.windows!r}, which is for one text and not for pairs; leave it out")
    if isinstance(task, Similarity) and not task.lowest < task.highest:
        raise UserError(f"task.lowest is {task.lowest}, task.highest {task.highest}; the second must be larger")


# Fields that mean something only beside others: (task, field, the field that decides, its values that use the field).
_USED: tuple[tuple[type, str, str, tuple[Any, ...]], ...] = (
    (Classification, "class_weights", "problem", ("single_label", "multi_label")),
    (Classification, "label_smoothing", "problem", ("single_label",)),
    (Classification, "names", "problem", ("single_label", "multi_label")),
    (Classification, "separator", "problem", ("multi_label",)),
    (Classification, "stride", "windows", ("mean", "max")),
    (Similarity, "lowest", "objective", ("cosine",)),
    (Similarity, "highest", "objective", ("cosine",)),
    (Similarity, "temperature", "objective", ("contrastive",)),
    (MaskedLM, "sentences", "next_sentence", (True,)),
    (MaskedLM, "full_sentences", "next_sentence", (False,)),
    (MaskedLM, "short_rate", "next_sentence", (True,)),
)


def _check_used(task: Any) -> None:
    """Raises UserError where a field is set that the task, as it is, would not use."""
    for kind, name, other, values in _USED:
        if type(task) is kind and getattr(task, other) not in values:
            value, default = getattr(task, name), kind.__dataclass_fields__[name].default  # type: ignore[attr-defined]
            if value != default:
                listed = " or ".join(map(str, values))
                raise UserError(
                    f"task.{name} is {value!r}, which means nothing where task.{other} is {getattr(task, other)}; "
                    f"leave it out, or set task.{other} to {listed}"
                )
    if isinstance(task, Chat) and task.answer and not task.question:
        raise UserError(f"task.answer is {task.answer!r} without task.question; give both columns, or task.messages")


_NO_LABELS = (CausalLM, MaskedLM, SpanCorruption, Infilling, Seq2Seq, Chat)
_NO_PARTS = (*_NO_LABELS, MultiTask)


def _check_part(name: str, part: Part) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or isinstance(part.task, _NO_PARTS):
        raise UserError(
            f"task.parts has {name!r}, a {type(part.task).__name__}; a name is of small letters, and a part is a task "
            f"over records such as Classification"
        )
    if not part.data.path:
        raise UserError(f"the data.path of the part {name!r} is empty; give a file, a folder, a glob or tfds:NAME")
    check_task(part.task)


_DECLARED = (
    CausalLM,
    MaskedLM,
    SpanCorruption,
    Infilling,
    Classification,
    Tagging,
    QuestionAnswering,
    Similarity,
    MultipleChoice,
    Seq2Seq,
    Chat,
    MultiTask,
)
TASKS: dict[str, type] = {kind.__name__: kind for kind in _DECLARED}  # name in config.json -> its dataclass
_PARTS: dict[tuple[type, str], type] = {
    (RunConfig, "model"): ModelConfig,
    (RunConfig, "data"): DataConfig,
    (RunConfig, "tokenizer"): TokenizerConfig,
    (RunConfig, "optimizer"): OptimizerConfig,
    (RunConfig, "mesh"): MeshConfig,
    (DataConfig, "cleaning"): CleaningConfig,
    (Part, "data"): DataConfig,
    (Seq2Seq, "decoding"): Decoding,
    (Chat, "decoding"): Decoding,
}


def to_json(config: Any) -> dict[str, Any]:
    """A config as plain JSON values; the task keeps its kind under `kind`.  `from_json` is the inverse."""
    values = dataclasses.asdict(config)
    if isinstance(config, RunConfig):
        values["task"] = _of_kind(config.task)
    return json.loads(json.dumps(values))


def _of_kind(task: Any) -> dict[str, Any]:
    values = {"kind": type(task).__name__, **dataclasses.asdict(task)}
    for name, part in task.parts.items() if isinstance(task, MultiTask) else ():
        values["parts"][name]["task"] = _of_kind(part.task)
    return values


def task_to_json(task: Any) -> dict[str, Any]:
    """Returns the config of a task as plain JSON values, with its kind.  `task_from_json` is the inverse."""
    return json.loads(json.dumps(_of_kind(task)))


def task_from_json(values: dict[str, Any]) -> Any:
    """Returns the config of a task from `task_to_json`'s values.  Raises UserError for a kind that is not known."""
    own = {name: value for name, value in values.items() if name != "kind"}
    if values["kind"] not in TASKS:
        raise UserError(f"the task is {values['kind']}, which is not one of jaxlm's; give its config by --config")
    return from_json(TASKS[values["kind"]], own)


def from_json(kind: type, values: dict[str, Any]) -> Any:
    """The dataclass `kind` from `to_json`'s values.  Raises UserError for a field that `kind` does not have."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    made = {}
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"{kind.__name__} has no field {name!r}{perhaps(name, fields)}")
        if (kind, name) in _PARTS and value is not None:
            value = from_json(_PARTS[kind, name], value)
        elif kind is MultiTask:
            value = {part: from_json(Part, fields) for part, fields in value.items()}
        elif kind in (RunConfig, Part) and name == "task":
            value = task_from_json(value)
        elif isinstance(value, list):
            value = tuple(value)
        made[name] = value
    return kind(**made)


def difference(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    """Dotted fields in which two `to_json` values differ, as lines `field: ours | theirs`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = sorted(ours.keys() | theirs.keys())
        return [line for n in names for line in difference(ours.get(n), theirs.get(n), f"{prefix}.{n}".lstrip("."))]
    return [] if ours == theirs else [f"{prefix}: {ours!r} | {theirs!r}"]
