"""Reading and editing the activations of a model, and steering it by vectors.

The sites are described in `jaxlm.nn.sites`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.config.arguments import check_model
from jaxlm.config.ranges import Count, check_argument, short_repr
from jaxlm.errors import UserError, suggestion
from jaxlm.lm import LM
from jaxlm.nn.sites import PARTS, Edit, Site, layers_with, stacks_of


def with_edit(lm: LM, edit: Edit | None) -> LM:
    """Returns the model with a function that edits its activations, in calls, generation, predictions and training.

    The function is traced, and `layer` is a traced integer where layers are scanned. So it selects layers with
    `jnp.where(layer == 3, new, value)`, and sites with `if site.part == "mlp"`. Saved files do not contain it.

    Args:
      lm: the model.
      edit: (site, layer, value) -> value of the same shape, a pure function; None: no edit.
    """
    check_model("lm", lm)
    if edit is not None and not callable(edit):
        raise UserError(f"edit is {short_repr(edit)}; give a function (site, layer, value) -> value, or None")
    return dataclasses.replace(lm, module=lm.module.clone(edit=edit))


def steer(lm: LM, vector_D: Any, layer: int, *, part: str = "residual", stack: str | None = None) -> LM:
    """Returns the model with a vector added to its activations at one site of one layer, at every position.

    Args:
      lm: the model; an edit that it already has is applied first.
      vector_D: the vector; for the part "heads", [H, C].
      layer: the number of the layer, from 0.
      part: a name in `jaxlm.nn.sites.PARTS`.
      stack: "encoder" or "decoder"; None: the decoder of an encoder-decoder, else the only stack.

    Raises:
      UserError: for an unknown site or layer, and for a vector of another shape.

    Source: Turner et al. 2023, Activation Addition.
    """
    check_model("lm", lm)
    site = check_site(lm.config, part, stack)
    layer = check_layer(lm.config, site, layer)
    vector = np.asarray(vector_D, np.float32)
    shape = width_of(lm.config, site)
    if vector.shape != shape:
        raise UserError(f"vector_D has shape {vector.shape}; the part {part!r} of this model requires {shape}")
    if not np.isfinite(vector).all():
        raise UserError("vector_D contains NaN or infinity; give finite numbers")
    before = lm.module.edit

    def add(at: Site, n: Any, value: jax.Array) -> jax.Array:
        value = value if before is None else before(at, n, value)
        if at != site:
            return value
        return jnp.where(jnp.equal(n, layer), value + vector.astype(value.dtype), value)

    return with_edit(lm, add)


def check_site(config: ModelConfig, part: str, stack: str | None = None) -> Site:
    """Returns the site with these names.

    Raises:
      UserError: for a name that the model does not have.
    """
    stacks = stacks_of(config)
    part = check_argument("part", part, str)
    stack = stacks[-1] if stack is None else check_argument("stack", stack, str)
    if stack not in stacks:
        raise UserError(f"stack is {stack!r}; the model has {' and '.join(stacks)}")
    if part not in PARTS:
        raise UserError(f"part is {part!r}{suggestion(part, PARTS)}")
    found = layers_with(config, stack)
    if part not in found:
        raise UserError(f"part is {part!r}, which no layer of the {stack} has; choose one of {', '.join(found)}")
    return Site(stack, part)


def check_layer(config: ModelConfig, site: Site, layer: int) -> int:
    """Returns the number of a layer. Raises UserError where the layer does not have the site."""
    layer = check_argument("layer", layer, Count)
    layers = layers_with(config, site.stack)[site.part]
    if layer not in layers:
        raise UserError(f"layer is {layer}; the layers with the part {site.part!r} are {number_ranges(layers)}")
    return layer


def number_ranges(numbers: Sequence[int]) -> str:
    """Returns ascending numbers for a reader: `0 to 11` if they have no gaps, else all of them."""
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    return ", ".join(map(str, numbers))


def width_of(config: ModelConfig, site: Site) -> tuple[int, ...]:
    """Returns the shape of the value of one token at a site."""
    own = config.decoder_config if site.stack == "decoder" else config
    if site.part in ("heads", "cross_heads"):
        latent = "latent" in own.mixer_pattern and site.part == "heads"
        return own.heads, (own.value_C if latent else own.C)
    return (own.width,)
