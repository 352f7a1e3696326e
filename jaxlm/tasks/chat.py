"""Conversations: what the assistant says is learned, in the words of the tokenizer's chat template."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

import numpy as np

from jaxlm import config
from jaxlm.config import ModelConfig
from jaxlm.config.ranges import shown
from jaxlm.data.batches import Features
from jaxlm.data.chat import conversations, rendering
from jaxlm.data.formats.lines import Place, Row
from jaxlm.errors import UserError
from jaxlm.hub.pooling import Pooling
from jaxlm.lm import LM
from jaxlm.reports.report import Section
from jaxlm.tasks import metrics
from jaxlm.tasks.cells import Record, Records, column, listed, text_of
from jaxlm.tasks.generation import UNREAD, GenerationTask, table_of_texts
from jaxlm.tasks.task import Task, register

_OTHER_NAMES = ("conversations", "conversation")  # of the column of messages, in ShareGPT's form


class ChatTask(GenerationTask):
    """`config.Chat`, by a decoder."""

    scores = ("exact", "f1")
    cut: Mapping[str, tuple[str, str]] = {
        "T": ("conversations", "raise --data.length: each lost its beginning"),
        **UNREAD,
    }
    task: config.Chat

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self.decoding, self.scored = self.task.decoding, self.task.generated
        self._template = self.task.template or None

    def bound(self, model: ModelConfig, pooling: Pooling | None = None, part: Any = None) -> Self:
        if model.structure != "decoder":
            raise UserError(
                f"Chat needs a decoder, the model is a(n) {model.structure}: start from another, or take Seq2Seq"
            )
        return super().bound(model, pooling, part)

    @classmethod
    def read(cls, task: config.Chat, row: Row, place: Place) -> Record:
        if task.question:
            messages = [{"role": "user", "content": text_of(row, task.question, place, "--task.question")}]
            if row.get(task.answer) is not None:
                messages.append({"role": "assistant", "content": text_of(row, task.answer, place, "--task.answer")})
            messages = _checked(messages, place, task.question)
        else:
            messages = _conversation(task, row, place)
        if task.system:
            messages = [{"role": "system", "content": task.system}, *messages]
        record: Record = {"messages": messages}
        if messages[-1]["role"] == "assistant":
            record["label"] = conversations.text_of(messages[-1].get("content"))
        return record

    @classmethod
    def labelled(cls, task: config.Chat, row: Row, record: Record, place: Place) -> None:
        if "label" not in record:
            what = f"column {task.answer!r} is empty" if task.question else "the last message is not the assistant's"
            raise UserError(f"{place}: {what}; give an answer to learn, or leave the row out")

    @classmethod
    def texts(cls, record: Record) -> Iterable[str]:
        said = (message.get(name) for message in record["messages"] for name in ("reasoning_content", "content"))
        return [text for text in map(conversations.text_of, said) if text]

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """The tokens that end an answer: the template's own, and the tokenizer's end of a text."""
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids, said = rendering.encode(self.tokenizer, talk, template=self._template)
        last = [token for token, by_assistant in zip(ids, said) if by_assistant][-1:]
        special = {i for i, token in self.tokenizer.backend.get_added_tokens_decoder().items() if token.special}
        ends = {token for token in last if token in special}
        return tuple(sorted(ends | ({self.tokenizer.eos} if self.tokenizer.eos is not None else set())))

    def prompts(self, records: Sequence[Record]) -> list[list[int]]:
        before = lambda record: record["messages"][:-1] if "label" in record else record["messages"]
        return list(rendering.prompts(self.tokenizer, map(before, records), template=self._template))

    def features(self, records: Sequence[Record], training: bool) -> Iterator[list[list[Features]]]:
        """The end of each conversation, as much as a row holds."""
        how: dict[str, Any] = {"template": self._template, "only_last": self.task.last_alone}
        for ids, said in rendering.encode_all(self.tokenizer, (record["messages"] for record in records), **how):
            tokens, learned = (np.array(part[-self.length - 1 :]) for part in (ids, said))
            yield [
                [
                    {
                        "tokens_BT": tokens[:-1].astype(np.int32),
                        "labels_BT": tokens[1:].astype(np.int32),
                        "weights_BT": learned[1:].astype(np.float32),
                        "cut": len(ids) - len(tokens),
                    }
                ]
            ]

    def score(self, records: Sequence[Record], predictions: Sequence[Row]) -> dict[str, float]:
        told = [prediction["prediction"] for prediction in predictions]
        return metrics.answers([self._part(record["label"]) for record in records], [self._part(text) for text in told])

    def _part(self, answer: str) -> str:
        """What is compared of an answer: the last match of the pattern, or of its group."""
        if not self.task.compared:
            return answer
        found = re.findall(self.task.compared, answer)
        last = found[-1] if found else ""
        return last if isinstance(last, str) else last[0]

    def exports(self, lm: LM) -> dict[str, tuple[Task, LM]]:
        """With the template by which it learned to talk."""
        if self._template and lm.tokenizer is not None:
            tokenizer = copy.copy(lm.tokenizer)
            tokenizer.files = {**tokenizer.files, "chat_template.jinja": self._template.encode()}
            lm = replace(lm, tokenizer=tokenizer)
        return super().exports(lm)

    def sections(self, part: Records, predictions: Sequence[Row]) -> list[Section]:
        before = lambda record: record["messages"][-2:-1] or [{}]
        asked = lambda record: conversations.text_of(before(record)[0].get("content"))
        rows = ([asked(r), r["label"], told["prediction"]] for r, told in zip(part.records, predictions))
        return [table_of_texts("Answers", ("asked", "right", "generated"), rows, "The first of the held-out part.")]


def _conversation(task: config.Chat, row: Row, place: Place) -> list[dict[str, Any]]:
    """Returns the messages in a row: those in the column of the task, or where ShareGPT's form has them."""
    name = task.messages
    if name == config.Chat.messages and name not in row:
        name = next((other for other in _OTHER_NAMES if other in row), name)
    value = listed(column(row, name, place, "--task.messages"), name, place)
    if not isinstance(value, (list, tuple, np.ndarray)) or not len(value):
        raise UserError(
            f'{place}: column {name!r} holds {shown(value)}, not a list of {{"role": ..., "content": ...}} or '
            f'{{"from": ..., "value": ...}}; correct it, or choose with --task.messages, or --task.question and '
            f"--task.answer"
        )
    messages = _checked(value, place, name)
    system = row.get("system")
    if name in _OTHER_NAMES and system and isinstance(system, str) and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _checked(messages: Any, place: Place, name: str) -> list[dict[str, Any]]:
    try:
        return conversations.checked(messages)
    except UserError as error:
        raise UserError(f"{place}: in column {name!r}, {error}") from None


register(config.Chat, ChatTask)
