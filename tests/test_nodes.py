"""Parameter nodes: a model with nodes computes the same as the merged model, and trains the arrays that nodes name."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flags import OPTIMIZED
from random_params import random_params

import jaxlm
from jaxlm import AdapterConfig, CausalLM, MeshConfig, ModelConfig, OptimizerConfig, TokenizerConfig
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.devices import sharding
from jaxlm.lm import LM
from jaxlm.nn import nodes, parameters
from jaxlm.nn.low_rank import LowRank
from jaxlm.nn.masked import Masked
from jaxlm.nn.quantized import Quantized, quantize
from jaxlm.nn.transformer import Transformer, apply, unstack_layers
from jaxlm.run.assembly import TrainStep, with_shardings
from jaxlm.run.checkpoint import Checkpoints
from jaxlm.run.optimizer import make_schedule
from jaxlm.run.step import TrainState, make_train_step
from jaxlm.tasks.pretraining import CausalLMTask
from jaxlm.transforms import adapters

TINY = {"vocabulary": 48, "width": 16, "layers": 3, "heads": 2, "max_length": 32, "initial_std": 0.2}
MODELS = {
    "decoder": ModelConfig(**TINY, positions="rotary", feed_forward="gated"),
    "encoder": ModelConfig(**TINY, structure="encoder", heads_on_top=("masked_lm",), norm_place="post"),
    "encoder-decoder": ModelConfig(**TINY, structure="encoder_decoder", relative="buckets", positions="none"),
}
TOKENS_BT = np.random.default_rng(0).integers(1, 48, (2, 12)).astype(np.int32)


def projections(params, make):
    """Returns the parameters with `make(leaf, row, n)` in place of each projection."""
    rows = parameters.rows_by_path(params)
    paths = sorted(path for path, row in rows.items() if row.inputs)

    def one(key_path, leaf):
        path = parameters.path_of(key_path)
        return make(leaf, rows[path], paths.index(path)) if path in paths else leaf

    return jax.tree_util.tree_map_with_path(one, params)


def low_rank(leaf, row, n, of=lambda leaf, row: leaf):
    random, cut = np.random.default_rng(n), 1 + row.inputs
    draw = lambda *shape: jnp.asarray(0.1 * random.standard_normal(shape), jnp.float32)
    return LowRank(of(leaf, row), draw(*leaf.shape[:cut], 3), draw(leaf.shape[0], 3, *leaf.shape[cut:]), scale=2.0)


def masked(leaf, row, n):
    return Masked(leaf, jnp.asarray(np.random.default_rng(n).random(leaf.shape) < 0.5))


def dora(leaf, row, n):
    node = low_rank(leaf, row, n)
    return dataclasses.replace(node, magnitude=jnp.asarray(np.random.default_rng(n).random(node.b[:, 0].shape)))


KINDS = {
    "low-rank": low_rank,
    "low-rank with magnitudes": dora,
    "masked": masked,
    "quantized": lambda leaf, row, n: quantize(leaf, row.inputs),
    "low-rank over quantized": partial(low_rank, of=lambda leaf, row: quantize(leaf, row.inputs)),
}


def merge(params):
    """Returns the dense parameters, merged separately for each layer."""
    whole = lambda leaf: jax.vmap(lambda node: node.materialize())(leaf) if nodes.is_node(leaf) else leaf
    return jax.tree.map(whole, params, is_leaf=nodes.is_node)


def hidden(model, params):
    module = Transformer(model)
    named = {"target_tokens_BT": TOKENS_BT[:, ::-1]} if model.structure == "encoder_decoder" else {}
    return jax.jit(partial(apply, module))(params, TOKENS_BT, **named)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("decoder", kind) for kind in KINDS), *((name, "low-rank over quantized") for name in list(MODELS)[1:])],
)
def test_a_merged_model_equals_the_unmerged_one(name, kind):
    model = MODELS[name]
    dense = random_params(model)
    params = projections(dense, KINDS[kind])
    found = hidden(model, params)
    np.testing.assert_allclose(found, hidden(model, merge(params)), atol=2e-5)
    assert np.abs(found - hidden(model, dense)).max() > 1e-3  # the nodes have an effect
    if name == "decoder":
        np.testing.assert_allclose(hidden(model, unstack_layers(model, params)), found, atol=2e-5)


def test_nodes_may_replace_every_array():
    """Nodes may also replace embeddings, norms and heads, which read them as dense arrays."""
    model = dataclasses.replace(MODELS["decoder"], tied_embeddings=False)
    dense = random_params(model)
    params = jax.tree.map(lambda leaf: Masked(leaf, jnp.arange(leaf.size).reshape(leaf.shape) % 3 > 0), dense)
    logits = lambda params: apply(Transformer(model), params, hidden(model, params), method="lm")
    np.testing.assert_allclose(logits(params), logits(merge_all(params)), atol=2e-5)


def merge_all(params):
    return jax.tree.map(lambda node: node.materialize(), params, is_leaf=nodes.is_node)


def test_generation_with_nodes_equals_generation_with_merged_arrays():
    lm = LM(MODELS["decoder"], Transformer(MODELS["decoder"]), None, None)
    params = projections(random_params(lm.config), KINDS["low-rank over quantized"])
    tokenizer = tokenizers.train(["abcdefghijklmnopqrstuvwxyz "] * 4, TokenizerConfig(train="characters"), 48)
    with_params = lambda params: dataclasses.replace(lm, params=params, tokenizer=tokenizer)
    generate = lambda params: jaxlm.generate(with_params(params), ["abc", "d"], max_new_tokens=8, temperature=0)
    assert generate(params) == generate(merge(params))


def test_a_new_low_rank_update_has_no_effect_and_has_axes():
    params = random_params(MODELS["decoder"])
    new = adapters.add(params, AdapterConfig(4, targets="query,out"), jax.random.key(1))
    np.testing.assert_allclose(hidden(MODELS["decoder"], new), hidden(MODELS["decoder"], params), atol=1e-6)
    rows = parameters.rows_by_path(new)
    assert rows["decoder/layers/attention/query/kernel/a"].axes == ("layers", "width", None)
    assert rows["decoder/layers/attention/query/kernel/b"].axes == ("layers", None, "heads", "head_width")
    assert rows["decoder/layers/attention/out/kernel/a"].axes == ("layers", "heads", "head_width", None)
    assert rows["decoder/layers/attention/query/kernel/base"].axes == ("layers", "width", "heads", "head_width")
    with pytest.raises(jaxlm.UserError, match="no projection matches 'nothing'"):
        adapters.add(params, AdapterConfig(4, targets="nothing"), jax.random.key(1))
    with pytest.raises(jaxlm.UserError, match=r"rank is 17, but .* has the rank 16; choose at most 16"):
        adapters.add(params, AdapterConfig(17), jax.random.key(1))


def test_targets_select_projections_by_parts_of_their_paths():
    params = random_params(MODELS["encoder-decoder"])
    count = lambda targets: len(parameters.projections(params, targets))
    assert count("all") == count("attention,cross_attention,mlp") == count("encoder,decoder") > count("mlp")
    assert parameters.projections(params, "mlp/up") == ["decoder/layers/mlp/up/kernel", "encoder/layers/mlp/up/kernel"]
    assert count("cross_attention/query, up") == 3 and count("query") == 3
    nodes_params = projections(params, KINDS["low-rank over quantized"])
    assert parameters.projections(nodes_params) == parameters.projections(params)
    for targets in ("querry", "", "query,", "quer"):
        with pytest.raises(jaxlm.UserError, match=r"no projection matches .*; known: all, attention, .*query.*, up"):
            parameters.projections(params, targets)
    with pytest.raises(jaxlm.UserError, match="the model has no projections"):
        parameters.projections({"embeddings": params["embeddings"]})


def make_step(model, params, chosen, batch=TOKENS_BT):
    """Returns a step that trains the chosen leaves of `params`, its first state, and its batch."""
    settings = OptimizerConfig(rate=0.1, schedule="constant", warmup=0, weight_decay=0.0)
    part, frozen = parameters.split(params, chosen)
    optimizer = optax.chain(optax.snapshot("grad_norm", optax.tree.norm), optax.adam(0.1))
    task = CausalLMTask(CausalLM(), batch.shape[1], 0, None, ())
    state = TrainState(jnp.int32(0), part, optimizer.init(part), jax.random.key_data(jax.random.key(0)), frozen)
    step = make_train_step(task, Transformer(model), optimizer, make_schedule(settings, 10))
    fields = {
        "tokens_BT": batch,
        "segments_BT": np.ones_like(batch),
        "positions_BT": np.broadcast_to(np.arange(batch.shape[1], dtype=np.int32), batch.shape),
        "labels_BT": np.roll(batch, -1, 1),
        "weights_BT": np.ones(batch.shape, np.float32),
    }
    return step, state, {name: jnp.asarray(value)[None] for name, value in fields.items()}


@pytest.mark.parametrize("kind", ["masked", "low-rank over quantized"])
def test_a_step_trains_the_arrays_that_a_node_names(kind):
    model = MODELS["decoder"]
    params = projections(random_params(model), KINDS[kind])
    chosen = parameters.trained_in_nodes(params)
    step, state, batch = make_step(model, params, chosen)
    new, metrics = jax.jit(step)(state, batch)
    assert np.isfinite(metrics["loss"])
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), state.model, new.model)
    for path, is_trained in parameters.by_path(chosen).items():
        assert parameters.by_path(same)[path] != is_trained, path
    inner = [parameters.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(new.opt_state)]
    assert not [path for path in inner if path.endswith(("/base", "/mask", "/base/values", "/scales"))]
    # The gradient is that of the dense model, by the chain rule.
    loss = lambda params: step_loss(model, params, batch)
    of_nodes = jax.jit(jax.grad(lambda part: loss(parameters.join(part, state.frozen))))(state.params)
    of_dense = jax.jit(jax.grad(loss))(merge(params))
    expected = jax.vjp(lambda part: merge(parameters.join(part, state.frozen)), state.params)[1](of_dense)[0]
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-3), of_nodes, expected)


def step_loss(model, params, batch):
    task = CausalLMTask(CausalLM(), 12, 0, None, ())
    return task.losses(Transformer(model), params, {name: x[0] for name, x in batch.items()}, None)[0]["loss"][0]


def test_pruned_entries_stay_zero_over_steps():
    model = MODELS["decoder"]
    params = projections(random_params(model), masked)
    step, state, batch = make_step(model, params, parameters.trained_in_nodes(params))
    for _ in range(3):
        state, _ = jax.jit(step)(state, batch)
    for before, after in zip(*(jax.tree.leaves(p, is_leaf=nodes.is_node) for p in (params, state.model))):
        if nodes.is_node(after):
            assert not np.any(np.asarray(after.materialize())[~np.asarray(before.mask)])
            assert np.any(np.asarray(after.materialize() != before.materialize()))


DEEP = ModelConfig(vocabulary=32, width=128, layers=12, heads=2, max_length=16)


def step_memory(params) -> int:
    """Returns the bytes of temporary memory of a step that trains the factors and the scales of norms."""
    trained = lambda path, leaf: parameters.path_of(path).endswith(("/a", "/b", "norm/scale"))
    step, state, batch = make_step(
        DEEP, params, jax.tree_util.tree_map_with_path(trained, params), np.ones((1, 8), np.int32)
    )
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile(OPTIMIZED)
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.fixture(scope="module")
def plain() -> tuple[Any, int]:
    """Returns parameters without nodes, and the memory of their step."""
    params = jax.tree.map(jnp.asarray, random_params(DEEP))
    return params, step_memory(params)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_no_dense_copy_of_the_stack_is_made(kind, plain):
    """A compiled step requires no more temporary memory than one whose matrices are frozen arrays, except for the
    arrays of the nodes. On CPU, XLA copies stacked arrays of any kind before a scan, forward and backward."""
    params, memory = projections(plain[0], KINDS[kind]), plain[1]
    matrices = lambda params: [leaf for leaf in jax.tree.leaves(params["decoder"]["layers"]) if leaf.ndim > 2]
    dense, of_nodes = (sum(leaf.nbytes for leaf in matrices(tree)) for tree in (plain[0], params))
    assert (found := step_memory(params)) < memory + 2 * (of_nodes - dense) + 0.25 * dense, (found, memory)


def test_the_arrays_of_a_node_are_sharded():
    model = dataclasses.replace(MODELS["decoder"], width=32, vocabulary=64)
    mesh = sharding.make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    params = adapters.add(random_params(model), AdapterConfig(4), jax.random.key(0))
    sharded = with_shardings(jax.eval_shape(lambda p: TrainState(0, p, (), 0), params), mesh)
    specs = {path: leaf.sharding.spec for path, leaf in parameters.by_path(sharded.params).items()}
    P = jax.sharding.PartitionSpec
    assert specs["decoder/layers/mlp/up/kernel/base"] == P(None, "fsdp", "tensor")
    assert specs["decoder/layers/mlp/up/kernel/a"] == P(None, "fsdp", None)
    assert specs["decoder/layers/mlp/up/kernel/b"] == P(None, None, "tensor")


def test_a_checkpoint_omits_the_frozen_part(tmp_path):
    params = adapters.add(
        jax.tree.map(jnp.asarray, random_params(MODELS["decoder"])), AdapterConfig(2), jax.random.key(0)
    )
    of_adapters = parameters.trained_in_nodes(params, others=False)
    paths = [path for path, is_trained in parameters.by_path(of_adapters).items() if is_trained]
    assert paths and all(path.endswith(("/a", "/b")) for path in paths)
    _, state, _ = make_step(MODELS["decoder"], params, of_adapters)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1)
    checkpoints.save(state, None, {"note": 1})
    checkpoints.wait()
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    restored, notes = checkpoints.restore(like)
    checkpoints.close()
    assert notes == {"note": 1} and restored.frozen is None
    jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
    names = " ".join(str(file) for file in (tmp_path / "checkpoints").rglob("*"))
    assert "base" not in names


def test_a_train_step_shares_the_frozen_part():
    model = MODELS["decoder"]
    params = adapters.add(random_params(model), AdapterConfig(2), jax.random.key(0))
    step, state, batch = make_step(model, params, parameters.trained_in_nodes(params))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    compiled = TrainStep(step, jax.tree.map(lambda _: one, state), one)
    state = jax.tree.map(jnp.array, state)
    base = state.frozen
    new, _ = compiled(state, batch)
    assert all(a is b for a, b in zip(jax.tree.leaves(new.frozen), jax.tree.leaves(base)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(base))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_quantization_errors_are_at_most_half_a_step():
    array = np.random.default_rng(0).standard_normal((3, 8, 2, 4)).astype(np.float32)
    array[1, :, 0, 1] = 0
    node = quantize(jnp.asarray(array))
    assert isinstance(node, Quantized) and node.values.dtype == np.int8 and node.scales.shape == (3, 1, 2, 4)
    assert np.all(np.abs(node.materialize() - array) <= 0.5 * np.asarray(node.scales) + 1e-7)
    assert not np.any(np.asarray(node.materialize())[1, :, 0, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_has_the_merged_arrays(kind, tmp_path):
    model = MODELS["decoder"]
    lm = LM(model, Transformer(model), projections(random_params(model), KINDS[kind]))
    jaxlm.save(jaxlm.merge(lm, dequantize=True), tmp_path / "model")
    for found, expected in zip(
        jax.tree.leaves(jaxlm.load(tmp_path / "model").params), jax.tree.leaves(merge(lm.params))
    ):
        np.testing.assert_allclose(found, expected, atol=1e-6)
