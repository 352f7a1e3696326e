"""Denoising: an encoder-decoder restores what was taken out of a text, as T5 and BART were pre-trained."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self

import jax
import numpy as np

from jaxlm import config
from jaxlm.config import ModelConfig
from jaxlm.data.batches import Batch, Batches, Epoch, Features
from jaxlm.data.corpus import Corpus
from jaxlm.data.corrupt import corrupt_spans, corrupted_lengths, infill
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.hub.pooling import Pooling
from jaxlm.lm import LM
from jaxlm.nn.losses import Losses
from jaxlm.nn.transformer import Transformer
from jaxlm.tasks.pretraining import EVALUATION, TRAINING
from jaxlm.tasks.states import hidden, word_losses
from jaxlm.tasks.task import EvalResult, Task, register


class DenoisingTask(Task):
    """Base: a piece of text is corrupted anew in each epoch, and how long it is then is known before."""

    head, scores = "lm", ("loss", "accuracy")
    start: int

    def __init__(self, task: Any, length: int, seed: int, tokenizer: Tokenizer, labels: tuple[str, ...] = ()):
        self.task, self.length, self.seed, self.tokenizer = task, length, seed, tokenizer
        self.source_length = length
        self.max_examples = max(2, length // 8)

    @property
    @abstractmethod
    def longest(self) -> int:
        """Tokens of the longest piece of text whose source fits a row."""

    @abstractmethod
    def lengths(self, n: int) -> tuple[int, int]:
        """Tokens, at the most, of source and target of a piece of n tokens."""

    @abstractmethod
    def corrupted(self, corpus: Corpus, span: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Source and target of a span [start, end) of a corpus."""

    def bound(self, model: ModelConfig, pooling: Pooling | None = None, part: Any = None) -> Self:
        assert model.start_token is not None  # as `RunConfig.check` has it
        return super().bound(model, pooling, part).replaced(start=model.start_token)

    def examples(self, corpus: Corpus, training: bool) -> NoisyExamples:
        return NoisyExamples(self, corpus, training)

    def batches(self, part: Corpus, rows: int, length: int, seed: int | None) -> Batches:
        """`length` is of the sources; that of the targets follows."""
        target_length = self.lengths(self.longest)[1]
        return Batches(self.examples(part, seed is not None), rows, target_length, self.max_examples, seed, length)

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        return {"loss": batch["weights_BT"].sum()}

    def losses(self, module: Transformer, params: Any, batch: Batch, key: jax.Array | None) -> Losses:
        x_BTD, auxiliary = hidden(module, params, batch, key)
        found = word_losses(module, params, x_BTD, batch["labels_BT"], batch["weights_BT"])
        return found if key is None else {"loss": found["loss"], **auxiliary}, {}

    def measure(
        self, lm: LM, run_eval: Callable[[Any], EvalResult], batches: Batches, part: Corpus
    ) -> tuple[dict[str, float], Any]:
        means = run_eval(batches).means
        return {"loss": means["loss"], "perplexity": math.exp(min(means["loss"], 700)), **means}, None


class SpanCorruptionTask(DenoisingTask):
    """`config.SpanCorruption`."""

    task: config.SpanCorruption

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self.sentinels = sentinels(self.tokenizer)
        needed = sum(self.lengths(self.longest)) - self.longest - 2  # twice the spans of the longest piece
        if 2 * len(self.sentinels) < needed:
            raise UserError(
                f"the tokenizer has {len(self.sentinels)} sentinels <extra_id_0> ..., and a text of {self.longest} "
                f"tokens has up to {needed // 2} gaps; train one with --tokenizer.sentinels {needed // 2}, load T5's, "
                f"or lower --data.length"
            )

    @property
    def longest(self) -> int:
        n = self.length
        while self.lengths(n + 1)[0] <= self.length:
            n += 1
        return n

    def lengths(self, n: int) -> tuple[int, int]:
        return corrupted_lengths(n, self.task.rate, self.task.span)

    def corrupted(self, corpus: Corpus, span: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        tokens_T = corpus.tokens[slice(*span)].astype(np.int32)
        how: dict[str, Any] = {"rate": self.task.rate, "span": self.task.span, "end": ending(self.tokenizer)}
        return corrupt_spans(tokens_T, random, sentinels=self.sentinels, **how)


class InfillingTask(DenoisingTask):
    """`config.Infilling`."""

    task: config.Infilling

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        tokenizer = self.tokenizer
        gaps = [tokenizer.mask] if tokenizer.mask is not None else sentinels(tokenizer)[:1].tolist()
        if not gaps:
            raise UserError(
                "the tokenizer has no token for a gap, <mask> or <extra_id_0>; train one with --tokenizer.sentinels 1, "
                "or load BART's"
            )
        self.mask: int = gaps[0]

    @property
    def longest(self) -> int:
        return self.tokenizer.room(self.length, pair=False)

    def lengths(self, n: int) -> tuple[int, int]:
        around = self.length - self.longest
        return n + around, n + around

    def corrupted(self, corpus: Corpus, span: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        tokens_T = corpus.tokens[slice(*span)].astype(np.int32)
        first, last = np.searchsorted(corpus.sentences, span)
        cuts = [cut for cut in (corpus.sentences[first:last] - span[0]).tolist() if cut]
        parts = np.split(tokens_T, cuts)
        order = random.permutation(len(parts)) if self.task.permute else range(len(parts))
        moved_T = np.concatenate([parts[i] for i in order])
        source_T = infill(moved_T, random, rate=self.task.rate, span=self.task.span, mask=self.mask)
        framed = (self.tokenizer.wrap(side.tolist())[0] for side in (source_T, tokens_T))
        source, target = (np.array(ids, np.int32) for ids in framed)
        return source, target


class NoisyExamples:
    """Pieces of documents, each corrupted anew in each epoch."""

    fields: Mapping[str, type] = {"labels_BT": np.int32, "weights_BT": np.float32}
    labels = 0

    def __init__(self, task: DenoisingTask, corpus: Corpus, training: bool):
        self.task, self.corpus, self.training = task, corpus, training
        longest = task.longest
        starts, ends = [], []
        for start, end in zip(corpus.bounds.tolist(), corpus.bounds.tolist()[1:]):
            cuts = [*range(start, end, longest), end]
            if len(cuts) > 2 and cuts[-1] - cuts[-2] < 2:  # a single token can lose nothing
                cuts[-2] -= 1
            starts += cuts[:-1]
            ends += cuts[1:]
        there = np.diff(np.stack([starts, ends]), axis=0)[0] >= 2
        self.spans = np.stack([starts, ends], 1)[there].reshape(-1, 2)

    def epoch(self, n: int | None) -> Epoch:
        seed: tuple[int, ...] = (self.task.seed, TRAINING, n or 0) if self.training else (self.task.seed, EVALUATION)
        sizes, of = np.unique(self.spans[:, 1] - self.spans[:, 0], return_inverse=True)
        lengths = np.array([self.task.lengths(size) for size in sizes.tolist()], np.int64).reshape(-1, 2)[of]
        return Epoch(lengths[:, 1], partial(self._features, seed), None, lengths[:, 0])

    def _features(self, seed: tuple[int, ...], i: int) -> list[Features]:
        source, target = self.task.corrupted(self.corpus, self.spans[i], np.random.default_rng((*seed, i)))
        return [
            {
                "source_tokens_BS": source,
                "tokens_BT": np.concatenate([[self.task.start], target[:-1]]).astype(np.int32),
                "labels_BT": target,
                "weights_BT": np.ones(len(target), np.float32),
            }
        ]


def sentinels(tokenizer: Tokenizer) -> np.ndarray:
    """The ids of <extra_id_0>, <extra_id_1> ..., as many as there are."""
    found: list[int] = []
    while (token := tokenizer.backend.token_to_id(f"<extra_id_{len(found)}>")) is not None:
        found.append(token)
    return np.array(found, np.int32)


def ending(tokenizer: Tokenizer) -> int:
    """The token after a text.  Raises UserError where there is none."""
    found = tokenizer.eos if tokenizer.eos is not None else tokenizer.sep
    if found is None:
        raise UserError("the tokenizer has no token for the end of a text (eos or sep); give one that has")
    return found


register(config.SpanCorruption, SpanCorruptionTask)
register(config.Infilling, InfillingTask)
