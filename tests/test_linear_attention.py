"""The gated delta rule: its two forms, packing, causality, caches, sharding, and values of transformers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params
from test_blocks import packed_batch

from jaxlm import ModelConfig, UserError
from jaxlm.nn import flops, linear_attention, parameters
from jaxlm.nn.stack import CacheSpec
from jaxlm.nn.transformer import Transformer, apply, init

MODEL = ModelConfig(
    vocabulary=32, width=16, layers=2, heads=2, positions="none", norm="rmsnorm_plus_one", feed_forward="gated",
    mlp_width=12, activation="silu", biases=(), mixer="gated_delta", linear_value_heads=4, linear_key_width=6,
    linear_value_width=5, initial_std=0.2,
)  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "groups": {},
    "equal heads": {"linear_value_heads": None, "linear_value_width": None},
    "long convolution": {"linear_conv_width": 6, "activation": "gelu"},
}


def random_tokens(T: int, ends: tuple[int, ...] = (), hard: bool = False) -> linear_attention.Tokens:
    """Returns inputs of the delta rule; `hard`: equal keys that replace nearly everything, without decay."""
    random, (B, K, G, C, U) = np.random.default_rng(0), (2, 2, 3, 8, 5)
    draw = lambda *shape: random.standard_normal((B, T, K, *shape), np.float32)
    k_BTKC = np.ones((B, T, K, C), np.float32) + (1e-3 if hard else 3) * draw(C)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    beta_BTKG = np.full((B, T, K, G), 0.999, np.float32) if hard else 1 / (1 + np.exp(-draw(G)))
    log_decay_BTKG = -(1e-4 if hard else 0.3) * np.abs(draw(G))
    age_T = np.arange(T)
    for end in ends:
        age_T[end:] = np.arange(T - end)
    tokens = unit(draw(C)) / np.sqrt(C), unit(k_BTKC), draw(G, U), beta_BTKG, log_decay_BTKG, np.tile(age_T, (B, 1))
    return linear_attention.Tokens(*map(jnp.asarray, tokens))


@pytest.mark.parametrize(
    ("T", "ends", "hard"), [(150, (), False), (150, (37, 64, 100, 101), False), (128, (), True), (5, (2,), False)]
)
def test_the_chunked_form_equals_the_recurrence(T, ends, hard):
    """Values and gradients, also where examples begin in a chunk or at its start."""
    tokens = random_tokens(T, ends, hard)
    state = jnp.zeros((2, 2, 3, 8, 5))
    forms = {"chunks": lambda tokens: linear_attention.chunked(tokens)[0]}
    forms["steps"] = lambda tokens: linear_attention.recurrent(tokens, state)[0]

    def run(name: str) -> Any:
        def loss(floats: Any) -> jax.Array:
            out = forms[name](linear_attention.Tokens(*floats, tokens.age_BT))
            return jnp.sin(3 * out).mean(), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(tuple(tokens)[:-1])

    (_, chunks), chunk_gradients = run("chunks")
    (_, steps), step_gradients = run("steps")
    np.testing.assert_allclose(chunks, steps, atol=1e-5)
    for chunk, step in zip(chunk_gradients, step_gradients):
        np.testing.assert_allclose(chunk, step, atol=1e-5 * max(1e-3, np.abs(step).max()))


def test_states_before_all_positions_equal_those_of_the_recurrence():
    tokens = random_tokens(70)
    _, states_TB = linear_attention.recurrent(tokens, jnp.zeros((2, 2, 3, 8, 5)))
    _, chunks = linear_attention.chunked(tokens)
    positions_BS = np.array([[1, 64, 65, 69, 30], [63, 2, 40, 66, 64]])
    states_BS = linear_attention.states_before(tokens, chunks, jnp.asarray(positions_BS))
    for row, places in enumerate(positions_BS):
        np.testing.assert_allclose(states_BS[row], states_TB[places - 1, row], atol=1e-5)
    first_BS = linear_attention.states_before(tokens, chunks, jnp.zeros((2, 1), int))
    assert not np.asarray(first_BS).any()


@pytest.mark.parametrize("name", ["groups", pytest.param("equal heads", marks=pytest.mark.long), "long convolution"])
def test_examples_of_a_packed_row_do_not_affect_each_other(name):
    model = replace(MODEL, **CHANGES[name])
    params, batch = random_params(model), packed_batch()
    assert all(row.path != path for path, row in parameters.rows_by_path(params).items())  # no row is a user's
    run = jax.jit(partial(apply, Transformer(model)))
    whole = run(params, batch["tokens_BT"], batch["segments_BT"], batch["positions_BT"])
    for start, end in ((0, 5), (5, 9), (9, 12)):
        single = run(params, batch["tokens_BT"][:, start:end])
        np.testing.assert_allclose(whole[:, start:end], single, atol=1e-4)


def test_later_tokens_and_other_examples_have_no_gradient():
    params, batch = random_params(MODEL), packed_batch()
    module = Transformer(MODEL)
    x_BTD, inputs = apply(module, params, batch["tokens_BT"], batch["segments_BT"], method="embed")
    place = 7  # in the second example, tokens 5 to 8
    output = lambda x_BTD: jnp.sin(apply(module, params, x_BTD, inputs, method="stack")[:, place]).sum()
    gradient_T = np.abs(jax.jit(jax.grad(output))(x_BTD)).max((0, 2))
    assert gradient_T[5:8].all() and not gradient_T[:5].any() and not gradient_T[8:].any()


def test_cached_states_equal_those_of_whole_rows():
    """The last token of a prompt is read again, and several tokens at once, as in speculative decoding."""
    ahead = 3
    params, module, tokens_BT = random_params(MODEL), Transformer(MODEL), packed_batch()["tokens_BT"][:, :12]
    lengths_B = np.array([1, 5])
    whole_BTD = apply(module, params, tokens_BT)
    prompts = np.where(np.arange(6) < lengths_B[:, None], tokens_BT[:, :6], 0)
    prefill = jax.jit(lambda *inputs: apply(module, *inputs, CacheSpec(lengths_B, 12, ahead), method="prefill"))
    _, caches = prefill(params, prompts)
    assert {cache.slots for cache in caches.own} == {ahead}  # not as long as the text
    read = jax.jit(partial(apply, module, method="decode_cached"))
    rows_B1, at_B = np.arange(2)[:, None], lengths_B - 1
    for accepted in (1, 3, 2):
        at_BT = at_B[:, None] + np.arange(ahead)
        x_BTD, caches = read(params, tokens_BT[rows_B1, at_BT], at_BT, caches)
        np.testing.assert_allclose(x_BTD, whole_BTD[rows_B1, at_BT], atol=1e-4)
        at_B = at_B + accepted  # the rest is rejected, and read again
    first_BT = np.zeros((2, 1), int)
    x_BTD, _ = read(params, tokens_BT[:, :1], first_BT, caches)
    np.testing.assert_allclose(x_BTD, whole_BTD[:, :1], atol=1e-5)  # from position 0, the state is zero
    twice_BT = np.zeros((2, 2), int)  # a draft reads the only token of a prompt twice
    x_BTD, _ = read(params, tokens_BT[:, [0, 0]], twice_BT, caches)
    np.testing.assert_allclose(x_BTD[:, 1], whole_BTD[:, 0], atol=1e-5)


def test_the_cache_keeps_floats_and_does_not_grow_with_the_text():
    params, keep = random_params(MODEL), CacheSpec(np.array([2]), 512)
    module = Transformer(MODEL, dtype=jnp.bfloat16)
    _, caches = jax.eval_shape(lambda: apply(module, params, np.ones((1, 3), int), keep, method="prefill"))
    states, inputs = caches.own[0].k_BKSC, caches.own[0].v_BKSC
    assert (states.shape, states.dtype) == ((1, 4, 1, 6 * 5), jnp.float32)
    assert (inputs.shape, inputs.dtype) == ((1, 2, 1, 3 * (6 + 6 + 2 * 5)), jnp.bfloat16)


def test_the_format_int8_is_refused_where_no_layer_has_keys():
    keep = CacheSpec(np.array([2]), 4, format="int8")
    prefill = partial(apply, Transformer(MODEL), random_params(MODEL), np.ones((1, 2), int), keep, method="prefill")
    with pytest.raises(UserError, match=r"cache is 'int8', but .* 'gated_delta', which stores .* 'compute'"):
        jax.eval_shape(prefill)


@pytest.mark.parametrize("T", [1, 8, 130])
def test_the_formula_counts_the_products(T):
    params, tokens_BT = random_params(MODEL), np.zeros((2, T), np.int32)
    counted = flops.count(jax.make_jaxpr(partial(apply, Transformer(MODEL)))(params, tokens_BT))
    assert counted == flops.model_flops(MODEL, 2, T, heads={}).total


@pytest.mark.parametrize("remat", ["full", pytest.param("dots", marks=pytest.mark.long)])
def test_recomputation_does_not_change_gradients(remat):
    params, batch = random_params(MODEL), packed_batch()

    def gradient(remat: str) -> Any:
        module = Transformer(MODEL, remat=remat)
        loss = lambda params: jnp.square(apply(module, params, batch["tokens_BT"], batch["segments_BT"])).mean()
        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), gradient(remat), gradient("none"))


def test_sharded_rows_equal_unsharded_ones(devices):
    from jaxlm import MeshConfig
    from jaxlm.devices.sharding import Placement, make_mesh

    batch, params = packed_batch(), random_params(MODEL)
    inputs = params, batch["tokens_BT"], batch["segments_BT"], batch["positions_BT"]
    mesh = make_mesh(MeshConfig(data=1, context=2, tensor=2), jax.devices()[:4])
    sharded = jax.jit(partial(apply, Transformer(MODEL, Placement(mesh))))(*inputs)
    np.testing.assert_allclose(sharded, apply(Transformer(MODEL), *inputs), atol=1e-5)


def test_initial_heads_forget_at_different_times():
    model = replace(MODEL, linear_value_heads=64, feed_forward="none", layers=1)
    params = jax.jit(partial(init, Transformer(model)))(jax.random.key(0))
    own = params["decoder"]["layers"]["attention"]
    times = jax.nn.softplus(own["decay_bias"])
    assert 1e-3 <= times.min() < 3e-3 and 0.03 < times.max() <= 0.1
    rates = jnp.exp(own["log_rate"])
    assert 0.01 <= rates.min() < 1 and 15 < rates.max() <= 16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"structure": "encoder", "heads_on_top": ()}, "'gated_delta', which reads from left to right, .* decoder"),
        ({"linear_value_heads": 3}, "linear_value_heads is 3, which is no multiple of the 2 heads of keys"),
        ({"linear_conv_width": 1}, "linear.conv.width is 1"),
        ({"linear_key_width": 0}, "linear.key.width is 0"),
        ({"prefix_lm": True}, "prefix_lm is True, but model.mixer is 'gated_delta', which has no attention"),
        ({"relative": "alibi"}, "relative is 'alibi', but model.mixer is 'gated_delta'"),
        ({"layer_kinds": ("local",), "window": 4}, r"layer_kinds is \('local',\), but model.mixer is 'gated_delta'"),
    ],
)
def test_impossible_combinations_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        replace(MODEL, **fields).check()


def test_a_mask_is_refused():
    with pytest.raises(UserError, match=r"model.mixer is 'gated_delta', which supports no mask"):
        apply(Transformer(MODEL), random_params(MODEL), jnp.ones((1, 3), int), mask_BTS=np.ones((1, 3, 3), bool))


@pytest.mark.parity
@pytest.mark.parametrize("hard", [False, True])
def test_both_forms_equal_those_of_transformers(hard):
    """Values and gradients over several chunks."""
    torch = pytest.importorskip("torch")
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    tokens, (B, T, K, G, C, U) = random_tokens(150, (), hard), (2, 150, 2, 3, 8, 5)
    shapes = (B, T, K, C), (B, T, K, C), (B, T, K * G, U), (B, T, K * G), (B, T, K * G)
    q, k, v, beta, decay = (
        torch.tensor(np.asarray(x).reshape(shape), requires_grad=True) for x, shape in zip(tokens, shapes)
    )
    with torch.enable_grad():
        out, _ = qwen.torch_chunk_gated_delta_rule(q * C**0.5, k, v, decay, beta)  # it divides queries by sqrt(C)
        torch.sin(3 * out).mean().backward()
    expected = [x.grad.numpy() for x in (q, k, v, beta, decay)]
    forms = (
        lambda tokens: linear_attention.chunked(tokens)[0],
        lambda tokens: linear_attention.recurrent(tokens, jnp.zeros((B, K, G, C, U)))[0],
    )
    for form in forms:
        loss = lambda floats, form=form: jnp.sin(3 * form(linear_attention.Tokens(*floats, tokens.age_BT))).mean()
        found = jax.jit(form)(tokens)
        np.testing.assert_allclose(found.reshape(out.shape), out.detach().numpy(), atol=1e-5)
        for ours, theirs in zip(jax.jit(jax.grad(loss))(tuple(tokens)[:-1]), expected):
            limit = 1e-5 * max(1e-3, np.abs(theirs).max())
            np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, atol=limit)
