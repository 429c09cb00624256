"""Rotary position embedding, split-half form."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rope(x: jax.Array, position: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotates the pair (x[i], x[i + H/2]) by position / base^(2i/H) (RoFormer, arXiv 2104.09864, section 3.2).

    Queries and keys rotated so have inner products that depend on the difference of their positions alone.

    Args:
      x: float [B, T, N, H], H even.
      position: int32 [B, T].
      base: the longest wavelength is 2 pi base.

    Returns:
      The dtype and shape of `x`; angles and rotation are float32.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position[..., None, None].astype(jnp.float32) * frequency  # [B, T, 1, H/2]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
