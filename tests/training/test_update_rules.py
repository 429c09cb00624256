"""Every update rule against a few lines of numpy; Adafactor, AdamW and Muon are in test_optimizer."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from big_vlm.config import Optimizer, ParamRule, UserError
from big_vlm.training import optimizer

SHAPE, STEPS = (40, 36), 4


def run(start, grads, **settings):
    """The parameter after all gradients, and the optimizer's last state."""
    params = {'w': jnp.asarray(start, jnp.float32)}
    tx, _ = optimizer.make(Optimizer(schedule='constant', clip=0.0, **settings), len(grads), params)
    state, update = tx.init(params), jax.jit(tx.update)
    for g in grads:
        updates, state = update({'w': jnp.asarray(g, jnp.float32)}, state, params)
        params = {'w': params['w'] + updates['w']}
    return np.asarray(params['w']), state


@pytest.fixture(scope='module')
def problem():
    rng = np.random.default_rng(0)
    return rng.normal(size=SHAPE), rng.normal(size=(STEPS, *SHAPE)) * rng.normal(size=SHAPE[1])


def test_lion(problem):
    """Program 1 of arXiv 2302.06675: the sign of one interpolation, remembered by another; decoupled decay."""
    p, grads = problem
    found, _ = run(p, grads, name='lion', lr=0.01, b1=0.9, b2=0.98, weight_decay=0.5)
    m = np.zeros(SHAPE)
    for g in grads:
        p = p - 0.01 * (np.sign(0.9 * m + 0.1 * g) + 0.5 * p)
        m = 0.98 * m + 0.02 * g
    np.testing.assert_allclose(found, p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('nesterov', [False, True])
def test_sgd_with_momentum(problem, nesterov):
    p, grads = problem
    found, _ = run(p, grads, name='sgd', lr=0.1, b1=0.8, nesterov=nesterov)
    v = np.zeros(SHAPE)
    for g in grads:
        v = 0.8 * v + g
        p = p - 0.1 * (g + 0.8 * v if nesterov else v)
    np.testing.assert_allclose(found, p, rtol=1e-5, atol=1e-6)


def test_sgd_alone_has_no_state(problem):
    p, grads = problem
    found, state = run(p, grads, name='sgd', lr=0.1, b1=0.0)
    np.testing.assert_allclose(found, p - 0.1 * grads.sum(axis=0), rtol=1e-5, atol=1e-5)
    assert max(x.size for x in jax.tree.leaves(state)) == 1


def test_big_vision_adafactor(problem):
    """Factored from 32 on, decay 1 - t^-0.8 up to its cap, unclipped, then a first moment kept in bfloat16."""
    p, grads = problem
    found, state = run(p, grads, name='big_vision_adafactor', lr=0.1, b1=0.9, b2=0.6)
    row, column, m = np.zeros(SHAPE[0]), np.zeros(SHAPE[1]), np.zeros(SHAPE)
    for t, g in enumerate(grads, 1):
        beta = min(0.6, 1 - t**-0.8)
        row = beta * row + (1 - beta) * (g**2).mean(axis=1)
        column = beta * column + (1 - beta) * (g**2).mean(axis=0)
        m = 0.9 * m + 0.1 * g / np.sqrt(np.outer(row, column) / row.mean())
        p = p - 0.1 * m  # as computed; what is remembered is rounded
        m = m.astype(ml_dtypes.bfloat16).astype(np.float64)
    assert np.mean(np.abs(found - p) < 1e-5) > 0.999  # but for those on the edge of being rounded the other way
    assert {x.dtype for x in jax.tree.leaves(state) if x.shape == SHAPE} == {jnp.dtype('bfloat16')}


@pytest.mark.parametrize(('name', 'cap'), [('adafactor', 1.0), ('big_vision_adafactor', 0.999)])
def test_the_cap_of_a_long_run(name, cap):
    """What each paper has, unless `b2` says otherwise: 1 - t^-0.8 passes 0.999 after 5,623 steps."""
    params = {'w': jnp.ones(SHAPE)}
    for b2, decay in ((None, min(cap, 1 - 1e-4)), (0.9, 0.9)):
        tx, _ = optimizer.make(Optimizer(name=name, b2=b2, clip=0.0, schedule='constant'), 10**6, params)
        late = jax.tree.map(lambda x: x + 99_999 if x.dtype == jnp.int32 else x, tx.init(params))
        state = tx.update(params, late, params)[1]
        moments = [x for x in jax.tree.leaves(state) if x.dtype == jnp.float32 and x.size > 1]
        assert moments and all(np.allclose(x, 1 - decay, rtol=1e-3) for x in moments)


@pytest.mark.parametrize('name', ['adamw', 'lion', 'muon', 'sgd'])
def test_the_first_moment_in_bfloat16(problem, name):
    p, grads = problem
    half, state = run(p, grads, name=name, lr=0.01, momentum_dtype='bfloat16')
    whole, _ = run(p, grads, name=name, lr=0.01)
    assert jnp.dtype('bfloat16') in {x.dtype for x in jax.tree.leaves(state) if x.shape == SHAPE}
    np.testing.assert_allclose(half, whole, atol=0.03)
    assert np.abs(half - whole).max() > 0


def test_decay_by_the_schedule_alone(problem):
    """big_vision's: of a rate that falls from its peak to half of it, the decay takes the half, not the rate."""
    p, _ = problem
    params = {'kernel': jnp.asarray(p, jnp.float32)}
    rules = (('.*', ParamRule(lr=7.0)),)
    config = Optimizer(lr=1e-3, weight_decay=0.1, decay_by='schedule', schedule='linear', clip=0.0, rules=rules)
    tx, _ = optimizer.make(config, 2, params)
    state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    for share in (1.0, 0.5):
        updates, state = tx.update(zeros, state, params)
        np.testing.assert_allclose(updates['kernel'], -share * 0.1 * p, rtol=1e-5)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(name='lion', nesterov=True), r'config\.optimizer\.nesterov: lion has no such choice'),
        (dict(name='adafactor', momentum_dtype='bfloat16'), r'momentum_dtype: adafactor has no such choice'),
        (dict(name='adafactor', b1=0.5), r'b1: adafactor has no such choice, adamw and big_vision_adafactor and lion'),
        (dict(name='sgd', b2=0.5), r'b2: sgd has no such choice'),
        (dict(name='lion', eps=1e-6), r'eps: lion has no such choice, adamw and muon have'),
        (dict(name='sgd', b1=0.0, nesterov=True), r'optimizer\.nesterov: sgd with b1=0 keeps no first moment'),
        (dict(name='sgd', b1=0.0, momentum_dtype='float32'), r'optimizer\.momentum_dtype: sgd with b1=0'),
        (dict(name='loin'), "did you mean 'lion'"),
    ],
)
def test_options_that_a_rule_does_not_have(settings, message):
    with pytest.raises(UserError, match=message):
        optimizer.make(Optimizer(**settings), 1, {'w': jnp.zeros(3)})
