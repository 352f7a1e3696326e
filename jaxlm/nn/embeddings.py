"""Front ends: modules that compute the first hidden states, by default the embeddings of tokens."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.nn.layers import Dropout, Linear, Norm
from jaxlm.nn.nodes import array, parameter, rows
from jaxlm.nn.positions import sinusoidal


class Embeddings(nn.Module):
    """The sum of token, position and type embeddings [B, T, D]; an entry of `FRONT_ENDS`.

    Every entry has the fields `config` and `dtype`, and the class attribute `field`, the name of its input in a batch.
    It is called with that input, positions and types.

    Attributes:
      config: the model's config.
      dtype: dtype of the output.
      shared: whether the caller passes the token embeddings: the decoder of an encoder-decoder may use the encoder's.
      rows: number of token embeddings; None: the size of the vocabulary.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    shared: bool = False
    rows: int | None = None

    field: ClassVar[str] = "tokens_BT"

    @staticmethod
    def blank(config: ModelConfig, B: int, T: int) -> jax.Array:
        """Returns zeros of the shape of `field` in a batch with B rows of T positions."""
        return jnp.zeros((B, T), jnp.int32)

    def setup(self) -> None:
        config, init = self.config, nn.initializers.normal(self.config.initial_std)
        if not self.shared:
            self.tokens = parameter(self, "tokens", init, (self.rows or config.vocabulary, config.W))
        if config.positions == "learned":
            rows = config.position_offset + config.max_length
            self.positions = array(self, "positions", init, (rows, self._sum_width))
        if config.types and config.types_in == "embeddings":
            self.types = array(self, "types", init, (config.types, self._sum_width))
        if config.query_stream:
            self.query = array(self, "query", init, (self._sum_width,))
        if config.embedding_norm:
            self.norm = Norm(config)
        if config.embedding_width is not None:
            self.project = Linear((config.width,), config.matrix_std, not config.project_tokens, dtype=self.dtype)
        self.dropout = Dropout(config.rate("embedding_dropout"))

    @property
    def _sum_width(self) -> int:
        """Width of the sum of the embeddings."""
        return self.config.width if self.config.project_tokens else self.config.W

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        types_BT: jax.Array | None = None,
        tokens_VW: jax.Array | None = None,
    ) -> jax.Array:
        config = self.config
        x_BTW = rows(self.tokens if tokens_VW is None else tokens_VW, tokens_BT)
        if config.scale_embeddings:
            x_BTW *= math.sqrt(config.width)
        if config.embedding_scale != 1:
            x_BTW *= config.embedding_scale
        if config.project_tokens:
            x_BTW = self.project(x_BTW).astype(x_BTW.dtype)
        if config.positions == "learned":
            x_BTW += self.positions[config.position_offset + positions_BT]
        elif config.positions == "sinusoidal":
            x_BTW += sinusoidal(positions_BT, config, self._sum_width)
        if config.types and config.types_in == "embeddings":
            x_BTW += self.types[jnp.zeros_like(tokens_BT) if types_BT is None else types_BT]
        if config.embedding_norm:
            x_BTW = self.norm(x_BTW)
        return self._project(x_BTW)

    def targets(self, B: int, Q: int) -> jax.Array:
        """Returns the first hidden states [B, Q, D] of a query stream, which do not depend on tokens."""
        return self._project(jnp.broadcast_to(self.query, (B, Q, self._sum_width)))

    def _project(self, x_BTW: jax.Array) -> jax.Array:
        x_BTW = self.dropout(x_BTW)
        project_sum = self.config.embedding_width is not None and not self.config.project_tokens
        return (self.project(x_BTW) if project_sum else x_BTW).astype(self.dtype)


FRONT_ENDS: dict[str, Any] = {"tokens": Embeddings}  # by `ModelConfig.front_end`
