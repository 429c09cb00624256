"""What people's data is like: fixed by rule, or replaced, counted and named, while training goes on."""

import io
import json
import logging

import cv2
import numpy as np
import pytest
from PIL import Image

from big_vlm import config
from big_vlm.config import UserError
from big_vlm.data import eval_loader, images, loader
from big_vlm.data.contract import Contract
from big_vlm.data.tokenizer import Tokenizer

SIZE = 8


def saved(image, kind='PNG', **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


# Of EXIF's orientation tag: what was done to the picture before it was saved, by number.
TURNED = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, 1),
    7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, -1),
}


def moving(kind):
    """Red, then black and green."""
    first, *others = (Image.new('RGB', (9, 9), color) for color in ((200, 0, 0), (0, 0, 0), (0, 200, 0)))
    return saved(first, kind, save_all=True, append_images=others, **({'lossless': True} if kind == 'WEBP' else {}))


FIXED = {
    'one_pixel': saved(Image.new('RGB', (1, 1), (200, 0, 0))),
    'long': saved(Image.new('RGB', (20_000, 3), (200, 0, 0))),
    'tall': saved(Image.new('RGB', (2, 20_000), (200, 0, 0)), 'TIFF'),
    'cmyk': saved(Image.new('CMYK', (9, 9), (0, 255, 255, 55)), 'JPEG', quality=95),
    'sixteen_bits': saved(Image.fromarray(np.full((9, 9), 200 * 257, np.uint16))),
    'sixteen_bit_colors': cv2.imencode('.png', np.full((9, 9, 3), (0, 0, 200 * 257), np.uint16))[1].tobytes(),
    **{f'animated_{kind}': moving(kind) for kind in ('GIF', 'WEBP', 'PNG')},
    'palette': saved(Image.new('RGB', (9, 9), (200, 0, 0)).quantize(4)),
    'grey_alpha': saved(Image.new('LA', (9, 9), (200, 30))),
}
REPLACED = {
    'bomb': saved(Image.new('1', (20_000, 20_000))),
    'cut': saved(Image.new('RGB', (300, 300), (200, 0, 0)), 'JPEG')[:400],
    'text': b'no picture at all',
    'empty': b'',
}


@pytest.mark.parametrize('name', FIXED)
def test_fixed(name):
    pixels = images.resize(images.decode(FIXED[name]), SIZE, 'bilinear', True)
    assert pixels.shape == (SIZE, SIZE, 3) and pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels[..., 0].astype(int), 200, atol=4)
    assert name in ('sixteen_bits', 'grey_alpha') or pixels[..., 1:].max() <= 4


@pytest.mark.parametrize('orientation', TURNED)
@pytest.mark.parametrize('kind', ['PNG', 'JPEG'])
def test_turned_as_its_exif_says(kind, orientation):
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :16], pixels[:16, 32:], pixels[16:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(np.ascontiguousarray(TURNED[orientation](pixels))), kind, exif=exif)
    decoded = images.decode(data)
    assert decoded.shape == pixels.shape and np.abs(decoded.astype(int) - pixels).mean() < 5


@pytest.mark.parametrize('name', REPLACED)
def test_refused_before_it_takes_memory(name):
    for read in (images.decode, images.levels):
        with pytest.raises(ValueError, match='not an image|cannot decode|more than 89,478,485|exceeds limit'):
            read(REPLACED[name])


@pytest.fixture
def folder(tmp_path):
    """Twenty good lines for every bad one."""
    lines = []
    for name, data in (FIXED | REPLACED).items():
        (tmp_path / f'{name}.png').write_bytes(data)
    good = '{"image": "one_pixel.png", "caption": "a red wall"}'
    bad = [json.dumps({'image': f'{name}.png', 'caption': f'a {name} wall'}) for name in (*REPLACED, 'missing')]
    bad += ['{"image": "one_pixel.png"}', '{"image": "one_pixel.png", "caption": null}']
    bad += ['{"image": "one_pixel.png"', '{"caption": "no picture"}', '{"image": "one_pixel.png", "caption": " "}']
    bad.append('{"image": "one_pixel.png", "caption": ["a wall", "a red one"]}')
    for line in bad:
        lines += [line, *[good] * 20]
    lines[-1] = json.dumps({'image': 'one_pixel.png', 'caption': 'a red wall ' * 20})
    (tmp_path / 'captions.jsonl').write_text('\n'.join(lines))
    return tmp_path, len(bad), len(lines)


def prepared(folder, pipeline, **task):
    data = config.Data(
        sources={'walls': config.Source(dataset='captions.jsonl', pipeline=pipeline)}, data_dir=str(folder)
    )
    tokenizer = Tokenizer.train(['a red wall', 'caption en'] * 9, 300, folder / 't.model')
    contract = Contract.make(config.Contract(image_size=SIZE, text_length=32), tokenizer, **task)
    return data, contract, tokenizer


@pytest.mark.parametrize(
    ('pipeline', 'task'),
    [
        ('text("caption")', {}),
        ('prefix("caption en") | suffix("{caption}") | tokenize', {'image_tokens': 4}),
    ],
)
def test_training_goes_on(folder, caplog, pipeline, task):
    folder, bad, lines = folder
    data, contract, tokenizer = prepared(folder, f'decode | resize({SIZE}) | {pipeline}', **task)
    with caplog.at_level(logging.WARNING):
        batch = loader.train_batches(data, contract, tokenizer, lines, seed=0)[0]  # one epoch
    assert batch['replaced'].sum() == bad
    assert caplog.text.count('replaced') == 5 and 'further ones are only counted' in caplog.text
    assert (batch['image'].reshape(lines, -1, 3)[:, 0, 0] == 200).all()
    if 'cut' in batch:  # an answer that is longer than its row
        assert batch['id'][batch['cut'], 1].tolist() == [lines - 1]
        assert f'record {lines - 1}: its answer does not fit into 32 text slots and is cut' in caplog.text


def test_over_a_tenth_stops_with_one_line(folder):
    folder, *_ = folder
    good = (folder / 'captions.jsonl').read_text().splitlines()[1]
    lines = ([good] * 5 + ['{"image": "one_pixel.png"']) * 60
    (folder / 'captions.jsonl').write_text('\n'.join(lines))
    data, contract, tokenizer = prepared(folder, f'decode | resize({SIZE}) | text("caption")')
    with pytest.raises(
        UserError, match=r'data.sources.walls: \d+ of \d+ examples failed, .* the line is not JSON'
    ) as error:
        loader.train_batches(data, contract, tokenizer, len(lines), seed=0)[0]
    assert '\n' not in str(error.value)


def test_an_evaluation_names_what_it_cannot_read(folder, caplog):
    from big_vlm.data import sources, transforms

    folder, _, lines = folder
    _, contract, tokenizer = prepared(folder, '')
    source = sources.load('captions.jsonl', 'train', str(folder))
    pipeline = transforms.parse(f'decode | resize({SIZE})', where='')
    with caplog.at_level(logging.WARNING):
        batches = list(eval_loader.eval_batches(source, pipeline, contract, tokenizer, 16))
    unreadable = len(REPLACED) + 3  # no file, no JSON, no picture: this pipeline has no use for texts
    assert sum(len(records) for _, records in batches) == lines - unreadable
    assert 'captions.jsonl:train: record 0 left out: ' in caplog.text and caplog.text.count('left out') == 5


def test_boxes_are_cut_at_the_edge():
    from big_vlm.data import operations, transforms

    boxes = [[-0.5, 0.2, 0.5, 1.7], [1.2, 0.0, 1.4, 0.3], [0.6, 0.6, 0.4, 0.9], [0.1, 0.1, 0.2, 0.2]]
    example = {'objects': {'bbox': boxes, 'label': ['a', 'b', 'c', 'd']}}
    contract = type('Contract', (), {'lower': True})
    operations.detect(example, transforms.Context(contract, None, train=True), 'digit')
    assert example['boxes'].tolist() == [[0.0, 0.2, 0.5, 1.0], [0.1, 0.1, 0.2, 0.2]]
    assert example['suffix'].count(' ; ') == 1 and example['suffix'].endswith(' d')
    with pytest.raises(ValueError, match='no objects inside its picture'):
        operations.detect(
            {'objects': {'bbox': boxes[1:3], 'label': ['b', 'c']}}, transforms.Context(contract, None, train=True)
        )
