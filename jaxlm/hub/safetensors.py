"""Folders of safetensors files: read tensor by tensor, written in one file or in shards.

A file is the length of a JSON header (8 bytes, little-endian), the header (name -> dtype, shape, place), and the bytes
of the tensors, C order, without gaps: https://github.com/huggingface/safetensors#format.  Nothing in it can run code.
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
from jaxlm.hub.model_files import check_inside, opened
from jaxlm.storage import disk

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_PICKLED = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DTYPES = {  # in the order in which the format's own writer places them, last first: so all lie aligned
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
_JSON_LIMIT = 100_000_000  # bytes; the format's own limit for a header
_CHUNK = 1 << 22  # bytes: as fast as one read of the whole, measured, and little beside any model
_SHORT = reprlib.Repr()  # for values of files, which may be as long as the file
_SHORT.maxstring = _SHORT.maxother = 200


class Stored:
    """A tensor of a file, mapped into memory: its bytes are read where they are touched, and count until released."""

    def __init__(self, file: mmap.mmap, start: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self._file, self._start = file, start

    def view(self) -> np.ndarray:
        """All of it, read-only, as it lies in the file: transposing, splitting and indexing read nothing."""
        return np.ndarray(self.shape, self.dtype, self._file, self._start)

    def release(self) -> None:
        """Gives the memory of what was read back to the system, where it can; views stay valid and read anew."""
        self._release(0, math.prod(self.shape) * self.dtype.itemsize)

    def __getitem__(self, index: Any) -> np.ndarray:
        try:
            return np.array(self.view()[index])
        finally:
            self.release()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a stored tensor becomes an array by a copy; view() makes none")
        array = np.empty(self.shape, self.dtype)
        to, source = _bytes(array), _bytes(self.view())
        for start in range(0, source.size, _CHUNK):
            stop = min(start + _CHUNK, source.size)
            to[start:stop] = source[start:stop]
            self._release(start, stop)  # at once, or the tensor would be in memory twice
        return array if dtype is None else array.astype(dtype, copy=False)

    def _release(self, start: int, stop: int) -> None:
        if hasattr(mmap, "MADV_DONTNEED") and start < stop:
            start, stop = start + self._start, stop + self._start
            start -= start % mmap.PAGESIZE
            self._file.madvise(mmap.MADV_DONTNEED, start, stop - start)


class Pending(NamedTuple):
    """A tensor that is made when it is written, so that a model need not be in memory twice."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], Any]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read(folder: Path) -> Mapping[str, Stored]:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises UserError for a folder without safetensors (pickled weights are refused), a file that cannot be read or does
    not keep to the format in every point, and an index that does not tell the truth.
    """
    folder = Path(folder)
    if os.path.lexists(folder / WEIGHTS):
        return MappingProxyType(_open(folder / WEIGHTS))
    if not os.path.lexists(folder / INDEX):
        raise _no_weights(folder)
    files = index(folder)
    for file in sorted(set(files.values())):
        if not os.path.exists(folder / file):
            raise UserError(
                f"{folder / INDEX} names {_some([file])}, which is not in the folder; fetch the missing shard"
            )
    shards = {file: _open(folder / file) for file in sorted(set(files.values()))}
    wrong = {name for name, file in files.items() if name not in shards[file]}
    wrong |= {name for file, shard in shards.items() for name in shard if files.get(name) != file}
    if wrong:
        raise UserError(f"{folder / INDEX} and its shards disagree on where {_some(wrong)} is; fetch both again")
    return MappingProxyType({name: shards[file][name] for name, file in files.items()})


def index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a folder.  Raises UserError where it is none or leads elsewhere."""
    path = Path(folder) / INDEX
    with opened(path) as file:
        check_inside(path, path.parent)
        try:
            files = _json(file.read(_JSON_LIMIT)).get("weight_map")
            if not files or not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
                raise ValueError(f"weight_map is {_SHORT.repr(files)}")
        except (ValueError, RecursionError) as error:
            reason = f"is not an index with a 'weight_map' from tensors to files: {error}"
            raise UserError(f"{path} {reason}; fetch the file again") from error
    for name in sorted(set(files.values())):
        # By name, not by resolved path: the hub's cache keeps files as links that lead out of the folder.
        if Path(name).name != name or not name.endswith(".safetensors") or not name.isprintable():
            shown = _SHORT.repr(name)
            raise UserError(f"{path} names {shown}; a shard is a .safetensors file of the same folder: fix the index")
    return files


def pickled(where: object, names: Iterable[str]) -> UserError | None:
    """What to say of a folder or repository, without safetensors, if its files have weights in pickles."""
    names = list(names)
    found = {name for pattern in _PICKLED for name in fnmatch.filter(names, pattern)}
    if not found:
        return None
    return UserError(
        f"{where} has only pickled weights ({_some(found)}), which can run code when they are read; "
        f"get {WEIGHTS}: from the model's hub page, or where torch is installed and the source is trusted by "
        f"transformers' AutoModel.from_pretrained(folder).save_pretrained(folder)"
    )


def write(tensors: Mapping[str, np.ndarray | Pending], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes one file, which appears whole or not at all.  transformers wants to read `{"format": "pt"}` in it.

    Raises UserError for a dtype that the format does not know, and OSError as it comes, from a full disk perhaps.
    """
    with disk.atomic_file(path) as temporary:
        _save({name: _pending(name, tensor) for name, tensor in tensors.items()}, temporary, metadata)


def write_sharded(
    tensors: Mapping[str, np.ndarray | Pending], folder: Path, *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes `model.safetensors`, or where that would be larger than `max_shard_bytes` shards and their index, in place
    of whatever weights the folder had.

    Until all is written the folder stays as it was.  A tensor larger than the limit has a shard of its own.  Raises as
    `write` does.
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
                disk.flush(temporary)  # from here on the folder changes
            (folder / INDEX).unlink(missing_ok=True)  # first: no index may join shards of two models
    for path in folder.iterdir():
        if path not in paths and (path.name in (WEIGHTS, INDEX) or _SHARD.fullmatch(path.name)):
            path.unlink()


def _no_weights(folder: Path) -> UserError:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        there = "no such folder"
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        there = str(error)
    else:
        if refused := pickled(folder, names):
            return refused
        there = _some(names) or "it is empty"
    return UserError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX} ({there}); add them")


def _open(path: Path) -> dict[str, Stored]:
    """The tensors of a file, in its order, once all that its header says is known to be true."""
    with opened(path) as file:
        check_inside(path, path.parent)
        size = os.fstat(file.fileno()).st_size
        try:
            places = _places(path, file, size)
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            reason = f"is truncated or corrupt: {error}"
            raise UserError(f"{path} ({size:,} bytes) {reason}; fetch the file again") from error
    return {name: Stored(mapped, begin, shape, dtype) for name, (begin, _, shape, dtype) in places.items()}


class _Place(NamedTuple):
    """Of a tensor in its file: the bytes from `begin` to `end` are an array of this shape and dtype."""

    begin: int
    end: int
    shape: tuple[int, ...]
    dtype: np.dtype


def _places(path: Path, file: BinaryIO, size: int) -> dict[str, _Place]:
    """From the header, all of it checked.  Raises ValueError, and RecursionError where its JSON is too deep."""
    length = int.from_bytes(file.read(8), "little")
    if length > (most := min(max(size - 8, 0), _JSON_LIMIT)):
        raise ValueError(f"its header would have {length:,} bytes, of at most {most:,}")
    header = _json(file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"__metadata__ is {_SHORT.repr(metadata)}, not strings by name")
    places = {name: _place(path, name, entry, 8 + length) for name, entry in header.items()}
    places = dict(sorted(places.items(), key=lambda item: item[1][:2]))
    end = 8 + length
    for name, place in places.items():
        if place.begin != end:
            raise ValueError(f"{_SHORT.repr(name)} begins at byte {place.begin:,} of the file, not at {end:,}")
        end = place.end
    if end != size:
        raise ValueError(f"its tensors end at byte {end:,} of the file")
    return places


def _place(path: Path, name: str, entry: Any, start: int) -> _Place:
    """From a tensor's entry in the header; its offsets count from `start`."""
    shown = _SHORT.repr(name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown} is {_SHORT.repr(entry)}, not dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        known = f"known: {', '.join(_DTYPES)}; convert it to one of them where the file was made"
        raise UserError(f"{path} has {shown} in dtype {_SHORT.repr(code)}; {known}")
    width = _DTYPES[code].itemsize
    # numpy's limits, before the product: one of many large numbers takes forever.
    if not _counts(shape) or len(shape) > 64 or math.prod(n or 1 for n in shape) * width >= 2**63:
        raise ValueError(f"{shown} has shape {_SHORT.repr(shape)}, not the sizes of at most 64 axes in memory")
    if not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{shown} has data_offsets {_SHORT.repr(offsets)}, not a begin and an end")
    begin, end = offsets
    if end - begin != math.prod(shape) * width:
        raise ValueError(f"{shown} has {end - begin:,} bytes, {code} {shape} takes {math.prod(shape) * width:,}")
    return _Place(start + begin, start + end, tuple(shape), _DTYPES[code])


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _json(text: bytes) -> dict[str, Any]:
    """The object.  Raises ValueError, and RecursionError where it is too deep."""
    values = json.loads(text.decode(), object_pairs_hook=_unique)
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}, not an object")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict[str, Any]()
    for key, value in pairs:
        key.encode()  # raises for half a surrogate pair, which JSON can write and nothing can print
        if key in values:
            raise ValueError(f"{_SHORT.repr(key)} stands there twice")
        values[key] = value
    return values


def _pending(name: str, tensor: np.ndarray | Pending) -> Pending:
    pending = tensor if isinstance(tensor, Pending) else Pending(tensor.shape, tensor.dtype, lambda: tensor)
    pending = pending._replace(dtype=np.dtype(pending.dtype))
    if pending.dtype not in _CODES:
        raise UserError(f"{name} has dtype {pending.dtype}, which safetensors has not; known: {', '.join(_DTYPES)}")
    return pending


def _split(tensors: Mapping[str, Pending], limit: int) -> list[dict[str, Pending]]:
    """In their order, as many in each shard as it holds: the same shards as transformers makes."""
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
    places = {code: place for place, code in enumerate(_DTYPES)}
    order = sorted(tensors, key=lambda name: (-places[_CODES[tensors[name].dtype]], name))
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
            file.write(_bytes(_made(name, tensors[name])))  # no name for it here: it goes before the next is made


def _made(name: str, tensor: Pending) -> np.ndarray:
    array = np.asarray(tensor.make(), order="C")
    if (array.shape, array.dtype) != (tuple(tensor.shape), tensor.dtype):
        raise ValueError(f"{name} is {array.dtype} {array.shape}, was to be {tensor.dtype} {tensor.shape}")
    return array


def _bytes(array: np.ndarray) -> Any:
    """The memory of a C-contiguous array."""
    return array.reshape(-1).view(np.uint8)


def _some(names: Iterable[str], most: int = 8) -> str:
    names = sorted(names)
    return ", ".join(name[:200] for name in names[:most]) + (
        f" and {len(names) - most:,} more" if len(names) > most else ""
    )
