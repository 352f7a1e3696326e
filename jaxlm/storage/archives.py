"""Entries of archives (zip, tar): which of them may be read, and where links among them lead."""

from __future__ import annotations

import posixpath
import stat
from typing import Any

from jaxlm.errors import UserError

_LINKS = 40  # links in a row, as Linux has it


def entry_of(storage: Any, name: str) -> str:
    """Returns the entry that holds the content of an entry: itself, or the one that a link in the archive leads to.

    Args:
        storage: a file system of fsspec; any but those of archives has no links of this kind.
        name: the name of the entry in it.

    Raises:
        UserError: for a link that leads out of the archive, to a folder or to nothing, and for a device or a pipe.
    """
    storage = getattr(storage, "fs", None) or storage  # of a cache in front of the archive
    kind_of = _of_tar if hasattr(storage, "tar") else _of_zip if hasattr(storage, "zip") else None
    if kind_of is None:
        return name
    found = name
    for _ in range(_LINKS):
        kind, target = kind_of(storage, found)
        if kind == "file":
            return found
        if kind != "link":
            raise UserError(f"the entry {name!r} of the archive is a {kind}, not a file; leave it out of the archive")
        found = posixpath.normpath(target)
        if target.startswith("/") or found == ".." or found.startswith("../"):
            raise UserError(
                f"the entry {name!r} of the archive is a link to {target!r}, outside of the archive; put the file "
                f"itself there"
            )
    raise UserError(f"the entry {name!r} of the archive is a link that leads back to itself; put the file itself there")


def _of_tar(storage: Any, name: str) -> tuple[str, str]:
    """Returns the kind of an entry, and where a link leads, from the top of the archive."""
    known = storage.index.get(name) if isinstance(storage.index, dict) else None
    try:
        member = storage.tar.getmember(known[2] if known else name)
    except KeyError:
        return "link to nothing", ""
    if member.issym() or member.islnk():
        beside = posixpath.dirname(name) if member.issym() else ""
        return "link", posixpath.join(beside, member.linkname)
    return "file" if member.isreg() else "folder" if member.isdir() else "device or pipe", ""


def _of_zip(storage: Any, name: str) -> tuple[str, str]:
    try:
        member = storage.zip.getinfo(name)
    except KeyError:
        return "link to nothing", ""
    mode = member.external_attr >> 16
    if stat.S_ISLNK(mode):
        target = storage.zip.read(member).decode(errors="surrogateescape")
        return "link", posixpath.join(posixpath.dirname(name), target)
    kind = stat.S_IFMT(mode)
    return ("file" if kind in (0, stat.S_IFREG) else "folder" if kind == stat.S_IFDIR else "device or pipe"), ""
