"""A GGUF file as a folder in Hugging Face format, which the rest of the library reads.

The folder is in the cache. It contains config.json, generation_config.json, the files of the tokenizer, and a link to
the GGUF file, from which `tensors` reads the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError
from jaxlm.hub.gguf import container, tables, vocabulary
from jaxlm.storage import disk

_FORMAT = 1  # changes if other files are written for the same GGUF file
_LINKS = "gguf"  # subfolder with the links to the files


def open_file(path: str | os.PathLike[str]) -> Path:
    """Returns the folder for a GGUF file, and writes it unless it is in the cache.

    Args:
      path: the file; of a model in several files, the first one.

    Raises:
      UserError: if the file is damaged, or contains a model or a tokenizer that is not supported.
    """
    path = Path(os.path.abspath(path))  # without following links, because the cache of the hub has links to other names
    files = container.parts(path)
    folder = _cache() / f"{_key(files)}-{os.fsdecode(os.fsencode(path.stem)[:100])}"
    if folder.is_dir():
        return folder
    content = container.read(path)
    values, _ = tables.to_hf(content)
    rows = values["vocab_size"]
    small = vocabulary.read(content.metadata, str(path), rows)
    small["config.json"] = _dump(values)
    small["generation_config.json"] = _dump(tables.generation(content.metadata, str(path), rows))
    try:
        with disk.atomic_folder(folder) as part:
            for name, text in small.items():
                (part / name).write_bytes(text)
            (part / _LINKS).mkdir()
            for file in files:
                (part / _LINKS / file.name).symlink_to(file)
    except UserError:
        if not folder.is_dir():  # else another process has written it in the meantime
            raise
    except OSError as error:
        raise disk.write_error(folder, error, "cache with JAXLM_CACHE") from None
    return folder


def tensors(folder: Path) -> Mapping[str, Any] | None:
    """Returns the tensors of the GGUF file of a folder that `open_file` returned; None for other folders."""
    if folder.parent != _cache() or not (folder / _LINKS).is_dir():
        return None
    first = min((folder / _LINKS).iterdir())
    return tables.to_hf(container.read(first))[1]


def _cache() -> Path:
    return disk.cache_folder() / "gguf"


def _key(files: list[Path]) -> str:
    """Returns a hash that changes if the files do."""
    digest = hashlib.sha256(str(_FORMAT).encode())
    for file in files:
        try:
            state = os.stat(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({error}); correct that, or download the file again") from None
        digest.update(f"{file}\0{state.st_size}\0{state.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _dump(values: Any) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
