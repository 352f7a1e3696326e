"""Config of the verb `compress`: how the smaller variants of a model are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from jaxlm.config.ranges import MAX_INT, Config, Count, Range, ShareBelowOne
from jaxlm.errors import UserError


@dataclass(frozen=True)
class CompressConfig(Config):
    """The steps from a model to its variants: fewer layers, heads and columns; then zeros; then fewer bits."""

    # One variant each: int8, int4, nf4, fp8, or float for weights that are not quantised; not set: float.
    weights: tuple[Literal["float", "int8", "int4", "nf4", "fp8"], ...] = ()  # formats of weights
    # -1: chosen for the format; 0: all inputs of an output.
    group: Annotated[int, Range(0, MAX_INT, special=(-1, "automatic"))] = -1  # inputs that share a scale
    symmetric: bool = True  # whether the integer 0 represents 0; if not, each group has a zero point
    # int8: round the inputs of projections too, with a scale for each token, and multiply integers. int8_static: one
    # scale for each projection, which requires --calibration.
    inputs: Literal["float", "int8", "int8_static"] = "float"  # how inputs of projections are rounded
    targets: str = "all"  # projections that are quantised and pruned: parts of their paths, such as query,value or mlp
    embeddings: bool = False  # also quantise the embeddings of tokens and the heads over tokens
    method: Literal["nearest", "gptq"] = "nearest"  # how weights are rounded; gptq requires --calibration
    sparsity: ShareBelowOne = 0.0  # fraction of the weights of projections that is set to zero
    pattern: str = ""  # N:M, such as 2:4, to keep N of M consecutive inputs; replaces --sparsity
    pruning: Literal["magnitude", "wanda", "sparsegpt"] = "magnitude"  # wanda and sparsegpt require --calibration
    layers: Count = 0  # number of layers to keep, evenly spaced; 0: all
    heads: Count = 0  # number of attention heads of each layer to keep; 0: all
    mlp: Count = 0  # width of the MLP to keep; 0: all
    calibration: str = ""  # a file of texts: one example per paragraph or line, as in training
    calibration_texts: Annotated[int, Range(1, MAX_INT)] = 1000  # number of texts that are read from it

    @property
    def quantizes(self) -> bool:
        """Whether a variant has quantised weights."""
        return bool(set(self.weights) - {"float"})

    @property
    def calibrates(self) -> bool:
        """Whether quantisation uses calibration data."""
        return self.method == "gptq" or self.inputs == "int8_static"

    @property
    def prunes(self) -> bool:
        """Whether weights are set to zero."""
        return bool(self.sparsity or self.pattern)

    @property
    def shrinks(self) -> bool:
        """Whether layers, heads or columns are removed."""
        return bool(self.layers or self.heads or self.mlp)

    def check(self) -> None:
        """Raises UserError if there is no variant, or if an option has no effect."""
        if not (self.quantizes or self.prunes or self.shrinks):
            raise UserError(
                "compress has no variants; give formats with --weights (int8, int4, nf4 or fp8), or --sparsity, "
                "--pattern, --layers, --heads or --mlp"
            )
        if self.pruning != "magnitude" and not self.prunes:
            raise UserError(f"pruning is {self.pruning!r}, but nothing is pruned; set --sparsity or --pattern")
        for name, value, default in (("method", self.method, "nearest"), ("inputs", self.inputs, "float")):
            if value != default and not self.quantizes:
                raise UserError(f"{name} is {value!r}, but nothing is quantised; set --weights")
        for weights in self.weights if self.inputs != "float" else ():
            if weights in ("nf4", "fp8"):
                raise UserError(
                    f"inputs is {self.inputs!r}, but products of integers require integer weights, not {weights}; "
                    f"set --weights int8"
                )
        if self.calibrates and not self.calibration:
            use = f"inputs is {self.inputs!r}" if self.inputs == "int8_static" else f"method is {self.method!r}"
            raise UserError(f"{use}, which requires calibration data; give a file of texts with --calibration")
        if self.calibration and not (self.calibrates or self.pruning != "magnitude" or self.shrinks):
            raise UserError(
                "calibration is given, but nothing uses it; set --method gptq, --inputs int8_static, or "
                "--pruning wanda or sparsegpt"
            )
