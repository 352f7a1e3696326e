"""Many runs of one config: every combination of some fields, each in a run folder of its own, and one table."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm import storage
from jaxlm.errors import RunError, UserError
from jaxlm.folder import write_json
from jaxlm.hub import model_files

MOST_RUNS = 1000  # of one sweep


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
    runs = math.prod(map(len, choices.values()))
    if runs > MOST_RUNS:
        raise UserError(f"--sweep has {runs:,} combinations; at most {MOST_RUNS:,} are possible: give fewer values")
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def folder_of(fields: dict[str, str]) -> str:
    """`optimizer.rate=2e-5 seed=0`, as the name of a folder."""
    return " ".join(f"{name}={value}" for name, value in fields.items()).replace("/", "_")


def sweep(trials: list[dict[str, str]], top: Path, run: Callable[[int, Path], Any], best: str) -> str:
    """Runs each trial in a folder below `top`, those that are finished excepted, and returns the table of all.

    run: what trains trial n in a folder, or goes on with it, and leaves scores.json there.  best: the score by which
    trials are ranked.  A trial that fails (its loss is not finite, the disk is full) is told in the table.
    """
    done: list[Trial] = []
    for n, fields in enumerate(trials):
        folder = top / folder_of(fields)
        print(f"\n== {n + 1} of {len(trials)}: {folder_of(fields)}", flush=True)
        try:
            run(n, folder)
            scores = model_files.read_object(folder / "scores.json")
            done.append(Trial(fields, folder.name, scores))
        except RunError as error:
            print(f"failed: {error}", flush=True)
            done.append(Trial(fields, folder.name, {}, str(error)))
        text = table(done, best)
        storage.write(top / "sweep.md", text)
        write_json(top / "sweep.json", [trial._asdict() for trial in done])
    return text


def table(trials: list[Trial], best: str) -> str:
    """Markdown: a line for each combination but for the seeds, best first, with mean and deviation over the seeds."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(folder_of({k: v for k, v in trial.fields.items() if k != "seed"}), []).append(trial)
    names = [name for name in dict.fromkeys(name for t in trials for name in t.scores) if name not in ("step", best)]
    names = [name for name in names if name.split("/")[0] not in ("precision", "recall", "f1") or "/" not in name]
    names = [best, *names]
    mean = lambda name, group: statistics.fmean(values) if (values := _values(name, group)) else -float("inf")
    sign = -1 if best == "loss" else 1
    ordered = sorted(groups, key=lambda key: -sign * mean(best, groups[key]))
    lines = [["fields", "runs", *(name.replace("_", " ") for name in names)]]
    for key in ordered:
        group = groups[key]
        failed = sum(bool(trial.failed) for trial in group)
        runs = f"{len(group)}" + (f", {failed} failed" if failed else "")
        lines.append([key or "seeds", runs, *(_spread(_values(name, group)) for name in names)])
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _values(name: str, group: list[Trial]) -> list[float]:
    return [trial.scores[name] for trial in group if name in trial.scores]


def _spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"
