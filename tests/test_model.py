"""Properties of the Transformer and of a training step, for a tiny model of every family."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

from jaxlm.config import CausalLM, MaskedLM, MeshConfig, ModelConfig, OptimizerConfig
from jaxlm.devices import sharding
from jaxlm.families import PRESETS
from jaxlm.nn import parameters
from jaxlm.nn.block import cached_window
from jaxlm.nn.layer_parts import parts_of
from jaxlm.nn.layers import Dropout
from jaxlm.nn.losses import cross_entropy
from jaxlm.nn.stack import CacheSpec
from jaxlm.nn.transformer import Transformer, apply, init
from jaxlm.run.assembly import shard_batch, with_shardings
from jaxlm.run.optimizer import make_optimizer, make_schedule
from jaxlm.run.step import TrainState, make_train_step
from jaxlm.tasks.pretraining import CausalLMTask, MaskedLMTask

SMALL = {"vocabulary": 96, "max_length": 32, "width": 24, "layers": 2, "heads": 3, "head_width": None}
SMALL |= {"dropout": 0.0, "attention_dropout": 0.0}
MIXED: dict[str, Any] = {"experts": 4, "expert_width": 18, "balance_loss": 0.0, "mixers": ("attention", "gru")}
MIXED |= {"feed_forwards": ("gated", *["experts"] * 4), "layer_kinds": ("global",)}
LATENT: dict[str, Any] = {"head_width": 10, "value_width": 6, "rotary_width": 4, "query_rank": 12, "key_value_rank": 12}
LATENT |= {"experts": 4, "experts_per_token": 2, "expert_groups": 2, "expert_groups_per_token": 1, "expert_width": 18}
LATENT |= {"shared_expert_width": 18, "feed_forwards": ("gated", "experts", "experts"), "layers": 3}
LONG = {"layer_windows": (2, 4), "global_tokens": "first", "padding_token": None}  # any token may occur
MODELS = {
    "gpt2": replace(PRESETS["gpt2"], **SMALL),
    "gpt3": replace(PRESETS["gpt3-xl"], **SMALL | {"head_width": 16}),
    "bert": replace(PRESETS["bert-base"], **SMALL),
    "transformer": replace(PRESETS["transformer-base"], **SMALL),
    "qwen3": replace(PRESETS["qwen3-8b"], **SMALL | {"heads": 6, "head_width": 4}, kv_heads=3, mlp_width=24),
    "mistral": replace(PRESETS["mistral-7b"], **SMALL, kv_heads=None, mlp_width=24, window=3),
    "gemma2": replace(PRESETS["gemma-2-2b"], **SMALL, kv_heads=3, mlp_width=24, window=3),
    "mixtral": replace(PRESETS["mixtral-8x7b"], **SMALL, kv_heads=3, mlp_width=24, experts=4, balance_loss=0.0),
    # A dense layer before those with experts, and two mixers in turn.
    "mixed": replace(PRESETS["mixtral-8x7b"], **SMALL | {"layers": 5}, **MIXED, kv_heads=3, mlp_width=24),
    "gpt_oss": replace(
        PRESETS["gpt-oss-20b"], **SMALL, kv_heads=3, mlp_width=24, window=3, experts=4, balance_loss=0.0
    ),
    "deepseek": replace(PRESETS["deepseek-v3"], **SMALL | LATENT, mlp_width=24, balance_loss=0.0),
    "phi": replace(PRESETS["phi-3-mini"], **SMALL, kv_heads=None, mlp_width=24, window=3, rotary_width=6),
    "olmo2": replace(PRESETS["olmo-2-1b"], **SMALL, kv_heads=3, mlp_width=24),
    "granite": replace(PRESETS["granite-3.1-2b"], **SMALL, kv_heads=3, mlp_width=24, attention_scale=0.2),
    "smollm3": replace(PRESETS["smollm3-3b"], **SMALL | {"layers": 5}, kv_heads=3, mlp_width=24),
    "pythia": replace(PRESETS["pythia-70m"], **SMALL, rotary_width=4),
    "gptj": replace(PRESETS["gpt-j-6b"], **SMALL, rotary_width=4),
    "opt": replace(PRESETS["opt-350m"], **SMALL, embedding_width=20),
    "bloom": replace(PRESETS["bloom-560m"], **SMALL),
    "falcon": replace(PRESETS["falcon-rw-1b"], **SMALL, kv_heads=3),
    "t5": replace(PRESETS["t5-small"], **SMALL | {"head_width": 4}, mlp_width=24, relative_buckets=8),
    "bart": replace(PRESETS["bart-base"], **SMALL),
    "led": replace(PRESETS["led-base-16384"], **SMALL, window=3, decoder_max_length=24, global_tokens="first"),
    "longformer": replace(PRESETS["longformer-base-4096"], **SMALL, **LONG),
    "m2m_100": replace(PRESETS["m2m100-418m"], **SMALL, mlp_width=24, padding_token=None),  # any token may occur
    # One complete cycle of kinds, and an incomplete one.
    "modernbert": replace(PRESETS["modernbert-base"], **SMALL | {"layers": 4}, mlp_width=24, window=3),
    "albert": replace(PRESETS["albert-base"], **SMALL | {"layers": 4}, mlp_width=24, distinct_layers=2),
    "xlnet": replace(PRESETS["xlnet-base"], **SMALL, heads_on_top=("masked_lm",)),
    "mpnet": replace(PRESETS["mpnet-base"], **SMALL, padding_token=None),  # any token may occur
    "nomic-bert": replace(PRESETS["nomic-bert"], **SMALL),
    "gte": replace(PRESETS["gte-large-en-v1.5"], **SMALL, mlp_width=36),
    "deberta": replace(PRESETS["deberta-v3-base"], **SMALL, relative_buckets=4, relative_distance=8, conv_width=3),
    "lstm": replace(PRESETS["lstm-lm"], **SMALL),
    "gru": replace(PRESETS["gru-seq2seq"], **SMALL),
}
CAUSAL = [name for name, model in MODELS.items() if model.structure != "encoder"]
QUICK = ("gpt2", "bert", "qwen3", "t5")  # the tests of the other models are marked long
B, T = 4, 16
SHORT = 7  # length of single sequences; a packed row contains two of them


def mark_long(*values: Any, fast: tuple[str, ...] = QUICK) -> Any:
    """Returns the values as a parameter, marked long if the first value, a model, is not in `fast`."""
    return pytest.param(*values, marks=() if values[0] in fast else pytest.mark.long)


@pytest.fixture(scope="module", params=map(mark_long, MODELS))
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name) -> ModelConfig:
    return MODELS[name]


@lru_cache
def params_of(name: str):
    return random_params(MODELS[name])


@pytest.fixture(scope="module")
def params(name):
    return params_of(name)


def packed_batch(model: ModelConfig, B: int = B) -> dict[str, np.ndarray]:
    """Returns B rows of two or three examples with padding of different lengths."""
    random = np.random.default_rng(0)
    batch = {field: np.zeros((B, T), np.int32) for field in ("tokens_BT", "segments_BT", "positions_BT", "types_BT")}
    batch["labels_BT"] = random.integers(0, model.vocabulary, (B, T), dtype=np.int32)
    batch["weights_BT"] = np.zeros((B, T), np.float32)
    batch |= {field: np.zeros((B, 4), np.int32) for field in ("starts_BE", "labels_BE")}
    batch["weights_BE"] = np.zeros((B, 4), np.float32)
    for b in range(B):
        start = 0
        for e, length in enumerate(random.integers(2, 6, random.integers(1, 4))):
            at = np.s_[b, start : start + length]
            batch["tokens_BT"][at] = random.integers(0, model.vocabulary, length)
            batch["segments_BT"][at] = e + 1
            batch["positions_BT"][at] = np.arange(length)
            batch["types_BT"][at] = random.integers(0, 2, length) if model.types else 0
            predicted = random.random(length) < (1.0 if model.structure != "encoder" else 0.3)
            batch["weights_BT"][at] = predicted
            batch["starts_BE"][b, e], batch["weights_BE"][b, e] = start, 1
            batch["labels_BE"][b, e] = random.integers(2)
            start += length
    return batch


class Seq2Seq:
    """A minimal task for an encoder-decoder: the source is also the target."""

    def losses(self, module, params, batch, key):
        source = batch["tokens_BT"], batch["segments_BT"], batch["positions_BT"], None
        x = apply(module, params, *source, *source[:3], key=key)
        logits = apply(module, params, x, method="lm")
        return {"loss": cross_entropy(logits, batch["labels_BT"], batch["weights_BT"])}, {}

    def weights(self, batch):
        return {"loss": batch["weights_BT"].sum()}


def task_of(model: ModelConfig):
    special = type("Special", (), {"cls": 1, "sep": 2, "mask": 3, "bos": 4, "eos": 5})
    if model.structure == "encoder_decoder":
        return Seq2Seq()
    if model.structure == "encoder":
        pairs = "next_sentence" in model.heads_on_top
        return MaskedLMTask(MaskedLM(next_sentence=pairs), T, 0, special).replace_fields(predictions=T)
    return CausalLMTask(CausalLM(stream=False), T, 0, special)  # several examples in a row


@lru_cache
def hidden_states(name: str):
    """Returns a compiled function from (params, tokens, segments, positions, types) to hidden states.

    In an encoder-decoder the source is also the target.
    """
    module = Transformer(MODELS[name])

    def states(params, tokens, segments=None, positions=None, types=None):
        target = (tokens, segments, positions) if module.config.structure == "encoder_decoder" else ()
        return apply(module, params, tokens, segments, positions, types, *target)

    return jax.jit(states)


@lru_cache
def gradient(name: str, dtype=jnp.float32, **choices):
    """Returns a compiled function from (params, batch) to the losses (sum, weight) and the gradient."""
    task, module = task_of(MODELS[name]), Transformer(MODELS[name], dtype=dtype, **choices)

    def objective(params, batch):
        losses, _ = task.losses(module, params, batch, None)
        return sum(losses[n][0] / total for n, total in task.weights(batch).items()), losses

    def both(params, batch):
        (_, losses), grads = jax.value_and_grad(objective, has_aux=True)(params, batch)
        return losses, grads

    return jax.jit(both)


@lru_cache
def reference(name: str):
    """Returns the losses and the gradient of the family's batch with default options."""
    return jax.device_get(gradient(name)(params_of(name), packed_batch(MODELS[name])))


def test_a_decoder_is_causal_and_an_encoder_attends_to_all(model, params):
    """Checks the derivatives of the state at each position with respect to the embedding of each token."""
    tokens = np.arange(10, 10 + SHORT)[None]
    width = model.W if model.project_tokens else model.width  # of the states that the heads read
    directions = np.zeros((SHORT, SHORT, width), np.float32)  # one for each position
    directions[np.arange(SHORT), np.arange(SHORT)] = np.random.default_rng(0).standard_normal((SHORT, width))

    def derivatives(params, directions):
        def states(table):
            changed = params | {"embeddings": params["embeddings"] | {"tokens": table}}
            if model.structure == "encoder_decoder":
                return apply(Transformer(model), changed, tokens * 0 + 3, None, None, None, tokens)[0]
            return apply(Transformer(model), changed, tokens)[0]

        _, pull_back = jax.vjp(states, params["embeddings"]["tokens"])
        return jax.vmap(pull_back)(directions)[0]

    derivative_TVD = np.asarray(jax.jit(derivatives)(params, directions))
    attends_TS = (derivative_TVD[:, tokens[0]] != 0).any(-1)
    expected = np.ones((SHORT, SHORT), bool)
    if model.layer_kinds == ("local",) and model.structure == "decoder":  # each layer extends the reach by its window
        expected = np.tri(SHORT, k=0) > np.tri(SHORT, k=-1 - model.layers * (model.window - 1))
    np.testing.assert_array_equal(attends_TS, expected if model.structure == "encoder" else np.tril(expected))


def test_packed_examples_equal_padded_ones(name, model, params):
    batch = packed_batch(model)
    inputs = [batch[f] for f in ("tokens_BT", "segments_BT", "positions_BT", "types_BT")]
    packed = np.asarray(hidden_states(name)(params, *inputs))
    examples = [(b, e) for b in range(B) for e in range(1, batch["segments_BT"][b].max() + 1)]
    assert len(examples) > B
    for chunk in (examples[i : i + B] for i in range(0, len(examples), B)):  # one example per row
        single = [np.zeros_like(x) for x in inputs]
        for row, (b, e) in enumerate(chunk):
            here = batch["segments_BT"][b] == e
            for field, x in zip(single, inputs):
                field[row, : here.sum()] = x[b, here]
            single[1][row, : here.sum()] = 1
        states = np.asarray(hidden_states(name)(params, *single))
        for row, (b, e) in enumerate(chunk):
            here = batch["segments_BT"][b] == e
            np.testing.assert_allclose(packed[b, here], states[row, : here.sum()], atol=2e-5, rtol=1e-4)


def test_packed_examples_equal_unpadded_ones(name, model, params):
    tokens = np.random.default_rng(0).integers(0, model.vocabulary, (2, SHORT), dtype=np.int32)
    single = hidden_states(name)(params, tokens)
    fields = np.zeros((4, B, T), np.int32)
    fields[0, 0, : 2 * SHORT] = tokens.ravel()
    fields[1, 0, : 2 * SHORT] = np.repeat([1, 2], SHORT)
    fields[2, 0, : 2 * SHORT] = np.tile(np.arange(SHORT), 2)
    packed = np.asarray(hidden_states(name)(params, *fields))[0, : 2 * SHORT].reshape(single.shape)
    np.testing.assert_allclose(packed, single, atol=2e-5, rtol=1e-4)


def test_padding_has_no_effect_and_no_gradient(name, model, params):
    batch = packed_batch(model)
    batch["tokens_BT"] = np.where(batch["segments_BT"] > 0, batch["tokens_BT"], 5)
    losses, grads = jax.device_get(gradient(name)(params, batch))
    jax.tree.map(np.testing.assert_array_equal, (losses, grads), reference(name))


REMATS = [{"remat": "full"}, {"remat": "dots", "unroll": 2}, {"remat": "offload"}, {"remat": "elementwise"}]
# GPT-2 is tested with all of them, and each other model with one.
REMAT_CASES = [("gpt2", choices) for choices in REMATS]
REMAT_CASES += [mark_long(name, REMATS[n % 4], fast=()) for n, name in enumerate(MODELS) if name != "gpt2"]


@pytest.mark.parametrize(("name", "choices"), REMAT_CASES, ids=str)
def test_remat_and_unrolling_change_no_gradient(name, choices):
    chosen = gradient(name, **choices)(params_of(name), packed_batch(MODELS[name]))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-3), reference(name), chosen)


# A large epsilon makes Adam's update smooth in the gradient, so that rounding errors stay small.
SETTINGS = OptimizerConfig(rate=0.01, schedule="constant", warmup=0, epsilon=1.0)


def one_step(model: ModelConfig, params, batch, accumulate: int, mesh: jax.sharding.Mesh):
    module = Transformer(model, sharding.Placement(mesh))
    optimizer = make_optimizer(SETTINGS, 10, params)
    key = jax.random.key_data(jax.random.key(0))

    def first_state(params):
        return TrainState(jnp.int32(0), params, optimizer.init(params), key)

    like = with_shardings(jax.eval_shape(first_state, params), mesh)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)._replace(params=params, key=key)
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, like))
    step = jax.jit(make_train_step(task_of(model), module, optimizer, make_schedule(SETTINGS, 10)))
    return step(state, shard_batch(mesh, batch, accumulate))


def assert_is_the_reference_step(name: str, step) -> None:
    """Compares with AdamW's first update in closed form, from the gradient of the whole batch on one device."""
    losses, grads = reference(name)
    params, decays = params_of(name), parameters.rows(params_of(name))
    norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in jax.tree.leaves(grads)))

    def updated(p, g, row):
        g = g * min(1, SETTINGS.clip / norm)
        direction = g / (np.abs(g) + SETTINGS.epsilon) + SETTINGS.weight_decay * row.decays * p
        return p - SETTINGS.rate * direction

    state, metrics = jax.device_get(step)
    is_row = lambda x: isinstance(x, parameters.Parameter)
    expected = jax.tree.map(updated, params, grads, decays, is_leaf=is_row)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-6, rtol=1e-4), state.params, expected)
    means = {n: s / w for n, (s, w) in losses.items()}
    names = task_of(MODELS[name]).weights(packed_batch(MODELS[name]))
    found = {"loss": sum(means[n] for n in names), "grad_norm": norm} | (means if len(means) > 1 else {})
    for n, value in found.items():
        if n in metrics:
            np.testing.assert_allclose(metrics[n], value, rtol=1e-4, err_msg=n)
    segments = packed_batch(MODELS[name])["segments_BT"]
    assert metrics["tokens"] == (segments > 0).sum()
    assert metrics["examples"] == segments.max(1).sum()
    assert state.step == 1


ONE = partial(sharding.make_mesh, MeshConfig(1))


@pytest.mark.parametrize("name", [mark_long(name, fast=("gpt2", "t5")) for name in MODELS])
def test_micro_batches_equal_the_large_batch(name):
    model = MODELS[name]
    step = one_step(model, params_of(name), packed_batch(model), 4, ONE(jax.devices()[:1]))
    assert_is_the_reference_step(name, step)


MESHES = [(1, 2, 3), (4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 3)]
SHARDED = [mark_long(name, MESHES[0], fast=("qwen3", "t5")) for name in MODELS]
SHARDED += [pytest.param(name, MESHES[1 + n % 4], marks=pytest.mark.long) for n, name in enumerate(MODELS)]


@pytest.mark.parametrize(("name", "sizes"), SHARDED, ids=str)
def test_a_sharded_step_equals_an_unsharded_one(name, sizes):
    count = int(np.prod(sizes))
    if len(jax.devices()) < count:
        pytest.skip(f"needs {count} devices")
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[:count])
    assert_is_the_reference_step(name, one_step(MODELS[name], params_of(name), packed_batch(MODELS[name]), 1, mesh))


WIDE = {"width": 32, "heads": 8, "kv_heads": None, "head_width": None, "mlp_width": 32}
EIGHT = {name: replace(MODELS[name], **WIDE) for name in ("bert", "qwen3", "mistral", "bloom", "t5", "bart", "deberta")}
POWERS = [tuple(1 << n for n in powers) for powers in product(range(4), repeat=4) if sum(powers) == 3]
SOME = {"bert": [(1, 2, 2, 2)]}
SHAPES = [
    pytest.param(name, sizes, marks=() if sizes in SOME.get(name, ()) else pytest.mark.long)
    for name in EIGHT
    for sizes in POWERS
    if name == "bert" or sizes[3] == 2 or sizes in SOME.get(name, ())  # the other models only with context 2
]


@lru_cache
def single_device_step(name: str):
    model = EIGHT[name]
    return jax.device_get(one_step(model, random_params(model), packed_batch(model, 8), 1, ONE(jax.devices()[:1])))


@pytest.mark.parametrize(("name", "sizes"), SHAPES, ids=str)
def test_a_step_on_every_mesh_equals_the_step_on_one_device(name, sizes):
    """The meshes have the axes data x fsdp x tensor x context."""
    model = EIGHT[name]
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[:8])
    step = jax.device_get(one_step(model, random_params(model), packed_batch(model, 8), 1, mesh))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-6, rtol=1e-4), single_device_step(name), step)


@pytest.mark.parametrize("name", list(map(mark_long, CAUSAL)))
def test_cached_decoding_equals_uncached_decoding(name):
    model, params = MODELS[name], params_of(name)
    module = Transformer(model)
    tokens = np.random.default_rng(0).integers(0, model.vocabulary, (2, SHORT), dtype=np.int32)
    context = ()
    if model.structure == "encoder_decoder":
        context = (jax.jit(partial(apply, module, method="encode"))(params, tokens),)
    whole = np.asarray(hidden_states(name)(params, tokens))
    decode = jax.jit(partial(apply, module, method="decode_cached"))
    # The prompts have 3 and 2 tokens and padding on the right. Then one token is decoded at a time.
    lengths = np.array([3, 2])
    prompts = np.where(np.arange(6) < lengths[:, None], np.pad(tokens, ((0, 0), (0, 3)))[:, :6], 1)
    fill = jax.jit(lambda *inputs: apply(module, *inputs[:2], CacheSpec(inputs[2], 10), *inputs[3:], method="prefill"))
    first, caches = fill(params, prompts, lengths, *context)
    slots = [cache.k_BKSC.shape[2] for cache in caches.own]
    layers = parts_of(model.decoder_config, len(caches.own))
    assert slots == [cached_window(layer) or 10 for layer in layers]
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(np.asarray(first)[row, :length], whole[row, :length], atol=2e-5, rtol=1e-4)
    for n in range(SHORT - 3):
        at = lengths + n
        one, caches = decode(params, tokens[[0, 1], at][:, None], at[:, None], caches)
        np.testing.assert_allclose(np.asarray(one)[:, 0], whole[[0, 1], at], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", list(map(mark_long, ["gpt2", "mistral", "t5"])))
def test_decoding_several_tokens_at_once_equals_one_at_a_time(name):
    """As in speculative decoding, some of the tokens are replaced later."""
    model, params = MODELS[name], params_of(name)
    module = Transformer(model)
    tokens = np.random.default_rng(0).integers(0, model.vocabulary, (2, SHORT), dtype=np.int32)
    context = ()
    if model.structure == "encoder_decoder":
        context = (jax.jit(partial(apply, module, method="encode"))(params, tokens),)
    whole = np.asarray(hidden_states(name)(params, tokens))
    decode = jax.jit(partial(apply, module, method="decode_cached"))
    fill = lambda *inputs: apply(module, *inputs[:2], CacheSpec(inputs[2], 10, 3), *inputs[3:], method="prefill")
    _, caches = jax.jit(fill)(params, tokens[:, :2], np.array([2, 2]), *context)
    at = lambda n: np.broadcast_to(np.arange(n, n + 3), (2, 3))
    _, caches = decode(params, tokens[:, 2:5] + np.array([0, 1, 1]), at(2), caches)  # two of these tokens are replaced
    for n in (3, 4):
        chunk, caches = decode(params, tokens[:, n : n + 3], at(n), caches)
        np.testing.assert_allclose(np.asarray(chunk), whole[:, n : n + 3], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [mark_long(name, fast=("gpt2", "t5")) for name in MODELS])
def test_bfloat16_compute_keeps_float32_parameters_and_loss(name):
    losses, grads = gradient(name, dtype=jnp.bfloat16)(params_of(name), packed_batch(MODELS[name]))
    for n, (value, _) in losses.items():
        if n.endswith("loss"):
            assert value.dtype == jnp.float32
            np.testing.assert_allclose(reference(name)[0][n][0], value, rtol=0.05)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.long
def test_products_of_a_bfloat16_step_have_bfloat16_operands(name):
    """Also those of the backward pass, whose gradients of scores and logits are float32. The step is only lowered."""
    step = gradient(name, dtype=jnp.bfloat16).lower(params_of(name), packed_batch(MODELS[name])).as_text()
    products = re.findall(r"dot_general .*: \(tensor<([^>]*)>, tensor<([^>]*)>\)", step)
    assert len(products) >= 9
    assert {operand.rpartition("x")[2] for pair in products for operand in pair} == {"bf16"}


def test_dropout_is_off_without_a_key_and_unbiased_with_one():
    x = np.ones((64, 250), np.float32)
    layer = Dropout(0.25)
    np.testing.assert_array_equal(layer.apply({}, x), x)
    dropped = np.asarray(jax.jit(lambda key: layer.apply({}, x, rngs={"dropout": key}))(jax.random.key(0)))
    assert abs((dropped == 0).mean() - 0.25) < 0.02
    np.testing.assert_allclose(dropped.mean(), 1, atol=0.02)
    assert np.unique(dropped).size == 2


def test_initial_weights_have_their_standard_deviation():
    model = MODELS["gpt2"]
    params = jax.jit(partial(init, Transformer(model)))(jax.random.key(1))
    layers = params["decoder"]["layers"]
    residual = {"attention/out": layers["attention"]["out"], "mlp/down": layers["mlp"]["down"]}
    for where, leaf in residual.items():
        np.testing.assert_allclose(np.std(leaf["kernel"]), 0.02 / np.sqrt(2 * model.layers), rtol=0.1, err_msg=where)
    for leaf in (layers["attention"]["query"]["kernel"], layers["mlp"]["up"]["kernel"], params["embeddings"]["tokens"]):
        np.testing.assert_allclose(np.std(leaf), 0.02, rtol=0.1)
    kernel = np.asarray(layers["mlp"]["up"]["kernel"])
    assert np.abs(kernel[0] - kernel[1]).min() > 0  # the layers differ
    assert not np.any(layers["mlp"]["up"]["bias"])
    assert np.all(np.asarray(layers["mlp_norm"]["scale"]) == 1)


def test_initial_weights_of_t5_depend_on_the_number_of_inputs():
    """States and scores start with unit variance. With small weights all scores are equal, which slows learning."""
    small = {"vocabulary": 300, "width": 48, "layers": 3, "heads": 4, "head_width": 16, "mlp_width": 96}
    model = replace(PRESETS["t5-v1.1-small"], decoder_layers=2, **small)
    params = jax.jit(partial(init, Transformer(model)))(jax.random.key(0))
    layer = params["decoder"]["layers"]
    inputs = {"query": 48 * 16, "key": 48, "value": 48, "out": 4 * 16}
    for name, inverse_variance in inputs.items():
        for kind in ("attention", "cross_attention"):
            np.testing.assert_allclose(
                np.std(layer[kind][name]["kernel"]), inverse_variance**-0.5, rtol=0.1, err_msg=name
            )
    np.testing.assert_allclose(np.std(layer["mlp"]["down"]["kernel"]), 96**-0.5, rtol=0.1)
    np.testing.assert_allclose(np.std(params["lm_head"]["kernel"]), 48**-0.5, rtol=0.1)
    np.testing.assert_allclose(np.std(params["embeddings"]["tokens"]), 1.0, rtol=0.1)


@pytest.mark.long
def test_every_preset_has_a_row_for_each_parameter():
    for model in {replace(preset, **SMALL, kv_heads=None, rotary_width=None) for preset in PRESETS.values()}:
        parameters.rows(jax.eval_shape(partial(init, Transformer(model)), jax.random.key(0)))
    with pytest.raises(ValueError, match=r"decoder/layers/novel .* has no row"):
        parameters.rows({"decoder": {"layers": {"novel": np.ones((2, 3))}}})


def test_a_length_that_the_mesh_does_not_divide_is_not_sharded():
    """An example is the length of the targets in denoising, which the user does not set."""
    mesh = sharding.make_mesh(MeshConfig(1, 1, 2, 4), jax.devices()[:8])
    spec_of = lambda field, *shape: tuple(sharding.batch_sharding(mesh, field, shape).spec)
    assert spec_of("tokens_BT", 1, 4, 57) == (None, ("data", "fsdp", "expert"), None)
    assert spec_of("tokens_BT", 1, 4, 56) == (None, ("data", "fsdp", "expert"), "context")
    assert spec_of("labels_BEN", 1, 4, 8, 8) == (None, ("data", "fsdp", "expert"), None, None)
