"""What tasks whose prediction is a text have in common: what is learned of it, how it is written."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Self

import jax
import numpy as np

from jaxlm import config
from jaxlm.config import ModelConfig
from jaxlm.data.batches import Batch
from jaxlm.data.formats.lines import Row
from jaxlm.errors import UserError
from jaxlm.hub.pooling import Pooling
from jaxlm.inference.generate import generate
from jaxlm.lm import LM
from jaxlm.nn.losses import Losses
from jaxlm.nn.transformer import Transformer
from jaxlm.reports.report import LONGEST, Table
from jaxlm.tasks.cells import Record, Records
from jaxlm.tasks.denoising import ending
from jaxlm.tasks.records import RecordExamples, RecordTask, Truncation
from jaxlm.tasks.states import word_losses
from jaxlm.tasks.task import EvalResult

SHOWN = 20  # texts in the report
# Prompts of a decoder that predicts, in the table `cut` of a task.
UNREAD = {"P": ("prompts", "each lost its beginning: lower --task.decoding.max-new-tokens, or take another model")}


class GenerationTask(RecordTask):
    """Base of the tasks whose prediction is a text, written by the head "lm" after the `prompts` of the task."""

    head = "lm"
    fields: Mapping[str, type] = {"labels_BT": np.int32, "weights_BT": np.float32}
    decoding: config.Decoding
    scored: int = 0  # held-out records that are generated for scores; 0: all
    start: int | None = None  # what an encoder-decoder's decoder reads first; None: what its target ends with (mBART)

    def bound(self, model: ModelConfig, pooling: Pooling | None = None, part: Any = None) -> Self:
        if model.structure == "encoder":
            raise UserError("the model is an encoder, which writes no text; start from a decoder or an encoder-decoder")
        new = self.decoding.max_new_tokens
        if model.text_limit is not None and new >= model.text_limit:
            raise UserError(
                f"task.decoding.max_new_tokens is {new}, and the model has {model.max_length} positions; lower it to "
                f"{model.max_length - 1} or less"
            )
        two = model.structure == "encoder_decoder"
        return (
            super()
            .bound(model, pooling, part)
            .replaced(
                start=model.start_token,
                fields={**self.fields, **({"prefix_BT": np.int32} if model.prefix_lm else {})},
                source_length=(getattr(self.task, "source_length", 0) or self.length) if two else None,
            )
        )

    @property
    def end(self) -> int:
        """The token after a text."""
        return ending(self.tokenizer.target)

    @property
    def stops(self) -> tuple[int, ...]:
        """Tokens that end what is generated."""
        return (self.end,)

    @abstractmethod
    def prompts(self, records: Sequence[Record]) -> list[list[int]]:
        """The tokens that are read for each record."""

    def losses_of(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> Losses:
        smoothing = 0.0 if key is None else self.task.label_smoothing
        found = word_losses(module, params, x_BTD, batch["labels_BT"], batch["weights_BT"], smoothing)
        return found if key is None else {"loss": found["loss"]}, {}

    def predict(self, record: Record, outputs: Any) -> Row:
        return {"prediction": outputs}

    def written(self, lm: LM, records: Sequence[Record]) -> list[Row]:
        """The text that the model writes for each record."""
        prompts = self.prompts(records)
        if self.source_length is not None:
            prompts = [prompt[: self.source_length] for prompt in prompts]
        decoding = replace(self.decoding, n_best=1, too_long="truncate")
        found = generate(lm, prompts, decoding, stop_tokens=self.stops, return_tokens=True)
        return [self.predict(record, self.tokenizer.target.decode(ids)) for record, ids in zip(records, found)]

    def truncation(
        self, examples: RecordExamples, lm: LM | None = None, records: Sequence[Record] = ()
    ) -> dict[str, Truncation]:
        """In prediction a target is not read; and a prompt of a decoder loses its beginning where it and the text after
        it are longer than the model has positions, whatever the length of a row."""
        if lm is None:
            return super().truncation(examples)
        if self.source_length is not None:
            return {"S": examples.truncation("S")}
        if lm.config.text_limit is None:
            return {}
        room = lm.config.text_limit - self.decoding.max_new_tokens
        lengths = [len(prompt) for prompt in self.prompts(records)]
        return {"P": Truncation(sum(n > room for n in lengths), len(lengths), room, max(lengths, default=0))}

    def tell(
        self, lm: LM, run_eval: Callable[[Any], EvalResult], batches: Any, records: Sequence[Record]
    ) -> tuple[list[Row], dict[str, float]]:
        labelled = all("label" in record for record in records)
        return self.written(lm, records), self._means(run_eval(batches)) if labelled else {}

    def measure(
        self, lm: LM, run_eval: Callable[[Any], EvalResult], batches: Any, part: Records
    ) -> tuple[dict[str, float], list[Row]]:
        some = part.records[: self.scored or None]
        found = self.written(lm, some)
        return {**self._means(run_eval(batches)), **self.score(some, found)}, found

    @staticmethod
    def _means(seen: EvalResult) -> dict[str, float]:
        means = seen.means
        return {"loss": means["loss"], "perplexity": math.exp(min(means["loss"], 700)), "accuracy": means["accuracy"]}


def table_of_texts(title: str, head: tuple[str, ...], rows: Iterable[Sequence[str]], note: str) -> Table:
    """The report's table of the first texts, each cut where it is long."""
    cut = lambda text: text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    return Table(title, head, [[*map(cut, row)] for row in islice(rows, SHOWN)], note)
