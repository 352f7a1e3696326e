"""The layer of self-attention or cross-attention: projections, positions, cache, and the choice of a kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.devices.sharding import Placement
from jaxlm.nn import windows
from jaxlm.nn.cache import Cache, create
from jaxlm.nn.dot_product import Scores, WeightDropout, attend, dot_product_attention
from jaxlm.nn.kernels import backend_of, choose, fused
from jaxlm.nn.layers import Dropout, Linear, Norm, float32_einsum, query_std, residual_std
from jaxlm.nn.nodes import array
from jaxlm.nn.positions import Distances, Offsets, RotaryAngles, rotate
from jaxlm.nn.windows import Heads, windowed_attention


class AttentionInputs(NamedTuple):
    """Masks and positions of attention, shared by all layers of a kind.

    Attributes:
      mask_BTS: True where query t attends to key s; B may be 1.
      causal: whether the mask hides later positions of the row.
      segments: segments of queries and keys, if they, `causal` and `window` fully define the mask; else None. Segments
        that are None themselves mean that each row is one example.
      window: the width of local attention; None for global attention.
      rotary: rotary angles of the queries and keys; B may be 1.
      bias_BHTS: T5's relative positions, or ALiBi; B may be 1, and so may T.
      distances: DeBERTa's relative positions.
      offsets: Transformer-XL's relative positions.
      slot_positions_BS: the position to store in each slot of a new cache; B may be 1. None: no cache is created.
      cache_rotary: rotary angles of the slots of the cache, if the angles depend on the length of the sequence. The
        cache then stores keys before rotation, and they are rotated when they are read.
      cache_format: how a new cache stores keys and values, a value of `Decoding.cache`.
      global_BT: True for tokens with global attention, as in `mask_BTS`; B may be 1. None: there are none.
    """

    mask_BTS: jax.Array
    causal: bool = False
    segments: tuple[jax.Array | None, jax.Array | None] | None = None
    window: int | None = None
    rotary: RotaryAngles | None = None
    bias_BHTS: jax.Array | None = None
    distances: Distances | None = None
    offsets: Offsets | None = None
    slot_positions_BS: jax.Array | None = None
    cache_rotary: RotaryAngles | None = None
    cache_format: str = "compute"
    global_BT: jax.Array | None = None


def _rotate_cache(cache: Cache, inputs: AttentionInputs, dtype: Any) -> Cache:
    """Returns the cache with rotated keys, in this dtype if it has scales, which rotation does not change."""
    if inputs.cache_rotary is None:
        return cache
    k_BKSC = cache.k_BKSC if cache.k_scales_BKS is None else cache.k_BKSC.astype(dtype)
    k_BSKC = rotate(k_BKSC.transpose(0, 2, 1, 3), inputs.cache_rotary)
    return cache._replace(k_BKSC=k_BSKC.transpose(0, 2, 1, 3))


class Attention(nn.Module):
    """Multi-head self-attention, or cross-attention over `context`."""

    config: ModelConfig
    constrain: Placement
    dtype: Any = jnp.float32
    kernel: str = "auto"  # auto, xla, splash, cudnn or triton: see `kernels`

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
    ) -> tuple[jax.Array, Cache | None, jax.Array | None]:
        """Returns the output of attention, the cache, and the attention weights.

        Args:
          x_BTD: hidden states.
          layer: index of the layer, from 0.
          inputs: masks and positions.
          positions_BT: position of each token in its example.
          context: for cross-attention, hidden states of the context [B, S, D], or their cached keys and values.
          cache: keys and values of earlier tokens; those of this call are written before attention reads it.
          weights: whether to return the attention weights.

        Returns:
          The output [B, T, D]; the updated or new cache, or None; the weights [B, H, T, S], or None.
        """
        config = self.config
        biased = "query_key_value" in config.biases
        into = lambda name, n, std: Linear((n, config.C), std, biased, dtype=self.dtype, name=name)
        heads = partial(into, std=config.matrix_std)
        query = into("query", config.heads, query_std(config))
        key, value = heads("key", config.K), heads("value", config.K)
        q_BTHC = query(x_BTD)
        if config.query_key_norm:
            q_BTHC = self._normalise(q_BTHC, "query_norm")
        if inputs.rotary is not None:
            q_BTHC = rotate(q_BTHC, inputs.rotary)
        if config.scale_by_layer:
            q_BTHC = (q_BTHC / (jnp.asarray(layer, jnp.float32) + 1)).astype(q_BTHC.dtype)
        q_BTHC = self.constrain(q_BTHC, ("batch", "length", "heads", "head_width"))
        if isinstance(context, Cache):
            cache = context
            if context.k_scales_BKS is not None:
                # Without a dependency on the queries, XLA converts the cache to floats before a loop, and stores these.
                cache, q_BTHC = jax.lax.optimization_barrier((context, q_BTHC))
        else:
            context_BSD = x_BTD if context is None else context
            if inputs.offsets is not None:
                context_BSD = inputs.offsets.context(context_BSD)
            k_BSKC, v_BSKC = key(context_BSD), value(context_BSD)
            if config.query_key_norm:
                k_BSKC = self._normalise(k_BSKC, "key_norm")
            unrotated_BSKC = k_BSKC
            if inputs.rotary is not None:
                k_BSKC = rotate(k_BSKC, inputs.rotary)
            k_BSKC = self.constrain(k_BSKC, ("batch", "keys", "kv_heads", "head_width"))
            v_BSKC = self.constrain(v_BSKC, ("batch", "keys", "kv_heads", "head_width"))
            if cache is not None:
                rotate_late = inputs.cache_rotary is not None
                cache = cache.write(unrotated_BSKC if rotate_late else k_BSKC, v_BSKC, positions_BT)
        scale = 1 / math.sqrt(config.C) if config.attention_scale is None else config.attention_scale
        bias_BHTS = inputs.bias_BHTS
        if inputs.distances is not None and config.relative_terms:
            scale = 1 / math.sqrt(config.C * (1 + len(config.relative_terms)))
            if not config.relative_shared:
                query = heads("relative_query", config.heads) if "p2c" in config.relative_terms else query
                key = heads("relative_key", config.K) if "c2p" in config.relative_terms else key
            bias_BHTS = scale * self._disentangled(q_BTHC, k_BSKC, inputs.distances, query, key)
        if inputs.offsets is not None:
            q_BTHC, bias_BHTS = self._with_offsets(q_BTHC, inputs.offsets, heads("relative_key", config.heads))
            bias_BHTS *= scale
        sinks_H = None
        if config.attention_sinks:
            sinks_H = array(self, "sinks", nn.initializers.normal(config.initial_std), (config.heads,))
        scores = Scores(scale, config.attention_cap, bias_BHTS, sinks_H)
        dropout = Dropout(config.attention_dropout, name="dropout")
        weights_BHTS = None
        if cache is not None:
            kv = _rotate_cache(cache, inputs, q_BTHC.dtype)
            out_BTHC, weights_BHTS = attend(q_BTHC, kv, inputs.mask_BTS, scores, dropout)
        else:
            rows = Heads(q_BTHC, k_BSKC, v_BSKC)
            of_global = self._global_heads(x_BTD, inputs, heads) if config.global_attention else None
            if weights:
                out_BTHC, weights_BHTS = self._attend_with_weights(rows, of_global, inputs, scores, dropout)
            else:
                out_BTHC = self._attend_rows(rows, of_global, inputs, scores, dropout)
        if inputs.slot_positions_BS is not None:
            select = lambda x_BSKC: jnp.take_along_axis(x_BSKC, inputs.slot_positions_BS[..., None, None], 1)
            keys_BSKC = k_BSKC if inputs.cache_rotary is None else unrotated_BSKC
            cache = create(select(keys_BSKC), select(v_BSKC), inputs.cache_format)
        if config.attention_gate:
            gate_BTHC = jax.nn.sigmoid(heads("gate", config.heads)(x_BTD).astype(jnp.float32))
            out_BTHC = (out_BTHC * gate_BTHC).astype(out_BTHC.dtype)
        biased = "out" in config.biases
        out = Linear((config.width,), residual_std(config), biased, contract=2, dtype=self.dtype, name="out")
        return out(out_BTHC), cache, weights_BHTS if weights else None

    def _normalise(self, x_BTHC: jax.Array, name: str) -> jax.Array:
        """Returns normalised queries or keys, each head separately or all together."""
        whole = self.config.query_key_norm_whole
        x = x_BTHC.reshape(*x_BTHC.shape[:2], -1) if whole else x_BTHC
        return Norm(self.config, self.dtype, name=name)(x).reshape(x_BTHC.shape)

    def _global_heads(self, x_BTD: jax.Array, inputs: AttentionInputs, heads: Callable) -> Heads | None:
        """Returns the queries of global tokens, and the keys and values for them; None if there are no such tokens."""
        if inputs.global_BT is None and not self.is_initializing():
            return None
        counts = {"query": self.config.heads, "key": self.config.K, "value": self.config.K}
        projected = {name: heads(f"global_{name}", count)(x_BTD) for name, count in counts.items()}
        if inputs.rotary is not None:
            projected |= {name: rotate(projected[name], inputs.rotary) for name in ("query", "key")}
        axes = ("length", "heads"), ("keys", "kv_heads"), ("keys", "kv_heads")
        places = (("batch", *some, "head_width") for some in axes)
        of_global = Heads(*(self.constrain(x, where) for x, where in zip(projected.values(), places)))
        return None if inputs.global_BT is None else of_global

    def _attend_with_weights(
        self, rows: Heads, of_global: Heads | None, inputs: AttentionInputs, scores: Scores, dropout: Dropout
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the attended values of rows without a cache, and the weights [B, H, T, S]."""
        attend_all = lambda some: attend(some[0], create(*some[1:]), inputs.mask_BTS, scores, dropout)
        out_BTHC, weights_BHTS = attend_all(rows)
        if of_global is None or inputs.global_BT is None:
            return out_BTHC, weights_BHTS
        out_of_global_BTHC, of_global_BHTS = attend_all(of_global)
        weights_BHTS = jnp.where(inputs.global_BT[:, None, :, None], of_global_BHTS, weights_BHTS)
        return jnp.where(inputs.global_BT[..., None, None], out_of_global_BTHC, out_BTHC), weights_BHTS

    def _attend_rows(
        self, rows: Heads, of_global: Heads | None, inputs: AttentionInputs, scores: Scores, dropout: Dropout
    ) -> jax.Array:
        """Returns the attended values of rows without a cache, from the fastest kernel that supports them."""
        mesh, (q_BTHC, k_BSKC, v_BSKC) = self.constrain.mesh, rows
        features = {"cap": scores.cap, "bias": scores.bias_BHTS is not None, "prefix": inputs.segments is None}
        features |= {"window": inputs.window is not None, "global_tokens": of_global is not None}
        features["sinks"] = scores.sinks_H is not None
        drops = bool(dropout.bytes and self.has_rng("dropout"))
        kernel = choose(backend_of(mesh), mesh, q_BTHC, k_BSKC, wanted=self.kernel, dropout=drops, **features)
        if kernel == "xla" and self._has_blocks(rows, inputs, scores):
            return self._attend_windows(rows, of_global, inputs, scores, dropout)
        if kernel == "xla":
            # With a sharded length, each block of queries would be on only some of the devices.
            blocks = inputs.causal and self.constrain.ways("length") == 1
            attend_all = partial(dot_product_attention, scores=scores, dropout=dropout, causal=blocks)
            out_BTHC = attend_all(*rows, inputs.mask_BTS)
            if of_global is None or inputs.global_BT is None:
                return out_BTHC
            return jnp.where(inputs.global_BT[..., None, None], attend_all(*of_global, inputs.mask_BTS), out_BTHC)
        assert inputs.segments is not None
        width = v_BSKC.shape[-1]
        if width < q_BTHC.shape[-1]:  # the kernels require values as wide as keys
            v_BSKC = jnp.pad(v_BSKC, [(0, 0)] * 3 + [(0, q_BTHC.shape[-1] - width)])
        qkv_and_segments = q_BTHC, k_BSKC, v_BSKC, *inputs.segments
        return fused(
            kernel,
            mesh,
            *qkv_and_segments,
            causal=inputs.causal,
            window=inputs.window,
            scale=scores.scale,
            cap=scores.cap,
        )[..., :width]

    def _has_blocks(self, rows: Heads, inputs: AttentionInputs, scores: Scores) -> bool:
        """Returns whether local attention in blocks supports the rows and saves memory."""
        if inputs.window is None or inputs.segments is None or inputs.causal or scores.bias_BHTS is not None:
            return False
        if scores.sinks_H is not None or rows.v_BTKC.shape[-1] != rows.q_BTHC.shape[-1]:
            return False
        return self.constrain.ways("length") == 1 and windows.saves_memory(rows.q_BTHC.shape[1], inputs.window)

    def _attend_windows(
        self, rows: Heads, of_global: Heads | None, inputs: AttentionInputs, scores: Scores, dropout: Dropout
    ) -> jax.Array:
        """Returns the values of local attention in blocks."""
        of_weights = WeightDropout()
        if dropout.bytes and self.has_rng("dropout"):
            of_weights = WeightDropout(self.make_rng("dropout"), dropout.bytes)
        assert inputs.segments is not None and inputs.window is not None
        segments_BT = inputs.segments[0]
        if segments_BT is None:
            segments_BT = jnp.ones(rows.q_BTHC.shape[:2], jnp.int32)
        places = segments_BT, inputs.window, inputs.global_BT
        return windowed_attention(rows, of_global, *places, scores, of_weights, windows.slots_of(self.config))

    def _with_offsets(self, q_BTHC: jax.Array, offsets: Offsets, key: Callable) -> tuple[jax.Array, jax.Array]:
        """Returns the queries for the keys, and the bias for relative positions and types [B, H, T, S], unscaled.

        Source: Dai et al. 2019, section 3.3; for types, Yang et al. 2019, section 2.5.
        """
        config, init = self.config, nn.initializers.normal(self.config.initial_std)
        shape = config.heads, config.C
        with_bias = lambda name: q_BTHC + array(self, f"{name}_bias", init, shape).astype(q_BTHC.dtype)
        key_RHC = key(offsets.embeddings_RD)
        bias_BHTS = offsets.select(float32_einsum("BTHC,RHC->BHTR", with_bias("position"), key_RHC))
        if config.types_in == "attention":
            types_NHC = array(self, "types", init, (2, *shape))  # for equal and for different types
            scores_BHTN = float32_einsum("BTHC,NHC->BHTN", with_bias("type"), types_NHC.astype(q_BTHC.dtype))
            if offsets.differs_BTS is not None:  # else all keys have the same score, which softmax ignores
                same, different = scores_BHTN[..., :1], scores_BHTN[..., 1:]
                bias_BHTS += jnp.where(offsets.differs_BTS[:, None], different, same)
        return with_bias("content"), bias_BHTS

    def _disentangled(
        self, q_BTHC: jax.Array, k_BSHC: jax.Array, distances: Distances, query: Callable, key: Callable
    ) -> jax.Array:
        """Returns DeBERTa's bias for relative positions [B, H, T, S], unscaled (He et al. 2021, equation 4)."""
        embeddings_RD = Dropout(self.config.dropout, name="relative_dropout")(distances.embeddings_RD)
        terms: Any = 0.0
        if "c2p" in self.config.relative_terms:
            scores_BHTR = float32_einsum("BTHC,RHC->BHTR", q_BTHC, key(embeddings_RD))
            terms += jnp.take_along_axis(scores_BHTR, distances.rows_TS[None, None], -1)
        if "p2c" in self.config.relative_terms:
            scores_BHSR = float32_einsum("BSHC,RHC->BHSR", k_BSHC, query(embeddings_RD))
            terms += jnp.take_along_axis(scores_BHSR, distances.rows_TS.T[None, None], -1).swapaxes(-1, -2)
        return terms
