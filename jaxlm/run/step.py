"""One update: a pure function (TrainState, Batch) -> (TrainState, metrics)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxlm.data.batches import Batch
from jaxlm.nn import parameters
from jaxlm.nn.losses import Losses, Sum
from jaxlm.nn.transformer import Transformer
from jaxlm.tasks.task import Task

Metrics = dict[str, jax.Array]
Summed = tuple[jax.Array, dict[str, Sum]]  # what is minimised, and the (sum, weight) of each loss
Objective = Callable[[Any, Batch, jax.Array], Summed]


class TrainState(NamedTuple):
    """All that changes from step to step, and what the steps read beside it; arrays only."""

    step: jax.Array  # int32, updates made
    params: Any  # those that are trained, with None in the place of the others
    opt_state: Any
    key: jax.Array  # uint32 [2], of dropout; never advanced: step n uses fold_in(key, n)
    frozen: Any = None  # the parameters that are not trained, as `parameters.split` has them; None: there are none

    @property
    def model(self) -> Any:
        """All parameters of the model."""
        return parameters.joined(self.params, self.frozen)


class Gradient(Protocol):
    """How the gradient of a batch is computed: `summed_gradient`, or another with the same signature."""

    def __call__(self, objective: Objective, params: Any, batch: Batch, key: jax.Array) -> tuple[Summed, Any]:
        """Returns what the objective returns, summed over the batch, and its gradient.

        Args:
          objective: (params, rows [b, ...] of the batch, key) -> (what is minimised, (sum, weight) of each loss).  Its
            values over disjoint rows add up to that of the batch.
          params: the trained parameters.
          batch: fields [k, B / k, ...]: k micro-batches.
          key: of dropout.
        """


def summed_gradient(objective: Objective, params: Any, batch: Batch, key: jax.Array) -> tuple[Summed, Any]:
    """Returns the objective of a batch and its gradient, both summed over the micro-batches: see `Gradient`."""
    k = leading(batch)

    def share(micro: Batch, i: jax.Array) -> tuple[Summed, Any]:
        return jax.value_and_grad(objective, has_aux=True)(params, micro, jax.random.fold_in(key, i))

    first = jax.tree.map(lambda x: x[0], batch), jnp.int32(0)
    if k == 1:
        return share(*first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(share, *first))
    add = lambda sums, inputs: (jax.tree.map(jnp.add, sums, share(*inputs)), None)
    sums, _ = jax.lax.scan(add, zeros, (batch, jnp.arange(k)))
    return sums


def leading(batch: Batch) -> int:
    """Returns the size of the first axis of a batch's fields."""
    return next(iter(batch.values())).shape[0]


def make_train_step(
    task: Task,
    module: Transformer,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    gradient: Gradient = summed_gradient,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns one update of `optimizer` by a batch whose fields are [k, B / k, ...]: k micro-batches.

    What is minimised is, for each loss, its sum over all k micro-batches divided by its weight in all of them, so that
    k micro-batches give the update of one batch k times as large, however ragged the padding.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        totals = task.weights(batch)
        tokens = sum((batch[name] > 0).sum() for name in ("segments_BT", "source_segments_BS") if name in batch)

        def objective(params: Any, micro: Batch, key: jax.Array) -> Summed:
            losses, _ = task.losses(module, parameters.joined(params, state.frozen), micro, key)
            # What blocks add is a mean over the tokens.
            auxiliary = dict.fromkeys((name for name in losses if name.startswith("auxiliary/")), tokens)
            means = (losses[name][0] / jnp.maximum(total, 1) for name, total in (totals | auxiliary).items())
            return sum(means, jnp.float32(0)), losses

        step_key = jax.random.fold_in(state.key, state.step)
        (loss, losses), grads = gradient(objective, state.params, batch, step_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            **({name: s / jnp.maximum(w, 1) for name, (s, w) in losses.items()} if len(losses) > 1 else {}),
            "loss": loss,  # all that is minimised
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "grad_norm": optax.tree.get(opt_state, "grad_norm"),
            "tokens": tokens,
            "examples": batch["segments_BT"].max(-1).sum(),
        }
        params = optax.apply_updates(state.params, updates)
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step


def make_eval_step(task: Task, module: Transformer) -> Callable[[Any, Batch], Losses]:
    """Of a batch [1, B, ...] sums and weights, to be added over batches, and what the task keeps of its examples."""

    def eval_step(params: Any, batch: Batch) -> Losses:
        return task.losses(module, params, jax.tree.map(lambda x: x[0], batch), None)

    return eval_step
