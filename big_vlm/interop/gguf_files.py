"""GGUF files, the single-file format of llama.cpp: what they say about themselves, and their tensors dequantised.

Files are written by the package `gguf`, tensor by tensor. Of one that is read a tensor is read and
dequantised when it is asked for; that and the sizes of its types are the package's too. The header is parsed here: its
reader makes several numpy views of each of the quarter of a million pieces of a Gemma 3's vocabulary (measured: 43 s
and 740 MB before the first weight; here 0.3 s).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from big_vlm.config import UserError, unknown, whole_file
from big_vlm.interop.lazy import LazyWeights

# How matrices can be written, and llama.cpp's number of a file of them.
PRECISIONS = {'F32': 0, 'F16': 1, 'Q8_0': 7, 'BF16': 32}
_MAGIC, _VERSIONS, _ALIGNMENT = b'GGUF', (2, 3), 32
_STRING, _ARRAY = 8, 9
_PIECE = 4 << 20  # bytes of the file
_SCALARS = {0: 'u1', 1: 'i1', 2: '<u2', 3: '<i2', 4: '<u4', 5: '<i4', 6: '<f4', 7: '?', 10: '<u8', 11: '<i8', 12: '<f8'}


@dataclasses.dataclass(frozen=True)
class File:
    """What a file holds.

    Attributes:
      said: key → str, bool, int or float; where there are many, a numpy array or, of strings, a list of bytes.
      weights: every tensor as float32, under its name in the file.
    """

    said: Mapping[str, Any]
    weights: LazyWeights


def read(file: pathlib.Path) -> File:
    """Raises UserError: no such file, no GGUF, cut short, one part of several, a type that cannot be dequantised."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ModuleNotFoundError:
        raise UserError(f'{file}: GGUF files are read with the package gguf: pip install gguf') from None
    try:
        with file.open('rb') as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f'{file}: cannot be read: {error.strerror}') from None
    except ValueError:
        raise UserError(f'{file} is empty') from None
    said, tensors, start = _header(_Cursor(data, file))
    if str(said.get('split.count', 1)) not in ('0', '1'):
        raise UserError(f'{file} is one of {said["split.count"]} parts: join them first, llama-gguf-split --merge')
    shapes, places, unknown, beyond, kinds = {}, {}, [], [], set(GGMLQuantizationType)
    for name, (shape, kind, offset) in tensors.items():
        if kind not in kinds or not shape or shape[-1] % GGML_QUANT_SIZES[kind][0]:
            unknown.append(f'{name} (type {kind}, {list(shape)})')
            continue
        block, nbytes = GGML_QUANT_SIZES[kind]
        stored = (*shape[:-1], shape[-1] // block * nbytes)
        if start + offset + math.prod(stored) > len(data):
            beyond.append(name)
        shapes[name] = jax.ShapeDtypeStruct(shape, np.float32)
        places[name] = (start + offset, stored, GGMLQuantizationType(kind))
    if unknown:
        raise UserError(f'{file}: cannot be dequantised: {", ".join(unknown[:4])}: update the package gguf')
    if beyond:
        raise UserError(f'{file}: cut short, {len(beyond)} of {len(tensors)} tensors end beyond it: download it again')

    def read_tensor(name: str) -> np.ndarray:
        offset, stored, kind = places[name]
        rows, width = math.prod(stored[:-1]), stored[-1]
        out = np.empty((rows, *shapes[name].shape[-1:]), np.float32)
        some = max(_PIECE // width, 1)  # rows at a time: dequantising takes several times their size
        for start in range(0, rows, some):
            count = min(some, rows - start)
            try:  # not through the map, whose pages would stay
                raw = np.fromfile(file, np.uint8, count * width, offset=offset + start * width).reshape(count, width)
            except (OSError, ValueError) as error:
                raise UserError(f'{file}: {name} cannot be read: {error}') from None
            if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
                raw = raw.view('<f4' if kind == GGMLQuantizationType.F32 else '<f2')
            try:
                out[start : start + count] = dequantize(raw, kind)
            except (NotImplementedError, ValueError) as error:  # the former: gguf, of kinds that it only names
                raise UserError(f'{file}: {name} is {kind.name} and cannot be dequantised ({error})') from None
        return out.reshape(shapes[name].shape)

    return File(said, LazyWeights(shapes, read_tensor, str(file)))


def write(
    file: pathlib.Path,
    architecture: str,
    said: Mapping[str, Any],
    weights: LazyWeights,
    precision: str = 'F32',
    done: Callable[[int], None] | None = None,
) -> None:
    """Writes a file, one tensor in memory at a time.

    Args:
      file: appears under this name when it is whole; one that was there is replaced.
      architecture: 'general.architecture'.
      said: key → str, bool, int (32 bits), float, or a list of str, int or float.
      weights: every tensor, under its name in the file.
      precision: of matrices, one of PRECISIONS; vectors are float32, as are matrices whose rows a block does not fit.
      done: called with the bytes of each tensor as it was read.

    Raises:
      UserError: an unknown precision, a folder that cannot be written, a full disk.
    """
    if precision not in PRECISIONS:
        raise unknown('precision', precision, PRECISIONS)
    try:
        from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, GGUFValueType, GGUFWriter
        from gguf.quants import quantize
    except ModuleNotFoundError:
        raise UserError(f'{file}: GGUF files are written with the package gguf: pip install gguf') from None
    plain, matrices = GGMLQuantizationType.F32, GGMLQuantizationType[precision]
    forms = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    forms |= {str: GGUFValueType.STRING, list: GGUFValueType.ARRAY}
    said = said | {'general.file_type': PRECISIONS[precision], 'general.quantization_version': GGML_QUANT_VERSION}
    with whole_file.writing(file) as part:
        writer = GGUFWriter(part, architecture)
        for key, value in said.items():
            writer.add_key_value(key, value, forms[type(value)])
        kinds = {}
        for name, leaf in weights.shapes.items():
            fits = len(leaf.shape) > 1 and leaf.shape[-1] % GGML_QUANT_SIZES[matrices][0] == 0
            kinds[name] = kind = matrices if fits else plain
            block, nbytes = GGML_QUANT_SIZES[kind]
            writer.add_tensor_info(name, leaf.shape, np.dtype(np.float32), leaf.size // block * nbytes, kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, kind in kinds.items():
                array = weights.read(name)
                writer.write_tensor_data(quantize(np.asarray(array, np.float32), kind))
                if done:
                    done(array.nbytes)
            writer.close()
        finally:
            with contextlib.suppress(OSError):  # a full disk, told again as what is left in a buffer is dropped
                writer.close()


class _Cursor:
    """Reads one value after the other and says where the file ends too early."""

    def __init__(self, data: mmap.mmap, file: pathlib.Path):
        self.data, self.file, self.at = data, file, 0

    def damaged(self, why: str) -> UserError:
        return UserError(f'{self.file}: damaged or cut short ({why} at byte {self.at:,}): download it again')

    def take(self, size: int) -> int:
        """Where the next `size` bytes begin; steps over them."""
        start = self.at
        if size > len(self.data) - start:
            raise self.damaged(f'{size:,} bytes expected')
        self.at += size
        return start

    def number(self, form: str) -> int:
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0]

    def bytes(self) -> bytes:
        size = self.number('<Q')
        start = self.take(size)
        return self.data[start : start + size]

    def text(self) -> str:
        try:
            return self.bytes().decode()
        except UnicodeDecodeError:
            raise self.damaged('no text') from None

    def numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in _SCALARS:
            raise self.damaged(f'a value of type {kind}')
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.data, dtype, count, self.take(count * dtype.itemsize))

    def value(self) -> Any:
        kind = self.number('<I')
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            kind, count = self.number('<I'), self.number('<Q')
            return [self.bytes() for _ in range(count)] if kind == _STRING else self.numbers(kind, count)
        return self.numbers(kind, 1)[0].item()


def _header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]], int]:
    """(what the file says, name → (shape, type, offset), where the tensors begin)."""
    if cursor.data[:4] != _MAGIC:
        raise UserError(f'{cursor.file} is no GGUF file: it does not begin with {_MAGIC.decode()}')
    cursor.take(4)
    if (version := cursor.number('<I')) not in _VERSIONS:
        raise UserError(f'{cursor.file}: GGUF version {version}: versions {_VERSIONS[0]} and {_VERSIONS[1]} are read')
    count, keys = cursor.number('<Q'), cursor.number('<Q')
    said = {}
    for _ in range(keys):
        key = cursor.text()
        said[key] = cursor.value()
    tensors = {}
    for _ in range(count):
        name, axes = cursor.text(), cursor.number('<I')
        shape = tuple(cursor.numbers(10, axes).tolist()[::-1])  # theirs names the fastest axis first
        tensors[name] = (shape, cursor.number('<I'), cursor.number('<Q'))
    alignment = said.get('general.alignment', _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise cursor.damaged(f'an alignment of {alignment}')
    return said, tensors, -(-cursor.at // alignment) * alignment
