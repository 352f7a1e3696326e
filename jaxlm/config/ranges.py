"""What the fields of a config may hold: declared in the type of each field, checked here, shown by `--help`.

    batch: Positive = 32  # rows in one update
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0  # on the output of each sub-layer

A field of another kind needs one line: a name below where several fields share the range, else an `Annotated` type.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from jaxlm.errors import UserError, perhaps

MOST = 2**31 - 1  # of any whole number: XLA's sizes are 32 bits wide
LARGE = 1e15  # no sensible number is as large; NaN and infinity are not smaller


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included unless `above` or `below` leave an end out."""

    low: float = -LARGE
    high: float = LARGE
    above: bool = False  # low itself is not in the range
    below: bool = False  # high itself is not in the range
    special: tuple[int, str] | None = None  # a number beside the range, and what it stands for

    def allows(self, value: Any) -> bool:
        """Whether a number is in the range."""
        if self.special and value == self.special[0]:
            return True
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        return low and high

    def __str__(self) -> str:
        parts = [] if self.low == -LARGE else [f"{'above' if self.above else 'at least'} {_digits(self.low)}"]
        if self.high < MOST:
            parts.append(f"{'below' if self.below else 'at most'} {_digits(self.high)}")
        return " and ".join(parts) + (f", or {self.special[0]} for {self.special[1]}" if self.special else "")


def _digits(number: float) -> str:
    return f"{int(number):,}" if number == int(number) else f"{number:g}"


@dataclass(frozen=True)
class NotEmpty:
    """A text of at least one character, or a tuple of at least one entry."""

    def allows(self, value: Any) -> bool:
        """Whether there is something in it."""
        return len(value) > 0

    def __str__(self) -> str:
        return "not empty"


@dataclass(frozen=True)
class Regex:
    """A regular expression of Python's, or an empty text."""

    def allows(self, value: Any) -> bool:
        """Whether the text compiles."""
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError):
            return False
        return True

    def __str__(self) -> str:
        return "a valid regular expression"


# The ranges that several fields share.
Count = Annotated[int, Range(0, MOST)]
Positive = Annotated[int, Range(1, MOST)]
Seed = Annotated[int, Range(0, 2**32, below=True)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, below=True)]
ShareAboveZero = Annotated[float, Range(0, 1, above=True)]
NotNegative = Annotated[float, Range(0, LARGE, below=True)]
AboveZero = Annotated[float, Range(0, LARGE, above=True, below=True)]
Number = Annotated[float, Range(-LARGE, LARGE, above=True, below=True)]
Name = Annotated[str, NotEmpty()]
Pattern = Annotated[str, Regex()]


class Config:
    """Base of the dataclasses of a run: takes the values that Python users have, and checks them by their types.

    A NumPy scalar becomes a number, a path a text, a list a tuple.  Whatever else is wrong, `check_fields` reports.
    """

    def __post_init__(self) -> None:
        for name, hint in hints(type(self)).items():
            value = getattr(self, name)
            plain = _plain(value, hint)
            if plain is not value:
                object.__setattr__(self, name, plain)


def hints(kind: type) -> dict[str, Any]:
    """Returns the types of a dataclass's fields, with their ranges."""
    return _hints(kind)  # type: ignore[arg-type]  # mypy takes the hash of instances for that of classes


@cache
def _hints(kind: type) -> dict[str, Any]:
    found = get_type_hints(kind, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(kind)}


def check_fields(config: Any, prefix: str = "") -> None:
    """Checks the type and the range of every field of a config, and of the configs in it.

    Args:
      config: a dataclass.
      prefix: what stands before the names of its fields in a message, such as "data.".

    Raises:
      UserError: where a field holds another kind of value, or one out of its range.
    """
    for name, hint in hints(type(config)).items():
        value = getattr(config, name)
        wanted = problem(value, hint)
        if wanted:
            raise UserError(f"{prefix}{name} is {shown(value)}; it must be {wanted}{_nearest(value, hint)}")
        inner = value.items() if isinstance(value, dict) else [("", value)]
        for key, part in inner:
            if isinstance(part, Config):
                check_fields(part, f"{prefix}{name}.{key + '.' if key else ''}")


def argument(name: str, value: Any, hint: Any) -> Any:
    """Returns an argument of a public function as its type has it: a path as a text, a NumPy scalar as a number.

    Args:
      name: of the argument.
      value: what the user gave.
      hint: its type, with its range, such as `Positive | None`.

    Raises:
      UserError: where the value is of another type, or out of its range.
    """
    plain = _plain(value, hint)
    wanted = problem(plain, hint)
    if wanted:
        raise UserError(f"{name} is {shown(value)}; it must be {wanted}{_nearest(plain, hint)}")
    return plain


def problem(value: Any, hint: Any) -> str:
    """Returns what a value must be, where it is not what the type of a field says; else an empty text."""
    if get_origin(hint) is Annotated:
        kind, *limits = get_args(hint)
        limits = [limit for limit in limits if hasattr(limit, "allows")]
        if problem(value, kind):
            return described(hint)
        broken = [limit for limit in limits if not limit.allows(value)]
        return "" if not broken else _limit(broken[0], value)
    if get_origin(hint) in (Union, UnionType) and type(None) in get_args(hint) and value is not None:
        others = [choice for choice in get_args(hint) if choice is not type(None)]
        if len(others) == 1:
            wanted = problem(value, others[0])
            return f"{wanted}, or None" if wanted else ""
    if _is(value, hint):
        return ""
    if hint is str and isinstance(value, str):
        return "a text without a NUL character or half of a surrogate pair"
    return described(hint)


def _limit(limit: Any, value: Any) -> str:
    """The range in words, with its end where the value lies beyond an end that is not worth a word elsewhere."""
    if isinstance(limit, Range) and limit.high >= MOST and value > limit.low:
        return f"{limit}{' and ' if str(limit) else ''}at most {_digits(limit.high)}"
    return str(limit)


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is of a type without a range; an int is a float too, a bool is no int."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(value is choice or (isinstance(value, str) and value == choice) for choice in inner)
    if origin is tuple:
        fixed = len(inner) != 2 or inner[1] is not Ellipsis
        kinds = inner if fixed else [inner[0]] * (len(value) if isinstance(value, tuple) else 0)
        same = isinstance(value, tuple) and len(value) == len(kinds)
        return same and not any(problem(entry, kind) for entry, kind in zip(value, kinds))
    if origin is dict:
        return isinstance(value, dict) and not any(
            problem(key, inner[0]) or problem(entry, inner[1]) for key, entry in value.items()
        )
    if origin in (Union, UnionType):
        return any(not problem(value, choice) for choice in inner)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
    if hint is str:
        return isinstance(value, str) and "\0" not in value and not re.search("[\ud800-\udfff]", value)
    if hint in (int, bool, type(None)):
        return type(value) is hint
    return isinstance(value, hint)


def limits(hint: Any) -> str:
    """Returns the range of a field of numbers as `--help` shows it, "INT, at least 1"; empty where it has none."""
    inner = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        found = [limits(choice) for choice in inner if choice is not type(None)]
        return f"{found[0]}, or None" if len(found) == 1 and found[0] else ""
    words = [str(limit) for limit in inner[1:] if isinstance(limit, Range)] if get_origin(hint) is Annotated else []
    return f"{inner[0].__name__.upper()}, {words[0]}" if words and words[0] else ""


_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
    type(None): "None",
}


def described(hint: Any) -> str:
    """Returns the type of a field, and its range, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = [str(limit) for limit in inner[1:] if hasattr(limit, "allows")]
        return ", ".join([described(inner[0]), *filter(None, limits)])
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin is tuple and len(inner) == 2 and inner[1] is Ellipsis:
        return f"a tuple, each entry {described(inner[0])}"
    if origin is tuple:
        return f"a tuple of {len(inner)}: {', '.join(map(described, inner))}"
    if origin is dict:
        return f"a dict, each value {described(inner[1])}"
    if origin in (Union, UnionType):
        return " or ".join(map(described, inner))
    return _WORDS.get(hint) or f"of type {getattr(hint, '__name__', hint)}"


def _nearest(value: Any, hint: Any) -> str:
    """The nearest of the choices, for one that is misspelt."""
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    return perhaps(value, map(str, choices)) if choices and isinstance(value, str) and value.isprintable() else ""


def shown(value: Any) -> str:
    """Returns a value as a message shows it: at most 60 characters."""
    try:
        return f"{value!r:.60}"
    except Exception:  # an integer of thousands of digits, alone or in a list, or a class of the user's
        return f"an integer of {value.bit_length():,} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def _plain(value: Any, hint: Any) -> Any:
    """The value as the type of a field has it, where Python users commonly have it in another form."""
    if get_origin(hint) is Annotated:
        return _plain(value, get_args(hint)[0])
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a scalar of NumPy or JAX
        value = value.item()
    takes = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if isinstance(value, os.PathLike) and str in takes:
        value = os.fspath(value)
        return value if isinstance(value, str) else os.fsdecode(value)
    for choice in takes:
        if get_origin(choice) is tuple and isinstance(value, (list, tuple)):
            entries = tuple(_plain(entry, get_args(choice)[0]) for entry in value)
            same = isinstance(value, tuple) and all(a is b for a, b in zip(entries, value))
            return value if same else entries
    return value
