"""Command-line flags for the fields of a config, with ranges in `--help` and suggestions for unknown flags."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import tyro

from jaxlm.config.ranges import Config, describe_range, field_types
from jaxlm.errors import UserError

# Names of flags in other tools -> flags of this library.  The first one that the command has is suggested.
_ALIASES: dict[str, tuple[str, ...]] = {
    "lr learning-rate peak-lr": ("optimizer.rate",),
    "wd weight-decay": ("optimizer.weight-decay",),
    "warmup-steps warmup-ratio num-warmup-steps warmup-iters": ("optimizer.warmup",),
    "optim optimizer optimizer-name": ("optimizer.name",),
    "scheduler lr-scheduler lr-scheduler-type lr-schedule": ("optimizer.schedule",),
    "max-grad-norm grad-clip gradient-clip-val clip-grad clip-norm": ("optimizer.clip",),
    "adam-beta1": ("optimizer.beta1",),
    "adam-beta2": ("optimizer.beta2",),
    "adam-epsilon eps": ("optimizer.epsilon",),
    "num-epochs num-train-epochs n-epochs max-epochs epoch": ("epochs",),
    "max-steps num-steps n-steps iterations max-iters train-steps": ("steps",),
    "batch-size bs train-batch-size per-device-train-batch-size per-device-batch-size global-batch-size": ("batch",),
    "gradient-accumulation-steps grad-accum accumulation-steps accumulate-grad-batches": ("accumulate",),
    "max-length max-len max-seq-length seq-len seq-length sequence-length block-size context-length": (
        "data.length",
        "length",
        "max-new-tokens",
    ),
    "model-name model-name-or-path checkpoint pretrained from-pretrained base-model": ("init",),
    "output-dir out-dir save-dir run-dir output out": ("workdir", "output"),
    "dataset data data-dir data-path train-file train-data train input file": ("data.path", "file"),
    "validation-file eval-file eval-data dev val validation test-file": ("data.eval-path",),
    "tokenizer-name tokenizer-path": ("tokenizer.path",),
    "text-column source-column": ("task.text", "task.source"),
    "label-column target-column labels": ("task.label", "task.tags", "task.target"),
    "vocab-size": ("model.vocabulary",),
    "n-layer n-layers num-layers num-hidden-layers depth": ("model.layers",),
    "n-head n-heads num-heads num-attention-heads": ("model.heads",),
    "n-embd hidden-size d-model dim": ("model.width",),
    "d-ff intermediate-size ffn-dim": ("model.mlp-width",),
    "mlm-probability mask-prob mask-rate": ("task.mask-rate",),
    "dtype precision bf16 fp16 mixed-precision": ("compute-dtype",),
    "gradient-checkpointing activation-checkpointing checkpointing": ("remat",),
    "eval-steps eval-interval evaluation-strategy": ("eval-every",),
    "save-steps save-interval save-every": ("checkpoint-every",),
    "save-total-limit": ("keep",),
    "logging-steps log-interval log-steps": ("log-every",),
    "early-stopping early-stopping-patience": ("patience",),
    "metric-for-best-model": ("best",),
    "tp tensor-parallel tensor-parallel-size": ("mesh.tensor",),
    "dp data-parallel data-parallel-size": ("mesh.data",),
    "max-tokens max-new": ("max-new-tokens",),
    "num-beams beam-size beam": ("beams",),
    "num-return-sequences num-samples n": ("n-best",),
    "temp": ("temperature",),
    "prompts prompts-file input-file": ("file",),
    "random-seed": ("seed",),
}
_SUGGESTED = {alias: names for aliases, names in _ALIASES.items() for alias in aliases.split()}
_RESUME_FLAGS = ("resume", "resume-from-checkpoint", "resume-from", "continue")


def parse(
    default: Any,
    flags: list[str],
    prog: str,
    *,
    hidden: Collection[str] = (),
    why_hidden: str = "",
    description: str | None = "Flags override the config; the defaults shown are its values.",
) -> Any:
    """Parses command-line flags into a copy of a config.

    Args:
      default: a dataclass with a value for each field, or `tyro.MISSING` for a required one.
      flags: command-line words such as `["--data.path", "x.txt"]`.
      prog: name of the command, for `--help`.
      hidden: fields that the command does not use, such as "data.eval_path".
      why_hidden: the reason and the remedy, for the message about a hidden flag.
      description: first paragraph of `--help`; None: the docstring of the dataclass.

    Returns:
      A copy of `default` with the values of the flags.

    Raises:
      UserError: for a hidden flag, or a flag that has a different name here.
      SystemExit: after `--help`, and for flags that tyro rejects.
    """
    _check_names(default, flags, {name.replace("_", "-") for name in hidden}, why_hidden)
    with _annotated(default, set(hidden)):
        return tyro.cli(
            type(default),
            default=default,
            args=flags,
            prog=prog,
            description=description,
            config=(tyro.conf.AvoidSubcommands,),
        )


def names(config: Any, prefix: str = "") -> list[str]:
    """Returns the flags of a dataclass without the leading dashes: `batch`, `data.eval-path` ..."""
    flags = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name.replace('_', '-')}"
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            flags.append(name)
        elif "OmitArgPrefixes" in str(field.type):
            flags += names(value, prefix)
        else:
            flags += names(value, f"{name}.")
    return flags


def _check_names(default: Any, flags: list[str], hidden: set[str], why_hidden: str) -> None:
    """Raises UserError for a hidden flag, or a flag that has a different name here."""
    known = names(default)
    for flag in flags:
        name = flag[2:].partition("=")[0].replace("_", "-") if flag.startswith("--") else ""
        if name in hidden:
            raise UserError(f"--{name} {why_hidden}")
        if not name or name in known or re.sub(r"(^|\.)no-", r"\1", name) in known:
            continue
        if name in _RESUME_FLAGS and "workdir" in known:
            raise UserError(f"there is no --{name}; the same command with the same --workdir resumes the run")
        same = [other for other in known if other.rpartition(".")[2] == name and other not in hidden]
        near = [other for other in _SUGGESTED.get(name, ()) if other in known and other not in hidden] or same
        if near:
            raise UserError(f"there is no --{name}; perhaps you meant --{near[0]}; --help explains every flag")


@contextmanager
def _annotated(default: Any, hidden: set[str]) -> Iterator[None]:
    """Temporarily replaces the field types of the configs by the types that tyro reads.

    A nested config gets the class of its value in `default`, not the union of all possible classes; a number gets its
    range as metavar; hidden fields are suppressed.
    """
    originals: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def annotate(config: Any, prefix: str) -> None:
        kind = type(config)
        if not issubclass(kind, Config):
            return
        originals.append((kind.__annotations__, dict(kind.__annotations__)))
        for name, hint in field_types(kind).items():
            value = getattr(config, name)
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                annotate(value, f"{prefix}{name}.")
                visible: Any = hint if hasattr(hint, "__metadata__") else type(value)
            else:
                metavar = describe_range(hint)
                visible = Annotated[hint, tyro.conf.arg(metavar=metavar)] if metavar else hint
            is_hidden = f"{prefix}{name}" in hidden
            kind.__annotations__[name] = Annotated[visible, tyro.conf.Suppress] if is_hidden else visible

    annotate(default, "")
    try:
        yield
    finally:
        for annotations, original in reversed(originals):
            annotations |= original
