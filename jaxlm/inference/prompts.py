"""A file of prompts, and the file of their texts: it grows in the order of the prompts, and is resumed."""

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
from jaxlm.inference.generate import in_order
from jaxlm.lm import find
from jaxlm.storage import disk

if TYPE_CHECKING:
    from jaxlm.lm import LM


def read(file: str) -> list[str]:
    """Returns the prompts of a text file: its lines, as `data.lines` divides them, empty ones too.

    Raises:
      UserError: where the file cannot be read, is not UTF-8, or is empty.
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


def texts(lm: LM, prompts: list[str], decoding: Decoding, draft: LM | None, done: int = 0) -> Iterator[dict[str, Any]]:
    """A row for each prompt but the first `done`: the prompt, and its text, or texts where n_best is above 1."""
    for n, several in enumerate(in_order(lm, prompts, decoding, draft=draft, done=done), done):
        found = [generation.text for generation in several]
        yield {"prompt": prompts[n], "text": found if decoding.n_best > 1 else found[0]}


class PromptOutput:
    """A jsonl file of such rows, held by one process.  Beside it stands what they were made with, so that nothing else
    is put behind them.

    done: rows that are there already; what was half written is taken away.

    Raises UserError where the file is of something else (other choices, another model, other prompts), and where
    another process writes it.
    """

    def __init__(self, file: str, prompts: list[str], made_with: dict[str, Any]):
        """made_with: `choices_of` what is asked for now."""
        self.path, self._beside = disk.local(file, "output"), Path(f"{file}.choices.json")
        if self.path.suffix != ".jsonl":
            raise UserError(f"output is {file!r}; it must end in .jsonl")
        self._prompts, self._made_with = prompts, made_with
        self.done, self._whole = 0, 0

    def __enter__(self) -> PromptOutput:
        with ExitStack() as opened, self._faults():
            opened.enter_context(disk.lock(disk.lock_beside(self.path), str(self.path), "choose another --output"))
            if self.path.exists() or self._beside.exists():
                self._read()
            disk.write(self._beside, json.dumps(self._made_with, indent=2, ensure_ascii=False) + "\n")
            self._file = opened.enter_context(open(self.path, "ab"))
            self._file.truncate(self._whole)
            self._open = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        with self._open, self._faults():
            self._file.flush()
            os.fsync(self._file.fileno())  # makes it outlive a power cut

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row, which is in the file when this returns."""
        with self._faults():
            self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            self._file.flush()

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise disk.cannot_be_written(self.path, error, "--output") from None

    def _read(self) -> None:
        """Counts the rows that are there, after checking that they were made as is asked for now."""
        other = f"choose another --output, or remove {self.path} and {self._beside.name}"
        if not self._beside.exists() or (self.path.exists() and not self.path.is_file()):
            raise UserError(
                f"output is '{self.path}', which exists and was not made by generate; choose another --output"
            )
        try:
            before = model_files.read_object(self._beside)
        except UserError:
            raise UserError(f"{self._beside} is not what generate writes; {other}") from None
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            if not file.readline().endswith(b"\n"):  # no row was made, as where the first choices were refused
                return
        differ = difference(self._made_with, before)
        if differ:
            lines = "\n".join(f"  {line}" for line in differ)
            raise UserError(f"{self.path} was made otherwise (now | then):\n{lines}\n{other}")
        with open(self.path, "rb") as file:
            for line in file:  # divided at b"\n" alone: a text may hold any other end of a line
                if not line.endswith(b"\n"):
                    break
                self._check_row(line, other)
                self.done, self._whole = self.done + 1, self._whole + len(line)

    def _check_row(self, line: bytes, other: str) -> None:
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{self.path}:{self.done + 1} is no row of generate; {other}") from None
        if self.done == len(self._prompts) or prompt != self._prompts[self.done]:
            now = repr(self._prompts[self.done]) if self.done < len(self._prompts) else "none"
            raise UserError(
                f"{self.path}:{self.done + 1} is of the prompt {prompt!r}, but the file of prompts has {now} "
                f"there; {other}"
            )


def choices_of(model: str, decoding: Decoding, draft: str) -> dict[str, Any]:
    """Returns what texts are made with: hashes of the models' files, and the decoding.

    A model is known by its content, so that it may move, but not change.  A draft changes draws, not greedy texts.
    """
    drawn = bool(draft) and decoding.temperature > 0
    hashed = lambda name: model_files.fingerprint(find(name))
    return {"model_hash": hashed(model), "draft_hash": hashed(draft) if drawn else "", **to_json(decoding)}
