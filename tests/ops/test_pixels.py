"""uint8 pixels into the model's range."""

import jax.numpy as jnp
import numpy as np
import pytest

from big_vlm.ops import pixels


def test_known_values():
    images = np.array([[[[0, 51, 255]]]], np.uint8)
    np.testing.assert_allclose(pixels.to_model_range(images), [[[[-1.0, -0.6, 1.0]]]], atol=1e-7)
    np.testing.assert_allclose(pixels.to_model_range(images, (0.0, 1.0)), [[[[0.0, 0.2, 1.0]]]], atol=1e-7)


def test_every_grey_level_is_x_over_127_5_minus_1():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_allclose(pixels.to_model_range(levels), np.arange(256) / 127.5 - 1, atol=2e-7)


def test_low_precision_is_rounded_once_at_the_end():
    levels = np.arange(256, dtype=np.uint8)
    got = pixels.to_model_range(levels, dtype=jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, pixels.to_model_range(levels).astype(jnp.bfloat16))


def test_refuses_what_is_scaled_already():
    with pytest.raises(TypeError, match='uint8'):
        pixels.to_model_range(np.zeros((2, 2, 3), np.float32))
