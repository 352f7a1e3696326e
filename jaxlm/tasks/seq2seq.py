"""A text for a text: translations, summaries, answers.  An encoder-decoder reads the source in its encoder; a decoder
reads it before the target, and what it reads is not learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm import config
from jaxlm.config.ranges import shown
from jaxlm.data.batches import Features
from jaxlm.data.formats.lines import Place, Row
from jaxlm.data.formats.rows import Columns
from jaxlm.errors import UserError
from jaxlm.reports.report import Section
from jaxlm.tasks import metrics
from jaxlm.tasks.cells import Record, Records, cell, column
from jaxlm.tasks.generation import UNREAD, GenerationTask, table_of_texts
from jaxlm.tasks.records import add_special_tokens, stand_in
from jaxlm.tasks.task import register

_SCORE: dict[str, tuple[tuple[str, ...], Callable[..., dict[str, float]]]] = {
    "translation": (("bleu", "chrf"), metrics.translation),
    "summary": (("rouge1", "rouge2", "rougeL", "rougeLsum"), metrics.summaries),
    "answer": (("exact", "f1"), metrics.answers),
}


class Seq2SeqTask(GenerationTask):
    """`config.Seq2Seq`, by the head "lm"."""

    cut: Mapping[str, tuple[str, str]] = {
        "T": ("targets", "raise --data.length"),
        "S": ("sources", "raise --task.source-length"),
        **UNREAD,
    }
    task: config.Seq2Seq

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self.scores = _SCORE[self.task.scored_as][0]
        self.decoding, self.scored = self.task.decoding, self.task.generated

    @classmethod
    def columns(cls, task: config.Seq2Seq, labelled: bool) -> Columns:
        target = (task.target,) if labelled else ()
        return Columns((task.source, *target), (*task.references, task.target))

    @classmethod
    def read(cls, task: config.Seq2Seq, row: Row, place: Place) -> Record | None:
        record: Record = {"source": _text(column(row, task.source, place, "--task.source"), place, task.source)}
        value = cell(row, task.target)
        if value is not None:
            several = [*value] if isinstance(value, (list, tuple, np.ndarray)) else [value]
            # A row may have fewer references, but a column that is not there is a mistake.
            references = (column(row, name, place, "--task.references") for name in task.references)
            several += [text for text in references if text]
            record["label"] = tuple(_text(text, place, task.target) for text in several)
        sides = {task.source: (record["source"],), task.target: record.get("label", ("-",))}
        for name, texts in sides.items():
            if not any(text.strip() for text in texts):
                if task.empty == "drop":
                    return None
                raise UserError(f"{place}: column {name!r} is empty; fix the row, or set --task.empty drop")
        return record

    @classmethod
    def labelled(cls, task: config.Seq2Seq, row: Row, record: Record, place: Place) -> None:
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
        """The tokens that are read for each record, and how many were cut."""
        texts = [self.task.prefix + record["source"] + self.task.suffix for record in records]
        if self.source_length is None:
            encoded = self.tokenizer.encode_batch(texts)
            return [(self.tokenizer.begun(ids) or [stand_in(self.tokenizer)], 0) for ids in encoded]
        # The end of a source is kept where it is cut: a model has never read one without.
        return [
            (made["tokens_BT"], made["cut"])
            for made in add_special_tokens(self.tokenizer, texts, None, self.source_length)
        ]

    def answers(self, records: Sequence[Record]) -> list[list[int]]:
        """The tokens that are to be written for each record."""
        return [ids for ids, _ in self._answers(records)]

    def _answers(self, records: Sequence[Record]) -> list[tuple[list[int], int]]:
        """The tokens that are to be written for each record, and how many were cut."""
        texts = [record["label"][0] if record.get("label") else "" for record in records]
        if self.source_length is None:
            room = self.length - 1
            each = self.tokenizer.target.encode_batch(texts)
            return [([*ids[:room], self.end], max(0, len(ids) - room)) for ids in each]
        whole = [ids or [self.end] for ids, _ in self.tokenizer.target.frame(texts)]
        cut = self.tokenizer.target.frame(texts, max_length=self.length)
        return [(ids or [self.end], max(0, len(full) - len(ids))) for full, (ids, _) in zip(whole, cut)]

    def features(self, records: Sequence[Record], training: bool) -> Iterator[list[list[Features]]]:
        make = self._one_stack if self.source_length is None else self._two_stacks
        for (prompt, prompt_cut), (answer, answer_cut) in zip(self._prompts(records), self._answers(records)):
            if self.source_length is None:
                beyond = max(0, len(prompt) + min(len(answer), self.length) - self.length - 1)
                yield [[make(prompt, answer) | {"cut": beyond + answer_cut}]]
            else:
                yield [[make(prompt, answer) | {"cut": answer_cut, "source_cut": prompt_cut}]]

    def _two_stacks(self, source: list[int], target: list[int]) -> Features:
        """The source for the encoder; for the decoder the target, moved right behind the start token."""
        target = target[: self.length]
        first = target[-1] if self.start is None else self.start
        return {
            "source_tokens_BS": np.array(source[: self.source_length], np.int32),
            "tokens_BT": np.array([first, *target[:-1]], np.int32),
            "labels_BT": np.array(target, np.int32),
            "weights_BT": np.ones(len(target), np.float32),
        }

    def _one_stack(self, prompt: list[int], answer: list[int]) -> Features:
        """The prompt and the answer in one text, of which the answer is learned; the prompt loses its beginning where
        both are too long together."""
        answer = answer[: self.length]
        prompt = prompt[-(self.length + 1 - len(answer)) :]
        tokens = np.array([*prompt, *answer], np.int32)
        learned = np.arange(1, len(tokens)) >= len(prompt)
        made = {"tokens_BT": tokens[:-1], "labels_BT": tokens[1:], "weights_BT": learned.astype(np.float32)}
        if "prefix_BT" in self.fields:
            made["prefix_BT"] = (np.arange(len(tokens) - 1) < len(prompt)).astype(np.int32)
        return made

    def score(self, records: Sequence[Record], predictions: Sequence[Row]) -> dict[str, float]:
        texts = [prediction["prediction"] for prediction in predictions]
        return _SCORE[self.task.scored_as][1]([record["label"] for record in records], texts)

    @classmethod
    def beside(cls, task: config.Seq2Seq, records: Sequence[Record]) -> list[str]:
        """sacreBLEU's signatures of a translation's scores."""
        if task.scored_as != "translation" or not records:
            return []
        said = metrics.translation_signatures([record["label"] for record in records])
        return [f"{name}: {signature}" for name, signature in said.items()]

    def sections(self, part: Records, predictions: Sequence[Row]) -> list[Section]:
        both = list(zip(part.records, predictions))
        rows = ([record["source"], " | ".join(record["label"]), told["prediction"]] for record, told in both)
        note = "; ".join(["The first of the held-out part", *self.beside(self.task, [record for record, _ in both])])
        return [table_of_texts("Generated texts", ("source", "reference", "generated"), rows, f"{note}.")]


def _text(value: Any, place: Place, name: str) -> str:
    """The text in a cell; of a list of sentences, these joined."""
    if isinstance(value, (list, tuple, np.ndarray)) and all(isinstance(part, str) for part in value):
        return " ".join(value)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{place}: column {name!r} holds {type(value).__name__} {shown(value)}, not text")
    return value or ""


register(config.Seq2Seq, Seq2SeqTask)
