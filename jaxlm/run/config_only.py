"""A run resolved from its config alone: neither its data nor its weights are read, and neither has to exist."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.config import ModelConfig, MultiTask, RunConfig
from jaxlm.data.corpus import Corpus
from jaxlm.devices import sharding
from jaxlm.errors import UserError
from jaxlm.families import PRESETS, open_folder
from jaxlm.lm import find
from jaxlm.nn.transformer import Transformer
from jaxlm.run.privacy import plan_budget
from jaxlm.run.resolve import ResolvedModel, with_dropout
from jaxlm.run.weights import student_config
from jaxlm.tasks import make_task
from jaxlm.tasks.cells import Records
from jaxlm.tasks.distillation import with_teacher
from jaxlm.tasks.multi_task import Parts
from jaxlm.tasks.records import RecordTask
from jaxlm.tasks.task import Task

SENTINELS = 4096  # of the placeholder tokenizer


def resolve_config(run: RunConfig, mesh: Mesh) -> ResolvedModel:
    """Returns the run as its config alone decides it.

    The length of the data would decide `batch` where `examples` is set, and `steps` where `epochs` is; here `batch` and
    `steps` hold. A task whose labels come from the data has the two classes "0" and "1".

    Args:
      run: its `model`, or its `init` as a preset, a folder or a hub name, decides the shapes.
      mesh: devices, which may be those of a topology.

    Raises:
      UserError: for a config that names no model, and for whatever `RunConfig.check` refuses.
    """
    config = run.model or _model_of_init(run)
    data = replace(run.data, path=run.data.path or "not read")
    run = replace(run, model=config, init="", dropout=None, data=data, examples=0, epochs=0.0)
    run.check()
    task = make_task(run, PlaceholderTokenizer(config.vocabulary), _labels(run, config))  # type: ignore[arg-type]
    task, config = task.bind(config), task.configure(config)
    if run.distill.teacher:
        teacher = PRESETS.get(run.distill.teacher) or open_folder(find(run.distill.teacher)).config
        teacher = replace(teacher, heads_on_top=config.heads_on_top, labels=config.labels)
        task = with_teacher(task, run.distill, config, teacher)
    elif task.has_reference and not run.adapter.rank:
        task = task.replace_fields(teacher=config)
    budget = plan_budget(run) if run.privacy.is_on else None
    return ResolvedModel(run, mesh, task, config, task.module(Transformer), budget=budget)


def _model_of_init(run: RunConfig) -> ModelConfig:
    if not run.init:
        raise UserError(
            "the config starts from the weights that --init names; give a model, or a preset, such as --init bert-base"
        )
    config = PRESETS.get(run.init) or open_folder(find(run.init)).config
    return with_dropout(student_config(run, config), run.dropout)


def _labels(run: RunConfig, config: ModelConfig) -> Any:
    if isinstance(run.task, MultiTask):
        return dict.fromkeys(run.task.parts, ("0", "1"))
    return config.labels or ("0", "1") if getattr(run.task, "has_label_head", True) else ()


def batch_shapes(resolved: ResolvedModel) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and shardings of a batch [k, B / k, ...] of k micro-batches, as `shard_batch` places it."""
    run, task = resolved.run, resolved.task
    batches = task.batches(_empty_part(task), run.batch, run.data.length, run.seed)

    def shape_of(name: str, x: np.ndarray) -> jax.ShapeDtypeStruct:
        shape = (run.accumulate, len(x) // run.accumulate, *x.shape[1:])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding.batch_sharding(resolved.mesh, name, shape))

    return {name: shape_of(name, x) for name, x in batches.empty_batch().items()}


def _empty_part(task: Task) -> Any:
    """A part of the data without examples."""
    if isinstance(task, RecordTask):
        return Records([], [])
    if hasattr(task, "parts"):
        return Parts({name: Records([], []) for name in task.parts})
    zero = np.zeros(1, np.int64)
    return Corpus(np.zeros(0, np.uint16), zero, zero, 0)


class PlaceholderTokenizer:
    """The special tokens that tasks look up; it cannot encode text."""

    def __init__(self, size: int):
        self.size, self.continues = size, np.zeros(size, bool)
        self.bos = self.cls = 1
        self.eos = self.sep = 2
        self.mask, self.pad, self.unk = 3, 0, 3

    @property
    def target(self) -> PlaceholderTokenizer:
        """The tokenizer of target texts: the same."""
        return self

    @property
    def backend(self) -> PlaceholderTokenizer:
        """The object that has `token_to_id`."""
        return self

    def token_to_id(self, name: str) -> int | None:
        """Returns the id of a sentinel of T5, counted from the end of the vocabulary; None for any other token."""
        found = re.fullmatch(r"<extra_id_(\d+)>", name)
        return self.size - 1 - int(found[1]) if found and int(found[1]) < SENTINELS else None

    def max_text_tokens(self, length: int, pair: bool) -> int:
        """Returns the number of tokens in a row that are left next to [CLS] and one or two [SEP]."""
        return length - 3 if pair else length - 2

    def add_special_tokens(self, ids: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Returns the ids of a text between [CLS] and [SEP], the type of each, and the index of the text."""
        return [self.cls, *ids, self.sep], [0] * (len(ids) + 2), [1]
