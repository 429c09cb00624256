"""Hugging Face's `datasets` on disk: folders of parquet files, as hubs have them, and of arrow files, as `save_to_disk`
writes them.

    data/train-00000-of-00002.parquet, data/test-00000-of-00001.parquet       splits by name
    train.parquet, test.clean-00000.parquet                                   the same: 'train', 'test.clean'
    train/data-00000-of-00001.arrow, test/0000.parquet                        splits by folder

A file's name without its number is its split's, unless that is data, part or nothing. Where no file is called like a
split, or is one of several (`-of-`), folders say it, and files of no folder are 'train'.
A picture is its encoded bytes, whichever way the column holds it. Arrow files are mapped and a row costs what it holds;
of a parquet file a whole group of rows is decoded, the last ones are kept, and rows of one group asked for together are
decoded once: for random reading write small groups (`row_group_size=100`) or arrow files.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from big_vlm.config import UserError, unknown
from big_vlm.data import paths
from big_vlm.data.indexed import SPLIT, BadRecord, Indexed, files_of, plain

_NUMBER = re.compile(r'(^|-)\d+(-of-\d+(-\w+)?)?$')
_UNNAMED = ('', 'data', 'part')
_SPLIT = re.compile(r'(train|test|val|valid|dev|eval)(ing|idation|ation|uation)?([-._]|$)|.*-of-\d')
_DAMAGED = (pa.ArrowException, OSError, ValueError)


class ArrowFiles(Indexed):
    """The rows of one split.

    Args:
      path: a folder, or one file of either kind.
      split: a split's name or parts of one.

    Raises UserError for no such files, a file that is none, an unknown split, a slice that is none.
    """

    def __init__(self, path: paths.AnyPath, split: str = SPLIT):
        self.path, found = path, splits_of(path)
        names = {re.match(r'[^[]*', part.strip())[0] for part in split.split('+')}
        if len(names) > 1:
            raise UserError(f'{path}: {split} is of several splits: give each a source of its own')
        [name] = names
        if name not in found:
            raise unknown('split', name, found, str(path))
        folders = sorted({file.parent for file in found[name]})
        if len(folders) > 1:
            raise UserError(f'{path}: split {name!r} is in {folders[0]} and {folders[1]}: name one of these folders')
        self.files = [str(file) for file in found[name]]
        groups = []  # (file, group, rows)
        for number, file in enumerate(self.files):
            try:
                counts = _counts(file)
            except _DAMAGED as error:
                raise UserError(f'{file}: damaged, or no {paths.at(file).suffix[1:]} file: {error}') from error
            groups += [(number, group, count) for group, count in enumerate(counts)]
        self._groups = np.array(groups, np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._groups[:, 2])
        self._choose(str(path), int(self._ends[-1]) if len(groups) else 0, split, (name,))

    def _read(self, rows: Sequence[int]) -> list[dict]:
        records: dict[int, dict] = {}
        for row in sorted(set(rows)):
            group = int(np.searchsorted(self._ends, row, side='right'))
            number, within, count = (int(n) for n in self._groups[group])
            try:
                some = _group(self.files[number], within).slice(row - (int(self._ends[group]) - count), 1)
                if isinstance(some, pa.RecordBatch):  # as the file has it: damaged offsets would lead anywhere
                    some.validate(full=True)
                [record] = some.to_pylist()
            except _DAMAGED as error:
                raise BadRecord(f'{self.files[number]}, group {within}: {error}') from error
            records[row] = {key: plain(value) for key, value in record.items()}
        return [records[row] for row in rows]


def splits_of(path: paths.AnyPath) -> dict[str, list[paths.AnyPath]]:
    """Split → its files. Raises UserError if there are none."""
    if path.is_file():
        return {SPLIT: [path]}
    below = [
        f for f in path.rglob('*') if f.suffix in ('.parquet', '.arrow') and not f.name.startswith(('.', 'cache-'))
    ]
    files = files_of(below, f'*.parquet or *.arrow in {path}')
    names = [_NUMBER.sub('', file.stem) for file in files]
    by_name = any(_SPLIT.match(file.stem) and name not in _UNNAMED for file, name in zip(files, names, strict=True))
    found: dict[str, list[paths.AnyPath]] = {}
    for file, name in zip(files, names, strict=True):
        if not by_name or name in _UNNAMED:
            name = file.parent.name if file.parent != path else ''
        found.setdefault(SPLIT if name in _UNNAMED else name, []).append(file)
    return found


def _counts(file: str) -> list[int]:
    """Rows of every group."""
    if file.endswith('.parquet'):
        meta = _parquet(file, lambda opened: opened.metadata)
        return [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
    return [batch.num_rows for batch in _mapped(file)]


@functools.lru_cache(maxsize=64)
def _mapped(file: str) -> tuple[pa.RecordBatch, ...]:
    """The batches of an arrow file, stream or not, none of them read yet."""
    source = pa.memory_map(str(paths.local(paths.at(file))))
    try:
        return tuple(pa.ipc.open_stream(source))
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(source)
        return tuple(reader.get_batch(i) for i in range(reader.num_record_batches))


@functools.lru_cache(maxsize=8)
def _group(file: str, group: int) -> pa.Table | pa.RecordBatch:
    if not file.endswith('.parquet'):
        return _mapped(file)[group]
    return _parquet(file, lambda opened: opened.read_row_group(group))


def _parquet(file: str, question: Callable[[pq.ParquetFile], Any]) -> Any:
    path = paths.at(file)
    if isinstance(path, paths.Remote):
        return path.ask(lambda fs, name: question(pq.ParquetFile(fs.open(name, 'rb'))))
    return question(pq.ParquetFile(path))
