"""Scores of masks: answers read by their codes, put into the picture, compared with run lengths."""

import mask_weights
import numpy as np
import pytest

from big_vlm.config import UserError
from big_vlm.data import mask_codes, run_lengths
from big_vlm.data.coordinates import box_to_text, mask_to_text
from big_vlm.evaluators import answer_metrics, generation, reconstruction
from big_vlm.metrics import masks

BOX = tuple(step / 1023 for step in (102, 205, 921, 818))
RNG = np.random.default_rng(0)


@pytest.fixture(scope='module')
def codes(tmp_path_factory):
    return mask_weights.save(tmp_path_factory.mktemp('codes') / 'codes.npz')


def truth(mask, box=BOX):
    return f'{box_to_text(*box)} {run_lengths.to_text(mask)}'


def test_mask_iou(codes):
    """Against the steps of the published evaluator, written out; what is no mask gets 0."""
    said, shape = RNG.integers(0, 128, 16), (50, 70)
    true = RNG.random(shape) < 0.5
    place = box_to_text(*BOX)
    pasted = masks.paste(mask_codes.load(codes).decode(said[None])[0], BOX, shape)
    expected = (pasted & true).sum() / (pasted | true).sum()
    answers = [
        f'{place}{mask_to_text(said)} boat ; {place}{mask_to_text(said)}',
        f'{place}{mask_to_text(said[:15])} boat',
        place,
        'boat',
        '',
    ]
    metric = answer_metrics.metric('mask_iou', codes=codes)
    found = metric.measure(answers, [[truth(true)]] * 5)
    assert 0.1 < expected < 0.9
    np.testing.assert_allclose(found, [expected, 0, 0, 0, 0], rtol=1e-12)
    # A true object thinner than a location: both its edges have one token.
    thin = truth(true, (0.5, 0.2, 0.5004, 0.8))
    assert thin[:9] == thin[18:27]
    np.testing.assert_allclose(metric.measure(answers[:1], [[thin]]), [expected], rtol=1e-12)
    several = [truth(~pasted), truth(pasted)]
    np.testing.assert_allclose(metric.measure(answers[:1], [several]), [1.0])
    # Who never looks says what is true of another picture.
    other = np.zeros((10, 14), bool)
    other[:, :7] = True
    half = np.zeros(shape, bool)
    half[:, :35] = True
    assert metric.chance([[truth(half)], [truth(other)]], [None, None]) == 1.0


def test_through_the_evaluator(codes, tmp_path):
    said = RNG.integers(0, 128, (3, 16))
    pasted = [masks.paste(mask_codes.load(codes).decode(s[None])[0], BOX, (40, 40)) for s in said]
    records = [{'prefix': 'segment boat', 'true_masks': [truth(mask)], 'id': i} for i, mask in enumerate(pasted)]
    answers = [f'{box_to_text(*BOX)}{mask_to_text(s)} boat' for s in said]
    metrics = [answer_metrics.metric(name, codes=codes) for name in ('mask_iou', 'box_accuracy')]
    path = tmp_path / 'predictions.jsonl'
    scores = generation.run(
        lambda batch: answers, [({}, records)], metrics, truth_field='true_masks', predictions_path=path
    )
    assert scores['mask_iou']['score'] > 0.97 and scores['box_accuracy']['score'] == 1.0
    assert 0 < scores['mask_iou']['chance'] < 1 and scores['mask_iou']['n'] == 3
    assert generation.read_predictions(path)[1]['prediction'] == answers[1]


def test_mistakes(codes):
    with pytest.raises(UserError, match=r'evals\.a\.metrics: mask_iou reads masks by their codes: set codes'):
        answer_metrics.metric('mask_iou', 'evals.a.metrics')
    metric = answer_metrics.metric('mask_iou', codes=codes)
    with pytest.raises(UserError, match=r"'<loc0001.* is no true mask: set answers='true_masks'"):
        metric.measure(['a'], [['<loc0001><loc0001><loc0002><loc0002> boat']])


def test_reconstruction():
    true = np.zeros((3, 64, 64), np.uint8)
    true[0, :32] = true[1, :32] = true[2] = 255
    found = np.where(true > 0, 0.3, -0.3)
    found[0, 16:32] = -1  # half of it is lost
    batch = {'mask': true, '_mask': np.array([True, True, False])}
    scores = reconstruction.run(lambda batch: found, [(batch, [{}, {}])])
    assert scores['mask_iou']['score'] == 0.75 and scores['mask_iou']['n'] == 2
    assert scores['mask_iou']['chance'] == 1.0  # both are their mean
    with pytest.raises(UserError, match='nothing to evaluate'):
        reconstruction.run(lambda batch: found, [])
