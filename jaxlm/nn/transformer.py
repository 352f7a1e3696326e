"""The Transformer: embeddings, an encoder, a decoder, or both, and heads, from the closed choices of `ModelConfig`.

`constrain(x, logical_axes)` shards an activation over the mesh, if there is one.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from operator import itemgetter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.devices.sharding import Placement
from jaxlm.errors import UserError
from jaxlm.nn.attention import AttentionInputs
from jaxlm.nn.block import lookup
from jaxlm.nn.crf import Transitions
from jaxlm.nn.embeddings import FRONT_ENDS, Embeddings
from jaxlm.nn.global_tokens import NO_PROJECTIONS, global_tokens
from jaxlm.nn.heads import (
    ClassesHead,
    CRFHead,
    MaskedLMHead,
    PerTokenHead,
    PooledHead,
    ReplacedHead,
    Transform,
    VocabularyHead,
)
from jaxlm.nn.layer_parts import parts_of, row_of
from jaxlm.nn.layers import Linear
from jaxlm.nn.masks import cross_mask
from jaxlm.nn.sites import Edit
from jaxlm.nn.stack import Caches, CacheSpec, SequenceInputs, Stack, Targets


class Transformer(nn.Module):
    """Embeddings, one or two stacks as in `config.structure`, and heads.

    By default, a row holds one example without padding: there are no segments, positions start at 0, types are 0. Most
    methods return hidden states [B, T, D]. Heads are separate methods, which tasks apply to the hidden states that they
    need.
    """

    config: ModelConfig
    constrain: Placement = Placement()
    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1
    kernel: str = "auto"
    precision: str = "default"  # for products of float32 matrices, a value of `jax.default_matmul_precision`
    edit: Edit | None = None  # a function of activations inside the layers; see `jaxlm.nn.sites`

    def setup(self) -> None:
        config, on_top = self.config, set(self.config.heads_on_top)
        parts = {"config": config, "constrain": self.constrain, "dtype": self.dtype}
        how = parts | {"remat": self.remat, "unroll": self.unroll, "kernel": self.kernel, "edit": self.edit}
        self.embeddings = lookup(FRONT_ENDS, config.front_end, "front_end")(config, self.dtype)
        if config.structure != "decoder":
            self.encoder = Stack(**how, layers=config.layers)
        how["config"] = config.decoder_config
        if config.structure != "encoder":
            second = config.structure == "encoder_decoder"
            layers = (second and config.decoder_layers) or config.layers
            self.decoder = Stack(**how, layers=layers, causal=True)
            if second:
                shared, own = not config.decoder_tokens, config.decoder_vocabulary
                self.decoder_embeddings = Embeddings(config.decoder_config, self.dtype, shared, rows=own)
        if "lm" in on_top:
            self.lm_head = VocabularyHead(**parts, bias="lm" in config.biases)
        if "masked_lm" in on_top:
            self.masked_lm_head = MaskedLMHead(**parts)
        if {"pooled", "next_sentence"} & on_top:
            self.pooled_head = PooledHead(config, self.dtype)
        if "next_sentence" in on_top:
            self.next_sentence_head = Linear((2,), config.matrix_std, dtype=self.dtype)
        if "classes" in on_top:
            self.classes_head = ClassesHead(config, self.dtype)
        if "tokens" in on_top:
            self.tokens_head = PerTokenHead(config, len(config.labels), config.rate("tokens_dropout"), self.dtype)
            if config.crf:
                self.crf_head = CRFHead(config)
        if "span" in on_top:
            self.span_head = PerTokenHead(config, 2, config.rate("span_dropout"), self.dtype)
        if "replaced" in on_top:
            self.replaced_head = ReplacedHead(config, self.dtype)
        if config.shared_transform and {"masked_lm", "classes", "tokens"} & on_top:
            self.transform_head = Transform(config, self.dtype)

    def embed(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        types_BT: jax.Array | None = None,
        mask_BTS: jax.Array | None = None,
        prefix_BT: jax.Array | None = None,
        one_example: bool = False,
        targets: Targets | None = None,
        global_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, SequenceInputs]:
        """Returns the first hidden states [B, T, D] and the other inputs of `stack`; see `SequenceInputs`.

        In an encoder-decoder they belong to the encoder. `tokens_BT` is the input of the front end. The config
        determines the tokens with global attention if `global_BT` is None.
        """
        if global_BT is None and not self.is_initializing():
            global_BT = global_tokens(tokens_BT, segments_BT, self.config)
        elif global_BT is not None and not self.config.global_attention:
            raise UserError(NO_PROJECTIONS)
        positions_BT = self._positions(tokens_BT, positions_BT, segments_BT)
        x_BTD = self.embeddings(tokens_BT, positions_BT, types_BT)
        if targets is not None:
            x_BTD = jnp.concatenate([x_BTD, self.embeddings.targets(*targets.places_BQ.shape)], 1)
        types_BT = types_BT if self.config.types_in == "attention" else None
        masks = mask_BTS, prefix_BT, one_example
        return x_BTD, SequenceInputs(segments_BT, positions_BT, *masks, types_BT, targets, global_BT)

    def stack(self, x_BTD: jax.Array, inputs: SequenceInputs) -> jax.Array:
        """Returns the last hidden states [B, T, D] of the encoder, or of the decoder if there is no encoder.

        With targets these are the hidden states [B, Q, D] of the query stream.
        """
        stack = self.decoder if self.config.structure == "decoder" else self.encoder
        x_BTD, _ = stack(x_BTD, inputs)
        return x_BTD if inputs.targets is None else x_BTD[:, inputs.positions_BT.shape[1] :]

    def encode(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        types_BT: jax.Array | None = None,
        mask_BTS: jax.Array | None = None,
        global_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the last hidden states [B, T, D] of the encoder."""
        inputs = tokens_BT, segments_BT, positions_BT, types_BT, mask_BTS
        return self.stack(*self.embed(*inputs, global_BT=global_BT))

    def decode(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        types_BT: jax.Array | None = None,
        context_BSD: jax.Array | None = None,
        context_segments_BS: jax.Array | None = None,
        prefix_BT: jax.Array | None = None,
        mask_BTS: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the last hidden states [B, T, D] of the decoder.

        `context_BSD` is the output of the encoder; `SequenceInputs` describes the other arguments.
        """
        positions_BT = self._positions(tokens_BT, positions_BT, segments_BT)
        x_BTD = self._decoder_embeddings(tokens_BT, positions_BT, types_BT)
        context_inputs, _ = _cross_attention_inputs(tokens_BT, segments_BT, context_BSD, context_segments_BS)
        inputs = SequenceInputs(segments_BT, positions_BT, mask_BTS, prefix_BT)
        return self.decoder(x_BTD, inputs, context_BSD, context_inputs)[0]

    def prefill(
        self,
        tokens_BT: jax.Array,
        keep: CacheSpec,
        context_BSD: jax.Array | None = None,
        context_segments_BS: jax.Array | None = None,
    ) -> tuple[jax.Array, Caches]:
        """Like `decode`, for prompts padded on the right; also returns caches for `decode_cached`."""
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        x_BTD = self._decoder_embeddings(tokens_BT, positions_BT, None)
        context_inputs, context_segments_BS = _cross_attention_inputs(
            tokens_BT, None, context_BSD, context_segments_BS, keep
        )
        prefix_BT = positions_BT < keep.lengths_B[:, None] if self.config.prefix_lm else None
        inputs = SequenceInputs(None, positions_BT, prefix_BT=prefix_BT)
        x_BTD, caches = self.decoder(x_BTD, inputs, context_BSD, context_inputs, keep=keep)
        assert caches is not None
        return x_BTD, caches._replace(context_segments_BS=context_segments_BS)

    def decode_cached(self, tokens_BT: jax.Array, positions_BT: jax.Array, caches: Caches) -> tuple[jax.Array, Caches]:
        """Like `decode`, for tokens at `positions_BT`; the earlier tokens of the sequences are in the caches."""
        x_BTD = self._decoder_embeddings(tokens_BT, positions_BT, None)
        context_inputs = None
        if caches.context_segments_BS is not None:
            context_inputs = AttentionInputs(cross_mask(jnp.ones_like(tokens_BT), caches.context_segments_BS))
        x_BTD, updated = self.decoder(x_BTD, SequenceInputs(None, positions_BT), None, context_inputs, caches)
        assert updated is not None
        return x_BTD, caches._replace(own=updated.own)

    def _decoder_embeddings(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, types_BT: jax.Array | None
    ) -> jax.Array:
        if self.config.structure == "decoder":
            return self.embeddings(tokens_BT, positions_BT, types_BT)
        shared_VW = None if self.config.decoder_tokens else self.embeddings.tokens
        return self.decoder_embeddings(tokens_BT, positions_BT, types_BT, shared_VW)

    def __call__(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        types_BT: jax.Array | None = None,
        target_tokens_BT: jax.Array | None = None,
        target_segments_BT: jax.Array | None = None,
        target_positions_BT: jax.Array | None = None,
        prefix_BT: jax.Array | None = None,
        mask_BTS: jax.Array | None = None,
        one_example: bool = False,
        targets: Targets | None = None,
        global_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the last hidden states [B, T, D]; `SequenceInputs` describes the inputs.

        With `targets`, they are those of the query stream [B, Q, D].

        In an encoder-decoder, `target_*` are the inputs of the decoder; `mask_BTS` and `global_BT` are for the encoder.
        """
        if self.config.structure != "encoder_decoder":
            masks = mask_BTS, prefix_BT, one_example
            inputs = tokens_BT, segments_BT, positions_BT, types_BT, *masks, targets, global_BT
            return self.stack(*self.embed(*inputs))
        if target_tokens_BT is None:
            raise ValueError("an encoder-decoder needs target_tokens_BT, the tokens that its decoder reads")
        context_BSD = self.encode(tokens_BT, segments_BT, positions_BT, types_BT, mask_BTS, global_BT)
        return self.decode(
            target_tokens_BT,
            target_segments_BT,
            target_positions_BT,
            context_BSD=context_BSD,
            context_segments_BS=segments_BT,
        )

    def lm(self, x_BTD: jax.Array) -> jax.Array:
        """Returns logits [B, T, V] of the next token."""
        config = self.config
        if config.scale_logits:
            x_BTD = x_BTD * config.width**-0.5
        if config.logit_divisor != 1:
            x_BTD = x_BTD / config.logit_divisor
        embeddings = self.decoder_embeddings if config.decoder_tokens else self.embeddings
        logits_BTV = self.lm_head(x_BTD, embeddings.tokens)
        return config.logit_cap * jnp.tanh(logits_BTV / config.logit_cap) if config.logit_cap else logits_BTV

    def masked_lm(self, x_BTD: jax.Array) -> jax.Array:
        """Returns logits [B, T, V] of the original token at each position."""
        return self.masked_lm_head(self._transformed(x_BTD), self.embeddings.tokens)

    def pooled(self, x_BED: jax.Array) -> jax.Array:
        """Returns vectors [B, E, D] of examples, from the hidden states of their first tokens."""
        return self.pooled_head(x_BED)

    def next_sentence(self, x_BED: jax.Array) -> jax.Array:
        """Returns logits [B, E, 2] from the states of first tokens: 0 if the second text follows the first, else 1."""
        return self.next_sentence_head(self.pooled(x_BED)).astype(jnp.float32)

    def classes(self, x_BED: jax.Array) -> jax.Array:
        """Returns logits [B, E, N] of the labels, from one hidden state per example (`config.classes_from`)."""
        return self.classes_head(self._transformed(x_BED))

    def tokens(self, x_BTD: jax.Array) -> jax.Array:
        """Returns logits [B, T, N] of the label of each token."""
        return self.tokens_head(self._transformed(x_BTD))

    def transitions(self) -> Transitions:
        """Returns the scores of neighbouring tags, if the model has a CRF (`config.crf`)."""
        return self.crf_head()

    def span(self, x_BTD: jax.Array) -> jax.Array:
        """Returns logits [B, T, 2] of the start and the end of the answer at each token."""
        return self.span_head(x_BTD)

    def replaced(self, x_BTD: jax.Array) -> jax.Array:
        """Returns logits [B, T]: whether each token differs from the original one."""
        return self.replaced_head(x_BTD)

    def _transformed(self, x: jax.Array) -> jax.Array:
        return self.transform_head(x) if self.config.shared_transform else x

    def _positions(
        self, tokens_BT: jax.Array, positions_BT: jax.Array | None, segments_BT: jax.Array | None
    ) -> jax.Array:
        """Returns the given positions, by default those of rows of one example."""
        if positions_BT is not None:
            return positions_BT
        is_token_BT = None
        if self.config.padding_token is not None:
            is_token_BT = tokens_BT != self.config.padding_token
        elif not self.config.count_padding and segments_BT is not None:
            is_token_BT = segments_BT > 0
        if is_token_BT is not None:
            return jnp.cumsum(is_token_BT, 1) * is_token_BT - 1
        return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape[:2])

    def initialise(self, tokens_BT: jax.Array) -> None:
        """Uses every parameter once; for `init`."""
        x_BTD = self(tokens_BT, target_tokens_BT=jnp.zeros(tokens_BT.shape[:2], jnp.int32))
        for head in self.config.heads_on_top:
            getattr(self, head)(x_BTD)
        if "tokens" in self.config.heads_on_top and self.config.crf:
            self.transitions()


def _cross_attention_inputs(
    tokens_BT: jax.Array,
    segments_BT: jax.Array | None,
    context_BSD: jax.Array | None,
    context_segments_BS: jax.Array | None,
    keep: CacheSpec | None = None,
) -> tuple[AttentionInputs | None, jax.Array | None]:
    """Returns the inputs of cross-attention and the segments of the context; None without a context.

    `keep` requests a cache of the keys and values of the context, in its format.
    """
    if context_BSD is None:
        return None, None
    if context_segments_BS is None:
        context_segments_BS = jnp.ones(context_BSD.shape[:2], jnp.int32)
    segments = jnp.ones_like(tokens_BT) if segments_BT is None else segments_BT, context_segments_BS
    cache: dict[str, Any] = {}
    if keep is not None:
        cache = {"slot_positions_BS": jnp.arange(context_BSD.shape[1])[None], "cache_format": keep.format}
    return AttentionInputs(cross_mask(*segments), segments=segments, **cache), context_segments_BS


def init(module: Transformer, key: jax.Array) -> dict[str, Any]:
    """Returns initial float32 parameters. `jax.eval_shape` of this function computes only their shapes."""
    module = module.clone(constrain=Placement(), kernel="xla")  # the batch has one row, which cannot be sharded
    front_end = lookup(FRONT_ENDS, module.config.front_end, "front_end")
    return module.init(key, front_end.blank(module.config, 1, 2), method="initialise")["params"]


def apply(
    module: Transformer, params: Any, *inputs: Any, method: Any = "__call__", key: jax.Array | None = None, **named: Any
) -> Any:
    """Returns `module.method(*inputs, **named)` with these parameters; with a `key`, dropout is enabled."""
    rngs = None if key is None else {"dropout": key}
    with _precision(module):
        return module.apply({"params": params}, *inputs, method=method, rngs=rngs, **named)


def _precision(module: Transformer) -> AbstractContextManager[Any]:
    """Returns a context for the precision of products; "default" keeps the setting of JAX."""
    return nullcontext() if module.precision == "default" else jax.default_matmul_precision(module.precision)


def unstack_layers(config: ModelConfig, params: Any) -> Any:
    """Returns the parameters with a tuple of layers in place of each stack, which a `Transformer` unrolls.

    On CPU, XLA copies stacked parameters before a scan, and each layer out of the stack, in every call: a seventh of
    the time for 1,024 tokens and a small model. Separate layers need no copies.

    Args:
      config: the model's config.
      params: the parameters.
    """

    def unstack(stacked: Any) -> tuple[Any, ...]:
        if config.has_mixed_layers:
            layers = parts_of(config)
            return tuple(row_of(config, stacked, layers, n) for n in range(len(layers)))
        rows = len(jax.tree.leaves(stacked)[0])
        return tuple(jax.tree.map(itemgetter(n), stacked) for n in range(rows))

    stacks = {name: part | {"layers": unstack(part["layers"])} for name, part in params.items() if "layers" in part}
    return params | stacks


def count_parameters(config: ModelConfig) -> int:
    """Returns the number of parameters, including heads, without allocating any."""
    shapes = jax.eval_shape(lambda: init(Transformer(config), jax.random.key(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
