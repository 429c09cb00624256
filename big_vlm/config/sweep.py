"""A sweep: one config, several values of some of its keys, and a run for every combination.

A config file may define it beside `get_config`, and gets the same argument:

    def sweep(arg=''):
        return {
            'pretrain.optimizer.lr': (3e-4, 1e-3),  # each of these …
            ('pretrain.batch_size', 'pretrain.total.steps'): ((64, 1000), (128, 500)),  # … with each of these pairs
        }

A key is what stands behind `--config.` on the command line; ':NAME' is the argument NAME of `get_config`, as in
`--config=FILE:NAME=…`. Keys in a tuple change together. Several dicts in a tuple are one sweep after the other.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from big_vlm.config.coercion import plain
from big_vlm.config.errors import UserError, located
from big_vlm.config.files import call, load_config
from big_vlm.config.schema import Stage
from big_vlm.config.validation import validate

_LONGEST = 120  # characters of a folder's name


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    name: of its folder, such as 'lr=0.001,batch_size=64'.
    values: key → value of what is swept, as the sweep says it.
    spec, overrides: what `load_config` takes.
    stages: validated.
    """

    name: str
    values: dict[str, Any]
    spec: str
    overrides: dict[str, str]
    stages: dict[str, Stage]

    def flags(self, workdir: str) -> list[str]:
        """Of `python -m big_vlm.main`."""
        return [
            f'--config={self.spec}',
            f'--workdir={workdir}',
            *(f'--config.{key}={text}' for key, text in self.overrides.items()),
        ]


def sweep_runs(
    spec: str, overrides: Mapping[str, str] | None = None, swept: Mapping[str, str] | None = None
) -> list[SweepRun]:
    """All runs of a config's sweep, in order: the last key's values change fastest.

    Args:
      spec, overrides: as of `load_config`, the same for all runs.
      swept: key → text 'VALUE,VALUE': a sweep to make instead of the file's.

    Raises:
      UserError: no sweep, one that is none, two runs that are the same; a config that is wrong in any run.
    """
    path, _, arg = spec.partition(':')
    if swept:
        points = expand({key: _values(text) for key, text in swept.items()}, '--sweep')
    else:
        sweep = call(path, 'sweep', arg)
        if sweep is None:
            raise UserError(f'{path} has no function sweep(arg): write one, or say --sweep.KEY=VALUE,VALUE')
        points = expand(sweep, f'{path}: sweep')
    short = _short({key for point in points for key in point})
    runs: dict[str, SweepRun] = {}
    for point in points:
        texts = {key: value if isinstance(value, str) else repr(plain(value)) for key, value in point.items()}
        if both := [key for key in point if key in (overrides or {})]:
            raise UserError(f'--config.{both[0]}={overrides[both[0]]}: it is swept; leave it out')
        arguments = [f'{key[1:]}={text}' for key, text in texts.items() if key.startswith(':')]
        own = f'{path}:{",".join([arg] * bool(arg) + arguments)}' if arguments else spec
        own_overrides = {**(overrides or {}), **{key: text for key, text in texts.items() if key[0] != ':'}}
        name = _free(','.join(f'{short[key]}={_word(text)}' for key, text in texts.items()), runs)
        if same := [run.name for run in runs.values() if (run.spec, run.overrides) == (own, own_overrides)]:
            raise UserError(f'the sweep has {same[0]} twice: keep one')
        with located(name):
            stages = validate(load_config(own, own_overrides))
        runs[name] = SweepRun(name, point, own, own_overrides, stages)
    return list(runs.values())


def expand(sweep: Any, where: str = 'sweep') -> list[dict[str, Any]]:
    """What the runs of a sweep set: key → value.

    >>> expand(({'lr': (1, 2), ('b', 'n'): ((3, 4), (5, 6))}, {'lr': (7,)}))  # doctest: +NORMALIZE_WHITESPACE
    [{'lr': 1, 'b': 3, 'n': 4}, {'lr': 1, 'b': 5, 'n': 6}, {'lr': 2, 'b': 3, 'n': 4}, {'lr': 2, 'b': 5, 'n': 6},
     {'lr': 7}]
    """
    parts = sweep if isinstance(sweep, (list, tuple)) else (sweep,)
    points = []
    for part in parts:
        if not isinstance(part, Mapping) or not part:
            raise UserError(f'{where}: must be a dict of keys and their values, got {part!r}')
        for steps in itertools.product(*(list(_axis(key, values, where)) for key, values in part.items())):
            keys = [key for step in steps for key in step]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise UserError(f'{where}: {twice[0]!r} is there twice: keep one')
            points.append({key: value for step in steps for key, value in step.items()})
    if not points:
        raise UserError(f'{where}: is empty')
    return points


def _axis(key: Any, values: Any, where: str) -> Iterator[dict[str, Any]]:
    """What one entry of a sweep sets, value by value."""
    keys = key if isinstance(key, tuple) else (key,)
    if not keys or not all(isinstance(k, str) and k.strip(':') for k in keys):
        raise UserError(f'{where}: a key is a text such as "optimizer.lr", or a tuple of them, got {key!r}')
    for value in _several(values, f'{where}: {key!r}'):
        if not isinstance(key, tuple):
            yield {key: value}
            continue
        together = _several(value, f'{where}: {key!r}')
        if len(together) != len(keys):
            raise UserError(f'{where}: {key!r} are {len(keys)} keys, but {value!r} are {len(together)} values')
        yield dict(zip(keys, together, strict=True))


def _several(values: Any, where: str) -> list[Any]:
    values = values.tolist() if hasattr(values, 'tolist') else values  # of numpy
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise UserError(f'{where}: must be a tuple of values, got {values!r}')
    return list(values)


def _values(text: str) -> list[Any]:
    """Of '3e-4,1e-3', of 'cosine,linear', of '(0, 0.5),(0, 1)'."""
    try:
        return list(ast.literal_eval(f'({text},)'))
    except (ValueError, SyntaxError):
        return text.split(',')


def _short(keys: Iterable[str]) -> dict[str, str]:
    """Key → as few of its last parts as tell it from the others."""
    parts, short = {key: key.lstrip(':').split('.') for key in keys}, {}
    for key, names in parts.items():
        others = [other for name, other in parts.items() if name != key]
        length = next((n for n in range(1, len(names)) if all(o[-n:] != names[-n:] for o in others)), len(names))
        short[key] = '.'.join(names[-length:])
    return short


def _word(text: str) -> str:
    """As part of a folder's name."""
    return re.sub(r'[^\w.+-]+', '_', text, flags=re.ASCII).strip('_') or '_'


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """The name, shortened, with a number behind it if it is taken."""
    name = name[:_LONGEST]
    return next(n for i in itertools.count(1) if (n := f'{name}-{i}' if i > 1 else name) not in taken)
