"""Pairs of a chosen and a rejected answer to the same prompt, which tasks compare."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import jax
import numpy as np

from jaxlm.config.ranges import short_repr
from jaxlm.config.record_tasks import AnswerPairs
from jaxlm.data.chat import conversations, rendering
from jaxlm.data.formats.lines import Place, Row
from jaxlm.data.formats.rows import Columns
from jaxlm.data.joined import Features
from jaxlm.errors import UserError
from jaxlm.reports.report import Section
from jaxlm.tasks.cells import Record, Records, column, listed
from jaxlm.tasks.generation import table_of_texts
from jaxlm.tasks.records import Outputs, RecordTask

Messages = list[dict[str, Any]]
_TURN = re.compile(r"\n\n(Human|Assistant): ?")  # of the transcripts of Bai et al. 2022
_ROLES = {"Human": "user", "Assistant": "assistant"}


class AnswerPairTask(RecordTask):
    """Base of tasks over pairs of answers, whose outputs have a reward for each answer.

    A unit has the chosen and the rejected conversation, which share a row; the first has the weight of the pair.
    """

    scores = ("accuracy", "reward_margin")
    remedies: Mapping[str, tuple[str, str]] = {
        "T": ("conversations", "raise --data.length, which includes both answers of a pair: each lost its beginning")
    }
    task: AnswerPairs

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self._template = self.task.template or None

    @classmethod
    def columns(cls, task: AnswerPairs, labelled: bool) -> Columns | None:
        return None  # the prompt may be in a column or in both answers

    @classmethod
    def read(cls, task: AnswerPairs, row: Row, place: Place) -> Record | None:
        sides = [_conversation(row, getattr(task, name), place, f"--task.{name}") for name in ("chosen", "rejected")]
        prompt = _conversation(row, task.prompt, place, "--task.prompt") if task.prompt in row else []
        if prompt and prompt[-1]["role"] == "assistant":
            raise UserError(f"{place}: column {task.prompt!r} ends with an answer; it must end with a question")
        if not prompt:
            before = zip(*(side[:-1] for side in sides))
            shared = sum(1 for _ in takewhile(lambda messages: messages[0] == messages[1], before))
            prompt, sides = sides[0][:shared], [side[shared:] for side in sides]
        answers = [_answer(side, prompt, place, name) for side, name in zip(sides, (task.chosen, task.rejected))]
        if not all(answer.strip() for answer in answers) or answers[0] == answers[1]:
            if task.equal == "drop":
                return None
            what = "are equal" if answers[0] == answers[1] else "have one without text"
            raise UserError(
                f"{place}: the answers in columns {task.chosen!r} and {task.rejected!r} {what}; correct the row, or "
                f"leave such rows out with --task.equal drop"
            )
        if not prompt:
            raise UserError(
                f"{place}: the row has no prompt; name its column with --task.prompt, or give whole conversations as "
                f"answers"
            )
        if task.system:
            prompt = [{"role": "system", "content": task.system}, *prompt]
        return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1], "label": "chosen"}

    @classmethod
    def texts(cls, record: Record) -> Iterable[str]:
        prompt = (conversations.text_of(message.get("content")) for message in record["prompt"])
        return [text for text in (*prompt, record["chosen"], record["rejected"]) if text]

    @classmethod
    def group(cls, task: AnswerPairs, record: Record) -> Any:
        """Returns the prompt, so that its pairs are either all held out or none of them."""
        return str(record["prompt"])

    def features(self, records: Sequence[Record], training: bool) -> Iterator[list[list[Features]]]:
        """As in the base class; a conversation that is longer than half a row loses its beginning."""
        chats = [
            [*record["prompt"], {"role": "assistant", "content": record[side]}]
            for record in records
            for side in ("chosen", "rejected")
        ]
        encoded = rendering.encode_all(self.tokenizer, chats, template=self._template, only_last=True)
        for _ in records:
            pair = [self.conversation(*next(encoded)) for _ in ("chosen", "rejected")]
            yield [[features | {"weights_BE": np.float32(n == 0)} for n, features in enumerate(pair)]]

    def conversation(self, ids: Sequence[int], by_assistant: Sequence[bool]) -> Features:
        """Returns the features of a conversation, of at most half the length of a row.

        Args:
          ids: its tokens.
          by_assistant: which of them are in the answer.
        """
        tokens = np.array(ids[-(self.length // 2) :], np.int32)
        return {"tokens_BT": tokens, "cut": len(ids) - len(tokens)}

    def weights(self, batch: Any) -> dict[str, jax.Array]:
        return {"loss": batch["weights_BE"].sum()}

    def predict(self, record: Record, outputs: Outputs) -> Row:
        """Returns the answer with the larger reward, and both rewards."""
        chosen, rejected = (float(arrays["reward_BE"]) for arrays in outputs[0])
        names = {"chosen_reward": chosen, "rejected_reward": rejected}
        return {"prediction": "chosen" if chosen > rejected else "rejected", **names}

    def score(self, records: Sequence[Record], predictions: Sequence[Row]) -> dict[str, float]:
        margins = [row["chosen_reward"] - row["rejected_reward"] for row in predictions]
        wins = [0.5 * (margin > 0) + 0.5 * (margin >= 0) for margin in margins]  # a tie is half a win
        mean = lambda values: float(np.mean(values)) if values else 0.0
        return {"accuracy": mean(wins), "reward_margin": mean(margins)}

    def sections(self, part: Records, predictions: Sequence[Row]) -> list[Section]:
        question = lambda record: conversations.text_of(record["prompt"][-1].get("content"))
        rows = (
            [question(r), r["chosen"], r["rejected"], f"{p['chosen_reward'] - p['rejected_reward']:+.3f}"]
            for r, p in zip(part.records, predictions)
        )
        head = ("prompt", "chosen", "rejected", "margin")
        return [table_of_texts("Pairs", head, rows, "The first of the held-out part.")]


def pairs_of(values_BE: jax.Array) -> jax.Array:
    """Returns the values of the pairs of a row, [B, P, 2]; the two examples of a pair follow each other."""
    B, E = values_BE.shape
    return values_BE[:, : E - E % 2].reshape(B, -1, 2)


def _conversation(row: Row, name: str, place: Place, option: str) -> Messages:
    """Returns the messages in a column: a list of them, a transcript, or a text.

    A text is a message of the user in the column of the prompt, else one of the assistant.
    """
    value = listed(column(row, name, place, option), name, place)
    if isinstance(value, str):
        return _transcript(value) or [{"role": "user" if option == "--task.prompt" else "assistant", "content": value}]
    if not isinstance(value, (list, tuple, np.ndarray)) or not len(value):
        raise UserError(
            f'{place}: column {name!r} holds {short_repr(value)}, not a text or a list of {{"role": ..., "content": '
            f"...}}; correct it, or choose with {option}"
        )
    try:
        return conversations.check_messages(value)
    except UserError as error:
        raise UserError(f"{place}: in column {name!r}, {error}") from None


def _transcript(text: str) -> Messages:
    """Returns the messages of a text such as "\\n\\nHuman: ...\\n\\nAssistant: ..."; [] for another text."""
    if not _TURN.match(text):
        return []
    parts = _TURN.split(text)[1:]
    return [{"role": _ROLES[who], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2])]


def _answer(messages: Messages, prompt: Messages, place: Place, name: str) -> str:
    """Returns the text of the only message after the prompt."""
    if len(messages) > 1 and messages[:-1] == prompt:  # the column has the whole conversation
        messages = messages[-1:]
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"{place}: column {name!r} has the messages {roles} after the prompt; give one answer of the assistant"
        )
    return conversations.text_of(messages[0].get("content"))
