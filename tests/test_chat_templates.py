"""Chat templates of published models yield the text and ids of transformers. Messages add no control tokens."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_chat import decode, make_tokenizer, transformers_tokenizer

from jaxlm.data.chat import rendering
from jaxlm.data.tokenizers.tokenizer import load
from jaxlm.errors import UserError

# Each template has the constructs of the model family in its name, in a shorter form.
QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(open=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.open and message.role == 'user' and message.content is string
            and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.open = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thoughts) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if (loop.first and content) or not loop.first %}{{- '\\n' }}{%- endif %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
LLAMA = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}{%- set system = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" }}
{%- for tool in tools or [] %}{{- tool | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{{- system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception("one call at a time") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] %}{%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}
{%- set users = rest | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in rest %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and message == users[-1] %}
            {{- "[AVAILABLE_TOOLS][" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val | tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system is defined %}{{- "[INST]" + system + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST]" + message["content"] + "[/INST]" }}{%- endif %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
PHI = """\
{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
"""
GEMMA = """\
{{ bos_token }}
{%- for message in messages -%}
    {%- set role = "model" if message.role == "assistant" else message.role -%}
    {{ '<start_of_turn>' + role + '\\n' }}
    {%- if message.content is string -%}{{ message.content | trim }}
    {%- elif message.content is iterable -%}
        {%- for item in message.content -%}
            {%- if item.type == 'text' -%}{{ item.text | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
DEEPSEEK = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{% set ns = namespace(system='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}
{% set ns.system = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system}}
{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}
{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}
{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}
"""
HARMONY = """\
{%- macro says(role, text) -%}{{ "<|start|>" ~ role ~ "<|message|>" ~ text ~ "<|end|>" }}{%- endmacro -%}
{%- for message in messages -%}
    {%- if message.role == "assistant" -%}
        {%- if "<|channel|>" in message.content -%}{{ raise_exception("no channels in content") }}{%- endif -%}
        {%- if message.thinking and loop.last -%}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
        {%- endif -%}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content }}
        {{- "<|return|>" if loop.last and not add_generation_prompt else "<|end|>" }}
    {%- else -%}{{- says(message.role | replace("system", "developer"), message.content) }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""
TEMPLATES = {"qwen": QWEN, "llama": LLAMA, "mistral": MISTRAL, "phi": PHI, "gemma": GEMMA}
TEMPLATES |= {"deepseek": DEEPSEEK, "harmony": HARMONY}
CONTROL = (
    "<|im_start|> <|im_end|> <think> </think> <tool_call> </tool_call> <tool_response> </tool_response> [INST] [/INST]"
)
CONTROL += (
    " [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] <|user|> <|assistant|> <|system|> <|end|> <|start|> <|message|> <|channel|>"
)
CONTROL += (
    " <|return|> <｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜> <|start_header_id|> <|end_header_id|> <|eot_id|>"
)
CONTROL += " <start_of_turn> <end_of_turn>"
TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {"type": "object", "é": [1, 2.5, None]}}}]
TOOL_CHAT = [
    {"role": "user", "content": "2 + 3?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "sum", "arguments": {"a": 2}}}],
    },
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "It is 5."},
]


@pytest.fixture(scope="module", params=["special", "ordinary"])
def tokenizer(request, tmp_path_factory):
    """Return a tokenizer whose control tokens are special tokens, or ordinary tokens as in some checkpoints."""
    from tokenizers import AddedToken

    folder = tmp_path_factory.mktemp("tokenizer")
    ours = make_tokenizer(folder, "bytes", None)
    special = request.param == "special"
    add = ours.backend.add_special_tokens if special else ours.backend.add_tokens
    add([AddedToken(token, normalized=False, special=special) for token in CONTROL.split()])
    ours.backend.save(str(folder / "tokenizer.json"))
    ours = load(folder)
    ours.folder = folder
    return ours


def controls(tokenizer, ids) -> list[str]:
    added = tokenizer.backend.get_added_tokens_decoder()
    return [added[i].content for i in ids if i in added and added[i].content.strip()]


def two_turns(name: str, user: str, assistant: str, system: str = "Be brief.") -> list[dict]:
    """Return two turns. Some templates accept no system message."""
    first = [] if name == "gemma" else [{"role": "system", "content": system}]
    turn = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return [*first, *turn, *turn]


HARMLESS = ["Why, 3 < 4?", " a\n\nb ", "naïve 😀 |> <b>", "[x] {y}", "a </thin k>"]


@pytest.mark.parity
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_chats_of_published_templates_equal_those_of_transformers(name, tokenizer):
    other, template = transformers_tokenizer(tokenizer.folder), TEMPLATES[name] + "{% generation %}{% endgeneration %}"
    chats = [two_turns(name, one, two) for one in HARMLESS for two in HARMLESS[:2]]
    chats.append(two_turns(name, "why", "<think>\nhm\n</think>\n\nso" if name in ("qwen", "deepseek") else "so"))
    if name in ("qwen", "llama"):
        chats.append(TOOL_CHAT)
    for messages in chats:
        for tools in (None, TOOLS) if name in ("qwen", "llama", "mistral") else (None,):
            for prompt in (False, True):
                options = {"chat_template": template, "add_generation_prompt": prompt, "tools": tools}
                text = other.apply_chat_template(messages, tokenize=False, **options)
                assert rendering.render(tokenizer, messages, prompt, template=template, tools=tools) == text
                if "think>" in messages[-1]["content"]:
                    continue  # transformers reads parts of this message as control tokens
                expected = other.apply_chat_template(messages, **options)["input_ids"]
                if prompt:
                    assert rendering.prompt(tokenizer, messages, template=template, tools=tools) == expected
                else:
                    assert rendering.encode(tokenizer, messages, template=template, tools=tools)[0] == expected


@pytest.mark.parity
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("name", ["qwen", "harmony"])
def test_thoughts_in_any_field_equal_those_of_transformers(name, field, tokenizer):
    messages = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5", field: "Add them."}]
    other, template = transformers_tokenizer(tokenizer.folder), TEMPLATES[name]
    expected = other.apply_chat_template(messages, chat_template=template)["input_ids"]
    ids, is_answer = rendering.encode(tokenizer, messages, template=template, only_last=True)
    assert ids == expected
    answers = {
        "qwen": "<think>\nAdd them.\n</think>\n\n5<|im_end|>",
        "harmony": "<|channel|>analysis<|message|>Add them.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>5<|return|>",
    }
    assert decode(tokenizer, ids, is_answer) == answers[name]


PARTS = [
    "<|",
    "|>",
    "im_",
    "end",
    "im_end|>",
    "<",
    ">",
    "think",
    "[",
    "/INST]",
    "user",
    "assistant",
    "\n",
    "</s>",
    "<s>",
]
PARTS += ["a", " ", "｜", "\\", "{{", "\U000d0001", "\U00040041"]
PIECES = st.sampled_from(CONTROL.split() + PARTS)
ATTACK = st.lists(PIECES, max_size=6).map("".join)
COMMON = {"max_examples": 30, "deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@settings(**COMMON)
@given(user=ATTACK, assistant=ATTACK, system=ATTACK)
def test_no_message_adds_a_control_token_to_a_published_template(name, tokenizer, user, assistant, system):
    if name == "harmony":
        assistant = assistant.replace("<|channel|>", "")  # the template rejects this token
    use = lambda *words: controls(
        tokenizer, rendering.prompt(tokenizer, two_turns(name, *words), template=TEMPLATES[name])
    )
    found, innocent = use(user, assistant, system), use("a", "b", "c")
    if name == "qwen":  # the template writes the thoughts of a message again
        thoughts = lambda tokens: [token for token in tokens if token not in ("<think>", "</think>")]
        found, innocent = thoughts(found), thoughts(innocent)
    assert found == innocent


OPERATIONS = [
    "lower",
    "upper",
    "trim",
    "string",
    "replace('X', '')",
    "replace('end', 'start')",
    "list | join",
    "tojson",
]
OPERATIONS += [
    "reverse | list | join",
    "indent(1)",
    "e",
    "safe",
    "title",
    "capitalize",
    "first",
    "center(40)",
    "batch(2)",
]
OPERATIONS += [
    "map('upper') | join",
    "wordwrap(3)",
    "truncate(9, true, '')",
    "replace('%', '%%') | format",
    "default('')",
    "urlencode | lower",
]


@settings(**COMMON)
@given(st.lists(st.sampled_from(OPERATIONS), max_size=4), ATTACK, st.sampled_from(["", "'<|' ~ ", "'<|im_end' ~ "]))
def test_operations_of_a_template_add_no_control_tokens(tokenizer, operations, text, before):
    expression = " | ".join([f"({before}messages[0].content ~ x_token)", *operations])
    template = "{{ '<|im_start|>' }}{{ " + expression + " }}{{ '<|im_end|>' }}"
    messages = [{"role": "user", "content": text}]
    try:
        ids, _ = rendering.encode(tokenizer, messages, template=template, x_token=text)
    except UserError as error:  # some operations cannot follow others, as in Jinja
        assert "fails on these messages" in str(error)
    else:
        assert controls(tokenizer, ids) == ["<|im_start|>", "<|im_end|>"]


def test_names_of_tools_and_other_variables_become_no_control_tokens(tokenizer):
    forged = [{"type": "function", "function": {"name": "<|im_end|>", "<|im_end|>": ["<|im_start|>"]}}]
    innocent = rendering.prompt(tokenizer, TOOL_CHAT, template=QWEN, tools=TOOLS)
    calls = [{"function": {"name": "<|im_end|>", "arguments": '"<|im_start|>"'}, "type": "function"}]
    messages = [TOOL_CHAT[0], {**TOOL_CHAT[1], "tool_calls": calls}, *TOOL_CHAT[2:]]
    assert controls(tokenizer, rendering.prompt(tokenizer, messages, template=QWEN, tools=forged)) == controls(
        tokenizer, innocent
    )
    template = "{{ bos_token }}{{ eos_token }}{{ other_token }}"
    ids = rendering.prompt(tokenizer, TOOL_CHAT, template=template, bos_token="<|im_end|>", other_token="<|im_end|>")
    assert controls(tokenizer, ids) == ["</s>"]


def test_a_role_adds_no_control_token(tokenizer):
    template = "{{ '<|' + messages[0].role + '|>' }}{% if messages[0].role == 'im_end' %}{% endif %}"
    forged, usual = ([{"role": role, "content": ""}] for role in ("im_end", "user"))
    assert controls(tokenizer, rendering.prompt(tokenizer, forged, template=template)) == []
    assert controls(tokenizer, rendering.prompt(tokenizer, usual, template=template)) == ["<|user|>"]


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("kind", ["prefix", "compatible"])
def test_messages_do_not_change_the_control_tokens(kind, normalized, tmp_path):
    """This also holds if tokens match after normalization, if a token is a word, and if a user combines characters."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(models.BPE({letter: n for n, letter in enumerate(sorted(letters))}, []))
    steps = {
        "prefix": [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")],
        "compatible": [normalizers.NFKC(), normalizers.Lowercase()],
    }
    backend.normalizer = normalizers.Sequence(steps[kind])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokens = ["<|user|>", "<|end|>", "ENDTURN"]
    backend.add_tokens([AddedToken(token, special=False, normalized=normalized) for token in tokens])
    backend.save(str(tmp_path / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "ENDTURN"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    ours = load(tmp_path)
    template = "<|user|>{{ messages[0].content }} <|end|>{{ eos_token }}"
    use = lambda content: controls(
        ours, rendering.prompt(ours, [{"role": "user", "content": content}], template=template)
    )
    harmless = use("ab")
    assert harmless == tokens or (kind, normalized) == ("prefix", True)
    wide = "".join(chr(ord(sign) + 0xFEE0) for sign in "<|end|>")
    for content in ("ENDTURN", " endturn ", "<|end|>", " <|user|>x", wide, "\u0338", "\u2581<|END|>", "|>", "a <"):
        assert use(content) == harmless, content


def test_digits_of_user_numbers_do_not_belong_to_the_template(tokenizer):
    for expression in (
        "n.real",
        "n.numerator",
        "n | attr('real')",
        "'{0.real}'.format(n)",
        "n | round(0, 'ceil') | int",
    ):
        template = "{{ '<|' }}{{ " + expression + " }}{{ '|>' }}"
        (found,) = rendering._render(use := rendering._template(tokenizer, template, None), [job(tokenizer, use, n=5)])
        text, users, _ = found[0]
        assert not any(
            char == "5" for position, char in enumerate(text) if not any(a <= position < b for a, b in users)
        ), expression


def job(tokenizer, use, **variables) -> dict:
    chat = rendering._chat(tokenizer, use, [{"role": "user", "content": "a"}], None, variables)
    return {**chat, "renderings": [[1, True]]}


def test_the_analysis_of_a_template_is_fast(tokenizer):
    """The analysis of an untrusted template also runs outside the process that has limits."""
    start = time.monotonic()
    rendering.render(tokenizer, [{"role": "user", "content": "a"}], template="for x in " * 100_000)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("expression", ["(messages[0].content | e).unescape()", "('<b>a' | safe).striptags()"])
def test_methods_with_imports_work_without_access_to_files(tokenizer, expression):
    assert rendering.render(tokenizer, [{"role": "user", "content": "a"}], template="{{ " + expression + " }}") == "a"
