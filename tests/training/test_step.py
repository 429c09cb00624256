"""One step against numpy, and the same step on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vlm.checkpoints import Checkpointer, checkpointer, trees
from big_vlm.config import Optimizer, ParamRule
from big_vlm.sharding import mesh as meshes
from big_vlm.training import optimizer, step


class Linear:
    """loss = mean((x·w + b - y)²), w [32, 16]; `noise` adds what the random key gives."""

    flops_per_example = 3 * 2 * 32 * 16

    def __init__(self, noise=0.0):
        self.noise = noise

    def init(self, rng):
        return {'layer': {'w': jax.random.normal(rng, (32, 16)), 'bias': jnp.ones(16)}}, {}

    def loss(self, params, stats, batch, rng):
        out = batch['x'] @ params['layer']['w'] + params['layer']['bias']
        loss = jnp.mean((out - batch['y']) ** 2) + self.noise * jax.random.uniform(rng)
        return loss, ({'mean_out': out.mean()}, stats)


RNG = np.random.default_rng(0)
BATCH = {'x': RNG.normal(size=(8, 32)).astype(np.float32), 'y': RNG.normal(size=(8, 16)).astype(np.float32)}
SGD_LIKE = Optimizer(lr=0.5, b1=0.0, b2=0.0, eps=1e-8, clip=0.0, schedule='constant', ema_decay=0.75)


def one_device():
    return meshes.make_mesh(devices=jax.devices()[:1])


def run(config, mesh, task=None, steps=1, seed=0, own_rules=()):
    task = task or Linear()
    tx, info = optimizer.make(config, 10, step.param_shapes(task))
    averaged = info.trainable if config.ema_decay else None
    state = step.init_state(task, tx, mesh, seed=1, averaged=averaged, own_rules=own_rules)
    train_step = step.make_train_step(task, tx, info, mesh, state, seed, ema_decay=config.ema_decay)
    history = []
    for _ in range(steps):
        state, metrics = train_step(state, meshes.put_batch(BATCH, mesh))
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def test_an_average_that_forgets_its_start():
    """Decays of 1/10, 2/11, 3/12 …, until they reach that of the config."""
    task, mesh = Linear(), one_device()
    tx, info = optimizer.make(SGD_LIKE, 10, step.param_shapes(task))
    state = step.init_state(task, tx, mesh, seed=1, averaged=info.trainable)
    train_step = step.make_train_step(task, tx, info, mesh, state, 0, ema_decay=0.2, ema_warmup=True)
    expected = np.asarray(state.params['layer']['w'])
    for decay in (1 / 10, 2 / 11, 0.2):
        state, _ = train_step(state, meshes.put_batch(BATCH, mesh))
        expected = decay * expected + (1 - decay) * np.asarray(state.params['layer']['w'])
        np.testing.assert_allclose(state.ema['layer']['w'], expected, rtol=1e-5)


@pytest.mark.smoke
def test_against_numpy():
    """With b1 = b2 = 0 Adam moves every weight by lr against its gradient's sign."""
    task = Linear()
    start = jax.device_get(task.init(jax.random.key(1))[0]['layer'])
    w, b = np.float64(start['w']), np.float64(start['bias'])
    out = BATCH['x'] @ w + b
    error = 2 * (out - BATCH['y']) / out.size
    grads = {'w': BATCH['x'].T @ error, 'bias': error.sum(axis=0)}
    new = {'w': w - 0.5 * np.sign(grads['w']), 'bias': b - 0.5 * np.sign(grads['bias'])}

    state, (metrics,) = run(SGD_LIKE, one_device())
    assert state.step == 1
    for name in ('w', 'bias'):
        np.testing.assert_allclose(state.params['layer'][name], new[name], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state.ema['layer'][name], 0.75 * start[name] + 0.25 * new[name], atol=1e-5)

    def norm(tree):
        return np.sqrt(sum((x**2).sum() for x in tree.values()))

    assert metrics == pytest.approx(
        {
            'loss': ((out - BATCH['y']) ** 2).mean(),
            'mean_out': out.mean(),
            'lr': 0.5,
            'grad_norm': norm(grads),
            'param_norm': norm(new),
            'update_norm': 0.5 * np.sqrt(33 * 16),
        },
        rel=1e-5,
    )


RULES = (('layer/w', ('model', 'fsdp')),)


@pytest.mark.parametrize(
    ('name', 'sizes', 'own_rules', 'spec'),
    [
        ('adamw', (8, 1, 1), (), (None, None)),
        ('adamw', (2, 2, 2), RULES, ('model', 'fsdp')),
        ('adafactor', (8, 1, 1), (), (None, None)),
        ('adafactor', (2, 2, 2), (), ('fsdp', None)),
    ],
)
def test_any_mesh_is_one_device(name, sizes, own_rules, spec, monkeypatch):
    monkeypatch.setattr('big_vlm.sharding.rules.FSDP_MIN_SIZE', 1)
    config = Optimizer(name=name, lr=0.1, ema_decay=0.5)
    expected, history = run(config, one_device(), steps=3)
    mesh = meshes.make_mesh(*sizes)
    state, other = run(config, mesh, steps=3, own_rules=own_rules)
    for leaf in (state.params['layer']['w'], state.ema['layer']['w']):
        assert (*leaf.sharding.spec, None, None)[:2] == spec
    for a, b in zip(history, other, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    for path, leaf in trees.flat(state).items():
        np.testing.assert_allclose(leaf, trees.flat(expected)[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_the_state_stays_where_it_was_put_and_is_donated():
    mesh = meshes.make_mesh(2, 4, 1)
    task = Linear()
    tx, info = optimizer.make(Optimizer(), 10, step.param_shapes(task))
    state = step.init_state(task, tx, mesh, 0)
    abstract = step.abstract_state(task, tx, mesh)
    train_step = step.make_train_step(task, tx, info, mesh, abstract, 0)
    new, metrics = train_step(state, meshes.put_batch(BATCH, mesh))
    assert jax.tree.map(lambda x: x.sharding, new) == jax.tree.map(lambda x: x.sharding, abstract)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert metrics['loss'].sharding.is_fully_replicated


class Wide(Linear):
    """Two matrices of 1 MiB."""

    def init(self, rng):
        return {name: {'w': jnp.zeros((512, 512))} for name in 'ab'}, {}

    def loss(self, params, stats, batch, rng):
        return jnp.mean((jnp.tanh(batch['x'] @ params['a']['w']) @ params['b']['w']) ** 2), ({}, stats)


def test_the_new_state_takes_the_place_of_the_old():
    """Beside the state there is room for the gradients, which the updates take, and not for another moment."""
    task, mesh = Wide(), one_device()
    tx, info = optimizer.make(Optimizer(weight_decay=0.1, decay_by='schedule'), 10, step.param_shapes(task))
    state = step.abstract_state(task, tx, mesh, averaged=info.trainable)
    train_step = step.make_train_step(task, tx, info, mesh, state, 0, ema_decay=0.9)
    batch = {'x': jax.ShapeDtypeStruct((8, 512), jnp.float32, sharding=meshes.batch_sharding(mesh))}
    memory = train_step.lower(state, batch).compile().memory_analysis()
    params, small = 2 * 2**20, 2**18
    assert 4 * params < memory.alias_size_in_bytes < 4 * params + small
    assert params <= memory.temp_size_in_bytes < params + small


def test_what_is_to_be_overwritten_is_not_drawn():
    task, mesh = Linear(), one_device()
    tx, info = optimizer.make(Optimizer(), 10, step.param_shapes(task))
    made = dict(averaged=info.trainable)
    whole, some = (step.init_state(task, tx, mesh, 3, zeros=zeros, **made) for zeros in ((), ('layer/w',)))
    for path, leaf in trees.flat(whole).items():
        assert np.any(leaf) or not path.endswith('layer/w') or path.startswith('opt_state')
        expected = np.zeros_like(leaf) if path.endswith('layer/w') else leaf
        np.testing.assert_array_equal(trees.flat(some)[path], expected, err_msg=path)


def test_random_keys_follow_from_seed_and_step():
    noise = [
        [m['loss'] for m in run(Optimizer(lr=0.0), one_device(), Linear(noise=1.0), steps=3, seed=seed)[1]]
        for seed in (5, 5, 6)
    ]
    quiet = run(Optimizer(lr=0.0), one_device(), steps=1)[1][0]['loss']
    expected = [quiet + float(jax.random.uniform(jax.random.fold_in(jax.random.key(5), i))) for i in range(3)]
    np.testing.assert_allclose(noise[0], expected, rtol=1e-6)
    assert noise[0] == noise[1] != noise[2]


def test_frozen_parameters_stay_and_do_not_count(tmp_path):
    rules = (('layer/w', ParamRule(frozen=True)), ('.*', ParamRule()))
    start = Linear().init(jax.random.key(1))[0]['layer']
    _, (free,) = run(SGD_LIKE, one_device())
    config = dataclasses.replace(SGD_LIKE, rules=rules)
    state, (metrics,) = run(config, one_device())
    np.testing.assert_array_equal(state.params['layer']['w'], start['w'])
    np.testing.assert_allclose(np.abs(state.params['layer']['bias'] - start['bias']), 0.5, rtol=1e-5)
    assert list(trees.flat(state.ema)) == ['layer/bias'] and state.averaged['layer']['w'] is state.params['layer']['w']
    expected = 0.75 * start['bias'] + 0.25 * state.params['layer']['bias']
    np.testing.assert_allclose(state.averaged['layer']['bias'], expected, rtol=1e-6)
    assert metrics['update_norm'] == pytest.approx(0.5 * 4)
    assert metrics['grad_norm'] < free['grad_norm']
    assert metrics['param_norm'] == pytest.approx(np.linalg.norm(state.params['layer']['bias']))
    with Checkpointer(tmp_path) as saver:  # as it was when what is frozen had averages too
        saver.save(1, state.replace(ema=state.params))
        saver.wait()
        restored, _ = saver.restore(checkpointer.abstract(state))
        assert list(trees.flat(restored.ema)) == ['layer/bias']
        np.testing.assert_array_equal(restored.ema['layer']['bias'], state.params['layer']['bias'])
