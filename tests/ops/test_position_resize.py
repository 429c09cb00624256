"""Position embeddings at a new resolution, against scipy's order-1 zoom."""

import numpy as np
import pytest
import scipy.ndimage

from big_vlm.ops import position_resize


@pytest.mark.parametrize('new', [(3, 3), (7, 7), (16, 16), (5, 9), (2, 3), (1, 1)])
@pytest.mark.parametrize('old', [2, 4, 14])
def test_matches_scipy_zoom(old, new):
    posemb = np.random.default_rng(old).normal(size=(1, old * old, 6)).astype(np.float32)
    grid = posemb.reshape(old, old, 6)
    expected = scipy.ndimage.zoom(grid.astype(np.float64), (new[0] / old, new[1] / old, 1), order=1)
    assert expected.shape == (*new, 6)
    got = position_resize.bilinear(posemb, new)
    np.testing.assert_allclose(got, expected.reshape(1, -1, 6), atol=1e-6)


def test_corners_stay_and_midpoints_are_means():
    posemb = np.array([[[1.0], [2.0], [3.0], [4.0]]], np.float32)
    got = position_resize.bilinear(posemb, (3, 3))[0, :, 0].reshape(3, 3)
    np.testing.assert_allclose(got, [[1, 1.5, 2], [2, 2.5, 3], [3, 3.5, 4]])


def test_same_grid_is_untouched_and_dtype_kept():
    posemb = np.random.default_rng(0).normal(size=(1, 9, 2)).astype(np.float16)
    np.testing.assert_array_equal(position_resize.bilinear(posemb, (3, 3)), posemb)
    assert position_resize.bilinear(posemb, (5, 5)).dtype == np.float16


def test_refuses_a_grid_that_is_no_square():
    with pytest.raises(ValueError, match='6 patches'):
        position_resize.bilinear(np.zeros((1, 6, 2), np.float32), (3, 3))
