"""From uint8 pixels to the range a model was trained on, on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def to_model_range(
    images: jax.Array, value_range: tuple[float, float] = (-1.0, 1.0), dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """Maps 0..255 linearly onto `value_range`; (-1, 1) is x / 127.5 - 1.

    Args:
      images: uint8 [..., H, W, 3].
      value_range: what 0 and 255 become.
      dtype: of the result; the arithmetic is float32 whatever it is.

    Returns:
      `dtype` [..., H, W, 3].

    Raises:
      TypeError: the images are not uint8. Floats would be scaled twice without a word.
    """
    if images.dtype != jnp.uint8:
        raise TypeError(f'pixels.to_model_range takes uint8 images, got {images.dtype}')
    low, high = value_range
    return (images.astype(jnp.float32) * ((high - low) / 255.0) + low).astype(dtype)
