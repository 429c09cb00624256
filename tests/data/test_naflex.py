"""Pictures as rows of patches: the grid that is taken, what the rows hold, and the operation in a pipeline."""

import dataclasses

import numpy as np
import pytest

from big_vlm.config import UserError
from big_vlm.data import images, naflex, transforms
from big_vlm.data.contract import Contract

CONTRACT = Contract(
    224, 'bilinear', True, (-1.0, 1.0), 6, True, True, '\n', (), 0, 40, 0, 2, 1, '', max_patches=6, patch_size=4
)


@pytest.mark.parametrize(
    ('size', 'max_patches', 'grid'),
    [
        ((10, 10), 4, (2, 2)),
        ((10, 30), 4, (1, 3)),
        ((10, 30), 3, (1, 3)),
        ((480, 640), 256, (14, 18)),
        ((640, 480), 256, (18, 14)),
        ((1, 1000), 9, (1, 9)),
        ((300, 200), 1, (1, 1)),
        ((224, 224), 256, (16, 16)),
    ],
)
def test_grid(size, max_patches, grid):
    assert naflex.grid_of(*size, max_patches) == grid


def test_the_largest_scale_that_the_patches_allow():
    """Against every scale, in steps of a thousandth of a patch."""
    rng = np.random.default_rng(0)
    for height, width in rng.integers(3, 900, (20, 2)):
        count = int(rng.integers(1, 40))
        scales = np.arange(1, 41_000)[:, None] / 1000 / max(height, width)
        grids = np.ceil(np.round(scales * (height, width), 9)).astype(int)
        fitting = grids[grids.prod(axis=1) <= count]
        assert naflex.grid_of(int(height), int(width), count) == tuple(fitting[-1])


def test_rows_hold_the_resized_picture_patch_by_patch():
    picture = np.random.default_rng(0).integers(0, 256, (20, 50, 3), np.uint8)
    made = naflex.rows(picture, CONTRACT)
    resized = images.resize(picture, (8, 12), 'bilinear', True)
    assert made['patch_grid'].tolist() == [2, 3] and made['patch_mask'].all()
    assert made['patches'].shape == (6, 48) and made['patches'].dtype == np.uint8
    np.testing.assert_array_equal(made['patches'][4], resized[4:8, 4:8].ravel())
    np.testing.assert_array_equal(naflex.picture(made['patches'], made['patch_grid']), resized)
    made = naflex.rows(picture[:, :20], CONTRACT)
    assert made['patch_grid'].tolist() == [2, 2] and made['patch_mask'].tolist() == [True] * 4 + [False] * 2
    assert not made['patches'][4:].any()


def test_as_an_operation():
    picture = np.random.default_rng(0).integers(0, 256, (20, 50, 3), np.uint8)
    context = transforms.Context(CONTRACT, None, train=True)
    pipeline = transforms.parse('decode | naflex(6)', where='p')
    example = pipeline({'image': picture}, context)
    assert 'image' not in example
    np.testing.assert_array_equal(example['patches'], naflex.rows(picture, CONTRACT)['patches'])
    pipeline.check_size(CONTRACT, where='p')
    with pytest.raises(UserError, match=r'p: naflex\(5\), but contract.max_patches is 6'):
        transforms.parse('decode | naflex(max_patches=5)', where='p').check_size(CONTRACT, where='p')
    with pytest.raises(UserError, match=r'p: resize\(224\), but contract.max_patches is set: write naflex\(6\)'):
        transforms.parse('decode | resize(224)', where='p').check_size(CONTRACT, where='p')
    with pytest.raises(UserError, match=r'naflex\(6, … 7\): a row has no more than 6 patches'):
        transforms.parse('decode | naflex(6, 2, 7)', where='p').check_size(CONTRACT, where='p')
    squares = dataclasses.replace(CONTRACT, max_patches=0)
    with pytest.raises(UserError, match=r'naflex\(6\), but contract.max_patches is 0'):
        pipeline({'image': picture}, transforms.Context(squares, None, train=True))
    with pytest.raises(UserError, match='naflex before decode'):
        transforms.parse('naflex(6)', where='p')({'image': b'x'}, context)


def test_lengths_are_drawn_in_training():
    """Rows stay as long as the contract says; the first length is the one that is evaluated."""
    picture = np.random.default_rng(0).integers(0, 256, (20, 50, 3), np.uint8)
    pipeline = transforms.parse('naflex(6, 1, 3)', where='p')

    def grid(train, seed=0):
        example = pipeline({'image': picture}, transforms.Context(CONTRACT, None, train=train, seed=seed))
        assert example['patches'].shape == (6, 48) and example['patch_mask'].sum() == example['patch_grid'].prod()
        return tuple(example['patch_grid'].tolist())

    assert [grid(True, seed) for seed in range(20)].count((1, 3)) in range(5, 16)
    assert {grid(True, seed) for seed in range(20)} == {(1, 1), (1, 3)}
    assert grid(False) == (1, 1)
