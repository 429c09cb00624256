"""Where examples come from: a TFDS name or plain files, and a split, at random access, without TensorFlow.

    coco_captions, digit_scenes/cells    TFDS
    photos/captions.jsonl                a JSON object on every line (see `jsonl`)
    folder:photos                        pictures, a class per folder or captions beside them (`folders`)
    tar:shards/train-{0000..0127}.tar    webdataset's shards (`tar_shards`)
    hf:my_dataset                        Hugging Face's `datasets`: parquet or arrow files (`arrow_files`)

`digit_scenes` and `written_lines` are drawn on first use; every other TFDS dataset must have been prepared in
`data_dir` as ArrayRecord. Of several prepared versions the newest is read. Paths begin at `data_dir`, or where the
program runs if that is ''. They, and it, may be addresses that fsspec reads, tar:gs://bucket/shards/*.tar (`paths`);
TFDS's lie on disks.
"""

import contextlib
import fcntl
import functools
import io
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import logging as absl_logging
from tqdm import tqdm

from big_vlm.config import UserError, unknown
from big_vlm.data import arrow_files, folders, indexed, jsonl, paths, records, tar_shards
from big_vlm.data.builders.digit_scenes import SPLITS, DigitScenes
from big_vlm.data.builders.written_lines import WrittenLines

_log = logging.getLogger(__name__)
_EMBEDDED = {'digit_scenes': DigitScenes, 'written_lines': WrittenLines}
_NAME = re.compile(r'\w[\w.:+-]*(/[\w.:+-]+)*')
_VERSION = re.compile(r'\d+\.\d+\.\d+')
DEFAULT_DATA_DIR = '~/.cache/big_vlm'
_PLAIN = {
    'jsonl': jsonl.JsonLines,
    'folder': folders.Folder,
    'tar': tar_shards.TarShards,
    'hf': arrow_files.ArrowFiles,
}


class Source:
    """A split of a dataset: `len(source)`, `source[i]` → dict record (see `records.reader`). Pickles cheaply."""

    def __init__(self, name: str, stored: Sequence[bytes], features: tfds.features.FeaturesDict):
        self.name, self.features = name, features
        self._stored = stored
        self._read = records.reader(features)
        self._subsets: dict[str, Subset] = {}

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f'{self.name} has {len(self)} records, not one at {index}')
        return self._read(self._stored[index])

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Several records at once, in less than half the time of one by one."""
        return [self._read(stored) for stored in self._stored.__getitems__(list(indices))]

    def original(self, index: int) -> int:
        """The position in the split of record `index` (itself; a subset differs)."""
        return index

    def __getstate__(self) -> dict:
        return {'name': self.name, 'features': self.features, '_stored': self._stored}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _read=records.reader(state['features']), _subsets={})

    def __repr__(self) -> str:
        return f'Source({self.name!r}, {len(self)} records)'


class Subset:
    """The records of a source at `indices`."""

    def __init__(self, source: Any, indices: Sequence[int]):
        self.source, self.indices = source, list(indices)
        self.name = source.name
        self.features = getattr(source, 'features', None)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        return self.source[self.indices[index]]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        return self.source.__getitems__([self.indices[index] for index in indices])

    def original(self, index: int) -> int:
        return self.indices[index]


def load(dataset: str, split: str, data_dir: str = '') -> Source | indexed.Indexed:
    """One split of a dataset, e.g. `load('digit_scenes/cells', 'train')`; TFDS slices ('train[:100]') work too.

    Digit scenes are drawn on first use, under a file lock: a second process waits and then reads the same files. Plain
    files have one split, 'train', but for Hugging Face's. Raises UserError for an unknown dataset, config or split, for
    a dataset that is not prepared as ArrayRecord, and as the plain files' classes do.
    """
    kind = _plain_kind(dataset)
    # A file that was written anew since is another source.
    return _load(dataset, split, data_dir, paths.stamp(_path(dataset, split, data_dir)) if kind == 'jsonl' else '')


@functools.lru_cache(maxsize=64)  # a source remembers its subsets, which take seconds to find
def _load(dataset: str, split: str, data_dir: str, stamp: str) -> Source | indexed.Indexed:
    if kind := _plain_kind(dataset):
        return _PLAIN[kind](_path(dataset, split, data_dir), split)
    folder = _folder(data_dir)
    with _quiet():
        builder = _builder(dataset, folder)
        _check_split(split, builder.info.splits, dataset)
        try:
            stored = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        except (ValueError, NotImplementedError) as error:  # the latter: TFDS, of files that are not ArrayRecord
            raise UserError(f'cannot read split {split!r} of {dataset} in {folder}: {_first_line(error)}') from error
        return Source(f'{dataset}:{split}', stored, builder.info.features)


def check(dataset: str, split: str, data_dir: str = '', where: str = '') -> None:
    """Refuses, without reading a record or writing anything, what `load` would: UserError.

    `where`: the dotted key of the section that names them, for errors.
    """
    name, _, config = dataset.partition('/')
    try:
        if _plain_kind(dataset):
            _path(dataset, split, data_dir)
            return
        if name in _EMBEDDED:
            _check_config(name, config)
            splits = SPLITS
        else:
            with _quiet():
                splits = _builder(dataset, _folder(data_dir)).info.splits
        _check_split(split, splits, dataset)
    except UserError as error:
        raise UserError(f'{where}: {error}') if where else error from None


def _plain_kind(dataset: str) -> str:
    """The key in _PLAIN of a dataset in plain files, '' for TFDS's."""
    kind, colon, rest = dataset.partition(':')
    if dataset.endswith('.jsonl'):
        return 'jsonl'
    if colon and kind not in _PLAIN and not re.match(r'[\d*]', rest):  # TFDS: name:1.0.0
        paths.at(dataset)  # its own word on a chain of addresses, which begins like a kind
        raise unknown('kind of files', kind, [k for k in _PLAIN if k != 'jsonl'], dataset)
    return kind if colon and kind in _PLAIN else ''


def _folder(data_dir: str) -> Path:
    """Of TFDS's datasets."""
    folder = paths.at(data_dir or DEFAULT_DATA_DIR)
    if isinstance(folder, paths.Remote):
        raise UserError(f'data_dir {folder}: TFDS datasets are read from a disk: copy them there, or mount it')
    return folder


def _path(dataset: str, split: str, data_dir: str) -> paths.AnyPath:
    """Where a dataset in plain files lies, after the checks that read nothing but names."""
    kind = _plain_kind(dataset)
    path = paths.at(dataset.removeprefix(f'{kind}:'), data_dir)
    if kind == 'jsonl' and not path.is_file():
        raise UserError(f'dataset {dataset!r}: no file {path}')
    if kind == 'folder' and not path.is_dir():
        raise UserError(f'dataset {dataset!r}: no folder {path}')
    if kind == 'hf' and not path.exists():
        raise UserError(f'dataset {dataset!r}: no file or folder {path}')
    if kind == 'tar':
        tar_shards.files(path)
    _check_split(split, arrow_files.splits_of(path) if kind == 'hf' else (indexed.SPLIT,), dataset)
    return path


def _check_config(name: str, config: str) -> None:
    configs = [c.name for c in _EMBEDDED[name].BUILDER_CONFIGS]
    if config and config not in configs:
        raise unknown('config', config, configs, name)


def _check_split(split: str, splits: Iterable[str], where: str) -> None:
    for part in re.split(r'\s*\+\s*', split):
        if re.sub(r'\[.*', '', part) not in splits:
            raise unknown('split', part, splits, where)


def subset(source: Source, where: Mapping[str, Any]) -> Any:
    """The records whose fields equal the given values: `subset(source, {'num_digits': 1, 'held_out': False})`.

    A list or tuple of values means any of them. Reads the source once per question and remembers the answer. Raises
    UserError for an unknown field and for an empty result.
    """
    if not where:
        return source
    key = repr(sorted(where.items()))
    if key not in source._subsets:
        for field in where:
            if field not in source.features:
                raise unknown('field', field, sorted(source.features), f'where, {source.name}')
        wanted = {k: v if isinstance(v, (list, tuple)) else (v,) for k, v in where.items()}
        keep = []
        for start in range(0, len(source), 1024):
            several = range(start, min(start + 1024, len(source)))
            keep += [
                i for i, record in zip(several, _readable(source, several), strict=True) if _matches(record, wanted)
            ]
        if not keep:
            raise UserError(f'no record of {source.name} has {dict(where)}: relax `where`')
        source._subsets[key] = Subset(source, keep)
    return source._subsets[key]


def _readable(source: Any, indices: Sequence[int]) -> list[dict]:
    """The records at `indices`, {} for one that cannot be read."""
    try:
        return source.__getitems__(indices)
    except UserError:
        raise
    except Exception:
        if len(indices) == 1:
            return [{}]
        return [record for index in indices for record in _readable(source, [index])]


def _matches(record: dict, wanted: dict) -> bool:
    return all(record.get(field) in values for field, values in wanted.items())


def _builder(dataset: str, folder: Path) -> tfds.core.DatasetBuilder:
    name, _, config = dataset.partition('/')
    if name in _EMBEDDED:
        _check_config(name, config)
        return _embedded(_EMBEDDED[name], config, folder)
    if not _NAME.fullmatch(dataset):
        raise UserError(
            f'dataset {dataset!r} is no name such as digit_scenes/cells and no FILE.jsonl, folder:DIR, tar:FILES or '
            'hf:DIR: a folder of TFDS belongs in data_dir'
        )
    # The files first: what describes a dataset on disk needs none of its builder's code, which may need TensorFlow.
    versions = [f.parent for f in folder.glob(f'{dataset}/*/dataset_info.json') if _VERSION.fullmatch(f.parent.name)]
    if versions:
        return tfds.builder_from_directory(max(versions, key=lambda f: tuple(map(int, f.name.split('.')))))
    try:
        builder = tfds.builder(dataset, data_dir=folder)
    except tfds.core.registered.DatasetNotFoundError:
        raise unknown('dataset', name, [*_EMBEDDED, *tfds.list_builders(with_community_datasets=False)]) from None
    except ValueError as error:
        raise UserError(f'cannot open dataset {dataset!r}: {_first_line(error)}') from error
    except ImportError as error:  # some builders need TensorFlow to be made; what they write does not need it
        raise _unprepared(dataset, folder, f' elsewhere: {str(error).rpartition(": ")[2]} here') from None
    if not Path(builder.data_dir, 'dataset_info.json').is_file():
        raise _unprepared(dataset, folder)
    return builder


def _unprepared(dataset: str, folder: Path, place: str = '') -> UserError:
    return UserError(
        f'dataset {dataset!r} is not prepared in {folder}: run tfds.builder({dataset!r}, data_dir={str(folder)!r}, '
        f"file_format='array_record').download_and_prepare(){place}"
    )


def _embedded(kind: type, config: str, folder: Path) -> tfds.core.DatasetBuilder:
    def make() -> tfds.core.DatasetBuilder:
        return kind(config=config or None, data_dir=folder, file_format='array_record')

    def prepared(builder: tfds.core.DatasetBuilder) -> bool:
        return Path(builder.data_dir, 'dataset_info.json').is_file()

    builder = make()
    if prepared(builder):
        return builder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / f'.{builder.name}-{builder.builder_config.name}.lock', 'w')
    except OSError as error:
        raise UserError(f'cannot write to data_dir {folder}: {error.strerror}') from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        builder = make()
        if not prepared(builder):
            sizes = builder.scenes_per_split()
            label = f'drawing {builder.name}/{builder.builder_config.name}'
            _log.info('%s into %s (once)', label, folder)
            pace = 0.2 if sys.stderr.isatty() else 20.0  # seconds: a log file is not redrawn
            with tqdm(
                total=sum(sizes.values()), desc=label, unit=' scenes', delay=2, mininterval=pace, leave=False
            ) as bar:
                builder.on_scene = bar.update
                try:
                    builder.download_and_prepare()
                except (OSError, RuntimeError) as error:  # ArrayRecord's own is the latter
                    why = getattr(error, 'strerror', None) or _first_line(error)
                    raise UserError(f'cannot write to data_dir {folder}: {why}') from error
    return builder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS reports through print, absl and its own bars; ours is one bar."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl_logging.set_verbosity(verbosity)
        tfds.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition('\n')[0]
