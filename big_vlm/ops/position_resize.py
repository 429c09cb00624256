"""Learned position embeddings at another resolution: the three published algorithms.

All of them are separable: a matrix [new, old] along the rows of the grid and one along its columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


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
    return _resize(posemb, new_grid, _align_corners)


def bicubic(posemb: jax.Array, new_grid: tuple[int, int]) -> jax.Array:
    """Bicubic resize with a = -0.75, half-pixel centres and no antialias, as Hugging Face's SigLIP does it
    (`torch.nn.functional.interpolate`). Arguments, result and errors as `bilinear`'s.
    """
    return _resize(posemb, new_grid, _cubic)


def antialiased(posemb: jax.Array, new_grid: tuple[int, int]) -> jax.Array:
    """Bilinear resize with half-pixel centres and a low-pass before shrinking, as NaFlex does it for every image
    (SigLIP 2, arXiv 2502.14786, section 2.4.2; `jax.image.resize`). Arguments, result and errors as `bilinear`'s.
    """
    return _resize(posemb, new_grid, _triangle)


def antialiased_each(posemb: jax.Array, grids: jax.Array, length: int) -> jax.Array:
    """`antialiased`, for every image of a batch to a grid of its own, under `jax.jit`.

    Args:
      posemb: float [S, S, D].
      grids: int32 [B, 2], rows and columns; at least 1, and at most `length` patches in all.
      length: N, slots of a row.

    Returns:
      [B, N, D] in the dtype of `posemb`, row by row; slots that a grid leaves over repeat the first.
    """
    side, slot = posemb.shape[0], jnp.arange(length)
    rows, columns = grids[:, :1], grids[:, 1:]
    slot = jnp.where(slot < rows * columns, slot, 0)

    def weights(at, new):
        """`_triangle`'s rows `at` [B,N] for `new` [B,1] samples: [B,N,S]."""
        scale = side / new.astype(jnp.float32)
        centre = (at + 0.5) * scale - 0.5
        distance = jnp.abs(centre[..., None] - jnp.arange(side)) / jnp.maximum(scale, 1.0)[..., None]
        near = jnp.maximum(0.0, 1.0 - distance)
        return near / jnp.sum(near, axis=-1, keepdims=True)

    both = weights(slot // columns, rows)[..., :, None] * weights(slot % columns, columns)[..., None, :]
    resized = jnp.einsum('BNyx,yxD->BND', both, posemb.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return resized.astype(posemb.dtype)


RESIZES: dict[str, Callable[[jax.Array, tuple[int, int]], jax.Array]] = {
    'bilinear': bilinear,
    'bicubic': bicubic,
    'antialiased': antialiased,
}


def _resize(posemb, new_grid, weights):
    side = math.isqrt(posemb.shape[1])
    if side * side != posemb.shape[1]:
        raise ValueError(f'position embedding of {posemb.shape[1]} patches is not a square grid')
    height, width = new_grid
    if (height, width) == (side, side):
        return posemb
    grid = posemb.astype(jnp.float32).reshape(side, side, -1)
    rows, columns = (jnp.asarray(weights(side, n), jnp.float32) for n in new_grid)
    grid = jnp.einsum('hi,wj,ijD->hwD', rows, columns, grid, precision=jax.lax.Precision.HIGHEST)
    return grid.reshape(1, height * width, -1).astype(posemb.dtype)


def _align_corners(old: int, new: int) -> np.ndarray:
    """[new, old] linear interpolation whose first and last samples are the old ones."""
    at = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0.0)
    return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(old)[None, :]))


def _centres(old: int, new: int) -> np.ndarray:
    """Where the centres of the new samples lie between those of the old."""
    return (np.arange(new) + 0.5) * old / new - 0.5


def _cubic(old: int, new: int) -> np.ndarray:
    """[new, old] cubic convolution (Keys 1981) of the four nearest samples; beyond the border its sample repeats."""
    a, at = -0.75, _centres(old, new)
    weights = np.zeros((new, old))
    for tap in (-1, 0, 1, 2):
        index = np.floor(at) + tap
        x = np.abs(at - index)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        np.add.at(weights, (np.arange(new), np.clip(index, 0, old - 1).astype(int)), np.where(x <= 1, near, far))
    return weights


def _triangle(old: int, new: int) -> np.ndarray:
    """[new, old] linear interpolation, as wide as a new sample when there are fewer of them; rows sum to one."""
    reach = max(old / new, 1.0)
    distance = np.abs(_centres(old, new)[:, None] - np.arange(old)[None, :]) / reach
    weights = np.maximum(0.0, 1.0 - distance)
    return weights / weights.sum(axis=1, keepdims=True)
