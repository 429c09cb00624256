"""Folders of safetensors files: one file, or shards and their index."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from big_vlm.config import UserError
from big_vlm.interop.lazy import LazyWeights

_SINGLE, _INDEX = 'model.safetensors', 'model.safetensors.index.json'
_DTYPES = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}
SHARD_BYTES = 2 << 30


def holds(folder: pathlib.Path) -> bool:
    """Whether there is anything for `read`."""
    return (folder / _SINGLE).is_file() or (folder / _INDEX).is_file()


def read(folder: pathlib.Path, without: re.Pattern[str] | None = None) -> LazyWeights:
    """All tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names, but those
    whose names match `without`.

    Raises UserError: neither is there, a shard is missing, a file is damaged or cut short, a dtype that holds no
    weights, an index that disagrees with its shards.
    """
    if (folder / _INDEX).is_file():
        shards = _index(folder / _INDEX)
    elif (folder / _SINGLE).is_file():
        shards = {_SINGLE: None}
    else:
        raise UserError(f'{folder} has neither {_SINGLE} nor {_INDEX}: weights are read from safetensors files only')
    shapes, home = {}, {}
    for shard, promised in shards.items():
        file = folder / shard
        try:
            with safe_open(file, 'numpy') as stream:
                names = set(stream.keys())
                if promised is not None and names != promised:
                    odd = sorted(names ^ promised)[0]
                    raise UserError(f'{file}: {_INDEX} and this file disagree about {odd}: download the folder again')
                for name in sorted(names, key=_natural):
                    if without and without.fullmatch(name):
                        continue
                    part = stream.get_slice(name)
                    if part.get_dtype() not in _DTYPES:
                        raise UserError(f'{file}: {name} is {part.get_dtype()}: weights must be one of {list(_DTYPES)}')
                    dtype = jnp.dtype(_DTYPES[part.get_dtype()])
                    shapes[name] = jax.ShapeDtypeStruct(tuple(part.get_shape()), dtype)
                    home[name] = file
        except FileNotFoundError:
            raise UserError(f'{file} is missing, and {_INDEX} names it: download the folder again') from None
        except (SafetensorError, OSError) as error:
            raise UserError(f'{file}: damaged or cut short ({error}): download it again') from None

    def read_tensor(name: str) -> np.ndarray:
        try:
            with safe_open(home[name], 'numpy') as stream:
                return stream.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f'{home[name]}: damaged ({error}): download it again') from None

    return LazyWeights(shapes, read_tensor, str(folder))


def write(folder: pathlib.Path, weights: LazyWeights, done: Callable[[int], None] | None = None) -> None:
    """Writes all weights into `folder`, at most SHARD_BYTES (and a tensor) in memory; an index if that took several.

    `done` is called with the bytes of each tensor read. Raises OSError where the disk is full.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, leaf in weights.shapes.items():
        nbytes = leaf.size * leaf.dtype.itemsize
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    index = {}
    for i, names in enumerate(shards, 1):
        file = _SINGLE if len(shards) == 1 else f'model-{i:05d}-of-{len(shards):05d}.safetensors'
        tensors = {}
        for name in names:
            tensors[name] = weights.read(name)
            if done:
                done(tensors[name].nbytes)
        try:
            save_file(tensors, folder / file, metadata={'format': 'pt'})
        except SafetensorError as error:  # how it says that the disk is full
            raise OSError(str(error)) from error
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        listing = {'metadata': {'total_size': weights.nbytes}, 'weight_map': dict(sorted(index.items()))}
        (folder / _INDEX).write_text(json.dumps(listing, indent=2) + '\n', encoding='utf-8')


def _index(file: pathlib.Path) -> dict[str, set[str]]:
    """Shard → the tensors it should hold."""
    try:
        entries = dict(json.loads(file.read_text(encoding='utf-8'))['weight_map'])
        shards: dict[str, set[str]] = {}
        for name, shard in entries.items():
            shards.setdefault(str(shard), set()).add(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{file}: damaged ({type(error).__name__}: {error}): download it again') from None
    for shard in shards:
        # A name that leads elsewhere would read another folder's file.
        if pathlib.PurePath(shard).name != shard or not shard.endswith('.safetensors'):
            raise UserError(f'{file}: {shard!r} is no safetensors file of this folder')
    return shards


def _natural(name: str) -> list[str | int]:
    return [int(x) if x.isdigit() else x for x in re.split(r'(\d+)', name)]
