"""What the chips can do, each constant with its source; and the topologies of TPUs that need not be there.

All constants are of one JAX device.  That is a whole chip on v4 and v5p (two cores work as one, "megacore"), v5e and
v6e, half a chip on TPU7x (each of its two dies is a device), and one GPU.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

from jaxlm.errors import RunError, UserError, perhaps


class Constant(NamedTuple):
    """A value, its unit, and where it is written."""

    value: float
    unit: str
    source: str

    def __str__(self) -> str:
        return f"{self.value:,.4g} {self.unit} ({self.source})"


class Chip(NamedTuple):
    """What one JAX device of a kind can do.

    kinds: what `device.device_kind` says.  flops: products in bfloat16, dense; in float16 where there are none (Volta,
    Turing).  hbm: memory; usable: what the compiler
    lets a program have of it, where that is known.  link: of ICI one link's share of the device, one way; of NVLink all
    of a GPU's, one way.  dimensions: of the torus of links; 0 where a switch connects all devices.
    """

    name: str
    kinds: tuple[str, ...]
    flops: Constant
    hbm: Constant
    usable: Constant | None
    bandwidth: Constant
    link: Constant
    dimensions: int
    devices_per_chip: int = 1
    pod: int = 0  # most chips of a TPU that are connected by ICI
    libtpu: str = ""  # what libtpu calls it in the name of a topology
    options: tuple[tuple[str, str], ...] = ()  # of libtpu, without which a device would not be what it is in JAX

    @property
    def constants(self) -> dict[str, Constant]:
        """Every constant by what it is, for a plan to print."""
        named = {
            "bfloat16 products": self.flops,
            "memory": self.hbm,
            "memory that a program may use": self.usable,
            "memory bandwidth": self.bandwidth,
            "link, one way": self.link,
        }
        return {name: constant for name, constant in named.items() if constant is not None}


_BOOK = "How to Scale Your Model, chapter 2, TPU Specs"  # Austin et al. 2025, jax-ml.github.io/scaling-book
_COMPILER = "libtpu 0.0.52, where it refuses a program that is too large"


def _flops(tera: float, source: str) -> Constant:
    return Constant(tera * 1e12, "FLOP/s", source)


def _hbm(gib: float, source: str) -> Constant:
    return Constant(gib * 2**30, "bytes", source)


def _rate(giga: float, source: str) -> Constant:
    return Constant(giga * 1e9, "bytes/s", source)


def _docs(page: str) -> str:
    return f"Google Cloud TPU documentation, page {page}"


def _sheet(name: str) -> str:
    return f"NVIDIA {name} datasheet"


_HALF = f"{_docs('TPU7x (Ironwood)')}, half of the chip"
_LINKS = "Jouppi et al. 2020, A domain-specific supercomputer for training deep neural networks, half of a link"


def _gpu(
    name: str, kinds: tuple[str, ...], tera: float, gib: float, giga: float, link: float, sheet: str, note: str = ""
) -> Chip:
    """A GPU; `link` is in GB/s both ways, as NVIDIA gives it."""
    source = _sheet(sheet)
    return Chip(
        name=name,
        kinds=kinds,
        flops=_flops(tera, source + note),
        hbm=_hbm(gib, source),
        usable=None,
        bandwidth=_rate(giga, source),
        link=_rate(link / 2, f"{source}: {link:,.0f} GB/s both ways"),
        dimensions=0,
    )


_SPARSE = ", half of the figure with sparsity"
_FP16 = ", in float16: the chip has no products in bfloat16"
CHIPS = (
    Chip(
        name="v2",
        kinds=("TPU v2",),
        flops=_flops(45 / 2, f"{_docs('TPU v2')}, half of the chip"),
        hbm=_hbm(16 / 2, f"{_docs('TPU v2')}, half of the chip"),
        usable=None,
        bandwidth=_rate(700 / 2, f"{_docs('TPU v2')}, half of the chip"),
        link=_rate(496 / 8 / 2, _LINKS),
        dimensions=2,
        devices_per_chip=2,
        pod=256,
    ),
    Chip(
        name="v3",
        kinds=("TPU v3",),
        flops=_flops(123 / 2, f"{_docs('TPU v3')}, half of the chip"),
        hbm=_hbm(32 / 2, f"{_docs('TPU v3')}, half of the chip"),
        usable=None,
        bandwidth=_rate(900 / 2, f"{_docs('TPU v3')}, half of the chip"),
        link=_rate(656 / 8 / 2, _LINKS),
        dimensions=2,
        devices_per_chip=2,
        pod=1024,
    ),
    Chip(
        name="v4",
        kinds=("TPU v4",),
        flops=_flops(275, _docs("TPU v4")),
        hbm=_hbm(32, _docs("TPU v4")),
        usable=_hbm(30.75, _COMPILER),
        bandwidth=_rate(1200, _docs("TPU v4")),
        link=_rate(45, _BOOK),
        dimensions=3,
        pod=4096,
        libtpu="v4",
        options=(("chip_config_name", "megacore"),),  # by default libtpu gives two devices a chip
    ),
    Chip(
        name="v5e",
        kinds=("TPU v5 lite", "TPU v5e"),
        flops=_flops(197, _docs("TPU v5e")),
        hbm=_hbm(16, _docs("TPU v5e")),
        usable=_hbm(15.75, _COMPILER),
        bandwidth=_rate(819, _docs("TPU v5e")),
        link=_rate(45, _BOOK),
        dimensions=2,
        pod=256,
        libtpu="v5e",
    ),
    Chip(
        name="v5p",
        kinds=("TPU v5", "TPU v5p"),
        flops=_flops(459, _docs("TPU v5p")),
        hbm=_hbm(95, _docs("TPU v5p")),
        usable=_hbm(95.73, _COMPILER),
        bandwidth=_rate(2765, _docs("TPU v5p")),
        link=_rate(90, _BOOK),
        dimensions=3,
        pod=8960,
        libtpu="v5p",
    ),
    Chip(
        name="v6e",
        kinds=("TPU v6 lite", "TPU v6e"),
        flops=_flops(918, _docs("TPU v6e")),
        hbm=_hbm(32, _docs("TPU v6e")),
        usable=_hbm(31.24, _COMPILER),
        bandwidth=_rate(1638, _docs("TPU v6e")),
        link=_rate(90, _BOOK),
        dimensions=2,
        pod=256,
        libtpu="v6e",
    ),
    Chip(
        name="7x",
        kinds=("TPU7x",),
        flops=_flops(2307 / 2, _HALF),
        hbm=_hbm(192 / 2, _HALF),
        usable=_hbm(94.74, _COMPILER),
        bandwidth=_rate(7380 / 2, _HALF),
        link=_rate(1200 / 12 / 2, f"{_HALF}: 1,200 GB/s over 6 links and both ways"),
        dimensions=3,
        devices_per_chip=2,
        pod=9216,
        libtpu="tpu7x",
    ),
    _gpu("A100-40", ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"), 312, 40, 1555, 600, "A100"),
    _gpu("A100-80", ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"), 312, 80, 2039, 600, "A100"),
    _gpu("A100-PCIe-40", ("NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB"), 312, 40, 1555, 64, "A100"),
    _gpu("A100-PCIe-80", ("NVIDIA A100 80GB PCIe", "NVIDIA A100-PCIE-80GB"), 312, 80, 1935, 64, "A100"),
    _gpu("H100", ("NVIDIA H100 80GB HBM3",), 989, 80, 3350, 900, "H100", f", SXM{_SPARSE}"),
    _gpu("H100-PCIe", ("NVIDIA H100 PCIe",), 756, 80, 2000, 128, "H100", f", PCIe{_SPARSE}"),
    _gpu("H100-NVL", ("NVIDIA H100 NVL",), 835, 94, 3900, 600, "H100", f", NVL{_SPARSE}"),
    _gpu("H200", ("NVIDIA H200",), 989, 141, 4800, 900, "H200", f", SXM{_SPARSE}"),
    _gpu("H200-NVL", ("NVIDIA H200 NVL",), 835, 141, 4800, 900, "H200", f", NVL{_SPARSE}"),
    _gpu("GH200", ("NVIDIA GH200 480GB", "NVIDIA GH200 120GB"), 990, 96, 4000, 900, "GH200", _SPARSE),
    _gpu("GH200-144", ("NVIDIA GH200 144G HBM3e",), 990, 144, 4900, 900, "GH200", _SPARSE),
    _gpu("B200", ("NVIDIA B200",), 2250, 180, 8000, 1800, "DGX B200", f", an eighth{_SPARSE}"),
    _gpu("GB200", ("NVIDIA GB200",), 2500, 186, 8000, 1800, "GB200 NVL72", f", a GPU's share{_SPARSE}"),
    _gpu("L4", ("NVIDIA L4",), 121, 24, 300, 64, "L4", _SPARSE),
    _gpu("L40", ("NVIDIA L40",), 181, 48, 864, 64, "L40"),
    _gpu("L40S", ("NVIDIA L40S",), 362, 48, 864, 64, "L40S"),
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
TPUS = {chip.name: chip for chip in CHIPS if chip.libtpu}
_OTHER_NAMES = {"tpu7x": "7x", "v7x": "7x", "v5litepod": "v5e"}

# What can be rented, and single chips.  libtpu takes other shapes too, and divides by zero on some.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4")  # of three dimensions, below a cube of 4x4x4


def find(kind: str) -> Chip | None:
    """The chip whose `device.device_kind` this is; None for those that are not in the table (CPUs, other GPUs)."""
    return next((chip for chip in CHIPS if kind in chip.kinds), None)


def without_rates(kind: str, platform: str) -> str:
    """Returns a sentence for the log where an accelerator is not in the table, else an empty text."""
    if platform == "cpu" or find(kind):
        return ""
    return (
        f"the peak of {kind!r} is not known, so that no share of it (MFU) is shown; "
        f"known are {', '.join(chip.name for chip in CHIPS)}"
    )


# What a product of float32 matrices is on a device at the default precision of XLA, by the device's platform.
_DEFAULT_FLOAT32 = {
    "tpu": "in one pass of bfloat16 (8 bits)",
    "gpu": "in TensorFloat32 (11 bits) where there are units for it",
}


def precision_of(dtype: str, precision: str, platform: str) -> str:
    """Returns a sentence for the log about products of float32 matrices, where they are not float32; else nothing."""
    if dtype != "float32" or platform not in _DEFAULT_FLOAT32 or precision == "highest":
        return ""
    how = _DEFAULT_FLOAT32[platform] if precision == "default" else _HIGH_FLOAT32[platform]
    return (
        f"compute_dtype is float32, and products of matrices are computed {how} on this {platform.upper()}; "
        f"set --matmul-precision highest for float32"
    )


_HIGH_FLOAT32 = {"tpu": "in three passes of bfloat16 (about 16 bits)", "gpu": _DEFAULT_FLOAT32["gpu"]}


def known() -> list[str]:
    """What topologies there are, a line for each kind of TPU."""
    lines = []
    for chip in TPUS.values():
        cubes = f"or multiples of 4 in all three, at most {chip.pod:,} chips, such as 4x4x8"
        shapes = " ".join(_FLAT) if chip.dimensions == 2 else f"{' '.join(_SMALL)} {cubes}"
        lines.append(f"{chip.name}: {shapes}")
    return lines


def parse(name: str) -> tuple[Chip, tuple[int, ...]]:
    """The chip and the shape, in chips, of a topology such as `v5e:4x4`.  Raises UserError where there is none."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name.strip().lower())
    every = "\n  ".join(known())
    if not found:
        raise UserError(f"the topology {name!r} is not of the form CHIP:SHAPE, such as v5e:4x4; there are:\n  {every}")
    chip = TPUS.get(_OTHER_NAMES.get(found[1], found[1]))
    if chip is None:
        raise UserError(f"the topology {name!r} is of an unknown chip{perhaps(found[1], TPUS)}; there are:\n  {every}")
    shape = tuple(int(size) for size in found[2].split("x"))
    small = _FLAT if chip.dimensions == 2 else _SMALL
    turned = {tuple(sorted(int(size) for size in s.split("x"))) for s in small}
    cubes = chip.dimensions == len(shape) == 3 and all(size and size % 4 == 0 for size in shape)
    if len(shape) != chip.dimensions or not (tuple(sorted(shape)) in turned or cubes) or math.prod(shape) > chip.pod:
        own = next(line for line in known() if line.startswith(f"{chip.name}:"))
        raise UserError(f"the topology {name!r} has a shape that there is not; there are {own}")
    return chip, shape


def rings(chip: Chip, shape: tuple[int, ...]) -> tuple[bool, ...]:
    """Whether the links of each dimension close to a ring, in which a collective may send both ways (source: as TPU
    Networking in chapter 2 of How to Scale Your Model): of 16 chips on v5e and v6e, of whole cubes on the others."""
    if chip.dimensions == 2:
        return tuple(size == 16 for size in shape)
    return (all(size % 4 == 0 for size in shape),) * len(shape)


# What a program that plans for a TPU sets, before JAX looks for devices.  Without the first, it would look for a TPU
# here; without the second it warns that it cannot read, without a TPU, what an earlier plan left in the cache.
SETTINGS: dict[str, Any] = {"jax_platforms": "cpu", "jax_enable_compilation_cache": False}
_LOADING = {  # read when libtpu is loaded
    "TPU_SKIP_MDS_QUERY": "1",  # ask no server of Google Cloud what machine this is
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of a machine; any will do, and without it and the next libtpu complains
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no lock: other processes of this machine may plan, or train, at the same time
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@contextmanager
def _loading() -> Iterator[None]:
    """Sets what libtpu reads when it is loaded, unless the user has, and leaves the environment as it was."""
    added = {name: value for name, value in _LOADING.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def topology(name: str) -> list[Any]:
    """The devices of a TPU topology such as `v5e:4x4`, for the TPU's compiler; no TPU is needed, nor looked for.

    In libtpu's order: host by host, each a square of 2 x 2 chips; on TPU7x the two devices of a chip are neighbours.
    Raises UserError for an unknown topology, and where libtpu is not installed.
    """
    chip, shape = parse(name)
    if not os.environ.get("TPU_LIBRARY_PATH") and find_spec("libtpu") is None:
        raise UserError(
            f"the topology {name!r} needs the TPU's compiler, and libtpu is not installed; "
            f"install it with pip install 'jaxlm[plan]' (Linux only)"
        )
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    said = f"{chip.libtpu}:{'x'.join(map(str, shape))}"
    try:
        with _loading():
            found = topologies.get_topology_desc(platform="tpu", topology_name=said, **dict(chip.options)).devices
    except JaxRuntimeError as error:
        raise RunError(f"libtpu does not give the topology {said}: {error}") from error
    assert len(found) == math.prod(shape) * chip.devices_per_chip, f"{said} has {len(found)} devices"
    return list(found)
