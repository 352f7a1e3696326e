"""A linear-chain conditional random field (Lafferty et al. 2001) over the words of packed examples.

The score of the tags of an example is the sum of the scores of its words' tags, of neighbouring tags, and of the first
and the last tag. Only the positions of words take part; positions between them are skipped.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Transitions(NamedTuple):
    """Scores of tags that do not depend on the words.

    start_N, end_N: of the first and the last tag of an example.
    pairs_NN: of a tag (first axis) and the next one.
    """

    start_N: jax.Array
    end_N: jax.Array
    pairs_NN: jax.Array


class Words(NamedTuple):
    """Where the words are.

    words_BT: whether a position is that of a word.
    first_BT, last_BT: whether the word is the first or the last one of its example.
    before_BT: position of the word before; undefined for a first word.
    """

    words_BT: jax.Array
    first_BT: jax.Array
    last_BT: jax.Array
    before_BT: jax.Array


def find_words(words_BT: jax.Array, segments_BT: jax.Array) -> Words:
    """Returns where the words of each example are.

    Args:
      words_BT: whether a position is that of a word.
      segments_BT: number of each position's example.
    """
    T = jnp.arange(words_BT.shape[1])
    latest_BT = jax.lax.cummax(jnp.where(words_BT, T, -1), 1)
    before_BT = jnp.pad(latest_BT, [(0, 0), (1, 0)], constant_values=-1)[:, :-1]
    earliest_BT = jax.lax.cummin(jnp.where(words_BT, T, len(T)), 1, reverse=True)
    after_BT = jnp.pad(earliest_BT, [(0, 0), (0, 1)], constant_values=len(T))[:, 1:]
    example_at = lambda at_BT: jnp.take_along_axis(segments_BT, jnp.clip(at_BT, 0, len(T) - 1), 1)
    first_BT = (before_BT < 0) | (example_at(before_BT) != segments_BT)
    last_BT = (after_BT == len(T)) | (example_at(after_BT) != segments_BT)
    return Words(words_BT, words_BT & first_BT, words_BT & last_BT, jnp.maximum(before_BT, 0))


def path_scores(logits_BTN: jax.Array, tags_BT: jax.Array, words: Words, transitions: Transitions) -> jax.Array:
    """Returns the score of the given tags, [B]: the sum over the examples of a row."""
    start_N, end_N, pairs_NN = transitions
    of_tag_BT = jnp.take_along_axis(logits_BTN, tags_BT[..., None], 2)[..., 0]
    of_pair_BT = pairs_NN[jnp.take_along_axis(tags_BT, words.before_BT, 1), tags_BT]
    of_pair_BT = jnp.where(words.first_BT, start_N[tags_BT], of_pair_BT)
    scores_BT = of_tag_BT + of_pair_BT + jnp.where(words.last_BT, end_N[tags_BT], 0)
    return jnp.where(words.words_BT, scores_BT, 0).sum(1)


def log_partition(logits_BTN: jax.Array, words: Words, transitions: Transitions) -> jax.Array:
    """Returns the logarithm of the sum of exp(score) over all tags, [B]: the sum over the examples of a row.

    Its derivative by the logits is the probability of each tag of each word.
    """
    start_N, end_N, pairs_NN = transitions

    def step(alpha_BN: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        logits_BN, word_B, first_B, last_B = now
        next_BN = jax.nn.logsumexp(alpha_BN[:, :, None] + pairs_NN, 1)
        next_BN = jnp.where(first_B[:, None], start_N, next_BN) + logits_BN
        alpha_BN = jnp.where(word_B[:, None], next_BN, alpha_BN)
        return alpha_BN, jnp.where(last_B, jax.nn.logsumexp(alpha_BN + end_N, -1), 0)

    return jax.lax.scan(step, jnp.zeros_like(logits_BTN[:, 0]), _by_time(logits_BTN, words))[1].sum(0)


def viterbi(logits_BTN: jax.Array, words: Words, transitions: Transitions) -> jax.Array:
    """Returns the tags [B, T] of the words with the highest score of each example (Viterbi 1967)."""
    start_N, end_N, pairs_NN = transitions
    N = len(start_N)

    def step(best_BN: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits_BN, word_B, first_B, _ = now
        scores_BNN = best_BN[:, :, None] + pairs_NN
        next_BN = jnp.where(first_B[:, None], start_N, scores_BNN.max(1)) + logits_BN
        back_BN = jnp.where(word_B[:, None], scores_BNN.argmax(1), jnp.arange(N))  # the tag of the word before
        best_BN = jnp.where(word_B[:, None], next_BN, best_BN)
        return best_BN, (back_BN, (best_BN + end_N).argmax(-1))

    times = _by_time(logits_BTN, words)
    _, (back_TBN, end_TB) = jax.lax.scan(step, jnp.zeros_like(logits_BTN[:, 0]), times)

    def follow(next_B: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        back_BN, end_B, last_B = now
        tag_B = jnp.where(last_B, end_B, next_B)
        return jnp.take_along_axis(back_BN, tag_B[:, None], 1)[:, 0], tag_B

    xs = back_TBN, end_TB, times[3]
    return jax.lax.scan(follow, jnp.zeros_like(end_TB[0]), xs, reverse=True)[1].T.astype(jnp.int32)


def marginals(logits_BTN: jax.Array, words: Words, transitions: Transitions) -> jax.Array:
    """Returns the probability of each tag of each word, [B, T, N]."""
    return jax.grad(lambda logits_BTN: log_partition(logits_BTN, words, transitions).sum())(logits_BTN)


def _by_time(logits_BTN: jax.Array, words: Words) -> tuple[jax.Array, ...]:
    arrays = logits_BTN, words.words_BT, words.first_BT, words.last_BT
    return tuple(jnp.moveaxis(array, 1, 0) for array in arrays)
