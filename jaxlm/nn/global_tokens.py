"""The tokens of an example with global attention (Beltagy et al. 2020, section 3.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.config.model_checks import NO_SEPARATOR
from jaxlm.errors import UserError

NO_PROJECTIONS = (
    "global_BT is given, but the model has no projections for tokens with global attention "
    "(model.global_attention is False); leave it out, or use a Longformer"
)


def global_tokens(tokens_BT: jax.Array, segments_BT: jax.Array | None, config: ModelConfig) -> jax.Array | None:
    """Returns which tokens have global attention by `config.global_rule` [B, T]; None: there are none.

    Args:
      tokens_BT: token ids; the rule "first" reads only their shape.
      segments_BT: number of each token's example in the row, from 1; 0 for padding. None: each row is one example.
      config: the model's config.

    Returns:
      For "first", the first token of each example. For "question", the tokens of an example before its first separator,
      if it has one. B is 1 if all rows are equal.

    Raises:
      UserError: for "question", if the config names no separator.
    """
    rule = config.global_rule
    if rule == "none":
        return None
    if segments_BT is None:
        segments_BT = jnp.ones((1, tokens_BT.shape[1]), jnp.int32)
    is_first_BT = jnp.diff(segments_BT, axis=1, prepend=0) != 0
    if rule == "first":
        return is_first_BT & (segments_BT > 0)
    if config.separator_token is None:
        raise UserError(NO_SEPARATOR)
    is_last_BT = jnp.diff(segments_BT, axis=1, append=0) != 0
    is_separator_BT = tokens_BT == config.separator_token
    # The number of separators of the row up to each token, and before and up to the end of its example.
    count_BT = jnp.cumsum(is_separator_BT, axis=1)
    before_BT = jax.lax.cummax(jnp.where(is_first_BT, count_BT - is_separator_BT, 0), axis=1)
    end_BT = jax.lax.cummin(jnp.where(is_last_BT, count_BT, tokens_BT.shape[1]), axis=1, reverse=True)
    return (count_BT == before_BT) & (before_BT < end_BT) & (segments_BT > 0)
