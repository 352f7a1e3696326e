"""The parts of each layer of a stack, and the rows of its stacked parameters.

The layers of a stack may have different mixers and feed-forward layers (`ModelConfig.mixers`, `feed_forwards`). Each
parameter then has one row for each layer that has it, in the order of the layers. The mixer and the feed-forward layer
of `ModelConfig.mixer` and `feed_forward` are named `attention` and `mlp`; the names of others begin with their entry of
`MIXERS` or `FEED_FORWARDS`, such as `gated_mlp`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import jax

from jaxlm.config import ModelConfig, is_local

MAX_PERIOD = 16  # of layers that are compiled together


class Parts(NamedTuple):
    """The parts of a layer.

    Attributes:
      kind: the kind of its attention, an entry of `config.layer_kinds`.
      window: the window of local attention; 0 for global attention.
      mixer: its mixer, an entry of `MIXERS`.
      feed_forward: its feed-forward layer, an entry of `FEED_FORWARDS`, or none.
    """

    kind: str
    window: int
    mixer: str
    feed_forward: str

    @property
    def attention(self) -> tuple[str, int, str]:
        """What the inputs of attention depend on: kind, window and mixer."""
        return self[:3]

    @property
    def structure(self) -> tuple[str, str]:
        """What the parameters depend on: mixer and feed-forward layer."""
        return self[2:]


def parts_of(config: ModelConfig, layers: int | None = None) -> tuple[Parts, ...]:
    """Returns the parts of each layer of a stack; None: of `config.layers` layers."""
    windows = config.layer_windows or (config.window,)
    patterns = config.layer_kinds, windows, config.mixer_pattern, config.feed_forward_pattern
    layer = lambda n: Parts(*(pattern[n % len(pattern)] for pattern in patterns))
    every = map(layer, range(layers or config.layers))
    return tuple(own if is_local(own.kind) else own._replace(window=0) for own in every)


def period_of(config: ModelConfig) -> int:
    """Returns the number of layers after which kinds and windows of attention repeat."""
    return math.lcm(len(config.layer_kinds), len(config.layer_windows) or 1)


def mixer_name(config: ModelConfig, mixer: str) -> str:
    """Returns the name of a mixer in the parameters of a layer."""
    return "attention" if mixer == config.mixer else f"{mixer}_attention"


def feed_forward_name(config: ModelConfig, feed_forward: str) -> str:
    """Returns the name of a feed-forward layer in the parameters of a layer."""
    return "mlp" if feed_forward == config.feed_forward else f"{feed_forward}_mlp"


def has(config: ModelConfig, parts: Parts, name: str) -> bool:
    """Returns whether a layer with these parts has parameters below this name."""
    if name.endswith("attention") and name != "cross_attention":
        return name == mixer_name(config, parts.mixer)
    if name.endswith("mlp"):
        return name == feed_forward_name(config, parts.feed_forward)
    return not (name.startswith("mlp_") and parts.feed_forward == "none")  # its norms


def layers_of_rows(config: ModelConfig, path: str, rows: int) -> Sequence[int]:
    """Returns the layer of each row of a stacked parameter.

    If layers share parameters, the numbers are those of the distinct layers.

    Args:
      config: the model's config.
      path: the path of the parameter, such as `decoder/layers/mlp/up/kernel`.
      rows: the number of its rows.
    """
    if not config.has_mixed_layers:
        return range(rows)
    name = path.split("/")[2]
    return [n for n, parts in enumerate(parts_of(config)) if has(config, parts, name)]


def rows_between(config: ModelConfig, stacked: Any, layers: Sequence[Parts], start: int, stop: int) -> Any:
    """Returns the rows of consecutive layers of stacked parameters; parameters without rows are left out.

    Args:
      config: the model's config.
      stacked: the parameters of the layers, stacked along the first axis of each leaf.
      layers: the parts of all layers of the stack.
      start: the first layer.
      stop: the layer after the last one.
    """
    found = {}
    for name in sorted(stacked):
        first, last = (sum(has(config, parts, name) for parts in layers[:n]) for n in (start, stop))
        if first < last:
            found[name] = jax.tree.map(itemgetter(slice(first, last)), stacked[name])
    return found


def row_of(config: ModelConfig, stacked: Any, layers: Sequence[Parts], n: int) -> Any:
    """Returns the parameters of layer n of stacked parameters; the other arguments are those of `rows_between`."""
    found = {}
    for name in sorted(stacked):
        if has(config, layers[n], name):
            row = sum(has(config, parts, name) for parts in layers[:n])
            found[name] = jax.tree.map(itemgetter(row), stacked[name])
    return found


class Segment(NamedTuple):
    """Consecutive layers that repeat a pattern.

    Attributes:
      start: the first layer.
      period: number of layers in the pattern.
      cycles: number of times that it occurs.
      scanned: whether a scan applies the layers, one cycle in each iteration.
    """

    start: int
    period: int
    cycles: int
    scanned: bool

    @property
    def stop(self) -> int:
        """The layer after the last one."""
        return self.start + self.period * self.cycles


def segments_of(config: ModelConfig, start: int, stop: int) -> list[Segment]:
    """Returns the segments of consecutive layers of a stack, for which few layers are compiled."""
    if config.has_mixed_layers:
        return _shortest(parts_of(config, stop)[start:], start)
    period = period_of(config)
    cycles, rest = divmod(stop - start, period)
    found = [Segment(start, period, cycles, True)] if cycles else []
    return found + ([Segment(stop - rest, rest, 1, False)] if rest else [])


@lru_cache
def _shortest(layers: tuple[Parts, ...], start: int) -> list[Segment]:
    """Returns the segments with the smallest sum of periods."""
    L = len(layers)
    # For the layers from n on: the sum of the periods, the number of segments, and the segments.
    best: list[tuple[int, int, list[Segment]]] = [(0, 0, [])] * (L + 1)
    for n in reversed(range(L)):
        options = []
        for period in range(1, min(MAX_PERIOD, L - n) + 1):
            pattern, cycles = layers[n : n + period], 1
            while layers[n + cycles * period : n + (cycles + 1) * period] == pattern:
                cycles += 1
            total, count, later = best[n + cycles * period]
            segment = Segment(start + n, period, cycles, cycles > 1)
            options.append((total + period, count + 1, [segment, *later]))
        best[n] = min(options)
    return best[0][2]
