"""A bundle gives back what was saved, answers by its own contract, and says what is wrong with a folder or request."""

import functools
import gc
import io
import json
import shutil
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small_bundle import CONTRASTIVE, GENERATIVE, SIZE, make, pictures, train_tokenizer

import big_vlm
from big_vlm import bundle
from big_vlm.config import UserError
from big_vlm.data import coordinates
from big_vlm.data import images as picture_files
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.sharding import mesh as meshes


@pytest.fixture(scope='session')
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp('t'))


@pytest.fixture(scope='session')
def decoder(tokenizer):
    return make(GENERATIVE, tokenizer)


@pytest.fixture(scope='session')
def towers(tokenizer):
    return make(CONTRASTIVE, tokenizer)


@pytest.fixture(scope='session')
def folder(decoder, tmp_path_factory):
    path = tmp_path_factory.mktemp('bundles') / 'tiny'
    scores = {'test': {'exact_match': {'score': 0.75, 'low': 0.5, 'high': 0.9, 'chance': 0.125, 'n': 64}}}
    bundle.save(path, decoder.params, decoder.stage, decoder.contract, decoder.tokenizer, scores=scores)
    return path


@pytest.fixture(scope='session')
def loaded(folder):
    return big_vlm.load(folder)


def test_importing_the_package_imports_no_jax():
    code = 'import big_vlm, sys; assert big_vlm.__version__ and "load" in dir(big_vlm); assert "jax" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)
    with pytest.raises(AttributeError, match='lod'):
        _ = big_vlm.lod


def test_a_loaded_bundle_is_the_one_that_was_saved(decoder, loaded, folder):
    assert sorted(p.name for p in folder.iterdir()) == ['README.md', 'bundle.json', 'tokenizer.model', 'weights']
    assert [p.name for p in folder.parent.iterdir()] == ['tiny']  # nothing left over from saving
    jax.tree.map(np.testing.assert_array_equal, loaded.params, decoder.params)
    assert loaded.contract == decoder.contract
    assert loaded.stage == decoder.stage
    assert loaded.scores['test']['exact_match']['score'] == 0.75
    images = pictures(4)
    prompts = ['caption en', 'detect three', 'red', 'x']
    assert loaded.generate(images, prompts, max_new_tokens=6) == decoder.generate(images, prompts, max_new_tokens=6)


def test_answers_are_the_same_on_many_devices(folder, loaded):
    """Weights split over fsdp and model, rows over data and fsdp: 3 rows fill 4 shards."""
    spread = big_vlm.load(folder, mesh=meshes.make_mesh(data=2, fsdp=2, model=2))
    assert any(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(spread.params))
    request = dict(images=pictures(3), prompts='detect three', max_new_tokens=8)
    for one, other in zip(loaded.generate(**request), spread.generate(**request), strict=True):
        assert one.ids == other.ids
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize('quantize', ['', pytest.param('int8', marks=pytest.mark.slow)])
def test_a_bundle_in_use_holds_its_weights_once(folder, quantize):
    """And gives them back as they were."""

    def held():
        gc.collect()
        return nbytes(jax.live_arrays())

    before = held()
    model = big_vlm.load(folder, quantize=quantize)
    stored, layers = nbytes(model.params), nbytes(model.params['llm']['layers'])
    model.generate(pictures(4), ['caption en', 'detect three', 'red', 'x'], max_new_tokens=6)
    assert stored <= held() - before < stored + layers / 2
    assert isinstance(model.decode_params()['llm']['layers'], tuple)
    jax.tree.map(np.testing.assert_array_equal, model.params, big_vlm.load(folder, quantize=quantize).params)


@pytest.mark.parametrize('given', ['score_each', pytest.param('generate', marks=pytest.mark.slow)])
def test_in_bfloat16_it_says_what_it_would_in_float32(folder, loaded, given):
    half = big_vlm.load(folder, dtype='bfloat16')
    assert 2 * nbytes(half.params) == nbytes(loaded.params) and half.task.dtype == jnp.bfloat16
    images, prompts, answers = (
        pictures(3),
        ['caption en', 'detect three', 'red'],
        ['red', 'blue three', 'one in the top'],
    )
    if given == 'generate':
        said = half.generate(images, prompts, choices=[[answer] for answer in answers])
    else:
        said = half.score_each(images, prompts, answers)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.decode_params())} == {jnp.dtype('bfloat16')}
    for one, other in zip(said, loaded.score_each(images, prompts, answers), strict=True):
        assert one.ids == other.ids and one.log_probs != other.log_probs
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=0.03, atol=0.1)
    refused(lambda: big_vlm.load(folder, dtype='float16'), "unknown dtype 'float16'.*float32")


def test_the_card_says_what_it_is(folder):
    card = (folder / 'README.md').read_text()
    description = json.loads((folder / 'bundle.json').read_text())
    assert '| test/exact_match | 0.75 | 0.5 to 0.9 | 0.125 | 64 |' in card
    assert 'bundle.generate(' in card and 'digit_scenes/cells (train)' in card
    assert f'{description["parameters"]:,}' in card
    assert '| image size | `8` |' in card


def test_answers_agree_with_their_scores_and_their_ids(decoder):
    images, prompts = pictures(3), ['caption en', 'detect three', 'caption en']
    answers = decoder.generate(images, prompts, max_new_tokens=8)
    for answer in answers:
        assert len(answer.ids) == len(answer.log_probs) <= 8
        assert answer.text == decoder.tokenizer.decode([i for i in answer.ids if i != decoder.contract.eos_id])
        assert all(value <= 0 for value in answer.log_probs)
    assert len({tuple(answer.ids) for answer in answers}) > 1


def test_score_is_the_sum_over_the_answers_tokens_and_its_end(decoder):
    image, prompt, answer = pictures(1)[0], 'caption en', 'red three'
    [score] = decoder.score(image, prompt, answer)
    total = 0.0
    ids = [*decoder.tokenizer.encode(answer), decoder.contract.eos_id]
    row = decoder._row(decoder._ids(prompt, answer, 'prompt'))
    batch = {key: value[None] for key, value in row.items()}
    batch |= {'image': picture_files.prepare(image, decoder.contract)[None, None], 'image_mask': np.ones((1, 1), bool)}
    model = decoder.task.model
    names = ('image_mask', 'text', 'segment', 'position', 'mask_ar')
    pixels = batch['image'].astype(np.float32) / 127.5 - 1
    logits, _ = jax.jit(model.apply)(decoder.params, pixels, *(batch[name] for name in names))
    log_probs = np.asarray(jax.nn.log_softmax(logits))[0]
    slots = np.flatnonzero(row['mask_loss'])
    np.testing.assert_array_equal(row['text'][slots], ids)
    total = sum(log_probs[slot - 1, token] for slot, token in zip(slots, ids, strict=True))
    np.testing.assert_allclose(score, total, rtol=1e-5)


def test_an_answer_does_not_depend_on_its_batch(decoder):
    images, prompts = pictures(4), ['caption en', 'detect three', 'red', 'x']
    settings = dict(max_new_tokens=5, temperature=1.0, seed=3)
    whole = decoder.generate(images, prompts, **settings)
    pieces = decoder.generate(images, prompts, batch_size=2, **settings)
    assert [a.ids for a in whole] == [a.ids for a in pieces]
    assert [a.ids for a in whole] == [a.ids for a in decoder.generate(images, prompts, **settings)]
    other = decoder.generate(images, prompts, **(settings | {'seed': 4}))
    assert [a.ids for a in whole] != [a.ids for a in other]


def test_one_image_or_one_prompt_serves_all_of_the_others(decoder):
    images, prompts = pictures(3), ['caption en', 'red', 'x']
    ask = functools.partial(decoder.generate, max_new_tokens=5)
    alone = [ask(image, 'caption en')[0].ids for image in images]
    assert [a.ids for a in ask(images, 'caption en')] == alone
    several = ask(images[0], prompts)
    assert several[0].ids == alone[0]
    assert [a.ids for a in several] == [ask(images[:1], [prompt])[0].ids for prompt in prompts]


def test_an_image_is_the_same_from_a_file_a_picture_or_an_array(decoder, tmp_path):
    array = pictures(1)[0]
    Image.fromarray(array).save(tmp_path / 'a.png')
    forms = [array, Image.fromarray(array), tmp_path / 'a.png', str(tmp_path / 'a.png')]
    shown = [picture_files.prepare(form, decoder.contract) for form in forms]
    for other in shown[1:]:
        np.testing.assert_array_equal(shown[0], other)
    assert shown[0].shape == (SIZE, SIZE, 3) and shown[0].dtype == np.uint8


def test_few_programs_serve_many_requests(decoder):
    """3 and 4 rows, limits of 5 and 8 tokens, two temperatures: one compiled program."""
    traced = []
    predict = decoder.task.predict

    def prefill(params, batch, cache_size):
        traced.append((batch['text'].shape, cache_size))
        return predict['prefill'](params, batch, cache_size)

    counted = bundle.Bundle(decoder.stage, decoder.contract, decoder.tokenizer, decoder.params, decoder.mesh)
    counted.task = type('Task', (), {'predict': predict | {'prefill': prefill}})
    counted.generate(pictures(4), 'red', max_new_tokens=8, temperature=1.0)
    counted.generate(pictures(3), 'caption en', max_new_tokens=5, temperature=0.3, seed=2)
    assert traced == [((4, 4 + 32), 4 + 32 + 8)]


def test_an_answer_is_scored_as_it_was_generated(decoder):
    """Token by token, whatever the image and the prompt; `score` is the sum."""
    images, prompts = pictures(3), ['caption en', 'detect three', 'red']
    said = decoder.generate(images, prompts, choices=[['red'], ['blue three'], ['one in the top']])
    scored = decoder.score_each(images, prompts, [answer.text for answer in said])
    for one, other in zip(said, scored, strict=True):
        assert (one.text, one.ids) == (other.text, other.ids)
        np.testing.assert_allclose(other.log_probs, one.log_probs, atol=1e-4)
        np.testing.assert_allclose(other.perplexity, np.exp(-np.mean(one.log_probs)), rtol=1e-3)
    sums = decoder.score(images, prompts, [answer.text for answer in said])
    np.testing.assert_allclose(sums, [sum(answer.log_probs) for answer in said], atol=1e-3)


def test_scores_take_the_slots_that_their_texts_need(tokenizer):
    """A decoder alone with room for 4,096 tokens: 32 of them are read, and the logits are those of the answers."""
    model = {'decoder': GENERATIVE['model']['decoder'], 'projector': 'none'}
    alone = make(GENERATIVE | {'model': model, 'contract': {'image_size': SIZE, 'text_length': 4096}}, tokenizer)
    predict, seen = alone.task.predict, []

    def seeing(name):
        def run(params, batch, size):
            seen.append((name, batch['text'].shape, size))
            return predict[name](params, batch, size)

        return run

    alone.task = type('Task', (), {'predict': predict | {name: seeing(name) for name in ('token_scores', 'prefill')}})
    answers = ['red', 'one in the top']
    [ranking] = alone.rank(None, 'caption en', answers)
    np.testing.assert_allclose(ranking.scores, alone.score(None, 'caption en', answers), rtol=1e-5)
    tokens = max(len(tokenizer.encode(answer)) + 1 for answer in answers)
    wide = 1 << (tokens - 1).bit_length()
    assert seen == [('prefill', (1, 32), 32 + wide), ('token_scores', (2, 32), wide)]
    # Of many requests ids are held, and the row of each, 80 KB here, when its turn comes.
    tracemalloc.start()
    waiting = alone.generate_each(None, ['caption en'] * 100)
    assert tracemalloc.get_traced_memory()[0] < 100_000
    tracemalloc.stop()
    del waiting


@pytest.mark.parametrize('per_token', [False, True])
def test_ranking_is_by_the_scores_of_whole_answers(decoder, per_token):
    images, candidates = pictures(3), ['red', 'blue three', 'blue', 'one in the top left', 'Seven']
    ranked = decoder.rank(images, 'detect three', candidates, per_token=per_token, batch_size=4)  # two readings
    for image, ranking in zip(images, ranked, strict=True):
        scored = decoder.score_each(image, 'detect three', candidates)
        expected = [answer.log_prob / (len(answer.ids) if per_token else 1) for answer in scored]
        np.testing.assert_allclose(ranking.scores, expected, atol=1e-4)
        assert ranking.order == sorted(range(5), key=lambda i: -expected[i])
        assert ranking.best == candidates[ranking.order[0]]
    own = decoder.rank(images, 'detect three', [['red', 'blue'], ['blue', 'seven', 'red'], ['red']])
    assert [len(ranking.scores) for ranking in own] == [2, 3, 1] and own[2].best == 'red'
    np.testing.assert_allclose(own[0].scores[0], decoder.score(images[0], 'detect three', 'red')[0], atol=1e-4)


@pytest.mark.slow
def test_answers_out_of_a_set_and_in_a_grammar(decoder):
    images, prompts = pictures(4), ['caption en', 'detect three', 'red', 'x']
    free = [answer.text for answer in decoder.generate(images, prompts)]
    allowed = ['red', 'Blue three', 'one in the top']
    for temperature in (0.0, 3.0):
        said = decoder.generate(images, prompts, choices=allowed, temperature=temperature)
        assert {answer.text for answer in said} <= {'red', 'blue three', 'one in the top'}
    assert not set(free) & set(allowed)
    own = decoder.generate(images, prompts, choices=[['red'], ['blue'], ['three', 'one'], ['in']], batch_size=3)
    assert [own[0].text, own[1].text, own[3].text] == ['red', 'blue', 'in'] and own[2].text in ('three', 'one')
    found = decoder.generate(images, prompts, grammar='boxes', choices=['Three', 'seven'], max_new_tokens=24)
    for answer in found:
        boxes = coordinates.text_to_boxes(answer.text)
        assert all(y1 < y2 and x1 < x2 and label in ('three', 'seven') for (y1, x1, y2, x2), label in boxes)
    assert any(coordinates.text_to_boxes(answer.text) for answer in found)


def test_constraints_that_cannot_be_met(decoder):
    ask = functools.partial(decoder.generate, pictures(2), 'red')
    refused(lambda: ask(grammar='box'), "unknown grammar 'box': did you mean 'boxes'")
    refused(lambda: ask(choices=[]), 'no choices')
    refused(lambda: ask(choices=['red', ' ']), "choice ' ': must be text")
    refused(lambda: ask(choices=[['red'], ['blue'], ['x']]), '3 sets of choices for 2 answers')
    refused(lambda: ask(choices=['red', 'one in the top'], max_new_tokens=2), "'one in the top' takes . tokens.*from 2")
    refused(lambda: ask(choices=['a;b'], grammar='boxes'), "label 'a;b'")
    refused(lambda: decoder.rank(pictures(1), 'red', [['red'], []]), '2 sets of choices for 1')


def test_embeddings_are_unit_vectors_of_the_towers(towers, tmp_path):
    images, texts = pictures(3), ['red three', 'blue seven', 'Red Three']
    z = towers.embed(images, texts)
    np.testing.assert_allclose(np.linalg.norm(z['image'], axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(z['text'], axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(z['text'][0], z['text'][2])  # the contract lowers the case
    assert np.abs(z['text'][0] - z['text'][1]).max() > 1e-4
    pixels = (
        np.stack([picture_files.prepare(image, towers.contract) for image in images]).astype(np.float32) / 127.5 - 1
    )
    expected, _, _ = jax.jit(towers.task.model.apply)(towers.params, image=pixels)
    np.testing.assert_allclose(z['image'], expected, atol=1e-5)
    assert set(towers.embed(texts='red')) == {'text'}
    bundle.save(tmp_path / 'b', towers.params, towers.stage, towers.contract, towers.tokenizer)
    again = big_vlm.load(tmp_path / 'b').embed(images)['image']
    np.testing.assert_allclose(again, z['image'], atol=1e-6)


def refused(request, message):
    with pytest.raises(UserError, match=message) as caught:
        request()
    assert '\n' not in str(caught.value)


def test_requests_that_cannot_be_answered(decoder, towers, tmp_path):
    image = pictures(1)[0]
    (tmp_path / 'text.png').write_text('no picture')
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, 'PNG')
    (tmp_path / 'cut.png').write_bytes(buffer.getvalue()[:100])
    ask = functools.partial(decoder.generate, max_new_tokens=4)
    refused(lambda: ask(image, ''), r'prompts\[0\] is empty')
    refused(lambda: ask(image, ['red', ' \n']), r'prompts\[1\] is empty')
    refused(lambda: ask(image, 'three seven ' * 40), r"prompts\[0\] 'three seven.*48")
    refused(lambda: ask(pictures(2), ['a', 'b', 'c']), '2 images and 3 prompts')
    refused(lambda: ask([], 'a'), 'no images')
    refused(lambda: ask(image, []), 'no prompts')
    refused(lambda: ask(image, [3]), r'prompts\[0\] is a int')
    refused(lambda: ask(str(tmp_path / 'none.png'), 'a'), 'none.png')
    refused(lambda: ask(tmp_path / 'text.png', 'a'), 'text.png')
    refused(lambda: ask(tmp_path / 'cut.png', 'a'), 'cut.png')
    refused(lambda: ask(image.astype(np.float32), 'a'), r'images\[0\].*uint8.*float32')
    refused(lambda: ask(image[..., :2], 'a'), r'images\[0\]')
    refused(lambda: ask(image[:0], 'a'), r'images\[0\]')
    refused(lambda: ask([None], 'a'), r'images\[0\].*NoneType')
    refused(lambda: ask(image, 'a', max_new_tokens=0), 'max_new_tokens 0')
    refused(lambda: ask(image, 'a', temperature=-1), 'temperature -1')
    refused(lambda: ask(image, 'a', batch_size=0), 'batch_size 0')
    refused(lambda: towers.generate(image, 'a'), 'contrastive and cannot generate answers.*generative')
    refused(lambda: decoder.score(image, 'a', 'three seven ' * 40), r"prompts\[0\] 'a': its answer does not fit")
    refused(lambda: towers.score(image, 'a', 'b'), 'contrastive and cannot score')
    refused(lambda: decoder.embed(image), 'generative and cannot embed.*contrastive')
    refused(lambda: towers.embed(), 'nothing to embed')
    refused(lambda: towers.embed(texts=['a', '']), r'texts\[1\] is empty')


@pytest.fixture
def broken(folder, tmp_path):
    """A copy to break."""
    return shutil.copytree(folder, tmp_path / 'copy')


def edit(path, **changes):
    file = path / 'bundle.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_folders_that_are_no_bundle(folder, tmp_path):
    refused(lambda: big_vlm.load(tmp_path / 'none'), 'none: no such folder')
    refused(lambda: big_vlm.load(tmp_path), 'not a bundle: a bundle is a folder with a bundle.json')
    refused(lambda: big_vlm.load(folder.parent), f'did you mean {folder}')
    for text in ('', '[1]', '3', '{"format": "x", "files": {}}', '{"a": 1}', '{"format": 1, "files": 3}'):
        (tmp_path / 'bundle.json').write_text(text)
        refused(lambda: big_vlm.load(tmp_path), 'bundle.json: damaged or not a bundle')


def test_damaged_bundles(broken):
    edit(broken, format=bundle.folder.FORMAT + 1, versions={'big_vlm': '9.0'})
    refused(lambda: big_vlm.load(broken), 'written by big_vlm 9.0.*upgrade')
    edit(broken, format=bundle.folder.FORMAT)
    weights = max((p for p in (broken / 'weights').rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    refused(lambda: big_vlm.load(broken), f'{weights.name} has {len(whole) - 10} bytes, {len(whole)} were written')
    weights.unlink()
    refused(lambda: big_vlm.load(broken), f'{weights.name} is missing')
    weights.write_bytes(whole)
    assert big_vlm.load(broken).contract
    edit(broken, contract={})
    refused(lambda: big_vlm.load(broken), 'bundle.json')


def test_another_tokenizer_is_refused(broken, decoder):
    other = Tokenizer.train(['something else', 'entirely different words'] * 4, 290, str(broken / 'tokenizer.model'))
    description = json.loads((broken / 'bundle.json').read_text())
    files = description['files'] | {'tokenizer.model': (broken / 'tokenizer.model').stat().st_size}
    edit(broken, files=files)
    refused(lambda: big_vlm.load(broken), 'not the tokenizer that the weights were trained with')
    refused(
        lambda: bundle.save(broken, decoder.params, decoder.stage, decoder.contract, other),
        'the tokenizer is not the one that the contract names',
    )


def test_saving_replaces_a_bundle_and_nothing_else(broken, decoder, tmp_path):
    parts = (decoder.stage, decoder.contract, decoder.tokenizer)
    bundle.save(broken, jax.tree.map(np.zeros_like, decoder.params), *parts)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(big_vlm.load(broken).params))
    (tmp_path / 'thesis').mkdir()
    (tmp_path / 'thesis' / 'chapter').write_text('1')
    refused(lambda: bundle.save(tmp_path / 'thesis', decoder.params, *parts), 'thesis exists and is not a bundle')
    assert (tmp_path / 'thesis' / 'chapter').read_text() == '1'


def test_a_failed_save_leaves_the_old_bundle(broken, decoder, monkeypatch):
    before = sorted(p.name for p in broken.iterdir())

    def fail(*args):
        raise OSError('disk full')

    monkeypatch.setattr(bundle.folder.weights, 'save_weights', fail)
    with pytest.raises(UserError, match='disk full'):
        bundle.save(broken, decoder.params, decoder.stage, decoder.contract, decoder.tokenizer)
    assert sorted(p.name for p in broken.iterdir()) == before
    assert big_vlm.load(broken).scores
