"""Masks of objects: read, moved with their pixels, cut out, and written as tokens."""

import io
import json

import mask_weights
import numpy as np
import pytest
from PIL import ExifTags, Image

from big_vlm.config import UserError
from big_vlm.data import coordinates, jsonl, mask_codes, objects, run_lengths, segmentation, sources, transforms
from big_vlm.data.indexed import BadRecord

CONTRACT = type(
    'Contract', (), dict(resample='bilinear', antialias=True, lower=False, image_size=24, images=1, max_patches=0)
)


@pytest.fixture(scope='module')
def codes(tmp_path_factory):
    return mask_weights.save(tmp_path_factory.mktemp('codes') / 'codes.npz')


def run(pipeline, example, seed=0, train=True):
    context = transforms.Context(CONTRACT, None, train=train, seed=(seed,))
    return transforms.parse(pipeline, where='here')(example, context)


def scene():
    """A white triangle on black, its box and mask, and a second object, all of the picture."""
    picture = np.zeros((80, 120, 3), np.uint8)
    for i in range(26):
        picture[18 + i, 40 : 43 + i] = 255
    boxes = [[18 / 80, 40 / 120, 44 / 80, 68 / 120], [0.0, 0.0, 1.0, 1.0]]
    masks = [picture[..., 0], np.full((80, 120), 255, np.uint8)]
    return {'image': picture, 'objects': {'bbox': boxes, 'label': ['triangle', 'all'], 'mask': masks}}


@pytest.mark.parametrize(
    'pipeline', ['central_crop(60)', 'random_crop(70)', 'flip_lr', 'flip_lr | random_crop(64) | flip_lr', 'resize(24)']
)
def test_masks_move_with_their_pixels(pipeline):
    for seed in range(3):
        made = run(f'masks | {pipeline}', scene(), seed)
        mask = made['objects']['mask'][0]
        if pipeline == 'resize(24)':  # a mask keeps its resolution: what is asked of it is relative
            assert mask.shape == (80, 120)
            continue
        np.testing.assert_array_equal(mask, made['image'][..., 0] > 127)


def test_masks_turn_and_shear_with_their_pixels():
    for seed in range(12):
        made = run('masks | randaugment(2, 3)', scene(), seed)
        mask, box = made['objects']['mask'][0], made['objects']['bbox'][0]
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        inside = np.array([rows[0] / 80, columns[0] / 120, (rows[-1] + 1) / 80, (columns[-1] + 1) / 120])
        assert (inside[:2] > np.array(box)[:2] - 0.03).all() and (inside[2:] < np.array(box)[2:] + 0.03).all()


def test_masks_after_another_size_are_cropped_at_that_size():
    made = run('masks | resize_small(40) | central_crop(30)', scene())
    assert made['objects']['mask'].shape == (2, 30, 30)
    sharp = made['image'][..., 0]
    clear = (sharp < 20) | (sharp > 235)
    assert (made['objects']['mask'][0] == (sharp > 127))[clear].all() and made['objects']['mask'][0].any()


def test_digit_scenes(tiny_digit_scenes, codes):
    """The box and mask of every digit: cut out as the picture has it, spelt as the encoder says."""
    source = sources.load('digit_scenes/free_tiny', 'train', tiny_digit_scenes)
    encoder = mask_codes.load(codes)
    for i in range(4):
        made = run(f'decode | masks | segment({codes!r})', source[i], i, train=False)
        names, boxes, masks = objects.segments(made, 'test')
        numbers = np.asarray(Image.open(io.BytesIO(source[i]['instances'])))
        np.testing.assert_array_equal(masks, [numbers == n + 1 for n in range(len(names))])
        target = made['prefix'].removeprefix('segment ')
        chosen = [n for n, name in enumerate(names) if name == target]
        answers = made['suffix'].split(' ; ')
        assert len(answers) == len(made['true_masks']) == len(chosen) > 0
        for n, answer, true in zip(chosen, answers, made['true_masks'], strict=True):
            box, spelt, rest = coordinates.first_mask(answer)
            np.testing.assert_allclose(box, boxes[n], atol=0.5 / 1023)
            part = segmentation.cut_out(masks[n], boxes[n])
            assert spelt == encoder.encode(part[None])[0].tolist() and rest == f' {target}'
            place, _, rest = coordinates.first_mask(true)
            assert place == box
            np.testing.assert_array_equal(run_lengths.from_text(rest), masks[n])
    assert 'true_masks' not in run(f'decode | masks | segment({codes!r})', source[0])


def test_phrase(codes):
    """RefCOCO's form: prompt and answer without words of their own."""
    made = run(f'masks | segment({codes!r}, "phrase")', scene(), train=False)
    assert made['prefix'] in ('triangle', 'all')
    assert coordinates.first_mask(made['suffix'])[2] == '' and len(made['suffix']) == 4 * 9 + 16 * 8


def test_cut_out():
    mask = np.zeros((100, 80), bool)
    mask[10:42, 20:52] = True
    mask[26:42, 36:52] = False
    part = segmentation.cut_out(mask, np.array([0.1, 0.25, 0.42, 0.65]))
    assert part.shape == (64, 64) and part.dtype == np.float32
    expected = np.ones((64, 64))
    expected[32:, 32:] = 0
    clear = np.ones((64, 64), bool)
    clear[31:33, 31:] = clear[31:, 31:33] = False  # bilinear at the edge alone
    np.testing.assert_allclose(part[clear], expected[clear], atol=1e-6)
    # Never empty: a box between two pixels is one of them.
    assert segmentation.cut_out(mask, np.array([0.999, 0.9999, 1.0, 1.0])).max() == 0


def test_the_mask_of_an_object_and_of_a_shape():
    made = run('masks | mask', scene(), 1)['mask']
    assert made.dtype == np.uint8 and made.shape == (64, 64) and made.max() == 255
    shares = []
    for seed in range(40):
        shape = run('mask("shape")', {}, seed)['mask'] > 0
        assert shape.any(axis=1)[[0, -1]].all() and shape.any(axis=0)[[0, -1]].all(), seed  # its box fits
        shares.append(shape.mean())
    assert 0.1 < np.mean(shares) < 0.9 and len(set(shares)) > 30


def test_mistakes(codes):
    with pytest.raises(UserError, match=r'segment before masks: write decode \| masks'):
        run(f'segment({codes!r})', scene())
    with pytest.raises(ValueError, match='neither objects/mask nor instances'):
        run('masks', {'objects': {'bbox': [[0, 0, 1, 1]], 'label': ['a']}})
    record = scene()
    record['objects']['mask'] = record['objects']['mask'][:1]
    with pytest.raises(ValueError, match='1 masks for 2 boxes'):
        run('masks', record)
    record['objects']['mask'] = [np.zeros((3, 4), np.uint8), np.zeros((3, 5), np.uint8)]
    with pytest.raises(ValueError, match='3×4 and 3×5'):
        run('masks', record)
    for value in ('/etc/passwd', 0, None):
        with pytest.raises(ValueError, match='objects/mask is no picture but (str|int|NoneType)'):
            run('masks', {'objects': record['objects'] | {'mask': [value] * 2}})
        with pytest.raises(ValueError, match='instances is no picture but (str|int|NoneType)'):
            run('masks', {'objects': {'bbox': [[0, 0, 1, 1]], 'label': ['a']}, 'instances': value})
    record['objects']['mask'] = [np.zeros((8, 8), np.uint8)] * 2
    with pytest.raises(ValueError, match='nothing to segment'):
        run(f'masks | segment({codes!r})', record)


def test_masks_are_read_as_they_are_stored():
    """Sixteen bits, whose low values are not black; a palette, whose colours are no numbers but may be black."""
    numbers = np.array([[0, 1, 2], [2, 300, 0]], np.uint16)
    palette = Image.new('P', (3, 2))
    palette.putdata([0, 1, 2, 2, 3, 0])
    palette.putpalette([9, 9, 9, 0, 0, 0, 200, 0, 0, 200, 0, 0])
    boxes = {'bbox': [[0, 0, 1, 1]] * 2, 'label': ['a', 'b']}
    for picture, seen in ((Image.fromarray(numbers), numbers > 0), (palette, numbers != 1)):
        data = io.BytesIO()
        picture.save(data, 'PNG')
        made = run('masks', {'objects': boxes, 'instances': data.getvalue()})
        np.testing.assert_array_equal(made['objects']['mask'], [numbers == 1, numbers == 2])
        made = run('masks', {'objects': boxes | {'mask': [data.getvalue()] * 2}})
        np.testing.assert_array_equal(made['objects']['mask'], [seen] * 2)


def test_masks_are_of_the_pictures_aspect_ratio():
    """A photo that EXIF turns, and its mask: turned, of another size, or not turned."""
    data, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new('RGB', (64, 41)).save(data, 'JPEG', exif=exif)
    boxes = {'bbox': [[0, 0, 1, 1]], 'label': ['a']}
    for looks in ('decode', 'decode | resize(24)', 'decode_resize(24)'):
        for shape in ((64, 41), (32, 21), (16, 10), (129, 82), (3, 2), (41, 64), (24, 24), (64, 46)):
            record = {'image': data.getvalue(), 'objects': boxes | {'mask': [np.ones(shape, np.uint8)]}}
            if shape[1] in (64, 24, 46):
                with pytest.raises(
                    ValueError, match=f'masks have {shape[0]}×{shape[1]} pixels and the picture, .* 64×41'
                ):
                    run(f'{looks} | masks', record)
            else:
                assert run(f'{looks} | masks', record)['objects']['mask'].shape == (1, *shape)
    record = {'image': np.zeros((101, 100, 3), np.uint8), 'objects': boxes | {'mask': [np.ones((100, 101), np.uint8)]}}
    with pytest.raises(ValueError, match='masks have 100×101'):
        run('decode | masks', record)


def test_masks_of_a_jsonl_file(tmp_path):
    line = {'image': 'a.png', 'instances': 'b.png', 'objects': {'bbox': [[0, 0, 1, 1]], 'mask': ['masks/a.png']}}
    found = jsonl.parse(json.dumps(line).encode(), tmp_path, 'here')
    assert found['objects']['mask'] == [tmp_path / 'masks/a.png'] and found['instances'] == tmp_path / 'b.png'
    for mask in ('../a.png', '/etc/a.png'):
        with pytest.raises(BadRecord, match=r'here: instances .* is not below'):
            jsonl.parse(json.dumps(line | {'instances': mask}).encode(), tmp_path, 'here')
        line['objects']['mask'] = [mask]
        with pytest.raises(BadRecord, match=r'here: mask .* is not below'):
            jsonl.parse(json.dumps(line).encode(), tmp_path, 'here')
    line['objects']['mask'] = 'a.png'
    with pytest.raises(BadRecord, match='no column of paths'):
        jsonl.parse(json.dumps(line).encode(), tmp_path, 'here')


def test_run_lengths_by_hand():
    """COCO's: down the columns, outside first."""
    mask = np.array([[0, 1, 1], [0, 1, 0]], bool)
    assert run_lengths.to_text(mask) == '{"size":[2,3],"counts":[2,3,1]}'
    assert run_lengths.to_text(~mask) == '{"size":[2,3],"counts":[0,2,3,1]}'
    for shape in ((1, 1), (7, 5), (3, 40)):
        for share in (0.0, 0.3, 1.0):
            mask = np.random.default_rng(0).random(shape) < share
            np.testing.assert_array_equal(run_lengths.from_text(run_lengths.to_text(mask)), mask)
    for text in ('', '[]', '{"size":[2,2],"counts":[3]}', '{"size":[2,2],"counts":[-1,5]}', '{"size":[2,2]}'):
        with pytest.raises(ValueError, match='no run lengths'):
            run_lengths.from_text(text)


def test_what_a_text_begins_with():
    place, mask = coordinates.box_to_text(0, 0, 0.5, 1), coordinates.mask_to_text(range(112, 128))
    assert mask.startswith('<seg112><seg113>') and mask.endswith('<seg127>')
    box, codes, rest = coordinates.first_mask(f' {place}{mask} boat ; {place}')
    assert box == (0, 0, 512 / 1023, 1) and codes == list(range(112, 128)) and rest == f' boat ; {place}'
    assert coordinates.first_mask(f'{place} boat')[1:] == ([], ' boat')
    assert coordinates.first_mask(f'{place}{mask[:-8]}')[1] == []  # fifteen
    for text in (
        '',
        'boat',
        f'a {place}',
        '<loc0001><loc0000><loc0001><loc0009>',
        '<loc0000><loc0000><loc1024><loc0009>',
    ):
        assert coordinates.first_mask(text) is None
