"""From nested dicts to typed dataclasses and back: keys, types and the least value that each number may have."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Annotated, Any, Literal

from big_vlm.config.errors import UserError, unknown
from big_vlm.config.schema import Duration


def plain(value: Any) -> Any:
    """Plain dicts and lists of a ConfigDict or a dict, at any depth (a ConfigDict may hide inside a tuple)."""
    if hasattr(value, 'items'):
        value = value.to_dict() if hasattr(value, 'to_dict') else value
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def section_types(section: type) -> dict[str, Any]:
    """Field name → annotated type of a section."""
    return typing.get_type_hints(section, include_extras=True)


def coerce(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`, or a UserError that names `where`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        return _section(kind, _want(dict, value, where, 'a section'), where)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else coerce(args[0], value, where)
    if origin is Annotated:
        number = coerce(args[0], value, where)
        if number < args[1]:
            raise UserError(f'{where}: must be at least {args[1]}, got {value!r}')
        return number
    if origin is Literal:
        if value not in args:
            raise unknown('value', value, args, where)
        return value
    if origin is dict:
        items = _want(dict, value, where, 'a dict').items()
        return {str(key): coerce(args[1], item, f'{where}.{key}') for key, item in items}
    if origin is tuple:
        items = _want((list, tuple), value, where, 'a tuple')
        inner = [args[0]] * len(items) if args[-1] is Ellipsis else args
        if len(items) != len(inner):
            raise UserError(f'{where}: must have {len(inner)} entries, got {value!r}')
        return tuple(coerce(k, item, f'{where}[{i}]') for i, (k, item) in enumerate(zip(inner, items, strict=True)))
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise UserError(f'{where}: must be finite, got {value!r}')
        return float(value)
    if kind is int and isinstance(value, bool):
        raise UserError(f'{where}: must be int, got {value!r}')
    return _want(kind, value, where, kind.__name__)


def _want(kind: Any, value: Any, where: str, what: str) -> Any:
    if not isinstance(value, kind):
        raise UserError(f'{where}: must be {what}, got {value!r}')
    return value


def _section(kind: type, value: dict[str, Any], where: str) -> Any:
    hints = section_types(kind)
    for key in value:
        if key not in hints:
            raise unknown('key', key, hints, where)
    for f in dataclasses.fields(kind):
        if f.name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f'{where}.{f.name} is missing')
    section = kind(**{key: coerce(hints[key], item, f'{where}.{key}') for key, item in value.items()})
    if kind is Duration and len(section.given()) > 1:
        both = ' and '.join(section.given())
        raise UserError(f'{where}: {both} are both given; keep one and set the other to 0')
    return section
