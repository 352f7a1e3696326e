"""One update: a pure function (TrainState, Batch) -> (TrainState, metrics)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.data.batches import Batch
from jaxlm.nn.losses import Losses, Sum
from jaxlm.nn.transformer import Transformer
from jaxlm.tasks.task import Task

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that changes from step to step; arrays only."""

    step: jax.Array  # int32, updates made
    params: Any
    opt_state: Any
    key: jax.Array  # uint32 [2], of dropout; never advanced: step n uses fold_in(key, n)


def make_train_step(
    task: Task, module: Transformer, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns one update of `optimizer` by a batch whose fields are [k, B / k, ...]: k micro-batches.

    What is minimised is, for each loss, its sum over all k micro-batches divided by its weight in all of them, so that
    k micro-batches give the update of one batch k times as large, however ragged the padding.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        k = batch["tokens_BT"].shape[0]
        totals = task.weights(batch)
        step_key = jax.random.fold_in(state.key, state.step)

        def objective(params: Any, micro: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, Sum]]:
            losses, _ = task.losses(module, params, micro, key)
            means = (losses[name][0] / jnp.maximum(total, 1) for name, total in totals.items())
            return sum(means, jnp.float32(0)), losses

        def share(micro: Batch, i: jax.Array) -> Any:
            """Returns what a micro-batch adds to the losses of the batch, and to their gradient."""
            key = jax.random.fold_in(step_key, i)
            return jax.value_and_grad(objective, has_aux=True)(state.params, micro, key)

        first = jax.tree.map(lambda x: x[0], batch), jnp.int32(0)
        if k == 1:
            sums = share(*first)
        else:
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(share, *first))
            add = lambda sums, inputs: (jax.tree.map(jnp.add, sums, share(*inputs)), None)
            sums, _ = jax.lax.scan(add, zeros, (batch, jnp.arange(k)))
        (loss, losses), grads = sums
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            **({name: s / jnp.maximum(w, 1) for name, (s, w) in losses.items()} if len(losses) > 1 else {}),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "grad_norm": optax.tree.get(opt_state, "grad_norm"),
            "tokens": sum((batch[name] > 0).sum() for name in ("segments_BT", "source_segments_BS") if name in batch),
            "examples": batch["segments_BT"].max(-1).sum(),
        }
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return train_step


def make_eval_step(task: Task, module: Transformer) -> Callable[[Any, Batch], Losses]:
    """Of a batch [1, B, ...] sums and weights, to be added over batches, and what the task keeps of its examples."""

    def eval_step(params: Any, batch: Batch) -> Losses:
        return task.losses(module, params, jax.tree.map(lambda x: x[0], batch), None)

    return eval_step
