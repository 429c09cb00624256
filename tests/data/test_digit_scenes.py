"""The scenes say the truth: every answer, box, mask and caption is derived again from the objects or the pixels."""

import re

import cv2
import numpy as np
import pytest

from big_vlm.data import sources
from big_vlm.data.builders import scene_language
from big_vlm.data.builders.scenes import HELD_OUT, INK, LAYOUTS, SPLITS, Scenes, source_digits

WORDS = ['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine']


def pixels(png: bytes) -> np.ndarray:
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


@pytest.fixture(scope='module')
def scenes() -> dict:
    return {(layout, split): [Scenes(layout, split)[i] for i in range(80)] for layout in LAYOUTS for split in SPLITS}


@pytest.fixture(scope='module')
def every(scenes) -> list:
    return [scene for some in scenes.values() for scene in some]


def test_a_scan_belongs_to_one_split_and_shares_are_70_15_15_in_every_class():
    parts = {split: source_digits(split) for split in SPLITS}
    indices = np.concatenate([part[2] for part in parts.values()])
    assert sorted(indices) == list(range(1797))
    for label in range(10):
        counts = np.array([(part[1] == label).sum() for part in parts.values()])
        assert np.abs(counts / counts.sum() - [0.7, 0.15, 0.15]).max() < 0.006
    images, labels, where = parts['test']
    from sklearn.datasets import load_digits

    digits = load_digits()
    assert np.array_equal(labels, digits.target[where])
    assert np.allclose(images * 16, digits.images[where])


def test_scenes_draw_only_scans_of_their_own_split(scenes):
    for (layout, split), some in scenes.items():
        allowed = set(source_digits(split)[2].tolist())
        assert {int(o['source']) for scene in some for o in scene['objects']} <= allowed, (layout, split)


def test_a_scene_depends_on_its_index_alone():
    first, again = Scenes('free', 'validation'), Scenes('free', 'validation')
    assert again[7]['image'] == [first[3], first[7]][1]['image']
    assert first[7]['image'] != first[8]['image']
    assert Scenes('free', 'test')[7]['image'] != first[7]['image']


def test_held_out_pairs():
    validation, test = set(HELD_OUT['validation']), set(HELD_OUT['test'])
    assert not validation & test and len(test) == 8 and len(validation) == 4
    assert [color for color, _ in HELD_OUT['test']] == list(INK)
    assert len({digit for _, digit in HELD_OUT['test']}) == 8


@pytest.mark.parametrize('layout', LAYOUTS)
def test_held_out_pairs_appear_where_they_may_and_are_flagged(layout):
    pairs = {}
    for split in SPLITS:
        drawn = Scenes(layout, split)
        pairs[split], flagged = set(), 0
        for index in range(150):
            scene = drawn[index]
            found = {(o['color'], o['digit']) for o in scene['objects']}
            pairs[split] |= found
            assert scene['held_out'] == bool(found & set(HELD_OUT[split]))
            flagged += scene['held_out']
        assert (flagged == 0) if split == 'train' else (15 < flagged < 50)
    unseen = set(HELD_OUT['validation']) | set(HELD_OUT['test'])
    assert not pairs['train'] & unseen
    assert not pairs['validation'] & set(HELD_OUT['test'])
    assert not pairs['test'] & set(HELD_OUT['validation'])
    assert pairs['test'] & set(HELD_OUT['test']) and pairs['validation'] & set(HELD_OUT['validation'])


def test_masks_boxes_and_ink_agree(every):
    for scene in every:
        image, instances = pixels(scene['image']).astype(float), pixels(scene['instances'])[..., 0]
        assert set(np.unique(instances)) == set(range(len(scene['objects']) + 1))
        for number, thing in enumerate(scene['objects'], start=1):
            ys, xs = np.nonzero(instances == number)
            box = np.array([ys.min(), xs.min(), ys.max() + 1, xs.max() + 1]) / image.shape[0]
            assert np.allclose(thing['bbox'], box, atol=1e-6)
            assert 20 < len(ys) < 250
            # The ink's core has the hue of the colour it is called by, and of no other.
            core = cv2.erode((instances == number).astype(np.uint8), np.ones((2, 2), np.uint8)) > 0
            strongest = image[core if core.any() else instances == number]
            mean = strongest[strongest.sum(-1) >= np.median(strongest.sum(-1))].mean(0)
            distance = {
                name: min(np.abs(mean - np.array(ink) * shade).sum() for shade in np.linspace(0.85, 1, 8))
                for name, ink in INK.items()
            }
            assert min(distance, key=distance.get) == thing['color'], scene['id']


def test_digits_do_not_touch_and_ground_is_darker_than_ink(every):
    for scene in every:
        instances, image = pixels(scene['instances'])[..., 0], pixels(scene['image'])
        for number in range(1, len(scene['objects']) + 1):
            grown = cv2.dilate((instances == number).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
            assert set(np.unique(instances[grown])) <= {0, number}
        # 3 px beyond all ink there is ground alone.
        far = cv2.dilate((instances > 0).astype(np.uint8), np.ones((7, 7), np.uint8)) == 0
        assert image[far].max() < 140
        assert image[instances > 0].max(-1).mean() > image[far].max(-1).mean() + 80


def test_places_are_those_of_the_boxes(every):
    for scene in every:
        for thing in scene['objects']:
            row = ['top', 'middle', 'bottom'].index(thing['place'].split()[0]) if ' ' in thing['place'] else 1
            column = ['left', 'center', 'right'].index(thing['place'].split()[-1])
            y, x = (thing['bbox'][0] + thing['bbox'][2]) / 2, (thing['bbox'][1] + thing['bbox'][3]) / 2
            # The ink's middle may lie a few pixels off the middle of the scan.
            assert row / 3 - 0.07 < y < (row + 1) / 3 + 0.07, scene['id']
            assert column / 3 - 0.07 < x < (column + 1) / 3 + 0.07, scene['id']


def test_numbers_of_digits(scenes):
    for (layout, _), some in scenes.items():
        counts = np.bincount([scene['num_digits'] for scene in some], minlength=5)
        assert all(scene['num_digits'] == len(scene['objects']) for scene in some)
        if layout == 'cells':
            assert counts[0] == 0 and counts[3:].sum() == 0 and 50 < counts[1] < 75
        else:
            assert counts[0] == 0 and (counts[1:] > 5).all()


def test_caption_and_reading_order():
    things = [
        {'digit': 3, 'color': 'red', 'place': 'top left'},
        {'digit': 7, 'color': 'orange', 'place': 'center'},
        {'digit': 0, 'color': 'blue', 'place': 'bottom right'},
    ]
    assert scene_language.caption(things[:1]) == 'a red three in the top left'
    assert scene_language.caption(things[:2]) == 'a red three in the top left and an orange seven in the center'
    assert scene_language.caption(things) == (
        'a red three in the top left, an orange seven in the center and a blue zero in the bottom right'
    )
    assert scene_language.reading(things) == '3 7 0'
    # Rows first, then left to right, whatever the height within a row.
    centres = [(40, 10), (5, 50), (20, 9), (35, 30)]
    assert sorted(centres, key=lambda c: scene_language.reading_key(*c, 64)) == [(20, 9), (5, 50), (40, 10), (35, 30)]


def test_objects_come_in_reading_order(every):
    rows = {'top': 0, 'middle': 1, 'bottom': 2, 'center': 1}
    for scene in every:
        keys = [(rows[o['place'].split()[0]], (o['bbox'][1] + o['bbox'][3]) / 2) for o in scene['objects']]
        assert keys == sorted(keys)
        assert scene['reading'] == ' '.join(str(o['digit']) for o in scene['objects'])


def answer(question: str, objects: list[dict]) -> list[str]:
    """Every answer that the objects allow, worked out from the words of the question."""

    def those(color=None, word=None, place=None):
        return [
            o
            for o in objects
            if color in (None, o['color']) and word in (None, WORDS[o['digit']]) and place in (None, o['place'])
        ]

    if question == 'how many digits are there?':
        return [str(len(objects))]
    if question == 'what is the sum of the digits?':
        return [str(sum(o['digit'] for o in objects))]
    if m := re.fullmatch(r'how many (\w+) digits are there\?', question):
        return [str(len(those(color=m[1])))]
    if m := re.fullmatch(r'which digit is in the ([\w ]+)\?', question):
        return [WORDS[o['digit']] for o in those(place=m[1])]
    if m := re.fullmatch(r'which digit is (\w+)\?', question):
        return [WORDS[o['digit']] for o in those(color=m[1])]
    if m := re.fullmatch(r'what color is the digit in the ([\w ]+)\?', question):
        return [o['color'] for o in those(place=m[1])]
    if m := re.fullmatch(r'what color is the (\w+)\?', question):
        return [o['color'] for o in those(word=m[1])]
    if m := re.fullmatch(r'where is the (\w+) digit\?', question):
        return [o['place'] for o in those(color=m[1])]
    if m := re.fullmatch(r'where is the (\w+)\?', question):
        return [o['place'] for o in those(word=m[1])]
    if m := re.fullmatch(r'is the (\w+) digit greater than the (\w+) digit\?', question):
        return [
            'yes' if a['digit'] > b['digit'] else 'no'
            for a in those(color=m[1])
            for b in those(color=m[2])
            if a['digit'] != b['digit']
        ]
    raise AssertionError(question)


def test_every_question_has_exactly_one_answer_and_it_is_the_one_given(every):
    kinds, verdicts = set(), []
    for scene in every:
        asked = [q['question'] for q in scene['questions']]
        assert len(set(asked)) == len(asked)
        for entry in scene['questions']:
            assert answer(entry['question'], scene['objects']) == [entry['answer']], (scene['id'], entry)
            kinds.add(entry['kind'])
            verdicts += [entry['answer']] * (entry['kind'] == 'compare')
    assert kinds == set(scene_language.KINDS)
    assert 0.35 < verdicts.count('yes') / len(verdicts) < 0.65


@pytest.mark.smoke
def test_the_dataset_holds_the_scenes(tiny_digit_scenes):
    for layout in LAYOUTS:
        for split, count in (('train', 96), ('validation', 32), ('test', 32)):
            source = sources.load(f'digit_scenes/{layout}_tiny', split, tiny_digit_scenes)
            assert len(source) == count
            record, scene = source[31], Scenes(layout, split)[31]
            for key in ('id', 'image', 'instances', 'caption', 'reading', 'num_digits', 'held_out'):
                assert record[key] == scene[key]
            assert record['questions']['answer'] == [q['answer'] for q in scene['questions']]
            assert record['objects']['color'] == [o['color'] for o in scene['objects']]
            assert np.array_equal(record['objects']['bbox'], np.float32([o['bbox'] for o in scene['objects']]))
