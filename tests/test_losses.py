"""Losses that compute the logits over the vocabulary in chunks."""

from __future__ import annotations

import math
import re
from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import MeshConfig, ModelConfig
from jaxlm.devices import chips, sharding
from jaxlm.nn import parameters
from jaxlm.nn.layers import float32_einsum
from jaxlm.nn.losses import (
    _log_normaliser_in_one_pass,
    accuracy,
    chunked_cross_entropy,
    cross_entropy,
    log_normaliser,
    token_log_probs,
)
from jaxlm.nn.transformer import Transformer, init
from jaxlm.tasks import states

B, T, D, V = 4, 12, 8, 48
assert_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def inputs():
    random = np.random.default_rng(0)
    params = {"kernel_DV": random.standard_normal((D, V), np.float32), "bias_V": random.standard_normal(V, np.float32)}
    x_BTD = random.standard_normal((B, T, D), np.float32)
    return params, x_BTD, random.integers(0, V, (B, T)), (random.random((B, T)) < 0.7).astype(np.float32)


def logits_of(params, x_BTD):
    return x_BTD @ params["kernel_DV"] + params["bias_V"]


def unchunked(params, x_BTD, labels_BT, weights_BT, smoothing):
    logits_BTV = logits_of(params, x_BTD)
    return cross_entropy(logits_BTV, labels_BT, weights_BT, smoothing), accuracy(logits_BTV, labels_BT, weights_BT)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("parts", [1, 3, 5, 12])  # 5 does not divide the length
def test_chunked_losses_equal_unchunked_losses(parts, smoothing):
    params, *given = inputs()
    found = chunked_cross_entropy(logits_of, params, *given, smoothing, parts)
    jax.tree.map(assert_close, found, unchunked(params, *given, smoothing))

    def mean(of, params, x_BTD):
        (loss, weight), _ = of(params, x_BTD, *given[1:])
        return 3 * loss / weight  # the incoming gradient is not 1

    gradients = jax.jit(
        jax.grad(
            partial(mean, partial(chunked_cross_entropy, logits_of, label_smoothing=smoothing, parts=parts)), (0, 1)
        )
    )
    expected = jax.jit(jax.grad(partial(mean, partial(unchunked, smoothing=smoothing)), (0, 1)))(params, given[0])
    jax.tree.map(assert_close, gradients(params, given[0]), expected)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e30])
def test_the_normaliser_in_one_pass_equals_logsumexp(scale):
    """The version for GPUs, run on this device."""
    logits_BV = scale * np.random.default_rng(0).standard_normal((50, 301)).astype(np.float32)
    logits_BV[0], logits_BV[1, :200], logits_BV[2, 7] = -np.inf, -np.inf, np.nan
    found, expected = jax.jit(_log_normaliser_in_one_pass)(logits_BV), jax.nn.logsumexp(logits_BV, -1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    finite = jnp.asarray(logits_BV[3:])
    gradient = lambda function: jax.jit(jax.grad(lambda x: (function(x) * jnp.arange(47)).sum()))(finite)
    # The error of a gradient is that of float32 for a result of several hundred.
    expected = gradient(partial(jax.nn.logsumexp, axis=-1))
    np.testing.assert_allclose(gradient(log_normaliser), expected, rtol=3e-5, atol=2e-5)
    direction = jnp.ones_like(finite)
    np.testing.assert_allclose(jax.jvp(log_normaliser, (finite,), (direction,))[1], 1, rtol=3e-5)


def test_a_gpu_reads_the_logits_of_a_loss_once():
    like = jax.ShapeDtypeStruct((8, 512), jnp.float32)
    text = {on: jax.jit(log_normaliser).trace(like).lower(lowering_platforms=(on,)).as_text() for on in ("cuda", "cpu")}
    assert {on: program.count("stablehlo.reduce(") for on, program in text.items()} == {"cuda": 1, "cpu": 2}


def test_the_matrix_of_a_head_is_rounded_once_and_its_gradient_is_not():
    """In a loop, each part would read it in float32. Its gradient is that of float32 sums."""
    params, x_BTD, labels_BT, weights_BT = inputs()
    logits_of = lambda params, x: float32_einsum("BTD,DV->BTV", x, params["kernel_DV"]) + params["bias_V"]
    loss = lambda params, parts: chunked_cross_entropy(logits_of, params, x, labels_BT, weights_BT, 0.0, parts)[0][0]
    x = jnp.asarray(x_BTD, jnp.bfloat16)
    grads = [jax.jit(jax.grad(partial(loss, parts=parts)))(params) for parts in (1, 3)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *grads)
    kernel = np.asarray(grads[1]["kernel_DV"])
    assert kernel.dtype == np.float32 and (kernel != kernel.astype(jnp.bfloat16).astype(np.float32)).any()
    text = jax.jit(jax.grad(partial(loss, parts=3))).lower(params).as_text()
    body = text[text.index("stablehlo.while") :]
    assert f"tensor<{D}x{V}xbf16>" in text[: text.index("stablehlo.while")]
    assert body.count(f"(tensor<{D}x{V}xbf16>) -> tensor<{D}x{V}xf32>") >= 1  # which the compiler removes


def test_larger_devices_compute_more_logits_at_once(monkeypatch):
    module = Transformer(ModelConfig(vocabulary=1 << 16, layers=1, heads=1, width=8))
    parts = {}
    for name, chip in chips.TPUS.items() | chips.GPUS.items():
        monkeypatch.setattr(chips, "find", lambda kind, chip=chip: chip)
        parts[name] = states._parts(module, 32, 1024)
    monkeypatch.setattr(chips, "find", lambda kind: None)
    assert parts["v5e"] == states._parts(module, 32, 1024) == 32  # 2^31 logits, 2^26 in each part
    assert (parts["v6e"], parts["a100-40"], parts["h100"]) == (16, 16, 8)


@pytest.mark.parametrize("parts", [1, 3, 5, 12])
def test_chunked_log_probabilities_equal_unchunked_ones(parts):
    params, x_BTD, labels_BT, weights_BT = inputs()
    log_BTV = jax.nn.log_softmax(logits_of(params, x_BTD))
    log_BT, most_likely_BT = jax.jit(partial(token_log_probs, logits_of, parts=parts))(params, x_BTD, labels_BT)
    assert_close(log_BT, jnp.take_along_axis(log_BTV, labels_BT[..., None], 2)[..., 0])
    np.testing.assert_array_equal(most_likely_BT, log_BTV.argmax(-1))
    # The gradient of a function of the log-probabilities, such as a preference loss.
    some = lambda log_BT: jax.nn.sigmoid((log_BT * weights_BT).sum(1)).sum()
    found = jax.jit(jax.grad(lambda *of: some(token_log_probs(logits_of, *of, labels_BT, parts)[0]), (0, 1)))
    unchunked = lambda params, x: jnp.take_along_axis(
        jax.nn.log_softmax(logits_of(params, x)), labels_BT[..., None], 2
    )[..., 0]
    expected = jax.jit(jax.grad(lambda *of: some(unchunked(*of)), (0, 1)))(params, x_BTD)
    jax.tree.map(assert_close, found(params, x_BTD), expected)


def largest(jaxpr) -> int:
    """Returns the size of the largest array in a program, including loops and calls."""
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars if hasattr(v.aval, "size")]
    inner = [largest(sub) for eqn in jaxpr.eqns for sub in jax.extend.core.jaxprs_in_params(eqn.params)]
    return max(sizes + inner, default=0)


@pytest.mark.parametrize("primitive", ["loss", "log-probabilities"])
def test_no_array_holds_the_logits_of_all_positions(primitive):
    params, *given = inputs()
    loss = lambda params, x: chunked_cross_entropy(logits_of, params, x, *given[1:], 0.1, 4)[0][0]
    if primitive == "log-probabilities":
        loss = lambda params, x: (token_log_probs(logits_of, params, x, given[1], 4)[0] ** 2).sum()
    size = largest(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(params, given[0]).jaxpr)
    assert size == max(B * T // 4 * V, D * V, B * T * D)


@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (1, 2, 1, 4), (2, 1, 2, 2)], ids=str)
def test_chunked_losses_on_a_mesh_equal_unchunked_losses(sizes):
    """Rows, length and vocabulary are sharded. The number of chunks divides the positions of each device."""
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[:8])
    constrain = sharding.Placement(mesh)

    def sharded_logits(params, x_BTD):
        return constrain(logits_of(params, x_BTD), ("batch", "length", "vocabulary"))

    params, *given = inputs()
    names = ("x_BTD", "labels_BT", "weights_BT")
    sharded = [jax.device_put(x[None], sharding.batch_sharding(mesh, name))[0] for name, x in zip(names, given)]
    loss = lambda of, params, x, *rest: of(params, x, *rest)[0][0]
    split = jax.jit(jax.value_and_grad(partial(loss, partial(chunked_cross_entropy, sharded_logits, parts=3)), (0, 1)))
    expected = jax.value_and_grad(partial(loss, partial(unchunked, smoothing=0.0)), (0, 1))(params, *given)
    jax.tree.map(assert_close, split(jax.tree.map(jnp.asarray, params), *sharded), expected)


def collectives(program: str, sizes: tuple[int, ...]) -> dict[str, int]:
    """Returns the number of collectives of each kind with an array of one of these sizes."""
    found = {}
    for kind in ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"):
        results = re.findall(rf"= (.*?) {kind}(?:-start)?\(", program)
        arrays = [re.findall(r"\[([\d,]+)\]", result) for result in results]
        found[kind] = sum(any(math.prod(map(int, a.split(","))) in sizes for a in some) for some in arrays)
    return found


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("sizes", [(1, 8, 1, 1), (2, 2, 2, 1), (2, 1, 1, 4), (8,)], ids=str)  # (8,): only "fsdp"
def test_the_head_is_gathered_once_and_its_gradient_is_reduced_once(monkeypatch, sizes, tied, dtype):
    """Chunked losses on a mesh equal those of one device, and no chunk communicates an array as large as the head."""
    config = ModelConfig(vocabulary=V, max_length=T, width=D, layers=1, heads=2, tied_embeddings=tied)
    params = init(Transformer(config), jax.random.key(0))
    _, x_BTD, labels_BT, weights_BT = (np.concatenate([x, x]) if n else None for n, x in enumerate(inputs()))
    x_BTD = jnp.asarray(x_BTD, dtype)
    devices = jax.devices()[:8]
    mesh = sharding.make_mesh(MeshConfig(*sizes), devices) if sizes[1:] else jax.sharding.Mesh(devices, "fsdp")
    place = lambda leaf, row: jax.device_put(leaf, sharding.sharding(mesh, row.axes, leaf.shape, row.path))
    sharded = jax.tree.map(place, params, parameters.rows(params))

    def both(module, params, x_BTD):
        losses = states.token_losses(module, params, x_BTD, labels_BT, weights_BT)
        scores_BT, most_likely_BT = states.token_scores(module, params, x_BTD, labels_BT)
        return losses["loss"][0] + (scores_BT * weights_BT).sum() / 2, (losses, scores_BT, most_likely_BT)

    step = lambda module: jax.jit(jax.value_and_grad(partial(both, module), (0, 1), has_aux=True))
    whole = step(Transformer(config, dtype=jnp.dtype(dtype)))(params, x_BTD)
    monkeypatch.setattr(states, "MAX_LOGITS", 2 * B * T * V // 8 // 3)
    module = Transformer(config, sharding.Placement(mesh), dtype=jnp.dtype(dtype))
    assert states._parts(module, 2 * B, T) == 3
    compiled = step(module).lower(sharded, x_BTD).compile()
    rounded = {"atol": 2e-2, "rtol": 2e-2} if dtype == "bfloat16" else {}
    as_float = lambda x: np.asarray(x, np.float32)
    jax.tree.map(lambda a, b: assert_close(as_float(a), as_float(b), **rounded), compiled(sharded, x_BTD), whole)
    # The loss and the scores gather the head once each, and reduce its gradient once each.
    head = V * D // mesh.shape.get("tensor", 1)
    split = mesh.shape["fsdp"]
    found = collectives(compiled.as_text(), (head, head // split))
    assert found["all-gather"] in ((1, 2) if split > 1 else (0,)), found
    assert found["all-reduce"] + found["reduce-scatter"] in (1, 2), found
    assert found["all-to-all"] == found["collective-permute"] == 0, found
