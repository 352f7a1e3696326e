"""Permutation language modelling: targets in a random order, which a query stream predicts (Yang et al. 2019).

A text can attend to the preceding tokens of its document (segment recurrence, section 2.4). A row contains these tokens
before the text, and their hidden states are computed with the current parameters. So a batch depends on its step alone,
unlike one that reads states which an earlier step has stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import config
from jaxlm.data.batches import Batch, Batches, Epoch
from jaxlm.data.corpus import Corpus
from jaxlm.data.corrupt import Draws, prediction_order
from jaxlm.data.joined import Features, Joined, offsets, ranges
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.lm import LM
from jaxlm.nn.losses import Losses
from jaxlm.nn.masks import permutation_masks
from jaxlm.nn.stack import Targets
from jaxlm.nn.transformer import Transformer
from jaxlm.tasks.pretraining import epoch_seed, pieces
from jaxlm.tasks.states import HeadLogits, VocabularyStates, token_losses
from jaxlm.tasks.task import EvalResult, Task, perplexity, register


class PermutedLMTask(Task):
    """`config.PermutedLM`: each target attends to the tokens that are no targets, and to the targets before it."""

    head, scores = "lm", ("loss", "accuracy")

    def __init__(
        self, task: config.PermutedLM, length: int, seed: int, tokenizer: Tokenizer, labels: tuple[str, ...] = ()
    ):
        self.task, self.length, self.seed = task, length, seed
        text = -1  # a placeholder
        self.frame, self.frame_types, (self.before,) = tokenizer.add_special_tokens([text])
        if len(self.frame) == 1:
            # A target of a text without other tokens would have no key to attend to.
            raise UserError(
                "the tokenizer adds no special tokens to a text, and permutation language modelling needs at least "
                "one, such as <sep> <cls>; train one with --tokenizer.train wordpiece or load XLNet's"
            )
        self.longest = tokenizer.max_text_tokens(length, pair=False) - task.memory
        if self.longest < 1:
            raise UserError(
                f"task.memory is {task.memory}, which leaves no space for a text in a row of {length} tokens; lower it "
                f"to at most {self.longest + task.memory - 1}, or raise --data.length"
            )
        self.max_examples = max(4, length // 16)
        # An upper bound for a row: a text has at most its fraction of targets and one more.
        self.targets = min(length, math.ceil(task.rate * length) + self.max_examples)

    def examples(self, corpus: Corpus, training: bool) -> PermutedExamples:
        return PermutedExamples(self, corpus, training)

    def more_inputs(self, batch: Batch) -> dict[str, Any]:
        places_BQ, _, _ = self._targets(batch)
        mask_BTS, mask_BQS = permutation_masks(batch["order_BT"], batch["segments_BT"], places_BQ)
        memory_BT = batch["order_BT"] < 0 if self.task.memory else None
        return {"mask_BTS": mask_BTS, "targets": Targets(places_BQ, mask_BQS, memory_BT)}

    def losses_from_states(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> Losses:
        """Returns the losses from the hidden states of the targets [B, Q, D]."""
        _, weights_BQ, labels_BQ = self._targets(batch)
        smoothing = self.task.label_smoothing if key is not None else 0.0
        return token_losses(module, params, x_BTD, labels_BQ, weights_BQ, smoothing), {}

    def _targets(self, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the places, weights and tokens of the targets [B, Q]; the weight is 0 after the last target."""
        order_BT = batch["order_BT"]
        places_BQ = jnp.argsort(order_BT <= 0, axis=1, stable=True)[:, : self.targets]
        weights_BQ = jnp.take_along_axis(order_BT > 0, places_BQ, 1).astype(jnp.float32)
        return places_BQ, weights_BQ, jnp.take_along_axis(batch["tokens_BT"], places_BQ, 1)

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        return {"loss": (batch["order_BT"] > 0).sum().astype(jnp.float32)}

    def predicted(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> dict[str, HeadLogits | VocabularyStates]:
        places_BQ, weights_BQ, _ = self._targets(batch)
        return {"loss": VocabularyStates(x_BTD, weights_BQ, places_BT=places_BQ)}

    def measure(
        self, lm: LM, run_eval: Callable[[Any], EvalResult], batches: Batches, part: Corpus
    ) -> tuple[dict[str, float], Any]:
        means = run_eval(batches).means
        return {"loss": means["loss"], "perplexity": perplexity(means["loss"]), **means}, None


class PermutedExamples:
    """Pieces of documents with special tokens and memory, with other targets and another order in each epoch."""

    fields: Mapping[str, type] = {"order_BT": np.int32, "types_BT": np.int32}
    labels = 0

    def __init__(self, task: PermutedLMTask, corpus: Corpus, training: bool):
        self.task, self.corpus, self.training = task, corpus, training
        self.spans = pieces(corpus.bounds, task.longest)
        document = np.searchsorted(corpus.bounds, self.spans[:, 0], side="right") - 1
        self.memory = np.minimum(task.task.memory, self.spans[:, 0] - corpus.bounds[document])  # tokens before a piece

    def epoch(self, n: int | None) -> Epoch:
        seed = epoch_seed(self.task.seed, self.training, n)
        lengths = self.memory + self.spans[:, 1] - self.spans[:, 0] + len(self.task.frame) - 1
        return Epoch(lengths, partial(self._features, seed))

    def _features(self, seed: tuple[int, ...], units: np.ndarray) -> Joined:
        task, (starts, ends) = self.task, self.spans[units].T
        sizes, memory, before = ends - starts, self.memory[units], task.before
        after = len(task.frame) - 1 - before
        lengths = memory + sizes + before + after
        bounds = offsets(lengths)
        is_text, is_memory = np.zeros((2, bounds[-1]), bool)
        is_memory[ranges(bounds[:-1], memory)] = True
        is_text[ranges(bounds[:-1] + memory + before, sizes)] = True
        features: Features = {}
        for name, frame in (("tokens_BT", task.frame), ("types_BT", task.frame_types)):
            values = np.full(len(is_text), frame[before], np.int32)
            values[(bounds[:-1] + memory)[:, None] + np.arange(before)] = frame[:before]
            values[bounds[1:, None] - np.arange(after, 0, -1)] = frame[before + 1 :]
            features[name] = values
        tokens = np.asarray(self.corpus.tokens)
        features["tokens_BT"][is_text] = tokens[ranges(starts, sizes)]
        features["tokens_BT"][is_memory] = tokens[ranges(starts - memory, memory)]
        features["order_BT"] = np.where(is_memory, np.int32(-1), np.int32(0))
        options: dict[str, Any] = {"rate": task.task.rate, "longest": task.task.max_span}
        features["order_BT"][is_text] = prediction_order(sizes, Draws(seed, units), **options)
        return Joined(lengths, features)


register(config.PermutedLM, PermutedLMTask)
