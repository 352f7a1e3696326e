"""Relations between the tokens of an example by their queries, keys or values (MiniLM v2, Wang et al. 2021)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.nn.layers import Linear, Norm, float32_einsum
from jaxlm.nn.losses import Sum, divergence


def query_key_value(
    config: ModelConfig, stack: Any, x_BTD: jax.Array, layer: int, layers: int, dtype: Any
) -> tuple[jax.Array, ...]:
    """Returns the queries, keys and values of a layer, each [B, T, heads, C], before rotation.

    Args:
      config: the config of the stack.
      stack: the parameters of the stack.
      x_BTD: the hidden states that the layer reads.
      layer: index of the layer, from 0.
      layers: number of layers of the stack, which may share parameters.
      dtype: dtype of the products.
    """
    # All layers have attention and its norm.
    stacked = {name: part for name, part in stack["layers"].items() if name in ("attention", "attention_norm")}
    row = int(layer * len(jax.tree.leaves(stacked)[0]) / layers)
    params = jax.tree.map(lambda leaf: leaf[row], stacked)
    if config.norm_place in ("pre", "sandwich") and (config.first_norm or layer > 0):
        x_BTD = _apply(Norm(config, dtype), params["attention_norm"], x_BTD)
    biased = "query_key_value" in config.biases
    heads = {"query": config.heads, "key": config.K, "value": config.K}
    linear = lambda n: Linear((n, config.C), config.matrix_std, biased, dtype=dtype)
    return tuple(_apply(linear(n), params["attention"][name], x_BTD) for name, n in heads.items())


def _apply(module: nn.Module, params: Any, x: jax.Array) -> jax.Array:
    y: Any = module.apply({"params": params}, x)
    return y


def relation_divergence(
    vectors: tuple[jax.Array, ...], teacher_vectors: tuple[jax.Array, ...], segments_BT: jax.Array, heads: int
) -> Sum:
    """Returns the divergence of relations of queries, of keys and of values, in their mean, summed over the tokens.

    A relation of a token is the softmax, over the tokens of its example, of the scaled products of their vectors. All
    vectors of a token are divided into relation heads again, so that the numbers of attention heads may differ.

    Source: Wang et al. 2021, equations 4 to 6.

    Args:
      vectors: queries, keys and values of the student, each [B, T, heads, C].
      teacher_vectors: those of the teacher.
      segments_BT: number of each token's example; 0 for padding.
      heads: number of relation heads R, which divides the width of all vectors.
    """
    weights_BT = (segments_BT > 0).astype(jnp.float32)
    same_BTS = (segments_BT[:, :, None] == segments_BT[:, None]) & (segments_BT[:, None] > 0)

    def logits(x_BTHC: jax.Array) -> jax.Array:
        x_BTRC = x_BTHC.reshape(*x_BTHC.shape[:2], heads, -1)
        scores_BRTS = float32_einsum("BTRC,BSRC->BRTS", x_BTRC, x_BTRC) * x_BTRC.shape[-1] ** -0.5
        return jnp.where(same_BTS[:, None], scores_BRTS, -1e30)

    share_BRT = jnp.broadcast_to(weights_BT[:, None] / (3 * heads), (len(weights_BT), heads, weights_BT.shape[1]))
    totals = [divergence(logits(x), logits(y), share_BRT)[0] for x, y in zip(vectors, teacher_vectors, strict=True)]
    return sum(totals, jnp.float32(0)), weights_BT.sum()
