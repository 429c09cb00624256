"""A stage that trains adapters alone: what moves, what stays, what it leaves behind, and on how many devices."""

import dataclasses
import json
from unittest import mock

import jax
import jax.numpy as jnp
import micro_config
import numpy as np
import pytest

import big_vlm
from big_vlm import checkpoints, config, tasks
from big_vlm.bundle import adapters
from big_vlm.checkpoints import trees, weights
from big_vlm.config import UserError
from big_vlm.models import lora
from big_vlm.sharding import mesh as meshes
from big_vlm.training import evaluation, initial_weights, loop, optimizer, stages, tokenizers, workdirs
from big_vlm.training import step as steps

RULES = (('llm/.*', dict(rank=4, alpha=8.0)), ('img/Transformer/.*', dict(rank=2)))


def lora_stage(data_dir='', **changes):
    """The micro PaliGemma, from random weights."""
    raw = micro_config.multimodal(data_dir, steps=4)
    section = dict(rules=RULES, **changes.pop('lora', {}))
    raw |= dict(init_from={}, evals={}, lora=section, checkpoint=dict(every=2), **changes)
    raw['optimizer'] = dict(lr=0.05, weight_decay=0.01, schedule='constant')
    return config.validate(raw)['train']


def parts(stage, mesh):
    """(task, tx, info, first state)."""
    task = tasks.make(stage, stages.draft_contract(stage, 1536), mesh)
    shapes = steps.param_shapes(task)
    tx, info = optimizer.make(stage.optimizer, 4, shapes, batch_size=8, train=stage.lora.train)
    return task, tx, info, steps.init_state(task, tx, mesh, seed=0)


def batch(mesh):
    rng = np.random.default_rng(0)
    image_tokens, text, rows = 4, 12, 8
    length = image_tokens + text
    tokens = rng.integers(5, 300, (rows, length)).astype(np.int32)
    tokens[:, :image_tokens] = -1
    ar = np.broadcast_to(np.arange(length) > image_tokens + 4, (rows, length)).astype(np.int32)
    return meshes.put_batch(
        {
            'image': rng.integers(0, 256, (rows, 1, 32, 32, 3)).astype(np.uint8),
            'image_mask': np.ones((rows, 1), bool),
            'text': tokens,
            'segment': np.ones((rows, length), np.int32),
            'position': np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)).copy(),
            'mask_ar': ar,
            'mask_loss': ar.astype(np.float32),
            'id': np.zeros((rows, 2), np.int32),
        },
        mesh,
    )


def run(stage, mesh, count=3):
    """(first, last) leaves of the parameters by path, as numpy, the last state and the losses."""
    task, tx, info, state = parts(stage, mesh)
    first = {path: np.asarray(leaf) for path, leaf in trees.flat(state.params).items()}
    step = loop.make_step(stage, task, tx, info, mesh, state)
    losses = []
    for _ in range(count):
        state, metrics = step(state, batch(mesh))
        losses.append(float(metrics['loss']))
    return first, {path: np.asarray(leaf) for path, leaf in trees.flat(state.params).items()}, state, losses


@pytest.fixture(scope='module')
def one():
    return run(lora_stage(), meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1]))


def test_adapters_learn_and_the_base_keeps_every_bit(one):
    first, last, state, losses = one
    assert losses[-1] < losses[0]
    for path in first:
        moved = not np.array_equal(first[path], last[path])
        assert moved == (path.endswith(lora.B) or path.endswith(lora.A)), path
    moments = {path for path in trees.flat(state.opt_state) if '/mu/' in path}
    assert moments and all(path.endswith((lora.A, lora.B)) for path in moments)


@pytest.mark.slow
def test_the_program_has_no_gradient_of_the_base():
    """Even before XLA looks at it: no update has the shape of the token table."""
    mesh = meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    task, _, info, state = parts(lora_stage(), mesh)
    grads = jax.jit(lambda p, b: steps._value_and_grad(task, 1, info.trainable)(p, {}, b, jax.random.key(0))[1])
    found = trees.flat(grads(state.params, batch(mesh)))
    for path, grad in found.items():
        assert lora.is_trained(path) or not np.any(grad), path
    whole = jax.jit(lambda p, b: jax.grad(task.loss, has_aux=True)(p, {}, b, jax.random.key(0))[0])
    expected = trees.flat(whole(state.params, batch(mesh)))
    for path in found:
        if lora.is_trained(path):
            np.testing.assert_allclose(found[path], expected[path], rtol=1e-5, atol=1e-7, err_msg=path)


@pytest.mark.slow
def test_eight_devices_train_what_one_does(one, monkeypatch):
    monkeypatch.setattr('big_vlm.sharding.rules.FSDP_MIN_SIZE', 32)
    _, last, state, losses = run(lora_stage(), meshes.make_mesh(2, 2, 2))
    np.testing.assert_allclose(losses, one[3], rtol=1e-4)
    split = {path for path, leaf in trees.flat(state.params).items() if 'fsdp' in leaf.sharding.spec}
    assert any(path.endswith(lora.A) for path in split)
    for path, leaf in last.items():
        np.testing.assert_allclose(leaf, one[1][path], atol=5e-3, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_a_narrow_base_trains_and_keeps_every_bit(kind):
    mesh = meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    first, last, _, losses = run(lora_stage(lora=dict(base_dtype=kind, train=('img/head/.*',))), mesh)
    assert losses[-1] < losses[0]
    assert first['llm/layers/mlp/linear'].dtype.name == kind and first['img/head/kernel'].dtype == np.float32
    assert first['llm/embedder/input_embedding'].dtype == jnp.bfloat16
    for path in first:
        trained = lora.is_trained(path) or path.startswith('img/head/')
        assert trained != np.array_equal(first[path], last[path]), path


def test_a_narrow_base_beside_a_late_start():
    """What begins later keeps all gradients in one chain, those of the frozen base too."""
    stage = lora_stage(lora=dict(base_dtype='int4', train=('img/head/.*',)))
    rules = (('img/head/.*', dict(start=dict(steps=2))), ('.*', {}))
    raw = config.to_dict(stage)
    raw['optimizer']['rules'] = rules
    first, last, *_ = run(config.parse_stage(raw), meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    assert not np.array_equal(first['img/head/kernel'], last['img/head/kernel'])
    np.testing.assert_array_equal(first['llm/layers/mlp/linear'], last['llm/layers/mlp/linear'])


@pytest.mark.slow
def test_a_stage_leaves_its_adapters_and_a_bundle_that_needs_none(tmp_path, tiny_digit_scenes):
    """The base and the adapters are the bundle; a run that was cut off ends with the same bits."""
    raw = micro_config.multimodal(tiny_digit_scenes, steps=2)
    raw |= dict(init_from={}, evals={})
    plain = config.validate(raw)['train']
    tokenizer = tokenizers.make(tmp_path, {'train': plain})['train']
    mesh = meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    stages.run_stage('base', plain, tmp_path / 'base', tokenizer, {}, mesh=mesh)
    base = tmp_path / 'base' / 'bundle'

    section = config.to_dict(lora_stage(tiny_digit_scenes, lora=dict(train=('img/head/.*',))))
    section['optimizer']['ema_decay'] = 0.5
    section['evals'] = micro_config.multimodal(tiny_digit_scenes)['evals']
    section['init_from'] = dict(path=str(base))
    section['tokenizer'] = dict(path=str(tmp_path / 'tokenizer.model'))
    tuned = config.parse_stage(section)
    stages.run_stage('tuned', tuned, tmp_path / 'tuned', tokenizer, {}, mesh=mesh)
    of_bundle = big_vlm.load(tmp_path / 'tuned' / 'bundle')
    parts = tuned, of_bundle.task, of_bundle.contract, tokenizer, mesh, tmp_path / 'again'
    (tmp_path / 'again').mkdir()
    scores = evaluation.Evaluator(*parts)('answer', of_bundle.params)
    assert workdirs.scores(tmp_path / 'tuned') == {'answer': json.loads(json.dumps(scores))}
    told, again = (tmp_path / name / 'predictions_answer.jsonl' for name in ('tuned', 'again'))
    assert told.read_text() == again.read_text(), 'what a stage says with its adapters is what its bundle says'

    weights = trees.flat(checkpoints.load_weights(base))
    merged = trees.flat(checkpoints.load_weights(tmp_path / 'tuned' / 'bundle'))
    assert set(merged) == set(weights)
    together = big_vlm.load(base, adapters=tmp_path / 'tuned' / 'adapters')
    for path, leaf in trees.flat(together.params).items():
        np.testing.assert_allclose(leaf, merged[path], atol=1e-6, err_msg=path)
        changed = not np.array_equal(weights[path], merged[path])
        assert changed == (path.startswith('img/head/') or lora.match(tuned.lora, weights).get(path) is not None), path

    with pytest.raises(UserError, match='holds no adapters'):
        big_vlm.load(base, adapters=base)
    other = {**weights, 'llm/layers/mlp/linear': np.zeros((1, 2, 2), np.float32)}
    with pytest.raises(UserError, match='adapters of another model: llm/layers/mlp/linear_lora_a'):
        adapters.read(tmp_path / 'tuned' / 'adapters', plain, other)

    cut, fetch, seen = tmp_path / 'cut', loop._fetch, []

    def until_the_third(*args):
        seen.append(args)
        if len(seen) == 4:
            raise KeyError('the end')
        return fetch(*args)

    with mock.patch.object(loop, '_fetch', until_the_third), pytest.raises(KeyError):
        stages.run_stage('tuned', tuned, cut, tokenizer, {}, mesh=mesh)
    assert not (cut / 'bundle').exists() and [p.name for p in (cut / 'checkpoints').iterdir()] == ['2']
    stages.run_stage('tuned', tuned, cut, tokenizer, {}, mesh=mesh)
    for path, leaf in trees.flat(checkpoints.load_weights(cut / 'bundle')).items():
        np.testing.assert_array_equal(leaf, merged[path], err_msg=path)


def test_adapters_are_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """A process that was killed while it wrote them stops no resume."""
    path, stage, save = tmp_path / 'adapters', lora_stage(), weights.save_weights
    base = trees.nested({'llm/layers/mlp/linear': jnp.ones((2, 6, 4))})
    params = lora.add(base, config.Lora(rules=(('.*', config.LoraRule(rank=2)),)), jax.random.key(1))
    seen = []

    def killed(directory, tree):
        save(directory, tree)
        seen.append(path.exists())
        raise SystemExit

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(weights, 'save_weights', killed)
        adapters.save(path, params, stage)
    assert seen == [False] and list(tmp_path.iterdir()) == []
    (tmp_path / '.adapters.saving' / 'weights').mkdir(parents=True)  # what a SIGKILL leaves
    for _ in range(2):
        adapters.save(path, params, stage)
        assert list(tmp_path.iterdir()) == [path]
    found = adapters.read(path, stage, trees.flat(base))
    assert {name: leaf.shape for name, leaf in found.items()} == {
        name: leaf.shape for name, leaf in trees.flat(params).items() if lora.is_adapter(name)
    }


@pytest.mark.parametrize('kind', [pytest.param('bfloat16', marks=pytest.mark.slow), 'int8', 'int4'])
def test_a_bundle_is_summed_on_the_host_matrix_by_matrix(tmp_path, kind, monkeypatch):
    """Which makes what a device would; several processes do it there."""
    rng = np.random.default_rng(0)
    shapes = {'llm/layers/mlp/linear': (2, 6, 4), 'llm/layers/attn/q_einsum/w': (2, 3, 4, 5)}
    base = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}
    section = config.Lora(rules=(('.*linear', config.LoraRule(rank=2)),), base_dtype=kind)
    params = trees.flat(lora.add(trees.nested(base), section, jax.random.key(1)))
    params = {path: leaf + 0.5 if path.endswith(lora.B) else leaf for path, leaf in params.items()}
    unread = adapters.merged(trees.nested(params))
    assert all(isinstance(leaf, weights.Unread) for leaf in jax.tree.leaves(unread))
    weights.save_weights(tmp_path / 'weights', unread)
    found = trees.flat(weights.load_weights(tmp_path / 'weights'))
    expected = trees.flat(lora.merge(trees.nested(params)))
    assert set(found) == set(expected)
    for path, leaf in found.items():
        assert leaf.dtype == expected[path].dtype
        np.testing.assert_allclose(np.float32(leaf), np.float32(expected[path]), atol=1e-6, err_msg=path)
    if kind == 'int8':
        monkeypatch.setattr(jax, 'process_count', lambda: 2)  # none of which has all of an array
        together = trees.flat(adapters.merged(trees.nested(params)))
        for path, leaf in together.items():
            assert leaf.sharding == params[path].sharding
            np.testing.assert_allclose(leaf, expected[path], atol=1e-6, err_msg=path)


@pytest.mark.parametrize('section', [dict(), dict(base_dtype='int8')], ids=['adapters', 'int8'])
def test_a_checkpoint_of_lora_is_no_start(tmp_path, section):
    """Its matrices are one with what stands beside them only in the bundle."""
    rules = (('.*', config.LoraRule(rank=2)),)
    kept = lora.add(
        trees.nested({'llm/layers/mlp/linear': jnp.ones((2, 6, 4))}),
        config.Lora(rules=rules, **section),
        jax.random.key(1),
    )
    with checkpoints.Checkpointer(tmp_path / 'checkpoints') as saver:
        saver.save(1, {'params': kept, 'stats': {}})
    stage = lora_stage()
    init = config.InitFrom(path=str(tmp_path / 'checkpoints'), parts={'llm/layers/mlp': 'llm/layers/mlp'})
    made = {'train': dataclasses.replace(stage, init_from=init)}
    shapes = {'train': {'llm': {'layers': {'mlp': {'linear': jax.ShapeDtypeStruct((2, 6, 4), jnp.float32)}}}}}
    with pytest.raises(
        UserError, match=r'config\.init_from\.path: .*_(scale|a|b), from a run with LoRA: take its bundle'
    ):
        initial_weights.check(made, shapes, 'train', 'config')


def test_an_int8_base_comes_from_float_weights(tmp_path):
    """What is read is rounded once, from float32; what stands beside it is not looked for."""
    path = 'llm/layers/mlp/linear'
    weight = jax.random.normal(jax.random.key(0), (2, 6, 4))
    checkpoints.save_weights(tmp_path / 'weights', trees.nested({path: weight, 'llm/final_norm/scale': jnp.ones(4)}))
    section = config.Lora(rules=(('.*', config.LoraRule(rank=2)),), base_dtype='int8')
    fresh = trees.nested({path: jnp.zeros((2, 6, 4)), 'llm/final_norm/scale': jnp.zeros(4)})
    fresh = lora.add(fresh, section, jax.random.key(1))
    loaded = initial_weights.make(config.InitFrom(path=str(tmp_path / 'weights')), {}, 'config')(fresh)
    assert jax.tree.map(lambda x: x.dtype, loaded) == jax.tree.map(lambda x: x.dtype, fresh)
    dense = trees.flat(lora.merge(loaded))
    step = np.abs(weight).max(axis=1, keepdims=True) / 127
    assert (np.abs(dense[path] - weight) <= step / 2 + 1e-6).all() and np.all(dense['llm/final_norm/scale'] == 1)
