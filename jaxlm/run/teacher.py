"""The teacher of a run: its weights, which stay frozen, and the task that reads its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxlm import families
from jaxlm.config import ModelConfig, RunConfig
from jaxlm.data.corpus import Prepared
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.devices import hosts
from jaxlm.errors import UserError
from jaxlm.families.reading import base_of
from jaxlm.hub import model_files
from jaxlm.hub.convert import tree_shapes
from jaxlm.hub.place import read_leaves
from jaxlm.hub.pooling import read_pooling
from jaxlm.lm import find, has_tokenizer
from jaxlm.nn.parameters import TEACHER
from jaxlm.run.weights import Weights
from jaxlm.tasks.distillation import with_teacher as with_losses
from jaxlm.tasks.labels import are_default_names, output_names
from jaxlm.tasks.task import Task


def bind_teacher(run: RunConfig, task: Task, student: ModelConfig, data: Prepared) -> tuple[Task, Weights | None]:
    """Returns the task with the losses of `run.distill`, and the weights of the teacher, which are not read yet.

    Args:
      run: the config.
      task: the task, bound to the student.
      student: the model of the run.
      data: the data, with their tokenizer and labels.

    Returns:
      The same task and None, for a run without a teacher.

    Raises:
      UserError: for a teacher that does not exist, or whose outputs cannot be compared with those of the student.
    """
    if not run.distill.teacher:
        return task, None
    folder = find(run.distill.teacher)
    head: Any = getattr(run.task, "heads", None) or task.head or "none"
    try:
        found = families.open_folder(folder, head=head)
    except UserError as error:
        raise UserError(f"distill.teacher: {error}") from None
    _check_model(run, found, student)
    if has_tokenizer(folder):
        _check_tokenizer(run, data.tokenizer, tokenizers.load(str(folder)))
    if task.head in ("classes", "tokens"):
        _check_labels(run, data.labels, output_names(run.task, found.config.labels))
    shapes = {f"{TEACHER}/{path}": shape for path, shape in tree_shapes(found.config, found.family.module).items()}
    read = partial(read_leaves, found.family, found.config, found.tensors, np.dtype(np.float32))
    pooling = read_pooling(folder)
    weights = Weights(found.config, shapes, read, found.origin, {}, pooling)
    return with_losses(task, run.distill, student, found.config, pooling), weights


def bind_reference(run: RunConfig, task: Task, model: ModelConfig, weights: Weights | None) -> tuple[Task, Any]:
    """Returns the task, and the weights of its reference: those that the run starts from, as the weights of a teacher.

    With an adapter, the model without it is the reference, and no second copy of the weights exists.

    Args:
      run: the config.
      task: the task, bound to the model.
      model: the model of the run.
      weights: the weights that the run starts from.

    Returns:
      The same task and None, for a task without a reference, or with an adapter.

    Raises:
      UserError: for a run without initial weights.
    """
    if not task.has_reference:
        return task, None
    if weights is None:
        raise UserError(
            f"{type(run.task).__name__} compares with the model that the run starts from, and the run has no initial "
            f"weights; give them with --init"
        )
    if run.adapter.rank:
        return task, None
    shapes = {f"{TEACHER}/{path}": shape for path, shape in weights.shapes.items()}
    return task.replace_fields(teacher=model), weights._replace(shapes=shapes)


def open_cache(run: RunConfig, task: Any, batches: Any, log: Callable[[str], None]) -> None:
    """Opens the cache of a task with `run.distill.cache`; does nothing for another task.

    Args:
      run: the config.
      task: the task, with the losses of `run.distill`.
      batches: its training batches.
      log: prints a line.

    Raises:
      UserError: where the folder contains predictions of another teacher, or for another task.
    """
    if not run.distill.cache:
        return
    arrays, folder = task.cached_arrays(batches.empty_batch()), find(run.distill.teacher)
    facts: dict[str, Any] = {
        "format": _CACHE_FORMAT,
        "teacher": "+".join(model_files.fingerprint(path) for path in dict.fromkeys((folder, base_of(folder)))),
        "task": type(run.task).__name__,
        "compute_dtype": run.compute_dtype,
        "matmul_precision": run.matmul_precision,
    }
    if any(name.startswith("log_probs") for name in arrays):
        facts["temperature"] = run.distill.temperature
    names = hosts.run_on_first(lambda: task.cache.open(arrays, facts, log))
    if not hosts.is_first():
        task.cache.open_as(arrays, names, log)


_CACHE_FORMAT = 1  # version of the predictions; a new number invalidates all caches


def _check_model(run: RunConfig, found: families.Opened, student: ModelConfig) -> None:
    """Raises UserError where the teacher has another structure, lacks the head of the task, or has other tokens."""
    teacher, name = found.config, run.distill.teacher
    for field in ("structure", "front_end", "prefix_lm", "start_token"):
        ours, theirs = getattr(student, field), getattr(teacher, field)
        if ours != theirs:
            raise UserError(
                f"distill.teacher {name} has the {field} {theirs}, and the student {ours}; choose a teacher of the "
                f"same kind, or {_SEQUENCE_LEVEL}"
            )
    if found.fresh:
        heads = ", ".join(sorted({path.split("/")[0] for path in found.fresh}))
        raise UserError(f"distill.teacher {name} has no {heads}; train the teacher on the task first")
    if teacher.vocabulary != student.vocabulary or teacher.V != student.V:
        raise UserError(
            f"distill.teacher {name} has a vocabulary of {teacher.V} tokens, and the student of {student.V}; choose a "
            f"teacher with the same tokenizer, or {_SEQUENCE_LEVEL}"
        )
    remedy = "lower it, or choose a teacher with more positions"
    teacher.decoder_config.check_length(run.data.length, "data.length", remedy)


_SEQUENCE_LEVEL = "generate texts with the teacher by `jaxlm generate` and train on them (sequence-level distillation)"


# A text whose tokens depend on case, accents, digits, punctuation and spaces.
_PROBE = "It's 12,345 Times  the naïve CAFÉ of “São Paulo” – e.g. 東京\tin 2024!"


def _check_tokenizer(run: RunConfig, ours: Tokenizer, theirs: Tokenizer) -> None:
    """Raises UserError where the tokenizer of the teacher gives other ids than that of the run."""
    for student, teacher in ((ours, theirs), (ours.target, theirs.target)):
        ids = lambda one: (one.backend.get_vocab(), one.encode(_PROBE), one.encode_with_special_tokens([_PROBE]))
        if ids(student) != ids(teacher):
            raise UserError(
                f"distill.teacher {run.distill.teacher} has another tokenizer than the run; give the run this "
                f"tokenizer with --tokenizer.path, or {_SEQUENCE_LEVEL}"
            )


def _check_labels(run: RunConfig, ours: tuple[str, ...], theirs: tuple[str, ...]) -> None:
    """Raises UserError where the outputs of the head of the teacher have other names, or another order."""
    if len(ours) == len(theirs) and (ours == theirs or are_default_names(theirs) or are_default_names(ours)):
        return
    remedy = "name the labels in the order of the teacher with --task.names, or train a teacher on these labels"
    if set(ours) != set(theirs) or not hasattr(run.task, "names"):
        remedy = "train a teacher on these labels"
    raise UserError(
        f"the head of distill.teacher {run.distill.teacher} has {len(theirs)} outputs, {', '.join(theirs[:12])}, and "
        f"that of the student {len(ours)}: {', '.join(ours[:12])}; {remedy}"
    )


def with_teacher(weights: Weights | None, teacher: Weights | None) -> Weights | None:
    """Returns the weights that the state of a run starts from: those of its model, and those of its teacher."""
    if teacher is None:
        return weights

    def read(shardings: Mapping[str, jax.sharding.Sharding]) -> dict[str, jax.Array]:
        of_teacher = {path.removeprefix(f"{TEACHER}/"): s for path, s in shardings.items() if path in teacher.shapes}
        leaves = {f"{TEACHER}/{path}": leaf for path, leaf in teacher.read(of_teacher).items()}
        own = {path: sharding for path, sharding in shardings.items() if path not in teacher.shapes}
        return leaves | (weights.read(own) if weights is not None and own else {})

    return (weights or teacher)._replace(shapes={**(weights.shapes if weights else {}), **teacher.shapes}, read=read)


def sources_of(run: RunConfig) -> str:
    """Returns the flags that name the weights that a run starts from, for a message."""
    named = {"--init": run.init or "(none)", "--distill.teacher": run.distill.teacher}
    return " and ".join(f"{flag} {source}" for flag, source in named.items() if source)
