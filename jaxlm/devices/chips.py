"""The rates and memory of chips, each constant with its source, and the topologies of TPUs and GPUs.

All constants are those of one JAX device: a whole chip on v4 and v5p (two cores as one "megacore"), v5e and v6e, half a
chip on v2, v3 and TPU7x, and one GPU.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

from jaxlm.errors import RunError, UserError, suggestion


class Constant(NamedTuple):
    """A value, its unit, and its source."""

    value: float
    unit: str
    source: str

    def __str__(self) -> str:
        return f"{self.value:,.4g} {self.unit} ({self.source})"


class Processor(NamedTuple):
    """What XLA must know about a GPU to compile for it."""

    capability: tuple[int, int]  # the compute capability
    cores: int  # multiprocessors
    units: int  # float32 units of a multiprocessor
    shared_kib: int  # shared memory of a multiprocessor
    cache_mib: float  # L2 cache
    gigahertz: float  # clock rate


class Chip(NamedTuple):
    """The rates and the memory of one JAX device."""

    name: str
    kinds: tuple[str, ...]  # values of `device.device_kind`
    flops: Constant  # dense matrix products in bfloat16, or in float16 on chips without bfloat16 (Volta, Turing)
    hbm: Constant  # memory
    usable: Constant | None  # memory that the compiler lets a program use, if known
    bandwidth: Constant  # of the memory
    link: Constant  # one direction of the device's share of an ICI link, or of all NVLink links of a GPU
    dimensions: int  # of the torus of links; 0 if a switch connects all devices
    devices_per_chip: int = 1
    pod: int = 0  # maximum number of TPU chips that are connected by ICI
    libtpu: str = ""  # name of the chip in libtpu's topologies
    options: tuple[tuple[str, str], ...] = ()  # libtpu options with which its devices are the same as JAX's
    processor: Processor | None = None  # of a GPU that XLA can compile for without having one

    @property
    def constants(self) -> dict[str, Constant]:
        """All constants with their labels, for a plan to print."""
        labelled = {
            "bfloat16 products": self.flops,
            "memory": self.hbm,
            "memory that a program may use": self.usable,
            "memory bandwidth": self.bandwidth,
            "link, one way": self.link,
        }
        return {label: constant for label, constant in labelled.items() if constant is not None}


_BOOK = "How to Scale Your Model, chapter 2, TPU Specs"  # Austin et al. 2025, jax-ml.github.io/scaling-book
_COMPILER = "libtpu 0.0.52, where it refuses a program that is too large"
_IRONWOOD = (
    "Google Cloud TPU documentation, page TPU7x (Ironwood), half of the chip: 1,200 GB/s over 6 links and both ways"
)
_JOUPPI = "Jouppi et al. 2020, A domain-specific supercomputer for training deep neural networks, half of a link"

_PREALLOCATED = "JAX documentation, GPU memory allocation: three quarters, unless XLA_PYTHON_CLIENT_MEM_FRACTION is set"

_SPARSE = ", half of the figure with sparsity"
_FP16 = ", in float16: the chip has no products in bfloat16"


def _tpu(
    name: str,
    kinds: tuple[str, ...],
    page: str,
    tera: float,
    gib: float,
    usable: float | None,
    giga: float,
    link: float,
    link_source: str,
    dimensions: int,
    pod: int,
    devices: int,
    libtpu: str,
) -> Chip:
    """Returns a TPU. A chip with two devices gives each half of its rates and memory."""
    half = ", half of the chip" if devices == 2 else ""
    source = f"Google Cloud TPU documentation, page {page}{half}"
    return Chip(
        name=name,
        kinds=kinds,
        flops=Constant(tera / devices * 1e12, "FLOP/s", source),
        hbm=Constant(gib / devices * 2**30, "bytes", source),
        usable=Constant(usable * 2**30, "bytes", _COMPILER) if usable else None,
        bandwidth=Constant(giga / devices * 1e9, "bytes/s", source),
        link=Constant(link * 1e9, "bytes/s", link_source),
        dimensions=dimensions,
        devices_per_chip=devices,
        pod=pod,
        libtpu=libtpu,
        # Without this option, libtpu has two devices for each v4 chip.
        options=(("chip_config_name", "megacore"),) if name == "v4" else (),
    )


def _gpu(
    name: str,
    kinds: tuple[str, ...],
    tera: float,
    gib: float,
    giga: float,
    link: float,
    sheet: str,
    note: str = "",
    processor: Processor | None = None,
) -> Chip:
    """Returns a GPU."""
    source = f"NVIDIA {sheet} datasheet"
    return Chip(
        name=name,
        kinds=kinds,
        flops=Constant(tera * 1e12, "FLOP/s", source + note),
        hbm=Constant(gib * 2**30, "bytes", source),
        usable=Constant(gib * 2**30 * 3 / 4, "bytes", _PREALLOCATED),
        bandwidth=Constant(giga * 1e9, "bytes/s", source),
        link=Constant(link / 2 * 1e9, "bytes/s", f"{source}: {link:,.0f} GB/s both ways"),
        dimensions=0,
        processor=processor,
    )


# Compute capability, multiprocessors, their float32 units and KiB of shared memory, MiB of L2 cache, GHz: from
# NVIDIA's architecture white papers and the CUDA programming guide.
_A100 = Processor((8, 0), 108, 64, 164, 40, 1.41)
_H100 = Processor((9, 0), 132, 128, 228, 50, 1.98)
_B200 = Processor((10, 0), 148, 128, 228, 126.5, 1.965)
_L4 = Processor((8, 9), 58, 128, 100, 48, 2.04)
_L40S = Processor((8, 9), 142, 128, 100, 96, 2.52)

# fmt: off
CHIPS = (
    # Name, kinds, page of the documentation, TFLOP/s and GiB of the chip, usable GiB of a device, GB/s of the chip's
    # memory, GB/s of a device's link in one direction, its source, dimensions, chips of a pod, devices, name in libtpu.
    _tpu("v2", ("TPU v2",), "TPU v2", 45, 16, None, 700, 496 / 8 / 2, _JOUPPI, 2, 256, 2, ""),
    _tpu("v3", ("TPU v3",), "TPU v3", 123, 32, None, 900, 656 / 8 / 2, _JOUPPI, 2, 1024, 2, ""),
    _tpu("v4", ("TPU v4",), "TPU v4", 275, 32, 30.75, 1200, 45, _BOOK, 3, 4096, 1, "v4"),
    _tpu("v5e", ("TPU v5 lite", "TPU v5e"), "TPU v5e", 197, 16, 15.75, 819, 45, _BOOK, 2, 256, 1, "v5e"),
    _tpu("v5p", ("TPU v5", "TPU v5p"), "TPU v5p", 459, 95, 95.73, 2765, 90, _BOOK, 3, 8960, 1, "v5p"),
    _tpu("v6e", ("TPU v6 lite", "TPU v6e"), "TPU v6e", 918, 32, 31.24, 1638, 90, _BOOK, 2, 256, 1, "v6e"),
    _tpu("7x", ("TPU7x",), "TPU7x (Ironwood)", 2307, 192, 94.74, 7380, 1200 / 12 / 2, _IRONWOOD, 3, 9216, 2, "tpu7x"),
    # Name, kinds, TFLOP/s, GiB, GB/s of memory, GB/s of all links in both directions, datasheet, note on the TFLOP/s.
    _gpu("A100-40", ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"), 312, 40, 1555, 600, "A100", processor=_A100),
    _gpu("A100-80", ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"), 312, 80, 2039, 600, "A100", processor=_A100),
    _gpu("A100-PCIe-40", ("NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB"), 312, 40, 1555, 64, "A100"),
    _gpu("A100-PCIe-80", ("NVIDIA A100 80GB PCIe", "NVIDIA A100-PCIE-80GB"), 312, 80, 1935, 64, "A100"),
    _gpu("H100", ("NVIDIA H100 80GB HBM3",), 989, 80, 3350, 900, "H100", f", SXM{_SPARSE}", processor=_H100),
    _gpu("H100-PCIe", ("NVIDIA H100 PCIe",), 756, 80, 2000, 128, "H100", f", PCIe{_SPARSE}"),
    _gpu("H100-NVL", ("NVIDIA H100 NVL",), 835, 94, 3900, 600, "H100", f", NVL{_SPARSE}"),
    _gpu("H200", ("NVIDIA H200",), 989, 141, 4800, 900, "H200", f", SXM{_SPARSE}", processor=_H100),
    _gpu("H200-NVL", ("NVIDIA H200 NVL",), 835, 141, 4800, 900, "H200", f", NVL{_SPARSE}"),
    _gpu("GH200", ("NVIDIA GH200 480GB", "NVIDIA GH200 120GB"), 990, 96, 4000, 900, "GH200", _SPARSE),
    _gpu("GH200-144", ("NVIDIA GH200 144G HBM3e",), 990, 144, 4900, 900, "GH200", _SPARSE),
    _gpu("B200", ("NVIDIA B200",), 2250, 180, 8000, 1800, "DGX B200", f", an eighth{_SPARSE}", processor=_B200),
    _gpu("GB200", ("NVIDIA GB200",), 2500, 186, 8000, 1800, "GB200 NVL72", f", a GPU's share{_SPARSE}"),
    _gpu("L4", ("NVIDIA L4",), 121, 24, 300, 64, "L4", _SPARSE, processor=_L4),
    _gpu("L40", ("NVIDIA L40",), 181, 48, 864, 64, "L40"),
    _gpu("L40S", ("NVIDIA L40S",), 362, 48, 864, 64, "L40S", processor=_L40S),
    _gpu("A10", ("NVIDIA A10",), 125, 24, 600, 64, "A10"),
    _gpu("A10G", ("NVIDIA A10G",), 70, 24, 600, 64, "A10G"),
    _gpu("A30", ("NVIDIA A30",), 165, 24, 933, 64, "A30"),
    _gpu("T4", ("Tesla T4", "NVIDIA T4"), 65, 16, 320, 32, "T4", _FP16),
    _gpu("V100", ("Tesla V100-SXM2-16GB",), 125, 16, 900, 300, "V100", _FP16),
    _gpu("V100-32", ("Tesla V100-SXM2-32GB", "Tesla V100-SXM3-32GB"), 125, 32, 900, 300, "V100", _FP16),
    _gpu("V100-PCIe", ("Tesla V100-PCIE-16GB",), 112, 16, 900, 32, "V100", _FP16),
    _gpu("V100-PCIe-32", ("Tesla V100-PCIE-32GB",), 112, 32, 900, 32, "V100", _FP16),
    _gpu("V100S", ("Tesla V100S-PCIE-32GB",), 130, 32, 1134, 32, "V100", _FP16),
)
# fmt: on
TPUS = {chip.name: chip for chip in CHIPS if chip.libtpu}
GPUS = {chip.name.lower(): chip for chip in CHIPS if chip.processor}
_MOST_GPUS = 8  # of a machine, connected by NVLink or PCIe
_OTHER_NAMES = {"tpu7x": "7x", "v7x": "7x", "v5litepod": "v5e"}

# The shapes that can be rented, and single chips. libtpu accepts other shapes too, and divides by zero on some of them.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4")  # in three dimensions, smaller than a cube of 4x4x4


def find(kind: str) -> Chip | None:
    """Returns the chip with this `device.device_kind`, or None if it is not in the table (CPUs, other GPUs)."""
    return next((chip for chip in CHIPS if kind in chip.kinds), None)


def unknown_chip_warning(kind: str, platform: str) -> str:
    """Returns a log message if an accelerator is not in the table, else an empty string."""
    if platform == "cpu" or find(kind):
        return ""
    return (
        f"the peak rate of {kind!r} is unknown, so the log has no MFU; "
        f"known chips: {', '.join(chip.name for chip in CHIPS)}"
    )


# How each platform multiplies float32 matrices at XLA's default precision, and at high precision.
_DEFAULT_FLOAT32 = {
    "tpu": "in one pass of bfloat16 (8 bits)",
    "gpu": "in TensorFloat32 (11 bits), if the device supports it",
}
_HIGH_FLOAT32 = {"tpu": "in three passes of bfloat16 (about 16 bits)", "gpu": _DEFAULT_FLOAT32["gpu"]}


def float32_warning(dtype: str, precision: str, platform: str) -> str:
    """Returns a log message if float32 matrices are not multiplied in float32, else an empty string."""
    if dtype != "float32" or platform not in _DEFAULT_FLOAT32 or precision == "highest":
        return ""
    method = _DEFAULT_FLOAT32[platform] if precision == "default" else _HIGH_FLOAT32[platform]
    return (
        f"compute_dtype is float32, but matrices are multiplied {method} on this {platform.upper()}; "
        f"set --matmul-precision highest for float32"
    )


def supported_topologies() -> list[str]:
    """Returns one line for each kind of TPU, with the shapes of its topologies."""
    lines = []
    for chip in TPUS.values():
        cubes = f"or multiples of 4 in all three, at most {chip.pod:,} chips, such as 4x4x8"
        shapes = " ".join(_FLAT) if chip.dimensions == 2 else f"{' '.join(_SMALL)} {cubes}"
        lines.append(f"{chip.name}: {shapes}")
    return [*lines, *(f"{chip.name}: 1 to {_MOST_GPUS}" for chip in GPUS.values())]


def parse_topology(name: str) -> tuple[Chip, tuple[int, ...]]:
    """Parses a topology such as `v5e:4x4` or `H100:8`.

    Args:
      name: CHIP:SHAPE; the shape of GPUs is their number.

    Returns:
      The chip, and the shape in chips.

    Raises:
      UserError: if the topology does not exist.
    """
    match = re.fullmatch(r"([\w-]+):(\d+(?:x\d+)*)", name.strip().lower())
    topologies = "\n  ".join(supported_topologies())
    if not match:
        raise UserError(
            f"the topology {name!r} does not have the form CHIP:SHAPE, such as v5e:4x4 or H100:8; choose from:\n  "
            f"{topologies}"
        )
    known = TPUS | GPUS
    chip = known.get(_OTHER_NAMES.get(match[1], match[1]))
    if chip is None:
        raise UserError(
            f"the topology {name!r} has an unknown chip{suggestion(match[1], known)}; choose from:\n  {topologies}"
        )
    shape = tuple(int(size) for size in match[2].split("x"))
    if chip.processor is not None:
        if len(shape) != 1 or not 1 <= shape[0] <= _MOST_GPUS:
            raise UserError(
                f"the topology {name!r} has the shape {match[2]}; choose a number of GPUs from 1 to {_MOST_GPUS}, such "
                f"as {chip.name}:{_MOST_GPUS}"
            )
        return chip, shape
    small = _FLAT if chip.dimensions == 2 else _SMALL
    permutations = {tuple(sorted(int(size) for size in s.split("x"))) for s in small}
    cubes = chip.dimensions == len(shape) == 3 and all(size and size % 4 == 0 for size in shape)
    is_known = tuple(sorted(shape)) in permutations or cubes
    if len(shape) != chip.dimensions or not is_known or math.prod(shape) > chip.pod:
        own = next(line for line in supported_topologies() if line.startswith(f"{chip.name}:"))
        raise UserError(f"the topology {name!r} has a shape that does not exist; choose from {own}")
    return chip, shape


def rings(chip: Chip, shape: tuple[int, ...]) -> tuple[bool, ...]:
    """Returns for each dimension whether its links form a ring, on which a collective can send in both directions.

    That is the case for 16 chips on v5e and v6e, and for whole cubes on the others (How to Scale Your Model, chapter 2,
    TPU Networking).
    """
    if chip.dimensions == 2:
        return tuple(size == 16 for size in shape)
    return (all(size % 4 == 0 for size in shape),) * len(shape)


# A program that plans for other chips has to set these before JAX looks for devices. Without the first, JAX looks for
# chips of this machine. Without the second, it warns that it cannot load cached programs of an earlier plan.
PLANNING_SETTINGS: dict[str, Any] = {"jax_platforms": "cpu", "jax_enable_compilation_cache": False}
_LIBTPU_VARIABLES = {  # read when libtpu is loaded
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask the metadata server of Google Cloud about this machine
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any machine; libtpu requires this and the next one
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no lock, so other processes may plan or train at the same time
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@contextmanager
def _loading() -> Iterator[None]:
    """Sets the variables that libtpu reads, unless the user has set them, and restores the environment afterwards."""
    added = {name: value for name, value in _LIBTPU_VARIABLES.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def topology_devices(name: str) -> list[Any]:
    """Returns the devices of a topology for the compiler of the chips. No such chip is required.

    Args:
      name: a topology such as `v5e:4x4` or `H100:8`.

    Returns:
      The devices. Those of a TPU are in libtpu's order: host by host, each with a square of 2 x 2 chips. On TPU7x the
      two devices of a chip are neighbours.

    Raises:
      UserError: for an unknown topology, and if the compiler is not installed.
      RunError: if the compiler does not return the topology.
    """
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    chip, shape = parse_topology(name)
    if chip.processor is not None:
        check_gpu_compiler(name)
        source, platform, options = "XLA", "cuda", _gpu_options(chip, chip.processor, shape[0])
    else:
        if not os.environ.get("TPU_LIBRARY_PATH") and find_spec("libtpu") is None:
            raise UserError(
                f"the topology {name!r} requires the TPU compiler, and libtpu is not installed; "
                f"install it with pip install 'jaxlm[plan]' (Linux only)"
            )
        source, platform = "libtpu", "tpu"
        options = {"topology_name": f"{chip.libtpu}:{'x'.join(map(str, shape))}", **dict(chip.options)}
    try:
        with _loading():
            devices = topologies.get_topology_desc(platform=platform, **options).devices
    except JaxRuntimeError as error:
        raise RunError(f"{source} does not return the topology {name}: {error}") from error
    expected = math.prod(shape) * chip.devices_per_chip
    assert len(devices) == expected, f"{name} has {len(devices)} devices, not {expected}"
    return list(devices)


def check_gpu_compiler(name: str) -> None:
    """Raises UserError if JAX's compiler for NVIDIA GPUs is not installed, which the topology `name` requires."""
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if not any(find_spec(plugin) for plugin in plugins):
        raise UserError(
            f"the topology {name!r} requires JAX's compiler for NVIDIA GPUs, which is not installed; install it with "
            f"pip install 'jaxlm[plan-gpu]' (Linux only)"
        )


def _gpu_options(chip: Chip, processor: Processor, count: int) -> dict[str, str]:
    """Returns the description of GPUs that XLA needs to compile for them (its message GpuTargetConfigProto)."""
    major, minor = processor.capability
    shared = processor.shared_kib * 1024
    extension = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_block_optin": shared - 1024,
        "shared_memory_per_core": shared,
        "threads_per_core_limit": 1536 if processor.capability in ((8, 6), (8, 9)) else 2048,
        "core_count": processor.cores,
        "fpus_per_core": processor.units,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "memory_bandwidth": int(chip.bandwidth.value),
        "l2_cache_size": int(processor.cache_mib * 2**20),
        "clock_rate_ghz": processor.gigahertz,
        "device_memory_size": int(chip.hbm.value),
    }
    info = " ".join(f"{field}: {value}" for field, value in fields.items())
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor}{extension} }}"
    config = (
        f'gpu_device_info {{ {info} {capability} }} platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} '
        f'runtime_version {{ major: 12 minor: 8 }} device_description_str: "{chip.kinds[0]}"'
    )
    return {"topology_name": chip.name, "target_config": config, "topology": f"1x1x{count}"}
