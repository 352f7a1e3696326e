"""Mixtures of experts: a router sends each token to a few of many feed-forward layers (Shazeer et al. 2017).

The tokens are sorted by expert, and each expert multiplies its own tokens only. Without a capacity no token is dropped,
and the result is that of a loop over the experts. With the mesh axis `expert`, the devices of a group share the tokens
of their rows: each device gathers them, applies its own experts, and returns the sums for its rows.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.config import ModelConfig
from jaxlm.devices.sharding import Placement
from jaxlm.nn.kernels import backend_of
from jaxlm.nn.layers import ACTIVATIONS, GatedMLP, Linear, float32_einsum, initial, residual_std
from jaxlm.nn.nodes import array

MAX_BLOCK = 128  # rows of one expert that are multiplied together
MIN_BLOCK = 8
EXPERT = "expert"  # the mesh axis over which experts are sharded
TENSOR = "tensor"  # the mesh axis over which the width of each expert is sharded


class Routing(NamedTuple):
    """The experts of each token.

    Attributes:
      ids_BTk: numbers of the k experts; `config.experts` for padding, which has none.
      weights_BTk: factors of their outputs.
      losses: the auxiliary losses, each summed over the tokens.
    """

    ids_BTk: jax.Array
    weights_BTk: jax.Array
    losses: dict[str, jax.Array]


def route(
    logits_BTX: jax.Array, tokens_BT: jax.Array, config: ModelConfig, correction_X: jax.Array | None = None
) -> Routing:
    """Returns the experts with the largest scores, and the losses of the router.

    Args:
      logits_BTX: float32 logits of the X experts.
      tokens_BT: False for padding.
      config: the model's config.
      correction_X: terms that are added to the scores for the choice of the experts; None: none.

    The balance loss is X times the sum over the experts of the fraction of tokens and the mean probability; it is 1 for
    equal loads (Fedus et al. 2021, equations 4 to 6). The z loss is the mean of the squared log of the sum of the
    exponentials (Zoph et al. 2022, equation 5). Both are multiplied by their coefficients in the config.
    """
    X, k = config.experts, config.experts_per_token
    probabilities_BTX = scores_BTX = jax.nn.softmax(logits_BTX)
    if config.router_scores == "sigmoid":
        scores_BTX = jax.nn.sigmoid(logits_BTX)
        probabilities_BTX = scores_BTX / scores_BTX.sum(-1, keepdims=True)
    weights_BTk, ids_BTk = _choose(scores_BTX, config, correction_X)
    if config.normalize_experts:
        weights_BTk /= weights_BTk.sum(-1, keepdims=True)
    if config.expert_scale != 1:
        weights_BTk *= config.expert_scale
    real_BT = tokens_BT.astype(jnp.float32)
    chosen_X = (jax.nn.one_hot(ids_BTk, X) * real_BT[..., None, None]).sum((0, 1, 2))
    load_X = jax.lax.stop_gradient(chosen_X / jnp.maximum(k * real_BT.sum(), 1))
    losses = {
        "balance": config.balance_loss * X * (probabilities_BTX * real_BT[..., None] * load_X).sum(),
        "router_z": config.router_z_loss * (jnp.square(jax.nn.logsumexp(logits_BTX, axis=-1)) * real_BT).sum(),
    }
    return Routing(jnp.where(tokens_BT[..., None], ids_BTk, X), weights_BTk, losses)


def _choose(scores_BTX: jax.Array, config: ModelConfig, correction_X: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns the scores of the chosen experts of each token, and their numbers.

    The groups with the largest score of an expert remain (DeepSeek-V2, section 2.1.2), or if the scores are sigmoids,
    those with the largest sum of the scores of two experts (DeepSeek-V3, section 2.1.2).
    """
    groups, k = config.expert_groups, config.experts_per_token
    compared_BTX = scores_BTX if correction_X is None else scores_BTX + correction_X
    if groups > 1:
        compared_BTgX = compared_BTX.reshape(*compared_BTX.shape[:-1], groups, -1)
        best = 1 if config.router_scores == "softmax" else 2
        of_groups_BTg = jax.lax.top_k(compared_BTgX, best)[0].sum(-1)
        chosen_BTn = jax.lax.top_k(of_groups_BTg, config.expert_groups_per_token)[1]
        remains_BTg = jax.nn.one_hot(chosen_BTn, groups, dtype=bool).any(-2)
        compared_BTX = jnp.where(remains_BTg[..., None], compared_BTgX, -jnp.inf).reshape(compared_BTX.shape)
    if compared_BTX is scores_BTX:
        weights_BTk, ids_BTk = jax.lax.top_k(scores_BTX, k)
        return weights_BTk, ids_BTk
    ids_BTk = jax.lax.top_k(jax.lax.stop_gradient(compared_BTX), k)[1]
    return jnp.take_along_axis(scores_BTX, ids_BTk, -1), ids_BTk


class Matrices(NamedTuple):
    """The matrices of X experts: the inputs, the gates and the output of each, and their biases or None."""

    up_XDF: jax.Array
    gate_XDF: jax.Array
    down_XFD: jax.Array
    up_bias_XF: jax.Array | None = None
    gate_bias_XF: jax.Array | None = None
    down_bias_XD: jax.Array | None = None


class Experts(nn.Module):
    """A feed-forward layer of routed experts with gates, and, if `shared_expert_width` is set, an expert of all tokens.

    The fields and the signature are those of `jaxlm.nn.layers.MLP`. There is no dropout of activations.
    """

    config: ModelConfig
    constrain: Placement
    dtype: Any = jnp.float32

    @staticmethod
    def entries(config: ModelConfig) -> int:
        """Returns the number of entries of the matrices that multiply each token."""
        columns = config.experts_per_token * config.expert_F + config.shared_expert_width
        return config.width * (3 * columns + config.experts + config.shared_expert_gate)

    @nn.compact
    def __call__(self, x_BTD: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the output [B, T, D] and the losses `balance` and `router_z`, each summed over the tokens.

        `tokens_BT` is False for padding.
        """
        config = self.config
        router_DX = array(self, "router", initial(config, config.width), (config.width, config.experts))
        logits_BTX = float32_einsum("BTD,DX->BTX", x_BTD.astype(self.dtype), router_DX)
        if "experts" in config.biases:
            logits_BTX += array(self, "router_bias", nn.initializers.zeros, (config.experts,))
        correction_X = None
        if config.router_correction:
            correction_X = array(self, "router_correction", nn.initializers.zeros, (config.experts,))
        routing = route(logits_BTX, tokens_BT, config, correction_X)
        matrices = _Matrices(config, self.dtype, name="experts")()
        capacity = config.expert_capacity if self.has_rng("dropout") else None  # only in training
        y_BTD = self._mix(x_BTD.astype(self.dtype), routing, matrices, capacity)
        if config.shared_expert_width:
            y_BTD += self._shared(x_BTD, tokens_BT)
        return y_BTD, routing.losses

    def _shared(self, x_BTD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        config = self.config
        shared = dataclasses.replace(config, mlp_width=config.shared_expert_width)
        y_BTD, _ = GatedMLP(shared, self.constrain, self.dtype, name="shared")(x_BTD, tokens_BT)
        if not config.shared_expert_gate:
            return y_BTD
        gate = Linear((1,), config.matrix_std, False, dtype=self.dtype, name="shared_gate")
        return y_BTD * jax.nn.sigmoid(gate(x_BTD))

    def _mix(self, x_BTD: jax.Array, routing: Routing, matrices: Matrices, capacity: float | None) -> jax.Array:
        """Returns the weighted sums of the outputs of the experts, [B, T, D], on any mesh."""
        mesh, inputs = self.constrain.mesh, (x_BTD, routing.ids_BTk, routing.weights_BTk, matrices)
        platform = backend_of(mesh).platform
        mix = partial(mix_experts, self.config, capacity=capacity, platform=platform)
        if mesh is None or mesh.size == 1 or self.constrain.whole:
            return mix(*inputs)
        rows = self.constrain.spec(("batch", "length", None), x_BTD.shape)
        gathers = EXPERT in (rows[0] or ())  # whether the rows are divided among the devices of the experts

        def mix_own(x_BTD: jax.Array, ids_BTk: jax.Array, weights_BTk: jax.Array, matrices: Matrices) -> jax.Array:
            first = jax.lax.axis_index(EXPERT) * len(matrices.up_XDF)
            shared = (x_BTD, ids_BTk, weights_BTk)
            if gathers:
                shared = tuple(jax.lax.all_gather(x, EXPERT, axis=0, tiled=True) for x in shared)
            if matrices.down_bias_XD is not None:  # the sum has one for each device
                matrices = matrices._replace(down_bias_XD=matrices.down_bias_XD / mesh.shape[TENSOR])
            y_BTD = jax.lax.psum(mix(*shared, matrices, first=first), TENSOR)
            if gathers:
                return jax.lax.psum_scatter(y_BTD, EXPERT, scatter_dimension=0, tiled=True)
            return jax.lax.psum(y_BTD, EXPERT)

        up: Any = PartitionSpec(EXPERT, None, TENSOR)
        down: Any = PartitionSpec(EXPERT, TENSOR)
        biases: Any = (down, down, PartitionSpec(EXPERT)) if matrices.up_bias_XF is not None else ()
        specs = (rows, rows, rows, Matrices(up, up, down, *biases))
        return jax.shard_map(mix_own, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(*inputs)


class _Matrices(nn.Module):
    """The parameters of the experts in `dtype`."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self) -> Matrices:
        config = self.config
        X, D, F = config.experts, config.width, config.expert_F

        def make(name: str, std: float | None, inputs: int, outputs: int) -> jax.Array:
            init = nn.initializers.normal(1 / math.sqrt(inputs) if std is None else std)
            return array(self, name, init, (X, inputs, outputs), stacked=1).astype(self.dtype)

        def make_bias(name: str, outputs: int) -> jax.Array:
            return array(self, name, nn.initializers.zeros, (X, outputs)).astype(self.dtype)

        up, gate = (make(name, config.matrix_std, D, F) for name in ("up", "gate"))
        down = make("down", residual_std(config), F, D)
        if "experts" not in config.biases:
            return Matrices(up, gate, down)
        return Matrices(up, gate, down, make_bias("up_bias", F), make_bias("gate_bias", F), make_bias("down_bias", D))


def mix_experts(
    config: ModelConfig,
    x_BTD: jax.Array,
    ids_BTk: jax.Array,
    weights_BTk: jax.Array,
    matrices: Matrices,
    *,
    capacity: float | None = None,
    first: jax.Array | int = 0,
    platform: str = "cpu",
) -> jax.Array:
    """Returns the weighted sums of the outputs of the experts of each token, [B, T, D].

    Args:
      config: the model's config.
      x_BTD: hidden states.
      ids_BTk: numbers of the experts of each token; numbers that have no matrices count as no expert.
      weights_BTk: factors of their outputs.
      matrices: the matrices of the experts from number `first` on.
      capacity: maximum number of tokens of an expert, as a multiple of an equal share; later tokens are dropped. None:
        no limit.
      first: number of the first expert.
      platform: the hardware.
    """
    N, k, X = math.prod(x_BTD.shape[:2]), ids_BTk.shape[-1], len(matrices.up_XDF)
    limit = N if capacity is None else min(N, math.ceil(capacity * N * k / config.experts))
    sorted_rows = sort_by_expert(ids_BTk.reshape(N, k) - first, X, limit, 1 if platform == "tpu" else None)

    def multiply(x_RI: jax.Array, kernel_XIO: jax.Array, bias_XO: jax.Array | None) -> jax.Array:
        y_RO = grouped_dot(x_RI, kernel_XIO, sorted_rows, platform)
        return y_RO if bias_XO is None else y_RO + bias_XO[sorted_rows.experts_R].astype(y_RO.dtype)

    x_RD = x_BTD.reshape(N, -1).at[sorted_rows.tokens_R].get(mode="fill", fill_value=0)
    inputs_RF = multiply(x_RD, matrices.up_XDF, matrices.up_bias_XF)
    gates_RF = multiply(x_RD, matrices.gate_XDF, matrices.gate_bias_XF)
    if config.expert_limit:
        inputs_RF = jnp.clip(inputs_RF, -config.expert_limit, config.expert_limit)
        gates_RF = jnp.minimum(gates_RF, config.expert_limit)
    if config.expert_offset:
        inputs_RF += config.expert_offset
    y_RD = multiply(inputs_RF * ACTIVATIONS[config.activation](gates_RF), matrices.down_XFD, matrices.down_bias_XD)
    y_NkD = y_RD.at[sorted_rows.rows_Nk].get(mode="fill", fill_value=0)
    y_ND = (y_NkD.astype(jnp.float32) * weights_BTk.reshape(N, k, 1)).sum(1)
    return y_ND.reshape(x_BTD.shape).astype(x_BTD.dtype)


class SortedRows(NamedTuple):
    """The places of R rows, sorted by expert, for the k experts of N tokens.

    The rows of an expert start at a multiple of the block size; the rest of its last block has no token.

    Attributes:
      tokens_R: the token in each row; N for rows without one.
      rows_Nk: the row of each token for each of its experts; R where it has none.
      sizes_X: number of rows of each expert, with the rest of its last block.
      block: the block size b.
    """

    tokens_R: jax.Array
    rows_Nk: jax.Array
    sizes_X: jax.Array
    block: int

    @property
    def experts_R(self) -> jax.Array:
        """The expert of each row; for rows after the last expert, the last one."""
        rows_R = jnp.arange(len(self.tokens_R))
        return jnp.minimum(jnp.searchsorted(jnp.cumsum(self.sizes_X), rows_R, side="right"), len(self.sizes_X) - 1)


def sort_by_expert(ids_Nk: jax.Array, X: int, limit: int, block: int | None = None) -> SortedRows:
    """Returns the places of tokens, sorted by expert.

    Args:
      ids_Nk: the experts of each token; numbers outside of 0 to X - 1 are no experts.
      X: number of experts.
      limit: maximum number of tokens of an expert.
      block: the block size; None: a power of two, so that about four blocks of each expert are full.
    """
    N, k = ids_Nk.shape
    M = N * k
    if block is None:
        block = min(MAX_BLOCK, max(MIN_BLOCK, 1 << max(0, M // (4 * X)).bit_length() - 1 if M >= 4 * X else 0))
    # Each expert has at most one block that is not full.
    blocks = min(M, M // block + X, X * -(-limit // block))
    R = blocks * block
    ids_M = jnp.where((ids_Nk >= 0) & (ids_Nk < X), ids_Nk, X).reshape(M)
    counts_X = jnp.zeros(X, jnp.int32).at[ids_M].add(1, mode="drop")
    sizes_X = -(-jnp.minimum(counts_X, limit) // block) * block
    order_M = jnp.argsort(ids_M, stable=True)
    sorted_M = ids_M[order_M]
    before = lambda counts_X: jnp.concatenate([jnp.cumsum(counts_X) - counts_X, jnp.zeros(1, counts_X.dtype)])[sorted_M]
    place_M = jnp.arange(M) - before(counts_X)  # among the tokens of the expert
    rows_M = jnp.where((sorted_M < X) & (place_M < limit), before(sizes_X) + place_M, R)
    tokens_R = jnp.full(R, N, jnp.int32).at[rows_M].set(order_M // k, mode="drop")
    rows_Nk = jnp.zeros(M, jnp.int32).at[order_M].set(rows_M).reshape(N, k)
    return SortedRows(tokens_R, rows_Nk, sizes_X, block)


def grouped_dot(x_RI: jax.Array, kernel_XIO: jax.Array, rows: SortedRows, platform: str = "cpu") -> jax.Array:
    """Returns the product of each row with the matrix of its expert, [R, O], in the dtype of x.

    A TPU has an instruction for it. Elsewhere JAX would multiply all rows with all matrices, and so a loop multiplies
    the blocks of rows, each with one matrix.
    """
    if platform == "tpu":
        y = jax.lax.ragged_dot(x_RI, kernel_XIO, rows.sizes_X, preferred_element_type=jnp.float32)
        return y.astype(x_RI.dtype)
    n = len(x_RI) // rows.block
    ends_X = jnp.cumsum(rows.sizes_X) // rows.block
    expert_n = jnp.minimum(jnp.searchsorted(ends_X, jnp.arange(n), side="right"), len(kernel_XIO) - 1)
    # A GPU would wait for the CPU in each iteration of a loop of unknown length.
    used = ends_X[-1] if platform == "cpu" else None
    y_nbO = _grouped_dot(x_RI.reshape(n, rows.block, -1), kernel_XIO, expert_n, used)
    return y_nbO.reshape(len(x_RI), -1)


# JAX cannot differentiate a loop of unknown length, and would add the gradients of all matrices in each iteration.
@jax.custom_vjp
def _grouped_dot(x_nbI: jax.Array, kernel_XIO: jax.Array, expert_n: jax.Array, used: Any) -> jax.Array:
    return multiply_blocks(x_nbI, kernel_XIO, expert_n, used)


def _grouped_dot_forward(*inputs: Any) -> tuple[jax.Array, Any]:
    return multiply_blocks(*inputs), inputs


def _grouped_dot_backward(inputs: Any, gradient_nbO: jax.Array) -> Any:
    x_nbI, kernel_XIO, *places = inputs
    of_x = multiply_blocks(gradient_nbO, kernel_XIO, *places, transposed=True)
    of_kernel = sum_blocks(x_nbI, gradient_nbO, kernel_XIO.shape, *places)
    return of_x, of_kernel.astype(kernel_XIO.dtype), None, None


_grouped_dot.defvjp(_grouped_dot_forward, _grouped_dot_backward)


@partial(jax.jit, static_argnames="transposed")
def multiply_blocks(
    x_nbI: jax.Array, kernel_XIO: jax.Array, expert_n: jax.Array, used: Any, transposed: bool = False
) -> jax.Array:
    """Returns the products of the blocks with the matrices of their experts, [n, b, O]; zeros after `used` blocks.

    Args:
      x_nbI: n blocks of b rows; if `transposed`, [n, b, O].
      kernel_XIO: the matrices.
      expert_n: the expert of each block.
      used: number of blocks that are multiplied; None: all.
      transposed: whether to multiply by the transposed matrices, for the gradient.
    """
    spec = "bO,IO->bI" if transposed else "bI,IO->bO"

    def multiply(i: Any, y_nbO: jax.Array) -> jax.Array:
        kernel_IO = kernel_XIO[expert_n[i]].astype(x_nbI.dtype)
        y_bO = jnp.einsum(spec, x_nbI[i], kernel_IO, preferred_element_type=jnp.float32)
        return y_nbO.at[i].set(y_bO.astype(y_nbO.dtype))

    outputs = kernel_XIO.shape[1 if transposed else 2]
    return jax.lax.fori_loop(
        0, len(x_nbI) if used is None else used, multiply, jnp.zeros((*x_nbI.shape[:2], outputs), x_nbI.dtype)
    )


@partial(jax.jit, static_argnames="shape")
def sum_blocks(
    x_nbI: jax.Array, gradient_nbO: jax.Array, shape: tuple[int, ...], expert_n: jax.Array, used: Any
) -> jax.Array:
    """Returns the gradient of the matrices, float32 [X, I, O]: for each, the sum of the products of its blocks."""

    def add(i: Any, sum_XIO: jax.Array) -> jax.Array:
        product = jnp.einsum("bI,bO->IO", x_nbI[i], gradient_nbO[i], preferred_element_type=jnp.float32)
        return sum_XIO.at[expert_n[i]].add(product)

    return jax.lax.fori_loop(0, len(x_nbI) if used is None else used, add, jnp.zeros(shape, jnp.float32))
