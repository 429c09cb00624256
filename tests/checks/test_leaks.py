"""Which answers a prompt gives away, and which it holds with good reason."""

import numpy as np
import pytest

from big_vlm.checks import leaks
from big_vlm.checks.leaks import Asked

BOATS = 'two white boats at a quay'


def found(*pairs, example=None):
    columns = leaks.columns(example or {})
    asked = [Asked('s', i, prompt, answer, columns) for i, (prompt, answer) in enumerate(pairs)]
    return [one.record for one in leaks.find(asked)]


def test_words():
    assert leaks.words('Is it <loc0012>RED, or not?') == ('is', 'it', '<loc0012>', 'red', 'or', 'not')
    assert leaks.words('红色car') == ('红', '色', 'car')


@pytest.mark.parametrize(
    ('prompt', 'answer', 'leaks'),
    [
        (f'caption en: {BOATS}', BOATS, True),
        ('Two WHITE boats, at a quay.', BOATS, True),  # neither case nor punctuation tell them apart
        ('two white boats at a quayside', BOATS, False),  # whole words
        ('caption en', BOATS, False),
        ('is it red or blue?', 'red', False),  # a question may hold a short answer
        ('is it so, yes or no?', 'yes', False),
        ('图中' + '红色的汽车停在白色的房子前面' + '吗', '红色的汽车停在白色的房子前面', True),
        ('segment <loc0001><loc0002><loc0003><loc0004>', '<loc0001><loc0002><loc0003><loc0004>', True),
        ('detect cat', '<loc0001><loc0002><loc0003><loc0004> cat', False),
        ('what?', '!', False),
    ],
)
def test_a_long_answer_is_one_leak(prompt, answer, leaks):
    assert found((prompt, answer), ('caption en', 'a lighthouse')) == [0] * leaks


def test_one_of_several_choices_is_none():
    example = {'image': np.zeros((2, 2)), 'index': 0, 'choices': {'text': [BOATS, 'a lighthouse in the fog']}}
    assert leaks.columns(example | {'of_each': [['a', 'b'], []]}) == [[BOATS, 'a lighthouse in the fog']]
    prompt = f'which? a lighthouse in the fog, {BOATS}'
    assert found((prompt, BOATS), example=example) == []
    assert found((f'which? {BOATS}', BOATS), example=example) == [0]  # the others are not there to choose from


COLORS = ('red', 'blue', 'green', 'white')


@pytest.mark.parametrize(
    ('prompt', 'leaks'),
    [
        ('what color is number {i}? {answer}', True),
        ('{answer}! what color is number {i}?', True),
        ('what color is it? hint: {answer}. number {i}', True),
        ('what color is number {i}?', False),
        ('is number {i} red, blue, green or white?', False),  # to be chosen
    ],
)
def test_short_answers_leak_by_habit(prompt, leaks):
    pairs = [(prompt.format(i=i, answer=COLORS[i % 4]), COLORS[i % 4]) for i in range(12)]
    assert found(*pairs) == [0] * leaks
    assert found(*pairs[:7]) == []  # too few to call it one


def test_most_of_them_are_enough_and_the_first_is_told():
    pairs = [(f'number {i}?' + f' {COLORS[i % 4]}' * (i > 0), COLORS[i % 4]) for i in range(12)]
    assert found(*pairs) == [1]


def test_an_answer_that_is_always_the_same_is_none():
    """'yes or no? …' holds 'yes' in one place, and a source may have little else."""
    pairs = [('yes or no? is there a cat?', 'yes' if i else 'no') for i in range(20)]
    assert found(*pairs) == []


def test_a_commonest_answer_does_not_hide_a_habit():
    answers = ['no' if i in (5, 20, 33) else 'yes' for i in range(40)]
    assert found(*((f'is number {i} there? {answer}', answer) for i, answer in enumerate(answers))) == [0]
    assert found(*((f'is number {i} there, no or yes?', answer) for i, answer in enumerate(answers))) == []
    # Two others are too few to tell.
    assert found(*((f'is number {i} there? {answer}', answer) for i, answer in enumerate(answers[:33]))) == []


def test_sources_are_judged_apart():
    pairs = [(f'number {i}? {COLORS[i % 4]}', COLORS[i % 4]) for i in range(8)]
    good = [Asked('good', i, 'what color?', COLORS[i % 4]) for i in range(100)]
    bad = [Asked('bad', i, *pair) for i, pair in enumerate(pairs)]
    assert [(one.source, one.record) for one in leaks.find(good + bad)] == [('bad', 0)]
