"""Extractive question answering: the span of a text that answers a question, or no answer."""

from __future__ import annotations

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
from jaxlm.data.formats.lines import Place, Row
from jaxlm.data.formats.rows import Columns
from jaxlm.data.joined import Features
from jaxlm.errors import UserError
from jaxlm.lm import LM
from jaxlm.nn.losses import Sum
from jaxlm.reports.report import Section, mistakes
from jaxlm.tasks import metrics
from jaxlm.tasks.cells import Record, Records, listed, text_of
from jaxlm.tasks.records import HeadTask, Outputs, RecordExamples, Truncation, placeholder_token
from jaxlm.tasks.states import HeadLogits
from jaxlm.tasks.task import register

_TOP = 20  # most likely starts and ends of a window that are combined
_NO_SPAN = float(np.finfo(np.float32).min)  # margin of a text without any span, below every threshold


class QuestionAnsweringTask(HeadTask):
    """`config.QuestionAnswering`, with the head "span".

    A text that is too long for a row is split into overlapping windows; each is an example `question, window`.  The
    label of a window without the answer is its first token, which means "no answer" (Devlin et al. 2019, section 4.3).
    """

    head = "span"
    scores: tuple[str, ...] = ("f1", "exact")
    # labels_BEN: first and last token of the answer, counted from the first token of the example.
    fields: Mapping[str, Any] = {"labels_BEN": np.int32}
    remedies: Mapping[str, tuple[str, str]] = {"T": ("questions", "raise --task.max-question-tokens")}
    predict_fields = ("offsets_BT",)  # characters [start, end) of the text; -1 for the question and special tokens
    task: config.QuestionAnswering

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self.max_examples = max(2, self.length // 16)
        if self.task.unanswerable:
            # F1 would select a checkpoint that answers no question yet.
            self.scores = ("best_f1", "f1", "exact")

    @classmethod
    def columns(cls, task: config.QuestionAnswering, labelled: bool) -> Columns:
        needed = ("context", "question", *(("answers",) if labelled else ()))
        return Columns(needed, ("id", "title", "is_impossible", "answers"))

    @classmethod
    def read(cls, task: config.QuestionAnswering, row: Row, place: Place) -> Record | None:
        record: Record = {name: text_of(row, name, place, "--data.format squad") for name in ("context", "question")}
        record["title"] = row.get("title") or ""
        if not isinstance(record["title"], str):
            raise UserError(f"{place}: column 'title' holds {short_repr(row['title'])}, not text; correct the row")
        value = row.get("answers")
        if value is None:
            return record
        answers = [] if row.get("is_impossible") else _answers(value, place)
        for text, start in answers:
            actual = record["context"][start : start + len(text)] if start >= 0 else ""
            if actual != text or not text.strip():
                if task.wrong_offsets == "drop":
                    return None
                problem = f"is not at character {short_repr(start)} of its text, which has {actual!r} there"
                problem = problem if text.strip() else "is empty"
                raise UserError(
                    f"{place}: the answer {text!r} {problem}; fix it, or leave such questions out with "
                    f"--task.wrong-offsets drop"
                )
        if not answers and not task.unanswerable:
            raise UserError(f"{place}: the question has no answer; allow that with --task.unanswerable")
        return record | {"label": answers}

    @classmethod
    def require_label(cls, task: config.QuestionAnswering, row: Row, record: Record, place: Place) -> None:
        if "label" not in record:
            raise UserError(
                f"{place}: the question has no 'answers', the row holds {', '.join(map(repr, row))}; give them, with "
                f"empty lists where there is no answer"
            )

    @classmethod
    def names(cls, task: config.QuestionAnswering, part: Records) -> tuple[str, ...]:
        return ModelConfig().labels  # the names in transformers

    def configure(self, model: ModelConfig) -> ModelConfig:
        """As in the base class; the question ends at the separator of the tokenizer, if it has global attention."""
        model, separator = super().configure(model), getattr(self.tokenizer, "sep", None)
        return model if separator is None or not model.global_attention else replace(model, separator_token=separator)

    @classmethod
    def texts(cls, record: Record) -> Iterable[str]:
        return [record["question"], record["context"]]

    @classmethod
    def group(cls, task: config.QuestionAnswering, record: Record) -> str:
        return record["title"]

    def describe_labels(self, part: Records) -> str:
        answered = sum(bool(record["label"]) for record in part.records)
        return f"{answered:,} questions with an answer, {len(part.records) - answered:,} without"

    def features(self, records: Sequence[Record], training: bool) -> Iterator[list[list[Features]]]:
        room, limit = self.tokenizer.max_text_tokens(self.length, pair=True), self.task.max_question_tokens
        questions = self.tokenizer.encode_batch([record["question"] for record in records])
        contexts = self.tokenizer.encode_offsets([record["context"] for record in records])
        for record, question, (context, offsets) in zip(records, questions, contexts):
            lost = max(0, len(question) - limit)
            question = question[:limit]
            width = room - len(question)
            if width <= self.task.stride:
                raise UserError(
                    f"data.length {self.length} leaves {max(0, width)} tokens of text after a question of "
                    f"{len(question)}, and windows overlap by task.stride {self.task.stride}; raise the length, or "
                    f"lower task.stride or task.max_question_tokens"
                )
            spans = np.array(offsets, np.int32).reshape(-1, 2)
            answers = record.get("label")
            answer = _answer_tokens(answers[0], spans) if answers else None
            units = []
            for start in range(0, max(1, len(context) - self.task.stride), width - self.task.stride):
                tokens, types, [_, at] = self.tokenizer.add_special_tokens(question, context[start : start + width])
                if not tokens:
                    tokens, types = [placeholder_token(self.tokenizer)], [0]
                window = spans[start : start + width]
                offsets_T2 = np.full((len(tokens), 2), -1, np.int32)
                offsets_T2[at : at + len(window)] = window
                labels = np.zeros(2, np.int32)
                if answer is not None and start <= answer[0] and answer[1] < start + width:
                    labels = answer + np.int32(at - start)
                features: Features = {
                    "tokens_BT": np.array(tokens, np.int32),
                    "types_BT": np.array(types, np.int32),
                    "labels_BEN": labels,
                    "offsets_BT": offsets_T2,
                    "cut": lost,
                }
                units.append([features])
            yield units

    def loss(self, logits: jax.Array, batch: Batch, training: bool) -> Sum:
        """Returns the mean of two cross-entropies, of the start and of the end, over the tokens of the example."""
        own_BET = _own_tokens(batch)
        label_BEN = batch["starts_BE"][..., None] + batch["labels_BEN"]
        losses = []
        for n in range(2):
            logits_B1T = logits[:, None, :, n].astype(jnp.float32)
            normaliser_BE = jax.nn.logsumexp(jnp.where(own_BET, logits_B1T, -1e30), axis=-1)
            is_label_BET = jnp.arange(logits.shape[1]) == label_BEN[..., n, None]
            losses.append(normaliser_BE - jnp.where(is_label_BET, logits_B1T, 0).sum(-1))
        # Empty slots of a row have no tokens to normalise over.
        loss_BE = jnp.where(batch["weights_BE"] > 0, (losses[0] + losses[1]) / 2, 0)
        return (loss_BE * batch["weights_BE"]).sum(), batch["weights_BE"].sum()

    def compared(self, logits: jax.Array, batch: Batch) -> HeadLogits:
        """Returns the logits [2, B, E, T] of start and end over the tokens of an example, with half the weight each."""
        logits_2B1T = jnp.moveaxis(logits, -1, 0)[:, :, None]
        logits_2BET = jnp.where(_own_tokens(batch), logits_2B1T, -1e30)
        return HeadLogits(logits_2BET, jnp.broadcast_to(batch["weights_BE"] / 2, logits_2BET.shape[:3]))

    def outputs(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        return {"start_BT": logits[..., 0], "end_BT": logits[..., 1]}

    def truncation(
        self, examples: RecordExamples, lm: LM | None = None, records: Sequence[Record] = ()
    ) -> dict[str, Truncation]:
        """As in the base class; texts are split into windows, so only questions are truncated."""
        limit = self.task.max_question_tokens
        return {"T": examples.truncation("T")._replace(limit=limit, longest=examples.max_cut + limit)}

    def predict(self, record: Record, outputs: Outputs) -> Row:
        """Returns the best span of all windows, or "" if no answer is allowed and has a higher score.

        The score of no answer is the lowest score, over the windows, of the first token as both start and end.
        """
        no_answer = min(float(arrays["start_BT"][0] + arrays["end_BT"][0]) for [arrays] in outputs)
        spans = sorted((span for [arrays] in outputs for span in self._spans(arrays)), key=lambda span: -span[0])[:_TOP]
        scores = np.array([score for score, _, _ in spans] + [no_answer] * self.task.unanswerable)
        if not spans:
            offsets = {"start": None, "end": None}
            return {"prediction": "", "confidence": 1.0, **offsets, "_answer": "", "_margin": _NO_SPAN}
        score, start, end = spans[0]
        answer = record["context"][start:end]
        p = np.exp(scores - scores.max())
        has_answer = score > no_answer or not self.task.unanswerable
        confidence = p[0 if has_answer else -1] / p.sum()
        return {
            "prediction": answer if has_answer else "",
            "confidence": float(confidence),
            "start": start if has_answer else None,
            "end": end if has_answer else None,
            "_answer": answer,
            "_margin": score - no_answer,
        }

    def _spans(self, arrays: dict[str, np.ndarray]) -> Iterator[tuple[float, int, int]]:
        """Yields (score, first character, last character + 1) of the most likely spans of a window."""
        start_T, end_T, offsets_T2 = arrays["start_BT"], arrays["end_BT"], arrays["offsets_BT"]
        ends = np.argsort(-end_T, kind="stable")[:_TOP]
        for s in np.argsort(-start_T, kind="stable")[:_TOP]:
            for e in ends:
                if s <= e < s + self.task.max_answer_tokens and offsets_T2[s, 0] >= 0 and offsets_T2[e, 0] >= 0:
                    yield float(start_T[s] + end_T[e]), int(offsets_T2[s, 0]), int(offsets_T2[e, 1])

    def score(self, records: Sequence[Record], predictions: Sequence[Row]) -> dict[str, float]:
        """Returns exact match and F1 as in SQuAD's script, and its `best_f1`, the F1 at the best threshold."""
        answers = [[text for text, _ in record["label"]] for record in records]
        scores = metrics.squad_scores(answers, [prediction["prediction"] for prediction in predictions])
        if self.task.unanswerable or "no_answer_exact" in scores:
            # Any answer to an unanswerable question is wrong, even one that normalisation would leave empty.
            f1 = lambda texts, answer: metrics.exact_f1(texts, answer)[1] if texts else float(not answer)
            f1_answered = [f1(texts, prediction["_answer"]) for texts, prediction in zip(answers, predictions)]
            f1_silent = [float(not texts) for texts in answers]
            margins = [prediction["_margin"] for prediction in predictions]
            scores["best_f1"] = metrics.best_threshold(margins, f1_answered, f1_silent)[1]
        return scores

    def sections(self, part: Records, predictions: Sequence[Row]) -> list[Section]:
        show = lambda text: text or "(no answer)"
        wrong = []
        for record, prediction in zip(part.records, predictions):
            texts, answer = [text for text, _ in record["label"]], prediction["prediction"]
            if not metrics.exact_f1(texts, answer)[1]:
                wrong.append((prediction["confidence"], [record["question"], show(" / ".join(texts)), show(answer)]))
        what = "held-out questions have a predicted answer that shares no word with the true one"
        return [mistakes(("question", "true", "predicted"), wrong, len(part.records), what)]


def _own_tokens(batch: Batch) -> jax.Array:
    """Returns whether each token of a row belongs to each example, [B, E, T]."""
    return batch["segments_BT"][:, None] == jnp.arange(1, batch["weights_BE"].shape[1] + 1)[:, None]


def _answers(value: Any, place: Place) -> list[tuple[str, int]]:
    """Returns (text, first character) of each answer of a row."""
    value = listed(value, "answers", place)
    texts, starts = (value.get(name) if isinstance(value, dict) else None for name in ("text", "answer_start"))
    texts, starts = (x.tolist() if isinstance(x, np.ndarray) else x for x in (texts, starts))
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise UserError(
            f"{place}: 'answers' is {short_repr(value)}; it must hold 'text' and 'answer_start', two lists of the "
            f"same length"
        )
    for text, start in zip(texts, starts):
        if not isinstance(text, str) or not isinstance(start, (int, np.integer)) or isinstance(start, bool):
            raise UserError(
                f"{place}: an answer is {short_repr(text)} at {short_repr(start)}; give its text, and its first "
                f"character as an integer"
            )
    return list(zip(texts, map(int, starts)))


def _answer_tokens(answer: tuple[str, int], spans: np.ndarray) -> np.ndarray | None:
    """Returns the first and last token of an answer, or None if no token overlaps it.

    Args:
      answer: its text and first character.
      spans: the characters [start, end) of each token of the text.  The first and last character of the answer need not
        be in a token, because answers in SQuAD may start or end with a space.
    """
    text, start = answer
    tokens = np.flatnonzero((spans[:, 0] < start + len(text)) & (spans[:, 1] > start))
    return tokens[[0, -1]].astype(np.int32) if len(tokens) else None


register(config.QuestionAnswering, QuestionAnsweringTask)
