"""Chats to text and to token ids, by the template that a tokenizer brings along.

A template is Jinja source, in chat_template.jinja or in tokenizer_config.json beside the vocabulary.  It runs as
transformers runs it: sandboxed, with the same settings, filters and functions, so that a chat is the same text there.
It comes from a stranger: what it may loop and build is bounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxlm.errors import UserError, perhaps

if TYPE_CHECKING:
    import jinja2
    import tokenizers

    from jaxlm.data.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")
ROUNDS = 200_000  # of loops, and calls of macros, in one rendering
CHARACTERS = 50_000_000  # of a text that a template makes
SOURCE = 1_000_000  # characters of a template

Messages = Sequence[Mapping[str, Any]]


def render(
    tokenizer: Tokenizer,
    messages: Messages,
    add_generation_prompt: bool = False,
    *,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """The text of a chat, to be read.  Give a model the ids of `prompt` or `encode`: the text alone does not tell which
    of its special tokens the template wrote and which stood in a message.

    messages: dicts with a "role", of ROLES or one that the template names, and mostly "content".
    add_generation_prompt: end with the words that begin the assistant's next message.
    template: Jinja source, or the name of one of the tokenizer's templates; None: its default, or with tools
    "tool_use".  tools: descriptions (JSON schemas) of what the assistant may call.  variables: what else the template
    reads, such as enable_thinking=False.

    Raises UserError where there is no template, for messages that are not such dicts or that the template refuses, and
    for a template that fails or passes the bounds above.
    """
    chat = _chat(tokenizer, messages, template, tools, variables)
    return chat.render(_Marks("", "", "", ""), len(chat.messages), add_generation_prompt)


def prompt(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> list[int]:
    """The ids [T] of a chat up to where the assistant's next message begins: a prompt for `jaxlm.generate`.

    Special tokens that the template writes have their ids.  Those in messages, tools and variables are spelled like
    other text, so that no user can end a message or speak as another.  (transformers takes them for special tokens,
    unless it is told to sanitize_control_tokens.)

    The rest is as in `render`.
    """
    chat, marks = _marked(tokenizer, _chat(tokenizer, messages, template, tools, variables))
    return _encoded(tokenizer, chat.render(marks, len(chat.messages), True), marks)[0]


def encode(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    only_last: bool = False,
    **variables: Any,
) -> tuple[list[int], list[bool]]:
    """The ids of a chat [T], and which of them the assistant says [T]: where an instruction-tuned model has a loss.

    What the assistant says is what stands in the template's `{% generation %}` blocks.  In a template without them it
    is what an assistant's message adds to the text behind the prompt for it, its end token included and white space
    behind that not.  A token that begins before an answer and ends in it belongs to it, as in transformers.
    only_last: of several answers only the last one counts.

    Special tokens are as in `prompt`, the rest as in `render`.  Also raises UserError where a template without
    `{% generation %}` writes earlier messages in another way once later ones follow, so that an answer is not found.
    """
    chat, marks = _marked(tokenizer, _chat(tokenizer, messages, template, tools, variables))
    text = chat.render(marks, len(chat.messages), False)
    if marks.say not in text:
        text = _with_answers(chat, text, _special(tokenizer), marks, only_last)
    if only_last:
        before, said, answer = text.rpartition(marks.say)
        text = before.replace(marks.say, "").replace(marks.said, "") + said + answer
    return _encoded(tokenizer, text, marks)


class _Marks(NamedTuple):
    """Characters that stand nowhere else.  They are empty where nothing is to be marked."""

    open: str  # around a special token that a user wrote
    close: str
    say: str  # around what the assistant says
    said: str


@dataclass(frozen=True)
class _Chat:
    source: str
    messages: list[dict[str, Any]]
    given: dict[str, Any]  # what the template knows by name, besides
    now: datetime = field(default_factory=datetime.now)  # one for all renderings of a chat

    def render(self, marks: _Marks, count: int, prompt: bool) -> str:
        """The text of the first `count` messages, what the assistant says between marks where the template tells."""
        import jinja2

        try:
            made = _compiled(self.source)
            known = {**self.given, "messages": self.messages[:count], "add_generation_prompt": prompt}
            pieces, size = [], 0
            with _rendering(marks, self.now):
                for piece in made.generate(known):
                    pieces.append(piece)
                    size += len(piece)
                    _check_size(size)
        except UserError:
            raise
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is no Jinja template (line {error.lineno}: {error}); correct it"
            ) from None
        except _Refused as error:
            raise UserError(f"the chat template refuses these messages: {error}; give messages that it takes") from None
        except RecursionError:
            raise UserError(
                "the chat template calls itself without end; correct it, or give another template="
            ) from None
        except Exception as error:  # it is a stranger's program, and may fail in any way
            raise UserError(
                f"the chat template fails on these messages ({type(error).__name__}: {str(error)[:300]}); "
                f"correct them, or give another template="
            ) from None
        return "".join(pieces)


def _chat(
    tokenizer: Tokenizer,
    messages: Messages,
    template: str | None,
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> _Chat:
    source = _source(tokenizer, template, tools is not None)
    if isinstance(messages, (str, Mapping)) or not len(messages):
        raise UserError(f"messages is {messages!r:.60}; give a list of dicts, at least one")
    try:  # the template sees plain data only, a copy without methods that a sandbox would have to know
        plain = json.loads(json.dumps(list(messages)))
        more = {"tools": None if tools is None else list(tools), "documents": None, **variables}
        given = json.loads(json.dumps(more))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"messages, tools or variables are not plain data ({error}); give what JSON can hold") from None
    for place, message in enumerate(plain):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str):
            raise UserError(f"message {place} is {message!r:.60}; give a dict with a role, such as 'user', and content")
        if role not in ROLES and not re.search(rf"""["']{re.escape(role)}["']""", source):
            # Most templates leave out a message of a role that they do not know, and say nothing.
            raise UserError(f"message {place} has the role {role!r}{perhaps(role, ROLES)}; rename it")
        plain[place] = {name: value for name, value in message.items() if value is not None}
    names = {f"{role}_token": token for role, token in tokenizer.special.items()}
    return _Chat(source, plain, names | given)


def _source(tokenizer: Tokenizer, asked: str | None, tools: bool) -> str:
    """The template to use.  Raises UserError where there is none."""
    known = templates(tokenizer)
    if asked is None:
        name = "tool_use" if tools and "tool_use" in known else "default"
        if name not in known:
            remedy = f"name one of: {', '.join(sorted(known))}" if known else "add chat_template.jinja beside its files"
            which = "default chat" if known else "chat"
            raise UserError(f"the tokenizer has no {which} template; {remedy}, by template= (--task.template)")
        source = known[name]
    else:
        source = known.get(asked, asked)
    if len(source) > SOURCE:
        raise UserError(f"the chat template has {len(source):,} characters, more than {SOURCE:,}; shorten it")
    if source == asked and source.isidentifier():
        remedy = perhaps(source, known) if known else "; it has none: give Jinja source"
        raise UserError(f"the tokenizer has no chat template {source!r}{remedy}")
    return source


def templates(tokenizer: Tokenizer) -> dict[str, str]:
    """The tokenizer's chat templates: name -> Jinja source; the usual one is "default".

    Raises UserError for a file that holds none.
    """
    said: Any
    try:
        config = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}"))
        said = config.get("chat_template") or {}
        if isinstance(said, list):
            said = {one["name"]: one["template"] for one in said}
        found = dict(said) if isinstance(said, dict) else {"default": said}
        for file, content in tokenizer.files.items():  # they come before what is said in tokenizer_config.json
            if file == "chat_template.jinja":
                found["default"] = content.decode()
            elif file.startswith("additional_chat_templates/"):
                found[file.rpartition("/")[2].removesuffix(".jinja")] = content.decode()
        wrong = next((source for source in found.values() if not isinstance(source, str)), None)
        if wrong is not None:
            raise TypeError(f"{wrong!r:.40} is no text")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"the tokenizer's chat_template is none ({type(error).__name__}: {error}); give Jinja source, or a list of "
            f"objects with name and template"
        ) from None
    return found


# The sandbox.


class _Refused(Exception):  # noqa: N818 - it is what the template says of the messages
    """The template called raise_exception."""


@dataclass
class _Rendering:
    marks: _Marks
    now: datetime
    rounds: int = 0


_RENDERING: ContextVar[_Rendering] = ContextVar("rendering")


@contextmanager
def _rendering(marks: _Marks, now: datetime) -> Iterator[None]:
    before = _RENDERING.set(_Rendering(marks, now))
    try:
        yield
    finally:
        _RENDERING.reset(before)


def _check_size(characters: int) -> None:
    if characters > CHARACTERS:
        raise UserError(
            f"the chat template makes a text of {characters:,} characters, more than {CHARACTERS:,}; "
            f"correct it, or give another template="
        )


@lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    """The template, with transformers' settings, filters and functions."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.runtime import str_join
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}`: what the assistant says."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("said"), [], [], body).set_lineno(line)

        def said(self, caller: Any) -> str:
            marks = _RENDERING.get().marks
            return marks.say + caller() + marks.said

    class Bounds(Extension):
        """Counts rounds of loops and calls of macros, and measures texts that `~` joins."""

        def count(self) -> None:
            now = _RENDERING.get()
            now.rounds += 1
            if now.rounds > ROUNDS:
                raise UserError(
                    f"the chat template loops more than {ROUNDS:,} times; correct it, or give another template="
                )

        def joined(self, *parts: Any) -> str:
            _check_size(sum(len(part) for part in parts if isinstance(part, str)))
            return str_join(parts)

    class Bounded(NodeTransformer):
        def __init__(self, bounds: Bounds):
            self.bounds = bounds

        def counted(self, node: Any) -> Any:
            self.generic_visit(node)
            node.body.insert(0, nodes.ExprStmt(self.bounds.call_method("count", lineno=node.lineno)))
            return node

        visit_For = visit_Macro = visit_CallBlock = counted

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            return self.bounds.call_method("joined", node.nodes, lineno=node.lineno)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "+"})

        def _parse(self, *given: Any) -> Any:
            (bounds,) = (one for one in self.extensions.values() if isinstance(one, Bounds))
            return Bounded(bounds).visit(super()._parse(*given))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            size = lambda value: len(value) if hasattr(value, "__len__") else 1
            if operator == "+":
                _check_size(size(left) + size(right))
            elif operator == "**":
                _check_size(int(abs(right)) * 64 if abs(left) > 1 else 0)
            elif hasattr(left, "__len__") or hasattr(right, "__len__"):
                count = left if hasattr(right, "__len__") else right
                _check_size(max(size(left), size(right)) * max(int(count), 0))
            return super().call_binop(context, operator, left, right)

    class Names(Namespace):  # Jinja's own, but without names that lead into Python
        def __init__(*given: Any, **named: Any) -> None:
            self, *more = given
            values = dict(*more, **named)
            for name in values:
                Names.check(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            Names.check(name)
            super().__setitem__(name, value)

        @staticmethod
        def check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise _Refused(f"a namespace of the template has no {name!r}")

    class Dict:
        def __call__(self, *given: Any, **named: Any) -> dict:
            return dict(*given, **named)

        def fromkeys(self, *given: Any) -> dict:
            return dict.fromkeys(*given)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # Jinja's own would escape the signs of HTML.
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        for mark in filter(None, _RENDERING.get().marks):
            text = text.replace(json.dumps(mark)[1:-1], mark)
        return text

    def raise_exception(message: Any) -> None:
        raise _Refused(str(message))

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, Bounds, loopcontrols])
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda format: _RENDERING.get().now.strftime(format),
        "dict": Dict(),
        "namespace": Names,
    }
    return sandbox.from_string(source)


# Text to ids.


def _mapped(change: Any, value: Any) -> Any:
    """Plain data with every string in it changed, but for the keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(change, item) for key, item in value.items()}
    return [_mapped(change, item) for item in value] if isinstance(value, list) else value


@lru_cache(maxsize=8)
def _special(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Finds special tokens, the longest of those that begin at a place."""
    tokens = (t.content for t in tokenizer.backend.get_added_tokens_decoder().values() if t.special and t.content)
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _marked(tokenizer: Tokenizer, chat: _Chat) -> tuple[_Chat, _Marks]:
    """The chat with marks around special tokens in what users wrote.

    The marks are characters for private use that stand nowhere in the chat, so that nobody can forge them.
    """
    taken = set(chat.source) | set(json.dumps([chat.messages, chat.given], ensure_ascii=False))
    free = (chr(i) for i in range(0xF0000, 0xFFFFE) if chr(i) not in taken)
    try:
        marks = _Marks(next(free), next(free), next(free), next(free))
    except StopIteration:
        raise UserError("the messages have all characters from U+F0000 to U+FFFFD; take some of them out") from None
    protect = lambda text: _special(tokenizer).sub(rf"{marks.open}\g<0>{marks.close}", text)
    given = {name: value if name.endswith("_token") else _mapped(protect, value) for name, value in chat.given.items()}
    return replace(chat, messages=_mapped(protect, chat.messages), given=given), marks


def _with_answers(chat: _Chat, text: str, special: re.Pattern[str], marks: _Marks, only_last: bool) -> str:
    """The text with marks around what each message of the assistant, or the last of them, added to it."""
    bounds = [0]
    places = [place for place, message in enumerate(chat.messages) if message["role"] == "assistant"]
    for place in places[-1:] if only_last else places:
        before, after = chat.render(marks, place, True), chat.render(marks, place + 1, False)
        if not (text.startswith(after) and after.startswith(before)):
            raise UserError(
                f"the chat template has no {{% generation %}} and writes messages in another way once others follow, "
                f"so that the answer in message {place} cannot be found; put the answer of the template between "
                f"{{% generation %}} and {{% endgeneration %}}, and give that as template="
            )
        ends = [found.end() for found in special.finditer(after, len(before))]
        end = ends[-1] if ends and not after[ends[-1] :].strip() else len(after)
        bounds += [len(before), end]
    parts = [text[a:b] for a, b in zip(bounds, [*bounds[1:], len(text)])]
    return "".join(part + ("" if n == len(parts) - 1 else marks[2 + n % 2]) for n, part in enumerate(parts))


@lru_cache(maxsize=8)
def _standing_in(tokenizer: Tokenizer, marks: _Marks) -> tuple[tokenizers.Tokenizer, dict[int | None, int]]:
    """The tokenizer, which spells special tokens as text, with a stand-in of each that it does take for one token.

    So one pass over the whole text encodes it, with all that depends on neighbours (spaces that a token swallows, the
    space before the first word) as if the special tokens stood there.  Also: id of a stand-in -> id of the token.
    """
    from tokenizers import AddedToken, Tokenizer

    made = Tokenizer.from_str(tokenizer.backend.to_str())
    made.encode_special_tokens = True
    ids: dict[int | None, int] = {}
    for token, said in sorted(tokenizer.backend.get_added_tokens_decoder().items()):
        if said.special and said.content:
            flags = {name: getattr(said, name) for name in ("single_word", "lstrip", "rstrip")}
            name = _stand_in(token, marks)
            made.add_tokens([AddedToken(name, normalized=False, special=False, **flags)])
            ids[made.token_to_id(name)] = token
    return made, ids


def _stand_in(token: int | None, marks: _Marks) -> str:
    return f"{marks.open}{token}{marks.close}"


def _encoded(tokenizer: Tokenizer, text: str, marks: _Marks) -> tuple[list[int], list[bool]]:
    """Ids of a marked text, and which of them lie in answers."""
    special = _special(tokenizer).pattern
    parts: list[str] = []
    size, answers = 0, [0]  # bounds of what is no answer, then of what is one, in turn
    whole = re.compile(f"{marks.open}({special}){marks.close}|({special})|([{''.join(marks)}])")
    last = 0

    def put(part: str) -> None:
        nonlocal size
        parts.append(part)
        size += len(part)

    for found in whole.finditer(text):
        put(text[last : found.start()])
        last = found.end()
        if found[1] is not None:
            put(found[1])
        elif found[2] is not None:
            put(_stand_in(tokenizer.backend.token_to_id(found[2]), marks))
        elif (found[3] == marks.say) == (len(answers) % 2 == 1) and found[3] in marks[2:]:
            answers.append(size)
    put(text[last:])
    backend, real = _standing_in(tokenizer, marks)
    encoding = backend.encode("".join(parts), add_special_tokens=False)
    spans = list(zip(answers[1::2], [*answers[2::2], size]))
    is_answer, n = [], 0
    for start, end in encoding.offsets:
        while n < len(spans) and start >= spans[n][1]:
            n += 1
        is_answer.append(n < len(spans) and end > spans[n][0])
    return [real.get(token, token) for token in encoding.ids], is_answer
