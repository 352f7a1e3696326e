"""The parts of a plan: the table of chips, counts of matrix products, and the analysis of compiled programs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm import config
from jaxlm.config import ModelConfig
from jaxlm.devices import chips
from jaxlm.errors import UserError
from jaxlm.nn import flops
from jaxlm.nn.losses import cross_entropy
from jaxlm.nn.stack import Targets
from jaxlm.nn.transformer import Transformer, apply, init
from jaxlm.planning import hlo
from jaxlm.tasks.pretraining import CausalLMTask, MaskedLMTask

# ---- chips


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "7x"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA A100-PCIE-40GB", "A100-PCIe-40"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe-80"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("Tesla V100-SXM2-32GB", "V100-32"),
        ("TPU v2", "v2"),
        ("TPU v3", "v3"),
        ("NVIDIA GeForce RTX 3050", None),
        ("cpu", None),
    ],
)
def test_a_chip_is_found_by_its_device_kind(kind, name):
    found = chips.find(kind)
    assert (found and found.name) == name


def test_no_two_chips_have_a_device_kind_in_common_and_unknown_ones_are_reported():
    kinds = [kind for chip in chips.CHIPS for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))
    assert "the peak rate of 'NVIDIA X1' is unknown" in chips.unknown_chip_warning("NVIDIA X1", "gpu")
    assert not chips.unknown_chip_warning("cpu", "cpu") and not chips.unknown_chip_warning("Tesla T4", "gpu")


@pytest.mark.parametrize(
    ("dtype", "precision", "platform", "part"),
    [
        ("float32", "default", "tpu", "one pass of bfloat16"),
        ("float32", "default", "gpu", "TensorFloat32"),
        ("float32", "high", "tpu", "three passes of bfloat16"),
        ("float32", "highest", "tpu", ""),
        ("float32", "default", "cpu", ""),
        ("bfloat16", "default", "tpu", ""),
    ],
)
def test_reduced_precision_of_float32_products_is_reported(dtype, precision, platform, part):
    sentence = chips.float32_warning(dtype, precision, platform)
    assert part in sentence and bool(part) == bool(sentence)


@pytest.mark.parametrize("chip", chips.CHIPS, ids=lambda chip: chip.name)
def test_each_constant_has_a_source_and_a_plausible_value(chip):
    assert all(constant.source and constant.unit in str(constant) for constant in chip.constants.values())
    assert 2e13 < chip.flops.value < 3e15 and 1e10 <= chip.link.value < 1e12
    assert 7 * 2**30 < chip.hbm.value < 200 * 2**30 and 2e11 < chip.bandwidth.value < 1e13
    assert bool(chip.dimensions) == bool(chip.pod) and (not chip.libtpu or chip.dimensions)
    # The ratio of arithmetic to memory bandwidth is similar on all chips.
    assert 60 < chip.flops.value / chip.bandwidth.value < 600


@pytest.mark.parametrize(
    ("name", "chip", "shape"),
    [
        ("v5e:4x4", "v5e", (4, 4)),
        (" V4:4x4x8", "v4", (4, 4, 8)),
        ("tpu7x:2x2x1", "7x", (2, 2, 1)),
        ("7x:4x4x4", "7x", (4, 4, 4)),
        ("H100:8", "H100", (8,)),
        ("a100-80:1", "A100-80", (1,)),
    ],
)
def test_a_topology_is_parsed(name, chip, shape):
    found, found_shape = chips.parse_topology(name)
    assert (found.name, found_shape) == (chip, shape)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-16", "CHIP:SHAPE"),
        ("v5x:4x4", "perhaps you meant 'v5"),
        ("v5e:3x3", "choose from v5e: 1x1 2x2"),
        ("v5e:0x4", "choose from v5e:"),
        ("v5e:4x4x4", "choose from v5e:"),
        ("v5p:4x4", "multiples of 4"),
        ("v4:16x16x32", "at most 4,096 chips"),
        ("H100", "CHIP:SHAPE, such as v5e:4x4 or H100:8"),
        ("H100:9", "a number of GPUs from 1 to 8, such as H100:8"),
        ("H100:2x4", "a number of GPUs from 1 to 8"),
        ("H1000:8", "perhaps you meant 'h100'"),
        ("T4:1", "unknown chip"),  # XLA has no products in bfloat16 for it
    ],
)
def test_an_unknown_topology_raises_an_error_with_the_known_ones(name, message):
    with pytest.raises(UserError, match=message):
        chips.topology_devices(name)


def test_without_libtpu_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(chips, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UserError, match=r"pip install 'jaxlm\[plan\]'"):
        chips.topology_devices("v5e:2x2")


def test_without_the_plugin_for_cuda_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(chips, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jaxlm\[plan-gpu\]'"):
        chips.topology_devices("H100:1")


def test_links_form_rings_with_enough_chips():
    assert chips.rings(*chips.parse_topology("v5e:8x16")) == (False, True)
    assert chips.rings(*chips.parse_topology("v5p:4x4x8")) == (True, True, True)
    assert chips.rings(*chips.parse_topology("v5p:2x2x4")) == (False, False, False)


# ---- matrix products


@pytest.mark.parametrize("causal", [True, False])
def test_the_products_of_cudnn_are_counted(causal, monkeypatch):
    """Forward 2 products of T x S pairs, backward 5; a causal mask leaves half of the pairs and the diagonal."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    B, T, H, K, C = 2, 64, 4, 2, 32
    attend = partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
    loss = lambda q, k, v: attend(q, k, v).astype(jnp.float32).sum()
    q, k = (jax.ShapeDtypeStruct((B, T, heads, C), jnp.bfloat16) for heads in (H, K))
    pairs = T * (T + 1) // 2 if causal else T * T
    assert flops.count(jax.make_jaxpr(attend)(q, k, k)) == 4 * B * H * C * pairs
    assert flops.count(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, k)) == 14 * B * H * C * pairs


@pytest.mark.parametrize("causal", [True, False])
def test_the_products_of_triton_are_counted(causal):
    from jax.experimental.pallas.ops.gpu.attention import mha

    B, T, H, C = 2, 256, 4, 32
    attend = lambda q, k, v: mha(q, k, v, None, causal=causal)
    q = jax.ShapeDtypeStruct((B, T, H, C), jnp.bfloat16)
    pairs = T * (T + 1) // 2 if causal else T * T
    assert flops.count(jax.make_jaxpr(attend)(q, q, q)) == 4 * B * H * C * pairs
    loss = lambda q, k, v: attend(q, k, v).astype(jnp.float32).sum()
    assert flops.count(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, q, q)) == 18 * B * H * C * pairs


def count_flops(function, *shapes, dtype=jnp.float32):
    return flops.count(jax.make_jaxpr(function)(*[jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]))


def test_products_are_counted_by_their_sizes():
    assert count_flops(jnp.matmul, (2, 3), (3, 5)) == 2 * 2 * 3 * 5
    assert count_flops(partial(jnp.einsum, "bij,bjk->bik"), (7, 2, 3), (7, 3, 5)) == 7 * 2 * 2 * 3 * 5
    assert count_flops(lambda x: (x * x).sum() + jnp.exp(x), (4, 4)) == 0
    convolve = partial(jax.lax.conv_general_dilated, window_strides=(1,), padding="VALID")
    assert count_flops(convolve, (2, 6, 10), (4, 6, 3)) == 2 * (2 * 4 * 8) * (6 * 3)
    grouped = partial(convolve, feature_group_count=2)
    assert count_flops(grouped, (2, 6, 10), (4, 3, 3)) == 2 * (2 * 4 * 8) * (3 * 3)


SQUARE = 2 * 4**3  # operations of [4, 4] @ [4, 4]


def test_products_in_loops_and_calls_are_counted_for_each_execution():
    once = lambda x: x @ x
    body = lambda x, _: (x @ x, None)
    assert count_flops(jax.jit(once), (4, 4)) == SQUARE
    assert count_flops(lambda x: jax.lax.scan(body, x, None, length=7)[0], (4, 4)) == 7 * SQUARE
    assert count_flops(lambda x: jax.lax.fori_loop(0, 5, lambda _, y: y @ y, x), (4, 4)) == 5 * SQUARE
    assert (
        count_flops(lambda x: jax.lax.cond(x.sum() > 0, lambda y: y @ y @ y, lambda y: y @ y, x), (4, 4)) == 2 * SQUARE
    )
    # The gradient has one product for each of the two factors.
    loss = lambda f: jax.grad(lambda x: f(x).sum())
    assert count_flops(loss(once), (4, 4)) == 3 * SQUARE
    twice = lambda x: jnp.sin(x @ x) @ x
    assert count_flops(loss(jax.checkpoint(twice)), (4, 4)) == count_flops(loss(twice), (4, 4)) + SQUARE
    custom = jax.custom_vjp(once)
    custom.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x + x @ g,))
    assert count_flops(custom, (4, 4)) == SQUARE and count_flops(loss(custom), (4, 4)) == 3 * SQUARE


def test_a_while_loop_is_counted_if_its_number_of_trips_is_known():
    loop = lambda limit: (
        lambda x: jax.lax.while_loop(lambda s: s[0] < limit(x), lambda s: (s[0] + 2, s[1] @ s[1]), (1, x))[1]
    )
    assert count_flops(loop(lambda x: 8), (4, 4)) == 4 * SQUARE
    with pytest.raises(ValueError, match="while loop with products"):
        count_flops(loop(lambda x: x.sum().astype(int)), (4, 4))
    without_products = lambda x: jax.lax.while_loop(lambda y: y.sum() < 3, lambda y: y + 1, x)
    assert count_flops(without_products, (4, 4)) == 0


def test_products_of_each_device_are_counted_for_all_devices():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    each = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=P("a", None), out_specs=P("a", None), check_vma=False)
    assert count_flops(each, (8, 3)) == 8 * (2 * 4 * 4 * 3)  # the four devices along b do the same


def test_a_kernel_is_counted_for_each_step_of_its_grid():
    def kernel(x_ref, y_ref, out_ref):
        out_ref[...] = x_ref[...] @ y_ref[...]

    block = lambda rows: pl.BlockSpec((rows, 8), lambda i: (i if rows == 4 else 0, 0))
    product = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((16, 8), jnp.float32),
        grid=(4,),
        in_specs=[block(4), block(8)],
        out_specs=block(4),
        interpret=True,
    )
    assert count_flops(product, (16, 8), (8, 8)) == 2 * 16 * 8 * 8


SIZES = {"vocabulary": 97, "max_length": 256, "width": 24, "layers": 3, "heads": 4, "mlp_width": 40}
DECODER = ModelConfig(**SIZES)
LLAMA = ModelConfig(
    **SIZES,
    kv_heads=2,
    head_width=10,
    feed_forward="gated",
    positions="rotary",
    norm="rmsnorm",
    biases=(),
    tied_embeddings=False,
    layer_kinds=("local", "global"),
    window=4,
)
BERT = ModelConfig(
    **SIZES, structure="encoder", heads_on_top=("masked_lm", "next_sentence"), types=2, norm_place="post"
)
ALBERT = ModelConfig(**SIZES, structure="encoder", heads_on_top=("masked_lm",), embedding_width=8, distinct_layers=1)
DEBERTA = ModelConfig(
    **SIZES,
    structure="encoder",
    heads_on_top=("masked_lm", "classes", "tokens", "span", "replaced"),
    positions="none",
    relative="disentangled",
    relative_buckets=0,
    relative_distance=8,
    conv_width=3,
)
XLNET = ModelConfig(
    **SIZES,
    structure="encoder",
    heads_on_top=("lm", "classes"),
    positions="none",
    relative="transformer_xl",
    types=2,
    types_in="attention",
    query_stream=True,
)
MODERN = ModelConfig(**SIZES, structure="encoder", heads_on_top=("masked_lm", "classes"), shared_transform=True)
T5 = ModelConfig(
    **SIZES, structure="encoder_decoder", decoder_layers=2, relative="buckets", positions="none", start_token=0
)


def gradient_flops(model: ModelConfig, loss, *batch, remat="none") -> int:
    """Returns the FLOPs of the value and the gradient of `loss(module, params, *batch)`."""
    params = jax.eval_shape(lambda: init(Transformer(model), jax.random.key(0)))
    return flops.count(
        jax.make_jaxpr(jax.value_and_grad(partial(loss, Transformer(model, remat=remat))))(params, *batch)
    )


def recomputed_flops(model, rows, length, source_length=None, *, remat="full", blocks=False):
    """Returns the FLOPs that the backward pass adds to `flops.closed(...).step` by recomputing.

    "elementwise" recomputes no product, "dots" recomputes attention, "full" recomputes the layers. The last product of
    a layer is recomputed only if a norm follows it.
    """
    if remat in ("none", "elementwise"):
        return 0
    forward = flops.model_flops(model, rows, length, source_length, heads={}, blocks=blocks)
    if remat == "dots":
        return forward.attention
    entries = model.layers * (length if source_length is None else source_length) * model.F
    if model.structure == "encoder_decoder":
        entries += (model.decoder_layers or model.layers) * length * model.decoder_config.F
    return forward.layers - (2 * rows * entries * model.width if model.norm_place == "pre" else 0)


def array(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def packed_batch(B, T):
    fields = {name: array(B, T) for name in ("tokens_BT", "segments_BT", "positions_BT", "labels_BT", "types_BT")}
    return fields | {"weights_BT": array(B, T, dtype=jnp.float32)}


def causal(module, params, batch):
    task = CausalLMTask(config.CausalLM(), batch["tokens_BT"].shape[1], 0, SimpleNamespace(bos=None, eos=None))
    return task.losses(module, params, batch, None)[0]["loss"][0]


OPT = ModelConfig(**SIZES, embedding_width=10, project_tokens=True)


@pytest.mark.parametrize("model", [DECODER, LLAMA, OPT], ids=["gpt2", "llama", "opt"])
@pytest.mark.parametrize("T", [17, pytest.param(200, marks=pytest.mark.long)])
@pytest.mark.parametrize("remat", ["none", "elementwise", "dots", "full"])
def test_products_of_a_decoder_are_those_of_the_formula(model, T, remat):
    batch = packed_batch(2, T) if model.types else {k: v for k, v in packed_batch(2, T).items() if k != "types_BT"}
    expected = flops.model_flops(model, 2, T, blocks=True).step + recomputed_flops(
        model, 2, T, remat=remat, blocks=True
    )
    assert gradient_flops(model, causal, batch, remat=remat) == expected


def test_by_convention_all_queries_attend_to_all_keys():
    whole, blocks = (flops.model_flops(DECODER, 2, 200, blocks=blocks) for blocks in (False, True))
    assert whole.attention == 2 * 2 * (2 * 24 * 200 * 200) * 3
    assert blocks.attention < 0.7 * whole.attention and blocks.projections == whole.projections
    # PaLM, appendix B: 6 N + 12 L H C T for each token. N includes the head but not the embeddings.
    entries = 3 * (4 * 24 * 24 + 2 * 24 * 40) + 24 * 97
    assert whole.step == 2 * 200 * (6 * entries + 12 * 3 * 24 * 200)


def test_only_predicted_positions_are_counted_in_the_head():
    tokenizer = SimpleNamespace(cls=0, sep=1, mask=2)
    task = MaskedLMTask(config.MaskedLM(next_sentence=True), 32, 0, tokenizer)
    batch = packed_batch(2, 32) | {"starts_BE": array(2, 4), "labels_BE": array(2, 4)}
    batch["weights_BE"] = array(2, 4, dtype=jnp.float32)

    def loss(module, params, batch):
        return sum(total for name, (total, _) in task.losses(module, params, batch, None)[0].items() if "loss" in name)

    closed = flops.model_flops(BERT, 2, 32, heads={"masked_lm": task.predictions, "next_sentence": 4})
    assert task.predictions < 32 and gradient_flops(BERT, loss, batch) == closed.step
    assert gradient_flops(BERT, loss, batch, remat="full") == closed.step + recomputed_flops(BERT, 2, 32)
    assert recomputed_flops(BERT, 2, 32) == closed.layers  # a norm follows the last product of each layer


@pytest.mark.parametrize("model", [ALBERT, DEBERTA, MODERN], ids=["albert", "deberta", "modernbert"])
@pytest.mark.parametrize("remat", ["none", pytest.param("dots", marks=pytest.mark.long), "full"])
def test_products_of_other_encoders_are_those_of_the_formula(model, remat):
    def loss(module, params, tokens_BT):
        x_BPD = apply(module, params, tokens_BT)[:, :5]
        return sum(apply(module, params, x_BPD, method=head).sum() for head in model.heads_on_top)

    expected = flops.model_flops(model, 2, 16, heads=dict.fromkeys(model.heads_on_top, 5)).step
    assert gradient_flops(model, loss, array(2, 16), remat=remat) == expected + recomputed_flops(
        model, 2, 16, remat=remat
    )


def test_products_of_a_query_stream_are_those_of_the_formula():
    def loss(module, params, tokens_BT, types_BT, places_BQ, mask_BQS):
        x_BQD = apply(module, params, tokens_BT, None, None, types_BT, targets=Targets(places_BQ, mask_BQS))
        return apply(module, params, x_BQD, method="lm").sum() + apply(module, params, x_BQD, method="classes").sum()

    expected = flops.model_flops(XLNET, 2, 16, heads={"lm": 3, "classes": 3}, targets=3).step
    inputs = array(2, 16), array(2, 16), array(2, 3), array(2, 3, 16, dtype=jnp.bool_)
    assert gradient_flops(XLNET, loss, *inputs) == expected


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_products_of_an_encoder_decoder_are_those_of_the_formula(remat):
    def loss(module, params, source_BS, tokens_BT, weights_BT):
        x_BTD = apply(module, params, source_BS, target_tokens_BT=tokens_BT)
        return cross_entropy(apply(module, params, x_BTD, method="lm"), tokens_BT, weights_BT)[0]

    batch = array(2, 20), array(2, 12), array(2, 12, dtype=jnp.float32)
    expected = flops.model_flops(T5, 2, 12, 20).step + recomputed_flops(T5, 2, 12, 20, remat=remat)
    assert gradient_flops(T5, loss, *batch, remat=remat) == expected
    with pytest.raises(ValueError, match="source_length"):
        flops.model_flops(T5, 2, 12)


# ---- compiled programs

LAYERS, D, F, B = 6, 64, 128, 32


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))


def compile_program(function, mesh, **arguments) -> hlo.Program:
    """Returns the program of a function of the arrays NAME=(shape, spec)."""
    shapes = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in arguments.items()
    }
    return hlo.parse(jax.jit(function).lower(**shapes).compile().as_text())


def test_collectives_in_a_scan_are_counted_for_each_trip(mesh):
    def forward(up_LDF, down_LFD, x_BD):
        def layer(x_BD, kernels):
            with jax.named_scope("Block/mlp/up"):
                y_BF = jnp.tanh(
                    jax.lax.with_sharding_constraint(x_BD @ kernels[0], NamedSharding(mesh, P(None, "tensor")))
                )
            with jax.named_scope("Block/mlp/down"):
                x_BD = jax.lax.with_sharding_constraint(y_BF @ kernels[1], NamedSharding(mesh, P(None, None)))
            return x_BD, None

        return jax.lax.scan(layer, x_BD, (up_LDF, down_LFD))[0]

    shape = {"up_LDF": ((LAYERS, D, F), P(None, None, "tensor")), "down_LFD": ((LAYERS, F, D), P(None, "tensor", None))}
    program = compile_program(forward, mesh, **shape, x_BD=((B, D), P()))
    assert program.devices == 8 and [loop.trips for loop in program.loops] == [LAYERS]
    (one,) = hlo.collectives(program)
    assert (one.kind, one.times, one.group_size) == ("all-reduce", LAYERS, 2)
    assert one.operand_bytes == one.result_bytes == one.sent_bytes == B * D * 4
    assert sorted(map(sorted, one.groups)) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert hlo.purpose(one.op_name) == "layers mlp/down"
    expected = hlo.CollectiveTotals(LAYERS, *[LAYERS * B * D * 4] * 3)
    assert hlo.by_kind([one]) == {"all-reduce": expected} and hlo.by_purpose([one]) == {"layers mlp/down": expected}
    # Each layer reads only its own kernels, which the scan slices.
    kernels = LAYERS * 2 * D * F // 2 * 4
    assert kernels <= sum(hlo.traffic(program).values()) < 8 * kernels


COLLECTIVES = {
    "all-gather": (lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), P("fsdp"), 4, 1024, 4096, 3 * 1024),
    "all-reduce": (lambda x: jax.lax.psum(x, "fsdp"), P(), 4, 4096, 4096, 2 * 3 * 1024),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), P(), 4, 4096, 1024, 3 * 1024),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "fsdp", 1, 0, tiled=True), P("fsdp"), 4, 1024, 1024, 3 * 256),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]),
        P("fsdp"),
        2,
        1024,
        1024,
        1024,
    ),
}


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_each_kind_of_collective_is_found(kind, mesh):
    function, spec, size, operand, result, sent = COLLECTIVES[kind]

    def loop(x):
        body = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=P(None, "tensor"), check_vma=False)
        return jax.lax.fori_loop(0, 3, lambda _, y: y + body(x + y.sum()).sum(), x)

    found = [one for one in hlo.collectives(compile_program(loop, mesh, x=((32, 32), P()))) if one.kind == kind]
    one = max(found, key=lambda one: one.operand_bytes)
    assert (one.times, one.group_size) == (3, size)
    assert (one.operand_bytes, one.result_bytes, one.sent_bytes) == (operand, result, sent)
    if kind != "collective-permute":
        assert sorted(map(sorted, one.groups)) == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("[2,4]<=[2,2,2]T(1,0,2)", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['x'=2,'y'=4] {'x'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['x'=2,'y'=2,'z'=2] {'z','x'}", [[0, 4, 1, 5], [2, 6, 3, 7]]),
        ("mesh['x'=1,'y'=2,'z'=4], device_ids=([4,2]T(1,0)) {'y'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['x'=8] {'x':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ],
)
def test_groups_are_parsed_in_each_format(text, groups):
    rest = f", channel_id=1, replica_groups={text}, use_global_device_ids=true, to_apply=%add"
    assert [list(group) for group in hlo._groups(rest, "all-reduce", 8)] == groups


ASYNC = """HloModule jit_step, is_scheduled=true, num_partitions=4

%start (p: bf16[8,64]) -> (bf16[8,64], bf16[16,64], u32[]) {
  %p = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[16,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=[2,2]<=[4], dimensions={0}
  ROOT %s = (bf16[8,64]{1,0:S(1)}, bf16[16,64]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), TARGET
}

%beside (q: bf16[8,64], r: f32[4]) -> (f32[4], bf16[16,64]) {
  %q = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.2 = bf16[16,64]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=7, replica_groups=[2,2]<=[4], dimensions={0}
  %r = f32[4]{0:T(128)} parameter(1)
  %n = f32[4]{0:T(128)} negate(%r)
  ROOT %t = (f32[4]{0:T(128)}, bf16[16,64]{1,0:T(8,128)(2,1)}) tuple(%n, %all-gather.2)
}

%all-reduce-scatter.1 (input: f32[16,64]) -> f32[8,64] {
  %input = f32[16,64]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[16,64]{1,0:T(8,128)} all-reduce(%input), channel_id=9, replica_groups={{0,2},{1,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = f32[8,64]{1,0:T(8,128)S(1)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={8,64}
}

%body (state: (s32[], f32[16,64], bf16[8,64], s32[])) -> (s32[], f32[16,64], bf16[8,64], s32[]) {
  %state = STATE parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %one = s32[]{:T(128)} get-tuple-element(%state), index=3
  %next = s32[]{:T(128)} add(%i, %one), frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="a kernel, whose attributes have line breaks"}
  %w = f32[16,64]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %x = bf16[8,64]{1,0:S(1)} get-tuple-element(%state), index=2
  %async-collective-start = (bf16[8,64]{1,0:S(1)}, bf16[16,64]{1,0}, u32[]{:S(2)}) fusion(%x), calls=%start
  %scattered = f32[8,64]{1,0:T(8,128)S(1)} fusion(%w), calls=%all-reduce-scatter.1, metadata={op_name="OP_NAME"}
  ROOT %tuple = STATE tuple(%next, %w, %x, %one)
}

%condition (given: (s32[], f32[16,64], bf16[8,64], s32[])) -> pred[] {
  %given = STATE parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%given), index=0
  %limit = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (a: f32[16,64], b: bf16[8,64], c: f32[4]) -> f32[16,64] {
  %a = f32[16,64]{1,0:T(8,128)} parameter(0)
  %b = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(1)
  %c = f32[4]{0:T(128)} parameter(2)
  %copy-start = (bf16[8,64]{1,0:S(1)}, bf16[8,64]{1,0}, u32[]{:S(2)}) copy-start(%b)
  %copy-done = bf16[8,64]{1,0:S(1)} copy-done(%copy-start)
  %two = s32[]{:T(128)} constant(2)
  %copy = s32[]{:T(128)} copy(%two)
  %init = STATE tuple(%copy, %a, %copy-done, %two)
  %while.1 = STATE while(%init), condition=%condition, body=%body
  %done = (f32[4]{0:T(128)}, bf16[16,64]{1,0:T(8,128)(2,1)}) fusion(%copy-done, %c), kind=kOutput, calls=%beside
  ROOT %out = f32[16,64]{1,0:T(8,128)} get-tuple-element(%while.1), index=1
}
""".replace("TARGET", 'custom_call_target="AsyncCollectiveStart"')
ASYNC = ASYNC.replace("STATE", "(s32[]{:T(128)}, f32[16,64]{1,0}, bf16[8,64]{1,0:S(1)}, /*index=3*/s32[]{:T(128)})")
ASYNC = ASYNC.replace("OP_NAME", "jit(step)/transpose(jvp(Transformer))/decoder/while/body/Block/mlp/up/dot_general")


def test_asynchronous_collectives_of_tpu_programs_are_counted_once():
    program = hlo.parse(ASYNC)
    assert program.loops == (hlo.Loop("while.1", "body", 5),)  # from 2 to 12 in steps of 2
    gather, scatter = hlo.collectives(program)
    assert (gather.kind, gather.times, gather.operand_bytes, gather.result_bytes) == ("all-gather", 5, 1024, 2048)
    assert (scatter.kind, scatter.times, scatter.operand_bytes, scatter.result_bytes) == (
        "reduce-scatter",
        5,
        4096,
        2048,
    )
    assert hlo.purpose(scatter.op_name) == "gradients of decoder/layers mlp/up"
    moves = {move.name: (move.read, move.written, move.times) for move in hlo.moves(program)}
    assert moves["copy-start"] == (1024, 0, 1) and "copy-done" not in moves  # this copy is to VMEM
    assert moves["scattered"] == (4096, 0, 5)
    assert moves["done"] == (16, 16, 1)
    assert "async-collective-start" not in moves  # it reads VMEM, and the end of the pair writes


def test_a_text_without_a_program_raises_an_error():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("HloModule empty\n")


def test_slices_and_updates_in_place_are_counted_with_their_own_size(mesh):
    one = Mesh(np.array(jax.devices()[:1]), ("x",))

    def scan(table_NM):
        return jax.lax.scan(lambda c, row_M: (c, jnp.sin(row_M)), 0, table_NM)[1]

    program = compile_program(scan, one, table_NM=((1000, 1024), P()))
    # Each row is read and written once. The whole table in each trip would be a thousand times as much.
    table = 1000 * 1024 * 4
    assert 2 * table <= sum(hlo.traffic(program).values()) < 8 * table
    assert hlo.collectives(program) == []


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        (
            "jit(step)/jvp(Transformer)/Transformer.decode/decoder/decoder._scan/while/body/closed_call/Block/attention/query/dot_general",
            "decoder/layers attention/query",
        ),
        (
            "jit(step)/transpose(jvp(Transformer))/Transformer.decode/decoder/decoder._scan/while/body/closed_call/checkpoint/rematted_computation/Block/mlp/up/dot_general",
            "decoder/layers mlp/up, recomputed",
        ),
        (
            "jit(step)/transpose(jvp(Transformer))/decoder/while/body/closed_call/checkpoint/Block/attention/(query/dot_general:key/dot_general:value/dot_general)",
            "gradients of decoder/layers attention/query",
        ),
        ("jit(step)/jvp(Transformer.lm)/lm_head/...D,VD->...V/dot_general", "lm_head"),
        ("jit(step)/jvp()/reduce_max", "loss"),
        ("jit(step)/sub", "update"),
        ("", "unnamed"),
    ],
)
def test_the_purpose_of_a_collective_follows_from_its_name(op_name, expected):
    assert hlo.purpose(op_name) == expected


def test_parsing_takes_time_proportional_to_the_text():
    """Parsing four times the text takes about four times as long, and not sixteen times."""
    before, entry, rest = ASYNC.partition("ENTRY")

    def seconds(count: int) -> float:
        more = "".join(f"  %negate.{n} = f32[16,64]{{1,0:T(8,128)}} negate(%a)\n" for n in range(count))
        text = before + entry + rest.replace("  ROOT", more + "  ROOT")
        start = time.process_time()
        found = hlo.parse(text)
        assert len(hlo.moves(found)) > count and len(hlo.collectives(found)) == 2
        return time.process_time() - start

    assert min(seconds(20_000) for _ in range(2)) / min(seconds(5_000) for _ in range(3)) < 10


ON_TPU = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxlm.devices import chips; from jaxlm.planning import hlo
devices = chips.topology_devices("v5e:2x2")
assert chips.find(devices[0].device_kind).name == "v5e" and len(devices) == 4
mesh = Mesh(np.array(devices).reshape(2, 2), ("fsdp", "tensor"))
on = lambda *spec: NamedSharding(mesh, P(*spec))
def loss(kernels, x):
    def layer(x, kernel):
        up, down = kernel
        y = jax.lax.with_sharding_constraint(jnp.tanh(x @ up), on("fsdp", "tensor"))
        return jax.lax.with_sharding_constraint(x + y @ down, on("fsdp", None)), None
    return (jax.lax.scan(layer, x, kernels)[0].astype(jnp.float32) ** 2).sum()
shape = lambda size, *spec: jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=on(*spec))
kernels = shape((5, 256, 512), None, "fsdp", "tensor"), shape((5, 512, 256), None, "tensor", "fsdp")
program = hlo.parse(jax.jit(jax.grad(loss)).lower(kernels, shape((512, 256), "fsdp", None)).compile().as_text())
assert program.devices == 4, program.devices
assert [loop.trips for loop in program.loops] == [5, 5], program.loops
found = hlo.collectives(program)
sums = hlo.by_kind(found)
assert all(one.group_size == 2 for one in found if one.kind != "collective-permute")
# In the forward pass, each layer gathers two kernels over fsdp and adds up its result over tensor.
assert sums["all-gather"].times >= 2 * 5 and sums["all-reduce"].times >= 2 * 5, sums
gathers = [one for one in found if one.kind == "all-gather" and one.times == 5]
assert {(one.operand_bytes, one.result_bytes) for one in gathers} == {(256 * 512 // 2, 256 * 512)}, gathers
assert 0 < sum(hlo.traffic(program).values()) < 1e9
print("done")
"""


@pytest.mark.long
@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed (pip install 'jaxlm[plan]')")
def test_two_processes_use_the_tpu_compiler_at_once():
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_FLAGS": ""}
    start = lambda: subprocess.Popen([sys.executable, "-c", ON_TPU], env=env, stdout=-1, stderr=-1, text=True)
    results = [(*process.communicate(timeout=300), process.returncode) for process in [start(), start()]]
    assert results == [("done\n", "", 0)] * 2
