"""What Python users give as examples, as rows with the columns that a task reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxlm import config
from jaxlm.config.arguments import listed
from jaxlm.config.ranges import shown
from jaxlm.data.formats.lines import Place, Row
from jaxlm.errors import UserError


def examples(given: Any, task: Any) -> Iterator[tuple[Place, Row]]:
    """Yields each example as a row, with its number as its place.

    given: any iterable of texts, tuples of texts, lists of words (for tagging) or mappings of columns, as a generator,
    an array, a Series or a DataFrame.

    Raises UserError for what is none of these.
    """
    for n, example in enumerate(listed("examples", _records(given), "examples"), start=1):
        yield Place("example", n), _row(task, _plain(example))


def labelled(given: Any) -> Iterator[tuple[Place, Row]]:
    """Yields rows with their places: mappings of columns alone, which are numbered, or behind places of their own."""
    for n, example in enumerate(listed("rows", _records(given), "examples"), start=1):
        place, row = Place("example", n), example
        if isinstance(example, tuple) and len(example) == 2 and isinstance(example[0], Place):
            place, row = example
        row = _plain(row)
        if not isinstance(row, dict):
            raise UserError(f"row {n} is {shown(row)}; give a dict with the task's columns")
        yield place, row


def size(value: Any, name: str) -> int | None:
    """Returns a whole number that may be missing.  Raises UserError for anything else."""
    if value is None or (isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))):
        return None if value is None else int(value)
    raise UserError(f"{name} is {shown(value)}; it must be a whole number, or None")


def _records(given: Any) -> Any:
    """The rows of a DataFrame, which itself would yield the names of its columns; anything else as it is."""
    return given.to_dict("records") if hasattr(given, "to_dict") and hasattr(given, "columns") else given


def _plain(value: Any) -> Any:
    """The value with mappings, arrays and numbers of NumPy, pandas and the like as those of Python."""
    if hasattr(value, "to_dict") and hasattr(value, "index") and not isinstance(value, Mapping):  # a row of a DataFrame
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {name: _plain(cell) for name, cell in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (list, tuple)) and any(isinstance(one, (np.generic, np.ndarray)) for one in value):
        return type(value)(_plain(one) for one in value)
    return value


def _row(task: Any, example: Any) -> Row:
    """An example as a row with the columns that the task reads."""
    if isinstance(example, dict):
        return example
    if isinstance(task, config.Tagging):
        return {task.tokens: example}
    columns = getattr(task, "text", getattr(task, "source", None))
    columns = (columns,) if isinstance(columns, str) else columns or ("question", "context")
    values = (example,) if isinstance(example, str) else example
    if not isinstance(values, (tuple, list)):
        raise UserError(
            f"an example is {shown(example)}; give a text, a tuple of texts, or a dict with the task's columns"
        )
    if isinstance(task, config.Classification) and len(values) != len(columns) and task.text == ("text",):
        raise UserError(
            f"an example has {len(values)} texts; name two columns, Classification(text=('a', 'b')), for pairs"
        )
    if len(values) != len(columns):
        raise UserError(f"an example has {len(values)} texts, the task reads {', '.join(columns)}; give as many")
    return dict(zip(columns, values))
