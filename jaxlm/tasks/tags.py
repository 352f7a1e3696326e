"""How the tags of words mark spans.

    spans    a marker before a type, as in B-PER: IOB1, IOB2, IOBES (also BIOES, BMES) and BILOU (also BILUO)
    suffixed a marker after a type, as in PER-B
    untyped  a marker without a type: B, I, O, and the other markers of these schemes
    inside   a type without a marker (PER) in a span, O outside of spans
    classes  each tag is a class, such as a part of speech

All kinds except the last are read as spans by the rule of conlleval.pl (Tjong Kim Sang 2000): every sequence of tags is
valid, and a tag that continues a span after O or after another type begins a new span.  Markers may be lower case, and
the separator of marker and type may be one of - _ : | /
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxlm.tasks import metrics

# Marker of any scheme -> the marker in IOBES: M is the middle, L the last, U the unit and W the whole.
_MARKERS = {"B": "B", "I": "I", "E": "E", "S": "S", "M": "I", "L": "E", "U": "S", "W": "S"}
SCHEMES = {**metrics.SCHEMES, "BILOU": "BILU"}  # scheme -> its markers
OUTSIDE = "O"
_TYPED = re.compile(r"(?P<marker>[BIESMLUW])[-_:|/](?P<type>.+)", re.IGNORECASE | re.DOTALL)
_SUFFIXED = re.compile(r"(?P<type>.+)[-_:|/](?P<marker>[BIESMLUW])", re.IGNORECASE | re.DOTALL)


class Span(NamedTuple):
    """A span of words [first, last]; the type is "" if the tags have no types."""

    type: str
    first: int
    last: int


def tag_kind(tags: Iterable[str]) -> str:
    """Returns the kind of the tags of a data set or a head, as listed in the module's docstring.

    The kind is "mixed" if some tags have markers and others do not.
    """
    tags = set(tags)
    inside = {tag for tag in tags if not is_outside(tag)}
    has_outside = inside != tags
    letters = {tag.upper() for tag in inside}
    if inside and letters <= set(_MARKERS) and (has_outside or letters & {"B", "I"}):
        return "untyped"
    typed = {tag for tag in inside if has_marker(tag)}
    if typed == inside:
        return "spans"
    suffixes = {_parse(tag, "suffixed")[0] for tag in inside if _SUFFIXED.fullmatch(tag)}
    if all(map(_SUFFIXED.fullmatch, inside)) and "B" in suffixes and suffixes & {"I", "E"}:
        return "suffixed"
    begun, continued = (
        {_parse(tag, "spans")[1] for tag in typed if tag[0].upper() in letters} for letters in ("B", "IMEL")
    )
    if not has_outside and not begun & continued:
        return "classes"
    return "mixed" if typed else "inside"


def head_kind(names: Sequence[str]) -> str:
    """Returns the kind of the tags that a head predicts.

    If only some names have markers, the others, such as [CLS] or X, mark no span.
    """
    kind = tag_kind(names)
    return "spans" if kind == "mixed" else kind


def is_outside(tag: str) -> bool:
    """Returns whether a tag means that the word is in no span."""
    return tag.upper() == OUTSIDE


def use_brackets(tags: Iterable[str]) -> bool:
    """Returns whether the tags open and close spans by brackets, as (PER* and *) in CoNLL-2005 and 2012."""
    tags = set(tags)
    opens = any(tag.startswith("(") and "*" in tag for tag in tags)
    return opens and any(tag.endswith("*)") and not tag.startswith("(") for tag in tags)


def has_marker(tag: str) -> bool:
    """Returns whether a tag is a marker and a type, such as B-PER."""
    return _TYPED.fullmatch(tag) is not None


def find_invalid(tags: Iterable[str], scheme: str) -> str | None:
    """Returns the first tag that is not in a scheme of `SCHEMES`, with or without types, or None."""
    markers = SCHEMES[scheme]
    is_valid = lambda tag: is_outside(tag) or (tag[:1].upper() in markers and (len(tag) == 1 or has_marker(tag)))
    return next((tag for tag in tags if not tag or not is_valid(tag)), None)


def iob2(tags: Sequence[str], kind: str) -> list[str]:
    """Returns the tags of a sentence, of a kind that marks spans, in IOB2; tags without types as B- and I-.

    >>> iob2(["I-PER", "I-PER", "B-PER", "I-LOC", "O"], "spans")
    ['B-PER', 'I-PER', 'B-PER', 'B-LOC', 'O']
    """
    parsed = [OUTSIDE if marker is None else f"{marker}-{type_}" for marker, type_ in (_parse(t, kind) for t in tags)]
    return [
        tag if tag == OUTSIDE else f"{'B' if _begins(before, tag) else 'I'}-{tag[2:]}"
        for before, tag in zip([OUTSIDE, *parsed], parsed)
    ]


def _begins(before: str, tag: str) -> bool:
    """Returns whether a tag other than O begins a span after the tag `before` (conlleval.pl)."""
    return tag[0] in "BS" or before[0] in "OES" or before[2:] != tag[2:]


def spans(tags: Sequence[str]) -> list[Span]:
    """Returns the spans of a sentence with tags in IOB2, in order."""
    found: list[Span] = []
    for n, tag in enumerate(tags):
        if tag[0] == "B":
            found.append(Span(tag[2:], n, n))
        elif tag[0] == "I":
            found[-1] = found[-1]._replace(last=n)
    return found


def tag_writer(names: Sequence[str], kind: str) -> Callable[[Sequence[str]], list[str | None]]:
    """Returns a function that converts the tags of a sentence from IOB2 to the tags of a head.

    A word gets the most specific marker that the head has for its type, and None if the head does not have the type.

    Args:
      names: the tags of the head.
      kind: their kind.
    """
    name_of: dict[tuple[str | None, str], str] = {}
    for name in names:
        marker, type_ = _parse(name, kind)
        if marker is not None or is_outside(name):
            name_of.setdefault((marker, type_), name)

    def write(tags: Sequence[str]) -> list[str | None]:
        converted = []
        for tag, after in zip(tags, [*tags[1:], OUTSIDE]):
            begins, ends, type_ = tag[0] == "B", after[0] != "I", tag[2:]
            markers = {(True, True): "SBI", (True, False): "BI", (False, True): "EI", (False, False): "I"}[begins, ends]
            of_type = (name_of[marker, type_] for marker in markers if (marker, type_) in name_of)
            converted.append(name_of.get((None, "")) if tag == OUTSIDE else next(of_type, None))
        return converted

    return write


def rename_types(tags: Sequence[str], type_of: Mapping[str, str]) -> list[str]:
    """Returns tags in IOB2 with each type replaced by its entry in `type_of`."""
    return [tag if tag == OUTSIDE else f"{tag[:2]}{type_of[tag[2:]]}" for tag in tags]


def _parse(tag: str, kind: str) -> tuple[str | None, str]:
    """Returns the marker of a tag, as in IOBES, and its type; None and "" outside of spans."""
    if is_outside(tag):
        return None, ""
    if kind == "inside":
        return "I", tag
    if kind == "untyped":
        return _MARKERS[tag.upper()], ""
    match = (_SUFFIXED if kind == "suffixed" else _TYPED).fullmatch(tag)
    return (_MARKERS[match["marker"].upper()], match["type"]) if match else (None, "")
