"""Chapters about attention weights."""

from __future__ import annotations

from typing import Any

from jaxlm.explain.attention import (
    MAX_FLOW_TOKENS,
    AttentionWeights,
    attention_weights,
    check_attention,
    cross_rollout,
    flow,
    rollout,
)
from jaxlm.explain.examples import head_of
from jaxlm.explain.request import Request, Result
from jaxlm.reports.pages import Chapter
from jaxlm.reports.pictures import AttentionMap, HeadGrid
from jaxlm.reports.tables import ScoredText

ATTENDING = "tokens that attend", "tokens that they attend to"  # labels of the sides of a map
STATES = "last hidden states", "tokens of the text"
FLOW_TOKENS = 64  # a longer text has no chapter about flow, which would take longer than everything else

_CAUTION = (
    "Attention weights show where a head reads, not what the prediction depends on: other weights can lead to the same "
    "prediction (Jain & Wallace 2019). Compare them with the attributions."
)
_ROLLOUT = (
    "Rollout multiplies the weights of the layers, averaged over the heads and with the identity for the residual "
    "connections: it estimates how much of each token is in each last hidden state (Abnar & Zuidema 2020). Flow is the "
    "maximum flow through the same network to one hidden state."
)


def check(request: Request) -> None:
    """Raises UserError for a model without attention, and for a layer or a head that does not exist."""
    check_attention(request.lm, request.layer, request.head)


def run(request: Request) -> Result:
    """Returns the maps of all heads, the map of the chosen head, rollout and flow."""
    named: dict[str, Any] = {"new_tokens": request.new_tokens, "task": request.task}
    if head_of(request.lm) == "lm":
        named["target"] = request.target
    stacks = attention_weights(request.lm, request.text, **named)
    sections: list[Any] = []
    for stack in stacks:
        sections += [head_grid(stack), attention_map(stack, request.layer, request.head)]
    chapters = [Chapter("Attention", [_CAUTION], sections)]
    combined, numbers = _combined(request, stacks)
    chapters.append(Chapter("Attention over all layers", [_ROLLOUT], combined))
    arrays = {f"{stack.name}_LHTS": stack.weights_LHTS for stack in stacks}
    return Result(chapters, numbers, arrays=arrays)


def head_grid(stack: AttentionWeights) -> HeadGrid:
    """Returns small maps of all layers and heads, for a page or a notebook."""
    return HeadGrid(f"All heads: {stack.name}", stack.weights_LHTS, stack.layers)


def attention_map(stack: AttentionWeights, layer: int | None = None, head: int | None = None) -> AttentionMap:
    """Returns a large map of one layer, for a page or a notebook.

    Args:
      stack: the weights.
      layer: the number of the layer; None: the last one.
      head: the number of the head; None: the mean of all heads.
    """
    row = stack.layers.index(layer) if layer in stack.layers else -1
    weights_HTS = stack.weights_LHTS[row]
    weights_TS = weights_HTS.mean(0) if head is None else weights_HTS[head]
    which = "mean of the heads" if head is None else f"head {head}"
    title = f"{stack.name}: layer {stack.layers[row]}, {which}"
    return AttentionMap(title, weights_TS, stack.written, stack.read, ATTENDING)


def _combined(request: Request, stacks: tuple[AttentionWeights, ...]) -> tuple[list[Any], dict[str, Any]]:
    """Returns the pictures and the numbers of rollout and flow."""
    by_name = {stack.name: stack for stack in stacks}
    first = stacks[0]
    total_TS = rollout(first.weights_LHTS)
    sections: list[Any] = [AttentionMap(f"Rollout: {first.name}", total_TS, first.written, first.read, STATES)]
    numbers: dict[str, Any] = {"rollout": total_TS.tolist()}
    if "cross-attention" in by_name:
        cross, own = by_name["cross-attention"], by_name["decoder"]
        total_TX = cross_rollout(own.weights_LHTS, cross.weights_LHTS, total_TS)
        of_source_TS = total_TX[:, len(cross.written) :]
        sections.append(
            AttentionMap("Rollout: decoder over the source", of_source_TS, cross.written, cross.read, STATES)
        )
        numbers["cross_rollout"] = total_TX.tolist()
    if len(first.written) <= min(FLOW_TOKENS, MAX_FLOW_TOKENS):
        token = len(first.written) - 1 if request.lm.config.structure == "decoder" else 0
        flow_T = flow(first.weights_LHTS, token)
        title = f"Flow to the last hidden state of {first.written[token].strip()!r}"
        sections.append(ScoredText(title, first.read, tuple(flow_T.tolist()), "A darker token has a larger flow."))
        numbers["flow"] = {"token": token, "flow": flow_T.tolist()}
    return sections, numbers
