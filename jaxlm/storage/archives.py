"""Entries of zip and tar archives: which of them may be read, and the targets of links."""

from __future__ import annotations

import posixpath
import stat
from typing import Any

from jaxlm.errors import UserError

_MAX_LINKS = 40  # consecutive links, as in Linux


def entry_of(storage: Any, name: str) -> str:
    """Returns the name of the entry that holds the content of an entry, after following links in the archive.

    Args:
      storage: an fsspec file system; if it is not an archive, `name` is returned unchanged.
      name: the name of the entry.

    Raises:
      UserError: if a link points outside the archive, to a folder or to a missing entry, or if the entry is a device
        or a pipe.
    """
    storage = getattr(storage, "fs", None) or storage  # unwrap a cache in front of the archive
    read_entry = _tar_entry if hasattr(storage, "tar") else _zip_entry if hasattr(storage, "zip") else None
    if read_entry is None:
        return name
    current = name
    for _ in range(_MAX_LINKS):
        kind, target = read_entry(storage, current)
        if kind == "file":
            return current
        if kind != "link":
            raise UserError(f"the archive entry {name!r} is a {kind}, not a file; remove it from the archive")
        current = posixpath.normpath(target)
        if target.startswith("/") or current == ".." or current.startswith("../"):
            raise UserError(
                f"the archive entry {name!r} is a link to {target!r}, outside the archive; replace it with the file"
            )
    raise UserError(f"the archive entry {name!r} is a link to itself; replace it with the file")


def _tar_entry(storage: Any, name: str) -> tuple[str, str]:
    """Returns the kind of an entry, and the target of a link as a path from the root of the archive."""
    known = storage.index.get(name) if isinstance(storage.index, dict) else None
    try:
        member = storage.tar.getmember(known[2] if known else name)
    except KeyError:
        return "link to a missing entry", ""
    if member.issym() or member.islnk():
        parent = posixpath.dirname(name) if member.issym() else ""
        return "link", posixpath.join(parent, member.linkname)
    return "file" if member.isreg() else "folder" if member.isdir() else "device or pipe", ""


def _zip_entry(storage: Any, name: str) -> tuple[str, str]:
    try:
        member = storage.zip.getinfo(name)
    except KeyError:
        return "link to a missing entry", ""
    mode = member.external_attr >> 16
    if stat.S_ISLNK(mode):
        target = storage.zip.read(member).decode(errors="surrogateescape")
        return "link", posixpath.join(posixpath.dirname(name), target)
    kind = stat.S_IFMT(mode)
    return ("file" if kind in (0, stat.S_IFREG) else "folder" if kind == stat.S_IFDIR else "device or pipe"), ""
