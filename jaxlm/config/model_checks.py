"""Checks of a `ModelConfig`: sizes and choices that contradict each other."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from jaxlm.config.choices import OF_DECODER, RECURRENT, is_local
from jaxlm.config.ranges import check_fields
from jaxlm.errors import UserError

if TYPE_CHECKING:
    from jaxlm.config.model import ModelConfig

NO_SEPARATOR = (
    "model.global_tokens is 'question', but model.separator_token is None; set it to the token after the question, or "
    "set --model.global-tokens first"
)


def check(config: ModelConfig) -> None:
    """Raises UserError if a value is of the wrong type or out of range, or sizes contradict each other."""
    check_fields(config, "model.")
    _check_heads(config)
    _check_decoder(config)
    _check_positions(config)
    _check_embeddings(config)
    _check_layers(config)
    _check_experts(config)
    _check_mixed_layers(config)
    _check_windows(config)
    _check_global_attention(config)
    _check_mixers(config)
    _check_transformer_xl(config)


def _check_heads(config: ModelConfig) -> None:
    """Raises UserError if widths and numbers of heads do not divide each other."""
    if config.head_width is None and config.width % config.heads:
        raise UserError(
            f"model.heads is {config.heads}, which does not divide model.width {config.width}; "
            f"choose heads from {divisors(config.width)} or set model.head_width"
        )
    if config.heads % config.K:
        raise UserError(
            f"model.kv_heads is {config.K}, which does not divide model.heads {config.heads}; "
            f"choose kv_heads from {divisors(config.heads)}"
        )


def _check_decoder(config: ModelConfig) -> None:
    """Raises UserError for fields of a second stack that do not fit the structure."""
    for name in (f"decoder_{name}" for name in OF_DECODER):
        if getattr(config, name) is not None and config.structure != "encoder_decoder":
            raise UserError(
                f"model.{name} is {getattr(config, name)}, but the model is a(n) {config.structure}; it is for "
                f"encoder-decoders: leave it out"
            )
    if config.decoder_config is not config:
        dataclasses.replace(config.decoder_config, structure="decoder", decoder_vocabulary=None).check()
    if config.decoder_vocabulary and not (config.structure == "encoder_decoder" and config.decoder_tokens):
        raise UserError(
            f"model.decoder_vocabulary is {config.decoder_vocabulary}; it is for encoder-decoders with separate "
            f"embeddings: set --model.decoder-tokens"
        )
    if config.prefix_lm and config.structure != "decoder":
        raise UserError(f"model.prefix_lm is set, but the model is a(n) {config.structure}; it is for decoders only")


def _check_positions(config: ModelConfig) -> None:
    """Raises UserError for positions that do not fit the widths or the structure."""
    pairs = config.R // 2
    if config.rotary_scaling == "longrope" and not len(config.rotary_short) == len(config.rotary_long) == pairs:
        raise UserError(
            f"model.rotary_short and rotary_long have {len(config.rotary_short)} and {len(config.rotary_long)} "
            f"numbers; {config.R} entries of each head are rotated: give {pairs} numbers in each"
        )
    if config.positions == "rotary" and (config.R % 2 or config.R > config.C):
        raise UserError(
            f"model.rotary_width is {config.rotary_width}, and the head width is {config.C}; rotary positions rotate "
            f"pairs: rotate an even number of entries, at most the head width"
        )
    if config.positions == "sinusoidal" and config.width % 2:
        raise UserError(f"model.width is {config.width}; sinusoidal positions come in pairs: make it even")
    if config.relative == "alibi" and config.structure != "decoder":
        raise UserError(f"model.relative is 'alibi', but the model is a(n) {config.structure}; it is for decoders only")
    if config.relative == "buckets" and not 4 <= config.relative_buckets < 2 * config.relative_distance:
        raise UserError(
            f"model.relative_buckets is {config.relative_buckets}; it must be at least 4 and less than twice "
            f"model.relative_distance {config.relative_distance}"
        )


def _check_embeddings(config: ModelConfig) -> None:
    """Raises UserError for a width of the embeddings that heads or layers cannot read."""
    if "lm" in config.heads_on_top and config.hidden_width != config.W and config.tied_embeddings:
        raise UserError(
            f"model.embedding_width is {config.W}, but the head lm shares the embeddings and reads a width of "
            f"{config.width}; leave it out, or set model.tied_embeddings to false"
        )
    if config.project_tokens and (config.embedding_width is None or config.structure != "decoder"):
        raise UserError(
            f"model.project_tokens is set, but model.embedding_width is {config.embedding_width} and the model a(n) "
            f"{config.structure}; it is for decoders with an embedding_width"
        )


def _check_layers(config: ModelConfig) -> None:
    """Raises UserError for layers that cannot be combined."""
    if not config.layer_kinds or not config.labels:
        raise UserError("model.layer_kinds or model.labels is empty; give at least one kind and one label")
    if (config.distinct_layers or 1) > config.layers:
        raise UserError(f"model.distinct_layers is {config.distinct_layers}; the model has only {config.layers}")
    if config.conv_width and (
        config.conv_width % 2 == 0 or config.structure != "encoder" or len(config.layer_kinds) > 1
    ):
        raise UserError(
            f"model.conv_width is {config.conv_width}; it must be odd, and the model an encoder with one layer kind"
        )
    if config.residual != "sequential" and (config.norm_place == "post" or config.structure == "encoder_decoder"):
        raise UserError(
            f"model.residual is {config.residual!r}, which is for models without cross-attention whose norms are not "
            f"after the residual; set model.residual to sequential"
        )
    if config.residual != "sequential" and not (config.mixer_residual and "none" not in config.feed_forward_pattern):
        raise UserError(
            f"model.residual is {config.residual!r}, but model.mixer_residual is {config.mixer_residual} and the "
            f"feed-forward layers are {', '.join(config.feed_forward_pattern)}; set model.residual to sequential"
        )


def _check_experts(config: ModelConfig) -> None:
    """Raises UserError if there are experts without a layer for them, or a layer without enough experts."""
    if "experts" not in (config.feed_forward, *config.feed_forwards):
        if config.experts or config.shared_expert_width or config.expert_width:
            raise UserError(
                f"model.experts is {config.experts} with model.expert_width {config.expert_width} and "
                f"model.shared_expert_width {config.shared_expert_width}, but model.feed_forward is "
                f"{config.feed_forward!r}; set --model.feed-forward experts"
            )
        return
    if config.experts < config.experts_per_token:
        raise UserError(
            f"model.experts is {config.experts}, and model.experts_per_token {config.experts_per_token}; there must "
            f"be at least as many experts as a token uses: set --model.experts"
        )
    if config.rate("mlp_dropout"):
        raise UserError(
            f"model.mlp_dropout is {config.rate('mlp_dropout')}, but experts have no dropout of activations; set it "
            f"to 0, and use --model.mlp-out-dropout"
        )
    groups, chosen = config.expert_groups, config.expert_groups_per_token
    size = config.experts // groups
    if config.experts % groups or chosen > groups or config.experts_per_token > chosen * size or (size < 2 <= groups):
        raise UserError(
            f"model.expert_groups is {groups} and model.expert_groups_per_token {chosen}; the groups must divide "
            f"model.experts {config.experts}, have at least 2 experts each, and together have "
            f"model.experts_per_token {config.experts_per_token}"
        )
    if config.shared_expert_gate and not config.shared_expert_width:
        raise UserError("model.shared_expert_gate is set without a shared expert; set --model.shared-expert-width")


def _check_mixed_layers(config: ModelConfig) -> None:
    """Raises UserError for layers with different parts in a model that cannot have them."""
    if not config.has_mixed_layers:
        return
    given = f"model.mixers is {config.mixers} and model.feed_forwards {config.feed_forwards}"
    if "cross" in config.mixers:
        raise UserError(f"{given}; the name 'cross' is that of cross-attention: choose another name")
    shares = config.distinct_layers not in (None, config.layers)
    if config.structure == "encoder_decoder" or config.conv_width or shares:
        raise UserError(
            f"{given}, but model.structure is {config.structure!r}, model.conv_width {config.conv_width} and "
            f"model.distinct_layers {config.distinct_layers}; layers with different parts require a decoder or an "
            f"encoder, 0, and None: leave them out"
        )
    if len(set(config.mixer_pattern)) > 1 and config.relative != "none":
        raise UserError(
            f"{given}, but model.relative is {config.relative!r}, which is for models with attention in all layers; "
            f"set model.relative to none"
        )


def _check_windows(config: ModelConfig) -> None:
    """Raises UserError if local layers have no window, or if the windows of layers do not match the layers."""
    kinds = config.layer_kinds if not config.layer_windows else config.decoder_layer_kinds or ()
    if any(map(is_local, kinds)) and config.window < 1:
        raise UserError(f"model.window is {config.window}; local layers need at least 1")
    if not config.layer_windows:
        return
    if len(config.layer_windows) > config.layers:
        raise UserError(
            f"model.layer_windows has {len(config.layer_windows)} windows, but the model has {config.layers} layers; "
            f"give at most one for each layer"
        )
    if not any(map(is_local, config.layer_kinds)):
        raise UserError(
            f"model.layer_windows is {config.layer_windows}, but no layer has local attention; leave it out, or set "
            f"--model.layer-kinds local"
        )


def _check_global_attention(config: ModelConfig) -> None:
    """Raises UserError for global tokens without their projections, and where these cannot be used."""
    if not config.global_attention:
        if config.global_tokens not in ("head", "none"):
            raise UserError(
                f"model.global_tokens is {config.global_tokens!r}, but the model has no projections for tokens with "
                f"global attention; set model.global_tokens to none, or use a Longformer (--model.global-attention)"
            )
        return
    others = config.relative != "none" or config.query_key_norm or config.attention_sinks
    if config.structure == "decoder" or set(config.mixer_pattern) != {"attention"} or others:
        raise UserError(
            f"model.global_attention is set, but the structure is {config.structure}, the mixer "
            f"{' or '.join(config.mixer_pattern)}, relative {config.relative!r}, query_key_norm "
            f"{config.query_key_norm} and attention_sinks {config.attention_sinks}; it is for encoders with attention "
            f"without relative positions, norms of queries and sinks: leave it out"
        )
    if config.global_tokens == "head" and {"classes", "span"} <= set(config.heads_on_top):
        raise UserError(
            "model.global_tokens is 'head', but the heads classes and span have different global tokens; set "
            "--model.global-tokens first"
        )
    if config.global_rule == "question" and config.separator_token is None:
        raise UserError(NO_SEPARATOR)


def _check_mixers(config: ModelConfig) -> None:
    """Raises UserError for options that a mixer does not have, and sizes that it cannot divide."""
    for mixer in set(config.mixer_pattern):
        _check_mixer(dataclasses.replace(config, mixer=mixer, mixers=()))


def _check_mixer(config: ModelConfig) -> None:
    if config.mixer == "latent":
        _check_latent(config)
    if config.mixer not in (*RECURRENT, "convolution", "gated_delta"):
        return
    for name, plain in (("relative", "none"), ("prefix_lm", False), ("layer_kinds", ("global",))):
        if getattr(config, name) != plain:
            raise UserError(
                f"model.{name} is {getattr(config, name)!r}, but model.mixer is {config.mixer!r}, which has no "
                f"attention; leave it out"
            )
    if config.mixer in RECURRENT and config.structure != "decoder" and config.width % 2:
        raise UserError(
            f"model.width is {config.width}; an encoder with the mixer {config.mixer!r} divides it between two "
            f"directions: make it even"
        )
    if config.mixer == "gated_delta":
        _check_gated_delta(config)
    windows = config.conv_windows
    if config.mixer == "convolution" and not 1 <= len(set(windows)) == len(windows) <= config.width:
        raise UserError(
            f"model.conv_windows is {windows}; give at least one and at most model.width {config.width} different "
            f"widths"
        )


def _check_latent(config: ModelConfig) -> None:
    """Raises UserError for options and sizes that latent attention does not have."""
    plain = {"relative": "none", "query_key_norm": False, "attention_sinks": False, "scale_by_layer": False}
    plain |= {"global_attention": False, "attention_gate": False}
    for name, value in plain.items():
        if getattr(config, name) != value:
            raise UserError(
                f"model.{name} is {getattr(config, name)!r}, which the mixer 'latent' does not support; leave it out"
            )
    if config.rotary_scaling in ("dynamic", "longrope"):
        raise UserError(
            f"model.rotary_scaling is {config.rotary_scaling!r}, but the mixer 'latent' caches rotated keys; choose "
            f"linear, llama3 or yarn"
        )
    if not config.key_value_rank or config.heads != config.K or config.R >= config.C or config.R % 2:
        raise UserError(
            f"model.key_value_rank is {config.key_value_rank}, model.kv_heads {config.K} and model.rotary_width "
            f"{config.R}; the mixer 'latent' requires at least 1, as many key-value heads as model.heads "
            f"{config.heads}, and an even number below the head width {config.C}"
        )


def _check_gated_delta(config: ModelConfig) -> None:
    if config.structure != "decoder":
        raise UserError(
            f"model.mixer is 'gated_delta', which reads from left to right, but the model is a(n) "
            f"{config.structure}; set model.structure to decoder"
        )
    K, H = config.linear_sizes[:2]
    if H % K:
        raise UserError(
            f"model.linear_value_heads is {H}, which is no multiple of the {K} heads of keys; choose a multiple of "
            f"{K}, or set model.linear_key_heads to one of {divisors(H)}"
        )


def _check_transformer_xl(config: ModelConfig) -> None:
    if config.relative != "transformer_xl":
        if config.query_stream or config.types_in == "attention":
            name = "query_stream" if config.query_stream else "types_in"
            raise UserError(
                f"model.{name} is {getattr(config, name)!r}, but model.relative is {config.relative!r}; set "
                f"model.relative to 'transformer_xl', or leave model.{name} out"
            )
        return
    if config.structure != "encoder":
        raise UserError(
            f"model.relative is 'transformer_xl', but the model is a(n) {config.structure}; it is for encoders only: "
            f"set model.structure to encoder, or model.relative to 'buckets'"
        )
    if config.heads != config.K:
        raise UserError(f"model.kv_heads is {config.K}; transformer_xl requires model.heads, which is {config.heads}")
    if config.width % 2:
        raise UserError(f"model.width is {config.width}; the sinusoids of transformer_xl come in pairs: make it even")
    if config.query_stream and (
        config.conv_width or config.front_end != "tokens" or set(config.mixer_pattern) != {"attention"}
    ):
        raise UserError(
            f"model.query_stream is set, but conv_width is {config.conv_width}, front_end {config.front_end!r} and "
            f"mixer {config.mixer!r}; the query stream requires 0, 'tokens' and 'attention'"
        )


def divisors(n: int) -> str:
    """Returns the divisors of a number, up to 100,000, separated by commas."""
    return ", ".join(str(d) for d in range(1, min(n, 100_000) + 1) if n % d == 0)
