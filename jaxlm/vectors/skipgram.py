"""Skip-gram with negative sampling, as updates of a few hundred tokens by matrix products.

Each pair of a word and a word of its context minimises

    -log sigmoid(x . y) - K E_z[log sigmoid(-x . z)]

with the vector x of the word, the vector y of the context, and the vectors z of K negative words.  As in pWord2Vec, the
tokens of an update share their negative words, so that the products are matrix products and few rows change.  The
weight of a negative word is K times the number of pairs, divided by the number of shared words: the expectation of the
gradient is that of separate negative words.

Letters: N tokens of a block, W window, C pieces of L tokens, H = L + 2W tokens of a piece and around it, S negative
words, V words, D width.

Sources: Mikolov et al., "Distributed Representations of Words and Phrases and their Compositionality", 2013; Ji et al.,
"Parallelizing Word2Vec in Shared and Distributed Memory", 2016.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config.vectors import PIECE, SkipGramConfig, VectorsConfig
from jaxlm.vectors.training import Arrays, Batch, VectorState, add_rows, for_each_block, take_rows
from jaxlm.vectors.words import WordCorpus

MAX_BATCH = 1 << 16  # tokens of the text in a step
TABLE_BITS = 20  # the table of negative words has at least 2 ** 20 entries
# Limit of the step of a row.  The second derivative of the losses of a row is at most a quarter of the sum of the
# squared norms of the other vectors of its pairs, and gradient descent diverges where the product of the second
# derivative and the learning rate is above 2.  A word that occurs many times in an update would pass this limit, since
# its gradients are summed.
MAX_ROW_STEP = 8.0


class Block(NamedTuple):
    """What an update reads: N tokens and the W tokens before and after them."""

    tokens: jax.Array  # int32 [N + 2W]
    documents: jax.Array  # int32 [N + 2W]; only tokens of one document are a pair
    windows_N: jax.Array  # int32, maximum distance of the context of each token
    negatives_S: jax.Array  # int32


class SkipGram:
    """Trains skip-gram vectors; a `Trainer`.

    A step reads `MAX_BATCH` consecutive tokens of the text, and makes an update for each block of the tokens that
    subsampling keeps.
    """

    unit = "words"

    def __init__(self, run: VectorsConfig, corpus: WordCorpus):
        config = run.skip_gram
        self.config, self.corpus, self.seed, self.width, self.window = config, corpus, run.seed, run.width, run.window
        tokens = len(corpus.tokens_N)
        self._batch = min(MAX_BATCH, tokens)
        self._epoch = -(-tokens // self._batch)  # steps of an epoch
        self.steps = run.epochs * self._epoch
        self._keep_V = keep_rates(corpus.counts_V, config.subsample)
        self._table = jnp.asarray(negative_table(corpus.counts_V, config.exponent))
        self.update = jax.jit(self._update, donate_argnums=0)

    def first_state(self) -> VectorState:
        """See `Trainer.first_state`: small random vectors of words, and zeros for the context."""
        V, D = len(self.corpus.words), self.width
        words = (np.random.default_rng((self.seed, 0)).random((V, D), np.float32) - 0.5) / D
        return VectorState(jnp.int32(0), {"words": jnp.asarray(words), "contexts": jnp.zeros((V, D), jnp.float32)})

    def batch(self, step: int) -> Batch:
        """See `Trainer.batch`.

        The fields are the kept tokens with W tokens of no document on both sides, padded to one size; their documents;
        their number; the number of words that they stand for; and the learning rates at the first and the last one.
        """
        epoch, number = divmod(step, self._epoch)
        chunk = int(np.random.default_rng((self.seed, 1, epoch)).permutation(self._epoch)[number])
        part = slice(chunk * self._batch, (chunk + 1) * self._batch)
        tokens, documents = self.corpus.tokens_N[part], self.corpus.documents_N[part]
        uniform = np.random.default_rng((self.seed, 2, epoch, chunk)).random(len(tokens), np.float32)
        kept = uniform < self._keep_V[tokens]
        size = -(-self._batch // self.config.block) * self.config.block + 2 * self.window
        count, W = int(kept.sum()), self.window
        padded_tokens, padded_documents = np.zeros(size, np.int32), np.full(size, -1, np.int32)
        padded_tokens[W : W + count], padded_documents[W : W + count] = tokens[kept], documents[kept]
        config, done = self.config, np.array([step, step + 1]) / self.steps
        return {
            "tokens": padded_tokens,
            "documents": padded_documents,
            "count": np.int32(count),
            "read": np.int32(len(tokens)),
            "rates": (config.rate + (config.final_rate - config.rate) * done).astype(np.float32),
        }

    def _update(self, state: VectorState, batch: Batch) -> tuple[VectorState, Arrays]:
        config, N, W = self.config, self.config.block, self.window
        blocks, (first, last) = -(-batch["count"] // N), batch["rates"]
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)

        def block(i: jax.Array) -> Block:
            window_key, negative_key = jax.random.split(jax.random.fold_in(key, i))
            windows_N = jax.random.randint(window_key, (N,), 1, W + 1)
            drawn_S = jax.random.bits(negative_key, (config.shared,)) >> (32 - int(math.log2(len(self._table))))
            part = lambda x: jax.lax.dynamic_slice_in_dim(x, i * N, N + 2 * W)
            return Block(part(batch["tokens"]), part(batch["documents"]), windows_N, take_rows(self._table, drawn_S))

        def one_update(params: Arrays, i: jax.Array) -> Arrays:
            rate = first + (last - first) * (i / jnp.maximum(blocks, 1))
            return update_block(config, params, block(i), rate)

        params = for_each_block(one_update, state.params, blocks)
        # The loss of one block of each step is cheap, and the mean over the steps of a line of the log is precise.
        loss, pairs = block_loss(config, params, block(jnp.int32(0)))
        metrics = {"loss": loss / jnp.maximum(pairs, 1), "learning_rate": last}
        return VectorState(state.step + 1, params), metrics

    def vectors(self, state: VectorState) -> np.ndarray:
        """See `Trainer.vectors`."""
        return np.asarray(state.params["words"])


def keep_rates(counts_V: np.ndarray, threshold: float) -> np.ndarray:
    """Returns the probability that subsampling keeps a word, float32 [V].

    Args:
      counts_V: number of occurrences of each word.
      threshold: fraction of the text above which words are dropped; 0: all are kept.

    Source: the implementation of word2vec, whose formula differs from that of the paper.
    """
    if not threshold:
        return np.ones(len(counts_V), np.float32)
    ratio_V = threshold * counts_V.sum() / counts_V
    return np.minimum(1, np.sqrt(ratio_V) + ratio_V).astype(np.float32)


def negative_table(counts_V: np.ndarray, exponent: float) -> np.ndarray:
    """Returns words, each as often as negative sampling selects it, int32 [a power of two].

    Args:
      counts_V: number of occurrences of each word.
      exponent: a word is selected in proportion to its count to this power.
    """
    size = 1 << max(TABLE_BITS, math.ceil(math.log2(16 * len(counts_V))))
    weights_V = (counts_V / counts_V.max()) ** exponent
    ends_V = np.cumsum(weights_V) / weights_V.sum()
    return np.searchsorted(ends_V[:-1], (np.arange(size) + 0.5) / size, side="right").astype(np.int32)


class _Pairs(NamedTuple):
    """The vectors of a block and its pairs."""

    x_CLD: jax.Array  # of the tokens
    y_CHD: jax.Array  # of the tokens and those around each piece
    z_SD: jax.Array  # of the negative words
    is_pair_CLH: jax.Array
    negative_CL: jax.Array  # weight of each negative word for a token: its pairs * K / S


def _pairs(config: SkipGramConfig, params: Arrays, block: Block) -> _Pairs:
    N, L = len(block.windows_N), PIECE
    W = (len(block.tokens) - N) // 2
    H = L + 2 * W
    # Row c has the tokens of piece c and the W tokens on both sides of it.
    places_CH = np.arange(0, N, L)[:, None] + np.arange(H)
    x_CLD = take_rows(params["words"], block.tokens[W : W + N]).reshape(N // L, L, -1)
    y_CHD = take_rows(params["contexts"], block.tokens)[places_CH]
    distance_LH = np.abs(np.arange(H) - W - np.arange(L)[:, None])
    documents_CL = block.documents[W : W + N].reshape(-1, L)
    is_pair_CLH = block.documents[places_CH][:, None] == documents_CL[:, :, None]
    is_pair_CLH &= (distance_LH <= block.windows_N.reshape(-1, L, 1)) & (distance_LH > 0)
    is_pair_CLH &= documents_CL[:, :, None] >= 0  # padding
    negative_CL = is_pair_CLH.sum(-1) * (config.negatives / config.shared)
    return _Pairs(x_CLD, y_CHD, take_rows(params["contexts"], block.negatives_S), is_pair_CLH, negative_CL)


def block_loss(config: SkipGramConfig, params: Arrays, block: Block) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of the losses of the pairs of a block, and their number.

    Args:
      config: the number of negative words.
      params: "words" and "contexts" [V, D].
      block: the tokens.
    """
    pairs = _pairs(config, params, block)
    positive_CLH = jax.nn.softplus(-jnp.einsum("cld,chd->clh", pairs.x_CLD, pairs.y_CHD))
    negative_CLS = jax.nn.softplus(jnp.einsum("cld,sd->cls", pairs.x_CLD, pairs.z_SD))
    loss = (positive_CLH * pairs.is_pair_CLH).sum() + (negative_CLS * pairs.negative_CL[..., None]).sum()
    return loss, pairs.is_pair_CLH.sum()


def update_block(
    config: SkipGramConfig, params: Arrays, block: Block, rate: jax.Array, max_step: float = MAX_ROW_STEP
) -> Arrays:
    """Returns the vectors after a step of gradient descent on the sum of the losses of a block.

    Args:
      config: the number of negative words.
      params: "words" and "contexts" [V, D].
      block: the tokens.
      rate: the learning rate.
      max_step: the rate of a row is reduced so that its product with the sum of the squared norms of the other vectors
        of its pairs is at most this; a norm below 1 counts as 1.
    """
    N, D = len(block.windows_N), params["words"].shape[1]
    W = (len(block.tokens) - N) // 2
    x_CLD, y_CHD, z_SD, is_pair_CLH, negative_CL = _pairs(config, params, block)
    logits_CLH = jnp.einsum("cld,chd->clh", x_CLD, y_CHD)
    positive_CLH = jnp.where(is_pair_CLH, jax.nn.sigmoid(-logits_CLH), 0)  # the negative derivative of the loss
    negative_CLS = -jax.nn.sigmoid(jnp.einsum("cld,sd->cls", x_CLD, z_SD)) * negative_CL[..., None]
    dx_CLD = jnp.einsum("clh,chd->cld", positive_CLH, y_CHD) + jnp.einsum("cls,sd->cld", negative_CLS, z_SD)
    dy = _overlap_add(jnp.einsum("clh,cld->chd", positive_CLH, x_CLD), W)
    dz_SD = jnp.einsum("cls,cld->sd", negative_CLS, x_CLD)
    x2_CL, y2_CH, z2_S = (jnp.maximum(1, (x**2).sum(-1)) for x in (x_CLD, y_CHD, z_SD))
    is_one_CLH = is_pair_CLH.astype(jnp.float32)
    weights_N = (jnp.einsum("clh,ch->cl", is_one_CLH, y2_CH) + negative_CL * z2_S.sum()).reshape(N)
    weights_Y = _overlap_add(jnp.einsum("clh,cl->ch", is_one_CLH, x2_CL)[..., None], W)[:, 0]
    weights_S = jnp.full(config.shared, (negative_CL * x2_CL).sum())
    step = partial(_step_rows, rate=rate, max_step=max_step)
    return {
        "words": step(params["words"], block.tokens[W : W + N], dx_CLD.reshape(N, D), weights_N),
        "contexts": step(
            params["contexts"],
            jnp.concatenate([block.tokens, block.negatives_S]),
            jnp.concatenate([dy, dz_SD]),
            jnp.concatenate([weights_Y, weights_S]),
        ),
    }


def _step_rows(
    table: jax.Array, ids_N: jax.Array, rows_ND: jax.Array, weights_N: jax.Array, rate: Any, max_step: float
) -> jax.Array:
    """Returns a table after a step of its rows `ids_N`, whose rate is limited by the sum of their weights."""
    totals_V = add_rows(jnp.zeros(len(table), jnp.float32), ids_N, weights_N)
    rates_N = rate / jnp.maximum(1, rate * take_rows(totals_V, ids_N) / max_step)
    return add_rows(table, ids_N, rates_N[:, None] * rows_ND)


def _overlap_add(x_CHD: jax.Array, W: int) -> jax.Array:
    """Returns the sum of the rows of overlapping pieces [N + 2W, D]; piece c begins at row c * (H - 2W).

    The sum consists of the middle of each piece and its two margins of W rows, which belong to its neighbours.
    """
    C, H, D = x_CHD.shape
    L = H - 2 * W
    if W > L:  # a margin reaches beyond the next piece
        rows = (np.arange(C)[:, None] * L + np.arange(H)).reshape(-1)
        return jnp.zeros((C * L + 2 * W, D)).at[rows].add(x_CHD.reshape(-1, D))
    join = lambda part_CXD, before, after: jnp.pad(part_CXD.reshape(C * L, D), ((before, after), (0, 0)))
    left = join(jnp.pad(x_CHD[:, :W], ((0, 0), (0, L - W), (0, 0))), 0, 2 * W)
    right = join(jnp.pad(x_CHD[:, L + W :], ((0, 0), (L - W, 0), (0, 0))), 2 * W, 0)
    return join(x_CHD[:, W : W + L], W, W) + left + right
