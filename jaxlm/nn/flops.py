"""How many floating-point operations the matrix products of a program take: counted in its jaxpr, and by a formula.

A product of [M, K] with [K, N] takes 2 M N K operations.  Nothing else is counted: element by element work is a small
part of a Transformer's, and no use of a chip's peak, which is that of its products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jax.extend import core

from jaxlm.config import ModelConfig
from jaxlm.nn.layers import FEED_FORWARDS

# ---- counted


def count(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> int:
    """Operations of all matrix products and convolutions of a jaxpr, exactly, over all devices.

    Scanned bodies count as often as they run, recomputed ones (remat) each time, of a condition's branches the largest;
    what `shard_map` does on each device counts for all of them; a Pallas kernel's body counts for each step of its
    grid, also where the kernel skips one, so that the count of a kernel is a bound from above.

    Raises ValueError for products in a while loop whose number of turns is not written in the jaxpr, and in a grid of
    unknown size.

    >>> count(jax.make_jaxpr(jnp.matmul)(jnp.ones((2, 3)), jnp.ones((3, 5))))
    60
    """
    plain: Any = jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr
    return sum(_count(equation) for equation in plain.eqns)


def _count(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, outputs = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
        return 2 * math.prod(equation.outvars[0].aval.shape) * (math.prod(kernel) // kernel[outputs])
    if name in ("ragged_dot", "ragged_dot_general", "scaled_matmul"):
        raise ValueError(f"the products of {name} are not counted yet; add them to jaxlm.nn.flops")
    if name == "scan":
        return params["length"] * count(params["jaxpr"])
    if name == "cond":
        return max(count(branch) for branch in params["branches"])
    if name == "while":
        inside, asked = count(params["body_jaxpr"]), count(params["cond_jaxpr"])
        turns = _turns(equation) if inside or asked else 0
        return turns * inside + (turns + 1) * asked
    if name == "shard_map":
        axes = params.get("newly_manual_axes", params.get("manual_axes"))  # the second in other versions of JAX
        return math.prod(params["mesh"].shape[axis] for axis in axes) * count(params["jaxpr"])
    if name == "pallas_call":
        inside, grid = count(params["jaxpr"]), params["grid_mapping"].grid
        if inside and not all(isinstance(size, int) for size in grid):
            raise ValueError(f"the grid {grid} of a Pallas kernel with products is not known before it runs")
        return inside and inside * math.prod(grid)
    # Calls of all kinds (jit, remat, custom_jvp_call, custom_vjp_call ...): once.
    return sum(count(value) for value in params.values() if isinstance(value, (core.ClosedJaxpr, core.Jaxpr)))


def _turns(equation: Any) -> int:
    """Of a while loop that counts one number up by a constant to a constant, as `fori_loop` does."""
    params = equation.params
    of_condition, of_body = params["cond_nconsts"], params["body_nconsts"]
    state = equation.invars[of_condition + of_body :]
    condition, body = params["cond_jaxpr"].jaxpr, params["body_jaxpr"].jaxpr
    given = dict(zip(condition.invars, [*equation.invars[:of_condition], *state]))
    counted = condition.invars[of_condition:]

    def number(value: Any) -> int | None:
        value = value if isinstance(value, core.Literal) else given.get(value)
        kind = getattr(getattr(value, "aval", None), "dtype", np.dtype(bool)).kind
        return int(value.val) if isinstance(value, core.Literal) and kind in "iu" else None

    if len(condition.eqns) == 1 and condition.eqns[0].primitive.name == "lt":
        low, high = condition.eqns[0].invars
        start, end = number(low), number(high)
        if low in counted and start is not None and end is not None:
            place = counted.index(low)
            before, after = body.invars[of_body + place], body.outvars[place]
            made = next((e for e in body.eqns if after in e.outvars and e.primitive.name == "add"), None)
            steps = [number(v) or 0 for v in made.invars if isinstance(v, core.Literal)] if made else []
            # The limit may be a part of the state: then the body must hand it on as it is.
            fixed = isinstance(high, core.Literal) or high not in counted
            fixed = fixed or body.invars[of_body + counted.index(high)] is body.outvars[counted.index(high)]
            if made and before in made.invars and steps and steps[0] > 0 and fixed:
                return max(0, -((start - end) // steps[0]))
    raise ValueError(
        "a while loop with products turns a number of times that its jaxpr does not tell; write it as jax.lax.scan, or "
        "as a fori_loop between constants"
    )


# ---- by a formula


class Forward(NamedTuple):
    """Operations of one forward pass, by part."""

    embeddings: int  # projection of narrow embeddings (ALBERT), convolution beside the first layer (DeBERTa v2)
    projections: int  # of the layers: queries, keys, values, outputs, MLP
    attention: int  # of the layers: scores and weighted values
    heads: int

    @property
    def layers(self) -> int:
        """Of the scanned layers."""
        return self.projections + self.attention

    @property
    def total(self) -> int:
        """All of the forward pass."""
        return sum(self)

    @property
    def step(self) -> int:
        """Forward and backward: each product has two more in its gradient, for its two factors."""
        return 3 * self.total


def closed(
    config: ModelConfig,
    rows: int,
    length: int,
    source_length: int | None = None,
    *,
    heads: Mapping[str, int] | None = None,
    blocks: bool = False,
) -> Forward:
    """Operations of a batch of `rows` by the sizes of the model; `.step` is one training step, all parameters trained.

    With N entries in the projections that a token passes, the step is 6 N per token plus attention, 12 H C S per query
    and layer: the "model FLOPs" of PaLM (Chowdhery et al. 2022, appendix B), of which the model FLOPs utilisation is
    the share of the peak.  By this convention all queries meet all keys, T x S, also where attention is causal or
    local, padding counts, lookups in tables of embeddings do not, and neither does what is recomputed.

    length, source_length: tokens in a row; of an encoder-decoder those of the decoder and of the encoder.
    heads: how many positions of a row pass each head; all pass `lm` where nothing is said.
    blocks: count causal attention as `dot_product_attention` computes it, by blocks of queries that read no later keys
    than their last, instead.
    """
    D, T, S, whole = config.width, length, source_length, config
    if heads is None:
        heads = {"lm": T} if "lm" in config.heads_on_top else {}
    both = config.structure == "encoder_decoder"
    if both and S is None:
        raise ValueError("an encoder-decoder needs source_length, the tokens of its encoder's rows")
    narrow = config.W * D if config.embedding_width else 0
    embedded = narrow * (T + (S or 0) if both else T) + T * config.conv_width * D * D
    projections = attention = 0
    if config.structure != "decoder":
        tokens = S if both and S is not None else T
        projections += config.layers * tokens * (_attention_entries(config) + _mlp_entries(config))
        attention += config.layers * _attended(config, tokens, tokens, tokens * tokens)
    if config.structure != "encoder":
        layers, config = (config.decoder_layers if both else None) or config.layers, config.of_decoder
        projections += layers * T * (_attention_entries(config) + _mlp_entries(config))
        attention += layers * _attended(config, T, T, _causal_pairs(T) if blocks else T * T)
        if both and S is not None:
            queries, keys = 2 * D * config.heads * config.C, 2 * D * config.K * config.C
            projections += layers * (queries * T + keys * S)
            attention += layers * _attended(config, T, S, T * S, relative=False)
    config = whole
    on_top = sum(positions * _head_entries(config, head) for head, positions in heads.items())
    relative = _relative_entries(config)
    return Forward(2 * rows * embedded, 2 * (rows * projections + relative), 2 * rows * attention, 2 * rows * on_top)


def recomputed(
    config: ModelConfig,
    rows: int,
    length: int,
    source_length: int | None = None,
    *,
    remat: Literal["none", "elementwise", "dots", "full"] = "full",
    blocks: bool = False,
) -> int:
    """Operations that a training step adds to `closed(...).step` where the backward pass recomputes.

    elementwise: none.  dots: attention; the products with weights are kept.  full: the layers, but for the last product
    of each where no norm follows it, since its result is then needed nowhere.
    """
    if remat in ("none", "elementwise"):
        return 0
    forward = closed(config, rows, length, source_length, heads={}, blocks=blocks)
    if remat == "dots":
        return forward.attention
    entries = config.layers * (length if source_length is None else source_length) * config.F
    if config.structure == "encoder_decoder":
        entries += (config.decoder_layers or config.layers) * length * config.of_decoder.F
    last = 2 * rows * entries * config.width if config.norm_place == "pre" else 0
    return forward.layers - last


def _attention_entries(config: ModelConfig) -> int:
    return 2 * config.width * config.C * (config.heads + config.K)


def _mlp_entries(config: ModelConfig) -> int:
    return config.width * config.F * FEED_FORWARDS[config.feed_forward].matrices


def _attended(config: ModelConfig, T: int, S: int, pairs: int, relative: bool = True) -> int:
    """Scores and weighted values of one layer, and DeBERTa's products with the embeddings of distances."""
    products = 2 * config.heads * config.C * pairs
    if relative and config.relative == "disentangled":
        R = 2 * (config.relative_buckets or config.relative_distance)
        lengths = {"c2p": T, "p2c": S}
        products += sum(config.heads * config.C * lengths[term] * R for term in config.relative_terms)
    return products


def _relative_entries(config: ModelConfig) -> int:
    """DeBERTa's projections of the embeddings of distances: in every layer, for the batch once."""
    if config.relative != "disentangled":
        return 0
    R = 2 * (config.relative_buckets or config.relative_distance)
    heads = {"c2p": config.K, "p2c": config.heads}  # distances go through the keys' projection, or the queries'
    return config.layers * R * config.width * config.C * sum(heads[term] for term in config.relative_terms)


def _causal_pairs(T: int) -> int:
    from jaxlm.nn.attention import BLOCK

    block = max(BLOCK, -(-T // 8))
    if block >= T:
        return T * T
    return sum((min(start + block, T) - start) * min(start + block, T) for start in range(0, T, block))


def _head_entries(config: ModelConfig, head: str) -> int:
    """Entries of the kernels that a position passes."""
    D, N = config.width, len(config.labels)
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
