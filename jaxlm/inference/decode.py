"""The compiled part of generation: prompts into caches, then token after token in one loop on the device.

A `State` holds rows of texts half made, each at a length of its own.  `prefill` makes one of prompts, `advance` adds
up to n tokens to every row that has not ended, `place` puts rows of one state where others have ended.  What a row
draws depends on its own tokens and its own key, not on what stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.nn.attention import Cache
from jaxlm.nn.transformer import Caches, Keep, Transformer, apply

Array = Any  # of JAX, or where it comes from outside, of NumPy
LANES = 128  # tokens of a block, when one is drawn
NOTHING = 2**31 - 1  # no token


class Rules(NamedTuple):
    """What the next token is chosen by, besides the model.  A field that is None is no part of the compiled program.

    vocabulary: tokens that there are.  temperature: None is greedy.  top_k, top_p, min_p: all or none.
    penalty: of repetition.  forbidden_NF: sequences, filled up with -1 on the left.
    ngram: no sequence of so many tokens comes twice.  begin_N: tokens that are not the first of a text, filled up with
    NOTHING; where forced_bos is the first, not the second.
    stops_N: what ends a text, filled up with NOTHING; they do not come before min_new tokens, nor before min_length,
    the prompt's tokens counted.
    first: the token behind a prompt of one token.  last_N: tokens of which the longest text ends with one, filled up
    with NOTHING.
    """

    vocabulary: Array
    stops_N: Array
    temperature: Array | None = None
    top_k: Array | None = None
    top_p: Array | None = None
    min_p: Array | None = None
    penalty: Array | None = None
    forbidden_NF: Array | None = None
    ngram: Array | None = None
    begin_N: Array | None = None
    min_new: Array | None = None
    min_length: Array | None = None
    first: Array | None = None
    last_N: Array | None = None


class Prompts(NamedTuple):
    """What a state is made of.

    tokens_BT, lengths_B: what the decoder reads, padded on the right.  limits_B: lengths at which texts end.
    seed, numbers_B2: a row's key is made of the seed, the number of its prompt, and that of its text for the prompt.
    source_BS, source_segments_BS: what the encoder reads, where there is one.
    """

    tokens_BT: Array
    lengths_B: Array
    limits_B: Array
    seed: Array
    numbers_B2: Array
    source_BS: Array | None = None
    source_segments_BS: Array | None = None


class State(NamedTuple):
    """Rows of texts half made.  The last token of a row is yet to be read by the model.

    tokens_BT, log_probs_BT: of each position; log-probabilities, where they are wanted, are the model's own.
    begun_B: lengths of the prompts.  lengths_B: of what there is.  limits_B: at which texts end.
    """

    tokens_BT: jax.Array
    log_probs_BT: jax.Array | None
    begun_B: jax.Array
    lengths_B: jax.Array
    limits_B: jax.Array
    done_B: jax.Array
    keys_B2: jax.Array
    caches: Caches


class DecodePrograms(NamedTuple):
    """Compiled once for each combination of shapes, and for what `Rules` and `Prompts` leave out.

    prefill(params, prompts, length=, scored=, ahead=) -> State, with room for texts of `length` tokens.
    advance(params, state, rules, n) -> State.  place(state, rows_R, other) -> State; a row past the end is left out.
    grow(state, length=) -> State, with more room.
    """

    prefill: Any
    advance: Any
    place: Any
    grow: Any = None


def programs(module: Transformer) -> DecodePrograms:
    """Returns the programs of a model, which `LM.programs` keeps."""
    return DecodePrograms(
        jax.jit(partial(prefill, module), static_argnames=("length", "scored", "ahead")),
        jax.jit(partial(_advance, module), donate_argnums=1),
        jax.jit(place, donate_argnums=0),
        jax.jit(partial(grow, module), static_argnames="length"),
    )


def prefill(
    module: Transformer, params: Any, prompts: Prompts, *, length: int, scored: bool = False, ahead: int = 1
) -> State:
    """The state of prompts, with room for `length` tokens, of which later calls read up to `ahead` at once."""
    encoded: tuple[Any, ...] = ()
    if prompts.source_BS is not None:
        source = prompts.source_BS, prompts.source_segments_BS
        encoded = apply(module, params, *source, method="encode"), source[1]
    keep = Keep(prompts.lengths_B, length, ahead)
    _, caches = apply(module, params, prompts.tokens_BT, keep, *encoded, method="prefill")
    key = jax.random.key(prompts.seed)
    key_of = lambda numbers: jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, numbers[0]), numbers[1]))
    tokens_BT = jnp.pad(prompts.tokens_BT, [(0, 0), (0, length - prompts.tokens_BT.shape[1])])
    log_probs_BT = jnp.zeros(tokens_BT.shape, jnp.float32) if scored else None
    done_B = prompts.lengths_B >= prompts.limits_B
    lengths = prompts.lengths_B, prompts.lengths_B, prompts.limits_B
    state = State(tokens_BT, log_probs_BT, *lengths, done_B, jax.vmap(key_of)(prompts.numbers_B2), caches)
    return placed(module, state)


def placed(module: Transformer, state: State) -> State:
    """Returns the state with its rows and the heads of its caches split over the mesh of the module, so that the
    programs agree on where it lies."""

    def split(x: jax.Array) -> jax.Array:
        heads = ("kv_heads", None, None) if x.ndim == 4 else (None,) * (x.ndim - 1)  # a cache is [B, K, S, C]
        return module.constrain(x, ("batch", *heads))

    return jax.tree.map(split, state)


def place(state: State, rows_R: jax.Array, other: State) -> State:
    """The state with rows of another one; a row past the end is left out."""
    return jax.tree.map(lambda ours, theirs: ours.at[rows_R].set(theirs, mode="drop"), state, other)


def grow(module: Transformer, state: State, *, length: int) -> State:
    """The state with room for texts of `length` tokens: a short cache is read faster, so that it is long only once the
    text is.  What has been cut to a window already stays as it is."""
    config, now = module.config, state.tokens_BT.shape[1]
    more = lambda x, axis, to: jnp.pad(x, [(0, to - now if n == axis else 0) for n in range(x.ndim)])
    own = []
    for n, cache in enumerate(state.caches.own):
        local = config.layer_kinds[n % len(config.layer_kinds)] == "local" and config.relative == "none"
        slots = min(length, config.window) if local else length
        own.append(Cache(*(more(x, 2, slots) for x in cache)) if cache.k_BKSC.shape[2] == now < slots else cache)
    log_probs_BT = None if state.log_probs_BT is None else more(state.log_probs_BT, 1, length)
    caches = state.caches._replace(own=tuple(own))
    return state._replace(tokens_BT=more(state.tokens_BT, 1, length), log_probs_BT=log_probs_BT, caches=caches)


def _advance(module: Transformer, params: Any, state: State, rules: Rules, n: jax.Array) -> State:
    def running(carry: tuple[jax.Array, State]) -> jax.Array:
        i, state = carry
        return (i < n) & ~state.done_B.all()

    def step(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        i, state = carry
        logits_BV, caches = next_logits(module, params, state, rules)
        allowed_BV = restrict(logits_BV, state.tokens_BT, state, rules)
        tokens_B = choose(allowed_BV, uniform(state.keys_B2, state.lengths_B - state.begun_B), rules)
        return i + 1, write(state._replace(caches=caches), tokens_B, logits_BV, rules)

    return placed(module, jax.lax.while_loop(running, step, (jnp.int32(0), state))[1])


def next_logits(module: Transformer, params: Any, state: State, rules: Rules) -> tuple[jax.Array, Caches]:
    """The model's logits [B, V] of each row's next token, and the caches with its last one."""
    last_B = state.lengths_B - 1
    tokens_B1 = jnp.take_along_axis(state.tokens_BT, last_B[:, None], 1)
    x_B1D, caches = apply(module, params, tokens_B1, last_B[:, None], state.caches, method="decode_cached")
    return known(apply(module, params, x_B1D[:, 0], method="lm"), rules), caches


def known(logits_BV: jax.Array, rules: Rules) -> jax.Array:
    """The logits without those of tokens that the tokenizer does not have."""
    return jnp.where(jnp.arange(logits_BV.shape[-1]) < rules.vocabulary, logits_BV, -jnp.inf)


def write(
    state: State, tokens_B: jax.Array, logits_BV: jax.Array, rules: Rules, wanted_B: jax.Array | None = None
) -> State:
    """The state with a token more in each row that has not ended, of those where it is wanted."""
    B, T = state.tokens_BT.shape
    grows_B = ~state.done_B if wanted_B is None else ~state.done_B & wanted_B
    rows_B, at_B = jnp.arange(B), jnp.where(grows_B, state.lengths_B, T)  # past the end: not written
    log_probs_BT = state.log_probs_BT
    if log_probs_BT is not None:
        log_probs_BT = log_probs_BT.at[rows_B, at_B].set(log_prob(logits_BV, tokens_B), mode="drop")
    lengths_B = state.lengths_B + grows_B
    ended_B = grows_B & (tokens_B[:, None] == rules.stops_N).any(-1) | (lengths_B >= state.limits_B)
    return state._replace(
        tokens_BT=state.tokens_BT.at[rows_B, at_B].set(tokens_B, mode="drop"),
        log_probs_BT=log_probs_BT,
        lengths_B=lengths_B,
        done_B=state.done_B | ended_B,
    )


def log_prob(logits_BV: jax.Array, tokens_B: jax.Array) -> jax.Array:
    """The log-probability [B] of a token of each row."""
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], 1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, -1)


def restrict(logits_BV: jax.Array, tokens_BT: jax.Array, state: State, rules: Rules) -> jax.Array:
    """Logits after what the rules say of single tokens, given the row so far; -inf for one that must not come.

    state: for `begun_B`, `lengths_B`, `limits_B`; the tokens may be others, of a beam or a draft.
    """
    V = logits_BV.shape[-1]
    rows_B1, new_B = jnp.arange(len(logits_BV))[:, None], state.lengths_B - state.begun_B
    if rules.penalty is not None:
        there_BT = jnp.arange(tokens_BT.shape[1]) < state.lengths_B[:, None]
        seen_BV = jnp.zeros(logits_BV.shape, bool).at[rows_B1, tokens_BT].max(there_BT)
        changed_BV = jnp.where(logits_BV < 0, logits_BV * rules.penalty, logits_BV / rules.penalty)
        logits_BV = jnp.where(seen_BV, changed_BV, logits_BV)
    if rules.forbidden_NF is not None:
        F = rules.forbidden_NF.shape[1]
        at_BF = state.lengths_B[:, None] - (F - 1) + jnp.arange(F - 1)
        before_BF = jnp.where(at_BF < 0, -2, jnp.take_along_axis(tokens_BT, jnp.maximum(at_BF, 0), 1))
        begun_NF = rules.forbidden_NF[:, :-1]
        match_BN = ((before_BF[:, None] == begun_NF) | (begun_NF == -1)).all(-1)
        hit_BV = jnp.zeros(logits_BV.shape, bool).at[rows_B1, rules.forbidden_NF[:, -1]].max(match_BN)
        logits_BV = jnp.where(hit_BV, -jnp.inf, logits_BV)
    of_N = lambda tokens_N: jnp.zeros(V, bool).at[tokens_N].set(True, mode="drop")
    if rules.ngram is not None:
        logits_BV = jnp.where(_repeats(tokens_BT, state.lengths_B, rules.ngram, V), -jnp.inf, logits_BV)
    if rules.min_new is not None and rules.min_length is not None:
        early_B = (new_B < rules.min_new) | (state.lengths_B < rules.min_length)
        logits_BV = jnp.where(of_N(rules.stops_N) & early_B[:, None], -jnp.inf, logits_BV)
    forced_B = jnp.zeros_like(new_B, bool) if rules.first is None else state.begun_B == 1
    if rules.begin_N is not None:
        logits_BV = jnp.where(of_N(rules.begin_N) & (new_B == forced_B)[:, None], -jnp.inf, logits_BV)
    if rules.first is not None:
        only_BV = jnp.where(jnp.arange(V) == rules.first, 0.0, -jnp.inf)
        logits_BV = jnp.where((forced_B & (new_B == 0))[:, None], only_BV, logits_BV)
    if rules.last_N is not None:
        only_BV = jnp.where(of_N(rules.last_N), 0.0, -jnp.inf)
        logits_BV = jnp.where((state.lengths_B == state.limits_B - 1)[:, None], only_BV, logits_BV)
    return logits_BV


def _repeats(tokens_BT: jax.Array, lengths_B: jax.Array, n: jax.Array, V: int) -> jax.Array:
    """Returns [B, V], True for a token that would end a sequence of n tokens which the row holds already."""
    B, T = tokens_BT.shape
    at_T = jnp.arange(T)

    def same(j: jax.Array, match_BT: jax.Array) -> jax.Array:
        """Compares token j of the row's last n - 1 with that of the n - 1 before each position."""
        last_B = jnp.take_along_axis(tokens_BT, jnp.maximum(lengths_B - n + 1 + j, 0)[:, None], 1)[:, 0]
        before_BT = tokens_BT[:, jnp.maximum(at_T - n + 1 + j, 0)]
        return match_BT & (before_BT == last_B[:, None])

    whole_BT = (at_T >= n - 1) & (at_T < lengths_B[:, None])
    match_BT = jax.lax.fori_loop(0, jnp.minimum(n - 1, T), same, whole_BT)
    return jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], tokens_BT].max(match_BT)


def uniform(keys_B2: jax.Array, n_B: jax.Array, use: int = 0) -> jax.Array:
    """A number [B] in [0, 1) of each key and count, for a use."""
    fold = lambda key, n: jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key), n), use)
    one = lambda key, n: jax.random.uniform(fold(key, n))
    return jax.vmap(one)(keys_B2, n_B)


def choose(logits_BV: jax.Array, uniform_B: jax.Array, rules: Rules) -> jax.Array:
    """The next token of each row: the likeliest, or a draw."""
    if rules.temperature is None:
        return likeliest(logits_BV)
    return draw(weights(logits_BV, rules), uniform_B)


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """The first of the largest logits of each row, as by argmax, in half of its time on CPU."""
    V = logits_BV.shape[-1]
    places_BV = jnp.where(logits_BV >= logits_BV.max(-1, keepdims=True), jnp.arange(V, dtype=jnp.int32), V - 1)
    return places_BV.min(-1)


def weights(logits_BV: jax.Array, rules: Rules) -> jax.Array:
    """Probabilities [B, V], up to a factor, of the tokens that are left by temperature, then top-k, top-p and min-p."""
    if rules.temperature is None:
        return jax.nn.one_hot(likeliest(logits_BV), logits_BV.shape[-1])
    scaled_BV = logits_BV / rules.temperature
    p_BV = jnp.exp(scaled_BV - scaled_BV.max(-1, keepdims=True))  # the likeliest has 1
    if rules.top_k is None or rules.top_p is None or rules.min_p is None:
        return p_BV
    k, p, least = rules.top_k, rules.top_p, rules.min_p
    p_BV = jnp.where(p_BV >= _least(p_BV, lambda kept_BV: kept_BV.sum(-1) >= k), p_BV, 0)
    enough_B = p * p_BV.sum(-1)
    p_BV = jnp.where(p_BV >= _least(p_BV, lambda kept_BV: (p_BV * kept_BV).sum(-1) >= enough_B), p_BV, 0)
    return jnp.where(p_BV >= least, p_BV, 0)


def _least(p_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest value [B, 1] such that the entries from it on are enough; found by halving, which is faster than
    sorting: the bits of floats that are not negative are ordered as they are."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds
        middle_B = low_B + (high_B - low_B) // 2
        good_B = enough(p_BV >= as_float(middle_B)[:, None])
        return jnp.where(good_B, middle_B, low_B), jnp.where(good_B, high_B, middle_B)

    as_float = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
    low_B = jnp.zeros(len(p_BV), jnp.int32)
    high_B = jnp.full(len(p_BV), 0x3F800001, jnp.int32)  # above 1
    return as_float(jax.lax.fori_loop(0, 31, halve, (low_B, high_B))[0])[:, None]


def draw(weights_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """A token of each row, in proportion to the weights: where their running sum passes that share of the whole.

    First the block of `LANES` tokens, then the token in it, so that no running sum is taken over the vocabulary.
    """
    B, V = weights_BV.shape
    blocks_BNI = jnp.pad(weights_BV, [(0, 0), (0, -V % LANES)]).reshape(B, -1, LANES)
    upto_BN = jnp.cumsum(blocks_BNI.sum(-1), -1)
    goal_B = uniform_B * upto_BN[:, -1]
    block_B = jnp.minimum((upto_BN <= goal_B[:, None]).sum(-1), upto_BN.shape[1] - 1)
    inside_BI = jnp.take_along_axis(blocks_BNI, block_B[:, None, None], 1)[:, 0]
    before_B = jnp.where(block_B > 0, jnp.take_along_axis(upto_BN, jnp.maximum(block_B - 1, 0)[:, None], 1)[:, 0], 0)
    place_B = ((before_B[:, None] + jnp.cumsum(inside_BI, -1)) <= goal_B[:, None]).sum(-1)
    tokens_B = jnp.minimum(block_B * LANES + place_B, V - 1)
    # By rounding the sums may meet the goal where nothing is left.
    there_B = jnp.take_along_axis(weights_BV, tokens_B[:, None], 1)[:, 0] > 0
    return jnp.where(there_B, tokens_B, weights_BV.argmax(-1)).astype(jnp.int32)
