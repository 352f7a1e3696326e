"""Renders chats to text and token ids with the chat template of a tokenizer.

A template is Jinja source in the files of the tokenizer, chat_template.jinja or tokenizer_config.json. It is run as in
transformers, in a sandbox with the same settings, filters and functions, so the text is the same. Templates are
untrusted, so they run in a separate process with limits of time and memory (`template_process`). For each character, it
is recorded whether the template or a user wrote it (`template_text`).
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
from jaxlm.errors import UserError, suggestion

if TYPE_CHECKING:
    from jaxlm.data.tokenizers.tokenizer import Tokenizer

SOURCE = 1_000_000  # maximum length of a template, in characters
_PICKS_PARTS = re.compile(r"content['\"]?\]?\s*\|\s*(selectattr|rejectattr|map)")
_FOR, _IN = re.compile(r"for\s"), re.compile(r"\sin\s")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_HALF = re.compile("[\ud800-\udfff]")
_WINDOW = 512  # number of conversations that are rendered and encoded together


def render(
    tokenizer: Tokenizer,
    messages: Messages,
    add_generation_prompt: bool = False,
    *,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """Returns the text of a chat, for people to read.

    As input of a model, use the ids of `prompt` or `encode`: the text alone does not show whether a special token was
    written by the template or is part of a message.

    Args:
      tokenizer: a tokenizer with chat templates and the special tokens that they use.
      messages: dicts with a "role", one of `conversations.ROLES` or one that the template names, and usually
        "content"; or with "from" and "value", as in ShareGPT. Reasoning of the assistant can have the name
        "reasoning_content", "reasoning" or "thinking".
      add_generation_prompt: append the text that begins the assistant's next message.
      template: Jinja source, or the name of one of the tokenizer's templates. None: "tool_use" if there are tools and
        the tokenizer has it, otherwise "default".
      tools: descriptions (JSON schemas) of the tools that the assistant can call.
      variables: other variables of the template, such as enable_thinking=False.

    Raises:
      UserError: there is no template, the messages are invalid or rejected by the template, or the template fails or
        exceeds the limits of time, memory or characters.
      RunError: the rendering process does not start.
    """
    use = _template(tokenizer, template, tools)
    chat = _chat(tokenizer, use, messages, tools, variables)
    (renderings,) = _render(use, [{**chat, "renderings": [[len(chat["messages"]), add_generation_prompt]]}])
    return renderings[0].text


def prompt(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> list[int]:
    """Returns the ids [T] of a chat up to the beginning of the assistant's next message, a prompt for `jaxlm.generate`.

    Control tokens (added tokens of the tokenizer, special or not) that the template writes are encoded as their ids.
    The same strings in messages, tools and variables are encoded like other text, whatever the template does with them,
    so users cannot end a message or write in the name of another role. (transformers encodes them as control tokens
    unless sanitize_control_tokens is set, which recognises fewer of them.) Added tokens that are words or white space
    are not control tokens.

    For the arguments and exceptions see `render`.
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
    """Yields the `prompt` of each chat; faster than separate calls, because chats are processed together."""
    use = _template(tokenizer, template, tools)
    plain = (_chat(tokenizer, use, messages, tools, variables) for messages in chats)
    jobs = ({**chat, "renderings": [[len(chat["messages"]), True]]} for chat in plain)
    while window := list(islice(jobs, _WINDOW)):
        texts = [renderings[0] for renderings in _render(use, window)]
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
    """Returns the ids [T] of a chat, and which of them are in the assistant's answers [T], where the loss is computed.

    Answers are the text in the template's `{% generation %}` blocks. If the template has no such blocks, an answer is
    the text that a message of the assistant adds to the prompt for it, up to and including its end token. A token that
    begins before an answer and ends inside it belongs to the answer, as in transformers.

    Args:
      tokenizer, messages, template, tools, variables: see `render`.
      only_last: use only the last answer.

    Raises:
      UserError: see `render`. Also raised if a template without `{% generation %}` renders earlier messages
        differently once later ones follow, so that an answer cannot be found.
      RunError: see `render`.
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
    """Yields the `encode` of each chat; faster than separate calls, because chats are processed together."""
    use = _template(tokenizer, template, tools)
    has_blocks = _GENERATION.search(use.source) is not None
    plain = (_chat(tokenizer, use, messages, tools, variables) for messages in chats)
    while window := list(islice(plain, _WINDOW)):
        answers = [[] if has_blocks else _answers(chat["messages"], only_last) for chat in window]
        for chat, indices in zip(window, answers):
            pairs = ([[index, True], [index + 1, False]] for index in indices)
            chat["renderings"] = [[len(chat["messages"]), False], *chain.from_iterable(pairs)]
        texts = []
        for indices, renderings in zip(answers, _render(use, window)):
            text = renderings[0] if has_blocks else _with_answers(tokenizer, use, indices, renderings)
            texts.append(text._replace(answers=text.answers[-1:]) if only_last else text)
        yield from tokens.encode(tokenizer, use.source, texts)


def _answers(messages: Sequence[Mapping[str, Any]], only_last: bool) -> list[int]:
    """Returns the indices of the messages of the assistant."""
    indices = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return indices[-1:] if only_last else indices


def _with_answers(
    tokenizer: Tokenizer, use: _Template, indices: Sequence[int], renderings: Sequence[Rendered]
) -> Rendered:
    """Returns the whole chat with the spans of the answers.

    Args:
      tokenizer, use: the tokenizer and the template.
      indices: indices of the messages of the assistant.
      renderings: the whole chat, then for each answer the chat up to its beginning and up to its end.
    """
    whole, parts = renderings[0], renderings[1:]
    answers: list[Span] = []
    for index, before, after in zip(indices, parts[::2], parts[1::2]):
        if not (whole.text.startswith(after.text) and after.text.startswith(before.text)):
            last = "train on the last answer only (only_last=True, --task.last-answer-only), or "
            raise UserError(
                f"the chat template {use.name} has no {{% generation %}} and renders messages differently once others "
                f"follow, so that the answer in message {index} cannot be found; {last if index < indices[-1] else ''}"
                f"enclose the answer in the template in {{% generation %}} and {{% endgeneration %}}, and give this as "
                f"template= (--task.template)"
            )
        start, end = len(before.text), len(after.text)
        control = tokens.control_pattern(tokenizer, use.source)
        written = max([start, *(user for _, user in after.users)])  # the template wrote all text after this position
        closing = [match.end() for match in control.finditer(after.text, written)]
        if closing and not after.text[closing[-1] :].strip():
            end = closing[-1]
        answers.append((start, end))
    return whole._replace(answers=answers)


# Inputs of a template.


class _Template(NamedTuple):
    name: str  # for error messages
    source: str


def _chat(
    tokenizer: Tokenizer,
    use: _Template,
    messages: Messages,
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns a job for `template_process`, without its renderings."""
    plain = conversations.check_messages(messages)
    for index, message in enumerate(plain):
        role = message["role"]
        if not _supports_role(tokenizer, use, role):
            # Most templates ignore messages with an unknown role, without an error.
            raise UserError(f"message {index} has the role {role!r}{suggestion(role, conversations.ROLES)}; rename it")
    if not _reads_parts(use.source):
        plain = conversations.with_plain_content(plain)
    are_schemas = isinstance(tools, Sequence) and all(isinstance(tool, Mapping) for tool in tools)
    if tools is not None and not are_schemas:
        raise UserError(f"tools= is {tools!r:.60}; give a list of descriptions (JSON schemas), each a dict")
    more = {name: conversations.plain_data(value, f"the variable {name}") for name, value in variables.items()}
    given = {"tools": conversations.plain_data(tools, "tools"), "documents": None, **more}
    special = {f"{role}_token": token for role, token in tokenizer.special.items()}
    roles = (*conversations.ROLES, *conversations.MORE_ROLES)
    return {"source": use.source, "messages": plain, "roles": roles, "special": special, "given": given}


@lru_cache(maxsize=32)
def _reads_parts(source: str) -> bool:
    """Returns whether a template reads contents that are lists of parts, in a loop or with a filter.

    The run time is linear in the length of the source, for any source.
    """
    for statement in source.split("%"):
        begin = _FOR.search(statement)
        inner = begin and _IN.search(statement, begin.end())
        if inner and "content" in statement[inner.end() :]:
            return True
    return _PICKS_PARTS.search(source) is not None


def _supports_role(tokenizer: Tokenizer, use: _Template, role: str) -> bool:
    """Returns whether a role is a standard one, is named in the template, or has a token such as <|observation|>."""
    if role in conversations.ROLES or re.search(rf"""["']{re.escape(role)}["']""", use.source):
        return True
    added = tokenizer.backend.get_added_tokens_decoder().values()
    return role in conversations.MORE_ROLES and any(role in token.content for token in added)


def _template(tokenizer: Tokenizer, requested: str | None, tools: Any) -> _Template:
    """Returns the template to use. Raises UserError if there is none."""
    if requested is not None and not isinstance(requested, str):
        raise UserError(f"template= is {requested!r:.60}; give Jinja source or the name of a template of the tokenizer")
    known = templates(tokenizer)
    if requested is None:
        name = "tool_use" if tools is not None and "tool_use" in known else "default"
        if not known:
            raise UserError(
                "the tokenizer has no chat template; add chat_template.jinja to its files, or give one with template= "
                "(--task.template)"
            )
        if name not in known:
            raise UserError(
                f"the tokenizer has no default chat template; choose one of {', '.join(sorted(known))} with template= "
                f"(--task.template)"
            )
        source = known[name]
    else:
        name, source = (requested if requested in known else "given as template="), known.get(requested, requested)
    if len(source) > SOURCE:
        raise UserError(f"the chat template {name} has {len(source):,} characters, more than {SOURCE:,}; shorten it")
    if source == requested and source.isidentifier():
        remedy = suggestion(source, known) if known else "; it has none: give Jinja source"
        raise UserError(f"the tokenizer has no chat template {source!r}{remedy}")
    return _Template(repr(name) if name in known else name, source)


def templates(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the chat templates of a tokenizer, name -> Jinja source; the usual one is named "default".

    Raises:
      UserError: a file does not contain a template.
    """
    field: Any
    try:
        config = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}"))
        field = config.get("chat_template") or {}
        if isinstance(field, list):
            field = {one["name"]: one["template"] for one in field}
        found = dict(field) if isinstance(field, dict) else {"default": field}
        for file, content in tokenizer.files.items():  # these override tokenizer_config.json
            if file == "chat_template.jinja":
                found["default"] = content.decode()
            elif file.startswith("additional_chat_templates/"):
                found[file.rpartition("/")[2].removesuffix(".jinja")] = content.decode()
        wrong = next((source for source in found.values() if not isinstance(source, str)), None)
        if wrong is not None:
            raise TypeError(f"{wrong!r:.40} is not a string")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"the tokenizer's chat_template is invalid ({type(error).__name__}: {error}); give Jinja source, or a list "
            f"of objects with name and template"
        ) from None
    return found


# Rendering.


def _render(use: _Template, jobs: Sequence[dict[str, Any]]) -> Iterator[list[Rendered]]:
    """Yields the renderings of each job. Raises UserError for a problem with the template or its inputs."""
    for result in template_process.render(jobs):
        if isinstance(result, template_process.Problem):
            raise UserError(_message(use, result))
        if any(not text.isascii() and _HALF.search(text) for text, _, _ in result):
            raise UserError(f"the chat template {use.name} writes a lone surrogate; correct it")
        yield [Rendered(text, _spans(users), _spans(answers)) for text, users, answers in result]


def _spans(bounds: Sequence[int]) -> list[Span]:
    return list(zip(bounds[::2], bounds[1::2]))


def _message(use: _Template, problem: template_process.Problem) -> str:
    other = "correct it, or give another template="
    limits = template_process
    messages = {
        "syntax": f"is not a valid Jinja template ({problem.detail}); correct it",
        "refused": f"rejects these messages: {problem.detail}; give messages that it accepts",
        "recursion": f"recurses endlessly or is nested too deeply; {other}",
        "memory": f"needs more memory than {limits.MEMORY >> 20} MiB; {other}",
        "characters": f"generates more than {limits.CHARACTERS:,} characters; {other}",
        "fails": f"fails on these messages ({problem.detail}); correct them, or give another template=",
        "time": f"takes more than {limits.SECONDS:g} s of processor time; {other}",
        "silent": f"produced no output for {limits.SILENCE:g} s; {other}",
        "stopped": f"terminated the process that renders it ({problem.detail}); {other}",
    }
    return f"the chat template {use.name} {messages[problem.kind]}"
