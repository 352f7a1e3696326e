"""Losses.  Each returns (sum, weight): sums are added over micro-batches, devices and hosts and divided once."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Sum = tuple[jax.Array, jax.Array]  # a sum over examples or tokens, and the weight to divide it by
Losses = tuple[dict[str, Sum], dict[str, jax.Array]]  # of a batch; and what is kept of its examples, in evaluation


def cross_entropy(
    logits_BTV: jax.Array, labels_BT: jax.Array, weights_BT: jax.Array, label_smoothing: float = 0.0
) -> Sum:
    """Negative log-likelihood of the labels in nats, summed with weights, and the sum of the weights.

    With smoothing e the target is 1 - e on the label plus e spread evenly over the vocabulary (Szegedy et al. 2016).

    The label's logit is found by comparison, not by indexing: its gradient is then a product, not a scatter, which
    XLA runs several times faster on CPU and shards without gathering the vocabulary.
    """
    V = logits_BTV.shape[-1]
    logits_BTV = logits_BTV.astype(jnp.float32)
    log_normaliser_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    is_label_BTV = labels_BT[..., None] == jnp.arange(V)
    label_logit_BT = jnp.where(is_label_BTV, logits_BTV, 0).sum(-1)
    loss_BT = log_normaliser_BT - label_logit_BT
    if label_smoothing:
        loss_BT += label_smoothing * (label_logit_BT - logits_BTV.mean(-1))
    return (loss_BT * weights_BT).sum(), weights_BT.sum()


def accuracy(logits_BTV: jax.Array, labels_BT: jax.Array, weights_BT: jax.Array) -> Sum:
    """Weighted number of labels whose logit no other exceeds, and the sum of the weights."""
    is_label_BTV = labels_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
    label_logit_BT = jnp.where(is_label_BTV, logits_BTV, 0).sum(-1)
    return ((label_logit_BT >= logits_BTV.max(-1)) * weights_BT).sum(), weights_BT.sum()


def binary_cross_entropy(logits_BEN: jax.Array, labels_BEN: jax.Array, weights_BE: jax.Array) -> Sum:
    """Negative log-likelihood in nats of N independent yes-or-no labels (0 or 1), their mean for each example."""
    logits_BEN = logits_BEN.astype(jnp.float32)
    loss_BEN = jax.nn.softplus(logits_BEN) - labels_BEN * logits_BEN
    return (loss_BEN.mean(-1) * weights_BE).sum(), weights_BE.sum()


def squared_error(values_BE: jax.Array, labels_BE: jax.Array, weights_BE: jax.Array) -> Sum:
    """Square of the difference, summed with weights, and the sum of the weights."""
    return ((values_BE.astype(jnp.float32) - labels_BE) ** 2 * weights_BE).sum(), weights_BE.sum()
