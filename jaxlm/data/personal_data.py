"""Personal data in texts: addresses, phone numbers, card and identity numbers, found by patterns and checksums."""

from __future__ import annotations

import ipaddress
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import NamedTuple

from jaxlm.errors import UserError, suggestion


class Finding(NamedTuple):
    """Personal data in a text: its kind, an entry of `KINDS`, and its characters."""

    kind: str
    start: int
    end: int


class Detector(NamedTuple):
    """A kind of personal data: candidates by a pattern, and the check that each must pass."""

    pattern: re.Pattern[str]
    is_valid: Callable[[str], bool] = lambda text: True


def _digits(text: str) -> list[int]:
    return [int(character) for character in text if character.isdecimal()]


def is_card_number(text: str) -> bool:
    """Returns whether the digits have the check digit of Luhn (ISO/IEC 7812-1), and the first digit of an issuer."""
    digits = _digits(text)
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    is_long_enough, first = 13 <= len(digits) <= 19, digits[0] if digits else 0
    return is_long_enough and 2 <= first <= 6 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def is_iban(text: str) -> bool:
    """Returns whether an account number has the right remainder (ISO 13616)."""
    compact = re.sub(r"\s", "", text).upper()
    rotated = compact[4:] + compact[:4]
    if not 15 <= len(compact) <= 34 or not rotated.isascii() or not rotated.isalnum():
        return False
    return int("".join(str(int(character, 36)) for character in rotated)) % 97 == 1


def is_ip_address(text: str) -> bool:
    """Returns whether a text is an address of IP version 4 or 6, except unspecified and broadcast addresses."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not address.is_unspecified and str(address) != "255.255.255.255"


_DNI = "TRWAGMYFPDXBNJZSQVHLCKE"  # the control letters of Spanish identity numbers


def is_identity_number(text: str) -> bool:
    """Returns whether a candidate is an identity number of the USA, the United Kingdom, Spain or France."""
    compact = re.sub(r"[\s-]", "", text).upper()
    if re.fullmatch(r"\d{9}", compact):  # social security number: the invalid areas, groups and serials
        return (
            compact[:3] not in ("000", "666") and compact[0] != "9" and compact[3:5] != "00" and compact[5:] != "0000"
        )
    if re.fullmatch(r"[A-Z]{2}\d{6}[A-D]", compact):  # national insurance number
        forbidden = ("BG", "GB", "NK", "KN", "TN", "NT", "ZZ")
        return not set(compact[:2]) & set("DFIQUV") and compact[1] != "O" and compact[:2] not in forbidden
    if match := re.fullmatch(r"([XYZ]?)(\d{7,8})([A-Z])", compact):  # DNI and NIE
        prefix, number, letter = match.groups()
        if len(number) != (7 if prefix else 8):
            return False
        return _DNI[int(f"{'XYZ'.index(prefix) if prefix else ''}{number}") % 23] == letter
    if re.fullmatch(r"[12]\d{14}", compact):  # number of French social security
        return 97 - int(compact[:13]) % 97 == int(compact[13:]) and 1 <= int(compact[3:5]) <= 12
    return False


def _is_phone_number(text: str) -> bool:
    return 8 <= len(_digits(text)) <= 15 and not is_iban(text)


# A detector earlier in the table takes precedence where two findings overlap.
KINDS: dict[str, Detector] = {
    "email": Detector(re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[^\W_][\w-]{0,62}\.){1,8}[^\W\d_]{2,24}(?![\w-])")),
    "iban": Detector(re.compile(r"(?<!\w)[A-Za-z]{2}\d{2}(?: ?[A-Za-z0-9]){11,30}(?!\w)"), is_iban),
    "card": Detector(re.compile(r"(?<![\w.,-])\d(?:[ -]?\d){12,18}(?![\w-]|[.,]\d)"), is_card_number),
    "identity": Detector(
        re.compile(
            r"(?<![\w-])(?:\d{3}-\d{2}-\d{4}|[A-Za-z]{2} ?\d{2} ?\d{2} ?\d{2} ?[A-Da-d]|[XYZxyz]?-?\d{7,8}-?[A-Za-z]"
            r"|[12] ?\d{2} ?\d{2} ?\d{2} ?\d{3} ?\d{3} ?\d{2})(?![\w-])"
        ),
        is_identity_number,
    ),
    "ip": Detector(
        re.compile(
            r"(?<![\w.:-])(?<!version )(?<!release )(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9a-f:]{2,39})"
            r"(?![\w:-]|\.\d)",
            re.IGNORECASE,
        ),
        is_ip_address,
    ),
    "phone": Detector(
        re.compile(
            r"(?<![\w.,/+-])(?<!\d )(?:\+\d{1,3}(?:[ ./-]?\(?\d{1,5}\)?){2,6}"
            r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[ .-]\d{3}[ .-]\d{4}"
            r"|0\d{2,4}[ /-]\d{3,8}(?:[ -]\d{2,5}){0,3}|0\d(?:[ .]\d{2}){4})(?![\w-]|[.,/]\d)"
        ),
        _is_phone_number,
    ),
}


def check_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    """Returns the kinds; raises UserError for one that is not an entry of `KINDS`, and if there are none."""
    kinds = tuple(kinds)
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"{kind!r} is no kind of personal data{suggestion(kind, KINDS)}")
    if not kinds:
        raise UserError(f"there are no kinds of personal data to find; give some of {', '.join(KINDS)}")
    return kinds


def find(text: str, kinds: Iterable[str] = tuple(KINDS)) -> list[Finding]:
    """Returns the personal data in a text, in order and without overlap.

    Args:
      text: the text.
      kinds: the kinds to find, entries of `KINDS`.
    """
    found: list[Finding] = []  # in order
    for kind in check_kinds(kinds):
        pattern, is_valid = KINDS[kind]
        own = []
        for match in pattern.finditer(text):
            before = bisect_left(found, match.end(), key=lambda other: other.start) - 1
            overlaps = before >= 0 and found[before].end > match.start()
            if not overlaps and is_valid(match[0]):
                own.append(Finding(kind, *match.span()))
        found = sorted(found + own, key=lambda finding: finding.start)
    return found


def replace(text: str, findings: Iterable[Finding]) -> str:
    """Returns the text with the name of its kind, such as [EMAIL], in place of each finding; they are in order."""
    parts, end = [], 0
    for finding in findings:
        parts += [text[end : finding.start], f"[{finding.kind.upper()}]"]
        end = finding.end
    return "".join((*parts, text[end:]))


def mask(text: str, kinds: Iterable[str] = tuple(KINDS)) -> str:
    """Returns the text with its personal data replaced by their kinds.

    >>> mask("Write to anna.b@example.org or call +49 30 1234567.")
    'Write to [EMAIL] or call [PHONE].'
    """
    return replace(text, find(text, kinds))
