"""Reads the formats of the CoNLL shared tasks: a token and its columns on each line, a blank line between sentences.

Columns are separated by tabs, or by spaces if the lines have no tabs. The meaning of the columns is detected from the
beginning of the file, unless `data.columns` names them in order:

    10 columns separated by tabs, the first one counts    CoNLL-U: id, tokens, lemma, upos, xpos, feats, head, deprel,
    the tokens                                            deps, misc; the tags are upos
    a comment `# global.columns = ID FORM ...`            CoNLL-U Plus: these columns; FORM is tokens, tags the last one
    a column that counts the tokens                       skipped, with the columns before it
    the first column has tags, the last one does not      tags first, as in the MIT corpora
    otherwise                                             tokens first, tags last

Comment lines (`#`), `-DOCSTART-` lines, multiword tokens (`1-2`) and empty nodes (`1.1`) are skipped
(https://universaldependencies.org/format.html, ext-format.html).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO, NamedTuple

from jaxlm.config import DataConfig
from jaxlm.data.formats.lines import BLANKS, Place, Row, head_of, note, quote, read_lines
from jaxlm.errors import UserError

CONLL_U = ("id", "tokens", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
_TAG = re.compile(r"O|(?:[BIESLUM]|IO)-\S+|[BIESLUM]")
_GLOBAL = re.compile(r"#\s*global\.columns\s*=\s*(\S.*?)\s*")
_MIN_LINES = 10  # this many lines with the same number of words are not running text
_NO_TOKEN = re.compile(r"\d+[-.]\d+")  # the id of a multiword token or an empty node


class ConllColumns(NamedTuple):
    """The columns of a file.

    Attributes:
      width: number of columns.
      first: number of the first line with this many columns.
      names: name -> index of each column that is read.
      counter: index of the column that counts the tokens.
      tags: values of the last column, in lines that do not begin with "#".
      tabs: whether columns are separated by tabs.
    """

    width: int
    first: int
    names: dict[str, int]
    counter: int | None
    tags: frozenset[str]
    tabs: bool


def rows(file: Path, stream: IO[bytes], data: DataConfig) -> Iterator[tuple[Place, Row]]:
    """Yields each sentence with the place of its first line, as lists of str of equal length.

    Raises:
      UserError: with the place, for a line with another number of columns or with an empty token or tag.
    """
    first, source = head_of(read_lines(file, stream, data))
    columns = columns_of(file, first, data)
    begin, block = 0, list[list[str]]()
    for number, line in enumerate(source, start=1):
        if not line.strip(BLANKS) or line.startswith("-DOCSTART-"):
            if block:
                yield Place(str(file), begin), _row(columns, block)
            block = []
            continue
        fields = _fields(line, columns.tabs)
        if _is_comment(line, fields, columns, bool(block)):
            continue
        _check(file, number, line, fields, columns)
        if columns.counter is not None and _NO_TOKEN.fullmatch(fields[columns.counter]):
            continue
        begin = begin if block else number
        block.append(fields)
    if block:
        yield Place(str(file), begin), _row(columns, block)


def columns_of(file: Path, first: list[str], data: DataConfig) -> ConllColumns:
    """Returns the columns of a file that begins with these lines."""
    tabs = any("\t" in line.strip(BLANKS) for line in first if not line.startswith("#"))
    sentences, numbers = _sentences(first, tabs)
    plain = [fields for sentence in sentences for fields in sentence if not fields[0].startswith("#")]
    some = plain or [fields for sentence in sentences for fields in sentence]
    width = len(some[0]) if some else 0
    begin = next((n for fields, n in numbers if fields == some[0]), 0) if some else 0
    tags = frozenset(fields[-1] for fields in plain)
    bodies = [[f for f in sentence if len(f) == width and not f[0].startswith("#")] for sentence in sentences]
    columns = ConllColumns(width, begin, {}, _counter(width, [body for body in bodies if body]), tags, tabs)
    declared = _GLOBAL.fullmatch(first[0].strip(BLANKS)) if first else None
    plus = declared[1].lower().split() if declared and not data.columns else []
    if plus and len(plus) == width and "form" in plus:
        note(f"{file}: CoNLL-U Plus with the columns {', '.join(plus)}; tags is {plus[-1]}")
        names = {name: n for n, name in enumerate(plus)} | {"tokens": plus.index("form"), "tags": width - 1}
        return columns._replace(names=names, counter=plus.index("id") if "id" in plus else None)
    return columns._replace(names=_names(file, columns, some, data))


def looks_tagged(first: list[str], certain: bool = True) -> bool:
    """Returns whether a file that begins with these lines contains tagged tokens.

    Args:
      first: the first lines of the file.
      certain: require strong evidence, because the file may have another format: nearly all lines have the same number
        of columns, and there is a column of named-entity tags or one that counts the tokens. Otherwise tabs, or the
        same number of words in many lines, are sufficient.
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
        return len(same) == len(found) and (tabs or (len(found) >= _MIN_LINES and len(sentences) > 1))
    counter = _counter(columns, [[f for f in s if len(f) == columns and f[0][:1] != "#"] for s in sentences])
    return counter is not None or any(_are_tags([fields[side] for fields in same]) for side in (0, -1))


def _sentences(first: list[str], tabs: bool) -> tuple[list[list[list[str]]], list[tuple[list[str], int]]]:
    """Returns the fields of each line by sentence, and the fields of each line with its number."""
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


def _counter(columns: int, sentences: list[list[list[str]]]) -> int | None:
    """Returns the column that counts the tokens, in each sentence or in the whole file; None if there is none."""
    total = sum(map(len, sentences))
    # With two columns, the first one may contain the tokens; a short sentence may consist of consecutive numbers.
    if columns < 2 or not sentences or (columns == 2 and (total < 3 or total == len(sentences))):
        return None
    if total == len(sentences) and columns > 2:  # one token per sentence
        return 0 if all(sentence[0][0] in ("0", "1") for sentence in sentences) else None
    last = (columns - 1,) if columns > 2 and total > 2 else ()
    for column in (*range(min(columns - 1, 4)), *last):
        ids = [[fields[column] for fields in sentence] for sentence in sentences]
        if _is_counter(ids, strict=columns == 2 or column in last):
            return column
    return None


def _is_counter(ids: list[list[str]], strict: bool) -> bool:
    """Returns whether ids count the tokens from 0 or 1 or, if not `strict`, increase in each sentence."""
    all_ids = [name for sentence in ids for name in sentence]
    for start in (0, 1):
        if all(_counts(sentence, start) for sentence in ids) or _counts(all_ids, start):
            return True
    if strict:
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


def _names(file: Path, columns: ConllColumns, some: list[list[str]], data: DataConfig) -> dict[str, int]:
    """Returns name -> index of the columns to read."""
    width, counter = columns.width, columns.counter
    if data.columns:
        if len(data.columns) > width and width:
            raise UserError(
                f"{Place(str(file), columns.first)}: the line has {width} columns, data.columns names "
                f"{len(data.columns)} ({', '.join(data.columns)}); name at most {width} with --data.columns"
            )
        return {name: n for n, name in enumerate(data.columns)}
    if width == len(CONLL_U) and counter == 0 and columns.tabs:
        note(f"{file}: CoNLL-U with the columns {', '.join(CONLL_U)}; tags is upos")
        return {name: n for n, name in enumerate(CONLL_U)} | {"tags": CONLL_U.index("upos")}
    same = [fields for fields in some if len(fields) == width]
    first, last = 0 if counter is None else counter + 1, width - 1
    if counter == last:
        first, last = 0, last - 1
    if counter is not None:
        tags = f", tags is column {last + 1}" if last > first else ""
        note(
            f"{file}: column {counter + 1} of {width} counts the tokens; tokens is column {first + 1}{tags} "
            f"(change this with --data.columns)"
        )
    elif width > 1 and _are_tags([fields[0] for fields in same]) and not _are_tags([fields[-1] for fields in same]):
        note(f"{file}: the first column contains the tags, the last one the tokens (change this with --data.columns)")
        first, last = last, first
    return {"tokens": first} if first == last else {"tokens": first, "tags": last}


def _is_comment(line: str, fields: list[str], columns: ConllColumns, inside: bool) -> bool:
    """Returns whether a line is a comment, not a token that begins with "#"; `inside`: the sentence has begun."""
    if not line.startswith("#"):
        return False
    if len(fields) != columns.width:
        return not inside or line[1:2] in ("", *BLANKS)
    if not columns.tags and not columns.tabs:  # all lines begin with "#"
        return line[1:2] == " "
    # A comment may happen to have the same number of columns: `# id 7 domain=en` above `the _ _ O` (MultiCoNER).
    last = fields[-1]
    return line[1:2] == " " and not inside and last not in columns.tags and not _TAG.fullmatch(last)


def _check(file: Path, number: int, line: str, fields: list[str], columns: ConllColumns) -> None:
    place = Place(str(file), number)
    if len(fields) != columns.width:
        raise UserError(
            f"{place}: the line {quote(line)} has {len(fields)} columns, line {columns.first} has {columns.width}; "
            f"correct it: a token, its tag last, tabs or spaces between them, and blank lines between sentences; or "
            f"set --data.format if the file is not in CoNLL format"
        )
    for name, column in columns.names.items():
        if not fields[column]:
            kind = {"tokens": "token", "tags": "tag"}.get(name, name)
            raise UserError(f"{place}: the {kind} of the line {quote(line)} is empty; give both, separated by a tab")


def _row(columns: ConllColumns, block: list[list[str]]) -> Row:
    return {name: [fields[column] for fields in block] for name, column in columns.names.items()}
