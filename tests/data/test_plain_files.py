"""Data in plain files: folders of pictures, tar shards, Hugging Face's files; whole, in parts, and damaged."""

import io
import json
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from big_vlm.config import UserError
from big_vlm.data import arrow_files, fields, images, operations, sources
from big_vlm.data.indexed import BadRecord


def picture(shade):
    data = io.BytesIO()
    Image.new('RGB', (8, 6), (shade, 0, 0)).save(data, 'PNG')
    return data.getvalue()


def shade(image):
    return int(images.decode(image)[0, 0, 0])


@pytest.fixture
def pets(tmp_path):
    for file, colour in (('dog/b/2.png', 2), ('cat/0.png', 0), ('cat/1.PNG', 1), ('.hidden/9.png', 9)):
        (tmp_path / 'pets' / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'pets' / file).write_bytes(picture(colour))
    (tmp_path / 'pets' / 'readme.md').write_text('no picture')
    return tmp_path / 'pets'


def test_a_class_per_folder(pets):
    source = sources.load('folder:pets', 'train', str(pets.parent))
    assert [(r['class'], r['label'], shade(r['image'])) for r in source] == [
        ('cat', 0, 0),
        ('cat', 0, 1),
        ('dog', 1, 2),
    ]
    assert source.features == ('image', 'label', 'class')
    assert len(sources.subset(source, {'label': 0})) == 2 and len(sources.load(f'folder:{pets}', 'train[1:]')) == 2
    assert pickle.loads(pickle.dumps(source))[2] == source[2]


def test_an_empty_folder_is_a_class(pets):
    for name in ('cow', '.git'):
        (pets / name).mkdir()
    (pets / 'ant').symlink_to(pets / 'dog')
    source = sources.load(f'folder:{pets}', 'train')
    assert source.classes == ['cat', 'cow', 'dog'] and [record['label'] for record in source] == [0, 0, 2]


def test_captions_beside_pictures(pets):
    for name, encoding in (('cat/0', 'utf-8-sig'), ('dog/b/2', 'utf-8')):
        (pets / f'{name}.txt').write_text(f'a {name} ü\n', encoding=encoding)
    source = sources.load(f'folder:{pets}', 'train')
    assert [source[0]['caption'], source[2]['caption']] == ['a cat/0 ü', 'a dog/b/2 ü']
    with pytest.raises(BadRecord, match=r'cat/1.PNG: no caption: .*No such file'):
        source[1]
    assert len(sources.subset(source, {'class': 'cat'})) == 1  # of two, one can be read


def tar(path, members):
    with tarfile.open(path, 'w') as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, '/etc/passwd'
            else:
                info.size = len(data)
            file.addfile(info, io.BytesIO(data or b''))
    return path


def shard(path, numbers):
    members = []
    for n in numbers:
        members += [(f'a/{n:03d}.png', picture(n)), (f'a/{n:03d}.json', json.dumps({'n': n}).encode())]
        members += [(f'a/{n:03d}.txt', f'wall {n}'.encode()), (f'a/{n:03d}.cls', str(n % 2).encode())]
    return tar(path, members)


def test_tar_shards(tmp_path):
    shard(tmp_path / 's-00.tar', range(3)), shard(tmp_path / 's-01.tar', range(3, 5))
    for pattern in ('s-*.tar', 's-{00..01}.tar'):
        source = sources.load(f'tar:{tmp_path}/{pattern}', 'train')
        assert [(r['n'], r['caption'], r['label'], shade(r['image']), r['key']) for r in source] == [
            (n, f'wall {n}', n % 2, n, f'a/{n:03d}') for n in range(5)
        ]
    assert [r['n'] for r in source.__getitems__([4, 0, 4])] == [4, 0, 4]
    assert pickle.loads(pickle.dumps(source))[4] == source[4]
    assert [r['n'] for r in sources.load(f'tar:{tmp_path}/s-*.tar', 'train[:1]+train[4:]')] == [0, 4]


def test_a_tar_cut_in_half_gives_what_is_whole(tmp_path, caplog):
    whole = shard(tmp_path / 'a.tar', range(10)).read_bytes()
    kept = set()
    for size in range(700, len(whole.rstrip(b'\0')), 1999):
        cut = tmp_path / f'cut_{size}.tar'
        cut.write_bytes(whole[:size])
        try:
            source = sources.load(f'tar:{cut}', 'train')
        except UserError as error:
            assert 'no examples' in str(error)
            continue
        assert source.skipped == 1 and str(cut) in caplog.text
        for n, record in enumerate(source):
            assert record['key'] == f'a/{n:03d}'
            if 'image' in record:
                assert shade(record['image']) == n
        kept.add(len(source))
    assert len(kept) > 5


def test_damage_in_the_middle_is_counted_and_named(tmp_path, caplog):
    whole = bytearray(shard(tmp_path / 'a.tar', range(3)).read_bytes())
    at = whole.index(b'a/001.png')  # its header
    (tmp_path / 'a.tar').write_bytes(whole[:at] + b'?' * 512 + whole[at + 512 :])
    source = sources.load(f'tar:{tmp_path}/a.tar', 'train')
    assert len(source) == 1 and source.skipped == 1 and f'damaged or cut short from byte {at} on' in caplog.text
    (tmp_path / 'b.tar').write_bytes(whole[:-1] + b'?')
    assert sources.load(f'tar:{tmp_path}/b.tar', 'train').skipped == 1


def test_members_that_lead_elsewhere_are_passed_over(tmp_path, caplog):
    members = [('../up.png', picture(1)), ('/etc/x.png', picture(2)), ('link.png', None), ('README', b'no suffix')]
    members += [('ok.png', picture(3)), ('._ok.txt', b"macOS's own"), ('ok.txt', b'fine'), ('.DS_Store', b'')]
    source = sources.load(f'tar:{tar(tmp_path / "a.tar", members)}', 'train')
    assert [(r['key'], r['caption']) for r in source] == [('ok', 'fine')]
    assert source.skipped == 4 and '../up.png' in caplog.text


def test_bad_members_are_bad_records(tmp_path):
    members = [('a.json', b'{'), ('b.json', b'[]'), ('c.txt', b'\xff'), ('d.cls', b'cat')]
    members += [('e.json', b'{"caption": "\\ud83d"}'), ('f.txt', b'fine')]
    source = sources.load(f'tar:{tar(tmp_path / "a.tar", members)}', 'train')
    for i in range(5):
        with pytest.raises(BadRecord, match=f'a.tar: {"abcde"[i]}'):
            source[i]
    assert source[5]['caption'] == 'fine' and source.features == ('key', 'caption')
    members = [('a.png', picture(1)), ('b.png', picture(2)), ('b.txt', b'fine')]  # the first example has no text
    assert sources.load(f'tar:{tar(tmp_path / "b.tar", members)}', 'train').features == ('key', 'image', 'caption')


def test_texts_in_a_tar(tmp_path):
    """Whatever is UTF-8 is text, without the mark that some editors begin a file with; pipelines and scores name it."""
    members = [('a.png', picture(1)), ('a.seg.png', b'P'), ('a.question', b'how many?\n'), ('a.raw', b'a\0b')]
    members += [('a.answer', b'\xef\xbb\xbftwo \xc3\xbc'), ('a.en.txt', b'two'), ('a.npy', b'\x93NUMPY')]
    members += [('a.cls', b'7\n')]
    [record] = sources.load(f'tar:{tar(tmp_path / "a.tar", members)}', 'train')
    assert record.pop('image') == picture(1) and record == {
        'key': 'a', 'seg.png': b'P', 'question': 'how many?', 'raw': b'a\0b', 'answer': 'two ü', 'en.txt': 'two',
        'npy': b'\x93NUMPY', 'label': 7,
    }  # fmt: skip
    assert fields.fill(record, '{question} {en.txt}') == 'how many? two'


def test_several_pictures_and_videos_in_a_tar(tmp_path):
    members = [(f'a.{n}.png', picture(n)) for n in (0, 10, 2)] + [('a.mp4', b'film'), ('a.txt', b'three')]
    members += [('b.mp4', b'film'), ('b.json', b'{"image": "b.png", "question": "what?"}')]
    members += [('c.webm', b'film'), ('c.1.png', picture(1)), ('c.jpg', picture(3))]
    several, video, one = sources.load(f'tar:{tar(tmp_path / "a.tar", members)}', 'train')
    assert [shade(image) for image in several.pop('image')] == [0, 2, 10]
    assert several == {'key': 'a', 'mp4': b'film', 'caption': 'three'}
    assert video == {'key': 'b', 'image': b'film', 'question': 'what?'}
    assert shade(one.pop('image')) == 3 and one == {'key': 'c', 'webm': b'film', '1.png': picture(1)}


def test_a_json_member_replaces_no_other(tmp_path):
    theirs = {'image': 'elsewhere.png', 'caption': 'no', 'label': 9, 'key': 'no', 'n': 1}
    members = [('a.png', picture(7)), ('a.txt', b'yes'), ('a.cls', b'3'), ('a.json', json.dumps(theirs).encode())]
    [record] = sources.load(f'tar:{tar(tmp_path / "a.tar", members)}', 'train')
    assert shade(record.pop('image')) == 7 and record == {'key': 'a', 'caption': 'yes', 'label': 3, 'n': 1}


def test_a_text_or_a_number_is_no_picture(tmp_path):
    """Which is not opened as a path, nor as a file descriptor."""
    tar(tmp_path / 'a.tar', [('a.json', json.dumps({'image': str(tmp_path / 'real.png')}).encode())])
    (tmp_path / 'real.png').write_bytes(picture(1))
    pq.write_table(pa.table({'image': [str(tmp_path / 'real.png')]}), tmp_path / 'a.parquet')
    records = [
        sources.load(f'{name}:{tmp_path}/a.{end}', 'train')[0] for name, end in (('tar', 'tar'), ('hf', 'parquet'))
    ]
    for record in (*records, {'image': 0}):
        with pytest.raises(ValueError, match='image is no picture but (str|int)'):
            operations.decode(dict(record), None)
    read = {'image': tmp_path / 'real.png'}
    operations.decode(read, None)
    assert shade(read['image']) == 1


ROWS = [
    {'image': {'bytes': picture(n), 'path': f'{n}.png'}, 'captions': [f'wall {n}', 'a wall'], 'n': n} for n in range(7)
]


@pytest.fixture
def parquet(tmp_path):
    (tmp_path / 'data').mkdir()
    for name, some in (
        ('train-00000-of-00002', ROWS[:4]),
        ('train-00001-of-00002', ROWS[4:6]),
        ('test-0-of-1', ROWS[6:]),
    ):
        pq.write_table(pa.Table.from_pylist(some), tmp_path / 'data' / f'{name}.parquet', row_group_size=3)
    return tmp_path


def test_parquet(parquet):
    source = sources.load(f'hf:{parquet}', 'train')
    assert [(r['n'], r['captions'], shade(r['image'])) for r in source] == [
        (n, [f'wall {n}', 'a wall'], n) for n in range(6)
    ]
    assert [r['n'] for r in sources.load(f'hf:{parquet}', 'test')] == [6]
    assert [r['n'] for r in sources.load(f'hf:{parquet}', 'train[50%:]')] == [3, 4, 5]
    assert [r['n'] for r in source.__getitems__([5, 0, 3])] == [5, 0, 3]
    assert pickle.loads(pickle.dumps(source))[5]['n'] == 5


@pytest.mark.parametrize('stream', [True, False])
def test_arrow_files(tmp_path, stream):
    for split, some in (('train', ROWS[:5]), ('test', ROWS[5:])):
        (tmp_path / split).mkdir()
        table = pa.Table.from_pylist(some)
        file = str(tmp_path / split / 'data-00000-of-00001.arrow')
        with (pa.ipc.new_stream if stream else pa.ipc.new_file)(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    assert [(r['n'], shade(r['image'])) for r in sources.load(f'hf:{tmp_path}', 'train')] == [(n, n) for n in range(5)]
    assert [r['n'] for r in sources.load(f'hf:{tmp_path}', 'test[1:]')] == [6]


def test_pictures_in_lists_and_columns(tmp_path):
    mask = {'bytes': picture(7), 'path': 'm'}
    rows = [{'image': [{'bytes': picture(n), 'path': None}] * 2, 'objects': {'mask': [mask]}} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / 'train-00000-of-00001.parquet')
    record = sources.load(f'hf:{tmp_path}', 'train')[2]
    assert [shade(one) for one in record['image']] == [2, 2] and shade(record['objects']['mask'][0]) == 7


def test_a_split_of_several_configurations_is_refused(parquet):
    (parquet / 'other').mkdir()
    for name in ('train', 'dev'):
        pq.write_table(pa.Table.from_pylist([{'n': 9}]), parquet / 'other' / f'{name}-00000-of-00001.parquet')
    assert sources.load(f'hf:{parquet}', 'dev')[0] == {'n': 9}
    with pytest.raises(UserError, match=r"split 'train' is in .* and .*other: name one of these folders"):
        sources.load(f'hf:{parquet}', 'train')
    with pytest.raises(UserError, match=r'dev\+test is of several splits'):
        sources.load(f'hf:{parquet}', 'dev+test')


def test_splits_by_name(tmp_path):
    """A file says which split it is of, however much else its name says; files of several are never one split."""
    for place, names in (
        ('plain', ('train', 'test', 'validation')),
        ('numbered', ('train-00000', 'train-00001', 'test-00000')),
        ('dotted/data', ('train.clean-00000-of-00001', 'test.clean-00000-of-00001-1a2b')),
        ('configuration/first', ('train', 'test')),
        ('converted', ('train/0000', 'train/0001', 'test/0000')),
        ('parts', ('part-00000', 'part-00001')),
        ('own', ('boats', 'harbours')),
        ('gathered', ('train/coco', 'train/genome', 'test/coco')),
        ('beside', ('train', 'restval')),
        ('hyphens', ('train-clean-0-of-1', 'test-clean-0-of-1', 'a-1-train', 'a-1-test')),
    ):
        for name in names:
            (tmp_path / place / name).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({'from': [name]}), tmp_path / place / f'{name}.parquet')

    def read(place, split):
        return [record['from'] for record in sources.load(f'hf:{tmp_path}/{place}', split)]

    assert [read('plain', split) for split in ('train', 'test', 'validation')] == [['train'], ['test'], ['validation']]
    assert read('numbered', 'train') == ['train-00000', 'train-00001'] and read('numbered', 'test') == ['test-00000']
    assert read('dotted', 'test.clean') == ['test.clean-00000-of-00001-1a2b']
    assert read('dotted', 'train.clean[:1]') == ['train.clean-00000-of-00001']
    with pytest.raises(UserError, match=r"unknown split 'train' .*did you mean 'train.clean'"):
        read('dotted', 'train')
    assert read('configuration', 'train') == ['train'] and read('converted', 'train') == ['train/0000', 'train/0001']
    assert read('parts', 'train') == ['part-00000', 'part-00001'] and read('own', 'train') == ['boats', 'harbours']
    assert read('gathered', 'train') == ['train/coco', 'train/genome'] and read('gathered', 'test') == ['test/coco']
    assert read('beside', 'train') == ['train'] and read('beside', 'restval') == ['restval']
    assert read('hyphens', 'test-clean') == ['test-clean-0-of-1'] and read('hyphens', 'a-1-test') == ['a-1-test']


def test_damaged_files(parquet):
    file = parquet / 'data' / 'train-00000-of-00002.parquet'
    whole = file.read_bytes()
    broken = bytearray(whole)
    broken[4:100] = bytes(96)  # within the first group
    file.write_bytes(bytes(broken))
    arrow_files._group.cache_clear()
    source = sources.load(f'hf:{parquet}', 'train[3:]')
    assert [r['n'] for r in source] == [3, 4, 5]
    with pytest.raises((BadRecord, UserError), match='train-00000'):
        sources.load(f'hf:{parquet}', 'train')[0]
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match='train-00000-of-00002.parquet: damaged'):
        sources.load(f'hf:{parquet}', 'train[:4]')


@pytest.mark.parametrize(
    ('old', 'new'),
    [
        (b'wall 2', b'wall \xff'),
        (np.array([6, 12, 18, 24], np.int32).tobytes(), np.array([6, 12, 2**30, 24], np.int32).tobytes()),
        (np.array([6, 12, 18, 24], np.int32).tobytes(), np.array([6, 12, 7, 24], np.int32).tobytes()),
    ],
)
def test_damage_in_a_mapped_file_is_a_bad_record(tmp_path, old, new):
    table = pa.table({'text': [f'wall {n}' for n in range(5)]})
    with pa.ipc.new_file(str(tmp_path / 'a.arrow'), table.schema) as writer:
        writer.write_table(table)
    whole = (tmp_path / 'a.arrow').read_bytes()
    assert whole.count(old) == 1
    (tmp_path / 'a.arrow').write_bytes(whole.replace(old, new))
    source = sources.load(f'hf:{tmp_path}/a.arrow', 'train')
    assert source[0] == {'text': 'wall 0'}
    with pytest.raises(BadRecord, match='a.arrow, group 0: '):
        [source[n] for n in range(5)]


def test_refused(tmp_path, pets, parquet):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'a.tar').write_bytes(b'')
    (tmp_path / 'gone.tar').symlink_to(tmp_path / 'nowhere')
    import gzip

    (tmp_path / 'z.tar').write_bytes(gzip.compress(shard(tmp_path / 'b.tar', [1]).read_bytes()))
    for dataset, split, message in (
        ('folder:nowhere', 'train', 'no folder .*nowhere'),
        ('folder:empty', 'train', 'no pictures .* in .*empty'),
        ('folder:pets', 'test', "unknown split 'test'"),
        ('tar:no-*.tar', 'train', r'no files .*no-\*.tar'),
        ('tar:s-{0..1}.tar', 'train', 'no file .*s-0.tar'),
        ('tar:a.tar', 'train', 'no examples'),
        ('tar:empty', 'train', r'empty is a folder: name the files in it: tar:.*empty/\*.tar'),
        ('tar:gone.t*', 'train', 'gone.tar: cannot be read: No such file'),
        ('tar:z.tar', 'train', 'compressed'),
        ('hf:nowhere', 'train', 'no file or folder'),
        ('hf:empty', 'train', r'no \*.parquet'),
        ('hf:.', 'tran', "unknown split 'tran' .*did you mean 'train'"),
        ('foldr:pets', 'train', "unknown kind of files 'foldr' .*did you mean 'folder'"),
    ):
        with pytest.raises(UserError, match=message) as error:
            sources.load(dataset, split, str(tmp_path))
        assert '\n' not in str(error.value)
        if 'empty' not in dataset and dataset not in ('tar:a.tar', 'tar:z.tar', 'tar:gone.t*'):
            with pytest.raises(UserError, match='data.sources.a: '):
                sources.check(dataset, split, str(tmp_path), where='data.sources.a')
    assert np.all(sources.load(f'folder:{pets}', 'train').rows == [0, 1, 2])
