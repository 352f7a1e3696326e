"""The values that config fields accept: declared in the type of each field, checked here, printed by `--help`.

    batch: Positive = 32  # rows per update
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0  # dropout rate of each sub-layer's output

A new kind of field takes one line: a named type below if several fields share it, else an `Annotated` type in place.
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

from jaxlm.errors import UserError, suggestion

MAX_INT = 2**31 - 1  # upper limit of every integer: XLA's sizes are 32 bits wide
MAX_FLOAT = 1e15  # upper limit of every float; it also excludes NaN and infinity


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included unless `above` or `below` excludes an end."""

    low: float = -MAX_FLOAT
    high: float = MAX_FLOAT
    above: bool = False  # excludes `low`
    below: bool = False  # excludes `high`
    special: tuple[int, str] | None = None  # a number accepted in addition to the range, and its meaning

    def allows(self, value: Any) -> bool:
        """Returns whether a number is in the range."""
        if self.special and value == self.special[0]:
            return True
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        return low and high

    def __str__(self) -> str:
        parts = [] if self.low == -MAX_FLOAT else [f"{'above' if self.above else 'at least'} {_digits(self.low)}"]
        if self.high < MAX_INT:
            parts.append(f"{'below' if self.below else 'at most'} {_digits(self.high)}")
        return " and ".join(parts) + (f", or {self.special[0]} for {self.special[1]}" if self.special else "")


def _digits(number: float) -> str:
    return f"{int(number):,}" if number == int(number) else f"{number:g}"


@dataclass(frozen=True)
class NotEmpty:
    """A string of at least one character, or a tuple of at least one entry."""

    def allows(self, value: Any) -> bool:
        """Returns whether the value has any characters or entries."""
        return len(value) > 0

    def __str__(self) -> str:
        return "non-empty"


@dataclass(frozen=True)
class Regex:
    """A Python regular expression, or an empty string."""

    def allows(self, value: Any) -> bool:
        """Returns whether the expression compiles."""
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError):
            return False
        return True

    def __str__(self) -> str:
        return "a valid regular expression"


# Types that several fields share.
Count = Annotated[int, Range(0, MAX_INT)]
Positive = Annotated[int, Range(1, MAX_INT)]
Seed = Annotated[int, Range(0, 2**32, below=True)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, below=True)]
ShareAboveZero = Annotated[float, Range(0, 1, above=True)]
NotNegative = Annotated[float, Range(0, MAX_FLOAT, below=True)]
AboveZero = Annotated[float, Range(0, MAX_FLOAT, above=True, below=True)]
Number = Annotated[float, Range(-MAX_FLOAT, MAX_FLOAT, above=True, below=True)]
Name = Annotated[str, NotEmpty()]
Pattern = Annotated[str, Regex()]


class Config:
    """Base class of all config dataclasses: converts common Python values to the types of the fields.

    A NumPy scalar becomes a number, a path becomes a string, and a list becomes a tuple.  `check_fields` reports
    values that are still of the wrong type or out of range.
    """

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            value = getattr(self, name)
            normalized = _normalize(value, hint)
            if normalized is not value:
                object.__setattr__(self, name, normalized)


def field_types(kind: type) -> dict[str, Any]:
    """Returns the type of each field of a dataclass, including its range."""
    return _field_types(kind)  # type: ignore[arg-type]  # mypy confuses the hash of a class with that of its instances


@cache
def _field_types(kind: type) -> dict[str, Any]:
    resolved = get_type_hints(kind, include_extras=True)
    return {field.name: resolved[field.name] for field in dataclasses.fields(kind)}


def check_fields(config: Any, prefix: str = "") -> None:
    """Checks the type and the range of every field of a config and of the configs nested in it.

    Args:
      config: a dataclass instance.
      prefix: prepended to the field names in a message, such as "data.".

    Raises:
      UserError: if a value is of the wrong type or out of range.
    """
    for name, hint in field_types(type(config)).items():
        value = getattr(config, name)
        _check_value(f"{prefix}{name}", value, value, hint)
        nested = value.items() if isinstance(value, dict) else [("", value)]
        for key, part in nested:
            if isinstance(part, Config):
                check_fields(part, f"{prefix}{name}.{key + '.' if key else ''}")


def check_argument(name: str, value: Any, hint: Any) -> Any:
    """Checks an argument of a public function and returns it in the form that its type requires.

    Args:
      name: name of the argument, for the message.
      value: value that the user passed.
      hint: expected type with its range, such as `Positive | None`.

    Returns:
      The value; a path becomes a string and a NumPy scalar becomes a number.

    Raises:
      UserError: if the value is of the wrong type or out of range.
    """
    normalized = _normalize(value, hint)
    _check_value(name, value, normalized, hint)
    return normalized


def _check_value(name: str, original: Any, value: Any, hint: Any) -> None:
    """Raises UserError, which quotes the original value, if `value` does not satisfy its type."""
    requirement = unmet_requirement(value, hint)
    if requirement:
        raise UserError(f"{name} is {short_repr(original)}; it must be {requirement}{_suggestion(value, hint)}")


def unmet_requirement(value: Any, hint: Any) -> str:
    """Returns a description of the values that a type accepts, or an empty string if `value` is one of them."""
    if get_origin(hint) is Annotated:
        kind, *limits = get_args(hint)
        limits = [limit for limit in limits if hasattr(limit, "allows")]
        if unmet_requirement(value, kind):
            return describe_type(hint)
        violated = [limit for limit in limits if not limit.allows(value)]
        return "" if not violated else _describe_limit(violated[0], value)
    if get_origin(hint) in (Union, UnionType) and type(None) in get_args(hint) and value is not None:
        others = [choice for choice in get_args(hint) if choice is not type(None)]
        if len(others) == 1:
            requirement = unmet_requirement(value, others[0])
            return f"{requirement}, or None" if requirement else ""
    if _has_type(value, hint):
        return ""
    if hint is str and isinstance(value, str):
        return "a string without NUL characters or lone surrogates"
    return describe_type(hint)


def _describe_limit(limit: Any, value: Any) -> str:
    """Describes a violated limit; adds a very large upper end, which is otherwise omitted, if the value exceeds it."""
    if isinstance(limit, Range) and limit.high >= MAX_INT and value > limit.low:
        return f"{limit}{' and ' if str(limit) else ''}at most {_digits(limit.high)}"
    return str(limit)


def _has_type(value: Any, hint: Any) -> bool:
    """Returns whether a value is of an unannotated type; an int is a valid float, a bool is not a valid int."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(value is choice or (isinstance(value, str) and value == choice) for choice in inner)
    if origin is tuple:
        fixed = len(inner) != 2 or inner[1] is not Ellipsis
        kinds = inner if fixed else [inner[0]] * (len(value) if isinstance(value, tuple) else 0)
        same_length = isinstance(value, tuple) and len(value) == len(kinds)
        return same_length and not any(unmet_requirement(entry, kind) for entry, kind in zip(value, kinds))
    if origin is dict:
        return isinstance(value, dict) and not any(
            unmet_requirement(key, inner[0]) or unmet_requirement(entry, inner[1]) for key, entry in value.items()
        )
    if origin in (Union, UnionType):
        return any(not unmet_requirement(value, choice) for choice in inner)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
    if hint is str:
        return isinstance(value, str) and "\0" not in value and not re.search("[\ud800-\udfff]", value)
    if hint in (int, bool, type(None)):
        return type(value) is hint
    return isinstance(value, hint)


def describe_range(hint: Any) -> str:
    """Returns the range of a numeric type as `--help` prints it, "INT, at least 1", or "" if it has no range."""
    inner = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        found = [describe_range(choice) for choice in inner if choice is not type(None)]
        return f"{found[0]}, or None" if len(found) == 1 and found[0] else ""
    limits = [str(limit) for limit in inner[1:] if isinstance(limit, Range)] if get_origin(hint) is Annotated else []
    return f"{inner[0].__name__.upper()}, {limits[0]}" if limits and limits[0] else ""


_TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "True or False",
    type(None): "None",
}


def describe_type(hint: Any) -> str:
    """Returns a description of a type and its range, such as "an integer, at least 1"."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        text = describe_type(inner[0])
        if any(isinstance(limit, NotEmpty) for limit in inner[1:]):
            text = text.replace("a ", "a non-empty ", 1)
        limits = [str(limit) for limit in inner[1:] if isinstance(limit, (Range, Regex))]
        return ", ".join([text, *filter(None, limits)])
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin is tuple and len(inner) == 2 and inner[1] is Ellipsis:
        return f"a tuple, each entry {describe_type(inner[0])}"
    if origin is tuple:
        return f"a tuple of {len(inner)}: {', '.join(map(describe_type, inner))}"
    if origin is dict:
        return f"a dict, each value {describe_type(inner[1])}"
    if origin in (Union, UnionType):
        return " or ".join(map(describe_type, inner))
    return _TYPE_NAMES.get(hint) or f"of type {getattr(hint, '__name__', hint)}"


def _suggestion(value: Any, hint: Any) -> str:
    """Suggests the closest choice for a misspelt one, and a tuple for its only entry."""
    if isinstance(value, str) and not unmet_requirement((value,), hint):
        return f"; perhaps you meant {short_repr((value,))}"
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    return suggestion(value, map(str, choices)) if choices and isinstance(value, str) and value.isprintable() else ""


def short_repr(value: Any) -> str:
    """Returns the repr of a value for a message, cut to 60 characters."""
    try:
        return f"{value!r:.60}"
    except Exception:  # an integer of thousands of digits, alone or in a list, or a user's class with a broken repr
        return f"an integer of {value.bit_length():,} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def _normalize(value: Any, hint: Any) -> Any:
    """Converts a NumPy or JAX scalar to a number, a path to a string, and a list to a tuple if the type requires it."""
    if get_origin(hint) is Annotated:
        return _normalize(value, get_args(hint)[0])
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a scalar of NumPy or JAX
        value = value.item()
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if isinstance(value, os.PathLike) and str in choices:
        value = os.fspath(value)
        return value if isinstance(value, str) else os.fsdecode(value)
    for choice in choices:
        if get_origin(choice) is tuple and isinstance(value, (list, tuple)):
            entries = tuple(_normalize(entry, get_args(choice)[0]) for entry in value)
            unchanged = isinstance(value, tuple) and all(a is b for a, b in zip(entries, value))
            return value if unchanged else entries
    return value
