"""Conversations, rendered by a chat template, with a loss on the messages of the assistant."""

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
from jaxlm.config.ranges import short_repr
from jaxlm.data.chat import conversations, rendering
from jaxlm.data.formats.lines import Place, Row
from jaxlm.data.joined import Features
from jaxlm.errors import UserError
from jaxlm.hub.pooling import Pooling
from jaxlm.lm import LM
from jaxlm.reports.report import Section
from jaxlm.tasks import metrics
from jaxlm.tasks.cells import Record, Records, column, listed, text_of
from jaxlm.tasks.generation import PROMPT_REMEDY, GenerationTask, table_of_texts
from jaxlm.tasks.task import Task, register

_OTHER_NAMES = ("conversations", "conversation")  # of the column of messages, in the format of ShareGPT


class ChatTask(GenerationTask):
    """`config.Chat`, for a decoder."""

    scores = ("exact", "f1")
    remedies: Mapping[str, tuple[str, str]] = {
        "T": ("conversations", "raise --data.length: each lost its beginning"),
        **PROMPT_REMEDY,
    }
    task: config.Chat

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self.decoding, self.max_scored = self.task.decoding, self.task.generated
        self._template = self.task.template or None

    def bind(self, model: ModelConfig, pooling: Pooling | None = None, part: Any = None) -> Self:
        if model.structure != "decoder":
            raise UserError(
                f"Chat needs a decoder, the model is a(n) {model.structure}: use another model, or the task Seq2Seq"
            )
        return super().bind(model, pooling, part)

    @classmethod
    def read(cls, task: config.Chat, row: Row, place: Place) -> Record:
        if task.question:
            messages = [{"role": "user", "content": text_of(row, task.question, place, "--task.question")}]
            if row.get(task.answer) is not None:
                messages.append({"role": "assistant", "content": text_of(row, task.answer, place, "--task.answer")})
            messages = _check_messages(messages, place, task.question)
        else:
            messages = _conversation(task, row, place)
        if task.system:
            messages = [{"role": "system", "content": task.system}, *messages]
        record: Record = {"messages": messages}
        if messages[-1]["role"] == "assistant":
            record["label"] = conversations.text_of(messages[-1].get("content"))
        return record

    @classmethod
    def require_label(cls, task: config.Chat, row: Row, record: Record, place: Place) -> None:
        if "label" not in record:
            problem = f"column {task.answer!r} is empty" if task.question else "the last message is not the assistant's"
            raise UserError(f"{place}: {problem}; give an answer to learn, or leave the row out")

    @classmethod
    def texts(cls, record: Record) -> Iterable[str]:
        contents = (message.get(name) for message in record["messages"] for name in ("reasoning_content", "content"))
        return [text for text in map(conversations.text_of, contents) if text]

    @cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end an answer: those of the template, and the end-of-text token of the tokenizer."""
        example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids, mask = rendering.encode(self.tokenizer, example, template=self._template)
        last = [token for token, by_assistant in zip(ids, mask) if by_assistant][-1:]
        special = {i for i, token in self.tokenizer.backend.get_added_tokens_decoder().items() if token.special}
        ends = {token for token in last if token in special}
        return tuple(sorted(ends | ({self.tokenizer.eos} if self.tokenizer.eos is not None else set())))

    def prompts(self, records: Sequence[Record]) -> list[list[int]]:
        prompt = lambda record: record["messages"][:-1] if "label" in record else record["messages"]
        return list(rendering.prompts(self.tokenizer, map(prompt, records), template=self._template))

    def features(self, records: Sequence[Record], training: bool) -> Iterator[list[list[Features]]]:
        """As in the base class; a conversation that is longer than a row loses its beginning."""
        options: dict[str, Any] = {"template": self._template, "only_last": self.task.last_answer_only}
        messages = (record["messages"] for record in records)
        for ids, by_assistant in rendering.encode_all(self.tokenizer, messages, **options):
            tokens, mask = (np.array(values[-self.length - 1 :]) for values in (ids, by_assistant))
            features: Features = {
                "tokens_BT": tokens[:-1].astype(np.int32),
                "labels_BT": tokens[1:].astype(np.int32),
                "weights_BT": mask[1:].astype(np.float32),
                "cut": len(ids) - len(tokens),
            }
            yield [[features]]

    def score(self, records: Sequence[Record], predictions: Sequence[Row]) -> dict[str, float]:
        answers = [self._compared(record["label"]) for record in records]
        return metrics.answer_scores(answers, [self._compared(prediction["prediction"]) for prediction in predictions])

    def _compared(self, answer: str) -> str:
        """Returns the part of an answer that is scored: the last match of the pattern, or of its first group."""
        if not self.task.compared:
            return answer
        matches = re.findall(self.task.compared, answer)
        last = matches[-1] if matches else ""
        return last if isinstance(last, str) else last[0]

    def exports(self, lm: LM) -> dict[str, tuple[Task, LM]]:
        """As in the base class, with the chat template of the task."""
        if self._template and lm.tokenizer is not None:
            tokenizer = copy.copy(lm.tokenizer)
            tokenizer.files = {**tokenizer.files, "chat_template.jinja": self._template.encode()}
            lm = replace(lm, tokenizer=tokenizer)
        return super().exports(lm)

    def sections(self, part: Records, predictions: Sequence[Row]) -> list[Section]:
        before_answer = lambda record: record["messages"][-2:-1] or [{}]
        question = lambda record: conversations.text_of(before_answer(record)[0].get("content"))
        rows = ([question(r), r["label"], p["prediction"]] for r, p in zip(part.records, predictions))
        head = ("question", "reference", "generated")
        return [table_of_texts("Answers", head, rows, "The first of the held-out part.")]


def _conversation(task: config.Chat, row: Row, place: Place) -> list[dict[str, Any]]:
    """Returns the messages of a row, from the column of the task or from a column in the format of ShareGPT."""
    name = task.messages
    if name == config.Chat.messages and name not in row:
        name = next((other for other in _OTHER_NAMES if other in row), name)
    value = listed(column(row, name, place, "--task.messages"), name, place)
    if not isinstance(value, (list, tuple, np.ndarray)) or not len(value):
        raise UserError(
            f'{place}: column {name!r} holds {short_repr(value)}, not a list of {{"role": ..., "content": ...}} or '
            f'{{"from": ..., "value": ...}}; correct it, or choose with --task.messages, or --task.question and '
            f"--task.answer"
        )
    messages = _check_messages(value, place, name)
    system = row.get("system")
    if name in _OTHER_NAMES and system and isinstance(system, str) and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _check_messages(messages: Any, place: Place, name: str) -> list[dict[str, Any]]:
    try:
        return conversations.check_messages(messages)
    except UserError as error:
        raise UserError(f"{place}: in column {name!r}, {error}") from None


register(config.Chat, ChatTask)
