"""Several images of one example, and videos as frames: from a file of lines, through training, to answers."""

import json
import re

import cv2
import numpy as np
import pytest
from PIL import Image
from small_bundle import GENERATIVE, SIZE, make, pictures, train_tokenizer

from big_vlm import bundle, config
from big_vlm.config import UserError
from big_vlm.data import prompts, sources, transforms, videos
from big_vlm.data.contract import Contract
from big_vlm.training import stages
from tools import generate

READ = 'resize(8) | prefix("caption en") | suffix("{caption}") | tokenize'
TWO = GENERATIVE | {'contract': GENERATIVE['contract'] | {'images': 2}}
PER_IMAGE = 4


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp('t'))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Lines about two pictures, about one, and a film of eight grey frames, in all the ways to keep it."""
    path = tmp_path_factory.mktemp('lines')
    for i, picture in enumerate(pictures(2)):
        Image.fromarray(picture).save(path / f'{i}.png')
    frames = [np.full((16, 24, 3), 30 * i, np.uint8) for i in range(8)]
    first, *more = map(Image.fromarray, frames)
    first.save(path / 'film.gif', save_all=True, append_images=more)
    written = cv2.VideoWriter(str(path / 'film.avi'), cv2.VideoWriter_fourcc(*'MJPG'), 4, (24, 16))
    for frame in frames:
        written.write(frame)
    written.release()
    (path / 'lines.jsonl').write_text(
        ''.join(
            json.dumps({'image': image, 'caption': 'a red three'}) + '\n'
            for image in (['0.png', '1.png'], ['1.png'], 'film.gif', ['0.png', '1.png', '0.png'], '0.png')
        )
    )
    return path


def contract(tokenizer, **settings):
    return Contract.make(config.Contract(image_size=SIZE, text_length=24, **settings), tokenizer, 2 * PER_IMAGE)


@pytest.mark.parametrize('name', ['film.gif', 'film.avi'])
def test_frames_are_as_far_apart_as_can_be(folder, name):
    grey = lambda found: [round(float(frame.mean()) / 30) for frame in found]  # noqa: E731
    assert grey(videos.frames(folder / name, 4)) == [1, 3, 5, 7]
    assert grey(videos.frames((folder / name).read_bytes(), 1)) == [4]
    assert grey(videos.frames(folder / name, 20)) == list(range(8))
    assert {frame.shape for frame in videos.frames(folder / name, 2)} == {(16, 24, 3)}


def test_a_video_may_be_a_list_an_array_or_a_picture(folder):
    frames = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((6, 2, 2, 3), np.uint8)
    for video in (frames, list(frames)):
        assert [frame[0, 0, 0] for frame in videos.frames(video, 3)] == [1, 3, 5]
    [picture] = videos.frames(folder / '0.png', 3)
    np.testing.assert_array_equal(picture, pictures(2)[0])
    for broken in (b'no film', []):
        with pytest.raises(ValueError):
            videos.frames(broken, 2)


def test_a_gif_that_is_cut_anywhere_is_refused(folder):
    film = (folder / 'film.gif').read_bytes()
    assert len(videos.frames(film + b'behind its end', 2)) == 2
    for end in range(40, len(film), 7):
        with pytest.raises(ValueError, match='cut short'):
            videos.frames(film[:end], 2)


def test_rows_of_several_images(folder, tokenizer):
    """Fewer images than may be leave padding, and the text counts on behind those that are there."""
    source = sources.load(f'{folder}/lines.jsonl', 'train')
    context = transforms.Context(contract(tokenizer, images=2), tokenizer, train=True)
    two, one, film, three, alone = (source[i] for i in range(5))
    of_list, of_film = (transforms.parse(f'{begin} | {READ}', where='') for begin in ('decode', 'frames(2)'))
    row = of_list(two, context)
    assert row['image'].shape == (2, SIZE, SIZE, 3) and row['image_mask'].tolist() == [True, True]
    assert row['segment'][:8].tolist() == [1] * 8 and row['position'][:10].tolist() == list(range(10))
    fewer = of_list(one, context)
    np.testing.assert_array_equal(fewer['image'], [row['image'][1], np.zeros((SIZE, SIZE, 3))])
    assert fewer['image_mask'].tolist() == [True, False] and fewer['segment'][:9].tolist() == [1] * 4 + [0] * 4 + [1]
    assert fewer['position'][:10].tolist() == [0, 1, 2, 3, 0, 0, 0, 0, 4, 5]
    np.testing.assert_array_equal(of_list(alone, context)['image'][0], row['image'][0])
    assert of_film(film, context)['image'].mean((1, 2, 3)).round().tolist() == [60, 180]
    assert of_film(three, context)['image_mask'].tolist() == [True, True]
    with pytest.raises(ValueError, match=r'3 pictures, and contract\.images is 2'):
        of_list(three, context)
    with pytest.raises(ValueError, match='resize_small takes one picture, and this example has 2'):
        transforms.parse('decode | resize_small(8)', where='')(two, context)
    with pytest.raises(UserError, match=r'a: frames\(3\), but contract\.images is 2: raise it'):
        transforms.parse(f'frames(3) | {READ}', where='').check_size(context.contract, 'a')


def test_a_causal_prompt():
    """As Gemma 3 reads it: an image sees itself, a token what is before it."""
    ids = dict(vocab_size=99, pad_id=0, bos_id=2, eos_id=1, tokenizer_sha256='')
    settings = dict(image_size=8, resample='bilinear', antialias=True, value_range=(-1.0, 1.0), lower=True, eos=True)
    made = Contract(
        **settings, **ids, text_length=6, separator='', separator_ids=(), image_tokens=4, images=2, causal_prompt=True
    )
    row = prompts.generative_row([7, 8], [9], made)
    assert row['mask_ar'].tolist() == [1, 0, 1, 0, 1, 1, 1, 1, 1, 0]
    assert row['text'].tolist() == [-1] * 4 + [2, 7, 8, 9, 1, 0]


@pytest.mark.parametrize(
    ('stage', 'message'),
    [
        ({'contract': {'max_patches': 16, 'images': 2}}, 'several images do not go with contract.max_patches'),
        (
            {'contract': {'images': 2}, 'model': GENERATIVE['model'] | {'projector': 'none'}},
            "contract.images: several images do not go with model.projector 'none'",
        ),
    ],
)
def test_what_does_not_go_together(stage, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config.parse_stage(GENERATIVE | stage)


@pytest.mark.slow
def test_an_image_that_is_missing_changes_nothing(tokenizer):
    """A model of two images given one is that of one image; of two, each has its place."""
    two, single = make(TWO, tokenizer), make(GENERATIVE, tokenizer)
    both = bundle.Bundle(two.stage, two.contract, tokenizer, single.params, two.mesh)
    a, b = pictures(2)
    asked = ['caption en', 'detect three'], ['a red three', 'in the top']
    np.testing.assert_allclose(both.score([a, b], *asked), single.score([a, b], *asked), rtol=1e-5)
    ordered, turned = both.score([[a, b], [b, a]], 'caption en', 'a red three')
    assert abs(ordered - turned) > 1e-4
    answers, said = both.generate([[a, b], a], 'caption en', max_new_tokens=4), single.generate(a, 'caption en')
    assert answers[1].ids == said[0].ids[:4]
    scored = both.score_each([[a, b]], 'caption en', answers[0].text)[0]
    if scored.ids[: len(answers[0].ids)] == answers[0].ids:
        np.testing.assert_allclose(scored.log_probs[:4], answers[0].log_probs, rtol=1e-3)
    for wrong, message in (([[a, b, a]], r'images\[0\]: 3 images, and this model takes 2'), (None, 'no images')):
        with pytest.raises(UserError, match=message):
            both.generate(wrong, 'caption en')


@pytest.mark.slow
def test_from_a_file_to_an_answer(folder, tokenizer, tmp_path, capsys):
    """Two steps of training on lists, single pictures and a film, then the same files through the command."""
    one = dict(dataset=f'{folder}/lines.jsonl')
    data = {
        'sources': {'lists': one | {'pipeline': f'decode | {READ}'}, 'films': one | {'pipeline': f'frames(2) | {READ}'}}
    }
    run = TWO | {
        'data': data,
        'total': {'steps': 2},
        'batch_size': 8,
        'tokenizer': {'path': tokenizer.path},
    }
    checked = config.validate(run)
    stages.check(checked)
    [path] = stages.run(checked, tmp_path / 'run').values()
    model = bundle.load(path)
    assert (model.contract.images, model.contract.image_tokens) == (2, 2 * PER_IMAGE)
    pair, film = [folder / '0.png', folder / '1.png'], folder / 'film.gif'
    expected = [answer.text for answer in model.generate([pair, film], 'caption en', max_new_tokens=4)]
    frames = videos.frames(film, 2)
    assert model.generate([frames], 'caption en', max_new_tokens=4)[0].text == expected[1]
    capsys.readouterr()
    words = [str(path), '--prompt=caption en', '--max_new_tokens=4']
    assert generate.main([*words, *(f'--image={one}' for one in pair), '--together']) == 0
    assert generate.main([*words, f'--image={film}']) == 0
    assert capsys.readouterr().out == ''.join(f'{text}\n' for text in expected)
    asked, out = tmp_path / 'asked.jsonl', tmp_path / 'out.jsonl'
    asked.write_text('{"image": ["0.png", "1.png"], "prompt": "caption en"}\n')
    assert (
        generate.main([str(path), f'--requests={asked}', f'--images={folder}', f'--out={out}', '--max_new_tokens=4'])
        == 0
    )
    line = json.loads(out.read_text())
    assert (line['image'], line['text']) == (['0.png', '1.png'], expected[0])
