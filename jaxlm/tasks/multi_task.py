"""Several tasks on one body, a head for each; a row of a batch holds examples of one of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Self

import jax
import numpy as np

from jaxlm import config
from jaxlm.config import ModelConfig, RunConfig
from jaxlm.data.batches import Batch, Batches, Features
from jaxlm.data.corpus import Prepared
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.hub.pooling import Pooling
from jaxlm.lm import LM, with_task
from jaxlm.nn.heads import Classes, PerToken
from jaxlm.nn.losses import Losses
from jaxlm.nn.transformer import Transformer
from jaxlm.reports.report import Section
from jaxlm.tasks import labels
from jaxlm.tasks.reading import prepare as prepare_records
from jaxlm.tasks.states import hidden
from jaxlm.tasks.task import EvalResult, Task, register

SHARED = ("tokens_BT", "segments_BT", "positions_BT", "types_BT")  # fields that are not of one task
_PERIOD = 1000  # rows after which the order of the tasks repeats


def own_head(name: str) -> str:
    """The name, in the model, of the head of a part."""
    return f"own_{name}"


class Parts(dict[str, Any]):
    """Something of each part, by its name: records, batches."""

    @property
    def said(self) -> str:
        """How much there is."""
        return " + ".join(f"{name} {part.said}" for name, part in self.items())


class TaskMixture(Task):
    """`config.MultiTask`: the sum of the parts' losses, each divided by its own weight."""

    def __init__(self, task: config.MultiTask, parts: Mapping[str, Any]):
        method = lambda name: lambda module, x: getattr(module, own_head(name))(x)
        self.task = task
        self.parts = {
            name: part if part.head is None else part.replaced(method=method(name)) for name, part in parts.items()
        }
        self.max_examples = max(part.max_examples for part in parts.values())
        own = (f"{name}/{score}" for name, part in parts.items() for score in part.scores)
        self.scores = ("mean", *own)  # mean: of the score that each part ranks by

    def bound(self, model: ModelConfig, pooling: Pooling | None = None, part: Any = None) -> Self:
        if model.shared_transform:
            raise UserError("the model has one transform before its heads, which several tasks cannot share yet")
        of = lambda name: None if part is None else part[name]
        parts = {name: one.bound(model, pooling, of(name)) for name, one in self.parts.items()}
        return super().bound(model, pooling, part).replaced(parts=parts)

    def configured(self, model: ModelConfig) -> ModelConfig:
        return replace(model, heads_on_top=())

    def module(self, kind: type[Transformer]) -> type[Transformer]:
        """A class with a head `own_NAME` for each part."""
        heads = {name: (part.head, part.labels) for name, part in self.parts.items() if part.head is not None}

        class WithHeads(kind):  # type: ignore[misc, valid-type]
            def setup(self) -> None:
                super().setup()
                for name, (head, names) in heads.items():
                    setattr(self, own_head(name), _head(replace(self.config, labels=names), head, self.dtype))

            def initialise(self, tokens_BT: jax.Array) -> None:
                x_BTD = self(tokens_BT)
                for name in heads:
                    getattr(self, own_head(name))(x_BTD)

        return WithHeads

    @property
    def folders(self) -> tuple[str, ...]:
        return tuple(self.parts)

    def exports(self, lm: LM) -> dict[str, tuple[Task, LM]]:
        """For each part the body with its head, as that task alone has them."""
        body = {key: value for key, value in lm.params.items() if not key.startswith(own_head(""))}
        found: dict[str, tuple[Task, LM]] = {}
        for name, part in self.parts.items():
            alone = part.configured(lm.config)
            params = body if part.head is None else body | {f"{part.head}_head": lm.params[own_head(name)]}
            how = {name: getattr(lm.module, name) for name in ("constrain", "dtype", "kernel", "precision")}
            module = Transformer(alone, **how)
            own = with_task(replace(lm, config=alone, params=params, module=module), part.task, part.length)
            found[name] = part, own
        return found

    def examples(self, part: Parts, training: bool) -> Any:
        return Parts({name: one.examples(part[name], training) for name, one in self.parts.items()})

    def batches(self, part: Parts, rows: int, length: int, seed: int | None) -> Any:
        """Training batches, mixed by the parts' weights; or, of each part, the batches that evaluate it, with the
        fields that training batches have."""
        each = 1 if seed is not None else rows
        apart = {
            name: Batches(examples, each, length, self.parts[name].max_examples, seed)
            for name, examples in self.examples(part, seed is not None).items()
        }
        if seed is None:
            return Parts({name: Evaluated(apart, name) for name in apart})
        return Mixed(apart, {name: self.task.parts[name].weight for name in apart}, rows, seed)

    def losses(self, module: Transformer, params: Any, batch: Batch, key: jax.Array | None) -> Losses:
        x_BTD, auxiliary = hidden(module, params, batch, key)
        losses: dict[str, Any] = {}
        outputs: dict[str, jax.Array] = {}
        for name, part in self.parts.items():
            found, kept = part.losses_of(module, params, x_BTD, _view(batch, name), key)
            losses[f"{name}/loss"] = found["loss"]
            outputs |= {f"{name}.{field}": array for field, array in kept.items()}
        return losses | auxiliary, outputs

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        return {f"{name}/loss": part.weights(_view(batch, name))["loss"] for name, part in self.parts.items()}

    def measure(
        self, lm: LM, run_eval: Callable[[Any], EvalResult], batches: Parts, part: Parts
    ) -> tuple[dict[str, float], Any]:
        """All scores of each part; `mean` is of the score that each part ranks by."""
        scores: dict[str, float] = {}
        found, loss, ranked = {}, 0.0, []
        for name, one in self.parts.items():
            alone = lambda batches, name=name: _seen_of(run_eval(batches), name)
            own, found[name] = one.measure(lm, alone, batches[name], part[name])
            scores |= {f"{name}/{score}": value for score, value in own.items()}
            loss += own["loss"]
            ranked.append(own[one.best])
        return {"loss": loss, "mean": float(np.mean(ranked)), **scores}, found

    def balance(self, part: Parts) -> str:
        lines = ((name, one.balance(part[name])) for name, one in self.parts.items())
        return "; ".join(f"{name}: {line}" for name, line in lines if line)

    def truncated(self, batches: Any) -> list[str]:
        lines = ((name, one.truncated(batches.parts[name])) for name, one in self.parts.items())
        return [f"{name}: {line}" for name, some in lines for line in some]

    def by_class(self, part: Parts, predictions: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        each = ((name, one.by_class(part[name], predictions[name])) for name, one in self.parts.items())
        return {f"{name}/{label}": scores for name, classes in each for label, scores in classes.items()}

    def warning(self, part: Parts, predictions: Mapping[str, Any]) -> str | None:
        lines = ((name, one.warning(part[name], predictions[name])) for name, one in self.parts.items())
        return "; ".join(f"{name}: {line}" for name, line in lines if line) or None

    def sections(self, part: Parts, predictions: Mapping[str, Any]) -> list[Section]:
        return [
            section._replace(title=f"{name}: {section.title}")
            for name, one in self.parts.items()
            for section in one.sections(part[name], predictions[name])
        ]


class Mixed:
    """Training batches whose rows are of several tasks: row by row another, in the order of a shuffled pattern in which
    each has its share.  The fields of a task bear its name, as in `ner.labels_BT`; in the rows of others they are 0."""

    reads_state = False

    def __init__(self, parts: dict[str, Batches], weights: dict[str, float], rows: int, seed: int):
        self.parts, self.rows = parts, rows
        self.length = next(iter(parts.values())).length
        shares = np.array([weights[name] or part.rows_in_epoch for name, part in parts.items()], float)
        counts = np.maximum(1, np.floor(_PERIOD * shares / (shares.sum() or 1))).astype(int)
        self._pattern = np.random.default_rng((seed, 2)).permutation(np.repeat(np.arange(len(parts)), counts))
        chosen = self._pattern[:, None] == np.arange(len(parts))
        self._before = np.cumsum(chosen, axis=0) - chosen  # rows of each part before a place of the pattern
        self._counts = counts

    def __len__(self) -> int:
        """Number of batches in one epoch, as `Batches` has it."""
        return -(-self.rows_in_epoch // self.rows)

    @property
    def rows_in_epoch(self) -> int:
        """Rows that the parts together have."""
        return sum(part.rows_in_epoch for part in self.parts.values())

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each unit of all parts."""
        return np.concatenate([part.lengths for part in self.parts.values()])

    @property
    def true_lengths(self) -> np.ndarray:
        """As `Batches.true_lengths`."""
        return np.concatenate([part.true_lengths for part in self.parts.values()])

    def nothing(self) -> Features:
        """A batch of padding."""
        return _empty(self.parts, self.rows)

    def batch(self, step: int, state: Any, rows: Iterable[int] | None = None) -> Features:
        """`batch_at(step, rows)`, whatever the training state."""
        return self.batch_at(step, rows)

    def batch_at(self, step: int, rows: Iterable[int] | None = None) -> Features:
        """The fields of batch `step`, as `Batches.batch_at` has them."""
        batch = _empty(self.parts, self.rows)
        names = list(self.parts)
        for b in range(self.rows) if rows is None else rows:
            turn, place = divmod(step * self.rows + b, len(self._pattern))
            k = self._pattern[place]
            row = self.parts[names[k]].batch_at(int(turn * self._counts[k] + self._before[place, k]))
            for field, value in row.items():
                batch[field if field in SHARED else f"{names[k]}.{field}"][b] = value[0]
        return batch


class Evaluated:
    """The evaluation batches of one part, with the fields of all."""

    def __init__(self, parts: dict[str, Batches], name: str):
        self._parts, self._name = parts, name
        self.part = parts[name]

    def __len__(self) -> int:
        return len(self.part)

    def batch_at(self, step: int, rows: Iterable[int] | None = None) -> Features:
        """The fields of batch `step`."""
        found = self.part.batch_at(step, rows)
        named = {field if field in SHARED else f"{self._name}.{field}": value for field, value in found.items()}
        return _empty(self._parts, self.part.rows) | named

    def units_at(self, step: int) -> list[list[tuple[int, int]]]:
        """As `Batches.units_at`."""
        return self.part.units_at(step)

    @property
    def examples(self) -> Any:
        """The part's."""
        return self.part.examples


def _empty(parts: dict[str, Batches], rows: int) -> Features:
    """A batch of nothing, with the fields of all parts."""
    batch: Features = {}
    for name, part in parts.items():
        for field, value in part.nothing().items():
            batch[field if field in SHARED else f"{name}.{field}"] = np.zeros((rows, *value.shape[1:]), value.dtype)
    return batch


def _seen_of(seen: EvalResult, name: str) -> EvalResult:
    """What one part's task would have seen alone."""
    own = lambda example: {f.removeprefix(f"{name}."): x for f, x in example.items() if f.startswith(f"{name}.")}
    outputs = [[own(example) for example in unit] for unit in seen.outputs]
    return EvalResult({"loss": seen.losses[f"{name}/loss"]}, outputs)


def _view(batch: Batch, name: str) -> Batch:
    """The fields of one part, under the names that it knows."""
    own = {field.removeprefix(f"{name}."): x for field, x in batch.items() if field.startswith(f"{name}.")}
    return {field: batch[field] for field in SHARED if field in batch} | own


def _head(model: ModelConfig, head: str, dtype: Any) -> Any:
    if head == "classes":
        return Classes(model, dtype)
    return PerToken(model, 2 if head == "span" else len(model.labels), model.rate(f"{head}_dropout"), dtype)


def prepare(
    run: RunConfig, kinds: Mapping[type, Any], tokenizer: Tokenizer | None, say: Callable[[str], None]
) -> Prepared:
    """The data of all parts.  Raises UserError for bad data, with the part's name."""
    if tokenizer is None and not run.tokenizer.path:
        raise UserError("several tasks share a tokenizer; give one with --tokenizer.path, or weights with --init")
    found: dict[str, Prepared] = {}
    for name, part in run.task.parts.items():
        alone = replace(run, task=part.task, data=replace(part.data, length=run.data.length))
        try:
            found[name] = prepare_records(alone, kinds[type(part.task)], tokenizer, say)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        tokenizer = found[name].tokenizer
    assert tokenizer is not None
    take = lambda side: Parts({name: getattr(part, side) for name, part in found.items()})
    rows = {f"{name} {what}": count for name, part in found.items() for what, count in part.rows.items()}
    digest = hashlib.sha256("".join(part.fingerprint for part in found.values()).encode()).hexdigest()[:16]
    return Prepared(tokenizer, take("train"), take("held_out"), rows, digest, take("labels"))


def with_labels(
    run: RunConfig,
    data: Prepared,
    kinds: Mapping[type, Any],
    known: Mapping[str, tuple[str, ...]],
    say: Callable[[str], None],
) -> Prepared:
    """Returns the data with the labels of each part in the order of the head that the run starts from.

    A part whose labels differ from those of the head begins with a randomly initialised head if another part matches;
    `say` prints a line about it.

    Args:
      known: for each part whose kind of head the weights have, the names of the outputs of that head.

    Raises:
      UserError: where no part has the labels of the head.
    """
    train, held_out, names = Parts(data.train), Parts(data.held_out), Parts(data.labels)
    differ: dict[str, UserError] = {}
    for name, outputs in known.items():
        task = run.task.parts[name].task
        parts = train[name], train[name], held_out[name]
        say_of_part = lambda line, name=name: say(f"{line} (part {name})")
        try:
            found = labels.agreed(kinds[type(task)], task, *parts, outputs, say_of_part)
        except UserError as error:
            differ[name] = error
        else:
            names[name], train[name], held_out[name] = found
    for name, problem in differ.items():
        if len(differ) == len(known):
            raise UserError(f"{name}: {problem}") from None
        say(f"labels    the head of the part {name} is randomly initialised: the weights have a head with other labels")
    return data._replace(train=train, held_out=held_out, labels=names)


register(config.MultiTask, TaskMixture)
