"""Untrusted names stay in their folder, writes are atomic, and one process at a time holds a lock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxlm import LM, UserError, save
from jaxlm.run.folder import RowWriter
from jaxlm.storage import disk

INVALID_NAMES = {
    "parent": ("../x", "contains '..'"),
    "parent below": ("a/../../x", "contains '..'"),
    "only parent": ("..", "contains '..'"),
    "backslashes": ("..\\x", "contains '..'"),
    "absolute": ("/etc/x", "absolute"),
    "network share": ("\\\\host\\x", "absolute"),
    "drive": ("C:\\x", "absolute"),
    "drive with a slash": ("c:/x", "absolute"),
    "drive alone": ("C:", "absolute"),
    "zero byte": ("a\0b", "zero byte"),
    "overlong": ("a/" + "x" * 256, "longer than 255 bytes"),
    "overlong in bytes": ("é" * 128, "longer than 255 bytes"),
    "empty": ("", "names no file"),
    "the folder": ("./", "names no file"),
}


@pytest.mark.parametrize("name", INVALID_NAMES)
def test_names_outside_the_folder_raise_an_error(tmp_path, name):
    path, message = INVALID_NAMES[name]
    with pytest.raises(UserError, match=message):
        disk.path_inside(tmp_path, path)


@pytest.mark.parametrize("name", ["x", "a/b.txt", ".hidden", "a..b", "...", "a:b", "é" * 127, "a b/c#?.txt"])
def test_valid_names_are_below_the_folder(tmp_path, name):
    assert disk.path_inside(tmp_path, name) == tmp_path / name
    assert disk.path_inside(tmp_path / "new", name) == tmp_path / "new" / name


def test_links_to_other_folders_raise_an_error(tmp_path):
    folder, other = tmp_path / "folder", tmp_path / "other"
    for parent in (folder, other):
        parent.mkdir()
        (parent / "x").write_text(parent.name)
    for name, target in {"out": other, "up": "..", "in": "x", "loop": "loop"}.items():
        (folder / name).symlink_to(target)
    assert disk.path_inside(folder, "in") == folder / "in"
    for name in ("out", "out/x", "up", "up/other/x"):
        with pytest.raises(UserError, match="is a link to"):
            disk.path_inside(folder, name)
    assert disk.path_inside(folder, "out/x", also=(other,)).read_text() == "other"
    (tmp_path / "link").symlink_to(folder)
    assert disk.path_inside(tmp_path / "link", "x").read_text() == "folder"


def test_nothing_is_written_to_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXLM_CACHE", "gs://bucket/cache")
    lm = object.__new__(LM)
    address = "gs://bucket/x"
    writers: dict[str, Callable[[], object]] = {
        "folder": lambda: save(lm, address),
        "output": lambda: RowWriter(f"{address}.csv"),
        "JAXLM_CACHE": disk.cache_folder,
        "data.cache": lambda: disk.cache_folder(address),
    }
    for field, write in writers.items():
        with pytest.raises(UserError, match=f"{field} is 'gs://bucket/.*an address; choose a local path"):
            write()
    assert not [*tmp_path.iterdir()]


def test_a_file_is_written_atomically_without_changes_to_other_files(tmp_path):
    theirs = [
        tmp_path / name for name in ("x.csv.part", "x.part", "x.csv.tmp", "x.csv.old", f"x.csv.{os.getpid()}.tmp")
    ]
    for file in theirs:
        file.write_text("mine")
    path = tmp_path / "x.csv"
    with disk.atomic_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists() and disk.is_temporary(temporary.name)
    with pytest.raises(KeyError), disk.atomic_file(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "new" and {file.read_text() for file in theirs} == {"mine"}
    assert set(tmp_path.iterdir()) == {path, *theirs}
    assert not any(disk.is_temporary(file.name) for file in [path, *theirs])


def test_a_file_of_another_process_is_kept_and_no_content_is_lost(tmp_path):
    path = tmp_path / "x.csv"
    with pytest.raises(UserError, match="written by another process") as message, disk.atomic_file(path, False) as file:
        file.write_text("ours")
        path.write_text("theirs")
    assert path.read_text() == "theirs" and Path(str(message.value).rpartition(" ")[2]).read_text() == "ours"


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "target").mkdir()
    for name, overwrite in (("x", True), ("y", False)):
        (tmp_path / name).symlink_to(tmp_path / "target" / name)
        with disk.atomic_file(tmp_path / name, overwrite) as temporary:
            temporary.write_text("new")
        assert (tmp_path / name).is_symlink() and (tmp_path / "target" / name).read_text() == "new"


def test_a_folder_is_written_atomically_without_changes_to_other_folders(tmp_path):
    folder = tmp_path / "model"
    for name in ("model.part", "model.old", "model.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    for overwrite in (False, True):
        with disk.atomic_folder(folder, overwrite) as temporary:
            (temporary / f"new-{overwrite}").write_text("")
    assert [file.name for file in folder.iterdir()] == ["new-True"]
    with pytest.raises(UserError, match="exists and is not empty"), disk.atomic_folder(folder):
        pass
    with pytest.raises(KeyError), disk.atomic_folder(folder, True) as temporary:
        raise KeyError
    assert [file.name for file in folder.iterdir()] == ["new-True"]
    assert sorted(file.name for file in tmp_path.rglob("*") if file.name == "mine") == ["mine"] * 3
    assert len(list(tmp_path.iterdir())) == 4


HOLDER = """
import sys, time
from pathlib import Path
from jaxlm.storage import disk
with disk.lock(Path(sys.argv[1]), "x", "y"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    file = tmp_path / disk.LOCK
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(file)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        pattern = (
            rf"runs/x is held by process {holder.pid} on host \S+ since 2\d+-\d+-\d+ [\d:]+ UTC; wait .* or choose"
        )
        with pytest.raises(UserError, match=pattern), disk.lock(file, "runs/x", "choose another"):
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert file.exists()
    with disk.lock(file, "runs/x", "choose another"):
        assert json.loads(file.read_text())["process"] == os.getpid()
        with pytest.raises(UserError, match=f"process {os.getpid()} "), disk.lock(file, "runs/x", "choose another"):
            pass
    assert not file.exists()


@pytest.mark.parametrize("alive", [True, False])
def test_a_lock_holder_on_another_machine_is_recognised_by_its_heartbeats(tmp_path, monkeypatch, alive):
    """The file imitates a file system that does not share its locks between machines."""
    monkeypatch.setattr(disk, "LOCK_TIMEOUT", 1.0)
    monkeypatch.setattr(disk, "HEARTBEAT", 0.1)
    file = tmp_path / disk.LOCK
    file.write_text(json.dumps({"process": 7, "host": "far", "since": "2026-01-01 00:00:00 UTC", "machine": "another"}))
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(0.1):
            os.utime(file, ns=(time.time_ns(), time.time_ns()))

    thread = threading.Thread(target=touch)
    if alive:
        thread.start()
    try:
        if alive:
            with (
                pytest.raises(UserError, match="held by process 7 on host far since 2026"),
                disk.lock(file, "x", "y"),
            ):
                pass
        else:
            with disk.lock(file, "x", "y"):
                assert json.loads(file.read_text())["process"] == os.getpid()
    finally:
        ended.set()
        if alive:
            thread.join()


def test_a_file_that_is_not_a_lock_is_not_changed(tmp_path):
    file = tmp_path / disk.LOCK
    file.write_text("mine")
    with pytest.raises(UserError, match="is not a lock file"), disk.lock(file, "x", "y"):
        pass
    assert file.read_text() == "mine"


def test_a_hash_depends_on_every_byte(tmp_path):
    file, size = tmp_path / "x", 3 * disk._PART + 5
    content = bytearray(size)
    hashes = set()
    for position in (None, 0, disk._PART - 1, disk._PART, size // 2, size - 1):
        if position is not None:
            content[position] ^= 1
        file.write_bytes(content)
        os.utime(file, ns=(0, 0))
        hashes.add(disk.content_hash(file))
    assert len(hashes) == 6
    file.write_bytes(content + b"\0")
    assert disk.content_hash(file) not in hashes
    (tmp_path / "y").write_bytes(b"")
    assert len(disk.content_hash(tmp_path / "y")) == 64
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        disk.content_hash(tmp_path / "pipe")


def test_predictions_are_written_without_changes_to_other_files(tmp_path):
    theirs = [tmp_path / name for name in ("o.csv.part", "o.part", "o.csv.tmp")]
    for file in theirs:
        file.write_text("mine")
    with RowWriter(str(tmp_path / "o.csv")) as writer:
        writer.write({"text": "a"}, {"prediction": "b"})
        with pytest.raises(UserError, match=rf"o.csv is held by process {os.getpid()} .* choose another --output"):
            RowWriter(str(tmp_path / "o.csv")).__enter__()
    assert (tmp_path / "o.csv").read_text() == "text,prediction\na,b\n"
    assert set(tmp_path.iterdir()) == {tmp_path / "o.csv", *theirs}
    with pytest.raises(KeyError), RowWriter(str(tmp_path / "p.csv")) as writer:
        writer.write({"text": "a"}, {"prediction": "b"})
        raise KeyError
    with pytest.raises(UserError, match="written by another process"), RowWriter(str(tmp_path / "q.csv")) as writer:
        writer.write({"text": "a"}, {"prediction": "b"})
        (tmp_path / "q.csv").write_text("theirs")
    assert (tmp_path / "q.csv").read_text() == "theirs" and not (tmp_path / "p.csv").exists()
    assert {file.read_text() for file in theirs} == {"mine"}
