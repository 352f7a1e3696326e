"""Evaluation and prediction: every example of the data exactly once, in the order of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import jax
import numpy as np

from jaxlm import config, hosts, sharding
from jaxlm.assembly import lay
from jaxlm.config import MeshConfig
from jaxlm.data.batches import prefetch
from jaxlm.data.lines import Place, Row
from jaxlm.encode import Pooling, mesh_of, params_of
from jaxlm.errors import UserError
from jaxlm.lm import LM
from jaxlm.nn.transformer import Transformer
from jaxlm.step import make_eval_step
from jaxlm.tasks import TASKS
from jaxlm.tasks.reading import Record, Records
from jaxlm.tasks.records import RecordTask
from jaxlm.tasks.task import Seen

WINDOW = 4096  # records that are predicted at once
TOKENS = 4096  # places in a batch
Step = Callable[[Any, Any], Any]  # what `make_eval_step` makes, jitted


def see(eval_step: Step, params: Any, batches: Any, put: Callable, rows: list[int] | None = None) -> Seen:
    """Runs over all batches.  `put` lays a batch on the mesh.  `rows`: those of a batch that this host makes.

    Sums and weights are added over batches in float64 and divided once, so that the size of a batch does not show.
    Outputs come back in the order of the units, however they were packed.
    """
    totals: dict[str, tuple[float, float]] = {}
    outputs: dict[int, list[dict[str, np.ndarray]]] = {}
    for step, batch in enumerate(prefetch(partial(batches.batch_at, rows=rows), 0, len(batches))):
        laid = put(batch, 1)
        losses, arrays = jax.device_get(hosts.whole(eval_step(params, laid)))
        for name, (value, weight) in losses.items():
            total = totals.get(name, (0.0, 0.0))
            totals[name] = total[0] + float(value), total[1] + float(weight)
        if arrays:
            segments_BT = batch["segments_BT"] if rows is None else jax.device_get(hosts.whole(laid["segments_BT"]))[0]
            outputs |= _apart(arrays, segments_BT, batches.units_at(step))
    return Seen(totals, [outputs[i] for i in sorted(outputs)])


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


def predict(
    lm: LM, examples: Iterable[Any], *, task: Any = None, length: int | None = None, batch: int | None = None
) -> list[Row]:
    """The prediction for each example, in order: a dict with `prediction` and, but for numbers, `confidence`.

    examples: texts; for pairs, tuples of two; for tagging, texts or lists of words; or dicts with the columns that the
    task names.  task: such as `Classification()`; None: what the model's head is for.  length: tokens in a row, and
    the most that an example has; None: 512, or as many as the model has positions.  batch: rows in a batch.

    Labels among the columns are not read.  Raises UserError for a model without a head for it, and for an example that
    is not what the task reads.
    """
    if isinstance(examples, (str, dict)):
        raise UserError(f"examples is one {type(examples).__name__}, {examples!r:.60}; give a list of examples")
    task = task or task_of(lm)
    rows = ((Place("example", n), _row(task, example)) for n, example in enumerate(examples, start=1))
    return [prediction for _, prediction in predicted(lm, rows, task, length, batch)]


def predicted(
    lm: LM, rows: Iterable[tuple[Place, Row]], task: Any, length: int | None = None, batch: int | None = None
) -> Iterator[tuple[Row, Row]]:
    """Each row with its prediction, in order, as a stream: no more than WINDOW rows are in memory."""
    made = _made(lm, task, length)
    rows = iter(rows)
    while some := list(islice(rows, WINDOW)):
        records = [_unlabelled(made, row, place) for place, row in some]
        for (_, row), prediction in zip(some, _seen(lm, made, records, batch)[0]):
            yield row, {name: value for name, value in prediction.items() if not name.startswith("_")}


def evaluate(
    lm: LM,
    rows: Iterable[tuple[Place, Row] | Row],
    task: Any = None,
    length: int | None = None,
    batch: int | None = None,
) -> dict[str, float]:
    """The task's scores, and its loss, over rows that have labels; the rest is as in `predict`.

    rows: dicts with the columns that the task names, each alone or behind its place, as `source.rows` gives them.
    `examples` counts them, and `dropped` those beside them that the task leaves out.

    Raises UserError where there are none, for a row without a label, and for a label that the model does not know.
    """
    made = _made(lm, task or task_of(lm), length)
    part, dropped = Records([], []), 0
    for n, given in enumerate(rows, start=1):
        place, row = (Place("example", n), given) if isinstance(given, dict) else given
        record = made.read(made.task, row, place)
        if record is None:
            dropped += 1
            continue
        made.labelled(made.task, row, record, place)
        part.records.append(record)
        part.places.append(place)
    if not part.records:
        raise UserError(f"there is no row to score{f', {dropped:,} are dropped' if dropped else ''}; give at least one")
    made.settle(made.task, part, made.labels)
    [part] = type(made).fitted(made.task, [part], made.labels)
    found, means = _seen(lm, made, part.records, batch)
    counts = {"examples": len(part.records)} | ({"dropped": dropped} if dropped else {})
    return {**counts, **means, **made.score(part.records, found)}


def beside(rows: Iterable[tuple[Place, Row]], task: Any) -> list[str]:
    """Lines that belong beside the scores of `evaluate`, such as sacreBLEU's signature."""
    kind = TASKS[type(task)]
    records = (kind.read(task, row, place) for place, row in rows)
    return kind.beside(task, [record for record in records if record is not None])


def _seen(lm: LM, task: RecordTask, records: list[Record], rows: int | None) -> tuple[list[Row], dict[str, float]]:
    if rows is not None and rows < 1:
        raise UserError(f"batch is {rows}; it must be at least 1")
    mesh = mesh_of(lm)
    ways = 1 if mesh is None else sharding.ways(mesh, "batch")
    rows = -(-(rows or max(1, TOKENS // task.length)) // ways) * ways  # the size of a batch does not show
    batches = task.batches(Records(records, []), rows, task.length, None)
    put = partial(lay, mesh or sharding.make_mesh(MeshConfig(1), jax.local_devices()[:1]))
    step = _eval_step(lm.module, type(task), task.task, task.length, task.labels, task.pooling.modes)  # type: ignore[arg-type]
    return task.tell(lm, lambda batches: see(step, params_of(lm), batches, put), batches, records)


@lru_cache(maxsize=32)
def _eval_step(
    module: Transformer, kind: Any, task: Any, length: int, labels: tuple[str, ...], modes: tuple[Any, ...]
) -> Step:
    """Compiled once for a model and a task; what a task computes does not depend on its tokenizer."""
    made = kind(task, length, 0, None, labels)
    made.pooling = Pooling(modes)
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
    if length is not None and length < 2:
        raise UserError(f"length is {length}; a row needs at least 2 tokens")
    positions = lm.config.max_length if lm.config.positions == "learned" else 512
    if length is not None and lm.config.positions == "learned" and length > positions:
        raise UserError(f"length is {length}, longer than the {positions} positions of the model; lower it")
    made = kind(task, length or min(512, positions), 0, lm.tokenizer, lm.config.labels if kind.head else ())
    if lm.pooling is not None:
        made.pooling = lm.pooling
    made.configured(lm.config)
    return made


def task_of(lm: LM) -> Any:
    """What a model's head is for, as its config.json says."""
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
        return config.Seq2Seq()
    if lm.pooling is not None or (not heads and lm.config.structure == "encoder"):
        return config.Similarity()
    raise UserError(
        f"the model has the heads: {', '.join(heads) or 'none'}; classes, tokens or span would tell something of an "
        f"example: fine-tune it first"
    )


def _row(task: Any, example: Any) -> Row:
    """An example as a row with the columns that the task reads."""
    if isinstance(example, dict):
        return example
    if isinstance(task, config.Tagging):
        return {task.tokens: example}
    columns = getattr(task, "text", getattr(task, "source", None))
    columns = (columns,) if isinstance(columns, str) else columns or ("question", "context")
    values = (example,) if isinstance(example, str) else example
    if not isinstance(values, (tuple, list)):
        raise UserError(
            f"an example is {example!r:.60}; give a text, a tuple of texts, or a dict with the task's columns"
        )
    if isinstance(task, config.Classification) and len(values) != len(columns) and task.text == ("text",):
        raise UserError(
            f"an example has {len(values)} texts; name two columns, Classification(text=('a', 'b')), for pairs"
        )
    if len(values) != len(columns):
        raise UserError(f"an example has {len(values)} texts, the task reads {', '.join(columns)}; give as many")
    return dict(zip(columns, values))


def _unlabelled(task: RecordTask, row: Row, place: Place) -> Record:
    """The record of a row, read without its label: a prediction is not held up by one that is new, or a -1."""
    label = next(
        (getattr(task.task, name) for name in ("label", "tags", "target") if hasattr(task.task, name)), "answers"
    )
    without = {label: None} if label in row and label not in getattr(task.task, "text", ()) else {}
    record = task.read(task.task, row | without, place)
    if record is None:
        raise UserError(f"{place}: the row is one that the task leaves out; mend it")
    return record
