"""Selection of the weights that pruning removes: those with the lowest scores of each group.

A group is a matrix of one layer, the inputs of one output, M consecutive inputs of one output, or all matrices. Numbers
of removed weights are exact: of equal scores, the first are removed. Only integers are added up, so that the selection
is the same on any number of devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config.pruning import Scope, implied_sparsity, parse_pattern
from jaxlm.errors import UserError

_MAX_GLOBAL = 2**31 - 1  # weights that one 32-bit number can count


class Grouping(NamedTuple):
    """How weights are grouped.

    Attributes:
      sparsity: the fraction of removed weights.
      scope: "layer", the matrix of one projection of one layer; "output", the inputs of one of its outputs; or
        "global", all matrices.
      pattern: (N, M), which replaces `scope`: N of M consecutive inputs of an output remain.
    """

    sparsity: float
    scope: Scope
    pattern: tuple[int, int] | None = None


def grouping(sparsity: float | None, scope: Scope, pattern: str | None) -> Grouping:
    """Returns the grouping for a user's arguments; `sparsity` is None, or 0.5, if the pattern decides it.

    Raises:
      UserError: for a pattern that is not N:M, and a sparsity that is not that of the pattern.
    """
    if not pattern:
        return Grouping(0.5 if sparsity is None else sparsity, scope)
    return Grouping(implied_sparsity(sparsity, pattern), scope, parse_pattern(pattern))


def removals(shapes: Mapping[str, tuple[int, ...]], inputs: Mapping[str, int], groups: Grouping) -> dict[str, int]:
    """Returns the number of removed weights in each group of each matrix.

    Args:
      shapes: [L, I..., O...] of each matrix, by path.
      inputs: the number of axes I of each matrix.
      groups: the grouping; if its scope is "global", all matrices have the same number, for the only group.

    Raises:
      UserError: if a group would have no weights left, or the pattern does not divide the inputs of a matrix.
    """
    total = sum(math.prod(shape) for shape in shapes.values())
    if groups.scope == "global" and not groups.pattern and total > _MAX_GLOBAL:
        raise UserError(f"scope is 'global', but there are {total} weights, more than {_MAX_GLOBAL}; choose 'layer'")
    found = {}
    for path, shape in shapes.items():
        width = math.prod(shape[1 : 1 + inputs[path]])
        if groups.pattern:
            remain, size = groups.pattern
            if width % size:
                raise UserError(
                    f"pattern is {remain}:{size}, but {path} has {width} inputs, which {size} does not divide; choose "
                    f"targets without it, or no pattern"
                )
            found[path] = size - remain
            continue
        size = {"global": total, "layer": math.prod(shape[1:]), "output": width}[groups.scope]
        found[path] = round(groups.sparsity * size)
        if found[path] == size:
            raise UserError(
                f"sparsity is {groups.sparsity}, which leaves none of the {size} weights in a group of {path}; lower it"
            )
    return found


def lowest(
    scores: Mapping[str, jax.Array],
    inputs: Mapping[str, int],
    groups: Grouping,
    counts: Mapping[str, Any],
) -> dict[str, jax.Array]:
    """Returns a bool array for each matrix, True for the weights to remove: those with the lowest scores of each group.

    Args:
      scores: [L, I..., O...] of each matrix, by path; float32 without NaN.
      inputs: the number of axes I of each matrix.
      groups: the grouping.
      counts: the number of removed weights in each group, as `removals` returns it; may be traced.
    """
    keys = {path: _ordered(score) for path, score in scores.items()}
    if groups.scope == "global" and not groups.pattern:
        found = _lowest([keys[path] for path in scores], next(iter(counts.values())), None)
        return dict(zip(scores, found))
    removed = {}
    for path, key in keys.items():
        L, width = key.shape[0], math.prod(key.shape[1 : 1 + inputs[path]])
        size = groups.pattern[1] if groups.pattern else key[0].size if groups.scope == "layer" else width
        view = key.reshape(L, -1, size, 1 if size == key[0].size else key[0].size // width)
        removed[path] = _lowest([view], counts[path], 2)[0].reshape(key.shape)
    return removed


def _ordered(scores: jax.Array) -> jax.Array:
    """Returns int32 numbers in the order of float32 scores."""
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0, scores).astype(jnp.float32), jnp.int32)
    return bits ^ ((bits >> 31) & np.int32(2**31 - 1))


def _lowest(keys: list[jax.Array], count: Any, axis: int | None) -> list[jax.Array]:
    """Returns where the `count` lowest keys are, along an axis of the only array, or of all arrays if it is None.

    Bisection finds the largest of these keys: unlike sorting, it moves no sharded data and requires no memory.
    """

    def total(masks: list[jax.Array]) -> Any:
        return sum(mask.sum(axis, dtype=jnp.int32, keepdims=axis is not None) for mask in masks)

    def bisect(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = total([key <= middle for key in keys]) >= count
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    limits = jnp.iinfo(jnp.int32)
    start = jnp.zeros_like(total([key < 0 for key in keys]))
    _, last = jax.lax.fori_loop(0, 32, bisect, (start + limits.min, start + limits.max))
    ties = [key == last for key in keys]
    rest = count - total([key < last for key in keys])  # how many of the equal keys
    found = []
    for key, tie in zip(keys, ties):
        number = jnp.cumsum(tie, axis, dtype=jnp.int32).reshape(tie.shape)
        found.append((key < last) | (tie & (number <= rest)))
        rest = rest if axis is not None else rest - number.max(initial=0)
    return found
