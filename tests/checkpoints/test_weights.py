"""Weights alone: whole, in part, cast and placed; from a bundle's folder or a training checkpoint."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from big_vlm.checkpoints import Checkpointer, load_weights, save_weights, trees, weight_shapes
from big_vlm.config import UserError

PARAMS = {
    'img': {'head': {'kernel': np.arange(16, dtype=np.float32).reshape(8, 2) / 3}},
    'llm': {'w': np.arange(4).astype(ml_dtypes.bfloat16)},
    't': np.float32([2.5]),
}
STATS = {'img': {'norm': {'mean': np.float32([3, 4])}}}
WEIGHTS = trees.merged(PARAMS, STATS)


@pytest.fixture(params=['weights', 'bundle', 'step', 'checkpoints'])
def folder(request, tmp_path):
    if request.param in ('weights', 'bundle'):
        save_weights(tmp_path / 'b' / 'weights', WEIGHTS)
        return tmp_path / 'b' / ('weights' if request.param == 'weights' else '')
    with Checkpointer(tmp_path / 'c', keep=9) as checkpointer:
        for step in (9, 10):
            params = jax.tree.map(lambda x, step=step: jnp.asarray(x if step == 10 else x * 0), PARAMS)
            checkpointer.save(step, {'params': params, 'stats': STATS, 'step': jnp.int32(step)})
    return tmp_path / 'c' / ('10' if request.param == 'step' else '')


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_everything_as_numpy(folder, caplog):
    caplog.clear()
    weights = load_weights(folder)
    assert not caplog.records, 'Orbax has nothing to warn of'
    same(weights, WEIGHTS)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(weights))
    assert weights['llm']['w'].dtype == jnp.bfloat16
    assert weight_shapes(folder)['img']['head']['kernel'] == jax.ShapeDtypeStruct((8, 2), jnp.float32)


def test_a_part_cast_and_sharded(folder):
    mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec('fsdp'))
    like = {'kernel': jax.ShapeDtypeStruct((8, 2), jnp.bfloat16, sharding=sharding)}
    kernel = load_weights(folder, like, part='img/head')['kernel']
    assert kernel.sharding == sharding
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel, PARAMS['img']['head']['kernel'].astype(ml_dtypes.bfloat16))
    same(load_weights(folder, part='img'), WEIGHTS['img'])


def test_less_may_be_wanted_than_is_stored_not_more(folder):
    same(load_weights(folder, {'t': jax.ShapeDtypeStruct((1,), jnp.float32)}), {'t': PARAMS['t']})
    with pytest.raises(UserError, match='b is missing'):
        load_weights(folder, {'b': jax.ShapeDtypeStruct((1,), jnp.float32)})
    with pytest.raises(UserError, match=r'kernel has shape \(8, 2\), not \(2, 8\)'):
        load_weights(folder, {'kernel': jax.ShapeDtypeStruct((2, 8), jnp.float32)}, part='img/head')
    with pytest.raises(UserError, match="unknown part 'lm' .*did you mean 'llm'"):
        load_weights(folder, part='lm')


def test_what_is_no_weights_folder_is_named(tmp_path, capfd):
    with pytest.raises(UserError, match='no folder'):
        load_weights(tmp_path / 'nowhere')
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(UserError, match='is not a bundle, a weights folder or a checkpoint'):
        load_weights(tmp_path)
    with pytest.raises(UserError, match='holds something else'):
        save_weights(tmp_path, PARAMS)
    assert (tmp_path / 'notes.txt').read_text() == 'mine'
    assert capfd.readouterr() == ('', '')


def test_weights_are_replaced(tmp_path):
    save_weights(tmp_path / 'w', PARAMS)
    save_weights(tmp_path / 'w', {'t': np.float32([7.0])})
    same(load_weights(tmp_path / 'w'), {'t': np.float32([7.0])})
