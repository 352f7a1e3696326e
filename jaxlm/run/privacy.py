"""Differentially private training (DP-SGD): the noise that a bound requires, and the privacy loss of the steps done.

Sources: Abadi et al. 2016; accounting by privacy loss distributions (Koskela et al. 2020) in dp-accounting.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import ModelConfig, RunConfig
from jaxlm.data.batches import Batch, Batches
from jaxlm.data.poisson import PoissonBatches
from jaxlm.errors import UserError
from jaxlm.run.step import Gradient, Objective, Summed, leading
from jaxlm.tasks.records import RecordExamples

MAX_NOISE = 100.0  # a gradient with more noise than this multiple of `clip` contains no signal
MIN_NOISE = 0.05  # the distribution of the privacy loss with less noise needs too much memory
_TOLERANCE = 1e-3  # of the noise that a bound requires
_COARSE = (
    1e-3  # interval of the privacy loss in the search for the noise; the result is an upper bound for any interval
)
_OVERFLOW = 1e-6  # probability, as a fraction of delta, that a batch of the run has more examples than rows
_NOISE = 0xFFFFFFFF  # number of the key of the noise; micro-batches have the numbers from 0


def package(name: str) -> ModuleType:
    """Returns a module of dp-accounting or jax-privacy; raises UserError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"differential privacy requires the package {name.split('.')[0].replace('_', '-')} ({error}); "
            f"install it: pip install 'jaxlm[privacy]'"
        ) from None


class Budget(NamedTuple):
    """What the privacy loss of a run depends on.

    noise: standard deviation of the noise, as a multiple of `clip`.
    clip: maximum norm of the gradient of an example.
    batch: expected number of examples in a batch.
    examples: number of training examples.
    steps: number of steps of the run.
    delta: probability of a larger privacy loss.
    rows: number of rows of a batch.
    unit: what an example is.
    """

    noise: float
    clip: float
    batch: int
    examples: int
    steps: int
    delta: float
    rows: int
    unit: str

    @property
    def rate(self) -> float:
        """The probability that an example is in a batch."""
        return min(1.0, self.batch / self.examples)

    def epsilon(self, steps: int) -> float:
        """Returns the privacy loss of the first steps of the run."""
        return epsilon(self.noise, self.rate, steps, self.delta)

    def facts(self, steps: int) -> dict[str, Any]:
        """Returns the guarantee after some steps as JSON values, for an export."""
        return {
            "mechanism": "DP-SGD with Poisson sampling",
            "epsilon": self.epsilon(steps),
            "delta": self.delta,
            "unit": self.unit,
            "neighbours": "add or remove one unit",
            "noise_multiplier": self.noise,
            "clip": self.clip,
            "sampling_probability": self.rate,
            "steps": steps,
        }

    def summary(self, steps: int) -> str:
        """Returns the guarantee after some steps, for printing."""
        return f"epsilon {self.epsilon(steps):.3f} at delta {self.delta:.3g} for one {self.unit}"


@lru_cache(maxsize=4096)
def epsilon(noise: float, rate: float, steps: int, delta: float, interval: float = 1e-4) -> float:
    """Returns the privacy loss of some steps of the Gaussian mechanism on Poisson samples.

    Args:
      noise: standard deviation of the noise, as a multiple of the maximum norm.
      rate: sampling probability.
      steps: number of steps.
      delta: probability of a larger privacy loss.
      interval: resolution of the privacy loss in nats; the result is an upper bound for any interval.
    """
    if not steps:
        return 0.0
    return float(_one_step(noise, rate, interval).self_compose(steps).get_epsilon_for_delta(delta))


@lru_cache(maxsize=64)
def _one_step(noise: float, rate: float, interval: float) -> Any:
    """Returns the distribution of the privacy loss of one step."""
    pld = package("dp_accounting.pld.privacy_loss_distribution")
    return pld.from_gaussian_mechanism(noise, value_discretization_interval=interval, sampling_prob=rate)


def required_noise(target: float, rate: float, steps: int, delta: float) -> float:
    """Returns the smallest noise, within a thousandth, whose privacy loss is at most a bound.

    Args:
      target: the bound.
      rate: sampling probability.
      steps: number of steps.
      delta: probability of a larger privacy loss.

    Raises:
      UserError: if more noise than `MAX_NOISE` would be required.
    """
    spent = lambda noise: epsilon(noise, rate, steps, delta, _COARSE)
    high = 1.0
    while spent(high) > target:
        high *= 2
        if high > MAX_NOISE:
            raise _unreachable(target, rate, steps, delta)
    low = high / 2
    while low > MIN_NOISE and spent(low) <= target:
        low, high = low / 2, low
    while high > low * (1 + _TOLERANCE):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if spent(middle) <= target else (middle, high)
    return high


def _unreachable(target: float, rate: float, steps: int, delta: float) -> UserError:
    """Returns the error for a bound that requires too much noise, with what would reach it."""
    reached = lambda rate, steps: epsilon(MAX_NOISE, rate, steps, delta, _COARSE) <= target
    remedies = []
    if fewer := next((n for n in (steps >> k for k in range(1, steps.bit_length())) if reached(rate, n)), 0):
        remedies.append(f"at most about {fewer:,} steps (--steps)")
    if factor := next((1 << k for k in range(1, 21) if reached(rate / (1 << k), steps)), 0):
        remedies.append(f"about {factor:,} times as many examples, or a batch that is smaller by this factor (--batch)")
    remedies.append(f"epsilon {epsilon(MAX_NOISE, rate, steps, delta, _COARSE) * 1.01:.3g} (--privacy.epsilon)")
    return UserError(
        f"privacy.epsilon is {target:g}, which {steps:,} steps with the sampling probability {rate:.3g} cannot reach "
        f"with noise of at most {MAX_NOISE:g} times clip; it can be reached with {', or '.join(remedies)}"
    )


def default_delta(examples: int) -> float:
    """Returns 1 / examples, rounded down to one digit; below 1 / examples also for powers of ten.

    >>> default_delta(60_614), default_delta(1000)
    (1e-05, 0.0009)
    """
    power = math.floor(math.log10(1 / examples)) if examples > 1 else -1
    digit = math.ceil(round(1 / examples / 10**power, 9)) - 1
    return float(f"{digit}e{power}") if digit else float(f"9e{power - 1}")


def sampled(run: RunConfig, train: Any) -> PoissonBatches:
    """Returns Poisson samples of the training examples of a private run, one unit in a row.

    Raises:
      UserError: if a row of the table is several units, or the batches are not made from examples.
    """
    package("dp_accounting")
    if type(train) is not Batches:
        raise UserError(
            f"{type(run.task).__name__} has a source of batches of its own, {type(train).__name__}, whose examples "
            f"cannot be sampled at random; leave out --privacy.epsilon and --privacy.noise"
        )
    examples = train.examples
    if isinstance(examples, RecordExamples) and len(examples.record_of) != examples.records:
        raise UserError(
            f"{examples.records:,} rows of the table are {len(examples.record_of):,} units, because the text of a row "
            f"is read in several windows or turns; a private run bounds the influence of one unit, so each row must be "
            f"one: raise --data.length, or truncate (--task.windows none)"
        )
    return PoissonBatches(train, run.batch)


def resolve_budget(run: RunConfig, train: PoissonBatches, log: Callable[[str], None]) -> Budget:
    """Returns the budget of a private run, and sets the numbers of rows and expected examples of its batches.

    Args:
      run: the run with its batch size and its number of steps.
      train: its batches, changed in place.
      log: prints a line.

    Raises:
      UserError: if the bound cannot be reached.
    """
    privacy, examples = run.privacy, train.units
    if run.batch > examples:
        raise UserError(
            f"batch is {run.batch}, and the data have {examples:,} examples; a private run samples a part of them: "
            f"lower --batch"
        )
    delta = privacy.delta or default_delta(examples)
    rate = run.batch / examples
    noise = privacy.noise or required_noise(privacy.epsilon, rate, run.steps, delta)
    if noise < MIN_NOISE:
        raise UserError(f"privacy.noise is {noise:g}; below {MIN_NOISE:g} it protects nothing: raise it")
    bound = privacy.epsilon or epsilon(noise, rate, run.steps, delta)
    rows = _rows(run.batch, examples, run.steps, delta, bound)
    rows += -rows % run.accumulate
    train.expected, train.rows = run.batch, rows
    is_table = isinstance(train.examples, RecordExamples)
    unit = "row of the table" if is_table else f"span of at most {run.data.length} tokens of a document"
    budget = Budget(noise, privacy.clip, run.batch, examples, run.steps, delta, rows, unit)
    for line in _lines(run, budget, is_table):
        log(f"privacy   {line}")
    return budget


def _rows(batch: int, examples: int, steps: int, delta: float, bound: float) -> int:
    """Returns a number of rows that the batches of a run exceed with negligible probability.

    If a batch were cut, the run would differ from the one that the accountant describes. This adds at most its
    probability times 1 + e^epsilon to delta.
    """
    from scipy.stats import binom

    limit = _OVERFLOW * delta / (steps * (1 + math.exp(bound)))
    return min(examples, int(binom.isf(limit, examples, batch / examples)) + 1)


def _lines(run: RunConfig, budget: Budget, is_table: bool) -> list[str]:
    """Returns what a private run prints before its first step."""
    privacy, data = run.privacy, run.data
    lines = [
        f"{budget.summary(budget.steps)} after {budget.steps:,} steps",
        f"noise {budget.noise:.4g} x clip {budget.clip:g}; {budget.batch} of {budget.examples:,} examples "
        f"expected in a batch, at most {budget.rows}",
    ]
    lines += [f"delta is {budget.delta:.3g}, 1 / examples rounded down; set it with --privacy.delta"][
        : not privacy.delta
    ]
    if budget.delta * budget.examples >= 1:
        lines.append(
            f"warning: delta {budget.delta:.3g} is not below 1 / {budget.examples:,}; a run that publishes one example "
            f"as it is would have the same guarantee"
        )
    if run.seed < 1 << 20:
        lines.append(
            f"warning: the noise follows from the seed {run.seed}, which is easy to guess; give a large random --seed, "
            f"and publish only the export"
        )
    if run.tokenizer.train and not run.tokenizer.path and not run.init:
        lines.append("not protected: the vocabulary of the tokenizer, which the run trains on the same texts")
    if is_table and getattr(run.task, "has_label_head", True) and not getattr(run.task, "names", True):
        lines.append("not protected: the names of the labels; give them with --task.names")
    if not data.eval_path and not data.eval_split:
        lines.append("not protected: the held-out rows, which select the checkpoint and are scored without noise")
    return [*lines, "not protected: the log and the report of the run, which contain exact losses; publish the export"]


def check_bound_model(config: ModelConfig) -> None:
    """Raises UserError if the losses of different rows of a model of `init` depend on each other."""
    if config.experts and config.balance_loss > 0:
        raise UserError(
            f"the model of init has balance_loss {config.balance_loss:g}, a loss that depends on all tokens of a "
            f"batch, which a private run cannot have; set it to 0 in its config"
        )


def plan_budget(run: RunConfig) -> Budget:
    """Returns a budget with which a step compiles as in a private run, for a plan that reads no data."""
    return Budget(1.0, run.privacy.clip, run.batch, run.batch, run.steps, 1e-5, run.batch, "example")


def private_gradient(clip: float, noise: float, expected: int) -> Gradient:
    """Returns the function that computes the gradient of DP-SGD (Abadi et al. 2016, algorithm 1).

    The gradient of each row is clipped to a maximum norm, over all trained parameters together. Their sum, with
    Gaussian noise, is divided by the expected number of rows. The noise is added once per update. A micro-batch needs
    memory for the gradients of all of its rows; micro-batches of padding are skipped.

    `jax_privacy.clipped_grad` computes the same sum, but calls a function that optax has deprecated; the tests compare
    both. The noise of jax-privacy is part of an optimizer's state, while here it is a function of the key of the step,
    so that resumed runs repeat it.

    Args:
      clip: the maximum norm.
      noise: standard deviation of the noise, as a multiple of `clip`.
      expected: expected number of rows.

    Returns:
      A `Gradient`, for an objective that divides by the weights of its own rows. Its value is the mean over the rows.
    """

    def gradient(objective: Objective, params: Any, batch: Batch, key: jax.Array) -> tuple[Summed, Any]:
        def clipped_gradient(row: Batch, row_key: jax.Array) -> tuple[Summed, Any]:
            one_row = jax.tree.map(lambda x: x[None], row)
            results, grads = jax.value_and_grad(objective, has_aux=True)(params, one_row, row_key)
            norm, exists = optax.tree.norm(grads), (row["segments_BT"] > 0).any()
            # A gradient that is not finite counts as 0, because it has no bounded norm.
            factor = jnp.where(exists & jnp.isfinite(norm), jnp.minimum(1, clip / jnp.maximum(norm, 1e-30)), 0)
            grads = jax.tree.map(lambda g: jnp.where(factor > 0, factor * g, 0), grads)
            return jax.tree.map(lambda x: jnp.where(exists, x, 0), results), grads

        def micro_gradient(rows: Batch, i: jax.Array) -> tuple[Summed, Any]:
            keys_B = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, i)))(jnp.arange(leading(rows)))
            return jax.tree.map(lambda x_B: x_B.sum(0), jax.vmap(clipped_gradient)(rows, keys_B))

        def add(sums: Any, inputs: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            more = lambda: jax.tree.map(jnp.add, sums, micro_gradient(*inputs))
            return jax.lax.cond((inputs[0]["segments_BT"] > 0).any(), more, lambda: sums), None

        k = leading(batch)
        first = jax.tree.map(lambda x: x[0], batch), jnp.int32(0)
        if k == 1:
            (value, losses), grads = micro_gradient(*first)
        else:
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(micro_gradient, *first))
            ((value, losses), grads), _ = jax.lax.scan(add, zeros, (batch, jnp.arange(k)))
        drawn = optax.tree.random_like(jax.random.fold_in(key, jnp.uint32(_NOISE)), grads, jax.random.normal)
        grads = jax.tree.map(lambda g, z: (g + noise * clip * z) / expected, grads, drawn)
        rows = (batch["segments_BT"] > 0).any(-1).sum()
        return (value / jnp.maximum(rows, 1), losses), grads

    return gradient
