"""Rotary positions against complex multiplication in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from big_vlm.ops import rope


def oracle(x, position, base):
    half = x.shape[-1] // 2
    z = x[..., :half].astype(np.complex128) + 1j * x[..., half:]
    angle = position[..., None, None] * base ** (-np.arange(half) / half)
    z = z * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=-1)


def test_one_pair_by_hand():
    # One pair turns by `position` radians: (1, 0) at position 2 is (cos 2, sin 2).
    x = np.array([[[[1.0, 0.0]]]], np.float32)
    got = rope.rope(x, np.array([[2]], np.int32))
    np.testing.assert_allclose(got[0, 0, 0], [np.cos(2.0), np.sin(2.0)], atol=1e-6)


@pytest.mark.parametrize('base', [10_000.0, 1_000_000.0])
def test_closed_form(base):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
    position = rng.integers(0, 500, (2, 5)).astype(np.int32)
    np.testing.assert_allclose(rope.rope(x, position, base), oracle(x, position, base), atol=2e-4)
    near = position % 8
    np.testing.assert_allclose(rope.rope(x, near, base), oracle(x, near, base), atol=2e-6)


def test_inner_products_depend_on_the_difference_alone():
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)
    at = lambda x, i: np.asarray(rope.rope(x, np.array([[i]], np.int32)), np.float64).ravel()  # noqa: E731
    np.testing.assert_allclose(at(q, 7) @ at(k, 3), at(q, 104) @ at(k, 100), atol=1e-4)
    assert abs(at(q, 7) @ at(k, 3) - at(q, 7) @ at(k, 4)) > 1e-2


def test_low_precision_input_is_rotated_in_float32():
    x = np.random.default_rng(2).normal(size=(1, 4, 1, 8)).astype(jnp.bfloat16)
    position = np.array([[0, 1, 300, 5000]], np.int32)
    got = rope.rope(x, position)
    assert got.dtype == jnp.bfloat16
    # Angles rounded to bfloat16 would be off by whole radians at position 5000.
    np.testing.assert_allclose(
        np.asarray(got, np.float64), oracle(np.asarray(x, np.float32), position, 10_000.0), atol=2e-2
    )


def test_a_scale_of_eight_is_an_eighth_of_the_position():
    x = np.random.default_rng(3).normal(size=(1, 3, 2, 8)).astype(np.float32)
    got = rope.rotate(x, np.array([[0, 16, 800]], np.int32), rope.frequencies(8, 1e6, 8.0))
    np.testing.assert_allclose(got, oracle(x, np.array([[0, 2, 100]]), 1e6), atol=2e-5)
