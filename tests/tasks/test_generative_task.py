"""The generative task: cross-entropy of the answer's tokens, and nothing else, on the model's own logits."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest

from big_vlm import config, tasks
from big_vlm.config import UserError
from big_vlm.data import loader, packing, prompts
from big_vlm.data.contract import Contract
from big_vlm.tasks import generative

SIZE, TEXT, VOCAB, IMAGE_TOKENS = 8, 8, 40, 4
SMALL = {'width': 16, 'mlp_dim': 24, 'depth': 1, 'num_heads': 2}
CONTRACT = Contract(SIZE, 'bilinear', True, (-1.0, 1.0), TEXT, True, True, '\n', (3,), IMAGE_TOKENS, VOCAB, 0, 2, 1, '')
# Prompts and answers of different lengths; the last answer is cut, and the one before it has no answer at all.
ROWS = (([7, 8], [9]), ([10], [11, 12, 13]), ([4, 5, 6], [14, 15]), ([20], None), ([21, 22, 23, 24], [25, 26, 27, 28]))
B = len(ROWS)


STAGE = config.parse_stage(
    {
        'task': 'generative',
        'total': {'steps': 1},
        'data': {'sources': {'a': {}}},
        'contract': {'image_size': SIZE, 'text_length': TEXT},
        'model': {
            'image': {'variant': 'mu/4', **SMALL},
            'decoder': {**SMALL, 'num_kv_heads': 1, 'head_dim': 8},
        },
    }
)


@functools.cache
def make(average='example', form='auto'):
    model = dataclasses.replace(STAGE.model, average=average, token_loss=form, token_chunk=5)
    return tasks.make(dataclasses.replace(STAGE, model=model), CONTRACT)


@functools.cache
def params():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(make().init, jax.random.key(0))[0]
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), shapes)


def batch(rows=ROWS):
    made = [prompts.generative_row(prefix, suffix, CONTRACT) for prefix, suffix in rows]
    images = np.random.default_rng(1).integers(0, 256, (len(rows), 1, SIZE, SIZE, 3), np.uint8)
    arrays = {key: np.stack([row[key] for row in made]) for key in made[0]}
    return {'image': images, 'image_mask': np.ones((len(rows), 1), bool), **arrays}


def inputs(batch):
    image = batch['image'] / np.float32(127.5) - 1
    return image, *(batch[key] for key in ('image_mask', 'text', 'segment', 'position', 'mask_ar'))


@functools.cache
def full_forward():
    return jax.jit(make().model.apply)


def log_probs(batch):
    """float64 [B, T-1]: of every next token, from the logits of the whole sequence; 0 where it is no answer's."""
    logits = np.asarray(full_forward()(params(), *inputs(batch))[0], np.float64)[:, :-1]
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    targets = np.maximum(batch['text'][:, 1:], 0)
    return np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] * batch['mask_loss'][:, 1:], logits


@functools.cache
def loss_of(average='example', form='auto'):
    return jax.jit(make(average, form).loss, static_argnums=3)


@pytest.mark.slow
def test_turns_of_one_image_are_learnt_as_rows_of_their_own():
    contract = dataclasses.replace(CONTRACT, text_length=4 * TEXT, image_alone=True)
    stage = dataclasses.replace(STAGE, contract=dataclasses.replace(STAGE.contract, text_length=4 * TEXT))
    gradients = jax.jit(jax.value_and_grad(lambda p, b: tasks.make(stage, contract).loss(p, {}, b, None)[0]))
    turns = [row for row in ROWS if row[1]]
    (prefix, suffix), *more = turns
    together = prompts.generative_row(prefix, suffix, contract, more)
    assert together['segment'].max() == len(turns)
    apart = [prompts.generative_row(prefix, suffix, contract) for prefix, suffix in turns]
    rows = [{key: np.stack([row[key] for row in rows]) for key in together} for rows in ([together], apart)]
    image = batch()['image'][:1]
    ours, expected = (
        gradients(params(), made | {'image': image.repeat(n, 0), 'image_mask': np.ones((n, 1), bool)})
        for made, n in zip(rows, (1, len(turns)), strict=True)
    )
    chex.assert_trees_all_close(ours, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize('gradients', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_examples_that_share_rows_are_learnt_as_in_rows_of_their_own(gradients):
    """Both means, and their gradients: four examples with their images in two rows, against four rows."""
    apart = batch([row for row in ROWS if row[1]])
    examples = [{key: array[i] for key, array in apart.items()} for i in range(len(apart['text']))]

    def packed(average):
        pack = packing.Packer(config.Pack(2, 15), CONTRACT, average)
        return loader.stack(pack([dict(example, cut=np.array(False)) for example in examples]))

    together = packed('token')
    assert together['text'].shape == (2, 2 * IMAGE_TOKENS + 15) and not together.pop('cut').any()
    assert (together['mask_loss'] > 0).sum() == (apart['mask_loss'] > 0).sum()

    @jax.jit
    def learnt(params, batch, weights):
        def losses(params, weights=weights):
            states, targets, mask, _ = make().supervised(params, {}, batch, None)
            by_token = make('token').loss_from_states(params, states, targets, mask)[0]
            weights = weights[:, -mask.shape[1] :]
            by_example = make('example').loss_from_states(params, states, targets, weights)[0]
            return by_token + 2 * by_example, (by_token, by_example)

        return (jax.value_and_grad(losses, has_aux=True) if gradients else losses)(params)

    ours = learnt(params(), together, packed('example')['mask_loss'])
    expected = learnt(params(), apart, apart['mask_loss'])
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=3e-6)


@pytest.mark.smoke
def test_loss_is_the_answers_cross_entropy():
    row, logits = log_probs(batch())
    count = np.array([2, 4, 3, 0, 2])  # the answers' tokens and their eos; what fits of the last one
    np.testing.assert_array_equal(batch()['mask_loss'].sum(axis=1), count)
    per_example = -row.sum(axis=1)[count > 0] / count[count > 0]
    means = {'example': per_example.mean(), 'token': -row.sum() / count.sum()}
    for average, form in (('example', 'auto'), ('token', 'auto'), ('example', 'gathered')):
        expected = means[average]
        loss, (metrics, stats) = loss_of(average, form)(params(), {}, batch(), None)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        right = (logits.argmax(axis=-1) == batch()['text'][:, 1:])[batch()['mask_loss'][:, 1:] > 0]
        np.testing.assert_allclose(metrics['token_accuracy'], right.mean(), rtol=1e-6)
        assert stats == {}


def test_only_answers_carry_loss():
    """Other prompts as targets change nothing, other answers do. (A prompt is input, too: the states are kept.)"""
    task, original = make(), batch()
    states, targets, mask, _ = jax.jit(task.supervised, static_argnums=3)(params(), {}, original, None)
    loss = jax.jit(lambda targets: task.loss_from_states(params(), states, targets, mask)[0])
    prompt = (original['segment'] > 0) & (original['mask_loss'] == 0) & (original['text'] >= 0)
    first = IMAGE_TOKENS
    assert targets.shape == (B, TEXT) and states.shape == (B, TEXT, SMALL['width'])
    np.testing.assert_array_equal(targets, original['text'][:, first:])
    np.testing.assert_array_equal(mask > 0, original['mask_loss'][:, first:] > 0)
    assert not (np.asarray(mask) * prompt[:, first:]).any()
    before = loss(targets)
    perturbed = np.where(mask > 0, targets, (np.asarray(targets) + 5) % VOCAB)
    assert loss(perturbed) == before
    perturbed = np.where(mask > 0, (np.asarray(targets) + 5) % VOCAB, targets)
    assert loss(perturbed) != before


@pytest.mark.parametrize(('rows', 'gathered'), [(200_000, False), (220_000, True)])
def test_many_logits_are_made_a_chunk_at_a_time(rows, gathered, monkeypatch):
    """Traced alone: 256 MiB are 209,715 rows of 8 tokens and 40 words in float32."""
    called = []
    compute = generative.gathered_loss
    monkeypatch.setattr(generative, 'gathered_loss', lambda *a, **k: (called.append(k), compute(*a, **k))[1])
    shapes = ((rows, TEXT, SMALL['width']), np.float32), ((rows, TEXT), np.int32), ((rows, TEXT), np.float32)
    jax.eval_shape(make().loss_from_states, params(), *(jax.ShapeDtypeStruct(*of) for of in shapes))
    assert bool(called) == gathered


def test_what_stands_on_padding_changes_nothing():
    original = batch()
    changed = original | {'text': np.where(original['segment'] > 0, original['text'], 9).astype(np.int32)}
    assert (changed['text'] != original['text']).any()
    (one, _), (other, _) = (loss_of()(params(), {}, b, None) for b in (original, changed))
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_an_answer_does_not_see_its_own_future():
    """The log-probability of an answer's first token does not depend on the later ones."""
    one, other = (log_probs(batch((*ROWS[:-1], ([7], [9, x, x]))))[0][-1] for x in (20, 30))
    first = IMAGE_TOKENS + 2  # after bos and the prompt stands the separator, which predicts it
    assert one[first] < 0
    np.testing.assert_allclose(one[first], other[first], atol=1e-5)
    assert np.abs(one - other).max() > 1e-3


def test_score_is_the_log_probability_of_the_answer(monkeypatch):
    """Whose logits are made of three tokens at a time."""
    monkeypatch.setattr(generative, '_DENSE_BYTES', 3 * 4 * B * VOCAB)
    score = jax.jit(make().predict['score'])(params(), batch())
    np.testing.assert_allclose(score, log_probs(batch())[0].sum(axis=1), atol=1e-4)
    assert score[3] == 0


def test_prefill_and_decode_step_agree_with_the_training_forward():
    """Prompts first, then the answers' tokens one by one: at each, the logits of the whole sequence at once."""
    answers = [suffix[:2] for _, suffix in ROWS if suffix and len(suffix) > 1]
    rows = [prefix for prefix, suffix in ROWS if suffix and len(suffix) > 1]
    whole = batch([(prefix, answer) for prefix, answer in zip(rows, answers, strict=True)])
    _, expected = log_probs(whole)
    predict = make().predict
    weights = jax.jit(predict['decode_params'])(params())
    asked = batch([(prefix, None) for prefix in rows])
    last = asked['segment'].sum(axis=1) - 1
    logits, cache = jax.jit(predict['prefill'], static_argnums=2)(weights, asked, IMAGE_TOKENS + TEXT)
    step = jax.jit(predict['decode_step'])
    for i in range(2):
        got = jax.nn.log_softmax(logits)
        np.testing.assert_allclose(got, expected[np.arange(len(rows)), last + i], atol=1e-4)
        logits, cache = step(weights, cache, np.array([answer[i] for answer in answers], np.int32))
    np.testing.assert_array_equal(cache.length, last + 3)


def test_attention_is_a_distribution_over_what_may_be_seen():
    weights = np.asarray(jax.jit(make().predict['attention'])(params(), batch()))
    total = IMAGE_TOKENS + TEXT
    assert weights.shape == (1, B, 2, total, total)
    real = batch()['segment'] > 0
    sums = np.moveaxis(weights.sum(axis=-1), 1, 0)[real.nonzero()[0], :, :, real.nonzero()[1]]
    np.testing.assert_allclose(sums, 1, atol=1e-5)
    prompted = (real & (batch()['mask_ar'] == 0))[1]
    answer = batch()['mask_ar'][1] > 0
    assert weights[:, 1][:, :, np.ix_(prompted, answer)[0], np.ix_(prompted, answer)[1]].max() == 0
    assert weights[:, 1][:, :, np.ix_(prompted, prompted)[0], np.ix_(prompted, prompted)[1]].min() > 0


def test_gradients_reach_every_parameter():
    grads, _ = jax.jit(jax.grad(make().loss, has_aux=True), static_argnums=3)(params(), {}, batch(), None)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        if name.endswith("['key']['bias']"):  # a constant added to all logits of a softmax
            np.testing.assert_allclose(leaf, 0, atol=1e-6)
        else:
            assert np.abs(leaf).max() > 1e-7, name


def test_a_contract_of_another_model():
    stage = config.parse_stage(
        {
            'task': 'generative',
            'total': {'steps': 1},
            'data': {'sources': {'a': {}}},
            'model': {'image': {'variant': 'mu/4', **SMALL}, 'decoder': {**SMALL, 'num_kv_heads': 1, 'head_dim': 8}},
        }
    )
    wrong = Contract(**{**CONTRACT.__dict__, 'image_tokens': 9})
    with pytest.raises(UserError, match='the contract has 9 image slots, but mu/4 makes 4 tokens of 8 px'):
        tasks.make(stage, wrong)
