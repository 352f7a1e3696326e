"""The weights that a run starts from: read from a folder or copied from a model, and otherwise randomly initialised."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm import families
from jaxlm.config import ModelConfig, MultiTask, RunConfig
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.devices import hosts
from jaxlm.errors import UserError
from jaxlm.hub.convert import tree_shapes
from jaxlm.hub.place import read_leaves
from jaxlm.hub.pooling import Pooling
from jaxlm.lm import LM, base_name, find, kept_files, without_task
from jaxlm.nn import parameters
from jaxlm.run.checkpoint import checksums_of
from jaxlm.tasks import TASKS
from jaxlm.tasks.labels import Labels, are_default_names, output_names
from jaxlm.tasks.multi_task import TaskMixture, part_head
from jaxlm.tasks.task import Task
from jaxlm.transforms.adapters import merge
from jaxlm.transforms.layers import kept_rows, layers_by_stack, select_config
from jaxlm.vectors import embeddings
from jaxlm.vectors.embeddings import TokenVectors, vectors_of_tokens
from jaxlm.vectors.files import load_vectors


def known_labels(run: RunConfig, model: LM | None) -> Labels | None:
    """Returns the names of the outputs of the head that a run starts from.

    Args:
      run: the config.
      model: the model that the run starts from, instead of `run.init`.

    Returns:
      The names in order; for several tasks, the names for each task with a head in the weights; None for a new head.

    Raises:
      UserError: as `lm.load` does.
    """
    if not isinstance(run.task, MultiTask):
        return _labels_of_head(run, model, TASKS[type(run.task)].head)
    by_task = {name: _labels_of_head(run, model, TASKS[type(part.task)].head) for name, part in run.task.parts.items()}
    return {name: labels for name, labels in by_task.items() if labels is not None} or None


def _labels_of_head(run: RunConfig, model: LM | None, head: Any) -> tuple[str, ...] | None:
    if head not in ("classes", "tokens") or run.new_head:
        return None
    if model is not None:
        # The user may also have named the outputs of a head that is randomly initialised.
        is_new = any(path.startswith(f"{head}_head/out/") for path in model.fresh)
        has_names = head in model.config.heads_on_top and not (is_new and are_default_names(model.config.labels))
        return model.config.labels if has_names else None
    if not run.init:
        return None
    found = families.open_folder(find(run.init), head=head if run.model is None else None)
    has_head = head in found.config.heads_on_top and f"{head}_head/out/kernel" not in found.fresh
    return found.config.labels if has_head else None


class Weights(NamedTuple):
    """The weights that a run starts from, which are read only when `read` is called.

    config: the config of their model.
    shapes: the shapes of the leaves that exist, by path.
    read(shardings) -> the leaves at these paths as new float32 arrays, each shard read directly to its device.
    origin, files, pooling: as in `LM`, without the file with an earlier task.
    """

    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[Mapping[str, jax.sharding.Sharding]], dict[str, jax.Array]]
    origin: families.Origin | None
    files: dict[str, bytes]
    pooling: Pooling | None


def weights_of(run: RunConfig, model: LM | None, task: Task, labels: Any, resuming: bool) -> Weights | None:
    """Returns the weights that a run starts from.

    Args:
      run: the config as the user gave it.
      model: a model to take the weights of, instead of `run.init`.
      task: the task, which decides the head.
      labels: names of the outputs of the head, if it has any.
      resuming: whether the run resumes from a checkpoint.

    Returns:
      The weights; None where all are randomly initialised, and where a run with its own model resumes and the model of
      `run.init` no longer exists.

    Raises:
      UserError: where `run.init` contains no model.
    """
    if model is None and not run.init:
        if run.distill.layers or run.distill.decoder_layers:
            raise UserError(
                "distill.layers is given, but there are no weights to take layers from; give them with --init"
            )
        return None
    try:
        if isinstance(task, TaskMixture):
            return _with_own_heads(run, model, task, labels)
        head = getattr(run.task, "heads", None) or task.head or "none"
        weights = _weights_with_head(run, model, head, (labels or None) if task.head else None)
    except UserError:
        if resuming and model is None and run.model is not None:
            return None
        raise
    new = f"{task.head}_head/out/" if run.new_head else None
    shapes = {path: shape for path, shape in weights.shapes.items() if not (new and path.startswith(new))}
    return _with_layers(run, weights._replace(shapes=shapes))


def student_config(run: RunConfig, config: ModelConfig) -> ModelConfig:
    """Returns the config of a model with only the layers that `run.distill` keeps.

    Raises:
      UserError: where the model does not have these layers.
    """
    kept = run.distill.kept_layers(config.layers, config.decoder_layers or config.layers)
    return select_config(config, *kept) if any(kept) else config


def _with_layers(run: RunConfig, weights: Weights) -> Weights:
    """Returns the weights of the layers that `run.distill` keeps."""
    config = weights.config
    kept = layers_by_stack(config, *run.distill.kept_layers(config.layers, config.decoder_layers or config.layers))
    if not kept:
        return weights
    sizes = {path: (shape[0] if shape else 0) for path, shape in weights.shapes.items()}
    selected = {path: kept_rows(config, path, size, kept) for path, size in sizes.items()}
    rows = {path: chosen for path, chosen in selected.items() if chosen is not None}
    shapes = {path: (len(rows[path]), *s[1:]) if path in rows else s for path, s in weights.shapes.items()}
    shapes = {path: shape for path, shape in shapes.items() if rows.get(path) != ()}  # no kept layer has the others

    def read(shardings: Mapping[str, jax.sharding.Sharding]) -> dict[str, jax.Array]:
        leaves = {}
        for path, sharding in shardings.items():  # one by one, so that at most one array has all layers
            [leaf] = weights.read({path: sharding}).values()
            index = np.array(rows.get(path, ()), np.int32)
            leaves[path] = (
                jax.jit(lambda x, index: x[index], out_shardings=sharding)(leaf, index) if path in rows else leaf
            )
        return leaves

    return weights._replace(config=student_config(run, config), shapes=shapes, read=read)


def _weights_with_head(run: RunConfig, model: LM | None, head: Any, labels: tuple[str, ...] | None) -> Weights:
    """Returns the weights of a model, or those of `run.init` with a head; raises UserError where it has no model."""
    if model is not None:
        leaves = parameters.by_path(merge(model).params)
        # Copies, because training donates its buffers, but the model belongs to the caller.
        copy = lambda path, sharding: hosts.shard(_as_float32(leaves[path]), sharding, may_alias=False)
        read = lambda shardings: {path: copy(path, sharding) for path, sharding in shardings.items()}
        shapes = {path: leaf.shape for path, leaf in leaves.items()}
        return Weights(model.config, shapes, read, model.origin, without_task(model.files), model.pooling)
    folder = find(run.init)
    found = families.open_folder(folder, **({"head": head, "labels": labels} if run.model is None else {}))
    shapes = tree_shapes(found.config, found.family.module)
    shapes = {path: shape for path, shape in shapes.items() if path not in found.fresh}
    read = partial(read_leaves, found.family, found.config, found.tensors, np.dtype(np.float32))
    files, pooling = kept_files(folder)
    return Weights(found.config, shapes, read, found.origin, without_task(files), pooling)


def _with_own_heads(run: RunConfig, model: LM | None, task: TaskMixture, labels: Any) -> Weights:
    """Returns the weights for several tasks: the body, and a head for each task.

    The last layer of a head is randomly initialised where its labels are not those of the task.
    """
    body = _weights_with_head(run, model, "none", None)
    # Weights, and the path in them of each path in the run's model.
    sources = [(body, {path: path for path in body.shapes})]
    for name, part in task.parts.items():
        if part.head is None:
            continue
        try:
            weights = _weights_with_head(run, model, part.head, None)
        except UserError:  # a family without such a head
            continue
        names = output_names(part.task, weights.config.labels)
        has_new_outputs = run.new_head or (part.head in ("classes", "tokens") and names != labels[name])
        prefix, outputs = f"{part.head}_head/", f"{part.head}_head/out/"
        paths = [path for path in weights.shapes if path.startswith(prefix)]
        old = [path for path in paths if not (has_new_outputs and path.startswith(outputs))]
        sources.append((weights, {f"{part_head(name)}/{path.removeprefix(prefix)}": path for path in old}))

    def read(shardings: Mapping[str, jax.sharding.Sharding]) -> dict[str, jax.Array]:
        leaves: dict[str, jax.Array] = {}
        for weights, paths in sources:
            requested = {own: paths[own] for own in paths.keys() & shardings.keys()}
            arrays = weights.read({path: shardings[own] for own, path in requested.items()})
            leaves |= {own: arrays[path] for own, path in requested.items()}
        return leaves

    shapes = {own: weights.shapes[path] for weights, paths in sources for own, path in paths.items()}
    return body._replace(shapes=shapes, read=read)


def _as_float32(leaf: Any) -> Any:
    return leaf if leaf.dtype == np.float32 else leaf.astype(np.float32)


def check_fits(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError where weights have other leaves or shapes than the run's model; heads may be missing.

    Args:
      shapes: of the weights, by path.
      expected: of the model, by path.
    """
    differences = [
        f"  - {path} {shape}" for path, shape in shapes.items() if path not in expected and not _in_head(path)
    ]
    for path, shape in expected.items():
        if shapes.get(path) != shape and not (path not in shapes and _in_head(path)):
            differences += [f"  - {path} {shapes.get(path)}"] * (path in shapes) + [f"  + {path} {shape}"]
    if differences:
        lines = "\n".join(sorted(differences, key=lambda line: (line.split()[1], line.split()[0] == "+")))
        raise UserError(
            f"the weights given by --init (-) do not fit the model of the run (+):\n{lines}\nchange --model, or use a "
            f"config with model=None, which trains the model of the weights (for text, configs/adapt.py)"
        )


def origin(run: RunConfig, weights: Weights | None) -> families.Origin:
    """Returns the origin of the run's model, with the format of its initial weights, so that the export has it too."""
    before = weights.origin if weights is not None else None
    config = before.config if before else {}
    base = base_name(run.init, before) if before and run.init else before.base if before else ""
    return families.Origin({name: config[name] for name in ("model_type",) if name in config}, heads=None, base=base)


def _in_head(path: str) -> bool:
    return "_head/" in path or path.startswith("own")


def token_vectors_of(run: RunConfig, model: ModelConfig, tokenizer: Tokenizer | None) -> TokenVectors | None:
    """Returns the word vectors that the token embeddings of a run start from; None without `run.embeddings`.

    Raises:
      UserError: where the file is invalid, or its vectors do not fit the model or its tokenizer.
    """
    if not run.embeddings:
        return None
    if tokenizer is None:
        raise UserError(f"embeddings is {run.embeddings}, but the run has no tokenizer; give one with --tokenizer.path")
    return vectors_of_tokens(load_vectors(run.embeddings), tokenizer, model, run.embeddings)


def start_from(
    weights: Weights | None,
    like: Mapping[str, jax.ShapeDtypeStruct],
    draw: Callable[[Sequence[str]], dict[str, jax.Array]],
    adapt: Callable[[str, jax.Array], Any],
    log: Callable[[str], None],
    token_vectors: TokenVectors | None = None,
) -> dict[str, Any]:
    """Returns the parameters that a run starts from, sharded, by path; some may be nodes.

    Args:
      weights: the weights to read; None: all leaves are randomly initialised.
      like: shapes and shardings of the parameters as arrays, by path.
      draw: paths -> randomly initialised leaves, for the leaves that the weights lack.
      adapt: (path, leaf) -> the node with the leaf, or the leaf.
      log: prints which leaves are randomly initialised.
      token_vectors: rows of the token embeddings to replace.
    """
    new = [path for path in like if weights is None or path not in weights.shapes]
    if new and weights is not None:
        log(
            f"randomly initialised, since the given weights have none: "
            f"{', '.join(sorted({path.split('/')[0] for path in new}))}"
        )
    drawn = draw(new) if new else {}
    leaves = {}
    for path, leaf in like.items():  # one at a time: a node may need less memory than its leaf
        array = drawn.pop(path) if weights is None or path in drawn else weights.read({path: leaf.sharding})[path]
        if path == embeddings.TABLE and token_vectors is not None:
            array = token_vectors.write(array)
        leaves[path] = adapt(path, array)
    return leaves


def check_frozen(frozen: Any, sums: list[int], sources: str) -> None:
    """Raises UserError where the frozen parameters of a resumed run differ from those that the run started with.

    Args:
      frozen: the parameters, read again or initialised again with the run's seed.
      sums: the checksums of the parameters that the run started with.
      sources: the folders of the parameters, for the message.
    """
    if checksums_of(frozen) != sums:
        raise UserError(
            f"the frozen parameters differ from those that the run started with; restore the content of {sources}, or "
            f"choose another --workdir"
        )
