"""The model, the state and the step of a run on a mesh.

`fit` runs the step; `plan` compiles the same step for chips that this machine does not have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlm.config import ModelConfig, RunConfig
from jaxlm.data.batches import Batch
from jaxlm.devices import hosts, sharding
from jaxlm.errors import UserError
from jaxlm.nn import flops, parameters
from jaxlm.nn.transformer import Transformer, init
from jaxlm.run.nodes import nodes_of
from jaxlm.run.optimizer import make_optimizer, make_schedule, trained
from jaxlm.run.privacy import private_gradient
from jaxlm.run.resolve import ResolvedModel
from jaxlm.run.step import TrainState, leading, make_train_step
from jaxlm.tasks.task import Task


class Assembly(NamedTuple):
    """The functions of a run on a mesh, before anything is compiled or allocated.

    like: shapes and shardings of the state.  first_state(key) -> a randomly initialised TrainState, sharded so.
    state_of(params, key) -> the first TrainState with these parameters, whose buffers are donated.
    dense: shapes and shardings of the parameters before nodes replace some of them, by path.
    draw(key, paths) -> some of these parameters, randomly initialised, by path.
    adapt(key, path, leaf) -> the node of one of these parameters, whose buffer is donated, or the parameter itself.
    train_step(state, batch) -> (state, metrics); the buffers of the old state are donated.
    """

    module: Transformer
    like: TrainState
    first_state: Callable[[jax.Array], TrainState]
    state_of: Callable[[Any, jax.Array], TrainState]
    dense: dict[str, jax.ShapeDtypeStruct]
    draw: Callable[[jax.Array, Sequence[str]], dict[str, jax.Array]]
    adapt: Callable[[jax.Array, str, jax.Array], Any]
    train_step: TrainStep


class TrainStep:
    """A compiled training step: (state, batch) -> (state, metrics).

    The buffers of the old state are donated, except its frozen part, which the new state shares.
    """

    def __init__(self, train_step: Callable[[TrainState, Batch], tuple[TrainState, Any]], shardings: Any, metrics: Any):
        """shardings: of each leaf of the state.  metrics: the sharding of the metrics."""

        def step_without_frozen(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Any]:
            state, metrics = train_step(state._replace(frozen=frozen), batch)
            return state._replace(frozen=None), metrics

        changed = shardings._replace(frozen=None)
        self._compiled = jax.jit(
            functools.wraps(train_step)(step_without_frozen),
            donate_argnums=0,
            in_shardings=(changed, shardings.frozen, None),  # the batch is sharded by `shard_batch`
            out_shardings=(changed, metrics),
        )

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        """Returns the next state and the metrics of the step."""
        new, metrics = self._compiled(state._replace(frozen=None), state.frozen, batch)
        return new._replace(frozen=state.frozen), metrics

    def trace(self, state: Any, batch: Any) -> Any:
        """Returns the traced step for arrays or shapes, as `jax.jit(...).trace` does."""
        return self._compiled.trace(state._replace(frozen=None), state.frozen, batch)


def remat_of(run: RunConfig, mesh: Mesh) -> str:
    """Returns what the backward pass recomputes on this mesh: a key of `REMAT`.

    An accelerator recomputes elementwise operations faster than it reads their results from memory; a CPU does not.
    """
    if run.remat != "auto":
        return run.remat
    return "none" if mesh.devices.flat[0].platform == "cpu" else "elementwise"


def unroll_of(run: RunConfig, config: ModelConfig, mesh: Mesh) -> int:
    """Returns the number of layers in one iteration of the loop over layers on this mesh.

    A loop copies what each iteration keeps for the backward pass. On an H100, GPT-2 trains a third faster with all 12
    layers in one iteration than with 1, and a step of BERT-large moves a third less memory with 24 rather than 4
    (benchmarks/RESULTS.md). More layers take long to compile.
    """
    if run.unroll:
        return run.unroll
    gpu = mesh.devices.flat[0].platform in ("gpu", "cuda", "rocm")
    return 1 if not gpu else config.layers if config.layers <= 24 else 4


def assemble(resolved: ResolvedModel) -> Assembly:
    """Returns the functions of a run.

    Raises:
      UserError: where the mesh does not divide the batch, the length or a parameter.
    """
    run, mesh, config = resolved.run, resolved.mesh, resolved.model
    check_rows(run, mesh)
    dtype, remat, unroll = jnp.dtype(run.compute_dtype), remat_of(run, mesh), unroll_of(run, config, mesh)
    module = resolved.kind(
        config, sharding.Placement(mesh), dtype, remat, unroll, run.attention, precision=run.matmul_precision
    )
    # The gradients of single rows are mapped over the rows, whose placement the compiler then derives from the batch.
    of_rows = module.clone(constrain=sharding.Placement(), kernel="xla")
    # Those of a teacher belong to the state, but not to the model.
    init_dense = lambda key: init(module, key) | resolved.task.more_params(module, key)
    dense_shapes = jax.eval_shape(init_dense, jax.random.key(0))
    nodes = nodes_of(run, dense_shapes)
    shapes = jax.eval_shape(nodes.add, dense_shapes, jax.random.key(0))
    schedule = make_schedule(run.optimizer, run.steps)
    optimizer = make_optimizer(run.optimizer, run.steps, shapes, mesh, run.adapter, run.prune, config)
    is_trained = trained(run.optimizer, shapes, run.adapter, config)
    all_trained = all(jax.tree.leaves(is_trained))

    def state_of(params: Any, key: jax.Array) -> TrainState:
        params, frozen = parameters.split(params, is_trained)
        return TrainState(jnp.int32(0), params, optimizer.init(params), key, None if all_trained else frozen)

    def first_state(key: jax.Array) -> TrainState:
        own_key = jax.random.wrap_key_data(key)
        return state_of(nodes.add(init_dense(own_key), own_key), key)

    like = with_shardings(jax.eval_shape(first_state, jax.random.key_data(jax.random.key(0))), mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)

    dense = parameters.by_path(shard_params(dense_shapes, mesh))
    nodes_by_path = parameters.by_path(shardings.parameters, whole_nodes=True)

    def draw(key: jax.Array, paths: Sequence[str]) -> dict[str, jax.Array]:
        select = lambda leaves: {path: leaf for path, leaf in leaves.items() if path in paths}
        selected_params = lambda key: select(parameters.by_path(init_dense(jax.random.wrap_key_data(key))))
        return jax.jit(selected_params, out_shardings={path: dense[path].sharding for path in select(dense)})(key)

    def adapt(key: jax.Array, path: str, leaf: jax.Array) -> Any:
        if path not in nodes.rows:
            return leaf
        make = lambda leaf, key: nodes.make(nodes.rows[path], leaf, jax.random.wrap_key_data(key))
        return jax.jit(make, out_shardings=nodes_by_path[path], donate_argnums=0)(leaf, key)

    if resolved.budget is None:
        step = make_train_step(resolved.task, module, optimizer, schedule)
    else:
        clipped = private_gradient(resolved.budget.clip, resolved.budget.noise, resolved.budget.batch)
        step = make_train_step(resolved.task, of_rows, optimizer, schedule, clipped, own_means=True)
    return Assembly(
        module,
        like,
        jax.jit(first_state, out_shardings=shardings),
        jax.jit(state_of, out_shardings=shardings, donate_argnums=0),
        dense,
        draw,
        adapt,
        TrainStep(step, shardings, sharding.replicated(mesh)),
    )


def closed_flops(task: Task, config: ModelConfig, rows: int, fields: Mapping[str, Any], *, blocks: bool = False) -> int:
    """Returns the model FLOPs of a training step by `flops.closed`, if all parameters are trained.

    Args:
      task: the task of the run.
      config: the model.
      rows: rows in a batch.
      fields: arrays or shapes of a batch, by name; only their last axes matter.
      blocks: as in `flops.closed`.
    """
    length = fields["segments_BT"].shape[-1]
    source = fields["source_segments_BS"].shape[-1] if "source_segments_BS" in fields else None
    E = fields["starts_BE"].shape[-1] if "starts_BE" in fields else 0
    # Number of positions of a row that pass through each head.
    each = {"masked_lm": getattr(task, "predictions", length), "next_sentence": E, "pooled": E, "classes": E}
    # `flops.closed` counts the pooled vector with the next-sentence head, which reads it.
    below = {"pooled"} if "next_sentence" in config.heads_on_top else set()
    heads: dict[str, int] = {head: each.get(head, length) for head in config.heads_on_top if head not in below}
    targets = getattr(task, "targets", 0)
    if targets:
        heads["lm"] = targets
    of_rows: dict[str, Any] = {"heads": heads, "targets": targets, "blocks": blocks}
    forward = lambda model: flops.model_flops(model, rows, length, source, **of_rows)
    return forward(config).step + (forward(task.teacher).total if task.teacher else 0)


def check_rows(run: RunConfig, mesh: Mesh) -> None:
    """Raises UserError where the mesh does not divide the rows or the length of a micro-batch."""
    ways = sharding.ways(mesh, "batch") * run.accumulate
    # `shard_batch` pads a batch size that is computed: from `examples`, or for a private run.
    if run.batch % ways and not run.examples and not run.privacy.is_on:
        raise UserError(
            f"the mesh {dict(mesh.shape)} does not divide batch {run.batch} in {run.accumulate} micro-batch(es); "
            f"the nearest batch that it divides: --batch {_nearest(run.batch, ways)}"
        )
    for name, length in (
        ("data.length", run.data.length),
        ("task.source_length", getattr(run.task, "source_length", 0)),
    ):
        if length % (ways := sharding.ways(mesh, "length")):
            raise UserError(
                f"the mesh axis context {ways} does not divide {name} {length}; "
                f"the nearest length that it divides: --{name.replace('_', '-')} {_nearest(length, ways)}"
            )


def _nearest(size: int, ways: int) -> str:
    below = size - size % ways
    return f"{below} or {below + ways}" if below else f"{ways}"


def shard_batch(mesh: Mesh, batch: Batch, k: int) -> Batch:
    """Returns a batch [B, ...] on the mesh, as k micro-batches [k, B / k, ...].

    Rows of padding fill it up where the mesh does not divide B. Each of many hosts passes the rows of `local_rows`.
    """
    more = -leading(batch) % (k * sharding.ways(mesh, "batch"))

    def shard(name: str, x: np.ndarray) -> jax.Array:
        padded = np.concatenate([x, np.zeros((more, *x.shape[1:]), x.dtype)]) if more else x
        micro = padded.reshape(k, -1, *x.shape[1:])
        return hosts.shard(micro, sharding.batch_sharding(mesh, name, micro.shape))

    return {name: shard(name, x) for name, x in batch.items()}


def local_rows(mesh: Mesh, rows: int, k: int) -> list[int]:
    """Returns the rows of a batch that `shard_batch` places on the devices of this host.

    Args:
      mesh: the devices.
      rows: rows in a batch.
      k: micro-batches in a batch.
    """
    micro = -(-rows // (k * sharding.ways(mesh, "batch"))) * sharding.ways(mesh, "batch")
    index_kB = np.arange(k * micro).reshape(k, micro)
    slices = sharding.batch_sharding(mesh, "B").addressable_devices_indices_map((k, micro))
    local = np.unique([index_kB[index] for index in slices.values() if index is not None])
    return [int(row) for row in local if row < rows]


def shard_params(shapes: Any, mesh: Mesh) -> Any:
    """Returns the shapes of parameters with the shardings of the table of parameters."""

    def shard(key_path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, row: parameters.Parameter) -> Any:
        placed = sharding.sharding(mesh, row.axes, leaf.shape, parameters.path_of(key_path))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)

    return jax.tree_util.tree_map_with_path(shard, shapes, parameters.rows(shapes))


def with_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Returns the shapes of a state with shardings. An optimizer's leaf is sharded like the parameter it belongs to."""
    shapes = {path: leaf.shape for path, leaf in parameters.by_path(state.parameters).items()}
    rows = parameters.rows_by_path(state.parameters)

    def shard(key_path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        path = parameters.path_of(key_path)
        # An optimizer may store a leaf that is smaller than its parameter, such as factored moments.
        row = rows[path] if leaf.shape == shapes.get(path) else None
        axes = row.axes if row else (None,) * leaf.ndim
        placed = sharding.sharding(mesh, axes, leaf.shape, path or "the optimizer's state")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)

    return jax.tree_util.tree_map_with_path(shard, state)
