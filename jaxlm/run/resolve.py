"""A run with all that its config leaves open: tokenizer, model, labels, rows of a batch and steps, checked once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxlm import families
from jaxlm.config import DROPOUT_SITES, ModelConfig, RunConfig
from jaxlm.data.corpus import Corpus, Prepared, capped
from jaxlm.devices import hosts, sharding
from jaxlm.errors import UserError, perhaps
from jaxlm.hub.convert import tree_shapes
from jaxlm.hub.download import fetch_tokenizer
from jaxlm.lm import LM, find, has_tokenizer
from jaxlm.nn.transformer import Transformer
from jaxlm.run.weights import Weights, check_fits, known_labels, weights_of
from jaxlm.tasks import make_task, prepare, with_labels
from jaxlm.tasks.labels import Labels
from jaxlm.tasks.task import Task


@dataclass(frozen=True, eq=False)
class ResolvedRun:
    """A run with its data and its task, which no longer change.

    given: the config as the user gave it.  run: the config with its model, its rows in a batch and its steps.
    kind: the class of the model.  weights: those that the run starts from; None: it draws them.
    train, held_out: batches, a source for training and one pass for evaluation.
    uncapped: tokens of held-out text before `eval_tokens` of them were chosen; 0 for records.
    """

    given: RunConfig
    run: RunConfig
    mesh: Mesh
    data: Prepared
    task: Task
    model: ModelConfig
    kind: type[Transformer]
    weights: Weights | None
    train: Any
    held_out: Any
    uncapped: int = 0

    @property
    def best(self) -> str:
        """The score by which the best checkpoint is chosen."""
        return self.run.best or self.task.best


def resolve(
    run: RunConfig,
    *,
    mesh: Mesh | None = None,
    model: LM | None = None,
    data: Prepared | None = None,
    resumed_labels: Labels | None = None,
    resuming: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> ResolvedRun:
    """Looks at all that a run names, and returns it with what they decide.

    Args:
      run: as the user gave it.
      mesh: None: that of `run.mesh`.
      model: weights to start from, instead of `run.init`, and the class of the module.
      data: what to read, instead of `run.data`.
      resumed_labels: of a run that resumes, the names of its head's outputs.
      resuming: whether the run folder holds a state of this run.
      say: takes lines for the person who watches the run.

    Raises:
      UserError: for whatever is wrong with the config, the data and the weights.
    """
    given, mesh = run, mesh or sharding.make_mesh(run.mesh)
    if model is None and not resuming:
        check_model(run)
    run = with_tokenizer(with_model(run, model), model)
    run.check()
    known = resumed_labels if resuming else known_labels(run, model)
    if data is None:
        own_tokenizer = model.tokenizer if model and not run.tokenizer.path else None
        data = hosts.after_first(lambda: prepare(run, own_tokenizer, say, known))
    else:
        data = with_labels(run, data, known, say)
    uncapped = len(data.held_out.tokens) if isinstance(data.held_out, Corpus) else 0
    if uncapped:
        data = data._replace(held_out=capped(data.held_out, run.eval_tokens, data.tokenizer))
    task = make_task(run, data.tokenizer, data.labels)
    if run.best and run.best not in (*task.scores, "loss"):
        raise UserError(f"best is {run.best!r}{perhaps(run.best, [*task.scores, 'loss'])}")
    weights = weights_of(given, model, task, data.labels, resuming)
    task, config = bound(run, weights, task, data.train)
    train = task.batches(data.train, run.batch, run.data.length, run.seed)
    run = sized(run, config, train)
    train.rows = run.batch
    held_out = task.batches(data.held_out, run.batch // run.accumulate, run.data.length, None)
    for part, batches in (("training", train), ("held-out", held_out)):
        if not len(batches):
            raise UserError(f"no example can be made of the {part} data, which are too few for the task; give more")
    kind = task.module(Transformer if model is None else type(model.module))
    return ResolvedRun(given, run, mesh, data, task, config, kind, weights, train, held_out, uncapped)


def with_tokenizer(run: RunConfig, model: LM | None) -> RunConfig:
    """The run with the tokenizer of the weights that it starts from, where it names none; of a hub name, its folder."""
    if _of_hub(run.tokenizer.path):
        return replace(run, tokenizer=replace(run.tokenizer, path=str(fetch_tokenizer(run.tokenizer.path))))
    if model is not None or not run.init or run.tokenizer.path:
        return run
    folder = find(run.init)
    path = str(folder) if has_tokenizer(folder) else ""
    if not path and run.model is None:
        raise UserError(f"{folder} holds no tokenizer; give one with --tokenizer.path")
    return replace(run, tokenizer=replace(run.tokenizer, path=path))


def _of_hub(path: str) -> bool:
    """Whether a path is none, and may be a name of the hub: no address, no end of a file's name."""
    name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)
    return bool(name) and not Path(path).exists() and Path(path).suffix not in (".json", ".txt", ".model", ".spm")


def with_model(run: RunConfig, model: LM | None) -> RunConfig:
    """Returns the run with its model, as far as that is known before the data are read.

    The model of weights gets the heads of a language-modelling task; those of other tasks depend on the labels.
    """
    if run.model is not None:
        return run
    heads = getattr(run.task, "heads", None)
    if model is None and run.init and heads is not None:
        folder = find(run.init)
        _check_structure(run.task, families.look(folder).config)
        config = families.look(folder, head=heads).config
    elif model is not None:
        config = model.config
    else:
        return run
    if heads is not None and not set(heads) <= set(config.heads_on_top):
        config = replace(config, heads_on_top=heads)
    return replace(run, model=with_dropout(config, run.dropout), dropout=None)


_STRUCTURES = {"encoder": "masked", "decoder": "causal", "encoder_decoder": "spans or infilling"}


def _check_structure(task: Any, model: ModelConfig) -> None:
    """Raises UserError where a language-modelling task is of another structure than the weights."""
    wanted = task.structure
    if model.structure != wanted:
        raise UserError(
            f"{type(task).__name__} trains a model of the structure {wanted}, the one of --init is of the structure "
            f"{model.structure}; train it by configs/adapt.py {_STRUCTURES[model.structure]}"
        )


def bound(run: RunConfig, weights: Weights | None, task: Task, train: Any) -> tuple[Task, ModelConfig]:
    """Returns the task bound to the run's model and training part, and the model with what the task changes in it."""
    config = run.model or (with_dropout(weights.config, run.dropout) if weights else None)
    assert config is not None  # as `RunConfig.check` has it
    return task.bound(config, weights.pooling if weights else None, train), task.configured(config)


def with_dropout(config: ModelConfig, rate: float | None) -> ModelConfig:
    """The config with this dropout at every site but those that have a rate of 0; None: as it says."""
    if rate is None:
        return config
    sites: dict[str, Any] = {site: rate for site in DROPOUT_SITES if getattr(config, site)}
    return replace(config, dropout=rate, attention_dropout=rate, **sites)


def sized(run: RunConfig, config: ModelConfig, once: Any) -> RunConfig:
    """The run with its model, its rows in a batch and its steps as numbers, as the length of the data decides them."""
    if run.examples:
        # The same on any mesh: a row more or less would be another run.
        per_row = len(once.lengths) / once.rows_in_epoch
        run = replace(run, batch=max(1, round(run.examples / per_row / run.accumulate)) * run.accumulate)
    if run.epochs:
        epoch = once.rows_in_epoch / run.batch
        every = run.eval_every or math.ceil(epoch)
        run = replace(run, steps=max(1, math.ceil(run.epochs * epoch)), eval_every=every)
    run = replace(run, model=config, dropout=None)
    run.check()
    return run


def check_model(run: RunConfig) -> None:
    """Raises UserError where the run names both a model and a folder of weights of another shape.

    It is asked before the data are read, whose tokenizer would be blamed otherwise.
    """
    if run.init and run.model is not None:
        check_fits(tree_shapes(families.look(find(run.init)).config), tree_shapes(run.model))
