"""Pseudo-log-likelihoods: the log-probability of each token of a text, masked alone, under a masked language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config.arguments import check_model
from jaxlm.errors import UserError
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
from jaxlm.nn.losses import token_log_probs
from jaxlm.nn.transformer import Transformer, apply

WINDOW = 1 << 12  # masked copies that are packed together
MAX_COPIES = 16  # masked copies in a row, each with the logits of one token in memory


def masked_log_probs(
    lm: LM,
    texts: Sequence[Sequence[int]],
    scored: Sequence[Sequence[int]],
    *,
    batch_tokens: int | None = None,
) -> list[np.ndarray]:
    """Returns for each text the log-probabilities of its scored tokens, each masked alone, float64 [S] in nats.

    Their sum is the pseudo-log-likelihood of these tokens (Salazar et al. 2020). The masked copies of all texts are
    packed into rows of few lengths, so that one program per length compiles.

    Args:
      lm: an encoder with the head masked_lm.
      texts: the token ids of each text, with its special tokens.
      scored: for each text, the positions of the S scored tokens.
      batch_tokens: tokens in a batch, padding included; None: 512 for each core on CPU, 16,384 on accelerators.

    Raises:
      UserError: for a model without that head or without a mask token, and for a text longer than the model's
        positions.
    """
    check_model("lm", lm)
    if lm.config.structure != "encoder" or "masked_lm" not in lm.config.heads_on_top:
        raise UserError(
            f"pseudo-likelihoods require an encoder with the head masked_lm, the model is a(n) {lm.config.structure} "
            f"with the heads: {', '.join(lm.config.heads_on_top) or 'none'}"
        )
    mask = lm.tokenizer.mask if lm.tokenizer is not None else None
    if mask is None:
        raise UserError(
            "the model has no mask token; load it from a folder with the tokenizer that it was trained with"
        )
    for n, tokens in enumerate(texts):
        lm.config.check_length(len(tokens), f"text {n}", "shorten it")
    copies = [(n, position) for n, positions in enumerate(scored) for position in positions]
    log_probs_C = np.zeros(len(copies))
    program, params = lm.programs.get(_program, lm.module), inference_params(lm)
    rows = check_batch_tokens(batch_tokens)

    def batches() -> Iterator[tuple[tuple[int, PackedBatch], Any]]:
        first = 0
        for window in chunks(copies, WINDOW):
            for batch, inputs in _batches(lm, mask, texts, window, rows):
                yield (first, batch), inputs
            first += len(window)

    for (first, batch), log_BE in run_ahead(lambda inputs: program(params, *inputs), batches()):
        log_probs_C[first + batch.examples] = log_BE[batch.rows, batch.slots]
    return np.split(log_probs_C, np.cumsum([len(positions) for positions in scored])[:-1])


def _batches(
    lm: LM, mask: int, texts: Sequence[Sequence[int]], copies: list[tuple[int, int]], batch_tokens: int
) -> Iterator[tuple[PackedBatch, tuple[Any, ...]]]:
    """Yields batches with tokens, segments, positions [B, T], and the places and labels of the masks [B, E]."""
    lengths = np.array([len(texts[n]) for n, _ in copies])
    for batch in pack_batches(lm, lengths, batch_tokens, _max_copies):
        masked = []
        places_BE = np.zeros((batch.shape[0], _max_copies(batch.shape[1])), np.int32)
        labels_BE = np.zeros_like(places_BE)
        for example, row, slot, start in zip(batch.examples, batch.rows, batch.slots, batch.starts):
            n, position = copies[example]
            tokens_T = np.array(texts[n], np.int32)
            labels_BE[row, slot], places_BE[row, slot] = tokens_T[position], start + position
            tokens_T[position] = mask
            masked.append(tokens_T)
        segments_BT, positions_BT, tokens_BT = batch.to_rows(masked)
        yield batch, shard_rows(lm, (tokens_BT, segments_BT, positions_BT, places_BE, labels_BE))


def _max_copies(T: int) -> int:
    return min(T // 2, MAX_COPIES)


def _program(module: Transformer) -> Any:
    """Returns the compiled program, which `LM.programs` keeps: the log-probabilities of the labels [B, E]."""

    @jax.jit
    def program(params, tokens_BT, segments_BT, positions_BT, places_BE, labels_BE):
        x_BTD = apply(module, params, tokens_BT, segments_BT, positions_BT)
        x_BED = jnp.take_along_axis(x_BTD, places_BE[..., None], 1)
        log_BE, _ = token_log_probs(partial(apply, module, method="masked_lm"), params, x_BED, labels_BE)
        return log_BE

    return program
