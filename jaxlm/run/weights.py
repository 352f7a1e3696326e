"""The weights that a run starts from: those of a folder, of a model, or of several tasks' heads; and those it draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm import families
from jaxlm.config import ModelConfig, MultiTask, RunConfig
from jaxlm.devices import hosts
from jaxlm.errors import UserError
from jaxlm.hub.convert import tree_shapes
from jaxlm.hub.place import read_leaves
from jaxlm.hub.pooling import Pooling
from jaxlm.lm import LM, find, kept_files, without_task
from jaxlm.nn import parameters
from jaxlm.run.checkpoint import checksums_of
from jaxlm.tasks import TASKS
from jaxlm.tasks.labels import Labels, named_outputs, unnamed
from jaxlm.tasks.multi_task import TaskMixture, own_head
from jaxlm.tasks.task import Task


def known_labels(run: RunConfig, model: LM | None) -> Labels | None:
    """Returns the names of the outputs of the head that a run starts from, in order; None where the head is new.

    Of several tasks it returns those of each part whose head the weights have.

    Raises UserError as `lm.load` does.
    """
    if not isinstance(run.task, MultiTask):
        return _labels_of_head(run, model, TASKS[type(run.task)].head)
    found = {name: _labels_of_head(run, model, TASKS[type(part.task)].head) for name, part in run.task.parts.items()}
    return {name: labels for name, labels in found.items() if labels is not None} or None


def _labels_of_head(run: RunConfig, model: LM | None, head: Any) -> tuple[str, ...] | None:
    if head not in ("classes", "tokens") or run.new_head:
        return None
    if model is not None:
        # Of a new head the names are a choice too, where someone has named them.
        drawn = any(path.startswith(f"{head}_head/out/") for path in model.fresh)
        there = head in model.config.heads_on_top and not (drawn and unnamed(model.config.labels))
        return model.config.labels if there else None
    if not run.init:
        return None
    found = families.look(find(run.init), head=head if run.model is None else None)
    there = head in found.config.heads_on_top and f"{head}_head/out/kernel" not in found.fresh
    return found.config.labels if there else None


class Weights(NamedTuple):
    """The weights that a run starts from.  Those of a folder are read when a run asks for them, leaf by leaf.

    config: of the model that they belong to.  shapes: of the leaves that there are, by path.
    read(layouts): the leaves of these paths as float32 arrays of their own, each shard read straight to its device.
    origin, files, pooling: as an `LM` has them, without the note of an earlier task.
    """

    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[Mapping[str, jax.sharding.Sharding]], dict[str, jax.Array]]
    origin: families.Origin | None
    files: dict[str, bytes]
    pooling: Pooling | None


def weights_of(run: RunConfig, model: LM | None, task: Task, labels: Any, resuming: bool) -> Weights | None:
    """Returns the weights that `run`, as it was given, starts from; None where it draws them all.

    labels: names of the outputs of the task's head, where it has one.

    Raises UserError where `run.init` holds no model, unless a run that has its own model is resumed.
    """
    if model is None and not run.init:
        return None
    try:
        if isinstance(task, TaskMixture):
            return _with_own_heads(run, model, task, labels)
        head = getattr(run.task, "heads", None) or task.head or "none"
        weights = _given(run, model, head, (labels or None) if task.head else None)
    except UserError:
        if resuming and model is None and run.model is not None:
            return None
        raise
    renewed = f"{task.head}_head/out/" if run.new_head else None
    kept = {path: shape for path, shape in weights.shapes.items() if not (renewed and path.startswith(renewed))}
    return weights._replace(shapes=kept)


def _given(run: RunConfig, model: LM | None, head: Any, labels: tuple[str, ...] | None) -> Weights:
    """Returns the weights of a model, or those of `run.init` with this head; raises UserError where it has no model."""
    if model is not None:
        leaves = parameters.by_path(model.params)
        # Copies, since training donates its buffers, and the model is the caller's.
        copied = lambda path, layout: hosts.spread(_as_float32(leaves[path]), layout, may_alias=False)
        read = lambda layouts: {path: copied(path, layout) for path, layout in layouts.items()}
        shapes = {path: leaf.shape for path, leaf in leaves.items()}
        return Weights(model.config, shapes, read, model.origin, without_task(model.files), model.pooling)
    folder = find(run.init)
    found = families.look(folder, **({"head": head, "labels": labels} if run.model is None else {}))
    shapes = tree_shapes(found.config, found.family.module)
    shapes = {path: shape for path, shape in shapes.items() if path not in found.fresh}
    read = partial(read_leaves, found.family, found.config, found.tensors, np.dtype(np.float32))
    files, pooling = kept_files(folder)
    return Weights(found.config, shapes, read, found.origin, without_task(files), pooling)


def _with_own_heads(run: RunConfig, model: LM | None, task: TaskMixture, labels: Any) -> Weights:
    """Returns the weights for several tasks: the body, and for each part the head of its kind, whose outputs are read
    where the part has their labels."""
    body = _given(run, model, "none", None)
    sources = [(body, {path: path for path in body.shapes})]  # with the path there of each path in the run's model
    for name, part in task.parts.items():
        if part.head is None:
            continue
        try:
            weights = _given(run, model, part.head, None)
        except UserError:  # a family without such a head
            continue
        names = named_outputs(part.task, weights.config.labels)
        renewed = run.new_head or (part.head in ("classes", "tokens") and names != labels[name])
        prefix, outputs = f"{part.head}_head/", f"{part.head}_head/out/"
        paths = [path for path in weights.shapes if path.startswith(prefix)]
        kept = [path for path in paths if not (renewed and path.startswith(outputs))]
        sources.append((weights, {f"{own_head(name)}/{path.removeprefix(prefix)}": path for path in kept}))

    def read(layouts: Mapping[str, jax.sharding.Sharding]) -> dict[str, jax.Array]:
        leaves: dict[str, jax.Array] = {}
        for weights, there in sources:
            some = {path: there[path] for path in there.keys() & layouts.keys()}
            found = weights.read({path: layouts[own] for own, path in some.items()})
            leaves |= {own: found[path] for own, path in some.items()}
        return leaves

    shapes = {own: weights.shapes[path] for weights, there in sources for own, path in there.items()}
    return body._replace(shapes=shapes, read=read)


def _as_float32(leaf: Any) -> Any:
    return leaf if leaf.dtype == np.float32 else leaf.astype(np.float32)


def check_fits(given: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError where weights have other shapes than the run's model, or lack some but for heads.

    given, wanted: shapes by path.
    """
    differ = [f"  - {path} {shape}" for path, shape in given.items() if path not in wanted and not _on_top(path)]
    for path, shape in wanted.items():
        if given.get(path) != shape and not (path not in given and _on_top(path)):
            differ += [f"  - {path} {given[path]}"] * (path in given) + [f"  + {path} {shape}"]
    if differ:
        lines = "\n".join(sorted(differ, key=lambda line: (line.split()[1], line.split()[0] == "+")))
        raise UserError(
            f"the weights given by --init (-) do not fit the model of the run (+):\n{lines}\nchange --model, or train "
            f"a config with model=None, which takes the model of the weights (configs/adapt.py for text)"
        )


def origin(run: RunConfig, weights: Weights | None) -> families.Origin:
    """The format of the weights that the run began from: an equal model of another family is not theirs."""
    said = weights.origin.config if weights is not None and weights.origin else {}
    return families.Origin({name: said[name] for name in ("model_type",) if name in said}, heads=None)


def _on_top(path: str) -> bool:
    return "_head/" in path or path.startswith("own")


def start_from(
    weights: Weights | None,
    like: Any,
    draw: Callable[[Sequence[str]], dict[str, jax.Array]],
    say: Callable[[str], None],
) -> Any:
    """Returns the parameters that a run starts from, each shard on its device.

    like: their shapes and shardings.  draw(paths): initial values of leaves that the weights lack, which are reported.
    """
    layouts = {path: leaf.sharding for path, leaf in parameters.by_path(like).items()}
    new = [path for path in layouts if weights is None or path not in weights.shapes]
    if new:
        say(
            f"randomly initialised, since the given weights have none: "
            f"{', '.join(sorted({path.split('/')[0] for path in new}))}"
        )
    leaves = {} if weights is None else weights.read({path: layouts[path] for path in layouts if path not in new})
    leaves |= draw(new) if new else {}
    return jax.tree_util.tree_map_with_path(lambda key_path, _: leaves.pop(parameters.path_of(key_path)), like)


def check_frozen(frozen: Any, sums: list[int], init: str) -> None:
    """Raises UserError where frozen parameters, read again for a run that resumes, are not those that it began with.

    Args:
      frozen: the parameters, from `init`, or drawn by the run's seed.
      sums: the checksums of those that the run began with.
      init: the run's.
    """
    if checksums_of(frozen) != sums:
        raise UserError(
            f"the parameters that the run does not train are not those that it began with; give --init "
            f"{init or '(none)'} the content that it had, or choose another --workdir"
        )
