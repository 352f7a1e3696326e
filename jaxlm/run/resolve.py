"""Resolves what a config leaves open: tokenizer, model, labels, batch size and number of steps, all checked once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxlm import families
from jaxlm.config import DROPOUT_SITES, ModelConfig, RunConfig
from jaxlm.data.corpus import Corpus, Prepared, sample_documents
from jaxlm.devices import hosts, sharding
from jaxlm.errors import UserError, suggestion
from jaxlm.hub.convert import tree_shapes
from jaxlm.hub.download import fetch_tokenizer
from jaxlm.hub.gguf.container import is_gguf
from jaxlm.lm import LM, find, tokenizer_folder
from jaxlm.nn.transformer import Transformer
from jaxlm.run import privacy
from jaxlm.run.teacher import bind_reference, bind_teacher, open_cache
from jaxlm.run.weights import Weights, check_fits, known_labels, student_config, token_vectors_of, weights_of
from jaxlm.tasks import make_task, prepare, with_labels
from jaxlm.tasks.labels import Labels
from jaxlm.tasks.task import Task
from jaxlm.vectors.embeddings import TokenVectors


@dataclass(frozen=True, eq=False)
class ResolvedModel:
    """A task and a model on a mesh: what a run compiles.

    run: the config with its model, its batch size and its number of steps.  kind: the class of the module.
    budget: of a private run.
    """

    run: RunConfig
    mesh: Mesh
    task: Task
    model: ModelConfig
    kind: type[Transformer]
    budget: privacy.Budget | None = field(default=None, kw_only=True)


@dataclass(frozen=True, eq=False)
class ResolvedRun(ResolvedModel):
    """A run with its data and the weights that it starts from.

    given: the config as the user gave it.  weights: None: the run initialises them randomly.
    train, held_out: batches, without end for training, one pass for evaluation.
    uncapped: number of held-out tokens before `eval_tokens` limited it; 0 for records.
    teacher: its weights, if the run has one.
    token_vectors: rows of the initial token embeddings, if the run names word vectors.
    """

    given: RunConfig
    data: Prepared
    weights: Weights | None
    train: Any
    held_out: Any
    uncapped: int = 0
    teacher: Weights | None = None
    token_vectors: TokenVectors | None = None

    @property
    def best(self) -> str:
        """The score that selects the best checkpoint."""
        return self.run.best or self.task.best


def resolve(
    run: RunConfig,
    *,
    mesh: Mesh | None = None,
    model: LM | None = None,
    data: Prepared | None = None,
    resumed_labels: Labels | None = None,
    resuming: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> ResolvedRun:
    """Reads the data, tokenizer and weights that a run names, and returns the run with everything they decide.

    Args:
      run: the config as the user gave it.
      mesh: the devices; None: the mesh of `run.mesh`.
      model: the model whose weights the run starts from, instead of `run.init`, and whose class its module has.
      data: prepared data, instead of `run.data`.
      resumed_labels: the names of the head's outputs, of a run that resumes.
      resuming: whether the run folder contains a state of this run.
      log: prints a line for the person who watches the run.

    Returns:
      The resolved run.

    Raises:
      UserError: for a mistake in the config, the data or the weights.
    """
    given, mesh = run, mesh or sharding.make_mesh(run.mesh)
    if model is None and not resuming:
        check_model(run)
    run = with_tokenizer(with_model(run, model), model)
    run.check()
    known = resumed_labels if resuming else known_labels(run, model)
    if data is None:
        own_tokenizer = model.tokenizer if model and not run.tokenizer.path else None
        data = hosts.run_on_first_then_others(lambda: prepare(run, own_tokenizer, log, known))
    else:
        data = with_labels(run, data, known, log)
    uncapped = len(data.held_out.tokens) if isinstance(data.held_out, Corpus) else 0
    if uncapped:
        data = data._replace(held_out=sample_documents(data.held_out, run.eval_tokens, data.tokenizer))
    task = make_task(run, data.tokenizer, data.labels)
    if run.best and run.best not in (*task.scores, "loss"):
        raise UserError(f"best is {run.best!r}{suggestion(run.best, [*task.scores, 'loss'])}")
    weights = weights_of(given, model, task, data.labels, resuming)
    if run.adapter.rank and weights is None and not resuming:
        raise UserError(
            f"adapter.rank is {run.adapter.rank}, but the run has no initial weights to adapt; give them with --init"
        )
    task, config = bind_task(run, weights, task, data.train)
    token_vectors = token_vectors_of(run, config, data.tokenizer)
    task, teacher = bind_teacher(run, task, config, data)
    if teacher is None:
        task, teacher = bind_reference(run, task, config, weights)
    train = task.batches(data.train, run.batch, run.data.length, run.seed)
    if run.privacy.is_on:
        privacy.check_bound_model(config)
        train = privacy.sampled(run, train)
    run = sized(run, config, train)
    train.rows = run.batch
    budget = privacy.resolve_budget(run, train, log) if run.privacy.is_on else None
    open_cache(run, task, train, log)
    held_out = task.batches(data.held_out, run.batch // run.accumulate, run.data.length, None)
    for part, batches in (("training", train), ("held-out", held_out)):
        if not batches:  # without packing an epoch, which a resumed run may not need
            raise UserError(f"the {part} data contain too little for one example of the task; give more")
    kind = task.module(Transformer if model is None else type(model.module))
    return ResolvedRun(
        run,
        mesh,
        task,
        config,
        kind,
        given,
        data,
        weights,
        train,
        held_out,
        uncapped,
        teacher,
        token_vectors,
        budget=budget,
    )


def with_tokenizer(run: RunConfig, model: LM | None) -> RunConfig:
    """Returns the run with the path of its tokenizer: the folder of a hub name, of a GGUF file or of `init`."""
    if is_gguf(run.tokenizer.path):
        return replace(run, tokenizer=replace(run.tokenizer, path=str(find(run.tokenizer.path))))
    if _of_hub(run.tokenizer.path):
        return replace(run, tokenizer=replace(run.tokenizer, path=str(fetch_tokenizer(run.tokenizer.path))))
    if model is not None or not run.init or run.tokenizer.path:
        return run
    folder = find(run.init)
    path = str(tokenizer_folder(folder) or "")
    if not path and run.model is None:
        raise UserError(f"{folder} has no tokenizer; give one with --tokenizer.path")
    return replace(run, tokenizer=replace(run.tokenizer, path=path))


def _of_hub(path: str) -> bool:
    """Whether a string may be a hub name: not an existing path, an address or the name of a tokenizer's file."""
    name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)
    return bool(name) and not Path(path).exists() and Path(path).suffix not in (".json", ".txt", ".model", ".spm")


def with_model(run: RunConfig, model: LM | None) -> RunConfig:
    """Returns the run with its model, where it is known before the data are read.

    A language-modelling task decides the heads of the model at once. The heads of other tasks depend on the labels, so
    such a run from `init` keeps `model=None` here.
    """
    if run.model is not None:
        return run
    heads = getattr(run.task, "heads", None)
    if model is None and run.init and heads is not None:
        folder = find(run.init)
        _check_structure(run.task, families.open_folder(folder).config)
        config = families.open_folder(folder, head=heads).config
    elif model is not None:
        config = model.config
    else:
        return run
    if heads is not None and not set(heads) <= set(config.heads_on_top):
        config = replace(config, heads_on_top=heads)
    return replace(run, model=with_dropout(student_config(run, config), run.dropout), dropout=None)


_STRUCTURES = {"encoder": "masked", "decoder": "causal", "encoder_decoder": "spans or infilling"}


def _check_structure(task: Any, model: ModelConfig) -> None:
    """Raises UserError where a language-modelling task needs another structure than the weights have."""
    objective = "permuted" if model.query_stream else _STRUCTURES[model.structure]
    if model.structure != task.structure:
        raise UserError(
            f"{type(task).__name__} trains models of the structure {task.structure}, but the model of --init has the "
            f"structure {model.structure}; use configs/adapt.py {objective}"
        )
    if model.structure == "encoder" and ("lm" in task.heads) != model.query_stream:  # an encoder's lm reads that stream
        raise UserError(
            f"{type(task).__name__} needs the head {task.heads[0]}, but model.query_stream of --init is "
            f"{model.query_stream}; use configs/adapt.py {objective}"
        )


def bind_task(run: RunConfig, weights: Weights | None, task: Task, train: Any) -> tuple[Task, ModelConfig]:
    """Returns the task bound to the run's model and training data, and the model with the changes of the task."""
    config = run.model or (with_dropout(weights.config, run.dropout) if weights else None)
    assert config is not None  # `RunConfig.check` requires `model` or `init`
    return task.bind(config, weights.pooling if weights else None, train), task.configure(config)


def with_dropout(config: ModelConfig, rate: float | None) -> ModelConfig:
    """Returns the config with this dropout rate at every site whose rate is not 0; None keeps the rates."""
    if rate is None:
        return config
    sites: dict[str, Any] = {site: rate for site in DROPOUT_SITES if getattr(config, site)}
    return replace(config, dropout=rate, attention_dropout=rate, **sites)


def sized(run: RunConfig, config: ModelConfig, epoch_batches: Any) -> RunConfig:
    """Returns the run with `batch` and `steps` computed from `examples`, `epochs` and one epoch of its batches."""
    if run.examples:
        # This does not depend on the mesh, since another number of rows would change the result of the run.
        per_row = len(epoch_batches.lengths) / epoch_batches.rows_in_epoch
        run = replace(run, batch=max(1, round(run.examples / per_row / run.accumulate)) * run.accumulate)
    if run.epochs:
        epoch = epoch_batches.rows_in_epoch / run.batch
        every = run.eval_every or math.ceil(epoch)
        run = replace(run, steps=max(1, math.ceil(run.epochs * epoch)), eval_every=every)
    run = replace(run, model=config, dropout=None)
    run.check()
    return run


def check_model(run: RunConfig) -> None:
    """Raises UserError where the shapes of `run.model` and of the weights of `run.init` differ.

    This runs before the data are read: their tokenizer would be reported as the cause otherwise.
    """
    if run.init and run.model is not None:
        given = student_config(run, families.open_folder(find(run.init)).config)
        check_fits(tree_shapes(given), tree_shapes(run.model))
