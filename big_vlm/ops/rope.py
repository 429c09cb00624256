"""Rotary position embedding, split-half form."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def frequencies(head_dim: int, base: float = 10_000.0, scale: float = 1.0) -> jax.Array:
    """float32 [H/2], the angle that pair i turns by from one position to the next: base^(-2i/H) / scale.

    The longest wavelength is about 2 pi base scale (RoFormer, arXiv 2104.09864, section 3.2; a scale above 1 is
    position interpolation, arXiv 2306.15595).
    """
    half = head_dim // 2
    return base ** (-jnp.arange(half, dtype=jnp.float32) / half) / scale


def rope(x: jax.Array, position: jax.Array, base: float = 10_000.0) -> jax.Array:
    """`rotate` by the frequencies of `base`."""
    return rotate(x, position, frequencies(x.shape[-1], base))


def rotate(x: jax.Array, position: jax.Array, frequency: jax.Array) -> jax.Array:
    """Rotates the pair (x[i], x[i + H/2]) by position * frequency[i].

    Queries and keys rotated so have inner products that depend on the difference of their positions alone.

    Args:
      x: float [B, T, N, H], H even.
      position: int32 [B, T].
      frequency: float32 [H/2], from `frequencies`.

    Returns:
      The dtype and shape of `x`; angles and rotation are float32.
    """
    angle = position[..., None, None].astype(jnp.float32) * frequency  # [B, T, 1, H/2]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
