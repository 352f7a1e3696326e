"""Downloads models from the Hugging Face hub. It downloads no pickles and runs no code."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from jaxlm.errors import UserError
from jaxlm.hub import peft, safetensors
from jaxlm.hub.gguf import container

# `*` also matches slashes. Folders with names that start with a digit are modules of sentence-transformers.
_SMALL = ["*.json", "*.txt", "*.model", "*.spm", "*.jinja"]
_WANTED = [*_SMALL, safetensors.WEIGHTS, "*/" + safetensors.WEIGHTS, peft.WEIGHTS]
_UNWANTED = "[!0-9]*/*"


def fetch(
    name: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None, offline: bool = False
) -> Path:
    """Returns the local folder of a model, and downloads the model unless it is in the cache.

    Only the weights that `safetensors.read` reads are downloaded. The environment variables of the hub (HF_HOME,
    HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN) apply. Without a network connection, the cache is used.

    Args:
      name: a local folder, or the name of a model on the hub, such as `gpt2` or `google-t5/t5-small`.
      revision: a branch, tag or commit.
      cache_dir: overrides HF_HUB_CACHE.
      offline: overrides HF_HUB_OFFLINE.

    Raises:
      UserError: if there is no such folder, model or revision, if the hub requires a login, if the model is neither
        reachable nor in the cache, or if its weights are pickled or GGUF files.
      OSError: if the disk is full.
    """
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise UserError(f"{name} is a file; give its folder, a GGUF file, or the name of a model on the hub")
    folder = _snapshot(str(name), revision, cache_dir, offline, _WANTED)
    if (folder / safetensors.WEIGHTS).exists() or (folder / peft.WEIGHTS).exists():
        return folder
    commit = folder.name  # further files must come from the same commit
    if (folder / safetensors.INDEX).exists():
        shards = sorted(set(safetensors.index(folder).values()))
        complete = all((folder / shard).exists() for shard in shards)
        return folder if complete else _snapshot(str(name), commit, cache_dir, offline, shards)
    if not offline and (error := _other_weights(str(name), commit)):
        raise error
    return folder


def fetch_tokenizer(name: str) -> Path:
    """Returns the local folder of a tokenizer from the hub, like `fetch`, without weights."""
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
    except Exception as error:  # each major version raises the network errors of a different library
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(_reason(name, revision, offline, error)) from error
    return Path(folder)


def _other_weights(name: str, commit: str) -> UserError | None:
    """Returns the error for a repository that has weights only in other formats."""
    from huggingface_hub import constants, model_info

    with suppress(Exception):  # without a network, the reader reports the missing files
        page = f"{constants.ENDPOINT}/{name}"
        names = [file.rfilename for file in model_info(name, revision=commit).siblings or []]
        files = [file for file in names if "/" not in file]
        remedy = f"download one with `hf download {name} FILE`, and give its path"
        return container.only_gguf(page, files, remedy) or safetensors.pickle_error(page, files)
    return None


def _reason(name: str, revision: str | None, offline: bool, error: Exception) -> str:
    """Returns the message for an error of the hub's library."""
    from huggingface_hub import constants, errors

    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    answers = [answer for cause in chain if (answer := getattr(cause, "response", None)) is not None]
    status = answers[0].status_code if answers else None
    page = f"{constants.ENDPOINT}/{name}"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.HFValidationError):
        return f"{name!r} is not a folder and not a valid name of a model on the hub; give one of the two"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{page} has no revision {revision!r}; give one of its branches, tags or commits"
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return f"{page} has restricted access (HTTP status {status}); request access on that page, and {login}"
    if status in (401, 404):
        return f"{name} is not a folder, and {page} does not exist or is private; correct the name, or {login}"
    if status is not None:
        return f"{page} cannot be downloaded: the hub returned HTTP status {status}; try later, or give a local folder"
    if offline or any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in chain):
        return (
            f"{name} is not a folder, and the cache has no complete copy of {page} for offline mode; download it first"
        )
    if isinstance(error, OSError) and error.filename:
        return f"{page} cannot be stored in the cache ({error}); set HF_HOME to a writable folder"
    why = f"{type(chain[-1]).__name__}: {chain[-1]}"
    return (
        f"{name} is not a folder, and {page} is not in the cache and cannot be reached ({why}); fix the network, set "
        f"HF_ENDPOINT to a mirror, or give a folder that was downloaded on another machine"
    )
