"""Optimizers: weight decay, clipping, layer-wise rates, freezing and schedules, for each of four optimizers."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache, partial

import jax
import numpy as np
import optax
import pytest
from random_params import random_params

from jaxlm.config import MeshConfig, ModelConfig, OptimizerConfig
from jaxlm.devices import sharding
from jaxlm.nn import parameters
from jaxlm.nn.transformer import Transformer, apply, init
from jaxlm.run.assembly import with_shardings
from jaxlm.run.optimizer import make_optimizer, make_schedule, trained
from jaxlm.run.step import TrainState

LAYERS = 3
TINY = {"vocabulary": 16, "max_length": 8, "width": 8, "layers": LAYERS, "heads": 2}
MODELS = {
    "decoder": ModelConfig(**TINY),
    "encoder": ModelConfig(
        **TINY, structure="encoder", heads_on_top=("masked_lm", "next_sentence"), types=2, embedding_norm=True
    ),
    "encoder_decoder": ModelConfig(**TINY, structure="encoder_decoder", tied_embeddings=False, feed_forward="gated"),
}
NAMES = ("adamw", "adafactor", "lion", "muon")

# Adam with a huge epsilon is gradient descent: g / (|g| + epsilon) = g / epsilon, with a relative error of 1e-6.
SGD = OptimizerConfig(rate=1e6, epsilon=1e6, schedule="constant", warmup=0, weight_decay=0, clip=0)


@lru_cache
def params_of(structure: str):
    return random_params(MODELS[structure])


def gradients_of(structure: str, seed: int = 0):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda p: random.standard_normal(p.shape, np.float32), params_of(structure))


def by_path(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {parameters.path_of(path): np.asarray(leaf) for path, leaf in leaves}


def updates(config: OptimizerConfig, structure: str, *gradients, steps: int = 10):
    """Returns the updates by a sequence of gradients at fixed parameters, by path, and the last state."""
    params = params_of(structure)
    optimizer, chosen = make_optimizer(config, steps, params), trained(config, params)
    part = lambda tree: parameters.split(tree, chosen)[0]

    def run(params, *gradients):
        state, results = optimizer.init(params), []
        for g in gradients:
            update, state = optimizer.update(g, state, params)
            results.append(update)
        return results, state

    results, state = jax.jit(run)(*map(part, (params, *gradients)))
    zeros = {path: np.zeros_like(leaf) for path, leaf in by_path(params).items()}
    return [zeros | by_path(u) for u in results], state


def depth_of(path: str) -> str:
    """Returns the part of the model with this path, without the tested table."""
    if path.split("/")[0] in ("embeddings", "decoder_embeddings"):
        return "embeddings"
    return "layers" if "/layers/" in path else "head"


def test_adam_with_a_huge_epsilon_is_gradient_descent():
    g = gradients_of("decoder")
    ((found,), _) = updates(SGD, "decoder", g)
    for path, leaf in by_path(g).items():
        np.testing.assert_allclose(found[path], -leaf, rtol=1e-5, err_msg=path)


DECAYING = [*((name, "encoder") for name in NAMES), ("adamw", "decoder"), ("adamw", "encoder_decoder")]


@pytest.mark.parametrize(("name", "structure"), DECAYING)
def test_weight_decay_excludes_biases_and_norms(name, structure):
    config = OptimizerConfig(name=name, rate=0.1, weight_decay=0.5, schedule="constant", warmup=0)
    zero = jax.tree.map(np.zeros_like, params_of(structure))
    ((found,), _) = updates(config, structure, zero)
    for path, p in by_path(params_of(structure)).items():
        weight = path.split("/")[-1] in ("kernel", "tokens", "positions", "types")
        np.testing.assert_allclose(found[path], -0.1 * 0.5 * p * weight, rtol=1e-5, atol=1e-8, err_msg=path)


def test_gradients_are_clipped_to_their_global_norm():
    g = gradients_of("decoder")
    norm = math.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in jax.tree.leaves(g)))
    for clip in (1.0, 2 * norm):
        ((found,), state) = updates(replace(SGD, clip=clip), "decoder", g)
        np.testing.assert_allclose(optax.tree.get(state, "grad_norm"), norm, rtol=1e-5)  # before clipping
        for path, leaf in by_path(g).items():
            np.testing.assert_allclose(found[path], -leaf * min(1, clip / norm), rtol=1e-4, atol=1e-9, err_msg=path)


@pytest.mark.parametrize("structure", MODELS)
def test_each_layer_has_its_own_rate(structure):
    """Rates and decay are scaled by 1 for the head, d^(L + 1 - l) for layer l of 1..L and d^(L + 1) for embeddings."""
    d, g = 0.7, gradients_of(structure)
    ((plain,), _) = updates(replace(SGD, weight_decay=1e-6), structure, g)
    ((decayed,), _) = updates(replace(SGD, weight_decay=1e-6, layer_decay=d), structure, g)
    stacks = set()
    for path, leaf in plain.items():
        ratio = decayed[path] / leaf
        if depth_of(path) == "layers":
            stacks.add(path.split("/")[0])
            assert leaf.shape[0] == LAYERS
            for layer in range(LAYERS):
                np.testing.assert_allclose(ratio[layer], d ** (LAYERS - layer), rtol=1e-5, err_msg=f"{path} {layer}")
        else:
            expected = d ** (LAYERS + 1) if depth_of(path) == "embeddings" else 1
            np.testing.assert_allclose(ratio, expected, rtol=1e-5, err_msg=path)
    assert stacks == {"encoder", "decoder"} & set(params_of(structure))


@pytest.mark.parametrize("structure", MODELS)
def test_relative_updates_are_proportional_to_their_parameter(structure):
    """They are scaled by the root mean square of each layer, at least 1e-3. Weight decay does not change."""
    g = gradients_of(structure)
    ((plain,), _) = updates(replace(SGD, weight_decay=1e-6), structure, g)
    ((found,), _) = updates(replace(SGD, weight_decay=1e-6, relative=True), structure, g)
    ((decay,), _) = updates(replace(SGD, weight_decay=1e-6), structure, jax.tree.map(np.zeros_like, g))
    for path, p in by_path(params_of(structure)).items():
        axes = tuple(range(depth_of(path) == "layers", p.ndim))
        size = np.maximum(1e-3, np.sqrt(np.square(p, dtype=np.float64).mean(axes, keepdims=True)))
        expected = (plain[path] - decay[path]) * size + decay[path]
        np.testing.assert_allclose(found[path], expected, rtol=1e-4, atol=1e-7, err_msg=path)


FROZEN = {  # settings -> number of frozen layers
    "embeddings": ({"freeze": "embeddings"}, 0),
    "two layers": ({"freeze_layers": 2}, 2),
    "all layers": ({"freeze_layers": LAYERS}, LAYERS),
    "all but heads": ({"freeze": "all_but_heads"}, LAYERS),
    "a layer, with layer-wise rates": ({"freeze_layers": 1, "layer_decay": 0.5}, 1),
    "a layer, with relative updates": ({"freeze_layers": 1, "relative": True}, 1),
}


def assert_frozen(config: OptimizerConfig, structure: str, frozen_layers: int) -> None:
    gradients = [gradients_of(structure, seed) for seed in range(2)]
    results, state = updates(config, structure, *gradients)
    trained = []
    for path, g in by_path(gradients[1]).items():
        parts = {"embeddings": np.s_[:0], "layers": np.s_[frozen_layers:], "head": np.s_[:]}
        is_trained = np.zeros(g.shape, bool)
        is_trained[parts[depth_of(path)]] = True
        p = by_path(params_of(structure))[path]
        for update in results:
            # Frozen parameters are equal to the last bit.
            np.testing.assert_array_equal((p + update[path])[~is_trained], p[~is_trained], err_msg=path)
            assert np.all(np.isfinite(update[path]))
            assert np.any(update[path]) == is_trained.any(), path
            if depth_of(path) == "layers" and is_trained.any():
                is_changed = np.abs(update[path]).reshape(LAYERS, -1).max(1) > 0
                np.testing.assert_array_equal(is_changed, np.arange(LAYERS) >= frozen_layers, err_msg=path)
        trained.append(g[is_trained])
    norm = math.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in trained))
    np.testing.assert_allclose(optax.tree.get(state, "grad_norm"), norm, rtol=1e-5)

    # One moment for each trained leaf, and none for a frozen one.
    state_paths = [parameters.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    for path in by_path(gradients[0]):
        has_state = depth_of(path) == "head" or (depth_of(path) == "layers" and frozen_layers < LAYERS)
        assert (path in state_paths) == has_state, path
        if config.name == "adamw":
            assert state_paths.count(path) == 2 * has_state, path


@pytest.mark.parametrize(
    ("structure", "case"),
    # All cases for an encoder, and one for each other structure.
    [*(("encoder", case) for case in FROZEN), *((name, "all but heads") for name in MODELS if name != "encoder")],
)
def test_frozen_parameters_do_not_change_and_have_no_state(structure, case):
    settings, frozen_layers = FROZEN[case]
    assert_frozen(OptimizerConfig(schedule="constant", warmup=0, **settings), structure, frozen_layers)


@pytest.mark.parametrize("name", NAMES[1:])
def test_every_optimizer_freezes(name):
    assert_frozen(OptimizerConfig(name=name, schedule="constant", warmup=0, freeze_layers=1), "encoder", 1)


@pytest.mark.parametrize(
    ("structure", "name", "freeze_layers"),
    [
        *(("encoder", name, n) for name in NAMES for n in (0, 1)),
        ("decoder", "adamw", 0),
        ("encoder_decoder", "adamw", 1),
    ],
)
def test_moments_are_sharded_like_their_parameters(structure, name, freeze_layers):
    model = replace(MODELS[structure], width=128, mlp_width=128, vocabulary=128)  # large enough for factored moments
    mesh = sharding.make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    params = jax.eval_shape(partial(init, Transformer(model)), jax.random.key(0))
    config = OptimizerConfig(name=name, freeze_layers=freeze_layers)
    optimizer = make_optimizer(config, 10, params)
    part, frozen = parameters.split(params, trained(config, params))
    state = jax.eval_shape(lambda part: TrainState(0, part, optimizer.init(part), 0, frozen), part)
    sharded = with_shardings(state, mesh)
    split = {path: leaf.sharding.spec for path, leaf in parameters.by_path(sharded.model).items()}
    assert split["embeddings/tokens"] == jax.sharding.PartitionSpec("tensor", "fsdp")
    moments = 0
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(sharded.opt_state):
        path = parameters.path_of(key_path)
        if path in split and leaf.shape == parameters.by_path(params)[path].shape:
            assert leaf.sharding.spec == split[path], (path, key_path)
            moments += 1
        elif math.prod(leaf.shape) > 128 * LAYERS * 2:
            raise AssertionError(f"{key_path} {leaf.shape} is not sharded")
    if name != "adafactor":  # Adafactor keeps factors of the moments
        assert moments >= len(jax.tree.leaves(part))


def test_clipping_excludes_gradients_of_frozen_parameters():
    g = gradients_of("decoder")
    scaled = g | {"embeddings": jax.tree.map(lambda x: x * 1e6, g["embeddings"])}
    scaled = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            x * 1e6 ** (np.arange(LAYERS) < 1).reshape(-1, *[1] * (x.ndim - 1))
            if depth_of(parameters.path_of(path)) == "layers"
            else x
        ),
        scaled,
    )
    config = replace(SGD, clip=1.0, freeze_layers=1)
    ((expected,), _), ((found,), _) = updates(config, "decoder", g), updates(config, "decoder", scaled)
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)


# There are 100 steps with 10 of warm-up. The peak is 2, and the last rate is 0.5, a quarter of it.
SCHEDULES = {
    "constant": lambda step: 2.0,
    "linear": lambda step: 2.0 + (0.5 - 2.0) * (step - 10) / 90,
    "cosine": lambda step: 0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 90)),
    "inverse_sqrt": lambda step: 2.0 * math.sqrt(10 / step),
    "warmup_stable_decay": lambda step: 2.0 if step <= 80 else 2.0 - 1.5 * (step - 80) / 20,
}


def test_muon_splits_the_layers_over_the_devices():
    """The updates are those of one device, for a part of the work on each device."""
    params, gradients = params_of("encoder"), gradients_of("encoder")
    mesh = sharding.make_mesh(MeshConfig(data=LAYERS), jax.devices()[:LAYERS])
    whole = sharding.replicated(mesh)
    config = OptimizerConfig(name="muon", schedule="constant", warmup=0)

    def flops_and_updates(optimizer):
        update = lambda gradients, state: optimizer.update(gradients, state, params)
        inputs = gradients, optimizer.init(params)
        program = jax.jit(update, in_shardings=whole, out_shardings=whole).lower(*inputs).compile()
        return program.cost_analysis()["flops"], program(*jax.device_put(inputs, whole))[0]

    flops, found = flops_and_updates(make_optimizer(config, 10, params, mesh))
    all_flops, expected = flops_and_updates(make_optimizer(config, 10, params))
    assert flops < 0.6 * all_flops
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), found, expected)


@pytest.mark.parametrize("warmup", [0.1, 10])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_follow_their_formulas(name, warmup):
    schedule = make_schedule(OptimizerConfig(rate=2.0, schedule=name, warmup=warmup, final=0.25), 100)
    values = np.asarray(jax.jit(jax.vmap(schedule))(np.arange(101)))
    rise = 2.0 * (1 + 10 * np.arange(10) / 10) / 11  # the rate of the first step is not 0
    np.testing.assert_allclose(values[:10], rise, rtol=1e-6)
    assert values[0] == pytest.approx(2 / 11)
    np.testing.assert_allclose(values[10:], [SCHEDULES[name](step) for step in range(10, 101)], rtol=1e-6)
    assert values[10] == pytest.approx(2.0)
    if name in ("linear", "cosine", "warmup_stable_decay"):
        assert values[100] == pytest.approx(0.5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_without_warmup_start_at_the_peak_and_short_runs_are_finite(name):
    for steps in (1, 2, 3, 50):
        for warmup in (0.0, 0.5):
            config = OptimizerConfig(rate=2.0, schedule=name, warmup=warmup, final=0.0, decay_share=1.0)
            values = np.array([float(make_schedule(config, steps)(step)) for step in range(steps)])
            assert np.all(np.isfinite(values))
            assert np.all((values > 0) & (values <= 2.0)), (steps, warmup, values)
            assert warmup > 0 or values[0] == 2.0


def test_a_decay_longer_than_the_steps_after_warmup_ends_at_the_last_rate():
    config = OptimizerConfig(rate=2.0, schedule="warmup_stable_decay", warmup=0.1, decay_share=1.0, final=0.25)
    assert float(make_schedule(config, 100)(100)) == pytest.approx(0.5)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_learns_and_keeps_dtypes(name):
    model = replace(MODELS["decoder"], layers=2)
    config = OptimizerConfig(name=name, rate=0.01, schedule="constant", warmup=0)
    params, module = random_params(model, std=0.05), Transformer(model)
    optimizer = make_optimizer(config, 30, params)
    tokens = np.random.default_rng(0).integers(0, 16, (4, 8))

    def loss(params):
        logits = apply(module, params, apply(module, params, tokens[:, :-1]), method="lm")
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        update, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, update), state), value

    train = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), None, 30))
    (trained, _), losses = train(params)
    assert losses[-1] < 0.7 * losses[0], losses
    same = lambda a, b: a.dtype == b.dtype and a.shape == b.shape
    assert jax.tree.all(jax.tree.map(same, trained, params))


def newton_schulz(g: np.ndarray) -> np.ndarray:
    """Returns five steps of the quintic iteration on one matrix (Jordan et al. 2024), in float64."""
    x = g.astype(np.float64) / np.linalg.norm(g)
    transposed = x.shape[0] > x.shape[1]
    x = x.T if transposed else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if transposed else x


@pytest.mark.parametrize("structure", MODELS)
def test_muon_orthogonalises_the_matrix_of_each_layer_separately(structure):
    g = gradients_of(structure)
    # One layer is much larger than the others, which would have an effect if the layers shared a norm.
    g = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            x * 10.0 ** np.arange(LAYERS).reshape(-1, *[1] * (x.ndim - 1)).astype(np.float32)
            if depth_of(parameters.path_of(path)) == "layers"
            else x
        ),
        g,
    )
    config = replace(SGD, name="muon", rate=1.0, epsilon=1e-8)
    ((found,), _) = updates(config, structure, g)
    inputs = {"query": 1, "key": 1, "value": 1, "out": 2, "up": 1, "gate": 1, "down": 1}
    matrices = 0
    for path, leaf in by_path(g).items():
        parts = path.split("/")
        if depth_of(path) == "layers" and parts[-1] == "kernel":
            for layer in range(LAYERS):
                n = inputs[parts[-2]]
                matrix = leaf[layer].reshape(math.prod(leaf.shape[1 : 1 + n]), -1)
                expected = -0.2 * math.sqrt(max(matrix.shape)) * newton_schulz(matrix)
                np.testing.assert_allclose(found[path][layer].reshape(matrix.shape), expected, atol=2e-3, err_msg=path)
                singular = np.linalg.svd(newton_schulz(matrix), compute_uv=False)
                assert singular.max() < 1.3
                matrices += 1
        else:  # the first step of Adam is the sign of the gradient
            np.testing.assert_allclose(found[path], -np.sign(leaf), rtol=1e-4, atol=1e-4, err_msg=path)
    assert matrices >= 6 * LAYERS


ADAFACTOR = OptimizerConfig(name="adafactor", rate=1.0, schedule="constant", warmup=0, weight_decay=0, clip=0)
PROJECTIONS = {  # inputs and outputs of kernels, without the tested table
    **dict.fromkeys(("query", "key", "value"), lambda shape: (shape[0], math.prod(shape[1:]))),
    "out": lambda shape: (math.prod(shape[:-1]), shape[-1]),
}


@pytest.mark.long
@pytest.mark.parametrize("relative", [False, True])
def test_adafactor_treats_each_layer_as_optax_treats_its_matrix(relative):
    """A spike in one layer does not change the others, and the heads of a kernel are factored as one axis."""
    model = replace(MODELS["decoder"], width=128, heads=4, mlp_width=160, vocabulary=136)
    params = random_params(model)
    random = np.random.default_rng(0)
    draw = lambda p: random.standard_normal(p.shape, np.float32) * np.exp(random.standard_normal(p.shape, np.float32))
    gradients = [jax.tree.map(draw, params) for _ in range(3)]
    spiked = gradients[1]["decoder"]["layers"]["attention"]["query"]["kernel"]
    spiked[1, 3] *= 1e4
    optimizer = make_optimizer(replace(ADAFACTOR, relative=relative), 10, params)
    reference = optax.adafactor(1.0, multiply_by_parameter_scale=relative)

    def run(optimizer, params, gradients):
        state, results = optimizer.init(params), []
        for g in gradients:
            update, state = optimizer.update(g, state, params)
            results.append(update)
        return results, state

    def split_layers(tree) -> dict[str, np.ndarray]:
        """Returns each layer of each leaf separately, projections as matrices."""
        found = {}
        for path, leaf in by_path(tree).items():
            layers = enumerate(leaf) if depth_of(path) == "layers" else [("", leaf)]
            view = PROJECTIONS.get(path.split("/")[-2]) if path.endswith("kernel") else None
            found |= {f"{path} {n}": x.reshape(view(x.shape)) if view else x for n, x in layers}
        return found

    results, state = jax.jit(partial(run, optimizer))(params, gradients)
    expected, _ = jax.jit(partial(run, reference))(split_layers(params), [split_layers(g) for g in gradients])
    for update, other in zip(results, expected, strict=True):
        for name, value in split_layers(update).items():
            np.testing.assert_allclose(value, other[name], rtol=2e-4, atol=1e-7, err_msg=name)
    kernels = [leaf.size for path, leaf in by_path(params).items() if path.endswith("kernel")]
    kept = sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(state) if "kernel" in str(path))
    assert kept < 0.05 * sum(kernels)  # the state has rows and columns, and not entries
