"""Routed experts: equal to a loop over the experts, on every mesh, with losses that balance the load."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm import MeshConfig, ModelConfig, UserError
from jaxlm.devices import sharding
from jaxlm.devices.sharding import Placement
from jaxlm.families import PRESETS
from jaxlm.nn import experts, flops
from jaxlm.nn.experts import Experts, Matrices, mix_experts, route
from jaxlm.nn.transformer import Transformer, apply, init

X, D, F, k = 5, 16, 24, 2
TINY = ModelConfig(
    vocabulary=32,
    width=D,
    layers=2,
    heads=2,
    mlp_width=F,
    max_length=32,
    feed_forward="experts",
    experts=X,
    experts_per_token=k,
    activation="relu",
    initial_std=0.3,
)
SHAPES = Matrices((X, D, F), (X, D, F), (X, F, D))


def random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


MATRICES = Matrices(*[random(n, *shape) for n, shape in enumerate(SHAPES[:3])])


def loop(x_BTD, ids_BTk, weights_BTk, matrices: Matrices):
    """Multiplies all tokens by the matrices of all experts."""
    y_BTD = 0
    for n in range(X):
        hidden_BTF = jax.nn.relu(x_BTD @ matrices.gate_XDF[n]) * (x_BTD @ matrices.up_XDF[n])
        y_BTD += hidden_BTF @ matrices.down_XFD[n] * ((ids_BTk == n) * weights_BTk).sum(-1)[..., None]
    return y_BTD


def inputs(rows: int = 3, length: int = 17):
    ids = np.random.default_rng(3).integers(0, X + 1, (rows, length, k))  # the number X is no expert
    return random(4, rows, length, D), ids, random(5, rows, length, k)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("sizes", [(3, 17), (1, 1), (2, 64)], ids=str)
def test_grouped_products_equal_a_loop_over_the_experts(platform, sizes):
    x, ids, weights = inputs(*sizes)
    grouped = lambda x, weights, matrices: mix_experts(TINY, x, ids, weights, matrices, platform=platform)
    dense = lambda x, weights, matrices: loop(x, ids, weights, matrices)
    both = [
        jax.jit(jax.value_and_grad(lambda *args, f=f: jnp.square(f(*args)).sum(), (0, 1, 2)))(x, weights, MATRICES)
        for f in (grouped, dense)
    ]
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(both[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6 * scale), *both)


def test_equal_experts_are_one_dense_layer():
    """With normalised weights, the number of experts does not matter."""
    same = Matrices(*[jnp.broadcast_to(matrix[:1], matrix.shape) for matrix in MATRICES[:3]])
    x = random(4, 2, 9, D)
    routing = route(random(6, 2, 9, X), np.ones((2, 9), bool), TINY)
    found = mix_experts(TINY, x, routing.ids_BTk, routing.weights_BTk, same)
    expected = (np.maximum(x @ same.gate_XDF[0], 0) * (x @ same.up_XDF[0])) @ same.down_XFD[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_capacity_drops_the_last_tokens_of_an_expert_in_training_only():
    x, weights = random(4, 2, 6, D), np.ones((2, 6, 1), np.float32)
    ids = jnp.array([[0, 0, 0, 1, 0, 5], [0, 1, 2, 3, 4, 5]])[..., None]  # the tokens with number 5 are padding
    one = dataclasses.replace(TINY, experts_per_token=1)
    found = mix_experts(one, x, ids, weights, MATRICES, capacity=1.25)  # 1.25 x 12 / 5: three tokens of each expert
    kept = (ids != 0) | (jnp.cumsum(ids.ravel() == 0).reshape(ids.shape) <= 3)
    np.testing.assert_allclose(found, loop(x, ids, kept * weights, MATRICES), rtol=1e-4, atol=1e-4)
    model = dataclasses.replace(TINY, expert_capacity=0.4)
    params, tokens = random_params(model), np.arange(24).reshape(2, 12)
    run = partial(apply, Transformer(model), params, tokens)
    np.testing.assert_array_equal(run(), apply(Transformer(TINY), params, tokens))
    assert np.abs(run(key=jax.random.key(0)) - run()).max() > 1e-3


def test_losses_of_the_router():
    model = dataclasses.replace(TINY, balance_loss=0.5, router_z_loss=0.25, normalize_experts=False)
    logits, tokens = random(1, 3, 7, X), np.random.default_rng(0).random((3, 7)) < 0.7
    routing = route(logits, tokens, model)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-logits, -1)[..., :k]
    np.testing.assert_array_equal(np.where(tokens[..., None], chosen, X), routing.ids_BTk)
    np.testing.assert_allclose(routing.weights_BTk, np.take_along_axis(probabilities, chosen, -1), rtol=1e-5)
    load = np.bincount(chosen[tokens].ravel(), minlength=X) / (k * tokens.sum())
    balance = X * (load * probabilities[tokens].mean(0)).sum()
    np.testing.assert_allclose(routing.losses["balance"] / tokens.sum(), 0.5 * balance, rtol=1e-5)
    squares = np.square(np.log(np.exp(logits).sum(-1)))[tokens].mean()
    np.testing.assert_allclose(routing.losses["router_z"] / tokens.sum(), 0.25 * squares, rtol=1e-5)
    equal = route(np.zeros((1, X, X)) + 1e-3 * np.eye(X), np.ones((1, X), bool), dataclasses.replace(model, experts=X))
    np.testing.assert_allclose(equal.losses["balance"] / X, 0.5, rtol=1e-2)  # 1 for equal loads
    down = jax.grad(lambda logits: route(logits, tokens, model).losses["balance"])(logits)
    busiest = load.argmax()
    assert down[tokens][:, busiest].sum() > 0  # the loss lowers the logits of the busiest expert


CLAMPED = {"biases": ("experts",), "expert_limit": 0.5, "expert_offset": 1.0}


def test_biases_and_limits_of_experts_are_those_of_a_loop():
    model = dataclasses.replace(TINY, **CLAMPED)
    x, ids, weights = inputs()
    biases = random(7, X, F), random(8, X, F), random(9, X, D)
    expected = 0
    for n in range(X):
        gate = np.minimum(x @ MATRICES.gate_XDF[n] + biases[1][n], 0.5)
        up = np.clip(x @ MATRICES.up_XDF[n] + biases[0][n], -0.5, 0.5)
        y = ((up + 1) * np.maximum(gate, 0)) @ MATRICES.down_XFD[n] + biases[2][n]
        expected += y * ((ids == n) * weights).sum(-1)[..., None]
    for platform in ("cpu", "tpu"):
        found = mix_experts(model, x, ids, weights, Matrices(*MATRICES[:3], *biases), platform=platform)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


MESHES = [{"expert": 4}, {"expert": 2, "data": 2}, {"expert": 2, "fsdp": 2, "tensor": 2}, {"expert": 2, "context": 2}]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("rows", [8, pytest.param(1, marks=pytest.mark.long)])
def test_experts_on_a_mesh_equal_those_on_one_device(sizes, rows):
    count = int(np.prod(list(sizes.values())))
    if len(jax.devices()) < count:
        pytest.skip(f"needs {count} devices")
    model = dataclasses.replace(TINY, experts=4, balance_loss=0.1, router_z_loss=0.1, **CLAMPED)
    mesh = sharding.make_mesh(MeshConfig(**{"data": 1} | sizes), jax.devices()[:count])
    x_BTD, tokens = random(1, rows, 8, D), np.random.default_rng(0).random((rows, 8)) < 0.8
    params = Experts(model, Placement()).init(jax.random.key(0), x_BTD, tokens)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * random(2, *leaf.shape), params)

    def run(mesh):
        layer = Experts(model, Placement(mesh))

        def objective(params, x_BTD):
            y_BTD, losses = layer.apply(params, x_BTD, tokens)
            return jnp.sin(y_BTD).sum() + sum(losses.values()), (y_BTD, losses)

        return jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))(params, x_BTD)

    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), run(mesh), run(None))


def test_parameters_of_experts_are_sharded_over_their_axis():
    model = dataclasses.replace(PRESETS["mixtral-8x7b"], layers=2, vocabulary=32)
    sizes = {"data": 1, "fsdp": 2, "expert": 4, "context": 1, "tensor": 2}
    shapes = jax.eval_shape(lambda: init(Transformer(model), jax.random.key(0)))["decoder"]["layers"]["mlp"]["experts"]
    assert shapes["up"].shape == (2, 8, 4096, 14336)
    row = jaxlm.nn.parameters.find("decoder/layers/mlp/experts/down")
    assert sharding.spec(row.axes) == jax.sharding.PartitionSpec(None, "expert", "tensor", "fsdp")
    with pytest.raises(UserError, match=r"has experts 6, which the mesh splits 4 ways.*4, 8"):
        sharding.check(sizes, row.axes, (2, 6, 24, 16), "decoder/layers/mlp/experts/down")


def test_flops_of_experts():
    model = dataclasses.replace(TINY, shared_expert_width=8, shared_expert_gate=True)
    own = 3 * D * (k * F + 8) + D * X + D
    assert Experts.entries(model) == own
    dense = dataclasses.replace(TINY, feed_forward="gated", experts=0)
    more = 2 * TINY.layers * 3 * 11 * (own - 3 * D * F)
    assert flops.model_flops(model, 3, 11).total == flops.model_flops(dense, 3, 11).total + more
    x, ids, weights = inputs()
    mix = lambda platform: partial(mix_experts, TINY, ids_BTk=ids, weights_BTk=weights, platform=platform)
    count = lambda platform, f=lambda y: y: flops.count(
        jax.make_jaxpr(jax.grad(lambda x, m: f(mix(platform)(x, matrices=m)).sum(), (0, 1)))(x, MATRICES)
    )
    exact = 3 * 2 * 3 * 17 * k * 3 * D * F  # forward and backward pass
    assert count("tpu") == exact
    assert exact <= count("cpu") <= exact * 1.5  # with the blocks that are not full


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 0}, "model.experts is 0, and model.experts_per_token 2; there must be at least as many"),
        ({"experts_per_token": 6}, "model.experts is 5, and model.experts_per_token 6"),
        ({"expert_capacity": 0.0}, "model.expert_capacity is 0.0"),
        ({"feed_forward": "gated"}, "model.experts is 5 .* set --model.feed-forward experts"),
        ({"mlp_dropout": 0.1}, "experts have no dropout of activations.*mlp-out-dropout"),
        ({"shared_expert_gate": True}, "without a shared expert; set --model.shared-expert-width"),
    ],
    ids=str,
)
def test_wrong_settings(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **change).check()


def test_rows_of_few_tokens_read_only_the_matrices_of_their_experts():
    """In decoding, the blocks are not more than the tokens times their experts."""
    ids = np.array([[3, 1]])
    rows = experts.sort_by_expert(ids, 64, 1)
    assert len(rows.tokens_R) == 2 * rows.block
