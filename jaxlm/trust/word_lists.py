"""Lists of words and of regular expressions, and the form in which texts are compared with words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError

_DIGITS_AS_LETTERS = str.maketrans("013457@$", "oieastas")


def normalize(text: str) -> str:
    """Returns a text in the form that is compared with words: without case, accents and invisible characters.

    Letters of full width and other compatible forms become the usual ones (Unicode NFKC).

    >>> normalize("Ｃａｆé\\u200b")
    'cafe'
    """
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    return "".join(c for c in decomposed if unicodedata.category(c) not in ("Mn", "Cf"))


def read_lines(file: str, what: str) -> list[tuple[int, str]]:
    """Returns the lines of a file with their numbers, without comments and empty lines.

    Raises:
      UserError: for a file that cannot be read, or has no lines.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"{file} cannot be read: {reason}; give a text file with a {what} per line") from None
    lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), start=1)]
    lines = [(n, line) for n, line in lines if line and not line.startswith("#")]
    if not lines:
        raise UserError(f"{file} contains no {what}; write one per line")
    return lines


def word_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Returns a pattern for normalised texts that contain one of the words or phrases as a whole."""
    alternatives = sorted({normalize(word) for word in words}, key=len, reverse=True)
    if not all(alternatives):
        raise UserError("a word of the list has no visible characters; remove it")
    escaped = (r"\s+".join(map(re.escape, word.split())) for word in alternatives)
    return re.compile(rf"(?<!\w)(?:{'|'.join(escaped)})(?!\w)")


def find_word(pattern: re.Pattern[str], text: str) -> str | None:
    """Returns the first word of the pattern in a text, also if digits replace some of its letters; None: none."""
    normalized = normalize(text)
    for form in (normalized, normalized.translate(_DIGITS_AS_LETTERS)):
        if match := pattern.search(form):
            return match[0]
    return None


def compile_patterns(lines: Sequence[tuple[int, str]], file: str) -> list[Any]:
    """Returns regular expressions that are matched in linear time, whatever the text.

    Raises:
      UserError: for an invalid expression, and where the package for them is missing.
    """
    try:
        import re2
    except ImportError:
        raise UserError(
            "lists of patterns require the package google-re2; install it: pip install 'jaxlm[safety]'"
        ) from None
    options = re2.Options()
    options.log_errors = False
    options.case_sensitive = False
    found = []
    for number, line in lines:
        try:
            found.append(re2.compile(line, options))
        except re2.error as error:
            reason = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else error
            raise UserError(
                f"{file}:{number}: {line!r} is not a valid regular expression: {reason}; correct it"
            ) from None
    return found
