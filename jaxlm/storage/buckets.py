"""Buckets: data, weights and run folders at addresses such as gs://bucket/name, in any storage that fsspec supports.

Files are copied. Data and weights are copied to the cache, and again if either side has changed. A run works in a local
copy of its folder, which is downloaded at the start and uploaded after each checkpoint and at the end, so that the same
command resumes the run on any machine. A listing next to each copy records the state of its files. Only files in this
listing are ever removed from a bucket.
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
# Keys in the file information of various storages that change when the file changes.
_TIME_KEYS = ("mtime", "updated", "created", "last_modified", "LastModified")
_VERSION_KEYS = (
    *_TIME_KEYS,
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
    """Returns whether a path is an address in a bucket, not a local path."""
    return "://" in os.fspath(path)


def forget_downloads() -> None:
    """Makes `download` check for changes again; each run and each `load` calls this first."""
    download.cache_clear()


@lru_cache
def download(address: str) -> str:
    """Downloads a file, a folder or a glob, and returns the local path of the copy.

    Args:
      address: an address; a local path is returned unchanged.

    Raises:
      UserError: if no file exists there, if the storage needs a package that is not installed, or if a file name
        would leave the folder of the copy.
      RunError: if the storage fails.
    """
    if not is_address(address):
        return address
    with _storage_errors(address):
        bucket, root = _storage(address)
        bucket.invalidate_cache()
        if glob.has_magic(root):
            top = root[: re.search(r"[*?[]", root).start()].rpartition("/")[0]  # type: ignore[union-attr]
            listed = bucket.glob(root, detail=True)
            files, to = (
                {_relative_name(name, top): name for name, info in listed.items() if info["type"] == "file"},
                "**",
            )
        elif bucket.isdir(root):
            files, to = _list_files(bucket, root), ""
        else:
            files, to = ({root.rsplit("/", 1)[-1]: root} if bucket.exists(root) else {}), root.rsplit("/", 1)[-1]
        if not files:
            raise UserError(f"no file exists at {address}; give the address of a file, a folder or a glob")
        folder = _local_copy(address)
        _sync_from_bucket(bucket, files, folder, _archive_state(address))
    if to == "**":
        return f"{glob.escape(str(folder))}/**"
    return str(folder / to) if to else str(folder)


def model(address: str) -> Path:
    """Downloads a model's folder, and returns its local copy. Of a run folder, only the export is downloaded."""
    forget_downloads()
    with _storage_errors(address):
        bucket, root = _storage(address)
        bucket.invalidate_cache()
        exported = bucket.exists(f"{root}/export/config.json")
    return Path(download(_join_address(address, "export") if exported else address))


class RunFolder:
    """The folder in which a run works: `workdir` itself, or a local copy on each host if it is an address."""

    def __init__(self, workdir: str):
        self.address = workdir if is_address(workdir) else ""
        self.folder = Path(workdir)
        if self.address:
            copy, own = _local_copy(workdir), jax.process_index()
            self.folder = copy.with_name(f"{copy.name}.{own}") if own else copy

    @contextmanager
    def opened(self) -> Iterator[RunFolder]:
        """Locks the folder for this run on all hosts, and downloads the content of a bucket.

        Raises:
          UserError: if another run holds the lock, or if the folder cannot be created.
        """
        with hosts.context_on_first(self._lock):
            self.bring()
            yield self

    @contextmanager
    def _lock(self) -> Iterator[None]:
        name, remedy = self.address or str(self.folder), "choose another --workdir"
        lock = disk.lock_path(self.folder) if self.address else self.folder / disk.LOCK
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            holding = disk.lock(lock, name, remedy)
            holding.__enter__()
        except OSError as error:
            raise disk.write_error(self.folder, error, "--workdir, or free this one") from None
        try:
            if self.address:
                with _bucket_lock(self.address, remedy):
                    yield
            else:
                yield
        finally:
            holding.__exit__(None, None, None)

    def bring(self) -> None:
        """Makes the local copy equal to the folder in the bucket, which may not exist."""
        if not self.address:
            return
        with _storage_errors(self.address):
            bucket, root = _storage(self.address)
            bucket.invalidate_cache()
            files = _list_files(bucket, root) if bucket.exists(root) else {}
            if not hosts.is_first():  # only the first host reads checkpoints
                files = {name: path for name, path in files.items() if not name.startswith("checkpoints/")}
            _sync_from_bucket(bucket, files, self.folder, [])

    def send(self) -> None:
        """Uploads new and changed files, then removes from the bucket the files that were removed locally.

        Unfinished files are skipped. Only the first host uploads.
        """
        if not self.address or not hosts.is_first():
            return
        with _storage_errors(self.address):
            bucket, root = _storage(self.address)
            remote = set(_list_files(bucket, root)) if bucket.exists(root) else set()
            listing = _read_listing(self.folder)
            local = {file.relative_to(self.folder).as_posix(): file for file in _complete_files(self.folder)}
            removed = listing.keys() - local.keys()
            for name, file in local.items():
                if name not in remote or listing.get(name, {}).get("here") != _times(file):
                    entry = {"here": _times(file), "hash": disk.content_hash(file)}
                    bucket.makedirs(f"{root}/{name}".rsplit("/", 1)[0], exist_ok=True)
                    bucket.put_file(str(file), f"{root}/{name}")
                    listing[name] = entry | {"there": _file_state(bucket.info(f"{root}/{name}"), [])}
            _write_listing(self.folder, {name: entry for name, entry in listing.items() if name not in removed})
            for name in _removals(removed & remote, remote - removed):
                with suppress(FileNotFoundError):  # another user may have removed it
                    bucket.rm(f"{root}/{name}", recursive=True)


@contextmanager
def _bucket_lock(address: str, remedy: str) -> Iterator[None]:
    """Holds the lock of a run in its bucket, like `disk.lock`: heartbeats decide between machines.

    Two runs that start within one second of each other may both proceed, because not every storage can order them.
    """
    bucket, root = _storage(address)
    file, ours = f"{root}/{disk.LOCK}", disk.lock_facts()
    read = lambda: bucket.cat_file(file) if bucket.exists(file) else None
    with _storage_errors(address):
        bucket.invalidate_cache()
        owner = disk.parse_owner(read() or b"", f"{address}/{disk.LOCK}")
        # A live holder on this machine would also hold the lock of the local copy.
        if owner and owner["machine"] != disk.machine() and disk.is_alive(read, address, owner):
            raise disk.lock_error(address, owner, remedy)
        bucket.makedirs(root, exist_ok=True)
        bucket.pipe_file(file, json.dumps(ours | {"beat": 0}).encode())
    ended = threading.Event()

    def beat() -> None:
        number = 0
        while not ended.wait(2 * disk.HEARTBEAT):
            number += 1
            with suppress(Exception):  # temporary failures; each storage has its own exceptions
                bucket.pipe_file(file, json.dumps(ours | {"beat": number}).encode())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(Exception):  # another run takes over a lock file that remains
            if disk.parse_owner(read() or b"", file).get("process") == ours["process"]:
                bucket.rm_file(file)


def _storage(address: str) -> tuple[Any, str]:
    import fsspec

    scheme = address.split("://")[0]
    try:
        bucket, root = fsspec.core.url_to_fs(address)
    except ImportError as error:
        package = _PACKAGES.get(scheme, "the package that fsspec requires")
        raise UserError(f"{address} needs a package that is not installed: pip install {package}") from error
    except ValueError as error:
        known = ", ".join(f"{name}://" for name in _PACKAGES)
        raise UserError(f"{address} has the unknown scheme {scheme!r}; known schemes are {known} ...") from error
    return bucket, root.rstrip("/")


@contextmanager
def _storage_errors(address: str) -> Iterator[None]:
    """Converts any error of a storage to a RunError with one message."""
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:  # each storage has its own exceptions
        message = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise RunError(
            f"{address} cannot be used: {message[:300]}; check the address and your permissions, then try again"
        ) from error


def _relative_name(name: str, root: str) -> str:
    return name[len(root) :].lstrip("/") if root and name.startswith(root) else name


def _list_files(bucket: Any, root: str) -> dict[str, str]:
    """Returns the path of each file in a folder of a bucket by its relative name, without locks and folder markers."""
    files = {_relative_name(name, root): name for name in bucket.find(root)}
    return {name: path for name, path in files.items() if name and name != disk.LOCK and not name.endswith("/")}


def _join_address(address: str, name: str) -> str:
    """Returns the address of a file below `address`, which may be inside an archive."""
    inner, chain, outer = address.partition("::")
    return f"{inner.rstrip('/')}/{name}{chain}{outer}"


def _archive_of(address: str) -> str:
    """Returns the archive of an address: an absolute local path, an address, or "" if there is no archive."""
    outer = address.partition("::")[2]
    local = outer.removeprefix("file://")
    return outer if not outer or is_address(local) else os.path.abspath(local)


def _archive_state(address: str) -> list[str]:
    """Returns values that change when the archive of an address changes."""
    outer = _archive_of(address)
    if not outer:
        return []
    if os.path.isabs(outer):  # the files of a glob behind a cache such as simplecache have their own times
        return [] if glob.has_magic(outer) and not os.path.exists(outer) else [disk.content_hash(outer)]
    bucket, root = _storage(outer)
    state = (
        [] if glob.has_magic(root) and not bucket.exists(root) else _file_state(bucket.info(root), []) or ["unknown"]
    )
    return [*state, *_archive_state(outer)]


def _local_copy(address: str) -> Path:
    """Returns the cache folder for an address."""
    inner, chain, _ = address.partition("::")
    whole = f"{inner.rstrip('/')}{chain}{_archive_of(address)}".rstrip("/")
    name = re.sub(r"[^\w.-]", "_", inner.rstrip("/").rsplit("/", 1)[-1].replace("*", "all"))[:60] or "bucket"
    return disk.cache_folder() / "buckets" / f"{hashlib.sha256(whole.encode()).hexdigest()[:12]}-{name}"


def _sync_from_bucket(bucket: Any, files: dict[str, str], folder: Path, outer: list[str]) -> None:
    """Makes a folder equal to `files`, a dict from relative names to paths in the bucket."""
    paths = _local_paths(files, folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in list(_complete_files(folder)):
        if file not in paths.values():
            file.unlink()
    # Empty folders are removed, since they could be read as checkpoints without files.
    for path in sorted(folder.rglob("*"), key=lambda path: -len(path.parts)):
        if path.is_dir() and not any(path.iterdir()):
            shutil.rmtree(path, ignore_errors=True)
    before = _read_listing(folder)
    listing: dict[str, Any] = {}
    for name, to in paths.items():
        remote = archives.entry_of(bucket, files[name])
        state = _file_state(bucket.info(remote), outer)
        entry = before.get(name, {})
        if state is None or entry.get("there") != state or not _is_intact(to, entry):
            to.parent.mkdir(parents=True, exist_ok=True)
            with disk.atomic_file(to) as temporary:
                bucket.get_file(remote, str(temporary))
            entry = {"there": state, "hash": disk.content_hash(to)}
        listing[name] = entry | {"here": _times(to)}
    _write_listing(folder, listing)


def _local_paths(files: Mapping[str, str], folder: Path) -> dict[str, Path]:
    """Returns the local path of each file; raises UserError for names that leave the folder or that conflict."""
    paths = {name: disk.path_inside(folder, name) for name in files}
    taken = {folder}
    for name, path in paths.items():
        if path in taken:
            raise UserError(f"{name!r} is the name of two files; remove one of them")
        taken.add(path)
    for name, path in paths.items():
        if any(above in taken for above in path.parents if above != folder and above.is_relative_to(folder)):
            raise UserError(f"the folder of {name!r} has the same name as a file; remove one of them")
    return paths


def _times(file: Path) -> list[int]:
    state = file.stat()
    return [state.st_size, state.st_mtime_ns]


def _is_intact(file: Path, entry: dict[str, Any]) -> bool:
    """Returns whether a file of a local copy is unchanged since its download or upload."""
    try:
        return disk.content_hash(file) == entry["hash"]
    except (OSError, KeyError):
        return False


def _listing_file(folder: Path) -> Path:
    """Returns the path of the listing of a local copy: the state of each file at its last download or upload."""
    return folder.with_name(f"{folder.name}.json")


def _removals(removed: set[str], kept: set[str]) -> set[str]:
    """Returns the names to remove: whole folders if none of their files is kept, else single files."""
    above = lambda name: [str(folder) for folder in PurePosixPath(name).parents if str(folder) != "."]
    needed = {folder for name in kept for folder in above(name)}
    return {next((folder for folder in reversed(above(name)) if folder not in needed), name) for name in removed}


def _read_listing(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        listing = json.loads(_listing_file(folder).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    is_valid = isinstance(listing, dict) and all(isinstance(entry, dict) for entry in listing.values())
    return listing if is_valid else {}


def _write_listing(folder: Path, listing: dict[str, dict[str, Any]]) -> None:
    disk.write(_listing_file(folder), json.dumps(listing))


def _complete_files(folder: Path) -> Iterator[Path]:
    """Yields the files of a folder, except locks and unfinished files."""
    for file in folder.rglob("*"):
        parts = file.relative_to(folder).parts
        unfinished = any("orbax-checkpoint-tmp" in part or disk.is_temporary(part) for part in parts)
        if file.is_file() and not unfinished and file.name != disk.LOCK:
            yield file


def _file_state(info: Mapping[str, Any], outer: list[str]) -> list[str] | None:
    """Returns values that change when a file or its archive changes; None if the storage has no such values."""
    versions = [str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None]
    return [str(info.get("size")), *versions, *outer] if versions or outer else None
