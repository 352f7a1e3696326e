"""Data, weights and run folders at addresses; a folder of this machine by file:// and a storage in memory stand in."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pytest

import jaxlm
from jaxlm import CausalLM, DataConfig, ModelConfig, RunConfig, TokenizerConfig, UserError, buckets
from jaxlm.data import source
from jaxlm.errors import RunError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    buckets.brought.cache_clear()


@pytest.fixture
def memory():
    storage = fsspec.filesystem("memory")
    storage.store.clear()
    return storage


def test_files_folders_and_globs_are_brought(memory):
    for name in ("a.txt", "b.txt", "deep/c.txt", "d.csv"):
        memory.pipe(f"/data/{name}", name.encode())
    assert Path(buckets.brought("memory://data/a.txt")).read_text() == "a.txt"
    names = lambda path: sorted(file.name for file in source.files(path))
    assert names("memory://data") == ["a.txt", "b.txt", "c.txt", "d.csv"]
    assert names("memory://data/*.txt") == ["a.txt", "b.txt"]
    assert buckets.brought("here/a.txt") == "here/a.txt"


def test_what_has_changed_is_brought_again_and_nothing_else(memory, monkeypatch):
    memory.pipe("/data/a.txt", b"one")
    memory.pipe("/data/b.txt", b"two")
    folder = Path(buckets.brought("memory://data"))
    fetched = []
    get_file = type(memory).get_file
    monkeypatch.setattr(
        type(memory), "get_file", lambda self, a, b, **k: fetched.append(a) or get_file(self, a, b, **k)
    )
    memory.pipe("/data/b.txt", b"three")
    memory.rm_file("/data/a.txt")
    buckets.brought.cache_clear()
    assert Path(buckets.brought("memory://data")) == folder
    assert fetched == ["/data/b.txt"]
    assert sorted(file.name for file in source.files(str(folder))) == ["b.txt"]


def tiny(folder: Path, workdir: str) -> RunConfig:
    return RunConfig(
        model=ModelConfig(vocabulary=40, max_length=16, width=8, layers=1, heads=1),
        task=CausalLM(),
        data=DataConfig(path=f"file://{folder}/text.txt", length=16, eval_fraction=0.2),
        tokenizer=TokenizerConfig(train="characters"),
        batch=2,
        steps=6,
        log_every=1,
        checkpoint_every=2,
        sample_tokens=0,
        workdir=workdir,
    )


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.usefixtures("no_pictures", "devices")
def test_a_run_at_an_address_goes_on_on_another_machine(tmp_path, monkeypatch):
    """Its folder is in the bucket after a stop; a machine without the copy ends the run as if it had not stopped."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    jaxlm.fit(tiny(tmp_path, str(tmp_path / "plain")))
    bucket = tmp_path / "bucket" / "run"
    run = tiny(tmp_path, f"file://{bucket}")
    asked = []
    with pytest.raises(jaxlm.errors.Stopped):
        jaxlm.fit(run, stop=lambda: asked.append(1) or len(asked) == 3)
    assert (bucket / "config.json").exists() and (bucket / "checkpoints" / "3").is_dir()
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "another"))
    buckets.brought.cache_clear()
    jaxlm.fit(run)
    assert losses(bucket) == losses(tmp_path / "plain")
    assert (bucket / "report.html").exists() and (bucket / "export" / "model.safetensors").exists()
    kept = {step.name for step in (bucket / "checkpoints").iterdir()}
    assert kept == {step.name for step in (tmp_path / "plain" / "checkpoints").iterdir()}
    buckets.brought.cache_clear()
    lm = jaxlm.load(f"file://{bucket}")
    assert lm.config.vocabulary == 40 and lm.tokenizer is not None
    told = jaxlm.fit(replace(run, steps=6))  # a finished run says so, and returns its model
    assert told.config == lm.config


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://nowhere/a.txt", "there is nothing at memory://nowhere/a.txt"),
        ("gss://bucket/a.txt", "unknown storage, 'gss'"),
        ("s3://bucket/a.txt", "pip install s3fs"),
    ],
)
def test_mistakes(address, message, memory):
    if address.startswith("s3") and find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(UserError, match=message):
        source.files(address)


def test_a_refusal_is_said(monkeypatch, memory):
    def refuse(self, *_, **__):
        raise PermissionError("anonymous caller does not have storage.objects.list access")

    monkeypatch.setattr(type(memory), "exists", refuse)
    with pytest.raises(RunError, match=r"memory://b/run cannot be used: anonymous caller .*; look at"):
        buckets.RunFolder("memory://b/run").bring()
