"""Retrieval over a handful of scenes whose similarities are written down."""

import numpy as np
import pytest

from big_vlm.config import UserError
from big_vlm.evaluators import retrieval

VECTORS = dict(zip('abcdef', np.eye(6), strict=True))


WAYS = (('image', 'text'), ('text', 'image'))


def embed_text(texts):
    return np.array([VECTORS[text] for text in texts])


def batches(*captions_per_batch):
    """The image of a caption is its vector, but for 'd', whose image looks like 'a'."""
    for captions in captions_per_batch:
        image = np.array([VECTORS[c] + (10 * VECTORS['a'] if c == 'd' else 0) for c in captions])
        yield {'image': image, '_mask': np.ones(len(captions), bool)}, [{'caption': c} for c in captions]


def run(found, **options):
    return without_interval(retrieval.run(lambda batch: batch['image'], embed_text, found, **options))


def without_interval(scores):
    """The scores, after a look at their intervals."""
    assert all(entry['low'] <= entry['score'] <= entry['high'] for entry in scores.values())
    return {name: {k: v for k, v in entry.items() if k not in ('low', 'high')} for name, entry in scores.items()}


def test_both_directions(capsys):
    scores = run(batches('abcd', 'ef'))
    # Image 'd' is nearest to caption 'a', then its own. Caption 'a' is nearest to image 'd'. Of six, ten say nothing.
    one, five = ({'score': s, 'chance': pytest.approx(k / 6), 'n': 6} for s, k in ((5 / 6, 1), (1.0, 5)))
    assert scores == {f'{way}_to_{to}/R@{k}': v for way, to in WAYS for k, v in ((1, one), (5, five))}
    assert capsys.readouterr().out.count('chance 0.1667, n=6') == 2


def test_takes_the_first_distinct_captions_and_stops_reading():
    def endless():
        yield from batches('aab', 'bca')
        raise AssertionError('read on after enough examples')

    scores = run(endless(), examples=3)
    assert scores['image_to_text/R@1'] == {'score': 1.0, 'chance': pytest.approx(1 / 3), 'n': 3}


def test_several_captions_of_an_image():
    """Image 0 is nearest to image 1's second caption, then to its own; the sixth caption of an image is none."""
    own = {'x': [0.9, 0.1, 0.0], 'y': [0.0, 1.0, 0.0], 'z': [0.8, 0.0, 0.6], 'w': [1.0, 0.2, 0.0], 'v': [0.0, 0.0, 1.0]}
    image = np.array([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]])
    captions = [['x', 'z'], ['y', 'w'], ['v', 'v', 'v', 'v', 'v', 'x']]
    found = [({'image': image}, [{'captions': {'text': np.array(texts, object)}} for texts in captions])]
    scores = retrieval.run(
        lambda batch: batch['image'],
        lambda texts: np.array([own[text] for text in texts]),
        found,
        'captions/text',
    )
    assert {name: entry['n'] for name, entry in scores.items() if '@1' in name} == {
        'image_to_text/R@1': 3,
        'text_to_image/R@1': 9,
    }
    assert scores['image_to_text/R@1']['score'] == pytest.approx(2 / 3)
    # 'w' finds image 0 first.
    assert scores['text_to_image/R@1']['score'] == pytest.approx(8 / 9)
    # Of nine captions two, two and five are right; of three images one.
    assert scores['image_to_text/R@1']['chance'] == pytest.approx((2 / 9 + 2 / 9 + 5 / 9) / 3)
    assert scores['text_to_image/R@1']['chance'] == pytest.approx(1 / 3)


def test_padding_does_not_count():
    batch, records = next(batches('abc'))
    batch['_mask'] = np.array([True, False, True])
    assert run([(batch, records)])['text_to_image/R@1']['n'] == 2


def test_nothing_to_evaluate():
    with pytest.raises(UserError, match='nothing to evaluate'):
        run([])
    with pytest.raises(UserError, match="needs field 'text'"):
        run(batches('ab'), text_field='text')
    with pytest.raises(ValueError, match="no 'text' in it for caption/text"):  # one record's own fault
        run(batches('ab'), text_field='caption/text')


def test_a_diverged_model_is_named_not_scored():
    batch, records = next(batches('ab'))
    batch['image'][1, 0] = np.nan
    with pytest.raises(UserError, match='image embeddings hold NaN'):
        run([(batch, records)])
    batch['_mask'] = np.array([True, False])  # What padding holds does not matter.
    assert run([(batch, records)])['image_to_text/R@1']['n'] == 1
