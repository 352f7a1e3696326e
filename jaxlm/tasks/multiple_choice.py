"""Multiple choice: which of several options answers a question."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import config
from jaxlm.config.ranges import short_repr
from jaxlm.data.batches import Batch
from jaxlm.data.formats.lines import Place, Row
from jaxlm.data.formats.rows import Columns
from jaxlm.data.joined import Features
from jaxlm.errors import UserError
from jaxlm.nn.losses import Sum
from jaxlm.nn.transformer import Transformer
from jaxlm.reports.report import Section, mistakes
from jaxlm.tasks.cells import Record, Records, column, listed, text_of
from jaxlm.tasks.records import HeadTask, Outputs, add_special_tokens
from jaxlm.tasks.states import HeadLogits, example_states
from jaxlm.tasks.task import register


class MultipleChoiceTask(HeadTask):
    """`config.MultipleChoice`, with one output of the head "classes": the score of an option.

    A unit contains the options of a question, each as an example `question, option`; the softmax is over the unit.
    """

    head = "classes"
    classes = True
    remedies: Mapping[str, tuple[str, str]] = {
        "T": ("questions", "raise --data.length, which includes all options of a question")
    }
    fields: Mapping[str, Any] = {"labels_BE": np.float32, "groups_BE": np.int32}
    exported_as: Mapping[str, str] = {
        f"{family}ForSequenceClassification": f"{family}ForMultipleChoice" for family in ("Bert", "Albert", "DebertaV2")
    }
    task: config.MultipleChoice

    @classmethod
    def columns(cls, task: config.MultipleChoice, labelled: bool) -> Columns:
        needed = (task.question, *task.options, *((task.label,) if labelled else ()))
        return Columns(needed, (task.label,), class_names=False)

    @classmethod
    def read(cls, task: config.MultipleChoice, row: Row, place: Place) -> Record:
        if len(task.options) == 1:
            options = listed(column(row, task.options[0], place, "--task.options"), task.options[0], place)
            if not isinstance(options, (list, tuple)) or not all(isinstance(option, str) for option in options):
                raise UserError(
                    f"{place}: column {task.options[0]!r} holds {short_repr(options)}, not a list of texts; fix it"
                )
        else:
            options = [text_of(row, name, place, "--task.options") for name in task.options]
        if len(options) < 2:
            raise UserError(f"{place}: there are {len(options)} options; a choice needs at least 2: fix it")
        record: Record = {"question": text_of(row, task.question, place, "--task.question"), "options": list(options)}
        value = row.get(task.label)
        return (
            record if value is None or value == "" else record | {"label": _option_index(value, options, task, place)}
        )

    @classmethod
    def names(cls, task: config.MultipleChoice, part: Records) -> tuple[str, ...]:
        return ("score",)

    @classmethod
    def texts(cls, record: Record) -> Iterable[str]:
        return [record["question"], *record["options"]]

    def describe_labels(self, part: Records) -> str:
        counts = Counter(record["label"] for record in part.records)
        return ", ".join(f"option {self.task.first + n} right {counts[n]:,} times" for n in sorted(counts))

    def features(self, records: Sequence[Record], training: bool) -> Iterator[list[list[Features]]]:
        for record in records:
            n = len(record["options"])
            if n > self.max_examples:
                raise UserError(
                    f"a question has {n} options, a row of data.length {self.length} takes {self.max_examples}; "
                    f"raise the length"
                )
            pairs = add_special_tokens(self.tokenizer, [record["question"]] * n, record["options"], self.length // n)
            yield [[features | {"labels_BE": np.float32(record.get("label") == i)} for i, features in enumerate(pairs)]]

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        return {"loss": batch["labels_BE"].sum()}

    def logits(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> jax.Array:
        x_BED = example_states(x_BTD, batch, module.config.classes_from)
        return self.apply_head(module, params, x_BED, key)[..., 0]

    def loss(self, logits: jax.Array, batch: Batch, training: bool) -> Sum:
        groups_BE, labels_BE = batch["groups_BE"], batch["labels_BE"]
        same_BEE = groups_BE[:, :, None] == groups_BE[:, None, :]
        normaliser_BE = jax.nn.logsumexp(jnp.where(same_BEE, logits[:, None, :], -1e30), axis=-1)
        return ((normaliser_BE - logits) * labels_BE).sum(), labels_BE.sum()

    def compared(self, logits: jax.Array, batch: Batch) -> HeadLogits:
        """Returns the logits of all options of a question at the place of its right option."""
        same_BEE = batch["groups_BE"][:, :, None] == batch["groups_BE"][:, None, :]
        return HeadLogits(jnp.where(same_BEE, logits[:, None, :], -1e30), batch["labels_BE"])

    def outputs(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        return {"logits_BE": logits}

    def predict(self, record: Record, outputs: Outputs) -> Row:
        logits_O = np.array([float(arrays["logits_BE"]) for arrays in outputs[0]])
        p_O = np.exp(logits_O - logits_O.max())
        best = int(p_O.argmax())
        p_O /= p_O.sum()
        return {
            "prediction": self.task.first + best,
            "option": record["options"][best],
            "confidence": float(p_O[best]),
            "_index": best,
            "_probabilities": p_O,
        }

    def class_names(self, record: Record) -> Sequence[int]:
        return range(self.task.first, self.task.first + len(record["options"]))

    def score(self, records: Sequence[Record], predictions: Sequence[Row]) -> dict[str, float]:
        right = [record["label"] == prediction["_index"] for record, prediction in zip(records, predictions)]
        return {"accuracy": float(np.mean(right)) if right else 0.0}

    def sections(self, part: Records, predictions: Sequence[Row]) -> list[Section]:
        wrong = [
            (p["confidence"], [r["question"], r["options"][r["label"]], p["option"]])
            for r, p in zip(part.records, predictions)
            if r["label"] != p["_index"]
        ]
        what = "held-out questions have a wrong answer"
        return [mistakes(("question", "true", "predicted"), wrong, len(part.records), what)]


def _option_index(value: Any, options: Sequence[str], task: config.MultipleChoice, place: Place) -> int:
    """Returns the index of the option that a label means, from 0."""
    number: float = -1
    if isinstance(value, str) and len(value) == 1 and value.isalpha():
        number = string.ascii_uppercase.find(value.upper())
    elif not isinstance(value, bool):
        with suppress(TypeError, ValueError, OverflowError):
            number = float(value) - task.first
    matches = {int(number)} if number in range(len(options)) else set()
    if isinstance(value, str) and value in options:
        matches.add(list(options).index(value))
    if len(matches) > 1:
        raise UserError(
            f"{place}: column {task.label!r} holds {short_repr(value)}, which is the text of one option and the number "
            f"or letter of another; write the labels as {'numbers' if value.isalpha() else 'letters'}"
        )
    if not matches:
        raise UserError(
            f"{place}: column {task.label!r} holds {short_repr(value)}, which is none of {len(options)} options: give "
            f"a number from {task.first}, a letter from A, or the text of one"
        )
    return matches.pop()


register(config.MultipleChoice, MultipleChoiceTask)
