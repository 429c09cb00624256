"""Weights alone, by name: what a bundle holds and what another stage starts from."""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from big_vlm.checkpoints import orbax_errors, trees
from big_vlm.config import UserError, unknown

_MARK = '_METADATA'  # Orbax writes it into every folder of arrays
_CHUNK = 16 << 20  # bytes: an array is read and written in such pieces, and not twice in memory meanwhile


@dataclasses.dataclass(frozen=True)
class Unread:
    """An array that `save_weights` reads when its turn comes, and then drops.

    Attributes:
      shape, dtype: of the array.
      read: makes it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


class _OneByOne(type_handlers.NumpyHandler):
    """Writes one array after the other: what is in memory is one of them."""

    async def serialize(self, values, infos, args=None):
        for value, info, arg in zip(values, infos, args, strict=True):
            for written in await super().serialize([value.read()], [info], [arg]):
                written.result()
        return []


def save_weights(directory: str | pathlib.Path, params: Any) -> None:
    """Writes a pytree of arrays as nested dicts, atomically; returns when it is on disk.

    All leaves are arrays, or all are Unread and come one by one, which one process alone may do. Weights that were
    there are replaced. Raises UserError if `directory` holds anything else.
    """
    directory = pathlib.Path(directory).resolve()
    foreign = directory.is_file() or (directory.is_dir() and any(directory.iterdir()))
    if foreign and not (directory / _MARK).is_file():
        raise UserError(f'{directory} holds something else than weights and would be lost: choose another folder')
    tree = trees.nested(trees.flat(params))
    pieces = jax.tree.map(lambda leaf: ocp.SaveArgs(chunk_byte_size=_CHUNK), tree)
    if any(isinstance(leaf, Unread) for leaf in jax.tree.leaves(tree)):
        registry = type_handlers.create_type_handler_registry((Unread, _OneByOne(deepcopy_host_arrays=False)))
        # Files of their own: OCDBT's are written when an array is complete, and hold it in memory till then.
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_ocdbt=False)
        with orbax_errors.plain(), ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(directory, args=ocp.args.PyTreeSave(tree, save_args=pieces), force=True)
        return
    with orbax_errors.plain(), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory, tree, save_args=pieces, force=True)
        checkpointer.wait_until_finished()


def weight_shapes(directory: str | pathlib.Path, part: str = '') -> Any:
    """What `directory` holds, as nested dicts of jax.ShapeDtypeStruct without shardings; see `load_weights`."""
    return trees.nested(_find(directory, part).leaves)


def load_weights(directory: str | pathlib.Path, like: Any = None, part: str = '') -> Any:
    """Reads weights that `save_weights` wrote, or the parameters and running statistics of a training checkpoint.

    Args:
      directory: a weights folder, a bundle, a training checkpoint DIR/STEP, or DIR for its newest step.
      like: pytree of jax.ShapeDtypeStruct; leaves with a sharding become jax.Arrays placed so, others numpy arrays.
        Leaves are cast to its dtypes; more may be stored than it names. None: all of it, as numpy arrays.
      part: the subtree to read, '/'-joined, such as 'img'; '' is everything. `like` describes the subtree.

    Returns:
      Arrays in the containers of `like`, or in nested dicts.

    Raises:
      UserError: no such folder, a folder of something else, no such part, leaves missing or of other shapes.
    """
    found = _find(directory, part)
    wanted = found.leaves if like is None else trees.flat(like)
    where = f'weights {directory}' + (f' (part {part})' if part else '')
    trees.check_same(wanted, found.leaves, where, partial=True)
    args = {}
    for key, leaf in wanted.items():
        if leaf.sharding is not None:
            args[found.paths[key]] = ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype)
        else:
            args[found.paths[key]] = ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    item = trees.nested({found.paths[key]: leaf for key, leaf in wanted.items()})
    # Reading waits for no other process: the first one reads bundles alone when it makes the report.
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(here, {here}, barrier_sync_key_prefix=str(here))
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    try:
        with orbax_errors.plain(), ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            restored = checkpointer.restore(
                found.folder,
                args=ocp.args.PyTreeRestore(item, restore_args=trees.nested(args), partial_restore=True),
            )
    except (ValueError, OSError) as error:
        raise UserError(f'{where}: damaged: {trees.one_line(error)}') from error
    restored = trees.flat(restored)
    leaves = {key: restored[found.paths[key]] for key in wanted}
    return trees.nested(leaves) if like is None else trees.like(like, leaves)


def open_weights(directory: str | pathlib.Path) -> tuple[Any, Callable[[str], np.ndarray]]:
    """(`weight_shapes`, a function from the '/'-joined path of an array to that array).

    It reads piece by piece: what is in memory is the array and a piece, where Orbax would read all pieces at once. A
    piece is what `save_weights` wrote as one; the arrays of a training checkpoint are one each.

    Raises UserError as `load_weights` does; so does the function, for an array that is damaged.
    """
    found = _find(directory, '')
    together = type_handlers.is_ocdbt_checkpoint(found.folder)

    def read(path: str) -> np.ndarray:
        # Orbax's files, as TensorStore calls them: an array's own folder, or its place in one store for all.
        name = f'{found.names[path]}/'
        place = {'driver': 'file', 'path': f'{found.folder}/' + ('' if together else name)}
        if together:
            place = {'driver': 'ocdbt', 'base': place, 'path': name}
        try:
            array = ts.open({'driver': 'zarr', 'kvstore': place, 'fill_missing_data_reads': False}, read=True).result()
            out = np.empty(array.shape, array.dtype.numpy_dtype)
            for piece in _pieces(array.shape, array.chunk_layout.read_chunk.shape or ()):
                out[piece] = array[piece].read().result()
        except (ValueError, OSError) as error:
            raise UserError(f'weights {directory}: {path} is damaged: {trees.one_line(error)}') from error
        return out

    return trees.nested(found.leaves), read


def _pieces(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """The slices that cut an array of `shape` into its chunks."""
    starts = (range(0, size, step) for size, step in zip(shape, chunk, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(slice(i, min(i + step, size)) for i, step, size in zip(corner, chunk, shape, strict=True))


@dataclasses.dataclass(frozen=True)
class _Found:
    folder: pathlib.Path
    paths: Mapping[str, str]  # path below the part → path inside the folder
    names: Mapping[str, str]  # path below the part → what Orbax calls its files
    leaves: Mapping[str, jax.ShapeDtypeStruct]  # path below the part → shape, dtype


def _find(directory: str | pathlib.Path, part: str) -> _Found:
    path = pathlib.Path(directory).resolve()
    if not path.is_dir():
        raise UserError(f'no folder {directory}: weights are read from a bundle, a weights folder or a checkpoint')
    steps = sorted((int(f.name) for f in path.iterdir() if f.name.isdecimal()), reverse=True)
    of_state = 'params/', 'stats/'
    inside = [(path, ('',)), (path / 'weights', ('',)), (path / 'state', of_state)]
    inside += [(path / str(step) / 'state', of_state) for step in steps[:1]]
    found = [(folder, prefixes) for folder, prefixes in inside if (folder / _MARK).is_file()]
    if not found:
        raise UserError(f'{directory} is not a bundle, a weights folder or a checkpoint: nothing in it can be read')
    folder, prefixes = found[0]
    try:
        stored = trees.flat(ocp.PyTreeCheckpointHandler().metadata(folder).tree)
    except (ValueError, OSError) as error:
        raise UserError(f'weights {directory}: damaged: {trees.one_line(error)}') from error
    paths = {key.removeprefix(prefix): key for prefix in prefixes for key in stored if key.startswith(prefix)}
    below = f'{part}/' if part else ''
    inside_part = {key.removeprefix(below): path for key, path in paths.items() if key.startswith(below)}
    if not inside_part:
        raise unknown('part', part, {key.split('/')[0] for key in paths}, str(directory))
    leaves = {key: jax.ShapeDtypeStruct(stored[path].shape, stored[path].dtype) for key, path in inside_part.items()}
    names = {key: stored[path].name for key, path in inside_part.items()}
    return _Found(folder, inside_part, names, leaves)
