"""A file of prompts, and the file of their texts: it grows in the order of the prompts, and is gone on with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.config import DataConfig, Decoding, difference, to_json
from jaxlm.data.formats import text_lines
from jaxlm.errors import UserError
from jaxlm.generate import in_order

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


class Output:
    """A jsonl file of such rows.  Beside it stands what they were made with, so that nothing else is put behind them.

    done: rows that are there already; what was half written is taken away.

    Raises UserError where the file is of something else: other choices, another model, other prompts.
    """

    def __init__(self, file: str, prompts: list[str], made_with: dict[str, Any]):
        """made_with: `choices_of` what is asked for now."""
        self.path, self._beside = Path(file), Path(f"{file}.choices.json")
        if self.path.suffix != ".jsonl":
            raise UserError(f"output is {file!r}; it must end in .jsonl")
        self.done, self._whole = 0, 0
        if self.path.exists() or self._beside.exists():
            self._read(prompts, made_with)
        try:
            self._beside.write_text(json.dumps(made_with, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            self._file = open(self.path, "ab")  # noqa: SIM115 - see `close`
            self._file.truncate(self._whole)
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror}; choose another --output") from None

    def _read(self, prompts: list[str], made_with: dict[str, Any]) -> None:
        other = f"choose another --output, or remove {self.path} and {self._beside.name}"
        if not self._beside.exists():
            raise UserError(
                f"output is '{self.path}', which exists and was not made by generate; choose another --output"
            )
        try:
            before = json.loads(self._beside.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{self._beside} is not JSON; {other}") from None
        differ = difference(made_with, before)
        if differ:
            lines = "\n".join(f"  {line}" for line in differ)
            raise UserError(f"{self.path} was made otherwise (now | then):\n{lines}\n{other}")
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else ():
            if not line.endswith(b"\n"):
                break
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.path}:{self.done + 1} is no row of generate; {other}") from None
            if self.done == len(prompts) or prompt != prompts[self.done]:
                now = repr(prompts[self.done]) if self.done < len(prompts) else "none"
                raise UserError(
                    f"{self.path}:{self.done + 1} is of the prompt {prompt!r}, but the file of prompts has {now} "
                    f"there; {other}"
                )
            self.done, self._whole = self.done + 1, self._whole + len(line)

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row, which is in the file when this returns."""
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Makes it outlive a power cut."""
        os.fsync(self._file.fileno())
        self._file.close()


def choices_of(model: str, decoding: Decoding, draft: str) -> dict[str, Any]:
    """What texts are made with; a draft changes draws, not greedy texts."""
    return {"model": model, "draft": draft if decoding.temperature > 0 else "", **to_json(decoding)}
