"""What is read off the last hidden states.  A head takes hidden states at the positions that its task needs."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.devices.sharding import Placement
from jaxlm.nn.layers import ACTIVATIONS, Dropout, Linear, Norm, initial
from jaxlm.nn.nodes import array


class Vocabulary(nn.Module):
    """Logits [B, T, V] or [B, V] over the vocabulary, float32: by the token embedding where it is tied, else by its own
    kernel."""

    config: ModelConfig
    constrain: Placement
    bias: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array, embedding_VD: jax.Array) -> jax.Array:
        config, V = self.config, len(embedding_VD)
        if config.tied_embeddings:
            kernel_VD = embedding_VD
        else:
            kernel_VD = array(self, "kernel", initial(config, x_BTD.shape[-1]), (V, x_BTD.shape[-1]))
        logits_BTV = jnp.einsum(
            "...D,VD->...V",
            x_BTD.astype(self.dtype),
            kernel_VD.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        if self.bias:
            logits_BTV += array(self, "bias", nn.initializers.zeros, (V,))
        return self.constrain(logits_BTV, ("batch", *("length",) * (logits_BTV.ndim - 2), "vocabulary"))


def _transform(config: ModelConfig, x_BTD: jax.Array, width: int, dtype: Any) -> jax.Array:
    """A projection to `width`, activation and norm (Devlin et al. 2019): parts of the module that calls."""
    bias = "transform" in config.biases
    x_BTD = Linear((width,), config.matrix_std, bias, dtype=dtype, name="transform")(x_BTD)
    return Norm(config, dtype, name="norm")(ACTIVATIONS[config.transform_activation or config.activation](x_BTD))


class Transform(nn.Module):
    """The transform of a model that has one before several heads (ModernBERT)."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return _transform(self.config, x_BTD, self.config.width, self.dtype)


class MaskedLM(nn.Module):
    """BERT's masked language model head: a transform, unless the model shares one, then the vocabulary."""

    config: ModelConfig
    constrain: Placement
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array, embedding_VW: jax.Array) -> jax.Array:
        if not self.config.shared_transform:
            x_BTD = _transform(self.config, x_BTD, self.config.W, self.dtype)
        vocabulary = Vocabulary(self.config, self.constrain, bias=True, dtype=self.dtype, name="vocabulary")
        return vocabulary(x_BTD, embedding_VW)


class Pooled(nn.Module):
    """An example's vector [..., D] from the hidden state of its first token: a projection and tanh (BERT)."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BED: jax.Array) -> jax.Array:
        dense = Linear((self.config.width,), self.config.matrix_std, dtype=self.dtype, name="dense")
        return ACTIVATIONS["tanh"](dense(x_BED))


class Classes(nn.Module):
    """Logits [..., N], float32, of an example from the state that stands for it: after a projection and activation
    where the model has them."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BED: jax.Array) -> jax.Array:
        config = self.config
        dropout = Dropout(config.rate("classes_dropout"), name="dropout")
        if config.classes_activation is not None:
            x_BED = Dropout(config.rate("classes_input_dropout"), name="input_dropout")(x_BED)
            dense = Linear((config.width,), config.matrix_std, dtype=self.dtype, name="dense")
            x_BED = ACTIVATIONS[config.classes_activation](dense(x_BED))
        bias = "classes" in config.biases
        out = Linear((len(config.labels),), config.matrix_std, bias, dtype=self.dtype, name="out")
        return out(dropout(x_BED)).astype(jnp.float32)


class PerToken(nn.Module):
    """Logits [..., n], float32, of each token."""

    config: ModelConfig
    outputs: int
    rate: float  # of dropout
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = Dropout(self.rate, name="dropout")(x_BTD)
        return Linear((self.outputs,), self.config.matrix_std, dtype=self.dtype, name="out")(x_BTD).astype(jnp.float32)


class Replaced(nn.Module):
    """Logits [...], float32, that a token was replaced: ELECTRA's discriminator (Clark et al. 2020)."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config = self.config
        x_BTD = Linear((config.width,), config.matrix_std, dtype=self.dtype, name="dense")(x_BTD)
        out = Linear((1,), config.matrix_std, dtype=self.dtype, name="out")
        return out(ACTIVATIONS[config.activation](x_BTD))[..., 0].astype(jnp.float32)
