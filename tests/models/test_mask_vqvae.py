"""The mask VQ-VAE in Flax: values and names against its numpy twin, which has an oracle of its own; its gradients."""

import jax
import numpy as np
import pytest

from big_vlm.checkpoints import trees
from big_vlm.config import UserError
from big_vlm.data import mask_codes
from big_vlm.interop import mask_codes as files
from big_vlm.models.mask_vqvae import MaskVQVAE

MODEL = MaskVQVAE()


@pytest.fixture(scope='module')
def weights():
    """Random ones, biases too, under our names."""
    rng = np.random.default_rng(0)
    params, stats = jax.eval_shape(MODEL.init, jax.random.key(0))
    return jax.tree.map(
        lambda x: (rng.normal(size=x.shape) / np.sqrt(np.prod(x.shape[:3]))).astype(np.float32), params | stats
    )


def test_published_file(weights, tmp_path):
    files.write(tmp_path / 'masks.npz', weights)
    found = mask_codes.read(tmp_path / 'masks.npz')
    assert found.keys() == mask_codes.SHAPES.keys() | mask_codes.OF_TRAINING.keys()
    for name, array in files.to_published(weights).items():
        np.testing.assert_array_equal(array, found[name])
    flat = trees.flat(weights)
    # One value by hand: torch's [out,in,y,x] and, transposed, [in,out,y,x].
    assert found['encoder.2.weight'][5, 3, 1, 2] == flat['encoder/2/kernel'][1, 2, 3, 5]
    assert found['decoder.6.weight'][5, 3, 1, 2] == flat['decoder/6/kernel'][1, 2, 3, 5]
    broken = trees.nested({path: leaf for path, leaf in flat.items() if path != 'decoder/0/bias'})
    with pytest.raises(UserError, match=r'decoder\.0\.bias is missing'):
        files.write(tmp_path / 'broken.npz', broken)
    assert [file.name for file in tmp_path.iterdir()] == ['masks.npz']


def test_both_ways_as_in_float64(weights):
    twin = mask_codes.MaskCodes(files.to_published(weights), np.float64)
    rng = np.random.default_rng(1)
    masks, codes = rng.random((2, 64, 64)).astype(np.float32), rng.integers(0, 128, (2, 16))
    vectors, decoded = jax.jit(
        lambda weights, masks, codes: (MODEL.vectors(weights, masks), MODEL.decode(weights, codes))
    )(weights, 2 * masks - 1, codes)
    expected = twin.vectors(masks)
    np.testing.assert_allclose(vectors, expected, atol=1e-5 * np.abs(expected).max())
    expected = twin.decode(codes)
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(decoded, expected, atol=1e-5 * np.abs(expected).max())


def test_operations_counted():
    """By hand, from the published shapes: encoder, codebook, decoder."""
    blocks = 2 * 16 * (2 * 9 + 1) * 128**2
    encoder = 32**2 * 16 * 16 + 16**2 * 16 * 16 * 32 + 8**2 * 16 * 32 * 64 + 4**2 * 16 * 64 * 128 + 16 * 128 * 512
    decoder = (
        16 * 512 * 128 + 4**2 * 128 * 128 * 16 + 8**2 * 128 * 64 * 16 + 16**2 * 64 * 32 * 16 + 32**2 * 32 * 16 * 16
    )
    assert MODEL.forward_flops() == 2 * (2 * blocks + encoder + 16 * 128 * 512 + decoder + 64**2 * 16)
