"""Folders of safetensors files: read tensor by tensor, written as one file or as shards.

A file consists of the length of a JSON header (8 bytes, little-endian), the header (name -> dtype, shape, offsets), and
the bytes of the tensors in C order without gaps: https://github.com/huggingface/safetensors#format. It has no code.
"""

from __future__ import annotations

import fnmatch
import json
import math
import mmap
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jaxlm.errors import UserError
from jaxlm.hub.model_files import check_inside, open_file
from jaxlm.storage import disk

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_PICKLED = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DTYPES = {  # files store tensors in the reverse of this order, as the reference writer does, so that all are aligned
    "BOOL": np.dtype(np.bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "C64": np.dtype(np.complex64),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_JSON_LIMIT = 100_000_000  # bytes; the format's limit for a header
_CHUNK = 1 << 22  # bytes; measured to be as fast as one large read
_SHORT = reprlib.Repr()  # for values from files, which can be as long as the file
_SHORT.maxstring = _SHORT.maxother = 200


class Stored:
    """A memory-mapped tensor of a file. Its bytes are read on access, and stay in memory until released."""

    def __init__(self, file: mmap.mmap, start: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self._file, self._start = file, start

    def view(self) -> np.ndarray:
        """Returns a read-only view of the tensor; transposing, splitting and indexing it read no bytes."""
        return np.ndarray(self.shape, self.dtype, self._file, self._start)

    def release(self) -> None:
        """Frees the memory of the bytes that were read, if the system supports it. Views stay valid."""
        self._release(0, math.prod(self.shape) * self.dtype.itemsize)

    def __getitem__(self, index: Any) -> np.ndarray:
        try:
            return np.array(self.view()[index])
        finally:
            self.release()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("converting a stored tensor to an array copies it; use view() to avoid a copy")
        array = np.empty(self.shape, self.dtype)
        to, source = _bytes(array), _bytes(self.view())
        for start in range(0, source.size, _CHUNK):
            stop = min(start + _CHUNK, source.size)
            to[start:stop] = source[start:stop]
            self._release(start, stop)  # immediately, so that the tensor is not in memory twice
        return array if dtype is None else array.astype(dtype, copy=False)

    def _release(self, start: int, stop: int) -> None:
        if hasattr(mmap, "MADV_DONTNEED") and start < stop:
            start, stop = start + self._start, stop + self._start
            start -= start % mmap.PAGESIZE
            self._file.madvise(mmap.MADV_DONTNEED, start, stop - start)


class Pending(NamedTuple):
    """A tensor that is computed when it is written, so that a model is not in memory twice."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], Any]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read(folder: Path) -> Mapping[str, Stored]:
    """Returns the tensors of `model.safetensors`, or of the shards in `model.safetensors.index.json`, by name.

    Raises:
      UserError: if the folder has no safetensors files (pickled weights are refused), if a file cannot be read or
        violates the format, or if the index does not match the shards.
    """
    folder = Path(folder)
    if os.path.lexists(folder / WEIGHTS):
        return MappingProxyType(read_file(folder / WEIGHTS))
    if not os.path.lexists(folder / INDEX):
        raise _no_weights(folder)
    files = index(folder)
    for file in sorted(set(files.values())):
        if not os.path.exists(folder / file):
            raise UserError(
                f"{folder / INDEX} lists {_list([file])}, which is not in the folder; download the missing shard"
            )
    shards = {file: read_file(folder / file) for file in sorted(set(files.values()))}
    wrong = {name for name, file in files.items() if name not in shards[file]}
    wrong |= {name for file, shard in shards.items() for name in shard if files.get(name) != file}
    if wrong:
        raise UserError(
            f"{folder / INDEX} and its shards disagree about the file of {_list(wrong)}; download both again"
        )
    return MappingProxyType({name: shards[file][name] for name, file in files.items()})


def index(folder: Path) -> dict[str, str]:
    """Returns tensor name -> file name from the index of a folder; raises UserError if the index is invalid."""
    path = Path(folder) / INDEX
    with open_file(path) as file:
        check_inside(path, path.parent)
        try:
            files = _json(file.read(_JSON_LIMIT)).get("weight_map")
            if not files or not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
                raise ValueError(f"weight_map is {_SHORT.repr(files)}")
        except (ValueError, RecursionError) as error:
            reason = f"is not an index with a 'weight_map' from tensors to files: {error}"
            raise UserError(f"{path} {reason}; download the file again") from error
    for name in sorted(set(files.values())):
        # The check uses names, not resolved paths: files in the hub's cache are links to files outside the folder.
        if Path(name).name != name or not name.endswith(".safetensors") or not name.isprintable():
            shown = _SHORT.repr(name)
            raise UserError(f"{path} lists {shown}; a shard is a .safetensors file of the same folder: fix the index")
    return files


def pickle_error(where: object, names: Iterable[str]) -> UserError | None:
    """Returns the error for a folder or repository that has only pickled weights, or None if it has none.

    Args:
      where: the folder or repository, for the message.
      names: the names of its files.
    """
    names = list(names)
    matches = {name for pattern in _PICKLED for name in fnmatch.filter(names, pattern)}
    if not matches:
        return None
    return UserError(
        f"{where} has only pickled weights ({_list(matches)}), which can run code when they are read; "
        f"get {WEIGHTS}: from the model's hub page, or, if torch is installed and you trust the source, with "
        f"transformers' AutoModel.from_pretrained(folder).save_pretrained(folder)"
    )


def write(tensors: Mapping[str, np.ndarray | Pending], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes one file atomically.

    Args:
      tensors: tensors by name.
      path: the file.
      metadata: metadata of the header; None: `{"format": "pt"}`, which transformers requires.

    Raises:
      UserError: if the format does not support the dtype of a tensor.
      OSError: if the file system fails.
    """
    with disk.atomic_file(path) as temporary:
        _save({name: _pending(name, tensor) for name, tensor in tensors.items()}, temporary, metadata)


def write_sharded(
    tensors: Mapping[str, np.ndarray | Pending], folder: Path, *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes `model.safetensors`, or shards and their index, and removes other weights from the folder.

    The folder changes only after all files are written.

    Args:
      tensors: tensors by name.
      folder: the folder, which must exist.
      max_shard_bytes: maximum size of a file; a tensor that is larger gets its own shard.

    Raises:
      UserError: if the format does not support the dtype of a tensor.
      OSError: if the file system fails.
    """
    pending = {name: _pending(name, tensor) for name, tensor in sorted(tensors.items())}
    shards = _split(pending, max_shard_bytes)
    one = len(shards) == 1
    names = [WEIGHTS] if one else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    paths = [folder / name for name in names] + ([] if one else [folder / INDEX])
    with ExitStack() as stack:
        temporaries = [stack.enter_context(disk.atomic_file(path)) for path in reversed(paths)][::-1]
        for shard, temporary in zip(shards, temporaries):
            _save(shard, temporary)
        if not one:
            values = {
                "metadata": {"total_size": sum(tensor.size for tensor in pending.values())},
                "weight_map": {name: file for file, shard in zip(names, shards) for name in shard},
            }
            with open(temporaries[-1], "wb") as file:
                file.write((json.dumps(values, indent=2, sort_keys=True) + "\n").encode())
            for temporary in temporaries:
                disk.flush(temporary)
            # The folder changes from here on. The old index goes first: it must never refer to new shards.
            (folder / INDEX).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path not in paths and (path.name in (WEIGHTS, INDEX) or _SHARD.fullmatch(path.name)):
            path.unlink()


def _no_weights(folder: Path) -> UserError:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        content = "no such folder"
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        content = str(error)
    else:
        if refusal := pickle_error(folder, names):
            return refusal
        content = _list(names) or "it is empty"
    return UserError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX} ({content}); add them")


def read_file(path: Path) -> dict[str, Stored]:
    """Returns the tensors of a file, in its order, after a check of the complete header."""
    with open_file(path) as file:
        check_inside(path, path.parent)
        size = os.fstat(file.fileno()).st_size
        try:
            entries = _entries(path, file, size)
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            reason = f"is truncated or corrupt: {error}"
            raise UserError(f"{path} ({size:,} bytes) {reason}; download the file again") from error
    return {name: Stored(mapped, begin, shape, dtype) for name, (begin, _, shape, dtype) in entries.items()}


class _Entry(NamedTuple):
    """The entry of a tensor: the bytes [begin, end) of the file are an array of this shape and dtype."""

    begin: int
    end: int
    shape: tuple[int, ...]
    dtype: np.dtype


def _entries(path: Path, file: BinaryIO, size: int) -> dict[str, _Entry]:
    """Returns the entries of a header; raises ValueError if it is invalid, RecursionError if it is nested too deep."""
    length = int.from_bytes(file.read(8), "little")
    if length > (limit := min(max(size - 8, 0), _JSON_LIMIT)):
        raise ValueError(f"its header has a length of {length:,} bytes, more than {limit:,}")
    header = _json(file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"__metadata__ is {_SHORT.repr(metadata)}, not an object of strings")
    entries = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: item[1][:2]))
    end = 8 + length
    for name, entry in entries.items():
        if entry.begin != end:
            raise ValueError(f"{_SHORT.repr(name)} begins at byte {entry.begin:,} of the file, not at {end:,}")
        end = entry.end
    if end != size:
        raise ValueError(f"its tensors end at byte {end:,} of the file")
    return entries


def _entry(path: Path, name: str, entry: Any, start: int) -> _Entry:
    """Returns the checked entry of a tensor in the header; its offsets are relative to `start`."""
    shown = _SHORT.repr(name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown} is {_SHORT.repr(entry)}, not dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        known = f"known: {', '.join(_DTYPES)}; convert the file to one of them"
        raise UserError(f"{path} has {shown} in dtype {_SHORT.repr(code)}; {known}")
    width = _DTYPES[code].itemsize
    # The limits of NumPy are checked before the product, which can take forever for many large numbers.
    if not _are_sizes(shape) or len(shape) > 64 or math.prod(n or 1 for n in shape) * width >= 2**63:
        raise ValueError(f"{shown} has shape {_SHORT.repr(shape)}, not the sizes of at most 64 axes in memory")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{shown} has data_offsets {_SHORT.repr(offsets)}, not a begin and an end")
    begin, end = offsets
    if end - begin != math.prod(shape) * width:
        raise ValueError(f"{shown} has {end - begin:,} bytes, {code} {shape} requires {math.prod(shape) * width:,}")
    return _Entry(start + begin, start + end, tuple(shape), _DTYPES[code])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _json(text: bytes) -> dict[str, Any]:
    """Parses an object; raises ValueError if it is invalid, RecursionError if it is nested too deep."""
    values = json.loads(text.decode(), object_pairs_hook=_unique)
    if not isinstance(values, dict):
        raise ValueError(f"it contains a {type(values).__name__}, not an object")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict[str, Any]()
    for key, value in pairs:
        key.encode()  # raises for an unpaired surrogate, which JSON can contain but which cannot be printed
        if key in values:
            raise ValueError(f"it contains {_SHORT.repr(key)} twice")
        values[key] = value
    return values


def _pending(name: str, tensor: np.ndarray | Pending) -> Pending:
    pending = tensor if isinstance(tensor, Pending) else Pending(tensor.shape, tensor.dtype, lambda: tensor)
    pending = pending._replace(dtype=np.dtype(pending.dtype))
    if pending.dtype not in _CODES:
        raise UserError(
            f"{name} has dtype {pending.dtype}, which safetensors does not support; known: {', '.join(_DTYPES)}"
        )
    return pending


def _split(tensors: Mapping[str, Pending], limit: int) -> list[dict[str, Pending]]:
    """Fills shards with tensors in order, which gives the same shards as transformers."""
    shards, open_shard, size = list[dict[str, Pending]](), dict[str, Pending](), 0
    for name, tensor in tensors.items():
        if tensor.size > limit:
            shards.append({name: tensor})
            continue
        if size + tensor.size > limit:
            shards.append(open_shard)
            open_shard, size = {}, 0
        open_shard[name] = tensor
        size += tensor.size
    return [*shards, open_shard] if open_shard or not shards else shards


def _save(tensors: Mapping[str, Pending], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    ranks = {code: rank for rank, code in enumerate(_DTYPES)}
    order = sorted(tensors, key=lambda name: (-ranks[_CODES[tensors[name].dtype]], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else dict(metadata)}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].size
        shape, code = list(tensors[name].shape), _CODES[tensors[name].dtype]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(
                _bytes(_compute(name, tensors[name]))
            )  # without a variable, so that it is freed before the next one


def _compute(name: str, tensor: Pending) -> np.ndarray:
    array = np.asarray(tensor.make(), order="C")
    if (array.shape, array.dtype) != (tuple(tensor.shape), tensor.dtype):
        raise ValueError(f"{name} is {array.dtype} {array.shape}, expected {tensor.dtype} {tensor.shape}")
    return array


def _bytes(array: np.ndarray) -> Any:
    """Returns the memory of a C-contiguous array."""
    return array.reshape(-1).view(np.uint8)


def _list(names: Iterable[str], limit: int = 8) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(name[:200] for name in names[:limit]) + more
