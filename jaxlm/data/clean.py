"""Cleaning of the text of a row before it becomes a document. Every option counts what it changed or dropped."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter

from jaxlm.config import CleaningConfig
from jaxlm.data import personal_data

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # category Cc without tab, line feed, carriage return


def clean(text: str, cleaning: CleaningConfig, seen: set[bytes], report: Counter) -> str | None:
    """Returns the cleaned text, or None if the row is dropped.

    Changes are made first, in the order unicode, control, whitespace, personal data. Then blank rows, rows that are too
    short or too long, and exact duplicates are dropped.

    Args:
      text: the text of the row.
      cleaning: the options; lengths are in characters.
      seen: digests of the rows kept so far; updated in place.
      report: numbers of rows under "changed: OPTION" and "dropped: OPTION"; updated in place.

    >>> clean(" a  b ", CleaningConfig(whitespace=True), set(), Counter())
    'a b'
    """

    def change(option: str, changed: str) -> str:
        report[f"changed: {option}"] += changed != text
        return changed

    def drop(option: str) -> str | None:
        report[f"dropped: {option}"] += 1
        return None

    if cleaning.unicode != "none":
        text = change("unicode", unicodedata.normalize(cleaning.unicode, text))
    if cleaning.control:
        text = change("control", _CONTROL.sub("", text))
    if cleaning.whitespace:
        text = change("whitespace", " ".join(text.split()))
    if cleaning.personal_data == "mask":
        text = change("personal_data", personal_data.mask(text))
    elif cleaning.personal_data == "drop" and personal_data.find(text):
        return drop("personal_data")
    if not text or text.isspace():
        return drop("blank")
    if len(text) < cleaning.min_characters:
        return drop("min_characters")
    if 0 < cleaning.max_characters < len(text):
        return drop("max_characters")
    if cleaning.duplicates:
        # Stores 16 bytes per row instead of the row. Different rows collide with probability below rows^2 / 2^129.
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest in seen:
            return drop("duplicates")
        seen.add(digest)
    return text
