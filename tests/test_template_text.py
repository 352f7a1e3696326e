"""Text in a template behaves like its plain string, and characters of a user always stay marked."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.chat import template_worker
from jaxlm.data.chat.template_sandbox import tojson
from jaxlm.data.chat.template_text import Text, from_user, has_user, hide, plain_of, reveal, user_data

LETTERS = st.text(st.sampled_from("ab<|> \nß\u0130Kx\U0001f600\U000f0000"), max_size=8)
# Strings of a template and strings of a user alternate.
MIXED = st.lists(LETTERS, max_size=4).map(lambda parts: [(part, n % 2 == 1) for n, part in enumerate(parts)])


def make_text(parts) -> Text:
    return Text("").join(from_user(part) if user else part for part, user in parts)


def user_mask(text: str) -> list[bool]:
    return [0x40000 <= ord(char) <= 0xDFFFF for char in str.__str__(text)]


PLAIN = ("lower", "upper", "title", "capitalize", "swapcase", "strip", "lstrip", "rstrip", "split", "splitlines")
PLAIN += ("isspace", "casefold")
WITH_SIGNS = ("strip", "removeprefix", "startswith", "endswith")
WITH_SIGN = ("split", "rsplit", "partition", "rpartition", "count", "find")
CALLS = [
    *(lambda text, name=name: getattr(text, name)() for name in PLAIN),
    *(lambda text, name=name: getattr(text, name)("<") for name in WITH_SIGN),
    *(
        lambda text, name=name: getattr(text, name)("a<")
        for name in ("strip", "removeprefix", "startswith", "endswith")
    ),
    lambda text: text.split(None, 1),
    lambda text: text.rsplit(None, 1),
    lambda text: text.split("ab", 1),
    lambda text: text.splitlines(True),
    lambda text: text.replace("a", "bb"),
    lambda text: text.replace("ab", "", 1),
    lambda text: text.replace("", "x"),
    lambda text: text.center(12, "x") + text.ljust(9) + text.rjust(9) + text.zfill(9),
    lambda text: text[1:-1] + text[::-1] + text[:1] * 3,
    lambda text: "".join(text) + text.join(["a", "b"]),
    lambda text: [*text],
    lambda text: "a" + text + "b",
    lambda text: "%s|%10s|%r" % (text, text, [text]),  # noqa: UP031
    lambda text: "{}|{:>9}|{!r}".format(text, text, {text: text}),  # noqa: UP032
    lambda text: repr({"a": [text]}),
    lambda text: [*sorted([text, "a", "b"]), max(text, "a")],
    lambda text: (text == "ab", text != "ab", text < "ab", "a" in text, text in ["ab"], hash(text), len(text)),
    lambda text: {"ab": 1}.get(text),
]


@settings(max_examples=60, deadline=None)
@given(MIXED)
def test_a_text_behaves_like_its_plain_string(parts):
    text = make_text(parts)
    plain = "".join(part for part, _ in parts)
    assert plain_of(text) == plain and reveal(str.__str__(text)) == plain
    assert user_mask(text) == [user for part, user in parts for _ in part]
    for call in CALLS:
        assert plain_of(call(text)) == call(plain)


@settings(max_examples=60, deadline=None)
@given(LETTERS)
def test_results_of_user_text_belong_to_the_user(plain):
    for call in CALLS[:16] + CALLS[17:22]:
        found = call(from_user(plain))
        for part in found if isinstance(found, (list, tuple)) else [found]:
            assert not isinstance(part, str) or part == "" or all(user_mask(part))


@given(st.text())
def test_reveal_is_the_inverse_of_hide(text):
    plain = re.sub("[\U00040000-\U000dffff]", "?", text)  # hide does not preserve characters of unused Unicode planes
    assert reveal(hide(plain)) == plain
    assert not text or all(user_mask(hide(text)))
    assert plain_of(from_user(text)) == text


DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | LETTERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LETTERS, inner, max_size=3),
    max_leaves=8,
)


@given(DATA, st.booleans(), st.sampled_from([None, 0, 2, "\t"]), st.sampled_from([None, (",", ":")]))
def test_json_equals_that_of_python(value, ensure_ascii, indent, separators):
    options = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": False}
    text = tojson(user_data(value), **options)
    assert plain_of(text) == json.dumps(value, **options)
    template_text = "".join(char for char, user in zip(plain_of(text), user_mask(text)) if not user)
    assert re.sub(r"true|false|null", "", template_text).strip('{}[],:" \n\t') == ""


def render(template: str, content, **variables) -> tuple[str, str]:
    """Return the text, and the part of it that the template wrote."""
    job = {
        "source": template,
        "messages": [{"role": "user", "content": content}],
        "roles": ["user"],
        "special": {},
        "given": variables,
    }
    found = template_worker.render({**job, "seconds": 0, "characters": 10**6, "renderings": [[1, True]]})
    assert "rendered" in found, found
    ((text, users, _),) = found["rendered"]
    bounds = [0, *users, len(text)]
    return text, "".join(text[a:b] for a, b in zip(bounds[::2], bounds[1::2]))


# Expressions of templates with a text c and a number n.
EXPRESSIONS = r"""
c|lower; c|upper; c|trim; c|title; c|capitalize; c|replace('X','<'); c|replace('','<'); c.split('X')|join('<')
c|list|join; c[::-1]|reverse; c|tojson; c|tojson(indent=2); [c]|tojson; {c: c}|tojson; c ~ ''; c + ''; '' + c
'%s' % c; '%10.4s' % c; '{}'.format(c); '{:>9}'.format(c); '{0[0]}'.format([c]); '{x}'.format(x=c)
'%(x)s' % {'x': c}; c|indent; c|indent(2, true); c|wordwrap(4); c|e; c|safe; c|e|safe ~ c; c|string; [c]|string
{c: 1}|string; (c, c)|string; c|pprint; {c: 1}|join; c.partition('X')|join; (c,)|map('lower')|join; c|first ~ c[1:]
c|center(40); c.ljust(40, c[:1]); c|truncate(6); c|urlencode; c|striptags; c|urlize
c|xmlattr if false else c; {'a': c}|xmlattr; c|batch(1)|map('join')|join; c|forceescape; c.swapcase().swapcase()
c.casefold(); c.expandtabs(); c.zfill(9); c.translate({88: '<'}); c.format(); c % ()
{c: c}|dictsort|map('join')|join; {c: c}|items|list; [c, c]|unique|join; [c]|sort|join; [c]|min; [n]|sum(start=1)
c|default(''); [c]|groupby(0)|map('first')|join; c|attr('upper')(); dict(a=c).a; dict.fromkeys([c])|join
namespace(a=c).a; joiner(c)() ~ c; cycler(c).next(); c|format; '%s%s'|format(c, c); '<'.join([c, c])
c.join(['', '']); c.splitlines()|join('\n'); n; n + 1; n|string; '%d' % n; '{:03d}'.format(n); n|tojson; [n]|string
n|abs; n|round; -n; n * 2; c|int(n); c|float(n); [n]|sum; n|filesizeformat; c|wordcount ~ c; c.removeprefix('X')
(c ~ c)|replace(c, c); c|selectattr('x')|list ~ c; c.rsplit('X', 1)|join; loop_(c); f(c); strftime_now(c)
c|map('upper')|join; c|slice(2)|map('join')|join; c|random ~ c|last; '%c' % c[0]; '%r' % c; '%a' % c
'{!r}'.format(c); '{!s:>9}'.format(c); '%(x)a' % {'x': c}; '%-10a' % c; '%a'|format(c); '%a' % [c]
"""


@pytest.mark.parametrize(
    "expression", [part.strip() for line in EXPRESSIONS.strip().split("\n") for part in line.split("; ")]
)
def test_user_text_never_belongs_to_the_template(expression):
    head = (
        "{% set c = messages[0].content %}{% macro f(x) %}{{ x }}{{ caller() if caller }}{% endmacro %}"
        "{% macro loop_(x) %}{% for one in x %}{{ one }}{% endfor %}{% set y %}{{ x }}{% endset %}{{ y|upper }}"
        "{% filter lower %}{{ x }}{% endfilter %}{% call f(x) %}{{ x }}{% endcall %}{% endmacro %}"
    )
    template_text = render(head + "\u2042{{ " + expression + " }}\u2042", "X|7\U0001f600", n=7)[1]
    assert template_text.startswith("\u2042") and template_text.endswith("\u2042")
    # The template itself writes only brackets, quotes and entities.
    assert not re.search("[X|7\U0001f600]", re.sub(r"\\u[0-9a-f]{4}", "", template_text[1:-1])), template_text


def test_names_of_fields_and_roles_belong_to_the_template():
    assert render("{{ '<|' ~ messages[0].role ~ '|>' }}{{ messages[0]|list|join }}", "x")[1] == "<|user|>rolecontent"


def test_digits_of_a_user_number_belong_to_the_user():
    assert has_user(user_data(3)) and not has_user(user_data(True)) and str(user_data(3) + 1) == "4"
