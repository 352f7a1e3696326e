"""Files of prompts, and files of their texts, which are written in the order of the prompts and can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.config import DataConfig, Decoding, difference, to_json
from jaxlm.data.formats.rows import text_lines
from jaxlm.errors import UserError
from jaxlm.hub import model_files
from jaxlm.inference.generate import generate_in_order
from jaxlm.lm import find
from jaxlm.storage import disk

if TYPE_CHECKING:
    from jaxlm.lm import LM


def read(file: str) -> list[str]:
    """Returns the prompts of a text file: its lines, split as by `data.formats.lines`, including empty ones.

    Raises:
      UserError: the file cannot be read, is not UTF-8, or is empty.
    """
    prompts = []
    for place, line in text_lines(Path(file), DataConfig()):
        try:
            line.encode()
        except UnicodeEncodeError:
            raise UserError(f"{place} is not UTF-8; convert the file, for example by iconv") from None
        prompts.append(line)
    if not prompts:
        raise UserError(f"{file} is empty; give a text file with a prompt in each line")
    return prompts


def generate_rows(
    lm: LM, prompts: list[str], decoding: Decoding, draft: LM | None, done: int = 0
) -> Iterator[dict[str, Any]]:
    """Yields a row for each prompt after the first `done`: the prompt and its text, or texts if n_best is above 1."""
    for n, generations in enumerate(generate_in_order(lm, prompts, decoding, draft=draft, done=done), done):
        found = [generation.text for generation in generations]
        yield {"prompt": prompts[n], "text": found if decoding.n_best > 1 else found[0]}


class PromptOutput:
    """A jsonl file of rows of `generate_rows`, which one process writes.

    The settings are stored in a file next to it, so that rows with different settings are not appended.

    done: number of rows that the file already had; an incomplete row is removed.

    Raises UserError where the file has rows with other settings, of another model or of other prompts, and where
    another process writes it.
    """

    def __init__(self, file: str, prompts: list[str], settings: dict[str, Any]):
        """Checks the name of the file; `settings` are those of `output_settings`."""
        self.path, self._settings_file = disk.local(file, "output"), Path(f"{file}.choices.json")
        if self.path.suffix != ".jsonl":
            raise UserError(f"output is {file!r}; it must end in .jsonl")
        self._prompts, self._settings = prompts, settings
        self.done, self._size = 0, 0  # complete rows, and their bytes

    def __enter__(self) -> PromptOutput:
        with ExitStack() as stack, self._convert_errors():
            stack.enter_context(disk.lock(disk.lock_path(self.path), str(self.path), "choose another --output"))
            if self.path.exists() or self._settings_file.exists():
                self._read()
            disk.write(self._settings_file, json.dumps(self._settings, indent=2, ensure_ascii=False) + "\n")
            self._file = stack.enter_context(open(self.path, "ab"))
            self._file.truncate(self._size)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        with self._stack, self._convert_errors():
            self._file.flush()
            os.fsync(self._file.fileno())  # so that it survives a power failure

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row and flushes the file."""
        with self._convert_errors():
            self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            self._file.flush()

    @contextmanager
    def _convert_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise disk.write_error(self.path, error, "--output") from None

    def _read(self) -> None:
        """Counts the rows of the file, after checking that they have the same settings and prompts."""
        remedy = f"choose another --output, or remove {self.path} and {self._settings_file.name}"
        if not self._settings_file.exists() or (self.path.exists() and not self.path.is_file()):
            raise UserError(
                f"output is '{self.path}', which exists and was not written by generate; choose another --output"
            )
        try:
            before = model_files.read_object(self._settings_file)
        except UserError:
            raise UserError(f"{self._settings_file} was not written by generate; {remedy}") from None
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            if not file.readline().endswith(b"\n"):  # no complete row, as after refused settings
                return
        if differing := difference(self._settings, before):
            lines = "\n".join(f"  {line}" for line in differing)
            raise UserError(f"{self.path} was written with other settings (now | then):\n{lines}\n{remedy}")
        with open(self.path, "rb") as file:
            for line in file:  # split at b"\n" only: a text may contain other line separators
                if not line.endswith(b"\n"):
                    break
                self._check_row(line, remedy)
                self.done, self._size = self.done + 1, self._size + len(line)

    def _check_row(self, line: bytes, remedy: str) -> None:
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{self.path}:{self.done + 1} is not a row of generate; {remedy}") from None
        if self.done == len(self._prompts) or prompt != self._prompts[self.done]:
            now = repr(self._prompts[self.done]) if self.done < len(self._prompts) else "none"
            raise UserError(
                f"{self.path}:{self.done + 1} has the prompt {prompt!r}, but the file of prompts has {now} "
                f"there; {remedy}"
            )


def output_settings(model: str, decoding: Decoding, draft: str) -> dict[str, Any]:
    """Returns the settings of `PromptOutput`: hashes of the models' files, and the decoding.

    A model is identified by its content, so that its folder may move. A draft changes samples but not greedy texts.
    """
    sampled = bool(draft) and decoding.temperature > 0
    hash_of = lambda name: model_files.fingerprint(find(name))
    return {"model_hash": hash_of(model), "draft_hash": hash_of(draft) if sampled else "", **to_json(decoding)}
