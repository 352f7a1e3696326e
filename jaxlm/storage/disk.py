"""Local files and folders: untrusted names, atomic writes, locks, and content hashes.

    path_inside    resolves an untrusted name (from an archive, a bucket or an index file) below a folder
    atomic_file    writes a file completely or not at all
    write          writes text or bytes with `atomic_file`
    atomic_folder  writes a folder completely or not at all
    lock           gives one process at a time a run folder or an output, across all hosts that share the file system
    content_hash   hashes every byte of a file
    cache_folder   returns the folder for data that can be computed or downloaded again

Each write uses a new random temporary name. All other files belong to the user and are never touched.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from jaxlm.errors import RunError, UserError

try:
    import fcntl
except ImportError:  # Windows: only heartbeats show whether a process holds a lock
    fcntl = None  # type: ignore[assignment]

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # error numbers of a full disk, a quota and a file size limit
LOCK = ".jaxlm-lock"  # name of the lock file in a folder, and suffix of the names of other lock files
HEARTBEAT = 5.0  # seconds between two heartbeats of the process that holds a lock
LOCK_TIMEOUT = 30.0  # seconds without a heartbeat after which a holder on another machine counts as dead
_MAX_NAME = 255  # bytes in a file name
_PART = 1 << 24  # bytes in each part that one thread hashes
_TICK = 3.0  # seconds; longer than the resolution of the time stamps of any file system
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{16}\.tmp", re.DOTALL)
_DRIVE = re.compile(r"[A-Za-z]:")


def cache_folder(chosen: str = "") -> Path:
    """Returns the folder for what can be computed or downloaded again.

    Args:
      chosen: the value of `data.cache`. Empty: $JAXLM_CACHE, else ~/.cache/jaxlm.

    Raises:
      UserError: if the folder is an address.
    """
    if chosen:
        return local(chosen, "data.cache")
    return local(os.environ.get("JAXLM_CACHE") or Path.home() / ".cache" / "jaxlm", "JAXLM_CACHE")


def local(path: str | os.PathLike[str], what: str) -> Path:
    """Returns a path for writing, after a check that it is local.

    Args:
      path: the path.
      what: the name of the field or argument that holds the path, for the error message.

    Raises:
      UserError: if `path` is an address such as gs://bucket/name, which would create a folder named `gs:`.
    """
    if "://" in os.fspath(path):
        raise UserError(f"{what} is {os.fspath(path)!r}, an address; choose a local path, and copy the output there")
    return Path(path)


# Untrusted names


def path_inside(folder: str | os.PathLike[str], name: str, also: tuple[Path, ...] = ()) -> Path:
    """Returns `folder / name` for an untrusted name, after a check that the path is inside the folder.

    Args:
      folder: the folder, which need not exist yet.
      name: a relative path: an entry of an archive, a key in a bucket, or a file name from an index.
      also: additional folders that symbolic links may point into.

    Raises:
      UserError: if the name is absolute, is empty, is the folder itself, contains a drive letter, `..`, a zero byte
        or a part longer than 255 bytes, or resolves through a symbolic link to a path outside the folder.
    """
    refused = lambda why: UserError(
        f"{name[:200]!r} {why}; a name must refer to a file in {folder}: correct its source"
    )
    if "\0" in name:
        raise refused("contains a zero byte")
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".")]
    if name.startswith(("/", "\\")) or (_DRIVE.match(name) and name[2:3] in ("", "/", "\\")):
        raise refused("is an absolute path")
    if ".." in parts:
        raise refused("contains '..'")
    if not parts:
        raise refused("names no file")
    if any(len(os.fsencode(part)) > _MAX_NAME for part in parts):
        raise refused(f"has a part longer than {_MAX_NAME} bytes")
    path = Path(folder) / name
    try:
        tops = [os.path.realpath(top) for top in (folder, *also)]
        resolved = os.path.realpath(path)
    except (OSError, ValueError) as error:  # a link to itself, or a name that the file system rejects
        raise refused(f"cannot be resolved ({error})") from None
    if not any(os.path.commonpath([top, resolved]) == top for top in tops):
        raise refused(f"is a link to {resolved}, outside its folder")
    return path


# Writing


def write_error(path: str | os.PathLike[str], error: OSError, choice: str) -> UserError | RunError:
    """Returns the error to raise after the file system failed to write `path`: RunError if the disk is full.

    Args:
      path: the file or folder.
      error: the error from the file system.
      choice: the argument that the user can change, such as "--output".
    """
    kind, room = (RunError, "free disk space, or ") if error.errno in DISK_FULL else (UserError, "")
    return kind(f"{path} cannot be written: {error.strerror}; {room}choose another {choice}")


def is_temporary(name: str) -> bool:
    """Returns whether `name` is a temporary name from `atomic_file` or `atomic_folder`."""
    return bool(_TEMPORARY.fullmatch(name))


def flush(file: Path) -> None:
    """Blocks until the content of a file is on disk."""
    with open(file, "rb+") as stream:
        os.fsync(stream.fileno())


@contextmanager
def atomic_file(path: str | os.PathLike[str], overwrite: bool = True) -> Iterator[Path]:
    """Yields a temporary path in the same folder, and renames it to `path` if the block ends without an exception.

    Args:
      path: the file to write. If it is a symbolic link, its target is replaced.
      overwrite: whether to replace an existing file. If False and the file exists when the block ends, that file
        stays, and the new content stays under its temporary name, which the error message contains.

    Raises:
      UserError: if the file exists when the block ends and `overwrite` is False.
      OSError: if the file system fails.
    """
    path = Path(os.path.realpath(path))
    temporary = _temporary(path)
    try:
        yield temporary
        flush(temporary)
        if overwrite:
            os.replace(temporary, path)
        elif not _rename_new(temporary, path):
            unused, temporary = temporary, _temporary(path)
            raise UserError(f"{path} was written by another process in the meantime; the new content is in {unused}")
    finally:
        temporary.unlink(missing_ok=True)


def write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Writes a file atomically. Text is encoded in UTF-8, with `?` for unpaired surrogates.

    Raises:
      OSError: if the file system fails.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)


@contextmanager
def atomic_folder(folder: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder, and renames it to `folder` if the block ends without an exception.

    Args:
      folder: the folder to write. If it is a symbolic link, its target is replaced. An existing empty folder is fine.
      overwrite: whether to replace a folder that is not empty.

    Raises:
      UserError: if the folder is not empty and `overwrite` is False.
      OSError: if the file system fails.
    """
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(folder)
    temporary.mkdir()
    try:
        yield temporary
        try:
            os.rename(temporary, folder)  # also replaces an empty folder
        except OSError:
            if not folder.is_dir():
                raise
            if not overwrite:
                raise UserError(f"{folder} exists and is not empty; choose another folder") from None
            _replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    stem = os.fsdecode(os.fsencode(path.name)[:100])
    return path.with_name(f".{stem}.{secrets.token_hex(8)}.tmp")


def _rename_new(source: Path, path: Path) -> bool:
    """Renames a file, and returns whether the new name was free."""
    try:
        os.link(source, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            return False
        os.rename(source, path)
    return True


def _replace_folder(new: Path, folder: Path) -> None:
    old = _temporary(folder)
    os.rename(folder, old)
    try:
        os.rename(new, folder)
    except OSError:
        os.rename(old, folder)
        raise
    for path, *_ in os.walk(old):  # without permissions a folder cannot be emptied
        with suppress(OSError):
            os.chmod(path, 0o700)
    shutil.rmtree(old, ignore_errors=True)


# Locks


def lock_path(path: str | os.PathLike[str]) -> Path:
    """Returns the path of the lock file for an output that is not an existing folder: a hidden file next to it."""
    path = Path(os.path.realpath(path))
    return path.with_name(f".{os.fsdecode(os.fsencode(path.name)[:200])}{LOCK}")


@contextmanager
def lock(file: Path, what: str, remedy: str) -> Iterator[None]:
    """Holds a lock file while the block runs, and removes it at the end.

    The file contains the process, the host and the start time of its holder. On one machine, and on file systems with
    shared locks, `flock` decides, which ends with its process. Otherwise heartbeats decide: the holder touches the file
    every 5 seconds, and another process takes over a file that does not change for 30 seconds. The clocks of two
    machines are never compared.

    Args:
      file: the lock file.
      what: the name of the locked output, with which the error message begins.
      remedy: an alternative for the user, with which the error message ends.

    Raises:
      UserError: if another process holds the lock, or if the file is not a lock file of this library.
      OSError: if the file system fails.
    """
    descriptor = _acquire(file, what, remedy)
    ended = threading.Event()
    thread = threading.Thread(target=_send_heartbeats, args=(descriptor, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            if os.path.samestat(os.stat(file), os.fstat(descriptor)):
                os.unlink(file)  # before the lock ends, so that a process that has opened the file can detect it
        os.close(descriptor)


def _acquire(file: Path, what: str, remedy: str) -> int:
    """Acquires a lock file and returns its descriptor."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        taken = False
        try:
            ours, certain = _flock(descriptor)
            owner = parse_owner(os.pread(descriptor, 4096, 0), file)
            # If flock succeeds, a holder on this machine must be dead.
            dead = certain and owner.get("machine") == machine()
            if not ours or (owner and not dead and is_alive(lambda: _modified(file), what, owner)):
                raise lock_error(what, owner, remedy)
            with suppress(FileNotFoundError):  # the holder has ended and removed the file: try again
                taken = os.path.samestat(os.stat(file), os.fstat(descriptor))
            if taken:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(lock_facts()).encode(), 0)
                return descriptor
        finally:
            if not taken:
                os.close(descriptor)


def _flock(descriptor: int) -> tuple[bool, bool]:
    """Tries flock; returns whether no other process holds it, and whether the file system supports it."""
    if fcntl is None:
        return True, False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES), False
    return True, True


def lock_facts() -> dict[str, Any]:
    """Returns the content of a lock file that this process holds."""
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {"process": os.getpid(), "host": socket.gethostname(), "since": since, "machine": machine()}


@lru_cache
def machine() -> str:
    """Returns an identifier of this machine since its last boot."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def parse_owner(content: bytes, file: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the facts in the content of a lock file; an empty dict if the file is new.

    Raises:
      UserError: if it is not a lock file of this library.
    """
    if not content:
        return {}
    with suppress(ValueError, RecursionError):
        owner = json.loads(content)
        if isinstance(owner, dict) and lock_facts().keys() <= owner.keys():
            return owner
    raise UserError(f"{file} is not a lock file of jaxlm; move it away")


def lock_error(what: str, owner: dict[str, Any], remedy: str) -> UserError:
    """Returns the error to raise if another process holds a lock."""
    process, host, since = (owner.get(name, "?") for name in ("process", "host", "since"))
    return UserError(
        f"{what} is held by process {process} on host {host} since {since}; wait until it ends, or {remedy}"
    )


def is_alive(state: Callable[[], Any], what: str, owner: dict[str, Any]) -> bool:
    """Returns whether the holder of a lock on another machine sends a heartbeat within `LOCK_TIMEOUT` seconds.

    Args:
      state: returns a value that changes with each heartbeat, or None if the lock file is gone.
      what: the name of the locked output, for the message on stderr.
      owner: the facts about the holder, for that message.
    """
    print(
        f"{what} was last held by process {owner['process']} on host {owner['host']}; waiting up to "
        f"{LOCK_TIMEOUT:.0f} s for a heartbeat",
        file=sys.stderr,
        flush=True,
    )
    end, before = time.monotonic() + LOCK_TIMEOUT, state()
    while time.monotonic() < end:
        time.sleep(min(1.0, HEARTBEAT / 5))
        if (now := state()) is None:
            return False
        if now != before:
            return True
    return False


def _modified(file: Path) -> int | None:
    """Returns the modification time of a file; opening it makes a network file system refresh it."""
    with suppress(FileNotFoundError), open(file, "rb") as stream:
        return os.fstat(stream.fileno()).st_mtime_ns
    return None


def _send_heartbeats(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT):
        with suppress(OSError):
            os.utime(descriptor)


# Content


def content_hash(file: str | os.PathLike[str]) -> str:
    """Returns a SHA-256 tree hash of every byte of a file, as 64 hexadecimal digits.

    Threads hash parts of 16 MiB. The hash is cached in the process until the size, times or inode of the file change.

    Raises:
      OSError: if the file cannot be read, or is not a regular file.
    """
    with open(file, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as stream:
        state = os.fstat(stream.fileno())
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(file))
    identity = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    path = os.path.realpath(file)
    # Two changes within the resolution of the time stamps leave the same times.
    recent = abs(time.time() - state.st_ctime) < _TICK
    return _read_hash(path, identity) if recent else _cached_hash(path, identity)


@lru_cache(maxsize=1 << 16)
def _cached_hash(path: str, identity: tuple[int, ...]) -> str:
    return _read_hash(path, identity)


def _read_hash(path: str, identity: tuple[int, ...]) -> str:
    size = identity[2]

    def part(start: int) -> bytes:
        with open(path, "rb") as stream:
            stream.seek(start)
            return hashlib.sha256(stream.read(_PART)).digest()

    starts = range(0, size, _PART)
    if len(starts) < 2:
        parts = [part(0)]
    else:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            parts = list(pool.map(part, starts))
    return hashlib.sha256(b"".join([size.to_bytes(8, "big"), *parts])).hexdigest()
