"""Trains every combination of some fields of a config, each in its own run folder, and tabulates the scores."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.errors import RunError, UserError
from jaxlm.hub import model_files
from jaxlm.run.folder import write_json
from jaxlm.storage import disk

MAX_RUNS = 1000  # in one sweep
MAX_NAME = 120  # characters in the name of a run's folder
_BY_CLASS = ("precision", "recall", "f1")  # prefixes of scores per class, such as recall/positive


class Trial(NamedTuple):
    """One run of a sweep and its result."""

    fields: dict[str, str]  # the swept fields and their values, in the order of the sweep
    folder: str  # its name
    scores: dict[str, float]  # of the best checkpoint; empty where the run failed
    failed: str = ""  # the error of a run that failed


def combinations(words: Iterable[str]) -> list[dict[str, str]]:
    """Returns every combination of the values of some fields; the last field changes fastest.

    Args:
      words: fields with their values, such as `["optimizer.rate=2e-5,5e-5", "seed=0,1"]`, which has four combinations.

    Returns:
      The value of each field, for each combination.

    Raises:
      UserError: for a word of another form, a repeated field or value, the field workdir, and too many combinations.
    """
    choices: dict[str, list[str]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not name or not equals or not all(values.split(",")):
            raise UserError(f"--sweep has {word!r}; give FIELD=VALUE,VALUE such as optimizer.rate=2e-5,5e-5")
        if name in choices:
            raise UserError(f"--sweep has {name!r} twice; give all of its values together")
        if name == "workdir":
            raise UserError("--sweep has the field workdir; each run has its own folder in --workdir, so leave it out")
        choices[name] = values.split(",")
        if repeated := [value for value in dict.fromkeys(choices[name]) if choices[name].count(value) > 1]:
            raise UserError(f"--sweep has {name}={repeated[0]} twice; give each value once")
    runs = math.prod(map(len, choices.values()))
    if runs > MAX_RUNS:
        raise UserError(f"--sweep has {runs:,} combinations; at most {MAX_RUNS:,} are possible; give fewer values")
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def folder_of(fields: Mapping[str, str]) -> str:
    """Returns the name of a run's folder, such as `optimizer.rate-2e-5_seed-0`, which needs no quotes in a shell.

    A name that had to be shortened or changed ends in a hash of the fields, which makes it unique.
    """
    plain = "_".join(f"{name}-{value}" for name, value in fields.items())
    name = re.sub(r"[^A-Za-z0-9.+_-]+", "_", plain)[:MAX_NAME].lstrip(".-")
    if name == plain:
        return name
    return f"{name}_{hashlib.sha256(repr([*fields.items()]).encode()).hexdigest()[:8]}"


def label_of(fields: Mapping[str, str]) -> str:
    """Returns the fields of a run for printing: `optimizer.rate=2e-5 seed=0`."""
    return " ".join(f"{name}={value}" for name, value in fields.items())


def sweep(trials: list[dict[str, str]], top: Path, run: Callable[[int, Path], Any], best: str) -> list[Trial]:
    """Trains or resumes every run of a sweep, one after the other.

    After each run it writes sweep.md, with the tables, and sweep.json, with the values. A run that fails (its loss is
    not finite, the disk is full) is marked in the tables, and the sweep continues.

    Args:
      trials: the fields of each run.
      top: the folder of the sweep; each run has a folder in it.
      run: trains run n in a folder, or resumes it, and writes scores.json there.
      best: the score that ranks the runs.

    Returns:
      All runs, in the order of `trials`.
    """
    done: list[Trial] = []
    for n, fields in enumerate(trials):
        folder = top / folder_of(fields)
        print(f"\n== {n + 1} of {len(trials)}: {label_of(fields)}", flush=True)
        try:
            run(n, folder)
            scores = model_files.read_object(folder / "scores.json")
            done.append(Trial(fields, folder.name, scores))
            print(f"{best.replace('_', ' ')} {scores.get(best, math.nan):.4f} at step {scores['step']:,}", flush=True)
        except RunError as error:
            print(f"failed: {error}", flush=True)
            done.append(Trial(fields, folder.name, {}, str(error)))
        disk.write(top / "sweep.md", tables(done, best))
        write_json(top / "sweep.json", [trial._asdict() for trial in done])
    return done


def best_of(trials: list[Trial], best: str) -> Trial | None:
    """Returns the best run of the combination with the best mean over seeds; None where all runs failed.

    Args:
      trials: the runs.
      best: the score that ranks them.
    """
    scored = [trial for trial in trials if best in trial.scores]
    if not scored:
        return None
    group = max(_groups(scored).values(), key=lambda group: _mean(best, group))
    return max(group, key=lambda trial: _mean(best, [trial]))


def tables(trials: list[Trial], best: str) -> str:
    """Returns the tables of means over seeds, where there are several, and of single runs, in Markdown, best first."""
    means = table(trials, best) + "\n" if len(_groups(trials)) < len(trials) else ""
    return means + single_runs(trials, best)


def table(trials: list[Trial], best: str) -> str:
    """Returns a table with a line for each combination: mean and standard deviation of each score over the seeds."""
    names = _names(trials, best)
    groups = _groups(trials)
    lines = [["fields", "runs", *(name.replace("_", " ") for name in names)]]
    for key in sorted(groups, key=lambda key: -_mean(best, groups[key])):
        group = groups[key]
        failed = sum(bool(trial.failed) for trial in group)
        runs = f"{len(group)}" + (f", {failed} failed" if failed else "")
        lines.append([key or "seeds", runs, *(_spread(_values(name, group)) for name in names)])
    return markdown(lines)


def single_runs(trials: list[Trial], best: str) -> str:
    """Returns a table with a line for each run: its folder, its scores and their step."""
    names = _names(trials, best)
    lines = [["run", "step", *(name.replace("_", " ") for name in names)]]
    for trial in sorted(trials, key=lambda trial: -_mean(best, [trial])):
        step = "failed" if trial.failed else f"{trial.scores.get('step', 0):,.0f}"
        lines.append([trial.folder, step, *(_spread(_values(name, [trial])) for name in names)])
    return markdown(lines)


def _groups(trials: Iterable[Trial]) -> dict[str, list[Trial]]:
    """Returns the trials grouped by all fields except the seed."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(label_of({k: v for k, v in trial.fields.items() if k != "seed"}), []).append(trial)
    return groups


def _names(trials: list[Trial], best: str) -> list[str]:
    """Returns the names of the scores in the tables, which leave out scores per class."""
    names = [name for name in dict.fromkeys(name for t in trials for name in t.scores) if name not in ("step", best)]
    return [best, *(name for name in names if "/" not in name or name.split("/")[0] not in _BY_CLASS)]


def _mean(best: str, group: list[Trial]) -> float:
    """Returns the value that ranks a group, higher is better: the mean of a score, negated for a loss."""
    values = _values(best, group)
    return statistics.fmean(values) * (-1 if best == "loss" else 1) if values else -math.inf


def markdown(lines: list[list[str]]) -> str:
    """Returns a Markdown table whose columns are aligned in plain text; the first line is the head."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    widths = [max(3, *map(len, column)) for column in zip(*cells)]
    rows = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in cells]
    rows.insert(1, ["-" * width for width in widths])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _values(name: str, group: list[Trial]) -> list[float]:
    return [trial.scores[name] for trial in group if name in trial.scores]


def _spread(values: list[float]) -> str:
    """Returns the mean and the sample standard deviation, for printing."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"
