"""A smaller model from some layers of a larger one (Sanh et al. 2019, section 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError
from jaxlm.hub.convert import shortest
from jaxlm.lm import LM
from jaxlm.nn import parameters
from jaxlm.nn.layer_parts import layers_of_rows


def keep_layers(lm: LM, layers: tuple[int, ...], decoder_layers: tuple[int, ...] = ()) -> LM:
    """Returns a model with some layers of a model, in their order, and with all of its other parameters.

    Args:
      lm: the model.
      layers: the layers to keep, counted from 0; of an encoder-decoder, those of the encoder. (): all.
      decoder_layers: the layers to keep of the decoder of an encoder-decoder. (): all.

    Raises:
      UserError: as `select_config` does.
    """
    config = select_config(lm.config, layers, decoder_layers)
    kept = layers_by_stack(lm.config, layers, decoder_layers)

    def select(key_path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        rows = kept_rows(lm.config, parameters.path_of(key_path), len(leaf) if leaf.ndim else 0, kept)
        return leaf if rows is None else jnp.asarray(leaf)[np.array(rows, int)]

    params = jax.tree_util.tree_map_with_path(select, lm.params)
    for stack in kept:  # parameters that none of the kept layers has
        layers_of_stack = params[stack]["layers"].items()
        params[stack]["layers"] = {name: part for name, part in layers_of_stack if len(jax.tree.leaves(part)[0])}
    return dataclasses.replace(lm, config=config, module=lm.module.clone(config=config), params=params)


def kept_rows(config: ModelConfig, path: str, rows: int, kept: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """Returns the rows that a parameter keeps; None: it stays as it is.

    Args:
      config: the config of the whole model.
      path: the path of the parameter.
      rows: the size of its first axis.
      kept: the kept layers by stack, as `layers_by_stack` returns them.
    """
    chosen = kept.get(path.split("/")[0]) if parameters.is_stacked(path) else None
    if chosen is None:
        return None
    return tuple(row for row, layer in enumerate(layers_of_rows(config, path, rows)) if layer in chosen)


def layers_by_stack(
    config: ModelConfig, layers: tuple[int, ...], decoder_layers: tuple[int, ...] = ()
) -> dict[str, tuple[int, ...]]:
    """Returns the kept layers of each stack of a model that does not keep all of its layers."""
    first = "decoder" if config.structure == "decoder" else "encoder"
    return {stack: chosen for stack, chosen in ((first, layers), ("decoder", decoder_layers)) if chosen}


def select_config(config: ModelConfig, layers: tuple[int, ...], decoder_layers: tuple[int, ...] = ()) -> ModelConfig:
    """Returns the config of a model with some of its layers; () keeps all layers of a stack.

    Raises:
      UserError: for a layer that the model does not have, for layers that are not in ascending order, and for a model
        whose layers share parameters.
    """
    if decoder_layers and config.structure != "encoder_decoder":
        raise UserError(f"decoder_layers is given, but the model is a(n) {config.structure}; leave it out")
    if (config.distinct_layers or config.layers) < config.layers:
        raise UserError(
            f"the {config.layers} layers of the model share the parameters of {config.distinct_layers}; "
            f"layers of such a model cannot be selected: leave the layers out"
        )
    in_decoder = config.decoder_layers or config.layers
    for name, chosen, count in (("layers", layers, config.layers), ("decoder_layers", decoder_layers, in_decoder)):
        outside = [layer for layer in chosen if layer >= count]
        if outside or any(a >= b for a, b in zip(chosen, chosen[1:])):
            raise UserError(
                f"{name} is {', '.join(map(str, chosen))}; the model has the layers 0 to {count - 1}: give some of "
                f"them in ascending order"
            )
    chosen = layers or tuple(range(config.layers))
    if config.structure == "encoder_decoder":
        decoder = len(decoder_layers) or in_decoder
        config = dataclasses.replace(config, decoder_layers=None if decoder == len(chosen) else decoder)
    select = lambda pattern: shortest([pattern[layer % len(pattern)] for layer in chosen])
    names = [name for name in ("layer_kinds", "layer_windows", "mixers", "feed_forwards") if getattr(config, name)]
    patterns: dict[str, Any] = {name: select(getattr(config, name)) for name in names}
    return dataclasses.replace(config, layers=len(chosen), distinct_layers=None, **patterns)
