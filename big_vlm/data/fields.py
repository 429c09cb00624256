"""Fields of an example: how operations reach them, and the operations that make one of others.

A column is a field with several items, or one inside another: 'captions/text'. A template names either in braces.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from big_vlm.config import UserError, unknown

if TYPE_CHECKING:
    from big_vlm.data.transforms import Context

Example = dict[str, Any]
_FIELD = re.compile(r'\{(\w[\w.-]*(?:/\w[\w.-]*)*)\}')
_LETTERS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'


def get(example: Example, name: str) -> Any:
    """A field. Raises UserError, with what was meant, if it is not there."""
    if name not in example:
        raise unknown('field', name, example, 'in a pipeline')
    return example[name]


def picture(example: Example, operation: str) -> np.ndarray:
    """The decoded picture, uint8 [H,W,3]. Raises UserError for an operation that comes before `decode`, ValueError for
    several pictures where it takes one."""
    value = pictures(example, operation)
    if isinstance(value, list) or value.ndim == 4:
        raise ValueError(f'{operation} takes one picture, and this example has {len(value)}: leave {operation} out')
    return value


def pictures(example: Example, operation: str) -> np.ndarray | list[np.ndarray]:
    """The decoded picture, uint8 [H,W,3], or several, a list of them or [n,H,W,3]. Raises UserError for an operation
    that comes before `decode`."""
    value = get(example, 'image')
    if isinstance(value, list) and all(isinstance(one, np.ndarray) for one in value):
        return value
    if not isinstance(value, np.ndarray):
        raise UserError(f'{operation} before decode: write decode | {operation}(…)')
    return value


def alike(example: Example, operation: str) -> np.ndarray:
    """`pictures` as one array, uint8 [H,W,3] or [n,H,W,3], for what happens to all alike. Raises as it does, and
    ValueError for pictures of several sizes."""
    value = pictures(example, operation)
    if not isinstance(value, list):
        return value
    if len(sizes := sorted({one.shape[:2] for one in value})) != 1:
        found = ' and '.join(f'{height}×{width}' for height, width in sizes) or 'no'
        raise ValueError(f'{operation} takes pictures of one size, and this example has {found} pixels: resize first')
    return np.stack(value)


def column(example: Example, name: str) -> Sequence[Any]:
    """A field, or one within another: 'captions/text'. Raises UserError for one that is not there, ValueError where it
    lacks the one within, as this example's may alone."""
    first, *within = name.split('/')
    value = get(example, first)
    for key in within:
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f'no {key!r} in it for {name}')
        value = value[key]
    return value


def text(example: Example, name: str) -> str:
    """A field as words. Raises ValueError for null, for bytes that are no UTF-8 and for several items."""
    value = column(example, name)
    if value is None:
        raise ValueError(f'{name} is null')
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (list, tuple, dict)) or np.ndim(value):
        raise ValueError(f'{name} has several items, and a text is one: first("{name}", "one"), or choice, or join')
    return str(value)


def fill(example: Example, template: str) -> str:
    """Not str.format: a template names fields and nothing else, and other braces are just characters."""
    return _FIELD.sub(lambda match: text(example, match[1]), template)


def cased(value: str, context: 'Context') -> str:
    return value.lower() if context.contract.lower else value


def copy(example: Example, context: 'Context', source: str, name: str) -> None:
    """A field, or one within another, under a second name: `copy('img', 'image')`, as operations on pictures say."""
    example[name] = column(example, source)


def first(example: Example, context: 'Context', source: str, name: str) -> None:
    """The first item of a column, `first('objects/digit', 'digit')`, as a field of its own: a label to evaluate."""
    example[name] = _item(example, source, lambda count: 0)


def choice(example: Example, context: 'Context', source: str, name: str) -> None:
    """An item of a column at random, `choice('captions/text', 'caption')`, as a field; the first if not in training."""
    example[name] = _item(example, source, lambda count: context.rng.integers(count) if context.train else 0)


def majority(example: Example, context: 'Context', source: str, name: str) -> None:
    """The commonest item of a column, the first of those that are equally common: `majority('answers', 'answer')`."""
    example[name] = Counter(_items(example, source)).most_common(1)[0][0]


def pick(example: Example, context: 'Context', source: str, index: str, name: str) -> None:
    """The item of a column that another field counts to, from 0: `pick('choices', 'answer', 'right')`."""
    items, at = _items(example, source), int(get(example, index))
    if not 0 <= at < len(items):
        raise ValueError(f'{index} is {at}, and {source} has {len(items)} items')
    example[name] = items[at]


def join(example: Example, context: 'Context', source: str, glue: str, name: str) -> None:
    """The items of a column as one text: `join('choices', ', ', 'listed')`."""
    example[name] = glue.join(map(str, _items(example, source)))


def lower(example: Example, context: 'Context', *names: str) -> None:
    """Fields, texts or columns of texts, in lower case."""
    for name in names:
        value = get(example, name)
        example[name] = value.lower() if isinstance(value, str) else [str(item).lower() for item in value]


def options(example: Example, context: 'Context', source: str, index: str) -> None:
    """Lettered options of a question, in training in a random order: '(A) banana, (B) apple' as `options`.

    `letter` is that of the right one, to which the field `index` counts from 0.
    """
    items, right = _items(example, source), int(get(example, index))
    if not 0 <= right < len(items) <= len(_LETTERS):
        raise ValueError(f'{index} is {right}, and {source} has {len(items)} items')
    order = context.rng.permutation(len(items)).tolist() if context.train else list(range(len(items)))
    example['options'] = ', '.join(f'({_LETTERS[at]}) {items[item]}' for at, item in enumerate(order))
    example['letter'] = _LETTERS[order.index(right)]


def _items(example: Example, source: str) -> list[Any]:
    items = column(example, source)
    if not len(items):
        raise ValueError(f'{source} is empty')
    return [value.item() if isinstance(value, np.generic) else value for value in items]


def _item(example: Example, source: str, choose: Callable[[int], int]) -> Any:
    items = _items(example, source)
    return items[choose(len(items))]


OPERATIONS = (copy, first, choice, majority, pick, join, lower, options)


def _lowered(record: Example, *names: str) -> Iterator[Example]:
    yield {
        name: value.lower() if isinstance(value := get(record, name), str) else [str(item).lower() for item in value]
        for name in names
    }


# The fields that an operation may make of a record for those after it, to know every text there may be.
MADE: dict[str, Callable[..., Iterator[Example]]] = {
    'copy': lambda record, source, name: iter([{name: column(record, source)}]),
    'first': lambda record, source, name: ({name: value} for value in column(record, source)[:1]),
    'choice': lambda record, source, name: ({name: value} for value in column(record, source)),
    'majority': lambda record, source, name: ({name: value} for value in column(record, source)),
    'pick': lambda record, source, index, name: ({name: value} for value in column(record, source)),
    'join': lambda record, source, glue, name: iter([{name: glue.join(map(str, column(record, source)))}]),
    'lower': _lowered,
    'options': lambda record, source, index: (
        {'options': f'({_LETTERS[at]}) {item}, ', 'letter': _LETTERS[at]}
        for at, item in enumerate(column(record, source)[: len(_LETTERS)])
    ),
}
