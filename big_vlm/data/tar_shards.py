"""Tar files of examples, as webdataset writes them: members of one example follow each other and share a name.

    000123.jpg, 000123.txt, 000123.json, 000123.cls

become one record: `image` the picture's bytes, `caption` the text, `label` the number, `key` the shared name, and such
fields of the JSON object as no member has. Any other member is a field called as its suffix (000123.answer,
000123.en.txt: `answer`, `en.txt`), a text if it is UTF-8. Where no picture is called so, `image` is a list of numbered
ones in their order (000123.0.jpg, 000123.1.jpg: a name's key ends at its first dot), or else a video (000123.mp4).

Folders and hidden members (macOS writes a ._000123.jpg beside each) are passed over. Members are found in one pass over
the headers, which is remembered of a tar behind an address, and then read where they lie, those of a record at once.
"""

import contextlib
import json
import logging
import os
import re
import tarfile
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from big_vlm.config import UserError
from big_vlm.data import paths
from big_vlm.data.folders import PICTURES
from big_vlm.data.indexed import SPLIT, BadRecord, Indexed, files_of, parse_json

_log = logging.getLogger(__name__)
_RANGE = re.compile(r'\{(\d+)\.\.(\d+)\}')
_NUMBERED = re.compile(r'(\d{1,9})(\.\w+)')
_VIDEOS = ('.mp4', '.webm', '.avi')


class TarShards(Indexed):
    """The examples of tar files.

    Args:
      pattern: 'shards/*.tar', 'shards/train-{0000..0127}.tar' or one file; in the order of their names.
      split: 'train' or parts of it.

    A tar that is damaged or cut short gives the members before that; that it is, and members that are no files or have
    names that lead out of a folder, are counted (`skipped`) and the first ones named in the log. Raises UserError for
    no file, one that cannot be read, no example, a compressed tar, or a slice that is none.
    """

    def __init__(self, pattern: paths.AnyPath, split: str = SPLIT):
        self.files = [str(path) for path in files(pattern)]
        self.skipped = 0
        keys, suffixes, places, starts, last = [], [], [], [], None
        for number, file in enumerate(self.files):
            members, skipped = _members(file)
            for what in skipped:
                self._skip(what)
            for key, suffix, offset, size in members:
                if (number, key) != last:
                    last = number, key
                    starts.append(len(places))
                    keys.append(key)
                suffixes.append(suffix)
                places.append((number, offset, size))
        if not keys:
            raise UserError(f'{pattern}: no examples: is it a tar of webdataset?')
        self._keys, self._suffixes = np.array(keys), np.array(suffixes)
        self._places, self._starts = np.array(places, np.int64), np.array([*starts, len(places)])
        self._choose(str(pattern), len(keys), split)

    def _skip(self, what: str) -> None:
        self.skipped += 1
        if self.skipped <= 5:
            _log.warning('%s%s', what, ' (further ones are only counted)' if self.skipped == 5 else '')

    def _read(self, rows: Sequence[int]) -> list[dict]:
        records: dict[int, dict] = {}
        for row in sorted(set(rows)):  # in the order in which they lie
            records[row] = self._record(row)
        return [records[row] for row in rows]

    def _record(self, row: int) -> dict:
        key = str(self._keys[row])
        record, more = {'key': key}, {}
        mine = range(self._starts[row], self._starts[row + 1])
        number, first, _ = (int(n) for n in self._places[mine[0]])
        end = int(self._places[mine[-1], 1:].sum())
        data = paths.read(paths.at(self.files[number]), first, end - first)
        for i in mine:
            start, size = int(self._places[i, 1]) - first, int(self._places[i, 2])
            suffix = str(self._suffixes[i])
            fields = _fields(suffix, data[start : start + size], f'{self.files[number]}: {key}')
            (more if suffix == '.json' else record).update(fields)
        if 'image' not in record:
            numbered = [match for name in record if (match := _NUMBERED.fullmatch(name)) and match[2] in PICTURES]
            videos = [name for name in record if f'.{name}' in _VIDEOS]
            if numbered:
                record['image'] = [record.pop(match[0]) for match in sorted(numbered, key=lambda match: int(match[1]))]
            elif videos:
                record['image'] = record.pop(videos[0])
        return more | record


def _fields(suffix: str, data: bytes, where: str) -> dict:
    try:
        if suffix in PICTURES:
            return {'image': data}
        if suffix == '.json':
            fields = parse_json(data)
            if not isinstance(fields, dict):
                raise ValueError('no JSON object')
            return fields
        if suffix == '.txt':
            return {'caption': _text(data)}
        if suffix in ('.cls', '.cls.txt'):
            return {'label': int(_text(data))}
    except (ValueError, RecursionError) as error:
        raise BadRecord(f'{where}{suffix}: {error}') from error
    value: str | bytes = data
    if not suffix.endswith(PICTURES + _VIDEOS) and b'\0' not in data:
        with contextlib.suppress(UnicodeDecodeError):
            value = _text(data)
    return {suffix.lstrip('.'): value}


def _text(data: bytes) -> str:
    return data.decode('utf-8-sig').strip()


def files(pattern: paths.AnyPath) -> list[paths.AnyPath]:
    """The files that a pattern means, in the order of their names. Raises UserError if one of a range is not there."""
    if match := _RANGE.search(text := str(pattern)):
        low, high, width = int(match[1]), int(match[2]), len(match[1])
        names = [text[: match.start()] + f'{n:0{width}d}' + text[match.end() :] for n in range(low, high + 1)]
        missing = [name for name in names if not paths.at(name).is_file()]
        if missing or not names:
            raise UserError(f'{pattern}: no file {missing[0] if missing else "in that range"}')
        return [paths.at(name) for name in names]
    if pattern.is_file():
        return [pattern]
    found = files_of(pattern.parent.glob(pattern.name), f'files {pattern}')
    if folders := [path for path in found if not isinstance(path, paths.Remote) and path.is_dir()]:
        raise UserError(f'{folders[0]} is a folder: name the files in it: tar:{folders[0]}/*.tar')
    return found


_Members = list[tuple[str, str, int, int]]  # (key, suffix, first byte, bytes)


def _members(file: str) -> tuple[_Members, list[str]]:
    """Every member that can be read, and a line about each that cannot."""
    path = paths.at(file)
    try:
        if not isinstance(path, paths.Remote):
            with open(path, 'rb') as opened:
                return _scan(opened, file)

        def scan(fs: Any, name: str) -> tuple[_Members, list[str]]:
            with fs.open(name, 'rb', block_size=2**16) as opened:
                return _scan(opened, file)

        index = paths.cached(path, '.index', lambda made: made.write_text(json.dumps(path.ask(scan))))
        return tuple(json.loads(index.read_text()))
    except OSError as error:
        raise UserError(f'{file}: cannot be read: {error.strerror}') from error


def _scan(opened: BinaryIO, file: str) -> tuple[_Members, list[str]]:
    members, skipped = [], []
    end = opened.seek(0, os.SEEK_END)
    opened.seek(0)
    try:
        with tarfile.open(fileobj=opened, mode='r:') as tar:
            while member := tar.next():
                stem, _, suffix = os.path.basename(member.name).partition('.')
                key = os.path.join(os.path.dirname(member.name), stem)
                parts = member.name.split('/')
                if member.isdir() or not stem:
                    continue
                if not member.isreg() or os.path.isabs(member.name) or '..' in parts or not suffix:
                    skipped.append(f'{file}: {member.name}: no plain file with a name and a suffix')
                elif member.offset_data + member.size > end:
                    skipped.append(f'{file}: {member.name}: the tar ends within it')
                    return members, skipped
                else:
                    members.append((key, '.' + suffix.lower(), member.offset_data, member.size))
            if not _ends(opened, tar.offset, end):
                skipped.append(f'{file}: damaged or cut short from byte {tar.offset} on: what follows is not read')
    except tarfile.ReadError as error:
        opened.seek(0)
        if not members and _compressed(opened):
            raise UserError(f'{file}: compressed, so that nothing in it has a place: decompress it') from error
        skipped.append(f'{file}: cut short or damaged: {error}')
    return members, skipped


def _ends(opened: BinaryIO, offset: int, end: int) -> bool:
    """Whether zeros, a block or more, are all that follows from there on, as behind the members of a whole tar."""
    if end < offset + tarfile.BLOCKSIZE:
        return False
    opened.seek(offset)
    return not any(any(chunk) for chunk in iter(lambda: opened.read(2**20), b''))


def _compressed(opened: BinaryIO) -> bool:
    try:
        tarfile.open(fileobj=opened, mode='r:*').close()
    except tarfile.ReadError:
        return False
    return True
