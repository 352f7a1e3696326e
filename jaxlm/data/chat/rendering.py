"""Chats to text and to token ids, by the template that a tokenizer brings along.

A template is Jinja source, in chat_template.jinja or in tokenizer_config.json beside the vocabulary. It runs as
transformers runs it: sandboxed, with the same settings, filters and functions, so a chat is the same text here and
there. It comes from a stranger, so it runs in a process of its own with limits of time and memory
(`template_process`), and it is known of each character whether the template or a user wrote it (`template_text`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxlm.data.chat import conversations, template_process, tokens
from jaxlm.data.chat.conversations import Messages
from jaxlm.data.chat.tokens import Rendered, Span
from jaxlm.errors import UserError, perhaps

if TYPE_CHECKING:
    from jaxlm.data.tokenizers.tokenizer import Tokenizer

SOURCE = 1_000_000  # characters of a template
_PICKS_PARTS = re.compile(r"content['\"]?\]?\s*\|\s*(selectattr|rejectattr|map)")
_FOR, _IN = re.compile(r"for\s"), re.compile(r"\sin\s")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_HALF = re.compile("[\ud800-\udfff]")
_WINDOW = 512  # conversations that are rendered and encoded at once


def render(
    tokenizer: Tokenizer,
    messages: Messages,
    add_generation_prompt: bool = False,
    *,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """Returns the text of a chat, to be read.

    Give a model the ids of `prompt` or `encode`: the text alone does not show which of its special tokens the template
    wrote and which stood in a message.

    Args:
        tokenizer: has the templates, and the special tokens that they name.
        messages: dicts with a "role", one of `conversations.ROLES` or one that the template names, and mostly
            "content"; or with "from" and "value", as in ShareGPT. Thoughts of the assistant under "reasoning_content",
            "reasoning" or "thinking" are known by the names that templates read.
        add_generation_prompt: end with the words that begin the assistant's next message.
        template: Jinja source, or the name of one of the tokenizer's templates; None: its default, or with tools
            "tool_use".
        tools: descriptions (JSON schemas) of what the assistant may call.
        variables: what else the template reads, such as enable_thinking=False.

    Raises:
        UserError: where there is no template, for messages that are not such dicts or that the template refuses, and
            for a template that fails or needs more time, memory or characters than the limits.
        RunError: where the process that renders does not start.
    """
    use = _template(tokenizer, template, tools)
    chat = _chat(tokenizer, use, messages, tools, variables)
    (found,) = _rendered(use, [{**chat, "renderings": [[len(chat["messages"]), add_generation_prompt]]}])
    return found[0].text


def prompt(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> list[int]:
    """Returns the ids [T] of a chat up to where the assistant's next message begins: a prompt for `jaxlm.generate`.

    Control tokens (added tokens of the tokenizer, marked as special or not) that the template writes have their ids.
    Those in messages, tools and variables are encoded like other text, whatever the template does with it, so no user
    can end a message or speak as another. (transformers takes them for tokens, unless it is called with
    sanitize_control_tokens, which keeps fewer of them out.) Added tokens that are words or white space are no control
    tokens.

    Args and errors are those of `render`.
    """
    return next(prompts(tokenizer, [messages], template=template, tools=tools, **variables))


def prompts(
    tokenizer: Tokenizer,
    chats: Iterable[Messages],
    *,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> Iterator[list[int]]:
    """Yields the `prompt` of each of many chats; rendering and encoding them together is faster."""
    use = _template(tokenizer, template, tools)
    made = (_chat(tokenizer, use, messages, tools, variables) for messages in chats)
    jobs = ({**chat, "renderings": [[len(chat["messages"]), True]]} for chat in made)
    while some := list(islice(jobs, _WINDOW)):
        texts = [found[0] for found in _rendered(use, some)]
        yield from (ids for ids, _ in tokens.encode(tokenizer, use.source, texts))


def encode(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    only_last: bool = False,
    **variables: Any,
) -> tuple[list[int], list[bool]]:
    """Returns the ids of a chat [T], and which of them the assistant says [T]: the loss is there.

    What the assistant says is what stands in the template's `{% generation %}` blocks. In a template without them it
    is what an assistant's message adds to the text behind the prompt for it, its end token included and white space
    behind that not. A token that begins before an answer and ends in it belongs to it, as in transformers.

    Args:
        tokenizer, messages, template, tools, variables: as in `render`.
        only_last: of several answers only the last one counts.

    Raises:
        UserError: as `render`, and where a template without `{% generation %}` writes earlier messages in another way
            once later ones follow, so that an answer is not found.
        RunError: as `render`.
    """
    more = {"template": template, "tools": tools, "only_last": only_last, **variables}
    return next(encode_all(tokenizer, [messages], **more))


def encode_all(
    tokenizer: Tokenizer,
    chats: Iterable[Messages],
    *,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    only_last: bool = False,
    **variables: Any,
) -> Iterator[tuple[list[int], list[bool]]]:
    """Yields the `encode` of each of many chats; rendering and encoding them together is faster."""
    use = _template(tokenizer, template, tools)
    marked = _GENERATION.search(use.source) is not None
    made = (_chat(tokenizer, use, messages, tools, variables) for messages in chats)
    while some := list(islice(made, _WINDOW)):
        answers = [[] if marked else _answers(chat["messages"], only_last) for chat in some]
        for chat, places in zip(some, answers):
            pairs = ([[place, True], [place + 1, False]] for place in places)
            chat["renderings"] = [[len(chat["messages"]), False], *chain.from_iterable(pairs)]
        texts = []
        for places, found in zip(answers, _rendered(use, some)):
            text = found[0] if marked else _with_answers(tokenizer, use, places, found)
            texts.append(text._replace(answers=text.answers[-1:]) if only_last else text)
        yield from tokens.encode(tokenizer, use.source, texts)


def _answers(messages: Sequence[Mapping[str, Any]], only_last: bool) -> list[int]:
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    return places[-1:] if only_last else places


def _with_answers(tokenizer: Tokenizer, use: _Template, places: Sequence[int], found: Sequence[Rendered]) -> Rendered:
    """Returns the text with the bounds of what each message of the assistant added to it."""
    whole, others = found[0], found[1:]
    answers: list[Span] = []
    for place, before, after in zip(places, others[::2], others[1::2]):
        if not (whole.text.startswith(after.text) and after.text.startswith(before.text)):
            alone = "learn the last answer alone (only_last=True, --task.last-alone), or " if place < places[-1] else ""
            raise UserError(
                f"the chat template {use.name} has no {{% generation %}} and writes messages in another way once "
                f"others follow, so that the answer in message {place} cannot be found; {alone}put the answer of the "
                f"template between {{% generation %}} and {{% endgeneration %}}, and give that as template= "
                f"(--task.template)"
            )
        start, end = len(before.text), len(after.text)
        control = tokens.control_pattern(tokenizer, use.source)
        written = max([start, *(user for _, user in after.users)])  # what is behind that, the template wrote
        closing = [match.end() for match in control.finditer(after.text, written)]
        if closing and not after.text[closing[-1] :].strip():
            end = closing[-1]
        answers.append((start, end))
    return whole._replace(answers=answers)


# What a template is given.


class _Template(NamedTuple):
    name: str  # for messages
    source: str


def _chat(
    tokenizer: Tokenizer,
    use: _Template,
    messages: Messages,
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns a job for `template_process`, without its renderings."""
    plain = conversations.checked(messages)
    for place, message in enumerate(plain):
        role = message["role"]
        if not _is_known(tokenizer, use, role):
            # Most templates leave out a message of a role that they do not know, and say nothing.
            raise UserError(f"message {place} has the role {role!r}{perhaps(role, conversations.ROLES)}; rename it")
    if not _reads_parts(use.source):
        plain = conversations.with_plain_content(plain)
    listed = isinstance(tools, Sequence) and all(isinstance(tool, Mapping) for tool in tools)
    if tools is not None and not listed:
        raise UserError(f"tools= is {tools!r:.60}; give a list of descriptions (JSON schemas), each a dict")
    more = {name: conversations.plain_data(value, f"the variable {name}") for name, value in variables.items()}
    given = {"tools": conversations.plain_data(tools, "tools"), "documents": None, **more}
    special = {f"{role}_token": token for role, token in tokenizer.special.items()}
    roles = (*conversations.ROLES, *conversations.MORE_ROLES)
    return {"source": use.source, "messages": plain, "roles": roles, "special": special, "given": given}


@lru_cache(maxsize=32)
def _reads_parts(source: str) -> bool:
    """Returns whether a template loops over a content that is a list of parts, or picks from it.

    It takes time in proportion to the source, whatever a stranger wrote there.
    """
    for statement in source.split("%"):
        begin = _FOR.search(statement)
        inner = begin and _IN.search(statement, begin.end())
        if inner and "content" in statement[inner.end() :]:
            return True
    return _PICKS_PARTS.search(source) is not None


def _is_known(tokenizer: Tokenizer, use: _Template, role: str) -> bool:
    """Returns whether a template has a role: it compares with it, or a token such as <|observation|> is made of it."""
    if role in conversations.ROLES or re.search(rf"""["']{re.escape(role)}["']""", use.source):
        return True
    added = tokenizer.backend.get_added_tokens_decoder().values()
    return role in conversations.MORE_ROLES and any(role in token.content for token in added)


def _template(tokenizer: Tokenizer, asked: str | None, tools: Any) -> _Template:
    """Returns the template to use. Raises UserError where there is none."""
    if asked is not None and not isinstance(asked, str):
        raise UserError(f"template= is {asked!r:.60}; give Jinja source, or the name of a template of the tokenizer")
    known = templates(tokenizer)
    if asked is None:
        name = "tool_use" if tools is not None and "tool_use" in known else "default"
        if name not in known:
            remedy = f"name one of: {', '.join(sorted(known))}" if known else "add chat_template.jinja beside its files"
            which = "default chat" if known else "chat"
            raise UserError(f"the tokenizer has no {which} template; {remedy}, by template= (--task.template)")
        source = known[name]
    else:
        name, source = (asked if asked in known else "that was given"), known.get(asked, asked)
    if len(source) > SOURCE:
        raise UserError(f"the chat template {name} has {len(source):,} characters, more than {SOURCE:,}; shorten it")
    if source == asked and source.isidentifier():
        remedy = perhaps(source, known) if known else "; it has none: give Jinja source"
        raise UserError(f"the tokenizer has no chat template {source!r}{remedy}")
    return _Template(repr(name) if name in known else name, source)


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


# Rendering.


def _rendered(use: _Template, jobs: Sequence[dict[str, Any]]) -> Iterator[list[Rendered]]:
    """Yields the renderings of each job. Raises UserError for a problem with a template, or what it was given."""
    for result in template_process.render(jobs):
        if isinstance(result, template_process.Problem):
            raise UserError(_sentence(use, result))
        if any(not text.isascii() and _HALF.search(text) for text, _, _ in result):
            raise UserError(f"the chat template {use.name} writes half of a surrogate pair; correct it")
        yield [Rendered(text, _spans(users), _spans(answers)) for text, users, answers in result]


def _spans(bounds: Sequence[int]) -> list[Span]:
    return list(zip(bounds[::2], bounds[1::2]))


def _sentence(use: _Template, problem: template_process.Problem) -> str:
    other = "correct it, or give another template="
    limits = template_process
    says = {
        "syntax": f"is no Jinja template ({problem.detail}); correct it",
        "refused": f"refuses these messages: {problem.detail}; give messages that it takes",
        "recursion": f"calls itself without end, or is nested too deeply; {other}",
        "memory": f"needs more memory than {limits.MEMORY >> 20} MiB; {other}",
        "characters": f"makes a text of more than {limits.CHARACTERS:,} characters; {other}",
        "fails": f"fails on these messages ({problem.detail}); correct them, or give another template=",
        "time": f"takes more than {limits.SECONDS:g} s of processor time; {other}",
        "silent": f"gave no text for {limits.SILENCE:g} s; {other}",
        "stopped": f"ended the process that renders it ({problem.detail}); {other}",
    }
    return f"the chat template {use.name} {says[problem.kind]}"
