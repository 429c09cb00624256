"""TFRecord to ArrayRecord: known checksums, the same examples again, every damage found."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from big_vlm.config import UserError
from big_vlm.data import sources, tfrecord
from tools import to_array_record


@pytest.mark.parametrize(
    ('data', 'crc'),
    [
        (b'', 0),
        (b'123456789', 0xE3069283),
        (bytes(32), 0x8A9136AA),  # this one and those below: RFC 3720, appendix B.4
        (b'\xff' * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_known_checksums(data, crc):
    assert tfrecord.crc32c(data) == crc


def test_lanes_agree_with_bits():
    data = np.random.default_rng(0).integers(0, 256, 1500, np.uint8).tobytes()
    for length in (255, 256, 257, 1024, 1500):
        state = 0xFFFFFFFF
        for byte in data[:length]:
            state ^= byte
            for _ in range(8):
                state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
        assert tfrecord.crc32c(data[:length]) == state ^ 0xFFFFFFFF


@pytest.fixture
def prepared(tiny_digit_scenes, tmp_path):
    """A data_dir with the tiny scenes as TFRecord, and nothing else."""
    [folder] = Path(tiny_digit_scenes).glob('digit_scenes/cells_tiny/*')
    copy = tmp_path / 'data' / 'scenes_again' / folder.name
    copy.mkdir(parents=True)
    info = json.loads((folder / 'dataset_info.json').read_text()) | {'fileFormat': 'tfrecord', 'name': 'scenes_again'}
    (copy / 'dataset_info.json').write_text(json.dumps(info))
    shutil.copy(folder / 'features.json', copy)
    for split in info['splits']:
        stored = sources.load('digit_scenes/cells_tiny', split['name'], tiny_digit_scenes)._stored
        [length] = split['shardLengths']
        assert int(length) == len(stored)
        records = b''.join(tfrecord.framed(stored[i]) for i in range(len(stored)))
        (copy / f'scenes_again-{split["name"]}.tfrecord-00000-of-00001').write_bytes(records)
    return copy


def test_the_same_examples_again(prepared, tiny_digit_scenes, capsys):
    with pytest.raises(UserError, match='cannot read split'):
        sources.load('scenes_again', 'train', str(prepared.parents[1]))
    sources._load.cache_clear()
    assert to_array_record.main([str(prepared.parents[1])]) == 0
    assert '3 files' in capsys.readouterr().out
    for split in ('train', 'validation', 'test'):
        ours = sources.load('scenes_again', split, str(prepared.parents[1]))
        theirs = sources.load('digit_scenes/cells_tiny', split, tiny_digit_scenes)
        assert len(ours) == len(theirs)
        assert all(ours._stored[i] == theirs._stored[i] for i in range(len(ours)))
        assert ours[3]['caption'] == theirs[3]['caption'] and ours[3]['image'] == theirs[3]['image']
    assert to_array_record.main([str(prepared)]) == 2
    assert 'array_record, not tfrecord: nothing to do' in capsys.readouterr().err


def test_versions_already_converted_are_left(prepared, capsys):
    done = prepared.parent / '0.0.1'
    done.mkdir()
    info = json.loads((prepared / 'dataset_info.json').read_text())
    (done / 'dataset_info.json').write_text(json.dumps(info | {'fileFormat': 'array_record'}))
    assert to_array_record.main([str(prepared.parent)]) == 0
    assert capsys.readouterr().out == f'{done}: already ArrayRecord\n{prepared}: 3 files\n'
    assert json.loads((prepared / 'dataset_info.json').read_text())['fileFormat'] == 'array_record'


def test_metadata_of_before_there_were_formats(prepared):
    """TFDS takes what says none for TFRecord."""
    info = json.loads((prepared / 'dataset_info.json').read_text())
    del info['fileFormat']
    (prepared / 'dataset_info.json').write_text(json.dumps(info))
    assert to_array_record.main([str(prepared)]) == 0
    [length] = next(split['shardLengths'] for split in info['splits'] if split['name'] == 'train')
    assert len(sources.load('scenes_again', 'train', str(prepared.parents[1]))) == int(length)


@pytest.mark.parametrize('key', ['splits', 'name', 'shardLengths'])
def test_metadata_without_a_key(prepared, capsys, key):
    info = json.loads((prepared / 'dataset_info.json').read_text())
    for some in (info, *info['splits']):
        some.pop(key, None)
    (prepared / 'dataset_info.json').write_text(json.dumps(info))
    assert to_array_record.main([str(prepared.parent)]) == 2
    said = capsys.readouterr().err
    assert f"'{key}' is missing" in said and said.count('\n') == 1


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda data: data[:-1], 'record 31: the file ends within it'),
        (lambda data: data[:5] + b'\x01' + data[6:], 'record 0: its length is damaged'),
        (lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:], 'record 0: its checksum is wrong'),
        (lambda data: data + tfrecord.framed(b'more'), '33 records, but dataset_info.json tells of 32'),
        (lambda data: data + b'abc', 'record 32: its length is damaged'),
    ],
)
def test_damage_is_found(prepared, capsys, change, message):
    file = prepared / 'scenes_again-test.tfrecord-00000-of-00001'
    file.write_bytes(change(file.read_bytes()))
    assert to_array_record.main([str(prepared)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count('\n') == 1
    assert 'tfrecord' in json.loads((prepared / 'dataset_info.json').read_text())['fileFormat']
    assert not list(prepared.glob('*.part')) and not list(prepared.glob('*-test.array_record*'))


def test_what_is_no_dataset(prepared, tmp_path, capsys):
    assert to_array_record.main([str(tmp_path / 'nowhere')]) == 2
    assert 'no dataset_info.json here or below' in capsys.readouterr().err
    (prepared / 'scenes_again-test.tfrecord-00000-of-00001').unlink()
    assert to_array_record.main([str(prepared)]) == 2
    assert 'no file scenes_again-test.tfrecord' in capsys.readouterr().err
