"""What predict, evaluate and compress share: the arguments of a model and a file, and its scores."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxlm.config import CausalLM, Classification, DataConfig, RunConfig, check_task, flags, python_files
from jaxlm.config.ranges import MAX_INT, Config, Count, Name, Range, check_fields
from jaxlm.errors import UserError
from jaxlm.verbs import machine
from jaxlm.verbs.arguments import Verb, summary

# Fields of the data that only training uses, and the message about them for `predict` and `evaluate`.
_EVALUATION = ("eval_path", "eval_target_path", "eval_split", "eval_fraction", "eval_choice", "eval_seed")
# Fields of the data that word vectors do not use.
UNUSED_BY_VECTORS = tuple(f"data.{name}" for name in (*_EVALUATION, "length", "target_path", "label_from", "cache"))
TRAINING_ONLY = tuple(f"data.{name}" for name in ("path", *_EVALUATION, "length", "cache"))
WHY_HIDDEN = "applies to training; give the file after the model, {verb} RUN FILE, and set row length with --length"


@dataclass(frozen=True)
class FileArguments(Config):
    """Apply a model to the rows of a file. Task and data fields default to their values in training."""

    # The folder of a run, a folder in Hugging Face format, a GGUF file, or a hub name.
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = ""
    # A file, a folder, a glob pattern, or tfds:NAME.
    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")] = ""
    output: str = ""  # for predict: the .csv or .jsonl file to write; empty: csv on standard output
    config: str = ""  # the config file of a run with a user-defined task
    # Tokens in a row, which also limits the length of an example; 0: the length in training, or 512 if unknown.
    length: Annotated[int, Range(2, MAX_INT, special=(0, "the length in training"))] = 0
    # Rows in a batch; 0: chosen for the machine.
    batch: Annotated[int, Range(1, 1_000_000, special=(0, "automatic"))] = 0
    probabilities: bool = False  # for predict: add a column with the probability of each class
    top_k: Count = 0  # for predict: add columns for the k most probable classes; 0: none
    column: Name = "prediction"  # for predict: name of the column of the prediction; it replaces a column of the file
    task: Any = None  # What is predicted, and from which columns.
    data: DataConfig = dataclasses.field(default_factory=DataConfig)  # How the file is read.


def file_arguments(argv: list[str], verb: Verb) -> tuple[FileArguments, Any]:
    """Returns the arguments of predict or evaluate, with the model's own task and data as defaults, and the model."""
    name = verb.__name__
    words = list(takewhile(lambda word: not word.startswith("-"), argv))[:2]
    if len(words) < 2 and not {"-h", "--help"} & set(argv):
        raise UserError(f"{name} requires a model and a file: jaxlm {name} MODEL FILE [--field value ...]")
    hidden = [*TRAINING_ONLY, *(["data.target_path"] if name == "predict" else ())]
    parse = partial(flags.parse, hidden=hidden, why_hidden=WHY_HIDDEN.format(verb=name))
    if not words:  # --help without a model shows the fields of the most common task
        note = f"Task fields are those of a classification; jaxlm {name} RUN --help shows those of a run's own task."
        parse(FileArguments(task=Classification()), argv, f"jaxlm {name}", description=f"{summary(verb)} {note}")
    machine.configure_process()
    import jaxlm
    from jaxlm.data import source
    from jaxlm.run.folder import run_of
    from jaxlm.run.trained_model import task_for

    config = _read_config(argv)  # this registers its task, which `run_of` may need
    run = run_of(words[0]) or config
    lm = jaxlm.load(words[0])
    trained = lm.trained
    predicts_tokens = name != "predict" and lm.config.structure == "decoder" and "lm" in lm.config.heads_on_top
    task = CausalLM() if predicts_tokens and trained is None else None
    default = FileArguments(
        words[0], words[1] if len(words) > 1 else "", task=run.task if run else task or task_for(lm)
    )
    if run is not None:
        empty: dict[str, Any] = dict.fromkeys(("path", "target_path", "eval_path", "eval_target_path"), "")
        data = dataclasses.replace(source.adapt_config(default.file, run.data), **empty)
        default = dataclasses.replace(default, data=data, length=run.data.length)
    elif trained is not None:
        default = dataclasses.replace(default, length=trained.length)
    args = parse(default, argv, f"jaxlm {name}", description=summary(verb))
    check_fields(args)
    check_task(args.task)
    return args, lm


def _read_config(argv: list[str]) -> RunConfig | None:
    """Returns the config of `--config FILE` or `--config=FILE`; None without the flag."""
    for word, after in zip(argv, [*argv[1:], ""]):
        name, _, value = word.partition("=")
        if name == "--config" and (value or after):
            return python_files.read(Path(value or after))
    return None


def scores_of(lm: Any, file: str, args: Any) -> tuple[dict[str, float], list[str]]:
    """Returns the scores of a model on a file, and notes about them; `args` has task, data, length and batch."""
    from jaxlm.data import source
    from jaxlm.inference.likelihood import perplexity
    from jaxlm.run.evaluate import evaluate_rows, score_notes
    from jaxlm.tasks import columns_of

    if isinstance(args.task, CausalLM):
        texts = source.documents(file, args.data, args.data.split, Counter())
        return perplexity(lm, texts, length=args.length or None, stride=args.task.stride or None), []
    target, columns = args.data.target_path, columns_of(args.task, args.data.label_from == "column")
    rows = list(source.rows(file, args.data, args.data.split, target_path=target, columns=columns))
    scores = evaluate_rows(lm, rows, args.task, args.length or None, args.batch or None)
    return scores, score_notes(rows, args.task)
