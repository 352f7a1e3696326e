"""Files of token ids: text that another program has tokenized.

npy    an array of one axis of unsigned or signed integers
other  16-bit unsigned integers, as nanoGPT writes them; after the header of 1,024 bytes that llm.c writes, if the
       file has it
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxlm.errors import UserError

_HEADER = 1024  # bytes: 256 integers of 32 bits; the first three are the next two and the number of tokens
_MAGIC, _VERSION = 20240520, 1


def read(file: Path) -> np.ndarray:
    """Returns the token ids of a file, which are read where they are used.

    Raises:
      UserError: the file is not one of token ids, or is incomplete.
    """
    try:
        if file.suffix == ".npy":
            found = np.load(file, mmap_mode="r")
        else:
            found = _read_binary(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a file of token ids: {error}; write one with numpy.save(FILE, ids)") from None
    if found.ndim != 1 or found.dtype.kind not in "iu":
        shape = " x ".join(map(str, found.shape)) or "a single value"
        raise UserError(f"{file} holds {found.dtype} ({shape}); token ids are integers on one axis")
    return found


def _read_binary(file: Path) -> np.ndarray:
    size = file.stat().st_size
    if size % 2:
        raise ValueError(f"it has {size:,} bytes, and each id has two")
    if not size:
        return np.zeros(0, np.uint16)
    magic, version, announced = np.fromfile(file, np.int32, 3).tolist() if size >= _HEADER else (0, 0, 0)
    if magic != _MAGIC:
        return np.memmap(file, np.uint16, "r")
    count = (size - _HEADER) // 2
    if version != _VERSION or announced != count:
        raise ValueError(f"its header announces version {version} and {announced:,} ids, and it has {count:,}")
    return np.memmap(file, np.uint16, "r", offset=_HEADER)
