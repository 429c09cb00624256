"""A stage that goes on with another's state is, at the same size, one run; at another, its positions are resized."""

import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import Toy, batches, stage

from big_vlm.checkpoints import Checkpointer, trees
from big_vlm.config import UserError, parse_stage
from big_vlm.ops import position_resize
from big_vlm.reports.writers import MultiWriter
from big_vlm.sharding.mesh import make_mesh
from big_vlm.training import initial_state, loop, optimizer, stages, step


class Grid(Toy):
    """With a position embedding of `side` × `side`, and no dropout."""

    def __init__(self, side):
        self.side = side

    def init(self, rng):
        params, stats = super().init(rng)
        return params | {'img': {'pos_embedding': jax.random.normal(rng, (1, self.side**2, 4))}}, stats

    def loss(self, params, stats, batch, rng):
        out = batch['x'] @ params['w'] + params['bias'] + jnp.tanh(params['img']['pos_embedding']).mean(axis=(0, 1))
        return jnp.mean((out - batch['y']) ** 2), ({}, stats)


@pytest.fixture(scope='module')
def mesh():
    return make_mesh(fsdp=2, devices=jax.devices()[:2])


def settings(steps, start=0.0, end=1.0, **changes):
    curve = {'lr': 0.1, 'weight_decay': 0.01, 'ema_decay': 0.9, 'curve': (start, end)}
    return stage(steps, optimizer=curve | changes, checkpoint={'every': 100})


def train(task, config, workdir, mesh, skip=0, **more):
    def later(first):
        return itertools.islice(batches(first), skip, None)

    return loop.train(config, task, later, workdir, MultiWriter(), mesh=mesh, **more)


@pytest.fixture(scope='module')
def low(mesh, tmp_path_factory):
    """(folder, final state) of the first half of a run."""
    workdir = tmp_path_factory.mktemp('low')
    return workdir, train(Grid(4), settings(4, 0.0, 0.5), workdir, mesh)


def test_two_halves_are_one_run(low, mesh, tmp_path):
    load = initial_state.make(low[0] / 'checkpoints', 4, 'bilinear')
    halves = train(Grid(4), settings(4, 0.5, 1.0), tmp_path / 'half', mesh, skip=4, initial_state=load)
    whole = trees.flat(train(Grid(4), settings(8), tmp_path / 'whole', mesh))
    assert int(halves.step) == 4 == int(optimizer.updates_made(halves.opt_state))
    halves = trees.flat(halves)
    for path, leaf in whole.items():
        if path != 'step' and not (path.endswith('/count') and int(leaf) == 8 and int(halves[path]) == 4):
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(halves[path]), err_msg=path)
    assert 8 in [int(leaf) for path, leaf in halves.items() if path.endswith('count')], 'of Adam, which goes on'


def test_positions_and_what_belongs_to_them_are_resized(low, mesh):
    config = settings(4, 0.5, 1.0)
    tx, info = optimizer.make(config.optimizer, 4, step.param_shapes(Grid(8)))
    abstract = step.abstract_state(Grid(8), tx, mesh, averaged=info.trainable)
    state = initial_state.make(low[0] / 'checkpoints', 4, 'bilinear')(abstract)
    before, found = trees.flat(low[1]), trees.flat(state)
    resized = [path for path in found if path.endswith('img/pos_embedding')]
    assert len(resized) == 4, 'parameter, average and two moments'
    for path, leaf in found.items():
        assert leaf.sharding == trees.flat(abstract)[path].sharding
        if path in resized:
            assert leaf.shape == (1, 64, 4)
            np.testing.assert_array_equal(leaf, position_resize.bilinear(np.asarray(before[path]), (8, 8)))
        elif path != 'step' and not path.endswith('count'):
            np.testing.assert_array_equal(leaf, before[path], err_msg=path)


def test_another_step_than_the_last_is_no_end(low, tmp_path):
    """Where the last is damaged or gone, none before it will do; nothing is renamed there."""
    folder = shutil.copytree(low[0] / 'checkpoints', tmp_path / 'low' / 'checkpoints')
    remedy = rf'\. Remove {tmp_path / "low" / "bundle"}, and the end of that stage is trained again$'
    with pytest.raises(UserError, match=f'{folder}: no checkpoint of step 8{remedy}'):
        stages._end_of(settings(8), tmp_path / 'low' / 'bundle', settings(4))({})
    (folder / '4' / 'manifest.json').write_text('{')
    for earlier in (False, True):  # also where it could be set aside
        if earlier:
            shutil.copytree(low[0] / 'checkpoints' / '4', folder / '2')
        with pytest.raises(UserError, match=rf'{folder / "4"} is damaged: .*{remedy}'):
            initial_state.make(folder, 4, 'bilinear')({})
    assert sorted(path.name for path in folder.iterdir()) == ['2', '4']


@pytest.mark.parametrize('side', [7, 8])
def test_the_factors_of_adafactor_are_resized(side, mesh, tmp_path):
    """Of 36 positions of width 60, 49 or 64 are made: at 64 the factors change places."""
    config = settings(4, name='big_vision_adafactor')
    before, after = (Wide(n) for n in (6, side))
    rules = [optimizer.make(config.optimizer, 4, step.param_shapes(task))[0] for task in (before, after)]
    like, abstract = (step.abstract_state(task, tx, mesh) for task, tx in zip((before, after), rules, strict=True))
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: jax.device_put(np.asarray(rng.uniform(size=x.shape) * 9).astype(x.dtype), x.sharding), like
    )
    initial_state.check(like, abstract, 'here')
    with Checkpointer(tmp_path / 'c') as saver:
        saver.save(1, state)
    found, given = (trees.flat(x) for x in (initial_state.make(tmp_path / 'c', 1, 'bilinear')(abstract), state))
    (row,) = (path for path in found if path.endswith('v_row/img/pos_embedding'))
    column = row.replace('v_row', 'v_col')
    of_positions, of_width = (column, row) if side == 8 else (row, column)
    np.testing.assert_array_equal(found[of_width], given[column])
    resized = position_resize.bilinear(np.asarray(given[row])[..., None], (side, side))[..., 0]
    np.testing.assert_array_equal(found[of_positions], resized)
    (momentum,) = (path for path in found if path.endswith('trace/img/pos_embedding'))
    assert found[momentum].shape == (1, side**2, 60) and found[momentum].dtype == jnp.bfloat16
    tiny = step.abstract_state(Wide(4), optimizer.make(config.optimizer, 4, step.param_shapes(Wide(4)))[0], mesh)
    with pytest.raises(UserError, match=r'v_row/img/pos_embedding has shape \(1, 36\), not \(1,\)'):
        initial_state.check(like, tiny, 'here')


class Wide(Grid):
    def init(self, rng):
        params, stats = super().init(rng)
        return params | {'img': {'pos_embedding': jax.random.normal(rng, (1, self.side**2, 60))}}, stats


def test_another_optimizer_is_refused(mesh):
    shapes = step.param_shapes(Grid(4))
    states = [
        step.abstract_state(Grid(4), optimizer.make(settings(4, name=name).optimizer, 4, shapes)[0], mesh)
        for name in ('lion', 'adamw')
    ]
    with pytest.raises(UserError, match='config.high.init_from: low does not fit .* is missing'):
        initial_state.check(*states, 'config.high.init_from: low')


@pytest.mark.parametrize('init', [{'state': True}, {'stage': 'a', 'state': True, 'fresh': ('w',)}])
def test_it_takes_all_of_one_stage(init):
    section = {'task': 'contrastive', 'total': {'steps': 1}, 'data': {'sources': {'toy': {}}}, 'init_from': init}
    with pytest.raises(UserError, match=r'config\.init_from\.state: it takes all of one stage'):
        parse_stage(section)
