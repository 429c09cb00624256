"""Fields of an example: how operations reach them, and the operations that make one of others.

A column is a field with several items, or one inside another: 'captions/text'. A template names either in braces.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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


def column(example: Example, name: str) -> Any:
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
    """A field as words. Raises ValueError for null, for bytes that are no UTF-8, for several items and for fields."""
    value = column(example, name)
    _check_whole(value, name)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (list, tuple)) or np.ndim(value):
        raise ValueError(f'{name} has several items, and a text is one: first("{name}", "one"), or choice, or join')
    return str(value)


def items(value: Any, name: str) -> list[Any]:
    """The items of a column's value, NumPy's as Python's. Raises ValueError, with the column's name, for null and for
    what is no list: a text would be read letter by letter, fields by their names."""
    _check_whole(value, name)
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise ValueError(f'{name} is one value and no list: write it as a list of one, or take it as it is, {{{name}}}')
    found = [one.item() if isinstance(one, np.generic) else one for one in value]
    if any(one is None for one in found):
        raise ValueError(f'{name} has null among its items')
    return found


def texts(value: Any, name: str) -> list[str]:
    """`items` as words. Raises ValueError as it does, for bytes that are no UTF-8 and for items that are no text."""
    found = items(value, name)
    if any(isinstance(one, (list, tuple, np.ndarray, Mapping)) for one in found):
        raise ValueError(f'an item of {name} is a list or holds fields, and is no text')
    return [one.decode() if isinstance(one, bytes) else str(one) for one in found]


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
    listed, at = _items(example, source), int(get(example, index))
    if not 0 <= at < len(listed):
        raise ValueError(f'{index} is {at}, and {source} has {len(listed)} items')
    example[name] = listed[at]


def join(example: Example, context: 'Context', source: str, glue: str, name: str) -> None:
    """The items of a column as one text: `join('choices', ', ', 'listed')`."""
    example[name] = glue.join(_items(example, source, texts))


def lower(example: Example, context: 'Context', *names: str) -> None:
    """Fields, texts or columns of texts, in lower case."""
    for name in names:
        example[name] = _lowered(example, name)


def options(example: Example, context: 'Context', source: str, index: str) -> None:
    """Lettered options of a question, in training in a random order: '(A) banana, (B) apple' as `options`.

    `letter` is that of the right one, to which the field `index` counts from 0.
    """
    listed, right = _items(example, source, texts), int(get(example, index))
    if not 0 <= right < len(listed) <= len(_LETTERS):
        raise ValueError(f'{index} is {right}, and {source} has {len(listed)} items')
    order = context.rng.permutation(len(listed)).tolist() if context.train else list(range(len(listed)))
    example['options'] = ', '.join(f'({_LETTERS[at]}) {listed[item]}' for at, item in enumerate(order))
    example['letter'] = _LETTERS[order.index(right)]


def _check_whole(value: Any, name: str) -> None:
    if value is None:
        raise ValueError(f'{name} is null')
    if isinstance(value, Mapping):
        raise ValueError(f'{name} holds fields: write {" or ".join(f"{name}/{key}" for key in value)}')


def _items(example: Example, source: str, of: Callable[[Any, str], list[Any]] = items) -> list[Any]:
    found = of(column(example, source), source)
    if not found:
        raise ValueError(f'{source} is empty')
    return found


def _item(example: Example, source: str, choose: Callable[[int], int]) -> Any:
    found = _items(example, source)
    return found[choose(len(found))]


def _lowered(example: Example, name: str) -> str | list[str]:
    value = get(example, name)
    if isinstance(value, (str, bytes)):
        return text(example, name).lower()
    return [one.lower() for one in texts(value, name)]


OPERATIONS = (copy, first, choice, majority, pick, join, lower, options)


# The fields that an operation may make of a record for those after it, to know every text there may be.
MADE: dict[str, Callable[..., Iterator[Example]]] = {
    'copy': lambda record, source, name: iter([{name: column(record, source)}]),
    'first': lambda record, source, name: ({name: value} for value in items(column(record, source), source)[:1]),
    'choice': lambda record, source, name: ({name: value} for value in items(column(record, source), source)),
    'majority': lambda record, source, name: ({name: value} for value in items(column(record, source), source)),
    'pick': lambda record, source, index, name: ({name: value} for value in items(column(record, source), source)),
    'join': lambda record, source, glue, name: iter([{name: glue.join(texts(column(record, source), source))}]),
    'lower': lambda record, *names: iter([{name: _lowered(record, name) for name in names}]),
    'options': lambda record, source, index: (
        {'options': f'({_LETTERS[at]}) {item}, ', 'letter': _LETTERS[at]}
        for at, item in enumerate(texts(column(record, source), source)[: len(_LETTERS)])
    ),
}
