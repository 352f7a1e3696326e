"""Conversations as lists of messages: the forms in which they come, checked, and made one."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.errors import UserError, perhaps

Messages = Sequence[Mapping[str, Any]]

ROLES = ("system", "developer", "user", "assistant", "tool")
MORE_ROLES = ("observation", "function", "ipython", "model", "context")  # that some templates have
DEPTH = 64  # lists and dicts within one another
BITS = 4096  # of a whole number; Python writes no more than 4,300 digits
# Who speaks in conversations of ShareGPT's form, {"from": ..., "value": ...}, as published data names them.
_SHAREGPT = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
    **{role: role for role in ("system", "developer")},
}
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of the same thing, the first that is set counts


def plain_data(value: Any, what: str, depth: int = 0) -> Any:
    """Returns the value as plain data: what JSON holds, without methods that a sandbox would have to know.

    Args:
        value: texts, numbers, None, lists, tuples, mappings, NumPy's numbers and arrays, dataclasses, pydantic models.
        what: what the value is, for messages.
        depth: of the value in what it was taken from.

    Raises:
        UserError: for anything else, for a text with half of a surrogate pair, and for deep nesting.
    """
    if depth > DEPTH:
        raise UserError(f"{what} has more than {DEPTH} lists and dicts within one another; give flatter data")
    if value is None or isinstance(value, (bool, np.bool_)):
        return value if value is None else bool(value)
    if isinstance(value, str):
        text = str.__str__(value)
        half = None if text.isascii() else re.search("[\ud800-\udfff]", text)
        if half:
            raise UserError(
                f"{what} has half of a surrogate pair, U+{ord(half[0]):04X}, at character {half.start()} of "
                f"{text[:40].encode('ascii', 'backslashreplace').decode()!r}; take it out"
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
            raise UserError(f"{what} has the key {odd!r:.40}; give keys that are text")
        return {plain_data(key, what): plain_data(item, what, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain_data(item, what, depth + 1) for item in value]
    raise UserError(f"{what} is not plain data ({type(value).__name__} {value!r:.40}); give what JSON can hold")


def checked(messages: Any, where: str = "messages") -> list[dict[str, Any]]:
    """Returns the messages of a conversation: each a dict with a "role", and mostly "content".

    Messages of ShareGPT's form (`from` and `value`) get roles. Thoughts are known by all their names, as in
    transformers: those under "reasoning_content", "thinking" or "reasoning" are also the first, and the second unless
    it is there. What is None is left out.

    Args:
        messages: the messages; see `plain_data` for what they may be made of.
        where: what holds them, for messages of errors.

    Raises:
        UserError: for what is no such list, or an unknown form or speaker.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, (Sequence, np.ndarray)):
        raise UserError(f"{where} is {messages!r:.60}; give a list of dicts, at least one")
    if not len(messages):
        raise UserError(f"{where} is {[]}; give a list of dicts, at least one")
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
        raise UserError(f"{what} is from {speaker!r}{perhaps(speaker, _SHAREGPT)}; rename it")
    rest = {name: value for name, value in message.items() if name not in ("from", "value")}
    content = message.get("value", rest.pop("content", None))
    if speaker == "function_call" and (calls := _calls(content)):
        return {"role": "assistant", "content": "", "tool_calls": calls, **rest}
    return {"role": _SHAREGPT[speaker], "content": content, **rest}


def _calls(content: Any) -> list[dict[str, Any]]:
    """Returns the calls of tools that a text spells as JSON; [] where it spells none."""
    try:
        found = json.loads(content)
    except (TypeError, ValueError, RecursionError):
        return []
    found = found if isinstance(found, list) else [found]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in found):
        return []
    return [{"type": "function", "function": {"arguments": {}, **call}} for call in found]


def text_of(content: Any) -> str:
    """Returns the text of a message's content, which may be a list of parts."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return content if isinstance(content, str) else ""


def with_plain_content(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the messages with one text for a list of parts, as a template reads them that knows no parts.

    Raises:
        UserError: for a part that is no text.
    """
    made = []
    for n, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content):
            if odd := next((part for part in content if not isinstance(part.get("text"), str)), None):
                raise UserError(
                    f"message {n} has a part {odd['type']!r:.40}, but the chat template reads text; give text"
                )
            message = {**message, "content": text_of(content)}
        made.append(message)
    return made
