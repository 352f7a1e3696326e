"""What a run compiles: the model, its state and its step, laid out on a mesh.

`fit` runs it; `plan` compiles the same for chips that are not there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from jaxlm.run.optimizer import make_optimizer, make_schedule, trained
from jaxlm.run.step import TrainState, leading, make_train_step
from jaxlm.tasks.task import Task


class Assembly(NamedTuple):
    """The parts of a run on a mesh, before anything is compiled or allocated.

    like: the state's shapes, each with its sharding.  first_state(key) -> TrainState, laid out so.
    state_of(params, key) -> the first TrainState of given parameters, which are used up.
    draw(key, paths) -> those leaves of the parameters of `first_state(key)`, by path.
    train_step(state, batch) -> (state, metrics); the state given is used up.
    """

    module: Transformer
    like: TrainState
    first_state: Callable[[jax.Array], TrainState]
    state_of: Callable[[Any, jax.Array], TrainState]
    draw: Callable[[jax.Array, Sequence[str]], dict[str, jax.Array]]
    train_step: TrainStep


class TrainStep:
    """A compiled training step: (state, batch) -> (state, metrics).

    The state that is given is used up, but for its frozen part, which the new state shares.
    """

    def __init__(self, train_step: Callable[[TrainState, Batch], tuple[TrainState, Any]], layout: Any, metrics: Any):
        """layout: the sharding of each leaf of the state.  metrics: that of the metrics."""

        def apart(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Any]:
            state, metrics = train_step(state._replace(frozen=frozen), batch)
            return state._replace(frozen=None), metrics

        changed = layout._replace(frozen=None)
        self._compiled = jax.jit(
            functools.wraps(train_step)(apart),
            donate_argnums=0,
            in_shardings=(changed, layout.frozen, None),  # the batch is sharded by `shard_batch`
            out_shardings=(changed, metrics),
        )

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        """Returns the next state and the metrics of the step."""
        new, metrics = self._compiled(state._replace(frozen=None), state.frozen, batch)
        return new._replace(frozen=state.frozen), metrics

    def trace(self, state: Any, batch: Any) -> Any:
        """Returns the traced step, of arrays or shapes, as `jax.jit(...).trace` does."""
        return self._compiled.trace(state._replace(frozen=None), state.frozen, batch)


def remat_of(run: RunConfig, mesh: Mesh) -> str:
    """Returns what the backward pass recomputes on this mesh: a key of `REMAT`, or "none".

    Accelerators are limited by memory, and recompute elementwise operations faster than they read their results; on CPU
    the arithmetic of activations takes longer than the reading.
    """
    if run.remat != "auto":
        return run.remat
    return "none" if mesh.devices.flat[0].platform == "cpu" else "elementwise"


def unroll_of(run: RunConfig, config: ModelConfig, mesh: Mesh) -> int:
    """Returns the number of layers in one turn of the layer loop on this mesh.

    On an H100 GPT-2 is a third faster with all 12 layers than with 1, in little more than half of the memory
    (benchmarks/RESULTS.md); more than 12 take long to compile.
    """
    if run.unroll:
        return run.unroll
    gpu = mesh.devices.flat[0].platform in ("gpu", "cuda", "rocm")
    return 1 if not gpu else config.layers if config.layers <= 12 else 4


def assemble(
    run: RunConfig, task: Task, config: ModelConfig, mesh: Mesh, kind: type[Transformer] = Transformer
) -> Assembly:
    """The parts of a run whose model is of this config and class.  Raises UserError where the mesh does not fit it."""
    check_rows(run, mesh)
    dtype = jnp.dtype(run.compute_dtype)
    remat, unroll = remat_of(run, mesh), unroll_of(run, config, mesh)
    module = kind(config, sharding.Placement(mesh), dtype, remat, unroll, run.attention, precision=run.matmul_precision)
    shapes = jax.eval_shape(partial(init, module), jax.random.key(0))
    schedule = make_schedule(run.optimizer, run.steps)
    optimizer, chosen = make_optimizer(run.optimizer, run.steps, shapes), trained(run.optimizer, shapes)
    all_trained = all(jax.tree.leaves(chosen))

    def state_of(params: Any, key: jax.Array) -> TrainState:
        params, frozen = parameters.split(params, chosen)
        return TrainState(jnp.int32(0), params, optimizer.init(params), key, None if all_trained else frozen)

    def first_state(key: jax.Array) -> TrainState:
        return state_of(init(module, jax.random.wrap_key_data(key)), key)

    like = laid_out(jax.eval_shape(first_state, jax.random.key_data(jax.random.key(0))), mesh)
    layout = jax.tree.map(lambda leaf: leaf.sharding, like)

    def draw(key: jax.Array, paths: Sequence[str]) -> dict[str, jax.Array]:
        these = lambda tree: {path: leaf for path, leaf in parameters.by_path(tree).items() if path in paths}
        drawn = lambda key: these(init(module, jax.random.wrap_key_data(key)))
        return jax.jit(drawn, out_shardings=these(layout.model))(key)

    train_step = TrainStep(make_train_step(task, module, optimizer, schedule), layout, sharding.replicated(mesh))
    first, given = (jax.jit(f, out_shardings=layout, donate_argnums=d) for f, d in ((first_state, ()), (state_of, 0)))
    return Assembly(module, like, first, given, draw, train_step)


def closed_flops(task: Task, config: ModelConfig, rows: int, fields: Mapping[str, Any], *, blocks: bool = False) -> int:
    """Model FLOPs of a training step over so many rows by `flops.closed`, all parameters trained.

    fields: of a batch, by name; only their last axes are looked at.  blocks: as `flops.closed` has it.
    """
    length = fields["segments_BT"].shape[-1]
    source = fields["source_segments_BS"].shape[-1] if "source_segments_BS" in fields else None
    E = fields["starts_BE"].shape[-1] if "starts_BE" in fields else 0
    # How many positions of a row pass each head.
    each = {"masked_lm": getattr(task, "predictions", length), "next_sentence": E, "pooled": E, "classes": E}
    # What a head is made of another, such as the next sentence's of the pooled vector, is counted with it.
    below = {"pooled"} if "next_sentence" in config.heads_on_top else set()
    heads: dict[str, int] = {head: each.get(head, length) for head in config.heads_on_top if head not in below}
    return flops.closed(config, rows, length, source, heads=heads, blocks=blocks).step


def check_rows(run: RunConfig, mesh: Mesh) -> None:
    """Raises UserError where the mesh does not divide the rows of a micro-batch, or their length."""
    ways = sharding.ways(mesh, "batch") * run.accumulate
    if run.batch % ways and not run.examples:  # rows that the run has chosen itself are filled up
        raise UserError(
            f"batch {run.batch} in {run.accumulate} micro-batch(es) is not divided by the mesh {dict(mesh.shape)}; "
            f"the nearest that is: --batch {_nearest(run.batch, ways)}"
        )
    for name, length in (
        ("data.length", run.data.length),
        ("task.source_length", getattr(run.task, "source_length", 0)),
    ):
        if length % (ways := sharding.ways(mesh, "length")):
            raise UserError(
                f"{name} {length} is not divided by the mesh axis context {ways}; "
                f"the nearest that is: --{name.replace('_', '-')} {_nearest(length, ways)}"
            )


def _nearest(size: int, ways: int) -> str:
    below = size - size % ways
    return f"{below} or {below + ways}" if below else f"{ways}"


def shard_batch(mesh: Mesh, batch: Batch, k: int) -> Batch:
    """A batch [B, ...] on the mesh, as k micro-batches [k, B / k, ...]; where the mesh does not divide the rows that
    there are, with rows of padding.  Of many hosts each shards the rows that `rows_here` names."""
    more = -leading(batch) % (k * sharding.ways(mesh, "batch"))

    def laid(name: str, x: np.ndarray) -> jax.Array:
        whole = np.concatenate([x, np.zeros((more, *x.shape[1:]), x.dtype)]) if more else x
        micro = whole.reshape(k, -1, *x.shape[1:])
        return hosts.spread(micro, sharding.batch_sharding(mesh, name, micro.shape))

    return {name: laid(name, x) for name, x in batch.items()}


def rows_here(mesh: Mesh, rows: int, k: int) -> list[int]:
    """Which rows of a batch of so many are on the devices of this host once `shard_batch` has placed them."""
    micro = -(-rows // (k * sharding.ways(mesh, "batch"))) * sharding.ways(mesh, "batch")
    index_kB = np.arange(k * micro).reshape(k, micro)
    places = sharding.batch_sharding(mesh, "B").addressable_devices_indices_map((k, micro))
    here = np.unique([index_kB[index] for index in places.values() if index is not None])
    return [int(row) for row in here if row < rows]


def laid_out(state: TrainState, mesh: Mesh) -> TrainState:
    """Shapes of a state, each with its sharding: that of the parameter that a leaf is, or belongs to."""
    shapes = {path: leaf.shape for path, leaf in parameters.by_path(state.model).items()}
    rows = parameters.rows_by_path(state.model)

    def place(key_path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        path = parameters.path_of(key_path)
        # An optimizer may keep something smaller than the parameter, such as factored moments.
        row = rows[path] if leaf.shape == shapes.get(path) else None
        axes = row.axes if row else (None,) * leaf.ndim
        layout = sharding.sharding(mesh, axes, leaf.shape, path or "the optimizer's state")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)

    return jax.tree_util.tree_map_with_path(place, state)
