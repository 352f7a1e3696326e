"""The wheel and the source archive are complete and work outside the repository."""

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


def run_command(*command: str | Path, folder: Path, **environment: str) -> str:
    """Runs a command in a folder, requires that it succeeds, and returns its output."""
    process = subprocess.run(
        list(map(str, command)), cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def distribution(tmp_path_factory) -> Path:
    """Returns the folder with the source archive and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run_command(sys.executable, "-m", "build", "--outdir", folder, ROOT, folder=ROOT)
    return folder


@pytest.mark.long
def test_wheel_and_source_archive_are_complete(distribution):
    [wheel], [source] = distribution.glob("*.whl"), distribution.glob("*.tar.gz")
    assert f"jaxlm-{jaxlm.__version__}-" in wheel.name and f"jaxlm-{jaxlm.__version__}." in source.name
    if not (ROOT / ".git").exists():
        pytest.skip("git lists the files of the repository, but this folder is not a checkout")
    tracked = run_command("git", "ls-files", folder=ROOT).split()
    package = {name for name in tracked if name.startswith("jaxlm/")}
    configs = {name for name in tracked if name.startswith("configs/")}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == package | {f"jaxlm/{name}" for name in configs}
    with tarfile.open(source) as archive:
        archived = {name.partition("/")[2] for name in archive.getnames()}
    assert archived >= set(tracked) - {name for name in tracked if name.startswith(".")}


@pytest.mark.long
def test_a_wheel_works_outside_the_repository(distribution, tmp_path):
    """A wheel that is installed without the repository finds its configs by name and trains."""
    [wheel] = distribution.glob("*.whl")
    run_command(
        sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "site", wheel, folder=tmp_path
    )
    outside = {"PYTHONPATH": str(tmp_path / "site")}
    python = lambda *arguments: run_command(sys.executable, *arguments, folder=tmp_path, **outside)
    assert str(tmp_path / "site") in python("-c", "import jaxlm; print(jaxlm.__file__)")
    python("-m", "jaxlm", "train", "quickstart", "--steps", "2", "--model.layers", "1", "--task.stride", "256")
    assert (tmp_path / "runs" / "quickstart" / "export" / "model.safetensors").exists()
    assert python("-m", "jaxlm", "generate", "runs/quickstart", "--prompt", "The ", "--max-new-tokens", "4")
    assert "shakespeare_char" in python("-m", "jaxlm", "train", "shakespeare_char", "--help")
