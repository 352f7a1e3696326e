"""Files and folders of this machine: names from outside, atomic writing, locks, and hashes of content.

    inside         a name that comes from outside (an archive, a bucket, an index file), as a path below a folder
    atomic_file    writes a file that appears whole or not at all
    write          the same for a content that is in memory
    atomic_folder  the same for a folder
    lock           one process at a time for a run folder or an output, on any host that sees its lock file
    content_hash   a hash of every byte of a file
    cache_folder   where this machine keeps what can be made again

A temporary name is chosen at random for each writing and is never used by two of them, so that whatever has another
name belongs to the user and is left alone.
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
except ImportError:  # Windows: signs of life alone tell whether a lock is held
    fcntl = None  # type: ignore[assignment]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # how a disk, a quota or a limit says that no more fits
LOCK = ".jaxlm-lock"  # the lock file of a folder, in it; the end of the name of other lock files
BEAT = 5.0  # seconds between two signs of life of the holder of a lock
SILENCE = 30.0  # seconds without a sign of life after which a holder on another machine counts as dead
_NAME = 255  # bytes that a file system takes for a name
_PART = 1 << 24  # bytes that are hashed at once, by one thread
_TICK = 3.0  # seconds, more than between two ticks of any file system's clock
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{16}\.tmp", re.DOTALL)
_DRIVE = re.compile(r"[A-Za-z]:")


def cache_folder() -> Path:
    """Returns $JAXLM_CACHE, else ~/.cache/jaxlm."""
    return local(os.environ.get("JAXLM_CACHE") or Path.home() / ".cache" / "jaxlm", "JAXLM_CACHE")


def local(path: str | os.PathLike[str], what: str) -> Path:
    """Returns a path where something is to be written, which is on this machine.

    Args:
        path: the path.
        what: the field or argument that names it.

    Raises:
        UserError: for an address such as gs://bucket/name, which as a path would be a folder `gs:`.
    """
    if "://" in os.fspath(path):
        raise UserError(f"{what} is {os.fspath(path)!r}, an address; choose a path of this machine, and copy it there")
    return Path(path)


# Names from outside


def inside(folder: str | os.PathLike[str], name: str, also: tuple[Path, ...] = ()) -> Path:
    """Returns `folder / name` for a name that comes from outside, once it is known to lie in the folder.

    Args:
        folder: the folder, which may not exist yet.
        name: a relative path: an entry of an archive, a key of a bucket, a file that an index names.
        also: further folders to which symbolic links may lead.

    Raises:
        UserError: for an absolute name, a drive letter, `..`, a zero byte, a part of more than
            255 bytes, the folder itself, and a symbolic link that leads out of the folder.
    """
    refused = lambda why: UserError(f"{name[:200]!r} {why}; a name must be of a file in {folder}: correct its source")
    if "\0" in name:
        raise refused("holds a zero byte")
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".")]
    if name.startswith(("/", "\\")) or (_DRIVE.match(name) and name[2:3] in ("", "/", "\\")):
        raise refused("is an absolute path")
    if ".." in parts:
        raise refused("holds '..'")
    if not parts:
        raise refused("names no file")
    if any(len(os.fsencode(part)) > _NAME for part in parts):
        raise refused(f"has a part of more than {_NAME} bytes")
    path = Path(folder) / name
    try:
        tops = [os.path.realpath(top) for top in (folder, *also)]
        resolved = os.path.realpath(path)
    except (OSError, ValueError) as error:  # a link to itself; a name that the file system cannot have
        raise refused(f"cannot be resolved ({error})") from None
    if not any(os.path.commonpath([top, resolved]) == top for top in tops):
        raise refused(f"is a link to {resolved}, outside of its folder")
    return path


# Writing


def cannot_be_written(path: str | os.PathLike[str], error: OSError, choice: str) -> UserError | RunError:
    """Returns the error of the library for an error of the file system in writing `path`: RunError for a full disk.

    Args:
        path: what was to be written.
        error: the error of the file system.
        choice: what the user may choose in its place, such as "--output".
    """
    kind, room = (RunError, "make room, or ") if error.errno in FULL else (UserError, "")
    return kind(f"{path} cannot be written: {error.strerror}; {room}choose another {choice}")


def is_temporary(name: str) -> bool:
    """Returns whether a file or folder has a name that `atomic_file` or `atomic_folder` chose."""
    return bool(_TEMPORARY.fullmatch(name))


def flush(file: Path) -> None:
    """Waits until the content of a file is on the disk."""
    with open(file, "rb+") as stream:
        os.fsync(stream.fileno())


@contextmanager
def atomic_file(path: str | os.PathLike[str], overwrite: bool = True) -> Iterator[Path]:
    """Yields a temporary path in the same folder, which becomes `path` if the block ends without an exception.

    Args:
        path: the file to write.
        overwrite: whether a file that exists is replaced.  Otherwise a file that appears while the block runs stays,
            and what the block wrote is kept under its temporary name, which the error gives.

    Raises:
        UserError: where the file exists at the end and may not be replaced.
        OSError: as the file system raises it.
    """
    path = Path(os.path.realpath(path))  # of a link, the file behind it is replaced
    temporary = _temporary(path)
    try:
        yield temporary
        flush(temporary)
        if overwrite:
            os.replace(temporary, path)
        elif not _rename_new(temporary, path):
            kept, temporary = temporary, _temporary(path)
            raise UserError(f"{path} was written by someone else in the meantime; what was to be written is in {kept}")
    finally:
        temporary.unlink(missing_ok=True)


def write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Writes a file, which appears whole or not at all; text in UTF-8, with `?` for what is no character.

    Raises:
        OSError: as the file system raises it.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)


@contextmanager
def atomic_folder(folder: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder, which becomes `folder` if the block ends without an exception.

    Args:
        folder: the folder to write; it may exist if it is empty.
        overwrite: whether a folder that is not empty is replaced.

    Raises:
        UserError: where the folder exists, is not empty, and may not be replaced.
        OSError: as the file system raises it.
    """
    folder = Path(os.path.realpath(folder))  # of a link, the folder behind it is replaced
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(folder)
    temporary.mkdir()
    try:
        yield temporary
        try:
            os.rename(temporary, folder)  # also onto an empty folder
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
    """Renames a file to a name that nothing has; returns False where something has it."""
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
    for place, *_ in os.walk(old):  # a folder without permissions cannot be emptied
        with suppress(OSError):
            os.chmod(place, 0o700)
    shutil.rmtree(old, ignore_errors=True)


# Locks


def lock_beside(path: str | os.PathLike[str]) -> Path:
    """Returns the lock file of an output that is no folder yet: a hidden file in the same folder."""
    path = Path(os.path.realpath(path))
    return path.with_name(f".{os.fsdecode(os.fsencode(path.name)[:200])}{LOCK}")


@contextmanager
def lock(file: Path, what: str, remedy: str) -> Iterator[None]:
    """Holds a lock file while the block runs; it is removed at the end.

    The file says which process holds it, on which host, since when.  On one machine, and on file systems that share
    their locks, the system's own lock (flock) decides, which ends with its process.  Otherwise the holder's signs of
    life do: it touches the file every 5 seconds, and a file whose time does not change for 30 seconds is taken over.
    Clocks of two machines are never compared.

    Args:
        file: the lock file.
        what: what is locked, to begin a message.
        remedy: what else the user may do, to end it.

    Raises:
        UserError: where another process holds the lock, or where the file is not one that this function wrote.
        OSError: as the file system raises it.
    """
    descriptor = _acquired(file, what, remedy)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(descriptor, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        with suppress(OSError):
            if os.path.samestat(os.stat(file), os.fstat(descriptor)):
                os.unlink(file)  # before the lock ends: whoever opened the file sees that it is gone
        os.close(descriptor)


def _acquired(file: Path, what: str, remedy: str) -> int:
    """Returns the descriptor of a lock file that this process holds from now on."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        taken = False
        try:
            ours, certain = _flock(descriptor)
            owner = owner_in(os.pread(descriptor, 4096, 0), file)
            # The machine's own lock is free: a holder of this machine is dead.
            dead = certain and owner.get("machine") == machine()
            if not ours or (owner and not dead and shows_life(lambda: _touched(file), what, owner)):
                raise lock_error(what, owner, remedy)
            with suppress(FileNotFoundError):  # or the holder ended and removed the file: try again
                taken = os.path.samestat(os.stat(file), os.fstat(descriptor))
            if taken:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(facts()).encode(), 0)
                return descriptor
        finally:
            if not taken:
                os.close(descriptor)


def _flock(descriptor: int) -> tuple[bool, bool]:
    """Tries to take the system's lock: whether no other process has it, and whether the system can tell."""
    if fcntl is None:
        return True, False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES), False
    return True, True


def facts() -> dict[str, Any]:
    """Returns what a lock says of its holder, this process."""
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {"process": os.getpid(), "host": socket.gethostname(), "since": since, "machine": machine()}


@lru_cache
def machine() -> str:
    """Returns what tells this machine, since its start, from others."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def owner_in(content: bytes, file: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the facts in the content of a lock file; nothing where it is new.

    Raises:
        UserError: where it is another kind of file.
    """
    if not content:
        return {}
    with suppress(ValueError, RecursionError):
        found = json.loads(content)
        if isinstance(found, dict) and facts().keys() <= found.keys():
            return found
    raise UserError(f"{file} is not a lock file that jaxlm wrote; move it away")


def lock_error(what: str, owner: dict[str, Any], remedy: str) -> UserError:
    """Returns the error of a lock that another process holds."""
    process, host, since = (owner.get(name, "?") for name in ("process", "host", "since"))
    return UserError(
        f"{what} is held by process {process} on host {host} since {since}; wait until it ends, or {remedy}"
    )


def shows_life(state: Callable[[], Any], what: str, owner: dict[str, Any]) -> bool:
    """Returns whether the holder of a lock on another machine changes its `state` within `SILENCE` seconds.

    A state of None means that the lock is gone.
    """
    print(
        f"{what} was last held by process {owner['process']} on host {owner['host']}; waiting up to {SILENCE:.0f} s "
        f"for a sign of life",
        file=sys.stderr,
        flush=True,
    )
    end, before = time.monotonic() + SILENCE, state()
    while time.monotonic() < end:
        time.sleep(min(1.0, BEAT / 5))
        if (now := state()) is None:
            return False
        if now != before:
            return True
    return False


def _touched(file: Path) -> int | None:
    """Returns the time of a file; to open it asks a network file system for the present one."""
    with suppress(FileNotFoundError), open(file, "rb") as stream:
        return os.fstat(stream.fileno()).st_mtime_ns
    return None


def _beat(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(descriptor)


# Content


def content_hash(file: str | os.PathLike[str]) -> str:
    """Returns 64 hexadecimal digits, a SHA-256 tree hash of every byte of a file.

    Parts of 16 MiB are hashed in threads.  A process reads a file once, unless its size, times or inode change.

    Raises:
        OSError: where the file cannot be read, or is no regular file.
    """
    with open(file, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as stream:
        state = os.fstat(stream.fileno())
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(file))
    identity = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    path = os.path.realpath(file)
    # Two changes within one tick of the file system's clock leave the same times.
    recent = abs(time.time() - state.st_ctime) < _TICK
    return _read_hash(path, identity) if recent else _remembered_hash(path, identity)


@lru_cache(maxsize=1 << 16)
def _remembered_hash(path: str, identity: tuple[int, ...]) -> str:
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
