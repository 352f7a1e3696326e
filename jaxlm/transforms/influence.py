"""The influence of each layer on the hidden states, over calibration data."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.lm import LM
from jaxlm.nn.transformer import apply
from jaxlm.transforms.calibration import BATCH_TOKENS, batches, check_tokens
from jaxlm.transforms.calibration_rows import CalibrationRows, calibration_rows


def layer_influence(
    lm: LM, texts: Any, *, length: int | None = None, max_tokens: int | None = None
) -> dict[str, np.ndarray]:
    """Returns the influence [L] of each layer, by stack: one minus the cosine similarity of its input and output.

    The similarity is the mean over tokens. Padding does not count.

    Args:
      lm: the model, dense.
      texts: strings or token ids; see `calibration_rows`.
      length: tokens in a row; None: the model's positions, 2,048 at most.
      max_tokens: number of tokens after which no further text is read; None: 262,144.

    Raises:
      UserError: for texts with fewer than 128 tokens.

    Source: Men et al. 2024, ShortGPT, equation 1.
    """
    rows = calibration_rows(lm, texts, length=length, max_tokens=max_tokens)
    check_tokens(rows, {})
    params = dict(lm.params)
    for stack in ("encoder", "decoder"):
        if "norm" in params.get(stack, {}):  # the last states are those after it, which a scale would turn
            neutral = {"scale": float(lm.config.norm != "rmsnorm_plus_one"), "bias": 0.0}
            fill = {name: jnp.full_like(leaf, neutral[name]) for name, leaf in params[stack]["norm"].items()}
            params[stack] = params[stack] | {"norm": fill}

    @jax.jit
    def similarities(params: Any, batch: CalibrationRows) -> dict[str, jax.Array]:
        inputs = batch.tokens_BT, batch.segments_BT, batch.positions_BT, None, *batch[3:]
        _, sown = apply(lm.module, params, *inputs, mutable=["states"])
        sums = {}
        for stack, found in sown["states"].items():
            states_LBTD = found["states"][0].astype(jnp.float32)
            unit_LBTD = states_LBTD / jnp.maximum(jnp.linalg.norm(states_LBTD, axis=-1, keepdims=True), 1e-12)
            is_token_BT = batch.segments[stack] > 0
            sums[stack] = (jnp.sum(unit_LBTD[1:] * unit_LBTD[:-1], -1) * is_token_BT).sum((1, 2))
        return sums

    sums: dict[str, np.ndarray] = {}
    for batch in batches(rows, BATCH_TOKENS):
        for stack, sums_L in similarities(params, batch).items():
            sums[stack] = sums.get(stack, 0.0) + np.asarray(sums_L, np.float64)
    return {stack: 1 - sums_L / (rows.segments[stack] > 0).sum() for stack, sums_L in sums.items()}
