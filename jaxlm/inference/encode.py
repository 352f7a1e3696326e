"""Embeddings of texts: the hidden states of packed rows, pooled as the checkpoint declares, in one compiled program.

`jaxlm.hub.pooling` reads the declaration.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config.arguments import check_list, check_model
from jaxlm.config.ranges import check_argument
from jaxlm.data.tokenizers.tokenizer import check_text
from jaxlm.errors import UserError
from jaxlm.hub.pooling import Pooling
from jaxlm.inference.packing import (
    PackedBatch,
    check_batch_tokens,
    chunks,
    inference_params,
    pack_batches,
    run_ahead,
    shard_rows,
)
from jaxlm.lm import LM
from jaxlm.nn.layers import ACTIVATIONS
from jaxlm.nn.transformer import Transformer, apply

MAX_TEXTS = 64  # texts in a row
WINDOW = 1 << 13  # texts that are tokenized and packed together


def encode(
    lm: LM, texts: Iterable[str], *, batch_tokens: int | None = None, normalize: bool | None = None
) -> np.ndarray:
    """Returns the embeddings of N texts, [N, D] float32, in the order of the texts.

    The hidden states are pooled as the checkpoint declares. An encoder without a declaration uses the mean over all
    tokens of a text, special tokens included, without normalisation, as sentence-transformers does. Of an
    encoder-decoder, the encoder is used. Batch sizes and the other texts change an embedding by rounding only.

    Args:
      lm: the model.
      texts: any iterable of strings, read as a stream. A text longer than the declared limit, or the model's limit
        where none is declared, is truncated at its end. A text without tokens has the embedding 0.
      batch_tokens: tokens in a batch, padding included, at least one row; None: 512 for each core on CPU, 16,384 on
        accelerators.
      normalize: whether embeddings are divided by their Euclidean norm; None: as declared.

    Raises:
      UserError: for texts that are not strings, a model without a tokenizer, and a decoder without declared pooling.
    """
    check_model("lm", lm)
    texts = check_list("texts", texts, "strings")
    batch_tokens = check_batch_tokens(batch_tokens)
    normalize = check_argument("normalize", normalize, bool | None)
    pooling = _declared_pooling(lm)
    program = lm.programs.get(_embed, lm.module, pooling, normalize)
    params, D = inference_params(lm), _width(lm, pooling)
    embeddings = [np.zeros((0, D), np.float32)]

    def batches() -> Iterator[tuple[tuple[np.ndarray, PackedBatch], Any]]:
        for window in chunks(_check_texts(texts), WINDOW):
            embeddings.append(np.zeros((len(window), D), np.float32))
            for batch, inputs in _batches(lm, pooling, window, batch_tokens):
                yield (embeddings[-1], batch), inputs

    for (window_ND, batch), x_BED in run_ahead(lambda inputs: program(params, *inputs), batches()):
        window_ND[batch.examples] = x_BED[batch.rows, batch.slots]
    return np.concatenate(embeddings)


def _declared_pooling(lm: LM) -> Pooling:
    if lm.tokenizer is None:
        raise UserError("the model has no tokenizer; load it from a folder with one")
    if lm.pooling is not None:
        return lm.pooling
    if lm.config.structure == "decoder":
        raise UserError(
            "the decoder declares no pooling, so that its embeddings are undefined; declare one: "
            'dataclasses.replace(lm, pooling=jaxlm.Pooling(("lasttoken",)))'
        )
    return Pooling()


def _width(lm: LM, pooling: Pooling) -> int:
    width = pooling.dense[-1].kernel_DO.shape[1] if pooling.dense else lm.config.hidden_width * len(pooling.modes)
    return min(width, pooling.truncate or width)


def _check_texts(texts: Iterable[str]) -> Iterator[str]:
    def check() -> Iterator[str]:
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"text {i} is a {type(text).__name__}, {str(text)[:40]!r}; give strings")
            yield text

    # All texts of a list are checked before anything is compiled.
    return iter(list(check())) if isinstance(texts, Sized) else check()


def _batches(
    lm: LM, pooling: Pooling, window: list[str], batch_tokens: int
) -> Iterator[tuple[PackedBatch, tuple[Any, ...]]]:
    """Yields batches of the window's texts with their tokens, segments, positions and types, [B, T] int32."""
    from tokenizers.normalizers import Lowercase

    assert lm.tokenizer is not None
    if pooling.lowercase:
        for text in window:
            check_text(text)
    lower = Lowercase().normalize_str if pooling.lowercase else str
    with_special = lm.tokenizer.encode_with_special_tokens(
        [lower(pooling.prompt + text) for text in window], max_length=_limit(lm, pooling)
    )
    lengths = np.array([len(ids) for ids, _ in with_special])
    for batch in pack_batches(lm, lengths, batch_tokens, _max_texts):
        ids, types = zip(*[with_special[i] for i in batch.examples])
        segments_BT, positions_BT, tokens_BT, types_BT = batch.to_rows(ids, types)
        yield batch, shard_rows(lm, (tokens_BT, segments_BT, positions_BT, types_BT))


def _max_texts(T: int) -> int:
    """Maximum number of texts in a row of T tokens; a word of one piece with [CLS] and [SEP] has three tokens."""
    return min(T // 3, MAX_TEXTS)


def _limit(lm: LM, pooling: Pooling) -> int:
    if pooling.max_length is None:
        return lm.config.max_length
    return min(pooling.max_length, lm.config.position_limit or pooling.max_length)


def _embed(module: Transformer, pooling: Pooling, normalize: bool | None) -> Any:
    """Returns the compiled program, which `LM.programs` keeps: rows [B, T] -> embeddings of their texts [B, E, D]."""
    method = "encode" if module.config.structure == "encoder_decoder" else "__call__"

    @jax.jit
    def embed(params, tokens_BT, segments_BT, positions_BT, types_BT):
        x_BTD = apply(module, params, tokens_BT, segments_BT, positions_BT, types_BT, method=method)
        x_BTD = x_BTD.astype(jnp.float32)
        E = _max_texts(tokens_BT.shape[1])
        joined = [pool(mode, x_BTD, segments_BT, positions_BT, E) for mode in pooling.modes]
        x_BED = jnp.concatenate(joined, -1)
        for dense in pooling.dense:
            x_BED = jnp.dot(x_BED, dense.kernel_DO, precision="highest")
            if dense.bias_O is not None:
                x_BED += dense.bias_O
            if dense.activation is not None:
                x_BED = ACTIVATIONS[dense.activation](x_BED)
        if pooling.normalize if normalize is None else normalize:
            x_BED = _unit(x_BED)
        if pooling.truncate:
            x_BED = x_BED[..., : pooling.truncate]
            if normalize:
                x_BED = _unit(x_BED)
        return x_BED

    return embed


def pool(mode: str, x_BTD: jax.Array, segments_BT: jax.Array, positions_BT: jax.Array, E: int) -> jax.Array:
    """Returns one vector [B, E, D] for each text: the maximum, or a weighted sum, of the hidden states of its tokens.

    Args:
      mode: a pooling mode of `jaxlm.hub.pooling`.
      x_BTD: hidden states of packed rows.
      segments_BT: which text of its row a token belongs to, from 1; 0 is padding.
      positions_BT: the position of a token in its text.
      E: maximum number of texts in a row.
    """
    if mode == "max":
        B, _, D = x_BTD.shape
        segment_BT = jnp.arange(B)[:, None] * (E + 1) + segments_BT
        max_SD = jax.ops.segment_max(x_BTD.reshape(-1, D), segment_BT.reshape(-1), B * (E + 1))
        return max_SD.reshape(B, E + 1, D)[:, 1:]
    in_text_BET = segments_BT[:, None] == jnp.arange(1, E + 1)[:, None]
    n_BE1 = jnp.maximum(in_text_BET.sum(-1, keepdims=True), 1)
    number_B1T = positions_BT[:, None] + 1
    weights = {
        "cls": lambda: number_B1T == 1,
        "lasttoken": lambda: number_B1T == n_BE1,
        "mean": lambda: 1 / n_BE1,
        "mean_sqrt_len_tokens": lambda: jax.lax.rsqrt(n_BE1.astype(jnp.float32)),
        "weightedmean": lambda: number_B1T / (n_BE1 * (n_BE1 + 1) / 2),
    }
    weights_BET = in_text_BET * weights[mode]().astype(jnp.float32)
    return jnp.einsum("BET,BTD->BED", weights_BET, x_BTD, precision="highest")


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
