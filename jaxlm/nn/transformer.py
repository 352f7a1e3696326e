"""The stacked Transformer: encoder, decoder, or both, from the closed choices of `ModelConfig`.

Layers of a stack live in one leaf with a leading layer axis (`nn.scan`), so that compile time does not grow with depth.
`constrain(x, logical_axes)` pins an activation to the mesh; the identity where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.nn.attention import Attention, Cache, cross_mask, self_mask
from jaxlm.nn.heads import MaskedLM, Pooled, Vocabulary
from jaxlm.nn.layers import MLP, Dropout, Linear, Norm
from jaxlm.nn.positions import sinusoidal

REMAT = {
    "full": None,  # keep nothing but the layer's input
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep products with weights
}


def _identity(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    return x


class Embeddings(nn.Module):
    """Token, position and type embeddings, summed: [B, T, D]."""

    config: ModelConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        config, init = self.config, nn.initializers.normal(self.config.initial_std)
        self.tokens = self.param("tokens", init, (config.vocabulary, config.width), jnp.float32)
        if config.positions == "learned":
            self.positions = self.param("positions", init, (config.max_length, config.width), jnp.float32)
        if config.types:
            self.types = self.param("types", init, (config.types, config.width), jnp.float32)
        if config.embedding_norm:
            self.norm = Norm(config)
        self.dropout = Dropout(config.dropout)

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, types_BT: jax.Array | None) -> jax.Array:
        config = self.config
        x_BTD = self.tokens[tokens_BT]
        if config.scale_embeddings:
            x_BTD *= math.sqrt(config.width)
        if config.positions == "learned":
            x_BTD += self.positions[positions_BT]
        elif config.positions == "sinusoidal":
            x_BTD += sinusoidal(positions_BT, config.width, config.rotary_base)
        if config.types:
            x_BTD += self.types[jnp.zeros_like(tokens_BT) if types_BT is None else types_BT]
        if config.embedding_norm:
            x_BTD = self.norm(x_BTD)
        return self.dropout(x_BTD).astype(self.dtype)


class Block(nn.Module):
    """One layer: attention, cross-attention where there is a context, and the MLP, each with its residual."""

    config: ModelConfig
    constrain: Callable
    dtype: Any = jnp.float32
    causal: bool = False

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        mask_BTT: jax.Array,
        positions_BT: jax.Array,
        context_BSD: jax.Array | None = None,
        context_mask_BTS: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        config = self.config
        parts = {"config": config, "constrain": self.constrain, "dtype": self.dtype}

        def residual(x: jax.Array, name: str, layer: Callable[[jax.Array], jax.Array]) -> jax.Array:
            norm, dropout = Norm(config, self.dtype, name=f"{name}_norm"), Dropout(config.dropout)
            if config.norm_place == "pre":
                x = x + dropout(layer(norm(x)))
            else:
                x = norm(x + dropout(layer(x)))
            return self.constrain(x, ("batch", "length", None))

        def attend(x: jax.Array) -> jax.Array:
            nonlocal cache
            x, cache = Attention(**parts, name="attention")(
                x, mask_BTT, positions_BT, cache=cache, causal=self.causal and cache is None
            )
            return x

        def cross(x: jax.Array) -> jax.Array:
            assert context_mask_BTS is not None
            return Attention(**parts, name="cross_attention")(x, context_mask_BTS, positions_BT, context_BSD)[0]

        x_BTD = residual(x_BTD, "attention", attend)
        if context_BSD is not None:
            x_BTD = residual(x_BTD, "cross_attention", cross)
        return residual(x_BTD, "mlp", MLP(**parts, name="mlp")), cache


class Stack(nn.Module):
    """`config.layers` blocks, and the last norm where the norms come first."""

    config: ModelConfig
    constrain: Callable
    dtype: Any = jnp.float32
    causal: bool = False
    remat: str = "none"
    unroll: int = 1

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, *inputs: Any, caches: tuple[Cache, ...] | None = None
    ) -> tuple[jax.Array, Any]:
        """`inputs` are those of `Block` after x.  Without caches the layers are scanned; with them they are unrolled,
        so that each layer updates its own cache in place."""
        config = self.config
        parts = {"config": config, "constrain": self.constrain, "dtype": self.dtype, "causal": self.causal}
        if caches is None:
            block = Block
            if self.remat != "none":
                block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=False)
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=config.layers,
                unroll=self.unroll,
            )
            x_BTD, _ = layers(**parts, name="layers")(x_BTD, *inputs)
        else:
            stacked = self.variables["params"]["layers"]
            updated = []
            for layer, cache in enumerate(caches):
                params = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)
                done: Any = Block(**parts, parent=None).apply({"params": params}, x_BTD, *inputs, cache=cache)
                x_BTD, cache = done
                updated.append(cache)
            caches = tuple(updated)
        if config.norm_place == "pre":
            x_BTD = Norm(config, self.dtype, name="norm")(x_BTD)
        return x_BTD, caches


class Transformer(nn.Module):
    """Embeddings, the stacks that `config.structure` names, and the heads on top.

    Inputs default to one example a row without padding: segments of 1, positions from 0, types of 0.
    Methods return hidden states [B, T, D]; heads are methods of their own, applied where a task needs them.
    """

    config: ModelConfig
    constrain: Callable = _identity
    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1

    def setup(self) -> None:
        config = self.config
        parts = {"config": config, "constrain": self.constrain, "dtype": self.dtype}
        self.embeddings = Embeddings(config, self.dtype)
        if config.structure != "decoder":
            self.encoder = Stack(**parts, remat=self.remat, unroll=self.unroll)
        if config.structure != "encoder":
            self.decoder = Stack(**parts, causal=True, remat=self.remat, unroll=self.unroll)
        if "lm" in config.heads_on_top:
            self.lm_head = Vocabulary(**parts, bias=False)
        if "masked_lm" in config.heads_on_top:
            self.masked_lm_head = MaskedLM(**parts)
        if {"pooled", "next_sentence"} & set(config.heads_on_top):
            self.pooled_head = Pooled(config, self.dtype)
        if "next_sentence" in config.heads_on_top:
            self.next_sentence_head = Linear((2,), config.initial_std, dtype=self.dtype)

    def encode(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        types_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states of the encoder."""
        segments_BT, positions_BT = _defaults(tokens_BT, segments_BT, positions_BT)
        x_BTD = self.embeddings(tokens_BT, positions_BT, types_BT)
        return self.encoder(x_BTD, self_mask(segments_BT, causal=False), positions_BT)[0]

    def decode(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        types_BT: jax.Array | None = None,
        context_BSD: jax.Array | None = None,
        context_segments_BS: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states of the decoder; `context_BSD` is what the encoder gave."""
        segments_BT, positions_BT = _defaults(tokens_BT, segments_BT, positions_BT)
        x_BTD = self.embeddings(tokens_BT, positions_BT, types_BT)
        mask_BTS = None
        if context_BSD is not None:
            context_segments_BS, _ = _defaults(context_BSD[..., 0], context_segments_BS, None)
            mask_BTS = cross_mask(segments_BT, context_segments_BS)
        mask_BTT = self_mask(segments_BT, causal=True)
        return self.decoder(x_BTD, mask_BTT, positions_BT, context_BSD, mask_BTS)[0]

    def decode_cached(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        caches: tuple[Cache, ...],
        context_BSD: jax.Array | None = None,
        context_segments_BS: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Like `decode`, for tokens at `positions_BT` of sequences whose earlier tokens are in the caches."""
        x_BTD = self.embeddings(tokens_BT, positions_BT, None)
        slots_S = jnp.arange(caches[0].k_BSKC.shape[1])
        mask_BTS = slots_S <= positions_BT[:, :, None]
        context_mask_BTS = None
        if context_BSD is not None:
            context_segments_BS, _ = _defaults(context_BSD[..., 0], context_segments_BS, None)
            context_mask_BTS = cross_mask(jnp.ones_like(tokens_BT), context_segments_BS)
        return self.decoder(x_BTD, mask_BTS, positions_BT, context_BSD, context_mask_BTS, caches=caches)

    def __call__(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        types_BT: jax.Array | None = None,
        target_tokens_BT: jax.Array | None = None,
        target_segments_BT: jax.Array | None = None,
        target_positions_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, T, D] of the last stack; an encoder-decoder reads `target_tokens_BT` in its decoder."""
        if self.config.structure == "encoder":
            return self.encode(tokens_BT, segments_BT, positions_BT, types_BT)
        if self.config.structure == "decoder":
            return self.decode(tokens_BT, segments_BT, positions_BT, types_BT)
        if target_tokens_BT is None:
            raise ValueError("an encoder-decoder needs target_tokens_BT, the tokens that its decoder reads")
        context_BSD = self.encode(tokens_BT, segments_BT, positions_BT, types_BT)
        return self.decode(
            target_tokens_BT,
            target_segments_BT,
            target_positions_BT,
            context_BSD=context_BSD,
            context_segments_BS=segments_BT,
        )

    def lm(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V] of the next token."""
        return self.lm_head(x_BTD, self.embeddings.tokens)

    def masked_lm(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V] of the token that stood at each position."""
        return self.masked_lm_head(x_BTD, self.embeddings.tokens)

    def pooled(self, x_BED: jax.Array) -> jax.Array:
        """Vectors [B, E, D] of examples, from the hidden states of their first tokens."""
        return self.pooled_head(x_BED)

    def next_sentence(self, x_BED: jax.Array) -> jax.Array:
        """Logits [B, E, 2]: 0 the second text follows the first, 1 it does not; from the first tokens' states."""
        return self.next_sentence_head(self.pooled(x_BED)).astype(jnp.float32)

    def initialise(self, tokens_BT: jax.Array) -> None:
        """Touches every parameter once; for `init`."""
        x_BTD = self(tokens_BT, target_tokens_BT=tokens_BT)
        for head in self.config.heads_on_top:
            getattr(self, head)(x_BTD)


def _defaults(
    tokens_BT: jax.Array, segments_BT: jax.Array | None, positions_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    if segments_BT is None:
        segments_BT = jnp.ones(tokens_BT.shape, jnp.int32)
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return segments_BT, positions_BT


def init(module: Transformer, key: jax.Array) -> dict[str, Any]:
    """Initial parameters, float32.  Under `jax.eval_shape` it gives their shapes for free."""
    module = module.clone(constrain=_identity)  # the one row of zeros divides no mesh
    return module.init(key, jnp.zeros((1, 2), jnp.int32), method="initialise")["params"]


def apply(
    module: Transformer, params: Any, *inputs: Any, method: str = "__call__", key: jax.Array | None = None
) -> Any:
    """`module.method(*inputs)` with these parameters; `key` turns dropout on."""
    return module.apply({"params": params}, *inputs, method=method, rngs=None if key is None else {"dropout": key})


def empty_caches(config: ModelConfig, rows: int, length: int, dtype: Any) -> tuple[Cache, ...]:
    """A cache of `length` positions for each decoder layer."""
    zeros = jnp.zeros((rows, length, config.K, config.C), dtype)
    return tuple(Cache(zeros, zeros) for _ in range(config.layers))


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters, heads included, without making any."""
    shapes = jax.eval_shape(lambda: init(Transformer(config), jax.random.key(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
