"""Floating-point operations (FLOPs) of the matrix products of a program: counted in its jaxpr, or by a formula.

A product of [M, K] with [K, N] takes 2 M N K FLOPs. Elementwise operations are not counted: they are a small part of a
Transformer, and a chip's peak rate is that of its matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

from jaxlm.config import ModelConfig
from jaxlm.nn import windows
from jaxlm.nn.block import FEED_FORWARDS, MIXERS
from jaxlm.nn.dot_product import BLOCK
from jaxlm.nn.layer_parts import Parts, parts_of

# Counts


def count(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> int:
    """Returns the exact FLOPs of all matrix products and convolutions of a jaxpr, over all devices.

    The body of a scan counts once per iteration, and recomputed operations (remat) count each time. Of the branches of
    a condition, the largest counts. The body of `shard_map` counts for all devices. The body of a Pallas kernel counts
    for each step of its grid, including skipped steps, so that the count of a kernel is an upper bound.

    Raises:
      ValueError: if a while loop with products has an unknown number of iterations, or if a Pallas kernel with
        products has a grid of unknown size.

    >>> count(jax.make_jaxpr(jnp.matmul)(jnp.ones((2, 3)), jnp.ones((3, 5))))
    60
    """
    plain: Any = jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr
    return sum(_count_equation(equation) for equation in plain.eqns)


def _count_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, outputs = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
        return 2 * math.prod(equation.outvars[0].aval.shape) * (math.prod(kernel) // kernel[outputs])
    if name == "ragged_dot_general":
        return _count_ragged(equation)
    if name in ("jit", "pjit") and params.get("name") in _BLOCKS:
        return _count_blocks(equation)
    if name == "scaled_matmul":
        raise ValueError(f"the products of {name} are not counted yet; add them to jaxlm.nn.flops")
    if name == "scan":
        return params["length"] * count(params["jaxpr"])
    if name == "cond":
        return max(count(branch) for branch in params["branches"])
    if name == "while":
        body, condition = count(params["body_jaxpr"]), count(params["cond_jaxpr"])
        iterations = _iterations(equation) if body or condition else 0
        return iterations * body + (iterations + 1) * condition
    if name == "shard_map":
        axes = params.get(
            "newly_manual_axes", params.get("manual_axes")
        )  # the second key is used by other versions of JAX
        return math.prod(params["mesh"].shape[axis] for axis in axes) * count(params["jaxpr"])
    if name == "pallas_call" and params.get("name") in _TRITON:
        return _count_triton(equation)
    if name == "pallas_call":
        body, grid = count(params["jaxpr"]), params["grid_mapping"].grid
        if body and not all(isinstance(size, int) for size in grid):
            raise ValueError(f"the grid {grid} of a Pallas kernel with products is not known before it runs")
        return body and body * math.prod(grid)
    if name.startswith("dot_product_attention_"):  # cuDNN's kernel
        return _count_cudnn(equation)
    # All kinds of calls (jit, remat, custom_jvp_call, custom_vjp_call ...) count once.
    return sum(count(value) for value in params.values() if isinstance(value, (core.ClosedJaxpr, core.Jaxpr)))


def _count_ragged(equation: Any) -> int:
    """Returns the FLOPs of rows times the matrices of their groups, or of the gradient of these matrices."""
    (left, right, _), out = (var.aval.shape for var in equation.invars), equation.outvars[0].aval.shape
    if len(right) == 3:  # [R, I] and [X, I, O], or its transpose
        return 2 * math.prod(out) * left[-1]
    return 2 * math.prod(out[1:]) * left[0]


# Functions of `jaxlm.nn.experts` whose loops end after the last block with tokens; the count includes the others.
_BLOCKS = ("multiply_blocks", "sum_blocks")


def _count_blocks(equation: Any) -> int:
    """Returns the FLOPs of n blocks of b rows, each times one matrix."""
    function = equation.params["jaxpr"].jaxpr
    loop = next((inner for inner in function.eqns if inner.primitive.name == "while"), None)
    if loop is None:
        return count(function)
    n = next(var.aval.shape[0] for var in loop.invars if var.aval.ndim == 1)  # the experts of the blocks
    return n * count(loop.params["body_jaxpr"])


_CUDNN_CAUSAL = ("CAUSAL", "PADDING_CAUSAL")  # mask types of cuDNN's kernel
_CUDNN_BTHC = 0  # a layout


def _count_cudnn(equation: Any) -> int:
    """Returns the FLOPs of cuDNN's attention; a causal mask leaves the pairs of a triangle.

    The forward pass has the products for the scores and the output. The backward pass computes the scores again, and
    the gradients of the weights, queries, keys and values.
    """
    q, k, params = equation.invars[0].aval.shape, equation.invars[1].aval.shape, equation.params
    B, T, H, C = q if params["layout"] == _CUDNN_BTHC else (q[0], q[2], q[1], q[3])
    S = k[1] if params["layout"] == _CUDNN_BTHC else k[2]
    pairs = T * (T + 1) // 2 if params["mask_type"].name in _CUDNN_CAUSAL and T == S else T * S
    return (4 if equation.primitive.name.startswith("dot_product_attention_fwd") else 10) * B * H * C * pairs


# FLOPs of the kernels of JAX's attention for GPUs, for each pair of positions and each channel. The backward pass
# computes the scores and the gradient of the weights twice: for the queries, and for the keys and values.
_TRITON = {"mha_forward": 4, "mha_backward": 14}


def _count_triton(equation: Any) -> int:
    """Returns the FLOPs of a kernel of JAX's attention for GPUs; a causal mask leaves the pairs of a triangle."""
    (B, T, H, C), params = equation.invars[0].aval.shape, equation.params
    try:
        count(params["jaxpr"])
        pairs = T * equation.invars[1].aval.shape[1]
    except ValueError:  # the loops of a causal kernel end at a block that depends on the query
        pairs = T * (T + 1) // 2
    return _TRITON[params["name"]] * B * H * C * pairs


def _iterations(equation: Any) -> int:
    """Returns the number of iterations of a while loop that increments a counter to a constant, like `fori_loop`."""
    params = equation.params
    condition_consts, body_consts = params["cond_nconsts"], params["body_nconsts"]
    state = equation.invars[condition_consts + body_consts :]
    condition, body = params["cond_jaxpr"].jaxpr, params["body_jaxpr"].jaxpr
    inputs = dict(zip(condition.invars, [*equation.invars[:condition_consts], *state]))
    counters = condition.invars[condition_consts:]

    def number(value: Any) -> int | None:
        value = value if isinstance(value, core.Literal) else inputs.get(value)
        kind = getattr(getattr(value, "aval", None), "dtype", np.dtype(bool)).kind
        return int(value.val) if isinstance(value, core.Literal) and kind in "iu" else None

    if len(condition.eqns) == 1 and condition.eqns[0].primitive.name == "lt":
        low, high = condition.eqns[0].invars
        start, end = number(low), number(high)
        if low in counters and start is not None and end is not None:
            index = counters.index(low)
            before, after = body.invars[body_consts + index], body.outvars[index]
            add = next((e for e in body.eqns if after in e.outvars and e.primitive.name == "add"), None)
            steps = [number(v) or 0 for v in add.invars if isinstance(v, core.Literal)] if add else []
            # If the limit is part of the state, the body must return it unchanged.
            fixed = isinstance(high, core.Literal) or high not in counters
            fixed = fixed or body.invars[body_consts + counters.index(high)] is body.outvars[counters.index(high)]
            if add and before in add.invars and steps and steps[0] > 0 and fixed:
                return max(0, -((start - end) // steps[0]))
    raise ValueError(
        "a while loop with products has a number of iterations that is not in its jaxpr; write it as jax.lax.scan, or "
        "as a fori_loop with constant bounds"
    )


# Formula


class Forward(NamedTuple):
    """FLOPs of one forward pass, by part.

    Attributes:
      embeddings: projection of narrow embeddings (ALBERT, OPT) and convolution of the embeddings (DeBERTa v2).
      projections: queries, keys, values, outputs and MLPs of the layers.
      attention: scores and weighted values of the layers.
      heads: heads.
      constants: projections of embeddings without parameters, which have no gradient (Transformer-XL's sinusoids).
    """

    embeddings: int
    projections: int
    attention: int
    heads: int
    constants: int = 0

    @property
    def layers(self) -> int:
        """FLOPs of the layers."""
        return self.projections + self.attention + self.constants

    @property
    def total(self) -> int:
        """FLOPs of the forward pass."""
        return sum(self)

    @property
    def step(self) -> int:
        """FLOPs of forward and backward pass: the gradient of each product consists of two products."""
        return 3 * self.total - self.constants


def model_flops(
    config: ModelConfig,
    rows: int,
    length: int,
    source_length: int | None = None,
    *,
    heads: Mapping[str, int] | None = None,
    targets: int = 0,
    blocks: bool = False,
) -> Forward:
    """Returns the FLOPs of a batch from the sizes of the model; `.step` is a training step of all parameters.

    With N entries in the matrices that multiply each token, the step takes 6 N FLOPs per token, plus 12 H C S per query
    and layer for attention: the "model FLOPs" of PaLM (Chowdhery et al. 2022, appendix B), from which the model FLOPs
    utilisation is computed. By this convention attention counts T x S pairs even if it is causal or local, padding
    counts, and embedding lookups and recomputation do not count.

    Args:
      config: the model's config.
      rows: number of rows.
      length: number of tokens in a row; in an encoder-decoder, in a row of the decoder.
      source_length: number of tokens in a row of the encoder of an encoder-decoder.
      heads: number of positions in a row to which each head is applied; None: all positions for `lm`.
      targets: number of targets in a row, for a model with a query stream.
      blocks: whether to count causal and local attention as XLA computes them: in blocks of queries that read no keys
        after their end, or only those of neighbouring blocks and of a few global tokens.
    """
    D, T, S, whole = config.width, length, source_length, config
    if heads is None:
        heads = {"lm": T} if "lm" in config.heads_on_top else {}
    both = config.structure == "encoder_decoder"
    if both and S is None:
        raise ValueError("an encoder-decoder requires source_length, the number of tokens in a row of its encoder")
    narrow = config.W * D if config.embedding_width else 0
    narrow *= 1 + config.project_tokens  # the last hidden states are projected back
    embeddings = narrow * (T + (S or 0) if both else T) + T * config.conv_width * D * D
    projections = attention = 0
    if config.structure != "decoder":
        tokens = S if both and S is not None else T
        projections += tokens * _layer_entries(config, config.layers, False)
        queries = tokens + targets
        if blocks and not targets:
            attention += _products_in_blocks(config, tokens)
        else:
            attention += _mixer_products(config, config.layers, queries, tokens, queries * tokens)
        # Targets are queries, but no keys.
        of_targets = config.layers * _query_entries(config) + _mlp_entries(config, config.layers)
        projections += targets * of_targets
    if config.structure != "encoder":
        layers, config = (config.decoder_layers if both else None) or config.layers, config.decoder_config
        projections += T * _layer_entries(config, layers, True)
        attention += _mixer_products(config, layers, T, T, _causal_pairs(T) if blocks else T * T)
        if both and S is not None:
            queries, keys = _query_entries(config), 2 * D * config.K * config.C
            projections += layers * (queries * T + keys * S)
            attention += layers * _attention_products(config, T, S, T * S, relative=False)
    config = whole
    head_entries = sum(positions * _head_entries(config, head) for head, positions in heads.items())
    relative, constants = 2 * _relative_entries(config), 2 * _sinusoid_entries(config, T)
    of_rows = (2 * rows * part for part in (embeddings, projections, attention, head_entries))
    embeddings, projections, attention, head_entries = of_rows
    return Forward(embeddings, projections + relative, attention, head_entries, constants)


def _layer_entries(config: ModelConfig, layers: int, causal: bool) -> int:
    """Returns the number of entries of the matrices of all layers that multiply each token."""
    mixers = [own.mixer for own in parts_of(config, layers)]
    return sum(_mixer_entries(config, mixer, causal) for mixer in mixers) + _mlp_entries(config, layers)


def _mixer_entries(config: ModelConfig, name: str, causal: bool) -> int:
    mixer: Any = MIXERS.get(name)
    if hasattr(mixer, "entries"):
        entries: int = mixer.entries(config, causal)
        return entries
    of_global_tokens = 0 if causal or config.global_rule == "none" else config.heads + 2 * config.K
    return _query_entries(config) + config.width * config.C * (2 * config.K + of_global_tokens)


def _query_entries(config: ModelConfig) -> int:
    """Returns the number of entries of the matrices of attention that multiply each query: also output and gate."""
    return (2 + config.attention_gate) * config.width * config.heads * config.C


def _mixer_products(config: ModelConfig, layers: int, T: int, S: int, pairs: int) -> int:
    """Returns the products of all layers between T queries and S keys."""
    return sum(_layer_products(config, own, T, S, pairs) for own in parts_of(config, layers))


def _layer_products(config: ModelConfig, own: Parts, T: int, S: int, pairs: int) -> int:
    """Returns the products of a layer between tokens, which attention has, and mixers with a method `products`."""
    mixer: Any = MIXERS.get(own.mixer)
    if hasattr(mixer, "products"):
        products: int = mixer.products(config, T, pairs)
        return products
    return 0 if hasattr(mixer, "entries") else _attention_products(config, T, S, pairs)


def _mlp_entries(config: ModelConfig, layers: int) -> int:
    names = [own.feed_forward for own in parts_of(config, layers) if own.feed_forward != "none"]
    return sum(FEED_FORWARDS[name].entries(config) for name in names)


def _attention_products(config: ModelConfig, T: int, S: int, pairs: int, relative: bool = True) -> int:
    """Returns the scores and weighted values of one layer, and products with embeddings of distances and types."""
    products = 2 * config.heads * config.C * pairs
    if relative and config.relative == "disentangled":
        R = 2 * (config.relative_buckets or config.relative_distance)
        lengths = {"c2p": T, "p2c": S}
        products += sum(config.heads * config.C * lengths[term] * R for term in config.relative_terms)
    if relative and config.relative == "transformer_xl":
        products += config.heads * config.C * T * (2 * S - 1 + 2 * (config.types_in == "attention"))
    return products


def _sinusoid_entries(config: ModelConfig, T: int) -> int:
    """Returns Transformer-XL's projections of the distances in a row of T tokens: once per layer and batch."""
    if config.relative != "transformer_xl":
        return 0
    return config.layers * (2 * T - 1) * config.width * config.C * config.heads


def _relative_entries(config: ModelConfig) -> int:
    """Returns DeBERTa's projections of embeddings of distances: once per layer and batch."""
    if config.relative != "disentangled":
        return 0
    R = 2 * (config.relative_buckets or config.relative_distance)
    heads = {"c2p": config.K, "p2c": config.heads}  # the projection of distances is that of keys, or of queries
    return config.layers * R * config.width * config.C * sum(heads[term] for term in config.relative_terms)


def _products_in_blocks(config: ModelConfig, T: int) -> int:
    """Returns the products of all layers of an encoder between T tokens, in blocks where attention is local."""
    has_global, products = config.global_rule != "none", 0
    for own in parts_of(config):
        pairs = (1 + has_global) * T * T
        if own.window and config.relative == "none" and windows.saves_memory(T, own.window):
            b, slots = windows.block_size(own.window), min(T, windows.slots_of(config)) if has_global else 0
            pairs = -(-T // b) * b * (3 * b + slots) + slots * T
        products += _layer_products(config, own, T, T, pairs)
    return products


def _causal_pairs(T: int) -> int:
    block = max(BLOCK, -(-T // 8))
    if block >= T:
        return T * T
    return sum((min(start + block, T) - start) * min(start + block, T) for start in range(0, T, block))


def _head_entries(config: ModelConfig, head: str) -> int:
    """Returns the number of entries of the head's matrices."""
    D, N = config.hidden_width, len(config.labels)
    shared = D * D if config.shared_transform else 0
    entries = {
        "lm": D * config.V,
        "masked_lm": (shared or D * config.W) + (D if shared else config.W) * config.vocabulary,
        "pooled": D * D,
        "next_sentence": D * D + 2 * D,
        "classes": shared + (D * D if config.classes_activation is not None else 0) + D * N,
        "tokens": shared + D * N,
        "span": 2 * D,
        "replaced": D * D + D,
    }
    return entries[head]
