"""What the verbs share: the parser of flags, the config of a run with its flags, and the help."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

from jaxlm.config import RunConfig, flags, python_files
from jaxlm.config.ranges import Config, check_fields
from jaxlm.devices import process
from jaxlm.errors import UserError, suggestion

Verb = Callable[[list[str], process.Signals], int]  # (arguments, signals) -> exit code


def parse(default: Config, argv: list[str], prog: str) -> Any:
    """Returns the arguments of a verb, whose fields are checked."""
    args = flags.parse(default, argv, prog, description=None)
    check_fields(args)
    return args


def read_run(verb: str, file: Path, words: list[str], flag_words: list[str]) -> RunConfig:
    """Returns the config of a file with the flags; `--model NAME` replaces its model by a preset."""
    preset, flag_words = split_flag(flag_words, "--model", "the name of a preset, such as bert-base")
    run = python_files.read(file, words)
    if preset:
        from jaxlm.families import PRESETS

        if preset not in PRESETS:
            near = suggestion(preset, PRESETS)
            raise UserError(f"--model is {preset}, which is not a preset; --init loads pretrained weights{near}")
        run = dataclasses.replace(run, model=PRESETS[preset])
    return flags.parse(run, flag_words, f"jaxlm {verb} {' '.join([str(file), *words])}")


def split_config(argv: list[str], verb: Verb, flags_help: str) -> tuple[Path, list[str], list[str]]:
    """Returns the config file, the arguments of its function `config`, and the flags after them.

    Args:
      argv: the arguments of the verb.
      verb: the verb, whose docstring is its help.
      flags_help: the help of the flags, a line each.

    Raises:
      SystemExit: after printing the help.
      UserError: where there is no config.
    """
    name = verb.__name__
    if argv and argv[0] in ("-h", "--help"):
        print(
            f"usage: {usage(verb)}\n\n{summary(verb)}\n\n{flags_help}\n\n"
            f"CONFIG is a Python file, or the name of an included config:\n{included_configs()}\n\n"
            f"jaxlm {name} CONFIG --help explains every field of the config."
        )
        raise SystemExit(0)
    if not argv or argv[0].startswith("-"):
        configs = ", ".join(python_files.built_in_names())
        raise UserError(f"{name} requires a config: {usage(verb)}; CONFIG is a Python file, or one of {configs}")
    words = list(takewhile(lambda word: not word.startswith("-"), argv[1:]))
    return Path(argv[0]), words, argv[1 + len(words) :]


def split_flag(words: list[str], flag: str, value_is: str) -> tuple[str, list[str]]:
    """Returns the value of a flag that is not a field of the config, "" without the flag, and the other words."""
    for n, word in enumerate(words):
        name, given, value = word.partition("=")
        if name == flag:
            value, end = (value, n + 1) if given else (words[n + 1] if n + 1 < len(words) else "", n + 2)
            if not value or value.startswith("--"):
                raise UserError(f"{flag} has no value; give {value_is}")
            return value, words[:n] + words[end:]
    return "", words


def summary(verb: Verb) -> str:
    """Returns what a verb does: its docstring up to the colon."""
    return f"{(verb.__doc__ or '').partition(': ')[0]}."


def usage(verb: Verb) -> str:
    """Returns the form of the command of a verb: its docstring after the colon."""
    return (verb.__doc__ or "").partition(": ")[2].rstrip(".")


def included_configs() -> str:
    """Returns the names of the included configs, in lines."""
    return textwrap.fill(
        f"{', '.join(python_files.built_in_names())}.", 100, initial_indent="  ", subsequent_indent="  "
    )
