"""Confidence fitted on one split and judged on another: a model that doubts too little, and one that guesses."""

import json

import numpy as np
import pytest

from big_vlm.config import UserError
from big_vlm.evaluators import calibration, perplexity
from big_vlm.metrics import calibration as metric

CHOICES = ['red', 'green', 'blue']


def batches(n, seed):
    """Records of which the true answer is drawn from softmax(logits); a padded row in the second batch."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, 3)) * 2
    p = metric.probabilities(logits)
    truth = (p.cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)
    records = [{'suffix': CHOICES[t], 'logits': row, 'kind': 'color'} for t, row in zip(truth, logits, strict=True)]
    half = n // 2
    yield {'_mask': np.ones(half, bool)}, records[:half]
    yield {'_mask': np.arange(n - half + 1) < n - half}, records[half:]


def overconfident(batch, records):
    """Its scores are four times the truth's, and shifted, as log-probabilities are."""
    return [calibration.of_choices(4 * r['logits'] - 7, CHOICES, r['suffix']) for r in records]


def test_the_temperature_is_fitted_on_one_split_and_judged_on_the_other(tmp_path, capsys):
    path = tmp_path / 'stage' / 'calibration_color.json'
    scores = calibration.run(overconfident, batches(2000, 0), batches(1500, 1), path=path, title='color')
    written = json.loads(path.read_text())
    assert written['temperature'] == pytest.approx(4, rel=0.1)
    assert scores['ece_before']['score'] > 0.15 and scores['ece_after']['score'] < 0.03
    assert all(scores[name]['lower_is_better'] for name in ('ece_before', 'ece_after'))
    accuracy = scores['accuracy']['score']
    records = [record for _, some in batches(1500, 1) for record in some]
    right = [CHOICES[record['logits'].argmax()] == record['suffix'] for record in records]
    assert accuracy == pytest.approx(np.mean(right)) and scores['accuracy']['n'] == 1500
    assert 0.3 < scores['accuracy']['chance'] < 0.4
    assert scores['ece_after']['chance'] == pytest.approx(1 - accuracy)
    p = metric.probabilities(np.array([r['logits'] for r in records]) * 4, written['temperature'])
    curve = metric.selective_accuracy(p.max(axis=1), right)
    assert scores['selective_accuracy'] == {
        'score': pytest.approx(curve.mean()),
        'chance': pytest.approx(accuracy),
        'n': 1500,
    }
    assert scores['selective_accuracy']['score'] > accuracy + 0.1
    assert written['selective'][-1] == [1, pytest.approx(accuracy)] and len(written['selective']) == 100
    assert sum(count for _, _, count in written['after']) == 1500
    assert 'temperature' in capsys.readouterr().out


def test_what_a_report_draws_may_be_lost(tmp_path, capsys):
    (tmp_path / 'file').touch()
    some = dict(path=tmp_path / 'file' / 'below', title='x')
    with pytest.raises(UserError, match='below: not written'):
        calibration.run(overconfident, batches(50, 0), batches(50, 1), **some)
    assert calibration.run(overconfident, batches(50, 0), batches(50, 1), must=False, **some)['accuracy']['n'] == 50
    assert 'below: not written' in capsys.readouterr().err


def test_an_answer_out_of_all_texts():
    right, wrong = calibration.of_answer(np.log(0.8), True), calibration.of_answer(np.log(0.8), False)
    np.testing.assert_allclose(metric.probabilities([right.logits]), [[0.8, 0.2]])
    assert (right.said, right.true, wrong.said, wrong.true) == (0, 0, 0, 1)
    assert np.isfinite(calibration.of_answer(0.0, True).logits).all()


def test_choices_compare_as_exact_match_does():
    answer = calibration.of_choices([-3, -1], ['Red', 'Blue.'], 'blue')
    assert (answer.said, answer.true) == (1, 1)
    with pytest.raises(UserError, match="'green' is none of the choices"):
        calibration.of_choices([-3, -1], ['Red', 'Blue.'], 'green')


def test_nothing_to_judge():
    with pytest.raises(UserError, match='nothing to evaluate'):
        calibration.run(overconfident, [], batches(10, 0))


def test_perplexity_is_over_all_tokens():
    """Two answers of 1 and 3 tokens: the mean is over four tokens, and chance is what their frequencies give."""
    records = [{'suffix': 'a', 'held_out': True}, {'suffix': 'b c', 'held_out': False}]
    told = [([5], np.log([0.5])), ([5, 6, 7], np.log([0.25, 1.0, 0.5]))]
    scores = perplexity.run(lambda batch, some: told, [({}, records)], slices=['held_out'])
    assert scores['perplexity'] == {
        'score': pytest.approx(2.0),
        'chance': pytest.approx(2**1.5),  # half of them one token, a quarter each the others
        'n': 2,
        'lower_is_better': True,
    }
    assert scores['perplexity/held_out=True']['score'] == pytest.approx(2)
    assert scores['perplexity/held_out=True']['chance'] == pytest.approx(1)
    with pytest.raises(UserError, match='nothing to evaluate'):
        perplexity.run(lambda batch, some: [], [])
