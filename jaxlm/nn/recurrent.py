"""Recurrent mixers: LSTM (Hochreiter and Schmidhuber 1997) and GRU (Cho et al. 2014), with the gates of PyTorch.

A decoder reads each example from left to right. An encoder reads it in both directions, each with half of the width
(Schuster and Paliwal 1997). The state is zero at the start of each example of a packed row.

Shapes: N directions, H units of a direction (N H = D), G outputs of all gates of a direction.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.devices.sharding import Placement
from jaxlm.errors import UserError
from jaxlm.nn.attention import AttentionInputs
from jaxlm.nn.cache import Cache, create
from jaxlm.nn.layers import Linear, float32_einsum, initial
from jaxlm.nn.nodes import array

State = tuple[jax.Array, ...]  # arrays [B, N, H]; the first is the output


class _Recurrent(nn.Module):
    """Base of recurrent mixers; an entry of `MIXERS`.

    The cache of a layer stores its states like keys and values, one in each slot: the state after position p is in slot
    p mod S. A call begins with the state before its first token, so that tokens can be read again.
    """

    config: ModelConfig
    constrain: Placement
    dtype: Any = jnp.float32
    kernel: str = "auto"

    window: ClassVar[int] = 2  # the latest positions that a call needs: its token, and the state before it
    gates: ClassVar[int]
    arrays: ClassVar[int] = 1  # in a state

    @classmethod
    def entries(cls, config: ModelConfig, causal: bool) -> int:
        """Returns the number of entries of the matrices that multiply each token."""
        D, H = config.width, config.width // (1 if causal else 2)
        return cls.gates * D * (D + H)

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
        config, (B, T, D) = self.config, x_BTD.shape
        N = 1 if inputs.causal or cache is not None else 2
        H, G = D // N, self.gates * D // N
        x_BTNG = Linear((N, G), config.matrix_std, False, dtype=self.dtype, name="input")(x_BTD).astype(jnp.float32)
        x_BTNG = self.constrain(x_BTNG + array(self, "bias", self._initial_bias, (N, G)), ("batch", None, None, None))
        kernel_NHG = array(self, "recurrent_kernel", initial(config, H), (N, H, G)).astype(self.dtype)
        own = self._cell_parameters(N, H)
        segments_BT = None
        if cache is None and inputs.segments is None:
            raise UserError(f"model.mixer is {config.mixer!r}, which supports no mask and no prefix; leave them out")
        if inputs.segments is not None:
            segments_BT = inputs.segments[0]

        def step(state: State, now: tuple[jax.Array, jax.Array | None]) -> tuple[State, State]:
            x_BNG, starts_BN = now
            if starts_BN is not None:
                state = tuple(jnp.where(starts_BN[..., None], 0, part) for part in state)
            recurrent_BNG = float32_einsum("BNH,NHG->BNG", state[0].astype(self.dtype), kernel_NHG)
            state = self._cell(x_BNG, recurrent_BNG, state, own)
            return state, state

        first = tuple(jnp.zeros((B, N, H), jnp.float32) for _ in range(self.arrays))
        if cache is not None:
            first = _read(cache, positions_BT[:, 0], self.arrays)
        starts_BTN = None if segments_BT is None else _starts(segments_BT, N, B)
        xs = jax.tree.map(lambda x: jnp.moveaxis(_flip(x), 1, 0), (x_BTNG, starts_BTN))
        states = jax.lax.scan(step, first, xs)[1]
        states = tuple(_flip(jnp.moveaxis(part, 0, 1)) for part in states)
        if cache is not None:
            cache = cache.write(states[0], states[-1], positions_BT)
        elif inputs.slot_positions_BS is not None:
            select = partial(jnp.take_along_axis, indices=inputs.slot_positions_BS[..., None, None], axis=1)
            cache = create(select(states[0]), select(states[-1]))
        return states[0].reshape(B, T, D).astype(self.dtype), cache, None

    def _initial_bias(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.zeros(shape, dtype)

    def _cell_parameters(self, N: int, H: int) -> Any:
        """Returns the parameters of the cell in addition to matrices and biases of the gates."""
        return None

    def _cell(self, x_BNG: jax.Array, recurrent_BNG: jax.Array, state: State, own: Any) -> State:
        """Returns the next state from the projected inputs, the projected last output, and the last state."""
        raise NotImplementedError


class LSTM(_Recurrent):
    """Long short-term memory with a forget gate (Gers et al. 2000); the gates are input, forget, cell and output.

    There is one bias for each gate, the sum of the two in PyTorch. The forget gate's is 1 at first, so that the cell
    keeps its value (Jozefowicz et al. 2015).
    """

    gates: ClassVar[int] = 4
    arrays: ClassVar[int] = 2

    def _initial_bias(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        H = shape[1] // 4
        return jnp.zeros(shape, dtype).at[:, H : 2 * H].set(1)

    def _cell(self, x_BNG: jax.Array, recurrent_BNG: jax.Array, state: State, own: Any) -> State:
        input_BNH, forget_BNH, cell_BNH, output_BNH = jnp.split(x_BNG + recurrent_BNG, 4, -1)
        c_BNH = jax.nn.sigmoid(forget_BNH) * state[1] + jax.nn.sigmoid(input_BNH) * jnp.tanh(cell_BNH)
        return jax.nn.sigmoid(output_BNH) * jnp.tanh(c_BNH), c_BNH


class GRU(_Recurrent):
    """Gated recurrent unit; the gates are reset, update and candidate.

    As in PyTorch, the reset gate multiplies the projected output, which has its own bias. The biases of the other two
    gates are the sums of the two in PyTorch.
    """

    gates: ClassVar[int] = 3

    def _cell_parameters(self, N: int, H: int) -> Any:
        return array(self, "candidate_bias", nn.initializers.zeros, (N, H))

    def _cell(self, x_BNG: jax.Array, recurrent_BNG: jax.Array, state: State, own: Any) -> State:
        x_reset_BNH, x_update_BNH, x_candidate_BNH = jnp.split(x_BNG, 3, -1)
        h_reset_BNH, h_update_BNH, h_candidate_BNH = jnp.split(recurrent_BNG, 3, -1)
        reset_BNH = jax.nn.sigmoid(x_reset_BNH + h_reset_BNH)
        update_BNH = jax.nn.sigmoid(x_update_BNH + h_update_BNH)
        candidate_BNH = jnp.tanh(x_candidate_BNH + reset_BNH * (h_candidate_BNH + own))
        return ((1 - update_BNH) * candidate_BNH + update_BNH * state[0],)


def _flip(x_BTN: jax.Array) -> jax.Array:
    """Returns an array [B, T, N, ...] with the positions of the second direction, if there is one, reversed."""
    if x_BTN.shape[2] == 1:
        return x_BTN
    return jnp.stack([x_BTN[:, :, 0], x_BTN[:, ::-1, 1]], 2)


def _starts(segments_BT: jax.Array, N: int, B: int) -> jax.Array:
    """Returns where each direction enters an example [B, T, N]: its first position, or its last one in reverse."""
    changes_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    starts_BT = jnp.pad(changes_BT, [(0, 0), (1, 0)])
    ends_BT = jnp.pad(changes_BT, [(0, 0), (0, 1)])
    return jnp.broadcast_to(jnp.stack([starts_BT, ends_BT][:N], -1), (B, segments_BT.shape[1], N))


def _read(cache: Cache, positions_B: jax.Array, arrays: int) -> State:
    """Returns the state [B, 1, H] before these positions; zero before position 0."""
    slots_B11 = ((positions_B - 1) % cache.slots)[:, None, None, None]
    read = lambda x_BKSC: jnp.take_along_axis(x_BKSC, slots_B11, 2)[:, :, 0]
    states = (read(cache.k_BKSC), read(cache.v_BKSC))[:arrays]
    return tuple(jnp.where(positions_B[:, None, None] > 0, part, 0) for part in states)
