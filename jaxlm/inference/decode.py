"""The compiled programs of generation: prompts are read into caches, then tokens are generated in a loop on the device.

A `State` holds rows of incomplete texts of different lengths. `prefill` makes a state from prompts, `advance` adds up
to n tokens to each row that has not ended, and `insert` replaces rows that have ended by rows of another state. The
tokens of a row depend on its own prompt and random key, not on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.nn.block import cached_window
from jaxlm.nn.layer_parts import parts_of
from jaxlm.nn.stack import Caches, CacheSpec
from jaxlm.nn.transformer import Transformer, apply

Array = Any  # of JAX or NumPy
LANES = 128  # tokens in a block of the vocabulary, for sampling
NO_TOKEN = 2**31 - 1  # fills up lists of tokens


class Rules(NamedTuple):
    """How the next token is chosen from the logits. A field that is None is not part of the compiled program.

    vocabulary: number of tokens that can be generated.
    stops_N: tokens that end a text, filled up with NO_TOKEN.
    temperature: None is greedy.
    top_k, top_p, min_p: filters for sampling; all or none are set.
    penalty: repetition penalty.
    forbidden_NF: sequences that are never generated, filled up with -1 on the left.
    ngram: no sequence of this many tokens is repeated.
    begin_N: tokens that a text does not begin with (after `first`, where it is forced), filled up with NO_TOKEN.
    min_new, min_length: minimum number of tokens before a stop token, without and with the prompt.
    first: the forced token after a prompt of one token.
    last_N: at the length limit one of these tokens is forced; filled up with NO_TOKEN.
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
    """The inputs of `prefill`.

    tokens_BT, lengths_B: prompts for the decoder, padded on the right, and their lengths.
    limits_B: lengths at which texts end.
    seed, numbers_B2: a row's random key is derived from the seed, the number of its prompt and its number among the
        texts of the prompt.
    source_BS, source_segments_BS: inputs of the encoder, where there is one.
    """

    tokens_BT: Array
    lengths_B: Array
    limits_B: Array
    seed: Array
    numbers_B2: Array
    source_BS: Array | None = None
    source_segments_BS: Array | None = None


class State(NamedTuple):
    """Rows of incomplete texts. The model has not yet read the last token of a row.

    tokens_BT: prompts and generated tokens.
    log_probs_BT: log-probabilities of the tokens under the model; None where they are not computed.
    prompt_lengths_B, lengths_B, limits_B: lengths of the prompts, of the rows so far, and at which texts end.
    done_B: whether a text has ended.
    keys_B2: random keys.
    caches: keys and values of attention.
    """

    tokens_BT: jax.Array
    log_probs_BT: jax.Array | None
    prompt_lengths_B: jax.Array
    lengths_B: jax.Array
    limits_B: jax.Array
    done_B: jax.Array
    keys_B2: jax.Array
    caches: Caches


class DecodePrograms(NamedTuple):
    """The jitted functions of generation, compiled for each combination of shapes and of unset `Rules` and `Prompts`.

    prefill(params, prompts, length=, scored=, ahead=, cache=) -> State, with room for texts of `length` tokens.
    advance(params, state, rules, n) -> State, with up to n more tokens in each row.
    insert(state, rows_R, other) -> State, with rows of another state; row numbers past the end are ignored.
    grow(state, length=) -> State, with room for longer texts.
    repeat(state, rows=) -> State, with more rows, which repeat the last one and have ended.
    """

    prefill: Any
    advance: Any
    insert: Any
    grow: Any = None
    repeat: Any = None


def programs(module: Transformer) -> DecodePrograms:
    """Returns the jitted functions for a model, which `LM.programs` keeps."""
    return DecodePrograms(
        jax.jit(partial(prefill, module), static_argnames=("length", "scored", "ahead", "cache")),
        jax.jit(partial(_advance, module), donate_argnums=1),
        jax.jit(insert, donate_argnums=0),
        jax.jit(partial(grow, module), static_argnames="length"),
        jax.jit(repeat, static_argnames="rows"),
    )


def prefill(
    module: Transformer,
    params: Any,
    prompts: Prompts,
    *,
    length: int,
    scored: bool = False,
    ahead: int = 1,
    cache: str = "compute",
) -> State:
    """Returns the state after reading the prompts.

    Args:
      module: the model.
      params: its parameters.
      prompts: what to read.
      length: number of tokens that the rows and caches have room for.
      scored: whether log-probabilities are stored.
      ahead: maximum number of tokens that a later call reads at once.
      cache: how keys and values are stored, a value of `Decoding.cache`.
    """
    encoded: tuple[Any, ...] = ()
    if prompts.source_BS is not None:
        source = prompts.source_BS, prompts.source_segments_BS
        encoded = apply(module, params, *source, method="encode"), source[1]
    keep = CacheSpec(prompts.lengths_B, length, ahead, cache)
    _, caches = apply(module, params, prompts.tokens_BT, keep, *encoded, method="prefill")
    key = jax.random.key(prompts.seed)
    key_of = lambda numbers: jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, numbers[0]), numbers[1]))
    tokens_BT = jnp.pad(prompts.tokens_BT, [(0, 0), (0, length - prompts.tokens_BT.shape[1])])
    log_probs_BT = jnp.zeros(tokens_BT.shape, jnp.float32) if scored else None
    done_B = prompts.lengths_B >= prompts.limits_B
    lengths = prompts.lengths_B, prompts.lengths_B, prompts.limits_B
    state = State(tokens_BT, log_probs_BT, *lengths, done_B, jax.vmap(key_of)(prompts.numbers_B2), caches)
    return shard_state(module, state)


def shard_state(module: Transformer, state: State) -> State:
    """Returns the state, its rows and the heads of its caches sharded over the module's mesh, alike in all programs."""

    def shard(x: jax.Array) -> jax.Array:
        others = ("kv_heads", *[None] * (x.ndim - 2)) if x.ndim > 2 else (None,) * (x.ndim - 1)  # a cache: [B, K, S, C]
        return module.constrain(x, ("batch", *others))

    return jax.tree.map(shard, state)


def insert(state: State, rows_R: jax.Array, other: State) -> State:
    """Returns the state with the rows of another one at rows_R; row numbers past the end are ignored."""
    return jax.tree.map(lambda old, new: old.at[rows_R].set(new, mode="drop"), state, other)


def repeat(state: State, *, rows: int) -> State:
    """Returns the state with `rows` rows; those after the given ones repeat the last one and have ended."""
    more = rows - len(state.done_B)
    wide = jax.tree.map(lambda x: jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1), mode="edge"), state)
    return wide._replace(done_B=wide.done_B | (jnp.arange(rows) >= rows - more))


def grow(module: Transformer, state: State, *, length: int) -> State:
    """Returns the state with room for texts of `length` tokens.

    Short caches are faster to read, so they grow with the texts. A cache that already has the size of its attention
    window stays as it is.
    """
    config, old_length = module.config.decoder_config, state.tokens_BT.shape[1]
    pad = lambda x_BT: jnp.pad(x_BT, [(0, 0), (0, length - old_length)])
    own = []
    for layer, cache in zip(parts_of(config, len(state.caches.own)), state.caches.own):
        window = cached_window(layer)
        slots = min(length, window) if window is not None and config.relative == "none" else length
        own.append(cache.extend(slots) if cache.slots == old_length < slots else cache)
    log_probs_BT = None if state.log_probs_BT is None else pad(state.log_probs_BT)
    caches = state.caches._replace(own=tuple(own))
    return state._replace(tokens_BT=pad(state.tokens_BT), log_probs_BT=log_probs_BT, caches=caches)


def _advance(module: Transformer, params: Any, state: State, rules: Rules, n: jax.Array) -> State:
    def running(carry: tuple[jax.Array, State]) -> jax.Array:
        i, state = carry
        return (i < n) & ~state.done_B.all()

    def step(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        i, state = carry
        logits_BV, caches = next_logits(module, params, state, rules)
        allowed_BV = restrict(logits_BV, state.tokens_BT, state, rules)
        tokens_B = choose(allowed_BV, uniform(state.keys_B2, state.lengths_B - state.prompt_lengths_B), rules)
        return i + 1, write(state._replace(caches=caches), tokens_B, logits_BV, rules)

    return shard_state(module, jax.lax.while_loop(running, step, (jnp.int32(0), state))[1])


def next_logits(module: Transformer, params: Any, state: State, rules: Rules) -> tuple[jax.Array, Caches]:
    """Returns the logits [B, V] of each row's next token, and the caches after reading its last token."""
    last_B = state.lengths_B - 1
    tokens_B1 = jnp.take_along_axis(state.tokens_BT, last_B[:, None], 1)
    x_B1D, caches = apply(module, params, tokens_B1, last_B[:, None], state.caches, method="decode_cached")
    return mask_unknown(apply(module, params, x_B1D[:, 0], method="lm"), rules), caches


def mask_unknown(logits_BV: jax.Array, rules: Rules) -> jax.Array:
    """Returns the logits, with -inf for the tokens that the tokenizer does not have."""
    return jnp.where(jnp.arange(logits_BV.shape[-1]) < rules.vocabulary, logits_BV, -jnp.inf)


def write(
    state: State, tokens_B: jax.Array, logits_BV: jax.Array, rules: Rules, writable_B: jax.Array | None = None
) -> State:
    """Returns the state with one more token in each row that has not ended and, where it is given, is in `writable_B`.

    Args:
      state: the state.
      tokens_B: the new tokens.
      logits_BV: logits that the log-probabilities are computed from.
      rules: names the stop tokens.
      writable_B: rows that may get a token; None: all.
    """
    B, T = state.tokens_BT.shape
    grows_B = ~state.done_B if writable_B is None else ~state.done_B & writable_B
    rows_B, at_B = jnp.arange(B), jnp.where(grows_B, state.lengths_B, T)  # past the end is dropped
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
    """Returns the log-probability [B] of one token for each row."""
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], 1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, -1)


def restrict(logits_BV: jax.Array, tokens_BT: jax.Array, state: State, rules: Rules) -> jax.Array:
    """Returns the logits [B, V] after the rules on single tokens, with -inf for tokens that must not come next.

    Args:
      logits_BV: logits of the model.
      tokens_BT: the rows so far; those of a beam or a draft may differ from the state's.
      state: read for `prompt_lengths_B`, `lengths_B` and `limits_B`.
      rules: the rules.
    """
    V = logits_BV.shape[-1]
    rows_B1, new_B = jnp.arange(len(logits_BV))[:, None], state.lengths_B - state.prompt_lengths_B
    if rules.penalty is not None:
        is_token_BT = jnp.arange(tokens_BT.shape[1]) < state.lengths_B[:, None]
        repeated_BV = jnp.zeros(logits_BV.shape, bool).at[rows_B1, tokens_BT].max(is_token_BT)
        penalized_BV = jnp.where(logits_BV < 0, logits_BV * rules.penalty, logits_BV / rules.penalty)
        logits_BV = jnp.where(repeated_BV, penalized_BV, logits_BV)
    if rules.forbidden_NF is not None:
        F = rules.forbidden_NF.shape[1]
        at_BF = state.lengths_B[:, None] - (F - 1) + jnp.arange(F - 1)
        last_BF = jnp.where(at_BF < 0, -2, jnp.take_along_axis(tokens_BT, jnp.maximum(at_BF, 0), 1))
        prefix_NF = rules.forbidden_NF[:, :-1]
        match_BN = ((last_BF[:, None] == prefix_NF) | (prefix_NF == -1)).all(-1)
        forbidden_BV = jnp.zeros(logits_BV.shape, bool).at[rows_B1, rules.forbidden_NF[:, -1]].max(match_BN)
        logits_BV = jnp.where(forbidden_BV, -jnp.inf, logits_BV)
    mask_of = lambda tokens_N: jnp.zeros(V, bool).at[tokens_N].set(True, mode="drop")
    if rules.ngram is not None:
        logits_BV = jnp.where(_repeats(tokens_BT, state.lengths_B, rules.ngram, V), -jnp.inf, logits_BV)
    if rules.min_new is not None and rules.min_length is not None:
        early_B = (new_B < rules.min_new) | (state.lengths_B < rules.min_length)
        logits_BV = jnp.where(mask_of(rules.stops_N) & early_B[:, None], -jnp.inf, logits_BV)
    forced_B = jnp.zeros_like(new_B, bool) if rules.first is None else state.prompt_lengths_B == 1
    if rules.begin_N is not None:
        logits_BV = jnp.where(mask_of(rules.begin_N) & (new_B == forced_B)[:, None], -jnp.inf, logits_BV)
    if rules.first is not None:
        only_BV = jnp.where(jnp.arange(V) == rules.first, 0.0, -jnp.inf)
        logits_BV = jnp.where((forced_B & (new_B == 0))[:, None], only_BV, logits_BV)
    if rules.last_N is not None:
        only_BV = jnp.where(mask_of(rules.last_N), 0.0, -jnp.inf)
        logits_BV = jnp.where((state.lengths_B == state.limits_B - 1)[:, None], only_BV, logits_BV)
    return logits_BV


def _repeats(tokens_BT: jax.Array, lengths_B: jax.Array, n: jax.Array, V: int) -> jax.Array:
    """Returns [B, V], True for a token that would complete a sequence of n tokens that the row already has."""
    B, T = tokens_BT.shape
    at_T = jnp.arange(T)

    def same(j: jax.Array, match_BT: jax.Array) -> jax.Array:
        """Compares token j of the last n - 1 of the row with token j of the n - 1 before each position."""
        last_B = jnp.take_along_axis(tokens_BT, jnp.maximum(lengths_B - n + 1 + j, 0)[:, None], 1)[:, 0]
        before_BT = tokens_BT[:, jnp.maximum(at_T - n + 1 + j, 0)]
        return match_BT & (before_BT == last_B[:, None])

    whole_BT = (at_T >= n - 1) & (at_T < lengths_B[:, None])
    match_BT = jax.lax.fori_loop(0, jnp.minimum(n - 1, T), same, whole_BT)
    return jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], tokens_BT].max(match_BT)


def uniform(keys_B2: jax.Array, n_B: jax.Array, use: int = 0) -> jax.Array:
    """Returns a random number [B] in [0, 1) for each key and position; `use` distinguishes numbers of one token."""
    fold = lambda key, n: jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key), n), use)
    one = lambda key, n: jax.random.uniform(fold(key, n))
    return jax.vmap(one)(keys_B2, n_B)


def choose(logits_BV: jax.Array, uniform_B: jax.Array, rules: Rules) -> jax.Array:
    """Returns the next token of each row: the most likely one, or a sample."""
    if rules.temperature is None:
        return argmax(logits_BV)
    return draw(weights(logits_BV, rules), uniform_B)


def argmax(logits_BV: jax.Array) -> jax.Array:
    """Returns the index of the first maximum of each row, like `jnp.argmax`, in half the time on CPU."""
    V = logits_BV.shape[-1]
    index_BV = jnp.where(logits_BV >= logits_BV.max(-1, keepdims=True), jnp.arange(V, dtype=jnp.int32), V - 1)
    return index_BV.min(-1)


def weights(logits_BV: jax.Array, rules: Rules) -> jax.Array:
    """Returns unnormalised probabilities [B, V] after temperature, top-k, top-p and min-p, in this order."""
    if rules.temperature is None:
        return jax.nn.one_hot(argmax(logits_BV), logits_BV.shape[-1])
    scaled_BV = logits_BV / rules.temperature
    p_BV = jnp.exp(scaled_BV - scaled_BV.max(-1, keepdims=True))  # the maximum is 1
    if rules.top_k is None or rules.top_p is None or rules.min_p is None:
        return p_BV
    k, p = rules.top_k, rules.top_p
    p_BV = jnp.where(p_BV >= _threshold(p_BV, lambda kept_BV: kept_BV.sum(-1) >= k), p_BV, 0)
    enough_B = p * p_BV.sum(-1)
    p_BV = jnp.where(p_BV >= _threshold(p_BV, lambda kept_BV: (p_BV * kept_BV).sum(-1) >= enough_B), p_BV, 0)
    return jnp.where(p_BV >= rules.min_p, p_BV, 0)


def _threshold(p_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Returns the largest value [B, 1] for which the entries of at least that value are enough.

    It is found by bisection, which is faster than sorting, on the bits of the floats: as integers they have the same
    order, since no float is negative.
    """

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds
        middle_B = low_B + (high_B - low_B) // 2
        enough_B = enough(p_BV >= as_float(middle_B)[:, None])
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    as_float = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
    low_B = jnp.zeros(len(p_BV), jnp.int32)
    high_B = jnp.full(len(p_BV), 0x3F800001, jnp.int32)  # above 1
    return as_float(jax.lax.fori_loop(0, 31, halve, (low_B, high_B))[0])[:, None]


def draw(weights_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Returns a sample of each row in proportion to the weights, by inversion of their cumulative sum.

    The sample is a block of `LANES` tokens first, then a token of the block, so that no cumulative sum has the length
    of the vocabulary.
    """
    B, V = weights_BV.shape
    blocks_BNI = jnp.pad(weights_BV, [(0, 0), (0, -V % LANES)]).reshape(B, -1, LANES)
    total_BN = jnp.cumsum(blocks_BNI.sum(-1), -1)
    target_B = uniform_B * total_BN[:, -1]
    block_B = jnp.minimum((total_BN <= target_B[:, None]).sum(-1), total_BN.shape[1] - 1)
    inside_BI = jnp.take_along_axis(blocks_BNI, block_B[:, None, None], 1)[:, 0]
    before_B = jnp.where(block_B > 0, jnp.take_along_axis(total_BN, jnp.maximum(block_B - 1, 0)[:, None], 1)[:, 0], 0)
    index_B = ((before_B[:, None] + jnp.cumsum(inside_BI, -1)) <= target_B[:, None]).sum(-1)
    tokens_B = jnp.minimum(block_B * LANES + index_B, V - 1)
    # Rounding errors of the sums may select a token of weight 0.
    valid_B = jnp.take_along_axis(weights_BV, tokens_B[:, None], 1)[:, 0] > 0
    return jnp.where(valid_B, tokens_B, weights_BV.argmax(-1)).astype(jnp.int32)
