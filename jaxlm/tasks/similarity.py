"""Similarity: vectors of texts whose cosine is the similarity of the texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import config
from jaxlm.config.ranges import short_repr
from jaxlm.data.batches import Batch
from jaxlm.data.formats.lines import Place, Row
from jaxlm.data.formats.rows import Columns
from jaxlm.data.joined import Features
from jaxlm.errors import UserError
from jaxlm.nn.losses import Sum, squared_error
from jaxlm.nn.transformer import Transformer
from jaxlm.tasks import metrics
from jaxlm.tasks.cells import Record, text_of
from jaxlm.tasks.labels import parse_number
from jaxlm.tasks.records import HeadTask, Outputs, add_special_tokens
from jaxlm.tasks.states import HeadLogits, example_states
from jaxlm.tasks.task import register


class SimilarityTask(HeadTask):
    """`config.Similarity`.

    A unit contains the two texts of a pair, which do not attend to each other; the first has the label.  Objectives:

    cosine: the squared difference of the cosine of a pair and its score (Reimers & Gurevych 2019).
    contrastive: the cross-entropy of the right second text among those of all pairs of the micro-batch, over all
    devices (van den Oord et al. 2018).
    """

    head = None
    remedies: Mapping[str, tuple[str, str]] = {
        "T": ("pairs", "raise --data.length, which includes both texts of a pair")
    }
    task: config.Similarity

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self.cosine = self.task.objective == "cosine"
        self.scores = ("spearman", "pearson") if self.cosine else ("mrr", "recall@1", "recall@5", "recall@10")
        self.fields: Mapping[str, Any] = {"labels_BE": np.float32}

    @classmethod
    def columns(cls, task: config.Similarity, labelled: bool) -> Columns:
        label = (task.label,) if task.objective == "cosine" else ()
        return Columns((*task.text, *(label if labelled else ())), label, class_names=False)

    @classmethod
    def read(cls, task: config.Similarity, row: Row, place: Place) -> Record:
        record: Record = {"texts": tuple(text_of(row, name, place) for name in task.text)}
        value = row.get(task.label)
        if task.objective == "contrastive":
            return record | {"label": 1.0}
        if value is None or value == "":
            return record
        label = parse_number(value, place, task.label)
        if not math.isfinite(label) or not task.lowest <= label <= task.highest:
            raise UserError(
                f"{place}: column {task.label!r} holds {short_repr(value)}; a score must be from {task.lowest:g} to "
                f"{task.highest:g}: set --task.lowest and --task.highest"
            )
        return record | {"label": (label - task.lowest) / (task.highest - task.lowest)}

    @classmethod
    def texts(cls, record: Record) -> Iterable[str]:
        return record["texts"]

    def features(self, records: Sequence[Record], training: bool) -> Iterator[list[list[Features]]]:
        texts = [text for record in records for text in record["texts"]]
        features = add_special_tokens(self.tokenizer, texts, None, self.length // 2)
        for record in records:
            pair = []
            for first in (True, False):
                label = np.float32(record.get("label", 0) if first else 0)
                pair.append(next(features) | {"labels_BE": label, "weights_BE": np.float32(first)})
            yield [pair]

    def logits(
        self, module: Transformer, params: Any, x_BTD: jax.Array, batch: Batch, key: jax.Array | None
    ) -> jax.Array:
        """Returns vectors [B, E, D] of Euclidean length 1."""
        parts = [example_states(x_BTD, batch, mode) for mode in self.pooling.modes]
        v_BED = jnp.concatenate(parts, -1).astype(jnp.float32)
        return v_BED * jax.lax.rsqrt(jnp.maximum((v_BED**2).sum(-1, keepdims=True), 1e-24))

    def loss(self, logits: jax.Array, batch: Batch, training: bool) -> Sum:
        compared = self.compared(logits, batch)
        if self.cosine:
            labels_BE = batch["labels_BE"][:, 0 : logits.shape[1] - 1 : 2]
            return squared_error(compared.logits[..., 0], labels_BE, compared.weights)
        scores_PQ, weights_P = compared.logits, compared.weights
        loss_P = jax.nn.logsumexp(scores_PQ, axis=-1) - jnp.diagonal(scores_PQ)
        return jnp.where(weights_P > 0, loss_P, 0).sum(), weights_P.sum()

    def compared(self, logits: jax.Array, batch: Batch) -> HeadLogits:
        """Returns the cosines of pairs [B, P, 1], or the scores of all second texts for each first text [P, P]."""
        # The two texts of a pair follow each other, so the examples of a row are pairs.
        _, E, D = logits.shape
        first_BED, second_BED = logits[:, 0 : E - 1 : 2], logits[:, 1:E:2]
        weights_BE = batch["weights_BE"][:, 0 : E - 1 : 2]
        if self.cosine:
            return HeadLogits((first_BED * second_BED).sum(-1, keepdims=True), weights_BE, "numbers")
        weights_P = weights_BE.reshape(-1)
        cosines_PQ = jnp.einsum("PD,QD->PQ", first_BED.reshape(-1, D), second_BED.reshape(-1, D), precision="highest")
        return HeadLogits(jnp.where(weights_P > 0, cosines_PQ / self.task.temperature, -1e30), weights_P)

    def outputs(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        return {"vector_BED": logits}

    def predict(self, record: Record, outputs: Outputs) -> Row:
        """Returns the score of the pair in the units of the label column, or the cosine (objective "contrastive")."""
        a_D, b_D = (arrays["vector_BED"] for arrays in outputs[0])
        cosine = float(a_D @ b_D)
        score = self.task.lowest + cosine * (self.task.highest - self.task.lowest) if self.cosine else cosine
        return {"prediction": score, "_cosine": cosine, "_vectors": (a_D, b_D)}

    def score(self, records: Sequence[Record], predictions: Sequence[Row]) -> dict[str, float]:
        if self.cosine:
            return metrics.regression_scores([r["label"] for r in records], [p["_cosine"] for p in predictions])
        if not records:
            return metrics.retrieval_scores([])
        queries_ND, texts_ND = (np.array([p["_vectors"][side] for p in predictions]) for side in (0, 1))
        # A text that occurs in several pairs is one document, which is right for each of them.
        _, unique, of_query_N = np.unique([r["texts"][1] for r in records], return_index=True, return_inverse=True)
        chunks = (slice(start, start + 1024) for start in range(0, len(of_query_N), 1024))
        ranks = [metrics.ranks(queries_ND[chunk] @ texts_ND[unique].T, of_query_N[chunk]) for chunk in chunks]
        return metrics.retrieval_scores(np.concatenate(ranks))


register(config.Similarity, SimilarityTask)
