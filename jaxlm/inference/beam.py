"""Beam search: a search for the most likely texts that keeps the most likely prefixes of each length.

It returns the same hypotheses as the beam search of transformers. Each step considers at least twice as many candidates
as beams. Those that end and are among the best become hypotheses; the best of the others are the next beams. A prompt
is done when its best open beam scores no better than its worst hypothesis, or earlier by `Decoding.early_stopping`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.inference.decode import Rules, State, mask_unknown, restrict
from jaxlm.nn.transformer import Transformer, apply

NO_SCORE = -1e9  # the score of an empty entry


class Hypotheses(NamedTuple):
    """M texts for each of B prompts, the best first.

    tokens_BMT, log_probs_BMT: of each position, prompt included.
    lengths_BM: with the prompt and the stop token.
    scores_BM: log-probability / (new tokens, stop token included) ** length penalty.
    """

    tokens_BMT: jax.Array
    log_probs_BMT: jax.Array
    lengths_BM: jax.Array
    scores_BM: jax.Array


class _Search(NamedTuple):
    """The state of the search.

    n: number of new tokens of each open beam.
    open: the beams.
    best: the hypotheses.
    caches: of the beams.
    active_B: whether the search of a prompt continues.
    """

    n: jax.Array
    open: Hypotheses
    best: Hypotheses
    caches: Any
    active_B: jax.Array


EARLY = {False: 0, True: 1, "never": 2}  # `Decoding.early_stopping` -> argument of the program


def search_of(module: Transformer) -> Any:
    """Returns the jitted search for a model, which `LM.programs` keeps.

    It is called as (params, state, rules, length_penalty, early, beams=, candidates=) and returns `Hypotheses`. `state`
    has one row for each prompt, `early` is a value of `EARLY`, and `candidates` is the number that each step considers
    for each prompt.
    """
    return jax.jit(partial(_search, module), static_argnames=("beams", "candidates"))


def _search(
    module: Transformer,
    params: Any,
    state: State,
    rules: Rules,
    penalty: jax.Array,
    early: jax.Array,
    *,
    beams: int,
    candidates: int,
) -> Hypotheses:
    B, T = state.tokens_BT.shape
    M, V = beams, module.config.V
    repeat = lambda x: jnp.repeat(x, M, 0)
    flat = lambda x: x.reshape(B * M, *x.shape[2:])
    limits = jax.tree.map(repeat, state._replace(caches=state.caches._replace(own=(), cross=None)))
    new_B = state.limits_B - state.prompt_lengths_B

    prompt_lengths_BM = jnp.broadcast_to(state.prompt_lengths_B[:, None], (B, M))
    tokens_BMT = jnp.broadcast_to(state.tokens_BT[:, None], (B, M, T))
    empty = Hypotheses(tokens_BMT, jnp.zeros((B, M, T)), prompt_lengths_BM, jnp.full((B, M), NO_SCORE))
    # The beams of a prompt are equal at first, so only the first one is extended.
    first = empty._replace(scores_BM=empty.scores_BM.at[:, 0].set(0.0))
    caches = jax.tree.map(repeat, state.caches)
    begin = _Search(jnp.int32(0), first, empty, caches, ~state.done_B)

    def step(now: _Search) -> _Search:
        tokens, last = flat(now.open.tokens_BMT), flat(now.open.lengths_BM)[:, None] - 1
        inputs = jnp.take_along_axis(tokens, last, 1), last
        x, caches = apply(module, params, *inputs, now.caches, method="decode_cached")
        log_probs = jax.nn.log_softmax(mask_unknown(apply(module, params, x[:, 0], method="lm"), rules))
        allowed = restrict(log_probs, tokens, limits._replace(lengths_B=flat(now.open.lengths_BM)), rules)
        total_BMV = allowed.reshape(B, M, V) + now.open.scores_BM[..., None]
        scores_BN, at_BN = jax.lax.top_k(total_BMV.reshape(B, M * V), candidates)
        parent_BN, token_BN = at_BN // V, (at_BN % V).astype(jnp.int32)
        extended = _extend(now.open, parent_BN, token_BN, log_probs.reshape(B, M, V), scores_BN)
        n = now.n + 1
        ends_BN = (token_BN[..., None] == rules.stops_N).any(-1) | (n >= new_B)[:, None]

        # Hypotheses: the earlier ones, and those that end among the first M candidates.
        finished_BN = ends_BN & (jnp.arange(candidates) < M) & now.active_B[:, None]
        final_BN = jnp.where(finished_BN, scores_BN / n.astype(jnp.float32) ** penalty, NO_SCORE)
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), now.best, extended._replace(scores_BM=final_BN))
        best = _take(both, jax.lax.top_k(both.scores_BM, M)[1])

        # Open beams: the first M that do not end.
        open_BN = jnp.where(ends_BN, scores_BN + NO_SCORE, scores_BN)
        order_BM = jax.lax.top_k(open_BN, M)[1]
        open_beams = _take(extended._replace(scores_BM=open_BN), order_BM)
        rows_BM = jnp.take_along_axis(parent_BN, order_BM, 1) + M * jnp.arange(B)[:, None]
        caches = caches._replace(own=jax.tree.map(lambda x: x[rows_BM.reshape(-1)], caches.own))

        # A positive penalty favours long texts: "never" assumes the longest possible text.
        longest_B = jnp.where((early == EARLY["never"]) & (penalty > 0), new_B, n).astype(jnp.float32)
        bound_B = open_beams.scores_BM[:, 0] / longest_B**penalty
        worst_B = best.scores_BM.min(-1)
        full_B = (early == EARLY[True]) & (worst_B > NO_SCORE / 2)
        return _Search(n, open_beams, best, caches, now.active_B & (bound_B > worst_B) & ~full_B & (n < new_B))

    return jax.lax.while_loop(lambda now: now.active_B.any(), step, begin).best


def _take(beams: Hypotheses, at_BM: jax.Array) -> Hypotheses:
    return jax.tree.map(lambda x: jnp.take_along_axis(x, at_BM.reshape(*at_BM.shape, *[1] * (x.ndim - 2)), 1), beams)


def _extend(
    beams: Hypotheses, parent_BN: jax.Array, token_BN: jax.Array, log_probs_BMV: jax.Array, scores_BN: jax.Array
) -> Hypotheses:
    """Returns N candidates for each prompt: beams with one more token."""
    B, N = parent_BN.shape
    parents = _take(beams, parent_BN)
    b, n = jnp.arange(B)[:, None], jnp.arange(N)
    return Hypotheses(
        parents.tokens_BMT.at[b, n, parents.lengths_BM].set(token_BN, mode="drop"),
        parents.log_probs_BMT.at[b, n, parents.lengths_BM].set(log_probs_BMV[b, parent_BN, token_BN], mode="drop"),
        parents.lengths_BM + 1,
        scores_BN,
    )
