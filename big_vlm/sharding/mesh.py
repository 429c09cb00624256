"""The device mesh, and what of a batch this process loads and holds.

Axes are always ('data', 'fsdp', 'model'), of type Auto. Batches are split over data and fsdp together; devices that
differ only along model hold the same examples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from big_vlm.config import UserError

AXES = ('data', 'fsdp', 'model')
BATCH_AXES = ('data', 'fsdp')


def make_mesh(data: int = -1, fsdp: int = 1, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all `devices` (default: every device of every process) with axes ('data', 'fsdp', 'model').

    Args:
      data: devices along which only the batch is split; -1 takes what the other two leave.
      fsdp: devices along which the batch and the large parameters are split.
      model: devices along which heads, mlp and vocabulary are split.
      devices: the devices to use, in any order.

    Raises:
      UserError: a size is not positive, or the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices)
    for name, size in (('data', data), ('fsdp', fsdp), ('model', model)):
        if size < 1 and not (name == 'data' and size == -1):
            allowed = 'at least 1, or -1 for the rest' if name == 'data' else 'at least 1'
            raise UserError(f'mesh.{name}={size}: must be {allowed}')
    if data == -1:
        if count % (fsdp * model):
            raise UserError(
                f'mesh: {count} devices cannot be divided by fsdp={fsdp} × model={model} = {fsdp * model}: '
                f'choose sizes whose product is one of {_divisors(count)}'
            )
        data = count // (fsdp * model)
    if data * fsdp * model != count:
        raise UserError(
            f'mesh: data={data} × fsdp={fsdp} × model={model} = {data * fsdp * model}, but there are {count} devices: '
            'set mesh.data=-1 to use the rest'
        )
    return jax.make_mesh((data, fsdp, model), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading dimension split over data and fsdp, everything else whole."""
    return NamedSharding(mesh, P(BATCH_AXES))


def data_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape['data'] * mesh.shape['fsdp']


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which of `count` equal parts of every global batch this process loads.

    Follows from where this process's devices sit in the mesh. Processes that differ only along the model axis get the
    same index, so `count` can be smaller than the number of processes.

    Raises:
      UserError: the processes' parts overlap only partly, or this process has no device in the mesh.
    """
    owner = np.array([d.process_index for d in mesh.devices.flat]).reshape(-1, mesh.shape['model'])
    return _shard_of(owner, jax.process_index())


def sum_of_shards(counts: np.ndarray, mesh: Mesh) -> np.ndarray:
    """The sum of every data shard's counts, int64 [N]; of processes that load the same rows, one counts.

    To be asked by all processes at once.
    """
    if jax.process_count() == 1:
        return counts
    index, _ = data_shard(mesh)
    own = np.array([index, *counts], np.int64)
    # As pairs of 32 bits, which is what devices take.
    told = np.ascontiguousarray(multihost_utils.process_allgather(own.view(np.int32))).view(np.int64)
    _, first = np.unique(told[:, 0], return_index=True)
    return told[first, 1:].sum(axis=0)


def anywhere(flags: np.ndarray | bool, mesh: Mesh | None = None) -> np.ndarray:
    """bool, of any shape: where any process of the mesh (None: any at all) has one. To be asked by all of them at once,
    in their main threads."""
    flags = np.asarray(flags, bool)
    if not (jax.process_count() > 1 if mesh is None else mesh.is_multi_process):
        return flags
    return multihost_utils.process_allgather(flags).any(axis=0)


def wait(name: str) -> None:
    """Until every process is here. `name` tells this place in the program from others."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Raises UserError, naming sizes that work, unless `batch_size` divides over the data and fsdp axes."""
    parts = data_parts(mesh)
    if batch_size < 1 or batch_size % parts:
        below = batch_size // parts * parts
        works = f'{below} or {below + parts}' if below > 0 else f'{parts} or {2 * parts}'
        raise UserError(
            f'batch_size={batch_size} does not divide over the {parts} devices of mesh data={mesh.shape["data"]} × '
            f'fsdp={mesh.shape["fsdp"]}: use {works}'
        )


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> Any:
    """This process's rows of a batch → global arrays sharded by `batch_sharding`.

    Args:
      batch: dict (or any pytree) of arrays [rows, ...]: shard `data_shard(mesh)` of the global batch.
      mesh: from `make_mesh`.

    Returns:
      The same tree of jax.Array [rows · count, ...].

    Raises:
      UserError: the global batch does not divide over the mesh.
    """
    _, count = data_shard(mesh)
    sharding = batch_sharding(mesh)
    for x in jax.tree.leaves(batch):
        check_batch(mesh, len(x) * count)

    def put(x):
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(sharding, x, (len(x) * count, *x.shape[1:]))

    return jax.tree.map(put, batch)


def _shard_of(owner: np.ndarray, process: int) -> tuple[int, int]:
    """owner [parts of the batch, model]: the process of each device. Returns this process's (index, count)."""
    held = {p: tuple(np.flatnonzero((owner == p).any(axis=1))) for p in np.unique(owner)}
    if process not in held:
        raise UserError(
            f'mesh: process {process} has no device in the mesh: build it from the devices of all processes'
        )
    groups = sorted(set(held.values()))
    if sum(map(len, groups)) != len(owner) or len({len(g) for g in groups}) != 1:
        raise UserError(
            f'mesh: the {len(owner)} parts of the batch do not fall evenly on {len(held)} processes: choose a model '
            'size that divides the devices of one process, or is a multiple of them'
        )
    return groups.index(held[process]), len(groups)


def _divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]
