"""Flags of XLA for tests: a program that runs for milliseconds compiles several times faster without optimization."""

from __future__ import annotations

from importlib.metadata import version

FAST = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
FAST.append("--xla_cpu_parallel_codegen_split_count=1")  # the other core compiles for another worker
if tuple(map(int, version("jax").split(".")[:2])) < (0, 11):  # later versions do not have the flag
    FAST.append("--xla_cpu_use_fusion_emitters=false")
# A program compiled with these options takes the memory that it takes for users.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
if len(FAST) == 4:
    OPTIMIZED["xla_cpu_use_fusion_emitters"] = True


def xla_flags(devices: int) -> str:
    """Returns the value of XLA_FLAGS for a process with this number of CPU devices."""
    return " ".join([*FAST, f"--xla_force_host_platform_device_count={devices}"])
