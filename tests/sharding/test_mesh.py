"""The mesh, the shard of the data each process loads, and batches as global arrays."""

import os
import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from big_vlm.config import UserError
from big_vlm.sharding import mesh as meshes


@pytest.mark.parametrize(
    'sizes, expected',
    [((), (8, 1, 1)), ((-1, 2), (4, 2, 1)), ((-1, 2, 2), (2, 2, 2)), ((1, 8, 1), (1, 8, 1)), ((2, 1, 4), (2, 1, 4))],
)
def test_sizes(sizes, expected):
    mesh = meshes.make_mesh(*sizes)
    assert dict(mesh.shape) == dict(zip(('data', 'fsdp', 'model'), expected, strict=True))
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


def test_some_devices():
    mesh = meshes.make_mesh(fsdp=2, devices=jax.devices()[:4])
    assert mesh.devices.shape == (2, 2, 1)
    assert {d.id for d in mesh.devices.flat} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    'sizes, message',
    [
        (dict(fsdp=3), r'8 devices cannot be divided by fsdp=3 × model=1 = 3.*\[1, 2, 4, 8\]'),
        (dict(data=2, fsdp=2), 'data=2 × fsdp=2 × model=1 = 4, but there are 8 devices: set mesh.data=-1'),
        (dict(model=0), 'mesh.model=0: must be at least 1'),
        (dict(fsdp=-1), 'mesh.fsdp=-1: must be at least 1'),
        (dict(data=-2), 'mesh.data=-2: must be at least 1, or -1'),
    ],
)
def test_impossible_sizes(sizes, message):
    with pytest.raises(UserError, match=message):
        meshes.make_mesh(**sizes)


def test_check_batch_names_sizes_that_work():
    mesh = meshes.make_mesh(fsdp=2, model=2)
    meshes.check_batch(mesh, 12)
    with pytest.raises(UserError, match='batch_size=10 .*4 devices.*use 8 or 12'):
        meshes.check_batch(mesh, 10)
    with pytest.raises(UserError, match='use 4 or 8'):
        meshes.check_batch(mesh, 3)
    with pytest.raises(UserError, match='use 4 or 8'):
        meshes.check_batch(mesh, 0)


def test_put_batch_places_rows_by_data_then_fsdp():
    mesh = meshes.make_mesh(fsdp=2, model=2)
    image = np.arange(8 * 3, dtype=np.uint8).reshape(8, 3)
    put = meshes.put_batch({'image': image, '_mask': np.arange(8) < 5}, mesh)
    assert put['image'].sharding.is_equivalent_to(meshes.batch_sharding(mesh), 2)
    assert put['_mask'].dtype == bool
    np.testing.assert_array_equal(put['image'], image)
    for shard in put['image'].addressable_shards:
        data, fsdp, _ = (int(i[0]) for i in np.where(mesh.devices == shard.device))
        first = 2 * (2 * data + fsdp)
        np.testing.assert_array_equal(shard.data, image[first : first + 2])
    with pytest.raises(UserError, match='batch_size=6 .*use 4 or 8'):
        meshes.put_batch({'image': image[:6]}, mesh)


# Rows: parts of the batch. Columns: the model axis. Entries: the process that owns the device.
@pytest.mark.parametrize(
    'owner, expected',
    [
        ([[0], [0]], {0: (0, 1)}),
        ([[0], [0], [1], [1]], {0: (0, 2), 1: (1, 2)}),  # two hosts along data
        ([[0, 1], [0, 1]], {0: (0, 1), 1: (0, 1)}),  # two hosts along model load the same
        ([[0, 1], [2, 3]], {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)}),
        ([[2, 2], [0, 0], [1, 1]], {2: (0, 3), 0: (1, 3), 1: (2, 3)}),  # the place in the mesh, not the process index
    ],
)
def test_data_shard_follows_the_mesh(owner, expected):
    assert {p: meshes._shard_of(np.array(owner), p) for p in expected} == expected


def test_data_shard_refuses_partly_shared_parts():
    with pytest.raises(UserError, match='3 parts of the batch do not fall evenly on 2 processes'):
        meshes._shard_of(np.array([[0, 0], [0, 1], [1, 1]]), 0)
    with pytest.raises(UserError, match='process 7 has no device'):
        meshes._shard_of(np.array([[0], [1]]), 7)


def test_one_process_loads_everything():
    assert meshes.data_shard(meshes.make_mesh(fsdp=2, model=2)) == (0, 1)


PROGRAM = """
    import sys
    import jax
    import jax.numpy as jnp
    import numpy as np
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
    from big_vlm.ops.contrastive import sigmoid_loss
    from big_vlm.sharding import mesh as meshes
    rows = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    expected = jax.device_get(jax.jit(lambda z: sigmoid_loss(z, z[::-1], 0.0, -1.0))(rows))
    for sizes, count in (((2, 1, 1), 2), ((1, 2, 1), 2), ((1, 1, 2), 1)):
        mesh = meshes.make_mesh(*sizes)
        index, shards = meshes.data_shard(mesh)
        assert (index, shards) == ((jax.process_index(), 2) if count == 2 else (0, 1)), (index, shards)
        total = meshes.sum_of_shards(np.array([2**40, jax.process_index()]), mesh)
        assert total.tolist() == [count * 2**40, count - 1], total
        own = slice(index * 8 // shards, (index + 1) * 8 // shards)
        batch = meshes.put_batch({'a': rows[own], 'b': rows[::-1][own]}, mesh)
        assert batch['a'].shape == (8, 4)
        loss = jax.jit(lambda x, y: sigmoid_loss(x, y, 0.0, -1.0, form='ring', mesh=mesh))(batch['a'], batch['b'])
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    print('agreed')
"""


@pytest.mark.slow
def test_two_processes():
    """Two real processes with one device each: the data shards, counts of them, the batch, and the ring across them."""
    with socket.socket() as s:
        s.bind(('localhost', 0))
        address = f'localhost:{s.getsockname()[1]}'
    env = {**os.environ, 'XLA_FLAGS': '', 'PYTHONPATH': os.pathsep.join(sys.path)}
    command = [sys.executable, '-c', textwrap.dedent(PROGRAM), address]
    processes = [
        subprocess.Popen([*command, str(i)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for i in range(2)
    ]
    try:
        outputs = [p.communicate(timeout=120)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, output in zip(processes, outputs, strict=True):
        assert p.returncode == 0 and 'agreed' in output, output
