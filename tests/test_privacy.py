"""Private training: clipped gradients, noise, Poisson samples, and the privacy loss."""

from __future__ import annotations

import dataclasses
import json
import warnings

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dp_accounting import pld

from jaxlm import (
    CausalLM,
    Classification,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MultiTask,
    OptimizerConfig,
    PrivacyConfig,
    RunConfig,
    Similarity,
    TokenizerConfig,
    UserError,
    fit,
)
from jaxlm.data.batches import Batches
from jaxlm.data.poisson import PoissonBatches
from jaxlm.devices import sharding
from jaxlm.errors import Stopped
from jaxlm.run import privacy
from jaxlm.run.assembly import assemble, shard_batch
from jaxlm.run.privacy import private_gradient
from jaxlm.run.resolve import resolve
from jaxlm.tasks.records import RecordExamples

ROWS, WIDTH, EXPECTED = 6, 5, 4


def objective(params, rows, key):
    """A loss whose value for several rows is the sum of the values for each row."""
    kept = jax.random.bernoulli(key, 0.5, (WIDTH,))
    x_BW = rows["x_BT"] * kept
    value = (jnp.tanh(x_BW @ params["w"]) ** 2).sum() + (params["b"] * x_BW.sum(-1)).sum()
    return value, {"loss": (value, jnp.float32(1))}


@pytest.fixture
def params():
    return {"w": jax.random.normal(jax.random.key(1), (WIDTH, 3)), "b": jnp.ones(()), "frozen": None}


@pytest.fixture
def batch():
    segments = jnp.ones((2, ROWS // 2, WIDTH), jnp.int32).at[1, 2].set(0)  # the last row is padding
    return {"x_BT": 3 * jax.random.normal(jax.random.key(2), (2, ROWS // 2, WIDTH)), "segments_BT": segments}


def row_key(key, row):
    return jax.random.fold_in(jax.random.fold_in(key, row // 3), row % 3)


def looped(params, batch, key, clip):
    """Returns the sum of the clipped gradients of the rows, one after the other."""
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    total = jax.tree.map(jnp.zeros_like, params)
    for row in range(ROWS - 1):
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], flat)
        grads = jax.grad(objective, has_aux=True)(params, one, row_key(key, row))[0]
        norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
        total = jax.tree.map(lambda t, g, norm=norm: t + g * min(1, clip / norm), total, grads)
    return total


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_the_gradient_is_the_sum_of_the_clipped_gradients_of_a_loop(params, batch, clip):
    key = jax.random.key(0)
    (value, losses), grads = jax.jit(private_gradient(clip, 0.0, EXPECTED), static_argnums=0)(
        objective, params, batch, key
    )
    expected = jax.tree.map(lambda g: g / EXPECTED, looped(params, batch, key, clip))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads, expected)
    assert losses["loss"][1] == ROWS - 1  # padding counts nowhere
    np.testing.assert_allclose(value, losses["loss"][0] / (ROWS - 1), rtol=1e-6)


def test_one_example_changes_the_sum_by_at_most_the_norm(params, batch):
    def total(batch):
        return private_gradient(0.5, 0.0, 1)(objective, params, batch, jax.random.key(0))[1]

    for scale in (1.0, 1e3, 1e30, jnp.nan):
        without = batch | {"segments_BT": batch["segments_BT"].at[0, 1].set(0)}
        changed = batch | {"x_BT": batch["x_BT"].at[0, 1].mul(scale)}
        difference = jax.tree.map(jnp.subtract, total(changed), total(without))
        assert float(optax.tree.norm(difference)) <= 0.5 + 1e-5


def test_the_sum_is_that_of_jax_privacy(params, batch):
    jax_privacy = pytest.importorskip("jax_privacy")
    rows = jax.tree.map(lambda x: x[:1], batch)
    without_key = lambda params, rows: objective(params, rows, row_key(jax.random.key(0), 0))[0]
    ours = private_gradient(0.5, 0.0, 2)(
        lambda params, rows, key: (without_key(params, rows), {}), params, rows, jax.random.key(0)
    )[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        reference = jax_privacy.clipped_grad(without_key, l2_clip_norm=0.5, normalize_by=2)
        theirs = reference(params, jax.tree.map(lambda x: x[0], rows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, theirs)


def test_the_noise_has_the_stated_standard_deviation_and_is_added_once(batch):
    params = {"w": jnp.zeros((200, 200))}
    constant = lambda params, rows, key: (jnp.float32(0), {})
    grads = private_gradient(0.5, 3.0, 4)(constant, params, batch, jax.random.key(0))[1]
    assert float(grads["w"].std()) == pytest.approx(3.0 * 0.5 / 4, rel=0.02)
    again, other = (private_gradient(0.5, 3.0, 4)(constant, params, batch, jax.random.key(n))[1] for n in (0, 1))
    assert (again["w"] == grads["w"]).all() and abs(np.corrcoef(other["w"].ravel(), grads["w"].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize(("noise", "rate", "steps"), [(0.8, 0.01, 100), (2.0, 0.1, 500)])
def test_epsilon_is_that_of_dp_accounting(noise, rate, steps):
    accountant = pld.PLDAccountant()
    accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), steps)
    assert privacy.epsilon(noise, rate, steps, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), abs=1e-6)
    assert privacy.epsilon(noise, rate, 0, 1e-5) == 0


def test_the_required_noise_reaches_the_bound_and_less_does_not():
    noise = privacy.required_noise(3.0, 0.01, 100, 1e-5)
    assert privacy.epsilon(noise, 0.01, 100, 1e-5) <= 3.0 < privacy.epsilon(0.99 * noise, 0.01, 100, 1e-5)


def test_a_bound_that_cannot_be_reached_names_what_would_reach_it():
    with pytest.raises(UserError, match=r"steps \(--steps\).*times as many examples.*--privacy.epsilon"):
        privacy.required_noise(0.02, 0.5, 100, 1e-3)


@pytest.mark.parametrize(("examples", "delta"), [(60_614, 1e-5), (1000, 9e-4), (3, 0.3), (1, 0.9)])
def test_delta_is_below_one_per_example(examples, delta):
    assert privacy.default_delta(examples) == pytest.approx(delta) and privacy.default_delta(examples) < 1 / examples


class Units:
    """100 units, one token each, whose token is their number."""

    fields: dict[str, type] = {}
    labels = 0

    def epoch(self, n):
        from jaxlm.data.batches import Epoch
        from jaxlm.data.joined import Joined

        return Epoch(np.ones(100, np.int64), lambda units: Joined(np.ones(len(units), np.int64), {"tokens_BT": units}))


def test_poisson_batches_contain_each_unit_with_the_same_probability():
    batches = PoissonBatches(Batches(Units(), 10, 4, 2, seed=3), expected=10)
    batches.rows = 40
    counts, sizes = np.zeros(100), []
    for step in range(2000):
        units = batches.units_of(step)
        assert len(set(units.tolist())) == len(units)
        counts[units] += 1
        sizes.append(len(units))
    assert np.abs(counts / 2000 - 0.1).max() < 4.5 * np.sqrt(0.09 / 2000)
    assert np.var(sizes) == pytest.approx(100 * 0.1 * 0.9, rel=0.1)  # binomial, not constant


def test_a_poisson_batch_depends_on_its_step_alone_and_holds_one_unit_in_a_row():
    batches, same = (PoissonBatches(Batches(Units(), 10, 4, 2, seed=3), expected=10) for _ in range(2))
    batches.rows = same.rows = 40
    batches.batch_at(0)
    batch, units = batches.batch_at(7), batches.units_of(7)
    assert all((same.batch_at(7)[name] == value).all() for name, value in batch.items())
    assert (batch["tokens_BT"][: len(units), 0] == units).all() and (batch["segments_BT"].sum(1) <= 1).all()
    part = batches.batch_at(7, rows=[1, 39])
    assert (part["tokens_BT"][1] == batch["tokens_BT"][1]).all() and part["segments_BT"].sum() == 1
    batches.rows = 3
    assert len(batches.units_of(7)) == 3  # a cut


def run_config(folder, name, **more):
    file = folder / "rows.jsonl"
    rows = ({"text": f"line {n} is {'good' if n % 2 else 'bad'}", "label": "no" if n % 2 else "yes"} for n in range(90))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {
        "model": ModelConfig(vocabulary=48, max_length=32, width=16, layers=1, heads=2, dropout=0.1),
        "task": Classification(names=("no", "yes")),
        "data": DataConfig(path=str(file), length=32),
        "tokenizer": TokenizerConfig(train="characters"),
        "optimizer": OptimizerConfig(rate=1e-2),
        "privacy": PrivacyConfig(noise=0.7, clip=0.5),
        "batch": 8,
        "accumulate": 2,
        "steps": 4,
        "log_every": 1,
        "checkpoint_every": 1,
        "keep_checkpoints": True,
        "seed": 123456789,
        "workdir": str(folder / name),
    }
    return RunConfig(**(fields | more))


def lines(folder, name):
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_a_resumed_run_equals_an_uninterrupted_one_and_spends_the_same(tmp_path, capsys):
    whole = fit(run_config(tmp_path, "whole"))
    steps = iter([False, True])
    with pytest.raises(Stopped):
        fit(run_config(tmp_path, "parts"), stop=lambda: next(steps))
    assert json.loads((tmp_path / "parts/export/privacy.json").read_text())["steps"] == 2
    with pytest.raises(UserError, match=r"privacy.noise: 0.9 \| 0.7"):
        fit(run_config(tmp_path, "parts", privacy=PrivacyConfig(noise=0.9, clip=0.5)))
    resumed = fit(run_config(tmp_path, "parts"))
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    spent = [[line["epsilon"] for line in lines(tmp_path, name) if "epsilon" in line] for name in ("whole", "parts")]
    rate = 8 / 80
    assert spent[0] == spent[1] == [privacy.epsilon(0.7, rate, step, 0.01) for step in (1, 2, 3, 4)]
    facts = json.loads((tmp_path / "whole/export/privacy.json").read_text())
    assert facts["epsilon"] == spent[0][-1] and facts["delta"] == 0.01
    assert f"epsilon {spent[0][-1]:.3f} at delta 0.01" in (tmp_path / "whole/summary.txt").read_text()
    assert f"epsilon {spent[0][-1]:.3f}" in capsys.readouterr().err


@pytest.mark.long
def test_a_step_on_a_mesh_equals_one_on_a_device(tmp_path):
    run, results = run_config(tmp_path, "run", model=ModelConfig(vocabulary=48, max_length=32, width=16, heads=2)), []
    for config, count in ((MeshConfig(), 1), (MeshConfig(data=2, fsdp=2), 4)):
        mesh = sharding.make_mesh(config, jax.devices()[:count])
        resolved = resolve(run, mesh=mesh)
        parts = assemble(resolved)
        state = parts.first_state(jax.random.key_data(jax.random.key(0)))
        state, metrics = parts.train_step(state, shard_batch(mesh, resolved.train.batch_at(0), run.accumulate))
        results.append(jax.device_get((state.params, metrics["loss"], metrics["grad_norm"])))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *results)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"privacy": PrivacyConfig(epsilon=3, noise=1)}, "give one of them"),
        ({"privacy": PrivacyConfig(epsilon=-1)}, "privacy.epsilon is -1"),
        ({"privacy": PrivacyConfig(epsilon=float("inf"))}, "privacy.epsilon is inf"),
        ({"privacy": PrivacyConfig(epsilon=1, clip=0)}, "privacy.clip is 0"),
        ({"privacy": PrivacyConfig(epsilon=1, delta=1.0)}, "privacy.delta is 1.0"),
        ({"privacy": PrivacyConfig(clip=0.1)}, "the run is not private"),
        ({"task": Similarity(objective="contrastive")}, "contrastive.*--task.objective cosine"),
        ({"task": Classification(class_weights="balanced")}, "class_weights"),
        ({"task": CausalLM()}, "task.stream"),
        ({"patience": 2}, "patience is 2.*--data.eval-path"),
        ({"attention": "splash"}, "--attention xla"),
        ({"task": MultiTask({})}, "."),
    ],
)
def test_what_a_private_run_cannot_have_is_refused(tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        run_config(tmp_path, "run", **more).check()


def test_errors_that_depend_on_the_data(tmp_path):
    with pytest.raises(UserError, match="batch is 800, and the data have 80"):
        fit(run_config(tmp_path, "run", batch=800))
    with pytest.raises(UserError, match=r"privacy\.noise is 0.01"):
        fit(run_config(tmp_path, "run", privacy=PrivacyConfig(noise=0.01)))
    windows = run_config(tmp_path, "run", task=Classification(names=("no", "yes"), windows="mean"))
    windows = dataclasses.replace(windows, data=dataclasses.replace(windows.data, length=8))
    with pytest.raises(UserError, match="units, because"):
        fit(windows)


def test_a_large_delta_and_an_obvious_seed_are_warned_about(tmp_path):
    seen: list[str] = []
    run = run_config(tmp_path, "run", privacy=PrivacyConfig(noise=1, delta=0.2), seed=0)
    examples = type("Examples", (RecordExamples,), {"__init__": lambda self: None})()
    train = type("Train", (), {"units": 81, "examples": examples})()
    privacy.resolve_budget(run, train, seen.append)
    assert any("delta 0.2 is not below 1 / 81" in line for line in seen)
    assert any("easy to guess" in line for line in seen)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    with pytest.raises(UserError, match=r"pip install 'jaxlm\[privacy\]'"):
        privacy.package("dp_accounting")
