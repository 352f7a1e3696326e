"""Strings and numbers of a chat template that record which of their characters a user wrote.

A `Text` consists of two strings of the same length. The value of the `str` is its data, in which each character written
by a user is replaced by a hidden character from an unassigned plane of Unicode. The attribute `_plain` is the plain
string. Methods that inspect the text (comparisons, `in`, `split`, `lower`, ...) use the plain string. Code that copies
the data directly, in C or in Jinja, copies the hidden characters, so the origin of a character is never lost: an error
in this module can make a comparison wrong, but cannot turn text of a user into text of the template.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_HIDDEN = re.compile("[\U00040000-\U000dffff]")
HIDDEN_RUN = re.compile("[\U00040000-\U000dffff]+")  # text written by a user, in data
# Planes 0 to 3 and 14 to 16 are assigned and are mapped to planes 4 to 10. The unassigned planes 4 to 13 are all mapped
# to plane 13, so their characters cannot be restored. Plane 12 contains the marks.
_PLANES = {0: 4, 1: 5, 2: 6, 3: 7, 14: 8, 15: 9, 16: 10}
_HIDE = bytes(_PLANES.get(plane, 13) for plane in range(256))
_REVEAL = bytes({hidden: plane for plane, hidden in _PLANES.items()}.get(plane, plane) for plane in range(256))
_ESCAPES = re.compile(r"%[^%a-zA-Z]*(\([^)]*\))?[^%a-zA-Z]*a")  # "%a" escapes hidden characters to ASCII
ANSWER_BEGINS, ANSWER_ENDS = "\U000c0000", "\U000c0001"  # marks around an answer of the assistant


def _with_planes(text: str, planes: bytes) -> str:
    raw = bytearray(codecs.utf_32_le_encode(text, "surrogatepass")[0])
    raw[2::4] = raw[2::4].translate(planes)  # the third byte of each character is its plane
    return codecs.utf_32_le_decode(raw, "surrogatepass")[0]


def hide(plain: str) -> str:
    """Returns the data of a plain string that was written entirely by a user."""
    return _with_planes(plain, _HIDE)


def reveal(data: str) -> str:
    """Returns the plain string of data."""
    return data if data.isascii() or not _HIDDEN.search(data) else _with_planes(data, _REVEAL)


class Text(str):
    """A string of a template that records the origin of its characters; see the docstring of the module.

    Args:
      data: the string, with hidden characters for those written by a user.
      plain: the plain string; None: derived from `data`.
    """

    __slots__ = ("_plain",)
    _plain: str

    def __new__(cls, data: str = "", plain: str | None = None) -> Text:
        self = str.__new__(cls, data)
        self._plain = reveal(str.__str__(data)) if plain is None else plain
        return self

    def encode(self, *args: Any, **kwargs: Any) -> bytes:
        if has_user(self):
            raise TypeError("text of a message cannot be encoded")  # bytes would not record the origin
        return self._plain.encode(*args, **kwargs)

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
        """Returns parts of the plain string as texts; `between`: length of the separator, None for white space."""
        found, position = [], 0
        for part in parts:
            position = position if between is not None else self._plain.index(part, position)
            found.append(Text(str.__getitem__(self, slice(position, position + len(part))), part))
            position += len(part) + (between or 0)
        return found

    def _like(self, plain: str) -> Text:
        """Returns the text for `plain`, the plain string after each character was changed on its own."""
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


def _inspect(method: Any) -> Callable:
    """Applies the method to the plain strings."""
    return lambda self, *args: method(self._plain, *map(plain_of, args))


def _arrange(method: Any) -> Callable:
    """Applies the method to the data and the plain string; its result depends only on lengths and positions."""

    def run(self: Text, *args: Any) -> Any:
        plain = method(self._plain, *map(plain_of, args))
        return plain if plain is NotImplemented else Text(method(self, *args), plain)

    return run


def _change(method: Any) -> Callable:
    """Applies a method that changes each character on its own."""
    return lambda self, *args: self._like(method(self._plain, *map(plain_of, args)))


def _derive(method: Any) -> Callable:
    """Applies the method to the plain strings; the whole result is text of a user if any of the inputs is."""

    def run(self: Text, *args: Any, **kwargs: Any) -> Text:
        plain = method(self._plain, *map(plain_of, args), **kwargs)
        return from_user(plain) if any(map(has_user, (self, *args))) else Text(plain, plain)

    return run


_define("__contains__ __lt__ __le__ __gt__ __ge__ count endswith find index rfind rindex", _inspect)
_define("startswith isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable", _inspect)
_define("isspace istitle isupper", _inspect)
_define("__getitem__ __mul__ __rmul__ center ljust rjust", _arrange)
_define("capitalize casefold lower swapcase title upper", _change)
_define("expandtabs translate zfill", _derive)


class Integer(int):
    """An integer from a user, or computed from one: its digits are text of a user."""


class Real(float):
    """A float from a user, or computed from a number of a user."""


def _numbers(kind: Any, base: Any) -> None:
    arithmetic = "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow neg pos abs round"

    def keep_origin(method: Any) -> Callable:
        def run(self: Any, *args: Any) -> Any:
            return user_number(method(self, *args))

        return run

    for name in arithmetic.split():
        setattr(kind, f"__{name}__", keep_origin(getattr(base, f"__{name}__")))
    kind.__repr__ = kind.__str__ = lambda self: from_user(base.__repr__(self))
    kind.__format__ = lambda self, spec: from_user(base.__format__(self, plain_of(spec)))


_numbers(Integer, int)
_numbers(Real, float)


def user_number(value: Any) -> Any:
    """Returns a number as a number from a user, and other values unchanged."""
    if type(value) is int:
        return Integer(value)
    return Real(value) if type(value) is float else value


def from_user(plain: str) -> Text:
    """Returns a text that was written entirely by a user."""
    return Text(hide(plain), plain)


def user_data(value: Any) -> Any:
    """Returns plain data (the types of JSON) with all strings and numbers, including keys, marked as a user's."""
    if type(value) is str:
        return from_user(value)
    if type(value) is dict:
        return {user_data(key): user_data(item) for key, item in value.items()}
    return [user_data(item) for item in value] if type(value) is list else user_number(value)


def plain_of(value: Any) -> Any:
    """Returns a value of a template with plain strings and numbers, also inside lists, tuples and dicts."""
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
    """Returns whether a value of a template contains text or numbers from a user."""
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
