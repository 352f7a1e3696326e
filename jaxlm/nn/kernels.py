"""Fused attention: kernels that never write the scores [B, H, T, S] to memory.

| kernel | device     | packed rows                   | also                                    | "auto"        |
| ------ | ---------- | ----------------------------- | --------------------------------------- | ------------- |
| splash | TPU        | reads segments                | windows, caps, sharded lengths          | on TPUs       |
| cudnn  | NVIDIA GPU | reads a 16-bit mask [B, T, S] | windows, sharded lengths, widths to 256 | on such GPUs  |
| triton | NVIDIA GPU | reads segments                | float32                                 | never         |

They compute the softmax in blocks, recompute it in the backward pass (FlashAttention, Dao et al. 2022), and skip the
blocks that the causal mask hides; splash also those outside of the window. Their memory is linear in the length, except
that of cudnn for packed rows. splash and triton are Pallas kernels of JAX. triton repeats the keys and values of
grouped queries, and has not been timed on a GPU. `why_not` has the conditions of each.
"""

from __future__ import annotations

import re
import sys
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.devices.sharding import RULES

KERNELS = {"tpu": "splash", "cuda": "cudnn"}  # of "auto", by platform; other platforms have none
PLATFORMS = {"splash": "tpu", "cudnn": "cuda", "triton": "cuda"}
MULTIPLE = {"splash": 128, "cudnn": 2, "triton": 128}  # lengths on each device are padded to a multiple of this
BLOCKS = (512, 384, 256, 128)  # block sizes of splash; the first that divides the length is used
CONTEXT = "context"  # the mesh axis over which queries are sharded by position
RESIDUALS = "attention"  # the name of splash's output and sums in policies of `jax.checkpoint`


_save_named = jax.checkpoint_policies.save_only_these_names(RESIDUALS)


def save_attention(primitive: Any, *inputs: Any, **parameters: Any) -> Any:
    """A policy of `jax.checkpoint` that saves the output and the sums of each fused kernel, and nothing else.

    JAX gives the outputs of cudnn and triton no name, so the policy finds them by their functions.
    """
    called = parameters["call_jaxpr"].eqns if primitive.name == "custom_vjp_call" else ()
    is_triton = any(equation.params.get("name") == "mha" for equation in called)
    is_cudnn = primitive.name.startswith("dot_product_attention_fwd")
    return is_triton or is_cudnn or _save_named(primitive, *inputs, **parameters)


class Backend(NamedTuple):
    """The hardware that a program runs on. For example, a TPU v5e is ("tpu", 5.0), an H100 is ("cuda", 9.0).

    Attributes:
      platform: cpu, tpu, cuda or rocm.
      generation: the version of a TPU, or the compute capability of an NVIDIA GPU.
      devices: number of devices over which a program without a mesh may be sharded.
      has_cudnn: whether JAX finds the library cuDNN.
    """

    platform: str
    generation: float = 0.0
    devices: int = 1
    has_cudnn: bool = True


def backend_of(mesh: Mesh | None) -> Backend:
    """Returns the backend of a mesh; without a mesh, the backend of all devices."""
    backend = _backend(jax.devices()[0] if mesh is None else mesh.devices.flat[0])
    return backend._replace(devices=len(jax.devices())) if mesh is None and backend.platform in KERNELS else backend


def _backend(device: Any) -> Backend:
    if device.platform == "tpu":
        number = re.search(r"\d+", device.device_kind)  # "TPU v5 lite", "TPU7x"
        return Backend("tpu", float(number[0]) if number else 0.0)
    if device.platform in ("gpu", "cuda", "rocm"):
        amd = device.platform == "rocm" or "amd" in device.device_kind.lower()
        if amd:
            return Backend("rocm")
        return Backend("cuda", float(getattr(device, "compute_capability", 0.0)), has_cudnn=_has_cudnn())
    return Backend(device.platform)


def _has_cudnn() -> bool:
    """Returns whether JAX finds cuDNN; its attention would otherwise raise an error."""
    from jax._src.cudnn import fused_attention_stablehlo

    try:
        return bool(fused_attention_stablehlo.check_cudnn_version())
    except (AttributeError, RuntimeError):
        return False


def choose(
    backend: Backend, mesh: Mesh | None, q_BTHC: Any, k_BSKC: Any, *, wanted: str = "auto", **features: Any
) -> str:
    """Returns the kernel for an attention: splash, cudnn, triton, or xla, which the caller implements.

    If the kernel cannot be used, the reason is printed to stderr, once for each reason. With "auto", short rows use XLA
    without a message.

    Args:
      backend: the hardware.
      mesh: the mesh, if there is one.
      q_BTHC: queries, or their shape and dtype.
      k_BSKC: keys, or their shape and dtype.
      wanted: "auto" (the kernel of the backend) or the name of a kernel.
      **features: the other keyword arguments of `why_not`.
    """
    kernel = KERNELS.get(backend.platform, "xla") if wanted == "auto" else wanted
    if kernel == "xla" or (wanted == "auto" and min(q_BTHC.shape[1], k_BSKC.shape[1]) < MULTIPLE[kernel]):
        return "xla"
    reason = why_not(kernel, backend, mesh, q_BTHC, k_BSKC, **features)
    if reason is None:
        return kernel
    _print_once(f"attention uses XLA instead of the kernel {kernel}: {reason}")
    return "xla"


def why_not(
    kernel: str,
    backend: Backend,
    mesh: Mesh | None,
    q_BTHC: Any,
    k_BSKC: Any,
    *,
    cap: float = 0.0,
    bias: bool = False,
    dropout: bool = False,
    prefix: bool = False,
    weights: bool = False,
    window: bool = False,
    global_tokens: bool = False,
    sinks: bool = False,
) -> str | None:
    """Returns the reason why a kernel cannot compute an attention, or None if it can.

    Args:
      kernel: splash, cudnn or triton.
      backend: the hardware.
      mesh: the mesh, if there is one.
      q_BTHC: queries, or their shape and dtype.
      k_BSKC: keys, or their shape and dtype.
      cap: soft cap of the scores; 0: none.
      bias: whether there is a bias of the scores.
      dropout: whether there is dropout of the weights.
      prefix: whether the mask is not defined by segments, causality and window, as with a prefix.
      weights: whether the attention weights are requested.
      window: whether the attention is local.
      global_tokens: whether some tokens have global attention.
      sinks: whether each head has an attention sink.
    """
    B, T, H, C = q_BTHC.shape
    _, S, K, _ = k_BSKC.shape
    dtype, splash, cudnn, triton = jnp.dtype(q_BTHC.dtype).name, *(kernel == name for name in PLATFORMS)
    rows, heads, length = _axes(mesh)
    B_ways, H_ways = _ways(mesh, rows), _ways(mesh, heads)
    max_width = 256 if cudnn and backend.generation >= 9 else 128
    platform = PLATFORMS[kernel]
    for applies, reason in (
        (backend.platform != platform, f"it requires {platform}, and this program runs on {backend.platform}"),
        (
            not cudnn and mesh is None and backend.devices > 1,
            f"the model has no mesh for the {backend.devices} devices: load it with mesh=, or create its module with "
            f"Placement(mesh)",
        ),
        (weights, "it does not support returning attention weights"),
        (bias, "it does not support a bias of the scores, which relative positions need"),
        (sinks, "it does not support attention sinks"),
        (dropout, "it does not support dropout: a model.attention_dropout of 0 is faster"),
        (global_tokens, "it does not support tokens with global attention"),
        (prefix, "it supports only causal and full masks, not the mask of a prefix"),
        # Below this a block is mostly padding, and the scores are small.
        (min(T, S) < MULTIPLE[kernel], f"there are fewer than {MULTIPLE[kernel]} positions"),
        (
            bool(B % B_ways),
            f"{B} rows are not a multiple of {B_ways}, the number of devices that they are sharded over",
        ),
        (
            bool(H % H_ways or K % H_ways),
            f"{H} heads and {K} key-value heads are not both multiples of {H_ways} devices",
        ),
        (splash and dtype not in ("float32", "bfloat16"), f"it supports float32 and bfloat16, not {dtype}"),
        (splash and backend.generation < 4 and dtype == "bfloat16", "TPUs before v4 support only float32"),
        (triton and window, "it does not support local attention: --attention cudnn does"),
        (triton and T != S, f"it requires as many keys as queries, and there are {S} and {T}"),
        (triton and _ways(mesh, length) > 1, "it does not support a sharded length: --attention cudnn does"),
        (cudnn and not backend.has_cudnn, "it requires cuDNN, which JAX does not find: pip install 'jaxlm[gpu]'"),
        (not splash and bool(cap), f"it does not support a soft cap, and model.attention_cap is {cap}"),
        (
            cudnn and dtype not in ("float16", "bfloat16"),
            f"it supports float16 and bfloat16, not {dtype}: compute_dtype bfloat16 is faster",
        ),
        (
            not splash and backend.generation < 8,
            f"it requires a GPU of compute capability 8.0 (A100) or above, and this one has {backend.generation}",
        ),
        (
            not splash and C not in range(8, max_width + 1, 8),
            f"the head width must be a multiple of 8 and at most {max_width}, and it is {C}",
        ),
    ):
        if applies:
            return reason
    return None


@cache
def _print_once(message: str) -> None:
    print(message, file=sys.stderr)


def fused(
    kernel: str,
    mesh: Mesh | None,
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    segments_BT: jax.Array | None,
    segments_BS: jax.Array | None,
    *,
    causal: bool,
    window: int | None = None,
    scale: float,
    cap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """Returns `softmax(q k scale) v` [B, T, H, C] from a fused kernel; `why_not` must return None for it.

    Query t attends to key s if their segments are equal, s <= t if `causal`, and |t - s| < window. Each of the K
    key-value heads serves H / K query heads. The outputs of padding (segment 0), and of queries without any key in
    their segment, are finite but meaningless.

    Args:
      kernel: splash, cudnn or triton.
      mesh: rows are sharded over its batch axes, heads over its head axes, and queries, but not keys, over the axis
        `context`.
      q_BTHC: queries.
      k_BSKC: keys.
      v_BSKC: values.
      segments_BT: segments of the queries; None: each row is one segment, and the kernel reads no mask.
      segments_BS: segments of the keys; None: as above.
      causal: whether queries attend to no later keys.
      window: the width of local attention; None: global attention.
      scale: factor of the scores.
      cap: soft cap of the scores, for splash; 0: none.
      interpret: whether to run splash or triton on CPU, for tests.
    """
    T = q_BTHC.shape[1]
    rows, heads, length = _axes(mesh)
    parts = _ways(mesh, length)
    if segments_BT is None or segments_BS is None:
        segments_BT = segments_BS = None
        if not causal and k_BSKC.shape[1] % MULTIPLE[kernel]:  # causality hides the padding of keys
            segments_BT, segments_BS = (jnp.ones(x.shape[:2], jnp.int32) for x in (q_BTHC, k_BSKC))
    pad_queries, pad_keys = partial(_pad, multiple=parts * MULTIPLE[kernel]), partial(_pad, multiple=MULTIPLE[kernel])
    q_BTHC, segments_BT = jax.tree.map(pad_queries, (q_BTHC, segments_BT))
    k_BSKC, v_BSKC, segments_BS = jax.tree.map(pad_keys, (k_BSKC, v_BSKC, segments_BS))
    if window is not None and window >= max(q_BTHC.shape[1], k_BSKC.shape[1]):
        window = None
    plan = plan_spec = None
    uniform = not causal and window is None  # then all shards of the queries have the same plan
    if kernel == "splash":
        plan_length = q_BTHC.shape[1] // parts if uniform else q_BTHC.shape[1]
        local_heads = q_BTHC.shape[2] // _ways(mesh, heads)
        plan = _plan(plan_length, k_BSKC.shape[1], local_heads, causal, window, cap, 1 if uniform else parts, interpret)
        attend = partial(_splash, scale=scale)
    elif kernel == "triton":
        attend = partial(_triton, causal=causal, scale=scale, interpret=interpret)
    else:
        attend = partial(_cudnn, causal=causal, window=window, scale=scale, parts=parts)
    if mesh is not None and mesh.size > 1:
        if plan is not None:
            plan_spec = plan.manual_sharding_spec(NamedSharding(mesh, P(None, None if uniform else length)))
        q_spec, k_spec = P(rows, length, heads), P(rows, None, heads)
        specs = (plan_spec, q_spec, k_spec, k_spec, P(rows, length), P(rows))
        # The kernels do not declare over which axes their outputs vary, so that this cannot be checked.
        attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=q_spec, check_vma=False)
    return attend(plan, q_BTHC, k_BSKC, v_BSKC, segments_BT, segments_BS)[:, :T]


def _splash(
    plan: Any,
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    segments_BT: jax.Array | None,
    segments_BS: jax.Array | None,
    *,
    scale: float,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    heads_first = lambda x_BTHC: x_BTHC.transpose(0, 2, 1, 3)
    segments = None if segments_BT is None or segments_BS is None else SegmentIds(segments_BT, segments_BS)
    return heads_first(jax.vmap(plan)(heads_first(q_BTHC * scale), heads_first(k_BSKC), heads_first(v_BSKC), segments))


@lru_cache(maxsize=64)
def _plan(T: int, S: int, H: int, causal: bool, window: int | None, cap: float, parts: int, interpret: bool) -> Any:
    """Returns splash attention for these shapes. Its block masks are NumPy arrays, independent of any trace.

    This takes 0.5 s for 8,192 positions and 5 s for 32,768, hence the cache.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    if window is not None:
        mask: Any = splash.LocalMask((T, S), (window - 1, 0 if causal else window - 1), 0)
    else:
        mask = splash.CausalMask((T, S)) if causal else splash.FullMask((T, S))
    q, k = _block(T // parts), _block(S)
    blocks = splash.BlockSizes(
        block_q=q,
        block_kv=k,
        block_kv_compute=k,
        block_q_dkv=q,
        block_kv_dkv=k,
        block_kv_dkv_compute=k,
        block_q_dq=q,
        block_kv_dq=k,
    )
    with jax.ensure_compile_time_eval():
        plan = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * H),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=parts,
            attn_logits_soft_cap=cap or None,
            residual_checkpoint_name=RESIDUALS,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, plan)


def _block(length: int) -> int:
    return next(block for block in BLOCKS if length % block == 0)


def _triton(
    _: None,
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    segments_BT: jax.Array | None,
    _segments_BS: jax.Array | None,
    *,
    causal: bool,
    scale: float,
    interpret: bool,
) -> jax.Array:
    from jax.experimental.pallas.ops.gpu.attention import mha

    repeat = lambda x_BSKC: jnp.repeat(x_BSKC, q_BTHC.shape[2] // x_BSKC.shape[2], axis=2)
    options = {"sm_scale": scale, "causal": causal, "interpret": interpret}
    return mha(q_BTHC, repeat(k_BSKC), repeat(v_BSKC), segments_BT, **options)


def _cudnn(
    _: None,
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    segments_BT: jax.Array | None,
    segments_BS: jax.Array | None,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    parts: int,
) -> jax.Array:
    attend = partial(jax.nn.dot_product_attention, scale=scale, is_causal=causal and parts == 1, implementation="cudnn")
    if segments_BT is not None and segments_BS is not None:
        mask_BTS = segments_BT[:, :, None] == segments_BS[:, None, :]
    elif parts == 1 if causal else window is None:  # cuDNN applies causality, and windows that are causal
        return attend(q_BTHC, k_BSKC, v_BSKC, local_window_size=None if window is None else (window - 1, 0))
    else:
        mask_BTS = jnp.ones((1, q_BTHC.shape[1], k_BSKC.shape[1]), bool)
    T, S = jnp.arange(q_BTHC.shape[1]), jnp.arange(k_BSKC.shape[1])
    if parts > 1:
        T += jax.lax.axis_index(CONTEXT) * q_BTHC.shape[1]
    if causal and parts > 1:  # cuDNN numbers the queries of a shard from 0
        mask_BTS &= T[:, None] >= S
    if window is not None:  # cuDNN's windows require causal masks, and allow no other mask before version 9.10.2
        mask_BTS &= jnp.abs(T[:, None] - S) < window
    return attend(q_BTHC, k_BSKC, v_BSKC, mask=mask_BTS[:, None])


def _pad(x_BT: jax.Array, multiple: int) -> jax.Array:
    """Returns x padded with zeros to a multiple of a length; in segments, zeros are padding."""
    missing = -x_BT.shape[1] % multiple
    return jnp.pad(x_BT, ((0, 0), (0, missing)) + ((0, 0),) * (x_BT.ndim - 2)) if missing else x_BT


def _axes(mesh: Mesh | None) -> tuple[tuple[str, ...], tuple[str, ...], str | None]:
    """Returns the mesh axes over which rows, heads and positions of queries are sharded."""
    if mesh is None:
        return (), (), None
    axes = lambda logical: tuple(axis for axis in RULES[logical] if axis in mesh.shape)
    return axes("batch"), axes("heads"), CONTEXT if mesh.shape.get(CONTEXT, 1) > 1 else None


def _ways(mesh: Mesh | None, axes: tuple[str, ...] | str | None) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in names], dtype=int))
