"""Conversations as lists of messages: checks the supported formats and converts them to one."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.errors import UserError, suggestion

Messages = Sequence[Mapping[str, Any]]

ROLES = ("system", "developer", "user", "assistant", "tool")
MORE_ROLES = ("observation", "function", "ipython", "model", "context")  # supported by some templates
DEPTH = 64  # maximum depth of nested lists and dicts
BITS = 4096  # maximum size of an integer; Python prints no more than 4,300 digits
# Roles of the speakers in published data sets in the format of ShareGPT, {"from": ..., "value": ...}.
_SHAREGPT = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
    **{role: role for role in ("system", "developer")},
}
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # synonyms; the first one that is set is used


def plain_data(value: Any, what: str, depth: int = 0) -> Any:
    """Returns the value as plain data: the types of JSON, without methods that a template could call.

    Args:
      value: str, numbers, None, lists, tuples, mappings, NumPy numbers and arrays, dataclasses, pydantic models.
      what: name of the value, for error messages.
      depth: nesting depth of the value.

    Raises:
      UserError: the value has another type, a lone surrogate in a string, or too deep nesting.
    """
    if depth > DEPTH:
        raise UserError(f"{what} has lists and dicts nested more than {DEPTH} deep; give flatter data")
    if value is None or isinstance(value, (bool, np.bool_)):
        return value if value is None else bool(value)
    if isinstance(value, str):
        text = str.__str__(value)
        half = None if text.isascii() else re.search("[\ud800-\udfff]", text)
        if half:
            raise UserError(
                f"{what} has a lone surrogate, U+{ord(half[0]):04X}, at character {half.start()} of "
                f"{text[:40].encode('ascii', 'backslashreplace').decode()!r}; remove it"
            )
        return text
    if isinstance(value, (int, np.integer)):
        if int(value).bit_length() > BITS:
            raise UserError(f"{what} has a number of more than {BITS:,} bits; give it as text")
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif callable(getattr(value, "model_dump", None)):
        value = value.model_dump()
    if isinstance(value, Mapping):
        if odd := next((key for key in value if not isinstance(key, str)), None):
            raise UserError(f"{what} has the key {odd!r:.40}; keys must be strings")
        return {plain_data(key, what): plain_data(item, what, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain_data(item, what, depth + 1) for item in value]
    raise UserError(f"{what} is not plain data ({type(value).__name__} {value!r:.40}); give types that JSON supports")


def check_messages(messages: Any, where: str = "messages") -> list[dict[str, Any]]:
    """Returns the messages of a conversation, each a dict with a "role" and usually "content".

    Messages in the format of ShareGPT (`from` and `value`) are converted. Reasoning under any of the names
    "reasoning_content", "thinking" and "reasoning" is stored under the first of them and, as in transformers, also
    under the second unless that is set. Fields that are None are removed.

    Args:
      messages: the messages; for the supported types see `plain_data`.
      where: name of the conversation, for error messages.

    Raises:
      UserError: the value is not a list of messages, or has an unknown format or speaker.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, (Sequence, np.ndarray)):
        raise UserError(f"{where} is {messages!r:.60}; give a list of dicts, with at least one")
    if not len(messages):
        raise UserError(f"{where} is {[]}; give a list of dicts, with at least one")
    return [_message(plain_data(one, f"message {n}"), f"message {n}") for n, one in enumerate(messages)]


def _message(message: Any, what: str) -> dict[str, Any]:
    if isinstance(message, dict) and "role" not in message and isinstance(message.get("from"), str):
        message = _from_sharegpt(message, what)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{what} is {message!r:.60}; give a dict with a role, such as 'user', and content")
    message = {name: value for name, value in message.items() if value is not None}
    thoughts = next((message[name] for name in _THOUGHTS if name in message), None)
    if thoughts is not None:
        message = {"thinking": thoughts, **message, "reasoning_content": thoughts}
    return message


def _from_sharegpt(message: dict[str, Any], what: str) -> dict[str, Any]:
    speaker = message["from"]
    if speaker not in _SHAREGPT:
        raise UserError(f"{what} is from {speaker!r}{suggestion(speaker, _SHAREGPT)}; rename it")
    rest = {name: value for name, value in message.items() if name not in ("from", "value")}
    content = message.get("value", rest.pop("content", None))
    if speaker == "function_call" and (calls := _calls(content)):
        return {"role": "assistant", "content": "", "tool_calls": calls, **rest}
    return {"role": _SHAREGPT[speaker], "content": content, **rest}


def _calls(content: Any) -> list[dict[str, Any]]:
    """Returns the tool calls in a text of JSON; [] if the text is anything else."""
    try:
        found = json.loads(content)
    except (TypeError, ValueError, RecursionError):
        return []
    found = found if isinstance(found, list) else [found]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in found):
        return []
    return [{"type": "function", "function": {"arguments": {}, **call}} for call in found]


def text_of(content: Any) -> str:
    """Returns the text in the content of a message, which may be a list of parts."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return content if isinstance(content, str) else ""


def with_plain_content(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the messages with lists of parts joined to one text, for templates that do not support parts.

    Raises:
      UserError: a part is not text.
    """
    plain = []
    for n, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content):
            if odd := next((part for part in content if not isinstance(part.get("text"), str)), None):
                raise UserError(
                    f"message {n} has a part {odd['type']!r:.40}, but the chat template reads only text; give text"
                )
            message = {**message, "content": text_of(content)}
        plain.append(message)
    return plain
