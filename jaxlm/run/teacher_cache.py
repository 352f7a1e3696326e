"""Fills the cache of the predictions of a teacher, before the model of a run is in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxlm.data.ahead import prefetch
from jaxlm.data.batches import Batch, Batches
from jaxlm.data.example_cache import ExampleArray, ExtendedExamples, keys_of
from jaxlm.data.joined import is_per_token
from jaxlm.devices import hosts
from jaxlm.hub.convert import nested
from jaxlm.nn import parameters
from jaxlm.nn.transformer import Transformer, init
from jaxlm.run.assembly import shard_batch, shard_params
from jaxlm.run.resolve import ResolvedRun

_KEYS = "keys_BEH"  # field of the keys of examples [B, E, 2]


def fill(resolved: ResolvedRun, module: Transformer, log: Callable[[str], None]) -> None:
    """Computes the predictions of the teacher that the steps of a run read and that its cache lacks.

    The teacher reads the batches of the run, so that predictions are those that a run without a cache would compute in
    its first epoch.  Its weights are read only if an example is missing, and freed at the end.

    Args:
      resolved: the run, whose task has an opened cache.
      module: the module of the student.
      log: prints a line.

    Raises:
      UserError, RunError: if the folder cannot be written.
    """
    task: Any = resolved.task
    cache, accumulate = task.cache, resolved.run.accumulate
    module = task.teacher_module(module)

    def predictions(params: Any, batch: Batch, index: Any) -> dict[str, jax.Array]:
        return task.teacher_predictions(module, params, {name: x_kB[index] for name, x_kB in batch.items()})

    def rows_of(batch: Batch) -> dict[str, np.ndarray]:
        placed = shard_batch(resolved.mesh, batch, accumulate)
        parts = [hosts.to_numpy(predict(params, placed, np.int32(i))) for i in range(accumulate)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    params, predict, steps = None, jax.jit(predictions), _steps(resolved)
    try:
        for step, (batch, keys_BEH, is_new_BE) in enumerate(prefetch(_batches(resolved), range(steps)), 1):
            is_new_BE = is_new_BE & ~cache.contains(keys_BEH.reshape(-1, 2)).reshape(is_new_BE.shape)
            if not is_new_BE.any():
                continue
            if params is None:
                cache.check_writable()
                log(f"teacher   its predictions are computed from step {step:,} of {steps:,}, in {cache.folder}")
                params = _read(resolved, module)
            cache.add(*_select(batch, rows_of(batch), keys_BEH, is_new_BE), write=hosts.is_first())
    except KeyboardInterrupt:
        cache.flush()
        raise
    hosts.run_on_first(cache.flush)
    if params is not None:
        cache.reload(log)
    log(f"teacher   {cache.count:,} examples in the cache {cache.folder}, {cache.bytes:,} bytes")


def _steps(resolved: ResolvedRun) -> int:
    """Returns the number of the first steps of a run whose batches contain all of its examples."""
    train = resolved.train
    repeats = getattr(train.examples, "repeats", False)
    return min(resolved.run.steps, len(train)) if repeats else resolved.run.steps


def _batches(resolved: ResolvedRun) -> Callable[[int], tuple[Batch, np.ndarray, np.ndarray]]:
    """Returns a function from a step to its batch, the keys of its examples, and whether these exist [B, E]."""
    train = resolved.train
    key = {_KEYS: ExampleArray((2,), np.dtype(np.uint64))}
    examples = ExtendedExamples(train.examples.given, key, lambda joined: {_KEYS: keys_of(joined)})
    shape = train.rows, train.length, train.max_examples, train.seed, train.source_length
    fields = Batches(train.examples.given, *shape).empty_batch()  # keys add further fields for each example
    keyed = Batches(examples, *shape)

    def batch_at(step: int) -> tuple[Batch, np.ndarray, np.ndarray]:
        batch = keyed.batch_at(step)
        exists_BE = np.arange(train.max_examples) < batch["segments_BT"].max(-1, keepdims=True)
        return {name: batch[name] for name in fields}, batch[_KEYS], exists_BE

    return batch_at


def _read(resolved: ResolvedRun, module: Transformer) -> Any:
    """Returns the parameters of the teacher, sharded over the mesh."""
    weights: Any = resolved.teacher
    shapes = jax.eval_shape(lambda: init(module, jax.random.key(0)))
    placed = parameters.by_path(shard_params(shapes, resolved.mesh))
    return nested(weights.read({path: leaf.sharding for path, leaf in placed.items()}))


def _select(
    batch: Batch, arrays: dict[str, np.ndarray], keys_BEH: np.ndarray, is_new_BE: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Returns the keys of the new examples of a batch, each once, their numbers of weighted tokens, and their rows.

    Args:
      batch: the batch.
      arrays: the predictions, [B, T, ...] and [B, E, ...], which may have further rows of padding.
      keys_BEH: the keys of all examples.
      is_new_BE: which of them are new.
    """
    new_X = np.flatnonzero(is_new_BE)
    keys_X2, first = np.unique(keys_BEH.reshape(-1, 2)[new_X], axis=0, return_index=True)
    order = np.argsort(first)  # that of the batch, as the rows of tokens
    new_X, keys_X2 = new_X[first[order]], keys_X2[order]
    segments_BT, E = batch["segments_BT"], is_new_BE.shape[1]
    is_weighted_BT = segments_BT > 0
    if "weights_BT" in batch:
        is_weighted_BT &= batch["weights_BT"] > 0
    b, t = np.nonzero(is_weighted_BT)
    example = b * E + segments_BT[b, t] - 1  # of each token with a weight, in ascending order
    tokens_X = np.bincount(example, minlength=is_new_BE.size)[new_X]
    chosen = np.isin(example, new_X)
    rows = {
        name: x[b[chosen], t[chosen]] if is_per_token(name) else x.reshape(-1, *x.shape[2:])[new_X]
        for name, x in arrays.items()
    }
    return keys_X2, tokens_X, rows
