"""Learned position embeddings at another resolution."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


def _weights(old: int, new: int) -> np.ndarray:
    """[new, old] linear interpolation whose first and last samples are the old ones (align corners)."""
    at = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0.0)
    return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(old)[None, :]))


def bilinear(posemb: jax.Array, new_grid: tuple[int, int]) -> jax.Array:
    """Align-corners bilinear resize of a square grid, as big_vision does it (`scipy.ndimage.zoom`, order 1).

    Args:
      posemb: float [1, P, D], P a square number, row by row.
      new_grid: (h, w) of the new grid.

    Returns:
      [1, h * w, D] in the dtype of `posemb`.

    Raises:
      ValueError: P is no square number.
    """
    side = math.isqrt(posemb.shape[1])
    if side * side != posemb.shape[1]:
        raise ValueError(f'position embedding of {posemb.shape[1]} patches is not a square grid')
    height, width = new_grid
    if (height, width) == (side, side):
        return posemb
    grid = posemb.astype(jnp.float32).reshape(side, side, -1)
    rows, columns = (jnp.asarray(_weights(side, n), jnp.float32) for n in new_grid)
    grid = jnp.einsum('hi,wj,ijD->hwD', rows, columns, grid, precision=jax.lax.Precision.HIGHEST)
    return grid.reshape(1, height * width, -1).astype(posemb.dtype)
