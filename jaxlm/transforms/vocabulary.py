"""Resizing of the vocabulary of a model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.errors import UserError
from jaxlm.lm import LM
from jaxlm.nn import nodes, parameters


def resize(lm: LM, size: int | None = None, target_size: int | None = None) -> LM:
    """Returns the model with another number of tokens: in the embeddings, the heads over tokens and their biases.

    Each new row is the mean of the old rows (Hewitt 2021), which changes the probabilities of the old tokens least.
    `resize_token_embeddings` of transformers samples around the same mean. A smaller size drops rows at the end.

    Args:
      lm: the model.
      size: the new number of tokens; None: that of the tokenizer.
      target_size: the new number of tokens of the decoder, where it has its own table; None: that of the target's
        tokenizer.

    Returns:
      A new model; `lm` is unchanged.

    Raises:
      UserError: for a size below 1 or, where the model has a tokenizer, below its number of tokens, for a target_size
        of a model with one table, and for a quantised table.

    Source: Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021.
    """
    config, has_target = lm.config, bool(lm.config.decoder_vocabulary)
    if target_size is not None and not has_target:
        raise UserError(f"target_size is {target_size}, but the model has one table of tokens; remove it")
    tokens, target_tokens = (lm.tokenizer.size, lm.tokenizer.target.size) if lm.tokenizer else (0, 0)
    for path, leaf in parameters.by_path(lm.params, whole_nodes=True).items():
        if nodes.is_node(leaf) and (row := parameters.find(path)) and "vocabulary" in row.axes:
            raise UserError(
                f"{path} is of the kind {type(leaf).__name__}; resize the original model, and then compress it"
            )
    rows = _size("size", size, tokens, config.vocabulary)
    target_rows = _size("target_size", target_size, target_tokens, config.V) if has_target else rows

    def resize_leaf(key_path: tuple[Any, ...], leaf: jax.Array, row: parameters.Parameter) -> jax.Array:
        if "vocabulary" not in row.axes:
            return leaf
        source = parameters.path_of(key_path) == "embeddings/tokens"
        return _resize_axis(leaf, row.axes.index("vocabulary"), rows if source else target_rows)

    params = jax.tree_util.tree_map_with_path(resize_leaf, lm.params, parameters.rows(lm.params))
    config = dataclasses.replace(config, vocabulary=rows, decoder_vocabulary=target_rows if has_target else None)
    module = lm.module.clone(config=config)
    return dataclasses.replace(lm, config=config, module=module, params=params)


def _size(name: str, given: int | None, tokens: int, rows: int) -> int:
    """Returns the valid number of rows; `tokens` is the size of the tokenizer, 0 without one."""
    if given is None:
        return tokens or rows
    if isinstance(given, bool) or not hasattr(given, "__index__") or given < max(1, tokens):
        minimum = f"{tokens}, the tokens of the tokenizer" if tokens else "1"
        raise UserError(f"{name} is {given!r}; it must be an integer, at least {minimum}")
    return int(given)


def _resize_axis(leaf: jax.Array, axis: int, rows: int) -> jax.Array:
    """Returns the array with `rows` entries along an axis: the first ones, then their mean."""
    count = leaf.shape[axis]
    if rows <= count:
        return jax.lax.slice_in_dim(leaf, 0, rows, axis=axis)
    mean = leaf.astype(jnp.float32).mean(axis, keepdims=True).astype(leaf.dtype)
    shape = (*leaf.shape[:axis], rows - count, *leaf.shape[axis + 1 :])
    return jnp.concatenate([leaf, jnp.broadcast_to(mean, shape)], axis)
