"""Arrays of examples on disk, such as the predictions of a teacher, by the content of each example.

The key of an example is a hash of its tokens. So a cache serves any order of the data, any packing and any seed, and
data to which examples were added. It is a folder with cache.json, which describes what the arrays depend on, and with
parts in safetensors format. The name of a part is a hash of its content.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config import difference
from jaxlm.data.batches import Epoch, Examples
from jaxlm.data.joined import Features, Joined, axes_of, is_per_token, offsets, ranges
from jaxlm.errors import RunError, UserError
from jaxlm.hub import model_files, safetensors
from jaxlm.storage import disk

FACTS = "cache.json"  # what the arrays depend on
# A part is written when it has this size, or after a minute or a twentieth of the time so far, so that a killed process
# loses no more. There are few parts, because each takes a file descriptor.
MAX_PART_BYTES, MAX_PART_SECONDS, MAX_PART_SHARE = 1 << 29, 60.0, 0.05
_PART = re.compile(r"[0-9a-f]{32}\.safetensors")
_KEYS, _TOKENS = "keys", "tokens"  # tensors of a part: [examples, 2], and rows [examples] of arrays per token
_FLAG = "--distill.cache"
FIELD = "cached_"  # before the name of an array, in the name of its field of a batch


class ExampleArray(NamedTuple):
    """The sizes of the axes of an array after the first two, and its dtype."""

    tail: tuple[int, ...]
    dtype: np.dtype


class ExtendedExamples:
    """Examples with further features, which are computed from the others; everything else is as in the examples.

    Attributes:
      given: the examples without these features.
    """

    def __init__(self, given: Examples, arrays: Mapping[str, ExampleArray], compute: Callable[[Joined], Features]):
        self.given, self._compute, self.labels = given, compute, given.labels
        self.fields: Mapping[str, Any] = {**given.fields, **{name: array.dtype for name, array in arrays.items()}}
        self.axes: dict[str, int] = dict(getattr(given, "axes", {}))
        for name, array in arrays.items():
            self.axes |= zip(axes_of(name)[2:], array.tail, strict=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["given"], name)

    def epoch(self, n: int | None) -> Epoch:
        """Returns the units of epoch n with the further features."""
        epoch = self.given.epoch(n)
        return epoch._replace(features=partial(self._features, epoch.features))

    def _features(self, features: Callable[[np.ndarray], Joined], units: np.ndarray) -> Joined:
        joined = features(units)
        return joined._replace(features=joined.features | self._compute(joined))


def keys_of(joined: Joined) -> np.ndarray:
    """Returns a hash of each example [X, 2] uint64: of all features per token except labels.

    Of the weights of tokens, only whether they are 0 matters.
    """
    bounds = {"T": offsets(joined.lengths)}
    if joined.source_lengths is not None:
        bounds["S"] = offsets(joined.source_lengths)
    parts = []
    for name in sorted(joined.features):
        if is_per_token(name) and name != "labels_BT":
            values = is_weighted(joined) if name == "weights_BT" else np.asarray(joined.features[name])
            data = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
            parts.append((name.encode(), data, bounds[axes_of(name)[1]]))
    digests = bytearray()
    for x in range(len(joined.lengths)):
        digest = hashlib.blake2b(digest_size=16)
        for name_bytes, data, starts in parts:
            a, b = starts[x], starts[x + 1]
            digest.update(b"%b %d " % (name_bytes, b - a))
            digest.update(data[a:b].data)
        digests += digest.digest()
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)


def is_weighted(joined: Joined) -> np.ndarray:
    """Returns whether a loss reads the prediction at each token of examples, bool [sum of the lengths]."""
    weights = joined.features.get("weights_BT")
    return np.ones(joined.lengths.sum(), bool) if weights is None else np.asarray(weights) > 0


class ExampleCache:
    """Arrays of examples in a folder.

    Arrays per token have one row for each token with a weight; other arrays have one row for each example.
    """

    def __init__(self, folder: str):
        """Names the folder, which `open` reads."""
        self.folder = disk.local(folder, "distill.cache")
        self.arrays: dict[str, ExampleArray] = {}
        self._pending: list[dict[str, np.ndarray]] = []  # examples that are not on disk yet
        self._pending_bytes, self._opened = 0, time.monotonic()
        self._flushed = self._opened
        self._clear()

    def open(self, arrays: Mapping[str, ExampleArray], facts: dict[str, Any], log: Callable[[str], None]) -> list[str]:
        """Opens the folder, or creates it, and returns the names of its parts.

        Args:
          arrays: the arrays, by names that end in their axes.
          facts: everything else that the values depend on, as JSON values.
          log: prints a line about each damaged part, whose examples count as missing.

        Raises:
          UserError: if the folder cannot be read or written, or contains something else.
        """
        self.arrays = dict(arrays)
        own = facts | {"arrays": {name: [array.dtype.name, *array.tail] for name, array in arrays.items()}}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            names = {name for name in os.listdir(self.folder) if not disk.is_temporary(name)}
            if not names:
                disk.write(self.folder / FACTS, json.dumps(own, indent=2) + "\n")
        except OSError as error:
            raise disk.write_error(self.folder, error, _FLAG) from None
        if names and FACTS not in names:
            raise UserError(f"{self.folder} is not empty and contains no cache of predictions; choose another {_FLAG}")
        stored = model_files.read_object(self.folder / FACTS)
        if differences := difference(own, stored):
            lines = "\n".join(f"  {line}" for line in differences)
            raise UserError(
                f"the cache in {self.folder} contains other predictions; they depend on (this run | the cache):\n"
                f"{lines}\nchoose another {_FLAG}, or delete the folder"
            )
        return self.reload(log)

    def open_as(self, arrays: Mapping[str, ExampleArray], names: Sequence[str], log: Callable[[str], None]) -> None:
        """Opens the folder with the parts that `open` found on another host, even if a run has added others since."""
        self.arrays = dict(arrays)
        self.reload(log, names)

    def reload(self, log: Callable[[str], None], names: Sequence[str] | None = None) -> list[str]:
        """Reads the index of the named parts, by default of all, removes damaged ones, and returns the names."""
        self._clear()
        found = []
        for name in sorted(filter(_PART.fullmatch, os.listdir(self.folder))) if names is None else names:
            file = self.folder / name
            part, damage = self._read_part(file)
            if damage:
                log(f"{file} is damaged ({damage}); its examples are computed again")
                file.unlink(missing_ok=True)
            else:
                self._add_part(file, part)
                found.append(name)
        self._sort()
        return found

    def contains(self, keys_X2: np.ndarray) -> np.ndarray:
        """Returns for each key whether its example is in the cache, or was added."""
        found = self._find(keys_X2) >= 0
        if self._added:
            found |= np.array([key.tobytes() in self._added for key in keys_X2], bool)
        return found

    def features(self, joined: Joined) -> Features:
        """Returns the arrays of examples, as features `cached_NAME`, which are 0 for tokens without a weight.

        Raises:
          RunError: if an example is missing.
        """
        tokens_X, stored = self._read(keys_of(joined))
        weighted = is_weighted(joined)
        assert tokens_X.sum() == weighted.sum()  # the weights are a part of the key
        features: Features = {}
        for name, rows in stored.items():
            if is_per_token(name):
                full = np.zeros((len(weighted), *rows.shape[1:]), rows.dtype)
                full[weighted] = rows
                rows = full
            features[f"{FIELD}{name}"] = rows
        return features

    def _read(self, keys_X2: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns the number of stored tokens of each example, and the rows of each array."""
        entry_X = self._find(keys_X2)
        if missing := int((entry_X < 0).sum()):
            raise RunError(
                f"{missing} examples of a batch are missing in the cache in {self.folder}, which was changed in the "
                f"meantime, or is not the same folder on all hosts; start the same command again"
            )
        tokens_X, part_X = self._tokens[entry_X], self._part[entry_X]
        to = offsets(tokens_X)
        arrays = {
            name: np.empty((to[-1] if is_per_token(name) else len(entry_X), *array.tail), array.dtype)
            for name, array in self.arrays.items()
        }
        for p in np.unique(part_X):
            x = np.flatnonzero(part_X == p)
            target, source = (ranges(start, tokens_X[x]) for start in (to[x], self._start[entry_X[x]]))
            for name, rows in arrays.items():
                values = self._parts[p][name].view()
                if is_per_token(name):
                    rows[target] = values[source]
                else:
                    rows[x] = values[self._row[entry_X[x]]]
        return tokens_X, arrays

    # Writing

    def check_writable(self) -> None:
        """Raises UserError or RunError if no part can be written."""
        try:
            TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise disk.write_error(self.folder, error, _FLAG) from None

    def add(self, keys_X2: np.ndarray, tokens_X: np.ndarray, arrays: Mapping[str, np.ndarray], write: bool) -> None:
        """Adds examples that are not in the cache, and at times calls `flush`, which writes them.

        Args:
          keys_X2: their keys.
          tokens_X: the number of tokens of each with a weight.
          arrays: the rows of each array, in the order of the keys.
          write: whether this process writes; another one of several only remembers the keys.
        """
        self._added |= {key.tobytes() for key in keys_X2}
        if write:
            arrays = {name: rows.astype(self.arrays[name].dtype) for name, rows in arrays.items()}
            self._pending.append({_KEYS: keys_X2, _TOKENS: tokens_X.astype(np.int32), **arrays})
            size = sum(array.nbytes for array in self._pending[-1].values())
            self._pending_bytes += size
            now = time.monotonic()
            seconds = max(MAX_PART_SECONDS, MAX_PART_SHARE * (now - self._opened))
            if self._pending_bytes > MAX_PART_BYTES or now - self._flushed > seconds:
                self.flush()

    def flush(self) -> None:
        """Writes the examples that were added as a part.

        Raises:
          RunError: if the disk is full.
          UserError: if the file system refuses to write for another reason.
        """
        if self._pending:
            tensors = {name: np.concatenate([part[name] for part in self._pending]) for name in self._pending[0]}
            file = self.folder / f"{_digest(tensors)}.safetensors"
            try:
                safetensors.write(tensors, file)
            except OSError as error:
                raise disk.write_error(file, error, _FLAG) from None
        self._pending, self._pending_bytes, self._flushed = [], 0, time.monotonic()

    # The index: arrays with an entry for each example, sorted by key

    def _clear(self) -> None:
        self._keys = np.zeros((0, 2), np.uint64)
        self._part = self._row = self._start = self._tokens = np.zeros(0, np.int64)
        self._parts: list[dict[str, Any]] = []
        self._added: set[bytes] = set()
        self.bytes = 0  # size of the parts

    @property
    def count(self) -> int:
        """The number of examples on disk."""
        return len(self._keys)

    def _read_part(self, file: Path) -> tuple[dict[str, Any], str]:
        """Returns the tensors of a part, and a description of its damage, or ""."""
        try:
            open(file, "rb").close()
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}; correct its permissions") from None
        try:
            part = safetensors.read_file(file)
        except UserError:
            return {}, "it is truncated or no safetensors file"
        if part.keys() != {_KEYS, _TOKENS, *self.arrays} or _digest(part) != file.stem:
            return {}, "its content has changed"
        return part, ""

    def _add_part(self, file: Path, part: dict[str, Any]) -> None:
        tokens = np.asarray(part[_TOKENS]).astype(np.int64)
        count = len(tokens)
        append = lambda old, new: np.concatenate([old, new])
        self._keys = append(self._keys, np.asarray(part[_KEYS]))
        self._tokens, self._start = append(self._tokens, tokens), append(self._start, offsets(tokens)[:-1])
        self._part = append(self._part, np.full(count, len(self._parts)))
        self._row = append(self._row, np.arange(count))
        self._parts.append(part)
        self.bytes += file.stat().st_size

    def _sort(self) -> None:
        order = np.lexsort((self._keys[:, 1], self._keys[:, 0]))
        keys = self._keys[order]
        is_new = np.ones(len(keys), bool)  # two runs may have added the same examples
        is_new[1:] = (keys[1:] != keys[:-1]).any(1)
        order = order[is_new]
        self._keys, self._part, self._row = self._keys[order], self._part[order], self._row[order]
        self._start, self._tokens = self._start[order], self._tokens[order]

    def _find(self, keys_X2: np.ndarray) -> np.ndarray:
        """Returns the entry of each key; -1 if it has none.

        Two keys with the same first half are practically impossible; the second of them would count as missing.
        """
        if not len(self._keys):
            return np.full(len(keys_X2), -1)
        at = np.minimum(np.searchsorted(self._keys[:, 0], keys_X2[:, 0]), len(self._keys) - 1)
        return np.where((self._keys[at] == keys_X2).all(1), at, -1)


def _digest(tensors: Mapping[str, Any]) -> str:
    """Returns a hash of tensors, as 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        values = tensors[name].view() if isinstance(tensors[name], safetensors.Stored) else tensors[name]
        digest.update(f"{name} {values.dtype} {values.shape} ".encode())
        digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
