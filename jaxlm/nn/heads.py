"""Heads: outputs computed from the last hidden states at the positions that a task needs."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.devices.sharding import Placement
from jaxlm.nn.crf import Transitions
from jaxlm.nn.layers import ACTIVATIONS, Dropout, Linear, Norm, float32_einsum, initial
from jaxlm.nn.nodes import array, dense


class VocabularyHead(nn.Module):
    """Float32 logits [B, T, V] or [B, V], from the token embeddings if they are tied, else from a separate kernel."""

    config: ModelConfig
    constrain: Placement
    bias: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array, embedding_VD: jax.Array) -> jax.Array:
        config, kernel_VD = self.config, dense(embedding_VD)
        V = len(kernel_VD)
        if not config.tied_embeddings:
            kernel_VD = array(self, "kernel", initial(config, x_BTD.shape[-1]), (V, x_BTD.shape[-1]))
        axes = "BT"[: x_BTD.ndim - 1]
        logits_BTV = float32_einsum(f"{axes}D,VD->{axes}V", x_BTD.astype(self.dtype), kernel_VD)
        if self.bias:
            logits_BTV += array(self, "bias", nn.initializers.zeros, (V,))
        return self.constrain(logits_BTV, ("batch", *("length",) * (logits_BTV.ndim - 2), "vocabulary"))


def _transform(config: ModelConfig, x_BTD: jax.Array, width: int, dtype: Any) -> jax.Array:
    """Applies a projection to `width`, activation and norm (Devlin et al. 2019), as submodules of the caller."""
    bias = "transform" in config.biases
    x_BTD = Linear((width,), config.matrix_std, bias, dtype=dtype, name="transform")(x_BTD)
    return Norm(config, dtype, name="norm")(ACTIVATIONS[config.transform_activation or config.activation](x_BTD))


class Transform(nn.Module):
    """A transform that several heads share (ModernBERT)."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return _transform(self.config, x_BTD, self.config.width, self.dtype)


class MaskedLMHead(nn.Module):
    """BERT's masked language model head: a transform, unless heads share one, then logits over the vocabulary."""

    config: ModelConfig
    constrain: Placement
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array, embedding_VW: jax.Array) -> jax.Array:
        if not self.config.shared_transform:
            x_BTD = _transform(self.config, x_BTD, self.config.W, self.dtype)
        bias = self.config.masked_lm_bias
        vocabulary = VocabularyHead(self.config, self.constrain, bias, self.dtype, name="vocabulary")
        return vocabulary(x_BTD, embedding_VW)


class PooledHead(nn.Module):
    """A vector [..., D] for each example, from the hidden state of its first token: a projection and tanh (BERT)."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BED: jax.Array) -> jax.Array:
        dense = Linear((self.config.width,), self.config.matrix_std, dtype=self.dtype, name="dense")
        return ACTIVATIONS["tanh"](dense(x_BED))


class ClassesHead(nn.Module):
    """Float32 logits [..., N] for each example, from one hidden state; some models first apply a dense layer."""

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


class PerTokenHead(nn.Module):
    """Float32 logits [..., outputs] for each token."""

    config: ModelConfig
    outputs: int
    rate: float  # dropout rate
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = Dropout(self.rate, name="dropout")(x_BTD)
        return Linear((self.outputs,), self.config.matrix_std, dtype=self.dtype, name="out")(x_BTD).astype(jnp.float32)


class CRFHead(nn.Module):
    """The scores of neighbouring tags, which a CRF adds to the logits of the head "tokens"."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Transitions:
        N, init = len(self.config.labels), nn.initializers.normal(self.config.initial_std)
        shapes = {"start": (N,), "end": (N,), "pairs": (N, N)}
        return Transitions(*(array(self, name, init, shape) for name, shape in shapes.items()))


class ReplacedHead(nn.Module):
    """Float32 logits [...]: whether a token was replaced, as in ELECTRA's discriminator (Clark et al. 2020)."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config = self.config
        x_BTD = Linear((config.width,), config.matrix_std, dtype=self.dtype, name="dense")(x_BTD)
        out = Linear((1,), config.matrix_std, dtype=self.dtype, name="out")
        return out(ACTIVATIONS[config.activation](x_BTD))[..., 0].astype(jnp.float32)
