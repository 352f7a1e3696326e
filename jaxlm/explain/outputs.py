"""The outputs of a model as functions of word embeddings, or of the hidden states of a layer.

`GivenWords` takes the place of the token embeddings in the parameters. So the model itself runs unchanged, with its
positions, norms and tied heads, and gradients with respect to the embeddings are those of `jax.grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.lm import LM, Output
from jaxlm.nn import nodes
from jaxlm.nn.block import Block
from jaxlm.nn.transformer import apply

_NEVER = -1e30  # logit of a place that is not in the row


@nodes.node
class GivenWords(nodes.Node):
    """The token embeddings of a model whose rows are given, whatever the ids of the tokens are."""

    table: Any  # the token embeddings [V, W], which tied heads read
    words: jax.Array  # [B, T, W]

    def materialize(self) -> jax.Array:
        """Returns the table."""
        return nodes.dense(self.table)

    def rows(self, ids: jax.Array) -> jax.Array:
        """Returns the given embeddings."""
        return self.words

    def axes(self, axes: nodes.Axes, inputs: int) -> dict[str, tuple[nodes.Axes, int]]:
        """Returns the axes of the table; the words are not sharded."""
        return {"table": (axes, inputs), "words": ((None, None, None), 0)}


class Rows(NamedTuple):
    """Rows of tokens; the last fields belong to the decoder of an encoder-decoder.

    Attributes:
      tokens_BT: token ids.
      segments_BT: 1 for tokens, 0 for padding after them.
      types_BT: token types.
      target_tokens_BU: token ids of the decoder; None for other models.
      target_segments_BU: their segments.
    """

    tokens_BT: jax.Array
    segments_BT: jax.Array
    types_BT: jax.Array
    target_tokens_BU: jax.Array | None = None
    target_segments_BU: jax.Array | None = None


def words_of(params: Any, rows: Rows) -> jax.Array:
    """Returns the word embeddings [B, T + U, W] of rows, in float32."""
    words = nodes.rows(params["embeddings"]["tokens"], rows.tokens_BT).astype(jnp.float32)
    if rows.target_tokens_BU is None:
        return words
    target = nodes.rows(_decoder_part(params)["tokens"], rows.target_tokens_BU)
    return jnp.concatenate([words, target.astype(jnp.float32)], 1)


def _decoder_part(params: Any) -> Any:
    """Returns the embeddings of the decoder, which may be those of the encoder."""
    own = params.get("decoder_embeddings", {})
    return own if "tokens" in own else params["embeddings"]


def _with_words(params: Any, name: str, words_BTW: jax.Array) -> Any:
    part = params[name]
    return {**params, name: {**part, "tokens": GivenWords(part["tokens"], words_BTW)}}


def outputs_of(lm: LM, params: Any, words_BTW: jax.Array, rows: Rows) -> Output:
    """Returns the outputs of the model for word embeddings; a pure function.

    Args:
      lm: the model; its own parameters are not read.
      params: the parameters.
      words_BTW: the embeddings of the tokens of the rows, [B, T + U, W].
      rows: the rows, whose tokens define positions and padding.

    Returns:
      The outputs. In an encoder-decoder, the logits are those of the head lm.
    """
    T = rows.tokens_BT.shape[1]
    given = _with_words(params, "embeddings", words_BTW[:, :T])
    inputs = rows.tokens_BT, rows.segments_BT, rows.types_BT
    if rows.target_tokens_BU is None:
        return lm.apply(given, *inputs)
    tokens, segments, types = inputs
    context_BSD = apply(lm.module, given, tokens, segments, None, types, method="encode")
    shared = _decoder_part(params) is params["embeddings"]
    given = _with_words(params, "embeddings" if shared else "decoder_embeddings", words_BTW[:, T:])
    decoder = rows.target_tokens_BU, rows.target_segments_BU
    context = {"context_BSD": context_BSD, "context_segments_BS": segments}
    x_BTD = apply(lm.module, given, *decoder, method="decode", **context)
    return Output(apply(lm.module, params, x_BTD, method="lm"), x_BTD)


@contextmanager
def layer_outputs(layer: int, change: Callable[[jax.Array], jax.Array]) -> Iterator[None]:
    """Replaces the output of a layer while a model with separate layers (`unstack_layers`) is traced.

    Args:
      layer: the layer, counted from 0.
      change: a function from the hidden states [B, T, D] after the layer to their replacement.
    """

    def intercept(next_function: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        result = next_function(*args, **kwargs)
        is_layer = isinstance(context.module, Block) and context.method_name == "__call__" and args[1] == layer
        return (change(result[0]), *result[1:]) if is_layer else result

    with nn.intercept_methods(intercept):
        yield


def remove_tokens(words_BTW: jax.Array, rows: Rows, keep_BT: jax.Array) -> tuple[jax.Array, Rows, jax.Array]:
    """Returns words and rows without the tokens that are not kept, and the new place of each old token.

    Args:
      words_BTW: word embeddings [B, T + U, W].
      rows: the rows.
      keep_BT: False for tokens to remove, [B, T + U].

    Returns:
      The words; the rows; for each old place [B, T + U] its place in its own row, or that of the last kept token
      before it.
    """
    T = rows.tokens_BT.shape[1]
    sides = [(rows.tokens_BT, rows.segments_BT, slice(None, T))]
    if rows.target_tokens_BU is not None:
        assert rows.target_segments_BU is not None
        sides.append((rows.target_tokens_BU, rows.target_segments_BU, slice(T, None)))
    words, places, new = [], [], []
    for tokens_BT, segments_BT, span in sides:
        kept_BT = keep_BT[:, span] & (segments_BT > 0)
        order_BT = jnp.argsort(~kept_BT, axis=1, stable=True)
        words.append(jnp.take_along_axis(words_BTW[:, span], order_BT[..., None], 1))
        places.append(jnp.maximum(jnp.cumsum(kept_BT, 1) - 1, 0))
        new.append(jnp.take_along_axis(jnp.broadcast_to(tokens_BT, order_BT.shape), order_BT, 1))
        new.append((jnp.arange(order_BT.shape[1]) < kept_BT.sum(1, keepdims=True)).astype(jnp.int32))
        if len(new) == 2:
            types_BT = jnp.broadcast_to(rows.types_BT, order_BT.shape)
            new.append(jnp.take_along_axis(types_BT, order_BT, 1))
    return jnp.concatenate(words, 1), Rows(*new), jnp.concatenate(places, 1)


def at_old_places(lm: LM, output: Output, place_BT: jax.Array, keep_BT: jax.Array) -> Output:
    """Returns outputs whose hidden states and logits by token are at the places of the old rows, after `remove_tokens`.

    Logits of the head span are those of no answer at the places of tokens that are not in the row.
    """
    head, logits = next(iter(lm.config.heads_on_top), None), output.logits
    place_BT, keep_BT = (x_BT[:, -output.hidden_BTD.shape[1] :] for x_BT in (place_BT, keep_BT))
    output = output._replace(hidden_BTD=jnp.take_along_axis(output.hidden_BTD, place_BT[..., None], 1))
    if logits is None or head not in ("tokens", "span", "lm", "masked_lm", "replaced"):
        return output
    place = place_BT[..., None] if logits.ndim == 3 else place_BT
    logits = jnp.take_along_axis(logits, place, 1)
    if head == "span":
        logits = jnp.where(keep_BT[..., None], logits, _NEVER)
    return output._replace(logits=logits)
