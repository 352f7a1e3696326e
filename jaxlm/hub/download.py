"""Models of the Hugging Face hub, as local folders.  Only data comes: no pickle is asked for, no code is run."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from jaxlm.errors import UserError
from jaxlm.hub import safetensors

# `*` matches slashes too.  Folders whose names begin with a digit are the modules of a sentence-transformers model.
_SMALL = ["*.json", "*.txt", "*.model", "*.spm", "*.jinja"]
_WANTED = [*_SMALL, safetensors.WEIGHTS, "*/" + safetensors.WEIGHTS]
_UNWANTED = "[!0-9]*/*"


def fetch(
    name: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None, offline: bool = False
) -> Path:
    """The folder of a model: `name` itself if it is one, else of the hub's model of that name, such as `gpt2` or
    `google-t5/t5-small`, downloaded unless it is in the cache.

    Of its weights come only those that `safetensors.read` reads.  revision: a branch, tag or commit.  cache_dir and
    offline: in place of HF_HUB_CACHE and HF_HUB_OFFLINE, which are obeyed, as are HF_HOME, HF_ENDPOINT and HF_TOKEN.
    Without a network the cache serves as well.

    Raises UserError where there is no such folder, model or revision, where the hub asks for a login, where neither it
    nor the cache can give the model, and where its weights are pickled; OSError as it comes from a full disk.
    """
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise UserError(f"{name} is a file; give the folder that holds it, or the name of a model of the hub")
    folder = _snapshot(str(name), revision, cache_dir, offline, _WANTED)
    if (folder / safetensors.WEIGHTS).exists():
        return folder
    commit = folder.name  # whatever else comes must be of the same
    if (folder / safetensors.INDEX).exists():
        shards = sorted(set(safetensors.index(folder).values()))
        whole = all((folder / shard).exists() for shard in shards)
        return folder if whole else _snapshot(str(name), commit, cache_dir, offline, shards)
    if not offline and (error := _pickled(str(name), commit)):
        raise error
    return folder


def fetch_tokenizer(name: str) -> Path:
    """The folder of a tokenizer of the hub, as in `fetch`, without the weights beside it."""
    return _snapshot(name, None, None, False, _SMALL)


def _snapshot(name: str, revision: str | None, cache_dir: str | Path | None, offline: bool, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=offline,
            allow_patterns=files,
            ignore_patterns=_UNWANTED,
        )
    except Exception as error:  # the errors of the network are those of another library in each major version
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(_reason(name, revision, offline, error)) from error
    return Path(folder)


def _pickled(name: str, commit: str) -> UserError | None:
    from huggingface_hub import constants, model_info

    with suppress(Exception):  # without a network the reader says what is missing
        files = [file.rfilename for file in model_info(name, revision=commit).siblings or []]
        return safetensors.pickled(f"{constants.ENDPOINT}/{name}", [file for file in files if "/" not in file])
    return None


def _reason(name: str, revision: str | None, offline: bool, error: Exception) -> str:
    """Value, limit and remedy of an error of the hub's library."""
    from huggingface_hub import constants, errors

    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    answers = [answer for cause in chain if (answer := getattr(cause, "response", None)) is not None]
    status = answers[0].status_code if answers else None
    page = f"{constants.ENDPOINT}/{name}"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.HFValidationError):
        return f"{name!r} is no folder, and cannot be the name of a model of the hub; give one of the two"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{page} has no revision {revision!r}; give one of its branches, tags or commits"
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return f"{page} is not open to everyone (HTTP status {status}); ask for access on that page, and {login}"
    if status in (401, 404):
        return f"{name} is no folder, and {page} no model, or a private one; correct the name, or {login}"
    if status is not None:
        return f"{page} cannot be fetched: the hub answers with HTTP status {status}; try later, or give a local folder"
    if offline or any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in chain):
        return f"{name} is no folder, and offline mode finds no whole copy of {page} in the cache; download it before"
    if isinstance(error, OSError) and error.filename:
        return f"{page} cannot be kept in the cache ({error}); set HF_HOME to a folder that can be written"
    why = f"{type(chain[-1]).__name__}: {chain[-1]}"
    return (
        f"{name} is no folder, and {page} is not in the cache and cannot be reached ({why}); fix the network, set "
        f"HF_ENDPOINT to a mirror, or give a folder that was downloaded elsewhere"
    )
