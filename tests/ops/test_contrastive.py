"""The sigmoid loss: dense, ring and a float64 transcription of algorithm 1 agree in value and in all four gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from big_vlm.config import UserError
from big_vlm.ops import contrastive
from big_vlm.ops.contrastive import sigmoid_loss, softmax_loss

pytestmark = pytest.mark.smoke

MESHES = [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 1, 1)]
INITIAL = (np.log(10.0), -10.0)
LEARNED = (np.log(117.0), -80.0)


def make_mesh(sizes):
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, ('data', 'fsdp', 'model'), axis_types=(AxisType.Auto,) * 3, devices=devices)


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def oracle(zimg, ztxt, t, b):
    """Loss and gradients by zimg, ztxt, t, b, in float64."""
    x, y, t, b = (np.asarray(a, np.float64) for a in (zimg, ztxt, t, b))
    cosine = x @ y.T
    label = 2 * np.eye(len(x)) - 1
    z = label * (cosine * np.exp(t) + b)
    loss = np.logaddexp(0, -z).sum() / len(x)
    weight = -label * np.exp(-np.logaddexp(0, z)) / len(x)
    scaled = weight * np.exp(t)
    return loss, (scaled @ y, scaled.T @ x, (scaled * cosine).sum(), weight.sum())


def value_and_grads(zimg, ztxt, t, b, **kwargs):
    args = [jnp.asarray(a) if hasattr(a, 'dtype') and a.ndim else jnp.float32(a) for a in (zimg, ztxt, t, b)]
    return jax.jit(jax.value_and_grad(lambda *a: sigmoid_loss(*a, **kwargs), argnums=(0, 1, 2, 3)))(*args)


def assert_close(actual, expected, tolerance=1e-5):
    """Norm-wise: one relative error for the value and one for each gradient."""
    names = ('loss', 'zimg', 'ztxt', 't', 'b')
    for name, a, e in zip(names, (actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape, name
        error = np.linalg.norm(a - e) / np.linalg.norm(e)
        assert error <= tolerance, f'{name}: relative error {error:.2e}'


def test_two_pairs_by_hand():
    # Cosines 1 on the diagonal and 0 elsewhere, scale 2, bias −1: positives have logit 1, negatives −1.
    z = np.eye(2, dtype=np.float32)
    expected = 2 * np.log1p(np.exp(-1.0))  # each row: one positive and one negative, both log(1 + e^−1)
    for kwargs in (dict(form='dense'), dict(form='ring', mesh=make_mesh((2, 1, 1)))):
        loss, (dimg, _, dt, db) = value_and_grads(z, z, np.log(2.0), -1.0, **kwargs)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        wrong = 1 / (1 + np.exp(1.0))  # the probability that each pair is misjudged
        np.testing.assert_allclose(dimg, wrong * np.array([[-1, 1], [1, -1]]), rtol=1e-6)
        np.testing.assert_allclose(dt, -2 * wrong, rtol=1e-6)
        np.testing.assert_allclose(db, 0, atol=1e-7)


@pytest.mark.parametrize('sizes', MESHES, ids=str)
@pytest.mark.parametrize('t, b', [INITIAL, LEARNED], ids=['initial', 'learned'])
def test_ring_equals_dense_equals_float64(sizes, t, b):
    rng = np.random.default_rng(0)
    zimg, ztxt = unit(rng, 24, 40), unit(rng, 24, 40)
    t, b = np.float32(t), np.float32(b)
    expected = oracle(zimg, ztxt, t, b)
    dense = value_and_grads(zimg, ztxt, t, b, form='dense')
    ring = value_and_grads(zimg, ztxt, t, b, form='ring', mesh=make_mesh(sizes))
    assert_close(dense, expected)
    assert_close(ring, expected)
    assert_close(ring, dense)


@pytest.mark.parametrize('sizes', [(2, 2, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize(
    ('tile', 'chunk', 'ways'), [(1, 12, 1), (3, 4, 1), (5, 3, 2), (8, 1, 1), (13, 0, 2), (64, 2, 2)]
)
def test_tiles_and_chunks_of_any_size(sizes, tile, chunk, ways):
    """Whole tiles, a shorter last one, one for all: the home block of 12 or 48 images is cut in half besides."""
    rng = np.random.default_rng(3)
    args = unit(rng, 48, 40), unit(rng, 48, 40), *(np.float32(x) for x in INITIAL)
    kwargs = dict(form='ring', mesh=make_mesh(sizes), tile=tile, chunk=chunk, ways=ways)
    assert_close(value_and_grads(*args, **kwargs), oracle(*args))
    loss = jax.jit(lambda *a: sigmoid_loss(*a, **kwargs))(*args)
    np.testing.assert_allclose(loss, oracle(*args)[0], rtol=1e-5)


def test_the_checkpointed_form_is_the_dense_one():
    rng = np.random.default_rng(9)
    args = unit(rng, 11, 8), unit(rng, 11, 8), np.float32(2.0), np.float32(-3.0)
    assert_close(value_and_grads(*args, form='checkpoint', tile=4), oracle(*args))


@pytest.mark.parametrize('loss', [sigmoid_loss, softmax_loss])
def test_the_form_that_fits(loss):
    """Read off the traced program: what is built, what travels."""

    def program(batch, **where):
        z, scalar = jax.ShapeDtypeStruct((batch, 4), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
        scalars = [scalar] * (2 if loss is sigmoid_loss else 1)
        return str(jax.make_jaxpr(lambda *args: loss(*args, form='auto', **where))(z, z, *scalars))

    mesh = make_mesh((4, 2, 1))
    assert 'f32[2048,2048]' in program(2048) and 'f32[2048,2048]' in program(2048, mesh=mesh)
    large = {8192: program(8192, mesh=mesh), 8191: program(8191, mesh=mesh), 4096: program(4096)}
    assert 'ppermute' in large[8192] and not any('ppermute' in large[batch] for batch in (8191, 4096))
    assert all(f'f32[128,{batch}]' in large[batch] for batch in (8191, 4096))
    assert not any(f'f32[{batch},{batch}]' in text for batch, text in large.items())


def test_how_many_texts_travel_at_once():
    """As many as the width leaves room for; of what divides a device's share, the nearest by ratio."""
    shapes = [jax.ShapeDtypeStruct((8, width), dtype) for width in (768, 1152) for dtype in ('bfloat16', 'float32')]
    assert [(contrastive.default_tile(z), contrastive.default_chunk(z)) for z in shapes] == [
        (512, 1024),
        (512, 1024),
        (1024, 512),
        (1024, 512),
    ]
    assert [contrastive._divisor(rows, 1024) for rows in (4096, 1000, 3000, 4099, 1)] == [1024, 1000, 1000, 4099, 1]


@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_value_without_gradients(sizes):
    rng = np.random.default_rng(1)
    args = unit(rng, 16, 8), unit(rng, 16, 8), np.float32(2.0), np.float32(-3.0)
    loss = jax.jit(lambda *a: sigmoid_loss(*a, form='ring', mesh=make_mesh(sizes)))(*args)
    np.testing.assert_allclose(loss, oracle(*args)[0], rtol=1e-5)


@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_saturated_positives(sizes):
    """A learned model: positives at logit ≈ 36, so the loss is ≈ 1e-16 beside a softplus of 36 a pair."""
    rng = np.random.default_rng(2)
    zimg = unit(rng, 16, 256)
    ztxt = zimg + 0.004 * rng.normal(size=zimg.shape)
    ztxt = (ztxt / np.linalg.norm(ztxt, axis=1, keepdims=True)).astype(np.float32)
    t, b = (np.float32(x) for x in LEARNED)
    expected = oracle(zimg, ztxt, t, b)
    assert 0 < expected[0] < 1e-14
    assert_close(value_and_grads(zimg, ztxt, t, b, form='ring', mesh=make_mesh(sizes)), expected)
    # The scale of 117 turns one float32 rounding of a cosine into 7e-6 of the loss. The matrix product sums 256 terms
    # in an order of the machine's own, which may round like a walk of √256 such steps.
    assert_close(value_and_grads(zimg, ztxt, t, b, form='dense'), expected, tolerance=1e-4)


@pytest.mark.parametrize('form', ['dense', 'ring'])
@pytest.mark.parametrize('t, b', [(np.log(1e4), 0.0), (0.0, 1e4), (0.0, -1e4)])
def test_logits_of_ten_thousand_are_finite(form, t, b):
    z = np.tile(np.array([[1, 0], [-1, 0]], np.float32), (4, 1))
    actual = value_and_grads(z, z[::-1].copy(), t, b, form=form, mesh=make_mesh((8, 1, 1)))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(actual))
    expected = oracle(z, z[::-1], np.float32(t), np.float32(b))
    for a, e in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize('form', ['dense', 'ring'])
def test_batch_of_one(form):
    rng = np.random.default_rng(3)
    args = unit(rng, 1, 8), unit(rng, 1, 8), np.float32(1.0), np.float32(-2.0)
    assert_close(value_and_grads(*args, form=form, mesh=make_mesh((1, 1, 1))), oracle(*args))


@pytest.mark.parametrize('sizes', [(8, 1, 1), (2, 2, 2)], ids=str)
def test_one_pair_per_device(sizes):
    rng = np.random.default_rng(4)
    batch = sizes[0] * sizes[1]
    args = unit(rng, batch, 8), unit(rng, batch, 8), np.float32(1.0), np.float32(-2.0)
    assert_close(value_and_grads(*args, form='ring', mesh=make_mesh(sizes)), oracle(*args))


@pytest.mark.parametrize('form', ['dense', 'ring'])
def test_all_embeddings_equal(form):
    rng = np.random.default_rng(5)
    z = np.tile(unit(rng, 1, 8), (16, 1))
    args = z, z, *(np.float32(x) for x in INITIAL)
    assert_close(value_and_grads(*args, form=form, mesh=make_mesh((4, 2, 1))), oracle(*args))


@pytest.mark.parametrize('sizes', [(4, 2, 1), (2, 2, 2)], ids=str)
def test_bfloat16_embeddings(sizes):
    """The value is as exact as in float32; gradients are rounded to bfloat16 (8 bits) on their way out."""
    rng = np.random.default_rng(6)
    zimg, ztxt = (jnp.asarray(unit(rng, 32, 64), jnp.bfloat16) for _ in range(2))
    t, b = (np.float32(x) for x in INITIAL)
    expected = oracle(zimg.astype(jnp.float32), ztxt.astype(jnp.float32), t, b)
    actual = value_and_grads(zimg, ztxt, t, b, form='ring', mesh=make_mesh(sizes))
    assert actual[0].dtype == jnp.float32 and actual[1][0].dtype == jnp.bfloat16
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    assert_close(actual, expected, tolerance=2**-8)


def test_backward_scales_by_the_cotangent_and_parameters_of_shape_one():
    rng = np.random.default_rng(7)
    zimg, ztxt = unit(rng, 8, 8), unit(rng, 8, 8)
    t, b = np.array([1.5], np.float32), np.array([-4.0], np.float32)
    expected_loss, (dimg, dtxt, dt, db) = oracle(zimg, ztxt, t[0], b[0])

    def loss(*args):
        return 3 * sigmoid_loss(*args, form='ring', mesh=make_mesh((8, 1, 1))) ** 2

    actual = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(zimg, ztxt, t, b)
    chain = 6 * expected_loss
    expected = 3 * expected_loss**2, (chain * dimg, chain * dtxt, chain * dt[None], chain * db[None])
    assert_close(actual, expected)


@pytest.mark.parametrize('sizes', [(8, 1, 1), (2, 2, 2)], ids=str)
def test_inside_a_sharded_training_step(sizes):
    """Auto mesh from the context, jit with shardings, gradients through a linear layer before the loss."""
    mesh = make_mesh(sizes)
    rng = np.random.default_rng(8)
    image, text = rng.normal(size=(16, 6)).astype(np.float32), rng.normal(size=(16, 5)).astype(np.float32)
    params = dict(
        img=rng.normal(size=(6, 8)).astype(np.float32),
        txt=rng.normal(size=(5, 8)).astype(np.float32),
        t=np.float32(INITIAL[0]),
        b=np.float32(INITIAL[1]),
    )

    def loss(params, image, text, form):
        zimg, ztxt = image @ params['img'], text @ params['txt']
        zimg, ztxt = (z / (jnp.linalg.norm(z, axis=1, keepdims=True) + 1e-8) for z in (zimg, ztxt))
        return sigmoid_loss(zimg, ztxt, params['t'], params['b'], form=form)

    expected = jax.value_and_grad(loss)(params, image, text, 'dense')
    batch, whole = NamedSharding(mesh, P(('data', 'fsdp'))), NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        step = jax.jit(
            lambda p, i, t: jax.value_and_grad(loss)(p, i, t, 'ring'),
            in_shardings=(whole, batch, batch),
            out_shardings=whole,
        )
        actual = step(params, image, text)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-5, atol=1e-6), actual, expected)


def compiled_step(batch, form, mesh):
    spec = NamedSharding(mesh, P(('data', 'fsdp')))
    z = jax.ShapeDtypeStruct((batch, 16), jnp.float32, sharding=spec)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    step = jax.value_and_grad(lambda *a: sigmoid_loss(*a, form=form, mesh=mesh), argnums=(0, 1, 2, 3))
    return jax.jit(step).lower(z, z, scalar, scalar).compile()


def test_no_device_holds_a_full_row_of_the_logits():
    mesh, batch = make_mesh((4, 2, 1)), 512

    def shapes(form):
        text = compiled_step(batch, form, mesh).as_text()
        return {tuple(map(int, s.split(','))) for s in re.findall(r'f32\[(\d+(?:,\d+)*)\]', text)}

    # That the search finds what it seeks: under jit, the dense form's rows are 512 wide.
    assert any(batch in s and np.prod(s) >= batch * batch // 8 for s in shapes('dense'))
    ring = shapes('ring')
    assert (batch // 8, batch // 8) in ring
    assert max(np.prod(s) for s in ring) <= (batch // 8) ** 2


def test_memory_per_device_falls_as_devices_are_added():
    """With the square of the ring, as long as all of a device's texts travel at once."""

    def temporary(form, devices):
        return compiled_step(1024, form, make_mesh((devices, 1, 1))).memory_analysis().temp_size_in_bytes

    dense, four, eight = temporary('dense', 8), temporary('ring', 4), temporary('ring', 8)
    block = (1024 // 8) ** 2 * 4
    assert eight < 6 * block < dense and 2 * eight < four


def test_only_neighbours_exchange_embeddings():
    text = compiled_step(64, 'ring', make_mesh((8, 1, 1))).as_text()
    # The first texts; in the loop, texts and their gradients at once; the gradients' way home.
    assert len(re.findall(r' collective-permute(?:-start)?\(', text)) == 3
    assert 'all-gather' not in text and 'all-to-all' not in text


def test_errors_name_the_fix():
    z = np.ones((12, 4), np.float32)
    mesh = make_mesh((8, 1, 1))
    with pytest.raises(UserError, match='batch of 12 does not divide over the 8 devices.*multiple of 8'):
        sigmoid_loss(z, z, 0.0, 0.0, form='ring', mesh=mesh)
    with pytest.raises(UserError, match='width 4, text embeddings 5'):
        sigmoid_loss(z, np.ones((12, 5), np.float32), 0.0, 0.0)
    with pytest.raises(UserError, match='same batch'):
        sigmoid_loss(z, np.ones((11, 4), np.float32), 0.0, 0.0)
    with pytest.raises(UserError, match="did you mean 'ring'"):
        sigmoid_loss(z, z, 0.0, 0.0, form='rign')
    with pytest.raises(UserError, match='needs a mesh'):
        sigmoid_loss(z, z, 0.0, 0.0, form='ring')
    with pytest.raises(UserError, match='chunk=-1'):
        sigmoid_loss(z[:8], z[:8], 0.0, 0.0, form='ring', mesh=mesh, chunk=-1)
    with pytest.raises(UserError, match='ways=2: 1, or 2 where each device has an even number'):
        sigmoid_loss(z[:8], z[:8], 0.0, 0.0, form='ring', mesh=mesh, ways=2)
    with pytest.raises(UserError, match='fsdp'):
        sigmoid_loss(z, z, 0.0, 0.0, form='ring', mesh=mesh, axes=('data', 'fsd'))


@pytest.mark.parametrize('loss', [sigmoid_loss, softmax_loss])
def test_what_needs_no_mesh_takes_no_notice_of_one(loss):
    """Of a user's own, whose axes have other names."""
    mesh = jax.make_mesh((8,), ('x',), axis_types=(AxisType.Auto,))
    z, rest = unit(np.random.default_rng(0), 2, 16, 4), (1.0, -1.0)[: 2 if loss is sigmoid_loss else 1]
    for form in ('dense', 'checkpoint'):
        alone = loss(*z, *rest, form=form)
        with jax.set_mesh(mesh):
            assert loss(*z, *rest, form=form) == alone
    with jax.set_mesh(mesh), pytest.raises(UserError, match="unknown mesh axis 'data'"):
        loss(*z, *rest, form='ring')


@pytest.mark.parametrize('loss', [sigmoid_loss, softmax_loss])
def test_float64_stays_out(loss):
    """Where a user has switched it on: the ring adds up and sends float32 all the same."""
    z, rest = unit(np.random.default_rng(0), 2, 16, 4), (1.0, -1.0)[: 2 if loss is sigmoid_loss else 1]
    ring = jax.value_and_grad(lambda *z: loss(*z, *rest, form='ring', mesh=make_mesh((4, 2, 1))), argnums=(0, 1))
    narrow = jax.jit(ring)(*z)
    with jax.enable_x64(True):
        wide = jax.jit(ring)(*z)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {np.dtype(np.float32)}
    jax.tree.map(np.testing.assert_array_equal, wide, narrow)
