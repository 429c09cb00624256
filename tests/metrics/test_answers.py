"""Judges of single answers, by hand: edit distances, benchmarks' accuracies, yes and no, intervals."""

import functools

import numpy as np
import pytest

from big_vlm.metrics import bootstrap, boxes, captions, detection, edit_distance, ptb, text, vqa, yes_no


def test_edit_distance():
    assert edit_distance.distance('kitten', 'sitting') == 3
    assert [edit_distance.distance(a, b) for a, b in (('', ''), ('', 'ab'), ('ab', ''), ('ab', 'ba'))] == [0, 2, 2, 2]
    assert edit_distance.distance('a red dog'.split(), 'a dog'.split()) == 1


def test_edit_distance_against_the_recursion():
    @functools.cache
    def plain(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(plain(a[1:], b) + 1, plain(a, b[1:]) + 1, plain(a[1:], b[1:]) + (a[0] != b[0]))

    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = (''.join(rng.choice(list('abc'), rng.integers(0, 8))) for _ in range(2))
        assert edit_distance.distance(a, b) == plain(a, b)


def test_anls():
    assert edit_distance.anls(' The  Hague', ['the hague', 'den haag']) == 1.0
    assert edit_distance.anls('1998', ['1999']) == 0.75
    assert edit_distance.anls('19', ['1999']) == 0.0  # at the threshold
    assert edit_distance.anls('197', ['1999', '']) == pytest.approx(0.0)
    assert edit_distance.anls('', ['']) == 1.0


def test_error_rates_take_the_nearest_truth_and_sum():
    assert edit_distance.word_errors('a red dog', ['the dog', 'a red cat']) == (1, 3)
    assert edit_distance.character_errors('abc', ['abd', 'xyz']) == (1, 3)
    assert edit_distance.error_rate([(1, 3), (0, 1)]) == 0.25
    assert edit_distance.error_rate([(0, 0)]) == 0.0 and edit_distance.error_rate([(2, 0)]) == 2.0


@pytest.mark.parametrize(
    ('answer', 'normal'),
    [
        ('The dont-know, Two.', "don't know 2"),
        ('An apple', 'apple'),
        ('1,000 a-b', '1000 ab'),  # a digit,digit glues everything
        ('3.5 m.', '3.5 m'),
        ("hadnt've", "hadn't've"),
        ('None', '0'),
    ],
)
def test_vqa_normalisation(answer, normal):
    assert vqa.normalise_vqa(answer) == normal


def test_vqa_accuracy_leaves_each_person_out():
    assert vqa.vqa_accuracy('red', ['red'] * 3 + ['blue'] * 7) == pytest.approx((7 * 1 + 3 * 2 / 3) / 10)
    assert vqa.vqa_accuracy('Red!', ['red'] * 10) == 0.0  # all agree: compared as they stand
    assert vqa.vqa_accuracy('Red!', ['red'] * 9 + ['blue']) == 1.0
    assert vqa.direct_answer('Red ', ['red', 'red', 'blue']) == pytest.approx(2 / 3)


def test_relaxed_accuracy():
    right = [('105', '100'), ('96%', '1'), ('5%', '0.05'), ('Red', 'red'), ('0', '0'), ('-95', '-100')]
    wrong = [('106', '100'), ('0.01', '0'), ('100', 'hundred'), ('nan', '3'), ('red', 'blue')]
    assert [vqa.relaxed_accuracy(a, [b]) for a, b in right] == [1.0] * 6
    assert [vqa.relaxed_accuracy(a, [b]) for a, b in wrong] == [0.0] * 5


def test_science_qa():
    right = (
        'The answer is B.',
        'the answer is (B)',
        'b',
        '(B)',
        'the answer is b',
        'The answer is B because it is blue.',
    )
    wrong = ('The answer is A.', 'banana', '', 'The answer is B. The answer is C.', 'The answer is Bananas.')
    for answers, score in ((right, 1.0), (wrong, 0.0)):
        assert [vqa.science_qa(a, ['The answer is B.']) for a in answers] == [score] * len(answers)
    assert vqa.science_qa('the answer is a.', ['The answer is A.']) == 1.0
    assert vqa.science_qa('The answer is a magnet.', ['The answer is A.']) == 0.0  # an article


def test_yes_and_no():
    no = ('No, there is not', 'There is not one. Yes', 'no', 'Yes, no')
    yes = ('yes', 'a dog', 'Yes. No', 'NO', 'Not at all', 'no\nsuch thing')  # whatever POPE's own code does not know
    assert [yes_no.says_yes(answer) for answer in (*no, *yes)] == [False] * len(no) + [True] * len(yes)
    scores = yes_no.scores(yes_no.counts(['yes', 'yes', 'no', 'yes'], ['yes', 'no', 'no', 'yes']))
    third = pytest.approx(2 / 3)
    assert scores == {'accuracy': 0.75, 'precision': third, 'recall': 1.0, 'f1': pytest.approx(0.8), 'yes_ratio': 0.75}
    assert set(yes_no.scores(yes_no.counts([], [])).values()) == {0.0}


def test_commonest_answers():
    truths, kinds = [['1'], ['1', 'one'], ['2'], ['Red.'], ['red', 'blue']], ['n', 'n', 'n', 'c', 'c']
    assert text.commonest_answers(truths, kinds) == ['1', '1', '1', 'red', 'red']
    assert text.commonest_answers(truths) == ['1'] * 5  # twice, as red, and first
    with pytest.raises(ValueError, match='2 kinds'):
        text.commonest_answers(truths, kinds[:2])


def test_box_accuracy():
    one, half = [[0, 0, 2, 2]], [[0, 0, 2, 1]]
    assert boxes.first_box_right(half, one) == 1.0  # 0.5 is enough
    assert boxes.first_box_right([*half, *one], one, least=0.6) == 0.0
    assert boxes.first_box_right(np.empty((0, 4)), one) == 0.0


def test_map_by_hand():
    true = detection.Truths(np.array([[0, 0, 10, 10], [20, 20, 30, 30]]), ['a', 'a'])
    right = detection.Detections(true.boxes[::-1], ['a', 'a'], [0.9, 0.8])
    assert detection.summarise([detection.match(right, true)])['ap'] == pytest.approx(1.0)
    one = detection.Detections(true.boxes[:1], ['a'], [0.9])
    scores = detection.summarise([detection.match(one, true)])
    assert (scores['ap'], scores['ar@100']) == (pytest.approx(51 / 101), 0.5)  # recalls 0 … 0.5 are reached
    assert (scores['ap_small'], scores['ap_large']) == (pytest.approx(51 / 101), -1.0)
    nothing = detection.Detections(np.empty((0, 4)), [], [])
    assert detection.summarise([detection.match(nothing, true)])['ap'] == 0.0
    other = detection.Detections(true.boxes, ['b', 'b'], [0.9, 0.8])
    assert detection.summarise([detection.match(other, true)])['ap'] == 0.0


def test_captions_by_hand():
    a, b = ptb.tokenize('a red dog runs'), ptb.tokenize('two cats sleep here')
    np.testing.assert_allclose(captions.cider_d([a, b], [[a], [b]]), [10.0, 10.0])
    np.testing.assert_allclose(captions.cider_d([b, a], [[a], [b]]), [0.0, 0.0])
    assert captions.cider_d([a], [[a]]).tolist() == [0.0]  # of a single image nothing is rare
    assert captions.bleu(captions.bleu_counts([a], [[a]]), 4) == pytest.approx(1.0)
    short = captions.bleu_counts([a[:2]], [[a]])
    assert captions.bleu(short, 1) == pytest.approx(np.exp(1 - 4 / 2))
    assert captions.rouge_l([], [a]) == 0.0


def test_interval():
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    low, high = bootstrap.interval(400, lambda rows: values[rows].mean())
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.05)
    assert (low, high) == bootstrap.interval(400, lambda rows: values[rows].mean())
    assert (low, high) != bootstrap.interval(400, lambda rows: values[rows].mean(), seed=1)
    assert bootstrap.interval(1, lambda rows: 3.0) == (3.0, 3.0)
    with pytest.raises(ValueError, match='at least one'):
        bootstrap.interval(0, lambda rows: 0.0)
