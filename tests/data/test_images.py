"""Pictures in every dress come out as the same uint8 RGB; broken and oversized ones are refused."""

import dataclasses
import io
import struct
import zlib

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from big_vlm.config import UserError
from big_vlm.data import antialias, images
from big_vlm.data.contract import Contract

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)
CONTRACT = Contract(
    image_size=4, resample='bicubic', antialias=True, value_range=(-1.0, 1.0), text_length=8, lower=True, eos=True,
    separator='\n', separator_ids=(4,), image_tokens=0, vocab_size=9, pad_id=0, bos_id=2, eos_id=1, tokenizer_sha256='',
)  # fmt: skip


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_all_the_ways_in_agree(tmp_path):
    png = encoded(Image.fromarray(PICTURE), 'png')
    (tmp_path / 'a.png').write_bytes(png)
    for source in (png, str(tmp_path / 'a.png'), tmp_path / 'a.png', Image.fromarray(PICTURE), PICTURE):
        assert np.array_equal(images.decode(source), PICTURE)
    assert np.array_equal(images.decode(encoded(Image.fromarray(PICTURE), 'bmp')), PICTURE)


def test_grey_alpha_and_palette():
    grey = PICTURE[..., 0]
    for source in (grey, grey[..., None], encoded(Image.fromarray(grey), 'png')):
        assert np.array_equal(images.decode(source), np.repeat(grey[..., None], 3, -1))
    alpha = np.concatenate([PICTURE, PICTURE[..., :1]], -1)
    assert np.array_equal(images.decode(alpha), PICTURE)
    assert np.array_equal(images.decode(encoded(Image.fromarray(alpha), 'png')), PICTURE)
    few = Image.fromarray(PICTURE // 128 * 255).convert('P')
    assert np.array_equal(images.decode(encoded(few, 'png')), np.asarray(few.convert('RGB')))


def test_sixteen_bit_grey_keeps_its_levels():
    deep = np.array([[0, 257 * 100, 65535], [257, 30000, 128]], np.uint16)
    decoded = images.decode(encoded(Image.fromarray(deep), 'png'))
    assert decoded[..., 0].tolist() == [[0, 100, 255], [1, 117, 0]]


def test_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: show it a quarter turn clockwise
    for kind in ('png', 'jpeg'):
        upright = images.decode(encoded(Image.fromarray(PICTURE), kind))
        turned = images.decode(encoded(Image.fromarray(PICTURE), kind, exif=exif))
        assert np.array_equal(turned, np.rot90(upright, -1))


@pytest.mark.parametrize('cut', [0, 20, 60, -30])
def test_broken_pictures(cut):
    for kind in ('png', 'jpeg'):
        data = encoded(Image.fromarray(np.tile(PICTURE, (4, 4, 1))), kind)
        with pytest.raises(ValueError, match='image'):
            images.decode(data[:cut])


def test_broken_pictures_that_pillow_has_opened(tmp_path):
    """Their pixels are read when they are asked for, and what Pillow raises then is of many kinds."""
    jpeg, png = (encoded(Image.fromarray(np.tile(PICTURE, (20, 20, 1))), kind) for kind in ('jpeg', 'png'))
    for name, data in (('a.jpg', jpeg[:-200]), ('a.png', png[:100] + bytes(20) + png[120:])):
        (tmp_path / name).write_bytes(data)
        with (
            pytest.raises(UserError, match='^photo: cannot decode the image: [a-z]'),
            Image.open(tmp_path / name) as it,
        ):
            images.prepare(it, CONTRACT, where='photo')


def test_a_png_without_a_header():
    data = b'\x89PNG\r\n\x1a\n' + b'\0\0\0\0IEND\xaeB`\x82'
    for cut in (data, data[:8] + data[12:]):
        with pytest.raises(UserError, match='^photo: .*image'):
            images.prepare(cut, CONTRACT, where='photo')


def test_corrupt_pixels_are_refused():
    data = bytearray(encoded(Image.fromarray(np.tile(PICTURE, (4, 4, 1))), 'png'))
    data[200:220] = bytes(20)
    with pytest.raises(ValueError):
        images.decode(bytes(data))


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_a_bomb_is_refused_before_it_is_decoded():
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))

    for side in (10_000, 60_000):
        header = chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0))
        bomb = b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b'')
        with pytest.raises(ValueError, match='pixels'):
            images.decode(bomb)


@pytest.mark.parametrize('array', [np.zeros((4, 4, 3)), np.zeros((4, 4, 5), np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_arrays_that_are_no_pictures(array):
    with pytest.raises(ValueError, match='image array must be'):
        images.decode(array)


@pytest.mark.parametrize(('method', 'pillow'), [('bilinear', Image.BILINEAR), ('bicubic', Image.BICUBIC)])
def test_antialiased_resize_is_pillows(method, pillow):
    big = RNG.integers(0, 256, (40, 30, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(big).resize((16, 16), pillow))
    assert np.array_equal(images.resize(big, 16, method, True), expected)


@pytest.mark.parametrize('size', [5, 16, 33])
def test_plain_bilinear_resize_is_big_visions(size):
    """Samples at (i + 0.5) · old / new − 0.5, edges clamped, no low-pass, truncated: tf.image's resize in float64."""
    big = RNG.integers(0, 256, (23, 40, 3), dtype=np.uint8)

    def weights(old: int) -> np.ndarray:
        where = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        low = np.minimum(where.astype(int), old - 2)
        matrix = np.zeros((size, old))
        matrix[np.arange(size), low] = 1 - (where - low)
        matrix[np.arange(size), low + 1] = where - low
        return matrix

    exact = np.einsum('ia,jb,abc->ijc', weights(23), weights(40), big.astype(np.float64))
    made = images.resize(big, size, 'bilinear', False)
    # Where the exact value is a whole number, float32 may fall on either side of it.
    clear = np.abs(exact - np.rint(exact)) > 1e-3
    assert np.array_equal(made[clear], np.floor(exact)[clear])
    assert np.abs(made - exact).max() < 1 + 1e-3


@pytest.fixture(scope='module')
def photos():
    """Real ones: 427×640."""
    return [np.ascontiguousarray(photo) for photo in load_sample_images().images]


@pytest.mark.parametrize('settings', [{}, {'quality': 30}, {'progressive': True}, {'subsampling': 0}])
def test_jpegs_are_decoded_as_pillow_does(photos, settings):
    for picture in (*map(Image.fromarray, photos), Image.fromarray(photos[0]).convert('L')):
        data = encoded(picture, 'jpeg', **settings)
        for one in (data, data[:-2] + bytes(20) + data[-2:], data[: len(data) // 2] + data[-2:]):  # out of order, too
            assert np.array_equal(images.decode(one), np.asarray(Image.open(io.BytesIO(one)).convert('RGB')))


def test_a_jpeg_comes_smaller_where_it_may(photos):
    """At a half while both sides keep what they must; its pixels are then near the means of two by two."""
    data = encoded(Image.fromarray(photos[1]), 'jpeg', quality=95)
    assert [images.decode(data, least=n).shape[0] for n in (0, 214, 213, 100, 50)] == [427, 427, 214, 107, 54]
    half = images.decode(data, least=213)[:213].astype(float)
    means = photos[1][:426].reshape(213, 2, 320, 2, 3).mean(axis=(1, 3))
    assert np.abs(half - means).mean() < 1.5
    exif = Image.Exif()
    exif[0x0112] = 6
    assert images.decode(encoded(Image.fromarray(photos[1]), 'jpeg', exif=exif), least=100).shape == (640, 427, 3)


@pytest.mark.parametrize('method', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('size', [56, 224, 500])
def test_fast_antialiasing_is_nearly_pillows(photos, method, size):
    """A mean of 0.2 grey levels, as JAX's is; exact where nothing is to be rounded."""
    for photo in photos:
        expected = images.resize(photo, size, method, True).astype(int)
        assert np.abs(antialias.resize(photo, size, method) - expected).mean() < 0.2
    flat = np.full((61, 43, 3), (0, 77, 255), np.uint8)
    assert np.array_equal(antialias.resize(flat, size, method), np.full((size, size, 3), (0, 77, 255)))


def test_resizes_on_photographs_stay_within_the_figures(photos):
    """JAX's antialiased cubic is 0.2 grey levels from Pillow's, big_vision's plain bilinear 1 to 8."""
    for photo in photos:
        pillows = images.resize(photo, 224, 'bicubic', True).astype(float)
        jaxs = jax.image.resize(photo.astype(np.float32), (224, 224, 3), 'cubic', antialias=True)
        assert np.abs(np.clip(np.rint(np.asarray(jaxs)), 0, 255) - pillows).mean() < 0.2
        plain = images.resize(photo, 224, 'bilinear', False).astype(float)
        theirs = np.asarray(jax.image.resize(photo.astype(np.float32), (224, 224, 3), 'linear', antialias=False))
        assert np.abs(plain - np.trunc(theirs)).mean() < 0.01
        assert 1 < np.abs(plain - pillows).mean() < 8


def test_resizing_to_the_same_size_changes_nothing():
    square = PICTURE[:7]
    for smooth in (True, False):
        assert np.array_equal(images.resize(square, 7, 'bicubic', smooth), square)


def test_prepare_follows_the_contract(tmp_path):
    expected = np.asarray(Image.fromarray(PICTURE).resize((4, 4), Image.BICUBIC))
    assert np.array_equal(images.prepare(PICTURE, CONTRACT), expected)
    plain = dataclasses.replace(CONTRACT, resample='bilinear', antialias=False)
    assert np.array_equal(images.prepare(PICTURE, plain), images.resize(PICTURE, 4, 'bilinear', False))
    with pytest.raises(UserError, match=r'images\[3\]: cannot read .*none.png: No such file'):
        images.prepare(tmp_path / 'none.png', CONTRACT, 'images[3]')
    with pytest.raises(UserError, match=r'^image: not an image'):
        images.prepare(b'GIF?', CONTRACT)
