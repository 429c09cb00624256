"""Rates by layer, and parameters that begin to train later."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vlm.checkpoints import trees
from big_vlm.config import Duration, Optimizer, ParamRule, UserError
from big_vlm.training import layer_decay, optimizer

SHAPES = {
    'img/embedding/kernel': (2, 3),
    'img/pos_embedding': (1, 4),
    'img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel': (3, 2, 2),
    'img/Transformer/encoder_norm/scale': (2,),
    'img/head/kernel': (2, 2),
    'txt/llm/embedder/input_embedding': (5, 2),
    'txt/llm/layers/mlp/linear': (2, 2, 2),
    'txt/llm/final_norm/scale': (2,),
    't': (1,),
}


def ones():
    return trees.nested({path: jnp.ones(shape) for path, shape in SHAPES.items()})


def test_rates_fall_towards_the_first_layer():
    """With sgd and gradients of 1, the update is the rate. As BEiT has it, the last layer's is below the head's."""
    rules = (('img/.*', ParamRule(layer_decay=0.5)), ('txt/.*', ParamRule(layer_decay=0.1)), ('t', ParamRule()))
    params = ones()
    tx, _ = optimizer.make(Optimizer(name='sgd', b1=0.0, lr=1.0, clip=0.0, schedule='constant', rules=rules), 4, params)
    updates = trees.flat(tx.update(ones(), tx.init(params), params)[0])
    first = {path: [-float(layer.ravel()[0]) for layer in leaf] for path, leaf in updates.items()}
    assert first['img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel'] == [0.125, 0.25, 0.5]
    assert first['img/embedding/kernel'] == [0.0625] * 2 and first['img/pos_embedding'] == [0.0625]
    assert first['img/Transformer/encoder_norm/scale'] == first['img/head/kernel'] == [1.0, 1.0]
    np.testing.assert_allclose(first['txt/llm/layers/mlp/linear'], [0.01, 0.1], rtol=1e-6)
    np.testing.assert_allclose(first['txt/llm/embedder/input_embedding'], [0.001] * 5, rtol=1e-6)
    assert first['txt/llm/final_norm/scale'] == [1.0, 1.0] and first['t'] == [1.0]


@pytest.mark.parametrize(('path', 'decay', 'message'), [('t', 0.5, 'no stack'), ('img/head/kernel', 1.5, 'at most 1')])
def test_what_layer_decay_cannot_mean(path, decay, message):
    with pytest.raises(
        UserError, match=rf'config\.optimizer\.rules: layer_decay {decay if decay > 1 else "of"}.*{message}'
    ):
        layer_decay.factors({path: decay}, ones(), 'config.optimizer')


def test_a_rule_that_starts_later_is_a_run_that_begins_there():
    """Before: nothing moves, not even by decay, and gradients have no say in the clipping. After: as if from step 0."""
    params = trees.nested({'a/kernel': jnp.ones(3), 'b/kernel': jnp.ones(3)})
    rules = (('b/.*', ParamRule(start=Duration(steps=3), warmup=Duration(steps=2))), ('.*', ParamRule()))
    config = Optimizer(lr=0.1, weight_decay=0.1, clip=1.0, schedule='linear', rules=rules)
    tx, _ = optimizer.make(config, 8, params)
    grads = [trees.nested({'a/kernel': jnp.full(3, 0.01 * n), 'b/kernel': jnp.full(3, 0.1 * n)}) for n in range(1, 9)]
    state, updates = tx.init(params), []
    for g in grads:
        new, state = jax.jit(tx.update)(g, state, params)
        updates.append(trees.flat(new))
    assert not np.any([u['b/kernel'] for u in updates[:3]])

    alone = Optimizer(lr=0.1, weight_decay=0.1, clip=1.0, schedule='linear', warmup=Duration(steps=2))
    later, _ = optimizer.make(alone, 5, params)
    from_there = later.init(params)
    for g, found in zip(grads[3:], updates[3:], strict=True):
        expected, from_there = later.update(g, from_there, params)
        np.testing.assert_allclose(found['b/kernel'], expected['b']['kernel'], rtol=1e-6)
    # Nothing of b's in what clips a: its gradients of 1e6 leave a's alone.
    loud = {**grads[0], 'b': {'kernel': jnp.full(3, 1e6)}}
    quiet, with_loud = (tx.update(g, tx.init(params), params)[1] for g in (grads[0], loud))
    for one, other in zip(jax.tree.leaves(quiet), jax.tree.leaves(with_loud), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_start_after_the_end():
    rules = (('.*', ParamRule(start=Duration(percent=100.0))),)
    with pytest.raises(UserError, match='start 8 is not before the end of the stage, 8 steps'):
        optimizer.make(Optimizer(rules=rules), 8, ones())
