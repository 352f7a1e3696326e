"""Small files of a model's folder, which come from outside: the one place that finds, reads and checks them.

A file must be regular, lie in its folder and keep to limits of size and depth; its values are taken by type and range.
Whatever breaks a rule is a UserError that names the file, the value and the remedy.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from jaxlm.errors import UserError, perhaps
from jaxlm.storage import disk

MAX_BYTES = 200_000_000  # the largest tokenizer.json in use has 35 MB
MAX_DEPTH = 64  # nested lists and objects of a JSON file; tokenizer.json has 8
MAX_INTEGER = 2**63 - 1
_SHORT = reprlib.Repr()  # for values of files, which may be as long as the file
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_T = TypeVar("_T")
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")  # how JSON writes either half of a surrogate pair


def locate(folder: str | os.PathLike[str], name: str | os.PathLike[str]) -> Path | None:
    """Returns the path of a regular file of a folder, or None where there is no file of this name.

    Args:
        folder: the folder; it may itself be a link.
        name: the file's name, or its path below the folder.

    Raises:
        UserError: the name or a link leads outside of the folder, or there is something else than a regular file.
            Links from a snapshot of the hub's cache to the blobs of the same repository are allowed.
    """
    path = Path(folder) / name
    try:
        if not os.path.lexists(path):
            return None
        check_inside(path, folder)
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _not_regular(path)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise _unreadable(path, error) from None
    return path


def fingerprint(folder: Path) -> str:
    """Returns 16 hexadecimal digits that change with every file of a model's folder but its texts for readers.

    Raises:
        UserError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if file.is_file() and not hidden and file.suffix not in (".md", ".html"):
            try:
                digest.update(f"{name}\0{disk.content_hash(file)}\0".encode(errors="surrogateescape"))
            except OSError as error:
                raise UserError(f"{file} cannot be read: {error.strerror}; correct its permissions") from None
    return digest.hexdigest()[:16]


def locate_all(folder: str | os.PathLike[str], *patterns: str) -> list[Path]:
    """Returns the regular files of a folder whose names match any of the glob patterns, sorted.

    Raises:
        UserError: as in `locate`.
    """
    try:
        found = {path for pattern in patterns for path in Path(folder).glob(pattern)}
    except (OSError, ValueError, NotImplementedError) as error:
        raise _unreadable(Path(folder), error) from None
    files = (locate(folder, path.relative_to(folder)) for path in sorted(found))
    return [file for file in files if file is not None]


def check_inside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Checks that a path, with all its links followed, stays inside of a folder.

    Raises:
        UserError: it leads outside, and not from a snapshot of the hub's cache to the blobs of the same repository.
    """
    try:
        root, real = (Path(os.path.realpath(given)) for given in (folder, path))
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise _unreadable(Path(path), error) from None
    snapshots = [above.parent for above in (root, *root.parents) if above.parent.name == "snapshots"]
    blobs = [Path(os.path.realpath(above.parent / "blobs")) for above in snapshots]
    if not real.is_relative_to(root) and real.parent not in blobs:
        raise UserError(
            f"{path} leads outside of {folder}, to {real}; files of a model must be in its folder: "
            f"copy the file there, or remove it"
        )


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file for reading bytes.

    Raises:
        UserError: it is no regular file, or the system refuses to open it, or to read it in the block.
    """
    try:
        # Without O_NONBLOCK, to open a named pipe would wait for a writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _not_regular(path)
            yield file
    except UserError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from error


def read_bytes(path: Path, *, limit: int = MAX_BYTES) -> bytes:
    """Returns the content of a regular file of at most `limit` bytes.

    Raises:
        UserError: it is larger, no regular file, or cannot be read.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise UserError(f"{path} has {size:,} bytes; a file of this kind has at most {limit:,}: fetch it again")
        return file.read()


def read_text(path: Path, *, limit: int = MAX_BYTES) -> str:
    """Returns the text of a regular file in UTF-8, without a byte order mark.

    Raises:
        UserError: as in `read_bytes`, and where it is not UTF-8.
    """
    return decode(read_bytes(path, limit=limit), path)


def read_json(path: Path, *, limit: int = MAX_BYTES) -> Any:
    """Returns the JSON value in a regular file; raises UserError as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(path, limit=limit), path)


def read_object(path: Path, *, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Returns the JSON object in a regular file; raises UserError as `read_bytes` and `parse_object` do."""
    return parse_object(read_bytes(path, limit=limit), path)


def decode(content: bytes, source: object) -> str:
    """Returns the text of a file's content in UTF-8, without a byte order mark; `source` names the file in errors.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source} is not UTF-8 ({error.reason} at byte {error.start:,}); save it in UTF-8, or fetch it again"
        ) from None


def parse_json(content: bytes, source: object) -> Any:
    """Returns the JSON value of a file's content; `source` names the file in errors.

    NaN and infinities are let through: files of models have them in keys that nobody reads.

    Raises:
        UserError: it is not JSON in UTF-8, holds an integer of thousands of digits or half of a surrogate pair, or is
            nested deeper than `MAX_DEPTH`.
    """
    text = decode(content, source)
    try:
        values = json.loads(text)
        depth = _depth(values)
        if depth > MAX_DEPTH:
            raise RecursionError
        if _HALF_PAIR.search(content):
            json.dumps(values, ensure_ascii=False).encode()  # raises for half of a pair
    except RecursionError:
        raise UserError(f"{source} is nested deeper than {MAX_DEPTH} levels; correct it, or fetch it again") from None
    except UnicodeEncodeError:
        raise UserError(f"{source} holds half of a surrogate pair, which is no text; fetch the file again") from None
    except ValueError as error:
        reason = "an integer has thousands of digits" if "digits" in str(error) else str(error)
        raise UserError(f"{source} is not JSON ({reason}); correct it, or fetch it again") from None
    return values


def parse_object(content: bytes, source: object) -> dict[str, Any]:
    """Returns the JSON object of a file's content; raises UserError as `parse_json`, and for another kind of value."""
    values = parse_json(content, source)
    if not isinstance(values, dict):
        raise UserError(f"{source} holds a {type(values).__name__}, not an object; correct it, or fetch it again")
    return values


@dataclass(frozen=True)
class JsonObject:
    """The values of a JSON object, taken by type and range.

    A key that is absent, or null, gives the default.  Methods raise UserError for a value of another type or out of
    range; the message names `source`, the key, the value and what it must be.
    """

    values: dict[str, Any]
    source: str  # the file, and the key above, as errors name them

    @classmethod
    def of(cls, value: Any, source: object) -> JsonObject:
        """Returns the object, after checking that it is one."""
        if not isinstance(value, dict):
            raise UserError(f"{source} is {_SHORT.repr(value)}; it must be a JSON object: correct it")
        return cls(value, str(source))

    @classmethod
    def read(cls, path: Path) -> JsonObject:
        """Returns the object in a file."""
        return cls(read_object(path), str(path))

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: _T, low: int = -MAX_INTEGER, high: int = MAX_INTEGER) -> int | _T:
        """Returns an integer in [low, high]."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(key, f"an integer from {low:,} to {high:,}")
        return value

    def number(self, key: str, default: _T, low: float = -1e30, high: float = 1e30) -> float | _T:
        """Returns a finite number in [low, high]; an integer counts as one."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
            raise self.wrong(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def boolean(self, key: str, default: _T) -> bool | _T:
        """Returns true or false."""
        value = self.values.get(key)
        if value is not None and type(value) is not bool:
            raise self.wrong(key, "true or false")
        return default if value is None else value

    def text(self, key: str, default: _T, known: Iterable[str] | None = None) -> str | _T:
        """Returns a string; where `known` is given, one of these."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        if known is not None and value not in (known := list(known)):
            raise UserError(f"{self.source}: {key} is {_SHORT.repr(value)}{perhaps(value, known)}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Returns the strings of a list, or one string by itself; none where the key is absent."""
        value = self.values.get(key)
        listed = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
            raise self.wrong(key, "a list of strings")
        return tuple(listed)

    def integers(self, key: str, low: int = -MAX_INTEGER, high: int = MAX_INTEGER) -> tuple[int, ...]:
        """Returns the integers of a list, or one integer by itself; none where the key is absent."""
        value = self.values.get(key)
        listed = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(one) is int and low <= one <= high for one in listed):
            raise self.wrong(key, f"an integer from {low:,} to {high:,}, or a list of them")
        return tuple(listed)

    def object(self, key: str) -> JsonObject:
        """Returns the object under a key; an empty one where the key is absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return JsonObject(value or {}, f"{self.source}: {key}")

    def objects(self, key: str) -> tuple[JsonObject, ...]:
        """Returns the objects of a list; none where the key is absent."""
        value = self.values.get(key)
        listed = [] if value is None else value
        if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
            raise self.wrong(key, "a list of objects")
        return tuple(JsonObject(one, f"{self.source}: {key}[{i}]") for i, one in enumerate(listed))

    def wrong(self, key: str, expected: str) -> UserError:
        """Returns the error that the value of a key is not what it must be."""
        return wrong_value(self.source, key, self.values.get(key), expected)


def wrong_value(source: object, key: str, value: Any, expected: str) -> UserError:
    """Returns the error that the value of a key of a file is not what it must be."""
    return UserError(
        f"{source}: {key} is {_SHORT.repr(value)}; it must be {expected}: correct it, or fetch the file again"
    )


def _depth(values: Any) -> int:
    """How deep lists and objects are nested, counted without recursion."""
    depth, level = 0, [values]
    while level := [one for one in level if isinstance(one, (list, dict))]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def _not_regular(path: Path) -> UserError:
    return UserError(f"{path} is not a regular file; put the file itself there")


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(f"{_SHORT.repr(str(path))} cannot be read ({reason}); correct that, or fetch the file again")
