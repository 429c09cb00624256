"""A file of JSON lines as a dataset: what is read, from where, and every mistake in one line with the line's number."""

import json
import logging
import pickle

import numpy as np
import pytest
from PIL import Image

from big_vlm import config
from big_vlm.config import UserError
from big_vlm.data import jsonl, loader, sources
from big_vlm.data.contract import Contract
from big_vlm.data.indexed import BadRecord
from big_vlm.data.tokenizer import Tokenizer

NAMES = ('red', 'green', 'blue', 'white')
PIPELINE = 'decode | resize(32) | text("caption")'


@pytest.fixture
def folder(tmp_path):
    """Four pictures, and captions.jsonl about them: empty lines, line ends of two bytes, none at the end."""
    (tmp_path / 'walls').mkdir()
    for i, name in enumerate(NAMES):
        Image.new('RGB', (20, 30), (60 * i,) * 3).save(tmp_path / 'walls' / f'{name}.png')
    lines = [json.dumps({'image': f'walls/{name}.png', 'caption': f'a {name} wall ü'}) for name in NAMES]
    text = f'{lines[0]}\r\n\r\n{lines[1]}\n  \n \t \r\n{lines[2]}\n\n{lines[3]}'
    (tmp_path / 'captions.jsonl').write_bytes(text.encode())
    return tmp_path


def write(folder, *lines):
    path = folder / 'other.jsonl'
    path.write_bytes(b'\n'.join(line if isinstance(line, bytes) else line.encode() for line in lines) + b'\n')
    return str(path)


def captions(source):
    return [record['caption'].split()[1] for record in source]


def test_records(folder):
    source = sources.load(f'{folder}/captions.jsonl', 'train')
    assert len(source) == 4 and captions(source) == list(NAMES)
    assert source[2] == {'image': folder / 'walls/blue.png', 'caption': 'a blue wall ü'}
    assert [r['caption'] for r in source.__getitems__([3, 0])] == ['a white wall ü', 'a red wall ü']
    assert pickle.loads(pickle.dumps(source))[1] == source[1]
    with pytest.raises(IndexError, match='has 4 records, not one at 4'):
        source[4]


def test_lines_across_the_chunks_of_the_index(folder, monkeypatch):
    whole = jsonl.JsonLines(folder / 'captions.jsonl')
    for size in (1, 7, 50):
        monkeypatch.setattr(jsonl, '_CHUNK', size)
        assert list(jsonl.JsonLines(folder / 'captions.jsonl')) == list(whole)


@pytest.mark.parametrize(
    ('split', 'names'),
    [('train[:50%]', NAMES[:2]), ('train[3:]', NAMES[3:]), ('train[:1]+train[2:3]', (NAMES[0], NAMES[2]))],
)
def test_parts_of_the_split(folder, split, names):
    assert captions(sources.load(f'{folder}/captions.jsonl', split)) == list(names)


def test_a_relative_path_begins_at_data_dir_or_here(folder, monkeypatch):
    assert captions(sources.load('captions.jsonl', 'train', str(folder))) == list(NAMES)
    monkeypatch.chdir(folder / 'walls')
    assert captions(sources.load('../captions.jsonl', 'train')) == list(NAMES)


def test_where(folder):
    source = sources.load(f'{folder}/captions.jsonl', 'train')
    assert captions(sources.subset(source, {'caption': ['a red wall ü', 'a white wall ü']})) == ['red', 'white']
    with pytest.raises(UserError, match="unknown field 'captoin'.*did you mean 'caption'"):
        sources.subset(source, {'captoin': 'a red wall'})


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('{"image": "a.png"', ':3: the line is not JSON: Expecting'),
        (b'{"image": "\xff"}', ':3: the line is not JSON: '),
        ('[' * 100_000, ':3: the line is not JSON: '),
        ('{"image": "a.png", "caption": "\\ud83d"}', ':3: the line is not JSON: half of a character'),
        (b'{"image": "a.png", "caption": "\xed\xa0\xbd"}', ':3: the line is not JSON: half of a character'),
        ('["a.png"]', ':3: a line must be one JSON object'),
        ('{"image": 3}', ":3: no text in 'image'"),
        ('{"image": null}', ":3: no text in 'image'"),
        ('{"image": "../a.png"}', ":3: image '../a.png' is not below"),
        ('{"image": "walls/../../a.png"}', ":3: image 'walls/../../a.png' is not below"),
        ('{"image": "/etc/passwd"}', ":3: image '/etc/passwd' is not below"),
        ('{"image": "a\\u0000.png"}', 'is not below'),
    ],
)
def test_a_bad_line_is_named(folder, line, message):
    source = sources.load(write(folder, '{"image": "a.png"}', '', line), 'train')
    with pytest.raises(BadRecord) as error:
        source[1]
    assert f'{folder}/other.jsonl' in str(error.value) and message in str(error.value)
    assert '\n' not in str(error.value)


def test_what_is_no_dataset(folder):
    with pytest.raises(UserError, match='other.jsonl: no lines'):
        sources.load(write(folder, '', ' '), 'train')
    long = write(folder, '{"image": "a.png"}', f'{{"image": "{"a" * jsonl.MAX_LINE}"}}')
    with pytest.raises(UserError, match='other.jsonl:2: the line is longer than 1048576 bytes'):
        sources.load(long, 'train')
    name = f'{folder}/captions.jsonl'
    for split, message in (
        ('validation', "unknown split 'validation' .*: valid: train"),
        ('train[:x]', 'Error parsing split'),
        ('train[9:]', 'incompatible with 4 examples'),
        ('train[2:2]', 'no records'),
    ):
        with pytest.raises(UserError, match=message) as error:
            sources.load(name, split)
        assert '\n' not in str(error.value)


def test_it_is_checked_without_being_read(folder):
    name = write(folder, 'no JSON')
    sources.check(name, 'train', where='data.sources.a')
    with pytest.raises(UserError, match=r"data.sources.a: dataset '.*none.jsonl': no file"):
        sources.check(f'{folder}/none.jsonl', 'train', where='data.sources.a')
    with pytest.raises(UserError, match="data.sources.a: unknown split 'test'"):
        sources.check(name, 'test', where='data.sources.a')


def test_batches(folder, caplog):
    """A picture that is not there, or not below the folder, is a bad example and replaced; a field that is not there
    stops the run."""
    with open(folder / 'captions.jsonl', 'ab') as file:
        file.write(b'\n{"image": "walls/none.png", "caption": "a missing wall"}')
        file.write(b'\n{"image": "/walls/red.png", "caption": "a wall elsewhere"}')
    source = config.Source(dataset='captions.jsonl', pipeline=PIPELINE)
    data = config.Data(sources={'walls': source}, data_dir=str(folder))
    tokenizer = Tokenizer.train(loader.training_texts(data), 400, folder / 't.model')
    contract = Contract.make(config.Contract(image_size=32, text_length=16), tokenizer)
    with caplog.at_level(logging.WARNING):
        batch = loader.train_batches(data, contract, tokenizer, 6, seed=0)[0]
    assert batch['replaced'].sum() == 2 and 'none.png' in caplog.text and "'/walls/red.png' is not below" in caplog.text
    for image, text in zip(batch['image'], batch['text'], strict=True):
        assert np.all(image == 60 * NAMES.index(tokenizer.decode(text).split()[1]))

    wrong = config.Source(dataset='captions.jsonl', pipeline=PIPELINE.replace('caption', 'title'))
    data = config.Data(sources={'walls': wrong}, data_dir=str(folder))
    with pytest.raises(UserError, match="data.sources.walls: unknown field 'title'"):
        loader.train_batches(data, contract, tokenizer, 4, seed=0)[0]


def test_a_first_line_that_lacks_a_field(folder):
    """It is a bad example; what no line has is a mistake of the pipeline."""
    good = [json.dumps({'image': f'walls/{name}.png', 'caption': f'a {name} wall'}) for name in NAMES]
    path = write(folder, '{"image": "walls/red.png"}', *good)
    data = config.Data(sources={'walls': config.Source(dataset=path, pipeline=PIPELINE)})
    texts = list(loader.training_texts(data))
    assert texts == [f'a {name} wall' for name in NAMES]
    tokenizer = Tokenizer.train(texts, 400, folder / 't.model')
    contract = Contract.make(config.Contract(image_size=32, text_length=16), tokenizer)
    batch = loader.train_batches(data, contract, tokenizer, 5, seed=0)[0]
    assert batch['replaced'].sum() == 1 and 0 not in batch['id'][:, 1]
    # Where no line has all fields, none tells that it is the pipeline: then all of them do.
    path = write(folder, '{"image": "walls/red.png", "note": 1}', '{"image": "walls/red.png", "remark": 1}')
    data = config.Data(sources={'walls': config.Source(dataset=path, pipeline=PIPELINE)})
    with pytest.raises(
        UserError, match="walls: no record has text for a tokenizer, the last one: unknown field 'caption'"
    ):
        list(loader.training_texts(data))
    with pytest.raises(UserError, match="walls: 21 of 21 examples failed, .* unknown field 'caption'"):
        loader.train_batches(data, contract, tokenizer, 2, seed=0)[0]
