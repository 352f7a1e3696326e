"""Fused attention equals that of XLA: splash in the interpreter of Pallas, on one device, on meshes and on a TPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxlm.config import CausalLM, ModelConfig, OptimizerConfig
from jaxlm.nn import attention, kernels
from jaxlm.nn.dot_product import Scores, dot_product_attention
from jaxlm.nn.kernels import Backend, backend_of, choose, fused, why_not
from jaxlm.nn.masks import cross_mask, self_mask
from jaxlm.nn.transformer import Transformer, init
from jaxlm.run.optimizer import make_optimizer
from jaxlm.run.step import TrainState, make_train_step
from jaxlm.tasks.pretraining import CausalLMTask

B, T, C = 2, 256, 64
# Lengths of the examples in each row: three examples and padding, and one example that fills its row.
LENGTHS = ((100, 90, 40), (T,))
MESHES = {
    "data2_tensor2": {"data": 2, "fsdp": 1, "tensor": 2},
    "fsdp2_tensor2_context2": {"fsdp": 2, "tensor": 2, "context": 2},
    "context2": {"data": 1, "context": 2},
}
TPU, H100, T4 = Backend("tpu", 5.0), Backend("cuda", 9.0), Backend("cuda", 7.5)


@pytest.fixture(autouse=True, scope="module")
def _small_blocks():
    """Small blocks give short rows hidden, partly visible and fully visible blocks."""
    before, kernels.BLOCKS = kernels.BLOCKS, (128,)
    yield
    kernels.BLOCKS = before
    kernels._plan.cache_clear()


def segments(lengths=LENGTHS, T: int = T) -> jax.Array:
    rows = [np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]
    return jnp.asarray(np.stack([np.pad(row, (0, T - len(row))) for row in rows]), jnp.int32)


def draw(*shapes: tuple[int, ...], dtype=jnp.float32) -> list[jax.Array]:
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def outputs_and_gradients(attend, segments_BT, g_BTHC):
    """Returns the outputs, with zeros for padding, and the gradients with respect to queries, keys and values."""

    def loss(q_BTHC, k_BSKC, v_BSKC):
        out_BTHC = attend(q_BTHC, k_BSKC, v_BSKC)
        outputs_BTHC = jnp.where((segments_BT > 0)[..., None, None], out_BTHC.astype(jnp.float32), 0)
        return (outputs_BTHC * g_BTHC).sum(), (out_BTHC, outputs_BTHC)

    def both(*qkv):
        (_, (out_BTHC, outputs_BTHC)), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*qkv)
        return out_BTHC, outputs_BTHC, grads

    return jax.jit(both)


def xla(q, k, v, *, segments_BT, causal, window, scale, cap):
    mask_BTS = self_mask(segments_BT, causal, window)
    return dot_product_attention(q, k, v, mask_BTS, Scores(scale, cap), causal=causal)


def assert_same(ours, theirs, tolerance: float):
    for leaf in jax.tree.leaves(ours):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
    for one, other in zip(jax.tree.leaves(ours[1:]), jax.tree.leaves(theirs[1:])):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, atol=tolerance * max(np.abs(other).max(), 1), rtol=0)


def check_splash(causal, window, H, K, cap, dtype="float32", C=C, mesh=None, T=T, lengths=LENGTHS, scale=0.2):
    qkv = draw((B, T, H, C), (B, T, K, C), (B, T, K, C), dtype=dtype)
    (g_BTHC,) = draw((B, T, H, C))
    segments_BT = segments(lengths, T)
    options = {"causal": causal, "window": window, "scale": scale, "cap": cap}
    assert why_not("splash", TPU, mesh, *qkv[:2], cap=cap) is None
    splash = lambda q, k, v: fused("splash", mesh, q, k, v, segments_BT, segments_BT, **options, interpret=True)
    ours = outputs_and_gradients(splash, segments_BT, g_BTHC)(*qkv)
    assert ours[0].dtype == dtype
    theirs = outputs_and_gradients(partial(xla, segments_BT=segments_BT, **options), segments_BT, g_BTHC)(*qkv)
    assert_same(ours, theirs, 1e-5 if dtype == "float32" else 2e-2)


QUICK = [
    # causal, window, H, K, cap, dtype
    (True, None, 2, 1, 0.0, "float32"),
    (False, 70, 2, 2, 5.0, "float32"),
    (True, 30, 4, 1, 0.0, "bfloat16"),
]


@pytest.mark.parametrize(
    "causal, window, H, K, cap, dtype", [QUICK[0], *(pytest.param(*case, marks=pytest.mark.long) for case in QUICK[1:])]
)
def test_splash_equals_xla(causal, window, H, K, cap, dtype):
    check_splash(causal, window, H, K, cap, dtype)


TRITON = [  # causal, H, K, C, T, lengths, dtype, mesh
    (True, 4, 2, 64, 256, LENGTHS, "float32", None),
    (False, 2, 2, 40, 200, ((100, 60), (200,)), "float32", None),
    (True, 2, 1, 128, 128, ((30, 20), (128,)), "bfloat16", None),
    (False, 4, 4, 32, 256, LENGTHS, "float32", "data2_tensor2"),
]


@pytest.mark.parametrize(
    "causal, H, K, C, T, lengths, dtype, mesh",
    [TRITON[0], *(pytest.param(*case, marks=pytest.mark.long) for case in TRITON[1:])],
)
def test_triton_equals_xla(causal, H, K, C, T, lengths, dtype, mesh):
    qkv = draw((B, T, H, C), (B, T, K, C), (B, T, K, C), dtype=dtype)
    (g_BTHC,) = draw((B, T, H, C))
    segments_BT, mesh = segments(lengths, T), mesh and mesh_of(mesh)
    options = {"causal": causal, "window": None, "scale": 0.2}
    assert why_not("triton", H100, mesh, *qkv[:2]) is None
    triton = lambda q, k, v: fused("triton", mesh, q, k, v, segments_BT, segments_BT, **options, interpret=True)
    ours = outputs_and_gradients(triton, segments_BT, g_BTHC)(*qkv)
    assert ours[0].dtype == dtype
    theirs = outputs_and_gradients(partial(xla, segments_BT=segments_BT, cap=0.0, **options), segments_BT, g_BTHC)
    assert_same(ours, theirs(*qkv), 1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize("H, K", [(2, 2), (2, 1), (4, 1)])
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("causal", [True, False])
def test_splash_equals_xla_everywhere(causal, window, H, K, cap, dtype):
    check_splash(causal, window, H, K, cap, dtype)


@pytest.mark.long
@pytest.mark.parametrize("window", [1, 128, 200, T, T + 1])
@pytest.mark.parametrize("causal", [True, False])
def test_splash_supports_windows_of_any_width(causal, window):
    check_splash(causal, window, 2, 2, 0.0)


@pytest.mark.parametrize("C", [20, pytest.param(128, marks=pytest.mark.long)])
def test_splash_supports_heads_of_any_width(C):
    check_splash(True, None, 2, 2, 0.0, C=C)


def test_splash_supports_rows_of_any_length():
    check_splash(True, None, 2, 2, 0.0, T=200, lengths=((90, 60), (200,)))


def test_splash_cross_attention_equals_xla():
    """Targets attend to the source of their example. The lengths are not multiples of the block size."""
    T, S = 130, 200
    q_BTHC, k_BSKC, v_BSKC, g_BTHC = draw((B, T, 2, C), (B, S, 1, C), (B, S, 1, C), (B, T, 2, C))
    segments_BT, segments_BS = segments(((50, 60), (130,)), T), segments(((120, 80), (90,)), S)
    splash = partial(fused, "splash", None, causal=False, scale=0.2, interpret=True)
    ours = outputs_and_gradients(lambda q, k, v: splash(q, k, v, segments_BT, segments_BS), segments_BT, g_BTHC)
    mask_BTS = cross_mask(segments_BT, segments_BS)
    theirs = outputs_and_gradients(
        lambda q, k, v: dot_product_attention(q, k, v, mask_BTS, Scores(0.2)), segments_BT, g_BTHC
    )
    assert_same(ours(q_BTHC, k_BSKC, v_BSKC), theirs(q_BTHC, k_BSKC, v_BSKC), 1e-5)


def mesh_of(name: str) -> Mesh:
    sizes = MESHES[name]
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return Mesh(np.array(devices).reshape(*sizes.values()), tuple(sizes))


LONG_MESHES = [(name, causal, window) for name in MESHES for causal in (True, False) for window in (None, 30)]


@pytest.mark.parametrize(
    "name, causal, window",
    [
        ("data2_tensor2", True, 30),
        ("fsdp2_tensor2_context2", True, None),
        ("fsdp2_tensor2_context2", False, None),
        *(pytest.param(*case, marks=pytest.mark.long) for case in LONG_MESHES),
    ],
)
def test_splash_on_a_mesh_equals_xla(name, causal, window):
    check_splash(causal, window, 4, 2, 5.0, mesh=mesh_of(name))


def test_the_plan_of_long_rows_is_small_and_made_once():
    shape = (8192, 8192, 32, True, 1024, 0.0, 1, False)
    jax.jit(lambda: len(jax.tree.leaves(kernels._plan(*shape)))).trace()
    plan = kernels._plan(*shape)
    leaves = jax.tree.leaves(plan)
    assert plan is kernels._plan(*shape)
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves), "a leaf belongs to a trace"
    assert sum(leaf.nbytes for leaf in leaves) < 1 << 20


@pytest.mark.parametrize("mesh", [None, "fsdp2_tensor2_context2"])
@pytest.mark.parametrize("causal, window", [(True, None), (False, None), (True, 30), (False, 30)])
def test_cudnn_receives_the_right_masks(causal, window, mesh, monkeypatch):
    """Computes the call to cuDNN with XLA instead."""
    theirs = partial(jax.nn.dot_product_attention, implementation="xla")
    features = lambda *qkv, implementation, **options: theirs(*qkv, **options)
    monkeypatch.setattr(jax.nn, "dot_product_attention", features)
    T, options = 61, {"causal": causal, "window": window, "scale": 0.2}
    q_BTHC, k_BSKC, v_BSKC, g_BTHC = draw((B, T, 4, 8), (B, T, 2, 8), (B, T, 2, 8), (B, T, 4, 8))
    segments_BT = segments(((30, 20), (T,)), T)
    mesh = mesh and mesh_of(mesh)
    cudnn = lambda q, k, v: fused("cudnn", mesh, q, k, v, segments_BT, segments_BT, **options)
    ours = outputs_and_gradients(cudnn, segments_BT, g_BTHC)(q_BTHC, k_BSKC, v_BSKC)
    theirs = outputs_and_gradients(partial(xla, segments_BT=segments_BT, **options, cap=0.0), segments_BT, g_BTHC)
    assert_same(ours, theirs(q_BTHC, k_BSKC, v_BSKC), 1e-5)


@pytest.mark.parametrize("H, K, C", [(2, 2, 64), (4, 2, 128), (4, 1, 256), (2, 2, 40)])
@pytest.mark.parametrize("T, lengths", [(T, LENGTHS), (61, ((30, 20), (61,)))])
@pytest.mark.parametrize("causal, window", [(True, None), (False, None), (True, 30), (False, 30)])
def test_kernels_equal_xla_on_a_gpu(causal, window, T, lengths, H, K, C):
    """Compares with XLA in float32. Requires a GPU: JAX_PLATFORMS=cuda pytest tests/test_kernels.py -k on_a_gpu."""
    if jax.default_backend() != "gpu":
        pytest.skip("there is no GPU here")
    backend, options = backend_of(None), {"causal": causal, "window": window, "scale": 0.2}
    qkv = draw((B, T, H, C), (B, T, K, C), (B, T, K, C), dtype=jnp.bfloat16)
    (g_BTHC,) = draw((B, T, H, C))
    segments_BT = segments(lengths, T)
    if reason := why_not("cudnn", backend, None, *qkv[:2]):
        assert C > 128, reason
        pytest.skip(reason)
    theirs = outputs_and_gradients(partial(xla, segments_BT=segments_BT, **options, cap=0.0), segments_BT, g_BTHC)
    with jax.default_matmul_precision("highest"):
        expected = theirs(*(x.astype(jnp.float32) for x in qkv))
    for kernel, name in (("cudnn", "fmha"), ("triton", "mha_forward")):
        if why_not(kernel, backend, None, *qkv[:2], window=window is not None) is None:
            attend = partial(fused, kernel, None)
            ours = outputs_and_gradients(
                lambda *qkv, attend=attend: attend(*qkv, segments_BT, segments_BT, **options), segments_BT, g_BTHC
            )
            assert name in ours.lower(*qkv).compile().as_text()
            assert_same(ours(*qkv), expected, 2e-2)


@pytest.mark.parametrize("mesh", [None, "data2_tensor2", "fsdp2_tensor2_context2"])
def test_cudnn_lowers_for_a_gpu(mesh, monkeypatch):
    """Lowers the program only: compiling and running it requires a GPU."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    q, k, segments_BT = like(B, 64, 4, 64), like(B, 64, 2, 64), jax.ShapeDtypeStruct((B, 64), jnp.int32)
    mesh = mesh and mesh_of(mesh)
    assert why_not("cudnn", H100, mesh, q, k) is None

    def loss(q, k, v, segments_BT):
        out_BTHC = fused("cudnn", mesh, q, k, v, segments_BT, segments_BT, causal=True, window=30, scale=0.2)
        return out_BTHC.astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, segments_BT)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBias" in text and "__cudnn$fmhaScaleBiasSoftmaxBackward" in text.replace("Dropout", "")


WHOLE_ROWS = [  # causal, window, T, mesh
    (True, None, 256, None),
    pytest.param(True, 30, 250, None, marks=pytest.mark.long),
    pytest.param(False, None, 250, None, marks=pytest.mark.long),
    pytest.param(True, None, 256, "fsdp2_tensor2_context2", marks=pytest.mark.long),
]


@pytest.mark.parametrize("causal, window, T, mesh", WHOLE_ROWS)
def test_splash_without_segments_equals_splash_with_one_segment(causal, window, T, mesh):
    options = {"causal": causal, "window": window, "scale": 0.2, "interpret": True}
    qkv = draw((B, T, 4, C), (B, T, 2, C), (B, T, 2, C))
    (g_BTHC,) = draw((B, T, 4, C))
    ones_BT, mesh = jnp.ones((B, T), jnp.int32), mesh and mesh_of(mesh)
    outputs = lambda segments_BT: outputs_and_gradients(
        lambda q, k, v: fused("splash", mesh, q, k, v, segments_BT, segments_BT, **options), ones_BT, g_BTHC
    )
    assert_same(outputs(None)(*qkv), outputs(ones_BT)(*qkv), 1e-5)


@pytest.mark.parametrize("mesh", [None, pytest.param("fsdp2_tensor2_context2", marks=pytest.mark.long)])
@pytest.mark.parametrize("causal, window", [(True, None), (False, None), (True, 30), (False, 30)])
def test_cudnn_without_segments_equals_cudnn_with_one_segment(causal, window, mesh, monkeypatch):
    """Computes the call to cuDNN with XLA instead."""
    calls = []

    def attend(*qkv, implementation, **options):
        calls.append(options)
        return dot_product_attention_of_jax(*qkv, implementation="xla", **options)

    dot_product_attention_of_jax = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    options = {"causal": causal, "window": window, "scale": 0.2}
    qkv, ones_BT = draw((B, 62, 4, 8), (B, 62, 2, 8), (B, 62, 2, 8)), jnp.ones((B, 62), jnp.int32)
    mesh = mesh and mesh_of(mesh)
    ours, theirs = (fused("cudnn", mesh, *qkv, of, of, **options) for of in (None, ones_BT))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    needs_mask = (mesh is not None and causal) or (window is not None and not causal)
    assert ("mask" in calls[0]) == needs_mask and "mask" in calls[-1]


def test_a_window_of_whole_rows_needs_no_mask_on_a_gpu(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    q, k = (jax.ShapeDtypeStruct((B, 48, heads, 64), jnp.bfloat16) for heads in (4, 2))
    attend = lambda q, k, v: fused("cudnn", None, q, k, v, None, None, causal=True, window=30, scale=0.2)
    text = jax.jit(attend).trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text and "48x48x" not in text and "\\22sliding_window_length\\22: 30" in text


def step_for_a_gpu(monkeypatch, length: int, stream: bool, remat: str = "none", kernel: str = "auto") -> str:
    """Returns the program of a train step, lowered for a GPU. Compiling and running it requires one."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(attention, "backend_of", lambda mesh: H100)
    model = ModelConfig(vocabulary=40, max_length=length, width=64, layers=2, heads=2, mlp_width=96)
    task = CausalLMTask(CausalLM(stream=stream), length, 0, None)
    module = Transformer(model, dtype=jnp.bfloat16, remat=remat, kernel=kernel)
    shapes = jax.eval_shape(partial(init, module), jax.random.key(0))
    optimizer = make_optimizer(OptimizerConfig(), 10, shapes)
    state = jax.eval_shape(
        lambda params: TrainState(jnp.int32(0), params, optimizer.init(params), jnp.zeros(2, jnp.uint32)), shapes
    )
    fields = {"tokens_BT": jnp.int32, "segments_BT": jnp.int32, "positions_BT": jnp.int32, "labels_BT": jnp.int32}
    batch = {name: jax.ShapeDtypeStruct((1, 4, length), dtype) for name, dtype in fields.items()}
    batch["weights_BT"] = jax.ShapeDtypeStruct((1, 4, length), jnp.float32)
    step = make_train_step(task, module, optimizer, lambda _: 1e-3)
    return jax.jit(step).trace(state, batch).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("stream", [True, False])
def test_a_train_step_on_a_gpu_makes_a_mask_only_for_packed_rows(stream, monkeypatch):
    text = step_for_a_gpu(monkeypatch, 48, stream)
    assert "__cudnn$fmhaSoftmax" in text if stream else "__cudnn$fmhaScaleBiasSoftmax" in text
    assert bool(re.search(r"tensor<([0-9]+x)*48x48x", text)) != stream


@pytest.mark.parametrize("remat, forward", [("none", 1), ("elementwise", 1), ("dots", 1), ("full", 2)])
def test_only_full_recomputation_runs_the_kernel_twice(remat, forward, monkeypatch):
    """The layers are scanned, so that each call is in the program once."""
    text = step_for_a_gpu(monkeypatch, 48, True, remat)
    assert text.count('"__cudnn$fmhaSoftmax"') + text.count("@__cudnn$fmhaSoftmax(") == forward
    assert text.count("__cudnn$fmhaSoftmaxBackward") == 1


@pytest.mark.parametrize("remat, forward", [("none", 1), ("elementwise", 1), ("dots", 1), ("full", 2)])
def test_triton_needs_no_mask_for_packed_rows(remat, forward, monkeypatch):
    """In a train step, which is only traced here: JAX compiles such a kernel for the GPU that it finds."""
    monkeypatch.setattr(
        jax.stages.Traced, "lower", lambda traced, **_: SimpleNamespace(as_text=lambda: str(traced.jaxpr))
    )
    text = step_for_a_gpu(monkeypatch, 128, False, remat, "triton")
    assert text.count("name=mha_forward") == forward and text.count("name=mha_backward") == 1
    assert "dot_product_attention" not in text


COMPILES = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from jaxlm.nn.kernels import RESIDUALS, Backend, backend_of, choose, fused

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    keep = jax.checkpoint_policies.save_only_these_names(RESIDUALS)

    def kernels(sizes, dtype, C, policy, **how) -> int:
        mesh = Mesh(np.array(devices).reshape(*sizes.values()), tuple(sizes))
        like = lambda dtype, spec, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        q, k = (like(dtype, P("fsdp", None, "tensor"), 4, 1024, heads, C) for heads in (4, 2))
        assert backend_of(mesh) == Backend("tpu", 5.0)
        assert choose(backend_of(mesh), mesh, q, k, cap=50.0) == "splash"

        def loss(q, k, v, segments):
            attend = lambda *qkv: jnp.tanh(fused("splash", mesh, *qkv, segments, segments, scale=0.1, cap=50.0, **how))
            layer = lambda q, _: (jax.checkpoint(attend, policy=policy)(q, k, v), None)
            return jax.lax.scan(layer, q, None, length=2)[0].astype(jnp.float32).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, like(jnp.int32, P("fsdp"), 4, 1024)).compile()
        return compiled.as_text().count('custom_call_target="tpu_custom_call"')

    tensor, context = {"data": 2, "fsdp": 1, "tensor": 2}, {"fsdp": 2, "tensor": 1, "context": 2}
    # One kernel forward, two backward (dq and dkv), and one to recompute what the policy does not save.
    assert kernels(tensor, jnp.bfloat16, 64, keep, causal=True, window=300) == 3
    assert kernels(tensor, jnp.float32, 80, None, causal=False) == 4
    assert kernels(context, jnp.bfloat16, 128, keep, causal=True) == 3
    assert kernels(context, jnp.float32, 20, None, causal=False, window=300) == 4
"""


@pytest.mark.long
@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is not installed")
def test_splash_compiles_for_a_tpu():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", textwrap.dedent(COMPILES)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, env=environment)
    assert process.returncode == 0, process.stderr


def like(H: int = 4, K: int = 2, C: int = 64, T: int = 256, dtype=jnp.bfloat16, B: int = B) -> tuple:
    return jax.ShapeDtypeStruct((B, T, H, C), dtype), jax.ShapeDtypeStruct((B, T, K, C), dtype)


@pytest.mark.parametrize(
    "kernel, backend, sizes, features, message",
    [
        ("splash", TPU, {}, {}, None),
        ("splash", TPU, {"dtype": jnp.float32, "C": 20, "T": 200}, {"cap": 50.0}, None),
        ("cudnn", H100, {"C": 256, "T": 61}, {}, None),
        ("splash", Backend("cpu"), {}, {}, "this program runs on cpu"),
        ("splash", H100, {}, {}, "it requires tpu"),
        ("splash", TPU, {"T": 64}, {}, "fewer than 128 positions"),
        ("splash", TPU, {"dtype": jnp.float16}, {}, "float16"),
        ("splash", Backend("tpu", 3.0), {}, {}, "before v4"),
        ("splash", TPU, {}, {"bias": True}, "a bias of the scores"),
        ("splash", TPU, {}, {"dropout": True}, "model.attention_dropout"),
        ("cudnn", H100, {}, {"prefix": True}, "prefix"),
        ("cudnn", H100, {}, {"weights": True}, "returning attention weights"),
        ("cudnn", H100, {}, {"cap": 50.0}, "model.attention_cap is 50.0"),
        ("cudnn", H100, {"dtype": jnp.float32}, {}, "compute_dtype bfloat16"),
        ("cudnn", H100, {"C": 20}, {}, "multiple of 8"),
        ("cudnn", Backend("cuda", 8.0), {"C": 256}, {}, "at most 128"),
        ("cudnn", T4, {"dtype": jnp.float16}, {}, "this one has 7.5"),
        ("triton", H100, {"dtype": jnp.float32, "T": 200}, {}, None),
        ("triton", TPU, {}, {}, "it requires cuda, and this program runs on tpu"),
        ("triton", T4, {}, {}, "this one has 7.5"),
        ("triton", H100, {"T": 64}, {}, "fewer than 128 positions"),
        ("triton", H100, {"C": 256}, {}, "at most 128"),
        ("triton", H100, {}, {"cap": 50.0}, "model.attention_cap is 50.0"),
        ("triton", H100, {}, {"window": True}, "--attention cudnn"),
        ("cudnn", H100._replace(has_cudnn=False), {}, {}, r"JAX does not find: pip install 'jaxlm[gpu]'"),
    ],
)
def test_unsupported_kernels_have_a_reason(kernel, backend, sizes, features, message):
    reason = why_not(kernel, backend, None, *like(**sizes), **features)
    assert reason is None if message is None else message in reason


@pytest.mark.parametrize("sizes, message", [({"B": 3}, "multiple of 2"), ({"K": 1}, "1 key-value heads"), ({}, None)])
def test_unsupported_kernels_on_a_mesh_have_a_reason(sizes, message):
    reason = why_not("splash", TPU, mesh_of("data2_tensor2"), *like(**sizes))
    assert reason is None if message is None else message in reason


def test_a_kernel_is_chosen_and_reported(capsys):
    kernels._print_once.cache_clear()
    assert choose(TPU, None, *like()) == "splash"
    assert choose(H100, None, *like()) == "cudnn"
    assert choose(Backend("cpu"), None, *like()) == choose(Backend("rocm"), None, *like()) == "xla"
    assert choose(TPU, None, *like(), wanted="xla") == choose(TPU, None, *like(T=64)) == "xla"
    assert capsys.readouterr().err == ""
    for _ in range(2):
        assert choose(H100, None, *like(dtype=jnp.float32)) == "xla"
    assert choose(TPU, None, *like(), bias=True) == "xla"
    first, second = capsys.readouterr().err.splitlines()
    assert "instead of the kernel cudnn: it supports float16" in first and "of the kernel splash: it does not" in second


@pytest.mark.parametrize(
    "device, backend",
    [
        ({"platform": "tpu", "device_kind": "TPU v5 lite"}, Backend("tpu", 5.0)),
        ({"platform": "tpu", "device_kind": "TPU7x"}, Backend("tpu", 7.0)),
        (
            {"platform": "gpu", "device_kind": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0"},
            H100._replace(has_cudnn=False),
        ),
        ({"platform": "gpu", "device_kind": "AMD Instinct MI300X", "compute_capability": "gfx942"}, Backend("rocm")),
    ],
)
def test_a_device_has_a_backend(device, backend):
    assert backend_of(SimpleNamespace(devices=np.array([SimpleNamespace(**device)]))) == backend
    assert backend_of(None) == backend_of(mesh_of("context2")) == Backend("cpu")
