"""Fused attention over packed rows: kernels that never write the scores [B, H, T, S] to memory, one for each backend.

splash, on TPUs: JAX's own Pallas kernel.  It skips the blocks that the causal mask or the window hides.
cudnn, on NVIDIA's GPUs: cuDNN's kernel.  It skips what the causal mask hides; all other masks are handed to it whole.

Both compute the softmax block by block as they go and recompute it in the backward pass (FlashAttention, Dao et al.
2022).  The memory of splash grows with the length; that of cudnn, for the mask of 16 bits [B, T, S], with its square.
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

KERNELS = {"tpu": "splash", "cuda": "cudnn"}  # of each platform; the others have none
MULTIPLE = {"splash": 128, "cudnn": 2}  # of lengths, on each device; others are padded
BLOCKS = (512, 384, 256, 128)  # positions that splash works on at once: the first that divides the length
CONTEXT = "context"  # the mesh axis that queries are split over by position, where there is one
RESIDUALS = "attention"  # what a policy of `jax.checkpoint` may call splash's output and sums, to keep them


class Chip(NamedTuple):
    """What a program runs on: cpu, tpu, cuda or rocm, and of TPUs the version, of NVIDIA's GPUs the compute capability.

    A TPU v5e is ("tpu", 5.0), an H100 ("cuda", 9.0).  devices: how many a program may be spread over without a mesh
    that says how.
    """

    platform: str
    generation: float = 0.0
    devices: int = 1


def chip_of(mesh: Mesh | None) -> Chip:
    """The chip that a program for this mesh runs on; without one, on some of all devices."""
    chip = _kind(jax.devices()[0] if mesh is None else mesh.devices.flat[0])
    return chip._replace(devices=len(jax.devices())) if mesh is None and chip.platform in KERNELS else chip


def _kind(device: Any) -> Chip:
    if device.platform == "tpu":
        number = re.search(r"\d+", device.device_kind)  # "TPU v5 lite", "TPU7x"
        return Chip("tpu", float(number[0]) if number else 0.0)
    if device.platform in ("gpu", "cuda", "rocm"):
        amd = device.platform == "rocm" or "amd" in device.device_kind.lower()
        return Chip("rocm") if amd else Chip("cuda", float(getattr(device, "compute_capability", 0.0)))
    return Chip(device.platform)


def choose(chip: Chip, mesh: Mesh | None, q_BTHC: Any, k_BSKC: Any, *, wanted: str = "auto", **asked: Any) -> str:
    """The kernel for an attention: splash, cudnn, or xla, which is the caller's own.

    wanted: auto, or one of these.  Where the chip's own or the wanted kernel cannot serve it, that is said on stderr,
    once for each reason; short rows are left to XLA without a word.  asked: the rest of the keywords of `why_not`.
    """
    kernel = KERNELS.get(chip.platform, "xla") if wanted == "auto" else wanted
    if kernel == "xla" or (wanted == "auto" and min(q_BTHC.shape[1], k_BSKC.shape[1]) < MULTIPLE[kernel]):
        return "xla"
    reason = why_not(kernel, chip, mesh, q_BTHC, k_BSKC, **asked)
    if reason is None:
        return kernel
    _say(f"attention is XLA's, not the kernel {kernel}: {reason}")
    return "xla"


def why_not(
    kernel: str,
    chip: Chip,
    mesh: Mesh | None,
    q_BTHC: Any,
    k_BSKC: Any,
    *,
    cap: float = 0.0,
    bias: bool = False,
    dropout: bool = False,
    prefix: bool = False,
    weights: bool = False,
) -> str | None:
    """Why this kernel cannot serve an attention of these queries and keys (arrays, or their shapes and dtypes).

    cap: of the scores, 0 for none.  bias: whether something is added to the scores.  dropout: whether weights are
    dropped.  prefix: whether a prefix sees all of itself.  weights: whether the attention weights are asked for.
    None: it can.
    """
    B, T, H, C = q_BTHC.shape
    _, S, K, _ = k_BSKC.shape
    dtype, cudnn = jnp.dtype(q_BTHC.dtype).name, kernel == "cudnn"
    rows, heads, _ = _axes(mesh)
    B_ways, H_ways = _ways(mesh, rows), _ways(mesh, heads)
    widest = 256 if chip.generation >= 9 else 128
    home = {name: platform for platform, name in KERNELS.items()}[kernel]
    for holds, reason in (
        (chip.platform != home, f"it is for {home}, and this runs on {chip.platform}"),
        (
            not cudnn and mesh is None and chip.devices > 1,
            f"the model does not say on which of {chip.devices} devices it lies: load it with mesh=, or build its "
            f"module with Placement(mesh)",
        ),
        (weights, "the attention weights are asked for, which it never holds"),
        (bias, "a bias by relative position is added to the scores, for which it has no place"),
        (dropout, "weights are dropped, which it cannot do: a model.attention_dropout of 0 is faster"),
        (prefix, "tokens of a prefix see all of it, and its masks are causal or full"),
        # Below this a block is mostly padding, and the scores are small.
        (min(T, S) < MULTIPLE[kernel], f"there are fewer than {MULTIPLE[kernel]} positions"),
        (bool(B % B_ways), f"its rows are not a multiple of {B_ways}, the ways that the mesh splits them"),
        (bool(H % H_ways or K % H_ways), f"{H} heads and {K} key-value heads do not both divide by {H_ways} devices"),
        (
            not cudnn and dtype not in ("float32", "bfloat16"),
            f"it computes in float32 or bfloat16, and these are {dtype}",
        ),
        (not cudnn and chip.generation < 4 and dtype == "bfloat16", "TPUs before v4 run it in float32 alone"),
        (cudnn and bool(cap), f"it has no cap of scores, and model.attention_cap is {cap}"),
        (
            cudnn and dtype not in ("float16", "bfloat16"),
            f"it computes in 16 bits, and these are {dtype}: compute_dtype bfloat16 is faster",
        ),
        (
            cudnn and chip.generation < 8,
            f"it needs a GPU of compute capability 8.0 (A100), and this is {chip.generation}",
        ),
        (
            cudnn and C not in range(8, widest + 1, 8),
            f"heads must be a multiple of 8 wide, at most {widest}; these are {C}",
        ),
    ):
        if holds:
            return reason
    return None


@cache
def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def fused(
    kernel: str,
    mesh: Mesh | None,
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    segments_BT: jax.Array,
    segments_BS: jax.Array,
    *,
    causal: bool,
    window: int | None = None,
    scale: float,
    cap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """`softmax(q k scale) v` [B, T, H, C] by the kernel splash or cudnn, where `why_not` has nothing to say against it.

    Query t sees key s if their segments are equal, if `causal` s <= t, and |t - s| < window.  Each of the K key-value
    heads serves H / K query heads.  Padding (segment 0) sees padding: it gives finite numbers, which nobody should
    read; nor should those of a query of whose segment there is no key.
    mesh: rows are split over its axes of the batch, heads over those of the heads, and queries, not keys, over the axis
    `context` where it has one.  interpret: run splash on a CPU, for tests.
    """
    T = q_BTHC.shape[1]
    rows, heads, length = _axes(mesh)
    parts = _ways(mesh, length)
    q_BTHC, segments_BT = (_padded(x, parts * MULTIPLE[kernel]) for x in (q_BTHC, segments_BT))
    k_BSKC, v_BSKC, segments_BS = (_padded(x, MULTIPLE[kernel]) for x in (k_BSKC, v_BSKC, segments_BS))
    if window is not None and window >= max(q_BTHC.shape[1], k_BSKC.shape[1]):
        window = None
    plan = plan_spec = None
    alike = not causal and window is None  # then all parts of the queries have the same plan, else each its own
    if kernel == "splash":
        planned = q_BTHC.shape[1] // parts if alike else q_BTHC.shape[1]
        heads_here = q_BTHC.shape[2] // _ways(mesh, heads)
        plan = _plan(planned, k_BSKC.shape[1], heads_here, causal, window, cap, 1 if alike else parts, interpret)
        attend = partial(_splash, scale=scale)
    else:
        attend = partial(_cudnn, causal=causal, window=window, scale=scale, parts=parts)
    if mesh is not None and mesh.size > 1:
        if plan is not None:
            plan_spec = plan.manual_sharding_spec(NamedSharding(mesh, P(None, None if alike else length)))
        q_spec, k_spec = P(rows, length, heads), P(rows, None, heads)
        specs = (plan_spec, q_spec, k_spec, k_spec, P(rows, length), P(rows))
        # The kernels do not say over which axes their outputs vary, so that this cannot be checked.
        attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=q_spec, check_vma=False)
    return attend(plan, q_BTHC, k_BSKC, v_BSKC, segments_BT, segments_BS)[:, :T]


def _splash(
    plan: Any,
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    segments_BT: jax.Array,
    segments_BS: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    heads_first = lambda x_BTHC: x_BTHC.transpose(0, 2, 1, 3)
    segments = SegmentIds(segments_BT, segments_BS)
    return heads_first(jax.vmap(plan)(heads_first(q_BTHC * scale), heads_first(k_BSKC), heads_first(v_BSKC), segments))


@lru_cache(maxsize=64)
def _plan(T: int, S: int, H: int, causal: bool, window: int | None, cap: float, parts: int, interpret: bool) -> Any:
    """Splash attention for these shapes: which blocks it visits, as NumPy arrays, so that no trace owns them.

    Half a second at 8,192 positions and 5 at 32,768, hence the cache.
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


def _cudnn(
    _: None,
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    segments_BT: jax.Array,
    segments_BS: jax.Array,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    parts: int,
) -> jax.Array:
    mask_BTS = segments_BT[:, :, None] == segments_BS[:, None, :]
    T, S = jnp.arange(q_BTHC.shape[1]), jnp.arange(k_BSKC.shape[1])
    if parts > 1:
        T += jax.lax.axis_index(CONTEXT) * q_BTHC.shape[1]
    if causal and parts > 1:  # cuDNN counts queries from 0
        mask_BTS &= T[:, None] >= S
    if window is not None:  # cuDNN's own windows go with no mask before 9.10.2, and with causal ones alone
        mask_BTS &= jnp.abs(T[:, None] - S) < window
    return jax.nn.dot_product_attention(
        q_BTHC,
        k_BSKC,
        v_BSKC,
        mask=mask_BTS[:, None],
        scale=scale,
        is_causal=causal and parts == 1,
        implementation="cudnn",
    )


def _padded(x_BT: jax.Array, multiple: int) -> jax.Array:
    """With zeros behind, so that its length is a multiple; as segments these are padding."""
    missing = -x_BT.shape[1] % multiple
    return jnp.pad(x_BT, ((0, 0), (0, missing)) + ((0, 0),) * (x_BT.ndim - 2)) if missing else x_BT


def _axes(mesh: Mesh | None) -> tuple[tuple[str, ...], tuple[str, ...], str | None]:
    """The mesh axes that rows, heads and the positions of queries are split over."""
    if mesh is None:
        return (), (), None
    here = lambda logical: tuple(axis for axis in RULES[logical] if axis in mesh.shape)
    return here("batch"), here("heads"), CONTEXT if mesh.shape.get(CONTEXT, 1) > 1 else None


def _ways(mesh: Mesh | None, axes: tuple[str, ...] | str | None) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in names], dtype=int))
