"""Checks of the arguments of generation, encoding and likelihoods: models, lists and token ids."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping
from typing import Any

from jaxlm.config.ranges import short_repr
from jaxlm.errors import UserError


def check_model(name: str, value: Any) -> None:
    """Raises UserError if a value is not a model, judged by its attributes.

    `isinstance` is not available here: `jaxlm.lm` imports the modules that call this function.
    """
    if not all(hasattr(value, attribute) for attribute in ("config", "module", "params", "programs")):
        raise UserError(f"{name} is {short_repr(value)}; give what jaxlm.load or jaxlm.fit returns")


def check_list(name: str, value: Any, entries: str) -> Iterable[Any]:
    """Returns a value if it is an ordered collection.

    Args:
      name: name of the argument, for the message.
      value: a list, an array, a generator or a pandas Series, for example.
      entries: the required kind of entries, such as "texts", for the message.

    Raises:
      UserError: for a single string, a path, a mapping, a set, a DataFrame, or a value that is not iterable.
    """
    if isinstance(value, (str, bytes)):
        kind = "one string" if isinstance(value, str) else "one bytes object"
        raise UserError(f"{name} is {kind}, {short_repr(value)}; give a list of {entries}")
    if isinstance(value, os.PathLike):
        raise UserError(f"{name} is the path {os.fspath(value)!r}; read the file and give a list of {entries}")
    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        raise UserError(f"{name} is a {type(value).__name__}; give one of its columns as a list")
    unordered = isinstance(value, (Mapping, set, frozenset))
    if unordered or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        raise UserError(f"{name} is {short_repr(value)}, of type {type(value).__name__}; give a list of {entries}")
    return value


def token_ids(name: str, value: Any) -> list[int]:
    """Returns token ids as a list of Python integers.

    Args:
      name: description of the ids, for the message.
      value: a list, a one-dimensional array or another iterable of integers.

    Raises:
      UserError: for anything else, such as a string or floats.
    """
    remedy = "give a string or a list of token ids" if name.startswith(("a prompt", "pair")) else "give token ids"
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) != 1:
        raise UserError(f"{name} is {short_repr(value)}, of type {type(value).__name__}; {remedy}")
    ids = value.tolist() if hasattr(value, "tolist") else list(value)  # arrays have tolist
    for token in ids:
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise UserError(
                f"{name} contains {short_repr(token)}, of type {type(token).__name__}; {remedy}, which are integers"
            )
    try:
        return [operator.index(token) for token in ids]
    except TypeError:  # an array of a NumPy float has the method, but it raises
        raise UserError(f"{name} is {short_repr(value)}; {remedy}, which are integers") from None


def stop_ids(value: Any, vocabulary: int) -> list[int]:
    """Returns the argument `stop_tokens` as sorted, unique ids.

    Args:
      value: token ids in any order; a set is accepted too.
      vocabulary: number of tokens of the model.

    Raises:
      UserError: if the value is not a collection of token ids, or an id is outside the vocabulary.
    """
    ids = token_ids("stop_tokens", sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)
    invalid = [token for token in ids if not 0 <= token < vocabulary]
    if invalid:
        raise UserError(f"stop_tokens contains {short_repr(invalid[0])}; ids must be from 0 to {vocabulary - 1}")
    return sorted(set(ids))
