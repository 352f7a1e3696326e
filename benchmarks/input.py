"""Measures how fast one process makes the batches of each task, without a model or an accelerator.

    python benchmarks/input.py [CASE ...]

The texts are random, so only their lengths matter: documents of 50 to 2,000 tokens (median 320), lines and records of
3 to 200 tokens (median 20).  Each case makes the batches of a training run with rows of 512 tokens, 64 rows per batch.

For each case the script prints the tokens per second without padding, the median of seven rounds, and the seconds to
prepare an epoch (shuffling and packing) per million tokens.  The last column is the ratio to what one H100 consumes:
475,000 tokens/s of GPT-2 124M, the fastest published run, for causal models, and 700,000 tokens/s of BERT-base, 40% of
the peak, for the others.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

from jaxlm import config
from jaxlm.data.batches import Batches
from jaxlm.data.corpus import Corpus
from jaxlm.tasks.denoising import InfillingTask, SpanCorruptionTask
from jaxlm.tasks.pretraining import CausalLMTask, MaskedLMTask
from jaxlm.tasks.records import RecordExamples

LENGTH, ROWS, VOCABULARY = 512, 64, 30_000
GPT2, BERT = 475_000, 700_000  # tokens per second of one H100
ROUNDS, SECONDS = 7, 0.5


class Placeholder:
    """What tasks read of a tokenizer."""

    bos, eos, cls, sep, mask, size = None, 4, 1, 2, 3, VOCABULARY
    continues = np.arange(VOCABULARY) % 3 == 0
    backend = SimpleNamespace(token_to_id={f"<extra_id_{n}>": 5 + n for n in range(100)}.get)

    def max_text_tokens(self, length: int, pair: bool) -> int:
        """Returns the length of a text without special tokens."""
        return length - 2

    def add_special_tokens(self, tokens: list[int]) -> tuple[list[int], list[int]]:
        """Returns a text with special tokens."""
        return [self.cls, *tokens, self.sep], []


def lengths(median: int, low: int, high: int, total: int) -> np.ndarray:
    """Returns random lengths with a sum of about `total`."""
    random = np.random.default_rng(0)
    sizes = np.exp(random.normal(np.log(median), 0.8, 2 * total // median)).astype(int).clip(low, high)
    return sizes[: np.searchsorted(np.cumsum(sizes), total)]


def corpus(median: int, low: int, high: int, total: int, sentence: int | None = None) -> Corpus:
    """Returns a random corpus of about `total` tokens, with sentences of `sentence` tokens."""
    sizes = lengths(median, low, high, total)
    if sentence is None:
        sentences, documents = sizes, np.ones(len(sizes), int)
    else:
        documents = -(-sizes // sentence)
        sentences = np.concatenate([np.full(n, sentence) for n in documents])
    tokens = np.random.default_rng(1).integers(200, VOCABULARY, sentences.sum()).astype(np.uint16)
    offsets = lambda sizes: np.concatenate([[0], np.cumsum(sizes)])
    return Corpus(tokens, offsets(sentences), offsets(documents), 4 * len(tokens))


def documents(total: int = 4_000_000) -> Corpus:
    return corpus(320, 50, 2_000, total, sentence=20)


def lines(total: int = 1_000_000) -> Corpus:
    return corpus(20, 3, 200, total)


class Numbers:
    """A task over records whose examples are random."""

    labels, predict_fields = ("no", "yes"), ()

    def __init__(self, example: Callable[[int], list[dict[str, Any]]], **fields: type):
        self.example, self.fields = example, fields

    def features(self, records: Any, training: bool) -> Any:
        """Yields the units of each record."""
        return ([self.example(n)] for n in records)


def records(task: Numbers, total: int = 1_000_000) -> RecordExamples:
    return RecordExamples(task, lengths(20, 3, 200, total).tolist(), True)  # type: ignore[arg-type]


def tokens(n: int) -> dict[str, Any]:
    return {"tokens_BT": np.full(n, 7, np.int32), "types_BT": np.zeros(n, np.int32)}


def per_token(n: int) -> list[dict[str, Any]]:
    labels = {"labels_BT": np.full(n, 1, np.int32), "weights_BT": np.ones(n, np.float32)}
    return [tokens(n) | labels]


def source_and_target(n: int) -> list[dict[str, Any]]:
    return [{"source_tokens_BS": np.full(n, 7, np.int32)} | per_token(n)[0]]


def pairs(n: int) -> list[dict[str, Any]]:
    return [tokens(n) | {"labels_BE": np.float32(1), "weights_BE": np.float32(first)} for first in (1, 0)]


def pretraining(task: Any, kind: Any, part: Corpus) -> Batches:
    bound = kind(task, LENGTH, 0, Placeholder())
    if isinstance(bound, SpanCorruptionTask | InfillingTask):
        bound = bound.replace_fields(start=0)
    return bound.batches(part, ROWS, LENGTH, 0)


def fine_tuning(task: Numbers, max_examples: int = LENGTH // 4, source_length: int | None = None) -> Batches:
    return Batches(records(task), ROWS, LENGTH, max_examples, 0, source_length)


CASES: dict[str, tuple[int, Callable[[], Batches]]] = {  # tokens/s of the consumer, and the batches
    "causal, one stream": (GPT2, lambda: pretraining(config.CausalLM(stream=True), CausalLMTask, documents())),
    "causal, documents": (GPT2, lambda: pretraining(config.CausalLM(stream=False), CausalLMTask, documents())),
    "causal, lines": (GPT2, lambda: pretraining(config.CausalLM(stream=False), CausalLMTask, lines())),
    "masked, documents": (BERT, lambda: pretraining(config.MaskedLM(full_sentences=False), MaskedLMTask, documents())),
    "masked, whole sentences": (
        BERT,
        lambda: pretraining(config.MaskedLM(full_sentences=True), MaskedLMTask, documents()),
    ),
    "masked, whole words": (BERT, lambda: pretraining(config.MaskedLM(whole_words=True), MaskedLMTask, documents())),
    "masked, lines": (BERT, lambda: pretraining(config.MaskedLM(full_sentences=False), MaskedLMTask, lines())),
    "masked, next sentence": (
        BERT,
        lambda: pretraining(config.MaskedLM(next_sentence=True), MaskedLMTask, documents()),
    ),
    "span corruption": (BERT, lambda: pretraining(config.SpanCorruption(), SpanCorruptionTask, documents())),
    "infilling": (BERT, lambda: pretraining(config.Infilling(), InfillingTask, documents())),
    "classification": (
        BERT,
        lambda: fine_tuning(Numbers(lambda n: [tokens(n) | {"labels_BE": np.int32(1)}], labels_BE=np.int32)),
    ),
    "tagging": (BERT, lambda: fine_tuning(Numbers(per_token, labels_BT=np.int32, weights_BT=np.float32))),
    "pairs of texts": (BERT, lambda: fine_tuning(Numbers(pairs, labels_BE=np.float32))),
    "source and target": (
        BERT,
        lambda: fine_tuning(
            Numbers(source_and_target, labels_BT=np.int32, weights_BT=np.float32), source_length=LENGTH
        ),
    ),
}


def count(batch: dict[str, Any]) -> int:
    return sum(int((batch[name] > 0).sum()) for name in ("segments_BT", "source_segments_BS") if name in batch)


def measure(batches: Batches) -> tuple[list[float], float]:
    """Returns the tokens per second of each round, and the seconds to prepare a million tokens of an epoch."""
    batches.batch_at(0)
    began = time.perf_counter()
    epoch, _ = batches._make_epoch(1)
    preparing = time.perf_counter() - began
    total = epoch.lengths.sum() + (0 if epoch.source_lengths is None else epoch.source_lengths.sum())
    steps, rates, step = len(batches) - 1, [], 0
    for _ in range(ROUNDS):
        made, seconds = 0, 0.0
        while seconds < SECONDS:
            began = time.perf_counter()
            batch = batches.batch_at(step % steps)
            seconds += time.perf_counter() - began
            made, step = made + count(batch), step + 1
        rates.append(made / seconds)
    return rates, preparing / total * 1e6


def main(names: list[str]) -> None:
    if unknown := [name for name in names if name not in CASES]:
        sys.exit(f"there is no case {unknown[0]!r}; the cases are {', '.join(CASES)}")
    print(f"{'case':24} {'M tokens/s':>10} {'(slowest, fastest)':>20} {'s/M tokens':>11} {'ratio':>7}")
    for name in names or CASES:
        consumer, make = CASES[name]
        rates, preparing = measure(make())
        median = statistics.median(rates)
        bounds = f"({min(rates) / 1e6:.2f}, {max(rates) / 1e6:.2f})"
        print(f"{name:24} {median / 1e6:10.2f} {bounds:>20} {preparing:11.3f} {median / consumer:7.1f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
