"""`jaxlm compress`: smaller variants of a model."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Annotated, Any

import tyro

from jaxlm.config import CausalLM, CompressConfig, DataConfig, check_task, flags
from jaxlm.config.ranges import MAX_INT, Config, Range, check_fields
from jaxlm.devices import process
from jaxlm.errors import UserError
from jaxlm.verbs import machine
from jaxlm.verbs.arguments import summary
from jaxlm.verbs.files import TRAINING_ONLY, WHY_HIDDEN, scores_of


@dataclass(frozen=True)
class Compress(Config):
    """Write smaller variants of a model, and compare their size, speed and scores with the original."""

    # The folder of a run, a folder in Hugging Face format, or a hub name.
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    # The folder to write, which must be new or empty. Several variants are written to folders in it.
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    # How the variants are made.
    recipe: tyro.conf.OmitArgPrefixes[CompressConfig] = dataclasses.field(default_factory=CompressConfig)
    evaluate: str = ""  # a file to score every variant on: plain text for a language model, else labelled rows
    # For --evaluate: tokens in a row; 0: the length in training, or that of the model.
    length: Annotated[int, Range(2, MAX_INT, special=(0, "automatic"))] = 0
    # For --evaluate: rows in a batch; 0: chosen for the machine.
    batch: Annotated[int, Range(1, 1_000_000, special=(0, "automatic"))] = 0
    task: Any = None  # For --evaluate: what is scored.
    data: DataConfig = dataclasses.field(default_factory=DataConfig)  # How the files are read.


def compress(argv: list[str], _: process.Signals) -> int:
    """Write smaller variants of a model and compare them: jaxlm compress MODEL OUT --weights int8 int4 [...]."""
    words = list(takewhile(lambda word: not word.startswith("-"), argv))[:2]
    default = Compress(model=tyro.MISSING, out=tyro.MISSING, task=CausalLM())
    if len(words) == 2 and not {"-h", "--help"} & set(argv):
        default = dataclasses.replace(default, task=_task_of_model(words[0]))
    elif not {"-h", "--help"} & set(argv):
        raise UserError("compress requires a model and a folder: jaxlm compress MODEL OUT --weights int8 [...]")
    hidden = partial(flags.parse, hidden=list(TRAINING_ONLY), why_hidden=WHY_HIDDEN.format(verb="compress"))
    args = hidden(default, argv, "jaxlm compress", description=summary(compress))
    check_fields(args)
    check_task(args.task)
    args.recipe.check()
    _check_readable(args)
    from jaxlm.data import source
    from jaxlm.run import compress as compression

    file = args.recipe.calibration
    texts = source.documents(file, args.data, args.data.split, Counter()) if file else None
    variants = compression.variants_of(args.recipe, texts)
    evaluate = (lambda lm: scores_of(lm, args.evaluate, args)[0]) if args.evaluate else None
    log = lambda line: print(line, file=sys.stderr, flush=True)
    results = compression.compress(args.model, args.out, variants, evaluate, log)
    print(compression.table_of(results), end="")
    return 0


def _check_readable(args: Compress) -> None:
    """Reads the first text or row of the files, so that a mistake ends before anything is computed."""
    from jaxlm.data import source
    from jaxlm.tasks import columns_of

    texts = [args.recipe.calibration, args.evaluate if isinstance(args.task, CausalLM) else ""]
    for file in filter(None, texts):
        next(iter(source.documents(file, args.data, args.data.split, Counter())))
    if args.evaluate and not isinstance(args.task, CausalLM):
        columns = columns_of(args.task, args.data.label_from == "column")
        target = args.data.target_path
        next(iter(source.rows(args.evaluate, args.data, args.data.split, target_path=target, columns=columns)), None)


def _task_of_model(name: str) -> Any:
    """Returns the task that evaluates a model, by default that of its head."""
    machine.configure_process()
    import jaxlm
    from jaxlm.run.trained_model import task_for

    lm = jaxlm.load(name)
    if lm.trained is None and lm.config.structure == "decoder" and "lm" in lm.config.heads_on_top:
        return CausalLM()
    try:
        return task_for(lm)
    except UserError:  # a model without a head: only --evaluate needs a task
        return CausalLM()
