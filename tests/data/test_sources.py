"""Reading datasets by name: plain records, one writer at a time, errors that name the fix, and never TensorFlow."""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from big_vlm.config import UserError
from big_vlm.data import records, sources


def test_records_are_plain_values(tiny_digit_scenes):
    record = sources.load('digit_scenes/cells_tiny', 'train', tiny_digit_scenes)[0]
    assert type(record['caption']) is str and type(record['num_digits']) is int and type(record['held_out']) is bool
    assert record['image'].startswith(b'\x89PNG') and record['instances'].startswith(b'\x89PNG')
    assert all(type(word) is str for word in record['questions']['question'])
    assert record['objects']['bbox'].dtype == np.float32 and record['objects']['bbox'].shape[1] == 4


def test_the_fast_reader_agrees_with_tfds(tiny_digit_scenes):
    source = sources.load('digit_scenes/free_tiny', 'test', tiny_digit_scenes)
    builder = tfds.builder_from_directory(str(Path(tiny_digit_scenes, 'digit_scenes/free_tiny/1.1.0')))
    skip = {'image': tfds.decode.SkipDecoding(), 'instances': tfds.decode.SkipDecoding()}
    for ours, theirs in zip(source, builder.as_data_source('test', decoders=skip), strict=True):
        theirs = records._plain(theirs)
        assert ours.keys() == theirs.keys()
        for key in ours:
            if isinstance(ours[key], dict):
                assert {k: np.asarray(v).tolist() for k, v in ours[key].items()} == {
                    k: np.asarray(v).tolist() for k, v in theirs[key].items()
                }
            else:
                assert ours[key] == theirs[key]


def test_every_kind_of_feature_is_read(tmp_path):
    features = tfds.features.FeaturesDict(
        {
            'text': tfds.features.Text(),
            'label': tfds.features.ClassLabel(names=['cat', 'dog']),
            'scores': tfds.features.Tensor(shape=(2, 2), dtype=np.float32),
            'boxes': tfds.features.Sequence({'bbox': tfds.features.BBoxFeature(), 'name': tfds.features.Text()}),
            'words': tfds.features.Sequence(tfds.features.Text()),
            'flag': np.bool_,
        }
    )
    stored = features.serialize_example(
        {
            'text': 'naïve',
            'label': 'dog',
            'scores': np.array([[1, 2], [3, 4]], np.float32),
            'boxes': [{'bbox': tfds.features.BBox(0.1, 0.2, 0.3, 0.4), 'name': 'a'}],
            'words': ['x', 'y'],
            'flag': True,
        }
    )
    record = records.reader(features)(stored)
    assert record['text'] == 'naïve' and record['label'] == 1 and record['flag'] is True
    assert record['scores'].tolist() == [[1, 2], [3, 4]]
    assert np.allclose(record['boxes']['bbox'], [[0.1, 0.2, 0.3, 0.4]]) and record['boxes']['name'] == ['a']
    assert record['words'] == ['x', 'y']


def test_features_beyond_the_plan_are_left_to_tfds():
    features = tfds.features.FeaturesDict(
        {
            'packed': tfds.features.Tensor(shape=(3,), dtype=np.float32, encoding='zlib'),
            'text': tfds.features.Text(),
        }
    )
    stored = features.serialize_example(
        {
            'packed': np.array([1, 2, 3], np.float32),
            'text': 'hello',
        }
    )
    record = records.reader(features)(stored)
    assert record['text'] == 'hello' and record['packed'].tolist() == [1, 2, 3]


def test_nested_sequences(monkeypatch):
    """As TFDS has RefCOCO: expressions of each object, of which one may have none; and a list of lists of lists."""
    # TFDS itself writes them, but for looking a dtype up in TensorFlow.
    monkeypatch.setattr(tfds.features.TensorInfo, 'dtype', property(lambda info: info.np_dtype))
    f = tfds.features
    features = f.FeaturesDict(
        {
            'objects': f.Sequence(
                {
                    'bbox': f.BBoxFeature(),
                    'mask': f.Image(encoding_format='png'),
                    'refexp': f.Sequence({'raw': f.Text(), 'refexp_id': np.int64}),
                    'parts': f.Sequence(f.BBoxFeature()),
                }
            ),
            'deep': f.Sequence(f.Sequence(f.Sequence(np.int32), length=2)),
        }
    )
    boxes = [f.BBox(0.0, 0.25, 0.5, 0.75), f.BBox(0.0, 0.0, 0.5, 1.0)]
    said = [[{'raw': 'a', 'refexp_id': 1}, {'raw': 'the b', 'refexp_id': 2}], [], [{'raw': 'ç', 'refexp_id': 3}]]
    objects = [
        {'bbox': boxes[0], 'mask': b'\x89PNG', 'parts': boxes[:count], 'refexp': expressions}
        for count, expressions in zip((0, 2, 1), said, strict=True)
    ]
    deep = [[[1, 2], []], [[], [3]], [[4], [5, 6, 7]]]
    read = records.reader(features)
    record = read(features.serialize_example({'objects': objects, 'deep': deep}))
    assert record['objects']['refexp']['raw'] == [['a', 'the b'], [], ['ç']]
    assert [ids.tolist() for ids in record['objects']['refexp']['refexp_id']] == [[1, 2], [], [3]]
    assert [parts.shape for parts in record['objects']['parts']] == [(0, 4), (2, 4), (1, 4)]
    assert record['objects']['parts'][1].tolist() == [[0, 0.25, 0.5, 0.75], [0, 0, 0.5, 1]]
    assert record['objects']['bbox'].shape == (3, 4) and record['objects']['mask'] == 3 * [b'\x89PNG']
    assert [[[*inner] for inner in middle] for middle in record['deep']] == deep
    empty = read(features.serialize_example({'objects': [], 'deep': []}))
    assert empty['objects']['refexp']['raw'] == empty['deep'] == [] and empty['objects']['bbox'].shape == (0, 4)


def test_nested_sequences_beside_features_for_tfds_say_that_they_need_tensorflow():
    packed = tfds.features.Tensor(shape=(3,), dtype=np.float32, encoding='zlib')
    turns = tfds.features.Sequence(tfds.features.Sequence(np.int32))
    with pytest.raises(UserError, match="feature 'turns' is a nested sequence"):
        records.reader(tfds.features.FeaturesDict({'turns': turns, 'packed': packed}))


@pytest.mark.parametrize(
    ('dataset', 'split', 'message'),
    [
        ('digit_scene/cells', 'train', "unknown dataset 'digit_scene': did you mean 'digit_scenes'"),
        ('digit_scenes/cell', 'train', "unknown config 'cell' (digit_scenes): did you mean 'cells'"),
        ('digit_scenes/cells_tiny', 'tran', "unknown split 'tran' (digit_scenes/cells_tiny): did you mean 'train'"),
        ('digit_scenes/cells_tiny', 'train[:x]', "cannot read split 'train[:x]'"),
        ('/data/mine', 'train', "dataset '/data/mine' is no name such as digit_scenes/cells"),
        ('', 'train', "dataset '' is no name"),
        ('mnist', 'train', "dataset 'mnist' is not prepared in"),
        ('coco_captions', 'train', ".download_and_prepare() elsewhere: No module named 'tensorflow' here"),
        ('mine.jsonl', 'train', "dataset 'mine.jsonl': no file"),
    ],
)
def test_errors_name_the_fix(tiny_digit_scenes, dataset, split, message):
    with pytest.raises(UserError) as error:
        sources.load(dataset, split, tiny_digit_scenes)
    assert message in str(error.value) and '\n' not in str(error.value)


def test_prepared_files_are_read_without_their_builder(tiny_digit_scenes, tmp_path):
    """A dataset no builder is known for: what describes it lies beside its files. The newest version counts."""
    for version in ('9.0.0', '10.0.0'):
        shutil.copytree(Path(tiny_digit_scenes, 'digit_scenes/cells_tiny/1.1.0'), tmp_path / 'mine/small' / version)
    (tmp_path / 'mine/small/9.0.0/features.json').unlink()
    source = sources.load('mine/small', 'test', str(tmp_path))
    assert source[3]['id'] == sources.load('digit_scenes/cells_tiny', 'test', tiny_digit_scenes)[3]['id']


def test_slices_of_splits(tiny_digit_scenes):
    whole = sources.load('digit_scenes/cells_tiny', 'train', tiny_digit_scenes)
    part = sources.load('digit_scenes/cells_tiny', 'train[10:20]', tiny_digit_scenes)
    assert [r['id'] for r in part] == [whole[i]['id'] for i in range(10, 20)]


def test_subset(tiny_digit_scenes):
    source = sources.load('digit_scenes/cells_tiny', 'test', tiny_digit_scenes)
    single = sources.subset(source, {'num_digits': 1, 'held_out': False})
    expected = [i for i in range(32) if source[i]['num_digits'] == 1 and not source[i]['held_out']]
    assert 0 < len(expected) < 32
    assert [single.original(i) for i in range(len(single))] == expected
    assert single[1]['id'] == source[expected[1]]['id']
    assert [r['id'] for r in single.__getitems__([2, 0])] == [source[expected[i]]['id'] for i in (2, 0)]
    assert single.__getitems__([]) == []
    assert sources.subset(source, {'num_digits': 1, 'held_out': False}) is single
    assert len(sources.subset(source, {'num_digits': [1, 2]})) == 32
    assert sources.subset(source, {}) is source
    with pytest.raises(UserError, match="did you mean 'num_digits'"):
        sources.subset(source, {'num_digit': 1})
    with pytest.raises(UserError, match='no record'):
        sources.subset(source, {'num_digits': 9})


def test_a_source_pickles(tiny_digit_scenes):
    source = sources.load('digit_scenes/cells_tiny', 'test', tiny_digit_scenes)
    assert pickle.loads(pickle.dumps(source))[5]['id'] == source[5]['id']


@pytest.mark.slow
def test_two_processes_prepare_once_and_neither_imports_tensorflow_or_jax(tmp_path):
    code = f"""
import sys
from big_vlm.data import sources
source = sources.load('digit_scenes/cells_tiny', 'test', {str(tmp_path)!r})
assert len(source) == 32 and source[3]['caption']
assert 'jax' not in sys.modules
from big_vlm.data import loader
assert 'tensorflow' not in sys.modules
print('done')
"""
    started = [
        subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in started:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, 'done\n'), err
        assert 'Error' not in err and 'WARNING' not in err
    prepared = tmp_path / 'digit_scenes/cells_tiny/1.1.0'
    assert len(list(prepared.glob('*array_record*'))) == 3


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot write to data_dir'):
        sources.load('digit_scenes/cells_tiny', 'test', str(tmp_path / 'file'))
