"""The Jinja environment of chat templates: transformers' settings, filters and functions, on texts with an origin.

Every string that a template meets is a `template_text.Text`: its constants, what users wrote, and what filters,
functions and `~` make of them. It is used in the process of `template_worker`, which bounds time and memory.
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

# These look at the characters of a text by functions of Python that do not know `Text`.
_DERIVED = {"e", "escape", "filesizeformat", "float", "forceescape", "int", "pprint", "round", "striptags", "title"}
_DERIVED |= {"truncate", "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr"}


class RefusedError(Exception):
    """The template called raise_exception."""


class Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        """Parses the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller: Any) -> Text:
        """Returns the text of the block between marks."""
        return concat((ANSWER_BEGINS, caller(), ANSWER_ENDS))


class _Compiler(CodeGenerator):
    """Jinja's compiler, whose constants are texts, and whose `~` makes one."""

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        value = node.as_const(frame.eval_ctx)
        if type(value) is str:
            self.environment.texts[value] = Text(value, value)  # type: ignore[attr-defined]
            self.write(f"environment.texts[{value!r}]")
        else:
            super().visit_Const(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Const) and type(node.arg.value) is str:  # a name needs no origin
            self.write("environment.getitem(")
            self.visit(node.node, frame)
            self.write(f", {node.arg.value!r})")
        else:
            super().visit_Getitem(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template, as transformers sets it up."""

    code_generator_class = _Compiler

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[Generation, loopcontrols])
        self.texts: dict[str, Text] = {}
        self.now = datetime.now()  # one for all renderings of a chat
        self.concat = concat  # type: ignore[assignment,method-assign]
        kind = lambda name: _derived if name in _DERIVED else _typed
        self.filters = {name: kind(name)(function) for name, function in self.filters.items()}
        self.filters["tojson"] = tojson
        self.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": self.strftime_now,
            "dict": _Dict(),
            "namespace": _Names,
        }

    def strftime_now(self, form: str) -> Text:
        """Returns the date and time of the renderings."""
        text = self.now.strftime(plain_of(form))
        return from_user(text) if has_user(form) else Text(text)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Returns whether a template may read an attribute; those of a user's number would be plain numbers."""
        return not isinstance(obj, (Integer, Real)) and super().is_safe_attribute(obj, attr, value)

    def joined(self, parts: Iterable[Any]) -> Text:
        """Returns what `~` makes of its parts."""
        return concat([str(part) for part in parts])

    def call(self, context: Any, function: Any, *args: Any, **named: Any) -> Any:
        """Calls a function for the template."""
        return _text(super().call(context, function, *args, **named))


def concat(parts: Iterable[str]) -> Text:
    """Returns one text of several."""
    return Text("").join(parts)


def _text(value: Any) -> Any:
    return Text(value) if type(value) is str else value


def _typed(function: Callable) -> Callable:
    @wraps(function)
    def run(*args: Any, **named: Any) -> Any:
        return _text(function(*args, **named))

    return run


def _derived(function: Callable) -> Callable:
    """Returns the filter with plain strings for arguments: what comes out is a user's if part of what went in is."""

    @wraps(function)
    def run(*args: Any, **named: Any) -> Any:
        value = function(*map(plain_of, args), **plain_of(named))
        if not has_user(args) and not has_user(named):
            return _text(value)
        if isinstance(value, Markup):
            return Markup(hide(str.__str__(value)))
        return from_user(value) if isinstance(value, str) else user_number(value)

    return run


class _Names(Namespace):
    """Jinja's namespace, but without names that lead into Python."""

    def __init__(*given: Any, **named: Any) -> None:
        self, *more = given
        values = dict(*more, **named)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise RefusedError(f"a namespace of the template has no {name!r}")


class _Dict:
    def __call__(self, *given: Any, **named: Any) -> dict:
        return dict(*given, **named)

    def fromkeys(self, *given: Any) -> dict:
        return dict.fromkeys(*given)


def raise_exception(message: Any) -> None:
    """Ends a rendering with a message of the template."""
    raise RefusedError(str(plain_of(message)))


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> Text:
    """Returns JSON as `json.dumps` writes it (Jinja's own filter would escape the signs of HTML)."""
    between, colon = separators or (", " if indent is None else ",", ": ")
    step = indent if indent is None or isinstance(indent, str) else " " * indent
    pieces: list[str] = []

    def string(text: str) -> str:
        if not has_user(text):
            return json.dumps(plain_of(text), ensure_ascii=ensure_ascii)
        # Character by character, so that each keeps its origin.
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
