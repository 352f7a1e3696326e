"""What is done to the text of a row before it is a document; each choice counts what it changed or dropped."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter

from jaxlm.config import CleaningConfig

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # category Cc without tab, line feed, carriage return


def clean(text: str, cleaning: CleaningConfig, seen: set[bytes], report: Counter) -> str | None:
    """The cleaned text, or None where the row is dropped.

    Changes come first (unicode, control, whitespace, in that order), then what is blank, too short or too long (in
    characters) or an exact duplicate is dropped.  `seen` holds the digests of the rows kept so far, `report` counts
    rows under "changed: CHOICE" and "dropped: CHOICE"; both grow in place.

    >>> clean(" a  b ", CleaningConfig(whitespace=True), set(), Counter())
    'a b'
    """

    def change(choice: str, changed: str) -> str:
        report[f"changed: {choice}"] += changed != text
        return changed

    def drop(choice: str) -> str | None:
        report[f"dropped: {choice}"] += 1
        return None

    if cleaning.unicode != "none":
        text = change("unicode", unicodedata.normalize(cleaning.unicode, text))
    if cleaning.control:
        text = change("control", _CONTROL.sub("", text))
    if cleaning.whitespace:
        text = change("whitespace", " ".join(text.split()))
    if not text or text.isspace():
        return drop("blank")
    if len(text) < cleaning.min_characters:
        return drop("min_characters")
    if 0 < cleaning.max_characters < len(text):
        return drop("max_characters")
    if cleaning.duplicates:
        # 16 bytes for each row, not the row: two different rows collide with probability below rows^2 / 2^129.
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest in seen:
            return drop("duplicates")
        seen.add(digest)
    return text
