"""What is said about a digit scene: place words, reading order, the caption, questions with exactly one right answer.

An object is a dict with `digit` (0..9), `color` and `place`; objects come in reading order.
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar('Item')

WORDS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
PLACES = (
    ('top left', 'top center', 'top right'),
    ('middle left', 'center', 'middle right'),
    ('bottom left', 'bottom center', 'bottom right'),
)
KINDS = ('which', 'count', 'color', 'where', 'compare', 'add')


def row_and_column(y: float, x: float, size: int) -> tuple[int, int]:
    """Row and column, each 0..2, of a point (pixels) in the 3×3 division of a square image of `size` pixels."""
    return min(int(3 * y / size), 2), min(int(3 * x / size), 2)


def place(y: float, x: float, size: int) -> str:
    """The place word of a digit's centre (pixels): 'top left' … 'bottom right'."""
    row, column = row_and_column(y, x, size)
    return PLACES[row][column]


def reading_key(y: float, x: float, size: int) -> tuple[int, float]:
    """Sort key of reading order: the row of the 3×3 division, then the centre from left to right."""
    return row_and_column(y, x, size)[0], x


def reading(objects: Sequence[dict]) -> str:
    """The digits in reading order: '3 7'."""
    return ' '.join(str(o['digit']) for o in objects)


def name(thing: dict) -> str:
    """'red three'."""
    return f'{thing["color"]} {WORDS[thing["digit"]]}'


def caption(objects: Sequence[dict]) -> str:
    """'a red three in the top left and a blue seven in the center'; more than two are listed with commas."""
    phrases = [f'{_article(o["color"])} {name(o)} in the {o["place"]}' for o in objects]
    return ' and '.join([', '.join(phrases[:-1])] * bool(phrases[:-1]) + phrases[-1:])


def _article(word: str) -> str:
    return 'an' if word[0] in 'aeiou' else 'a'


def pick(dice: random.Random, items: Sequence[Item]) -> Item:
    """One of the items. Not `dice.choice`, whose draws may change between Python versions."""
    return items[int(dice.random() * len(items))]


def questions(objects: Sequence[dict], dice: random.Random, colors: Sequence[str]) -> list[dict]:
    """Questions of every kind the scene allows, as dicts `question`, `answer`, `kind`.

    A digit, colour or place points at an object only where it is the only one of its kind in the scene. Digits are
    answered by name ('three'), counts and sums in figures ('2', '12'), comparisons with 'yes' or 'no'.
    """
    digits, seen, places = (Counter(o[key] for o in objects) for key in ('digit', 'color', 'place'))
    asked = []

    def ask(kind: str, question: str, answer: str) -> None:
        asked.append({'question': question, 'answer': answer, 'kind': kind})

    for o in objects:
        word = WORDS[o['digit']]
        if seen[o['color']] == 1:
            ask('which', f'which digit is {o["color"]}?', word)
            ask('where', f'where is the {o["color"]} digit?', o['place'])
        if places[o['place']] == 1:
            ask('which', f'which digit is in the {o["place"]}?', word)
            ask('color', f'what color is the digit in the {o["place"]}?', o['color'])
        if digits[o['digit']] == 1:
            ask('color', f'what color is the {word}?', o['color'])
            ask('where', f'where is the {word}?', o['place'])
    ask('count', 'how many digits are there?', str(len(objects)))
    for color in dict.fromkeys((pick(dice, objects)['color'], pick(dice, colors))):
        ask('count', f'how many {color} digits are there?', str(seen[color]))
    if len(objects) > 1:
        ask('add', 'what is the sum of the digits?', str(sum(o['digit'] for o in objects)))
        unique = [o for o in objects if seen[o['color']] == 1]
        if len(unique) > 1:
            a = pick(dice, unique)
            b = pick(dice, [o for o in unique if o is not a])
            if a['digit'] != b['digit']:
                greater = 'yes' if a['digit'] > b['digit'] else 'no'
                ask('compare', f'is the {a["color"]} digit greater than the {b["color"]} digit?', greater)
    return asked
