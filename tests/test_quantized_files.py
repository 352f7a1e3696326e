"""Files of quantised models: written and read without a change, and read from the formats of other packages."""

from __future__ import annotations

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from random_params import random_params
from test_nodes import TOKENS_BT

import jaxlm
from jaxlm import families
from jaxlm.errors import UserError
from jaxlm.families import FAMILIES
from jaxlm.hub import packed, safetensors
from jaxlm.lm import LM
from jaxlm.nn import nodes, parameters
from jaxlm.nn.quantized import Quantized, quantize
from jaxlm.nn.transformer import Transformer

SIZES = {"vocabulary": 48, "width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 16, "mlp_width": 64}
SIZES |= {"max_length": 32, "tied_embeddings": False}
LLAMA = dataclasses.replace(FAMILIES["llama"].presets["smollm-135m"], **SIZES, heads_on_top=("lm",))
BERT = dataclasses.replace(
    next(iter(FAMILIES["bert"].presets.values())), **SIZES | {"kv_heads": None, "tied_embeddings": True}
)
KINDS = {
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4", "group": 16},
    "int4 asymmetric": {"weights": "int4", "group": 16, "symmetric": False},
    "int8 inputs": {"weights": "int8", "inputs": "int8"},
    "int4 inputs": {"weights": "int4", "group": 16, "inputs": "int8"},
    "int8 asymmetric inputs": {"weights": "int8", "inputs": "int8", "symmetric": False},
    "fp8": {"weights": "fp8"},
}
PROJECTION = "model.layers.0.self_attn.q_proj"


def make(model=LLAMA) -> LM:
    return LM(model, Transformer(model), jax.tree.map(jnp.asarray, random_params(model)))


def leaves(params):
    return jax.tree.leaves(params, is_leaf=nodes.is_node)


def files(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_quantised_model_loads_with_the_same_nodes(kind, tmp_path):
    lm = jaxlm.quantize(make(), **KINDS[kind], embeddings="inputs" not in kind)
    assert jaxlm.save(lm, tmp_path / "a") == "llama"
    back = jaxlm.load(tmp_path / "a")
    for found, expected in zip(leaves(back.params), leaves(lm.params), strict=True):
        assert type(found) is type(expected)
        if isinstance(found, Quantized):
            statics = lambda node: (node.first, node.inputs, node.input_format, node.values.dtype)
            assert statics(found) == statics(expected)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(found), jax.tree.leaves(expected))
    jaxlm.save(back, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    np.testing.assert_allclose(back(TOKENS_BT).logits, lm(TOKENS_BT).logits, atol=1e-6)


def test_the_files_are_smaller(tmp_path):
    for name, lm in {"float": make(), "int4": jaxlm.quantize(make(), "int4", group=32, embeddings=True)}.items():
        jaxlm.save(lm, tmp_path / name)
    size = lambda name: (tmp_path / name / "model.safetensors").stat().st_size
    assert size("int4") < 0.4 * size("float")


def test_only_some_projections_may_be_quantised(tmp_path):
    lm = jaxlm.quantize(jaxlm.quantize(make(), "int4", targets="mlp"), "int8", targets="out,query")
    jaxlm.save(lm, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert {group["weights"]["num_bits"] for group in config["config_groups"].values()} == {4, 8}
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert r"re:(.*\.)?layers\.\d+\.self_attn\.o_proj$" in targets and len(targets) == 5
    assert [type(leaf) for leaf in leaves(jaxlm.load(tmp_path / "model").params)] == list(map(type, leaves(lm.params)))


def test_nf4_is_written_as_floats_with_a_message(tmp_path, capsys):
    lm = jaxlm.quantize(make(), "nf4")
    jaxlm.save(lm, tmp_path / "model")
    assert "nf4" in capsys.readouterr().err
    back = jaxlm.load(tmp_path / "model")
    assert not any(nodes.is_node(leaf) for leaf in leaves(back.params))
    np.testing.assert_allclose(back(TOKENS_BT).logits, lm(TOKENS_BT).logits, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_other_parameters_have_the_requested_dtype(dtype, tmp_path):
    jaxlm.save(jaxlm.quantize(make()), tmp_path / "model", dtype=dtype)
    found = jaxlm.load(tmp_path / "model", dtype=None)
    assert found.module.dtype == jnp.dtype(dtype)
    assert found.params["embeddings"]["tokens"].dtype == dtype
    assert found.params["decoder"]["layers"]["mlp"]["up"]["kernel"].scales.dtype == jnp.float32


def test_a_quantised_model_loads_sharded(tmp_path):
    lm = jaxlm.quantize(make(), "int4", group=16, symmetric=False)
    jaxlm.save(lm, tmp_path / "model")
    mesh = jaxlm.devices.sharding.make_mesh(jaxlm.MeshConfig(1, 2, 1), jax.devices()[:2])
    back = jaxlm.load(tmp_path / "model", mesh=mesh)
    specs = {path: leaf.sharding.spec for path, leaf in parameters.by_path(back.params).items()}
    assert specs["decoder/layers/mlp/up/kernel/values"] == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    np.testing.assert_allclose(back(TOKENS_BT).logits, lm(TOKENS_BT).logits, atol=1e-5)


# Other packages


def write(folder, model, settings, replace) -> dict[str, np.ndarray]:
    """Writes a model whose projections are replaced by `replace(weight)`, and returns the original tensors."""
    jaxlm.save(make(model), folder)
    tensors = {name: np.array(tensor) for name, tensor in safetensors.read(folder).items()}
    written = {}
    for name, tensor in tensors.items():
        is_projection = "layers." in name and tensor.ndim == 2
        parts = replace(tensor) if is_projection else {"weight": tensor}
        written |= {f"{name.removesuffix('.weight')}.{part}": x for part, x in parts.items()}
    safetensors.write(written, folder / safetensors.WEIGHTS)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def opened(folder):
    return families.open_folder(folder).tensors


def test_bits_are_packed_from_the_lowest():
    assert packed.pack(np.arange(8)[None], 4).tolist() == [[0x76543210]]
    assert packed.pack(np.array([[1, 2, 3]]), 8).tolist() == [[0x00030201]]
    values = np.random.default_rng(0).integers(0, 16, (3, 24)).astype(np.uint8)
    np.testing.assert_array_equal(packed.unpack(packed.pack(values, 4), 4), values)


def gptq_parts(order, version=1, bits=4, group=16):
    """Returns a function weight -> parts of GPTQ, and a dict that receives the dequantised matrices."""
    random, dense = np.random.default_rng(0), {}

    def replace(weight):
        outputs, inputs = weight.shape
        values = random.integers(0, 2**bits, (inputs, outputs)).astype(np.uint8)
        zeros = random.integers(1, 2**bits, (inputs // group, outputs)).astype(np.uint8)
        scales = random.random((inputs // group, outputs)).astype(np.float16)
        groups = (np.arange(inputs) // group)[random.permutation(inputs) if order else slice(None)]
        dense[len(dense)] = ((values.astype(np.float32) - zeros[groups]) * scales[groups].astype(np.float32)).T
        return {
            "qweight": packed.pack(values.T, bits).T.copy(),
            "qzeros": packed.pack(zeros - (version == 1), bits),
            "scales": scales,
            "g_idx": groups.astype(np.int32),
        }

    return replace, dense


@pytest.mark.parametrize(("order", "version", "bits"), [(False, 1, 4), (True, 1, 4), (False, 2, 8)])
def test_gptq_files_are_dequantised(order, version, bits, tmp_path):
    replace, dense = gptq_parts(order, version, bits)
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 16, "desc_act": order}
    settings["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    names = [name for name, x in write(tmp_path, LLAMA, settings, replace).items() if "layers." in name and x.ndim == 2]
    tensors = opened(tmp_path)
    for name, expected in zip(names, dense.values(), strict=True):
        assert tensors[name].dtype == np.float16
        np.testing.assert_array_equal(np.asarray(tensors[name]), expected.astype(np.float16))
    lm = jaxlm.load(tmp_path)
    assert np.isfinite(lm(TOKENS_BT).logits).all() and "quantization_config" not in lm.origin.config
    jaxlm.save(lm, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_awq_files_are_dequantised(tmp_path):
    random, order = np.random.default_rng(0), [0, 2, 4, 6, 1, 3, 5, 7]  # nibble k has column order[k]
    dense = []

    def interleave(values):
        words = values.reshape(len(values), -1, 8).astype(np.uint32)
        return sum(words[..., column] << np.uint32(4 * k) for k, column in enumerate(order)).view(np.int32)

    def replace(weight):
        outputs, inputs = weight.shape
        values, zeros = random.integers(0, 16, (inputs, outputs)), random.integers(0, 16, (inputs // 16, outputs))
        scales = random.random((inputs // 16, outputs)).astype(np.float16)
        dense.append(((values - zeros.repeat(16, 0)) * scales.astype(np.float32).repeat(16, 0)).T)
        return {"qweight": interleave(values), "qzeros": interleave(zeros), "scales": scales}

    settings = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
    names = [name for name, x in write(tmp_path, LLAMA, settings, replace).items() if "layers." in name and x.ndim == 2]
    tensors = opened(tmp_path)
    for name, expected in zip(names, dense, strict=True):
        np.testing.assert_array_equal(np.asarray(tensors[name]), expected.astype(np.float16))


def test_int8_files_of_bitsandbytes_are_dequantised(tmp_path):
    def replace(weight):
        largest = np.abs(weight).max(1).astype(np.float32)
        values = np.round(weight * 127 / largest[:, None]).astype(np.int8)
        return {"weight": values, "SCB": largest, "weight_format": np.zeros((), np.uint8)}

    tensors = write(tmp_path, LLAMA, {"quant_method": "bitsandbytes", "load_in_8bit": True}, replace)
    for name, found in opened(tmp_path).items():
        bound = np.abs(tensors[name]).max() / 250
        np.testing.assert_allclose(np.asarray(found, np.float32), tensors[name], atol=bound, err_msg=name)


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"bits": 3}, None, "quantization with bits 3; supported are 2, 4, 8"),
        ({"group_size": 24}, None, "group_size 24, which does not divide (32|64) inputs"),
        ({"group_size": 32}, None, r"scales has shape \[\d, \d+\], but the weights and config.json require"),
        ({"bits": 8}, None, "scales has shape"),
        ({}, lambda tensors: tensors.pop(f"{PROJECTION}.scales"), "qweight, but no .*q_proj.scales"),
        ({}, lambda tensors: tensors.pop(f"{PROJECTION}.qzeros"), "qweight, but no .*q_proj.qzeros"),
        ({}, lambda tensors: tensors.update({f"{PROJECTION}.g_idx": np.zeros(3, np.int32)}), r"g_idx has shape \[3\]"),
        ({}, lambda tensors: tensors.update({f"{PROJECTION}.qweight": np.zeros((4, 32), np.int8)}), "int8, not int32"),
        ({"quant_method": "awq"}, None, "qzeros has shape|scales has shape"),
        ({"quant_method": "aqlm"}, None, "is quantised with aqlm"),
    ],
)
def test_contradictory_files_are_errors(settings, change, message, tmp_path):
    replace, _ = gptq_parts(False)
    write(tmp_path, LLAMA, {"quant_method": "gptq", "bits": 4, "group_size": 16} | settings, replace)
    if change:
        tensors = {name: np.array(tensor) for name, tensor in safetensors.read(tmp_path).items()}
        change(tensors)
        safetensors.write(tensors, tmp_path / safetensors.WEIGHTS)
    with pytest.raises(jaxlm.UserError, match=message):
        families.open_folder(tmp_path)


def test_a_truncated_file_is_an_error(tmp_path):
    replace, _ = gptq_parts(False)
    write(tmp_path, LLAMA, {"quant_method": "gptq", "bits": 4, "group_size": 16}, replace)
    file = tmp_path / safetensors.WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(jaxlm.UserError, match="truncated or corrupt"):
        families.open_folder(tmp_path)


def test_8_bit_floats_of_a_tensor_are_dequantised(tmp_path):
    def replace(weight):
        scale = np.float32(np.abs(weight).max() / 448)
        values = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
        return {"weight": values, "weight_scale": np.array([scale]), "input_scale": np.ones(1, np.float32)}

    scheme = {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": scheme}}
    tensors = write(tmp_path, LLAMA, settings, replace)
    for name, found in opened(tmp_path).items():
        np.testing.assert_allclose(np.asarray(found), tensors[name], rtol=0.07, atol=1e-3)


# References


@pytest.mark.parity
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "int8 asymmetric inputs"])
@pytest.mark.parametrize("model", [LLAMA, BERT], ids=["llama", "bert"])
def test_transformers_computes_the_same_with_compressed_tensors(model, kind, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    lm = jaxlm.quantize(make(model), **KINDS[kind])
    jaxlm.save(lm, tmp_path / "model")
    auto = transformers.AutoModelForCausalLM if model is LLAMA else transformers.AutoModel
    # Without `dequantize`, compressed-tensors 0.20 creates packed zero points with the shape of unpacked ones.
    dequantize = "asymmetric" in kind
    how = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    with warnings.catch_warnings():  # about the two quantization configs
        warnings.simplefilter("ignore", UserWarning)
        theirs = auto.from_pretrained(tmp_path / "model", **how).eval()
    with torch.no_grad():
        output = theirs(torch.tensor(TOKENS_BT).long())
    found = lm(TOKENS_BT)
    pair = (found.logits, output.logits) if model is LLAMA else (found.hidden_BTD, output.last_hidden_state)
    # compressed-tensors computes other steps of inputs: the results differ by a part of the rounding error.
    np.testing.assert_allclose(pair[0], pair[1].numpy(), atol=0.2 if "inputs" in kind else 2e-4)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["nf4", "fp4", "nf4 nested"])
def test_4_bit_files_of_bitsandbytes_are_dequantised(kind, tmp_path):
    torch, functional = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes.functional")
    dense = []

    def replace(weight):
        tensor = torch.tensor(weight)
        values, state = functional.quantize_4bit(
            tensor, blocksize=64, quant_type=kind[:3], compress_statistics="nested" in kind
        )
        dense.append(functional.dequantize_4bit(values, state).numpy())
        return {"weight": values.numpy()} | {f"weight.{n}": x.numpy() for n, x in state.as_dict(packed=True).items()}

    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model = dataclasses.replace(LLAMA, width=64, heads=4)  # on CPU, bitsandbytes requires blocks within rows
    names = [name for name, x in write(tmp_path, model, settings, replace).items() if "layers." in name and x.ndim == 2]
    tensors = opened(tmp_path)
    for name, expected in zip(names, dense, strict=True):
        np.testing.assert_allclose(np.asarray(tensors[name]), expected, atol=1e-6)


# FP8 in blocks, as DeepSeek-V3 and the FP8 versions of Qwen3 are published.


def in_blocks(folder, rows: int, width: int, model=LLAMA) -> dict[str, np.ndarray]:
    """Writes a model in FP8 with a scale per block, and returns the dense tensors that the file stands for."""
    jaxlm.save(make(model), folder)
    tensors = {name: np.array(tensor) for name, tensor in safetensors.read(folder).items()}
    stored, dense = {}, {}
    for name, x in tensors.items():
        if not name.endswith("proj.weight"):
            stored[name] = dense[name] = x
            continue
        of_block = lambda scales, shape=x.shape: np.kron(scales, np.ones((rows, width)))[: shape[0], : shape[1]]
        counts = -(-x.shape[0] // rows), -(-x.shape[1] // width)
        scales = np.random.default_rng(len(name)).uniform(0.001, 0.01, counts).astype(np.float32)
        stored[name] = np.clip(x / of_block(scales), -448, 448).astype(ml_dtypes.float8_e4m3fn)  # larger ones are NaN
        stored[f"{name}_scale_inv"] = scales
        dense[name] = (stored[name].astype(np.float32) * of_block(scales)).astype(np.float32)
    safetensors.write(stored, folder / safetensors.WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [rows, width]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return dense


@pytest.mark.parametrize(("rows", "width", "is_node"), [(16, 16, True), (24, 32, True), (64, 64, False), (7, 5, False)])
def test_fp8_in_blocks_is_read(rows, width, is_node, tmp_path, capsys):
    dense = in_blocks(tmp_path / "blocks", rows, width)
    lm = jaxlm.load(tmp_path / "blocks")
    assert "inputs of projections are not rounded as in" in capsys.readouterr().err
    layers = lm.params["decoder"]["layers"]
    assert isinstance(layers["attention"]["query"]["kernel"], Quantized) == is_node
    up_LDF = nodes.dense_layers(layers["mlp"]["up"]["kernel"])
    expected = np.stack([dense[f"model.layers.{n}.mlp.up_proj.weight"].T for n in range(2)])
    np.testing.assert_allclose(up_LDF, expected, rtol=1e-6)
    jaxlm.save(make(), tmp_path / "dense")
    safetensors.write(dense, tmp_path / "dense" / safetensors.WEIGHTS)
    expected_BTV = jaxlm.load(tmp_path / "dense")(TOKENS_BT).logits
    assert np.isfinite(expected_BTV).all()
    np.testing.assert_allclose(lm(TOKENS_BT).logits, expected_BTV, atol=1e-5)
    jaxlm.save(lm, tmp_path / "again")
    np.testing.assert_allclose(jaxlm.load(tmp_path / "again")(TOKENS_BT).logits, expected_BTV, atol=1e-5)


def test_experts_in_fp8_blocks_are_read(tmp_path):
    preset = next(iter(FAMILIES["qwen3_moe"].presets.values()))
    model = dataclasses.replace(preset, **SIZES, experts=3, experts_per_token=2, heads_on_top=("lm",))
    dense = in_blocks(tmp_path / "blocks", 16, 16, model)
    jaxlm.save(make(model), tmp_path / "dense")
    safetensors.write(dense, tmp_path / "dense" / safetensors.WEIGHTS)
    found, expected = (jaxlm.load(tmp_path / name)(TOKENS_BT).logits for name in ("blocks", "dense"))
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ([16], r"weight_block_size \[16\]; it must be two sizes"),
        ([16, 0], "it must be two sizes such as"),
        ("16x16", "it must be two sizes"),
        ([8, 16], r"weight_scale_inv has shape \[2, 4\], but the weights and config.json require \[4, 4\]"),
    ],
)
def test_a_wrong_block_size_is_refused(block, message, tmp_path):
    in_blocks(tmp_path, 16, 16)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = block
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        jaxlm.load(tmp_path)


@pytest.mark.parity
def test_fp8_blocks_equal_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    in_blocks(tmp_path, 16, 16)
    tensors = {name: np.array(tensor) for name, tensor in safetensors.read(tmp_path).items()}
    lm, name = jaxlm.load(tmp_path), "model.layers.1.mlp.down_proj.weight"
    values = torch.from_numpy(tensors[name].view(np.uint8)).view(torch.float8_e4m3fn)
    scales = torch.from_numpy(tensors[f"{name}_scale_inv"])
    expected = Fp8Dequantize(None)._dequantize_one(values, scales, torch.float32).numpy()
    found = nodes.dense_layers(lm.params["decoder"]["layers"]["mlp"]["down"]["kernel"])[1].T
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# Experts: each matrix is quantised alone.

EXPERTS = {
    name: dataclasses.replace(
        next(iter(FAMILIES[name].presets.values())), **SIZES, experts=3, experts_per_token=2, heads_on_top=("lm",)
    )
    for name in ("qwen3_moe", "mixtral", "gpt_oss")
}


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("how", [{"weights": "int8"}, {"weights": "int4", "group": 16, "symmetric": False}], ids=str)
def test_each_expert_is_quantised_like_a_projection(name, how):
    lm = make(EXPERTS[name])
    quantized = jaxlm.quantize(lm, **how)
    for matrix in ("up", "gate", "down"):
        node = quantized.params["decoder"]["layers"]["mlp"]["experts"][matrix]
        dense = lm.params["decoder"]["layers"]["mlp"]["experts"][matrix]
        expected = quantize(dense[1, 2], stacked=False, **how)
        found = jax.tree.map(lambda leaf: leaf[1, 2], node)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    merged = jaxlm.merge(quantized, dequantize=True)
    assert not any(nodes.is_node(leaf) for leaf in leaves(merged.params))
    np.testing.assert_allclose(quantized(TOKENS_BT).logits, merged(TOKENS_BT).logits, atol=1e-5)
    only = jaxlm.quantize(lm, "int8", targets="experts")
    assert sum(nodes.is_node(leaf) for leaf in leaves(only.params)) == 3


@pytest.mark.parametrize("name", EXPERTS)
def test_quantised_experts_are_written_and_read(name, tmp_path):
    lm = jaxlm.quantize(make(EXPERTS[name]), "int4", group=16)
    jaxlm.save(lm, tmp_path / "a")
    back = jaxlm.load(tmp_path / "a")
    if name != "gpt_oss":  # whose file has one tensor for all experts, for which compressed-tensors has no format
        assert jax.tree.structure(back.params) == jax.tree.structure(lm.params)
        jax.tree.map(np.testing.assert_array_equal, back.params, lm.params)
        jaxlm.save(back, tmp_path / "b")
        assert files(tmp_path / "a") == files(tmp_path / "b")
    np.testing.assert_allclose(back(TOKENS_BT).logits, lm(TOKENS_BT).logits, atol=1e-5)


def test_quantised_experts_load_sharded(tmp_path):
    lm = jaxlm.quantize(make(dataclasses.replace(EXPERTS["qwen3_moe"], experts=4)), "int4", group=16)
    jaxlm.save(lm, tmp_path / "model")
    mesh = jaxlm.devices.sharding.make_mesh(jaxlm.MeshConfig(data=1, expert=2), jax.devices()[:2])
    back = jaxlm.load(tmp_path / "model", mesh=mesh)
    node = back.params["decoder"]["layers"]["mlp"]["experts"]["up"]
    assert node.values.sharding.spec[1] == node.scales.sharding.spec[1] == "expert"
    np.testing.assert_allclose(back(TOKENS_BT).logits, lm(TOKENS_BT).logits, atol=1e-5)


def test_magnitude_pruning_removes_weights_of_each_expert():
    pruned = jaxlm.prune(make(EXPERTS["qwen3_moe"]), 0.5)
    up_LXDF = np.asarray(pruned.params["decoder"]["layers"]["mlp"]["experts"]["up"])
    np.testing.assert_allclose((up_LXDF == 0).mean((2, 3)), 0.5)
    assert set(jaxlm.transforms.pruning.sparsity_of(pruned).values()) == {0.5}
