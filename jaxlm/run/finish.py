"""Writes the scores, the report and the summary of a run at its end, with a sample of generated text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from jaxlm.baselines.comparison import (
    compared_scores,
    comparison_table,
    describe_best,
    find_better,
    run_baselines,
)
from jaxlm.config import CausalLM, Decoding, RunConfig, to_json
from jaxlm.devices import hosts
from jaxlm.inference.generate import generate
from jaxlm.lm import LM
from jaxlm.reports import report
from jaxlm.run.baseline import write_baselines
from jaxlm.run.folder import SUMMARY, drop_steps, duration, write_json
from jaxlm.run.resolve import ResolvedRun
from jaxlm.run.training import Training, data_line, log, packing, parameter_count
from jaxlm.storage import disk
from jaxlm.tasks.metrics import flatten_per_class


def finish(training: Training, lm: LM, kind: str, start: float, summary: bool) -> LM:
    """Writes scores, report and summary of a run that has ended.

    Args:
      training: the run, with the scores of its best weights.
      lm: the exported model.
      kind: the name of the format of the export.
      start: when the run started, by the monotonic clock.
      summary: whether to print the summary.

    Returns:
      `lm`.
    """
    resolved, run, folder = training.resolved, training.run, training.run_folder.folder
    task, data, result, scores = resolved.task, resolved.data, training.result, training.scores
    by_class = {} if result is None else flatten_per_class(task.by_class(data.held_out, result))
    if result is not None and (warning := task.warning(data.held_out, result)):
        log(f"warning   {warning}")
    step = int(training.state.step)
    hosts.run_on_first(lambda: write_json(folder / "scores.json", {"step": step, **scores, **by_class}))
    if training.history and max(training.history) < training.before:
        log(f"warning   the weights of --init had a better {resolved.best} than any checkpoint of this run")
    facts = _scores_and_size(training, lm) | _facts(training, start)
    sample, sections = _sample(lm, run), _sections(resolved, result)

    def write_report() -> str:
        baseline_facts, baseline_sections = _compare(training)
        report.write(folder, to_json(run), facts | baseline_facts, sample, [*baseline_sections, *sections])
        text = _summary(facts | baseline_facts, sample, kind, folder)
        disk.write(folder / SUMMARY, text + "\n")
        return text

    text = hosts.run_on_first(write_report)
    if summary:
        log(text)
    if not run.keep_checkpoints:
        hosts.run_on_first(lambda: drop_steps(folder / "checkpoints"))
    training.run_folder.send()
    return lm


def _scores_and_size(training: Training, lm: LM) -> dict[str, str]:
    """Returns the first lines of the summary: scores, their step, parameters and devices."""
    step, mesh = f"{int(training.state.step):,}", training.resolved.mesh
    scores = {
        f"held-out {report.metric_label(name)}": report.format_score(name, value)
        for name, value in training.scores.items()
    }
    return scores | {
        "step": f"{step}, the best of the run" if training.run.eval_every else step,
        "parameters": parameter_count(training.parts.like),
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
    }


def _facts(training: Training, start: float) -> dict[str, str]:
    """Returns further lines of the summary: time, data, initial weights, packing and truncation."""
    run, resolved = training.run, training.resolved
    since = f" since step {training.started:,}" if training.started else ""
    facts = {"time": duration(time.monotonic() - start) + since, "data": data_line(resolved.data)}
    facts |= {"started from": run.init} if run.init else {}
    if resolved.budget is not None:
        facts["privacy"] = resolved.budget.summary(training.last_step)
    facts |= packing(run, resolved.train)
    if truncated := resolved.task.truncation_warnings(resolved.train):
        facts["length"] = "; ".join(truncated)
    return facts


def _compare(training: Training) -> tuple[dict[str, str], list[report.Section]]:
    """Writes the baselines of the task; returns their line of the summary and their table, both empty without any."""
    resolved, scores = training.resolved, training.scores
    baselines = run_baselines(resolved.task, resolved.data, training.run.baseline)
    if not baselines:
        return {}, []
    write_baselines(training.run_folder.folder, baselines)
    compared = compared_scores(resolved.task, resolved.best)
    sentences = find_better(scores, baselines, compared)
    for sentence in sentences:
        log(f"baseline  {sentence}")
    best = describe_best(baselines, compared)
    return {"baseline": best} if best else {}, [comparison_table(scores, baselines, sentences)]


def _sections(resolved: ResolvedRun, result: Any) -> list[report.Section]:
    """Returns the sections of the report in addition to the curves."""
    if result is None:
        return []
    batches = resolved.train
    lengths = report.Histogram("Tokens of an example", batches.true_lengths, "tokens", float(batches.length))
    return [*resolved.task.sections(resolved.data.held_out, result), lengths]


def _summary(facts: dict[str, str], sample: str | None, kind: str, folder: Path) -> str:
    """Returns the summary: the facts, the sample and the paths of export and report."""
    width = max(24, *map(len, facts))
    lines = [f"{name:>{width}}  {value}" for name, value in facts.items()]
    if sample is not None:
        lines.append(f"\n{'a sample':-^60}\n{sample}\n{'':-^60}")
    lines.append(f"\nmodel ({kind} format)  {folder / 'export'}\nreport  {folder / 'report.html'}")
    return "\n".join(lines)


def _sample(lm: LM, run: RunConfig) -> str | None:
    """Returns the run's prompt and a text that a decoder generates after it; None for other models."""
    if not isinstance(run.task, CausalLM) or not run.sample_tokens or lm.tokenizer is None:
        return None
    max_new = lm.config.max_length - len(lm.tokenizer.encode(run.sample_prompt)) - 1
    tokens = min(run.sample_tokens, max_new) if lm.config.positions in ("learned", "rotary") else run.sample_tokens
    if tokens < 1 or (lm.tokenizer.bos is None and not run.sample_prompt):
        return None
    decoding = Decoding(max_new_tokens=tokens, temperature=0.7, top_p=0.95, seed=run.seed)
    return run.sample_prompt + generate(lm, [run.sample_prompt], decoding)[0]
