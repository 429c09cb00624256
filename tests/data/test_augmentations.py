"""Sizes, crops and random changes: pixels by hand or against JAX, and boxes that stay where their object went."""

import jax
import numpy as np
import pytest

from big_vlm.config import UserError
from big_vlm.data import augmentations, fields, images, transforms

CONTRACT = type(
    'Contract',
    (),
    dict(
        resample='bilinear',
        antialias=True,
        lower=False,
        image_size=24,
        images=2,
        max_patches=0,
        value_range=(-1.0, 1.0),
    ),
)


def context(seed=0, train=True):
    return transforms.Context(CONTRACT, None, train=train, seed=(seed,))


def run(pipeline, example, seed=0, train=True):
    return transforms.parse(pipeline, where='here')(example, context(seed, train))


def photo(height=40, width=60):
    rng = np.random.default_rng(0)
    return images.resize(rng.integers(0, 256, (9, 12, 3), np.uint8), (height, width), 'bicubic', True)


def scene():
    """A white object on black, its box, and a second box to see columns stay together."""
    picture = np.zeros((80, 120, 3), np.uint8)
    picture[18:44, 40:70] = 255
    boxes = [[18 / 80, 40 / 120, 44 / 80, 70 / 120], [0.0, 0.0, 1.0, 1.0]]
    return {'image': picture, 'objects': {'bbox': boxes, 'label': ['white', 'all']}}


def seen_box(picture):
    """Of the white pixels: y1 x1 y2 x2 in pixels, or None."""
    y, x = np.nonzero(picture[..., 0] > 190)
    return None if not len(y) else np.array([y.min(), x.min(), y.max() + 1, x.max() + 1], float)


GEOMETRIC = [
    'resize_small(40)', 'resize_long(60)', 'central_crop()', 'central_crop(48)', 'random_crop(60)', 'flip_lr()',
    'inception_crop(24, area_min=50)', 'resize_small(40) | random_crop(32) | flip_lr',
]  # fmt: skip
WARPS = ['rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y']


@pytest.mark.parametrize(('name', 'size'), [('resize_small', 40), ('resize_long', 60)])
def test_a_picture_that_would_grow_too_large_is_a_bad_example(name, size, monkeypatch):
    monkeypatch.setattr(images, 'MAX_PIXELS', 2399)
    assert run(f'{name}({size - 1})', {'image': np.zeros((8, 12, 3), np.uint8)})['image'].size < 3 * 2400
    with pytest.raises(ValueError, match=rf'{name}\({size}\) of 8×12 pixels makes more than 2,399') as error:
        run(f'{name}({size})', {'image': np.zeros((8, 12, 3), np.uint8)})
    assert not isinstance(error.value, UserError)


@pytest.mark.parametrize('name', ['resize_small', 'resize_long'])
def test_before_decode(name):
    with pytest.raises(UserError, match=rf'{name} before decode: write decode \| {name}'):
        run(f'{name}(8)', {'image': b'encoded'})


@pytest.mark.parametrize('share', ['1.5', '-1', '2'])
@pytest.mark.parametrize('train', [True, False])
def test_a_share_is_between_0_and_1(share, train):
    with pytest.raises(UserError, match=rf'random_jpeg\({share}\): a probability, from 0 to 1'):
        run(f'random_jpeg({share})', {'image': photo()}, train=train)
    run('random_jpeg(1)', {'image': photo()}, train=train)  # a whole number will do


def test_boxes_are_drawn_where_tensorflow_draws_them():
    """Edges at the whole part of a place times the last row or column; what lies outside is not drawn."""

    def red(*boxes):
        example = {'image': np.zeros((6, 8, 3), np.uint8), 'objects': {'bbox': boxes}}
        drawn = run('draw_boxes', example)['image']
        assert not drawn[..., 1:].any() and not example['image'].any()
        return [''.join('#' if pixel else '.' for pixel in row) for row in drawn[..., 0]]

    whole = ['........', '..####..', '..#..#..', '..#..#..', '..####..', '........']
    assert red([0.2, 0.3, 0.9, 0.8]) == whole
    assert red([-0.5, 0.3, 0.9, 1.3]) == ['..#.....'] * 4 + ['..######', '........']
    assert red([0.2, 0.3, 0.9, 0.8], [0.9, 0.1, 0.1, 0.9], [1.2, 0, 1.4, 1]) == whole
    assert red() == ['........'] * 6


@pytest.mark.parametrize('pipeline', GEOMETRIC)
def test_boxes_move_with_pixels(pipeline):
    found = 0
    for seed in range(8):
        before = scene()
        example = run(pipeline, before, seed)
        size = np.array(example['image'].shape[:2] * 2)
        box = np.clip(example['objects']['bbox'][0], 0, 1) * size
        seen = seen_box(example['image'])
        if seen is not None:
            found += 1
            np.testing.assert_allclose(box, seen, atol=1.0)
        assert before['objects']['bbox'][0] == [18 / 80, 40 / 120, 44 / 80, 70 / 120]
        assert example['objects']['label'] == ['white', 'all']
    assert found


@pytest.mark.parametrize('name', WARPS)
def test_boxes_move_with_warps(monkeypatch, name):
    monkeypatch.setattr(augmentations, '_CHANGES', {name: augmentations._CHANGES[name]})
    seen_signs = set()
    for seed in range(4):
        example = run('randaugment(1, 3)', scene(), seed)
        box = example['objects']['bbox'][0] * np.array([80, 120] * 2)
        inside = np.clip(box, 0, [80, 120] * 2)
        np.testing.assert_allclose(inside, seen_box(example['image']), atol=1.5)
        assert np.abs(box - [18, 40, 44, 70]).max() > 0.5
        seen_signs.add(tuple(box.round(3)))
    assert len(seen_signs) > 1  # both ways


@pytest.mark.parametrize('name', sorted(set(augmentations._CHANGES) - set(WARPS)))
def test_every_other_change_leaves_boxes_alone(monkeypatch, name):
    monkeypatch.setattr(augmentations, '_CHANGES', {name: augmentations._CHANGES[name]})
    picture = photo() // 2 + 90
    example = run('randaugment(1, 7)', {'image': picture, 'objects': {'bbox': [[0, 0, 1, 1]]}})
    assert example['image'].shape == picture.shape and example['image'].dtype == np.uint8
    assert (example['image'] != picture).any()
    assert example['objects']['bbox'] == [[0, 0, 1, 1]]


def test_solarize_add_by_hand():
    from PIL import Image

    pixels = np.array([[[0, 100, 127], [128, 200, 255]]], np.uint8)
    made = np.array(augmentations._solarize_add(Image.fromarray(pixels), 0.5, 1, None))
    assert made.tolist() == [[[55, 155, 182], [128, 200, 255]]]


def test_sizes():
    example = {'image': photo(40, 60)}
    assert run('resize_small(20)', example)['image'].shape == (20, 30, 3)
    assert run('resize_long(30)', example)['image'].shape == (20, 30, 3)
    assert run('resize_small(20, "area")', example)['image'].shape == (20, 30, 3)
    middle = run('central_crop(10)', example)['image']
    np.testing.assert_array_equal(middle, example['image'][15:25, 25:35])
    np.testing.assert_array_equal(run('central_crop', example)['image'], example['image'][:, 10:50])
    quarters = run('resize_small(20, "area")', example)['image'][0, 0].astype(int)
    np.testing.assert_allclose(quarters, example['image'][:2, :2].mean(axis=(0, 1)), atol=1)


def test_evaluation_sees_no_chance():
    example = {'image': photo()}
    random = 'flip_lr | randaugment | random_jpeg(1.0) | shuffle_channels'
    np.testing.assert_array_equal(run(random, example, train=False)['image'], example['image'])
    np.testing.assert_array_equal(
        run('random_crop(20)', example, train=False)['image'], run('central_crop(20)', example)['image']
    )
    whole = images.resize(example['image'], 24, 'bilinear', True)
    np.testing.assert_array_equal(run('inception_crop(24)', example, train=False)['image'], whole)


@pytest.mark.parametrize('pipeline', [p for p in GEOMETRIC if 'resize' not in p] + ['shuffle_channels'])
def test_several_pictures_are_changed_alike(pipeline):
    """A video's frames, whose boxes are the same, as one picture of the same seed would be."""
    for seed in range(4):
        alone = run(pipeline, scene(), seed)
        frames = [scene()['image'], 255 - scene()['image']]
        made = [run(pipeline, scene() | {'image': of}, seed) for of in (frames, np.stack(frames))]
        for found in made:
            assert found['image'].shape == (2, *alone['image'].shape)
            np.testing.assert_array_equal(found['image'][0], alone['image'])
            np.testing.assert_array_equal(found['objects']['bbox'], alone['objects']['bbox'])
        np.testing.assert_array_equal(made[0]['image'], made[1]['image'])
        assert (made[0]['image'][1] != alone['image']).any()
    assert run(f'{pipeline} | resize(24)', {'image': np.stack(frames), 'objects': {}})['image'].shape == (2, 24, 24, 3)


def test_several_pictures_of_several_sizes():
    example = {'image': [photo(20, 30), photo(40, 50)]}
    with pytest.raises(ValueError, match='flip_lr takes pictures of one size, and this example has 20×30 and 40×50'):
        run('flip_lr', example)
    assert run('resize(24) | flip_lr', example)['image'].shape == (2, 24, 24, 3)


@pytest.mark.parametrize('name', ['resize_small(8)', 'resize_long(8)', 'randaugment', 'random_jpeg(1)', 'draw_boxes'])
def test_what_takes_one_picture_refuses_several(name):
    for pictures in ([photo(), photo()], np.stack([photo(), photo()])):
        operation = name.split('(')[0]
        with pytest.raises(ValueError, match=f'{operation} takes one picture, and this example has 2: leave'):
            run(name, {'image': pictures})


def test_the_same_seed_changes_the_same():
    pipeline = 'resize_small(32) | inception_crop(24) | flip_lr | randaugment(2, 5) | random_jpeg(0.5)'
    made = [run(pipeline, {'image': photo()}, seed)['image'] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(made[0], made[1])
    assert (made[0] != made[2]).any()


def test_random_jpeg():
    example = {'image': photo()}
    made = run('random_jpeg(1.0)', example)['image'].astype(int)
    apart = np.abs(made - example['image'])
    assert 0 < apart.mean() < 10
    np.testing.assert_array_equal(run('random_jpeg(0.0)', example)['image'], example['image'])


@pytest.mark.parametrize('size', [(23, 31), (64, 100)])
def test_plain_bicubic_is_jaxs(size):
    """Keys' cubic as TensorFlow and JAX have it, truncated to uint8 as big_vision does."""
    picture = photo()
    expected = jax.image.resize(picture.astype(np.float32), (*size, 3), 'cubic', antialias=False)
    expected = np.clip(np.asarray(expected), 0, 255)
    made = images.resize(picture, size, 'bicubic', antialias=False).astype(np.float64)
    # Rounding may fall on the other side of a whole number.
    assert (np.abs(made - np.floor(expected)) <= 1).all() and (made == np.floor(expected)).mean() > 0.99


@pytest.mark.parametrize(
    ('pipeline', 'message'),
    [
        ('inception_crop(24, area_min=0)', 'area_min=0'),
        ('randaugment(1, 11)', 'magnitude 11'),
        ('value_range(0, 1)', r'value_range\(0, 1\), but contract.value_range is \(-1.0, 1.0\)'),
    ],
)
def test_refused(pipeline, message):
    with pytest.raises(UserError, match=message):
        run(pipeline, {'image': photo()})


def test_a_picture_smaller_than_its_crop_is_a_bad_example():
    for pipeline, size in (('random_crop(64)', 64), ('central_crop(41)', 41)):
        with pytest.raises(ValueError, match=rf'a crop of {size} from 40×60 pixels: write resize_small\({size}\)'):
            run(pipeline, {'image': photo()})


@pytest.mark.parametrize('name', ['random_crop(8)', 'flip_lr', 'inception_crop(8)', 'randaugment', 'resize_small(8)'])
def test_decode_comes_first(name):
    for seed in range(3):
        with pytest.raises(UserError, match='before decode'):
            run(name, {'image': b'png'}, seed)


def test_checked_before_anything_is_read():
    transforms.parse('value_range(-1, 1) | inception_crop(24)', where='here').check_size(CONTRACT, 'here')
    for pipeline, message in (
        ('inception_crop(32)', 'image_size is 24'),
        ('value_range(0, 255)', 'contract.value_range'),
    ):
        with pytest.raises(UserError, match=f'here: .*{message}'):
            transforms.parse(pipeline, where='here').check_size(CONTRACT, 'here')


def test_fields_of_fields():
    record = {
        'answers': {'text': ['Two', 'two dogs', 'Two']},
        'choices': ['a cat', 'a dog'],
        'right': 1,
        'title': 'A B',
    }
    made = run(
        'majority("answers/text", "answer") | pick("choices", "right", "name") | join("choices", ", ", "all")'
        ' | lower("answer", "title", "choices") | prefix("{title}? {all}") | suffix("{answer} {name}")',
        record,
    )
    assert (made['prefix'], made['suffix'], made['choices']) == ('a b? a cat, a dog', 'two a dog', ['a cat', 'a dog'])
    texts = list(transforms.parse('majority("answers/text", "x") | lower("x") | suffix("{x}")', where='').texts(record))
    assert texts == ['two', 'two dogs', 'two']
    with pytest.raises(ValueError, match='right is 2, and choices has 2 items'):
        run('pick("choices", "right", "name")', record | {'right': 2})
    with pytest.raises(ValueError, match='choices is empty'):
        run('join("choices", ", ", "all")', record | {'choices': []})


def test_options():
    record = {'choices': ['red', 'green', 'blue'], 'answer': 2}
    fixed = run('options("choices", "answer")', record, train=False)
    assert (fixed['options'], fixed['letter']) == ('(A) red, (B) green, (C) blue', 'C')
    orders = set()
    for seed in range(8):
        made = run('options("choices", "answer")', record, seed)
        assert f'({made["letter"]}) blue' in made['options']
        orders.add(made['options'])
    assert len(orders) > 2
    texts = transforms.parse('options("choices", "answer") | prefix("{options}") | suffix("{letter}")', where='')
    assert ['(B) green, ', 'B'] == list(texts.texts(record))[2:4]


def test_every_operation_that_makes_fields_tells_of_them():
    assert set(fields.MADE) == {operation.__name__ for operation in fields.OPERATIONS}
