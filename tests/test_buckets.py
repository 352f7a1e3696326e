"""Data, weights and run folders at addresses: file:// and memory:// replace real buckets."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pytest

import jaxlm
from jaxlm import CausalLM, DataConfig, ModelConfig, RunConfig, TokenizerConfig, UserError
from jaxlm.data import source
from jaxlm.errors import RunError
from jaxlm.storage import buckets, disk


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    buckets.download.cache_clear()


@pytest.fixture
def memory():
    disk = fsspec.filesystem("memory")
    disk.store.clear()
    return disk


def test_files_folders_and_globs_are_downloaded(memory):
    for name in ("a.txt", "b.txt", "deep/c.txt", "d.csv"):
        memory.pipe(f"/data/{name}", name.encode())
    assert Path(buckets.download("memory://data/a.txt")).read_text() == "a.txt"
    names = lambda path: sorted(file.name for file in source.list_files(path))
    assert names("memory://data") == ["a.txt", "b.txt", "c.txt", "d.csv"]
    assert names("memory://data/*.txt") == ["a.txt", "b.txt"]
    assert buckets.download("here/a.txt") == "here/a.txt"


def test_only_changed_files_are_downloaded_again(memory, monkeypatch):
    memory.pipe("/data/a.txt", b"one")
    memory.pipe("/data/b.txt", b"two")
    folder = Path(buckets.download("memory://data"))
    downloads = []
    get_file = type(memory).get_file
    monkeypatch.setattr(
        type(memory), "get_file", lambda self, a, b, **k: downloads.append(a) or get_file(self, a, b, **k)
    )
    memory.pipe("/data/b.txt", b"three")
    memory.rm_file("/data/a.txt")
    buckets.download.cache_clear()
    assert Path(buckets.download("memory://data")) == folder
    assert downloads == ["/data/b.txt"]
    assert sorted(file.name for file in source.list_files(str(folder))) == ["b.txt"]


def test_a_model_at_an_address_is_checked_at_each_load(memory):
    for content in (b"{}", b'{"changed": 1}'):
        memory.pipe("/model/config.json", content)
        assert (buckets.model("memory://model") / "config.json").read_bytes() == content


def tiny_config(folder: Path, workdir: str) -> RunConfig:
    return RunConfig(
        model=ModelConfig(vocabulary=40, max_length=16, width=8, layers=1, heads=1),
        task=CausalLM(),
        data=DataConfig(path=f"file://{folder}/text.txt", length=16, eval_fraction=0.2),
        tokenizer=TokenizerConfig(train="characters"),
        batch=2,
        steps=6,
        log_every=1,
        checkpoint_every=2,
        keep_checkpoints=True,
        sample_tokens=0,
        workdir=workdir,
    )


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.usefixtures("no_plots", "devices")
def test_a_run_at_an_address_resumes_on_another_machine(tmp_path, monkeypatch):
    """After a stop the bucket contains the folder. A machine without the copy finishes the run with the same result."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    jaxlm.fit(tiny_config(tmp_path, str(tmp_path / "plain")))
    bucket = tmp_path / "bucket" / "run"
    run = tiny_config(tmp_path, f"file://{bucket}")
    calls = []
    with pytest.raises(jaxlm.errors.Stopped):
        jaxlm.fit(run, stop=lambda: calls.append(1) or len(calls) == 3)
    assert (bucket / "config.json").exists() and (bucket / "checkpoints" / "3").is_dir()
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "another"))
    buckets.download.cache_clear()
    jaxlm.fit(run)
    assert losses(bucket) == losses(tmp_path / "plain")
    assert (bucket / "report.html").exists() and (bucket / "export" / "model.safetensors").exists()
    kept = {step.name for step in (bucket / "checkpoints").iterdir()}
    assert kept == {step.name for step in (tmp_path / "plain" / "checkpoints").iterdir()}
    buckets.download.cache_clear()
    lm = jaxlm.load(f"file://{bucket}")
    assert lm.config.vocabulary == 40 and lm.tokenizer is not None
    again = jaxlm.fit(replace(run, steps=6))  # a finished run only returns its model
    assert again.config == lm.config


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://nowhere/a.txt", "no file exists at memory://nowhere/a.txt"),
        ("gss://bucket/a.txt", "unknown scheme 'gss'"),
        ("s3://bucket/a.txt", "pip install s3fs"),
    ],
)
def test_invalid_addresses_are_refused(address, message, memory):
    if address.startswith("s3") and find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(UserError, match=message):
        source.list_files(address)


def test_errors_of_the_storage_are_reported_in_one_message(monkeypatch, memory):
    def refuse(self, *_, **__):
        raise PermissionError("anonymous caller does not have storage.objects.list access")

    monkeypatch.setattr(type(memory), "exists", refuse)
    with pytest.raises(RunError, match=r"memory://b/run cannot be used: anonymous caller .*; check the address"):
        buckets.RunFolder("memory://b/run").bring()


# Untrusted names

ESCAPES = ["../x.txt", "a/../../x.txt", "/x.txt", "..\\x.txt", "C:\\x.txt", f"{'y' * 300}.txt"]


def write_archive(file: Path, entries: dict[str, bytes]) -> str:
    """Writes an archive, and returns the scheme of its address."""
    if file.suffix == ".zip":
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
        return "zip"
    with tarfile.open(file, "w") as archive:
        for name, content in entries.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return "tar"


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
@pytest.mark.parametrize("name", ESCAPES, ids=lambda name: name[:12])
def test_an_archive_writes_nothing_outside_its_copy(tmp_path, suffix, name):
    file = tmp_path / f"data{suffix}"
    kind = write_archive(file, {"fine.txt": b"fine\n", name: b"evil\n"})
    for path in ("", "*", "*.txt", "**"):
        before = {path for path in tmp_path.rglob("*") if path.is_file()}
        try:
            found = source.list_files(f"{kind}://{path}::{file}")
        except (UserError, RunError) as error:
            assert "\n" not in str(error)
        else:  # a glob that does not match the entry
            assert [file.read_text() for file in found] == ["fine\n"]
        new = {path for path in tmp_path.rglob("*") if path.is_file()} - before
        copies = tmp_path / "cache" / "buckets"
        assert all((path.is_relative_to(copies) and path.parent != copies) or path.suffix == ".json" for path in new)
        assert not any(path.read_bytes() == b"evil\n" for path in new)
    with pytest.raises(UserError, match="a name must refer to a file in"):
        jaxlm.load(f"{kind}://::{file}")


LINKS = {
    "symbolic, absolute": (tarfile.SYMTYPE, "/etc/hostname", "outside the archive"),
    "symbolic, above": (tarfile.SYMTYPE, "../../secret", "outside the archive"),
    "hard, above": (tarfile.LNKTYPE, "../secret", "outside the archive"),
    "to itself": (tarfile.SYMTYPE, "link.txt", "is a link to itself"),
    "to nothing": (tarfile.SYMTYPE, "gone.txt", "link to a missing entry"),
    "to a folder": (tarfile.SYMTYPE, "deep", "a folder, not a file"),
    "pipe": (tarfile.FIFOTYPE, "", "device or pipe"),
    "device": (tarfile.CHRTYPE, "", "device or pipe"),
    "inside": (tarfile.SYMTYPE, "deep/a.txt", ""),
    "inside, hard": (tarfile.LNKTYPE, "deep/a.txt", ""),
}


@pytest.mark.parametrize("name", LINKS)
def test_links_out_of_archives_are_refused(tmp_path, name):
    kind, target, message = LINKS[name]
    (tmp_path / "secret").write_text("secret")
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        folder = tarfile.TarInfo("deep")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        file = tarfile.TarInfo("deep/a.txt")
        file.size = 2
        archive.addfile(file, io.BytesIO(b"a\n"))
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = kind, target
        archive.addfile(link)
    if message:
        with pytest.raises(UserError, match=message):
            source.list_files(f"tar://::{tmp_path}/data.tar")
    else:
        found = source.list_files(f"tar://::{tmp_path}/data.tar")
        assert [(file.name, file.read_text()) for file in found] == [("a.txt", "a\n"), ("link.txt", "a\n")]


@pytest.mark.parametrize(("target", "message"), [("../../secret", "outside the archive"), ("a.txt", "")])
def test_links_out_of_zip_files_are_refused(tmp_path, target, message):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("a.txt", "a\n")
        link = zipfile.ZipInfo("link.txt")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, target)
    address = f"zip://::{tmp_path}/data.zip"
    if message:
        with pytest.raises(UserError, match=message):
            source.list_files(address)
    else:
        assert [file.read_text() for file in source.list_files(address)] == ["a\n", "a\n"]


@pytest.mark.parametrize("entries", [["a", "a/b.txt"], ["a.txt", "./a.txt"], ["b/a.txt", "b//a.txt"]])
def test_conflicting_names_are_refused(tmp_path, entries):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for name in entries:
            archive.writestr(name, "x")
    with pytest.raises(UserError, match="remove one of them"):
        source.list_files(f"zip://::{tmp_path}/data.zip")


@pytest.mark.parametrize("cache", ["", "simplecache::"])
def test_globs_keep_folders_separate(tmp_path, cache):
    kind = write_archive(tmp_path / "data.zip", {"de/a.txt": b"de\n", "en/a.txt": b"en\n", "en/b.csv": b"text\n"})
    found = source.list_files(f"{cache}{kind}://*/*.txt::{tmp_path}/data.zip")
    assert [file.read_text() for file in found] == ["de\n", "en\n"]


def test_a_changed_archive_is_read_again(tmp_path):
    """The new content has the same name, size and time."""
    file = tmp_path / "data.tar"
    for content in (b"one\n", b"two\n"):
        write_archive(file, {"a.txt": content})
        os.utime(file, ns=(0, 0))
        buckets.download.cache_clear()
        assert [file.read_bytes() for file in source.list_files(f"tar://a.txt::{file}")] == [content]


@pytest.mark.parametrize("damage", [b"", b"three", b"tw"])
def test_a_damaged_copy_is_downloaded_again(memory, damage):
    memory.pipe("/data/a.txt", b"one\n")
    memory.pipe("/data/b.txt", b"two\n")
    for _ in range(2):
        files = source.list_files("memory://data")
        assert [file.read_bytes() for file in files] == [b"one\n", b"two\n"]
        files[1].write_bytes(damage)
        buckets.download.cache_clear()


# Run folders


def test_files_of_the_user_in_a_run_folder_are_kept(memory, tmp_path):
    """The user adds files before and during the run, also in its subfolders, and changes a downloaded file."""
    memory.pipe("/b/run/notes.md", b"before")
    memory.pipe("/b/run/old.json", b"of the run")
    run = buckets.RunFolder("memory://b/run")
    with run.opened():
        (run.folder / "old.json").unlink()
        (run.folder / "checkpoints" / "3").mkdir(parents=True)
        (run.folder / "checkpoints" / "3" / "state").write_text("3")
        run.send()
        memory.pipe("/b/run/notes.md", b"changed meanwhile")
        memory.pipe("/b/run/checkpoints/3/why.txt", b"a note")
        memory.pipe("/b/run/more/plot.png", b"a picture")
        (run.folder / "checkpoints" / "3" / "state").unlink()
        (run.folder / "checkpoints" / "6").mkdir()
        (run.folder / "checkpoints" / "6" / "state").write_text("6")
        run.send()
    kept = {name: memory.cat(f"/b/run/{name}") for name in ("notes.md", "checkpoints/3/why.txt", "more/plot.png")}
    assert kept == {
        "notes.md": b"changed meanwhile",
        "checkpoints/3/why.txt": b"a note",
        "more/plot.png": b"a picture",
    }
    names = {name.removeprefix("/b/run/") for name in memory.find("/b/run")}
    assert names == kept.keys() | {"checkpoints/6/state"}


def test_only_new_files_are_uploaded_and_downloaded(memory, monkeypatch):
    memory.pipe("/b/run/a.txt", b"a")
    transfers = []
    for name in ("get_file", "put_file"):
        real = getattr(type(memory), name)
        monkeypatch.setattr(
            type(memory),
            name,
            lambda self, a, b, real=real, **k: transfers.append(Path(b).name) or real(self, a, b, **k),
        )
    run = buckets.RunFolder("memory://b/run")
    with run.opened():
        (run.folder / "new.txt").write_text("new")
        run.send()
        run.send()
    assert transfers[1:] == ["new.txt"]
    with run.opened():
        run.send()
    assert len(transfers) == 2


def test_a_run_at_an_address_is_locked(memory, monkeypatch, tmp_path):
    monkeypatch.setattr(disk, "LOCK_TIMEOUT", 0.5)
    monkeypatch.setattr(disk, "HEARTBEAT", 0.05)
    with buckets.RunFolder("memory://b/run").opened():
        assert json.loads(memory.cat("/b/run/.jaxlm-lock"))["process"] == os.getpid()
        with pytest.raises(UserError, match=f"memory://b/run is held by process {os.getpid()} on host"):
            buckets.RunFolder("memory://b/run").opened().__enter__()
        monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "elsewhere"))  # as on another machine
        with monkeypatch.context() as patch:
            patch.setattr(disk, "machine", lambda: "another")
            patch.setattr(disk, "lock", lambda *_: nullcontext())
            with pytest.raises(UserError, match=f"memory://b/run is held by process {os.getpid()} on host"):
                buckets.RunFolder("memory://b/run").opened().__enter__()
    assert not memory.exists("/b/run/.jaxlm-lock")
    dead = disk.lock_facts() | {"machine": "another", "process": 7}
    memory.pipe("/b/run/.jaxlm-lock", json.dumps(dead).encode())
    with buckets.RunFolder("memory://b/run").opened():
        assert json.loads(memory.cat("/b/run/.jaxlm-lock"))["process"] == os.getpid()
