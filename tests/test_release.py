"""What is released: a wheel and a source archive, which serve outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import jaxlm

ROOT = Path(__file__).parent.parent


def told(*command: str | Path, where: Path, **environment: str) -> str:
    """What a command that must succeed prints."""
    done = subprocess.run(
        list(map(str, command)), cwd=where, env=os.environ | environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder of the source archive, and of the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    told(sys.executable, "-m", "build", "--outdir", folder, ROOT, where=ROOT)
    return folder


@pytest.mark.long
def test_both_hold_what_they_must(built):
    [wheel], [source] = built.glob("*.whl"), built.glob("*.tar.gz")
    assert f"jaxlm-{jaxlm.__version__}-" in wheel.name and f"jaxlm-{jaxlm.__version__}." in source.name
    if not (ROOT / ".git").exists():
        pytest.skip("what belongs to the repository is asked of git, and this is no checkout")
    tracked = told("git", "ls-files", where=ROOT).split()
    package = {name for name in tracked if name.startswith("jaxlm/")}
    configs = {name for name in tracked if name.startswith("configs/")}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == package | {f"jaxlm/{name}" for name in configs}
    with tarfile.open(source) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert held >= set(tracked) - {name for name in tracked if name.startswith(".")}


@pytest.mark.long
def test_a_wheel_serves_outside_the_repository(built, tmp_path):
    """Installed alone, beside nothing of the repository, it finds its configs by name and trains."""
    [wheel] = built.glob("*.whl")
    told(sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "site", wheel, where=tmp_path)
    outside = {"PYTHONPATH": str(tmp_path / "site")}
    python = lambda *words: told(sys.executable, *words, where=tmp_path, **outside)
    assert str(tmp_path / "site") in python("-c", "import jaxlm; print(jaxlm.__file__)")
    python("-m", "jaxlm", "train", "quickstart", "--steps", "2", "--model.layers", "1", "--task.stride", "256")
    assert (tmp_path / "runs" / "quickstart" / "export" / "model.safetensors").exists()
    assert python("-m", "jaxlm", "generate", "runs/quickstart", "--prompt", "The ", "--max-new-tokens", "4")
    assert "shakespeare_char" in python("-m", "jaxlm", "train", "shakespeare_char", "--help")
