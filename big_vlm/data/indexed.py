"""What data in plain files share: records that are found once, one split of them or a part, random access to each."""

import abc
import contextlib
import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from big_vlm.config import UserError
from big_vlm.data.paths import AnyPath

SPLIT = 'train'  # what the one split of plain files is called
_TRIED = 100  # records, to find one that can be read, and the fields that records have


class BadRecord(ValueError):
    """A record that cannot be read: in training it is replaced and counted, like every bad example."""


class Indexed(abc.ABC):
    """Some of the records that a subclass found: `len(source)`, `source[i]` → dict record. Pickles cheaply.

    A subclass finds its records, calls `_choose`, and reads those it is asked for in `_read(rows)`.
    """

    name: str

    def _choose(self, name: str, count: int, split: str, splits: Iterable[str] = (SPLIT,)) -> None:
        """`split`, in TFDS's language, of `count` records in all: 'train', 'train[:90%]', 'train[:9]+train[20:]'."""
        self.name = f'{name}:{split}'
        self.rows = part(count, split, self.name, splits)
        self._subsets: dict = {}
        self._check_readable()

    @abc.abstractmethod
    def _read(self, rows: Sequence[int]) -> list[dict]:
        """Those records, in that order. Raises BadRecord for one that cannot be read."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f'{self.name} has {len(self)} records, not one at {index}')
        return self._read([int(self.rows[index])])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Several records at once: what they share, such as an open file or a group of rows, is read once."""
        return self._read([int(self.rows[index]) for index in indices])

    def original(self, index: int) -> int:
        """The position of record `index`: itself, as of every whole source."""
        return index

    def __getstate__(self) -> dict:
        return self.__dict__ | {'_subsets': {}}

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.name!r}, {len(self)} records)'

    @functools.cached_property
    def features(self) -> tuple[str, ...]:
        """The fields of the first hundred records, any of which may lack some."""
        found: dict[str, Any] = {}
        for index in range(min(_TRIED, len(self))):
            with contextlib.suppress(BadRecord, OSError, UserError):
                found |= self[index]
        return tuple(found)

    def _check_readable(self) -> None:
        for index in range(min(_TRIED, len(self))):
            try:
                self[index]
                return
            except (BadRecord, OSError) as error:
                last = error
        raise UserError(f'{self.name}: none of the first {min(_TRIED, len(self))} records can be read: {last}')


def part(count: int, split: str, name: str, splits: Iterable[str] = (SPLIT,)) -> np.ndarray:
    """int64, the positions that `split` means among `count` records. Raises UserError, with `name`, for none."""
    spec, infos = split, {}
    for key in splits:
        known = key.replace('.', '_')  # TFDS's language has no dot in a split's name
        infos[known] = tfds.core.SplitInfo(name=known, shard_lengths=[count], num_bytes=0)
        spec = spec.replace(key, known)
    try:
        parts = tfds.core.ReadInstruction.from_spec(spec).to_absolute(infos)
    except ValueError as error:
        raise UserError(f'cannot read {name}: {str(error).partition(chr(10))[0]}') from error
    chosen = np.concatenate([np.arange(some.from_ or 0, count if some.to is None else some.to) for some in parts])
    if not len(chosen):
        raise UserError(f'{name}: no records')
    return chosen.astype(np.int64)


def parse_json(data: bytes) -> Any:
    """The value of a text in JSON. Raises ValueError or RecursionError for what is none, or says what UTF-8 cannot."""
    value = json.loads(data)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # "\ud83d", which JSON lets through
        raise ValueError('half of a character: a surrogate without its other half') from None
    return value


def files_of(paths: Iterable[AnyPath], what: str) -> list[AnyPath]:
    """The paths, sorted. Raises UserError if there are none."""
    found = sorted(paths)
    if not found:
        raise UserError(f'no {what}')
    return found


def plain(value: Any) -> Any:
    """Hugging Face's pictures, dicts of bytes and path, as their bytes, also in lists and columns."""
    if isinstance(value, dict):
        if value.keys() == {'bytes', 'path'} and value['bytes'] is not None:
            return value['bytes']
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list) else value
