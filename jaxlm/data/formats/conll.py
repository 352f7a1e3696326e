"""Files of the CoNLL shared tasks: a token and its columns on each line, a blank line between sentences.

Columns are divided by tabs, or by blanks where the lines have no tabs.  Which of them holds what follows from the
beginning of the file, unless `data.columns` names them in their order:

    10 columns divided by tabs, the first one counting    CoNLL-U: id, tokens, lemma, upos, xpos, feats, head, deprel,
                                                          deps, misc; tags is upos
    a comment `# global.columns = ID FORM ...`            CoNLL-U Plus: those columns; FORM is tokens, tags the last one
    a column that counts the tokens                       left out; what stands before it is the document's
    the first column holds tags, the last one does not    tags first, as in the MIT corpora
    all others                                            tokens first, tags last

Comment lines (`#`), `-DOCSTART-` lines, words that stand for several tokens (`1-2`) and tokens that the text does not
have (`1.1`) are left out (https://universaldependencies.org/format.html, ext-format.html).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO, NamedTuple

from jaxlm.config import DataConfig
from jaxlm.data.formats.lines import BLANKS, Place, Row, head_of, lines, note, shown
from jaxlm.errors import UserError

CONLL_U = ("id", "tokens", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
_TAG = re.compile(r"O|(?:[BIESLUM]|IO)-\S+|[BIESLUM]")
_GLOBAL = re.compile(r"#\s*global\.columns\s*=\s*(\S.*?)\s*")
_MANY = 10  # lines that all have one number of words: a text has not
_NO_TOKEN = re.compile(r"\d+[-.]\d+")  # the id of a word of several tokens, or of an empty node


class Layout(NamedTuple):
    """How a file stands in columns."""

    columns: int  # how many there are
    first: int  # the line that has so many
    names: dict[str, int]  # of a row's columns, where each stands
    counter: int | None  # the column that counts the tokens
    tags: frozenset[str]  # what stands last in the lines that begin with no "#"
    tabs: bool  # whether tabs divide the columns


def rows(file: Path, stream: IO[bytes], data: DataConfig) -> Iterator[tuple[Place, Row]]:
    """Yields each sentence with the place of its first line: lists of str of one length, by the columns' names."""
    first, source = head_of(lines(file, stream, data))
    layout = layout_of(file, first, data)
    begin, block = 0, list[list[str]]()
    for number, line in enumerate(source, start=1):
        if not line.strip(BLANKS) or line.startswith("-DOCSTART-"):
            if block:
                yield Place(str(file), begin), _row(layout, block)
            block = []
            continue
        fields = _fields(line, layout.tabs)
        if _is_comment(line, fields, layout, bool(block)):
            continue
        _check(file, number, line, fields, layout)
        if layout.counter is not None and _NO_TOKEN.fullmatch(fields[layout.counter]):
            continue
        begin = begin if block else number
        block.append(fields)
    if block:
        yield Place(str(file), begin), _row(layout, block)


def layout_of(file: Path, first: list[str], data: DataConfig) -> Layout:
    """Returns the layout of a file that begins with these lines."""
    tabs = any("\t" in line.strip(BLANKS) for line in first if not line.startswith("#"))
    sentences, numbers = _sentences(first, tabs)
    plain = [fields for sentence in sentences for fields in sentence if not fields[0].startswith("#")]
    some = plain or [fields for sentence in sentences for fields in sentence]
    columns = len(some[0]) if some else 0
    begin = next((n for fields, n in numbers if fields == some[0]), 0) if some else 0
    tags = frozenset(fields[-1] for fields in plain)
    bodies = [[f for f in sentence if len(f) == columns and not f[0].startswith("#")] for sentence in sentences]
    layout = Layout(columns, begin, {}, _index(columns, [body for body in bodies if body]), tags, tabs)
    told = _GLOBAL.fullmatch(first[0].strip(BLANKS)) if first else None
    plus = told[1].lower().split() if told and not data.columns else []
    if plus and len(plus) == columns and "form" in plus:
        note(f"{file}: CoNLL-U Plus; the column tags is {plus[-1]}, and there are {', '.join(plus)}")
        names = {name: n for n, name in enumerate(plus)} | {"tokens": plus.index("form"), "tags": columns - 1}
        return layout._replace(names=names, counter=plus.index("id") if "id" in plus else None)
    return layout._replace(names=_names(file, layout, some, data))


def looks_tagged(first: list[str], certain: bool = True) -> bool:
    """Returns whether lines are of a file with tagged tokens.

    Args:
      first: the first lines of a file.
      certain: whether the file might be another one, so that nearly all lines must have one number of columns, and
        tags as of names or a column that counts; else tabs, or one number of words in many lines, are enough.
    """
    tabs = any("\t" in line.strip(BLANKS) for line in first if not line.startswith("#"))
    sentences, _ = _sentences(first, tabs)
    found = [fields for sentence in sentences for fields in sentence if not fields[0].startswith("#")]
    if not found or len(found[0]) < 2:
        return False
    if any(line.startswith("-DOCSTART-") for line in first):
        return True
    columns = len(found[0])
    same = [fields for fields in found if len(fields) == columns]
    if len(same) < 0.9 * len(found):
        return False
    if not certain:
        return len(same) == len(found) and (tabs or (len(found) >= _MANY and len(sentences) > 1))
    counted = _index(columns, [[f for f in s if len(f) == columns and f[0][:1] != "#"] for s in sentences])
    return counted is not None or any(_are_tags([fields[side] for fields in same]) for side in (0, -1))


def _sentences(first: list[str], tabs: bool) -> tuple[list[list[list[str]]], list[tuple[list[str], int]]]:
    """The fields of the lines of each sentence, and of each line with its number."""
    sentences: list[list[list[str]]] = [[]]
    numbers = []
    for number, line in enumerate(first, start=1):
        if not line.strip(BLANKS) or line.startswith("-DOCSTART-"):
            sentences.append([])
        else:
            sentences[-1].append(_fields(line, tabs))
            numbers.append((sentences[-1][-1], number))
    return [sentence for sentence in sentences if sentence], numbers


def _fields(line: str, tabs: bool) -> list[str]:
    if tabs and ("\t" in line or line.startswith("#")):
        return [field.strip(BLANKS) for field in line.split("\t")]
    return re.split("[ \t]+", line.strip(BLANKS))


def _index(columns: int, sentences: list[list[list[str]]]) -> int | None:
    """The column that counts the tokens, of every sentence or of all of them; None where there is none."""
    lines_in_all = sum(map(len, sentences))
    # A column beside one other may hold the tokens: a sentence of numbers in their order is rare, if it is long.
    if columns < 2 or not sentences or (columns == 2 and (lines_in_all < 3 or lines_in_all == len(sentences))):
        return None
    if lines_in_all == len(sentences) and columns > 2:  # of one token each
        return 0 if all(sentence[0][0] in ("0", "1") for sentence in sentences) else None
    last = (columns - 1,) if columns > 2 and lines_in_all > 2 else ()
    for column in (*range(min(columns - 1, 4)), *last):
        ids = [[fields[column] for fields in sentence] for sentence in sentences]
        if _is_counter(ids, sure=columns == 2 or column in last):
            return column
    return None


def _is_counter(ids: list[list[str]], sure: bool) -> bool:
    """Whether ids of the tokens of sentences count them, from 0 or 1; or, unless it must be sure, rise in each."""
    everything = [name for sentence in ids for name in sentence]
    for start in (0, 1):
        if all(_counts(sentence, start) for sentence in ids) or _counts(everything, start):
            return True
    if sure:
        return False
    plain = [[name for name in sentence if not _NO_TOKEN.fullmatch(name)] for sentence in ids]
    if not all(re.fullmatch(r"\d{1,9}", name) for sentence in plain for name in sentence):
        return False
    return all(int(a) < int(b) for sentence in plain for a, b in pairwise(sentence))


def _counts(ids: list[str], start: int) -> bool:
    plain = [name for name in ids if not _NO_TOKEN.fullmatch(name)]
    return bool(plain) and plain == [str(n) for n in range(start, start + len(plain))]


def _are_tags(values: list[str]) -> bool:
    return "O" in values and all(_TAG.fullmatch(value) for value in values)


def _names(file: Path, layout: Layout, some: list[list[str]], data: DataConfig) -> dict[str, int]:
    """The columns of a row, and where each stands in a line."""
    columns, index = layout.columns, layout.counter
    if data.columns:
        if len(data.columns) > columns and columns:
            raise UserError(
                f"{Place(str(file), layout.first)}: the line has {columns} columns, data.columns names "
                f"{len(data.columns)} ({', '.join(data.columns)}); name at most {columns} with --data.columns"
            )
        return {name: n for n, name in enumerate(data.columns)}
    if columns == len(CONLL_U) and index == 0 and layout.tabs:
        note(f"{file}: CoNLL-U; the column tags is upos, and there are {', '.join(CONLL_U)}")
        return {name: n for n, name in enumerate(CONLL_U)} | {"tags": CONLL_U.index("upos")}
    same = [fields for fields in some if len(fields) == columns]
    first, last = 0 if index is None else index + 1, columns - 1
    if index == last:
        first, last = 0, last - 1
    if index is not None:
        tags = f", tags column {last + 1}" if last > first else ""
        note(
            f"{file}: column {index + 1} of {columns} counts the tokens; tokens is column {first + 1}{tags} "
            f"(--data.columns names them otherwise)"
        )
    elif columns > 1 and _are_tags([fields[0] for fields in same]) and not _are_tags([fields[-1] for fields in same]):
        note(f"{file}: the tags stand before the tokens (--data.columns names the columns otherwise)")
        first, last = last, first
    return {"tokens": first} if first == last else {"tokens": first, "tags": last}


def _is_comment(line: str, fields: list[str], layout: Layout, inside: bool) -> bool:
    """Whether a line is a comment, and no token that begins with "#": `inside` a sentence or at its beginning."""
    if not line.startswith("#"):
        return False
    if len(fields) != layout.columns:
        return not inside or line[1:2] in ("", *BLANKS)
    if not layout.tags and not layout.tabs:  # there are comments alone
        return line[1:2] == " "
    # Of as many columns by chance: `# id 7 domain=en` above `the _ _ O` (MultiCoNER).
    last = fields[-1]
    return line[1:2] == " " and not inside and last not in layout.tags and not _TAG.fullmatch(last)


def _check(file: Path, number: int, line: str, fields: list[str], layout: Layout) -> None:
    place = Place(str(file), number)
    if len(fields) != layout.columns:
        raise UserError(
            f"{place}: the line {shown(line)} has {len(fields)} columns, line {layout.first} {layout.columns}; "
            f"correct it: a token, its tag last, tabs or spaces between, and blank lines between texts"
        )
    for name, column in layout.names.items():
        if not fields[column]:
            kind = {"tokens": "token", "tags": "tag"}.get(name, name)
            raise UserError(f"{place}: the {kind} of the line {shown(line)} is empty; give both, divided by a tab")


def _row(layout: Layout, block: list[list[str]]) -> Row:
    return {name: [fields[column] for fields in block] for name, column in layout.names.items()}
