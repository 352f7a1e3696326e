"""What a run starts from: tokenizer, model and weights, and how large its batches are and how long it is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxlm import families, hosts
from jaxlm.config import ModelConfig, RunConfig
from jaxlm.errors import UserError
from jaxlm.hub.convert import nested
from jaxlm.hub.download import fetch_tokenizer
from jaxlm.lm import LM, find, has_tokenizer, load
from jaxlm.nn import parameters
from jaxlm.tasks.labels import unnamed
from jaxlm.tasks.task import Task


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


def known_labels(run: RunConfig, model: LM | None, task: type[Task]) -> tuple[str, ...] | None:
    """Returns the names of the outputs of the head that a run starts from, in order; None where the head is new.

    Raises UserError as `lm.load` does.
    """
    head = task.head
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


def starting(
    run: RunConfig, model: LM | None, task: Task, labels: Any, resuming: bool
) -> tuple[ModelConfig, LM | None]:
    """The model's config, and the weights to start from, where there are any."""
    if model is None and run.init and run.model is None:
        model = load(run.init, head=task.head or "none", labels=labels or None, say=lambda _: None)
        model = replace(model, params=_without(model.params, model.fresh))  # drawn below, by the run's seed
    elif model is None and run.init and not resuming:
        model = load(run.init)
    if model is not None and run.new_head:
        out = [path for path in parameters.by_path(model.params) if path.startswith(f"{task.head}_head/out/")]
        model = replace(model, params=_without(model.params, out))
    config = run.model or (with_dropout(model.config, run.dropout) if model else None)
    assert config is not None  # as `RunConfig.check` has it
    config = task.configured(config)
    if model is not None and model.pooling:
        task.pooling = model.pooling
    return config, model


def with_dropout(config: ModelConfig, rate: float | None) -> ModelConfig:
    """The config with this dropout everywhere; None: as it says."""
    return config if rate is None else replace(config, dropout=rate, attention_dropout=rate)


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


def check_fits(model: LM, shapes: Any) -> None:
    """Raises UserError where the weights to start from have other shapes than the run's, or lack some but for heads."""
    given, wanted = parameters.by_path(model.params), parameters.by_path(shapes)
    differ = [f"  - {p} {given[p].shape}" for p in given if p not in wanted and not _on_top(p)]
    for path, leaf in wanted.items():
        shape = given[path].shape if path in given else None
        if shape != leaf.shape and not (shape is None and _on_top(path)):
            differ += [f"  - {path} {shape}"] * (shape is not None) + [f"  + {path} {leaf.shape}"]
    if differ:
        lines = "\n".join(sorted(differ, key=lambda line: (line.split()[1], line.split()[0] == "+")))
        raise UserError(
            f"the weights given by --init (-) do not fit the model of the run (+):\n{lines}\nchange --model"
        )


def origin(run: RunConfig, model: LM | None) -> families.Origin:
    """The format of the weights that the run began from: an equal model of another family is not theirs."""
    said: dict[str, Any] = {}
    if model is not None:
        said = model.origin.config if model.origin else {}
    elif run.init:
        with suppress(UserError):  # a run that goes on does without the folder
            said = families.read_config(find(run.init) / "config.json")
    return families.Origin({name: said[name] for name in ("model_type",) if name in said}, heads=None)


def _on_top(path: str) -> bool:
    return "_head/" in path or path.startswith("own")


def start_from(model: LM, fresh: Any, say: Callable[[str], None]) -> Any:
    """The model's parameters, laid out like the fresh ones; heads that it lacks stay fresh, and are said."""
    given = parameters.by_path(model.params)
    new = sorted({path.split("/")[0] for path in parameters.by_path(fresh) if path not in given})
    if new:
        say(f"made new, since the given weights have none: {', '.join(new)}")

    def chosen(key_path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        # A copy: training donates its buffers, and the model given is the caller's.
        return hosts.spread(given.get(parameters.path_of(key_path), leaf), leaf.sharding, may_alias=False)

    return jax.tree_util.tree_map_with_path(chosen, fresh)


def _without(params: Any, paths: Sequence[str]) -> Any:
    return nested({path: leaf for path, leaf in parameters.by_path(params).items() if path not in paths})
