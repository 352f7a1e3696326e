"""`jaxlm train`: a run, or the runs of a sweep."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from itertools import takewhile
from pathlib import Path

from jaxlm.config import RunConfig, VectorsConfig, flags, python_files
from jaxlm.devices import hosts, process
from jaxlm.errors import RunError, UserError
from jaxlm.run import sweep as sweeps
from jaxlm.storage import buckets
from jaxlm.verbs import machine
from jaxlm.verbs.arguments import read_run, split_config
from jaxlm.verbs.files import UNUSED_BY_VECTORS

_FLAGS = """\
  --field value           change a field of the config, such as --optimizer.rate 3e-5
  --model PRESET          replace the model by a preset, such as bert-base or lstm-classifier
  --sweep FIELD=A,B ...   train every combination of these values, each in its own folder"""


def train(argv: list[str], signals: process.Signals) -> int:
    """Train a model as a config describes: jaxlm train CONFIG [--field value ...] [--sweep FIELD=A,B ...]."""
    file, words, flag_words = split_config(argv, train, _FLAGS)
    flag_words, sweep_fields = _split_sweep(flag_words)
    config = python_files.read_any(file, words)
    if isinstance(config, VectorsConfig):
        prog = f"jaxlm train {' '.join([str(file), *words])}"
        return _train_vectors(config, flag_words, sweep_fields, prog, signals)
    read = lambda more: read_run("train", file, words, flag_words + more)
    trials = sweeps.combinations(sweep_fields)
    runs = [read([f"--{name}={value}" for name, value in fields.items()]) for fields in trials]
    for run in runs:
        run.check()
    rendezvous = hosts.find_rendezvous(os.environ)
    machine.one_device_per_core(runs, rendezvous.processes if rendezvous and rendezvous.processes else 1)
    machine.configure_process()
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
    run = flags.parse(config, flag_words, prog, hidden=UNUSED_BY_VECTORS, why_hidden="has no effect on word vectors")
    run.check()
    machine.configure_process()
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
