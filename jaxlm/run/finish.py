"""The end of a run: its scores, its report, its summary, and a sample of what its model writes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from jaxlm.config import CausalLM, Decoding, RunConfig, to_json
from jaxlm.devices import hosts
from jaxlm.inference.generate import generate
from jaxlm.lm import LM
from jaxlm.reports import report
from jaxlm.run.folder import SUMMARY, drop_steps, duration, write_json
from jaxlm.run.resolve import ResolvedRun
from jaxlm.run.training import Training, packing, say, size
from jaxlm.storage import disk
from jaxlm.tasks.metrics import by_name


def finish(training: Training, lm: LM, kind: str, begun: float, summary: bool) -> LM:
    """Writes scores, report and summary of a run that has ended, and returns its model.

    Args:
      training: the run, with the scores of its best weights.
      lm: the model that was exported.
      kind: the name of the format of the export.
      begun: when the run began, by the monotonic clock.
      summary: whether the summary is printed.
    """
    resolved, run, folder = training.resolved, training.run, training.place.folder
    task, data, found, scores = resolved.task, resolved.data, training.found, training.scores
    by_class = {} if found is None else by_name(task.by_class(data.held_out, found))
    if found is not None and (warning := task.warning(data.held_out, found)):
        say(f"warning   {warning}")
    step = int(training.state.step)
    hosts.first(lambda: write_json(folder / "scores.json", {"step": step, **scores, **by_class}))
    if training.history and max(training.history) < training.before:
        best = resolved.best
        say(f"warning   no {best} was as good as that of the weights that the run started from, which --init names")
    since = f" since step {training.started:,}" if training.started else ""
    facts = {
        "time": duration(time.monotonic() - begun) + since,
        "data": f"{data.train.said} to train on; {data.held_out.said} held out",
    }
    facts |= {"started from": run.init} if run.init else {}
    facts |= packing(run, resolved.train)
    if cut := task.truncated(resolved.train):
        facts["length"] = "; ".join(cut)
    sample, sections = _sample(lm, run), _sections(resolved, found)
    mesh = resolved.mesh
    text = hosts.first(lambda: _report(run, folder, lm, scores, kind, step, facts, mesh, sections, sample))
    if summary:
        say(text)
    if not run.keep_checkpoints:
        hosts.first(lambda: drop_steps(folder / "checkpoints"))
    training.place.send()
    return lm


def _sections(resolved: ResolvedRun, found: Any) -> list[report.Section]:
    """What the report shows beside curves."""
    if found is None:
        return []
    batches = resolved.train
    lengths = report.Histogram("Tokens of an example", batches.true_lengths, "tokens", float(batches.length))
    return [*resolved.task.sections(resolved.data.held_out, found), lengths]


def _report(
    run: RunConfig,
    folder: Path,
    lm: LM,
    scores: dict[str, float],
    export: str,
    step: int,
    further: dict[str, str],
    mesh: Any,
    sections: list[report.Section],
    sample: str | None,
) -> str:
    """Writes report.html and summary.txt; returns the summary: the figures, a sample and where the files are."""
    facts = {f"held-out {report.words(name)}": report.fact(name, value) for name, value in scores.items()}
    facts |= {
        "of step": f"{step:,}, the best of the run" if run.eval_every else f"{step:,}",
        "parameters": f"{size(lm.params):,}",
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        **further,
    }
    width = max(24, *map(len, facts))
    lines = [f"{name:>{width}}  {value}" for name, value in facts.items()]
    if sample is not None:
        lines.append(f"\n{'a sample':-^60}\n{sample}\n{'':-^60}")
    lines.append(f"\nmodel ({export} format)  {folder / 'export'}\nreport  {folder / 'report.html'}")
    text = "\n".join(lines)
    disk.write(folder / SUMMARY, text + "\n")
    report.write(folder, to_json(run), facts, sample, sections)
    return text


def _sample(lm: LM, run: RunConfig) -> str | None:
    """Returns a text that a decoder writes after the run's prompt, prompt included."""
    if not isinstance(run.task, CausalLM) or not run.sample_tokens:
        return None
    if lm.tokenizer is None:
        return None
    room = lm.config.max_length - len(lm.tokenizer.encode(run.sample_prompt)) - 1
    new = min(run.sample_tokens, room) if lm.config.positions in ("learned", "rotary") else run.sample_tokens
    if new < 1 or (lm.tokenizer.bos is None and not run.sample_prompt):
        return None
    decoding = Decoding(max_new_tokens=new, temperature=0.7, top_p=0.95, seed=run.seed)
    return run.sample_prompt + generate(lm, [run.sample_prompt], decoding)[0]
