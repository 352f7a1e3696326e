"""Many runs of one config: every combination of some fields, each in a run folder of its own, and their tables."""

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

MOST_RUNS = 1000  # of one sweep
LONGEST_NAME = 120  # characters of the name of a run's folder
_BY_CLASS = ("precision", "recall", "f1")  # names of scores by class: recall/positive


class Trial(NamedTuple):
    """One run: the fields that are its own, in the order of the sweep, and what came of it."""

    fields: dict[str, str]
    folder: str
    scores: dict[str, float]  # of its best checkpoint; none where it failed
    failed: str = ""


def combinations(asked: Iterable[str]) -> list[dict[str, str]]:
    """`["optimizer.rate=2e-5,5e-5", "seed=0,1"]`: the four combinations, the last field changing fastest.

    Raises UserError for what is not FIELD=VALUE,VALUE.
    """
    choices: dict[str, list[str]] = {}
    for word in asked:
        name, equals, values = word.partition("=")
        if not name or not equals or not all(values.split(",")):
            raise UserError(f"--sweep has {word!r}; give FIELD=VALUE,VALUE such as optimizer.rate=2e-5,5e-5")
        if name in choices:
            raise UserError(f"--sweep names {name!r} twice; give all of its values at once")
        if name == "workdir":
            raise UserError("--sweep names workdir; each run has a folder of its own below --workdir: leave it out")
        choices[name] = values.split(",")
        if twice := [value for value in dict.fromkeys(choices[name]) if choices[name].count(value) > 1]:
            raise UserError(f"--sweep has {name}={twice[0]} twice; give each value once")
    runs = math.prod(map(len, choices.values()))
    if runs > MOST_RUNS:
        raise UserError(f"--sweep has {runs:,} combinations; at most {MOST_RUNS:,} are possible: give fewer values")
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def folder_of(fields: Mapping[str, str]) -> str:
    """Returns the name of a run's folder, which no shell has to quote: `optimizer.rate-2e-5_seed-0`.

    Where that shortens or replaces parts of a value, a hash of the fields keeps the names of two runs apart.
    """
    plain = "_".join(f"{name}-{value}" for name, value in fields.items())
    name = re.sub(r"[^A-Za-z0-9.+_-]+", "_", plain)[:LONGEST_NAME].lstrip(".-")
    if name == plain:
        return name
    return f"{name}_{hashlib.sha256(repr([*fields.items()]).encode()).hexdigest()[:8]}"


def label_of(fields: Mapping[str, str]) -> str:
    """Returns the fields of a run as they were asked for: `optimizer.rate=2e-5 seed=0`."""
    return " ".join(f"{name}={value}" for name, value in fields.items())


def sweep(trials: list[dict[str, str]], top: Path, run: Callable[[int, Path], Any], best: str) -> list[Trial]:
    """Runs each trial in a folder below `top`, or resumes it, finished ones excepted, and returns them all.

    sweep.md has the tables and sweep.json the values, of the trials that are done so far.  A trial that fails (its loss
    is not finite, the disk is full) is reported in the tables.

    Args:
      trials: the fields of each.
      top: the folder of the sweep.
      run: trains trial n in a folder, or resumes it, and leaves scores.json there.
      best: the score by which trials are ranked.
    """
    done: list[Trial] = []
    for n, fields in enumerate(trials):
        folder = top / folder_of(fields)
        print(f"\n== {n + 1} of {len(trials)}: {label_of(fields)}", flush=True)
        try:
            run(n, folder)
            scores = model_files.read_object(folder / "scores.json")
            done.append(Trial(fields, folder.name, scores))
            print(f"{best.replace('_', ' ')} {scores.get(best, math.nan):.4f}, of step {scores['step']:,}", flush=True)
        except RunError as error:
            print(f"failed: {error}", flush=True)
            done.append(Trial(fields, folder.name, {}, str(error)))
        disk.write(top / "sweep.md", tables(done, best))
        write_json(top / "sweep.json", [trial._asdict() for trial in done])
    return done


def best_of(trials: list[Trial], best: str) -> Trial | None:
    """Returns the best run of the combination that is the best on average over its seeds; None where all failed."""
    whole = [trial for trial in trials if best in trial.scores]
    if not whole:
        return None
    groups = _groups(whole)
    group = max(groups.values(), key=lambda group: _mean(best, group))
    return max(group, key=lambda trial: _mean(best, [trial]))


def tables(trials: list[Trial], best: str) -> str:
    """Returns the means over the seeds, where there are several, and the single runs, as Markdown, best first."""
    means = table(trials, best) + "\n" if len(_groups(trials)) < len(trials) else ""
    return means + single_runs(trials, best)


def table(trials: list[Trial], best: str) -> str:
    """Returns a table with a line for each combination but for the seeds: mean and deviation over the seeds."""
    names = _names(trials, best)
    groups = _groups(trials)
    lines = [["fields", "runs", *(name.replace("_", " ") for name in names)]]
    for key in sorted(groups, key=lambda key: -_mean(best, groups[key])):
        group = groups[key]
        failed = sum(bool(trial.failed) for trial in group)
        runs = f"{len(group)}" + (f", {failed} failed" if failed else "")
        lines.append([key or "seeds", runs, *(_spread(_values(name, group)) for name in names)])
    return _markdown(lines)


def single_runs(trials: list[Trial], best: str) -> str:
    """Returns a table with a line for each run: its folder, its scores and the step that they are of."""
    names = _names(trials, best)
    lines = [["run", "step", *(name.replace("_", " ") for name in names)]]
    for trial in sorted(trials, key=lambda trial: -_mean(best, [trial])):
        step = "failed" if trial.failed else f"{trial.scores.get('step', 0):,.0f}"
        lines.append([trial.folder, step, *(_spread(_values(name, [trial])) for name in names)])
    return _markdown(lines)


def _groups(trials: Iterable[Trial]) -> dict[str, list[Trial]]:
    """Trials that differ in their seeds alone, by their other fields."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(label_of({k: v for k, v in trial.fields.items() if k != "seed"}), []).append(trial)
    return groups


def _names(trials: list[Trial], best: str) -> list[str]:
    """The scores that the tables show: those by class are in scores.json."""
    names = [name for name in dict.fromkeys(name for t in trials for name in t.scores) if name not in ("step", best)]
    return [best, *(name for name in names if "/" not in name or name.split("/")[0] not in _BY_CLASS)]


def _mean(best: str, group: list[Trial]) -> float:
    """What ranks a group, higher is better: the mean of a score; of losses, of their negatives."""
    values = _values(best, group)
    return statistics.fmean(values) * (-1 if best == "loss" else 1) if values else -math.inf


def _markdown(lines: list[list[str]]) -> str:
    """A table whose columns stand below each other in plain text too."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    widths = [max(3, *map(len, column)) for column in zip(*cells)]
    rows = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in cells]
    rows.insert(1, ["-" * width for width in widths])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _values(name: str, group: list[Trial]) -> list[float]:
    return [trial.scores[name] for trial in group if name in trial.scores]


def _spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"
