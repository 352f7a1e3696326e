"""Ids of rendered chats, in which no character of a user becomes part of a control token."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple
from unicodedata import category

if TYPE_CHECKING:
    import tokenizers

    from jaxlm.data.tokenizer import Tokenizer

Span = tuple[int, int]  # characters [start, end)
_STAND_IN = 0xD0000  # the first of the characters that stand for control tokens, in a plane that Unicode does not use
_UNUSED = re.compile("[\U000d0000-\U000dffff]")


class Rendered(NamedTuple):
    """The text of a chat, what users wrote in it, and what the assistant says in it, in order."""

    text: str
    users: list[Span]
    answers: list[Span]


class _Control(NamedTuple):
    """The control tokens of a tokenizer, and two ways to encode.

    Every added token is one, special or not, but for those of white space alone, which are common in source code, and
    for words: those of letters and digits alone that are not special and that the template does not have.
    """

    contents: dict[int, str]  # id -> text
    strips: dict[int, tuple[bool, bool]]  # id -> whether white space before, and behind, belongs to it
    pattern: re.Pattern[str]  # finds them in text of the template
    exact: tokenizers.Tokenizer  # takes all of them for tokens, as transformers does
    stand_ins: dict[str, str]  # text -> the character that stands for it
    guarded: tokenizers.Tokenizer  # takes for tokens the characters that stand for them alone
    unknown: int | None  # id of what the vocabulary does not have


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
    tokens = [token for token in described["added_tokens"] if _is_control(token["content"], token["special"], source)]
    stand_ins = {token["content"]: chr(_STAND_IN + n) for n, token in enumerate(tokens)}
    longest = sorted(tokens, key=lambda token: len(token["content"]), reverse=True)
    alone = lambda token: r"(?<!\w){}(?!\w)" if token["single_word"] else "{}"
    pattern = "|".join(alone(token).format(re.escape(token["content"])) for token in longest)
    _rename(described, stand_ins)
    return _Control(
        {token["id"]: token["content"] for token in tokens},
        {token["id"]: (token["lstrip"], token["rstrip"]) for token in tokens},
        re.compile(pattern or "(?!)"),
        exact,
        stand_ins,
        Backend.from_str(json.dumps(described)),
        exact.token_to_id(unknown) if unknown else _unknown(described),
    )


def _is_control(content: str, special: bool, source: str) -> bool:
    bare = content.replace("\u2581", " ")
    if not bare.strip():
        return False
    is_word = all(category(char)[0] in "LMNZ" for char in bare)  # letters, marks, digits, spaces
    return special or content in source or not is_word


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
        if _is_forged(control, chat, encoding):
            found.append(_guarded(control, chat))
        else:
            found.append((encoding.ids, _in_answers(encoding.offsets, chat.answers)))
    return found


def _is_forged(control: _Control, chat: Rendered, encoding: tokenizers.Encoding) -> bool:
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
        if n < len(ends) and chat.users[n][0] < end:
            return True
    return False


def _guarded(control: _Control, chat: Rendered) -> tuple[list[int], list[bool]]:
    """`encode` of one chat, in which the template's control tokens are found where no user wrote anything."""
    text = _UNUSED.sub("\ufffd", chat.text)
    bounds = [0, *(bound for span in chat.users for bound in span), len(text)]
    tokens = [
        match for start, end in zip(bounds[::2], bounds[1::2]) for match in control.pattern.finditer(text, start, end)
    ]
    parts: list[str] = []
    olds, news = [0], [0]  # places of the old text, and where they are in the new one
    for match in tokens:
        parts += [text[olds[-1] : match.start()], control.stand_ins[match[0]]]
        olds.append(match.end())
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
