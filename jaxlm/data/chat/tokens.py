"""Ids of rendered chats, in which no character of a user becomes part of a control token."""

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
_STAND_IN = 0xD0000  # the first of the characters that stand for control tokens, in a plane that Unicode does not use
_UNUSED = re.compile("[\U000d0000-\U000dffff]")
_LETTER, _SIGN = re.compile(r"\w"), re.compile(r"[^\w\s]")


class Rendered(NamedTuple):
    """The text of a chat, what users wrote in it, and what the assistant says in it, in order."""

    text: str
    users: list[Span]
    answers: list[Span]


class _Control(NamedTuple):
    """The control tokens of a tokenizer, and two ways to encode.

    Every added token is one, special or not, but for those of white space alone, which are common in source code, and
    for words: those of letters and digits alone that are not special, have no role and are not in the template.
    """

    contents: dict[int, str]  # id -> text
    strips: dict[int, tuple[bool, bool]]  # id -> whether white space before, and behind, belongs to it
    pattern: re.Pattern[str]  # finds them in text of the template
    exact: tokenizers.Tokenizer  # takes all of them for tokens, as transformers does
    stand_ins: dict[str, str]  # text -> the character that stands for it
    guarded: tokenizers.Tokenizer  # takes for tokens the characters that stand for them alone
    unknown: int | None  # id of what the vocabulary does not have
    normalized: bool  # whether normal forms are made before some of them are found


def control_pattern(tokenizer: Tokenizer, source: str) -> re.Pattern[str]:
    """Returns what finds the control tokens of a tokenizer in text that a template wrote."""
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
    """Gives control tokens other names in the description of a tokenizer, so that no text of a user spells one."""
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
    """Returns the ids [T] of each chat, and which of them the assistant says [T].

    The ids are those of transformers, unless one of them would be a control token with a character of a user in it.
    Then the control tokens that the template wrote are kept, and all other text is encoded without control tokens.
    """
    control = _control(tokenizer, source)
    found = []
    encodings = control.exact.encode_batch([chat.text for chat in chats], add_special_tokens=False)
    for chat, encoding in zip(chats, encodings):
        places = list(_places(control, chat, encoding))
        if any(place.of_user for place in places) or _is_lost(control, chat, places):
            found.append(_guarded(control, chat))
        else:
            found.append((encoding.ids, _in_answers(encoding.offsets, chat.answers)))
    return found


class _Place(NamedTuple):
    """A control token in a text: its id, its characters [start, end), and whether a user wrote one of them."""

    token: int
    start: int
    end: int
    of_user: bool


def _places(control: _Control, chat: Rendered, encoding: tokenizers.Encoding) -> Iterator[_Place]:
    """Yields the control tokens of an encoding, without the white space around them that belongs to them."""
    ends = [end for _, end in chat.users]
    for token, (start, end) in zip(encoding.ids, encoding.offsets):
        if token not in control.contents:
            continue
        if token == control.unknown and chat.text[start:end] != control.contents[token]:
            continue  # a character that the vocabulary does not have
        before, behind = control.strips[token]
        if before and not control.contents[token][0].isspace():
            start = end - len(chat.text[start:end].lstrip())
        if behind and not control.contents[token][-1].isspace():
            end = start + len(chat.text[start:end].rstrip())
        n = bisect_right(ends, start)  # the first text of a user that ends behind the start
        yield _Place(token, start, end, n < len(ends) and chat.users[n][0] < end)


def _of_template(control: _Control, chat: Rendered) -> list[_Place]:
    """Returns the control tokens that the template wrote, as they are found where users write harmless text."""
    bounds = [0, *(bound for span in chat.users for bound in span), len(chat.text)]
    parts = [chat.text[start:end] for start, end in zip(bounds, bounds[1:])]
    parts[1::2] = [_SIGN.sub(".", _LETTER.sub("x", part)) for part in parts[1::2]]
    harmless = chat._replace(text=(text := "".join(parts)))
    places = _places(control, harmless, control.exact.encode(text, add_special_tokens=False))
    return [place for place in places if not place.of_user]


def _is_lost(control: _Control, chat: Rendered, places: Sequence[_Place]) -> bool:
    """Returns whether a user's text takes a control token from the template.

    A character that combines with the one before it does, where normal forms are made before such a token is found.
    """
    return control.normalized and not chat.text.isascii() and not set(_of_template(control, chat)) <= set(places)


def _guarded(control: _Control, chat: Rendered) -> tuple[list[int], list[bool]]:
    """`encode` of one chat, in which the template's control tokens are found where no user wrote anything."""
    text = _UNUSED.sub("\ufffd", chat.text)
    tokens = _of_template(control, chat)
    parts: list[str] = []
    olds, news = [0], [0]  # places of the old text, and where they are in the new one
    for token, start, end, _ in tokens:
        parts += [text[olds[-1] : start], control.stand_ins[control.contents[token]]]
        olds.append(end)
        news.append(news[-1] + len(parts[-2]) + 1)
    parts.append(text[olds[-1] :])

    def moved(place: int) -> int:
        n = bisect_right(olds, place) - 1
        inside = news[n] + place - olds[n]
        return inside if n + 1 == len(news) else min(inside, news[n + 1] - 1)

    encoding = control.guarded.encode("".join(parts), add_special_tokens=False)
    answers = [(moved(start), moved(end)) for start, end in chat.answers]
    return encoding.ids, _in_answers(encoding.offsets, answers)


def _in_answers(offsets: Sequence[Span], answers: Sequence[Span]) -> list[bool]:
    """Returns for each token whether a part of it is in an answer, as in transformers."""
    found, n = [], 0
    for start, end in offsets:
        while n < len(answers) and start >= answers[n][1]:
            n += 1
        found.append(n < len(answers) and end > answers[n][0])
    return found
