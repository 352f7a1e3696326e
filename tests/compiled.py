"""`jit` for tests: programs that run for milliseconds are compiled eight times faster without optimization (on CPU)."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.nn.transformer import Transformer, init

FAST = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
if jax.__version_info__ < (0, 11):  # the option is gone since
    FAST["xla_cpu_use_fusion_emitters"] = False
jit = partial(jax.jit, compiler_options=FAST) if os.environ.get("JAX_PLATFORMS") == "cpu" else jax.jit


def random_params(model: ModelConfig, std: float = 0.2) -> Any:
    """Parameters drawn by NumPy, since the initializers take seconds to compile; biases and norms are random too."""
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(partial(init, Transformer(model)), jax.random.key(0))

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return np.float32(path[-1].key == "scale") + std * random.standard_normal(leaf.shape, np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)
