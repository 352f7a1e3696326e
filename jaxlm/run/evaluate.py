"""Evaluation and prediction: each example of the data exactly once, in the order of the data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any

import jax
import numpy as np

from jaxlm.config.arguments import check_model
from jaxlm.config.ranges import Count, Range, check_argument
from jaxlm.data.ahead import prefetch
from jaxlm.data.formats.lines import Place, Row
from jaxlm.errors import UserError, to_python_names, with_python_names
from jaxlm.hub.pooling import Pooling
from jaxlm.inference.packing import chunks, divisible_rows, inference_params, run_ahead
from jaxlm.lm import LM
from jaxlm.nn.transformer import Transformer
from jaxlm.run.assembly import shard_batch
from jaxlm.run.resolve import ResolvedModel
from jaxlm.run.step import make_eval_step
from jaxlm.run.trained_model import resolve_model, task_for
from jaxlm.tasks import TASKS, input_rows, labels, metrics
from jaxlm.tasks.cells import Record, Records
from jaxlm.tasks.records import RecordTask, Truncation
from jaxlm.tasks.task import EvalResult

WINDOW = 4096  # rows of data that are predicted together
TOKENS = 4096  # tokens in a batch, padding included
Rows = Annotated[int, Range(1, 2**16)]  # of a batch
Step = Callable[[Any, Any], Any]  # a jitted step of `make_eval_step`


def run_eval(eval_step: Step, params: Any, batches: Any, put: Callable, rows: list[int] | None = None) -> EvalResult:
    """Runs an evaluation step over all batches.

    Losses and weights are summed over batches in float64 and divided once, so that the batch size does not change the
    result.

    Args:
      eval_step: the compiled step.
      params: the parameters.
      batches: the batches of a task, in evaluation.
      put: shards a batch over the mesh, as one micro-batch.
      rows: the rows of a batch that this host makes; None: all.

    Returns:
      The sums of losses and weights, and the outputs of each unit, in the order of the units.
    """
    totals: dict[str, tuple[float, float]] = {}
    outputs: dict[int, list[dict[str, np.ndarray]]] = {}

    def evaluate_batch(batch: Any) -> tuple[Any, Any, Any]:
        losses, arrays = eval_step(params, batch)
        return losses, arrays, batch["segments_BT"] if arrays else ()

    placed = prefetch(lambda step: put(batches.batch_at(step, rows), 1), range(len(batches)))
    for step, (losses, arrays, segments_1BT) in run_ahead(evaluate_batch, enumerate(placed)):
        for name, (value, weight) in losses.items():
            total = totals.get(name, (0.0, 0.0))
            totals[name] = total[0] + float(value), total[1] + float(weight)
        if arrays:
            outputs.update(_split_outputs(arrays, segments_1BT[0], batches.units_at(step)))
    return EvalResult(totals, [outputs[i] for i in sorted(outputs)])


def _split_outputs(
    arrays: dict[str, np.ndarray], segments_BT: np.ndarray, units: list[list[tuple[int, int]]]
) -> dict[int, list[dict[str, np.ndarray]]]:
    """Returns for each unit of a batch the outputs of its examples, from arrays [B, E, ...] and [B, T, ...]."""
    outputs: dict[int, list[dict[str, np.ndarray]]] = {}
    for b, row in enumerate(units):
        bounds = np.searchsorted(_ascending(segments_BT[b]), np.arange(1, sum(n for _, n in row) + 2))
        e = 0
        for unit, count in row:
            outputs[unit] = [
                {
                    name: array[b, bounds[e + k] : bounds[e + k + 1]]
                    if name.rpartition("_")[2][1] == "T"
                    else array[b, e + k]
                    for name, array in arrays.items()
                }
                for k in range(count)
            ]
            e += count
    return outputs


def _ascending(segments_T: np.ndarray) -> np.ndarray:
    """Returns the segments with the padding at the end numbered as one more segment."""
    return np.where(segments_T == 0, segments_T.max(initial=0) + 1, segments_T)


# Models on new data


def _warn(line: str) -> None:
    print(line, file=sys.stderr)


def _warn_in_python(line: str) -> None:
    print(to_python_names(line), file=sys.stderr)


@with_python_names
def predict(
    lm: LM,
    examples: Iterable[Any],
    *,
    task: Any = None,
    length: int | None = None,
    batch: int | None = None,
    probabilities: bool = False,
    top_k: int = 0,
) -> list[Row]:
    """Returns the prediction for each example, in order.

    Labels among the columns are not read. Warnings on stderr report how many examples were truncated.

    Args:
      lm: the model.
      examples: texts; for pairs, tuples of two; for tagging, texts or lists of words; or dicts with the task's columns.
      task: the config of a task, such as `Classification()`; None: the task that the model was trained for, else the
        task of its head.
      length: tokens in a row, and the maximum of an example; None: as in training, else 512 or the model's positions.
      batch: rows in a batch.
      probabilities: whether to add `probabilities`, the probability of each class (or option) by its name.
      top_k: number of most likely classes in `top`, with their probabilities; 0: no `top`.

    Returns:
      A dict for each example, with `prediction` and, unless it is a number, `confidence`. Tagging adds `words` and,
      where tags mark spans, `entities` with their characters and scores. Question answering adds the characters `start`
      and `end` of the answer in the text.

    Raises:
      UserError: for a model without a head for the task, and for an example that the task cannot read.
    """
    check_model("the model", lm)
    task = task_for(lm, task)
    rows = input_rows.example_rows(examples, task)
    options: dict[str, Any] = {"probabilities": probabilities, "top_k": top_k, "warn": _warn_in_python}
    return [prediction for _, prediction in predict_rows(lm, rows, task, length, batch, **options)]


def predict_rows(
    lm: LM,
    rows: Iterable[tuple[Place, Row]],
    task: Any,
    length: int | None = None,
    batch: int | None = None,
    *,
    probabilities: bool = False,
    top_k: int = 0,
    warn: Callable[[str], None] = _warn,
) -> Iterator[tuple[Row, Row]]:
    """Yields each row of data with its prediction, in order. At most WINDOW rows are in memory.

    Args:
      lm: the model.
      rows: pairs of a place, for error messages, and a row.
      task: as for `predict`, and so are the other arguments.
      length: tokens in a row.
      batch: rows in a batch.
      probabilities: whether to add the probabilities of all classes.
      top_k: number of most likely classes to add.
      warn: called with each warning; errors and warnings name flags of the command line.
    """
    resolved = resolve_model(lm, task, length)
    bound: Any = resolved.task
    check_argument("probabilities", probabilities, bool)
    top_k = check_argument("top_k", top_k, Count)
    if (probabilities or top_k) and not bound.classes:
        raise UserError(
            f"{type(task).__name__} predicts no probabilities of classes; remove --probabilities and --top-k"
        )
    truncations: dict[str, Truncation] = {}
    for window in chunks(rows, WINDOW):
        records = [_read_unlabelled(bound, row, place) for place, row in window]
        predictions, _ = _evaluate(lm, resolved, records, batch, truncations)
        for (_, row), record, prediction in zip(window, records, predictions):
            names = bound.class_names(record) if probabilities or top_k else ()
            yield row, _public(prediction, names, probabilities, top_k)
    _warn_of_truncation(bound, truncations, warn)


def _public(prediction: Row, names: Sequence[Any], probabilities: bool, top_k: int) -> Row:
    """Returns a prediction without its private fields and with the requested probabilities of classes."""
    public = {name: value for name, value in prediction.items() if not name.startswith("_")}
    if not names:
        return public
    p_N = prediction["_probabilities"]
    if probabilities:
        public["probabilities"] = dict(zip(names, p_N.tolist()))
    if top_k:
        best = np.argsort(-p_N, kind="stable")[:top_k]
        public["top"] = [{"label": names[i], "probability": float(p_N[i])} for i in best]
    return public


@with_python_names
def evaluate(
    lm: LM,
    rows: Iterable[tuple[Place, Row] | Row],
    task: Any = None,
    length: int | None = None,
    batch: int | None = None,
) -> dict[str, float]:
    """Returns the task's scores and its loss over rows with labels.

    Args:
      lm: the model.
      rows: dicts with the task's columns, each alone or after its place, as `source.rows` yields them.
      task: as for `predict`, and so are `length` and `batch`.
      length: tokens in a row.
      batch: rows in a batch.

    Returns:
      The scores by name. `examples` is the number of rows, `dropped` the number of further rows that the task leaves
      out. `precision/NAME`, `recall/NAME` and `f1/NAME` are those of a class, or of a type of span.

    Raises:
      UserError: where there are no rows, for a row without a label, and for a label that the model does not have.
    """
    check_model("the model", lm)
    return evaluate_rows(lm, input_rows.labelled_rows(rows), task_for(lm, task), length, batch, _warn_in_python)


def evaluate_rows(
    lm: LM,
    rows: Iterable[tuple[Place, Row]],
    task: Any,
    length: int | None = None,
    batch: int | None = None,
    warn: Callable[[str], None] = _warn,
) -> dict[str, float]:
    """Returns the scores of `evaluate`. Errors, and the warnings passed to `warn`, name flags of the command line."""
    resolved = resolve_model(lm, task, length)
    bound: Any = resolved.task
    part, dropped = Records([], []), 0
    for place, row in rows:
        record = bound.read(bound.task, row, place)
        if record is None:
            dropped += 1
            continue
        bound.require_label(bound.task, row, record, place)
        part.records.append(record)
        part.places.append(place)
    if not part.records:
        raise UserError(f"there is no row to score{f', {dropped:,} are dropped' if dropped else ''}; give at least one")
    part = labels.to_outputs(type(bound), bound.task, part, bound.labels)
    truncations: dict[str, Truncation] = {}
    predictions, means = _evaluate(lm, resolved, part.records, batch, truncations)
    _warn_of_truncation(bound, truncations, warn)
    if warning := bound.warning(part, predictions):
        warn(f"warning: {warning}")
    counts = {"examples": len(part.records)} | ({"dropped": dropped} if dropped else {})
    by_class = metrics.flatten_per_class(bound.by_class(part, predictions))
    return {**counts, **means, **bound.score(part.records, predictions), **by_class}


def _warn_of_truncation(task: RecordTask, truncations: dict[str, Truncation], warn: Callable[[str], None]) -> None:
    for line in task.truncation_lines(truncations):
        warn(f"warning: {line.replace('--data.length', '--length')}")


def score_notes(rows: Iterable[tuple[Place, Row]], task: Any) -> list[str]:
    """Returns lines to print with the scores of `evaluate`, such as the signature of sacreBLEU."""
    kind = TASKS[type(task)]
    records = (kind.read(task, row, place) for place, row in rows)
    return kind.score_notes(task, [record for record in records if record is not None])


def _evaluate(
    lm: LM, resolved: ResolvedModel, records: list[Record], rows: int | None, truncations: dict[str, Truncation]
) -> tuple[list[Row], dict[str, float]]:
    """Returns the prediction for each record and the means of the losses; adds to `truncations`."""
    task: Any = resolved.task
    rows = check_argument("batch", rows, Rows | None)
    rows = divisible_rows(lm, rows or max(1, TOKENS // task.length))
    batches = task.batches(Records(records, []), rows, task.length, None)
    for side, counts in task.truncation(batches.examples, lm, records).items():
        truncations[side] = truncations[side] + counts if side in truncations else counts
    put = partial(shard_batch, resolved.mesh)
    kind: Any = type(task)
    step = lm.programs.get(_eval_step, lm.module, kind, task.task, task.length, task.labels, task.pooling.modes)
    return task.predict_records(
        lm, lambda batches: run_eval(step, inference_params(lm), batches, put), batches, records
    )


def _eval_step(
    module: Transformer, kind: Any, task: Any, length: int, labels: tuple[str, ...], modes: tuple[Any, ...]
) -> Step:
    """Returns the jitted step, which `LM.programs` keeps; it does not depend on the tokenizer of the task."""
    bound = kind(task, length, 0, None, labels).replace_fields(pooling=Pooling(modes))
    return jax.jit(make_eval_step(bound, module))


def _read_unlabelled(task: RecordTask, row: Row, place: Place) -> Record:
    """Returns the record of a row, read without its label, which may be unknown, or -1 for none."""
    label = next(
        (getattr(task.task, name) for name in ("label", "tags", "target") if hasattr(task.task, name)), "answers"
    )
    without = {label: None} if label in row and label not in getattr(task.task, "text", ()) else {}
    record = task.read(task.task, row | without, place)
    if record is None:
        raise UserError(f"{place}: the task leaves this row out; fix it")
    return record
