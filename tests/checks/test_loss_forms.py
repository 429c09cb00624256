"""The proof of the losses: its float64 is the definition, every form passes, and a wrong one is caught."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vlm.checks import loss_forms
from big_vlm.config import UserError
from big_vlm.ops import contrastive


@pytest.mark.slow
def test_every_form_agrees():
    rows = list(loss_forms.compare(batch=48, width=16, accumulate=3))
    assert [row.form for row in rows[:4]] == ['dense', 'tiled', 'ring', 'accumulated']
    assert len(rows) == 2 * 2 * 4
    for row in rows:
        names = {'value', 'zimg', 'ztxt', 't'} | ({'b'} if row.loss == 'sigmoid' else set())
        assert set(row.errors) == names
        assert all(error <= loss_forms.LIMIT for error in row.errors.values()), row


@pytest.mark.parametrize('name', ['sigmoid', 'softmax'])
def test_its_gradients_by_hand_are_those_of_its_value(name):
    """By central differences in float64, along a random direction."""
    _, oracle = loss_forms._LOSSES[name]
    rng = np.random.default_rng(0)
    args = {k: x.astype(np.float64) for k, x in loss_forms._arguments(6, 4, 0).items()} | {'t': 1.3}
    args |= {'b': -2.0} if name == 'sigmoid' else {}
    directions = {k: rng.normal(size=np.shape(x)) for k, x in args.items()}
    grads = oracle(**args)[1]
    assert set(grads) == set(args)
    for k, direction in directions.items():
        up, down = (oracle(**args | {k: args[k] + step * direction})[0] for step in (1e-5, -1e-5))
        np.testing.assert_allclose((up - down) / 2e-5, np.sum(grads[k] * direction), rtol=1e-6)


@pytest.mark.slow
def test_a_wrong_loss_is_caught(monkeypatch):
    def wrong(zimg, ztxt, t, b, **options):
        return contrastive.sigmoid_loss(zimg, ztxt, t, b, **options) * jnp.where(options.get('tile', 0) > 0, 1.0001, 1)

    monkeypatch.setitem(loss_forms._LOSSES, 'sigmoid', (wrong, loss_forms._sigmoid))
    rows = {row.form: row for row in loss_forms.compare(batch=16, width=4, accumulate=2) if row.loss == 'sigmoid'}
    assert rows['dense'].errors['value'] <= loss_forms.LIMIT
    assert all(error > loss_forms.LIMIT for error in rows['ring'].errors.values())


@pytest.mark.parametrize(
    ('sizes', 'message'),
    [
        (dict(batch=12, width=4), r'batch=12 does not divide over 8 devices: use a multiple of 8'),
        (dict(batch=16, width=4, accumulate=3), r'batch=16 does not divide into 3 micro-batches: use a multiple of 24'),
        (dict(batch=0, width=4), 'batch=0: must be at least 8'),
        (dict(batch=8, width=4, tile=-1), 'tile=-1: must be at least 0'),
        (dict(batch=8, width=4, seed=-1), 'seed=-1: must be at least 0'),
    ],
)
def test_errors_name_the_fix(sizes, message):
    assert jax.device_count() == 8
    with pytest.raises(UserError, match=message):
        next(loss_forms.compare(**sizes))
