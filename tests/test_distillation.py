"""Distillation: losses against their definitions, properties of every task with a teacher, and runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm import (
    CausalLM,
    Classification,
    DataConfig,
    Decoding,
    DistillConfig,
    MaskedLM,
    MeshConfig,
    ModelConfig,
    MultipleChoice,
    OptimizerConfig,
    PermutedLM,
    QuestionAnswering,
    RunConfig,
    Seq2Seq,
    Similarity,
    SpanCorruption,
    Stopped,
    Tagging,
    TokenizerConfig,
    UserError,
)
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.devices import sharding
from jaxlm.families import PRESETS
from jaxlm.lm import LM
from jaxlm.nn import losses, parameters
from jaxlm.nn.transformer import Transformer
from jaxlm.reports import report
from jaxlm.run import training
from jaxlm.run.assembly import assemble
from jaxlm.run.config_only import PlaceholderTokenizer, _empty_part, resolve_config
from jaxlm.tasks import make_task
from jaxlm.tasks import states as task_states
from jaxlm.tasks.distillation import with_teacher
from jaxlm.tasks.task import Task
from jaxlm.transforms.layers import keep_layers

V, T = 48, 12
SIZES = {"vocabulary": V, "width": 16, "layers": 2, "heads": 2, "max_length": 32, "initial_std": 0.2}
ENCODER = ModelConfig(**SIZES, structure="encoder", heads_on_top=(), types=2, norm_place="post")
DECODER = ModelConfig(**SIZES, positions="rotary")
BOTH = ModelConfig(**SIZES, structure="encoder_decoder", start_token=0)
with_heads = lambda *heads: dataclasses.replace(ENCODER, heads_on_top=heads)
_TWO_STREAMS: dict[str, Any] = {"relative": "transformer_xl", "types_in": "attention", "query_stream": True}
XLNET = dataclasses.replace(with_heads("lm"), positions="none", **_TWO_STREAMS)
CASES: dict[str, tuple[Any, ModelConfig, tuple[str, ...]]] = {
    "class": (Classification(), ENCODER, ("a", "b", "c")),
    "classes": (Classification(problem="multi_label"), ENCODER, ("a", "b", "c")),
    "number": (Classification(problem="regression"), ENCODER, ("score",)),
    "tagging": (Tagging(scheme="none"), ENCODER, ("a", "b", "c")),
    "questions": (QuestionAnswering(), ENCODER, ("LABEL_0", "LABEL_1")),
    "choice": (MultipleChoice(), ENCODER, ("score",)),
    "cosine": (Similarity(), ENCODER, ()),
    "contrastive": (Similarity(objective="contrastive"), ENCODER, ()),
    "stream": (CausalLM(), DECODER, ()),
    "documents": (CausalLM(stream=False), DECODER, ()),
    "masked": (MaskedLM(), with_heads("masked_lm"), ()),
    "pairs": (MaskedLM(next_sentence=True), with_heads("masked_lm", "next_sentence"), ()),
    "permuted": (PermutedLM(), XLNET, ()),
    "spans": (SpanCorruption(), BOTH, ()),
    "translation": (Seq2Seq(decoding=Decoding(max_new_tokens=4)), BOTH, ()),
    "prompted": (Seq2Seq(decoding=Decoding(max_new_tokens=4)), DECODER, ()),
}  # fmt: skip
FAST = ("class", "questions", "documents", "masked", "spans")
EVERYTHING = DistillConfig("teacher", labels=0.5, hidden=2.0, attention=3.0, relations=4.0)


@lru_cache
def case(name: str) -> tuple[Any, ModelConfig]:
    """Returns the task of a case, bound to its model, and the model with the head of the task."""
    config, model, labels = CASES[name]
    task = make_task(RunConfig(model, config, DataConfig(length=T)), PlaceholderTokenizer(V), labels)
    return task.bind(model), task.configure(model)


def batch_of(name: str) -> dict[str, jax.Array]:
    """Returns a random batch of two rows: two examples and padding, and one example."""
    task, _ = case(name)
    random = np.random.default_rng(0)
    batch = dict(task.batches(_empty_part(task), 2, T, 0).empty_batch())
    one = task.max_examples == 1
    for prefix, axis in (("", "T"), ("source_", "S")):
        if f"{prefix}segments_B{axis}" not in batch:
            continue
        size = batch[f"{prefix}segments_B{axis}"].shape[1]
        ends = (0, size) if one else (size * 4 // 10, size * 8 // 10)
        place = np.arange(size)
        segments = np.stack([1 + (place >= ends[0]) - (place >= ends[1]) * 2, (place < size - 2).astype(int)])
        segments = np.stack([place < size, place < size - 2]).astype(int) if one else segments
        positions = np.where((segments == 2), place - ends[0], place) * (segments > 0)
        batch[f"{prefix}segments_B{axis}"], batch[f"{prefix}positions_B{axis}"] = (
            np.int32(segments),
            np.int32(positions),
        )
        tokens = random.integers(4, V, segments.shape) * (segments > 0)
        batch[f"{prefix}tokens_B{axis}"] = np.int32(tokens)
    segments_BT = batch["segments_BT"]
    is_example_BE = np.arange(1, task.max_examples + 1) <= segments_BT.max(1, keepdims=True)
    for field, array in batch.items():
        if field == "weights_BT":
            share = 0.2 if hasattr(task, "mask") else 0.6
            batch[field] = np.float32((segments_BT > 0) & (random.random(segments_BT.shape) < share))
            batch[field][:, 0] = 1
        elif field == "order_BT":
            batch[field] = np.int32((segments_BT > 0) * np.maximum(0, random.integers(-20, 9, segments_BT.shape)))
            batch[field][:, 0] = 1
        elif field == "weights_BE":
            first = np.arange(array.shape[1]) % 2 == 0 if name in ("cosine", "contrastive") else True
            batch[field] = np.float32(is_example_BE & first)
        elif field == "labels_BT":
            batch[field] = np.int32(random.integers(0, 3, array.shape))
        elif field == "labels_BE":
            is_right_BE = (is_example_BE & (np.arange(array.shape[1]) == 0)) if name == "choice" else is_example_BE
            batch[field] = is_right_BE.astype(array.dtype)
        elif field == "groups_BE":
            batch[field] = np.int32(is_example_BE)
        elif field == "starts_BE":
            batch[field] = np.int32(np.stack([np.argmax(segments_BT == n + 1, 1) for n in range(array.shape[1])], 1))
    return {field: jnp.asarray(array) for field, array in batch.items()}


def params_of(model: ModelConfig, seed: int = 0) -> Any:
    change = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf + 0.1 * seed * change.standard_normal(leaf.shape, np.float32)),
        random_params(model),
    )


def distilled(name: str, distill: DistillConfig = EVERYTHING, **teacher: Any) -> tuple[Any, Any, Any]:
    """Returns a task with a teacher, the module of the student, and its parameters with those of the teacher."""
    task, model = case(name)
    other = dataclasses.replace(model, **teacher)
    task, module = with_teacher(task, distill, model, other), Transformer(model)
    extra = jax.eval_shape(lambda: task.more_params(module, jax.random.key(0)))
    params = {**params_of(model), parameters.TEACHER: params_of(other, 0 if other == model else 1)}
    if parameters.DISTILLATION in extra:
        fill = lambda leaf: jnp.asarray(np.random.default_rng(2).standard_normal(leaf.shape), jnp.float32)
        params[parameters.DISTILLATION] = jax.tree.map(fill, extra[parameters.DISTILLATION])
    return task, module, params


def run_losses(task: Any, module: Any, params: Any, batch: Any, training: bool = True) -> Any:
    key = jax.random.key(0) if training else None
    return jax.jit(lambda params, batch: task.losses(module, params, batch, key)[0])(params, batch)


@pytest.mark.parametrize(
    "name", [case if case in FAST else pytest.param(case, marks=pytest.mark.long) for case in CASES]
)
def test_a_student_that_equals_its_teacher_has_the_minimum_and_no_gradient(name):
    task, module, params = distilled(name, dataclasses.replace(EVERYTHING, labels=0.0))
    batch = batch_of(name)

    def total(params):
        found = task.losses(module, params, batch, jax.random.key(0))[0]
        return sum(total for total, _ in found.values()), found

    def compare(params):
        (_, found), gradient = jax.value_and_grad(total, has_aux=True)(params)
        return found, gradient, task.weights({field: x[None] for field, x in batch.items()})

    found, gradient, weights = jax.jit(compare)(params)
    assert {*found} == {*weights} and len(found) == (5 if name == "pairs" else 4)
    for loss, (value, weight) in found.items():
        np.testing.assert_allclose(value, 0, atol=1e-4, err_msg=loss)
        np.testing.assert_allclose(weight, weights[loss], err_msg=loss)  # so that micro-batches add up
        assert weight > 0, loss
    for path, leaf in parameters.by_path(gradient).items():
        np.testing.assert_allclose(leaf, 0, atol=1e-3, err_msg=path)
    other = {**params, parameters.TEACHER: params_of(task.teacher, 1)}
    changed, gradient, _ = jax.jit(compare)(other)
    for loss, (value, _) in changed.items():
        assert value > 1e-6, loss
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient[parameters.TEACHER]))
    assert any(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(parameters.of_model(gradient)))


def separate_rows(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the batch with each example in its own row."""
    rows: list[dict[str, np.ndarray]] = []
    for b, count in enumerate(np.asarray(batch["segments_BT"]).max(1)):
        for n in range(1, count + 1):
            row = {}
            for field, array in batch.items():
                values, axes = np.asarray(array)[b], field.rpartition("_")[2][:2]
                segments = np.asarray(batch["source_segments_BS" if axes == "BS" else "segments_BT"])[b]
                chosen = values[segments == n] if axes in ("BT", "BS") else values[n - 1 : n]
                row[field] = np.zeros_like(values)
                row[field][: len(chosen)] = np.minimum(chosen, 1) if "segments" in field else chosen
            row |= {"starts_BE": np.zeros_like(row["starts_BE"])} if "starts_BE" in row else {}
            rows.append(row)
    return {field: jnp.stack([jnp.asarray(row[field]) for row in rows]) for field in batch}


@pytest.mark.parametrize(
    "name",
    [
        "questions",
        "translation",
        *(pytest.param(n, marks=pytest.mark.long) for n in ("class", "documents", "masked", "permuted")),
    ],
)
def test_packed_equals_unpacked(name):
    task, module, params = distilled(name, layers=4, width=24)
    packed, unpacked = (
        run_losses(task, module, params, batch) for batch in (batch_of(name), separate_rows(batch_of(name)))
    )
    for loss, (total, weight) in packed.items():
        np.testing.assert_allclose(total, unpacked[loss][0], rtol=1e-4, err_msg=loss)
        assert weight == unpacked[loss][1] > 0


def test_evaluation_is_that_of_the_task():
    task, module, params = distilled("class")
    plain, batch = case("class")[0], batch_of("class")
    own = parameters.of_model(params)
    found, expected = (run_losses(one, module, own, batch, False) for one in (task, plain))
    assert found.keys() == expected.keys() == {"loss"}
    assert type(task).__name__ == type(plain).__name__ and isinstance(task, type(plain))


def test_a_task_without_logits_is_refused():
    class Own(Task):
        examples = measure = losses = None

    with pytest.raises(UserError, match="Own defines no logits to compare; define `predicted`"):
        with_teacher(Own(), EVERYTHING, ENCODER, ENCODER)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergences_equal_their_definitions(temperature):
    random = np.random.default_rng(0)
    logits, teacher = (2 * random.standard_normal((2, 5, 7), np.float32) for _ in range(2))
    weights = random.random((2, 5), np.float32)
    log_q, log_p = (log_softmax(x / temperature) for x in (logits, teacher))
    expected = temperature**2 * ((np.exp(log_p) * (log_p - log_q)).sum(-1) * weights).sum()
    total, weight = losses.divergence(logits, teacher, weights, temperature)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(weight, weights.sum(), rtol=1e-6)
    # A sigmoid is a softmax over two logits, one of them 0.
    pairs = [np.stack([x, np.zeros_like(x)], -1) for x in (logits, teacher)]
    expected = losses.divergence(*pairs, np.repeat(weights[..., None], 7, -1), temperature)[0] / 7
    np.testing.assert_allclose(losses.binary_divergence(logits, teacher, weights, temperature)[0], expected, rtol=1e-5)


@pytest.mark.parity
def test_the_divergence_equals_that_of_torch():
    torch = pytest.importorskip("torch")
    logits, teacher = (np.random.default_rng(n).standard_normal((6, 9), np.float32) for n in range(2))
    student_log, teacher_log = (torch.log_softmax(torch.from_numpy(x) / 2, -1) for x in (logits, teacher))
    expected = 4 * torch.nn.functional.kl_div(student_log, teacher_log, reduction="sum", log_target=True)
    np.testing.assert_allclose(losses.divergence(logits, teacher, np.ones(6), 2.0)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("parts", [1, 3])
def test_the_chunked_divergence_equals_the_whole_one(parts):
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
    x, teacher_x, weights = draw(2, 7, 4), draw(2, 7, 6), jnp.abs(draw(2, 7))
    head, teacher_head = {"kernel": draw(4, 9)}, {"kernel": draw(6, 9)}
    logits_of = lambda params, x: x @ params["kernel"]

    def chunked(head, x):
        return losses.chunked_divergence(
            logits_of, logits_of, head, teacher_head, x, teacher_x, weights, 2.0, parts
        )[0]  # fmt: skip

    whole = lambda head, x: losses.divergence(logits_of(head, x), logits_of(teacher_head, teacher_x), weights, 2.0)[0]
    found, expected = (jax.jit(jax.value_and_grad(one, argnums=(0, 1)))(head, x) for one in (chunked, whole))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize("name", ["documents", pytest.param("masked", marks=pytest.mark.long)])
def test_a_large_vocabulary_is_compared_in_parts(name, monkeypatch):
    """So no logits of all positions exist: [B, T, V] of the student and of the teacher."""
    distill = dataclasses.replace(EVERYTHING, hidden=0.0, attention=0.0, relations=0.0)
    task, module, params = distilled(name, distill, width=24, layers=3)
    batch = batch_of(name)
    loss = lambda params: sum(total for total, _ in task.losses(module, params, batch, jax.random.key(0))[0].values())
    whole = jax.jit(jax.value_and_grad(loss))(params)
    monkeypatch.setattr(task_states, "MAX_LOGITS", 4 * V)
    monkeypatch.setattr(task_states, "_SHARE_OF_LOGITS", 1 << 40)
    found = jax.jit(jax.value_and_grad(loss))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), found(params), whole)
    positions = batch["weights_BT"].size if name == "documents" else 2 * task.predictions
    shapes = shapes_in(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
    assert not [shape for shape in shapes if shape[-1:] == (V,) and np.prod(shape[:-1]) >= positions]


def test_a_large_vocabulary_is_compared_in_parts_on_a_mesh(monkeypatch):
    """Each part of the mesh has copies of both heads. Only the student's head has a gradient."""
    task, module, params = distilled("documents", DistillConfig("teacher", labels=0.0), width=32, layers=3)
    batch = batch_of("documents")
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    on_mesh = module.clone(constrain=sharding.Placement(mesh))
    gradient = lambda module: jax.jit(
        jax.grad(lambda params: task.losses(module, params, batch, jax.random.key(0))[0]["distillation/logits"][0])
    )
    expected = gradient(module)(params)
    monkeypatch.setattr(task_states, "MAX_LOGITS", 2 * V)
    monkeypatch.setattr(task_states, "_SHARE_OF_LOGITS", 1 << 40)
    shard = lambda leaf, row: jax.device_put(leaf, sharding.sharding(mesh, row.axes, leaf.shape, row.path))
    sharded = jax.tree.map(shard, params, parameters.rows(params))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), gradient(on_mesh)(sharded), expected)


def shapes_in(jaxpr: Any) -> set[tuple[int, ...]]:
    """Returns the shapes of all values of a program."""
    found = {v.aval.shape for equation in jaxpr.eqns for v in equation.outvars}
    for inner in (part for e in jaxpr.eqns for part in jax.extend.core.jaxprs_in_params(e.params)):
        found |= shapes_in(inner)
    return found


@pytest.mark.parametrize("name", [pytest.param("class", marks=pytest.mark.long), "documents", "translation"])
def test_losses_of_states_and_attention_equal_their_definitions(name):
    """`LM.apply` computes states and weights for unpacked rows."""
    batch = separate_rows(batch_of(name))
    task, module, params = distilled(name, layers=4, width=24)
    found = run_losses(task, module, params, batch)
    ours, theirs = (
        LM(config, Transformer(config), None).apply(
            part, *inputs_of(batch), states=True, attentions=True
        )
        for config, part in ((module.config, parameters.of_model(params)), (task.teacher, params["teacher"]))
    )  # fmt: skip
    hidden = attention = tokens = 0.0
    for stack, projection in params[parameters.DISTILLATION].items():
        a, b = (getattr(output, stack) for output in (ours, theirs))
        real_BT = (
            np.asarray(batch["source_segments_BS" if (stack, name) == ("encoder", "translation") else "segments_BT"])
            > 0
        )
        x, y = np.asarray(a.states_LBTD) @ np.asarray(projection), np.asarray(b.states_LBTD)[[0, 2, 4]]
        hidden += (((x - y) ** 2).mean((0, 3)) * real_BT).sum()
        x, y = np.asarray(a.attention_LBHTS), np.asarray(b.attention_LBHTS)[[1, 3]]
        attention += (((x - y) ** 2).sum(-1).mean((0, 2)) * real_BT).sum()
        tokens += real_BT.sum()
    np.testing.assert_allclose(found["distillation/hidden"], (EVERYTHING.hidden * hidden, tokens), rtol=1e-3)
    np.testing.assert_allclose(found["distillation/attention"], (EVERYTHING.attention * attention, tokens), rtol=1e-3)


@pytest.mark.parametrize("name", ["class", "prompted"])
def test_relations_equal_their_definition(name):
    """In a model with norms before the layers, the layer reads the normed states."""
    batch = separate_rows(batch_of(name))
    distill = DistillConfig("teacher", labels=0.0, logits=0.0, relations=1.0, relation_layer=3, relation_heads=4)
    task, module, params = distilled(name, distill, layers=4, width=24, heads=3)
    vectors = []
    for config, part, layer in ((module.config, params, 1), (task.teacher, params["teacher"], 2)):
        own = parameters.of_model(part)
        output = LM(config, Transformer(config), None).apply(own, *inputs_of(batch), states=True)
        x = np.asarray(getattr(output, config.structure).states_LBTD[layer], np.float64)
        of_layer = jax.tree.map(lambda leaf, n=layer: np.asarray(leaf[n]), own[config.structure]["layers"])
        if config.norm_place == "pre":
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm_epsilon)
            x = x * of_layer["attention_norm"]["scale"] + of_layer["attention_norm"]["bias"]
        heads = [of_layer["attention"][part] for part in ("query", "key", "value")]
        vectors.append([np.einsum("btd,dhc->bthc", x, head["kernel"]) + head["bias"] for head in heads])
    total = 0.0
    for row, length in enumerate((np.asarray(batch["segments_BT"]) > 0).sum(1)):
        for ours, theirs in zip(*vectors):
            x, y = (part[row, :length].reshape(length, 4, -1).transpose(1, 0, 2) for part in (ours, theirs))
            log_q, log_p = (log_softmax(a @ a.transpose(0, 2, 1) / np.sqrt(a.shape[-1])) for a in (x, y))
            total += (np.exp(log_p) * (log_p - log_q)).sum() / 12  # 3 relations of 4 heads
    found, weight = run_losses(task, module, params, batch)["distillation/relations"]
    np.testing.assert_allclose(found, total, rtol=1e-3)
    assert weight == (np.asarray(batch["segments_BT"]) > 0).sum()


def inputs_of(batch):
    """Returns tokens, masks and types of unpacked rows as arguments of `LM.apply`."""
    mask = lambda segments: (segments > 0).astype(jnp.int32)
    if "source_tokens_BS" not in batch:
        return batch["tokens_BT"], mask(batch["segments_BT"]), batch.get("types_BT")
    source = batch["source_tokens_BS"], mask(batch["source_segments_BS"]), None
    return *source, batch["tokens_BT"], mask(batch["segments_BT"])


# Runs

TEXT = [f"Line {n} is here. It speaks of {n * n} things! Does it? Yes, the {n % 7} of them." for n in range(60)]
LABELS = ("no", "so", "yes")
BERT = dataclasses.replace(
    PRESETS["bert-base"], vocabulary=200, max_length=64, width=16, layers=3, heads=2, mlp_width=24, dropout=0.1,
    attention_dropout=0.1, heads_on_top=("classes",), labels=LABELS,
)  # fmt: skip


@lru_cache
def tokenizer_of(lowercase: bool = False) -> Any:
    return tokenizers.train(TEXT, TokenizerConfig(train="wordpiece", lowercase=lowercase), 180)


def save_model(folder: Path, lowercase: bool = False, **changes: Any) -> str:
    """Saves a BERT of 3 layers with a head for classes, and returns its folder."""
    config = dataclasses.replace(BERT, **changes)
    jaxlm.save(LM(config, Transformer(config), random_params(config), tokenizer_of(lowercase)), folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Returns a folder with rows.csv and the teacher."""
    folder = tmp_path_factory.mktemp("distillation")
    rows = (f'"{line}",{LABELS[n % 3]}' for n, line in enumerate(TEXT))
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    save_model(folder / "teacher")
    return folder


@pytest.fixture(autouse=True)
def one_device(devices, no_plots, monkeypatch, tmp_path_factory):
    """Uses one device, except for a test that sets another number."""
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def run_of(folder: Path, workdir: Path, distill: DistillConfig | None = None, **changes: Any) -> RunConfig:
    teacher = str(folder / "teacher")
    distill = distill or DistillConfig(teacher, layers="0,2", hidden=1.0, attention=1.0)
    values = {
        "model": None,
        "task": Classification(),
        "data": DataConfig(path=str(folder / "rows.csv"), length=32),
        "optimizer": OptimizerConfig(rate=1e-2),
        "distill": distill,
        "init": teacher,
        "batch": 4,
        "steps": 6,
        "checkpoint_every": 2,
        "log_every": 1,
        "keep_checkpoints": True,
        "workdir": str(workdir),
    }
    return RunConfig(**values | changes)


def log_of(folder: Path) -> list[dict[str, float]]:
    """Returns the losses of each step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: x for k, x in row.items() if "loss" in k or "distillation" in k} for row in rows]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    """Returns the folder of a distilled run that was not interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        make_mesh = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda c, some=None: make_mesh(c, some or jax.devices()[:1]))
        patch.setattr(report, "write", lambda folder, *_: folder / "report.html")
        jaxlm.fit(run_of(folder, folder / "run"))
    return folder / "run"


def checkpoint_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array in the last checkpoint of a run."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        state = manager.restore(manager.latest_step(), args=args)["state"]
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


@pytest.mark.long
def test_the_export_has_the_layers_of_the_student_and_no_teacher(folder, finished, tmp_path, capsys):
    teacher, student = jaxlm.load(folder / "teacher"), jaxlm.load(finished)
    assert student.config == dataclasses.replace(teacher.config, layers=2)
    assert [*parameters.by_path(student.params)] == [*parameters.by_path(teacher.params)]
    assert {"distillation/labels", "distillation/logits", "distillation/hidden", "distillation/attention"} < {
        *log_of(finished)[1]
    }
    # A run without a teacher from the same layers has checkpoints with the same arrays.
    jaxlm.save(jaxlm.shrink(teacher, layers=(0, 2)), tmp_path / "init")
    plain = run_of(folder, tmp_path / "plain", DistillConfig(), init=str(tmp_path / "init"))
    lm = jaxlm.fit(plain)
    assert checkpoint_of(finished) == checkpoint_of(tmp_path / "plain")
    assert f"model     {training.size(lm.params):,} parameters" in capsys.readouterr().err
    # Before the first step both are the same model.
    assert log_of(finished)[0]["distillation/labels"] == log_of(tmp_path / "plain")[0]["loss"]


@pytest.mark.long
def test_a_resumed_run_has_the_same_result(folder, finished, tmp_path):
    run = run_of(folder, tmp_path / "run")
    steps = iter(range(2))
    with pytest.raises(Stopped):
        jaxlm.fit(run, stop=lambda: next(steps, None) is None)
    jaxlm.fit(run)
    assert log_of(tmp_path / "run") == log_of(finished)
    for file in (finished / "export").iterdir():
        assert file.read_bytes() == (tmp_path / "run" / "export" / file.name).read_bytes(), file.name


@pytest.mark.long
def test_a_changed_teacher_is_refused_when_a_run_resumes(folder, tmp_path):
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    run = run_of(folder, tmp_path / "run", DistillConfig(str(tmp_path / "teacher"), layers="even"))
    steps = iter(range(2))
    with pytest.raises(Stopped):
        jaxlm.fit(run, stop=lambda: next(steps, None) is None)
    lm = jaxlm.load(tmp_path / "teacher")
    changed = jax.tree.map(lambda leaf: leaf + 0.01, lm.params)
    jaxlm.save(dataclasses.replace(lm, params=changed), tmp_path / "teacher", overwrite=True)
    with pytest.raises(UserError, match=r"frozen parameters differ .* --distill\.teacher .*teacher, or"):
        jaxlm.fit(run)
    shutil.rmtree(tmp_path / "teacher")
    with pytest.raises(UserError, match="teacher"):
        jaxlm.fit(run)


@pytest.mark.long
@pytest.mark.parametrize("how", ["accumulated", "sharded"])
def test_accumulated_and_sharded_runs_have_the_same_losses(folder, tmp_path, devices, how):
    save_model(tmp_path / "teacher", width=32, layers=4)  # a projection of the hidden states is trained too
    distill = DistillConfig(str(tmp_path / "teacher"), hidden=1.0, attention=1.0)
    options = {"dropout": 0.0, "steps": 3, "optimizer": OptimizerConfig(rate=1e-2, epsilon=1e-3)}
    jaxlm.fit(run_of(folder, tmp_path / "one", distill, **options))
    if how == "sharded":
        devices(4)
        options["mesh"] = MeshConfig(data=1, fsdp=2, tensor=2)
    jaxlm.fit(run_of(folder, tmp_path / "other", distill, **options, accumulate=2 if how == "accumulated" else 1))
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "other"), strict=True):
        for name, value in a.items():
            np.testing.assert_allclose(b[name], value, rtol=2e-3, err_msg=name)


@pytest.mark.long
def test_a_student_may_be_initialised_randomly_and_a_plan_counts_its_teacher(folder, tmp_path):
    config = dataclasses.replace(BERT, layers=1, width=8, heads=1, heads_on_top=())
    distill = DistillConfig(str(folder / "teacher"), hidden=1.0)
    run = run_of(folder, tmp_path / "run", distill, model=config, init="")
    run = dataclasses.replace(run, tokenizer=TokenizerConfig(path=str(folder / "teacher")))
    lm = jaxlm.fit(dataclasses.replace(run, steps=2))
    assert lm.config.layers == 1 and lm.config.width == 8
    found, without = (resolve_config(r, make_mesh()) for r in (run, dataclasses.replace(run, distill=DistillConfig())))
    likes = [assemble(resolved).like for resolved in (found, without)]
    sizes = [training.size(like.model) for like in likes]
    assert sizes[0] == sizes[1] and training.size(likes[0].frozen) == training.size(
        jaxlm.load(folder / "teacher").params
    )


def make_mesh() -> Any:
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


LANGUAGE_MODELS = {  # preset, task, layers that are kept of 2
    "gpt2": ("gpt2", CausalLM(), {"layers": "0"}),
    "t5": ("t5-small", SpanCorruption(), {"layers": "even", "decoder_layers": "1"}),
}


@pytest.mark.parametrize("name", ["gpt2", pytest.param("t5", marks=pytest.mark.long)])
def test_a_language_model_keeps_layers_of_its_teacher(name, tmp_path):
    preset, task, layers = LANGUAGE_MODELS[name]
    small = {"vocabulary": 320, "max_length": 64, "width": 16, "layers": 2, "heads": 2, "mlp_width": 24}
    config = dataclasses.replace(PRESETS[preset], **small, head_width=8, decoder_layers=None, heads_on_top=("lm",))
    settings = TokenizerConfig(train="unigram" if name == "t5" else "byte_bpe", sentinels=20 * (name == "t5"))
    tokenizer = tokenizers.train(TEXT, settings, 320)
    jaxlm.save(LM(config, Transformer(config), random_params(config), tokenizer), tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("\n".join(TEXT) + "\n")
    distill = DistillConfig(str(tmp_path / "teacher"), hidden=1.0, attention=1.0, relations=1.0, **layers)
    run = RunConfig(
        None, task, DataConfig(path=str(tmp_path / "text.txt"), length=32), distill=distill, batch=4, steps=2,
        init=str(tmp_path / "teacher"), workdir=str(tmp_path / "run"), sample_tokens=0, log_every=1,
        optimizer=OptimizerConfig(rate=0.0, schedule="constant"),
    )  # fmt: skip
    student = jaxlm.fit(run)
    kept = [[0]] if name == "gpt2" else [[0], [1]]
    for path, leaf in parameters.by_path(keep_layers(jaxlm.load(tmp_path / "teacher"), *kept).params).items():
        np.testing.assert_array_equal(parameters.by_path(student.params)[path], leaf, err_msg=path)
    assert {"distillation/logits", "distillation/relations"} < {*log_of(tmp_path / "run")[0]}


REFUSED = {
    "a folder that does not exist": ({"teacher": "{tmp}/nothing"}, "nothing"),
    "another tokenizer": ({"teacher": "{lowercase}"}, "another tokenizer .*sequence-level distillation"),
    "another vocabulary": ({"teacher": "{larger}"}, "vocabulary of 240 tokens, and the student of 200.*sequence-level"),
    "another structure": ({"teacher": "{decoder}"}, "structure decoder.*sequence-level"),
    "no head": ({"teacher": "{bare}"}, "has no classes_head; train the teacher"),
    "other labels": ({"teacher": "{others}"}, "3 outputs, a, b, c.* 3: no, so, yes"),
    "labels in another order": ({"teacher": "{order}"}, "yes, so, no.* no, so, yes; name the labels .*--task.names"),
    "more labels": ({"teacher": "{more}"}, "4 outputs"),
    "fewer positions": ({"teacher": "{short}"}, "data.length is 32, longer than the 16 positions"),
    "too many layers to compare": ({"hidden": 1.0, "compared": "1,2,3,3"}, "compared is '1,2,3,3'; .* give 3 numbers"),
    "a layer to compare that does not exist": ({"attention": 1.0, "compared": "1,2,4"}, "numbers from 1 to 3"),
    "other heads": ({"teacher": "{heads}", "attention": 1.0}, "student has 2 heads and the teacher 4"),
    "a layer that does not exist": ({"layers": "0,3"}, "layers is 0, 3; the model has the layers 0 to 2"),
    "layers in another order": ({"layers": "2,0"}, "ascending order"),
    "layers of a decoder": ({"decoder_layers": "0"}, "decoder_layers is given, but the model is a"),
    "words for layers": ({"layers": "first"}, "layers is 'first'; it must be numbers separated by commas"),
    "temperature 0": ({"temperature": 0.0}, "temperature is 0.0; it must be"),
    "relation heads": ({"relations": 1.0, "relation_heads": 3}, "relation_heads is 3; it must divide .* 16, 16, 16"),
    "a relation layer": ({"relations": 1.0, "relation_layer": 4}, "relation_layer is 4; the teacher has 3 layers"),
    "no comparison": ({"logits": 0.0}, "are all 0"),
    "no teacher": ({"teacher": "", "hidden": 1.0}, "distill.hidden is 1.0, but there is no teacher"),
    "layers without a teacher": ({"teacher": "", "layers": "even"}, "there is no teacher"),
    "a temperature without logits": ({"logits": 0.0, "hidden": 1.0, "temperature": 3.0}, "has no effect"),
    "a map without states": ({"compared": "1,2,3"}, "has no effect"),
    "a negative weight": ({"labels": -1.0}, "labels is -1.0; it must be"),
}
TEACHERS: dict[str, dict[str, Any]] = {
    "lowercase": {"lowercase": True},
    "larger": {"vocabulary": 240},
    "decoder": {"structure": "decoder", "norm_place": "pre", "heads_on_top": ("lm",), "types": 0},
    "bare": {"heads_on_top": ()},
    "others": {"labels": ("a", "b", "c")},
    "order": {"labels": LABELS[::-1]},
    "more": {"labels": (*LABELS, "perhaps")},
    "short": {"max_length": 16},
    "heads": {"heads": 4},
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_refused_before_anything_is_compiled(name, folder, tmp_path, monkeypatch):
    options, message = REFUSED[name]
    options = {"teacher": "{teacher}", **options}
    kind = options["teacher"].strip("{}")
    if kind in TEACHERS:
        save_model(tmp_path / kind, **TEACHERS[kind])
    paths = {**{kind: tmp_path / kind for kind in TEACHERS}, "teacher": folder / "teacher", "tmp": tmp_path}
    distill = DistillConfig(**options | {"teacher": options["teacher"].format(**paths)})
    monkeypatch.setattr(training, "assemble", lambda _: pytest.fail("the run was assembled"))
    with pytest.raises(UserError, match=message):
        jaxlm.fit(run_of(folder, tmp_path / "run", distill))


def test_a_student_has_the_chosen_layers(folder):
    teacher = jaxlm.load(folder / "teacher")
    student = jaxlm.shrink(teacher, layers=[0, 2])
    for path, leaf in parameters.by_path(teacher.params).items():
        kept = leaf[np.array([0, 2])] if parameters.is_stacked(path) else leaf
        np.testing.assert_array_equal(parameters.by_path(student.params)[path], kept, err_msg=path)
    tokens = np.arange(6)[None]
    assert np.isfinite(student(tokens).logits).all()
    with pytest.raises(UserError, match="layers is 3; the model has the layers 0 to 2"):
        keep_layers(teacher, (3,))
