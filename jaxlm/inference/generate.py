"""Generation: prompts in, texts out.  What is compiled stands in `decode`; here is what surrounds it.

Prompts, sources and caches have lengths of few sizes, so that few programs are compiled.  A long list of prompts is
decoded continuously: where a text has ended, the next prompt takes its row.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxlm.config import Decoding
from jaxlm.config.arguments import check_model, listed, stop_ids, token_ids
from jaxlm.config.ranges import shown
from jaxlm.devices import hosts
from jaxlm.errors import UserError
from jaxlm.inference.beam import EARLY, search_of
from jaxlm.inference.decode import NOTHING, Prompts, Rules, programs
from jaxlm.inference.encode import params_of
from jaxlm.inference.generation_defaults import chosen, defaults_of, report
from jaxlm.inference.speculative import DRAFTED, speculative

if TYPE_CHECKING:
    from jaxlm.lm import LM

SHORTEST = 32  # lengths are rounded up to this or a power of two
ROOM = 64  # tokens that there is room for at first, if prompts are shorter; doubled whenever it is used up
ROWS = 32  # texts that are decoded at once
LOOK = 16  # tokens after which rows are looked at, where some may end before others
PIECE = 4  # tokens of a piece of a stream


class Generation(NamedTuple):
    """A text that was generated, without its prompt.

    text: None without a tokenizer.  tokens: without the stop token.  log_probs: of each token under the model, before
    temperature and the like.  score: of a beam search what it ranked by, else the log-probability of the text with its
    end.
    """

    text: str | None
    tokens: list[int]
    log_probs: list[float]
    score: float


class Request(NamedTuple):
    """A text to be generated: the number of its prompt, its own among those of the prompt, what the decoder reads
    first, and what the encoder reads, where there is one."""

    number: int
    draw: int
    tokens: list[int]
    source: list[int] | None


class TokenRow(NamedTuple):
    """A text as it was decoded, stop token included where it came."""

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
    """Continues each prompt, or of an encoder-decoder, writes its answer to each; returns the texts without prompts.

    prompts: strings, framed as the model expects, or lists of token ids, used as given.
    decoding: how; None: as the checkpoint's generation_config.json says, which is reported on stderr, and where it
    says nothing as `Decoding()`.  choices: fields of it by name, such as `temperature=0.7`, which win.
    stop_tokens: a text ends before the first of these; None: those that the model names, (): none.
    return_tokens: lists of ids instead of strings.  details: a `Generation` for each text.
    draft: a smaller model with the same tokens, which makes it faster and changes nothing else; not for beams.
    Where n_best is above 1, each prompt has a list of as many texts.

    Raises UserError where a choice is out of its range, where a prompt is empty, has ids outside the vocabulary or
    leaves too few positions, or where the model cannot generate.
    """
    check_model("lm", lm)
    prompts = [*listed("prompts", prompts, "prompts")]
    decoding = decoding_for(lm, decoding, choices)
    check(lm, decoding, draft)
    if lm.tokenizer is None and not (return_tokens or details):
        raise UserError("the model has no tokenizer; give prompts as lists of token ids, with return_tokens=True")
    plain = lambda told: told if details else told.tokens if return_tokens else told.text
    texts = in_order(lm, prompts, decoding, stop_tokens=stop_tokens, scored=details, draft=draft)
    shown = [[plain(told) for told in several] for several in texts]
    return shown if decoding.n_best > 1 else [one for (one,) in shown]


def in_order(
    lm: LM,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    stop_tokens: Iterable[int] | None = None,
    scored: bool = False,
    draft: LM | None = None,
    done: int = 0,
) -> Iterator[list[Generation]]:
    """The n_best texts of each prompt but the first `done`, in their order, as soon as they are known."""
    stops = stops_of(lm) if stop_tokens is None else stop_ids(stop_tokens, lm.config.V)
    wanted = [request for request in requests(lm, prompts, decoding) if request.number >= done]
    found: dict[tuple[int, int], Generation] = {}
    for row in rows_of(lm, wanted, decoding, stops, scored=scored, draft=draft):
        found[row.request.number, row.request.draw] = _told(lm, row, decoding, stops)
        while all((done, draw) in found for draw in range(decoding.n_best)):
            yield [found.pop((done, draw)) for draw in range(decoding.n_best)]
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
    """The text that `generate` would give for the prompt, in pieces, as they come.

    A piece ends with a whole character, and has nothing of what may yet turn out to be a stop.
    """
    check_model("lm", lm)
    decoding = decoding_for(lm, decoding, choices)
    check(lm, decoding, draft)
    if lm.tokenizer is None:
        raise UserError("the model has no tokenizer, and a stream is of text; use generate with return_tokens=True")
    if decoding.n_best > 1:
        raise UserError(f"n_best is {decoding.n_best}, but a stream is of one text; use generate, or set it to 1")
    stops = stops_of(lm) if stop_tokens is None else stop_ids(stop_tokens, lm.config.V)
    shown = 0
    for row in rows_of(lm, requests(lm, [prompt], decoding), decoding, stops, draft=draft, look=PIECE):
        text = _told(lm, row, decoding, stops).text or ""
        if not row.ended:
            text = text.rstrip("\ufffd")
            begun = [n for stop in decoding.stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
            text = text[: len(text) - max(begun, default=0)]
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)


def decoding_for(lm: LM, decoding: Decoding | None, choices: dict[str, Any]) -> Decoding:
    """Returns how the texts of a model are generated: by `decoding`, or where it is None by what the checkpoint says,
    but for the choices.  Raises UserError for a name that `Decoding` does not have, and for a value of a wrong kind."""
    if not isinstance(decoding, Decoding | None):
        raise UserError(f"decoding is {shown(decoding)}; give a jaxlm.Decoding, or its fields by name")
    defaults = defaults_of(lm)
    if decoding is None:
        report(lm, defaults)
    return chosen(decoding, choices, defaults)


def check(lm: LM, decoding: Decoding, draft: LM | None = None) -> None:
    """Raises UserError where the model cannot generate, or not so."""
    config = lm.config
    if config.structure == "encoder" or "lm" not in config.heads_on_top:
        raise UserError(
            f"a(n) {config.structure} with heads {config.heads_on_top} cannot generate; it takes a decoder or an "
            f"encoder-decoder with the head 'lm'"
        )
    decoding.check()
    if decoding.beams > lm.vocabulary:
        raise UserError(
            f"beams is {decoding.beams}, more than the {lm.vocabulary} tokens of the vocabulary; take fewer"
        )
    if draft is not None:
        check_model("draft", draft)
        if draft.config.structure != config.structure or "lm" not in draft.config.heads_on_top:
            raise UserError(
                f"the draft is a(n) {draft.config.structure} with heads {draft.config.heads_on_top}; it must be a(n) "
                f"{config.structure} with the head 'lm', as the model"
            )
        if (draft.config.vocabulary, draft.vocabulary) != (config.vocabulary, lm.vocabulary):
            raise UserError(
                f"the draft has {draft.vocabulary} tokens, the model {lm.vocabulary}; both must have the same tokenizer"
            )
        if decoding.beams > 1:
            raise UserError(f"beams is {decoding.beams}, but a draft is for sampling and greedy texts; leave one out")
    if (decoding.stop or decoding.forbidden) and lm.tokenizer is None:
        raise UserError(
            "the model has no tokenizer, which stop and forbidden are read by; give stop_tokens, or neither"
        )


def requests(lm: LM, prompts: Sequence[Any], decoding: Decoding) -> list[Request]:
    """What is to be generated, with each prompt as ids, within the positions that there are."""
    both = lm.config.structure == "encoder_decoder"
    ids = [_prompt(lm, prompt, both) for prompt in prompts]
    room = _prompt_room(lm, decoding)
    longest = max(map(len, ids), default=0)
    if room is not None and longest > room:
        if decoding.too_long == "refuse":
            raise _too_long(lm, decoding, longest, room)
        count = sum(len(prompt) > room for prompt in ids)
        print(f"{count} of {len(ids)} prompts, of up to {longest} tokens, are cut to {room}", file=sys.stderr)
        # Of a source the end of its text goes, as in training; of what is to be continued, the beginning.
        cut = (lambda p: p[: room - 1] + p[-1:]) if both else (lambda p: p[-room:])
        ids = [cut(prompt) if len(prompt) > room else prompt for prompt in ids]
    draws = range(decoding.n_best if decoding.beams == 1 else 1)
    if not both:
        return [Request(n, draw, prompt, None) for n, prompt in enumerate(ids) for draw in draws]
    start = [start_of(lm)]
    return [Request(n, draw, start, source) for n, source in enumerate(ids) for draw in draws]


def _prompt_room(lm: LM, decoding: Decoding) -> int | None:
    """Tokens of a prompt, at the most; None: any number."""
    positions, both = lm.config.text_limit, lm.config.structure == "encoder_decoder"
    if decoding.max_length == 1 and both:
        raise UserError("max_length is 1, and the token that the decoder begins with counts; give at least 2")
    if positions is None:
        return decoding.max_length - 1 if decoding.max_length and not both else None
    new = decoding.max_new_tokens
    if not decoding.max_length and new >= positions:
        raise UserError(
            f"max_new_tokens is {new}; the model has {positions} positions: ask for at most {positions - 1}"
        )
    if both:
        return positions
    return min(decoding.max_length, positions) - 1 if decoding.max_length else positions - new


def _too_long(lm: LM, decoding: Decoding, longest: int, room: int) -> UserError:
    """The error of a prompt that leaves too few positions."""
    positions, remedy = lm.config.max_length, f"shorten it to {room}"
    if lm.config.structure == "encoder_decoder":
        what = f"exceeds the model's {positions} positions"
    elif decoding.max_length:
        what = f"leaves no room for a text in max_length {decoding.max_length} and the model's {positions} positions"
    else:
        fewer = positions - longest
        what = f"and {decoding.max_new_tokens} new ones exceed the model's {positions} positions"
        remedy += f", ask for at most {fewer}" if fewer > 0 else ""
    return UserError(f"a prompt of {longest} tokens {what}; {remedy}, or set too_long to 'truncate'")


def _prompt(lm: LM, prompt: str | Sequence[int], both: bool) -> list[int]:
    if isinstance(prompt, str):
        if lm.tokenizer is None:
            raise UserError("the model has no tokenizer; give prompts as lists of token ids")
        prompt = lm.tokenizer.frame([prompt])[0][0]
        if not (prompt or both or lm.tokenizer.bos is None):
            prompt = [lm.tokenizer.bos]  # a decoder has to read something
    else:
        prompt = token_ids("a prompt", prompt)
    if not prompt:
        raise UserError("a prompt is empty and the tokenizer has no BOS; give at least one token")
    strange = [token for token in prompt if not 0 <= token < lm.config.vocabulary]
    if strange:
        raise UserError(f"a prompt has token {shown(strange[0])}; ids go from 0 to {lm.config.vocabulary - 1}")
    return prompt


def _in_vocabulary(lm: LM, tokens: Iterable[int]) -> list[int]:
    """The tokens that the head lm knows; files name others too, such as those of a larger vocabulary."""
    return [token for token in tokens if token < lm.config.V]


def start_of(lm: LM) -> int:
    """What the decoder of an encoder-decoder reads first."""
    said = defaults_of(lm)
    for token in (said.start, lm.config.start_token):
        if token is not None and token < lm.config.V:
            return token
    if lm.tokenizer is not None:  # mBART begins with what the text ends with, its language
        suffix = lm.tokenizer.target.suffix
        if suffix:
            return suffix[-1]
    if said.bos is None or said.bos >= lm.config.V:
        raise UserError("the model names no token that its decoder starts with; set config.start_token")
    return said.bos


def stops_of(lm: LM) -> list[int]:
    """The tokens that end a text, by the model's files, else by its tokenizer."""
    said = defaults_of(lm).eos
    if not said and lm.tokenizer is not None and lm.tokenizer.eos is not None:
        said = (lm.tokenizer.eos,)
    return sorted(set(said))


def rules_of(lm: LM, decoding: Decoding, stops: Sequence[int]) -> Rules:
    """What the compiled programs take of the choices."""
    said = defaults_of(lm)
    filled = lambda tokens: np.array([*tokens, *[NOTHING] * (_bucket(len(tokens), 1) - len(tokens))], np.int32)
    filtered = bool(decoding.top_k) or decoding.top_p < 1 or decoding.min_p > 0
    sampled = decoding.temperature > 0 and decoding.beams == 1
    some = lambda value, there: value if there else None
    forbidden = [bad for bad in said.forbidden if bad not in [(stop,) for stop in stops]]
    forbidden += [(token,) for token in said.suppressed]
    forbidden = [bad for bad in forbidden if max(bad) < lm.config.V]
    for text in decoding.forbidden:
        forbidden += {tuple(lm.tokenizer.target.encode(spelled)) for spelled in (text, f" {text}")}  # type: ignore
    first = _in_vocabulary(lm, () if said.forced_bos is None else (said.forced_bos,))
    last, begin = _in_vocabulary(lm, said.forced_eos), _in_vocabulary(lm, said.begin_suppressed)
    least = len(stops) and (decoding.min_new_tokens or decoding.min_length)
    return Rules(
        vocabulary=np.int32(lm.vocabulary),
        stops_N=filled(stops),
        temperature=some(np.float32(decoding.temperature), sampled),
        top_k=some(np.int32(decoding.top_k or lm.config.V), sampled and filtered),
        top_p=some(np.float32(decoding.top_p), sampled and filtered),
        min_p=some(np.float32(decoding.min_p), sampled and filtered),
        penalty=some(np.float32(decoding.repetition_penalty), decoding.repetition_penalty != 1),
        forbidden_NF=_sequences(sorted(set(forbidden))) if forbidden else None,
        ngram=some(np.int32(decoding.no_repeat_ngram_size), decoding.no_repeat_ngram_size),
        begin_N=some(filled(begin), begin),
        min_new=some(np.int32(decoding.min_new_tokens), least),
        min_length=some(np.int32(decoding.min_length), least),
        first=np.int32(first[0]) if first else None,
        last_N=some(filled(last), last),
    )


def _sequences(forbidden: Sequence[tuple[int, ...]]) -> np.ndarray:
    width = _bucket(max(map(len, forbidden)), 1)
    rows = [(-1,) * (width - len(tokens)) + tokens for tokens in forbidden if tokens]
    return np.array(rows + rows[:1] * (_bucket(len(rows), 1) - len(rows)), np.int32)


def rows_of(
    lm: LM,
    wanted: Sequence[Request],
    decoding: Decoding,
    stops: Sequence[int],
    *,
    scored: bool = False,
    draft: LM | None = None,
    look: int = 0,
) -> Iterator[TokenRow]:
    """The texts, each as it ends; where they are looked at after so many tokens, also before."""
    if not wanted:
        return
    if not (decoding.max_new_tokens or decoding.max_length):
        draws = range(decoding.n_best if decoding.beams > 1 else 1)
        yield from (TokenRow(request._replace(draw=request.draw + n), [], [], 0.0) for request in wanted for n in draws)
    elif decoding.beams > 1:
        yield from _searched(lm, wanted, decoding, stops)
    else:
        yield from _drawn(lm, wanted, decoding, stops, scored, draft, look)


def _searched(lm: LM, wanted: Sequence[Request], decoding: Decoding, stops: Sequence[int]) -> Iterator[TokenRow]:
    """By beam search, in batches of prompts of about the same length."""
    run, search = lm.programs.get(programs, lm.module), lm.programs.get(search_of, lm.module)
    params, rules = params_of(lm), rules_of(lm, decoding, stops)
    M, B = decoding.beams, _rows(lm, max(1, ROWS // decoding.beams))
    # Each beam has as many followers that end as there are stop tokens.
    candidates = min(max(2, 1 + len(stops)) * M, M * lm.config.V)
    ordered = sorted(wanted, key=lambda request: len(request.source or request.tokens))
    for i in range(0, len(ordered), B):
        some = ordered[i : i + B]
        state = run.prefill(params, prompts_of(lm, some, some, decoding), length=room(lm, some, decoding))
        penalty, early = np.float32(decoding.length_penalty), np.int32(EARLY[decoding.early_stopping])
        found = search(params, state, rules, penalty, early, beams=M, candidates=candidates)
        tokens_BMT, log_probs_BMT, lengths_BM, scores_BM = hosts.fetched(found)
        for b, request in enumerate(some):
            for m in range(decoding.n_best):
                new = np.s_[b, m, len(request.tokens) : lengths_BM[b, m]]
                row = tokens_BMT[new].tolist(), log_probs_BMT[new].tolist()
                yield TokenRow(request._replace(draw=m), *row, float(scores_BM[b, m]))


def _drawn(
    lm: LM,
    wanted: Sequence[Request],
    decoding: Decoding,
    stops: Sequence[int],
    scored: bool,
    draft: LM | None,
    look: int,
) -> Iterator[TokenRow]:
    """Greedily or by sampling, continuously."""
    run, params, rules = lm.programs.get(programs, lm.module), params_of(lm), rules_of(lm, decoding, stops)
    length, most = 0, room(lm, wanted, decoding)
    if draft is not None:
        run, params = lm.programs.get(speculative, lm.module, draft.module), (params, params_of(draft))
        length = most = _bucket(max(limit_of(lm, request, decoding) for request in wanted) + DRAFTED)
    B = _rows(lm, min(len(wanted), ROWS))
    # Looked at only where there is something to see before all have ended.
    longest = max(limit_of(lm, request, decoding) - len(request.tokens) for request in wanted)
    n = look or (LOOK if len(wanted) > B or decoding.stop else longest)
    waiting = list(wanted[::-1])
    rows: list[Request | None] = [None] * B
    state: Any = None
    lengths_B = np.zeros(B, int)
    while waiting or any(rows):
        free = [b for b, request in enumerate(rows) if request is None][: len(waiting)]
        if free:
            taken = [waiting.pop() for _ in free]
            for b, taker in zip(free, taken):
                rows[b] = taker
                lengths_B[b] = len(taker.tokens)
            needed = min(most, _bucket(max(len(taker.tokens) for taker in taken) + 1, ROOM))
            if state is not None and needed > length:
                state = run.grow(state, length=needed)
            length = max(length, needed)
            made = run.prefill(params, prompts_of(lm, taken, wanted, decoding), length=length, scored=scored)
            if state is None:
                state = made
            else:
                where = np.array(free + [B] * (len(made.lengths_B) - len(free)), np.int32)
                state = run.place(state, where, made)
        left = length - int(max(lengths_B[b] for b, request in enumerate(rows) if request))
        if not left:
            longer = min(2 * length, most)
            state, left, length = run.grow(state, length=longer), longer - length, longer
        state = run.advance(params, state, rules, np.int32(min(n, left) if draft is None else n))
        current = state.done_B, state.lengths_B, state.tokens_BT, state.log_probs_BT if scored else ()
        done_B, lengths_B, tokens_BT, log_probs_BT = hosts.fetched(current)
        done_B, lengths_B = done_B.copy(), lengths_B.copy()  # which are changed below
        for b, request in [(b, request) for b, request in enumerate(rows) if request is not None]:
            new = np.s_[b, len(request.tokens) : lengths_B[b]]
            tokens = tokens_BT[new].tolist()
            if decoding.stop and not done_B[b] and _cut(text_of(lm, request, tokens), decoding.stop) is not None:
                done_B[b] = True
                state = state._replace(done_B=done_B.copy())
            rows[b] = None if done_B[b] else request
            if done_B[b] or look:
                log_probs = log_probs_BT[new].tolist() if scored else []
                yield TokenRow(request, tokens, log_probs, sum(log_probs), bool(done_B[b]))


def limit_of(lm: LM, request: Request, decoding: Decoding) -> int:
    """Returns how many tokens a text has at the most, those that the decoder reads before it counted."""
    if decoding.max_length:
        return min(decoding.max_length, lm.config.text_limit or decoding.max_length)
    return len(request.tokens) + decoding.max_new_tokens


def room(lm: LM, wanted: Sequence[Request], decoding: Decoding) -> int:
    """Slots of the caches for the longest of these texts."""
    length = _bucket(max(limit_of(lm, request, decoding) for request in wanted), ROOM)
    return min(length, lm.config.position_limit or length)


def prompts_of(lm: LM, some: Sequence[Request], wanted: Sequence[Request], decoding: Decoding) -> Prompts:
    """Returns the arrays of some requests.  Their rows are a power of two unless they are all requests or fill the
    rows, and a multiple of the ways that the mesh splits rows; those past the last request are padding."""
    B = len(some) if len(some) in (len(wanted), _rows(lm, ROWS)) else _bucket(len(some), 1)
    B = _rows(lm, B)
    T = min(_bucket(max(len(request.tokens) for request in some)), room(lm, wanted, decoding))
    tokens_BT, lengths_B, limits_B = np.zeros((B, T), np.int32), np.ones(B, np.int32), np.ones(B, np.int32)
    numbers_B2 = np.zeros((B, 2), np.int32)
    for b, request in enumerate(some):
        tokens_BT[b, : len(request.tokens)] = request.tokens
        lengths_B[b] = len(request.tokens)
        limits_B[b] = limit_of(lm, request, decoding)
        numbers_B2[b] = request.number, request.draw
    source: tuple[np.ndarray, ...] = ()
    if some[0].source is not None:
        S = _bucket(max(len(request.source or ()) for request in wanted))
        S = min(S, lm.config.position_limit or S)
        source = np.zeros((B, S), np.int32), np.zeros((B, S), np.int32)
        for b, request in enumerate(some):
            ids = request.source or ()
            source[0][b, : len(ids)], source[1][b, : len(ids)] = ids, 1
    return Prompts(tokens_BT, lengths_B, limits_B, np.uint32(decoding.seed), numbers_B2, *source)  # type: ignore


def _rows(lm: LM, rows: int) -> int:
    """Returns the number of rows, rounded up to what the mesh of the model divides."""
    ways = lm.module.constrain.ways("batch")
    return -(-rows // ways) * ways


def _bucket(n: int, least: int = SHORTEST) -> int:
    return max(least, 1 << (n - 1).bit_length() if n else 0)


def text_of(lm: LM, request: Request, tokens: list[int]) -> str:
    """The text of new tokens, with the space that some tokenizers have only where something stands before it."""
    decode = lm.tokenizer.target.decode  # type: ignore[union-attr]  # checked
    if request.source is None:
        before, whole = decode(request.tokens), decode(request.tokens + tokens)
        if whole.startswith(before):
            return whole[len(before) :]
    return decode(tokens)


def _cut(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of these texts begins in it."""
    return min((at for at in map(text.find, stops) if at >= 0), default=None)


def _told(lm: LM, row: TokenRow, decoding: Decoding, stops: Sequence[int]) -> Generation:
    """The text of a row, up to its end."""
    size = next((n for n, token in enumerate(row.tokens) if token in stops), len(row.tokens))
    tokens, text = row.tokens[:size], None
    if lm.tokenizer is not None:
        text = text_of(lm, row.request, tokens)
        cut = _cut(text, decoding.stop)
        if cut is not None:
            text = text[:cut]
            while tokens and len(text_of(lm, row.request, tokens)) > cut:  # those that lie wholly before it
                tokens = tokens[:-1]
    return Generation(text, tokens, row.log_probs[: len(tokens)], row.score)
