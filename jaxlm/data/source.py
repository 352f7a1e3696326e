"""Rows of text from anywhere, as a stream: files, folders, globs and tfds data sets.

`rows` yields every column of every row together with the place it stands at; `documents` yields the cleaned text that a
language model learns from.  The format of a file is `data.format`, or follows from its suffix (`formats`).
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import DataConfig
from jaxlm.data.clean import clean
from jaxlm.data.formats import tfds
from jaxlm.data.formats.lines import Place, Row, suffix_of
from jaxlm.data.formats.rows import METADATA, SUFFIXES, Columns, file_rows, format_of, text_lines
from jaxlm.errors import UserError, perhaps
from jaxlm.storage import buckets, disk

_SURROGATES = re.compile("[\ud800-\udfff]")
_BYTES = re.compile("[\udc80-\udcff]")  # how PEP 383 writes bytes that are not UTF-8
_LINE_END = re.compile(r"\r\n|\r|\n")


def documents(path: str, data: DataConfig, split: str, report: Counter) -> Iterator[str]:
    """The text of each document after cleaning, in the order of the files and of their rows.

    A document is a row's column `data.text`; in plain text it is what `data.documents` says:

        line        a line; blank lines are dropped, line ends are no part of it
        blank_line  lines up to the next blank line; the line ends inside are kept
        boundary    lines from one that `data.boundary` matches at its beginning up to the next such line; lines before
                    the first are a document too; blank lines are dropped
        file        the whole file, unchanged

    `split` is of a tfds data set.  `report` counts "rows", "documents" and what each cleaning choice changed or
    dropped.  Raises UserError for what cannot be read, for a missing column, and at the end when there was no document.
    """
    seen: set[bytes] = set()
    for place, row in rows(path, data, split, report, columns=Columns((data.text,))):
        if data.text not in row:
            raise UserError(
                f"{place}: there is no column {data.text!r}; the columns are {', '.join(map(repr, row))}; "
                f"choose one with --data.text{other_columns(place, data)}"
            )
        text = "" if row[data.text] is None else row[data.text]
        if not isinstance(text, str):
            raise UserError(
                f"{place}: column {data.text!r} holds {type(text).__name__} {text!r}, not text; "
                f"choose a column of text with --data.text"
            )
        text = clean(text, data.cleaning, seen, report)
        if text is not None:
            report["documents"] += 1
            yield text
    if not report["documents"]:
        counts = ", ".join(f"{what} {n}" for what, n in report.items() if n) or "rows 0"
        raise UserError(f"{path} holds no document ({counts}); give data with text, or drop less with --data.cleaning")


def rows(
    path: str,
    data: DataConfig,
    split: str,
    report: Counter | None = None,
    target_path: str = "",
    columns: Columns | None = None,
) -> Iterator[tuple[Place, Row]]:
    """Yields the first `data.limit` rows, or every row, each with its place; with a `target_path`, those of `aligned`.

    The columns of a row are, by format:

        csv, tsv        those of the header; or those of `data.columns`, then the first line is a row too and fields
                        beyond the names are dropped
        jsonl, parquet  those of the row; lists and objects stay what they are
        conll           tokens and tags, lists of str of one length, as `conll` finds them, or those of `data.columns`
        squad           id, title, context, question, answers {"text": [str], "answer_start": [characters]} and
                        is_impossible; no answers where the file has none
        text            `data.text`; or the named groups of `data.pattern`

    and, with `data.label_from`, label.  Integers are the names of their classes where the data set's metadata gives
    them.  bytes are decoded as UTF-8.

    Args:
      path: a file, a folder, a glob or a tfds data set.
      data: how it is read.
      split: of a tfds data set.
      report: counts "rows" and what `cleaning.encoding` changed or dropped.
      target_path: of plain text, the text whose line n goes with line n of `path`.
      columns: those that a task reads: text that is not UTF-8 in others is no mistake.  None: all.

    Raises:
      UserError: for a missing path, a broken file, and a row that is not UTF-8 when cleaning.encoding is "refuse".
    """
    report = Counter() if report is None else report
    if target_path:
        found = aligned(path, target_path, data, report)
    elif tfds.is_tfds(path):
        found = _valid(tfds.rows(path, split, columns is None or columns.class_names), data, report, columns)
    else:
        found = _valid(_of_files(path, data, columns), data, report, columns)
    yield from islice(found, data.limit or None)


def _of_files(path: str, data: DataConfig, columns: Columns | None) -> Iterator[tuple[Place, Row]]:
    """The rows of all files that a path stands for, labelled by `data.label_from`."""
    if data.label_from == "column":
        return chain.from_iterable(file_rows(file, data, columns) for file in files(path))
    by_label: dict[str, list[Path]] = {}
    for file in files(path):
        label = file.absolute().parent.name if data.label_from == "folder" else file.name.split(".")[0]
        by_label.setdefault(label, []).append(file)
    of_labels = [_labelled(found, label, data, columns) for label, found in by_label.items()]
    # The first rows alone are of all labels.
    return _in_turn(of_labels) if data.limit else chain.from_iterable(of_labels)


def _labelled(found: list[Path], label: str, data: DataConfig, columns: Columns | None) -> Iterator[tuple[Place, Row]]:
    """The rows of some files with a label."""
    for place, row in chain.from_iterable(file_rows(file, data, columns) for file in found):
        if "label" in row:
            raise UserError(
                f"{place}: there is a column 'label', and data.label_from is {data.label_from!r}; leave out "
                f"--data.label-from"
            )
        yield place, row | {"label": label}


def _in_turn(sources: list[Iterator[tuple[Place, Row]]]) -> Iterator[tuple[Place, Row]]:
    """One row of each source after the other, until all have ended."""
    while sources:
        for source in list(sources):
            try:
                yield next(source)
            except StopIteration:
                sources.remove(source)


def _valid(
    found: Iterator[tuple[Place, Row]], data: DataConfig, report: Counter, columns: Columns | None
) -> Iterator[tuple[Place, Row]]:
    """The rows with their strings in valid Unicode."""
    for place, row in found:
        report["rows"] += 1
        valid = _utf8(place, row, data, report, columns)
        if valid is not None:
            yield place, valid


def other_columns(place: Place, data: DataConfig) -> str:
    """What a message about a missing column adds: where the columns of a table or of plain text come from."""
    kind = format_of(Path(place.file), data)
    if kind in ("csv", "tsv", "quoted_tsv") and not data.columns:
        return "; if the first line is no header, name the columns with --data.columns"
    if kind == "text" and not data.pattern:
        return (
            "; plain text has one column: divide its lines with --data.pattern, say what the file is with "
            "--data.format, or take labels from the names of files or folders with --data.label-from"
        )
    return ""


def aligned(path: str, target_path: str, data: DataConfig, report: Counter) -> Iterator[tuple[Place, Row]]:
    """Line n of one text beside line n of another, as rows {data.text: line, "target": line}; of folders and globs,
    file by file.  Pairs of blank lines are left out.

    Raises UserError where one has more lines: how many each has, and the line from which they look shifted.
    """
    pairs = files(path), files(target_path)
    if len(pairs[0]) != len(pairs[1]):
        raise UserError(
            f"{path} stands for {len(pairs[0])} files, {target_path} for {len(pairs[1])}; give a target for each"
        )
    for file, target in zip(*pairs):
        lines, targets = list(text_lines(file, data)), list(text_lines(target, data))
        if len(lines) != len(targets):
            n = _parting([len(line) for _, line in lines], [len(line) for _, line in targets])
            shown = [repr(some[n][1][:60]) if n < len(some) else "nothing" for some in (lines, targets)]
            raise UserError(
                f"{file} has {len(lines):,} lines, {target} has {len(targets):,}; they look shifted from line {n + 1}: "
                f"{shown[0]} beside {shown[1]}; align the files"
            )
        for (place, line), (_, beside) in zip(lines, targets):
            report["rows"] += 1
            row = _utf8(place, {data.text: line, "target": beside}, data, report)
            if row is not None and (line.strip() or beside.strip()):
                yield place, row


def _parting(sizes: list[int], others: list[int]) -> int:
    """The line from which two texts of unequal length go together best if those of the longer one are moved up: up to
    it lengths resemble each other as they stand, from it on by the difference in number further."""
    if len(sizes) > len(others):
        sizes, others = others, sizes
    a, b, by = np.log1p(sizes), np.log1p(others), len(others) - len(sizes)
    before = np.concatenate([[0], np.cumsum(np.abs(a - b[: len(a)]))])
    after = np.concatenate([np.cumsum(np.abs(a - b[by:])[::-1])[::-1], [0]])
    return int((before + after).argmin())


def files(path: str) -> list[Path]:
    """The files that `path` (file, folder or glob) stands for, sorted.

    Of a folder: those below it with a suffix of the table above, or all when none has one; hidden ones never.  This is
    so whatever `data.format` is: of a folder with other files beside the data, give a glob.
    Raises UserError when there is none.
    """
    path = buckets.brought(path)
    if os.path.isfile(path):
        return [Path(path)]
    if os.path.isdir(path):
        found = sorted(f for f in Path(path).rglob("*") if f.is_file())
        found = [f for f in found if not any(part.startswith(".") for part in f.relative_to(path).parts)]
        if not found:
            raise UserError(f"the folder {path} holds no files; give one with txt, csv, tsv, jsonl or parquet files")
        known = [f for f in found if suffix_of(f) in SUFFIXES and f.name not in METADATA]
        return known or found
    found = sorted(Path(f) for f in glob.glob(path, recursive=True) if os.path.isfile(f))
    if not found:
        raise UserError(f"there is no file, folder or glob {path!r}{_near(Path(path))}; give one that there is")
    return found


def alike(path: str, data: DataConfig) -> DataConfig:
    """How `path` is read, where `data` is of another path: in the same way, unless its suffix says another format."""
    file, known = Path(path), Path(data.path)
    if SUFFIXES.get(suffix_of(file)) in (None, format_of(known, data)) or suffix_of(file) == suffix_of(known):
        return data
    return replace(data, format="suffix", columns=(), pattern="", encoding="utf-8")


def held_out(data: DataConfig) -> tuple[str, str, str] | None:
    """Returns path, target path and split of the held-out data; None where a part of the training data is held out.

    Raises:
      UserError: for fields about held-out data that have no effect.
    """
    if data.eval_target_path and not (data.eval_path and data.target_path):
        raise UserError(
            f"data.eval_target_path is {data.eval_target_path!r}, which goes with target_path and eval_path; give "
            f"--data.target-path and --data.eval-path"
        )
    if data.eval_path:
        return data.eval_path, data.eval_target_path, data.eval_split or data.split
    if data.eval_split and not tfds.is_tfds(data.path):
        raise UserError(
            f"data.eval_split is {data.eval_split!r}, and {data.path} is no data set of tfds; give held-out data with "
            f"--data.eval-path, or leave --data.eval-split empty"
        )
    return (data.path, "", data.eval_split) if data.eval_split else None


def fingerprint(path: str) -> str:
    """16 hexadecimal digits that change with the data and not with where it lies.

    Of files: relative names and every byte of each.  Of tfds:NAME: its full name, with version.
    """
    digest = hashlib.sha256()
    if path.startswith("tfds:"):
        digest.update(tfds.opened(path).info.full_name.encode())
        return digest.hexdigest()[:16]
    found = files(path)
    path = buckets.brought(path)
    top = path if os.path.isdir(path) else os.path.commonpath([f.parent for f in found])
    for file in found:
        name = f"{os.path.relpath(file, top)}\0".encode(errors="surrogateescape")
        try:
            digest.update(name + disk.content_hash(file).encode())
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}; give a file that can") from None
    return digest.hexdigest()[:16]


def _near(path: Path) -> str:
    """What lies where `path` was looked for."""
    if not path.parent.is_dir():
        return f" (nor a folder {str(path.parent)!r})"
    names = os.listdir(path.parent)
    hint = perhaps(path.name, names) if names else ""
    return hint if "perhaps" in hint or len(names) <= 10 else ""  # a long list of other names helps nobody


def _utf8(place: Place, row: Row, data: DataConfig, report: Counter, columns: Columns | None = None) -> Row | None:
    """The row with its strings in valid Unicode, or None where cleaning.encoding drops it."""
    for name, value in row.items():
        broken: list[str] = []
        row[name] = _unicode(value, broken)
        if not broken or (columns is not None and not columns.has(name) and name != data.text):
            continue
        if data.cleaning.encoding == "drop":
            report["dropped: encoding"] += 1
            return None
        if data.cleaning.encoding == "refuse":
            if os.path.isfile(place.file) and format_of(Path(place.file), data) == "text":  # its own line ends count on
                before = _SURROGATES.split(broken[0], maxsplit=1)[0]
                place = Place(place.file, place.line + len(_LINE_END.findall(before)))
            if _BYTES.search(broken[0]):
                what = "is not UTF-8; convert the data, name its encoding with --data.encoding, such as cp1252,"
            else:
                half = ascii(_SURROGATES.findall(broken[0])[0])
                what = f"holds half a surrogate pair, {half}, which is no character; correct the row,"
            raise UserError(f"{place}: column {name!r} {what} or set --data.cleaning.encoding to 'replace' or 'drop'")
        report["changed: encoding"] += 1
    return row


def _unicode(value: Any, broken: list[str]) -> Any:
    """The value with bytes decoded and with U+FFFD for each surrogate in its strings, also those in lists and dicts.

    Strings that had surrogates are added to `broken`, as they were.
    """
    if isinstance(value, (np.generic, np.ndarray)):  # of tfds
        value = value.tolist()
    if isinstance(value, bytes):
        value = value.decode(errors="surrogateescape")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            broken.append(value)
            value = _SURROGATES.sub("\ufffd", value)
    elif isinstance(value, list):
        value = [_unicode(item, broken) for item in value]
    elif isinstance(value, dict):
        value = {_unicode(key, broken): _unicode(item, broken) for key, item in value.items()}
    elif isinstance(value, tuple):  # an entry of a parquet map
        value = tuple(_unicode(item, broken) for item in value)
    return value
