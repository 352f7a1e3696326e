"""Random parameters for tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.hub import convert


def random_params(model: ModelConfig, std: float = 0.2) -> Any:
    """Parameters drawn by NumPy, since the initializers take seconds to compile; biases and norms are random too."""
    random = np.random.default_rng(1)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.float32(path.endswith("/scale")) + std * random.standard_normal(shape, np.float32)

    return convert.nested({path: draw(path, shape) for path, shape in convert.tree_shapes(model).items()})
