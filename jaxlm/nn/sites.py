"""The sites of a layer whose activations can be read and edited: its outputs, and those of its parts.

`Transformer.edit` is a pure function of a site, the number of the layer and the value, which returns the new value. The
methods of the parts of a layer are intercepted while it is traced, so that a model without an edit is unchanged, and
mixers and feed-forward layers of users have the same sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from jaxlm.config import ModelConfig
from jaxlm.nn.attention import Attention
from jaxlm.nn.block import FEED_FORWARDS, MIXERS
from jaxlm.nn.layer_parts import parts_of
from jaxlm.nn.layers import Linear

PARTS = ("residual", "attention", "cross_attention", "mlp", "heads", "cross_heads")


class Site(NamedTuple):
    """A place in every layer of a stack.

    Attributes:
      stack: "encoder" or "decoder".
      part: "residual", the hidden states after the layer [B, T, D], before the final norm of the stack; "attention",
        "cross_attention" and "mlp", the output of the mixer, of cross-attention and of the feed-forward layer
        [B, T, D], before a norm of this output; "heads" and "cross_heads", the output of each head before the output
        projection [B, T, H, C].
    """

    stack: str
    part: str


Edit = Callable[[Site, Any, jax.Array], jax.Array]


@contextmanager
def edited_layer(edit: Callable[[str, jax.Array], jax.Array] | None) -> Iterator[None]:
    """Applies a function to the values at the sites inside a `Block` while it is traced, except the residual stream.

    Args:
      edit: (part, value) -> value; None: nothing is intercepted.
    """
    if edit is None:
        yield
        return
    mixers, feed_forwards = tuple(MIXERS.values()), tuple(FEED_FORWARDS.values())

    def intercept(call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        path = module.path
        cross = path[:1] == ("cross_attention",)
        if len(path) == 2 and path[1] == "out" and isinstance(module, Linear) and isinstance(module.parent, Attention):
            return call(edit("cross_heads" if cross else "heads", args[0]), *args[1:], **kwargs)
        result = call(*args, **kwargs)
        if len(path) != 1 or not isinstance(module, mixers + feed_forwards):
            return result
        part = "mlp" if isinstance(module, feed_forwards) else "cross_attention" if cross else "attention"
        return (edit(part, result[0]), *result[1:])

    with nn.intercept_methods(intercept):
        yield


def layers_with(config: ModelConfig, stack: str) -> dict[str, tuple[int, ...]]:
    """Returns the numbers of the layers of a stack that have each part, in the order of `PARTS`.

    Args:
      config: the config of the model.
      stack: "encoder" or "decoder".
    """
    second = stack == "decoder" and config.structure == "encoder_decoder"
    count = (second and config.decoder_layers) or config.layers
    layers = parts_of(config.decoder_config if stack == "decoder" else config, count)
    has_heads = lambda own: issubclass(MIXERS[own.mixer], Attention)
    found = {
        "residual": tuple(range(count)),
        "attention": tuple(range(count)),
        "cross_attention": tuple(range(count)) if second else (),
        "mlp": tuple(n for n, own in enumerate(layers) if own.feed_forward != "none"),
        "heads": tuple(n for n, own in enumerate(layers) if has_heads(own)),
        "cross_heads": tuple(range(count)) if second else (),
    }
    return {part: numbers for part, numbers in found.items() if numbers}


def stacks_of(config: ModelConfig) -> tuple[str, ...]:
    """Returns the names of the stacks of a model."""
    return ("encoder", "decoder") if config.structure == "encoder_decoder" else (config.structure,)
