"""The optimizer against a few lines of numpy, and its rules against every published parameter name."""

import re

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vlm.checkpoints import trees
from big_vlm.config import Duration, Optimizer, ParamRule, UserError
from big_vlm.models import matrices
from big_vlm.training import optimizer

BLOCK = 'Transformer/encoderblock'
ATTENTION = 'MultiHeadDotProductAttention_0'
# Every parameter of SigLIP, PaliGemma (Gemma 1 to 3) as published; True: weight decay.
NAMES = {
    'img/embedding/kernel': True,
    'img/embedding/bias': False,
    'img/embedding/conv_0/kernel': True,
    'img/embedding/norm_0/scale': False,
    'img/embedding/norm_0/bias': False,
    'img/embedding/out/kernel': True,
    'img/embedding/out/bias': False,
    'img/pos_embedding': False,
    'img/cls': False,
    'img/head/kernel': True,
    'img/head/bias': False,
    **{f'img/{BLOCK}{i}/LayerNorm_{n}/{p}': False for i in ('', '_3') for n in (0, 1) for p in ('scale', 'bias')},
    **{f'img/{BLOCK}/{ATTENTION}/{x}/kernel': True for x in ('query', 'key', 'value', 'out')},
    **{f'img/{BLOCK}/{ATTENTION}/{x}/bias': False for x in ('query', 'key', 'value', 'out')},
    **{f'img/{BLOCK}/MlpBlock_0/Dense_{n}/kernel': True for n in (0, 1)},
    **{f'img/{BLOCK}/MlpBlock_0/Dense_{n}/bias': False for n in (0, 1)},
    'img/Transformer/encoder_norm/scale': False,
    'img/MAPHead_0/probe': False,
    f'img/MAPHead_0/{ATTENTION}/query/kernel': True,
    'img/MAPHead_0/LayerNorm_0/bias': False,
    'img/MAPHead_0/MlpBlock_0/Dense_1/kernel': True,
    'txt/Embed_0/embedding': False,
    'txt/pos_embedding': False,
    'txt/Encoder_0/encoderblock/MlpBlock_0/Dense_0/kernel': True,
    'txt/Encoder_0/encoder_norm/bias': False,
    'txt/head/kernel': True,
    'txt/head/bias': False,
    't': False,
    'b': False,
    'llm/embedder/input_embedding': True,
    'llm/embedder/mm_input_projection/w': True,
    'llm/embedder/mm_soft_embedding_norm/scale': False,
    'llm/final_norm/scale': False,
    'llm/layers/attn/q_einsum/w': True,
    'llm/layers/attn/kv_einsum/w': True,
    'llm/layers/attn/qkv_einsum/w': True,
    'llm/layers/attn/attn_vec_einsum/w': True,
    'llm/layers/attn/_query_norm/scale': False,
    'llm/layers/attn/_key_norm/scale': False,
    'llm/layers/mlp/gating_einsum': True,
    'llm/layers/mlp/linear': True,
    **{
        f'llm/layers/{norm}/scale': False
        for norm in ('pre_attention_norm', 'pre_ffw_norm', 'post_attention_norm', 'post_ffw_norm')
    },
}


def tree(names, value=1.0):
    return trees.nested({name: jnp.full((2, 3), value, jnp.float32) for name in names})


def test_which_parameters_are_decayed():
    """With zero gradients AdamW's update is the decay alone: -lr · decay · parameter."""
    params = tree(NAMES, 5.0)
    tx, info = optimizer.make(Optimizer(lr=0.1, weight_decay=0.2, schedule='constant'), 10, params)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert {name: bool(u[0, 0]) for name, u in trees.flat(updates).items()} == NAMES
    np.testing.assert_allclose(trees.flat(updates)['llm/layers/attn/q_einsum/w'], -0.1 * 0.2 * 5.0, rtol=1e-6)
    assert info.decay == {name: 0.2 if decayed else 0.0 for name, decayed in NAMES.items()}


def test_a_name_nobody_thought_of_must_be_decided():
    with pytest.raises(UserError, match='default weight-decay rules: no rule matches img/lora_a'):
        optimizer.make(Optimizer(weight_decay=0.1), 10, tree(['img/lora_a']))
    optimizer.make(Optimizer(weight_decay=0.1, rules=(('.*', ParamRule(decay=1.0)),)), 10, tree(['img/lora_a']))


def adamw(p, grads, *, lr, b1, b2, eps, decay, clip):
    """The AdamW paper's Algorithm 2 in float64, one tensor, with clipping."""
    m = v = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        g = g * min(1.0, clip / np.linalg.norm(g))
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        p = p - lr(t - 1) * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * p)
    return p


def test_adamw_against_the_paper():
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(4, 3)), rng.normal(size=(6, 4, 3)) * 3
    config = Optimizer(
        lr=0.1, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.3, clip=2.0, schedule='linear', warmup=Duration(steps=2)
    )
    params = {'w': jnp.asarray(start, jnp.float32)}
    tx, _ = optimizer.make(config, 6, params)
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update({'w': jnp.asarray(g, jnp.float32)}, state, params)
        params = {'w': params['w'] + updates['w']}
    lrs = [0, 0.05, 0.1, 0.075, 0.05, 0.025]
    expected = adamw(start, grads, lr=lrs.__getitem__, b1=0.8, b2=0.95, eps=1e-6, decay=0.3, clip=2.0)
    np.testing.assert_allclose(params['w'], expected, rtol=2e-6)


def test_adafactor_against_the_paper():
    """Factored second moments of a 128 × 130 matrix, relative decay 1 - t^-0.8 capped, update clipped to RMS 1."""
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(128, 130)), rng.normal(size=(5, 128, 130)) * rng.normal(size=130)
    params = {'w': jnp.asarray(start, jnp.float32)}
    tx, _ = optimizer.make(Optimizer(name='adafactor', lr=0.1, b2=0.6, clip=0.0, schedule='constant'), 5, params)
    state = tx.init(params)
    row, column, p = np.zeros(128), np.zeros(130), start
    for t, g in enumerate(grads, 1):
        updates, state = tx.update({'w': jnp.asarray(g, jnp.float32)}, state, params)
        params = {'w': params['w'] + updates['w']}
        beta = min(0.6, 1 - t**-0.8)
        row = beta * row + (1 - beta) * (g**2).mean(axis=1)
        column = beta * column + (1 - beta) * (g**2).mean(axis=0)
        u = g / np.sqrt(np.outer(row, column) / row.mean())
        p = p - 0.1 * u / max(1.0, np.sqrt((u**2).mean()))
    np.testing.assert_allclose(params['w'], p, rtol=1e-5, atol=1e-5)
    # Rows and columns, not the matrix: that is what Adafactor is for.
    assert max(x.size for x in jax.tree.leaves(state)) == 130


MATRICES = {
    f'img/{BLOCK}/{ATTENTION}/query/kernel': ((2, 6, 2, 4), 'L D N H -> L D (N H)'),
    f'img/{BLOCK}/{ATTENTION}/out/kernel': ((2, 2, 4, 6), 'L N H D -> L (N H) D'),
    f'img/MAPHead_0/{ATTENTION}/value/kernel': ((6, 2, 4), 'D N H -> 1 D (N H)'),
    'txt/Encoder_0/encoderblock/MlpBlock_0/Dense_1/kernel': ((2, 9, 6), 'L F D -> L F D'),
    'llm/layers/attn/q_einsum/w': ((2, 3, 6, 4), 'L N D H -> L D (N H)'),
    'llm/layers/attn/kv_einsum/w': ((2, 2, 1, 6, 4), 'L two K D H -> (L two) D (K H)'),
    'llm/layers/attn/qkv_einsum/w': ((2, 3, 2, 6, 4), 'L three N D H -> (L three) D (N H)'),
    'llm/layers/attn/attn_vec_einsum/w': ((2, 3, 4, 6), 'L N H D -> L (N H) D'),
    'llm/layers/mlp/gating_einsum': ((2, 2, 6, 9), 'L two D F -> (L two) D F'),
    'llm/layers/mlp/linear': ((2, 9, 6), 'L F D -> L F D'),
}


def orthogonal(m):
    """Five Newton-Schulz iterations in float64 ("Muon", Jordan 2024): near U Vᵀ of m's singular value decomposition."""
    x = m / np.linalg.norm(m)
    x = x.T if m.shape[0] > m.shape[1] else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x.T if m.shape[0] > m.shape[1] else x


def test_muon_against_its_iteration():
    """Every layer's matrices are turned alone; all else is Adam's, of about the same size."""
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, (shape, _) in MATRICES.items()}
    others = [name for name in NAMES if not re.fullmatch('|'.join(pattern for pattern, _ in matrices.LAYERS), name)]
    assert {'llm/embedder/input_embedding', 'img/embedding/kernel', 'img/head/kernel', 't'} < set(others)
    shapes |= dict.fromkeys(others, (2, 3))
    grads = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    params = trees.nested({name: jnp.zeros(shape) for name, shape in shapes.items()})
    config = Optimizer(name='muon', lr=0.5, b1=0.8, b2=0.9, clip=0.0, schedule='constant')
    tx, _ = optimizer.make(config, 5, params)
    state = tx.init(params)
    as_jax = trees.nested({name: jnp.asarray(g, jnp.float32) for name, g in grads.items()})
    for _ in range(2):  # With one gradient over and over, the momentum is that gradient.
        updates, state = jax.jit(tx.update)(as_jax, state, params)
    updates = trees.flat(updates)
    for name, (_, pattern) in MATRICES.items():
        for g, u in zip(einops.rearrange(grads[name], pattern), einops.rearrange(updates[name], pattern), strict=True):
            expected = -0.5 * 0.2 * np.sqrt(max(g.shape)) * orthogonal(g)
            np.testing.assert_allclose(u, expected, rtol=2e-4, atol=2e-5, err_msg=name)
    for name in others:
        np.testing.assert_allclose(updates[name], -0.5 * np.sign(grads[name]), rtol=1e-4, err_msg=name)


def test_rules_first_match_wins():
    params = tree(['img/a/kernel', 'img/b/kernel', 'txt/kernel', 'txt/bias'])
    rules = (
        ('img/a/.*', ParamRule(frozen=True)),
        ('img/.*', ParamRule(lr=0.5, decay=2.0)),
        ('txt/bias', ParamRule(schedule='linear', warmup=Duration(steps=4))),
        ('.*', ParamRule()),
    )
    config = Optimizer(lr=1.0, weight_decay=0.1, clip=0.0, schedule='constant', rules=rules)
    tx, info = optimizer.make(config, 8, params)
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    steps = []
    for _ in range(7):
        updates, state = tx.update(grads, state, params)
        steps.append({name: float(u[0, 0]) for name, u in trees.flat(updates).items()})
    assert {name: info.decay[name] for name in info.decay} == {'img/b/kernel': 0.2, 'txt/kernel': 0.1, 'txt/bias': 0.0}
    # With constant gradients Adam's direction is 1; the decay comes on top.
    assert [s['img/a/kernel'] for s in steps] == [0.0] * 7
    np.testing.assert_allclose([s['img/b/kernel'] for s in steps], -0.5 * 1.2, rtol=1e-5)
    np.testing.assert_allclose([s['txt/kernel'] for s in steps], -1.1, rtol=1e-5)
    np.testing.assert_allclose([s['txt/bias'] for s in steps], [0, -0.25, -0.5, -0.75, -1, -0.75, -0.5], atol=1e-5)
    assert trees.flat(info.trainable) == {
        'img/a/kernel': False,
        'img/b/kernel': True,
        'txt/kernel': True,
        'txt/bias': True,
    }


def test_frozen_parameters_have_no_moments_and_no_say_in_the_clipping():
    params = tree(['img/kernel', 'txt/kernel'])
    rules = (('img/.*', ParamRule(frozen=True)), ('.*', ParamRule()))
    tx, _ = optimizer.make(Optimizer(rules=rules, schedule='constant'), 8, params)
    state = tx.init(params)
    assert not [path for path in trees.flat(state) if 'img' in path]
    assert [path for path in trees.flat(state) if path.endswith('mu/txt/kernel')]
    quiet, loud = ({'img': {'kernel': params['img']['kernel'] * s}, 'txt': params['txt']} for s in (0.0, 1e6))
    for update in (tx.update(quiet, state, params)[1], tx.update(loud, state, params)[1]):
        moments = [x for path, x in trees.flat(update).items() if path.endswith('mu/txt/kernel')]
        np.testing.assert_allclose(moments[0], 0.1 / np.sqrt(6), rtol=1e-5)


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (Optimizer(name='adamww'), r"unknown optimizer 'adamww' \(config\.optimizer\.name\): did you mean 'adamw'"),
        (Optimizer(schedule='cosin'), "unknown schedule 'cosin'"),
        (Optimizer(rules=(('img/.*', ParamRule()),)), 'no rule matches t, txt/kernel'),
        (Optimizer(rules=(('.*', ParamRule()), ('img/.*', ParamRule()))), "'img/.*' decides for no parameter"),
        (Optimizer(rules=(('imgs/.*', ParamRule()), ('.*', ParamRule()))), "'imgs/.*' decides for no parameter"),
        (Optimizer(rules=(('.*', ParamRule(frozen=True)),)), 'every parameter is frozen'),
        (Optimizer(warmup=Duration(epochs=1)), r'config\.optimizer\.warmup\.epochs: the number of examples'),
    ],
)
def test_mistakes(config, message):
    with pytest.raises(UserError, match=message):
        optimizer.make(config, 10, tree(['img/kernel', 'txt/kernel', 't']))
