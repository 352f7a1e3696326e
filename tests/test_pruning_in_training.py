"""Pruning while training: exact numbers of zeros that stay zero, with every optimizer and after a resume."""

from __future__ import annotations

import dataclasses
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_params import random_params
from test_runs import tensors

import jaxlm
from jaxlm import CausalLM, DataConfig, ModelConfig, OptimizerConfig, PruneConfig, RunConfig, TokenizerConfig, UserError
from jaxlm.config import AdapterConfig, MeshConfig
from jaxlm.devices import sharding
from jaxlm.errors import Stopped
from jaxlm.lm import LM
from jaxlm.nn import parameters
from jaxlm.nn.transformer import Transformer, init
from jaxlm.run.assembly import with_shardings
from jaxlm.run.fit import fit
from jaxlm.run.optimizer import make_optimizer, trained
from jaxlm.run.step import TrainState
from jaxlm.transforms.pruning import sparsity_of

MODEL = ModelConfig(vocabulary=64, max_length=32, width=16, layers=2, heads=2, feed_forward="gated")
STEPS = 12
SETTINGS = OptimizerConfig(rate=0.02, schedule="constant", warmup=0, weight_decay=0.1)


def gradient(step: int) -> Any:
    draw = np.random.default_rng(step)
    return jax.tree.map(lambda p: draw.standard_normal(p.shape).astype(np.float32), random_params(MODEL))


def train(prune: PruneConfig, settings: OptimizerConfig = SETTINGS, params: Any = None, steps: int = STEPS):
    """Returns the parameters by path, and the state, after each update with a sequence of gradients."""
    params = random_params(MODEL) if params is None else params
    optimizer = make_optimizer(settings, STEPS, params, prune=prune)
    part, frozen = parameters.split(params, trained(settings, params))
    state, found = optimizer.init(part), []

    @jax.jit
    def update(part, state, gradient):
        updates, state = optimizer.update(gradient, state, part)
        return optax.apply_updates(part, updates), state

    for step in range(steps):
        part, state = update(part, state, parameters.split(gradient(step), trained(settings, params))[0])
        found.append((parameters.by_path(parameters.join(part, frozen)), state))
    return found


def projections(leaves: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the projections as matrices [L, I, O]."""
    rows = {path: row for path in leaves if (row := parameters.find(path)) and row.inputs}
    matrix = lambda x, n: np.asarray(x).reshape(len(x), int(np.prod(x.shape[1 : 1 + n])), -1)
    return {path: matrix(leaves[path], row.inputs) for path, row in rows.items()}


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "name", ["adamw", "muon", pytest.param("lion", marks=LONG), pytest.param("adafactor", marks=LONG)]
)
def test_every_optimizer_ends_with_the_exact_sparsity(name):
    method = "movement" if name in ("adamw", "muon") else "magnitude"
    prune = PruneConfig(0.6, method, end=9, every=2)
    found = train(prune, dataclasses.replace(SETTINGS, name=name))
    before: dict[str, np.ndarray] = {}
    for n, (leaves, state) in enumerate(found, start=1):
        zero = {path: matrix == 0 for path, matrix in projections(leaves).items()}
        left = 1 - min(n - n % 2, 9) / 9 if n < 9 else 0.0
        for path, zero_LIO in zero.items():
            count = round(0.6 * zero_LIO[0].size)
            assert set(zero_LIO.sum((1, 2))) == {count - int(count * np.float32(left) ** 3)}, (n, path)
            assert not before or np.all(zero_LIO[before[path]])  # removed weights stay removed
        before = zero
        assert state.sparsity == pytest.approx(np.mean(np.concatenate([z.ravel() for z in zero.values()])), abs=1e-6)
    assert not any(np.any(np.asarray(leaf) == 0) for path, leaf in leaves.items() if path not in zero)


@pytest.mark.parametrize(
    "prune",
    [
        PruneConfig(0.6, scope="output", end=8, every=3),
        PruneConfig(0.6, scope="global", begin=2, end=8, every=3, targets="mlp"),
        PruneConfig(pattern="2:4", begin=0.25, end=1),
        PruneConfig(0.6, end=1),
    ],
    ids=lambda prune: f"{prune.scope} {prune.pattern} {prune.end}",
)
def test_scopes_patterns_and_windows(prune):
    if prune.end == 1:
        prune = dataclasses.replace(prune, begin=0.0)  # one removal, after the first step
    found = train(prune)
    begin, end = prune.window(STEPS)
    for n, (leaves, _) in enumerate(found, start=1):
        zero = {path: matrix == 0 for path, matrix in projections(leaves).items()}
        chosen = {path: z for path, z in zero.items() if prune.targets == "all" or "mlp" in path}
        assert not any(z.any() for path, z in zero.items() if path not in chosen)
        if n <= begin:
            assert not any(z.any() for z in zero.values())
        if n < end:
            continue
        for zero_LIO in chosen.values():
            if prune.pattern:
                L, width, outputs = zero_LIO.shape
                assert set(zero_LIO.reshape(L, width // 4, 4, outputs).sum(2).ravel()) == {2}
            elif prune.scope == "output":
                assert set(zero_LIO.sum(1).ravel()) == {round(0.6 * zero_LIO.shape[1])}
            elif prune.scope == "layer":
                assert set(zero_LIO.sum((1, 2))) == {round(0.6 * zero_LIO[0].size)}
        if prune.scope == "global":
            assert sum(z.sum() for z in chosen.values()) == round(0.6 * sum(z.size for z in chosen.values()))


def test_movement_removes_the_weights_that_move_towards_zero():
    """Sanh et al. 2020, equation 4; one removal, so that no score is affected by an earlier one."""
    found = train(PruneConfig(0.5, "movement", begin=5, end=6))
    weights = [random_params(MODEL), *(leaves for leaves, _ in found)]
    weights[0] = parameters.by_path(weights[0])
    path = "decoder/layers/mlp/up/kernel"
    terms = [np.asarray(w[path]) * parameters.by_path(gradient(n))[path] for n, w in enumerate(weights[:6])]
    scores_LN = -np.sum(terms, axis=0).reshape(2, -1)
    for layer in range(2):
        removed = np.asarray(found[5][0][path])[layer].ravel() == 0
        assert scores_LN[layer][removed].max() <= scores_LN[layer][~removed].min() + 1e-6


@pytest.mark.parametrize(
    "name", ["adafactor", "lion", pytest.param("adamw", marks=LONG), pytest.param("muon", marks=LONG)]
)
def test_zeros_of_the_first_weights_stay_zero(name):
    draw = np.random.default_rng(0)
    holes = lambda p: np.where(draw.random(p.shape) < 0.4, 0, p).astype(np.float32)
    params = jax.tree.map(holes, random_params(MODEL))
    for leaves, state in train(PruneConfig(keep_zeros=True), dataclasses.replace(SETTINGS, name=name), params, 3):
        zero = {path: matrix == 0 for path, matrix in projections(leaves).items()}
        for path, expected in projections(parameters.by_path(params)).items():
            np.testing.assert_array_equal(zero[path], expected == 0)
        scale = np.asarray(parameters.by_path(params)["decoder/layers/mlp_norm/scale"])
        assert np.any(np.asarray(leaves["decoder/layers/mlp_norm/scale"])[scale == 0])  # projections only
        assert 0.35 < state.sparsity < 0.45


def test_zeros_of_the_first_weights_are_part_of_the_sparsity():
    params = LM(MODEL, Transformer(MODEL), random_params(MODEL))
    params = jaxlm.prune(params, 0.3, scope="output").params
    found = train(PruneConfig(0.5, keep_zeros=True, scope="output", end=3, every=1), params=params)
    for path, before in projections(parameters.by_path(params)).items():
        first, last = (projections(found[n][0])[path] == 0 for n in (0, -1))
        assert np.all(first[before == 0]) and set(last.sum(1).ravel()) == {before.shape[1] // 2}


def test_removed_weights_have_no_gradient():
    """The norm of the gradient, by which it is clipped, is that of the pruned model."""
    params = jax.tree.map(np.zeros_like, random_params(MODEL))
    (_, state), *_ = train(PruneConfig(keep_zeros=True), params=params, steps=1)
    others = {path: g for path, g in parameters.by_path(gradient(0)).items() if path not in projections(by(params))}
    norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in others.values()))
    np.testing.assert_allclose(optax.tree.get(state, "grad_norm"), norm, rtol=1e-5)


by = parameters.by_path


def test_masks_are_sharded_like_their_parameters():
    mesh = sharding.make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    params = jax.eval_shape(partial(init, Transformer(MODEL)), jax.random.key(0))
    optimizer = make_optimizer(SETTINGS, STEPS, params, prune=PruneConfig(0.5, "movement"))
    state = jax.eval_shape(lambda params: TrainState(0, params, optimizer.init(params), 0), params)
    pruning = with_shardings(state, mesh).opt_state
    P = jax.sharding.PartitionSpec
    for tree, dtype in ((pruning.removed, bool), (pruning.movement, jnp.float32)):
        leaf = tree["decoder"]["layers"]["mlp"]["up"]["kernel"]
        assert leaf.sharding.spec == P(None, "fsdp", "tensor") and leaf.dtype == dtype


# Whole runs


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder, draw = tmp_path_factory.mktemp("pruned"), random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    (folder / "text.txt").write_text("".join(" ".join(draw.choices(words, k=12)) + "\n" for _ in range(120)))
    return folder


@pytest.fixture(autouse=True)
def private_cache(data_dir, monkeypatch, no_plots):
    monkeypatch.setenv("JAXLM_CACHE", str(data_dir / "cache"))


def run_config(data_dir: Path, workdir: Path, **more: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": MODEL,
        "task": CausalLM(),
        "data": DataConfig(path=str(data_dir / "text.txt"), length=32),
        "tokenizer": TokenizerConfig(train="characters"),
        "optimizer": OptimizerConfig(rate=1e-2),
        "prune": PruneConfig(0.5, "movement", end=8, every=2),
        "batch": 8,
        "steps": STEPS,
        "log_every": 4,
        "checkpoint_every": 3,
        "eval_every": 4,
        "keep_checkpoints": True,
        "sample_tokens": 0,
        "workdir": str(workdir),
    }
    return RunConfig(**values | more)


@pytest.mark.long
def test_a_resumed_run_has_the_same_zeros(data_dir, tmp_path, devices):
    whole = fit(run_config(data_dir, tmp_path / "whole"))
    run = run_config(data_dir, tmp_path / "run")
    for steps in (5, 2):  # during and between removals
        left = iter(range(steps - 1))
        with pytest.raises(Stopped):
            fit(run, stop=lambda: next(left, None) is None)  # noqa: B023
    lm = fit(run)
    a, b = tensors(tmp_path / "run"), tensors(tmp_path / "whole")
    assert a.keys() == b.keys() and [name for name in a if a[name] != b[name]] == []
    assert any("removed" in name for name in a) and any("movement" in name for name in a)
    assert set(sparsity_of(lm).values()) == {0.5} == set(sparsity_of(whole).values())
    assert set(sparsity_of(jaxlm.load(tmp_path / "run")).values()) == {0.5}
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["sparsity"] for row in rows if "sparsity" in row][-1] == 0.5
    # The zeros stay in a run that starts from the pruned model.
    tuned = run_config(
        data_dir, tmp_path / "tuned", model=None, init=str(tmp_path / "run"), prune=PruneConfig(keep_zeros=True)
    )
    for before, after in zip(jax.tree.leaves(lm.params), jax.tree.leaves(fit(tuned).params)):
        np.testing.assert_array_equal(np.asarray(before) == 0, np.asarray(after) == 0)


@pytest.mark.long
def test_only_checkpoints_with_the_final_sparsity_are_the_best(data_dir, tmp_path, devices):
    """A run whose loss rises keeps a later checkpoint, and is not stopped early before the last removal."""
    run = run_config(
        data_dir,
        tmp_path / "run",
        optimizer=OptimizerConfig(rate=0.5, schedule="constant", warmup=0, clip=0),
        eval_every=1,
        patience=1,
    )
    assert set(sparsity_of(fit(run)).values()) == {0.5}
    assert json.loads((tmp_path / "run" / "scores.json").read_text())["step"] >= 8


@pytest.mark.long
@pytest.mark.parametrize("accumulate", [1, 2])
def test_masks_are_the_same_on_several_devices_and_with_micro_batches(data_dir, tmp_path, devices, accumulate):
    zeros = []
    for n, mesh, k in ((1, MeshConfig(), 1), (4, MeshConfig(2, 2), accumulate)):
        devices(n)
        prune = PruneConfig(0.5, end=8, every=4)
        lm = fit(run_config(data_dir, tmp_path / f"run{n}", mesh=mesh, prune=prune, accumulate=k))
        zeros.append(jax.tree.map(lambda x: np.asarray(x) == 0, lm.params))
    jax.tree.map(np.testing.assert_array_equal, *zeros)


@pytest.mark.parametrize(
    ("prune", "match"),
    [
        ({"sparsity": 1.0}, "prune.sparsity is 1.0"),
        ({"sparsity": 0.5, "begin": 8, "end": 8}, "prune.begin is step 8 and prune.end is step 8"),
        ({"sparsity": 0.5, "begin": 9, "end": 8}, "begin must be before end"),
        ({"sparsity": 0.5, "end": 13}, "the run has 12 steps"),
        ({"pattern": "4:2"}, "prune.pattern is '4:2'"),
        ({"pattern": "2:4", "sparsity": 0.7}, "prune.sparsity is 0.7, but pattern 2:4 removes 0.5"),
        ({"every": 0, "sparsity": 0.5}, "prune.every is 0"),
        ({"method": "wanda", "sparsity": 0.5}, "prune.method is 'wanda'"),
        ({"sparsity": 0.99, "scope": "output"}, "leaves none"),
        ({"pattern": "2:5"}, "5 does not divide"),
        ({"sparsity": 0.5, "targets": "querry"}, "no projection matches 'querry'"),
    ],
)
def test_the_config_is_checked_before_anything_is_compiled(data_dir, tmp_path, devices, prune, match):
    with pytest.raises(UserError, match=match):
        fit(run_config(data_dir, tmp_path / "run", prune=PruneConfig(**prune)))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"adapter": AdapterConfig(2)}, "adapter.rank is 2, and prune is set"),
        ({"optimizer": OptimizerConfig(freeze="all_but_heads")}, "the optimizer freezes some"),
        ({"optimizer": OptimizerConfig(freeze_layers=1)}, "the optimizer freezes some"),
    ],
)
def test_pruning_requires_that_all_layers_are_trained(data_dir, tmp_path, fields, match):
    with pytest.raises(UserError, match=match):
        fit(run_config(data_dir, tmp_path / "run", **fields))


def test_a_run_in_epochs_is_checked_once_its_steps_are_known(data_dir, tmp_path, devices):
    run = run_config(data_dir, tmp_path / "run", epochs=0.1, prune=PruneConfig(0.5, end=500))
    with pytest.raises(UserError, match=r"prune.end is step 500, and the run has \d+ steps"):
        fit(run)
