"""What `Bundle.generate` offers beyond one greedy batch: slots, samplers, stop strings, beams, and failing requests."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image
from small_bundle import GENERATIVE, make, pictures, train_tokenizer

from big_vlm import bundle
from big_vlm.bundle import streaming
from big_vlm.config import UserError
from big_vlm.data import images as picture_files
from big_vlm.decoding.generate import make_generate
from big_vlm.sharding import mesh as meshes

PROMPTS = ['caption en', 'detect three', 'red', 'x', 'blue seven in the top', 'one', 'left', 'the', 'three three']


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp('t'))


@pytest.fixture(scope='module')
def decoder(tokenizer):
    return make(GENERATIVE, tokenizer)


@pytest.fixture(scope='module')
def nine(decoder):
    """(images, prompts, their answers from one batch)."""
    images = pictures(9)
    return images, PROMPTS, decoder.generate(images, PROMPTS, max_new_tokens=8)


def same(one, other):
    assert [a.ids for a in one] == [a.ids for a in other]
    for a, b in zip(one, other, strict=True):
        assert a.text == b.text and a.error == b.error
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)


def score(answer, length_penalty=1.0):
    return sum(answer.log_probs) / len(answer.ids) ** length_penalty


def test_more_requests_than_slots_have_the_same_answers_in_order(decoder, nine):
    images, prompts, whole = nine
    seen = []
    few = decoder.generate(images, prompts, max_new_tokens=8, batch_size=4, progress=lambda *n: seen.append(n))
    same(few, whole)
    assert seen[-1] == (9, 9) and seen == sorted(seen)
    request = dict(max_new_tokens=8, temperature=1.0, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=3)
    same(decoder.generate(images, prompts, batch_size=4, **request), decoder.generate(images, prompts, **request))


@pytest.fixture(scope='module')
def chatty(decoder, nine):
    """(the same decoder whose answers end at one id more, what remains of the nine answers)."""
    _, _, whole = nine
    # One that a row says, but not at once; the last row to come to such a one.
    end = max((answer.ids.index(i), i) for answer in whole for i in answer.ids[:-1])[1]
    contract = dataclasses.replace(decoder.contract, end_ids=(end,))
    kept = [answer.ids[: [*answer.ids, end].index(end) + 1] for answer in whole]
    assert any(1 < len(ids) < len(answer.ids) for ids, answer in zip(kept, whole, strict=True))
    return bundle.Bundle(decoder.stage, contract, decoder.tokenizer, decoder.params, decoder.mesh), kept


def test_an_answer_ends_at_a_further_id_and_does_not_spell_it(nine, chatty):
    (images, prompts, _), (model, kept) = nine, chatty
    answers = model.generate(images, prompts, max_new_tokens=8)
    assert [answer.ids for answer in answers] == kept
    ended = [i for i, ids in enumerate(kept) if ids[-1] in model.contract.end_ids]
    assert ended and all(answers[i].text == model.tokenizer.decode(kept[i][:-1]) for i in ended)


@pytest.mark.slow
def test_slots_and_streams_end_at_a_further_id(nine, chatty):
    (images, prompts, _), (model, kept) = nine, chatty
    answers = model.generate(images, prompts, max_new_tokens=8, batch_size=4)
    assert [answer.ids for answer in answers] == kept
    row = next(i for i, ids in enumerate(kept) if ids[-1] in model.contract.end_ids)
    assert ''.join(model.stream(images[row], prompts[row], max_new_tokens=8)) == answers[row].text


def test_slots_on_a_mesh(decoder, nine):
    images, prompts, whole = nine
    mesh = meshes.make_mesh(data=2, fsdp=2, model=2)
    params = jax.device_put(decoder.params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    spread = bundle.Bundle(decoder.stage, decoder.contract, decoder.tokenizer, params, mesh)
    same(spread.generate(images, prompts, max_new_tokens=8, batch_size=4), whole)


@pytest.mark.slow
@pytest.mark.parametrize('alone', [False, True])
def test_an_image_is_encoded_once_for_its_prompts(tokenizer, alone):
    """Against prompts that are prefilled with their image; in slots, and in one batch of three images."""
    stage = GENERATIVE | {'contract': GENERATIVE['contract'] | {'image_alone': alone}}
    model, images = make(stage, tokenizer), pictures(3)
    which = [0, 0, 0, 1, 1, 1, 1, 2, 2]
    rows = [model._row(model._ids(prompt, None, '')) for prompt in PROMPTS]
    batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    batch['image'] = np.stack([picture_files.prepare(images[i], model.contract)[None] for i in which])
    batch['image_mask'] = np.ones((9, 1), bool)
    predict = model.task.predict
    expected = make_generate(predict, max_new_tokens=8, eos_id=model.contract.eos_id)(
        jax.jit(predict['decode_params'])(model.params), batch
    )
    rows_of = []

    def counted(weights, batch):
        rows_of.append(int(np.asarray(batch['_mask']).sum()))
        return jax.jit(predict['encode'])(weights, batch)

    model._once('encode', lambda: counted)
    for batch_size, encoded in ((2, [1, 1, 1]), (16, [3])):
        rows_of.clear()
        got = model.generate([images[i] for i in which], PROMPTS, max_new_tokens=8, batch_size=batch_size)
        assert rows_of == encoded
        for row, answer in enumerate(got):
            assert answer.ids == expected.ids[row, : expected.length[row]].tolist()
            np.testing.assert_allclose(answer.log_probs, expected.log_probs[row, : expected.length[row]], atol=1e-5)


def compilations(tokenizer, count, longest, slots):
    """How many programs of the model `count` prompts of 1 to `longest` tokens compile."""
    model = make(GENERATIVE | {'contract': GENERATIVE['contract'] | {'text_length': longest + 12}}, tokenizer)
    traced = []

    def counting(name, function):
        def counted(*arguments):
            traced.append(name)
            return function(*arguments)

        return counted

    predict = {name: counting(name, function) for name, function in model.task.predict.items()}
    model.task = type('Task', (), {'predict': predict})
    rng = np.random.default_rng(0)
    prompts = ['x' * int(n) for n in rng.integers(1, longest + 1, count)]
    assert max(len(tokenizer.encode(prompt)) for prompt in prompts) > longest * 0.9
    list(model.generate_each(pictures(1), prompts, max_new_tokens=2, batch_size=slots))
    return traced


@pytest.mark.slow
def test_few_programs_serve_all_lengths(tokenizer):
    traced = compilations(tokenizer, 40, 150, slots=4)
    assert sorted(traced) == ['decode_params', 'decode_step', 'encode', *['prefill'] * 4]  # 32, 64, 128, 162


@pytest.mark.slow
def test_a_thousand_prompts_of_up_to_500_tokens_compile_at_most_eight_programs(tokenizer):
    assert len(compilations(tokenizer, 1000, 500, slots=16)) <= 8


def test_a_stop_string_ends_an_answer_before_it(decoder, nine):
    images, prompts, whole = nine
    texts = [answer.text for answer in whole]
    stop = next(t[2:4] for t in texts if len(t) > 6 and '\ufffd' not in t)
    assert any(stop in text for text in texts) and not all(stop in text for text in texts)
    got = decoder.generate(images, prompts, max_new_tokens=8, stop=[stop, 'never to be said'])
    for one, all_of_it in zip(got, whole, strict=True):
        assert one.text == all_of_it.text.split(stop)[0]
        assert one.ids == all_of_it.ids[: len(one.ids)] and len(one.ids) == len(one.log_probs)
        if stop in all_of_it.text:  # the last token completed it
            assert stop in decoder.tokenizer.decode(one.ids) and stop not in decoder.tokenizer.decode(one.ids[:-1])
        else:
            assert one.ids == all_of_it.ids
    same(decoder.generate(images, prompts, max_new_tokens=8, stop='never to be said'), whole)


def test_a_stream_is_the_answer_in_pieces(decoder, nine):
    images, prompts, whole = nine
    for image, prompt, answer in list(zip(images, prompts, whole, strict=True))[:3]:
        pieces = list(decoder.stream(image, prompt, max_new_tokens=8))
        assert ''.join(pieces) == answer.text and all(pieces) and len(pieces) > 1
        stop = answer.text[2:4]
        assert ''.join(decoder.stream(image, prompt, max_new_tokens=8, stop=stop)) == answer.text.split(stop)[0]
    with pytest.raises(UserError, match='prompt is a list: must be one text'):
        decoder.stream(images[0], prompts[:1])
    for name, value in (('beams', 2), ('prompt_lookup', 2), ('errors', 'return')):
        with pytest.raises(UserError, match=f'{name} {value}: a stream'):
            decoder.stream(images[0], prompts[0], **{name: value})
    with pytest.raises(UserError, match='none.png'):
        list(decoder.stream('none.png', 'x', max_new_tokens=8))


def test_pieces_are_whole_characters_and_stop_in_time(tokenizer):
    """Of texts spelt in bytes, and of tokens drawn at random, most of them bytes that are no character."""
    rng = np.random.default_rng(0)
    told = list(streaming.pieces(tokenizer.encode('a Bär, 5 €: 😀'), tokenizer.decode))
    assert ''.join(told) == 'a Bär, 5 €: 😀' and '😀' in told and all('\ufffd' not in piece for piece in told)
    for ids in rng.integers(3, tokenizer.vocab_size, (200, 12)).tolist() + rng.integers(3, 300, (200, 12)).tolist():
        text = tokenizer.decode(ids)
        assert ''.join(streaming.pieces(ids, tokenizer.decode)) == text
        tokens, stop = iter(ids), [text[5:8], text[6:7] + '\0']
        assert ''.join(streaming.pieces(tokens, tokenizer.decode, stop[:1])) == text.split(stop[0])[0]
        assert stop[0] not in tokenizer.decode(ids[: len(ids) - len(list(tokens)) - 1])
        assert ''.join(streaming.pieces(ids, tokenizer.decode, stop[1:])) == text


def test_the_best_of_many_draws(decoder):
    images, prompts = pictures(3), PROMPTS[:3]
    settings = dict(max_new_tokens=6, temperature=1.5, seed=2)
    one = decoder.generate(images, prompts, **settings)
    four = decoder.generate(images, prompts, best_of=4, **settings)
    slots = decoder.generate(images, prompts, best_of=4, batch_size=2, **settings)
    same(four, slots)
    assert all(score(b) > score(a) - 1e-5 for a, b in zip(one, four, strict=True))  # the first draw is the only one's
    assert [a.ids for a in one] != [a.ids for a in four]
    likely = decoder.generate(images, prompts, best_of=4, length_penalty=0.0, **settings)
    assert all(score(b, 0) > score(a, 0) - 1e-5 for a, b in zip(four, likely, strict=True))


@pytest.mark.slow
def test_beams_find_likelier_answers_than_greedy(decoder, nine):
    images, prompts, greedy = nine
    found = decoder.generate(images, prompts, max_new_tokens=8, beams=4, length_penalty=0.0, batch_size=8)
    gains = [score(b, 0) - score(a, 0) for a, b in zip(greedy, found, strict=True)]
    assert min(gains) > -1e-4 and max(gains) > 0.05


@pytest.mark.parametrize('batch_size', [2, 16])
def test_a_request_that_fails_leaves_its_neighbours(decoder, nine, batch_size):
    images, prompts, whole = nine
    images, prompts = list(images), list(prompts)
    images[1], images[4], prompts[6] = np.zeros((3, 0, 3), np.uint8), 'none.png', ' '
    got = decoder.generate(images, prompts, max_new_tokens=8, batch_size=batch_size, errors='return')
    assert [bool(a.error) for a in got] == [i in (1, 4, 6) for i in range(9)]
    assert 'images[1]' in got[1].error and 'none.png' in got[4].error and 'prompts[6] is empty' in got[6].error
    assert all((a.text, a.ids, a.log_probs) == ('', [], []) for a in got if a.error)
    good = [i for i in range(9) if i not in (1, 4, 6)]
    same([got[i] for i in good], [whole[i] for i in good])
    rest = decoder.generate(images[4:], prompts[4:], max_new_tokens=8, batch_size=batch_size, errors='return', first=4)
    assert [answer.error for answer in rest] == [answer.error for answer in got[4:]]  # named by their places in all

    prompts[6], images[1] = 'left', pictures(9)[1]
    each, answered = decoder.generate_each(images, prompts, max_new_tokens=8, batch_size=batch_size), []
    with pytest.raises(UserError, match='none.png'):
        for answer in each:
            answered.append(answer)
    same(answered, whole[:4])


def test_an_image_of_any_width_is_answered_or_refused(decoder):
    wide = decoder.generate(np.zeros((1, 40_000, 3), np.uint8), 'x', max_new_tokens=2)
    assert len(wide[0].ids) == 2 or wide[0].ids[-1] == decoder.contract.eos_id
    for image in (np.zeros((5, 0, 3), np.uint8), Image.new('RGB', (0, 5)), Image.new('1', (40_000, 40_000))):
        with pytest.raises(UserError, match=r'images\[0\]'):
            decoder.generate(image, 'x', max_new_tokens=2)


def test_prompt_lookup_gives_the_same_answers(decoder, nine):
    """In one batch, and in slots with a stop string."""
    images, prompts, whole = nine
    same(decoder.generate(images, prompts, max_new_tokens=8, prompt_lookup=3), whole)
    stop = whole[0].text[2:4]
    request = dict(max_new_tokens=8, batch_size=4, stop=stop)
    same(decoder.generate(images, prompts, prompt_lookup=3, **request), decoder.generate(images, prompts, **request))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_a_quantised_bundle_answers_and_scores_with_the_same_weights(decoder, nine, kind):
    """Whole answers at once and token by token, for which the weights are laid out otherwise."""
    images, prompts, whole = nine
    small, words = decoder.quantised(kind), ['red', 'one blue', 'three']
    [ranking] = small.rank(images[0], prompts[0], words)
    np.testing.assert_allclose(ranking.scores, small.score(images[0], prompts[0], words), atol=1e-4)
    answers = small.generate(images, prompts, max_new_tokens=8)
    assert [answer.log_probs for answer in answers] != [answer.log_probs for answer in whole]
    table, floats = (bundle_.params['llm']['embedder']['input_embedding'] for bundle_ in (small, decoder))
    assert table.values.nbytes == floats.nbytes / 4
    with pytest.raises(UserError, match="unknown quantisation 'int5'"):
        decoder.quantised('int5')


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(top_p=0.0, temperature=1), 'top_p 0'),
        (dict(min_p=2, temperature=1), 'min_p 2'),
        (dict(top_p=0.5), 'top_p without effect at temperature 0'),
        (dict(repetition_penalty=0), 'repetition_penalty 0'),
        (dict(stop=['a', '']), 'stop: an empty string'),
        (dict(beams=0), 'beams 0'),
        (dict(beams=2, temperature=1), 'beams 2 and temperature exclude'),
        (dict(beams=2, stop='a'), 'beams 2 and stop exclude'),
        (dict(prompt_lookup=-1), 'prompt_lookup -1'),
        (dict(prompt_lookup=4, temperature=1), 'prompt_lookup 4 and temperature exclude'),
        (dict(prompt_lookup=4, beams=2), 'prompt_lookup 4 and beams exclude'),
        (dict(prompt_lookup=4, repetition_penalty=1.1), 'prompt_lookup 4 and repetition_penalty exclude'),
        (dict(prompt_lookup=4, choices=['a']), 'prompt_lookup 4 and choices exclude'),
        (dict(prompt_lookup=4, grammar='boxes'), 'prompt_lookup 4 and grammar exclude'),
        (dict(best_of=3), 'best_of 3 at temperature 0'),
        (dict(length_penalty=2.0), 'length_penalty 2.0 without effect'),
        (dict(errors='ignore'), "errors 'ignore'"),
        (dict(top_pp=0.5), "unknown setting 'top_pp'.*top_p"),
    ],
)
def test_settings_that_cannot_be(decoder, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        decoder.generate(pictures(1), 'x', **settings)
    assert '\n' not in str(caught.value)
