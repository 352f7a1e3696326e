"""The command line: `jaxlm VERB ...`.

Only this file changes the state of the whole process: XLA flags, compilation cache, signal handlers, exit code.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import logging
import math
import os
import re
import shlex
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxlm.devices.process import delay_interrupts

with delay_interrupts():
    import tyro

    from jaxlm.config import (
        CausalLM,
        Classification,
        CompressConfig,
        DataConfig,
        Decoding,
        MeshConfig,
        RunConfig,
        VectorsConfig,
        check_task,
        flags,
        python_files,
    )
    from jaxlm.config.ranges import MAX_INT, Config, Count, Name, Range, check_fields
    from jaxlm.devices import hosts, process
    from jaxlm.errors import RunError, Stopped, UserError, suggestion
    from jaxlm.run import sweep as sweeps
    from jaxlm.storage import buckets, disk

MAX_CPU_DEVICES = 256
# A model with at least this many parameters runs on one CPU device that uses all cores.
LARGE_ON_CPU = 50_000_000
# So does a model with this many per token of an update: MiniLM on SST-2 takes 206 ms per update instead of 325.
LARGE_PER_TOKEN = 5_000


def train(argv: list[str], signals: process.Signals) -> int:
    """Train a model as a config describes: jaxlm train CONFIG [--field value ...] [--sweep FIELD=A,B ...]."""
    file, words, flag_words = _split_config(argv)
    flag_words, sweep_fields = _split_sweep(flag_words)
    config = python_files.read_any(file, words)
    if isinstance(config, VectorsConfig):
        prog = f"jaxlm train {' '.join([str(file), *words])}"
        return _train_vectors(config, flag_words, sweep_fields, prog, signals)
    read = lambda more: _read_run("train", file, words, flag_words + more)
    trials = sweeps.combinations(sweep_fields)
    runs = [read([f"--{name}={value}" for name, value in fields.items()]) for fields in trials]
    for run in runs:
        run.check()
    rendezvous = hosts.find_rendezvous(os.environ)
    one_device_per_core(runs, rendezvous.processes if rendezvous and rendezvous.processes else 1)
    _configure_process()
    hosts.join(rendezvous)
    from jaxlm.run.fit import fit

    if sweep_fields:
        _sweep(argv, trials, runs, read([]).workdir, signals)
    else:
        fit(runs[0], stop=signals.stop)
    return 0


def _train_vectors(
    config: VectorsConfig, flag_words: list[str], sweep_fields: list[str], prog: str, signals: process.Signals
) -> int:
    """Trains word vectors as a config describes."""
    if sweep_fields:
        raise UserError("--sweep is not available for word vectors; run the command once for each combination")
    run = flags.parse(config, flag_words, prog, hidden=_TEXT_ONLY, why_hidden="has no effect on word vectors")
    run.check()
    _configure_process()
    from jaxlm.run.word_vectors import fit_vectors

    fit_vectors(run, stop=signals.stop)
    return 0


def _sweep(
    argv: list[str], trials: list[dict[str, str]], runs: list[RunConfig], workdir: str, signals: process.Signals
) -> None:
    """Trains every run of a sweep, and prints the tables and the summary of the best run."""
    from jaxlm.run.fit import fit
    from jaxlm.run.folder import SUMMARY
    from jaxlm.tasks import best_score_of

    if buckets.is_address(workdir):
        raise UserError(f"workdir is {workdir}; a sweep requires a folder on this machine")
    top, score = Path(workdir), best_score_of(runs[0])
    trial = lambda n, folder: fit(dataclasses.replace(runs[n], workdir=str(folder)), stop=signals.stop, summary=False)
    done = sweeps.sweep(trials, top, trial, score)
    print("\n" + sweeps.tables(done, score))
    if (best := sweeps.best_of(done, score)) is None:
        raise RunError(f"every run of the sweep failed; {top / 'sweep.md'} lists them, the output above has the errors")
    summary = top / best.folder / SUMMARY
    print(f"the best run is {top / best.folder}:\n")
    print(summary.read_text() if summary.exists() else "")
    fields = [f"--{name}={value}" for name, value in best.fields.items()]
    print(f"to train it alone:  {_command(argv, fields, top)}")


def _command(argv: list[str], fields: list[str], top: Path) -> str:
    """Returns the command that trains one run of the sweep `argv` in a new folder next to the folder of the sweep."""
    words_and_flags, _ = _split_sweep(argv)
    programs = {"train.py": ["python", sys.argv[0]], "__main__.py": ["python", "-m", "jaxlm", "train"]}
    program = programs.get(Path(sys.argv[0]).name, ["jaxlm", "train"])
    return shlex.join([*program, *words_and_flags, *fields, f"--workdir={top}-best"])


def _split_sweep(argv: list[str]) -> tuple[list[str], list[str]]:
    """Returns the arguments without --sweep, and the values of --sweep."""
    if "--sweep" not in argv:
        return argv, []
    at = argv.index("--sweep")
    words = list(takewhile(lambda word: not word.startswith("-"), argv[at + 1 :]))
    if not words:
        raise UserError("--sweep has no fields; give FIELD=VALUE,VALUE such as optimizer.rate=2e-5,5e-5 seed=0,1,2")
    return argv[:at] + argv[at + 1 + len(words) :], words


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


def generate(argv: list[str], _: process.Signals) -> int:
    """Generate a text per prompt: jaxlm generate MODEL --prompt TEXT ... | --file PROMPTS [--output FILE.jsonl]."""
    args = _generate_arguments(argv)
    args.decoding.check()
    check_fields(args)
    if (args.file and args.prompt) or (args.output and not args.file):
        raise UserError("--file replaces --prompt, and --output requires --file; leave one out")
    if args.file:
        return _generate_from_file(args)
    lm, draft = _load_models(args)
    import jaxlm

    prompts, continues = list(args.prompt) or [""], lm.config.structure == "decoder"
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
    choices = lambda: files.output_settings(args.model, args.decoding, args.draft)  # reads every byte of the model
    with files.PromptOutput(args.output, prompts, choices()) if args.output else nullcontext() as output:
        done = output.done if output else 0
        if done:
            print(f"{args.output} already has {done:,} of {len(prompts):,} rows", file=sys.stderr)
        if done == len(prompts):
            return 0
        lm, draft = _load_models(args)
        for row in files.generate_rows(lm, prompts, args.decoding, draft, done):
            if output:
                output.write(row)
            else:
                print(json.dumps(row, ensure_ascii=False), flush=True)
    return 0


def _load_models(args: Generate) -> tuple[Any, Any]:
    """Returns the model and its draft; None for a draft that is not set."""
    _configure_process()
    import jaxlm
    from jaxlm.inference.generate import check_decoding

    lm = jaxlm.load(args.model)
    draft = jaxlm.load(args.draft) if args.draft else None
    check_decoding(lm, args.decoding, draft)
    if lm.tokenizer is None:
        raise UserError(f"{args.model} has no tokenizer, but prompts are texts; add its files to the model's folder")
    return lm, draft


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


def predict(argv: list[str], _: process.Signals) -> int:
    """Predict the labels, answers or texts for the rows of a file: jaxlm predict MODEL FILE [--output FILE.csv]."""
    args, lm = _file_arguments(argv, "predict")
    from jaxlm.data import source
    from jaxlm.run.evaluate import predict_rows
    from jaxlm.run.folder import RowWriter
    from jaxlm.tasks import columns_of

    columns = columns_of(args.task, labelled=False)
    # All other columns are copied to the output.
    columns = columns and columns._replace(alone=False)
    data = dataclasses.replace(args.data, label_from="column")
    rows = source.rows(args.file, data, data.split, columns=columns)
    classes: dict[str, Any] = {"probabilities": args.probabilities, "top_k": args.top_k}
    with RowWriter(args.output, getattr(args.task, "separator", " ")) as writer:
        for row, prediction in predict_rows(lm, rows, args.task, args.length or None, args.batch or None, **classes):
            named = {args.column if name == "prediction" else name: value for name, value in prediction.items()}
            replaced = {args.column} - {FileArguments.column}
            writer.write({name: value for name, value in row.items() if name not in replaced}, named)
    return 0


def evaluate(argv: list[str], _: process.Signals) -> int:
    """Score a model on the labelled rows of a file, or on plain text: jaxlm evaluate MODEL FILE."""
    args, lm = _file_arguments(argv, "evaluate")
    if args.probabilities or args.top_k or args.column != FileArguments.column:
        raise UserError("--probabilities, --top-k and --column are flags of predict; leave them out")
    scores, notes = _scores(lm, args.file, args)
    for line in notes:
        print(line, file=sys.stderr)
    for name, value in scores.items():
        # Scripts parse these lines: one name and one number, and fractions instead of per cent.
        print(f"{name.replace('_', ' '):>20}  {value:{'.4f' if isinstance(value, float) else ','}}")
    return 0


def _scores(lm: Any, file: str, args: Any) -> tuple[dict[str, float], list[str]]:
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


# Fields of the data that only training uses, and the message about them for `predict` and `evaluate`.
_EVALUATION = ("eval_path", "eval_target_path", "eval_split", "eval_fraction", "eval_choice", "eval_seed")
# Fields of the data that word vectors do not use.
_TEXT_ONLY = tuple(f"data.{name}" for name in (*_EVALUATION, "length", "target_path", "label_from", "cache"))
_TRAINING_ONLY = tuple(f"data.{name}" for name in ("path", *_EVALUATION, "length", "cache"))
_WHY_HIDDEN = "applies to training; give the file after the model, {verb} RUN FILE, and set row length with --length"


def _file_arguments(argv: list[str], verb: str) -> tuple[FileArguments, Any]:
    """Returns the arguments of predict or evaluate, with the model's own task and data as defaults, and the model."""
    words = list(takewhile(lambda word: not word.startswith("-"), argv))[:2]
    if len(words) < 2 and not {"-h", "--help"} & set(argv):
        raise UserError(f"{verb} requires a model and a file: jaxlm {verb} MODEL FILE [--field value ...]")
    hidden = [*_TRAINING_ONLY, *(["data.target_path"] if verb == "predict" else ())]
    parse = partial(flags.parse, hidden=hidden, why_hidden=_WHY_HIDDEN.format(verb=verb))
    if not words:  # --help without a model shows the fields of the most common task
        note = f"Task fields are those of a classification; jaxlm {verb} RUN --help shows those of a run's own task."
        parse(FileArguments(task=Classification()), argv, f"jaxlm {verb}", description=f"{_summary(verb)} {note}")
    _configure_process()
    import jaxlm
    from jaxlm.data import source
    from jaxlm.run.folder import run_of
    from jaxlm.run.trained_model import task_for

    config = _read_config(argv)  # this registers its task, which `run_of` may need
    run = run_of(words[0]) or config
    lm = jaxlm.load(words[0])
    trained = lm.trained
    predicts_tokens = verb != "predict" and lm.config.structure == "decoder" and "lm" in lm.config.heads_on_top
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
    args = parse(default, argv, f"jaxlm {verb}", description=_summary(verb))
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
    hidden = partial(flags.parse, hidden=list(_TRAINING_ONLY), why_hidden=_WHY_HIDDEN.format(verb="compress"))
    args = hidden(default, argv, "jaxlm compress", description=_summary("compress"))
    check_fields(args)
    check_task(args.task)
    args.recipe.check()
    _check_readable(args)
    from jaxlm.data import source
    from jaxlm.run import compress as compression

    file = args.recipe.calibration
    texts = source.documents(file, args.data, args.data.split, Counter()) if file else None
    variants = compression.variants_of(args.recipe, texts)
    evaluate = (lambda lm: _scores(lm, args.evaluate, args)[0]) if args.evaluate else None
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
    _configure_process()
    import jaxlm
    from jaxlm.run.trained_model import task_for

    lm = jaxlm.load(name)
    if lm.trained is None and lm.config.structure == "decoder" and "lm" in lm.config.heads_on_top:
        return CausalLM()
    try:
        return task_for(lm)
    except UserError:  # a model without a head: only --evaluate needs a task
        return CausalLM()


@dataclass(frozen=True)
class Convert(Config):
    """Write a model to a new folder or GGUF file, with another dtype, head or maximum file size."""

    # The folder of a run, a folder in Hugging Face format, a GGUF file, or a hub name.
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    # The folder to write, which must be new or empty, or a file whose name ends with .gguf.
    destination: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]
    # Of all tensors, or of the matrices of a GGUF file, which can also be q8_0 or q4_0; not set: unchanged.
    dtype: Literal["float32", "bfloat16", "float16", "q8_0", "q4_0"] | None = None
    head: str | None = None  # lm, masked_lm, classes, tokens, span, pooled, none, encoder ...; not set: unchanged
    merge: bool = False  # merge the updates of an adapter into its base, and write the whole model
    revision: str | None = None  # branch, tag or commit of a hub name
    shard_gb: Annotated[float, Range(0, 1_000_000, above=True)] = 5.0  # maximum size of a file, in 1e9 bytes
    overwrite: bool = False  # replace a destination that exists and is not empty


def convert(argv: list[str], _: process.Signals) -> int:
    """Write a model with another dtype, head or file size: jaxlm convert SOURCE DESTINATION [--dtype bfloat16]."""
    args = _parse(Convert(source=tyro.MISSING, destination=tyro.MISSING), argv, "jaxlm convert")
    _configure_process()
    import jaxlm

    jaxlm.lm.check_free(disk.local(args.destination, "DESTINATION"), args.overwrite)
    lm = jaxlm.load(args.source, head=args.head, dtype=None, compute_dtype="float32", revision=args.revision)
    lm = jaxlm.merge(lm, dequantize=True) if args.merge else lm
    max_bytes = int(args.shard_gb * 1e9)
    kind = jaxlm.save(lm, args.destination, dtype=args.dtype, overwrite=args.overwrite, max_shard_bytes=max_bytes)
    print(f"{args.destination}: {kind} format")
    return 0


@dataclass(frozen=True)
class Inspect(Config):
    """Print the config, parameters and stored tensors of a model."""

    # The folder of a run or a model, a hub name, a preset, or a config file.
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    head: str | None = None  # show the model as loaded with this head
    revision: str | None = None  # branch, tag or commit of a hub name
    # The mesh for which the sharding of each parameter is shown.
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(data=1))


def inspect(argv: list[str], _: process.Signals) -> int:
    """Print a model's config, parameters and stored tensors: jaxlm inspect MODEL_OR_CONFIG."""
    args = _parse(Inspect(target=tyro.MISSING), argv, "jaxlm inspect")
    _configure_process()
    import jax

    from jaxlm.devices import sharding
    from jaxlm.families import PRESETS
    from jaxlm.planning import inspect as inspection
    from jaxlm.run.config_only import resolve_config

    devices = math.prod(dataclasses.astuple(args.mesh))
    mesh = sharding.axis_sizes(args.mesh, abs(devices)) if devices != 1 else None
    path = Path(args.target)
    if path.suffix == ".py":
        run = python_files.read(path)
        if run.model is None and not run.init:
            raise UserError(f"{path} trains the model that --init names; inspect that model instead")
        one_device = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
        print(inspection.describe_config(resolve_config(run, one_device).model, mesh))
    elif not path.exists() and args.target in PRESETS:
        print(inspection.describe_config(PRESETS[args.target], mesh))
    else:
        print(inspection.describe(args.target, args.head, args.revision, mesh))
    return 0


def plan(argv: list[str], _: process.Signals) -> int:
    """Predict memory and step time of a run: jaxlm plan CONFIG [--topology NAME] [--fit] [--field value ...]."""
    from jaxlm.devices import chips

    file, words, flag_words = _split_config(argv, "plan")
    fit, as_json = "--fit" in flag_words, "--json" in flag_words
    flag_words = [flag for flag in flag_words if flag not in ("--fit", "--json")]
    topology = ""
    if "--topology" in flag_words:
        at = flag_words.index("--topology")
        topology = flag_words[at + 1] if at + 1 < len(flag_words) else ""
        flag_words = flag_words[:at] + flag_words[at + 2 :]
        chips.parse_topology(topology)
    run = _read_run("plan", file, words, flag_words)
    _configure_process()
    import jax

    from jaxlm.planning import plan as planning

    for name, value in (chips.PLANNING_SETTINGS if topology else {}).items():
        jax.config.update(name, value)
    log = lambda line: print(line, file=sys.stderr, flush=True)
    if fit:
        plans = planning.fitting(run, topology, str(file), log)
        result = plans[0] if plans else planning.plan(dataclasses.replace(run, remat="full"), topology, str(file))
    else:
        result = planning.plan(run, topology, str(file))
    print(json.dumps(planning.as_json(result)) if as_json else planning.as_text(result))
    return 0 if result.fits else 1


def baseline(argv: list[str], _: process.Signals) -> int:
    """Print what counting achieves on the data of a run: jaxlm baseline CONFIG [--arpa FILE] [--field value ...]."""
    file, words, flag_words = _split_config(argv, "baseline")
    arpa, flag_words = _split_flag(flag_words, "--arpa", "the path of a file to write")
    has_folder = any(word.partition("=")[0] == "--workdir" for word in flag_words)
    run = _read_run("baseline", file, words, flag_words)
    _configure_process()
    from jaxlm.run import baseline as counting

    log = lambda line: print(line, file=sys.stderr, flush=True)
    print(counting.baseline(run, run.workdir if has_folder else "", arpa, log), end="")
    return 0


def _read_run(verb: str, file: Path, words: list[str], flag_words: list[str]) -> RunConfig:
    """Returns the config of a file with the flags; `--model NAME` replaces its model by a preset."""
    preset, flag_words = _split_flag(flag_words, "--model", "the name of a preset, such as bert-base")
    run = python_files.read(file, words)
    if preset:
        from jaxlm.families import PRESETS

        if preset not in PRESETS:
            near = suggestion(preset, PRESETS)
            raise UserError(f"--model is {preset}, which is not a preset; --init loads pretrained weights{near}")
        run = dataclasses.replace(run, model=PRESETS[preset])
    return flags.parse(run, flag_words, f"jaxlm {verb} {' '.join([str(file), *words])}")


def _split_flag(words: list[str], flag: str, value_is: str) -> tuple[str, list[str]]:
    """Returns the value of a flag that is not a field of the config, "" without the flag, and the other words."""
    for n, word in enumerate(words):
        name, given, value = word.partition("=")
        if name == flag:
            value, end = (value, n + 1) if given else (words[n + 1] if n + 1 < len(words) else "", n + 2)
            if not value or value.startswith("--"):
                raise UserError(f"{flag} has no value; give {value_is}")
            return value, words[:n] + words[end:]
    return "", words


VERBS: dict[str, Callable[[list[str], process.Signals], int]] = {
    "train": train,
    "predict": predict,
    "evaluate": evaluate,
    "generate": generate,
    "compress": compress,
    "convert": convert,
    "inspect": inspect,
    "plan": plan,
    "baseline": baseline,
}


def main(argv: list[str] | None = None) -> int:
    """Runs a verb.

    Args:
      argv: the arguments, verb first; None: those of the process.

    Returns:
      The exit code: 0 for success, 2 for a user's mistake, 1 for a fault of the run, 143 for a training run that was
      stopped, 128 plus the signal for another verb that was stopped, 141 where the output was closed by its reader.

    Raises:
      SystemExit: after `--help`, and for flags that do not exist.
    """
    is_process, argv = argv is None, sys.argv[1:] if argv is None else argv
    process.open_streams()
    with process.catch_signals() as signals:
        try:
            code, error = _run_verb(argv, signals)
        except KeyboardInterrupt:  # after the verb has ended
            code, error = _report_interrupt(argv, signals)
        except SystemExit as end:  # raised by tyro
            raise SystemExit(process.flush_output(end.code if isinstance(end.code, int) else 2)) from None
        if signals.received and not code:  # a callback of JAX swallowed the exception
            code, error = _report_interrupt(argv, signals)
        code = hosts.exit_process(process.flush_output(code), error)
        if signals.received and is_process:
            os._exit(code)  # the interpreter may crash at its exit while a thread of JAX still compiles
        return code


def _run_verb(argv: list[str], signals: process.Signals) -> tuple[int, BaseException | None]:
    """Runs a verb and prints its error; returns the exit code and the error."""
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_overview(), flush=True)
            return (0 if argv else UserError.exit_code), None
        if argv[0] not in VERBS:
            raise UserError(f"{argv[0]!r} is not a verb of jaxlm{suggestion(argv[0], VERBS)}")
        return VERBS[argv[0]](argv[1:], signals), None
    except (UserError, RunError, Stopped) as error:
        process.print_error(f"{'' if isinstance(error, Stopped) else 'error: '}{error}")
        return error.exit_code, error
    except KeyboardInterrupt:
        return _report_interrupt(argv, signals)
    except BrokenPipeError as error:  # the reader of the output, such as `head`, has closed it
        return process.report_lost_output(error), error
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error
        process.print_error(
            f"error: {reason}; free disk space or fix the permissions, or choose another --workdir or --data.cache, "
            f"then run the command again"
        )
        return RunError.exit_code, error
    except Exception as error:
        if signals.received:  # XLA wraps an interrupt in its own error
            return _report_interrupt(argv, signals)
        if "RESOURCE_EXHAUSTED" not in str(error):
            hosts.exit_with_traceback(error)
            raise
        reason = str(error).splitlines()[0][:300].rstrip(".")
        process.print_error(
            f"error: out of memory: {reason}; use --remat full, a larger --accumulate, or a smaller --batch or "
            f"--data.length; jaxlm plan CONFIG shows what uses the memory"
        )
        return RunError.exit_code, error


def _report_interrupt(argv: list[str], signals: process.Signals) -> tuple[int, BaseException]:
    """Prints that a signal ended a verb without a result; returns the exit code and the exception."""
    if argv[:1] == ["train"]:
        end = Stopped("stopped before there was anything to save; run the same command to start again")
        process.print_error(str(end))
        return end.exit_code, end
    process.print_error(f"stopped by {signals.name}; no complete output was written")
    return signals.code, KeyboardInterrupt()


def _overview() -> str:
    """Returns the text of `jaxlm --help`."""
    verbs = "\n".join(f"  {verb:10} {_summary(verb)}\n{'':12} {_usage(verb)}" for verb in VERBS)
    return (
        f"usage: jaxlm VERB ...\n\n{verbs}\n\n"
        f"MODEL is the folder of a run, a folder in Hugging Face format, or a hub name.\n"
        f"CONFIG is a Python file, or the name of an included config:\n{_included_configs()}\n\n"
        f"jaxlm VERB --help lists the flags of a verb; jaxlm train CONFIG --help lists those of a training run."
    )


def _summary(verb: str) -> str:
    return f"{(VERBS[verb].__doc__ or '').partition(': ')[0]}."


def _usage(verb: str) -> str:
    return (VERBS[verb].__doc__ or "").partition(": ")[2].rstrip(".")


def _included_configs() -> str:
    return textwrap.fill(
        f"{', '.join(python_files.built_in_names())}.", 100, initial_indent="  ", subsequent_indent="  "
    )


def _split_config(argv: list[str], verb: str = "train") -> tuple[Path, list[str], list[str]]:
    """Returns the config file, the arguments of its function `config`, and the flags after them."""
    if argv and argv[0] in ("-h", "--help"):
        print(
            f"usage: {_usage(verb)}\n\n{_summary(verb)}\n\n{_FLAGS[verb]}\n\n"
            f"CONFIG is a Python file, or the name of an included config:\n{_included_configs()}\n\n"
            f"jaxlm {verb} CONFIG --help explains every field of the config."
        )
        raise SystemExit(0)
    if not argv or argv[0].startswith("-"):
        configs = ", ".join(python_files.built_in_names())
        raise UserError(f"{verb} requires a config: {_usage(verb)}; CONFIG is a Python file, or one of {configs}")
    words = list(takewhile(lambda word: not word.startswith("-"), argv[1:]))
    return Path(argv[0]), words, argv[1 + len(words) :]


_FLAGS = {
    "train": """\
  --field value           change a field of the config, such as --optimizer.rate 3e-5
  --model PRESET          replace the model by a preset, such as bert-base or lstm-classifier
  --sweep FIELD=A,B ...   train every combination of these values, each in its own folder""",
    "plan": """\
  --field value     change a field of the config, such as --batch 64
  --model PRESET    replace the model by a preset, such as bert-base or llama-3.1-8b
  --topology NAME   chips and their number, such as v5e:4x4 or H100:8; not set: the devices of this machine
  --fit             find the largest batch that fits into memory for each remat policy, and plan the fastest
  --json            print the plan as JSON""",
    "baseline": """\
  --field value     change a field of the config, such as --data.path or --baseline.order
  --model PRESET    replace the model by a preset
  --arpa FILE       for a language model: write the n-gram model; its words are the ids of the tokens
  --workdir FOLDER  write the scores to baseline.json in this folder""",
}


def _parse(default: Config, argv: list[str], prog: str) -> Any:
    """Returns the arguments of a verb, whose fields are checked."""
    args = flags.parse(default, argv, prog, description=None)
    check_fields(args)
    return args


def one_device_per_core(runs: list[RunConfig], processes: int = 1) -> None:
    """Sets the number of CPU devices and threads of XLA in the environment, before JAX looks for devices.

    The devices are as many as the cores, reduced until they divide the rows of all runs: XLA parallelises a small model
    badly within one device. Other platforms ignore the setting.

    Args:
      runs: the runs that this process will train.
      processes: number of processes that share this machine.
    """
    options = os.environ.get("XLA_FLAGS", "")
    preset = re.search(r"host_platform_device_count=(\d+)", options)
    devices = int(preset[1]) if preset else max(1, math.gcd(*map(_devices, runs)) // processes)
    if not preset and devices > MAX_CPU_DEVICES:  # XLA crashes with thousands of devices; `fit` refuses the mesh
        devices = _cores()
    if not preset:
        os.environ["XLA_FLAGS"] = f"{options} --xla_force_host_platform_device_count={devices}".strip()
    if any(sum(size != 1 for size in dataclasses.astuple(run.mesh)) > 1 for run in runs):
        # With one thread per device, two independent collectives over two mesh axes can deadlock: one device starts the
        # first, another the second. XLA reads the number of its threads from NPROC.
        os.environ.setdefault("NPROC", str(max(_cores(), 2 * devices)))


def _cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices(run: RunConfig) -> int:
    """Returns the best number of CPU devices for a run.

    A large model, or one with few tokens per update, uses one device for all cores: each further device would store and
    update another copy of the parameters.
    """
    if run.model is not None:
        parameters = run.model.vocabulary * run.model.width + 12 * run.model.layers * run.model.width**2
    else:  # most files have 4 bytes per parameter; a hub name is not downloaded for this
        init = Path(run.init)
        files = [init] if init.is_file() else init.glob("**/*.safetensors")  # a GGUF file
        parameters = sum(file.stat().st_size for file in files) // 4
    sizes = dataclasses.astuple(run.mesh)
    if -1 not in sizes:
        return math.prod(sizes)
    fixed = -math.prod(sizes)
    rows = 0 if run.examples else run.batch // run.accumulate  # a batch size that is computed later fits the devices
    # `examples` are packed into an unknown number of rows; they are assumed to be short.
    tokens = run.examples * min(64, run.data.length) or run.batch * run.data.length
    max_devices = _cores() if parameters < min(LARGE_ON_CPU, LARGE_PER_TOKEN * tokens) else max(1, fixed)
    fits = [n for n in range(1, max_devices + 1) if n % max(1, fixed) == 0 and rows % n == 0]
    return max(fits, default=1)


def _configure_process() -> None:
    """Sets memory, logging and compilation cache for every verb that computes."""
    keep_memory()
    import jax

    for name in ("absl", "orbax", "jax", "asyncio"):
        # Their errors are also raised, and are reported once, by `main`.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _report_unraisable
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = disk.cache_folder()
        settings: dict[str, Any] = {
            "jax_compilation_cache_dir": str(folder / "xla"),
            "jax_persistent_cache_min_compile_time_secs": 0.5,
        }
        for name, value in settings.items():
            jax.config.update(name, value)


def keep_memory() -> None:
    """Makes the C library keep freed memory, on machines without an accelerator; call it before JAX starts threads.

    XLA allocates the buffers of each step again. By default glibc returns large ones to the kernel, which clears every
    page in the next step; this takes a fifth of the time of a small model on two cores. Threads that exist already have
    their own heaps, which this does not change.
    """
    accelerators = ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*", "kfd")
    if os.environ.get("JAX_PLATFORMS") != "cpu" and any(True for d in accelerators for _ in Path("/dev").glob(d)):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        arena_max, mmap_max, trim_threshold, top_pad = -8, -4, -1, -2  # of <malloc.h>
        for option, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 1 << 26)):
            libc.mallopt(option, value)


def _report_unraisable(unraisable: Any, report: Callable[[Any], Any] = sys.unraisablehook) -> None:
    """Hides two messages that Orbax causes when several arrays of a checkpoint fail: the first failure is raised."""
    error = unraisable.exc_value
    hidden = str(error).startswith(("Event loop is closed", "Encountered error while reading array index"))
    if not hidden and not isinstance(error, KeyboardInterrupt):  # `process.signals` reports interrupts
        report(unraisable)


if __name__ == "__main__":
    sys.exit(main())
