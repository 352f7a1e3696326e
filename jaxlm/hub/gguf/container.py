"""Reading GGUF files: a header that is checked before anything is read, and tensors that are read on access.

A file consists of a magic number and counts, the metadata (typed values by key), the entry of each tensor (name, shape,
type, offset), and the bytes of the tensors at multiples of an alignment. All numbers are little-endian.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import os
import re
import reprlib
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxlm.errors import UserError
from jaxlm.hub.model_files import open_file
from jaxlm.hub.safetensors import Stored

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 has counts of 32 bits
MAX_KEYS = 100_000
MAX_TENSORS = 100_000
MAX_ITEMS = 10_000_000  # of an array in the metadata; the largest known vocabulary has 262,144 tokens
MAX_TEXT = 10_000_000  # bytes of a string in the metadata
MAX_AXES = 4
_CHUNK = 1 << 22  # bytes that are dequantised at once
_SHORT = reprlib.Repr()  # for values from files, which can be as long as the file
_SHORT.maxstring = _SHORT.maxother = 80
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class Type(NamedTuple):
    """A type of tensors: blocks of consecutive entries of a row.

    Attributes:
      number: the number of the type in a file.
      entries: number of entries of a block.
      size: bytes of a block.
      dtype: the dtype of the tensor when it is read.
    """

    number: int
    entries: int
    size: int
    dtype: np.dtype = np.dtype(np.float32)

    @property
    def is_quantised(self) -> bool:
        """Whether the entries are integers with scales, which the package gguf dequantises."""
        return self.entries > 1


TYPES = {
    "F32": Type(0, 1, 4),
    "F16": Type(1, 1, 2, np.dtype(np.float16)),
    "BF16": Type(30, 1, 2, np.dtype(ml_dtypes.bfloat16)),
    "Q4_0": Type(2, 32, 18),
    "Q4_1": Type(3, 32, 20),
    "Q5_0": Type(6, 32, 22),
    "Q5_1": Type(7, 32, 24),
    "Q8_0": Type(8, 32, 34),
    "Q2_K": Type(10, 256, 84),
    "Q3_K": Type(11, 256, 110),
    "Q4_K": Type(12, 256, 144),
    "Q5_K": Type(13, 256, 176),
    "Q6_K": Type(14, 256, 210),
}
_NUMBERS = {kind.number: (name, kind) for name, kind in TYPES.items()}
# Number of a type of metadata -> its format in `struct`. 7 is a bool, 8 a string, and 9 an array.
_VALUES = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_FLOAT, _BOOL, _STRING, _ARRAY = 6, 7, 8, 9


class Computed:
    """A tensor that is computed from a file when it is read.

    Only the last computed tensor of a file stays in memory, for readers that read a tensor in parts.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, make: Callable[[], np.ndarray], last: list[Any]):
        self.shape, self.dtype = shape, dtype
        self._make, self._last = make, last

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.array(np.asarray(self)[index])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if not self._last or self._last[0] is not self:
            self._last.clear()  # before the next tensor is computed
            array = self._make()
            array.flags.writeable = False
            self._last[:] = self, array
        return self._last[1].astype(dtype or self.dtype, copy=bool(copy))


class Container(NamedTuple):
    """The content of a GGUF file.

    Attributes:
      path: the file; of a model in several files, the first one.
      metadata: values by key; floats of 32 bits are the shortest decimal numbers that round to them.
      tensors: tensors by name, with `shape`, `dtype`, and NumPy's conversion to an array.
      last: the tensor in memory; see `Computed`.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Any]
    last: list[Any]

    def change(self, tensor: Any, function: Callable[[np.ndarray], np.ndarray]) -> Computed:
        """Returns a tensor to which a function that keeps its shape is applied when it is read."""
        return Computed(tensor.shape, tensor.dtype, lambda: function(_fresh(tensor)), self.last)


def _fresh(tensor: Any) -> np.ndarray:
    """Returns a tensor as an array, without keeping a computed one in memory."""
    return tensor._make() if isinstance(tensor, Computed) else np.asarray(tensor)


def package() -> ModuleType:
    """Returns the package gguf; raises UserError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            f"GGUF files with quantised tensors, and writing GGUF files, require the package gguf ({error}); "
            f"install it: pip install 'jaxlm[gguf]'"
        ) from None
    return gguf


def parts(path: Path) -> list[Path]:
    """Returns the files of a model, which are several if the name ends with -00001-of-0000N.gguf.

    Raises:
      UserError: if the path is not the first of several files, or if a file is missing.
    """
    match = _PART.fullmatch(path.name)
    if not match:
        return [path]
    stem, number, count = match[1], int(match[2]), int(match[3])
    names = [path.with_name(f"{stem}-{i + 1:05d}-of-{count:05d}{SUFFIX}") for i in range(max(count, 1))]
    if number != 1:
        raise UserError(f"{path} is part {number} of {count} of a model; give its first part, {names[0]}")
    missing = [file.name for file in names if not file.exists()]
    if missing:
        listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise UserError(f"{path} is part 1 of {count}, but {listed} is missing in its folder; download all parts")
    return names


def read(path: Path) -> Container:
    """Returns the content of a GGUF file, or of all files of a model in several.

    Raises:
      UserError: if a file cannot be read, violates the format, or has tensors of an unsupported type.
    """
    first, *others = parts(Path(path))
    content = _read_file(first)
    for i, file in enumerate(others):
        part = _read_file(file)
        number = part.metadata.get("split.no")
        if number != i + 1:
            raise UserError(f"{file} has split.no {number}, not {i + 1}; download all parts of {first} again")
        if twice := content.tensors.keys() & part.tensors.keys():
            raise UserError(f"{file} has {min(twice)!r}, as an earlier part has; download all parts again")
        content.tensors.update(part.tensors)
    count = content.metadata.get("split.count", 1)
    if count not in (0, 1 + len(others)):
        raise UserError(
            f"{first} is one of {count} parts of a model; name the parts NAME-00001-of-{count:05d}.gguf, as they were "
            f"published, and give the first one"
        )
    total = content.metadata.get("split.tensors.count", len(content.tensors))
    if total != len(content.tensors):
        raise UserError(f"{first} and its parts have {len(content.tensors)} tensors, not {total}; download them again")
    return content


def _read_file(path: Path) -> Container:
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        _check_version(path, head)
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    try:
        metadata, entries = _header(_Cursor(mapped))
        _check_offsets(entries, _alignment(metadata), size)
    except (ValueError, struct.error, OverflowError) as error:
        raise UserError(f"{path} ({size:,} bytes) is truncated or corrupt: {error}; download the file again") from None
    last: list[Any] = []
    tensors = {name: _tensor(path, mapped, name, entry, last) for name, entry in entries.items()}
    return Container(path, metadata, tensors, last)


def _check_version(path: Path, head: bytes) -> None:
    """Raises UserError unless the first 8 bytes of a file are those of a supported version."""
    if head[:4] != MAGIC or len(head) < 8:
        raise UserError(
            f"{path} is not a GGUF file: it begins with {head[:4]!r}, not {MAGIC!r}; download the file again"
        )
    version, reverse = (int.from_bytes(head[4:8], order) for order in ("little", "big"))  # type: ignore[arg-type]
    remedy = "convert the original checkpoint with a current llama.cpp, or download another file"
    if version not in VERSIONS and reverse < version and reverse < 1 << 16:
        raise UserError(f"{path} is a big-endian GGUF file; only little-endian files are supported: {remedy}")
    if version not in VERSIONS:
        raise UserError(f"{path} has version {version} of GGUF; supported: {VERSIONS[0]} and {VERSIONS[1]}: {remedy}")


class _Cursor:
    """Reads consecutive values of a file; raises ValueError at its end."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.position = content, 8

    def take(self, count: int, what: str) -> bytes:
        left = len(self.content) - self.position
        if count > left:
            raise ValueError(f"{what} has {count:,} bytes at byte {self.position:,}, where only {left:,} are left")
        self.position += count
        return self.content[self.position - count : self.position]

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def count(self, what: str, limit: int, size: int) -> int:
        """Reads the number of items of at least `size` bytes each."""
        count = self.number("<Q", f"the number of {what}")
        limit = min(limit, (len(self.content) - self.position) // size)
        if count > limit:
            raise ValueError(f"it has {count:,} {what}, more than {limit:,}, the limit for its size")
        return count

    def text(self, what: str, limit: int = MAX_TEXT) -> str:
        length = self.number("<Q", f"the length of {what}")
        if length > limit:
            raise ValueError(f"{what} has a length of {length:,} bytes, more than {limit:,}")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is not UTF-8 ({error.reason})") from None

    def value(self, key: str) -> Any:
        """Reads the type and the value of a key."""
        kind = self.number("<I", f"the type of {key}")
        if kind == _STRING:
            return self.text(key)
        if kind != _ARRAY:
            return self.scalar(kind, key)
        kind = self.number("<I", f"the type of {key}")
        if kind == _STRING:
            return [self.text(key) for _ in range(self.count(f"items of {key}", MAX_ITEMS, 8))]
        if kind not in _VALUES:
            raise ValueError(f"{key} is an array of values of type {kind}, which is not a number or a string")
        dtype = np.dtype(_VALUES[kind])
        count = self.count(f"items of {key}", MAX_ITEMS, dtype.itemsize)
        items = np.frombuffer(self.take(count * dtype.itemsize, key), dtype)
        return items.astype(bool).tolist() if kind == _BOOL else items.tolist()

    def scalar(self, kind: int, key: str) -> Any:
        if kind not in _VALUES:
            raise ValueError(f"{key} has a value of the unknown type {kind}")
        value = self.number(_VALUES[kind], key)
        if kind == _BOOL:
            if value > 1:
                raise ValueError(f"{key} is the bool {value}, not 0 or 1")
            return bool(value)
        return float(str(np.float32(value))) if kind == _FLOAT else value  # 1e-05, not 9.999999747378752e-06


class _Entry(NamedTuple):
    """The entry of a tensor: its shape, the number of its type, and its first byte."""

    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def size(self) -> int:
        """Number of bytes; 0 for an unsupported type."""
        _, kind = _NUMBERS.get(self.kind, ("", None))
        return math.prod(self.shape) // kind.entries * kind.size if kind else 0


def _header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, _Entry]]:
    """Returns the metadata and the entries of the tensors."""
    tensor_count = cursor.count("tensors", MAX_TENSORS, 24)
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count("metadata keys", MAX_KEYS, 13)):
        key = cursor.text("a metadata key", 1 << 16)
        if key in metadata:
            raise ValueError(f"it has the metadata key {_SHORT.repr(key)} twice")
        metadata[key] = cursor.value(_SHORT.repr(key))
    entries: dict[str, _Entry] = {}
    for _ in range(tensor_count):
        name = cursor.text("the name of a tensor", 1 << 10)
        shown = _SHORT.repr(name)
        if name in entries:
            raise ValueError(f"it has the tensor {shown} twice")
        axes = cursor.number("<I", f"the number of axes of {shown}")
        if not 1 <= axes <= MAX_AXES:
            raise ValueError(f"{shown} has {axes:,} axes, not 1 to {MAX_AXES}")
        shape = struct.unpack(f"<{axes}Q", cursor.take(8 * axes, f"the shape of {shown}"))[::-1]
        if 0 in shape or math.prod(shape) >= 2**60:
            raise ValueError(f"{shown} has the shape {list(shape)}, not positive sizes of an array in memory")
        entry = _Entry(shape, cursor.number("<I", f"the type of {shown}"), cursor.number("<Q", f"{shown}"))
        name_of, kind = _NUMBERS.get(entry.kind, ("", None))
        if kind and shape[-1] % kind.entries:
            raise ValueError(f"{shown} has rows of {shape[-1]} entries, not a multiple of {kind.entries}, in {name_of}")
        entries[name] = entry
    alignment = _alignment(metadata)
    start = -(-cursor.position // alignment) * alignment
    return metadata, {name: entry._replace(offset=start + entry.offset) for name, entry in entries.items()}


def _alignment(metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {_SHORT.repr(alignment)}, not a power of two up to {1 << 20:,}")
    return alignment


def _check_offsets(entries: dict[str, _Entry], alignment: int, size: int) -> None:
    """Raises ValueError if tensors are not aligned, overlap, or are beyond the end of the file."""
    end, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        shown = _SHORT.repr(name)
        if entry.offset % alignment:
            raise ValueError(f"{shown} begins at byte {entry.offset:,}, not at a multiple of {alignment}")
        if entry.offset + entry.size > size:
            raise ValueError(f"{shown} ends at byte {entry.offset + entry.size:,}, beyond the file")
        if entry.offset < end:
            raise ValueError(f"{shown} begins at byte {entry.offset:,}, before the end of {before} at byte {end:,}")
        end, before = entry.offset + entry.size, shown


def _tensor(path: Path, file: mmap.mmap, name: str, entry: _Entry, last: list[Any]) -> Any:
    if entry.kind not in _NUMBERS:
        raise UserError(
            f"{path} has {_SHORT.repr(name)} in the type {_type_name(entry.kind)}, which is not supported; choose a "
            f"file in one of {', '.join(TYPES)}"
        )
    type_name, kind = _NUMBERS[entry.kind]
    if not kind.is_quantised:
        return Stored(file, entry.offset, entry.shape, kind.dtype)
    package()  # raises before anything is computed
    raw = Stored(file, entry.offset, (math.prod(entry.shape) // kind.entries, kind.size), np.dtype(np.uint8))
    return Computed(entry.shape, kind.dtype, lambda: _dequantize(raw, type_name, entry.shape), last)


def _dequantize(raw: Stored, name: str, shape: tuple[int, ...]) -> np.ndarray:
    gguf = package()
    kind = TYPES[name]
    array = np.empty((raw.shape[0], kind.entries), np.float32)
    step = max(1, _CHUNK // kind.size)
    with np.errstate(all="ignore"):  # a damaged scale can be infinite
        for start in range(0, raw.shape[0], step):
            blocks = raw[start : start + step]
            flat = gguf.quants.dequantize(blocks.reshape(1, -1), getattr(gguf.GGMLQuantizationType, name))
            array[start : start + step] = flat.reshape(-1, kind.entries)
    return array.reshape(shape)


def _type_name(number: int) -> str:
    try:
        return package().GGMLQuantizationType(number).name
    except (UserError, ValueError):
        return f"number {number}"


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is a file with the suffix or the first bytes of GGUF."""
    if not os.path.isfile(path):
        return False
    if str(path).lower().endswith(SUFFIX):
        return True
    with open_file(Path(path)) as file:
        return file.read(4) == MAGIC


def only_gguf(where: object, names: Iterable[str], remedy: str = "give the path of one of them") -> UserError | None:
    """Returns the error for a folder or repository whose only weights are GGUF files, or None if it has none.

    Args:
      where: the folder or repository, for the message.
      names: the names of its files.
      remedy: the end of the message.
    """
    found = sorted(name for name in names if name.lower().endswith(SUFFIX))
    if not found:
        return None
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return UserError(f"{where} has only GGUF files ({', '.join(found[:5])}{more}) as weights; {remedy}")
