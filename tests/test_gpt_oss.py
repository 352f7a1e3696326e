"""gpt-oss: attention sinks, and experts that are stored in MXFP4."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm import UserError, families
from jaxlm.families import FAMILIES, PRESETS
from jaxlm.hub import packed, safetensors
from jaxlm.nn.dot_product import Scores, dot_product_attention
from jaxlm.nn.kernels import Backend, why_not
from jaxlm.nn.masks import self_mask
from jaxlm.nn.stack import CacheSpec
from jaxlm.nn.transformer import Transformer, apply

FAMILY = FAMILIES["gpt_oss"]
SMALL = dataclasses.replace(
    PRESETS["gpt-oss-20b"], layers=2, width=32, mlp_width=32, heads=4, kv_heads=2, head_width=8, vocabulary=24,
    experts=4, experts_per_token=2, window=3,
)  # fmt: skip


def draw(*shapes: tuple[int, ...]) -> list[jax.Array]:
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("length", [9, 150])
def test_a_sink_is_a_key_whose_value_is_zero(length):
    """Every query attends to the key; the longer rows are computed in blocks."""
    q, k, v, sinks = draw((2, length, 4, 8), (2, length, 2, 8), (2, length, 2, 8), (4,))
    segments = jnp.asarray(np.repeat([[1, 2, 0]], 2, 0).repeat(length // 3, 1))
    mask = self_mask(segments, True, window=5)
    found = dot_product_attention(q, k, v, mask, Scores(0.5, sinks_H=sinks), causal=True)
    zero = jnp.zeros((2, 1, 2, 8))
    bias = jnp.concatenate([jnp.broadcast_to(sinks[None, :, None, None], (2, 4, length, 1)),
                            jnp.zeros((2, 4, length, length))], -1)  # fmt: skip
    first = jnp.concatenate([jnp.ones((2, length, 1), bool), mask], -1)
    keys, values = (jnp.concatenate([zero, x], 1) for x in (k, v))
    expected = dot_product_attention(q, keys, values, first, Scores(0.5, bias_BHTS=bias))
    real = np.asarray(segments) > 0
    np.testing.assert_allclose(found[real], expected[real], atol=1e-5)
    without = dot_product_attention(q, k, v, mask, Scores(0.5, sinks_H=jnp.full(4, -1e9)), causal=True)
    plain = dot_product_attention(q, k, v, mask, Scores(0.5), causal=True)
    np.testing.assert_allclose(without[real], plain[real], atol=1e-6)


@pytest.mark.parametrize("kernel, backend", [("splash", Backend("tpu", 5.0)), ("cudnn", Backend("cuda", 9.0))])
def test_fused_kernels_name_sinks_as_the_reason(kernel, backend):
    q = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
    assert why_not(kernel, backend, None, q, q) is None
    assert "sinks" in (why_not(kernel, backend, None, q, q, sinks=True) or "")


@pytest.mark.long
def test_an_8_bit_cache_has_small_errors():
    module, params = Transformer(SMALL), random_params(SMALL)
    tokens = np.random.default_rng(0).integers(0, 24, (2, 9))

    def decode(format: str) -> jax.Array:
        spec = CacheSpec(jnp.full(2, 8), 12, format=format)
        run = lambda params: apply(module, params, tokens[:, :8], spec, method="prefill")[1]
        last = lambda *inputs: apply(module, params, tokens[:, 8:], np.full((2, 1), 8), *inputs, method="decode_cached")
        return jax.jit(last)(jax.jit(run)(params))[0]

    exact, rounded = decode("compute"), decode("int8")
    np.testing.assert_allclose(exact[:, 0], apply(module, params, tokens)[:, 8], atol=1e-4)
    assert 0 < np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max()


def pack(values_XIO: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns blocks and scales of matrices whose entries MXFP4 represents exactly."""
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    grouped = values_XIO.swapaxes(1, 2).reshape(len(values_XIO), values_XIO.shape[2], -1, 32)
    exponents = np.ceil(np.log2(np.maximum(np.abs(grouped).max(-1) / 6, 2.0**-127))).astype(int)
    units = grouped / 2.0 ** exponents[..., None]
    nearest = np.abs(np.abs(units)[..., None] - levels).argmin(-1).astype(np.uint8) | np.where(units < 0, 8, 0).astype(
        np.uint8
    )
    return nearest[..., ::2] | nearest[..., 1::2] << 4, (exponents + 127).astype(np.uint8)


def folder_in_mxfp4(path):
    params = random_params(SMALL)
    families.save(SMALL, params, path)
    tensors = {name: np.asarray(tensor) for name, tensor in safetensors.read(path).items()}
    random = np.random.default_rng(1)
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        values = random.choice([0, 0.5, -0.5, 1, -1.5, 2, 3, -4, 6], tensors[name].shape) * 2.0 ** random.integers(
            -6, -2
        )
        tensors[name] = values.astype(np.float32)
    packed_tensors = {name: x for name, x in tensors.items() if not name.endswith("_proj") or "experts" not in name}
    for name in tensors.keys() - packed_tensors.keys():
        packed_tensors[f"{name}_blocks"], packed_tensors[f"{name}_scales"] = pack(tensors[name])
    safetensors.write(packed_tensors, path / safetensors.WEIGHTS)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    return tensors


def test_experts_in_mxfp4_are_dequantised(tmp_path):
    expected = folder_in_mxfp4(tmp_path / "packed")
    lm = jaxlm.load(tmp_path / "packed", dtype="float32")
    jaxlm.save(lm, tmp_path / "plain")
    found = safetensors.read(tmp_path / "plain")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]).astype(np.float32), tensor, err_msg=name)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


BLOCKS = {"x.down_proj_blocks": np.zeros((2, 3, 4, 16), np.uint8)}
SCALES = np.zeros((2, 3, 4), np.uint8)


@pytest.mark.parametrize(
    "tensors, message",
    [
        (BLOCKS, "x.down_proj_scales is missing, or not uint8"),
        (BLOCKS | {"x.down_proj_scales": SCALES.astype(np.float32)}, "not uint8"),
        (BLOCKS | {"x.down_proj_scales": SCALES[:1]}, r"shape \[2, 3, 4, 16\] and its scales \[1, 3, 4\]"),
        ({"x.down_proj_blocks": SCALES, "x.down_proj_scales": SCALES}, "16 bytes for each scale"),
        ({"x.down_proj_blocks": np.zeros((2, 3, 4, 8), np.uint8), "x.down_proj_scales": SCALES}, "16 bytes"),
    ],
)
def test_malformed_tensors_are_errors(tensors, message):
    with pytest.raises(UserError, match=message):
        packed.mxfp4(tensors, {})


@pytest.mark.parity
def test_dequantised_experts_equal_those_of_transformers():
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (2, 6, 3, 16), np.uint8)
    scales = random.integers(110, 140, (2, 6, 3), np.uint8)
    found = packed.mxfp4({"x_blocks": blocks, "x_scales": scales}, {})["x"]
    theirs = mxfp4.convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
    assert found.shape == tuple(theirs.shape) and found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(np.asarray(found).astype(np.float32), theirs.float().numpy())


@pytest.mark.parametrize("change", [{"swiglu_alpha": 1.5}, {"hidden_act": "gelu"}, {"sliding_window": 0}])
def test_other_settings_are_errors(change):
    hf = FAMILY.config_to_hf(SMALL) | change
    with pytest.raises(UserError, match=f"{next(iter(change))}|window"):
        FAMILY.config_from_hf(hf).check()
