"""Encodes rendered chats so that no character written by a user becomes part of a control token."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple
from unicodedata import category

if TYPE_CHECKING:
    import tokenizers

    from jaxlm.data.tokenizers.tokenizer import Tokenizer

Span = tuple[int, int]  # characters [start, end)
_STAND_IN = 0xD0000  # first of the characters that replace control tokens, in an unassigned plane of Unicode
_UNUSED = re.compile("[\U000d0000-\U000dffff]")
_LETTER, _SIGN = re.compile(r"\w"), re.compile(r"[^\w\s]")


class Rendered(NamedTuple):
    """The text of a chat, with the spans written by users and the spans of the assistant's answers, in order."""

    text: str
    users: list[Span]
    answers: list[Span]


class _Control(NamedTuple):
    """The control tokens of a tokenizer, and two ways to encode.

    All added tokens are control tokens, special or not, except white space, which is common in source code, and words.
    A word is a token of letters and digits that is not special, has no role and does not occur in the template.

    Attributes:
      contents: id -> text.
      strips: id -> whether the token includes white space before it, and after it.
      pattern: matches control tokens in text that the template wrote.
      exact: tokenizer that recognises all control tokens, as transformers does.
      stand_ins: text -> the character that replaces it.
      guarded: tokenizer that recognises only the replacement characters as control tokens.
      unknown: id of the token for unknown characters.
      normalized: whether text is normalized before some of the control tokens are matched.
    """

    contents: dict[int, str]
    strips: dict[int, tuple[bool, bool]]
    pattern: re.Pattern[str]
    exact: tokenizers.Tokenizer
    stand_ins: dict[str, str]
    guarded: tokenizers.Tokenizer
    unknown: int | None
    normalized: bool


def control_pattern(tokenizer: Tokenizer, source: str) -> re.Pattern[str]:
    """Returns a pattern that matches the control tokens of a tokenizer in text written by the template `source`."""
    return _control(tokenizer, source).pattern


@lru_cache(maxsize=8)
def _control(tokenizer: Tokenizer, source: str) -> _Control:
    from tokenizers import Tokenizer as Backend

    described = json.loads(tokenizer.backend.to_str())
    described |= {"post_processor": None, "truncation": None, "padding": None}
    exact = Backend.from_str(json.dumps(described))
    unknown = described["model"].get("unk_token")
    roles, source = set(tokenizer.special.values()), source.casefold()
    is_special = lambda token: token["special"] or token["content"] in roles
    tokens = [token for token in described["added_tokens"] if _is_control(token["content"], is_special(token), source)]
    stand_ins = {token["content"]: chr(_STAND_IN + n) for n, token in enumerate(tokens)}
    longest = sorted(tokens, key=lambda token: len(token["content"]), reverse=True)
    alone = lambda token: r"(?<!\w){}(?!\w)" if token["single_word"] else "{}"
    pattern = "|".join(alone(token).format(re.escape(token["content"])) for token in longest)
    contents = {token["id"]: token["content"] for token in tokens}
    normalized = described["normalizer"] is not None and any(token["normalized"] for token in tokens)
    _rename(described, stand_ins)
    return _Control(
        contents,
        {token["id"]: (token["lstrip"], token["rstrip"]) for token in tokens},
        re.compile(pattern or "(?!)"),
        exact,
        stand_ins,
        Backend.from_str(json.dumps(described)),
        exact.token_to_id(unknown) if unknown else _unknown(described),
        normalized,
    )


def _is_control(content: str, special: bool, source: str) -> bool:
    bare = content.replace("\u2581", " ")
    if not bare.strip():
        return False
    is_word = all(category(char)[0] in "LMNZ" for char in bare)  # letters, marks, digits, spaces
    return special or not is_word or content.casefold() in source


def _unknown(described: dict) -> int | None:
    found = described["model"].get("unk_id")
    return found if isinstance(found, int) else None


def _rename(described: dict, names: dict[str, str]) -> None:
    """Renames control tokens in the description of a tokenizer, in place, so that no text of a user matches them."""
    for token in described["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "normalized": False, "single_word": False, "special": True}
    model = described["model"]
    rename = lambda piece: names.get(piece, piece)
    if isinstance(model["vocab"], dict):
        model["vocab"] = {rename(piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[rename(piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = rename(model["unk_token"])
    if "merges" in model:
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if not names.keys() & {*pair, "".join(pair)}]


def encode(tokenizer: Tokenizer, source: str, chats: Sequence[Rendered]) -> list[tuple[list[int], list[bool]]]:
    """Returns the ids [T] of each chat, and which of them are in the assistant's answers [T].

    The ids are the same as in transformers, unless a control token would contain a character written by a user. In this
    case the control tokens written by the template are kept, and all other text is encoded without control tokens.

    Args:
      tokenizer: the tokenizer.
      source: the template that rendered the chats.
      chats: the rendered chats.
    """
    control = _control(tokenizer, source)
    found = []
    encodings = control.exact.encode_batch([chat.text for chat in chats], add_special_tokens=False)
    for chat, encoding in zip(chats, encodings):
        matches = list(_matches(control, chat, encoding))
        if any(match.of_user for match in matches) or _is_lost(control, chat, matches):
            found.append(_encode_guarded(control, chat))
        else:
            found.append((encoding.ids, _in_answers(encoding.offsets, chat.answers)))
    return found


class _Match(NamedTuple):
    """A control token in a text: its id, its characters [start, end), and whether a user wrote any of them."""

    token: int
    start: int
    end: int
    of_user: bool


def _matches(control: _Control, chat: Rendered, encoding: tokenizers.Encoding) -> Iterator[_Match]:
    """Yields the control tokens of an encoding, without the surrounding white space that they include."""
    ends = [end for _, end in chat.users]
    for token, (start, end) in zip(encoding.ids, encoding.offsets):
        if token not in control.contents:
            continue
        if token == control.unknown and chat.text[start:end] != control.contents[token]:
            continue  # an unknown character
        before, after = control.strips[token]
        if before and not control.contents[token][0].isspace():
            start = end - len(chat.text[start:end].lstrip())
        if after and not control.contents[token][-1].isspace():
            end = start + len(chat.text[start:end].rstrip())
        n = bisect_right(ends, start)  # the first span of a user that ends after the start
        yield _Match(token, start, end, n < len(ends) and chat.users[n][0] < end)


def _of_template(control: _Control, chat: Rendered) -> list[_Match]:
    """Returns the control tokens that the template wrote, found with harmless text in place of text of users."""
    bounds = [0, *(bound for span in chat.users for bound in span), len(chat.text)]
    parts = [chat.text[start:end] for start, end in zip(bounds, bounds[1:])]
    parts[1::2] = [_SIGN.sub(".", _LETTER.sub("x", part)) for part in parts[1::2]]
    harmless = chat._replace(text=(text := "".join(parts)))
    matches = _matches(control, harmless, control.exact.encode(text, add_special_tokens=False))
    return [match for match in matches if not match.of_user]


def _is_lost(control: _Control, chat: Rendered, matches: Sequence[_Match]) -> bool:
    """Returns whether the text of a user prevents a control token of the template from being recognised.

    A combining character does so if the text is normalized before the token is matched.
    """
    return control.normalized and not chat.text.isascii() and not set(_of_template(control, chat)) <= set(matches)


def _encode_guarded(control: _Control, chat: Rendered) -> tuple[list[int], list[bool]]:
    """Returns `encode` of one chat, with control tokens only where the template wrote them."""
    text = _UNUSED.sub("\ufffd", chat.text)
    tokens = _of_template(control, chat)
    parts: list[str] = []
    olds, news = [0], [0]  # positions in the old text, and the corresponding ones in the new text
    for token, start, end, _ in tokens:
        parts += [text[olds[-1] : start], control.stand_ins[control.contents[token]]]
        olds.append(end)
        news.append(news[-1] + len(parts[-2]) + 1)
    parts.append(text[olds[-1] :])

    def new_position(old: int) -> int:
        n = bisect_right(olds, old) - 1
        position = news[n] + old - olds[n]
        return position if n + 1 == len(news) else min(position, news[n + 1] - 1)

    encoding = control.guarded.encode("".join(parts), add_special_tokens=False)
    answers = [(new_position(start), new_position(end)) for start, end in chat.answers]
    return encoding.ids, _in_answers(encoding.offsets, answers)


def _in_answers(offsets: Sequence[Span], answers: Sequence[Span]) -> list[bool]:
    """Returns for each token whether any part of it is in an answer, as in transformers."""
    found, n = [], 0
    for start, end in offsets:
        while n < len(answers) and start >= answers[n][1]:
            n += 1
        found.append(n < len(answers) and end > answers[n][0])
    return found
