"""The stacked Transformer: encoder, decoder, or both, from the closed choices of `ModelConfig`.

Layers of a stack live in one leaf with a leading layer axis and are scanned, so that compile time does not grow with
depth.
`constrain(x, logical_axes)` pins an activation to the mesh; without one it does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import ModelConfig
from jaxlm.devices.sharding import Placement
from jaxlm.errors import UserError, perhaps
from jaxlm.nn.attention import MIXERS, Attention, AttentionInputs, Cache, cache_positions, cross_mask, self_mask
from jaxlm.nn.heads import Classes, MaskedLM, PerToken, Pooled, Replaced, Transform, Vocabulary
from jaxlm.nn.kernels import RESIDUALS
from jaxlm.nn.layers import FEED_FORWARDS, Convolution, Dropout, Linear, Norm
from jaxlm.nn.nodes import array
from jaxlm.nn.positions import BY_LENGTH, Buckets, Disentangled, sinusoidal, turns

# What costs little beside the memory that its result would take until the backward pass: it is computed again there.
_ELEMENTWISE = {
    "abs", "add", "add_any", "and", "bitcast_convert_type", "broadcast_in_dim", "concatenate",
    "convert_element_type", "copy", "cos", "div", "eq", "erf", "exp", "expand_dims", "ge", "gt", "integer_pow",
    "iota", "le", "log", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "reshape", "rsqrt",
    "select_n", "sharding_constraint", "sign", "sin", "slice", "split", "sqrt", "square", "squeeze", "sub", "tanh",
    "transpose",
}  # fmt: skip


def _kept_but_elementwise(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether the backward pass keeps an operation's result: of products, sums, random bits and kernels."""
    return primitive.name not in _ELEMENTWISE


REMAT = {
    "elementwise": _kept_but_elementwise,
    "full": None,  # keep nothing but the layer's input
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(  # that input goes to the host's memory
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "dots": jax.checkpoint_policies.save_from_both_policies(  # keep products with weights, and what a kernel attended
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(RESIDUALS),
    ),
}


class Embeddings(nn.Module):
    """Token, position and type embeddings, summed: [B, T, D]; an entry of `FRONT_ENDS`.

    Every entry has the fields `config` and `dtype`, says the name of its field in a batch, and is called with that
    field, positions and types.  A decoder beside an encoder may have no tokens of its own (`shared`): it is handed the
    encoder's.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    shared: bool = False
    rows: int | None = None  # of the table of tokens; None: the vocabulary

    field: ClassVar[str] = "tokens_BT"

    @staticmethod
    def blank(config: ModelConfig, B: int, T: int) -> jax.Array:
        """Returns the field of a batch of so many rows and positions, of zeros."""
        return jnp.zeros((B, T), jnp.int32)

    def setup(self) -> None:
        config, init = self.config, nn.initializers.normal(self.config.initial_std)
        if not self.shared:
            self.tokens = array(self, "tokens", init, (self.rows or config.vocabulary, config.W))
        if config.positions == "learned":
            rows = config.position_offset + config.max_length
            self.positions = array(self, "positions", init, (rows, config.W))
        if config.types:
            self.types = array(self, "types", init, (config.types, config.W))
        if config.embedding_norm:
            self.norm = Norm(config)
        if config.embedding_width is not None:
            self.project = Linear((config.width,), config.matrix_std)
        self.dropout = Dropout(config.rate("embedding_dropout"))

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        types_BT: jax.Array | None = None,
        tokens_VW: jax.Array | None = None,
    ) -> jax.Array:
        config = self.config
        x_BTW = (self.tokens if tokens_VW is None else tokens_VW)[tokens_BT]
        if config.scale_embeddings:
            x_BTW *= math.sqrt(config.width)
        if config.positions == "learned":
            x_BTW += self.positions[config.position_offset + positions_BT]
        elif config.positions == "sinusoidal":
            x_BTW += sinusoidal(positions_BT, config.W, config.rotary_base)
        if config.types:
            x_BTW += self.types[jnp.zeros_like(tokens_BT) if types_BT is None else types_BT]
        if config.embedding_norm:
            x_BTW = self.norm(x_BTW)
        x_BTW = self.dropout(x_BTW)
        return (x_BTW if config.embedding_width is None else self.project(x_BTW)).astype(self.dtype)


FRONT_ENDS: dict[str, Any] = {"tokens": Embeddings}  # by `ModelConfig.front_end`


class SequenceInputs(NamedTuple):
    """What a stack reads beside hidden states.

    segments_BT: the example that each position is of, from 1; 0 for padding.  positions_BT: the place in the example.
    mask_BTS: False where query t may not see key s, beside what segments and causality say; None: all else is seen.
    prefix_BT: 1 for tokens that all of their example see (`config.prefix_lm`).
    """

    segments_BT: jax.Array
    positions_BT: jax.Array
    mask_BTS: jax.Array | None = None
    prefix_BT: jax.Array | None = None


class Caches(NamedTuple):
    """What a decoder keeps of earlier tokens, and of its context.

    own, cross: of each layer.  context_segments_BS: 0 for padding of the context.
    """

    own: tuple[Cache, ...]
    cross: tuple[Cache, ...] | None = None
    context_segments_BS: jax.Array | None = None


class Keep(NamedTuple):
    """What is to be cached of a call over whole prompts.

    lengths_B: tokens of each prompt, the rest of its row being padding.  length: slots of a cache.
    ahead: most tokens that later calls decode at once; the cache of a local layer has slots for its window and those.
    """

    lengths_B: jax.Array
    length: int
    ahead: int = 1


class LayerOutputs(NamedTuple):
    """What a layer gives beside its hidden states.

    attention_BHTS, cross_attention_BHTS: weights over the row and over the context, where they are asked for.
    losses: auxiliary losses, by name, each a sum over the tokens.
    """

    attention_BHTS: jax.Array | None
    cross_attention_BHTS: jax.Array | None
    losses: dict[str, jax.Array]


def chosen(table: dict[str, Any], name: str, field: str) -> Any:
    """Returns the entry of a table of modules that a field of the model's config names.

    Raises:
      UserError: where there is none.
    """
    if name not in table:
        raise UserError(f"model.{field} is {name!r}{perhaps(name, table)}")
    return table[name]


class Block(nn.Module):
    """One layer: attention, cross-attention where there is a context, and the MLP, each with its residual."""

    config: ModelConfig
    constrain: Placement
    dtype: Any = jnp.float32
    inside: bool = False  # whether attention weights are returned
    kernel: str = "auto"  # of attention

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        layer: jax.Array | int,
        sight: AttentionInputs,
        positions_BT: jax.Array,
        context: jax.Array | Cache | None = None,
        context_sight: AttentionInputs | None = None,
        cache: Cache | None = None,
        tokens_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Cache | None, Cache | None], LayerOutputs]:
        """`layer` is the layer's number, from 0; `tokens_BT` is False for padding, where that is known.

        Returned are also its caches, of itself and of the context.
        """
        config = self.config
        parts = {"config": config, "constrain": self.constrain, "dtype": self.dtype}
        seen: dict[str, jax.Array | None] = {"attention": None, "cross_attention": None}
        kept: dict[str, Cache | None] = {"attention": None, "cross_attention": None}

        def residual(x: jax.Array, name: str, sublayer: Callable[[jax.Array], jax.Array]) -> jax.Array:
            rate = config.rate("mlp_out_dropout" if name == "mlp" else "attention_out_dropout")
            norm, dropout = Norm(config, self.dtype, name=f"{name}_norm"), Dropout(rate)
            if config.norm_place == "post":
                x = norm(x + dropout(sublayer(x)))
            else:
                normed = norm(x)
                if name == "attention" and not config.first_norm:
                    normed = jnp.where(jnp.equal(layer, 0), x, normed)
                y = dropout(sublayer(normed))
                if config.norm_place == "sandwich":
                    y = Norm(config, self.dtype, name=f"{name}_out_norm")(y)
                x = x + y
            return self.constrain(x, ("batch", "between", None))

        def attend(
            name: str, sight: AttentionInputs, context: Any, cache: Cache | None
        ) -> Callable[[jax.Array], jax.Array]:
            mixer = Attention if name == "cross_attention" else chosen(MIXERS, config.mixer, "mixer")

            def sublayer(x: jax.Array) -> jax.Array:
                attention = mixer(**parts, kernel=self.kernel, name=name)
                x, kept[name], seen[name] = attention(x, layer, sight, positions_BT, context, cache, self.inside)
                return x

            return sublayer

        x_BTD = residual(x_BTD, "attention", attend("attention", sight, None, cache))
        if context is not None:
            assert context_sight is not None
            x_BTD = residual(x_BTD, "cross_attention", attend("cross_attention", context_sight, context, None))
        losses: dict[str, jax.Array] = {}
        if tokens_BT is None:
            tokens_BT = jnp.ones(x_BTD.shape[:2], bool)

        def feed_forward(x: jax.Array) -> jax.Array:
            x, found = chosen(FEED_FORWARDS, config.feed_forward, "feed_forward")(**parts, name="mlp")(x, tokens_BT)
            losses.update(found)
            return x

        x_BTD = residual(x_BTD, "mlp", feed_forward)
        return (
            x_BTD,
            (kept["attention"], kept["cross_attention"]),
            LayerOutputs(seen["attention"], seen["cross_attention"], losses),
        )


class Stack(nn.Module):
    """The blocks of an encoder or a decoder, and the last norm where the norms come first.

    Without caches the layers are scanned, a round of `layer_kinds` in each turn; with them, or to keep them, they are
    unrolled, so that each layer updates its own cache in place.  Where the collections `states` or `weights` may be
    written, they get the hidden states of the embeddings and of every layer [L + 1, B, T, D], and all layers'
    `LayerOutputs`; `losses` gets the auxiliary losses, summed over the layers.
    """

    config: ModelConfig
    constrain: Placement
    layers: int
    dtype: Any = jnp.float32
    causal: bool = False
    remat: str = "none"
    unroll: int = 1
    kernel: str = "auto"

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        segments_BT: jax.Array | None,
        positions_BT: jax.Array,
        context_BSD: jax.Array | None = None,
        context_sight: AttentionInputs | None = None,
        caches: Caches | None = None,
        keep: Keep | None = None,
        prefix_BT: jax.Array | None = None,
        mask_BTS: jax.Array | None = None,
    ) -> tuple[jax.Array, Caches | None]:
        kinds = self.config.layer_kinds
        sights = self._sights(segments_BT, positions_BT, caches, keep, prefix_BT, mask_BTS)
        # A module of its own, so that a layer is a plain function of its parameters.
        inside = self.is_mutable_collection("weights")
        block = Block(self.config, self.constrain, self.dtype, inside, self.kernel, parent=None)
        stacked = self._parameters(block, x_BTD, sights[kinds[0]], positions_BT, context_BSD, context_sight)

        def run(
            kind: str,
            x: jax.Array,
            n: Any,
            params: Any,
            key: jax.Array | None = None,
            context: jax.Array | Cache | None = context_BSD,
            cache: Cache | None = None,
        ) -> tuple[jax.Array, tuple[Cache | None, Cache | None], LayerOutputs]:
            """Layer number n, which is of this kind."""
            rngs = None if key is None else {"dropout": key}
            x = checkpoint_name(x, "layer")
            tokens_BT = None if segments_BT is None else segments_BT > 0
            inputs = (x, n, sights[kind], positions_BT, context, context_sight, cache, tokens_BT)
            done: Any = block.apply({"params": params}, *inputs, rngs=rngs)
            return done

        if caches is None and keep is None:
            return self._scan(run, stacked, x_BTD, segments_BT), None
        updated: list[Any] = []
        for n in range(self.layers):
            own = None if caches is None else caches.own[n]
            context = context_BSD if caches is None or caches.cross is None else caches.cross[n]
            params = self._of_layer(stacked, n)
            x_BTD, filled, _ = run(kinds[n % len(kinds)], x_BTD, n, params, context=context, cache=own)
            updated.append(filled)
        owns, crosses = zip(*updated)
        return self._last_norm(x_BTD), Caches(owns, crosses if crosses[0] is not None else None)

    def _scan(self, run: Callable, stacked: Any, x_BTD: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        config, kinds = self.config, self.config.layer_kinds
        if self.remat != "none":
            # Unrolled wholly, XLA would find the recomputed values in the forward pass, and keep them.
            barred = self.unroll >= self.layers // len(kinds) and self.remat != "elementwise"
            run = jax.checkpoint(run, policy=REMAT[self.remat], prevent_cse=barred, static_argnums=0)  # type: ignore
        with_states = self.is_mutable_collection("states")
        keys = jax.random.split(self.make_rng("dropout"), self.layers) if self.has_rng("dropout") else None
        apart = isinstance(stacked, tuple)  # see `layers_apart`: then nothing is scanned
        # Parameters that layers share are looked up by the layer's number, those of its own are scanned over.
        look_up = self._shares or apart
        each = ((np if apart else jnp).arange(self.layers), None if look_up else stacked, keys)
        some = lambda tree, part: jax.tree.map(lambda leaf: leaf[part], tree)

        def turn(x: jax.Array, layers: Any) -> tuple[jax.Array, Any]:
            """A round of kinds, the first of them, or all rounds."""
            found = []
            for j in range(len(layers[0])):
                n, params, key = some(layers, j)
                kind = kinds[j % len(kinds)]
                x, _, inside = run(kind, x, n, self._of_layer(stacked, n) if look_up else params, key)
                found.append((x if with_states else None, inside))
            return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

        first_BTD, found = x_BTD, []
        if config.conv_width and segments_BT is not None:
            # The first layer, and beside it the convolution, before the others.
            x_BTD, (_, inside) = turn(x_BTD, some(each, np.s_[:1]))
            x_BTD = Convolution(config, self.dtype, name="conv")(first_BTD, x_BTD, segments_BT)
            found.append((x_BTD[None] if with_states else None, inside))
            each = some(each, np.s_[1:])
        turns, rest = divmod(len(each[0]), len(kinds)) if not apart else (0, len(each[0]))
        whole = turns * len(kinds)
        if turns:
            rounds = jax.tree.map(lambda leaf: leaf[:whole].reshape(turns, len(kinds), *leaf.shape[1:]), each)
            x_BTD, out = jax.lax.scan(turn, x_BTD, rounds, unroll=min(self.unroll, turns))
            found.append(jax.tree.map(lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), out))
        if rest:
            x_BTD, out = turn(x_BTD, some(each, np.s_[whole:]))
            found.append(out)
        x_BTD = self._last_norm(x_BTD)
        states, inside = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found)
        if with_states:
            # The last are those after the last norm, as in transformers.
            self.sow("states", "states", jnp.concatenate([first_BTD[None], states[:-1], x_BTD[None]]))
        self.sow("weights", "weights", inside)
        for name, loss_L in inside.losses.items():
            self.sow("losses", name, loss_L.sum())
        return x_BTD

    @property
    def _shares(self) -> bool:
        return (self.config.distinct_layers or self.layers) < self.layers

    def _of_layer(self, stacked: Any, n: Any) -> Any:
        """The parameters of layer n, its own or those that it shares with its neighbours."""
        row = n
        if self._shares:
            share = self.layers / (self.config.distinct_layers or self.layers)
            rows = [int(i / share) for i in range(self.layers)]  # as transformers rounds, if it is no whole number
            row = rows[n] if isinstance(n, (int, np.integer)) else jnp.asarray(rows)[n]
        return (
            stacked[row] if isinstance(stacked, tuple) else jax.tree.map(lambda leaf: jnp.asarray(leaf)[row], stacked)
        )

    def _parameters(self, block: Block, *inputs: Any) -> Any:
        """The layers' parameters, stacked along the first axis of each leaf."""
        if not self.is_initializing():
            return self.variables["params"]["layers"]

        def make(key: jax.Array) -> Any:
            x, sight, *rest = inputs
            one = lambda key: block.init(key, x, 0, sight, *rest)["params"]
            return jax.vmap(one)(jax.random.split(key, self.config.distinct_layers or self.layers))

        return self.param("layers", make)

    def _sights(
        self,
        segments_BT: jax.Array | None,
        positions_BT: jax.Array,
        caches: Caches | None,
        keep: Keep | None,
        prefix_BT: jax.Array | None,
        given_BTS: jax.Array | None,
    ) -> dict[str, AttentionInputs]:
        """What the layers of each kind see, of the row or of the caches; and what they keep."""
        config = self.config
        bias_BHTS = distances = lengths_BT = None
        if config.rotary_scaling in BY_LENGTH:
            lengths_BT = self._lengths(segments_BT, positions_BT, caches, keep)
        if config.relative == "buckets":
            here_BT = positions_S = jnp.arange(positions_BT.shape[1])[None]
            if caches is not None:
                here_BT, positions_S = positions_BT, jnp.arange(caches.own[0].k_BKSC.shape[2])[None]
            bias_BHTS = Buckets(config, self.causal, name="relative")(here_BT, positions_S)
        elif config.relative == "disentangled":
            distances = Disentangled(config, name="relative")(positions_BT.shape[1])
        sights: dict[str, AttentionInputs] = {}
        for kind in sorted(set(config.layer_kinds)):
            window = config.window if kind == "local" else None
            kept_BS = segments = None
            if caches is not None:
                first = config.layer_kinds.index(kind)
                slots_BTS = cache_positions(positions_BT, caches.own[min(first, self.layers - 1)].k_BKSC.shape[2])
                mask_BTS = slots_BTS >= 0
                if window is not None:
                    mask_BTS &= slots_BTS > positions_BT[:, :, None] - window
            else:
                assert segments_BT is not None
                mask_BTS = self_mask(segments_BT, self.causal, window, prefix_BT)
                segments = None if prefix_BT is not None else (segments_BT, segments_BT)
                if given_BTS is not None:
                    mask_BTS, segments = mask_BTS & given_BTS, None
            if keep is not None:
                # Distances of relative positions are those of slots, so that these keep all.
                short = window is not None and config.relative == "none"
                slots = min(keep.length, window + keep.ahead - 1) if short and window else keep.length
                kept_BS = jnp.maximum(cache_positions(keep.lengths_B[:, None] - 1, slots)[:, 0], 0)
            angles = slot_turns = None
            if config.positions == "rotary":
                angles = turns(positions_BT, config, kind, lengths_BT)
                if lengths_BT is not None and (caches is not None or keep is not None):
                    # The last query's: those before it in this call read the same keys, under the same turns.
                    slot_turns = turns(positions_BT if caches is None else slots_BTS[:, -1], config, kind, lengths_BT)
            causal = self.causal and caches is None and prefix_BT is None
            sights[kind] = AttentionInputs(
                mask_BTS, causal, segments, window, angles, bias_BHTS, distances, kept_BS, slot_turns
            )
        return sights

    def _lengths(
        self, segments_BT: jax.Array | None, positions_BT: jax.Array, caches: Caches | None, keep: Keep | None
    ) -> jax.Array:
        """[B, T or 1], the length of the sequence that each token is of, as far as it is known by now."""
        if caches is not None:
            return positions_BT.max(1, keepdims=True) + 1
        if keep is not None:
            return keep.lengths_B[:, None]
        assert segments_BT is not None
        count = segments_BT.shape[1] + 1
        last = lambda positions_T, segments_T: jax.ops.segment_max(positions_T, segments_T, count)[segments_T]
        return jax.vmap(last)(positions_BT, segments_BT) + 1

    def _last_norm(self, x_BTD: jax.Array) -> jax.Array:
        if self.config.norm_place != "post":
            x_BTD = Norm(self.config, self.dtype, name="norm")(x_BTD)
        return Dropout(self.config.rate("final_dropout"), name="dropout")(x_BTD)


class Transformer(nn.Module):
    """Embeddings, the stacks that `config.structure` names, and the heads on top.

    Inputs default to one example a row without padding: segments of 1, positions from 0, types of 0.
    Methods return hidden states [B, T, D]; heads are methods of their own, applied where a task needs them.
    """

    config: ModelConfig
    constrain: Placement = Placement()
    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1
    kernel: str = "auto"
    precision: str = "default"  # of products of float32 matrices, as `jax.default_matmul_precision` names it

    def setup(self) -> None:
        config, on_top = self.config, set(self.config.heads_on_top)
        parts = {"config": config, "constrain": self.constrain, "dtype": self.dtype}
        how = parts | {"remat": self.remat, "unroll": self.unroll, "kernel": self.kernel}
        self.embeddings = chosen(FRONT_ENDS, config.front_end, "front_end")(config, self.dtype)
        if config.structure != "decoder":
            self.encoder = Stack(**how, layers=config.layers)
        how["config"] = config.of_decoder
        if config.structure != "encoder":
            second = config.structure == "encoder_decoder"
            layers = (second and config.decoder_layers) or config.layers
            self.decoder = Stack(**how, layers=layers, causal=True)
            if second:
                own = config.decoder_vocabulary
                self.decoder_embeddings = Embeddings(config, self.dtype, shared=not config.decoder_tokens, rows=own)
        if "lm" in on_top:
            self.lm_head = Vocabulary(**parts, bias="lm" in config.biases)
        if "masked_lm" in on_top:
            self.masked_lm_head = MaskedLM(**parts)
        if {"pooled", "next_sentence"} & on_top:
            self.pooled_head = Pooled(config, self.dtype)
        if "next_sentence" in on_top:
            self.next_sentence_head = Linear((2,), config.matrix_std, dtype=self.dtype)
        if "classes" in on_top:
            self.classes_head = Classes(config, self.dtype)
        if "tokens" in on_top:
            self.tokens_head = PerToken(config, len(config.labels), config.rate("tokens_dropout"), self.dtype)
        if "span" in on_top:
            self.span_head = PerToken(config, 2, config.rate("span_dropout"), self.dtype)
        if "replaced" in on_top:
            self.replaced_head = Replaced(config, self.dtype)
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
    ) -> tuple[jax.Array, SequenceInputs]:
        """The first hidden states [B, T, D], of an encoder-decoder the encoder's, and what `stack` reads beside them.

        tokens_BT: what the front end reads.
        """
        segments_BT, positions_BT = self._defaults(tokens_BT, segments_BT, positions_BT)
        x_BTD = self.embeddings(tokens_BT, positions_BT, types_BT)
        return x_BTD, SequenceInputs(segments_BT, positions_BT, mask_BTS, prefix_BT)

    def stack(self, x_BTD: jax.Array, inputs: SequenceInputs) -> jax.Array:
        """The last hidden states [B, T, D] of a decoder, or of the encoder, from the first."""
        stack = self.decoder if self.config.structure == "decoder" else self.encoder
        named: dict[str, Any] = {"prefix_BT": inputs.prefix_BT, "mask_BTS": inputs.mask_BTS}
        return stack(x_BTD, inputs.segments_BT, inputs.positions_BT, **named)[0]

    def encode(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        types_BT: jax.Array | None = None,
        mask_BTS: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states of the encoder."""
        return self.stack(*self.embed(tokens_BT, segments_BT, positions_BT, types_BT, mask_BTS))

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
        """Hidden states of the decoder; `context_BSD` is what the encoder gave, the rest is as in `SequenceInputs`."""
        segments_BT, positions_BT = self._defaults(tokens_BT, segments_BT, positions_BT)
        x_BTD = self._decoder_embeddings(tokens_BT, positions_BT, types_BT)
        context_sight, _ = _across(segments_BT, context_BSD, context_segments_BS)
        named: dict[str, Any] = {"prefix_BT": prefix_BT, "mask_BTS": mask_BTS}
        return self.decoder(x_BTD, segments_BT, positions_BT, context_BSD, context_sight, **named)[0]

    def prefill(
        self,
        tokens_BT: jax.Array,
        keep: Keep,
        context_BSD: jax.Array | None = None,
        context_segments_BS: jax.Array | None = None,
    ) -> tuple[jax.Array, Caches]:
        """Like `decode`, for prompts padded on the right, with the caches that `decode_cached` continues from."""
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        segments_BT = jnp.ones_like(tokens_BT)  # a prompt sees none of the padding behind it
        x_BTD = self._decoder_embeddings(tokens_BT, positions_BT, None)
        context_sight, context_segments_BS = _across(segments_BT, context_BSD, context_segments_BS, keep=True)
        prefix_BT = positions_BT < keep.lengths_B[:, None] if self.config.prefix_lm else None
        x_BTD, caches = self.decoder(
            x_BTD, segments_BT, positions_BT, context_BSD, context_sight, keep=keep, prefix_BT=prefix_BT
        )
        assert caches is not None
        return x_BTD, caches._replace(context_segments_BS=context_segments_BS)

    def decode_cached(self, tokens_BT: jax.Array, positions_BT: jax.Array, caches: Caches) -> tuple[jax.Array, Caches]:
        """Like `decode`, for tokens at `positions_BT` of sequences whose earlier tokens are in the caches."""
        x_BTD = self._decoder_embeddings(tokens_BT, positions_BT, None)
        context_sight = None
        if caches.context_segments_BS is not None:
            context_sight = AttentionInputs(cross_mask(jnp.ones_like(tokens_BT), caches.context_segments_BS))
        x_BTD, updated = self.decoder(x_BTD, None, positions_BT, None, context_sight, caches)
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
    ) -> jax.Array:
        """Hidden states [B, T, D] of the last stack; an encoder-decoder reads `target_tokens_BT` in its decoder, and
        `mask_BTS` is its encoder's."""
        if self.config.structure != "encoder_decoder":
            return self.stack(*self.embed(tokens_BT, segments_BT, positions_BT, types_BT, mask_BTS, prefix_BT))
        if target_tokens_BT is None:
            raise ValueError("an encoder-decoder needs target_tokens_BT, the tokens that its decoder reads")
        context_BSD = self.encode(tokens_BT, segments_BT, positions_BT, types_BT, mask_BTS)
        return self.decode(
            target_tokens_BT,
            target_segments_BT,
            target_positions_BT,
            context_BSD=context_BSD,
            context_segments_BS=segments_BT,
        )

    def lm(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V] of the next token."""
        config = self.config
        if config.scale_logits:
            x_BTD = x_BTD * config.width**-0.5
        read = self.decoder_embeddings if config.decoder_tokens else self.embeddings
        logits_BTV = self.lm_head(x_BTD, read.tokens)
        return config.logit_cap * jnp.tanh(logits_BTV / config.logit_cap) if config.logit_cap else logits_BTV

    def masked_lm(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V] of the token that stood at each position."""
        return self.masked_lm_head(self._transformed(x_BTD), self.embeddings.tokens)

    def pooled(self, x_BED: jax.Array) -> jax.Array:
        """Vectors [B, E, D] of examples, from the hidden states of their first tokens."""
        return self.pooled_head(x_BED)

    def next_sentence(self, x_BED: jax.Array) -> jax.Array:
        """Logits [B, E, 2]: 0 the second text follows the first, 1 it does not; from the first tokens' states."""
        return self.next_sentence_head(self.pooled(x_BED)).astype(jnp.float32)

    def classes(self, x_BED: jax.Array) -> jax.Array:
        """Logits [B, E, N] of the labels, from the states that stand for the examples (`config.classes_from`)."""
        return self.classes_head(self._transformed(x_BED))

    def tokens(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, N] of each token's label."""
        return self.tokens_head(self._transformed(x_BTD))

    def span(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, 2] that the answer starts, and that it ends, at each token."""
        return self.span_head(x_BTD)

    def replaced(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T] that each token is not the one that stood there."""
        return self.replaced_head(x_BTD)

    def _transformed(self, x: jax.Array) -> jax.Array:
        return self.transform_head(x) if self.config.shared_transform else x

    def _defaults(
        self, tokens_BT: jax.Array, segments_BT: jax.Array | None, positions_BT: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        if segments_BT is None:
            segments_BT = jnp.ones(tokens_BT.shape[:2], jnp.int32)
        if positions_BT is None and self.config.padding_token is not None:
            counted_BT = tokens_BT != self.config.padding_token
            positions_BT = jnp.cumsum(counted_BT, 1) * counted_BT - 1
        elif positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape[:2])
        return segments_BT, positions_BT

    def initialise(self, tokens_BT: jax.Array) -> None:
        """Touches every parameter once; for `init`."""
        x_BTD = self(tokens_BT, target_tokens_BT=jnp.zeros(tokens_BT.shape[:2], jnp.int32))
        for head in self.config.heads_on_top:
            getattr(self, head)(x_BTD)


def _across(
    segments_BT: jax.Array, context_BSD: jax.Array | None, context_segments_BS: jax.Array | None, keep: bool = False
) -> tuple[AttentionInputs | None, jax.Array | None]:
    """Returns what cross-attention reads beside a context, and the context's segments; None where there is no context.

    keep: whether the keys and values of the context are to be cached.
    """
    if context_BSD is None:
        return None, None
    if context_segments_BS is None:
        context_segments_BS = jnp.ones(context_BSD.shape[:2], jnp.int32)
    segments = segments_BT, context_segments_BS
    kept_BS = jnp.arange(context_BSD.shape[1])[None] if keep else None
    return AttentionInputs(cross_mask(*segments), segments=segments, kept_BS=kept_BS), context_segments_BS


def init(module: Transformer, key: jax.Array) -> dict[str, Any]:
    """Initial parameters, float32.  Under `jax.eval_shape` it gives their shapes for free."""
    module = module.clone(constrain=Placement(), kernel="xla")  # the one row of zeros divides no mesh
    front_end = chosen(FRONT_ENDS, module.config.front_end, "front_end")
    return module.init(key, front_end.blank(module.config, 1, 2), method="initialise")["params"]


def apply(
    module: Transformer, params: Any, *inputs: Any, method: Any = "__call__", key: jax.Array | None = None, **named: Any
) -> Any:
    """`module.method(*inputs, **named)` with these parameters; `key` turns dropout on."""
    rngs = None if key is None else {"dropout": key}
    with _precision(module):
        return module.apply({"params": params}, *inputs, method=method, rngs=rngs, **named)


def _precision(module: Transformer) -> AbstractContextManager[Any]:
    """The precision of the module's products; the default leaves JAX's own setting alone."""
    return nullcontext() if module.precision == "default" else jax.default_matmul_precision(module.precision)


def layers_apart(params: Any) -> Any:
    """The same parameters with a tuple of layers in place of each stack, which a `Transformer` unrolls.

    On CPU, XLA copies stacked parameters before a scan and each layer's out of the stack, in every call: a seventh of
    the time at 1,024 tokens of a small model.  Apart, they are read where they lie.
    """

    layer = lambda stacked, n: jax.tree.map(lambda leaf: leaf[n], stacked)
    cut = lambda stacked: tuple(layer(stacked, n) for n in range(len(jax.tree.leaves(stacked)[0])))
    stacks = {name: part | {"layers": cut(part["layers"])} for name, part in params.items() if "layers" in part}
    return params | stacks


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters, heads included, without making any."""
    shapes = jax.eval_shape(lambda: init(Transformer(config), jax.random.key(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
