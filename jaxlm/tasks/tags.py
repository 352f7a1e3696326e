"""Schemes by which the tags of words mark spans, and tags that mark none.

    spans    a mark before a type, as in B-PER: IOB1, IOB2, IOBES (also BIOES, BMES) and BILOU (also BILUO)
    suffixed a mark behind a type, as in PER-B
    untyped  a mark alone: B, I, O, and the further marks of these schemes
    inside   a type alone (PER) in a span, O outside of spans
    classes  every tag is a class of its own, such as a part of speech

All but the last are read as spans by one rule, that of conlleval.pl (Tjong Kim Sang 2000): any order of tags means
something, and a tag that continues a span behind O or behind another type begins one.  Marks may be small letters, and
one of - _ : | / may stand between mark and type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxlm.tasks import metrics

# Marks of all schemes, as those of IOBES: M is the middle, L the last, U the unit and W the whole.
_MARKS = {"B": "B", "I": "I", "E": "E", "S": "S", "M": "I", "L": "E", "U": "S", "W": "S"}
LETTERS = {"IOB1": "BI", "IOB2": "BI", "IOBES": "BIES", "BILOU": "BILU"}  # scheme -> its marks
OUTSIDE = "O"
_TYPED = re.compile(r"(?P<mark>[BIESMLUW])[-_:|/](?P<type>.+)", re.IGNORECASE | re.DOTALL)
_SUFFIXED = re.compile(r"(?P<type>.+)[-_:|/](?P<mark>[BIESMLUW])", re.IGNORECASE | re.DOTALL)


class Span(NamedTuple):
    """Words [first, last] that are a thing of one type; the type is "" where tags name none."""

    type: str
    first: int
    last: int


def kind_of(tags: Iterable[str]) -> str:
    """Returns which of the kinds in the module's text these tags, of a whole data set or of a head, are of; or "mixed"
    where some have marks and others have none."""
    tags = set(tags)
    inside = {tag for tag in tags if not is_outside(tag)}
    outside = inside != tags
    letters = {tag.upper() for tag in inside}
    if inside and letters <= set(_MARKS) and (outside or letters & {"B", "I"}):
        return "untyped"
    marked = {tag for tag in inside if is_marked(tag)}
    if marked == inside:
        return "spans"
    suffixed = {_parsed(tag, "suffixed")[0] for tag in inside if _SUFFIXED.fullmatch(tag)}
    if all(map(_SUFFIXED.fullmatch, inside)) and "B" in suffixed and suffixed & {"I", "E"}:
        return "suffixed"
    begun, continued = (
        {_parsed(tag, "spans")[1] for tag in marked if tag[0].upper() in some} for some in ("B", "IMEL")
    )
    if not outside and not begun & continued:
        return "classes"
    return "mixed" if marked else "inside"


def kind_of_head(names: Sequence[str]) -> str:
    """Returns the kind of the tags that a head tells apart.  Names without a mark beside others with one, such as
    [CLS] or X, mark no span."""
    kind = kind_of(names)
    return "spans" if kind == "mixed" else kind


def is_outside(tag: str) -> bool:
    """Returns whether a tag stands for no span."""
    return tag.upper() == OUTSIDE


def are_bracketed(tags: Iterable[str]) -> bool:
    """Returns whether tags open and close spans by brackets, as (PER* and *) of CoNLL-2005 and 2012 do."""
    tags = set(tags)
    opened = any(tag.startswith("(") and "*" in tag for tag in tags)
    return opened and any(tag.endswith("*)") and not tag.startswith("(") for tag in tags)


def is_marked(tag: str) -> bool:
    """Returns whether a tag is a mark and a type, as B-PER is."""
    return _TYPED.fullmatch(tag) is not None


def other(tags: Iterable[str], scheme: str) -> str | None:
    """Returns the first tag that a scheme of `LETTERS` does not have, typed or untyped; None where there is none."""
    letters = LETTERS[scheme]
    fits = lambda tag: is_outside(tag) or (tag[:1].upper() in letters and (len(tag) == 1 or is_marked(tag)))
    return next((tag for tag in tags if not tag or not fits(tag)), None)


def iob2(tags: Sequence[str], kind: str) -> list[str]:
    """Returns the tags of a sentence, of a kind that marks spans, in IOB2; untyped ones as B- and I-."""
    marked = [OUTSIDE if mark is None else f"{mark}-{type_}" for mark, type_ in (_parsed(tag, kind) for tag in tags)]
    return [
        tag if tag == OUTSIDE else f"{'B' if metrics.begins(before, tag) else 'I'}-{tag[2:]}"
        for before, tag in zip([OUTSIDE, *marked], marked)
    ]


def spans(tags: Sequence[str]) -> list[Span]:
    """Returns the spans that tags in IOB2 mark, in order."""
    found: list[Span] = []
    for n, tag in enumerate(tags):
        if tag[0] == "B":
            found.append(Span(tag[2:], n, n))
        elif tag[0] == "I":
            found[-1] = found[-1]._replace(last=n)
    return found


def writer(names: Sequence[str], kind: str) -> Callable[[Sequence[str]], list[str | None]]:
    """Returns a function from tags in IOB2 to the tags of a head of a kind: for each word the mark that says most
    among those which the head has for the type, and None for a type that the head does not have."""
    by: dict[tuple[str | None, str], str] = {}
    for name in names:
        mark, type_ = _parsed(name, kind)
        if mark is not None or is_outside(name):
            by.setdefault((mark, type_), name)

    def written(tags: Sequence[str]) -> list[str | None]:
        found = []
        for tag, after in zip(tags, [*tags[1:], OUTSIDE]):
            begins, ends, type_ = tag[0] == "B", after[0] != "I", tag[2:]
            marks = {(True, True): "SBI", (True, False): "BI", (False, True): "EI", (False, False): "I"}[begins, ends]
            of_type = (by[mark, type_] for mark in marks if (mark, type_) in by)
            found.append(by.get((None, "")) if tag == OUTSIDE else next(of_type, None))
        return found

    return written


def retyped(tags: Sequence[str], type_of: Mapping[str, str]) -> list[str]:
    """Returns tags in IOB2 with other names of their types."""
    return [tag if tag == OUTSIDE else f"{tag[:2]}{type_of[tag[2:]]}" for tag in tags]


def _parsed(tag: str, kind: str) -> tuple[str | None, str]:
    """The mark of a tag, as IOBES has it, and its type; None and "" outside of spans."""
    if is_outside(tag):
        return None, ""
    if kind == "inside":
        return "I", tag
    if kind == "untyped":
        return _MARKS[tag.upper()], ""
    found = (_SUFFIXED if kind == "suffixed" else _TYPED).fullmatch(tag)
    return (_MARKS[found["mark"].upper()], found["type"]) if found else (None, "")
