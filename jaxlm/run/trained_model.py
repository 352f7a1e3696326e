"""A trained model resolved for prediction and evaluation: its task, chosen, checked and bound to it."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import jax

from jaxlm import config
from jaxlm.config import DataConfig, MeshConfig, RunConfig
from jaxlm.config.ranges import MAX_INT, Range, check_argument
from jaxlm.devices import sharding
from jaxlm.errors import UserError
from jaxlm.inference.generation_defaults import prediction_decoding
from jaxlm.lm import LM
from jaxlm.run.resolve import ResolvedModel
from jaxlm.tasks import TASKS, cells, labels
from jaxlm.tasks.records import RecordTask

Length = Annotated[int, Range(2, MAX_INT)]  # tokens in a row


def resolve_model(lm: LM, task: Any, length: int | None = None) -> ResolvedModel:
    """Returns a model with a task, resolved as a run is.

    Args:
      lm: the model, with its tokenizer.
      task: the config of a task over records.
      length: tokens in a row; None: as in training, else 512 or the model's positions.

    Returns:
      The bound task and the model on its mesh, or on one device if the model has no mesh.

    Raises:
      UserError: if the model does not fit the task or the length.
    """
    kind = TASKS.get(type(task))
    if kind is None or not issubclass(kind, RecordTask):
        raise UserError(f"{type(task).__name__} does not predict examples; use a task such as Classification()")
    if lm.tokenizer is None:
        raise UserError("the model has no tokenizer; load it from a folder with one")
    if kind.head is not None and kind.head not in lm.config.heads_on_top:
        heads = ", ".join(lm.config.heads_on_top) or "none"
        raise UserError(f"{type(task).__name__} requires the head {kind.head}, the model has {heads}; fine-tune it")
    problem = "regression" if isinstance(task, config.MultipleChoice) else getattr(task, "problem", "multi_label")
    one = problem == "regression"  # the task has one output; a multi-label task may have any number
    if kind.head == "classes" and problem != "multi_label" and one != (len(lm.config.labels) == 1):
        raise UserError(
            f"{type(task).__name__} requires {'one output' if one else 'several outputs'}, the model has "
            f"{', '.join(lm.config.labels)}; use the task that it was trained for"
        )
    length = check_argument("length", length, Length | None)
    if length is None and lm.trained:
        length = lm.trained.length
    if length is not None:
        lm.config.decoder_config.check_length(length)
    outputs = labels.output_names(task, lm.config.labels) if kind.head else ()
    length = length or min(512, lm.config.decoder_config.position_limit or 512)
    run = RunConfig(lm.config, task, DataConfig(length=length))
    mesh = lm.module.constrain.mesh or sharding.make_mesh(MeshConfig(1), jax.local_devices()[:1])
    bound = kind(task, length, run.seed, lm.tokenizer, outputs).bind(lm.config, lm.pooling)
    return ResolvedModel(run, mesh, bound, lm.config, type(lm.module))


def task_for(lm: LM, task: Any = None) -> Any:
    """Returns the task for a model: the given one, else the task that the model was trained for, else that of its head.

    Raises:
      UserError: for a value that is not a task, and for a model whose task is not registered.
    """
    if task is not None and (not dataclasses.is_dataclass(task) or isinstance(task, type)):
        raise UserError(f"the task is {cells.short_repr(task)}; give the config of a task, such as Classification()")
    if task is not None:
        return task
    trained = lm.trained
    if trained is None:
        return task_of(lm)
    kind = TASKS.get(type(trained.task))
    if isinstance(trained.task, str):
        raise UserError(
            f"the model was trained for the task {trained.task}, which is not registered; register it, or give the "
            f"task (on the command line its config, with --config)"
        )
    if kind is not None and issubclass(kind, RecordTask) and (kind.head is None or kind.head in lm.config.heads_on_top):
        return trained.task
    return task_of(lm)


def task_of(lm: LM) -> Any:
    """Returns the task for a model's head, by its config.json. Raises UserError for a model without such a head."""
    heads, declared = lm.config.heads_on_top, lm.origin.config if lm.origin else {}
    if any(str(name).endswith("ForMultipleChoice") for name in declared.get("architectures") or ()):
        return config.MultipleChoice()
    if "classes" in heads:
        problem: Any = str(declared.get("problem_type")).removesuffix("_classification")
        if problem not in ("multi_label", "regression"):
            problem = "regression" if len(lm.config.labels) == 1 else "single_label"
        return config.Classification(problem=problem)
    if "tokens" in heads:
        return config.Tagging()
    if "span" in heads:
        return config.QuestionAnswering(stride=min(128, lm.config.max_length // 4))
    if "lm" in heads and lm.config.structure == "encoder_decoder":
        return config.Seq2Seq(decoding=prediction_decoding(lm))
    if lm.pooling is not None or (not heads and lm.config.structure == "encoder"):
        return config.Similarity()
    raise UserError(
        f"the model has the heads: {', '.join(heads) or 'none'}; predictions require classes, tokens or span: "
        f"fine-tune it first"
    )
