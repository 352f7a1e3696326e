"""What each word of a sentence is a part of, such as a name; or what it is itself, such as a noun."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import config
from jaxlm.config.ranges import shown
from jaxlm.data.batches import Batch, Features
from jaxlm.data.formats import literals
from jaxlm.data.formats.lines import Place, Row
from jaxlm.data.formats.rows import Columns
from jaxlm.errors import UserError, perhaps
from jaxlm.nn.losses import Sum, cross_entropy
from jaxlm.reports.report import Bars, Section, Table, mistakes
from jaxlm.tasks import labels as matching
from jaxlm.tasks import metrics
from jaxlm.tasks import tags as schemes
from jaxlm.tasks.cells import Record, Records, column, listed
from jaxlm.tasks.records import HeadTask, Outputs, stand_in
from jaxlm.tasks.task import register

_SCORES = ("f1", "precision", "recall", "accuracy")
_MANY = 50  # rows that do not all have one token by chance
_UNTYPED = "span"  # the type, in tables, of spans whose tags name none
# Words of running text: addresses, names of users, abbreviations, numbers, words with hyphens, contractions; any
# other sign stands alone.
_WORDS = re.compile(
    r"https?://\S+|[@#]\w+|(?:[^\W\d_]\.){2,}|\d+(?:[.,:]\d+)*(?!\w)|['\u2019](?:s|re|ve|ll|d|m|t)\b|\w+(?:-\w+)*|\S",
    re.IGNORECASE,
)


class TaggingTask(HeadTask):
    """`config.Tagging`, by the head "tokens": the first token of each word is labelled with the word's tag.

    Tags that mark spans are learned as IOB2, those that are a type alone as they are; by a head that is read from
    weights, as this head names them.  A sentence longer than a row is cut between words into several examples.
    """

    head = "tokens"
    fields: Mapping[str, Any] = {"labels_BT": np.int32, "weights_BT": np.float32}
    kept = ("words_BT",)  # number of the word that a token is the first of, else -1
    task: config.Tagging

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self.kind = _kind_of_head(self.task, self.labels)
        self.scores = ("accuracy", "macro_f1") if self.kind == "classes" else _SCORES

    @classmethod
    def columns(cls, task: config.Tagging, labelled: bool) -> Columns:
        return Columns((task.tokens, *((task.tags,) if labelled else ())), (task.tags,))

    @classmethod
    def read(cls, task: config.Tagging, row: Row, place: Place) -> Record:
        value = column(row, task.tokens, place, "--task.tokens")
        if isinstance(value, str) and task.tags not in row and not _is_list(value):
            found = [(match[0], match.start()) for match in _WORDS.finditer(value)]
            return {"tokens": [word for word, _ in found], "text": value, "starts": [start for _, start in found]}
        tokens = _list(row, task.tokens, place, "--task.tokens")
        record: Record = {"tokens": tokens}
        if row.get(task.tags) is not None:
            tags = _list(row, task.tags, place, "--task.tags", numbers=True)
            if len(tags) != len(tokens):
                raise UserError(f"{place}: there are {len(tokens)} tokens and {len(tags)} tags; give a tag for each")
            if not all(tag.strip() for tag in tags):
                raise UserError(
                    f"{place}: a tag in column {task.tags!r} is empty; write {schemes.OUTSIDE} outside of spans"
                )
            record["label"] = tags
            if task.scheme in schemes.LETTERS and not task.names:
                if odd := schemes.other(tags, task.scheme):
                    known = ", ".join(f"{letter}-TYPE" for letter in schemes.LETTERS[task.scheme])
                    raise UserError(
                        f"{place}: the tag {odd!r} is not one of {task.scheme}, which are O, {known}; correct it, or "
                        f"name the scheme of the tags with --task.scheme"
                    )
                kind = schemes.kind_of([*tags, schemes.OUTSIDE])
                record |= {"label": _written(tags, kind), "repaired": _repaired(tags, kind)}
        return record

    @classmethod
    def settle(cls, task: config.Tagging, part: Records, names: Sequence[str]) -> None:
        """Refuses a table with a row for each token, which has no sentences."""
        if len(part.records) >= _MANY and all(len(record["tokens"]) == 1 for record in part.records):
            raise UserError(
                f"{part.places[0]}: each of the {len(part.records):,} rows holds one token, and a row is a sentence; "
                f"write the tokens of a sentence as a list in one row, or as CoNLL with blank lines between sentences "
                f"(--data.format conll)"
            )

    @classmethod
    def labelled(cls, task: config.Tagging, row: Row, record: Record, place: Place) -> None:
        if "label" not in record:
            column(row, task.tags, place, "--task.tags")
            raise UserError(f"{place}: the row has no tags in column {task.tags!r}; give them, or leave the row out")

    @classmethod
    def names(cls, task: config.Tagging, part: Records) -> tuple[str, ...]:
        if task.names:
            if len(set(task.names)) < len(task.names):
                raise UserError(f"--task.names has a name twice: {', '.join(task.names)}; give each once")
            return task.names
        found = {tag for record in part.records for tag in record["label"]}
        kind = _kind(task, [part])
        if found and all(tag.isdigit() for tag in found):
            raise UserError(
                f"column {task.tags!r} holds numbers, {', '.join(sorted(found, key=int)[:3])} ...; name the tags in "
                f"their order with --task.names, such as --task.names O B-PER I-PER"
            )
        if all(map(schemes.is_outside, found)):
            raise UserError(f"column {task.tags!r} holds no tag but O; there is nothing to learn")
        if kind == "classes":
            if len(found) < 2:
                raise UserError(
                    f"column {task.tags!r} holds one tag alone, {min(found)!r}; there is nothing to tell apart"
                )
            return tuple(sorted(found))
        types = sorted({span.type for record in part.records for span in schemes.spans(_iob2(record["label"], kind))})
        if kind == "inside":
            return (schemes.OUTSIDE, *types)
        return (schemes.OUTSIDE, *(f"{mark}-{name}".rstrip("-") for name in types for mark in "BI"))

    @classmethod
    def fitted(
        cls,
        task: config.Tagging,
        parts: Sequence[Records],
        names: tuple[str, ...],
        remedy: str = "fix it, or leave the row out",
    ) -> list[Records]:
        parts = _numbered(parts, names)
        kind_of_head = _kind_of_head(task, names)
        if kind_of_head == "classes":
            return _as_classes(cls, parts, names, remedy)
        found = {tag for part in parts for record in part.records for tag in record["label"]}
        kind = kind_of_head if found <= set(names) else _kind(task, parts)
        kind = "inside" if kind == "classes" else kind  # there is no O among a few tags
        read = [[_iob2(record["label"], kind) for record in part.records] for part in parts]
        types = {span.type for some in read for tags in some for span in schemes.spans(tags)}
        of_head = sorted({span.type for name in names for span in schemes.spans(_iob2([name], kind_of_head))})
        type_of = matching.matched(types, of_head) or {type_: type_ for type_ in types}
        write = schemes.writer(names, kind_of_head)
        made = []
        for part, some in zip(parts, read):
            records = []
            for record, place, tags in zip(part.records, part.places, some):
                written = write(schemes.retyped(tags, type_of))
                if None in written:
                    raise _unknown(place, record["label"][written.index(None)], names, remedy)
                repaired = record.get("repaired", _repaired(record["label"], kind))
                records.append(record | {"label": written, "repaired": repaired})
            made.append(part._replace(records=records))
        return made

    @classmethod
    def labels_of(cls, record: Record) -> Iterable[str]:
        return record["label"]

    @classmethod
    def texts(cls, record: Record) -> Iterable[str]:
        return [" ".join(record["tokens"])]

    def balance(self, part: Records) -> str:
        words = sum(len(record["tokens"]) for record in part.records)
        if self.kind == "classes":
            counts = Counter(tag for record in part.records for tag in record["label"])
            shares = ", ".join(f"{name} {count:,} ({count / words:.1%})" for name, count in counts.most_common(12))
            return f"{words:,} words: {shares}"
        each = (span.type for record in part.records for span in schemes.spans(self._iob2(record["label"])))
        spans = ", ".join(f"{name or _UNTYPED} {count:,}" for name, count in Counter(each).most_common(12))
        said = f"{words:,} words; spans: {spans}"
        repaired = sum(record.get("repaired", 0) for record in part.records)
        if repaired and self.task.scheme in ("auto", "IOB2"):
            said += f"; {repaired:,} I- tags that follow no tag of their type are read as B-, as seqeval does"
        return said

    def _iob2(self, tags: Sequence[str]) -> list[str]:
        return schemes.iob2(tags, self.kind)

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
        """A tag for each word, that of no span (or the first) for a word without tokens; the least of the confidences;
        the words; and, of tags that mark spans, the entities."""
        tokens, none = record["tokens"], next(filter(schemes.is_outside, self.labels), self.labels[0])
        tags, confidence = [none] * len(tokens), [1.0] * len(tokens)
        for [found] in outputs:
            for word, tag, p in zip(found["words_BT"], found["tags_BT"], found["confidence_BT"]):
                if word >= 0:
                    tags[word], confidence[word] = self.labels[tag], float(p)
        told: Row = {"prediction": tags, "confidence": min(confidence, default=1.0), "words": tokens}
        return told if self.kind == "classes" else told | {"entities": self._entities(record, tags, confidence)}

    def _entities(self, record: Record, tags: list[str], confidence: list[float]) -> list[Row]:
        """The spans with their characters [start, end) of the text, which is the words with blanks between them where
        they were given as a list; the score is the mean of their words' confidences."""
        tokens = record["tokens"]
        starts = record.get("starts")
        if starts is None:
            starts = np.cumsum([0, *(len(word) + 1 for word in tokens)]).tolist()
        text = record.get("text", " ".join(tokens))
        found = []
        for span in schemes.spans(self._iob2(tags)):
            start, end = starts[span.first], starts[span.last] + len(tokens[span.last])
            score = sum(confidence[span.first : span.last + 1]) / (span.last + 1 - span.first)
            found.append({"type": span.type, "text": text[start:end], "start": start, "end": end, "score": score})
        return found

    def score(self, records: Sequence[Record], predictions: Sequence[Row]) -> dict[str, float]:
        true, found = ([row[key] for row in rows] for rows, key in ((records, "label"), (predictions, "prediction")))
        pairs = [(a, b) for one, other in zip(true, found) for a, b in zip(one, other)]
        if self.kind == "classes":
            index = {name: i for i, name in enumerate(self.labels)}
            scores = metrics.classes([index[a] for a, _ in pairs], [index[b] for _, b in pairs], self.labels)
            return {name: scores[name] for name in self.scores}
        # Spans are those of any scheme; a tag is right where it is the head's own.
        right = sum(a == b for a, b in pairs) / len(pairs) if pairs else 0.0
        return self._spans(records, predictions)[0] | {"accuracy": right}

    def by_class(self, part: Records, predictions: Sequence[Row]) -> dict[str, dict[str, float]]:
        """Of the types of spans; of tags that mark none, of the tags."""
        if self.kind != "classes":
            return self._spans(part.records, predictions)[1]
        true, found = (
            np.array([tag for row in rows for tag in row[key]], object)[:, None] == np.array(self.labels, object)
            for rows, key in ((part.records, "label"), (predictions, "prediction"))
        )
        return metrics.of_classes(true, found, self.labels)

    def warning(self, part: Records, predictions: Sequence[Row]) -> str | None:
        found = {tag for prediction in predictions for tag in prediction["prediction"]}
        true = {tag for record in part.records for tag in record["label"]}
        if len(found) != 1 or len(true) == 1:
            return None
        return (
            f"all words are predicted as {min(found)}, and the tags are not; train longer, or change --optimizer.rate"
        )

    def _spans(self, records: Sequence[Record], predictions: Sequence[Row]) -> Any:
        typed = lambda tags: [tag + _UNTYPED if tag[1:] == "-" else tag for tag in self._iob2(tags)]
        found = [typed(prediction["prediction"]) for prediction in predictions]
        return metrics.spans([typed(record["label"]) for record in records], found, "IOB2")

    def sections(self, part: Records, predictions: Sequence[Row]) -> list[Section]:
        records = part.records
        marked = _marked if self.kind == "classes" else lambda words, tags: _bracketed(words, self._iob2(tags))
        wrong = [
            (p["confidence"], [marked(r["tokens"], r["label"]), marked(r["tokens"], p["prediction"])])
            for r, p in zip(records, predictions)
            if r["label"] != p["prediction"]
        ]
        wrongly = mistakes(("true", "predicted"), wrong, len(records), "held-out sentences have a word predicted wrong")
        by_type = self.by_class(part, predictions)
        names = sorted(by_type)
        rows = [
            [
                name,
                *(f"{by_type[name][key]:.1%}" for key in ("precision", "recall", "f1")),
                f"{by_type[name]['support']:,.0f}",
            ]
            for name in names
        ]
        what, counted = ("tag", "words") if self.kind == "classes" else ("type", "spans")
        return [
            Bars(f"F1 by {what}", tuple(names), tuple(100 * by_type[name]["f1"] for name in names), "F1 (%)"),
            Table(f"Scores by {what}", (what, "precision", "recall", "F1", counted), rows, ""),
            wrongly,
        ]


def _is_list(text: str) -> bool:
    """Whether a text is the print of a list, and not running text that stands in brackets."""
    try:
        return literals.looks_listed(text, "[") and isinstance(literals.parse(text), list)
    except literals.NotALiteralError:
        return False


def _list(row: Row, name: str, place: Place, option: str, numbers: bool = False) -> list[str]:
    value = column(row, name, place, option)
    value = value.tolist() if isinstance(value, np.ndarray) else value
    value = listed(value, name, place, "[")
    value = value.split() if isinstance(value, str) else value
    whole = lambda entry: isinstance(entry, (int, np.integer)) and not isinstance(entry, bool) and 0 <= entry < 1e6
    if isinstance(value, (list, tuple)) and numbers and value and all(map(whole, value)):
        return [str(int(entry)) for entry in value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
        raise UserError(f"{place}: column {name!r} holds {shown(value)}, not a list of texts; choose with {option}")
    return list(value)


def _kind_of_head(task: config.Tagging, names: Sequence[str]) -> str:
    return {"none": "classes", "IO": "inside"}.get(task.scheme) or schemes.kind_of_head(names)


def _kind(task: config.Tagging, parts: Sequence[Records]) -> str:
    """The kind of the tags in the data.  Raises UserError where some have a mark and some have none."""
    if task.scheme in ("none", "IO"):
        return {"none": "classes", "IO": "inside"}[task.scheme]
    found = {tag for part in parts for record in part.records for tag in record["label"]}
    kind = schemes.kind_of(found)
    if schemes.are_bracketed(found):
        [place, *_] = (place for part in parts for place in part.places)
        raise UserError(
            f"{place}: the tags open and close spans by brackets, as {min(t for t in found if t[:1] == '(')!r} "
            f"does; write them as B-TYPE, I-TYPE and O, or read each tag as a class with --task.scheme none"
        )
    if kind != "mixed":
        return kind
    for part in parts:
        for record, place in zip(part.records, part.places):
            for tag in record["label"]:
                if not schemes.is_outside(tag) and not schemes.is_marked(tag):
                    other = min(filter(schemes.is_marked, found))
                    remedy = "write it as O" if tag in ("_", "-", "*") else "correct it"
                    raise UserError(
                        f"{place}: the tag {tag!r} has no mark before a type, as {other!r} has; {remedy}, or name "
                        f"the scheme of the tags with --task.scheme (none: each tag is a class)"
                    )
    raise AssertionError("tags are mixed, and none is without a mark")


def _iob2(tags: Sequence[str], kind: str) -> list[str]:
    return schemes.iob2(tags, kind)


def _written(tags: Sequence[str], kind: str) -> list[str]:
    """Tags of a kind in IOB2, as a head tells them apart: without types as B and I."""
    return [tag.rstrip("-") if kind == "untyped" else tag for tag in schemes.iob2(tags, kind)]


def _repaired(tags: Sequence[str], kind: str) -> int:
    """How many tags of a sentence say that they continue a span, and begin one."""
    if kind in ("inside", "suffixed"):
        return 0
    return sum(tag[0].upper() == "I" and new[0] == "B" for tag, new in zip(tags, schemes.iob2(tags, kind)))


def _numbered(parts: Sequence[Records], names: Sequence[str]) -> list[Records]:
    """The parts with the names of tags that are numbers, or LABEL_0, LABEL_1 ..."""
    found = {tag for part in parts for record in part.records for tag in record["label"]}
    name_of = matching.matched(found, names) if not found <= set(names) else None
    if name_of is None or not all(any(letter.isdigit() for letter in tag) for tag in found):
        return list(parts)
    renamed = lambda record: record | {"label": [name_of[tag] for tag in record["label"]]}
    return [part._replace(records=[renamed(record) for record in part.records]) for part in parts]


def _as_classes(
    kind: type[TaggingTask], parts: Sequence[Records], names: tuple[str, ...], remedy: str
) -> list[Records]:
    found = {tag for part in parts for record in part.records for tag in record["label"]}
    name_of = matching.matched(found, names)
    made = []
    for part in parts:
        for record, place in zip(part.records, part.places) if name_of is None else ():
            for tag in record["label"]:
                if tag not in names:
                    raise _unknown(place, tag, names, remedy)
        known = name_of or {}
        records = [record | {"label": [known[tag] for tag in record["label"]]} for record in part.records]
        made.append(part._replace(records=records))
    return made


def _unknown(place: Any, tag: str, names: Sequence[str], remedy: str) -> UserError:
    return UserError(f"{place}: the label {tag!r} is not among those that are learned{perhaps(tag, names)}; {remedy}")


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
    """`the/DET film/NOUN`: words with their tags."""
    return " ".join(f"{word}/{tag}" for word, tag in zip(words, tags))


def _bracketed(words: list[str], tags: list[str]) -> str:
    """`in [London location]`: words with the spans that tags in IOB2 mark."""
    first = {span.first: "[" for span in schemes.spans(tags)}
    last = {span.last: f" {span.type}]" if span.type else "]" for span in schemes.spans(tags)}
    return " ".join(f"{first.get(n, '')}{word}{last.get(n, '')}" for n, word in enumerate(words))


register(config.Tagging, TaggingTask)
