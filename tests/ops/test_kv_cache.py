"""The cache: a token's slot is its position, padding is never written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vlm.ops import kv_cache


def numbered(batch, length):
    """Keys [B,T,1,1] whose value is 100 * (row + 1) + t."""
    return (100 * (np.arange(batch)[:, None] + 1) + np.arange(length))[:, :, None, None].astype(np.float32)


def test_prefill_of_rows_of_different_length_by_hand():
    cache = kv_cache.empty(1, 2, 5, 1, 1, jnp.float32)
    k = numbered(2, 4)
    position = np.array([[0, 1, 2, 3], [0, 0, 0, 1]], np.int32)
    real = np.array([[1, 1, 1, 0], [1, 0, 0, 1]], bool)
    layer = kv_cache.write_prefill(cache.layers[0], k, -k, position, real)
    np.testing.assert_array_equal(layer.k[..., 0, 0], [[100, 101, 102, 0, 0], [200, 203, 0, 0, 0]])
    np.testing.assert_array_equal(layer.v, -layer.k)


@pytest.mark.smoke
def test_steps_go_on_where_each_row_ended():
    layer = kv_cache.empty(1, 2, 4, 1, 1, jnp.float32).layers[0]
    length = np.array([0, 2], np.int32)
    for step in range(2):
        new = np.full((2, 1, 1, 1), step + 1.0, np.float32)
        layer = kv_cache.write_step(layer, new, 10 * new, length + step)
    np.testing.assert_array_equal(layer.k[..., 0, 0], [[1, 2, 0, 0], [0, 0, 1, 2]])
    np.testing.assert_array_equal(layer.v, 10 * layer.k)


def test_a_full_row_keeps_what_it_has():
    layer = kv_cache.empty(1, 2, 2, 1, 1, jnp.float32).layers[0]
    one = np.ones((2, 1, 1, 1), np.float32)
    layer = kv_cache.write_step(layer, one, one, np.array([2, 1], np.int32))
    np.testing.assert_array_equal(layer.k[..., 0, 0], [[0, 0], [0, 1]])


def test_visible_by_hand():
    got = kv_cache.visible(np.array([0, 2, 3], np.int32), 3)
    np.testing.assert_array_equal(got, [[0, 0, 0], [1, 1, 0], [1, 1, 1]])


def test_layers_do_not_share_buffers_so_the_cache_can_be_donated():
    cache = kv_cache.empty(3, 2, 4, 1, 2, jnp.bfloat16)
    bump = jax.jit(lambda c: jax.tree.map(lambda x: x + 1, c), donate_argnums=0)
    after = bump(cache)
    assert len(after.layers) == 3 and after.layers[2].v.dtype == jnp.bfloat16
    np.testing.assert_array_equal(after.length, [1, 1])
