"""What is read off the last hidden states.  A head takes hidden states at the positions that its task needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.nn.layers import ACTIVATIONS, Linear, Norm


class Vocabulary(nn.Module):
    """Logits over the vocabulary, float32: by the token embedding where it is tied, else by a kernel of its own."""

    config: ModelConfig
    constrain: Callable
    bias: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array, embedding_VD: jax.Array) -> jax.Array:
        config = self.config
        if config.tied_embeddings:
            kernel_VD = embedding_VD
        else:
            init = nn.initializers.normal(config.initial_std)
            kernel_VD = self.param("kernel", init, (config.vocabulary, config.width), jnp.float32)
        logits_BTV = jnp.einsum(
            "...D,VD->...V",
            x_BTD.astype(self.dtype),
            kernel_VD.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        if self.bias:
            logits_BTV += self.param("bias", nn.initializers.zeros, (config.vocabulary,), jnp.float32)
        return self.constrain(logits_BTV, ("batch", "length", "vocabulary"))


class MaskedLM(nn.Module):
    """BERT's masked language model head: a transform before the vocabulary (Devlin et al. 2019)."""

    config: ModelConfig
    constrain: Callable
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array, embedding_VD: jax.Array) -> jax.Array:
        config = self.config
        x_BTD = Linear((config.width,), config.initial_std, dtype=self.dtype, name="transform")(x_BTD)
        x_BTD = Norm(config, self.dtype, name="norm")(ACTIVATIONS[config.activation](x_BTD))
        vocabulary = Vocabulary(config, self.constrain, bias=True, dtype=self.dtype, name="vocabulary")
        return vocabulary(x_BTD, embedding_VD)


class Pooled(nn.Module):
    """An example's vector [..., D] from the hidden state of its first token: a projection and tanh (BERT)."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BED: jax.Array) -> jax.Array:
        return jnp.tanh(Linear((self.config.width,), self.config.initial_std, dtype=self.dtype, name="dense")(x_BED))
