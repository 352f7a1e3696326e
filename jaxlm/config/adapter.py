"""Config of adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxlm.config.ranges import AboveZero, Config, Count, Name, ShareBelowOne


@dataclass(frozen=True)
class AdapterConfig(Config):
    """Trains low-rank updates of frozen projections and the head of the task, instead of all parameters (LoRA)."""

    rank: Count = 0  # rank of the updates; 0: no adapter, all parameters are trained
    alpha: AboveZero = 16.0  # factor of the updates, divided by the rank (rslora: by its square root)
    # Parts of the paths of the projections with an update, separated by commas, such as query,value or mlp.
    targets: Name = "all"  # projections with an update; all: every projection of every layer
    kind: Literal["lora", "rslora", "dora"] = "lora"  # dora also trains the norm of each output (Liu et al. 2024)
    dropout: ShareBelowOne = 0.0  # dropout rate of the inputs of the updates
    biases: Literal["none", "adapted", "all"] = "none"  # trained biases: none, of projections with an update, all
    # How the projections with an update are stored; nf4 and int4 take an eighth of the memory (QLoRA).
    base: Literal["float32", "bfloat16", "int8", "int4", "nf4", "fp8"] = "float32"  # format of the frozen projections
    group: Count = 64  # inputs that share a scale in a quantised base; 0: all inputs of an output


NO_ADAPTER = AdapterConfig()
