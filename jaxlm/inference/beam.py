"""Beam search: the likeliest texts that are found by keeping, at each length, the likeliest beginnings.

It finds what the beam search of transformers finds, hypothesis for hypothesis: of each step's candidates, twice as many
as there are beams, those that end and are among the best become hypotheses, the best others go on; a prompt is done
when its best open beam is worth no more than its worst hypothesis, or by `Decoding.early_stopping` before.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.inference.decode import Rules, State, known, restrict
from jaxlm.nn.transformer import Transformer, apply

NEVER = -1e9  # the score of what is not there


class Found(NamedTuple):
    """The hypotheses of B prompts, M of each, the best first.

    tokens_BMT, log_probs_BMT: of each position, the prompt's too.  lengths_BM: with the prompt and the stop token.
    scores_BM: log-probability / (new tokens, stop token included) ** length penalty.
    """

    tokens_BMT: jax.Array
    log_probs_BMT: jax.Array
    lengths_BM: jax.Array
    scores_BM: jax.Array


class _Search(NamedTuple):
    """n: tokens that there are of each open beam.  open, best: the beams, and the hypotheses.  improves_B: whether a
    prompt continues."""

    n: jax.Array
    open: Found
    best: Found
    caches: Any
    improves_B: jax.Array


EARLY = {False: 0, True: 1, "never": 2}  # `Decoding.early_stopping` -> the number that the program takes


def search_of(module: Transformer) -> Any:
    """Returns the compiled search of a model, which `LM.programs` keeps:
    (params, state, rules, length_penalty, early, beams=, candidates=) -> Found.

    state: of B prompts.  early: of `EARLY`.  candidates: looked at in each step, for each prompt.
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
) -> Found:
    B, T = state.tokens_BT.shape
    M, V = beams, module.config.V
    several = lambda x: jnp.repeat(x, M, 0)
    flat = lambda x: x.reshape(B * M, *x.shape[2:])
    limits = jax.tree.map(several, state._replace(caches=state.caches._replace(own=(), cross=None)))
    new_B = state.limits_B - state.begun_B

    begun_BM = jnp.broadcast_to(state.begun_B[:, None], (B, M))
    tokens_BMT = jnp.broadcast_to(state.tokens_BT[:, None], (B, M, T))
    nothing = Found(tokens_BMT, jnp.zeros((B, M, T)), begun_BM, jnp.full((B, M), NEVER))
    # All beams of a prompt are the same as yet: only the first has followers.
    first = nothing._replace(scores_BM=nothing.scores_BM.at[:, 0].set(0.0))
    caches = jax.tree.map(several, state.caches)
    begin = _Search(jnp.int32(0), first, nothing, caches, ~state.done_B)

    def step(now: _Search) -> _Search:
        tokens, last = flat(now.open.tokens_BMT), flat(now.open.lengths_BM)[:, None] - 1
        read = jnp.take_along_axis(tokens, last, 1), last
        x, caches = apply(module, params, *read, now.caches, method="decode_cached")
        own = jax.nn.log_softmax(known(apply(module, params, x[:, 0], method="lm"), rules))
        allowed = restrict(own, tokens, limits._replace(lengths_B=flat(now.open.lengths_BM)), rules)
        total_BMV = allowed.reshape(B, M, V) + now.open.scores_BM[..., None]
        scores_BN, at_BN = jax.lax.top_k(total_BMV.reshape(B, M * V), candidates)
        parent_BN, token_BN = at_BN // V, (at_BN % V).astype(jnp.int32)
        followed = _following(now.open, parent_BN, token_BN, own.reshape(B, M, V), scores_BN)
        n = now.n + 1
        ends_BN = (token_BN[..., None] == rules.stops_N).any(-1) | (n >= new_B)[:, None]

        # Hypotheses: those that end among the first M candidates, beside those of before.
        counts_BN = ends_BN & (jnp.arange(candidates) < M) & now.improves_B[:, None]
        worth_BN = jnp.where(counts_BN, scores_BN / n.astype(jnp.float32) ** penalty, NEVER)
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), now.best, followed._replace(scores_BM=worth_BN))
        best = _some(both, jax.lax.top_k(both.scores_BM, M)[1])

        # Open beams: the first M that do not end.
        open_BN = jnp.where(ends_BN, scores_BN + NEVER, scores_BN)
        order_BM = jax.lax.top_k(open_BN, M)[1]
        going = _some(followed._replace(scores_BM=open_BN), order_BM)
        rows_BM = jnp.take_along_axis(parent_BN, order_BM, 1) + M * jnp.arange(B)[:, None]
        caches = caches._replace(own=jax.tree.map(lambda x: x[rows_BM.reshape(-1)], caches.own))

        # A positive penalty favours long texts: "never" hopes for the longest one.
        longest_B = jnp.where((early == EARLY["never"]) & (penalty > 0), new_B, n).astype(jnp.float32)
        bound_B = going.scores_BM[:, 0] / longest_B**penalty
        worst_B = best.scores_BM.min(-1)
        full_B = (early == EARLY[True]) & (worst_B > NEVER / 2)
        return _Search(n, going, best, caches, now.improves_B & (bound_B > worst_B) & ~full_B & (n < new_B))

    return jax.lax.while_loop(lambda now: now.improves_B.any(), step, begin).best


def _some(found: Found, at_BM: jax.Array) -> Found:
    return jax.tree.map(lambda x: jnp.take_along_axis(x, at_BM.reshape(*at_BM.shape, *[1] * (x.ndim - 2)), 1), found)


def _following(
    found: Found, parent_BN: jax.Array, token_BN: jax.Array, log_probs_BMV: jax.Array, scores_BN: jax.Array
) -> Found:
    """The beams, each with its token behind it."""
    B, N = parent_BN.shape
    parents = _some(found, parent_BN)
    b, n = jnp.arange(B)[:, None], jnp.arange(N)
    return Found(
        parents.tokens_BMT.at[b, n, parents.lengths_BM].set(token_BN, mode="drop"),
        parents.log_probs_BMT.at[b, n, parents.lengths_BM].set(log_probs_BMV[b, parent_BN, token_BN], mode="drop"),
        parents.lengths_BM + 1,
        scores_BN,
    )
