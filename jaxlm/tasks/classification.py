"""Classification and regression of texts and pairs of texts: one class, several classes, or a number."""

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
from jaxlm.config.ranges import short_repr
from jaxlm.data.batches import Batch
from jaxlm.data.formats.lines import Place, Row
from jaxlm.data.formats.rows import Columns
from jaxlm.data.joined import Features
from jaxlm.errors import UserError
from jaxlm.hub.pooling import Pooling
from jaxlm.nn.losses import Sum, binary_cross_entropy, cross_entropy, squared_error
from jaxlm.nn.transformer import Transformer
from jaxlm.reports.report import Heatmap, Section, mistakes
from jaxlm.tasks import labels, metrics
from jaxlm.tasks.cells import Record, Records, listed, text_of
from jaxlm.tasks.records import HeadTask, Outputs, add_special_tokens, placeholder_token, table_by_class
from jaxlm.tasks.states import HeadLogits, example_states
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
_MAX_BITS = 4096  # of a number that is a label; Python refuses to print much longer ones
_MAX_SCORE = 1e15  # as for the numbers of a config; its square fits in float32
_INDICATORS = {"0": 0, "1": 1, "false": 0, "true": 1}  # whether a class applies


class ClassificationTask(HeadTask):
    """`config.Classification`, with the head "classes" on the state that represents each example."""

    head = "classes"
    task: config.Classification

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self.fields: Mapping[str, Any] = _FIELDS[self.task.problem]
        # F1 is defined for two classes only.
        self.scores = tuple(name for name in _SCORES[self.task.problem] if name != "f1" or len(self.labels) == 2)
        problem = self.task.problem
        self.config_keys = {"problem_type": problem + ("" if problem == "regression" else "_classification")}
        self.classes = problem != "regression"
        if self.task.windows == "none":
            self.remedies = {"T": ("texts", "raise --data.length, or read them through windows: --task.windows mean")}
        self._index = {name: i for i, name in enumerate(self.labels)}
        self._weights = np.ones(len(self.labels), np.float32)

    @classmethod
    def columns(cls, task: config.Classification, labelled: bool) -> Columns:
        label = (task.label,) if labelled else ()
        # In regression, class numbers are not replaced by their names.
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
                f"{place}: column {task.label!r} holds {short_repr(value)}, which is in brackets and is not a list; "
                f"quote its texts, as ['a', 'b'], or leave the brackets out"
            )
        parts = value.split(task.separator) if isinstance(value, str) else value
        parts = list(parts) if isinstance(parts, (list, tuple, np.ndarray)) else [parts]
        labels = [_class(part, place, task.label) for part in parts]
        record["label"] = tuple(dict.fromkeys(label for label in labels if label))
        indicators = tuple(_INDICATORS.get(label.lower()) for label in labels)
        return record | ({"indicators": indicators} if len(parts) > 1 and None not in indicators else {})

    @classmethod
    def finalize_labels(cls, task: config.Classification, part: Records, names: Sequence[str]) -> None:
        """Reads lists of 0 and 1 with the same length in all rows as one indicator per class, not as class indices."""
        names = task.names or names
        rows = [(record, place) for record, place in zip(part.records, part.places) if record.get("label")]
        lengths = {len(record.get("indicators", ())) for record, _ in rows}
        if task.problem == "multi_label" and not names:
            _check_separator(task, rows)
        if lengths == {0} or not rows or (names and {name.lower() for name in names} <= set(_INDICATORS)):
            return
        if len(lengths) > 1:
            # Class indices do not occur twice in a row, so a list with a repeated value contains indicators.
            repeats = (p for r, p in rows if len(set(r.get("indicators", ()))) < len(r.get("indicators", ())))
            if place := next(repeats, None):
                raise UserError(
                    f"{place}: column {task.label!r} holds a list of 0 and 1, and in other rows lists of other lengths "
                    f"or values; give each row a 0 or 1 for each class, or the classes that apply"
                )
            return
        [length] = lengths
        names = names or tuple(f"LABEL_{n}" for n in range(length))
        if len(names) > length == 2 and all(sum(record["indicators"]) == 1 for record, _ in rows):
            return  # two of several classes, which are called 0 and 1
        if len(names) != length:
            raise UserError(
                f"{rows[0][1]}: column {task.label!r} holds {length} values of 0 and 1, and there are {len(names)} "
                f"classes ({', '.join(names[:5])}{' ...' * (len(names) > 5)}); give one for each with --task.names"
            )
        for record, _ in rows:
            record["label"] = tuple(name for name, given in zip(names, record["indicators"]) if given)

    @classmethod
    def require_label(cls, task: config.Classification, row: Row, record: Record, place: Place) -> None:
        if "label" not in record and task.problem == "multi_label" and task.label in row:
            raise UserError(
                f"{place}: the row has no label in column {task.label!r}; give one, or, where none applies, an empty "
                f"list or the separator {task.separator!r} alone"
            )
        super().require_label(task, row, record, place)

    @classmethod
    def names(cls, task: config.Classification, part: Records) -> tuple[str, ...]:
        if task.problem == "regression":
            return ("score",)
        kinds: dict[str, Place] = {}
        first: dict[str, Place] = {}  # label -> the first row with it
        for record, place in zip(part.records, part.places):
            kinds.setdefault(record.get("kind", ""), place)
            for label in cls.labels_of(record):
                first.setdefault(label, place)
        if len(kinds) > 1:
            values = " and ".join(f"{kind} ({place})" for kind, place in kinds.items())
            raise UserError(f"column {task.label!r} holds {values}; use one type of label")
        if task.names:
            labels.check_unique(task.names)
            for label, place in first.items() if labels.match_labels(first, task.names) is None else ():
                if label not in task.names:
                    raise UserError(
                        f"{place}: the label {label!r} is not among --task.names {', '.join(task.names)}; "
                        f"fix it, or add it to them"
                    )
            return task.names
        indicators = next((record["indicators"] for record in part.records if "indicators" in record), ())
        if indicators and first and all(label.startswith("LABEL_") for label in first):
            return tuple(f"LABEL_{n}" for n in range(len(indicators)))
        if len(first) < (2 if task.problem == "single_label" else 1):
            found = f"only the label {next(iter(first))!r}" if first else "no label"
            raise UserError(
                f"column {task.label!r} holds {found} in {len(part.records):,} rows; a classifier needs several: "
                f"give rows with other labels, or choose the column with --task.label"
            )
        values = f"{len(first):,} different values in {len(part.records):,} rows, such as {_examples(first)}"
        if len(first) > task.max_classes:
            raise UserError(
                f"column {task.label!r} has {values}, and task.max_classes is {task.max_classes:,}; to predict them "
                f"as numbers, set --task.problem regression; if they are classes, raise --task.max-classes"
            )
        numeric = all(map(_is_numeric, first))
        for label, place in first.items():
            if numeric and not math.isfinite(float(label)):
                raise UserError(
                    f"{place}: column {task.label!r} holds {label!r} among numbers; fix it, or leave the row out"
                )
        if numeric and any(not float(label).is_integer() for label in first):
            raise UserError(
                f"column {task.label!r} has {values}, not all integers; to predict them as numbers, set "
                f"--task.problem regression; if they are classes, name them all with --task.names"
            )
        return tuple(sorted(first, key=(lambda name: (float(name), name)) if numeric else str))

    @classmethod
    def map_labels(
        cls,
        task: config.Classification,
        parts: Sequence[Records],
        names: tuple[str, ...],
        remedy: str = "fix it, or leave the row out",
    ) -> list[Records]:
        all_labels = (label for part in parts for record in part.records for label in cls.labels_of(record))
        name_of = labels.match_labels(all_labels, names)
        if name_of is None:
            return super().map_labels(task, parts, names, remedy)
        if all(label == name for label, name in name_of.items()):
            return list(parts)

        def rename(record: Record) -> Record:
            label = record.get("label")
            if isinstance(label, tuple):
                return record | {"label": tuple(name_of[name] for name in label)}
            return record | {"label": name_of[label]} if isinstance(label, str) else record

        return [part._replace(records=[rename(record) for record in part.records]) for part in parts]

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

    def describe_labels(self, part: Records) -> str:
        if self.task.problem == "regression":
            values = [record["label"] for record in part.records]
            return f"scores from {min(values):g} to {max(values):g}, mean {np.mean(values):.3g}"
        counts = Counter(label for record in part.records for label in self.labels_of(record))
        shares = [f"{name} {counts[name]:,} ({counts[name] / len(part.records):.1%})" for name in self.labels[:12]]
        return ", ".join(shares) + (f" and {len(self.labels) - 12} more" if len(self.labels) > 12 else "")

    def bind(self, model: ModelConfig, pooling: Pooling | None = None, part: Records | None = None) -> Self:
        task = super().bind(model, pooling, part)
        if part is None or self.task.class_weights != "balanced":
            return task
        return task.replace_fields(_weights=self._balanced(part.records))

    def _balanced(self, records: Sequence[Record]) -> np.ndarray:
        """Returns the balanced class weights.

        For one class per example, these are scikit-learn's.  For several, the weight of a class that applies is the
        number of examples without the class divided by the number of examples with it.
        """
        count_of = Counter(label for record in records for label in self.labels_of(record))
        counts = np.array([count_of[name] for name in self.labels])
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
        """Yields for each text the windows that cover it, each an example with the label of the text."""
        room = self.tokenizer.max_text_tokens(self.length, pair=False)
        stride = self.task.stride or room // 4
        if room <= stride:
            raise UserError(
                f"data.length {self.length} leaves {room} tokens of a text, and windows overlap by task.stride "
                f"{stride}; raise the length, or lower task.stride"
            )
        special, _, [at] = self.tokenizer.add_special_tokens([])
        for record, (with_special, _) in zip(
            records, self.tokenizer.encode_with_special_tokens([record["texts"][0] for record in records])
        ):
            ids = with_special[at : len(with_special) - (len(special) - at)]
            target = self._target(record.get("label"), training)
            units = []
            for start in range(0, max(1, len(ids) - stride), room - stride):
                tokens, types, _ = self.tokenizer.add_special_tokens(ids[start : start + room])
                features = {"tokens_BT": tokens or [placeholder_token(self.tokenizer)], "types_BT": types or [0]}
                units.append([features | target])
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
        x_BED = example_states(x_BTD, batch, module.config.classes_from)
        return self.apply_head(module, params, x_BED, key)

    def loss(self, logits: jax.Array, batch: Batch, training: bool) -> Sum:
        if self.task.problem == "regression":
            return squared_error(logits[..., 0], batch["labels_BE"], batch["weights_BE"])
        if self.task.problem == "multi_label":
            positive_N = jax.numpy.asarray(self._weights) if training else None
            return binary_cross_entropy(logits, batch["labels_BEN"], batch["weights_BE"], positive_N)
        smoothing = self.task.label_smoothing if training else 0.0
        return cross_entropy(logits, batch["labels_BE"], batch["weights_BE"], smoothing)

    def compared(self, logits: jax.Array, batch: Batch) -> HeadLogits:
        kinds: dict[str, Any] = {"single_label": "one", "multi_label": "any", "regression": "numbers"}
        return super().compared(logits, batch)._replace(kind=kinds[self.task.problem])

    def outputs(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        return {"logits_BEN": logits}

    def predict(self, record: Record, outputs: Outputs) -> Row:
        logits_WN = np.stack([arrays["logits_BEN"] for [arrays] in outputs]).astype(np.float64)
        logits_N = logits_WN.max(0) if self.task.windows == "max" else logits_WN.mean(0)
        if self.task.problem == "regression":
            return {"prediction": float(logits_N[0])}
        if self.task.problem == "multi_label":
            p_N = 1 / (1 + np.exp(-np.clip(logits_N, -500, 500)))
            chosen = [name for name, p in zip(self.labels, p_N) if p > 0.5]
            prediction: Row = {"prediction": chosen, "confidence": float(np.maximum(p_N, 1 - p_N).min())}
        else:
            p_N = np.exp(logits_N - logits_N.max())
            p_N /= p_N.sum()
            best = int(p_N.argmax())
            prediction = {"prediction": self.labels[best], "confidence": float(p_N[best])}
        return prediction | {"_probabilities": p_N}

    def score(self, records: Sequence[Record], predictions: Sequence[Row]) -> dict[str, float]:
        if self.task.problem == "regression":
            return metrics.regression_scores([r["label"] for r in records], [p["prediction"] for p in predictions])
        labels, predicted = self._arrays(records, predictions)
        if self.task.problem == "multi_label":
            return metrics.multi_label_scores(labels, predicted)
        return metrics.classification_scores(labels, predicted, self.labels)

    def by_class(self, part: Records, predictions: Sequence[Row]) -> dict[str, dict[str, float]]:
        if self.task.problem == "regression":
            return {}
        return metrics.per_class_scores(*self._arrays(part.records, predictions), self.labels)

    def _arrays(self, records: Sequence[Record], predictions: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the labels and the predictions: class indices [N], for several classes indicators [N, C]."""
        several = self.task.problem == "multi_label"
        encode = lambda label: np.isin(self.labels, label) if several else self._index[label]
        labels = np.array([encode(record["label"]) for record in records], int)
        return labels, np.array([encode(prediction["prediction"]) for prediction in predictions], int)

    def warning(self, part: Records, predictions: Sequence[Row]) -> str | None:
        predicted = {str(prediction["prediction"]) for prediction in predictions}
        true = {str(record["label"]) for record in part.records}
        if not self.classes or len(predicted) != 1 or len(true) == 1:
            return None
        value = (
            f"the class {min(predicted)!r}" if self.task.problem == "single_label" else f"the classes {min(predicted)}"
        )
        return (
            f"all {len(predictions):,} predictions are {value}, and the labels differ; train longer, change "
            f"--optimizer.rate, or set --task.class-weights balanced"
        )

    def sections(self, part: Records, predictions: Sequence[Row]) -> list[Section]:
        records = part.records
        if self.task.problem == "regression":
            return []
        table = table_by_class("class", "examples", self.by_class(part, predictions))
        if self.task.problem == "multi_label":
            return [table]
        wrong = [
            (p["confidence"], [" | ".join(r["texts"]), r["label"], p["prediction"]])
            for r, p in zip(records, predictions)
            if r["label"] != p["prediction"]
        ]
        counts = metrics.confusion(*self._arrays(records, predictions), len(self.labels))
        return [
            Heatmap("Confusion matrix", counts, self.labels),
            table,
            mistakes(("text", "true", "predicted"), wrong, len(records), "held-out examples have a wrong prediction"),
        ]


def _class(value: Any, place: Place, column: str) -> str:
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise UserError(f"{place}: column {column!r} holds {short_repr(value)}, which is not a label; correct the row")
    if isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
        return str(value).strip()
    raise UserError(
        f"{place}: column {column!r} holds {type(value).__name__} {short_repr(value)}, which is not a label; "
        f"{'set --task.problem multi_label for several, ' if isinstance(value, (list, tuple)) else 'fix it, '}or "
        f"choose the column with --task.label"
    )


def _kind(label: Any) -> str:
    return "text" if isinstance(label, str) else "true or false" if isinstance(label, bool) else "numbers"


def _check_separator(task: config.Classification, rows: Sequence[tuple[Record, Place]]) -> None:
    """Raises UserError if no row has several labels, and another separator splits them into fewer distinct ones."""
    first: dict[str, Place] = {}  # label -> the first row with it
    for record, place in rows:
        first |= {label: place for label in record["label"] if label not in first}
    if any(len(record["label"]) > 1 for record, _ in rows):
        return
    for other in "|;,":
        joined = [label for label in first if other in label]
        parts = {part.strip() for label in joined for part in label.split(other)}
        if joined and (parts & first.keys() or len(parts) < len(joined)):
            raise UserError(
                f"{first[joined[0]]}: column {task.label!r} holds {joined[0]!r}, and no row has the separator "
                f"{task.separator!r}; if {other!r} separates labels, set --task.separator {other!r}, else name the "
                f"labels with --task.names"
            )


def _number(value: Any, place: Place, column: str) -> float:
    number = labels.parse_number(value, place, column)
    if not abs(number) <= _MAX_SCORE:
        raise UserError(
            f"{place}: column {column!r} holds {short_repr(value)}; a score must be finite and at most "
            f"{_MAX_SCORE:.0e}: fix it"
        )
    return number


def _examples(labels: Iterable[str]) -> str:
    return ", ".join(f"{label!r:.60}" for label in islice(labels, 3))


def _is_numeric(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


register(config.Classification, ClassificationTask)
