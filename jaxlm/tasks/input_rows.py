"""Rows with the columns that a task reads, from the examples that Python users pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxlm import config
from jaxlm.config.arguments import check_list
from jaxlm.config.ranges import short_repr
from jaxlm.data.formats.lines import Place, Row
from jaxlm.errors import UserError


def example_rows(given: Any, task: Any) -> Iterator[tuple[Place, Row]]:
    """Yields each example as a row, with its number as its place.

    Args:
      given: an iterable (such as a generator, array, Series or DataFrame) of texts, tuples of texts, lists of words
        (for tagging) or mappings of columns.
      task: the config of the task.

    Raises:
      UserError: for values of other types.
    """
    for n, example in enumerate(check_list("examples", _records(given), "examples"), start=1):
        yield Place("example", n), _row(task, _plain(example))


def labelled_rows(given: Any) -> Iterator[tuple[Place, Row]]:
    """Yields rows with their places; `given` holds mappings of columns, which are numbered, or (place, mapping) pairs.

    Raises UserError for values of other types.
    """
    for n, example in enumerate(check_list("rows", _records(given), "examples"), start=1):
        place, row = Place("example", n), example
        if isinstance(example, tuple) and len(example) == 2 and isinstance(example[0], Place):
            place, row = example
        row = _plain(row)
        if not isinstance(row, dict):
            raise UserError(f"row {n} is {short_repr(row)}; give a dict with the task's columns")
        yield place, row


def _records(given: Any) -> Any:
    """Returns the rows of a DataFrame, which would iterate over its columns, and any other value unchanged."""
    return given.to_dict("records") if hasattr(given, "to_dict") and hasattr(given, "columns") else given


def _plain(value: Any) -> Any:
    """Returns the value with mappings, arrays and numbers of NumPy, pandas and so on converted to those of Python."""
    if hasattr(value, "to_dict") and hasattr(value, "index") and not isinstance(value, Mapping):  # a row of a DataFrame
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {name: _plain(cell) for name, cell in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (list, tuple)) and any(isinstance(entry, (np.generic, np.ndarray)) for entry in value):
        return type(value)(_plain(entry) for entry in value)
    return value


def _row(task: Any, example: Any) -> Row:
    """Returns an example as a row with the columns that the task reads."""
    if isinstance(example, dict):
        return example
    if isinstance(task, config.Tagging):
        return {task.tokens: example}
    columns = getattr(task, "text", getattr(task, "source", None))
    columns = (columns,) if isinstance(columns, str) else columns or ("question", "context")
    values = (example,) if isinstance(example, str) else example
    if not isinstance(values, (tuple, list)):
        raise UserError(
            f"an example is {short_repr(example)}; give a text, a tuple of texts, or a dict with the task's columns"
        )
    if isinstance(task, config.Classification) and len(values) != len(columns) and task.text == ("text",):
        raise UserError(
            f"an example has {len(values)} texts; name two columns, Classification(text=('a', 'b')), for pairs"
        )
    if len(values) != len(columns):
        raise UserError(f"an example has {len(values)} texts, the task reads {', '.join(columns)}; give as many")
    return dict(zip(columns, values))
