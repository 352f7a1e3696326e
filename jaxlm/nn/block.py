"""One layer of a stack, and the tables of the modules that it consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig, is_local
from jaxlm.devices.sharding import Placement
from jaxlm.errors import UserError, suggestion
from jaxlm.nn.attention import Attention, AttentionInputs
from jaxlm.nn.cache import Cache
from jaxlm.nn.convolutional import Convolutions
from jaxlm.nn.experts import Experts
from jaxlm.nn.latent import LatentAttention
from jaxlm.nn.layer_parts import Parts, feed_forward_name, mixer_name
from jaxlm.nn.layers import MLP, Dropout, GatedMLP, Norm
from jaxlm.nn.linear_attention import GatedDelta
from jaxlm.nn.recurrent import GRU, LSTM

MIXERS: dict[str, Any] = {  # by `ModelConfig.mixer`; the entries have the signature of `Attention`
    "attention": Attention,
    "latent": LatentAttention,
    "lstm": LSTM,
    "gru": GRU,
    "gated_delta": GatedDelta,
    "convolution": Convolutions,
}
FEED_FORWARDS: dict[str, Any] = {  # by `ModelConfig.feed_forward`; the entries have the signature of `MLP`
    "dense": MLP,
    "gated": GatedMLP,
    "experts": Experts,
}


def cached_window(layer: Parts) -> int | None:
    """Returns how many of the latest positions a layer reads from its cache; None: all."""
    return layer.window if is_local(layer.kind) else getattr(MIXERS.get(layer.mixer), "window", None)


class LayerOutputs(NamedTuple):
    """The outputs of a layer in addition to hidden states.

    Attributes:
      attention_BHTS: weights of self-attention, if requested.
      cross_attention_BHTS: weights of cross-attention, if requested.
      losses: auxiliary losses by name, each summed over the tokens.
      activations: values by part of the layer, if requested; see `jaxlm.nn.sites`.
    """

    attention_BHTS: jax.Array | None
    cross_attention_BHTS: jax.Array | None
    losses: dict[str, jax.Array]
    activations: Mapping[str, jax.Array] = MappingProxyType({})


def combine_outputs(combine: Callable[[list[jax.Array]], jax.Array], outputs: Sequence[LayerOutputs]) -> LayerOutputs:
    """Returns the outputs of several layers as one; layers without an output have no part in it.

    Args:
      combine: combines arrays of several layers.
      outputs: the outputs of the layers, or of groups of layers.
    """

    def field(values: Sequence[jax.Array | None]) -> Any:
        found = [value for value in values if value is not None]
        return combine(found) if found else None

    def by_name(fields: Sequence[Mapping[str, jax.Array]]) -> dict[str, Any]:
        names = sorted({name for own in fields for name in own})
        return {name: field([own.get(name) for own in fields]) for name in names}

    weights = lambda name: field([getattr(output, name) for output in outputs])
    losses = by_name([output.losses for output in outputs])
    activations = by_name([output.activations for output in outputs])
    return LayerOutputs(weights("attention_BHTS"), weights("cross_attention_BHTS"), losses, activations)


def lookup(table: dict[str, Any], name: str, field: str) -> Any:
    """Returns the entry `name` of a table of modules.

    Raises:
      UserError: if there is no such entry; the message contains the config's `field`.
    """
    if name not in table:
        raise UserError(f"model.{field} is {name!r}{suggestion(name, table)}")
    return table[name]


class Block(nn.Module):
    """One layer: attention, cross-attention if there is a context, and the MLP, each with a residual connection."""

    config: ModelConfig
    constrain: Placement
    dtype: Any = jnp.float32
    weights: bool = False  # whether to return attention weights
    kernel: str = "auto"  # for attention
    mixer: str | None = None  # None: that of the config
    feed_forward: str | None = None  # None: that of the config

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        layer: jax.Array | int,
        inputs: AttentionInputs,
        positions_BT: jax.Array,
        context: jax.Array | Cache | None = None,
        context_inputs: AttentionInputs | None = None,
        cache: Cache | None = None,
        tokens_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Cache | None, Cache | None], LayerOutputs]:
        """Returns the hidden states, the caches of self-attention and cross-attention, and the other outputs.

        Args:
          x_BTD: hidden states.
          layer: index of the layer, from 0.
          inputs: masks and positions of self-attention.
          positions_BT: position of each token in its example.
          context: hidden states of the context [B, S, D], or their cached keys and values.
          context_inputs: masks of cross-attention.
          cache: the cache of self-attention.
          tokens_BT: False for padding; None: unknown.
        """
        config = self.config
        own_mixer, own_feed_forward = self.mixer or config.mixer, self.feed_forward or config.feed_forward
        parts = {"config": config, "constrain": self.constrain, "dtype": self.dtype}
        weights: dict[str, jax.Array | None] = {"attention": None, "cross_attention": None}
        caches: dict[str, Cache | None] = {"attention": None, "cross_attention": None}

        norm = lambda name: Norm(config, self.dtype, name=f"{name}_norm")

        def before(x: jax.Array, name: str) -> jax.Array:
            """Returns the input of a sub-layer."""
            if config.norm_place in ("post", "out", "none"):
                return x
            normed = norm(name)(x)
            is_first = name == "attention" and not config.first_norm
            return jnp.where(jnp.equal(layer, 0), x, normed) if is_first else normed

        def after(y: jax.Array, name: str) -> jax.Array:
            """Returns what is added to the hidden states for the output of a sub-layer."""
            y = Dropout(config.rate("mlp_out_dropout" if name == "mlp" else "attention_out_dropout"))(y)
            if config.norm_place in ("sandwich", "out"):
                y = norm(f"{name}_out")(y)
            return y if config.residual_scale == 1 else y * config.residual_scale

        def residual(x: jax.Array, name: str, sublayer: Callable[[jax.Array], jax.Array]) -> jax.Array:
            if name == "attention" and not config.mixer_residual:
                dropout = Dropout(config.rate("attention_out_dropout"))
                return self.constrain(dropout(sublayer(x)), ("batch", "between", None))
            x = x + after(sublayer(before(x, name)), name)
            return self.constrain(norm(name)(x) if config.norm_place == "post" else x, ("batch", "between", None))

        def attend(
            name: str, inputs: AttentionInputs, context: Any, cache: Cache | None
        ) -> Callable[[jax.Array], jax.Array]:
            cross = name == "cross_attention"
            mixer = Attention if cross else lookup(MIXERS, own_mixer, "mixer")
            module_name = name if cross else mixer_name(config, own_mixer)

            def sublayer(x: jax.Array) -> jax.Array:
                attention = mixer(**parts, kernel=self.kernel, name=module_name)
                x, caches[name], weights[name] = attention(x, layer, inputs, positions_BT, context, cache, self.weights)
                return x

            return sublayer

        losses: dict[str, jax.Array] = {}
        if tokens_BT is None:
            tokens_BT = jnp.ones(x_BTD.shape[:2], bool)

        def feed_forward(x: jax.Array) -> jax.Array:
            kind = lookup(FEED_FORWARDS, own_feed_forward, "feed_forward")
            mlp = kind(**parts, name=feed_forward_name(config, own_feed_forward))
            x, auxiliary = mlp(x, tokens_BT)
            losses.update(auxiliary)
            return x

        own_attention = attend("attention", inputs, None, cache)
        if config.residual == "sequential":
            x_BTD = residual(x_BTD, "attention", own_attention)
            if context is not None:
                assert context_inputs is not None
                x_BTD = residual(x_BTD, "cross_attention", attend("cross_attention", context_inputs, context, None))
            if own_feed_forward != "none":
                x_BTD = residual(x_BTD, "mlp", feed_forward)
        else:
            read_BTD = before(x_BTD, "attention")
            attended_BTD = after(own_attention(read_BTD), "attention")
            if config.residual == "parallel":
                read_BTD = before(x_BTD, "mlp")
            x_BTD = x_BTD + attended_BTD + after(feed_forward(read_BTD), "mlp")
            x_BTD = self.constrain(x_BTD, ("batch", "between", None))
        return (
            x_BTD,
            (caches["attention"], caches["cross_attention"]),
            LayerOutputs(weights["attention"], weights["cross_attention"], losses, {}),
        )
