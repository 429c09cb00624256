"""The transfers: valid at full size, on shapes alone; two steps of each, in the slow tests, on a stand-in."""

import atexit
import dataclasses
import functools
import json
import pathlib
import re
import shutil
import tempfile

import mask_weights
import numpy as np
import pytest
from PIL import Image

from big_vlm import config
from big_vlm.config import UserError
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.training import stages

ROOT = pathlib.Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / 'configs' / 'transfers').glob('*.py') if path.stem != 'recipe')
VARIED = ('coco35l', 'forkme', 'refcoco_boxes', 'vqav2')
RECORD = {
    'prefix': 'caption en',
    'suffix': 'two boats',
    'captions': ['two boats at a quay', 'boats'],
    'question': 'how many boats are there?',
    'answer': '2',
    'answers': ['2', 'Two', '2', '2'],
    'choices': ['one', 'two', 'three'],
    'index': 1,
    'hint': 'a harbour',
    'answer_type': 'number',
    'question_type': 'count',
    'simple': True,
    'domain': 'near-domain',
    'objects': {'bbox': [[0.1, 0.2, 0.5, 0.6]], 'label': ['left boat'], 'mask': ['mask.png']},
}


@functools.cache
def codes():
    folder = pathlib.Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return mask_weights.save(folder / 'codes.npz')


def load(name, *args):
    own = ['data=mine.jsonl'] if name == 'forkme' and not any('data=' in arg for arg in args) else []
    own += [f'codes={codes()}'] if name == 'refcoco_masks' else []
    text = ','.join([*own, *args])
    return config.validate(config.load_config(f'{ROOT}/configs/transfers/{name}.py:{text}'))['train']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A data_dir with every file that any transfer names, of ten lines."""
    folder = tmp_path_factory.mktemp('transfers')
    for name in NAMES:
        stage = load(name, 'weights=none')
        for part in (*stage.data.sources.values(), *stage.evals.values()):
            file = folder / part.dataset
            file.parent.mkdir(exist_ok=True)
            lines = []
            mask = np.zeros((30, 40), np.uint8)
            mask[4:14, 9:22] = 255
            Image.fromarray(mask).save(file.parent / 'mask.png')
            for i in range(10):
                Image.new('RGB', (40, 30), (20 * i, 0, 0)).save(file.parent / f'{i}.png')
                image = f'{i}.png'
                if 'frames(' in part.pipeline:
                    image = f'{i}.gif'
                    film = [Image.new('RGB', (40, 30), (20 * i, 30 * frame, 0)) for frame in range(4)]
                    film[0].save(file.parent / image, save_all=True, append_images=film[1:])
                elif stage.contract.images > 1:
                    image = [image, '0.png']
                lines.append(json.dumps({'image': image} | RECORD))
            file.write_text('\n'.join(lines))
    return folder


@pytest.fixture(scope='module')
def tokenizer(data):
    Tokenizer.train([json.dumps(RECORD), *map(str, range(100))], 320, data / 'tokenizer.model')
    return data / 'tokenizer.model'


def test_all_of_them():
    assert len(NAMES) >= 20 and {'forkme', 'pope', 'vqav2', 'chartqa', 'coco35l'} <= set(NAMES)


@pytest.mark.parametrize('name', [x if x in VARIED else pytest.param(x, marks=pytest.mark.slow) for x in NAMES])
def test_valid(name, data, tokenizer):
    """What `--check` finds, at every published resolution; the first batch of everything, for a small model."""
    for res in (224, 448, 896):
        stage = load(name, 'weights=none', f'res={res}', f'data_dir={data}', 'fsdp=1')
        assert stage.contract.image_size == res and stage.model.decoder.variant == 'gemma_2b'
        assert stage.optimizer.b2 == 0.999 and stage.model.label_smoothing < 0.5 and stage.evals
        assert 1e-6 < stage.optimizer.lr < 1e-4
        for part in (*stage.data.sources.values(), *stage.evals.values()):
            assert f'resize({res})' in part.pipeline and (data / part.dataset).is_file()
    small = load(name, 'weights=none', f'data_dir={data}', 'runlocal', f'tokenizer={tokenizer}')
    stages.check({'train': small})
    stages.rehearse(small, Tokenizer.load(str(tokenizer)), 'config')


def test_captions_as_tfds_has_them(tokenizer, tmp_path):
    captions = {'id': [1, 2], 'text': ['two boats', 'boats at a quay']}
    Image.new('RGB', (40, 30)).save(tmp_path / '0.png')
    line = json.dumps({'image': '0.png', 'captions': captions})
    for split in ('train', 'val'):
        (tmp_path / f'{split}.jsonl').write_text('\n'.join(4 * [line]))
    own = [f'data={tmp_path}/{{split}}.jsonl', 'weights=none', 'runlocal', f'tokenizer={tokenizer}']
    stages.rehearse(load('cococap', *own, 'captions=captions/text'), Tokenizer.load(str(tokenizer)), 'config')
    with pytest.raises(UserError, match='captions holds fields: write captions/id or captions/text'):
        stages.rehearse(load('cococap', *own), Tokenizer.load(str(tokenizer)), 'config')


@pytest.mark.parametrize('name', ['chartqa', 'gqa'])
def test_full_size(name, data):
    """On shapes alone: the 2.9 B parameters, the rules that match them, a frozen tower."""
    stages.check({'train': load(name, 'weights=none', f'data_dir={data}', 'res=448', 'fsdp=8')})


def step(name, data, tokenizer, folder):
    """Rates that are constants of a compiled step are the same for all: what one has compiled serves the others."""
    stage = load(name, 'weights=none', f'data_dir={data}', 'runlocal', f'tokenizer={tokenizer}')
    stage = dataclasses.replace(stage, optimizer=dataclasses.replace(stage.optimizer, lr=1e-5, weight_decay=0.0))
    checked = {'train': stage}
    stages.check(checked)
    stages.run(checked, folder)
    scores = json.loads((folder / 'train' / 'evals.json').read_text())
    assert scores.keys() == stage.evals.keys()
    for which, metrics in scores.items():
        assert {re.sub('/.*', '', key) for key in metrics} == set(stage.evals[which].metrics)
        assert all(np.isfinite(entry['score']) for entry in metrics.values())


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_two_steps_on_a_stand_in(name, data, tokenizer, tmp_path, one_device):
    step(name, data, tokenizer, tmp_path)


def test_several_images_and_frames():
    for name, images, batch_size in (('nlvr2', 2, 256), ('msvd_qa', 8, 128), ('vatex_cap', 16, 128)):
        stage = load(name, 'weights=none')
        assert (stage.contract.images, stage.batch_size) == (images, batch_size)
        begin = 'decode' if name == 'nlvr2' else f'frames({images})'
        for part in (*stage.data.sources.values(), *stage.evals.values()):
            assert part.pipeline.startswith(f'{begin} | resize(224) | prefix')
    assert load('nlvr2', 'weights=none', 'res=448').optimizer.lr == 3e-6
    assert load('nlvr2', 'weights=none').evals.keys() > {'dev', 'test', 'marvl_sw'}
    assert load('msrvtt_cap', 'weights=none').optimizer.rules[0][1].frozen
    assert load('widgetcap', 'weights=none').model.decoder.dropout == 0.1


def test_settings_of_a_resolution():
    assert load('vqav2', 'weights=none').optimizer.weight_decay == pytest.approx(0.1)
    assert load('vqav2', 'weights=none', 'res=448').optimizer.weight_decay == 0.0
    assert load('infovqa', 'weights=none', 'res=896').batch_size == 32
    tallyqa = load('tallyqa', 'weights=none', 'res=896').optimizer
    assert tallyqa.lr * tallyqa.weight_decay == pytest.approx(7e-7)
    assert load('gqa', 'weights=none', 'res=448').optimizer.rules[0][1].frozen
    assert not load('gqa', 'weights=none').optimizer.rules[0][1].frozen
    assert load('coco35l', 'weights=none').total.examples == 5 * 566_435
    assert set(load('coco35l', 'weights=none', 'languages=en+de').data.sources) == {'en', 'de'}


def test_data_of_another_name():
    stage = load('vqav2', 'weights=none', 'data=hf:vqa')
    assert stage.data.sources['train'].dataset == 'hf:vqa' and stage.evals['val'].split == 'val'
    stage = load('vqav2', 'weights=none', 'data=tar:vqa/{split}.tar')
    assert (stage.evals['val'].dataset, stage.evals['val'].split) == ('tar:vqa/val.tar', 'train')


def test_a_bundle_brings_its_model(tmp_path):
    """A small one is transferred at its own resolution, a PaliGemma at the one asked for; the recipe stays."""

    (tmp_path / 'tokenizer.model').touch()

    def load_with(size):
        stage = dict(task='generative', total=dict(steps=1), contract=dict(image_size=size, resample='bicubic'))
        stage['model'] = dict(image=dict(variant='mu/16'), decoder=dict(width=32, depth=2), dtype='float32')
        stage['data'] = dict(sources=dict(a={}))
        stored = dict(config=config.to_dict(config.parse_stage(stage)))
        (tmp_path / 'bundle.json').write_text(json.dumps(stored))
        return load('okvqa', f'weights={tmp_path}', 'res=448')

    stage = load_with(32)
    assert (stage.model.image.variant, stage.model.decoder.width, stage.model.dtype) == ('mu/16', 32, 'float32')
    assert (stage.contract.image_size, stage.contract.resample, stage.contract.lower) == (32, 'bicubic', True)
    assert 'resize(32)' in stage.data.sources['train'].pipeline
    published = load('okvqa', 'weights=none', 'res=448')
    assert stage.tokenizer.path == str(tmp_path / 'tokenizer.model') and stage.init_from.path == str(tmp_path)
    assert stage.optimizer == published.optimizer and stage.model.decoder.dropout == published.model.decoder.dropout
    assert stage.contract.text_length == published.contract.text_length
    assert load_with(224).contract.image_size == 448


def test_a_public_folder_brings_its_tokenizer():
    folder = ROOT / 'tests' / 'goldens' / 'paligemma'
    stage = load('okvqa', f'weights={folder}')
    assert (stage.init_from.path, stage.tokenizer.path) == (str(folder), str(folder / 'tokenizer.model'))
    assert load('okvqa', f'weights={folder}', 'tokenizer=own.model').tokenizer.path == 'own.model'


def test_a_local_run_begins_from_nothing():
    """No published weights fit its tiny model, so the arguments of a run may stay as they are."""
    stage = load('okvqa', f'weights={ROOT}/tests/goldens/paligemma', 'runlocal')
    assert stage.init_from.path == stage.tokenizer.path == ''


def test_towers_answer_nothing(tmp_path):
    (tmp_path / 'bundle.json').write_text('{"config": {"task": "contrastive"}}')
    with pytest.raises(UserError, match='the bundle of a contrastive model: take one that answers'):
        load('vqav2', f'weights={tmp_path}')


@pytest.mark.parametrize(('name', 'own', 'other'), [('cococap', 'val', 'nocaps'), ('tallyqa', 'test', 'countbench')])
def test_an_evaluation_on_other_data_is_never_the_given_data(name, own, other):
    assert load(name, 'weights=none').evals.keys() == {own, other}
    assert load(name, 'weights=none', 'data=hf:mine').evals.keys() == {own}


@pytest.mark.parametrize('name', ['vqav2', 'ocrvqa'])  # the latter has a limit of its own
def test_a_local_run_evaluates_little(name):
    assert {e.examples for e in load(name, 'weights=none', 'runlocal').evals.values()} == {16}


@pytest.mark.parametrize(
    ('name', 'args', 'message'),
    [
        ('vqav2', '', 'give weights=PATH, or weights=none'),
        ('vqav2', 'weights=none,res=300', 'res=300'),
        ('vqav2', 'weights=none,model=paligemma', 'model=paligemma: one of'),
        ('vqav2', 'weigths=none', "did you mean 'weights'"),
        ('forkme', 'weights=none', 'give your file'),
    ],
)
def test_refused(name, args, message):
    with pytest.raises(UserError, match=message):
        config.load_config(f'{ROOT}/configs/transfers/{name}.py:{args}')


def test_adapters_of_your_own_data():
    stage = load('forkme', 'weights=none', 'lora=8', 'base=int8')
    [(pattern, rule)] = stage.lora.rules
    assert (pattern, rule.rank, rule.alpha, stage.lora.base_dtype) == ('.*', 8, 8.0, 'int8')
    assert (stage.optimizer.lr, stage.optimizer.weight_decay, stage.optimizer.rules) == (2e-4, 0.0, ())
    assert load('forkme', 'weights=none', 'lora=8', 'freeze_image').lora.rules[0][0] == 'llm/.*'
    assert not load('forkme', 'weights=none').lora.rules


def test_every_one_is_documented():
    text = (ROOT / 'docs' / 'transfers.md').read_text()
    assert [name for name in NAMES if f'`{name}`' not in text] == []
