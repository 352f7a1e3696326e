"""Several tasks with one body and a head per task.  A row of a batch contains examples of one task."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Self

import jax
import numpy as np

from jaxlm import config
from jaxlm.config import ModelConfig, RunConfig
from jaxlm.data.batches import Batch, Batches
from jaxlm.data.corpus import Prepared
from jaxlm.data.joined import Features
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.hub.pooling import Pooling
from jaxlm.lm import LM, with_task
from jaxlm.nn.heads import ClassesHead, PerTokenHead
from jaxlm.nn.losses import Losses
from jaxlm.nn.transformer import Transformer
from jaxlm.reports.report import Section
from jaxlm.tasks import labels
from jaxlm.tasks.reading import prepare as prepare_records
from jaxlm.tasks.task import EvalResult, Task, register

SHARED = ("tokens_BT", "segments_BT", "positions_BT", "types_BT")  # fields that all tasks have
_PERIOD = 1000  # rows after which the order of the tasks repeats


def part_head(name: str) -> str:
    """Returns the name of the module and of the parameters of a part's head."""
    return f"own_{name}"


class Parts(dict[str, Any]):
    """A mapping from the name of each part to its records, examples or batches."""

    @property
    def summary(self) -> str:
        """The number of examples of each part, for a message."""
        return " + ".join(f"{name} {part.summary}" for name, part in self.items())


class TaskMixture(Task):
    """`config.MultiTask`: minimises the sum of the losses of the parts, each divided by its weight."""

    def __init__(self, task: config.MultiTask, parts: Mapping[str, Any]):
        method = lambda name: lambda module, x: getattr(module, part_head(name))(x)
        self.task = task
        self.parts = {
            name: part if part.head is None else part.replace_fields(method=method(name))
            for name, part in parts.items()
        }
        self.max_examples = max(part.max_examples for part in parts.values())
        part_scores = (f"{name}/{score}" for name, part in parts.items() for score in part.scores)
        self.scores = ("mean", *part_scores)  # the mean of the first score of each part

    def bind(self, model: ModelConfig, pooling: Pooling | None = None, part: Any = None) -> Self:
        if model.shared_transform:
            raise UserError("the model has one transform before its heads, which several tasks cannot share yet")
        for name, task in self.parts.items():
            if getattr(task.task, "crf", False):
                raise UserError(f"the part {name} has a CRF, which is not supported with several tasks; leave out crf")
        parts = {
            name: task.bind(model, pooling, None if part is None else part[name]) for name, task in self.parts.items()
        }
        return super().bind(model, pooling, part).replace_fields(parts=parts)

    def configure(self, model: ModelConfig) -> ModelConfig:
        """Returns the config without heads; all parts have the same global tokens, since they share rows."""
        heads = [(part.head,) if part.head else () for part in self.parts.values()]
        rules = {replace(model, heads_on_top=on_top).global_rule for on_top in heads}
        if model.global_attention and model.global_tokens == "head":
            model = replace(model, global_tokens=rules.pop() if len(rules) == 1 else "first")
        return replace(model, heads_on_top=())

    def module(self, kind: type[Transformer]) -> type[Transformer]:
        """Returns a class with a head `own_NAME` for each part."""
        heads = {name: (part.head, part.labels) for name, part in self.parts.items() if part.head is not None}

        class WithHeads(kind):  # type: ignore[misc, valid-type]
            def setup(self) -> None:
                super().setup()
                for name, (head, names) in heads.items():
                    setattr(self, part_head(name), _head(replace(self.config, labels=names), head, self.dtype))

            def initialise(self, tokens_BT: jax.Array) -> None:
                x_BTD = self(tokens_BT)
                for name in heads:
                    getattr(self, part_head(name))(x_BTD)

        return WithHeads

    @property
    def folders(self) -> tuple[str, ...]:
        return tuple(self.parts)

    def exports(self, lm: LM) -> dict[str, tuple[Task, LM]]:
        """Returns for each part a model with the body and the part's head, as if its task were trained alone."""
        body = {key: value for key, value in lm.params.items() if not key.startswith(part_head(""))}
        options = {name: getattr(lm.module, name) for name in ("constrain", "dtype", "kernel", "precision")}
        models: dict[str, tuple[Task, LM]] = {}
        for name, part in self.parts.items():
            model = part.configure(lm.config)
            params = body if part.head is None else body | {f"{part.head}_head": lm.params[part_head(name)]}
            part_lm = replace(lm, config=model, params=params, module=Transformer(model, **options))
            models[name] = part, with_task(part_lm, part.task, part.length)
        return models

    def examples(self, part: Parts, training: bool) -> Any:
        return Parts({name: task.examples(part[name], training) for name, task in self.parts.items()})

    def batches(self, part: Parts, rows: int, length: int, seed: int | None) -> Any:
        """Returns training batches that mix the parts by their weights, or the evaluation batches of each part.

        Evaluation batches have the same fields as training batches.
        """
        by_part = {
            name: Batches(examples, rows, length, self.parts[name].max_examples, seed)
            for name, examples in self.examples(part, seed is not None).items()
        }
        if seed is None:
            return Parts({name: PartBatches(by_part, name) for name in by_part})
        return MixedBatches(by_part, {name: self.task.parts[name].weight for name in by_part}, rows, seed)

    def losses_from_states(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> Losses:
        losses: dict[str, Any] = {}
        outputs: dict[str, jax.Array] = {}
        for name, part in self.parts.items():
            own_losses, own_outputs = part.losses_from_states(module, params, x_BTD, _view(batch, name), key)
            losses[f"{name}/loss"] = own_losses["loss"]
            outputs |= {f"{name}.{field}": array for field, array in own_outputs.items()}
        return losses, outputs

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        return {f"{name}/loss": part.weights(_view(batch, name))["loss"] for name, part in self.parts.items()}

    def measure(
        self, lm: LM, run_eval: Callable[[Any], EvalResult], batches: Parts, part: Parts
    ) -> tuple[dict[str, float], Any]:
        """Returns all scores of each part, and `mean`, the mean of the first score of each part."""
        scores: dict[str, float] = {}
        predictions, loss, best = {}, 0.0, []
        for name, task in self.parts.items():
            run_part = lambda batches, name=name: _part_result(run_eval(batches), name)
            part_scores, predictions[name] = task.measure(lm, run_part, batches[name], part[name])
            scores |= {f"{name}/{score}": value for score, value in part_scores.items()}
            loss += part_scores["loss"]
            best.append(part_scores[task.best])
        return {"loss": loss, "mean": float(np.mean(best)), **scores}, predictions

    def describe_labels(self, part: Parts) -> str:
        lines = ((name, task.describe_labels(part[name])) for name, task in self.parts.items())
        return "; ".join(f"{name}: {line}" for name, line in lines if line)

    def truncation_warnings(self, batches: Any) -> list[str]:
        by_part = ((name, task.truncation_warnings(batches.parts[name])) for name, task in self.parts.items())
        return [f"{name}: {line}" for name, lines in by_part for line in lines]

    def by_class(self, part: Parts, predictions: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        by_part = ((name, task.by_class(part[name], predictions[name])) for name, task in self.parts.items())
        return {f"{name}/{label}": scores for name, by_class in by_part for label, scores in by_class.items()}

    def warning(self, part: Parts, predictions: Mapping[str, Any]) -> str | None:
        lines = ((name, task.warning(part[name], predictions[name])) for name, task in self.parts.items())
        return "; ".join(f"{name}: {line}" for name, line in lines if line) or None

    def sections(self, part: Parts, predictions: Mapping[str, Any]) -> list[Section]:
        return [
            section._replace(title=f"{name}: {section.title}")
            for name, task in self.parts.items()
            for section in task.sections(part[name], predictions[name])
        ]


class MixedBatches:
    """Training batches with rows of several tasks.

    A shuffled pattern, in which each task has its share, assigns rows to tasks.  The fields of a task have its name as
    a prefix, as in `ner.labels_BT`, and are 0 in the rows of other tasks.
    """

    reads_state = False

    def __init__(self, parts: dict[str, Batches], weights: dict[str, float], rows: int, seed: int):
        self.parts, self.rows = parts, rows
        self.length = next(iter(parts.values())).length
        shares = np.array([weights[name] or part.rows_in_epoch for name, part in parts.items()], float)
        counts = np.maximum(1, np.floor(_PERIOD * shares / (shares.sum() or 1))).astype(int)
        self._pattern = np.random.default_rng((seed, 2)).permutation(np.repeat(np.arange(len(parts)), counts))
        chosen = self._pattern[:, None] == np.arange(len(parts))
        self._before = np.cumsum(chosen, axis=0) - chosen  # rows of each part before each position of the pattern
        self._counts = counts

    def __len__(self) -> int:
        """The number of batches in one epoch, as for `Batches`."""
        return -(-self.rows_in_epoch // self.rows)

    @property
    def rows_in_epoch(self) -> int:
        """The number of rows of all parts."""
        return sum(part.rows_in_epoch for part in self.parts.values())

    @property
    def lengths(self) -> np.ndarray:
        """The length in tokens of each unit of all parts."""
        return np.concatenate([part.lengths for part in self.parts.values()])

    @property
    def true_lengths(self) -> np.ndarray:
        """As `Batches.true_lengths`."""
        return np.concatenate([part.true_lengths for part in self.parts.values()])

    def progress(self) -> Any:
        """Returns `Batches.progress` of each part."""
        return {name: part.progress() for name, part in self.parts.items()}

    def resume(self, progress: Any) -> None:
        """Continues from the `progress` of equal batches."""
        for name, part in self.parts.items():
            part.resume(progress[name])

    def empty_batch(self) -> Features:
        """Returns a batch of padding."""
        return _empty(self.parts, self.rows)

    def batch(self, step: int, state: Any, rows: Iterable[int] | None = None) -> Features:
        """Returns `batch_at(step, rows)`; the training state is ignored."""
        return self.batch_at(step, rows)

    def batch_at(self, step: int, rows: Iterable[int] | None = None) -> Features:
        """Returns the fields of batch `step`, as `Batches.batch_at` does."""
        names = list(self.parts)
        chosen: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
        for b in range(self.rows) if rows is None else rows:
            repeat, position = divmod(step * self.rows + b, len(self._pattern))
            k = self._pattern[position]
            chosen[names[k]].append((int(repeat * self._counts[k] + self._before[position, k]), b))
        batch: Features = {}
        for name, part in self.parts.items():
            for field, value in part.fill(chosen[name]).items():
                full_name = _full_name(name, field)
                # The tasks fill different rows of the fields that they share.
                batch[full_name] = batch[full_name] + value if full_name in batch else value
        return batch


class PartBatches:
    """The evaluation batches of one part, with the fields of all parts."""

    def __init__(self, parts: dict[str, Batches], name: str):
        self._parts, self._name = parts, name
        self.part = parts[name]

    def __len__(self) -> int:
        return len(self.part)

    def batch_at(self, step: int, rows: Iterable[int] | None = None) -> Features:
        """Returns the fields of batch `step`."""
        fields = {_full_name(self._name, field): value for field, value in self.part.batch_at(step, rows).items()}
        return _empty(self._parts, self.part.rows) | fields

    def units_at(self, step: int) -> list[list[tuple[int, int]]]:
        """As `Batches.units_at`."""
        return self.part.units_at(step)

    @property
    def examples(self) -> Any:
        """The examples of the part."""
        return self.part.examples


def _full_name(name: str, field: str) -> str:
    """Returns the name, in mixed batches, of a field of the part `name`."""
    return field if field in SHARED else f"{name}.{field}"


def _own_fields(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the fields of the part `name`, without its prefix."""
    return {field.removeprefix(f"{name}."): x for field, x in fields.items() if field.startswith(f"{name}.")}


def _empty(parts: dict[str, Batches], rows: int) -> Features:
    """Returns a batch of padding, with the fields of all parts."""
    batch: Features = {}
    for name, part in parts.items():
        for field, value in part.empty_batch().items():
            batch[_full_name(name, field)] = np.zeros((rows, *value.shape[1:]), value.dtype)
    return batch


def _part_result(result: EvalResult, name: str) -> EvalResult:
    """Returns the result of an evaluation with the losses and outputs of one part."""
    outputs = [[_own_fields(example, name) for example in unit] for unit in result.outputs]
    return EvalResult({"loss": result.losses[f"{name}/loss"]}, outputs)


def _view(batch: Batch, name: str) -> Batch:
    """Returns the batch with the fields of one part, under the names that its task reads."""
    return {field: batch[field] for field in SHARED if field in batch} | _own_fields(batch, name)


def _head(model: ModelConfig, head: str, dtype: Any) -> Any:
    if head == "classes":
        return ClassesHead(model, dtype)
    return PerTokenHead(model, 2 if head == "span" else len(model.labels), model.rate(f"{head}_dropout"), dtype)


def prepare(
    run: RunConfig, kinds: Mapping[type, Any], tokenizer: Tokenizer | None, log: Callable[[str], None]
) -> Prepared:
    """Returns the data of all parts.  Raises UserError for invalid data, with the name of the part."""
    if tokenizer is None and not run.tokenizer.path:
        raise UserError("several tasks share a tokenizer; give one with --tokenizer.path, or weights with --init")
    prepared: dict[str, Prepared] = {}
    for name, part in run.task.parts.items():
        part_run = replace(run, task=part.task, data=replace(part.data, length=run.data.length))
        try:
            prepared[name] = prepare_records(part_run, kinds[type(part.task)], tokenizer, log)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        tokenizer = prepared[name].tokenizer
    assert tokenizer is not None
    collect = lambda field: Parts({name: getattr(part, field) for name, part in prepared.items()})
    rows = {f"{name} {what}": count for name, part in prepared.items() for what, count in part.rows.items()}
    digest = hashlib.sha256("".join(part.fingerprint for part in prepared.values()).encode()).hexdigest()[:16]
    return Prepared(tokenizer, collect("train"), collect("held_out"), rows, digest, collect("labels"))


def with_labels(
    run: RunConfig,
    data: Prepared,
    kinds: Mapping[type, Any],
    known: Mapping[str, tuple[str, ...]],
    log: Callable[[str], None],
) -> Prepared:
    """Returns the data with the labels of each part in the order of the head that the run starts from.

    A part whose labels differ from those of the head starts from a randomly initialised head if another part matches;
    `log` prints a line about it.

    Args:
      run: the run.
      data: the data, prepared without a head.
      kinds: config of a task -> its class.
      known: for each part with a head in the weights, the names of the outputs of that head.
      log: prints a line.

    Raises:
      UserError: if no part has the labels of the head.
    """
    train, held_out, names = Parts(data.train), Parts(data.held_out), Parts(data.labels)
    differ: dict[str, UserError] = {}
    for name, outputs in known.items():
        task = run.task.parts[name].task
        parts = train[name], train[name], held_out[name]
        say_of_part = lambda line, name=name: log(f"{line} (part {name})")
        try:
            aligned = labels.align_labels(kinds[type(task)], task, *parts, outputs, say_of_part)
        except UserError as error:
            differ[name] = error
        else:
            names[name], train[name], held_out[name] = aligned
    for name, problem in differ.items():
        if len(differ) == len(known):
            raise UserError(f"{name}: {problem}") from None
        log(f"labels    the head of the part {name} is randomly initialised: the weights have a head with other labels")
    return data._replace(train=train, held_out=held_out, labels=names)


register(config.MultiTask, TaskMixture)
