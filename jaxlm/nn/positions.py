"""How order enters: learned, sinusoidal or rotary positions, each a function of `positions_BT`.

Positions are those inside the example, not in the row, so that packed examples see what they would see alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def _angles(positions_BT: jax.Array, width: int, base: float) -> jax.Array:
    """`positions / base^(2i / width)` for i in [0, width / 2): [B, T, width / 2], float32."""
    frequencies = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    return positions_BT[..., None].astype(jnp.float32) * frequencies


def sinusoidal(positions_BT: jax.Array, width: int, base: float) -> jax.Array:
    """Fixed embeddings [B, T, width]: sines of even, cosines of odd dimensions (Vaswani et al. 2017, section 3.5)."""
    angles = _angles(positions_BT, width, base)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1).reshape(*positions_BT.shape, width)


def rotary(x_BTHC: jax.Array, positions_BT: jax.Array, base: float) -> jax.Array:
    """Turns the pairs (i, i + C/2) of each head by angles that grow with the position (Su et al. 2021).

    The halves convention is that of Hugging Face's Llama files, so that no weights need permuting.
    """
    angles = _angles(positions_BT, x_BTHC.shape[-1], base)[:, :, None, :]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    a, b = jnp.split(x_BTHC.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTHC.dtype)
