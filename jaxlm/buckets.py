"""Buckets: data, weights and run folders at addresses such as gs://bucket/name, of any storage that fsspec knows.

What lies there is copied.  Data and weights are brought to the cache, and again where they have changed.  A run works
in a folder of the cache that is brought here at its beginning and sent back after each checkpoint and at its end, so
that the same command goes on from there on any machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from jaxlm.errors import RunError, UserError

_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is of a bucket rather than of this machine."""
    return "://" in os.fspath(path)


@lru_cache
def brought(address: str) -> str:
    """The local path of a copy of a file, a folder or a glob, made once in a process; a local path as it is.

    Raises UserError where there is nothing, and for an address that needs a package which is not installed.
    """
    if not is_address(address):
        return address
    with _faults(address):
        storage, root = _storage(address)
        if "*" in root:
            found, to = {name.rsplit("/", 1)[-1]: name for name in storage.glob(root)}, "*"
        elif storage.isdir(root):
            found, to = {_below(name, root): name for name in storage.find(root)}, ""
        else:
            found, to = ({root.rsplit("/", 1)[-1]: root} if storage.exists(root) else {}), root.rsplit("/", 1)[-1]
        if not found:
            raise UserError(f"there is nothing at {address}; give a file, a folder or a glob that is there")
        folder = _copy_of(address)
        _bring(storage, found, folder)
    return str(folder / to) if to else str(folder)


def model(address: str) -> Path:
    """The local copy of a model's folder; of a run, its export alone."""
    with _faults(address):
        storage, root = _storage(address)
        exported = storage.exists(f"{root}/export/config.json")
    return Path(brought(f"{address.rstrip('/')}/export" if exported else address))


class RunFolder:
    """Where a run works: the folder itself, or of a bucket a copy of it here."""

    def __init__(self, workdir: str):
        self.address = workdir if is_address(workdir) else ""
        self.folder = _copy_of(workdir) if self.address else Path(workdir)

    def bring(self) -> None:
        """Makes the copy what the bucket has, which may be nothing."""
        if not self.address:
            return
        with _faults(self.address):
            storage, root = _storage(self.address)
            found = {_below(name, root): name for name in storage.find(root)} if storage.exists(root) else {}
            _bring(storage, found, self.folder)

    def send(self) -> None:
        """Makes the bucket what the copy is, but for what is half written: new files first, then what is gone goes."""
        if not self.address:
            return
        with _faults(self.address):
            storage, root = _storage(self.address)
            there = {_below(name, root) for name in storage.find(root)} if storage.exists(root) else set()
            known = _read_listing(self.folder)
            here = {file.relative_to(self.folder).as_posix(): file for file in _whole_files(self.folder)}
            listing = {name: [file.stat().st_size, file.stat().st_mtime_ns] for name, file in here.items()}
            for name, file in here.items():
                if name not in there or known.get(name) != listing[name]:
                    storage.makedirs(f"{root}/{name}".rsplit("/", 1)[0], exist_ok=True)
                    storage.put_file(str(file), f"{root}/{name}")
            for name in _tops(there - set(here), set(here)):
                storage.rm(f"{root}/{name}", recursive=True)
            _listing(self.folder).write_text(json.dumps(listing))


def _storage(address: str) -> tuple[Any, str]:
    import fsspec

    scheme = address.split("://")[0]
    try:
        storage, root = fsspec.core.url_to_fs(address)
    except ImportError as error:
        package = _PACKAGES.get(scheme, "the package that fsspec names")
        raise UserError(f"{address} needs a package that is not installed: pip install {package}") from error
    except ValueError as error:
        known = ", ".join(f"{name}://" for name in _PACKAGES)
        raise UserError(f"{address} is of an unknown storage, {scheme!r}; those known are {known} ...") from error
    return storage, root.rstrip("/")


@contextmanager
def _faults(address: str) -> Iterator[None]:
    """What a storage says when it refuses, as one message."""
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:  # each storage has errors of its own
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise RunError(
            f"{address} cannot be used: {said[:300]}; look at the address and your rights, then give the command again"
        ) from error


def _below(name: str, root: str) -> str:
    return name[len(root) :].lstrip("/") if name.startswith(root) else name.lstrip("/")


def _copy_of(address: str) -> Path:
    """The folder of the cache for an address."""
    cache = Path(os.environ.get("JAXLM_CACHE") or Path.home() / ".cache" / "jaxlm")
    name = address.rstrip("/").rsplit("/", 1)[-1].replace("*", "all") or "bucket"
    return cache / "buckets" / f"{hashlib.sha256(address.rstrip('/').encode()).hexdigest()[:12]}-{name}"


def _bring(storage: Any, found: dict[str, str], folder: Path) -> None:
    """Makes a folder the copy of these files, by their names in it: those that are new or have changed are fetched."""
    folder.mkdir(parents=True, exist_ok=True)
    before = _read_listing(folder)
    listing = {name: _state(storage.info(where)) for name, where in found.items()}
    for name, where in found.items():
        to = folder / name
        if before.get(name) == listing[name] and to.exists():
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        part = to.with_name(f"{to.name}.{os.getpid()}.part")
        storage.get_file(where, str(part))
        os.replace(part, to)
    for file in list(_whole_files(folder)):
        if file.relative_to(folder).as_posix() not in found:
            file.unlink()
    # An empty folder may mean something, such as a checkpoint without files: none stays behind.
    for place in sorted(folder.rglob("*"), key=lambda path: -len(path.parts)):
        if place.is_dir() and not any(place.iterdir()):
            shutil.rmtree(place, ignore_errors=True)
    _listing(folder).write_text(json.dumps(listing))


def _listing(folder: Path) -> Path:
    """The file, beside a copy, that says what it was made of."""
    return folder.with_name(f"{folder.name}.json")


def _tops(gone: set[str], kept: set[str]) -> set[str]:
    """What to remove so that these files go: whole folders, where nothing of them is kept."""
    above = lambda name: [str(folder) for folder in PurePosixPath(name).parents if str(folder) != "."]
    held = {folder for name in kept for folder in above(name)}
    return {next((folder for folder in reversed(above(name)) if folder not in held), name) for name in gone}


def _read_listing(folder: Path) -> dict[str, Any]:
    try:
        said = json.loads(_listing(folder).read_text())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _whole_files(folder: Path) -> Iterator[Path]:
    """The files of a folder, but for those of checkpoints that are being written."""
    for file in folder.rglob("*"):
        parts = file.relative_to(folder).parts
        if file.is_file() and not any("orbax-checkpoint-tmp" in part for part in parts):
            yield file


def _state(info: dict[str, Any]) -> list[str]:
    """What changes when a file does."""
    return [str(info.get(key)) for key in ("size", "mtime", "updated", "etag", "ETag", "LastModified", "created")]
