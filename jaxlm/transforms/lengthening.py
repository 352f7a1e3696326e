"""Models for long documents from models for short texts: a Longformer from RoBERTa, an LED from BART."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.config.arguments import check_model
from jaxlm.config.ranges import MAX_INT, Positive, Range, check_argument
from jaxlm.errors import UserError
from jaxlm.lm import LM

Window = Annotated[int, Range(2, MAX_INT)]


def lengthen(lm: LM, max_length: int, window: int = 512) -> LM:
    """Returns the model with more positions, local attention, and projections for tokens with global attention.

    The position embeddings are repeated, and the projections for global tokens are copies of the others. The encoder of
    an encoder-decoder changes, its decoder does not. The model needs training on long texts, or fine-tuning.

    Args:
      lm: an encoder or an encoder-decoder with learned positions, such as RoBERTa or BART.
      max_length: the new maximum number of tokens.
      window: the number of tokens that a token attends to on both sides together, which is even.

    Returns:
      A new model; `lm` is unchanged.

    Raises:
      UserError: for another kind of model, an odd window, and fewer positions than the model has.

    Source: Beltagy et al. 2020, section 5.
    """
    check_model("lm", lm)
    max_length = check_argument("max_length", max_length, Positive)
    window, config = check_argument("window", window, Window), lm.config
    if config.structure == "decoder" or config.positions != "learned" or config.relative != "none":
        raise UserError(
            f"the model is a(n) {config.structure} with positions {config.positions!r} and relative "
            f"{config.relative!r}; give an encoder or an encoder-decoder with learned positions only"
        )
    if config.global_attention or config.has_local_layers:
        raise UserError("the model has local attention already; give a model in which all tokens attend to all")
    if window % 2:
        raise UserError(f"window is {window}; it counts the tokens on both sides: make it even")
    if max_length < config.max_length:
        raise UserError(f"max_length is {max_length}, less than the model's {config.max_length} positions; raise it")
    longer = _config(lm, max_length, window)
    longer.check()
    params = dict(lm.params)
    for name, size in (("embeddings", max_length), ("decoder_embeddings", config.max_length)):
        if name in params:
            positions_PW = params[name]["positions"]
            params[name] = params[name] | {"positions": _repeat(positions_PW, size, config, longer)}
    layers = params["encoder"]["layers"]
    own = layers["attention"]
    own = own | {f"global_{name}": jax.tree.map(jnp.copy, own[name]) for name in ("query", "key", "value")}
    params["encoder"] = params["encoder"] | {"layers": layers | {"attention": own}}
    return dataclasses.replace(lm, config=longer, module=lm.module.clone(config=longer), params=params, origin=None)


def _config(lm: LM, max_length: int, window: int) -> ModelConfig:
    """Returns the config of the longer model."""
    changes: dict[str, Any] = {"max_length": max_length, "layer_kinds": ("local",), "window": window // 2 + 1}
    changes |= {"global_attention": True}
    if lm.tokenizer is not None:
        changes["separator_token"] = lm.tokenizer.sep
    if lm.config.structure == "encoder_decoder":  # the positions of LED have no offset
        changes |= {"decoder_max_length": lm.config.max_length, "position_offset": 0}
        changes |= {"decoder_layer_kinds": ("global",)}
    return dataclasses.replace(lm.config, **changes)


def _repeat(positions_PW: jax.Array, size: int, config: ModelConfig, longer: ModelConfig) -> jax.Array:
    """Returns the embeddings of `size` positions after those of the new offset."""
    offset = config.position_offset
    own_PW = positions_PW[offset:]
    repeated_PW = jnp.tile(own_PW, (-(-size // len(own_PW)), 1))[:size]
    return jnp.concatenate([positions_PW[: longer.position_offset], repeated_PW])
