"""Config of pruning while training, and the form of patterns."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jaxlm.config.ranges import Config, Name, NotNegative, Positive, ShareBelowOne
from jaxlm.errors import UserError

if TYPE_CHECKING:
    from jaxlm.config.run import OptimizerConfig

Scope = Literal["layer", "global", "output"]
MAX_GROUP = 1024  # inputs in a group of a pattern


@dataclass(frozen=True)
class PruneConfig(Config):
    """Sets weights of projections to zero while training: gradually, or the zeros of the initial weights."""

    sparsity: ShareBelowOne = 0.0  # fraction of the weights that is zero at the end; with a pattern, leave it out
    # Movement removes the weights that training moves towards zero (Sanh et al. 2020).
    method: Literal["magnitude", "movement"] = "magnitude"  # removes the smallest weights, or by movement
    scope: Scope = "layer"  # where the fraction holds: each matrix of a layer, each output, or all matrices together
    pattern: str = ""  # N:M such as 2:4: of M consecutive inputs of each output N remain; empty: none
    targets: Name = "all"  # parts of the paths of the projections, separated by commas; all: every projection
    begin: NotNegative = 0.0  # steps before the first removal; below 1: fraction of all steps
    end: NotNegative = 0.75  # steps until the last removal, before or at the end of the run; below 1: fraction
    every: Positive = 10  # steps between removals
    keep_zeros: bool = False  # keep the zeros of the initial weights, as for fine-tuning a pruned model

    @property
    def removes(self) -> bool:
        """Whether the run removes weights."""
        return bool(self.sparsity or self.pattern)

    def window(self, steps: int) -> tuple[int, int]:
        """Returns the numbers of steps before the first removal and until the last one; 0 without removals.

        Args:
          steps: number of steps of the run.

        Raises:
          UserError: if the removals do not fit into the run.
        """
        if not self.removes:
            return 0, 0
        begin, end = (round(value * steps) if value < 1 else round(value) for value in (self.begin, self.end))
        if not begin < end <= steps:
            raise UserError(
                f"prune.begin is step {begin} and prune.end is step {end}, and the run has {steps} steps; begin must "
                f"be before end, and end at most {steps}"
            )
        return begin, end

    def check(self, optimizer: OptimizerConfig, rank: int) -> None:
        """Raises UserError for a pattern that is not N:M, and if the run cannot prune all layers of its model.

        Args:
          optimizer: the optimizer of the run.
          rank: the rank of the adapter of the run; 0: none.
        """
        if self.pattern:
            implied_sparsity(self.sparsity or None, self.pattern, "prune.")
        if rank and (self.removes or self.keep_zeros):
            raise UserError(
                f"adapter.rank is {rank}, and prune is set, but an adapter does not train the projections; leave out "
                f"one of them"
            )
        if self.removes and (optimizer.freeze == "all_but_heads" or optimizer.freeze_layers):
            raise UserError(
                "prune removes weights of all layers, but the optimizer freezes some; leave out optimizer.freeze and "
                "optimizer.freeze_layers, or prune"
            )


NO_PRUNING = PruneConfig()


def parse_pattern(pattern: str, prefix: str = "") -> tuple[int, int]:
    """Returns the numbers N and M of a pattern N:M; raises UserError for other strings, which names `prefix`."""
    match = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", pattern)
    remain, group = map(int, match.groups()) if match else (0, 0)
    if not 0 < remain < group <= MAX_GROUP:
        raise UserError(f"{prefix}pattern is {pattern!r}; it must be N:M, N of M inputs remain, such as '2:4' or '4:8'")
    return remain, group


def implied_sparsity(sparsity: float | None, pattern: str, prefix: str = "") -> float:
    """Returns the fraction that a pattern removes; raises UserError if `sparsity` is given and is another one."""
    remain, group = parse_pattern(pattern, prefix)
    implied = 1 - remain / group
    if sparsity is not None and abs(sparsity - implied) > 1e-6:
        raise UserError(
            f"{prefix}sparsity is {sparsity}, but pattern {pattern} removes {implied:g}; leave out one of them"
        )
    return implied
