"""All baselines of a task, and the table that compares a model with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from jaxlm.baselines.classifiers import BASELINES, baselines_of
from jaxlm.baselines.language import fit_ngrams, ngram_baseline
from jaxlm.baselines.result import Baseline
from jaxlm.config import BaselineConfig
from jaxlm.data.corpus import Corpus, Prepared
from jaxlm.errors import UserError
from jaxlm.reports.metrics import format_score, metric_label, rank
from jaxlm.reports.report import Table
from jaxlm.tasks.cells import Records
from jaxlm.tasks.multi_task import TaskMixture
from jaxlm.tasks.pretraining import CausalLMTask
from jaxlm.tasks.records import RecordTask
from jaxlm.tasks.task import Task

_UNREADABLE = "the data of the run cannot be read a second time"


def run_baselines(task: Task, data: Prepared, options: BaselineConfig) -> list[Baseline]:
    """Returns the results of the baselines of a task, in the order in which they improve.

    Args:
      task: the task of a run.
      data: its data.
      options: the limits of the baselines.

    Returns:
      One result for each baseline, with a note instead of scores for data that cannot be read a second time; none for a
      task without usual baselines.
    """
    if isinstance(task, TaskMixture):
        return [part for name in task.parts for part in _of_part(task, data, options, name)]
    if isinstance(task, CausalLMTask) and options.tokens:
        name = f"{options.order}-gram"
        if not isinstance(data.train, Corpus) or not isinstance(data.held_out, Corpus):
            return [Baseline(name, {}, f"There is no {name} model: {_UNREADABLE}.")]
        try:
            return [ngram_baseline(task, data, options, fit_ngrams(task, data, options))]
        except UserError as error:
            return [Baseline(name, {}, f"There is no {name} model: {error}.")]
    if isinstance(task, RecordTask) and type(task.task) in BASELINES:
        if not isinstance(data.train, Records) or not isinstance(data.held_out, Records):
            return [Baseline("majority", {}, f"There is no baseline: {_UNREADABLE}.")]
        return list(baselines_of(task, data.train, data.held_out, options.examples))
    return []


def _of_part(task: TaskMixture, data: Prepared, options: BaselineConfig, name: str) -> Iterator[Baseline]:
    """Yields the baselines of one of several tasks, with its name before theirs and before those of the scores."""
    part = data._replace(train=data.train[name], held_out=data.held_out[name])
    for baseline in run_baselines(task.parts[name], part, options):
        scores = {f"{name}/{score}": value for score, value in baseline.scores.items()}
        yield Baseline(f"{name}: {baseline.name}", scores, baseline.note)


def compared_scores(task: Task, best: str) -> list[str]:
    """Returns the names of the scores that decide whether a model is better than a baseline.

    Args:
      task: the task.
      best: the score that selects the best checkpoint.
    """
    if isinstance(task, TaskMixture):
        return [f"{name}/{score}" for name, part in task.parts.items() for score in compared_scores(part, part.best)]
    if isinstance(task, CausalLMTask):
        return ["bits_per_byte"]
    return [task.best if best == "loss" else best]


def find_better(scores: Mapping[str, float], baselines: Sequence[Baseline], compared: Sequence[str]) -> list[str]:
    """Returns a sentence for each score in which a baseline is at least as good as the model.

    Args:
      scores: the scores of the model.
      baselines: the baselines.
      compared: the scores to compare.
    """
    sentences = []
    for name in compared:
        best = _best_by(name, baselines)
        if best is None or name not in scores or rank(name, scores[name]) > rank(name, best.scores[name]):
            continue
        label, ours, theirs = metric_label(name), *(format_score(name, x[name]) for x in (scores, best.scores))
        if ours == theirs:
            sentences.append(f"The model is as good as the baseline {best.name}: {label} {ours}.")
            continue
        remedy = "; train on more text, or start from a pretrained model with --init" * (name == "bits_per_byte")
        sentences.append(
            f"The model is not better than the baseline {best.name}: {label} {ours} compared with {theirs}{remedy}."
        )
    return sentences


def describe_best(baselines: Sequence[Baseline], compared: Sequence[str]) -> str:
    """Returns the best baseline by each score with its value, for a line of a summary; "" if there is none."""
    found = ((name, _best_by(name, baselines)) for name in compared)
    return "; ".join(
        f"{best.name}, {metric_label(name)} {format_score(name, best.scores[name])}" for name, best in found if best
    )


def comparison_table(scores: Mapping[str, float], baselines: Sequence[Baseline], sentences: Sequence[str]) -> Table:
    """Returns the table of the scores of the baselines, and of the model if it has any.

    Args:
      scores: the scores of the model; empty for a table without a model.
      baselines: the baselines, at least one.
      sentences: what to write below the table, before the notes of the baselines.
    """
    names = list(dict.fromkeys(name for baseline in baselines for name in baseline.scores))
    cell = lambda name, values: format_score(name, values[name]) if name in values else "–"
    row = lambda title, values: [title, *(cell(name, values) for name in names)]
    rows = [row("this run", scores)] * bool(scores) + [row(each.name, each.scores) for each in baselines]
    notes = dict.fromkeys(filter(None, (each.note for each in baselines)))
    return Table("Baselines", ("", *map(metric_label, names)), rows, " ".join([*sentences, *notes]))


def _best_by(name: str, baselines: Sequence[Baseline]) -> Baseline | None:
    """Returns the baseline with the best value of a score."""
    found = [baseline for baseline in baselines if name in baseline.scores]
    return max(found, key=lambda baseline: rank(name, baseline.scores[name]), default=None)
