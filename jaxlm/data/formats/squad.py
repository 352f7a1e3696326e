"""Reads the JSON of SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, 2018), with one row per question."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlm.data.formats.lines import Place, Row
from jaxlm.errors import UserError

_SHAPE = "correct it: data[].paragraphs[].{context, qas[].{id, question, answers[].{text, answer_start}}}"
_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def is_squad(value: Any) -> bool:
    """Returns whether a JSON value has the structure of SQuAD: its first article has paragraphs."""
    articles = value.get("data") if isinstance(value, dict) else None
    first = articles[0] if isinstance(articles, list) and articles else None
    return isinstance(first, dict) and isinstance(first.get("paragraphs"), list)


def rows(file: Path, content: Any) -> Iterator[tuple[Place, Row]]:
    """Yields each question of a file with its number as the place.

    Args:
      file: the name of the file.
      content: its JSON value.

    Raises:
      UserError: a member of the JSON value is missing or has the wrong type.
    """
    number = 0
    for articles, article in _members(file, "the file", content, "data"):
        title = _member(file, articles, article, "title", str, "")
        for paragraphs, paragraph in _members(file, articles, article, "paragraphs"):
            context = _member(file, paragraphs, paragraph, "context", str)
            for path, question in _members(file, paragraphs, paragraph, "qas"):
                number += 1
                text = _member(file, path, question, "question", str)
                name = question.get("id")  # a number in some files
                row = {
                    "id": str(number if name is None else name),
                    "title": title,
                    "context": context,
                    "question": text,
                }
                if "answers" in question:
                    answers = list(_members(file, path, question, "answers"))
                    row["answers"] = {
                        "text": [_member(file, *answer, "text", str) for answer in answers],
                        "answer_start": [_member(file, *answer, "answer_start", int) for answer in answers],
                    }
                row["is_impossible"] = _member(file, path, question, "is_impossible", bool, False)
                yield Place(str(file), number), row


def _member(file: Path, path: str, value: Any, name: str, kind: type, default: Any = None) -> Any:
    """Returns the member `name` of the JSON object `value` at `path` of a SQuAD file."""
    if not isinstance(value, dict):
        raise UserError(f"{file}: {path} is {_NAMES[type(value)]}, not an object; {_SHAPE}")
    if name not in value:
        if default is None:
            raise UserError(f"{file}: {path} has no {name!r}; {_SHAPE}")
        return default
    found = type(value[name])
    if found is not kind:  # not isinstance, because bool is a subclass of int
        raise UserError(f"{file}: {name!r} of {path} is {_NAMES[found]}, not {_NAMES[kind]}; {_SHAPE}")
    return value[name]


def _members(file: Path, path: str, value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yields (path, item) for each item of the list `name`."""
    for i, item in enumerate(_member(file, path, value, name, list)):
        yield f"{name}[{i}]" if path == "the file" else f"{path}.{name}[{i}]", item
