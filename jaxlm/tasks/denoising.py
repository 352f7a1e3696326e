"""Denoising: an encoder-decoder restores a corrupted text, as in the pre-training of T5 and BART."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self

import jax
import numpy as np

from jaxlm import config
from jaxlm.config import ModelConfig
from jaxlm.data.batches import Batch, Batches, Epoch
from jaxlm.data.corpus import Corpus
from jaxlm.data.corrupt import Draws, Texts, corrupt_spans, corrupted_lengths, infill, shuffle
from jaxlm.data.joined import Features, Joined, bounds_inside, number_within, offsets, ranges
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.hub.pooling import Pooling
from jaxlm.lm import LM
from jaxlm.nn.losses import Losses
from jaxlm.nn.transformer import Transformer
from jaxlm.tasks.pretraining import epoch_seed, pieces
from jaxlm.tasks.states import HeadLogits, VocabularyStates, token_losses
from jaxlm.tasks.task import EvalResult, Task, perplexity, register


class DenoisingTask(Task):
    """Base of denoising tasks.

    Each epoch corrupts a piece of text in a different way, and the length of the result is known beforehand.
    """

    head, scores = "lm", ("loss", "accuracy")
    start: int

    def __init__(self, task: Any, length: int, seed: int, tokenizer: Tokenizer, labels: tuple[str, ...] = ()):
        self.task, self.length, self.seed, self.tokenizer = task, length, seed, tokenizer
        self.source_length = length
        self.max_examples = max(2, length // 8)

    @property
    @abstractmethod
    def longest(self) -> int:
        """The number of tokens of the longest piece of text whose source fits in a row."""

    @abstractmethod
    def lengths(self, n: int) -> tuple[int, int]:
        """Returns the maximum lengths of source and target of a piece of n tokens."""

    @abstractmethod
    def corrupt(self, corpus: Corpus, spans: np.ndarray, draws: Draws) -> tuple[Texts, Texts]:
        """Returns the sources and the targets of spans of a corpus, rows (start, end) [n, 2]."""

    def bind(self, model: ModelConfig, pooling: Pooling | None = None, part: Any = None) -> Self:
        assert model.start_token is not None  # `RunConfig.check` requires it
        return super().bind(model, pooling, part).replace_fields(start=model.start_token)

    def examples(self, corpus: Corpus, training: bool) -> NoisyExamples:
        return NoisyExamples(self, corpus, training)

    def batches(self, part: Corpus, rows: int, length: int, seed: int | None) -> Batches:
        """As in the base class; `length` is that of the sources, and determines that of the targets."""
        target_length = self.lengths(self.longest)[1]
        return Batches(self.examples(part, seed is not None), rows, target_length, self.max_examples, seed, length)

    def losses_from_states(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> Losses:
        losses = token_losses(module, params, x_BTD, batch["labels_BT"], batch["weights_BT"])
        return losses if key is None else {"loss": losses["loss"]}, {}

    def predicted(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> dict[str, HeadLogits | VocabularyStates]:
        return {"loss": VocabularyStates(x_BTD, batch["weights_BT"])}

    def measure(
        self, lm: LM, run_eval: Callable[[Any], EvalResult], batches: Batches, part: Corpus
    ) -> tuple[dict[str, float], Any]:
        means = run_eval(batches).means
        return {"loss": means["loss"], "perplexity": perplexity(means["loss"]), **means}, None


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

    def corrupt(self, corpus: Corpus, spans: np.ndarray, draws: Draws) -> tuple[Texts, Texts]:
        texts = _texts(corpus, spans)
        options: dict[str, Any] = {"rate": self.task.rate, "span": self.task.span, "end": end_token(self.tokenizer)}
        return corrupt_spans(*texts, draws, sentinels=self.sentinels, **options)


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
        text = -1  # a placeholder
        with_special = tokenizer.add_special_tokens([text])[0]
        at = with_special.index(text)
        self.special = with_special[:at], with_special[at + 1 :]  # before and after a text

    @property
    def longest(self) -> int:
        return self.tokenizer.max_text_tokens(self.length, pair=False)

    def lengths(self, n: int) -> tuple[int, int]:
        special = self.length - self.longest
        return n + special, n + special

    def corrupt(self, corpus: Corpus, spans: np.ndarray, draws: Draws) -> tuple[Texts, Texts]:
        texts = _texts(corpus, spans)
        moved = _texts(corpus, _permuted_sentences(corpus, spans, draws)) if self.task.permute else texts
        sources = infill(moved.tokens, texts.lengths, draws, rate=self.task.rate, span=self.task.span, mask=self.mask)
        return self._with_special_tokens(sources), self._with_special_tokens(texts)

    def _with_special_tokens(self, texts: Texts) -> Texts:
        before, after = self.special
        lengths = texts.lengths + len(before) + len(after)
        tokens = np.zeros(lengths.sum(), np.int32)
        starts = offsets(lengths)
        tokens[starts[:-1, None] + np.arange(len(before))] = before
        tokens[starts[1:, None] - np.arange(len(after), 0, -1)] = after
        tokens[ranges(starts[:-1] + len(before), texts.lengths)] = texts.tokens
        return Texts(tokens, lengths)


def _texts(corpus: Corpus, spans: np.ndarray) -> Texts:
    """Returns the tokens of spans of a corpus."""
    lengths = spans[:, 1] - spans[:, 0]
    return Texts(np.asarray(corpus.tokens)[ranges(spans[:, 0], lengths)].astype(np.int32), lengths)


def _permuted_sentences(corpus: Corpus, spans: np.ndarray, draws: Draws) -> np.ndarray:
    """Returns the sentences in each span, in random order, as rows (start, end) [n, 2]."""
    bounds, counts = bounds_inside(corpus.sentences, spans)
    starts = np.insert(bounds, offsets(counts)[:-1], spans[:, 0])
    ends = np.insert(bounds, offsets(counts)[1:], spans[:, 1])
    text = np.repeat(np.arange(len(spans)), counts + 1)
    order = shuffle(draws.words(text, 4 * number_within(text) + 3), counts + 1).items
    return np.stack([starts, ends], 1)[order]


class NoisyExamples:
    """Pieces of documents, with a different corruption in each epoch."""

    fields: Mapping[str, type] = {"labels_BT": np.int32, "weights_BT": np.float32}
    labels = 0

    def __init__(self, task: DenoisingTask, corpus: Corpus, training: bool):
        self.task, self.corpus, self.training = task, corpus, training
        spans = pieces(corpus.bounds, task.longest)
        # A single token cannot be corrupted; the piece before it in the same document leaves it another one.
        follows = (spans[:, 1] - spans[:, 0] < 2) & ~np.isin(spans[:, 0], corpus.bounds)
        spans[follows, 0] -= 1
        spans[np.flatnonzero(follows) - 1, 1] -= 1
        self.spans = spans[spans[:, 1] - spans[:, 0] >= 2]

    def epoch(self, n: int | None) -> Epoch:
        seed = epoch_seed(self.task.seed, self.training, n)
        sizes, inverse = np.unique(self.spans[:, 1] - self.spans[:, 0], return_inverse=True)
        lengths = np.array([self.task.lengths(size) for size in sizes.tolist()], np.int64).reshape(-1, 2)[inverse]
        return Epoch(lengths[:, 1], partial(self._features, seed), None, lengths[:, 0])

    def _features(self, seed: tuple[int, ...], units: np.ndarray) -> Joined:
        sources, targets = self.task.corrupt(self.corpus, self.spans[units], Draws(seed, units))
        starts = offsets(targets.lengths)[:-1]
        inputs = np.empty_like(targets.tokens)
        inputs[1:] = targets.tokens[:-1]
        inputs[starts] = self.task.start
        features: Features = {
            "source_tokens_BS": sources.tokens,
            "tokens_BT": inputs,
            "labels_BT": targets.tokens,
            "weights_BT": np.ones(len(inputs), np.float32),
        }
        return Joined(targets.lengths, features, sources.lengths)


def sentinels(tokenizer: Tokenizer) -> np.ndarray:
    """Returns the ids of the tokens <extra_id_0>, <extra_id_1> and so on."""
    ids: list[int] = []
    while (token := tokenizer.backend.token_to_id(f"<extra_id_{len(ids)}>")) is not None:
        ids.append(token)
    return np.array(ids, np.int32)


def end_token(tokenizer: Tokenizer) -> int:
    """Returns the token that ends a text.  Raises UserError if the tokenizer has none."""
    token = tokenizer.eos if tokenizer.eos is not None else tokenizer.sep
    if token is None:
        raise UserError("the tokenizer has no token for the end of a text (eos or sep); give one that has")
    return token


register(config.SpanCorruption, SpanCorruptionTask)
register(config.Infilling, InfillingTask)
