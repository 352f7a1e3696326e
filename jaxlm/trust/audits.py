"""The table of audits, their arguments, and the page with their results."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxlm.config.ranges import Config, Count, Name, Seed
from jaxlm.errors import UserError
from jaxlm.lm import LM
from jaxlm.reports.pages import write_page
from jaxlm.storage import disk
from jaxlm.trust import association_tests, bbq, bias_pairs, counterfactuals, group_gaps
from jaxlm.trust.audit import Audit
from jaxlm.vectors.files import EXPORT, load_vectors
from jaxlm.vectors.word_vectors import WordVectors


@dataclass(frozen=True)
class BiasArguments(Config):
    """What the audits of bias read. Each audit runs if its file is given."""

    pairs: str = ""  # pairs of sentences with the columns sent_more and sent_less, such as CrowS-Pairs
    associations: tuple[str, ...] = ()  # JSON files of association tests (WEAT, SEAT)
    bbq: tuple[str, ...] = ()  # JSON lines of BBQ, such as one file per category
    counterfactuals: str = ""  # rows for a classifier, in which words are replaced by those of another group
    groups: str = ""  # labelled rows for a classifier, with a column of groups
    swaps: str = ""  # for --counterfactuals: pairs of words in the columns a and b; empty: pronouns of English
    group_column: str = ""  # for --groups: the column with the group of each row
    positive: tuple[str, ...] = ()  # for --groups: the positive classes; not set: the second of two classes
    # For --associations: how hidden states become a vector, such as cls, mean or lasttoken; empty: as declared.
    pooling: str = ""
    missing: Literal["refuse", "drop"] = "refuse"  # for --associations: words that the vectors lack
    answers: Literal["mean", "sum"] = "mean"  # for --bbq: log-likelihood of an answer, per token or of all tokens


@dataclass(frozen=True)
class AuditArguments(Config):
    """Audit a model: bias in its preferences, vectors, answers and predictions."""

    # The folder of a run, a folder in Hugging Face format, a GGUF file, a hub name, or a file of word vectors.
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    output: Name = "audit.html"  # the page to write; a JSON file of the same name has the scores
    sample: Count = 0  # number of rows to draw from each file; 0: all
    length: Count = 0  # for classifiers: tokens in a row; 0: the length in training
    seed: Seed = 0  # for drawing rows, partitions and resamples
    bias: tyro.conf.OmitArgPrefixes[BiasArguments] = field(default_factory=BiasArguments)


def _drawn(args: AuditArguments) -> dict[str, Any]:
    return {"sample": args.sample, "seed": args.seed}


# Name of the argument that requests an audit -> the audit of a model.
AUDITS: dict[str, Callable[[Any, AuditArguments], Audit]] = {
    "pairs": lambda model, args: bias_pairs.audit_pairs(model, args.bias.pairs, **_drawn(args)),
    "associations": lambda model, args: association_tests.audit_associations(
        model, args.bias.associations, args.bias.pooling, args.seed, args.bias.missing
    ),
    "bbq": lambda model, args: bbq.audit_bbq(model, args.bias.bbq, args.bias.answers == "mean", **_drawn(args)),
    "counterfactuals": lambda model, args: counterfactuals.audit_counterfactuals(
        model, args.bias.counterfactuals, args.bias.swaps, length=args.length or None, **_drawn(args)
    ),
    "groups": lambda model, args: group_gaps.audit_groups(
        model,
        args.bias.groups,
        args.bias.group_column,
        args.bias.positive,
        length=args.length or None,
        **_drawn(args),
    ),
}
# Arguments that only one audit reads -> that audit.
_BELONGS = {
    "swaps": "counterfactuals",
    "group_column": "groups",
    "positive": "groups",
    "pooling": "associations",
    "missing": "associations",
    "answers": "bbq",
}
VECTORS = ("associations",)  # audits of word vectors


def requested_audits(args: AuditArguments) -> list[str]:
    """Returns the names of the audits whose arguments are set, in the order of the table.

    Raises:
      UserError: if there is none, and for an argument of an audit that is not requested.
    """
    parts: list[Any] = [getattr(args, one.name) for one in dataclasses.fields(args)]
    parts = [part for part in parts if dataclasses.is_dataclass(part)]
    values = {one.name: one.default for part in parts for one in dataclasses.fields(part)}
    given = {name for part in parts for name in values if getattr(part, name, values[name]) != values[name]}
    names = [name for name in AUDITS if name in given]
    for name, audit in _BELONGS.items():
        if name in given and audit not in names:
            raise UserError(f"--{_flag(name)} has no effect without --{audit}; give --{audit}, or leave it out")
    if not names:
        flags = ", ".join(f"--{_flag(name)}" for name in AUDITS)
        raise UserError(f"no audit is requested; give the files of at least one: {flags}")
    return names


def _flag(name: str) -> str:
    return name.replace("_", "-")


def is_vectors(path: str) -> bool:
    """Returns whether a path is a file of word vectors, or the folder of a run that trained them."""
    file = Path(path)
    if file.is_dir():
        return any(True for folder in (file / "export", file) for _ in folder.glob(f"{EXPORT}.*"))
    return file.is_file() and file.suffix != ".gguf"


def audit(model: LM | WordVectors, args: AuditArguments) -> list[Audit]:
    """Returns the results of the requested audits.

    Args:
      model: a model, or word vectors.
      args: what is audited.

    Raises:
      UserError: for an audit that the model does not support, and as each audit does.
    """
    names = requested_audits(args)
    unsupported = [name for name in names if isinstance(model, WordVectors) and name not in VECTORS]
    if unsupported:
        raise UserError(f"--{unsupported[0]} requires a model that reads texts; word vectors support --associations")
    return [AUDITS[name](model, args) for name in names]


def load(path: str) -> LM | WordVectors:
    """Returns the model or the word vectors at a path."""
    import jaxlm

    return load_vectors(path) if is_vectors(path) else jaxlm.load(path)


def write(path: Path, name: str, audits: Sequence[Audit], args: AuditArguments) -> tuple[Path, Path]:
    """Writes the page of audits, and their scores as JSON in a file of the same name.

    Args:
      path: the page.
      name: name of the model.
      audits: the results.
      args: the arguments, which the page and the JSON file state.

    Returns:
      The page and the JSON file.
    """
    scores = {key: value for one in audits for key, value in one.scores.items()}
    arguments = dataclasses.asdict(args)
    facts = {"model": name, "audits": str(len(audits)), "scores": str(len(scores)), "seed": str(args.seed)}
    chapters = [chapter for one in audits for chapter in one.chapters]
    write_page(path, Path(name).name or name, "jaxlm audit", facts, chapters, json.dumps(arguments, indent=2))
    defined = {key: None if math.isnan(value) else value for key, value in scores.items()}
    content = {"model": name, "arguments": arguments, "scores": defined}
    disk.write(path.with_suffix(".json"), json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path, path.with_suffix(".json")
