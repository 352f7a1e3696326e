"""Preferences: the model learns to give the chosen answer to a prompt a higher probability than the rejected one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import config
from jaxlm.config import ModelConfig
from jaxlm.config.ranges import short_repr
from jaxlm.data.batches import Batch
from jaxlm.data.chat import conversations, rendering
from jaxlm.data.formats.lines import Place, Row
from jaxlm.data.formats.rows import Columns
from jaxlm.data.joined import Features
from jaxlm.errors import UserError
from jaxlm.hub.pooling import Pooling
from jaxlm.nn import parameters
from jaxlm.nn.losses import Losses, Sum
from jaxlm.nn.low_rank import without_updates
from jaxlm.nn.preferences import OBJECTIVES, PairLosses, Pairs
from jaxlm.nn.transformer import Transformer, init
from jaxlm.reports.report import Section
from jaxlm.tasks.cells import Record, Records, column, listed
from jaxlm.tasks.generation import table_of_texts
from jaxlm.tasks.records import Outputs, RecordTask
from jaxlm.tasks.states import hidden_states, token_scores
from jaxlm.tasks.task import register

Messages = list[dict[str, Any]]
_TURN = re.compile(r"\n\n(Human|Assistant): ?")  # of the transcripts of Bai et al. 2022
_ROLES = {"Human": "user", "Assistant": "assistant"}


class PreferenceTask(RecordTask):
    """`config.Preference`, for a decoder.

    A unit has the chosen and the rejected conversation, which share a row; the first has the weight of the pair.
    """

    head = "lm"
    scores = ("accuracy", "reward_margin")
    fields: Mapping[str, type] = {"labels_BT": np.int32, "weights_BT": np.float32, "weights_BE": np.float32}
    remedies: Mapping[str, tuple[str, str]] = {
        "T": ("conversations", "raise --data.length, which includes both answers of a pair: each lost its beginning")
    }
    task: config.Preference

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self._template = self.task.template or None
        self.has_reference = self.task.has_reference

    @classmethod
    def columns(cls, task: config.Preference, labelled: bool) -> Columns | None:
        return None  # the prompt may be in a column or in both answers

    @classmethod
    def read(cls, task: config.Preference, row: Row, place: Place) -> Record | None:
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
    def group(cls, task: config.Preference, record: Record) -> Any:
        """Returns the prompt, so that its pairs are either all held out or none of them."""
        return str(record["prompt"])

    def bind(self, model: ModelConfig, pooling: Pooling | None = None, part: Any = None) -> Self:
        self.task.check_model_structure(model)
        return super().bind(model, pooling, part)

    def features(self, records: Sequence[Record], training: bool) -> Iterator[list[list[Features]]]:
        """As in the base class; a conversation that is longer than half a row loses its beginning."""
        chats = [
            [*record["prompt"], {"role": "assistant", "content": record[side]}]
            for record in records
            for side in ("chosen", "rejected")
        ]
        encoded = rendering.encode_all(self.tokenizer, chats, template=self._template, only_last=True)
        for _ in records:
            yield [[self._example(*next(encoded), first) for first in (True, False)]]

    def _example(self, ids: Sequence[int], by_assistant: Sequence[bool], first: bool) -> Features:
        tokens, mask = (np.array(values[-(self.length // 2) - 1 :]) for values in (ids, by_assistant))
        return {
            "tokens_BT": tokens[:-1].astype(np.int32),
            "labels_BT": tokens[1:].astype(np.int32),
            "weights_BT": mask[1:].astype(np.float32),
            "weights_BE": np.float32(first),
            "cut": len(ids) - len(tokens),
        }

    def more_params(self, module: Transformer, key: jax.Array) -> dict[str, Any]:
        """Returns the reference, unless the model without its adapter is the reference."""
        return {parameters.TEACHER: init(module, key)} if self.teacher is not None else {}

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        return {"loss": batch["weights_BE"].sum()}

    def losses(self, module: Transformer, params: Any, batch: Batch, key: jax.Array | None) -> Losses:
        """Returns the loss of the pairs, and in evaluation the rewards of the answers."""
        own = parameters.of_model(params)
        policy_BE, auxiliary = self._log_probs(module, own, batch, key)
        reference = self._reference(params) if self.has_reference else None
        reference_BE = None if reference is None else self._log_probs(module, reference, batch, None)[0]
        lengths_BE = _sum_by_example(jnp.ones_like(batch["weights_BT"]), batch)
        reference_BP2 = None if reference_BE is None else _pairs(reference_BE)
        pairs = Pairs(_pairs(policy_BE), reference_BP2, _pairs(lengths_BE))
        smoothing = 0.0 if key is None else self.task.label_smoothing
        found: PairLosses = OBJECTIVES[self.task.objective](pairs, self.task.beta, self.task.margin, smoothing)
        weights_BP = _pairs(batch["weights_BE"])[..., 0]
        losses = {"loss": (jnp.where(weights_BP > 0, found.loss_P, 0).sum(), weights_BP.sum())} | auxiliary
        if key is not None:
            return losses, {}
        rewards_BE = found.rewards_P2.reshape(len(policy_BE), -1)
        odd = policy_BE.shape[1] - rewards_BE.shape[1]
        return losses, {"reward_BE": jnp.pad(rewards_BE, ((0, 0), (0, odd))), "log_prob_BE": policy_BE}

    @staticmethod
    def _log_probs(
        module: Transformer, params: Any, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Sum]]:
        """Returns the log-probabilities of the answers, [B, E], and the auxiliary losses."""
        x_BTD, auxiliary = hidden_states(module, params, batch, key)
        log_probs_BT, _ = token_scores(module, params, x_BTD, batch["labels_BT"])
        return _sum_by_example(log_probs_BT, batch), auxiliary

    @staticmethod
    def _reference(params: Any) -> Any:
        """Returns the parameters of the reference, without a gradient; None for a merged model, which has none."""
        reference = params.get(parameters.TEACHER)
        if reference is None:
            reference = without_updates(params)
            if len(jax.tree.leaves(reference)) == len(jax.tree.leaves(params)):
                return None
        return jax.lax.stop_gradient(reference)

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


def _sum_by_example(values_BT: jax.Array, batch: Batch) -> jax.Array:
    """Returns the sums of values over the tokens of the answer of each example, float32 [B, E]."""
    B, E = batch["weights_BE"].shape
    rows_B1 = jnp.arange(B)[:, None]
    sums = jnp.zeros((B, E + 1), jnp.float32).at[rows_B1, batch["segments_BT"]].add(values_BT * batch["weights_BT"])
    return sums[:, 1:]


def _pairs(values_BE: jax.Array) -> jax.Array:
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


register(config.Preference, PreferenceTask)
