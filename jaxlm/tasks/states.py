"""Hidden states of a packed batch, the state that represents each example, and losses over the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.data.batches import Batch
from jaxlm.devices import chips
from jaxlm.inference.encode import pool
from jaxlm.nn import parameters
from jaxlm.nn.embeddings import FRONT_ENDS
from jaxlm.nn.groups import Groups
from jaxlm.nn.losses import (
    Sum,
    accuracy,
    chunked_cross_entropy,
    chunked_divergence,
    chunked_top_divergence,
    cross_entropy,
    divergence,
    token_log_probs,
    top_divergence,
    top_log_probs,
)
from jaxlm.nn.transformer import Transformer, apply

# On each device at once; more are computed in parts, one after the other. Each part reads and writes the gradient of
# the head, so that a device with more than 16 GiB computes larger parts: float32 logits in 1/64 of its memory.
MAX_LOGITS = 1 << 26
_SHARE_OF_LOGITS = 64
_MODES = {"first": "cls", "last": "lasttoken", "mean": "mean"}  # values of `ModelConfig.classes_from` -> pooling modes


class HeadLogits(NamedTuple):
    """The logits of a head, for distillation.

    logits: [..., N].
    weights: [...], weights of the positions.
    kind: "one" of N applies, "any" of N apply, or "numbers", which are no logits.
    """

    logits: jax.Array
    weights: jax.Array
    kind: Literal["one", "any", "numbers"] = "one"


class VocabularyStates(NamedTuple):
    """Hidden states that a head over the vocabulary reads, for distillation; its logits would need much memory.

    x_BTD: hidden states.
    weights_BT: weights of the positions.
    method: the method of the module that applies the head.
    places_BT: the position of each state in its row; None: the states of all positions, in order.
    """

    x_BTD: jax.Array
    weights_BT: jax.Array
    method: str = "lm"
    places_BT: jax.Array | None = None


class TopTokens(NamedTuple):
    """The most likely tokens at each position of a batch by a teacher, as `losses.top_log_probs` returns them."""

    ids_BTK: jax.Array
    log_probs_BTJ: jax.Array


def hidden_states(
    module: Transformer,
    params: Any,
    batch: Batch,
    key: jax.Array | None,
    one_example: bool = False,
    more: Mapping[str, Any] | None = None,
) -> tuple[jax.Array, dict[str, Sum]]:
    """Returns the last hidden states of a packed batch, and in training the auxiliary losses of the layers.

    Args:
      module: the model.
      params: its parameters.
      batch: the batch.
      key: for dropout; None in evaluation.
      one_example: whether each row holds one example from its start, with padding only after it. A decoder then needs
        no mask but the causal one.
      more: further inputs of the model, by name.

    Returns:
      Hidden states [B, T, D], those of the decoder if the model has both, or [B, Q, D] of targets; and sums and weights
      as `auxiliary/NAME`.
    """
    x_BTD, auxiliary, _ = run_stacks(module, params, batch, key, one_example, more=more)
    return x_BTD, auxiliary


def run_stacks(
    module: Transformer,
    params: Any,
    batch: Batch,
    key: jax.Array | None,
    one_example: bool = False,
    collections: tuple[str, ...] = (),
    more: Mapping[str, Any] | None = None,
) -> tuple[jax.Array, dict[str, Sum], dict[str, Any]]:
    """Returns the results of `hidden_states`, and collections that the stacks store, such as "states"; see `Stack`."""
    field = FRONT_ENDS[module.config.front_end].field
    inputs: tuple[Any, ...] = batch[field], batch["segments_BT"], batch["positions_BT"]
    mutable = [*collections, *(() if key is None else ("losses",))]
    options: dict[str, Any] = {"key": key, **(more or {}), **({"mutable": mutable} if mutable else {})}
    segments = [batch["segments_BT"]]
    if "source_tokens_BS" in batch:
        source = batch["source_tokens_BS"], batch["source_segments_BS"], batch["source_positions_BS"]
        inputs = (*source, None, *inputs)
        segments.append(source[1])
    else:
        inputs = (*inputs, batch.get("types_BT"))
        options |= {"prefix_BT": batch.get("prefix_BT"), "one_example": one_example}
    result = apply(module, params, *inputs, **options)
    if not mutable:
        return result, {}, {}
    x_BTD, sown = result
    tokens = sum((ids > 0).sum() for ids in segments)
    stacks = jax.tree.leaves_with_path(sown.get("losses", {}))
    losses: dict[str, Sum] = {}
    for key_path, value in stacks:  # stack / name / index in the tuple that `sow` stores
        name = f"auxiliary/{key_path[1].key}"
        losses[name] = losses[name][0] + value if name in losses else value, tokens
    return x_BTD, losses, sown


def token_losses(
    module: Transformer,
    params: Any,
    x_BTD: jax.Array,
    labels_BT: jax.Array,
    weights_BT: jax.Array,
    label_smoothing: float = 0.0,
    method: str = "lm",
) -> dict[str, Sum]:
    """Returns the loss and the accuracy of a head over the vocabulary, as sums and weights.

    Args:
      module: the model.
      params: its parameters.
      x_BTD: hidden states.
      labels_BT: the token to predict at each position.
      weights_BT: the weight of each position.
      label_smoothing: the share of the probability that is spread over the vocabulary.
      method: the method of the module that applies the head.
    """
    parts = _parts(module, *labels_BT.shape)
    if parts == 1:
        logits_BTV = apply(module, params, x_BTD, method=method)
        loss = cross_entropy(logits_BTV, labels_BT, weights_BT, label_smoothing)
        return {"loss": loss, "accuracy": accuracy(logits_BTV, labels_BT, weights_BT)}
    groups = Groups(module.constrain, *labels_BT.shape)
    logits_of, head = _head(module.clone(constrain=groups.inside), params, method)
    losses = partial(chunked_cross_entropy, logits_of, label_smoothing=label_smoothing, parts=parts)
    sums = groups.map(losses, head, x_BTD, labels_BT, weights_BT)
    loss, hits = jax.tree.map(lambda x_M: x_M.sum(0), sums)
    return {"loss": loss, "accuracy": hits}


def vocabulary_divergence(
    module: Transformer,
    params: Any,
    states: VocabularyStates,
    teacher: Transformer,
    teacher_params: Any,
    teacher_states: VocabularyStates,
    temperature: float,
) -> Sum:
    """Returns `divergence` of a head over the vocabulary from the head of a teacher.

    Args:
      module: the student.
      params: its parameters.
      states: its hidden states.
      teacher: the teacher.
      teacher_params: its parameters, without a gradient.
      teacher_states: its hidden states at the same positions.
      temperature: the divisor of the logits.
    """
    (x_BTD, weights_BT, method, _), teacher_x_BTD = states, teacher_states.x_BTD
    parts = _parts(module, 2 * len(x_BTD), x_BTD.shape[1])  # for the logits of both models
    if parts == 1:
        logits_BTV = apply(module, params, x_BTD, method=method)
        teacher_logits_BTV = apply(teacher, teacher_params, teacher_x_BTD, method=method)
        return divergence(logits_BTV, teacher_logits_BTV, weights_BT, temperature)
    groups = Groups(module.constrain, *x_BTD.shape[:2])
    logits_of, head = _head(module.clone(constrain=groups.inside), params, method)
    teacher_logits_of, teacher_head = _head(teacher.clone(constrain=groups.inside), teacher_params, method)

    def of_group(both: Any, x_BTD: jax.Array, teacher_x_BTD: jax.Array, weights_BT: jax.Array) -> Sum:
        heads = parameters.of_model(both), both[parameters.TEACHER]
        inputs = x_BTD, teacher_x_BTD, weights_BT
        return chunked_divergence(logits_of, teacher_logits_of, *heads, *inputs, temperature, parts)

    sums = groups.map(of_group, {**head, parameters.TEACHER: teacher_head}, x_BTD, teacher_x_BTD, weights_BT)
    total, weight = jax.tree.map(lambda x_M: x_M.sum(0), sums)
    return total, weight


def vocabulary_top(
    module: Transformer, params: Any, states: VocabularyStates, length: int, top: int, temperature: float
) -> TopTokens:
    """Returns the most likely tokens by a head over the vocabulary.

    Args:
      module: the model.
      params: its parameters.
      states: its hidden states.
      length: tokens in a row; positions without a state have the value 0.
      top: number of tokens per position; at most all but one of the vocabulary.
      temperature: the divisor of the logits.
    """
    x_BTD = states.x_BTD
    parts = _parts(module, *x_BTD.shape[:2])
    if parts == 1:
        found = top_log_probs(*_head(module, params, states.method), x_BTD, top, temperature)
    else:
        groups = Groups(module.constrain, *x_BTD.shape[:2])
        logits_of, head = _head(module.clone(constrain=groups.inside), params, states.method)
        of_group = lambda head, x_BTD: top_log_probs(logits_of, head, x_BTD, top, temperature, parts)
        ids_BTK, log_probs_BTJ = map(groups.merge, groups.map(of_group, head, x_BTD))
        found = ids_BTK, log_probs_BTJ
    if states.places_BT is None:
        return TopTokens(*found)
    place = lambda x: jnp.zeros((len(x), length, x.shape[2]), x.dtype).at[jnp.arange(len(x))[:, None], states.places_BT]
    return TopTokens(*(place(x).set(x) for x in found))


def top_vocabulary_divergence(
    module: Transformer, params: Any, states: VocabularyStates, teacher: TopTokens, temperature: float
) -> Sum:
    """Returns `top_divergence` of a head over the vocabulary from the most likely tokens of a teacher.

    Args:
      module: the student.
      params: its parameters.
      states: its hidden states.
      teacher: the tokens at all positions of the batch.
      temperature: the divisor of the logits.
    """
    x_BTD, weights_BT, method, places_BT = states
    if places_BT is not None:
        teacher = TopTokens(*(jnp.take_along_axis(x, places_BT[..., None], axis=1) for x in teacher))
    parts = _parts(module, 2 * len(x_BTD), x_BTD.shape[1])  # for the logits, and the probabilities of the teacher
    if parts == 1:
        logits_BTV = apply(module, params, x_BTD, method=method)
        return top_divergence(logits_BTV, *teacher, weights_BT, temperature)
    groups = Groups(module.constrain, *x_BTD.shape[:2])
    logits_of, head = _head(module.clone(constrain=groups.inside), params, method)
    losses = partial(chunked_top_divergence, logits_of, temperature=temperature, parts=parts)
    total, weight = jax.tree.map(lambda x_M: x_M.sum(0), groups.map(losses, head, x_BTD, *teacher, weights_BT))
    return total, weight


def token_scores(
    module: Transformer, params: Any, x_BTD: jax.Array, labels_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of each label and the most likely tokens, by the head "lm" (`token_log_probs`)."""
    parts = _parts(module, *labels_BT.shape)
    if parts == 1:
        return token_log_probs(*_head(module, params, "lm"), x_BTD, labels_BT)
    groups = Groups(module.constrain, *labels_BT.shape)
    logits_of, head = _head(module.clone(constrain=groups.inside), params, "lm")
    scores = groups.map(partial(token_log_probs, logits_of, parts=parts), head, x_BTD, labels_BT)
    log_probs_BT, best_BT = map(groups.merge, scores)
    return log_probs_BT, best_BT


def _parts(module: Transformer, B: int, T: int) -> int:
    """Returns the number of parts in which logits [B, T, V] are computed."""
    ways = module.constrain.ways
    entries = B * T * module.config.vocabulary // (ways("batch") * ways("length") * ways("vocabulary"))
    parts = min(T, max(1, -(-entries // _max_logits(module))))
    # More parts are better than padding.
    return next((n for n in range(parts, 2 * parts) if T % (n * ways("length")) == 0), parts)


def _max_logits(module: Transformer) -> int:
    """Returns the number of logits that a device of the model's mesh computes at once."""
    mesh = module.constrain.mesh
    chip = chips.find((jax.devices() if mesh is None else mesh.devices.flat)[0].device_kind)
    return MAX_LOGITS if chip is None else max(MAX_LOGITS, int(chip.hbm.value) // 4 // _SHARE_OF_LOGITS)


def _head(module: Transformer, params: Any, method: str) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    """Returns the function from parameters and hidden states to logits, and the parameters that it reads."""
    heads = {name: part for name, part in params.items() if name not in ("encoder", "decoder")}
    return partial(apply, module, method=method), heads


def example_states(x_BTD: jax.Array, batch: Batch, where: str) -> jax.Array:
    """Returns the state [B, E, D] that represents each example.

    Args:
      x_BTD: hidden states.
      batch: the batch, with `segments_BT`, `positions_BT` and `weights_BE`.
      where: "first" or "last" token, "mean", or another mode of pooling.

    Returns:
      The states; zeros for examples that a row does not have.
    """
    E = batch["weights_BE"].shape[1]
    mode = _MODES.get(where, where)
    x_BED = pool(mode, x_BTD, batch["segments_BT"], batch["positions_BT"], E).astype(x_BTD.dtype)
    # The maximum over no tokens is -inf.
    exists_BE = jnp.arange(E) < batch["segments_BT"].max(-1, keepdims=True)
    return jnp.where(exists_BE[..., None], x_BED, 0)
