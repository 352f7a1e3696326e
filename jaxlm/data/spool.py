"""Documents in one file, so that several passes over them read, decompress, parse and clean the data once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from jaxlm.storage import disk

_FACTS = "facts.json"  # written last: without it, a folder is incomplete


class Spool:
    """The documents in a folder.

    Attributes:
      rows: number of rows of the data, and of the changes of each cleaning step.
      bytes: size of the documents in UTF-8.
    """

    def __init__(self, folder: Path):
        """Opens a folder that `write` has completed."""
        facts = json.loads((folder / _FACTS).read_text())
        self.rows: dict[str, int] = facts["rows"]
        self.bytes: int = facts["bytes"]
        self._folder = folder

    def __iter__(self) -> Iterator[str]:
        """Yields the documents in order."""
        sizes = np.fromfile(self._folder / "sizes.bin", np.int64)
        with open(self._folder / "texts.bin", "rb") as file:
            for size in sizes.tolist():
                yield file.read(size).decode()


def write(folder: Path, documents: Callable[[Counter], Iterator[str]]) -> Spool:
    """Writes documents into a folder, unless an earlier call has completed it.

    Args:
      folder: the folder.
      documents: yields the documents, and counts the rows and the changes of each cleaning step in its argument.
    """
    if not (folder / _FACTS).exists():
        rows, total = Counter[str](), 0
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "texts.bin", "wb") as texts, open(folder / "sizes.bin", "wb") as sizes:
            for text in documents(rows):
                content = text.encode()
                texts.write(content)
                sizes.write(np.int64(len(content)).tobytes())
                total += len(content)
        disk.write(folder / _FACTS, json.dumps({"rows": rows, "bytes": total}))
    return Spool(folder)
