"""The small files of a model's folder, which are untrusted: finding, reading and checking them.

A file must be a regular file inside its folder, within limits of size and depth. Values are checked for type and range.
A violation raises a UserError with the file, the value and the remedy.
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

from jaxlm.errors import UserError, suggestion
from jaxlm.storage import disk

MAX_BYTES = 200_000_000  # the largest known tokenizer.json has 35 MB
MAX_DEPTH = 64  # levels of nested lists and objects in a JSON file; tokenizer.json has 8
MAX_INTEGER = 2**63 - 1
_SHORT = reprlib.Repr()  # for values from files, which can be as long as the file
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_T = TypeVar("_T")
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")  # a half of a surrogate pair in JSON


def locate(folder: str | os.PathLike[str], name: str | os.PathLike[str]) -> Path | None:
    """Returns the path of a regular file in a folder, or None if there is no file with this name.

    Args:
      folder: the folder, which may be a link.
      name: the name of the file, or its path below the folder.

    Raises:
      UserError: if the name or a link points outside the folder, or if it is not a regular file. Links from a
        snapshot in the hub's cache to the blobs of the same repository are allowed.
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
    """Returns a hash of the files of a model's folder, except hidden files and documentation, as 16 hexadecimal digits.

    Raises:
      UserError: if a file cannot be read.
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
    """Returns the sorted regular files of a folder that match any of the glob patterns.

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
    """Checks that a path, after following all links, is inside a folder.

    Raises:
      UserError: if it is outside, except for links from a snapshot in the hub's cache to the blobs of the same
        repository.
    """
    try:
        root, real = (Path(os.path.realpath(given)) for given in (folder, path))
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise _unreadable(Path(path), error) from None
    snapshots = [above.parent for above in (root, *root.parents) if above.parent.name == "snapshots"]
    blobs = [Path(os.path.realpath(above.parent / "blobs")) for above in snapshots]
    if not real.is_relative_to(root) and real.parent not in blobs:
        raise UserError(
            f"{path} points outside {folder}, to {real}; the files of a model must be in its folder: "
            f"copy the file there, or remove it"
        )


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file for reading bytes.

    Raises:
      UserError: if it is not a regular file, or if opening it, or reading it in the block, fails.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
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
      UserError: if the file is larger, is not a regular file, or cannot be read.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise UserError(f"{path} has {size:,} bytes; a file of this kind has at most {limit:,}: download it again")
        return file.read()


def read_text(path: Path, *, limit: int = MAX_BYTES) -> str:
    """Returns the text of a regular file in UTF-8, without a byte order mark.

    Raises:
      UserError: as in `read_bytes`, or if the file is not UTF-8.
    """
    return decode(read_bytes(path, limit=limit), path)


def read_json(path: Path, *, limit: int = MAX_BYTES) -> Any:
    """Returns the JSON value in a regular file; raises the errors of `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, limit=limit), path)


def read_object(path: Path, *, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Returns the JSON object in a regular file; raises the errors of `read_bytes` and `parse_object`."""
    return parse_object(read_bytes(path, limit=limit), path)


def decode(content: bytes, source: object) -> str:
    """Returns the text of a file's content in UTF-8, without a byte order mark; `source` is its name for errors.

    Raises:
      UserError: if it is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source} is not UTF-8 ({error.reason} at byte {error.start:,}); save it in UTF-8, or download it again"
        ) from None


def parse_json(content: bytes, source: object) -> Any:
    """Returns the JSON value of a file's content; `source` is its name for errors.

    NaN and infinities are accepted, since files of models have them in unused keys.

    Raises:
      UserError: if it is not JSON in UTF-8, contains an integer with thousands of digits or an unpaired surrogate,
        or is nested deeper than `MAX_DEPTH`.
    """
    text = decode(content, source)
    try:
        values = json.loads(text)
        depth = _depth(values)
        if depth > MAX_DEPTH:
            raise RecursionError
        if _HALF_PAIR.search(content):
            json.dumps(values, ensure_ascii=False).encode()  # raises for an unpaired surrogate
    except RecursionError:
        raise UserError(
            f"{source} is nested deeper than {MAX_DEPTH} levels; correct it, or download it again"
        ) from None
    except UnicodeEncodeError:
        raise UserError(f"{source} contains an unpaired surrogate; download the file again") from None
    except ValueError as error:
        reason = "an integer has thousands of digits" if "digits" in str(error) else str(error)
        raise UserError(f"{source} is not JSON ({reason}); correct it, or download it again") from None
    return values


def parse_object(content: bytes, source: object) -> dict[str, Any]:
    """Returns the JSON object of a file's content; raises UserError as in `parse_json`, or if it is not an object."""
    values = parse_json(content, source)
    if not isinstance(values, dict):
        raise UserError(f"{source} contains a {type(values).__name__}, not an object; correct it, or download it again")
    return values


@dataclass(frozen=True)
class JsonObject:
    """A JSON object with access by type and range.

    A missing key, or null, returns the default. A value of another type, or out of range, raises a UserError with
    `source`, the key, the value and the rule.

    Attributes:
      values: the values.
      source: the name of the file and the parent key, for error messages.
    """

    values: dict[str, Any]
    source: str

    @classmethod
    def of(cls, value: Any, source: object) -> JsonObject:
        """Returns a JsonObject; raises UserError if the value is not an object."""
        if not isinstance(value, dict):
            raise UserError(f"{source} is {_SHORT.repr(value)}; it must be a JSON object: correct it")
        return cls(value, str(source))

    @classmethod
    def read(cls, path: Path) -> JsonObject:
        """Returns the JSON object in a file."""
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
        """Returns a finite number in [low, high], which may be an integer."""
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
        """Returns a string, which must be one of `known`, if given."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        if known is not None and value not in (known := list(known)):
            raise UserError(f"{self.source}: {key} is {_SHORT.repr(value)}{suggestion(value, known)}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Returns the strings of a list, or a single string; empty if the key is missing."""
        value = self.values.get(key)
        items = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(one, str) for one in items):
            raise self.wrong(key, "a list of strings")
        return tuple(items)

    def integers(self, key: str, low: int = -MAX_INTEGER, high: int = MAX_INTEGER) -> tuple[int, ...]:
        """Returns the integers of a list, or a single integer; empty if the key is missing."""
        value = self.values.get(key)
        items = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(one) is int and low <= one <= high for one in items):
            raise self.wrong(key, f"an integer from {low:,} to {high:,}, or a list of them")
        return tuple(items)

    def object(self, key: str) -> JsonObject:
        """Returns the object of a key; empty if the key is missing."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return JsonObject(value or {}, f"{self.source}: {key}")

    def objects(self, key: str) -> tuple[JsonObject, ...]:
        """Returns the objects of a list; empty if the key is missing."""
        value = self.values.get(key)
        items = [] if value is None else value
        if not isinstance(items, list) or not all(isinstance(one, dict) for one in items):
            raise self.wrong(key, "a list of objects")
        return tuple(JsonObject(one, f"{self.source}: {key}[{i}]") for i, one in enumerate(items))

    def wrong(self, key: str, expected: str) -> UserError:
        """Returns the error for an invalid value of a key."""
        return wrong_value(self.source, key, self.values.get(key), expected)


def wrong_value(source: object, key: str, value: Any, expected: str) -> UserError:
    """Returns the error for an invalid value of a key in a file."""
    return UserError(
        f"{source}: {key} is {_SHORT.repr(value)}; it must be {expected}: correct it, or download the file again"
    )


def _depth(values: Any) -> int:
    """Returns the nesting depth of lists and objects, computed without recursion."""
    depth, level = 0, [values]
    while level := [one for one in level if isinstance(one, (list, dict))]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def _not_regular(path: Path) -> UserError:
    return UserError(f"{path} is not a regular file; replace it with the file itself")


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(f"{_SHORT.repr(str(path))} cannot be read ({reason}); correct that, or download the file again")
