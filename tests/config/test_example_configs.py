"""The configs that ship are valid: what `--check` finds, on shapes alone, without a dataset."""

import json
import pathlib

import numpy as np
import pytest

from big_vlm import bundle, config
from big_vlm.config import UserError
from big_vlm.data import mask_codes, sources
from big_vlm.training import stages

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize('arg', ['', ':smoke'])
@pytest.mark.parametrize('name', ['quickstart', 'digits', 'ocr'])
def test_it_is_valid(name, arg, monkeypatch):
    def load(*args):
        raise AssertionError('the check needs no records')

    monkeypatch.setattr(sources, 'load', load)
    checked = config.validate(config.load_config(f'{ROOT}/configs/{name}.py{arg}'))
    stages.check(checked)
    assert len(checked) > (name != 'ocr')


@pytest.mark.slow
def test_codes_are_trained_and_then_said(tiny_digit_scenes, tmp_path, one_device):
    """From masks to a codebook's file, and from that to a decoder's answers and their score."""
    made = load('mask_vqvae.py', f'smoke,data_dir={tiny_digit_scenes}', {'masks.total.steps': '2'})
    stages.check(made)
    stages.run(made, tmp_path / 'codes')
    codes = tmp_path / 'codes' / 'masks' / 'masks.npz'
    assert mask_codes.read(codes).keys() == mask_codes.SHAPES.keys() | mask_codes.OF_TRAINING.keys()
    model = bundle.load(tmp_path / 'codes' / 'masks' / 'bundle')
    mask = np.zeros((1, 64, 64), np.uint8)
    mask[:, 8:40, 20:] = 255
    said = model.task.predict['encode'](model.params, {'mask': mask})
    np.testing.assert_array_equal(said, mask_codes.load(str(codes)).encode(mask / 255))
    for use in (
        lambda: bundle.convert(tmp_path / 'codes' / 'masks' / 'bundle', tmp_path / 'no.npz'),
        lambda: bundle.export(model, tmp_path / 'no', max_new_tokens=1, platforms=('cpu',)),
    ):
        with pytest.raises(UserError, match=r'masks\.npz'):
            use()
    scores = json.loads((tmp_path / 'codes' / 'masks' / 'evals.json').read_text())
    assert 0 < scores['objects']['mask_iou']['score'] < 1 and scores['shapes']['mask_iou']['n'] == 32
    made = config.load_config(f'{ROOT}/configs/segmentation.py:codes={codes},smoke,split=validation')['segment']
    made |= dict(init_from={}, tokenizer={'vocab_size': 512}, total={'steps': 2}, batch_size=8)
    made['data']['data_dir'] = tiny_digit_scenes
    del made['evals']['segment_one']
    made = config.validate(made)
    stages.check(made)
    [made] = stages.run(made, tmp_path / 'run').values()
    scores = json.loads((made.parent / 'evals.json').read_text())['segment']
    assert scores.keys() >= {'mask_iou', 'box_accuracy'} and scores['mask_iou']['n'] == 16
    lines = (made.parent / 'predictions_segment.jsonl').read_text().splitlines()
    assert all(json.loads(line)['truth'][0].startswith('<loc') for line in lines)


@pytest.mark.slow
def test_segmentation_without_codes(tmp_path):
    with pytest.raises(UserError, match='codes=FILE'):
        load('segmentation.py', '')
    with pytest.raises(UserError, match=r'none\.npz: cannot be read'):
        whole = config.load_config(f'{ROOT}/configs/segmentation.py:codes={tmp_path / "none.npz"}')
        whole['segment'] |= dict(init_from={}, tokenizer={})
        stages.check(config.validate(whole))


def load(name, arg, changes=None):
    return config.validate(config.load_config(f'{ROOT}/configs/{name}:{arg}', changes))
