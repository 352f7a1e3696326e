"""The layers of an encoder or a decoder, applied by a scan, and what they read in addition to hidden states.

Each parameter of a stack is one leaf with a leading axis of the layers that have it (`layer_parts`). The layers are
scanned, so that compile time does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
from jaxlm.nn.attention import AttentionInputs
from jaxlm.nn.block import MIXERS, Block, LayerOutputs, cached_window, combine_outputs
from jaxlm.nn.cache import Cache, cache_positions
from jaxlm.nn.kernels import save_attention
from jaxlm.nn.layer_parts import Parts, Segment, parts_of, period_of, row_of, rows_between, segments_of
from jaxlm.nn.layers import Convolution, Dropout, Linear, Norm
from jaxlm.nn.masks import self_mask
from jaxlm.nn.positions import BY_LENGTH, Buckets, Disentangled, Offsets, Sinusoids, alibi, rotary_angles
from jaxlm.nn.sites import Edit, Site, edited_layer

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
    losses, summed over the layers, go to `losses`. If `activations` is mutable, the stack stores the values of all
    layers at each site in it [L, B, T, ...], after an edit.
    """

    config: ModelConfig
    constrain: Placement
    layers: int
    dtype: Any = jnp.float32
    causal: bool = False
    remat: str = "none"
    unroll: int = 1
    kernel: str = "auto"
    edit: Edit | None = None  # see `jaxlm.nn.sites`

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        inputs: SequenceInputs,
        context_BSD: jax.Array | None = None,
        context_inputs: AttentionInputs | None = None,
        caches: Caches | None = None,
        keep: CacheSpec | None = None,
    ) -> tuple[jax.Array, Caches | None]:
        """Returns the last hidden states [B, T, D], and the updated or new caches.

        Args:
          x_BTD: hidden states; with targets, theirs follow those of the row.
          inputs: the other inputs of the row.
          context_BSD: the output of the encoder, for cross-attention.
          context_inputs: the inputs of cross-attention.
          caches: keys and values of earlier tokens; those of this call are added.
          keep: the caches to create; None: none.
        """
        layers, positions_BT = parts_of(self.config, self.layers), inputs.positions_BT
        is_token_BT = None if inputs.segments_BT is None else inputs.segments_BT > 0
        if is_token_BT is not None and inputs.targets is not None:
            of_targets_BQ = jnp.take_along_axis(is_token_BT, inputs.targets.places_BQ, 1)
            is_token_BT = jnp.concatenate([is_token_BT, of_targets_BQ], 1)
        attention_inputs = self._attention_inputs(inputs, caches, keep)
        # Without a parent, so that a layer is a plain function of its parameters.
        parts = self.config, self.constrain, self.dtype, self.is_mutable_collection("weights"), self.kernel
        blocks = {own: Block(*parts, own.mixer, own.feed_forward, parent=None) for own in layers}
        records = self.is_mutable_collection("activations")
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
            args = (x, n, attention_inputs[own.attention], positions_BT, context, context_inputs, cache, is_token_BT)
            apply: Callable[[], Any] = partial(blocks[own].apply, {"params": params}, *args, rngs=rngs)
            if self.edit is None and not records:
                return apply()
            values: dict[str, jax.Array] = {}

            def visit(part: str, value: jax.Array) -> jax.Array:
                value = self._edited(part, n, value)
                values.update({part: value} if records else {})
                return value

            with edited_layer(visit):
                x, layer_caches, output = apply()
            return x, layer_caches, output._replace(activations=values)

        if caches is None and keep is None:
            return self._scan(run, stacked, x_BTD, inputs), None
        updated: list[Any] = []
        for n, own in enumerate(layers):
            cache = None if caches is None else caches.own[n]
            context = context_BSD if caches is None or caches.cross is None else caches.cross[n]
            x_BTD, layer_caches, _ = run(own, x_BTD, n, self._of_layer(stacked, n), context=context, cache=cache)
            x_BTD = self._edited("residual", n, x_BTD)
            updated.append(layer_caches)
        owns, crosses = zip(*updated)
        if keep is not None:
            self._check_caches(owns, keep)
        return self._project(self._last_norm(x_BTD)), Caches(owns, crosses if crosses[0] is not None else None)

    def _scan(self, run: Callable, stacked: Any, x_BTD: jax.Array, inputs: SequenceInputs) -> jax.Array:
        """Returns the last hidden states, and stores those of the T positions of the row, which precede any targets."""
        T = inputs.positions_BT.shape[1]
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
                x_BTD = Convolution(self.config, self.dtype, name="conv")(first_BTD, x_BTD, inputs.segments_BT)
                x_BTD = self._edited("residual", 0, x_BTD)
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
        if self.is_mutable_collection("activations"):
            values = {"residual": jnp.concatenate(states), **output.activations}
            self.sow("activations", "activations", {part: value[:, :, :T] for part, value in values.items()})
        self.sow("weights", "weights", output._replace(activations={}))
        for name, loss_L in output.losses.items():
            self.sow("losses", name, loss_L.sum())
        return self._project(x_BTD)

    def _edited(self, part: str, layer: Any, value: jax.Array) -> jax.Array:
        """Returns a value of a layer after the edit, if there is one."""
        if self.edit is None:
            return value
        assert self.name is not None
        new = self.edit(Site(self.name, part), layer, value)
        if jnp.shape(new) != value.shape:
            raise UserError(
                f"the edit returns an array of shape {jnp.shape(new)} for the part {part!r} of the {self.name}; return "
                f"one of shape {value.shape}, such as the value itself"
            )
        return jnp.asarray(new, value.dtype)

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
        with_states = self.is_mutable_collection("states") or self.is_mutable_collection("activations")
        has_convolution = config.conv_width and segment.start == 0  # its output is part of the residual stream
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
                x = x if has_convolution else self._edited("residual", n, x)
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
        self, inputs: SequenceInputs, caches: Caches | None, keep: CacheSpec | None
    ) -> dict[Any, AttentionInputs]:
        """Returns the attention inputs for each kind of layer, window and mixer."""
        config = self.config
        positions_BT, targets = inputs.positions_BT, inputs.targets
        bias_BHTS = distances = offsets = lengths_BT = None
        cache_format = "compute" if keep is None else keep.format
        if config.rotary_scaling in BY_LENGTH:
            lengths_BT = self._lengths(inputs.segments_BT, positions_BT, caches, keep)
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
            offsets = _offsets(Sinusoids(config, name="relative")(positions_BT.shape[1]), inputs.types_BT, targets)
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
                mask_BTS, segments = self._mask(inputs, window)
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
            causal = self.causal and caches is None and inputs.prefix_BT is None
            inputs_of[own.attention] = AttentionInputs(
                *(mask_BTS, causal, segments, window, rotary, bias_BHTS, distances, offsets),
                *(slot_positions_BS, cache_rotary, cache_format, inputs.global_BT),
            )
        return inputs_of

    def _mask(self, inputs: SequenceInputs, window: int | None) -> tuple[jax.Array, Any]:
        """Returns the mask of attention without a cache, and its segments if they define it; see `AttentionInputs`."""
        segments_BT = None if inputs.one_example and self.causal else inputs.segments_BT
        # One row of the mask serves all rows that are one example each; the kernels need no mask for them.
        one_BT = jnp.ones((1, inputs.positions_BT.shape[1]), jnp.int32)
        own_BT = one_BT if segments_BT is None else segments_BT
        mask_BTS = self_mask(own_BT, self.causal, window, inputs.prefix_BT, inputs.global_BT)
        segments = None if inputs.prefix_BT is not None else (segments_BT, segments_BT)
        if inputs.mask_BTS is not None:
            mask_BTS, segments = mask_BTS & inputs.mask_BTS, None
        if inputs.targets is not None:
            mask_BQS = inputs.targets.mask_BQS
            row_BTS = jnp.broadcast_to(mask_BTS, (len(mask_BQS), *mask_BTS.shape[1:]))
            mask_BTS, segments = jnp.concatenate([row_BTS, mask_BQS], 1), None
        return mask_BTS, segments

    def _check_caches(self, caches: tuple[Any, ...], keep: CacheSpec) -> None:
        """Raises UserError unless the mixer returns caches in the requested format."""
        layers = parts_of(self.config, self.layers)
        if None in caches:
            raise UserError(
                f"model.mixer is {layers[caches.index(None)].mixer!r}, which returns no cache, but generation requires "
                f"one; return a jaxlm.nn.cache.Cache, or use a model with attention"
            )
        others = [(layer, cache.format) for layer, cache in zip(layers, caches) if cache.format != keep.format]
        # Mixers with a window store states, which are floats in every format.
        wrong = [(layer, form) for layer, form in others if getattr(MIXERS[layer.mixer], "window", None) is None]
        if wrong or len(others) == len(caches):
            layer, form = (wrong or others)[0]
            raise UserError(
                f"cache is {keep.format!r}, but model.mixer is {layer.mixer!r}, which stores keys and values in the "
                f"format {form!r}; choose this format"
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


def _offsets(embeddings_RD: jax.Array, types_BT: jax.Array | None, targets: Targets | None) -> Offsets:
    """Returns Transformer-XL's relative positions for the queries of a row and of targets."""
    places_BQ, memory_BS = (None, None) if targets is None else (targets.places_BQ, targets.memory_BT)
    if types_BT is None:
        return Offsets(embeddings_RD, places_BQ, memory_BS=memory_BS)
    of_queries_BT = types_BT
    if places_BQ is not None:
        of_queries_BT = jnp.concatenate([types_BT, jnp.take_along_axis(types_BT, places_BQ, 1)], 1)
    return Offsets(embeddings_RD, places_BQ, of_queries_BT[:, :, None] != types_BT[:, None, :], memory_BS)
