"""`jaxlm generate`: texts for prompts."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Annotated, Any

import tyro

from jaxlm.config import Decoding, SafetyConfig, flags
from jaxlm.config.ranges import Config, check_fields
from jaxlm.config.serialisation import to_json
from jaxlm.devices import process
from jaxlm.errors import UserError
from jaxlm.verbs import machine

_SAFE_CHUNK = 32  # prompts that are answered together if there are filters


@dataclass(frozen=True)
class Generate(Config):
    """Generate a text for each prompt: a decoder continues the prompt, an encoder-decoder reads it as its input."""

    # The folder of a run, a folder in Hugging Face format, a GGUF file, or a hub name.
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    prompt: tuple[str, ...] = ()  # one or more prompts; not set: an empty prompt
    file: str = ""  # a text file with one prompt per line, instead of --prompt
    # With --file: the .jsonl file to write. An unfinished one is completed. Empty: standard output.
    output: str = ""
    draft: str = ""  # a smaller model with the same tokenizer, for faster generation (speculative decoding)
    # How tokens are chosen and when a text ends.
    decoding: tyro.conf.OmitArgPrefixes[Decoding] = dataclasses.field(default_factory=Decoding)
    # Filters of the generated texts.
    safety: SafetyConfig = dataclasses.field(default_factory=SafetyConfig)


def generate(argv: list[str], _: process.Signals) -> int:
    """Generate a text per prompt: jaxlm generate MODEL --prompt TEXT ... | --file PROMPTS [--output FILE.jsonl]."""
    args = _generate_arguments(argv)
    args.decoding.check()
    args.safety.check()
    check_fields(args)
    if (args.file and args.prompt) or (args.output and not args.file):
        raise UserError("--file replaces --prompt, and --output requires --file; leave one out")
    if args.file:
        return _generate_from_file(args)
    lm, draft = _load_models(args)
    import jaxlm

    prompts, continues = list(args.prompt) or [""], lm.config.structure == "decoder"
    if args.safety.is_on:  # a text is complete before a filter reads it, so there is no stream
        for prompt, row in zip(prompts, _safe_rows(args, lm, draft, prompts), strict=True):
            print(row["text"] if row["refused"] else prompt * continues + row["text"])
            for reason in row["reasons"]:
                print(f"rejected  {reason}", file=sys.stderr)
        return 0
    if len(prompts) == 1 and args.decoding.n_best == 1 and sys.stdout.isatty():
        pieces = jaxlm.stream(lm, prompts[0], args.decoding, draft=draft)
        for piece in chain(prompts * continues, pieces, ["\n"]):
            print(piece, end="", flush=True)
        return 0
    for prompt, result in zip(prompts, jaxlm.generate(lm, prompts, args.decoding, draft=draft), strict=True):
        for text in result if args.decoding.n_best > 1 else [result]:
            print(prompt * continues + text)
    return 0


def _generate_arguments(argv: list[str]) -> Generate:
    """Returns the arguments, with the checkpoint's own decoding defaults where no flag is given, and prints these."""
    from jaxlm.inference.generation_defaults import describe_defaults, merge_settings, read_folder_defaults
    from jaxlm.lm import find

    plain = Generate(model=tyro.MISSING)
    parse = partial(flags.parse, flags=argv, prog="jaxlm generate", description=None)
    wants_help = bool({"-h", "--help"} & {*argv})
    if wants_help and (not argv or argv[0].startswith("-")):
        return parse(plain)  # prints the help and exits
    model = argv[0] if wants_help else parse(plain).model  # a mistake in the flags is reported before any download
    try:
        defaults = read_folder_defaults(find(model, offline=wants_help))
    except UserError:
        if not wants_help:
            raise
        return parse(plain)
    args = parse(Generate(model, decoding=merge_settings(None, {}, defaults)))
    words = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    fields = [field.name for field in dataclasses.fields(Decoding) if field.name in words]
    values = {name: getattr(args.decoding, name) for name in fields}
    for line in describe_defaults(defaults):
        print(line, file=sys.stderr)
    return dataclasses.replace(args, decoding=merge_settings(None, values, defaults))


def _generate_from_file(args: Generate) -> int:
    """Writes a JSON object with the texts of each prompt of a file, except for those that the output has already."""
    from jaxlm.inference import prompts as files

    prompts = files.read(args.file)
    # Reads every byte of the model.
    choices = lambda: files.output_settings(args.model, args.decoding, args.draft) | {"safety": to_json(args.safety)}
    with files.PromptOutput(args.output, prompts, choices()) if args.output else nullcontext() as output:
        done = output.done if output else 0
        if done:
            print(f"{args.output} already has {done:,} of {len(prompts):,} rows", file=sys.stderr)
        if done == len(prompts):
            return 0
        lm, draft = _load_models(args)
        plain_rows = lambda: files.generate_rows(lm, prompts, args.decoding, draft, done)
        for row in _safe_rows(args, lm, draft, prompts[done:]) if args.safety.is_on else plain_rows():
            if output:
                output.write(row)
            else:
                print(json.dumps(row, ensure_ascii=False), flush=True)
    return 0


def _safe_rows(args: Generate, lm: Any, draft: Any, prompts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields for each prompt a row with the best allowed answer, and the reasons why others were rejected."""
    from jaxlm.trust.safe_generation import SafeGenerator

    generator = SafeGenerator(lm, args.safety)
    for start in range(0, len(prompts), _SAFE_CHUNK):
        chunk = prompts[start : start + _SAFE_CHUNK]
        for prompt, answer in zip(chunk, generator.answer(chunk, args.decoding, draft=draft)):
            yield {"prompt": prompt, "text": answer.text, "refused": answer.refused, "reasons": answer.reasons}


def _load_models(args: Generate) -> tuple[Any, Any]:
    """Returns the model and its draft; None for a draft that is not set."""
    machine.configure_process()
    import jaxlm
    from jaxlm.inference.generate import check_decoding

    # With filters, control tokens that are written in a prompt are encoded like other text.
    lm = jaxlm.load(args.model, split_special_tokens=True if args.safety.is_on else None)
    draft = jaxlm.load(args.draft) if args.draft else None
    check_decoding(lm, args.decoding, draft)
    if lm.tokenizer is None:
        raise UserError(f"{args.model} has no tokenizer, but prompts are texts; add its files to the model's folder")
    return lm, draft
