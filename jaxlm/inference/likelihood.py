"""Likelihoods: log-probabilities of continuations, the perplexity of texts, and predictions for masked tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config.arguments import check_list, check_model, token_ids
from jaxlm.config.ranges import Name, Positive, check_argument, short_repr
from jaxlm.data.tokenizers.tokenizer import check_text
from jaxlm.errors import UserError
from jaxlm.inference.generate import start_of
from jaxlm.inference.packing import (
    PackedBatch,
    check_batch_tokens,
    chunks,
    inference_params,
    pack_batches,
    row_length,
    run_ahead,
    shard_rows,
)
from jaxlm.nn.losses import bits_per_byte, token_log_probs
from jaxlm.nn.transformer import Transformer, apply

if TYPE_CHECKING:
    from jaxlm.lm import LM

MAX_LENGTH = 2048  # tokens in a row of `perplexity`, unless the caller sets more
WINDOW = 1 << 12  # examples that are packed together
TEXTS = 1 << 8  # texts that are tokenized together
STATES = 256  # hidden states that have their logits in memory at the same time

Text = str | Sequence[int]  # a text, or its token ids


class Likelihood(NamedTuple):
    """The likelihood of a continuation under a model."""

    log_probability: float  # sum over its tokens, in nats
    is_greedy: bool  # whether greedy decoding would generate it: each token is the most likely one
    tokens: int  # number of its tokens


class _Example(NamedTuple):
    tokens: np.ndarray  # [T]
    labels: np.ndarray  # [T], the token after each one
    scored: int  # number of labels that are scored, the last ones
    source: np.ndarray | None = None  # [S], tokens for the encoder


def log_likelihoods(
    lm: LM,
    pairs: Iterable[tuple[Text, Text]],
    *,
    length: int | None = None,
    too_long: Literal["refuse", "truncate"] = "refuse",
    batch_tokens: int | None = None,
) -> list[Likelihood]:
    """Returns the likelihood of each continuation given its context, in order.

    A decoder reads both in one row. Strings are tokenized together, and spaces at the end of the context belong to the
    continuation, as in a whole text (and in lm-evaluation-harness). The context begins with the tokens that the
    tokenizer adds at the beginning of a text, such as BOS; an empty context is BOS.

    An encoder-decoder reads the context, with its special tokens, in the encoder. Its decoder reads the start token and
    the tokens that the tokenizer adds at the beginning of a target (the language of mBART-50), then the continuation.
    No end token is scored.

    Args:
      lm: the model.
      pairs: (context, continuation), each a string, or token ids that are used as they are.
      length: tokens in a row; None: the model's positions.
      too_long: for a pair that exceeds `length`, "refuse" raises an error and "truncate" removes the beginning of the
        context.
      batch_tokens: tokens in a batch, padding included, at least one row; None: 512 for each core on CPU, 16,384 on
        accelerators. It changes results by rounding only.

    Raises:
      UserError: for a model without an lm head, a continuation that is empty or exceeds a row, and an empty context
        where the tokenizer has no BOS.
    """
    check_model("lm", lm)
    check_argument("too_long", too_long, Literal["refuse", "truncate"])
    pairs = check_list("pairs", pairs, "pairs (context, continuation)")
    limit = _limit(lm, length)
    examples = (_pair(lm, n, pair, limit, too_long) for n, pair in enumerate(pairs))
    return list(_score(lm, examples, batch_tokens))


def token_log_probs_of(lm: LM, texts: Sequence[Sequence[int]], *, batch_tokens: int | None = None) -> list[np.ndarray]:
    """Returns for each text the log-probability of each token after the first, float64 [T - 1] in nats.

    Args:
      lm: a decoder with an lm head.
      texts: the token ids of each text, which begin with BOS where the model expects it.
      batch_tokens: as for `log_likelihoods`.

    Raises:
      UserError: for a model that is not a decoder with an lm head, and for a text with fewer than two tokens or with
        more than the model's positions.
    """
    check_model("lm", lm)
    if lm.config.structure != "decoder":
        raise UserError(f"log-probabilities of texts require a decoder, the model is a(n) {lm.config.structure}")
    limit = _limit(lm, None)
    examples = []
    for n, text in enumerate(texts):
        ids = np.array(token_ids(f"text {n}", text), np.int32)
        if not 2 <= len(ids) <= limit + 1:
            raise UserError(f"text {n} has {len(ids)} tokens; give from 2 to {limit + 1}")
        examples.append(_Example(ids[:-1], ids[1:], len(ids) - 1))
    return [log_T for log_T, _ in _score_tokens(lm, examples, batch_tokens)]


def fill(lm: LM, text: str, *, blank: str = "[MASK]", top_k: int = 5) -> list[list[tuple[str, float]]]:
    """Returns the most likely tokens for each blank of a text, with their probabilities, the most likely first.

    The model predicts each blank while the others stay masked.

    Args:
      lm: a model with the head masked_lm as its first one.
      text: a text with at least one blank.
      blank: the string that marks a blank.
      top_k: number of tokens for each blank.

    Raises:
      UserError: for a model without that head or without a mask token, and for a text that has no blank or exceeds
        the model's positions.
    """
    check_model("lm", lm)
    blank, top_k = check_argument("blank", blank, Name), check_argument("top_k", top_k, Positive)
    if lm.config.heads_on_top[:1] != ("masked_lm",) or _tokenizer(lm).mask is None:
        raise UserError(f"fill requires the head masked_lm, the model has {', '.join(lm.config.heads_on_top)}")
    check_text(text)
    # The tokenizer finds the mask token itself and applies its flags: RoBERTa's mask includes the space before it.
    (tokens, _), *_ = _tokenizer(lm).encode_with_special_tokens(
        [text.replace(blank, _tokenizer(lm).special["mask"])], split_special_tokens=False
    )
    positions = [position for position, token in enumerate(tokens) if token == _tokenizer(lm).mask]
    if not positions:
        raise UserError(f"the text {text!r:.40} has no {blank}; put one where a word is missing")
    logits_BTV = lm(jnp.array([tokens], jnp.int32)).logits
    assert logits_BTV is not None  # the model has the head
    logits_TV = np.asarray(logits_BTV[0], np.float64)[:, : lm.vocabulary]
    filled = []
    for logits_V in logits_TV[positions]:
        p_V = np.exp(logits_V - logits_V.max())
        best = np.argsort(-p_V, kind="stable")[:top_k]
        filled.append([(_tokenizer(lm).pieces([i])[0], float(p_V[i] / p_V.sum())) for i in best])
    return filled


def perplexity(
    lm: LM,
    texts: str | Iterable[str],
    *,
    length: int | None = None,
    stride: int | None = None,
    batch_tokens: int | None = None,
) -> dict[str, float]:
    """Returns the perplexity of a decoder on texts, over all their tokens.

    Each text begins with the tokens that the tokenizer adds at the beginning of a text, such as BOS. Where it adds none
    (GPT-2), the first token of a text is read and not predicted, as in transformers' loss. A text that exceeds a row is
    read in windows of `length` tokens that move by `stride`. Each token is scored in the first window that has it.

    Args:
      lm: a decoder with an lm head.
      texts: one text, or any iterable of texts, read as a stream.
      length: tokens in a row; None: the model's positions, 2048 at most.
      stride: tokens between the starts of windows; None: `length`, without overlap. A smaller stride gives tokens
        more context and takes longer.
      batch_tokens: as for `log_likelihoods`.

    Returns:
      loss: nats per token. perplexity: exp(loss). bits_per_byte: the loss in bits per byte of UTF-8, which is
      comparable between tokenizers. tokens, bytes: the number of predicted tokens and of their bytes.

    Raises:
      UserError: for a model that is not a decoder with an lm head, an empty text, and texts without any predicted
        token.
    """
    check_model("lm", lm)
    if not isinstance(texts, str):
        texts = check_list("texts", texts, "strings")
    stride = check_argument("stride", stride, int | None)
    if lm.config.structure != "decoder":
        raise UserError(f"perplexity requires a decoder, the model is a(n) {lm.config.structure}; see log_likelihoods")
    limit = _limit(lm, length) if length is not None else min(MAX_LENGTH, _limit(lm, None))
    if stride is not None and not 1 <= stride <= limit:
        raise UserError(f"stride is {stride}; it must be from 1 to the {limit} tokens of a row")
    size = 0

    def windows() -> Iterator[_Example]:
        nonlocal size
        for some in chunks(enumerate([texts] if isinstance(texts, str) else texts), TEXTS):
            for n, text in some:
                if not isinstance(text, str) or not text:
                    raise UserError(f"text {n} is {text!r:.40}; give non-empty strings")
                check_text(text)
            batch = [text for _, text in some]
            size += sum(len(text.encode()) for text in batch)
            if not _tokenizer(lm).prefix:  # the first token of a text is not predicted, and its bytes are not counted
                size -= sum(
                    len(text[:end].encode()) for text, end in zip(batch, _tokenizer(lm).first_token_ends(batch))
                )
            for ids in _tokenizer(lm).encode_batch(batch):
                tokens = np.array(_tokenizer(lm).with_prefix(ids), np.int32)
                for start, scored, end in _windows(len(tokens) - 1, limit, stride or limit):
                    yield _Example(tokens[start:end], tokens[start + 1 : end + 1], end - scored)

    total, tokens = 0.0, 0
    for likelihood in _score(lm, windows(), batch_tokens):
        total -= likelihood.log_probability
        tokens += likelihood.tokens
    if not tokens:
        raise UserError("the texts have no token that could be predicted; give a text of at least two tokens")
    loss = total / tokens
    return {
        "perplexity": math.exp(min(loss, 700)),
        "loss": loss,
        "bits_per_byte": bits_per_byte(total, size),
        "tokens": tokens,
        "bytes": size,
    }


def _windows(count: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yields windows over `count` predictions, as (start, first scored prediction, end).

    The windows are those of a causal task's evaluation.

    >>> list(_windows(7, length=4, stride=2))
    [(0, 0, 4), (2, 4, 6), (3, 6, 7)]
    """
    scored, end = 0, min(length, count)
    while scored < count:
        yield scored if stride == length else max(0, end - length), scored, end
        scored, end = end, min(end + stride, count)


def _limit(lm: LM, length: int | None) -> int:
    """Returns the tokens in a row. Raises UserError for a model that does not predict the next token."""
    config = lm.config
    if config.structure == "encoder" or "lm" not in config.heads_on_top:
        heads = ", ".join(config.heads_on_top) or "none"
        raise UserError(
            f"the model is a(n) {config.structure} with the heads: {heads}; likelihoods require the head lm: load a "
            f"model with it"
        )
    if length is None:
        return config.max_length
    length = check_argument("length", length, Positive)
    config.check_length(length)
    return length


def _tokenizer(lm: LM) -> Any:
    if lm.tokenizer is None:
        raise UserError("the model has no tokenizer; load it from a folder with one, or give token ids")
    return lm.tokenizer


def _pair(lm: LM, n: int, pair: tuple[Text, Text], limit: int, too_long: str) -> _Example:
    """Returns the example of pair n."""
    try:
        context, continuation = () if isinstance(pair, str) else pair
    except (TypeError, ValueError):
        raise UserError(f"pair {n} is {short_repr(pair)}; give (context, continuation)") from None
    context, continuation = (
        text if isinstance(text, str) else token_ids(f"pair {n}", text) for text in (context, continuation)
    )
    split = lm.config.structure == "encoder_decoder"
    before, after = _split_ids(lm, context, continuation) if split else _joined_ids(lm, context, continuation)
    begin = [start_of(lm)] if split else []  # tokens of the decoder before the continuation
    if split and isinstance(continuation, str):
        begin += _tokenizer(lm).target.prefix
    if not len(after):
        raise UserError(f"pair {n}: the continuation {continuation!r:.40} has no tokens; give at least one")
    if not len(before):
        raise UserError(f"pair {n}: the context has no tokens and the tokenizer has no BOS; give a context")
    ids = np.concatenate([before, after]).astype(np.int64)
    invalid = ids[(ids < 0) | (ids >= lm.config.vocabulary)]
    if len(invalid):
        raise UserError(f"pair {n} has token {invalid[0]}; ids go from 0 to {lm.config.vocabulary - 1}")
    room = limit if split else limit + 1 - len(after)
    needs = max(len(before), len(begin) + len(after) - 1) if split else len(ids) - 1
    if needs > limit and (too_long == "refuse" or len(after) > limit):
        remedy = "shorten it" if len(after) > limit else "shorten it, or set too_long='truncate'"
        raise UserError(f"pair {n} requires {needs} tokens in a row, more than {limit}; {remedy}")
    if split:
        of_target = len(begin) + len(after) - 1
        lm.config.decoder_config.check_length(of_target, f"the continuation of pair {n}", "shorten it")
    before_S, after_T = np.array(before[-room:], np.int32), np.array(after, np.int32)
    if split:
        ids = np.array([*begin, *after_T], np.int32)
        return _Example(ids[:-1], ids[1:], len(after), before_S)
    ids = np.concatenate([before_S, after_T])
    return _Example(ids[:-1], ids[1:], len(after))


def _joined_ids(lm: LM, context: Text, continuation: Text) -> tuple[Sequence[int], Sequence[int]]:
    """Returns the ids of a context and of its continuation for one row of a decoder."""
    if not (isinstance(context, str) and isinstance(continuation, str)):
        before = _tokenizer(lm).with_prefix(_tokenizer(lm).encode(context)) if isinstance(context, str) else context
        return before, _tokenizer(lm).encode(continuation) if isinstance(continuation, str) else continuation
    cut = len(context.rstrip())
    before = _tokenizer(lm).encode(context[:cut])
    whole_ids = _tokenizer(lm).encode(context + continuation)
    return _tokenizer(lm).with_prefix(before), whole_ids[len(before) :]


def _split_ids(lm: LM, context: Text, continuation: Text) -> tuple[Sequence[int], Sequence[int]]:
    """Returns the ids for the encoder, and the ids that the decoder should predict."""
    before = _tokenizer(lm).encode_with_special_tokens([context])[0][0] if isinstance(context, str) else context
    after = _tokenizer(lm).target.encode(continuation) if isinstance(continuation, str) else continuation
    return before, after


def _score(lm: LM, examples: Iterable[_Example], batch_tokens: int | None) -> Iterator[Likelihood]:
    """Yields the likelihood of the scored labels of each example, in order."""
    for log_T, greedy_T in _score_tokens(lm, examples, batch_tokens):
        yield Likelihood(float(log_T.sum()), bool(greedy_T.all()), len(log_T))


def _score_tokens(
    lm: LM, examples: Iterable[_Example], batch_tokens: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields for the scored labels of each example, in order, log-probabilities and whether each is the most likely."""
    batch_tokens = check_batch_tokens(batch_tokens)
    program, params = lm.programs.get(_program, lm.module), inference_params(lm)
    scores: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    n = 0

    def batches() -> Iterator[tuple[tuple[int, list[_Example], PackedBatch], Any]]:
        first = 0
        for window in chunks(examples, WINDOW):
            for batch, inputs in _batches(lm, window, batch_tokens):
                yield (first, window, batch), inputs
            first += len(window)

    for (first, window, batch), (log_BT, greedy_BT) in run_ahead(lambda inputs: program(params, *inputs), batches()):
        for i, b, start in zip(batch.examples.tolist(), batch.rows, batch.starts):
            end = start + len(window[i].tokens)
            scored = np.s_[b, end - window[i].scored : end]
            scores[first + i] = log_BT[scored].astype(np.float64), greedy_BT[scored]
        while n in scores:
            yield scores.pop(n)
            n += 1


def _batches(lm: LM, examples: list[_Example], batch_tokens: int) -> Iterator[tuple[PackedBatch, tuple[Any, ...]]]:
    """Yields batches with their tokens, segments, positions, labels, is_scored [B, T] and tokens, segments [B, S].

    Examples of a decoder share rows. An example with a source has a row to itself.
    """
    lengths = np.array([len(example.tokens) for example in examples])
    sources = [example.source for example in examples]
    source_lengths = np.array([0 if source is None else row_length(len(source)) for source in sources])
    for S in np.unique(source_lengths).tolist():
        max_examples = (lambda T: 1) if S else (lambda T: T)
        for batch in pack_batches(lm, lengths * (source_lengths == S), batch_tokens, max_examples, S):
            some = [examples[i] for i in batch.examples]
            is_scored = [np.arange(len(one.tokens)) >= len(one.tokens) - one.scored for one in some]
            columns = [one.tokens for one in some], [one.labels for one in some], is_scored
            segments_BT, positions_BT, tokens_BT, labels_BT, is_scored_BT = batch.to_rows(*columns)
            inputs = [tokens_BT, segments_BT, positions_BT, labels_BT, is_scored_BT.astype(bool)]
            if S:
                source = batch._replace(shape=(batch.shape[0], S)).to_rows([one.source for one in some])
                inputs += [source[2], source[0]]
            yield batch, shard_rows(lm, tuple(inputs))


def _program(module: Transformer) -> Any:
    """Returns the compiled program, which `LM.programs` keeps.

    Its results are, for each scored label of the rows, the log-probability and whether it is the most likely token.
    """

    @jax.jit
    def program(params, tokens_BT, segments_BT, positions_BT, labels_BT, is_scored_BT, *source):
        inputs: list[Any] = [tokens_BT, segments_BT, positions_BT]
        if source:
            source_BS, source_segments_BS = source
            source_positions_BS = jnp.broadcast_to(jnp.arange(source_BS.shape[1]), source_BS.shape)
            inputs = [source_BS, source_segments_BS, source_positions_BS, None, *inputs]
        x_BTD = apply(module, params, *inputs)
        # Logits are computed for scored labels only, and in chunks: the logits of all states would fill the memory.
        order_BT = jnp.argsort(~is_scored_BT, axis=1, stable=True)
        B, T = tokens_BT.shape
        n = min(T, max(1, STATES // B))
        rows_B1 = jnp.arange(B)[:, None]

        def score_chunk(k: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            chunk_BN = jax.lax.dynamic_slice_in_dim(order_BT, k * n, n, 1)
            x_BND = jnp.take_along_axis(x_BTD, chunk_BN[..., None], 1)
            labels_BN = jnp.take_along_axis(labels_BT, chunk_BN, 1)
            log_BN, best_BN = token_log_probs(partial(apply, module, method="lm"), params, x_BND, labels_BN)
            log_BT, greedy_BT = results
            greedy_BT = greedy_BT.at[rows_B1, chunk_BN].set(best_BN == labels_BN)
            return log_BT.at[rows_B1, chunk_BN].set(log_BN), greedy_BT

        n_chunks = -(-is_scored_BT.sum(1).max() // n)
        return jax.lax.fori_loop(0, n_chunks, score_chunk, (jnp.zeros((B, T), jnp.float32), jnp.zeros((B, T), bool)))

    return program
