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
    """The arrays that a step reads and, except for `key` and `frozen`, replaces."""

    step: jax.Array  # int32, number of updates made
    params: Any  # the trained parameters, with None in place of the others
    opt_state: Any
    key: jax.Array  # uint32 [2], for dropout; constant: step n uses fold_in(key, n)
    frozen: Any = None  # the other parameters, as `parameters.split` returns them; None: all are trained

    @property
    def parameters(self) -> Any:
        """All parameters: those of the model, and those of a teacher."""
        return parameters.join(self.params, self.frozen)

    @property
    def model(self) -> Any:
        """All parameters of the model."""
        return parameters.of_model(self.parameters)


class Gradient(Protocol):
    """The signature of a function that computes the gradient of a batch, such as `summed_gradient`."""

    def __call__(self, objective: Objective, params: Any, batch: Batch, key: jax.Array) -> tuple[Summed, Any]:
        """Returns the results of the objective, summed over the batch, and its gradient.

        Args:
          objective: (params, rows [b, ...] of the batch, key) -> (minimised value, (sum, weight) of each loss). The
            value for the whole batch is the sum of the values for its rows.
          params: the trained parameters.
          batch: fields [k, B / k, ...] of k micro-batches.
          key: for dropout.
        """


def summed_gradient(objective: Objective, params: Any, batch: Batch, key: jax.Array) -> tuple[Summed, Any]:
    """Returns the results of the objective and its gradient, both summed over the micro-batches; see `Gradient`."""
    k = leading(batch)

    def micro_gradient(micro: Batch, i: jax.Array) -> tuple[Summed, Any]:
        return jax.value_and_grad(objective, has_aux=True)(params, micro, jax.random.fold_in(key, i))

    first = jax.tree.map(lambda x: x[0], batch), jnp.int32(0)
    if k == 1:
        return micro_gradient(*first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(micro_gradient, *first))
    add = lambda sums, inputs: (jax.tree.map(jnp.add, sums, micro_gradient(*inputs)), None)
    sums, _ = jax.lax.scan(add, zeros, (batch, jnp.arange(k)))
    return sums


def leading(batch: Batch) -> int:
    """Returns the size of the first axis of the fields of a batch."""
    return next(iter(batch.values())).shape[0]


def token_count(batch: Batch) -> Any:
    """Returns the number of tokens of a batch, int32 []."""
    return sum((batch[name] > 0).sum() for name in ("segments_BT", "source_segments_BS") if name in batch)


def make_train_step(
    task: Task,
    module: Transformer,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    gradient: Gradient = summed_gradient,
    own_means: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the function of one update: (state, batch) -> (state, metrics).

    It minimises, for each loss, the sum over all k micro-batches divided by the weight of all k. So k micro-batches
    give the same update as one batch with all of their rows, however the padding is distributed.

    Args:
      task: computes the losses.
      module: the model.
      optimizer: for the trained parameters; its state has `grad_norm`.
      schedule: the learning rate, for the metrics.
      gradient: computes the gradient of a batch.
      own_means: whether the objective divides by the weights of its own rows, instead of those of the whole batch; the
        gradient of a row then does not depend on other rows.

    Returns:
      A pure function of a state and a batch whose fields are [k, B / k, ...]. Its metrics are scalars: loss, the mean
      of each loss where there are several, learning_rate, grad_norm, tokens and examples.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        totals, tokens = task.weights(batch), token_count(batch)

        def objective(params: Any, micro: Batch, key: jax.Array) -> Summed:
            losses, _ = task.losses(module, parameters.join(params, state.frozen), micro, key)
            own_totals, own_tokens = (task.weights(micro), token_count(micro)) if own_means else (totals, tokens)
            # The auxiliary losses of blocks are means over the tokens.
            auxiliary = dict.fromkeys((name for name in losses if name.startswith("auxiliary/")), own_tokens)
            means = (losses[name][0] / jnp.maximum(total, 1) for name, total in (own_totals | auxiliary).items())
            return sum(means, jnp.float32(0)), losses

        step_key = jax.random.fold_in(state.key, state.step)
        (loss, losses), grads = gradient(objective, state.params, batch, step_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            **({name: s / jnp.maximum(w, 1) for name, (s, w) in losses.items()} if len(losses) > 1 else {}),
            "loss": loss,  # the minimised value
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "grad_norm": optax.tree.get(opt_state, "grad_norm"),
            "tokens": tokens,
            "examples": batch["segments_BT"].max(-1).sum(),
        }
        if (sparsity := optax.tree.get(opt_state, "sparsity", None)) is not None:
            metrics["sparsity"] = sparsity
        params = optax.apply_updates(state.params, updates)
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step


def make_eval_step(task: Task, module: Transformer) -> Callable[[Any, Batch], Losses]:
    """Returns the function that evaluates one batch [1, B, ...].

    It returns the (sum, weight) of each loss, to be added over batches, and the arrays that the task keeps per example.
    """

    def eval_step(params: Any, batch: Batch) -> Losses:
        return task.losses(module, params, jax.tree.map(lambda x: x[0], batch), None)

    return eval_step
