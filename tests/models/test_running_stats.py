"""Running statistics of a BatchNorm: what moves them, where they are looked up, and that a mesh does not matter."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from big_vlm.checkpoints import trees
from big_vlm.models import running_stats
from big_vlm.sharding import mesh as meshes

X = np.random.default_rng(0).normal(2, 3, (16, 4)).astype(np.float32) + np.arange(16, dtype=np.float32)[:, None]


class Tower(nn.Module):
    norm: bool = True

    @nn.compact
    def __call__(self, x, *, train=False):
        y = nn.Dense(4, name='dense')(x)
        if self.norm:
            y = nn.BatchNorm(not train, momentum=0.9, name='bn')(y)
        return y, {}


def apply(*weights, train, tower=Tower()):  # noqa: B008
    return jax.jit(lambda *weights: running_stats.apply(tower, *weights, X, train=train, rngs=None))(*weights)


def test_training_moves_them_and_evaluation_uses_them():
    params, stats = jax.jit(lambda rng: running_stats.init(Tower(), rng, X))(jax.random.key(0))
    np.testing.assert_array_equal(stats['bn']['mean'], np.zeros(4))
    np.testing.assert_array_equal(stats['bn']['var'], np.ones(4))
    y = X @ np.asarray(params['dense']['kernel'])
    z, out = apply(params, stats, train=True)
    np.testing.assert_allclose(z, (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5), rtol=1e-3, atol=1e-4)
    mean, var = (np.asarray(out['stats']['bn'][name]) for name in ('mean', 'var'))
    np.testing.assert_allclose(mean, 0.1 * y.mean(0), rtol=1e-4)
    np.testing.assert_allclose(var, 0.9 + 0.1 * y.var(0), rtol=1e-4)
    for weights in ((params, out['stats']), (trees.merged(params, out['stats']), None)):
        z, nothing = apply(*weights, train=False)
        np.testing.assert_allclose(z, (y - mean) / np.sqrt(var + 1e-5), rtol=1e-4, atol=1e-4)
        assert nothing == {}


def test_a_module_without_batch_norm_has_none():
    params, stats = running_stats.init(Tower(norm=False), jax.random.key(0), X)
    assert stats == {}
    for stats in ({}, None):
        assert apply(params, stats, train=True, tower=Tower(norm=False))[1] == {}


def test_eight_devices_share_one_batch():
    """Values, statistics and gradients; each device's own mean would differ by several standard deviations."""
    params, stats = running_stats.init(Tower(), jax.random.key(0), X)
    weights = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)

    @jax.jit
    @jax.value_and_grad
    def of_one(params, x):
        return jnp.sum(weights * running_stats.apply(Tower(), params, stats, x, train=True, rngs=None)[0])

    @jax.jit
    def moved(params, x):
        return running_stats.apply(Tower(), params, stats, x, train=True, rngs=None)[1]['stats']

    mesh = meshes.make_mesh(4, 2, 1)
    sharded = jax.device_put(X, NamedSharding(mesh, P(('data', 'fsdp'))))
    assert 'all-reduce' in moved.lower(params, sharded).compile().as_text()
    for run in (of_one, moved):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), run(params, sharded), run(params, X)
        )
