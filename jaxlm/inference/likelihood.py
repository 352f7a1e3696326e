"""How likely a model finds texts: log-probabilities of continuations, the perplexity of whole texts, and what a masked
language model puts in blanks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxlm.config.arguments import check_model, listed, token_ids
from jaxlm.config.ranges import Name, Positive, argument, shown
from jaxlm.data.pack import pack
from jaxlm.data.tokenizers.tokenizer import check_text
from jaxlm.devices import hosts
from jaxlm.devices.sharding import spec, ways
from jaxlm.errors import UserError
from jaxlm.inference.encode import SHORTEST, mesh_of, params_of
from jaxlm.inference.generate import start_of
from jaxlm.nn.losses import bits_per_byte, token_log_probs
from jaxlm.nn.transformer import Transformer, apply

if TYPE_CHECKING:
    from jaxlm.lm import LM

ROW = 2048  # tokens of a row, at the most, where a model that could take more is not asked for more
WINDOW = 1 << 12  # examples that are packed together
TEXTS = 1 << 8  # texts that are tokenized together
STATES = 256  # hidden states whose logits are in memory at once

Text = str | Sequence[int]  # or its ids, used as given


class Likelihood(NamedTuple):
    """What a model says of a continuation."""

    log_probability: float  # of all its tokens, in nats: the sum over them
    is_greedy: bool  # whether each of them is the likeliest one: greedy decoding would write it
    tokens: int


class _Example(NamedTuple):
    """Tokens [T], what follows each of them [T], how many of the last ones count, and what an encoder reads [S]."""

    tokens: np.ndarray
    labels: np.ndarray
    counted: int
    source: np.ndarray | None = None


def log_likelihoods(
    lm: LM,
    pairs: Iterable[tuple[Text, Text]],
    *,
    length: int | None = None,
    too_long: Literal["refuse", "truncate"] = "refuse",
    batch_tokens: int | None = None,
) -> list[Likelihood]:
    """How likely each continuation is behind its context, in order.

    pairs: (context, continuation), each a text or token ids that are used as given.  A decoder's context begins with
    what the tokenizer's own frame puts before a text, such as BOS; an empty one is BOS, since something has to be read.
    They are tokenized joined, and spaces at the end of the context count for the continuation, as it would have been
    written (and as lm-evaluation-harness has it).  An encoder-decoder reads the
    context in its encoder, framed as always, and the continuation in its decoder, behind its start token and what the
    frame puts before a text (the language of mBART-50), without an end token.

    length: tokens of a row; None: the model's positions.  too_long: what happens to a pair that is longer: it is an
    error, or the context loses its beginning.  batch_tokens: places in a batch; None: what suits the machine.  How
    pairs are batched changes nothing but rounding.

    Raises UserError for a model without the head lm, a continuation without tokens or longer than a row, and a context
    without tokens where the tokenizer has no BOS.
    """
    check_model("lm", lm)
    argument("too_long", too_long, Literal["refuse", "truncate"])
    pairs = listed("pairs", pairs, "pairs (context, continuation)")
    limit = _limit(lm, length)
    examples = (_pair(lm, n, pair, limit, too_long) for n, pair in enumerate(pairs))
    return list(_scored(lm, examples, batch_tokens))


def fill(lm: LM, text: str, *, blank: str = "[MASK]", most: int = 5) -> list[list[tuple[str, float]]]:
    """The likeliest tokens for each blank in a text, each with its probability, the likeliest first.

    Of the model's first head, masked_lm.  Each blank is asked for alone, the others staying blank.  Raises UserError
    for a model without that head or a mask token, and for a text without a blank or longer than its positions.
    """
    check_model("lm", lm)
    blank, most = argument("blank", blank, Name), argument("most", most, Positive)
    if lm.config.heads_on_top[:1] != ("masked_lm",) or _tokenizer(lm).mask is None:
        raise UserError(f"blanks are filled by the head masked_lm, the model has {', '.join(lm.config.heads_on_top)}")
    check_text(text)
    # The tokenizer finds its own mask token, so that the token's flags hold: RoBERTa's takes the space before it.
    (tokens, _), *_ = _tokenizer(lm).frame(
        [text.replace(blank, _tokenizer(lm).special["mask"])], split_special_tokens=False
    )
    places = [place for place, token in enumerate(tokens) if token == _tokenizer(lm).mask]
    if not places:
        raise UserError(f"the text {text!r:.40} has no {blank}; put one where a word is wanted")
    logits_BTV = lm(jnp.array([tokens], jnp.int32)).logits
    assert logits_BTV is not None  # the head is there
    logits_TV = np.asarray(logits_BTV[0], np.float64)[:, : lm.vocabulary]
    found = []
    for logits_V in logits_TV[places]:
        p_V = np.exp(logits_V - logits_V.max())
        best = np.argsort(-p_V, kind="stable")[:most]
        found.append([(_tokenizer(lm).pieces([i])[0], float(p_V[i] / p_V.sum())) for i in best])
    return found


def perplexity(
    lm: LM,
    texts: str | Iterable[str],
    *,
    length: int | None = None,
    stride: int | None = None,
    batch_tokens: int | None = None,
) -> dict[str, float]:
    """How well a decoder predicts texts, over all their tokens.

    perplexity: e to the loss; loss: nats per token; bits_per_byte: the same per byte of UTF-8, so that models with
    other tokenizers compare; tokens: that were predicted; bytes: theirs.

    Every text begins with what the tokenizer's own frame puts before it, such as BOS.  Where that is nothing (GPT-2),
    the first token of a text is read and not predicted, as in transformers' loss.  A text longer than
    a row is read in windows of `length` that move by `stride`, each token counted in the first window that has it.
    length: None: the model's positions, 2048 at the most.  stride: None: `length`, so that windows do not overlap; a
    smaller one gives tokens more of a context, and takes longer.

    Raises UserError for a model that is no decoder with the head lm, an empty text, and a text of no prediction at all.
    """
    check_model("lm", lm)
    if not isinstance(texts, str):
        texts = listed("texts", texts, "strings")
    stride = argument("stride", stride, int | None)
    if lm.config.structure != "decoder":
        raise UserError(f"perplexity is of a decoder, the model is a(n) {lm.config.structure}; see log_likelihoods")
    limit = _limit(lm, length) if length is not None else min(ROW, _limit(lm, None))
    if stride is not None and not 1 <= stride <= limit:
        raise UserError(f"stride is {stride}; it must be from 1 to the {limit} tokens of a row")
    size = 0

    def windows() -> Iterator[_Example]:
        nonlocal size
        stream = enumerate([texts] if isinstance(texts, str) else texts)
        while some := list(islice(stream, TEXTS)):
            for n, text in some:
                if not isinstance(text, str) or not text:
                    raise UserError(f"text {n} is {text!r:.40}; give strings that are not empty")
                check_text(text)
            own = [text for _, text in some]
            size += sum(len(text.encode()) for text in own)
            if not _tokenizer(lm).prefix:  # the first token of a text is not predicted, so its bytes do not count
                size -= sum(len(text[:end].encode()) for text, end in zip(own, _tokenizer(lm).first_ends(own)))
            for ids in _tokenizer(lm).encode_batch(own):
                tokens = np.array(_tokenizer(lm).begun(ids), np.int32)
                for start, counted, end in _windows(len(tokens) - 1, limit, stride or limit):
                    yield _Example(tokens[start:end], tokens[start + 1 : end + 1], end - counted)

    total, tokens = 0.0, 0
    for found in _scored(lm, windows(), batch_tokens):
        total -= found.log_probability
        tokens += found.tokens
    if not tokens:
        raise UserError("the texts have no token that could be predicted; give at least one of two tokens")
    loss = total / tokens
    return {
        "perplexity": math.exp(min(loss, 700)),
        "loss": loss,
        "bits_per_byte": bits_per_byte(total, size),
        "tokens": tokens,
        "bytes": size,
    }


def _windows(count: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows over `count` predictions: start, the first one that counts, end; as those of a causal task's evaluation.

    >>> list(_windows(7, length=4, stride=2))
    [(0, 0, 4), (2, 4, 6), (3, 6, 7)]
    """
    counted, end = 0, min(length, count)
    while counted < count:
        yield counted if stride == length else max(0, end - length), counted, end
        counted, end = end, min(end + stride, count)


def _limit(lm: LM, length: int | None) -> int:
    """Tokens of a row.  Raises UserError for a model that predicts no next token."""
    config = lm.config
    if config.structure == "encoder" or "lm" not in config.heads_on_top:
        heads = ", ".join(config.heads_on_top) or "none"
        raise UserError(
            f"the model is a(n) {config.structure} with the heads: {heads}; a likelihood takes the head lm: load one "
            f"that has it"
        )
    if length is None:
        return config.max_length
    length = argument("length", length, Positive)
    config.check_length(length)
    return length


def _tokenizer(lm: LM) -> Any:
    if lm.tokenizer is None:
        raise UserError("the model has no tokenizer; load it from a folder with one, or give token ids")
    return lm.tokenizer


def _pair(lm: LM, n: int, pair: tuple[Text, Text], limit: int, too_long: str) -> _Example:
    """The example of pair n."""
    try:
        context, continuation = () if isinstance(pair, str) else pair
    except (TypeError, ValueError):
        raise UserError(f"pair {n} is {shown(pair)}; give (context, continuation)") from None
    context, continuation = (
        text if isinstance(text, str) else token_ids(f"pair {n}", text) for text in (context, continuation)
    )
    split = lm.config.structure == "encoder_decoder"
    before, after = _split_ids(lm, context, continuation) if split else _joined_ids(lm, context, continuation)
    begin = [start_of(lm)] if split else []  # what the decoder reads before the continuation
    if split and isinstance(continuation, str):
        begin += _tokenizer(lm).target.prefix
    if not len(after):
        raise UserError(f"pair {n}: the continuation {continuation!r:.40} has no token; give at least one")
    if not len(before):
        raise UserError(f"pair {n}: the context has no token, and there is no BOS; give a context")
    ids = np.concatenate([before, after]).astype(np.int64)
    strange = ids[(ids < 0) | (ids >= lm.config.vocabulary)]
    if len(strange):
        raise UserError(f"pair {n} has token {strange[0]}; ids go from 0 to {lm.config.vocabulary - 1}")
    room = limit if split else limit + 1 - len(after)
    needs = max(len(before), len(begin) + len(after) - 1) if split else len(ids) - 1
    if needs > limit and (too_long == "refuse" or len(after) > limit):
        remedy = "shorten it" if len(after) > limit else "shorten it, or give too_long='truncate'"
        raise UserError(f"pair {n} takes {needs} tokens of a row, more than {limit}; {remedy}")
    before_S, after_T = np.array(before[-room:], np.int32), np.array(after, np.int32)
    if split:
        read_T = np.array([*begin, *after_T], np.int32)
        return _Example(read_T[:-1], read_T[1:], len(after), before_S)
    ids = np.concatenate([before_S, after_T])
    return _Example(ids[:-1], ids[1:], len(after))


def _joined_ids(lm: LM, context: Text, continuation: Text) -> tuple[Sequence[int], Sequence[int]]:
    """Ids of a context and of what follows it, in one row."""
    if not (isinstance(context, str) and isinstance(continuation, str)):
        whole = [_tokenizer(lm).begun(_tokenizer(lm).encode(context)) if isinstance(context, str) else context]
        whole += [_tokenizer(lm).encode(continuation) if isinstance(continuation, str) else continuation]
        return whole[0], whole[1]
    cut = len(context.rstrip())
    before = _tokenizer(lm).encode(context[:cut])
    whole_ids = _tokenizer(lm).encode(context + continuation)
    return _tokenizer(lm).begun(before), whole_ids[len(before) :]


def _split_ids(lm: LM, context: Text, continuation: Text) -> tuple[Sequence[int], Sequence[int]]:
    """Ids of what the encoder reads, and of what the decoder is to write."""
    before = _tokenizer(lm).frame([context])[0][0] if isinstance(context, str) else context
    after = _tokenizer(lm).target.encode(continuation) if isinstance(continuation, str) else continuation
    return before, after


# Batches.


def _scored(lm: LM, examples: Iterable[_Example], batch_tokens: int | None) -> Iterator[Likelihood]:
    """The likelihood of what counts of each example, in order."""
    batch_tokens = argument("batch_tokens", batch_tokens, Positive | None)
    if batch_tokens is None:
        batch_tokens = 512 * (os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1 << 14
    program, params, mesh = lm.programs.get(_program, lm.module), params_of(lm), mesh_of(lm)
    parts = 1 if mesh is None else ways(mesh, "batch")
    stream = iter(examples)
    while window := list(islice(stream, WINDOW)):
        found: dict[int, Likelihood] = {}
        for rows, T, S in _rows(window):
            most = max(1, batch_tokens // max(T, S))
            for first in range(0, len(rows), most):
                some = rows[first : first + most]
                count = -(-min(most, 1 << (len(some) - 1).bit_length()) // parts) * parts
                inputs = _laid_out(window, some, count, T, S)
                if mesh is not None:
                    inputs = jax.device_put(inputs, NamedSharding(mesh, spec(("batch",), mesh.axis_names)))
                log_BT, likeliest_BT = hosts.fetched(program(params, *inputs))
                for b, row in enumerate(some):
                    end = 0
                    for i in row:
                        end += len(window[i].tokens)
                        here = slice(end - window[i].counted, end)
                        total = float(log_BT[b, here].sum(dtype=np.float64))
                        found[i] = Likelihood(total, bool(likeliest_BT[b, here].all()), window[i].counted)
        yield from (found[i] for i in range(len(window)))


def _rows(examples: list[_Example]) -> Iterator[tuple[list[list[int]], int, int]]:
    """Rows, each of some examples, with the tokens T of a row and S of its source: few lengths, powers of two.

    Examples of a decoder share rows; those with a source have a row of their own.
    """
    size = lambda n: max(SHORTEST, 1 << (n - 1).bit_length())
    if examples[0].source is not None:
        of_size: dict[tuple[int, int], list[list[int]]] = {}
        for i, example in enumerate(examples):
            assert example.source is not None
            of_size.setdefault((size(len(example.tokens)), size(len(example.source))), []).append([i])
        yield from ((rows, T, S) for (T, S), rows in sorted(of_size.items()))
        return
    lengths = np.array([len(example.tokens) for example in examples])
    left = np.arange(len(examples))
    while len(left):
        T = size(int(lengths[left].max()))
        packed = pack(lengths[left], T, T)
        rows = [left[packed.examples[a:b]].tolist() for a, b in zip(packed.starts, packed.starts[1:])]
        # Rows of T hold an example longer than T / 2, and shorter ones where it leaves room.
        here = [row for row in rows if T == SHORTEST or lengths[row].max() > T // 2]
        left = np.setdiff1d(left, np.concatenate(here))
        yield here, T, 0


def _laid_out(examples: list[_Example], rows: list[list[int]], count: int, T: int, S: int) -> tuple[np.ndarray, ...]:
    """tokens, segments, positions, labels [B, T], counted [B, T] and, of an encoder, tokens, segments [B, S]."""
    fields = np.zeros((4, count, T), np.int32)
    counted_BT = np.zeros((count, T), bool)
    sources = np.zeros((2, count, S), np.int32)
    for b, row in enumerate(rows):
        end = 0
        for segment, i in enumerate(row, start=1):
            example, start = examples[i], end
            end += len(example.tokens)
            fields[0, b, start:end], fields[1, b, start:end] = example.tokens, segment
            fields[2, b, start:end], fields[3, b, start:end] = np.arange(end - start), example.labels
            counted_BT[b, end - example.counted : end] = True
            if example.source is not None:
                sources[0, b, : len(example.source)], sources[1, b, : len(example.source)] = example.source, 1
    return (*fields, counted_BT, *(sources if S else ()))


def _program(module: Transformer) -> Any:
    """Returns the compiled program, which `LM.programs` keeps:
    rows to the log-probability of each label that counts, and whether it is the likeliest."""

    @jax.jit
    def program(params, tokens_BT, segments_BT, positions_BT, labels_BT, counted_BT, *source):
        read: list[Any] = [tokens_BT, segments_BT, positions_BT]
        if source:
            source_BS, source_segments_BS = source
            read = [source_BS, source_segments_BS, jnp.broadcast_to(jnp.arange(source_BS.shape[1]), source_BS.shape)]
            read += [None, tokens_BT, segments_BT, positions_BT]
        x_BTD = apply(module, params, *read)
        # Only what counts goes through the vocabulary, some states at a time: the logits of all would fill the memory.
        order_BT = jnp.argsort(~counted_BT, axis=1, stable=True)
        B, T = tokens_BT.shape
        n = min(T, max(1, STATES // B))
        rows_B1 = jnp.arange(B)[:, None]

        def some(k: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            here_BN = jax.lax.dynamic_slice_in_dim(order_BT, k * n, n, 1)
            x_BND = jnp.take_along_axis(x_BTD, here_BN[..., None], 1)
            labels_BN = jnp.take_along_axis(labels_BT, here_BN, 1)
            log_BN, tokens_BN = token_log_probs(partial(apply, module, method="lm"), params, x_BND, labels_BN)
            likeliest_BN = tokens_BN == labels_BN
            log_BT, likeliest_BT = found
            return log_BT.at[rows_B1, here_BN].set(log_BN), likeliest_BT.at[rows_B1, here_BN].set(likeliest_BN)

        chunks = -(-counted_BT.sum(1).max() // n)
        return jax.lax.fori_loop(0, chunks, some, (jnp.zeros((B, T), jnp.float32), jnp.zeros((B, T), bool)))

    return program
