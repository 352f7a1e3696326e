"""What tasks read of a packed batch: hidden states of its tokens, and the state that stands for each example."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.data.batches import Batch
from jaxlm.inference.encode import pool
from jaxlm.nn.losses import Sum, accuracy, chunked_cross_entropy, cross_entropy, token_log_probs
from jaxlm.nn.transformer import FRONT_ENDS, Transformer, apply

MOST_LOGITS = 1 << 26  # on each device at once; more are computed in parts, one after the other
_MODES = {"first": "cls", "last": "lasttoken", "mean": "mean"}  # of `ModelConfig.classes_from`, as pooling names them


def hidden(module: Transformer, params: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, dict[str, Sum]]:
    """Hidden states [B, T, D] of a packed batch, of an encoder-decoder the decoder's; and in training the auxiliary
    losses of its blocks, as `auxiliary/NAME`.

    key: of dropout; None in evaluation.
    """
    field = FRONT_ENDS[module.config.front_end].field
    inputs: tuple[Any, ...] = batch[field], batch["segments_BT"], batch["positions_BT"]
    named: dict[str, Any] = {"key": key, **({} if key is None else {"mutable": ["losses"]})}
    segments = [batch["segments_BT"]]
    if "source_tokens_BS" in batch:
        source = batch["source_tokens_BS"], batch["source_segments_BS"], batch["source_positions_BS"]
        inputs = (*source, None, *inputs)
        segments.append(source[1])
    else:
        inputs = (*inputs, batch.get("types_BT"))
        named["prefix_BT"] = batch.get("prefix_BT")
    found = apply(module, params, *inputs, **named)
    if key is None:
        return found, {}
    x_BTD, sown = found
    tokens = sum((some > 0).sum() for some in segments)
    stacks = jax.tree.leaves_with_path(sown.get("losses", {}))
    losses: dict[str, Sum] = {}
    for key_path, value in stacks:  # stack / name / place in the tuple that sow makes
        name = f"auxiliary/{key_path[1].key}"
        losses[name] = losses[name][0] + value if name in losses else value, tokens
    return x_BTD, losses


def word_losses(
    module: Transformer,
    params: Any,
    x_BTD: jax.Array,
    labels_BT: jax.Array,
    weights_BT: jax.Array,
    label_smoothing: float = 0.0,
    method: str = "lm",
) -> dict[str, Sum]:
    """Loss and accuracy of the words that a head over the vocabulary, a method of the module, says at each place."""
    parts = _parts(module, *labels_BT.shape)
    if parts == 1:
        logits_BTV = apply(module, params, x_BTD, method=method)
        found = cross_entropy(logits_BTV, labels_BT, weights_BT, label_smoothing)
        return {"loss": found, "accuracy": accuracy(logits_BTV, labels_BT, weights_BT)}
    head = _head(module, params, method)
    loss, hits = chunked_cross_entropy(*head, x_BTD, labels_BT, weights_BT, label_smoothing, parts)
    return {"loss": loss, "accuracy": hits}


def word_scores(
    module: Transformer, params: Any, x_BTD: jax.Array, labels_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The log-probability of each label by the head lm, and the likeliest token: `losses.token_log_probs`."""
    return token_log_probs(*_head(module, params, "lm"), x_BTD, labels_BT, _parts(module, *labels_BT.shape))


def _parts(module: Transformer, B: int, T: int) -> int:
    """Number of parts in which logits [B, T, V] are computed."""
    ways = module.constrain.ways
    entries = B * T * module.config.vocabulary // (ways("batch") * ways("length") * ways("vocabulary"))
    parts = min(T, max(1, -(-entries // MOST_LOGITS)))
    # Rather some more parts than padding.
    return next((n for n in range(parts, 2 * parts) if T % (n * ways("length")) == 0), parts)


def _head(module: Transformer, params: Any, method: str) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    """The function from parameters and states to logits, and the parameters that it reads."""
    heads = {name: part for name, part in params.items() if name not in ("encoder", "decoder")}
    return partial(apply, module, method=method), heads


def of_examples(x_BTD: jax.Array, batch: Batch, where: str) -> jax.Array:
    """The state [B, E, D] of each example's first token, or its last, or their mean; zeros where there is none."""
    E = batch["weights_BE"].shape[1]
    mode = _MODES.get(where, where)
    x_BED = pool(mode, x_BTD, batch["segments_BT"], batch["positions_BT"], E).astype(x_BTD.dtype)
    # The maximum over no tokens is -inf.
    there_BE = jnp.arange(E) < batch["segments_BT"].max(-1, keepdims=True)
    return jnp.where(there_BE[..., None], x_BED, 0)
