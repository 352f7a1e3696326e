"""Recurrent and convolutional mixers: packing, causality, cached generation, sharding, and values of PyTorch."""

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
from jaxlm.families import PRESETS
from jaxlm.nn import flops, parameters
from jaxlm.nn.stack import CacheSpec
from jaxlm.nn.transformer import Transformer, apply
from jaxlm.planning.inspect import describe_config

PLAIN = ModelConfig(
    vocabulary=32, width=16, layers=2, heads=1, positions="none", feed_forward="none", norm_place="none",
    mixer="lstm", mixer_residual=False, initial_std=0.2,
)  # fmt: skip
ENCODER: dict[str, Any] = {"structure": "encoder", "heads_on_top": ()}
MIXERS = ("lstm", "gru", "convolution")
MODELS = {
    f"{mixer}-{structure}": replace(PLAIN, mixer=mixer, **(ENCODER if structure == "encoder" else {}))
    for mixer in MIXERS
    for structure in ("decoder", "encoder")
}
MODELS["lstm-with-mlp"] = replace(PLAIN, mixer_residual=True, norm_place="pre", feed_forward="dense")


@pytest.mark.parametrize("name", MODELS)
def test_examples_of_a_packed_row_do_not_affect_each_other(name):
    model = MODELS[name]
    params, batch = random_params(model), packed_batch()
    assert all(row.path != path for path, row in parameters.rows_by_path(params).items())  # no row is a user's
    run = jax.jit(partial(apply, Transformer(model)))
    whole = run(params, batch["tokens_BT"], batch["segments_BT"], batch["positions_BT"])
    for start, end in ((0, 5), (5, 9), (9, 12)):
        single = run(params, batch["tokens_BT"][:, start:end])
        np.testing.assert_allclose(whole[:, start:end], single, atol=1e-5)
    later = batch["tokens_BT"].copy()
    later[:, 3] = 31 - later[:, 3]
    changed = np.abs(run(params, later, batch["segments_BT"], batch["positions_BT"]) - whole).max((0, 2)) > 0
    if model.structure == "decoder":
        assert changed[3] and not changed[:3].any() and not changed[5:].any()  # causal
    else:
        assert changed[2:5].all() and not changed[5:].any()


@pytest.mark.parametrize("mixer", ["lstm", "gru"])
def test_cached_states_equal_those_of_whole_rows(mixer):
    """The last token of a prompt is read again, and several tokens at once, as in speculative decoding."""
    model, ahead = replace(PLAIN, mixer=mixer), 3
    params, module, tokens_BT = random_params(model), Transformer(model), packed_batch()["tokens_BT"][:, :12]
    lengths_B = np.array([3, 5])
    whole_BTD = apply(module, params, tokens_BT)
    prompts = np.where(np.arange(6) < lengths_B[:, None], tokens_BT[:, :6], 0)
    prefill = jax.jit(lambda *inputs: apply(module, *inputs, CacheSpec(lengths_B, 12, ahead), method="prefill"))
    _, caches = prefill(params, prompts)
    assert {cache.slots for cache in caches.own} == {ahead + 1}  # not as long as the text
    read = jax.jit(partial(apply, module, method="decode_cached"))
    rows_B1, at_B = np.arange(2)[:, None], lengths_B - 1
    for accepted in (1, 3, 2):
        at_BT = at_B[:, None] + np.arange(ahead)
        x_BTD, caches = read(params, tokens_BT[rows_B1, at_BT], at_BT, caches)
        np.testing.assert_allclose(x_BTD, whole_BTD[rows_B1, at_BT], atol=1e-5)
        at_B = at_B + accepted  # the rest is rejected, and read again
    first_BT = np.zeros((2, 1), int)
    x_BTD, _ = read(params, tokens_BT[:, :1], first_BT, caches)
    np.testing.assert_allclose(x_BTD, whole_BTD[:, :1], atol=1e-5)  # from position 0, the state is zero


@pytest.mark.parametrize(
    ("mixer", "cache", "message"),
    [
        ("gru", "int8", "cache is 'int8', but model.mixer is 'gru', which stores .* 'compute'"),
        ("convolution", "compute", "model.mixer is 'convolution', which returns no cache"),
    ],
)
def test_caches_that_a_mixer_does_not_have_are_refused(mixer, cache, message):
    model = replace(PLAIN, mixer=mixer)
    keep = CacheSpec(np.array([2]), 4, format=cache)
    with pytest.raises(UserError, match=message):
        apply(Transformer(model), random_params(model), np.ones((1, 2), int), keep, method="prefill")


@pytest.mark.parametrize("name", MODELS)
def test_the_formula_counts_the_products(name):
    model = MODELS[name]
    params, tokens_BT = random_params(model), np.zeros((2, 8), np.int32)
    counted = flops.count(jax.make_jaxpr(partial(apply, Transformer(model)))(params, tokens_BT))
    assert counted == flops.model_flops(model, 2, 8, heads={}).total


@pytest.mark.parametrize("name", ["lstm-encoder", "gru-decoder", "convolution-encoder"])
def test_sharded_rows_equal_unsharded_ones(name, devices):
    from jaxlm import MeshConfig
    from jaxlm.devices.sharding import Placement, make_mesh

    model, batch = MODELS[name], packed_batch()
    params = random_params(model)
    inputs = params, batch["tokens_BT"], batch["segments_BT"], batch["positions_BT"]
    mesh = make_mesh(MeshConfig(data=1, context=2, tensor=2), jax.devices()[:4])
    sharded = jax.jit(partial(apply, Transformer(model, Placement(mesh))))(*inputs)
    np.testing.assert_allclose(sharded, apply(Transformer(model), *inputs), atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**ENCODER, "width": 17}, "width is 17; .* 'lstm' divides it between two directions: make it even"),
        ({"prefix_lm": True}, "prefix_lm is True, but model.mixer is 'lstm', which has no attention"),
        ({"relative": "buckets"}, "relative is 'buckets', but model.mixer is 'lstm'"),
        ({"layer_kinds": ("local",), "window": 4}, r"layer_kinds is \('local',\), but model.mixer is 'lstm'"),
        ({"mixer": "convolution", "conv_windows": (3, 3)}, r"conv_windows is \(3, 3\); give .* different widths"),
        ({"mixer": "convolution", "conv_windows": ()}, r"conv_windows is \(\); give at least one"),
        ({"mixer": "convolution", "conv_windows": (0,)}, "conv.windows"),
    ],
)
def test_impossible_combinations_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        replace(PLAIN, **fields).check()


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_mask_is_refused(mixer):
    model = replace(PLAIN, mixer=mixer, **ENCODER)
    with pytest.raises(UserError, match=f"model.mixer is '{mixer}', which supports no mask"):
        apply(Transformer(model), random_params(model), jnp.ones((1, 3), int), mask_BTS=np.ones((1, 3, 3), bool))


@pytest.mark.parametrize("name", [name for name in PRESETS if name.split("-")[0] in ("lstm", "gru", "cnn", "bilstm")])
def test_presets_are_valid(name):
    config = PRESETS[name]
    config.check()
    text = describe_config(config)
    assert text.startswith("jaxlm (no class of transformers)")


# Values of PyTorch


def set_layer(torch, kind: Any, params: Any, layer: int) -> None:
    """Copies our parameters of a layer to a module of PyTorch."""
    own = jax.tree.map(lambda leaf: np.asarray(leaf[layer]), params)
    for n in range(own["bias"].shape[0]):
        suffix = f"_l{layer}" + "_reverse" * n
        recurrent_bias = np.zeros_like(own["bias"][n])
        if "candidate_bias" in own:
            recurrent_bias[-own["candidate_bias"].shape[1] :] = own["candidate_bias"][n]
        tensors = {
            "weight_ih": own["input"]["kernel"][:, n].T,
            "weight_hh": own["recurrent_kernel"][n].T,
            "bias_ih": own["bias"][n],
            "bias_hh": recurrent_bias,
        }
        for name, value in tensors.items():
            getattr(kind, name + suffix).data.copy_(torch.from_numpy(np.array(value)))


@pytest.mark.parity
@pytest.mark.parametrize("mixer", ["lstm", "gru"])
@pytest.mark.parametrize("structure", ["decoder", "encoder"])
def test_values_and_gradients_equal_those_of_pytorch(mixer, structure):
    torch = pytest.importorskip("torch")
    model = MODELS[f"{mixer}-{structure}"]
    params, tokens = random_params(model), packed_batch()["tokens_BT"]
    both = structure == "encoder"
    kind = getattr(torch.nn, mixer.upper())(16, 8 if both else 16, 2, batch_first=True, bidirectional=both)
    for layer in range(2):
        set_layer(torch, kind, params[structure]["layers"]["attention"], layer)
    x = torch.from_numpy(params["embeddings"]["tokens"][tokens]).requires_grad_()
    theirs = kind(x)[0]
    (theirs**2).sum().backward()
    run = lambda x: apply(Transformer(model), params, x, inputs, method="stack")
    _, inputs = apply(Transformer(model), params, tokens, method="embed")
    np.testing.assert_allclose(run(x.detach().numpy()), theirs.detach().numpy(), atol=1e-5)
    gradient = jax.grad(lambda x: jnp.square(run(x)).sum())(x.detach().numpy())
    np.testing.assert_allclose(gradient, x.grad.numpy(), atol=1e-4)


@pytest.mark.parity
def test_convolutions_equal_those_of_pytorch():
    torch = pytest.importorskip("torch")
    model = replace(MODELS["convolution-encoder"], layers=1, conv_activation="relu")
    params, tokens = random_params(model), packed_batch()["tokens_BT"]
    x = torch.from_numpy(params["embeddings"]["tokens"][tokens]).mT
    own = params["encoder"]["layers"]["attention"]
    parts = []
    for size in model.conv_windows:
        kernel = torch.from_numpy(np.array(own[f"window_{size}"]["kernel"][0])).permute(2, 1, 0)
        padded = torch.nn.functional.pad(x, ((size - 1) // 2, size // 2))
        bias = torch.from_numpy(np.array(own[f"window_{size}"]["bias"][0]))
        parts.append(torch.relu(torch.nn.functional.conv1d(padded, kernel, bias)))
    np.testing.assert_allclose(apply(Transformer(model), params, tokens), torch.cat(parts, 1).mT.numpy(), atol=1e-5)
