"""TFRecord files to ArrayRecord: the same serialised examples in files of random access, without TensorFlow.

A record of a TFRecord file is its length (8 bytes), the masked CRC-32C of these bytes (4), the record, and its own
masked CRC-32C (4), all little-endian.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from big_vlm.config import UserError, whole_file

INFO = 'dataset_info.json'  # TFDS's metadata
_POLYNOMIAL = 0x82F63B78  # Castagnoli's, reflected
_LANES = 256
_GROUP = 'group_size:1'  # every record can be read alone, as TFDS writes them


def _table() -> np.ndarray:
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = np.where(values & 1, (values >> 1) ^ np.uint32(_POLYNOMIAL), values >> 1)
    return values


_TABLE = _table()


def crc32c(data: bytes) -> int:
    """The CRC-32C (Castagnoli) of some bytes; b'123456789' has 0xE3069283.

    A CRC is linear: equal parts are computed side by side, each as if it came first, and joined by what as many zero
    bytes make of the state before. 32 further lanes, of one bit each, learn that on the way.
    """
    buffer = np.frombuffer(data, np.uint8)
    steps = len(buffer) // _LANES
    head = len(buffer) - steps * _LANES
    state = 0xFFFFFFFF
    for byte in data[:head]:
        state = int(_TABLE[(state ^ byte) & 0xFF]) ^ (state >> 8)
    if steps:
        lanes = np.zeros((steps, _LANES + 32), np.uint8)
        lanes[:, :_LANES] = buffer[head:].reshape(_LANES, steps).T
        states = np.concatenate([np.zeros(_LANES, np.uint32), np.uint32(1) << np.arange(32, dtype=np.uint32)])
        for row in lanes:
            states = _TABLE[(states ^ row) & np.uint32(0xFF)] ^ (states >> np.uint32(8))
        after_zeros = [int(value) for value in states[_LANES:]]
        for lane in states[:_LANES].tolist():
            moved = 0
            for bit, value in enumerate(after_zeros):
                if state >> bit & 1:
                    moved ^= value
            state = moved ^ lane
    return state ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """As TFRecord stores it: rotated right by 15 bits, plus a constant, so that CRCs of CRCs are sound."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def framed(record: bytes) -> bytes:
    """A record as it stands in a TFRecord file."""
    length = struct.pack('<Q', len(record))
    crcs = (struct.pack('<I', masked_crc32c(part)) for part in (length, record))
    return length + next(crcs) + record + next(crcs)


def read(path: Path) -> Iterator[bytes]:
    """The records of a TFRecord file, every checksum checked. Raises UserError, with the record, where one is wrong."""
    with open(path, 'rb') as file:
        number = 0
        while head := file.read(12):
            where = f'{path}: record {number}'
            if len(head) < 12 or struct.unpack('<I', head[8:])[0] != masked_crc32c(head[:8]):
                raise UserError(f'{where}: its length is damaged: copy or prepare the file again')
            (length,) = struct.unpack('<Q', head[:8])
            data, check = file.read(length), file.read(4)
            if len(data) < length or len(check) < 4:
                raise UserError(f'{where}: the file ends within it: copy or prepare the file again')
            if struct.unpack('<I', check)[0] != masked_crc32c(data):
                raise UserError(f'{where}: its checksum is wrong: copy or prepare the file again')
            yield data
            number += 1


def to_array_record(folder: Path, progress: Callable[[str, int], None] | None = None) -> list[Path]:
    """Writes the ArrayRecord files of a dataset that TFDS prepared as TFRecord, and has its metadata say so.

    The TFRecord files stay. The metadata is changed last, so that a conversion that was stopped is begun again.

    Args:
      folder: of one version of a dataset, with its dataset_info.json.
      progress: called with each file's name and the records written so far.

    Returns:
      The files written.

    Raises:
      UserError: no such dataset, another format than TFRecord, a damaged file, a number of records that the metadata
        does not have, a folder that cannot be written.
    """
    info, files = _info(folder)
    kind = info['fileFormat']
    if kind != 'tfrecord':
        raise UserError(
            f'{folder}: its files are {kind}, not tfrecord{": nothing to do" if kind == "array_record" else ""}'
        )
    written = []
    for name, length in files.items():
        if not (folder / name).is_file():
            raise UserError(f'{folder}: no file {name}, which {INFO} tells of')
        written.append(_convert(folder / name, length, progress))
    whole_file.write_text(folder / INFO, json.dumps(info | {'fileFormat': 'array_record'}, indent=2))
    return written


def is_converted(folder: Path) -> bool:
    """Whether the metadata says ArrayRecord. Raises UserError where there is none."""
    return _info(folder)[0]['fileFormat'] == 'array_record'


def _info(folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The metadata, and TFRecord file → records."""
    try:
        info, files = json.loads((folder / INFO).read_text(encoding='utf-8')), {}
        for split in info['splits']:
            lengths = split['shardLengths']
            for number, length in enumerate(lengths):
                files[f'{info["name"]}-{split["name"]}.tfrecord-{number:05d}-of-{len(lengths):05d}'] = int(length)
        info['fileFormat'] = info.get('fileFormat') or 'tfrecord'  # as TFDS reads metadata of before it had the field
    except (OSError, ValueError, KeyError, TypeError) as error:
        missing = f', {error} is missing' if isinstance(error, KeyError) else ''
        raise UserError(
            f'{folder}: no {INFO} as TFDS writes it{missing}: name the folder of a version, DATASET/CONFIG/1.0.0'
        ) from error
    return info, files


def _convert(source: Path, length: int, progress: Callable[[str, int], None] | None) -> Path:
    target = source.with_name(source.name.replace('.tfrecord-', '.array_record-'))
    part = target.with_name(target.name + '.part')
    count = 0
    try:
        writer = ArrayRecordWriter(str(part), _GROUP)
        for count, record in enumerate(read(source), start=1):
            writer.write(record)
            if progress:
                progress(source.name, count)
        writer.close()
        if count != length:
            raise UserError(f'{source}: {count} records, but dataset_info.json tells of {length}')
        os.replace(part, target)
    except (OSError, RuntimeError) as error:
        raise UserError(f'{target}: cannot be written: {error}') from error
    finally:
        part.unlink(missing_ok=True)
    return target
