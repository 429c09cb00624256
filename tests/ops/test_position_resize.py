"""Position embeddings at a new resolution, each algorithm against the library that published models used."""

import jax
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


@pytest.mark.parametrize('new', [(3, 3), (7, 7), (16, 16), (5, 9), (1, 1)])
@pytest.mark.parametrize('old', [2, 4, 14])
def test_antialiased_matches_jax(old, new):
    posemb = np.random.default_rng(old).normal(size=(1, old * old, 6)).astype(np.float32)
    grid = posemb.reshape(old, old, 6)
    expected = jax.image.resize(grid, (*new, 6), 'linear', antialias=True)
    np.testing.assert_allclose(position_resize.antialiased(posemb, new), expected.reshape(1, -1, 6), atol=2e-6)


@pytest.mark.parity
@pytest.mark.parametrize('new', [(3, 3), (7, 7), (16, 16), (5, 9), (1, 1)])
@pytest.mark.parametrize('old', [2, 4, 14])
@pytest.mark.parametrize(
    ('ours', 'theirs'),
    [
        (position_resize.bicubic, dict(mode='bicubic')),
        (position_resize.antialiased, dict(mode='bilinear', antialias=True)),
    ],
)
def test_matches_torch(old, new, ours, theirs):
    torch = pytest.importorskip('torch')
    posemb = np.random.default_rng(old).normal(size=(1, old * old, 6)).astype(np.float32)
    grid = torch.tensor(posemb).reshape(1, old, old, 6).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=new, align_corners=False, **theirs)
    expected = expected.permute(0, 2, 3, 1).reshape(1, -1, 6).numpy()
    np.testing.assert_allclose(ours(posemb, new), expected, atol=4e-6)


def test_bicubic_weights_by_hand():
    """Twice as many samples lie a quarter and three quarters from the old ones."""
    near, far = 1.25 / 64 - 2.25 / 16 + 1, 1.25 * 27 / 64 - 2.25 * 9 / 16 + 1
    beyond = [-0.75 * (x**3 - 5 * x**2 + 8 * x - 4) for x in (1.25, 1.75)]
    one = np.zeros((1, 16, 1), np.float32)
    one[0, 5] = 1  # row 1, column 1 of four by four
    got = np.asarray(position_resize.bicubic(one, (8, 8))).reshape(8, 8)
    weights = got[:, 2] / near  # column 2 is `near` to column 1
    np.testing.assert_allclose(weights[1:7], [far, near, near, far, *beyond], atol=1e-6)


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
