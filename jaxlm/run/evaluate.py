"""Evaluation and prediction: every example of the data exactly once, in the order of the data."""

from __future__ import annotations

import dataclasses
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import jax
import numpy as np

from jaxlm import config
from jaxlm.config import MeshConfig
from jaxlm.config.arguments import check_model
from jaxlm.data.batches import prefetch
from jaxlm.data.formats.lines import Place, Row
from jaxlm.devices import hosts, sharding
from jaxlm.errors import UserError, in_python, python_names
from jaxlm.hub.pooling import Pooling
from jaxlm.inference.encode import mesh_of, params_of
from jaxlm.inference.generation_defaults import written_by
from jaxlm.lm import LM
from jaxlm.nn.transformer import Transformer
from jaxlm.run.assembly import shard_batch
from jaxlm.run.step import make_eval_step
from jaxlm.tasks import TASKS, cells, given, labels, metrics
from jaxlm.tasks.cells import Record, Records
from jaxlm.tasks.records import RecordTask, Truncation
from jaxlm.tasks.task import EvalResult

WINDOW = 4096  # records that are predicted at once
TOKENS = 4096  # places in a batch
MOST_ROWS = 2**16  # in a batch
AHEAD = 8  # batches that wait on an accelerator; more would fill its memory
Step = Callable[[Any, Any], Any]  # what `make_eval_step` makes, jitted


def run_eval(eval_step: Step, params: Any, batches: Any, put: Callable, rows: list[int] | None = None) -> EvalResult:
    """Runs over all batches.  `put` lays a batch on the mesh.  `rows`: those of a batch that this host makes.

    Sums and weights are added over batches in float64 and divided once, so that the size of a batch does not show.
    Outputs come back in the order of the units, however they were packed.  An accelerator has up to `AHEAD` batches at
    a time, so that it does not wait while the results of one are fetched.
    """
    totals: dict[str, tuple[float, float]] = {}
    outputs: dict[int, list[dict[str, np.ndarray]]] = {}
    waiting: deque[tuple[int, Any, Any]] = deque()

    def fetch() -> None:
        step, segments, results = waiting.popleft()
        losses, arrays = hosts.fetched(results)
        for name, (value, weight) in losses.items():
            total = totals.get(name, (0.0, 0.0))
            totals[name] = total[0] + float(value), total[1] + float(weight)
        if arrays:
            segments_BT = segments if rows is None else hosts.fetched(segments)[0]
            outputs.update(_apart(arrays, segments_BT, batches.units_at(step)))

    for step, batch in enumerate(prefetch(partial(batches.batch_at, rows=rows), 0, len(batches))):
        laid = put(batch, 1)
        segments = (batch if rows is None else laid).get("segments_BT")
        waiting.append((step, segments, eval_step(params, laid)))
        # On several CPU devices, steps in a queue can deadlock: each waits for the threads of another.
        if len(waiting) >= (1 if jax.default_backend() == "cpu" else AHEAD):
            fetch()
    while waiting:
        fetch()
    return EvalResult(totals, [outputs[i] for i in sorted(outputs)])


def _apart(
    arrays: dict[str, np.ndarray], segments_BT: np.ndarray, units: list[list[tuple[int, int]]]
) -> dict[int, list[dict[str, np.ndarray]]]:
    """The outputs of a batch, [B, E, ...] and [B, T, ...], for each unit and each example in it."""
    found: dict[int, list[dict[str, np.ndarray]]] = {}
    for b, row in enumerate(units):
        bounds = np.searchsorted(_closed(segments_BT[b]), np.arange(1, sum(n for _, n in row) + 2))
        e = 0
        for unit, count in row:
            found[unit] = [
                {
                    name: array[b, bounds[e + k] : bounds[e + k + 1]]
                    if name.rpartition("_")[2][1] == "T"
                    else array[b, e + k]
                    for name, array in arrays.items()
                }
                for k in range(count)
            ]
            e += count
    return found


def _closed(segments_T: np.ndarray) -> np.ndarray:
    """Segments in ascending order, with the padding at the end counted as one more."""
    return np.where(segments_T == 0, segments_T.max(initial=0) + 1, segments_T)


# A model on new data


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _say_in_python(line: str) -> None:
    print(in_python(line), file=sys.stderr)


@python_names
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
    """Returns the prediction for each example, in order: a dict with `prediction` and, but for numbers, `confidence`.

    Tagging adds `words` and, where tags mark spans, `entities` with their characters and scores; question answering
    adds the characters `start` and `end` of the answer in the text.

    Args:
      lm: the model.
      examples: texts; for pairs, tuples of two; for tagging, texts or lists of words; or dicts with the columns that
        the task names.
      task: such as `Classification()`; None: the one that the model was trained for, else what its head is for.
      length: tokens in a row, and the most that an example has; None: as in training, else 512 or as many as the model
        has positions.
      batch: rows in a batch.
      probabilities: adds `probabilities`, that of each class (or option) by its name.
      top_k: adds `top`, so many likeliest classes with their probabilities; 0: not.

    Labels among the columns are not read.  A line on standard error counts the examples that were cut.

    Raises:
      UserError: for a model without a head for the task, and for an example that is not what the task reads.
    """
    check_model("the model", lm)
    task = task_for(lm, task)
    rows = given.examples(examples, task)
    classes: dict[str, Any] = {"probabilities": probabilities, "top_k": top_k}
    return [told for _, told in predicted(lm, rows, task, length, batch, **classes, say=_say_in_python)]


def predicted(
    lm: LM,
    rows: Iterable[tuple[Place, Row]],
    task: Any,
    length: int | None = None,
    batch: int | None = None,
    *,
    probabilities: bool = False,
    top_k: int = 0,
    say: Callable[[str], None] = _say,
) -> Iterator[tuple[Row, Row]]:
    """Yields each row with its prediction, in order, as a stream: no more than WINDOW rows are in memory.

    say: takes the warnings, which name flags of the command line, as do the errors; the rest is as in `predict`.
    """
    made = _made(lm, task, length)
    if not isinstance(probabilities, (bool, np.bool_)):
        raise UserError(f"probabilities is {cells.shown(probabilities)}; it must be True or False")
    most = given.size(top_k, "top_k") or 0
    if most < 0:
        raise UserError(f"top_k is {most}; it must be at least 1, or 0 for none")
    if (probabilities or most) and not made.classes:
        raise UserError(
            f"{type(task).__name__} gives no probabilities of classes; leave out --probabilities and --top-k"
        )
    rows = iter(rows)
    cut: dict[str, Truncation] = {}
    while some := list(islice(rows, WINDOW)):
        records = [_unlabelled(made, row, place) for place, row in some]
        told, _ = _seen(lm, made, records, batch, cut)
        for (_, row), record, prediction in zip(some, records, told):
            names = made.class_names(record) if probabilities or most else ()
            yield row, _public(prediction, names, probabilities, most)
    _warn_of_cuts(made, cut, say)


def _public(prediction: Row, names: Sequence[Any], probabilities: bool, top_k: int) -> Row:
    """A prediction without what is for scores alone, and with the probabilities of classes that were asked for."""
    told = {name: value for name, value in prediction.items() if not name.startswith("_")}
    if not names:
        return told
    p_N = prediction["_probabilities"]
    if probabilities:
        told["probabilities"] = dict(zip(names, p_N.tolist()))
    if top_k:
        best = np.argsort(-p_N, kind="stable")[:top_k]
        told["top"] = [{"label": names[i], "probability": float(p_N[i])} for i in best]
    return told


@python_names
def evaluate(
    lm: LM,
    rows: Iterable[tuple[Place, Row] | Row],
    task: Any = None,
    length: int | None = None,
    batch: int | None = None,
) -> dict[str, float]:
    """Returns the task's scores, and its loss, over rows that have labels; the rest is as in `predict`.

    `examples` counts the rows, `dropped` those beside them that the task leaves out; `precision/NAME`, `recall/NAME`
    and `f1/NAME` are those of a class, or of a type of span.

    Args:
      rows: dicts with the columns that the task names, each alone or behind its place, as `source.rows` gives them.

    Raises:
      UserError: where there are none, for a row without a label, and for a label that the model does not know.
    """
    check_model("the model", lm)
    return scored(lm, given.labelled(rows), task_for(lm, task), length, batch, _say_in_python)


def scored(
    lm: LM,
    rows: Iterable[tuple[Place, Row]],
    task: Any,
    length: int | None = None,
    batch: int | None = None,
    say: Callable[[str], None] = _say,
) -> dict[str, float]:
    """Returns what `evaluate` does; its errors, and the warnings that `say` takes, name flags of the command line."""
    made = _made(lm, task, length)
    part, dropped = Records([], []), 0
    for place, row in rows:
        record = made.read(made.task, row, place)
        if record is None:
            dropped += 1
            continue
        made.labelled(made.task, row, record, place)
        part.records.append(record)
        part.places.append(place)
    if not part.records:
        raise UserError(f"there is no row to score{f', {dropped:,} are dropped' if dropped else ''}; give at least one")
    part = labels.to_outputs(type(made), made.task, part, made.labels)
    cut: dict[str, Truncation] = {}
    found, means = _seen(lm, made, part.records, batch, cut)
    _warn_of_cuts(made, cut, say)
    if warning := made.warning(part, found):
        say(f"warning: {warning}")
    counts = {"examples": len(part.records)} | ({"dropped": dropped} if dropped else {})
    by_class = metrics.by_name(made.by_class(part, found))
    return {**counts, **means, **made.score(part.records, found), **by_class}


def _warn_of_cuts(task: RecordTask, cut: dict[str, Truncation], say: Callable[[str], None]) -> None:
    for line in task.cut_lines(cut):
        say(f"warning: {line.replace('--data.length', '--length')}")


def beside(rows: Iterable[tuple[Place, Row]], task: Any) -> list[str]:
    """Lines that belong beside the scores of `evaluate`, such as sacreBLEU's signature."""
    kind = TASKS[type(task)]
    records = (kind.read(task, row, place) for place, row in rows)
    return kind.beside(task, [record for record in records if record is not None])


def _seen(
    lm: LM, task: RecordTask, records: list[Record], rows: int | None, cut: dict[str, Truncation]
) -> tuple[list[Row], dict[str, float]]:
    """The prediction for each record, and the means of the losses; what was cut is added to `cut`, by its side."""
    rows = given.size(rows, "batch")
    if rows is not None and not 1 <= rows <= MOST_ROWS:
        raise UserError(f"batch is {rows}; it must be from 1 to {MOST_ROWS:,}")
    mesh = mesh_of(lm)
    ways = 1 if mesh is None else sharding.ways(mesh, "batch")
    rows = -(-(rows or max(1, TOKENS // task.length)) // ways) * ways  # the size of a batch does not show
    batches = task.batches(Records(records, []), rows, task.length, None)
    for side, found in task.truncation(batches.examples, lm, records).items():
        cut[side] = cut[side] + found if side in cut else found
    put = partial(shard_batch, mesh or sharding.make_mesh(MeshConfig(1), jax.local_devices()[:1]))
    step = lm.programs.get(_eval_step, lm.module, type(task), task.task, task.length, task.labels, task.pooling.modes)
    return task.tell(lm, lambda batches: run_eval(step, params_of(lm), batches, put), batches, records)


def _eval_step(
    module: Transformer, kind: Any, task: Any, length: int, labels: tuple[str, ...], modes: tuple[Any, ...]
) -> Step:
    """Returns the compiled step, which `LM.programs` keeps; what a task computes does not depend on its tokenizer."""
    made = kind(task, length, 0, None, labels).replaced(pooling=Pooling(modes))
    return jax.jit(make_eval_step(made, module))


def _made(lm: LM, task: Any, length: int | None) -> RecordTask:
    kind = TASKS.get(type(task))
    if kind is None or not issubclass(kind, RecordTask):
        raise UserError(f"{type(task).__name__} makes no predictions of examples; give a task such as Classification()")
    if lm.tokenizer is None:
        raise UserError("the model has no tokenizer; load it from a folder with one, or give it one")
    if kind.head is not None and kind.head not in lm.config.heads_on_top:
        heads = ", ".join(lm.config.heads_on_top) or "none"
        raise UserError(f"{type(task).__name__} reads the head {kind.head}, the model has {heads}; fine-tune it")
    problem = "regression" if isinstance(task, config.MultipleChoice) else getattr(task, "problem", "multi_label")
    one = problem == "regression"  # a task of one output; of several labels there may be any number
    if kind.head == "classes" and problem != "multi_label" and one != (len(lm.config.labels) == 1):
        raise UserError(
            f"{type(task).__name__} reads {'one output' if one else 'several outputs'}, the model has "
            f"{', '.join(lm.config.labels)}; give the task that it was trained for"
        )
    length = given.size(length, "length")
    if length is None and lm.trained:
        length = lm.trained.length
    if length is not None and length < 2:
        raise UserError(f"length is {length}; a row needs at least 2 tokens")
    if length is not None:
        lm.config.check_length(length)
    outputs = labels.named_outputs(task, lm.config.labels) if kind.head else ()
    made = kind(task, length or min(512, lm.config.position_limit or 512), 0, lm.tokenizer, outputs)
    return made.bound(lm.config, lm.pooling)


def task_for(lm: LM, task: Any = None) -> Any:
    """Returns the task to do with a model: the one given, else the one that it was trained for, else what its head is
    for.

    Raises UserError for what is no task, and for a model that was trained for a task that is not registered.
    """
    if task is not None and (not dataclasses.is_dataclass(task) or isinstance(task, type)):
        raise UserError(f"the task is {cells.shown(task)}; give the config of one, such as Classification()")
    if task is not None:
        return task
    trained = lm.trained
    if trained is None:
        return task_of(lm)
    kind = TASKS.get(type(trained.task))
    if isinstance(trained.task, str):
        raise UserError(
            f"the model was trained for the task {trained.task}, which is not one of jaxlm's; register it, or give the "
            f"task (at the command line its config, with --config)"
        )
    if kind is not None and issubclass(kind, RecordTask) and (kind.head is None or kind.head in lm.config.heads_on_top):
        return trained.task
    return task_of(lm)


def task_of(lm: LM) -> Any:
    """Returns what a model's head is for, as its config.json says."""
    heads, said = lm.config.heads_on_top, lm.origin.config if lm.origin else {}
    if any(str(name).endswith("ForMultipleChoice") for name in said.get("architectures") or ()):
        return config.MultipleChoice()
    if "classes" in heads:
        usual = "regression" if len(lm.config.labels) == 1 else "single_label"
        said_so = str(said.get("problem_type")).removesuffix("_classification")
        problem: Any = said_so if said_so in ("multi_label", "regression") else usual
        return config.Classification(problem=problem)
    if "tokens" in heads:
        return config.Tagging()
    if "span" in heads:
        return config.QuestionAnswering(stride=min(128, lm.config.max_length // 4))
    if "lm" in heads and lm.config.structure == "encoder_decoder":
        return config.Seq2Seq(decoding=written_by(lm))
    if lm.pooling is not None or (not heads and lm.config.structure == "encoder"):
        return config.Similarity()
    raise UserError(
        f"the model has the heads: {', '.join(heads) or 'none'}; classes, tokens or span would tell something of an "
        f"example: fine-tune it first"
    )


def _unlabelled(task: RecordTask, row: Row, place: Place) -> Record:
    """The record of a row, read without its label: a prediction is not held up by one that is new, or a -1."""
    label = next(
        (getattr(task.task, name) for name in ("label", "tags", "target") if hasattr(task.task, name)), "answers"
    )
    without = {label: None} if label in row and label not in getattr(task.task, "text", ()) else {}
    record = task.read(task.task, row | without, place)
    if record is None:
        raise UserError(f"{place}: the row is one that the task leaves out; fix it")
    return record
