"""Sequence to sequence: translations, summaries, answers.

An encoder-decoder reads the source in its encoder.  A decoder reads the source before the target, and only the target
has a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jaxlm import config
from jaxlm.config import ModelConfig
from jaxlm.config.ranges import short_repr
from jaxlm.data.formats.lines import Place, Row
from jaxlm.data.formats.rows import Columns
from jaxlm.data.joined import Features
from jaxlm.errors import UserError
from jaxlm.reports.report import Section
from jaxlm.tasks import metrics
from jaxlm.tasks.cells import Record, Records, cell, column
from jaxlm.tasks.generation import PROMPT_REMEDY, GenerationTask, table_of_texts
from jaxlm.tasks.records import add_special_tokens, placeholder_token
from jaxlm.tasks.task import register

_SCORES: dict[str, tuple[tuple[str, ...], Callable[..., dict[str, float]]]] = {
    "translation": (("bleu", "chrf"), metrics.translation_scores),
    "summary": (("rouge1", "rouge2", "rougeL", "rougeLsum"), metrics.summary_scores),
    "answer": (("exact", "f1"), metrics.answer_scores),
}


class Seq2SeqTask(GenerationTask):
    """`config.Seq2Seq`, with the head "lm"."""

    remedies: Mapping[str, tuple[str, str]] = {
        "T": ("targets", "raise --data.length"),
        "S": ("sources", "raise --task.source-length"),
        **PROMPT_REMEDY,
    }
    task: config.Seq2Seq

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self.scores = _SCORES[self.task.scored_as][0]
        self.decoding, self.max_scored = self.task.decoding, self.task.generated

    def configure(self, model: ModelConfig) -> ModelConfig:
        """As in the base class; by default the first token of a source has global attention (Beltagy et al. 2020)."""
        model = super().configure(model)
        chosen = not model.global_attention or model.global_tokens != "head"
        return model if chosen else replace(model, global_tokens="first")

    @classmethod
    def columns(cls, task: config.Seq2Seq, labelled: bool) -> Columns:
        target = (task.target,) if labelled else ()
        return Columns((task.source, *target), (*task.references, task.target))

    @classmethod
    def read(cls, task: config.Seq2Seq, row: Row, place: Place) -> Record | None:
        record: Record = {"source": _text(column(row, task.source, place, "--task.source"), place, task.source)}
        value = cell(row, task.target)
        if value is not None:
            targets = [*value] if isinstance(value, (list, tuple, np.ndarray)) else [value]
            # A reference may be empty, but its column must exist.
            references = (column(row, name, place, "--task.references") for name in task.references)
            targets += [text for text in references if text]
            record["label"] = tuple(_text(text, place, task.target) for text in targets)
        sides = {task.source: (record["source"],), task.target: record.get("label", ("-",))}
        for name, texts in sides.items():
            if not any(text.strip() for text in texts):
                if task.empty == "drop":
                    return None
                raise UserError(f"{place}: column {name!r} is empty; fix the row, or set --task.empty drop")
        return record

    @classmethod
    def require_label(cls, task: config.Seq2Seq, row: Row, record: Record, place: Place) -> None:
        if "label" not in record:
            column(row, task.target, place, "--task.target")
            raise UserError(f"{place}: the row has no text in column {task.target!r}; give one, or leave the row out")

    @classmethod
    def texts(cls, record: Record) -> Iterable[str]:
        return [record["source"]]

    @classmethod
    def target_texts(cls, record: Record) -> Iterable[str]:
        return record["label"]

    def prompts(self, records: Sequence[Record]) -> list[list[int]]:
        return [ids for ids, _ in self._prompts(records)]

    def _prompts(self, records: Sequence[Record]) -> list[tuple[list[int], int]]:
        """Returns the prompt tokens of each record, and the number of tokens that were cut."""
        texts = [self.task.prefix + record["source"] + self.task.suffix for record in records]
        if self.source_length is None:
            encoded = self.tokenizer.encode_batch(texts)
            return [(self.tokenizer.with_prefix(ids) or [placeholder_token(self.tokenizer)], 0) for ids in encoded]
        # A truncated source keeps its end token, because models are trained on sources with one.
        sources = add_special_tokens(self.tokenizer, texts, None, self.source_length)
        return [(features["tokens_BT"], features["cut"]) for features in sources]

    def answers(self, records: Sequence[Record]) -> list[list[int]]:
        """Returns the target tokens of each record."""
        return [ids for ids, _ in self._answers(records)]

    def _answers(self, records: Sequence[Record]) -> list[tuple[list[int], int]]:
        """Returns the target tokens of each record, and the number of tokens that were cut."""
        texts = [record["label"][0] if record.get("label") else "" for record in records]
        if self.source_length is None:
            room = self.length - 1
            encoded = self.tokenizer.target.encode_batch(texts)
            return [([*ids[:room], self.end], max(0, len(ids) - room)) for ids in encoded]
        full = [ids or [self.end] for ids, _ in self.tokenizer.target.encode_with_special_tokens(texts)]
        truncated = self.tokenizer.target.encode_with_special_tokens(texts, max_length=self.length)
        return [(ids or [self.end], max(0, len(whole) - len(ids))) for whole, (ids, _) in zip(full, truncated)]

    def features(self, records: Sequence[Record], training: bool) -> Iterator[list[list[Features]]]:
        for (prompt, prompt_cut), (answer, answer_cut) in zip(self._prompts(records), self._answers(records)):
            if self.source_length is None:
                excess = max(0, len(prompt) + min(len(answer), self.length) - self.length - 1)
                yield [[self._one_stack(prompt, answer) | {"cut": excess + answer_cut}]]
            else:
                yield [[self._two_stacks(prompt, answer) | {"cut": answer_cut, "source_cut": prompt_cut}]]

    def _two_stacks(self, source: list[int], target: list[int]) -> Features:
        """Returns the source for the encoder, and for the decoder the target shifted right after the start token."""
        target = target[: self.length]
        first = target[-1] if self.start is None else self.start
        return {
            "source_tokens_BS": np.array(source[: self.source_length], np.int32),
            "tokens_BT": np.array([first, *target[:-1]], np.int32),
            "labels_BT": np.array(target, np.int32),
            "weights_BT": np.ones(len(target), np.float32),
        }

    def _one_stack(self, prompt: list[int], answer: list[int]) -> Features:
        """Returns the prompt and the answer as one text, with a loss on the answer.

        The prompt loses its beginning if both together exceed the length of a row.
        """
        answer = answer[: self.length]
        prompt = prompt[-(self.length + 1 - len(answer)) :]
        tokens = np.array([*prompt, *answer], np.int32)
        weights = (np.arange(1, len(tokens)) >= len(prompt)).astype(np.float32)
        features = {"tokens_BT": tokens[:-1], "labels_BT": tokens[1:], "weights_BT": weights}
        if "prefix_BT" in self.fields:
            features["prefix_BT"] = (np.arange(len(tokens) - 1) < len(prompt)).astype(np.int32)
        return features

    def score(self, records: Sequence[Record], predictions: Sequence[Row]) -> dict[str, float]:
        texts = [prediction["prediction"] for prediction in predictions]
        return _SCORES[self.task.scored_as][1]([record["label"] for record in records], texts)

    @classmethod
    def score_notes(cls, task: config.Seq2Seq, records: Sequence[Record]) -> list[str]:
        """Returns sacreBLEU's signatures of the scores of translations."""
        if task.scored_as != "translation" or not records:
            return []
        signatures = metrics.translation_signatures([record["label"] for record in records])
        return [f"{name}: {signature}" for name, signature in signatures.items()]

    def sections(self, part: Records, predictions: Sequence[Row]) -> list[Section]:
        records = part.records[: len(predictions)]
        rows = ([r["source"], " | ".join(r["label"]), p["prediction"]] for r, p in zip(records, predictions))
        note = "; ".join(["The first of the held-out part", *self.score_notes(self.task, records)])
        return [table_of_texts("Generated texts", ("source", "reference", "generated"), rows, f"{note}.")]


def _text(value: Any, place: Place, name: str) -> str:
    """Returns the text in a cell, or the sentences in it joined by spaces."""
    if isinstance(value, (list, tuple, np.ndarray)) and all(isinstance(part, str) for part in value):
        return " ".join(value)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{place}: column {name!r} holds {type(value).__name__} {short_repr(value)}, not text")
    return value or ""


register(config.Seq2Seq, Seq2SeqTask)
