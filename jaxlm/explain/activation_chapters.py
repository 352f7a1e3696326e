"""Chapters about activations: the logit lens, and patching between two texts."""

from __future__ import annotations

from jaxlm.errors import UserError
from jaxlm.explain.lens import LogitLens, check_lens_head, logit_lens
from jaxlm.explain.patching import Grid, Patching, patch, read_contrast
from jaxlm.explain.request import Request, Result
from jaxlm.reports.pages import Chapter
from jaxlm.reports.pictures import ValueMap

_LENS = (
    "The head of the model reads the hidden states after each layer as if the layer was the last one. Row 0 belongs to "
    "the embeddings, the last row to the output. Earlier layers may write in another basis, so that an unlikely token "
    "does not mean that the layer lacks the information (nostalgebraist 2020)."
)
_PATCHING = (
    "The model reads the corrupted text, with one activation replaced by that of the clean text. The value is the "
    "fraction of the difference between the texts that this restores: 0 is the corrupted text, 1 the clean one. "
    "A small value does not mean that an activation has no part in the prediction: another one may replace it "
    "(Wang et al. 2023)."
)


def check_lens(request: Request) -> None:
    """Raises UserError for a model without a head over the vocabulary."""
    check_lens_head(request.lm)


def run_lens(request: Request) -> Result:
    """Returns the maps of the logit lens."""
    lens = logit_lens(request.lm, request.text, request.target if request.lm.config.structure != "encoder" else None)
    numbers = {"tokens": list(lens.pieces), "words": lens.words_LT, "probability": lens.probability_LT.tolist()}
    numbers |= {"kl": lens.kl_LT.tolist(), "rank": lens.rank_LT.tolist()}
    last = [words[-1].strip() for words in lens.words_LT]
    lines = ["lens    the most likely token after each layer at the last position: " + " ".join(map(repr, last))]
    return Result([Chapter("The logit lens", [_LENS], lens_maps(lens))], numbers, lines)


def lens_maps(lens: LogitLens) -> list[ValueMap]:
    """Returns the most likely tokens by layer and position, and the divergence from the output."""
    rows = tuple(map(str, range(len(lens.words_LT))))
    sides = "layer", "tokens that the model reads"
    probable = ValueMap(
        "The most likely token",
        lens.probability_LT,
        rows,
        lens.pieces,
        sides,
        "Probability of the token",
        lens.words_LT,
    )
    unit = "KL divergence of the distribution from that of the output, in nats"
    return [probable, ValueMap("Divergence from the output", lens.kl_LT, rows, lens.pieces, sides, unit)]


def check_patching(request: Request) -> None:
    """Raises UserError without a second text of the same length, and for unknown answers."""
    if request.corrupted is None:
        raise UserError(
            "patching requires a corrupted text with as many tokens as the text; give one with --corrupted TEXT"
        )
    read_contrast(request.lm, request.text, request.corrupted, request.answers)


def run_patching(request: Request) -> Result:
    """Returns a map of each site."""
    result = patch(request.lm, request.text, request.corrupted, request.answers)
    numbers = {
        "answers": result.answers,
        "clean": result.clean,
        "corrupted": result.corrupted,
        "tokens": {stack: list(pieces) for stack, pieces in result.pieces.items()},
        "restored": {f"{grid.site.stack}.{grid.site.part}": grid.restored.tolist() for grid in result.grids},
    }
    first, second = result.answers
    line = f"logit of {first!r} minus {second!r}: {result.clean:.3f} clean, {result.corrupted:.3f} corrupted"
    maps = [patching_map(result, grid) for grid in result.grids]
    return Result([Chapter("Activation patching", [_PATCHING, line], maps)], numbers, [f"patching    {line}"])


def patching_map(result: Patching, grid: Grid) -> ValueMap:
    """Returns the map of one site of `Patching.grids`."""
    heads = grid.site.part in ("heads", "cross_heads")
    pieces = result.pieces[grid.site.stack]
    columns = tuple(map(str, range(grid.restored.shape[1]))) if heads else pieces
    title = f"{grid.site.stack}: {grid.site.part.replace('_', ' ')}"
    sides = "layer", "head" if heads else "tokens, clean | corrupted where they differ"
    return ValueMap(title, grid.restored, tuple(map(str, grid.layers)), columns, sides, "Restored fraction")
