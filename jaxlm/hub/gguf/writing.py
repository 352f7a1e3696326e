"""Writing GGUF files: one tensor at a time is converted, quantised and written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from jaxlm.hub.gguf.container import TYPES, package
from jaxlm.hub.safetensors import Pending
from jaxlm.storage import disk

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # general.file_type
_VOCABULARY = ("token_embd.weight", "output.weight")  # as llama.cpp, with at least 8 bits
QUANTISATION_VERSION = 2  # of the formats of blocks


def type_of(name: str, shape: tuple[int, ...], requested: str) -> str:
    """Returns the type of a tensor in a file.

    Vectors and norms are float32, as llama.cpp requires. Token embeddings have at least 8 bits. Matrices whose rows are
    not a multiple of a block are float16.

    Args:
      name: the name in the file.
      shape: the shape.
      requested: the type of the file.
    """
    if len(shape) == 1:
        return "F32"
    if requested == "Q4_0" and name in _VOCABULARY:
        requested = "Q8_0"
    return "F16" if shape[-1] % TYPES[requested].entries else requested


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Pending], dtype: str | None = None) -> None:
    """Writes a file atomically.

    Args:
      path: the file.
      metadata: values by key: bools, integers from 0, floats, strings, and lists of one of these.
      tensors: tensors by name.
      dtype: a key of `DTYPES`, for the matrices; None: the dtype of each tensor, float32, float16 or bfloat16.

    Raises:
      UserError: if the package gguf is not installed.
      OSError: if the file system fails.
    """
    gguf = package()
    types = {name: type_of(name, x.shape, DTYPES[dtype or x.dtype.name]) for name, x in tensors.items()}
    kinds = gguf.GGUFValueType
    of = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
    with disk.atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(None, str(metadata["general.architecture"]))
        for key, value in metadata.items():
            if key == "general.architecture":  # the writer adds it
                continue
            if isinstance(value, list):
                items = kinds.INT32 if isinstance(value[0], int) else of[type(value[0])]
                writer.add_key_value(key, value, kinds.ARRAY, items)
            else:
                writer.add_key_value(key, value, of[type(value)])
        wide = max(set(types.values()) - {"F32"}, key=list(types.values()).count, default="F32")
        writer.add_file_type(_FILE_TYPES[wide])
        if any(TYPES[kind].is_quantised for kind in types.values()):
            writer.add_quantization_version(QUANTISATION_VERSION)
        for name, tensor in tensors.items():
            kind = TYPES[types[name]]
            size = math.prod(tensor.shape) // kind.entries * kind.size
            number = gguf.GGMLQuantizationType(kind.number)
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, raw_dtype=number)
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in tensors.items():
                writer.write_tensor_data(encode(tensor.make(), types[name]))
        finally:
            writer.close()


def encode(array: Any, kind: str) -> np.ndarray:
    """Returns the bytes of a tensor in a type, as an array of bytes or of the type's dtype.

    Args:
      array: the tensor.
      kind: a key of `TYPES`.

    Raises:
      UserError: if it is not finite and the type cannot represent that.
    """
    array = np.asarray(array)
    if not TYPES[kind].is_quantised:
        encoded = np.ascontiguousarray(array.astype(TYPES[kind].dtype))
        return encoded.view(np.uint16) if kind == "BF16" else encoded
    exact = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(exact).all():
        raise UserError(f"a tensor has infinite or undefined entries, which {kind} cannot represent; write float32")
    gguf = package()
    return gguf.quants.quantize(exact, getattr(gguf.GGMLQuantizationType, kind))
