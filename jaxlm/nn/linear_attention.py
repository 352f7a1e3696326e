"""Linear attention with the gated delta rule (Yang et al. 2024, Gated DeltaNet) in place of self-attention.

The state of a head is a matrix that maps keys to values. A token first multiplies it by a decay, then replaces a part
of the value that the state returns for its key, and reads the state with its query. The state is zero at the start of
each example of a packed row.

Shapes: K heads of queries and keys, each with G heads of values (H = K G), C width of queries and keys, U width of
values, N chunks of c tokens, W inputs of the convolution.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.devices.sharding import Placement
from jaxlm.errors import UserError
from jaxlm.nn.attention import AttentionInputs
from jaxlm.nn.cache import Cache, create
from jaxlm.nn.layers import ACTIVATIONS, Linear, Norm, initial, residual_std
from jaxlm.nn.nodes import array

CHUNK = 64  # maximum number of tokens that are computed together, a power of two
NORM_EPSILON = 1e-6  # added to the squared norms of queries and keys
DECAY_TIMES = (1e-3, 0.1)  # range of the initial softplus of the biases of decays
DECAY_RATES = (1e-2, 16.0)  # range of the initial rates of decays


class Tokens(NamedTuple):
    """The inputs of the delta rule, float32.

    Attributes:
      q_BTKC: normalised and scaled queries.
      k_BTKC: normalised keys.
      v_BTKGU: values.
      beta_BTKG: which part of the value that the state returns for the key is replaced, from 0 to 1.
      log_decay_BTKG: logarithm of the factor of the state, at most 0.
      age_BT: number of earlier tokens of the example.
    """

    q_BTKC: jax.Array
    k_BTKC: jax.Array
    v_BTKGU: jax.Array
    beta_BTKG: jax.Array
    log_decay_BTKG: jax.Array
    age_BT: jax.Array


class Chunks(NamedTuple):
    """The results of `chunked` from which `states_before` computes states.

    Attributes:
      first_NBKGCU: the state before each chunk.
      written_NBKGcU: the difference that each token writes under its key.
    """

    first_NBKGCU: jax.Array
    written_NBKGcU: jax.Array


def recurrent(tokens: Tokens, state_BKGCU: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the outputs [B, T, K, G, U] and the states after each token [T, B, K, G, C, U], token by token.

    The given state is that before the first token.

    Source: Yang et al. 2024 (Gated DeltaNet), section 3.1.
    """

    def step(state: jax.Array, now: Tokens) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        is_first_B = now.age_BT == 0
        decayed = jnp.exp(now.log_decay_BTKG)[..., None, None] * state
        state = jnp.where(is_first_B[:, None, None, None, None], 0, decayed)
        written_BKGU = now.v_BTKGU - jnp.einsum("BKC,BKGCU->BKGU", now.k_BTKC, state)
        written_BKGU *= now.beta_BTKG[..., None]
        state += jnp.einsum("BKC,BKGU->BKGCU", now.k_BTKC, written_BKGU)
        return state, (jnp.einsum("BKC,BKGCU->BKGU", now.q_BTKC, state), state)

    by_token = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)  # in `step`, the arrays have no axis T
    _, (out_TBKGU, states_TBKGCU) = jax.lax.scan(step, state_BKGCU, by_token)
    return jnp.moveaxis(out_TBKGU, 0, 1), states_TBKGCU


def chunked(tokens: Tokens) -> tuple[jax.Array, Chunks]:
    """Returns the outputs [B, T, K, G, U] of whole rows, computed in chunks, and what `states_before` needs.

    A chunk is a few products of matrices, and only the N chunks are computed sequentially. The differences that the
    tokens of a chunk write depend on each other by a triangular system of equations.

    Source: Yang et al. 2024 (Gated DeltaNet), section 3.3.
    """
    T, c = tokens.age_BT.shape[1], chunk_size(tokens.age_BT.shape[1])
    q_NBcKC, k_NBcKC, v_NBcKGU, beta_NBcKG, log_decay_NBcKG, age_NBc = (_split(x, c) for x in tokens)
    apart_cd = jnp.arange(c)[:, None] - jnp.arange(c)
    reads_NBcd = (apart_cd >= 0) & (age_NBc[..., None] >= apart_cd)  # itself and earlier tokens of its example
    # Unlike a cumulative sum of the row, this sum has no rounding errors from other examples.
    sum_of = partial(jnp.einsum, "NBcd,NBdKG->NBKGc", precision=jax.lax.Precision.HIGHEST)
    beta_NBKGc, sum_NBKGc = jnp.moveaxis(beta_NBcKG, 2, 4), sum_of(reads_NBcd.astype(jnp.float32), log_decay_NBcKG)
    decay_NBKGcd = sum_NBKGc[..., None] - sum_NBKGc[..., None, :]
    decay_NBKGcd = jnp.exp(jnp.where(reads_NBcd[:, :, None, None], decay_NBKGcd, -jnp.inf))
    scores = lambda x_NBcKC: jnp.einsum("NBcKC,NBdKC->NBKcd", x_NBcKC, k_NBcKC)[:, :, :, None] * decay_NBKGcd
    lower_NBKGcd = jnp.where(apart_cd > 0, beta_NBKGc[..., None] * scores(k_NBcKC), 0)
    lower_NBHcd = lower_NBKGcd.reshape(*lower_NBKGcd.shape[:2], -1, c, c)  # a product on CPU has at most 7 axes
    inverse_NBKGcd = invert(lower_NBHcd).reshape(lower_NBKGcd.shape)
    # A token whose example begins in the chunk does not read the state before the chunk.
    began_NBc = age_NBc > jnp.arange(c)
    old_NBKGc = jnp.where(began_NBc[:, :, None, None], jnp.exp(sum_NBKGc), 0)

    def step(state: jax.Array, now: Any) -> tuple[jax.Array, tuple[jax.Array, Chunks]]:
        q_BcKC, k_BcKC, v_BcKGU, beta_BKGc, inverse_BKGcd, scores_BKGcd, old_BKGc, last_BKGc = now
        read = lambda x_BcKC: old_BKGc[..., None] * jnp.einsum("BcKC,BKGCU->BKGcU", x_BcKC, state)
        differences_BKGcU = beta_BKGc[..., None] * (jnp.moveaxis(v_BcKGU, 1, 3) - read(k_BcKC))
        written_BKGcU = inverse_BKGcd @ differences_BKGcU
        out_BKGcU = read(q_BcKC) + scores_BKGcd @ written_BKGcU
        after = old_BKGc[..., -1, None, None] * state
        after += jnp.einsum("BcKC,BKGcU->BKGCU", k_BcKC, last_BKGc[..., None] * written_BKGcU)
        return after, (out_BKGcU, Chunks(state, written_BKGcU))

    (_, B, _, K, C), (G, U) = k_NBcKC.shape, v_NBcKGU.shape[-2:]
    last_NBKGc = decay_NBKGcd[..., -1, :]
    of_chunks = q_NBcKC, k_NBcKC, v_NBcKGU, beta_NBKGc, inverse_NBKGcd, scores(q_NBcKC), old_NBKGc, last_NBKGc
    _, (out_NBKGcU, chunks) = jax.lax.scan(step, jnp.zeros((B, K, G, C, U), jnp.float32), of_chunks)
    return out_NBKGcU.transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, K, G, U)[:, :T], chunks


def states_before(tokens: Tokens, chunks: Chunks, positions_BS: jax.Array) -> jax.Array:
    """Returns the states before these positions [B, S, K, G, C, U] of rows that are one example each."""
    c = chunks.written_NBKGcU.shape[4]
    rows_B1, chunks_BS, places_BS = jnp.arange(len(positions_BS))[:, None], positions_BS // c, positions_BS % c
    select = lambda x_NB: x_NB[chunks_BS, rows_B1]
    is_before_BScKG = (jnp.arange(c) < places_BS[..., None])[..., None, None]
    log_decay_BScKG = jnp.where(is_before_BScKG, select(_split(tokens.log_decay_BTKG, c)), 0)
    sum_BScKG = jnp.cumsum(log_decay_BScKG, 2)
    last_BScKG = is_before_BScKG * jnp.exp(sum_BScKG[:, :, -1:] - sum_BScKG)
    k_BScKC, written_BSKGcU = select(_split(tokens.k_BTKC, c)), select(chunks.written_NBKGcU)
    written_BSKGcU *= jnp.moveaxis(last_BScKG, 2, 4)[..., None]
    states = jnp.exp(sum_BScKG[:, :, -1])[..., None, None] * select(chunks.first_NBKGCU)
    return states + jnp.einsum("BScKC,BSKGcU->BSKGCU", k_BScKC, written_BSKGcU)


def chunk_size(T: int) -> int:
    """Returns the number of tokens in a chunk of a row of T tokens, a power of two."""
    return min(CHUNK, 1 << (T - 1).bit_length())


def invert(lower: jax.Array) -> jax.Array:
    """Returns the inverse of I + `lower` for strictly lower triangular matrices [..., c, c]; c is a power of two.

    The inverses of the two blocks on the diagonal give the block below. This takes fewer steps than substitution, and
    unlike a power series it is accurate if keys are equal.
    """
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)  # errors would grow in the products after it

    def invert_blocks(lower: jax.Array) -> jax.Array:
        """Inverts matrices [..., n, c, c]; the blocks of all of them are inverted together."""
        c = lower.shape[-1] // 2
        if not c:
            return jnp.ones_like(lower)
        blocks = jnp.concatenate([lower[..., :c, :c], lower[..., c:, c:]], -3)
        first, last = jnp.split(invert_blocks(blocks), 2, -3)
        below = -product(product(last, lower[..., c:, :c]), first)
        above = jnp.concatenate([first, jnp.zeros_like(first)], -1)
        return jnp.concatenate([above, jnp.concatenate([below, last], -1)], -2)

    return invert_blocks(lower[..., None, :, :])[..., 0, :, :]


def _split(x_BT: jax.Array, c: int) -> jax.Array:
    """Returns an array [B, T, ...] in chunks [N, B, c, ...]; the last one is filled up with zeros."""
    B, T = x_BT.shape[:2]
    x_BT = jnp.pad(x_BT, [(0, 0), (0, -T % c)] + [(0, 0)] * (x_BT.ndim - 2))
    return jnp.moveaxis(x_BT.reshape(B, -1, c, *x_BT.shape[2:]), 1, 0)


class GatedDelta(nn.Module):
    """Linear attention with a short convolution before it and a gated norm after it; an entry of `MIXERS`.

    The cache of a layer stores its states like keys, one in each slot: the state before position p is in slot p mod S.
    In place of values it stores the inputs that the convolution reads at p. Both are floats in every cache format.

    Source: Yang et al. 2024 (Gated DeltaNet), section 3.4. As in Qwen3-Next, the convolution has the activation of the
    MLP.
    """

    config: ModelConfig
    constrain: Placement
    dtype: Any = jnp.float32
    kernel: str = "auto"

    window: ClassVar[int] = 1  # the latest positions that a call needs: the state before its token

    @classmethod
    def entries(cls, config: ModelConfig, causal: bool) -> int:
        """Returns the number of entries of the matrices that multiply each token."""
        K, H, C, U = config.linear_sizes
        return config.width * (2 * K * C + 3 * H * U + 2 * H)

    @classmethod
    def products(cls, config: ModelConfig, T: int, pairs: int) -> int:
        """Returns the number of multiplications in the products of a row of T tokens, except with parameters.

        They are independent of the number of pairs of a query and a key that attention would have.
        """
        (K, H, C, U), c = config.linear_sizes, chunk_size(T)
        of_token = 2 * K * c * C + H * U * (3 * C + 2 * c)
        return -(-T // c) * (c * of_token + H * c * c + H * c * (c * c - 1) // 3)

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        layer: jax.Array | int,
        inputs: AttentionInputs,
        positions_BT: jax.Array,
        context: jax.Array | Cache | None = None,
        cache: Cache | None = None,
        weights: bool = False,
    ) -> tuple[jax.Array, Cache | None, None]:
        """Returns the outputs [B, T, D] and the cache; the arguments are those of `Attention`."""
        config, (B, T, _) = self.config, x_BTD.shape
        K, H, C, U = config.linear_sizes
        parts = self._linear("query", K, C)(x_BTD), self._linear("key", K, C)(x_BTD), self._linear("value", H, U)(x_BTD)
        mixed_BTKM = jnp.concatenate([part.reshape(B, T, K, -1) for part in parts], -1)
        mixed_BTKM = self.constrain(mixed_BTKM, ("batch", None, "heads", None))
        before_BPKM = jnp.zeros((B, config.linear_conv_width - 1, *mixed_BTKM.shape[2:]), self.dtype)
        if cache is None:
            if inputs.segments is None:
                raise UserError(
                    f"model.mixer is {config.mixer!r}, which supports no mask and no prefix; leave them out"
                )
            tokens, mixed_BPKM = self._tokens(x_BTD, before_BPKM, mixed_BTKM, _ages(inputs.segments[0], B, T))
            out_BTKGU, chunks = chunked(tokens)
            if inputs.slot_positions_BS is not None:
                positions_BS = jnp.broadcast_to(inputs.slot_positions_BS, (B, inputs.slot_positions_BS.shape[1]))
                states_BSKGCU = states_before(tokens, chunks, positions_BS)
                cache = create(*_slots(states_BSKGCU, self._windows(mixed_BPKM, positions_BS)))
        else:
            first_B1 = positions_BT[:, :1]
            state_BKGCU, before_BPKM = _read(cache, first_B1, (K, H // K, C, U), before_BPKM.shape)
            tokens, mixed_BPKM = self._tokens(x_BTD, before_BPKM, mixed_BTKM, positions_BT)
            out_BTKGU, states_TBKGCU = recurrent(tokens, state_BKGCU)
            windows = self._windows(mixed_BPKM, jnp.broadcast_to(jnp.arange(1, T + 1), (B, T)))
            cache = cache.write(*_slots(jnp.moveaxis(states_TBKGCU, 0, 1), windows), positions_BT + 1)
        out_BTHU = self.constrain(out_BTKGU.reshape(B, T, H, U), ("batch", "length", "heads", "head_width"))
        out_BTHU = Norm(replace(config, norm="rmsnorm"), self.dtype, name="out_norm")(out_BTHU)
        out_BTHU *= ACTIVATIONS["silu"](self._linear("gate", H, U)(x_BTD))
        out = Linear((config.width,), residual_std(config), False, contract=2, dtype=self.dtype, name="out")
        return out(out_BTHU), cache, None

    def _linear(self, name: str, *features: int) -> Linear:
        return Linear(features, self.config.matrix_std, False, dtype=self.dtype, name=name)

    def _tokens(
        self, x_BTD: jax.Array, before_BPKM: jax.Array, mixed_BTKM: jax.Array, age_BT: jax.Array
    ) -> tuple[Tokens, jax.Array]:
        """Returns the inputs of the delta rule, and those of the convolution, from the P before the first token."""
        (K, H, C, U), W = self.config.linear_sizes, self.config.linear_conv_width
        conv = lambda name, n, width: array(self, f"{name}_conv", initial(self.config, W), (W, n, width))
        kernels = conv("query", K, C), conv("key", K, C), conv("value", H, U)
        kernel_WKM = jnp.concatenate([kernel.reshape(W, K, -1) for kernel in kernels], -1)
        mixed_BPKM, T = jnp.concatenate([before_BPKM, mixed_BTKM], 1), mixed_BTKM.shape[1]
        read_BTKM = jnp.zeros(mixed_BTKM.shape, jnp.float32)
        for n in range(W):
            is_own_BT = age_BT >= W - 1 - n
            read_BTKM += jnp.where(is_own_BT[..., None, None], mixed_BPKM[:, n : n + T], 0) * kernel_WKM[n]
        q_BTKC, k_BTKC, v_BTKV = jnp.split(ACTIVATIONS[self.config.activation](read_BTKM), (C, 2 * C), -1)
        by_head = lambda x_BTH: x_BTH.astype(jnp.float32).reshape(*x_BTH.shape[:2], K, H // K)
        log_rate_H = array(self, "log_rate", _initial_log_rates, (H,))
        times_BTH = self._linear("decay", H)(x_BTD) + array(self, "decay_bias", _initial_decay_biases, (H,))
        log_decay_BTKG = by_head(-jnp.exp(log_rate_H) * jax.nn.softplus(times_BTH))
        beta_BTKG = jax.nn.sigmoid(by_head(self._linear("beta", H)(x_BTD)))
        v_BTKGU = v_BTKV.reshape(*v_BTKV.shape[:3], H // K, U)
        q_BTKC, k_BTKC = _normalise(q_BTKC) / math.sqrt(C), _normalise(k_BTKC)
        return Tokens(q_BTKC, k_BTKC, v_BTKGU, beta_BTKG, log_decay_BTKG, age_BT), mixed_BPKM

    def _windows(self, mixed_BPKM: jax.Array, places_BS: jax.Array) -> jax.Array:
        """Returns the inputs of the convolution before places of the row, [B, S, W - 1, K, M]."""
        at_BSW = places_BS[..., None] + jnp.arange(self.config.linear_conv_width - 1)
        return mixed_BPKM[jnp.arange(len(places_BS))[:, None, None], at_BSW]


def _normalise(x_BTKC: jax.Array) -> jax.Array:
    return x_BTKC * jax.lax.rsqrt(jnp.square(x_BTKC).sum(-1, keepdims=True) + NORM_EPSILON)


def _ages(segments_BT: jax.Array | None, B: int, T: int) -> jax.Array:
    """Returns the number of earlier tokens of each token's example in the row, [B, T]."""
    places_T = jnp.arange(T)
    if segments_BT is None:
        return jnp.broadcast_to(places_T, (B, T))
    starts_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], [(0, 0), (1, 0)])
    return jnp.broadcast_to(places_T - jax.lax.cummax(jnp.where(starts_BT, places_T, 0), 1), (B, T))


def _slots(states_BSKGCU: jax.Array, windows_BSWKM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns states and inputs of the convolution as keys [B, S, H, CU] and values [B, S, K, WM]."""
    B, S, K, G, C, U = states_BSKGCU.shape
    windows_BSKWM = jnp.moveaxis(windows_BSWKM, 2, 3)
    return states_BSKGCU.reshape(B, S, K * G, C * U), windows_BSKWM.reshape(B, S, K, -1)


def _read(
    cache: Cache, positions_B1: jax.Array, state: tuple[int, ...], inputs: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Returns the states before these positions, and the inputs of the convolution, in these shapes.

    Before position 0 their values have no meaning.
    """
    slots_B111 = (positions_B1 % cache.slots)[..., None, None]
    read = lambda x_BHSC: jnp.take_along_axis(x_BHSC, slots_B111, 2)[:, :, 0]
    B, W, K, M = inputs
    windows_BKWM = read(cache.v_BKSC).reshape(B, K, W, M)
    return read(cache.k_BKSC).reshape(B, *state), jnp.moveaxis(windows_BKWM, 1, 2)


def _initial_log_rates(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.log(jax.random.uniform(key, shape, dtype, *DECAY_RATES))


def _initial_decay_biases(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Returns biases whose softplus is log-uniform, so that the heads forget at different times."""
    low, high = map(math.log, DECAY_TIMES)
    times = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    return times + jnp.log(-jnp.expm1(-times))  # the inverse of softplus
