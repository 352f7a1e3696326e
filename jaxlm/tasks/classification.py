"""What a text, or a pair of texts, is: one class, any number of classes, or a number."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Self

import jax
import numpy as np

from jaxlm import config
from jaxlm.config import ModelConfig
from jaxlm.config.ranges import shown
from jaxlm.data.batches import Batch, Features
from jaxlm.data.formats.lines import Place, Row
from jaxlm.data.formats.rows import Columns
from jaxlm.errors import UserError
from jaxlm.hub.pooling import Pooling
from jaxlm.nn.losses import Sum, binary_cross_entropy, cross_entropy, squared_error
from jaxlm.nn.transformer import Transformer
from jaxlm.reports.report import Heatmap, Section, Table, mistakes
from jaxlm.tasks import labels, metrics
from jaxlm.tasks.cells import Record, Records, listed, text_of
from jaxlm.tasks.records import HeadTask, Outputs, add_special_tokens, stand_in
from jaxlm.tasks.states import of_examples
from jaxlm.tasks.task import register

_FIELDS: dict[str, dict[str, Any]] = {
    "single_label": {"labels_BE": np.int32},
    "multi_label": {"labels_BEN": np.float32},
    "regression": {"labels_BE": np.float32},
}
_SCORES = {
    "single_label": ("accuracy", "f1", "macro_f1", "matthews"),
    "multi_label": ("micro_f1", "macro_f1", "accuracy"),
    "regression": ("spearman", "pearson"),
}
_MOST_BITS = 4096  # of a number that is a label: Python refuses to write much longer ones
_LARGEST = 1e15  # of a score, as of the numbers of a config: its square is a float32
_INDICATORS = {"0": 0, "1": 1, "false": 0, "true": 1}  # whether a class applies


class ClassificationTask(HeadTask):
    """`config.Classification`, by the head "classes" over the state that stands for each example."""

    head = "classes"
    task: config.Classification

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self.fields: Mapping[str, Any] = _FIELDS[self.task.problem]
        # Of two classes alone there is an F1.
        self.scores = tuple(name for name in _SCORES[self.task.problem] if name != "f1" or len(self.labels) == 2)
        problem = self.task.problem
        self.config_keys = {"problem_type": problem + ("" if problem == "regression" else "_classification")}
        self.classes = problem != "regression"
        if self.task.windows == "none":
            self.cut = {"T": ("texts", "raise --data.length, or read them through windows: --task.windows mean")}
        self._index = {name: i for i, name in enumerate(self.labels)}
        self._weights = np.ones(len(self.labels), np.float32)

    @classmethod
    def columns(cls, task: config.Classification, labelled: bool) -> Columns:
        label = (task.label,) if labelled else ()
        # Numbers stay what they are where they count or measure.
        return Columns((*task.text, *label), (task.label,), class_names=task.problem != "regression")

    @classmethod
    def read(cls, task: config.Classification, row: Row, place: Place) -> Record:
        record: Record = {"texts": tuple(text_of(row, name, place) for name in task.text)}
        value = row.get(task.label)
        value = value.item() if isinstance(value, np.generic) else value
        if value is None or (isinstance(value, str) and not value.strip()):
            return record
        if task.problem == "regression":
            return record | {"label": _number(value, place, task.label)}
        value = listed(value, task.label, place, "[" if task.problem == "single_label" else "[({")
        if task.problem == "single_label":
            return record | {"label": _class(value, place, task.label), "kind": _kind(value)}
        if isinstance(value, str) and value.strip()[0] + value.strip()[-1] in ("[]", "()", "{}"):
            raise UserError(
                f"{place}: column {task.label!r} holds {shown(value)}, which stands in brackets and is no list; quote "
                f"its texts, as ['a', 'b'], or leave the brackets out"
            )
        parts = value.split(task.separator) if isinstance(value, str) else value
        parts = list(parts) if isinstance(parts, (list, tuple, np.ndarray)) else [parts]
        found = [_class(part, place, task.label) for part in parts]
        record["label"] = tuple(dict.fromkeys(label for label in found if label))
        indicators = tuple(_INDICATORS.get(_class(part, place, task.label).lower()) for part in parts)
        return record | ({"indicators": indicators} if len(parts) > 1 and None not in indicators else {})

    @classmethod
    def settle(cls, task: config.Classification, part: Records, names: Sequence[str]) -> None:
        """Reads lists of 0 and 1 of one length as indicators, one for each class, and not as the numbers of classes."""
        names = task.names or names
        rows = [(record, place) for record, place in zip(part.records, part.places) if record.get("label")]
        lengths = {len(record.get("indicators", ())) for record, _ in rows}
        if task.problem == "multi_label" and not names:
            _check_separator(task, rows)
        if lengths == {0} or not rows or (names and {name.lower() for name in names} <= set(_INDICATORS)):
            return
        if len(lengths) > 1:
            # Numbers of classes do not occur twice; a list that has one twice is of indicators.
            odd = (p for r, p in rows if len(set(r.get("indicators", ()))) < len(r.get("indicators", ())))
            if place := next(odd, None):
                raise UserError(
                    f"{place}: column {task.label!r} holds a list of 0 and 1, and in other rows lists of other lengths "
                    f"or values; give each row a 0 or 1 for each class, or the classes that apply"
                )
            return
        [length] = lengths
        names = names or tuple(f"LABEL_{n}" for n in range(length))
        if len(names) > length == 2 and all(sum(record["indicators"]) == 1 for record, _ in rows):
            return  # the classes 0 and 1 of more
        if len(names) != length:
            raise UserError(
                f"{rows[0][1]}: column {task.label!r} holds {length} values of 0 and 1, and there are {len(names)} "
                f"classes ({', '.join(names[:5])}{' ...' * (len(names) > 5)}); give one for each with --task.names"
            )
        for record, _ in rows:
            record["label"] = tuple(name for name, given in zip(names, record["indicators"]) if given)

    @classmethod
    def labelled(cls, task: config.Classification, row: Row, record: Record, place: Place) -> None:
        if "label" not in record and task.problem == "multi_label" and task.label in row:
            raise UserError(
                f"{place}: the row has no label in column {task.label!r}; give one, or, where none applies, an empty "
                f"list or the separator {task.separator!r} alone"
            )
        super().labelled(task, row, record, place)

    @classmethod
    def names(cls, task: config.Classification, part: Records) -> tuple[str, ...]:
        if task.problem == "regression":
            return ("score",)
        kinds: dict[str, Place] = {}
        where: dict[str, Place] = {}  # the first row with each label
        for record, place in zip(part.records, part.places):
            kinds.setdefault(record.get("kind", ""), place)
            for label in cls.labels_of(record):
                where.setdefault(label, place)
        if len(kinds) > 1:
            found = " and ".join(f"{kind} ({place})" for kind, place in kinds.items())
            raise UserError(f"column {task.label!r} holds {found}; make all of one kind")
        if task.names:
            if len(set(task.names)) < len(task.names):
                raise UserError(f"--task.names has a name twice: {', '.join(task.names)}; give each once")
            for label, place in where.items() if labels.matched(where, task.names) is None else ():
                if label not in task.names:
                    raise UserError(
                        f"{place}: the label {label!r} is not among --task.names {', '.join(task.names)}; "
                        f"fix it, or add it to them"
                    )
            return task.names
        indicators = next((record["indicators"] for record in part.records if "indicators" in record), ())
        if indicators and where and all(label.startswith("LABEL_") for label in where):
            return tuple(f"LABEL_{n}" for n in range(len(indicators)))
        if len(where) < (2 if task.problem == "single_label" else 1):
            alone = f"one label alone, {next(iter(where))!r}" if where else "no label"
            raise UserError(
                f"column {task.label!r} holds {alone} in {len(part.records):,} rows; there is nothing to tell apart: "
                f"give rows with others, or choose the column with --task.label"
            )
        such = f"{len(where):,} different values in {len(part.records):,} rows, such as {_shown(where)}"
        if len(where) > task.most_classes:
            raise UserError(
                f"column {task.label!r} has {such}, and task.most_classes is {task.most_classes:,}; if they are "
                f"numbers to be predicted, set --task.problem regression; if they are classes indeed, raise "
                f"--task.most-classes"
            )
        numeric = all(map(_is_numeric, where))
        for label, place in where.items():
            if numeric and not math.isfinite(float(label)):
                raise UserError(
                    f"{place}: column {task.label!r} holds {label!r} among numbers; fix it, or leave the row out"
                )
        if numeric and any(not float(label).is_integer() for label in where):
            raise UserError(
                f"column {task.label!r} has {such}, not all whole numbers; if they are numbers to be predicted, set "
                f"--task.problem regression; if they are classes indeed, name them all with --task.names"
            )
        return tuple(sorted(where, key=(lambda name: (float(name), name)) if numeric else str))

    @classmethod
    def fitted(
        cls,
        task: config.Classification,
        parts: Sequence[Records],
        names: tuple[str, ...],
        remedy: str = "fix it, or leave the row out",
    ) -> list[Records]:
        found = (label for part in parts for record in part.records for label in cls.labels_of(record))
        name_of = labels.matched(found, names)
        if name_of is None:
            return super().fitted(task, parts, names, remedy)
        if all(label == name for label, name in name_of.items()):
            return list(parts)

        def renamed(record: Record) -> Record:
            label = record.get("label")
            if isinstance(label, tuple):
                return record | {"label": tuple(name_of[one] for one in label)}
            return record | {"label": name_of[label]} if isinstance(label, str) else record

        return [part._replace(records=[renamed(record) for record in part.records]) for part in parts]

    @classmethod
    def labels_of(cls, record: Record) -> Iterable[str]:
        label = record.get("label")
        return label if isinstance(label, tuple) else [label] if isinstance(label, str) else []

    @classmethod
    def texts(cls, record: Record) -> Iterable[str]:
        return record["texts"]

    @classmethod
    def stratum(cls, task: config.Classification, record: Record) -> Hashable:
        return record["label"] if task.problem == "single_label" else None

    def balance(self, part: Records) -> str:
        if self.task.problem == "regression":
            values = [record["label"] for record in part.records]
            return f"scores from {min(values):g} to {max(values):g}, mean {np.mean(values):.3g}"
        counts = Counter(label for record in part.records for label in self.labels_of(record))
        shares = [f"{name} {counts[name]:,} ({counts[name] / len(part.records):.1%})" for name in self.labels[:12]]
        return ", ".join(shares) + (f" and {len(self.labels) - 12} more" if len(self.labels) > 12 else "")

    def bound(self, model: ModelConfig, pooling: Pooling | None = None, part: Records | None = None) -> Self:
        task = super().bound(model, pooling, part)
        if part is None or self.task.class_weights != "balanced":
            return task
        return task.replaced(_weights=self._balanced(part.records))

    def _balanced(self, records: Sequence[Record]) -> np.ndarray:
        """The weights of the classes: of one class, as scikit-learn has them; of several, of each where it applies the
        examples without it by those with it."""
        found = Counter(label for record in records for label in self.labels_of(record))
        counts = np.array([found[name] for name in self.labels])
        if self.task.problem == "multi_label":
            weights = np.where(counts > 0, (len(records) - counts) / np.maximum(counts, 1), 1)
            return np.where(weights > 0, weights, 1).astype(np.float32)
        return (len(records) / (len(self.labels) * np.maximum(counts, 1))).astype(np.float32)

    def features(self, records: Sequence[Record], training: bool) -> Iterator[list[list[Features]]]:
        if self.task.windows != "none":
            yield from self._windows(records, training)
            return
        texts, pairs = ([record["texts"][side] for record in records] for side in (0, -1))
        made = add_special_tokens(self.tokenizer, texts, pairs if len(self.task.text) == 2 else None, self.length)
        for record, features in zip(records, made):
            yield [[features | self._target(record.get("label"), training)]]

    def _windows(self, records: Sequence[Record], training: bool) -> Iterator[list[list[Features]]]:
        """Of each text the windows that cover it, each an example with the label of the text."""
        room = self.tokenizer.room(self.length, pair=False)
        stride = self.task.stride or room // 4
        if room <= stride:
            raise UserError(
                f"data.length {self.length} leaves {room} tokens of a text, and windows have task.stride {stride} in "
                f"common; raise the length, or lower task.stride"
            )
        around, _, [at] = self.tokenizer.wrap([])
        for record, whole in zip(records, self.tokenizer.frame([record["texts"][0] for record in records])):
            ids = whole[0][at : len(whole[0]) - (len(around) - at)]
            target = self._target(record.get("label"), training)
            units = []
            for start in range(0, max(1, len(ids) - stride), room - stride):
                tokens, types, _ = self.tokenizer.wrap(ids[start : start + room])
                made = {"tokens_BT": tokens or [stand_in(self.tokenizer)], "types_BT": types or [0]}
                units.append([made | target])
            yield units

    def _target(self, label: Any, training: bool) -> Features:
        if self.task.problem == "regression":
            return {"labels_BE": np.float32(label or 0)}
        if self.task.problem == "multi_label":
            return {"labels_BEN": np.isin(self.labels, label or ()).astype(np.float32)}
        index = 0 if label is None else self._index[label]
        weight = self._weights[index] if training else np.float32(1)
        return {"labels_BE": np.int32(index), "weights_BE": weight}

    def logits(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> jax.Array:
        x_BED = of_examples(x_BTD, batch, module.config.classes_from)
        return self.read_off(module, params, x_BED, key)

    def loss(self, logits: jax.Array, batch: Batch, training: bool) -> Sum:
        if self.task.problem == "regression":
            return squared_error(logits[..., 0], batch["labels_BE"], batch["weights_BE"])
        if self.task.problem == "multi_label":
            positive_N = jax.numpy.asarray(self._weights) if training else None
            return binary_cross_entropy(logits, batch["labels_BEN"], batch["weights_BE"], positive_N)
        smoothing = self.task.label_smoothing if training else 0.0
        return cross_entropy(logits, batch["labels_BE"], batch["weights_BE"], smoothing)

    def outputs(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        return {"logits_BEN": logits}

    def predict(self, record: Record, outputs: Outputs) -> Row:
        logits_WN = np.stack([found["logits_BEN"] for [found] in outputs]).astype(np.float64)
        logits_N = logits_WN.max(0) if self.task.windows == "max" else logits_WN.mean(0)
        if self.task.problem == "regression":
            return {"prediction": float(logits_N[0])}
        if self.task.problem == "multi_label":
            p_N = 1 / (1 + np.exp(-np.clip(logits_N, -500, 500)))
            chosen = [name for name, p in zip(self.labels, p_N) if p > 0.5]
            told: Row = {"prediction": chosen, "confidence": float(np.maximum(p_N, 1 - p_N).min())}
        else:
            p_N = np.exp(logits_N - logits_N.max())
            p_N /= p_N.sum()
            best = int(p_N.argmax())
            told = {"prediction": self.labels[best], "confidence": float(p_N[best])}
        return told | {"_probabilities": p_N}

    def score(self, records: Sequence[Record], predictions: Sequence[Row]) -> dict[str, float]:
        true = [record["label"] for record in records]
        found = [prediction["prediction"] for prediction in predictions]
        if self.task.problem == "regression":
            return metrics.number(true, found)
        if self.task.problem == "multi_label":
            many = lambda rows: np.array([np.isin(self.labels, row) for row in rows], int)
            return metrics.several(many(true), many(found))
        index = lambda rows: [self._index[row] for row in rows]
        return metrics.classes(index(true), index(found), self.labels)

    def by_class(self, part: Records, predictions: Sequence[Row]) -> dict[str, dict[str, float]]:
        if self.task.problem == "regression":
            return {}
        several = lambda label: label if isinstance(label, (tuple, list)) else (label,)
        many = lambda rows: np.array([np.isin(self.labels, several(row)) for row in rows], bool)
        true_NC = many([record["label"] for record in part.records]).reshape(-1, len(self.labels))
        found_NC = many([prediction["prediction"] for prediction in predictions]).reshape(-1, len(self.labels))
        return metrics.of_classes(true_NC, found_NC, self.labels)

    def warning(self, part: Records, predictions: Sequence[Row]) -> str | None:
        found = {str(prediction["prediction"]) for prediction in predictions}
        true = {str(record["label"]) for record in part.records}
        if not self.classes or len(found) != 1 or len(true) == 1:
            return None
        alone = f"the class {min(found)!r}" if self.task.problem == "single_label" else f"the classes {min(found)}"
        return (
            f"all {len(predictions):,} predictions are {alone}, and the labels are not; train longer, change "
            f"--optimizer.rate, or set --task.class-weights balanced"
        )

    def sections(self, part: Records, predictions: Sequence[Row]) -> list[Section]:
        records = part.records
        by_class = self.by_class(part, predictions)
        rows = [
            [name, *(f"{scores[key]:.1%}" for key in ("precision", "recall", "f1")), f"{scores['support']:,.0f}"]
            for name, scores in by_class.items()
        ]
        tables = [Table("Scores by class", ("class", "precision", "recall", "F1", "examples"), rows, "")] * bool(rows)
        if self.task.problem != "single_label":
            return list(tables)
        wrong = [
            (p["confidence"], [" | ".join(r["texts"]), r["label"], p["prediction"]])
            for r, p in zip(records, predictions)
            if r["label"] != p["prediction"]
        ]
        true = [self._index[record["label"]] for record in records]
        found = [self._index[prediction["prediction"]] for prediction in predictions]
        counts = metrics.confusion(true, found, len(self.labels))
        return [
            Heatmap("Confusion matrix", counts, self.labels),
            *tables,
            mistakes(("text", "true", "predicted"), wrong, len(records), "held-out examples are predicted wrong"),
        ]


def _class(value: Any, place: Place, column: str) -> str:
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise UserError(f"{place}: column {column!r} holds {shown(value)}, which is no label; correct the row")
    if isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
        return str(value).strip()
    raise UserError(
        f"{place}: column {column!r} holds {type(value).__name__} {shown(value)}, which is no label; "
        f"{'set --task.problem multi_label for several, ' if isinstance(value, (list, tuple)) else 'fix it, '}or "
        f"choose the column with --task.label"
    )


def _kind(label: Any) -> str:
    return "text" if isinstance(label, str) else "true or false" if isinstance(label, bool) else "numbers"


def _check_separator(task: config.Classification, rows: Sequence[tuple[Record, Place]]) -> None:
    """Raises UserError where no row has several labels, and another separator divides them into fewer ones."""
    labels: dict[str, Place] = {}
    for record, place in rows:
        labels |= {label: place for label in record["label"] if label not in labels}
    if any(len(record["label"]) > 1 for record, _ in rows):
        return
    for other in "|;,":
        several = [label for label in labels if other in label]
        parts = {part.strip() for label in several for part in label.split(other)}
        if several and (parts & labels.keys() or len(parts) < len(several)):
            first = several[0]
            raise UserError(
                f"{labels[first]}: column {task.label!r} holds {first!r}, and no row the separator {task.separator!r}; "
                f"if {other!r} divides labels, set --task.separator {other!r}, else name the labels with --task.names"
            )


def _number(value: Any, place: Place, column: str) -> float:
    number = labels.number_of(value, place, column)
    if not abs(number) <= _LARGEST:
        raise UserError(
            f"{place}: column {column!r} holds {shown(value)}; a score must be finite and at most "
            f"{_LARGEST:.0e}: fix it"
        )
    return number


def _shown(labels: Iterable[str]) -> str:
    return ", ".join(f"{label!r:.60}" for label in islice(labels, 3))


def _is_numeric(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


register(config.Classification, ClassificationTask)
