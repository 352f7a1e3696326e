"""The vectors of the tokens of a tokenizer, as initial embeddings of a model."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.vectors.word_vectors import WordVectors

TABLE = "embeddings/tokens"  # path of the embeddings in the parameters of a model


class TokenVectors(NamedTuple):
    """Vectors for some rows of the embeddings of a model."""

    ids_N: np.ndarray  # int32, the rows
    vectors_ND: np.ndarray  # float32
    tokens: int  # number of tokens that are whole words

    @property
    def summary(self) -> str:
        """The number of tokens with a vector, for printing."""
        return f"{len(self.ids_N):,} of {self.tokens:,} tokens that are whole words have a vector"

    def write(self, table_VD: jax.Array) -> jax.Array:
        """Returns the embeddings with these rows, with the same sharding; the buffer of the old ones is donated."""
        set_rows = lambda table_VD, ids_N, rows_ND: table_VD.at[ids_N].set(rows_ND)
        write = jax.jit(set_rows, donate_argnums=0, out_shardings=table_VD.sharding)
        return write(table_VD, jnp.asarray(self.ids_N), jnp.asarray(self.vectors_ND, table_VD.dtype))


def vectors_of_tokens(vectors: WordVectors, tokenizer: Tokenizer, model: ModelConfig, file: str) -> TokenVectors:
    """Returns the vectors of the tokens that are whole words.

    The word of a token is its text without the mark of the start of a word. A word without a vector has the vector of
    its lower-case form. Special tokens, and tokens that continue a word, have none.

    Args:
      vectors: the vectors.
      tokenizer: the tokenizer of the model.
      model: the config of the model.
      file: the name of the file of the vectors, for error messages.

    Raises:
      UserError: where the vectors have another width than the embeddings of the model, or no token has a vector.
    """
    if model.front_end != "tokens":
        raise UserError(f"embeddings is {file}, but the model reads {model.front_end}, not tokens; leave it out")
    if vectors.width != model.W:
        field = "width" if model.embedding_width is None else "embedding-width"
        raise UserError(
            f"the vectors in {file} have the width {vectors.width:,}, but the embeddings of the model have "
            f"{model.W:,}; set --model.{field} {vectors.width}, or give vectors of the width {model.W:,}"
        )
    words = tokenizer.whole_words
    ids, rows = [], []
    for token, word in words.items():
        found = next((form for form in (word, word.lower()) if form in vectors), None)
        if found is not None and token < model.vocabulary:
            ids.append(token)
            rows.append(vectors[found])
    if not ids:
        raise UserError(
            f"none of the {len(words):,} tokens that are whole words has a vector in {file}, whose first words are "
            f"{', '.join(map(repr, vectors.words[:3]))}; give vectors of the same language, or train a tokenizer with "
            f"more whole words (--tokenizer.train wordpiece)"
        )
    return TokenVectors(np.array(ids, np.int32), np.stack(rows), len(words))
