"""The text towers besides SigLIP's (`test_two_towers.py`): causal, class token, LSTM, bag of words, a Gemma's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vlm import config
from big_vlm.config import UserError
from big_vlm.models import gemma, text_towers, two_towers

SIZES = dict(width=16, depth=2, mlp_dim=24, num_heads=2)
LENGTHS = np.array([3, 6, 1])
REAL = np.arange(6)[None] < LENGTHS[:, None]
TEXT = np.random.default_rng(1).integers(2, 30, (3, 6)).astype(np.int32) * REAL
DECODER = dict(variant='gemma_2b', width=16, depth=2, mlp_dim=24, num_heads=4, num_kv_heads=1, head_dim=8)
TRANSFORMER = text_towers.TextTransformer(vocab_size=30, variant='mu', embed_dim=12, **SIZES)
KINDS = {
    'transformer': TRANSFORMER.clone(pool='tok', causal=True, mask=True),
    'lstm': text_towers.TextLSTM(vocab_size=30, variant='mu', width=16, depth=2, embed_dim=12, mask=True),
    'bag': text_towers.BagOfWords(vocab_size=30, variant='mu', width=16, embed_dim=12, mask=True),
    'gemma': text_towers.TextGemma(gemma.Gemma(30, **DECODER), embed_dim=12, mask=True),
}


def random_params(tower, text=TEXT, seed=0):
    """Values everywhere, so that no bias or scale is invisible."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(tower.init, jax.random.key(0), text, np.ones(text.shape, bool))['params']
    return jax.tree.map(lambda p: (0.3 * rng.normal(size=p.shape)).astype(np.float32), shapes)


def run(tower, params, text=TEXT, mask=REAL):
    return jax.jit(lambda params, text, mask: tower.apply({'params': params}, text, mask))(params, text, mask)


def dense(p, x):
    return x @ p['kernel'] + p['bias']


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_a_causal_token_sees_what_a_shorter_text_shows_it():
    tower = TRANSFORMER.clone(causal=True)
    params = random_params(tower)
    whole = run(tower, params)[1]['encoded']
    for length in (1, 4):
        short = {**params, 'pos_embedding': params['pos_embedding'][:, :length]}
        got = run(tower, short, TEXT[:, :length], REAL[:, :length])[1]['encoded']
        np.testing.assert_allclose(got, whole[:, :length], atol=2e-5)
    # The last one sees all, and in a single layer what it sees is the same as without the mask.
    one = tower.clone(depth=1)
    params = random_params(one)
    np.testing.assert_allclose(run(one, params)[0], run(one.clone(causal=False), params)[0], atol=2e-5)


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('mask', [False, True])
def test_a_class_token_is_one_more_word_behind_the_text(mask, causal):
    tower = TRANSFORMER.clone(pool='tok', mask=mask, causal=causal)
    params = random_params(tower)
    z, out = run(tower, params)
    cls = params.pop('cls')
    params['Embed_0'] = {'embedding': np.concatenate([params['Embed_0']['embedding'], cls[0]])}
    params['pos_embedding'] = np.pad(params['pos_embedding'], ((0, 0), (0, 1), (0, 0)))
    text = np.pad(TEXT, ((0, 0), (0, 1)), constant_values=30)
    longer = TRANSFORMER.clone(vocab_size=31, pool='last', mask=mask, causal=causal)
    expected, longer_out = run(longer, params, text, np.pad(REAL, ((0, 0), (0, 1)), constant_values=True))
    np.testing.assert_allclose(z, expected, atol=2e-5)
    np.testing.assert_allclose(out['encoded'], longer_out['encoded'][:, :6], atol=2e-5)


@pytest.mark.parametrize('pool', ['last', 'mean'])
def test_lstm_against_its_equations(pool):
    """Hochreiter & Schmidhuber 1997 with a forget gate, in float64, a token at a time."""
    tower = KINDS['lstm'].clone(pool=pool)
    params = random_params(tower)
    p = double(params)
    x = p['Embed_0']['embedding'][TEXT]
    for i in range(2):
        cell = p[f'lstm_{i}']
        h = c = np.zeros((3, 16))
        states = []
        for t in range(6):
            gates = {g: x[:, t] @ cell[f'i{g}']['kernel'] + dense(cell[f'h{g}'], h) for g in 'ifgo'}
            c = sigmoid(gates['f']) * c + sigmoid(gates['i']) * np.tanh(gates['g'])
            h = sigmoid(gates['o']) * np.tanh(c)
            states.append(h)
        x = np.stack(states, 1)
    pooled = [row[n - 1] if pool == 'last' else row[:n].mean(0) for row, n in zip(x, LENGTHS, strict=True)]
    np.testing.assert_allclose(run(tower, params)[0], dense(p['head'], np.stack(pooled)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('pool', ['mean', 'max'])
def test_a_text_without_a_real_token_has_an_embedding_and_gradients(pool):
    tower = KINDS['bag'].clone(pool=pool)
    params = {'txt': jax.tree.map(lambda x: x * (x.ndim > 1), random_params(tower))}  # no bias: the embedding is 0
    model = two_towers.TwoTowers(None, tower, image_size=0, text_length=6)

    def total(params):
        return jnp.sum(model.apply(params, text=TEXT, text_mask=np.zeros(TEXT.shape, bool))[1])

    value, gradients = jax.jit(jax.value_and_grad(total))(params)
    assert value == 0 and all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize('mask', [False, True])
@pytest.mark.parametrize('pool', ['mean', 'max'])
def test_bag_of_words(pool, mask):
    tower = KINDS['bag'].clone(pool=pool, mask=mask)
    params = random_params(tower)
    rows = params['Embed_0']['embedding'].astype(np.float64)[TEXT]
    counted = [row[: n if mask else 6] for row, n in zip(rows, LENGTHS, strict=True)]
    pooled = np.stack([row.mean(0) if pool == 'mean' else row.max(0) for row in counted])
    np.testing.assert_allclose(run(tower, params)[0], dense(double(params['head']), pooled), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('variant', [pytest.param('gemma_2b', marks=pytest.mark.slow), 'gemma3_1b'])
def test_a_gemma_encodes_a_padded_text_as_the_text_alone(variant):
    sizes = DECODER | dict(variant=variant, **(dict(window=2) if variant == 'gemma3_1b' else {}))
    model = gemma.Gemma(30, **sizes)
    tower = text_towers.TextGemma(model, embed_dim=12, mask=True)
    params = random_params(tower)
    shapes = jax.eval_shape(lambda key: gemma.init(model, key), jax.random.key(0))
    assert jax.tree.map(jnp.shape, params['llm']) == jax.tree.map(jnp.shape, shapes), "a Gemma's own parameters"
    z, out = run(tower, params)
    for row, length in enumerate(LENGTHS):
        text = TEXT[row : row + 1, :length]
        position, causal = np.arange(length)[None], np.tril(np.ones((1, length, length), bool))

        def alone(params, text, position=position, causal=causal):
            x, _ = model.apply(
                {'params': params}, model.apply({'params': params}, text, method='embed'), position, causal
            )
            return model.apply({'params': params}, x, method=lambda model, x: model.final_norm(x))

        expected = jax.jit(alone)(params['llm'], text)
        np.testing.assert_allclose(out['encoded'][row, :length], expected[0], atol=2e-5)
        np.testing.assert_allclose(z[row], dense(params['head'], np.asarray(expected)[0, -1]), atol=2e-5)


def test_a_gemma_that_is_not_causal_sees_what_follows():
    tower = KINDS['gemma'].clone(pool='first')
    params = random_params(tower)
    other = TEXT.copy()
    other[1, 5] = 29 if other[1, 5] != 29 else 28
    for causal, sees in ((True, False), (False, True)):
        one, two = (run(tower.clone(causal=causal), params, text)[0] for text in (TEXT, other))
        assert bool(np.abs(one[1] - two[1]).max() > 1e-4) == sees


@pytest.mark.parametrize('kind', KINDS)
def test_padding_is_not_seen_and_every_parameter_is_trained(kind):
    tower = KINDS[kind]
    params = random_params(tower)
    before, after = (run(tower, params, text)[0] for text in (TEXT, np.where(REAL, TEXT, 29)))
    np.testing.assert_array_equal(before, after)
    target = np.random.default_rng(2).normal(size=before.shape)
    loss = jax.jit(jax.grad(lambda params: jnp.sum(tower.apply({'params': params}, TEXT, REAL)[0] * target)))
    # A key's bias adds the same to every logit of a query: softmax does not see it.
    dead = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(loss(params))
        if not np.abs(g).max() > 0 and 'key' not in jax.tree_util.keystr(path)
    ]
    assert not dead


@pytest.mark.parametrize('kind', KINDS)
def test_from_config(kind):
    sizes = {'transformer': SIZES, 'lstm': dict(width=16, depth=2), 'bag': dict(width=16), 'gemma': {}}[kind]
    pool = 'mean' if kind == 'bag' else 'last'
    dropout = {} if kind == 'gemma' else {'dropout': 0.5}
    section = config.TextTower(kind=kind, mask=True, pool=pool, **sizes, **dropout)
    shared = dict(dtype=jnp.dtype('float32'), remat='none', scan=False)
    tower = text_towers.from_config(section, config.Decoder(**DECODER), vocab_size=30, embed_dim=12, **shared)
    assert type(tower) is text_towers.TOWERS[kind][0]
    z, _ = jax.eval_shape(lambda: tower.init_with_output(jax.random.key(0), TEXT, REAL)[0])
    assert z.shape == (3, 12)
    if kind == 'bag':  # the others drop in the same way
        train = jax.jit(lambda p, i: tower.apply({'params': p}, TEXT, REAL, train=True, rngs={'dropout': i})[0])
        params, keys = random_params(tower), jax.random.split(jax.random.key(0))
        one, other = (train(params, key) for key in keys)
        assert np.abs(one - other).max() > 1e-2
        plain = tower.clone(dropout=0.0)
        np.testing.assert_array_equal(run(tower, params)[0], run(plain, params)[0])


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(kind='lstm', pool='map'), "unknown pool 'map'"),
        (dict(kind='bag'), "unknown pool 'last'"),
        (dict(kind='lstm', causal=True), r"model.text.causal=True: a text tower of kind 'lstm' has none"),
        (dict(kind='gemma', width=64), r'model.text.width=64: .* its settings are those of model.decoder'),
        (dict(kind='gemma', dropout=0.1), r'model.text.dropout=0.1: .* its settings are those of model.decoder'),
        (dict(kind='gru'), "unknown text tower 'gru'"),
        (dict(kind='bag', pool='mean', variant='B/16'), 'a text tower has no patch size'),
    ],
)
def test_what_a_kind_does_not_have(settings, message):
    shared = dict(dtype=jnp.dtype('float32'), remat='none', scan=True)
    with pytest.raises(UserError, match=message):
        text_towers.from_config(
            config.TextTower(**settings), config.Decoder(**DECODER), vocab_size=30, embed_dim=12, **shared
        )
