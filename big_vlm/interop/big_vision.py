"""big_vision's `.npz` files: its names are ours; layers one by one (SigLIP 1) or stacked (SigLIP 2, PaliGemma)."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from big_vlm.config import UserError, unknown, whole_file
from big_vlm.interop.lazy import LazyWeights

_LAYER = re.compile(r'((?:.*/)?encoderblock)_(\d+)/(.*)')
_PREFIX = 'params/'


def split(path: str | os.PathLike) -> tuple[pathlib.Path, str]:
    """'model.npz:img/Transformer' → (model.npz, 'img/Transformer'); without a colon the subtree is ''."""
    file, colon, part = os.fspath(path).rpartition('.npz:')
    if not colon:
        file, part = os.fspath(path), ''
    return pathlib.Path(file + '.npz' if colon else file).expanduser(), part.strip('/')


def read(path: str | os.PathLike) -> LazyWeights:
    """The weights of FILE.npz, or of FILE.npz:SUBTREE, under the names below it, layers stacked.

    Of a training checkpoint ('params/…' beside 'opt/…') the parameters are taken. bfloat16, which numpy stores as
    void of two bytes, is bfloat16 again.

    Raises:
      UserError: no such file, no .npz, damaged, pickled objects inside, no such subtree, layers missing or unlike.
    """
    file, part = split(path)
    with _damage(file), zipfile.ZipFile(file) as archive:
        stored = {}
        for entry in archive.namelist():
            with archive.open(entry) as stream:
                shape, dtype = _header(stream)
            if dtype.hasobject:
                raise UserError(f'{file}: {entry} holds pickled Python objects, which are never read: it may run code')
            if not entry.endswith('.npy'):
                raise UserError(f'{file}: {entry} is no array: an .npz file holds .npy entries only')
            stored[entry.removesuffix('.npy')] = jax.ShapeDtypeStruct(shape, _logical(dtype))
    if any(name.startswith(_PREFIX) for name in stored):
        stored = {name: leaf for name, leaf in stored.items() if name.startswith(_PREFIX)}
    entries = {name.removeprefix(_PREFIX): name for name in stored}

    def read_entry(name: str) -> np.ndarray:
        with _damage(file), zipfile.ZipFile(file) as archive, archive.open(f'{entries[name]}.npy') as stream:
            array = np.lib.format.read_array(stream, allow_pickle=False)
        return array.view(_logical(array.dtype))

    flat = LazyWeights({name: stored[entry] for name, entry in entries.items()}, read_entry, str(file))
    below = _stacked(flat).below(part)
    if not below.shapes:
        raise unknown('subtree', part, {name.split('/')[0] for name in flat.shapes}, str(file))
    return below


def write(
    file: str | os.PathLike, weights: LazyWeights, *, per_layer: bool = False, done: Callable[[int], None] | None = None
) -> None:
    """Writes weights under our names as big_vision saves them ('params/…'), one array at a time.

    Args:
      file: appears under this name when it is whole; one that was there is replaced.
      weights: what to write.
      per_layer: the encoders' layers one by one, as SigLIP 1 has them; else stacked, as SigLIP 2.
      done: called with the bytes of each array written.

    Raises:
      UserError: the folder cannot be written, or the disk is full.
    """
    file = pathlib.Path(file)
    with whole_file.writing(file) as part, zipfile.ZipFile(part, 'w', zipfile.ZIP_STORED) as archive:
        for name in sorted(weights.shapes, key=lambda name: name.split('/')):
            array = np.asarray(weights.read(name))
            layers = enumerate(array) if per_layer and '/encoderblock/' in name else [('', array)]
            for i, entry in layers:
                entry_name = name if i == '' else name.replace('/encoderblock/', f'/encoderblock_{i}/')
                # In this order and without a date of its own, the same weights give the same file.
                with archive.open(zipfile.ZipInfo(f'{_PREFIX}{entry_name}.npy'), 'w', force_zip64=True) as stream:
                    np.lib.format.write_array(stream, _storable(entry), allow_pickle=False)
            if done:
                done(array.nbytes)
            del array, layers, entry  # before the next one is read


def _stacked(weights: LazyWeights) -> LazyWeights:
    """encoderblock_0 … encoderblock_{L-1} as one encoderblock with a leading L."""
    layers: dict[str, dict[int, str]] = {}
    alone = {}
    for name in weights.shapes:
        if found := _LAYER.fullmatch(name):
            layers.setdefault(f'{found[1]}/{found[3]}', {})[int(found[2])] = name
        else:
            alone[name] = weights.shapes[name]
    depth: dict[str, int] = {}
    for name, found in layers.items():
        depth[_block(name)] = max(depth.get(_block(name), 0), max(found) + 1)
    problems, shapes = [], {}
    for name, found in layers.items():
        absent = [i for i in range(depth[_block(name)]) if i not in found]
        unlike = {weights.shapes[entry].shape for entry in found.values()}
        if absent:
            problems.append(f'{name} lacks layer{"s" * (len(absent) > 1)} {", ".join(map(str, absent))}')
        elif len(unlike) > 1:
            problems.append(f'{name} has layers of shapes {" and ".join(str(list(s)) for s in sorted(unlike))}')
        elif name in alone:
            problems.append(f'{name} is there both stacked and layer by layer')
        else:
            leaf = weights.shapes[found[0]]
            shapes[name] = jax.ShapeDtypeStruct((depth[_block(name)], *leaf.shape), leaf.dtype)
    if problems:
        raise UserError(f'{weights.where}: {"; ".join(problems[:4])}{"; …" if len(problems) > 4 else ""}')

    def read_stack(name: str) -> np.ndarray:
        if name in alone:
            return weights.read(name)
        stack = np.empty(shapes[name].shape, shapes[name].dtype)
        for i, entry in layers[name].items():
            stack[i] = weights.read(entry)
        return stack

    return LazyWeights(alone | shapes, read_stack, weights.where)


def _block(name: str) -> str:
    """'txt/Encoder_0/encoderblock/…' → 'txt/Encoder_0/'."""
    return name[: name.index('encoderblock/')]


@contextlib.contextmanager
def _damage(file: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f'{file}: cannot be read: {error.strerror or error}') from error
    # What zipfile raises besides: NotImplementedError for another compression, RuntimeError for an encrypted entry.
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f'{file}: damaged or not an .npz file ({" ".join(str(error).split())[:120]})') from error


def _header(stream) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype as stored) of one .npy entry; the array itself is not read."""
    version = np.lib.format.read_magic(stream)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in headers:
        raise ValueError(f'.npy format {version}')
    shape, _, dtype = headers[version](stream)
    return shape, dtype


def _logical(stored: np.dtype) -> np.dtype:
    return np.dtype(jnp.bfloat16) if stored == np.dtype('V2') else stored


def _storable(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array, order='C')
    return array.view('V2') if array.dtype == jnp.bfloat16 else array
