"""Pruning after training: the least important weights of projections become zero."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.config.arguments import check_model
from jaxlm.config.pruning import Scope
from jaxlm.config.ranges import ShareBelowOne, check_argument
from jaxlm.errors import UserError
from jaxlm.lm import LM, with_params
from jaxlm.nn import nodes, parameters
from jaxlm.transforms.calibration import Moments, input_moments
from jaxlm.transforms.masks import Grouping, grouping, lowest, removals
from jaxlm.transforms.sparsegpt import sparsegpt

Method = Literal["magnitude", "wanda", "sparsegpt"]
_SCOPES: dict[Method, tuple[Scope, ...]] = {  # the first is the default
    "magnitude": ("layer", "global", "output"),
    "wanda": ("output", "layer"),
    "sparsegpt": ("layer", "output"),
}


def prune(
    lm: LM,
    sparsity: float | None = None,
    *,
    method: Method = "magnitude",
    scope: Scope | None = None,
    pattern: str | None = None,
    targets: str = "all",
    calibration: Any = None,
    length: int | None = None,
    max_tokens: int | None = None,
) -> LM:
    """Returns the model with a fraction of the weights of its projections set to zero.

    Methods: "magnitude" removes the smallest weights. "wanda" removes the weights with the smallest product of
    magnitude and norm of the input. "sparsegpt" removes the weights with the smallest effect on the output and updates
    the remaining ones to compensate. All moments are those of the model before pruning, in one pass over the texts.
    Only "magnitude" removes weights of routed experts.

    Args:
      lm: the model.
      sparsity: the fraction of removed weights; None: 0.5, or that of the pattern.
      method: magnitude, wanda or sparsegpt.
      scope: where the fraction holds: "layer", in each matrix of each layer; "output", for each output of a matrix; or
        "global", over all matrices together (magnitude only). SparseGPT applies it to each block of 128 inputs. None:
        "output" for wanda, else "layer".
      pattern: N:M, such as "2:4": of M consecutive inputs of each output N remain; replaces the scope.
      targets: the matrices, by parts of their paths, separated by commas, such as "mlp,query"; "all": all projections.
      calibration: texts or token ids for wanda and sparsegpt; see `calibration_rows`. 128 rows of 2,048 tokens are
        customary.
      length: tokens in a row of the calibration data; None: the model's positions, 2,048 at most.
      max_tokens: number of tokens after which no further text is read; None: 262,144.

    Returns:
      A new model with dense arrays that contain zeros; `lm` is unchanged.

    Raises:
      UserError: for a sparsity outside [0, 1) or one that leaves a group without weights, a pattern that does not
        divide the inputs, targets that match nothing or are low-rank or quantised, a scope that the method does not
        support, and calibration data that is missing or too short.

    Source: Sun et al. 2023 (Wanda), section 3; Frantar and Alistarh 2023 (SparseGPT), algorithm 1.
    """
    check_model("lm", lm)
    sparsity = check_argument("sparsity", sparsity, ShareBelowOne | None)
    method = check_argument("method", method, Method)
    groups = grouping(sparsity, _scope(method, scope, pattern), check_argument("pattern", pattern, str | None))
    if method == "magnitude" and calibration is not None:
        raise UserError("method magnitude uses no calibration data; leave it out, or set method to wanda or sparsegpt")
    if method != "magnitude" and calibration is None:
        raise UserError(f"method {method} requires calibration data; give texts as calibration, or choose magnitude")
    weights = matrices(lm.params, check_argument("targets", targets, str), experts=method == "magnitude")
    rows = {path: parameters.find(path) for path in weights}
    inputs = {path: row.inputs or 1 for path, row in rows.items() if row is not None}
    counts = removals({path: weight.shape for path, weight in weights.items()}, inputs, groups)
    zero_lowest = partial(_zero_lowest, weights, inputs=inputs, groups=groups, counts=counts)
    if method == "magnitude":
        changed = zero_lowest({path: jnp.abs(weight) for path, weight in weights.items()})
        return with_params(lm, _replace(lm.params, changed))
    settings: dict[str, Any] = {"length": length, "max_tokens": max_tokens, "paths": weights.keys()}
    moments = input_moments(lm, calibration, **settings, diagonal=method == "wanda")
    _check_moments(weights, moments)
    if method == "wanda":
        changed = zero_lowest({path: _wanda(weights[path], moments[path]) for path in weights})
    else:
        changed = {path: sparsegpt(weights[path], moments[path].sums, groups) for path in weights}
    return with_params(lm, _replace(lm.params, changed))


def sparsity_of(lm: LM, targets: str = "all") -> dict[str, float]:
    """Returns the fraction of zeros in each projection, by path.

    Args:
      lm: the model.
      targets: as for `prune`.

    Raises:
      UserError: for targets that match nothing.
    """
    leaves = parameters.by_path(lm.params, whole_nodes=True)
    paths = parameters.projections(lm.params, targets, experts=True)
    dense = lambda path: nodes.dense_layers(leaves[path], parameters.stacked_axes(path))
    return {path: float(1 - jnp.count_nonzero(w := dense(path)) / w.size) for path in paths}


def matrices(params: Any, targets: str, experts: bool = False) -> dict[str, jax.Array]:
    """Returns the dense projections that `targets` selects, [L, I..., O...], by path.

    With `experts` also the matrices of routed experts, [L * X, I, O].

    Raises:
      UserError: if the targets match nothing, a parameter of the model is a node, or a weight is not finite.
    """
    paths = parameters.projections(params, targets, experts)
    check_dense(params)
    leaves = parameters.by_path(params)
    merge = lambda path, leaf: leaf.reshape(-1, *leaf.shape[parameters.stacked_axes(path) :])
    weights = {path: merge(path, jnp.asarray(leaves[path])) for path in paths}
    for path, weight in weights.items():
        if not bool(jnp.isfinite(weight).all()):
            raise UserError(f"{path} has weights that are not finite; choose an undamaged model")
    return weights


def check_dense(params: Any) -> None:
    """Raises UserError if a parameter of the model is a node."""
    for path, leaf in parameters.by_path(params, whole_nodes=True).items():
        if nodes.is_node(leaf):
            raise UserError(
                f"{path} is of the kind {type(leaf).__name__}, and only dense weights can be pruned; make them dense "
                f"with jaxlm.merge(lm, dequantize=True), or prune first"
            )


def _scope(method: Method, scope: Any, pattern: Any) -> Scope:
    scope = check_argument("scope", scope, Scope | None)
    if pattern is not None and scope is not None:
        raise UserError(f"scope is {scope!r} and pattern {pattern!r}; a pattern replaces the scope: leave out one")
    if scope is not None and scope not in _SCOPES[method]:
        raise UserError(f"scope is {scope!r}; method {method} supports {' and '.join(_SCOPES[method])}")
    return scope or _SCOPES[method][0]


def _check_moments(weights: Mapping[str, jax.Array], moments: Mapping[str, Moments]) -> None:
    for path in weights:
        if path not in moments:
            raise UserError(f"the model does not multiply by {path}; choose targets without it, or method magnitude")
        if not bool(jnp.isfinite(moments[path].sums).all()):
            raise UserError(f"the inputs of {path} are not finite on the calibration data; check the model's weights")


def _replace(params: Any, changed: Mapping[str, jax.Array]) -> Any:
    """Returns the parameters with other arrays at some paths, in the dtype of the old ones."""

    def leaf_of(key_path: tuple[Any, ...], leaf: Any) -> Any:
        new = changed.get(parameters.path_of(key_path))
        return leaf if new is None else new.astype(leaf.dtype).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(leaf_of, params)


def _zero_lowest(
    weights: Mapping[str, jax.Array],
    scores: Mapping[str, jax.Array],
    inputs: dict[str, int],
    groups: Grouping,
    counts: dict[str, int],
) -> dict[str, jax.Array]:
    """Returns the weights with zeros for the lowest scores of each group."""
    removed = jax.jit(partial(lowest, inputs=inputs, groups=groups, counts=counts))(scores)
    return {path: jnp.where(removed[path], 0, weight) for path, weight in weights.items()}


def _wanda(weight: jax.Array, moments: Moments) -> jax.Array:
    """Returns |W| times the root mean square of each input; Sun et al. 2023, equation 1, up to a constant factor."""
    rms_LJ = jnp.sqrt(moments.sums / moments.tokens_L[:, None])
    scores_LJO = jnp.abs(weight.astype(jnp.float32)).reshape(*rms_LJ.shape, -1) * rms_LJ[..., None]
    return scores_LJO.reshape(weight.shape)
