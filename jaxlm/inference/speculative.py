"""Speculative decoding (Leviathan et al. 2023): a small model drafts tokens, and the large one checks several at once.

The texts have exactly the distribution of the large model. With greedy decoding they are the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.inference.decode import (
    DecodePrograms,
    Prompts,
    Rules,
    State,
    draw,
    insert,
    mask_unknown,
    prefill,
    restrict,
    shard_state,
    uniform,
    weights,
    write,
)
from jaxlm.nn.transformer import Transformer, apply

DRAFTED = 4  # tokens that are drafted at once
DRAFT, ACCEPT, CORRECT = 1, 2, 3  # uses of a random number


def speculative(module: Transformer, draft: Transformer) -> DecodePrograms:
    """Returns the programs of `decode.programs` for a model with a draft.

    Parameters and caches are pairs: (model, draft). `n` of `advance` is the number of rounds; a round adds 1 to
    `DRAFTED` + 1 tokens.
    """
    return DecodePrograms(
        jax.jit(partial(_prefill, module, draft), static_argnames=("length", "scored", "cache")),
        jax.jit(partial(_advance, module, draft), donate_argnums=1),
        jax.jit(insert, donate_argnums=0),
    )


def _prefill(
    module: Transformer,
    draft: Transformer,
    params: Any,
    prompts: Prompts,
    *,
    length: int,
    scored: bool = False,
    cache: str = "compute",
) -> State:
    room: Any = {"length": length, "ahead": DRAFTED + 1, "cache": cache}
    state = prefill(module, params[0], prompts, scored=scored, **room)
    caches: Any = state.caches, prefill(draft, params[1], prompts, **room).caches
    return state._replace(caches=caches)


def _advance(module: Transformer, draft: Transformer, params: Any, state: State, rules: Rules, n: jax.Array) -> State:
    def running(carry: tuple[jax.Array, State]) -> jax.Array:
        i, state = carry
        return (i < n) & ~state.done_B.all()

    def step(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        return carry[0] + 1, _round(module, draft, params, carry[1], rules)

    return shard_state(module, jax.lax.while_loop(running, step, (jnp.int32(0), state))[1])


def _round(module: Transformer, draft: Transformer, params: Any, state: State, rules: Rules) -> State:
    B, caches = len(state.lengths_B), state.caches
    own, drafts = caches[0], caches[1]
    rows_B, begin_B = jnp.arange(B), state.lengths_B
    share_BV = lambda logits_BV: _normalise(weights(logits_BV, rules))
    number = lambda i, use: uniform(state.keys_B2, begin_B - state.prompt_lengths_B + i, use)

    # q: probabilities of the draft. Its first step reads the last two tokens, since it has not read the last token that
    # it drafted in the previous round.
    tokens_BT, q = state.tokens_BT, []
    for i in range(DRAFTED):
        at = jnp.maximum(begin_B[:, None] + jnp.arange(i - 2 if i == 0 else i - 1, i), 0)
        x, drafts = _read(draft, params[1], tokens_BT, at, drafts)
        logits_BV = mask_unknown(apply(draft, params[1], x[:, -1], method="lm"), rules)
        so_far = state._replace(lengths_B=begin_B + i)
        q.append(share_BV(restrict(logits_BV, tokens_BT, so_far, rules)))
        tokens_BT = tokens_BT.at[rows_B, begin_B + i].set(draw(q[i], number(i, DRAFT)), mode="drop")

    # p: probabilities of the model, for the same tokens and the one after them.
    x, own = _read(module, params[0], tokens_BT, begin_B[:, None] + jnp.arange(-1, DRAFTED), own)
    logits_BTV = mask_unknown(apply(module, params[0], x, method="lm"), rules)
    accepting_B = jnp.ones(B, bool)
    state = state._replace(caches=(own, drafts))  # type: ignore[arg-type]
    for i in range(DRAFTED + 1):
        so_far = state._replace(lengths_B=begin_B + i)
        p_BV = share_BV(restrict(logits_BTV[:, i], tokens_BT, so_far, rules))
        left_BV, accepted_B, drafted_B = p_BV, jnp.zeros(B, bool), jnp.zeros(B, jnp.int32)
        if i < DRAFTED:
            drafted_B = jnp.take_along_axis(tokens_BT, begin_B[:, None] + i, 1, mode="clip")[:, 0]
            of = lambda share_BV, tokens_B=drafted_B: jnp.take_along_axis(share_BV, tokens_B[:, None], 1)[:, 0]
            accepted_B = number(i, ACCEPT) * of(q[i]) < of(p_BV)
            left_BV = jnp.maximum(p_BV - q[i], 0)
            left_BV = jnp.where(left_BV.sum(-1, keepdims=True) > 0, left_BV, p_BV)
        tokens_B = jnp.where(accepted_B, drafted_B, draw(left_BV, number(i, CORRECT)))
        state = write(state, tokens_B, logits_BTV[:, i], rules, accepting_B)
        accepting_B &= accepted_B
    return state


def _read(module: Transformer, params: Any, tokens_BT: jax.Array, at: jax.Array, caches: Any) -> tuple[Any, Any]:
    """Returns the hidden states of the tokens at these positions, and the caches after reading them."""
    tokens = jnp.take_along_axis(tokens_BT, at, 1, mode="clip")
    return apply(module, params, tokens, at, caches, method="decode_cached")


def _normalise(weights_BV: jax.Array) -> jax.Array:
    return weights_BV / weights_BV.sum(-1, keepdims=True)
