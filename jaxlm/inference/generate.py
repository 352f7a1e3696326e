"""Generation of texts from prompts. The compiled programs are in `decode`.

The lengths of prompts, sources and caches are rounded up to a few sizes, so that few programs are compiled. A long list
of prompts is decoded continuously: when a text ends, the next prompt takes its row.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxlm.config import Decoding
from jaxlm.config.arguments import check_list, check_model, stop_ids, token_ids
from jaxlm.config.ranges import short_repr
from jaxlm.devices import hosts
from jaxlm.errors import UserError
from jaxlm.inference.beam import EARLY, search_of
from jaxlm.inference.decode import NO_TOKEN, Prompts, Rules, programs
from jaxlm.inference.generation_defaults import defaults_of, merge_settings, report
from jaxlm.inference.packing import chunks, divisible_rows, inference_params
from jaxlm.inference.speculative import DRAFTED, speculative
from jaxlm.nn.kernels import backend_of

if TYPE_CHECKING:
    from jaxlm.lm import LM

MIN_LENGTH = 32  # lengths are rounded up to this or a power of two
MIN_ROOM = 64  # initial length of the caches where prompts are shorter; it is doubled when it is used up
MAX_ROWS = 32  # texts that are decoded at the same time
# Rows of a program that decodes, by platform; 1 elsewhere. On a GPU, XLA copies the caches of one row and computes some
# products elementwise: a step of Llama-3.2-1B has 368 kernels, but 268 for two rows (benchmarks/RESULTS.md).
MIN_DECODED_ROWS = {"cuda": 2}
CHECK_EVERY = 16  # tokens between two checks for ended texts, where some may end before others
STREAM_EVERY = 4  # tokens in a piece of a stream


class Generation(NamedTuple):
    """A generated text, without its prompt.

    text: None without a tokenizer.
    tokens: its ids, without the stop token.
    log_probs: log-probability of each token under the model, before temperature and filters.
    score: for beam search the score that ranks the beams, else the log-probability of the text with its stop token.
    """

    text: str | None
    tokens: list[int]
    log_probs: list[float]
    score: float


class Request(NamedTuple):
    """A text to generate.

    number: index of its prompt.
    draw: index among the texts of the same prompt.
    tokens: the first tokens of the decoder.
    source: tokens for the encoder, where there is one.
    """

    number: int
    draw: int
    tokens: list[int]
    source: list[int] | None


class TokenRow(NamedTuple):
    """A decoded text, with its stop token if it has one."""

    request: Request
    tokens: list[int]
    log_probs: list[float]
    score: float
    ended: bool = True


def generate(
    lm: LM,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    decoding: Decoding | None = None,
    *,
    stop_tokens: Iterable[int] | None = None,
    return_tokens: bool = False,
    details: bool = False,
    draft: LM | None = None,
    **choices: Any,
) -> list[Any]:
    """Returns the continuation of each prompt, or the output of an encoder-decoder for it.

    Args:
      lm: the model.
      prompts: strings, which get the special tokens that the model expects, or lists of token ids, which are used as
        they are.
      decoding: the settings of generation; None: those of the checkpoint's generation_config.json, which are printed
        on stderr, and `Decoding()` where it has none.
      stop_tokens: a text ends before the first of these tokens; None: those of the model; (): none.
      return_tokens: whether to return lists of token ids instead of strings.
      details: whether to return a `Generation` for each text.
      draft: a smaller model with the same tokens, for speculative decoding: faster, with the same distribution of
        texts. It cannot be combined with beams.
      **choices: fields of `Decoding` by name, such as `temperature=0.7`; they override `decoding`.

    Returns:
      One text for each prompt, or a list of texts where n_best is above 1.

    Raises:
      UserError: where a setting is out of its range, a prompt is empty, has ids outside the vocabulary or leaves too
        few positions, or the model cannot generate.
    """
    check_model("lm", lm)
    prompts = [*check_list("prompts", prompts, "prompts")]
    decoding = decoding_for(lm, decoding, choices)
    check_decoding(lm, decoding, draft)
    if lm.tokenizer is None and not (return_tokens or details):
        raise UserError("the model has no tokenizer; give prompts as lists of token ids, with return_tokens=True")
    plain = lambda one: one if details else one.tokens if return_tokens else one.text
    groups = generate_in_order(lm, prompts, decoding, stop_tokens=stop_tokens, scored=details, draft=draft)
    texts = [[plain(one) for one in group] for group in groups]
    return texts if decoding.n_best > 1 else [text for (text,) in texts]


def generate_in_order(
    lm: LM,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    stop_tokens: Iterable[int] | None = None,
    scored: bool = False,
    draft: LM | None = None,
    done: int = 0,
) -> Iterator[list[Generation]]:
    """Yields the n_best texts of each prompt in the order of the prompts, each as soon as it is complete.

    Args:
      lm: the model.
      prompts: as for `generate`.
      decoding: the settings of generation.
      stop_tokens: as for `generate`.
      scored: whether log-probabilities are computed.
      draft: as for `generate`.
      done: number of prompts to skip, from the first one on.
    """
    stops = stops_of(lm) if stop_tokens is None else stop_ids(stop_tokens, lm.config.V)
    pending = [request for request in requests(lm, prompts, decoding) if request.number >= done]
    texts: dict[tuple[int, int], Generation] = {}
    for row in rows_of(lm, pending, decoding, stops, scored=scored, draft=draft):
        texts[row.request.number, row.request.draw] = _generation(lm, row, decoding, stops)
        while all((done, draw) in texts for draw in range(decoding.n_best)):
            yield [texts.pop((done, draw)) for draw in range(decoding.n_best)]
            done += 1


def stream(
    lm: LM,
    prompt: str | Sequence[int],
    decoding: Decoding | None = None,
    *,
    stop_tokens: Iterable[int] | None = None,
    draft: LM | None = None,
    **choices: Any,
) -> Iterator[str]:
    """Yields the text that `generate` would return for the prompt, in pieces.

    A piece ends with a whole character, and contains nothing that may turn out to be part of a stop text.

    Args:
      lm: a decoder or an encoder-decoder, with its tokenizer.
      prompt: a text, or the ids of its tokens.
      decoding: how tokens are selected; None: the defaults of the model's folder.
      stop_tokens: ids of the tokens that end the text; None: those of the model.
      draft: a smaller model that proposes tokens, for speculative decoding.
      **choices: fields of `Decoding`, instead of those of `decoding`.

    Yields:
      Pieces of text.

    Raises:
      UserError: for a model that cannot generate, for wrong arguments, and for `n_best` above 1.
    """
    check_model("lm", lm)
    decoding = decoding_for(lm, decoding, choices)
    check_decoding(lm, decoding, draft)
    if lm.tokenizer is None:
        raise UserError("the model has no tokenizer, which stream requires; use generate with return_tokens=True")
    if decoding.n_best > 1:
        raise UserError(f"n_best is {decoding.n_best}, but stream generates one text; use generate, or set it to 1")
    stops = stops_of(lm) if stop_tokens is None else stop_ids(stop_tokens, lm.config.V)
    yielded = 0
    for row in rows_of(lm, requests(lm, [prompt], decoding), decoding, stops, draft=draft, check_every=STREAM_EVERY):
        text = _generation(lm, row, decoding, stops).text or ""
        if not row.ended:
            text = text.rstrip("\ufffd")
            begun = [n for stop in decoding.stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
            text = text[: len(text) - max(begun, default=0)]
        if len(text) > yielded:
            yield text[yielded:]
            yielded = len(text)


def decoding_for(lm: LM, decoding: Decoding | None, choices: dict[str, Any]) -> Decoding:
    """Returns the settings of generation: `decoding`, or the checkpoint's where it is None, with the choices applied.

    Raises UserError for a name that `Decoding` does not have, and for a value of a wrong type.
    """
    if not isinstance(decoding, Decoding | None):
        raise UserError(f"decoding is {short_repr(decoding)}; give a jaxlm.Decoding, or its fields by name")
    defaults = defaults_of(lm)
    if decoding is None:
        report(lm, defaults)
    return merge_settings(decoding, choices, defaults)


def check_decoding(lm: LM, decoding: Decoding, draft: LM | None = None) -> None:
    """Raises UserError where the model cannot generate, or not with these settings or this draft."""
    config = lm.config
    if config.structure == "encoder" or "lm" not in config.heads_on_top:
        raise UserError(
            f"a(n) {config.structure} with heads {config.heads_on_top} cannot generate; use a decoder or an "
            f"encoder-decoder with the head 'lm'"
        )
    decoding.check()
    if decoding.beams > lm.vocabulary:
        raise UserError(f"beams is {decoding.beams}, more than the {lm.vocabulary} tokens of the vocabulary; lower it")
    if draft is not None:
        check_model("draft", draft)
        if draft.config.structure != config.structure or "lm" not in draft.config.heads_on_top:
            raise UserError(
                f"the draft is a(n) {draft.config.structure} with heads {draft.config.heads_on_top}; it must be a(n) "
                f"{config.structure} with the head 'lm', like the model"
            )
        if (draft.config.vocabulary, draft.vocabulary) != (config.vocabulary, lm.vocabulary):
            raise UserError(
                f"the draft has {draft.vocabulary} tokens, the model {lm.vocabulary}; both must have the same tokenizer"
            )
        if decoding.beams > 1:
            raise UserError(f"beams is {decoding.beams}, but a draft requires beams 1; remove one of them")
    if (decoding.stop or decoding.forbidden) and lm.tokenizer is None:
        raise UserError("the model has no tokenizer, which stop and forbidden require; remove them, or set stop_tokens")


def requests(lm: LM, prompts: Sequence[Any], decoding: Decoding) -> list[Request]:
    """Returns the requests for prompts, as token ids, truncated to the model's positions where `too_long` allows it."""
    both = lm.config.structure == "encoder_decoder"
    ids = [_prompt(lm, prompt, both) for prompt in prompts]
    limit = _prompt_limit(lm, decoding)
    longest = max(map(len, ids), default=0)
    if limit is not None and longest > limit:
        if decoding.too_long == "refuse":
            raise _too_long(lm, decoding, longest, limit)
        count = sum(len(prompt) > limit for prompt in ids)
        print(f"{count} of {len(ids)} prompts, of up to {longest} tokens, are truncated to {limit}", file=sys.stderr)
        # A source is truncated at its end, as in training; a prompt that is continued, at its beginning.
        truncate = (lambda p: p[: limit - 1] + p[-1:]) if both else (lambda p: p[-limit:])
        ids = [truncate(prompt) if len(prompt) > limit else prompt for prompt in ids]
    draws = range(decoding.n_best if decoding.beams == 1 else 1)
    if not both:
        return [Request(n, draw, prompt, None) for n, prompt in enumerate(ids) for draw in draws]
    start = [start_of(lm)]
    return [Request(n, draw, start, source) for n, source in enumerate(ids) for draw in draws]


def _prompt_limit(lm: LM, decoding: Decoding) -> int | None:
    """Returns the maximum number of tokens in a prompt; None: no limit."""
    positions, both = lm.config.text_limit, lm.config.structure == "encoder_decoder"
    if decoding.max_length == 1 and both:
        raise UserError("max_length is 1 and includes the start token of the decoder; set it to at least 2")
    if positions is None:
        return decoding.max_length - 1 if decoding.max_length and not both else None
    new = decoding.max_new_tokens
    if not decoding.max_length and new >= positions:
        raise UserError(f"max_new_tokens is {new}; the model has {positions} positions: set at most {positions - 1}")
    if both:
        return lm.config.max_length
    return min(decoding.max_length, positions) - 1 if decoding.max_length else positions - new


def _too_long(lm: LM, decoding: Decoding, longest: int, limit: int) -> UserError:
    """Returns the error for a prompt that leaves too few positions."""
    positions, remedy = lm.config.max_length, f"shorten it to {limit}"
    if lm.config.structure == "encoder_decoder":
        problem = f"exceeds the model's {positions} positions"
    elif decoding.max_length:
        problem = f"leaves no room for a text in max_length {decoding.max_length} and the model's {positions} positions"
    else:
        fewer = positions - longest
        problem = f"and {decoding.max_new_tokens} new ones exceed the model's {positions} positions"
        remedy += f", set max_new_tokens to at most {fewer}" if fewer > 0 else ""
    return UserError(f"a prompt of {longest} tokens {problem}; {remedy}, or set too_long to 'truncate'")


def _prompt(lm: LM, prompt: str | Sequence[int], both: bool) -> list[int]:
    if isinstance(prompt, str):
        if lm.tokenizer is None:
            raise UserError("the model has no tokenizer; give prompts as lists of token ids")
        prompt = lm.tokenizer.encode_with_special_tokens([prompt])[0][0]
        if not (prompt or both or lm.tokenizer.bos is None):
            prompt = [lm.tokenizer.bos]  # a decoder needs at least one token
    else:
        prompt = token_ids("a prompt", prompt)
    if not prompt:
        raise UserError("a prompt is empty and the tokenizer has no BOS; give at least one token")
    invalid = [token for token in prompt if not 0 <= token < lm.config.vocabulary]
    if invalid:
        raise UserError(f"a prompt has token {short_repr(invalid[0])}; ids go from 0 to {lm.config.vocabulary - 1}")
    return prompt


def _in_vocabulary(lm: LM, tokens: Iterable[int]) -> list[int]:
    """Returns the tokens that the lm head has; files also name others, such as those of a larger vocabulary."""
    return [token for token in tokens if token < lm.config.V]


def start_of(lm: LM) -> int:
    """Returns the start token of the decoder of an encoder-decoder. Raises UserError where the model has none."""
    defaults = defaults_of(lm)
    for token in (defaults.start, lm.config.start_token):
        if token is not None and token < lm.config.V:
            return token
    if lm.tokenizer is not None:  # mBART begins with the last special token of the target, its language
        suffix = lm.tokenizer.target.suffix
        if suffix:
            return suffix[-1]
    if defaults.bos is None or defaults.bos >= lm.config.V:
        raise UserError("the model names no start token of its decoder; set config.start_token")
    return defaults.bos


def _forced_first(lm: LM) -> list[int]:
    """Returns the forced first token: that of the model's files, else the target language that the tokenizer names."""
    forced = defaults_of(lm).forced_bos
    if forced is not None:
        return [forced]
    if lm.config.structure != "encoder_decoder" or lm.tokenizer is None:
        return []
    language = lm.tokenizer.target.prefix  # NLLB: the decoder reads its start token, then the language
    return language[-1:] if language != lm.tokenizer.prefix else []


def stops_of(lm: LM) -> list[int]:
    """Returns the sorted tokens that end a text: those of the model's files, else the tokenizer's EOS."""
    stops = defaults_of(lm).eos
    if not stops and lm.tokenizer is not None and lm.tokenizer.eos is not None:
        stops = (lm.tokenizer.eos,)
    return sorted(set(stops))


def rules_of(lm: LM, decoding: Decoding, stops: Sequence[int]) -> Rules:
    """Returns the rules by which the compiled programs choose tokens."""
    defaults = defaults_of(lm)
    filled = lambda tokens: np.array([*tokens, *[NO_TOKEN] * (_bucket(len(tokens), 1) - len(tokens))], np.int32)
    filtered = bool(decoding.top_k) or decoding.top_p < 1 or decoding.min_p > 0
    sampled = decoding.temperature > 0 and decoding.beams == 1
    optional = lambda value, used: value if used else None
    forbidden = [sequence for sequence in defaults.forbidden if sequence not in [(stop,) for stop in stops]]
    forbidden += [(token,) for token in defaults.suppressed]
    forbidden = [sequence for sequence in forbidden if max(sequence) < lm.config.V]
    for text in decoding.forbidden:
        forbidden += {tuple(lm.tokenizer.target.encode(form)) for form in (text, f" {text}")}  # type: ignore
    first = _in_vocabulary(lm, _forced_first(lm))
    last, begin = _in_vocabulary(lm, defaults.forced_eos), _in_vocabulary(lm, defaults.begin_suppressed)
    has_min = len(stops) and (decoding.min_new_tokens or decoding.min_length)
    return Rules(
        vocabulary=np.int32(lm.vocabulary),
        stops_N=filled(stops),
        temperature=optional(np.float32(decoding.temperature), sampled),
        top_k=optional(np.int32(decoding.top_k or lm.config.V), sampled and filtered),
        top_p=optional(np.float32(decoding.top_p), sampled and filtered),
        min_p=optional(np.float32(decoding.min_p), sampled and filtered),
        penalty=optional(np.float32(decoding.repetition_penalty), decoding.repetition_penalty != 1),
        forbidden_NF=_sequences(sorted(set(forbidden))) if forbidden else None,
        ngram=optional(np.int32(decoding.no_repeat_ngram_size), decoding.no_repeat_ngram_size),
        begin_N=optional(filled(begin), begin),
        min_new=optional(np.int32(decoding.min_new_tokens), has_min),
        min_length=optional(np.int32(decoding.min_length), has_min),
        first=np.int32(first[0]) if first else None,
        last_N=optional(filled(last), last),
    )


def _sequences(forbidden: Sequence[tuple[int, ...]]) -> np.ndarray:
    width = _bucket(max(map(len, forbidden)), 1)
    rows = [(-1,) * (width - len(tokens)) + tokens for tokens in forbidden if tokens]
    return np.array(rows + rows[:1] * (_bucket(len(rows), 1) - len(rows)), np.int32)


def rows_of(
    lm: LM,
    pending: Sequence[Request],
    decoding: Decoding,
    stops: Sequence[int],
    *,
    scored: bool = False,
    draft: LM | None = None,
    check_every: int = 0,
) -> Iterator[TokenRow]:
    """Yields each text when it ends; with `check_every`, also the incomplete texts every `check_every` tokens."""
    if not pending:
        return
    if not (decoding.max_new_tokens or decoding.max_length):
        n_draws = decoding.n_best if decoding.beams > 1 else 1
        for request in pending:
            yield from (TokenRow(request._replace(draw=request.draw + n), [], [], 0.0) for n in range(n_draws))
    elif decoding.beams > 1:
        yield from _beam_search(lm, pending, decoding, stops)
    else:
        yield from _decode(lm, pending, decoding, stops, scored, draft, check_every)


def _beam_search(lm: LM, pending: Sequence[Request], decoding: Decoding, stops: Sequence[int]) -> Iterator[TokenRow]:
    """Yields texts by beam search, in batches of prompts with similar lengths."""
    run, search = lm.programs.get(programs, lm.module), lm.programs.get(search_of, lm.module)
    params, rules = inference_params(lm), rules_of(lm, decoding, stops)
    M, B = decoding.beams, divisible_rows(lm, max(1, MAX_ROWS // decoding.beams))
    # Each beam has one candidate for each stop token that ends the text.
    candidates = min(max(2, 1 + len(stops)) * M, M * lm.config.V)
    ordered = sorted(pending, key=lambda request: len(request.source or request.tokens))
    for batch in chunks(ordered, B):
        length = cache_length(lm, batch, decoding)
        state = run.prefill(params, prompts_of(lm, batch, batch, decoding), length=length, cache=decoding.cache)
        penalty, early = np.float32(decoding.length_penalty), np.int32(EARLY[decoding.early_stopping])
        hypotheses = search(params, state, rules, penalty, early, beams=M, candidates=candidates)
        tokens_BMT, log_probs_BMT, lengths_BM, scores_BM = hosts.to_numpy(hypotheses)
        for b, request in enumerate(batch):
            for m in range(decoding.n_best):
                new = np.s_[b, m, len(request.tokens) : lengths_BM[b, m]]
                row = tokens_BMT[new].tolist(), log_probs_BMT[new].tolist()
                yield TokenRow(request._replace(draw=m), *row, float(scores_BM[b, m]))


def _decode(
    lm: LM,
    pending: Sequence[Request],
    decoding: Decoding,
    stops: Sequence[int],
    scored: bool,
    draft: LM | None,
    check_every: int,
) -> Iterator[TokenRow]:
    """Yields texts by greedy decoding or sampling; a row whose text has ended gets the next request."""
    run, params, rules = lm.programs.get(programs, lm.module), inference_params(lm), rules_of(lm, decoding, stops)
    length, max_length = 0, cache_length(lm, pending, decoding)
    if draft is not None:
        run, params = lm.programs.get(speculative, lm.module, draft.module), (params, inference_params(draft))
        length = max_length = _bucket(max(limit_of(lm, request, decoding) for request in pending) + DRAFTED)
    B = divisible_rows(lm, min(len(pending), MAX_ROWS))
    if draft is None:
        B = max(B, MIN_DECODED_ROWS.get(backend_of(lm.module.constrain.mesh).platform, 1))
    # Without requests to add or stop texts to find, all rows are decoded to their end in one call.
    longest = max(limit_of(lm, request, decoding) - len(request.tokens) for request in pending)
    n = check_every or (CHECK_EVERY if len(pending) > B or decoding.stop else longest)
    queue = list(pending[::-1])
    rows: list[Request | None] = [None] * B
    state: Any = None
    lengths_B = np.zeros(B, int)
    while queue or any(rows):
        free = [b for b, request in enumerate(rows) if request is None][: len(queue)]
        if free:
            added = [queue.pop() for _ in free]
            for b, request in zip(free, added):
                rows[b] = request
                lengths_B[b] = len(request.tokens)
            needed = min(max_length, _bucket(max(len(request.tokens) for request in added) + 1, MIN_ROOM))
            if state is not None and needed > length:
                state = run.grow(state, length=needed)
            length = max(length, needed)
            room = {"length": length, "scored": scored, "cache": decoding.cache}
            new_rows = run.prefill(params, prompts_of(lm, added, pending, decoding), **room)
            if state is None:
                state = new_rows if len(new_rows.lengths_B) >= B else run.repeat(new_rows, rows=B)
            else:
                at = np.array(free + [B] * (len(new_rows.lengths_B) - len(free)), np.int32)
                state = run.insert(state, at, new_rows)
        left = length - int(max(lengths_B[b] for b, request in enumerate(rows) if request))
        if not left:
            longer = min(2 * length, max_length)
            state, left, length = run.grow(state, length=longer), longer - length, longer
        state = run.advance(params, state, rules, np.int32(min(n, left) if draft is None else n))
        current = state.done_B, state.lengths_B, state.tokens_BT, state.log_probs_BT if scored else ()
        done_B, lengths_B, tokens_BT, log_probs_BT = hosts.to_numpy(current)
        done_B, lengths_B = done_B.copy(), lengths_B.copy()  # writable copies
        for b, request in [(b, request) for b, request in enumerate(rows) if request is not None]:
            new = np.s_[b, len(request.tokens) : lengths_B[b]]
            tokens = tokens_BT[new].tolist()
            if decoding.stop and not done_B[b] and _find_stop(text_of(lm, request, tokens), decoding.stop) is not None:
                done_B[b] = True
                state = state._replace(done_B=done_B.copy())
            rows[b] = None if done_B[b] else request
            if done_B[b] or check_every:
                log_probs = log_probs_BT[new].tolist() if scored else []
                yield TokenRow(request, tokens, log_probs, sum(log_probs), bool(done_B[b]))


def limit_of(lm: LM, request: Request, decoding: Decoding) -> int:
    """Returns the maximum number of tokens of a text in the decoder, including its prompt or start token."""
    if decoding.max_length:
        return min(decoding.max_length, lm.config.text_limit or decoding.max_length)
    return len(request.tokens) + decoding.max_new_tokens


def cache_length(lm: LM, pending: Sequence[Request], decoding: Decoding) -> int:
    """Returns the number of cache slots for the longest of these texts."""
    length = _bucket(max(limit_of(lm, request, decoding) for request in pending), MIN_ROOM)
    return min(length, lm.config.decoder_config.position_limit or length)


def prompts_of(lm: LM, batch: Sequence[Request], pending: Sequence[Request], decoding: Decoding) -> Prompts:
    """Returns the arrays of the requests in `batch`.

    The number of rows is a power of two, unless the batch has all pending requests or the maximum number of rows, and a
    multiple of the parts that the mesh splits rows into. Rows after the last request are padding.
    """
    B = len(batch) if len(batch) in (len(pending), divisible_rows(lm, MAX_ROWS)) else _bucket(len(batch), 1)
    B = divisible_rows(lm, B)
    T = min(_bucket(max(len(request.tokens) for request in batch)), cache_length(lm, pending, decoding))
    tokens_BT, lengths_B, limits_B = np.zeros((B, T), np.int32), np.ones(B, np.int32), np.ones(B, np.int32)
    numbers_B2 = np.zeros((B, 2), np.int32)
    for b, request in enumerate(batch):
        tokens_BT[b, : len(request.tokens)] = request.tokens
        lengths_B[b] = len(request.tokens)
        limits_B[b] = limit_of(lm, request, decoding)
        numbers_B2[b] = request.number, request.draw
    source: tuple[np.ndarray, ...] = ()
    if batch[0].source is not None:
        S = _bucket(max(len(request.source or ()) for request in pending))
        S = min(S, lm.config.position_limit or S)
        source = np.zeros((B, S), np.int32), np.zeros((B, S), np.int32)
        for b, request in enumerate(batch):
            ids = request.source or ()
            source[0][b, : len(ids)], source[1][b, : len(ids)] = ids, 1
    return Prompts(tokens_BT, lengths_B, limits_B, np.uint32(decoding.seed), numbers_B2, *source)  # type: ignore


def _bucket(n: int, minimum: int = MIN_LENGTH) -> int:
    return max(minimum, 1 << (n - 1).bit_length() if n else 0)


def text_of(lm: LM, request: Request, tokens: list[int]) -> str:
    """Returns the text of new tokens, with the leading space that some tokenizers write only after other tokens."""
    decode = lm.tokenizer.target.decode  # type: ignore[union-attr]  # checked by the callers
    if request.source is None:
        prompt, whole = decode(request.tokens), decode(request.tokens + tokens)
        if whole.startswith(prompt):
            return whole[len(prompt) :]
    return decode(tokens)


def _find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Returns the index of the first stop text; None: the text has none."""
    return min((at for at in map(text.find, stops) if at >= 0), default=None)


def _generation(lm: LM, row: TokenRow, decoding: Decoding, stops: Sequence[int]) -> Generation:
    """Returns the text of a row up to its end."""
    size = next((n for n, token in enumerate(row.tokens) if token in stops), len(row.tokens))
    tokens, text = row.tokens[:size], None
    if lm.tokenizer is not None:
        text = text_of(lm, row.request, tokens)
        end = _find_stop(text, decoding.stop)
        if end is not None:
            text = text[:end]
            # A token that has a part of the stop text is dropped.
            while tokens and len(text_of(lm, row.request, tokens)) > end:
                tokens = tokens[:-1]
    return Generation(text, tokens, row.log_probs[: len(tokens)], row.score)
