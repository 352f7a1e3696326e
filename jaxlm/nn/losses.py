"""Losses. Each returns (sum, weight); both are added over micro-batches, devices and hosts, and divided once."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn.nodes import is_matrix, is_node

Sum = tuple[jax.Array, jax.Array]  # a sum over examples or tokens, and the weight to divide it by
Losses = tuple[dict[str, Sum], dict[str, jax.Array]]  # of a batch; and outputs for each example, for evaluation


def cross_entropy(
    logits_BTV: jax.Array, labels_BT: jax.Array, weights_BT: jax.Array, label_smoothing: float = 0.0
) -> Sum:
    """Returns the weighted sum of the negative log-likelihoods of the labels, in nats, and the sum of the weights.

    With label smoothing e, the target is 1 - e for the label, plus e spread evenly over the vocabulary (Szegedy et al.
    2016).
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    log_normaliser_BT = log_normaliser(logits_BTV)
    label_logit_BT = _label_logits(logits_BTV, labels_BT)
    loss_BT = log_normaliser_BT - label_logit_BT
    if label_smoothing:
        loss_BT += label_smoothing * (label_logit_BT - logits_BTV.mean(-1))
    return (loss_BT * weights_BT).sum(), weights_BT.sum()


@jax.custom_jvp
def log_normaliser(logits_BTV: jax.Array) -> jax.Array:
    """Returns `jax.nn.logsumexp` of float32 logits over the vocabulary.

    On a GPU it reads the logits once, with a running maximum (Milakov and Gimelshein 2018); XLA's two sums read them
    twice, which takes a tenth of the step of a small model.
    """
    return jax.lax.platform_dependent(logits_BTV, cuda=_log_normaliser_in_one_pass, default=_log_normaliser)


@log_normaliser.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (logits_BTV,), (tangent_BTV,) = primals, tangents
    result_BT = log_normaliser(logits_BTV)
    return result_BT, (jnp.exp(logits_BTV - result_BT[..., None]) * tangent_BTV).sum(-1)


def _log_normaliser(logits_BTV: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logits_BTV, axis=-1)


def _log_normaliser_in_one_pass(logits_BTV: jax.Array) -> jax.Array:
    def add(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        largest = jnp.maximum(a[0], b[0])
        return largest, a[1] * jnp.exp(a[0] - largest) + b[1] * jnp.exp(b[0] - largest)

    # The first maximum is finite, so that no difference of two infinities is computed.
    first = jnp.float32(jnp.finfo(jnp.float32).min), jnp.float32(0)
    largest_BT, sum_BT = jax.lax.reduce((logits_BTV, jnp.ones_like(logits_BTV)), first, add, (logits_BTV.ndim - 1,))
    return largest_BT + jnp.log(sum_BT)


def accuracy(logits_BTV: jax.Array, labels_BT: jax.Array, weights_BT: jax.Array) -> Sum:
    """Returns the weighted number of labels with the largest logit, and the sum of the weights."""
    label_logit_BT = _label_logits(logits_BTV, labels_BT)
    return ((label_logit_BT >= logits_BTV.max(-1)) * weights_BT).sum(), weights_BT.sum()


def bits_per_byte(nats: float, size: int) -> float:
    """Returns bits per byte of text, which is comparable across tokenizers.

    Args:
      nats: negative log-likelihood of the tokens of the text, without BOS and EOS, which have no bytes.
      size: number of bytes of the text in UTF-8.
    """
    return nats / math.log(2) / size


def chunked_cross_entropy(
    logits_of: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    x_BTD: jax.Array,
    labels_BT: jax.Array,
    weights_BT: jax.Array,
    label_smoothing: float = 0.0,
    parts: int = 1,
) -> tuple[Sum, Sum]:
    """Returns `cross_entropy` and `accuracy` of the logits `logits_of(params, x_BTD)`, computed in chunks.

    The chunks are computed one after the other, so that the logits are never all in memory. The forward pass computes
    the gradient of each chunk right after its loss, so that the backward pass recomputes no logits.

    Args:
      logits_of: a function that closes over no arrays.
      params: all parameters that `logits_of` reads.
      x_BTD: hidden states.
      labels_BT: labels.
      weights_BT: weights of the labels.
      label_smoothing: as in `cross_entropy`.
      parts: number of chunks along T.
    """
    split = partial(_split, parts)
    total, hits = _chunked_sums(logits_of, label_smoothing, params, *map(split, (x_BTD, labels_BT, weights_BT)))
    weight = weights_BT.sum()
    return (total, weight), (jax.lax.stop_gradient(hits), weight)


def token_log_probs(
    logits_of: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    x_BTD: jax.Array,
    labels_BT: jax.Array,
    parts: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of each label, float32 [B, T], in nats, and the most likely token, int32 [B, T].

    The logits are computed in chunks, one after the other, so that they are never all in memory. The backward pass
    recomputes them.

    Args:
      logits_of: a function from parameters and hidden states to logits, which closes over no arrays.
      params: all parameters that `logits_of` reads.
      x_BTD: hidden states.
      labels_BT: a token for each hidden state.
      parts: number of chunks along T.
    """

    def part(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, labels = inputs
        logits = logits_of(params, x).astype(jnp.float32)
        label_logit = _label_logits(logits, labels)
        return label_logit - log_normaliser(logits), jnp.argmax(logits, axis=-1).astype(jnp.int32)

    if parts == 1:
        return part((x_BTD, labels_BT))
    outputs = jax.lax.map(jax.checkpoint(part), (_split(parts, x_BTD), _split(parts, labels_BT)))
    B, T = labels_BT.shape
    log_probs_BT, best_BT = (jnp.moveaxis(x, 0, 2).reshape(B, -1)[:, :T] for x in outputs)
    return log_probs_BT, best_BT


def _split(parts: int, x_BT: jax.Array) -> jax.Array:
    """Returns [parts, B, T / parts, ...]: part i has positions i, i + parts, ...

    If the length is sharded, each device then has positions of every part.
    """
    B, T = x_BT.shape[:2]
    size = -(-T // parts)
    padded = jnp.pad(x_BT, [(0, 0), (0, size * parts - T)] + [(0, 0)] * (x_BT.ndim - 2))
    return jnp.moveaxis(padded.reshape(B, size, parts, *x_BT.shape[2:]), 2, 0)


def _label_logits(logits_BTV: jax.Array, labels_BT: jax.Array) -> jax.Array:
    """Returns the logit of each label [B, T].

    A comparison replaces indexing, because its gradient is a product and not a scatter: XLA computes it several times
    faster on CPU, and shards it without gathering the vocabulary.
    """
    is_label_BTV = labels_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
    return jnp.where(is_label_BTV, logits_BTV, 0).sum(-1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked_sums(logits_of: Any, smoothing: float, params: Any, x: Any, labels: Any, weights: Any) -> Any:
    """Returns the sums of the loss and of the hits over inputs [parts, B, T, ...]."""

    rounded = _rounded(params, x.dtype)

    def part(sums: Any, inputs: Any) -> Any:
        loss, hits = _part_loss(logits_of, smoothing, _like(rounded, params), *inputs)
        return (sums[0] + loss, sums[1] + hits), None

    return jax.lax.scan(part, (jnp.float32(0), jnp.float32(0)), (x, labels, weights))[0]


def _rounded(params: Any, dtype: Any) -> Any:
    """Returns the matrices of a head in a dtype in which it multiplies them; other parameters are not changed.

    Where a loop rounds them itself, it reads all of them in float32 in each iteration.
    """
    return jax.tree.map(lambda value: value.astype(dtype) if is_matrix(value) else value, params, is_leaf=is_node)


def _like(rounded: Any, params: Any) -> Any:
    """Returns rounded parameters in the dtype of the original ones, so that their gradients are not rounded.

    The compiler removes this conversion, and the one back to the rounded dtype where they are multiplied.
    """
    return jax.tree.map(lambda a, b: a.astype(b.dtype), rounded, params)


def _part_loss(logits_of: Any, smoothing: float, params: Any, x_BTD: Any, labels_BT: Any, weights_BT: Any) -> Any:
    logits_BTV = logits_of(params, x_BTD)
    loss = cross_entropy(logits_BTV, labels_BT, weights_BT, smoothing)[0]
    return loss, jax.lax.stop_gradient(accuracy(logits_BTV, labels_BT, weights_BT)[0])


def _chunked_sums_forward(logits_of: Any, smoothing: float, params: Any, x: Any, labels: Any, weights: Any) -> Any:
    rounded = _rounded(params, x.dtype)

    def part(carry: Any, inputs: Any) -> Any:
        x_BTD, *rest = inputs
        of_part = _like(rounded, params)
        loss_of = lambda params, x_BTD: _part_loss(logits_of, smoothing, params, x_BTD, *rest)
        loss, backward, hits = jax.vjp(loss_of, of_part, x_BTD, has_aux=True)
        by_params, by_x_BTD = backward(jnp.float32(1))
        total, all_hits, sums = carry
        return (total + loss, all_hits + hits, jax.tree.map(jnp.add, sums, by_params)), by_x_BTD

    first = jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    (total, hits, by_params), by_x = jax.lax.scan(part, first, (x, labels, weights))
    return (total, hits), (by_params, by_x)


def _chunked_sums_backward(logits_of: Any, smoothing: float, residuals: Any, gradients: Any) -> Any:
    by_params, by_x = jax.tree.map(lambda g: (g * gradients[0]).astype(g.dtype), residuals)
    return by_params, by_x, None, None


_chunked_sums.defvjp(_chunked_sums_forward, _chunked_sums_backward)


def binary_cross_entropy(
    logits_BEN: jax.Array, labels_BEN: jax.Array, weights_BE: jax.Array, positive_N: jax.Array | None = None
) -> Sum:
    """Returns the weighted sum over examples of the mean loss of N independent binary labels, and the weights' sum.

    Args:
      logits_BEN: logits.
      labels_BEN: 0 or 1.
      weights_BE: weights of the examples.
      positive_N: weight of each label if it is 1, like `pos_weight` of torch's BCEWithLogitsLoss; None: 1.
    """
    logits_BEN = logits_BEN.astype(jnp.float32)
    loss_BEN = jax.nn.softplus(logits_BEN) - labels_BEN * logits_BEN
    if positive_N is not None:
        loss_BEN *= jnp.where(labels_BEN > 0, positive_N, 1)
    return (loss_BEN.mean(-1) * weights_BE).sum(), weights_BE.sum()


def squared_error(values_BE: jax.Array, labels_BE: jax.Array, weights_BE: jax.Array) -> Sum:
    """Returns the weighted sum of squared differences, and the sum of the weights."""
    return ((values_BE.astype(jnp.float32) - labels_BE) ** 2 * weights_BE).sum(), weights_BE.sum()
