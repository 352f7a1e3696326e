"""Scales of the inputs of projections that are rounded to 8 bits, from calibration data."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import UserError
from jaxlm.lm import LM
from jaxlm.nn.quantized import round_inputs
from jaxlm.transforms.calibration import LayerInputs, check_tokens, reduce_inputs
from jaxlm.transforms.calibration_rows import calibration_rows

# Scales that are tried, as fractions of the scale of the largest input: steps of about 19%, down to 1/16.
FRACTIONS = tuple(2.0 ** (-n / 4) for n in range(17))


def input_scales(lm: LM, texts: Any, paths: Collection[str]) -> dict[str, jax.Array]:
    """Returns for each projection the scale of int8 inputs with the smallest squared error on calibration data.

    The smallest squared error is better than the largest input for a decoder with a few very large inputs (SmolLM2),
    and equal for an encoder (MiniLM). Quantiles, and errors relative to the norm of a token, clip those large inputs,
    which a decoder requires. The model reads the data twice: first the largest input of each projection is measured,
    then the error of each fraction of its scale in `FRACTIONS`. Inputs beyond 127 times the scale are clipped.

    Args:
      lm: the model; its projections may be arrays or nodes.
      texts: strings or token ids; see `calibration_rows`.
      paths: the projections.

    Returns:
      float32 [L] by path.

    Raises:
      UserError: for texts with fewer than 128 tokens, and for a projection whose inputs in some layer are missing,
        always zero, or not finite.
    """
    rows = calibration_rows(lm, texts)
    check_tokens(rows, {})
    largest = reduce_inputs(lm, rows, paths, lambda inputs, _: _largest(inputs), jnp.maximum)
    for path in paths:
        _check(path, largest)
    errors = reduce_inputs(lm, rows, paths, _errors, jnp.add, given=largest)
    fractions = jnp.array(FRACTIONS, jnp.float32)
    return {path: largest[path] / 127 * fractions[errors[path].argmin(1)] for path in paths}


def _check(path: str, largest: dict[str, jax.Array]) -> None:
    if path not in largest:
        raise UserError(f"the model does not multiply by {path}; choose targets without it, or the inputs int8")
    largest_L = np.asarray(largest[path])
    for problem, layers in {"not finite": ~np.isfinite(largest_L), "always zero": largest_L == 0}.items():
        if layers.any():
            raise UserError(
                f"the inputs of {path} in layer {int(layers.argmax())} are {problem} on the calibration data, so that "
                f"they have no scale; give other texts, choose targets without it, or the inputs int8"
            )


def _largest(inputs: LayerInputs) -> jax.Array:
    """Returns the largest magnitude; infinity if an input is not finite, since a maximum may ignore NaN."""
    magnitude = lambda x_NI: jnp.where(jnp.isfinite(x_NI), jnp.abs(x_NI), jnp.inf)
    return jnp.stack([magnitude(x_NI).max() for x_NI in inputs.rows]).max()


def _errors(inputs: LayerInputs, largest: jax.Array) -> jax.Array:
    """Returns the sum of the squared errors of rounded inputs for each fraction of the largest scale, [F]."""

    def error(fraction: jax.Array) -> jax.Array:
        total = jnp.float32(0)
        for x_NI in inputs.rows:
            values_NI, scale = round_inputs(x_NI, "int8", largest / 127 * fraction)
            total += jnp.square(values_NI.astype(jnp.float32) * scale - x_NI).sum()
        return total

    return jax.lax.map(error, jnp.array(FRACTIONS, jnp.float32))
