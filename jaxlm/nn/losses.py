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
    part_loss = partial(_part_loss, logits_of, label_smoothing)
    x, labels, weights = (_split(parts, array) for array in (x_BTD, labels_BT, weights_BT))
    total, hits = _chunked_sums(part_loss, params, (), x, (labels, weights))
    weight = weights_BT.sum()
    return (total, weight), (jax.lax.stop_gradient(hits), weight)


def divergence(
    logits_BTV: jax.Array, teacher_logits_BTV: jax.Array, weights_BT: jax.Array, temperature: float = 1.0
) -> Sum:
    """Returns the weighted sum of KL(teacher || student) times the squared temperature, and the sum of the weights.

    Both distributions are softmaxes of the logits divided by the temperature. The square keeps the size of the
    gradient (Hinton et al. 2015, section 2).
    """
    log_q_BTV, log_p_BTV = (
        jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (logits_BTV, teacher_logits_BTV)
    )
    loss_BT = (jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV)).sum(-1)
    return temperature**2 * (loss_BT * weights_BT).sum(), weights_BT.sum()


def chunked_divergence(
    logits_of: Callable[[Any, jax.Array], jax.Array],
    teacher_logits_of: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    teacher_params: Any,
    x_BTD: jax.Array,
    teacher_x_BTD: jax.Array,
    weights_BT: jax.Array,
    temperature: float = 1.0,
    parts: int = 1,
) -> Sum:
    """Returns `divergence` of the logits of two heads, computed in chunks as in `chunked_cross_entropy`.

    Args:
      logits_of: the head of the student, a function that closes over no arrays.
      teacher_logits_of: the head of the teacher.
      params: all parameters that `logits_of` reads.
      teacher_params: all parameters that `teacher_logits_of` reads; they have no gradient.
      x_BTD: hidden states of the student.
      teacher_x_BTD: those of the teacher, which may have another width; they have no gradient.
      weights_BT: weights of the positions.
      temperature: as in `divergence`.
      parts: number of chunks along T.
    """
    part_loss = partial(_part_divergence, logits_of, teacher_logits_of, temperature)
    x, teacher_x, weights = (_split(parts, array) for array in (x_BTD, teacher_x_BTD, weights_BT))
    constants = _rounded(teacher_params, x_BTD.dtype)
    return _chunked_sums(part_loss, params, constants, x, (teacher_x, weights))[0], weights_BT.sum()


def top_log_probs(
    logits_of: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    x_BTD: jax.Array,
    top: int,
    temperature: float = 1.0,
    parts: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Returns the most likely tokens K, and their log-probabilities J = K + 1, the last of all other tokens together.

    The logits are computed in chunks, one after the other, so that they are never all in memory.

    Args:
      logits_of: a function from parameters and hidden states to logits, which closes over no arrays.
      params: all parameters that `logits_of` reads.
      x_BTD: hidden states.
      top: number of tokens K; at most all but one of the vocabulary.
      temperature: the divisor of the logits.
      parts: number of chunks along T.

    Returns:
      Ids [B, T, K], uint16 if the vocabulary has at most 65,536 tokens, else int32; and float16 [B, T, J].
    """

    def part(x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BTV = logits_of(params, x_BTD).astype(jnp.float32) / temperature
        logits_BTK, ids_BTK = jax.lax.top_k(logits_BTV, min(top, logits_BTV.shape[-1] - 1))
        others_BTV = jnp.put_along_axis(logits_BTV, ids_BTK, -jnp.inf, axis=-1, inplace=False)
        others_BT1 = jax.nn.logsumexp(others_BTV, axis=-1, keepdims=True)
        log_probs_BTJ = jax.nn.log_softmax(jnp.concatenate([logits_BTK, others_BT1], -1))
        dtype = jnp.uint16 if logits_BTV.shape[-1] <= 1 << 16 else jnp.int32
        return ids_BTK.astype(dtype), jnp.maximum(log_probs_BTJ, jnp.finfo(jnp.float16).min).astype(jnp.float16)

    if parts == 1:
        return part(x_BTD)
    ids_BTK, log_probs_BTJ = (_join(x, x_BTD.shape[1]) for x in jax.lax.map(part, _split(parts, x_BTD)))
    return ids_BTK, log_probs_BTJ


def top_divergence(
    logits_BTV: jax.Array, ids_BTK: jax.Array, log_probs_BTJ: jax.Array, weights_BT: jax.Array, temperature: float = 1.0
) -> Sum:
    """Returns `divergence` from a teacher that gives only its most likely tokens.

    All other tokens of both models count as one. So the loss is at most the divergence of the whole distributions, and
    it is 0 where they are equal. If the probabilities of the top tokens were divided by their sum, they would be a
    biased estimate of those of the teacher (Anshumann et al. 2025, "Sparse Logit Sampling").

    Args:
      logits_BTV: logits of the student.
      ids_BTK: the most likely tokens of the teacher.
      log_probs_BTJ: their log-probabilities at this temperature, and that of all other tokens, as `top_log_probs`
        returns them.
      weights_BT: weights of the positions.
      temperature: the divisor of the logits of the student.
    """
    logits_BTV = logits_BTV.astype(jnp.float32) / temperature
    log_p_BTJ = jax.nn.log_softmax(log_probs_BTJ.astype(jnp.float32))  # stored values are rounded
    # Constants are scattered over the vocabulary, because the gradient of a gather of the logits would be a scatter.
    unknown_BTV = jnp.full(logits_BTV.shape, -jnp.inf)
    log_p_BTV = jnp.put_along_axis(unknown_BTV, ids_BTK.astype(jnp.int32), log_p_BTJ[..., :-1], axis=-1, inplace=False)
    is_top_BTV = log_p_BTV > -jnp.inf
    log_normaliser_BT = log_normaliser(logits_BTV)
    log_q_BTV = logits_BTV - log_normaliser_BT[..., None]
    log_p_BTV = jnp.where(is_top_BTV, log_p_BTV, 0)
    loss_BT = jnp.where(is_top_BTV, jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV), 0).sum(-1)
    log_p_other_BT = log_p_BTJ[..., -1]
    log_q_other_BT = jax.nn.logsumexp(jnp.where(is_top_BTV, -jnp.inf, logits_BTV), axis=-1) - log_normaliser_BT
    loss_BT += jnp.exp(log_p_other_BT) * (log_p_other_BT - log_q_other_BT)
    return temperature**2 * (loss_BT * weights_BT).sum(), weights_BT.sum()


def chunked_top_divergence(
    logits_of: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    x_BTD: jax.Array,
    ids_BTK: jax.Array,
    log_probs_BTJ: jax.Array,
    weights_BT: jax.Array,
    temperature: float = 1.0,
    parts: int = 1,
) -> Sum:
    """Returns `top_divergence` of the logits `logits_of(params, x_BTD)`, in chunks as in `chunked_cross_entropy`."""
    part_loss = partial(_part_top_divergence, logits_of, temperature)
    x, *arrays = (_split(parts, array) for array in (x_BTD, ids_BTK, log_probs_BTJ, weights_BT))
    return _chunked_sums(part_loss, params, (), x, tuple(arrays))[0], weights_BT.sum()


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
    log_probs_BT, best_BT = (_join(x, labels_BT.shape[1]) for x in outputs)
    return log_probs_BT, best_BT


def _split(parts: int, x_BT: jax.Array) -> jax.Array:
    """Returns [parts, B, T / parts, ...]: part i has positions i, i + parts, ...

    If the length is sharded, each device then has positions of every part.
    """
    B, T = x_BT.shape[:2]
    size = -(-T // parts)
    padded = jnp.pad(x_BT, [(0, 0), (0, size * parts - T)] + [(0, 0)] * (x_BT.ndim - 2))
    return jnp.moveaxis(padded.reshape(B, size, parts, *x_BT.shape[2:]), 2, 0)


def _join(x: jax.Array, T: int) -> jax.Array:
    """Returns [B, T, ...] from the parts of `_split`."""
    merged = jnp.moveaxis(x, 0, 2)
    return merged.reshape(len(merged), -1, *merged.shape[3:])[:, :T]


def _label_logits(logits_BTV: jax.Array, labels_BT: jax.Array) -> jax.Array:
    """Returns the logit of each label [B, T].

    A comparison replaces indexing, because its gradient is a product and not a scatter: XLA computes it several times
    faster on CPU, and shards it without gathering the vocabulary.
    """
    is_label_BTV = labels_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
    return jnp.where(is_label_BTV, logits_BTV, 0).sum(-1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_sums(part_loss: Any, params: Any, constants: Any, x: Any, arrays: Any) -> Any:
    """Returns the sums of a loss and of a second value, without a gradient, over inputs [parts, B, T, ...].

    Args:
      part_loss: (params, constants, x [B, T, D], *arrays [B, T, ...]) -> both sums over a part.
      params: parameters.
      constants: parameters without a gradient.
      x: hidden states.
      arrays: further inputs, without a gradient.
    """
    rounded = _rounded(params, x.dtype)

    def part(sums: Any, inputs: Any) -> Any:
        x_BTD, rest = inputs
        loss, other = part_loss(_like(rounded, params), constants, x_BTD, *rest)
        return (sums[0] + loss, sums[1] + other), None

    return jax.lax.scan(part, (jnp.float32(0), jnp.float32(0)), (x, arrays))[0]


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


def _part_loss(
    logits_of: Any, smoothing: float, params: Any, _: Any, x_BTD: Any, labels_BT: Any, weights_BT: Any
) -> Any:
    logits_BTV = logits_of(params, x_BTD)
    loss = cross_entropy(logits_BTV, labels_BT, weights_BT, smoothing)[0]
    return loss, jax.lax.stop_gradient(accuracy(logits_BTV, labels_BT, weights_BT)[0])


def _part_divergence(
    logits_of: Any, teacher_logits_of: Any, temperature: float, params: Any, teacher: Any, *arrays: Any
) -> Any:
    x_BTD, teacher_x_BTD, weights_BT = arrays
    teacher_logits_BTV = teacher_logits_of(teacher, teacher_x_BTD)
    return divergence(logits_of(params, x_BTD), teacher_logits_BTV, weights_BT, temperature)[0], jnp.float32(0)


def _part_top_divergence(logits_of: Any, temperature: float, params: Any, _: Any, x_BTD: Any, *arrays: Any) -> Any:
    ids_BTK, log_probs_BTJ, weights_BT = arrays
    logits_BTV = logits_of(params, x_BTD)
    return top_divergence(logits_BTV, ids_BTK, log_probs_BTJ, weights_BT, temperature)[0], jnp.float32(0)


def _chunked_sums_forward(part_loss: Any, params: Any, constants: Any, x: Any, arrays: Any) -> Any:
    rounded = _rounded(params, x.dtype)

    def part(carry: Any, inputs: Any) -> Any:
        x_BTD, rest = inputs
        of_part = _like(rounded, params)
        loss_of = lambda params, x_BTD: part_loss(params, constants, x_BTD, *rest)
        loss, backward, other = jax.vjp(loss_of, of_part, x_BTD, has_aux=True)
        by_params, by_x_BTD = backward(jnp.float32(1))
        total, others, sums = carry
        return (total + loss, others + other, jax.tree.map(jnp.add, sums, by_params)), by_x_BTD

    first = jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    (total, others, by_params), by_x = jax.lax.scan(part, first, (x, arrays))
    return (total, others), (by_params, by_x)


def _chunked_sums_backward(part_loss: Any, residuals: Any, gradients: Any) -> Any:
    by_params, by_x = jax.tree.map(lambda g: (g * gradients[0]).astype(g.dtype), residuals)
    return by_params, None, by_x, None


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


def binary_divergence(
    logits_BEN: jax.Array, teacher_logits_BEN: jax.Array, weights_BE: jax.Array, temperature: float = 1.0
) -> Sum:
    """Returns `divergence` of N independent binary labels, in the mean over the labels."""
    x_BEN, y_BEN = (x.astype(jnp.float32) / temperature for x in (logits_BEN, teacher_logits_BEN))
    p_BEN = jax.nn.sigmoid(y_BEN)
    loss_BEN = p_BEN * (jax.nn.softplus(-x_BEN) - jax.nn.softplus(-y_BEN))
    loss_BEN += (1 - p_BEN) * (jax.nn.softplus(x_BEN) - jax.nn.softplus(y_BEN))
    return temperature**2 * (loss_BEN.mean(-1) * weights_BE).sum(), weights_BE.sum()


def state_error(states_LBTD: jax.Array, teacher_states_LBTD: jax.Array, tokens_BT: jax.Array) -> Sum:
    """Returns the squared error of hidden states, in the mean over layers and width, summed over the tokens.

    Source: TinyBERT (Jiao et al. 2020, equations 8 and 9).

    Args:
      states_LBTD: hidden states of the student, projected to the width of the teacher.
      teacher_states_LBTD: those of the layers of the teacher that they are compared with.
      tokens_BT: 1 for tokens, 0 for padding.
    """
    error_LBTD = (states_LBTD.astype(jnp.float32) - teacher_states_LBTD) ** 2
    return (error_LBTD.mean((0, 3)) * tokens_BT).sum(), tokens_BT.sum()


def attention_error(weights_LBHTS: jax.Array, teacher_weights_LBHTS: jax.Array, tokens_BT: jax.Array) -> Sum:
    """Returns the squared error of attention weights, in the mean over layers and heads, summed over the tokens.

    It is summed over the keys, because a mean over them would depend on the padding of a row.

    Source: TinyBERT (Jiao et al. 2020, equation 7), for weights after the softmax.

    Args:
      weights_LBHTS: attention weights of the student.
      teacher_weights_LBHTS: those of the layers of the teacher that they are compared with.
      tokens_BT: 1 for queries, 0 for padding.
    """
    error_LBHTS = (weights_LBHTS.astype(jnp.float32) - teacher_weights_LBHTS) ** 2
    return (error_LBHTS.sum(4).mean((0, 2)) * tokens_BT).sum(), tokens_BT.sum()
