"""Inputs of projections that are rounded with calibrated scales: properties, files, and values of other packages."""

from __future__ import annotations

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_nodes import MODELS, TOKENS_BT, hidden
from test_quantized_files import BERT, LLAMA, files, leaves, make, write
from test_quantized_files import SIZES as FILE_SIZES

import jaxlm
from jaxlm.families import FAMILIES
from jaxlm.hub import safetensors
from jaxlm.lm import LM
from jaxlm.nn import nodes, parameters
from jaxlm.nn.quantized import Quantized, quantize, round_inputs
from jaxlm.transforms.calibration_rows import calibration_rows
from jaxlm.transforms.input_scales import FRACTIONS, input_scales

RANDOM = np.random.default_rng(0)
TEXTS = [RANDOM.integers(1, 48, 32).tolist() for _ in range(8)]
MODERNBERT = dataclasses.replace(
    next(iter(FAMILIES["modernbert"].presets.values())), **FILE_SIZES | {"kv_heads": None, "tied_embeddings": True}
)


def static(model=LLAMA, **how) -> LM:
    return jaxlm.quantize(make(model), "int8", inputs="int8_static", calibration=TEXTS, **how)


def with_inputs(lm: LM, kind: str, scale: float | None) -> LM:
    """Returns a quantised model whose inputs are rounded in a format, with one scale or dynamically."""

    def replace(leaf):
        if not isinstance(leaf, Quantized) or leaf.first:
            return leaf
        scales_L = None if scale is None else jnp.full(len(leaf.values), scale, jnp.float32)
        return dataclasses.replace(leaf, input_format=kind, input_scale=scales_L)

    return dataclasses.replace(lm, params=jax.tree.map(replace, lm.params, is_leaf=nodes.is_node))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_scale_of_the_largest_input_computes_what_dynamic_rounding_computes(kind):
    x = RANDOM.standard_normal((1, 32)).astype(np.float32)
    node = quantize(RANDOM.standard_normal((32, 16)).astype(np.float32), stacked=False, weights=kind)
    dynamic = dataclasses.replace(node, input_format=kind)
    fixed = dataclasses.replace(dynamic, input_scale=jnp.float32(np.abs(x).max() / (127 if kind == "int8" else 448)))
    np.testing.assert_allclose(fixed.dot(x, 1, jnp.float32), dynamic.dot(x, 1, jnp.float32), rtol=1e-6)
    many = np.concatenate([x, 0.1 * x, -x])  # one scale of all rows, for which those of small values are coarse
    bound = np.abs(np.asarray(node.materialize())).sum(0) * float(fixed.input_scale) * (1 if kind == "int8" else 64)
    assert np.all(np.abs(fixed.dot(many, 1, jnp.float32) - dynamic.dot(many, 1, jnp.float32)) <= bound)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_calibrated_scales_computes_almost_the_same(name):
    lm = make(dataclasses.replace(MODELS[name], start_token=0))
    texts = [(text, text[::-1]) for text in TEXTS] if name == "encoder-decoder" else TEXTS
    found = jaxlm.quantize(lm, inputs="int8_static", calibration=texts)
    quantized = [leaf for leaf in leaves(found.params) if isinstance(leaf, Quantized)]
    assert len(quantized) == len(parameters.projections(lm.params))
    for leaf in quantized:
        assert leaf.input_format == "int8" and leaf.input_scale.shape == (len(leaf.values),)
    reference = hidden(lm.config, lm.params)
    square = lambda x: float(np.square(x).mean())
    error = lambda params: square(hidden(lm.config, params) - reference) / square(reference)
    assert error(jaxlm.quantize(lm).params) < error(found.params) < 0.1**2


def test_projections_with_the_same_input_share_a_scale_and_no_scale_exceeds_that_of_the_largest():
    layers = static().params["decoder"]["layers"]
    scale = lambda part, name: np.asarray(layers[part][name]["kernel"].input_scale)
    np.testing.assert_array_equal(scale("attention", "query"), scale("attention", "value"))
    np.testing.assert_array_equal(scale("mlp", "up"), scale("mlp", "gate"))
    lm = make()
    rows = calibration_rows(lm, TEXTS)
    states = lm(rows.tokens_BT, None, segments_BT=rows.segments_BT, positions_BT=rows.positions_BT, states=True)
    x_BTD = np.asarray(states.decoder.states_LBTD[0], np.float64)  # the input of the first norm
    x_BTD = x_BTD / np.sqrt(np.square(x_BTD).mean(-1, keepdims=True) + lm.config.norm_epsilon)
    x_BTD = x_BTD * np.asarray(lm.params["decoder"]["layers"]["attention_norm"]["scale"][0])
    largest = np.abs(x_BTD[rows.segments_BT > 0]).max() / 127
    found = scale("attention", "query")[0]
    np.testing.assert_allclose(min(abs(found / largest - fraction) for fraction in FRACTIONS), 0, atol=1e-4)


def test_a_rare_large_input_is_clipped(monkeypatch):
    """The scale minimises the error, so that one input of 10,000 does not determine it."""
    from jaxlm.transforms import input_scales as module

    x_NI = RANDOM.standard_normal((4096, 16)).astype(np.float32)
    x_NI[7, 3] = 12.0
    errors = np.asarray(module._errors(module.LayerInputs([x_NI], True, jnp.float32(4096)), jnp.float32(12)))
    expected = []
    for fraction in FRACTIONS:
        step = 12 / 127 * fraction
        expected.append(np.square(np.clip(np.round(x_NI / step), -128, 127) * step - x_NI).sum())
    np.testing.assert_allclose(errors, expected, rtol=1e-3)
    assert 0 < errors.argmin() < len(FRACTIONS) - 1


# Files


@pytest.mark.parametrize("kind", ["static", "asymmetric", "fp8 static", "fp8 dynamic", "int4 fp8 static"])
def test_a_saved_model_loads_with_the_same_nodes(kind, tmp_path, capsys):
    if kind in ("static", "asymmetric"):
        lm = static(symmetric=kind == "static", embeddings=True)
    else:
        lm = jaxlm.quantize(make(), kind.split()[0] if "int4" in kind else "fp8")
        lm = with_inputs(lm, "fp8", None if "dynamic" in kind else 0.01)
    assert jaxlm.save(lm, tmp_path / "a") == "llama"
    back = jaxlm.load(tmp_path / "a")
    assert jax.tree.structure(back.params) == jax.tree.structure(lm.params)
    jax.tree.map(np.testing.assert_array_equal, back.params, lm.params)
    dtypes = lambda lm: [leaf.dtype for leaf in jax.tree.leaves(lm.params)]
    assert dtypes(back) == dtypes(lm)
    jaxlm.save(back, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    np.testing.assert_allclose(back(TOKENS_BT).logits, lm(TOKENS_BT).logits, atol=1e-6)
    assert not capsys.readouterr().err
    group = json.loads((tmp_path / "a/config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    inputs = group["input_activations"]
    if inputs is not None:  # of projections, not of embeddings
        assert inputs["dynamic"] == ("dynamic" in kind) and inputs["type"] == ("float" if "fp8" in kind else "int")


def test_only_some_projections_may_round_their_inputs(tmp_path):
    lm = jaxlm.quantize(make(), "int4", targets="mlp")
    lm = jaxlm.quantize(lm, inputs="int8_static", targets="query,value", calibration=TEXTS)
    lm = jaxlm.quantize(lm, inputs="int8", targets="out")
    jaxlm.save(lm, tmp_path / "model")
    back = jaxlm.load(tmp_path / "model")
    assert jax.tree.structure(back.params) == jax.tree.structure(lm.params)
    jax.tree.map(np.testing.assert_array_equal, back.params, lm.params)


def test_the_projections_of_one_tensor_share_a_scale(tmp_path, capsys):
    """ModernBERT's queries, keys and values are one tensor."""
    lm = static(MODERNBERT)
    assert jaxlm.save(lm, tmp_path / "model") == "modernbert"
    assert not capsys.readouterr().err
    layers, expected = (one.params["encoder"]["layers"] for one in (jaxlm.load(tmp_path / "model"), lm))
    for part in ("attention", "mlp"):
        jax.tree.map(np.testing.assert_array_equal, layers[part], expected[part])


def test_a_model_with_calibrated_scales_loads_sharded(tmp_path):
    lm = static()
    jaxlm.save(lm, tmp_path / "model")
    mesh = jaxlm.devices.sharding.make_mesh(jaxlm.MeshConfig(1, 2, 1), jax.devices()[:2])
    back = jaxlm.load(tmp_path / "model", mesh=mesh)
    np.testing.assert_allclose(back(TOKENS_BT).logits, lm(TOKENS_BT).logits, atol=1e-5)


def parts(names: tuple[str, str], dtype: str, shape: tuple[int, ...]):
    """Returns a function weight -> the tensors of FP8 or INT8 files with one scale for each tensor."""
    limit, kind = (448, ml_dtypes.float8_e4m3fn) if dtype == "fp8" else (127, np.int8)

    def replace(weight):
        scale = np.float32(np.abs(weight).max() / limit)
        scaled = weight / scale if dtype == "fp8" else np.round(weight / scale)
        return {
            "weight": scaled.astype(kind),
            names[0]: np.full(shape, scale, np.float32),
            names[1]: np.full(shape, 0.02, np.float32),
        }

    return replace


def scheme(dtype: str, **inputs):
    kind = {"fp8": "float", "int8": "int"}[dtype]
    activations = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "tensor", "dynamic": False} | inputs
    group = {"weights": {"num_bits": 8, "type": kind, "strategy": "tensor"}, "input_activations": activations}
    group["targets"] = ["Linear"]
    formats = {"fp8": "float-quantized", "int8": "int-quantized"}
    return {"quant_method": "compressed-tensors", "format": formats[dtype], "config_groups": {"group_0": group}}


FOREIGN = {  # files of llm-compressor, AutoFP8 and transformers
    "compressed-tensors fp8": (scheme("fp8"), ("weight_scale", "input_scale"), "fp8", (1,)),
    "compressed-tensors int8": (scheme("int8"), ("weight_scale", "input_scale"), "int8", (1,)),
    "autofp8": ({"quant_method": "fp8", "activation_scheme": "static"}, ("weight_scale", "input_scale"), "fp8", ()),
    "transformers fp8": (
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        ("weight_scale_inv", "activation_scale"),
        "fp8",
        (),
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_others_are_read_with_their_scales(kind, tmp_path, capsys):
    settings, names, dtype, shape = FOREIGN[kind]
    tensors = write(tmp_path, LLAMA, settings, parts(names, dtype, shape))
    stored = {name: np.array(tensor) for name, tensor in safetensors.read(tmp_path).items()}
    extra = {f"model.layers.{n}.self_attn.{c}_scale": np.ones(1, np.float32) for n in range(2) for c in "kv"}
    safetensors.write(stored | extra, tmp_path / safetensors.WEIGHTS)
    lm = jaxlm.load(tmp_path)
    assert not capsys.readouterr().err
    up = lm.params["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert up.input_format == dtype and up.weights == dtype
    np.testing.assert_array_equal(up.input_scale, np.full(2, 0.02, np.float32))
    original = np.stack([tensors[f"model.layers.{n}.mlp.up_proj.weight"].T for n in range(2)])
    np.testing.assert_allclose(nodes.dense_layers(up), original, rtol=0.07, atol=0.02 * np.abs(original).max())
    assert jaxlm.save(lm, tmp_path / "again") == "llama"
    np.testing.assert_allclose(jaxlm.load(tmp_path / "again")(TOKENS_BT).logits, lm(TOKENS_BT).logits, atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "described"),
    [
        ({"symmetric": False}, "8-bit int, static, per tensor, with zero points"),
        ({"num_bits": 4, "dynamic": True, "strategy": "token"}, "4-bit int, dynamic, per token"),
        ({"dynamic": True, "strategy": "group", "group_size": 16}, "8-bit int, dynamic, per group"),
        ({"dynamic": True}, "8-bit int, dynamic, per tensor"),
    ],
)
def test_other_roundings_of_inputs_are_reported(inputs, described, tmp_path, capsys):
    write(tmp_path, LLAMA, scheme("int8", **inputs), parts(("weight_scale", "input_scale"), "int8", (1,)))
    lm = jaxlm.load(tmp_path)
    assert f"inputs of projections are not rounded as in {tmp_path}: {described}" in capsys.readouterr().err
    assert lm.params["decoder"]["layers"]["mlp"]["up"]["kernel"].input_format == "float"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("model.layers.0.mlp.up_proj.input_scale"), "but no model.layers.0.mlp.up_proj.input_scale"),
        (lambda x: x.update({"model.layers.0.mlp.up_proj.input_scale": np.ones(3, np.float32)}), r"has shape \[3\]"),
        (lambda x: x.update({"model.layers.0.mlp.up_proj.input_scale": np.ones(1, np.int32)}), "have the dtype int32"),
        (lambda x: x.update({"model.layers.0.mlp.up_proj.input_scale": np.zeros(1, np.float32)}), "not a scale"),
        (lambda x: x.update({"model.layers.0.mlp.up_proj.input_scale": np.full(1, np.nan, np.float32)}), "not a scale"),
    ],
)
def test_invalid_scales_are_errors(change, message, tmp_path):
    write(tmp_path, LLAMA, scheme("int8"), parts(("weight_scale", "input_scale"), "int8", (1,)))
    tensors = {name: np.array(tensor) for name, tensor in safetensors.read(tmp_path).items()}
    change(tensors)
    safetensors.write(tensors, tmp_path / safetensors.WEIGHTS)
    with pytest.raises(jaxlm.UserError, match=message):
        jaxlm.load(tmp_path)


# Invalid arguments


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "'int8_static', which requires calibration data; give texts as calibration \\(--calibration\\)"),
        ({"calibration": []}, "the calibration data has no tokens"),
        ({"calibration": [[1, 2]]}, "the calibration data has 2 tokens, but .* at least 128"),
        ({"weights": "nf4", "calibration": TEXTS}, "integer weights, not nf4"),
        ({"weights": "fp8", "calibration": TEXTS}, "integer weights, not fp8"),
        ({"weights": "float", "calibration": TEXTS}, "weights is 'float'"),
    ],
)
def test_invalid_arguments_are_errors(how, message):
    with pytest.raises(jaxlm.UserError, match=message):
        jaxlm.quantize(make(), **{"inputs": "int8_static"} | how)


def test_inputs_without_a_scale_are_errors():
    lm = make()
    layers = lm.params["decoder"]["layers"]
    for value, message in ((0.0, "layer 1 are always zero"), (np.nan, "layer 1 are not finite")):
        norm = layers["mlp_norm"] | {"scale": layers["mlp_norm"]["scale"].at[1].set(value)}
        params = lm.params | {"decoder": lm.params["decoder"] | {"layers": layers | {"mlp_norm": norm}}}
        broken = dataclasses.replace(lm, params=params)
        with pytest.raises(jaxlm.UserError, match=f"inputs of decoder/layers/mlp/(up|gate)/kernel in {message}"):
            input_scales(broken, TEXTS, ["decoder/layers/mlp/up/kernel", "decoder/layers/mlp/gate/kernel"])
    with pytest.raises(jaxlm.UserError, match="the model does not multiply by own/kernel; choose targets"):
        input_scales(lm, TEXTS, ["own/kernel"])


# References


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("is_dynamic", [False, True])
def test_rounded_inputs_equal_those_of_compressed_tensors(kind, is_dynamic):
    torch, arguments = pytest.importorskip("torch"), pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    x_BI = 4 * RANDOM.standard_normal((64, 32)).astype(np.float32)
    args = arguments.QuantizationArgs(num_bits=8, type="int" if kind == "int8" else "float", strategy="tensor")
    scale = np.abs(x_BI).max(1, keepdims=True) / (127 if kind == "int8" else 448) if is_dynamic else np.float32(0.02)
    values, found_scale = round_inputs(x_BI, kind, None if is_dynamic else scale)
    theirs = forward.fake_quantize(torch.tensor(x_BI), torch.tensor(scale), torch.tensor(0.0), args)
    np.testing.assert_allclose(values.astype(jnp.float32) * found_scale, theirs.numpy(), atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("model", [LLAMA, BERT, MODERNBERT], ids=["llama", "bert", "modernbert"])
@pytest.mark.parametrize("kind", ["int8 static", "fp8 static", "fp8 dynamic"])
def test_transformers_computes_the_same(model, kind, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    lm = static(model)
    if "fp8" in kind:
        lm = with_inputs(jaxlm.quantize(make(model), "fp8"), "fp8", None if "dynamic" in kind else 0.01)
    jaxlm.save(lm, tmp_path / "model")
    auto = transformers.AutoModelForCausalLM if model is LLAMA else transformers.AutoModel
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        theirs = auto.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        output = theirs(torch.tensor(TOKENS_BT).long())
    found = lm(TOKENS_BT)
    pair = (found.logits, output.logits) if model is LLAMA else (found.hidden_BTD, output.last_hidden_state)
    np.testing.assert_allclose(pair[0], pair[1].numpy(), atol=1e-5)
