"""Pruning while training: an optax transformation that removes weights gradually and keeps them zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import PruneConfig
from jaxlm.hub.convert import nested
from jaxlm.nn import parameters
from jaxlm.transforms.masks import Grouping, grouping, lowest, removals


class PruningState(NamedTuple):
    """The state of an optimizer with pruning.

    Attributes:
      inner: the state of the optimizer.
      updates: int32, number of updates made.
      removed: bool arrays in place of the pruned projections: True where a weight is zero.
      movement: float32 arrays in their place: minus the sum of weight times gradient; None for other methods.
      sparsity: float32, the fraction of removed weights.
    """

    inner: Any
    updates: jax.Array
    removed: Any
    movement: Any
    sparsity: jax.Array


def with_pruning(
    optimizer: optax.GradientTransformation, config: PruneConfig, steps: int, params: Any
) -> optax.GradientTransformation:
    """Returns an optimizer whose updates set removed weights to exactly zero.

    Gradients of removed weights are zero for `optimizer`. A removed weight stays removed. The fraction of removed
    weights rises with the cube of the remaining time (Zhu and Gupta 2017, equation 1).

    Args:
      optimizer: computes the updates of the other weights.
      config: which weights are removed, and when; without removals and `keep_zeros`, `optimizer` is returned.
      steps: number of steps of the run.
      params: the trained parameters, arrays or shapes.

    Raises:
      UserError: for targets that match nothing, a sparsity that leaves no weights, a pattern that does not divide the
        inputs, and removals that do not fit into the run.
    """
    if not (config.removes or config.keep_zeros):
        return optimizer
    begin, end = config.window(steps)
    leaves = parameters.by_path(params)
    paths = parameters.projections(params, config.targets)
    inputs = {path: row.inputs for path in paths if (row := parameters.find(path))}
    groups = grouping(config.sparsity if not config.pattern else None, config.scope, config.pattern)
    counts = removals({path: leaves[path].shape for path in paths}, inputs, groups) if config.removes else {}
    size = sum(leaves[path].size for path in paths)
    uses_movement = config.removes and config.method == "movement"

    def init(params: Any) -> PruningState:
        weights = parameters.by_path(params)
        is_zero = lambda weight: (weight == 0) if config.keep_zeros else jnp.zeros(weight.shape, bool)
        removed = {path: is_zero(weights[path]) for path in paths}
        movement = nested({path: jnp.zeros(weights[path].shape) for path in paths}) if uses_movement else None
        return PruningState(optimizer.init(params), jnp.int32(0), nested(removed), movement, fraction(removed))

    def fraction(removed: dict[str, jax.Array]) -> jax.Array:
        return sum((mask.mean() * (mask.size / size) for mask in removed.values()), jnp.float32(0))

    def update(gradients: Any, state: PruningState, params: Any) -> tuple[Any, PruningState]:
        weights, removed = parameters.by_path(params), parameters.by_path(state.removed)
        zero_removed = lambda path, leaf: jnp.where(removed[path], 0, leaf) if path in removed else leaf
        gradients = _map_with_path(zero_removed, gradients)
        updates, inner = optimizer.update(gradients, state.inner, params)
        movement = parameters.by_path(state.movement)
        if uses_movement:
            by_path = parameters.by_path(gradients)
            movement = {path: movement[path] - weights[path] * by_path[path] for path in paths}
        if config.removes:
            by_path = parameters.by_path(updates)
            magnitudes = {path: jnp.abs(weights[path] + by_path[path]) for path in paths}
            scores = movement if uses_movement else magnitudes
            removed = _remove(state.updates + 1, removed, scores, (begin, end, config.every), counts, inputs, groups)
        to_zero = lambda path, leaf: jnp.where(removed[path], -weights[path], leaf) if path in removed else leaf
        new = PruningState(
            inner,
            optax.safe_increment(state.updates),
            nested(removed),
            nested(movement) if uses_movement else None,
            fraction(removed),
        )
        return _map_with_path(to_zero, updates), new

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _remove(
    updates: jax.Array,
    removed: dict[str, jax.Array],
    scores: dict[str, jax.Array],
    window: tuple[int, int, int],
    counts: Mapping[str, Any],
    inputs: Mapping[str, int],
    groups: Grouping,
) -> dict[str, jax.Array]:
    """Returns the removed weights after a number of updates, by path.

    Args:
      updates: number of updates.
      removed: the removed weights so far.
      scores: the weights with the lowest scores are removed first.
      window: the numbers of updates before the first removal, until the last one, and between removals.
      counts: numbers of weights that are removed in the end, for each group of a projection.
      inputs: numbers of contracted axes of the projections.
      groups: the grouping.
    """
    begin, end, every = window

    def more() -> dict[str, jax.Array]:
        left = 1 - jnp.clip((updates - begin) / (end - begin), 0, 1)
        now = {path: count - jnp.floor(count * left**3).astype(jnp.int32) for path, count in counts.items()}
        # Removed weights come first, so that they are part of the number.
        first = {path: jnp.where(removed[path], -jnp.inf, scores[path]) for path in removed}
        new = lowest(first, inputs, groups, now)
        return {path: removed[path] | new[path] for path in removed}

    due = (updates > begin) & ((updates < end) & ((updates - begin) % every == 0) | (updates == end))
    return jax.lax.cond(due, more, lambda: removed)


def _map_with_path(function: Any, tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda key_path, leaf: function(parameters.path_of(key_path), leaf), tree)
