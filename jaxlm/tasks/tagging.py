"""What each word of a sentence is a part of: names of persons, places, and so on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import config, metrics
from jaxlm.data.batches import Batch, Features
from jaxlm.data.formats import Place, Row
from jaxlm.errors import UserError
from jaxlm.losses import Sum, cross_entropy
from jaxlm.report import Bars, Section, Table, mistakes
from jaxlm.tasks.reading import Record, Records, column
from jaxlm.tasks.records import HeadTask, Outputs, stand_in


class TaggingTask(HeadTask):
    """`config.Tagging`, by the head "tokens": the first token of each word is labelled with the word's tag.

    Tags are learned, and predicted, as IOB2.  A sentence longer than a row is cut between words into several examples.
    """

    head = "tokens"
    scores = ("f1", "precision", "recall", "accuracy")
    fields: Mapping[str, Any] = {"labels_BT": np.int32, "weights_BT": np.float32}
    kept = ("words_BT",)  # number of the word that a token is the first of, else -1
    task: config.Tagging

    @classmethod
    def read(cls, task: config.Tagging, row: Row, place: Place) -> Record:
        tokens = _list(row, task.tokens, place, "--task.tokens")
        record: Record = {"tokens": tokens}
        if row.get(task.tags) is not None:
            tags = _list(row, task.tags, place, "--task.tags")
            if len(tags) != len(tokens):
                raise UserError(f"{place}: there are {len(tokens)} tokens and {len(tags)} tags; give a tag for each")
            try:
                record |= {"label": metrics.iob2(tags, task.scheme), "repaired": metrics.repaired(tags)}
            except UserError as error:
                raise UserError(f"{place}: {error}") from None
        return record

    @classmethod
    def labelled(cls, task: config.Tagging, row: Row, record: Record, place: Place) -> None:
        if "label" not in record:
            column(row, task.tags, place, "--task.tags")
            raise UserError(f"{place}: the row has no tags in column {task.tags!r}; give them, or leave the row out")

    @classmethod
    def names(cls, task: config.Tagging, part: Records) -> tuple[str, ...]:
        types = sorted({tag[2:] for record in part.records for tag in record["label"] if tag != "O"})
        if not types:
            raise UserError(f"column {task.tags!r} holds no tag but O; there is nothing to learn")
        return ("O", *(f"{mark}-{name}" for name in types for mark in "BI"))

    @classmethod
    def labels_of(cls, record: Record) -> Iterable[str]:
        return record["label"]

    @classmethod
    def texts(cls, record: Record) -> Iterable[str]:
        return [" ".join(record["tokens"])]

    def balance(self, part: Records) -> str:
        counts = Counter(tag[2:] for record in part.records for tag in record["label"] if tag.startswith("B-"))
        words = sum(len(record["tokens"]) for record in part.records)
        spans = ", ".join(f"{name} {count:,}" for name, count in counts.most_common(12))
        said = f"{words:,} words; spans: {spans}"
        repaired = sum(record["repaired"] for record in part.records)
        if repaired and self.task.scheme == "IOB2":
            said += f"; {repaired:,} I- tags that follow no tag of their type are read as B-, as seqeval does"
        return said

    def features(self, records: Sequence[Record], training: bool) -> Iterator[list[list[Features]]]:
        room = self.tokenizer.room(self.length, pair=False)
        index = {name: i for i, name in enumerate(self.labels)}
        encoded = self.tokenizer.encode_offsets([" ".join(record["tokens"]) for record in records])
        for record, (ids, offsets) in zip(records, encoded):
            first = _first_tokens(record["tokens"], ids, offsets)
            units = []
            for start, end in _cuts(first >= 0, room):
                tokens, types, [at] = self.tokenizer.wrap(ids[start:end])
                if not tokens:
                    tokens, types = [stand_in(self.tokenizer)], [0]
                words = np.full(len(tokens), -1, np.int32)
                words[at : at + end - start] = first[start:end]
                labels = np.zeros(len(tokens), np.int32)
                if "label" in record:
                    labels[words >= 0] = [index[record["label"][word]] for word in words[words >= 0]]
                units.append(
                    [
                        {
                            "tokens_BT": np.array(tokens, np.int32),
                            "types_BT": np.array(types, np.int32),
                            "labels_BT": labels,
                            "weights_BT": (words >= 0).astype(np.float32),
                            "words_BT": words,
                        }
                    ]
                )
            yield units

    def loss(self, logits: jax.Array, batch: Batch, training: bool) -> Sum:
        return cross_entropy(logits, batch["labels_BT"], batch["weights_BT"])

    def outputs(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        p_BTN = jax.nn.softmax(logits)
        return {"tags_BT": p_BTN.argmax(-1).astype(jnp.int32), "confidence_BT": p_BTN.max(-1)}

    def predict(self, record: Record, outputs: Outputs) -> Row:
        """A tag for each word, O for one that the tokenizer has no token for, and the least of the confidences."""
        tags, confidence = ["O"] * len(record["tokens"]), [1.0] * len(record["tokens"])
        for [found] in outputs:
            for word, tag, p in zip(found["words_BT"], found["tags_BT"], found["confidence_BT"]):
                if word >= 0:
                    tags[word], confidence[word] = self.labels[tag], float(p)
        return {"prediction": tags, "confidence": min(confidence, default=1.0)}

    def score(self, records: Sequence[Record], predictions: Sequence[Row]) -> dict[str, float]:
        return self._spans(records, predictions)[0]

    def _spans(self, records: Sequence[Record], predictions: Sequence[Row]) -> Any:
        found = [prediction["prediction"] for prediction in predictions]
        return metrics.spans([record["label"] for record in records], found, "IOB2")

    def sections(self, part: Records, predictions: Sequence[Row]) -> list[Section]:
        records = part.records
        by_type = self._spans(records, predictions)[1]
        names = sorted(by_type)
        rows = [
            [
                name,
                *(f"{by_type[name][key]:.1%}" for key in ("precision", "recall", "f1")),
                f"{by_type[name]['support']:,.0f}",
            ]
            for name in names
        ]
        wrong = [
            (p["confidence"], [_marked(r["tokens"], r["label"]), _marked(r["tokens"], p["prediction"])])
            for r, p in zip(records, predictions)
            if r["label"] != p["prediction"]
        ]
        return [
            Bars("F1 by type", tuple(names), tuple(100 * by_type[name]["f1"] for name in names), "F1 (%)"),
            Table("Scores by type", ("type", "precision", "recall", "F1", "spans"), rows, ""),
            mistakes(("true", "predicted"), wrong, len(records), "held-out sentences have a word told wrong"),
        ]


def _list(row: Row, name: str, place: Place, option: str) -> list[str]:
    value = column(row, name, place, option)
    value = value.tolist() if isinstance(value, np.ndarray) else value
    value = value.split() if isinstance(value, str) else value
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
        raise UserError(f"{place}: column {name!r} holds {value!r:.60}, not a list of texts; choose with {option}")
    return list(value)


def _first_tokens(words: list[str], ids: list[int], offsets: list[tuple[int, int]]) -> np.ndarray:
    """For each token of the words, joined by spaces, the number of the word that it is the first token of, else -1."""
    ends = np.cumsum([len(word) + 1 for word in words]) - 1  # of each word in the text
    first = np.full(len(ids), -1, np.int32)
    seen = -1
    for t, (start, end) in enumerate(offsets):
        # A token may carry the space before its word: what it ends in tells its word.
        word = int(np.searchsorted(ends, max(start, end - 1), side="right")) if end > start else seen
        if word > seen and word < len(words):
            first[t] = seen = word
    return first


def _cuts(begins: np.ndarray, room: int) -> Iterator[tuple[int, int]]:
    """Spans of at most `room` tokens that cover all, cut where a word begins, unless a word is longer than that."""
    start = 0
    while len(begins) - start > room:
        inside = np.flatnonzero(begins[start + 1 : start + room + 1])
        end = start + 1 + int(inside[-1]) if len(inside) else start + room
        yield start, end
        start = end
    yield start, len(begins)


def _marked(words: list[str], tags: list[str]) -> str:
    """`in [London location]`: words with their spans marked."""
    parts: list[str] = []
    for word, tag in zip(words, tags):
        if tag.startswith("I-") and parts and parts[-1].endswith(f" {tag[2:]}]"):
            parts[-1] = f"{parts[-1][: -len(tag[2:]) - 2]} {word} {tag[2:]}]"
        else:
            parts.append(word if tag == "O" else f"[{word} {tag[2:]}]")
    return " ".join(parts)
