"""Parses lists and objects that a table contains as text: as printed by pandas and NumPy, or in Python or JSON syntax.

    ['good', 'funny']    ["good", "funny"]    ['good' 'funny']    [1, 1, 0]    [1. 1. 0.]    ('a', 'b')    {'a', 'b'}
    array(['good', 'funny'], dtype=object)    tensor([1, 0])    [{'role': 'user', 'content': 'Hi'}]

No text is evaluated. Items can be strings, numbers, booleans, null, lists and objects.
"""

from __future__ import annotations

import re
from typing import Any

_MAX_DEPTH = 32  # of nested lists
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
_CALL = re.compile(rf"(?:{_NAMES})\(\s*")  # encloses a list or, in NumPy 2, an item
_FIRST = r"""(?:[bBuU]?['"]|[+-]?\.?\d|[\[({\])}]|array\(|np\.|(?:True|true|False|false|None|null|nan|NaN)\b)"""
_BEGINS = re.compile(rf"\s*(?:{_CALL.pattern})?([\[({{])\s*{_FIRST}")
_QUOTED = re.compile(rf"""\s*(?:{_CALL.pattern})?\[\s*['"]""")
_NUMBERS = r"\s*[+-]?[\d.]+\s*,[\s\d.,+-]*"  # two or more
# Tuples and sets of strings or numbers, in a notation that labels do not use.
_COLLECTION = re.compile(rf"""\s*(?:{_CALL.pattern})?[({{](?:['"].*|{_NUMBERS})[)}}]\)?\s*""", re.DOTALL)
_EMPTY = re.compile(r"\s*(?:set|frozenset)\(\)\s*")  # empty sets, which are printed without inner brackets
_CLOSES = {"[": "]", "(": ")", "{": "}"}


class NotALiteralError(ValueError):
    """The text begins like a list or an object but is not valid."""


def looks_listed(text: str, brackets: str = "[({") -> bool:
    """Returns whether a text begins and ends like a list or an object, whether or not it is valid.

    Args:
      text: the text.
      brackets: opening brackets to accept. Printed tuples and sets are always accepted.
    """
    begins = _BEGINS.match(text)
    if _EMPTY.fullmatch(text) or _COLLECTION.fullmatch(text):
        return True
    return bool(begins and begins[1] in brackets and (text.rstrip()[-1] in "])}" or _QUOTED.match(text)))


def parse(text: str) -> Any:
    """Returns the list or object that a text represents, built from list, dict, str, int, float, bool and None.

    Args:
      text: in one of the forms at the top of this module; items are separated by commas or, as in NumPy, by spaces.

    Raises:
      NotALiteralError: the text is not valid; the message gives the reason.
    """
    if _EMPTY.fullmatch(text):
        return []
    value, end = _value(text, skip_space(text, 0), 0)
    if text[end:].strip():
        raise NotALiteralError(f"there is more text after its end: {text[end:].strip()!r:.40}")
    return value


def skip_space(text: str, at: int) -> int:
    """Returns the position of the first character from `at` on that is neither white space nor a comma."""
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """Returns the value that begins at a position, and the position of its end."""
    if depth > _MAX_DEPTH:
        raise NotALiteralError(f"lists are nested more than {_MAX_DEPTH} deep")
    if text[at : at + 1] in _CLOSES and at < len(text):
        return (_object if text[at] == "{" else _list)(text, at, depth)
    if found := _STRING.match(text, at):
        value = _ESCAPE.sub(_unescape, found[1][1:-1])
        # JSON escapes a character above U+FFFF as a pair of surrogates.
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
        raise NotALiteralError("NumPy abbreviated it with '...' when it was written")
    raise NotALiteralError(f"{text[at : at + 40]!r} is neither a string nor a number" if text[at:] else "it ends")


def _list(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    closes, items = _CLOSES[text[at]], []
    at = skip_space(text, at + 1)
    while text[at : at + 1] != closes:
        if at >= len(text):
            raise NotALiteralError(f"it does not end with {closes!r}")
        item, end = _value(text, at, depth + 1)
        items.append(item)
        at = skip_space(text, end)
        if at == end and text[at : at + 1] != closes:
            raise NotALiteralError(f"{text[at : at + 20]!r} follows an item without a separator")
    return items, at + 1


def _object(text: str, at: int, depth: int) -> tuple[Any, int]:
    """Returns a dict, or the items of a set as a list."""
    items: dict[str, Any] = {}
    begin, at = at, skip_space(text, at + 1)
    while text[at : at + 1] != "}":
        name, end = _value(text, at, depth + 1)
        end = skip_space(text, end)
        if text[end : end + 1] != ":":
            if items:
                raise NotALiteralError(f"{text[at : at + 20]!r} has no value")
            return _list(text, begin, depth)
        items[str(name)], end = _value(text, skip_space(text, end + 1), depth + 1)
        at = skip_space(text, end)
    return items, at + 1


def _unescape(found: re.Match[str]) -> str:
    code = found[1]
    if code[0] in "uUx" and len(code) > 1:
        number = int(code[1:], 16)
        return chr(number) if number < 0x110000 else found[0]
    return _ESCAPES.get(code, found[0])
