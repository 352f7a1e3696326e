"""Fine-tuning: properties of every task over records, values of each task, and runs from files to scores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import example as with_example
from hypothesis import given, settings
from hypothesis import strategies as st
from random_params import random_params

import jaxlm
from jaxlm import (
    Classification,
    DataConfig,
    ModelConfig,
    MultipleChoice,
    OptimizerConfig,
    Pooling,
    QuestionAnswering,
    RunConfig,
    Similarity,
    Stopped,
    Tagging,
    TokenizerConfig,
    UserError,
)
from jaxlm.__main__ import main
from jaxlm.config import MeshConfig
from jaxlm.data import source
from jaxlm.data.batches import Batches
from jaxlm.data.formats.lines import Place
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.devices import sharding
from jaxlm.families import PRESETS
from jaxlm.nn.transformer import Transformer
from jaxlm.run.assembly import shard_batch
from jaxlm.run.evaluate import run_eval
from jaxlm.run.fit import fit
from jaxlm.run.measure import MEASURED
from jaxlm.run.step import make_eval_step
from jaxlm.tasks import TASKS, metrics
from jaxlm.tasks.cells import Records
from jaxlm.tasks.records import RecordTask
from jaxlm.tasks.task import EvalResult

T, ROWS, V = 24, 4, 320
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps", "London", "Anna")


# One table of tasks: a case is a task and a function that returns a labelled row of about n words


class Case(NamedTuple):
    task: Any
    row: Callable[[np.random.Generator, int], dict[str, Any]]
    labels: int  # outputs of the head


def words(random: np.random.Generator, n: int) -> str:
    return " ".join(random.choice(WORDS, n))


def class_row(random: np.random.Generator, n: int) -> dict[str, Any]:
    return {"text": words(random, n), "label": str(random.choice(["no", "so", "yes"]))}


def classes_row(random: np.random.Generator, n: int) -> dict[str, Any]:
    return {"text": words(random, n), "label": [name for name in ("a", "b", "c") if random.random() < 0.5]}


def number_row(random: np.random.Generator, n: int) -> dict[str, Any]:
    return {"text": words(random, n), "label": float(random.standard_normal())}


def pair_row(random: np.random.Generator, n: int) -> dict[str, Any]:
    pair = {"a": words(random, n), "b": words(random, int(random.integers(n + 1)))}
    return pair | {"label": int(random.integers(3))}


def tagging_row(random: np.random.Generator, n: int) -> dict[str, Any]:
    tags = [str(tag) for tag in random.choice(["O", "B-A", "I-A"], n)]
    return {"tokens": words(random, n).split(), "tags": tags}


def question_row(random: np.random.Generator, n: int, answer_rate: float = 0.7) -> dict[str, Any]:
    """Return a row with a context of up to 4 n words, so that some contexts have several windows."""
    context = words(random, max(1, 4 * n))
    row = {"context": context, "question": words(random, int(random.integers(1, 4))), "title": "t"}
    if random.random() >= answer_rate:
        return row | {"answers": {"text": [], "answer_start": []}}
    begins = [0, *(i + 1 for i, letter in enumerate(context) if letter == " ")]
    start = int(random.choice(begins))
    answer = " ".join(context[start:].split()[: int(random.integers(1, 4))])
    return row | {"answers": {"text": [answer], "answer_start": [start]}}


def similar_row(random: np.random.Generator, n: int) -> dict[str, Any]:
    pair = {"text_a": words(random, n), "text_b": words(random, int(random.integers(n + 1)))}
    return pair | {"label": round(float(random.random()), 3)}


def choice_row(random: np.random.Generator, n: int) -> dict[str, Any]:
    options = [words(random, int(random.integers(n // 2 + 1))) for _ in range(int(random.integers(2, 5)))]
    return {"question": words(random, n // 4), "options": options, "label": int(random.integers(len(options)))}


QUESTIONS = {"stride": 4, "max_question_tokens": 4}
CASES = {
    "class": Case(Classification(), class_row, 3),
    "classes": Case(Classification(problem="multi_label"), classes_row, 3),
    "number": Case(Classification(problem="regression"), number_row, 1),
    "pair": Case(Classification(text=("a", "b")), pair_row, 3),
    "tagging": Case(Tagging(), tagging_row, 3),
    "crf": Case(Tagging(crf=True), tagging_row, 3),
    "answers": Case(QuestionAnswering(unanswerable=False, **QUESTIONS), partial(question_row, answer_rate=1), 2),
    "questions": Case(QuestionAnswering(**QUESTIONS), question_row, 2),
    "cosine": Case(Similarity(), similar_row, 1),
    "contrastive": Case(Similarity(objective="contrastive", temperature=0.2), similar_row, 1),
    "choice": Case(MultipleChoice(), choice_row, 1),
}
SMALL = {"vocabulary": V, "max_length": 32, "width": 16, "layers": 2, "heads": 2, "head_width": None, "mlp_width": 32}
SMALL |= {"dropout": 0.0, "attention_dropout": 0.0, "heads_on_top": ("classes", "tokens", "span")}
MODELS = {
    "bert": replace(PRESETS["bert-base"], **SMALL),
    "roberta": replace(PRESETS["roberta-base"], **SMALL),
    "gpt2": replace(PRESETS["gpt2"], **SMALL),
    "modernbert": replace(PRESETS["modernbert-base"], **SMALL, window=3, classes_from="mean"),
}
MODELS["modernbert"] = replace(MODELS["modernbert"], layer_kinds=("global", "local"))


def table(cases: Any, fast: Any) -> list[Any]:
    """Return every case with every model. Cases that are not in `fast` are marked as long, except with bert."""
    pairs = [(case, model) for model in MODELS for case in cases]
    return [
        pytest.param(*pair, marks=() if pair[1] == "bert" or pair[0] in fast else pytest.mark.long, id="-".join(pair))
        for pair in pairs
    ]


# The default suite runs bert with all tasks and the other models with five tasks. The other pairs are marked as long.
CASES_AND_MODELS = table(CASES, ("class", "tagging", "questions", "cosine", "choice"))
INDEPENDENT = [case for case in CASES if case != "contrastive"]  # the contrastive loss depends on the whole batch


@lru_cache
def tokenizer(kind: str):
    random = np.random.default_rng(0)
    texts = [words(random, 12) for _ in range(40)]
    return tokenizers.train(texts, TokenizerConfig(train=kind, lowercase=kind == "wordpiece"), SIZES[kind])


SIZES = {"wordpiece": 80, "byte_bpe": 270, "bpe": 300}


def tokenizer_of(model: str):
    return tokenizer("byte_bpe" if model == "gpt2" else "wordpiece")


@lru_cache
def model_of(model: str, labels: int) -> tuple[ModelConfig, Any]:
    config = replace(MODELS[model], labels=tuple(f"LABEL_{i}" for i in range(labels)))
    return config, random_params(config)


def records_of(case: str, rows: list[dict[str, Any]]) -> list[Any]:
    task = CASES[case].task
    return [TASKS[type(task)].read(task, row, Place("rows", n)) for n, row in enumerate(rows, start=1)]


def random_records(case: str, lengths: Any, seed: int = 0) -> list[Any]:
    """Return one record for each length, with about this number of words."""
    random = np.random.default_rng(seed)
    return records_of(case, [CASES[case].row(random, int(n)) for n in lengths])


LENGTHS = (5, 1, 9, 3, 0, 2, 7, 4, 3)  # the text of the fifth is empty


def task_of(case: str, model: str = "bert", length: int = T, **changes: Any) -> RecordTask:
    task = replace(CASES[case].task, **changes)
    kind = TASKS[type(task)]
    # Enough records that every label occurs.
    labels = kind.names(task, Records(random_records(case, [3] * 30, seed=1), [Place("rows", n) for n in range(30)]))
    return kind(task, length, 0, tokenizer_of(model), labels)


class CompiledCase(NamedTuple):
    task: RecordTask
    module: Transformer
    params: Any
    step: Any


@lru_cache
def compile_case(case: str, model: str) -> CompiledCase:
    config, params = model_of(model, CASES[case].labels)
    task, module = task_of(case, model), Transformer(config)
    return CompiledCase(task, module, params, jax.jit(make_eval_step(task, module)))


@lru_cache
def gradient(case: str, model: str):
    """Return a compiled function of (params, batch) that returns the loss (sum, weight) and the gradient of the sum."""
    task, module, _, _ = compile_case(case, model)

    def loss(params, batch):
        total, weight = task.losses(module, params, batch, None)[0]["loss"]
        return total, weight

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def split_batch(batch, k):
    return {name: x.reshape(k, -1, *x.shape[1:]) for name, x in batch.items()}


def batches_of(task: RecordTask, records: list[Any], rows: int = ROWS, length: int = T) -> Batches:
    return Batches(task.examples(Records(records, []), False), rows, length, task.max_examples, None)


def evaluate_records(case: str, model: str, records: list[Any]) -> tuple[Batches, EvalResult]:
    task, _, params, step = compile_case(case, model)
    batches = batches_of(task, records)
    return batches, run_eval(step, params, batches, split_batch)


def outputs_of(batches: Batches, found: EvalResult) -> list[list[Any]]:
    """Return the outputs of the units of each record."""
    units: list[list[Any]] = [[] for _ in range(int(batches.examples.record_of.max()) + 1)]
    for n, outputs in zip(batches.examples.record_of, found.outputs, strict=True):
        units[n].append(outputs)
    return units


close = partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("case", "model"), CASES_AND_MODELS)
def test_packed_equals_unpacked_in_any_order(case, model):
    records = random_records(case, LENGTHS)
    batches, found = evaluate_records(case, model, records)
    assert batches.rows_in_epoch < len(batches.lengths)  # some records share a row
    together = outputs_of(batches, found)
    losses = []
    for record, expected in zip(records, together, strict=True):
        one = evaluate_records(case, model, [record])
        losses.append(one[1].losses["loss"])
        jax.tree.map(close, outputs_of(*one), [expected])
    backward = evaluate_records(case, model, records[::-1])
    jax.tree.map(close, outputs_of(*backward), together[::-1])
    if case in INDEPENDENT:
        close(found.losses["loss"], np.sum(losses, 0), rtol=1e-4)
        close(found.losses["loss"], backward[1].losses["loss"], rtol=1e-4)
    task = compile_case(case, model).task
    predicted = task.predictions(records, batches, found.outputs)
    assert len(predicted) == len(records)
    assert all(0 <= prediction.get("confidence", 1) <= 1.00001 for prediction in predicted)


@pytest.mark.parametrize(("case", "model"), table(INDEPENDENT, ()))
def test_the_loss_of_an_example_depends_on_its_own_tokens_alone(case, model):
    """The gradient of the loss of one unit is zero at the embeddings of all other tokens. All tokens differ."""
    task, _, params, _ = compile_case(case, model)
    batches = batches_of(task, random_records(case, LENGTHS))
    batch = batches.batch_at(0) | {"tokens_BT": np.arange(ROWS * T, dtype=np.int32).reshape(ROWS, T)}
    for b, row in enumerate(batches.units_at(0)):
        first = 1
        for _, count in row:
            own_BT = (np.arange(ROWS) == b)[:, None] & (batch["segments_BT"] >= first)
            own_BT &= batch["segments_BT"] < first + count
            own_BE = (np.arange(ROWS) == b)[:, None] & np.isin(
                np.arange(task.max_examples) + 1, range(first, first + count)
            )
            # The labels of a choice are its weights.
            fields = ("weights_BT", "weights_BE", *(["labels_BE"] if case == "choice" else []))
            own = {"BT": own_BT, "BE": own_BE}
            alone = {name: batch[name] * own[name[-2:]].astype(np.float32) for name in fields if name in batch}
            (loss, _), grads = gradient(case, model)(params, batch | alone)
            by_token = np.asarray(grads["embeddings"]["tokens"])[batch["tokens_BT"]]
            assert not by_token[~own_BT].any()
            assert by_token[own_BT].any() or not loss
            first += count


@pytest.mark.parametrize("case", INDEPENDENT)
def test_sums_over_micro_batches_equal_those_of_the_large_batch(case):
    task, _, params, _ = compile_case(case, "bert")
    batch = batches_of(task, random_records(case, LENGTHS)).batch_at(0)
    (total, weight), whole = jax.device_get(gradient(case, "bert")(params, batch))
    assert weight == task.weights(batch)["loss"] > 0
    parts = []
    for b in range(ROWS):  # row b alone; the other rows are padding, so the compiled shape is reused
        row = {
            name: x * (np.arange(ROWS) == b).reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)
            for name, x in batch.items()
        }
        parts.append(jax.device_get(gradient(case, "bert")(params, row)))
        assert parts[-1][0][1] == task.weights(row)["loss"]
    added = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    close(added[0], (total, weight), rtol=1e-4)
    jax.tree.map(partial(close, rtol=1e-3, atol=2e-5), added[1], whole)


def test_rows_are_padded_if_the_mesh_does_not_divide_them():
    """With 3 rows on 8 devices, the losses and the outputs equal those of one device."""
    task, _, params, step = compile_case("class", "bert")
    batches = batches_of(task, random_records("class", LENGTHS), rows=3)
    mesh = sharding.make_mesh(MeshConfig())
    on_mesh = partial(shard_batch, mesh)
    assert on_mesh(batches.batch_at(0), 1)["tokens_BT"].shape == (1, 8, T)
    jax.tree.map(
        close, tuple(run_eval(step, params, batches, on_mesh)), tuple(run_eval(step, params, batches, split_batch))
    )


def echo(_: Any, batch: dict[str, np.ndarray]) -> Any:
    """Return the tokens and their sum. This is an evaluation step without a model."""
    batch = {name: x[0] for name, x in batch.items()}
    is_token = batch["segments_BT"] > 0
    losses = {"loss": ((batch["tokens_BT"] * is_token).sum(), batch["segments_BT"].max(-1).sum())}
    return losses, {"tokens_BT": batch["tokens_BT"]}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_example_is_evaluated_once_and_in_order(data):
    case = data.draw(st.sampled_from(list(CASES)))
    length = data.draw(st.integers(24, 60))
    lengths = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=25))
    rows = data.draw(st.integers(1, 5))
    task = task_of(case, data.draw(st.sampled_from(["bert", "gpt2"])), length)
    records = random_records(case, lengths)
    batches = batches_of(task, records, rows, length)
    found = run_eval(echo, None, batches, split_batch)
    features = list(task.features(records, False))
    tokens = lambda units, name: [[np.array(x[name]).tolist() for x in unit] for unit in units]
    expected = [tokens(units, "tokens_BT") for units in features]
    assert [tokens(units, "tokens_BT") for units in outputs_of(batches, found)] == expected
    examples = [example for units in expected for unit in units for example in unit]
    assert found.losses["loss"] == (sum(map(sum, examples)), len(examples))
    assert max(map(len, examples)) <= length
    assert len(batches.batch_at(0)["tokens_BT"]) == rows


@pytest.mark.parametrize("model", ["bert", "gpt2"])
@pytest.mark.parametrize("case", CASES)
def test_every_epoch_trains_on_all_rows(case, model):
    """Training shuffles the rows and omits none."""
    task, records = task_of(case, model), random_records(case, LENGTHS)
    examples = task.examples(Records(records, []), True)
    batches = Batches(examples, 1, T, task.max_examples, 7)
    total = lambda steps: sum(int(task.weights(batches.batch_at(step))["loss"]) for step in steps)
    once = batches_of(task, records, 1)
    weight = sum(int(task.weights(once.batch_at(step))["loss"]) for step in range(len(once)))
    first = batches.rows_in_epoch
    assert total(range(first)) == weight
    later = [int(batches.batch_at(step)["segments_BT"].max(-1).sum()) for step in range(first, 2 * first + 3)]
    assert sum(later) >= batches.examples.counts.sum()


# Several devices


def run_on_devices(case: str, n: int, batch: dict[str, np.ndarray], gradients: bool) -> Any:
    task, module, params, _ = compile_case(case, "bert")
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=n // 2) if n > 1 else MeshConfig(1), jax.devices()[:n])
    module = Transformer(module.config, sharding.Placement(mesh))
    sharded = shard_batch(mesh, batch, 1)
    params = jax.device_put(params, sharding.replicated(mesh))

    def loss(params, batch):
        losses, outputs = make_eval_step(task, module)(params, batch)
        return losses["loss"][0], (losses, outputs)

    return jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True) if gradients else loss)(params, sharded))


QUICK = {("class", 2, False), ("tagging", 2, False), ("questions", 2, False), ("choice", 2, False)}
QUICK |= {("contrastive", 2, True), ("contrastive", 4, False)}
ON_DEVICES = [
    pytest.param(case, n, gradients, marks=() if (case, n, gradients) in QUICK else pytest.mark.long)
    for case in CASES
    for n in (2, 4)
    for gradients in (False, True)
]


@pytest.mark.parametrize(("case", "n", "gradients"), ON_DEVICES)
def test_several_devices_compute_the_same_as_one(case, n, gradients):
    """This includes the contrastive loss, whose negatives are on all devices."""
    task, _, params, step = compile_case(case, "bert")
    batch = batches_of(task, random_records(case, LENGTHS)).batch_at(0)
    found = run_on_devices(case, n, batch, gradients)
    losses, outputs = jax.device_get(step(params, split_batch(batch, 1)))
    (value, (their_losses, their_outputs)), grads = found if gradients else (found, None)
    close(value, losses["loss"][0], rtol=1e-4)
    jax.tree.map(partial(close, rtol=1e-4, atol=2e-5), (their_losses, their_outputs), (losses, outputs))
    if gradients:
        _, expected = gradient(case, "bert")(params, batch)
        jax.tree.map(partial(close, rtol=1e-3, atol=5e-5), grads, jax.device_get(expected))


# Values, compared with independent computations


def log_p(logits: Any) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    return logits - np.logaddexp.reduce(logits, -1, keepdims=True)


def loss_of_classes(task, record, outputs):
    x = outputs[0][0]["logits_BEN"].astype(np.float64)
    y = np.isin(task.labels, record["label"])
    p = 1 / (1 + np.exp(-x))
    return -np.where(y, np.log(p), np.log(1 - p)).mean()


def loss_of_question(task, record, outputs):
    """Return the sum over the windows. The character offsets define the first and the last token of the answer."""
    total = 0.0
    [units] = task.features([record], False)
    for [example], [found] in zip(units, outputs, strict=True):
        first = last = 0
        if record["label"]:
            text, start = record["label"][0]
            begins, ends = (example["offsets_BT"][:, side].tolist() for side in (0, 1))
            if start in begins and start + len(text) in ends:
                first, last = begins.index(start), ends.index(start + len(text))
        total -= (log_p(found["start_BT"])[first] + log_p(found["end_BT"])[last]) / 2
    return total


LOSSES = {
    "class": lambda task, r, out: -log_p(out[0][0]["logits_BEN"])[("no", "so", "yes").index(r["label"])],
    "classes": loss_of_classes,
    "number": lambda task, r, out: (out[0][0]["logits_BEN"][0] - r["label"]) ** 2,
    "pair": lambda task, r, out: -log_p(out[0][0]["logits_BEN"])[int(r["label"])],
    "answers": loss_of_question,
    "questions": loss_of_question,
    "cosine": lambda task, r, out: (out[0][0]["vector_BED"] @ out[0][1]["vector_BED"] - r["label"]) ** 2,
    "choice": lambda task, r, out: -log_p([option["logits_BE"] for option in out[0]])[r["label"]],
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses_equal_their_definitions(case):
    task, records = compile_case(case, "bert").task, random_records(case, LENGTHS)
    batches, found = evaluate_records(case, "bert", records)
    outputs = outputs_of(batches, found)
    expected = sum(LOSSES[case](task, record, units) for record, units in zip(records, outputs))
    close(found.losses["loss"], (expected, len(batches.lengths)), rtol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_logits_of_an_example_equal_those_of_a_direct_call(model):
    """The model pools the first token, the last token or the mean."""
    config, params = model_of(model, 3)
    lm = jaxlm.LM(config, Transformer(config), params)
    task, records = compile_case("class", model).task, random_records("class", LENGTHS)
    batches, found = evaluate_records("class", model, records)
    [[[example]]] = task.features(records[3:4], False)
    alone = jax.jit(lambda params, tokens: lm.apply(params, tokens).logits)(params, np.array([example["tokens_BT"]]))
    close(outputs_of(batches, found)[3][0][0]["logits_BEN"], alone[0], rtol=1e-4)


def test_the_loss_of_tags_is_over_the_first_token_of_each_word():
    """If the most likely tags are the labels, their confidence defines the loss."""
    task, records = compile_case("tagging", "bert").task, random_records("tagging", LENGTHS)
    batches, found = evaluate_records("tagging", "bert", records)
    predictions = task.predictions(records, batches, found.outputs)
    records = [record | {"label": row["prediction"]} for record, row in zip(records, predictions)]
    again, found = evaluate_records("tagging", "bert", records)
    expected = count = 0
    for n, outputs in enumerate(found.outputs):
        [example], [features] = outputs, again.examples.joined(np.array([n]), ["words_BT"]).split()
        firsts = features["words_BT"] >= 0
        expected -= np.log(example["confidence_BT"][firsts]).sum()
        count += firsts.sum()
    close(found.losses["loss"], (expected, count))
    assert count == sum(len(record["tokens"]) for record in records)


def test_the_negatives_of_a_pair_are_the_other_texts_of_the_batch():
    records = random_records("contrastive", LENGTHS[:6])
    batches, found = evaluate_records("contrastive", "bert", records)
    assert len(batches) == 1 < batches.rows_in_epoch
    a, b = (np.array([unit[side]["vector_BED"] for unit in found.outputs]) for side in (0, 1))
    expected = -np.diagonal(log_p(a @ b.T / 0.2)).sum()
    close(found.losses["loss"], (expected, len(records)), rtol=1e-5)
    close(np.linalg.norm(a, axis=-1), np.ones(len(a)))


def test_a_task_is_immutable():
    task = task_of("class")
    with pytest.raises(AttributeError, match=r"set pooling in `__init__`, or return self.replace_fields\(pooling"):
        task.pooling = Pooling(("max",))
    assert task.replace_fields(pooling=Pooling(("max",))).pooling.modes == ("max",) != task.pooling.modes


def test_balanced_weights_and_smoothing_apply_to_training_alone():
    task = task_of("class", class_weights="balanced", label_smoothing=0.3)
    records = records_of("class", [{"text": "a", "label": label} for label in ("no", "no", "no", "so", "yes", "yes")])
    part = Records(records, [])
    task = task.bind(MODELS["bert"], part=part)
    features = [task.examples(part, training).epoch(0).features(np.arange(6)).features for training in (True, False)]
    # The formula of scikit-learn is rows / (classes x rows of the class).
    close(features[0]["weights_BE"], [2 / 3] * 3 + [2] + [1] * 2)
    close(features[1]["weights_BE"], [1] * 6)
    logits = np.random.default_rng(0).standard_normal((1, 6, 3)).astype(np.float32)
    batch = Batches(task.examples(part, True), 1, T, 6, None).batch_at(0)
    labels, weights = batch["labels_BE"][0], batch["weights_BE"][0]
    p = log_p(logits[0])
    plain = -p[np.arange(6), labels]
    smooth = 0.7 * plain - 0.3 * p.mean(-1)
    for training, expected in ((True, smooth), (False, plain)):
        loss = jax.jit(lambda logits, batch, training=training: task.loss(logits, batch, training))(logits, batch)
        close(loss, ((expected * weights).sum(), weights.sum()))


def test_balanced_weights_of_several_labels_equal_those_of_torch():
    torch = pytest.importorskip("torch")
    task = task_of("classes", class_weights="balanced")
    found = [["a"], ["a"], ["a", "b"], [], ["c"], ["a", "c"]]
    records = records_of("classes", [{"text": "a", "label": names} for names in found])
    part = Records(records, [])
    task = task.bind(MODELS["bert"], part=part)
    batch = Batches(task.examples(part, True), 1, T, 6, None).batch_at(0)
    logits = np.random.default_rng(0).standard_normal((1, 6, 3)).astype(np.float32)
    for training, weights in ((True, [2 / 4, 5 / 1, 4 / 2]), (False, [1, 1, 1])):
        loss = jax.jit(lambda logits, batch, training=training: task.loss(logits, batch, training))(logits, batch)
        theirs = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weights), reduction="sum")
        labels = torch.tensor(batch["labels_BEN"][0])
        close(loss, (theirs(torch.tensor(logits[0]), labels).item() / 3, 6), rtol=1e-5)


# Questions


ANY_TEXT = st.text(st.sampled_from("abc xyz éß日本語 ,.-\u200b👩\u0301\t"), max_size=60)
KINDS = st.sampled_from(["wordpiece", "byte_bpe"])


def question_task(kind: str, length: int, **choices: Any) -> RecordTask:
    config = QuestionAnswering(**choices)
    return TASKS[QuestionAnswering](config, length, 0, tokenizer(kind), ("LABEL_0", "LABEL_1"))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_windows_cover_the_text_and_label_the_answer(data):
    kind, context, question = data.draw(KINDS), data.draw(ANY_TEXT), data.draw(ANY_TEXT)
    stride, max_question, length = (
        data.draw(st.integers(0, 6)),
        data.draw(st.integers(1, 5)),
        data.draw(st.integers(15, 40)),
    )
    a = data.draw(st.integers(0, len(context)))
    b = data.draw(st.integers(a, len(context)))
    task = question_task(kind, length, stride=stride, max_question_tokens=max_question)
    record = {"context": context, "question": question, "title": "", "label": [(context[a:b], a)]}
    [units] = task.features([record], True)
    [(ids, offsets)] = task.tokenizer.encode_offsets([context])
    question_ids = task.tokenizer.encode(question)[:max_question]
    answer_tokens = [t for t, (start, end) in enumerate(offsets) if start < b and a < end]
    covered, windows_with_answer = [], 0
    for n, [example] in enumerate(units):
        tokens, spans = example["tokens_BT"].tolist(), example["offsets_BT"].tolist()
        assert 0 < len(tokens) == len(spans) == len(example["types_BT"]) <= length
        positions = [t for t, span in enumerate(spans) if span[0] >= 0]
        assert positions == list(range(positions[0], positions[0] + len(positions))) if positions else not ids
        window_ids = [tokens[t] for t in positions]
        before = tokens[: positions[0]] if positions else tokens
        if kind == "wordpiece":
            cls, sep = task.tokenizer.cls, task.tokenizer.sep
            assert before[: len(question_ids) + 2] == [cls, *question_ids, sep]
        elif question_ids or positions:
            assert before == question_ids
        first = len(covered) - (stride if n else 0)  # index of the first token of this window in the text
        assert first >= 0
        assert window_ids == ids[first : first + len(window_ids)]
        assert [spans[t] for t in positions] == [list(span) for span in offsets[first : first + len(window_ids)]]
        covered = covered[:first] + window_ids
        if answer_tokens and first <= answer_tokens[0] and answer_tokens[-1] < first + len(window_ids):
            windows_with_answer += 1
            expected = [positions[0] + answer_tokens[0] - first, positions[0] + answer_tokens[-1] - first]
            assert context[spans[expected[0]][0] : spans[expected[1]][1]].strip() or not context[a:b].strip()
        else:
            expected = [0, 0]
        assert example["labels_BEN"].tolist() == expected
    assert covered == ids
    if 0 < len(answer_tokens) <= stride + 1:
        assert windows_with_answer


def test_labels_decode_to_the_answer():
    random, task = np.random.default_rng(3), question_task("wordpiece", 20, stride=6, max_question_tokens=4)
    found = 0
    for record in records_of("answers", [question_row(random, 6, answer_rate=1) for _ in range(50)]):
        [units] = task.features([record], True)
        for [example] in units:
            first, last = example["labels_BEN"]
            if last:
                found += 1
                assert task.tokenizer.decode(example["tokens_BT"][first : last + 1]) == record["label"][0][0].lower()
    assert found >= 50


def test_an_answer_may_begin_and_end_with_a_space():
    task = question_task("wordpiece", 20, stride=4, max_question_tokens=4)
    record = {"context": "the quick dog jumps", "question": "a", "label": [(" quick dog ", 3)]}
    [[[example]]] = task.features([record], True)
    first, last = example["labels_BEN"]
    assert task.tokenizer.decode(example["tokens_BT"][first : last + 1]) == "quick dog"


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 1 << 30),
    st.integers(0, 9),
    st.integers(1, 12),
    st.booleans(),
    st.sampled_from([0.0, 1.0, 4.0]),
)
def test_the_predicted_answer_is_the_best_of_all_spans(seed, n, longest, unanswerable, null_logit):
    """Windows have at most 20 tokens, so that the lists of the most likely starts and ends contain all tokens."""
    random = np.random.default_rng(seed)
    task = question_task(
        "wordpiece", 20, stride=4, max_question_tokens=4, max_answer_tokens=longest, unanswerable=unanswerable
    )
    [record] = records_of("questions", [question_row(random, n)])
    [units] = task.features([record], False)
    outputs, spans, null_scores = [], [], []
    for [example] in units:
        start, end = random.standard_normal((2, len(example["tokens_BT"]))).astype(np.float32)
        start[0] += null_logit
        outputs.append([{"start_BT": start, "end_BT": end, "offsets_BT": example["offsets_BT"]}])
        null_scores.append(float(start[0] + end[0]))
        inside = [t for t, (a, _) in enumerate(example["offsets_BT"]) if a >= 0]
        for s in inside:
            for e in inside:
                if s <= e < s + longest:
                    text = record["context"][example["offsets_BT"][s, 0] : example["offsets_BT"][e, 1]]
                    spans.append((float(start[s] + end[e]), text))
    best, text = max(spans)
    prediction = task.predict(record, outputs)
    assert prediction["_answer"] == text
    assert prediction["_margin"] == pytest.approx(best - min(null_scores), abs=1e-5)
    assert prediction["prediction"] == ("" if unanswerable and best <= min(null_scores) else text)
    assert 0 < prediction["confidence"] <= 1


# Tags


PRINTABLE = st.characters(blacklist_categories=("Cs", "Zs", "Zl", "Zp", "Cc"))
ANY_WORD = st.text(PRINTABLE, min_size=1, max_size=8)
WORD = st.one_of(
    st.sampled_from([*WORDS, "<pad>", "[SEP]", "\u200b", "can't", "日本", "U.S.", "\ufeff", "e\u0301"]), ANY_WORD
)


def tagging_task(kind: str, length: int) -> RecordTask:
    return TASKS[Tagging](Tagging(), length, 0, tokenizer(kind), ("O", "B-A", "I-A"))


def firsts_of(task: RecordTask, tokens: list[str]) -> list[tuple[int, int]]:
    """Return (word, first token of the word) in the order of the examples."""
    [units] = task.features([{"tokens": tokens}], False)
    pairs = []
    for [example] in units:
        here = example["words_BT"] >= 0
        assert (example["weights_BT"] == here).all()
        pairs += zip(example["words_BT"][here].tolist(), example["tokens_BT"][here].tolist())
    return pairs


@settings(deadline=None, max_examples=200)
@given(st.lists(WORD, max_size=20), st.integers(3, 30))
def test_the_first_token_of_each_word_equals_that_of_tokenizers(tokens, length):
    """Each word occurs once, whether the sentence fits one row or is cut into several rows."""
    task = tagging_task("wordpiece", length)
    divided = task.tokenizer.backend.encode(tokens, is_pretokenized=True, add_special_tokens=False)
    expected, before = [], None
    for word, token in zip(divided.word_ids, divided.ids):
        if word != before:
            expected.append((word, token))
        before = word
    assert firsts_of(task, tokens) == expected


@settings(deadline=None, max_examples=100)
@with_example(["<pad>"], 3, "byte_bpe")
@with_example(["the", "<pad>", "dog"], 30, "byte_bpe")
@with_example(["<pad>", "<pad>"], 30, "bpe")
@given(st.lists(WORD, max_size=20), st.integers(3, 30), st.sampled_from(["byte_bpe", "bpe"]))
def test_a_word_of_running_text_begins_at_its_first_token(tokens, length, kind):
    """In BPE, with or without bytes, the space before a word is part of the first token of the word."""
    task = tagging_task(kind, length)
    backend = task.tokenizer
    whole = backend.encode(" ".join(tokens))
    [units] = task.features([{"tokens": tokens}], False)
    ids = np.concatenate([example["tokens_BT"] for [example] in units])
    places = np.concatenate([example["words_BT"] for [example] in units])
    if not tokens:
        assert places.tolist() == [-1]
        return
    assert ids.tolist() == whole
    at = np.flatnonzero(places >= 0)
    assert places[at].tolist() == list(range(len(tokens)))
    for word, start, end in zip(tokens, at, [*at[1:], len(ids)]):
        # A word may be a special token, which `Tokenizer.decode` would skip.
        decoded = backend.backend.decode(ids[start:end].tolist(), skip_special_tokens=False)
        assert decoded.removeprefix(" ") == word


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=40), st.integers(3, 20), KINDS)
def test_long_sentences_are_cut_between_words(tokens, length, kind):
    task = tagging_task(kind, length)
    [units] = task.features([{"tokens": tokens}], False)
    room = task.tokenizer.max_text_tokens(length, pair=False)
    tags = [str(tag) for tag in np.random.default_rng(len(tokens)).choice(["O", "B-A", "I-A"], len(tokens))]
    outputs = []
    for [example] in units:
        assert len(example["tokens_BT"]) <= length
        words = example["words_BT"]
        tag_ids = [("O", "B-A", "I-A").index(tags[word]) if word >= 0 else 1 for word in words]
        outputs.append([{"words_BT": words, "tags_BT": np.array(tag_ids), "confidence_BT": np.full(len(words), 0.5)}])
    prediction = task.predict({"tokens": tokens}, outputs)
    assert (prediction["prediction"], prediction["confidence"], prediction["words"]) == (tags, 0.5, tokens)
    for entity in prediction["entities"]:
        assert " ".join(tokens)[entity["start"] : entity["end"]] == entity["text"] and entity["score"] == 0.5
    words = [word for [example] in units for word in example["words_BT"].tolist() if word >= 0]
    assert words == list(range(len(tokens)))
    sizes = [len(task.tokenizer.encode(word if n == 0 else f" {word}")) for n, word in enumerate(tokens)]
    if max(sizes) <= room:  # otherwise a word itself is cut
        special = 1 if kind == "wordpiece" else 0
        for [example] in units:
            assert example["words_BT"][special] >= 0
        for [before], [after] in zip(units, units[1:]):  # no row is cut earlier than necessary
            assert len(before["tokens_BT"]) - 2 * special + sizes[after["words_BT"][special]] > room


SCHEMES = {
    "IOB1": ["I-A", "I-A", "B-A", "O", "I-B"],
    "IOB2": ["B-A", "I-A", "B-A", "O", "B-B"],
    "IOBES": ["B-A", "E-A", "S-A", "O", "S-B"],
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_tagging_schemes_become_iob2(scheme):
    task = Tagging(scheme=scheme)
    kind = TASKS[Tagging]
    row = {"tokens": ["the", "quick", "brown", "fox", "jumps"], "tags": SCHEMES[scheme]}
    record = kind.read(task, row, Place("rows", 1))
    assert record["label"] == SCHEMES["IOB2"]
    names = kind.names(task, Records([record], [Place("rows", 1)]))
    assert names == ("O", "B-A", "I-A", "B-B", "I-B")
    record_task = kind(task, T, 0, tokenizer("wordpiece"), names)
    [[[example]]] = record_task.features([record], True)
    assert [names[label] for label in example["labels_BT"][example["weights_BT"] > 0]] == SCHEMES["IOB2"]
    assert "A 2" in record_task.describe_labels(Records([record], []))
    other = {"IOB1": "S-A", "IOB2": "E-A", "IOBES": "X-A"}[scheme]
    with pytest.raises(UserError, match=rf"rows:7: .*{other}"):
        kind.read(task, row | {"tags": [other] * 5}, Place("rows", 7))


# Choices


@pytest.mark.parametrize(
    ("label", "first"), [(2, 0), ("2", 0), (3, 1), ("3", 1), ("C", 0), ("c", 1), ("blue", 0), (2.0, 0)], ids=str
)
def test_the_correct_option_may_be_an_index_a_letter_or_a_text(label, first):
    row = {"question": "which", "options": ["red", "green", "blue"], "label": label}
    task = MultipleChoice(first=first)
    kind = TASKS[MultipleChoice]
    record = kind.read(task, row, Place("rows", 1))
    assert record["label"] == 2
    record_task = kind(task, T, 0, tokenizer("wordpiece"), ("score",))
    [[examples]] = record_task.features([record], True)
    assert [example["labels_BE"] for example in examples] == [0, 0, 1]
    outputs = [[{"logits_BE": np.float32(x)} for x in (0.1, 2.0, 0.3)]]
    prediction = record_task.predict(record, outputs)
    assert (prediction["prediction"], prediction["option"]) == (1 + first, "green")
    assert prediction["confidence"] == pytest.approx(float(np.exp(log_p([0.1, 2.0, 0.3])[1])))
    assert record_task.score([record] * 2, [prediction, prediction | {"_index": 2}]) == {"accuracy": 0.5}
    for wrong in (3 + first, -1, "D", "yellow", "", 1.5):
        if wrong == "":
            assert "label" not in kind.read(task, row | {"label": wrong}, Place("rows", 1))
            continue
        with pytest.raises(UserError, match=r"rows:1: .*none of 3 options"):
            kind.read(task, row | {"label": wrong}, Place("rows", 1))


# Hard cases


HARD = (
    "",
    " ",
    "\u200b",
    "é" * 30,
    "日本語テキスト",
    "👩‍👩‍👧 👍🏽",
    "x" * 300,
    "[CLS] [SEP]",
    "a\u0000b",
    "\ufeff",
    "dog " * 90,
)


def hard_row(case: str, text: str, other: str) -> dict[str, Any]:
    if case in ("tagging", "crf"):
        return {"tokens": [*text.split(" "), other], "tags": ["B-A", *["I-A"] * len(text.split(" "))]}
    if case in ("answers", "questions"):
        text = text if text.strip() or case == "questions" else "x"
        has_answer = case == "answers" or (text.strip() and len(text) % 2)
        answers = {"text": [text], "answer_start": [0]} if has_answer else {"text": [], "answer_start": []}
        return {"context": text, "question": other, "answers": answers}
    if case == "choice":
        return {"question": text, "options": [other, text, ""], "label": 2}
    labels = {"class": "so", "classes": [], "number": -3, "pair": "1"}
    return {"text": text, "a": text, "b": other, "text_a": text, "text_b": other, "label": labels.get(case, 0)}


def unusual_records(case: str, kind: str) -> list[Any]:
    if kind == "hard":
        return records_of(case, [hard_row(case, text, HARD[i - 3]) for i, text in enumerate(HARD)])
    if kind == "identical":
        return random_records(case, [4]) * 9
    return random_records(case, [4]) if kind == "one" else []


@pytest.mark.parametrize("kind", ["hard", "identical", "one", "none"])
@pytest.mark.parametrize(
    ("case", "model"), [*((case, "bert") for case in CASES), ("class", "gpt2"), ("questions", "gpt2")]
)
def test_unusual_examples_are_predicted_and_scored(case, model, kind):
    """The examples include texts without tokens, texts longer than a row, ties, and scores of a single class."""
    records = unusual_records(case, kind)
    task, _, params, _ = compile_case(case, model)
    batches, found = evaluate_records(case, model, records)
    predictions = task.predictions(records, batches, found.outputs)
    assert len(predictions) == len(records)
    scores = task.score(records, predictions)
    assert set(task.scores) <= scores.keys()
    assert all(math.isfinite(value) for value in (*scores.values(), *found.losses.get("loss", ())))
    assert all(
        0 <= scores[name] <= 1 or name in ("spearman", "pearson", "matthews") for name in scores if name != "mse"
    )
    if records:
        task.sections(Records(records, []), predictions)
        task.describe_labels(Records(records, []))
    if kind == "identical":
        answers = [row["prediction"] for row in predictions]
        assert answers == (
            [pytest.approx(answers[0], abs=1e-5)] if isinstance(answers[0], float) else answers[:1]
        ) * len(answers)
    if kind == "hard" and model == "bert":
        _, grads = gradient(case, model)(params, batches.batch_at(0))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("mode", ["max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens", "cls"])
def test_every_pooling_has_finite_gradients(mode):
    """Empty positions do not break the maximum either."""
    _, module, params, _ = compile_case("cosine", "bert")
    task = task_of("cosine").replace_fields(pooling=Pooling((mode,)))
    batch = batches_of(task, random_records("cosine", LENGTHS)).batch_at(0)
    loss = lambda params: task.losses(module, params, batch, jax.random.key(0))[0]["loss"][0]
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_two_hundred_classes_are_predicted_and_reported():
    names = tuple(f"{i:03d}" for i in range(200))
    config, params = model_of("bert", 200)
    task = TASKS[Classification](Classification(), T, 0, tokenizer("wordpiece"), names)
    records = records_of("class", [{"text": words(np.random.default_rng(i), 3), "label": names[i]} for i in range(200)])
    batches = batches_of(task, records)
    found = run_eval(jax.jit(make_eval_step(task, Transformer(config))), params, batches, split_batch)
    predictions = task.predictions(records, batches, found.outputs)
    logits = [unit[0][0]["logits_BEN"] for unit in outputs_of(batches, found)]
    assert [row["prediction"] for row in predictions] == [names[x.argmax()] for x in logits]
    close(found.means["loss"], -np.mean([log_p(x)[i] for i, x in enumerate(logits)]), rtol=1e-5)
    assert len(task.sections(Records(records, []), predictions)) == 3
    assert "and 188 more" in task.describe_labels(Records(records, []))


def test_the_first_of_equal_scores_is_predicted():
    flat = lambda n: [[{"logits_BEN": np.zeros(n, np.float32)}]]
    prediction = task_of("class").predict({}, flat(3))
    assert (prediction["prediction"], prediction["confidence"]) == ("no", pytest.approx(1 / 3))
    prediction = task_of("classes").predict({}, flat(3))
    assert (prediction["prediction"], prediction["confidence"]) == ([], 0.5)
    options = {"options": ["red", "green"], "question": ""}
    assert task_of("choice").predict(options, [[{"logits_BE": np.float32(0)}] * 2])["option"] == "red"
    task = task_of("answers")
    record = {"context": "the dog", "question": "a"}
    [[[example]]] = task.features([record], False)
    zeros = np.zeros(len(example["tokens_BT"]), np.float32)
    found = [[{"start_BT": zeros, "end_BT": zeros, "offsets_BT": example["offsets_BT"]}]]
    assert task.predict(record, found)["prediction"] == "the"


def test_missing_labels_are_omitted_and_too_few_classes_raise_an_error():
    kind, place = TASKS[Classification], Place("rows", 1)
    many = Classification(problem="multi_label")
    assert kind.read(many, {"text": "a", "label": "x, ,y"}, place)["label"] == ("x", "y")
    assert kind.read(many, {"text": "a", "label": ","}, place)["label"] == ()
    for task, missing in (
        (many, None),
        (many, ""),
        (Classification(), " "),
        (Classification(problem="regression"), ""),
    ):
        assert "label" not in kind.read(task, {"text": "a", "label": missing}, place)
    for task, rows in ((many, [{"text": "a", "label": []}]), (Classification(), [{"text": "a", "label": "x"}] * 2)):
        part = Records([kind.read(task, row, place) for row in rows], [place] * len(rows))
        with pytest.raises(UserError, match="label"):
            kind.names(task, part)


# Runs, from files to scores


class Toy(NamedTuple):
    """A task that can be learned in a few steps, because the labels depend on single words."""

    task: Any
    row: Callable[[np.random.Generator], dict[str, Any]]
    floor: float  # minimum score of the best checkpoint
    chance: float  # maximum score of a guess
    steps: int = 40


PAIRS = dict(
    zip(("dog", "fox", "bird", "cow", "cat", "fish"), ("chien", "renard", "oiseau", "vache", "chat", "poisson"))
)
COMMON = tuple(word for word in WORDS if word not in ("London", "Anna", "dog", "fox"))


def random_text(random: np.random.Generator, *required: str, limit: int = 6) -> str:
    """Return 1 to `limit` - 1 random words, with the required words inserted in this order."""
    found = [str(word) for word in random.choice(COMMON, int(random.integers(1, limit)))]
    for n, word in enumerate(required):
        found.insert(len(found) // (n + 1), word)
    return " ".join(found)


def toy_class(random):
    good = random.random() < 0.5
    return {"text": random_text(random, "good" if good else "bad"), "label": "pos" if good else "neg"}


def toy_classes(random):
    labels = [name for name in ("red", "blue") if random.random() < 0.5]
    return {"text": random_text(random, *labels), "label": labels}


def toy_number(random):
    n = int(random.integers(3))
    return {"text": random_text(random, ("none", "one", "two")[n]), "label": n - 1}


def toy_pair(random):
    good = int(random.integers(2))
    return {"a": random_text(random), "b": random_text(random, ("bad", "good")[good]), "label": good}


def toy_tags(random):
    tokens = random_text(random, *(word for word in ("London", "Anna") if random.random() < 0.7), limit=30).split()
    return {"tokens": tokens, "tags": [{"London": "B-LOC", "Anna": "B-PER"}.get(token, "O") for token in tokens]}


def toy_question(random):
    has_answer = random.random() < 0.6
    context = random_text(random, *["London"] * has_answer, limit=40)
    answers = {"text": ["London"], "answer_start": [context.index("London")]} if has_answer else {}
    return {"context": context, "question": "who", "answers": answers or {"text": [], "answer_start": []}}


def toy_similar(random):
    a, b = random.choice(list(PAIRS), 2)
    b = a if random.random() < 0.5 else b
    return {"text_a": str(a), "text_b": PAIRS[b], "label": float(a == b)}


def toy_positive_pair(random):
    a = str(random.choice(list(PAIRS)))
    return {"text_a": a, "text_b": PAIRS[a]}


def toy_choice(random):
    correct, n = int(random.integers(2)), int(random.integers(2, 4))
    options = [random_text(random, "good" if i == correct else "bad", limit=3) for i in range(n)]
    return {"question": random_text(random, limit=3), "options": options, "label": correct}


TOYS = {
    "class": Toy(Classification(), toy_class, 0.9, 0.6, steps=60),
    "classes": Toy(Classification(problem="multi_label"), toy_classes, 0.9, 0.8, steps=60),
    "number": Toy(Classification(problem="regression"), toy_number, 0.7, 0.3, steps=60),
    "pair": Toy(Classification(text=("a", "b")), toy_pair, 0.9, 0.6, steps=60),
    "tagging": Toy(Tagging(), toy_tags, 0.9, 0.1),
    "questions": Toy(QuestionAnswering(stride=6, max_question_tokens=4), toy_question, 0.9, 0.6),
    "cosine": Toy(Similarity(), toy_similar, 0.6, 0.3, steps=60),
    "contrastive": Toy(Similarity(objective="contrastive"), toy_positive_pair, 0.9, 0.5),
    "choice": Toy(MultipleChoice(), toy_choice, 0.9, 0.6),
}
TOY_SIZES = {"initial_std": 0.1, "vocabulary": 70, "width": 32, "mlp_width": 64, "max_length": 48, "heads_on_top": ()}
TOY_NAMES = [pytest.param(n, marks=() if n == "class" else pytest.mark.long) for n in TOYS]


def toy_run(name: str, data: Path, workdir: Path) -> RunConfig:
    toy = TOYS[name]
    return RunConfig(
        model=replace(PRESETS["bert-base"], **SMALL | TOY_SIZES),
        task=toy.task,
        data=DataConfig(path=str(data / f"{name}.train.jsonl"), eval_path=str(data / f"{name}.eval.jsonl"), length=32),
        tokenizer=TokenizerConfig(train="wordpiece", lowercase=True),
        optimizer=OptimizerConfig(rate=1e-2, beta2=0.99),
        batch=8,
        accumulate=2 if name == "tagging" else 1,
        steps=toy.steps,
        eval_every=10,
        patience=2 if name == "class" else 0,
        seed=1,
        workdir=str(workdir),
    )


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """Use one device, an empty cache and empty reports, so that runs are fast."""
    from jaxlm.reports import report

    with pytest.MonkeyPatch.context() as patch:
        make_mesh = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda config, some=None: make_mesh(config, some or jax.devices()[:1]))
        patch.setattr(report, "write", lambda folder, *_: (folder / "report.html").touch())
        patch.setenv("JAXLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    """Return a folder with the data of all toys."""
    folder = tmp_path_factory.mktemp("toys")
    for name, toy in TOYS.items():
        random = np.random.default_rng(0)
        for part, count in (("train", 150), ("eval", 40)):
            rows = [json.dumps(toy.row(random)) for _ in range(count)]
            (folder / f"{name}.{part}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def train_toy(one_device, toys, tmp_path_factory) -> Callable[[str], RunConfig]:
    """Return a function that trains a toy once and returns its run."""

    @lru_cache
    def train(name: str) -> RunConfig:
        run = toy_run(name, toys, tmp_path_factory.mktemp("trained") / name)
        fit(run)
        return run

    return train


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def log_of(run: RunConfig) -> list[dict[str, float]]:
    """Return the log without the values that depend on the clock and the machine."""
    rows = [json.loads(line) for line in (Path(run.workdir) / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if name not in MEASURED} for row in rows]


def score_of(name: str, rows: list[dict[str, Any]], predictions: list[Any]) -> dict[str, float]:
    """Return scores that depend on the predictions alone."""
    if name == "tagging":
        return metrics.span_scores([row["tags"] for row in rows], predictions, "IOB2")[0]
    if name == "questions":
        return metrics.squad_scores([row["answers"]["text"] for row in rows], predictions)
    if name in ("number", "cosine"):
        return metrics.regression_scores([row["label"] for row in rows], predictions)
    same = lambda a, b: set(a) == set(b) if name == "classes" else str(a) == str(b)
    return {"accuracy": np.mean([same(row.get("label"), x) for row, x in zip(rows, predictions)])}


@pytest.mark.parametrize("name", TOY_NAMES)
def test_a_toy_is_learned_and_its_export_predicts_the_same(train_toy, name):
    run = train_toy(name)
    toy, folder = TOYS[name], Path(run.workdir)
    scores = read_json(folder / "scores.json")
    task = TASKS[type(run.task)](run.task, 32, 0, tokenizer("wordpiece"), ("a", "b"))
    assert scores[task.best] >= toy.floor > toy.chance, scores
    history = [row[f"eval/{task.best}"] for row in log_of(run) if f"eval/{task.best}" in row]
    assert scores[task.best] == max(history)

    lm = jaxlm.load(folder)
    rows = list(source.rows(run.data.eval_path, run.data, ""))
    again = jaxlm.evaluate(lm, rows, run.task, length=32, batch=run.batch // run.accumulate)
    assert again.pop("examples") == 40
    scores.pop("step")
    assert again == pytest.approx(scores, abs=1e-4)

    predictions = jaxlm.predict(lm, [row for _, row in rows], task=run.task, length=32)
    [alone] = jaxlm.predict(lm, [rows[7][1] | {"label": None, "tags": None, "answers": None}], task=run.task)
    if isinstance(alone["prediction"], float):
        assert alone["prediction"] == pytest.approx(predictions[7]["prediction"], abs=1e-4)
    else:
        assert alone["prediction"] == predictions[7]["prediction"]
    if name != "contrastive":
        found = score_of(name, [row for _, row in rows], [row["prediction"] for row in predictions])
        assert all(again[key] == pytest.approx(value, abs=1e-4) for key, value in found.items())
    else:
        a, b = (jaxlm.encode(lm, [row[side] for _, row in rows], normalize=True) for side in ("text_a", "text_b"))
        np.testing.assert_allclose([row["prediction"] for row in predictions], (a * b).sum(-1), atol=1e-4)


@pytest.mark.parametrize("name", TOY_NAMES)
def test_predict_and_evaluate_run_from_the_command_line(train_toy, name, tmp_path, capsys, monkeypatch):
    run = train_toy(name)
    monkeypatch.setattr("jaxlm.verbs.machine.configure_process", lambda: None)
    assert main(["evaluate", run.workdir, run.data.eval_path, "--batch", str(run.batch // run.accumulate)]) == 0
    output = {" ".join(line.split()[:-1]): line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    scores = read_json(Path(run.workdir) / "scores.json")
    assert output.pop("examples") == "40"
    assert output == {key.replace("_", " "): f"{value:.4f}" for key, value in scores.items() if key != "step"}
    assert main(["predict", run.workdir, run.data.eval_path, "--output", str(tmp_path / "predictions.jsonl")]) == 0
    written = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    rows = [row for _, row in source.rows(run.data.eval_path, run.data, "")]
    predictions = jaxlm.predict(jaxlm.load(run.workdir), rows, task=run.task, length=32)
    assert [row | {"prediction": x["prediction"]} for row, x in zip(rows, predictions, strict=True)] == [
        {key: row[key] for key in (*rows[0], "prediction")} for row in written
    ]


@pytest.mark.parametrize("name", TOY_NAMES)
def test_predictions_do_not_depend_on_labels(train_toy, name):
    run = train_toy(name)
    lm = jaxlm.load(run.workdir)
    rows = [row for _, row in source.rows(run.data.eval_path, run.data, "")][:3]
    unknown = [row | {"label": "unknown", "tags": "unknown", "answers": "unknown"} for row in rows]
    predictions = jaxlm.predict(lm, unknown, task=run.task, length=32)
    assert predictions == jaxlm.predict(lm, rows, task=run.task, length=32)
    if name in ("class", "classes", "number", "tagging"):  # the export contains the task of these
        assert jaxlm.predict(lm, rows, length=32) == predictions
    if name == "class":
        with pytest.raises(UserError, match=r"example:2: the label 'unknown'.*leave the row out"):
            jaxlm.evaluate(lm, [rows[0], unknown[1]], run.task)
        assert jaxlm.predict(lm, [row["text"] for row in rows]) == jaxlm.predict(lm, rows)
    if name == "tagging":
        text_predictions = jaxlm.predict(lm, ["Anna jumps over London"])
        assert text_predictions[0]["prediction"] == ["B-PER", "O", "O", "B-LOC"]
    if name == "questions":
        pairs = [("who", "the lazy London sleeps"), ("who", "the lazy")]
        task = replace(run.task, stride=4)
        rows = [{"question": question, "context": context} for question, context in pairs]
        assert [row["prediction"] for row in jaxlm.predict(lm, rows, task=task)] == ["London", ""]


@pytest.mark.long
def test_a_resumed_run_equals_an_uninterrupted_run(train_toy, toys, tmp_path):
    """The runs have the same best checkpoint, the same early stop and the same scores."""
    uninterrupted, run = train_toy("class"), toy_run("class", toys, tmp_path / "run")
    for steps in (13, 4):
        left = iter(range(steps - 1))
        with pytest.raises(Stopped):
            fit(run, stop=lambda left=left: next(left, None) is None)
    fit(run)
    assert log_of(run)[-1]["step"] < run.steps  # early stopping ended the run
    assert log_of(run) == log_of(uninterrupted)
    for file in ("scores.json", "export/config.json", "export/model.safetensors", "export/tokenizer.json"):
        assert (Path(run.workdir) / file).read_bytes() == (Path(uninterrupted.workdir) / file).read_bytes(), file


# Parity with transformers


CLASSES = {"problem_type": "single_label_classification", "num_labels": 3}
THEIRS = {  # the class of transformers for a case, and the fields of its config
    "class": ("ForSequenceClassification", CLASSES),
    "classes": ("ForSequenceClassification", CLASSES | {"problem_type": "multi_label_classification"}),
    "number": ("ForSequenceClassification", {"problem_type": "regression", "num_labels": 1}),
    "pair": ("ForSequenceClassification", CLASSES),
    "tagging": ("ForTokenClassification", {"num_labels": 3}),
    "questions": ("ForQuestionAnswering", {}),
    "choice": ("ForMultipleChoice", {}),
}


def their_inputs(examples: list[Any]) -> Any:
    """Return the examples as rows of one batch, padded to the longest example."""
    import torch

    longest = max(len(example["tokens_BT"]) for example in examples)
    rows = np.zeros((3, len(examples), longest), np.int64)
    for n, example in enumerate(examples):
        size = len(example["tokens_BT"])
        rows[:, n, :size] = example["tokens_BT"], np.ones(size), example["types_BT"]
    return dict(zip(("input_ids", "attention_mask", "token_type_ids"), torch.tensor(rows)))


def their_loss(model: Any, case: str, examples: list[Any]) -> float:
    """Return the loss of one unit. The loss of tags is the sum over the labelled words."""
    import torch

    [first, *_] = examples
    inputs = their_inputs(examples)
    if case == "choice":
        right = int(np.argmax([example["labels_BE"] for example in examples]))
        return float(model(**{name: x[None] for name, x in inputs.items()}, labels=torch.tensor([right])).loss)
    if case in ("tagging", "crf"):
        weights = first["weights_BT"] > 0
        if not weights.any():
            return 0.0
        labels = torch.tensor(np.where(weights, first["labels_BT"], -100)[None].astype(np.int64))
        return float(model(**inputs, labels=labels).loss) * weights.sum()
    if case == "questions":
        start, end = (torch.tensor([int(place)]) for place in first["labels_BEN"])
        return float(model(**inputs, start_positions=start, end_positions=end).loss)
    labels = torch.tensor(first.get("labels_BE", first.get("labels_BEN")))[None]
    labels = labels.long() if case in ("class", "pair") else labels
    return float(model(**inputs, labels=labels).loss)


@pytest.mark.parity
@pytest.mark.parametrize("case", THEIRS)
def test_losses_equal_those_of_transformers(case, tmp_path):
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    head, fields = THEIRS[case]
    sizes = {"vocab_size": V, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 20, "max_position_embeddings": 32}
    torch.manual_seed(0)
    model = getattr(transformers, f"Bert{head}")(transformers.BertConfig(**sizes, **fields)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(tmp_path)
    lm = jaxlm.load(tmp_path, head=task_of(case).head)
    task, records = task_of(case), random_records(case, LENGTHS)
    batches = batches_of(task, records)
    found = run_eval(jax.jit(make_eval_step(task, lm.module)), lm.params, batches, split_batch)
    with torch.no_grad():
        expected = sum(their_loss(model, case, unit) for units in task.features(records, False) for unit in units)
    assert found.losses["loss"][0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["class", "classes", "number", "tagging", "questions", "choice"])
def test_an_export_predicts_the_same_in_transformers(train_toy, name):
    torch, transformers = (pytest.importorskip(package) for package in ("torch", "transformers"))
    run = train_toy(name)
    export, head = Path(run.workdir) / "export", THEIRS[name][0]
    model, report = getattr(transformers, f"AutoModel{head}").from_pretrained(export, output_loading_info=True)
    assert not any(report.values()), report
    lm, their_tokenizer = jaxlm.load(run.workdir), transformers.AutoTokenizer.from_pretrained(export)
    if name in ("class", "classes", "tagging"):
        assert tuple(model.config.id2label[i] for i in range(len(lm.config.labels))) == lm.config.labels
    if name in ("class", "classes", "number"):
        assert model.config.problem_type == THEIRS[name][1]["problem_type"]
    rows = [row for _, row in source.rows(run.data.eval_path, run.data, "")][:10]
    for row, prediction in zip(rows, jaxlm.predict(lm, rows, task=run.task, length=32), strict=True):
        n = len(row["options"]) if name == "choice" else 1
        texts = {"questions": ("question", "context"), "choice": ("question", "options")}.get(name, ("text",))
        texts_of_row = [row["tokens"]] if name == "tagging" else [row[key] for key in texts]
        texts_of_row = [[texts_of_row[0]] * n, texts_of_row[1]] if name == "choice" else texts_of_row
        options = {"truncation": True, "max_length": 32 // n}
        options = {"tagging": {"is_split_into_words": True}, "questions": {}}.get(name, options)
        inputs = their_tokenizer(*texts_of_row, return_tensors="pt", padding=True, **options)
        if len(inputs["input_ids"][0]) > 32 // n:  # jaxlm divides this text into windows
            continue
        inputs = {key: x[None] for key, x in inputs.items()} if name == "choice" else inputs
        with torch.no_grad():
            out = model.eval()(**inputs)
        if name == "questions":
            start, end, place = out.start_logits[0], out.end_logits[0], inputs.sequence_ids(0)
            spans = [(float(start[0] + end[0]), [])]
            for a in (t for t, side in enumerate(place) if side == 1):
                for b in range(a, min(a + run.task.max_answer_tokens, len(place) - 1)):
                    spans.append((float(start[a] + end[b]), inputs["input_ids"][0, a : b + 1]))
            assert their_tokenizer.decode(max(spans, key=lambda span: span[0])[1]) == prediction["prediction"].lower()
            continue
        logits = out.logits[0].numpy()
        if name == "number":
            assert prediction["prediction"] == pytest.approx(float(logits[0]), abs=1e-4)
        elif name == "classes":
            assert prediction["prediction"] == [model.config.id2label[i] for i in np.flatnonzero(logits > 0)]
        elif name == "tagging":
            words = inputs.word_ids(0)
            firsts = [words.index(n) for n in range(len(row["tokens"])) if n in words]
            assert prediction["prediction"] == [model.config.id2label[int(logits[t].argmax())] for t in firsts]
        else:
            p = np.exp(log_p(logits))
            best = prediction["prediction"] if name == "choice" else lm.config.labels.index(prediction["prediction"])
            assert (best, prediction["confidence"]) == (int(p.argmax()), pytest.approx(p.max(), abs=1e-4))
