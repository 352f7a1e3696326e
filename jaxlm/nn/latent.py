"""Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values are projections of a narrow vector.

The cache stores this latent vector and one rotated key for all heads, instead of the keys and values of each head.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.nn import nodes
from jaxlm.nn.attention import Attention, AttentionInputs
from jaxlm.nn.cache import Cache, create
from jaxlm.nn.dot_product import Scores, attend
from jaxlm.nn.layers import Dropout, Linear, Norm, float32_einsum, query_std, residual_std
from jaxlm.nn.positions import rotate
from jaxlm.nn.windows import Heads

EPSILON = 1e-6  # of the norms of latent vectors, in all published models


class LatentAttention(Attention):
    """Self-attention whose keys and values are projections of a latent vector of `key_value_rank` entries.

    The first `rotary_width` entries of each query are rotated. Those of the keys are the same for all heads. The other
    entries of the keys, and the values, are projected from the normalised latent vector.

    With a cache, queries are multiplied by the projection of the keys, and sums of latent vectors by that of the
    values, so that no keys and values of earlier tokens are computed. All query heads then share one key-value head.
    """

    @classmethod
    def entries(cls, config: ModelConfig, causal: bool) -> int:
        """Returns the number of entries of the matrices that multiply each token."""
        D, H, C, rank, V = config.width, config.heads, config.C, config.key_value_rank, config.value_C
        query = H * C * D if config.query_rank is None else config.query_rank * (D + H * C)
        return query + D * (rank + config.R) + rank * H * (C - config.R + V) + H * V * D

    @classmethod
    def products(cls, config: ModelConfig, T: int, pairs: int) -> int:
        """Returns the products between queries and keys, and weights and values, for this number of pairs."""
        return config.heads * (config.C + config.value_C) * pairs

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
        """Returns the output, the cache and the attention weights; the arguments are those of `Attention`."""
        config, R = self.config, self.config.R
        linear = partial(Linear, bias=False, dtype=self.dtype)
        down = lambda name, width: linear((width,), config.matrix_std, name=name)(x_BTD)
        turn = lambda x_BTHC: x_BTHC if inputs.rotary is None else rotate(x_BTHC, inputs.rotary)
        q_BTHC = turn(self._query(x_BTD))
        q_BTHC = self.constrain(q_BTHC, ("batch", "length", "heads", "head_width"))
        latent_BS1L = self._norm("key_norm")(down("key_value_down", config.key_value_rank))[:, :, None]
        key_BS1R = turn(down("rotary_key", R)[:, :, None])
        scale = 1 / math.sqrt(config.C) if config.attention_scale is None else config.attention_scale
        scores, dropout = Scores(scale, config.attention_cap), Dropout(config.attention_dropout, name="dropout")
        weights_BHTS = None
        if cache is not None:
            cache = cache.write(key_BS1R, latent_BS1L, positions_BT)
            out_BTHC, weights_BHTS = self._attend_to_cache(q_BTHC, cache, inputs, scores)
        else:
            heads = lambda name, width: linear((config.heads, width), config.matrix_std, name=name)
            v_BSHC = heads("value", config.value_C)(latent_BS1L[:, :, 0])
            k_BSHN = heads("key", config.C - R)(latent_BS1L[:, :, 0])
            k_BSHC = jnp.concatenate([jnp.broadcast_to(key_BS1R, (*k_BSHN.shape[:3], R)), k_BSHN], -1)
            k_BSHC, v_BSHC = (self.constrain(x, ("batch", "keys", "kv_heads", "head_width")) for x in (k_BSHC, v_BSHC))
            if weights:
                kv = create(k_BSHC, v_BSHC)
                out_BTHC, weights_BHTS = attend(q_BTHC, kv, inputs.mask_BTS, scores, dropout)
            else:
                out_BTHC = self._attend_rows(Heads(q_BTHC, k_BSHC, v_BSHC), None, inputs, scores, dropout)
        if inputs.slot_positions_BS is not None:
            select = partial(jnp.take_along_axis, indices=inputs.slot_positions_BS[..., None, None], axis=1)
            cache = create(select(key_BS1R), select(latent_BS1L), inputs.cache_format)
        out = linear((config.width,), residual_std(config), contract=2, name="out")
        return out(out_BTHC), cache, weights_BHTS if weights else None

    def _query(self, x_BTD: jax.Array) -> jax.Array:
        config = self.config
        linear = partial(Linear, bias=False, dtype=self.dtype)
        if config.query_rank is not None:
            x_BTD = linear((config.query_rank,), config.matrix_std, name="query_down")(x_BTD)
            x_BTD = self._norm("query_norm")(x_BTD)
        return linear((config.heads, config.C), query_std(config), name="query")(x_BTD)

    def _norm(self, name: str) -> Norm:
        return Norm(dataclasses.replace(self.config, norm_epsilon=EPSILON), self.dtype, name=name)

    def _attend_to_cache(
        self, q_BTHC: jax.Array, cache: Cache, inputs: AttentionInputs, scores: Scores
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the attended values and the weights, from the latent vectors and the rotated keys of a cache."""
        matrix = lambda name: nodes.dense(self.variables["params"][name]["kernel"]).astype(self.dtype)
        q_BTHR, q_BTHN = jnp.split(q_BTHC, [self.config.R], -1)
        bias_BHTS = scores.scale * float32_einsum("BTHR,BSR->BHTS", q_BTHR, cache.k_BKSC[:, 0].astype(self.dtype))
        if cache.k_scales_BKS is not None:
            bias_BHTS *= cache.k_scales_BKS[:, :, None]
        q_BTHL = float32_einsum("BTHN,LHN->BTHL", q_BTHN, matrix("key")).astype(self.dtype)
        latent = Cache(cache.v_BKSC, cache.v_BKSC, cache.v_scales_BKS, cache.v_scales_BKS)
        keep = lambda weights: weights  # dropout is for training, which has no cache
        out_BTHL, weights = attend(q_BTHL, latent, inputs.mask_BTS, scores._replace(bias_BHTS=bias_BHTS), keep)
        return float32_einsum("BTHL,LHC->BTHC", out_BTHL, matrix("value")).astype(self.dtype), weights
