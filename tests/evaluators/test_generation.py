"""Answers scored by kind and slice, beside what a guesser that never looks would get."""

import json

import numpy as np
import pytest

from big_vlm.config import UserError
from big_vlm.evaluators import answer_metrics, comparison, generation

RECORDS = [
    # prefix, suffix, kind, held_out
    ('how many?', '1', 'count', False),
    ('how many?', '1', 'count', False),
    ('how many?', '2', 'count', True),
    ('what colour?', 'red', 'color', True),
    ('what colour?', 'blue', 'color', False),
]
ANSWERS = ['1', '2', ' 2.', 'Red', 'green']


def batches():
    records = [dict(zip(('prefix', 'suffix', 'kind', 'held_out'), r, strict=True)) for r in RECORDS]
    ids = np.arange(10, dtype=np.int32).reshape(5, 2)
    yield {'id': ids[:3], 'row': [0, 1, 2], '_mask': np.ones(3, bool)}, records[:3]
    yield {'id': np.pad(ids[3:], ((0, 1), (0, 0))), 'row': [3, 4, 0], '_mask': np.array([1, 1, 0], bool)}, records[3:]


def generate(batch):
    return [ANSWERS[row] for row in batch['row']]


def test_scores_by_kind_and_slice(capsys):
    scores = generation.run(generate, batches(), ['exact_match'], slices=['held_out'])
    third = pytest.approx(2 / 3)
    assert all(entry.pop('low') <= entry['score'] <= entry.pop('high') for entry in scores.values())
    assert scores == {
        'exact_match': {'score': 0.6, 'chance': 0.6, 'n': 5},  # Always '1', or 'red': 3 of 5.
        'exact_match/kind=color': {'score': 0.5, 'chance': 0.5, 'n': 2},
        'exact_match/kind=count': {'score': third, 'chance': third, 'n': 3},
        'exact_match/held_out=False': {'score': pytest.approx(1 / 3), 'chance': 1.0, 'n': 3},
        'exact_match/held_out=True': {'score': 1.0, 'chance': 1.0, 'n': 2},
    }
    assert 'exact_match/kind=color      0.5000 [0.0000, 1.0000]  (chance 0.5000, n=2)' in capsys.readouterr().out


def test_predictions_file(tmp_path, capsys):
    path = tmp_path / 'stage' / 'predictions_qa.jsonl'
    generation.run(generate, batches(), slices=['held_out'], predictions_path=path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 5 and lines[2] == {
        'id': [4, 5],
        'prompt': 'how many?',
        'prediction': ' 2.',
        'truth': '2',
        'score': {'exact_match': 1.0},
        'kind': 'count',
        'held_out': True,
    }
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    nowhere = path / 'below'
    with pytest.raises(UserError, match='below: not written'):
        generation.run(generate, batches(), predictions_path=nowhere)
    scores = generation.run(generate, batches(), predictions_path=nowhere, must=False)
    assert scores['exact_match']['n'] == 5 and 'below: not written' in capsys.readouterr().err


def test_a_metric_of_ones_own_and_records_with_an_id():
    length = answer_metrics.Metric(
        'length',
        lambda predictions, truths: np.array([[len(p), len(t[0])] for p, t in zip(predictions, truths, strict=True)]),
        lambda lengths: np.divide(*np.sum(lengths, axis=0)),
        lambda truths, kinds: [['a'] * len(truths)],
    )
    records = [{'prefix': 'p', 'suffix': 'abcd', 'id': 'scene-7'}]
    found = generation.predict(lambda batch: ['ab'], [({}, records)], [length])
    assert found == [{'id': 'scene-7', 'prompt': 'p', 'prediction': 'ab', 'truth': 'abcd', 'score': {'length': 0.5}}]
    assert generation.summarise(found, [length]) == {
        'length': {'score': 0.5, 'low': 0.5, 'high': 0.5, 'chance': 0.25, 'n': 1}
    }


def test_boxes_in_answers():
    whole, left = '<loc0000><loc0000><loc1023><loc1023> three', '<loc0000><loc0000><loc1023><loc0512> three'
    truths = [whole, left, whole]
    records = [{'prefix': 'detect three', 'suffix': truth} for truth in truths]
    answers = [left, left, 'no box']
    scores = generation.run(lambda batch: answers, [({'id': np.zeros((3, 2), int)}, records)], ['box_iou'])
    half = 512 / 1023
    assert scores['box_iou']['score'] == pytest.approx((half + 1) / 3, abs=1e-3)
    assert scores['box_iou']['n'] == 3 and half / 2 < scores['box_iou']['chance'] < 1


def test_several_true_answers(tmp_path):
    answers = ['red', 'red', 'crimson', *['scarlet'] * 7]
    records = [
        {'prefix': 'colour?', 'truths': {'text': np.array(answers, object)}},
        {'prefix': 'how many?', 'truths': {'text': ['2'] * 10}},
    ]
    names = ['exact_match', 'vqa_accuracy', 'cider', 'bleu1']
    batch = {'id': np.zeros((2, 2), int)}
    path = tmp_path / 'p.jsonl'
    scores = generation.run(
        lambda batch: ['red', '3'], [(batch, records)], names, truth_field='truths/text', predictions_path=path
    )
    assert scores['exact_match']['score'] == 0.5
    assert scores['vqa_accuracy']['score'] == pytest.approx((8 * 2 / 3 + 2 * 1 / 3) / 10 / 2)
    assert scores['vqa_accuracy']['chance'] == pytest.approx(0.5)  # always '2'
    assert scores['bleu1']['score'] == pytest.approx(0.5)
    first = generation.read_predictions(path)[0]
    assert first['truth'] == answers and first['score']['exact_match'] == 1.0
    with pytest.raises(ValueError, match="no true answer for 'colour"):
        generation.predict(
            lambda batch: ['a'], [(batch, [{'prefix': 'colour?', 'truths': []}])], [], truth_field='truths'
        )
    with pytest.raises(ValueError, match="no 'words' in it for truths/words"):
        generation.predict(lambda batch: ['a'], [(batch, records)], [], truth_field='truths/words')


def test_truths_are_texts():
    assert generation.truth_of({'a': 3}, 'a') == '3' and generation.truth_of({'a': b'yes'}, 'a') == 'yes'
    assert generation.truth_of({'a': {'text': [b'yes', 'no']}}, 'a/text') == ['yes', 'no']
    for value, wrong in (
        ({'id': [1], 'text': ['a dog']}, 'a holds fields: write a/id or a/text'),
        ([{'text': 'a dog'}], 'an item of a is a list or holds fields'),
        ([['a dog']], 'an item of a is a list or holds fields'),
        (['a dog', None], 'a has null among its items'),
    ):
        with pytest.raises(ValueError, match=wrong):
            generation.truth_of({'a': value}, 'a')


# mask_iou: test_mask_scores; meteor, whose program is another's: metrics/test_references
@pytest.mark.parametrize('name', [name for name in answer_metrics.METRICS if name not in ('mask_iou', 'meteor')])
def test_every_metric_knows_right_from_wrong(name):
    """On answers of its own form: the truth scores best, another question's answer scores chance's way."""
    forms = {
        'box': ['<loc0000><loc0000><loc0512><loc0512> dog', '<loc0600><loc0600><loc1023><loc1023> cat'],
        'map': ['<loc0000><loc0000><loc0512><loc0512> dog', '<loc0600><loc0600><loc1023><loc1023> cat'],
        'yes': ['yes', 'no'],
        'sci': ['The answer is A.', 'The answer is B.'],
        'vqa': ['red', 'blue'],
    }
    truths = forms.get(name[:3], ['a red dog runs on grass', 'two cats sleep in here'])
    several = 10 if name in ('vqa_accuracy', 'direct_answer') else 1
    records = [{'prefix': 'p', 'truths': [truth] * several} for truth in truths]

    def score(answers):
        batch = {'id': np.zeros((2, 2), int)}
        made = generation.predict(lambda batch: answers, [(batch, records)], [name], truth_field='truths')
        return generation.summarise(made, [name])[name]

    best, worst = score(truths), score(truths[::-1])
    if name == 'yes_no_yes_ratio':
        assert best['score'] == worst['score'] == 0.5 and 'chance' not in best
        return
    if name.endswith('error_rate'):
        assert best['score'] == 0.0 and worst['score'] > 0.5 and best['chance'] == worst['score']
        return
    assert best['score'] == pytest.approx(10.0 if name == 'cider' else 1.0) and worst['score'] < 0.2
    assert worst['score'] - 1e-9 <= best['chance'] <= 0.5 + 1e-9 or name in ('yes_no_f1', 'yes_no_recall')
    assert ('low' in best) == (name not in ('map', 'map50'))


def test_of_an_error_less_is_better():
    records = [{'prefix': 'p', 'suffix': truth, 'id': truth, 'even': i % 2} for i, truth in enumerate('abc')]
    right, wrong = (
        generation.predict(lambda batch, said=said: said, [({}, records)], ['character_error_rate'], slices=['even'])
        for said in (['a', 'b', 'x'], ['a', 'y', 'x'])
    )
    scores = generation.summarise(right, ['character_error_rate', 'exact_match'], ['even'])
    assert {key for key, entry in scores.items() if entry.get('lower_is_better')} == {
        'character_error_rate', 'character_error_rate/even=0', 'character_error_rate/even=1'
    }  # fmt: skip
    summary, _ = comparison.compare(right, wrong)
    entry = summary['character_error_rate']
    assert (entry['better'], entry['worse']) == (1, 0) and entry['difference'] == pytest.approx(-1 / 3)


def test_a_run_is_as_good_as_itself_where_one_picture_has_several_lines():
    run = [
        {'id': 7, 'prompt': 'caption en', 'prediction': truth[:5], 'truth': truth, 'score': {'exact_match': score}}
        for truth, score in (('a dog', 1.0), ('a cat runs', 0.0), ('a cat', 1.0))
    ]
    summary, differing = comparison.compare(run, run)
    assert summary['exact_match'] == {'better': 0, 'worse': 0, 'difference': 0, 'low': 0, 'high': 0, 'n': 3}
    assert not differing
    assert comparison.compare(run, run[:2])[0]['exact_match']['n'] == 2


def test_a_guesser_has_the_chance_of_every_slice():
    """CIDEr weighs words by all examples, for the guesser as for the model."""
    truths = ['a red dog runs', 'a red cat sits', 'two dogs sleep', 'two red cats run', 'a dog sits']
    [guesses] = answer_metrics.METRICS['cider'].guess([[truth] for truth in truths], None)
    records = [{'prefix': 'p', 'suffix': truth, 'id': i, 'part': i // 2} for i, truth in enumerate(truths)]
    scores = generation.run(lambda batch: guesses, [({}, records)], ['cider'], slices=['part'])
    assert len(scores) == 4 and any(entry['score'] > 0 for key, entry in scores.items() if '=' in key)
    assert all(entry['chance'] == pytest.approx(entry['score']) for entry in scores.values())


def test_errors():
    with pytest.raises(UserError, match="did you mean 'exact_match'"):
        generation.run(generate, batches(), ['exact_mach'])
    with pytest.raises(UserError, match="needs field 'answer'"):
        generation.run(generate, batches(), truth_field='answer')
    with pytest.raises(UserError, match='nothing to evaluate'):
        generation.run(generate, [])
