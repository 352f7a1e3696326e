"""GloVe: vectors whose products are the logarithms of counts of co-occurrences.

For each pair of words with the count x, the loss is

    f(x) (w . c + b + d - log x) ** 2 / 2,    f(x) = min(1, (x / max_count) ** exponent)

with the vector w and the bias b of the word, and the vector c and the bias d of its context.  AdaGrad minimises it as
in the implementation of the paper: the sums of squares start at 1 and contain the learning rate.

Letters: E pairs of words, V words, D width.

Source: Pennington et al., "GloVe: Global Vectors for Word Representation", 2014.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config.vectors import GloVeConfig, VectorsConfig
from jaxlm.errors import UserError
from jaxlm.vectors.cooccurrence import count_pairs
from jaxlm.vectors.training import Arrays, Batch, VectorState, add_rows, for_each_block, take_rows
from jaxlm.vectors.words import WordCorpus

MAX_BATCH = 1 << 17  # pairs of words in a step
TABLES = ("words", "contexts", "word_biases", "context_biases")


class GloVe:
    """Trains GloVe vectors; a `Trainer`."""

    unit = "counts"

    def __init__(self, run: VectorsConfig, corpus: WordCorpus):
        self.config, self.corpus, self.seed, self.width = run.glove, corpus, run.seed, run.width
        self.pairs = count_pairs(corpus, run.window)
        count = len(self.pairs.counts_E)
        if not count:
            raise UserError(
                "no two words of the data occur in one document; give longer documents (--data.documents file)"
            )
        block = self.config.block
        self._batch = min(max(1, MAX_BATCH // block), -(-count // block)) * block
        self._epoch = -(-count // self._batch)
        self.steps = run.epochs * self._epoch
        self._order: tuple[int, np.ndarray] | None = None
        self.update = jax.jit(self._update, donate_argnums=0)

    def first_state(self) -> VectorState:
        """See `Trainer.first_state`: small random vectors and biases, and sums of squares of 1."""
        random, V, D = np.random.default_rng((self.seed, 0)), len(self.corpus.words), self.width
        shapes = {"words": (V, D), "contexts": (V, D), "word_biases": (V,), "context_biases": (V,)}
        params = {name: (random.random(shape, np.float32) - 0.5) / D for name, shape in shapes.items()}
        params |= {f"{name}_squares": np.ones(shape, np.float32) for name, shape in shapes.items()}
        return VectorState(jnp.int32(0), {name: jnp.asarray(table) for name, table in params.items()})

    def batch(self, step: int) -> Batch:
        """See `Trainer.batch`.  The last batch of an epoch is padded with pairs of the weight 0."""
        epoch, number = divmod(step, self._epoch)
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.pairs.counts_E)).astype(np.int32)
            self._order = epoch, order
        part_E = self._order[1][number * self._batch : (number + 1) * self._batch]
        padding = (0, self._batch - len(part_E))
        weights_E = pair_weights(self.config, self.pairs.counts_E[part_E])
        return {
            "rows_E": np.pad(self.pairs.rows_E[part_E], padding),
            "columns_E": np.pad(self.pairs.columns_E[part_E], padding),
            "logs_E": np.pad(np.log(self.pairs.counts_E[part_E]), padding),
            "weights_E": np.pad(weights_E, padding),
            "read": np.int32(len(part_E)),
        }

    def _update(self, state: VectorState, batch: Batch) -> tuple[VectorState, Arrays]:
        size = self.config.block

        def one_update(carry: tuple[Arrays, jax.Array], i: jax.Array) -> tuple[Arrays, jax.Array]:
            params, total = carry
            part = {name: jax.lax.dynamic_slice_in_dim(x, i * size, size) for name, x in batch.items() if x.ndim}
            params, loss = update_block(self.config, params, part)
            return params, total + loss

        blocks = jnp.int32(self._batch // size)
        params, loss = for_each_block(one_update, (state.params, jnp.float32(0)), blocks)
        metrics = {"loss": loss / batch["read"], "learning_rate": jnp.float32(self.config.rate)}
        return VectorState(state.step + 1, params), metrics

    def vectors(self, state: VectorState) -> np.ndarray:
        """See `Trainer.vectors`: the sum of the vectors as word and as context, as in the paper."""
        return np.asarray(state.params["words"]) + np.asarray(state.params["contexts"])


def pair_weights(config: GloVeConfig, counts_E: np.ndarray) -> np.ndarray:
    """Returns the weights f(x) of counts, float32 [E]."""
    return np.minimum(1, (counts_E / config.max_count) ** config.exponent).astype(np.float32)


def block_loss(params: Arrays, block: Batch) -> jax.Array:
    """Returns the sum of the losses of the pairs of a block.

    Args:
      params: "words" and "contexts" [V, D], "word_biases" and "context_biases" [V].
      block: "rows_E", "columns_E", "logs_E" and "weights_E".
    """
    w_ED, c_ED, b_E, d_E = _rows(params, block)
    error_E = (w_ED * c_ED).sum(-1) + b_E + d_E - block["logs_E"]
    return (block["weights_E"] * error_E**2).sum() / 2


def _rows(params: Arrays, block: Batch) -> list[jax.Array]:
    ids = block["rows_E"], block["columns_E"], block["rows_E"], block["columns_E"]
    return [take_rows(params[name], ids_E) for name, ids_E in zip(TABLES, ids)]


def update_block(config: GloVeConfig, params: Arrays, block: Batch) -> tuple[Arrays, jax.Array]:
    """Returns the tables after a step of AdaGrad, and the sum of the losses before it.

    Args:
      config: the learning rate.
      params: as in `block_loss`, and for each table the sums of squares, under its name and "_squares".
      block: as in `block_loss`.
    """
    w_ED, c_ED, b_E, d_E = _rows(params, block)
    error_E = (w_ED * c_ED).sum(-1) + b_E + d_E - block["logs_E"]
    slope_E = config.rate * block["weights_E"] * error_E
    steps = slope_E[:, None] * c_ED, slope_E[:, None] * w_ED, slope_E, slope_E
    ids = block["rows_E"], block["columns_E"], block["rows_E"], block["columns_E"]
    new = {}
    for name, ids_E, step in zip(TABLES, ids, steps):
        squares = add_rows(params[f"{name}_squares"], ids_E, step**2)
        new[f"{name}_squares"] = squares
        new[name] = add_rows(params[name], ids_E, -step * jax.lax.rsqrt(take_rows(squares, ids_E)))
    return new, (block["weights_E"] * error_E**2).sum() / 2
