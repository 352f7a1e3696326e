"""Checks of what Python users give to generation, encoding and likelihoods: models, lists and token ids."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping
from typing import Any

from jaxlm.config.ranges import shown
from jaxlm.errors import UserError


def check_model(name: str, given: Any) -> None:
    """Raises UserError for what is no model, by its parts: `lm` imports the modules that call this."""
    if not all(hasattr(given, part) for part in ("config", "module", "params", "programs")):
        raise UserError(f"{name} is {shown(given)}; give what jaxlm.load or jaxlm.fit returns")


def listed(name: str, given: Any, of: str) -> Iterable[Any]:
    """Returns what the user gave, if it is several things in an order.

    Args:
      name: of the argument.
      given: a list, an array, a generator or a Series, for example.
      of: what its entries must be, such as "texts", for the message.

    Raises:
      UserError: for one text, a path, a mapping, a set, a DataFrame, and what cannot be iterated over.
    """
    if isinstance(given, (str, bytes)):
        kind = "string" if isinstance(given, str) else "bytes"
        raise UserError(f"{name} is one {kind}, {shown(given)}; give a list of {of}")
    if isinstance(given, os.PathLike):
        raise UserError(f"{name} is the path {os.fspath(given)!r}; read the file, and give a list of {of}")
    if hasattr(given, "to_dict") and hasattr(given, "columns"):
        raise UserError(f"{name} is a {type(given).__name__}; give the list in one of its columns")
    unordered = isinstance(given, (Mapping, set, frozenset))
    if unordered or not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0:
        raise UserError(f"{name} is {shown(given)}, of type {type(given).__name__}; give a list of {of}")
    return given


def token_ids(name: str, given: Any) -> list[int]:
    """Returns token ids, given in any type of whole numbers.

    Args:
      name: what they are, for the message.
      given: a list, a one-dimensional array or another iterable of whole numbers.

    Raises:
      UserError: for anything else, such as floats or texts.
    """
    wanted = "give a text, or a list of token ids" if name.startswith(("a prompt", "pair")) else "give token ids"
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable) or getattr(given, "ndim", 1) != 1:
        raise UserError(f"{name} is {shown(given)}, of type {type(given).__name__}; {wanted}")
    ids = given.tolist() if hasattr(given, "tolist") else list(given)  # of an array
    for token in ids:
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise UserError(f"{name} holds {shown(token)}, of type {type(token).__name__}; {wanted}, whole numbers")
    try:
        return [operator.index(token) for token in ids]
    except TypeError:  # an array of a NumPy float, which has the method
        raise UserError(f"{name} is {shown(given)}; {wanted}, whole numbers") from None


def stop_ids(given: Any, vocabulary: int) -> list[int]:
    """Returns the argument stop_tokens as sorted ids.

    Args:
      given: token ids in any order, also as a set.
      vocabulary: number of tokens of the model.

    Raises:
      UserError: for what are no token ids, and for one that the model does not have.
    """
    ids = token_ids("stop_tokens", sorted(given, key=str) if isinstance(given, (set, frozenset)) else given)
    strange = [token for token in ids if not 0 <= token < vocabulary]
    if strange:
        raise UserError(f"stop_tokens has {shown(strange[0])}; ids go from 0 to {vocabulary - 1}")
    return sorted(set(ids))
