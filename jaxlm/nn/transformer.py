"""The stacked Transformer: encoder, decoder, or both, from the closed choices of `ModelConfig`.

Each parameter of a stack is one leaf with a leading axis of the layers that have it (`stacking`). The layers are
scanned, so that compile time does not grow with depth. `constrain(x, logical_axes)` shards an activation over the mesh,
if there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from operator import itemgetter
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import ModelConfig, is_rotated
from jaxlm.devices.sharding import Placement
from jaxlm.errors import UserError
from jaxlm.nn import fusion
from jaxlm.nn.attention import AttentionInputs, cross_mask, self_mask
from jaxlm.nn.block import Block, LayerOutputs, cached_window, combine_outputs, lookup
from jaxlm.nn.cache import Cache, cache_positions
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
from jaxlm.nn.kernels import save_attention
from jaxlm.nn.layers import Convolution, Dropout, Linear, Norm
from jaxlm.nn.positions import BY_LENGTH, Buckets, Disentangled, Offsets, Sinusoids, alibi, rotary_angles
from jaxlm.nn.stacking import Parts, Segment, parts_of, period_of, row_of, rows_between, segments_of

# Operations that cost little compared with the memory of their results: the backward pass recomputes them.
_ELEMENTWISE = {
    "abs", "add", "add_any", "and", "bitcast_convert_type", "broadcast_in_dim", "concatenate",
    "convert_element_type", "copy", "cos", "div", "eq", "erf", "exp", "expand_dims", "ge", "gt", "integer_pow",
    "iota", "le", "log", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "reshape", "rsqrt",
    "select_n", "sharding_constraint", "sign", "sin", "slice", "split", "sqrt", "square", "squeeze", "sub", "tanh",
    "transpose", fusion.PRIMITIVE,
}  # fmt: skip


def _save_all_but_elementwise(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint` that saves the results of products, sums, random bits and kernels."""
    return primitive.name not in _ELEMENTWISE


_POLICIES = jax.checkpoint_policies
# The policy of `jax.checkpoint` for each value of `RunConfig.remat` except "auto": what is kept for the backward pass.
REMAT = {
    "none": _POLICIES.everything_saveable,
    "elementwise": _save_all_but_elementwise,
    # Products with weights, and the output of a fused attention kernel.
    "dots": _POLICIES.save_from_both_policies(_POLICIES.dots_with_no_batch_dims_saveable, save_attention),
    "full": _POLICIES.nothing_saveable,  # only the input of each layer
    "offload": _POLICIES.save_and_offload_only_these_names(  # only that input, in the memory of the host
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Targets(NamedTuple):
    """The tokens that a query stream predicts (Yang et al. 2019, section 2.3).

    Attributes:
      places_BQ: the place of each target in its row.
      mask_BQS: True where target q attends to key s.
      memory_BT: True for the tokens of an earlier segment, whose hidden states have no gradient (Dai et al. 2019,
        section 3.2); None: no such tokens.
    """

    places_BQ: jax.Array
    mask_BQS: jax.Array
    memory_BT: jax.Array | None = None


class SequenceInputs(NamedTuple):
    """The inputs of a stack in addition to hidden states.

    Attributes:
      segments_BT: number of each token's example in the row, from 1; 0 for padding. None: each row is one example
        without padding.
      positions_BT: position of each token in its example.
      mask_BTS: an additional mask, False where query t must not attend to key s; None: no additional mask.
      prefix_BT: 1 for tokens of the prefix, which the whole example attends to (`config.prefix_lm`).
      one_example: whether each row is one example, with padding only after it. Causality hides this padding, so that
        the attention of a decoder reads no segments.
      types_BT: types of the tokens, if attention compares them (`config.types_in`).
      targets: the targets of the query stream, whose hidden states follow those of the row; None: one stream.
      global_BT: True for tokens with global attention; None: there are none.
    """

    segments_BT: jax.Array | None
    positions_BT: jax.Array
    mask_BTS: jax.Array | None = None
    prefix_BT: jax.Array | None = None
    one_example: bool = False
    types_BT: jax.Array | None = None
    targets: Targets | None = None
    global_BT: jax.Array | None = None


class Caches(NamedTuple):
    """The caches of a decoder.

    Attributes:
      own: the cache of self-attention for each layer.
      cross: the cache of cross-attention for each layer.
      context_segments_BS: segments of the context, 0 for padding.
    """

    own: tuple[Cache, ...]
    cross: tuple[Cache, ...] | None = None
    context_segments_BS: jax.Array | None = None


class CacheSpec(NamedTuple):
    """The caches that `prefill` creates.

    Attributes:
      lengths_B: number of tokens in each prompt; the rest of the row is padding.
      length: number of slots.
      ahead: maximum number of tokens in a later call of `decode_cached`. The cache of a local layer has slots for
        its window plus these tokens.
      format: how keys and values are stored, a value of `Decoding.cache`.
    """

    lengths_B: jax.Array
    length: int
    ahead: int = 1
    format: str = "compute"


class Stack(nn.Module):
    """The layers of an encoder or a decoder, and the final norm if the norms come first.

    Without caches the layers are scanned, one cycle of `layer_kinds`, or of the pattern of layers with different parts,
    in each iteration. With caches the layers are unrolled, so that each layer updates its cache in place.

    If the collection `states` is mutable, the stack stores the hidden states of the embeddings and of every layer in it
    [L + 1, B, T, D]. If `weights` is mutable, the stack stores the `LayerOutputs` of all layers in it. The auxiliary
    losses, summed over the layers, go to `losses`.
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
        context_inputs: AttentionInputs | None = None,
        caches: Caches | None = None,
        keep: CacheSpec | None = None,
        prefix_BT: jax.Array | None = None,
        mask_BTS: jax.Array | None = None,
        one_example: bool = False,
        types_BT: jax.Array | None = None,
        targets: Targets | None = None,
        global_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, Caches | None]:
        layers = parts_of(self.config, self.layers)
        masks = prefix_BT, mask_BTS, one_example, types_BT, targets, global_BT
        is_token_BT = None if segments_BT is None else segments_BT > 0
        if is_token_BT is not None and targets is not None:
            of_targets_BQ = jnp.take_along_axis(is_token_BT, targets.places_BQ, 1)
            is_token_BT = jnp.concatenate([is_token_BT, of_targets_BQ], 1)
        attention_inputs = self._attention_inputs(segments_BT, positions_BT, caches, keep, *masks)
        # Without a parent, so that a layer is a plain function of its parameters.
        parts = self.config, self.constrain, self.dtype, self.is_mutable_collection("weights"), self.kernel
        blocks = {own: Block(*parts, own.mixer, own.feed_forward, parent=None) for own in layers}
        stacked = self._parameters(blocks, x_BTD, attention_inputs, positions_BT, context_BSD, context_inputs)

        def run(
            own: Parts,
            x: jax.Array,
            n: Any,
            params: Any,
            key: jax.Array | None = None,
            context: jax.Array | Cache | None = context_BSD,
            cache: Cache | None = None,
        ) -> tuple[jax.Array, tuple[Cache | None, Cache | None], LayerOutputs]:
            """Applies layer n, which has these parts."""
            rngs = None if key is None else {"dropout": key}
            x = checkpoint_name(x, "layer")
            inputs = (x, n, attention_inputs[own.attention], positions_BT, context, context_inputs, cache, is_token_BT)
            outputs: Any = blocks[own].apply({"params": params}, *inputs, rngs=rngs)
            return outputs

        if caches is None and keep is None:
            return self._scan(run, stacked, x_BTD, segments_BT, positions_BT.shape[1]), None
        updated: list[Any] = []
        for n, own in enumerate(layers):
            cache = None if caches is None else caches.own[n]
            context = context_BSD if caches is None or caches.cross is None else caches.cross[n]
            x_BTD, layer_caches, _ = run(own, x_BTD, n, self._of_layer(stacked, n), context=context, cache=cache)
            updated.append(layer_caches)
        owns, crosses = zip(*updated)
        if keep is not None:
            self._check_caches(owns, keep)
        return self._project(self._last_norm(x_BTD)), Caches(owns, crosses if crosses[0] is not None else None)

    def _scan(self, run: Callable, stacked: Any, x_BTD: jax.Array, segments_BT: jax.Array | None, T: int) -> jax.Array:
        """Returns the last hidden states, and stores those of the T positions of the row, which precede any targets."""
        unstacked = isinstance(stacked, tuple)  # by `unstack_layers`: then no layer is scanned
        segments = self._segments(unstacked)
        policy = REMAT[self.remat]
        if policy is not _POLICIES.everything_saveable:
            # In a fully unrolled stack XLA would reuse the values of the forward pass, and so keep them.
            unrolled = self.unroll >= min(self._cycles(segments))
            prevent_cse = unrolled and self.remat != "elementwise"
            run = jax.checkpoint(run, policy=policy, prevent_cse=prevent_cse, static_argnums=0)  # type: ignore
        keys = jax.random.split(self.make_rng("dropout"), self.layers) if self.has_rng("dropout") else None
        numbers = (np if unstacked else jnp).arange(self.layers)
        first_BTD, states, outputs = x_BTD, list[Any](), list[LayerOutputs]()
        for segment in segments:
            x_BTD, segment_states, output = self._apply(segment, run, x_BTD, stacked, numbers, keys)
            if self.config.conv_width and segment.start == 0:
                # The convolution reads the embeddings and is added to the output of the first layer.
                x_BTD = Convolution(self.config, self.dtype, name="conv")(first_BTD, x_BTD, segments_BT)
                segment_states = None if segment_states is None else x_BTD[None]
            states.append(segment_states)
            outputs.append(output)
        x_BTD = self._last_norm(x_BTD)
        if self.is_mutable_collection("states"):
            # The last states are those after the final norm, as in transformers.
            before_LBTD = jnp.concatenate(states)[:-1]
            self.sow("states", "states", jnp.concatenate([first_BTD[None], before_LBTD, x_BTD[None]])[:, :, :T])
        output = combine_outputs(jnp.concatenate, outputs)
        if output.attention_BHTS is not None:
            output = output._replace(attention_BHTS=output.attention_BHTS[..., :T, :])
        self.sow("weights", "weights", output)
        for name, loss_L in output.losses.items():
            self.sow("losses", name, loss_L.sum())
        return self._project(x_BTD)

    def _segments(self, unstacked: bool) -> list[Segment]:
        """Returns the segments of the layers; `unstacked`: no layer is scanned."""
        first = 1 if self.config.conv_width else 0
        segments = [Segment(0, 1, 1, False)] * first
        if unstacked:
            rest = self.layers - first
            return segments + ([Segment(first, rest, 1, False)] if rest else [])
        return segments + segments_of(self.config, first, self.layers)

    def _cycles(self, segments: list[Segment]) -> list[int]:
        """Returns the numbers of iterations that decide whether a stack is fully unrolled."""
        if self.config.has_mixed_layers:
            return [segment.cycles for segment in segments]
        return [self.layers // period_of(self.config)]

    def _apply(
        self, segment: Segment, run: Callable, x_BTD: jax.Array, stacked: Any, numbers: Any, keys: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None, LayerOutputs]:
        """Returns the hidden states after the layers of a segment, those after each layer, and the other outputs."""
        config, all_layers = self.config, parts_of(self.config, self.layers)
        pattern = all_layers[segment.start : segment.start + segment.period]
        with_states = self.is_mutable_collection("states")
        # Shared parameters are indexed by the layer's number; other parameters are scanned over.
        index = self._shares or isinstance(stacked, tuple)

        def apply_layers(x: jax.Array, layers: Any) -> tuple[jax.Array, Any]:
            """Applies the layers of the pattern once."""
            numbers, params, keys = layers
            states, outputs = [], []
            for j, own in enumerate(pattern):
                n = numbers[j]
                of_layer = self._of_layer(stacked, n) if index else row_of(config, params, pattern, j)
                x, _, output = run(own, x, n, of_layer, None if keys is None else keys[j])
                states.append(x)
                outputs.append(output)
            return x, (jnp.stack(states) if with_states else None, combine_outputs(jnp.stack, outputs))

        span = slice(segment.start, segment.stop)
        params = None if index else rows_between(config, stacked, all_layers, segment.start, segment.stop)
        layers = numbers[span], params, None if keys is None else keys[span]
        if not segment.scanned:
            x_BTD, (states, output) = apply_layers(x_BTD, layers)
            return x_BTD, states, output
        cycles = segment.cycles
        xs = jax.tree.map(lambda leaf: leaf.reshape(cycles, len(leaf) // cycles, *leaf.shape[1:]), layers)
        x_BTD, outputs = jax.lax.scan(apply_layers, x_BTD, xs, unroll=min(self.unroll, cycles))
        states, output = jax.tree.map(lambda leaf: leaf.reshape(cycles * leaf.shape[1], *leaf.shape[2:]), outputs)
        return x_BTD, states, output

    @property
    def _shares(self) -> bool:
        return (self.config.distinct_layers or self.layers) < self.layers

    def _of_layer(self, stacked: Any, n: Any) -> Any:
        """Returns the parameters of layer n, which neighbouring layers may share."""
        if not isinstance(stacked, tuple) and self.config.has_mixed_layers:
            return row_of(self.config, stacked, parts_of(self.config, self.layers), n)
        row = n
        if self._shares:
            share = self.layers / (self.config.distinct_layers or self.layers)
            rows = [int(i / share) for i in range(self.layers)]  # rounded as in transformers
            row = rows[n] if isinstance(n, (int, np.integer)) else jnp.asarray(rows)[n]
        return (
            stacked[row] if isinstance(stacked, tuple) else jax.tree.map(lambda leaf: jnp.asarray(leaf)[row], stacked)
        )

    def _parameters(
        self, blocks: dict[Parts, Block], x_BTD: jax.Array, attention_inputs: dict[Any, AttentionInputs], *rest: Any
    ) -> Any:
        """Returns the parameters of the layers, stacked along the first axis of each leaf."""
        if not self.is_initializing():
            return self.variables["params"]["layers"]
        config, layers = self.config, parts_of(self.config, self.layers)

        def make(key: jax.Array) -> Any:
            keys = jax.random.split(key, config.distinct_layers or self.layers)

            def draw(own: Parts, keys: jax.Array) -> Any:
                inputs = attention_inputs[own.attention], *rest
                return jax.vmap(lambda key: blocks[own].init(key, x_BTD, 0, *inputs)["params"])(keys)

            if not config.has_mixed_layers:
                return draw(layers[0], keys)
            # One draw for each structure, whose rows are then sorted by layer.
            drawn: dict[Any, tuple[list[int], Any]] = {}
            for own in dict.fromkeys(layers):
                if own.structure not in drawn:
                    numbers = [n for n, other in enumerate(layers) if other.structure == own.structure]
                    drawn[own.structure] = numbers, draw(own, keys[np.array(numbers)])
            names = {name for _, params in drawn.values() for name in params}

            def rows(name: str) -> Any:
                found = [(numbers, params[name]) for numbers, params in drawn.values() if name in params]
                order = np.argsort([n for numbers, _ in found for n in numbers])
                return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[order], *[params for _, params in found])

            return {name: rows(name) for name in sorted(names)}

        return self.param("layers", make)

    def _attention_inputs(
        self,
        segments_BT: jax.Array | None,
        positions_BT: jax.Array,
        caches: Caches | None,
        keep: CacheSpec | None,
        prefix_BT: jax.Array | None,
        extra_mask_BTS: jax.Array | None,
        one_example: bool,
        types_BT: jax.Array | None,
        targets: Targets | None,
        global_BT: jax.Array | None,
    ) -> dict[Any, AttentionInputs]:
        """Returns the attention inputs for each kind of layer, window and mixer."""
        config = self.config
        bias_BHTS = distances = offsets = lengths_BT = None
        cache_format = "compute" if keep is None else keep.format
        if config.rotary_scaling in BY_LENGTH:
            lengths_BT = self._lengths(segments_BT, positions_BT, caches, keep)
        if one_example and self.causal:
            segments_BT = None
        if config.relative == "buckets":
            # The tokens of an example are consecutive.
            places = (positions_BT.shape[1],) if caches is None else (caches.own[0].slots, positions_BT)
            bias_BHTS = Buckets(config, self.causal, name="relative")(*places)
        elif config.relative == "alibi":
            # A cache holds the whole text, so that the number of a slot is its position.
            keys_BS = positions_BT if caches is None else jnp.arange(caches.own[0].slots)[None]
            bias_BHTS = alibi(keys_BS, config)
        elif config.relative == "disentangled":
            distances = Disentangled(config, name="relative")(positions_BT.shape[1])
        elif config.relative == "transformer_xl":
            offsets = _offsets(Sinusoids(config, name="relative")(positions_BT.shape[1]), types_BT, targets)
        inputs_of: dict[Any, AttentionInputs] = {}
        for n, own in enumerate(parts_of(config, self.layers)):
            if own.attention in inputs_of:
                continue
            kind, window = own.kind, cached_window(own)
            slot_positions_BS = segments = None
            if caches is not None:
                slots_BTS = cache_positions(positions_BT, caches.own[n].slots)
                mask_BTS = slots_BTS >= 0
                if window is not None:
                    mask_BTS &= slots_BTS > positions_BT[:, :, None] - window
            else:
                # One row of the mask serves all rows that are one example each; the kernels need no mask for them.
                one_BT = jnp.ones((1, positions_BT.shape[1]), jnp.int32)
                own_BT = one_BT if segments_BT is None else segments_BT
                mask_BTS = self_mask(own_BT, self.causal, window, prefix_BT, global_BT)
                segments = None if prefix_BT is not None else (segments_BT, segments_BT)
                if extra_mask_BTS is not None:
                    mask_BTS, segments = mask_BTS & extra_mask_BTS, None
                if targets is not None:
                    row_BTS = jnp.broadcast_to(mask_BTS, (len(targets.mask_BQS), *mask_BTS.shape[1:]))
                    mask_BTS, segments = jnp.concatenate([row_BTS, targets.mask_BQS], 1), None
            if keep is not None:
                # Relative positions use the numbers of slots as positions, so their caches hold the whole text.
                short = window is not None and config.relative == "none"
                slots = min(keep.length, window + keep.ahead - 1) if short and window else keep.length
                slot_positions_BS = jnp.maximum(cache_positions(keep.lengths_B[:, None] - 1, slots)[:, 0], 0)
            rotary = cache_rotary = None
            if config.positions == "rotary" and is_rotated(kind):
                rotary = rotary_angles(positions_BT, config, kind, lengths_BT)
                if lengths_BT is not None and (caches is not None or keep is not None):
                    # All queries of a call use the angles for its last query.
                    slots_BS = positions_BT if caches is None else slots_BTS[:, -1]
                    cache_rotary = rotary_angles(slots_BS, config, kind, lengths_BT)
            causal = self.causal and caches is None and prefix_BT is None
            inputs_of[own.attention] = AttentionInputs(
                *(mask_BTS, causal, segments, window, rotary, bias_BHTS, distances, offsets),
                *(slot_positions_BS, cache_rotary, cache_format, global_BT),
            )
        return inputs_of

    def _check_caches(self, caches: tuple[Any, ...], keep: CacheSpec) -> None:
        """Raises UserError unless the mixer returns caches in the requested format."""
        mixers = [own.mixer for own in parts_of(self.config, self.layers)]
        if None in caches:
            raise UserError(
                f"model.mixer is {mixers[caches.index(None)]!r}, which returns no cache, but generation requires one; "
                f"return a jaxlm.nn.cache.Cache, or use a model with attention"
            )
        for cache, name in zip(caches, mixers):
            if cache.format != keep.format:
                raise UserError(
                    f"cache is {keep.format!r}, but model.mixer is {name!r}, which stores keys and values in the "
                    f"format {cache.format!r}; choose this format"
                )

    def _lengths(
        self, segments_BT: jax.Array | None, positions_BT: jax.Array, caches: Caches | None, keep: CacheSpec | None
    ) -> jax.Array:
        """Returns the current length of the sequence of each token, [B, T] or [B, 1]."""
        if caches is not None:
            return positions_BT.max(1, keepdims=True) + 1
        if keep is not None:
            return keep.lengths_B[:, None]
        if segments_BT is None:
            return jnp.full((1, 1), positions_BT.shape[1])
        count = segments_BT.shape[1] + 1
        last = lambda positions_T, segments_T: jax.ops.segment_max(positions_T, segments_T, count)[segments_T]
        return jax.vmap(last)(positions_BT, segments_BT) + 1

    def _last_norm(self, x_BTD: jax.Array) -> jax.Array:
        if self.config.norm_place not in ("post", "none"):
            x_BTD = Norm(self.config, self.dtype, name="norm")(x_BTD)
        return Dropout(self.config.rate("final_dropout"), name="dropout")(x_BTD)

    def _project(self, x_BTD: jax.Array) -> jax.Array:
        """Returns hidden states with the width of the embeddings, if they are projected back to it."""
        config = self.config
        if not config.project_tokens:
            return x_BTD
        return Linear((config.W,), config.matrix_std, False, dtype=self.dtype, name="project")(x_BTD)


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

    def setup(self) -> None:
        config, on_top = self.config, set(self.config.heads_on_top)
        parts = {"config": config, "constrain": self.constrain, "dtype": self.dtype}
        how = parts | {"remat": self.remat, "unroll": self.unroll, "kernel": self.kernel}
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
        names = "prefix_BT", "mask_BTS", "one_example", "types_BT", "targets", "global_BT"
        named = {name: getattr(inputs, name) for name in names}
        x_BTD, _ = stack(x_BTD, inputs.segments_BT, inputs.positions_BT, **named)
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
        named: dict[str, Any] = {"prefix_BT": prefix_BT, "mask_BTS": mask_BTS}
        return self.decoder(x_BTD, segments_BT, positions_BT, context_BSD, context_inputs, **named)[0]

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
        x_BTD, caches = self.decoder(
            x_BTD, None, positions_BT, context_BSD, context_inputs, keep=keep, prefix_BT=prefix_BT
        )
        assert caches is not None
        return x_BTD, caches._replace(context_segments_BS=context_segments_BS)

    def decode_cached(self, tokens_BT: jax.Array, positions_BT: jax.Array, caches: Caches) -> tuple[jax.Array, Caches]:
        """Like `decode`, for tokens at `positions_BT`; the earlier tokens of the sequences are in the caches."""
        x_BTD = self._decoder_embeddings(tokens_BT, positions_BT, None)
        context_inputs = None
        if caches.context_segments_BS is not None:
            context_inputs = AttentionInputs(cross_mask(jnp.ones_like(tokens_BT), caches.context_segments_BS))
        x_BTD, updated = self.decoder(x_BTD, None, positions_BT, None, context_inputs, caches)
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


def _offsets(embeddings_RD: jax.Array, types_BT: jax.Array | None, targets: Targets | None) -> Offsets:
    """Returns Transformer-XL's relative positions for the queries of a row and of targets."""
    places_BQ, memory_BS = (None, None) if targets is None else (targets.places_BQ, targets.memory_BT)
    if types_BT is None:
        return Offsets(embeddings_RD, places_BQ, memory_BS=memory_BS)
    of_queries_BT = types_BT
    if places_BQ is not None:
        of_queries_BT = jnp.concatenate([types_BT, jnp.take_along_axis(types_BT, places_BQ, 1)], 1)
    return Offsets(embeddings_RD, places_BQ, of_queries_BT[:, :, None] != types_BT[:, None, :], memory_BS)


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
