"""A state comes back bit for bit, onto any mesh; anything else than a fitting checkpoint is one line."""

import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from big_vlm.checkpoints import Checkpointer, abstract, manifest, trees
from big_vlm.config import UserError


class Moments(NamedTuple):
    mu: dict
    count: jax.Array


def mesh(data, fsdp):
    devices = jax.devices()[: data * fsdp]
    return jax.make_mesh((data, fsdp), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2, devices=devices)


def make_state(mesh_):
    """Every kind of leaf and container a training state has, `w` sharded over fsdp."""
    rng = np.random.default_rng(0)
    split, whole = NamedSharding(mesh_, PartitionSpec('fsdp')), NamedSharding(mesh_, PartitionSpec())
    w = jax.device_put(rng.normal(size=(8, 3)).astype(np.float32), split)
    b = jax.device_put(jnp.asarray(rng.normal(size=3), jnp.bfloat16), whole)
    count = jax.device_put(np.int32(7), whole)
    params = {'img': {'w': w, 'b': b}, 't': count + 1}
    opt_state = (Moments({'w': w * 2}, count), (), None)
    return {'step': count, 'params': params, 'stats': {}, 'opt_state': opt_state, 'ema': None}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_trees():
    tree = {'params': {'w': 1}, 'opt_state': (2, None, ()), 'stats': {}, 'ema': None}
    assert trees.flat(tree) == {'opt_state/0': 2, 'params/w': 1}
    assert trees.nested({'a/b': 1, 'a/c/0': 2}) == {'a': {'b': 1, 'c': {'0': 2}}}
    assert trees.like(tree, trees.flat(tree)) == tree


@pytest.mark.smoke
@pytest.mark.parametrize('shape', [(1, 8), (8, 1), (2, 2), (1, 1)])
def test_round_trip_onto_another_mesh(tmp_path, shape):
    state = make_state(mesh(2, 4))
    target = abstract(make_state(mesh(*shape)))
    with Checkpointer(tmp_path / 'c') as checkpointer:
        assert checkpointer.latest_step() is None
        checkpointer.save(3, state, {'contract': {'size': [1, 2]}})
    with Checkpointer(tmp_path / 'c') as checkpointer:
        assert checkpointer.latest_step() == 3
        restored, extra = checkpointer.restore(target)
    assert_same(restored, state)
    assert extra == {'contract': {'size': [1, 2]}}
    assert restored['params']['img']['w'].sharding == target['params']['img']['w'].sharding


def test_the_state_may_be_donated_at_once(tmp_path):
    state = {'w': jnp.zeros((512, 512))}
    grow = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        for step in range(3):
            checkpointer.save(step, state)
            for _ in range(10):
                state = grow(state)
        checkpointer.wait()
        for step in range(3):
            restored, _ = checkpointer.restore(abstract(state), step)
            np.testing.assert_array_equal(restored['w'], np.full((512, 512), 10.0 * step))


def test_keeps_the_newest_and_saves_a_step_once(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (5, 10, 10, 20):
            checkpointer.save(step, {'w': jnp.full((), float(step))})
        checkpointer.save(20, {'w': jnp.zeros(())})
        checkpointer.wait()
        assert sorted(f.name for f in tmp_path.iterdir()) == ['10', '20']
        restored, _ = checkpointer.restore(abstract({'w': jnp.zeros(())}))
        assert restored['w'] == 20


def test_a_half_written_step_does_not_count(tmp_path):
    state = {'w': jnp.ones(())}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    (tmp_path / '2.orbax-checkpoint-tmp').mkdir()
    (tmp_path / '2.orbax-checkpoint-tmp' / 'state').mkdir()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 1


def test_what_a_failed_save_wrote_too_late_goes_before_the_next(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {'w': jnp.ones(())})
        checkpointer.wait()
        (tmp_path / '2.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)
        checkpointer.save(3, {'w': jnp.ones(())})
    assert [f.name for f in tmp_path.iterdir()] == ['3']


def test_what_does_not_fit_is_named(tmp_path):
    state = make_state(mesh(1, 1))
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(UserError, match='no checkpoint$'):
            checkpointer.restore(abstract(state))
        checkpointer.save(1, state)
        checkpointer.wait()
        wanted = abstract(state)
        wanted['params']['img']['v'] = wanted['params']['img'].pop('w')
        wanted['params']['t'] = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=wanted['params']['t'].sharding)
        with pytest.raises(UserError) as error:
            checkpointer.restore(wanted)
        message = str(error.value)
        assert 'params/img/v is missing; params/t has shape (), not (2,); params/img/w is not expected' in message
        with pytest.raises(UserError, match='no checkpoint of step 4'):
            checkpointer.restore(abstract(state), 4)


@pytest.mark.parametrize('of_an_older_version', [False, True])
def test_damage_is_one_line(tmp_path, of_an_older_version):
    state = {'w': jax.random.normal(jax.random.key(0), (64, 64))}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    if of_an_older_version:
        (tmp_path / '1' / manifest.NAME).unlink()
    for file in (tmp_path / '1' / 'state' / 'ocdbt.process_0' / 'd').iterdir():
        file.unlink()
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UserError, match='is damaged: ') as error:
        checkpointer.restore(abstract(state))
    assert '\n' not in str(error.value)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / 'x').write_text('x')
    with pytest.raises(UserError, match='is a file'):
        Checkpointer(tmp_path / 'x')


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / 'x').write_text('x')
    with pytest.raises(UserError, match='checkpoint not written: .*Not a directory'):
        Checkpointer(tmp_path / 'x' / 'y')
    checkpointer = Checkpointer(tmp_path / 'c')
    shutil.rmtree(tmp_path / 'c')
    (tmp_path / 'c').write_text('in the way')
    with pytest.raises(UserError, match='checkpoint not written: '):
        checkpointer.save(1, {'w': jnp.ones(())})
        checkpointer.wait()


def test_nothing_is_said_on_the_terminal(tmp_path, capfd, recwarn):
    state = {'w': jnp.ones((64, 64))}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.restore(abstract(state))
    assert capfd.readouterr() == ('', '')
    assert [str(w.message) for w in recwarn] == []


def test_what_a_kill_left_of_an_old_checkpoint_goes_without_a_word(tmp_path, capfd):
    state = make_state(mesh(1, 1))
    with Checkpointer(tmp_path / 'c', keep=2) as checkpointer:
        checkpointer.save(3, state)
        checkpointer.save(7, state)
    (tmp_path / 'c/3/_CHECKPOINT_METADATA').unlink()
    capfd.readouterr()
    with Checkpointer(tmp_path / 'c', keep=2) as checkpointer:
        assert checkpointer.latest_step() == 7
    assert not (tmp_path / 'c/3').exists()
    assert capfd.readouterr().err == ''
