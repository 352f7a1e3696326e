"""Lists and objects that a table holds as text: as pandas and NumPy print them, as Python and JSON write them.

    ['good', 'funny']    ["good", "funny"]    ['good' 'funny']    [1, 1, 0]    [1. 1. 0.]    ('a', 'b')    {'a', 'b'}
    array(['good', 'funny'], dtype=object)    tensor([1, 0])    [{'role': 'user', 'content': 'Hi'}]

Nothing is evaluated: strings, numbers, truth values and nothing are all that a list may hold.
"""

from __future__ import annotations

import re
from typing import Any

_MOST_NESTED = 32  # lists in lists
_SPACE = re.compile(r"[\s,]*")
_STRING = re.compile(r"""[bBuU]?('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(?:\d{1,400}\.?\d{0,400}|\.\d{1,400})(?:[eE][+-]?\d{1,4})?(?![\w.])")
_WORD = re.compile(r"[A-Za-z_][\w.]*")
_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None, "nan": None}
_WORDS |= {"NaN": None}
_TYPE = re.compile(r"\s*,\s*(?:dtype|shape|device|requires_grad|maxlen|name)\s*=\s*[^()]*(?:\([^()]*\))?[^()]*")
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2}|\r\n|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": "", "/": "/"}
_ESCAPES |= {"\\": "\\", "'": "'", '"': '"', "\r": "", "\r\n": ""}
_NAMES = r"np\.\w+|numpy\.\w+|array|list|tuple|set|frozenset|deque|dict_keys|dict_values|Index|tensor|Array"
_CALL = re.compile(rf"(?:{_NAMES})\(\s*")  # around a list or, in NumPy 2, an item
_FIRST = r"""(?:[bBuU]?['"]|[+-]?\.?\d|[\[({\])}]|array\(|np\.|(?:True|true|False|false|None|null|nan|NaN)\b)"""
_BEGINS = re.compile(rf"\s*(?:{_CALL.pattern})?([\[({{])\s*{_FIRST}")
_QUOTED = re.compile(rf"""\s*(?:{_CALL.pattern})?\[\s*['"]""")
_NUMBERS = r"\s*[+-]?[\d.]+\s*,[\s\d.,+-]*"  # two or more
# Tuples and sets of texts or numbers, in a notation that labels do not use.
_COLLECTION = re.compile(rf"""\s*(?:{_CALL.pattern})?[({{](?:['"].*|{_NUMBERS})[)}}]\)?\s*""", re.DOTALL)
_EMPTY = re.compile(r"\s*(?:set|frozenset)\(\)\s*")  # which have no items between brackets
_CLOSES = {"[": "]", "(": ")", "{": "}"}


class NotALiteralError(ValueError):
    """A text that begins like a list or an object and is none."""


def looks_listed(text: str, brackets: str = "[({") -> bool:
    """Whether a text begins and ends as a list or an object in one of the brackets; one that is none is broken.

    A printed tuple or set counts as a list with any `brackets`.
    """
    begins = _BEGINS.match(text)
    if _EMPTY.fullmatch(text) or _COLLECTION.fullmatch(text):
        return True
    return bool(begins and begins[1] in brackets and (text.rstrip()[-1] in "])}" or _QUOTED.match(text)))


def parse(text: str) -> Any:
    """Returns the list or object that a text is the print of: of lists, dicts, str, int, float, bool and None.

    Args:
      text: as in the table above; items are divided by commas, or as NumPy does it by blanks.

    Raises:
      NotALiteralError: for any other text, with the reason.
    """
    if _EMPTY.fullmatch(text):
        return []
    value, end = _value(text, _skipped(text, 0), 0)
    if text[end:].strip():
        raise NotALiteralError(f"there is more behind its end: {text[end:].strip()!r:.40}")
    return value


def _skipped(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """The value that begins at a character, and where it ends."""
    if depth > _MOST_NESTED:
        raise NotALiteralError(f"more than {_MOST_NESTED} lists are in each other")
    if text[at : at + 1] in _CLOSES and at < len(text):
        return (_object if text[at] == "{" else _list)(text, at, depth)
    if found := _STRING.match(text, at):
        value = _ESCAPE.sub(_unescaped, found[1][1:-1])
        # JSON writes a character beyond U+FFFF as a pair of surrogates.
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass"), found.end()
    if found := _NUMBER.match(text, at):
        number = found[0]
        return (int(number) if number.lstrip("+-").isdigit() else float(number)), found.end()
    if call := _CALL.match(text, at):
        value, end = _value(text, call.end(), depth + 1)
        kind = _TYPE.match(text, end)
        end = kind.end() if kind else end
        if text[end : end + 1] != ")":
            raise NotALiteralError(f"{call[0]!r} does not end")
        return value, end + 1
    found = _WORD.match(text, at)
    if found and found[0] in _WORDS:
        return _WORDS[found[0]], found.end()
    if text.startswith("...", at):
        raise NotALiteralError("NumPy shortened it with '...' when it was written")
    raise NotALiteralError(f"{text[at : at + 40]!r} is neither a quoted text nor a number" if text[at:] else "it ends")


def _list(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    closes, items = _CLOSES[text[at]], []
    at = _skipped(text, at + 1)
    while text[at : at + 1] != closes:
        if at >= len(text):
            raise NotALiteralError(f"it does not end with {closes!r}")
        item, end = _value(text, at, depth + 1)
        items.append(item)
        at = _skipped(text, end)
        if at == end and text[at : at + 1] != closes:
            raise NotALiteralError(f"{text[at : at + 20]!r} stands right behind an item")
    return items, at + 1


def _object(text: str, at: int, depth: int) -> tuple[Any, int]:
    """A dict, or the list of a set's items."""
    items: dict[str, Any] = {}
    begin, at = at, _skipped(text, at + 1)
    while text[at : at + 1] != "}":
        name, end = _value(text, at, depth + 1)
        end = _skipped(text, end)
        if text[end : end + 1] != ":":
            if items:
                raise NotALiteralError(f"{text[at : at + 20]!r} has no value")
            return _list(text, begin, depth)
        items[str(name)], end = _value(text, _skipped(text, end + 1), depth + 1)
        at = _skipped(text, end)
    return items, at + 1


def _unescaped(found: re.Match[str]) -> str:
    code = found[1]
    if code[0] in "uUx" and len(code) > 1:
        number = int(code[1:], 16)
        return chr(number) if number < 0x110000 else found[0]
    return _ESCAPES.get(code, found[0])
