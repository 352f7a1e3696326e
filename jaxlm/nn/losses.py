"""Losses.  Each returns (sum, weight): sums are added over micro-batches, devices and hosts and divided once."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Sum = tuple[jax.Array, jax.Array]  # a sum over examples or tokens, and the weight to divide it by
Losses = tuple[dict[str, Sum], dict[str, jax.Array]]  # of a batch; and what is kept of its examples, in evaluation


def cross_entropy(
    logits_BTV: jax.Array, labels_BT: jax.Array, weights_BT: jax.Array, label_smoothing: float = 0.0
) -> Sum:
    """Negative log-likelihood of the labels in nats, summed with weights, and the sum of the weights.

    With smoothing e the target is 1 - e on the label plus e spread evenly over the vocabulary (Szegedy et al. 2016).
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    log_normaliser_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    label_logit_BT = _label_logits(logits_BTV, labels_BT)
    loss_BT = log_normaliser_BT - label_logit_BT
    if label_smoothing:
        loss_BT += label_smoothing * (label_logit_BT - logits_BTV.mean(-1))
    return (loss_BT * weights_BT).sum(), weights_BT.sum()


def accuracy(logits_BTV: jax.Array, labels_BT: jax.Array, weights_BT: jax.Array) -> Sum:
    """Weighted number of labels whose logit no other exceeds, and the sum of the weights."""
    label_logit_BT = _label_logits(logits_BTV, labels_BT)
    return ((label_logit_BT >= logits_BTV.max(-1)) * weights_BT).sum(), weights_BT.sum()


def bits_per_byte(nats: float, size: int) -> float:
    """Returns the bits that a model needs for a byte of a text, which compares across tokenizers.

    nats: negative log-likelihood of the text's own tokens.  BOS and EOS around a document have no bytes, and what they
    cost is no part of it.  size: bytes of the text in UTF-8.
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
    """`cross_entropy` and `accuracy` of the logits `logits_of(params, x_BTD)`, which are never in memory as a whole.

    They are computed in so many parts of T, one after the other, and where there is a gradient, that of each part
    right behind its loss: the backward pass finds it made, and computes no logits anew.

    logits_of: a function that closes over no arrays.  params: all that it reads.
    """
    apart = partial(_apart, parts)
    total, hits = _summed(logits_of, label_smoothing, params, *map(apart, (x_BTD, labels_BT, weights_BT)))
    weight = weights_BT.sum()
    return (total, weight), (jax.lax.stop_gradient(hits), weight)


def token_log_probs(
    logits_of: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    x_BTD: jax.Array,
    labels_BT: jax.Array,
    parts: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of each label, float32 [B, T], in nats, and the likeliest token, int32 [B, T].

    The logits `logits_of(params, x_BTD)` are never in memory as a whole: they are computed in so many parts of T, one
    after the other, and the backward pass computes those of each part again.

    Args:
      logits_of: a function that closes over no arrays.
      params: all that it reads.
      x_BTD: hidden states.
      labels_BT: a token for each of them.
      parts: number of parts.
    """

    def part(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, labels = inputs
        logits = logits_of(params, x).astype(jnp.float32)
        label_logit = _label_logits(logits, labels)
        return label_logit - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1).astype(jnp.int32)

    if parts == 1:
        return part((x_BTD, labels_BT))
    found = jax.lax.map(jax.checkpoint(part), (_apart(parts, x_BTD), _apart(parts, labels_BT)))
    B, T = labels_BT.shape
    log_BT, likeliest_BT = (jnp.moveaxis(x, 0, 2).reshape(B, -1)[:, :T] for x in found)
    return log_BT, likeliest_BT


def _apart(parts: int, x_BT: jax.Array) -> jax.Array:
    """[parts, B, T / parts, ...]: part i has every parts-th position, so that where the length is split over devices
    each has some of every part."""
    B, T = x_BT.shape[:2]
    size = -(-T // parts)
    filled = jnp.pad(x_BT, [(0, 0), (0, size * parts - T)] + [(0, 0)] * (x_BT.ndim - 2))
    return jnp.moveaxis(filled.reshape(B, size, parts, *x_BT.shape[2:]), 2, 0)


def _label_logits(logits_BTV: jax.Array, labels_BT: jax.Array) -> jax.Array:
    """The logit of each label [B, T].

    It is found by comparison, not by indexing: its gradient is then a product, not a scatter, which XLA runs several
    times faster on CPU and shards without gathering the vocabulary.
    """
    is_label_BTV = labels_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
    return jnp.where(is_label_BTV, logits_BTV, 0).sum(-1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(logits_of: Any, smoothing: float, params: Any, x: Any, labels: Any, weights: Any) -> Any:
    """The sums over all parts [parts, B, T, ...] of the loss and of the hits."""

    def part(sums: Any, inputs: Any) -> Any:
        loss, hits = _of_part(logits_of, smoothing, params, *inputs)
        return (sums[0] + loss, sums[1] + hits), None

    return jax.lax.scan(part, (jnp.float32(0), jnp.float32(0)), (x, labels, weights))[0]


def _of_part(logits_of: Any, smoothing: float, params: Any, x_BTD: Any, labels_BT: Any, weights_BT: Any) -> Any:
    logits_BTV = logits_of(params, x_BTD)
    loss = cross_entropy(logits_BTV, labels_BT, weights_BT, smoothing)[0]
    return loss, jax.lax.stop_gradient(accuracy(logits_BTV, labels_BT, weights_BT)[0])


def _summed_forward(logits_of: Any, smoothing: float, params: Any, x: Any, labels: Any, weights: Any) -> Any:
    def part(carry: Any, inputs: Any) -> Any:
        x_BTD, *rest = inputs
        loss_of = lambda params, x_BTD: _of_part(logits_of, smoothing, params, x_BTD, *rest)
        loss, pull, hits = jax.vjp(loss_of, params, x_BTD, has_aux=True)
        by_params, by_x_BTD = pull(jnp.float32(1))
        total, all_hits, sums = carry
        return (total + loss, all_hits + hits, jax.tree.map(jnp.add, sums, by_params)), by_x_BTD

    first = jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    (total, hits, by_params), by_x = jax.lax.scan(part, first, (x, labels, weights))
    return (total, hits), (by_params, by_x)


def _summed_backward(logits_of: Any, smoothing: float, kept: Any, given: Any) -> Any:
    by_params, by_x = jax.tree.map(lambda g: (g * given[0]).astype(g.dtype), kept)
    return by_params, by_x, None, None


_summed.defvjp(_summed_forward, _summed_backward)


def binary_cross_entropy(
    logits_BEN: jax.Array, labels_BEN: jax.Array, weights_BE: jax.Array, positive_N: jax.Array | None = None
) -> Sum:
    """Negative log-likelihood in nats of N independent yes-or-no labels (0 or 1), their mean for each example.

    positive_N: weight of each label where it is 1, as `pos_weight` of torch's BCEWithLogitsLoss; None: 1.
    """
    logits_BEN = logits_BEN.astype(jnp.float32)
    loss_BEN = jax.nn.softplus(logits_BEN) - labels_BEN * logits_BEN
    if positive_N is not None:
        loss_BEN *= jnp.where(labels_BEN > 0, positive_N, 1)
    return (loss_BEN.mean(-1) * weights_BE).sum(), weights_BE.sum()


def squared_error(values_BE: jax.Array, labels_BE: jax.Array, weights_BE: jax.Array) -> Sum:
    """Square of the difference, summed with weights, and the sum of the weights."""
    return ((values_BE.astype(jnp.float32) - labels_BE) ** 2 * weights_BE).sum(), weights_BE.sum()
