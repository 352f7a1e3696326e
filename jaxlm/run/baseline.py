"""The baselines of a config: what counting achieves on the data of a run, without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxlm.baselines import arpa, language
from jaxlm.baselines.comparison import comparison_table, run_baselines
from jaxlm.baselines.result import Baseline
from jaxlm.config import CausalLM, MultiTask, RunConfig
from jaxlm.data import corpus
from jaxlm.data.corpus import Prepared, sample_documents
from jaxlm.errors import UserError
from jaxlm.run.folder import BASELINE, write_json
from jaxlm.run.resolve import with_model, with_tokenizer
from jaxlm.run.sweep import markdown
from jaxlm.run.weights import known_labels
from jaxlm.storage import disk
from jaxlm.tasks import TASKS, make_task
from jaxlm.tasks.labels import Labels
from jaxlm.tasks.multi_task import Parts
from jaxlm.tasks.pretraining import CausalLMTask
from jaxlm.tasks.reading import read_parts
from jaxlm.tasks.records import RecordTask
from jaxlm.tasks.task import Task

Log = Callable[[str], None]


def baseline(run: RunConfig, folder: str = "", arpa_file: str = "", log: Log = lambda line: None) -> str:
    """Returns the table of the baselines of a config.

    Args:
      run: the config; a task with labels needs neither a model nor weights.
      folder: where to write baseline.json; empty: nowhere.
      arpa_file: the ARPA file to write for a language model, whose words are token ids; empty: none.
      log: prints a line of progress.

    Raises:
      UserError: for a task without baselines, and for invalid data.
    """
    for path, flag in ((arpa_file, "--arpa"), (folder, "--workdir")):
        disk.local(path, flag)
    if arpa_file and not isinstance(run.task, CausalLM):
        raise UserError(f"--arpa writes the n-gram model of CausalLM, and the task is {type(run.task).__name__}")
    if arpa_file and not run.baseline.tokens:
        raise UserError("--arpa writes an n-gram model, and baseline.tokens is 0; raise --baseline.tokens")
    task, data = _read(run, log)
    if arpa_file:
        assert isinstance(task, CausalLMTask)
        model = language.fit_ngrams(task, data, run.baseline)
        try:
            arpa.write(arpa_file, model, [str(token) for token in range(model.vocabulary)])
        except OSError as error:
            raise disk.write_error(arpa_file, error, "--arpa") from None
        results = [language.ngram_baseline(task, data, run.baseline, model)]
    else:
        results = run_baselines(task, data, run.baseline)
    if not results:
        raise _no_baseline(run)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_baselines(Path(folder), results)
    table = comparison_table({}, results, [])
    return markdown([list(table.head), *table.rows]) + (f"\n{table.note}\n" if table.note else "")


def write_baselines(folder: Path, results: Sequence[Baseline]) -> None:
    """Writes the results to baseline.json in a folder."""
    write_json(folder / BASELINE, [result._asdict() for result in results])


def _read(run: RunConfig, log: Log) -> tuple[Task, Prepared]:
    """Returns the task of a config and its data. Only a language model needs a tokenizer."""
    kind = TASKS.get(type(run.task), Task)
    if isinstance(run.task, MultiTask) or issubclass(kind, RecordTask):
        replace(run, model=None, init=run.init or "not read", dropout=None, new_head=False).check()
        data = _read_records(run, log)
        return make_task(run, None, data.labels), data
    if isinstance(run.task, CausalLM):
        run = with_tokenizer(with_model(run, None), None)
        run.check()
        data = corpus.prepare(run, log)
        data = data._replace(held_out=sample_documents(data.held_out, run.eval_tokens, data.tokenizer))
        return make_task(run, data.tokenizer, data.labels), data
    raise _no_baseline(run)


def _no_baseline(run: RunConfig) -> UserError:
    return UserError(
        f"{type(run.task).__name__} has no baseline with these fields; baselines exist for CausalLM, Classification, "
        f"Tagging, Similarity, MultipleChoice, and QuestionAnswering with unanswerable questions"
    )


def _read_records(run: RunConfig, log: Log) -> Prepared:
    """Returns the records of a run, or of each of its tasks."""
    # The labels are in the order of the head of a local folder, as in the run, but nothing is downloaded for them.
    known: Labels | None = known_labels(run, None) if run.init and Path(run.init).exists() else None
    if not isinstance(run.task, MultiTask):
        names = known if isinstance(known, tuple) else None
        train, held_out, labels, rows = read_parts(run, TASKS[type(run.task)], log, names)
        return Prepared(None, train, held_out, rows, "", labels)  # type: ignore[arg-type]
    parts: dict[str, tuple[Any, ...]] = {}
    for name, part in run.task.parts.items():
        names = known.get(name) if isinstance(known, dict) else None
        try:
            parts[name] = read_parts(replace(run, task=part.task, data=part.data), TASKS[type(part.task)], log, names)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    by_name = [Parts({name: values[n] for name, values in parts.items()}) for n in range(3)]
    return Prepared(None, by_name[0], by_name[1], {}, "", by_name[2])  # type: ignore[arg-type]
