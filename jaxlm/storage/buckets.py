"""Buckets: data, weights and run folders at addresses such as gs://bucket/name, of any storage that fsspec knows.

What is there is copied.  Data and weights are brought to the cache, and again where they have changed, there or here.
A run works in a folder of the cache that is brought here at its beginning and sent back after each checkpoint and at
its end, so that the same command resumes it on any machine.  Beside each copy a listing says what its files were: only
files in it are ever removed from a bucket.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import jax

from jaxlm.devices import hosts
from jaxlm.errors import RunError, UserError
from jaxlm.storage import archives, disk

_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}
# What changes, in the words of some storage or other, when a file does.
_TIMES = ("mtime", "updated", "created", "last_modified", "LastModified")
_VERSIONS = (
    *_TIMES,
    "etag",
    "ETag",
    "generation",
    "VersionId",
    "CRC",
    "chksum",
    "checksum",
    "crc32c",
    "md5Hash",
    "oid",
    "blob_id",
)


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is of a bucket rather than of this machine."""
    return "://" in os.fspath(path)


def forget() -> None:
    """Lets `brought` look again for what has changed; a run and the loading of a model each begin with this."""
    brought.cache_clear()


@lru_cache
def brought(address: str) -> str:
    """Returns the local path of a copy of a file, a folder or a glob, made once in an operation; a local path as it is.

    Raises:
        UserError: where there is nothing, for an address that needs a package which is not installed, and for names
            that would leave the folder of the copy.
        RunError: where the storage refuses.
    """
    if not is_address(address):
        return address
    with _faults(address):
        bucket, root = _storage(address)
        bucket.invalidate_cache()
        if glob.has_magic(root):
            top = root[: re.search(r"[*?[]", root).start()].rpartition("/")[0]  # type: ignore[union-attr]
            listed = bucket.glob(root, detail=True)
            found, to = {_below(name, top): name for name, info in listed.items() if info["type"] == "file"}, "**"
        elif bucket.isdir(root):
            found, to = _files_below(bucket, root), ""
        else:
            found, to = ({root.rsplit("/", 1)[-1]: root} if bucket.exists(root) else {}), root.rsplit("/", 1)[-1]
        if not found:
            raise UserError(f"there is nothing at {address}; give a file, a folder or a glob that is there")
        folder = _copy_of(address)
        _bring(bucket, found, folder, _outer_state(address))
    if to == "**":
        return f"{glob.escape(str(folder))}/**"
    return str(folder / to) if to else str(folder)


def model(address: str) -> Path:
    """Returns the local copy of a model's folder; of a run, its export alone."""
    forget()
    with _faults(address):
        bucket, root = _storage(address)
        bucket.invalidate_cache()
        exported = bucket.exists(f"{root}/export/config.json")
    return Path(brought(_at(address, "export") if exported else address))


class RunFolder:
    """Where a run works: the folder itself, or of a bucket a copy of it here, one for each host."""

    def __init__(self, workdir: str):
        self.address = workdir if is_address(workdir) else ""
        self.folder = Path(workdir)
        if self.address:
            copy, own = _copy_of(workdir), jax.process_index()
            self.folder = copy.with_name(f"{copy.name}.{own}") if own else copy

    @contextmanager
    def opened(self) -> Iterator[RunFolder]:
        """Holds the folder for this run, on all of its hosts, and brings what a bucket has.

        Raises:
            UserError: where another run holds it, or where the folder cannot be made.
        """
        with hosts.first_holds(self._held):
            self.bring()
            yield self

    @contextmanager
    def _held(self) -> Iterator[None]:
        here, remedy = self.address or str(self.folder), "choose another --workdir"
        lock = disk.lock_beside(self.folder) if self.address else self.folder / disk.LOCK
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            holding = disk.lock(lock, here, remedy)
            holding.__enter__()
        except OSError as error:
            raise disk.cannot_be_written(self.folder, error, "--workdir, or free this one") from None
        try:
            if self.address:
                with _held_there(self.address, remedy):
                    yield
            else:
                yield
        finally:
            holding.__exit__(None, None, None)

    def bring(self) -> None:
        """Makes the copy what the bucket has, which may be nothing."""
        if not self.address:
            return
        with _faults(self.address):
            bucket, root = _storage(self.address)
            bucket.invalidate_cache()
            found = _files_below(bucket, root) if bucket.exists(root) else {}
            if not hosts.is_first():  # which alone reads checkpoints
                found = {name: at for name, at in found.items() if not name.startswith("checkpoints/")}
            _bring(bucket, found, self.folder, [])

    def send(self) -> None:
        """Writes to the bucket what is new here, but for what is half written; then removes there what went here.

        Of many hosts the first has all that there is.
        """
        if not self.address or not hosts.is_first():
            return
        with _faults(self.address):
            bucket, root = _storage(self.address)
            there = set(_files_below(bucket, root)) if bucket.exists(root) else set()
            listing = _read_listing(self.folder)
            here = {file.relative_to(self.folder).as_posix(): file for file in _whole_files(self.folder)}
            gone = listing.keys() - here.keys()
            for name, file in here.items():
                if name not in there or listing.get(name, {}).get("here") != _times(file):
                    entry = {"here": _times(file), "hash": disk.content_hash(file)}
                    bucket.makedirs(f"{root}/{name}".rsplit("/", 1)[0], exist_ok=True)
                    bucket.put_file(str(file), f"{root}/{name}")
                    listing[name] = entry | {"there": _state(bucket.info(f"{root}/{name}"), [])}
            _write_listing(self.folder, {name: entry for name, entry in listing.items() if name not in gone})
            for name in _tops(gone & there, there - gone):
                with suppress(FileNotFoundError):  # someone may have removed it
                    bucket.rm(f"{root}/{name}", recursive=True)


@contextmanager
def _held_there(address: str, remedy: str) -> Iterator[None]:
    """Holds a run's lock at its address, as `storage.lock` holds a file: signs of life decide between machines.

    Two runs that begin within one second of each other may both go on where the storage cannot tell which was first.
    """
    bucket, root = _storage(address)
    file, ours = f"{root}/{disk.LOCK}", disk.facts()
    read = lambda: bucket.cat_file(file) if bucket.exists(file) else None
    with _faults(address):
        bucket.invalidate_cache()
        owner = disk.owner_in(read() or b"", f"{address}/{disk.LOCK}")
        # A holder on this machine would hold the lock of the copy too.
        if owner and owner["machine"] != disk.machine() and disk.shows_life(read, address, owner):
            raise disk.lock_error(address, owner, remedy)
        bucket.makedirs(root, exist_ok=True)
        bucket.pipe_file(file, json.dumps(ours | {"beat": 0}).encode())
    ended = threading.Event()

    def beat() -> None:
        number = 0
        while not ended.wait(2 * disk.BEAT):
            number += 1
            with suppress(Exception):  # a storage that fails for a while; each has errors of its own
                bucket.pipe_file(file, json.dumps(ours | {"beat": number}).encode())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(Exception):  # a lock that stays is taken over later
            if disk.owner_in(read() or b"", file).get("process") == ours["process"]:
                bucket.rm_file(file)


def _storage(address: str) -> tuple[Any, str]:
    import fsspec

    scheme = address.split("://")[0]
    try:
        bucket, root = fsspec.core.url_to_fs(address)
    except ImportError as error:
        package = _PACKAGES.get(scheme, "the package that fsspec names")
        raise UserError(f"{address} needs a package that is not installed: pip install {package}") from error
    except ValueError as error:
        known = ", ".join(f"{name}://" for name in _PACKAGES)
        raise UserError(f"{address} is of an unknown storage, {scheme!r}; those known are {known} ...") from error
    return bucket, root.rstrip("/")


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
    return name[len(root) :].lstrip("/") if root and name.startswith(root) else name


def _files_below(bucket: Any, root: str) -> dict[str, str]:
    """Returns the files of a folder of a bucket, by their names in it, without locks and markers of folders."""
    found = {_below(name, root): name for name in bucket.find(root)}
    return {name: at for name, at in found.items() if name and name != disk.LOCK and not name.endswith("/")}


def _at(address: str, name: str) -> str:
    """Returns the address of a name below an address, which may be one in an archive."""
    inner, chain, outer = address.partition("::")
    return f"{inner.rstrip('/')}/{name}{chain}{outer}"


def _outer(address: str) -> str:
    """Returns the archive that an address is in: a file of this machine with its whole path, or an address."""
    outer = address.partition("::")[2]
    local = outer.removeprefix("file://")
    return outer if not outer or is_address(local) else os.path.abspath(local)


def _outer_state(address: str) -> list[str]:
    """Returns what changes when the archive that an address is in does."""
    outer = _outer(address)
    if not outer:
        return []
    if os.path.isabs(outer):  # a glob is of files with times of their own, behind a cache such as simplecache
        return [] if glob.has_magic(outer) and not os.path.exists(outer) else [disk.content_hash(outer)]
    bucket, root = _storage(outer)
    state = [] if glob.has_magic(root) and not bucket.exists(root) else _state(bucket.info(root), []) or ["unknown"]
    return [*state, *_outer_state(outer)]


def _copy_of(address: str) -> Path:
    """Returns the folder of the cache for an address."""
    inner, chain, _ = address.partition("::")
    whole = f"{inner.rstrip('/')}{chain}{_outer(address)}".rstrip("/")
    name = re.sub(r"[^\w.-]", "_", inner.rstrip("/").rsplit("/", 1)[-1].replace("*", "all"))[:60] or "bucket"
    return disk.cache_folder() / "buckets" / f"{hashlib.sha256(whole.encode()).hexdigest()[:12]}-{name}"


def _bring(bucket: Any, found: dict[str, str], folder: Path, outer: list[str]) -> None:
    """Makes a folder the copy of some files, by their names in it: those that have changed are fetched, others go."""
    places = _places(found, folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in list(_whole_files(folder)):
        if file not in places.values():
            file.unlink()
    # An empty folder may mean something, such as a checkpoint without files: none stays behind.
    for place in sorted(folder.rglob("*"), key=lambda path: -len(path.parts)):
        if place.is_dir() and not any(place.iterdir()):
            shutil.rmtree(place, ignore_errors=True)
    before = _read_listing(folder)
    listing: dict[str, Any] = {}
    for name, to in places.items():
        where = archives.entry_of(bucket, found[name])
        there = _state(bucket.info(where), outer)
        entry = before.get(name, {})
        if there is None or entry.get("there") != there or not _is_whole(to, entry):
            to.parent.mkdir(parents=True, exist_ok=True)
            with disk.atomic_file(to) as temporary:
                bucket.get_file(where, str(temporary))
            entry = {"there": there, "hash": disk.content_hash(to)}
        listing[name] = entry | {"here": _times(to)}
    _write_listing(folder, listing)


def _places(found: Mapping[str, str], folder: Path) -> dict[str, Path]:
    """Returns where each file goes.  Raises UserError for names that leave the folder, or that exclude each other."""
    places = {name: disk.inside(folder, name) for name in found}
    taken = {folder}
    for name, path in places.items():
        if path in taken:
            raise UserError(f"{name!r} names two files; leave one of them out")
        taken.add(path)
    for name, path in places.items():
        if any(above in taken for above in path.parents if above != folder and above.is_relative_to(folder)):
            raise UserError(f"{name!r} is below a file of the same name as its folder; leave one of them out")
    return places


def _times(file: Path) -> list[int]:
    state = file.stat()
    return [state.st_size, state.st_mtime_ns]


def _is_whole(file: Path, entry: dict[str, Any]) -> bool:
    """Returns whether a file of a copy is what was brought or sent."""
    try:
        return disk.content_hash(file) == entry["hash"]
    except (OSError, KeyError):
        return False


def _listing(folder: Path) -> Path:
    """Returns the file, beside a copy, that says what its files were when they were last brought or sent."""
    return folder.with_name(f"{folder.name}.json")


def _tops(gone: set[str], kept: set[str]) -> set[str]:
    """Returns what to remove so that these files go: whole folders, where nothing of them is kept."""
    above = lambda name: [str(folder) for folder in PurePosixPath(name).parents if str(folder) != "."]
    needed = {folder for name in kept for folder in above(name)}
    return {next((folder for folder in reversed(above(name)) if folder not in needed), name) for name in gone}


def _read_listing(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(_listing(folder).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    known = isinstance(found, dict) and all(isinstance(entry, dict) for entry in found.values())
    return found if known else {}


def _write_listing(folder: Path, listing: dict[str, dict[str, Any]]) -> None:
    disk.write(_listing(folder), json.dumps(listing))


def _whole_files(folder: Path) -> Iterator[Path]:
    """Returns the files of a folder, without locks and what is being written."""
    for file in folder.rglob("*"):
        parts = file.relative_to(folder).parts
        unfinished = any("orbax-checkpoint-tmp" in part or disk.is_temporary(part) for part in parts)
        if file.is_file() and not unfinished and file.name != disk.LOCK:
            yield file


def _state(info: Mapping[str, Any], outer: list[str]) -> list[str] | None:
    """Returns what changes when a file does, or the archive that it is in; None where the storage does not say."""
    versions = [str(info[key]) for key in _VERSIONS if info.get(key) is not None]
    return [str(info.get("size")), *versions, *outer] if versions or outer else None
