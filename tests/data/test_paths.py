"""Data behind addresses: fsspec's memory, and a web server of our own, read by ranges of bytes."""

import functools
import http.server
import io
import json
import pickle
import tarfile
import threading
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from big_vlm.config import UserError
from big_vlm.data import images, paths, sources, transforms
from big_vlm.data.contract import Contract
from big_vlm.data.indexed import BadRecord


def picture(shade):
    data = io.BytesIO()
    Image.new('RGB', (8, 6), (shade, 0, 0)).save(data, 'PNG')
    return data.getvalue()


def shade(image):
    return int(images.decode(image)[0, 0, 0])


@functools.cache
def files():
    """Name → content of three pictures in every form that there is."""
    found = {f'photos/{n}.png': picture(n) for n in range(3)}
    found |= {f'photos/{n}.txt': f'wall {n} ü'.encode() for n in range(3)}
    lines = [json.dumps({'image': f'{n}.png', 'caption': f'wall {n} ü'}) for n in range(3)]
    found['photos/lines.jsonl'] = '\n'.join(lines).encode()
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode='w') as tar:
        for name in [f'photos/{n}.{end}' for n in range(3) for end in ('png', 'txt')]:
            member = tarfile.TarInfo(name)
            member.size = len(found[name])
            tar.addfile(member, io.BytesIO(found[name]))
    found['shards/a-0.tar'] = found['shards/a-1.tar'] = shard.getvalue()
    table = pa.table(
        {'image': [found[f'photos/{n}.png'] for n in range(3)], 'caption': [f'wall {n} ü' for n in range(3)]}
    )
    parquet, arrow = io.BytesIO(), io.BytesIO()
    pq.write_table(table, parquet, row_group_size=2)
    with pa.ipc.new_stream(arrow, table.schema) as writer:
        writer.write_table(table)
    found['rows/train-0-of-1.parquet'], found['rows/test/data-0-of-1.arrow'] = parquet.getvalue(), arrow.getvalue()
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, 'CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


@pytest.fixture
def memory():
    fs = fsspec.filesystem('memory')
    for name, data in files().items():
        fs.pipe(f'/{name}', data)
    yield fs
    fs.store.clear()


class Server(http.server.BaseHTTPRequestHandler):
    """The files, by ranges; those below /whole/ without, as Python's own server gives them."""

    protocol_version = 'HTTP/1.1'
    asked: list[tuple[str, str | None]] = []

    def do_GET(self):
        name = self.path.removeprefix('/whole').lstrip('/')
        data, part = files().get(name), self.headers.get('Range')
        if data is None:
            return self.send_error(404)
        total = len(data)
        if part and not self.path.startswith('/whole'):
            first, last = (int(n) for n in part.removeprefix('bytes=').split('-'))
            data = data[first : last + 1]
            self.send_response(206)
            self.send_header('Content-Range', f'bytes {first}-{last}/{total}')
        else:
            self.send_response(200)
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        if self.command == 'GET':
            self.asked.append((name, part))
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def web():
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    Server.asked.clear()
    yield f'http://127.0.0.1:{server.server_address[1]}'
    server.shutdown()
    server.server_close()


def seen(source):
    return [(shade(record['image']), record['caption']) for record in source]


THREE = [(n, f'wall {n} ü') for n in range(3)]


@pytest.mark.parametrize(
    ('dataset', 'split', 'data_dir', 'expected'),
    [
        ('memory://photos/lines.jsonl', 'train', '', THREE),
        ('lines.jsonl', 'train[1:]', 'memory://photos', THREE[1:]),
        ('folder:memory://photos', 'train', 'nowhere', THREE),
        ('tar:memory://shards/a-*.tar', 'train', '', THREE * 2),
        ('tar:shards/a-{0..1}.tar', 'train[:4]', 'memory://', THREE + THREE[:1]),
        ('hf:memory://rows', 'train', '', THREE),
        ('hf:rows', 'test', 'memory://', THREE),
    ],
)
def test_every_kind_of_files(memory, dataset, split, data_dir, expected):
    sources.check(dataset, split, data_dir)
    source = sources.load(dataset, split, data_dir)
    assert seen(source) == expected
    assert seen(pickle.loads(pickle.dumps(source))) == expected


def test_classes_behind_an_address(memory):
    for name in ('cat/0', 'fox/deep/1'):
        memory.pipe(f'/pets/{name}.png', picture(1))
    memory.mkdir('/pets/dog')
    source = sources.load('folder:memory://pets', 'train')
    assert [(record['class'], record['label']) for record in source] == [('cat', 0), ('fox', 2)]


def test_a_web_server(web, cache):
    """A line's picture is fetched when it is decoded; of a tar, the bytes of a record, and its index once."""
    context = transforms.Context(Contract.__new__(Contract), None, train=True)
    record = sources.load(f'{web}/photos/lines.jsonl', 'train')[2]
    assert ('photos/2.png', None) not in Server.asked
    decoded = transforms.parse('decode', where='here')(record, context)
    assert shade(decoded['image']) == 2 and ('photos/2.png', None) in Server.asked

    source = sources.load(f'tar:{web}/shards/a-{{0..1}}.tar', 'train')
    Server.asked.clear()
    assert seen(source) == THREE * 2
    asked = [part for name, part in Server.asked if name == 'shards/a-0.tar']
    assert asked and None not in asked and len(Server.asked) == 6  # a request for each record
    assert len(list(cache.glob('*.index'))) == 2
    sources._load.cache_clear()
    Server.asked.clear()
    assert len(sources.load(f'tar:{web}/shards/a-{{0..1}}.tar', 'train')) == 6
    assert len(Server.asked) == 1  # the first record, for its fields

    with pytest.raises(OSError, match='no such file'):
        paths.at(f'{web}/photos/9.png').read_bytes()
    with pytest.raises(OSError, match='bytes from 5 on instead of 3'):
        paths.at(f'{web}/whole/photos/1.png').read_bytes(5, 3)


def test_a_file_that_changed_is_read_anew(memory, tmp_path):
    """Within one process, where sources are remembered; on disks too."""
    for name, write in (
        ('memory://photos/lines.jsonl', lambda data: memory.pipe('/photos/lines.jsonl', data)),
        (str(tmp_path / 'lines.jsonl'), (tmp_path / 'lines.jsonl').write_bytes),
    ):
        write(files()['photos/lines.jsonl'])
        first = sources.load(name, 'train')
        assert len(first) == 3 and sources.load(name, 'train') is first
        write(b'{"image": "1.png", "caption": "another wall, said at length"}')
        assert [record['caption'] for record in sources.load(name, 'train')] == ['another wall, said at length']


def test_refused(memory, tmp_path):
    memory.pipe('/shards/broken.tar', b'x' * 600)
    for dataset, data_dir, message in (
        ('none.jsonl', 'memory://photos', "dataset 'none.jsonl': no file memory://photos/none.jsonl"),
        ('nowhere://a/b.jsonl', '', 'nowhere://a/b.jsonl: fsspec knows no such protocol'),
        ('folder:memory://nothing', '', 'no folder memory://nothing'),
        ('tar:memory://shards/broken.tar', '', 'no examples: is it a tar'),
        ('tar:memory://shards/b-{0..1}.tar', '', 'no file memory://shards/b-0.tar'),
        ('coco_captions', 'memory://photos', 'data_dir memory://photos: TFDS datasets are read from a disk'),
    ):
        with pytest.raises(UserError, match=message) as error:
            sources.load(dataset, 'train', data_dir)
        assert '\n' not in str(error.value)
    memory.pipe('/photos/outside.jsonl', b'{"image": "0.png"}\n{"image": "../a.png"}')
    with pytest.raises(BadRecord, match=r"image '../a.png' is not below memory://photos"):
        sources.load('memory://photos/outside.jsonl', 'train')[1]


@pytest.mark.parametrize(
    ('dataset', 'data_dir'),
    [
        ('zip://photos/lines.jsonl::photos.zip', ''),
        ('lines.jsonl', 'zip://::photos.zip'),
        ('folder:zip://photos::photos.zip', ''),
        ('folder:photos', 'zip://::photos.zip'),
        ('tar:simplecache::memory://shards/a-*.tar', ''),
        ('simplecache::memory://photos/lines.jsonl', ''),
        ('simplecache::memory://photos', ''),
        ('hf:rows', 'filecache::memory://'),
        ('coco_captions', 'zip://::photos.zip'),
    ],
)
def test_chains_of_addresses_are_refused(dataset, data_dir):
    for question in (sources.load, sources.check):
        with pytest.raises(UserError, match=r'::.*: addresses chained by :: are not read') as error:
            question(dataset, 'train', data_dir)
        assert '\n' not in str(error.value)


def test_a_picture_is_no_chain_of_addresses(memory):
    memory.pipe('/photos/chained.jsonl', b'{"image": "0.png"}\n{"image": "0.png::file:///etc/passwd"}')
    with pytest.raises(BadRecord, match=r'passwd.* is not below memory://photos'):
        sources.load('memory://photos/chained.jsonl', 'train')[1]


def test_paths_begin_where_they_say():
    assert str(paths.at('a.jsonl', 'memory://b/')) == 'memory://b/a.jsonl'
    assert str(paths.at('memory://b/a.jsonl', 'memory://c')) == 'memory://b/a.jsonl'
    assert paths.at('a', '/b') == Path('/b/a') and paths.at('/a', '/b') == paths.at('file:///a', 'gs://b') == Path('/a')
    assert paths.at('~/a') == Path.home() / 'a' and paths.at('a', 'file:///b') == Path('/b/a')
    assert not np.any([isinstance(paths.at(name), paths.Remote) for name in ('a:b', 'a', 'digit_scenes/cells')])
