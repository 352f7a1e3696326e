"""`jaxlm VERB ...`: the library at the command line.

Only this file sets process-wide things: XLA flags, the compilation cache, signal handlers, exit codes.
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
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxlm.devices.process import interrupts_wait

with interrupts_wait():
    import tyro

    from jaxlm.config import (
        CausalLM,
        Classification,
        DataConfig,
        Decoding,
        MeshConfig,
        RunConfig,
        check_task,
        flags,
        python_files,
    )
    from jaxlm.config.ranges import MOST, Config, Count, Range, check_fields
    from jaxlm.devices import hosts, process
    from jaxlm.errors import RunError, Stopped, UserError, perhaps
    from jaxlm.run import sweep as sweeps
    from jaxlm.storage import buckets, disk

MOST_ON_CPU = 256  # devices that stand for the cores of a CPU
LARGE_ON_CPU = 50_000_000  # parameters; from here on one CPU device serves all cores,
# As from here on, by the tokens of an update: MiniLM on SST-2 takes 206 ms an update instead of 325.
LARGE_BY_TOKEN = 5_000


def train(argv: list[str], signals: process.Signals) -> int:
    """Train what a config says: jaxlm train CONFIG [--field value ...] [--sweep FIELD=A,B ...]."""
    file, words, given = _words(argv)
    given, asked = _swept(given)
    prog = f"jaxlm train {' '.join([str(file), *words])}"
    read = lambda more: flags.parse(python_files.read(file, words), given + more, prog)
    trials = sweeps.combinations(asked)
    runs = [read([f"--{name}={value}" for name, value in fields.items()]) for fields in trials]
    for run in runs:
        run.check()
    where = hosts.place(os.environ)
    one_device_per_core(runs, where.processes if where and where.processes else 1)
    _process()
    hosts.join(where)
    from jaxlm.run.fit import fit
    from jaxlm.run.folder import SUMMARY
    from jaxlm.tasks import best_of

    if not asked:
        fit(runs[0], stop=signals.stop)
        return 0
    if buckets.is_address(read([]).workdir):
        raise UserError(f"workdir is {read([]).workdir}; the runs of a sweep need a folder of this machine")
    top, score = Path(read([]).workdir), best_of(runs[0])
    trial = lambda n, folder: fit(dataclasses.replace(runs[n], workdir=str(folder)), stop=signals.stop, summary=False)
    done = sweeps.sweep(trials, top, trial, score)
    print("\n" + sweeps.tables(done, score))
    if (best := sweeps.best_of(done, score)) is None:
        raise RunError(f"every run of the sweep failed; {top / 'sweep.md'} names them, what each printed says why")
    print(f"the best run, {top / best.folder}:\n")
    print((top / best.folder / SUMMARY).read_text() if (top / best.folder / SUMMARY).exists() else "")
    print(f"the same alone:  {_command(argv, [f'--{name}={value}' for name, value in best.fields.items()], top)}")
    return 0


def _command(argv: list[str], fields: list[str], top: Path) -> str:
    """Returns the command that trains one run of a sweep, given by `argv`, in a folder beside that of the sweep."""
    given, _ = _swept(argv)
    name = Path(sys.argv[0]).name
    program = {"train.py": ["python", sys.argv[0]], "__main__.py": ["python", "-m", "jaxlm", "train"]}
    words = [*program.get(name, ["jaxlm", "train"]), *given, *fields, f"--workdir={top}-best"]
    return shlex.join(words)


def _swept(given: list[str]) -> tuple[list[str], list[str]]:
    """The flags, and the words behind --sweep."""
    if "--sweep" not in given:
        return given, []
    at = given.index("--sweep")
    words = list(takewhile(lambda word: not word.startswith("-"), given[at + 1 :]))
    if not words:
        raise UserError("--sweep has no fields; give FIELD=VALUE,VALUE such as optimizer.rate=2e-5,5e-5 seed=0,1,2")
    return given[:at] + given[at + 1 + len(words) :], words


@dataclass(frozen=True)
class Generate(Config):
    """Continue prompts with a model, or answer them with an encoder-decoder."""

    # A run, a folder in Hugging Face's format, or a hub name.
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    prompt: tuple[str, ...] = ()  # one or more texts to continue; none: the beginning of a text
    file: str = ""  # a text file with a prompt in each line, in place of --prompt
    output: str = ""  # of --file, a .jsonl file to write or to go on with; empty: to the standard output
    draft: str = ""  # a smaller model with the same tokenizer, which makes it faster
    decoding: tyro.conf.OmitArgPrefixes[Decoding] = dataclasses.field(default_factory=Decoding)  # how


def generate(argv: list[str], _: process.Signals) -> int:
    """Continue prompts: jaxlm generate RUN_OR_FOLDER --prompt TEXT [TEXT ...] | --file PROMPTS [--output OUT.jsonl]."""
    asked = _generate_asked(argv)
    asked.decoding.check()
    check_fields(asked)
    if (asked.file and asked.prompt) or (asked.output and not asked.file):
        raise UserError("--file stands in place of --prompt, and --output goes with --file; leave one out")
    if asked.file:
        return _of_file(asked)
    lm, draft = _models(asked)
    import jaxlm

    prompts, continues = list(asked.prompt) or [""], lm.config.structure == "decoder"
    if len(prompts) == 1 and asked.decoding.n_best == 1 and sys.stdout.isatty():
        pieces = jaxlm.stream(lm, prompts[0], asked.decoding, draft=draft)
        for piece in chain(prompts * continues, pieces, ["\n"]):
            print(piece, end="", flush=True)
        return 0
    for prompt, found in zip(prompts, jaxlm.generate(lm, prompts, asked.decoding, draft=draft), strict=True):
        for text in found if asked.decoding.n_best > 1 else [found]:
            print(prompt * continues + text)
    return 0


def _generate_asked(argv: list[str]) -> Generate:
    """Returns what was asked.  The choices of the checkpoint stand in place of the defaults, and are printed."""
    from jaxlm.inference.generation_defaults import chosen, defaults_in, lines
    from jaxlm.lm import find

    plain = Generate(model=tyro.MISSING)
    parse = partial(flags.parse, flags=argv, prog="jaxlm generate", description=None)
    helps = bool({"-h", "--help"} & {*argv})
    if helps and (not argv or argv[0].startswith("-")):
        return parse(plain)  # ends here
    model = argv[0] if helps else parse(plain).model  # flags are checked before a model is fetched
    try:
        defaults = defaults_in(find(model, offline=helps))
    except UserError:
        if not helps:
            raise
        return parse(plain)
    asked = parse(Generate(model, decoding=chosen(None, {}, defaults)))
    words = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    fields = [field.name for field in dataclasses.fields(Decoding) if field.name in words]
    given = {name: getattr(asked.decoding, name) for name in fields}
    for line in lines(defaults):
        print(line, file=sys.stderr)
    return dataclasses.replace(asked, decoding=chosen(None, given, defaults))


def _of_file(asked: Generate) -> int:
    """The texts of a file of prompts, one JSON object in a line, as many as are not in the output yet."""
    from jaxlm.inference import prompts as files

    prompts = files.read(asked.file)
    made_with = lambda: files.choices_of(asked.model, asked.decoding, asked.draft)  # reads every byte of the model
    with files.PromptOutput(asked.output, prompts, made_with()) if asked.output else nullcontext() as output:
        done = output.done if output else 0
        if done:
            print(f"{asked.output} has {done:,} of {len(prompts):,} rows already", file=sys.stderr)
        if done == len(prompts):
            return 0
        lm, draft = _models(asked)
        for row in files.texts(lm, prompts, asked.decoding, draft, done):
            if output:
                output.write(row)
            else:
                print(json.dumps(row, ensure_ascii=False), flush=True)
    return 0


def _models(asked: Generate) -> tuple[Any, Any]:
    """The model and its draft, where there is one."""
    _process()
    import jaxlm
    from jaxlm.inference.generate import check

    lm = jaxlm.load(asked.model)
    draft = jaxlm.load(asked.draft) if asked.draft else None
    check(lm, asked.decoding, draft)
    if lm.tokenizer is None:
        raise UserError(f"{asked.model} has no tokenizer, which texts need; put its files beside the model's")
    return lm, draft


@dataclass(frozen=True)
class OnFile(Config):
    """A model on the rows of a file; the fields of the task and of the data are those that it was trained with."""

    # A run, a folder in Hugging Face's format, or a hub name.
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = ""
    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")] = ""  # file, folder, glob or tfds:NAME
    output: str = ""  # of predict, a .csv or .jsonl file to write; empty: csv to the standard output
    config: str = ""  # the config file of a run with a task of your own
    # Tokens in a row, and the most that an example has; 0: as in training, else 512.
    length: Annotated[int, Range(2, MOST, special=(0, "as in training"))] = 0
    # Rows in a batch; 0: what suits the machine.
    batch: Annotated[int, Range(1, 1_000_000, special=(0, "what suits"))] = 0
    probabilities: bool = False  # of predict: a column with the probability of each class
    top_k: Count = 0  # of predict: columns with so many of the likeliest classes; 0: none
    task: Any = None  # what is told
    data: DataConfig = dataclasses.field(default_factory=DataConfig)  # how the file is read


def predict(argv: list[str], _: process.Signals) -> int:
    """Tell what the rows of a file are: jaxlm predict RUN_OR_FOLDER FILE [--output OUT.csv]."""
    asked, lm = _on_file(argv, "predict")
    from jaxlm.data import source
    from jaxlm.run.evaluate import predicted
    from jaxlm.run.folder import RowWriter
    from jaxlm.tasks import columns_of

    columns = columns_of(asked.task, labelled=False)
    # The others are written beside the predictions.
    columns = columns and columns._replace(alone=False)
    data = dataclasses.replace(asked.data, label_from="column")
    rows = source.rows(asked.file, data, data.split, columns=columns)
    classes: dict[str, Any] = {"probabilities": asked.probabilities, "top_k": asked.top_k}
    with RowWriter(asked.output, getattr(asked.task, "separator", " ")) as writer:
        for row, told in predicted(lm, rows, asked.task, asked.length or None, asked.batch or None, **classes):
            writer.write(row, told)
    return 0


def evaluate(argv: list[str], _: process.Signals) -> int:
    """Score a model on the rows of a file, or a language model on its texts: jaxlm evaluate RUN_OR_FOLDER FILE."""
    asked, lm = _on_file(argv, "evaluate")
    from jaxlm.data import source
    from jaxlm.inference.likelihood import perplexity
    from jaxlm.run.evaluate import beside, scored
    from jaxlm.tasks import columns_of

    if asked.probabilities or asked.top_k:
        raise UserError("--probabilities and --top-k are of predict; leave them out")
    if isinstance(asked.task, CausalLM):
        texts = source.documents(asked.file, asked.data, asked.data.split, Counter())
        scores = perplexity(lm, texts, length=asked.length or None, stride=asked.task.stride or None)
    else:
        target, columns = asked.data.target_path, columns_of(asked.task, asked.data.label_from == "column")
        rows = list(source.rows(asked.file, asked.data, asked.data.split, target_path=target, columns=columns))
        scores = scored(lm, rows, asked.task, asked.length or None, asked.batch or None)
        for line in beside(rows, asked.task):
            print(line, file=sys.stderr)
    for name, value in scores.items():
        # Fractions, a name and a number on each line: scripts read this.
        print(f"{name.replace('_', ' '):>20}  {value:{'.4f' if isinstance(value, float) else ','}}")
    return 0


# Fields of the data that are of training alone, and why `predict` and `evaluate` do not take them.
_EVALUATION = ("eval_path", "eval_target_path", "eval_split", "eval_fraction", "eval_choice", "eval_seed")
_OF_TRAINING = tuple(f"data.{name}" for name in ("path", *_EVALUATION, "length", "cache"))
_OTHERWISE = "is of training; give the file behind the model, {verb} RUN FILE, and the length of rows by --length"


def _on_file(argv: list[str], verb: str) -> tuple[OnFile, Any]:
    """What was asked, with the task and the data's shape of the model's own run as the defaults; and the model."""
    words = list(takewhile(lambda word: not word.startswith("-"), argv))[:2]
    if len(words) < 2 and not {"-h", "--help"} & set(argv):
        raise UserError(f"{verb} takes a model and a file first: jaxlm {verb} RUN_OR_FOLDER FILE [--field value ...]")
    hidden = [*_OF_TRAINING, *(["data.target_path"] if verb == "predict" else ())]
    parse = partial(flags.parse, hidden=hidden, why_hidden=_OTHERWISE.format(verb=verb))
    if not words:  # --help without a model: the fields of the commonest task
        parse(OnFile(task=Classification()), argv, f"jaxlm {verb}", description=_HELP.format(verb=verb))
    _process()
    import jaxlm
    from jaxlm.data import source
    from jaxlm.run.evaluate import task_for
    from jaxlm.run.folder import run_of

    config = _given_config(argv)  # its task is known from here on
    run = run_of(words[0]) or config
    lm = jaxlm.load(words[0])
    trained = lm.trained
    predicts_tokens = verb == "evaluate" and lm.config.structure == "decoder" and "lm" in lm.config.heads_on_top
    task = CausalLM() if predicts_tokens and trained is None else None
    default = OnFile(words[0], words[1] if len(words) > 1 else "", task=run.task if run else task or task_for(lm))
    if run is None and trained is not None:
        default = dataclasses.replace(default, length=trained.length)
    if run is not None:
        none: dict[str, Any] = dict.fromkeys(("path", "target_path", "eval_path", "eval_target_path"), "")
        data = dataclasses.replace(source.alike(default.file, run.data), **none)
        default = dataclasses.replace(default, data=data, length=run.data.length)
    asked = parse(default, argv, f"jaxlm {verb}")
    check_fields(asked)
    check_task(asked.task)
    return asked, lm


def _given_config(argv: list[str]) -> RunConfig | None:
    """The config of `--config FILE` or `--config=FILE`."""
    for word, after in zip(argv, [*argv[1:], ""]):
        name, _, value = word.partition("=")
        if name == "--config" and (value or after):
            return python_files.read(Path(value or after))
    return None


_HELP = (
    "jaxlm {verb} RUN_OR_FOLDER FILE [--field value ...]. The fields of the task are those of the model's run: jaxlm "
    "{verb} RUN --help shows them; here they are those of a classification."
)


@dataclass(frozen=True)
class Convert(Config):
    """Write a model anew: in another dtype, with another head, in shards."""

    # A run, a folder in Hugging Face's format, or a hub name.
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    # The folder to write; it must not exist, or be empty.
    destination: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the tensors; unsaid: each as it was stored
    head: str | None = None  # lm, masked_lm, classes, tokens, span, pooled, none, encoder ...; unsaid: as it is
    revision: str | None = None  # branch, tag or commit of a hub name
    shard_gb: Annotated[float, Range(0, 1_000_000, above=True)] = 5.0  # files are at most this large, in 1e9 bytes
    overwrite: bool = False  # replace a destination that is not empty


def convert(argv: list[str], _: process.Signals) -> int:
    """Write a model anew: jaxlm convert SOURCE DESTINATION [--dtype bfloat16]."""
    asked = _asked(Convert(source=tyro.MISSING, destination=tyro.MISSING), argv, "jaxlm convert")
    _process()
    import jaxlm

    jaxlm.lm.check_free(disk.local(asked.destination, "DESTINATION"), asked.overwrite)
    lm = jaxlm.load(asked.source, head=asked.head, dtype=None, compute_dtype="float32", revision=asked.revision)
    most = int(asked.shard_gb * 1e9)
    kind = jaxlm.save(lm, asked.destination, dtype=asked.dtype, overwrite=asked.overwrite, max_shard_bytes=most)
    print(f"{asked.destination}: {kind} format")
    return 0


@dataclass(frozen=True)
class Inspect(Config):
    """Show what a model is made of."""

    # A run, a model's folder, a hub name, a preset, or configs/NAME.py.
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    head: str | None = None  # as if it were loaded with this head
    revision: str | None = None  # branch, tag or commit of a hub name
    # On which mesh each parameter's place is shown.
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(data=1))


def inspect(argv: list[str], _: process.Signals) -> int:
    """Show a model's parameters and the file's tensors: jaxlm inspect RUN_OR_FOLDER_OR_HUB_NAME_OR_CONFIG."""
    asked = _asked(Inspect(target=tyro.MISSING), argv, "jaxlm inspect")
    _process()
    import jax

    from jaxlm.devices import sharding
    from jaxlm.families import PRESETS
    from jaxlm.planning import inspect as inspection
    from jaxlm.run.config_only import resolve_config

    devices = math.prod(dataclasses.astuple(asked.mesh))
    mesh = sharding.axis_sizes(asked.mesh, abs(devices)) if devices != 1 else None
    path = Path(asked.target)
    if path.suffix == ".py":
        run = python_files.read(path)
        if run.model is None and not run.init:
            raise UserError(f"{path} starts from the model that --init names; inspect that model")
        one_device = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
        print(inspection.of_model(resolve_config(run, one_device).model, mesh))
    elif not path.exists() and asked.target in PRESETS:
        print(inspection.of_model(PRESETS[asked.target], mesh))
    else:
        print(inspection.target(asked.target, asked.head, asked.revision, mesh))
    return 0


def plan(argv: list[str], _: process.Signals) -> int:
    """Say what a run needs on chips that are not here: jaxlm plan CONFIG --topology v5e:4x4 [--fit]."""
    from jaxlm.devices import chips

    file, words, given = _words(argv, "plan")
    fits, as_json = "--fit" in given, "--json" in given
    given = [flag for flag in given if flag not in ("--fit", "--json")]
    topology = ""
    if "--topology" in given:
        at = given.index("--topology")
        topology, given = (given[at + 1] if at + 1 < len(given) else ""), given[:at] + given[at + 2 :]
        chips.parse(topology)
    run = flags.parse(python_files.read(file, words), given, f"jaxlm plan {' '.join([str(file), *words])}")
    _process()
    import jax

    from jaxlm.planning import plan as planning

    for name, value in (chips.SETTINGS if topology else {}).items():
        jax.config.update(name, value)
    tell = lambda line: print(line, file=sys.stderr, flush=True)
    if fits:
        plans = planning.fitting(run, topology, str(file), tell)
        made = plans[0] if plans else planning.plan(dataclasses.replace(run, remat="full"), topology, str(file))
    else:
        made = planning.plan(run, topology, str(file))
    print(json.dumps(planning.as_json(made)) if as_json else planning.as_text(made))
    return 0 if made.fits else 1


VERBS: dict[str, Callable[[list[str], process.Signals], int]] = {
    "train": train,
    "predict": predict,
    "evaluate": evaluate,
    "generate": generate,
    "convert": convert,
    "inspect": inspect,
    "plan": plan,
}


def main(argv: list[str] | None = None) -> int:
    """Runs a verb and returns the exit code.

    0; 2 for a mistake in what was given; 1 for a fault of the run; 143 for a run that was stopped; 128 and the number
    of the signal for another verb that a signal ended; 141 where the reader of the output is gone.
    """
    argv = sys.argv[1:] if argv is None else argv
    process.open_streams()
    with process.signals() as signals:
        try:
            code, error = _ended(argv, signals)
        except KeyboardInterrupt:  # between the end of a verb and here
            code, error = _interrupted(argv, signals)
        except SystemExit as end:  # tyro's, after --help or a mistake in the flags
            raise SystemExit(process.flushed(end.code if isinstance(end.code, int) else 2)) from None
        if signals.came and not code:  # a callback of JAX swallowed the exception
            code, error = _interrupted(argv, signals)
        return hosts.leave(process.flushed(code), error)


def _ended(argv: list[str], signals: process.Signals) -> tuple[int, BaseException | None]:
    """Runs a verb; returns the exit code, and the error that ended the verb, once the error is printed."""
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_overview(), flush=True)
            return (0 if argv else UserError.exit_code), None
        if argv[0] not in VERBS:
            raise UserError(f"{argv[0]!r} is not a verb of jaxlm{perhaps(argv[0], VERBS)}")
        return VERBS[argv[0]](argv[1:], signals), None
    except (UserError, RunError, Stopped) as error:
        process.report(f"{'' if isinstance(error, Stopped) else 'error: '}{error}")
        return error.exit_code, error
    except KeyboardInterrupt:
        return _interrupted(argv, signals)
    except BrokenPipeError as error:  # the reader of the output, such as head, has seen enough
        return process.output_lost(error), error
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error
        process.report(
            f"error: {what}; make room or free it, or choose another --workdir or --data.cache, then give the command "
            f"again"
        )
        return RunError.exit_code, error
    except Exception as error:
        if signals.came:  # XLA wraps an interrupt in an error of its own
            return _interrupted(argv, signals)
        if "RESOURCE_EXHAUSTED" not in str(error):
            hosts.leave_by(error)
            raise
        said = str(error).splitlines()[0][:300].rstrip(".")
        process.report(
            f"error: out of memory: {said}; give --remat full, more --accumulate, or a smaller --batch or "
            f"--data.length; jaxlm plan CONFIG says what takes it"
        )
        return RunError.exit_code, error


def _interrupted(argv: list[str], signals: process.Signals) -> tuple[int, BaseException]:
    """The exit code of a verb that a signal ended before it had anything to save, once that is printed."""
    if argv[:1] == ["train"]:
        end = Stopped("stopped before there was anything new to save; the same command starts again")
        process.report(str(end))
        return end.exit_code, end
    process.report(f"stopped by {signals.name}; no output is left under its final name")
    return signals.code, KeyboardInterrupt()


def _overview() -> str:
    """What `jaxlm --help` prints."""
    verbs = "\n".join(f"  {name:10} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items())
    return (
        f"usage: jaxlm VERB ...\n\n{verbs}\n\n"
        f"jaxlm VERB --help explains the flags of a verb, jaxlm train CONFIG --help those of a run.\n"
        f"Configs of jaxlm's own: {', '.join(python_files.own())}."
    )


def _words(argv: list[str], verb: str = "train") -> tuple[Path, list[str], list[str]]:
    """A config file, what `config` takes, and the flags behind them."""
    usage = f"jaxlm {verb} CONFIG [--field value ...]; CONFIG is a file, or one of {', '.join(python_files.own())}"
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: {usage}\n\njaxlm {verb} CONFIG --help explains every field of a config.")
        raise SystemExit(0)
    if not argv or argv[0].startswith("-"):
        raise UserError(f"{verb} takes a config first: {usage}")
    words = list(takewhile(lambda word: not word.startswith("-"), argv[1:]))
    return Path(argv[0]), words, argv[1 + len(words) :]


def _asked(default: Config, argv: list[str], prog: str) -> Any:
    """What the words of a verb ask for, each field in its range."""
    asked = flags.parse(default, argv, prog, description=None)
    check_fields(asked)
    return asked


def one_device_per_core(runs: list[RunConfig], processes: int = 1) -> None:
    """On CPU gives XLA one device for each core, as many as divide the rows of all runs, since its own threads use a
    small model's cores badly, and threads as a mesh needs them.  Without effect on other platforms.  Must come before
    JAX looks for devices."""
    options = os.environ.get("XLA_FLAGS", "")
    given = re.search(r"host_platform_device_count=(\d+)", options)
    devices = int(given[1]) if given else max(1, math.gcd(*map(_devices, runs)) // processes)
    if not given and devices > MOST_ON_CPU:  # XLA crashes when it makes thousands; `fit` refuses the mesh
        devices = _cores()
    if not given:
        os.environ["XLA_FLAGS"] = f"{options} --xla_force_host_platform_device_count={devices}".strip()
    if any(sum(size != 1 for size in dataclasses.astuple(run.mesh)) > 1 for run in runs):
        # Of two independent collectives, over two axes, one device may begin the first and another the second; with
        # one thread a device they wait for each other for ever.  XLA takes the number of its threads from NPROC.
        os.environ.setdefault("NPROC", str(max(_cores(), 2 * devices)))


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices(run: RunConfig) -> int:
    """How many devices suit a run on CPU.

    A large model has one for all cores, as has one that is large by the tokens of an update: each further device would
    hold and update all parameters once more.
    """
    if run.model is not None:
        parameters = run.model.vocabulary * run.model.width + 12 * run.model.layers * run.model.width**2
    else:  # four bytes each, in most files; a hub name is not fetched for this
        parameters = sum(file.stat().st_size for file in Path(run.init).glob("**/*.safetensors")) // 4
    sizes = dataclasses.astuple(run.mesh)
    if -1 not in sizes:
        return math.prod(sizes)
    fixed = -math.prod(sizes)
    rows = 0 if run.examples else run.batch // run.accumulate  # rows that are yet to be chosen suit the devices
    # Of so many examples it is only known that they are packed: they are taken to be short.
    tokens = run.examples * min(64, run.data.length) or run.batch * run.data.length
    most = _cores() if parameters < min(LARGE_ON_CPU, LARGE_BY_TOKEN * tokens) else max(1, fixed)
    fits = [n for n in range(1, most + 1) if n % max(1, fixed) == 0 and rows % n == 0]
    return max(fits, default=1)


def _process() -> None:
    """What every verb that computes wants of the process."""
    keep_memory()
    import jax

    for name in ("absl", "orbax", "jax", "asyncio"):
        # Errors too: each is raised as well, and told in one message.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _tell_unraisable
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = disk.cache_folder()
        settings: dict[str, Any] = {
            "jax_compilation_cache_dir": str(folder / "xla"),
            "jax_persistent_cache_min_compile_time_secs": 0.5,
        }
        for name, value in settings.items():
            jax.config.update(name, value)


def keep_memory() -> None:
    """Lets the C library keep the memory that it has, on machines without an accelerator.

    XLA takes the buffers of each step anew.  By default glibc hands the large ones back to the kernel, which clears
    every page of them again in the next step: a fifth of a small model's time on two cores.  Must come before JAX
    starts its threads, which otherwise have heaps of their own already.
    """
    accelerators = ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*", "kfd")
    if os.environ.get("JAX_PLATFORMS") != "cpu" and any(True for d in accelerators for _ in Path("/dev").glob(d)):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        arena_max, mmap_max, trim_threshold, top_pad = -8, -4, -1, -2  # of <malloc.h>
        for option, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 1 << 26)):
            libc.mallopt(option, value)


def _tell_unraisable(what: Any, before: Callable[[Any], Any] = sys.unraisablehook) -> None:
    """When one array of a checkpoint fails, Orbax has nobody left to tell of the others, and prints that."""
    known = str(what.exc_value).startswith(("Event loop is closed", "Encountered error while reading array index"))
    if not known and not isinstance(what.exc_value, KeyboardInterrupt):  # which `process.signals` reports
        before(what)


if __name__ == "__main__":
    sys.exit(main())
