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
    base: Literal["float32", "bfloat16"] = "float32"  # how frozen projections are stored


NO_ADAPTER = AdapterConfig()
