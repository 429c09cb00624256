"""A dataset in one text file: a JSON object on every line, which names its picture.

    {"image": "harbour/001.jpg", "caption": "two boats at a quay"}

`image` is a path relative to the file's own folder, which may be behind an address, and stays within it, or a list of
several; a decoder alone needs none. All other fields are the pipeline's. Boxes are columns, as in a TFDS record, edges
in 0..1: `"objects": {"bbox": [[y1, x1, y2, x2]], "label": ["boat"]}`. A column `"mask": ["masks/001_0.png"]` beside
them names pictures of the same size, black but for the object, by such paths; so does a text `instances` one of all
objects (see `objects`).
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from big_vlm.config import UserError
from big_vlm.data import paths
from big_vlm.data.indexed import SPLIT, BadRecord, Indexed, parse_json

MAX_LINE = 2**20  # bytes
_CHUNK = 2**24  # bytes read at once to find the lines
_NEWLINE = ord('\n')


class JsonLines(Indexed):
    """The lines of a file, or of a part of it.

    `record['image']` is a path, which the operation `decode` opens: a picture that is not there is a bad example, and
    replaced like any other; so is a line that is no JSON object, or names a picture outside the folder. Lines are found
    once, in one pass over the file, and then read at random access; those of white space alone do not count.

    Args:
      path: of the file.
      split: 'train', or parts of it in the language of TFDS: 'train[:90%]', 'train[:100]+train[200:]'.

    Raises:
      UserError: a file that cannot be read or has no lines that can, a line longer than MAX_LINE, a slice that is none.
    """

    def __init__(self, path: paths.AnyPath, split: str = SPLIT):
        self.path = path
        try:
            self._file = paths.local(path)
            self._starts, self._ends, self._numbers = _lines(self._file, path)
        except OSError as error:
            raise UserError(f'cannot read {path}: {error.strerror}') from error
        self._choose(str(path), len(self._starts), split)

    def _read(self, rows: Sequence[int]) -> list[dict]:
        with open(self._file, 'rb') as file:
            return [self._record(file, row) for row in rows]

    def _record(self, file, index):
        file.seek(self._starts[index])
        line = file.read(self._ends[index] - self._starts[index])
        return parse(line, self.path.parent, f'{self.path}:{self._numbers[index]}')


def parse(line: bytes, folder: paths.AnyPath, where: str) -> dict:
    """The record of a line, its `image` (or a list of them), if it has one, and masks paths below `folder`. Raises
    BadRecord, which begins with `where`, for what is no record and for a picture that is elsewhere."""
    try:
        record = parse_json(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f'{where}: the line is not JSON: {error}') from None
    if not isinstance(record, dict):
        raise BadRecord(f'{where}: a line must be one JSON object, {{"image": …}}, not {line[:40]!r}')
    if 'image' in record:
        image = record['image']
        names = image if isinstance(image, list) and image else [image]
        if not all(isinstance(name, str) for name in names):
            raise BadRecord(f"{where}: no text in 'image', the picture's path")
        pictures = [_below(folder, name, where, 'image') for name in names]
        record['image'] = pictures if isinstance(image, list) else pictures[0]
    if isinstance(record.get('instances'), str):
        record['instances'] = _below(folder, record['instances'], where, 'instances')
    objects = record.get('objects')
    if isinstance(objects, dict) and 'mask' in objects:
        masks = objects['mask']
        if not isinstance(masks, list) or not all(isinstance(mask, str) for mask in masks):
            raise BadRecord(f'{where}: objects/mask is no column of paths: write ["masks/001.png"]')
        record['objects'] = objects | {'mask': [_below(folder, mask, where, 'mask') for mask in masks]}
    return record


def _below(folder: paths.AnyPath, name: str, where: str, what: str) -> paths.AnyPath:
    # Opened as it is spelt here: '..' behind a link would lead elsewhere than it reads.
    inside = os.path.normpath(name)
    chained = isinstance(folder, paths.Remote) and '::' in name  # fsspec would read what follows as an address
    if os.path.isabs(inside) or inside.split(os.sep)[0] == os.pardir or '\0' in name or chained:
        raise BadRecord(f'{where}: {what} {name!r} is not below {folder}: name it relative to that folder')
    return folder / inside


def _lines(file: Path, path: paths.AnyPath) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every line with something on it: its first byte, the one behind its last, its number from 1; int64 [N]."""
    size, starts, ends, filled = 0, [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, bool)]
    with open(file, 'rb') as opened:
        # Whole lines; of one that is too long, enough of it to tell.
        while chunk := opened.read(_CHUNK) + opened.readline(MAX_LINE + 1):
            data = np.frombuffer(chunk if chunk.endswith(b'\n') else chunk + b'\n', np.uint8)
            newlines = np.flatnonzero(data == _NEWLINE)
            first = np.concatenate([[0], newlines[:-1] + 1])
            starts.append(first + size)
            ends.append(newlines + size)
            filled.append(np.maximum.reduceat(data, first) > ord(' '))
            size += len(chunk)
    starts, ends = np.concatenate(starts), np.concatenate(ends)
    long = np.flatnonzero(ends - starts > MAX_LINE)
    if len(long):
        raise UserError(f'{path}:{long[0] + 1}: the line is longer than {MAX_LINE} bytes: is it one object a line?')
    kept = np.flatnonzero(np.concatenate(filled))  # by more than white space
    if not len(kept):
        raise UserError(f'{path}: no lines')
    return starts[kept], ends[kept], kept + 1
