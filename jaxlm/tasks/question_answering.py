"""Where in a text the answer to a question stands, or that it has none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import config
from jaxlm.config import ModelConfig
from jaxlm.config.ranges import shown
from jaxlm.data.batches import Batch, Features
from jaxlm.data.formats.lines import Place, Row
from jaxlm.data.formats.rows import Columns
from jaxlm.errors import UserError
from jaxlm.lm import LM
from jaxlm.nn.losses import Sum
from jaxlm.reports.report import Section, mistakes
from jaxlm.tasks import metrics
from jaxlm.tasks.cells import Record, Records, listed, text_of
from jaxlm.tasks.records import HeadTask, Outputs, RecordExamples, Truncation, stand_in
from jaxlm.tasks.task import register

_BEST = 20  # starts and ends of a window that are combined
_NEVER = float(np.finfo(np.float32).min)  # margin of a text without any span: below every threshold


class QuestionAnsweringTask(HeadTask):
    """`config.QuestionAnswering`, by the head "span".

    A text too long for a row is read through several windows that overlap; each is an example `question, window`.  A
    window without the answer has it at its first token, which stands for "no answer" (Devlin et al. 2019, section 4.3).
    """

    head = "span"
    scores: tuple[str, ...] = ("f1", "exact")
    fields: Mapping[str, Any] = {
        "labels_BEN": np.int32
    }  # the answer's first and last token, counted from the example's first
    cut: Mapping[str, tuple[str, str]] = {"T": ("questions", "raise --task.most-question")}
    kept = ("offsets_BT",)  # characters [start, end) of the text; -1 for the question and special tokens
    task: config.QuestionAnswering

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self.max_examples = max(2, self.length // 16)
        if self.task.unanswerable:
            # By F1 alone a model that answers nothing yet may be the best of a run.
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
            raise UserError(f"{place}: column 'title' holds {shown(row['title'])}, not text; correct the row")
        given = row.get("answers")
        if given is None:
            return record
        answers = [] if row.get("is_impossible") else _answers(given, place)
        for text, start in answers:
            found = record["context"][start : start + len(text)] if start >= 0 else ""
            if found != text or not text.strip():
                if task.wrong_offsets == "drop":
                    return None
                stands = f"does not stand at {shown(start)} of its text, where there is {found!r}"
                stands = stands if text.strip() else "is empty"
                raise UserError(
                    f"{place}: the answer {text!r} {stands}; fix it, or leave such questions out with "
                    f"--task.wrong-offsets drop"
                )
        if not answers and not task.unanswerable:
            raise UserError(f"{place}: the question has no answer; allow that with --task.unanswerable")
        return record | {"label": answers}

    @classmethod
    def labelled(cls, task: config.QuestionAnswering, row: Row, record: Record, place: Place) -> None:
        if "label" not in record:
            raise UserError(
                f"{place}: the question has no 'answers', the row holds {', '.join(map(repr, row))}; give them, with "
                f"empty lists where there is no answer"
            )

    @classmethod
    def names(cls, task: config.QuestionAnswering, part: Records) -> tuple[str, ...]:
        return ModelConfig().labels  # as transformers names them

    @classmethod
    def texts(cls, record: Record) -> Iterable[str]:
        return [record["question"], record["context"]]

    @classmethod
    def group(cls, task: config.QuestionAnswering, record: Record) -> str:
        return record["title"]

    def balance(self, part: Records) -> str:
        answered = sum(bool(record["label"]) for record in part.records)
        return f"{answered:,} questions with an answer, {len(part.records) - answered:,} without"

    def features(self, records: Sequence[Record], training: bool) -> Iterator[list[list[Features]]]:
        room, most = self.tokenizer.room(self.length, pair=True), self.task.most_question
        questions = self.tokenizer.encode_batch([record["question"] for record in records])
        contexts = self.tokenizer.encode_offsets([record["context"] for record in records])
        for record, question, (context, offsets) in zip(records, questions, contexts):
            lost = max(0, len(question) - most)
            question = question[:most]
            width = room - len(question)
            if width <= self.task.stride:
                raise UserError(
                    f"data.length {self.length} leaves {max(0, width)} tokens of text beside a question of "
                    f"{len(question)}, and windows have task.stride {self.task.stride} in common; raise the length, or "
                    f"lower task.stride or task.most_question"
                )
            spans = np.array(offsets, np.int32).reshape(-1, 2)
            answers = record.get("label")
            answer = _tokens_of(answers[0], spans) if answers else None
            units = []
            for start in range(0, max(1, len(context) - self.task.stride), width - self.task.stride):
                tokens, types, [_, at] = self.tokenizer.wrap(question, context[start : start + width])
                if not tokens:
                    tokens, types = [stand_in(self.tokenizer)], [0]
                window = spans[start : start + width]
                offsets_T2 = np.full((len(tokens), 2), -1, np.int32)
                offsets_T2[at : at + len(window)] = window
                labels = np.zeros(2, np.int32)
                if answer is not None and start <= answer[0] and answer[1] < start + width:
                    labels = answer + np.int32(at - start)
                units.append(
                    [
                        {
                            "tokens_BT": np.array(tokens, np.int32),
                            "types_BT": np.array(types, np.int32),
                            "labels_BEN": labels,
                            "offsets_BT": offsets_T2,
                            "cut": lost,
                        }
                    ]
                )
            yield units

    def loss(self, logits: jax.Array, batch: Batch, training: bool) -> Sum:
        """Cross-entropy of the start and of the end over the example's own tokens, their mean."""
        own_BET = batch["segments_BT"][:, None] == jnp.arange(1, batch["weights_BE"].shape[1] + 1)[:, None]
        where_BEN = batch["starts_BE"][..., None] + batch["labels_BEN"]
        losses = []
        for n in range(2):
            logits_B1T = logits[:, None, :, n].astype(jnp.float32)
            normaliser_BE = jax.nn.logsumexp(jnp.where(own_BET, logits_B1T, -1e30), axis=-1)
            is_label_BET = jnp.arange(logits.shape[1]) == where_BEN[..., n, None]
            losses.append(normaliser_BE - jnp.where(is_label_BET, logits_B1T, 0).sum(-1))
        # Examples that are not there have no tokens to normalise over.
        loss_BE = jnp.where(batch["weights_BE"] > 0, (losses[0] + losses[1]) / 2, 0)
        return (loss_BE * batch["weights_BE"]).sum(), batch["weights_BE"].sum()

    def outputs(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        return {"start_BT": logits[..., 0], "end_BT": logits[..., 1]}

    def truncation(
        self, examples: RecordExamples, lm: LM | None = None, records: Sequence[Record] = ()
    ) -> dict[str, Truncation]:
        """Texts are read through windows; it is the questions that are cut."""
        found = examples.truncation("T")
        return {"T": found._replace(limit=self.task.most_question, longest=examples.most_cut + self.task.most_question)}

    def predict(self, record: Record, outputs: Outputs) -> Row:
        """The best span of all windows, or "" where the question may be, and seems, unanswerable.

        The score of no answer is the least, over the windows, that the first token is both start and end.
        """
        silent = min(float(found["start_BT"][0] + found["end_BT"][0]) for [found] in outputs)
        spans = sorted((span for [found] in outputs for span in self._spans(found)), key=lambda span: -span[0])[:_BEST]
        scores = np.array([score for score, _, _ in spans] + [silent] * self.task.unanswerable)
        if not spans:
            nowhere = {"start": None, "end": None}
            return {"prediction": "", "confidence": 1.0, **nowhere, "_answer": "", "_margin": _NEVER}
        score, start, end = spans[0]
        answer = record["context"][start:end]
        p = np.exp(scores - scores.max())
        answering = score > silent or not self.task.unanswerable
        confidence = p[0 if answering else -1] / p.sum()
        said = {"prediction": answer if answering else "", "confidence": float(confidence)}
        said |= {"start": start if answering else None, "end": end if answering else None}
        return said | {"_answer": answer, "_margin": score - silent}

    def _spans(self, found: dict[str, np.ndarray]) -> Iterator[tuple[float, int, int]]:
        """(score, first character, last character + 1) of the likeliest spans of a window."""
        start_T, end_T, offsets_T2 = found["start_BT"], found["end_BT"], found["offsets_BT"]
        ends = np.argsort(-end_T, kind="stable")[:_BEST]
        for s in np.argsort(-start_T, kind="stable")[:_BEST]:
            for e in ends:
                if s <= e < s + self.task.longest_answer and offsets_T2[s, 0] >= 0 and offsets_T2[e, 0] >= 0:
                    yield float(start_T[s] + end_T[e]), int(offsets_T2[s, 0]), int(offsets_T2[e, 1])

    def score(self, records: Sequence[Record], predictions: Sequence[Row]) -> dict[str, float]:
        """Exact match and F1 as SQuAD's own script has them; `best_f1` is by the threshold that suits these questions
        best, which that script reports too."""
        answers = [[text for text, _ in record["label"]] for record in records]
        scores = metrics.squad(answers, [prediction["prediction"] for prediction in predictions])
        if self.task.unanswerable or "no_answer_exact" in scores:
            # To say anything at all of a question without an answer is wrong, be it an article alone.
            one = lambda texts, said: metrics.exact_f1(texts, said)[1] if texts else float(not said)
            answered = [one(texts, prediction["_answer"]) for texts, prediction in zip(answers, predictions)]
            silent = [float(not texts) for texts in answers]
            margins = [prediction["_margin"] for prediction in predictions]
            scores["best_f1"] = metrics.best_threshold(margins, answered, silent)[1]
        return scores

    def sections(self, part: Records, predictions: Sequence[Row]) -> list[Section]:
        said = lambda text: text or "(no answer)"
        wrong = []
        for record, told in zip(part.records, predictions):
            texts, answer = [text for text, _ in record["label"]], told["prediction"]
            if not metrics.exact_f1(texts, answer)[1]:
                wrong.append((told["confidence"], [record["question"], said(" / ".join(texts)), said(answer)]))
        what = "held-out questions have an answer without a word in common"
        return [mistakes(("question", "true", "predicted"), wrong, len(part.records), what)]


def _answers(given: Any, place: Place) -> list[tuple[str, int]]:
    """(text, first character) of each answer of a row."""
    given = listed(given, "answers", place)
    texts, starts = (given.get(name) if isinstance(given, dict) else None for name in ("text", "answer_start"))
    texts, starts = (x.tolist() if isinstance(x, np.ndarray) else x for x in (texts, starts))
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise UserError(
            f"{place}: 'answers' is {shown(given)}; it must hold 'text' and 'answer_start', two lists of one length"
        )
    for text, start in zip(texts, starts):
        if not isinstance(text, str) or not isinstance(start, (int, np.integer)) or isinstance(start, bool):
            raise UserError(
                f"{place}: an answer is {shown(text)} at {shown(start)}; give its text, and its first character as a "
                f"whole number"
            )
    return list(zip(texts, map(int, starts)))


def _tokens_of(answer: tuple[str, int], spans: np.ndarray) -> np.ndarray | None:
    """First and last token of an answer, of a text's tokens with these characters; None where none is of it.

    The first and last character need no token: answers of SQuAD may begin or end with a space.
    """
    text, start = answer
    of_answer = np.flatnonzero((spans[:, 0] < start + len(text)) & (spans[:, 1] > start))
    return of_answer[[0, -1]].astype(np.int32) if len(of_answer) else None


register(config.QuestionAnswering, QuestionAnsweringTask)
