"""The optax chain of a run: clipping, preconditioning, weight decay, layer-wise rates and schedule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxlm.config import NO_ADAPTER, NO_PRUNING, AdapterConfig, ModelConfig, OptimizerConfig, PruneConfig
from jaxlm.devices import sharding
from jaxlm.nn import parameters
from jaxlm.nn.layer_parts import layers_of_rows
from jaxlm.run.pruning import with_pruning
from jaxlm.transforms import adapters

_MIN_FACTORED = 128  # Adafactor does not factor the second moments of matrices with a smaller side, as in optax


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step: linear warm-up, then the decay that `config.schedule` names.

    Args:
      config: its `rate` is the peak, and `final` the fraction of it at the end; `warmup` is a number of steps, or,
        below 1, a fraction of all steps.
      steps: number of steps of the run.
    """
    warmup = round(config.warmup * steps) if config.warmup < 1 else round(config.warmup)
    rest, last = max(1, steps - warmup), config.rate * config.final
    peak = max(1, warmup)
    decay = min(rest, max(1, round(config.decay_share * steps)))
    after = {
        "constant": lambda: optax.constant_schedule(config.rate),
        "linear": lambda: optax.linear_schedule(config.rate, last, rest),
        "cosine": lambda: optax.cosine_decay_schedule(config.rate, rest, config.final),
        # Vaswani et al. 2017, section 5.3, scaled so that its peak is the rate.
        "inverse_sqrt": lambda: lambda step: config.rate * (peak / (jnp.maximum(step, 0) + peak)) ** 0.5,
        "warmup_stable_decay": lambda: optax.join_schedules(
            [optax.constant_schedule(config.rate), optax.linear_schedule(config.rate, last, decay)],
            [rest - decay],
        ),
    }[config.schedule]()
    # Warm-up starts at rate / (warmup + 1) instead of 0, so that the first step changes the parameters.
    rise = optax.linear_schedule(config.rate / (warmup + 1), config.rate, warmup)
    return optax.join_schedules([rise, after], [warmup]) if warmup else after


def rates(config: OptimizerConfig, params: Any, model: ModelConfig | None = None) -> Any:
    """Returns the factor of the learning rate for each leaf.

    With layer decay d and L layers, it is 1 for the heads, d^(L + 1 - l) for layer l = 1..L, and d^(L + 1) for the
    embeddings. It is 0 for frozen parameters.

    Args:
      config: its `layer_decay`, `freeze` and `freeze_layers`.
      params: all parameters of the model, arrays or shapes.
      model: the model's config; None: all layers have the same parameters.

    Returns:
      A tree of float32 arrays: scalars, or [L, 1, ...] for the leaves of stacked layers.
    """

    def rate(key_path: tuple[Any, ...], row: parameters.Parameter, leaf: Any) -> np.ndarray:
        if row.depth in ("head", "teacher"):
            return np.array(row.depth == "head", np.float32)
        frozen_below = config.freeze == "all_but_heads"
        if row.depth == "embeddings":
            frozen = frozen_below or config.freeze == "embeddings" or config.freeze_layers > 0
            return np.array(0 if frozen else config.layer_decay ** (layers + 1), np.float32)
        layer_L = np.arange(leaf.shape[0])
        count = leaf.shape[0]
        if model is not None and model.has_mixed_layers:
            layer_L, count = np.array(layers_of_rows(model, parameters.path_of(key_path), count)), model.layers
        factor_L = config.layer_decay ** (count - layer_L).astype(np.float32)
        factor_L[layer_L < (count if frozen_below else config.freeze_layers)] = 0
        return factor_L.reshape(-1, *[1] * (leaf.ndim - 1))

    rows = parameters.rows(params)
    layers = max(
        (leaf.shape[0] for row, leaf in zip(_leaves(rows), jax.tree.leaves(params)) if row.depth == "layers"),
        default=0,
    )
    return jax.tree_util.tree_map_with_path(rate, rows, params, is_leaf=parameters.is_row)


def trained(
    config: OptimizerConfig, params: Any, adapter: AdapterConfig = NO_ADAPTER, model: ModelConfig | None = None
) -> Any:
    """Returns for each leaf whether the run trains it, in at least one layer.

    Args:
      config: its `freeze` and `freeze_layers`.
      params: all parameters of the model, arrays or shapes.
      adapter: the adapter of the run.
      model: the model's config; None: all layers have the same parameters.

    Returns:
      A tree of bools.
    """
    has_rate = jax.tree.map(lambda factor: bool(np.any(factor)), rates(config, params, model))
    return jax.tree.map(lambda by_adapter, own: by_adapter and own, adapters.trained(adapter, params), has_rate)


def make_optimizer(
    config: OptimizerConfig,
    steps: int,
    params: Any,
    mesh: Mesh | None = None,
    adapter: AdapterConfig = NO_ADAPTER,
    prune: PruneConfig = NO_PRUNING,
    model: ModelConfig | None = None,
) -> optax.GradientTransformation:
    """Returns the optimizer of a run.

    Args:
      config: the optimizer.
      steps: number of steps of the run.
      params: all parameters of the model, arrays or shapes.
      mesh: the mesh over which Muon splits the layers; None: each device computes the updates of all layers.
      adapter: the adapter of the run.
      prune: the pruning of the run.
      model: the model's config; None: all layers have the same parameters.

    Returns:
      A transformation of the trained part of the parameters, as `parameters.split` returns it with `trained`. Its state
      has the norm of the gradient before clipping, under `grad_norm`.
    """
    is_trained = trained(config, params, adapter, model)
    factor, _ = parameters.split(rates(config, params, model), is_trained)
    params, _ = parameters.split(params, is_trained)
    decays = jax.tree.map(lambda row: row.decays, parameters.rows(params), is_leaf=parameters.is_row)
    partly_frozen = any(np.any(f == 0) and np.any(f) for f in jax.tree.leaves(factor))
    parts = [
        # Frozen layers of a stacked leaf do not change and do not count in the norm.
        _scale(jax.tree.map(np.sign, factor)) if partly_frozen else optax.identity(),
        optax.snapshot("grad_norm", optax.tree.norm),
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        _direction(config, params, mesh),
        _scale_by_parameter_rms(params) if config.relative else optax.identity(),
        optax.add_decayed_weights(config.weight_decay, decays) if config.weight_decay else optax.identity(),
        _scale(factor) if any(np.any(f != 1) for f in jax.tree.leaves(factor)) else optax.identity(),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    ]
    return with_pruning(optax.chain(*parts), prune, steps, params)


def _direction(config: OptimizerConfig, params: Any, mesh: Mesh | None) -> optax.GradientTransformation:
    """Returns the transformation of a gradient into a direction whose entries are about 1 in size."""
    momentum_dtype = None if config.momentum_dtype == "float32" else jnp.bfloat16
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon, mu_dtype=momentum_dtype)
    if config.name == "adamw":
        return adam
    if config.name == "lion":
        return optax.scale_by_lion(config.beta1, config.beta2, mu_dtype=momentum_dtype)
    if config.name == "adafactor":
        return _adafactor(params)

    return _muon(config, params, adam, momentum_dtype, mesh)


def _muon(
    config: OptimizerConfig, params: Any, adam: optax.GradientTransformation, momentum_dtype: Any, mesh: Mesh | None
) -> optax.GradientTransformation:
    """Returns Muon for the matrices of the layers, each layer by itself, and Adam for the rest (Jordan et al. 2024).

    The factor 0.2 sqrt(max(inputs, outputs)) makes its updates as large as those of Adam (Liu et al. 2025). Each device
    orthogonalises some of the layers: otherwise all devices of a data-parallel run would do the same work.
    """

    def dimensions(row: parameters.Parameter) -> optax.contrib.MuonDimensionNumbers | None:
        if not row.inputs:
            return None
        axes = range(1, len(row.axes))
        return optax.contrib.MuonDimensionNumbers(tuple(axes[: row.inputs]), tuple(axes[row.inputs :]))

    for_rows = partial(jax.tree.map, is_leaf=parameters.is_row)
    rows = parameters.rows(params)
    orthogonalise = optax.contrib.scale_by_muon(
        beta=config.beta1,
        mu_dtype=momentum_dtype,
        weight_dimension_numbers=lambda tree: for_rows(dimensions, parameters.rows(tree)),
    )
    size = for_rows(lambda row, leaf: 0.2 * max(_matrix(row, leaf)) ** 0.5, rows, params)
    labels = for_rows(lambda row: "muon" if row.inputs else "adam", rows)
    split = (lambda leaf: leaf) if mesh is None else partial(sharding.split_layers, mesh)
    split_updates = optax.stateless(lambda updates, _: jax.tree.map(split, updates))
    return optax.partition({"muon": optax.chain(split_updates, orthogonalise, _scale(size)), "adam": adam}, labels)


class _LayerStates(NamedTuple):
    """Optimizer states of single parameters.

    leaves: the parameter tree with a state in place of each leaf; the state of a stacked leaf has a leading axis L.
    """

    leaves: Any


def _adafactor(params: Any) -> optax.GradientTransformation:
    """Returns the direction of Adafactor, for which each layer of a stacked leaf is a separate parameter.

    A projection is factored as the matrix from its inputs to its outputs: [D, H, C] as [D, H C]. The root mean square
    of the update of one layer of one parameter is clipped to 1 (Shazeer and Stern 2018, algorithm 4).
    """
    rows = parameters.rows(params)
    structure: Any = jax.tree.structure(rows, is_leaf=parameters.is_row)

    def matrix_view(row: parameters.Parameter, leaf: Any) -> tuple[tuple[int, ...], optax.GradientTransformation]:
        """Returns the shape of the moments of one layer, and the transformation."""
        shape = leaf.shape[row.depth == "layers" :]
        matrix = _matrix(row, leaf) if row.inputs else shape
        factored = len(matrix) > 1 and sorted(matrix)[-2] >= _MIN_FACTORED
        # Moments that are not factored have the axes of the parameter, and so its sharding.
        direction = optax.scale_by_factored_rms(factored, min_dim_size_to_factor=_MIN_FACTORED)
        return matrix if factored else shape, optax.chain(direction, optax.clip_by_block_rms(1.0))

    def per_layer(method: str, row: parameters.Parameter, *arguments: Any) -> Any:
        """Applies `init` or `update` to one leaf; the first and last arguments are arrays of the parameter's shape."""
        shape, transformation = matrix_view(row, arguments[-1])
        stacked = row.depth == "layers"
        reshape = lambda x: x.reshape(*x.shape[:stacked], *shape) if isinstance(x, jax.Array) else x
        apply: Callable[..., Any] = getattr(transformation, method)
        return (jax.vmap(apply) if stacked else apply)(*map(reshape, arguments))

    def init(params: Any) -> _LayerStates:
        leaf_state = lambda row, p: p if isinstance(p, optax.MaskedNode) else per_layer("init", row, p)
        return _LayerStates(jax.tree.map(leaf_state, rows, params, is_leaf=parameters.is_row))

    def update(updates: Any, state: _LayerStates, params: Any) -> tuple[Any, _LayerStates]:
        directions, states = [], []
        trees = (structure.flatten_up_to(tree) for tree in (updates, state.leaves, params))
        for row, u, leaf_state, p in zip(_leaves(rows), *trees, strict=True):
            if not isinstance(u, optax.MaskedNode):
                direction, leaf_state = per_layer("update", row, u, leaf_state, p)
                u = direction.reshape(p.shape)
            directions.append(u)
            states.append(leaf_state)
        return structure.unflatten(directions), _LayerStates(structure.unflatten(states))

    return optax.GradientTransformation(init, update)


def _scale_by_parameter_rms(params: Any) -> optax.GradientTransformation:
    """Multiplies the direction of each layer of each parameter by the parameter's root mean square, at least 1e-3.

    Source: Shazeer and Stern 2018, algorithm 4.
    """
    rows = parameters.rows(params)

    def update(updates: Any, params: Any) -> Any:
        def scale(row: parameters.Parameter, u: Any, p: Any) -> Any:
            if isinstance(u, optax.MaskedNode):
                return u
            axes = tuple(range(row.depth == "layers", p.ndim))
            return u * jnp.maximum(jnp.sqrt(jnp.square(p).mean(axes, keepdims=True)), 1e-3)

        return jax.tree.map(scale, rows, updates, params, is_leaf=parameters.is_row)

    return optax.stateless(update)


def _matrix(row: parameters.Parameter, leaf: Any) -> tuple[int, int]:
    """Returns the numbers of inputs and outputs of the projection in one layer."""
    shape = leaf.shape[1:]
    return int(np.prod(shape[: row.inputs])), int(np.prod(shape[row.inputs :]))


def _scale(factors: Any) -> optax.GradientTransformation:
    """Multiplies each leaf by its factor, which broadcasts; leaves that are masked by a partition stay masked."""

    def update(updates: Any, params: Any) -> Any:
        del params
        is_masked = lambda leaf: isinstance(leaf, optax.MaskedNode)
        return jax.tree.map(lambda u, f: u if is_masked(u) else u * f, updates, factors, is_leaf=is_masked)

    return optax.stateless(update)


def _leaves(rows: Any) -> list[parameters.Parameter]:
    return jax.tree.leaves(rows, is_leaf=parameters.is_row)
