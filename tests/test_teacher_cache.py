"""The cache of a teacher: its losses, its files, and runs that read it."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flags import xla_flags
from random_params import random_params
from test_distillation import (
    BERT,
    CASES,
    TEXT,
    batch_of,
    case,
    distilled,
    folder,
    log_of,
    log_softmax,
    one_device,
    run_losses,
    run_of,
    save_model,
    separate_rows,
)
from test_hosts import assert_alike, data_dir, run_alone, start

import jaxlm
from jaxlm import (
    CausalLM,
    DataConfig,
    DistillConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    Stopped,
    TokenizerConfig,
    UserError,
)
from jaxlm.data import example_cache
from jaxlm.data.batches import Batches
from jaxlm.data.example_cache import FIELD, ExampleArray, ExampleCache, keys_of
from jaxlm.data.joined import join
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.devices import sharding
from jaxlm.errors import RunError
from jaxlm.lm import LM
from jaxlm.nn import losses, parameters
from jaxlm.nn.transformer import Transformer
from jaxlm.reports import report
from jaxlm.run import training
from jaxlm.run.assembly import assemble, closed_flops
from jaxlm.run.config_only import _empty_part, batch_shapes, resolve_config
from jaxlm.storage import disk
from jaxlm.tasks import states as task_states
from jaxlm.tasks.distillation import with_teacher

__all__ = ["data_dir", "folder", "one_device", "run_alone", "start"]  # fixtures

LOGITS = DistillConfig("teacher", labels=0.5)
VOCABULARIES = ("stream", "documents", "masked", "pairs", "permuted", "spans", "translation", "prompted")


# Losses


def top_of(logits: np.ndarray, top: int, temperature: float, parts: int = 1) -> Any:
    return losses.top_log_probs(lambda params, x: x, {}, jnp.asarray(logits), top, temperature, parts)


@pytest.mark.parametrize(("temperature", "top"), [(1.0, 3), (2.0, 3), (2.0, 6)])
def test_the_divergence_of_top_tokens_equals_its_definition(temperature, top):
    random = np.random.default_rng(0)
    logits, teacher = (2 * random.standard_normal((2, 5, 7), np.float32) for _ in range(2))
    weights = random.random((2, 5), np.float32)
    ids, stored = top_of(teacher, top, temperature)
    assert ids.dtype == np.uint16 and stored.dtype == np.float16 and stored.shape == (2, 5, top + 1)
    q, p = (np.exp(log_softmax(x / temperature)) for x in (logits, teacher))

    def merge(x: np.ndarray) -> np.ndarray:
        known = np.take_along_axis(x, np.asarray(ids, int), -1)
        return np.concatenate([known, 1 - known.sum(-1, keepdims=True)], -1)

    np.testing.assert_array_equal(np.sort(ids)[0, 0], np.sort(np.argsort(-teacher[0, 0])[:top]))
    np.testing.assert_allclose(np.exp(np.float32(stored)), merge(p), rtol=3e-3)
    expected = temperature**2 * ((merge(p) * np.log(merge(p) / merge(q))).sum(-1) * weights).sum()
    total, weight = losses.top_divergence(logits, ids, stored, weights, temperature)
    np.testing.assert_allclose(total, expected, rtol=3e-3)
    np.testing.assert_allclose(weight, weights.sum(), rtol=1e-6)
    whole, _ = losses.divergence(logits, teacher, weights, temperature)
    assert total <= whole * 1.003
    if top == 6:  # all tokens but one are known, and so is that one
        np.testing.assert_allclose(total, whole, rtol=3e-3)


def test_a_student_that_equals_its_teacher_has_no_gradient_from_top_tokens():
    logits = 3 * np.random.default_rng(0).standard_normal((2, 5, 9)).astype(np.float32)
    ids, stored = top_of(logits, 4, 2.0)
    loss = lambda x: losses.top_divergence(x, ids, stored, np.ones((2, 5)), 2.0)[0]
    value, gradient = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, 0, atol=1e-4)
    np.testing.assert_allclose(gradient, 0, atol=5e-3)
    assert np.abs(jax.grad(loss)(logits[:, ::-1])).max() > 0.1


def test_chunks_equal_the_whole():
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
    x, weights, head = draw(2, 7, 4), jnp.abs(draw(2, 7)), {"kernel": draw(4, 9)}
    logits_of = lambda params, x: x @ params["kernel"]
    ids, stored = top_of(draw(2, 7, 9), 3, 2.0)
    parts = 3
    for one, other in zip(top_of(logits_of(head, x), 3, 2.0, parts), top_of(logits_of(head, x), 3, 2.0)):
        np.testing.assert_array_equal(one, other)
    chunked = lambda *args: losses.chunked_top_divergence(logits_of, *args, ids, stored, weights, 2.0, parts)[0]
    whole = lambda head, x: losses.top_divergence(logits_of(head, x), ids, stored, weights, 2.0)[0]
    found, expected = (jax.jit(jax.value_and_grad(one, argnums=(0, 1)))(head, x) for one in (chunked, whole))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


# Tasks


def with_predictions(task: Any, module: Any, params: Any, batch: Any) -> dict[str, Any]:
    """Returns the batch with the predictions of the teacher, which are 0 for tokens without a weight."""
    predict = lambda params, batch: task.teacher_predictions(task.teacher_module(module), params, batch)
    arrays = jax.jit(predict)(params[parameters.TEACHER], batch)
    weights = batch.get("weights_BT")
    mask = lambda name, x: x * (weights[..., None] > 0) if weights is not None and "_BT" in name else x
    return batch | {f"{FIELD}{name}": mask(name, x) for name, x in arrays.items()}


FAST = ("class", "questions", "masked")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.long) for n in CASES])
def test_a_cache_gives_the_losses_and_gradients_of_its_teacher(name, tmp_path):
    """They are exactly those of heads, and those of a vocabulary to the precision of the stored numbers."""
    task, module, params = distilled(name, LOGITS, layers=3, width=24)
    distill = dataclasses.replace(LOGITS, cache=str(tmp_path), top=1000)
    cached = with_teacher(case(name)[0], distill, module.config, task.teacher)
    batch = batch_of(name)
    whole = with_predictions(cached, module, params, batch)
    assert whole.keys() - batch.keys() == {
        FIELD + array for array in cached.cached_arrays(Batches.empty_batch(batches_of(cached)))
    }
    total = lambda task, params, batch: sum(
        x for x, _ in task.losses(module, params, batch, jax.random.key(0))[0].values()
    )
    run = lambda task: jax.jit(jax.value_and_grad(lambda params, batch: total(task, params, batch)))
    own = parameters.of_model(params)
    assert not cached.more_params(module, jax.random.key(0))
    (loss, gradient), (expected, of_all) = run(cached)(own, whole), run(task)(params, batch)
    exact = name not in VOCABULARIES
    np.testing.assert_allclose(loss, expected, rtol=1e-6 if exact else 5e-3)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(parameters.of_model(of_all)))
    compare = partial(np.testing.assert_allclose, rtol=1e-5, atol=(1e-6 if exact else 1e-2) * largest)
    jax.tree.map(compare, gradient, parameters.of_model(of_all))
    assert cached.teacher is None and cached.weights(batch).keys() == task.weights(batch).keys()


def batches_of(task: Any) -> Batches:
    return task.batches(_empty_part(task), 2, task.length, 0)


@pytest.mark.long
def test_a_large_vocabulary_is_read_in_parts(monkeypatch, tmp_path):
    task, module, params = distilled("documents", LOGITS, layers=3, width=24)
    cached = with_teacher(
        case("documents")[0], dataclasses.replace(LOGITS, cache=str(tmp_path), top=5), module.config, task.teacher
    )
    loss = lambda batch: run_losses(cached, module, parameters.of_model(params), batch)["distillation/logits"][0]
    whole = loss(one := with_predictions(cached, module, params, batch_of("documents")))
    monkeypatch.setattr(task_states, "MAX_LOGITS", 4 * 48)
    monkeypatch.setattr(task_states, "_SHARE_OF_LOGITS", 1 << 40)
    other = with_predictions(cached, module, params, batch_of("documents"))
    np.testing.assert_array_equal(one[FIELD + "ids_BTK"], other[FIELD + "ids_BTK"])
    np.testing.assert_allclose(loss(other), whole, rtol=1e-4)


# Files

ARRAYS = {"logits_BEK": ExampleArray((2,), np.dtype(np.float32)), "ids_BTJ": ExampleArray((3,), np.dtype(np.uint16))}


def some_examples(count: int = 6) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    lengths = [1 + n % 4 for n in range(count)]
    return [
        {
            "tokens_BT": random.integers(0, 99, n).astype(np.int32),
            "labels_BT": random.integers(0, 9, n).astype(np.int32),
            "weights_BT": np.float32(np.arange(n) != 1),
            "labels_BE": np.int32(n),
        }
        for n in lengths
    ]


def values_of(examples: list[dict[str, np.ndarray]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns arrays that follow from the tokens."""
    weighted = [example["tokens_BT"][example["weights_BT"] > 0] for example in examples]
    rows = np.concatenate(weighted)[:, None] + np.arange(3)
    logits = np.array([[example["tokens_BT"].sum(), len(example["tokens_BT"])] for example in examples])
    return np.array([*map(len, weighted)]), {"logits_BEK": logits, "ids_BTJ": rows}


def open_cache(folder: Path, **facts: Any) -> tuple[ExampleCache, list[str]]:
    cache, lines = ExampleCache(str(folder)), []
    cache.open(ARRAYS, {"teacher": "one", **facts}, lines.append)
    return cache, lines


def fill(cache: ExampleCache, examples: list[dict[str, np.ndarray]], write: bool = True) -> None:
    cache.add(keys_of(join(examples)), *values_of(examples), write=write)
    cache.flush()


@pytest.fixture
def filled(tmp_path) -> Path:
    """Returns a cache of two parts."""
    cache, _ = open_cache(tmp_path / "cache")
    fill(cache, some_examples()[:2])
    fill(cache, some_examples()[2:])
    return tmp_path / "cache"


def test_examples_are_found_by_their_content_in_any_order(filled):
    cache, lines = open_cache(filled)
    assert cache.count == 6 and not lines and cache.bytes == sum(f.stat().st_size for f in filled.glob("*.safetensors"))
    order = [4, 0, 5, 0, 2]
    examples = [some_examples()[n] for n in order]
    joined = join(examples)
    features = cache.features(joined)
    weighted = joined.features["weights_BT"] > 0
    _, expected = values_of(examples)
    np.testing.assert_array_equal(features[FIELD + "logits_BEK"], expected["logits_BEK"])
    np.testing.assert_array_equal(features[FIELD + "ids_BTJ"][weighted], expected["ids_BTJ"])
    assert not features[FIELD + "ids_BTJ"][~weighted].any()


def test_keys_depend_on_inputs_and_not_on_labels():
    key = lambda **changes: keys_of(join([some_examples()[3] | changes]))[0].tolist()
    n, same = 4, key()
    assert key(labels_BT=np.zeros(n, np.int32)) == key(labels_BE=np.int32(7)) == same
    assert key(weights_BT=2 * some_examples()[3]["weights_BT"]) == same
    assert key(weights_BT=np.ones(n, np.float32)) != same
    assert key(types_BT=np.zeros(n, np.int32)) != same
    # The same tokens, divided differently between examples.
    one, other = ([{"tokens_BT": np.arange(a, b, dtype=np.int32)} for a, b in bounds] for bounds in
                  ([(0, 2), (2, 5)], [(0, 3), (3, 5)]))  # fmt: skip
    assert not {*map(bytes, keys_of(join(one)))} & {*map(bytes, keys_of(join(other)))}


def test_an_example_of_two_runs_is_one(filled):
    cache, _ = open_cache(filled)
    fill(cache, some_examples()[1:4])
    assert open_cache(filled)[0].count == 6
    other, _ = open_cache(filled)
    fill(other, some_examples()[:2], write=False)  # another host
    assert other.contains(keys_of(join(some_examples()[:2]))).all()


def test_missing_examples_are_an_error_and_can_be_added(filled):
    cache, _ = open_cache(filled)
    new = some_examples(9)[6:]
    assert cache.contains(keys_of(join(some_examples(9)))).tolist() == [True] * 6 + [False] * 3
    with pytest.raises(RunError, match=r"3 examples of a batch are missing .* start the same command again"):
        cache.features(join(new))
    fill(cache, new)
    assert cache.contains(keys_of(join(new))).all()
    cache, _ = open_cache(filled)
    np.testing.assert_array_equal(cache.features(join(new))[FIELD + "logits_BEK"], values_of(new)[1]["logits_BEK"])


@pytest.mark.parametrize("how", ["truncated", "changed", "empty", "renamed", "header"])
def test_a_damaged_part_counts_as_missing(filled, how):
    file = sorted(filled.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    if how == "renamed":
        file = file.rename(file.with_name("0" * 32 + file.suffix))
    elif how in ("changed", "header"):
        content[-1 if how == "changed" else 20] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2 * (how == "truncated")])
    cache, [line] = open_cache(filled)
    assert str(file) in line and "is damaged" in line and "computed again" in line
    assert 0 < cache.count < 6 and not file.exists()
    missing = [one for one in some_examples() if not cache.contains(keys_of(join([one])))[0]]
    fill(cache, missing)
    cache, lines = open_cache(filled)
    assert cache.count == 6 and not lines


def test_a_cache_of_something_else_is_an_error(filled, tmp_path):
    with pytest.raises(UserError, match=r"(?s)other predictions.*teacher: 'two' \| 'one'\n.*choose another --distill"):
        open_cache(filled, teacher="two")
    cache = ExampleCache(str(filled))
    with pytest.raises(UserError, match=r"arrays\.logits_BEK: \['float32', 5\] \| \['float32', 2\]"):
        cache.open(ARRAYS | {"logits_BEK": ExampleArray((5,), np.dtype(np.float32))}, {"teacher": "one"}, print)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "text.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and contains no cache"):
        open_cache(tmp_path / "own")
    (filled / example_cache.FACTS).write_text('{"teacher": ')
    with pytest.raises(UserError, match=r"cache\.json"):
        open_cache(filled)
    with pytest.raises(UserError, match="an address"):
        ExampleCache("gs://bucket/cache")
    (tmp_path / "file").touch()
    for path in ("file", "file/below"):
        with pytest.raises(UserError, match=r"cannot be written: .*choose another --distill\.cache"):
            open_cache(tmp_path / path)


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, RunError), (errno.EACCES, UserError)])
def test_a_full_disk_and_missing_permissions_are_errors_with_a_remedy(filled, monkeypatch, number, kind):
    cache, _ = open_cache(filled)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(disk, "flush", fail)
    with pytest.raises(kind, match=r"safetensors cannot be written: refused; .*another --distill\.cache"):
        fill(cache, some_examples(9)[6:])
    assert open_cache(filled)[0].count == 6 and not [*filled.glob(".*")]
    monkeypatch.setattr(example_cache, "TemporaryFile", fail)
    with pytest.raises(kind, match="cannot be written: refused"):
        cache.check_writable()


# Runs


def distill_of(folder: Path, cache: Path | str = "", **changes: Any) -> DistillConfig:
    return DistillConfig(str(folder / "teacher"), layers="0,2", cache=str(cache), **changes)


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert log_of(ours) == log_of(theirs)
    for file in (theirs / "export").iterdir():
        assert file.read_bytes() == (ours / "export" / file.name).read_bytes(), file.name


@pytest.fixture(scope="module")
def uncached(folder) -> Path:
    """Returns the folder of a run that computes its teacher in each step."""
    with pytest.MonkeyPatch.context() as patch:
        make_mesh = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda c, some=None: make_mesh(c, some or jax.devices()[:1]))
        patch.setattr(report, "write", lambda folder, *_: folder / "report.html")
        jaxlm.fit(run_of(folder, folder / "uncached", distill_of(folder)))
    return folder / "uncached"


COMPUTED = "its predictions are computed from step"


@pytest.mark.long
def test_a_cached_run_is_the_uncached_one_also_after_a_stop(folder, uncached, tmp_path, capsys):
    run = run_of(folder, tmp_path / "run", distill_of(folder, tmp_path / "cache"))
    first = jaxlm.fit(run_of(folder, tmp_path / "short", run.distill, steps=2))
    assert f"{COMPUTED} 1 of 2" in capsys.readouterr().err and first.config.layers == 2
    steps = iter(range(2))
    with pytest.raises(Stopped):  # the other steps complete the cache
        jaxlm.fit(run, stop=lambda: next(steps, None) is None)
    assert f"{COMPUTED} 3 of 6" in capsys.readouterr().err
    jaxlm.fit(run)
    assert COMPUTED not in capsys.readouterr().err
    assert_same_run(tmp_path / "run", uncached)


@pytest.mark.long
def test_another_student_with_another_seed_reads_the_same_cache(folder, tmp_path, capsys, monkeypatch):
    values = {"steps": 20, "log_every": 20, "checkpoint_every": 20}
    jaxlm.fit(run_of(folder, tmp_path / "one", distill_of(folder, tmp_path / "cache"), **values))
    files = {file: file.read_bytes() for file in (tmp_path / "cache").iterdir()}
    assert "54 examples in the cache" in capsys.readouterr().err  # all of the data
    monkeypatch.setattr("jaxlm.run.teacher_cache._read", lambda *_: pytest.fail("the teacher was read"))
    config = dataclasses.replace(BERT, layers=1, width=8, heads=1, heads_on_top=())
    distill = DistillConfig(str(folder / "teacher"), cache=str(tmp_path / "cache"), temperature=3.0)
    run = run_of(folder, tmp_path / "two", distill, model=config, init="", seed=5, **values)
    run = dataclasses.replace(
        run,
        tokenizer=TokenizerConfig(path=str(folder / "teacher")),
        data=dataclasses.replace(run.data, length=64),
    )
    lm = jaxlm.fit(run)
    assert lm.config.width == 8 and files == {file: file.read_bytes() for file in (tmp_path / "cache").iterdir()}


def test_a_cache_of_another_teacher_is_refused(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    jaxlm.fit(run_of(folder, tmp_path / "run", distill_of(folder, cache), steps=1))
    save_model(tmp_path / "teacher", layers=2)
    monkeypatch.setattr(training, "assemble", lambda _: pytest.fail("the run was assembled"))
    with pytest.raises(UserError, match=r"(?s)other predictions; .*teacher: '\w{16}' \| '\w{16}'\n"):
        jaxlm.fit(run_of(folder, tmp_path / "other", DistillConfig(str(tmp_path / "teacher"), cache=str(cache))))
    with pytest.raises(UserError, match=r"compute_dtype: 'bfloat16' \| 'float32'"):
        jaxlm.fit(run_of(folder, tmp_path / "other", distill_of(folder, cache), compute_dtype="bfloat16"))


REFUSED = {
    "hidden states": ({"hidden": 1.0}, "distill.hidden is 1.0, which needs the layers .* or leave out --distill.cache"),
    "attention": ({"attention": 1.0}, "set --distill.attention 0"),
    "relations": ({"relations": 2.0}, "distill.relations is 2.0"),
    "no divergence": ({"logits": 0.0}, "are all 0"),
    "top without a cache": ({"cache": "", "top": 8}, "distill.top is 8, which has no effect without a cache"),
    "no top": ({"top": 0}, "distill.top is 0; it must be"),
    "no teacher": ({"teacher": ""}, "distill.cache is .*, but there is no teacher"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_refused(name, folder, tmp_path):
    options, message = REFUSED[name]
    distill = dataclasses.replace(DistillConfig(str(folder / "teacher"), cache=str(tmp_path / "cache")), **options)
    with pytest.raises(UserError, match=message):
        run_of(folder, tmp_path / "run", distill).check()


def test_a_plan_has_the_predictions_in_its_batches_and_no_teacher(folder, tmp_path):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    run = run_of(folder, tmp_path / "run", distill_of(folder, tmp_path / "cache"))
    found, other = (resolve_config(one, mesh) for one in (run, dataclasses.replace(run, distill=distill_of(folder))))
    fields, others = batch_shapes(found), batch_shapes(other)
    assert fields.keys() - others.keys() == {FIELD + "logits_BEK"} and not (tmp_path / "cache").exists()
    assert fields[FIELD + "logits_BEK"].shape == (1, *fields["weights_BE"].shape[1:], 3)
    assert assemble(found).like.frozen is None and assemble(other).like.frozen is not None
    flops = [closed_flops(one.task, one.model, 4, fields) for one in (found, other)]
    assert flops[0] < flops[1]


def language_model(tmp_path: Path, cache: str, workdir: str, **changes: Any) -> RunConfig:
    config = ModelConfig(vocabulary=64, max_length=32, width=16, layers=2, heads=2, initial_std=0.2)
    if not (tmp_path / "teacher").exists():
        tokenizer = tokenizers.train(TEXT, TokenizerConfig(train="characters"), 64)
        jaxlm.save(LM(config, Transformer(config), random_params(config), tokenizer), tmp_path / "teacher")
        (tmp_path / "text.txt").write_text("\n".join(TEXT) + "\n")
    values = {
        "task": CausalLM(),
        "data": DataConfig(path=str(tmp_path / "text.txt"), length=32),
        "distill": DistillConfig(str(tmp_path / "teacher"), layers="0", cache=cache and str(tmp_path / cache)),
        "init": str(tmp_path / "teacher"),
        "batch": 32,
        "steps": 6,
        "sample_tokens": 0,
        "log_every": 1,
        "workdir": str(tmp_path / workdir),
        "optimizer": OptimizerConfig(rate=1e-2),
    }
    return RunConfig(None, **values | changes)


@pytest.mark.long
def test_a_language_model_reads_a_cache_of_several_epochs(tmp_path, capsys):
    """The spans of a stream differ between epochs; the cache contains those of the run."""
    for cache, name in (("", "uncached"), ("cache", "cached")):
        jaxlm.fit(language_model(tmp_path, cache, name))
    assert f"{COMPUTED} 1 of 6" in capsys.readouterr().err
    for a, b in zip(log_of(tmp_path / "uncached"), log_of(tmp_path / "cached"), strict=True):
        for name, value in a.items():
            np.testing.assert_allclose(b[name], value, rtol=2e-2, atol=1e-3, err_msg=name)
    distill = dataclasses.replace(language_model(tmp_path, "cache", "other").distill, temperature=4.0)
    with pytest.raises(UserError, match=r"temperature: 4\.0 \| 2\.0"):
        jaxlm.fit(language_model(tmp_path, "cache", "other", distill=distill))


@pytest.mark.long
@pytest.mark.parametrize("how", ["accumulated", "sharded", "epochs"])
def test_accumulated_sharded_and_repeated_runs_have_the_uncached_losses(folder, tmp_path, devices, how):
    options: dict[str, Any] = {"dropout": 0.0, "steps": 4, "optimizer": OptimizerConfig(rate=1e-2, epsilon=1e-3)}
    if how == "epochs":
        options |= {"epochs": 3.0, "examples": 8, "data": DataConfig(path=str(folder / "rows.csv"), length=64)}
    jaxlm.fit(run_of(folder, tmp_path / "one", distill_of(folder), **options))
    if how == "sharded":
        devices(4)
        options["mesh"] = MeshConfig(data=1, fsdp=2, tensor=2)
    options["accumulate"] = 2 if how == "accumulated" else 1
    jaxlm.fit(run_of(folder, tmp_path / "other", distill_of(folder, tmp_path / "cache"), **options))
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "other"), strict=True):
        for name, value in a.items():
            np.testing.assert_allclose(b[name], value, rtol=2e-3, err_msg=name)


SCRIPT = """
import sys
import jax
sys.path[:0] = [{tests!r}]
from pathlib import Path
import jaxlm
from jaxlm.data import example_cache
from test_distillation import run_of
from test_teacher_cache import distill_of
example_cache.MAX_PART_SECONDS = 0.0
folder, tmp = Path({folder!r}), Path({tmp!r})
jaxlm.fit(run_of(folder, tmp / "run", distill_of(folder, tmp / "cache")), summary=False)
"""


@pytest.mark.long
def test_a_run_that_is_killed_while_it_fills_its_cache_has_the_same_result(folder, tmp_path):
    script = tmp_path / "script.py"
    tests = str(Path(__file__).parent)
    script.write_text(SCRIPT.format(tests=tests, folder=str(folder), tmp=str(tmp_path)))
    wholes = tmp_path / "whole"
    wholes.mkdir()
    (wholes / "script.py").write_text(SCRIPT.format(tests=tests, folder=str(folder), tmp=str(wholes)))
    environment = os.environ | {"XLA_FLAGS": xla_flags(devices=1)}
    run = lambda script: subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert (result := run(wholes / "script.py")).returncode == 0, result.stderr
    for moment in ("cache/*.safetensors", "run/checkpoints/2"):
        process = subprocess.Popen([sys.executable, script], stderr=subprocess.DEVNULL, env=environment)
        while process.poll() is None and not [*tmp_path.glob(moment)]:
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL, moment
    assert (result := run(script)).returncode == 0, result.stderr
    assert_same_run(tmp_path / "run", wholes / "run")
    assert len([*(tmp_path / "cache").glob("*.safetensors")]) >= 1
    shutil.rmtree(tmp_path / "cache")


@pytest.mark.long
def test_two_hosts_fill_and_read_a_cache_as_one(start, run_alone, tmp_path):
    teacher = run_alone("classes")
    tokenizer = ("--tokenizer.path", teacher / "export", "--model.layers", 1)
    arguments = ("classes", *tokenizer, "--distill.teacher", teacher)
    one = run_alone(*arguments)
    for name in ("filled", "read"):
        first, second = start(
            2, *arguments, "--distill.cache", tmp_path / "cache", "--workdir", tmp_path / name, devices=1
        )
        assert (COMPUTED in first.wait(0)) == (name == "filled")
        assert second.wait(0) == ""
        assert_alike(tmp_path / name, one, rel=1e-5)


@pytest.mark.long
def test_packed_equals_unpacked_from_a_cache(tmp_path):
    """The predictions of an example move with its tokens."""
    task, module, params = distilled("questions", LOGITS, layers=3, width=24)
    cached = with_teacher(
        case("questions")[0], dataclasses.replace(LOGITS, cache=str(tmp_path)), module.config, task.teacher
    )
    batch = with_predictions(cached, module, params, batch_of("questions"))
    own = parameters.of_model(params)
    packed, unpacked = (run_losses(cached, module, own, one) for one in (batch, separate_rows(batch)))
    for name, (total, _) in packed.items():
        np.testing.assert_allclose(total, unpacked[name][0], rtol=1e-4, err_msg=name)
