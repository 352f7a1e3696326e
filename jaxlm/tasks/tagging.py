"""Tagging of the words of a sentence: tags mark spans, such as names, or are classes, such as parts of speech."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import config
from jaxlm.config import ModelConfig
from jaxlm.config.ranges import short_repr
from jaxlm.data.batches import Batch
from jaxlm.data.formats import literals
from jaxlm.data.formats.lines import Place, Row
from jaxlm.data.formats.rows import Columns
from jaxlm.data.joined import Features
from jaxlm.errors import UserError
from jaxlm.nn import crf
from jaxlm.nn.losses import Losses, Sum, cross_entropy
from jaxlm.nn.transformer import Transformer, apply
from jaxlm.reports.report import Bars, Section, mistakes
from jaxlm.tasks import labels as matching
from jaxlm.tasks import metrics
from jaxlm.tasks import tags as schemes
from jaxlm.tasks.cells import Record, Records, column, listed
from jaxlm.tasks.records import HeadTask, Outputs, check_labels, placeholder_token, table_by_class, unknown_label
from jaxlm.tasks.task import register

_SCORES = ("f1", "precision", "recall", "accuracy")
_MANY_ROWS = 50  # that all have one token are not sentences
_UNTYPED = "span"  # name, in tables, of the type of spans without types
# Words of running text: URLs, names of users, abbreviations, numbers, words with hyphens, contractions; any other
# character is a word by itself.
_WORDS = re.compile(
    r"https?://\S+|[@#]\w+|(?:[^\W\d_]\.){2,}|\d+(?:[.,:]\d+)*(?!\w)|['\u2019](?:s|re|ve|ll|d|m|t)\b|\w+(?:-\w+)*|\S",
    re.IGNORECASE,
)


class TaggingTask(HeadTask):
    """`config.Tagging`, with the head "tokens": the first token of each word is labelled with the tag of the word.

    With `task.crf` the model has a CRF: its loss is that of the whole sequence of tags of an example.

    A randomly initialised head learns tags that mark spans in IOB2, and types without markers unchanged.  A head from a
    checkpoint keeps its tags.  A sentence longer than a row is split between words into several examples.
    """

    head = "tokens"
    fields: Mapping[str, Any] = {"labels_BT": np.int32, "weights_BT": np.float32}
    predict_fields = ("words_BT",)  # index of the word whose first token this is, else -1
    task: config.Tagging

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self.kind = _head_kind(self.task, self.labels)
        self.scores = ("accuracy", "macro_f1") if self.kind == "classes" else _SCORES

    @classmethod
    def columns(cls, task: config.Tagging, labelled: bool) -> Columns:
        return Columns((task.tokens, *((task.tags,) if labelled else ())), (task.tags,))

    @classmethod
    def read(cls, task: config.Tagging, row: Row, place: Place) -> Record:
        value = column(row, task.tokens, place, "--task.tokens")
        if isinstance(value, str) and task.tags not in row and not _is_list(value):
            words = list(_WORDS.finditer(value))
            return {"tokens": [word[0] for word in words], "text": value, "starts": [word.start() for word in words]}
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
            if task.scheme in schemes.SCHEMES and not task.names:
                if odd := schemes.find_invalid(tags, task.scheme):
                    known = ", ".join(f"{marker}-TYPE" for marker in schemes.SCHEMES[task.scheme])
                    raise UserError(
                        f"{place}: the tag {odd!r} is not one of {task.scheme}, which are O, {known}; correct it, or "
                        f"name the scheme of the tags with --task.scheme"
                    )
                kind = schemes.tag_kind([*tags, schemes.OUTSIDE])
                record |= {"label": _untyped_iob2(tags, kind), "repaired": _count_repaired(tags, kind)}
        return record

    @classmethod
    def finalize_labels(cls, task: config.Tagging, part: Records, names: Sequence[str]) -> None:
        """Raises UserError for a table with a row for each token, which has no sentences."""
        if len(part.records) >= _MANY_ROWS and all(len(record["tokens"]) == 1 for record in part.records):
            raise UserError(
                f"{part.places[0]}: each of the {len(part.records):,} rows holds one token, and a row is a sentence; "
                f"write the tokens of a sentence as a list in one row, or as CoNLL with blank lines between sentences "
                f"(--data.format conll)"
            )

    @classmethod
    def require_label(cls, task: config.Tagging, row: Row, record: Record, place: Place) -> None:
        if "label" not in record:
            column(row, task.tags, place, "--task.tags")
            raise UserError(f"{place}: the row has no tags in column {task.tags!r}; give them, or leave the row out")

    @classmethod
    def names(cls, task: config.Tagging, part: Records) -> tuple[str, ...]:
        if task.names:
            matching.check_unique(task.names)
            return task.names
        found = {tag for record in part.records for tag in record["label"]}
        kind = _data_kind(task, [part])
        if found and all(tag.isdigit() for tag in found):
            raise UserError(
                f"column {task.tags!r} holds numbers, {', '.join(sorted(found, key=int)[:3])} ...; name the tags in "
                f"their order with --task.names, such as --task.names O B-PER I-PER"
            )
        if all(map(schemes.is_outside, found)):
            raise UserError(f"column {task.tags!r} holds no tag but O; there is nothing to learn")
        if kind == "classes":
            if len(found) < 2:
                raise UserError(f"column {task.tags!r} holds only the tag {min(found)!r}; tagging needs several tags")
            return tuple(sorted(found))
        sentences = (schemes.iob2(record["label"], kind) for record in part.records)
        types = sorted({span.type for tags in sentences for span in schemes.spans(tags)})
        if kind == "inside":
            return (schemes.OUTSIDE, *types)
        return (schemes.OUTSIDE, *(f"{marker}-{name}".rstrip("-") for name in types for marker in "BI"))

    @classmethod
    def map_labels(
        cls,
        task: config.Tagging,
        parts: Sequence[Records],
        names: tuple[str, ...],
        remedy: str = "fix it, or leave the row out",
    ) -> list[Records]:
        parts = _name_indices(parts, names)
        head_kind = _head_kind(task, names)
        if head_kind == "classes":
            return _map_classes(parts, names, remedy)
        found = _all_tags(parts)
        kind = head_kind if found <= set(names) else _data_kind(task, parts)
        kind = "inside" if kind == "classes" else kind  # a few tags may have no O among them
        iob2 = [[schemes.iob2(record["label"], kind) for record in part.records] for part in parts]
        types = {span.type for sentences in iob2 for tags in sentences for span in schemes.spans(tags)}
        head_types = sorted({span.type for name in names for span in schemes.spans(schemes.iob2([name], head_kind))})
        type_of = matching.match_labels(types, head_types) or {type_: type_ for type_ in types}
        write = schemes.tag_writer(names, head_kind)
        mapped = []
        for part, sentences in zip(parts, iob2):
            records = []
            for record, place, tags in zip(part.records, part.places, sentences):
                label = write(schemes.rename_types(tags, type_of))
                if None in label:
                    raise unknown_label(place, record["label"][label.index(None)], names, remedy)
                repaired = record.get("repaired", _count_repaired(record["label"], kind))
                records.append(record | {"label": label, "repaired": repaired})
            mapped.append(part._replace(records=records))
        return mapped

    @classmethod
    def labels_of(cls, record: Record) -> Iterable[str]:
        return record["label"]

    @classmethod
    def texts(cls, record: Record) -> Iterable[str]:
        return [" ".join(record["tokens"])]

    def describe_labels(self, part: Records) -> str:
        words = sum(len(record["tokens"]) for record in part.records)
        if self.kind == "classes":
            counts = Counter(tag for record in part.records for tag in record["label"])
            shares = ", ".join(f"{name} {count:,} ({count / words:.1%})" for name, count in counts.most_common(12))
            return f"{words:,} words: {shares}"
        types = (span.type for record in part.records for span in schemes.spans(self._iob2(record["label"])))
        spans = ", ".join(f"{name or _UNTYPED} {count:,}" for name, count in Counter(types).most_common(12))
        line = f"{words:,} words; spans: {spans}"
        repaired = sum(record.get("repaired", 0) for record in part.records)
        if repaired and self.task.scheme in ("auto", "IOB2"):
            line += f"; {repaired:,} I- tags that follow no tag of their type are read as B-, as in seqeval"
        return line

    def _iob2(self, tags: Sequence[str]) -> list[str]:
        return schemes.iob2(tags, self.kind)

    def features(self, records: Sequence[Record], training: bool) -> Iterator[list[list[Features]]]:
        room = self.tokenizer.max_text_tokens(self.length, pair=False)
        index = {name: i for i, name in enumerate(self.labels)}
        encoded = self.tokenizer.encode_offsets([" ".join(record["tokens"]) for record in records])
        for record, (ids, offsets) in zip(records, encoded):
            first = _first_tokens(record["tokens"], ids, offsets)
            units = []
            for start, end in _cuts(first >= 0, room):
                tokens, types, [at] = self.tokenizer.add_special_tokens(ids[start:end])
                if not tokens:
                    tokens, types = [placeholder_token(self.tokenizer)], [0]
                words = np.full(len(tokens), -1, np.int32)
                words[at : at + end - start] = first[start:end]
                labels = np.zeros(len(tokens), np.int32)
                if "label" in record:
                    labels[words >= 0] = [index[record["label"][word]] for word in words[words >= 0]]
                features: Features = {
                    "tokens_BT": np.array(tokens, np.int32),
                    "types_BT": np.array(types, np.int32),
                    "labels_BT": labels,
                    "weights_BT": (words >= 0).astype(np.float32),
                    "words_BT": words,
                }
                units.append([features])
            yield units

    def configure(self, model: ModelConfig) -> ModelConfig:
        return replace(super().configure(model), crf=self.task.crf)

    def losses_from_states(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> Losses:
        if not module.config.crf:
            return super().losses_from_states(module, params, x_BTD, batch, key)
        logits_BTN = self.logits(module, params, x_BTD, batch, key)
        transitions = apply(module, params, method="transitions")
        words = crf.find_words(batch["weights_BT"] > 0, batch["segments_BT"])
        scores_B = crf.path_scores(logits_BTN, batch["labels_BT"], words, transitions)
        loss = (crf.log_partition(logits_BTN, words, transitions) - scores_B).sum()
        losses = {"loss": (loss, batch["weights_BT"].sum())}
        if key is not None:
            return losses, {}
        tags_BT = crf.viterbi(logits_BTN, words, transitions)
        p_BTN = crf.marginals(logits_BTN, words, transitions)
        confidence_BT = jnp.take_along_axis(p_BTN, tags_BT[..., None], 2)[..., 0]
        return losses, {"tags_BT": tags_BT, "confidence_BT": confidence_BT}

    def loss(self, logits: jax.Array, batch: Batch, training: bool) -> Sum:
        return cross_entropy(logits, batch["labels_BT"], batch["weights_BT"])

    def outputs(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        p_BTN = jax.nn.softmax(logits)
        return {"tags_BT": p_BTN.argmax(-1).astype(jnp.int32), "confidence_BT": p_BTN.max(-1)}

    def predict(self, record: Record, outputs: Outputs) -> Row:
        """Returns the tag of each word, the lowest confidence, the words, and the entities if the tags mark spans.

        A word without tokens gets the tag O, or the first tag of the head if it has no O.
        """
        tokens, default = record["tokens"], next(filter(schemes.is_outside, self.labels), self.labels[0])
        tags, confidence = [default] * len(tokens), [1.0] * len(tokens)
        for [arrays] in outputs:
            for word, tag, p in zip(arrays["words_BT"], arrays["tags_BT"], arrays["confidence_BT"]):
                if word >= 0:
                    tags[word], confidence[word] = self.labels[tag], float(p)
        prediction: Row = {"prediction": tags, "confidence": min(confidence, default=1.0), "words": tokens}
        if self.kind != "classes":
            prediction["entities"] = self._entities(record, tags, confidence)
        return prediction

    def _entities(self, record: Record, tags: list[str], confidence: list[float]) -> list[Row]:
        """Returns the spans with their characters [start, end) and the mean confidence of their words as the score.

        If the words were given as a list, the text is the words joined by spaces.
        """
        tokens = record["tokens"]
        starts = record.get("starts")
        if starts is None:
            starts = np.cumsum([0, *(len(word) + 1 for word in tokens)]).tolist()
        text = record.get("text", " ".join(tokens))
        entities = []
        for span in schemes.spans(self._iob2(tags)):
            start, end = starts[span.first], starts[span.last] + len(tokens[span.last])
            score = sum(confidence[span.first : span.last + 1]) / (span.last + 1 - span.first)
            entities.append({"type": span.type, "text": text[start:end], "start": start, "end": end, "score": score})
        return entities

    def score(self, records: Sequence[Record], predictions: Sequence[Row]) -> dict[str, float]:
        if self.kind == "classes":
            scores = metrics.classification_scores(*self._indices(records, predictions), self.labels)
            return {name: scores[name] for name in self.scores}
        # The accuracy is that of the head's own tags, and not of the tags in IOB2.
        right = [a == b for r, p in zip(records, predictions) for a, b in zip(r["label"], p["prediction"])]
        return self._spans(records, predictions)[0] | {"accuracy": float(np.mean(right)) if right else 0.0}

    def by_class(self, part: Records, predictions: Sequence[Row]) -> dict[str, dict[str, float]]:
        """Returns the scores of each type of span, or of each tag if the tags mark no spans."""
        if self.kind != "classes":
            return self._spans(part.records, predictions)[1]
        return metrics.per_class_scores(*self._indices(part.records, predictions), self.labels)

    def _indices(self, records: Sequence[Record], predictions: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the true and the predicted tag of each word of all sentences, as indices of the head's outputs."""
        index = {name: i for i, name in enumerate(self.labels)}
        labels = np.array([index[tag] for record in records for tag in record["label"]], int)
        return labels, np.array([index[tag] for prediction in predictions for tag in prediction["prediction"]], int)

    def warning(self, part: Records, predictions: Sequence[Row]) -> str | None:
        predicted = {tag for prediction in predictions for tag in prediction["prediction"]}
        if len(predicted) != 1 or len(_all_tags([part])) == 1:
            return None
        return (
            f"all words have the predicted tag {min(predicted)}, and their true tags differ; train longer, or change "
            f"--optimizer.rate"
        )

    def _spans(self, records: Sequence[Record], predictions: Sequence[Row]) -> Any:
        typed = lambda tags: [tag + _UNTYPED if tag[1:] == "-" else tag for tag in self._iob2(tags)]
        predicted = [typed(prediction["prediction"]) for prediction in predictions]
        return metrics.span_scores([typed(record["label"]) for record in records], predicted, "IOB2")

    def sections(self, part: Records, predictions: Sequence[Row]) -> list[Section]:
        records = part.records
        show = _with_tags if self.kind == "classes" else lambda words, tags: _with_brackets(words, self._iob2(tags))
        wrong = [
            (p["confidence"], [show(r["tokens"], r["label"]), show(r["tokens"], p["prediction"])])
            for r, p in zip(records, predictions)
            if r["label"] != p["prediction"]
        ]
        by_type = dict(sorted(self.by_class(part, predictions).items()))
        what, counted = ("tag", "words") if self.kind == "classes" else ("type", "spans")
        return [
            Bars(f"F1 by {what}", tuple(by_type), tuple(100 * scores["f1"] for scores in by_type.values()), "F1 (%)"),
            table_by_class(what, counted, by_type),
            mistakes(("true", "predicted"), wrong, len(records), "held-out sentences have a word with a wrong tag"),
        ]


def _is_list(text: str) -> bool:
    """Returns whether a text is a printed list, and not running text in brackets."""
    try:
        return literals.looks_listed(text, "[") and isinstance(literals.parse(text), list)
    except literals.NotALiteralError:
        return False


def _list(row: Row, name: str, place: Place, option: str, numbers: bool = False) -> list[str]:
    value = column(row, name, place, option)
    value = value.tolist() if isinstance(value, np.ndarray) else value
    value = listed(value, name, place, "[")
    value = value.split() if isinstance(value, str) else value
    is_index = lambda entry: isinstance(entry, (int, np.integer)) and not isinstance(entry, bool) and 0 <= entry < 1e6
    if isinstance(value, (list, tuple)) and numbers and value and all(map(is_index, value)):
        return [str(int(entry)) for entry in value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
        raise UserError(
            f"{place}: column {name!r} holds {short_repr(value)}, not a list of texts; choose with {option}"
        )
    return list(value)


def _head_kind(task: config.Tagging, names: Sequence[str]) -> str:
    return {"none": "classes", "IO": "inside"}.get(task.scheme) or schemes.head_kind(names)


def _data_kind(task: config.Tagging, parts: Sequence[Records]) -> str:
    """Returns the kind of the tags in the data.  Raises UserError if some have a marker and some do not."""
    if task.scheme in ("none", "IO"):
        return {"none": "classes", "IO": "inside"}[task.scheme]
    found = _all_tags(parts)
    kind = schemes.tag_kind(found)
    if schemes.use_brackets(found):
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
                if not schemes.is_outside(tag) and not schemes.has_marker(tag):
                    other = min(filter(schemes.has_marker, found))
                    remedy = "write it as O" if tag in ("_", "-", "*") else "correct it"
                    raise UserError(
                        f"{place}: the tag {tag!r} has no prefix before a type, as {other!r} has; {remedy}, or name "
                        f"the scheme of the tags with --task.scheme (none: each tag is a class)"
                    )
    raise AssertionError("the tags are mixed, and all have a marker")


def _all_tags(parts: Sequence[Records]) -> set[str]:
    return {tag for part in parts for record in part.records for tag in record["label"]}


def _untyped_iob2(tags: Sequence[str], kind: str) -> list[str]:
    """Returns tags in IOB2, as B and I if they have no types."""
    return [tag.rstrip("-") if kind == "untyped" else tag for tag in schemes.iob2(tags, kind)]


def _count_repaired(tags: Sequence[str], kind: str) -> int:
    """Returns the number of I- tags of a sentence that begin a span, and so are read as B-."""
    if kind in ("inside", "suffixed"):
        return 0
    return sum(tag[0].upper() == "I" and new[0] == "B" for tag, new in zip(tags, schemes.iob2(tags, kind)))


def _name_indices(parts: Sequence[Records], names: Sequence[str]) -> list[Records]:
    """Returns the parts with tags that are indices, such as 0 or LABEL_0, replaced by their names."""
    found = _all_tags(parts)
    name_of = matching.match_labels(found, names) if not found <= set(names) else None
    if name_of is None or not all(any(letter.isdigit() for letter in tag) for tag in found):
        return list(parts)
    return [_rename_tags(part, name_of) for part in parts]


def _map_classes(parts: Sequence[Records], names: tuple[str, ...], remedy: str) -> list[Records]:
    """Returns the parts with each tag replaced by the name of an output."""
    name_of = matching.match_labels(_all_tags(parts), names)
    if name_of is None:
        for part in parts:
            check_labels(TaggingTask, part, names, remedy)
    return [_rename_tags(part, name_of or {}) for part in parts]


def _rename_tags(part: Records, name_of: Mapping[str, str]) -> Records:
    renamed = [record | {"label": [name_of[tag] for tag in record["label"]]} for record in part.records]
    return part._replace(records=renamed)


def _first_tokens(words: list[str], ids: list[int], offsets: list[tuple[int, int]]) -> np.ndarray:
    """Returns for each token of the words, joined by spaces, the index of the word whose first token it is, or -1."""
    ends = np.cumsum([len(word) + 1 for word in words]) - 1  # of each word in the text
    first = np.full(len(ids), -1, np.int32)
    last = -1
    for t, (start, end) in enumerate(offsets):
        # A token may include the space before its word, so its last character determines the word.
        word = int(np.searchsorted(ends, max(start, end - 1), side="right")) if end > start else last
        if last < word < len(words):
            first[t] = last = word
    return first


def _cuts(begins: np.ndarray, room: int) -> Iterator[tuple[int, int]]:
    """Yields spans of at most `room` tokens that cover all tokens; each starts at a word, unless a word is longer."""
    start = 0
    while len(begins) - start > room:
        inside = np.flatnonzero(begins[start + 1 : start + room + 1])
        end = start + 1 + int(inside[-1]) if len(inside) else start + room
        yield start, end
        start = end
    yield start, len(begins)


def _with_tags(words: list[str], tags: list[str]) -> str:
    """Returns words with their tags: `the/DET film/NOUN`."""
    return " ".join(f"{word}/{tag}" for word, tag in zip(words, tags))


def _with_brackets(words: list[str], tags: list[str]) -> str:
    """Returns words with the spans of their tags in IOB2: `in [London location]`."""
    first = {span.first: "[" for span in schemes.spans(tags)}
    last = {span.last: f" {span.type}]" if span.type else "]" for span in schemes.spans(tags)}
    return " ".join(f"{first.get(n, '')}{word}{last.get(n, '')}" for n, word in enumerate(words))


register(config.Tagging, TaggingTask)
