"""Answers scored by kind and slice, beside what a guesser that never looks would get."""

import json

import numpy as np
import pytest

from big_vlm.config import UserError
from big_vlm.evaluators import generation

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
    assert scores == {
        'exact_match': {'score': 0.6, 'chance': 0.6, 'n': 5},  # Always '1', or 'red': 3 of 5.
        'exact_match/kind=color': {'score': 0.5, 'chance': 0.5, 'n': 2},
        'exact_match/kind=count': {'score': third, 'chance': third, 'n': 3},
        'exact_match/held_out=False': {'score': pytest.approx(1 / 3), 'chance': 1.0, 'n': 3},
        'exact_match/held_out=True': {'score': 1.0, 'chance': 1.0, 'n': 2},
    }
    assert 'exact_match/kind=color      0.5000  (chance 0.5000, n=2)' in capsys.readouterr().out


def test_predictions_file(tmp_path):
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


def test_a_metric_of_ones_own_and_records_with_an_id():
    length = generation.Metric(
        'length',
        lambda prediction, truth: len(prediction) / len(truth),
        lambda truths, kinds: np.full(len(truths), 0.25),
    )
    records = [{'prefix': 'p', 'suffix': 'abcd', 'id': 'scene-7'}]
    found = generation.predict(lambda batch: ['ab'], [({}, records)], [length])
    assert found == [{'id': 'scene-7', 'prompt': 'p', 'prediction': 'ab', 'truth': 'abcd', 'score': {'length': 0.5}}]
    assert generation.summarise(found, [length]) == {'length': {'score': 0.5, 'chance': 0.25, 'n': 1}}


def test_boxes_in_answers():
    whole, left = '<loc0000><loc0000><loc1023><loc1023> three', '<loc0000><loc0000><loc1023><loc0512> three'
    truths = [whole, left, whole]
    records = [{'prefix': 'detect three', 'suffix': truth} for truth in truths]
    answers = [left, left, 'no box']
    scores = generation.run(lambda batch: answers, [({'id': np.zeros((3, 2), int)}, records)], ['box_iou'])
    half = 512 / 1023
    assert scores['box_iou']['score'] == pytest.approx((half + 1) / 3, abs=1e-3)
    assert scores['box_iou']['n'] == 3 and half / 2 < scores['box_iou']['chance'] < 1


def test_errors():
    with pytest.raises(UserError, match="did you mean 'exact_match'"):
        generation.run(generate, batches(), ['exact_mach'])
    with pytest.raises(UserError, match="needs field 'answer'"):
        generation.run(generate, batches(), truth_field='answer')
    with pytest.raises(UserError, match='nothing to evaluate'):
        generation.run(generate, [])
