"""Streams of text from files, folders, globs and tfds data sets.

`rows` yields every row with all its columns and its place in the data; `documents` yields the cleaned texts that a
language model is trained on.  The format of a file is `data.format`, or is determined by its suffix (`formats`).
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
from jaxlm.errors import UserError, suggestion
from jaxlm.storage import buckets, disk

_SURROGATES = re.compile("[\ud800-\udfff]")
_BYTES = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as PEP 383 represents them
_LINE_END = re.compile(r"\r\n|\r|\n")


def documents(path: str, data: DataConfig, split: str, report: Counter) -> Iterator[str]:
    """Yields the text of each document after cleaning, in the order of the files and their rows.

    A document is the column `data.text` of a row.  In plain text, `data.documents` defines it:

        line        one line without its line end; blank lines are dropped
        blank_line  the lines up to the next blank line, including the line ends between them
        boundary    a line whose beginning matches `data.boundary`, and the lines up to the next such line; the lines
                    before the first one are a document too; blank lines are dropped
        file        the whole file, unchanged

    Args:
      path: a file, a folder, a glob or a tfds data set.
      data: options for reading and cleaning.
      split: split of a tfds data set.
      report: counter of "rows", "documents" and the changes of each cleaning step; updated in place.

    Raises:
      UserError: if data cannot be read, the column is missing, or there was no document at the end.
    """
    hashes: set[bytes] = set()
    for place, row in rows(path, data, split, report, columns=Columns((data.text,))):
        if data.text not in row:
            raise UserError(
                f"{place}: there is no column {data.text!r}; the columns are {', '.join(map(repr, row))}; "
                f"choose one with --data.text{column_hint(place, data)}"
            )
        text = "" if row[data.text] is None else row[data.text]
        if not isinstance(text, str):
            raise UserError(
                f"{place}: column {data.text!r} holds {type(text).__name__} {text!r}, not text; "
                f"choose a column of text with --data.text"
            )
        text = clean(text, data.cleaning, hashes, report)
        if text is not None:
            report["documents"] += 1
            yield text
    if not report["documents"]:
        counts = ", ".join(f"{name} {n}" for name, n in report.items() if n) or "rows 0"
        raise UserError(
            f"{path} contains no documents ({counts}); give data with text, or drop less with --data.cleaning"
        )


def rows(
    path: str,
    data: DataConfig,
    split: str,
    report: Counter | None = None,
    target_path: str = "",
    columns: Columns | None = None,
) -> Iterator[tuple[Place, Row]]:
    """Yields the first `data.limit` rows, or all rows, each with its place in the data.

    The columns of a row depend on the format:

        csv, tsv        the names in the header; with `data.columns` these names, and the first line is a row too;
                        additional fields are dropped
        jsonl, parquet  the names in the row; lists and objects are not converted
        conll           tokens and tags, lists of str of equal length, located by `conll` or by `data.columns`
        squad           id, title, context, question, answers {"text": [str], "answer_start": [characters]} and
                        is_impossible; there are no answers if the file has none
        text            `data.text`, or the named groups of `data.pattern`

    With `data.label_from` there is also the column label.  Integers are converted to the names of their classes if the
    metadata of the data set has them, and bytes are decoded as UTF-8.

    Args:
      path: a file, a folder, a glob or a tfds data set.
      data: options for reading.
      split: split of a tfds data set.
      report: counter of "rows" and the changes of `cleaning.encoding`; updated in place.
      target_path: plain text aligned with `path` line by line: see `aligned`.
      columns: the columns that a task reads; invalid UTF-8 in other columns is ignored.  None: all.

    Raises:
      UserError: for a missing path, a damaged file, or a row that is not UTF-8 if cleaning.encoding is "refuse".
    """
    report = Counter() if report is None else report
    if target_path:
        found = aligned(path, target_path, data, report)
    elif tfds.is_tfds(path):
        found = _check_unicode(tfds.rows(path, split, columns is None or columns.class_names), data, report, columns)
    else:
        found = _check_unicode(_rows_of_files(path, data, columns), data, report, columns)
    yield from islice(found, data.limit or None)


def _rows_of_files(path: str, data: DataConfig, columns: Columns | None) -> Iterator[tuple[Place, Row]]:
    """Yields the rows of all files of a path, labelled by `data.label_from`."""
    if data.label_from == "column":
        return chain.from_iterable(file_rows(file, data, columns) for file in list_files(path))
    by_label: dict[str, list[Path]] = {}
    for file in list_files(path):
        label = file.absolute().parent.name if data.label_from == "folder" else file.name.split(".")[0]
        by_label.setdefault(label, []).append(file)
    sources = [_label_rows(found, label, data, columns) for label, found in by_label.items()]
    # With a limit, the first rows must include all labels.
    return _round_robin(sources) if data.limit else chain.from_iterable(sources)


def _label_rows(
    found: list[Path], label: str, data: DataConfig, columns: Columns | None
) -> Iterator[tuple[Place, Row]]:
    """Yields the rows of some files with a label."""
    for place, row in chain.from_iterable(file_rows(file, data, columns) for file in found):
        if "label" in row:
            raise UserError(
                f"{place}: there is a column 'label', but data.label_from is {data.label_from!r}; leave out "
                f"--data.label-from"
            )
        yield place, row | {"label": label}


def _round_robin(sources: list[Iterator[tuple[Place, Row]]]) -> Iterator[tuple[Place, Row]]:
    """Yields one row of each source in turn until all are exhausted."""
    while sources:
        for source in list(sources):
            try:
                yield next(source)
            except StopIteration:
                sources.remove(source)


def _check_unicode(
    found: Iterator[tuple[Place, Row]], data: DataConfig, report: Counter, columns: Columns | None
) -> Iterator[tuple[Place, Row]]:
    """Yields the rows with valid Unicode strings."""
    for place, row in found:
        report["rows"] += 1
        valid = _check_row(place, row, data, report, columns)
        if valid is not None:
            yield place, valid


def column_hint(place: Place, data: DataConfig) -> str:
    """Returns a hint for a message about a missing column: the origin of the columns of a table or of plain text."""
    kind = format_of(Path(place.file), data)
    if kind in ("csv", "tsv", "quoted_tsv") and not data.columns:
        return "; if the first line is not a header, name the columns with --data.columns"
    if kind == "text" and not data.pattern:
        return (
            "; plain text has one column: split its lines with --data.pattern, set the format of the file with "
            "--data.format, or use the names of files or folders as labels with --data.label-from"
        )
    return ""


def aligned(path: str, target_path: str, data: DataConfig, report: Counter) -> Iterator[tuple[Place, Row]]:
    """Yields line n of two aligned texts as a row {data.text: line, "target": line}; pairs of blank lines are skipped.

    Args:
      path: a file, or a folder or glob, whose files are aligned in sorted order.
      target_path: the same for the targets.
      data: options for reading.
      report: counter of "rows" and the changes of `cleaning.encoding`; updated in place.

    Raises:
      UserError: if the numbers of files or lines differ; the message has the line from which the texts look shifted.
    """
    sources, target_files = list_files(path), list_files(target_path)
    if len(sources) != len(target_files):
        raise UserError(
            f"{path} has {len(sources)} files, {target_path} has {len(target_files)}; give a target for each file"
        )
    for file, target in zip(sources, target_files):
        lines, targets = list(text_lines(file, data)), list(text_lines(target, data))
        if len(lines) != len(targets):
            n = _find_shift([len(line) for _, line in lines], [len(line) for _, line in targets])
            quotes = [repr(side[n][1][:60]) if n < len(side) else "nothing" for side in (lines, targets)]
            raise UserError(
                f"{file} has {len(lines):,} lines, {target} has {len(targets):,}; they look shifted from line {n + 1}: "
                f"{quotes[0]} next to {quotes[1]}; align the files"
            )
        for (place, line), (_, target_line) in zip(lines, targets):
            report["rows"] += 1
            row = _check_row(place, {data.text: line, "target": target_line}, data, report)
            if row is not None and (line.strip() or target_line.strip()):
                yield place, row


def _find_shift(sizes: list[int], others: list[int]) -> int:
    """Returns the line from which one of two texts with different numbers of lines appears to be shifted.

    Before it, the lengths of line n of both are similar; after it, those of line n and of line n + the difference.
    """
    if len(sizes) > len(others):
        sizes, others = others, sizes
    a, b, by = np.log1p(sizes), np.log1p(others), len(others) - len(sizes)
    before = np.concatenate([[0], np.cumsum(np.abs(a - b[: len(a)]))])
    after = np.concatenate([np.cumsum(np.abs(a - b[by:])[::-1])[::-1], [0]])
    return int((before + after).argmin())


def list_files(path: str) -> list[Path]:
    """Returns the files of a path (file, folder or glob), sorted.

    The files of a folder are those below it with a known suffix, or all files if none has a known suffix; hidden files
    are ignored.  This does not depend on `data.format`: for a folder that also has other files, give a glob.

    Raises:
      UserError: if there are no files.
    """
    path = buckets.download(path)
    if os.path.isfile(path):
        return [Path(path)]
    if os.path.isdir(path):
        found = sorted(f for f in Path(path).rglob("*") if f.is_file())
        found = [f for f in found if not any(part.startswith(".") for part in f.relative_to(path).parts)]
        if not found:
            raise UserError(f"the folder {path} contains no files; give one with txt, csv, tsv, jsonl or parquet files")
        known = [f for f in found if suffix_of(f) in SUFFIXES and f.name not in METADATA]
        return known or found
    found = sorted(Path(f) for f in glob.glob(path, recursive=True) if os.path.isfile(f))
    if not found:
        raise UserError(f"there is no file, folder or glob {path!r}{_suggestion(Path(path))}; give an existing one")
    return found


def adapt_config(path: str, data: DataConfig) -> DataConfig:
    """Returns the options for reading another path than `data.path`: the same, unless its suffix differs in format."""
    file, original = Path(path), Path(data.path)
    if SUFFIXES.get(suffix_of(file)) in (None, format_of(original, data)) or suffix_of(file) == suffix_of(original):
        return data
    return replace(data, format="suffix", columns=(), pattern="", encoding="utf-8")


def held_out_paths(data: DataConfig) -> tuple[str, str, str] | None:
    """Returns the path, target path and split of the held-out data; None if part of the training data is held out.

    Raises:
      UserError: if a field for held-out data has no effect.
    """
    if data.eval_target_path and not data.eval_path:
        raise UserError(
            f"data.eval_target_path is {data.eval_target_path!r}, which requires eval_path; give --data.eval-path"
        )
    if data.eval_path:
        return data.eval_path, data.eval_target_path, data.eval_split or data.split
    if data.eval_split and not tfds.is_tfds(data.path):
        raise UserError(
            f"data.eval_split is {data.eval_split!r}, but {data.path} is not a tfds data set; give held-out data with "
            f"--data.eval-path, or leave --data.eval-split empty"
        )
    return (data.path, "", data.eval_split) if data.eval_split else None


def fingerprint(path: str) -> str:
    """Returns a hash of the data as 16 hexadecimal digits, which does not depend on its location.

    For files it covers the relative names and all bytes; for tfds:NAME, the full name with its version.
    """
    digest = hashlib.sha256()
    if path.startswith("tfds:"):
        digest.update(tfds.open_builder(path).info.full_name.encode())
        return digest.hexdigest()[:16]
    found, path = list_files(path), buckets.download(path)
    top = path if os.path.isdir(path) else os.path.commonpath([f.parent for f in found])
    for file in found:
        name = f"{os.path.relpath(file, top)}\0".encode(errors="surrogateescape")
        try:
            digest.update(name + disk.content_hash(file).encode())
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}; give a readable file") from None
    return digest.hexdigest()[:16]


def _suggestion(path: Path) -> str:
    """Returns a hint for a message about a missing path: similar names in its folder."""
    if not path.parent.is_dir():
        return f" (nor a folder {str(path.parent)!r})"
    names = os.listdir(path.parent)
    hint = suggestion(path.name, names) if names else ""
    return hint if "perhaps" in hint or len(names) <= 10 else ""  # a long list of unrelated names does not help


def _check_row(place: Place, row: Row, data: DataConfig, report: Counter, columns: Columns | None = None) -> Row | None:
    """Returns the row with valid Unicode strings, or None if cleaning.encoding drops it."""
    for name, value in row.items():
        broken: list[str] = []
        row[name] = _decode(value, broken)
        if not broken or (columns is not None and not columns.has(name) and name != data.text):
            continue
        if data.cleaning.encoding == "drop":
            report["dropped: encoding"] += 1
            return None
        if data.cleaning.encoding == "refuse":
            if os.path.isfile(place.file) and format_of(Path(place.file), data) == "text":  # count lines in the text
                before = _SURROGATES.split(broken[0], maxsplit=1)[0]
                place = Place(place.file, place.line + len(_LINE_END.findall(before)))
            if _BYTES.search(broken[0]):
                fault = "is not UTF-8; convert the data, set its encoding with --data.encoding, such as cp1252,"
            else:
                surrogate = ascii(_SURROGATES.findall(broken[0])[0])
                fault = f"holds a lone surrogate, {surrogate}, which is not a character; correct the row,"
            raise UserError(f"{place}: column {name!r} {fault} or set --data.cleaning.encoding to 'replace' or 'drop'")
        report["changed: encoding"] += 1
    return row


def _decode(value: Any, broken: list[str]) -> Any:
    """Decodes bytes and replaces surrogates by U+FFFD in a value and in all strings inside it.

    The original strings with surrogates are appended to `broken`.
    """
    if isinstance(value, (np.generic, np.ndarray)):  # from tfds
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
        value = [_decode(item, broken) for item in value]
    elif isinstance(value, dict):
        value = {_decode(key, broken): _decode(item, broken) for key, item in value.items()}
    elif isinstance(value, tuple):  # an entry of a parquet map
        value = tuple(_decode(item, broken) for item in value)
    return value
