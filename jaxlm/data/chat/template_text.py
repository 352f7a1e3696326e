"""Strings and numbers of a chat template that remember which of their characters a user wrote.

A `Text` holds two strings of the same length. As a `str` it holds its data, in which each character of a user is
replaced by a hidden character of a plane of Unicode that has no characters; beside that it holds the plain string. All
that a template asks of a text (comparisons, `in`, `split`, `lower`, ...) is answered by the plain string. Whatever
copies the data without asking, in C or in Jinja, copies the hidden characters, so the origin of a character is never
lost: a mistake here can make a comparison wrong, but it cannot turn the text of a user into the template's own.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_HIDDEN = re.compile("[\U00040000-\U000dffff]")
HIDDEN_RUN = re.compile("[\U00040000-\U000dffff]+")  # what a user wrote, in data
# Planes 0 to 3 and 14 to 16 are in use. They are hidden in planes 4 to 10; what stands in one of the unused planes 4 to
# 13 is hidden in plane 13, where it is not told apart from others of the same place. Plane 12 is for marks.
_PLANES = {0: 4, 1: 5, 2: 6, 3: 7, 14: 8, 15: 9, 16: 10}
_HIDE = bytes(_PLANES.get(plane, 13) for plane in range(256))
_REVEAL = bytes({hidden: plane for plane, hidden in _PLANES.items()}.get(plane, plane) for plane in range(256))
_ESCAPES = re.compile(r"%[^%a-zA-Z]*(\([^)]*\))?[^%a-zA-Z]*a")  # "%a" spells hidden characters in ASCII
ANSWER_BEGINS, ANSWER_ENDS = "\U000c0000", "\U000c0001"  # marks around what the assistant says


def _with_planes(text: str, planes: bytes) -> str:
    raw = bytearray(codecs.utf_32_le_encode(text, "surrogatepass")[0])
    raw[2::4] = raw[2::4].translate(planes)  # the third byte of each character is its plane
    return codecs.utf_32_le_decode(raw, "surrogatepass")[0]


def hide(plain: str) -> str:
    """Returns the data of a plain string all of whose characters a user wrote."""
    return _with_planes(plain, _HIDE)


def reveal(data: str) -> str:
    """Returns the plain string of some data."""
    return data if data.isascii() or not _HIDDEN.search(data) else _with_planes(data, _REVEAL)


class Text(str):
    """A string of a template; see the module.

    Args:
        data: the string with hidden characters where a user wrote them.
        plain: the same string without hidden characters; None: what `data` hides.
    """

    __slots__ = ("_plain",)
    _plain: str

    def __new__(cls, data: str = "", plain: str | None = None) -> Text:
        self = str.__new__(cls, data)
        self._plain = reveal(str.__str__(data)) if plain is None else plain
        return self

    def encode(self, *args: Any, **named: Any) -> bytes:
        if has_user(self):
            raise TypeError("a text of a message has no bytes here")  # they would not say who wrote them
        return self._plain.encode(*args, **named)

    def __str__(self) -> str:
        return self

    def __repr__(self) -> str:
        return from_user(repr(self._plain)) if has_user(self) else repr(self._plain)

    def __hash__(self) -> int:
        return hash(self._plain)

    def __eq__(self, other: Any) -> bool:
        return self._plain == (other._plain if type(other) is Text else plain_of(other))

    def __ne__(self, other: Any) -> bool:
        return not self == other

    def __iter__(self) -> Iterator[Text]:
        return (Text(data, plain) for data, plain in zip(str.__iter__(self), self._plain))

    def __add__(self, other: Any) -> Text:
        if not isinstance(other, str):
            return NotImplemented
        return Text(str.__add__(self, other), self._plain + (other._plain if type(other) is Text else plain_of(other)))

    def __radd__(self, other: Any) -> Text:
        if not isinstance(other, str):
            return NotImplemented
        return Text(str.__add__(other, self), plain_of(other) + self._plain)

    def __mod__(self, args: Any) -> Text:
        plain = self._plain % plain_of(args)
        if has_user(self) or _has_number(args) or (_ESCAPES.search(self._plain) and has_user(args)):
            return from_user(plain)
        return Text(str.__mod__(self, args), plain)

    def __rmod__(self, other: Any) -> Text:
        return Text(other) % self if isinstance(other, str) else NotImplemented

    def join(self, parts: Iterable[Any], /) -> Text:
        parts = list(parts)
        return Text(str.join(self, parts), self._plain.join(map(plain_of, parts)))

    def replace(self, old: str, new: str, count: Any = -1, /) -> Text:
        before, after = plain_of(old), plain_of(new)
        if not before:
            plain = self._plain.replace(before, after, count)
            return from_user(plain) if has_user(self) or has_user(new) else Text(plain, plain)
        return Text(new).join(self.split(old, count)) if before in self._plain else self

    def split(self, sep: str | None = None, maxsplit: Any = -1) -> list[str]:
        parts = self._plain.split(plain_of(sep), maxsplit)
        return self._parts(parts, None if sep is None else len(sep))

    def rsplit(self, sep: str | None = None, maxsplit: Any = -1) -> list[str]:
        parts = self._plain.rsplit(plain_of(sep), maxsplit)
        return self._parts(parts, None if sep is None else len(sep))

    def splitlines(self, keepends: Any = False) -> list[str]:
        lines: list[str] = self._parts(self._plain.splitlines(True), 0)
        return lines if keepends else [line[: len(plain)] for line, plain in zip(lines, self._plain.splitlines())]

    def partition(self, sep: str, /) -> tuple[Text, Text, Text]:
        before, between, after = self._parts(self._plain.partition(plain_of(sep)), 0)
        return before, between, after

    def rpartition(self, sep: str, /) -> tuple[Text, Text, Text]:
        before, between, after = self._parts(self._plain.rpartition(plain_of(sep)), 0)
        return before, between, after

    def strip(self, chars: str | None = None, /) -> str:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> str:
        return self[len(self) - len(self._plain.lstrip(plain_of(chars))) :]

    def rstrip(self, chars: str | None = None, /) -> str:
        return self[: len(self._plain.rstrip(plain_of(chars)))]

    def removeprefix(self, prefix: str, /) -> str:
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> str:
        return self[: len(self) - len(suffix)] if self.endswith(suffix) else self

    @staticmethod
    def maketrans(*args: Any) -> dict[int, Any]:  # type: ignore[override]
        table = str.maketrans(*map(plain_of, args))
        return user_data(table) if any(map(has_user, args)) else table

    def _parts(self, parts: Iterable[str], between: int | None) -> list[Any]:
        """Returns the parts of the plain string as texts; None characters between them are white space."""
        found, place = [], 0
        for part in parts:
            place = place if between is not None else self._plain.index(part, place)
            found.append(Text(str.__getitem__(self, slice(place, place + len(part))), part))
            place += len(part) + (between or 0)
        return found

    def _like(self, plain: str) -> Text:
        """Returns the text of what a change of its characters, each by itself, made of the plain string."""
        if not has_user(self):
            return Text(plain, plain)
        if len(plain) != len(self):
            return from_user(plain)
        data, last = [], 0
        for run in HIDDEN_RUN.finditer(str.__str__(self)):
            data += [plain[last : run.start()], hide(plain[run.start() : run.end()])]
            last = run.end()
        return Text("".join(data) + plain[last:], plain)


def _define(names: str, make: Callable[[Any], Callable]) -> None:
    for name in names.split():
        method = make(getattr(str, name))
        method.__name__ = name
        setattr(Text, name, method)


def _measure(method: Any) -> Callable:
    # The plain strings have the answer.
    return lambda self, *args: method(self._plain, *map(plain_of, args))


def _place(method: Any) -> Callable:
    # What depends on lengths and places alone is done to data and plain string in the same way.
    def run(self: Text, *args: Any) -> Any:
        plain = method(self._plain, *map(plain_of, args))
        return plain if plain is NotImplemented else Text(method(self, *args), plain)

    return run


def _change(method: Any) -> Callable:
    return lambda self, *args: self._like(method(self._plain, *map(plain_of, args)))


def _derive(method: Any) -> Callable:
    def run(self: Text, *args: Any, **named: Any) -> Text:
        plain = method(self._plain, *map(plain_of, args), **named)
        return from_user(plain) if any(map(has_user, (self, *args))) else Text(plain, plain)

    return run


_define("__contains__ __lt__ __le__ __gt__ __ge__ count endswith find index rfind rindex", _measure)
_define("startswith isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable", _measure)
_define("isspace istitle isupper", _measure)
_define("__getitem__ __mul__ __rmul__ center ljust rjust", _place)
_define("capitalize casefold lower swapcase title upper", _change)
_define("expandtabs translate zfill", _derive)


class Integer(int):
    """A whole number that a user gave, or that was computed from one: its digits are the user's."""


class Real(float):
    """The same for a number with a fraction."""


def _numbers(kind: Any, base: Any) -> None:
    arithmetic = "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow neg pos abs round"

    def sticky(method: Any) -> Callable:
        def run(self: Any, *args: Any) -> Any:
            return user_number(method(self, *args))

        return run

    for name in arithmetic.split():
        setattr(kind, f"__{name}__", sticky(getattr(base, f"__{name}__")))
    kind.__repr__ = kind.__str__ = lambda self: from_user(base.__repr__(self))
    kind.__format__ = lambda self, how: from_user(base.__format__(self, plain_of(how)))


_numbers(Integer, int)
_numbers(Real, float)


def user_number(value: Any) -> Any:
    """Returns a number as one of a user; other values as they are."""
    if type(value) is int:
        return Integer(value)
    return Real(value) if type(value) is float else value


def from_user(plain: str) -> Text:
    """Returns a text all of whose characters a user wrote."""
    return Text(hide(plain), plain)


def user_data(value: Any) -> Any:
    """Returns plain data (what JSON holds) in which all strings and numbers, those in keys too, are a user's."""
    if type(value) is str:
        return from_user(value)
    if type(value) is dict:
        return {user_data(key): user_data(item) for key, item in value.items()}
    return [user_data(item) for item in value] if type(value) is list else user_number(value)


def plain_of(value: Any) -> Any:
    """Returns a value of a template with plain strings and numbers in it, in lists, tuples and dicts too."""
    kind = type(value)
    if kind is Text:
        return value._plain
    if isinstance(value, str):
        return reveal(str.__str__(value))
    if kind is list or kind is tuple:
        return kind(map(plain_of, value))
    if kind is dict:
        return {plain_of(key): plain_of(item) for key, item in value.items()}
    if kind is Integer:
        return int(value)
    return float(value) if kind is Real else value


def has_user(value: Any) -> bool:
    """Returns whether a value of a template has something of a user in it."""
    if isinstance(value, str):
        return not str.isascii(value) and _HIDDEN.search(str.__str__(value)) is not None
    if isinstance(value, dict):
        return any(has_user(part) for item in value.items() for part in item)
    if isinstance(value, (list, tuple)):
        return any(map(has_user, value))
    return isinstance(value, (Integer, Real))


def _has_number(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_number, value.values()))
    return any(map(_has_number, value)) if isinstance(value, (list, tuple)) else isinstance(value, (Integer, Real))
