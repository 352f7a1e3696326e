"""User-defined front ends, mixers, feed-forward layers, masks and gradients."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_params import random_params

from jaxlm import CausalLM, MeshConfig, ModelConfig, UserError
from jaxlm.data.batches import Epoch
from jaxlm.data.joined import join
from jaxlm.devices.sharding import make_mesh
from jaxlm.nn import parameters
from jaxlm.nn.block import FEED_FORWARDS, MIXERS
from jaxlm.nn.embeddings import FRONT_ENDS
from jaxlm.nn.layers import Linear
from jaxlm.nn.losses import cross_entropy
from jaxlm.nn.transformer import Transformer, apply, init
from jaxlm.run.assembly import closed_flops, shard_batch
from jaxlm.run.step import TrainState, make_train_step, summed_gradient
from jaxlm.tasks.pretraining import CausalLMTask
from jaxlm.tasks.states import example_states, hidden_states
from jaxlm.tasks.task import Task

TINY = ModelConfig(vocabulary=32, width=16, layers=3, heads=2, max_length=16, initial_std=0.2)
LENGTHS = (5, 4, 3)


class MeanOfEarlier(nn.Module):
    """A mixer: the mean of the tokens of the example up to each token."""

    config: ModelConfig
    constrain: Any
    dtype: Any = jnp.float32
    kernel: str = "auto"

    @nn.compact
    def __call__(self, x_BTD, layer, inputs, positions_BT, context=None, cache=None, weights=False):
        weights_BTS = inputs.mask_BTS / inputs.mask_BTS.sum(-1, keepdims=True)
        return Linear((self.config.width,), 0.2, name="own_value")(weights_BTS @ x_BTD), None, None


class Balanced(nn.Module):
    """A feed-forward layer with an auxiliary loss: the squares of its outputs, except for padding."""

    config: ModelConfig
    constrain: Any
    dtype: Any = jnp.float32

    entries = staticmethod(lambda config: config.width**2)

    @nn.compact
    def __call__(self, x_BTD, tokens_BT):
        y_BTD = Linear((self.config.width,), 0.2, name="own_out")(x_BTD)
        return y_BTD, {"balance": 0.1 * (jnp.square(y_BTD).mean(-1) * tokens_BT).sum()}


@pytest.fixture(autouse=True)
def register_layers(monkeypatch):
    monkeypatch.setitem(MIXERS, "mean", MeanOfEarlier)
    monkeypatch.setitem(FEED_FORWARDS, "balanced", Balanced)


def packed_batch() -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(1, 32, (2, 16)).astype(np.int32)
    segments = np.zeros((2, 16), np.int32)
    positions, start = np.zeros((2, 16), np.int32), 0
    for n, length in enumerate(LENGTHS, start=1):
        segments[:, start : start + length], positions[:, start : start + length] = n, np.arange(length)
        start += length
    labels = np.roll(tokens, -1, 1)
    return {
        "tokens_BT": tokens,
        "segments_BT": segments,
        "positions_BT": positions,
        "labels_BT": labels,
        "weights_BT": (segments > 0).astype(np.float32),
    }


def test_a_custom_mixer_supports_packing_and_is_causal():
    model = dataclasses.replace(TINY, mixer="mean")
    params, batch = random_params(model), packed_batch()
    assert parameters.rows_by_path(params)["decoder/layers/attention/own_value/kernel"].axes == ("layers", None, None)
    run = jax.jit(partial(apply, Transformer(model)))
    whole = run(params, batch["tokens_BT"], batch["segments_BT"], batch["positions_BT"])
    single = run(params, batch["tokens_BT"][:, 5:9])
    np.testing.assert_allclose(whole[:, 5:9], single, atol=1e-5)  # packed = unpacked
    states_of = lambda table: run(
        params | {"embeddings": params["embeddings"] | {"positions": table}}, jnp.array([[1, 2, 3]])
    )
    changed = params["embeddings"]["positions"].copy()
    changed[2, 0] += 1
    before, after = states_of(params["embeddings"]["positions"]), states_of(changed)
    np.testing.assert_array_equal(before[:, :2], after[:, :2])  # the third token changes nothing before it
    assert np.abs(before[:, 2] - after[:, 2]).max() > 1e-3


def make_step(model: ModelConfig, gradient=summed_gradient):
    task = CausalLMTask(CausalLM(stream=False), 16, 0, None, ())
    optimizer = optax.chain(optax.snapshot("grad_norm", optax.tree.norm), optax.sgd(0.1))
    params = random_params(model)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key_data(jax.random.key(0)))
    return jax.jit(make_train_step(task, Transformer(model), optimizer, lambda _: 0.1, gradient)), state


@pytest.mark.parametrize("k", [1, 2])
def test_an_auxiliary_loss_is_a_mean_over_tokens_and_is_minimised(k):
    model = dataclasses.replace(TINY, feed_forward="balanced")
    step, state = make_step(model)
    batch = {name: x.reshape(k, 2 // k, *x.shape[1:]) for name, x in packed_batch().items()}
    new, metrics = step(state, batch)
    # The expected loss is the sum of squares over the layers and tokens of the whole batch, divided by the tokens.
    task, flat = CausalLMTask(CausalLM(stream=False), 16, 0, None, ()), packed_batch()

    def objective(params):
        losses, _ = task.losses(Transformer(model), params, flat, jax.random.key(0))
        tokens = (flat["segments_BT"] > 0).sum()
        assert set(losses) == {"loss", "auxiliary/balance"} and losses["auxiliary/balance"][1] is not None
        return losses["loss"][0] / losses["loss"][1] + losses["auxiliary/balance"][0] / tokens

    value, gradient = jax.jit(jax.value_and_grad(objective))(state.params)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert 0 < metrics["auxiliary/balance"] < metrics["loss"]
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), new.params, expected)
    evaluated, _ = jax.jit(lambda params: task.losses(Transformer(model), params, flat, None))(state.params)
    assert "auxiliary/balance" not in evaluated


def test_auxiliary_losses_exclude_padding():
    model = dataclasses.replace(TINY, feed_forward="balanced")
    step, state = make_step(model)
    batch = packed_batch()
    more = batch | {"tokens_BT": np.where(batch["segments_BT"] > 0, batch["tokens_BT"], 7)}
    losses = [
        step(state, {name: x[None] for name, x in some.items()})[1]["auxiliary/balance"] for some in (batch, more)
    ]
    assert losses[0] == losses[1]


def per_row_gradient(limit: float):
    """Returns a custom gradient function, which clips the gradient of each row to a norm and adds the rows."""

    def gradient(objective, params, batch, key):
        rows = jax.tree.map(lambda x: x.reshape(-1, 1, *x.shape[2:]), batch)
        one = lambda row: jax.value_and_grad(objective, has_aux=True)(params, row, key)

        def clip(row):
            summed, grads = one(row)
            scale = jnp.minimum(1, limit / optax.tree.norm(grads))
            return summed, jax.tree.map(lambda g: g * scale, grads)

        return jax.tree.map(lambda x: x.sum(0), jax.lax.map(clip, rows))

    return gradient


def test_the_gradient_function_is_an_argument():
    batch = {name: x[None] for name, x in packed_batch().items()}
    (plain, state), (same, _), (clipped, _) = (
        make_step(TINY, gradient) for gradient in (summed_gradient, per_row_gradient(1e9), per_row_gradient(0.01))
    )
    (a, of_a), (b, of_b), (c, of_c) = (step(state, batch) for step in (plain, same, clipped))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), a.params, b.params)
    np.testing.assert_allclose(of_a["loss"], of_b["loss"], rtol=1e-6)
    assert of_c["grad_norm"] <= 2 * 0.01 * 1.001 and of_a["grad_norm"] > 0.1
    assert float(optax.tree.norm(jax.tree.map(jnp.subtract, c.params, state.params))) < 0.1 * 0.021


@pytest.mark.parametrize(("field", "name"), [("mixer", "atention"), ("feed_forward", "gatd")])
def test_an_unknown_name_is_refused(field, name):
    model = dataclasses.replace(TINY, **{field: name})
    with pytest.raises(UserError, match=rf"model.{field} is '{name}'; did you mean|model.{field} is '{name}'"):
        jax.eval_shape(partial(init, Transformer(model)), jax.random.key(0))


# Front ends, masks and hidden states


class Patches(nn.Module):
    """A front end: vectors of M numbers instead of tokens, with learned positions."""

    config: ModelConfig
    dtype: Any = jnp.float32

    field = "patches_BTM"
    M = 6

    @staticmethod
    def blank(config, B, T):
        return jnp.zeros((B, T, Patches.M))

    @nn.compact
    def __call__(self, patches_BTM, positions_BT, types_BT=None):
        table = self.param("own_positions", nn.initializers.normal(0.2), (self.config.max_length, self.config.width))
        return Linear((self.config.width,), 0.2, name="own_patches")(patches_BTM) + table[positions_BT]


class PatchExamples:
    """Examples of patches with a class each."""

    inputs = {"patches_BTM": np.float32}
    fields = {"labels_BE": np.int32}
    axes = {"M": Patches.M}
    labels = 0

    def epoch(self, n):
        random = np.random.default_rng(0)
        examples = [
            {"patches_BTM": random.standard_normal((length, Patches.M)).astype(np.float32), "labels_BE": length % 2}
            for length in (5, 4, 3, 7, 2)
        ]
        features = lambda units: join([examples[i] for i in units], lengths_of="patches_BTM")
        return Epoch(np.array([len(one["patches_BTM"]) for one in examples]), features)


class PatchTask(Task):
    """Classification of patches with the head `classes`."""

    head, max_examples = "classes", 4

    def examples(self, part, training):
        return PatchExamples()

    def weights(self, batch):
        return {"loss": batch["weights_BE"].sum()}

    def losses(self, module, params, batch, key):
        x_BTD, auxiliary = hidden_states(module, params, batch, key)
        logits_BEN = apply(module, params, example_states(x_BTD, batch, "mean"), method="classes")
        return {"loss": cross_entropy(logits_BEN, batch["labels_BE"], batch["weights_BE"]), **auxiliary}, {}

    def measure(self, lm, run_eval, batches, part):
        raise NotImplementedError


@pytest.fixture
def patches(monkeypatch) -> ModelConfig:
    monkeypatch.setitem(FRONT_ENDS, "patches", Patches)
    return dataclasses.replace(TINY, structure="encoder", heads_on_top=("classes",), front_end="patches")


def test_a_custom_front_end_supports_packing_sharding_and_flop_counts(patches, devices):
    task, params = PatchTask(), random_params(patches)
    batches = task.batches(None, 2, 12, None)
    batch = batches.batch_at(0)
    assert batch["patches_BTM"].shape == (2, 12, 6) and "tokens_BT" not in batch and len(batches) == 1
    run = jax.jit(lambda params, batch: task.losses(Transformer(patches), params, batch, None)[0]["loss"])
    loss, weight = run(params, batch)
    single = task.replace_fields(max_examples=1).batches(None, 5, 7, None).batch_at(0)  # one example per row
    assert single["segments_BT"].max() == 1 and weight == 5
    np.testing.assert_allclose(loss, run(params, single)[0], rtol=1e-5)
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    sharded = shard_batch(mesh, batch, 1)
    assert sharded["patches_BTM"].sharding.spec[1] is not None
    split = jax.jit(lambda params, batch: task.losses(Transformer(patches), params, batch, None)[0]["loss"])
    np.testing.assert_allclose(split(params, jax.tree.map(lambda x: x[0], sharded))[0], loss, rtol=1e-5)
    assert closed_flops(task, patches, 2, batch) > 0


@pytest.mark.parametrize("structure", ["decoder", "encoder"])
def test_embedding_and_stack_are_separate(structure):
    model = dataclasses.replace(TINY, structure=structure, heads_on_top=())
    params, batch, module = random_params(model), packed_batch(), Transformer(model)
    inputs = batch["tokens_BT"], batch["segments_BT"], batch["positions_BT"]
    x_BTD, extra = apply(module, params, *inputs, method="embed")
    np.testing.assert_array_equal(apply(module, params, x_BTD, extra, method="stack"), apply(module, params, *inputs))
    by_x_BTD = jax.grad(lambda x: apply(module, params, x, extra, method="stack")[0, 4].sum())(x_BTD)
    gradients = np.abs(by_x_BTD).max(-1)
    assert (gradients[0, :5] > 0).all() and not gradients[0, 5:].any() and not gradients[1].any()


@pytest.mark.parametrize("structure", ["decoder", "encoder"])
def test_a_mask_is_an_input(structure):
    """A mask hides keys in addition to segments and causality. A mask of ones has no effect."""
    model = dataclasses.replace(TINY, structure=structure, heads_on_top=())
    params, batch, module = random_params(model), packed_batch(), Transformer(model)
    inputs = batch["tokens_BT"], batch["segments_BT"], batch["positions_BT"]
    run = lambda mask_BTS: apply(module, params, *inputs, mask_BTS=mask_BTS)
    ones = np.ones((2, 16, 16), bool)
    np.testing.assert_allclose(run(ones), apply(module, params, *inputs), atol=1e-6)
    hidden_third = ones.copy()
    hidden_third[:, [0, 1, 3, 4], 2] = False  # only the third token of the first example attends to itself
    changed = batch["tokens_BT"].copy()
    changed[:, 2] = (changed[:, 2] + 1) % 31 + 1
    after = apply(module, params, changed, *inputs[1:], mask_BTS=hidden_third)
    others = [0, 1, *range(3, 12)]
    np.testing.assert_array_equal(run(hidden_third)[:, others], after[:, others])
    assert np.abs(run(hidden_third)[:, 2] - after[:, 2]).max() > 1e-3
