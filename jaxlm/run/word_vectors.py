"""A run that trains word vectors: reads the text, trains, resumes, and writes the vectors and the report."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxlm.config import VectorsConfig, to_json
from jaxlm.config.ranges import check_argument
from jaxlm.data import source
from jaxlm.data.ahead import prefetch
from jaxlm.errors import RunError, Stopped, UserError
from jaxlm.reports import report
from jaxlm.run.checkpoint import Checkpoints, finite
from jaxlm.run.fit import interruptible
from jaxlm.run.folder import SUMMARY, RunLog, begin, drop_steps, duration, finished_at, open_run_dir, write_json
from jaxlm.run.training import log
from jaxlm.storage import buckets, disk
from jaxlm.vectors.files import EXPORT, SUFFIXES, load_vectors, save_vectors
from jaxlm.vectors.glove import GloVe
from jaxlm.vectors.skipgram import SkipGram
from jaxlm.vectors.training import Trainer, VectorState
from jaxlm.vectors.word_vectors import WordVectors
from jaxlm.vectors.words import WordCorpus, read_corpus

METHODS: dict[str, Callable[[VectorsConfig, WordCorpus], Trainer]] = {"skip_gram": SkipGram, "glove": GloVe}
SAMPLES = 8  # words whose neighbours the report shows


@interruptible
def fit_vectors(run: VectorsConfig, *, stop: Callable[[], bool] = lambda: False, summary: bool = True) -> WordVectors:
    """Trains word vectors, exports them, and writes the report; or resumes the run in its folder.

    Args:
      run: the config of the run.
      stop: called after each step. Where it returns True, the state is saved and Stopped is raised. An interrupt from
        the keyboard does the same, but raises Interrupted, a KeyboardInterrupt.
      summary: whether to print the summary of the finished run; summary.txt in its folder always contains it.

    Returns:
      The vectors, the most frequent word first. `export/` in the run folder contains them too.

    Raises:
      UserError: for a mistake in the config or the data, before anything is compiled.
      RunError: for a loss that is not finite, or a full disk.
      Stopped: where `stop` ended the run early, after its state was saved.
      Interrupted: where an interrupt did.
    """
    check_argument("run", run, VectorsConfig)
    check_argument("summary", summary, bool)
    start = time.monotonic()
    run.check()
    if jax.process_count() > 1:
        raise UserError(f"word vectors are trained on one host, not {jax.process_count()}; run it on one of them")
    buckets.forget_downloads()
    with buckets.RunFolder(run.workdir or "runs/vectors").opened() as run_folder:
        folder = run_folder.folder
        file = folder / "export" / f"{EXPORT}{SUFFIXES[run.format]}"
        resuming = open_run_dir(run, folder)
        fingerprint = source.fingerprint(run.data.path)
        if resuming and (last := finished_at(folder)) is not None and file.exists():
            begin(run, folder, fingerprint)
            log(f"the run in {folder} is already finished, at step {last:,}; nothing is left to do")
            return load_vectors(file)
        corpus = read_corpus(run)
        trainer = METHODS[run.method](run, corpus)
        begin(run, folder, fingerprint)
        log(f"data      {corpus.summary}")
        log(f"run       {trainer.steps:,} steps of {run.method}, width {run.width}, in {folder}")
        state = _train(run, trainer, run_folder, stop)
        vectors = WordVectors(corpus.words, trainer.vectors(state))
        save_vectors(vectors, file, run.format, overwrite=True)
        _finish(run, folder, file, vectors, trainer, time.monotonic() - start, summary)
        drop_steps(folder / "checkpoints")
        run_folder.send()
        return vectors


def _train(
    run: VectorsConfig, trainer: Trainer, run_folder: buckets.RunFolder, stop: Callable[[], bool]
) -> VectorState:
    """Returns the state after the last step; saves checkpoints and writes the log on the way."""
    folder, steps = run_folder.folder, trainer.steps
    state = trainer.first_state()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    checkpoints = Checkpoints(folder / "checkpoints", 1, log)
    restored, notes = checkpoints.restore(like) or (None, {})
    state = state if restored is None else restored
    started = int(state.step)
    if started:
        log(f"resuming  at step {started:,}")
    run_log = RunLog(folder, started, steps)
    window = _Window(notes.get("losses", []))
    every = run.checkpoint_every or max(1, steps // 10)
    try:
        for step, batch in enumerate(prefetch(trainer.batch, range(started, steps)), started + 1):
            state, metrics = trainer.update(state, batch)
            window.add(metrics, int(batch["read"]))
            ending, stopping = step == steps, stop()
            if ending or step % run.log_every == 0:
                values = window.line()
                run_log.write(step, values)
                run_log.progress(step, values)
            if ending or stopping or step % every == 0:
                if not finite(state):
                    raise RunError(
                        f"an entry of a vector is not finite at step {step:,}; lower the rate of {run.method}, in "
                        f"a new --workdir"
                    )
                checkpoints.save(state, None, {"losses": window.losses()})
                run_folder.send()
            if stopping and not ending:
                checkpoints.wait()
                raise Stopped(f"stopped at step {step:,} of {steps:,} and saved; the same command resumes from here")
        checkpoints.wait()
    finally:
        run_log.close()
        checkpoints.close()
    return state


class _Window:
    """The metrics since the last line of the log; the losses of earlier processes are restored."""

    def __init__(self, losses: list[float]):
        self._earlier, self._metrics = losses, list[dict[str, Any]]()
        self._read, self._start = 0, time.monotonic()

    def add(self, metrics: dict[str, Any], read: int) -> None:
        self._metrics.append(metrics)
        self._read += read

    def losses(self) -> list[float]:
        """Returns the losses of the steps since the last line, as JSON values."""
        return self._earlier + [float(metrics["loss"]) for metrics in self._metrics]

    def line(self) -> dict[str, float]:
        """Returns the values of a line of the log, and begins the next line."""
        losses = self.losses()
        seconds = time.monotonic() - self._start
        rate = float(self._metrics[-1]["learning_rate"])
        values = {"loss": sum(losses) / len(losses), "learning_rate": rate, "tokens_per_second": self._read / seconds}
        self._earlier, self._metrics, self._read, self._start = [], [], 0, time.monotonic()
        return values


def _finish(
    run: VectorsConfig, folder: Path, file: Path, vectors: WordVectors, trainer: Trainer, seconds: float, summary: bool
) -> None:
    """Writes the scores, the report and the summary of a finished run."""
    loss = report.read_metrics(folder)[-1]["loss"]
    words = [word for word in vectors.words if word.isalpha() and len(word) > 3][: 16 * SAMPLES : 16] or vectors.words[
        :1
    ]
    rows = [[word, ", ".join(near for near, _ in vectors.most_similar(word, 8))] for word in words]
    table = report.Table("The nearest words", ("word", "nearest words"), rows, "By the cosine of their vectors.")
    facts = {
        "loss": f"{loss:.4f}",
        "step": f"{trainer.steps:,}",
        "vectors": f"{len(vectors):,} of width {vectors.width}",
        "time": duration(seconds),
        "devices": f"1 x {jax.devices()[0].device_kind}",
    }
    write_json(folder / "scores.json", {"step": trainer.steps, "loss": loss})
    report.write(folder, to_json(run), facts, None, [table])
    lines = [f"{name:>24}  {value}" for name, value in facts.items()]
    lines += ["", *(f"{word:>24}  {near}" for word, near in rows)]
    lines += [f"\nvectors ({run.format} format)  {file}", f"report  {folder / 'report.html'}"]
    disk.write(folder / SUMMARY, "\n".join(lines) + "\n")
    if summary:
        log("\n".join(lines))
