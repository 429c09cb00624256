"""Self-distillation beside a dual encoder: its losses in float64, its teacher, and what becomes of it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_towers import SIZE, TEXT, B, batch, make, params_of, stage, views

import big_vlm
from big_vlm import bundle, checkpoints, config, tasks
from big_vlm.checkpoints import trees
from big_vlm.config import Optimizer, UserError
from big_vlm.data import images, sources
from big_vlm.data import views as picture_views
from big_vlm.data.contract import Contract
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.models import vit
from big_vlm.sharding import mesh as meshes
from big_vlm.training import initial_weights, optimizer, step

KEY = jax.random.key(7)
SIZES = {'hidden': 12, 'bottleneck': 6, 'prototypes': 9}
RESNET = {'variant': 'R26', 'width': 1, 'pool': 'gap', 'depth': 0, 'mlp_dim': 0, 'num_heads': 0}
BOTH = {'local': 0.5, 'masked': 0.25, 'decay': 0.75, **SIZES}


def task(mesh=None, distill=BOTH, **settings):
    return make(mesh, distill=distill, **settings)


@functools.cache
def teacher():
    """One that has followed for some steps, of other weights than the student's."""
    of_task = params_of(task(), seed=5)
    shapes = jax.eval_shape(task().init, jax.random.key(0))[1]['teacher']
    rng = np.random.default_rng(6)
    centre = {name: (0.1 * rng.normal(size=9)).astype(np.float32) for name in shapes['centre']}
    heads = {name: of_task['distill'][name] for name in shapes['distill']}
    return {'steps': np.int32(3), 'img': of_task['img'], 'distill': heads, 'centre': centre}


@functools.cache
def run():
    """(loss, metrics, next teacher) of the part alone."""
    part = task().distillation
    return jax.device_get(jax.jit(part.loss)(params_of(task()), teacher(), views(), KEY))


def head(p, x):
    p, x = jax.tree.map(np.float64, p), np.float64(x)
    for i in range(3):
        if i:
            x = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        x = x @ p[f'Dense_{i}']['kernel'] + p[f'Dense_{i}']['bias']
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    return unit(x) @ unit(p['prototypes']).T


def softmax(x):
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def features(tower, params, images, **masking):
    images = np.float32(images) / 127.5 - 1
    return jax.jit(lambda p, x: tower.apply({'params': p}, x, **masking)[1])(params, images)


def test_losses_and_centres_are_those_of_float64():
    """From the towers' features on: heads, centring, sharpening, means, and the teacher that gave them."""
    of, params, part = views(), params_of(task()), task().distillation
    moved = jax.tree.map(lambda old, new: np.float32(0.75 * old + 0.25 * new), teacher()['img'], params['img'])
    heads = {n: params['distill'][n] for n in ('local', 'masked')}
    moved_heads = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, teacher()['distill'], heads)
    whole = features(part.tower, moved, of['global_view'])

    local = params['img'] | {'pos_embedding': params['img']['pos_embedding'].mean(axis=1, keepdims=True)}
    crops = features(part.tower, local, of['local_views'].reshape(-1, 4, 4, 3))['pooled'].reshape(B, 3, -1)

    _, chosen = jax.lax.top_k(jax.random.uniform(jax.random.split(KEY, 3)[1], (B, 4)), 2)
    masked = np.zeros((B, 4), bool)
    np.put_along_axis(masked, np.asarray(chosen), True, axis=1)
    hidden = features(part.tower, params['img'], of['global_view'], masked=masked, mask_token=params['distill']['mask'])

    expected, centres = {}, {}
    for name, student, target in (
        ('local', crops, np.asarray(whole['pooled'])[:, None]),
        ('masked', np.asarray(hidden['encoded'])[masked], np.asarray(whole['encoded'])[masked]),
    ):
        logits, given = head(params['distill'][name], student), head(moved_heads[name], target)
        centre = np.float64(teacher()['centre'][name])
        nll = -softmax((given - centre) / 0.04) * np.log(softmax(logits / 0.1))
        expected[name] = nll.sum(-1).mean()
        centres[name] = 0.9 * centre + 0.1 * given.reshape(-1, 9).mean(axis=0)
    loss, metrics, after = run()
    np.testing.assert_allclose([metrics['local_loss'], metrics['masked_loss']], list(expected.values()), rtol=1e-4)
    np.testing.assert_allclose(loss, 0.5 * expected['local'] + 0.25 * expected['masked'], rtol=1e-4)
    for name in centres:
        np.testing.assert_allclose(after['centre'][name], centres[name], atol=1e-5)
    assert after['steps'] == 4


def test_a_masked_patch_is_not_looked_at():
    tower = vit.ViT('mu/4', 16, 1, 24, 2)
    image = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
    changed = image.copy()
    changed[:, :4, 4:] += 1  # the second patch
    params, masked = params_of(task())['img'], np.array([[False, True, False, False]])
    token = np.linspace(-1, 1, 16, dtype=np.float32)[None, None] ** 2
    apply = jax.jit(lambda x, masked, token: tower.apply({'params': params}, x, masked=masked, mask_token=token)[0])
    np.testing.assert_array_equal(apply(image, masked, token), apply(changed, masked, token))
    assert np.abs(apply(image, ~masked, token) - apply(changed, ~masked, token)).max() > 1e-3
    assert np.abs(apply(image, masked, token + token**2) - apply(image, masked, token)).max() > 1e-3


@pytest.mark.slow
def test_no_gradient_flows_to_the_teacher():
    """Nor through it: a teacher that is the student gives the gradients of one that only happens to equal it."""
    part, params = task().distillation, params_of(task())
    equal = {'img': params['img'], 'distill': {n: params['distill'][n] for n in ('local', 'masked')}}

    @jax.jit
    def gradients(params, floats, steps):
        def loss(params, floats):
            return part.loss(params, {**floats, 'steps': steps}, views(), KEY)[0]

        return jax.grad(loss, argnums=(0, 1))(params, floats)

    floats = {name: tree for name, tree in teacher().items() if name != 'steps'}
    own, of_teacher = gradients(params, floats, jnp.int32(0))
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), of_teacher)
    same, _ = gradients(params, floats | equal, jnp.int32(5))
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-5), own, same)
    for path, leaf in trees.flat({'img': own['img'], 'distill': own['distill']}).items():
        # Pooling a local view of one patch leaves its attention nothing to choose.
        free = path.endswith('key/bias') or re.search('MAPHead_0/.*(query|key|probe)', path)
        assert np.abs(leaf).max() > 1e-8 or free, path


@pytest.mark.slow
def test_a_student_learns_from_a_teacher_that_stays(tiny_digit_scenes):
    """On views of digit scenes, each of the two losses comes down to what the teacher leaves undecided, or near it."""
    scenes, rng = sources.load('digit_scenes/free_tiny', 'train', tiny_digit_scenes), np.random.default_rng(0)
    crops = [
        picture_views.views(images.decode(scenes[i]['image']), (SIZE, 4), 3, 0.4, False, 'bilinear', rng)
        for i in range(B)
    ]
    of = {
        'global_view': np.stack([whole for whole, _ in crops]),
        'local_views': np.stack([local for _, local in crops]),
    }
    part = task(distill=BOTH | {'decay': 1 - 1e-9, 'centre_decay': 1 - 1e-9}).distillation
    fixed, params = teacher(), {name: params_of(task())[name] for name in ('img', 'distill')}
    tx = optax.adam(0.01)

    @jax.jit
    def learn(params, state, key):
        (_, metrics), gradients = jax.value_and_grad(lambda p: part.loss(p, fixed, of, key)[:2], has_aux=True)(params)
        updates, state = tx.update(gradients, state)
        return optax.apply_updates(params, updates), state, metrics

    state, losses = tx.init(params), []
    for step_ in range(80):
        params, state, metrics = learn(params, state, jax.random.fold_in(KEY, step_))
        losses.append([float(metrics[name]) for name in ('local_loss', 'masked_loss')])
    first, last = np.mean(losses[:5], axis=0), np.mean(losses[-5:], axis=0)
    assert (last < 0.7 * first).all(), (first, last)


@pytest.mark.slow
def test_the_teacher_follows_every_step():
    """It begins as the student, and after n steps is the average of what that was; the same on eight devices."""
    losses = {}
    for sizes in ((1, 1, 1), (2, 2, 2)):
        mesh = meshes.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
        made = task(mesh)
        tx, info = optimizer.make(Optimizer(lr=0.01, schedule='constant'), 9, step.param_shapes(made))
        state = step.init_state(made, tx, mesh, seed=1)
        train_step = step.make_train_step(made, tx, info, mesh, state, 0)
        expected, losses[sizes] = None, []
        for _ in range(4):
            student = jax.device_get(state.params)
            new = {'img': student['img'], 'distill': {n: student['distill'][n] for n in ('local', 'masked')}}
            expected = new if expected is None else jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, expected, new)
            state, metrics = train_step(state, meshes.put_batch(views(), mesh))
            actual = jax.device_get({name: state.stats['teacher'][name] for name in expected})
            close = dict(rtol=1e-6, atol=1e-8) if losses[sizes] else dict(rtol=0)
            jax.tree.map(functools.partial(np.testing.assert_allclose, **close), actual, expected)
            losses[sizes].append([float(metrics[name]) for name in ('loss', 'local_loss', 'masked_loss')])
    # A cross-entropy near 0 is a difference of numbers near 1, whose rounding it has.
    np.testing.assert_allclose(*losses.values(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'distill': {'share': 0.2}}, 'model.distill: its weight is 0, so there is none'),
        ({'distill': {'local': 1, 'decay': 1}}, 'distill.decay: must be below 1'),
        ({'distill': {'local': 1, 'temperature': 0}}, 'distill.temperature: must be above 0'),
        ({'image': {'patch_dropout': 0.5}}, 'leave config.model.image.patch_dropout at 0'),
        ({'contract': {'max_patches': 4, 'text_length': TEXT}}, 'square images, not contract.max_patches'),
        ({'contract': {'image_size': 32}, 'image': RESNET}, "not model.*'R26'"),
    ],
)
def test_what_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        task(**settings)


def test_accumulation_and_decoders_have_none():
    for changes, message in (
        ({'accumulate': 2}, r'config.accumulate=2: config.model.distill knows no micro-batches: use accumulate=1'),
        ({'task': 'generative'}, 'config.model.distill: it trains the image tower of a dual encoder'),
    ):
        with pytest.raises(UserError, match=message):
            config.parse_stage(config.to_dict(stage(distill=BOTH)) | changes)


@pytest.mark.parametrize(
    ('of', 'message'),
    [
        (lambda: batch(), r'the pipeline makes no views: add views\(8, 96\) before resize'),
        (lambda: views(side=6), r'views\(…, 6\): local views must be whole patches of 4 pixels'),
    ],
)
def test_views_that_are_missing_or_cut_patches(of, message):
    state = params_of(task()), {'teacher': teacher()}
    with pytest.raises(UserError, match=message):
        jax.eval_shape(task().loss, *state, of(), KEY)


def test_views_that_nothing_takes():
    with pytest.raises(UserError, match=r'the pipeline has views\(…\), which nothing takes'):
        jax.eval_shape(make().loss, params_of(make()), {}, views(), KEY)


def test_a_bundle_has_no_teacher_and_a_stage_begins_with_its_own(tmp_path):
    """The heads are in the folder for a next stage; teacher and centres are not, nor does one ask for them."""
    tokenizer = Tokenizer.train(['a red three', 'a blue seven in the center'], 300, tmp_path / 't.model')
    made = stage(distill=BOTH)
    contract = Contract.make(made.contract, tokenizer)
    of_stage = tasks.make(made, contract)
    params, stats = params_of(of_stage), {'teacher': teacher()}
    bundle.save(tmp_path / 'bundle', params, made, contract, tokenizer, stats=stats)
    assert set(checkpoints.weight_shapes(tmp_path / 'bundle')) == {'img', 'txt', 't', 'b', 'distill'}
    model = big_vlm.load(tmp_path / 'bundle')
    assert set(model.params) == {'img', 'txt', 't', 'b'}
    assert model.embed(images=np.zeros((SIZE, SIZE, 3), np.uint8))['image'].shape == (1, 16)
    shapes = tasks.weights(*jax.eval_shape(of_stage.init, KEY))
    found = initial_weights.overwritten(config.InitFrom(path=str(tmp_path / 'bundle')), {}, shapes, 'config')
    assert found == set(trees.flat(params))
