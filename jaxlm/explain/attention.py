"""Attention weights of every layer and head, and how they combine over the layers: rollout and flow."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxlm.config.ranges import check_argument
from jaxlm.errors import UserError
from jaxlm.explain.examples import Example, head_of, read_example
from jaxlm.explain.targets import Choice, choose_targets
from jaxlm.lm import LM
from jaxlm.nn.layer_parts import parts_of

MAX_FLOW_TOKENS = 128  # the flow to one token takes minutes for more
_UNITS = 1_000_000  # capacities of the flow are integers

WITH_WEIGHTS = ("attention", "latent")  # mixers that return attention weights


class AttentionWeights(NamedTuple):
    """The attention weights of a stack for one text.

    Attributes:
      name: encoder, decoder or cross-attention.
      layers: number of each of the L layers with attention, from 0.
      weights_LHTS: weights from token t to token s.
      written: pieces of the T tokens.
      read: pieces of the S tokens.
    """

    name: str
    layers: tuple[int, ...]
    weights_LHTS: np.ndarray
    written: tuple[str, ...]
    read: tuple[str, ...]


def attention_weights(
    lm: LM, text: Any, *, target: str | None = None, new_tokens: int = 1, task: Any = None
) -> tuple[AttentionWeights, ...]:
    """Returns the attention weights of every layer and head for a text.

    Args:
      lm: the model.
      text: a text, or what `jaxlm.predict` accepts as an example.
      target: for an encoder-decoder, the text that its decoder writes; None: the text that it generates. For a
        decoder, a text that follows the prompt.
      new_tokens: for an encoder-decoder without a target, the number of tokens to generate.
      task: the config of a task; None: that of the model.

    Returns:
      The weights of the encoder, or of the decoder; for an encoder-decoder those of the encoder, of the decoder and of
      the decoder over the encoder.

    Raises:
      UserError: for a model without attention, and a text that the model cannot read as a whole.
    """
    check_attention(lm)
    example = read_example(lm, text, task)
    if example.source is not None or (target is not None and head_of(lm) == "lm"):
        example, _ = choose_targets(lm, example, text, Choice(target, None, new_tokens))
    return weights_of(lm, example)


def check_attention(lm: LM, layer: int | None = None, head: int | None = None) -> None:
    """Raises UserError for a model without attention, and for a layer or a head that does not exist."""
    layers = attention_layers(lm)
    if not layers:
        mixers = ", ".join(dict.fromkeys(lm.config.mixer_pattern))
        raise UserError(
            f"the layers of the model have the mixer {mixers}, which has no attention weights; use attribution"
        )
    for name, value, known in (("layer", layer, layers), ("head", head, tuple(range(lm.config.heads)))):
        if check_argument(name, value, int | None) is not None and value not in known:
            gaps = len(known) <= known[-1] - known[0]
            which = ", ".join(map(str, known)) if gaps else f"{known[0]} to {known[-1]}"
            raise UserError(f"{name} is {value}; the model has attention in the {name}s {which}")


def attention_layers(lm: LM) -> tuple[int, ...]:
    """Returns the numbers of the layers of the first stack that have attention."""
    return tuple(n for n, own in enumerate(parts_of(lm.config)) if own.mixer in WITH_WEIGHTS)


def weights_of(lm: LM, example: Example) -> tuple[AttentionWeights, ...]:
    """Returns the attention weights of every layer and head for an example."""
    source = len(example.tokens_T) if example.source is None else example.source
    named: dict[str, Any] = {"types_BT": example.types_T[None, :source], "attentions": True}
    if example.source is not None:
        named["target_tokens_BT"] = example.tokens_T[None, source:]
    output = lm(jnp.asarray(example.tokens_T[None, :source]), **named)
    read, written = example.pieces[:source], example.pieces[source:]
    layers = attention_layers(lm)
    found = []
    for name, stack in (("encoder", output.encoder), ("decoder", output.decoder)):
        if stack is None or stack.attention_LBHTS is None:
            continue
        own = written if example.source is not None and name == "decoder" else read
        numbers = layers if own is read else tuple(range(len(stack.attention_LBHTS)))
        found.append(AttentionWeights(name, numbers, np.asarray(stack.attention_LBHTS[:, 0], np.float32), own, own))
    if output.decoder is not None and output.decoder.cross_attention_LBHTS is not None:
        weights = np.asarray(output.decoder.cross_attention_LBHTS[:, 0], np.float32)
        found.append(AttentionWeights("cross-attention", tuple(range(len(weights))), weights, written, read))
    return tuple(found)


def with_residual(weights_LHTS: np.ndarray) -> np.ndarray:
    """Returns the mean over the heads [L, T, T], averaged with the identity for the residual connection.

    Rows have the sum 1 (Abnar & Zuidema 2020, section 3).
    """
    mean_LTS = weights_LHTS.mean(1, dtype=np.float64)
    mixed_LTS = 0.5 * mean_LTS + 0.5 * np.eye(mean_LTS.shape[-1])
    return mixed_LTS / mixed_LTS.sum(-1, keepdims=True)


def rollout(weights_LHTS: np.ndarray) -> np.ndarray:
    """Returns how much of each token of the text is in each hidden state of the last layer: [T, T], rows sum to 1.

    The weights of the layers, with their residual connections, are multiplied (Abnar & Zuidema 2020, equation 1).

    Args:
      weights_LHTS: self-attention weights of the layers, the first layer first.
    """
    total_TS = np.eye(weights_LHTS.shape[-1])
    for layer_TS in with_residual(weights_LHTS):
        total_TS = layer_TS @ total_TS
    return total_TS


def cross_rollout(own_LHTT: np.ndarray, cross_LHTS: np.ndarray, encoder_SS: np.ndarray) -> np.ndarray:
    """Returns how much of each token is in each hidden state of the last layer of a decoder: [T, T + S].

    The first T columns are the tokens of the decoder, the others those of the encoder. Each layer adds self-attention,
    then cross-attention, each averaged with the identity for its residual connection. Rows sum to 1.

    Args:
      own_LHTT: self-attention weights of the decoder.
      cross_LHTS: its attention weights over the encoder.
      encoder_SS: the rollout of the encoder.
    """
    T, S = cross_LHTS.shape[2:]
    total_TX = np.eye(T, T + S)
    context_SX = np.concatenate([np.zeros((S, T)), encoder_SS], 1)
    for own_TT, cross_TS in zip(with_residual(own_LHTT), cross_LHTS.mean(1, dtype=np.float64)):
        total_TX = own_TT @ total_TX
        total_TX = 0.5 * total_TX + 0.5 * (cross_TS @ context_SX)
    return total_TX


def flow(weights_LHTS: np.ndarray, token: int) -> np.ndarray:
    """Returns the maximum flow [T] from each token of the text to one hidden state of the last layer.

    Attention weights, with their residual connections, are the capacities of a network of L + 1 layers of T nodes
    (Abnar & Zuidema 2020, section 3). Capacities are rounded to multiples of 1e-6.

    Args:
      weights_LHTS: self-attention weights of the layers, the first layer first.
      token: the place of the hidden state.

    Raises:
      UserError: for a text that is too long.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import maximum_flow

    L, _, T, _ = weights_LHTS.shape
    if T > MAX_FLOW_TOKENS:
        raise UserError(f"the text has {T} tokens, and attention flow is limited to {MAX_FLOW_TOKENS}; use rollout")
    capacities_LTS = np.round(with_residual(weights_LHTS) * _UNITS).astype(np.int32)
    layer_N, t_N, s_N = np.nonzero(capacities_LTS)
    # The node of token t after n layers is n T + t; edges lead from the last layer to the text.
    edges = capacities_LTS[layer_N, t_N, s_N], ((layer_N + 1) * T + t_N, layer_N * T + s_N)
    size = (L + 1) * T
    graph = coo_array(edges, shape=(size, size)).tocsr()
    value = lambda s: maximum_flow(graph, L * T + token, s).flow_value / _UNITS
    return np.array([value(s) for s in range(T)])
