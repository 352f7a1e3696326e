"""Generation over a KV cache: one compiled program, no Python per token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import UserError
from jaxlm.nn.transformer import Transformer, apply, empty_caches

if TYPE_CHECKING:
    from jaxlm.lm import LM

BUCKET = 64  # prompt and cache lengths are rounded up to multiples of this, so that few programs are compiled


def generate(
    lm: LM,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] | None = None,
    seed: int = 0,
    return_tokens: bool = False,
) -> list[Any]:
    """Continues each prompt; returns the continuations without the prompts.

    prompts: strings (the tokenizer's BOS is put before them) or lists of token ids (used as given).
    temperature: divides the logits; 0 is greedy.  top_k: sample among the k likeliest.  top_p: among the fewest tokens
    whose probabilities reach p (Holtzman et al. 2020).  seed: prompt i draws from a key of (seed, i).
    stop_tokens: a continuation ends before the first of these; None: the model's end token, (): none.
    return_tokens: lists of ids instead of strings: list[list[int]] instead of list[str].

    Raises UserError where a prompt is empty, has ids outside the vocabulary, or leaves too few positions.
    """
    config = lm.config
    if config.structure != "decoder" or "lm" not in config.heads_on_top:
        raise UserError(f"a(n) {config.structure} with heads {config.heads_on_top} cannot generate; it takes a decoder")
    if isinstance(prompts, str):
        raise UserError("prompts is one string; give a list of prompts")
    limits = (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "at least 0"),
        ("temperature", temperature, temperature >= 0, "at least 0"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1, or None"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1, or None"),
    )
    for name, value, good, limit in limits:
        if not good:
            raise UserError(f"{name} is {value}; it must be {limit}")
    if lm.tokenizer is None and not return_tokens:
        raise UserError("the model has no tokenizer; give prompts as lists of token ids, with return_tokens=True")
    ids = [_prompt(lm, prompt) for prompt in prompts]
    if not ids or not max_new_tokens:
        return [[] for _ in ids] if return_tokens else ["" for _ in ids]
    longest = max(map(len, ids))
    if config.positions == "learned" and longest + max_new_tokens > config.max_length:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's {config.max_length} "
            f"positions; shorten the prompt or ask for at most {max(0, config.max_length - longest)}"
        )
    if stop_tokens is None:
        end = None if lm.tokenizer is None else lm.tokenizer.eos
        stop_tokens = () if end is None else (end,)
    T = -(-longest // BUCKET) * BUCKET
    tokens_BT = np.zeros((len(ids), T), np.int32)
    for b, prompt in enumerate(ids):
        tokens_BT[b, : len(prompt)] = prompt
    new_BN = _decode(
        lm.module,
        -(-max_new_tokens // BUCKET) * BUCKET,
        min(top_k or 0, config.vocabulary),
        top_p is not None,
    )(
        lm.params,
        tokens_BT,
        np.array([len(prompt) for prompt in ids], np.int32),
        np.int32(max_new_tokens),
        np.float32(temperature),
        np.float32(1.0 if top_p is None else top_p),
        np.array(sorted(stop_tokens), np.int32),
        jax.random.key(seed),
        np.int32(lm.vocabulary),
    )
    rows = []
    for row in np.asarray(new_BN)[:, :max_new_tokens].tolist():
        stop = next((n for n, token in enumerate(row) if token in stop_tokens), len(row))
        rows.append(row[:stop])
    return rows if return_tokens or lm.tokenizer is None else [lm.tokenizer.decode(row) for row in rows]


def _prompt(lm: LM, prompt: str | Sequence[int]) -> list[int]:
    if isinstance(prompt, str):
        if lm.tokenizer is None:
            raise UserError("the model has no tokenizer; give prompts as lists of token ids")
        bos = [] if lm.tokenizer.bos is None else [lm.tokenizer.bos]
        prompt = bos + lm.tokenizer.encode(prompt)
    if not len(prompt):
        raise UserError("a prompt is empty and the tokenizer has no BOS; give at least one token")
    strange = [token for token in prompt if not 0 <= token < lm.config.vocabulary]
    if strange:
        raise UserError(f"a prompt has token {strange[0]}; ids go from 0 to {lm.config.vocabulary - 1}")
    return list(map(int, prompt))


@lru_cache(maxsize=32)
def _decode(module: Transformer, new: int, top_k: int, use_top_p: bool) -> Any:
    """The compiled program: prompts [B, T] and their lengths to new tokens [B, new]."""

    @jax.jit
    def decode(params, tokens_BT, lengths_B, limit, temperature, top_p, stops, key, vocabulary):
        B, T = tokens_BT.shape
        config = module.config
        length = T + new
        if config.positions == "learned":
            length = min(length, config.max_length)
        keys_B = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(B))
        pick = partial(_pick, top_k=top_k, top_p=top_p if use_top_p else None, temperature=temperature)

        def next_tokens(x_BD: jax.Array, n: jax.Array) -> jax.Array:
            logits_BV = apply(module, params, x_BD, method="lm")
            logits_BV = jnp.where(jnp.arange(config.vocabulary) < vocabulary, logits_BV, -jnp.inf)
            return pick(logits_BV, keys_B=jax.vmap(jax.random.fold_in, (0, None))(keys_B, n))

        # Prompts are padded on the right.  What padding writes to the cache lies at later positions than any query
        # that could see it, until the position's own token overwrites it.
        caches = empty_caches(config, B, length, module.dtype)
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        positions_BT = jnp.minimum(positions_BT, length - 1)
        x_BTD, caches = apply(module, params, tokens_BT, positions_BT, caches, method="decode_cached")
        first_B = next_tokens(jnp.take_along_axis(x_BTD, lengths_B[:, None, None] - 1, 1)[:, 0], jnp.int32(0))
        new_BN = jnp.zeros((B, new), jnp.int32).at[:, 0].set(first_B)
        is_stop = lambda tokens_B: (tokens_B[:, None] == stops).any(-1)

        def running(carry: Any) -> jax.Array:
            n, _, _, done_B = carry
            return (n < limit) & ~done_B.all()

        def step(carry: Any) -> Any:
            n, new_BN, caches, done_B = carry
            tokens_B1 = jax.lax.dynamic_slice_in_dim(new_BN, n - 1, 1, 1)
            positions_B1 = (lengths_B + n - 1)[:, None]
            x_B1D, caches = apply(module, params, tokens_B1, positions_B1, caches, method="decode_cached")
            tokens_B = next_tokens(x_B1D[:, 0], n)
            new_BN = jax.lax.dynamic_update_slice_in_dim(new_BN, tokens_B[:, None], n, 1)
            return n + 1, new_BN, caches, done_B | is_stop(tokens_B)

        return jax.lax.while_loop(running, step, (jnp.int32(1), new_BN, caches, is_stop(first_B)))[1]

    return decode


def _pick(
    logits_BV: jax.Array, *, keys_B: jax.Array, temperature: jax.Array, top_k: int, top_p: jax.Array | None
) -> jax.Array:
    """The next token of each row: the likeliest at temperature 0, else a draw."""
    greedy_B = logits_BV.argmax(-1)
    logits_BV = logits_BV / jnp.maximum(temperature, 1e-6)
    if top_k:
        logits_BV = jnp.where(logits_BV < jax.lax.top_k(logits_BV, top_k)[0][:, -1:], -jnp.inf, logits_BV)
    if top_p is not None:
        sorted_BV = jnp.sort(logits_BV, descending=True)
        before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV), -1) - jax.nn.softmax(sorted_BV)
        kept_BV = jnp.where(before_BV < top_p, sorted_BV, jnp.inf)
        logits_BV = jnp.where(logits_BV < kept_BV.min(-1, keepdims=True), -jnp.inf, logits_BV)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV)
    return jnp.where(temperature > 0, drawn_B, greedy_B).astype(jnp.int32)
