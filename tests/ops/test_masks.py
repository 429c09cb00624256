"""The mask rule, against matrices written by hand (query down, key across)."""

import numpy as np
import pytest

from big_vlm.ops import masks


def matrix(text):
    return np.array([[c == 'x' for c in line.split()] for line in text.strip().splitlines()])


CASES = {
    'causal': (
        [1, 1, 1, 1],
        [1, 1, 1, 1],
        """
    x . . .
    x x . .
    x x x .
    x x x x
    """,
    ),
    'bidirectional': (
        [1, 1, 1],
        [0, 0, 0],
        """
    x x x
    x x x
    x x x
    """,
    ),
    'prefix then suffix then padding': (
        [1, 1, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 0],
        """
    x x x . . .
    x x x . . .
    x x x . . .
    x x x x . .
    x x x x x .
    . . . . . .
    """,
    ),
    'a leading 1 changes nothing': (
        [1, 1, 1, 1],
        [1, 0, 0, 1],
        """
    x x x .
    x x x .
    x x x .
    x x x x
    """,
    ),
    'blocks of two, causal between them': (
        [1, 1, 1, 1],
        [1, 0, 1, 0],
        """
    x x . .
    x x . .
    x x x x
    x x x x
    """,
    ),
    'two packed examples, each a prefix and a suffix': (
        [1, 1, 1, 2, 2, 2, 0],
        [0, 0, 1, 0, 0, 1, 0],
        """
    x x . . . . .
    x x . . . . .
    x x x . . . .
    . . . x x . .
    . . . x x . .
    . . . x x x .
    . . . . . . .
    """,
    ),
    'two prompts about one image': (
        [-1, -1, 1, 1, 2, 2, 0],
        [0, 0, 1, 1, 1, 1, 0],
        """
    x x . . . . .
    x x . . . . .
    x x x . . . .
    x x x x . . .
    x x . . x . .
    x x . . x x .
    . . . . . . .
    """,
    ),
    'padding in front': (
        [0, 0, 1, 1],
        [0, 0, 0, 1],
        """
    . . . .
    . . . .
    . . x .
    . . x x
    """,
    ),
}


@pytest.mark.smoke
@pytest.mark.parametrize('name', CASES)
def test_matrix_by_hand(name):
    segment, mask_ar, expected = CASES[name]
    got = masks.attention_mask(np.array([segment], np.int32), np.array([mask_ar], np.int32))
    np.testing.assert_array_equal(got[0], matrix(expected))


def test_rows_do_not_mix_and_bool_mask_ar_is_the_same():
    rng = np.random.default_rng(0)
    segment, mask_ar = rng.integers(0, 3, (5, 9)).astype(np.int32), rng.integers(0, 2, (5, 9))
    together = masks.attention_mask(segment, mask_ar)
    for i in range(5):
        np.testing.assert_array_equal(
            together[i : i + 1], masks.attention_mask(segment[i : i + 1], mask_ar[i : i + 1] > 0)
        )


WINDOWED = {
    'causal': (
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
        """
    x . . . .
    x x . . .
    . x x . .
    . . x x .
    . . . x x
    """,
    ),
    'a prefix longer than the window sees all of itself, and the suffix its last tokens': (
        [1, 1, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 0],
        """
    x x x . . .
    x x x . . .
    x x x . . .
    . . x x . .
    . . . x x .
    . . . . . .
    """,
    ),
    'text, an image of two, text': (
        [1, 1, 1, 1, 1],
        [1, 1, 0, 1, 1],
        """
    x . . . .
    x x x . .
    . x x . .
    . . x x .
    . . . x x
    """,
    ),
    'two packed examples': (
        [1, 1, 2, 2, 2],
        [1, 1, 1, 1, 1],
        """
    x . . . .
    x x . . .
    . . x . .
    . . x x .
    . . . x x
    """,
    ),
}


@pytest.mark.parametrize('name', WINDOWED)
def test_a_window_of_two_by_hand(name):
    segment, mask_ar, expected = WINDOWED[name]
    segment = np.array([segment], np.int32)
    position = np.arange(segment.shape[1], dtype=np.int32) - np.argmax(segment[0] == segment[0][:, None], axis=1)
    mask = masks.attention_mask(segment, np.array([mask_ar], np.int32))
    got = masks.sliding_window(mask, position[None].astype(np.int32), 2)
    np.testing.assert_array_equal(got[0], matrix(expected))
    np.testing.assert_array_equal(masks.sliding_window(mask, position[None].astype(np.int32), 9), mask)
