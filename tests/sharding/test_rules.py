"""Where parameters and optimizer state land on a (2, 2, 2) mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from big_vlm.config import UserError
from big_vlm.sharding import mesh as meshes
from big_vlm.sharding import rules

pytestmark = pytest.mark.smoke

# L 2, D 16, N 4, H 8, K 1, F 64, V 96; (name, shape, spec with every parameter above 1,000 elements split over fsdp).
BLOCK = 'img/Transformer/encoderblock'
TABLE = [
    ('img/embedding/kernel', (4, 4, 3, 16), P()),  # 768 elements: small
    (f'{BLOCK}/LayerNorm_0/scale', (2, 16), P()),
    (f'{BLOCK}/MultiHeadDotProductAttention_0/query/kernel', (2, 16, 4, 8), P(None, 'fsdp', 'model')),
    (f'{BLOCK}/MultiHeadDotProductAttention_0/query/bias', (2, 4, 8), P(None, 'model')),
    (f'{BLOCK}/MultiHeadDotProductAttention_0/out/kernel', (2, 4, 8, 16), P(None, 'model', None, 'fsdp')),
    (f'{BLOCK}/MultiHeadDotProductAttention_0/out/bias', (2, 16), P()),
    (f'{BLOCK}/MlpBlock_0/Dense_0/kernel', (2, 16, 64), P(None, 'fsdp', 'model')),
    (f'{BLOCK}/MlpBlock_0/Dense_0/bias', (2, 64), P(None, 'model')),
    (f'{BLOCK}/MlpBlock_0/Dense_1/kernel', (2, 64, 16), P(None, 'model', 'fsdp')),
    ('img/Transformer/encoderblock_3/MlpBlock_0/Dense_1/kernel', (64, 16), P('model', 'fsdp')),  # not stacked
    ('img/MAPHead_0/MultiHeadDotProductAttention_0/key/kernel', (16, 4, 8), P(None, 'model')),
    ('img/head/kernel', (16, 128), P(None, 'fsdp')),
    ('txt/Embed_0/embedding', (96, 16), P('model', 'fsdp')),
    ('t', (1,), P()),
    ('llm/embedder/input_embedding', (96, 16), P('model', 'fsdp')),
    ('llm/final_norm/scale', (16,), P()),
    ('llm/layers/attn/q_einsum/w', (2, 4, 16, 8), P(None, 'model', 'fsdp')),
    ('llm/layers/attn/kv_einsum/w', (2, 2, 1, 16, 32), P(None, None, None, None, 'fsdp')),  # one kv head stays whole
    ('llm/layers/attn/attn_vec_einsum/w', (2, 4, 8, 16), P(None, 'model', None, 'fsdp')),
    ('llm/layers/mlp/gating_einsum', (2, 2, 16, 64), P(None, None, 'fsdp', 'model')),
    ('llm/layers/mlp/linear', (2, 64, 16), P(None, 'model', 'fsdp')),
    ('odd', (37, 41), P()),  # nothing divides
]


@pytest.fixture
def mesh():
    return meshes.make_mesh(2, 2, 2)


def tree(entries):
    result: dict[str, Any] = {}
    for name, value in entries:
        *parents, last = name.split('/')
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return result


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def assert_spec(sharding, spec, ndim, name):
    full = [(*s, *[None] * (ndim - len(s))) for s in (sharding.spec, spec)]
    assert full[0] == full[1], f'{name}: {sharding.spec}, expected {spec}'


def test_published_names(mesh):
    shapes = tree((name, struct(*shape)) for name, shape, _ in TABLE)
    shardings = rules.param_shardings(shapes, mesh, fsdp_min_size=1000)
    flat = {rules._name(path): s for path, s in jax.tree_util.tree_leaves_with_path(shardings)}
    for name, shape, spec in TABLE:
        assert_spec(flat[name], spec, len(shape), name)


def test_small_parameters_stay_whole_and_the_last_of_equal_dimensions_is_split(mesh):
    shapes = {'big': struct(256, 256), 'small': struct(255, 256)}
    shardings = rules.param_shardings(shapes, mesh)
    assert_spec(shardings['big'], P(None, 'fsdp'), 2, 'big')
    assert_spec(shardings['small'], P(), 2, 'small')


def test_axes_of_size_one_change_nothing():
    shapes = {'w': struct(512, 256), 'Embed_0': {'embedding': struct(512, 256)}}
    shardings = rules.param_shardings(shapes, meshes.make_mesh(8, 1, 1))
    assert all(s.is_fully_replicated for s in jax.tree.leaves(shardings))


def test_own_rules_come_first(mesh):
    shapes = {'head': {'kernel': struct(8, 6), 'bias': struct(6)}, 'mlp': {'linear': struct(8, 6)}}
    own = (('head/kernel', (None, 'model')), ('.*/linear', ()))
    shardings = rules.param_shardings(shapes, mesh, own, fsdp_min_size=1)
    assert_spec(shardings['head']['kernel'], P('fsdp', 'model'), 2, 'head/kernel')
    assert_spec(shardings['mlp']['linear'], P('fsdp', None), 2, 'mlp/linear')


@pytest.mark.parametrize(
    'rule, message',
    [
        (('head', ('model',)), "'head' decides for no parameter"),
        (('head/(kernel', ()), 'not a regular expression'),
        (('head/kernel', ('modle',)), "did you mean 'model'"),
        (('head/kernel', ('model', None)), 'dimension 7 does not divide by mesh.model=2'),
        (('head/kernel', (None, None, 'model')), '3 entries, the parameter 2 dimensions'),
        (('head/kernel', ('model', 'model')), "names 'model' twice"),
    ],
)
def test_own_rules_that_cannot_hold(mesh, rule, message):
    with pytest.raises(UserError, match=message):
        rules.param_shardings({'head': {'kernel': struct(7, 6)}}, mesh, (rule,))


class State(NamedTuple):
    step: Any
    params: Any
    stats: Any
    opt_state: Any
    ema: Any


def toy_params():
    return {
        'img': {'MlpBlock_0': {'Dense_0': {'kernel': jnp.zeros((16, 64)), 'bias': jnp.zeros(64)}}},
        'llm': {'mlp': {'linear': jnp.zeros((2, 64, 16))}, 'square': jnp.zeros((32, 32))},
        't': jnp.zeros(1),
    }


EXPECTED = {
    'img/MlpBlock_0/Dense_0/kernel': P('fsdp', 'model'),
    'img/MlpBlock_0/Dense_0/bias': P('model'),
    'llm/mlp/linear': P(None, 'model', 'fsdp'),
    'llm/square': P(None, 'fsdp'),
    't': P(),
}


def sharded_state(tx, mesh):
    """Initialises as a run does: shapes, shardings, then a jitted init that never holds a whole parameter."""

    def init():
        params = toy_params()
        return State(jnp.zeros((), jnp.int32), params, {}, tx.init(params), jax.tree.map(jnp.copy, params))

    shapes = jax.eval_shape(init)
    param_shardings = rules.param_shardings(shapes.params, mesh, fsdp_min_size=512)
    shardings = rules.state_shardings(shapes, param_shardings, mesh)
    state = jax.jit(init, out_shardings=shardings)()
    return {rules._name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def assert_state(leaves, expected):
    for name, spec in expected.items():
        leaf = leaves[name]
        assert_spec(leaf.sharding, spec, leaf.ndim, name)
        sizes = dict(data=2, fsdp=2, model=2)
        local = tuple(n // (sizes[a] if a else 1) for n, a in zip(leaf.shape, (*spec, None, None, None), strict=False))
        assert leaf.addressable_shards[0].data.shape == local, name


def test_adamw_state(mesh):
    leaves = sharded_state(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), mesh)
    expected = {'step': P(), 'opt_state/1/0/count': P()}
    for prefix in ('params', 'ema', 'opt_state/1/0/mu', 'opt_state/1/0/nu'):
        expected |= {f'{prefix}/{name}': spec for name, spec in EXPECTED.items()}
    assert set(expected) == set(leaves)
    assert_state(leaves, expected)


def test_adafactor_state(mesh):
    leaves = sharded_state(optax.adafactor(1e-3, min_dim_size_to_factor=16, momentum=0.9), mesh)
    rows = 'opt_state/0/v_row', 'opt_state/0/v_col', 'opt_state/0/v'
    v_row, v_col, v = ({n.removeprefix(r + '/'): x for n, x in leaves.items() if n.startswith(r + '/')} for r in rows)
    # optax drops the largest dimension from v_row and the second largest from v_col; of equals, the last is larger.
    kernel, linear = 'img/MlpBlock_0/Dense_0/kernel', 'llm/mlp/linear'
    assert v_row[kernel].shape == (16,) and v_col[kernel].shape == (64,)
    assert_state(v_row, {kernel: P('fsdp'), linear: P(None, 'fsdp'), 'llm/square': P(None), 't': P()})
    assert_state(v_col, {kernel: P('model'), linear: P(None, 'model'), 'llm/square': P('fsdp'), 't': P()})
    assert_state(v, {kernel: P(), linear: P(), 'llm/square': P(), 't': P(), 'img/MlpBlock_0/Dense_0/bias': P('model')})
    momentum = [n for n in leaves if '/ema/' in n]
    assert len(momentum) == len(EXPECTED)
    assert_state(leaves, {n: EXPECTED[n.split('/ema/')[1]] for n in momentum})


def test_nested_states_with_masked_parts(mesh):
    labels = {'img': 'frozen', 'llm': 'slow', 't': 'fast'}
    tx = optax.multi_transform(
        {'frozen': optax.set_to_zero(), 'slow': optax.adamw(1e-4), 'fast': optax.chain(optax.scale_by_adam())}, labels
    )
    leaves = sharded_state(tx, mesh)
    slow = 'opt_state/inner_states/slow/inner_state/0'
    assert_state(
        leaves, {f'{slow}/{m}/{n}': EXPECTED[n] for m in ('mu', 'nu') for n in ('llm/mlp/linear', 'llm/square')}
    )
    assert not any('img' in n for n in leaves if n.startswith('opt_state'))
    assert_state(leaves, {'opt_state/inner_states/fast/inner_state/0/mu/t': P()})


def test_the_longest_ending_names_the_parameter(mesh):
    params = {'kernel': struct(8, 64), 'head': {'kernel': struct(64, 8)}}
    shardings = rules.param_shardings(params, mesh, fsdp_min_size=1)
    state = State(struct(), params, {}, {'mu': params}, None)
    placed = rules.state_shardings(state, shardings, mesh)
    assert placed.opt_state['mu']['head']['kernel'].spec == P('fsdp', None)
    assert placed.opt_state['mu']['kernel'].spec == P(None, 'fsdp')


def test_a_sharded_step_equals_an_unsharded_one(mesh):
    """The placement is only placement: one AdamW step on the mesh gives the values of one on a single device."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), toy_params())
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    tx = optax.adamw(1e-2)

    def step(state, grads):
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return State(state.step + 1, optax.apply_updates(state.params, updates), {}, opt_state, None)

    state = State(jnp.zeros((), jnp.int32), params, {}, tx.init(params), None)
    expected = jax.jit(step)(state, grads)
    param_shardings = rules.param_shardings(params, mesh, fsdp_min_size=512)
    shardings = rules.state_shardings(state, param_shardings, mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(state, shardings)
        run = jax.jit(step, out_shardings=shardings, donate_argnums=0)
        actual = run(placed, jax.device_put(grads, param_shardings))
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-7), actual, expected)
    assert actual.params['llm']['mlp']['linear'].sharding.spec == P(None, 'model', 'fsdp')
