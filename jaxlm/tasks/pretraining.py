"""Pre-training: causal language modelling, masked language modelling, next-sentence prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import config
from jaxlm.data.batches import Batch, Batches, Epoch
from jaxlm.data.corpus import Corpus
from jaxlm.data.corrupt import Draws, mask_tokens, word_groups
from jaxlm.data.joined import Features, Joined, bounds_inside, number_within, offsets, ranges
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.lm import LM
from jaxlm.nn.losses import Losses, accuracy, bits_per_byte, cross_entropy
from jaxlm.nn.transformer import Transformer, apply
from jaxlm.tasks.states import HeadLogits, VocabularyStates, token_losses, token_scores
from jaxlm.tasks.task import EvalResult, Task, perplexity, register

TRAINING, EVALUATION = 0, 1  # part of the seeds, so that evaluation and training draw different numbers


def epoch_seed(seed: int, training: bool, n: int | None) -> tuple[int, ...]:
    """Returns the seed of epoch n of training, or the one seed of evaluation."""
    return (seed, TRAINING, n or 0) if training else (seed, EVALUATION)


class CausalLMTask(Task):
    """`config.CausalLM`: predicts each token from the tokens before it."""

    head, scores = "lm", ("loss", "accuracy")

    def __init__(
        self, task: config.CausalLM, length: int, seed: int, tokenizer: Tokenizer, labels: tuple[str, ...] = ()
    ):
        self.task, self.length, self.seed = task, length, seed
        # The rows of a stream hold one span each, so that attention needs no mask of segments.
        self.max_examples = 1 if task.stream else max(2, length // 8)
        self.one_example = self.max_examples == 1
        # The tokens before and after documents, which have no bytes.
        self.frame = [] if tokenizer is None else [i for i in (tokenizer.bos, tokenizer.eos) if i is not None]
        # If one token both begins and ends documents (GPT-2), the corpus has it only before each document, and the end
        # of a whole document is predicted too.
        same = tokenizer is not None and tokenizer.eos is not None and tokenizer.eos == tokenizer.bos
        self.end = tokenizer.eos if same and not task.stream else None

    def examples(self, corpus: Corpus, training: bool) -> CausalExamples:
        return CausalExamples(self, corpus, training)

    def losses_from_states(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> Losses:
        labels_BT, weights_BT = batch["labels_BT"], batch["weights_BT"]
        if key is not None:
            losses = token_losses(module, params, x_BTD, labels_BT, weights_BT, self.task.label_smoothing)
            return {"loss": losses["loss"]}, {}
        log_BT, best_BT = token_scores(module, params, x_BTD, labels_BT)
        weighted_sum = lambda x_BT, weights_BT: ((x_BT * weights_BT).sum(), weights_BT.sum())
        losses = {
            "loss": weighted_sum(-log_BT, weights_BT),
            "accuracy": weighted_sum(best_BT == labels_BT, weights_BT),
        }
        if self.frame:
            losses["text_loss"] = weighted_sum(-log_BT, weights_BT * ~jnp.isin(labels_BT, jnp.array(self.frame)))
        return losses, {}

    def predicted(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> dict[str, HeadLogits | VocabularyStates]:
        return {"loss": VocabularyStates(x_BTD, batch["weights_BT"])}

    def measure(
        self, lm: LM, run_eval: Callable[[Any], EvalResult], batches: Batches, part: Corpus
    ) -> tuple[dict[str, float], Any]:
        result = run_eval(batches)
        means = result.means
        return {
            "loss": means["loss"],
            "perplexity": perplexity(means["loss"]),
            "bits_per_byte": bits_per_byte(result.losses.get("text_loss", result.losses["loss"])[0], part.bytes),
            "accuracy": means["accuracy"],
        }, None


class CausalExamples:
    """Spans of text, with the next token as the label of each position.

    A text of n tokens has n - 1 predictions, and one more, of its end, if the tokenizer has one token for both ends.
    In a stream, all documents are one text.  Training splits each text into spans of the row length, at an offset that
    in a stream differs between epochs.  Evaluation moves windows of the row length by `stride`, and in each window
    counts the predictions that no earlier window contains.
    """

    fields: Mapping[str, type] = {"labels_BT": np.int32, "weights_BT": np.float32}
    labels = 0

    def __init__(self, task: CausalLMTask, corpus: Corpus, training: bool):
        self.task, self.corpus, self.training = task, corpus, training
        self.texts = np.array([0, len(corpus.tokens)]) if task.task.stream else corpus.bounds
        self.repeats = not task.task.stream  # spans of a stream begin at another offset in each epoch

    def epoch(self, n: int | None) -> Epoch:
        T = self.task.length
        stride = T if self.training else self.task.task.stride or T
        offset = 0
        if self.training and self.task.task.stream:
            offset = int(np.random.default_rng((self.task.seed, TRAINING, n or 0)).integers(T))
        extra = int(self.task.end is not None)
        starts, ends = self.texts[:-1], self.texts[1:] + extra - 1
        spans = _spans(starts[ends > starts], ends[ends > starts], T, stride, offset)
        return Epoch(spans[:, 2] - spans[:, 0], partial(self._features, spans))

    def _features(self, spans: np.ndarray, units: np.ndarray) -> Joined:
        starts, counted, ends = spans[units].T
        lengths, corpus = ends - starts, np.asarray(self.corpus.tokens)
        place = ranges(starts, lengths)
        labels = corpus.take(place + 1, mode="clip").astype(np.int32)
        if self.task.end is not None:  # the last document; others are followed by the first token of the next
            labels[place + 1 == len(corpus)] = self.task.end
        weights = (place >= np.repeat(counted, lengths)).astype(np.float32)
        features = {"tokens_BT": corpus[place].astype(np.int32), "labels_BT": labels, "weights_BT": weights}
        return Joined(lengths, features)


def _spans(starts: np.ndarray, ends: np.ndarray, length: int, stride: int, offset: int) -> np.ndarray:
    """Returns windows over the predictions of several texts, as rows (start, first counted prediction, end) [n, 3].

    Args:
      starts: the first prediction of each text.
      ends: the end of its predictions; no text is empty.
      length: length of a window.
      stride: predictions between the ends of windows.
      offset: length of the first window; 0: `length`.

    >>> _spans(np.array([0]), np.array([7]), length=4, stride=2, offset=0).tolist()
    [[0, 0, 4], [2, 4, 6], [3, 6, 7]]
    """
    firsts = np.minimum(starts + (offset or length), ends)
    counts = 1 - (firsts - ends) // stride
    text = np.repeat(np.arange(len(starts)), counts)
    number = ranges(np.zeros_like(counts), counts)
    window_ends = np.minimum(firsts[text] + number * stride, ends[text])
    counted = np.where(number == 0, starts[text], firsts[text] + (number - 1) * stride)
    # In evaluation a window starts before its first counted prediction, so that it fills the row.
    window_starts = counted if stride == length else np.maximum(starts[text], window_ends - length)
    return np.stack([window_starts, counted, window_ends], 1)


class MaskedLMTask(Task):
    """`config.MaskedLM`: predicts masked tokens, and with `next_sentence` whether two texts are consecutive."""

    head, scores = "masked_lm", ("loss", "accuracy")

    def __init__(
        self, task: config.MaskedLM, length: int, seed: int, tokenizer: Tokenizer, labels: tuple[str, ...] = ()
    ):
        special = {name: getattr(tokenizer, name) for name in ("cls", "sep", "mask")}
        missing = [name for name, token in special.items() if token is None]
        if missing:
            raise UserError(
                f"the tokenizer has no {', '.join(missing)} token, which masked language modelling needs; "
                f"train one with --tokenizer.train wordpiece or load a BERT vocabulary"
            )
        self.task, self.length, self.seed, self.tokenizer = task, length, seed, tokenizer
        self.mask: int = special["mask"]
        self.max_examples = max(4, length // 16)
        # An upper bound for a row: each example has its rounded share of predictions, and at least one.
        self.predictions = min(length, math.ceil(task.mask_rate * length) + self.max_examples)

    def examples(self, corpus: Corpus, training: bool) -> MaskedExamples:
        return MaskedExamples(self, corpus, training)

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        totals = {"masked_lm_loss": batch["weights_BT"].sum()}
        return totals | ({"next_sentence_loss": batch["weights_BE"].sum()} if self.task.next_sentence else {})

    def losses_from_states(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> Losses:
        x_BPD, weights_BP, labels_BP, _ = self._masked(batch, x_BTD, batch["weights_BT"], batch["labels_BT"])
        smoothing = self.task.label_smoothing if key is not None else 0.0
        masked = token_losses(module, params, x_BPD, labels_BP, weights_BP, smoothing, "masked_lm")
        losses = {f"masked_lm_{name}": value for name, value in masked.items()}
        if self.task.next_sentence:
            labels = batch["labels_BE"], batch["weights_BE"]
            logits_BE2 = _next_sentence(module, params, x_BTD, batch)
            losses["next_sentence_loss"] = cross_entropy(logits_BE2, *labels)
            losses["next_sentence_accuracy"] = accuracy(logits_BE2, *labels)
        return losses, {}

    def _masked(self, batch: Batch, *arrays_BT: jax.Array) -> list[jax.Array]:
        """Returns arrays [B, T, ...] at the masked positions, about a sixth, which alone need logits; and these."""
        chosen_BP = jnp.argsort(batch["weights_BT"] == 0, axis=1, stable=True)[:, : self.predictions]
        take = lambda x: jnp.take_along_axis(x, chosen_BP.reshape(*chosen_BP.shape, *[1] * (x.ndim - 2)), axis=1)
        return [*(take(x) for x in arrays_BT), chosen_BP]

    def predicted(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> dict[str, HeadLogits | VocabularyStates]:
        x_BPD, weights_BP, chosen_BP = self._masked(batch, x_BTD, batch["weights_BT"])
        states = VocabularyStates(x_BPD, weights_BP, "masked_lm", chosen_BP)
        logits = self.example_logits(module, params, x_BTD, batch)
        return {"masked_lm_loss": states, **self.predicted_from(logits, batch)}

    def example_logits(self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        return {"logits_BEM": _next_sentence(module, params, x_BTD, batch)} if self.task.next_sentence else {}

    def predicted_from(self, logits: Mapping[str, jax.Array], batch: Batch) -> dict[str, HeadLogits]:
        if not self.task.next_sentence:
            return {}
        return {"next_sentence_loss": HeadLogits(logits["logits_BEM"], batch["weights_BE"])}

    def measure(
        self, lm: LM, run_eval: Callable[[Any], EvalResult], batches: Batches, part: Corpus
    ) -> tuple[dict[str, float], Any]:
        means = run_eval(batches).means
        return {
            "loss": means["masked_lm_loss"] + means.get("next_sentence_loss", 0.0),
            "perplexity": perplexity(means["masked_lm_loss"]),
            "accuracy": means["masked_lm_accuracy"],
            **means,
        }, None


def _next_sentence(module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch) -> jax.Array:
    """Returns the logits [B, E, 2] of the head "next_sentence"."""
    x_BED = jnp.take_along_axis(x_BTD, batch["starts_BE"][..., None], axis=1)
    logits_BE2: jax.Array = apply(module, params, x_BED, method="next_sentence")
    return logits_BE2


class MaskedExamples:
    """Texts `[CLS] a [SEP]` or pairs `[CLS] a [SEP] b [SEP]`, with a different mask in each epoch."""

    fields: Mapping[str, type]
    labels = 0

    def __init__(self, task: MaskedLMTask, corpus: Corpus, training: bool):
        self.task, self.corpus, self.training = task, corpus, training
        fields: dict[str, type] = {"labels_BT": np.int32, "weights_BT": np.float32, "types_BT": np.int32}
        self.fields = fields | ({"labels_BE": np.int32} if task.task.next_sentence else {})

    def epoch(self, n: int | None) -> Epoch:
        seed = epoch_seed(self.task.seed, self.training, n)
        if self.task.task.next_sentence:
            random = np.random.default_rng(seed)
            spans = _pairs(self.corpus, self.task.length - 3, self.task.task.short_rate, random)
            lengths = spans[:, 1] - spans[:, 0] + spans[:, 3] - spans[:, 2] + 3
        elif self.task.task.full_sentences:
            spans, lengths = self.full_sentences
        else:
            spans = pieces(self.corpus.bounds, self.task.length - 2)
            lengths = spans[:, 1] - spans[:, 0] + 2
        return Epoch(lengths, partial(self._features, seed, spans))

    @cached_property
    def full_sentences(self) -> tuple[np.ndarray, np.ndarray]:
        """Spans of consecutive sentences [n, 2], and their lengths including special tokens [n]."""
        return _full_sentences(self.corpus, self.task.length)

    def _features(self, seed: tuple[int, ...], spans: np.ndarray, units: np.ndarray) -> Joined:
        task, tokenizer, corpus = self.task.task, self.task.tokenizer, np.asarray(self.corpus.tokens)
        cls, sep = np.int32(tokenizer.cls), np.int32(tokenizer.sep)  # type: ignore[arg-type]
        first, second, inner = spans[units, :2], None, np.zeros(0, np.int64)
        sizes = first[:, 1] - first[:, 0]  # of [CLS] a [SEP], without the special tokens
        if task.next_sentence:
            second = spans[units, 2:4]
        elif task.full_sentences:
            inner, separators = bounds_inside(self.corpus.bounds, first)
            sizes = sizes + separators
        lengths = sizes + 2 if second is None else sizes + second[:, 1] - second[:, 0] + 3
        starts = offsets(lengths)[:-1]
        # Everything that is not a special token is text, in order.
        tokens, is_text = np.full(lengths.sum(), sep), np.ones(lengths.sum(), bool)
        tokens[starts] = cls
        ends = starts + lengths - 1
        features: Features = {"types_BT": np.zeros(len(tokens), np.int32)}
        is_text[starts] = is_text[starts + sizes + 1] = is_text[ends] = False
        texts = first if second is None else np.stack([first, second], 1).reshape(-1, 2)
        if len(inner):
            # Separator k of a text follows its [CLS], the tokens before it and k other separators.
            text = np.repeat(np.arange(len(units)), separators)
            is_text[starts[text] + 1 + inner - first[text, 0] + number_within(text)] = False
        tokens[is_text] = corpus[ranges(texts[:, 0], texts[:, 1] - texts[:, 0])]
        if second is not None:
            features["types_BT"][ranges(starts + sizes + 2, ends - starts - sizes - 1)] = 1
            features["labels_BE"] = spans[units, 4]
        continues = tokenizer.continues[tokens] if task.whole_words else np.zeros(len(tokens), bool)
        corrupted, predicted = mask_tokens(
            tokens,
            word_groups(continues, is_text),
            lengths,
            Draws(seed, units),
            rate=task.mask_rate,
            mask=self.task.mask,
            vocabulary=tokenizer.size,
        )
        features |= {"tokens_BT": corrupted, "labels_BT": tokens, "weights_BT": predicted.astype(np.float32)}
        return Joined(lengths, features)


def pieces(bounds: np.ndarray, length: int) -> np.ndarray:
    """Returns the texts between bounds in pieces of at most `length` tokens, as rows (start, end) [n, 2].

    >>> pieces(np.array([0, 5, 5, 7]), 4).tolist()
    [[0, 4], [4, 5], [5, 7]]
    """
    counts = -(-np.diff(bounds) // length)
    text = np.repeat(np.arange(len(counts)), counts)
    starts = bounds[:-1][text] + number_within(text) * length
    return np.stack([starts, np.minimum(starts + length, bounds[1:][text])], 1)


def _full_sentences(corpus: Corpus, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns spans of whole sentences that fill rows of `length` tokens, and their lengths including special tokens.

    As in RoBERTa's FULL-SENTENCES (Liu et al. 2019, section 4.2), a span continues in the next document, after a
    separator.  A sentence that is longer than a row is split.
    """
    firsts = set(corpus.bounds[:-1].tolist())
    spans: list[tuple[int, int, int]] = []
    bounds, start, end, used = corpus.sentences.tolist(), 0, 0, 2
    for a, b in zip(bounds, bounds[1:]):
        if a == b:
            continue
        separator = int(a in firsts and end > start)
        if end > start and used + separator + b - a > length:
            spans.append((start, end, used))
            start, end, used, separator = a, a, 2, 0
        if end == start:
            start = a
        while b - a > length - 2:
            spans.append((a, a + length - 2, length))
            start = end = a = a + length - 2
        end, used = b, used + separator + b - a
    if end > start:
        spans.append((start, end, used))
    rows = np.array(spans, np.int64).reshape(-1, 3)
    return rows[:, :2], rows[:, 2]


def _pairs(corpus: Corpus, length: int, short_rate: float, random: np.random.Generator) -> np.ndarray:
    """Returns pairs of texts for next-sentence prediction, as rows (a start, a end, b start, b end, label) [n, 5].

    As for the original BERT, sentences of a document are collected up to a target length and split at random.  With
    probability 1/2 (label 1), sentences of another document replace the second part, whose sentences are then used for
    the next pair.  A pair has at most `length` tokens.
    """
    bounds, documents = corpus.sentences.tolist(), corpus.documents.tolist()
    count = len(documents) - 1
    pairs: list[tuple[int, int, int, int, int]] = []
    for d in range(count):
        s, last = documents[d], documents[d + 1]
        while s < last:
            target = length if random.random() >= short_rate else int(random.integers(2, length + 1))
            end = s + 1
            while end < last and bounds[end] - bounds[s] < target:
                end += 1
            if end == last and end - s == 1 and (s > documents[d] or count == 1):
                break  # a single sentence is left, which the previous pair already contains
            divide = s + 1 if end - s == 1 else s + int(random.integers(1, end - s))
            a = [bounds[s], bounds[divide]]
            other = count > 1 and (end - s == 1 or random.random() < 0.5)
            if other:
                e = int(random.integers(count - 1))
                e += e >= d
                t = int(random.integers(documents[e], documents[e + 1]))
                stop = t + 1
                while stop < documents[e + 1] and bounds[stop] - bounds[t] < target - (a[1] - a[0]):
                    stop += 1
                b, s = [bounds[t], bounds[stop]], divide
            else:
                b, s = [bounds[divide], bounds[end]], end
            _trim(a, b, length, random)
            if a[1] > a[0] and b[1] > b[0]:
                pairs.append((*a, *b, int(other)))
    return np.array(pairs, np.int64).reshape(-1, 5)


def _trim(a: list[int], b: list[int], length: int, random: np.random.Generator) -> None:
    """Shortens the longer of two spans, in place and at random ends, until both together fit in `length` tokens."""
    while (excess := a[1] - a[0] + b[1] - b[0] - length) > 0:
        longer, shorter = (a, b) if a[1] - a[0] > b[1] - b[0] else (b, a)
        # Cut to the length of the other first: this equals cutting one token at a time, in fewer iterations.
        cut = max(1, min(excess, (longer[1] - longer[0]) - (shorter[1] - shorter[0])))
        front = int(random.binomial(cut, 0.5))
        longer[0] += front
        longer[1] -= cut - front


register(config.CausalLM, CausalLMTask)
register(config.MaskedLM, MaskedLMTask)
