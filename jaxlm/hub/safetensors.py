"""Folders of safetensors files: read lazily, whole or in shards; written whole.  Nothing here can run foreign code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxlm.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class LazyArray:
    """A tensor of a file that is read where it is indexed or made an array; `np.asarray` reads all of it."""

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name
        self.shape: tuple[int, ...] = tuple(file.get_slice(name).get_shape())

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._file.get_slice(self._name)[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self._file.get_tensor(self._name)
        return array if dtype is None else array.astype(dtype)


def read(folder: Path) -> Mapping[str, LazyArray]:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises UserError for a folder without safetensors (pickled weights are refused), a corrupt file, and an index that
    does not tell the truth.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return MappingProxyType(_open(folder / WEIGHTS))
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    files = _index(folder)
    shards = {file: _open(folder / file) for file in sorted(set(files.values()))}
    tensors = {name: array for shard in shards.values() for name, array in shard.items()}
    wrong = sorted(name for name in files.keys() | tensors.keys() if name not in shards.get(files.get(name, ""), {}))
    if wrong:
        raise UserError(f"{folder / INDEX} and its shards disagree on where {', '.join(wrong)} is; fetch both again")
    return MappingProxyType(tensors)


def write(tensors: dict[str, np.ndarray], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes one file, which appears whole or not at all.  transformers wants to read `{"format": "pt"}` in it."""
    from safetensors.numpy import save_file

    # The package writes the memory behind an array as it lies, so that a transposed view would be saved wrongly.
    contiguous = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(contiguous, temporary, metadata={"format": "pt"} if metadata is None else dict(metadata))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _open(path: Path) -> dict[str, LazyArray]:
    import ml_dtypes  # noqa: F401  numpy learns bfloat16 by this import
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="numpy")
        names = file.keys()
        return {name: LazyArray(file, name) for name in names}
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise UserError(f"{path} ({size:,} bytes) is truncated or corrupt: {error}; fetch the file again") from error


def _index(folder: Path) -> dict[str, str]:
    """Tensor name -> shard file, from the index."""
    path = folder / INDEX
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        entries = sorted(set(files.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not an index with a 'weight_map': {error!r}; fetch the file again") from error
    for file in entries:
        # By name, not by resolved path: the hub's cache keeps files as links that lead out of the folder.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{path} names {file!r}; a shard is a .safetensors file of the same folder: mend the index")
        if not (folder / file).is_file():
            raise UserError(f"{path} names {file}, which is not in the folder; fetch the missing shard")
    return files


def _no_weights(folder: Path) -> UserError:
    pickled = sorted({path.name for pattern in _PICKLED for path in folder.glob(pattern)})
    if pickled:
        return UserError(
            f"{folder} has only pickled weights ({', '.join(pickled)}), which can run code when they are read; "
            f"get {WEIGHTS}: from the model's hub page, or where torch is installed and the source is trusted by "
            f"transformers' AutoModel.from_pretrained(folder).save_pretrained(folder)"
        )
    there = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
    return UserError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX} ({there or 'it is empty'}); add them")
