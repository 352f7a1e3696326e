"""The Jinja environment of chat templates: settings, filters and functions of transformers, on strings with an origin.

Every string in a template is a `template_text.Text`: constants, text written by users, and results of filters,
functions and `~`. The environment is used in the process of `template_worker`, which limits time and memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from markupsafe import Markup

from jaxlm.data.chat.template_text import (
    ANSWER_BEGINS,
    ANSWER_ENDS,
    Integer,
    Real,
    Text,
    from_user,
    has_user,
    hide,
    plain_of,
    user_number,
)

# Filters that process the characters of a text with functions of Python that do not support `Text`.
_DERIVED = {"e", "escape", "filesizeformat", "float", "forceescape", "int", "pprint", "round", "striptags", "title"}
_DERIVED |= {"truncate", "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr"}


class RefusedError(Exception):
    """The template called raise_exception."""


class GenerationBlock(Extension):
    """Adds `{% generation %} ... {% endgeneration %}`, which encloses an answer of the assistant."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        """Returns the syntax tree of the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("enclose"), [], [], body).set_lineno(line)

    def enclose(self, caller: Any) -> Text:
        """Returns the text of the block, enclosed in marks."""
        return concat((ANSWER_BEGINS, caller(), ANSWER_ENDS))


class _Compiler(CodeGenerator):
    """Jinja's compiler, changed so that constants and results of `~` are of type `Text`."""

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        value = node.as_const(frame.eval_ctx)
        if type(value) is str:
            self.environment.texts[value] = Text(value, value)  # type: ignore[attr-defined]
            self.write(f"environment.texts[{value!r}]")
        else:
            super().visit_Const(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Const) and type(node.arg.value) is str:  # names have no origin
            self.write("environment.getitem(")
            self.visit(node.node, frame)
            self.write(f", {node.arg.value!r})")
        else:
            super().visit_Getitem(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template, configured as in transformers."""

    code_generator_class = _Compiler

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[GenerationBlock, loopcontrols]
        )
        self.texts: dict[str, Text] = {}
        self.now = datetime.now()  # the same for all renderings of a chat
        self.concat = concat  # type: ignore[assignment,method-assign]
        wrap = lambda name: _derive if name in _DERIVED else _as_text
        self.filters = {name: wrap(name)(function) for name, function in self.filters.items()}
        self.filters["tojson"] = tojson
        self.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": self.strftime_now,
            "dict": _Dict(),
            "namespace": _Names,
        }

    def strftime_now(self, format: str) -> Text:
        """Returns the date and time of the renderings in a format of strftime."""
        text = self.now.strftime(plain_of(format))
        return from_user(text) if has_user(format) else Text(text)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Returns whether a template can read an attribute.

        Attributes of numbers from a user are not readable, because they would be plain numbers without an origin.
        """
        return not isinstance(obj, (Integer, Real)) and super().is_safe_attribute(obj, attr, value)

    def join(self, parts: Iterable[Any]) -> Text:
        """Returns the result of `~`."""
        return concat([str(part) for part in parts])

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a function of the template and returns its result; strings become `Text`."""
        return _text(super().call(context, function, *args, **kwargs))


def concat(parts: Iterable[str]) -> Text:
    """Returns the concatenation of texts."""
    return Text("").join(parts)


def _text(value: Any) -> Any:
    return Text(value) if type(value) is str else value


def _as_text(function: Callable) -> Callable:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return _text(function(*args, **kwargs))

    return run


def _derive(function: Callable) -> Callable:
    """Wraps a filter of plain strings: the whole result is text of a user if any argument contains text of a user."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        value = function(*map(plain_of, args), **plain_of(kwargs))
        if not has_user(args) and not has_user(kwargs):
            return _text(value)
        if isinstance(value, Markup):
            return Markup(hide(str.__str__(value)))
        return from_user(value) if isinstance(value, str) else user_number(value)

    return run


class _Names(Namespace):
    """Jinja's namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *more = args
        values = dict(*more, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise RefusedError(f"a namespace of the template cannot have the name {name!r}")


class _Dict:
    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


def raise_exception(message: Any) -> None:
    """Ends a rendering with an error message of the template."""
    raise RefusedError(str(plain_of(message)))


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> Text:
    """Returns JSON as written by `json.dumps`; Jinja's own filter would also escape for HTML."""
    between, colon = separators or (", " if indent is None else ",", ": ")
    step = indent if indent is None or isinstance(indent, str) else " " * indent
    pieces: list[str] = []

    def string(text: str) -> str:
        if not has_user(text):
            return json.dumps(plain_of(text), ensure_ascii=ensure_ascii)
        # Encode each character separately to keep its origin.
        parts = ((char, json.dumps(plain_of(char), ensure_ascii=ensure_ascii)[1:-1]) for char in Text(text))
        return '"' + "".join(hide(plain) if has_user(char) else plain for char, plain in parts) + '"'

    def key_of(key: Any) -> str:
        if not isinstance(key, (str, int, float)) and key is not None:
            raise TypeError(f"keys must be str, int, float, bool or None, not {type(key).__name__}")
        return string(key) if isinstance(key, str) else string(str(_scalar(key)))

    def write(value: Any, margin: str) -> None:
        if isinstance(value, str):
            pieces.append(string(value))
        elif isinstance(value, (list, tuple, dict)):
            opening, closing = "{}" if isinstance(value, dict) else "[]"
            inner = margin if step is None else margin + step
            start = "" if step is None else "\n" + inner
            pieces.append(opening)
            items = value.items() if isinstance(value, dict) else ((None, item) for item in value)
            for n, (key, item) in enumerate(sorted(items) if sort_keys and isinstance(value, dict) else items):
                pieces.append((between if n else "") + start)
                if isinstance(value, dict):
                    pieces.extend((key_of(key), colon))
                write(item, inner)
            pieces.append(("" if step is None or not value else "\n" + margin) + closing)
        else:
            pieces.append(_scalar(value))

    write(value, "")
    return concat(pieces)


def _scalar(value: Any) -> str:
    if not isinstance(value, (int, float)) and value is not None:
        raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
    plain = json.dumps(plain_of(value))
    return hide(plain) if has_user(value) else plain
