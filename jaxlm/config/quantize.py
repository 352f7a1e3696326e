"""Config of quantisation-aware training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from jaxlm.config.ranges import MAX_INT, Config, Name, Range


@dataclass(frozen=True)
class QuantizeConfig(Config):
    """Quantisation-aware training: the forward pass rounds weights to a format, in which they are exported.

    The gradient of the rounded weights is applied to the weights (straight-through).
    """

    weights: Literal["float", "int8", "int4", "nf4", "fp8"] = "float"  # format of projections; float: not rounded
    # Inputs that share a scale; -1: all inputs of an output for int8 and fp8, 64 for int4 and nf4.
    group: Annotated[int, Range(0, MAX_INT, special=(-1, "automatic"))] = -1  # 0: all inputs of an output
    symmetric: bool = True  # whether the integer 0 represents 0; if not, each group has a zero point
    inputs: Literal["float", "int8"] = "float"  # int8: round the inputs of projections too
    targets: Name = "all"  # rounded projections: all, or parts of their paths, such as mlp
